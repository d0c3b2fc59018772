"""Which images there are: the tree train|val/<class>/<image>, its splits and its labels.

It needs the standard library alone, so that a mistake in a command line is found before torch is imported.
"""
import csv
import hashlib
import os
from pathlib import Path

from command import UsageError

SUFFIXES = {'.jpeg', '.jpg', '.png', '.bmp', '.webp'}


def find_images(path):
    """Returns {relative path: bytes} of the images in train|val/<class>/ of `path`, sorted.

    Raises UsageError if there is no such tree, or if a class folder has no images.
    """
    if not path.is_dir(): raise UsageError(f'{path}: {"not a folder" if path.exists() else "no such folder"}')
    files = {}
    for folder in ('train', 'val'):
        if not (path / folder).is_dir():
            raise UsageError(f'{path}: no folder {folder}; expected train|val/<class>/<image>')
        for label in sorted(d.name for d in os.scandir(path / folder) if d.is_dir()):
            found = [f for f in os.scandir(path / folder / label) if Path(f.name).suffix.lower() in SUFFIXES]
            if not found: raise UsageError(f'{path / folder / label}: no images in this class folder')
            files |= {f'{folder}/{label}/{f.name}': f.stat().st_size for f in found}
    if not files: raise UsageError(f'{path}: no images in train|val/<class>/')
    return dict(sorted(files.items()))


def fingerprint(files):
    "Returns 12 hexadecimal digits of a hash of the paths and the sizes in {path: bytes}."
    lines = '\n'.join(f'{file}\t{n_bytes}' for file, n_bytes in files.items())
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def split_files(files, split):
    """Returns (training files, validation files) of the paths in `files`; raises UsageError if none validates.

    Split v2 goes by the folders. Under v1, the images named ILSVRC2012_val_* validate, wherever they lie, and the rest
    trains. That rule is inferred from the counts of the first release (500 validation images, 50 per class) and from a
    few file names quoted in 2019. Today's archives hold the same images in other folders.
    """
    def validates(file):
        if split == 'v1': return Path(file).name.startswith('ILSVRC2012_val_')
        return file.startswith('val/')
    train, valid = [f for f in files if not validates(f)], [f for f in files if validates(f)]
    if not valid:
        raise UsageError('split v1 validates on images named ILSVRC2012_val_*, and there are none; try --split v2')
    return train, valid


def noisy_labels(path, pct):
    """Returns {relative path: label}, `pct` percent of the training labels wrong, from the archive's noisy_*.csv.

    Raises UsageError if there is no such file, or if it lacks the columns.
    """
    found = sorted(path.glob('noisy_*.csv'))
    if not found: raise UsageError(f'--pct-noise {pct}: no noisy_*.csv in {path}')
    with open(found[0], newline='') as f:
        labels = {row.get('path'): row.get(f'noisy_labels_{pct}') for row in csv.DictReader(f)}
    if not labels or None in labels or None in labels.values():
        raise UsageError(f'{found[0]}: no columns path and noisy_labels_{pct}')
    return labels
