#!/usr/bin/env bash
# What is to be measured on a CUDA GPU, in the order of its worth: the tests that need one, the accuracy of the main job, the
# benchmarks, the rows of the record. Each row is recorded as its run ends, so it may be stopped at any time and called again.
#   scripts/on_gpu.sh [RESULTS]        Imagewoof as untar_data finds it; RESULTS: a results directory (default: results)
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-results}
python=${PYTHON:-python}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
"$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "on_gpu.sh: no CUDA device" >&2; exit 2; }
"$python" -m pytest -k 'cuda'
"$python" scripts/reproduce.py woof-128-5 --arms none,simple --runs 2 --results "$results"
for what in layer step loader cost; do "$python" scripts/benchmark.py $what --results "$results"; done
for compile in 0 1; do "$python" scripts/benchmark.py run --woof --size 128 --sa --compile $compile --results "$results/compile$compile"; done
"$python" scripts/benchmark.py run --woof --size 256 --source 320 --sa --results "$results/256px"
"$python" scripts/reproduce.py woof-128-5 --arms none,simple,sagan --results "$results"
"$python" scripts/reproduce.py woof-256-5 --source 320 --results "$results"
"$python" scripts/reproduce.py woof-128-50-r18 --arms none,simple --results "$results"
"$python" scripts/reproduce.py woof-256-20 --source 320 --results "$results"
"$python" scripts/reproduce.py woof-128-5 --arms none,simple,sagan --split v2 --results "$results"
