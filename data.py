"""Imagenette, Imagewoof and digits as the 2019 source fed them: `get_dls(cfg)` gives fastai DataLoaders.

Training images: a random resized crop (area 0.35 to 1, ratio 3/4 to 4/3) by Pillow's bilinear filter, flipped half
the time. Validation images: short side to size + 32, centre crop. Both normalised with ImageNet's statistics.

All that is random in an epoch (order, crops, flips) is drawn at once from (seed, epoch), so it depends neither on
the number of loader processes nor on the epochs before it.
"""
import csv
import hashlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.data.external import URLs, fastai_path, untar_data
from fastai.data.load import DataLoader
from fastai.torch_core import TensorImage
from fastai.vision.augment import RandomErasing
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from experiments import IMAGES, UsageError, find_images

ARCHIVES = {  # (dataset, source): URL
    ('imagenette', '160'): URLs.IMAGENETTE_160, ('imagenette', '320'): URLs.IMAGENETTE_320, ('imagenette', 'full'): URLs.IMAGENETTE,
    ('imagewoof', '160'): URLs.IMAGEWOOF_160, ('imagewoof', '320'): URLs.IMAGEWOOF_320, ('imagewoof', 'full'): URLs.IMAGEWOOF,
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO, ATTEMPTS = (0.35, 1.), (3 / 4, 4 / 3), 10  # of the random resized crop
VALID_MARGIN = 32  # pixels that the validation images are larger than their centre crop


# --- files ---

def find_data(cfg):
    "The folder `cfg` trains on, downloaded or written first where need be."
    if cfg.data: return Path(cfg.data)
    if cfg.dataset == 'digits': return digits()
    url = ARCHIVES[cfg.dataset, cfg.source]
    try: return untar_data(url)
    except Exception as e:  # urllib, ssl, tarfile, a full disk: all mean that there is no archive
        archive = fastai_path('archive') / Path(url).name
        hint = f'put the archive at {archive}, or name an extracted folder with --data'
        raise UsageError(f'cannot get {url} ({" ".join(str(e).split())}): {hint}') from None


def digits():
    "scikit-learn's 1,797 handwritten digits as PNGs, written once: every fifth one is in val."
    path = fastai_path('data') / 'digits'
    if path.exists(): return path
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix='digits.', dir=path.parent))
    for i, (image, label) in enumerate(zip(images, labels)):
        file = part / ('train' if i % 5 else 'val') / str(label) / f'{i:04d}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        image = np.pad(image.reshape(8, 8) * (255 / 16), 2)  # the margin is what the centre crop takes off again
        Image.fromarray(image.round().astype(np.uint8)).save(file)
    try: part.rename(path)
    except OSError:  # another process was first
        shutil.rmtree(part)
        if not path.exists(): raise
    return path


def fingerprint(files):
    "12 hexadecimal digits of the paths and sizes of {path: bytes}."
    return hashlib.sha256('\n'.join(f'{f}\t{n}' for f, n in files.items()).encode()).hexdigest()[:12]


def split_files(files, split):
    """(training files, validation files) of the paths in `files`.

    v2: by their folder. v1: those named ILSVRC2012_val_* validate, wherever they lie, and the rest trains. That
    rule is inferred from the counts of the first release (500 validation images, 50 a class) and a few file names
    quoted in 2019; today's archives hold the same images in other folders.
    """
    valid = {f for f in files if (Path(f).name.startswith('ILSVRC2012_val_') if split == 'v1' else f.startswith('val/'))}
    if not valid: raise UsageError('split v1 validates on images named ILSVRC2012_val_*, and there are none; try --split v2')
    return [f for f in files if f not in valid], [f for f in files if f in valid]


def noisy_labels(path, pct):
    "{relative path: label} with `pct` percent of the training labels wrong, from the archive's noisy_*.csv."
    found = sorted(path.glob('noisy_*.csv'))
    if not found: raise UsageError(f'--pct-noise {pct}: no noisy_*.csv in {path}')
    with open(found[0], newline='') as f:
        labels = {row.get('path'): row.get(f'noisy_labels_{pct}') for row in csv.DictReader(f)}
    if not labels or None in labels or None in labels.values(): raise UsageError(f'{found[0]}: no columns path and noisy_labels_{pct}')
    return labels


# --- images ---

def epoch_draws(seed, epoch, n):
    "(order of `n` images, uniform draws (n, ATTEMPTS, 4) of their crops, flips (n,)) of one epoch."
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(n), rng.random((n, ATTEMPTS, 4)), rng.random(n) < 0.5


def crop_boxes(u, width, height):
    """(top, left, height, width) of random resized crops, as torchvision's RandomResizedCrop draws them.

    u (..., ATTEMPTS, 4): uniform draws of area, log ratio, top and left; `width`, `height`: of the images (...).
    The first attempt that fits is taken; if none does, the largest centre crop within RATIO.
    """
    width, height = np.asarray(width)[..., None], np.asarray(height)[..., None]
    area = width * height * (SCALE[0] + u[..., 0] * (SCALE[1] - SCALE[0]))
    ratio = np.exp(np.log(RATIO[0]) + u[..., 1] * (np.log(RATIO[1]) - np.log(RATIO[0])))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    top, left = np.floor(u[..., 2] * (height - h + 1)), np.floor(u[..., 3] * (width - w + 1))

    fall_w, fall_h = np.minimum(width, np.rint(height * RATIO[1])), np.minimum(height, np.rint(width / RATIO[0]))
    fallback = np.stack([(height - fall_h) // 2, (width - fall_w) // 2, fall_h, fall_w], -1)  # (..., 1, 4)
    boxes = np.concatenate([np.stack([top, left, h, w], -1), fallback], -2)
    first = np.where(fits.any(-1), fits.argmax(-1), fits.shape[-1])[..., None, None]
    return np.take_along_axis(boxes, first, -2)[..., 0, :].astype(int)


def read_image(file):
    "An image file as RGB; UsageError with its path if it cannot be read."
    try:
        with Image.open(file) as im: return im.convert('RGB')
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UsageError(f'{file}: cannot be read as an image ({" ".join(str(e).split()) or type(e).__name__})') from None


def train_image(im, size, u, flip):
    "The crop of a PIL image that the draws `u` (ATTEMPTS, 4) give, (size, size), flipped if `flip`."
    top, left, height, width = crop_boxes(u, *im.size).tolist()
    im = TF.resized_crop(im, top, left, height, width, [size, size], InterpolationMode.BILINEAR)
    return TF.hflip(im) if flip else im


def valid_image(im, size):
    "A PIL image with its short side at size + 32, then its centre crop (size, size)."
    return TF.center_crop(TF.resize(im, size + VALID_MARGIN, InterpolationMode.BILINEAR), [size, size])


class ImageFiles(torch.utils.data.Dataset):
    "(image uint8 (3, size, size), label) of files; with `seed`, training images as drawn for the current epoch."
    def __init__(self, path, files, labels, size, seed=None):
        self.path, self.files, self.labels, self.size, self.seed = path, files, labels, size, seed
        self.order = range(len(files))
        self.set_epoch(0)

    def __len__(self): return len(self.files)

    def set_epoch(self, epoch):
        "Draw order, crops and flips of `epoch`; without a seed nothing is random."
        if self.seed is not None: self.order, self.u, self.flip = epoch_draws(self.seed, epoch, len(self.files))

    def __getitem__(self, i):
        im = read_image(self.path / self.files[i])
        im = valid_image(im, self.size) if self.seed is None else train_image(im, self.size, self.u[i], self.flip[i])
        return torch.from_numpy(np.array(im)).permute(2, 0, 1), self.labels[i]  # (H, W, C) -> (C, H, W)


# --- batches ---

class ImageLoader(DataLoader):
    "fastai's DataLoader, in the order that the dataset draws, with the batches normalised on their device."
    def __init__(self, dataset, sh=0., **kwargs):
        super().__init__(dataset, **kwargs)
        self.erase = RandomErasing(p=0.3, max_count=3, sh=sh) if sh else None  # as in fastai's example script

    def get_idxs(self): return list(self.dataset.order)

    def after_batch(self, b):
        x, y = b
        mean, std = (x.new_tensor(s, dtype=torch.float).view(3, 1, 1) for s in (IMAGENET_MEAN, IMAGENET_STD))
        x = (x.float() / 255 - mean) / std
        x = x.contiguous(memory_format=torch.channels_last)
        if self.erase: x = self.erase(TensorImage(x), split_idx=0).as_subclass(torch.Tensor)
        return x, y


def get_dls(cfg, device='cpu'):
    "DataLoaders of a resolved `cfg`, with `vocab` (class names), `files` (of validation) and `fingerprint`."
    try:
        path = find_data(cfg)
        sizes = find_images(path)
        digest = fingerprint(sizes)
    except (OSError, UnicodeError) as e: raise UsageError(f'cannot read the data: {e}') from None
    train, valid = split_files(list(sizes), cfg.split)
    expected = IMAGES.get((cfg.dataset, cfg.split)) if not cfg.data else None
    if expected and len(sizes) != sum(expected):
        print(f'{path}: {len(sizes):,} of {sum(expected):,} images, not the full archive')
    elif expected and (len(train), len(valid)) != expected:
        counts = f'{len(train):,} + {len(valid):,} images, expected {expected[0]:,} + {expected[1]:,}'
        raise UsageError(f'{path}: split {cfg.split} gives {counts}; extract the archive anew')
    if len(train) < cfg.bs: raise UsageError(f'{path}: {len(train)} training images make no batch of {cfg.bs}; lower --bs')

    label = {f: Path(f).parent.name for f in sizes}
    vocab = sorted({label[f] for f in train})
    unknown = sorted({label[f] for f in valid} - set(vocab))
    if unknown: raise UsageError(f'{path}: class {", ".join(unknown)} of the validation images is not in training')
    if len(vocab) < 2: raise UsageError(f'{path}: one class only, {vocab[0]}; there is nothing to tell apart')
    if cfg.pct_noise:
        noisy = noisy_labels(path, cfg.pct_noise)
        missing = [f for f in train if f.startswith('train/') and noisy.get(f) not in vocab]
        if missing: raise UsageError(f'{path}: its noisy_*.csv has no label of ours for {missing[0]}')
        label |= {f: noisy.get(f, label[f]) for f in train}
    index = {name: i for i, name in enumerate(vocab)}
    labels = [index[label[f]] for f in train]

    shared = dict(bs=cfg.bs, num_workers=cfg.workers, pin_memory=torch.device(device).type == 'cuda')
    dls = DataLoaders(
        ImageLoader(ImageFiles(path, train, labels, cfg.size, cfg.seed), sh=cfg.sh, drop_last=True, **shared),
        ImageLoader(ImageFiles(path, valid, [index[label[f]] for f in valid], cfg.size), **shared),
        path=path, device=torch.device(device))
    dls.vocab, dls.files, dls.fingerprint = vocab, valid, digest
    return dls
