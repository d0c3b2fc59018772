"""The runs of an experiment on Ray, a task a run: on this machine, or on a cluster.

A task trains as `run.run` does, with its curve, predictions and checkpoint in the results folder where its node shares
that, and hands its row to the process that asked for it, which alone writes runs.csv. Ray tries a run again whose worker
or node has died: from its last checkpoint where the folder is shared, else anew. A run has as many threads as cores of its
own, or OMP_NUM_THREADS: on a CPU its numbers are those of a plain run with as many, to the bit.
"""
import os
import signal
import socket
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import runlog
from command import Busy, Stopped, UsageError, is_stop, undisturbed

TRIES = 4  # of a run whose workers die
PATIENCE = 120  # seconds for the runs under way to hand over their rows at the end by a signal


@dataclass
class Outcome:
    "What a task hands over. `files`: {path in the results folder: bytes}, where the task could not write them there itself."
    row: dict = None
    files: dict = field(default_factory=dict)
    error: str = None    # why the run failed
    mistake: str = None  # of the user: no other run would do better
    busy: str = None     # another process is at the run


class Cluster:
    """Ray at `address` (None: one of this machine's own, for as long as this process lives), with that much of it for a run.

    `cpus`: cores, for the threads and the loader processes of a run, each; `gpus`: may be a fraction, of a GPU that runs share; None:
    one, where there is any. Raises UsageError without ray, or where there is no cluster at `address`.
    """
    def __init__(self, address, results, cpus=1, gpus=None):
        os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # it would report to its makers
        try:
            import ray
        except ImportError: raise UsageError('--ray: needs ray: pip install -r requirements-cluster.txt') from None
        self.ray, self.results, self.cpus = ray, Path(results).resolve(), cpus
        here = {key: os.environ[key] for key in ('FASTAI_HOME', 'OMP_NUM_THREADS') if key in os.environ}
        code = dict(working_dir=str(Path(__file__).parent.parent), excludes=['/*/', '!/training/', '*.pt'], env_vars=here)
        own = {} if address else dict(include_dashboard=False)
        try:
            if address: reach(address)
            ray.init(address=address or 'local', runtime_env=code, log_to_driver=True, logging_level='error', **own)
        except Exception as e:  # ray raises that too, where it gives up
            where = f'{address}: no Ray there' if address else 'Ray does not start here'
            raise UsageError(f'--ray {where} ({" ".join(str(e).split())})') from None
        resources = ray.cluster_resources()
        self.gpus = gpus if gpus is not None else min(1, resources.get('GPU', 0))
        for what, wanted in (('CPU', cpus), ('GPU', self.gpus)):
            if not address and wanted > (there := resources.get(what, 0)):
                raise UsageError(f'--{what.lower()}s-per-run {wanted:g}: this machine has {there:g}')
        self.provenance = {key: value for key, value in runlog.provenance().items() if key.startswith('git_')}  # nodes get no .git

    @property
    def device(self):
        "What the runs are on."
        import torch
        return torch.device('cuda' if self.gpus else 'cpu')

    def each(self, todo, checkpoint_every=None):
        """Train `todo`, [(arm, Config)], as many at once as there is room for; yields (arm, cfg, the error of a run that failed or was
        not begun, or None) as each ends. Left early, it stops the runs under way and takes their rows."""
        task = self.ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=TRIES - 1, max_calls=1)(train_run)
        with self.mark() as mark:
            pending = {task.remote(self.for_node(cfg), self.results, mark, checkpoint_every): (arm, cfg) for arm, cfg in todo}
            try:
                while pending:
                    (ref,), _ = self.ray.wait(list(pending))
                    with undisturbed():
                        arm, cfg = pending.pop(ref)
                        error = self.receive(ref)
                    yield arm, cfg, error
            finally: self.stop(list(pending))

    def stop(self, refs):
        "Stop tasks, and take the rows of those that had begun."
        with undisturbed():
            for ref in refs: self.ray.cancel(ref)
            ended, silent = self.ray.wait(refs, num_returns=len(refs), timeout=PATIENCE) if refs else ([], [])
            for ref in ended:
                try: self.receive(ref)
                except UsageError as e: print(e, file=sys.stderr)
            if silent: print(f'{len(silent)} runs did not end in {PATIENCE} s: they have no row', file=sys.stderr)

    def for_node(self, cfg):
        "`cfg` for a node: an absolute folder, as many loader processes as cores."
        workers = cfg.workers if cfg.workers >= 0 else max(1, int(self.cpus))
        return replace(cfg, workers=workers, data=str(Path(cfg.data).resolve()) if cfg.data else '')

    @contextmanager
    def mark(self):
        "The name of a file in the results folder, by which a node tells whether it shares the folder."
        self.results.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.results, prefix='.ray-') as f: yield Path(f.name).name

    def receive(self, ref):
        "Record what a task hands over, the row first; returns the error of a run that failed or was not begun, or None."
        from training.run import record  # needs torch, which takes seconds
        try: out = self.ray.get(ref)
        except self.ray.exceptions.TaskCancelledError: return None  # had not begun
        except self.ray.exceptions.RayError as e: return f'{type(e).__name__}: {str(e).splitlines()[0]}'
        if out.row: record(out.row | self.provenance, self.results)
        try: runlog.write_files(out.files, self.results)
        except OSError as e: print(f'{out.row["run_id"]}: its curve or predictions could not be written ({e})', file=sys.stderr)
        if out.mistake: raise UsageError(out.mistake)
        return Busy(out.busy) if out.busy else out.error


def reach(address, wait=10):
    "Raise OSError where nothing answers at host:port, in `wait` seconds: Ray would try for minutes."
    host, _, port = address.removeprefix('ray://').rpartition(':')
    if host and port.isdigit(): socket.create_connection((host.strip('[]'), int(port)), wait).close()


def train_run(cfg, results, mark, checkpoint_every):
    "The task, in a process of its own on a node: an Outcome."
    from training.run import run
    signal.signal(signal.SIGINT, lambda number, _: setattr(Stopped, 'by', number))  # Ray cancels by it: the run ends before its next batch
    out, shared = Outcome(), (results / mark).exists()
    with nullcontext(results) if shared else tempfile.TemporaryDirectory() as folder:
        def hand_over(row):
            out.row = row
            if not shared: out.files = runlog.files_of(row['run_id'], folder)
        try: run(cfg, folder, resume=True, checkpoint_every=checkpoint_every, hand_over=hand_over)
        except Busy as e: out.busy = str(e)
        except UsageError as e: out.mistake = str(e)
        except BaseException as e:
            if not is_stop(e): out.error = repr(e)
    return out
