"""What depends on the machine is tested.

GPUs are there but cannot be used, or are too few; the hardware and torch offer this or that.
"""
import errno
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
from conftest import config
from torch._functorch import config as functorch_config

import training.distributed
import training.machine
from command import UsageError, exit_code, lack_of_memory, restored, say_once
from experiments import Config
from training import check, checkpoint, cluster, data, host, images, jobs, learner, machine, measure, timing
from training.files import find_images
from training.loop import Loop
from training.readers import ImageFiles

CUDA, CPU, MPS = torch.device('cuda', 0), torch.device('cpu'), torch.device('mps', 0)


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


def test_processes_wait_for_hours_while_the_first_one_downloads_and_else_for_minutes(gpus, monkeypatch):
    accelerate = pytest.importorskip('accelerate')
    asked = {}
    monkeypatch.setattr(accelerate, 'PartialState', lambda **kwargs: asked.update(kwargs))
    monkeypatch.setattr(training.distributed.atexit, 'register', lambda *args: None)
    gpus(2, processes=2)
    training.distributed.join(CUDA)
    assert 600 <= asked['timeout'].total_seconds() <= 3600 and not asked['cpu']
    monkeypatch.setattr(training.distributed.dist, 'new_group', lambda **kwargs: kwargs)
    group = training.distributed.patient.__wrapped__()
    assert group['timeout'].total_seconds() >= 2 * 3600 and group['backend'] == 'gloo'


@pytest.mark.parametrize('error, usable', [('an illegal memory access was encountered', False),
                                           ('CUDA out of memory. Tried to allocate 2 MiB', True)])
def test_a_device_is_asked_whether_it_still_works(error, usable, monkeypatch):
    assert machine.is_usable(torch.device('cpu'))
    def fails(*args, **kwargs): raise RuntimeError(error)
    monkeypatch.setattr(torch, 'zeros', fails)
    assert machine.is_usable(CUDA) == usable


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


def test_a_device_is_prepared_for_what_is_recorded_and_compiled(monkeypatch):
    "Only the forward pass is compiled under autocast, and CUDA graphs are recorded on the device of the run."
    current = []
    monkeypatch.setattr(torch.cuda, 'set_device', current.append)
    with functorch_config.patch(backward_pass_autocast='same_as_forward'):
        machine.prepare_device(Config(), torch.device('cuda', 1))
        assert functorch_config.backward_pass_autocast == 'off' and current == [torch.device('cuda', 1)]


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


# --- the GPU of a Mac ---

@pytest.fixture
def mac(gpus, monkeypatch):
    "Makes torch see the GPU of a Mac, and fail at each call that needs CUDA; tensors there cannot be made here."
    gpus(0)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    for name in ('driver_allocated_memory', 'empty_cache', 'synchronize'):
        monkeypatch.setattr(torch.mps, name, lambda: 3 * 2**20)
    def no_cuda(*args, **kwargs): raise AssertionError('Torch not compiled with CUDA enabled')
    for name in ('synchronize', 'set_device', 'current_stream', 'mem_get_info', 'get_device_name', 'memory_allocated',
                 'get_device_capability', 'max_memory_allocated', 'reset_peak_memory_stats'):
        monkeypatch.setattr(torch.cuda, name, no_cuda)
    tried = machine.autocast_works
    tried.cache_clear()
    yield
    tried.cache_clear()


def test_the_gpu_of_a_mac_is_a_device_like_the_others(mac):
    assert machine.get_device() == machine.get_device(0) == MPS
    with pytest.raises(UsageError, match='--gpu 1: the one GPU of a Mac is 0'): machine.get_device(1)
    assert machine.device_name(MPS) == 'Apple, mps'
    measure.reset_peak_memory(MPS)
    assert measure.peak_memory_mb(MPS) == 3 and timing.peak_mb(lambda: None, MPS) == 0
    assert len(timing.take_turns([lambda: None], MPS, 2)[0]) == 2


def test_several_processes_on_a_mac_are_on_its_cpu(mac, monkeypatch, capsys):
    for key in ('RANK', 'LOCAL_RANK'): monkeypatch.setenv(key, '0')
    for key in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'): monkeypatch.setenv(key, '2')
    assert machine.get_device() == CPU
    assert 'several processes train on the CPU' in capsys.readouterr().out


@pytest.mark.parametrize('works', [True, False])
def test_the_precision_of_a_mac_is_what_works_there(works, mac, monkeypatch):
    monkeypatch.setattr(machine, 'autocast_works', lambda device, precision: works and precision == 'fp16')
    cfg = machine.settle(Config(), MPS)
    assert cfg.precision == ('fp16' if works else 'fp32')
    assert cfg.channels_last == 0, 'there the gradient of a batch norm is wrong in channels last'
    assert machine.settle(Config(precision='fp32'), MPS).precision == 'fp32'
    with pytest.raises(UsageError, match='--precision bf16: does not work on this Mac'):
        machine.settle(Config(precision='bf16'), MPS)
    with pytest.raises(UsageError, match='--cuda-graphs: needs a CUDA device'):
        machine.settle(Config(cuda_graphs=1), MPS)


def test_whether_autocast_works_is_found_by_a_step(mac):
    before = torch.random.get_rng_state()
    assert machine.autocast_works(CPU, 'fp16') and machine.autocast_works(CPU, 'bf16')
    assert not machine.autocast_works(MPS, 'fp16'), 'there is none here'
    assert torch.random.get_rng_state().equal(before)


def test_a_mac_reads_images_in_loader_processes(mac, tree, monkeypatch):
    loaded = data.get_dls(config(tree), MPS)
    assert loaded.loader == 'workers' and isinstance(loaded.train.dataset, ImageFiles)
    assert not loaded.train.pin_memory
    assert data.memory_format(MPS) == torch.contiguous_format and data.memory_format(CUDA) == torch.channels_last
    with pytest.raises(UsageError, match='--loader device: needs float64'):
        data.get_dls(config(tree, loader='device'), MPS)


def test_half_precision_on_a_mac_scales_the_loss_there(mac):
    precision = learner.Precision('fp16')
    precision.learn = SimpleNamespace(dls=SimpleNamespace(device=MPS))
    precision.before_fit()
    assert precision.autocast.device == 'mps' and precision.learn.scaler._device == 'mps'


def test_a_lack_of_memory_is_one_line(capsys):
    cpu = '[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can\'t allocate memory: you tried to ' \
          'allocate 8000000000 bytes. Error code 12 (Cannot allocate memory)'
    mps = 'MPS backend out of memory (MPS allocated: 5.12 GB, max allowed: 9.07 GB). Tried to allocate 4.00 GB on pool'
    for e, words in [(RuntimeError(cpu), 'out of memory (can\'t allocate memory: you tried to allocate 80'),
                     (RuntimeError(mps), 'Tried to allocate 4.00 GB on pool; lower --bs or --size'),
                     (RuntimeError('CUDA error: out of memory\nCUDA kernel errors might be reported at another call.'),
                      ': CUDA error: out of memory; lower --bs'),
                     (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
                      'out of memory (CUBLAS_STATUS_ALLOC_FAILED); lower --bs'),
                     (RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'), '(CUDNN_STATUS_ALLOC_FAILED); lower'),
                     (OSError(errno.ENOMEM, 'Cannot allocate memory'), 'Cannot allocate memory); lower --bs'),
                     (RuntimeError('unable to mmap 512 bytes from file <x.pt>: Cannot allocate memory (12)'),
                      'out of memory (unable to mmap 512 bytes'),
                     (RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback: ...\n'
                                   'RuntimeError: unable to write to file </torch_7>: No space left on device (28)'),
                      ': unable to write to file </torch_7>: No space left on device (28); take fewer --workers'),
                     (MemoryError(), 'out of memory (no memory is left); lower --bs')]:
        def work(e=e): raise e
        assert exit_code('train_imagenette.py', work) == 1
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and words in err
    assert not lack_of_memory(OSError(errno.ENOSPC, 'No space left on device'))
    assert not lack_of_memory(RuntimeError('unable to open shared memory object </torch_7>: Too many open files (24)'))


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory.'),
                                   RuntimeError('CUDA error: out of memory'), RuntimeError('broken')])
def test_a_lack_of_memory_passes_for_no_other_mistake(error, tree, tmp_path, monkeypatch):
    def fail(*args, **kwargs): raise error
    expected = UsageError if 'broken' in str(error) else type(error)
    file = tmp_path / 'run.pt'
    found = checkpoint.Found(file, dict(epoch=1, model={}, config={}), None)
    identity = dict(config=asdict(Config())) | dict.fromkeys(checkpoint.MADE_WITH)
    callback = checkpoint.Checkpoint(file, identity, 0, found)
    callback.learn = SimpleNamespace(model=SimpleNamespace(load_state_dict=fail))
    with pytest.raises(expected): callback.before_fit()
    file.write_bytes(b'PK')
    monkeypatch.setattr(torch, 'load', fail)
    with pytest.raises(expected): checkpoint.peek(file)
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', fail)
    graphs = learner.Graphs(32)
    dls = SimpleNamespace(device=CPU, train=SimpleNamespace(bs=2))
    graphs.learn = SimpleNamespace(model=torch.nn.Flatten(), dls=dls)
    with pytest.raises(expected): graphs.before_fit()
    monkeypatch.setattr(torch, 'compile', fail)
    machine.check_compiler.cache_clear()
    with pytest.raises(expected): machine.check_compiler('cpu')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'init', fail)
    with pytest.raises(expected): machine.n_gpus()


def test_a_run_of_a_loop_that_has_no_memory_says_what_to_do(tmp_path, monkeypatch):
    def fail(*args, **kwargs): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. And so on')
    monkeypatch.setattr('training.run.run', fail)
    words = 'CUDA out of memory. Tried to allocate 2.00 GiB; lower --bs or --size'
    loop = SimpleNamespace(args=SimpleNamespace(results=tmp_path), device=CPU)
    (_, _, error), = Loop.here(loop, [('none', Config())], 0)
    assert error.startswith(words)
    assert cluster.train_run(Config(), tmp_path, 'mark', 0).error.startswith(words)
    for name in ('os.setsid', 'training.jobs.stop_on_signals'): monkeypatch.setattr(name, lambda: None)
    monkeypatch.setattr(jobs, 'listen', lambda task, given: [given.put(each) for each in (task, None)])
    answers = []
    with restored(): jobs.train_tasks(('none', Config()), SimpleNamespace(send=answers.append), tmp_path, CPU, 0)
    ((error, is_the_last),) = answers
    assert error.startswith(words) and is_the_last


# --- containers ---

def control_groups(folder, own, files):
    "Writes files {path: content} of control groups and the lines `own` of this process; returns both places."
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content + '\n', encoding='utf-8')
    (folder / 'own').write_text(own + '\n', encoding='utf-8')
    return folder, folder / 'own'


V1 = '12:cpu,cpuacct:/docker/abc\n11:memory:/docker/abc\n0::/'
@pytest.mark.parametrize('own, files, cores, memory', [
    ('0::/', {'cpu.max': '150000 100000', 'memory.max': '2147483648'}, 1.5, 2**31),
    ('0::/', {'cpu.max': 'max 100000', 'memory.max': 'max'}, float('inf'), float('inf')),
    ('0::/a/b', {'a/cpu.max': '200000 100000', 'a/b/cpu.max': 'max 100000', 'a/b/memory.max': '4096',
                 'a/memory.max': '8192'}, 2, 4096),
    (V1, {'cpu,cpuacct/docker/abc/cpu.cfs_quota_us': '50000', 'cpu,cpuacct/docker/abc/cpu.cfs_period_us': '100000',
          'memory/docker/abc/memory.limit_in_bytes': '1073741824'}, 0.5, 2**30),
    (V1, {'cpu/cpu.cfs_quota_us': '300000', 'cpu/cpu.cfs_period_us': '100000',  # as a container sees its own
          'memory/memory.limit_in_bytes': '1073741824'}, 3, 2**30),
    (V1, {'cpu/cpu.cfs_quota_us': '-1', 'cpu/cpu.cfs_period_us': '100000',
          'memory/memory.limit_in_bytes': '9223372036854771712'}, float('inf'), float('inf')),
    (V1, {'cpu/cpu.cfs_quota_us': 'garbage', 'memory/memory.limit_in_bytes': ''}, float('inf'), float('inf')),
    ('0::/', {}, float('inf'), float('inf')),
])
def test_the_limits_of_a_container_are_read(own, files, cores, memory, tmp_path):
    where = control_groups(tmp_path, own, files)
    assert (host.core_limit(*where), host.memory_limit(*where)) == (cores, memory)
    assert host.memory_limit(tmp_path, tmp_path / 'none') == float('inf'), 'a system without control groups'


@pytest.fixture
def container(monkeypatch):
    "Makes this process see `seen` cores, of which it has `cores`, with so much memory."
    def see(seen, cores, memory=float('inf')):
        monkeypatch.setattr(host, 'visible_cores', lambda: seen)
        monkeypatch.setattr(host, 'core_limit', lambda: cores)
        monkeypatch.setattr(host, 'memory_limit', lambda: memory)
        monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
        say_once.cache_clear()
    before = torch.get_num_threads()
    yield see
    torch.set_num_threads(before)


@pytest.mark.parametrize('seen, cores, workers', [(64, 2., 2), (64, 1.5, 2), (64, 0.5, 1), (4, float('inf'), 4),
                                                  (64, 32., 8)])
def test_workers_and_threads_are_those_of_the_container(seen, cores, workers, container, monkeypatch, capsys):
    container(seen, cores)
    assert machine.settle(Config(), CPU).workers == workers
    torch.set_num_threads(8)
    machine.prepare_device(Config(), CPU)
    limited = cores < 8
    assert torch.get_num_threads() == (workers if limited else 8)
    out = capsys.readouterr().out
    if limited: assert out.count('\n') == 1 and f'the time of {cores:g} of 64 cores, so torch has {workers}' in out
    else: assert not out
    monkeypatch.setenv('OMP_NUM_THREADS', '8')
    torch.set_num_threads(8)
    machine.prepare_device(Config(), CPU)
    assert torch.get_num_threads() == 8, 'what the user says counts'


def test_decoded_images_take_a_quarter_of_the_memory_of_the_container(container):
    container(64, 2., 2**30)
    assert host.memory_bytes() == 2**30 and data.device_bytes(CPU, 0) == 2**28
    container(64, 2.)
    assert data.device_bytes(CPU, 0) == host.psutil.virtual_memory().total // 4


def test_threads_that_read_images_are_those_of_the_container(container, tree, monkeypatch):
    container(64, 2.)
    asked = []
    class Pool(ThreadPoolExecutor):
        def __init__(self, max_workers=None):
            asked.append(max_workers)
            super().__init__(max_workers)
    for module in (check, images): monkeypatch.setattr(module, 'ThreadPoolExecutor', Pool)
    check.look_at_all(tree, find_images(tree))
    files = [tree / f for f in find_images(tree)]
    images.stack_valid_images(files, 32)
    images.Pixels(files, CPU)
    assert asked == [6, 6, 6]
    container(64, 64.)
    assert host.n_threads() == 32
