import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.transforms.transforms as tv_transforms
from conftest import CLASSES, make_image
from PIL import Image

import data
from data import crop_boxes, epoch_draws, fingerprint, get_dls, read_image, split_files, train_image, valid_image
from experiments import Config, UsageError, find_images, resolve


def config(tree, **kwargs): return resolve(Config(**dict(dataset='custom', data=str(tree), size=32, bs=6, workers=0, split='v1') | kwargs))


# --- crops ---

class Draws:
    "A stand-in for torch inside torchvision's RandomResizedCrop: hands out the uniform draws `u` (ATTEMPTS, 4)."
    def __init__(self, u):
        self.u = iter([(a, r) for a, r, _, _ in u]), u
        self.floats, self.attempt = iter([]), -1
    def empty(self, n):
        return SimpleNamespace(uniform_=self._uniform)
    def _uniform(self, low, high):
        try: value = next(self.floats)
        except StopIteration:
            self.attempt += 1
            self.floats = iter(next(self.u[0]))
            value = next(self.floats)
        self.places = iter(self.u[1][self.attempt][2:])
        return torch.tensor(low + value * (high - low), dtype=torch.double)
    def randint(self, low, high, size): return torch.tensor(low + math.floor(next(self.places) * (high - low)))
    def tensor(self, values): return torch.tensor(values, dtype=torch.double)
    log, exp = staticmethod(torch.log), staticmethod(torch.exp)


@pytest.mark.parametrize('size', [(160, 160), (213, 160), (160, 500), (1000, 40), (20, 300), (1, 1)])
def test_crops_are_torchvisions(size, monkeypatch):
    rng = np.random.default_rng(0)
    for u in rng.random((200, data.ATTEMPTS, 4)):
        monkeypatch.setattr(tv_transforms, 'torch', Draws(u))
        expected = tv_transforms.RandomResizedCrop.get_params(Image.new('RGB', size), list(data.SCALE), list(data.RATIO))
        assert crop_boxes(u, *size).tolist() == list(expected)


def test_crops_of_many_images_at_once():
    u = np.random.default_rng(1).random((50, data.ATTEMPTS, 4))
    width, height = np.arange(100, 150), np.arange(200, 150, -1)
    boxes = crop_boxes(u, width, height)
    assert boxes.tolist() == [crop_boxes(*args).tolist() for args in zip(u, width, height)]
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    area = h * w / (width * height)
    assert 0.34 < area.min() < 0.45 and area.max() > 0.85


def test_a_crop_is_cut_then_resized_then_flipped():
    im = make_image(0, (60, 40))
    u = np.random.default_rng(2).random((data.ATTEMPTS, 4))
    top, left, h, w = crop_boxes(u, 60, 40).tolist()
    expected = im.crop((left, top, left + w, top + h)).resize((32, 32), Image.BILINEAR)
    assert np.array_equal(train_image(im, 32, u, False), expected)
    assert np.array_equal(train_image(im, 32, u, True), np.array(expected)[:, ::-1])


def test_validation_resizes_the_short_side_to_size_plus_32_and_cuts_the_centre():
    im = make_image(0, (300, 200))
    expected = im.resize((240, 160), Image.BILINEAR).crop((56, 16, 184, 144))
    assert np.array_equal(valid_image(im, 128), expected)
    im = im.resize((240, 160))  # at 128 px the 160 px archive is not resized
    assert np.array_equal(valid_image(im, 128), im.crop((56, 16, 184, 144)))
    assert np.array_equal(valid_image(im.transpose(Image.TRANSPOSE), 128), im.transpose(Image.TRANSPOSE).crop((16, 56, 144, 184)))


def test_draws_of_an_epoch_depend_on_seed_and_epoch_alone():
    order, u, flip = epoch_draws(0, 3, 100)
    again = epoch_draws(0, 3, 100)
    assert all(np.array_equal(a, b) for a, b in zip((order, u, flip), again))
    assert sorted(order) == list(range(100)) and 30 < flip.sum() < 70
    for other in (epoch_draws(1, 3, 100), epoch_draws(0, 4, 100)):
        assert not np.array_equal(order, other[0]) and not np.array_equal(u, other[1])


# --- files ---

def test_greyscale_palette_and_alpha_become_rgb(tmp_path):
    im = make_image(0)
    for mode in ('L', 'P', 'RGBA', 'CMYK', 'I;16'):
        file = tmp_path / f'{mode[0]}.{"jpeg" if mode == "CMYK" else "png"}'
        (Image.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10)) if mode == 'I;16' else im.convert(mode)).save(file)
        assert read_image(file).mode == 'RGB'
    grey = np.array(read_image(tmp_path / 'L.png'))
    assert (grey == np.array(im.convert('L'))[..., None]).all()


def test_splits(tree):
    files = find_images(tree)
    train, valid = split_files(files, 'v2')
    assert (len(train), len(valid)) == (24, 12) and all(f.startswith('val/') for f in valid)
    train, valid = split_files(files, 'v1')
    assert (len(train), len(valid)) == (30, 6) and all('ILSVRC2012_val_' in f for f in valid)
    assert {f.split('/')[0] for f in valid} == {f.split('/')[0] for f in train} == {'train', 'val'}


def test_counts_of_a_full_archive_are_checked(tree, monkeypatch, capsys):
    monkeypatch.setattr(data, 'find_data', lambda cfg: tree)
    cfg = replace(config(tree), dataset='imagewoof', data='')
    for counts, message in [((30, 6), ''), ((100, 6), '36 of 106 images, not the full archive')]:
        monkeypatch.setattr(data, 'IMAGES', {('imagewoof', 'v1'): counts})
        get_dls(cfg)
        assert message in capsys.readouterr().out
    monkeypatch.setattr(data, 'IMAGES', {('imagewoof', 'v1'): (31, 5)})
    with pytest.raises(UsageError, match=r'30 \+ 6 images, expected 31 \+ 5'): get_dls(cfg)


def test_fingerprint_is_of_paths_and_sizes(tree):
    first = fingerprint(find_images(tree))
    assert first == fingerprint(find_images(tree)) and len(first) == 12
    file = next((tree / 'train').rglob('*.JPEG'))
    file.write_bytes(file.read_bytes() + b'\0')
    second = fingerprint(find_images(tree))
    file.rename(file.with_name('other.JPEG'))
    assert len({first, second, fingerprint(find_images(tree))}) == 3


@pytest.mark.parametrize('size, source', [(128, '160'), (129, '320'), (224, '320'), (256, 'full')])
def test_archive_by_size(size, source):
    assert resolve(Config(size=size)).source == source
    assert resolve(Config(size=size, source='320')).source == '320'


def test_digits(fastai_home):
    path = data.digits()
    assert path == fastai_home / 'data' / 'digits' == data.digits()
    train, valid = split_files(find_images(path), 'v2')
    assert (len(train), len(valid)) == (1437, 360)
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    for i in (0, 7, 1795):
        im = np.array(read_image(next(path.rglob(f'*/{labels[i]}/{i:04d}.png'))))
        assert np.array_equal(im[2:-2, 2:-2, 0], np.round(images[i].reshape(8, 8) * 255 / 16)) and im[:2].max() == 0


def test_noisy_labels_are_for_training_images_only(tree):
    cfg = config(tree, split='v2', pct_noise=5)
    with pytest.raises(UsageError, match=r'no noisy_\*\.csv'): get_dls(cfg)
    files = list(find_images(tree))
    wrong = {f: CLASSES[(CLASSES.index(f.split('/')[1]) + 1) % 3] for f in files}
    lines = [f'{f},{f.split("/")[1]},{wrong[f]}' for f in files]
    (tree / 'noisy_set.csv').write_text('\n'.join(['path,noisy_labels_0,noisy_labels_5', *lines]))
    train, valid = get_dls(cfg).loaders
    assert [CLASSES[y] for y in train.dataset.labels] == [wrong[f] for f in train.dataset.files]
    assert [CLASSES[y] for y in valid.dataset.labels] == [f.split('/')[1] for f in valid.dataset.files]


@pytest.mark.parametrize('lines, words', [
    ([], 'no columns'), (['path,noisy_labels_1', 'a,b'], 'no columns'),
    (['path,noisy_labels_5', 'elsewhere.JPEG,n02086240'], 'no label of ours'),
    (['path,noisy_labels_5', 'train/n02086240/ILSVRC2012_val_0000_train.JPEG,n0'], 'no label of ours'),
])
def test_noisy_labels_that_fit_nothing_are_refused(tree, lines, words):
    (tree / 'noisy_set.csv').write_text('\n'.join(lines))
    with pytest.raises(UsageError, match=words): get_dls(config(tree, split='v2', pct_noise=5))


# --- mistakes ---

@pytest.mark.parametrize('spoil, words', [
    (lambda t: t.rename(t.with_name('gone')), 'no such folder'),
    (lambda t: (t / 'val').rename(t / 'test'), 'no folder val'),
    (lambda t: [f.unlink() for f in (t / 'val' / CLASSES[0]).iterdir()], f'{CLASSES[0]}: no images'),
    (lambda t: [f.unlink() for f in t.rglob('ILSVRC*')], 'try --split v2'),
    (lambda t: (t / 'train' / CLASSES[0]).rename(t / 'train' / 'n09'), 'n02086240 of the validation images is not in training'),
    (lambda t: (t / 'val' / CLASSES[0] / 'gone.png').symlink_to('nowhere'), 'cannot read the data: .*gone.png'),
    (lambda t: [shutil.rmtree(t / f / c) for f in ('train', 'val') for c in CLASSES[1:]], 'one class only'),
    (lambda t: (shutil.rmtree(t), t.touch()), 'not a folder'),
])
def test_folders_that_cannot_be_used(tree, spoil, words):
    spoil(tree)
    with pytest.raises(UsageError, match=words): get_dls(config(tree, split='v2' if 'n02' in words and 'not in' in words else 'v1'))


def test_too_few_images_for_a_batch(tree):
    with pytest.raises(UsageError, match='30 training images make no batch of 64; lower --bs'): get_dls(config(tree, bs=64))


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('content', [b'', b'not an image', 'half'])
def test_an_unreadable_image_is_named(tree, workers, content):
    file = tree / 'train' / CLASSES[1] / f'{CLASSES[1]}_train3.JPEG'
    file.write_bytes(file.read_bytes()[:300] if content == 'half' else content)
    with pytest.raises(UsageError) as e: list(get_dls(config(tree, workers=workers)).train)
    assert str(e.value).startswith(f'{file}: cannot be read as an image') and '\n' not in str(e.value)


def test_no_network_says_where_to_put_the_archive(monkeypatch, fastai_home):
    def fail(url): raise URLError('no route to host')
    monkeypatch.setattr(data, 'untar_data', fail)
    with pytest.raises(UsageError) as e: data.find_data(resolve(Config(dataset='imagewoof')))
    assert str(fastai_home / 'archive' / 'imagewoof2-160.tgz') in str(e.value) and '\n' not in str(e.value)


# --- batches ---

def test_batches(tree):
    train, valid = get_dls(config(tree)).loaders
    batches = list(train)
    assert len(batches) == len(train) == 5 and len(list(valid)) == 1
    x, y = batches[0]
    assert x.shape == (6, 3, 32, 32) and x.dtype == torch.float and x.is_contiguous(memory_format=torch.channels_last)
    x, y = next(iter(valid))
    assert y.tolist() == [0, 1, 2, 0, 1, 2]
    pixels = torch.tensor(np.array(valid_image(read_image(tree / valid.dataset.files[0]), 32))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(x[0], (pixels - mean[:, None, None]) / std[:, None, None], atol=1e-6)


def test_an_epoch_holds_every_image_once_and_depends_on_seed_and_epoch(tree):
    def epoch(n, seed=0, workers=0):
        train = get_dls(config(tree, seed=seed, workers=workers)).train
        train.dataset.set_epoch(n)
        return torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])
    x, y = epoch(0)
    assert y.bincount().tolist() == [10, 10, 10]
    assert torch.equal(x, epoch(0)[0]) and torch.equal(x, epoch(0, workers=2)[0])  # not on the number of workers
    assert not torch.equal(x, epoch(1)[0]) and not torch.equal(x, epoch(0, seed=1)[0])


def test_validation_is_the_same_every_time(tree):
    dls = get_dls(config(tree))
    first = next(iter(dls.valid))[0]
    dls.train.dataset.set_epoch(1)
    assert torch.equal(first, next(iter(dls.valid))[0])


def test_random_erasing_is_for_training_images_only(tree):
    plain, erased = get_dls(config(tree)), get_dls(config(tree, sh=0.5))
    assert erased.train.erase.p == 0.3 and erased.valid.erase is None
    erased.train.erase.p = 1.
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(plain.train, erased.train))
    assert torch.equal(next(iter(plain.valid))[0], next(iter(erased.valid))[0])


REAL = Path(os.environ.get('IMAGEWOOF_160', '~/.fastai/data/imagewoof2-160')).expanduser()


@pytest.mark.skipif(not REAL.exists(), reason='needs the archive: $IMAGEWOOF_160 or ~/.fastai/data/imagewoof2-160')
@pytest.mark.parametrize('split, counts', [('v1', (12_454, 500)), ('v2', (9_025, 3_929))])
def test_the_real_archive(split, counts):
    files = find_images(REAL)
    train, valid = split_files(files, split)
    assert (len(train), len(valid)) == counts == data.IMAGES['imagewoof', split]
    if split == 'v1': assert {sum(f.split('/')[1] == c for f in valid) for c in os.listdir(REAL / 'train')} == {50}
