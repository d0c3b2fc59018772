"""The walls of the house: which module may import which. CONTRIBUTING.md has the picture."""
import ast
import graphlib
import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPO

MODULES = {'.'.join(f.relative_to(REPO).with_suffix('').parts): f
           for f in [*REPO.glob('*.py'), *REPO.glob('training/*.py'), *REPO.glob('report/*.py')]}


def imported(file):
    "Returns the names of all modules that a file imports anywhere, those of ours down to the module."
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parts = {f'{node.module}.{alias.name}' for alias in node.names}
            found |= {part for part in parts if part in MODULES} or {node.module}
    return found


IMPORTS = {name: imported(file) for name, file in MODULES.items()}


def reach(name, seen=None):
    "Returns all modules that `name` imports, directly or through ours."
    seen = set() if seen is None else seen
    for other in IMPORTS.get(name, set()) - seen:
        seen.add(other)
        reach(other, seen)
    return seen


def roots(names): return {name.partition('.')[0] for name in names}


@pytest.mark.parametrize('name', [name for name in MODULES if name.startswith('report.')])
def test_reports_need_no_torch(name):
    assert not roots(reach(name)) & {'torch', 'torchvision', 'fastai', 'training'}


@pytest.mark.parametrize('name', [name for name in MODULES if name.startswith('training.')])
def test_training_knows_no_report(name):
    assert 'report' not in roots(reach(name))


@pytest.mark.parametrize('name', [name for name in MODULES if name.startswith('training.')])
def test_training_knows_no_command(name):
    assert 'train_imagenette' not in reach(name)


def test_the_map_of_training_names_each_of_its_modules():
    lines = ast.get_docstring(ast.parse((REPO / 'training' / '__init__.py').read_text(encoding='utf-8'))).splitlines()
    named = [line.split()[0] for line in lines[1:] if line]
    there = [name.partition('.')[2] for name in MODULES if name.startswith('training.')]
    assert sorted(named) == sorted(name for name in there if name != '__init__')


def test_no_imports_go_in_a_circle():
    list(graphlib.TopologicalSorter({name: others & MODULES.keys() for name, others in IMPORTS.items()}).static_order())


def test_reports_go_from_statistics_to_figures():
    order = [['stats', 'published'], ['compare'], ['tables', 'figures'], ['__main__']]
    order = [{f'report.{name}' for name in names} for names in order]
    for i, names in enumerate(order):
        later = set().union(*order[i + 1:])
        for name in names: assert not reach(name) & later, name
    assert set().union(*order[:-1]) <= reach('report.__main__')


def test_command_imports_nothing_of_ours():
    assert not IMPORTS['command'] & MODULES.keys()


def test_reports_and_the_record_load_no_torch():
    code = 'import sys, runlog, report.__main__; assert not {"torch", "fastai"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], cwd=REPO, check=True)


def test_tests_of_reports_record_and_statistics_start_without_torch():
    code = 'import sys, conftest, test_compare, test_figures, test_house, test_map_figures\n' \
           'import test_published, test_report, test_runlog, test_stats, test_tables, test_trial_page\n' \
           'assert not {"torch", "fastai"} & set(sys.modules)'
    path = os.pathsep.join([str(REPO), str(REPO / 'tests')])
    subprocess.run([sys.executable, '-c', code], env=os.environ | {'PYTHONPATH': path}, check=True)


@pytest.mark.slow(3)
@pytest.mark.parametrize('file, code', [
    ('layers.py', 'import torch, layers\n'
                  'x = torch.randn(2, 8, 5, 5)\n'
                  'assert layers.SimpleSelfAttention(8)(x).shape == x.shape'),
    ('xresnet.py', 'import torch, xresnet\n'
                   'assert xresnet.xresnet("xresnet18", 3).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)'),
])
def test_a_file_can_be_copied_alone(file, code, tmp_path):
    shutil.copy(REPO / file, tmp_path)
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)
