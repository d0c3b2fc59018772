import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, REPO, config

from command import UsageError
from experiments import Config, resolve
from training import data
from training.data import get_dls
from training.files import find_images, fingerprint, split_files
from training.images import read_image, valid_image

# --- files ---

def test_splits(tree):
    files = find_images(tree)
    train, valid = split_files(files, 'v2')
    assert (len(train), len(valid)) == (24, 12) and all(f.startswith('val/') for f in valid)
    train, valid = split_files(files, 'v1')
    assert (len(train), len(valid)) == (30, 6) and all('ILSVRC2012_val_' in f for f in valid)
    assert {f.split('/')[0] for f in valid} == {f.split('/')[0] for f in train} == {'train', 'val'}


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

def test_too_few_images_for_a_batch(tree):
    with pytest.raises(UsageError, match='30 training images make no batch of 64; lower --bs'):
        get_dls(config(tree, bs=64))


# --- batches ---

@pytest.mark.parametrize('loader', ['workers', 'device'])
def test_batches(tree, loader):
    train, valid = get_dls(config(tree, loader=loader)).loaders
    batches = list(train)
    assert len(batches) == len(train) == 5 and len(list(valid)) == 1
    x, y = batches[0]
    assert x.shape == (6, 3, 32, 32) and x.dtype == torch.float and x.is_contiguous(memory_format=torch.channels_last)
    x, y = next(iter(valid))
    assert y.tolist() == [0, 1, 2, 0, 1, 2]
    file = split_files(find_images(tree), 'v1')[1][0]
    pixels = torch.tensor(np.array(valid_image(read_image(tree / file), 32))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(x[0], (pixels - mean[:, None, None]) / std[:, None, None], atol=1e-6)


@pytest.mark.slow(4)
@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc')
def test_forked_loader_processes_hold_no_freed_memory_of_the_first_one(tree):
    code = ('import psutil, torch\n'
            'from experiments import Config, resolve\n'
            'from training import data, host\n'
            f'cfg = resolve(Config(dataset="custom", data={str(tree)!r}, size=32, bs=6, workers=1, loader="workers"))\n'
            'dls = data.get_dls(cfg, torch.device("cpu"))\n'
            'host.keep_memory()\n'
            'for host.trim_memory in (lambda: None, host.trim_memory):\n'
            '    [torch.ones(2**22) for _ in range(25)]\n'  # 400 MiB, freed at once
            '    batches = iter(dls.valid)\n'
            '    next(batches)\n'
            '    print(psutil.Process().children()[0].memory_info().rss)\n'
            '    del batches\n')
    done = subprocess.run([sys.executable, '-c', code], cwd=REPO, capture_output=True, text=True)
    kept, trimmed = map(int, done.stdout.splitlines()[-2:])
    assert kept - trimmed > 300 * 2**20


def test_an_epoch_holds_every_image_once_and_depends_on_seed_and_epoch(tree):
    def epoch(n, seed=0, workers=0):
        train = get_dls(config(tree, seed=seed, workers=workers)).train
        train.dataset.set_epoch(n)
        return torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])
    x, y = epoch(0)
    assert y.bincount().tolist() == [10, 10, 10]
    assert torch.equal(x, epoch(0)[0]) and torch.equal(x, epoch(0, workers=2)[0])  # not on the number of workers
    assert not torch.equal(x, epoch(1)[0]) and not torch.equal(x, epoch(0, seed=1)[0])


def test_both_loaders_give_the_same_images_in_the_same_order(tree):
    workers, device = (get_dls(config(tree, loader=loader)) for loader in ('workers', 'device'))
    assert (workers.loader, device.loader, get_dls(config(tree)).loader) == ('workers', 'device', 'workers')
    for epoch in (0, 1):
        for dls in (workers, device): dls.train.dataset.set_epoch(epoch)
        for (x, y), (x_, y_) in zip(workers.train, device.train, strict=True):
            assert torch.equal(y, y_) and (x - x_).abs().max() < 1.01 / 255 / 0.224  # a level
            assert (x != x_).float().mean() < 0.3
    for (x, y), (x_, y_) in zip(workers.valid, device.valid, strict=True):
        assert torch.equal(x, x_) and torch.equal(y, y_)


def test_images_are_decoded_once_for_many_runs_and_anew_when_they_change(tree):
    first, second = (get_dls(config(tree, loader='device', seed=seed)).train.dataset for seed in (0, 1))
    assert first.pixels is second.pixels and not np.array_equal(first.boxes, second.boxes)
    assert get_dls(config(tree, loader='device', bs=3)).train.dataset.pixels is first.pixels
    next((tree / 'val').rglob('*.JPEG')).unlink()
    assert get_dls(config(tree, loader='device')).train.dataset.pixels is not first.pixels


def test_images_of_before_are_gone_when_others_are_decoded(tree, monkeypatch):
    "Else the two together would not fit where each does."
    get_dls(config(tree, loader='device'))
    def bytes_left(*args): return 2**20 if not data._decoded else 0
    monkeypatch.setattr(data, 'device_bytes', bytes_left)
    assert get_dls(config(tree, loader='device', size=48)).loader == 'device'


def test_images_that_do_not_fit_on_the_device(tree, monkeypatch):
    monkeypatch.setattr(data, 'device_bytes', lambda *_: 1000)
    with pytest.raises(UsageError, match='MiB of decoded images; take --loader workers'):
        get_dls(config(tree, loader='device'))


def test_validation_images_count_among_those_that_are_to_fit_on_the_device(tree, monkeypatch):
    data._decoded.clear()
    dls = get_dls(config(tree, loader='device'))
    needed = dls.train.dataset.pixels.data.numel() + dls.valid.dataset.pixels.numel()
    for room in (needed, needed - 1):
        data._decoded.clear()
        monkeypatch.setattr(data, 'device_bytes', lambda *_, room=room: room)
        with contextlib.nullcontext() if room == needed else pytest.raises(UsageError, match='no room for'):
            get_dls(config(tree, loader='device'))
    def no_memory(*args): raise MemoryError('Unable to allocate 9 GiB')
    data._decoded.clear()
    monkeypatch.setattr(data, 'stack_valid_images', no_memory)
    monkeypatch.setattr(data, 'device_bytes', lambda *_: needed)
    with pytest.raises(UsageError, match='no room for Unable to allocate 9 GiB; take --loader workers'):
        get_dls(config(tree, loader='device'))


def test_auto_takes_loader_processes_where_a_gpu_has_no_room(tree, monkeypatch):
    def no_memory(*args): raise MemoryError('1 MiB')
    monkeypatch.setattr(data, 'decoded', no_memory)
    files = sorted(str(file.relative_to(tree)) for file in tree.rglob('*.JPEG'))
    def kind(**knobs):
        pairs = [(file, 0) for file in files]
        return data.loaders(config(tree, **knobs), tree, pairs, pairs[:6], 'f', torch.device('cuda', 0))[2]
    assert kind(loader='auto') == 'workers'
    with pytest.raises(UsageError, match='no room for 1 MiB'): kind(loader='device')


def test_validation_is_the_same_every_time(tree):
    dls = get_dls(config(tree))
    first = next(iter(dls.valid))[0]
    dls.train.dataset.set_epoch(1)
    assert torch.equal(first, next(iter(dls.valid))[0])


@pytest.mark.parametrize('loader', ['workers', 'device'])
def test_random_erasing_is_for_training_images_only(tree, loader):
    plain, erased = (get_dls(config(tree, loader=loader, sh=sh)) for sh in (0., 0.5))
    assert erased.train.erase.p == 0.3 and erased.valid.erase is None
    erased.train.erase.p = 1.
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(plain.train, erased.train))
    assert torch.equal(next(iter(plain.valid))[0], next(iter(erased.valid))[0])


def test_the_numbers_of_images_of_the_archives():
    assert data.N_IMAGES == {
        ('imagewoof', 'v1'): (12_454, 500), ('imagewoof', 'v2'): (9_025, 3_929),
        ('imagenette', 'v1'): (12_894, 500), ('imagenette', 'v2'): (9_469, 3_925)}


REAL = Path(os.environ.get('IMAGEWOOF_160', '~/.fastai/data/imagewoof2-160')).expanduser()


@pytest.mark.skipif(not REAL.exists(), reason='needs the archive: $IMAGEWOOF_160 or ~/.fastai/data/imagewoof2-160')
@pytest.mark.parametrize('split, counts', [('v1', (12_454, 500)), ('v2', (9_025, 3_929))])
def test_the_real_archive(split, counts):
    files = find_images(REAL)
    train, valid = split_files(files, split)
    assert (len(train), len(valid)) == counts == data.N_IMAGES['imagewoof', split]
    if split == 'v1': assert {sum(f.split('/')[1] == c for f in valid) for c in os.listdir(REAL / 'train')} == {50}
