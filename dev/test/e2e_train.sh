#!/usr/bin/env bash
# ./train_gpt_cpu from end to end on a small corpus: it learns, resumes bit for bit, stops on signals, evaluates, reads
# settings files, shards and its own checkpoints, skips non-finite steps, and switches from Lighthouse to dense attention.
#   dev/test/e2e_train.sh [TRAINER]
#   dev/test/e2e_train.sh ./train_gpt     the same on a GPU, --deterministic
set -uo pipefail
export LC_ALL=C # numbers with a decimal point
unset CDPATH # which cd would follow
cd "$(dirname "$0")/../.." || exit 1
# These models are too small to share among threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
trainer=${1:-./train_gpt_cpu}
on_gpu=yes
[[ $(basename "$trainer") != *cpu* ]] || on_gpu=no
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

ok() { echo "ok   $1"; }
bad() {
    echo "FAIL $1"
    failed=1
}
# expect NAME COMMAND...: the command succeeds.
expect() {
    local name=$1
    shift
    if "$@" >"$work/expect" 2>&1; then ok "$name"; else
        bad "$name: $*"
        tail -5 "$work/expect" | sed 's/^/     /'
    fi
}
# train NAME FLAG...: a run into $work/NAME, its output in $work/NAME.out; returns its status.
train() {
    local name=$1
    shift
    "$trainer" "${small[@]}" --train_data "${data:-$work/corpus.txt}" --output_dir "$work/$name" "$@" >"$work/$name.out" 2>"$work/$name.err"
}
# start NAME FLAG...: the same in the background; its process is $pid. A job of its own, so that SIGINT reaches it.
start() {
    local name=$1
    shift
    set -m
    "$trainer" "${small[@]}" --train_data "$work/corpus.txt" --output_dir "$work/$name" "$@" >"$work/$name.out" 2>"$work/$name.err" &
    pid=$!
    set +m
}
# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    local tries=$(($1 * 20))
    shift
    for _ in $(seq $tries); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.05
    done
    return 1
}
# The losses of a run's steps, as they stand in metrics.jsonl: equal text is equal bits.
losses() { grep '"event":"step"' "$work/$1/metrics.jsonl" | sed 's/.*"loss":\([^,]*\),.*/\1/'; }
same_losses() { [ -n "$(losses "$1")" ] && [ "$(losses "$1")" = "$(losses "$2")" ]; }
less() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a < b) }'; }
close() { awk -v a="$1" -v b="$2" -v limit="$3" 'BEGIN { d = a - b; exit !((d < 0 ? -d : d) <= limit) }'; }
newest() { find "$work/$1" -maxdepth 1 -type d -name 'step*' | LC_ALL=C sort | tail -1; }

find /usr/include -maxdepth 1 -name '*.h' -print0 | LC_ALL=C sort -z | xargs -0 cat 2>/dev/null | head -c 400000 >"$work/corpus.txt"
small=(--num_layers 2 --width 64 --num_heads 2 --num_kv_heads 1 --head_dim 32 --ffn_width 128 --seq_len 64 --batch_size 4
    --max_steps 20 --warmup_steps 4 --eval_every 10 --eval_batches 4 --sample_tokens 0)
[ $on_gpu = no ] || small+=(--deterministic)

# ---- what is around a run
ends_unread() { # a reader that has enough
    "$trainer" "${small[@]}" --train_data "$work/corpus.txt" --output_dir "$work/unwatched" 2>/dev/null | head -1 >/dev/null
    [ "${PIPESTATUS[0]}" -eq 0 ] && [ -d "$work/unwatched/step00000020" ]
}
expect "a run whose output nobody reads ends" ends_unread
more_steps_than() { [ "$(losses "$1" | wc -l)" -gt "$2" ]; }
ignores_hangup() { # as nohup has it
    (trap '' HUP && exec "$trainer" "${small[@]}" --train_data "$work/corpus.txt" --output_dir "$work/nohup" --max_steps 100000 \
        --decay_steps 20 --eval_every 0 >"$work/nohup.out" 2>&1) &
    local pid=$!
    if wait_for 60 grep -q '^step ' "$work/nohup.out" && kill -HUP $pid && wait_for 60 more_steps_than nohup $(($(losses nohup | wc -l) + 20)); then
        kill -TERM $pid && wait $pid
    else
        kill -KILL $pid
        return 1
    fi
}
expect "a run that is to ignore SIGHUP does" ignores_hangup
if [ $on_gpu = no ]; then
    expect "--num_threads 3" train threads --max_steps 1 --warmup_steps 0 --num_threads 3
    expect "are three threads" grep -q 'CPU, 3 threads' "$work/threads.out"
fi

# ---- a run: learns, reports, leaves a checkpoint
expect "train 20 steps" train whole --checkpoint_every 10 --keep_checkpoints 0
first=$(losses whole | head -1) last=$(losses whole | tail -1)
expect "first loss $first is near that of a uniform guess, ln 258" close "$first" 5.553 0.3
expect "loss falls to $last" less "$last" "$(awk -v a="$first" 'BEGIN { print a - 0.5 }')"
expect "20 step lines on the terminal" test "$(grep -c '^step .*| loss .*| norm .*| lr .*| .* ms | .* tok/s |.*left' "$work/whole.out")" -eq 20
expect "20 steps in metrics.jsonl" test "$(losses whole | wc -l)" -eq 20
expect "no progress bar off a terminal" test "$(grep -c $'\r' "$work/whole.out")" -eq 0
expect "validation loss with 6 digits" grep -Eq 'validation loss [0-9]+\.[0-9]{6}' "$work/whole.out"
expect "a checkpoint Hugging Face tools read" test -s "$(newest whole)/model.safetensors" -a -s "$(newest whole)/config.json"
expect "settings saved" grep -q '^seq_len = 64$' "$work/whole/settings.toml"
expect "summary says where checkpoint and metrics are" grep -q "$work/whole/metrics.jsonl" "$work/whole.out"

# ---- resume is bit-identical
mkdir -p "$work/half"
cp -r "$work/whole/." "$work/half/"
rm -r "$(newest half)"
expect "resume from step 10" "$trainer" --resume --output_dir "$work/half"
expect "resumed losses are the same bits" same_losses whole half
expect "resumed weights are the same bits" cmp "$(newest whole)/model.safetensors" "$(newest half)/model.safetensors"
expect "train 10 of 20 steps" train two --max_steps 10 --decay_steps 20
expect "then the rest" "$trainer" --resume --output_dir "$work/two" --max_steps 20
expect "losses of 10 + 10 steps are those of 20" same_losses whole two
# All checkpoints stay: small as these are, the one that an evaluation reads would be gone meanwhile.
start killed --checkpoint_every 5 --keep_checkpoints 0 --max_steps 100000 --decay_steps 20
wait_for 30 grep -q '"step":12,' "$work/killed/metrics.jsonl"
# Meanwhile nobody else may write there, but read.
timeout 20 "$trainer" --resume --output_dir "$work/killed" --max_steps 100000 >"$work/second.out" 2>"$work/second.err"
status=$?
expect "a second process in the same folder is refused" test $status -eq 1 -a "$(wc -l <"$work/second.err")" -eq 1
expect "in a sentence that names the folder" grep -q -- "--output_dir $work/killed: another process is training" "$work/second.err"
expect "evaluation beside a run" "$trainer" --max_steps 0 --resume --output_dir "$work/killed"
kill -KILL "$pid"
wait "$pid" 2>/dev/null
expect "resume after kill -9" "$trainer" --resume --output_dir "$work/killed" --max_steps 20
expect "losses after kill -9 are the same bits" test "$(losses killed | head -20)" = "$(losses whole)"

# ---- runs without --output_dir that start at once: a folder each
mkdir "$work/at_once"
program=$(realpath "$trainer")
starts=()
for i in 1 2 3 4; do
    (cd "$work/at_once" && exec "$program" "${small[@]}" --train_data "$work/corpus.txt" --max_steps 2 >"$i.out" 2>"$i.err") &
    starts+=($!)
done
failures=0
for pid in "${starts[@]}"; do wait "$pid" || failures=$((failures + 1)); done
expect "four runs that start at once" test "$failures" -eq 0
expect "each has a folder of its own" test "$(find "$work/at_once/runs" -path '*/step00000002/manifest.json' | wc -l)" -eq 4
expect "and names it" test "$(cat "$work/at_once"/?.out | grep -o 'output_dir "runs/[-0-9]*"' | sort -u | wc -l)" -eq 4
mkdir "$work/refused"
(cd "$work/refused" && ! "$program" "${small[@]}" --train_data "$work/corpus.txt" --seq_len 1000000 2>"$work/refused.err")
expect "a run that is refused makes none" test $? -eq 0 -a ! -e "$work/refused/runs"

# ---- other data than before are noticed, not refused
head -c 300000 "$work/corpus.txt" >"$work/other.txt"
expect "resume on other data" bash -c "'$trainer' --resume --output_dir '$work/two' --max_steps 21 --train_data '$work/other.txt' 2>'$work/two.err'"
expect "a warning names both" grep -Eq '^[^ ]+ warning: --train_data: .*"corpus.txt".* [0-9]+ tokens.*"other.txt".* [0-9]+ tokens' "$work/two.err"
expect "resume on the same again" bash -c "'$trainer' --resume --output_dir '$work/two' --max_steps 22 2>'$work/two.err'"
expect "without a warning: they are saved with the run" test ! -s "$work/two.err"

ln -s "$work/corpus.txt" "$work/link.txt"
expect "a file twice" train twice_trained --max_steps 1 --warmup_steps 0 --train_data "$work/link.txt"
expect "is said" grep -Eq 'warning: --train_data: .*link.txt is there more than once' "$work/twice_trained.err"
expect "validation of what is trained on" train twice_read --max_steps 1 --warmup_steps 0 --val_data "$work/link.txt"
expect "is said, in one line" test "$(grep -c 'warning: --val_data: .*link.txt is trained on too' "$work/twice_read.err") $(wc -l <"$work/twice_read.err")" = "1 1"

cp "$work/corpus.txt" "$work/copy.txt"
expect "validation of another file, twice" train twice_validated --max_steps 1 --warmup_steps 0 --val_data "$work/copy.txt" "$work/copy.txt"
expect "is not said to be trained on" test ! -s "$work/twice_validated.err"

# ---- the order of data and the micro-batches
expect "gradient accumulation" train accumulated --batch_size 2 --global_batch 4
# In bf16 the tenth step's weights differ in their last bits, 2^-9 of a loss near 4.
expect "accumulated loss is that of one batch" close "$(losses accumulated | sed -n 10p)" "$(losses whole | sed -n 10p)" \
    "$([ $on_gpu = yes ] && echo 0.01 || echo 0.001)"
expect "another shuffle" train shuffled --shuffle_seed 1 --max_steps 2
expect "another shuffle is another order" test "$(losses shuffled | sed -n 2p)" != "$(losses whole | sed -n 2p)"

# ---- started without standard input, output or error: no file takes their numbers
for closed in '>&-' '<&- >&-' '<&- >&- 2>&-'; do
    rm -rf "$work/closed"
    status=0
    (eval "exec $closed" && exec "$trainer" "${small[@]}" --train_data "$work/corpus.txt" --output_dir "$work/closed" --max_steps 3 --decay_steps 20) || status=$?
    expect "$closed: trains" test $status -eq 0
    expect "$closed: nothing but metrics in metrics.jsonl" test "$(grep -vc '^{"event":.*}$' "$work/closed/metrics.jsonl")" -eq 0
    expect "$closed: the same losses" test "$(losses closed)" = "$(losses whole | head -3)"
done
status=0
"$trainer" --max_steps 0 --resume --output_dir "$work/closed" <&- >&- 2>"$work/closed.err" || status=$?
expect "an evaluation that nobody can read fails" test $status -eq 1
expect "and says why" grep -q 'the output cannot be written' "$work/closed.err"

# ---- signals
for signal in TERM INT USR1; do
    start "stop_$signal" --max_steps 100000 --decay_steps 20
    wait_for 30 grep -q '^step ' "$work/stop_$signal.out"
    kill -"$signal" "$pid"
    wait "$pid"
    status=$?
    expect "SIG$signal: exit 0" test $status -eq 0
    expect "SIG$signal: says how to resume" grep -q -- "--resume --output_dir $work/stop_$signal" "$work/stop_$signal.out"
    expect "SIG$signal: checkpoint" test -s "$(newest "stop_$signal")/model.safetensors"
done
# Into a pipe that nobody reads.
mkfifo "$work/unread"
exec 9<>"$work/unread"
"$trainer" "${small[@]}" --train_data "$work/corpus.txt" --output_dir "$work/stop_unread" --max_steps 100000 --decay_steps 20 >"$work/unread" 2>"$work/stop_unread.err" 9>&- &
pid=$!
now=0 before=-1 # steps; it holds 64 KB of their lines
for _ in $(seq 60); do
    sleep 1
    now=$(losses stop_unread 2>/dev/null | wc -l)
    [ "$now" -gt 100 ] && [ "$now" -eq "$before" ] && break
    before=$now
done
expect "a pipe that nobody reads holds a run up" test "$now" -eq "$before"
kill -TERM "$pid"
wait "$pid"
expect "but not its end: exit 0" test $? -eq 0
expect "with a checkpoint" test -s "$(newest stop_unread)/model.safetensors"
exec 9>&-
# As timeout and wrappers send it: twice, right after each other.
start stop_twice --max_steps 100000 --decay_steps 20
wait_for 30 grep -q '^step ' "$work/stop_twice.out"
kill -TERM "$pid"
kill -TERM "$pid"
wait "$pid"
expect "two signals at once are one: exit 0" test $? -eq 0
expect "with a checkpoint" test -s "$(newest stop_twice)/model.safetensors"
stopped=$(losses stop_TERM | wc -l)
resume=$(grep -- '--resume --output_dir' "$work/stop_TERM.out" | tail -1)
expect "the printed command resumes" bash -c "$resume --max_steps $((stopped + 3))"
expect "three more steps" test "$(losses stop_TERM | wc -l)" -eq $((stopped + 3))

if [ $on_gpu = no ]; then # a GPU's step would be over before the second signal
    start twice --seq_len 4096 --num_layers 8 --max_steps 100000 # a step takes seconds
    wait_for 30 test -s "$work/twice/metrics.jsonl"
    kill -TERM "$pid"
    sleep 0.7
    kill -TERM "$pid"
    wait "$pid"
    expect "a second signal ends at once" test $? -eq 143
fi

# ---- evaluation alone
head -c 20000 "$work/corpus.txt" >"$work/val.txt"
expect "evaluate a checkpoint" bash -c "'$trainer' --max_steps 0 --init_from '$(newest whole)' --seq_len 64 --val_data '$work/val.txt' >'$work/eval.out' 2>'$work/eval.err'"
expect "without a warning" test ! -s "$work/eval.err"
expect "evaluation prints 6 digits" grep -Eq 'validation loss [0-9]+\.[0-9]{6}' "$work/eval.out"
expect "sample a checkpoint, without data" bash -c "'$trainer' --max_steps 0 --init_from '$(newest whole)' --sample_prompt '#inc' --sample_tokens 5 --temperature 0 >'$work/sample.out' 2>'$work/sample.err'"
expect "which goes on from the prompt" grep -Eq '^#inc' "$work/sample.out"
expect "and says nothing else" test ! -s "$work/sample.err"
expect "sample the newest of a run, and no more" bash -c "'$trainer' --max_steps 0 --resume --output_dir '$work/whole' --sample_prompt '#inc' --sample_tokens 5 --temperature 0 >'$work/sample2.out'"
expect "from the same weights the same" cmp <(grep -A1 ' | sample, ' "$work/sample.out" | tail -1) <(grep -A1 ' | sample, ' "$work/sample2.out" | tail -1)
expect "without a loss" bash -c "! grep -q 'validation loss' '$work/sample2.out'"
expect "evaluate the newest of a run" bash -c "'$trainer' --max_steps 0 --resume --output_dir '$work/whole' --val_data '$work/val.txt' >'$work/eval2.out'"
expect "both print the same loss" test "$(grep -o 'validation loss [0-9.]*' "$work/eval.out")" = "$(grep -o 'validation loss [0-9.]*' "$work/eval2.out")"
expect "evaluate random weights" bash -c "'$trainer' --max_steps 0 --output_dir '$work/whole' --val_data '$work/val.txt' --seq_len 64 --seed 7 >'$work/eval3.out' 2>'$work/eval3.err'"
expect "which is said" grep -Eq 'warning: --max_steps 0 without --resume or --init_from takes the random initial weights of --seed 7$' "$work/eval3.err"
expect "in one line" test "$(wc -l <"$work/eval3.err")" -eq 1
expect "evaluation leaves the run as it was" test "$(losses whole | wc -l)" -eq 20

# ---- settings file; the command line wins
cat >"$work/run.toml" <<TOML
# settings
train_data = ["$work/corpus.txt"]
num_layers = 1
width = 32
num_heads = 1
num_kv_heads = 1
ffn_width = 64
seq_len = 32
max_steps = 50
sample_tokens = 8
sample_prompt = "#include <"
TOML
expect "settings file" bash -c "'$trainer' --config '$work/run.toml' --max_steps 3 --output_dir '$work/toml' >'$work/toml.out'"
expect "the command line wins" test "$(losses toml | wc -l)" -eq 3
printf '%s\n' 'profile = true' 'offload = "activations"' >>"$work/run.toml"
expect "settings file of a run on a GPU" bash -c "'$trainer' --config '$work/run.toml' --max_steps 1 --output_dir '$work/gpu_toml' 2>'$work/gpu_toml.err'"
[ $on_gpu = yes ] || expect "a warning names what has no effect" grep -q 'warning: --offload, --profile (of a settings file): about a GPU' "$work/gpu_toml.err"
expect "it is saved for the GPU" grep -q '^profile = true$' "$work/gpu_toml/settings.toml"
expect "a sample continues the prompt" grep -q '#include <' "$work/toml.out"

# ---- its own checkpoint as a start; another shape by flag is refused
expect "start from a checkpoint" train from_whole --init_from "$(newest whole)" --max_steps 2
expect "it starts where that ended" less "$(losses from_whole | head -1)" "$(awk -v a="$first" 'BEGIN { print a - 0.4 }')"

# As another tool leaves it: only the model, with a manifest that is not ours.
mkdir "$work/foreign"
cp "$(newest whole)"/config.json "$(newest whole)"/model.safetensors "$work/foreign/"
echo '{"tool": "x", "files": {"model.safetensors": {"sha256": "00"}}}' >"$work/foreign/manifest.json"
expect "start from a folder with another tool's manifest.json" train from_foreign --init_from "$work/foreign" --max_steps 2
expect "they are the same weights" same_losses from_whole from_foreign

# ---- token shards of both kinds hold the same tokens as the bytes
if command -v perl >/dev/null; then
    shard() { perl -e 'local $/; open F, "<", $ARGV[0]; binmode F; binmode STDOUT; @t = unpack("C*", <F>);
        print pack("V256", $ARGV[1], $ARGV[2], scalar @t, (0) x 253), pack($ARGV[3], @t)' "$work/corpus.txt" "$@"; }
    shard 20240520 1 'v*' >"$work/u16.bin"
    shard 20240801 7 'V*' >"$work/u32.bin"
    expect "bytes without markers" train bytes --byte_markers false --max_steps 3
    data=$work/u16.bin expect "uint16 shard" train u16 --max_steps 3
    data=$work/u32.bin expect "uint32 shard" train u32 --max_steps 3
    expect "uint16 tokens are the bytes" same_losses bytes u16
    expect "uint32 tokens are the bytes" same_losses bytes u32
else
    echo "skip shards: no perl"
fi

# ---- non-finite steps
status=0
train diverged --learning_rate 1e30 --warmup_steps 0 --max_grad_norm 0 --max_skipped 3 || status=$?
expect "max_skipped stops the run with status 1" test $status -eq 1
expect "it says what was not finite" grep -q 'not finite' "$work/diverged.err"
expect "skips are logged with data position and tensor" grep -Eq '"event":"skip".*"(loss|grad_norm)":null.*"data_position":[0-9]+.*"first_bad_tensor":"[a-z]' "$work/diverged/metrics.jsonl"
expect "a checkpoint was written" test -s "$(newest diverged)/model.safetensors"
status=0
train untrained --init_std 1e38 --warmup_steps 0 --max_steps 3 || status=$?
expect "a run of nothing but skips ends with status 1" test $status -eq 1
expect "in one sentence" test "$(grep -c 'nothing was trained: the loss or gradient norm of all 3 steps was not finite' "$work/untrained.err") $(grep -vc warning "$work/untrained.err")" = "1 1"
expect "with its checkpoint" test -s "$(newest untrained)/model.safetensors"

# ---- Lighthouse: the switch inside one run, and by resuming under dense attention
lighthouse=(--attention lighthouse --seq_len 512 --batch_size 1 --lighthouse_levels 2 --lighthouse_pool 2 --lighthouse_topk 128
    --lighthouse_dense_layers none --eval_batches 2 --max_steps 6 --eval_every 3)
expect "Lighthouse, dense from step 4" train switched "${lighthouse[@]}" --lighthouse_steps 4
expect "the switch is logged" grep -q '"event":"attention_switch","step":4,"attention":"dense"' "$work/switched/metrics.jsonl"
expect "validation under dense attention too" grep -Eq '"event":"validation","step":3,.*"dense_loss":[0-9.]+' "$work/switched/metrics.jsonl"
expect "geometry is printed" grep -q 'T 512, S 512, 1 tiles' "$work/switched.out"
expect "Lighthouse, 4 steps" train resumed_dense "${lighthouse[@]}" --max_steps 4 --decay_steps 6
read_from_selection() {  # of the checkpoint
    "$trainer" --resume --output_dir "$work/resumed_dense" --max_steps 0 --print_influence >"$work/influence"
}
expect "what is read from the selection" read_from_selection
expect "of later tokens" grep -q 'influence: later tokens replaced from .* in earlier tiles at most 0.0e+00$' "$work/influence"
expect "of the next token" grep -q 'influence: the next token replaced: the loss at 128 places, .* (+- 0.[0-9]*)$' "$work/influence"
expect "the rest under dense attention" "$trainer" --resume --output_dir "$work/resumed_dense" --attention dense --max_steps 6
expect "both ways give the same bits" same_losses switched resumed_dense
expect "the switch of a resumed run is logged" grep -q '"event":"attention_switch","step":4,"attention":"dense"' "$work/resumed_dense/metrics.jsonl"
expect "its settings.toml is read by --config" "$trainer" --config "$work/resumed_dense/settings.toml" --output_dir "$work/again_dense"
expect "and is the dense run that it says" test "$(grep -c '"event":"step".*"attention":"dense"' "$work/again_dense/metrics.jsonl")" -eq 6

# ---- a sweep of it
mkdir "$work/DATASETS 2024"
cp "$work/corpus.txt" "$work/DATASETS 2024/"
# sweep NAME STEPS VALUES: a sweep into $work/NAME, dense from its last step on. Its process is what calls this in a
# subshell.
sweep() {
    exec env "TRAINER=$(realpath "$trainer")" "TRAIN_DATA=$work/DATASETS 2024/*.txt" "OUTPUT_DIR=$work/$1" SEQ_LEN=512 "STEPS=$2" "SWITCH=$(($2 - 1))" \
        scripts/sweep.sh pool "$3" --num_layers 2 --width 64 --num_heads 2 --num_kv_heads 2 --head_dim 32 --ffn_width 128 \
        --lighthouse_levels 2 --lighthouse_topk 128 --eval_batches 2 >"$work/$1.out" 2>&1
}
swept() { (sweep "$@"); }
expect "a sweep of two values" swept sweep 3 2,4
expect "its table has a row for each, with its S and three losses" \
    test "$(grep -Ec '^\| (2 \| 512|4 \| 640) \| [0-9]+ \| [0-9]+ \|( [0-9]+\.[0-9]{4} \|){3}$' "$work/sweep/table.md")" -eq 2
(sweep stopped 1000000 2,4) &
pid=$!
wait_for 60 grep -q '"event":"step"' "$work/stopped/2/metrics.jsonl"
kill -TERM $pid
wait $pid
expect "a sweep that gets a signal ends with it" test $? -eq 143
expect "and says what it has" grep -q 'stopped by a signal during --lighthouse_pool 2; trained to the end: none' "$work/stopped.out"
expect "it has waited for the run, which has saved" test -n "$(find "$work/stopped/2" -path '*/step*/manifest.json')"
expect "and has neither begun the next nor made a table" test ! -e "$work/stopped/4" -a ! -e "$work/stopped/table.md"
(sweep cut 1000000 2) &
pid=$!
wait_for 60 grep -q '"event":"step"' "$work/cut/2/metrics.jsonl"
for process in /proc/[0-9]*; do # the trainer alone
    if tr '\0' ' ' <"$process/cmdline" 2>/dev/null | grep -q -- "--output_dir $work/cut/2 "; then kill -TERM "${process#/proc/}"; fi
done
wait $pid
expect "a sweep whose run was stopped fails" test $? -eq 1
expect "and lists no loss of it" grep -Eq '^\| 2 \| stopped at step [0-9]+ of 1000000 \|$' "$work/cut/table.md"

[ $failed -eq 0 ] && echo "all passed"
exit $failed
