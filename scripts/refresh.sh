#!/usr/bin/env bash
# Makes everything again that is made from the record: results/tables, results/figures, the table in README.md, and the outputs of
# notebooks/results.ipynb.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
"$python" -m report
"$python" -m report --readme
"$python" scripts/estimate.py
"$python" - notebooks/results.ipynb <<'PY'
import sys

import nbformat
from nbclient import NotebookClient

file = sys.argv[1]
notebook = nbformat.read(file, as_version=4)
where = {'metadata': {'path': 'notebooks'}}
NotebookClient(notebook, record_timing=False, kernel_name='python3', resources=where).execute()
nbformat.write(notebook, file)
PY
