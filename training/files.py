"""Finds the images of a tree train|val/<class>/<image> or of a flat folder of classes, their splits and their labels.

Standard library only; Pillow is asked where a suffix does not say whether a file is an image.
"""
import csv
import hashlib
import os
import tarfile
import unicodedata
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

from command import UsageError

SUFFIXES = {'.jpeg', '.jpg', '.jpe', '.jfif', '.png', '.apng', '.bmp', '.webp', '.gif', '.tif', '.tiff', '.avif',
            '.ppm', '.pgm'}
VALIDATION = 'val', 'valid', 'validation', 'test'  # the first of them that is there validates
NO_DATA = {'__macosx', 'thumbs.db', 'ehthumbs.db', 'desktop.ini', '@eadir', '$recycle.bin', 'lost+found'}
EXPECTED = 'expected train|val/<class>/<image> (or valid, validation, test), or with --valid-pct 0.2 folders of classes'


# --- folders ---

def is_hidden(name):
    """Returns whether a file or folder of this name is one that systems and programs leave.

    Such are .ipynb_checkpoints, ._a.jpg, Thumbs.db.
    """
    return name.startswith('.') or name.lower() in NO_DATA


def subfolders(path): return sorted(e.name for e in os.scandir(path) if e.is_dir() and not is_hidden(e.name))


def class_folders(path, valid_pct=0.):
    """Returns the folders of one class each, relative to `path`: train/cat, val/cat.

    With `valid_pct` they are train/cat alone, or cat in a flat folder.

    Raises UsageError where the folders are others.
    """
    if not path.is_dir(): raise UsageError(f'{path}: {_no_folder(path)}')
    there = subfolders(path)
    valid = next((name for name in VALIDATION if name in there), None)
    if valid_pct and 'train' in there and valid:
        raise UsageError(f'{path}: has a folder {valid} to validate on; leave --valid-pct out')
    if valid_pct and not valid and 'train' not in there: return there
    needed = ['train'] if valid_pct else ['train', valid or 'val']
    missing = [name for name in needed if name not in there]
    if missing: raise UsageError(f'{path}: no folder {missing[0]}; {EXPECTED}{_hint(path, there)}')
    return [f'{folder}/{label}' for folder in needed for label in subfolders(path / folder)]


def _hint(path, there):
    """Returns a hint at the subfolder that has the folders that are looked for, or ''.

    An extracted archive often has one folder around the others.
    """
    inner = []
    for name in there:
        with suppress(OSError): inner += [name] * ('train' in subfolders(path / name))
    return f'; did you mean {path / inner[0]}?' if inner else ''


def unused_folders(path):
    "Returns the validation folders that are not used."
    return [name for name in VALIDATION if name in subfolders(path)][1:] if (path / 'train').is_dir() else []


def _no_folder(path):
    "Returns why `path` is no folder, and what to do."
    if not path.exists(): return 'no such folder'
    if not path.is_file(): return 'not a folder'
    how = 'unzip' if zipfile.is_zipfile(path) else 'tar -xf' if tarfile.is_tarfile(path) else ''
    return f'an archive; extract it ({how} {path.name}) and name the folder that comes out' if how else 'not a folder'


# --- files ---

def walk(folder, prefix='', above=frozenset()):
    """Yields (path from `folder` on, behind `prefix`; os.DirEntry) of the files below a folder, however deep.

    Hidden ones are left out.
    """
    for entry in os.scandir(folder):
        if is_hidden(entry.name): continue
        if not entry.is_dir(): yield f'{prefix}{entry.name}', entry
        elif (real := os.path.realpath(entry.path)) not in above:  # else a link that leads back to where it lies
            yield from walk(entry.path, f'{prefix}{entry.name}/', above | {real})


def is_image(entry):
    """Returns whether a file is an image by its suffix, or else by what Pillow finds in it.

    A broken link counts by its suffix.
    """
    if Path(entry.name).suffix.lower() in SUFFIXES: return entry.is_file() or entry.is_symlink()
    return entry.is_file() and _opens(entry.path)


def _opens(file):
    "Returns whether Pillow can open and decode the kind of a file."
    from PIL import Image, ImageFile
    try:
        with Image.open(file) as im: return not isinstance(im, ImageFile.StubImageFile) and im.format != 'MPEG'
    except Exception: return False  # what foreign files make Pillow's readers raise has no end


def scan(path, valid_pct=0.):
    """Returns ({relative path: bytes} of the images, [other files]) of the class folders of `path`, both sorted.

    Images in subfolders of a class belong to it. A broken link has 0 bytes. Hidden files and folders are no data.
    """
    files, others = {}, []
    for folder in class_folders(path, valid_pct):
        found = {}
        for name, entry in walk(path / folder, f'{folder}/'):
            if is_image(entry): found[name] = _bytes(entry)
            else: others.append(name)
        if not found: raise UsageError(f'{path / folder}: no images in this class folder')
        files |= found
    if not files: raise UsageError(f'{path}: no images in {"<class>/" if valid_pct else "train|val/<class>/"}')
    tops = {f.split('/')[0] for f in files} & {'train', *VALIDATION}
    for folder in tops or {'.'}:  # images beside the classes
        others += [os.path.normpath(f'{folder}/{e.name}') for e in os.scandir(path / folder) if e.is_file()
                   and not is_hidden(e.name) and Path(e.name).suffix.lower() in SUFFIXES]
    return dict(sorted(files.items())), sorted(others)


def _bytes(entry):
    try: return entry.stat().st_size
    except OSError: return 0


def find_images(path, valid_pct=0.):
    "Returns the images of `path`, see `scan`."
    return scan(path, valid_pct)[0]


def left_out(others):
    "Returns a line on the files that are no images, or ''."
    if not others: return ''
    kinds = Counter(Path(f).suffix.lower() or 'without a suffix' for f in others)
    listed = ', '.join(f'{n} {kind}' for kind, n in kinds.most_common(5)) + ', ...' * (len(kinds) > 5)
    words = '1 file is' if len(others) == 1 else f'{len(others):,} files are'
    return f'{words} left out, no images that Pillow can open, or in no class ({listed}; the first: {others[0]})'


def label_of(file):
    "Returns the class of a file from its path: the folder below train or val, or the first one of a flat folder."
    first, second, *_ = file.split('/')
    return second if first in ('train', *VALIDATION) else first


def same_but_for_case(name, names):
    """Returns the one of `names` that is `name` but for case or the way its accents are stored.

    It is None if there is none.
    """
    def plain(s): return unicodedata.normalize('NFC', s).casefold()
    return next((other for other in names if other != name and plain(other) == plain(name)), None)


def fingerprint(files):
    """Returns 12 hexadecimal digits of the paths and sizes of {path: bytes}.

    This is for an archive of ours, whose paths and sizes stand for its content.

    The images of a user have 16 digits, of paths and content: check.fingerprint.
    """
    return hashlib.sha256('\n'.join(f'{f}\t{n}' for f, n in files.items()).encode()).hexdigest()[:12]


# --- splits and labels ---

def split_files(files, split, valid_pct=0.):
    """Returns (training files, validation files) of the paths in `files`.

    v2: by their folder. v1: those named ILSVRC2012_val_* validate, wherever they lie, and the rest trains. That
    rule is inferred from the counts of the first release (500 validation images, 50 a class) and a few file names
    quoted in 2019; today's archives hold the same images in other folders.
    With `valid_pct`: that part of each class, at least one, is drawn by a hash of the paths. It is the same one for all
    seeds, so that arms and repetitions are compared on the same images.
    """
    if valid_pct: valid = set(_drawn(files, valid_pct))
    elif split == 'v1': valid = {f for f in files if Path(f).name.startswith('ILSVRC2012_val_')}
    else: valid = {f for f in files if f.split('/')[0] in VALIDATION}
    if not valid:
        raise UsageError('split v1 validates on images named ILSVRC2012_val_*, and there are none; try --split v2')
    return [f for f in files if f not in valid], [f for f in files if f in valid]


def _drawn(files, part):
    "Yields the validation images of each class: those whose hashes come first."
    classes = {}
    for f in files: classes.setdefault(label_of(f), []).append(f)
    for label, mine in classes.items():
        if len(mine) < 2:
            only = f'class {label} has one image only, which cannot both train and validate'
            raise UsageError(f'--valid-pct {part:g}: {only}')
        n = min(len(mine) - 1, max(1, round(part * len(mine))))
        yield from sorted(mine, key=lambda f: hashlib.sha256(f.encode()).digest())[:n]


def noisy_labels(path, pct):
    """Returns {relative path: label}, `pct` percent of the training labels wrong, from the archive's noisy_*.csv.

    Raises UsageError if there is no such file, or if it lacks the columns.
    """
    found = sorted(path.glob('noisy_*.csv'))
    if not found: raise UsageError(f'--pct-noise {pct}: no noisy_*.csv in {path}')
    with open(found[0], newline='', encoding='utf-8') as f:
        labels = {row.get('path'): row.get(f'noisy_labels_{pct}') for row in csv.DictReader(f)}
    if not labels or None in labels or None in labels.values():
        raise UsageError(f'{found[0]}: no columns path and noisy_labels_{pct}')
    return labels
