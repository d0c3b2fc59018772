"""Writes a trained model for other tools: as ONNX, or as a fastai Learner for `load_learner`.

    python train_imagenette.py --woof --sa --save woof.pt --export woof.onnx
    fastai.learner.load_learner('woof.pkl').predict('dog.jpg')       (in a folder where this repository is importable)
"""
import contextlib
import copy
import io
import json
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.transforms import IntToFloatTensor, Normalize, parent_label
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.core import PILImage
from fasttransform import Transform
from PIL import Image

import runlog
from command import UsageError
from training.data import IMAGENET_MEAN, IMAGENET_STD
from training.images import read_image, valid_image

TOLERANCE = 1e-4  # between onnxruntime and torch, on the largest logit


def export(file, model, cfg, vocab):
    "Writes a model as the suffix of `file` says; the file is replaced as a whole."
    content = exported(file, model, cfg, vocab)
    with runlog.replacing(file, 'wb') as f: f.write(content)


def exported(file, model, cfg, vocab):
    "Returns the bytes of what `export` writes."
    model = copy.deepcopy(model).cpu().float().eval().to(memory_format=torch.contiguous_format)
    write = write_onnx if Path(file).suffix == '.onnx' else write_learner
    return write(model, cfg, vocab)


# --- ONNX ---

def write_onnx(model, cfg, vocab):
    """Returns a model as the bytes of an ONNX file: images (B, 3, size, size), for any B, to logits (B, n_classes).

    The images are RGB from 0 to 1, less `mean` and over `std`; these, `size` and `vocab` are its metadata, as JSON.
    Raises UsageError where torch cannot export it, or onnxruntime does not give the logits of torch.
    """
    x = torch.randn(2, 3, cfg.size, cfg.size, generator=torch.Generator().manual_seed(0))
    buffer, said = io.BytesIO(), io.StringIO()
    for name in ('torch.onnx', 'torch.fx'): logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter('ignore')
        try:
            program = torch.onnx.export(model, (x,), dynamo=True, input_names=['images'], output_names=['logits'],
                                        dynamic_shapes=({0: torch.export.Dim('batch')},), verbose=False)
        except Exception as e: raise UsageError(str(e.__cause__ or e)) from None  # Its own words are advice alone.
    about = dict(vocab=list(vocab), size=cfg.size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    program.save(buffer)
    difference = onnx_difference(buffer.getvalue(), model, torch.cat([x, x.flip(0), x.neg()]))
    if not difference <= TOLERANCE:
        raise UsageError(f'--export: the logits of onnxruntime differ from those of torch by {difference:.1e}')
    return buffer.getvalue()


def onnx_difference(content, model, x):
    "Returns the largest difference between the logits of onnxruntime and of torch, over the largest logit."
    import onnxruntime
    session = onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])
    theirs = torch.from_numpy(session.run(None, {'images': x.numpy()})[0])
    with torch.no_grad(): ours = model(x)
    return ((theirs - ours).abs().max() / ours.abs().max()).item()


# --- fastai ---

def read(item: Path | str | bytes | torch.Tensor | np.ndarray | Image.Image):
    "Returns the image of a file, or of its bytes, as a run reads it; what else PILImage.create takes, as fastai does."
    if isinstance(item, bytes): item = io.BytesIO(item)
    return PILImage.create(np.array(read_image(item)) if isinstance(item, (str, Path, io.BytesIO)) else item)


class ValidCrop(Transform):
    "Crops an image as validation does."
    def __init__(self, size): self.size = size
    def encodes(self, image: PILImage): return PILImage.create(np.array(valid_image(image, self.size)))


def write_learner(model, cfg, vocab):
    "Returns a model as the bytes of a fastai Learner, which crops and normalises the images that it is given."
    with tempfile.TemporaryDirectory() as folder:
        blanks = [Path(folder) / name / 'blank.png' for name in vocab]  # fastai wants images to set itself up
        for file in blanks:
            file.parent.mkdir()
            Image.new('RGB', (cfg.size, cfg.size)).save(file)
        n = len(vocab)
        images = TransformBlock(read, batch_tfms=IntToFloatTensor)
        block = DataBlock((images, CategoryBlock(vocab=list(vocab), sort=False)), get_y=parent_label,
                          splitter=lambda items: (range(n), range(n)), item_tfms=ValidCrop(cfg.size),
                          batch_tfms=Normalize.from_stats(IMAGENET_MEAN, IMAGENET_STD, cuda=False))
        dls = block.dataloaders(blanks, bs=2, device=torch.device('cpu'), num_workers=0)
        learn = Learner(dls, model, CrossEntropyLossFlat(), path=folder)
        learn.export('learner.pkl')
        return (Path(folder) / 'learner.pkl').read_bytes()
