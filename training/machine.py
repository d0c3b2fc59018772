"""The machine that a run is on: its device, what `auto` means there, and its name in the record."""
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from command import UsageError, say_once
from experiments import resolve
from training import distributed


def get_device(gpu=None):
    """Returns the CUDA device number `gpu`; without a number the first one there is, or the CPU.

    Of several processes each has the device of its own number. Raises UsageError if there is no such device.
    """
    n = n_gpus()
    if distributed.n_processes() > 1:
        if gpu is not None: raise UsageError(f'--gpu {gpu}: of several processes each has the device of its number')
        gpu = distributed.local_device(n)
        if gpu is not None: torch.cuda.set_device(gpu)
        return torch.device('cpu') if gpu is None else torch.device('cuda', gpu)
    if gpu is None: return torch.device('cuda', 0) if n else torch.device('cpu')
    if not n: raise UsageError(f'--gpu {gpu}: no CUDA device here; leave --gpu out to run on the CPU')
    if gpu not in range(n): raise UsageError(f'--gpu {gpu}: the CUDA devices are 0 to {n - 1}')
    return torch.device('cuda', gpu)


def n_gpus():
    "Returns the number of CUDA devices; raises UsageError where the driver cannot serve those that torch counts."
    n = torch.cuda.device_count()
    if n:
        try: torch.cuda.init()
        except (RuntimeError, AssertionError) as e:
            build = f'torch {torch.__version__} is built for CUDA {torch.version.cuda}'
            hint = 'install a build that fits the driver, or set CUDA_VISIBLE_DEVICES= to train on the CPU'
            raise UsageError(f'the GPU cannot be used ({brief(e)}); {build}: {hint}') from None
    return n


def brief(e):
    "Returns the first sentence of the message of an exception."
    return ' '.join(str(e).split()).split('. ')[0][:200] or type(e).__name__


def settle(cfg, device):
    "Returns `cfg` as it will run on `device`, with every 'auto' written out; raises UsageError where it cannot."
    cfg = resolve(cfg)
    precision = cfg.precision
    if precision == 'auto': precision = 'fp16' if device.type == 'cuda' else 'fp32'
    if device.type == 'cpu':
        if precision == 'fp16': raise UsageError('--precision fp16: needs a CUDA device; on a CPU take fp32 or bf16')
        if precision == 'bf16' and not has_bf16():
            raise UsageError('--precision bf16: not in the hardware of this CPU; take fp32')
    elif precision == 'bf16' and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        raise UsageError('--precision bf16: not in the hardware of this GPU; take fp16')
    wanted = os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')  # by accelerate launch --mixed_precision
    if wanted not in ('no', precision):
        say_once(f'accelerate asks for {wanted}, which has no effect here: this run is in {precision}; '
                 f'--precision {wanted} changes that')
    n = distributed.n_processes()
    if cfg.processes not in (1, n):
        raise UsageError(f'--processes {cfg.processes}: started as {n}; accelerate launch or torchrun set it')
    if cfg.compile and n > 1: raise UsageError('--compile: in one process only')
    if cfg.cuda_graphs and n > 1: raise UsageError('--cuda-graphs: in one process only')
    if cfg.cuda_graphs and cfg.compile: raise UsageError('--cuda-graphs: --compile has its own; give one of the two')
    if cfg.cuda_graphs and device.type != 'cuda': raise UsageError('--cuda-graphs: needs a CUDA device')
    workers = cfg.workers if cfg.workers >= 0 else default_workers()
    return replace(cfg, precision=precision, workers=workers, processes=n)


def default_workers():
    "Returns the number of loader processes that --workers -1 means: one per core that this process has, at most 8."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    n_processes_here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return min(8, max(1, cores // n_processes_here))


def prepare_device(cfg, device):
    "Sets what torch keeps for the whole process; raises UsageError where torch.compile is asked for and does not work."
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # So --precision fp32 is float32.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # layers.py tells why.
    if cfg.compile: check_compiler(device.type)


@lru_cache
def check_compiler(device):
    "Raises UsageError unless torch.compile works on a `device`: it needs a compiler and Python's header files."
    try: torch.compile(lambda x: 2 * x + 1)(torch.ones(64, device=device))
    except Exception as e:  # It may be torch's, a compiler's, or that of a cache folder that cannot be written.
        needs = "it needs a C++ compiler (g++) and Python's header files (python3-dev); leave it out"
        raise UsageError(f'--compile: does not work here ({brief(e)}); {needs}') from None


def has_bf16(cpuinfo=Path('/proc/cpuinfo')):
    """Returns whether the CPU multiplies bfloat16 in hardware, since emulated it is slower than float32.

    It assumes so where there is no file of Linux that says it.
    """
    if not cpuinfo.exists(): return True
    return not {'avx512_bf16', 'amx_bf16', 'bf16'}.isdisjoint(first_value(cpuinfo, 'flags', 'Features').split())


def first_value(cpuinfo, *keys):
    "Returns the value of the first line 'key : value' with one of the `keys`, or ''."
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(':')
        if key.strip() in keys: return value.strip()
    return ''


def device_name(device):
    "Returns the name of the CUDA device, or that of the CPU with its vector instructions and the number of threads."
    if device.type == 'cuda': return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    cpu = first_value(cpuinfo, 'model name') if cpuinfo.exists() else ''
    return f'{cpu or "CPU"}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'
