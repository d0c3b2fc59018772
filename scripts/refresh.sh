#!/usr/bin/env bash
# Makes everything again that is made from the record: results/tables, results/figures, the table in README.md, and the
# outputs of notebooks/results.ipynb and notebooks/layer_cost.ipynb.
#
#   scripts/refresh.sh                  with the Python of .venv, or else the `python` in PATH
#   PYTHON=/a/python scripts/refresh.sh
#
# The notebooks run in that same Python.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
"$python" -m report
"$python" -m report --readme
"$python" scripts/estimate.py
"$python" - notebooks/results.ipynb notebooks/layer_cost.ipynb <<'PY'
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

with tempfile.TemporaryDirectory() as folder:  # The kernel is this Python, whatever kernel python3 the user has.
    write_kernel_spec(Path(folder) / 'kernels' / 'python3')
    os.environ['JUPYTER_PATH'] = folder
    for file in sys.argv[1:]:
        notebook = nbformat.read(file, as_version=4)
        where = {'metadata': {'path': 'notebooks'}}
        NotebookClient(notebook, record_timing=False, kernel_name='python3', resources=where).execute()
        nbformat.write(notebook, file)
PY
