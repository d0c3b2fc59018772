"""Lets several processes train one run, as `accelerate launch` or `torchrun` starts them: on a GPU each, or CPU cores.

Each process has its share of the images, in batches of its own of `bs` images. Gradients are averaged at each step, and
batch norm is over the batch of a process. Every validation image counts once, since the shares are not padded, as
fastai's are. Only the first process, of rank 0, writes.
"""
import atexit
import os
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from fastai.learner import Metric
from fastai.torch_core import find_bs, num_distrib, rank_distrib

from command import UsageError

TIMEOUT = timedelta(minutes=30)  # A process that waits so long for another ends: that one hangs, or its node is gone.
PATIENCE = timedelta(hours=6)  # The others wait so long while the first downloads and decodes.


def n_processes(): return max(1, num_distrib())
def is_rank_0(): return rank_distrib() == 0


def join(device):
    "Meets the other processes, once in the life of this one; a process that is alone meets nobody."
    if n_processes() == 1: return
    if not dist.is_initialized(): start(device)
    UsageError.have_met = True


def start(device):
    "Starts what the processes talk by."
    try:
        from accelerate import PartialState
    except ImportError:
        raise UsageError('several processes: needs accelerate: pip install -r requirements-cluster.txt') from None
    PartialState(cpu=device.type == 'cpu', timeout=TIMEOUT)
    atexit.register(time.sleep, 0.5)  # Let gloo's threads drop their last tensors: after Python's end that would abort.


def local_device(n_gpus):
    """Returns the number of this process's CUDA device on this machine of `n_gpus`, or None if that is 0.

    Raises UsageError if the machine has more processes than GPUs.
    """
    local = int(os.environ.get('LOCAL_RANK', 0))
    here = max(local + 1, int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    if 0 < n_gpus < here:  # A process that trained on the CPU could not talk to the others.
        hint = 'start one per GPU, or set CUDA_VISIBLE_DEVICES= for the CPU'
        raise UsageError(f'{here} processes and {n_gpus} GPUs on this machine: {hint}')
    return local if n_gpus else None


@cache
def patient():
    "Returns all processes as a group that waits for PATIENCE."
    return dist.new_group(backend='gloo', timeout=PATIENCE)


@contextmanager
def first_goes_first():
    """Lets the first process do the block before the others, which find what it has downloaded.

    It ends when all have done the block, so that no step waits for one that is still decoding.
    """
    if n_processes() == 1: return (yield)
    if not is_rank_0(): dist.barrier(patient())
    yield
    if is_rank_0(): dist.barrier(patient())
    dist.barrier(patient())


def check_alike(**found):
    "Raises UsageError unless all processes have found the same: they may be on machines with images of their own."
    if n_processes() == 1: return
    parts = [None] * n_processes()
    dist.all_gather_object(parts, found)
    for name in found:
        values = list(dict.fromkeys(str(part[name]) for part in parts))
        if len(values) > 1:
            raise known_to_all(UsageError(f'the processes differ in {name}: {" and ".join(values[:2])}'))


def agreed(make):
    "Returns what make() returns in the first process, in all of them; a UsageError there is raised in all."
    if n_processes() == 1: return make()
    value, error = None, None
    if is_rank_0():
        try: value = make()
        except UsageError as e: error = e
    box = [value, error]
    dist.broadcast_object_list(box)
    value, error = box
    if error: raise known_to_all(error)
    return value


def known_to_all(error):
    "Returns a UsageError that all processes raise: the first one prints it."
    error.is_known_to_all = True
    return error


def interleaved(x):
    """Returns the tensors (n, ...) of all processes as one, on the CPU if they are several.

    It has those of rank r at every n_processes()-th place from r on, as the shares were dealt.
    """
    if n_processes() == 1: return x
    parts = [None] * n_processes()
    dist.all_gather_object(parts, x.cpu())
    out = x.new_empty(sum(map(len, parts)), *x.shape[1:], device='cpu')
    for rank, part in enumerate(parts): out[rank::n_processes()] = part
    return out


class Mean(Metric):
    """Computes the mean of `func(learn)`, itself a mean over a batch, over all images of all processes.

    It stays on the device until it is read. fastai's AvgMetric averages the means of the processes at each batch
    instead, padded images included.
    """
    name = None  # Metric has a property of that name.

    def __init__(self, name, func): self.name, self.func = name, func
    def reset(self): self.total, self.count = 0., 0

    def accumulate(self, learn):
        n = find_bs(learn.yb)
        self.total += self.func(learn).detach() * n
        self.count += n

    @property
    def value(self):
        if n_processes() == 1: return self.total / self.count
        total = self.total.double()
        both = torch.stack([total, torch.full_like(total, self.count)])
        dist.all_reduce(both)
        return both[0] / both[1]


def callback(device):
    "Returns fastai's DistributedTrainer, for loaders that hold the share of their process already."
    from fastai.distributed import DistributedTrainer  # It needs accelerate.

    class Distributed(DistributedTrainer):
        "Validates outside of torch's wrapper, since the shares differ in length."
        def before_fit(self):
            super().before_fit()
            self.wrapped, self.learn.model = self.model, self.model.module

        def _wrap_dl(self, dl): return dl
        def before_train(self): self.learn.model = self.wrapped

        def after_train(self):
            "Gives all processes one smoothed loss, so that they agree on what follows from it."
            smooth = self.recorder.smooth_loss
            smooth.val = smooth.val.to(self.dls.device)
            dist.all_reduce(smooth.val)
            smooth.val /= n_processes()

        def before_validate(self):
            "Gives all processes the batch norms' statistics of the first: each has moved them with its own batches."
            self.learn.model = self.wrapped.module
            for buffer in self.model.buffers(): dist.broadcast(buffer, 0)

        def after_fit(self):
            self.learn.model = self.wrapped
            super().after_fit()

    return Distributed(sync_bn=False, cpu=device.type == 'cpu', mixed_precision='no')  # learner.py has the precision.
