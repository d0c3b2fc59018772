import nbformat
import pytest
from conftest import REPO
from nbclient import NotebookClient
from test_report import unchanged

import runlog
from experiments import EXPERIMENTS
from report import compare, layer_cost, tables
from report import published as record

SHOWN = {  # notebook: (the record it shows, a text that has to be in it)
    'results.ipynb': ('results/runs.csv',
                      lambda: tables.markdown(compare.gaps(EXPERIMENTS, runlog.load(), record.load_published()))),
    'layer_cost.ipynb': ('results/benchmarks/cost.csv', lambda: layer_cost.softmax_verdict(layer_cost.load_cost())),
}


def texts(notebook):
    """Returns what the cells of a notebook show as Markdown or plain text.

    The cells tagged 'varies' are left out: the last digits there are the machine's.
    """
    cells = [cell for cell in notebook.cells if 'varies' not in cell.metadata.get('tags', [])]
    outputs = [o.get('data', {}) for cell in cells for o in cell.get('outputs', [])]
    return [data.get('text/markdown', data.get('text/plain')) for data in outputs]


@pytest.mark.slow(15)
@pytest.mark.parametrize('path', sorted((REPO / 'notebooks').glob('*.ipynb')), ids=lambda p: p.name)
def test_runs_top_to_bottom_and_its_outputs_are_not_stale(path):
    notebook = nbformat.read(path, as_version=4)
    stored = texts(notebook)
    NotebookClient(notebook, timeout=300, kernel_name='python3',
                   resources={'metadata': {'path': str(path.parent)}}).execute()
    if path.name in SHOWN:
        record, text = SHOWN[path.name]
        assert text() in texts(notebook)
        if unchanged(record): assert stored == texts(notebook)
