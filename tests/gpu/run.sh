#!/usr/bin/env bash
# Builds the tests that run on the CUDA backend, carries them to a host with a GPU and runs them there:
#
#     tests/gpu/run.sh [--sanitize] [user@host]
#
# Without a host they run here. A host needs an NVIDIA driver, cuBLAS and NVRTC (in /usr/local/cuda or LD_LIBRARY_PATH), bash and tar; for --sanitize, which runs a smaller selection
# under each tool of compute-sanitizer, that program too. MUSTAFAR_CUDA_ARCHS=90, say, shortens the build.
set -euo pipefail
cd "$(dirname "$0")/../.."

sanitize=()
if [[ ${1-} == --sanitize ]]; then
    sanitize=(--sanitize)
    shift
fi
host=${1-}

tests=(append attend cache cache_snapshot cache_state cache_strategies capi compress cuda decompress golden llama_cuda merge
    properties properties_attend properties_damage prune score spmv)
pack=$(mktemp -d)
trap 'rm -rf "$pack"' EXIT
mkdir -p "$pack/bin" "$pack/tests" "$pack/docs"

MUSTAFAR_CUDA=require cargo test --no-run --message-format=json-render-diagnostics "${tests[@]/#/--test=}" |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' |
    while read -r binary; do
        name=$(basename "$binary")
        strip -o "$pack/bin/${name%-*}" "$binary"
    done
cp -r tests/vectors "$pack/tests"
cp docs/format.md "$pack/docs"
cp tests/gpu/suite.sh "$pack"

if [[ -z $host ]]; then
    "$pack/suite.sh" "${sanitize[@]}"
else
    # shellcheck disable=SC2016 # expanded on the host
    remote='dir=$(mktemp -d) && trap "rm -rf $dir" EXIT && tar -C "$dir" -xzf - && "$dir/suite.sh"'
    # shellcheck disable=SC2029 # expanded here
    tar -C "$pack" -czf - . | ssh "$host" "$remote ${sanitize[*]}"
fi
