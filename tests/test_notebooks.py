import nbformat
import pytest
from conftest import REPO
from nbclient import NotebookClient


@pytest.mark.parametrize('path', sorted((REPO / 'notebooks').glob('*.ipynb')), ids=lambda p: p.name)
def test_runs_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    assert any(cell.get('outputs') for cell in notebook.cells)
