#!/usr/bin/env bash
# Runs the test binaries that run.sh has put beside it. A missing GPU is a failure.
set -euo pipefail
cd "$(dirname "$0")"
export MUSTAFAR_REQUIRE_GPU=1
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64
failed=()

run() {
    local name=$1
    shift
    printf '\n==> %s (%ds)\n' "$name" "$SECONDS"
    "$@" || failed+=("$name")
}

# racecheck's exit status counts warnings as well: rows past a sequence's end, whose scores are masked, may lead a read into
# the slot behind, which a copy of the same warp fills.
checked() {
    local tool=$1
    shift
    if [[ $tool == racecheck ]]; then
        compute-sanitizer --tool racecheck "$@" | tee racecheck.log && grep -q 'SUMMARY.*(0 errors' racecheck.log
    else
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$@"
    fi
}

if [[ ${1-} == --sanitize ]]; then
    export PROPTEST_CASES=2
    for tool in memcheck racecheck synccheck initcheck; do
        for test in append compress decompress prune spmv merge score; do
            run "$tool: $test" checked "$tool" "bin/$test" -q
        done
        # The long sweeps differ in numbers only. Gigabytes would take a sanitizer minutes.
        run "$tool: attend" checked "$tool" bin/attend -q --skip every_
        run "$tool: cuda" checked "$tool" bin/cuda -q --skip large
    done
else
    for binary in bin/*; do
        # Those need the sources, python3 or a C compiler, and no GPU.
        run "$(basename "$binary")" "$binary" -q --skip files_are_what_the_generator_writes --skip layout::
    done
fi

printf '\n'
if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all passed in ${SECONDS}s"
