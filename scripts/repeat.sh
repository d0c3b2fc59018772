#!/usr/bin/env bash
# Train N times with seeds 0 to N-1, a process each:   scripts/repeat.sh N FLAGS...
# For example:   scripts/repeat.sh 12 --woof --size 128 --epochs 5 --sa
set -euo pipefail
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: scripts/repeat.sh N FLAGS...   (N: how many runs)" >&2
  exit 2
fi
n=$1
shift
for ((seed = 0; seed < n; seed++)); do
  "${PYTHON:-python}" "$(dirname "$0")/../train_imagenette.py" "$@" --seed "$seed"
done
