"""One run in several processes, as `accelerate launch` or `torchrun` start them: a GPU (or some CPU cores) each.

Each process has its share of the images and batches of its own: `bs` images a process. Gradients are averaged at each
step, batch norm is over the batch of the process. Every validation image counts once: the shares are not padded, as
fastai's are. The first process alone writes.
"""
import atexit
import os
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from fastai.learner import Metric
from fastai.torch_core import find_bs, num_distrib, rank_distrib

from command import UsageError

PATIENCE = timedelta(hours=6)  # of the processes that wait while the first downloads and decodes: NCCL's own are ten minutes


def n_processes(): return max(1, num_distrib())
def is_first(): return rank_distrib() == 0


def join(device):
    "Meet the other processes, once in the life of this one; alone, nothing happens."
    if n_processes() == 1 or dist.is_initialized(): return
    try:
        from accelerate import PartialState
    except ImportError: raise UsageError('several processes: needs accelerate: pip install -r requirements-cluster.txt') from None
    PartialState(cpu=device.type == 'cpu', timeout=PATIENCE)
    atexit.register(time.sleep, 0.5)  # for gloo's threads to drop their last tensors: once Python ends, that would abort the process


def local_device(n_gpus):
    "Returns the CUDA device of this process, its number on this machine of `n_gpus`; None where there is none."
    local = int(os.environ.get('LOCAL_RANK', 0))
    here = max(local + 1, int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    if 0 < n_gpus < here:  # one that trained on the CPU could not talk to the others
        raise UsageError(f'{here} processes and {n_gpus} GPUs on this machine: start one a GPU, or set CUDA_VISIBLE_DEVICES= for the CPU')
    return local if n_gpus else None


@contextmanager
def first_goes_first():
    "The block, in the first process before the others: what it downloads they find."
    if n_processes() > 1 and not is_first(): dist.barrier()
    yield
    if n_processes() > 1 and is_first(): dist.barrier()


def agreed(value):
    "The first process's `value`, in all of them."
    if n_processes() == 1: return value
    box = [value if is_first() else None]
    dist.broadcast_object_list(box)
    return box[0]


def interleaved(x):
    "The tensors (n, ...) of all processes as one: of process r every n_processes()-th from r on, as the shares are dealt."
    if n_processes() == 1: return x
    parts = [None] * n_processes()
    dist.all_gather_object(parts, x.cpu())
    out = x.new_empty(sum(map(len, parts)), *x.shape[1:], device='cpu')
    for r, part in enumerate(parts): out[r::n_processes()] = part
    return out


class Mean(Metric):
    """The mean of `func(learn)`, a mean over a batch, over all images of all processes. Kept on the device until it is read.

    fastai's AvgMetric averages the processes' means at each batch, padded images included.
    """
    def __init__(self, name, func): self._name, self.func = name, func
    name = property(lambda self: self._name)
    def reset(self): self.total, self.count = 0., 0

    def accumulate(self, learn):
        n = find_bs(learn.yb)
        self.total += self.func(learn).detach() * n
        self.count += n

    @property
    def value(self):
        if n_processes() == 1: return self.total / self.count
        both = torch.stack([torch.as_tensor(x, dtype=torch.float64).to(self.total.device) for x in (self.total, self.count)])
        dist.all_reduce(both)
        return both[0] / both[1]


def callback(device):
    "fastai's DistributedTrainer, for loaders that hold the share of their process already."
    from fastai.distributed import DistributedTrainer  # needs accelerate

    class Distributed(DistributedTrainer):
        "Validates outside of torch's wrapper, as the shares differ in length."
        def before_fit(self):
            super().before_fit()
            self.wrapped, self.learn.model = self.model, self.model.module

        def _wrap_dl(self, dl): return dl
        def before_train(self): self.learn.model = self.wrapped

        def after_train(self):
            "One smoothed loss for all: what follows from it, every process does."
            smooth = self.recorder.smooth_loss
            smooth.val = smooth.val.to(self.dls.device)
            dist.all_reduce(smooth.val)
            smooth.val /= n_processes()

        def before_validate(self):
            "Each process has moved its batch norms' statistics with its own batches; those of the first count."
            self.learn.model = self.wrapped.module
            for buffer in self.model.buffers(): dist.broadcast(buffer, 0)

        def after_fit(self):
            self.learn.model = self.wrapped
            super().after_fit()

    return Distributed(sync_bn=False, cpu=device.type == 'cpu', mixed_precision='no')  # precision is learner.py's
