"""What can happen to the record: damaged files, full and read-only disks, many writers.

Nothing in it is lost or altered.
"""
import multiprocessing as mp
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPO

import runlog
import training.measure
from command import UsageError

TINY = ('--split', 'v1', '--size', 32, '--bs', 6, '--arch', 'xresnet18', '--workers', 0,
        '--epochs', 2, '--checkpoint-every', 1)


def row(run_id='a', **values): return dict(run_id=run_id, status='ok', bs=64, accuracy=0.5) | values


@pytest.mark.parametrize('damage, words', [
    (lambda b: b[:-1], 'its last line has no end, it may be cut off'),
    (lambda b: b[:-40], 'line 3 has'),
    (lambda b: b[:b.index(b'\na,') + 30] + b'\n', 'line 2 has'),
    (lambda b: b.replace(b'\nb,', b'\n<<<<<<< HEAD\nb,'), 'line 3: a merge conflict'),
    (lambda b: b + b'=======\n', 'line 4: a merge conflict'),
    (lambda b: b.replace(b'0.5', b'O.5', 1), "line 2: accuracy 'O.5' is not a number"),
    (lambda b: b.replace(b'0.5', b'1e400', 1), "line 2: accuracy '1e400' is not a number"),
    (lambda b: b.replace(b'64', b'6_4', 1), "line 2: bs '6_4' is not a number"),
    (lambda b: b.replace(b'64', b'64.5', 1), "line 2: bs '64.5' is not an integer"),
    (lambda b: b + b'c,ok,' + b',' * 100 + b'\n', 'line 4 has 103 of'),
    (lambda b: b + b'\xe9\n', 'not UTF-8'),
    (lambda b: b + b'"' + b'x' * 200_000, 'line 4: field larger than field limit'),
])
def test_a_damaged_runs_file_is_named_before_the_run_and_takes_no_row(damage, words, tree, command, tmp_path):
    results = tmp_path / 'results'
    for run_id in 'ab': runlog.append(row(run_id), results)
    content = damage((results / 'runs.csv').read_bytes())
    (results / 'runs.csv').write_bytes(content)
    code, out, err = command('--data', tree, *TINY)
    assert code == 2 and err.count('\n') == 1 and f'{results / "runs.csv"}: {words}' in err
    assert 'mend it by hand' in err and not out
    with pytest.raises(UsageError, match=words): runlog.load(results / 'runs.csv')
    # damaged while a run was on: its row is not lost
    assert runlog.append(row('c'), results) == results / 'runs-2.csv'
    assert runlog.load(results / 'runs-2.csv').run_id.tolist() == ['c']
    assert (results / 'runs.csv').read_bytes() == content


@pytest.mark.parametrize('change', [lambda b: b.replace(b'\n', b'\r\n'), lambda b: b'\xef\xbb\xbf' + b])
def test_windows_line_ends_and_byte_order_marks_are_read(change, tmp_path):
    for run_id in 'ab': runlog.append(row(run_id, meta='x\ny'), tmp_path)
    (tmp_path / 'runs.csv').write_bytes(change((tmp_path / 'runs.csv').read_bytes()))
    assert runlog.append(row('c'), tmp_path) == tmp_path / 'runs.csv'
    df = runlog.load(tmp_path / 'runs.csv')
    assert df.run_id.tolist() == ['a', 'b', 'c'] and df.accuracy.tolist() == [0.5] * 3


def test_foreign_columns_are_left_alone(tree, command, tmp_path):
    results = tmp_path / 'results'
    results.mkdir()
    (results / 'runs.csv').write_text('run_id,acc\nold,0.1\n')
    code, _, err = command('--data', tree, *TINY)
    assert code == 0 and err.count('\n') == 1
    assert err.startswith(f'{results / "runs.csv"} has other columns: the row is in {results / "runs-2.csv"}; once ')
    assert (results / 'runs.csv').read_text() == 'run_id,acc\nold,0.1\n'
    assert len(runlog.load(results / 'runs-2.csv')) == 1


# --- disks ---

def mount(folder, options):
    "Mount a tmpfs; skips the test where this user may not."
    folder.mkdir(exist_ok=True)
    command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
    if shutil.which('mount') is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('may not mount a file system')


@pytest.fixture
def small_disk(tmp_path):
    "A results folder on a disk of its own of 320 MiB, and fill(bytes to leave free)."
    folder = tmp_path / 'results'
    mount(folder, 'size=320m')

    def fill(leave):
        (folder / 'filler').unlink(missing_ok=True)
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder / 'filler').write_bytes(b'\0' * max(0, free - leave))
    yield folder, fill
    subprocess.run(['umount', '-l', str(folder)], check=True)


def full_from(monkeypatch, fill, epoch, leave):
    "Fill the disk when the training of an epoch, from 0, begins."
    before_train = training.measure.Measure.before_train

    def and_fill(self):
        if self.epoch == epoch: fill(leave)
        before_train(self)
    monkeypatch.setattr(training.measure.Measure, 'before_train', and_fill)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a file that is always full')
@pytest.mark.slow(8)
def test_a_disk_full_for_the_output_lets_the_run_go_on(tree, tmp_path):
    argv = [sys.executable, REPO / 'train_imagenette.py', '--data', tree, *TINY, '--results', tmp_path / 'results']
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'}
    with open('/dev/full', 'w') as full:
        done = subprocess.run(list(map(str, argv)), stdout=full, stderr=full, env=env, timeout=300)
    assert done.returncode == 0
    df = runlog.load(tmp_path / 'results' / 'runs.csv')
    assert df.status.tolist() == ['ok'] and df.epochs_done.tolist() == [2]
    assert not list((tmp_path / 'results' / 'checkpoints').iterdir())


def test_a_disk_full_for_a_checkpoint_and_a_curve_lets_the_run_go_on(small_disk, tree, command, monkeypatch):
    results, fill = small_disk
    full_from(monkeypatch, fill, 0, 0)
    after_epoch = training.measure.Measure.after_epoch

    def and_free(self):
        after_epoch(self)
        if self.epoch == 1: (results / 'filler').unlink()  # the row has room again
    monkeypatch.setattr(training.measure.Measure, 'after_epoch', and_free)
    code, _, err = command('--data', tree, *TINY[:-4], '--epochs', 3, '--checkpoint-every', 1)
    assert code == 0 and 'its curve could not be written ([Errno 28] No space left on device); the run goes on' in err
    assert '.pt: could not be written ([Errno 28] No space left on device); the run goes on' in err
    assert 'Traceback' not in err
    df = runlog.load(results / 'runs.csv')
    assert df.status.tolist() == ['ok']
    assert len((results / 'curves' / f'{df.run_id[0]}.csv').read_text().splitlines()) == 4  # the last epoch's holds all
    assert not list((results / 'checkpoints').glob('*.p*'))


def test_a_disk_full_for_the_row_keeps_record_and_checkpoint_and_prints_the_row(
        small_disk, tree, command, monkeypatch):
    results, fill = small_disk
    for i in range(30): runlog.append(row(f'old{i}'), results)
    before = (results / 'runs.csv').read_bytes()
    argv = ['--data', tree, *TINY[:-4], '--epochs', 2, '--checkpoint-every', 1]
    with monkeypatch.context() as m:
        full_from(m, fill, 1, 0)
        code, out, err = command(*argv)
    assert code == 2 and 'the row could not be written ([Errno 28] No space left on device' in err
    assert 'Traceback' not in err
    assert '"status": "ok"' in err and (results / 'runs.csv').read_bytes() == before
    assert not [p for p in results.rglob('*.part')]
    (results / 'filler').unlink()
    code, out, err = command(*argv, '--resume')
    assert code == 0 and 'continues after epoch 1 of 2' in out, err
    df = runlog.load(results / 'runs.csv')
    assert len(df) == 31 and df.status.iloc[-1] == 'ok'
    assert (results / 'runs.csv').read_bytes().startswith(before.split(b'\n')[0])
    assert df.accuracy.iloc[:30].tolist() == [0.5] * 30


def test_a_read_only_results_folder_is_a_mistake_before_the_run(tree, command, tmp_path):
    results = tmp_path / 'results'
    mount(results, 'ro,size=1m')
    try: code, _, err = command('--data', tree, *TINY)
    finally: subprocess.run(['umount', '-l', str(results)], check=True)
    assert code == 2 and err.startswith(f'train_imagenette.py: {results}: no row can be written there (')
    assert err.count('\n') == 1
    assert 'Read-only file system' in err


# --- runs beside each other, and the clock ---

def _append_many(args):
    results, process, n = args
    for i in range(n): runlog.append(row(f'{process}-{i}', meta='x,"y"\n' * (i % 3)), results)


def test_eight_processes_lose_no_row(tmp_path):
    with mp.get_context('fork').Pool(8) as pool: pool.map(_append_many, [(tmp_path, p, 100) for p in range(8)])
    df = runlog.load(tmp_path / 'runs.csv')
    assert set(df.run_id) == {f'{p}-{i}' for p in range(8) for i in range(100)} and len(df) == 800
    assert set(df.meta) == {'', 'x,"y"\n', 'x,"y"\nx,"y"\n'}


def test_kill_9_leaves_a_whole_file(tmp_path):
    code = f'''
import sys; sys.path.insert(0, {str(REPO)!r})
import runlog
for i in range(100000):
    runlog.append(dict(run_id=f"{{sys.argv[1]}}-{{i}}", status="ok", meta="m" * 2000), {str(tmp_path)!r})
    print(i, flush=True)
'''
    seen = 0
    rng = random.Random(0)
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, '-c', code, str(attempt)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()  # it is under way
        time.sleep(0.05 * rng.random())
        process.send_signal(signal.SIGKILL)
        done = process.stdout.read().count('\n') + 1
        df = runlog.load(tmp_path / 'runs.csv')
        assert df.run_id.is_unique and (df.status == 'ok').all() and (df.meta.str.len() == 2000).all()
        assert seen + done <= len(df) <= seen + done + 1  # every row that was reported, and at most the one in flight
        seen = len(df)
    assert {p.name for p in tmp_path.iterdir()} <= {'.runs.lock', '.runs.csv.part', 'runs.csv'}


def test_two_runs_with_one_id_keep_their_curves_and_rows_apart(tree, command, tmp_path, monkeypatch):
    tokens = iter(['same', 'same', 'next', *map(str, range(9))])
    monkeypatch.setattr(runlog.secrets, 'token_hex', lambda n: next(tokens))
    class Clock(runlog.datetime):
        @classmethod
        def now(cls, tz=None): return cls(2026, 1, 1, tzinfo=tz)
    monkeypatch.setattr(runlog, 'datetime', Clock)
    for seed in (0, 1): assert command('--data', tree, *TINY, '--seed', seed)[0] == 0
    df = runlog.load(tmp_path / 'results' / 'runs.csv')
    assert df.run_id.tolist() == ['20260101T000000Z-same', '20260101T000000Z-next'] and df.seed.tolist() == [0, 1]
    assert {p.stem for p in (tmp_path / 'results' / 'curves').iterdir()} == set(df.run_id)


def test_a_clock_set_back_while_a_run_is_on_changes_no_duration(tree, command, tmp_path, monkeypatch):
    import time
    real, start = time.time, time.time()
    monkeypatch.setattr(time, 'time', lambda: 2 * start - real())  # runs backwards
    assert command('--data', tree, *TINY)[0] == 0
    r = runlog.load(tmp_path / 'results' / 'runs.csv').iloc[0]
    assert r.status == 'ok' and 0 < r.median_epoch_seconds < r.fit_seconds and r.images_per_second > 0
