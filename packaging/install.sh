#!/bin/sh
# Installs header, libraries, pkg-config file and CMake package of a finished build:
#
#     cargo build --release && packaging/install.sh PREFIX [BUILD_DIRECTORY]
#
# BUILD_DIRECTORY holds libmustafar.so and libmustafar.a; default: target/release. DESTDIR is put before PREFIX. The
# installed tree may be moved: nothing in it names PREFIX.
set -eu

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
prefix=${DESTDIR:-}$1
build=${2:-$root/target/release}
for file in libmustafar.so libmustafar.a; do
    [ -f "$build/$file" ] || { echo "$build/$file is missing: run cargo build --release" >&2; exit 1; }
done

version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -n 1)
major=${version%%.*}
rest=${version#*.}
# The part of the version that changes whenever the ABI may; build.rs puts the same into the SONAME.
if [ "$major" = 0 ]; then abi=0.${rest%%.*}; else abi=$major; fi

fill() {
    sed -e "s/@VERSION@/$version/g" -e "s/@ABI@/$abi/g" -e "s/@ABI_PATTERN@/$(echo "$abi." | sed 's/\./[.]/g')/g" "$1" >"$2"
    chmod 644 "$2"
}

install -d "$prefix/include" "$prefix/lib/pkgconfig" "$prefix/lib/cmake/mustafar"
install -m 644 "$root/include/mustafar.h" "$prefix/include/"
install -m 755 "$build/libmustafar.so" "$prefix/lib/libmustafar.so.$version"
ln -sf "libmustafar.so.$version" "$prefix/lib/libmustafar.so.$abi"
ln -sf "libmustafar.so.$abi" "$prefix/lib/libmustafar.so"
install -m 644 "$build/libmustafar.a" "$prefix/lib/"
fill "$root/packaging/mustafar.pc.in" "$prefix/lib/pkgconfig/mustafar.pc"
for name in mustafar-config mustafar-config-version; do
    fill "$root/packaging/$name.cmake.in" "$prefix/lib/cmake/mustafar/$name.cmake"
done
