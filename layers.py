"""Gives convolutional networks layers of self-attention.

They work on images of features (B, C, H, W), or (B, C, N) or (B, C, D, H, W).

`SimpleSelfAttention` is the layer of github.com/sdoria/SimpleSelfAttention (2019), `SelfAttention` that of
SAGAN (Zhang et al. 2018, arXiv:1805.08318) as fastai has it. The others take one thing away from the first, to
show what it does, or are its relatives. This file needs torch alone: copy it to use it.

Every layer here
- is the identity at initialisation: it adds `gamma` times what it attends to, and `gamma` starts at 0
  (`SqueezeExcitation`, a gate, is the exception);
- keeps the shape, dtype and memory format of its input, and raises ValueError on any other shape;
- runs under autocast: its products are in autocast's dtype, scaled so that float16 can hold them. On a GPU that
  needs torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False: else cuBLAS may add up parts of
  a long sum in float16 before it scales them. The backward pass belongs outside autocast, as torch says: within it
  the small float32 products would be float16, and overflow. torch.compile and CUDA graphs record it within, unless
  torch._functorch.config.backward_pass_autocast = 'off', and autocast stands in the forward of what is recorded.
"""
import re
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad

if [int(n) for n in torch.__version__.split('.')[:2]] < [2, 4]:
    raise ImportError(f'layers.py needs torch 2.4 or later, this is torch {torch.__version__}')

__all__ = ['ATTENTION', 'ChannelAttention', 'CovarianceAttention', 'LowRankAttention', 'MeanAttention', 'ResidualConv',
           'SelfAttention', 'SimpleSelfAttention', 'SpectralWeight', 'SqueezeExcitation', 'SwappedAttention',
           'multiply_adds']


class SpectralWeight(nn.Module):
    """Gives the weight of a bias-free convolution over its largest singular value, as (n_out, n_in*ks).

    Spectral normalisation (Miyato et al. 2018, arXiv:1802.05957): one step of the power iteration a training
    pass. Parameter and buffers are plain tensors, no hook and no parametrisation, so the module can be
    copied, pickled, compiled and wrapped. `sym=True` symmetrises the weight *before* it is normalised.
    Departure: the iteration starts with `n_init` steps, so that the norm is 1 within a few percent at once.
    Under gradient checkpointing the pass that is computed anew makes one more step, so that its W differs slightly.
    """
    def __init__(self, n_out, n_in, ks=1, sym=False, n_init=30):
        super().__init__()
        if sym and (n_out, ks) != (n_in, 1):
            raise ValueError(f'sym needs ks=1 and a square weight, got ks={ks}, {n_in} -> {n_out}')
        self.sym = sym
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(n_out, n_in, ks)))
        self.register_buffer('u', F.normalize(torch.randn(n_out), dim=0))
        self.register_buffer('v', F.normalize(torch.randn(n_in * ks), dim=0))
        for _ in range(n_init): self._power_step(self._matrix().detach())

    def _matrix(self):
        w = self.weight.flatten(1)
        return (w + w.t()) / 2 if self.sym else w

    @torch.no_grad()
    def _power_step(self, w):
        # a trace of the vectors themselves, so that a weight of zeros does not lose them
        self.u.copy_(F.normalize(torch.addmv(self.u, w, self.v, beta=1e-9), dim=0))
        self.v.copy_(F.normalize(torch.addmv(self.v, w.mT, self.u, beta=1e-9), dim=0))

    def forward(self):
        w = self._matrix()
        if self.training: self._power_step(w.detach())
        u, v = self.u.clone(), self.v.clone()  # the next pass writes to the buffers: backward needs these values
        norm = torch.dot(u, w @ v)
        return w / (norm + (norm == 0))  # zeros stay zeros

    def extra_repr(self): return f'{tuple(self.weight.shape)}, sym={self.sym}'


class _Layer(nn.Module):
    "The layers share the check of the input and the dtype of the products."
    def __init__(self, n_channels):
        super().__init__()
        self.n_channels = n_channels

    def forward(self, x):
        if x.dim() < 3 or x.shape[1] != self.n_channels:
            raise ValueError(f'{type(self).__name__}: expected (B, {self.n_channels}, H, W), got {tuple(x.shape)}')
        device, dtype = x.device.type, x.dtype
        if x.is_meta: device = 'cpu'  # Meta tensors have shapes alone, and no autocast.
        if torch.is_autocast_enabled(device) and dtype != torch.float64: dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            y = self.attend(x.flatten(2), dtype)  # (B, C, H, W) -> (B, C, N), N = H*W
        return _fit(y, x.dtype).view(x.shape)

    def attend(self, x, dtype):
        "Returns the output for `x` (B, C, N), the large products in `dtype`."
        raise NotImplementedError

    def multiply_adds(self, n_positions):
        """Returns the multiply-adds of the matrix products of one image in a forward pass.

        Those that normalise a weight are left out.
        """
        raise NotImplementedError

    def extra_repr(self): return f'{self.n_channels}'

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for key in [k for k in state_dict if k.startswith(prefix)]:
            state_dict[prefix + _renamed(key.removeprefix(prefix))] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _renamed(name):
    "Returns the name of a tensor here, from that in fastai's layers (torch's spectral_norm) or in this file at first."
    name = re.sub(r'^weight\.', 'conv.', name)
    name = re.sub(r'(\.0)?\.weight_(u|v)$', r'.\2', name)
    return re.sub(r'(\.0)?\.weight_orig$', '.weight', name)


class _Attention(_Layer):
    "The attention layers share gamma: y = x + gamma * (what is attended to)."
    def __init__(self, n_channels):
        super().__init__(n_channels)
        self.gamma = nn.Parameter(torch.zeros(1))


def _fit(x, dtype):
    "Returns `x` as `dtype`; what passes to float16 saturates at +-65,504 instead of giving inf."
    narrows = dtype == torch.float16 and x.dtype != torch.float16
    return x.clamp(-65504, 65504).to(dtype) if narrows else x.to(dtype)


def _transpose(x): return x.transpose(1, 2)  # x.mT, which ONNX's old exporter does not know


def _is_channels_last(x): return x.stride(1) == 1 and x.shape[1] > 1  # of (B, C, N)


def _columns(x):
    "Returns x (B, C, N) as (C, B N): a view where x is channels last, else a copy of whole rows."
    return x.mT.flatten(0, 1).mT if _is_channels_last(x) else x.transpose(0, 1).flatten(1)


def _wide(dtype): return torch.float32 if dtype == torch.float16 else dtype  # of the small matrices


def _product(a, b, dtype, add=None):
    """Returns a b, or a b + `add`, all (B, ., .), as `dtype`.

    Where float16 gives float32, the sums have many terms: they are held divided by their number on the way.
    """
    if a.dtype == dtype: return torch.bmm(a, b) if add is None else torch.baddbmm(add, a, b)
    n = a.shape[2]
    y = torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=1 / n).to(dtype) * n
    return y if add is None else y + add


def _product_like(x, a, b, add=None):
    "Returns a b, or a b + `add`, all (B, ., .), in the dtype and memory layout of `x`."
    if not _is_channels_last(x): return _product(a, b, x.dtype, add)
    return _transpose(_product(_transpose(b), _transpose(a), x.dtype, None if add is None else _transpose(add)))


class _Function(torch.autograd.Function):
    "Has a gradient of its own, which is made of the inputs alone: so second derivatives are right, too."
    generate_vmap_rule = True

    @classmethod
    def call(cls, *inputs): return cls.forward(*inputs) if _is_plain() else cls.apply(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)


def _is_plain():
    "Returns whether torch.jit.trace, ONNX's old exporter or torch.func.jvp runs: each has to see every operation."
    return torch.jit.is_tracing() or getattr(forward_ad, '_current_level', -1) >= 0


class _Gram(_Function):
    """Gives (z, z z^T as `_wide`) for z (B, C, N).

    The gradients of both come back together, so that that of z z^T, which is one product, (g + g^T) z, is added to
    the other on the way. Autograd would make two products and add up three tensors.
    """
    @staticmethod
    def forward(z): return z.view_as(z), _product(z, _transpose(z), _wide(z.dtype))

    @staticmethod
    def backward(ctx, g, g_gram):
        z, = ctx.saved_tensors
        return g if g_gram is None else _product_like(z, (g_gram + g_gram.mT).to(z.dtype), z, g)


class _Linear(_Function):
    "Gives (z, w z) for z (B, C, N) and w (K, C) as `_wide`; the gradients of both come back together as in `_Gram`."
    @staticmethod
    def forward(z, w): return z.view_as(z), _product_like(z, _fit(w, z.dtype).expand(z.shape[0], -1, -1), z)

    @staticmethod
    def backward(ctx, g, g_y):
        if g_y is None: return g, None
        z, w = ctx.saved_tensors
        g_w = _product(_columns(g_y)[None], _columns(z).mT[None], w.dtype)[0]  # (K, B N) (B N, C)
        return _product_like(z, _fit(w, z.dtype).mT.expand(z.shape[0], -1, -1), g_y, g), g_w


class _Product(_Function):
    """Gives a b, or a b + `add`, all (B, ., .), as `dtype`; in float16 it saturates.

    Of a, b and `dtype` some may be float16 and the others float32, as `_wide`. `add` may be 'a' or 'b', for that one:
    then its two gradients are added in one product.
    """
    @staticmethod
    def forward(a, b, add, dtype):
        half = _narrowest(a.dtype, b.dtype, dtype)
        y = _product(_fit(a, half), _fit(b, half), dtype, {'a': a, 'b': b}[add] if isinstance(add, str) else add)
        return y.clamp_(-65504, 65504) if dtype == torch.float16 else y

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, add, ctx.dtype = inputs
        ctx.save_for_backward(a, b)
        ctx.add = add if isinstance(add, str) else add is not None

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        half = _narrowest(a.dtype, b.dtype, ctx.dtype)
        g_a = _product_like(a, _fit(g, half), _fit(b, half).mT, g if ctx.add == 'a' else None)
        g_b = _product_like(b, _fit(a, half).mT, _fit(g, half), g if ctx.add == 'b' else None)
        return g_a, g_b, g if ctx.add is True else None, None


def _narrowest(*dtypes): return torch.float16 if torch.float16 in dtypes else dtypes[0]


def _multiply(a, b, like, add=None):
    """Returns a b, or a b + `add`, all (B, ., .), in the dtype and memory layout of `like`.

    a and b may be as `_wide` or in the dtype of `like`; `add` may be one of them.
    """
    add = 'a' if add is a else 'b' if add is b else add
    if not _is_channels_last(like): return _Product.call(a, b, add, like.dtype)
    if add is not None: add = {'a': 'b', 'b': 'a'}[add] if isinstance(add, str) else _transpose(add)
    return _transpose(_Product.call(_transpose(b), _transpose(a), add, like.dtype))


def _add_product(x, z, a, b):
    "Returns x + a b for x (B, C, N), `z` being x in the dtype of the large products; a or b may be z."
    return _multiply(a, b, z, z) if z.dtype == x.dtype else x + _multiply(a, b, z)


def multiply_adds(n_channels, n_positions, ks=1, out_conv=False):
    """Returns {order: multiply-adds per image} of the ways to evaluate (x x^T)(W x), x being (C, N).

        channels    ((x x^T) W) x    2 C^2 N + C^3      cheapest for N > C; ks=1 only
        positions   x (x^T (W x))    C^2 N + 2 C N^2    cheapest for N < C
        source      (x x^T)(W x)     3 C^2 N            the order of the time-complexity study of 2019
    """
    C, N = n_channels, n_positions
    conv = ks * C * C * N
    out = int(out_conv)  # torch 2.11 compiles no product of a bool and a size that it keeps open
    counts = {'channels': 2 * C * C * N + C ** 3 * (1 + out)} if ks == 1 else {}
    return counts | {'source': conv + 2 * C * C * N + C ** 3 * out,
                     'positions': conv + 2 * C * N * N + C * C * N * out}


def _cheapest(counts):
    "Returns the key of the smallest value; of equal ones the first, which was measured to be the fastest."
    # By a loop: torch.compile has no min() with a key for sizes that it keeps open.
    best = next(iter(counts))
    for order in counts:
        if counts[order] < counts[best]: best = order
    return best


class SimpleSelfAttention(_Attention):
    """y = x + gamma * (x x^T)(W x) on x seen as (C, N): attention without softmax, query, key or value.

    `W` is a spectrally normalised convolution of width `ks` (odd) over the flattened positions, as in the source.
    sym       W is made symmetric before it is normalised (the source's option of that name has no effect).
    out_conv  y = x + gamma * U (x x^T)(W x): SAGAN's last 1x1 convolution, which the source left out.
    mean      y = x + gamma * (x x^T / N)(W x): the same functions, but a step of gamma changes the layer 1/N as much.
    order     how the product is evaluated, see `multiply_adds`; 'auto': the cheapest for the input at hand.

    In float16 the large products are float16 and the small matrices between them float32; y and the factor of x
    saturate. Finite while the root mean square of a channel (of a position, where N < C) is at most 255.
    """
    def __init__(self, n_channels, ks=1, sym=False, out_conv=False, mean=False, order='auto'):
        super().__init__(n_channels)
        if ks % 2 == 0: raise ValueError(f'ks must be odd, got {ks}')
        orders = ['auto', *multiply_adds(n_channels, 1, ks)]
        if order not in orders: raise ValueError(f'order must be one of {", ".join(orders)} for ks={ks}, got {order!r}')
        self.ks, self.order, self.mean = ks, order, mean
        self.conv = SpectralWeight(n_channels, n_channels, ks, sym)
        self.out = SpectralWeight(n_channels, n_channels) if out_conv else None

    def attend(self, x, dtype):
        N, z, wide = x.shape[2], x.to(dtype), _wide(dtype)
        w, u = self.conv(), self.out().to(wide) if self.out is not None else None
        gamma = self.gamma / N if self.mean else self.gamma
        order = self.order_at(N)
        if order == 'positions':
            z, values = (z, z) if u is None else _Linear.call(z, u)
            z, wz = self._conv(z, w.to(wide))
            scores = _Product.call(_transpose(z), wz, None, wide)  # (B, N, C) (B, C, N) -> (B, N, N)
            return _add_product(x, z, z if u is None else values, (gamma * scores).to(wide))
        z, mix = _Gram.call(z)  # (B, C, C)
        if u is not None: mix = u @ mix
        if order == 'channels': return _add_product(x, z, mix @ (gamma * w).to(wide), z)
        z, wz = self._conv(z, w.to(wide))
        return _add_product(x, z, (gamma * mix).to(wide), wz)

    def counts(self, n_positions): return multiply_adds(self.n_channels, n_positions, self.ks, self.out is not None)

    def order_at(self, n_positions):
        "Returns the order in which a pass evaluates the product."
        return _cheapest(self.counts(n_positions)) if self.order == 'auto' else self.order

    def multiply_adds(self, n_positions): return self.counts(n_positions)[self.order_at(n_positions)]

    def _conv(self, z, w):
        "Returns (z, W z) for z (B, C, N), `w` (C, C*ks) along the positions."
        if self.ks == 1: return _Linear.call(z, w)
        return z, F.conv1d(z, w.to(z.dtype).unflatten(1, (z.shape[1], -1)), padding=self.ks // 2)

    def extra_repr(self): return f'{self.n_channels}, ks={self.ks}, mean={self.mean}, order={self.order!r}'


class _BlockedSoftmax(_Function):
    """Gives x + h softmax(f^T g) for x (B, C, N), fgh (B, D + D + C, N), a block of images or of columns at a time.

    No N x N matrix is kept: backward makes the blocks anew, and writes the gradients of f, g and h into one tensor.
    """
    generate_vmap_rule = False
    BLOCK = 2**19  # scores at once: half as many take longer on a CPU, twice as many take more memory

    @staticmethod
    def blocks(x):
        "Returns (images, columns) of each block: columns of one image, or all columns of some images."
        B, _, N = x.shape
        if not N: return []
        images = max(1, _BlockedSoftmax.BLOCK // N**2)
        width = -(-N // -(-N**2 // _BlockedSoftmax.BLOCK))
        return [(slice(b, b + images), slice(j, j + width)) for b in range(0, B, images) for j in range(0, N, width)]

    @staticmethod
    def split(x, fgh):
        "Returns f (B, D, N), g (B, D, N), h (B, C, N)."
        C = x.shape[1]
        D = (fgh.shape[1] - C) // 2
        return fgh.split([D, D, C], dim=1)

    @staticmethod
    def softmax(f, g): return torch.softmax(_transpose(g) @ f, 2)  # transposed: its rows are the columns of f^T g

    @staticmethod
    def forward(x, fgh):
        f, g, h = _BlockedSoftmax.split(x, fgh)
        if _is_plain(): return x + h @ _transpose(_BlockedSoftmax.softmax(f, g))
        y = x.clone()
        for b, j in _BlockedSoftmax.blocks(x): _add_into(y[b, :, j], h[b], _BlockedSoftmax.softmax(f[b], g[b, :, j]).mT)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def scores(f, g, h, g_y):
        "Returns the softmax, transposed, and the gradient of what it is taken of."
        p = _BlockedSoftmax.softmax(f, g)
        return p, torch.ops.aten._softmax_backward_data(g_y.mT @ h, p, 2, p.dtype)

    @staticmethod
    def backward(ctx, g_y):
        fgh, = ctx.saved_tensors
        f, g, h = _BlockedSoftmax.split(g_y, fgh)
        if torch.is_grad_enabled():  # for second derivatives: without blocks, as nothing may be written in place
            p, g_s = _BlockedSoftmax.scores(f, g, h, g_y)
            return g_y, torch.cat([g @ g_s, f @ g_s.mT, g_y @ p], 1)
        g_fgh = torch.empty_like(fgh)
        g_f, g_g, g_h = _BlockedSoftmax.split(g_y, g_fgh)
        for b, j in _BlockedSoftmax.blocks(g_y):
            p, g_s = _BlockedSoftmax.scores(f[b], g[b, :, j], h[b], g_y[b, :, j])
            later = min(j.start, 1)  # the blocks of an image are added up
            _add_into(g_f[b], g[b, :, j], g_s, later)
            _add_into(g_g[b, :, j], f[b], g_s.mT, 0)
            _add_into(g_h[b], g_y[b, :, j], p, later)
        return g_y, g_fgh

    @staticmethod
    def vmap(info, dims, *inputs):
        "Makes the mapped dimension part of the batch."
        inputs = [t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(inputs, dims)]
        return _BlockedSoftmax.apply(*(t.flatten(0, 1) for t in inputs)).unflatten(0, (info.batch_size, -1)), 0


def _add_into(out, a, b, beta=1):
    "Writes beta * out + a b, (B, ., .) each, into `out`."
    if _is_channels_last(out): out, a, b = out.mT, b.mT, a.mT
    torch.baddbmm(out, a, b, beta=beta, out=out)


class SelfAttention(_Attention):
    """SAGAN's layer as in fastai: o_j = sum_i softmax_i(f(x_i) . g(x_j)) h(x_i), y = x + gamma * o.

    f and g (C -> C/8) and h (C -> C) are spectrally normalised 1x1 convolutions; no scaling of the scores.
    Through `scaled_dot_product_attention`: memory O(N) an image where a fused kernel exists, never N x N.
    Its kernels want one head size for f, g and h, at most 256: f and g are padded with zeros to that of h,
    and h is split into heads that share f and g; where C has no divisor from C/8 to 256, as above 2,048, there is one
    head, which no fused kernel takes. In float32 on a CPU, where that padding costs more than the
    kernel saves at most shapes (measured: "sagan fused" in results/benchmarks), through `_BlockedSoftmax`.
    The fused kernels have no second derivatives and say so: run the layer under
    `torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)` where they are needed.
    """
    def __init__(self, n_channels):
        super().__init__(n_channels)
        self.n_inner = max(1, n_channels // 8)
        self.query, self.key = SpectralWeight(self.n_inner, n_channels), SpectralWeight(self.n_inner, n_channels)
        self.value = SpectralWeight(n_channels, n_channels)

    def attend(self, x, dtype):  # SAGAN's "query" f is what is attended to
        weights = [self.query(), self.key(), self.value()]
        if not self._in_blocks(x, dtype) and not _is_plain():
            fgh = F.linear(x.mT.to(dtype), torch.cat(weights).to(dtype))  # (B, C, N) -> (B, N, C/8 + C/8 + C)
            attended = self._fused(*fgh.split([len(w) for w in weights], dim=2))
            return x + self.gamma * attended.mT  # (B, N, C) -> (B, C, N)
        weights[2] = self.gamma * weights[2]
        return _BlockedSoftmax.call(*_Linear.call(x.to(dtype), torch.cat(weights).to(dtype)))

    @staticmethod
    def _in_blocks(x, dtype):
        "Returns whether `x` goes through _BlockedSoftmax; torch.compile makes one graph of the other way alone."
        full = dtype in (torch.float32, torch.float64)
        return x.device.type == 'cpu' and full and not torch.compiler.is_compiling()

    def _fused(self, f, g, h):
        C = self.n_channels
        size = max([size for size in range(self.n_inner, 257) if C % size == 0], default=C)  # channels of a head of h
        h = h.unflatten(2, (-1, size)).transpose(1, 2)  # (B, N, C) -> (B, C/size, N, size)
        f, g = (F.pad(t, (0, size - self.n_inner)).unsqueeze(1).expand_as(h) for t in (f, g))
        attended = F.scaled_dot_product_attention(g, f, h, scale=1.)
        return attended.transpose(1, 2).flatten(2)  # (B, C/size, N, size) -> (B, N, C)

    def multiply_adds(self, n_positions):
        C, N = self.n_channels, n_positions
        return (2 * self.n_inner + C) * C * N + (self.n_inner + C) * N**2


class _WithConv(_Attention):
    "Has W of `SimpleSelfAttention`, a spectrally normalised 1x1 convolution."
    def __init__(self, n_channels):
        super().__init__(n_channels)
        self.conv = SpectralWeight(n_channels, n_channels)

    def gamma_w(self, dtype):
        "Returns gamma W for products in `dtype`."
        return (self.gamma * self.conv()).to(_wide(dtype))


class ResidualConv(_WithConv):
    """y = x + gamma * W x: the parameters of `SimpleSelfAttention` without attention.

    C^2 + 1 parameters, C^2 N multiply-adds.
    """
    def attend(self, x, dtype):
        z, wz = _Linear.call(x.to(dtype), self.gamma_w(dtype))
        return (z if z.dtype == x.dtype else x) + wz

    def multiply_adds(self, n_positions): return self.n_channels**2 * n_positions


class _Mixing(_WithConv):
    """y = x + M x, M (B, C, C) made of x and gamma W by `mix`; the multiply-adds here are of one that takes x x^T.

    scale   scale * gamma in place of gamma: the same functions, but a step of gamma changes the layer that many times
            as much.
    """
    def __init__(self, n_channels, scale=1):
        super().__init__(n_channels)
        self.scale = scale

    def gamma_w(self, dtype):
        w = super().gamma_w(dtype)
        return w if self.scale == 1 else self.scale * w

    def attend(self, x, dtype):
        z, mix = self.mix(x.to(dtype), self.gamma_w(dtype))
        return _add_product(x, z, mix, z)

    def extra_repr(self): return f'{self.n_channels}, scale={self.scale}'

    def mix(self, z, w):
        "Returns (z, M as `_wide`) for z (B, C, N); z comes back from `_Gram`."
        raise NotImplementedError

    def multiply_adds(self, n_positions): return 2 * self.n_channels**2 * n_positions + self.n_channels**3


class SwappedAttention(_Mixing):
    """y = x + gamma * S' W x with S' = x' x'^T of another image x' of the batch: must the statistics be its own?

    x' is the image before x in the batch, that before the first is the last, in training and in validation alike. So
    the output depends on what else is in the batch: a batch of one is its own other image, as in
    `SimpleSelfAttention`, and in a batch in the order of its classes x' is mostly of x's class.
    C^2 + 1 parameters, 2 C^2 N + C^3 multiply-adds.
    """
    def mix(self, z, w):
        z, gram = _Gram.call(z)
        return z, gram.roll(1, 0) @ w


class MeanAttention(_Mixing):
    """y = x + gamma * N m (m^T W x), m the mean of x over its positions: the first-order part of `SimpleSelfAttention`.

    x x^T = N (m m^T + covariance of the channels over the positions): with `CovarianceAttention` it adds up to that
    layer. C^2 + 1 parameters, C^2 N + 2 C^2 multiply-adds: m (m^T W) is made first, as it is the same at all positions.
    With `scale` (by default 1), scale * gamma stands in place of gamma.
    """
    def mix(self, z, w):
        mean = z.mean(2, keepdim=True, dtype=torch.promote_types(z.dtype, torch.float32)).to(w.dtype)  # (B, C, 1)
        return z, z.shape[2] * mean @ (_transpose(mean) @ w)

    def multiply_adds(self, n_positions): return self.n_channels**2 * (n_positions + 2)


class CovarianceAttention(_Mixing):
    """y = x + gamma * N K W x, K the covariance of the channels over the positions: the second-order part alone.

    x x^T = N (K + m m^T), see `MeanAttention`. K is made of x - m, so that no digits are lost where m is large.
    C^2 + 1 parameters, 2 C^2 N + C^3 multiply-adds. `scale` is that of `MeanAttention`.
    """
    def mix(self, z, w):
        _, gram = _Gram.call(z - z.mean(2, keepdim=True))
        return z, gram @ w


class LowRankAttention(_Attention):
    """y = x + gamma * (x x^T)(Wf^T Wg) x, Wf and Wg (C -> C/8): W against the product of a key and a query.

    SAGAN's f = Wf x (here `key`) and g = Wg x (`query`) without its softmax, and x as the value. Both are spectrally
    normalised 1x1 convolutions; their product has a norm of at most 1, W of `SimpleSelfAttention` has 1.
    C^2 / 4 + 1 parameters. Evaluated as (x f^T) g: C^2 N / 2 multiply-adds (for C a multiple of 8).
    """
    def __init__(self, n_channels):
        super().__init__(n_channels)
        self.n_inner = max(1, n_channels // 8)
        self.key, self.query = (SpectralWeight(self.n_inner, n_channels) for _ in range(2))

    def attend(self, x, dtype):
        root = self.n_channels**0.5  # f of equal channels is that much larger than x: it is held divided by it
        z, fg = _Linear.call(x.to(dtype), torch.cat([self.key() / root, self.query()]).to(_wide(dtype)))
        f, g = fg.split(self.n_inner, dim=1)  # (B, C/8, N) each
        values = self.gamma * root * _Product.call(z, _transpose(f), None, _wide(dtype))  # (B, C, C/8)
        return _add_product(x, z, values.to(_wide(dtype)), g)

    def multiply_adds(self, n_positions): return 4 * self.n_inner * self.n_channels * n_positions


class ChannelAttention(_Attention):
    """y = x + gamma * A x, A_ij = softmax_j(max_j S_ij - S_ij), S = x x^T: DANet's channel attention.

    Its paper (arXiv:1809.02983) writes softmax(S); its code, which this follows, subtracts S from the row's largest
    value, so that a channel attends most to those least like it. S and A are float32 under autocast: an exponent
    needs the digits. 1 parameter, 2 C^2 N multiply-adds.
    """
    def attend(self, x, dtype):
        _, gram = _Gram.call(x.to(torch.promote_types(x.dtype, torch.float32)))
        attention = torch.softmax(gram.amax(2, keepdim=True) - gram, 2)
        z = x.to(dtype)
        return _add_product(x, z, (self.gamma * attention).to(_wide(dtype)), z)

    def multiply_adds(self, n_positions): return 2 * self.n_channels**2 * n_positions


class SqueezeExcitation(_Layer):
    """y = x * sigmoid(V relu(U m + a) + b), m the mean of x over its positions (arXiv:1709.01507), reduction 8.

    A gate, no attention: not the identity at the start, where it about halves x.
    U (C/8, C) and V (C, C/8) have biases: C^2 / 4 + 9/8 C parameters, C^2 / 4 multiply-adds.
    """
    def __init__(self, n_channels, reduction=8):
        super().__init__(n_channels)
        n_inner = max(1, n_channels // reduction)
        self.gate = nn.Sequential(nn.Linear(n_channels, n_inner), nn.ReLU(),
                                  nn.Linear(n_inner, n_channels), nn.Sigmoid())

    def attend(self, x, dtype):
        mean = x.mean(2, dtype=torch.promote_types(x.dtype, torch.float32))
        return x * self.gate(mean.to(self.gate[0].weight.dtype)).to(x.dtype).unsqueeze(2)

    def multiply_adds(self, n_positions): return sum(m.weight.numel() for m in self.gate if isinstance(m, nn.Linear))


# name: n_channels -> layer. One class and one line here add a variant to the command, the tests and the tables.
ATTENTION = {
    'none': nn.Identity,
    'simple': SimpleSelfAttention,
    'simple_sym': partial(SimpleSelfAttention, sym=True),
    'simple_out': partial(SimpleSelfAttention, out_conv=True),
    'simple_n': partial(SimpleSelfAttention, mean=True),
    'sagan': SelfAttention,
    'conv': ResidualConv,
    'swap': SwappedAttention,
    'mean': MeanAttention,
    'mean_small': partial(MeanAttention, scale=1 / 16),
    'cov': CovarianceAttention,
    'cov_large': partial(CovarianceAttention, scale=16),
    'low_rank': LowRankAttention,
    'channel': ChannelAttention,
    'se': SqueezeExcitation,
}
