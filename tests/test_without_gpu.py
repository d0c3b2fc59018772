"""What of the way on a GPU can be tested without one is tested here.

Stand-ins take the place of its tensors, its events, its overflows and its memory.
"""
import contextlib
import itertools
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import config, make_image
from fastai.callback.core import Callback
from torch._subclasses.fake_tensor import FakeTensorMode

import training.measure
import training.run
from command import exit_code
from experiments import Config
from layers import ATTENTION
from training import cluster, data, host, jobs
from training.data import ImageLoader, get_dls
from training.images import Pixels, crop_boxes, epoch_draws
from training.learner import get_learner
from training.measure import FiniteLoss, Measure
from training.readers import START_METHOD

CUDA, CPU = torch.device('cuda', 0), torch.device('cpu')


# --- tensors: a fake one has a device and no memory, and an operation on two devices is an error ---

@pytest.mark.parametrize('name', ATTENTION)
def test_a_network_makes_no_tensor_on_another_device(name):
    with FakeTensorMode(), CUDA:
        logits = training.run.get_model(Config(arch='xresnet18', attention=name), 10)(torch.randn(2, 3, 64, 64))
    assert logits.device == CUDA and logits.shape == (2, 10)


def test_crops_and_batches_stay_on_the_device(tmp_path):
    for i, size in enumerate([(60, 48), (33, 70), (64, 64)]): make_image(i, size).save(tmp_path / f'{i}.png')
    pixels = Pixels(sorted(tmp_path.iterdir()), CPU)
    order, u, flip = epoch_draws(0, 0, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels.data = torch.empty(pixels.data.shape, dtype=torch.uint8, device=CUDA)
        x = pixels.crops(order, crop_boxes(u, pixels.width, pixels.height)[order], flip[order], 32)
        batch, _ = ImageLoader.after_batch(SimpleNamespace(erase=None), (x, None))
    data.imagenet_statistics.cache_clear()  # of fake tensors
    for t, dtype in ((x, torch.uint8), (batch, torch.float32)):
        assert t.device == CUDA and t.dtype == dtype and t.shape == (3, 3, 32, 32)
        assert t.is_contiguous(memory_format=torch.channels_last)


# --- events: a loss reaches the host when its event has come ---

def test_a_loss_that_is_not_finite_is_seen_when_it_arrives_and_nothing_waits_for_it(monkeypatch):
    events = []
    def record_event():
        events.append(SimpleNamespace(come=False))
        events[-1].query = lambda event=events[-1]: event.come
        return events[-1]
    empty = torch.empty
    monkeypatch.setattr(torch, 'empty', lambda *size, pin_memory: empty(*size))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: SimpleNamespace(record_event=record_event))
    finite = FiniteLoss()
    def step(value): return finite(SimpleNamespace(device=CUDA, detach=lambda: torch.tensor(value)))
    assert step(1.) and step(float('nan')) and step(2.)
    events[0].come = events[2].come = True
    assert step(3.), 'the second one has not come, and none overtakes it'
    events[1].come = True
    assert not step(4.)


def test_no_epoch_is_trained_after_a_validation_that_diverged(tree, monkeypatch):
    "On a GPU the losses are still on their way then."
    monkeypatch.setattr(training.measure, 'FiniteLoss', lambda: lambda loss: True)
    class Breaks(Callback):
        n_steps = 0
        def after_loss(self):
            if self.training: self.n_steps += 1
            else: self.learn.loss = self.learn.loss * float('nan')
    cfg = config(tree)
    measure, breaks = Measure(lambda curve: None), Breaks()
    learn = get_learner(replace(cfg, precision='fp32'), get_dls(cfg), Tiny(), [measure, breaks])
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    assert measure.diverged and len(measure.curve) == 1 and breaks.n_steps == len(learn.dls.train)


# --- float16: GradScaler as on a GPU ---

class Tiny(torch.nn.Module):
    "A network that a CPU runs in float16 at once."
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 10)
    def forward(self, x): return self.head(x.mean((2, 3)))


class Overflow(Callback):
    "Makes the gradients of a step infinite; `seen`: (scale, weights) after each step."
    order = 20  # after Precision
    def __init__(self, at): self.at, self.n, self.seen = at, -1, []
    def before_fit(self): self.learn.scaler.set_growth_interval(3)
    def before_batch(self): self.n += self.training
    def after_backward(self):
        if self.n == self.at: self.model.head.weight.grad.fill_(float('inf'))
    def after_batch(self):
        if self.training: self.seen.append((self.learn.scaler.get_scale(), self.model.head.weight.detach().clone()))


@pytest.mark.parametrize('options', [dict(fused=1), dict(fused=0), dict(opt='sgd')])
def test_float16_skips_a_step_that_overflows_halves_the_scale_and_doubles_it_later(options, tree):
    cfg = config(tree, **options)
    dls = get_dls(cfg)
    overflow = Overflow(at=2)
    learn = get_learner(replace(cfg, precision='fp16'), dls, Tiny(), [overflow])
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    scales, weights = zip(*overflow.seen)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert len(moved) == 9, 'the step that overflowed, and no other, is left out'
    assert moved == [step != 2 for step in range(1, 10)], 'the step that overflowed, and no other, is left out'
    first = 2.**16
    assert scales[:6] == (first, first, first / 2, first / 2, first / 2, first)
    assert all(torch.isfinite(w).all() for w in weights)


# --- memory ---

@pytest.mark.parametrize('free_gib, size, share', [
    (80, 128, 1 / 2), (24, 256, 1 / 2), (11, 256, 5 / 11), (6, 256, 0), (2, 128, 1 / 4),
])
def test_decoded_images_leave_the_memory_that_training_takes(free_gib, size, share, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free_gib * 2**30, free_gib * 2**30))
    monkeypatch.setattr(host, 'memory_bytes', lambda: 2**40)
    assert data.device_bytes(CUDA, 64 * size**2) == share * free_gib * 2**30


@pytest.mark.parametrize('n_runs, n_processes, here_gib, gib', [
    (1, 1, 1000, 40), (4, 1, 1000, 10), (1, 1, 16, 8), (1, 4, 16, 2), (2, 1, 16, 4),
])
def test_decoded_images_leave_what_others_on_this_computer_need(n_runs, n_processes, here_gib, gib, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (80 * 2**30, 80 * 2**30))
    monkeypatch.setattr(host, 'memory_bytes', lambda: here_gib * 2**30)
    monkeypatch.setenv('RUNS_SIDE_BY_SIDE', str(n_runs))
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(n_processes))
    assert data.device_bytes(CUDA, 0) == gib * 2**30
    assert data.device_bytes(CPU, 0) == here_gib * 2**30 // n_processes // n_runs // 4


def test_runs_side_by_side_are_told_how_many_they_are(monkeypatch):
    seen = []
    def worker(*args):
        seen.append(os.environ['RUNS_SIDE_BY_SIDE'])
        return SimpleNamespace(give=lambda task: None)
    monkeypatch.setattr(jobs, 'Worker', worker)
    for device in (CUDA, CPU): jobs.Jobs(3, Path('.'), device).start(None, 0)
    rays = [cluster.environment(gpus)['env_vars']['RUNS_SIDE_BY_SIDE'] for gpus in (None, 0, 1, 0.5, 0.25, 0.3)]
    assert seen == ['3', '3'] and rays == ['1', '1', '1', '2', '4', '3']
    assert 'RUNS_SIDE_BY_SIDE' not in os.environ


def test_a_lack_of_gpu_memory_is_one_line(capsys):
    def work():
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. '
                                     'GPU 0 has a total capacity of 10.57 GiB')
    assert exit_code('train_imagenette.py', work) == 1
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'Tried to allocate 2.00 GiB; lower --bs or --size' in err and 'capacity' not in err


# --- loader processes ---

def test_loader_processes_are_forked_whatever_the_default_of_python_is(tree):
    "As Python 3.14's default, each would import torch anew, at each epoch."
    if START_METHOD != 'fork': pytest.skip('a system that does not fork')
    with default_start_method('forkserver'):
        dls = get_dls(config(tree, workers=2))
        assert dls.train.fake_l.multiprocessing_context.get_start_method() == 'fork'
        assert len(next(iter(dls.train))[0]) == 6
    assert get_dls(config(tree)).train.fake_l.multiprocessing_context is None


@contextlib.contextmanager
def default_start_method(method):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try: yield
    finally: multiprocessing.set_start_method(before, force=True)
