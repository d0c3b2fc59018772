"""Measures training steps and layers side by side.

They take turns, so that what slows the machine down meets all alike.
"""
import time
from contextlib import contextmanager

import numpy as np
import torch
from fastai import layers as fastai_layers
from fastai.losses import LabelSmoothingCrossEntropy

from training.host import keep_memory
from training.layer import ready
from training.learner import decay_groups, get_opt_func
from training.machine import autocast, prepare_device, wait_for
from training.run import get_model

PEERS = {'simple': fastai_layers.SimpleSelfAttention, 'sagan': fastai_layers.SelfAttention}  # fastai's own layers


def take_turns(functions, device, rounds):
    "Returns the seconds (functions, rounds) of the functions, called in turn `rounds` times after one call to warm up."
    seconds = [[] for _ in functions]
    for n in range(rounds + 1):
        for times, f in zip(seconds, functions):
            start = time.perf_counter()
            f()
            wait_for(device)
            if n: times.append(time.perf_counter() - start)
    return np.array(seconds)


def peak_mb(f, device):
    "Returns the peak MiB of tensors allocated during f() beyond those before it."
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        f()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if device.type == 'mps':
        torch.mps.empty_cache()
        before = torch.mps.driver_allocated_memory()
        f()
        return (torch.mps.driver_allocated_memory() - before) / 2**20
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile: f()
    events = profile.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == '[memory]'), key=lambda e: e.start_ns())
    return float(np.cumsum([e.nbytes() for e in events]).max()) / 2**20


def training_step(cfg, device, n_classes=10):
    """Returns a function of one training step of a settled `cfg` on one batch of random numbers, which gives its loss.

    A step is forward, loss, backward and optimizer; nothing is loaded.
    """
    x = torch.randn(cfg.bs, 3, cfg.size, cfg.size)
    model, x = ready(cfg.channels_last, device, get_model(cfg, n_classes).train(), x)
    y = torch.randint(n_classes, (cfg.bs,), device=device)
    loss_func, opt = LabelSmoothingCrossEntropy(cfg.label_smoothing), get_opt_func(cfg)(decay_groups(model), lr=cfg.lr)

    def step():
        with autocast(cfg.precision, device): loss = loss_func(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()
    return step


def measure_steps(arms, device, threads=None, rounds=None):
    """Returns {arm: dict(step_ms, ratio, ratio_low, ratio_high, peak_mb)} of training steps of {arm: settled Config}.

    ratio    median over the rounds of the step's time over that of the first arm in the same round, with its quartiles
    threads  of a CPU, as many as a run has
    """
    rounds = rounds or (30 if device.type == 'cuda' else 15)
    prepare_device(next(iter(arms.values())), device)
    with on_threads(threads if device.type == 'cpu' else None), torch.random.fork_rng(devices=[]):
        if device.type == 'cpu': keep_memory(bool(next(iter(arms.values())).keep_memory))
        steps = {arm: training_step(cfg, device) for arm, cfg in arms.items()}
        seconds = take_turns(list(steps.values()), device, rounds)
        memory = [peak_mb(step, device) for step in steps.values()]
    low, ratio, high = np.quantile(seconds / seconds[0], (0.25, 0.5, 0.75), axis=1)
    columns = dict(step_ms=1e3 * np.median(seconds, 1), ratio=ratio, ratio_low=low, ratio_high=high, peak_mb=memory)
    return {arm: {name: float(values[i]) for name, values in columns.items()} for i, arm in enumerate(arms)}


@contextmanager
def on_threads(n):
    "Has torch compute on `n` threads in the block, or on as many as before where that is None."
    before = torch.get_num_threads()
    if n: torch.set_num_threads(n)
    try: yield
    finally: torch.set_num_threads(before)
