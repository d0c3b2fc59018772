import pytest
import torch
from fastai import layers as fastai_layers
from fastai.layers import MaxPool
from fastai.vision.models import xresnet as fastai_xresnet

from experiments import format_places, parse_places
from layers import ATTENTION, SimpleSelfAttention
from xresnet import ACTIVATIONS, ARCHS, POOLS, STEMS, ResBlock, xresnet

pytestmark = pytest.mark.full_width


@pytest.mark.parametrize('arch', ARCHS)
def test_without_attention_it_is_fastais_network(arch):
    ours, theirs = xresnet(arch, 10, stem='32-32-64'), getattr(fastai_xresnet, arch)(n_out=10)
    state, reference = ours.state_dict(), theirs.state_dict()
    assert [v.shape for v in state.values()] == [v.shape for v in reference.values()]
    ours.load_state_dict(dict(zip(state, reference.values())))
    for module in (*ours.modules(), *theirs.modules()):  # the zero-initialised norms would hide the blocks
        if isinstance(module, torch.nn.BatchNorm2d): torch.nn.init.constant_(module.weight, 0.5)
    x = torch.randn(2, 3, 65, 70)
    for mode in (True, False):
        a, b = ours.train(mode)(x), theirs.train(mode)(x)
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize('arch', ['xresnet18', 'xresnet50'])
def test_it_starts_as_fastais_do(arch):
    "Kaiming's normal weights, no bias at the head, and blocks that add nothing: their last norm is 0."
    model = xresnet(arch, 10, SimpleSelfAttention)
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and module.weight.numel() > 5000:
            assert module.weight.std().item() == pytest.approx((2 / module.weight[0].numel())**0.5, rel=0.05), name
        if isinstance(module, SimpleSelfAttention):
            assert module.conv.weight.std().item() == pytest.approx((2 / module.n_channels)**0.5, rel=0.05)
        if isinstance(module, ResBlock):
            norms = [m for m in module.convs.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            assert [bool(norm.weight.any()) for norm in norms] == [True] * (len(norms) - 1) + [False]
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1].bias.any()


@pytest.mark.parametrize('arch', ['xresnet18', 'xresnet50'])
def test_with_the_layer_it_is_fastais_network_with_theirs(arch):
    ours = xresnet(arch, 10, SimpleSelfAttention, stem='32-32-64')
    theirs = getattr(fastai_xresnet, arch)(n_out=10, sa=True)
    (at,) = [name for name, m in theirs.named_modules() if isinstance(m, fastai_layers.SimpleSelfAttention)]
    (here,) = [name for name, m in ours.named_modules() if isinstance(m, SimpleSelfAttention)]
    for module in theirs.modules():  # what starts at 0 would hide the blocks and the layer
        if isinstance(module, torch.nn.BatchNorm2d): torch.nn.init.constant_(module.weight, 0.5)
    layer = theirs.get_submodule(at)
    layer.gamma.data.fill_(0.1)
    for _ in range(300): layer(torch.zeros(1, layer.n_in, 1, 1))  # until their power iteration has converged
    rest = [value for name, value in theirs.state_dict().items() if not name.startswith(f'{at}.')]
    state = dict(zip([name for name in ours.state_dict() if not name.startswith(f'{here}.')], rest, strict=True))
    ours.load_state_dict(state | {name.replace(at, here): value for name, value in theirs.state_dict().items()
                                  if name.startswith(f'{at}.')})
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad(): a, b = ours(x), theirs(x)
    assert (a - b).abs().max() <= 1e-3 * b.abs().max()
    ours.get_submodule(here).gamma.data.fill_(0.)
    with torch.no_grad(): assert (ours(x) - b).abs().max() > 0.01 * b.abs().max()  # so the layer counts


def test_max_pool_is_fastais():
    kwargs = dict(stem='32-32-64', pool='max')
    ours, theirs = xresnet('xresnet18', 10, **kwargs), fastai_xresnet.xresnet18(n_out=10, pool=MaxPool)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values())))
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), rtol=1e-5)


@pytest.mark.parametrize('arch', ARCHS)
def test_every_arch_has_fastais_parameters_and_the_sources_stem(arch):
    count = {stem: sum(p.numel() for p in xresnet(arch, 10, stem=stem).parameters()) for stem in STEMS}
    assert count['32-32-64'] == sum(p.numel() for p in getattr(fastai_xresnet, arch)(n_out=10).parameters())
    # the stem's second and third convolutions go from 32*32*9 and 32*64*9 to 32*64*9 and 64*64*9, its norm by 2*32
    assert count['32-64-64'] - count['32-32-64'] == 9 * (32 * 32 + 32 * 64) + 64


@pytest.mark.parametrize('size, side', [(128, 32), (256, 64)])
def test_attention_stands_at_the_sources_place(size, side):
    model = xresnet('xresnet50', 10, ATTENTION['simple']).eval()
    assert [n for n, m in model.named_modules() if isinstance(m, SimpleSelfAttention)] == ['stage1.2.attention']
    seen = []
    model.stage1[2].attention.register_forward_hook(lambda m, i, o: seen.append(i[0].shape))
    with torch.no_grad(): model(torch.randn(1, 3, size, size))
    assert seen == [(1, 256, side, side)]


@pytest.mark.parametrize('name', ATTENTION)
def test_attention_changes_nothing_at_first(name):
    "Same seed, same weights elsewhere, and the layer is the identity: every variant starts as the same function."
    outputs = []
    for attention in ('none', name):
        torch.manual_seed(3)
        model = xresnet('xresnet18', 10, ATTENTION[attention], places=[(1, 1), (2, 0)]).eval()
        outputs.append(model(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)))
    assert torch.equal(*outputs)


def test_attention_keeps_its_own_initialisation_and_moves_no_other():
    class Zero(torch.nn.Module):
        def __init__(self, n_channels):
            super().__init__()
            self.conv = torch.nn.Conv2d(n_channels, n_channels, 1)
            torch.nn.init.zeros_(self.conv.weight)
    states = []
    for attention in (ATTENTION['none'], Zero):
        torch.manual_seed(0)
        states.append(xresnet('xresnet18', 10, attention).state_dict())
    assert (states[1].pop('stage1.1.attention.conv.weight') == 0).all()
    assert states[1].pop('stage1.1.attention.conv.bias').shape
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


@pytest.mark.parametrize('sa_at, expected', [
    ('1', [(1, 2)]), ('1,2,3,4', [(1, 2), (2, 3), (3, 5), (4, 2)]), ('2.0', [(2, 0)]), ('1, 2.1', [(1, 2), (2, 1)]),
])
def test_places(sa_at, expected):
    assert parse_places(sa_at, ARCHS['xresnet50'][1]) == expected
    model = xresnet('xresnet50', 10, ATTENTION['simple'], parse_places(sa_at, ARCHS['xresnet50'][1]))
    found = {n for n, m in model.named_modules() if isinstance(m, SimpleSelfAttention)}
    assert found == {f'stage{s}.{b}.attention' for s, b in expected}


@pytest.mark.parametrize('sa_at', ['5', '1.3', '', 'first', '1,,2', '0', '-1'])
def test_a_place_that_does_not_exist_lists_those_that_do(sa_at):
    with pytest.raises(ValueError, match=r'1 \(or 1.0 to 1.2\), 2 \(or 2.0 to 2.3\), 3 .* 4 '):
        parse_places(sa_at, ARCHS['xresnet50'][1])


@pytest.mark.parametrize('sa_at, one', [('1,1', '1'), ('1.2', '1'), ('2,1', '1,2'), ('2.0, 1.2', '1,2b0')])
def test_one_form_for_a_set_of_places(sa_at, one):
    blocks = ARCHS['xresnet50'][1]
    assert format_places(parse_places(sa_at, blocks), blocks) == one


@pytest.mark.parametrize('act', ACTIVATIONS)
@pytest.mark.parametrize('pool', POOLS)
def test_every_activation_and_pool_trains(act, pool):
    block = ResBlock(1, 8, 16, 2, ATTENTION['simple'], ACTIVATIONS[act], POOLS[pool])
    for ends in (block.convs[-1][-1].weight, block.attention.gamma): torch.nn.init.constant_(ends, 0.5)
    block(torch.randn(4, 8, 33, 47)).square().sum().backward()  # odd sizes too
    assert all(p.grad.isfinite().all() and p.grad.any() for p in block.parameters())


@pytest.mark.parametrize('act, pool', [('relu', 'avg'), ('mish', 'max'), ('prelu', 'avg')])
def test_a_network_trains(act, pool):
    model = xresnet('xresnet18', 4, ATTENTION['simple'], act=act, pool=pool)
    model(torch.randn(4, 3, 33, 47)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
