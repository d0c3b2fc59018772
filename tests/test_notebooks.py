import nbformat
import pytest
from conftest import REPO
from nbclient import NotebookClient
from test_report import unchanged

import report
import runlog


def texts(notebook):
    "What the cells of a notebook show as Markdown or plain text."
    outputs = [o.get('data', {}) for cell in notebook.cells for o in cell.get('outputs', [])]
    return [data.get('text/markdown', data.get('text/plain')) for data in outputs]


@pytest.mark.parametrize('path', sorted((REPO / 'notebooks').glob('*.ipynb')), ids=lambda p: p.name)
def test_runs_top_to_bottom_and_its_outputs_are_not_stale(path):
    notebook = nbformat.read(path, as_version=4)
    stored = texts(notebook)
    NotebookClient(notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    if path.name == 'results.ipynb':
        assert report.markdown(report.comparison(runlog.load(), report.load_published())) in texts(notebook)
        if unchanged('results/runs.csv'): assert stored == texts(notebook)
