"""Measures losses, accuracies, seconds and memory of a run; has the callbacks that end it early."""
import collections
import gc
import math
import statistics
import time

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback

from command import Stopped
from training import distributed, host
from training.branch import Branch

LEARNER_METRICS = 'train_loss', 'valid_loss', 'accuracy', 'top5_accuracy'  # the names that the Learner gives them


class FiniteLoss:
    "Says whether the losses that have reached the host are finite, without waiting for those on their way."
    def __init__(self): self.sent = collections.deque()

    def __call__(self, loss):
        if loss.device.type != 'cuda': return math.isfinite(loss.item())
        on_host = torch.empty((), pin_memory=True).copy_(loss.detach(), non_blocking=True)
        self.sent.append((on_host, torch.cuda.current_stream(loss.device).record_event()))
        return all(math.isfinite(on_host.item()) for on_host in self.arrived())

    def arrived(self):
        while self.sent and self.sent[0][1].query(): yield self.sent.popleft()[0]


class Heed(Callback):
    "Ends the fit after a signal whose exception was lost, as it is in a __del__ or in a hook of fork."
    def before_batch(self):
        if Stopped.by: raise Stopped


class Measure(Callback):
    """Collects the curve, the predictions, the seconds and the memory of a run; ends the fit once a loss is not finite.

    `on_epoch` is called with the curve so far, a list of {column of runlog.CURVE: value}, after each epoch.
    """
    order = ProgressCallback.order + 10  # It comes after Recorder, whose values it reads.

    def __init__(self, on_epoch):
        self.on_epoch = on_epoch
        # A process that trains with others may not end alone, since they would wait for it.
        self.is_finite = FiniteLoss() if distributed.n_processes() == 1 else lambda loss: True
        self.diverged = False
        self.curve, self.n_images, self.train_seconds = [], 0, 0.
        self.earlier = dict(seconds=0., peak_memory_mb=0.)  # of the parts before this one, where the run was continued
        self.started, self.branch = time.perf_counter(), Branch()

    def after_create(self): reset_peak_memory(self.dls.device)  # before CUDA graphs are recorded, which is the peak
    def before_fit(self): self.started = time.perf_counter()

    def before_epoch(self):
        if self.diverged: raise CancelFitException  # in the validation of the epoch before
        self.epoch_started = time.perf_counter()

    def before_train(self): self.train_started, self.epoch_images = time.perf_counter(), 0

    def before_validate(self):
        self.logits, self.targets = [], []
        self.branch.watch(self.learn.model)

    def after_batch(self):
        if not self.is_finite(self.loss):
            self.diverged = True
            raise CancelFitException
        if self.training: self.epoch_images += len(self.x)
        else:
            self.branch.stop()
            self.logits.append(self.pred.float())
            self.targets.append(self.y)

    def after_train(self):
        smooth_loss = self.recorder.smooth_loss.value.item()  # waits for the device: it holds all losses
        if not math.isfinite(smooth_loss): self.diverged = True
        if self.diverged: raise CancelFitException
        self.n_images += self.epoch_images * distributed.n_processes()
        self.train_seconds += time.perf_counter() - self.train_started

    def after_epoch(self):
        recorded = dict(zip(self.recorder.metric_names[1:], self.recorder.values[-1]))  # The first name is the epoch's.
        seconds = round(time.perf_counter() - self.epoch_started, 3)
        if not all(math.isfinite(recorded[name]) for name in ('train_loss', 'valid_loss')): self.diverged = True
        metrics = {name: round(recorded[name], 6) for name in LEARNER_METRICS}
        self.curve.append(dict(epoch=self.epoch + 1, **metrics, seconds=seconds, branch_ratio=self.branch.ratio()))
        self.on_epoch(self.curve)

    def total_seconds(self):
        "Returns the seconds of the fit so far, those of earlier parts of the run included."
        return self.earlier['seconds'] + time.perf_counter() - self.started

    def total_peak_memory_mb(self):
        "Returns the peak memory of the fit so far in MiB, earlier parts of the run included."
        return max(self.earlier['peak_memory_mb'], peak_memory_mb(self.dls.device))

    def state(self):
        "Returns what a checkpoint keeps of the measurements, for `restore`."
        earlier = dict(seconds=self.total_seconds(), peak_memory_mb=self.total_peak_memory_mb())
        return dict(curve=self.curve, n_images=self.n_images, train_seconds=self.train_seconds, earlier=earlier)

    def restore(self, state):
        self.curve, self.n_images = state['curve'], state['n_images']
        self.train_seconds, self.earlier = state['train_seconds'], state['earlier']

    def predictions(self):
        """Returns dict(logits (n_val, n_classes), targets (n_val,)) of the last validation, in the order of the files.

        They are of all processes, and NumPy arrays.
        """
        parts = dict(logits=self.logits, targets=self.targets)
        return {name: distributed.interleaved(torch.cat(batches)).cpu().numpy() for name, batches in parts.items()}

    def results(self, whole):
        "Returns the columns of runlog.MEASURED that are known: accuracies and losses are of a `whole` run only."
        out = dict(epochs_done=len(self.curve), fit_seconds=round(self.total_seconds(), 2),
                   peak_memory_mb=round(self.total_peak_memory_mb()))
        if self.curve:
            out['median_epoch_seconds'] = round(statistics.median(row['seconds'] for row in self.curve), 2)
            out['images_per_second'] = round(self.n_images / self.train_seconds, 1)
        if whole:
            last, best = self.curve[-1], max(self.curve, key=lambda row: row['accuracy'])
            out |= {name: last[name] for name in LEARNER_METRICS}
            out |= dict(max_accuracy=best['accuracy'], max_accuracy_epoch=best['epoch'])
            if len(self.dls.vocab) <= 5: del out['top5_accuracy']
        return out


# --- memory ---

def reset_peak_memory(device):
    """Frees what earlier runs left, and lets `peak_memory_mb` start from here.

    On a CPU the peak starts anew only where Linux lets a process do so.
    """
    gc.collect()
    if device.type == 'cuda': torch.cuda.reset_peak_memory_stats(device)
    elif device.type == 'mps': torch.mps.empty_cache()
    else: host.reset_peak()


def peak_memory_mb(device):
    """Returns the peak memory in MiB: on a CUDA device, what was allocated there.

    On an Apple GPU it is what torch holds there, which does not shrink during a run. On a CPU it is what was resident
    in this process, without its loader processes.
    """
    if device.type == 'cuda': return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == 'mps': return torch.mps.driver_allocated_memory() / 2**20
    return host.peak_bytes() / 2**20
