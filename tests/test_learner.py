"The recipe and its speed-ups: schedule, optimizer, precision, memory, compiled and recorded passes."
import copy
import functools
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, parsed, record
from fastai.callback.fp16 import AMPMode
from fastai.callback.training import ShortEpochCallback
from fastai.learner import AvgSmoothLoss
from fastai.optimizer import OptimWrapper

import training.machine
import training.run
from command import UsageError
from experiments import Config
from layers import SimpleSelfAttention
from training.learner import Compile, Graphs, SmoothLoss, get_opt_func


def learner(tree, *argv, device='cpu'):
    cfg, dls, model = training.run.prepare(parsed('--data', tree, *TINY, *argv), torch.device(device))
    return cfg, training.run.get_learner(cfg, dls, model)


def hyperparameters(tree, *argv):
    "What the optimizer used in each step: {name: array}."
    cfg, learn = learner(tree, *argv)
    training.run.fit(learn, cfg)
    return {k: np.array(v) for k, v in learn.recorder.hps.items()}, learn


def test_bf16_is_for_cpus_that_have_it(tree, command, tmp_path, monkeypatch):
    for flags, has in [('fpu avx2', False), ('fpu avx512_bf16', True), ('amx_bf16 amx_tile', True)]:
        (tmp_path / 'cpuinfo').write_text(f'processor : 0\nflags\t\t: {flags}\n')
        assert training.machine.has_bf16(tmp_path / 'cpuinfo') == has
    for has, code in [(False, 2), (True, 0)]:
        monkeypatch.setattr(training.machine, 'has_bf16', lambda has=has: has)
        assert command('--data', tree, *TINY, '--precision', 'bf16', '--sa')[0] == code
    assert record(tmp_path).precision.tolist() == ['bf16']


def test_one_cycle_is_the_sources(tree):
    hps, learn = hyperparameters(tree, '--epochs', 4)
    lr, mom = hps['lr'], hps['mom']
    # lr/10 up to lr in 30 %
    assert len(lr) == 20 and lr[0] == pytest.approx(3e-4) and lr.argmax() == 6 and lr.max() == pytest.approx(3e-3)
    assert lr[-1] < 1e-4 and mom[0] == pytest.approx(0.95) and mom[6] == pytest.approx(0.85) and mom[-1] > 0.94
    hyper = learn.opt.hypers[0]
    assert (hyper['sqr_mom'], hyper['eps'], hyper['wd']) == (0.99, 1e-6, 1e-2) and learn.loss_func.eps == 0.1


def test_flat_cos_keeps_the_learning_rate_for_three_quarters(tree):
    lr = hyperparameters(tree, '--epochs', 4, '--schedule', 'flat_cos')[0]['lr']
    assert (lr[:15] == 3e-3).all() and lr[-1] < 1e-3


def test_ann_start_is_where_flat_cos_begins_to_fall(tree):
    lr = hyperparameters(tree, '--epochs', 4, '--schedule', 'flat_cos', '--ann-start', 0.5)[0]['lr']
    assert (lr[:11] == 3e-3).all() and lr[11] < 3e-3 and lr[-1] < 2e-4
    # 20 steps, half of the way down
    assert 3e-3 * (1 + math.cos(math.pi * 5 / 10)) / 2 == pytest.approx(lr[15], rel=1e-3)


@pytest.mark.parametrize('fused', [0, 1])
def test_weight_decay_spares_norms_and_biases(tree, fused):
    _, learn = learner(tree, '--sa', '--fused', fused)
    learn.fit(0)
    names = {p: n for n, p in learn.model.named_parameters()}
    decay = {names[p]: hyper['wd'] for p, _, state, hyper in learn.opt.all_params()
             if state.get('do_wd', True) and hyper['wd']}
    norms = {f'{n}.{k}' for n, m in learn.model.named_modules()
             if isinstance(m, torch.nn.BatchNorm2d) for k in ('weight', 'bias')}
    assert names.values() - decay.keys() == norms | {'head.bias'} and set(decay.values()) == {1e-2}


@pytest.mark.parametrize('fused', [0, 1])
def test_one_step_is_decoupled_adam(tree, fused):
    "One batch through the Learner against torch's AdamW with weight decay on the same groups."
    cfg, learn = learner(tree, '--sa', '--fused', fused)
    model = copy.deepcopy(learn.model).train()
    batch = next(iter(learn.dls.train))
    with learn.no_logging(): learn.fit(1, cfg.lr, cbs=ShortEpochCallback(pct=0., short_valid=False))
    torch.nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1).backward()
    groups = {True: [], False: []}
    for p in model.parameters(): groups[p.ndim > 1 or p.shape == (1,)].append(p)
    torch.optim.AdamW([dict(params=groups[True], weight_decay=cfg.wd), dict(params=groups[False], weight_decay=0)],
                      lr=cfg.lr, betas=(cfg.mom, cfg.sqrmom), eps=cfg.eps).step()
    for (name, p), q in zip(learn.model.named_parameters(), model.parameters()):
        assert torch.allclose(p, q, atol=1e-5), name


def test_the_epsilon_of_rms_is_passed_on():
    p = torch.nn.Parameter(torch.tensor([1.]))
    p.grad = torch.tensor([0.1])
    get_opt_func(Config(opt='rms', mom=0, eps=0.5))([p], lr=0.2).step()
    assert p.item() == pytest.approx(1 - 0.2 * 0.1 / ((0.01 * 0.1**2)**0.5 + 0.5))  # the squares' average starts at 0


@pytest.mark.parametrize('opt', ['ranger', 'radam'])
def test_beta_makes_the_steps_of_sadam(opt):
    "The denominator of a step becomes softplus(beta v) / beta: beta 0 is without it, and a large one nearly so."
    moved = []
    for beta in (0., 1e3, 2.):
        p = torch.nn.Parameter(torch.tensor([1.]))
        optimizer = get_opt_func(Config(opt=opt, beta=beta, sqrmom=0.9, eps=1e-3))([p], lr=0.01)
        for _ in range(20):
            p.grad = torch.tensor([0.1])
            optimizer.step()
        moved.append(1 - p.item())
    assert moved[0] == pytest.approx(moved[1], rel=0.02) and moved[2] < 0.7 * moved[0]


def test_fused_adam_is_fastais_step_for_step(tree):
    "The same gradients and the same cycle of learning rate and momentum to both: the weights agree to 1e-6."
    learners = [learner(tree, '--sa', '--fused', fused)[1] for fused in (0, 1)]
    for learn in learners: learn.fit(0)  # makes the optimizer
    pairs = list(zip(*(learn.model.parameters() for learn in learners)))
    assert isinstance(learners[1].opt, OptimWrapper) and not isinstance(learners[0].opt, OptimWrapper)
    for step in range(12):
        for p, q in pairs:
            p.grad = torch.randn_like(p) * 10.**(step % 3 - 2)
            q.grad = p.grad.clone()
        for learn in learners:
            learn.opt.set_hypers(lr=1e-3 * (1 + step % 4), mom=0.95 - 0.02 * (step % 5))
            learn.opt.step()
        assert max((p - q).abs().max().item() for p, q in pairs) < 1e-6


def test_the_smoothed_loss_is_fastais(tree):
    learn = learner(tree)[1]
    ours, theirs = SmoothLoss(), AvgSmoothLoss()
    for value in (3., 2., 2.5):
        learn.loss = torch.tensor(value)
        for loss in (ours, theirs): loss.accumulate(learn)
        assert ours.value == theirs.value


def test_memory_format_is_that_of_the_flag(tree):
    for last in (0, 1):
        weight = learner(tree, '--channels-last', last)[1].model.stem1[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == bool(last)


@pytest.mark.slow(9)
@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc')
def test_freed_memory_is_kept(tree):
    code = ('import resource, sys, torch\n'
            'from training.host import keep_memory\n'
            'keep_memory(sys.argv[1] == "1")\n'
            'def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
            'for _ in range(20): torch.ones(2**24)\n'  # 64 MiB, 16,384 pages
            'before = faults()\n'
            'for _ in range(20): torch.ones(2**24)\n'
            'print(faults() - before)')
    runs = [subprocess.run([sys.executable, '-c', code, keep], cwd=REPO, capture_output=True, text=True)
            for keep in '01']
    faults = [int(done.stdout) for done in runs]
    if faults[0] < 10_000: pytest.skip('huge pages, or another allocator: there are no page faults to save')
    assert faults[1] < faults[0] / 2


@pytest.mark.slow(4)
def test_compiled_passes_train_and_are_compiled_once_for_many_runs(tree, command, tmp_path, monkeypatch):
    # the same graphs, without a C++ compiler
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager'))
    argv = ['--data', tree, '--sa', *TINY]
    training.machine.check_compiler('cpu')  # compiles a function of its own, once
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert command(*argv, '--compile', '--runs', 2)[0] == 0
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1
    assert command(*argv)[0] == 0
    loss = record(tmp_path).valid_loss
    assert loss[0] == pytest.approx(loss[2], abs=0.02) and loss[0] != loss[1]


@pytest.mark.parametrize('options', ['', '--fused 0', '--opt sgd', '--opt rms', '--opt ranger'])
def test_compiled_passes_meet_no_gradient_of_the_step_before(options, tree, monkeypatch):
    "fastai's optimizers zero the gradients in place: in the memory of a CUDA graph, which then may not be replayed."
    cfg, learn = learner(tree, *options.split())
    met = []
    def compiled(model, mode):
        outer = torch.nn.Sequential(model)
        outer.register_forward_pre_hook(lambda *_: met.extend(p.grad for p in model.parameters()))
        return outer
    monkeypatch.setattr(torch, 'compile', compiled)
    plain = learner(tree, *options.split())[1]
    for each, cbs in ((plain, []), (learn, [Compile()])): each.fit(2, cfg.lr, cbs=cbs)
    assert met and all(grad is None for grad in met)
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), learn.model.parameters()))


@pytest.mark.parametrize('fused', [0, 1])
def test_recorded_passes_train_as_plain_ones(fused, tree, monkeypatch):
    "A stand-in does to the network what recording does: rounds to warm up, then another `forward`, in training alone."
    def record_passes(graphed, sample):
        for _ in range(3): graphed(*sample).sum().backward()
        forward = graphed.forward
        def replay(x):
            replayed.append(graphed.training)
            return forward(x)
        graphed.forward = replay
    replayed = []
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', record_passes)
    learners = []
    for cbs in ([], [Graphs(32)]):
        _, learn = learner(tree, '--sa', '--epochs', 2, '--fused', fused)
        learn.add_cbs(cbs)
        with learn.no_bar(): training.run.fit(learn, parsed('--epochs', 2))
        learners.append(learn)
    a, b = (learn.model.state_dict() for learn in learners)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert replayed == [True] * 2 * len(learners[0].dls.train) and 'forward' not in learners[1].model.__dict__


def test_the_forward_pass_alone_is_recorded_under_autocast(tree, monkeypatch):
    "The small products of the layer are float32; in a backward pass under autocast they would overflow in float16."
    def record_passes(graphed, sample):
        seen.append((torch.is_autocast_enabled('cpu'), graphed(*sample).dtype))
    seen = []
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', record_passes)
    for precision in ('bf16', 'fp32'):
        _, learn = learner(tree, '--sa', '--precision', precision)
        learn.fit(1, cbs=Graphs(32))
    assert seen == [(False, torch.bfloat16), (False, torch.float32)]


def test_what_fails_while_passes_are_recorded_is_the_reason_that_is_said(tree, monkeypatch):
    def fails(graphed, sample):
        try: raise RuntimeError('the first reason')
        finally: raise RuntimeError('operation failed due to a previous error during capture')
    def stops(graphed, sample):
        try: raise KeyboardInterrupt
        finally: raise RuntimeError('operation failed due to a previous error during capture')
    def wraps(graphed, sample):
        try: raise KeyError('conv1')
        except KeyError: raise RuntimeError('not permitted')  # noqa: B904
    for fault, error, words in ((fails, UsageError, 'the first reason'), (stops, KeyboardInterrupt, ''),
                                (wraps, UsageError, 'not permitted')):
        monkeypatch.setattr(torch.cuda, 'make_graphed_callables', fault)
        with pytest.raises(error, match=words): learner(tree)[1].fit(1, cbs=Graphs(32))


def test_the_peak_of_the_memory_is_measured_from_before_the_passes_are_recorded(tree, monkeypatch):
    from training import measure
    calls = []
    monkeypatch.setattr(measure, 'reset_peak_memory', lambda device: calls.append('reset'))
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', lambda *args: calls.append('record'))
    cfg, dls, model = training.run.prepare(parsed('--data', tree, *TINY), torch.device('cpu'))
    learn = training.run.get_learner(cfg, dls, model, [measure.Measure(lambda curve: None)])
    learn.fit(1, cbs=Graphs(32))
    assert calls == ['reset', 'record']


def test_a_network_that_cannot_be_recorded_is_one_line(tree, monkeypatch):
    def fails(graphed, sample): raise RuntimeError('operation not permitted when stream is capturing')
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', fails)
    _, learn = learner(tree)
    with pytest.raises(UsageError, match=r'cannot be recorded .*capturing.*--cuda-graphs 0'):
        learn.fit(1, cbs=Graphs(32))


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
@pytest.mark.parametrize('argv, message', [
    (['--cuda-graphs'], 'needs a CUDA device'), (['--cuda-graphs', '--compile'], 'one of the two'),
])
def test_cuda_graphs_are_refused_where_there_can_be_none(argv, message, tree, command):
    code, _, err = command('--data', tree, *TINY, *argv)
    assert code == 2 and message in err and err.count('\n') == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_cuda_graphs_compute_what_plain_passes_do(precision, command, tmp_path):
    argv = ['--dataset', 'digits', '--size', 32, '--epochs', 2, '--arch', 'xresnet18', '--sa', '--precision', precision]
    for graphs in (0, 1): assert command(*argv, '--cuda-graphs', graphs)[0] == 0
    df = record(tmp_path)
    assert df.train_loss[0] == pytest.approx(df.train_loss[1], rel=0.02) and df.cuda_graphs.tolist() == [0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_a_large_loss_scale_overflows_in_no_recorded_layer():
    device = torch.device('cuda', 0)
    layer = SimpleSelfAttention(64)
    layer.gamma.data.fill_(0.1)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), torch.nn.BatchNorm2d(64), layer).to(device)
    graphs, plain = Graphs(32), copy.deepcopy(model)
    graphs.learn = SimpleNamespace(model=model, precision=SimpleNamespace(amp_mode=AMPMode.FP16),
                                   dls=SimpleNamespace(device=device, train=SimpleNamespace(bs=4)))
    graphs.before_fit()
    x = torch.randn(4, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    for network in (plain, graphs.fast):
        with torch.autocast('cuda', torch.float16, cache_enabled=False): y = network(x)
        g = torch.ones_like(y) / y.numel()**0.5
        y.backward(2**13 * g)
        # The convolution is in float16 in any case, and its gradient may be too large for that.
        assert all(bool(p.grad.isfinite().all()) for p in network[-1].parameters())


@pytest.mark.parametrize('middle, high, low', [
    (0, 0.05, 0), (0.5, 0.55, 0.45), (0.95, 0.975, 0.9), (0.99, 0.995, 0.94),
])
def test_the_cycle_of_the_momentum_stays_within_0_and_1(middle, high, low, tree):
    mom = hyperparameters(tree, '--epochs', 4, '--mom', middle)[0]['mom']
    assert mom[0] == pytest.approx(high) and mom.max() < 1 and mom.min() == pytest.approx(low)


def test_momentum_is_constant_under_flat_cos(tree):
    assert {h['mom'] for h in hyperparameters(tree, '--mom', 0.95, '--schedule', 'flat_cos')[1].opt.hypers} == {0.95}
