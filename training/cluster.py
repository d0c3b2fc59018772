"""Trains the runs of an experiment on Ray, one task per run: on this machine, or on a cluster.

A task trains as `run.run` does and hands its row to the process that asked for it, which alone writes runs.csv. Where
its node shares the results folder, the task writes the curve, the predictions and the checkpoint there. Where a worker
or a node dies, Ray starts the run again: from its last checkpoint where the folder is shared, else from the beginning.

A run has as many threads as it has cores, or OMP_NUM_THREADS of them. On a CPU its numbers are those of a plain run
with as many threads, to the bit.
"""
import os
import signal
import socket
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import layer_source
import runlog
from command import ROW_SECONDS, Busy, Stopped, UsageError, is_stop, lack_of_memory, restored, say, undisturbed

TRIES = 4  # of a run whose workers die


@dataclass
class Outcome:
    "Holds what a task hands over."
    row: dict = None
    files: dict = field(default_factory=dict)  # {path in the results folder: bytes}, where the task cannot write there
    error: str = None    # says why the run failed
    mistake: str = None  # says what the user did wrong: no other run would do better
    busy: str = None     # says that another process is training the run


class Cluster:
    """Trains runs on the Ray cluster at `address`, or on one of this machine that lives as long as this process.

    cpus  cores of a run: it has as many threads, and as many loader processes
    gpus  GPUs of a run, or the fraction of one that runs share; None: one GPU, where there is any

    Raises UsageError where ray is not installed, and where there is no cluster at `address`.
    """

    def __init__(self, address, results, cpus=1, gpus=None):
        os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # Ray would report to its makers.
        try:
            import ray
        except ImportError: raise UsageError('--ray: needs ray: pip install -r requirements-cluster.txt') from None
        self.ray, self.results, self.cpus = ray, Path(results).resolve(), cpus
        options = dict(runtime_env=environment(gpus), log_to_driver=True, logging_level='error')
        try:
            if address:
                reach(address)
                ray.init(address=address, **options)
            else: ray.init(address='local', include_dashboard=False, **options)
        except Exception as e:  # Where Ray gives up, it raises Exception itself too.
            where = f'{address}: no Ray there' if address else 'Ray does not start here'
            raise UsageError(f'--ray {where} ({" ".join(str(e).split())})') from None
        there = ray.cluster_resources()
        self.gpus = gpus if gpus is not None else min(1, there.get('GPU', 0))
        if not address:
            for resource, flag, wanted in (('CPU', '--cpus-per-run', cpus), ('GPU', '--gpus-per-run', self.gpus)):
                n = there.get(resource, 0)
                if wanted > n: raise UsageError(f'{flag} {wanted:g}: this machine has {n:g}')
        # The nodes get no .git, so the commit is known here alone.
        self.provenance = {key: value for key, value in runlog.provenance().items() if key.startswith('git_')}

    @property
    def device(self):
        "Returns the device that the runs train on: of a node's GPUs a run sees its own alone, as the first."
        import torch
        return torch.device('cuda', 0) if self.gpus else torch.device('cpu')

    def each(self, todo, checkpoint_every=None):
        """Trains `todo`, [(arm, Config)], as many runs at once as there is room for.

        As each run ends, yields (arm, cfg, error); the error is None, or why the run failed or was not begun. Where the
        caller leaves early, it stops the runs under way and takes their rows.
        """
        task = self.ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=TRIES - 1, max_calls=1)(train_run)
        with self.mark() as mark:
            pending = {}  # {reference of a task: its (arm, Config)}
            try:
                for arm, cfg in todo:
                    files = layer_source.packed(cfg.attention, cfg.attention_file)
                    ref = task.remote(self.for_node(cfg), self.results, mark, checkpoint_every, files, self.device)
                    pending[ref] = arm, cfg
                while pending:
                    (ref,), _ = self.ray.wait(list(pending))
                    with undisturbed():
                        arm, cfg = pending.pop(ref)
                        error = self.receive(ref)
                    yield arm, cfg, error
            finally: self.stop(list(pending))

    def stop(self, refs):
        "Stops tasks, and takes the rows of those that have begun."
        if not refs: return
        with undisturbed():
            for ref in refs: self.ray.cancel(ref)
            ended, silent = self.ray.wait(refs, num_returns=len(refs), timeout=ROW_SECONDS)
            for ref in ended:
                try: self.receive(ref)
                except UsageError as e: say(e, file=sys.stderr)
            if silent:
                say(f'{len(silent)} runs did not end in {ROW_SECONDS} s: they have no row', file=sys.stderr)

    def for_node(self, cfg):
        "Returns `cfg` for a node, with an absolute folder and as many loader processes as cores."
        workers = cfg.workers if cfg.workers >= 0 else max(1, int(self.cpus))
        return replace(cfg, workers=workers, data=str(Path(cfg.data).resolve()) if cfg.data else '')

    @contextmanager
    def mark(self):
        "Makes a file in the results folder and gives its name: a node that finds it shares the folder."
        self.results.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.results, prefix='.ray-') as f: yield Path(f.name).name

    def receive(self, ref):
        """Records what a task hands over, the row first; returns why the run failed or was not begun, or None.

        Raises UsageError after a mistake of the user.
        """
        from training.run import keep  # It needs torch, which takes seconds.
        try: out = self.ray.get(ref)
        except self.ray.exceptions.TaskCancelledError: return None  # It had not begun.
        except self.ray.exceptions.RayError as e: return f'{type(e).__name__}: {str(e).splitlines()[0]}'
        if out.row: keep(out.row | self.provenance, self.results)
        try: runlog.write_files(out.files, self.results)
        except OSError as e:
            say(f'{out.row["run_id"]}: its curve or predictions could not be written ({e})', file=sys.stderr)
        if out.mistake: raise UsageError(out.mistake)
        return Busy(out.busy) if out.busy else out.error


def environment(gpus):
    """Returns what Ray gives each node: the top files of this repository, training/ and some variables.

    All other folders stay here, such as results/ and .venv/, and so do the files of models. `gpus`: those of a run.
    """
    code = dict(working_dir=str(Path(__file__).parent.parent), excludes=['/*/', '!/training/', '*.pt'])
    names = 'FASTAI_HOME', 'OMP_NUM_THREADS'
    variables = {name: os.environ[name] for name in names if name in os.environ}
    return code | dict(env_vars=variables | dict(RUNS_SIDE_BY_SIDE=str(int(1 / gpus) if gpus else 1)))


def reach(address, wait=10):
    "Raises OSError unless something answers at host:port within `wait` seconds; Ray would try for minutes."
    host, _, port = address.removeprefix('ray://').rpartition(':')
    if host and port.isdigit(): socket.create_connection((host.strip('[]'), int(port)), wait).close()


def train_run(cfg, results, mark, checkpoint_every, layer_files=None, device=None):
    """Trains a run on `device` in a process of its own on a node; returns an Outcome.

    `layer_files` are those of a layer from a file (layer_source.packed), for a node that does not have them.
    """
    from training.run import run
    out, is_shared = Outcome(), (results / mark).exists()

    def hand_over(row):
        out.row = row | dict(attention_file=cfg.attention_file)  # as it is where the run was asked for
        if not is_shared: out.files = runlog.files_of(row['run_id'], folder)

    with restored(), tempfile.TemporaryDirectory() as own:
        folder = results if is_shared else own
        signal.signal(signal.SIGINT, stop_at_next_batch)  # Ray cancels a task by SIGINT.
        try:
            here = layer_source.unpacked(cfg, layer_files or {}, own)
            run(here, folder, device, resume=True, checkpoint_every=checkpoint_every, hand_over=hand_over)
        except Busy as e: out.busy = str(e)
        except UsageError as e: out.mistake = str(e)
        except SystemExit: raise  # By SIGTERM, as its node ends: Ray tries the run again.
        except BaseException as e:
            if not is_stop(e): out.error = lack_of_memory(e) or repr(e)
    return out


def stop_at_next_batch(number, frame): Stopped.by = number
