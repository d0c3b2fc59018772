"""Every test that can runs over ATTENTION: a new entry is tested for free."""
import copy
import functools
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import layers
from layers import ATTENTION, SelfAttention, SimpleSelfAttention, SpectralWeight, multiply_adds

VARIANTS = [name for name in ATTENTION if name != 'none']
FORMATS = [torch.contiguous_format, torch.channels_last]


def trained(name, n_channels=16, **kwargs):
    "A layer in eval mode whose gamma is not 0."
    layer = (ATTENTION[name] if isinstance(name, str) else name)(n_channels, **kwargs).eval()
    layer.gamma.data.fill_(0.3)
    return layer


def error(a, b): return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def grads(layer, x, forward=None):
    "[output, gradient of the input, gradients of the parameters] of the mean square."
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = (forward or layer)(x)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *layer.parameters()])]


def formula(layer):
    "y = x + gamma U (x x^T)(W x) as written, by einsum."
    def forward(x):
        z = x.flatten(2)
        wz = torch.einsum('ij,bjn->bin', layer.weight(), z)
        o = torch.einsum('bij,bjn->bin', torch.einsum('bin,bjn->bij', z, z), wz)
        if layer.out is not None: o = torch.einsum('ij,bjn->bin', layer.out(), o)
        return (z + layer.gamma * o).view_as(x)
    return forward


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('side', [2, 4, 6])  # N = 4, 16, 36 against C = 16: either order is the cheapest once
@pytest.mark.parametrize('order', ['auto', 'channels', 'positions', 'source'])
@pytest.mark.parametrize('options', [{}, {'sym': True}, {'out_conv': True}])
def test_simple_orders_agree_with_the_formula(options, order, side, memory_format):
    layer = trained(SimpleSelfAttention, order=order, **options).double()
    x = torch.randn(3, 16, side, side, dtype=torch.double).to(memory_format=memory_format)
    reference = grads(layer, x, formula(layer))
    assert max(map(error, grads(layer, x), reference)) < 1e-10
    assert max(map(error, grads(layer.float(), x.float()), reference)) < 1e-4


def test_simple_at_the_size_of_the_source():
    layer = trained(SimpleSelfAttention, 256)
    x = torch.randn(2, 256, 32, 32)
    double = copy.deepcopy(layer).double()
    assert max(map(error, grads(layer, x), grads(double, x.double(), formula(double)))) < 1e-4


@pytest.mark.parametrize('order', ['positions', 'source'])
def test_simple_ks3_is_a_convolution_over_the_flattened_positions(order):
    layer = trained(SimpleSelfAttention, ks=3, order=order).double()
    x = torch.randn(2, 16, 5, 5, dtype=torch.double)

    def forward(x):
        z = x.flatten(2)
        return (z + layer.gamma * (z @ z.mT) @ F.conv1d(z, layer.weight().view(16, 16, 3), padding=1)).view_as(x)
    assert max(map(error, grads(layer, x), grads(layer, x, forward))) < 1e-10


@pytest.mark.parametrize('out_conv', [False, True])
@pytest.mark.parametrize('side', [3, 4, 7])
def test_multiply_adds_are_those_done(side, out_conv):
    x = torch.randn(1, 16, side, side)
    counts = multiply_adds(16, side**2, out_conv=out_conv)
    done = {}
    for order in [*counts, 'auto']:
        layer = trained(SimpleSelfAttention, order=order, out_conv=out_conv)
        for norm in (layer.weight, layer.out):  # its own products are not counted
            if norm is not None: norm.forward = functools.partial(torch.clone, norm().detach())
        with FlopCounterMode(display=False) as counter: layer(x)
        done[order] = counter.get_total_flops() // 2
    assert done.pop('auto') == min(counts.values())
    assert done == counts


def test_multiply_adds_of_the_issue():
    C, N = 256, 1024
    assert multiply_adds(C, N) == {'channels': 2 * C**2 * N + C**3, 'positions': C**2 * N + 2 * C * N**2, 'source': 3 * C**2 * N}


def test_sym_is_symmetric_and_changes_the_result():
    layer, plain = trained('simple_sym', 64), trained('simple', 64)
    plain.load_state_dict(layer.state_dict())
    w = layer.weight()
    assert torch.equal(w, w.mT) and not torch.allclose(plain.weight(), plain.weight().mT, atol=0.01)
    x = torch.randn(2, 64, 8, 8)
    assert error(layer(x), plain(x)) > 0.01


@pytest.mark.parametrize('sym', [False, True])
def test_spectral_norm_is_about_one_at_once_and_while_the_weight_moves(sym):
    norm = SpectralWeight(256, 256, sym=sym)
    assert torch.linalg.matrix_norm(norm(), 2).item() == pytest.approx(1, abs=0.05)
    for _ in range(50):
        norm.weight.data += 0.01 * torch.randn_like(norm.weight)
        norm()
    assert torch.linalg.matrix_norm(norm(), 2).item() == pytest.approx(1, abs=0.05)


def test_spectral_weight_is_fixed_in_eval():
    norm = SpectralWeight(8, 8, n_init=1).eval()
    assert torch.equal(norm(), norm())
    assert not torch.equal(norm.train()(), norm())


def test_a_weight_of_zeros_is_finite_and_normalised_again_once_it_is_not():
    norm = SpectralWeight(16, 16)
    norm.weight.data.zero_()
    w = norm()
    assert (w == 0).all() and torch.autograd.grad(w.sum(), norm.weight)[0].isfinite().all()
    norm.weight.data.normal_()
    for _ in range(50): norm()
    assert torch.linalg.matrix_norm(norm(), 2).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize('n_channels', [16, 6, 512])  # C/8 whole, C < 8, more than one head
def test_sagan_is_the_explicit_softmax(n_channels, monkeypatch):
    layer = trained(SelfAttention, n_channels)

    def forward(x):
        z = x.flatten(2)
        f, g, h = (w() @ z for w in (layer.query, layer.key, layer.value))
        return (z + layer.gamma * h @ F.softmax(f.mT @ g, dim=1)).view_as(x)
    x = torch.randn(2, n_channels, 7, 5)
    reference = grads(layer, x, forward)
    assert max(map(error, grads(layer, x), reference)) < 1e-5
    monkeypatch.setattr(layers._BlockedSoftmax, 'BLOCK', 8 * 35)  # 8 rows at once and a rest of 3
    assert max(map(error, grads(layer, x), reference)) < 1e-5
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)  # through scaled_dot_product_attention, as on a GPU
    assert max(map(error, grads(layer, x), reference)) < 1e-5


def test_sagan_keeps_no_matrix_of_positions():
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        trained('sagan', 32)(torch.randn(1, 32, 32, 32, requires_grad=True)).sum()
    assert 0 < max(sizes) < 1024 * 1024 / 4  # N * N = 1024^2


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('side', [2, 3])  # N < C and N > C
def test_gradcheck(name, side):
    layer = trained(name, 8).double()
    x = torch.randn(1, 8, side, side, dtype=torch.double, requires_grad=True)
    names = [n for n, _ in layer.named_parameters()]
    def function(x, *parameters): return torch.func.functional_call(layer, dict(zip(names, parameters)), x)
    assert torch.autograd.gradcheck(function, (x, *layer.parameters()))


@pytest.mark.parametrize('name', ATTENTION)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_identity_at_init_keeps_shape_dtype_and_format(name, memory_format, dtype):
    layer = ATTENTION[name](16).to(dtype)
    x = torch.randn(2, 16, 5, 3).to(dtype).to(memory_format=memory_format)
    y = layer(x)
    assert torch.equal(x, y) and y.dtype == dtype and y.stride() == x.stride()


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('memory_format', FORMATS)
def test_input_gradient_keeps_the_format(name, memory_format):
    x = torch.randn(2, 16, 8, 8).to(memory_format=memory_format).requires_grad_()
    trained(name)(x).sum().backward()
    assert x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('gamma', [0., 0.1, 1.])
@pytest.mark.parametrize('autocast', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('half_input', [False, True])
def test_finite_under_autocast(name, gamma, autocast, half_input):
    layer = ATTENTION[name](64)
    layer.gamma.data.fill_(gamma)
    x = (10 * torch.randn(1, 64, 64, 64)).to(autocast if half_input else torch.float32).requires_grad_()
    with torch.autocast('cpu', autocast): y = layer(x)
    assert y.dtype == x.dtype and y.isfinite().all()
    if gamma == 0: assert torch.equal(y, x)
    y.float().mean().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('gamma', [0., 0.1])
@pytest.mark.parametrize('correlated', [False, True])
@pytest.mark.parametrize('side', [4, 32])  # N < C and N > C
def test_finite_in_float16_up_to_a_root_mean_square_of_200(name, gamma, correlated, side):
    layer = ATTENTION[name](64)
    layer.gamma.data.fill_(gamma)
    x = (200 * torch.randn(1, 1 if correlated else 64, side, side)).expand(1, 64, side, side).half().requires_grad_()
    with torch.autocast('cpu', torch.float16): y = layer(x)
    assert y.isfinite().all() and (gamma or torch.equal(x, y))
    (y.float().mean() / 100).backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('autocast', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('side', [4, 8])
def test_close_to_float32_under_autocast(name, autocast, side):
    layer = trained(name, 32)
    x = torch.randn(2, 32, side, side)
    reference = grads(layer, x)

    def forward(x):
        with torch.autocast('cpu', autocast): return layer(x)
    assert max(map(error, grads(layer, x, forward), reference)) < (0.05 if autocast == torch.bfloat16 else 0.01)


@pytest.mark.parametrize('name', ATTENTION)
def test_copied_after_a_forward_pass_and_pickled(name, tmp_path):
    layer = ATTENTION[name](16)
    x = torch.randn(2, 16, 4, 4)
    layer(x)
    torch.save(layer, tmp_path / 'layer.pt')
    for other in (copy.deepcopy(layer), torch.load(tmp_path / 'layer.pt', weights_only=False)):
        assert torch.equal(layer.eval()(x), other.eval()(x))


@pytest.fixture
def fresh_dynamo(): torch._dynamo.reset()  # it counts how often one forward was compiled, over all tests


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('autocast', [False, True])
def test_compiles_in_one_graph(name, autocast, fresh_dynamo):
    layer = trained(name).train()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 16, 6, 6)

    def forward(layer):
        def f(x):
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast): return layer(x)
        return f
    expected = grads(layer, x, forward(layer))
    assert max(map(error, grads(compiled, x, forward(compiled)), expected)) < (0.05 if autocast else 1e-5)


@pytest.mark.parametrize('name', VARIANTS)
def test_compiles_in_one_graph_for_any_height_and_width(name, fresh_dynamo):
    layer = trained(name).train()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=True, backend='aot_eager')
    for side in ((3, 3), (8, 5), (7, 9)):  # N < C, N > C, as before
        x = torch.randn(2, 16, *side)
        assert max(map(error, grads(compiled, x), grads(layer, x))) < 1e-5


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
def test_compiles_to_code(fresh_dynamo):
    layer = trained('simple')
    x = torch.randn(2, 16, 6, 6)
    compiled = torch.compile(layer, fullgraph=True)
    assert max(map(error, grads(compiled, x), grads(layer, x))) < 1e-5


def _ddp_worker(rank, port, states, x, out):
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    for name, state in states.items():
        layer = ATTENTION[name](8)
        layer.load_state_dict(state)
        ddp = torch.nn.parallel.DistributedDataParallel(layer)
        for _ in range(2): loss = ddp(x[2 * rank: 2 * rank + 2]).square().mean()
        loss.backward()
        if rank == 0: out[name] = [p.grad for p in layer.parameters()]
    dist.destroy_process_group()


def test_distributed_gradients_are_those_of_the_whole_batch():
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    layers = {name: trained(name, 8).train() for name in VARIANTS}
    x = torch.randn(4, 8, 3, 3)
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(_ddp_worker, (port, {n: copy.deepcopy(m.state_dict()) for n, m in layers.items()}, x, out), nprocs=2)
        for name, layer in layers.items():
            for _ in range(2): loss = layer(x).square().mean()
            loss.backward()
            assert max(error(g, p.grad) for g, p in zip(out[name], layer.parameters())) < 1e-4, name


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('shape', [(2, 16, 4), (2, 8, 4, 4), (2, 16, 4, 4, 4)])
def test_wrong_input_names_both_shapes(name, shape):
    with pytest.raises(ValueError) as e: ATTENTION[name](16)(torch.randn(shape))
    assert '(B, 16, H, W)' in str(e.value) and str(shape) in str(e.value)


@pytest.mark.parametrize('kwargs, word', [
    (dict(ks=2), 'odd'), (dict(ks=3, sym=True), 'ks=1'), (dict(order='best'), 'positions'), (dict(ks=3, order='channels'), 'ks=3'),
])
def test_wrong_options(kwargs, word):
    with pytest.raises(ValueError, match=word): SimpleSelfAttention(16, **kwargs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('name', VARIANTS)
def test_cuda_autocast_is_close_to_the_cpu_and_keeps_no_matrix_of_positions(name):
    layer = trained(name, 64)
    x = torch.randn(4, 64, 64, 64).to(memory_format=torch.channels_last)
    expected = layer(x)
    layer, x = layer.cuda(), x.cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast('cuda', torch.float16): y = layer(x)
    y.sum().backward()
    assert error(y.cpu(), expected) < 0.01 and y.stride() == x.stride()
    assert torch.cuda.max_memory_allocated() - before < 2 * 4 * 4096**2
