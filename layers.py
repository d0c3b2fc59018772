"""Self-attention layers for convolutional networks, on images of features (B, C, H, W).

`SimpleSelfAttention` is the layer of github.com/sdoria/SimpleSelfAttention (2019), `SelfAttention` that of
SAGAN (Zhang et al. 2018, arXiv:1805.08318) as fastai has it. Needs torch alone: copy this file to use it.

Every layer here
- is the identity at initialisation: it adds `gamma` times what it attends to, and `gamma` starts at 0;
- keeps the shape, dtype and memory format of its input, and raises ValueError on any other shape;
- runs under autocast: its products are in autocast's dtype, scaled so that float16 can hold them.
"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['ATTENTION', 'SelfAttention', 'SimpleSelfAttention', 'SpectralWeight', 'multiply_adds']


class SpectralWeight(nn.Module):
    """The weight of a bias-free convolution over its largest singular value: called, gives (n_out, n_in*ks).

    Spectral normalisation (Miyato et al. 2018, arXiv:1802.05957): one step of the power iteration a training
    pass. Parameter and buffers are plain tensors, no hook and no parametrisation, so the module can be
    copied, pickled, compiled and wrapped. `sym=True` symmetrises the weight *before* it is normalised.
    Departure: the iteration starts with `n_init` steps, so that the norm is 1 within a few percent at once.
    """
    def __init__(self, n_out, n_in, ks=1, sym=False, n_init=30):
        super().__init__()
        if sym and (n_out, ks) != (n_in, 1): raise ValueError(f'sym needs ks=1 and a square weight, got ks={ks}, {n_in} -> {n_out}')
        self.sym = sym
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(n_out, n_in, ks)))
        self.register_buffer('u', F.normalize(torch.randn(n_out), dim=0))
        self.register_buffer('v', F.normalize(torch.randn(n_in * ks), dim=0))
        for _ in range(n_init): self._power_step(self._matrix().detach())

    def _matrix(self):
        w = self.weight.flatten(1)
        return (w + w.mT) / 2 if self.sym else w

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


class _Attention(nn.Module):
    "What the layers share: the check of the input, the dtype of the products, gamma."
    def __init__(self, n_channels):
        super().__init__()
        self.n_channels = n_channels
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        if x.dim() != 4 or x.shape[1] != self.n_channels:
            raise ValueError(f'{type(self).__name__}: expected (B, {self.n_channels}, H, W), got {tuple(x.shape)}')
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64: dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            y = self.attend(x.flatten(2), dtype)  # (B, C, H, W) -> (B, C, N), N = H*W
        return _fit(y, x.dtype).unflatten(2, x.shape[2:])

    def attend(self, x, dtype):
        "x + gamma * (what is attended to) for `x` (B, C, N), the large products in `dtype`."
        raise NotImplementedError


def _fit(x, dtype):
    "`x` as `dtype`; float16 saturates at +-65,504 instead of giving inf."
    return x.clamp(-65504, 65504).to(dtype) if dtype == torch.float16 else x.to(dtype)


def _is_channels_last(x): return x.stride(1) == 1 and x.shape[1] > 1  # of (B, C, N)


def _add_product(x, a, b, out=None):
    "x + a b, all (B, ., .), in the memory layout of `x`; into `out` (of that layout; may be `x`) if given."
    if a.dtype != x.dtype: return x + _fit(_product_like(x, a, b), a.dtype)
    if not _is_channels_last(x): return torch.baddbmm(x, a, b, out=out)
    return torch.baddbmm(x.mT, b.mT, a.mT, out=None if out is None else out.mT).mT


def _product_like(x, a, b):
    "a b, all (B, ., .), in the memory layout of `x`."
    return torch.bmm(b.mT, a.mT).mT if _is_channels_last(x) else torch.bmm(a, b)


def _wide(dtype): return torch.float32 if dtype == torch.float16 else dtype  # of the small matrices


def _long_product(a, b):
    "a b as `_wide`: sums of many terms, in float16 held divided by their number on the way."
    if a.dtype != torch.float16: return torch.bmm(a, b)
    n = a.shape[2]
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=1 / n).float() * n


class _Gram(torch.autograd.Function):
    "x x^T of (B, C, N) as `_wide`. Its gradient is one product, (g + g^T) x; autograd would make two."
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _long_product(x, x.mT)

    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        return _product_like(x, (g + g.mT).to(x.dtype), x)


class _ChannelMix(torch.autograd.Function):
    """x + left (z z^T) right z, z being `x` (B, C, N) as `dtype`; left and right (C, C) as `_wide`, left may be None.

    Forward and backward make five products of C^2 N: autograd would make six, for z z^T is symmetric, and would add
    up three gradients of x; fastai's layer makes nine.
    """
    @staticmethod
    def forward(ctx, x, left, right, dtype):
        z = x.to(dtype)
        gram = _long_product(z, z.mT)  # (B, C, C)
        mix = _fit((gram if left is None else left @ gram) @ right, dtype)
        ctx.save_for_backward(z, gram, mix, left, right)
        return _add_product(x, mix, z)

    @staticmethod
    def backward(ctx, g):
        z, gram, mix, left, right = ctx.saved_tensors
        g_ = g.to(z.dtype)
        g_mix = _long_product(g_, z.mT)  # (B, C, C), as are the others
        g_left = None if left is None else _sum_products(g_mix, (gram @ right).mT)
        g_right = _sum_products((gram if left is None else left @ gram).mT, g_mix)
        g_gram = (g_mix if left is None else left.mT @ g_mix) @ right.mT
        g_x = _add_product(g, mix.mT, g_)
        return _add_product(g_x, (g_gram + g_gram.mT).to(z.dtype), z, out=g_x), g_left, g_right, None


def _sum_products(a, b):
    "The sum over the batch of a b, (B, C, C) each, as one product."
    return a.transpose(0, 1).flatten(1) @ b.flatten(0, 1)


class _Scores(torch.autograd.Function):
    "a^T b of (B, C, N) as `_wide`; the gradients are not scaled, so float16 holds them too."
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return _long_product(a.mT, b)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        g = g.to(a.dtype)
        return _product_like(a, b, g.mT), _product_like(b, a, g)


def multiply_adds(n_channels, n_positions, ks=1, out_conv=False):
    """{order: multiply-adds per image} of the ways to evaluate (x x^T)(W x), x being (C, N).

        channels    ((x x^T) W) x    2 C^2 N + C^3      cheapest for N > C; ks=1 only
        positions   x (x^T (W x))    C^2 N + 2 C N^2    cheapest for N < C
        source      (x x^T)(W x)     3 C^2 N            the order of the time-complexity study of 2019
    """
    C, N = n_channels, n_positions
    conv = ks * C * C * N
    counts = {'channels': 2 * C * C * N + C ** 3 * (1 + out_conv)} if ks == 1 else {}
    return counts | {'positions': conv + 2 * C * N * N + C * C * N * out_conv,
                     'source': conv + 2 * C * C * N + C ** 3 * out_conv}


def _cheapest(counts):
    "The key of the smallest value. By a loop: torch.compile has no min() with a key for sizes that it keeps open."
    best = 'source'
    for order in counts:
        if counts[order] < counts[best]: best = order
    return best


class SimpleSelfAttention(_Attention):
    """y = x + gamma * (x x^T)(W x) on x seen as (C, N): attention without softmax, query, key or value.

    `W` is a spectrally normalised convolution of width `ks` (odd) over the flattened positions, as in the source.
    sym       W is made symmetric before it is normalised (the source's option of that name has no effect).
    out_conv  y = x + gamma * U (x x^T)(W x): SAGAN's last 1x1 convolution, which the source left out.
    order     how the product is evaluated, see `multiply_adds`; 'auto': the cheapest for the input at hand.

    In float16 the large products are float16 and the small matrices between them float32; y and the factor of x
    saturate. Finite while the root mean square of a channel (of a position, where N < C) is at most 255.
    """
    def __init__(self, n_channels, ks=1, sym=False, out_conv=False, order='auto'):
        super().__init__(n_channels)
        if ks % 2 == 0: raise ValueError(f'ks must be odd, got {ks}')
        orders = ['auto', *multiply_adds(n_channels, 1, ks)]
        if order not in orders: raise ValueError(f'order must be one of {", ".join(orders)} for ks={ks}, got {order!r}')
        self.ks, self.order = ks, order
        self.weight = SpectralWeight(n_channels, n_channels, ks, sym)
        self.out = SpectralWeight(n_channels, n_channels) if out_conv else None

    def attend(self, x, dtype):
        x_, w = x.to(dtype), self.weight().to(_wide(dtype))
        u = self.out().to(_wide(dtype)) if self.out is not None else None
        C, N = x.shape[1:]
        order = self.order
        if order == 'auto': order = _cheapest(multiply_adds(C, N, self.ks, u is not None))

        if order == 'positions':
            scores = _Scores.apply(x_, self._conv(x_, w))  # (B, N, C) (B, C, N) -> (B, N, N)
            values = x_ if u is None else self._conv(x_, u)
            return _add_product(x, values, _fit(self.gamma * scores, dtype))
        if order == 'channels': return _ChannelMix.apply(x, u, (self.gamma * w).to(w.dtype), dtype)
        mix = _Gram.apply(x_)  # (B, C, C)
        if u is not None: mix = u @ mix
        return _add_product(x, _fit(self.gamma * mix, dtype), self._conv(x_, w))

    def _conv(self, x, w):
        "(B, C, N) -> (B, C, N), `w` (C, C*ks) along the positions."
        w = w.to(x.dtype)
        if w.shape[1] == x.shape[1]: return _product_like(x, w.expand(len(x), -1, -1), x)
        return F.conv1d(x, w.unflatten(1, (x.shape[1], -1)), padding=self.ks // 2)

    def extra_repr(self): return f'{self.n_channels}, ks={self.ks}, order={self.order!r}'


class _BlockedSoftmax(torch.autograd.Function):
    """softmax(q k) v for q (B, N, D), k (B, D, N), v (B, N, C), a block of rows of q at a time, forward as backward.

    For CPUs: their fused kernel wants D = C, which doubles the products where D is C/8.
    """
    BLOCK = 2**20  # scores at once: they stay in the cache

    @staticmethod
    def blocks(q, k):
        "(image, rows) of each block."
        rows = max(1, _BlockedSoftmax.BLOCK // k.shape[2])
        return [(b, slice(i, i + rows)) for b in range(len(q)) for i in range(0, q.shape[1], rows)]

    @staticmethod
    def forward(ctx, q, k, v):
        q, k, v = (t.contiguous() for t in (q, k, v))  # slices of one product: half as fast again without their gaps
        o = q.new_empty(*q.shape[:2], v.shape[2])
        for b, rows in _BlockedSoftmax.blocks(q, k): o[b, rows] = torch.softmax(q[b, rows] @ k[b], 1) @ v[b]
        ctx.save_for_backward(q, k, v, o)
        return o

    @staticmethod
    def backward(ctx, g):
        q, k, v, o = ctx.saved_tensors
        g_q, g_k, g_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        shift = (g * o).sum(2, keepdim=True)  # (B, N, 1): of the gradient through the softmax's denominator
        for b, rows in _BlockedSoftmax.blocks(q, k):
            p = torch.softmax(q[b, rows] @ k[b], 1)
            g_v[b].addmm_(p.mT, g[b, rows])
            p *= torch.addmm(shift[b, rows], g[b, rows], v[b].mT, beta=-1)
            g_q[b, rows] = p @ k[b].mT
            g_k[b].addmm_(q[b, rows].mT, p)
        return g_q, g_k, g_v


class SelfAttention(_Attention):
    """SAGAN's layer as in fastai: o_j = sum_i softmax_i(f(x_i) . g(x_j)) h(x_i), y = x + gamma * o.

    f and g (C -> C/8) and h (C -> C) are spectrally normalised 1x1 convolutions; no scaling of the scores.
    Through `scaled_dot_product_attention`: memory O(N) an image where a fused kernel exists, never N x N.
    Its kernels want one head size for f, g and h, at most 256: f and g are padded with zeros to that of h,
    and h is split into heads that share f and g. In float32 on a CPU, where that padding costs more than the
    kernel saves, through `_BlockedSoftmax`.
    """
    def __init__(self, n_channels):
        super().__init__(n_channels)
        n_inner = max(1, n_channels // 8)
        self.query, self.key = SpectralWeight(n_inner, n_channels), SpectralWeight(n_inner, n_channels)
        self.value = SpectralWeight(n_channels, n_channels)

    def attend(self, x, dtype):
        weights = [self.query(), self.key(), self.value()]
        fgh = F.linear(x.mT.to(dtype), torch.cat(weights).to(dtype))  # (B, C, N) -> (B, N, C/8 + C/8 + C)
        f, g, h = fgh.split([len(w) for w in weights], dim=2)
        blocked = x.device.type == 'cpu' and dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()
        o = _BlockedSoftmax.apply(g, f.mT, h) if blocked else self._fused(f, g, h)  # SAGAN's "query" f is what is attended to
        return x + self.gamma * o.mT  # (B, N, C) -> (B, C, N)

    def _fused(self, f, g, h):
        n_heads = -(-self.n_channels // 256)
        while self.n_channels % n_heads: n_heads += 1
        h = h.unflatten(2, (n_heads, -1)).transpose(1, 2)  # (B, N, C) -> (B, heads, N, C/heads)
        f, g = (F.pad(t, (0, h.shape[3] - t.shape[2])).unsqueeze(1).expand_as(h) for t in (f, g))
        return F.scaled_dot_product_attention(g, f, h, scale=1.).transpose(1, 2).flatten(2)  # (B, heads, N, C/heads) -> (B, N, C)


# name: n_channels -> layer. One class and one line here add a variant to the command, the tests and the tables.
ATTENTION = {
    'none': nn.Identity,
    'simple': SimpleSelfAttention,
    'simple_sym': partial(SimpleSelfAttention, sym=True),
    'simple_out': partial(SimpleSelfAttention, out_conv=True),
    'sagan': SelfAttention,
}
