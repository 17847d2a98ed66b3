#!/usr/bin/env bash
# Installs what the build needs with the system's package manager, when it may (root, or sudo without a password);
# otherwise prints the exact line to run and stops. Does nothing when everything is there.
#   scripts/install_dependencies.sh         what the trainers need
#   scripts/install_dependencies.sh test    and what the tests need
set -euo pipefail

want=${1:-train}
missing=()

# need COMMAND|HEADER PACKAGE-on-Debian on-Fedora on-Arch
need_command() { command -v "$1" >/dev/null || missing+=("$2 $3 $4"); }
need_header() {
    for folder in /usr/include /usr/local/include; do
        [ -e "$folder/$1" ] && return
    done
    missing+=("$2 $3 $4")
}
need_command g++ g++ gcc-c++ gcc
need_command make make make make
need_header CLI/CLI.hpp libcli11-dev cli11-devel cli11
need_header nlohmann/json.hpp nlohmann-json3-dev json-devel nlohmann-json
need_header xxhash.h libxxhash-dev xxhash-devel xxhash
if [ "$want" = test ]; then
    need_header gtest/gtest.h libgtest-dev gtest-devel gtest
    need_command python3 python3 python3 python
fi
[ ${#missing[@]} -eq 0 ] && exit 0

if command -v apt-get >/dev/null; then
    column=1 update="apt-get update -qq" install="apt-get install -y -qq --no-install-recommends"
elif command -v dnf >/dev/null; then
    column=2 update=true install="dnf install -y -q"
elif command -v pacman >/dev/null; then
    column=3 update="pacman -Sy --noconfirm" install="pacman -S --noconfirm --needed"
else
    column=1 update="" install=""
fi
packages=$(printf '%s\n' "${missing[@]}" | cut -d' ' -f$column | sort -u | tr '\n' ' ')
if [ -z "$install" ]; then
    echo "These are missing, and this system has no package manager known here (apt-get, dnf, pacman): $packages" >&2
    exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
    as_root=""
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root="sudo "
else
    echo "Missing packages. Run this, then start again:" >&2
    echo "    sudo $install $packages" >&2
    exit 1
fi
echo "Installing: $packages"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086  # the lists are words
{ $as_root$update && $as_root$install $packages; } >/tmp/llmc_install.$$.log 2>&1 || {
    tail -5 /tmp/llmc_install.$$.log >&2
    echo "The package manager failed; its log is /tmp/llmc_install.$$.log. The line that failed:" >&2
    echo "    $as_root$install $packages" >&2
    exit 1
}
rm -f /tmp/llmc_install.$$.log
