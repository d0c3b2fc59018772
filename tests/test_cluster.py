"""The runs of an experiment on a real local Ray of two workers."""
import os
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
from conftest import REPO, rows

import runlog
import training.measure
import training.run
from command import Busy, UsageError
from experiments import Config
from training import cluster

pytestmark = pytest.mark.full_width

ray = pytest.importorskip('ray', reason='needs ray: pip install -r requirements-cluster.txt')
TINY = ['digits', '--bs', '6', '--workers', '0', '--checkpoint-every', '1', '--runs', '1']
SAME = ['attention', 'seed', 'status', 'accuracy', 'valid_loss', 'train_loss', 'epochs_done', 'data_fingerprint',
        'git_commit', 'git_dirty']


@pytest.fixture
def start(spawn, tree, tmp_path):
    "Starts reproduce.py digits on the tree, with results in a folder of tmp_path."
    def call(folder, *argv, **env):
        argv = [REPO / 'scripts' / 'reproduce.py', *TINY, '--data', tree, '--results', tmp_path / folder, *argv]
        return spawn(*argv, env=os.environ | dict(RAY_DEDUP_LOGS='0') | env)
    return call


def wait_for_two_under_way(process, results):
    "Returns the ids of the processes that train for `process`, as soon as two runs have a checkpoint."
    while len(list(results.glob('checkpoints/*.pt'))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    return [child.pid for child in children if child.name().startswith('ray::train_run')]


@pytest.mark.slow(44)
def test_the_rows_are_those_of_the_plain_loop_though_a_worker_is_killed(start, tmp_path):
    plain = start('plain', '--epochs', 5)
    assert plain.wait(300) == 0
    process = start('ray', '--epochs', 5, '--ray')
    os.kill(wait_for_two_under_way(process, tmp_path / 'ray')[0], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and 'continues after epoch' in out, err
    assert '2/2 ' in out and 'none → simple' in out, err
    here, there = rows(tmp_path / 'plain'), rows(tmp_path / 'ray')
    assert here[SAME].equals(there[SAME]) and set(here.status) == {'ok'} and there.run_id.is_unique
    assert sorted(there.resumed) == [0, 1] and not list((tmp_path / 'ray' / 'checkpoints').iterdir())
    for name in ('curves', 'predictions'):
        assert {f.stem for f in (tmp_path / 'ray' / name).iterdir()} == set(there.run_id)
    assert not list((tmp_path / 'ray').glob('.ray-*'))
    assert '0 runs to do, 2 recorded' in start('ray', '--epochs', 5, '--dry-run').communicate()[0]


@pytest.mark.slow(48)
def test_ctrl_c_records_what_was_under_way_and_the_plain_loop_goes_on_with_it(start, tmp_path):
    process = start('results', '--epochs', 8, '--ray')
    wait_for_two_under_way(process, tmp_path / 'results')
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    left = rows(tmp_path / 'results')
    assert process.returncode == 130 and 'Traceback' not in err and 'no runs' in out, err
    assert set(left.status) == {'interrupted'} and left.epochs_done.min() >= 1
    assert {f.stem for f in (tmp_path / 'results' / 'checkpoints').glob('*.pt')} == set(left.run_id)
    out, err = start('results', '--epochs', 8).communicate(timeout=300)
    df = rows(tmp_path / 'results')
    assert out.count('continues after epoch') == len(left) and set(df.status) == {'ok'}, err
    assert 'epochs so far had git_commit' not in err, err
    assert len(df) == 2 and set(left.run_id) == set(df.run_id)


@pytest.mark.slow(18)
def test_what_cannot_be_is_told_in_one_line(start, tmp_path):
    (tmp_path / 'ray.py').write_text('raise ImportError')
    no_ray, no_gpu = dict(PYTHONPATH=str(tmp_path)), dict(CUDA_VISIBLE_DEVICES='')
    for argv, env, words in [
        (['--ray'], no_ray, '--ray: needs ray: pip install -r requirements-cluster.txt'),
        (['--ray', '127.0.0.1:1'], {}, '--ray 127.0.0.1:1: no Ray there'),
        (['--ray', 'x y'], {}, '--ray x y: no Ray there'),
        (['--ray', '--cpus-per-run', '999'], {}, '--cpus-per-run 999: this machine has'),
        (['--ray', '--gpus-per-run', '1'], no_gpu, '--gpus-per-run 1: this machine has 0'),
    ]:
        process = start('results', *argv, **env)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 2 and err.startswith(f'reproduce.py: {words}') and err.count('\n') == 1, err
    assert not (tmp_path / 'results' / 'runs.csv').exists()


@pytest.mark.slow(11)
def test_a_node_gets_the_code_that_trains_and_nothing_else(spawn, tmp_path):
    code = f'''
import sys
sys.path.insert(0, {str(REPO)!r})
from training.cluster import Cluster

def look():
    import os
    import training.run
    return os.listdir(), os.path.dirname(training.run.__file__), os.getcwd()

here = Cluster(None, {str(tmp_path)!r})
files, training, folder = here.ray.get(here.ray.remote(num_cpus=1)(look).remote())
print(training == folder + '/training', *files)
'''
    out, err = spawn('-c', code, cwd=tmp_path).communicate(timeout=300)
    assert out.startswith('True '), err
    sent = set(out.split()[1:])
    assert {'training', 'layers.py', 'xresnet.py', 'experiments.py', 'runlog.py', 'command.py'} <= sent
    assert not sent & {'results', 'tests', 'report', 'notebooks', '.git', '.venv'}


# --- the task, in this process ---

@pytest.fixture
def task(tree, tmp_path):
    "Runs the task as a node would: an Outcome. `mark`: whether the node shares the results folder."
    def call(shared=True, device=None):
        (tmp_path / 'results').mkdir(exist_ok=True)
        if shared: (tmp_path / 'results' / 'mark').touch()
        cfg = Config(dataset='digits', data=str(tree), size=32, bs=6, arch='xresnet18', epochs=1, workers=0)
        return cluster.train_run(cfg, tmp_path / 'results', 'mark', None, device=device)
    return call


@pytest.mark.parametrize('shared', [True, False])
def test_a_node_that_does_not_share_the_folder_hands_over_its_files(shared, task, tmp_path):
    out = task(shared)
    results, names = tmp_path / 'results', {f'curves/{out.row["run_id"]}.csv', f'predictions/{out.row["run_id"]}.npz'}
    assert out.row['status'] == 'ok' and not out.error and not out.mistake and not (results / 'runs.csv').exists()
    assert set(out.files) == (set() if shared else names)
    runlog.write_files(out.files, results)
    assert all((results / name).exists() for name in names)


def test_the_runs_of_a_cluster_without_gpus_train_on_the_cpu_where_a_node_has_one(task, monkeypatch):
    "As on a Mac, whose GPU Ray does not count."
    def other(): raise AssertionError('the device of the cluster is to be taken')
    monkeypatch.setattr(training.run, 'get_device', other)
    driver = cluster.Cluster.__new__(cluster.Cluster)
    driver.gpus = 0
    assert task(device=driver.device).row['status'] == 'ok'


def test_failures_mistakes_and_cancelled_runs_are_handed_over(task, tmp_path, monkeypatch):

    def fails(error):
        def fit(learn, cfg): raise error
        monkeypatch.setattr(training.run, 'fit', fit)
        return task()
    out = fails(RuntimeError('broken'))
    assert out.row['status'] == 'failed' and out.error == "RuntimeError('broken')" and not out.mistake
    out = fails(UsageError('no such image'))
    assert out.row['status'] == 'failed' and out.mistake == 'no such image' and not out.error
    assert fails(Busy('another process has it')).busy == 'another process has it'
    with pytest.raises(SystemExit): fails(SystemExit(1))  # SIGTERM to a worker: Ray is to see that it ends
    monkeypatch.undo()
    before_fit = training.measure.Measure.before_fit

    def cancelled(self):
        before_fit(self)
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(training.measure.Measure, 'before_fit', cancelled)
    out = task()
    assert out.row['status'] == 'interrupted' and not out.error and not out.mistake


def test_a_full_disk_for_the_files_of_a_run_loses_no_row(task, tmp_path, monkeypatch, capsys):
    def full(*args): raise OSError(28, 'No space left on device')
    out, driver = task(shared=False), cluster.Cluster.__new__(cluster.Cluster)
    driver.ray = SimpleNamespace(get=lambda ref: ref, exceptions=ray.exceptions)
    driver.results, driver.provenance = tmp_path / 'driver', {}
    with monkeypatch.context() as m:
        m.setattr(runlog, 'write_files', full)
        assert driver.receive(out) is None
    assert 'its curve or predictions could not be written' in capsys.readouterr().err
    assert rows(tmp_path / 'driver').status.tolist() == ['ok']
    assert driver.receive(out) is None and len(rows(tmp_path / 'driver')) == 1  # handed over twice, it is one row
    assert isinstance(driver.receive(cluster.Outcome(busy='another process has it')), Busy)
    assert {f'{f.parent.name}/{f.name}' for f in tmp_path.glob('driver/*/*')} == set(out.files)
