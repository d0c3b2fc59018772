"""Random command lines, 2,000 in all: each ends with exit code 0 or 2, a mistake in one line, never in a traceback."""
import collections
import contextlib
import io
import os
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import CLASSES, script
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as st

import runlog
import train_imagenette
import training.machine
import training.run
from command import Parser
from experiments import EXPERIMENTS, Config
from report import __main__ as main
from training import cluster, data

configuration.set_hypothesis_home_dir(Path(os.environ['FASTAI_HOME']) / 'hypothesis')  # not in the repository
reproduce = script('reproduce')
NOTES = ('--sym does nothing without --sa', '--sym 1 makes W symmetric', 'in 2019 the default was',
         "in fastai's script of 2020 the default was", "fastai's own script of 2019 multiplied --lr",
         "in lessw2020's script the default was")
ODD = [
    '', ' ', '-', '--', '---', '0', '1', '2', '-1', '1.5', '1e-3', '0x10', '1_0', 'nan', 'inf', '-inf', '1e308',
    '1e400', '1e-320', '9' * 30, '9' * 5000, '\u0663', 'é', '\U0001f600', '\udcff', 'a\nb', 'a\rb', 'a\u2028b',
    '\x1b[31m', 'x' * 300, 'x' * 5000, 'None', 'True', '%s', '{0}', "'", '"', '*', '1,2.0', '1,', ',', 'set',
    'set/train', 'bad', 'file', 'link', 'pipe', 'no/such/folder', '/dev/null', 'auto', 'sagan', 'digits', '--sa',
    '--seed', '-h', '--help', '--epcohs', '--s', '--lr=', '--woof=', '--=',
]
LIKELY = {f.name: list(map(str, f.metadata['choices'])) for f in fields(Config) if f.metadata['choices']} | dict(
    size=['32', '33', '31'], epochs=['1', '10000', '10001'], bs=['2', '6', '24', '31', '65536'],
    lr=['1e-3', '1e30', '1.1e30'], mixup=['0', '1e-3', '9e-4'], sa_at=['1', '1,2.0', '4.2', '9'],
    data=['set', 'set', 'bad'], meta=['a note', ''], seed=['0', '2147483646', '2147483647'], processes=['1', '2'],
    workers=['-1', '0', '256', '257'], runs=['1', '2'], gpu=['0', '99'], checkpoint_every=['0', '1', '-1'],
    save=['new.pt', 'file'], results=['results', 'new'], seed0=['0', '7', '2147483647'],
    until=['0.5', '1e-9', 'nan', 'inf'], arms=['none', 'none,simple', 'simple,none', 'none,none'],
    ray=['auto', 'host:1'], cpus_per_run=['1', '2', '0'], gpus_per_run=['0', '0.25', '2'])


def command_lines(parser, *start, most=8):
    "Draws lists of arguments: `start`, then flags of `parser`, mostly with a likely value, and now and then any word."
    words = st.sampled_from(ODD)

    def flag(action):
        names = st.sampled_from(action.option_strings)
        if action.nargs == 0: return names.map(lambda name: [name])
        likely = st.sampled_from(LIKELY.get(action.dest, ['0', '1', '0.5']))
        value = st.integers(0, 9).flatmap(lambda i: words if i < 2 else likely)
        apart = st.tuples(names, value).map(list)
        forms = [apart, apart, apart.map(lambda both: ['='.join(both)])]
        if action.nargs == '?': forms.append(names.map(lambda name: [name]))
        return st.one_of(forms)
    flags = st.sampled_from([a for a in parser._actions if a.option_strings and a.dest != 'help']).flatmap(flag)
    piece = st.integers(0, 29).flatmap(lambda i: words.map(lambda word: [word]) if i == 0 else flags)
    return st.lists(piece, max_size=most).map(lambda pieces: [*start, *(word for piece in pieces for word in piece)])


def end(main, program, argv):
    "Returns the exit code of main(argv), 0 or 2; where it is 2, one line has said why."
    out = io.TextIOWrapper(io.BytesIO(), 'utf-8', 'strict')  # as Python's own
    err = io.TextIOWrapper(io.BytesIO(), 'utf-8', 'backslashreplace')
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = main(argv) or 0
        except SystemExit as e: code = e.code or 0  # --help
    out.flush()
    err.seek(0)
    told = [line for line in err.read().splitlines() if not line.removeprefix(f'{program}: ').startswith(NOTES)]
    assert code in (0, 2) and len(told) == (code == 2), (code, told)
    assert all(line.startswith(f'{program}: ') for line in told), (code, told)
    return code


class Elsewhere:
    "A cluster that answers at any address, whose runs all end well."
    device = training.run.torch.device('cpu')
    def __init__(self, address, results, cpus, gpus): pass
    def each(self, todo, checkpoint_every): return [(*run, None) for run in todo]


@pytest.fixture
def place(tree, tmp_path, monkeypatch):
    "A folder of files of all kinds to be in; nothing is downloaded, no model made, nothing trained, no figure drawn."
    monkeypatch.chdir(tmp_path)
    for file in ('file', 'bad/train/c/1.png', 'bad/val/c/1.png'):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text('run_id,acc\na,1\n')
    Path('link').symlink_to('nowhere')
    os.mkfifo('pipe')
    for module in (train_imagenette, reproduce):
        monkeypatch.setattr(module, '__file__', str(tmp_path / 'scripts' / 'x.py'))
        monkeypatch.setattr(module, 'stop_on_signals', lambda: None)
    monkeypatch.setattr(runlog, 'RESULTS', tmp_path / 'results')
    for arm in ('none', 'simple'):
        runlog.append(dict(run_id=arm, status='ok', attention=arm, accuracy=0.5), tmp_path / 'results')
    monkeypatch.setattr(data, 'find_data', lambda cfg: Path(cfg.data or tree))
    monkeypatch.setattr(data, 'N_IMAGES', {})
    monkeypatch.setattr(cluster, 'Cluster', Elsewhere)
    monkeypatch.setattr(training.machine, 'check_compiler', lambda device: None)  # It would compile for seconds.
    monkeypatch.setattr(training.run, 'get_model', lambda cfg, n_classes: n_classes)
    monkeypatch.setattr(training.run, 'dump', lambda cfg: training.run.get_model(cfg, 10))
    monkeypatch.setattr(main, 'write', lambda *args: None)
    monkeypatch.setattr(main, 'write_readme', lambda table: None)

    def run(cfg, results, device, *args, **kwargs):
        runlog.check(results)
        assert training.run.prepare(cfg, device)[2] in (2, len(CLASSES))
    def find_lr(cfg, results, device): return run(cfg, results, device) or (1e-3, Path(results) / 'plot.png')
    monkeypatch.setattr(training.run, 'run', run)
    monkeypatch.setattr(training.run, 'find_lr', find_lr)


def run_all(main, program, lines, n):
    "Runs `n` command lines; returns how often each exit code was met."
    codes = collections.Counter()

    @settings(max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(lines)
    def each(argv): codes[end(main, program, argv)] += 1
    each()
    assert codes.total() == n
    return codes


@pytest.mark.parametrize('n', [100, pytest.param(1800, marks=pytest.mark.slow(22))])
def test_train_imagenette(n, place):
    lines = command_lines(train_imagenette.make_parser(), '--bs', '6', '--workers', '0')
    codes = run_all(train_imagenette.main, 'train_imagenette.py', lines, n)
    assert min(codes[0], codes[2]) > n / 7, codes


@pytest.mark.slow(31)
def test_reproduce(place, monkeypatch):
    parsers = []
    init = Parser.__init__

    def keep(self, *args, **kwargs):
        parsers.append(self)
        init(self, *args, **kwargs)
    monkeypatch.setattr(Parser, '__init__', keep)
    assert reproduce.main([]) == 2
    monkeypatch.setattr(Parser, '__init__', init)
    names = st.sampled_from(['digits'] * 2 * len(ODD) + ['woof-128-50-r18-lr', 'woof-128-5', *ODD])
    flags = command_lines(parsers[0], '--bs', '6', '--runs', '1', most=3)
    lines = st.tuples(names, flags).map(lambda both: [both[0], *both[1]])
    codes = run_all(reproduce.main, 'reproduce.py', lines, 100)
    assert min(codes[0], codes[2]) > 15, codes


@pytest.mark.parametrize('main, program, start, words, n', [
    (main.main, 'report', [], [*EXPERIMENTS][:3], 40), (runlog.main, 'runlog.py', ['merge'], ['results/runs.csv'], 60),
])
def test_report_and_merge(main, program, start, words, n, place):
    word = st.sampled_from(words * (60 // len(words)) + ODD)
    flags = st.sampled_from(['--results', '--results=new', '--results=file', '--readme', '--results=' + 'x' * 300])
    lines = st.lists(word | word | flags, min_size=1, max_size=2).map(lambda argv: start + argv)
    codes = run_all(main, program, lines, n)
    assert min(codes[0], codes[2]) > 3, codes
