"""Every network of fastai by its name, with our layer in any block, and every activation of torch."""
import inspect

import pytest
import torch
from fastai import layers as fastai_layers
from fastai.vision.models import xresnet as fastai_xresnet

import experiments
import xresnet
from command import UsageError
from experiments import Config, literal
from layers import ATTENTION, SimpleSelfAttention
from training import arch as archs
from training import layer
from training.arch import FASTAI_ARCHS, NETWORKS, network
from training.run import get_model

OFF = {'Threshold': 'needs arguments', 'MultiheadAttention': 'needs arguments', 'GLU': 'halves the channels',
       **dict.fromkeys(['Softmin', 'Softmax', 'Softmax2d', 'LogSoftmax'], 'normalises over a dimension')}


def plain(name): return name.lower().replace('_', '')


def on_meta(arch, **kwargs):
    "A network without memory, in no time; fastai's own constructor of xsenet154 fails."
    with torch.device('meta'): return network(arch, 10, **kwargs)


def test_the_names_are_all_of_fastais():
    fastais = {name for name in fastai_xresnet.__all__ if inspect.isfunction(getattr(fastai_xresnet, name))}
    assert set(NETWORKS) == fastais - {'init_cnn'} and list(experiments.NETWORKS.items()) == list(NETWORKS.items())
    assert literal('training/arch.py', 'FASTAI_ARCHS') == FASTAI_ARCHS


@pytest.mark.parametrize('arch', FASTAI_ARCHS)
def test_the_blocks_and_widths_are_those_of_the_network(arch):
    "A layer can stand in every block, where it meets as many channels as its `width` says."
    blocks = NETWORKS[arch][1]
    places = [(stage, block) for stage, n in enumerate(blocks, 1) for block in range(n)]
    widths = []
    model = on_meta(arch, attention=lambda n: widths.append(n) or torch.nn.Identity(), places=places)
    parts = [[*model[3 + stage][block].convpath] for stage, block in places]
    convs = [[part for part in path if isinstance(part, fastai_layers.ConvLayer)][-1] for path in parts]
    assert [conv[0].out_channels for conv in convs] == widths
    assert widths == [archs.width(arch, stage) for stage, _ in places]
    assert [name for name, _ in model.named_modules() if name.endswith('.attention')] == [
        f'{stage + 3}.{block}.convpath.attention' for stage, block in places]


def test_xsenet154_is_what_fastai_means():
    "SENet-154 has 115.1 million parameters; here the shortcuts into stages 2 to 4 are 1x1 convolutions, there 3x3."
    with pytest.raises(TypeError): fastai_xresnet.xsenet154()
    with torch.device('meta'): model = network('xsenet154', 1000)
    smaller = 8 * (256 * 512 + 512 * 1024 + 1024 * 2048)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(115.1e6 - smaller, rel=0.002)


@pytest.mark.parametrize('arch, pool, act', [
    ('xse_resnext50', 'max', 'mish'), ('xresnext18', 'avg', 'relu'), ('xresnet18_deep', 'avg', 'gelu'),
])
def test_fastais_own_layer_and_ours_give_the_same(arch, pool, act):
    "fastai's network with sa=True, and ours of the same weights at the same place."
    options = dict(pool=archs.FASTAI_POOLS[pool], act_cls=xresnet.ACTIVATIONS[act])
    theirs = getattr(fastai_xresnet, arch)(n_out=10, sa=True, **options)
    stage = len(NETWORKS[arch][1]) - 3
    places = [(stage, NETWORKS[arch][1][stage - 1] - 1)]
    ours = network(arch, 10, SimpleSelfAttention, places, '32-32-64', act, pool)
    at = [name for name, m in theirs.named_modules() if isinstance(m, fastai_layers.SimpleSelfAttention)]
    place = f'{stage + 3}.{places[0][1]}.convpath'
    assert len(at) == 1 and at[0].startswith(place + '.')
    for module in theirs.modules():  # what starts at 0 would hide the blocks and the layer
        if isinstance(module, torch.nn.BatchNorm2d): torch.nn.init.constant_(module.weight, 0.5)
    layer = theirs.get_submodule(at[0])
    layer.gamma.data.fill_(0.1)
    for _ in range(100): layer(torch.zeros(1, layer.n_in, 1, 1))  # until their power iteration has converged
    state = {name.replace(at[0], f'{place}.attention'): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad(): a, b = ours(x), theirs(x)
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    ours.get_submodule(f'{place}.attention').gamma.data.fill_(0.)
    with torch.no_grad(): assert (ours(x) - b).abs().max() > 0.01 * b.abs().max()  # so the layer counts


@pytest.mark.parametrize('name', ['none', 'simple', 'se'])
def test_other_weights_of_a_seed_do_not_depend_on_the_layer(name):
    states = []
    for attention in ('none', name):
        torch.manual_seed(3)
        model = network('xse_resnext18', 10, ATTENTION[attention], [(1, 1), (2, 0)], act='gelu')
        states.append({k: v for k, v in model.state_dict().items() if '.attention.' not in k})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


@pytest.mark.parametrize('arch, sa_at, expected', [
    ('xse_resnext50', '1,4.0', ((256, 16, 16), (2048, 2, 2))), ('xresnet18_deep', '5,6', ((256, 1, 1), (256, 1, 1))),
])
def test_the_shapes_a_layer_meets(arch, sa_at, expected):
    cfg = Config(arch=arch, sa_at=sa_at, size=64, attention='simple')
    assert layer.shapes(cfg) == expected
    model, seen = get_model(cfg, 10).eval(), []
    for m in model.modules():
        if isinstance(m, SimpleSelfAttention): m.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[1:])))
    with torch.no_grad(): model(torch.zeros(1, 3, 64, 64))
    assert tuple(seen) == expected


@pytest.mark.parametrize('arch, size', [('xse_resnext18', 144), ('xresnet18_deep', 100), ('xresnet18_deeper', 64)])
def test_a_max_pooling_takes_odd_sides(arch, size):
    "Of 144 pixels the last stage halves 9; fastai's own MaxPool rounds down there, and its convolutions round up."
    with torch.device('meta'): x = torch.zeros(2, 3, size, size)
    assert on_meta(arch, pool='max')(x).shape == on_meta(arch, pool='avg')(x).shape == (2, 10)


def test_the_stem_is_ours_or_fastais():
    assert on_meta('xresnext50', stem='32-64-64')[1][0].out_channels == 64
    assert on_meta('xresnext50', stem='32-32-64')[1][0].out_channels == 32


def test_every_activation_of_torch_is_there():
    "A new one in torch makes this fail: it belongs into ACTIVATIONS, or into OFF with the reason."
    torchs = set(torch.nn.modules.activation.__all__)
    assert set(map(plain, xresnet.ACTIVATIONS)) == {plain(name) for name in torchs - set(OFF)}


@pytest.mark.parametrize('spelled, expected', [
    (dict(act='ReLU'), dict(act='relu')), (dict(act='Mish'), dict(act='mish')), (dict(act='SiLU'), dict(act='silu')),
    (dict(act='LeakyReLU'), dict(act='leaky_relu')), (dict(act='leakyrelu'), dict(act='leaky_relu')),
    (dict(act='GELU'), dict(act='gelu')), (dict(act='PReLU'), dict(act='prelu')), (dict(act='Swish'), dict(act='silu')),
    (dict(act='MishJit'), dict(act='mish')), (dict(pool='MaxPool'), dict(pool='max')),
    (dict(pool='avgpool'), dict(pool='avg')), (dict(schedule='flat_and_anneal'), dict(schedule='flat_cos')),
    (dict(arch='XResNet50'), {}), (dict(attention='Simple'), dict(attention='simple')),
])
def test_names_as_upstream_spells_them(spelled, expected): assert Config(**spelled) == Config(**expected)


@pytest.mark.parametrize('name', ['Swish', 'SwishJit', 'Mish', 'MishJit'])
def test_what_fastai_calls_an_activation_is_that_of_torch(name):
    x = torch.randn(100)
    assert torch.allclose(getattr(fastai_layers, name)()(x), xresnet.ACTIVATIONS[Config(act=name).act]()(x), atol=1e-6)


@pytest.mark.parametrize('wrong, words', [
    (dict(arch='yresnet50'), '--arch yresnet50: unknown (did you mean xresnet50?); --help lists all 31'),
    (dict(arch='resnet50'), '--arch resnet50: is of torchvision and has no place for the layer'),
    (dict(arch='Resnet50'), '--arch Resnet50: is of torchvision'), (dict(opt='Over9000'), '--opt Over9000: is not in'),
    (dict(opt='Adams'), '--opt Adams: is not in fastai'),
    (dict(pool='maxblurpool'), '--pool maxblurpool: is of another package'),
    (dict(act='Mush'), '--act Mush: unknown (did you mean mish?); --help lists all'),
    (dict(pool='BlurPool'), '--pool BlurPool: unknown; choose from avg, max'),
    (dict(arch='xresnet18_deep', sa_at='7'), '--sa-at 7: no place'),
])
def test_a_wrong_name(wrong, words):
    with pytest.raises(UsageError) as e: Config(**wrong)
    assert str(e.value).startswith(words) and len(str(e.value)) < 250
