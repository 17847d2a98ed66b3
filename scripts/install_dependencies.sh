#!/usr/bin/env bash
# Installs what the build needs with the system's package manager, when it may (root, or sudo without a password);
# otherwise prints the exact line to run and stops. Does nothing when everything is there.
#   scripts/install_dependencies.sh         what the trainers need
#   scripts/install_dependencies.sh test    and what the tests need
#   scripts/install_dependencies.sh fuzz    a clang that builds fuzzers
#   scripts/install_dependencies.sh cuobjdump   prints where it is; where the CUDA toolkit lacks it, it comes out of two
#                                           packages of Python's (PYTHON names one), into build/tools
set -euo pipefail

usage() { sed -n 's/^#   //p' "$0"; }
want=${1:-train}
[ $# -le 1 ] || want="$*"
case $want in
train | test | fuzz | cuobjdump) ;;
-h | --help) usage; exit 0 ;;
*) echo "install_dependencies: '$want' is unknown; there are:" >&2; usage >&2; exit 2 ;;
esac
if [ "$want" = cuobjdump ]; then
    tools=$(dirname "$0")/../build/tools
    find_cuobjdump() {
        local program
        for program in "$(command -v cuobjdump)" /usr/local/cuda/bin/cuobjdump "$tools"/nvidia/*/bin/cuobjdump; do
            [ -x "$program" ] && echo "$program" && return
        done
        return 1
    }
    find_cuobjdump || {
        "${PYTHON:-python3}" -m pip install -q --target "$tools" nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm >/dev/null 2>&1 &&
            find_cuobjdump
    }
    exit
fi
missing=()

# need COMMAND|HEADER PACKAGE-on-Debian on-Fedora on-Arch
need_command() { command -v "$1" >/dev/null || missing+=("$2 $3 $4"); }
need_header() {
    for folder in /usr/include /usr/local/include; do
        [ -e "$folder/$1" ] && return
    done
    missing+=("$2 $3 $4")
}
# Whether a fuzzer compiles and links: on Debian clang comes without the library that takes.
fuzzers_link() {
    local program status=0
    command -v clang++ >/dev/null || return
    program=$(mktemp)
    echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
        clang++ -x c++ -fsanitize=fuzzer,address - -o "$program" 2>/dev/null || status=1
    rm -f "$program"
    return $status
}
if [ "$want" = fuzz ]; then
    fuzzers_link && exit 0
    missing+=("clang clang clang")
fi
need_command g++ g++ gcc-c++ gcc
need_command make make make make
need_header CLI/CLI.hpp libcli11-dev cli11-devel cli11
need_header nlohmann/json.hpp nlohmann-json3-dev json-devel nlohmann-json
need_header xxhash.h libxxhash-dev xxhash-devel xxhash
if [ "$want" = test ]; then
    need_header gtest/gtest.h libgtest-dev gtest-devel gtest
    need_command perl perl perl perl
    # Elsewhere Open MPI is no command until a module is loaded; without it the tests under mpirun are skipped.
    if command -v apt-get >/dev/null; then
        need_command mpicxx libopenmpi-dev openmpi-devel openmpi
        need_command mpirun openmpi-bin openmpi openmpi
    fi
fi
[ ${#missing[@]} -eq 0 ] && exit 0

if command -v apt-get >/dev/null; then
    column=1 update="apt-get update -qq" install="apt-get install -y -qq --no-install-recommends"
elif command -v dnf >/dev/null; then
    column=2 update="" install="dnf install -y -q"
elif command -v pacman >/dev/null; then
    column=3 update="pacman -Sy --noconfirm" install="pacman -S --noconfirm --needed"
else
    column=1 update="" install=""
fi
packages=$(printf '%s\n' "${missing[@]}" | cut -d' ' -f$column | sort -u | tr '\n' ' ')
# On Debian the library of fuzzers may be a package of its own, as far as the lists of packages at hand say.
add_fuzzer_library() {
    if [ "$want" = fuzz ] && apt-cache show libclang-rt-dev >/dev/null 2>&1; then
        packages+="libclang-rt-dev "
    fi
}
# line AS_ROOT: what installs them, to be typed.
line() { echo "    ${update:+$1$update && }$1$install $packages"; }
if [ -z "$install" ]; then
    echo "These are missing, and this system has no package manager known here (apt-get, dnf, pacman): $packages" >&2
    exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
    as_root=""
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root="sudo "
else
    add_fuzzer_library
    echo "Missing packages. Run this, then start again:" >&2
    line "sudo " >&2
    exit 1
fi
echo "Installing: $packages"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086  # the lists are words
install_packages() {
    [ -z "$update" ] || $as_root$update || return
    add_fuzzer_library
    $as_root$install $packages
}
log=$(mktemp)
install_packages >"$log" 2>&1 || {
    tail -5 "$log" >&2
    echo "The package manager failed; its log is $log. What it was asked:" >&2
    line "$as_root" >&2
    exit 1
}
rm -f "$log"
if [ "$want" = fuzz ] && ! fuzzers_link; then
    echo "clang is there, but cannot link a fuzzer" >&2
    exit 1
fi
