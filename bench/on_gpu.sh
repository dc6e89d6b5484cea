#!/usr/bin/env bash
# Everything that a borrowed GPU should tell, from a checkout, with no network and no installation:
#
#     bash bench/on_gpu.sh                # all slices, 33 minutes
#     bash bench/on_gpu.sh 2              # one slice, 9 minutes
#     RESULTS=/tmp/out TABLES=/tmp/tables bash bench/on_gpu.sh 1
#
# 1: the test suite, what cuDNN does with the paper's convolutions, every way to compute them.
# 2: the ops against PyTorch, and a first look at the paper's training step.
# 3: training against PyTorch, at batches of 128 and 1024, with and without normalisation.
# 4: inference, the memory-bound kernels' candidates, the rest.
#
# The record (bench/results/<gpu>/<date>-<commit>.json) is written as each group of measurements
# ends, and the table of who computes convolutions fastest (alexkern/tables, from where it ships)
# as each of them is known, so a slice that fails half way leaves what it has. The last lines are a
# short table. A copy without its repository names its commit in ALEXKERN_COMMIT.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1
results=${RESULTS:-bench/results}
export ALEXKERN_TABLES=${TABLES:-alexkern/tables} # which slice 1 writes, and `auto` goes by
timed=(--benchmark-only --benchmark-quiet --results "$results")
failed=0

# step SECONDS WHAT...: pytest, interrupted when its time is up (it then still writes and reports)
step() {
  local seconds=$1 begin=$SECONDS
  shift
  printf '\n== pytest %s\n' "$*"
  timeout --signal=INT --kill-after=15 "$seconds" \
    python3 -m pytest -q --tb=short --no-header -p no:cacheprovider -W ignore "$@" ||
    { failed=1; echo "== failed, or out of time"; }
  echo "== $((SECONDS - begin)) s"
}

workers=()
python3 -c 'import xdist' 2>/dev/null && workers=(-n "$(nproc)" --dist worksteal)

slice_1() {
  step 200 tests/ops tests/runtime tests/models tests/training tests/test_optim.py \
    "${workers[@]}" -p bench.outcomes --outcomes suite "$results"
  step 100 bench/bench_vendor.py --vendor "${timed[@]}"
  printf '\n== alexkern tune\n'
  timeout --signal=INT --kill-after=15 240 python3 -m alexkern.cli tune ||
    { failed=1; echo "== failed, or out of time"; }
}

slice_2() {
  step 50 bench/bench_training.py -k 'paper and not compile' "${timed[@]}" # if slice 3 is cut
  step 430 bench/bench_{lrn_pool,conv_lrn_pool,lrn,pool,sgd,augment,linear,dropout,conv,lrn_path}.py \
    "${timed[@]}"
}

slice_3() {
  step 90 bench/bench_training.py -k 'no_lrn and not max_autotune' "${timed[@]}"
  step 220 bench/bench_training.py -k paper-128 "${timed[@]}"
  step 170 bench/bench_training.py -k paper-1024 "${timed[@]}"
}

slice_4() {
  step 60 bench/bench_inference.py "${timed[@]}"
  step 90 bench/bench_tune.py --tune "${timed[@]}"
  step 70 bench/bench_host.py bench/bench_data.py "${timed[@]}"
}

[ $# -gt 0 ] || set -- 1 2 3 4
for slice in "$@"; do
  case $slice in
    1 | 2 | 3 | 4) "slice_$slice" ;;
    *) echo "no slice $slice: 1 to 4" >&2; exit 2 ;;
  esac
done
printf '\n'
python3 -m bench report --short --results "$results"
exit $failed
