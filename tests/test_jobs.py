"""Runs side by side without Ray: reproduce.py --jobs, on a tree of a few images."""
import os
import re
import signal
import time
from dataclasses import replace

import pytest
import torch
from conftest import REPO, rows

from command import ROW_SECONDS
from experiments import Config
from training import jobs

pytestmark = pytest.mark.full_width

TINY = ['digits', '--bs', '6', '--workers', '0', '--checkpoint-every', '1', '--runs', '2']
SAME = ['attention', 'seed', 'status', 'accuracy', 'valid_loss', 'train_loss', 'epochs_done', 'data_fingerprint',
        'device', 'resumed']


@pytest.fixture
def start(spawn, tree, tmp_path):
    "Starts reproduce.py digits on the tree, with results in a folder of tmp_path."
    def call(folder, *argv):
        return spawn(REPO / 'scripts' / 'reproduce.py', *TINY, '--data', tree, '--results', tmp_path / folder, *argv)
    return call


def read_to(process, words):
    "Returns the first line with `words` that the process prints."
    for line in process.stdout:
        if re.search(words, line): return line
    raise AssertionError(process.stderr.read())


def children(process):
    "Returns the ids of the processes that train for `process`."
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try: parent = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1]
        except OSError: continue
        spawned = b'spawn_main' in open(f'/proc/{pid}/cmdline', 'rb').read()
        if parent == str(process.pid) and spawned: found.append(int(pid))
    return found


def is_running(pid):
    "Returns whether a process runs; one that has ended stays as a zombie where nobody asks for its exit code."
    try: return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] not in 'ZX'
    except OSError: return False


def read_to_two_under_way(process):
    "Reads until two runs have a checkpoint."
    begun = set()
    while len(begun) < 2: begun.add(read_to(process, 'epoch 2 ').partition(':')[0])
    return begun


@pytest.mark.slow(28)
def test_the_rows_are_those_of_the_plain_loop(start, tmp_path):
    plain = start('plain', '--epochs', 2)
    assert plain.wait(600) == 0
    process = start('jobs', '--epochs', 2, '--jobs', 2)
    out, err = process.communicate(timeout=600)
    here, there = rows(tmp_path / 'plain'), rows(tmp_path / 'jobs')
    assert process.returncode == 0 and set(there.status) == {'ok'} and '4/4 ' in out, err
    assert here[SAME].equals(there[SAME]) and there.run_id.is_unique
    assert list((tmp_path / 'jobs' / 'checkpoints').iterdir()) == []
    assert re.search(r'^simple seed 1: epoch 2  ', out, re.M) and 'none → simple' in out
    assert '0 runs to do, 4 recorded' in start('jobs', '--epochs', 2, '--dry-run').communicate()[0]


@pytest.mark.slow(40)
@pytest.mark.parametrize('how', ['ctrl-c', 'sigterm', 'kill -9'])
def test_the_end_of_the_command_ends_the_runs_with_their_rows_and_they_go_on(how, start, tmp_path):
    process = start('results', '--epochs', 10, '--jobs', 2)
    begun, workers = read_to_two_under_way(process), children(process)
    assert begun == {'none seed 0', 'simple seed 0'} and len(workers) == 2
    if how == 'ctrl-c': os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    if how == 'sigterm': process.terminate()
    if how == 'kill -9': process.kill()
    out, err = process.communicate(timeout=600)  # until the last process with this end of the pipe has ended
    assert process.returncode == {'ctrl-c': 130, 'sigterm': 143, 'kill -9': -9}[how] and 'Traceback' not in err, err
    while any(map(is_running, workers)): time.sleep(0.1)  # They have closed the pipe just before their end.
    left = rows(tmp_path / 'results')
    assert left.attention.tolist() == ['none', 'simple']
    assert set(left.status) == {'interrupted'} and left.epochs_done.min() >= 1
    assert {f.stem for f in (tmp_path / 'results' / 'checkpoints').glob('*.pt')} == set(left.run_id)
    if how != 'kill -9': return  # Their rows and checkpoints are of the same kind.
    out, err = start('results', '--epochs', 10, '--jobs', 2, '--runs', 1).communicate(timeout=600)
    df = rows(tmp_path / 'results')
    assert out.count('continues after epoch') == 2, err
    assert df.run_id.tolist() == left.run_id.tolist() and set(df.status) == {'ok'}


@pytest.mark.slow(29)
def test_a_process_that_dies_is_replaced(start, tmp_path):
    process = start('results', '--epochs', 5, '--jobs', 2)
    read_to_two_under_way(process)
    os.kill(children(process)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1 and 'failed: its process ended early (exit code -9' in err and '1 runs failed' in err
    assert len(rows(tmp_path / 'results')) == 3 and '4/4 ' in out
    assert start('results', '--epochs', 5, '--jobs', 2).wait(600) == 0
    df = rows(tmp_path / 'results')
    assert len(df) == 4 and set(df.status) == {'ok'} and sorted(df.resumed) == [0, 0, 0, 1]


FAULT = """
from pathlib import Path
import torch.nn as nn
flag = Path({flag!r})
broken = []
class Layer(nn.Identity):
    def __init__(self, n_channels): super().__init__()
    def forward(self, x):
        if not self.training or len(x) != 6: return x
        if not flag.exists(): broken.append(flag.touch())
        if broken: raise RuntimeError('an illegal memory access was encountered')
        return x
"""


@pytest.mark.slow(20)
def test_a_fault_that_stays_in_its_process_fails_one_run(tree, tmp_path):
    (tmp_path / 'fault.py').write_text(FAULT.format(flag=str(tmp_path / 'flag')))
    cfg = Config(dataset='custom', data=str(tree), size=32, bs=6, workers=0, arch='xresnet18', epochs=1,
                 attention=f'{tmp_path / "fault.py"}:Layer')
    todo = [('arm', replace(cfg, seed=seed)) for seed in range(3)]
    found = list(jobs.Jobs(1, tmp_path / 'results', torch.device('cpu')).each(todo))
    assert ['illegal memory access' in str(error) for _, _, error in found] == [True, False, False]
    assert rows(tmp_path / 'results').status.tolist() == ['failed', 'ok', 'ok']


@pytest.mark.slow(21)
def test_the_processes_end_where_ctrl_c_is_ignored(spawn, tree, tmp_path):
    argv = [*TINY, '--data', tree, '--results', tmp_path / 'results', '--epochs', 1, '--runs', 1, '--jobs', 2]
    ignore = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))  # as a script's background job is
    process = spawn(REPO / 'scripts' / 'reproduce.py', *argv, **ignore)
    out, err = process.communicate(timeout=ROW_SECONDS)
    assert process.returncode == 0 and '2/2 ' in out and 'did not end' not in err, err


@pytest.mark.slow(15)
def test_a_mistake_ends_all_in_one_line(start, tmp_path):
    process = start('results', '--jobs', 2, '--bs', 60)  # more than there are training images
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2 and err.count('\n') == 1 and 'make no batch of 60; lower --bs' in err
