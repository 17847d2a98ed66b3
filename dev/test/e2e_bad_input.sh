#!/usr/bin/env bash
# Bad input to ./train_gpt_cpu: each ends with one sentence on stderr that names file or flag, and a status that is neither
# zero nor a crash; checkpoints that exist stay as they were.
#   dev/test/e2e_bad_input.sh [TRAINER]
#   dev/test/e2e_bad_input.sh ./train_gpt     the same on a GPU
set -uo pipefail
export LC_ALL=C # numbers with a decimal point
unset CDPATH # which cd would follow
cd "$(dirname "$0")/../.." || exit 1
# These models are too small to share among threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
trainer=$(realpath "${1:-./train_gpt_cpu}")
work=$(mktemp -d)
cleanup() {
    mountpoint -q "$work/small_disk" 2>/dev/null && umount "$work/small_disk"
    rm -rf "$work"
}
trap cleanup EXIT
failed=0
ok() { echo "ok   $1"; }
bad() {
    echo "FAIL $1"
    failed=1
}

# refused NAME PATTERN FLAG...: a run with these flags ends as the head of this file says, and its sentence has PATTERN.
refused() {
    local name=$1 pattern=$2 status=0
    shift 2
    timeout -k 5 60 "$trainer" "${small[@]}" "$@" >"$work/out" 2>"$work/err" || status=$?
    if [ $status -eq 0 ]; then
        bad "$name: exit 0"
    elif [ $status -ge 124 ]; then
        bad "$name: ended with status $status (a crash or a hang)"
    elif [ "$(wc -l <"$work/err")" -ne 1 ]; then
        bad "$name: expected one line on stderr, got:"
        sed 's/^/     /' "$work/err"
    elif ! grep -Eq -- "$pattern" "$work/err"; then
        bad "$name: '$(cat "$work/err")' does not match '$pattern'"
    else
        ok "$name: $(sed "s#$work/##g" "$work/err")"
    fi
}
# The same with these flags alone.
refused_alone() {
    local small=()
    refused "$@"
}
# The same for a run that is gone on with: its settings are those saved with it.
resume_refused() { refused_alone "$1" "$2" --resume "${@:3}"; }
newest() { find "$1" -maxdepth 1 -type d -name 'step*' | LC_ALL=C sort | tail -1; }
fingerprint() { find "$1" -type f -path '*step*' -exec sha256sum {} + | LC_ALL=C sort; }
unchanged() { if [ "$(fingerprint "$2")" = "$3" ]; then ok "$1"; else bad "$1"; fi; }

find /usr/include -maxdepth 1 -name '*.h' -print0 | LC_ALL=C sort -z | xargs -0 cat 2>/dev/null | head -c 100000 >"$work/corpus.txt"
shape=(--num_layers 1 --width 32 --num_heads 2 --num_kv_heads 1 --head_dim 16 --ffn_width 32)
small=(--seq_len 32 --batch_size 2 --max_steps 2 --eval_batches 1 --sample_tokens 0)
data=(--train_data "$work/corpus.txt")

# ---- data
refused "missing file" "no_such.txt" --train_data "$work/no_such.txt" --output_dir "$work/a"
refused "pattern without a match" "no_such" --train_data "$work/no_such*.txt" --output_dir "$work/a"
: >"$work/empty.txt"
refused "empty file" "empty.txt" --train_data "$work/empty.txt" --output_dir "$work/a"
mkdir "$work/folder"
refused "folder as data" "$work/folder" --train_data "$work/folder" --output_dir "$work/a"
printf 'short' >"$work/short.txt"
refused "T longer than the data" "--seq_len" --train_data "$work/short.txt" --output_dir "$work/a"
refused "T longer than the validation data" "--seq_len|--val_data" "${data[@]}" --val_data "$work/short.txt" --output_dir "$work/a"
refused "bytes do not fit the vocabulary" "--vocab_size" "${data[@]}" --vocab_size 100 --output_dir "$work/a"
refused "markers do not fit the vocabulary" "--byte_markers" "${data[@]}" --vocab_size 256 --output_dir "$work/a"
refused "bytes where shards are asked for" "corpus.txt" "${data[@]}" --data_format shards --output_dir "$work/a"
if command -v perl >/dev/null; then
    # shard FILE MAGIC VERSION STATED_TOKENS ACTUAL_TOKENS TOKEN
    shard() { perl -e 'binmode STDOUT; print pack("V256", @ARGV[0..2], (0) x 253), pack("v*", ($ARGV[4]) x $ARGV[3])' "${@:2}" >"$1"; }
    shard "$work/good.bin" 20240520 1 5000 5000 7
    head -c 500 "$work/good.bin" >"$work/header_cut.bin"
    refused "shard cut inside its header" "header_cut.bin" --train_data "$work/header_cut.bin" --output_dir "$work/a"
    head -c 5000 "$work/good.bin" >"$work/cut.bin"
    refused "truncated shard" "cut.bin" --train_data "$work/cut.bin" --output_dir "$work/a"
    shard "$work/lies.bin" 20240520 1 4000000000 5000 7
    refused "shard that states too many tokens" "lies.bin" --train_data "$work/lies.bin" --output_dir "$work/a"
    shard "$work/version.bin" 20240520 9 5000 5000 7
    refused "shard of another version" "version.bin" --train_data "$work/version.bin" --output_dir "$work/a"
    shard "$work/foreign.bin" 20241111 1 5000 5000 7
    refused "foreign shard" "foreign.bin" --train_data "$work/foreign.bin" --data_format shards --output_dir "$work/a"
    shard "$work/no_tokens.bin" 20240520 1 0 0 7
    refused "shard without tokens" "no_tokens.bin|--train_data" --train_data "$work/no_tokens.bin" --output_dir "$work/a"
    shard "$work/outside.bin" 20240520 1 5000 5000 300
    refused "token outside the vocabulary" "outside.bin" --train_data "$work/outside.bin" --output_dir "$work/a"
else
    echo "skip shards: no perl"
fi

# ---- flags that cannot be
if [[ $(basename "$trainer") = *cpu* ]]; then
    LLMC_WORLD_SIZE=2 refused "one of several ranks" "started as one of 2 ranks" "${data[@]}" "${shape[@]}" --output_dir "$work/a"
    refused "what would fit a GPU, asked of the CPU" "--fit: .*train_gpt" --fit
    refused "the profile of a GPU, asked of the CPU" "--profile: is about a GPU" "${data[@]}" --profile --output_dir "$work/a"
    refused "another GPU, asked of the CPU" "--device, --print_memory, --gpu_memory: are about a GPU" "${data[@]}" --print_memory --gpu_memory 3 --device 4 --output_dir "$work/a"
else
    refused "no such GPU" "--device 99" "${data[@]}" --device 99 --output_dir "$work/a"
    refused "too little of a GPU's memory" "not enough GPU memory: .* --fit what would fit" "${data[@]}" --gpu_memory 0.51 --output_dir "$work/a"
fi
refused "unknown flag" "nearest is --seq_len" "${data[@]}" --seq_length 5
refused "unknown setting in a file" "x.toml line 1: .*nearest is 'seq_len'" --config "$(echo 'seq_length = 5' >"$work/x.toml" && echo "$work/x.toml")"
refused "a settings file in a settings file" "x.toml line 1: a settings file cannot name another" --config "$(echo 'config = "y.toml"' >"$work/x.toml" && echo "$work/x.toml")"
for flag in init_from output_dir config; do
    refused "empty --$flag" "--$flag '': must name" "${data[@]}" --$flag ""
done
refused "a flag in the place of a value" "--output_dir: its value is missing \('--plain'" "${data[@]}" --output_dir --plain
refused "no value after =" "--seq_len '': must be a whole number" "${data[@]}" --seq_len= --plain
refused "RoPE scaling without its factor" "--rope_low_freq_factor and --rope_scaling_factor 1" "${data[@]}" --rope_low_freq_factor 3
refused "where a constant learning rate ends" "--final_learning_rate_fraction and --schedule constant" "${data[@]}" --schedule constant --final_learning_rate_fraction 0.5
refused "dilation of another scorer" "--lighthouse_dilation and --lighthouse_scorer norm" "${data[@]}" --attention lighthouse --lighthouse_dilation 2
refused "a decay that is 1 in float32" "--beta2 0.99999999999" "${data[@]}" --beta2 0.99999999999
refused "an epsilon that is 0 in float32" "--adam_eps 1e-46" "${data[@]}" --adam_eps 1e-46
refused "a folder's name that is too long" "aaa: cannot look there: File name too long" "${data[@]}" "${shape[@]}" --output_dir "$work/$(printf 'a%.0s' $(seq 300))"
touch "$work/a_file"
refused "a file for --output_dir" "--output_dir [^ ]*a_file: is no folder" "${data[@]}" "${shape[@]}" --output_dir "$work/a_file"
refused "a folder in a file for --output_dir" "--output_dir [^ ]*a_file/x: cannot look there" "${data[@]}" "${shape[@]}" --output_dir "$work/a_file/x"
refused "a file for --init_from" "--init_from [^ ]*a_file: is no folder" "${data[@]}" --init_from "$work/a_file"
refused "no folder for --init_from" "--init_from [^ ]*nothing: there is no such folder" "${data[@]}" --init_from "$work/nothing"
mkfifo "$work/a_pipe"
refused "a pipe for --train_data" "--train_data [^ ]*a_pipe: is a device or pipe" "${shape[@]}" --train_data "$work/a_pipe"
refused "heads that do not divide" "--num_kv_heads 3" "${data[@]}" --num_kv_heads 3
refused "batch that does not divide" "--global_batch 3" "${data[@]}" --global_batch 3
refused "Lighthouse flag under dense attention" "--lighthouse_topk" "${data[@]}" --lighthouse_topk 128
refused "illegal Lighthouse geometry" "--seq_len 32: .*nearest" "${data[@]}" --attention lighthouse --lighthouse_topk 128
resume_refused "resume of nothing" "settings.toml" --output_dir "$work/nothing"
[ ! -e "$work/a" ] && ok "a refused run leaves no output folder" || bad "a refused run left $work/a: $(ls "$work/a")"

# Scripts. What exists is not replaced, and what they are given is looked at first.
script_refused() { # script_refused NAME WORDS COMMAND...
    local name=$1 words=$2 status=0
    shift 2
    "$@" >"$work/out" 2>&1 </dev/null || status=$?
    if [ $status -ne 0 ] && grep -q -- "$words" "$work/out"; then ok "$name"; else bad "$name: status $status, $(cat "$work/out")"; fi
}
mkdir -p "$work/sweep/2"
touch "$work/sweep/2/mine"
sweep=(env "TRAINER=$trainer" "TRAIN_DATA=$work/corpus.txt" "OUTPUT_DIR=$work/sweep")
script_refused "a sweep where one is already" "sweep/2 is there already" "${sweep[@]}" scripts/sweep.sh levels 2
[ -e "$work/sweep/2/mine" ] && ok "which stays" || bad "a sweep removed $work/sweep/2"
script_refused "a sweep over another folder" "values with commas" "${sweep[@]}" scripts/sweep.sh levels ../sweep
script_refused "a sweep that never becomes dense" "SWITCH 9: must be below STEPS 4" "${sweep[@]}" STEPS=4 SWITCH=9 scripts/sweep.sh pool
script_refused "a sweep's length as a flag" "--seq_len: set SEQ_LEN in the environment" "${sweep[@]}" scripts/sweep.sh pool --seq_len 64
script_refused "what a sweep varies as a flag" "--lighthouse_pool=2: it is what this sweep varies" "${sweep[@]}" scripts/sweep.sh pool --lighthouse_pool=2
script_refused "a corpus in place of a folder" "is no file that could be replaced" scripts/make_corpus.sh "$work/sweep" 1
echo mine >"$work/corpus_out.tmp"
ln -s corpus_target "$work/corpus_out"
scripts/make_corpus.sh "$work/corpus_out" 1 >"$work/out" 2>&1
[ -L "$work/corpus_out" ] && [ "$(stat -c %s "$work/corpus_target")" -eq 1048576 ] && ok "a corpus goes where a link points" || bad "a corpus through a link: $(ls -l "$work"/corpus_*; cat "$work/out")"
[ "$(cat "$work/corpus_out.tmp")" = mine ] && ok "and touches no file beside it" || bad "a corpus replaced $work/corpus_out.tmp"
script_refused "a corpus where there is no room" "" bash -c 'ulimit -f 100; exec scripts/make_corpus.sh "$0" 1' "$work/corpus_cut"
[ -z "$(ls "$work" | grep corpus_cut)" ] && ok "which leaves nothing" || bad "a corpus that failed left $(ls "$work" | grep corpus_cut)"
script_refused "dependencies of what there is not" "'gpu' is unknown; there are" scripts/install_dependencies.sh gpu
script_refused "a grace that is no number" "SPAWN_GRACE 'x'" env SPAWN_GRACE=x scripts/spawn_ranks.sh 2 true

refused "a batch that no memory holds" "not enough (GPU )?memory: this run needs [0-9.]+ GiB" "${data[@]}" "${shape[@]}" --seq_len 2047 --batch_size 1048576 --output_dir "$work/a"

# Those that are run for what they print.
for printing in "--help" "--max_steps 0 --val_data $work/corpus.txt"; do
    # shellcheck disable=SC2086
    if "$trainer" "${small[@]}" "${shape[@]}" $printing >/dev/full 2>"$work/err"; then
        bad "${printing%% *} into a full device: exit 0"
    else
        grep -q "the output cannot be written" "$work/err" && ok "${printing%% *} into a full device" || bad "${printing%% *}: $(cat "$work/err")"
    fi
done

# ---- data that become shorter while they are read
cp "$work/corpus.txt" "$work/shrinks.txt"
"$trainer" "${small[@]}" "${shape[@]}" --train_data "$work/shrinks.txt" --output_dir "$work/shrinks" --max_steps 1000000 --checkpoint_every 1 >"$work/out" 2>"$work/err" &
trainer_pid=$!
for _ in $(seq 100); do [ -n "$(newest "$work/shrinks" 2>/dev/null)" ] && break || sleep 0.1; done
truncate -s 100 "$work/shrinks.txt"
wait $trainer_pid
status=$?
if [ $status -eq 1 ] && grep -q "became shorter" "$work/err"; then ok "data that become shorter"; else bad "data that become shorter: status $status, $(cat "$work/err")"; fi
cp "$work/corpus.txt" "$work/shrinks.txt"
step=$(newest "$work/shrinks" | sed 's/.*step0*//')
"$trainer" --resume --output_dir "$work/shrinks" --max_steps $((step + 1)) >/dev/null 2>"$work/err" && ok "and its checkpoint goes on" || bad "its checkpoint: $(cat "$work/err")"

# ---- a run that stands
"$trainer" "${small[@]}" "${shape[@]}" "${data[@]}" --output_dir "$work/run" --max_steps 4 --checkpoint_every 2 --keep_checkpoints 0 >/dev/null || bad "the run to start from"
checkpoint=$(newest "$work/run")
before=$(fingerprint "$work/run")
first=$work/run/$(basename "$(newest "$work/run")")
refused "a run inside a checkpoint" "would lie in .*step[0-9]*, a checkpoint, which its own run may remove" "${data[@]}" "${shape[@]}" --output_dir "$first/more"
cd "$first" || exit 1
refused "a run inside a checkpoint, by a relative name" "would lie in .*, a checkpoint, which its own run may remove" "${data[@]}" "${shape[@]}" --output_dir more
refused "a run inside a checkpoint, without a name" "runs/DATE: would lie in .*, a checkpoint" "${data[@]}" "${shape[@]}"
cd "$OLDPWD" || exit 1
refused "a checkpoint as the output folder" "would lie in .*, a checkpoint, which its own run may remove" "${data[@]}" "${shape[@]}" --output_dir "$first"
refused "a run under the name of another's checkpoint" "step00009999 is the name of a checkpoint of the run in " "${data[@]}" "${shape[@]}" --output_dir "$work/run/step00009999"
refused "the same, further in" "step00009999 is the name of a checkpoint of the run in " "${data[@]}" "${shape[@]}" --output_dir "$work/run/step00009999/a/b"
refused "a run's folder to start from" "is the folder of a run; name one of its checkpoints, the newest is .*$(basename "$first")" "${data[@]}" --init_from "$work/run" --output_dir "$work/a"
refused "two settings files" "is given 2 times" "${data[@]}" --config "$work/corpus.txt" --config "$work/corpus.txt" --output_dir "$work/a"
refused "a device as settings" "not a settings file of at most 16 MiB" "${data[@]}" --config /dev/zero --output_dir "$work/a"
resume_refused "Lighthouse flags on a dense run" "--lighthouse_topk and --attention dense contradict" --output_dir "$work/run" --max_steps 9 --lighthouse_topk 128
mv "$first" "$work/run/step00000077"
resume_refused "a checkpoint under another step's name" "is the checkpoint of step .* by its state.json: name the folder $(basename "$first") again" --output_dir "$work/run" --max_steps 99
mv "$work/run/step00000077" "$first"
refused "a folder that already holds a run" "already holds a run" "${data[@]}" "${shape[@]}" --output_dir "$work/run"
resume_refused "resume and init_from" "--init_from .* contradict each other" --init_from "$checkpoint" --output_dir "$work/run"
unchanged "its checkpoints are as they were" "$work/run" "$before"

mkdir "$work/own_settings"
echo "seq_len = 32 # mine" >"$work/own_settings/settings.toml"
refused "a folder with a settings.toml of no run" "own_settings holds a settings.toml" "${data[@]}" "${shape[@]}" --output_dir "$work/own_settings"
refused "the same as --config" "own_settings holds a settings.toml" "${data[@]}" "${shape[@]}" --config "$work/own_settings/settings.toml" --output_dir "$work/own_settings"
[ "$(cat "$work/own_settings"/*)" = "seq_len = 32 # mine" ] && ok "it is as it was, and alone" || bad "it became: $(ls "$work/own_settings")"

# ---- folders of weights
refused "init_from a missing folder" "no_such" "${data[@]}" --init_from "$work/no_such" --output_dir "$work/a"
refused "init_from a folder without a model" "config.json" "${data[@]}" --init_from "$work/folder" --output_dir "$work/a"
refused "flag contradicts the checkpoint" "--width 64 contradicts" "${data[@]}" --init_from "$checkpoint" --width 64 --output_dir "$work/a"
# A folder as other tools write it, without the manifest that would give any change away.
copy() {
    rm -rf "$work/hf"
    cp -r "$checkpoint" "$work/hf"
    rm "$work/hf/manifest.json"
}
init_refused() { refused "$1" "$2" "${data[@]}" --init_from "$work/hf" --output_dir "$work/a"; }
copy
sed -i 's/"hidden_size": *[0-9]*/"hidden_size": 64/' "$work/hf/config.json"
init_refused "config.json does not match the tensors" "config.json|model.safetensors"
copy
sed -i 's/"vocab_size": *[0-9]*/"vocab_size": 1073741824/' "$work/hf/config.json"
init_refused "config.json of a model that no memory holds" "model.embed_tokens.weight has shape"
copy
echo '{"hidden_size": 32' >"$work/hf/config.json"
init_refused "config.json is no JSON" "config.json"
copy
sed -i 's/"hidden_size": *[0-9]*/"hidden_size": -5/' "$work/hf/config.json"
init_refused "config.json with a negative size" "config.json|--width"
copy
rm "$work/hf/model.safetensors"
init_refused "no model.safetensors" "model.safetensors"
for name in config.json model.safetensors model.safetensors.index.json generation_config.json tokenizer.json manifest.json; do
    copy
    [ "$name" = model.safetensors.index.json ] && rm "$work/hf/model.safetensors"
    rm -f "$work/hf/$name"
    mkfifo "$work/hf/$name"
    init_refused "a pipe for $name" "hf/$name: is a device or pipe, not a file"
    rm "$work/hf/$name"
    mkdir "$work/hf/$name"
    init_refused "a folder for $name" "hf/$name: is a folder, not a file"
done
copy
cp "$checkpoint/manifest.json" "$work/hf/"
rm "$work/hf/model.safetensors"
mkfifo "$work/hf/model.safetensors"
init_refused "a pipe for a file of the manifest" "hf/model.safetensors"
size=$(stat -c %s "$checkpoint/model.safetensors")
for length in 0 7 8 100 $((size / 2)) $((size - 1)); do
    copy
    truncate -s "$length" "$work/hf/model.safetensors"
    init_refused "model.safetensors cut to $length bytes" "model.safetensors"
done
copy
printf '\xff\xff\xff\xff\xff\xff\xff\x7f' | dd of="$work/hf/model.safetensors" conv=notrunc status=none
init_refused "a header length that lies" "model.safetensors"
for offset in 3 60; do
    copy
    printf '\x5a' | dd of="$work/hf/model.safetensors" bs=1 seek="$offset" conv=notrunc status=none
    init_refused "model.safetensors with a changed header byte at $offset" "$work/hf"
done
for offset in 3 60 $((size - 100)); do
    copy
    cp "$checkpoint/manifest.json" "$work/hf/"
    printf '\x5a' | dd of="$work/hf/model.safetensors" bs=1 seek="$offset" conv=notrunc status=none
    init_refused "a checkpoint's model.safetensors with a changed byte at $offset" "model.safetensors"
done

# ---- resume: a damaged newest checkpoint is passed over for the one before; with none whole the run is refused
for file in "$checkpoint"/*; do
    name=$(basename "$file")
    rm -rf "$work/damaged"
    cp -r "$work/run" "$work/damaged"
    truncate -s $(($(stat -c %s "$file") / 2)) "$(newest "$work/damaged")/$name"
    if "$trainer" --resume --output_dir "$work/damaged" --max_steps 5 >"$work/out" 2>"$work/err" && grep -q 'step 2$' <(grep 'resumed from' "$work/out"); then
        ok "newest checkpoint with half of $name: resumed from the one before"
    else
        bad "newest checkpoint with half of $name: $(grep -h 'resumed from' "$work/out") $(cat "$work/err")"
    fi
done
# One that cannot be read may be whole: it is not passed over. Root reads everything but what is no file.
rm -rf "$work/unreadable"
cp -r "$work/run" "$work/unreadable"
before=$(fingerprint "$work/unreadable")
file=$(newest "$work/unreadable")/model.safetensors
if [ "$(id -u)" -ne 0 ]; then
    chmod 000 "$file"
    resume_refused "newest checkpoint that may not be read" "model.safetensors: cannot open: Permission denied; .*make it readable" --output_dir "$work/unreadable" --max_steps 5
    chmod 600 "$file"
fi
mv "$file" "$work/aside"
mkdir "$file"
resume_refused "newest checkpoint with a folder for model.safetensors" "model.safetensors: is a folder.*make it readable" --output_dir "$work/unreadable" --max_steps 5
rmdir "$file"
mv "$work/aside" "$file"
unchanged "checkpoints that could not be read are as they were" "$work/unreadable" "$before"
for file in "$checkpoint"/*; do
    name=$(basename "$file") size=$(stat -c %s "$file")
    last=$((size - 1))
    [ "$name" = manifest.json ] && last=$((size - 2)) # without its final line end it says the same
    for length in missing 0 1 $((size / 3)) $last; do
        rm -rf "$work/only"
        mkdir "$work/only"
        cp -r "$work/run/settings.toml" "$checkpoint" "$work/only/"
        if [ "$length" = missing ]; then rm "$work/only"/step*/"$name"; else truncate -s "$length" "$work/only"/step*/"$name"; fi
        resume_refused "only checkpoint, $name $length" "only" --output_dir "$work/only" --max_steps 5 >>"$work/cuts"
    done
done
if grep FAIL "$work/cuts"; then failed=1; else ok "checkpoint cut at $(wc -l <"$work/cuts") places: $(tail -1 "$work/cuts")"; fi
truncate -s -40 "$work/run/settings.toml"
resume_refused "settings that are cut off" "settings.toml: is cut off" --output_dir "$work/run"
rm "$work/run/settings.toml"
resume_refused "resume without settings" "settings.toml" --output_dir "$work/run"

# ---- output that cannot be written
echo file >"$work/file"
refused "output_dir is a file" "$work/file" "${data[@]}" "${shape[@]}" --output_dir "$work/file"
refused "output_dir below a file" "$work/file" "${data[@]}" "${shape[@]}" --output_dir "$work/file/run"
if [ "$(id -u)" -ne 0 ]; then
    mkdir "$work/read_only" && chmod a-w "$work/read_only"
    refused "read-only output folder" "read_only" "${data[@]}" "${shape[@]}" --output_dir "$work/read_only/run"
elif [ -d /proc/1 ]; then
    refused "output folder where nothing can be made" "/proc" "${data[@]}" "${shape[@]}" --output_dir /proc/run
fi
# A limit on the size of files stands for a full disk: weights do not fit, the metrics do. The signal that comes with it
# must not end the trainer.
full_disk() { (
    ulimit -f 40
    exec "$@"
); }
cp -r "$work/damaged" "$work/full"
before=$(fingerprint "$work/full")
status=0
full_disk "$trainer" --resume --output_dir "$work/full" --max_steps 7 >"$work/out" 2>"$work/err" || status=$?
if [ $status -ne 0 ] && [ $status -lt 124 ] && [ "$(wc -l <"$work/err")" -eq 1 ]; then
    ok "full disk: $(sed "s#$work/##g" "$work/err")"
else
    bad "full disk: status $status, $(cat "$work/err")"
fi
unchanged "checkpoints survive a full disk" "$work/full" "$before"
mkdir "$work/small_disk"
if mount -t tmpfs -o size=256k tmpfs "$work/small_disk" 2>/dev/null; then
    refused "a disk that fills up" "small_disk" "${data[@]}" "${shape[@]}" --output_dir "$work/small_disk/run" --max_steps 50 --checkpoint_every 1 --keep_checkpoints 0
    left=$(find "$work/small_disk/run" -maxdepth 1 -type d -name 'step*' | wc -l)
    if "$trainer" --max_steps 0 --resume --output_dir "$work/small_disk/run" --val_data "$work/corpus.txt" >/dev/null 2>"$work/err"; then
        ok "the newest of the $left checkpoints on the full disk is whole"
    else
        bad "after the disk filled up: $(cat "$work/err")"
    fi
else
    echo "skip a disk that fills up: tmpfs cannot be mounted here"
fi

[ $failed -eq 0 ] && echo "all passed"
exit $failed
