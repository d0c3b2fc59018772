"""Starts a script of this repository in a copy of a process that has torch and fastai imported already.

The imports take six seconds of a core, at each start of the many that the tests need.
"""
import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from multiprocessing.reduction import DupFd

import xresnet

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['training.run', 'training.loop', 'report.compare', 'report.tables', 'report.trial'])


class Warm:
    """Runs `argv` (a script and its arguments) as a process of its own, in a group of its own, with pipes as text.

    It has the part of subprocess.Popen that the tests use. `env` is the whole environment of the process; `widths`, if
    given, are those of the stages of its networks.
    """
    def __init__(self, argv, env, widths=None):
        (out, its_out), (err, its_err) = os.pipe(), os.pipe()
        self.process = SERVER.Process(target=run_script, args=(argv, env, widths, DupFd(its_out), DupFd(its_err)))
        self.process.start()
        for fd in (its_out, its_err): os.close(fd)
        self.stdout, self.stderr, self.pid = os.fdopen(out), os.fdopen(err), self.process.pid

    @property
    def returncode(self): return self.process.exitcode
    def poll(self): return self.process.exitcode
    def send_signal(self, number): os.kill(self.pid, number)
    def terminate(self): self.send_signal(signal.SIGTERM)
    def kill(self): self.send_signal(signal.SIGKILL)

    def wait(self, timeout=None):
        "Returns the exit code; raises TimeoutExpired."
        self.process.join(timeout)
        if self.returncode is None: raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        "Returns what is left of (stdout, stderr), once all that write there have ended; raises TimeoutExpired."
        texts = {}
        def read(stream): texts[stream] = stream.read()
        readers = [threading.Thread(target=read, args=[stream], daemon=True) for stream in (self.stdout, self.stderr)]
        for reader in readers: reader.start()
        for reader in readers: reader.join(timeout)
        if any(reader.is_alive() for reader in readers): raise subprocess.TimeoutExpired(self.process.name, timeout)
        self.wait(timeout)
        return texts[self.stdout], texts[self.stderr]


def run_script(argv, env, widths, out, err):
    "Becomes the process of the script, with its streams, its environment and its group; ends as Python ends."
    os.setsid()
    for stream, fd in ((os.open(os.devnull, os.O_RDONLY), 0), (out.detach(), 1), (err.detach(), 2)): os.dup2(stream, fd)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w', buffering=1)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if widths: xresnet.WIDTHS = widths
    sys.argv = argv
    try: runpy.run_path(argv[0], run_name='__main__')
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
