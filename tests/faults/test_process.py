"""What can happen to a run: a loss that is no number, signals, processes that are killed.

Each run has its row, or is continued until it has one.
"""
import csv
import math
import multiprocessing as mp
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import NARROW, REPO, TIMES

import command
import runlog
import train_imagenette
import training.measure
import training.run
import xresnet

TINY = ('--split', 'v1', '--size', 32, '--bs', 6, '--arch', 'xresnet18', '--workers', 0, '--epochs', 1)


def load(results): return runlog.load(results / 'runs.csv')


def record(tmp_path): return load(tmp_path / 'results')


# --- a loss that is no number ---

def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(tree, command, tmp_path):
    code, out, _ = command('--data', tree, *TINY[:-1], 3, '--opt', 'sgd', '--lr', 1e30)
    row = record(tmp_path).iloc[0]
    assert code == 0 and row.status == 'diverged' and row.epochs_done < 3 and 'diverged after' in out
    with open(tmp_path / 'results' / 'runs.csv', newline='') as f: raw = next(csv.DictReader(f))
    assert raw['accuracy'] == raw['max_accuracy'] == raw['valid_loss'] == ''  # blank, not 0


def test_a_validation_loss_that_is_not_finite_is_diverged_too(tree, command, tmp_path, monkeypatch):
    # On CUDA the losses come late.
    monkeypatch.setattr(training.measure.FiniteLoss, '__call__', lambda self, loss: True)
    monkeypatch.setattr(training.measure.Measure, 'before_validate', lambda self: [
        setattr(self, 'logits', []), setattr(self, 'targets', []), self.model.head.bias.data.fill_(float('nan'))])
    assert command('--data', tree, *TINY)[0] == 0 and record(tmp_path).status.tolist() == ['diverged']


# --- signals ---

@pytest.mark.slow(10)
@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_an_interrupted_row(number, code, tree, spawn, tmp_path):
    argv = ['--data', tree, *TINY[:-1], 1000, '--results', tmp_path / 'results', '--workers', 1]
    cold = dict(start_new_session=True) if number == signal.SIGINT else {}
    process = spawn(REPO / 'train_imagenette.py', *argv, **cold)
    for _ in range(2): assert process.stdout.readline().startswith('epoch ')
    process.send_signal(number)
    out, err = process.communicate()
    row = record(tmp_path).iloc[0]
    assert process.returncode == code and row.status == 'interrupted' and 1 <= row.epochs_done < 1000
    assert math.isnan(row.accuracy)
    assert 'interrupted after' in out and 'Traceback' not in err


@pytest.mark.slow(3)
def test_sigterm_to_the_loader_processes_too_leaves_the_same(tree, spawn, tmp_path):
    argv = ['--data', tree, *TINY[:-1], 1000, '--results', tmp_path / 'results', '--workers', 2]
    processes = [spawn(REPO / 'train_imagenette.py', *argv) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline().startswith('epoch ')
        os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 143 and 'interrupted after' in out and not err
    assert record(tmp_path).status.tolist() == ['interrupted'] * 3


def test_a_signal_whose_exception_is_lost_ends_the_run_too(tree, command, tmp_path, monkeypatch):
    class Lost:
        def __del__(self): os.kill(os.getpid(), signal.SIGTERM)
    def reset(device): Lost()
    monkeypatch.setattr(training.measure, 'reset_peak_memory', reset)
    code, _, err = command('--data', tree, *TINY)
    assert code == 143 and record(tmp_path).status.tolist() == ['interrupted'] and not err


def test_a_signal_while_a_row_is_written_waits_for_it_and_starts_no_other_run(tree, command, tmp_path, monkeypatch):
    append = runlog.append

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return append(*args)
    monkeypatch.setattr(runlog, 'append', interrupted)
    code, _, err = command('--data', tree, *TINY, '--runs', 3)
    assert code == 143 and record(tmp_path).status.tolist() == ['ok'] and 'Traceback' not in err


def test_a_signal_while_the_end_of_a_run_breaks_is_not_lost(monkeypatch):
    monkeypatch.setattr(command.Stopped, 'by', 0)
    with pytest.raises(ValueError, match='broken'), command.undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError('broken')
    assert command.Stopped.by == signal.SIGINT  # no other run is begun


def test_a_loader_process_ended_by_sigterm_first_leaves_the_same(tree, command, tmp_path, monkeypatch):
    def fit(*args): raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Terminated. ')
    monkeypatch.setattr(training.run, 'fit', fit)
    code, out, err = command('--data', tree, *TINY)
    assert code == 143 and record(tmp_path).status.tolist() == ['interrupted'] and 'interrupted after' in out
    assert not err


# --- kill -9 ---

def kill_children(process):
    "Kill each child of a process, by kill -9, until it ends."
    while process.poll() is None:
        with suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
            for pid in children: os.kill(int(pid), signal.SIGKILL)


@pytest.mark.slow(3)
@pytest.mark.skipif(sys.platform != 'linux', reason='asks /proc for the loader processes')
def test_a_loader_process_that_dies_leaves_a_failed_row_and_a_checkpoint(tree, command, spawn, tmp_path):
    argv = ['--data', tree, *TINY[:-1], 8, '--workers', 1, '--checkpoint-every', 1]
    process = spawn(REPO / 'train_imagenette.py', *argv, '--results', tmp_path / 'results')
    for _ in range(2): assert process.stdout.readline().startswith('epoch ')
    kill_children(process)
    out, err = process.communicate()
    assert process.returncode == 1 and err.startswith('train_imagenette.py: DataLoader worker (pid'), err
    assert err.count('\n') == 1, err
    assert 'failed after' in out and 'the checkpoint is kept, and --resume continues from it' in out
    row = record(tmp_path).iloc[0]
    assert row.status == 'failed' and 2 <= row.epochs_done < 8 and math.isnan(row.accuracy)
    code, out, err = command(*argv, '--workers', 0, '--resume')
    assert code == 0 and f'{row.run_id}: continues after epoch {row.epochs_done} of 8' in out and not err
    whole = record(tmp_path)[['run_id', 'status', 'epochs_done', 'resumed']]
    assert whole.values.tolist() == [[row.run_id, 'ok', 8, 1]]
    assert pd.read_csv(tmp_path / 'results' / 'runs.csv').status.tolist() == ['failed', 'ok']
    assert not list(tmp_path.rglob('*.pt'))


def _main(argv):
    os.environ['FASTAI_HOME'], sys.stdout, xresnet.WIDTHS = argv.pop(), open(os.devnull, 'w'), NARROW
    train_imagenette.main(argv)


@pytest.mark.slow(29)
def test_kill_9_at_20_random_moments_leaves_the_runs_that_were_never_stopped(tree, tmp_path):
    context = mp.get_context('forkserver')
    context.set_forkserver_preload(['training.run'])
    argv = ['--data', tree, *TINY, '--sa', '--checkpoint-every', 1, '--resume']
    n_runs = 4
    def start(results, runs=n_runs, epochs=10):
        words = [*argv, '--runs', runs, '--epochs', epochs, '--results', results, os.environ['FASTAI_HOME']]
        process = context.Process(target=_main, args=(list(map(str, words)),), daemon=True)
        process.start()
        return process
    start(tmp_path / 'first', 1, 1).join()  # the server has imported torch by now
    begun = time.perf_counter()
    start(tmp_path / 'whole').join()
    run = (time.perf_counter() - begun) / n_runs
    rng, results, killed = random.Random(0), tmp_path / 'results', 0
    while killed < 20:
        process = start(results)
        process.join(rng.uniform(0, run / 2))
        killed += process.is_alive()
        process.kill()
        process.join()
        if (results / 'runs.csv').exists(): assert set(load(results).status) <= {'ok'}
    start(results).join()
    whole, parts = (load(r).sort_values('seed').reset_index(drop=True) for r in (tmp_path / 'whole', results))
    assert parts.seed.tolist() == list(range(n_runs)) and parts.drop(columns=TIMES).equals(whole.drop(columns=TIMES))
    assert (parts.resumed > 0).any()
    for a, b in zip(whole.run_id, parts.run_id):
        first, second = tmp_path / 'whole' / 'curves' / f'{a}.csv', results / 'curves' / f'{b}.csv'
        assert pd.read_csv(first).drop(columns='seconds').equals(pd.read_csv(second).drop(columns='seconds'))
        with np.load(results / 'predictions' / f'{b}.npz') as saved: assert len(saved['logits']) == 6
    assert not list((results / 'checkpoints').glob('*.pt'))
