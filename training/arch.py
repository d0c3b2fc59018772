"""Builds each network of fastai.vision.models.xresnet by its name, with places for attention layers in every block.

The plain ones are those of xresnet.py. The others, with squeeze and excitation (xse), with grouped convolutions
(resnext), with six or eight stages (deep, deeper), are built by fastai, and our layer is put where theirs stands: at
the end of a block's convolutions, after the zero-initialised batch norm and the squeeze and excitation, before the
shortcut is added. At stage 1, the default, it is where fastai's `sa=True` puts it; in the deep and deeper networks
fastai takes stages 3 and 5, here `--sa-at 3` and `--sa-at 5`. It calls the layer by its number in the block, and we by
the name `attention`: the weights of fastai's xse_resnext50(sa=True) load once `convpath.4` is renamed so.
"""
import torch
import torch.nn as nn
from fastai.layers import AvgPool, SEBlock
from fastai.vision.models import xresnet as fastai_xresnet

import xresnet
from xresnet import ACTIVATIONS, STEMS

FASTAI_ARCHS = {  # name: (expansion, blocks per stage)
    'xresnet18_deep': (1, (2, 2, 2, 2, 1, 1)),
    'xresnet34_deep': (1, (3, 4, 6, 3, 1, 1)),
    'xresnet50_deep': (4, (3, 4, 6, 3, 1, 1)),
    'xresnet18_deeper': (1, (2, 2, 1, 1, 1, 1, 1, 1)),
    'xresnet34_deeper': (1, (3, 4, 6, 3, 1, 1, 1, 1)),
    'xresnet50_deeper': (4, (3, 4, 6, 3, 1, 1, 1, 1)),
    'xresnext18': (1, (2, 2, 2, 2)),
    'xresnext34': (1, (3, 4, 6, 3)),
    'xresnext50': (4, (3, 4, 6, 3)),
    'xresnext101': (4, (3, 4, 23, 3)),
    'xse_resnet18': (1, (2, 2, 2, 2)),
    'xse_resnet34': (1, (3, 4, 6, 3)),
    'xse_resnet50': (4, (3, 4, 6, 3)),
    'xse_resnet101': (4, (3, 4, 23, 3)),
    'xse_resnet152': (4, (3, 8, 36, 3)),
    'xse_resnext18': (1, (2, 2, 2, 2)),
    'xse_resnext34': (1, (3, 4, 6, 3)),
    'xse_resnext50': (4, (3, 4, 6, 3)),
    'xse_resnext101': (4, (3, 4, 23, 3)),
    'xse_resnext18_deep': (1, (2, 2, 2, 2, 1, 1)),
    'xse_resnext34_deep': (1, (3, 4, 6, 3, 1, 1)),
    'xse_resnext50_deep': (4, (3, 4, 6, 3, 1, 1)),
    'xse_resnext18_deeper': (1, (2, 2, 1, 1, 1, 1, 1, 1)),
    'xse_resnext34_deeper': (1, (3, 4, 4, 2, 2, 1, 1, 1)),
    'xse_resnext50_deeper': (4, (3, 4, 4, 2, 2, 1, 1, 1)),
    'xsenet154': (4, (3, 8, 36, 3)),
}
NETWORKS = xresnet.ARCHS | FASTAI_ARCHS
N_BEFORE = 4  # modules of fastai's network before its first stage: the stem and a pooling


def network(arch, n_classes, attention=nn.Identity, places=None, stem='32-64-64', act='relu', pool='avg'):
    "Returns the network `arch`, ours or fastai's; the arguments are those of `xresnet.xresnet`."
    if arch in xresnet.ARCHS: return xresnet.xresnet(arch, n_classes, attention, places, stem, act, pool)
    model = fastai_network(arch, n_classes, stem, act, pool)
    for stage, block in places or [(1, NETWORKS[arch][1][0] - 1)]:
        with torch.random.fork_rng(devices=[]):  # So the other weights of a seed do not depend on the attention.
            layer = attention(width(arch, stage))
        model[N_BEFORE + stage - 1][block].convpath.add_module('attention', layer)
    return model


def max_pool(ks, ndim=2, ceil_mode=False):
    "Returns a max pooling that covers odd sides; fastai's own drops `ceil_mode`, and its block then fails there."
    return nn.MaxPool2d(ks, ceil_mode=ceil_mode)


FASTAI_POOLS = {'avg': AvgPool, 'max': max_pool}


def fastai_network(arch, n_classes, stem, act, pool):
    "Returns fastai's own network of that name, with a dropout of 0.2 before the last layer of xsenet154."
    options = dict(n_out=n_classes, stem_szs=STEMS[stem], act_cls=ACTIVATIONS[act], pool=FASTAI_POOLS[pool])
    if arch != 'xsenet154': return getattr(fastai_xresnet, arch)(**options)
    # fastai 2.8.12 leaves the expansion out of its call here, and so fails: it is that of SENet-154, 4.
    return fastai_xresnet.XResNet(SEBlock, *NETWORKS[arch], groups=64, reduction=16, p=0.2, **options)


def width(arch, stage):
    "Returns the channels that a block of this stage puts out: 64, 128, 256, 512, then 256, times the expansion."
    return NETWORKS[arch][0] * (64 * 2**(stage - 1) if stage <= 4 else 256)
