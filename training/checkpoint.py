"""Keeps the state of a run after an epoch in results/checkpoints/<run_id>.pt, until the run is recorded.

The random numbers of an epoch are a function of (seed, epoch). So the weights, the optimizer and the measurements so
far are the whole state: a run that was stopped and continued is the run that was never stopped, to the bit on a CPU.
"""
import hashlib
import io
import sys
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from filelock import FileLock, Timeout

import runlog
from command import Busy, UsageError, in_a_line, is_stop, lack_of_memory, say
from experiments import Config, as_written_now, knobs
from training import distributed

FORMAT = 'checkpoint 1'
MADE_WITH = 'device', 'torch', 'git_commit'
SHORT_SECONDS = 60  # Runs that take less keep no checkpoint unless one is asked for.
FOR_LIFE = knobs(for_life=True)  # A run keeps these for life. Its images are known by their fingerprint.
BEFORE = {f.name: f.metadata['before'] for f in fields(Config)}  # for a checkpoint that is older than a knob


class Found(NamedTuple):
    "Holds a checkpoint that a run continues from."
    file: Path
    state: dict
    held: FileLock | None  # the lock of the file, which only the first of the processes that train together has


class Checkpoint(Callback):
    """Writes the state of the fit to `file` after every `every` epochs but the last; continues from a checkpoint.

    identity  what the file says of the run beside its state; on resume, whatever has changed since is printed
    every     None: after each epoch, in runs of more than a minute in all; 0: never
    found     the checkpoint to continue from; None: the fit starts from the beginning

    Where several processes train together, the first one writes. Where a state cannot be written, it prints why, the
    state before stays, and the fit goes on. It raises Busy if another process of this machine or file system holds the
    lock of the file.
    """
    order = ProgressCallback.order + 20  # It comes after all callbacks whose state it keeps.

    def __init__(self, file, identity, every=None, found=None):
        self.file, self.identity, self.every = file, identity, every
        self.state = found.state if found else None
        self.held = found.held if found else None
        changed = differences(found.state, identity) if found else ''
        if changed and distributed.is_rank_0():
            say(f'{file}: its epochs so far had {changed}; the row will have the new values', file=sys.stderr)

    def before_fit(self):
        if not self.state: return
        self.learn.first_epoch = self.state['epoch']
        try:
            self.learn.model.load_state_dict(self.state['model'])
            load_optimizer_state(self.learn.opt, self.state['optimizer'])
            if self.state['scaler']: self.learn.scaler.load_state_dict(self.state['scaler'])
        except (RuntimeError, ValueError, KeyError) as e:
            if lack_of_memory(e): raise
            why = ' '.join(str(e).split())[:200]
            raise UsageError(f'{self.file}: does not fit this code ({why}); remove it to start the run anew') from None
        smooth = self.learn.recorder.smooth_loss
        smooth.count, smooth.val = self.state['smooth_loss']
        self.learn.measure.restore(self.state['measured'])
        self.state.clear()  # It is as large as the model and its optimizer, and whoever found it still has it.

    def after_epoch(self):
        if self.is_due() and distributed.is_rank_0(): self.write()

    def is_due(self):
        "Returns whether the state of this epoch is to be written."
        done, measure = self.epoch + 1, self.learn.measure
        if done == self.n_epoch or measure.diverged: return False
        if self.every is None: return measure.total_seconds() / done * self.n_epoch >= SHORT_SECONDS
        return self.every > 0 and done % self.every == 0

    def write(self):
        "Writes the state of the fit after this epoch, or prints why it could not be written."
        smooth, scaler = self.learn.recorder.smooth_loss, getattr(self.learn, 'scaler', None)
        try:
            state = dict(
                epoch=self.epoch + 1, model=self.learn.model.state_dict(), optimizer=optimizer_state(self.learn.opt),
                scaler=scaler.state_dict() if scaler else {}, smooth_loss=(smooth.count, smooth.val),
                measured=self.learn.measure.state())
            buffer = io.BytesIO()  # Where torch.save writes to a file itself, it does not say that the disk is full.
            torch.save(dict(format=FORMAT, **self.identity, **state), buffer)
            if not self.held: self.held = lock(self.file)
            with runlog.replacing(self.file, 'wb') as f: f.write(buffer.getbuffer())
        except Exception as e:  # What a layer's own state raises has no end.
            if is_stop(e) or isinstance(e, UsageError): raise
            say(f'{self.file}: could not be written ({in_a_line(e)}); the run goes on', file=sys.stderr)

    def release(self):
        "Lets other processes have the run."
        if self.held: self.held.release()


def path(results, run_id): return Path(results) / 'checkpoints' / f'{run_id}.pt'


# --- one process at a time ---

def lock(file, wait=10):
    """Returns the lock of a checkpoint, held; raises Busy if another process holds it.

    The system takes the lock back from a process that dies. `wait`: seconds, since the loader processes of a run that
    was killed hold it for a while longer.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try: held = runlog.take_lock(file.with_suffix('.lock'), wait)
    except Timeout as e:
        hint = f'; if none is, remove {e.lock_file}' if e.lock_file.endswith('.held') else ''
        raise Busy(f'{file}: another process is already training this run{hint}') from None
    return held


def unlock(file, held):
    "Releases the lock of a checkpoint; removes it where the checkpoint is gone, as locking it has made it anew."
    held.release()
    if not file.exists(): remove(file)


@contextmanager
def claim(cfg, data_fingerprint, results):
    """Keeps other processes from the run of a settled `cfg` on the data; raises Busy if one has it.

    The id of the run does not matter. So where several loops go over the same runs, one of them trains each run.
    """
    run = [data_fingerprint, *(getattr(cfg, key) for key in FOR_LIFE)]
    name = hashlib.sha256(repr(run).encode()).hexdigest()[:12]
    file = Path(results) / 'checkpoints' / f'{name}.claim'
    held = lock(file)
    try: yield
    finally:
        remove(file)
        held.release()


def remove(file):
    "Removes a checkpoint, or a claim, and its lock, as far as they can be removed."
    for each in (file, file.with_suffix('.lock')):
        with suppress(OSError): each.unlink(missing_ok=True)


# --- finding and reading ---

def tidy(runs, results):
    "Removes the checkpoints and locks of those `runs` of the record that are done: kill -9 after the row leaves some."
    done = set(runs.run_id[runs.status.isin(runlog.DONE)])
    for file in (Path(results) / 'checkpoints').glob('*'):
        if file.suffix in ('.pt', '.lock') and file.stem in done: remove(file.with_suffix('.pt'))


def find(cfg, data_fingerprint, runs, results, device='cpu'):
    """Returns the checkpoint of the run of a settled `cfg` on the data that went furthest, or None.

    `runs`: the record; the checkpoint of a run that is done there does not count. The one that is returned has been
    read whole, with its tensors on `device`, and its lock is held. A file that cannot be read is named and left
    alone. Raises Busy if another process is training the run, or has just finished it.
    """
    done = set(runs.run_id[runs.status.isin(runlog.DONE)])
    epochs = {}
    for file in sorted((Path(results) / 'checkpoints').glob('*.pt')):
        try: state = peek(file)
        except UsageError as e:
            if file.exists(): say(f'{e}; it is left alone', file=sys.stderr)  # else its run has just been finished
            continue
        same_data = state['data_fingerprint'] == data_fingerprint
        old = BEFORE | state['config']
        old['sa_at'] = as_written_now(old['attention'], old['sa_at'])
        same_config = all(old[key] == getattr(cfg, key) for key in FOR_LIFE)
        if same_data and same_config and state['run_id'] not in done: epochs[file] = state['epoch']
    for file in sorted(epochs, key=epochs.get, reverse=True):
        held = lock(file)
        try: return Found(file, load(file, device), held)
        except UsageError as e:
            unlock(file, held)
            if not file.exists():
                raise Busy(f'{file}: is gone, another process has just finished this run') from None
            say(f'{e}; it is left alone', file=sys.stderr)
        except BaseException:
            held.release()
            raise
    return None


def load(file, device='cpu'):
    "Returns what a checkpoint holds, its tensors on `device`; raises UsageError if it is damaged or not a checkpoint."
    def read():
        content = io.BytesIO(file.read_bytes())
        if zipfile.ZipFile(content).testzip(): raise zipfile.BadZipFile('its checksum is wrong')
        content.seek(0)
        return torch.load(content, map_location=device, weights_only=True)
    return _checked(file, read)


def peek(file):
    "Returns what a checkpoint holds, as `load` does, but leaves the tensors unread: damage in them goes unseen."
    return _checked(file, lambda: torch.load(file, weights_only=True, mmap=True, map_location='cpu'))


def _checked(file, read):
    "Returns what read() returns; raises UsageError unless that is the content of a checkpoint."
    try: state = read()
    except FileNotFoundError:
        hint = 'several machines that train one run need one results folder'
        raise UsageError(f'{file}: is not there; {hint}') from None
    except Exception as e:  # A damaged file makes torch and pickle raise anything, also AssertionError.
        if lack_of_memory(e): raise  # It is not the file: a run that began anew would lose its epochs.
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UsageError(f'{file}: is cut off or not a checkpoint ({why})') from None
    if not isinstance(state, dict) or state.get('format') != FORMAT:
        raise UsageError(f'{file}: is not a checkpoint of this version')
    return state


# --- the identity of a run ---

def identity(cfg, row):
    "Returns which run a checkpoint is of, and with which code and on which machine it was made."
    names = 'data_fingerprint', 'run_id', 'started', 'resumed', *MADE_WITH
    return dict(config=asdict(cfg)) | {name: row[name] for name in names}


def differences(old, new):
    """Returns what differs between two identities of a run, with the old values: 'loader workers, torch 2.13.0'.

    Only what a run may change on its way is compared. A value that is not known is no difference.
    """
    pairs = [(key, old['config'].get(key), new['config'][key]) for key in knobs(role='speed')]
    pairs += [(key, old.get(key), new[key]) for key in MADE_WITH]
    known = [(key, a, b) for key, a, b in pairs if not {a, b} & {None, ''}]
    return ', '.join(f'{key} {a}' for key, a, b in known if a != b)


# --- the optimizer ---

HYPERPARAMETERS = 'hypers', 'param_groups'  # The schedule sets them at each step, so they are no part of the state.


def optimizer_state(opt):
    "Returns what an optimizer of fastai or torch keeps of each parameter, as dicts, lists and tensors."
    return _plain({key: value for key, value in opt.state_dict().items() if key not in HYPERPARAMETERS})


def load_optimizer_state(opt, state):
    """Puts an `optimizer_state` back into `opt`, whose hyperparameters stay.

    Each tensor gets the memory format that its parameter has now.
    """
    now = opt.state_dict()
    opt.load_state_dict(state | {key: now[key] for key in HYPERPARAMETERS if key in now})
    for p, kept in getattr(opt, 'opt', opt).state.items():
        for key, value in kept.items():  # A fused kernel goes through all of them in the order of the memory.
            if isinstance(value, torch.Tensor) and value.shape == p.shape: kept[key] = torch.empty_like(p).copy_(value)


def _plain(x):
    "Returns `x` with fastcore's L and other sequences as lists."
    if isinstance(x, dict): return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, torch.Tensor) or not hasattr(x, '__iter__'): return x
    return [_plain(value) for value in x]
