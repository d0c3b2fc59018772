"""Builds the XResNet (He et al. 2018, arXiv:1812.01187) of the 2019 source, with a place for an attention layer.

    model = xresnet('xresnet50', n_classes=10, attention=SimpleSelfAttention)

The attention layer stands where the source has it: in the last block of the first stage, after the zero-initialised
batch norm of the last convolution and before the shortcut is added. With fastai's stem and no attention, the network is
that of `fastai.vision.models.xresnet`, layer by layer. By default it departs from that in the stem: the source's is
wider, 32-64-64 channels.
"""
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn

ARCHS = {  # name: (expansion, blocks per stage)
    'xresnet18': (1, (2, 2, 2, 2)),
    'xresnet34': (1, (3, 4, 6, 3)),
    'xresnet50': (4, (3, 4, 6, 3)),
    'xresnet101': (4, (3, 4, 23, 3)),
    'xresnet152': (4, (3, 8, 36, 3)),
}
WIDTHS = 64, 128, 256, 512  # of the stages, before the expansion
STEMS = {'32-64-64': (32, 64, 64), '32-32-64': (32, 32, 64)}  # the source's, and fastai's
ACTIVATIONS = {
    'relu': partial(nn.ReLU, inplace=True),
    'leaky_relu': partial(nn.LeakyReLU, inplace=True),
    'silu': nn.SiLU,
    'mish': nn.Mish,
    'gelu': nn.GELU,
    'celu': nn.CELU,
    'elu': nn.ELU,
    'hardshrink': nn.Hardshrink,
    'hardsigmoid': nn.Hardsigmoid,
    'hardswish': nn.Hardswish,
    'hardtanh': nn.Hardtanh,
    'log_sigmoid': nn.LogSigmoid,
    'prelu': nn.PReLU,
    'relu6': nn.ReLU6,
    'rrelu': nn.RReLU,
    'selu': nn.SELU,
    'sigmoid': nn.Sigmoid,
    'softplus': nn.Softplus,
    'softshrink': nn.Softshrink,
    'softsign': nn.Softsign,
    'tanh': nn.Tanh,
    'tanhshrink': nn.Tanhshrink,
}
POOLS = {'avg': nn.AvgPool2d, 'max': nn.MaxPool2d}  # of the shortcut


def conv_layer(ni, nf, ks=3, stride=1, act=None, zero_bn=False):
    "Returns a convolution, a batch norm, whose weight starts at 0 with `zero_bn`, and the activation, if one is given."
    bn = nn.BatchNorm2d(nf)
    nn.init.constant_(bn.weight, 0. if zero_bn else 1.)
    layers = nn.Sequential(nn.Conv2d(ni, nf, ks, stride, padding=ks // 2, bias=False), bn)
    if act: layers.append(act())
    return layers


class ResBlock(nn.Module):
    "Computes act(attention(convs(x)) + shortcut(x)), from `ni` to `nh * expansion` channels."
    def __init__(self, expansion, ni, nh, stride, attention, act, pool):
        super().__init__()
        nf = nh * expansion
        if expansion == 1:
            convs = [conv_layer(ni, nh, 3, stride, act),
                     conv_layer(nh, nf, 3, zero_bn=True)]
        else:
            convs = [conv_layer(ni, nh, 1, act=act),
                     conv_layer(nh, nh, 3, stride, act),
                     conv_layer(nh, nf, 1, zero_bn=True)]
        self.convs = nn.Sequential(*convs)
        with torch.random.fork_rng(devices=[]):  # So the other weights of a seed do not depend on the attention.
            self.attention = attention(nf)
        self.shortcut = nn.Sequential()
        if stride != 1: self.shortcut.append(pool(2, ceil_mode=True))
        if ni != nf: self.shortcut.append(conv_layer(ni, nf, 1))
        self.act = act()

    def forward(self, x): return self.act(self.attention(self.convs(x)) + self.shortcut(x))


def xresnet(arch, n_classes=1000, attention=nn.Identity, places=None, stem='32-64-64', act='relu', pool='avg'):
    """Returns an XResNet: RGB images (B, 3, H, W), H and W at least 32, to logits (B, n_classes).

    attention        a layer factory: n_channels -> a module from (B, C, H, W) to (B, C, H, W)
    places           [(stage, block)] that get such a layer, stages counted from 1 and blocks from 0; by default it is
                     the last block of the first stage
    stem, act, pool  names in STEMS, ACTIVATIONS, POOLS

    Raises ValueError at a place that the network does not have.
    """
    expansion, blocks = ARCHS[arch]
    if places is None: places = [(1, blocks[0] - 1)]
    for stage, block in places:
        exists = 1 <= stage <= len(blocks) and 0 <= block < blocks[stage - 1]
        if not exists: raise ValueError(f'{arch} has no block {block} in stage {stage}')
    act, pool = ACTIVATIONS[act], POOLS[pool]
    widths = [3, *STEMS[stem]]
    layers = {f'stem{i}': conv_layer(widths[i], widths[i + 1], stride=1 if i else 2, act=act) for i in range(3)}
    layers['pool'] = nn.MaxPool2d(3, stride=2, padding=1)
    ni = widths[-1]
    for stage, (nh, n_blocks) in enumerate(zip(WIDTHS, blocks), 1):
        modules = []
        for block in range(n_blocks):
            stride = 2 if block == 0 and stage > 1 else 1
            here = attention if (stage, block) in places else nn.Identity
            modules.append(ResBlock(expansion, ni, nh, stride, here, act, pool))
            ni = nh * expansion
        layers[f'stage{stage}'] = nn.Sequential(*modules)
    layers |= {'avgpool': nn.AdaptiveAvgPool2d(1), 'flatten': nn.Flatten(), 'head': nn.Linear(ni, n_classes)}
    model = nn.Sequential(OrderedDict(layers))
    for name, m in model.named_modules():  # BatchNorm2d has bias 0 by itself, and attention initialises itself.
        if isinstance(m, (nn.Conv2d, nn.Linear)) and '.attention' not in name: nn.init.kaiming_normal_(m.weight)
    nn.init.zeros_(model.head.bias)
    return model
