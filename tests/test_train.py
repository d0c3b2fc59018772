"""The command, from its flags to its row."""
import copy
import functools
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, REPO
from fastai.callback.fp16 import AMPMode
from fastai.callback.training import ShortEpochCallback
from fastai.learner import AvgSmoothLoss
from fastai.optimizer import OptimWrapper

import runlog
import train_imagenette
import training.machine
import training.run
from command import UsageError
from experiments import EXPERIMENTS, Config, fields, flag, keys_of, literal, resolve
from layers import ATTENTION, SimpleSelfAttention
from training.learner import Compile, Graphs, SmoothLoss, get_opt_func
from training.others import notes_on_others
from xresnet import ACTIVATIONS, ARCHS, POOLS, STEMS

TINY = ('--split', 'v1', '--size', 32, '--bs', 6, '--arch', 'xresnet18', '--workers', 0, '--epochs', 1)


def config(*argv): return train_imagenette.parse([str(a) for a in argv])[0]


def record(tmp_path): return runlog.load(tmp_path / 'results' / 'runs.csv')


# --- flags ---

def test_the_registries_are_read_as_they_are():
    for file, name, value in [('layers.py', 'ATTENTION', ATTENTION), ('xresnet.py', 'STEMS', STEMS),
                              ('xresnet.py', 'ACTIVATIONS', ACTIVATIONS), ('xresnet.py', 'POOLS', POOLS)]:
        assert keys_of(file, name) == list(value)
    assert literal('xresnet.py', 'ARCHS') == ARCHS


def test_no_flags_give_the_recipe():
    assert config() == Config()
    recipe = dict(size=128, epochs=5, bs=64, lr=3e-3, arch='xresnet50', attention='none', sa_at='1', stem='32-64-64',
                  act='relu', pool='avg', opt='adam', mom=0.9, sqrmom=0.99, eps=1e-6, wd=1e-2, schedule='one_cycle',
                  label_smoothing=0.1,
                  mixup=0, split='auto', source='auto')
    assert {k: getattr(Config(), k) for k in recipe} == recipe
    assert resolve(Config()).split == 'v1' and resolve(Config(dataset='digits')).split == 'v2'


def test_the_sources_own_command_line():
    argv = '--woof 1 --size 128 --bs 64 --mixup 0 --sa 0 --epoch 50 --lr 8e-3 --arch xresnet18 --log name'
    cfg = config(*argv.split())
    assert cfg == Config(dataset='imagewoof', epochs=50, lr=8e-3, arch='xresnet18', meta='name')


@pytest.mark.parametrize('argv, expected', [
    ('--woof', dict(dataset='imagewoof')), ('--woof 1', dict(dataset='imagewoof')),
    ('--woof=1', dict(dataset='imagewoof')),
    ('--woof 0', {}),
    ('--sa', dict(attention='simple')), ('--sa 1', dict(attention='simple')), ('--sa 0', {}),
    ('--sa sagan', dict(attention='sagan')),
    ('--sa --size 64', dict(attention='simple', size=64)), ('--sa 1 --sym 1', dict(attention='simple_sym')),
    ('--sym 1', {}),
    ('--sa --sym 0', dict(attention='simple')), ('--alpha 0.9', dict(sqrmom=0.9)),
    ('--label_smoothing 0', dict(label_smoothing=0.)),
    ('--compile', dict(compile=1)), ('--compile 0 --fused 0', dict(fused=0)),
    ('--loader device', dict(loader='device')),
    ('--pct-noise 5', dict(pct_noise=5)), ('--pct_noise 5', dict(pct_noise=5)), ('--act_fn mish', dict(act='mish')),
    ('--sa --sa-at 1,2.0 --pool max --opt ranger --schedule flat_cos',
     dict(attention='simple', sa_at='1,2b0', pool='max', opt='ranger', schedule='flat_cos')),
])
def test_flags(argv, expected): assert config(*argv.split()) == Config(**expected)


def test_a_command_line_of_the_replication():
    "As in its notebook, with the network of its script and the images that it took."
    line = ('--run 5 --woof 1 --size 128 --bs 64 --mixup 0 --sa 1 --epoch 5 --lr 4e-3 --gpu 0 --opt ranger --mom .95 '
            '--sched_type flat_and_anneal --ann_start 0.72')
    cfg, args = train_imagenette.parse([*line.split(), '--arch', 'mxresnet50', '--source', 'full'])
    assert resolve(cfg) == EXPERIMENTS['woof-128-5-ranger'].arms['simple'] and (args.runs, args.gpu) == (5, 0)
    assert config(*line.split()) == replace(cfg, act='relu', source='auto')


def notes_on(line): return notes_on_others(line.split(), train_imagenette.parse(line.split())[1])


BOTH = 'in 2019 the default was --lr 0.001 --bs 256; here it is --lr 0.003 --bs 64'


@pytest.mark.parametrize('argv, note', [
    ('--woof 1 --sa 1', BOTH), ('--woof=1', BOTH), ('--sa 0', BOTH), ('--epoch 5', BOTH),
    ('--run 2 --arch xresnet50', BOTH),
    ('--sched_type one_cycle --bs 64 --arch xresnet50', 'the default was --lr 0.001; here it is --lr 0.003,'),
    ('--woof 1 --lr=1e-3', 'the default was --bs 256; here it is --bs 64,'),
    ('--sa 1 --sym 1 --lr 3e-3 --bs 64', '--sym 1 makes W symmetric; in 2019 it had no effect'),
    ('--woof 1 --lr 1e-2 --bs 64', "fastai's own script of 2019 multiplied --lr by --bs/256: its line on one GPU is "
     '--lr 0.0025 here'),
    ('--run 2 --lr 4e-3 --bs 64 --arch mxresnet50', "in lessw2020's script the default was --source full; here it is "
     '--source auto'),
    ('--run 2 --lr 4e-3 --bs 64', "in lessw2020's script the default was --arch mxresnet50 --source full; here it is "
     '--arch xresnet50 --source auto'),
    ('--run 2 --lr 4e-3 --bs 64 --size 256', 'the default was --arch mxresnet50; here'),
    ('--sched_type one_cycle --lr 1 --bs 64 --source full', 'the default was --arch mxresnet50; here'),
    ('--sa --sym', '--sym 1 makes W symmetric'), ('--sym 1 --lr 3e-3 --bs 64', '--sym does nothing without --sa'),
])
def test_a_reader_of_2019_is_told_what_differs(argv, note):
    (told,) = notes_on(argv)
    assert note in told


@pytest.mark.parametrize('argv', ['', '--woof --sa --epochs 5', '--woof 1 --sa 1 --bs 64 --lr 3e-3',
                                  '--sa simple_sym --runs 2', '--woof 1 --lr 1e-3 --bs 256', '--lr 1e-2 --bs 128',
                                  '--run 2 --lr 4e-3 --bs 64 --arch xresnet18',
                                  '--meta 1 --woof --resume 1', '--schedule flat_cos --fused 0'])
def test_nobody_else_is_told(argv): assert not notes_on(argv)


@pytest.mark.slow(1)
def test_notes_go_to_stderr(command):
    code, out, err = command('--woof', 1, '--dump', '--arch', 'xresnet18')
    assert code == 0 and err == f'train_imagenette.py: {BOTH}, as in the documented results\n' and 'xresnet18: ' in out


def test_the_help_says_what_differs_from_2019(capsys):
    with pytest.raises(SystemExit): train_imagenette.parse(['--help'])
    text = capsys.readouterr().out
    said = ('1e-3 and 256', '--sym 1 makes W symmetric', 'the step was skipped', 'multiplied --lr by --bs / 256',
            '--source full')
    for words in said: assert words in text


def test_the_dataset_of_a_folder(tree):
    cfg, woof = config('--data', tree), config('--data', tree, '--woof')
    assert cfg == Config(dataset='custom', data=str(tree)) and resolve(cfg).split == 'v2'
    assert woof == Config(dataset='imagewoof', data=str(tree)) and resolve(woof).split == 'v1'


def test_every_field_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit): train_imagenette.parse(['--help'])
    text = capsys.readouterr().out
    for f in fields(Config):
        if f.metadata['flag']: assert f'{flag(f)} ' in text and ' '.join(f.metadata['help'].split()[:2]) in text


@pytest.mark.parametrize('argv, words', [
    ('--arch xresnet51', 'did you mean xresnet50?'), ('--sa sagn', 'did you mean sagan?'),
    ('--sa-at 9 --dump', '1 (or 1.0 to 1.2)'),
    ('--size 31', '--size 31: must be at least 32'), ('--size big', "invalid int value: 'big'"),
    ('--pct-noise 7', '--pct-noise 7'),
    ('--lr 0', '--lr 0.0: must be above 0'), ('--lr nan', 'not a finite number'), ('--bs', 'expected one argument'),
    ('--epcohs 3', 'did you mean --epochs?'), ('stray', 'unknown argument stray'), ('--woof 2', '0 or 1'),
    ('--runs 0', 'at least 1'),
    ('--sa sagan --sym', 'for --sa simple only'), ('--dataset digits --split v1', 'one split only'),
    ('--dataset digits --woof', 'give one of them'), ('--data /no/such/folder', 'no such folder'),
    ('--gpu 99', '--gpu 99'),
    ('--save /no/such/folder/m.pt', 'cannot be written (No such file'),
    ('--seed 2147483647 --runs 2', '--seed 2147483648'),
    ('--precision fp16 --dataset digits --size 32', 'needs a GPU'), ('--mixup 1e-300', '--mixup 1e-300'),
    ('--dataset custom', 'name its folder'), ('--data /', 'no folder train'), ('--mom 1', '--mom 1.0: must be below 1'),
    ('--save /tmp', 'cannot be written (Is a directory)'), ('--save /dev/null', 'not a regular file'),
    ('--runs=--', 'expected an'),
    ('--lr 1e308', 'at most 1e+30'), ('--\x1b', r'unknown argument --\x1b'), ('--meta \udcff', 'cannot be printed'),
])
def test_a_mistake_is_one_line_and_exit_code_2(argv, words, command):
    if 'fp16' in argv and torch.cuda.is_available(): pytest.skip('fp16 works on CUDA')
    code, out, err = command(*argv.split())
    assert code == 2 and words in err and err.count('\n') == 1 and err.startswith('train_imagenette.py: ') and not out


@pytest.mark.parametrize('argv, code', [
    ('--help', 0), ('--epcohs 3', 2), ('--arch resnet', 2), ('--sa-at 9', 2), ('--data /no/such/folder', 2),
    ('--data /', 2),
])
def test_answers_in_under_3_seconds(argv, code):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        command = [sys.executable, REPO / 'train_imagenette.py', *argv.split()]
        done = subprocess.run(command, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == code and 'Traceback' not in done.stderr
    assert min(seconds) < 3


# --- runs ---

def test_a_run_leaves_a_row_a_curve_and_predictions(tree, command, tmp_path):
    code, out, err = command('--data', tree, '--sa', '--seed', 5, '--meta', 'a, "note"', *TINY[:-1], 2, '--bs', 4)
    assert code == 0, err
    row = record(tmp_path).iloc[0]
    last = out.strip().splitlines()[-1]
    best = f'(max {row.max_accuracy:.3f} at epoch {row.max_accuracy_epoch})'
    assert last.startswith(f'accuracy {row.accuracy:.3f}  {best}  ')
    assert 'custom v1 32px xresnet18+simple seed 5' in last and last.endswith('runs.csv')
    assert (row.status, row.split, row.source, row.attention, row.meta) == ('ok', 'v1', 'auto', 'simple', 'a, "note"')
    assert (row.n_train, row.n_val, row.epochs_done, row.seed) == (30, 6, 2, 5)
    model = training.run.get_model(Config(arch='xresnet18', attention='simple'), 3)
    assert row.n_parameters == sum(p.numel() for p in model.parameters())
    assert math.isnan(row.top5_accuracy)  # of 3 classes
    assert row.fit_seconds > 0 and row.images_per_second > 0 and row.peak_memory_mb > 100
    assert row.torch == torch.__version__.split('+')[0]
    assert len(row.git_commit) in (0, 40) and row.started.endswith('Z') and len(row.data_fingerprint) == 16

    import pandas as pd
    curve = pd.read_csv(tmp_path / 'results' / 'curves' / f'{row.run_id}.csv')
    assert list(curve) == list(runlog.CURVE) and curve.epoch.tolist() == [1, 2]
    assert curve.accuracy.iloc[-1] == row.accuracy and curve.accuracy.max() == row.max_accuracy
    assert row.max_accuracy_epoch == curve.epoch[curve.accuracy.idxmax()]
    assert row.images_per_second > 2 * 28 / row.fit_seconds  # 7 batches of 4 an epoch; the fit validates, too
    saved = np.load(tmp_path / 'results' / 'predictions' / f'{row.run_id}.npz')
    assert (saved['logits'].argmax(1) == saved['targets']).mean() == pytest.approx(row.accuracy, abs=1e-6)
    assert saved['logits'].shape == (6, 3)
    assert [f.split('/')[1] for f in saved['files']] == [CLASSES[t] for t in saved['targets']]
    log_probs = torch.log_softmax(torch.tensor(saved['logits']), 1)
    loss = -(0.9 * log_probs[range(6), saved['targets']] + 0.1 * log_probs.mean(1)).mean()
    assert loss.item() == pytest.approx(row.valid_loss, abs=1e-5)


@pytest.mark.slow(4)
def test_the_same_seed_gives_the_same_run_and_another_seed_another(tree, command, tmp_path):
    for seed, workers in [(0, 0), (0, 2), (1, 0)]:
        assert command('--data', tree, '--sa', '--mixup', 0.4, *TINY, '--seed', seed, '--workers', workers)[0] == 0
    loss = record(tmp_path).valid_loss
    assert loss[0] == loss[1] != loss[2]


@pytest.mark.slow(3)
def test_runs_are_those_of_single_commands(tree, command, tmp_path):
    assert command('--data', tree, *TINY, '--runs', 2, '--seed', 3)[0] == 0
    assert command('--data', tree, *TINY, '--seed', 4)[0] == 0
    df = record(tmp_path)
    assert df.seed.tolist() == [3, 4, 4] and df.valid_loss[1] == df.valid_loss[2] != df.valid_loss[0]
    assert df.run_id.is_unique


@pytest.mark.full_width
@pytest.mark.slow(26)
def test_the_whole_way_on_digits(command, tmp_path):
    code, _, err = command('--dataset', 'digits', '--size', 32, '--epochs', 3, '--arch', 'xresnet18', '--sa')
    assert code == 0, err
    row = record(tmp_path).iloc[0]
    assert (row.n_train, row.n_val, row.split) == (1437, 360, 'v2') and row.accuracy > 0.4  # chance is 0.1


@pytest.mark.slow(3)
@pytest.mark.parametrize('options', [
    '--opt rms', '--opt sgd', '--opt ranger --schedule flat_cos --beta 20', '--sh 0.3 --act mish --pool max',
    '--opt lookahead --arch xse_resnext18 --sa', '--opt lamb --arch xresnet18_deep --sa-at 3,6.0 --sa',
    '--sa sagan --sa-at 1,2.0',
    '--stem 32-32-64 --sa simple_sym', '--split v2 --sa simple_out', '--loader device --fused 0 --channels-last 0',
])
def test_every_kind_of_run_ends_ok(options, tree, command, tmp_path):
    code, _, err = command('--data', tree, *TINY, *options.split())
    assert code == 0 and record(tmp_path).status.tolist() == ['ok'], err


def test_a_run_that_fails_in_a_batch_leaves_the_next_one_alone(tree, command, tmp_path, monkeypatch):
    monkeypatch.setattr(training.machine, 'has_bf16', lambda: True)
    argv = ['--data', tree, *TINY, '--sa', '--precision', 'bf16']
    assert command(*argv)[0] == 0
    forward = ATTENTION['simple'].forward
    def breaks(self, x): raise RuntimeError('out of memory')
    monkeypatch.setattr(ATTENTION['simple'], 'forward', breaks)
    with pytest.raises(RuntimeError, match='out of memory'): command(*argv)
    monkeypatch.setattr(ATTENTION['simple'], 'forward', forward)
    assert not torch.is_autocast_enabled('cpu') and command(*argv)[0] == 0
    df = record(tmp_path)
    assert df.status.tolist() == ['ok', 'failed', 'ok'] and df.valid_loss[0] == df.valid_loss[2]


def test_a_results_folder_that_is_none_is_told_before_training(tree, tmp_path, capfd):
    (tmp_path / 'file').touch()
    for more in ([], ['--lrfinder']):
        code = train_imagenette.main([*map(str, ['--data', tree, *TINY, '--results', tmp_path / 'file', *more])])
        out, err = capfd.readouterr()
        assert code == 2 and not out and err.count('\n') == 1 and 'no row can be written' in err


def test_dump_prints_shapes_and_parameters_and_trains_nothing(command, tmp_path):
    code, out, _ = command('--dump', '--sa', '--size', 128, '--arch', 'xresnet50')
    assert code == 0 and not (tmp_path / 'results').exists()
    line = next(x for x in out.splitlines() if x.startswith('stage1.2.attention '))
    assert '(1, 256, 32, 32)' in line and '65,537' in line  # 256 * 256 and gamma
    model = training.run.get_model(Config(attention='simple'), 10)
    assert f'{sum(p.numel() for p in model.parameters()):,} parameters' in out


def test_a_model_that_this_code_cannot_load_gets_a_line(tmp_path):
    model = training.run.get_model(Config(arch='xresnet18'), 2)
    def load(file, **saved):
        saved = dict(config=asdict(Config(arch='xresnet18')), vocab=['a', 'b'], model=model.state_dict()) | saved
        torch.save(saved, tmp_path / file)
        training.run.load_model(tmp_path / file)
    load('good.pt')
    with pytest.raises(UsageError, match=r'newer\.pt: was saved by another version of this code .*cutmix'):
        load('newer.pt', config=asdict(Config(arch='xresnet18')) | dict(cutmix=1.))
    (tmp_path / 'mine.py').write_text('from layers import ResidualConv as Mine')
    of_file = asdict(Config(arch='xresnet18', attention=f'{tmp_path}/mine.py:Mine'))
    (tmp_path / 'mine.py').rename(tmp_path / 'elsewhere.py')
    with pytest.raises(UsageError, match=r'gone\.pt: its layer was in .*/mine\.py, put it there or in the working'):
        load('gone.pt', config=of_file)
    with pytest.raises(UsageError, match=r'other\.pt: its weights do not fit xresnet18 .*size mismatch'):
        load('other.pt', vocab=['a', 'b', 'c'])


def test_dump_of_what_a_cpu_could_not_train(command, tmp_path):
    "A layer with a module that gives a tuple; flags that need a GPU."
    file = tmp_path / 'recurrent.py'
    file.write_text('import torch\n'
                    'class Recurrent(torch.nn.Module):\n'
                    '    def __init__(self, n): super().__init__(); self.lstm = torch.nn.LSTM(n, n, batch_first=True)\n'
                    '    def forward(self, x): return x + self.lstm(x.flatten(2).mT)[0].mT.view_as(x)\n')
    code, out, err = command('--dump', '--sa', f'{file}:Recurrent', *'--size 32 --arch xresnet18 --cuda-graphs'.split())
    assert code == 0 and re.search(r'attention.lstm +LSTM +\d', out), err


def test_dump_has_a_head_for_the_classes_of_the_folder_and_needs_no_device(tree, command):
    code, out, _ = command('--dump', '--data', tree, '--size', 32, '--arch', 'xresnet18', '--precision', 'fp16')
    assert code == 0 and '(1, 3)' in next(x for x in out.splitlines() if x.startswith('head '))


@pytest.mark.slow(6)
def test_a_reader_that_closes_the_pipe_is_no_fault():
    # more than a pipe holds
    argv = [sys.executable, REPO / 'train_imagenette.py', '--dump', '--arch', 'xresnet152', '--size', '32']
    process = subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith('module')
    process.stdout.close()
    assert process.stderr.read() == '' and process.wait() == 141


@pytest.mark.slow(4)
def test_lrfinder_suggests_and_plots_each_setting_in_its_own_file(tree, command, tmp_path):
    given = '--opt', 'sgd', '--stem', '32-32-64', '--wd', 0.01, '--act', 'mish'
    code, out, err = command('--data', tree, *TINY, '--lrfinder', *given)
    assert code == 0, err
    file = tmp_path / 'results' / 'lr_find' / 'custom-32-xresnet18-bs6-splitv1-stem32-32-64-actmish-epochs1-optsgd.png'
    assert 'suggested learning rate' in out and file.read_bytes()[:4] == b'\x89PNG'
    assert not (tmp_path / 'results' / 'runs.csv').exists()


def test_a_file_to_save_to_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path / 'old.pt').write_text('old')
    for name in ('old.pt', 'new.pt'): config('--save', tmp_path / name)
    assert (tmp_path / 'old.pt').read_text() == 'old' and not (tmp_path / 'new.pt').exists()


def test_a_saved_model_predicts_the_same(tree, command, tmp_path):
    assert command('--data', tree, *TINY, '--sa', '--save', tmp_path / 'model.pt')[0] == 0
    model, vocab = training.run.load_model(tmp_path / 'model.pt')
    assert vocab == CLASSES and not model.training
    dls = training.run.get_dls(training.run.settle(config('--data', tree, *TINY), torch.device('cpu')))
    row = record(tmp_path).iloc[0]
    saved = np.load(tmp_path / 'results' / 'predictions' / f'{row.run_id}.npz')
    with torch.no_grad(): logits = torch.cat([model(x) for x, _ in dls.valid])
    assert torch.allclose(logits, torch.tensor(saved['logits']), atol=1e-4)


@pytest.mark.parametrize('flags, words', [
    (['--seed', '5'], '--seed: the seeds are 0 to 2; '), (['--seed=5'], '--seed: the seeds are 0 to 2; '),
    (['--runs', '2'], '--runs: N, before the flags, says '), (['--run=2'], '--run: N, before the flags, says '),
])
def test_repeat_has_seeds_and_runs_of_its_own(flags, words):
    argv = ['bash', REPO / 'scripts' / 'repeat.sh', '3', '--woof', '--', '--woof', '--sa', *flags]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f'repeat.sh: {words}')


@pytest.mark.parametrize('python, codes, calls, code', [
    ('PYTHON', {}, 4, 0), ('.venv/bin/python', {}, 4, 0),
    ('PYTHON', {'--woof --seed 0': 1}, 4, 1), ('PYTHON', {'--woof --sa --seed 0': 137}, 4, 1),
    ('PYTHON', {'--woof --seed 0': 2}, 1, 2), ('PYTHON', {'--woof --sa --seed 0': 143}, 2, 143),
])
def test_repeat_interleaves_the_arms_and_goes_on_after_a_run_that_fails(python, codes, calls, code, tmp_path):
    script, fake, log = (tmp_path / name for name in ('scripts/repeat.sh', '.venv/bin/python', 'log'))
    for file in (script, fake): file.parent.mkdir(parents=True)
    shutil.copy(REPO / 'scripts' / 'repeat.sh', script)
    cases = ''.join(f'"{flags}") exit {n};; ' for flags, n in codes.items())
    fake.write_text(f'#!/bin/sh\nshift\necho "$*" >> {log}\ncase "$*" in {cases} *) exit 0;; esac\n')
    fake.chmod(0o755)
    if python == 'PYTHON': fake = fake.rename(tmp_path / 'other')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHON'} | ({'PYTHON': str(fake)} if python == 'PYTHON' else {})
    argv = ['bash', str(script), '2', '--woof', '--', '--woof', '--sa']
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == code and ('1 runs failed' in done.stderr) == (code == 1)
    in_turns = [f'{arm} --seed {seed}' for seed in (0, 1) for arm in ('--woof', '--woof --sa')]
    assert log.read_text().splitlines() == in_turns[:calls]


# --- recipe ---

def learner(tree, *argv, device='cpu'):
    cfg, dls, model = training.run.prepare(config('--data', tree, *TINY, *argv), torch.device(device))
    return cfg, training.run.get_learner(cfg, dls, model)


def hyperparameters(tree, *argv):
    "What the optimizer used in each step: {name: array}."
    cfg, learn = learner(tree, *argv)
    training.run.fit(learn, cfg)
    return {k: np.array(v) for k, v in learn.recorder.hps.items()}, learn


def test_bf16_is_for_cpus_that_have_it(tree, command, tmp_path, monkeypatch):
    for flags, has in [('fpu avx2', False), ('fpu avx512_bf16', True), ('amx_bf16 amx_tile', True)]:
        (tmp_path / 'cpuinfo').write_text(f'processor : 0\nflags\t\t: {flags}\n')
        assert training.machine.has_bf16(tmp_path / 'cpuinfo') == has
    for has, code in [(False, 2), (True, 0)]:
        monkeypatch.setattr(training.machine, 'has_bf16', lambda has=has: has)
        assert command('--data', tree, *TINY, '--precision', 'bf16', '--sa')[0] == code
    assert record(tmp_path).precision.tolist() == ['bf16']


def test_one_cycle_is_the_sources(tree):
    hps, learn = hyperparameters(tree, '--epochs', 4)
    lr, mom = hps['lr'], hps['mom']
    # lr/10 up to lr in 30 %
    assert len(lr) == 20 and lr[0] == pytest.approx(3e-4) and lr.argmax() == 6 and lr.max() == pytest.approx(3e-3)
    assert lr[-1] < 1e-4 and mom[0] == pytest.approx(0.95) and mom[6] == pytest.approx(0.85) and mom[-1] > 0.94
    hyper = learn.opt.hypers[0]
    assert (hyper['sqr_mom'], hyper['eps'], hyper['wd']) == (0.99, 1e-6, 1e-2) and learn.loss_func.eps == 0.1


def test_flat_cos_keeps_the_learning_rate_for_three_quarters(tree):
    lr = hyperparameters(tree, '--epochs', 4, '--schedule', 'flat_cos')[0]['lr']
    assert (lr[:15] == 3e-3).all() and lr[-1] < 1e-3


def test_ann_start_is_where_flat_cos_begins_to_fall(tree):
    lr = hyperparameters(tree, '--epochs', 4, '--schedule', 'flat_cos', '--ann-start', 0.5)[0]['lr']
    assert (lr[:11] == 3e-3).all() and lr[11] < 3e-3 and lr[-1] < 2e-4
    # 20 steps, half of the way down
    assert 3e-3 * (1 + math.cos(math.pi * 5 / 10)) / 2 == pytest.approx(lr[15], rel=1e-3)


@pytest.mark.parametrize('fused', [0, 1])
def test_weight_decay_spares_norms_and_biases(tree, fused):
    _, learn = learner(tree, '--sa', '--fused', fused)
    learn.fit(0)
    names = {p: n for n, p in learn.model.named_parameters()}
    decay = {names[p]: hyper['wd'] for p, _, state, hyper in learn.opt.all_params()
             if state.get('do_wd', True) and hyper['wd']}
    norms = {f'{n}.{k}' for n, m in learn.model.named_modules()
             if isinstance(m, torch.nn.BatchNorm2d) for k in ('weight', 'bias')}
    assert names.values() - decay.keys() == norms | {'head.bias'} and set(decay.values()) == {1e-2}


@pytest.mark.parametrize('fused', [0, 1])
def test_one_step_is_decoupled_adam(tree, fused):
    "One batch through the Learner against torch's AdamW with weight decay on the same groups."
    cfg, learn = learner(tree, '--sa', '--fused', fused)
    model = copy.deepcopy(learn.model).train()
    batch = next(iter(learn.dls.train))
    with learn.no_logging(): learn.fit(1, cfg.lr, cbs=ShortEpochCallback(pct=0., short_valid=False))
    torch.nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1).backward()
    groups = {True: [], False: []}
    for p in model.parameters(): groups[p.ndim > 1 or p.shape == (1,)].append(p)
    torch.optim.AdamW([dict(params=groups[True], weight_decay=cfg.wd), dict(params=groups[False], weight_decay=0)],
                      lr=cfg.lr, betas=(cfg.mom, cfg.sqrmom), eps=cfg.eps).step()
    for (name, p), q in zip(learn.model.named_parameters(), model.parameters()):
        assert torch.allclose(p, q, atol=1e-5), name


def test_the_epsilon_of_rms_is_passed_on():
    p = torch.nn.Parameter(torch.tensor([1.]))
    p.grad = torch.tensor([0.1])
    get_opt_func(Config(opt='rms', mom=0, eps=0.5))([p], lr=0.2).step()
    assert p.item() == pytest.approx(1 - 0.2 * 0.1 / ((0.01 * 0.1**2)**0.5 + 0.5))  # the squares' average starts at 0


@pytest.mark.parametrize('opt', ['ranger', 'radam'])
def test_beta_makes_the_steps_of_sadam(opt):
    "The denominator of a step becomes softplus(beta v) / beta: beta 0 is without it, and a large one nearly so."
    moved = []
    for beta in (0., 1e3, 2.):
        p = torch.nn.Parameter(torch.tensor([1.]))
        optimizer = get_opt_func(Config(opt=opt, beta=beta, sqrmom=0.9, eps=1e-3))([p], lr=0.01)
        for _ in range(20):
            p.grad = torch.tensor([0.1])
            optimizer.step()
        moved.append(1 - p.item())
    assert moved[0] == pytest.approx(moved[1], rel=0.02) and moved[2] < 0.7 * moved[0]


def test_fused_adam_is_fastais_step_for_step(tree):
    "The same gradients and the same cycle of learning rate and momentum to both: the weights agree to 1e-6."
    learners = [learner(tree, '--sa', '--fused', fused)[1] for fused in (0, 1)]
    for learn in learners: learn.fit(0)  # makes the optimizer
    pairs = list(zip(*(learn.model.parameters() for learn in learners)))
    assert isinstance(learners[1].opt, OptimWrapper) and not isinstance(learners[0].opt, OptimWrapper)
    for step in range(12):
        for p, q in pairs:
            p.grad = torch.randn_like(p) * 10.**(step % 3 - 2)
            q.grad = p.grad.clone()
        for learn in learners:
            learn.opt.set_hypers(lr=1e-3 * (1 + step % 4), mom=0.95 - 0.02 * (step % 5))
            learn.opt.step()
        assert max((p - q).abs().max().item() for p, q in pairs) < 1e-6


def test_the_smoothed_loss_is_fastais(tree):
    learn = learner(tree)[1]
    ours, theirs = SmoothLoss(), AvgSmoothLoss()
    for value in (3., 2., 2.5):
        learn.loss = torch.tensor(value)
        for loss in (ours, theirs): loss.accumulate(learn)
        assert ours.value == theirs.value


def test_memory_format_is_that_of_the_flag(tree):
    for last in (0, 1):
        weight = learner(tree, '--channels-last', last)[1].model.stem1[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == bool(last)


@pytest.mark.slow(9)
@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc')
def test_freed_memory_is_kept(tree):
    code = ('import resource, sys, torch\n'
            'from training import learner\n'
            'learner.keep_memory(sys.argv[1] == "1")\n'
            'def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
            'for _ in range(20): torch.ones(2**24)\n'  # 64 MiB, 16,384 pages
            'before = faults()\n'
            'for _ in range(20): torch.ones(2**24)\n'
            'print(faults() - before)')
    runs = [subprocess.run([sys.executable, '-c', code, keep], cwd=REPO, capture_output=True, text=True)
            for keep in '01']
    faults = [int(done.stdout) for done in runs]
    if faults[0] < 10_000: pytest.skip('huge pages, or another allocator: there are no page faults to save')
    assert faults[1] < faults[0] / 2


@pytest.mark.slow(4)
def test_compiled_passes_train_and_are_compiled_once_for_many_runs(tree, command, tmp_path, monkeypatch):
    # the same graphs, without a C++ compiler
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager'))
    argv = ['--data', tree, '--sa', *TINY]
    training.machine.check_compiler('cpu')  # compiles a function of its own, once
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert command(*argv, '--compile', '--runs', 2)[0] == 0
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1
    assert command(*argv)[0] == 0
    loss = record(tmp_path).valid_loss
    assert loss[0] == pytest.approx(loss[2], abs=0.02) and loss[0] != loss[1]


@pytest.mark.parametrize('options', ['', '--fused 0', '--opt sgd', '--opt rms', '--opt ranger'])
def test_compiled_passes_meet_no_gradient_of_the_step_before(options, tree, monkeypatch):
    "fastai's optimizers zero the gradients in place: in the memory of a CUDA graph, which then may not be replayed."
    cfg, learn = learner(tree, *options.split())
    met = []
    def compiled(model, mode):
        outer = torch.nn.Sequential(model)
        outer.register_forward_pre_hook(lambda *_: met.extend(p.grad for p in model.parameters()))
        return outer
    monkeypatch.setattr(torch, 'compile', compiled)
    plain = learner(tree, *options.split())[1]
    for each, cbs in ((plain, []), (learn, [Compile()])): each.fit(2, cfg.lr, cbs=cbs)
    assert met and all(grad is None for grad in met)
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), learn.model.parameters()))


@pytest.mark.parametrize('fused', [0, 1])
def test_recorded_passes_train_as_plain_ones(fused, tree, monkeypatch):
    "A stand-in does to the network what recording does: rounds to warm up, then another `forward`, in training alone."
    def record_passes(graphed, sample):
        for _ in range(3): graphed(*sample).sum().backward()
        forward = graphed.forward
        def replay(x):
            replayed.append(graphed.training)
            return forward(x)
        graphed.forward = replay
    replayed = []
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', record_passes)
    learners = []
    for cbs in ([], [Graphs(32)]):
        _, learn = learner(tree, '--sa', '--epochs', 2, '--fused', fused)
        learn.add_cbs(cbs)
        with learn.no_bar(): training.run.fit(learn, config('--epochs', 2))
        learners.append(learn)
    a, b = (learn.model.state_dict() for learn in learners)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert replayed == [True] * 2 * len(learners[0].dls.train) and 'forward' not in learners[1].model.__dict__


def test_the_forward_pass_alone_is_recorded_under_autocast(tree, monkeypatch):
    "The small products of the layer are float32; in a backward pass under autocast they would overflow in float16."
    def record_passes(graphed, sample):
        seen.append((torch.is_autocast_enabled('cpu'), graphed(*sample).dtype))
    seen = []
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', record_passes)
    for precision in ('bf16', 'fp32'):
        _, learn = learner(tree, '--sa', '--precision', precision)
        learn.fit(1, cbs=Graphs(32))
    assert seen == [(False, torch.bfloat16), (False, torch.float32)]


def test_what_fails_while_passes_are_recorded_is_the_reason_that_is_said(tree, monkeypatch):
    def fails(graphed, sample):
        try: raise RuntimeError('the first reason')
        finally: raise RuntimeError('operation failed due to a previous error during capture')
    def stops(graphed, sample):
        try: raise KeyboardInterrupt
        finally: raise RuntimeError('operation failed due to a previous error during capture')
    def wraps(graphed, sample):
        try: raise KeyError('conv1')
        except KeyError: raise RuntimeError('not permitted')  # noqa: B904
    for fault, error, words in ((fails, UsageError, 'the first reason'), (stops, KeyboardInterrupt, ''),
                                (wraps, UsageError, 'not permitted')):
        monkeypatch.setattr(torch.cuda, 'make_graphed_callables', fault)
        with pytest.raises(error, match=words): learner(tree)[1].fit(1, cbs=Graphs(32))


def test_the_peak_of_the_memory_is_measured_from_before_the_passes_are_recorded(tree, monkeypatch):
    from training import measure
    calls = []
    monkeypatch.setattr(measure, 'reset_peak_memory', lambda device: calls.append('reset'))
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', lambda *args: calls.append('record'))
    cfg, dls, model = training.run.prepare(config('--data', tree, *TINY), torch.device('cpu'))
    learn = training.run.get_learner(cfg, dls, model, [measure.Measure(lambda curve: None)])
    learn.fit(1, cbs=Graphs(32))
    assert calls == ['reset', 'record']


def test_a_network_that_cannot_be_recorded_is_one_line(tree, monkeypatch):
    def fails(graphed, sample): raise RuntimeError('operation not permitted when stream is capturing')
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', fails)
    _, learn = learner(tree)
    with pytest.raises(UsageError, match=r'cannot be recorded .*capturing.*--cuda-graphs 0'):
        learn.fit(1, cbs=Graphs(32))


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
@pytest.mark.parametrize('argv, message', [
    (['--cuda-graphs'], 'needs a CUDA device'), (['--cuda-graphs', '--compile'], 'one of the two'),
])
def test_cuda_graphs_are_refused_where_there_can_be_none(argv, message, tree, command):
    code, _, err = command('--data', tree, *TINY, *argv)
    assert code == 2 and message in err and err.count('\n') == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_cuda_graphs_compute_what_plain_passes_do(precision, command, tmp_path):
    argv = ['--dataset', 'digits', '--size', 32, '--epochs', 2, '--arch', 'xresnet18', '--sa', '--precision', precision]
    for graphs in (0, 1): assert command(*argv, '--cuda-graphs', graphs)[0] == 0
    df = record(tmp_path)
    assert df.train_loss[0] == pytest.approx(df.train_loss[1], rel=0.02) and df.cuda_graphs.tolist() == [0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_a_large_loss_scale_overflows_in_no_recorded_layer():
    device = torch.device('cuda', 0)
    layer = SimpleSelfAttention(64)
    layer.gamma.data.fill_(0.1)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), torch.nn.BatchNorm2d(64), layer).to(device)
    graphs, plain = Graphs(32), copy.deepcopy(model)
    graphs.learn = SimpleNamespace(model=model, precision=SimpleNamespace(amp_mode=AMPMode.FP16),
                                   dls=SimpleNamespace(device=device, train=SimpleNamespace(bs=4)))
    graphs.before_fit()
    x = torch.randn(4, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    for network in (plain, graphs.graphed):
        with torch.autocast('cuda', torch.float16, cache_enabled=False): y = network(x)
        g = torch.ones_like(y) / y.numel()**0.5
        y.backward(2**13 * g)
        assert all(bool(p.grad.isfinite().all()) for p in network.parameters())


def test_unknown_values_are_refused_by_config_itself():
    with pytest.raises(UsageError, match='not an integer'): Config(epochs=1.5)
    with pytest.raises(UsageError, match='not a text'): Config(meta=3)
    assert Config(lr=1) == Config(lr=1.) and isinstance(Config(lr=1).lr, float)


@pytest.mark.parametrize('middle, high, low', [
    (0, 0.05, 0), (0.5, 0.55, 0.45), (0.95, 0.975, 0.9), (0.99, 0.995, 0.94),
])
def test_the_cycle_of_the_momentum_stays_within_0_and_1(middle, high, low, tree):
    mom = hyperparameters(tree, '--epochs', 4, '--mom', middle)[0]['mom']
    assert mom[0] == pytest.approx(high) and mom.max() < 1 and mom.min() == pytest.approx(low)


def test_momentum_is_constant_under_flat_cos(tree):
    assert {h['mom'] for h in hyperparameters(tree, '--mom', 0.95, '--schedule', 'flat_cos')[1].opt.hypers} == {0.95}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('options', ['--compile', '--cuda-graphs', '--cuda-graphs --fused 0 --sa --mixup 0.2',
                                     '--mixup 0.2', '--fused 0', '--loader workers', '--precision bf16', '--sa sagan'])
def test_cuda_two_runs_in_a_process_of_every_kind(options, command, tmp_path):
    digits = ['--dataset', 'digits', '--size', 32, '--epochs', 2, '--arch', 'xresnet18', '--runs', 2]
    assert command(*digits, *options.split())[0] == 0
    df = record(tmp_path)
    assert df.status.tolist() == ['ok', 'ok'] and df.loader[0] == ('workers' if 'workers' in options else 'device')
    assert df.accuracy.min() > 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_diverges_and_finds_a_learning_rate(command, tmp_path):
    digits = ['--dataset', 'digits', '--size', 32, '--epochs', 2, '--arch', 'xresnet18']
    assert command(*digits, '--lrfinder')[0] == 0 and list((tmp_path / 'results' / 'lr_find').iterdir())
    assert command(*digits, '--opt', 'sgd', '--lr', 1e30)[0] == 0 and record(tmp_path).status.tolist() == ['diverged']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_runs_in_fp16(command, tmp_path):
    code, _, _ = command('--dataset', 'digits', '--size', 32, '--epochs', 3, '--arch', 'xresnet18', '--sa')
    row = record(tmp_path).iloc[0]
    assert code == 0 and row.precision == 'fp16' and row.status == 'ok' and row.accuracy > 0.4
