"""Which images there are: the tree train|val/<class>/<image>, its splits and its labels. Standard library only."""
import csv
import hashlib
import os
from pathlib import Path

from command import UsageError

SUFFIXES = {'.jpeg', '.jpg', '.png', '.bmp', '.webp'}


def find_images(path):
    "{relative path: bytes} of the images in train|val/<class>/ of `path`, sorted."
    if not path.is_dir(): raise UsageError(f'{path}: {"not a folder" if path.exists() else "no such folder"}')
    files = {}
    for folder in ('train', 'val'):
        if not (path / folder).is_dir(): raise UsageError(f'{path}: no folder {folder}; expected train|val/<class>/<image>')
        for label in sorted(d.name for d in os.scandir(path / folder) if d.is_dir()):
            found = [f for f in os.scandir(path / folder / label) if Path(f.name).suffix.lower() in SUFFIXES]
            if not found: raise UsageError(f'{path / folder / label}: no images in this class folder')
            files |= {f'{folder}/{label}/{f.name}': f.stat().st_size for f in found}
    if not files: raise UsageError(f'{path}: no images in train|val/<class>/')
    return dict(sorted(files.items()))


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
