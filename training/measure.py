"""What a run measures of itself: losses, accuracies, seconds, memory; and what ends it early."""
import collections
import contextlib
import gc
import math
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback

from command import Stopped
from training import distributed


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
