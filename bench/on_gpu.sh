#!/usr/bin/env bash
# Everything that a borrowed GPU should tell, from a checkout, with no network and no installation:
#
#     bash bench/on_gpu.sh                # all slices, 27 minutes
#     bash bench/on_gpu.sh 1              # one slice, 9 minutes
#     RESULTS=/tmp/out bash bench/on_gpu.sh 2
#
# 1: the test suite, what cuDNN does with the paper's convolutions, and a numerical check of every
#    candidate configuration. 2: the ops and the network against PyTorch. 3: the candidates timed.
# The record (bench/results/<gpu>/<date>-<commit>.json) is written as each group of measurements
# ends, so a slice that fails half way leaves what it has. The last lines are a short table.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1
results=${RESULTS:-bench/results}
timed=(--benchmark-only --benchmark-columns=median --results "$results")
failed=0

# step SECONDS WHAT...: pytest, interrupted when its time is up (it then still writes and reports)
step() {
  local seconds=$1 begin=$SECONDS
  shift
  printf '\n== pytest %s\n' "$*"
  timeout --signal=INT --kill-after=20 "$seconds" python3 -m pytest -q -p no:cacheprovider "$@" ||
    { failed=1; echo "== failed, or out of time"; }
  echo "== $((SECONDS - begin)) s"
}

workers=()
python3 -c 'import xdist' 2>/dev/null && workers=(-n 8)

slice_1() {
  step 200 tests/ops tests/runtime tests/models tests/training tests/test_optim.py \
    -m 'slow or not slow' "${workers[@]}" -p bench.outcomes --outcomes suite "$results"
  step 100 bench/bench_vendor.py "${timed[@]}"
  step 200 bench/bench_tune.py --tune --benchmark-disable "${workers[@]}" \
    ${workers:+--dist loadgroup} -p bench.outcomes --outcomes configurations "$results"
}

slice_2() {
  step 230 bench/bench_{conv,lrn,pool,dropout}.py "${timed[@]}"
  step 40 bench/bench_training.py -k 'not compile' "${timed[@]}" # in case the next is cut short
  step 190 bench/bench_training.py "${timed[@]}"
  step 70 bench/bench_inference.py "${timed[@]}"
}

slice_3() {
  step 520 bench/bench_tune.py --tune "${timed[@]}"
}

[ $# -gt 0 ] || set -- 1 2 3
for slice in "$@"; do
  case $slice in
    1 | 2 | 3) "slice_$slice" ;;
    *) echo "no slice $slice: 1, 2 or 3" >&2; exit 2 ;;
  esac
done
python3 -m bench report --short --results "$results"
exit $failed
