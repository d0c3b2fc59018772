#!/usr/bin/env bash
# What is to be measured on a CUDA GPU, in the order of its worth: the tests that need one, the accuracy of the main job, the
# benchmarks, the rows of the record. Each row is recorded as its run ends and is not run again, nor is a benchmark that has its
# file, so it may be stopped at any time and called again. What fails is told, and the rest goes on.
#   scripts/on_gpu.sh [RESULTS]        Imagewoof as untar_data finds it; RESULTS: a results directory (default: results)
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-results}
python=${PYTHON:-python}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  echo "on_gpu.sh: no CUDA device" >&2
  exit 2
fi
failed=0

try() {
  echo "== $*"
  "$python" "$@"
  code=$?
  if ((code == 130 || code == 143)); then exit $code; fi
  if ((code)); then
    echo "on_gpu.sh: failed with exit code $code: $*" >&2
    failed=1
  fi
}
measure() { # FOLDER WHAT FLAGS...: into RESULTS/benchmarks, or RESULTS/FOLDER/benchmarks
  if [[ ! -e $results/$1/benchmarks/$2.csv ]]; then try scripts/benchmark.py "${@:2}" --results "$results/$1"; fi
}
record() { try scripts/reproduce.py "$@" --results "$results"; }

try -m pytest -k cuda
record woof-128-5 --arms none,simple --runs 2
for what in layer step loader cost; do measure cuda "$what"; done
measure cuda run --woof --size 128 --sa
measure cuda/compiled run --woof --size 128 --sa --compile
measure cuda/256px run --woof --size 256 --source 320 --sa
record woof-128-5 --arms none,simple,sagan
record woof-256-5 --source 320
record woof-128-50-r18 --arms none,simple
record woof-256-20 --source 320
record woof-128-5 --arms none,simple,sagan --split v2
record woof-256-5 --source 320 --split v2
record woof-128-50-r18 --arms none,simple --split v2
record woof-256-20 --source 320 --split v2
exit $failed
