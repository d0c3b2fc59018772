"""Treats images as the 2019 source fed them: how a file is read, and how a crop is drawn and resized.

A training image is a random resized crop (area 0.35 to 1, ratio 3/4 to 4/3) by Pillow's bilinear filter, and flipped
half the time. A validation image has its short side resized to size + 32, and is the centre crop of that.

`read_image` turns any file that Pillow opens into upright 8-bit RGB: 16 bits become their upper 8, the EXIF orientation
is applied, transparency is dropped as torchvision and timm drop it, and only the first frame of an animation counts.

`train_image` does so with Pillow, for one image. `Pixels` keeps a whole set decoded on a device and does it there for a
batch, each image with its own crop: Pillow's filter is separable and linear, so a crop is `rows @ image @ columns`, two
batched matrix products. The same pixels within a level of 255: some versions of Pillow round the rows first.
"""
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from tqdm import tqdm

from command import UsageError, is_local_rank_0
from training.host import n_threads

SCALE, RATIO, ATTEMPTS = (0.35, 1.), (3 / 4, 4 / 3), 10  # of the random resized crop
VALID_MARGIN = 32  # pixels by which a validation image is larger than its centre crop


# --- draws ---

def epoch_draws(seed, epoch, n):
    "Returns (order of `n` images (n,), uniform draws (n, ATTEMPTS, 4) for their crops, flips (n,)) of one epoch."
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(n), rng.random((n, ATTEMPTS, 4)), rng.random(n) < 0.5


def crop_boxes(u, width, height):
    """Returns (top, left, height, width) (..., 4) of random resized crops, drawn as in torchvision's RandomResizedCrop.

    u              uniform draws (..., ATTEMPTS, 4) of area, log ratio, top and left
    width, height  those of the images (...), in pixels

    The first attempt that fits is taken. If none does, the crop is the largest centre crop within RATIO.
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


# --- one image ---

TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
         6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}  # by EXIF orientation
JPEG = 'JPEG', 'MPO'
SIDEWAYS = TURNS[5], TURNS[6], TURNS[7], TURNS[8]
LARGE = 89_478_485  # pixels, beyond which Pillow warns: a JPEG is decoded at 1/2, 1/4 or 1/8 of its sides
KINDS = {  # what `inspect` says of an image, in words
    'turned': 'turned as the EXIF orientation says',
    'transparent': 'with transparency, which is dropped: the colours below it count',
    '16 bits': 'with 16 bits, of which the upper 8 count', 'floats': 'of floating point, taken from 0 to 1',
    'frames': 'with more than one frame, of which the first counts',
    'large': f'of more than {LARGE / 1e6:.0f} million pixels, a JPEG of which is read at a lower resolution; '
             'slow at each epoch',
}
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # `inspect` says it, once for all images


def _open(file, read):
    "Returns read(PIL image of `file`); raises UsageError with the path if it cannot be read."
    try:
        with opened(file) as im: return read(im)
    except MemoryError: raise
    except Exception as e:  # damaged files make Pillow's readers raise anything: also struct.error, TypeError, KeyError
        raise UsageError(f'{file}: cannot be read as an image ({why_not(e)})') from None


def why_not(e):
    "Returns what an exception of Pillow says, in one line and without the name of what it was read from."
    return ' '.join(str(e).split()).replace(' <_io.BytesIO object at', ' <').split(' <')[0] or type(e).__name__


def opened(file):
    "Returns the PIL image of a path or a binary file; a JPEG of more than LARGE pixels comes smaller."
    try: im = Image.open(file)
    except Image.DecompressionBombError:
        if hasattr(file, 'seek'): file.seek(0)
        try: im = JpegImageFile(file)  # Image.open refuses by the size alone
        except SyntaxError: im = None
        if im is None: raise  # it is no JPEG
    im.large = im.width * im.height > LARGE
    if im.large and im.format in JPEG:
        n = next((n for n in (2, 4) if im.width * im.height // n**2 <= LARGE), 8)
        im.draft(None, (im.width // n, im.height // n))
    return im


def rgb(im):
    """Returns a PIL image of any mode as 8-bit RGB, transparency dropped.

    Raises ValueError where no range of its values is known: 32-bit integers, and floats that are not from 0 to 1.
    """
    older = im.mode == 'I' and im.format in ('PNG', 'PPM')  # as older versions of Pillow read 16 bits
    if im.mode.startswith('I;16') or older:
        return Image.fromarray((np.asarray(im).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert('RGB')
    if im.mode == 'I':
        raise ValueError('32-bit integers: which of them is white is not known; save it with 8 or 16 bits')
    if im.mode == 'F':
        x = np.asarray(im)
        if not (x.min() >= 0 and x.max() <= 1):
            raise ValueError('floats that are not from 0 to 1; save it with 8 or 16 bits')
        return Image.fromarray(np.rint(x * 255).astype(np.uint8)).convert('RGB')
    return im.convert('RGB')


def turn(im):
    """Returns how a PIL image has to be turned by its EXIF orientation, or None.

    Pillow turns a TIFF itself, as it decodes it.
    """
    if im.format == 'TIFF': return None
    try: return TURNS.get(im.getexif().get(ExifTags.Base.Orientation))
    except Exception: return None  # an image with damaged EXIF data is taken as it lies


def upright_rgb(im):
    "Returns a PIL image as upright 8-bit RGB."
    how = turn(im)
    return rgb(im) if how is None else rgb(im).transpose(how)


def upright_size(im):
    "Returns (width, height) of `upright_rgb`, from the header where that says it."
    if im.format == 'TIFF': im.load()  # before it, older versions of Pillow tell the size of the image as it lies
    return im.size[::-1] if im.width != im.height and turn(im) in SIDEWAYS else im.size


def read_image(file):
    "Returns the upright 8-bit RGB image of a file; raises UsageError with the path if it cannot be read."
    return _open(file, upright_rgb)


def upright_size_of(file): return _open(file, upright_size)


def inspect(file):
    """Returns the KINDS of an image in a binary file, comma-separated.

    Raises what Pillow raises if it cannot be read whole.

    A JPEG is decoded at an eighth of its sides, which finds what is cut off just as well.
    """
    with opened(file) as im:
        orientation = im.getexif().get(ExifTags.Base.Orientation) if im.format == 'TIFF' else None
        kinds = {
            'turned': turn(im) is not None or orientation in TURNS, 'large': im.large,
            'transparent': im.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa') or 'transparency' in im.info,
            '16 bits': im.mode.startswith('I'), 'floats': im.mode == 'F',
            'frames': im.format != 'MPO' and getattr(im, 'is_animated', False),  # MPO: a photo with previews
        }
        if im.format not in JPEG: rgb(im)
        elif not im.large: im.draft(None, (max(1, im.width // 8), max(1, im.height // 8)))
        im.load()
    return ','.join(kind for kind, holds in kinds.items() if holds)


def train_image(im, size, u, flip):
    "Returns the crop of a PIL image that the draws `u` (ATTEMPTS, 4) give, resized to (size, size), flipped if `flip`."
    top, left, height, width = crop_boxes(u, *im.size).tolist()
    im = TF.resized_crop(im, top, left, height, width, [size, size], InterpolationMode.BILINEAR)
    return TF.hflip(im) if flip else im


def valid_image(im, size):
    "Returns the centre crop (size, size) of a PIL image whose short side is resized to size + 32."
    return TF.center_crop(TF.resize(im, size + VALID_MARGIN, InterpolationMode.BILINEAR), [size, size])


# --- a set of images on a device ---

def stack_valid_images(files, size):
    "Returns the validation images of `files`, decoded in parallel: uint8 (n, size, size, 3)."
    def decode(file): return np.asarray(valid_image(read_image(file), size))
    with ThreadPoolExecutor(n_threads()) as pool:
        return torch.from_numpy(np.stack(list(bar(pool.map(decode, files), len(files), 'decoding'))))


def bar(items, n, what):
    "Returns `n` items as they come, with a bar and the time left in a terminal, unless they are there in 2 seconds."
    return tqdm(items, what, n, delay=2, leave=False, disable=None if is_local_rank_0() else True)


class Pixels:
    """Holds decoded images of any sizes, one behind the other, on `device`: `data` is uint8 (pixels of all images, 3).

    Raises MemoryError, before it decodes an image, if all of them take more than `limit` bytes.
    """
    def __init__(self, files, device, limit=float('inf')):
        with ThreadPoolExecutor(n_threads()) as pool:
            self.width, self.height = np.array(list(pool.map(upright_size_of, files))).T
            self.start = np.concatenate([[0], np.cumsum(self.width * self.height)])  # the first pixel of each image
            n_bytes = 3 * self.start[-1]
            if n_bytes > limit: raise MemoryError(f'{n_bytes / 2**20:,.0f} MiB of decoded images')
            data = np.empty((self.start[-1], 3), np.uint8)

            def decode(file, start, stop): data[start:stop] = np.asarray(read_image(file)).reshape(-1, 3)
            decoded = pool.map(decode, files, self.start, self.start[1:])
            for _ in bar(decoded, len(files), 'decoding'): pass  # So what decode raises is raised here.
        self.data = torch.from_numpy(data).to(device)

    def crops(self, i, boxes, flips, size):
        """Returns crops of the images of numbers `i` (B,): uint8 (B, 3, size, size), channels last.

        They are the `boxes` (B, 4) of `crop_boxes`, resized to `size`, and mirrored where `flips` (B,) is true.
        It takes about 23 bytes of memory for each pixel of one of the `parts`.
        """
        groups = parts(boxes)
        crops = torch.cat([self._crop(i[group], boxes[group], flips[group], size) for group in groups])
        if len(groups) > 1:  # back into the order of `i`
            order = np.argsort(np.concatenate(groups))
            crops = crops[torch.from_numpy(order).to(self.data.device, non_blocking=True)]
        return crops.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)

    def _crop(self, i, boxes, flips, size):
        "Returns the crops of all images of numbers `i` at once: uint8 (B, size, size, 3)."
        device = self.data.device
        top, left, height, width = boxes.T
        stride = self.width[i]
        host = np.stack([self.start[i] + top * stride + left, stride, height, width, flips])
        on_device = torch.from_numpy(host).to(device, non_blocking=True)  # one copy for all five
        start, stride, height, width, flips = on_device[:, :, None, None]  # (B, 1, 1) each
        x, y = torch.arange(boxes[:, 3].max(), device=device), torch.arange(boxes[:, 2].max(), device=device)
        pixel = start + y * stride + x[:, None]  # (B, W, H), W and H the largest of the batch
        # Beyond its own width a crop gets pixels of another image. The filters give them the weight 0.
        crop = self.data[pixel.clamp_(max=len(self.data) - 1)].float()  # (B, W, H, 3)
        columns, rows = filters(width, len(x), size), filters(height, len(y), size)
        columns = torch.where(flips > 0, columns.flip(1), columns)
        crop = columns @ crop.flatten(2)  # (B, size, W) @ (B, W, H*3) -> (B, size, H*3)
        crop = crop.add_(0.5).floor_()  # rounded between the passes, as in Pillow
        crop = crop.unflatten(2, (-1, 3)).transpose(1, 2)  # (B, size, H*3) -> (B, H, size, 3)
        crop = rows @ crop.flatten(2)  # (B, size, H) @ (B, H, size*3) -> (B, size, size*3)
        crop = crop.add_(0.5).floor_().byte()
        return crop.unflatten(2, (-1, 3))  # (B, H, W*3) -> (B, H, W, 3)


def parts(boxes, most=2**24):
    """Returns the numbers of `boxes` (B, 4) in groups.

    Those of a group are cropped at once, padded to the largest of it.

    A group has at most `most` pixels with its padding, or one box. A batch that fits is one group, in its order. In any
    other, boxes of about the same size come together, so that one large image does not pad them all.
    """
    height, width = boxes[:, 2], boxes[:, 3]
    if len(boxes) * height.max() * width.max() <= most: return [np.arange(len(boxes))]
    groups, h, w = [], 0, 0
    for i in np.argsort(height * width, kind='stable'):
        h, w = max(h, height[i]), max(w, width[i])
        if groups and (len(groups[-1]) + 1) * h * w <= most: groups[-1].append(i)
        else:
            groups.append([i])
            h, w = height[i], width[i]
    return [np.array(group) for group in groups]


def filters(length, n, size):
    """Returns Pillow's bilinear filter as matrices (B, size, n), from the first `length` (B, 1, 1) of n pixels.

    It is a triangle about the centre of each output pixel. Where the image gets smaller, the triangle is wider by as
    much. The rows of each matrix sum to 1.
    """
    scale = length.double() / size
    centre = (torch.arange(size, device=length.device)[:, None] + 0.5) * scale
    x = torch.arange(n, device=length.device)
    w = (1 - (x + 0.5 - centre).abs_().div_(scale.clamp(min=1))).clamp_(min=0).mul_(x < length)
    return w.div_(w.sum(2, keepdim=True)).float()
