#!/usr/bin/env bash
# Tests, measures and records on a CUDA GPU whatever still waits for one, in the order of its worth.
#   scripts/on_gpu.sh [RESULTS [MINUTES]]
#   RESULTS: a results directory (default: results). MINUTES: stop after so many, and end with exit code 124.
#   JOBS=3 in the environment trains three runs side by side (reproduce.py --jobs), which a large GPU has room for; more
#   of them under NVIDIA's Multi-Process Service, where there is one: `nvidia-cuda-mps-control -d` starts it.
# Each row is recorded as its run ends. What has its row or its file is not done again, so call it again to go on.
# The first ten minutes hold the CUDA tests, a first look at the accuracy, and the time of a training step.
# No step needs a network where fastai's untar_data finds Imagewoof: the archives of 160 and 320 px.
# A step that fails is reported, and the next one follows; the exit code is 1 then.
#
# Beside each step stand the minutes that it should take on one NVIDIA H200 where nothing of it is recorded but by the
# steps before. They are worked out from what was measured there with --cuda-graphs. At 128 px a run of an xresnet50 with
# sagan that was alone for most of its time trained 6,500 images a second, and each of three side by side 2,350, so that
# JOBS=3 saves less than a tenth there; with simple three side by side trained 2,720, so that one alone is taken to
# train 7,500. At 64 px a run of an xresnet18 takes 6 seconds, and three side by side took 7: JOBS=3 should need a third
# of the minutes. An xresnet18 is taken to train 10,000 images of 128 px a second, and an image of 256 px to need as
# long as four of 128. On one NVIDIA H100 under the Multi-Process Service, eight side by side made a run of 64 px every
# 1.3 seconds, and four one of 128 px every 8; the first runs began 40 seconds after their command.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-results}
minutes=${2:-}
jobs=${JOBS:-1}
python=${PYTHON:-python}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
if [[ -n $minutes && ! $minutes =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: scripts/on_gpu.sh [RESULTS [MINUTES]]   (MINUTES: a whole number)" >&2
  exit 2
fi
if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  echo "on_gpu.sh: no CUDA device" >&2
  exit 2
fi
failed=0

try() { # MINUTES COMMAND...
  local limit=() code=0 left expected="about $1 min on an H200"
  if [[ $1 == - ]]; then expected='not measured yet'; fi
  if [[ -n $minutes ]]; then
    left=$((60 * minutes - SECONDS))
    if ((left <= 0)); then over; fi
    limit=(timeout --foreground --kill-after 60 "$left") # by SIGTERM: a run still writes its row
  fi
  echo "== ${*:2}   ($expected)"
  ${limit[@]+"${limit[@]}"} "$python" "${@:2}" || code=$?
  if [[ -n $minutes ]] && ((code && SECONDS >= 60 * minutes)); then over; fi
  case $code in
    0) ;;
    129 | 130 | 138 | 143) exit "$code" ;; # the signals that end a run
    *)
      echo "on_gpu.sh: failed with exit code $code: ${*:2}" >&2
      failed=1
      ;;
  esac
}
over() {
  echo "on_gpu.sh: $minutes minutes are over; call it again to go on" >&2
  exit 124
}
measure() { # MINUTES FOLDER WHAT FLAGS...: into RESULTS/FOLDER/benchmarks
  if [[ ! -e $results/$2/benchmarks/$3.csv ]]; then try "$1" scripts/benchmark.py "${@:3}" --results "$results/$2"; fi
}
record() { try "$1" scripts/reproduce.py "${@:2}" --cuda-graphs --jobs "$jobs" --results "$results"; }

try 2 -m pytest -k cuda
record 1 woof-128-5 --arms none,simple --runs 2
measure 1 cuda step
measure 2 cuda run --woof --size 128 --sa --cuda-graphs

record 6 woof-128-5 --arms none,simple,sagan
record 14 attention
record 2 attention-size
record 2 woof-128-5 --arms none,simple --split v2 --runs 6
record 4 woof-128-5 --arms none,simple,sagan --split v2
record 2 woof-128-5
record 8 woof-64-5-r18-places
record 4 woof-64-5-r18-stages
for what in network layer loader cost; do measure - cuda "$what"; done
measure - cuda/compiled run --woof --size 128 --sa --compile

echo '== 256 px from the 320 px archive: "no verdict", as the published rows come from the full one'
measure 4 cuda/256px run --woof --size 256 --source 320 --sa --cuda-graphs
record 12 woof-256-5 --source 320
record 45 woof-256-20 --source 320
record 10 woof-256-5 --source 320 --split v2

echo '== 50 epochs at 128 px'
record 45 woof-128-50-r18 --arms none,simple
record 35 woof-128-50-r18 --arms none,simple --split v2
exit $failed
