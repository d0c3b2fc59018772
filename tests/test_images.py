import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.transforms as tv_transforms
from conftest import make_image
from PIL import Image
from tqdm import tqdm

from command import UsageError
from training import images
from training.images import (
    Pixels,
    crop_boxes,
    epoch_draws,
    filters,
    parts,
    read_image,
    stack_valid_images,
    train_image,
    valid_image,
)

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA'))]


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
    for u in rng.random((200, images.ATTEMPTS, 4)):
        monkeypatch.setattr(tv_transforms, 'torch', Draws(u))
        expected = tv_transforms.RandomResizedCrop.get_params(Image.new('RGB', size), [0.35, 1.], [3 / 4, 4 / 3])
        assert crop_boxes(u, *size).tolist() == list(expected)


def test_crops_of_many_images_at_once():
    u = np.random.default_rng(1).random((50, images.ATTEMPTS, 4))
    width, height = np.arange(100, 150), np.arange(200, 150, -1)
    boxes = crop_boxes(u, width, height)
    assert boxes.tolist() == [crop_boxes(*args).tolist() for args in zip(u, width, height)]
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    area = h * w / (width * height)
    assert 0.34 < area.min() < 0.45 and area.max() > 0.85


def test_a_crop_is_cut_then_resized_then_flipped():
    im = make_image(0, (60, 40))
    u = np.random.default_rng(2).random((images.ATTEMPTS, 4))
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
    tall = im.transpose(Image.TRANSPOSE)
    assert np.array_equal(valid_image(tall, 128), tall.crop((16, 56, 144, 184)))


def test_draws_of_an_epoch_depend_on_seed_and_epoch_alone():
    order, u, flip = epoch_draws(0, 3, 100)
    again = epoch_draws(0, 3, 100)
    assert all(np.array_equal(a, b) for a, b in zip((order, u, flip), again))
    assert sorted(order) == list(range(100)) and 30 < flip.sum() < 70
    for other in (epoch_draws(1, 3, 100), epoch_draws(0, 4, 100)):
        assert not np.array_equal(order, other[0]) and not np.array_equal(u, other[1])


def test_greyscale_palette_and_alpha_become_rgb(tmp_path):
    im = make_image(0)
    for mode in ('L', 'P', 'RGBA', 'CMYK', 'I;16'):
        file = tmp_path / f'{mode[0]}.{"jpeg" if mode == "CMYK" else "png"}'
        grey = Image.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10))
        (grey if mode == 'I;16' else im.convert(mode)).save(file)
        assert read_image(file).mode == 'RGB'
    grey = np.array(read_image(tmp_path / 'L.png'))
    assert (grey == np.array(im.convert('L'))[..., None]).all()


# --- a set of them on a device ---

SIZES = [(60, 48), (48, 60), (200, 50), (33, 33), (7, 9), (1, 1), (120, 130), (64, 64)]


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(tmp_path / f'{i}.png')
    return [tmp_path / f'{i}.png' for i in range(len(SIZES))]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('size', [32, 64])
def test_crops_on_a_device_are_pillows_within_a_level(files, size, device):
    pixels = Pixels(files, torch.device(device))
    which = np.arange(len(files))
    for epoch in range(5):
        order, u, flip = epoch_draws(0, epoch, len(files))
        x = pixels.crops(order, crop_boxes(u, pixels.width, pixels.height)[order], flip[order], size)
        expected = np.stack([np.array(train_image(read_image(files[i]), size, u[i], flip[i])) for i in order])
        assert x.dtype == torch.uint8 and x.is_contiguous(memory_format=torch.channels_last)
        off = np.abs(x.permute(0, 2, 3, 1).cpu().numpy().astype(int) - expected)
        assert off.max() <= 1 and (off > 0).mean() < 0.15
    whole = np.stack([0 * which, 0 * which, pixels.height, pixels.width], 1)[3:4]
    x = pixels.crops(which[3:4], whole, np.array([False]), 33)  # neither cut nor resized: to the bit
    assert np.array_equal(x[0].permute(1, 2, 0).cpu(), np.array(read_image(files[3])))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('most', [1, 20_000])
def test_crops_in_parts_are_those_of_the_whole_batch_within_a_level(files, most, device, monkeypatch):
    pixels = Pixels(files, torch.device(device))
    order, u, flip = epoch_draws(0, 0, len(files))
    batch = order, crop_boxes(u, pixels.width, pixels.height)[order], flip[order], 32
    whole = pixels.crops(*batch)
    monkeypatch.setattr(images, 'parts', lambda boxes: parts(boxes, most))
    x = pixels.crops(*batch)
    assert x.shape == whole.shape and x.dtype == torch.uint8 and x.is_contiguous(memory_format=torch.channels_last)
    off = (x.int() - whole.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01


@pytest.mark.parametrize('most', [1, 100, 5_000, 2**24])
def test_parts_hold_each_box_once_and_are_bounded(most):
    boxes = np.random.default_rng(0).integers(1, 60, (64, 4))
    boxes[5, 2:] = 2848, 4288
    groups = parts(boxes, most)
    assert sorted(np.concatenate(groups)) == list(range(64))
    for group in groups: assert len(group) == 1 or len(group) * boxes[group, 2].max() * boxes[group, 3].max() <= most
    assert len(groups) <= 2 or most < 2**24, 'one large image is not padded to'
    assert [list(group) for group in parts(boxes[6:])] == [list(range(58))], 'a batch that fits stays as it is'


@pytest.mark.parametrize('length', [1, 7, 33, 64, 200])
def test_filters_are_pillows_for_one_row(length):
    row = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8)
    expected = np.array(Image.fromarray(row[None]).resize((64, 1), Image.BILINEAR))[0]
    padded = torch.tensor(np.pad(row, (0, 210 - length))).double()
    ours = filters(torch.tensor([[[length]]]), 210, 64)[0].double() @ padded
    assert np.abs(ours.numpy() - expected).max() <= 0.51


def test_stacked_validation_images_are_pillows_to_the_bit(files):
    stacked = stack_valid_images(files, 40)
    assert all(np.array_equal(a, valid_image(read_image(f), 40)) for a, f in zip(stacked, files, strict=True))


def test_a_set_that_does_not_fit_is_not_decoded(files, monkeypatch):
    monkeypatch.setattr(images, 'read_image', None)
    with pytest.raises(MemoryError, match='MiB'): Pixels(files, 'cpu', limit=3 * sum(w * h for w, h in SIZES) - 1)


def test_an_unreadable_file_of_a_set_is_named(files):
    files[2].write_bytes(files[2].read_bytes()[:200])
    for read in (lambda: Pixels(files, 'cpu'), lambda: stack_valid_images(files, 32)):
        with pytest.raises(UsageError, match=r'2\.png: cannot be read'): read()


def test_decoding_shows_a_bar_in_a_terminal_only(monkeypatch, capsys):
    "And only where it takes longer than two seconds."
    class Terminal(io.StringIO):
        def isatty(self): return True
    for stream, delay, shown in ((Terminal(), 0, True), (Terminal(), 2, False), (io.StringIO(), 0, False)):
        monkeypatch.setattr(images, 'tqdm', lambda *args, file=stream, wait=delay, **kwargs: tqdm(
            *args, **kwargs | dict(file=file, delay=wait)))
        assert list(images.bar(iter('abc'), 3, 'decoding')) == ['a', 'b', 'c']
        assert ('decoding' in stream.getvalue()) == shown
