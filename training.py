"""One run: Config -> DataLoaders -> model -> Learner -> a row of results/runs.csv.

    row = run(Config(dataset='digits', size=32, arch='xresnet18', attention='simple'))
    model, vocab = load_model('digits.pt')      # where run(..., save='digits.pt') left it, ready for inference
"""
import collections
import contextlib
import gc
import json
import math
import os
import resource
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import valley
from fastai.learner import AvgSmoothLoss
from fastai.torch_core import set_seed

import checkpoint
import distributed
import runlog
from data import get_dls
from experiments import Config, Stopped, UsageError, is_stop, resolve
from files import find_images
from layers import ATTENTION
from learner import fit, get_learner, keep_memory
from xresnet import xresnet


def get_device(gpu=None):
    "The CUDA device number `gpu`; without a number the first one there is, or the CPU."
    n = torch.cuda.device_count()
    if distributed.n_processes() > 1:
        if gpu is not None: raise UsageError(f'--gpu {gpu}: of several processes each has the device of its number')
        gpu = distributed.local_device()
        if gpu is not None: torch.cuda.set_device(gpu)
        return torch.device('cpu') if gpu is None else torch.device('cuda', gpu)
    if gpu is None: return torch.device('cuda', 0) if n else torch.device('cpu')
    if not n: raise UsageError(f'--gpu {gpu}: no CUDA device here; leave --gpu out to run on the CPU')
    if gpu not in range(n): raise UsageError(f'--gpu {gpu}: the CUDA devices are 0 to {n - 1}')
    return torch.device('cuda', gpu)


def settle(cfg, device):
    "`cfg` as it will run on `device`: every 'auto' written out."
    cfg = resolve(cfg)
    precision = cfg.precision if cfg.precision != 'auto' else 'fp16' if device.type == 'cuda' else 'fp32'
    if device.type == 'cpu':
        if precision == 'fp16': raise UsageError('--precision fp16: needs a CUDA device; on a CPU take fp32 or bf16')
        if precision == 'bf16' and not has_bf16(): raise UsageError('--precision bf16: not in the hardware of this CPU; take fp32')
    n = distributed.n_processes()
    if cfg.processes not in (1, n): raise UsageError(f'--processes {cfg.processes}: started as {n}; accelerate launch or torchrun set it')
    if cfg.compile and n > 1: raise UsageError('--compile: in one process only')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    workers = cfg.workers if cfg.workers >= 0 else min(8, max(1, cores // here))
    return replace(cfg, precision=precision, workers=workers, processes=n)


def has_bf16(cpuinfo=Path('/proc/cpuinfo')):
    "Whether the CPU multiplies bfloat16 in hardware (emulated is slower than float32); assumed where Linux does not tell."
    if not cpuinfo.exists(): return True
    flags = next((line.split() for line in cpuinfo.read_text().splitlines() if line.startswith(('flags', 'Features'))), [])
    return not {'avx512_bf16', 'amx_bf16', 'bf16'}.isdisjoint(flags)


def get_model(cfg, n_classes):
    "The network of `cfg`."
    return xresnet(cfg.arch, n_classes, ATTENTION[cfg.attention], cfg.sa_at, cfg.stem, cfg.act, cfg.pool)


def n_parameters(module): return sum(p.numel() for p in module.parameters())


class FiniteLoss:
    "Tells whether the losses that have reached the host are finite, without waiting for those on their way."
    def __init__(self): self.sent = collections.deque()

    def __call__(self, loss):
        if loss.device.type != 'cuda': return math.isfinite(loss.item())
        host = torch.empty((), pin_memory=True).copy_(loss.detach(), non_blocking=True)
        self.sent.append((host, torch.cuda.current_stream(loss.device).record_event()))
        return all(math.isfinite(host.item()) for host in self.arrived())

    def arrived(self):
        while self.sent and self.sent[0][1].query(): yield self.sent.popleft()[0]


class Heed(Callback):
    "Ends the fit after a signal whose exception was lost, as it is in a __del__ or a hook of fork."
    def before_batch(self):
        if Stopped.by: raise Stopped


class Measure(Callback):
    "What a run measures of itself. Ends the fit at the first loss that is not finite."
    order = ProgressCallback.order + 10  # after Recorder
    def __init__(self, on_epoch):
        # of several processes none may end alone: the others would wait for it
        self.on_epoch, self.finite = on_epoch, FiniteLoss() if distributed.n_processes() == 1 else lambda loss: True
        self.curve, self.diverged, self.n_images, self.train_seconds, self.started = [], False, 0, 0., time.perf_counter()
        self.earlier = dict(seconds=0., peak_memory_mb=0.)  # of the parts before this one, if the run is continued

    def before_fit(self):
        self.started = time.perf_counter()
        reset_peak_memory(self.dls.device)

    def before_epoch(self): self.epoch_started = time.perf_counter()
    def before_train(self): self.train_started, self.epoch_images = time.perf_counter(), 0
    def before_validate(self): self.logits, self.targets = [], []

    def after_batch(self):
        if not self.finite(self.loss):
            self.diverged = True
            raise CancelFitException
        if self.training: self.epoch_images += len(self.x)
        else:
            self.logits.append(self.pred.float())
            self.targets.append(self.y)

    def after_train(self):
        self.diverged |= not math.isfinite(self.recorder.smooth_loss.value.item())  # also of the last steps' losses
        if self.diverged: raise CancelFitException
        self.n_images += self.epoch_images * distributed.n_processes()
        self.train_seconds += time.perf_counter() - self.train_started

    def after_epoch(self):
        values = list(zip(('train_loss', 'valid_loss', 'accuracy', 'top5_accuracy'), self.recorder.values[-1]))
        seconds = round(time.perf_counter() - self.epoch_started, 3)
        self.diverged |= not all(math.isfinite(v) for _, v in values[:2])
        self.curve.append(dict(epoch=self.epoch + 1, **{k: round(v, 6) for k, v in values}, seconds=seconds))
        self.on_epoch(self.curve)

    def seconds(self): return self.earlier['seconds'] + time.perf_counter() - self.started
    def peak_memory_mb(self): return max(self.earlier['peak_memory_mb'], peak_memory_mb(self.dls.device))

    def state(self):
        "What a checkpoint keeps of it."
        return dict(curve=self.curve, n_images=self.n_images, train_seconds=self.train_seconds,
                    earlier=dict(seconds=self.seconds(), peak_memory_mb=self.peak_memory_mb()))

    def restore(self, state): self.__dict__.update(state)

    def predictions(self):
        "dict(logits (n_val, n_classes), targets (n_val,)) of the last validation, of all processes, in the order of the files."
        parts = dict(logits=self.logits, targets=self.targets)
        return {name: distributed.interleaved(torch.cat(batches)).cpu().numpy() for name, batches in parts.items()}

    def results(self, whole):
        "The columns of runlog.MEASURED that are known; accuracies and losses only of a `whole` run."
        out = dict(epochs_done=len(self.curve), fit_seconds=round(self.seconds(), 2), peak_memory_mb=round(self.peak_memory_mb()))
        if self.curve: out |= dict(median_epoch_seconds=round(statistics.median(e['seconds'] for e in self.curve), 2),
                                   images_per_second=round(self.n_images / self.train_seconds, 1))
        if whole:
            last, best = self.curve[-1], max(self.curve, key=lambda e: e['accuracy'])
            out |= {k: last[k] for k in ('accuracy', 'top5_accuracy', 'valid_loss', 'train_loss')}
            out |= dict(max_accuracy=best['accuracy'], max_accuracy_epoch=best['epoch'])
            if len(self.dls.vocab) <= 5: del out['top5_accuracy']
        return out


def reset_peak_memory(device):
    "Let the peak of `peak_memory_mb` start from here (on a CPU where Linux lets a process do so); what runs before left is freed."
    gc.collect()
    if device.type == 'cuda': return torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError): Path('/proc/self/clear_refs').write_text('5')


def peak_memory_mb(device):
    "Peak memory in MiB: allocated on a CUDA device; on a CPU, resident in this process, its loader processes apart."
    if device.type == 'cuda': return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, StopIteration):
        return int(next(s for s in Path('/proc/self/status').read_text().splitlines() if s.startswith('VmHWM')).split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def device_name(device):
    "The CUDA device's name, or the CPU's with its vector instructions and the number of threads."
    if device.type == 'cuda': return torch.cuda.get_device_name(device)
    cpu, info = 'CPU', Path('/proc/cpuinfo')
    if info.exists(): cpu = next((s.split(':')[1].strip() for s in info.read_text().splitlines() if s.startswith('model name')), cpu)
    return f'{cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'


def prepare(cfg, device):
    "(cfg as it will run, its DataLoaders, its model): the model's weights are a function of the seed."
    torch.backends.cudnn.benchmark = True
    cfg = settle(cfg, device)
    if device.type == 'cpu': keep_memory(bool(cfg.keep_memory))
    distributed.join(device)
    with distributed.first_goes_first(): dls = get_dls(cfg, device)
    cfg = replace(cfg, loader=dls.loader, workers=cfg.workers if dls.loader == 'workers' else 0)
    set_seed(cfg.seed)
    return cfg, dls, get_model(cfg, len(dls.vocab))


def run(cfg, results=runlog.RESULTS, device=None, save=None, resume=False, checkpoint_every=None, hand_over=None):
    """Train once and append a row to runs.csv; returns the row {column: value}.

    `save`: a file for the model. `resume`: a run that is recorded is not trained again, one that was stopped goes on from
    its checkpoint, under its id. `checkpoint_every`: epochs; see checkpoint.Checkpoint. `hand_over`: takes the row instead of runs.csv.
    Whatever ends the training leaves its row: ok, diverged (a loss not finite), interrupted, failed; the exception
    that ended the last two goes on to the caller. Of several processes the first one writes.
    """
    first = distributed.is_first()
    if first: runlog.check(results)
    device = device or get_device()
    cfg, dls, model = prepare(cfg, device)
    with checkpoint.claim(cfg, dls.fingerprint, results) if resume and first else contextlib.nullcontext():
        begun = distributed.agreed(begin(cfg, dls.fingerprint, results, resume) if first else None)
        if begun['status']:
            if save and first: print(f'--save {save}: not written, the model of a recorded run is not kept', file=sys.stderr)
            return begun
        row = begun | asdict(cfg) | runlog.provenance() | dict(
            n_train=len(dls.train.dataset.labels), n_val=len(dls.files), n_parameters=n_parameters(model),
            device=device_name(device), data_fingerprint=dls.fingerprint)
        return train(cfg, dls, model, row, Path(results), save, checkpoint_every, hand_over or partial(record, results=results))


def train(cfg, dls, model, row, results, save, checkpoint_every, hand_over):
    "Fit `model`, and hand over `row` with what came of it, whatever ends it; returns it."
    run_id, first = row['run_id'], distributed.is_first()
    measure = Measure(partial(write_curve, run_id, results=results) if first else lambda curve: None)
    kept = checkpoint.Checkpoint(checkpoint.path(results, run_id), checkpoint.identity(cfg, row), checkpoint_every, row['resumed'] > 0,
                                 dls.device)
    learn = get_learner(cfg, dls, model, [measure, Heed(), kept])
    row['status'] = 'failed'
    try:
        fit(learn, cfg)
        predictions = {} if measure.diverged else measure.predictions()  # they may fail too, as the other processes are asked
        row['status'] = 'diverged' if measure.diverged else 'ok'
    except BaseException as e:
        if is_stop(e): row['status'] = 'interrupted'
        raise
    finally:
        with undisturbed():
            if hasattr(learn, 'precision'): learn.precision.leave()
            whole = row['status'] == 'ok'
            row |= measure.results(whole)
            if first and whole: write_predictions(run_id, results, files=np.array(dls.files), **predictions)
            if first and whole and save: write_model(save, cfg, dls.vocab, model)
            try:
                if first: hand_over(row)
            finally: kept.release()
    return row


def begin(cfg, digest, results, resume):
    "The first columns of a run's row, its status still blank; the whole row where `resume` finds it recorded."
    if resume:
        record = runlog.load(Path(results) / 'runs.csv')
        done, found = runlog.recorded(record, cfg, digest), checkpoint.find(cfg, digest, results)  # removes those that are done with
        if len(done):
            print(f'{summary(done.iloc[0])}  (recorded already)', flush=True)
            return done.iloc[0].to_dict()
        print(f'{found[1]["run_id"]}: goes on after epoch {found[1]["epoch"]} of {cfg.epochs}' if found else
              'nothing to go on with: starts anew', flush=True)
        if found:
            begun = {key: found[1][key] for key in ('run_id', 'started')}
            parts = record.resumed[record.run_id == begun['run_id']]
            return begun | dict(status='', resumed=1 + int(max([*parts, found[1].get('resumed', 0)])))
    return dict(zip(('run_id', 'started'), runlog.new_run(results)), status='', resumed=0)


def record(row, results):
    "Append `row` and say so; remove its checkpoint, which stays if the run is not done or its row could not be written."
    file = checkpoint.path(results, row['run_id'])
    try:
        print(f'{summary(row)}  -> {os.path.relpath(write(row, results))}', flush=True)
        if row['status'] in runlog.DONE: checkpoint.remove(file)
    finally:
        if file.exists(): print(f'its checkpoint is kept: --resume goes on with it ({os.path.relpath(file)})', flush=True)


@contextlib.contextmanager
def undisturbed():
    "Ctrl-C and SIGTERM wait for the end of the block: what comes after it is stopped."
    if threading.current_thread() is not threading.main_thread(): return (yield)
    came = []
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try: yield
    except BaseException:  # may hold a row: it goes on, and is the last
        if came: Stopped.by = came[0]
        raise
    finally:
        for number, handler in handlers.items(): signal.signal(number, handler)
    if came: signal.raise_signal(came[0])


def write(row, results):
    "Append `row`, or print it where that fails: it is not lost. Returns the path."
    try: return runlog.append(row, results)
    except (OSError, UsageError) as e:
        raise UsageError(f'{results}: the row could not be written ({e}); it is {json.dumps(row)}') from None


def write_curve(run_id, rows, results):
    "The curve so far. One that cannot be written is told: the next epoch writes all of it again."
    try: runlog.write_curve(run_id, rows, results)
    except OSError as e: print(f'{run_id}: its curve could not be written ({e}); going on', file=sys.stderr)


def write_predictions(run_id, results, **arrays):
    "Those of the last epoch. What cannot be written is told: the row is worth more."
    try: runlog.write_predictions(run_id, results, **arrays)
    except OSError as e: print(f'{run_id}: its predictions could not be written ({e})', file=sys.stderr)


def write_model(file, cfg, vocab, model):
    "For load_model. One that cannot be written is told: the row is worth more."
    try:
        with runlog.replacing(file, 'wb') as f: torch.save(dict(config=asdict(cfg), vocab=vocab, model=model.state_dict()), f)
    except (OSError, RuntimeError) as e: print(f'--save {file}: could not be written ({e})', file=sys.stderr)


def summary(row):
    "A row in one line."
    model = Config(arch=row['arch'], attention=row['attention']).model
    what = '{dataset} {split} {size}px {model} seed {seed}  {fit_seconds:.0f} s'.format(**row, model=model)
    if row['status'] != 'ok': return '{status} after {epochs_done} of {epochs} epochs  '.format(**row) + what
    return 'accuracy {accuracy:.3f}  (max {max_accuracy:.3f} at epoch {max_accuracy_epoch})  '.format(**row) + what


def load_model(file):
    "(model in eval mode on the CPU, class names) from a file that `run(..., save=file)` wrote."
    saved = torch.load(file, map_location='cpu', weights_only=True)
    model = get_model(Config(**saved['config']), len(saved['vocab']))
    model.load_state_dict(saved['model'])
    return model.eval(), saved['vocab']


def dump(cfg):
    "The model of `cfg` as text: a line per module, its output shape for one image and its parameters."
    classes = {f.split('/')[1] for f in find_images(Path(cfg.data)) if f.startswith('train/')} if cfg.data else range(10)
    model = get_model(cfg, len(classes)).eval()
    shapes = {}
    def keep(name): return lambda m, i, o: shapes.update({name: tuple(o.shape)})
    for name, m in model.named_modules(): m.register_forward_hook(keep(name))
    with torch.no_grad(): model(torch.zeros(1, 3, cfg.size, cfg.size))
    lines = [f'{"module":34}{"type":22}{"output":22}{"parameters":>12}']
    for name, m in model.named_modules():
        if name: lines.append(f'{name:34}{type(m).__name__:22}{shapes.get(name, "")!s:22}{n_parameters(m):>12,}')
    return '\n'.join([*lines, f'{cfg.model}: {n_parameters(model):,} parameters'])


def find_lr(cfg, results=runlog.RESULTS, device=None):
    "(suggested learning rate, PNG of the plot) by fastai's lr_find, 'valley' rule; trains nothing that is kept."
    import matplotlib
    matplotlib.use('Agg')
    runlog.check(results)
    cfg, dls, model = prepare(cfg, device or get_device())
    learn = get_learner(cfg, dls, model)
    learn.recorder.smooth_loss = AvgSmoothLoss()  # on the host, where the plot wants it
    special = [f'-{k}{getattr(cfg, k)}' for k in ('sa_at', 'opt', 'mom', 'wd', 'mixup') if getattr(cfg, k) != getattr(Config, k)]
    file = Path(results) / 'lr_find' / f'{cfg.dataset}-{cfg.size}-{cfg.model}-bs{cfg.bs}{"".join(special)}.png'
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:  # lr_find keeps the first weights in a file there
        learn.path = Path(folder)
        try: lr = learn.lr_find(suggest_funcs=valley).valley
        except IndexError: raise UsageError('--lrfinder: the loss is not finite from the start, so there is no suggestion') from None
        matplotlib.pyplot.savefig(file, dpi=120)
    return lr, file
