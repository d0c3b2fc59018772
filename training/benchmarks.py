"""Measures ours against fastai's own, side by side, for scripts/benchmark.py.

Each function in BENCHMARKS yields the rows of a table. Its `args` are the flags of the command: quick, data, results,
and config, which is what `run` trains.
"""
import copy
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import GrandparentSplitter, Normalize, get_image_files, parent_label
from fastai.learner import Learner
from fastai.losses import LabelSmoothingCrossEntropy
from fastai.metrics import accuracy, top_k_accuracy
from fastai.optimizer import Adam
from fastai.vision.augment import FlipItem, RandomResizedCrop
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageBlock
from fastai.vision.models.xresnet import xresnet50
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from command import UsageError
from experiments import Config
from layers import ATTENTION, SelfAttention, SimpleSelfAttention, multiply_adds
from training.data import ImageLoader
from training.host import keep_memory
from training.layer import cost as layer_costs
from training.learner import get_learner
from training.machine import autocast, settle, wait_for
from training.run import get_model, prepare
from training.run import run as train
from training.timing import PEERS, measure_steps, peak_mb, take_turns

LAYERS = [  # name, shape, shape of --quick
    ('simple', (16, 256, 32, 32), (4, 256, 32, 32)),
    ('simple', (8, 256, 64, 64), (2, 256, 64, 64)),
    ('sagan', (4, 256, 64, 64), (1, 256, 64, 64)),
    ('sagan', (4, 64, 64, 64), (1, 64, 64, 64)),
]
# (C, side), N = side^2
COST = [(256, side) for side in (8, 12, 16, 24, 32, 48, 64)] + [(C, 32) for C in (64, 128, 512)]
QUICK_COST = [(256, 8), (256, 16), (256, 32), (64, 32), (128, 32)]
NETWORKS = [('xresnet18', 64, list(ATTENTION)), ('xresnet50', 128, ['none', 'simple', 'sagan'])]  # arch, size, layers
NETWORKS_QUICK = [('xresnet18', 32, ['none', 'simple'])]
# The option sym of fastai's layer does nothing.
COUNTERPARTS = {'simple': 'fastai simple', 'simple_sym': 'fastai simple', 'sagan': 'fastai sagan',
                'sagan fused': 'fastai sagan'}
SWITCHES = dict(fused=0, channels_last=0, keep_memory=0, compile=1)
SQUARES_MB = 1024  # a layer that holds N x N matrices of more than that is skipped


# --- measuring ---

def matrix_rate(device):
    "Returns multiply-adds per second of a float32 matrix product (float16 on CUDA), the best of ten."
    n, dtype = (8192, torch.float16) if device.type == 'cuda' else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return n**3 / take_turns([lambda: a @ a], device, 10).min()


def copy_rate(device):
    "Returns the bytes per second read and written by a copy of 256 MiB, the best of ten."
    a = torch.zeros(2**26, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / take_turns([lambda: b.copy_(a)], device, 10).min()


class CountBytes(TorchDispatchMode):
    "Counts the `bytes` that the operations within read and write, each tensor once an operation; views move nothing."
    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        return out


def floor(cfg, model, device):
    """Returns (the seconds of the products of a step of `model` on `device`, the seconds that it takes at least).

    The products run at `matrix_rate`. At least: if every tensor that an operation reads or writes moves once at
    `copy_rate`, before or after them.
    """
    x = torch.randn(cfg.bs, 3, cfg.size, cfg.size, device=device).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as flops, CountBytes() as moved:
        with autocast(cfg.precision, device): y = model(x).sum()
        y.backward()
    products = flops.get_total_flops() / 2 / matrix_rate(device)
    return products, products + moved.bytes / copy_rate(device)


# --- the benchmarks: each gives the rows of its table ---

def layer(args, device):
    """Measures forward + backward of a layer, gamma not 0, float32 on a CPU, float16 autocast on CUDA.

    faster: the median of fastai's time over ours in the same round, faster_low and faster_high its quartiles.
    """
    rounds = 3 if args.quick else 15
    for name, full, quick in LAYERS:
        shape = quick if args.quick else full
        x, g = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)
        steps = [partial(forward_backward, make(shape[1]).to(device), x, g) for make in (PEERS[name], ATTENTION[name])]
        theirs, ours = take_turns(steps, device, rounds)
        their_mb, our_mb = (peak_mb(f, device) for f in steps)
        yield dict(layer=name, shape='x'.join(map(str, shape)), rounds=rounds, fastai_ms=1e3 * np.median(theirs),
                   ours_ms=1e3 * np.median(ours), **spread('faster', theirs / ours),
                   fastai_mb=their_mb, ours_mb=our_mb, memory=our_mb / their_mb)


def forward_backward(module, x, g):
    "Returns the gradients of x and the parameters, gamma being 0.1 where there is one."
    if hasattr(module, 'gamma'): module.gamma.data.fill_(0.1)
    with torch.autocast('cuda', torch.float16, enabled=x.is_cuda): y = module(x)
    return torch.autograd.grad(y, [x, *module.parameters()], g.to(y.dtype))


class Fused(SelfAttention):
    "Computes sagan in float32 on a CPU as in half precision or on a GPU: what it takes instead has to be faster."
    @staticmethod
    def _in_blocks(x, dtype): return False


def contenders(C, N):
    """Yields (layer, order, whether the layer takes it of itself, multiply-adds an image, module).

    Our layers in every order, and fastai's. The order is None where there is but one.
    """
    for name, make in ATTENTION.items():
        module = make(C)
        if isinstance(module, SimpleSelfAttention):
            taken = module.order_at(N)
            yield from ((name, order, order == taken, count, make(C, order=order))
                        for order, count in module.counts(N).items())
        elif name != 'none': yield name, None, True, module.multiply_adds(N), module
    sagan = ATTENTION['sagan'](C).multiply_adds(N)
    yield 'sagan fused', None, False, sagan, Fused(C)
    yield 'fastai simple', 'source', True, multiply_adds(C, N)['source'], PEERS['simple'](C)
    yield 'fastai sagan', None, True, sagan, PEERS['sagan'](C)


def cost(args, device):
    """Measures the `contenders` as `layer` does, at about 4,096 positions a call (1,024 with --quick).

    auto: whether the layer takes this order of itself. ms, ms_low, ms_high: the median and the quartiles of `rounds`
    calls, all layers in turn in each round. faster: the median of fastai's time over ours in the same round,
    faster_low and faster_high its quartiles; memory: ours over fastai's; these where fastai has the layer.

    `positions` and fastai's sagan hold four N x N matrices an image: where they would pass SQUARES_MB the row has no
    time and no memory. On CUDA the positions and the bound are 8 times as many.
    """
    scale = 8 if device.type == 'cuda' else 1
    for C, side in QUICK_COST if args.quick else COST:
        N = side**2  # B, C, N as in layers.py
        B = max(1, scale * (1024 if args.quick else 4096) // N)
        x = torch.randn(B, C, side, side, device=device, requires_grad=True)
        g = torch.randn(B, C, side, side, device=device)
        print(f'C = {C}, N = {N}, {B} images a call', file=sys.stderr)
        measured = []
        for name, order, auto, count, module in contenders(C, N):
            row = dict(layer=name, order=order, auto=auto, B=B, C=C, N=N, multiply_adds=count)
            squares = order == 'positions' or name == 'fastai sagan'
            squares_mb = 4 * B * N**2 * x.element_size() / 2**20 if squares else 0
            if squares_mb > scale * SQUARES_MB: yield row
            else: measured.append((row, partial(forward_backward, module.to(device), x, g)))
        rounds = 3 if args.quick else 25
        names = [row['layer'] for row, _ in measured]
        seconds = take_turns([f for _, f in measured], device, rounds)
        mb = [peak_mb(f, device) for _, f in measured]
        for i, (row, _) in enumerate(measured):
            row |= spread('ms', 1e3 * seconds[i]) | dict(rounds=rounds, peak_mb=mb[i])
            peer = COUNTERPARTS.get(names[i])
            if peer in names:
                peer = names.index(peer)
                row |= spread('faster', seconds[peer] / seconds[i]) | dict(memory=mb[i] / mb[peer])
            yield row


def spread(name, values):
    "Returns {name, name_low, name_high}: the median and the quartiles."
    low, median, high = np.percentile(values, [25, 50, 75])
    return {name: median, f'{name}_low': low, f'{name}_high': high}


def equality(C=256, side=32):
    """Returns the largest error of each order in float32 against (x x^T)(W x) in float64, over the largest value.

    `other_weights` is that of a layer with other weights, which a check has to reject; with gamma 0 none can.
    """
    x = torch.randn(2, C, side, side)
    z = x.double().flatten(2)  # (B, C, H, W) -> (B, C, N)
    layer, other = (SimpleSelfAttention(C).eval() for _ in range(2))
    rows = []
    for gamma in (0., 0.1):
        y = (z + gamma * (z @ z.mT) @ (layer.conv().double() @ z)).detach()
        for order in multiply_adds(C, side**2):
            errors = []
            for weights in (layer, other):
                module = SimpleSelfAttention(C, order=order).eval()
                module.load_state_dict(weights.state_dict() | dict(gamma=torch.tensor([gamma])))
                errors.append(((module(x).flatten(2) - y).abs().max() / y.abs().max()).item())
            rows.append(dict(gamma=gamma, order=order, own_weights=errors[0], other_weights=errors[1]))
    return pd.DataFrame(rows)


class Clock(Callback):
    """Ends the fit after `n` training steps, and keeps `seconds` of them.

    The first two steps of a fit are left out (the loader starts).
    On a CPU `seconds` are those of each step; on a GPU their mean, so that no step waits for the one before.
    """
    def __init__(self, n): self.n, self.seconds = n, []

    def after_step(self):
        whole = self.dls.device.type != 'cpu'
        if whole and self.iter in (1, self.n - 1): wait_for(self.dls.device)
        now = time.perf_counter()
        if self.iter >= 2 and not whole: self.seconds.append(now - self.last)
        if not whole or self.iter == 1: self.last = now
        if self.iter + 1 == self.n:
            if whole: self.seconds.append((now - self.last) / (self.n - 2))
            raise CancelFitException


def steps(args, device):
    "Returns how many training steps a measurement takes."
    return (6 if args.quick else 8) if device.type == 'cpu' else 52


def clocked(learners, args, device, lr, keep=(True, True), turns=3):
    "Returns the seconds (learners, steps) of each Learner, which take `turns`, with or without keep_memory()."
    n = steps(args, device)
    clocks = [Clock(n) for _ in learners]
    for _ in range(1 if args.quick else turns):
        for learn, clock, kept in zip(learners, clocks, keep):
            keep_memory(kept and device.type == 'cpu')
            with learn.no_bar(), learn.no_logging(): learn.fit(1, lr, cbs=clock)
    if not all(clock.seconds for clock in clocks):
        raise UsageError(f'--data: has fewer than {n} batches, which a measurement takes')
    return np.array([clock.seconds for clock in clocks])


def plain_learner(cfg, device):
    "Returns the Learner of `cfg` written with fastai's own parts, the way its train_imagenette.py example is."
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=GrandparentSplitter(valid_name='val'), batch_tfms=Normalize.from_stats(*imagenet_stats),
                      item_tfms=[RandomResizedCrop(cfg.size, min_scale=0.35), FlipItem(0.5)])
    dls = block.dataloaders(cfg.data, bs=cfg.bs, num_workers=settle(cfg, device).workers, device=device)
    opt = partial(Adam, mom=cfg.mom, sqr_mom=cfg.sqrmom, eps=cfg.eps)
    learn = Learner(dls, xresnet50(n_out=dls.c, sa=True), LabelSmoothingCrossEntropy(), opt, wd=cfg.wd,
                    metrics=[accuracy, partial(top_k_accuracy, k=min(5, dls.c))])
    return learn.to_fp16() if device.type == 'cuda' else learn


def random_images(folder, n, size=(213, 160)):
    "Writes `n` smooth random JPEGs for training in 10 classes, and one each for validation; returns the folder."
    rng = np.random.default_rng(0)
    for i in range(n + 10):
        file = Path(folder) / ('train' if i < n else 'val') / str(i % 10) / f'{i}.JPEG'
        file.parent.mkdir(parents=True, exist_ok=True)
        im = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        im.resize(size, Image.BICUBIC).save(file, quality=90)
    return str(folder)


def step_config(args, device, folder, **kwargs):
    bs = 16 if args.quick else 64
    data = args.data or random_images(folder, max(10, steps(args, device)) * bs)
    return Config(**dict(dataset='custom', data=data, split='v2', attention='simple', bs=bs) | kwargs)


def step(args, device):
    "Measures a whole training step: loading, augmentation, model, loss, optimizer, metrics."
    with tempfile.TemporaryDirectory() as folder:
        cfg, dls, model = prepare(step_config(args, device, folder), device)
        learners = [plain_learner(cfg, device), get_learner(cfg, dls, model)]
        theirs, ours = np.median(clocked(learners, args, device, cfg.lr, keep=(False, True)), axis=1)
        products, floor_seconds = floor(cfg, model, device)
        yield dict(model=cfg.model, size=cfg.size, bs=cfg.bs, precision=cfg.precision, loader=cfg.loader,
                   fastai_images_per_second=cfg.bs / theirs, ours_images_per_second=cfg.bs / ours, faster=theirs / ours,
                   seconds=ours, floor_seconds=floor_seconds, matrix_share=products / ours)


class OneBatch(ImageLoader):
    "Gives the first batch of a loader over and over."
    def __init__(self, loader):
        super().__init__(loader.dataset, bs=loader.bs, drop_last=True, device=loader.device)
        self.batch = next(iter(loader))

    def __iter__(self): return iter([self.batch] * len(self))


def loader(args, device):
    "Measures images per second of each loader alone, of a step with it, and of a step on one batch over and over."
    with tempfile.TemporaryDirectory() as folder:
        cfg = step_config(args, device, folder, **dict(size=64, arch='xresnet18') if args.quick else {})
        for kind in ('workers', 'device'):
            cfg, dls, model = prepare(replace(cfg, loader=kind), device)
            start, n = time.perf_counter(), 0
            for x, _ in dls.train: n += len(x)
            wait_for(device)
            alone = n / (time.perf_counter() - start)
            learners = [get_learner(cfg, d, m) for d, m in ((dls, model), (get_one_batch(dls), copy.deepcopy(model)))]
            seconds = np.median(clocked(learners, args, device, cfg.lr), axis=1)
            yield dict(loader=kind, model=cfg.model, size=cfg.size, bs=cfg.bs, precision=cfg.precision,
                       workers=cfg.workers, loader_images_per_second=alone,
                       step_images_per_second=cfg.bs / seconds[0],
                       one_batch_images_per_second=cfg.bs / seconds[1], share=seconds[1] / seconds[0])


def get_one_batch(dls):
    "Returns `dls` with OneBatch in place of the training loader."
    one = DataLoaders(OneBatch(dls.train), dls.valid, path=dls.path, device=dls.device)
    one.vocab = dls.vocab
    return one


def switches(args, device):
    """Measures a training step on one batch over and over, with each of the SWITCHES the other way than by default.

    time: the median of the step's time over that of the default's in the same turn, time_low and time_high its
    quartiles, over `steps` steps. The first two steps of a turn are left out, so what compiling takes is not in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg, dls, model = prepare(step_config(args, device, folder, arch='xresnet18', size=64), device)
        arms = [('default', cfg)] + [(f'--{name.replace("_", "-")} {value}', replace(cfg, **{name: value}))
                                     for name, value in SWITCHES.items()]
        one = get_one_batch(dls)
        learners = [get_learner(arm, one, copy.deepcopy(model)) for _, arm in arms]
        seconds = clocked(learners, args, device, cfg.lr, [arm.keep_memory for _, arm in arms], turns=5)
        for (switch, _), times in zip(arms, seconds):
            yield dict(switch=switch, model=cfg.model, size=cfg.size, bs=cfg.bs, precision=cfg.precision,
                       steps=len(times), images_per_second=cfg.bs / np.median(times),
                       **spread('time', times / seconds[0]))


def network(args, device):
    """Measures a training step with each layer on one batch of random numbers, beside a step without, in turn.

    ratio: its time over that of none in the same round, the median, with its quartiles ratio_low and ratio_high.
    parameters and multiply_adds (an image, forward) are those of the layer.
    """
    for arch, size, names in NETWORKS_QUICK if args.quick else NETWORKS:
        arms = {name: settle(Config(arch=arch, size=size, attention=name), device) for name in names}
        costs = {name: layer_costs(cfg, device) for name, cfg in arms.items()}
        for name, measured in measure_steps(arms, device, rounds=3 if args.quick else None).items():
            cfg = arms[name]
            yield dict(layer=name, arch=arch, size=size, bs=cfg.bs, precision=cfg.precision,
                       parameters=costs[name]['attention_parameters'],
                       multiply_adds=costs[name]['attention_multiply_adds'], **measured)


def run(args, device):
    """Measures whole runs in this process, without and with attention in turn, after a run of one epoch to warm up.

    Their rows go to runs.csv under the results directory of the benchmarks, not to the record.
    """
    cfg = args.config
    arms = [replace(cfg, attention=a) for a in ('none', cfg.attention if cfg.attention != 'none' else 'simple')]
    results = args.results / 'benchmarks' / 'runs'
    for arm in arms[:1 if args.quick else 2]: train(replace(arm, epochs=1), results, device)
    for seed in range(1 if args.quick else 3):
        for arm in arms:
            start = time.perf_counter()
            row = train(replace(arm, seed=seed), results, device)
            seconds = time.perf_counter() - start
            model = get_model(arm, 10).to(device, memory_format=torch.channels_last)
            step_seconds = floor(replace(arm, precision=row['precision']), model, device)[1]
            valid_steps = row['n_val'] / arm.bs / 3  # a third of a training step: forward alone
            steps = arm.epochs * (row['n_train'] // arm.bs + valid_steps)
            columns = ('dataset', 'split', 'size', 'epochs', 'arch', 'attention', 'precision', 'loader', 'compile',
                       'seed', 'accuracy', 'images_per_second', 'fit_seconds')
            yield {k: row[k] for k in columns} | dict(seconds=seconds, floor_seconds=steps * step_seconds)


BENCHMARKS = {'layer': layer, 'step': step, 'network': network, 'loader': loader, 'switches': switches, 'run': run,
              'cost': cost}
