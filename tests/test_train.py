"The command, from its Config to its row: what a run leaves, and what `--runs`, `--save` and the like do."
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import CLASSES, REPO, TINY, parsed, record

import runlog
import train_imagenette
import training.machine
import training.run
from command import UsageError
from experiments import Config
from layers import ATTENTION


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
    for name in ('old.pt', 'new.pt'): parsed('--save', tmp_path / name)
    assert (tmp_path / 'old.pt').read_text() == 'old' and not (tmp_path / 'new.pt').exists()


def test_a_saved_model_predicts_the_same(tree, command, tmp_path):
    assert command('--data', tree, *TINY, '--sa', '--save', tmp_path / 'model.pt')[0] == 0
    model, vocab = training.run.load_model(tmp_path / 'model.pt')
    assert vocab == CLASSES and not model.training
    dls = training.run.get_dls(training.run.settle(parsed('--data', tree, *TINY), torch.device('cpu')))
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
    ('PYTHON', {'--woof --seed 0': 75}, 4, 75), ('PYTHON', {'--woof --seed 0': 75, '--woof --seed 1': 1}, 4, 1),
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
