"""A new layer, flag or experiment is one change: each is made in a copy of the repository, which then runs."""
import csv
import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPO

TINY = '--split v1 --size 32 --bs 6 --arch xresnet18 --workers 0 --epochs 1'.split()

LAYER = '''
class Linear(_Attention):
    "y = x + gamma * W x."
    def __init__(self, n_channels):
        super().__init__(n_channels)
        self.conv = SpectralWeight(n_channels, n_channels)

    def attend(self, x, dtype): return x + self.gamma * (self.conv().to(dtype) @ x.to(dtype))

    def multiply_adds(self, n_positions): return self.n_channels**2 * n_positions


'''
EXPERIMENT = '''
    'leaky': Experiment(
        claim='A leaky ReLU helps',
        arms={act: Config(dataset='digits', size=32, epochs=1, arch='xresnet18', act=act)
              for act in ('relu', 'leaky_relu')},
        runs=1),
'''


@pytest.fixture
def change(tmp_path):
    "Makes changes [(file, text to find once, text in its place)] in a copy of the repository; returns the copy."
    copy = tmp_path / 'copy'
    ignored = shutil.ignore_patterns('.*', '__pycache__', 'checkpoints', 'predictions', 'curves')
    shutil.copytree(REPO, copy, ignore=ignored)

    def call(*changes):
        for file, old, new in changes:
            text = (copy / file).read_text(encoding='utf-8')
            assert text.count(old) == 1, (file, old)
            (copy / file).write_text(text.replace(old, new), encoding='utf-8')
        return copy
    return call


def run(copy, *argv):
    "Runs python in the copy; returns what it printed."
    env = os.environ | dict(PYTHONPATH=str(copy), OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=copy, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def train(copy, tree, results, *lines):
    "Runs the training command in the copy once for each line of flags, all in one process; returns what it printed."
    lines = [['--data', str(tree), *TINY, '--results', str(results), *line.split()] for line in lines]
    return run(copy, '-c', f'import train_imagenette\nfor argv in {lines!r}: assert not train_imagenette.main(argv)')


def rows(results):
    with open(results / 'runs.csv', newline='', encoding='utf-8') as f: return list(csv.DictReader(f))


@pytest.mark.slow(28)
def test_a_layer_is_a_class_and_a_line(change, tree, tmp_path):
    start = 'ATTENTION = {\n'
    copy = change(('layers.py', start, LAYER + start + "    'linear': Linear,\n"))
    train(copy, tree, tmp_path / 'results', '--sa linear', '')
    linear, none = rows(tmp_path / 'results')
    assert (linear['attention'], linear['status']) == ('linear', 'ok')
    assert int(linear['n_parameters']) == int(none['n_parameters']) + 64 * 64 + 1  # W at 64 channels, and gamma
    tests = run(copy, '-m', 'pytest', '-m', '', '-n', '0', '-rA', '-k', 'linear', 'tests/test_layers.py')
    assert tests.count('PASSED') > 40


@pytest.mark.slow(8)
@pytest.mark.parametrize('role, again', [('result', True), ('speed', False)])
def test_a_flag_is_a_field_with_its_role(role, again, change, tree, tmp_path):
    "Runs that differ in a knob of the role speed are repetitions, so that --resume skips the second one."
    start = '    # training\n'
    field = f"    tilt: float = knob(0., 'a new knob', least=0, most=1, role={role!r})\n"
    copy = change(('experiments.py', start, start + field))
    out = train(copy, tree, tmp_path / 'results', '', '--tilt 0.5 --resume')
    assert ('(recorded already)' in out) != again
    assert [row['tilt'] for row in rows(tmp_path / 'results')] == ['0.0', '0.5'][:1 + again]


@pytest.mark.slow(10)
def test_an_experiment_is_an_entry(change, tree, tmp_path):
    start = '\nEXPERIMENTS = {'
    copy = change(('experiments.py', start, start + EXPERIMENT))
    argv = ['scripts/reproduce.py', 'leaky', '--data', tree, '--bs', 6, '--workers', 0]
    assert 'too few runs to say' in run(copy, *argv, '--results', tmp_path / 'results')
    assert [row['act'] for row in rows(tmp_path / 'results')] == ['relu', 'leaky_relu']
    listed = run(copy, 'scripts/reproduce.py', '--list', '--results', tmp_path / 'results')
    assert 'leaky  A leaky ReLU helps\n    python train_imagenette.py --dataset digits ' in listed
    assert '    runs done / wanted: relu 0/1, leaky_relu 0/1\n' in listed
