"""What depends on the machine is tested.

GPUs are there but cannot be used, or are too few; the hardware and torch offer this or that.
"""
import stat

import pytest
import torch
import torch._inductor.config

import training.distributed
import training.machine
from command import UsageError
from experiments import Config
from training import machine

CUDA, CPU = torch.device('cuda', 0), torch.device('cpu')


@pytest.fixture
def gpus(monkeypatch):
    "Makes torch see that many GPUs, of that compute capability, and the environment that of one of `processes`."
    def see(n, capability=(9, 0), rank=0, processes=1):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: n)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: n > 0)
        monkeypatch.setattr(torch.cuda, 'init', lambda: None)
        monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
        for key, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes).items():
            monkeypatch.setenv(key, str(value)) if processes > 1 else monkeypatch.delenv(key, raising=False)
    return see


def test_the_first_gpu_or_the_cpu(gpus):
    gpus(2)
    assert machine.get_device() == CUDA and machine.get_device(1) == torch.device('cuda', 1)
    gpus(0)
    assert machine.get_device() == CPU


def test_a_gpu_that_the_driver_cannot_serve_is_one_line(gpus, monkeypatch, command):
    def too_old():
        raise RuntimeError('The NVIDIA driver on your system is too old (found version 12040). '
                           'Please update\nyour GPU driver')
    gpus(1)
    monkeypatch.setattr(torch.cuda, 'init', too_old)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    code, out, err = command('--dataset', 'digits', '--size', 32)
    assert (code, out, err.count('\n')) == (2, '', 1)
    for word in ('found version 12040', f'torch {torch.__version__} is built for CUDA 13.0', 'CUDA_VISIBLE_DEVICES='):
        assert word in err


@pytest.mark.parametrize('rank', [0, 1, 2])
def test_more_processes_than_gpus_are_refused_in_each_of_them(rank, gpus):
    "One that found no GPU would train on the CPU by gloo, and the others would wait for it for ever."
    gpus(2, rank=rank, processes=3)
    with pytest.raises(UsageError, match='3 processes and 2 GPUs on this machine'): machine.get_device()


@pytest.mark.parametrize('n, rank, device', [(2, 0, 'cuda:0'), (2, 1, 'cuda:1'), (4, 1, 'cuda:1'), (0, 1, 'cpu')])
def test_each_process_has_the_gpu_of_its_number(n, rank, device, gpus):
    gpus(n, rank=rank, processes=2)
    assert machine.get_device() == torch.device(device)


def test_processes_wait_for_hours_while_the_first_one_downloads(gpus, monkeypatch):
    accelerate = pytest.importorskip('accelerate')
    asked = {}
    monkeypatch.setattr(accelerate, 'PartialState', lambda **kwargs: asked.update(kwargs))
    monkeypatch.setattr(training.distributed.atexit, 'register', lambda *args: None)
    gpus(2, processes=2)
    training.distributed.join(CUDA)
    assert asked['timeout'].total_seconds() >= 3600 and not asked['cpu']


@pytest.mark.parametrize('capability, allowed', [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_is_for_gpus_that_have_it(capability, allowed, gpus):
    gpus(1, capability)
    cfg = Config(precision='bf16')
    if allowed: assert machine.settle(cfg, CUDA).precision == 'bf16'
    else:
        with pytest.raises(UsageError, match='not in the hardware of this GPU; take fp16'): machine.settle(cfg, CUDA)
    assert machine.settle(Config(), CUDA).precision == 'fp16'


def test_float32_is_float32_on_a_gpu_too():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True  # the first is torch's default
    machine.prepare_device(Config(), CPU)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_long_sums_of_float16_are_held_in_float32():
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True  # torch's default
    machine.prepare_device(Config(), CPU)
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


@pytest.mark.parametrize('kind', ['none', 'without headers'])
def test_compile_without_a_compiler_is_one_line(kind, tree, command, tmp_path, monkeypatch):
    compiler = tmp_path / 'g++'
    if kind != 'none':
        compiler.write_text('#!/bin/sh\ncase "$*" in *--version*) echo g++ 12.0; exit;; esac\n'
                            'echo Python.h: No such file or directory >&2\nexit 1\n')
        compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    torch._dynamo.reset()
    machine.check_compiler.cache_clear()
    with torch._inductor.config.patch({'cpp.cxx': (str(compiler),)}):
        code, _, err = command('--data', tree, '--size', 32, '--bs', 6, '--arch', 'xresnet18', '--workers', 0,
                               '--compile')
    lines = [line for line in err.splitlines() if line.startswith('train_imagenette.py')]
    assert code == 2 and len(lines) == 1 and 'Traceback' not in err, err
    assert '--compile: does not work here' in lines[0] and 'python3-dev' in lines[0]
    assert not (tmp_path / 'results' / 'runs.csv').exists()
