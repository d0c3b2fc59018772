"""What Linux can show of how the code does on Windows and on a Mac: names that are not there, other start methods.

Nothing here has run on either of them.
"""
import ast
import csv
import multiprocessing
import os
import queue
import signal
import subprocess
import sys

import pytest
from conftest import REPO, config

import runlog
from command import shown
from training import jobs, readers
from training.data import get_dls

OURS = [f for f in REPO.rglob('*.py') if not {'tests', '.venv'} & set(f.relative_to(REPO).parts)]
AS_ON_WINDOWS = f'''
import builtins, os, signal, sys, warnings
REPO, START = {str(REPO)!r}, builtins.__import__
sys.path[:0] = [REPO, REPO + '/scripts']
for category in EncodingWarning, FutureWarning: warnings.simplefilter('ignore', category)  # of other packages
import multiprocessing.popen_spawn_posix, multiprocessing.resource_tracker, psutil, torch
from torch.utils.data._utils import signal_handling
if __name__ == '__main__': import fastai.learner, filelock
for name in ('fork', 'forkpty', 'getloadavg', 'getpgid', 'getuid', 'geteuid', 'killpg', 'mkfifo', 'sched_getaffinity',
             'setsid', 'sysconf', 'wait3'): delattr(os, name)
for name in ('SIGCHLD', 'SIGPIPE', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGKILL', 'SIGALRM', 'pthread_sigmask',
             'pthread_kill', 'setitimer', 'sigwait'): delattr(signal, name)
signal_handling.IS_WINDOWS, multiprocessing.resource_tracker._HAVE_SIGMASK = True, False

def absent(name, globals=None, *args, **kwargs):
    ours = str((globals or {{}}).get('__file__', '')).startswith(REPO)
    if ours and name in ('fcntl', 'grp', 'posix', 'pty', 'pwd', 'resource', 'termios'): raise ModuleNotFoundError(name)
    return START(name, globals, *args, **kwargs)

builtins.__import__ = absent
'''


def test_every_text_file_is_opened_with_its_encoding():
    "By default it would be that of the system, which is cp1252 on many a Windows."
    wrong = []
    for file in OURS:
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and lacks_encoding(node):
                wrong.append(f'{file.relative_to(REPO)}:{node.lineno}: {ast.unparse(node)[:80]}')
    assert not wrong, '\n'.join(wrong)


def lacks_encoding(call):
    "Returns whether a call opens a text without an encoding, or a CSV file for writing without newline=''."
    name, given = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
    if name.split('.')[-1] in ('read_text', 'write_text'): return 'encoding' not in given
    if name.split('.')[-1] in ('run', 'Popen', 'check_output'): return 'text' in given and 'encoding' not in given
    if name not in ('open', 'gzip.open') or None in given: return False  # open(..., **options)
    modes = [arg.value for arg in call.args[1:2] if isinstance(arg, ast.Constant)]
    return not (modes and 'b' in modes[0]) and not {'encoding', 'newline'} <= given


@pytest.mark.slow(10)
def test_all_modules_and_a_training_do_without_what_windows_lacks(tree, tmp_path):
    script = tmp_path / 'as_on_windows.py'
    modules = [str(f.relative_to(REPO).with_suffix('')).replace(os.sep, '.').removeprefix('scripts.') for f in OURS]
    script.write_text(AS_ON_WINDOWS + f'''
def main():
    import importlib
    from training import readers
    readers.START_METHOD = 'spawn'
    warnings.filterwarnings('error', category=EncodingWarning, module=r'({"|".join(modules)})$')
    for name in {[m for m in modules if not m.endswith("__init__")]}: importlib.import_module(name)
    import train_imagenette
    sys.exit(train_imagenette.main(sys.argv[1:]))

if __name__ == '__main__': main()
''', encoding='utf-8')
    argv = ['--data', tree, '--size', '32', '--bs', '6', '--arch', 'xresnet18', '--epochs', '2', '--workers', '1',
            '--sa', '--results', tmp_path / 'results']
    environment = os.environ | dict(PYTHONIOENCODING='cp1252', PYTHONWARNDEFAULTENCODING='1', PYTHONUTF8='0')
    done = subprocess.run([sys.executable, script, *map(str, argv)], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    row = runlog.load(tmp_path / 'results' / 'runs.csv').iloc[0]
    assert (row.status, row.epochs_done, row.workers) == ('ok', 2, 1) and row.peak_memory_mb > 0


# --- loader processes that are not forked ---

@pytest.mark.slow(4)
def test_loader_processes_that_are_spawned_live_as_long_as_the_run_and_read_the_same(tree, monkeypatch, capfd):
    cfg = config(tree)
    def batches(dls, epoch):
        dls.train.dataset.set_epoch(epoch)
        return [tensor for dl in dls for batch in dl for tensor in batch]
    here = get_dls(cfg)
    monkeypatch.setattr(readers, 'START_METHOD', 'spawn')
    dls = get_dls(config(tree, workers=2))
    assert (here.workers, dls.workers) == (0, 2)
    seen = []
    for epoch in (1, 0, 0):
        ours, theirs = batches(here, epoch), batches(dls, epoch)
        assert len(ours) == len(theirs) and all(a.equal(b) and a.dtype == b.dtype for a, b in zip(ours, theirs))
        assert all(a.stride() == b.stride() for a, b in zip(ours, theirs))
        seen.append({child.pid for child in multiprocessing.active_children()})
    assert len(seen[0]) == 2 and seen[0] == seen[1] == seen[2]
    next(iter(dls.train))  # an epoch that is left, as by a loss that is not finite
    assert all(a.equal(b) for a, b in zip(batches(here, 2), batches(dls, 2)))
    assert capfd.readouterr() == ('', ''), 'they are quiet'


# --- small things ---

def test_a_closed_pipe_has_its_code_also_without_a_signal_for_it(monkeypatch, capfd):
    monkeypatch.delattr(signal, 'SIGPIPE')
    with capfd.disabled():
        code = 'import command, sys; sys.exit(command.exit_code("x", lambda: (_ for _ in ()).throw(BrokenPipeError)))'
        assert subprocess.run([sys.executable, '-c', code], cwd=REPO).returncode == 141


def test_a_path_on_another_drive_is_shown_whole(monkeypatch):
    def no_way(path, start): raise ValueError("path is on mount 'D:', start on mount 'C:'")
    monkeypatch.setattr(os.path, 'relpath', no_way)
    assert shown('D:/results/runs.csv') == 'D:/results/runs.csv'


def test_a_file_that_somebody_reads_is_replaced_when_it_is_free(tmp_path, monkeypatch):
    replace, refusals = os.replace, [PermissionError(), PermissionError()]
    for e in refusals: e.winerror = 5
    def refuse(*paths):
        if refusals: raise refusals.pop()
        return replace(*paths)
    monkeypatch.setattr(os, 'replace', refuse)
    with runlog.replacing(tmp_path / 'x.csv') as f: f.write('whole')
    assert (tmp_path / 'x.csv').read_text(encoding='utf-8') == 'whole' and not refusals


def test_jobs_end_with_the_first_process_where_no_signal_wakes_a_thread(monkeypatch):
    monkeypatch.delattr(signal, 'pthread_kill')
    raised = []
    monkeypatch.setattr(signal, 'raise_signal', raised.append)
    tasks, other = multiprocessing.Pipe(duplex=False)
    other.send('a task')
    other.close()
    given = queue.SimpleQueue()
    jobs.listen(tasks, given)
    assert (given.get(), given.get()) == ('a task', None) and raised == [signal.SIGINT]


# --- a cluster by SLURM ---

@pytest.mark.slow(50)
@pytest.mark.parametrize('launcher, code', [('python', 138), ('torchrun', 1)])
def test_a_job_of_slurm_ends_with_its_row_and_goes_on_when_it_is_requeued(launcher, code, tree, tmp_path):
    "The script of scripts/README.md, with a scontrol that writes down how it is called."
    text = (REPO / 'scripts' / 'README.md').read_text(encoding='utf-8')
    (script,) = [block.split('```')[0] for block in text.split('```bash\n') if block.startswith('#!/usr/bin/env bash')]
    line = next(line for line in script.splitlines() if line.startswith('python '))
    argv = ['--data', tree, '--size', 32, '--bs', 6, '--arch', 'xresnet18', '--workers', 0, '--checkpoint-every', 1,
            '--epochs', 8, '--results', tmp_path / 'results', '--resume']
    if launcher == 'torchrun':
        pytest.importorskip('accelerate')
        (flags,) = (line.split()[1:] for line in text.splitlines() if '--signals-to-handle' in line)
        flags[flags.index('4')] = '2'
        launcher = f'-m torch.distributed.run --standalone {" ".join(flags)}'
    else: launcher = ''
    ours = f'{sys.executable} {launcher} {REPO / "train_imagenette.py"} {" ".join(map(str, argv))} &'
    (tmp_path / 'job.sh').write_text(script.replace(line, ours), encoding='utf-8')
    (tmp_path / 'scontrol').write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "requeued"}\n', encoding='utf-8')
    (tmp_path / 'scontrol').chmod(0o755)
    environment = os.environ | dict(SLURM_JOB_ID='17', PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    codes = []
    for turn in range(2):
        job = subprocess.Popen(['bash', tmp_path / 'job.sh'], env=environment, stdout=subprocess.PIPE, encoding='utf-8')
        for said in job.stdout:
            if turn == 0 and said.startswith('epoch 3 '): job.send_signal(signal.SIGUSR1)
        codes.append(job.wait(100))
    assert codes == [code, 0] and (tmp_path / 'requeued').read_text(encoding='utf-8') == 'requeue 17\n'
    with open(tmp_path / 'results' / 'runs.csv', newline='', encoding='utf-8') as f:
        interrupted, whole = csv.DictReader(f)
    assert (interrupted['status'], whole['status'], whole['resumed']) == ('interrupted', 'ok', '1')
    assert interrupted['run_id'] == whole['run_id'] and int(interrupted['epochs_done']) >= 2
