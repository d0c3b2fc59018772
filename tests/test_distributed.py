"""One run in two processes (gloo, on the CPU)."""
import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPO

import runlog
import training.measure
import training.run
from experiments import Config
from layers import ATTENTION
from training.data import get_dls

pytest.importorskip('accelerate', reason='needs accelerate: pip install -r requirements-cluster.txt')
pytestmark = [pytest.mark.slow(40), pytest.mark.full_width]  # as its processes that start cold
LAUNCH = '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'  # as users start it
TINY = '--split', 'v1', '--size', '32', '--bs', '4', '--arch', 'xresnet18', '--workers', '0'


@pytest.fixture
def data(tree):
    "The tree with 5 validation images: shares of 3 and 2, of two batches and of one where a batch has 2."
    next(tree.glob('val/*/ILSVRC2012_val_2*')).unlink()
    return tree


@pytest.fixture
def launch(spawn, tmp_path):
    """Runs command lines one after the other in one group of two processes: (exit code, stdout, stderr).

    A command line may begin with STOP=epoch: Ctrl-C comes in that epoch, from 0; or with BUSY: others train seed 0.
    """
    def run(*lines):
        script = tmp_path / 'lines.py'
        script.write_text(f'''
import json, sys
sys.path.insert(0, {str(REPO)!r})
import train_imagenette
import training.measure
from command import Busy
from training import checkpoint

codes, claim = [], checkpoint.claim
for argv in json.loads({json.dumps(json.dumps(lines))}):
    busy = argv[0] == 'BUSY' and argv.pop(0)
    def others_have_seed_0(cfg, *args):
        if busy and cfg.seed == 0: raise Busy('another process is already training this run')
        return claim(cfg, *args)
    checkpoint.claim = others_have_seed_0
    stop = int(argv.pop(0)[5:]) if argv[0].startswith('STOP=') else -1
    def heed(self):
        if self.epoch == stop and self.iter == 1: raise KeyboardInterrupt
    training.measure.Heed.before_batch = heed
    codes.append(train_imagenette.main(argv) or 0)
sys.exit(max(c for c in codes if c != 130) if set(codes) != {{130}} else 130)
''')
        processes = spawn_two(spawn, script)
        (out, err), (other_out, other_err) = (process.communicate(timeout=300) for process in processes)
        return max(process.returncode for process in processes), out + other_out, err + other_err
    return run


def spawn_two(spawn, *argv):
    "Starts a script as the two processes of a group, with the environment that torchrun gives them."
    with socket.create_server(('localhost', 0)) as server: port = server.getsockname()[1]
    group = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(port))
    return [spawn(*argv, env=os.environ | group | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(2)]


def record(folder): return runlog.load(folder / 'runs.csv')


def test_every_attention_layer_gives_one_row_with_each_validation_image_once(data, launch, tmp_path):
    line = ['--data', str(data), *TINY, '--bs', '2', '--epochs', '1', '--mixup', '0.4']
    line += ['--results', str(tmp_path / 'results')]
    lines = [[*line, '--sa', name, '--save', str(tmp_path / f'{name}.pt'), '--loader', loader]
             for name, loader in zip(ATTENTION, ['workers', 'device'] * len(ATTENTION))]
    code, out, err = launch(*lines)
    assert code == 0, err
    df = record(tmp_path / 'results')
    assert df.attention.tolist() == list(ATTENTION) and set(df.status) == {'ok'} and set(df.processes) == {2}
    assert set(df.lr) == {3e-3}
    assert set(df.n_train) == {30} and set(df.n_val) == {5}
    assert len(out.splitlines()) == 2 * len(ATTENTION)  # Only one process prints.
    for r in df.itertuples():  # the same weights in one process
        model, _ = training.run.load_model(tmp_path / f'{r.attention}.pt')
        dls = get_dls(training.run.settle(
            Config(dataset='custom', data=str(data), split='v1', size=32, bs=2, workers=0), torch.device('cpu')))
        with torch.no_grad(): logits = torch.cat([model(x) for x, _ in dls.valid])
        targets = torch.tensor(dls.valid.dataset.labels)
        assert (logits.argmax(1) == targets).double().mean().item() == pytest.approx(r.accuracy, abs=1e-6)
        with np.load(tmp_path / 'results' / 'predictions' / f'{r.run_id}.npz') as saved:
            assert saved['files'].tolist() == dls.valid_files and saved['targets'].tolist() == targets.tolist()
            assert torch.allclose(logits, torch.tensor(saved['logits']), atol=1e-4)
        loss = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1).item()
        assert loss == pytest.approx(r.valid_loss, abs=1e-4)


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped_and_lr_is_scaled_on_request_only(data, launch, tmp_path):
    line = ['--data', str(data), *TINY, '--sa', '--epochs', '3', '--checkpoint-every', '1', '--scale-lr']
    whole, parts = (['--results', str(tmp_path / name)] for name in ('whole', 'parts'))
    resumed = [*line, *parts, '--resume']
    code, out, err = launch([*line, *whole], ['STOP=1', *line, *parts], resumed, resumed)
    assert code == 0 and out.count('continues after epoch 1 of 3') == 1 and out.count('(recorded already)') == 1, err
    rows = pd.read_csv(tmp_path / 'parts' / 'runs.csv')
    assert rows.status.tolist() == ['interrupted', 'ok'] and rows.run_id.nunique() == 1
    assert rows.lr.tolist() == [6e-3, 6e-3]
    a, b = (record(tmp_path / name).iloc[0] for name in ('whole', 'parts'))
    same = ['accuracy', 'valid_loss', 'train_loss', 'max_accuracy', 'processes', 'n_train', 'epochs_done']
    assert a[same].equals(b[same]) and not list((tmp_path / 'parts' / 'checkpoints').glob('*.pt'))


def test_a_run_that_others_train_is_left_alone_by_all_processes(data, launch, tmp_path):
    line = ['--data', str(data), *TINY, '--epochs', '1', '--runs', '2', '--resume']
    line += ['--results', str(tmp_path / 'results')]
    code, _, err = launch(['BUSY', *line])
    said = [line for line in err.splitlines() if line.startswith('train_imagenette.py: ')]
    assert code == 75 and said == ['train_imagenette.py: another process is already training this run'], err
    assert record(tmp_path / 'results').seed.tolist() == [1]


def test_a_loss_that_is_not_finite_ends_all_processes(data, launch, tmp_path):
    line = ['--data', str(data), *TINY, '--epochs', '3', '--opt', 'sgd', '--lr', '1e30']
    code, _, err = launch([*line, '--results', str(tmp_path / 'results')])
    assert code == 0 and record(tmp_path / 'results').status.tolist() == ['diverged'], err


def test_a_mistake_is_printed_once(data, launch, tmp_path):
    said = {'--epcohs 3': 'did you mean --epochs?', '--compile': 'in one process only', '--dump': 'in one process',
            '--gpu 0': 'each process has the device of its number', '--processes 3': 'started as 2',
            '--bs 16': 'make no batch of 16 in each of 2 processes'}
    line = ['--data', str(data), *TINY, '--results', str(tmp_path / 'results')]
    code, _, err = launch(*([*line, *flags.split()] for flags in said))
    lines = [line for line in err.splitlines() if line.startswith('train_imagenette.py: ')]
    assert code and len(lines) == len(said) and all(words in line for words, line in zip(said.values(), lines)), err
    assert not (tmp_path / 'results' / 'runs.csv').exists()


def processes_of(results, rank):
    "Returns the ids of the processes with that rank whose command line names the results folder."
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        with suppress(OSError):  # Some processes end meanwhile, and others may not be looked at.
            if str(results).encode() not in (folder / 'cmdline').read_bytes(): continue
            environment = (folder / 'environ').read_bytes().split(b'\0')
            if f'RANK={rank}'.encode() in environment: found.append(int(folder.name))
    return found


@pytest.mark.parametrize('rank', [0, 1])
def test_the_death_of_a_process_leaves_no_whole_row_and_a_checkpoint(rank, data, spawn, tmp_path):
    launcher = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
                '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
    results = tmp_path / 'results'
    argv = [str(REPO / 'train_imagenette.py'), '--data', str(data), *TINY, '--sa', '--epochs', '5', '--resume']
    argv += ['--checkpoint-every', '1', '--results', str(results)]
    process = spawn(*launcher, *argv)
    while not process.stdout.readline().startswith('epoch 2 '): assert process.poll() is None, process.stderr.read()
    (pid,) = processes_of(results, rank)
    os.kill(pid, signal.SIGKILL)
    started = time.perf_counter()
    process.communicate(timeout=120)
    assert process.returncode and time.perf_counter() - started < 60
    left = record(results)
    assert left.status.tolist() in ([['failed'], ['interrupted']] if rank else [[]])  # The first process writes rows.
    assert left.accuracy.isna().all()
    (file,) = results.glob('checkpoints/*.pt')
    first, _ = spawn_two(spawn, *argv)
    out, err = first.communicate(timeout=300)
    df = record(results)
    assert 'continues after epoch' in out and df.status.tolist() == ['ok'] and df.run_id[0] == file.stem, err
    assert df.epochs_done[0] == 5, err


SHORT = """
import os, signal, sys, time
from datetime import timedelta
sys.path.insert(0, {repo!r})
import train_imagenette
import training.measure
import training.run
from training import distributed
distributed.TIMEOUT = timedelta(seconds=15)
rank, get_dls = os.environ['RANK'], training.run.get_dls
def slowly(*args):
    if {epoch}: time.sleep(17)  # The second waits for so long, and then the first.
    return get_dls(*args)
training.run.get_dls = slowly
def stop(self):
    if rank == '1' and self.epoch == {epoch}: os.kill(os.getpid(), signal.SIGSTOP)
training.measure.Heed.before_batch = stop
argv = sys.argv[1:] + (['--lr', '0.1'] if rank == '1' and {epoch} == 0 else [])
sys.exit(train_imagenette.main(argv))
"""


def two_with_a_short_patience(spawn, tmp_path, data, epoch):
    "Returns (the two processes, the results folder); the second stops for good in `epoch`, or has another --lr if 0."
    script, results = tmp_path / 'short.py', tmp_path / 'results'
    script.write_text(SHORT.format(repo=str(REPO), epoch=epoch))
    return spawn_two(spawn, script, '--data', data, *TINY, '--epochs', '3', '--results', results), results


def test_a_process_that_hangs_is_noticed_and_one_that_prepares_for_longer_is_waited_for(data, spawn, tmp_path):
    (first, second), results = two_with_a_short_patience(spawn, tmp_path, data, epoch=1)
    try: out, err = first.communicate(timeout=120)
    finally: second.kill()
    assert first.returncode == 1 and out.startswith('epoch 1 ') and 'epoch 2 ' not in out, err
    assert record(results).status.tolist() == ['failed']


def test_processes_that_train_something_else_say_so(data, spawn, tmp_path):
    processes, results = two_with_a_short_patience(spawn, tmp_path, data, epoch=0)
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert ''.join(said).count('train_imagenette.py: the processes differ in lr: 0.003 and 0.1\n') == 1
    assert not (results / 'runs.csv').exists()


@pytest.mark.parametrize('n, code', [(1, 0), (2, 1)])
def test_accelerate_is_needed_by_several_processes_only(n, code, data, spawn, tmp_path):
    (tmp_path / 'accelerate.py').write_text('raise ImportError')
    launcher = [*LAUNCH[:-1], n] if n > 1 else []
    argv = [*launcher, REPO / 'train_imagenette.py', '--data', data, *TINY, '--epochs', '1']
    argv += ['--results', tmp_path / 'results']
    env = os.environ | dict(PYTHONPATH=str(tmp_path))
    process = spawn(*argv, env=env)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == code and (tmp_path / 'results' / 'runs.csv').exists() == (n == 1), err
    assert err.count('several processes: needs accelerate: pip install -r requirements-cluster.txt') == n - 1
