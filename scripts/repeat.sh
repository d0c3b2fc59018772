#!/usr/bin/env bash
# Trains N times with the seeds 0 to N-1, each run in its own process.
# Several command lines, separated by --, take turns:
#   scripts/repeat.sh N FLAGS... [-- FLAGS...]...
#   scripts/repeat.sh 12 --woof --size 128 -- --woof --size 128 --sa
# A run that fails does not stop the others; the script then ends with exit code 1. Nor does a run that another process
# is training; the exit code is 75 then.
# A mistake in the flags, Ctrl-C and the other signals that end a run end it at once.
set -euo pipefail
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: scripts/repeat.sh N FLAGS... [-- FLAGS...]...   (N: how many runs of each)" >&2
  exit 2
fi
n=$1
shift
for flag in "$@"; do
  case ${flag%%=*} in
    --seed) echo "repeat.sh: --seed: the seeds are 0 to $((n - 1)); train_imagenette.py --seed N --runs M takes others" >&2 ;;
    --runs | --run) echo "repeat.sh: ${flag%%=*}: N, before the flags, says how many runs there are of each" >&2 ;;
    *) continue ;;
  esac
  exit 2
done
repo=$(dirname "$0")/..
python=${PYTHON:-python}
if [[ -z ${PYTHON:-} && -x $repo/.venv/bin/python ]]; then python=$repo/.venv/bin/python; fi
failed=0
left=0
for ((seed = 0; seed < n; seed++)); do
  arm=()
  for flag in "$@" --; do
    if [[ $flag != -- ]]; then
      arm+=("$flag")
    else
      code=0
      "$python" "$repo/train_imagenette.py" ${arm[@]+"${arm[@]}"} --seed "$seed" || code=$?
      case $code in
        0) ;;
        75) left=$((left + 1)) ;;
        2 | 129 | 130 | 138 | 143) exit "$code" ;;
        *) failed=$((failed + 1)) ;;
      esac
      arm=()
    fi
  done
done
if ((left)); then echo "repeat.sh: $left runs left to another process" >&2; fi
if ((failed)); then
  echo "repeat.sh: $failed runs failed" >&2
  exit 1
fi
if ((left)); then exit 75; fi
