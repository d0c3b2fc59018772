"""Shows what the attention layers of a trained model look at in images.

The input of a layer is seen as x (C, N): C channels at N = H*W positions. Everything is computed in float32 or float64.
"""
import numpy as np
import torch

from layers import CovarianceAttention, LowRankAttention, SelfAttention, SimpleSelfAttention
from training.branch import Branch, attention_layers
from training.data import IMAGENET_MEAN, IMAGENET_STD
from training.images import read_image, valid_image


def load_images(files, size):
    "Returns (pixels (n, size, size, 3) of images as validation crops them, the batch (n, 3, size, size) of them)."
    pixels = np.stack([np.array(valid_image(read_image(file), size)) for file in files])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return pixels, (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


@torch.no_grad()
def look(model, batch, n_eigenvectors=3):
    """Returns {name of a layer: what it looks at} for a batch of images, as dicts of NumPy arrays.

    side          (H, W) of its positions
    influence     (B, N, N), see `influence`; None where a layer does not relate positions to each other
    softmax       whether the influence is a softmax: not negative, of sum 1 for each position that takes
    eigenvectors  (B, k, N): u^T x for the first k unit eigenvectors u of S = x x^T, each an image of its channels' mix
    shares        (B, k): of the trace of S, that is of the sum of the squares of x, what each of them makes up
    ratio         the root mean square of what the layer adds over that of x, all images together
    """
    model.eval()
    found, layers = {}, attention_layers(model)
    def keep(name): return lambda module, inputs: found.update({name: inputs[0].clone()})
    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]
    branch = Branch(len(batch))
    branch.watch(model)
    try: model(batch)
    finally:
        branch.stop()
        for hook in hooks: hook.remove()
    return {name: looked(layers[name], x, n_eigenvectors) | dict(ratio=ratio)
            for (name, x), ratio in zip(found.items(), branch.ratios())}


@torch.no_grad()
def looked(module, x, n_eigenvectors):
    "Returns what `look` says of one layer for its input x (B, C, H, W), but for the ratio."
    z = x.flatten(2)  # (B, C, H, W) -> (B, C, N)
    vectors, shares = eigenvectors(z.double(), n_eigenvectors)
    scores = influence(module, z)
    return dict(side=tuple(x.shape[2:]), influence=None if scores is None else scores.numpy(),
                softmax=isinstance(module, SelfAttention), eigenvectors=vectors.numpy(), shares=shares.numpy())


def influence(module, z):
    """Returns how much position i counts for position j, (B, N, N) at [b, i, j], for z (B, C, N); None of other layers.

    The layer adds to position j gamma times the sum over i of influence[i, j] times a value at i:
    SimpleSelfAttention   x_i^T W x_j; the value is x_i (U x_i with out_conv)
    LowRankAttention      (Wf x_i)^T (Wg x_j); the value is x_i
    CovarianceAttention   scale (x_i - m)^T W x_j, m the mean over positions; the value is x_i - m
    SelfAttention         softmax over i of f(x_i)^T g(x_j); the value is h(x_i)
    """
    def times(weight, z): return weight() @ z  # (C', C) (B, C, N) -> (B, C', N)
    if isinstance(module, SimpleSelfAttention):
        scores = z.mT @ module._conv(z, module.conv())[1]
        return scores / z.shape[2] if module.mean else scores
    if isinstance(module, LowRankAttention): return times(module.key, z).mT @ times(module.query, z)
    if isinstance(module, CovarianceAttention):
        return module.scale * (z - z.mean(2, keepdim=True)).mT @ times(module.conv, z)
    if isinstance(module, SelfAttention): return torch.softmax(times(module.query, z).mT @ times(module.key, z), 1)
    return None


def eigenvectors(z, k):
    """Returns (u^T z (B, k, N) for the k first unit eigenvectors u of z z^T, their shares (B, k) of its trace).

    The sign of an eigenvector means nothing: the value farthest from 0 is made positive.
    """
    values, vectors = torch.linalg.eigh(z @ z.mT)  # (B, C), (B, C, C), the smallest first
    images = vectors[:, :, -k:].flip(2).mT @ z
    largest = images.gather(2, images.abs().argmax(2, keepdim=True))
    total = values.sum(1, keepdim=True)
    return images * torch.where(largest < 0, -1., 1.), values[:, -k:].flip(1) / torch.where(total > 0, total, 1.)
