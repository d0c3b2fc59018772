#!/usr/bin/env bash
# Train N times with seeds 0 to N-1, a process each; several arms, separated by --, are interleaved:
#   scripts/repeat.sh N FLAGS... [-- FLAGS...]...
#   scripts/repeat.sh 12 --woof --size 128 -- --woof --size 128 --sa
set -euo pipefail
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: scripts/repeat.sh N FLAGS... [-- FLAGS...]...   (N: how many runs of each)" >&2
  exit 2
fi
n=$1
shift
for ((seed = 0; seed < n; seed++)); do
  arm=()
  for flag in "$@" --; do
    if [[ $flag != -- ]]; then
      arm+=("$flag")
    else
      "${PYTHON:-python}" "$(dirname "$0")/../train_imagenette.py" ${arm[@]+"${arm[@]}"} --seed "$seed"
      arm=()
    fi
  done
done
