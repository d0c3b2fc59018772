"""Gives the tests what they share: a fastai home of their own, a small tree of real JPEGs, the command."""
import os
import tempfile

os.environ['FASTAI_HOME'] = tempfile.mkdtemp(prefix='fastai-home-')  # before fastai is imported; nothing is downloaded
os.environ.setdefault('OMP_NUM_THREADS', '1')  # The models here are too small for more.

import atexit
import gc
import importlib.util
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runlog
from experiments import EXPERIMENTS, Config, resolve


def pytest_configure(config):
    """Hides the GPUs unless tests that need one are asked for, and heeds the signals that `nohup` and `&` ignore.

    GPUs would change what the tests of several processes and of bits see; the tests send these signals.
    """
    for name, handler in (('SIGINT', signal.default_int_handler), ('SIGHUP', signal.SIG_DFL)):
        number = getattr(signal, name, None)  # Windows has no SIGHUP.
        if number and signal.getsignal(number) == signal.SIG_IGN: signal.signal(number, handler)
    if 'cuda' not in config.option.keyword.replace('not cuda', ''): os.environ['CUDA_VISIBLE_DEVICES'] = ''


REPO = Path(__file__).parent.parent
NARROW = 64, 64, 64, 64  # channels of the stages
CLASSES = ['n02086240', 'n02087394', 'n02088364']
TIMES = ['run_id', 'started', 'resumed', 'fit_seconds', 'median_epoch_seconds', 'images_per_second', 'peak_memory_mb',
         'workers']

atexit.register(shutil.rmtree, os.environ['FASTAI_HOME'], ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    """Gives a slow test ten times the seconds that it says it takes on a quiet core, since the machine may be busy.

    With --timeout it has the seconds of that.
    """
    if config.getoption('timeout') is not None: return
    for item in items:
        mark = item.get_closest_marker('slow')
        if mark is not None: item.add_marker(pytest.mark.timeout(max(60, 10 * mark.args[0])))


def pytest_collection_finish():
    "Leaves out of each garbage collection what the imports made: each run begins with one, which took half a second."
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='session')
def fastai_home(): return Path(os.environ['FASTAI_HOME'])


def script(name):
    "Returns the module of scripts/<name>.py."
    spec = importlib.util.spec_from_file_location(name, REPO / 'scripts' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unchanged(path):
    "Returns whether a file, a path from the folder of the code, is as it was committed."
    return subprocess.run(['git', 'diff', '--quiet', 'HEAD', '--', path], cwd=REPO).returncode == 0


@pytest.fixture(scope='session')
def published():
    "Returns the published means."
    from report.published import load_published
    return load_published()


@pytest.fixture(scope='session')
def rows_of_record(published):
    "Returns all comparisons of the record."
    from report.compare import gaps
    return gaps(EXPERIMENTS, runlog.load(), published)


def rows(results):
    "Returns the record of a results folder as a frame, by arm and seed."
    return runlog.load(results / 'runs.csv').sort_values(['attention', 'seed']).reset_index(drop=True)


def make_image(seed, size=(60, 48)):
    "Returns a smooth random RGB image, (width, height) = `size`."
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)


@pytest.fixture
def tree(tmp_path):
    """Makes train|val/<class>/ with 8 training and 4 validation images a class.

    One in each folder is of ImageNet's validation set, so split v2 is 24 + 12 and split v1 is 30 + 6.
    """
    for c, label in enumerate(CLASSES):
        for folder, n in (('train', 8), ('val', 4)):
            (tmp_path / 'set' / folder / label).mkdir(parents=True)
            for i in range(n):
                name = f'ILSVRC2012_val_{c}{i:03d}_{folder}.JPEG' if i == 0 else f'{label}_{folder}{i}.JPEG'
                make_image(100 * c + 10 * i + (folder == 'val')).save(tmp_path / 'set' / folder / label / name)
    return tmp_path / 'set'


TINY = ('--split', 'v1', '--size', 32, '--bs', 6, '--arch', 'xresnet18', '--workers', 0, '--epochs', 1)


def parsed(*argv):
    "Returns the Config of the flags of the training command."
    import train_imagenette
    return train_imagenette.parse([str(a) for a in argv])[0]


def record(tmp_path):
    "Returns the record that `command` has made."
    return runlog.load(tmp_path / 'results' / 'runs.csv')


def config(tree, **kwargs):
    "Returns the resolved Config of a run on `tree`."
    return resolve(Config(**dict(dataset='custom', data=str(tree), size=32, bs=6, workers=0, split='v1') | kwargs))


@pytest.fixture
def command(capfd, tmp_path):
    "Returns a function that runs the training command here: (exit code, stdout, stderr), results in tmp_path/results."
    import train_imagenette

    def call(*argv):
        code = train_imagenette.main([*map(str, argv), '--results', str(tmp_path / 'results')])
        return (code or 0, *capfd.readouterr())
    return call


@pytest.fixture(autouse=True)
def fixed_seed():
    "Seeds torch, where a test file has imported it: tests of the record and the reports start without it."
    if 'torch' in sys.modules: sys.modules['torch'].manual_seed(0)


@pytest.fixture(autouse=True)
def narrow(request):
    """Makes the plain networks narrow, here and in processes that start warm: xresnet18 has 0.6 of 11 million weights.

    Most tests train some network, whatever it is. The mark `full_width` is for those that need the real one, or that
    compare with a process that does not start warm. Yields whether they are narrow.
    """
    is_narrow = not request.node.get_closest_marker('full_width')
    with pytest.MonkeyPatch.context() as patch:  # of its own, as a test may undo what it patched
        # Tests of the record start without torch, which xresnet imports.
        trains = 'xresnet' in sys.modules or 'command' in request.fixturenames
        if is_narrow and trains: patch.setattr('xresnet.WIDTHS', NARROW)
        yield is_narrow


@pytest.fixture
def spawn(narrow):
    """Starts python with these arguments as a process with pipes, in a group of its own, as in a terminal.

    A script starts warm, see warm.py, unless the call has options of subprocess.Popen or another PYTHONPATH, which is
    read at the start. No process outlives the test.
    """
    started = []

    def call(*argv, env=None, **options):
        argv, env = list(map(str, argv)), dict(env or os.environ)
        same_path = env.get('PYTHONPATH') == os.environ.get('PYTHONPATH')
        if argv[0].endswith('.py') and same_path and not options:
            from warm import Warm  # It imports torch.
            started.append(Warm(argv, env, NARROW if narrow else None))
        else:
            options = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) | options
            started.append(subprocess.Popen([sys.executable, *argv], env=env, **options))
        return started[-1]
    yield call
    for process in started:
        with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
        process.wait()
