"""Feeds Imagenette, Imagewoof and digits as the 2019 source did: `get_dls(cfg)` returns fastai DataLoaders.

There are two loaders of the same images (images.py): `workers` decodes and crops with Pillow in loader processes;
`device` keeps the decoded images on the device and crops there. Both normalise with ImageNet's statistics.

All that is random in an epoch (order, crops, flips) is drawn at once from (seed, epoch). So it depends neither on the
loader, nor on the number of its processes, nor on the epochs before.
"""
import configparser
import gc
import gzip
import multiprocessing
import os
import shutil
import tarfile
import tempfile
import threading
import zlib
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import fastdownload.core
import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.data.external import URLs, fastai_path, untar_data
from fastai.data.load import DataLoader, _FakeLoader
from fastai.torch_core import TensorImage, rank_distrib
from fastai.vision.augment import RandomErasing
from PIL import Image

from command import UsageError, say, say_once
from experiments import N_IMAGES
from training import check, host, readers
from training.files import (
    fingerprint,
    labels_of,
    left_out,
    noisy_labels,
    same_but_for_case,
    scan,
    split_files,
    unused_folders,
)
from training.images import Pixels, bar, crop_boxes, stack_valid_images
from training.readers import ImageFiles, Images

ARCHIVES = {  # (dataset, source): URL
    ('imagenette', '160'): URLs.IMAGENETTE_160,
    ('imagenette', '320'): URLs.IMAGENETTE_320,
    ('imagenette', 'full'): URLs.IMAGENETTE,
    ('imagewoof', '160'): URLs.IMAGEWOOF_160,
    ('imagewoof', '320'): URLs.IMAGEWOOF_320,
    ('imagewoof', 'full'): URLs.IMAGEWOOF,
}
SILENCE = 60  # seconds: a server that sends nothing for so long ends a download
COUNT_EVERY = 1  # second: how often the files are counted that an archive has given so far
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- files ---

def find_data(cfg):
    """Returns the folder that `cfg` trains on; downloads and extracts it, or writes it, where it is not there yet.

    Raises UsageError if the archive cannot be had or is damaged.
    """
    if cfg.data: return Path(cfg.data)
    if cfg.dataset == 'digits': return digits()
    url = ARCHIVES[cfg.dataset, cfg.source]
    archive, folder = home('archive') / Path(url).name, home('data') / Path(url).stem
    if folder.exists(): return folder
    try:
        expected = sum(N_IMAGES[cfg.dataset, cfg.split])
        with filled(folder) as part:
            with extracted_in(part.parent, expected), impatient():
                untar_data(url, base=part.parent, archive=archive.parent, data=part.parent)
            n = len(scan(part)[0])
            if n != expected:  # at a damaged header tarfile ends in silence
                raise tarfile.ReadError(f'{n:,} of {expected:,} images')
    except (EOFError, UsageError, gzip.BadGzipFile, shutil.ReadError, tarfile.TarError, zlib.error) as e:
        raise UsageError(f'{archive}: damaged ({_brief(e)}); remove it, and it is downloaded anew') from None
    except Exception as e:  # Whatever urllib, ssl or a full disk raise, there is no archive.
        hint = f'try again, put the archive at {archive}, or name an extracted folder with --data'
        raise UsageError(f'cannot get {url} ({_brief(e)}): {hint}') from None
    return folder


def _brief(e):
    "Returns what went wrong in a line: without the body of an HTTP error, or the list of files that were not copied."
    if isinstance(e, shutil.Error): return e.args[0][0][-1]  # e.args[0] is [(from, to, reason)].
    if 'ContentTooShortError' in str(e): return 'the download broke off'  # fastcore forgets to import that error.
    return next(iter(str(e).splitlines()), type(e).__name__)[:200]


@contextmanager
def filled(folder):
    "Gives a path for the block to fill and renames it to `folder`, unless another process was first: never half of it."
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'{folder.name}.', dir=folder.parent) as beside:
        part = Path(beside) / folder.name
        yield part
        try: part.rename(folder)
        except OSError:
            if not folder.exists(): raise  # Else another process was first.


@contextmanager
def extracted_in(folder, n):
    """Has fastai extract an archive of `n` images in `folder`, with a bar in a terminal.

    By itself it does so in the system's folder for temporary files, which may be too small, and copies them from there.
    """
    done, before = threading.Event(), tempfile.tempdir

    def arrivals():
        n_seen = 0
        while n_seen < n and not done.wait(COUNT_EVERY):
            n_there = min(n, sum(len(files) for *_, files in os.walk(folder)))
            yield from range(n_seen, n_there)
            n_seen = max(n_seen, n_there)  # It falls for a moment where a folder is moved.
    watcher = threading.Thread(target=lambda: list(bar(arrivals(), n, 'extracting')), daemon=True)
    tempfile.tempdir = str(folder)
    watcher.start()
    try: yield
    finally:
        tempfile.tempdir = before
        done.set()
        watcher.join()


@contextmanager
def impatient():
    "Has fastdownload give a silent server up; by itself it waits for ever, and so does who waits for its lock."
    before = fastdownload.core.download_url
    fastdownload.core.download_url = partial(before, timeout=SILENCE)
    try: yield
    finally: fastdownload.core.download_url = before


class ImageSet(NamedTuple):
    """Holds the images of a run.

    `files` is {relative path: bytes}; `skipped` counts damaged ones, `looks` is {} of archives of ours.
    """
    path: Path
    files: dict
    fingerprint: str
    skipped: int
    looks: dict
    others: list


def find_set(cfg):
    """Returns the ImageSet that `cfg` trains and validates on, downloaded first where need be.

    The images of a folder of the user's are all opened once; UsageError lists those that cannot be read.
    """
    try:
        path = find_data(cfg)
        files, others = scan(path, cfg.valid_pct)
        if not cfg.data: return ImageSet(path, files, fingerprint(files), 0, {}, others)
        looks, skipped = check.sound(path, check.look_at_all(path, files, looks_folder()), cfg.skip_damaged)
        data_fingerprint = check.fingerprint(looks) + (f'-{cfg.valid_pct:g}' if cfg.valid_pct else '')
        return ImageSet(path, {f: files[f] for f in looks}, data_fingerprint, skipped, looks, others)
    except (OSError, UnicodeError) as e: raise UsageError(f'cannot read the data: {e}') from None


def home(folder):
    "Returns a folder of fastai's home, which its config.ini names; raises UsageError if there is none."
    where = Path(os.path.expanduser(os.environ.get('FASTAI_HOME', '~/.fastai')))
    try:
        path = fastai_path(folder)
        if path is None: raise KeyError(f'no line {folder}')
        return path
    except (OSError, RuntimeError) as e:  # RuntimeError: the user has no home folder
        why = getattr(e, 'strerror', None) or 'there is no home folder'
        raise UsageError(f'{where}: cannot be written ({why}); name another folder by FASTAI_HOME') from None
    except (configparser.Error, KeyError, UnicodeError) as e:
        why = ' '.join(str(e).split())
        raise UsageError(f'{where / "config.ini"}: damaged ({why}); remove it, and it is written anew') from None


def looks_folder():
    "Returns the folder where `check` keeps what it found, or None where there is no home for it."
    try: return home('data').parent / 'looked-at'
    except UsageError: return None


def digits():
    "Returns the folder of scikit-learn's 1,797 digits as PNGs, and writes it once: every fifth one is in val."
    path = home('data') / 'digits'
    if path.exists(): return path
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    with filled(path) as part:
        for i, (image, label) in enumerate(zip(images, labels)):
            file = part / ('train' if i % 5 else 'val') / str(label) / f'{i:04d}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            image = np.pad(image.reshape(8, 8) * (255 / 16), 2)  # The centre crop takes the margin off again.
            Image.fromarray(image.round().astype(np.uint8)).save(file)
    return path


# --- batches ---

class DeviceImages(Images):
    """Makes batches of decoded images on their device.

    `pixels` are Pixels of training images, or validation images that are ready: (n, size, size, 3).
    """
    def __init__(self, pixels, labels, size, seed=None, share=(0, 1)):
        self.pixels, self.targets = pixels, torch.tensor(labels).to(pixels.data.device)
        super().__init__(labels, size, seed, share)

    def set_epoch(self, epoch):
        super().set_epoch(epoch)
        if self.seed is not None: self.boxes = crop_boxes(self.u, self.pixels.width, self.pixels.height)

    def batch(self, start, stop):
        "Returns images (B, 3, size, size) and labels (B,) from `start` to `stop` in the order of the epoch."
        i = self.order[start:stop]
        if self.seed is None:
            at = slice(i.start, i.stop, i.step)
            return self.pixels[at].permute(0, 3, 1, 2), self.targets[at]  # (B, H, W, C) -> (B, C, H, W)
        labels = self.targets[torch.from_numpy(i).to(self.targets.device, non_blocking=True)]
        return self.pixels.crops(i, self.boxes[i], self.flip[i], self.size), labels


class Forking(_FakeLoader):
    """Stands in for torch's DataLoader, as fastai's own does, and forks the loader processes.

    Python 3.14 no longer does so by default.
    """
    @property
    def multiprocessing_context(self): return multiprocessing.get_context('fork') if self.num_workers else None


class ImageLoader(DataLoader):
    """Loads in the order that the dataset draws, and normalises batches (B, 3, H, W) on their device.

    It forks loader processes at each epoch, or else has them of a `pool`, or none.
    """
    def __init__(self, dataset, sh=0., pool=None, **kwargs):
        super().__init__(dataset, **kwargs)
        self.fake_l.__class__, self.pool = Forking, pool
        self.erase = RandomErasing(p=0.3, max_count=3, sh=sh) if sh else None  # as in fastai's example script

    def get_idxs(self): return list(self.dataset.order)

    def before_iter(self):
        super().before_iter()
        if self.fake_l.num_workers: host.trim_memory()  # Else the forked processes held as much memory as this one.

    @property
    def n_workers(self): return self.pool.n if self.pool else self.fake_l.num_workers

    def create_batches(self, samples):
        if self.pool: return self.pool.batches(self.dataset, self.bs, self.drop_last)
        return super().create_batches(samples)

    def after_batch(self, b):
        x, y = b
        mean, std = imagenet_statistics(x.device)
        x = (x.float() / 255 - mean) / std
        x = x.contiguous(memory_format=memory_format(x.device))
        if self.erase: x = self.erase(TensorImage(x), split_idx=0).as_subclass(torch.Tensor)
        return x, y


def memory_format(device):
    "Returns the memory format of batches: channels last, but on the GPU of a Mac (machine.settle says why)."
    return torch.contiguous_format if device.type == 'mps' else torch.channels_last


@lru_cache
def imagenet_statistics(device):
    "Returns ImageNet's mean and standard deviation (3, 1, 1), copied to `device` once: it would wait for each copy."
    return [torch.tensor(s, device=device).view(3, 1, 1) for s in (IMAGENET_MEAN, IMAGENET_STD)]


class DeviceLoader(ImageLoader):
    "Gives the batches that a DeviceImages dataset makes: it has no loader processes, and decodes no image twice."
    def create_batches(self, samples):
        stop = self.n - self.n % self.bs if self.drop_last else self.n
        for i in range(0, stop, self.bs): yield self.dataset.batch(i, min(i + self.bs, self.n))


_decoded = {}  # the last of `decoded`


def decoded(path, train, valid, data_fingerprint, device, size, batch_pixels):
    """Returns (the Pixels of the files `train`, the images of `valid` (n, size, size, 3)) on a device.

    They are kept for the next run of this process on the same data, and dropped before others are decoded. Raises
    MemoryError where they do not fit beside training with batches of `batch_pixels` pixels.
    """
    key = path, train, valid, data_fingerprint, device, size
    if key not in _decoded:
        _decoded.clear()
        gc.collect()  # A Learner that is gone holds its images in a circle of references.
        if device.type == 'cuda': torch.cuda.empty_cache()
        limit = device_bytes(device, batch_pixels) - 3 * len(valid) * size**2
        pixels = Pixels([path / f for f in train], device, limit=limit)
        _decoded[key] = pixels, stack_valid_images([path / f for f in valid], size).to(device)
    return _decoded[key]


def device_bytes(device, batch_pixels):
    """Returns the bytes that decoded images may take, in training with batches of `batch_pixels` pixels.

    On a GPU they are half of the free memory, or what training leaves of it where that is less. Training is taken to
    need 1.5 KiB a pixel of a batch: xresnet50 took 0.6 in float16. On a CPU they are a quarter of the memory that this
    computer has, or this container; the images of a GPU pass through it, and may take half. Processes that train
    together share the computer, and runs side by side the GPU too.
    """
    n_runs = int(os.environ.get('RUNS_SIDE_BY_SIDE', 1))  # of --jobs and --ray
    here = host.memory_bytes() // int(os.environ.get('LOCAL_WORLD_SIZE', 1)) // n_runs
    if device.type != 'cuda': return here // 4
    free, total = torch.cuda.mem_get_info(device)
    free = min(free, total // n_runs)
    return max(0, min(free // 2, free - 1536 * batch_pixels, here // 2))


def n_workers(cfg, shm=Path('/dev/shm')):
    """Returns how many loader processes `cfg` gets.

    Where shared memory is small they are fewer than it asks for, and a line says so. Each process keeps two batches in
    shared memory, and two more are in use. Docker gives a container 64 MB.
    """
    if not cfg.workers or not shm.is_dir(): return cfg.workers
    batch = cfg.bs * (3 * cfg.size**2 + 8)  # bytes
    fit = shutil.disk_usage(shm).free // int(os.environ.get('LOCAL_WORLD_SIZE', 1)) // batch // 2 - 1
    if fit < cfg.workers:
        say_once(f'{shm} has room for the batches of {max(0, fit)} of {cfg.workers} loader processes, '
                 f'so there are no more; docker run --shm-size 2g gives it more')
    return max(0, min(cfg.workers, fit))


def loaders(cfg, path, train, valid, data_fingerprint, device):
    """Returns (training loader, validation loader, the name of their kind) for lists of (file, label).

    `auto` is `device` on a GPU that holds the images. On a CPU it is `workers`: there the crops of `device` take the
    step's own threads.
    """
    train, train_labels = map(tuple, zip(*train))
    valid, valid_labels = map(tuple, zip(*valid))
    share = rank_distrib(), cfg.processes
    kind = cfg.loader
    if kind == 'device' and device.type == 'mps':
        raise UsageError("--loader device: needs float64, which a Mac's GPU has not; take --loader workers")
    if kind == 'auto': kind = 'device' if device.type == 'cuda' else 'workers'
    if kind == 'device':
        try:
            pixels, ready = decoded(path, train, valid, data_fingerprint, device, cfg.size, cfg.bs * cfg.size**2)
        except MemoryError as e:
            if cfg.loader == 'device':
                raise UsageError(f'--loader device: no room for {e}; take --loader workers') from None
            kind = 'workers'
    if kind == 'device':
        train_set = DeviceImages(pixels, train_labels, cfg.size, cfg.seed, share)
        valid_set = DeviceImages(ready, valid_labels, cfg.size, share=share)
        make, options = DeviceLoader, dict(bs=cfg.bs, num_workers=0)
    else:
        train_set = ImageFiles(path, train, train_labels, cfg.size, cfg.seed, share)
        valid_set = ImageFiles(path, valid, valid_labels, cfg.size, share=share)
        make, options = ImageLoader, dict(bs=cfg.bs, pin_memory=device.type == 'cuda')
        n = n_workers(cfg)
        if readers.START_METHOD == 'fork': options['num_workers'] = n
        elif n: options['pool'] = readers.Pool([train_set, valid_set], n)
    return make(train_set, cfg.sh, drop_last=True, **options), make(valid_set, **options), kind


def remarks(cfg, images, train, valid):
    "Yields lines on what of the ImageSet of a folder of the user's is left out or changed."
    if not cfg.data: return
    if images.skipped: yield f'{images.skipped:,} damaged images are left out'
    if images.others: yield left_out(images.others)
    yield from unused_folders(images.path)
    yield from check.remarks(images.looks, train, valid)


def get_dls(cfg, device='cpu'):
    """Returns the DataLoaders of a settled `cfg`.

    They have the attributes `vocab` (class names), `valid_files`, `fingerprint`, `skipped` (how many damaged images are
    left out), `loader` (the kind) and `workers`. Raises UsageError if the images or their labels cannot be used.
    """
    device = torch.device(device)
    images = find_set(cfg)
    path = images.path
    train, valid = split_files(list(images.files), cfg.split, cfg.valid_pct)
    check_numbers(cfg, path, len(train), len(valid))
    label = labels_of(images.files)
    vocab = find_classes(path, {label[file] for file in train}, {label[file] for file in valid})
    if cfg.pct_noise: label |= mislabelled(cfg, path, train, vocab)
    index = {name: i for i, name in enumerate(vocab)}
    train_pairs, valid_pairs = ([(file, index[label[file]]) for file in files] for files in (train, valid))
    train_loader, valid_loader, kind = loaders(cfg, path, train_pairs, valid_pairs, images.fingerprint, device)
    for line in remarks(cfg, images, train, valid): say_once(f'{path}: {line}')
    dls = DataLoaders(train_loader, valid_loader, path=path, device=device)
    dls.vocab, dls.valid_files = vocab, valid
    dls.fingerprint, dls.skipped = images.fingerprint, images.skipped
    dls.loader, dls.workers = kind, dls.train.n_workers
    return dls


def check_numbers(cfg, path, n_train, n_valid):
    "Raises UsageError unless these numbers of images fit `cfg`; prints that an archive is not the full one."
    expected = N_IMAGES.get((cfg.dataset, cfg.split)) if not cfg.data else None
    if expected and n_train + n_valid != sum(expected):
        say(f'{path}: {n_train + n_valid:,} of {sum(expected):,} images, not the full archive')
    elif expected and (n_train, n_valid) != expected:
        counts = f'{n_train:,} + {n_valid:,} images, expected {expected[0]:,} + {expected[1]:,}'
        raise UsageError(f'{path}: split {cfg.split} gives {counts}; extract the archive anew')
    if n_valid < cfg.processes: raise UsageError(f'{path}: {n_valid} validation images for {cfg.processes} processes')
    if n_train // cfg.processes < cfg.bs:
        each = f' in each of {cfg.processes} processes' if cfg.processes > 1 else ''
        raise UsageError(f'{path}: {n_train} training images make no batch of {cfg.bs}{each}; lower --bs')


def find_classes(path, train, valid):
    "Returns the sorted class names; raises UsageError unless there are two, and the same in `train` and `valid`."
    unknown, missing = sorted(valid - train), sorted(train - valid)
    if unknown:
        meant = same_but_for_case(unknown[0], train)
        hint = f'; it has {meant} there, of which upper and lower case and accents count' if meant else ''
        raise UsageError(f'{path}: class {", ".join(unknown)} of the validation images is not in training{hint}')
    if missing: raise UsageError(f'{path}: class {", ".join(missing)} of the training images has none in validation')
    if len(train) < 2: raise UsageError(f'{path}: one class only, {min(train)}; there is nothing to tell apart')
    return sorted(train)


def mislabelled(cfg, path, train, vocab):
    """Returns {file: label} of the training files in the CSV of the archive, `cfg.pct_noise` percent of them wrong.

    Raises UsageError if a file of the folder train has no label of `vocab` there.
    """
    noisy = noisy_labels(path, cfg.pct_noise)
    for file in train:
        if file.startswith('train/') and noisy.get(file) not in vocab:
            raise UsageError(f'{path}: its noisy_*.csv has no label of ours for {file}')
    return {file: noisy[file] for file in train if file in noisy}
