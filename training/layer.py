"""Finds the attention layer of a run, tries one that is not ours before training, and counts what it costs.

A layer is any callable n_channels -> torch.nn.Module that keeps the shape of features (B, C, H, W).
"""
import importlib.util
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn as nn

import layer_source
from command import UsageError, nearest, say_once
from layers import ATTENTION
from training import distributed
from training.arch import width
from training.machine import autocast


def get_layer(cfg):
    "Returns the layer of `cfg`, n_channels -> module; raises UsageError where one that is not ours cannot be imported."
    if not layer_source.is_outside(cfg.attention): return ATTENTION[cfg.attention]
    return outside_layer(cfg.attention, cfg.attention_file, cfg.attention_source)


# --- a layer from outside ---

hash_at_import = {}  # {name of a module: the hash of its source when it was imported}


def outside_layer(attention, file, source):
    "Returns what `attention` names, from its file as it was when `source` was its hash."
    place, name = layer_source.parse(attention)
    what, path = f'--sa {attention}', Path(file)
    if not path.is_file(): raise UsageError(f'{what}: {file} is gone')
    if layer_source.digest(attention, file) != source: raise UsageError(f'{what}: {file} has changed; start anew')
    if layer_source.is_file(place): module = import_file(attention, path, source)
    else: module = import_module(attention, file, source)
    layer = getattr(module, name, None)
    if layer is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith('_')]
        raise UsageError(f'{what}: {file} has no {name}{nearest(name, names)}')
    if isinstance(layer, nn.Module):
        raise UsageError(f'{what}: is a module already; name its class, or a function of n_channels')
    if not callable(layer):
        raise UsageError(f'{what}: is of type {type(layer).__name__}, not a class or a function of n_channels')
    return layer


def import_file(attention, file, source):
    "Returns the module of a file, imported once for each of its sources. It can import what is beside it."
    name = f'{file.stem}_{source}'
    if name in sys.modules: return sys.modules[name]
    beside = {file.parent / path for path in layer_source.sources(attention, file)}
    loaded = {other: Path(getattr(module, '__file__', None) or '') for other, module in sys.modules.items()}
    tops = {path.relative_to(file.parent).parts[0].removesuffix('.py') for path in beside - {file}}
    for top in tops & loaded.keys():
        if loaded[top] in beside: continue
        raise UsageError(f'--sa {attention}: imports {top} beside it, but that is the name of {loaded[top]}; rename it')
    others = {other: sys.modules.pop(other) for other, path in loaded.items() if path in beside}
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        with clear_errors(f'--sa {attention}: {file} cannot be imported'): spec.loader.exec_module(module)
    except UsageError:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(file.parent))
        for other, module_ in list(sys.modules.items()):  # another version of the file imports these again
            if other != name and Path(getattr(module_, '__file__', None) or '') in beside: del sys.modules[other]
        sys.modules.update(others)
    return module


def import_module(attention, file, source):
    "Returns an installed module, or one where it was found."
    place = layer_source.parse(attention)[0]
    if hash_at_import.setdefault(place, source) != source:
        raise UsageError(f'--sa {attention}: {place} has changed since it was imported; start Python anew')
    path = [] if importlib.util.find_spec(place.partition('.')[0]) else [str(layer_source.root_of(attention, file))]
    sys.path.extend(path)
    try:
        with clear_errors(f'--sa {attention}: {place} cannot be imported'): return importlib.import_module(place)
    finally:
        for folder in path: sys.path.remove(folder)


@contextmanager
def clear_errors(what):
    "Turns an exception of the block into a UsageError of one line: `what`, and the exception's first line."
    try: yield
    except UsageError: raise
    except (Exception, SystemExit) as e:
        first = next(iter(str(e).splitlines()), '')
        raise UsageError(f'{what}: {type(e).__name__}{": " if first else ""}{first}') from None


# --- the check before training ---

def check(cfg, device):
    """Raises UsageError unless a layer that is not ours works on the shapes it will meet.

    It is tried as it will run: with its precision, memory format and device, in training and in validation, on random
    numbers and on zeros, which it meets at the first step, as the weights of the batch norm before it start at 0.
    Says if it is not the identity at the start, each change once.
    """
    if not layer_source.is_outside(cfg.attention): return
    change = tried(*conditions(cfg, device))
    if change:
        say_once(f'{cfg.attention}: not the identity at the start: it changes its input by {change:.1%}', sys.stderr)


def conditions(cfg, device):
    "Returns what a layer of a settled `cfg` is and how it will run: the arguments of `tried` and `counted`."
    layer = cfg.attention, cfg.attention_file, cfg.attention_source
    return *layer, shapes(cfg), device, cfg.precision, bool(cfg.channels_last)


@cache
def tried(attention, file, source, shapes, device, precision, channels_last):
    "Returns by how much the layer changes its input at first: the change's root mean square over the input's."
    make, change = outside_layer(attention, file, source), 0.
    for C, H, W in sorted(set(shapes)):
        with a_seed(device):
            what = f'--sa {attention}: {layer_source.parse(attention)[1]}({C})'
            with clear_errors(f'{what} fails'): module = make(C)
            if not isinstance(module, nn.Module):
                raise UsageError(f'{what} is of type {type(module).__name__}, not a torch.nn.Module')
            with clear_errors(f'{what} fails on {device}'):
                module, x = ready(channels_last, device, module, torch.randn(2, C, H, W))
            y = attempt(f'{what}, random numbers', module.train(), x, precision)
            attempt(f'{what}, all zeros as at the first step', module, torch.zeros_like(x), precision)
            attempt(f'{what}, one image in validation', module.eval(), x[:1], precision)
        change = max(change, ((y - x).square().mean().sqrt() / x.square().mean().sqrt()).item())
    return change if change > (1e-5 if precision == 'fp32' else 1e-2) else 0.


@contextmanager
def a_seed(device):
    "Has the random numbers of a seed for the block, and those of before after it."
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        torch.manual_seed(0)
        yield


def ready(channels_last, device, *things):
    "Returns modules and tensors on a device in a memory format."
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return [thing.to(device, memory_format=memory_format) for thing in things]


def attempt(what, module, x, precision):
    """Returns the output of a module for x (B, C, H, W), computed as in a run.

    Raises UsageError where it or, in training, its gradient cannot be used.
    """
    x, shape = x.detach().requires_grad_(), tuple(x.shape)
    grad, cast = torch.set_grad_enabled(module.training), autocast(precision, x.device)
    with clear_errors(f'{what}: fails on a batch {shape}'), grad, cast:
        y = module(x * 1)  # in the network it may change its input in place
    if not isinstance(y, torch.Tensor): raise UsageError(f'{what}: gives a {type(y).__name__}, not a tensor')
    if tuple(y.shape) != shape: raise UsageError(f'{what}: gives {tuple(y.shape)} for {shape}; it must keep the shape')
    if not y.is_floating_point(): raise UsageError(f'{what}: gives {y.dtype}, not floating point numbers')
    if not y.isfinite().all(): raise UsageError(f'{what}: its output is not finite')
    if module.training: try_gradient(what, module, x, y)
    return y.detach().float()


def try_gradient(what, module, x, y):
    "Raises UsageError unless the gradients of x and of the parameters can be computed from y, and are finite."
    with clear_errors(f'{what}: its gradient fails'): (y.float() * torch.randn_like(x)).sum().backward()
    gradients = [x.grad, *(p.grad for p in module.parameters())]
    if not all(g is None or g.isfinite().all() for g in gradients):
        raise UsageError(f'{what}: its gradient is not finite')
    if distributed.n_processes() > 1 and any(g is None for g in gradients):
        raise UsageError(f'{what}: some of its parameters get no gradient, so several processes cannot train it')
    module.zero_grad()


# --- what it costs ---

def shapes(cfg):
    "Returns ((C, H, W), ...) of the features that the layers of `cfg` meet, one for each of its places."
    # stem, pool and each stage but the first halve the side, rounded up
    sides = [-(-cfg.size // 2 ** (stage + 1)) for stage, _ in cfg.places]
    return tuple((width(cfg.arch, stage), side, side) for (stage, _), side in zip(cfg.places, sides))


def cost(cfg, device):
    """Returns the columns attention_parameters and attention_multiply_adds of a settled `cfg`: of all its layers.

    Multiply-adds are those of the products and convolutions of one image in a forward pass. Our layers know theirs;
    those of others are counted while they run.
    """
    if cfg.attention == 'none': parameters, multiply_adds = 0, 0
    elif layer_source.is_outside(cfg.attention): parameters, multiply_adds = counted(*conditions(cfg, device))
    else:
        with a_seed(device): layers = [(ATTENTION[cfg.attention](C), H * W) for C, H, W in shapes(cfg)]
        parameters = sum(n_parameters(layer) for layer, _ in layers)
        multiply_adds = sum(layer.multiply_adds(N) for layer, N in layers)
    return dict(attention_parameters=parameters, attention_multiply_adds=multiply_adds)


def n_parameters(module): return sum(p.numel() for p in module.parameters())


@cache
def counted(attention, file, source, shapes, device, precision, channels_last):
    "Returns (parameters, multiply-adds of one image in a forward pass) of the layers for features of these shapes."
    from torch.utils.flop_counter import FlopCounterMode  # takes two seconds
    make, parameters, multiply_adds = outside_layer(attention, file, source), 0, 0
    for C, H, W in shapes:
        with a_seed(device):
            module, x = ready(channels_last, device, make(C).eval(), torch.zeros(1, C, H, W))
            with FlopCounterMode(display=False) as flops: attempt(f'--sa {attention}', module, x, precision)
        parameters += n_parameters(module)
        multiply_adds += flops.get_total_flops() // 2
    return parameters, multiply_adds
