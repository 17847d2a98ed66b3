#!/usr/bin/env bash
# Installs what the tests need, builds, and runs every test this machine can run; says plainly which it could not run and
# why. Needs no GPU. Ends with 'N passed, N failed, N skipped'.
#   scripts/test.sh            everything
#   scripts/test.sh --no_cuda  without compiling the CUDA code
# PYTHON names the Python that has torch and transformers, FUZZ_SECONDS how long each fuzzer runs (10), LLMC_GOLDEN_DIR
# a folder with other implementations' outputs, which are not part of the repository.
set -uo pipefail
unset CDPATH # which cd would follow
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
cuda=yes
case ${1:-} in
"") ;;
--no_cuda) cuda=no ;;
*) sed -n 's/^#   //p' "$0"; exit 2 ;;
esac

scripts/install_dependencies.sh test || exit 1
# Threads that wait sleep: spinning, they would take the cores from whatever else runs here.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
# In continuous integration they lie beside the checkout.
[ -z "${LLMC_GOLDEN_DIR:-}" ] && [ -d ../shared/golden ] && LLMC_GOLDEN_DIR=../shared/golden
export LLMC_GOLDEN_DIR=${LLMC_GOLDEN_DIR:-}
passed=0 failed=0 skipped=0 not_run=""
log=$(mktemp -d)

# check NAME COMMAND...: one test of at most half an hour; its output is shown when it fails.
check() {
    local name=$1 start=$SECONDS
    shift
    if timeout -k 10 1800 "$@" >"$log/out" 2>&1 </dev/null; then
        passed=$((passed + 1))
        echo "ok   $name ($((SECONDS - start)) s)"
        # What it left out, as scripts and GoogleTest say it.
        not_run+=$(sed -n "s/^skip /     $name: /p; s/^\[  SKIPPED \] \([A-Z][A-Za-z0-9.]*\)$/     $name: \1/p" "$log/out" | sort -u && echo .)
        not_run=${not_run%.}
    else
        failed=$((failed + 1))
        echo "FAIL $name ($((SECONDS - start)) s): $*"
        # What it says it failed at, with what follows, and how it ended.
        { head -n -40 "$log/out" | grep -A 5 '^FAIL\|^\[  FAILED' | head -40 && echo ...; tail -40 "$log/out"; } | sed 's/^/     /'
    fi
}
old_bash="scripts/spawn_ranks.sh needs bash 5.1, this is $BASH_VERSION"
spawns_ranks() { [ $((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1])) -ge 501 ]; }
# skip NAME REASON
skip() {
    skipped=$((skipped + 1))
    not_run+="     $1: $2"$'\n'
}

echo "== build"
make -s found
check build_cpu_trainer make -s train_gpt_cpu
check build_host_tests make -s -j"$(nproc)" host_tests

echo "== unit tests"
for test in dev/test/test_*.cpp; do
    name=$(basename "$test" .cpp)
    check "$name" "build/$name" --gtest_brief=1
done
check sanitized_unit_tests make -s -j"$(nproc)" sanitize

echo "== parsers under libFuzzer"
if scripts/install_dependencies.sh fuzz; then
    check build_fuzzers make -s -j"$(nproc)" fuzzers
    for fuzzer in dev/test/fuzz_*.cpp; do
        name=$(basename "$fuzzer" .cpp)
        mkdir -p "$log/$name"
        check "$name" "build/fuzz/$name" -max_total_time="${FUZZ_SECONDS:-10}" -max_len=65536 -rss_limit_mb=4096 \
            -artifact_prefix="$log/$name/" "$log/$name"
    done
else
    skip fuzzers "clang with libFuzzer is not installed and could not be"
fi

echo "== ranks in processes of their own"
if spawns_ranks; then
    check ranks_without_mpi scripts/spawn_ranks.sh 4 build/mpi_comm
else
    skip ranks_without_mpi "$old_bash"
fi
if ! command -v mpirun >/dev/null; then
    skip ranks_under_mpi "no mpirun here"
elif [[ $(mpirun --version 2>&1) != *"Open MPI"* ]]; then
    skip ranks_under_mpi "$(command -v mpirun) is not Open MPI's"
else
    as_root=()
    [ "$(id -u)" -eq 0 ] && as_root=(--allow-run-as-root)
    check ranks_under_mpi mpirun "${as_root[@]}" --oversubscribe -np 4 build/mpi_comm
fi

echo "== end to end"
for script in dev/test/e2e_*.sh; do
    [ "$script" = dev/test/e2e_ranks.sh ] && continue # needs a GPU, below
    if [ "$script" = dev/test/e2e_spawn_ranks.sh ] && ! spawns_ranks; then
        skip e2e_spawn_ranks "$old_bash"
        continue
    fi
    check "$(basename "$script" .sh)" bash "$script"
done

if command -v "$python" >/dev/null; then
    check random_resumes "$python" dev/test/random_resumes.py --runs 40
    check random_resumes_planted "$python" dev/test/random_resumes.py --runs 8 --planted
else
    skip random_resumes "no $python here (PYTHON=... names another)"
fi

echo "== outputs of other implementations"
if [ -d "$LLMC_GOLDEN_DIR" ]; then
    check hugging_face_llama build/check_hf_golden "$LLMC_GOLDEN_DIR/hf_llama_gqa"
    check published_lighthouse build/check_golden "$LLMC_GOLDEN_DIR"/peer_lighthouse_*.safetensors
else
    skip golden "LLMC_GOLDEN_DIR '$LLMC_GOLDEN_DIR': names no folder with them"
fi
if "$python" -c 'import torch, transformers' 2>/dev/null; then
    check transformers_reads_our_checkpoints "$python" dev/test/check_transformers.py
else
    skip transformers_reads_our_checkpoints "$python has no packages torch and transformers (PYTHON=... names another)"
fi

echo "== CUDA code"
if [ $cuda = no ]; then
    skip cuda "asked not to (--no_cuda)"
elif [[ $(make -s found) == *'no nvcc'* ]]; then
    skip cuda "no nvcc here"
else
    # For this machine's GPU or, without one, sm_80 and sm_90a.
    check build_cuda_trainer bash -o pipefail -c "make -s -j$(nproc) PTXAS=-warn-spills,-v train_gpt test_gpt 2>&1 |
        tee '$log/ptxas' | sed '/^ptxas info/d; /bytes stack frame/d'"
    check build_cuda_dev make -s -j"$(nproc)" dev
    # Where ptxas serialises a warpgroup's products (C7510 and its like), a kernel is right, and half as fast.
    if grep -q 'Used [0-9]* registers' "$log/ptxas"; then
        check no_serialised_products bash -c "! grep C75 '$log/ptxas'"
    else
        skip no_serialised_products "train_gpt was built before"
    fi
    if ! command -v "$python" >/dev/null; then
        skip divergent_collectives "no $python here (PYTHON=... names another)"
    elif cuobjdump=$(PYTHON=$python scripts/install_dependencies.sh cuobjdump); then
        CUOBJDUMP=$cuobjdump check divergent_collectives "$python" dev/test/check_divergence.py train_gpt test_gpt
    else
        skip divergent_collectives "no cuobjdump, which comes with the CUDA toolkit, and it could not be installed"
    fi
    check fit bash dev/test/fit.sh
    # The programs start without a GPU, and say in one sentence that they need one.
    if nvidia-smi -L >/dev/null 2>&1; then
        skip train_gpt_without_gpu "there is a GPU here"
    else
        check train_gpt_without_gpu bash dev/test/no_gpu.sh
    fi
fi
if scripts/gpu_capabilities.sh >/dev/null; then
    check gpu_check scripts/gpu_check.sh
    if spawns_ranks; then check e2e_ranks bash dev/test/e2e_ranks.sh; else skip e2e_ranks "$old_bash"; fi
else
    skip gpu_check "no NVIDIA GPU here; $(scripts/gpu_check.sh --stale)"
    skip e2e_ranks "no NVIDIA GPU here"
fi

rm -rf "$log"
[ -n "$not_run" ] && printf 'Not run:\n%s' "$not_run"
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
