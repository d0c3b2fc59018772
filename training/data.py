"""Imagenette, Imagewoof and digits as the 2019 source fed them: `get_dls(cfg)` gives fastai DataLoaders.

Two loaders of the same images (images.py): `workers` decodes and crops with Pillow in loader processes; `device` keeps
the decoded images on the device and crops there. Both normalise with ImageNet's statistics.

All that is random in an epoch (order, crops, flips) is drawn at once from (seed, epoch), so it depends neither on
the loader, nor on the number of its processes, nor on the epochs before it.
"""
import configparser
import gzip
import os
import shutil
import tarfile
import tempfile
import zlib
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.data.external import URLs, fastai_path, untar_data
from fastai.data.load import DataLoader
from fastai.torch_core import TensorImage, rank_distrib
from fastai.vision.augment import RandomErasing
from PIL import Image

from command import UsageError, say_once
from experiments import N_IMAGES
from training import check
from training.files import fingerprint, label_of, left_out, noisy_labels, same_but_for_case, scan, split_files, unused_folders
from training.images import Pixels, crop_boxes, epoch_draws, read_image, stack, train_image, valid_image

ARCHIVES = {  # (dataset, source): URL
    ('imagenette', '160'): URLs.IMAGENETTE_160, ('imagenette', '320'): URLs.IMAGENETTE_320, ('imagenette', 'full'): URLs.IMAGENETTE,
    ('imagewoof', '160'): URLs.IMAGEWOOF_160, ('imagewoof', '320'): URLs.IMAGEWOOF_320, ('imagewoof', 'full'): URLs.IMAGEWOOF,
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- files ---

def find_data(cfg):
    "The folder `cfg` trains on, downloaded or written first where need be."
    if cfg.data: return Path(cfg.data)
    if cfg.dataset == 'digits': return digits()
    url = ARCHIVES[cfg.dataset, cfg.source]
    archive, folder = home('archive') / Path(url).name, home('data') / Path(url).stem
    if folder.exists(): return folder
    try:
        with whole(folder) as part:
            untar_data(url, base=part.parent, archive=archive.parent, data=part.parent)
            n, expected = len(scan(part)[0]), sum(N_IMAGES[cfg.dataset, cfg.split])
            if n != expected: raise tarfile.ReadError(f'{n:,} of {expected:,} images')  # at a damaged header tarfile ends in silence
    except (EOFError, UsageError, gzip.BadGzipFile, shutil.ReadError, tarfile.TarError, zlib.error) as e:
        raise UsageError(f'{archive}: damaged ({_brief(e)}); remove it, and it is downloaded anew') from None
    except Exception as e:  # urllib, ssl, a full disk: all mean that there is no archive
        hint = f'try again, put the archive at {archive}, or name an extracted folder with --data'
        raise UsageError(f'cannot get {url} ({_brief(e)}): {hint}') from None
    return folder


def _brief(e):
    "What went wrong, in a line: without the body of an HTTP error, or all the files that could not be copied."
    if isinstance(e, shutil.Error): return e.args[0][0][-1]  # of [(from, to, reason)]
    if 'ContentTooShortError' in str(e): return 'the download broke off'  # a NameError, where fastcore forgets to import it
    return next(iter(str(e).splitlines()), type(e).__name__)[:200]


@contextmanager
def whole(folder):
    "A path for the block to fill, which then takes the place of `folder`, if that is not there by now: never half of it."
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'{folder.name}.', dir=folder.parent) as beside:
        yield (part := Path(beside) / folder.name)
        try: part.rename(folder)
        except OSError:  # another process was first
            if not folder.exists(): raise


class ImageSet(NamedTuple):
    "The images of a run: `files` is {relative path: bytes}; `skipped` counts damaged ones, `looks` is {} of archives of ours."
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
        looks, skipped = check.sound(path, check.look_at_all(path, files, memory()), cfg.skip_damaged)
        digest = check.fingerprint(looks) + (f'-{cfg.valid_pct:g}' if cfg.valid_pct else '')
        return ImageSet(path, {f: files[f] for f in looks}, digest, skipped, looks, others)
    except (OSError, UnicodeError) as e: raise UsageError(f'cannot read the data: {e}') from None


def home(folder):
    "Returns a folder of fastai's home, which its config.ini names; raises UsageError that says what to do if there is none."
    where = Path(os.environ.get('FASTAI_HOME', '~/.fastai')).expanduser()
    try: return fastai_path(folder)
    except OSError as e: raise UsageError(f'{where}: cannot be written ({e.strerror}); name another folder by FASTAI_HOME') from None
    except (configparser.Error, KeyError, UnicodeError) as e:
        why = ' '.join(str(e).split())
        raise UsageError(f'{where / "config.ini"}: damaged ({why}); remove it, and it is written anew') from None


def memory():
    "Returns the folder where `check` keeps what it found, or None where there is no home for it."
    try: return home('data').parent / 'looked-at'
    except UsageError: return None


def digits():
    "scikit-learn's 1,797 handwritten digits as PNGs, written once: every fifth one is in val."
    path = home('data') / 'digits'
    if path.exists(): return path
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    with whole(path) as part:
        for i, (image, label) in enumerate(zip(images, labels)):
            file = part / ('train' if i % 5 else 'val') / str(label) / f'{i:04d}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            image = np.pad(image.reshape(8, 8) * (255 / 16), 2)  # the margin is what the centre crop takes off again
            Image.fromarray(image.round().astype(np.uint8)).save(file)
    return path


# --- datasets ---

class Images:
    """Labelled images (uint8 (3, size, size)); with `seed`, training images: order, crops and flips as drawn for the epoch.

    `share`: (r, n) for the r-th of n processes. It has every n-th image of the order; of training images all have as many.
    """
    def __init__(self, labels, size, seed=None, share=(0, 1)):
        self.labels, self.size, self.seed, (self.first, self.step) = labels, size, seed, share
        self.order = range(len(labels))[self.first::self.step]
        self.set_epoch(0)

    def __len__(self): return len(self.order)

    def set_epoch(self, epoch):
        "Draw order, crops and flips of `epoch`; without a seed nothing is random."
        if self.seed is None: return
        n = len(self.labels)
        order, self.u, self.flip = epoch_draws(self.seed, epoch, n)
        self.order = order[self.first:n - n % self.step:self.step]


class ImageFiles(Images, torch.utils.data.Dataset):
    "Read from their files, one (image, label) at a time."
    def __init__(self, path, files, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.path, self.files = path, files

    def __getitem__(self, i):
        im = read_image(self.path / self.files[i])
        im = valid_image(im, self.size) if self.seed is None else train_image(im, self.size, self.u[i], self.flip[i])
        return torch.from_numpy(np.array(im)).permute(2, 0, 1), self.labels[i]  # (H, W, C) -> (C, H, W)


class DeviceImages(Images):
    "Decoded on a device, a batch at a time: `pixels` are Pixels for training, ready images (n, size, size, 3) for validation."
    def __init__(self, pixels, labels, *args, **kwargs):
        self.pixels, self.targets = pixels, torch.tensor(labels).to(pixels.data.device)
        super().__init__(labels, *args, **kwargs)

    def set_epoch(self, epoch):
        super().set_epoch(epoch)
        if self.seed is not None: self.boxes = crop_boxes(self.u, self.pixels.width, self.pixels.height)

    def batch(self, start, stop):
        "Images (B, 3, size, size) and labels (B,) from `start` to `stop` in the order of the epoch."
        i = self.order[start:stop]
        if self.seed is None:
            at = slice(i.start, i.stop, i.step)
            return self.pixels[at].permute(0, 3, 1, 2), self.targets[at]
        labels = self.targets[torch.from_numpy(i).to(self.targets.device, non_blocking=True)]
        return self.pixels.crops(i, self.boxes[i], self.flip[i], self.size), labels


# --- batches ---

class ImageLoader(DataLoader):
    "fastai's DataLoader, in the order that the dataset draws, with the batches normalised on their device."
    def __init__(self, dataset, sh=0., **kwargs):
        super().__init__(dataset, **kwargs)
        self.erase = RandomErasing(p=0.3, max_count=3, sh=sh) if sh else None  # as in fastai's example script

    def get_idxs(self): return list(self.dataset.order)

    def after_batch(self, b):
        x, y = b
        mean, std = _statistics(x.device)
        x = (x.float() / 255 - mean) / std
        x = x.contiguous(memory_format=torch.channels_last)
        if self.erase: x = self.erase(TensorImage(x), split_idx=0).as_subclass(torch.Tensor)
        return x, y


@lru_cache
def _statistics(device):
    "ImageNet's mean and standard deviation (3, 1, 1), copied to `device` once: a copy a batch would hold it up."
    return [torch.tensor(s, device=device).view(3, 1, 1) for s in (IMAGENET_MEAN, IMAGENET_STD)]


class DeviceLoader(ImageLoader):
    "Batches that a DeviceImages dataset makes: no loader process, and no image decoded twice."
    def create_batches(self, samples):
        stop = self.n - self.n % self.bs if self.drop_last else self.n
        for i in range(0, stop, self.bs): yield self.dataset.batch(i, min(i + self.bs, self.n))


@lru_cache(maxsize=1)
def _decoded(path, files, digest, device):
    "The Pixels of `files`, kept for the next run of this process on the same data (`digest`)."
    return Pixels([path / f for f in files], device, limit=device_bytes(device))


@lru_cache(maxsize=1)
def _decoded_valid(path, files, digest, device, size): return stack([path / f for f in files], size).to(device)


def device_bytes(device):
    "Bytes that decoded images may take on `device`: half of the free memory of a GPU, a quarter of the machine's."
    if device.type == 'cuda': return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 4


def n_workers(cfg, shm=Path('/dev/shm')):
    """Returns how many loader processes `cfg` gets: fewer than it asks for, and a line that says so, where shared memory is small.

    Each has two batches there on their way, as in a container with 64 MB of it; two more are in use.
    """
    if not cfg.workers or not shm.is_dir(): return cfg.workers
    batch = cfg.bs * (3 * cfg.size**2 + 8)  # bytes
    fit = shutil.disk_usage(shm).free // int(os.environ.get('LOCAL_WORLD_SIZE', 1)) // batch // 2 - 1
    if fit < cfg.workers:
        say_once(f'{shm} has room for the batches of {max(0, fit)} of {cfg.workers} loader processes, so there are no more; '
                 f'docker run --shm-size 2g gives it more')
    return max(0, min(cfg.workers, fit))


def loaders(cfg, path, train, valid, digest, device):
    """(training loader, validation loader, name of the kind) from lists of (file, label).

    auto: `device` on a GPU that holds the set; on a CPU `workers`, whose Pillow is several times faster there.
    """
    (train, train_labels), (valid, valid_labels) = (map(tuple, zip(*pairs)) for pairs in (train, valid))
    share = rank_distrib(), cfg.processes
    kind = cfg.loader if cfg.loader != 'auto' else 'device' if device.type == 'cuda' else 'workers'
    if kind == 'device':
        try: pixels = _decoded(path, train, digest, device)
        except MemoryError as e:
            if cfg.loader == 'device': raise UsageError(f'--loader device: no room for {e}; take --loader workers') from None
            kind = 'workers'
    if kind == 'device':
        ready = _decoded_valid(path, valid, digest, device, cfg.size)
        sets = DeviceImages(pixels, train_labels, cfg.size, cfg.seed, share), DeviceImages(ready, valid_labels, cfg.size, share=share)
        make, options = DeviceLoader, dict(num_workers=0)
    else:
        sets = (ImageFiles(path, train, train_labels, cfg.size, cfg.seed, share),
                ImageFiles(path, valid, valid_labels, cfg.size, share=share))
        make, options = ImageLoader, dict(num_workers=n_workers(cfg), pin_memory=device.type == 'cuda')
    return make(sets[0], cfg.sh, bs=cfg.bs, drop_last=True, **options), make(sets[1], bs=cfg.bs, **options), kind


def remarks(cfg, path, skipped, looks, others, train, valid):
    "Yields lines on what of a folder of the user's is left out or changed."
    if not cfg.data: return
    if skipped: yield f'{skipped:,} damaged images are left out'
    if others: yield left_out(others)
    for folder in unused_folders(path): yield f'the folder {folder} is not used'
    yield from check.remarks(looks, train, valid)


def get_dls(cfg, device='cpu'):
    """Returns DataLoaders of a resolved `cfg`.

    They have `vocab` (class names), `valid_files`, `fingerprint`, `skipped` (damaged images), `loader` (its kind) and `workers`.
    """
    device = torch.device(device)
    path, sizes, digest, skipped, looks, others = find_set(cfg)
    train, valid = split_files(list(sizes), cfg.split, cfg.valid_pct)
    expected = N_IMAGES.get((cfg.dataset, cfg.split)) if not cfg.data else None
    if expected and len(sizes) != sum(expected):
        print(f'{path}: {len(sizes):,} of {sum(expected):,} images, not the full archive')
    elif expected and (len(train), len(valid)) != expected:
        counts = f'{len(train):,} + {len(valid):,} images, expected {expected[0]:,} + {expected[1]:,}'
        raise UsageError(f'{path}: split {cfg.split} gives {counts}; extract the archive anew')
    if len(valid) < cfg.processes: raise UsageError(f'{path}: {len(valid)} validation images for {cfg.processes} processes')
    if len(train) // cfg.processes < cfg.bs:
        each = f' in each of {cfg.processes} processes' if cfg.processes > 1 else ''
        raise UsageError(f'{path}: {len(train)} training images make no batch of {cfg.bs}{each}; lower --bs')

    label = {f: label_of(f) for f in sizes}
    vocab = sorted({label[f] for f in train})
    unknown = sorted({label[f] for f in valid} - set(vocab))
    if unknown:
        meant = same_but_for_case(unknown[0], vocab)
        hint = f'; it has {meant} there, of which upper and lower case and accents count' if meant else ''
        raise UsageError(f'{path}: class {", ".join(unknown)} of the validation images is not in training{hint}')
    missing = sorted(set(vocab) - {label[f] for f in valid})
    if missing: raise UsageError(f'{path}: class {", ".join(missing)} of the training images has none in validation')
    if len(vocab) < 2: raise UsageError(f'{path}: one class only, {vocab[0]}; there is nothing to tell apart')
    if cfg.pct_noise:
        noisy = noisy_labels(path, cfg.pct_noise)
        unlabelled = [f for f in train if f.startswith('train/') and noisy.get(f) not in vocab]
        if unlabelled: raise UsageError(f'{path}: its noisy_*.csv has no label of ours for {unlabelled[0]}')
        label |= {f: noisy.get(f, label[f]) for f in train}
    index = {name: i for i, name in enumerate(vocab)}
    pairs = [[(f, index[label[f]]) for f in files] for files in (train, valid)]
    *dls, kind = loaders(cfg, path, *pairs, digest, device)
    for line in remarks(cfg, path, skipped, looks, others, train, valid): say_once(f'{path}: {line}')
    dls = DataLoaders(*dls, path=path, device=device)
    dls.vocab, dls.valid_files, dls.fingerprint, dls.loader, dls.skipped = vocab, valid, digest, kind, skipped
    dls.workers = dls.train.fake_l.num_workers
    return dls
