"""Every knob of the recipe reaches what it names: the draws of an epoch, weights, network, loss, optimizer."""
import numpy as np
import pytest
import torch
from conftest import config
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.optimizer import Adam, Lamb, Lookahead, RAdam, RMSProp, ranger
from torch import nn

import training.run
from experiments import Config
from training.images import epoch_draws
from training.learner import get_learner, get_opt_func
from training.run import get_model, prepare

CPU = torch.device('cpu')


def learner(tree, cbs=(), **knobs):
    cfg, dls, model = prepare(config(tree, arch='xresnet18', **knobs), CPU)
    return get_learner(cfg, dls, model, cbs), cfg


def fit(learn, cfg):
    with learn.no_bar(), learn.no_logging(): training.run.fit(learn, cfg)


# --- seeds ---

class Notes(Callback):
    "Keeps what the epochs are made of: the order of the images, the draws of their crops, the mixup of each batch."
    order = 100  # after MixUp
    def before_fit(self): self.orders, self.draws, self.mixed = [], [], []

    def before_train(self):
        data = self.dls.train.dataset
        self.orders.append(data.order.tolist())
        self.draws.append(data.u.copy())

    def before_batch(self):
        if self.training: self.mixed.append(self.learn.mix_up.lam.flatten().tolist())


def noted(tree, seed):
    notes = Notes()
    fit(*learner(tree, [notes], seed=seed, epochs=2, mixup=0.4))
    return notes


@pytest.mark.slow(3)
def test_each_epoch_has_the_order_the_crops_and_the_mixup_of_its_seed_and_number(tree):
    first, again, other = noted(tree, 0), noted(tree, 0), noted(tree, 1)
    for epoch in (0, 1):
        order, u, _ = epoch_draws(0, epoch, 30)
        assert first.orders[epoch] == order.tolist() and np.array_equal(first.draws[epoch], u)
    half = len(first.mixed) // 2
    assert first.mixed == again.mixed and first.mixed[:half] != first.mixed[half:]
    assert first.mixed[:half] != other.mixed[:half] and first.orders != other.orders


def test_the_weights_are_those_of_the_seed_in_every_arm(tree):
    def weights(**knobs): return prepare(config(tree, arch='xresnet18', **knobs), CPU)[2].state_dict()
    first, again, other, simple = (weights(**knobs) for knobs in ({}, {}, dict(seed=1), dict(attention='simple')))
    moved = {name for name in first if not torch.equal(first[name], other[name])}
    assert {name for name, value in first.items() if value.ndim > 1} == moved, 'every convolution, and the head'
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], simple[name]) for name in first)


# --- the network ---

@pytest.mark.parametrize('arch', ['xresnet18', 'xse_resnext18'])
def test_activation_pool_and_stem_are_those_of_the_knobs(arch):
    def kinds(**knobs): return [type(m) for m in get_model(Config(arch=arch, **knobs), 3).modules()]
    plain, changed = kinds(), kinds(act='mish', pool='max')
    assert nn.Mish not in plain and nn.ReLU in plain and nn.Mish in changed
    assert plain.count(nn.MaxPool2d) == 1 and nn.AvgPool2d in plain  # that behind the stem
    assert changed.count(nn.MaxPool2d) > 1 and nn.AvgPool2d not in changed
    for stem in ('32-32-64', '32-64-64'):
        convs = [m for m in get_model(Config(arch=arch, stem=stem), 3).modules() if isinstance(m, nn.Conv2d)]
        assert '-'.join(str(conv.out_channels) for conv in convs[:3]) == stem


# --- loss and steps ---

def test_mixup_is_that_of_the_knob(tree):
    (mixup,) = [cb for cb in learner(tree, mixup=0.4)[0].cbs if isinstance(cb, MixUp)]
    assert mixup.distrib.concentration0 == mixup.distrib.concentration1 == 0.4
    assert not any(isinstance(cb, MixUp) for cb in learner(tree)[0].cbs)


@pytest.mark.parametrize('fused', [0, 1])
def test_decay_moments_epsilon_and_smoothing_are_those_of_the_knobs(fused, tree):
    learn, cfg = learner(tree, fused=fused, wd=0.03, sqrmom=0.9, eps=1e-3, mom=0.8, label_smoothing=0.2,
                         schedule='flat_cos', epochs=1)
    fit(learn, cfg)
    assert learn.loss_func.eps == 0.2
    first = learn.opt.hypers[0]
    assert (first['wd'], first['eps'], first['mom']) == (0.03, 1e-3, 0.8)
    if not fused: assert first['sqr_mom'] == 0.9
    else: assert {group['betas'] for group in learn.opt.opt.param_groups} == {(0.8, 0.9)}


def steps(make, n=8):
    "Returns a weight after `n` steps of an optimizer with fixed gradients."
    p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    opt = make([p])
    for step in range(n):
        p.grad = torch.sin(torch.arange(12.) + step).view(3, 4)
        opt.step()
    return p.detach()


KNOBS = dict(mom=0.8, sqrmom=0.95, eps=1e-3)


@pytest.mark.parametrize('opt, reference', [
    ('rms', RMSProp), ('radam', RAdam), ('lamb', Lamb), ('ranger', ranger),
    ('lookahead', lambda params, **moments: Lookahead(Adam(params, **moments))),
])
def test_the_steps_are_those_of_fastais_optimizer(opt, reference):
    def ours(opt): return lambda params: get_opt_func(Config(opt=opt, fused=0, **KNOBS))(params, lr=0.1, wd=0.1)
    def theirs(params):
        made = reference(params, lr=0.1, wd=0.1, mom=KNOBS['mom'], sqr_mom=KNOBS['sqrmom'], eps=KNOBS['eps'])
        if opt == 'rms': made.set_hyper('eps', KNOBS['eps'])  # fastai 2.8.12 drops it
        return made
    assert torch.allclose(steps(ours(opt)), steps(theirs), atol=1e-7)
    assert not torch.allclose(steps(ours(opt)), steps(ours('adam')))


def test_sgd_decays_the_weights_apart_from_the_momentum():
    found = steps(lambda params: get_opt_func(Config(opt='sgd', mom=0.9))(params, lr=0.1, wd=0.3), 3)
    p, average = torch.linspace(-1, 1, 12).view(3, 4), 0
    for step in range(3):
        average = 0.9 * average + torch.sin(torch.arange(12.) + step).view(3, 4)
        p = p * (1 - 0.1 * 0.3) - 0.1 * average
    assert torch.allclose(found, p, atol=1e-6)
