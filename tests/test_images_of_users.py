"""Images and folders are here as people have them: of each case what is trained on, and what the user reads.

tests/IMAGES.md has the table.
"""
import errno
import fcntl
import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, REPO, config, make_image
from fastai.data.external import fastai_cfg
from filelock import Timeout
from PIL import Image

import command as command_module
import runlog
from command import Busy, UsageError
from experiments import NETWORKS, Config, resolve
from training import check, checkpoint, data, images
from training.data import find_set, get_dls
from training.files import find_images, fingerprint, is_hidden, labels_of, scan, split_files
from training.images import Pixels, inspect, read_image, stack_valid_images, upright_size_of
from training.loop import Loop
from training.machine import settle

TINY = '--size', 32, '--bs', 6, '--arch', 'xresnet18', '--epochs', 1, '--workers', 0


@pytest.fixture
def memory(tmp_path, monkeypatch):
    "What is found in images is remembered in a folder of the test's own."
    monkeypatch.setattr(data, 'looks_folder', lambda: tmp_path / 'memory')
    return tmp_path / 'memory'


@pytest.fixture(autouse=True)
def lines_are_said_anew(): command_module.say_once.cache_clear()


def both_loaders(files):
    "The RGB arrays of `files`, checked to be the same, whole, in the loader of a device."
    arrays = [np.asarray(read_image(f)) for f in files]
    pixels = Pixels(files, torch.device('cpu'))
    for i, a in enumerate(arrays):
        assert (pixels.height[i], pixels.width[i]) == a.shape[:2]
        assert np.array_equal(pixels.data[pixels.start[i]:pixels.start[i + 1]].reshape(a.shape), a)
    return arrays


def png(path, array, colour):
    "Write an array of 16-bit values (h, w) or (h, w, c) as a PNG of that colour type; Pillow cannot."
    h, w = array.shape[:2]
    def chunk(name, body):
        return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in array)
    head = struct.pack('>IIBBBBB', w, h, 16, colour, 0, 0, 0)
    chunks = chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunks)


RAMP = np.linspace(0, 65535, 60 * 48).astype(np.uint16).reshape(48, 60)


# --- values ---

@pytest.mark.parametrize('save', [
    lambda f: Image.fromarray(RAMP).save(f.with_suffix('.png')),
    lambda f: Image.fromarray(RAMP).save(f.with_suffix('.tif')),
    lambda f: f.with_suffix('.pgm').write_bytes(b'P5 60 48 65535\n' + RAMP.astype('>u2').tobytes()),
    lambda f: png(f.with_suffix('.png'), RAMP, 0), lambda f: png(f.with_suffix('.png'), np.stack([RAMP] * 3, -1), 2),
    lambda f: png(f.with_suffix('.png'), np.stack([RAMP, RAMP], -1), 4),
    lambda f: Image.frombytes('I;16B', (60, 48), RAMP.astype('>u2').tobytes()).save(f.with_suffix('.tif')),
], ids=['png', 'tiff', 'pgm', 'png by hand', 'rgb png', 'grey and alpha', 'I;16B'])
def test_16_bits_are_their_upper_8(tmp_path, save):
    save(tmp_path / 'x')
    array, = both_loaders(list(tmp_path.iterdir()))
    assert np.array_equal(array, np.repeat(RAMP[..., None] >> 8, 3, -1)) and 127 < array.mean() < 128


def test_floats_from_0_to_1_are_taken_and_others_refused(tmp_path):
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(tmp_path / 'x.tif')
    array, = both_loaders([tmp_path / 'x.tif'])
    assert np.array_equal(array[..., 0], np.rint((RAMP / 65535).astype(np.float32) * 255))
    for wrong in (RAMP / 255, RAMP / 65535 - 0.5, RAMP * np.nan):
        Image.fromarray(wrong.astype(np.float32)).save(tmp_path / 'x.tif')
        with pytest.raises(UsageError, match='not from 0 to 1; save it with 8 or 16 bits'):
            read_image(tmp_path / 'x.tif')


def test_32_bit_integers_are_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / 'x.tif')
    with pytest.raises(UsageError, match=r'x\.tif: cannot be read .*32-bit integers.*save it with 8 or 16 bits'):
        read_image(tmp_path / 'x.tif')


def test_black_and_white_is_black_and_white(tmp_path):
    make_image(0).convert('1').save(tmp_path / 'x.png')
    array, = both_loaders([tmp_path / 'x.png'])
    assert set(np.unique(array)) == {0, 255}


def test_cmyk_is_read_as_browsers_do_also_without_adobes_marker(tmp_path):
    im = make_image(0)
    # Pillow writes it inverted, with Adobe's marker, as Photoshop does.
    im.convert('CMYK').save(tmp_path / 'x.jpg', quality=95)
    body = (tmp_path / 'x.jpg').read_bytes()
    at = body.index(b'\xff\xee')
    assert body[at + 4:at + 9] == b'Adobe'
    (tmp_path / 'y.jpg').write_bytes(body[:at] + body[at + 2 + int.from_bytes(body[at + 2:at + 4], 'big'):])
    for array in both_loaders([tmp_path / 'x.jpg', tmp_path / 'y.jpg']):
        assert np.abs(array.astype(int) - np.asarray(im)).mean() < 12


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparency_is_dropped_and_said(tmp_path, tree, mode, memory, capsys):
    im = make_image(0)
    clear = im.convert('P') if mode == 'P' else im.convert(mode)
    if mode != 'P': clear.putalpha(0)
    clear.save(tree / 'train' / CLASSES[0] / 'clear.png', **dict(transparency=0) if mode == 'P' else {})
    array, = both_loaders([tree / 'train' / CLASSES[0] / 'clear.png'])
    assert np.array_equal(array, im.convert({'RGBA': 'RGB', 'LA': 'L', 'P': 'P'}[mode]).convert('RGB'))
    get_dls(config(tree))
    assert '1 of 37 images with transparency, which is dropped' in capsys.readouterr().out


# --- orientation ---

@pytest.mark.parametrize('kind', ['jpg', 'png', 'webp', 'tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photo_is_turned_as_its_exif_orientation_says(tmp_path, kind, orientation):
    upright, exif = make_image(0), Image.Exif()
    exif[0x0112] = orientation
    # What turns an upright image to lie as the camera had it.
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    lying = upright if back is None else upright.transpose(back)
    options = dict(jpg=dict(quality=100, subsampling=0), webp=dict(lossless=True)).get(kind, {})
    lying.save(tmp_path / f'x.{kind}', exif=exif, **options)
    array, = both_loaders([tmp_path / f'x.{kind}'])
    assert array.shape == (48, 60, 3) and np.abs(array.astype(int) - np.asarray(upright)).mean() < 2
    assert upright_size_of(tmp_path / f'x.{kind}') == (60, 48)
    assert inspect(io.BytesIO((tmp_path / f'x.{kind}').read_bytes())) == ('turned' if orientation > 1 else '')
    ready = images.valid_image(read_image(tmp_path / f'x.{kind}'), 32)
    assert np.array_equal(stack_valid_images([tmp_path / f'x.{kind}'], 32)[0], np.asarray(ready))


@pytest.mark.parametrize('exif', [
    b'Exif\0\0', b'Exif\0\0garbage', b'Exif\0\0II*\0\xff\xff\xff\xff', b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12',
])
def test_damaged_exif_data_cost_no_image(tmp_path, exif):
    make_image(0).save(tmp_path / 'x.jpg', exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert both_loaders([tmp_path / 'x.jpg'])[0].shape == (48, 60, 3)


def test_orientations_are_counted_on_a_line(tree, memory, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2): make_image(i).save(tree / 'train' / CLASSES[0] / f'{i}.jpg', exif=exif)
    get_dls(config(tree))
    assert f'{tree}: 2 of 38 images turned as the EXIF orientation says\n' in capsys.readouterr().out


# --- frames and sizes ---

@pytest.mark.parametrize('kind', ['gif', 'webp', 'png', 'tif'])
def test_the_first_frame_of_an_animation_counts(tmp_path, kind):
    frames = [Image.new('RGB', (40, 30), colour) for colour in ('red', 'blue', 'green')]
    options = dict(lossless=True) if kind == 'webp' else {}
    frames[0].save(tmp_path / f'x.{kind}', save_all=True, append_images=frames[1:], **options)
    array, = both_loaders([tmp_path / f'x.{kind}'])
    assert (array == [255, 0, 0]).all()
    assert 'frames' in inspect(io.BytesIO((tmp_path / f'x.{kind}').read_bytes()))


@pytest.mark.parametrize('size', [(1, 1), (1, 900), (900, 1), (3, 2000)])
@pytest.mark.parametrize('loader', ['workers', 'device'])
def test_tiny_and_thin_images_train(tree, size, loader, memory):
    for folder in ('train', 'val'): make_image(0, size).save(tree / folder / CLASSES[1] / 'odd.png')
    for batches in get_dls(config(tree, loader=loader)).loaders:
        for x, _ in batches: assert x.shape[1:] == (3, 32, 32) and x.isfinite().all()


@pytest.mark.parametrize('limit, shape', [(60 * 48, (48, 60)), (60 * 48 - 1, (24, 30)), (500, (12, 15)), (60, (6, 8))])
def test_a_large_jpeg_is_read_at_a_lower_resolution(tmp_path, limit, shape, monkeypatch):
    monkeypatch.setattr(images, 'LARGE', limit)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)  # it refuses at twice that
    make_image(0).save(tmp_path / 'x.jpg')
    assert both_loaders([tmp_path / 'x.jpg'])[0].shape[:2] == shape
    assert inspect(io.BytesIO((tmp_path / 'x.jpg').read_bytes())) == ('large' if limit < 60 * 48 else '')


def test_a_large_png_is_refused_with_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    make_image(0).save(tmp_path / 'x.png')
    with pytest.raises(UsageError, match=r'x\.png: cannot be read .*2880 pixels\) exceeds limit of 2000 pixels'):
        read_image(tmp_path / 'x.png')


def test_a_jpeg_of_14000_pixels_a_side_is_read(tmp_path):
    Image.new('L', (14_000, 14_000), 77).save(tmp_path / 'x.jpg')
    im = read_image(tmp_path / 'x.jpg')
    assert im.size == (7000, 7000) and im.getpixel((3000, 3000)) == (77, 77, 77)


# --- names and folders ---

def test_images_of_all_suffixes_are_found_and_the_rest_is_counted(tree, memory, capsys):
    folder = tree / 'train' / CLASSES[0]
    for name in ('a.tif', 'b.gif', 'c.jpe', 'd.JPG', 'e.jfif'):
        make_image(0).save(folder / name, format='GIF' if 'gif' in name else 'PNG')
    make_image(0).save(folder / 'no_suffix', format='JPEG')
    make_image(0).save(folder / 'picture.img', format='PNG')
    (folder / 'labels.txt').write_text('a,b')
    (folder / 'notes').write_text('none')
    make_image(0).save(folder / 'drawing.eps')  # Pillow needs Ghostscript for it
    os.mkfifo(folder / 'pipe.png')
    make_image(0).save(tree / 'train' / 'stray.png')
    files, others = scan(tree)
    found = {f'train/{CLASSES[0]}/{name}' for name in ('no_suffix', 'picture.img', 'a.tif')}
    assert len(files) == 36 + 7 and found < files.keys()
    assert [Path(f).name for f in others] == ['drawing.eps', 'labels.txt', 'notes', 'pipe.png', 'stray.png']
    get_dls(config(tree))
    assert f'{tree}: 5 files are left out' in capsys.readouterr().out
    get_dls(config(tree))
    assert 'left out' not in capsys.readouterr().out  # said once


@pytest.mark.parametrize('name', ['.ipynb_checkpoints', '__MACOSX', '._a.jpg', 'Thumbs.db', '.DS_Store', 'desktop.ini',
                                  '@eaDir'])
def test_what_systems_leave_is_no_data(tree, name):
    before = scan(tree)
    assert is_hidden(name)
    for folder in (tree, tree / 'train', tree / 'val', tree / 'train' / CLASSES[0]):
        (folder / name).mkdir()
        make_image(0).save(folder / name / 'x.png')
    assert scan(tree) == before
    for folder in (tree / 'train', tree / 'val' / CLASSES[0]):
        shutil.rmtree(folder / name, ignore_errors=True)
        make_image(0).save(folder / name, format='PNG')
    assert scan(tree) == before


def test_images_in_subfolders_belong_to_their_class(tree, memory):
    deep = tree / 'train' / CLASSES[2] / 'by year' / '2019'
    deep.mkdir(parents=True)
    make_image(0).save(deep / 'x.png')
    dls = get_dls(config(tree))
    at = dls.train.dataset.files.index(f'train/{CLASSES[2]}/by year/2019/x.png')
    assert dls.train.dataset.labels[at] == 2 and list(dls.vocab) == CLASSES


def test_links_are_followed_but_not_in_a_circle(tree, tmp_path, monkeypatch):
    (tree / 'train' / CLASSES[0]).rename(tmp_path / 'elsewhere')
    (tree / 'train' / CLASSES[0]).symlink_to(tmp_path / 'elsewhere')
    before = find_images(tree)
    assert len(before) == 36
    for folder in (tree / 'train' / c for c in CLASSES[:2]):  # the first is a link, the second a folder
        for name, to in dict(back=folder, up='..', out=tree, top=tree.parent).items(): (folder / name).symlink_to(to)
    assert find_images(tree) == before
    monkeypatch.chdir(tree)
    assert find_images(Path('.')) == before


@pytest.mark.parametrize('name', ['mit Leerzeichen, und Komma', 'größe', '犬', "it's", '100%', '#1'])
def test_names_of_all_kinds_are_read(tree, name, memory):
    for folder in ('train', 'val'):
        (tree / folder / CLASSES[0]).rename(tree / folder / name)
        make_image(0).save(tree / folder / name / f'{name}.png')
    for loader in ('workers', 'device'):
        dls = get_dls(config(tree, split='v2', loader=loader))
        assert name in dls.vocab and f'val/{name}/{name}.png' in dls.valid_files
        assert sum(len(y) for _, y in dls.valid) == 13 and len(list(dls.train)) == 4


def test_classes_that_differ_in_case_alone_are_pointed_at(tree, memory):
    (tree / 'val' / CLASSES[0]).rename(tree / 'val' / CLASSES[0].upper())
    words = f'class {CLASSES[0].upper()} of the validation images is not in training; it has {CLASSES[0]} there'
    with pytest.raises(UsageError, match=words):
        get_dls(config(tree, split='v2'))


def test_accents_stored_in_two_ways_are_pointed_at(tree, memory):
    (tree / 'train' / CLASSES[0]).rename(tree / 'train' / 'caf\u00e9')
    (tree / 'val' / CLASSES[0]).rename(tree / 'val' / 'cafe\u0301')
    with pytest.raises(UsageError, match='it has caf\u00e9 there'): get_dls(config(tree, split='v2'))


def test_one_image_a_class_trains(tmp_path, memory, command):
    for folder in ('train', 'val'):
        for c in range(3):
            (tmp_path / 'set' / folder / f'{c}').mkdir(parents=True)
            make_image(c).save(tmp_path / 'set' / folder / f'{c}' / '0.png')
    code, out, _ = command('--data', tmp_path / 'set', *TINY, '--bs', 3)
    assert code == 0 and '3 of 3 validation images are training images too: val/0/0.png is train/0/0.png' in out


def test_a_thousand_classes(tmp_path, memory):
    pixel = io.BytesIO()
    make_image(0, (1, 1)).save(pixel, format='PNG')
    for folder in ('train', 'val'):
        for c in range(1000):
            (tmp_path / 'set' / folder / f'{c:03d}').mkdir(parents=True)
            (tmp_path / 'set' / folder / f'{c:03d}' / '0.png').write_bytes(pixel.getvalue())
    dls = get_dls(config(tmp_path / 'set', split='v2'))
    assert len(dls.vocab) == 1000 and dls.train.dataset.labels == tuple(range(1000))


# --- splits ---

@pytest.mark.parametrize('name', ['val', 'valid', 'validation', 'test'])
def test_validation_folders_of_other_names(tree, name, memory):
    (tree / 'val').rename(tree / name)
    dls = get_dls(config(tree, split='v2'))
    assert (len(dls.train.dataset.files), len(dls.valid_files)) == (24, 12)
    assert all(f.startswith(f'{name}/') for f in dls.valid_files)


def test_of_valid_and_test_valid_validates_and_it_is_said(tree, memory, capsys):
    shutil.copytree(tree / 'val', tree / 'test')
    dls = get_dls(config(tree, split='v2'))
    assert all(f.startswith('val/') for f in dls.valid_files)
    assert 'the folder test is not used' in capsys.readouterr().out


def test_test_images_without_classes_do_not_validate(tree, memory, capsys):
    shutil.rmtree(tree / 'val')
    (tree / 'test').mkdir()
    make_image(0).save(tree / 'test' / '1.png')
    words = 'the folder test has no class folders, so it cannot validate; --valid-pct 0.2 validates on a part of train'
    with pytest.raises(UsageError, match=words): get_dls(config(tree, split='v2'))
    dls = get_dls(config(tree, split='v2', valid_pct=0.25))
    assert (len(dls.train.dataset.files), len(dls.valid_files)) == (18, 6)
    assert 'the folder test is not used, as it has no class folders' in capsys.readouterr().out
    shutil.copytree(tree / 'train', tree / 'validation')
    assert all(f.startswith('validation/') for f in get_dls(config(tree, split='v2')).valid_files)
    with pytest.raises(UsageError, match='there are no images to validate on'): split_files(['train/cat/1.png'], 'v2')


@pytest.mark.parametrize('name', ['test', 'val', 'train'])
def test_a_class_of_a_flat_folder_may_have_the_name_of_a_split(tree, name, memory, capsys):
    flat = tree / 'train'
    (flat / CLASSES[0]).rename(flat / name)
    dls = get_dls(config(flat, split='v2', valid_pct=0.25))
    assert list(dls.vocab) == sorted([name, *CLASSES[1:]]) and len(dls.valid_files) == 6
    assert 'left out' not in capsys.readouterr().out


def test_a_flat_folder_of_classes_is_split_by_valid_pct(tree, memory):
    flat = tree / 'train'
    with pytest.raises(UsageError, match=r'no folder train; .*--valid-pct 0\.2'): get_dls(config(flat, split='v2'))
    dls = get_dls(config(flat, split='v2', valid_pct=0.25))
    assert (len(dls.train.dataset.files), len(dls.valid_files)) == (18, 6)
    assert list(labels_of(dls.valid_files).values()) == [c for c in CLASSES for _ in range(2)]  # of each class
    again, other = (get_dls(config(flat, split='v2', seed=7, valid_pct=part)) for part in (0.25, 0.5))
    assert again.valid_files == dls.valid_files and again.fingerprint == dls.fingerprint  # whatever the seed of the run
    assert set(dls.valid_files) < set(other.valid_files) and other.fingerprint != dls.fingerprint


def test_a_loop_tells_arms_apart_that_split_a_folder_in_two_ways(tree, memory):
    loop = SimpleNamespace(device=torch.device('cpu'), fingerprints={}, args=SimpleNamespace(dry_run=False))
    parts = [Loop.settled(loop, config(tree / 'train', split='v2', valid_pct=part))[1] for part in (0.25, 0.5)]
    assert [fingerprint.rpartition('-')[2] for fingerprint in parts] == ['0.25', '0.5']


def test_a_folder_train_without_another_is_split_by_valid_pct(tree, memory):
    with pytest.raises(UsageError, match='has a folder val to validate on; leave --valid-pct out'):
        find_images(tree, 0.2)
    shutil.rmtree(tree / 'val')
    dls = get_dls(config(tree, split='v2', valid_pct=0.01))
    assert (len(dls.train.dataset.files), len(dls.valid_files)) == (21, 3)  # one a class at least


def test_valid_pct_that_cannot_be(tree):
    with pytest.raises(UsageError, match='--valid-pct: with --data only'): Config(valid_pct=0.2)
    with pytest.raises(UsageError, match='give one of them'): config(tree, split='v1', valid_pct=0.2)
    for dataset in ('imagewoof', 'imagenette', 'custom'):  # its images may lie in another folder, without a split
        assert resolve(Config(dataset=dataset, data=str(tree), valid_pct=0.2)).split == 'v2'
    with pytest.raises(UsageError, match='must be below 1'): config(tree, split='v2', valid_pct=1.)
    with pytest.raises(UsageError, match='class cat has one image only'): split_files(['cat/1.png'], 'v2', 0.2)


@pytest.mark.parametrize('kind', ['zip', 'gztar'])
def test_an_archive_is_answered_by_how_to_extract_it(tree, tmp_path, kind):
    file = shutil.make_archive(str(tmp_path / 'x'), kind, tree)
    how = 'unzip x.zip' if kind == 'zip' else r'tar -xf x.tar.gz'
    with pytest.raises(UsageError, match=rf'an archive; extract it \({how}\) and name the folder'):
        find_images(Path(file))


def test_the_folder_above_the_right_one_is_answered_by_it(tree):
    with pytest.raises(UsageError, match=f'did you mean {tree}\\?'): find_images(tree.parent)


def test_a_tilde_is_the_home_folder(tree, monkeypatch):
    monkeypatch.setenv('HOME', str(tree.parent))
    assert config('~/set').data == str(tree)


# --- damage ---

def spoil(tree):
    "Damages of four kinds, in train and val."
    folder = tree / 'train' / CLASSES[0]
    (folder / 'cut.jpg').write_bytes((next(folder.glob('*.JPEG'))).read_bytes()[:-200])
    (folder / 'text.png').write_text('no image')
    (tree / 'val' / CLASSES[1] / 'gone.png').symlink_to('nowhere')
    make_image(0).save(folder / 'x.png')
    os.rename(folder / 'x.png', os.fsencode(folder) + b'/\xff.png')


@pytest.mark.parametrize('loader', ['workers', 'device'])
def test_all_damaged_images_are_listed_before_the_first_step(tree, memory, command, tmp_path, loader):
    spoil(tree)
    code, out, err = command('--data', tree, *TINY, '--loader', loader)
    assert code == 2 and err.count('\n') == 1 and '4 of 40 images cannot be read: ' in err and 'accuracy' not in out
    for words in ('cut.jpg (image file is truncated', 'text.png (cannot identify image file)',
                  'gone.png (a broken link)', r'\udcff.png (its name is not UTF-8)',
                  'let --skip-damaged train without them'): assert words in err
    assert runlog.load(tmp_path / 'results' / 'runs.csv').empty


@pytest.mark.parametrize('loader', ['workers', 'device'])
def test_skip_damaged_trains_without_them_and_counts_them(tree, memory, command, tmp_path, loader):
    clean = find_set(config(tree)).fingerprint
    spoil(tree)
    code, out, err = command('--data', tree, *TINY, '--loader', loader, '--skip-damaged')
    assert code == 0 and '4 damaged images are left out' in out, err
    row = runlog.load(tmp_path / 'results' / 'runs.csv').iloc[0]
    assert (row.status, row.n_train, row.n_val, row.n_skipped, row.skip_damaged) == ('ok', 24, 12, 4, 1)
    assert row.data_fingerprint == clean


def test_a_class_without_a_sound_image_is_not_skipped(tree, memory):
    for f in (tree / 'train' / CLASSES[0]).iterdir(): f.write_bytes(b'')
    for f in (tree / 'val' / CLASSES[0]).iterdir(): f.write_bytes(b'')
    with pytest.raises(UsageError, match=f'no image of the class {CLASSES[0]} can be read'):
        find_set(config(tree, skip_damaged=1))


def test_archives_of_ours_are_not_opened_beforehand(tree, monkeypatch):
    monkeypatch.setattr(data, 'find_data', lambda cfg: tree)
    monkeypatch.setattr(check, 'look', None)
    found = find_set(resolve(Config(dataset='imagewoof', split='v2')))
    assert found.fingerprint == fingerprint(find_images(tree)) and len(found.fingerprint) == 12 and found.skipped == 0


# --- fingerprint ---

def test_the_fingerprint_sees_content_of_the_same_size(tree, memory):
    file = tree / 'train' / CLASSES[0] / 'x.bmp'
    make_image(0).save(file)
    first, sizes = find_set(config(tree)).fingerprint, fingerprint(find_images(tree))
    make_image(1).save(file)
    second = find_set(config(tree)).fingerprint
    assert len(first) == 16 and first != second and sizes == fingerprint(find_images(tree))
    make_image(0).save(file)
    assert find_set(config(tree)).fingerprint == first


def test_what_was_found_is_remembered_until_a_file_changes(tree, memory, monkeypatch):
    looked = []
    def look(file):
        looked.append(Path(file).name)
        return before(file)
    before = check.look
    monkeypatch.setattr(check, 'look', look)
    first = find_set(config(tree))
    assert len(looked) == 36 and find_set(config(tree)) == first and len(looked) == 36
    file = next((tree / 'val').rglob('*.JPEG'))
    times = file.stat()
    file.write_bytes(bytes(times.st_size))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p leaves it
    with pytest.raises(UsageError, match='1 of 36 images cannot be read'): find_set(config(tree))
    assert looked[36:] == [file.name]
    for kept in memory.iterdir(): kept.write_text('{"damaged')
    with pytest.raises(UsageError, match='1 of 36'): find_set(config(tree))
    assert len(looked) == 37 + 36


@pytest.mark.parametrize('where, error', [
    ((Path, 'read_bytes'), OSError(errno.EMFILE, 'Too many open files')), ((check, 'inspect'), MemoryError()),
    ((check, 'inspect'), OSError(errno.EIO, 'Input/output error')),
])
def test_a_fault_of_the_system_is_not_remembered_as_damage(tree, memory, monkeypatch, where, error):
    def fail(*args): raise error
    with monkeypatch.context() as m:
        m.setattr(*where, fail)
        with pytest.raises(UsageError, match='36 of 36 images cannot be read'): find_set(config(tree))
        with pytest.raises(UsageError, match='which is no damage; try again'): find_set(config(tree, skip_damaged=1))
    assert find_set(config(tree)).skipped == 0


def test_images_of_the_record_keep_their_fingerprint(tree, memory, monkeypatch):
    digest = find_set(config(tree)).fingerprint
    monkeypatch.setattr(check, 'KNOWN', {digest: fingerprint(find_images(tree))})
    assert find_set(config(tree)).fingerprint == fingerprint(find_images(tree))


def test_the_images_of_the_record_are_those_of_its_page():
    page = (REPO / 'results' / 'README.md').read_text(encoding='utf-8')
    named = re.findall(r'^\| ([0-9a-f]{12}) \| `(.*)`, rebuilt \|$', page, re.M)
    assert dict(named) == {'5880ca44b220': 'imagewoof2-160', '7a7293228448': 'imagewoof2-320',
                           '22be7e3ebe16': 'imagenette2-160'}
    assert set(check.KNOWN.values()) == set(dict(named)) and {len(digest) for digest in check.KNOWN} == {16}


REAL = Path(os.environ.get('IMAGEWOOF_160', '~/.fastai/data/imagewoof2-160')).expanduser()


@pytest.mark.skipif(not REAL.exists(), reason='needs the archive: $IMAGEWOOF_160 or ~/.fastai/data/imagewoof2-160')
def test_the_archive_named_by_data_has_the_fingerprint_of_the_record(memory):
    found = find_set(resolve(Config(dataset='imagewoof', data=str(REAL))))
    assert found.fingerprint == fingerprint(found.files)
    # Nothing of it is read in another way than before.
    assert not any(seen.kinds or seen.damage for seen in found.looks.values())


# --- machines ---

@pytest.mark.parametrize('free, n', [(10**9, 4), (12 * 64 * 3 * 128**2, 4), (6 * 64 * (3 * 128**2 + 8), 2), (10**6, 0)])
def test_a_small_shared_memory_has_fewer_loader_processes(free, n, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(free, 0, free))
    assert data.n_workers(resolve(Config(workers=4)), tmp_path) == n
    assert ('docker run --shm-size' in capsys.readouterr().out) == (n < 4)
    assert data.n_workers(resolve(Config(workers=4)), tmp_path / 'none') == 4


def test_the_row_has_the_loader_processes_that_there_were(tree, memory, monkeypatch, command, tmp_path):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**4, 0, 10**4))
    code, out, _ = command('--data', tree, *TINY, '--workers', 2)
    assert code == 0 and 'room for the batches of 0 of 2' in out
    assert runlog.load(tmp_path / 'results' / 'runs.csv').workers.tolist() == [0]


# --- what the command says, and how it ends ---

def run_python(code, **options):
    "The outcome of a Python process that runs `code` in the repository."
    environment = os.environ | {'PYTHONPATH': str(REPO)} | options.pop('env', {})
    return subprocess.run([sys.executable, '-c', code], cwd=REPO, env=environment, capture_output=True, timeout=120,
                          **options)


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252'])
def test_no_output_fails_by_its_encoding(encoding):
    code = ('import sys, command\n'
            'def work(): print("caf\\u00e9 \\u2192 \\u72ac \\udcff"); raise command.UsageError("no \\u2192")\n'
            'sys.exit(command.exit_code("x", work))')
    out = run_python(code, env={'PYTHONIOENCODING': encoding, 'PYTHONUTF8': '0'})
    assert out.returncode == 2 and br'\u2192 \u72ac \udcff' in out.stdout and out.stderr.strip() == br'x: no \u2192'


@pytest.mark.parametrize('name', ['SIGHUP', 'SIGUSR1', 'SIGTERM', 'SIGINT'])
def test_signals_that_end_a_run_let_it_write_its_row(name):
    code = ('import signal, sys, command\n'
            'def work():\n'
            '    command.stop_on_signals()\n'
            f'    try: signal.raise_signal(signal.{name})\n'
            '    finally: print("row")\n'
            'sys.exit(command.exit_code("x", work))')
    out = run_python(code)
    assert out.returncode == 128 + getattr(signal, name) and out.stdout == b'row\n' and not out.stderr


@pytest.mark.parametrize('name', ['SIGHUP', 'SIGINT'])
def test_signals_that_are_ignored_stay_so(name):
    code = ('import signal, sys, command\n'
            f'signal.signal(signal.{name}, signal.SIG_IGN)\n'
            'def work():\n'
            '    command.stop_on_signals()\n'
            f'    signal.raise_signal(signal.{name})\n'
            f'    with command.undisturbed(): signal.raise_signal(signal.{name})\n'
            '    print("went on", command.Stopped.by)\n'
            'sys.exit(command.exit_code("x", work) or 0)')
    out = run_python(code)
    assert out.returncode == 0 and out.stdout == b'went on 0\n', out.stderr


def test_save_of_a_run_that_diverges_is_said(tree, memory, command, tmp_path):
    (tmp_path / 'model.pt').write_text('of an earlier run')
    code, out, err = command('--data', tree, *TINY, '--lr', '1e30', '--save', tmp_path / 'model.pt')
    assert code == 0 and 'diverged' in out
    file = tmp_path / 'model.pt'
    assert err == f'--save {file}: not written, as the run is diverged; the file there is of an earlier run\n'


@pytest.mark.parametrize('asked, said', [('bf16', True), ('no', False), ('fp32', False)])
def test_the_precision_of_accelerate_launch_is_said_not_to_count(asked, said, monkeypatch, capsys):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', asked)
    assert settle(Config(), torch.device('cpu')).precision == 'fp32'
    words = 'accelerate asks for bf16, which has no effect here: this run is in fp32; --precision bf16'
    assert (words in capsys.readouterr().out) == said


def test_a_place_of_attention_survives_a_spreadsheet():
    for arch in ('xresnet101', 'xresnet152'):
        cfg = Config(arch=arch, attention='simple', sa_at='3.10,3.1,3.20')
        assert cfg.places == [(3, 1), (3, 10), (3, 20)]
        assert cfg.sa_at == '3.1,3b10,3b20' and replace(cfg, sa_at=cfg.sa_at) == cfg
        for block in range(NETWORKS[arch][1][2] - 1):
            text = replace(cfg, sa_at=f'3.{block}').sa_at
            read_back = f'{float(text):g}' if text.replace('.', '').isdigit() else text
            assert replace(cfg, sa_at=read_back).places == [(3, block)]


def test_an_older_row_has_the_place_that_it_had(tmp_path):
    rows = ['run_id,status,arch,attention,sa_at', 'a,ok,xresnet101,simple,"1.0,3.10,3.2"', 'b,ok,xresnet101,simple,3',
            'c,ok,xresnet101,simple,3.0', 'd,ok,xresnet101,none,2', '']
    (tmp_path / 'runs.csv').write_text('\n'.join(rows), encoding='utf-8')
    runs = runlog.load(tmp_path / 'runs.csv')
    assert runs.sa_at.tolist() == ['1b0,3b10,3.2', '3', '3b0', '1']
    cfg = Config(arch='xresnet101', attention='simple', sa_at='3.0')
    assert (cfg.sa_at, cfg.places) == ('3b0', [(3, 0)])
    assert resolve(replace(cfg, attention='none')) == resolve(Config(arch='xresnet101'))  # there it is one setting


# --- homes and file systems ---

@pytest.mark.parametrize('content', [b'', b'garbage', b'[DEFAULT]\n', b'\xff\xfe[DEFAULT]', b'[DEFAULT]\nda'])
def test_a_damaged_config_of_fastai_is_one_line(tmp_path, content, monkeypatch, command, tree):
    (tmp_path / 'config.ini').write_bytes(content)
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    fastai_cfg.cache_clear()
    try:
        code, _, err = command('--woof', *TINY)
        assert code == 2 and f'{tmp_path / "config.ini"}: damaged (' in err and err.count('\n') == 1, err
        assert data.looks_folder() is None and find_set(config(tree)).skipped == 0  # images of one's own need no home
    finally: fastai_cfg.cache_clear()


@pytest.mark.skipif(not hasattr(os, 'getuid') or os.getuid() != 0, reason='only root can take another user id')
@pytest.mark.parametrize('start, words', [
    ('', '/no-such-home: cannot be written (Permission denied)'),
    ('del os.environ["HOME"], os.environ["FASTAI_HOME"]', '~/.fastai: cannot be written (there is no home folder)'),
])
def test_without_a_home_the_way_on_is_named(tmp_path, start, words, monkeypatch):
    tmp_path.chmod(0o777)
    monkeypatch.delenv('USER', raising=False)
    monkeypatch.delenv('LOGNAME', raising=False)
    code = (f'import os\n{start}\n'
            'from training import data\n'
            'import matplotlib, getpass\n'
            'assert getpass.getuser() == "54321"\n'
            'assert os.access(matplotlib.get_cachedir(), os.W_OK) and data.looks_folder() is None\n'
            'try: data.home("data")\n'
            'except data.UsageError as e: print(e)')
    try: out = run_python(code, user=54321, env={'HOME': '/', 'TMPDIR': str(tmp_path), 'FASTAI_HOME': '/no-such-home'})
    except PermissionError: pytest.skip('another user cannot start this Python')
    assert out.returncode == 0 and f'{words}; name another folder by FASTAI_HOME' in out.stdout.decode(), out.stderr
    assert not out.stderr, out.stderr


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_lock_that_a_dead_machine_has_left_is_named(tmp_path, monkeypatch, number):
    def no_lock(*args): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, 'flock', no_lock)
    with runlog.locked(tmp_path / 'x.lock'), pytest.raises(Busy, match=r'; if none is, remove .*x\.lock\.held$'):
        checkpoint.lock(tmp_path / 'x.pt', 0)


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_holds_a_record(tmp_path, monkeypatch, capsys, number):
    def no_lock(*args): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, 'flock', no_lock)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        for i in range(2):
            runlog.check(tmp_path)
            runlog.append(dict(run_id=f'r{i}', status='ok'), tmp_path)
    assert runlog.load(tmp_path / 'runs.csv').run_id.tolist() == ['r0', 'r1']
    told = capsys.readouterr().err
    assert told.count('its file system has no locks') == told.count('\n') <= 1
    with runlog.locked(tmp_path / 'x.lock'), pytest.raises(Timeout): runlog.take_lock(tmp_path / 'x.lock', 0)
