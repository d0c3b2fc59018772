"""Makes the recipe of a Config into a fastai Learner, and its step fast.

No speed-up changes the function that is computed, and each can be switched off: `--fused 0`, `--channels-last 0`,
`--keep-memory 0`, `--compile 0` and `--cuda-graphs 0` (the defaults), `--loader workers`. What each is worth on a CPU
is measured in results/benchmarks. On a GPU the fused adam decides on the device whether float16 overflowed, and the
smoothed loss stays there: with `--loader device` and without mixup and `--log-to` the host may start the next step
before a step has ended.
"""
import copy
import sys
from functools import partial

import numpy as np
import torch
from fastai.callback.core import Callback, CancelEpochException, CancelStepException, TrainEvalCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import valley  # noqa: F401  (importing it gives Learner its schedules)
from fastai.imports import IN_NOTEBOOK
from fastai.learner import AvgSmoothLoss, Learner
from fastai.losses import LabelSmoothingCrossEntropy
from fastai.metrics import accuracy, top_k_accuracy
from fastai.optimizer import SGD, Adam, Lamb, Lookahead, OptimWrapper, RAdam, RMSProp, ranger
from fastai.torch_core import L, norm_bias_params, rank_distrib, set_seed

from command import UsageError, is_stop, lack_of_memory, say
from training import distributed
from training.machine import DTYPES

# --- optimizer and precision ---

def get_opt_func(cfg):
    "Returns fastai's optimizer of `cfg`; a fused adam is torch's AdamW, which makes the same steps in one kernel."
    if is_fused(cfg):
        adamw = partial(torch.optim.AdamW, betas=(cfg.mom, cfg.sqrmom), eps=cfg.eps, fused=True)
        return partial(OptimWrapper, opt=adamw)
    moments = dict(mom=cfg.mom, sqr_mom=cfg.sqrmom, eps=cfg.eps)
    return {
        'adam': partial(Adam, **moments),
        'rms': partial(rms_prop, **moments),
        'sgd': partial(SGD, mom=cfg.mom),
        'ranger': partial(ranger, **moments, beta=cfg.beta),
        'radam': partial(RAdam, **moments, beta=cfg.beta),
        'lamb': partial(Lamb, **moments),
        'lookahead': lambda *args, **kwargs: Lookahead(Adam(*args, **moments, **kwargs)),
    }[cfg.opt]


def rms_prop(params, lr, eps, **kwargs):
    "Returns fastai's RMSProp with this `eps`: fastai 2.8.12 takes one, and goes on with 1e-8."
    optimizer = RMSProp(params, lr, **kwargs)
    optimizer.set_hyper('eps', eps)
    return optimizer


def is_fused(cfg): return cfg.opt == 'adam' and cfg.fused


def decay_groups(model):
    """Returns [parameters that decay, norms and biases, which do not].

    fastai tells the two kinds apart by the state of a parameter, torch by its group.
    """
    spared = list(norm_bias_params(model))
    ids = set(map(id, spared))
    return [[p for p in model.parameters() if id(p) not in ids], spared]


class Precision(MixedPrecision):
    "Trains in fastai's mixed precision, on any device; a fused optimizer skips a step that overflows by itself."
    def before_fit(self):
        "Does as fastai's, which knows CUDA alone."
        device, dtype = self.dls.device.type, DTYPES[self.amp_mode.value]
        self.autocast, self.on, self.scales = torch.autocast(device, dtype), False, L()
        self.learn.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def before_batch(self):
        super().before_batch()
        self.on = True

    def after_loss(self):
        super().after_loss()
        self.on = False

    def leave(self):
        """Leaves autocast where an exception kept fastai from it.

        Later runs of the process would use its cache of old weights.
        """
        if getattr(self, 'on', False): self.after_loss()

    def before_step(self):
        if not isinstance(self.opt, OptimWrapper): return super().before_step()
        self.scaler.step(self.opt.opt)
        raise CancelStepException


# --- callbacks ---

class Reseed(Callback):
    "Makes the random numbers of an epoch a function of (seed, epoch): the loader's draws, mixup, random erasing."
    order = ProgressCallback.order - 1
    def __init__(self, seed): self.seed = seed

    def before_epoch(self):
        self.dls.train.dataset.set_epoch(self.epoch)
        entropy = [self.seed, self.epoch]
        if rank_distrib(): entropy.append(rank_distrib())  # Each process draws its own mixup.
        set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


class FastModel(Callback):
    """Trains through `fast`, which before_fit makes of the model, and validates through the model itself, `plain`.

    The last batch of a validation has a size of its own.
    """
    order = TrainEvalCallback.order + 1
    def before_train(self): self.learn.model = self.fast

    def before_batch(self):
        "Drops the gradients, which lie where a CUDA graph writes: zeroed or added up in place, they would be wrong."
        if self.training:
            for p in self.plain.parameters(): p.grad = None

    def after_train(self): self.learn.model = self.plain
    def after_fit(self): self.learn.model = self.plain


class Compile(FastModel):
    """Trains through torch.compile, with CUDA graphs on a GPU.

    A later model of the same kind in this process finds what was compiled for the first.
    """
    def before_fit(self):
        self.plain = self.model
        self.fast = torch.compile(self.model, mode='reduce-overhead' if self.dls.device.type == 'cuda' else None)


class Graphs(FastModel):
    """Trains through CUDA graphs: the kernels of both passes are recorded once, and each step replays them.

    A step starts a thousand kernels one by one; a replay starts all at once. The network computes the same function
    with the same kernels: autocast is around the recorded forward pass alone, as in a plain step, since under it the
    backward pass of a layer would round its float32 products to float16. Raises UsageError where a module waits for
    the host in its pass, as it cannot be recorded.
    """
    def __init__(self, size): self.size = size

    def before_fit(self):
        self.plain, self.fast = self.model, copy.copy(self.model)  # The copy shares all modules but the outermost.
        self.fast.forward = self.under_autocast(self.fast.forward)
        x = torch.zeros(self.dls.train.bs, 3, self.size, self.size, device=self.dls.device)
        x = x.contiguous(memory_format=torch.channels_last)
        before = {name: buffer.clone() for name, buffer in self.plain.named_buffers()}
        self.plain.train()
        self.fast.training = True
        if x.is_cuda: torch._C._cuda_clearCublasWorkspaces()  # Else each recording adds its own, of 64 MiB, for good.
        try:
            torch.cuda.make_graphed_callables(self.fast, (x,))
        except RuntimeError as e:
            hidden = e.__context__  # The end of a recording that failed raises too, and hides the reason.
            if hidden and is_stop(hidden): raise hidden from None
            reason = hidden if isinstance(hidden, RuntimeError) else e
            if lack_of_memory(reason): raise reason from None
            why = ' '.join(str(reason).split())[:200]
            what = f'--cuda-graphs: the network cannot be recorded ({why})'
            raise UsageError(f'{what}; train it with --cuda-graphs 0') from None
        with torch.no_grad():  # The rounds to warm up have moved the statistics of the norms.
            for name, buffer in self.plain.named_buffers(): buffer.copy_(before[name])

    def under_autocast(self, forward):
        "Returns `forward` under the autocast of the fit, which keeps no cast weights, since a replay casts them again."
        precision = getattr(self.learn, 'precision', None)
        if precision is None: return forward
        device, dtype = self.dls.device.type, DTYPES[precision.amp_mode.value]
        def cast(*args):
            with torch.autocast(device, dtype, cache_enabled=False): return forward(*args)
        return cast


class SmoothLoss(AvgSmoothLoss):
    """Smooths the loss as fastai does, but keeps it on the device.

    fastai moves it to the host at each step, which then waits for the device.
    """
    def accumulate(self, learn):
        self.count += 1
        self.val = torch.lerp(learn.loss.detach().float(), self.val.to(learn.loss.device), self.beta)


class Progress(ProgressCallback):
    "Shows fastai's bar, with the loss at every `every`-th step alone, since that waits for the device."
    every = 50
    def after_batch(self):
        if self.iter % self.every == 0: return super().after_batch()
        self.pbar.update(self.iter + 1)


# --- the Learner ---

class EpochLearner(Learner):
    """Trains as a Learner does, from the epoch `first_epoch` on.

    fastai's own start_epoch logs the epochs that it skips, and fit_flat_cos has no such parameter.
    """
    first_epoch = 0
    def _do_fit(self):
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, 'epoch', CancelEpochException)


def get_learner(cfg, dls, model, cbs=()):
    "Returns a Learner of `model`, moved to the device of `dls`, with the recipe of `cfg`."
    cbs = [Reseed(cfg.seed), *cbs]
    if cfg.mixup: cbs.append(MixUp(cfg.mixup))
    if cfg.precision != 'fp32': cbs.append(Precision(cfg.precision))
    if cfg.compile: cbs.append(Compile())
    if cfg.cuda_graphs: cbs.append(Graphs(cfg.size))
    if cfg.processes > 1: cbs.append(distributed.callback(dls.device))
    model = model.to(dls.device, memory_format=torch.channels_last if cfg.channels_last else torch.contiguous_format)
    groups = dict(splitter=decay_groups, wd=[cfg.wd, 0.]) if is_fused(cfg) else dict(wd=cfg.wd)
    k = min(5, len(dls.vocab))
    metrics = [distributed.Mean('accuracy', lambda learn: accuracy(learn.pred, learn.y)),
               distributed.Mean('top5_accuracy', lambda learn: top_k_accuracy(learn.pred, learn.y, k=k))]
    learn = EpochLearner(dls, model, LabelSmoothingCrossEntropy(cfg.label_smoothing), get_opt_func(cfg), **groups,
                         metrics=metrics, cbs=cbs)
    learn.recorder.loss = distributed.Mean('loss', lambda learn: learn.loss)
    learn.recorder.smooth_loss = SmoothLoss()
    choose_progress(learn)
    return learn


def choose_progress(learn):
    "Lets the first process show a bar, or print a line per epoch in a log file, where a bar would be a line per step."
    if not distributed.is_rank_0(): learn.remove_cb(ProgressCallback)
    elif not (sys.stdout.isatty() or IN_NOTEBOOK):
        learn.remove_cb(ProgressCallback)
        learn.logger = partial(print_epoch, learn)
    elif learn.dls.device.type != 'cpu': learn.remove_cb(ProgressCallback).add_cb(Progress())


def print_epoch(learn, values):
    "Prints a line with what the table of a bar would show: names and values."
    metrics = dict(zip(learn.recorder.metric_names, values))
    epoch, seconds = metrics.pop('epoch') + 1, metrics.pop('time')
    text = '  '.join(f'{name} {value:.4f}' for name, value in metrics.items())
    say(f'epoch {epoch}  {text}  {seconds}')


def fit(learn, cfg):
    "Trains for `cfg.epochs` on the schedule of `cfg`."
    if cfg.schedule == 'flat_cos': return learn.fit_flat_cos(cfg.epochs, cfg.lr, pct_start=cfg.ann_start)
    # fastai 1's cycle moved the momentum from 0.95 to 0.85 and back, whatever --mom said. Here --mom moves it.
    high, low = min(cfg.mom + 0.05, (1 + cfg.mom) / 2), max(0, cfg.mom - 0.05)
    learn.fit_one_cycle(cfg.epochs, cfg.lr, div=10, pct_start=0.3, moms=(high, low, high))
