"""Knows the machine that a run is on: its device, what `auto` means there, and its name in the record."""
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import torch._functorch.config as functorch

from command import UsageError, lack_of_memory, say_once
from experiments import resolve
from training import distributed, host

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16}  # of autocast


def autocast(precision, device):
    "Returns the autocast of a settled precision, which does nothing in fp32."
    return torch.autocast(device.type, DTYPES.get(precision, torch.bfloat16), enabled=precision != 'fp32')


def get_device(gpu=None):
    """Returns the GPU number `gpu`, of CUDA or Apple's; without a number the first one there is, or the CPU.

    Where several processes train together, each has the CUDA device of its own number. Raises UsageError if there is
    no such device.
    """
    n = n_gpus()
    if distributed.n_processes() > 1:
        if gpu is not None: raise UsageError(f'--gpu {gpu}: each process has the device of its number; leave it out')
        gpu = distributed.local_device(n)
        if gpu is None:
            if torch.backends.mps.is_available():
                say_once('several processes train on the CPU: the GPU of a Mac is for one process')
            return torch.device('cpu')
        torch.cuda.set_device(gpu)
        return torch.device('cuda', gpu)
    if not n and torch.backends.mps.is_available():
        if gpu: raise UsageError(f'--gpu {gpu}: the one GPU of a Mac is 0')
        return torch.device('mps', 0)
    if gpu is None: return torch.device('cuda', 0) if n else torch.device('cpu')
    if not n: raise UsageError(f'--gpu {gpu}: no CUDA device here; leave --gpu out to run on the CPU')
    if gpu not in range(n): raise UsageError(f'--gpu {gpu}: the CUDA devices are 0 to {n - 1}')
    return torch.device('cuda', gpu)


def is_usable(device):
    "Returns whether this process can still compute on `device`: after some faults of CUDA it cannot."
    try: torch.zeros(1, device=device).item()
    except RuntimeError as e: return bool(lack_of_memory(e))
    return True


def n_gpus():
    "Returns the number of CUDA devices; raises UsageError where the driver cannot serve those that torch counts."
    n = torch.cuda.device_count()
    if n:
        try: torch.cuda.init()
        except (RuntimeError, AssertionError) as e:
            if lack_of_memory(e): raise
            build = f'torch {torch.__version__} is built for CUDA {torch.version.cuda}'
            hint = 'install a build that fits the driver, or set CUDA_VISIBLE_DEVICES= to train on the CPU'
            raise UsageError(f'the GPU cannot be used ({brief(e)}); {build}: {hint}') from None
    return n


def brief(e):
    "Returns the first sentence of the message of an exception."
    return ' '.join(str(e).split()).split('. ')[0][:200] or type(e).__name__


def settle(cfg, device):
    """Returns `cfg` as it will run on `device`; raises UsageError where it cannot.

    It is resolved, and the precision, the processes and the workers are written out. The loader is chosen in `get_dls`,
    which knows the images.
    """
    cfg = resolve(cfg)
    precision = cfg.precision if cfg.precision != 'auto' else best_precision(device)
    check_precision(precision, device)
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
    # On Apple's GPU the gradient of a batch norm is wrong in channels last: github.com/pytorch/pytorch/issues/175189
    channels_last = 0 if device.type == 'mps' else cfg.channels_last
    return replace(cfg, precision=precision, workers=workers, processes=n, channels_last=channels_last)


def best_precision(device):
    "Returns what --precision auto means on a device."
    if device.type == 'mps': return 'fp16' if autocast_works(device, 'fp16') else 'fp32'
    return 'fp16' if device.type == 'cuda' else 'fp32'


def check_precision(precision, device):
    "Raises UsageError where a device does not train in a precision."
    if device.type == 'cpu':
        if precision == 'fp16': raise UsageError('--precision fp16: needs a GPU; on a CPU take fp32 or bf16')
        if precision == 'bf16' and not has_bf16():
            raise UsageError('--precision bf16: not in the hardware of this CPU; take fp32')
    elif device.type == 'mps':
        if precision != 'fp32' and not autocast_works(device, precision):
            raise UsageError(f'--precision {precision}: does not work on this Mac with this torch; take fp32')
    elif precision == 'bf16' and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        raise UsageError('--precision bf16: not in the hardware of this GPU; take fp16')


@lru_cache
def autocast_works(device, precision):
    "Returns whether a step of training works on a device in this precision: on a Mac only a trial shows it."
    dtype = DTYPES[precision]
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter('ignore')  # torch warns where it leaves autocast out
            layer = torch.nn.Conv2d(3, 8, 3).to(device)
            scaler, optimizer = torch.amp.GradScaler(device.type), torch.optim.AdamW(layer.parameters(), fused=True)
            with torch.autocast(device.type, dtype): y = layer(torch.ones(2, 3, 8, 8, device=device))
            scaler.scale(y.float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        return y.dtype == dtype and all(bool(p.isfinite().all()) for p in layer.parameters())
    except Exception: return False  # what torch lacks on a device it says by errors of many types


def default_workers():
    "Returns the number of loader processes that --workers -1 means: one per core that this process has, at most 8."
    n_processes_here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return min(8, max(1, host.n_cores() // n_processes_here))


def prepare_device(cfg, device):
    "Sets what torch keeps for the whole process; raises UsageError where torch.compile is asked for and does not work."
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # So --precision fp32 is float32.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # layers.py says why.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    functorch.backward_pass_autocast = 'off'  # Compiled, too, only the forward pass is under autocast.
    if device.type == 'cuda': torch.cuda.set_device(device)  # CUDA graphs are recorded on the current one.
    limit_threads()
    if cfg.compile: check_compiler(device.type)


def limit_threads():
    """Gives torch as many threads as a container has cores, unless OMP_NUM_THREADS says how many.

    By itself torch has a thread for each core that it sees, and those beyond the container's share only wait.
    """
    n, seen = host.n_cores(), host.visible_cores()
    if n >= seen or n >= torch.get_num_threads() or os.environ.get('OMP_NUM_THREADS'): return
    torch.set_num_threads(n)
    say_once(f'this container has the time of {host.core_limit():g} of {seen} cores, so torch has {n} threads here; '
             f'OMP_NUM_THREADS sets another number')


def wait_for(device):
    "Waits until a GPU has done what it was given."
    if device.type == 'cuda': torch.cuda.synchronize(device)
    elif device.type == 'mps': torch.mps.synchronize()


@lru_cache
def check_compiler(device):
    "Raises UsageError unless torch.compile works on a `device`: it needs a compiler and Python's header files."
    try: torch.compile(lambda x: 2 * x + 1)(torch.ones(64, device=device))
    except Exception as e:  # It may be torch's, a compiler's, or that of a cache folder that cannot be written.
        if lack_of_memory(e): raise
        needs = "it needs a C++ compiler (g++) and Python's header files (python3-dev); leave it out"
        raise UsageError(f'--compile: does not work here ({brief(e)}); {needs}') from None


def has_bf16(cpuinfo=Path('/proc/cpuinfo')):
    """Returns whether the CPU multiplies bfloat16 in hardware; elsewhere it is emulated in float32.

    Linux says it in a file, macOS by a command. Elsewhere it is not known, and not assumed.
    """
    if not cpuinfo.exists(): return sysctl('hw.optional.arm.FEAT_BF16') == '1'
    return not {'avx512_bf16', 'amx_bf16', 'bf16'}.isdisjoint(first_value(cpuinfo, 'flags', 'Features').split())


def sysctl(name):
    "Returns what macOS says of the computer under a name, or ''."
    if sys.platform != 'darwin': return ''
    try: return subprocess.run(['sysctl', '-n', name], capture_output=True, text=True, encoding='utf-8').stdout.strip()
    except OSError: return ''


def first_value(cpuinfo, *keys):
    "Returns the value of the first line 'key : value' with one of the `keys`, or ''."
    for line in cpuinfo.read_text(encoding='utf-8', errors='replace').splitlines():
        key, _, value = line.partition(':')
        if key.strip() in keys: return value.strip()
    return ''


def device_name(device):
    "Returns the name of the GPU, or that of the CPU with its vector instructions and the number of threads."
    if device.type == 'cuda': return torch.cuda.get_device_name(device)
    if device.type == 'mps': return f'{sysctl("machdep.cpu.brand_string") or "Apple"}, mps'
    cpuinfo = Path('/proc/cpuinfo')
    cpu = first_value(cpuinfo, 'model name') if cpuinfo.exists() else sysctl('machdep.cpu.brand_string')
    name = cpu or os.environ.get('PROCESSOR_IDENTIFIER', 'CPU')  # of Windows
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'
