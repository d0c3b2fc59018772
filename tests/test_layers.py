"""Every test that can runs over ATTENTION: a new entry is tested for free."""
import copy
import functools
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from fastai import layers as fastai_layers
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import layers
from layers import ATTENTION, SelfAttention, SimpleSelfAttention, SpectralWeight, multiply_adds

VARIANTS = [name for name in ATTENTION if name != 'none']
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
GATES = ['se']  # no gamma, not the identity at the start
FORMATS = [torch.contiguous_format, torch.channels_last]


def trained(name, n_channels=16, **kwargs):
    "A layer in eval mode whose gamma, times its scale, is not 0."
    layer = (ATTENTION[name] if isinstance(name, str) else name)(n_channels, **kwargs).eval()
    if hasattr(layer, 'gamma'): layer.gamma.data.fill_(0.3 / getattr(layer, 'scale', 1))
    return layer


def error(a, b): return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def grads(layer, x, forward=None, scale=1):
    """[output, gradient of the input, gradients of the parameters] of the mean square.

    The loss is multiplied by `scale` for the backward pass, as training in float16 does.
    """
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = (forward or layer)(x)
    return [y.detach(), *(g / scale for g in torch.autograd.grad(scale * y.square().mean(), [x, *layer.parameters()]))]


def formula(layer):
    "y = x + gamma U (x x^T)(W x) as written, by einsum."
    def forward(x):
        z = x.flatten(2)
        wz = torch.einsum('ij,bjn->bin', layer.conv(), z)
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
        return (z + layer.gamma * (z @ z.mT) @ F.conv1d(z, layer.conv().view(16, 16, 3), padding=1)).view_as(x)
    assert max(map(error, grads(layer, x), grads(layer, x, forward))) < 1e-10


def covariance(z): return torch.stack([torch.cov(image, correction=0) for image in z])


REFERENCES = {  # what gamma multiplies, plainly, for z (B, C, N); of a gate the whole output
    'simple': lambda m, z: z @ z.mT @ (m.conv() @ z),
    'simple_sym': lambda m, z: z @ z.mT @ ((m.conv.weight[..., 0] + m.conv.weight[..., 0].mT) / 2
                                           / symmetric_norm(m.conv) @ z),
    'simple_out': lambda m, z: m.out() @ (z @ z.mT @ (m.conv() @ z)),
    'simple_n': lambda m, z: z @ z.mT / z.shape[2] @ (m.conv() @ z),
    'sagan': lambda m, z: m.value() @ z @ F.softmax((m.query() @ z).mT @ (m.key() @ z), dim=1),
    'conv': lambda m, z: m.conv() @ z,
    'swap': lambda m, z: torch.stack([z[i - 1] @ z[i - 1].mT @ (m.conv() @ z[i]) for i in range(len(z))]),
    'mean': lambda m, z: z.shape[2] * z.mean(2, True) @ (z.mean(2, True).mT @ (m.conv() @ z)),
    'mean_small': lambda m, z: REFERENCES['mean'](m, z) / 16,
    'cov': lambda m, z: z.shape[2] * covariance(z) @ (m.conv() @ z),
    'cov_large': lambda m, z: 16 * REFERENCES['cov'](m, z),
    'low_rank': lambda m, z: z @ z.mT @ (m.key().mT @ m.query() @ z),
    'channel': lambda m, z: F.softmax(-z @ z.mT, dim=2) @ z,
    'se': lambda m, z: z * m.gate(z.mean(2))[..., None],
}


def symmetric_norm(weight):
    "u^T ((W + W^T) / 2) v for the vectors of the power iteration."
    w = weight.weight[..., 0]
    return weight.u @ (w + w.mT) @ weight.v / 2


def reference(layer, name):
    "The forward pass of `layer` by REFERENCES."
    def forward(x):
        z = x.flatten(2)
        y = REFERENCES[name](layer, z)
        return (y if name in GATES else z + layer.gamma * y).view_as(x)
    return forward


@pytest.mark.parametrize('name', REFERENCES)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('side', [2, 4, 6])  # N = 4, 16, 36 against C = 16
@pytest.mark.parametrize('batch', [1, 3])
def test_every_layer_is_its_reference_in_float64(name, batch, side, memory_format):
    layer = trained(name).double()
    x = (torch.randn(batch, 16, side, side, dtype=torch.double) + 0.5).to(memory_format=memory_format)
    expected = grads(layer, x, reference(layer, name))
    assert max(map(error, grads(layer, x), expected)) < 1e-10
    assert max(map(error, grads(layer.float(), x.float()), expected)) < 1e-4


def test_mean_and_covariance_add_up_to_simple():
    layers = {name: trained(name).double() for name in ('simple', 'mean', 'cov', 'swap')}
    x = torch.randn(2, 16, 5, 5, dtype=torch.double) + 0.5
    for layer in layers.values(): layer.load_state_dict(layers['simple'].state_dict())
    branches = {name: layer(x) - x for name, layer in layers.items()}
    assert error(branches['mean'] + branches['cov'], branches['simple']) < 1e-12
    assert min(error(branches[name], branches['simple']) for name in ('mean', 'cov', 'swap')) > 0.1


def test_covariance_keeps_its_digits_beside_a_large_mean():
    layer = trained('cov', 32)
    x = torch.randn(2, 32, 8, 8) + 30
    with torch.autocast('cpu', torch.float16): y = layer(x)
    double = copy.deepcopy(layer).double()
    expected = double(x.double())
    assert error(y - x, expected - x) < 0.01


def test_swap_takes_the_image_before_in_training_and_validation_alike():
    layer, x = trained('swap'), torch.randn(3, 16, 4, 4)
    other = x.clone()
    other[0] = torch.randn(16, 4, 4)
    for mode in (layer.eval(), layer.train()):
        changed = [error(a, b) > 1e-3 for a, b in zip(mode(x), mode(other))]
        assert changed == [True, True, False]  # image 1 looks at image 0


def test_parameters_of_the_controls():
    C = 64
    square = dict.fromkeys(['simple', 'simple_sym', 'simple_n', 'conv', 'swap', 'mean', 'mean_small', 'cov',
                            'cov_large'], C**2 + 1)
    expected = {'none': 0, 'channel': 1, 'low_rank': C**2 // 4 + 1, 'se': C**2 // 4 + 9 * C // 8,
                'sagan': C**2 * 5 // 4 + 1, 'simple_out': 2 * C**2 + 1} | square
    assert {name: sum(p.numel() for p in make(C).parameters()) for name, make in ATTENTION.items()} == expected


def count_multiply_adds(layer, x):
    "Those of the products of layer(x), without those that normalise its weights."
    for weight in [m for m in layer.modules() if isinstance(m, SpectralWeight)]:
        weight.forward = functools.partial(torch.clone, weight().detach())
    with FlopCounterMode(display=False) as counter: layer(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('side', [3, 4, 7])
def test_multiply_adds_are_those_done(name, side):
    layer = trained(name)
    assert layer.multiply_adds(side**2) == count_multiply_adds(layer, torch.randn(1, 16, side, side)) > 0


@pytest.mark.parametrize('out_conv', [False, True])
@pytest.mark.parametrize('side', [3, 4, 7])
def test_multiply_adds_of_every_order_are_those_done(side, out_conv):
    counts = multiply_adds(16, side**2, out_conv=out_conv)
    for order in counts:
        layer = trained(SimpleSelfAttention, order=order, out_conv=out_conv)
        counted = count_multiply_adds(layer, torch.randn(1, 16, side, side))
        assert counts[order] == layer.multiply_adds(side**2) == counted
    assert trained(SimpleSelfAttention, out_conv=out_conv).multiply_adds(side**2) == min(counts.values())


def test_multiply_adds_by_hand():
    C, N = 256, 1024
    assert multiply_adds(C, N) == {'channels': 2 * C**2 * N + C**3, 'positions': C**2 * N + 2 * C * N**2,
                                   'source': 3 * C**2 * N}


def test_of_orders_that_cost_the_same_the_fastest_is_taken():
    assert len(set(multiply_adds(64, 64).values())) == 1
    assert SimpleSelfAttention(64).order_at(64) == 'channels' and SimpleSelfAttention(64, ks=3).order_at(64) == 'source'


def test_sym_is_symmetric_and_changes_the_result():
    layer, plain = trained('simple_sym', 64), trained('simple', 64)
    plain.load_state_dict(layer.state_dict())
    w = layer.conv()
    assert torch.equal(w, w.mT) and not torch.allclose(plain.conv(), plain.conv().mT, atol=0.01)
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


# C/8 whole; C < 8; more than one head; a head of 17 would not hold the 36 channels of f, nor one of 256 those 320 of f
@pytest.mark.parametrize('n_channels', [16, 6, 512, 289, 2560])
def test_sagan_is_the_explicit_softmax(n_channels, monkeypatch):
    layer = trained(SelfAttention, n_channels)

    def forward(x):
        z = x.flatten(2)
        f, g, h = (w() @ z for w in (layer.query, layer.key, layer.value))
        return (z + layer.gamma * h @ F.softmax(f.mT @ g, dim=1)).view_as(x)
    x = torch.randn(2, n_channels, 7, 5)
    reference = grads(layer, x, forward)
    assert max(map(error, grads(layer, x), reference)) < 1e-5
    monkeypatch.setattr(layers._BlockedSoftmax, 'BLOCK', 8 * 35)  # 7 rows at once
    assert max(map(error, grads(layer, x), reference)) < 1e-5
    # Through scaled_dot_product_attention, as on a GPU.
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    assert max(map(error, grads(layer, x), reference)) < 1e-5


def test_sagan_keeps_no_matrix_of_positions():
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        trained('sagan', 32)(torch.randn(1, 32, 32, 32, requires_grad=True)).sum()
    assert 0 < max(sizes) < 1024 * 1024 / 4  # N * N = 1024^2


@pytest.mark.parametrize('name', VARIANTS)
def test_shapes_can_be_asked_for_without_memory(name):
    with torch.device('meta'): layer, x = ATTENTION[name](16), torch.empty(2, 16, 4, 6, requires_grad=True)
    y = layer(x)
    assert y.is_meta and y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('side', [2, 3])  # N < C and N > C
def test_gradcheck(name, side):
    layer = trained(name, 8).double()
    x = torch.randn(2, 8, side, side, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(function_of(layer), (x, *layer.parameters()))


def function_of(layer):
    "layer(x) as a function of x and of its parameters."
    names = [name for name, _ in layer.named_parameters()]
    return lambda x, *parameters: torch.func.functional_call(layer, dict(zip(names, parameters)), x)


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('side', [1, 2])  # N < C and N > C
def test_second_derivatives(name, side, memory_format):
    layer = trained(name, 3).double()
    x = torch.randn(2, 3, side, side, dtype=torch.double).to(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradgradcheck(function_of(layer), (x, *layer.parameters()))


@pytest.mark.parametrize('options', [{}, {'sym': True}, {'out_conv': True}, {'mean': True}])
@pytest.mark.parametrize('order', ['channels', 'positions', 'source'])
def test_second_derivatives_in_every_order(order, options):
    layer = trained(SimpleSelfAttention, 3, order=order, **options).double()
    x = torch.randn(1, 3, 2, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(function_of(layer), (x, *layer.parameters()))


def penalty(layer, x, forward=None):
    "[the squared gradient of the output's squares in x, its own gradients], as a GAN's gradient penalty uses them."
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    g, = torch.autograd.grad((forward or layer)(x).double().square().sum() / 16, x, create_graph=True)
    value = g.double().square().sum()
    return [value.detach(), *torch.autograd.grad(value, [x, *layer.parameters()])]


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('autocast', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('side', [4, 8])
def test_gradient_penalty_under_autocast(name, side, memory_format, autocast):
    layer = trained(name, 32)
    x = torch.randn(2, 32, side, side).to(memory_format=memory_format)
    expected = penalty(copy.deepcopy(layer).double(), x.double())

    def forward(x):
        with torch.autocast('cpu', autocast), sdpa_kernel(SDPBackend.MATH): return layer(x)
    bound = 0.02 if autocast == torch.float16 else 0.2 if name == 'channel' else 0.1
    assert max(map(error, penalty(layer, x, forward), expected)) < bound


def test_the_fused_kernels_say_that_they_have_no_second_derivatives():
    layer, x = trained('sagan', 32), torch.randn(2, 32, 8, 8)

    def forward(x):
        with torch.autocast('cpu', torch.bfloat16): return layer(x)
    with pytest.raises(RuntimeError, match='is not implemented'): penalty(layer, x, forward)


@pytest.mark.parametrize('order', ['channels', 'positions', 'source'])
@pytest.mark.parametrize('autocast', [None, torch.float16, torch.bfloat16])
def test_gradient_penalty_in_every_order(order, autocast):
    layer = trained(SimpleSelfAttention, 16, order=order, out_conv=True)
    x = torch.randn(2, 16, 6, 6) / 2
    expected = penalty(copy.deepcopy(layer).double(), x.double())

    def forward(x):
        with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None): return layer(x)
    bound = {None: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}[autocast]
    assert max(map(error, penalty(layer, x, forward), expected)) < bound


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('training', [False, True])
def test_func_grad_and_vmap_are_a_loop(name, training):
    """Gradients of the parameters are taken an image at a time.

    In training mode the vectors of the power iteration are inputs, too.
    """
    layer = trained(name, 8).double().train(training)
    x = torch.randn(3, 1, 8, 3, 3, dtype=torch.double)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    def loss(parameters, x): return torch.func.functional_call(layer, (parameters, clones(buffers)), x).square().sum()
    def clones(tensors): return {name: t.clone() for name, t in tensors.items()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(len(x)):
        one = torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()))
        assert all(torch.allclose(each[name][i], g) for name, g in zip(parameters, one))


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('blocks', [1, 5])
def test_func_jvp_jacobians_and_hessian_agree(name, blocks, monkeypatch):
    monkeypatch.setattr(layers._BlockedSoftmax, 'BLOCK', {1: 1000, 5: 4}[blocks])
    layer = trained(name, 2).double()
    x = torch.randn(2, 2, 2, 2, dtype=torch.double)
    jacobian = torch.autograd.functional.jacobian(layer, x)
    assert error(torch.func.jacrev(layer)(x), jacobian) < 1e-10 and error(torch.func.jacfwd(layer)(x), jacobian) < 1e-10
    tangent = torch.randn_like(x)
    expected = (jacobian.flatten(4) @ tangent.flatten()).view_as(x)
    assert error(torch.func.jvp(layer, (x,), (tangent,))[1], expected) < 1e-10
    with torch.autograd.forward_ad.dual_level():
        y = torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x, tangent)))
    assert error(y.tangent, expected) < 1e-10
    def loss(x): return layer(x).pow(3).sum()
    assert error(torch.func.hessian(loss)(x), torch.autograd.functional.hessian(loss, x)) < 1e-10
    assert error(torch.func.vmap(layer)(x[None].expand(3, -1, -1, -1, -1))[2], layer(x)) < 1e-10


@pytest.mark.parametrize('name', ATTENTION)
@pytest.mark.parametrize('memory_format', FORMATS)
def test_traced_and_exported(name, memory_format, tmp_path):
    layer = trained(name).eval() if name != 'none' else ATTENTION[name]()
    x, other = (torch.randn(2, 16, 5, 5).to(memory_format=memory_format) for _ in range(2))
    traced = torch.jit.trace(layer, x)
    traced.save(tmp_path / 'layer.pt')
    assert error(torch.jit.load(tmp_path / 'layer.pt')(other), layer(other)) < 1e-6
    try: torch.onnx.export(layer, (x,), tmp_path / 'layer.onnx', dynamo=False)
    except torch.onnx.OnnxExporterError as e:
        assert 'onnx is not installed' in str(e)  # which writes the converted graph
    exported = torch.export.export(layer, (x,))
    assert error(exported.module()(other), layer(other)) < 1e-6


@pytest.mark.parametrize('name', ATTENTION)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('side', [2, 6])  # N < C and N > C
def test_what_stands_behind_a_layer_may_change_its_output_in_place(name, side, autocast, memory_format):
    layer = trained(name).train() if name != 'none' else ATTENTION[name]()
    conv = torch.nn.Conv2d(16, 16, 1).to(memory_format=memory_format)
    x = torch.randn(2, 16, side, side).to(memory_format=memory_format)
    gradients = []
    for inplace in (False, True):
        model = torch.nn.Sequential(conv, copy.deepcopy(layer), torch.nn.ReLU(inplace))
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast): y = model(x)
        gradients.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), conv.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize('name', ATTENTION)
def test_initialisers_that_look_for_a_weight_find_none_or_a_tensor(name):
    from fastai.torch_core import apply_init
    from fastai.vision.learner import create_vision_model
    from torchvision.models import resnet18
    head = torch.nn.Sequential(ATTENTION[name](512), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                               torch.nn.Linear(512, 3))
    apply_init(head, torch.nn.init.kaiming_normal_)
    model = create_vision_model(resnet18, 3, pretrained=False, custom_head=head)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize('name', ATTENTION)
def test_a_feature_extractor_takes_a_layer_as_a_whole(name):
    from torchvision.models.feature_extraction import create_feature_extractor
    layer = trained(name)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), layer, torch.nn.ReLU()).eval()
    features = create_feature_extractor(model, ['1'], tracer_kwargs=dict(leaf_modules=[type(layer)]))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(features(x)['1'], model[:2](x))


@pytest.mark.parametrize('version', ['2.3.1+cpu', '1.13.0'])
def test_an_old_torch_is_named(version, monkeypatch):
    monkeypatch.setattr(torch, '__version__', version)
    with pytest.raises(ImportError, match=f'needs torch 2.4 or later, this is torch {re.escape(version)}'):
        exec(Path(layers.__file__).read_text(), {'__name__': 'copied'})


@pytest.mark.parametrize('version', ['2.4.0a0+git12', '2.11.0', '3.0'])
def test_a_later_torch_is_not(version, monkeypatch):
    monkeypatch.setattr(torch, '__version__', version)
    exec(Path(layers.__file__).read_text(), {'__name__': 'copied'})


@pytest.mark.parametrize('name', VARIANTS)
def test_signals_and_volumes(name):
    layer, x = trained(name), torch.randn(2, 16, 2, 4, 3)
    expected = layer(x.flatten(2, 3))
    for shape in ((24,), (8, 3), (2, 4, 3)):
        y = layer(x.view(2, 16, *shape))
        assert y.shape == (2, 16, *shape) and error(y.flatten(), expected.flatten()) < 1e-6


@pytest.mark.parametrize('name', ATTENTION)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_identity_at_init_keeps_shape_dtype_and_format(name, memory_format, dtype):
    layer = ATTENTION[name](16).to(dtype)
    x = torch.randn(2, 16, 5, 3).to(dtype).to(memory_format=memory_format)
    y = layer(x)
    assert y.dtype == dtype and y.stride() == x.stride()
    assert torch.equal(x, y) == (name not in GATES)


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
    if hasattr(layer, 'gamma'): layer.gamma.data.fill_(gamma)
    x = (10 * torch.randn(1, 64, 64, 64)).to(autocast if half_input else torch.float32).requires_grad_()
    with torch.autocast('cpu', autocast): y = layer(x)
    assert y.dtype == x.dtype and y.isfinite().all()
    if gamma == 0 and name not in GATES: assert torch.equal(y, x)
    y.float().mean().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize('side, largest', [(4, 60), (32, 20)])  # N < C and N > C
def test_what_passes_float16_saturates_and_the_rest_is_right(side, largest):
    layer = ATTENTION['simple'](64).eval()
    layer.gamma.data.fill_(0.5)
    x = torch.randn(1, 64, side, side) * torch.linspace(0.1, largest, side)  # from small to far beyond
    z, w = x.half().double().flatten(2), layer.conv().detach().double()
    exact = (z + 0.5 * (z @ z.mT) @ (w @ z)).view_as(x)
    with torch.autocast('cpu', torch.float16): y = layer(x.half()).double()
    beyond = exact.abs() > 66_000
    assert 0.1 < beyond.float().mean() < 0.9 and (y[beyond] == 65_504 * exact[beyond].sign()).all()
    rest = exact.abs() < 65_000
    assert (y - exact)[rest].abs().max() < 0.02 * 65_504


def loss_of(y, name):
    "A loss with small gradients. low_rank divides f by the root of C, so f has gradients that many times as large."
    return y.float().mean() / (1000 if name == 'low_rank' else 100)


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('gamma', [0., 0.1])
@pytest.mark.parametrize('correlated', [False, True])
@pytest.mark.parametrize('side', [4, 32])  # N < C and N > C
def test_finite_in_float16_up_to_a_root_mean_square_of_255(name, gamma, correlated, side):
    layer = ATTENTION[name](64)
    if hasattr(layer, 'gamma'): layer.gamma.data.fill_(gamma)
    x = torch.randn(1, 1 if correlated else 64, side, side).expand(1, 64, side, side)
    for dim in 5 * [(2, 3), 1]:  # of each channel, of each position
        x = 254 * x / x.square().mean(dim, keepdim=True).sqrt()
    x = x.half().requires_grad_()
    with torch.autocast('cpu', torch.float16): y = layer(x)
    assert y.isfinite().all() and (gamma or name in GATES or torch.equal(x, y))
    loss_of(y, name).backward()
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
    bound = 0.01 if autocast == torch.float16 else 0.1 if name == 'channel' else 0.05  # its exponent multiplies errors
    assert max(map(error, grads(layer, x, forward), reference)) < bound


@pytest.mark.parametrize('name', ATTENTION)
def test_copied_after_a_forward_pass_and_pickled(name, tmp_path):
    layer = ATTENTION[name](16)
    x = torch.randn(2, 16, 4, 4)
    layer(x)
    torch.save(layer, tmp_path / 'layer.pt')
    for other in (copy.deepcopy(layer), torch.load(tmp_path / 'layer.pt', weights_only=False)):
        assert torch.equal(layer.eval()(x), other.eval()(x))


@pytest.mark.parametrize('name, peer', [('simple', fastai_layers.SimpleSelfAttention),
                                        ('sagan', fastai_layers.SelfAttention)])
def test_state_dicts_of_fastais_layers_load(name, peer):
    theirs, ours = peer(16), ATTENTION[name](16)
    theirs.gamma.data.fill_(0.3)
    x = torch.randn(2, 16, 4, 4)
    for _ in range(50): theirs(x)  # its power iteration has to converge: it makes no step in eval mode, and none before
    ours = torch.nn.Sequential(ours)  # names have a prefix within a model
    ours.load_state_dict({f'0.{k}': v for k, v in theirs.state_dict().items()})
    assert error(ours.eval()(x), theirs.eval()(x)) < 1e-5


def test_state_dicts_of_the_first_names_load():
    layer, other = trained('simple_out'), ATTENTION['simple_out'](16).eval()
    other.load_state_dict({k.replace('conv.', 'weight.'): v for k, v in layer.state_dict().items()})
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(layer(x), other(x))


@pytest.fixture
def fresh_dynamo(): torch._dynamo.reset()  # it counts how often one forward was compiled, over all tests


@pytest.mark.slow(2)
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


@pytest.mark.slow(3)
@pytest.mark.parametrize('name', VARIANTS)
def test_compiles_in_one_graph_for_any_height_and_width(name, fresh_dynamo):
    layer = trained(name).train()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=True, backend='aot_eager')
    for side in ((3, 3), (8, 5), (7, 9)):  # N < C, N > C, as before
        x = torch.randn(2, 16, *side)
        assert max(map(error, grads(compiled, x), grads(layer, x))) < 1e-5


@pytest.mark.parametrize('name', ['simple', 'swap', 'mean', 'cov'])
def test_gradients_in_float16_hold_a_large_loss_scale_compiled_too(name, fresh_dynamo):
    "Under autocast the small float32 products of the backward pass would be float16, and pass its largest number."
    x, g = torch.randn(2, 64, 32, 32), torch.randn(2, 64, 32, 32)
    layer = ATTENTION[name](64).eval()
    layer.gamma.data.fill_(0.1)
    def finite(module, inside=False):
        with torch.autocast('cpu', torch.float16, cache_enabled=False):
            y = module(x.requires_grad_())
            if inside: return is_finite(y, module)
        return is_finite(y, module)
    def is_finite(y, module):
        found = torch.autograd.grad(y, [x, *module.parameters()], (2**13 * g / g.norm()).to(y.dtype))
        return all(bool(part.isfinite().all()) for part in found)
    with functorch_config.patch(backward_pass_autocast='off'):  # as training.machine sets it
        assert finite(layer) and finite(torch.compile(layer, backend='aot_eager')) and not finite(layer, inside=True)


@pytest.mark.slow(2)
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


@pytest.mark.slow(8)
def test_distributed_gradients_are_those_of_the_whole_batch():
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    # swap looks at its own process's images.
    layers = {name: trained(name, 8).train() for name in VARIANTS if name != 'swap'}
    x = torch.randn(4, 8, 3, 3)
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(_ddp_worker, (port, {n: copy.deepcopy(m.state_dict()) for n, m in layers.items()}, x, out), nprocs=2)
        for name, layer in layers.items():
            for _ in range(2): loss = layer(x).square().mean()
            loss.backward()
            assert max(error(g, p.grad) for g, p in zip(out[name], layer.parameters())) < 1e-4, name


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('shape', [(0, 16, 3, 4), (2, 16, 0, 4), (2, 16, 0)])
def test_an_empty_input_gives_an_empty_output(name, shape):
    layer, x = trained(name), torch.zeros(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('shape', [(16, 4), (2, 8, 4, 4), (2, 8, 16)])
def test_wrong_input_names_both_shapes(name, shape):
    with pytest.raises(ValueError) as e: ATTENTION[name](16)(torch.randn(shape))
    assert '(B, 16, H, W)' in str(e.value) and str(shape) in str(e.value)


@pytest.mark.parametrize('kwargs, word', [
    (dict(ks=2), 'odd'), (dict(ks=3, sym=True), 'ks=1'), (dict(order='best'), 'positions'),
    (dict(ks=3, order='channels'), 'ks=3'),
])
def test_wrong_options(kwargs, word):
    with pytest.raises(ValueError, match=word): SimpleSelfAttention(16, **kwargs)


@needs_cuda
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


@pytest.fixture
def long_sums(monkeypatch):
    "As training sets it, see layers.py."
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_fp16_reduced_precision_reduction', False)


@needs_cuda
@pytest.mark.parametrize('name', REFERENCES)
@pytest.mark.parametrize('n_channels', [256, 512])  # 512: two heads of sagan; on Hopper cuDNN's kernel is asked first
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('autocast', [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('side', [8, 24])  # N < C, N > C
def test_cuda_gradients_are_those_of_the_reference(name, n_channels, memory_format, autocast, side, long_sums):
    layer = trained(name, n_channels).cuda()
    x = torch.randn(2, n_channels, side, side, device='cuda').to(memory_format=memory_format)
    double = copy.deepcopy(layer).double()
    expected = grads(double, x.double(), reference(double, name))

    def forward(x):
        with torch.autocast('cuda', autocast or torch.float16, enabled=autocast is not None): return layer(x)
    bound = {None: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.2 if name == 'channel' else 0.1}[autocast]
    # The mean of up to 590,000 outputs has gradients that float16 holds to a few bits, unless the loss is scaled.
    assert max(map(error, grads(layer, x, forward, scale=2**10), expected)) < bound


@needs_cuda
@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('correlated', [False, True])
@pytest.mark.parametrize('side', [4, 64])  # N < C; a sum of 4,096 terms
def test_cuda_finite_in_float16_up_to_a_root_mean_square_of_255(name, correlated, side, long_sums):
    layer = ATTENTION[name](64).cuda()
    if name not in GATES: layer.gamma.data.fill_(0.1)
    x = torch.randn(1, 1 if correlated else 64, side, side, device='cuda').expand(1, 64, side, side)
    for dim in 5 * [(2, 3), 1]: x = 254 * x / x.square().mean(dim, keepdim=True).sqrt()
    x = x.half().requires_grad_()
    with torch.autocast('cuda', torch.float16): y = layer(x)
    loss_of(y, name).backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())
