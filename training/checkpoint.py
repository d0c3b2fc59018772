"""Where a run stands after an epoch, kept in results/checkpoints/<run_id>.pt until the run is recorded.

The random numbers of an epoch are a function of (seed, epoch), so weights, optimizer and what was measured so far are all
there is to a run: continued, it is the run that was never stopped, to the bit on a CPU.
"""
import hashlib
import io
import sys
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import rank_distrib
from filelock import Timeout

import runlog
from command import Busy, UsageError
from experiments import knobs

FORMAT = 'checkpoint 1'
MADE_WITH = 'device', 'torch', 'git_commit'
SHORT = 60  # seconds: shorter runs keep no checkpoint unless asked to
KEPT = knobs(for_life=True)  # a run keeps these for life; its images are known by their fingerprint


class Checkpoint(Callback):
    """Keeps the state of the fit in `file` after every `every` epochs but the last; `resume`: starts from what is there.

    `every`: None is each epoch of a run of more than a minute in all; 0 is never. `identity`: what the file says of the run
    beside the state; what of it was another when the file was written is told. A state that cannot be written is told, and the one
    before it stays. Of several processes the first writes.
    Raises UsageError if another run of this machine or file system is at the file, or if it cannot be read.
    """
    order = ProgressCallback.order + 20  # after what it keeps the state of
    def __init__(self, file, identity, every=None, resume=False, device='cpu'):
        self.file, self.identity, self.every = file, identity, every
        self.held = lock(file) if resume and not rank_distrib() else None
        if resume and not file.exists(): raise UsageError(f'{file}: is gone, another process has just finished this run')
        self.state = load(file, device) if resume else None
        if resume and not rank_distrib() and (changed := differences(self.state, identity)):
            print(f'{file}: its epochs so far had {changed}; the row will have what it goes on with', file=sys.stderr)

    def before_fit(self):
        if not self.state: return
        self.learn.first_epoch = self.state['epoch']
        try:
            self.learn.model.load_state_dict(self.state['model'])
            load_optimizer_state(self.learn.opt, self.state['optimizer'])
            if self.state['scaler']: self.learn.scaler.load_state_dict(self.state['scaler'])
        except (RuntimeError, ValueError, KeyError) as e:
            why = ' '.join(str(e).split())[:200]
            raise UsageError(f'{self.file}: does not fit this code ({why}); without it the run starts anew') from None
        smooth = self.learn.recorder.smooth_loss
        smooth.count, smooth.val = self.state['smooth_loss']
        self.learn.measure.restore(self.state['measured'])
        self.state = None  # as large as the model and its optimizer

    def after_epoch(self):
        if self.due() and not rank_distrib(): self.write()

    def due(self):
        "Whether to keep this epoch's state."
        done, measure = self.epoch + 1, self.learn.measure
        if done == self.n_epoch or measure.diverged: return False
        if self.every is None: return measure.seconds() / done * self.n_epoch >= SHORT
        return self.every > 0 and done % self.every == 0

    def write(self):
        learn, smooth, scaler = self.learn, self.learn.recorder.smooth_loss, getattr(self.learn, 'scaler', None)
        state = dict(epoch=self.epoch + 1, model=learn.model.state_dict(), optimizer=optimizer_state(learn.opt), scaler=
                     scaler.state_dict() if scaler else {}, smooth_loss=(smooth.count, smooth.val), measured=learn.measure.state())
        buffer = io.BytesIO()  # torch.save to a file tells of a full disk in riddles
        torch.save(dict(format=FORMAT, **self.identity, **state), buffer)
        try:
            self.held = self.held or lock(self.file)
            with runlog.replacing(self.file, 'wb') as f: f.write(buffer.getbuffer())
        except OSError as e: print(f'{self.file}: not written ({e}); going on', file=sys.stderr)

    def release(self):
        "Let another process have the run."
        if self.held: self.held.release()


def path(results, run_id): return Path(results) / 'checkpoints' / f'{run_id}.pt'


def remove(file):
    "A checkpoint and its lock, as far as they can be removed."
    for each in (file, file.with_suffix('.lock')):
        with suppress(OSError): each.unlink(missing_ok=True)


def lock(file, wait=10):
    """The lock of a checkpoint, taken; the system takes it back from a process that dies. Raises Busy if it is held.

    `wait`: seconds, as the loader processes of a run that was killed hold it for some more.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try: held = runlog.take_lock(file.with_suffix('.lock'), wait)
    except Timeout: raise Busy(f'{file}: another process is at this run') from None
    return held


@contextmanager
def claim(cfg, digest, results):
    "Have the run of a settled `cfg` on the data `digest`, whichever its id: of several loops one trains it. Raises Busy."
    name = hashlib.sha256(repr([digest, *(getattr(cfg, key) for key in KEPT)]).encode()).hexdigest()[:12]
    file = Path(results) / 'checkpoints' / f'{name}.claim'
    held = lock(file)
    try: yield
    finally:
        remove(file)
        held.release()


def load(file, device='cpu', check=True):
    """The state in a checkpoint; UsageError if it is cut off, damaged or no checkpoint at all.

    `check`: read all of it now; else it is read where it is used, and damage in it goes unseen.
    """
    try:
        if check and zipfile.ZipFile(file).testzip(): raise zipfile.BadZipFile('its checksum is wrong')
        state = torch.load(file, map_location=device, weights_only=True, mmap=not check)
    except Exception as e:  # what a damaged file makes torch and pickle raise has no end: also AssertionError, TypeError, AttributeError
        raise UsageError(f'{file}: cut off or no checkpoint ({str(e).splitlines()[0] if str(e) else type(e).__name__})') from None
    if not isinstance(state, dict) or state.get('format') != FORMAT: raise UsageError(f'{file}: not a checkpoint of this version')
    return state


def identity(cfg, row):
    "Which run a checkpoint is of and what it was made with: settings, data, id and start, the code and the machine."
    return dict(config=asdict(cfg)) | {key: row[key] for key in ('data_fingerprint', 'run_id', 'started', 'resumed', *MADE_WITH)}


def differences(old, new):
    "What of an `identity` a run may change on its way, and did: 'loader workers, torch 2.13.0', the `old` ones."
    pairs = [(key, old['config'].get(key), new['config'][key]) for key in knobs(role='speed') if key != 'workers']
    pairs += [(key, old.get(key), new[key]) for key in MADE_WITH]
    return ', '.join(f'{key} {a}' for key, a, b in pairs if a != b and None not in (a, b) and '' not in (a, b))  # blank: not known


def find(cfg, digest, results):
    """(file, what it holds) of the run of a settled `cfg` on the data `digest` that went furthest; None if there is none.

    A file that cannot be read is told and left alone. A checkpoint whose run is recorded already is removed.
    """
    folder, fits = Path(results) / 'checkpoints', []
    files = sorted(folder.glob('*.pt')) if folder.exists() else []
    record = runlog.load(Path(results) / 'runs.csv') if files else None
    for file in files:
        try: state = load(file, check=False)
        except UsageError as e:
            if file.exists(): print(f'{e}; left alone', file=sys.stderr)  # else its run has just been finished by another process
            continue
        if state['run_id'] in set(record.run_id[record.status.isin(runlog.DONE)]): remove(file)
        elif state['data_fingerprint'] == digest and all(state['config'].get(k) == getattr(cfg, k) for k in KEPT):
            fits.append((file, state))
    for file, state in sorted(fits, key=lambda fit: -fit[1]['epoch']):
        try: load(file)
        except UsageError as e: print(f'{e}; left alone', file=sys.stderr)
        else: return file, state
    return None


# --- the optimizer ---

HYPERPARAMETERS = 'hypers', 'param_groups'  # set by the schedule at each step


def optimizer_state(opt):
    "What an optimizer of fastai or torch keeps of each parameter, as dicts, lists and tensors."
    return _plain({key: value for key, value in opt.state_dict().items() if key not in HYPERPARAMETERS})


def load_optimizer_state(opt, state):
    now = opt.state_dict()
    opt.load_state_dict(state | {key: now[key] for key in HYPERPARAMETERS if key in now})


def _plain(x):
    "`x` with fastcore's L and other sequences as lists."
    if isinstance(x, dict): return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, torch.Tensor) or not hasattr(x, '__iter__'): return x
    return [_plain(value) for value in x]
