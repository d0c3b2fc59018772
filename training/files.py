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
VALIDATION = 'val', 'valid', 'validation', 'test'  # the first of them that has class folders validates
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
    if valid_pct and not ('train' in there and subfolders(path / 'train')): return there
    if 'train' not in there: raise UsageError(f'{path}: no folder train; {EXPECTED}{_hint(path, there)}')
    used = ['train', *validation_folders(path)[:1]]
    if valid_pct and len(used) > 1:
        raise UsageError(f'{path}: has a folder {used[1]} to validate on; leave --valid-pct out')
    if not valid_pct and len(used) < 2:
        empty = [name for name in VALIDATION if name in there]
        if not empty: raise UsageError(f'{path}: no folder val; {EXPECTED}')
        if subfolders(path / 'train'):
            raise UsageError(f'{path}: the folder {empty[0]} has no class folders, so it cannot validate; '
                             f'--valid-pct 0.2 validates on a part of train')
    return [f'{folder}/{label}' for folder in used for label in subfolders(path / folder)]


def validation_folders(path):
    "Returns those of VALIDATION that have class folders; the test images of a competition have none."
    return [name for name in VALIDATION if (path / name).is_dir() and subfolders(path / name)]


def _hint(path, there):
    """Returns a hint at the subfolder that has the folders that are looked for, or ''.

    An extracted archive often has one folder around the others.
    """
    inner = []
    for name in there:
        with suppress(OSError):
            if 'train' in subfolders(path / name): inner.append(name)
    return f'; did you mean {path / inner[0]}?' if inner else ''


def unused_folders(path):
    "Yields a line on each of VALIDATION beside a folder train that is not used."
    if not (path / 'train').is_dir(): return
    usable = validation_folders(path)
    for name in VALIDATION:
        if not (path / name).is_dir() or name in usable[:1]: continue
        yield f'the folder {name} is not used' + (', as it has no class folders' if name not in usable else '')


def _no_folder(path):
    "Returns why `path` is no folder, and what to do."
    if not path.exists(): return 'no such folder'
    if not path.is_file(): return 'not a folder'
    how = 'unzip' if zipfile.is_zipfile(path) else 'tar -xf' if tarfile.is_tarfile(path) else ''
    return f'an archive; extract it ({how} {path.name}) and name the folder that comes out' if how else 'not a folder'


# --- files ---

def walk(folder, prefix='', above=None):
    """Yields (path from `folder` on, behind `prefix`; os.DirEntry) of the files below a folder, however deep.

    Hidden ones are left out. A link to a folder is followed, but not to one of those `above`, which hold the folder.
    """
    if above is None: above = frozenset(map(os.path.realpath, (folder.absolute(), *folder.absolute().parents)))
    for entry in os.scandir(folder):
        if is_hidden(entry.name): continue
        if not entry.is_dir(): yield f'{prefix}{entry.name}', entry
        elif (real := os.path.realpath(entry.path)) not in above:
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
        with Image.open(file) as im:  # to decode an EPS takes another program, Ghostscript
            return not isinstance(im, ImageFile.StubImageFile) and im.format not in ('MPEG', 'EPS')
    except Exception: return False  # what foreign files make Pillow's readers raise has no end


def scan(path, valid_pct=0.):
    """Returns ({relative path: bytes} of the images, [other files]) of the class folders of `path`, both sorted.

    Images in subfolders of a class belong to it. A broken link has 0 bytes. Hidden files and folders are no data.
    """
    files, others, folders = {}, [], class_folders(path, valid_pct)
    for folder in folders:
        found = {}
        for name, entry in walk(path / folder, f'{folder}/'):
            if is_image(entry): found[name] = _bytes(entry)
            else: others.append(name)
        if not found: raise UsageError(f'{path / folder}: no images in this class folder')
        files |= found
    if not files: raise UsageError(f'{path}: no images in {"<class>/" if valid_pct else "train|val/<class>/"}')
    for folder in {os.path.dirname(folder) or '.' for folder in folders}:  # images beside the classes
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


def labels_of(files):
    "Returns {file: its class} from their paths: the folder below train or val, or the first one of a flat folder."
    # a class of a flat folder may be named train or test, too
    is_tree = any(file.startswith('train/') and file.count('/') > 1 for file in files)
    return {file: file.split('/')[1 if is_tree else 0] for file in files}


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
    if not valid and split == 'v1':
        raise UsageError('split v1 validates on images named ILSVRC2012_val_*, and there are none; try --split v2')
    if not valid: raise UsageError('there are no images to validate on')
    return [f for f in files if f not in valid], [f for f in files if f in valid]


def _drawn(files, part):
    "Yields the validation images of each class: those whose hashes come first."
    classes = {}
    for f, label in labels_of(files).items(): classes.setdefault(label, []).append(f)
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
