"""Trains the runs of an experiment side by side on this machine, without Ray: N processes, one run at a time in each.

On a CPU each process has one thread (or OMP_NUM_THREADS), so that N runs share N cores: two runs with a thread each
train more images a second than one run with two. The numbers of a run are those of a plain run with as many threads,
to the bit. Each process writes its own rows. What ends the first process, even kill -9, ends the others too: each
records that its run was interrupted.
"""
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait

from command import (
    ENDING,
    ROW_SECONDS,
    Busy,
    UsageError,
    is_stop,
    lack_of_memory,
    say,
    stop_on_signals,
    undisturbed,
)
from training.host import n_cores


class Jobs:
    "Trains runs on `device` in `n` processes, which write their rows into `results`."
    def __init__(self, n, results, device): self.n, self.results, self.device = n, results, device

    def each(self, todo, checkpoint_every=None):
        """Trains `todo`, [(arm, Config)], n at once; yields (arm, cfg, error) as each ends.

        The error is that of a run that failed or was not begun, else None. A mistake of the user ends them all.
        Left early, the generator ends the runs under way and waits for their rows.
        """
        waiting, workers = [(arm, self.with_share(cfg)) for arm, cfg in reversed(todo)], []
        try:
            for _ in range(min(self.n, len(todo))): workers.append(self.start(waiting.pop(), checkpoint_every))
            while busy := [worker for worker in workers if worker.task]:
                ready = wait([worker.answers for worker in busy])
                for worker in [worker for worker in busy if worker.answers in ready]:
                    arm, cfg = worker.task
                    error = worker.receive()
                    if waiting and worker.has_ended: workers.append(self.start(waiting.pop(), checkpoint_every))
                    elif waiting: worker.give(waiting.pop())
                    if isinstance(error, UsageError) and not isinstance(error, Busy): raise error
                    yield arm, cfg, error
        finally: self.stop(workers)

    def start(self, task, checkpoint_every):
        "Starts a process with its first task."
        here = dict(RUNS_SIDE_BY_SIDE=str(self.n))
        if self.device.type == 'cpu': here['OMP_NUM_THREADS'] = os.environ.get('OMP_NUM_THREADS', '1')
        with environment(here), signals_held(): worker = Worker(self.results, self.device, checkpoint_every)
        worker.give(task)
        return worker

    def with_share(self, cfg):
        "Returns `cfg` with this process's part of the cores as loader processes, where it does not say how many."
        if cfg.workers >= 0: return cfg
        return replace(cfg, workers=min(8, max(1, n_cores() // self.n)))

    def stop(self, workers):
        "Ends the processes: at once those that are idle, the others when they have written their rows."
        with undisturbed():
            for worker in workers: worker.tasks.close()
            end = time.monotonic() + ROW_SECONDS
            for worker in workers: worker.process.join(max(0, end - time.monotonic()))
            silent = [worker for worker in workers if worker.process.is_alive()]
            for worker in silent: worker.process.kill()
            if silent: say(f'{len(silent)} runs did not end in {ROW_SECONDS} s: they have no row', file=sys.stderr)


class Worker:
    "Has a process that trains what it is given. `task`: what it is training, (arm, Config), or None."
    def __init__(self, results, device, checkpoint_every):
        context = multiprocessing.get_context('spawn')  # a forked one would have this process's threads and CUDA state
        (tasks, self.tasks), (self.answers, answers) = (context.Pipe(duplex=False) for _ in range(2))
        self.process = context.Process(target=train_tasks, args=(tasks, answers, results, device, checkpoint_every))
        self.process.start()
        tasks.close()
        answers.close()
        self.task, self.has_ended = None, False

    def give(self, task):
        self.task = task
        try: self.tasks.send(task)
        except OSError: pass  # it has died: receive() says so

    def receive(self):
        "Returns the error of the run that has ended, or None."
        self.task = None
        try:
            error, self.has_ended = self.answers.recv()
            return error
        except EOFError:
            self.has_ended = True
            self.process.join()
            return f'its process ended early (exit code {self.process.exitcode}; out of memory?)'


@contextmanager
def environment(variables):
    "Has environment variables set for the block, for a process that starts in it."
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try: yield
    finally:
        for key, value in before.items():
            if value is None: del os.environ[key]
            else: os.environ[key] = value


@contextmanager
def signals_held():
    """Holds back the signals of the block.

    In a process that starts in it they are held back until it has handlers of its own, see `train_tasks`.
    """
    if not hasattr(signal, 'pthread_sigmask'): return (yield)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try: yield
    finally: signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the process ---

def train_tasks(tasks, answers, results, device, checkpoint_every):
    """Trains the tasks as they come. When the other end of `tasks` is closed, the run under way ends as by Ctrl-C.

    Ends after a run that failed, as in a process with such a fault each later use of the GPU may fail. Answers with the
    error of each run, and whether this process ends.
    """
    if hasattr(os, 'setsid'): os.setsid()  # Ctrl-C in a terminal is for the first process alone
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `listen` needs it, also where it was ignored
    stop_on_signals()
    if hasattr(signal, 'pthread_sigmask'): signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    try:
        from training.run import run
        given = queue.SimpleQueue()
        threading.Thread(target=listen, args=(tasks, given), daemon=True).start()
        while True:
            task = given.get()
            if task is None: return
            arm, cfg = task
            with labelled(f'{arm} seed {cfg.seed}: '):
                error, has_failed = None, False
                try: run(cfg, results, device, resume=True, checkpoint_every=checkpoint_every)
                except UsageError as e: error = e
                except Exception as e:
                    if is_stop(e): raise
                    error, has_failed = lack_of_memory(e) or repr(e), True
            answers.send((error, has_failed))
            if has_failed: return
    except BaseException as e:
        if not is_stop(e): raise


def listen(tasks, given):
    "Puts what comes from `tasks` into the queue `given`; ends this process as Ctrl-C would when nothing more can come."
    try:
        while True: given.put(tasks.recv())
    except (EOFError, OSError):
        main = threading.main_thread().ident
        if hasattr(signal, 'pthread_kill'): return signal.pthread_kill(main, signal.SIGINT)  # it may be waiting
        given.put(None)  # No signal wakes a thread of Windows that waits for a queue.
        signal.raise_signal(signal.SIGINT)


class Labelled:
    "Writes whole lines of text to another stream, each with a label before it."
    def __init__(self, stream, label): self.stream, self.label, self.line = stream, label, ''
    def __getattr__(self, name): return getattr(self.stream, name)

    def write(self, text):
        *lines, self.line = (self.line + text).split('\n')
        if lines: self.stream.write(''.join(f'{self.label}{line}\n' for line in lines))
        return len(text)

    def close_line(self):
        if self.line: say('', self)


@contextmanager
def labelled(label):
    "Puts a label before each line that the block prints: the lines of runs side by side come in any order."
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Labelled(stream, label) for stream in before)
    try: yield
    finally:
        for stream in (sys.stdout, sys.stderr): stream.close_line()
        sys.stdout, sys.stderr = before
