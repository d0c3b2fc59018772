"""Runs that are stopped and continued: to the bit the run that was never stopped."""
import contextlib
import copy
import os
import shutil
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPO, TIMES

import runlog
import training.machine
import training.measure
import training.run
from command import Busy, UsageError
from experiments import Config
from training import checkpoint
from training.learner import get_opt_func

TINY = ('--split', 'v1', '--size', 32, '--bs', 6, '--arch', 'xresnet18', '--workers', 0, '--sa')


def record(results): return runlog.load(results / 'runs.csv')


def assert_same_run(a, b):
    "Rows, curves and predictions of two results folders of one run each are equal but for ids and times."
    rows = [record(results).iloc[0] for results in (a, b)]
    assert rows[0].drop(TIMES).equals(rows[1].drop(TIMES)), rows
    curves = [pd.read_csv(r / 'curves' / f'{row.run_id}.csv').drop(columns='seconds') for r, row in zip((a, b), rows)]
    assert curves[0].equals(curves[1])
    first, second = (np.load(r / 'predictions' / f'{row.run_id}.npz') for r, row in zip((a, b), rows))
    assert (first['logits'] == second['logits']).all() and (first['files'] == second['files']).all()


@pytest.fixture
def stopped(command, monkeypatch, tmp_path):
    "Runs the command and stops it at a batch of an epoch, both from 0; the results stay in tmp_path/results."
    def run(*argv, epoch, batch=1):
        fit = training.run.fit

        def breaks(learn, cfg):
            def raise_(self):
                if (self.epoch, self.iter) == (epoch, batch) and self.training: raise KeyboardInterrupt
            monkeypatch.setattr(training.measure.Heed, 'before_batch', raise_)
            fit(learn, cfg)
        heed = training.measure.Heed.before_batch
        monkeypatch.setattr(training.run, 'fit', breaks)
        code, out, err = command(*argv)
        assert code == 130, err
        monkeypatch.setattr(training.run, 'fit', fit)
        monkeypatch.setattr(training.measure.Heed, 'before_batch', heed)
        return out
    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason='to the bit on a CPU')
@pytest.mark.parametrize('options', ['', *[pytest.param(options, marks=pytest.mark.slow(7)) for options in (
    '--mixup 0.4 --loader device', '--opt ranger --schedule flat_cos', '--opt sgd --sh 0.3', '--opt rms', '--fused 0',
    '--precision bf16', '--sa sagan --sa-at 1,2.0 --channels-last 0', '--sa simple_sym',
)]])
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(options, tree, command, stopped, tmp_path, monkeypatch):
    monkeypatch.setattr(training.machine, 'has_bf16', lambda: True)
    argv = ['--data', tree, *TINY, '--epochs', 3, *options.split(), '--checkpoint-every', 1]
    assert command(*argv)[0] == 0
    (tmp_path / 'results').rename(tmp_path / 'whole')
    out = stopped(*argv, epoch=1)
    run_id = record(tmp_path / 'results').run_id[0]
    assert 'interrupted after 1 of 3 epochs' in out and '--resume continues from it' in out
    code, out, err = command(*argv, '--resume')
    assert code == 0 and f'{run_id}: continues after epoch 1 of 3' in out, err
    assert_same_run(tmp_path / 'whole', tmp_path / 'results')
    row = record(tmp_path / 'results').iloc[0]
    assert (row.run_id, row.resumed, row.epochs_done) == (run_id, 1, 3)
    assert not list((tmp_path / 'results' / 'checkpoints').iterdir())
    rows = list(pd.read_csv(tmp_path / 'results' / 'runs.csv').status)
    assert rows == ['interrupted', 'ok']  # both ends stay


@pytest.mark.parametrize('options', [{}, dict(fused=0), *(dict(opt=opt) for opt in (
    'sgd', 'rms', 'ranger', 'radam', 'lamb', 'lookahead'))])
def test_the_optimizers_state_takes_the_memory_format_it_is_loaded_into(options):
    "The same gradients move two equal networks alike, one channels last, one continued from the state of the first."
    cfg = Config(**options)
    conv = torch.nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    opts = [get_opt_func(cfg)([list(conv.parameters())], lr=0.1)]
    def step():
        grads = [torch.randn_like(p) for p in nets[0].parameters()]
        for net, opt in zip(nets, opts):
            for p, grad in zip(net.parameters(), grads): p.grad = torch.empty_like(p).copy_(grad)
            opt.step()
    nets = [conv]
    for _ in range(3): step()
    nets.append(torch.nn.Conv2d(8, 8, 3))
    nets[1].load_state_dict(conv.state_dict())
    opts.append(get_opt_func(cfg)([list(nets[1].parameters())], lr=0.1))
    checkpoint.load_optimizer_state(opts[1], copy.deepcopy(checkpoint.optimizer_state(opts[0])))
    assert nets[1].weight.is_contiguous() and not conv.weight.is_contiguous()
    for _ in range(6): step()  # ranger moves its slow weights every sixth
    for p, q in zip(*(net.parameters() for net in nets)): assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('options', ['', '--fused 0', '--loader workers'])
def test_cuda_a_stopped_run_goes_on_as_a_repeated_run_would(options, command, stopped, tmp_path):
    argv = ['--dataset', 'digits', '--size', 32, '--arch', 'xresnet18', '--sa', '--epochs', 4, '--checkpoint-every', 1]
    argv += options.split()
    for _ in range(2): assert command(*argv)[0] == 0
    (tmp_path / 'results').rename(tmp_path / 'whole')
    stopped(*argv, epoch=2)
    assert command(*argv, '--resume')[0] == 0
    whole, row = record(tmp_path / 'whole'), record(tmp_path / 'results').iloc[0]
    spread = np.ptp(whole.valid_loss)
    assert row.resumed == 1 and abs(row.valid_loss - whole.valid_loss.mean()) < 0.05 + 3 * spread


@pytest.mark.slow(2)
def test_short_runs_keep_no_checkpoint_unless_asked(tree, command, stopped, tmp_path, monkeypatch):
    argv = ['--data', tree, *TINY, '--epochs', 3]
    every = '--checkpoint-every'
    for options, kept in [([], 0), ([every, 2], 0), ([every, 1], 1), (['--no-checkpoint'], 0)]:
        stopped(*argv, *options, epoch=1)
        assert len(list(tmp_path.glob('results/checkpoints/*.pt'))) == kept
        shutil.rmtree(tmp_path / 'results')
    monkeypatch.setattr(checkpoint, 'SHORT_SECONDS', 0)
    stopped(*argv, epoch=1)
    assert len(list(tmp_path.glob('results/checkpoints/*.pt'))) == 1


@pytest.mark.slow(4)
def test_resume_skips_what_is_recorded_and_starts_anew_where_nothing_is(tree, command, stopped, tmp_path):
    argv = ['--data', tree, *TINY, '--epochs', 2, '--checkpoint-every', 1]
    assert command(*argv)[0] == 0
    stopped(*argv, '--seed', 1, epoch=1)
    out = command(*argv, '--resume', '--lr', 1e-3)[1]  # another run
    assert 'there is no checkpoint of this run: it starts from the beginning' in out
    code, out, _ = command(*argv, '--resume', '--runs', 3)
    df = record(tmp_path / 'results')
    assert code == 0 and out.count('(recorded already)') == 1 and out.count('continues after epoch 1 of 2') == 1
    assert set(df.status) == {'ok'}
    assert sorted(zip(df.seed, df.lr, df.resumed)) == [(0, 1e-3, 0), (0, 3e-3, 0), (1, 3e-3, 1), (2, 3e-3, 0)]


def test_a_run_stopped_twice_in_an_epoch_has_a_row_for_each_end(tree, command, stopped, tmp_path):
    argv = ['--data', tree, *TINY, '--epochs', 3, '--checkpoint-every', 1]
    stopped(*argv, epoch=1)
    for batch in (0, 2): stopped(*argv, '--resume', epoch=1, batch=batch)
    assert command(*argv, '--resume')[0] == 0
    rows = pd.read_csv(tmp_path / 'results' / 'runs.csv')
    assert rows.run_id.nunique() == 1 and rows.resumed.tolist() == [0, 1, 2, 3]
    assert rows.status.tolist() == ['interrupted'] * 3 + ['ok']
    assert rows.accuracy.notna().tolist() == [False] * 3 + [True]


def test_a_run_that_was_killed_twice_was_continued_twice(tree, command, stopped, tmp_path):
    argv = ['--data', tree, *TINY, '--epochs', 3, '--checkpoint-every', 1]
    for epoch in (1, 2):
        stopped(*argv, '--resume', epoch=epoch)
        (tmp_path / 'results' / 'runs.csv').unlink()  # kill -9 leaves no row
    assert command(*argv, '--resume')[0] == 0 and record(tmp_path / 'results').resumed.tolist() == [2]


def test_what_has_changed_since_the_checkpoint_is_printed(tree, command, stopped, tmp_path):
    argv = ['--data', tree, *TINY, '--epochs', 3, '--checkpoint-every', 1]
    stopped(*argv, epoch=1)
    code, out, err = command(*argv, '--resume', '--channels-last', 0, '--loader', 'device')
    assert code == 0 and 'continues after epoch 1' in out
    assert 'its epochs so far had loader workers, channels_last 1; the row' in err
    assert record(tmp_path / 'results').channels_last.tolist() == [0]


def test_a_run_whose_predictions_cannot_be_had_fails_has_its_row_and_goes_on(tree, command, tmp_path, monkeypatch):
    def breaks(self): raise RuntimeError('the other process is gone')
    argv = ['--data', tree, *TINY, '--epochs', 2, '--checkpoint-every', 1]
    with monkeypatch.context() as m:
        m.setattr(training.measure.Measure, 'predictions', breaks)
        with pytest.raises(RuntimeError, match='is gone'): command(*argv)
    assert record(tmp_path / 'results').status.tolist() == ['failed']
    assert command(*argv, '--resume')[0] == 0
    df = record(tmp_path / 'results')
    assert (df.status.tolist(), df.resumed.tolist(), df.epochs_done.tolist()) == (['ok'], [1], [2])


def test_what_a_run_killed_after_its_row_leaves_is_removed(tree, command, tmp_path, monkeypatch):
    argv = ['--data', tree, *TINY, '--epochs', 2, '--checkpoint-every', 1]
    with monkeypatch.context() as m:
        m.setattr(checkpoint, 'remove', lambda file: None)
        assert command(*argv)[0] == 0
    assert len(list(tmp_path.glob('results/checkpoints/*'))) == 2
    assert '(recorded already)' in command(*argv, '--resume')[1] and not list(tmp_path.glob('results/checkpoints/*'))
    code, _, err = command(*argv, '--resume', '--save', tmp_path / 'm.pt')
    assert code == 0 and 'm.pt: not written, the model of a recorded run is not kept' in err
    assert not (tmp_path / 'm.pt').exists()


def test_a_checkpoint_that_another_process_is_done_with_is_no_damage(tree, command, stopped, tmp_path, monkeypatch):
    argv = ['--data', tree, *TINY, '--epochs', 2, '--checkpoint-every', 1]
    stopped(*argv, epoch=1)
    peek, lock = checkpoint.peek, checkpoint.lock

    def finished_before_the_look(file):
        file.unlink()
        return peek(file)

    def finished_before_the_lock(file):
        held = lock(file)
        file.unlink(missing_ok=True)
        return held
    with monkeypatch.context() as m:
        m.setattr(checkpoint, 'lock', finished_before_the_lock)
        code, _, err = command(*argv, '--resume')
    assert code == 75 and err.endswith('is gone, another process has just finished this run\n') and err.count('\n') == 1
    assert not list(tmp_path.glob('results/checkpoints/*'))
    stopped(*argv, epoch=1)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, 'peek', finished_before_the_look)
        code, out, err = command(*argv, '--resume')
    assert code == 0 and 'it starts from the beginning' in out and not err


@pytest.mark.slow(2)
def test_the_checkpoint_that_went_furthest_is_read_whole_and_once(tree, command, stopped, tmp_path, monkeypatch):
    argv = ['--data', tree, *TINY, '--epochs', 3, '--checkpoint-every', 1]
    stopped(*argv, epoch=1)
    stopped(*argv, '--seed', 1, epoch=2)  # another run
    stopped(*argv, epoch=2)
    furthest = record(tmp_path / 'results').run_id.iloc[-1]
    load, seen = checkpoint.load, []

    def count(file, device):
        seen.append(file.stem)
        return load(file, device)
    monkeypatch.setattr(checkpoint, 'load', count)
    code, out, err = command(*argv, '--resume')
    assert code == 0 and f'{furthest}: continues after epoch 2 of 3' in out and seen == [furthest], err


def test_a_checkpoint_of_other_code_is_a_mistake_in_one_line(tree, command, stopped, tmp_path):
    argv = ['--data', tree, *TINY, '--epochs', 2, '--checkpoint-every', 1]
    stopped(*argv, epoch=1)
    file, = tmp_path.glob('results/checkpoints/*.pt')
    state = checkpoint.load(file)
    state['model']['renamed'] = state['model'].popitem()[1]
    torch.save(state, file)
    code, _, err = command(*argv, '--resume')
    assert code == 2 and f'{file}: does not fit this code' in err and err.count('\n') == 1 and file.exists()
    file.unlink()
    assert command(*argv, '--resume')[0] == 0


@pytest.mark.parametrize('place', ['2.0', '2b0'])
def test_a_checkpoint_whose_place_is_written_as_it_was_is_found(place, tmp_path):
    "Rows and checkpoints of before had 2.0, of which a spreadsheet makes 2."
    cfg = Config(attention='simple', arch='xresnet18', sa_at='2.0')
    file = checkpoint.path(tmp_path, 'r')
    file.parent.mkdir()
    torch.save(dict(format=checkpoint.FORMAT, config=asdict(cfg) | dict(sa_at=place), data_fingerprint='d', run_id='r',
                    epoch=1), file)
    runs = pd.DataFrame(dict(run_id=[], status=[]))
    found = checkpoint.find(cfg, 'd', runs, tmp_path)
    assert found.file == file
    found.held.release()
    assert checkpoint.find(replace(cfg, sa_at='2'), 'd', runs, tmp_path) is None


def test_other_images_are_another_run(tree, command, stopped, tmp_path):
    argv = ['--data', tree, *TINY, '--epochs', 2, '--checkpoint-every', 1]
    stopped(*argv, epoch=1)
    shutil.copy(next(tree.glob('train/*/*train3.JPEG')), next((tree / 'train').iterdir()) / 'more.JPEG')
    assert 'there is no checkpoint of this run' in command(*argv, '--resume')[1]
    assert len(list(tmp_path.glob('results/checkpoints/*.pt'))) == 1  # left for the images it is of


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize('spoil, words', [
    (lambda f: os.truncate(f, f.stat().st_size // 2), 'is cut off or not a checkpoint'),
    (lambda f: f.write_bytes(b''), 'is cut off or not a checkpoint'),
    (lambda f: f.write_text('not a checkpoint'), 'is cut off or not a checkpoint'),
    (lambda f: torch.save(dict(config={}, model={}), f), 'is not a checkpoint of this version'),
    (lambda f: torch.save(os.system, f), 'is cut off or not a checkpoint'),  # never run what a foreign file says
    (flip_a_bit, 'its checksum is wrong'),  # in a tensor: the file can be read all the same
])
def test_a_checkpoint_that_cannot_be_read_is_named_and_the_run_starts_anew(
        spoil, words, tree, command, stopped, tmp_path):
    argv = ['--data', tree, *TINY, '--epochs', 2, '--checkpoint-every', 1]
    stopped(*argv, epoch=1)
    file, = tmp_path.glob('results/checkpoints/*.pt')
    spoil(file)
    with pytest.raises(UsageError, match=words): checkpoint.load(file)
    spoiled = file.read_bytes()
    code, out, err = command(*argv, '--resume')
    assert code == 0 and f'{file}: ' in err and words in err and err.count('\n') == 1
    assert 'it starts from the beginning' in out
    assert file.read_bytes() == spoiled and sorted(record(tmp_path / 'results').status) == ['interrupted', 'ok']


@pytest.mark.slow(4)
def test_two_processes_are_not_at_one_run(tree, command, stopped, spawn, tmp_path, monkeypatch):
    argv = ['--data', tree, *TINY, '--epochs', 2, '--checkpoint-every', 1]
    stopped(*argv, epoch=1)
    file, = tmp_path.glob('results/checkpoints/*.pt')
    code = f'''
import sys, time
sys.path.insert(0, {str(REPO)!r})
from pathlib import Path
from training import checkpoint
held = checkpoint.lock(Path({str(file)!r}))
print(flush=True)
time.sleep(60)
'''
    other = spawn('-c', code)
    other.stdout.readline()
    lock = checkpoint.lock
    monkeypatch.setattr(checkpoint, 'lock', lambda file, wait=0: lock(file, 0))
    code, _, err = command(*argv, '--resume')
    other.kill()
    other.wait()
    assert code == 75 and err.endswith(f'train_imagenette.py: {file}: another process is already training this run\n')
    assert command(*argv, '--resume')[0] == 0  # the lock went with its process


def test_a_run_that_another_process_trains_does_not_keep_the_others_waiting(tree, command, tmp_path, monkeypatch):
    def busy(cfg, *args):
        if cfg.seed == 0: raise Busy('another process is already training this run')
        return contextlib.nullcontext()
    monkeypatch.setattr(checkpoint, 'claim', busy)
    code, _, err = command('--data', tree, *TINY, '--epochs', 1, '--resume', '--runs', 2)
    assert code == 75 and err.count('another process is already training this run') == err.count('\n') == 1
    assert record(tmp_path / 'results').seed.tolist() == [1]


def test_a_checkpoint_of_a_recorded_run_is_removed(tree, command, stopped, tmp_path):
    argv = ['--data', tree, *TINY, '--epochs', 2, '--checkpoint-every', 1]
    stopped(*argv, epoch=1)
    file, = tmp_path.glob('results/checkpoints/*.pt')
    shutil.copy(file, tmp_path / 'copy.pt')
    assert command(*argv, '--resume')[0] == 0
    shutil.copy(tmp_path / 'copy.pt', file)  # as kill -9 between the row and the removal leaves it
    assert 'there is no checkpoint of this run' in command(*argv, '--resume', '--seed', 7)[1] and not file.exists()


def test_a_diverged_run_is_done(tree, command, tmp_path):
    code, _, _ = command('--data', tree, *TINY, '--epochs', 3, '--opt', 'sgd', '--lr', 1e30, '--checkpoint-every', 1)
    assert code == 0 and record(tmp_path / 'results').status.tolist() == ['diverged']
    assert not list(tmp_path.glob('results/checkpoints/*'))
