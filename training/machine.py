"""The machine a run is on: its device, what `auto` means there, and its name in the record."""
import os
from dataclasses import replace
from pathlib import Path

import torch

from command import UsageError, say_once
from experiments import resolve
from training import distributed


def get_device(gpu=None):
    "The CUDA device number `gpu`; without a number the first one there is, or the CPU."
    n = torch.cuda.device_count()
    if distributed.n_processes() > 1:
        if gpu is not None: raise UsageError(f'--gpu {gpu}: of several processes each has the device of its number')
        gpu = distributed.local_device()
        if gpu is not None: torch.cuda.set_device(gpu)
        return torch.device('cpu') if gpu is None else torch.device('cuda', gpu)
    if gpu is None: return torch.device('cuda', 0) if n else torch.device('cpu')
    if not n: raise UsageError(f'--gpu {gpu}: no CUDA device here; leave --gpu out to run on the CPU')
    if gpu not in range(n): raise UsageError(f'--gpu {gpu}: the CUDA devices are 0 to {n - 1}')
    return torch.device('cuda', gpu)


def settle(cfg, device):
    "`cfg` as it will run on `device`: every 'auto' written out."
    cfg = resolve(cfg)
    precision = cfg.precision if cfg.precision != 'auto' else 'fp16' if device.type == 'cuda' else 'fp32'
    if device.type == 'cpu':
        if precision == 'fp16': raise UsageError('--precision fp16: needs a CUDA device; on a CPU take fp32 or bf16')
        if precision == 'bf16' and not has_bf16(): raise UsageError('--precision bf16: not in the hardware of this CPU; take fp32')
    wanted = os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')  # of accelerate launch --mixed_precision
    if wanted not in ('no', precision): say_once(f'accelerate asks for {wanted}, which is not heeded: --precision {wanted} does so; '
                                                 f'this run is in {precision}')
    n = distributed.n_processes()
    if cfg.processes not in (1, n): raise UsageError(f'--processes {cfg.processes}: started as {n}; accelerate launch or torchrun set it')
    if cfg.compile and n > 1: raise UsageError('--compile: in one process only')
    if cfg.cuda_graphs and n > 1: raise UsageError('--cuda-graphs: in one process only')
    if cfg.cuda_graphs and cfg.compile: raise UsageError('--cuda-graphs: --compile has its own; give one of the two')
    if cfg.cuda_graphs and device.type != 'cuda': raise UsageError('--cuda-graphs: needs a CUDA device')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    workers = cfg.workers if cfg.workers >= 0 else min(8, max(1, cores // here))
    return replace(cfg, precision=precision, workers=workers, processes=n)


def has_bf16(cpuinfo=Path('/proc/cpuinfo')):
    "Whether the CPU multiplies bfloat16 in hardware (emulated is slower than float32); assumed where Linux does not tell."
    if not cpuinfo.exists(): return True
    flags = next((line.split() for line in cpuinfo.read_text().splitlines() if line.startswith(('flags', 'Features'))), [])
    return not {'avx512_bf16', 'amx_bf16', 'bf16'}.isdisjoint(flags)


def device_name(device):
    "The CUDA device's name, or the CPU's with its vector instructions and the number of threads."
    if device.type == 'cuda': return torch.cuda.get_device_name(device)
    cpu, info = 'CPU', Path('/proc/cpuinfo')
    if info.exists(): cpu = next((s.split(':')[1].strip() for s in info.read_text().splitlines() if s.startswith('model name')), cpu)
    return f'{cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'
