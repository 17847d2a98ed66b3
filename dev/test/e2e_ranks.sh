#!/usr/bin/env bash
# ./train_gpt on several ranks, from end to end: every mesh of data x context parallel gives the losses and gradient norms
# of one GPU, dense and Lighthouse, and those of two ranks every tensor's gradient of a first step; a rank that is killed
# ends the job, and its checkpoints go on on other numbers of ranks. With the host transport all ranks share the GPUs there
# are, so one GPU is enough; where there are 2, 4 or 8, as many ranks also train by the GPUs' copy engines and by NCCL, and
# one of two or four is killed or stands still. Needs a GPU; six minutes, ten on two GPUs.
#   dev/test/e2e_ranks.sh [TRAINER]
#   GPUS=2 PARTS="nccl nccl_failures" dev/test/e2e_ranks.sh build/train_gpt    the first 2 GPUs, some parts
# PARTS: of meshes, lighthouse, failures (host transport), nccl, nccl_failures; all of them unless set. TRANSPORTS of the
# last two: auto (the copy engines and NCCL) and nccl.
set -uo pipefail
export LC_ALL=C # numbers with a decimal point
unset CDPATH # which cd would follow
cd "$(dirname "$0")/../.." || exit 1
trainer=${1:-./train_gpt}
parts=" ${PARTS:-meshes lighthouse failures nccl nccl_failures} "
transports=${TRANSPORTS:-auto nccl}
declare -A way_of=([auto]="by the GPUs' copy engines" [nccl]="by NCCL") # as a run says it at its start
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
found=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
[ "$found" -gt 0 ] || { echo "no NVIDIA GPU here" >&2; exit 1; }
gpus=${GPUS:-$found}
[ "$gpus" -ge 1 ] && [ "$gpus" -le "$found" ] || { echo "GPUS=$gpus: there are $found" >&2; exit 1; }
[ -n "${GPUS:-}" ] && export CUDA_VISIBLE_DEVICES && CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1)))
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} # multicast over NVLink needs rights that a container may lack
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
timeout=20 # --comm_timeout, seconds

ok() { echo "ok   $1"; }
bad() {
    echo "FAIL $1"
    failed=1
}
cat llmc/*.h llmc/*.cuh >"$work/corpus.txt"
# A rate at which training is calm: near an instability runs drift apart by more than rounding, and the more so where a
# selection is decided by it (at 2e-4 the 20th norm was 6.9 on one GPU and 8.0 to 8.3 on four meshes).
small=(--num_layers 4 --width 512 --num_heads 8 --num_kv_heads 2 --head_dim 64 --ffn_width 2048 --seq_len 2048
    --global_batch 4 --max_steps 20 --learning_rate 5e-5 --warmup_steps 20 --sample_tokens 0 --eval_every 0
    --eval_batches 0 --schedule constant --deterministic --comm_timeout $timeout --train_data "$work/corpus.txt")
lighthouse=(--attention lighthouse --lighthouse_levels 2 --lighthouse_pool 2 --lighthouse_dense_layers 0)

# train NAME RANKS FLAG...: a run into $work/NAME, its output in $work/NAME.out; returns its status.
train() {
    local name=$1 ranks=$2
    shift 2
    local launch=()
    [ "$ranks" -gt 1 ] && launch=(scripts/spawn_ranks.sh "$ranks")
    timeout 120 "${launch[@]}" "$trainer" "${small[@]}" --output_dir "$work/$name" "$@" >"$work/$name.out" 2>&1
}
# "event step loss norm" of every step and validation, in order.
numbers() {
    sed -n 's/.*"event":"\(step\|validation\)".*/&/p' "$work/$1/metrics.jsonl" | awk '
        function field(name) { return match($0, "\"" name "\":[^,}]*") ? substr($0, RSTART + length(name) + 3, RLENGTH - length(name) - 3) : "-" }
        { print (/"event":"step"/ ? "step" : "validation"), field("step"), field("loss"), field("grad_norm") }'
}
# same NAME OTHER [FROM]: the losses of steps after FROM agree, those of OTHER being right. The first step has the same
# weights in both, so it differs by the rounding of attention's merges and of products of other shapes, a few 2^-9 of a
# mean over 8192 tokens; later steps drift apart by what Adam makes of that. A wrong factor in a gradient shows in the norm.
same() {
    numbers "$1" >"$work/a"
    numbers "$2" >"$work/b"
    if [ -s "$work/a" ] && awk -v from="${3:-0}" -v name="$1" '
        function off(a, b) { return a > b ? a - b : b - a }
        NR == FNR { loss[$1 $2] = $3; norm[$1 $2] = $4; next }
        $2 > from {
            ++compared
            first = $1 == "step" && $2 == 1
            d = off(loss[$1 $2], $3); worst = d > worst ? d : worst
            if (!(($1 $2) in loss) || !(d <= (first ? 0.002 : 0.03))) { print "     " $0 " but " name " has loss " loss[$1 $2]; wrong = 1 }
            if ($1 == "step") {
                r = off(norm[$1 $2], $4) / $4; worst_norm = r > worst_norm ? r : worst_norm
                if (!(r <= (first ? 0.01 : 0.1))) { print "     " $0 " but " name " has norm " norm[$1 $2]; wrong = 1 }
            }
        }
        END { printf "%s: %d numbers, loss off by at most %.2g, norm by %.2g\n", name, compared, worst, worst_norm; exit wrong || compared == 0 }
        ' "$work/a" "$work/b" >"$work/same"; then ok "$(cat "$work/same")"; else
        bad "$1 differs from $2"
        head -8 "$work/same"
        tail -5 "$work/$1.out" | sed 's/^/     /'
    fi
}
# mesh NAME OTHER RANKS FLAG...: trains, and compares with OTHER.
mesh() {
    local name=$1 other=$2 ranks=$3
    shift 3
    if train "$name" "$ranks" "$@"; then same "$name" "$other"; else
        bad "$name: status $?"
        tail -8 "$work/$name.out" | sed 's/^/     /'
    fi
}
# alone NAME FLAG...: trains on one GPU, unless that was done.
alone() {
    [ -e "$work/$1.out" ] && return
    train "$1" 1 "${@:2}" || { bad "$1 on one GPU"; tail -5 "$work/$1.out"; }
}
host=(--comm_transport host)
# gradients NAME OTHER LIMIT RANKS FLAG...: trains one step of a smaller model, and compares every tensor's gradient with
# OTHER's. The limits are four times what was measured (dev/RESULTS.md).
dense_limit=0.002 lighthouse_limit=0.025
one_step=(--num_layers 2 --width 256 --num_heads 4 --ffn_width 512 --max_steps 1 --max_grad_norm 0)
gradients() {
    local name=$1 other=$2 limit=$3 ranks=$4 result
    shift 4
    if train "$name" "$ranks" "${one_step[@]}" "$@" &&
        result=$(dev/test/compare_gradients.py "$work/$name/step00000001" "$work/$other/step00000001" "$limit" 2>&1); then
        ok "$name: $result"
    else
        bad "$name: ${result:-the run failed}"
        tail -5 "$work/$name.out" | sed 's/^/     /'
    fi
}

# gradients_of_two NAME OTHER LIMIT TRANSPORT EXCHANGES FLAG...: of two ranks that share sequences, by each exchange.
gradients_of_two() {
    local name=$1 other=$2 limit=$3 transport=$4 exchanges=$5 exchange
    shift 5
    for exchange in $exchanges; do
        gradients "${name}_${exchange}_gradients" "$other" "$limit" 2 --comm_transport "$transport" --batch_size 4 \
            --context_parallel 2 --context_exchange "$exchange" "$@"
    done
}
dense_gradients() { # NAME TRANSPORT
    alone dense_gradients "${one_step[@]}" --batch_size 4
    gradients_of_two "$1" dense_gradients $dense_limit "$2" "ring gather heads"
}
lighthouse_gradients() {
    local selection=("${lighthouse[@]}" --lighthouse_topk 512)
    alone lighthouse_gradients "${one_step[@]}" --batch_size 4 "${selection[@]}"
    gradients_of_two "$1" lighthouse_gradients $lighthouse_limit "$2" "auto ring heads" "${selection[@]}"
}

alone dense --batch_size 2
alone lighthouse --batch_size 2 "${lighthouse[@]}" --lighthouse_topk 512
three=(--seq_len 3072) # which three ranks cut into chunks of whole tiles
if [[ $parts = *' meshes '* ]]; then
    dense_gradients context2 host
    gradients data2_ring2_gradients dense_gradients $dense_limit 4 "${host[@]}" --batch_size 1 --context_parallel 2 \
        --context_exchange ring
    alone dense_gradients_for3 "${one_step[@]}" "${three[@]}" --batch_size 4
    gradients ring3_gradients dense_gradients_for3 $dense_limit 3 "${host[@]}" "${three[@]}" --batch_size 4 \
        --context_parallel 3 --context_exchange ring
    mesh data2 dense 2 "${host[@]}" --batch_size 2
    mesh ring2 dense 2 "${host[@]}" --batch_size 2 --context_parallel 2 --context_exchange ring
    mesh gather2 dense 2 "${host[@]}" --batch_size 4 --context_parallel 2 --context_exchange gather
    mesh heads2 dense 2 "${host[@]}" --batch_size 2 --context_parallel 2 --context_exchange heads
    mesh ring4 dense 4 "${host[@]}" --batch_size 1 --context_parallel 4 --context_exchange ring --recompute block \
        --offload activations
    mesh data2_ring2 dense 4 "${host[@]}" --batch_size 1 --context_parallel 2 --context_exchange ring
    mesh ring8 dense 8 "${host[@]}" --batch_size 1 --context_parallel 8 --context_exchange ring
    alone dense_for3 "${three[@]}" --batch_size 2
    mesh ring3 dense_for3 3 "${host[@]}" "${three[@]}" --batch_size 2 --context_parallel 3 --context_exchange ring
    ungrouped=(--batch_size 2 --num_kv_heads 8)
    alone dense_ungrouped "${ungrouped[@]}"
    for exchange in ring heads; do
        mesh ${exchange}2_ungrouped dense_ungrouped 2 "${host[@]}" "${ungrouped[@]}" --context_parallel 2 \
            --context_exchange $exchange
    done
fi
if [[ $parts = *' lighthouse '* ]]; then
    lighthouse_gradients lighthouse2 host
    tiles_for3=("${three[@]}" "${lighthouse[@]}" --lighthouse_topk 768 --batch_size 2)
    alone lighthouse_for3 "${tiles_for3[@]}"
    mesh lighthouse3 lighthouse_for3 3 "${host[@]}" "${tiles_for3[@]}" --context_parallel 3
    mesh lighthouse2 lighthouse 2 "${host[@]}" --batch_size 2 --context_parallel 2 "${lighthouse[@]}" \
        --lighthouse_topk 512
    mesh lighthouse2_recompute lighthouse 2 "${host[@]}" --batch_size 2 --context_parallel 2 "${lighthouse[@]}" \
        --lighthouse_topk 512 --recompute block --offload activations --context_exchange ring
    mesh lighthouse2_heads lighthouse 2 "${host[@]}" --batch_size 2 --context_parallel 2 "${lighthouse[@]}" \
        --lighthouse_topk 512 --recompute all_but_attention --context_exchange heads
    mesh data2_lighthouse2 lighthouse 4 "${host[@]}" --batch_size 1 --context_parallel 2 "${lighthouse[@]}" \
        --lighthouse_topk 512
    tiles_for4=(--seq_len 4096 "${lighthouse[@]}" --lighthouse_topk 1024 --batch_size 2)
    alone lighthouse_for4 "${tiles_for4[@]}"
    mesh lighthouse4 lighthouse_for4 4 "${host[@]}" "${tiles_for4[@]}" --context_parallel 4
    ungrouped_lighthouse=("${lighthouse[@]}" --lighthouse_topk 512 --batch_size 2 --num_kv_heads 8)
    alone lighthouse_ungrouped "${ungrouped_lighthouse[@]}"
    for exchange in ring heads; do
        mesh lighthouse2_${exchange}_ungrouped lighthouse_ungrouped 2 "${host[@]}" "${ungrouped_lighthouse[@]}" \
            --context_parallel 2 --context_exchange $exchange
    done
fi
if [[ $parts = *' nccl '* ]]; then
    if [ "$gpus" -ge 2 ]; then
        for transport in $transports; do
            by=(--comm_transport "$transport")
            dense_gradients "${transport}_context2" "$transport"
            lighthouse_gradients "${transport}_lighthouse2" "$transport"
            mesh ${transport}_data2 dense 2 "${by[@]}" --batch_size 2
            mesh ${transport}_ring2 dense 2 "${by[@]}" --batch_size 2 --context_parallel 2 --context_exchange ring
            mesh ${transport}_gather2 dense 2 "${by[@]}" --batch_size 2 --context_parallel 2 --context_exchange gather
            mesh ${transport}_heads2 dense 2 "${by[@]}" --batch_size 2 --context_parallel 2 --context_exchange heads
            for exchange in auto ring heads; do
                mesh ${transport}_lighthouse2_$exchange lighthouse 2 "${by[@]}" --batch_size 2 --context_parallel 2 \
                    "${lighthouse[@]}" --lighthouse_topk 512 --context_exchange $exchange
            done
            for ranks in 4 8; do
                [ "$gpus" -ge $ranks ] || continue
                # Chunks of whole tiles: a longer sequence, and its own run on one GPU.
                longer=(--seq_len $((1024 * ranks)) --global_batch $ranks)
                tiles=("${lighthouse[@]}" --lighthouse_topk $((256 * ranks)))
                alone dense_for$ranks "${longer[@]}" --batch_size 2
                alone lighthouse_for$ranks "${longer[@]}" --batch_size 2 "${tiles[@]}"
                mesh ${transport}_data$ranks dense_for$ranks $ranks "${by[@]}" "${longer[@]}" --batch_size 1
                for exchange in ring gather; do
                    whole=("${by[@]}" "${longer[@]}" --batch_size 2 --context_parallel $ranks
                        --context_exchange $exchange)
                    mesh ${transport}_$exchange$ranks dense_for$ranks $ranks "${whole[@]}"
                    mesh ${transport}_lighthouse${ranks}_$exchange lighthouse_for$ranks $ranks "${whole[@]}" "${tiles[@]}"
                done
                # Heads for every rank, and a run on one GPU with as many.
                heads=("${longer[@]}" --batch_size 2 --num_kv_heads 8)
                alone dense_heads_for$ranks "${heads[@]}"
                alone lighthouse_heads_for$ranks "${heads[@]}" "${tiles[@]}"
                heads+=("${by[@]}" --context_parallel $ranks --context_exchange heads)
                mesh ${transport}_heads$ranks dense_heads_for$ranks $ranks "${heads[@]}"
                mesh ${transport}_lighthouse${ranks}_heads lighthouse_heads_for$ranks $ranks "${heads[@]}" "${tiles[@]}"
                mesh ${transport}_data2_ring$((ranks / 2)) dense_for$ranks $ranks "${by[@]}" "${longer[@]}" \
                    --batch_size 1 --context_parallel $((ranks / 2)) --context_exchange ring
                mesh ${transport}_data2_lighthouse$((ranks / 2)) lighthouse_for$ranks $ranks "${by[@]}" "${longer[@]}" \
                    --batch_size 1 --context_parallel $((ranks / 2)) "${tiles[@]}"
            done
            # A bucket of gradients that is summed in two pieces.
            large=(--batch_size 2 --vocab_size 70000)
            alone dense_large "${large[@]}"
            mesh ${transport}_data2_large dense_large 2 "${by[@]}" "${large[@]}"
            grep -q "^ranks .* transfers ${way_of[$transport]}" "$work/${transport}_ring2.out" &&
                ok "$transport: transfers ${way_of[$transport]}" ||
                bad "$transport: $(grep '^ranks ' "$work/${transport}_ring2.out")"
        done
    else
        echo "not run: copy engines and NCCL between two GPUs (one here)"
    fi
    # Ranks that would share a GPU are refused in clear words.
    first_gpu=${CUDA_VISIBLE_DEVICES:-0}
    CUDA_VISIBLE_DEVICES=${first_gpu%%,*} train nccl_shared 2 --comm_transport nccl --batch_size 2
    if grep -q 'built without NCCL' "$work/nccl_shared.out"; then
        echo "skip NCCL: $trainer is built without it"
    elif grep -q 'would share a GPU' "$work/nccl_shared.out"; then ok "nccl on one GPU is refused"; else
        bad "nccl on one GPU"
        tail -5 "$work/nccl_shared.out"
    fi
fi

# kill_rank RANK [SIGNAL]: of the job that `start` began, by SIGKILL unless another is named.
kill_rank() {
    local pid
    for pid in $(pgrep -P "$job"); do
        if tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -qx "LLMC_RANK=$1"; then
            kill "-${2:-KILL}" "$pid"
            return
        fi
    done
    return 1
}
# start NAME RANKS FLAG...: in the background; the launcher's process is $job.
start() {
    local name=$1 ranks=$2
    shift 2
    scripts/spawn_ranks.sh "$ranks" "$trainer" "${small[@]}" --output_dir "$work/$name" "$@" >"$work/$name.out" 2>&1 &
    job=$!
}
# ends NAME SECONDS: the job ends by itself within them, with a status that is not 0.
ends() {
    local begin=$SECONDS status
    while kill -0 "$job" 2>/dev/null && [ $((SECONDS - begin)) -le "$2" ]; do sleep 0.2; done
    if kill -0 "$job" 2>/dev/null; then
        bad "$1: the job still runs $2 s after a rank was killed"
        pkill -9 -P "$job"
        kill -9 "$job"
        return 1
    fi
    wait "$job"
    status=$?
    if [ $status -ne 0 ]; then ok "$1: the job ended with status $status after $((SECONDS - begin)) s"; else bad "$1: status 0"; fi
}
has_step() { [ -d "$work/$1/$(printf 'step%08d' "$2")" ]; }
wait_for_step() {
    for _ in $(seq 600); do
        has_step "$1" "$2" && return
        kill -0 "$job" 2>/dev/null || return 1
        sleep 0.1
    done
    return 1
}
# interrupt NAME RANKS SIGNAL SECONDS FLAG...: ranks in the middle of training, with a checkpoint after every step; rank
# 1 gets the signal after step 5, and the job has to end. Later checkpoints go, so that there are steps to compare.
interrupt() {
    local name=$1 ranks=$2 signal=$3 limit=$4 folder
    shift 4
    start "$name" "$ranks" "$@" --checkpoint_every 1 --keep_checkpoints 0 --max_steps 100000
    if ! wait_for_step "$name" 5 || ! kill_rank 1 "$signal"; then
        bad "$name: $(tail -3 "$work/$name.out")"
        return 1
    fi
    ends "$name" "$limit"
    if grep -qE 'rank 0 \([^)]+\), [^:]+, step [0-9]+' "$work/$name.out"; then
        ok "$name: the error names rank, host, operation and step"
    else
        bad "$name: the error: $(tail -3 "$work/$name.out")"
    fi
    for folder in "$work/$name"/step*; do
        if [ "$folder" \> "$work/$name/step00000005" ]; then rm -rf "$folder"; fi
    done
}

if [[ $parts = *' failures '* ]]; then
    context2=("${host[@]}" --batch_size 2 --context_parallel 2)
    # Gone on with on one rank, then on four.
    if interrupt killed 2 KILL $((timeout + 15)) "${context2[@]}"; then
        cp -r "$work/killed" "$work/on_four"
        mesh killed dense 1 --resume --batch_size 2 --context_parallel 1 --comm_transport auto --max_steps 20
        grep -q 'resumed from.*step 5$' "$work/killed.out" && ok "two ranks' checkpoint, one rank" || bad "resumed elsewhere"
        mesh on_four dense 4 --resume --batch_size 1 --context_parallel 2 "${host[@]}" --max_steps 20
    fi
    # One rank's checkpoint on two.
    train one_rank 1 --batch_size 2 --max_steps 10
    mesh one_rank dense 2 --resume "${context2[@]}" --max_steps 20
    # At start-up.
    start early 2 "${context2[@]}"
    for _ in $(seq 100); do
        kill_rank 1 2>/dev/null && break
        sleep 0.05
    done
    ends early $((timeout + 15))
    # At any moment of runs that write a checkpoint after every step: there is always one to go on from.
    for round in 1 2 3; do
        start saving$round 2 "${context2[@]}" --checkpoint_every 1 --keep_checkpoints 2 --max_steps 100000
        wait_for_step saving$round 3
        sleep "0.$((RANDOM % 900 + 100))"
        kill_rank $((round % 2))
        ends "killed while saving, $round" $((timeout + 15))
        last=$(find "$work/saving$round" -maxdepth 1 -name 'step*' | LC_ALL=C sort | tail -1)
        step=$((10#$(basename "${last:-step0}" | tr -d a-z)))
        if [ "$step" -ge 3 ] && train saving$round 1 --resume --batch_size 2 --context_parallel 1 --comm_transport auto --max_steps $((step + 1)) &&
            ! compgen -G "$work/saving$round/.partial-*" >/dev/null; then ok "goes on after step $step"; else
            bad "saving$round: $(tail -3 "$work/saving$round.out")"
        fi
    done
fi
if [[ $parts = *' nccl_failures '* ]] && [ "$gpus" -ge 2 ]; then
    # Two ranks that share sequences or, of four GPUs, two pairs. Killed: its partner's transfers never end. Standing
    # still: the same, and the launcher has to kill it. Gone on with on fewer ranks, and on as many as there were.
    ranks=2 batch=2 others=1
    [ "$gpus" -ge 4 ] && ranks=4 batch=1 others="1 2"
    for transport in $transports; do
        pairs=(--comm_transport "$transport" --batch_size $batch --context_parallel 2)
        for signal in KILL STOP; do
            name=${transport}_$signal
            interrupt "$name" $ranks $signal $((timeout + 40)) "${pairs[@]}" || continue
            for other in $others; do
                cp -r "$work/$name" "$work/${name}_on_$other"
                mesh "${name}_on_$other" dense "$other" --resume --comm_transport auto --batch_size 2 \
                    --context_parallel "$other" --max_steps 20
            done
            mesh "$name" dense $ranks --resume "${pairs[@]}" --max_steps 20
        done
    done
fi
exit $failed
