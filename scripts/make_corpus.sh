#!/usr/bin/env bash
# Makes a text corpus that needs no download: the C and C++ headers under the system's include folders, as raw bytes, each
# file once, in a fixed order.
#   scripts/make_corpus.sh FILE [MIB]     writes FILE, at most MIB MiB (default 16)
set -euo pipefail

[[ $# -le 2 && ${1:-} =~ ^[^-] && ${2:-16} =~ ^[1-9][0-9]{0,6}$ ]] || { echo "usage: scripts/make_corpus.sh FILE [MIB]" >&2; exit 2; }
out=$1
if [ "${out%/}" != "$out" ] || { [ -e "$out" ] && [ ! -f "$out" ]; }; then
    echo "$out: is no file that could be replaced: name a file" >&2
    exit 1
fi
limit=$((${2:-16} << 20))
folders=()
for folder in /usr/include /usr/local/include /usr/lib/gcc; do
    [ -d "$folder" ] && folders+=("$folder")
done
[ ${#folders[@]} -gt 0 ] || { echo "no include folder found: install a C++ compiler, or use your own text" >&2; exit 1; }

# Under another name until it is whole, beside the file that a symbolic link stands for.
out_file=$(realpath -m -- "$out")
mkdir -p "$(dirname "$out_file")"
part=$(mktemp "$out_file.XXXXXX")
trap 'rm -f "$part"' EXIT
chmod "$(printf %o $((0666 & ~$(umask))))" "$part"
# Shuffled with a fixed source, so that the cut at MIB takes a fair sample of all libraries and the order is the same each
# time. head closes the pipe at the limit: that is no error.
{ find "${folders[@]}" -type f \( -name '*.h' -o -name '*.hpp' -o -name '*.hh' -o -name '*.tcc' \) -size -512k -print0 |
    LC_ALL=C sort -z | shuf -z --random-source=<(yes) | xargs -0 cat 2>/dev/null || true; } | head -c "$limit" >"$part"
[ -s "$part" ] || { echo "no headers found under ${folders[*]}" >&2; exit 1; }
mv -f "$part" "$out_file"
echo "$out: $(stat -c %s "$out_file") bytes of C and C++ headers"
