import os
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
from conftest import REPO, unchanged
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from test_house import MODULES, reach, roots

import runlog
from experiments import EXPERIMENTS
from report import compare, layer_cost, tables
from report import published as record

SHOWN = {  # notebook: (the record it shows, a text that has to be in it)
    'results.ipynb': ('results/runs.csv', lambda: tables.markdown(compare.for_readers(
        compare.gaps(EXPERIMENTS, runlog.load(), record.load_published())))),
    'layer_cost.ipynb': ('results/benchmarks/cost.csv', lambda: layer_cost.softmax_verdict(layer_cost.load_cost())),
}


def texts(notebook):
    "What the cells of a notebook show as Markdown or plain text; cells tagged 'varies' depend on the machine."
    cells = [cell for cell in notebook.cells if 'varies' not in cell.metadata.get('tags', [])]
    outputs = [o.get('data', {}) for cell in cells for o in cell.get('outputs', [])]
    return [data.get('text/markdown', data.get('text/plain')) for data in outputs]


@pytest.mark.slow(31)
@pytest.mark.parametrize('path', sorted((REPO / 'notebooks').glob('*.ipynb')), ids=lambda p: p.name)
def test_runs_top_to_bottom_and_its_outputs_are_not_stale(path):
    notebook = nbformat.read(path, as_version=4)
    stored = texts(notebook)
    for cell in notebook.cells: cell.source = cell.source.replace('EPOCHS = 3', 'EPOCHS = 1')  # enough here
    where = {'metadata': {'path': str(path.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name='python3', resources=where).execute()
    if path.name in SHOWN:
        record, text = SHOWN[path.name]
        assert text() in texts(notebook)
        if unchanged(record): assert stored == texts(notebook)


@pytest.mark.parametrize('path', sorted((REPO / 'notebooks').glob('*.ipynb')), ids=lambda p: p.name)
def test_no_output_names_a_folder_of_a_machine(path):
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get('outputs', [])]
    texts = [output.get('text', '') + output.get('data', {}).get('text/plain', '') for output in outputs]
    assert not re.search(r'/(home|root|work)/', ''.join(texts))


@pytest.mark.parametrize('on_colab', [True, False])
def test_the_first_cell_fetches_on_colab_what_the_report_needs(on_colab, monkeypatch):
    notebook = nbformat.read(REPO / 'notebooks' / 'results.ipynb', as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == 'code')
    called = []
    shell = SimpleNamespace(system=called.append, run_line_magic=lambda *words: called.append(' '.join(words)))
    if on_colab: monkeypatch.setitem(sys.modules, 'google.colab', ModuleType('google.colab'))
    def run(source): exec(TransformerManager().transform_cell(source), dict(get_ipython=lambda: shell))
    if not on_colab:
        run(cell.source)
        assert not called
        return
    with pytest.raises(SystemExit, match='set REPOSITORY, above, to the address of this repository'): run(cell.source)
    assert not called
    run(cell.source.replace("REPOSITORY = ''", "REPOSITORY = 'https://a.b/c'"))
    assert [re.match(r'git clone|\w+', call)[0] for call in called] == ['git clone', 'cd', 'pip']
    packages = re.findall(r'"(.*?)"', called[2])
    needed = roots(reach('report.__main__')) - set(sys.stdlib_module_names) - roots(MODULES) - {'numpy'}
    assert {re.match(r'\w+', package)[0] for package in packages} == needed
    assert set(packages) <= set((REPO / 'requirements.txt').read_text(encoding='utf-8').split())


def test_refresh_runs_the_notebook_with_its_own_python_whatever_kernel_the_user_has(tmp_path):
    spec = tmp_path / 'share' / 'kernels' / 'python3' / 'kernel.json'
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/bin/false"], "display_name": "another", "language": "python"}', encoding='utf-8')
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('import sys; print(sys.executable)')])
    (tmp_path / 'notebooks').mkdir()
    nbformat.write(notebook, tmp_path / 'notebooks' / 'x.ipynb')
    script = (REPO / 'scripts' / 'refresh.sh').read_text(encoding='utf-8').split("<<'PY'\n")[1].removesuffix('PY\n')
    subprocess.run([sys.executable, '-', 'notebooks/x.ipynb'], input=script, encoding='utf-8', cwd=tmp_path, check=True,
                   env=os.environ | dict(JUPYTER_DATA_DIR=str(tmp_path / 'share')))
    (cell,) = nbformat.read(tmp_path / 'notebooks' / 'x.ipynb', as_version=4).cells
    assert cell.outputs[0].text.strip() == sys.executable
