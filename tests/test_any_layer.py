"""--sa FILE.py:NAME and PACKAGE.MODULE:NAME: layers from outside, on a tree of a few images."""
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import REPO, config

import layer_source
import runlog
import training.run
from command import UsageError
from experiments import Config, Experiment
from layers import ATTENTION
from report import compare
from report.published import load_published
from training import checkpoint, cluster, layer
from training.machine import settle
from xresnet import ARCHS, xresnet

CPU = torch.device('cpu')
TINY = '--split', 'v2', '--size', 32, '--bs', 6, '--arch', 'xresnet18', '--workers', 0
LAYERS = '''
import torch, torch.nn as nn

class Scaled(nn.Module):
    "x + gamma W x: the identity at the start."
    def __init__(self, n_channels):
        super().__init__()
        self.gamma, self.conv = nn.Parameter(torch.zeros(1)), nn.Conv2d(n_channels, n_channels, 1)
    def forward(self, x): return x + self.gamma * self.conv(x)

class Doubles(Scaled):
    def forward(self, x): return x + x
class Twice(nn.Module):
    def __init__(self, n_channels):
        super().__init__()
        self.factor = nn.Parameter(torch.full((n_channels, 1, 1), 2.))
    def forward(self, x): return self.factor * x
class Half(Scaled):
    def forward(self, x): return x[:, :, ::2]
class Views(Scaled):
    def forward(self, x): return x.view(len(x), -1).view_as(x)
class Norm(Scaled):
    def forward(self, x): return x / x.flatten(1).norm(dim=1)[:, None, None, None]
class Root(Scaled):
    def forward(self, x): return x + self.gamma * x.abs().sqrt()
class Raises(Scaled):
    def forward(self, x): raise RuntimeError('the first line\\nthe second line')
class Pair(Scaled):
    def forward(self, x): return x, x
class Whole(Scaled):
    def forward(self, x): return x.long()
class Detached(Scaled):
    def forward(self, x): return (x + 1).detach()
class Batches(Scaled):
    def forward(self, x): return x + self.gamma * (x - x.mean(0)) if len(x) > 1 else x[:, :1]
class Changes(Scaled):
    def forward(self, x): return x.add_(self.gamma)
class Wants2(nn.Module):
    def __init__(self, n_channels, n_groups): super().__init__()

def shifted(n_channels): return lambda x: x
number = 3
'''


@pytest.fixture
def file(tmp_path):
    "A file of layers in a folder of its own."
    file = tmp_path / 'mine' / 'my_layers.py'
    file.parent.mkdir()
    file.write_text(LAYERS)
    return file


def with_layer(attention, **settings):
    settings = dict(dataset='digits', arch='xresnet18', size=32) | settings
    return settle(Config(attention=attention, **settings), CPU)


def identity_of(cfg): return cfg.attention, cfg.attention_source


# --- its name and its source ---

def test_a_file_is_one_layer_wherever_it_is_called_from(file, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(file.parent)
    here = Config(attention='my_layers.py:Scaled')
    assert (here.attention, here.attention_file) == ('my_layers.py:Scaled', str(file))
    assert len(here.attention_source) == 12
    monkeypatch.chdir(tmp_path)
    for path in (file, 'mine/my_layers.py', 'mine/../mine/my_layers.py', '~/mine/my_layers.py'):
        assert Config(attention=f'{path}:Scaled') == here
    assert replace(here, seed=1).attention_file == str(file)  # found once, though it is not in this folder
    assert replace(here, attention='my_layers.py:Half').attention_file == str(file)
    plain = replace(here, attention='simple')
    assert (plain.attention_file, plain.attention_source) == ('', '')
    copy = tmp_path / 'my_layers.py'
    copy.write_bytes(file.read_bytes().replace(b'\n', b'\r\n'))  # the line ends of Windows
    assert identity_of(Config(attention='my_layers.py:Scaled')) == identity_of(here)
    copy.write_text(LAYERS + '# a comment')
    assert identity_of(Config(attention='my_layers.py:Scaled')) != identity_of(here)


def test_the_source_is_the_file_and_what_it_imports_from_its_folder(file):
    folder = file.parent
    (folder / 'parts').mkdir()
    for name in ('parts/__init__', 'parts/deep', 'more', 'other'): (folder / f'{name}.py').write_text('value = 1')
    file.write_text('import torch\nfrom parts import (deep,  # a comment\n                   nothing)\n' + LAYERS)
    (folder / 'parts' / 'deep.py').write_text('def late():\n    import more as m, os')
    def source(): return Config(attention=f'{file}:Scaled').attention_source
    before = source()
    (folder / 'other.py').write_text('value = 2')
    assert source() == before
    seen = {before}
    for name in ('parts/__init__', 'parts/deep', 'more'):
        with open(folder / f'{name}.py', 'a') as f: f.write('\nvalue = 2')
        seen.add(source())
    assert len(seen) == 4


@pytest.mark.parametrize('statement', [
    'try: import beside\nexcept ImportError: pass', 'if True: from beside import Scale', 'import torch, \\\n    beside',
    'def f():\n    from . import beside', 'print  # broken\nfrom beside import x y',
])
def test_an_import_counts_wherever_it_stands(statement, tmp_path):
    for name, text in (('mine', statement), ('beside', 'Scale = 1'), ('other', '')):
        (tmp_path / f'{name}.py').write_text(text, encoding='utf-8')
    files = layer_source.sources(f'{tmp_path}/mine.py:Mine', tmp_path / 'mine.py')
    assert files.keys() == {'mine.py', 'beside.py'}


def test_the_source_of_a_module_is_what_it_imports_from_its_package(file, monkeypatch):
    package = file.parent / 'package'
    package.mkdir()
    layers = 'import os; from . import one\ntry: from .two import *\nexcept ImportError: pass\nimport torch'
    for name, text in dict(__init__='', layers=layers, one='a = 1', two='', three='b = 1').items():
        (package / f'{name}.py').write_text(text)
    monkeypatch.chdir(file.parent)  # the working directory is looked in too
    def source(): return Config(attention='package.layers:Name').attention_source
    before = source()
    cfg = Config(attention='package.layers:Name')
    assert cfg.attention == 'package.layers:Name' and cfg.attention_file == str(package / 'layers.py')
    assert set(layer_source.sources(cfg.attention, cfg.attention_file)) == {
        f'package/{name}.py' for name in ('__init__', 'layers', 'one', 'two')}
    (package / 'three.py').write_text('b = 2')
    assert source() == before
    (package / 'two.py').write_text('b = 2')
    assert source() != before
    assert replace(cfg, attention='my_layers.py:Scaled').attention_file == str(file)


@pytest.mark.parametrize('attention, words', [
    ('nosuch.py:A', 'no such file'), ('my_layer.py:Scaled', 'no such file (did you mean my_layers.py?)'),
    ('nosuch.module:A', 'no module nosuch here; is its package installed?'), ('sys:A', 'has no file'),
    ('fastai.layrs:A', 'fastai has no module layrs (did you mean layers?)'),
    ('my_layers.py:', 'neither a layer of ours nor'),
    (':Scaled', 'neither a layer of ours nor'), ('a b:c', 'neither a layer of ours nor'),
    ('my_layers.py:a.b', 'neither a layer of ours nor'), ('my_layers.py', 'name the layer in it, my_layers.py:NAME'),
    ('simpel', 'did you mean simple?'),
    ('my_layers.py:Scaledd', 'has no Scaledd (did you mean Scaled?)'),
    ('my_layers.py:number', 'is of type int, not a class'),
    ('my_layers.py:Wants2', 'Wants2(64) fails: TypeError: Wants2.__init__() missing 1 required'),
    ('my_layers.py:shifted', 'shifted(64) is of type function, not a torch.nn.Module'),
    ('my_layers.py:Half', 'random numbers: gives (2, 64, 4, 8) for (2, 64, 8, 8); it must keep the shape'),
    ('my_layers.py:Views', 'fails on a batch (2, 64, 8, 8): RuntimeError: view size is not compatible'),
    ('my_layers.py:Norm', 'all zeros as at the first step: its output is not finite'),
    ('my_layers.py:Root', 'all zeros as at the first step: its gradient is not finite'),
    ('my_layers.py:Raises', 'fails on a batch (2, 64, 8, 8): RuntimeError: the first line\n'),
    ('my_layers.py:Pair', 'gives a tuple, not a tensor'),
    ('my_layers.py:Whole', 'gives torch.int64, not floating point'),
    ('my_layers.py:Detached', 'its gradient fails: RuntimeError: element 0 of tensors does not require grad'),
    ('my_layers.py:Batches', 'one image in validation: gives (1, 1, 8, 8) for (1, 64, 8, 8)'),
    ('imports.py:A', 'imports.py cannot be imported: ModuleNotFoundError: No module named'),
    ('broken.py:A', 'broken.py cannot be imported: SyntaxError: '), ('exits.py:A', 'cannot be imported: SystemExit: 3'),
    ('clash.py:A', 'clash.py:A: imports runlog beside it, but that is the name of'),
    ('made.py:instance', 'made.py:instance: is a module already; name its class, or a function of n_channels'),
    ('made.py:lazy', 'lazy(64) fails on cpu: ValueError: Attempted to use an uninitialized parameter'),
])
def test_a_refusal_is_one_line_before_anything_is_trained(attention, words, file, command, monkeypatch, tree, tmp_path):
    texts = dict(imports='import nosuchmodule', broken='def f(:', exits='import sys; sys.exit(3)', runlog='A = 1',
                 clash='from runlog import A', made='from torch import nn\ninstance = nn.Identity()\n'
                 'def lazy(n): return nn.LazyConv2d(n, 1)')
    for name, text in texts.items(): (file.parent / f'{name}.py').write_text(text)
    monkeypatch.chdir(file.parent)
    code, out, err = command('--data', tree, *TINY, '--sa', attention)
    assert code == 2 and not out and err.startswith('train_imagenette.py: --sa ') and err.count('\n') == 1, err
    assert words in err and not (tmp_path / 'results' / 'runs.csv').exists()
    assert not {'imports', 'clash', 'nosuchmodule'} & set(sys.modules)


# --- in the network ---

@pytest.mark.full_width
@pytest.mark.parametrize('arch', ARCHS)
def test_the_shapes_tried_are_those_of_the_network(arch):
    cfg, found = Config(arch=arch, size=75, sa_at='1,2.0,3,4'), []

    class Notes(torch.nn.Module):
        def __init__(self, n_channels): super().__init__()
        def forward(self, x): return found.append(tuple(x.shape[1:])) or x
    with torch.device('meta'), torch.no_grad(): xresnet(arch, 2, Notes, cfg.places).eval()(torch.zeros(1, 3, 75, 75))
    assert tuple(found) == layer.shapes(cfg)


def test_what_layers_cost_is_counted_as_our_layers_know_it(file, monkeypatch):
    file.write_text('from layers import ATTENTION\nglobals().update(ATTENTION)')
    for name in set(ATTENTION) - {'none'}:
        ours, theirs = (with_layer(a, sa_at='1,3') for a in (name, f'{file}:{name}'))
        assert layer.cost(ours, CPU) == layer.cost(theirs, CPU), name
    cost = layer.cost(with_layer('simple'), CPU)  # C = N = 64: three products
    assert cost == dict(attention_parameters=64**2 + 1, attention_multiply_adds=3 * 64**3)
    assert layer.cost(with_layer('none'), CPU) == dict(attention_parameters=0, attention_multiply_adds=0)


def test_what_is_not_the_identity_at_the_start_is_said_not_refused(file, capsys):
    for name in ('Scaled', 'Changes'): layer.check(with_layer(f'{file}:{name}'), CPU)
    assert not capsys.readouterr().err
    for _ in range(2): layer.check(with_layer(f'{file}:Doubles'), CPU)
    words = 'not the identity at the start: it changes its input by 100.0%\n'
    assert capsys.readouterr().err == f'my_layers.py:Doubles: {words}'


def test_the_check_draws_no_random_numbers(file):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    layer.check(with_layer(f'{file}:Scaled', sa_at='2'), CPU)
    layer.cost(with_layer(f'{file}:Scaled', sa_at='2'), CPU)
    layer.cost(with_layer('simple'), CPU)
    assert torch.rand(2).equal(expected)


def test_an_edited_file_is_imported_anew_and_never_in_the_place_of_another(file):
    (file.parent / 'parts.py').write_text('FACTOR = 2.')
    text = 'from parts import FACTOR\n' + LAYERS + '''
class Times(Scaled):
    def forward(self, x): return x * FACTOR
'''
    file.write_text(text)
    x = torch.ones(1, 4, 2, 2)
    def output(cfg): return layer.get_layer(cfg)(4)(x).mean().item()
    first = with_layer(f'{file}:Times')
    assert output(first) == 2. and 'parts' not in sys.modules
    (file.parent / 'parts.py').write_text('FACTOR = 3.')
    with pytest.raises(UsageError, match='has changed; start anew'): output(first)
    assert output(with_layer(f'{file}:Times')) == 3.
    file.unlink()
    with pytest.raises(UsageError, match='is gone'): output(replace(first, seed=1))


def test_a_layer_can_use_ours(file):
    file.write_text('from layers import SimpleSelfAttention as Ours')
    assert type(layer.get_layer(with_layer(f'{file}:Ours'))(8)).__name__ == 'SimpleSelfAttention'


# --- runs ---

def record(tmp_path): return runlog.load(tmp_path / 'results' / 'runs.csv')


def test_a_run_its_row_its_model_and_what_is_recorded_already(file, tree, command, monkeypatch, tmp_path, capfd):
    model_file = tmp_path / 'model.pt'
    argv = ['--data', tree, *TINY, '--epochs', 1]
    code, out, err = command(*argv, '--sa', f'{file}:Scaled', '--save', model_file)
    assert code == 0 and 'xresnet18+my_layers.py:Scaled' in out, err
    row = record(tmp_path).iloc[0]
    assert (row.attention, row.attention_file, len(row.attention_source)) == ('my_layers.py:Scaled', str(file), 12)
    assert (row.attention_parameters, row.attention_multiply_adds) == (64**2 + 64 + 1, 64**2 * 64)
    monkeypatch.chdir(file.parent)
    code, out, _ = command(*argv, '--sa', 'my_layers.py:Scaled', '--resume')
    assert code == 0 and '(recorded already)' in out
    model, vocab = training.run.load_model(model_file)
    assert model.stage1[-1].attention.gamma != 0 and len(vocab) == 3
    file.write_text(LAYERS + '# edited')
    training.run.load_model(model_file)
    assert 'the source of my_layers.py:Scaled has changed since it was saved' in capfd.readouterr().err
    code, out, _ = command(*argv, '--sa', 'my_layers.py:Scaled', '--resume')
    assert code == 0 and 'recorded already' not in out
    df = record(tmp_path)
    assert df.attention.nunique() == 1 and df.attention_source.nunique() == 2 and set(df.status) == {'ok'}


def test_a_checkpoint_is_not_continued_with_another_source(file, tree, command, monkeypatch, tmp_path):
    argv = ['--data', tree, *TINY, '--epochs', 2, '--checkpoint-every', 1, '--sa', f'{file}:Scaled', '--resume']

    def stop(self):
        if self.epoch == 1: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(training.measure.Heed, 'before_batch', stop)
        assert command(*argv)[0] == 130
    (kept,) = (tmp_path / 'results' / 'checkpoints').glob('*.pt')
    file.write_text(LAYERS + '# edited')
    code, out, err = command(*argv)
    assert code == 0 and 'continues after' not in out and kept.exists(), err
    file.write_text(LAYERS)
    code, out, _ = command(*argv)
    assert code == 0 and f'{kept.stem}: continues after epoch 1 of 2' in out and not kept.exists()
    assert record(tmp_path).status.tolist() == ['ok', 'ok'] and record(tmp_path).attention_source.nunique() == 2


def test_a_checkpoint_older_than_a_knob_ran_with_what_was_before_it(tree, tmp_path, monkeypatch):
    cfg = settle(config(tree), CPU)
    state = dict(run_id='a', data_fingerprint='d', epoch=1)
    old = {key: value for key, value in asdict(cfg).items() if not key.startswith('attention_')}
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'a.pt').touch()
    for read in ('load', 'peek'): monkeypatch.setattr(checkpoint, read, lambda *args: state | dict(config=old))
    runs = runlog.load(tmp_path / 'runs.csv')
    assert checkpoint.find(replace(cfg, attention='simple'), 'd', runs, tmp_path) is None
    found = checkpoint.find(cfg, 'd', runs, tmp_path)
    found.held.release()
    assert found.state['run_id'] == 'a'


def test_reports_tell_two_sources_apart(file, tmp_path):
    row = dict(status='ok', data_fingerprint='d', n_train=24, n_val=12)
    kwargs = dict(dataset='digits', size=32, arch='xresnet18', precision='fp32')
    first, none = (with_layer(a) for a in (f'{file}:Scaled', 'none'))
    file.write_text(LAYERS + '# edited')
    second = with_layer(f'{file}:Scaled')
    ends = [(none, 0.5), (none, 0.52), (first, 0.6), (first, 0.62), (second, 0.7), (second, 0.73)]
    for i, (cfg, accuracy) in enumerate(ends):
        cfg = replace(cfg, seed=i % 2, **kwargs)
        runlog.append(asdict(cfg) | row | dict(run_id=f'r{i}', started=str(i), accuracy=accuracy), tmp_path)
    file.unlink()  # a report needs the record alone
    runs = runlog.load(tmp_path / 'runs.csv')
    found = [runlog.of_config(runs, cfg) for cfg in (none, first, second)]
    assert [list(df.run_id) for df in found] == [['r0', 'r1'], ['r2', 'r3'], ['r4', 'r5']]
    summary = compare.summarise(runs)
    assert sorted(summary.n) == [2, 2, 2]
    exp = Experiment('', dict(none=none, mine=second), 2)
    (gap,) = compare.gaps({'mine': exp}, runs, load_published(), tmp_path)
    assert gap['difference']['difference'] == pytest.approx(0.205)


@pytest.mark.parametrize('shared', [True, False])
def test_a_node_of_ray_without_the_file_gets_it(shared, file, tree, tmp_path):
    (file.parent / 'parts.py').write_text('FACTOR = 1.')
    file.write_text('from parts import FACTOR\n' + LAYERS)
    cfg = replace(config(tree, arch='xresnet18', epochs=1), attention=f'{file}:Scaled')
    files = layer_source.packed(cfg.attention, cfg.attention_file)
    assert set(files) == {'my_layers.py', 'parts.py'}
    assert not layer_source.packed('simple', '') and not layer_source.packed('fastai.layers:A', 'fastai/layers.py')
    results = tmp_path / 'results'
    results.mkdir()
    if shared: (results / 'mark').touch()
    else: file.unlink()
    row = cluster.train_run(cfg, results, 'mark', None, files).row
    assert row['status'] == 'ok' and (row['attention'], row['attention_file']) == ('my_layers.py:Scaled', str(file))
    assert row['attention_source'] == cfg.attention_source and row['attention_parameters'] == 64**2 + 64 + 1


@pytest.mark.slow(24)
def test_several_processes_train_a_layer_from_a_file(file, tree, spawn, tmp_path):
    pytest.importorskip('accelerate')
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, REPO / 'train_imagenette.py']
    argv = ['--data', tree, *TINY, '--epochs', 1, '--results', tmp_path / 'results']
    process = spawn(*launch, *argv, '--sa', f'{file}:Twice')
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err.count('not the identity at the start') == 1, err
    row = record(tmp_path).iloc[0]
    assert (row.status, row.attention, row.processes) == ('ok', 'my_layers.py:Twice', 2)
    process = spawn(*launch, *argv, '--sa', f'{file}:Doubles')
    _, err = process.communicate(timeout=300)
    assert 'some of its parameters get no gradient, so several processes cannot train it' in err


@pytest.mark.parametrize('attention', ['fastai.layers:SimpleSelfAttention', 'timm.layers:EcaModule',
                                       'timm.layers.cbam:CbamModule'])
def test_layers_of_other_packages(attention):
    pytest.importorskip(attention.partition('.')[0])
    cfg = with_layer(attention)
    layer.check(cfg, CPU)
    cost = layer.cost(cfg, CPU)
    assert cost['attention_parameters'] > 0 and cost['attention_multiply_adds'] > 0
    model = training.run.get_model(cfg, 10).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
