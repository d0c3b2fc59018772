"""One run: Config -> DataLoaders -> model -> Learner -> a row of results/runs.csv.

    row = run(Config(dataset='digits', size=32, arch='xresnet18', attention='simple'))
    model, vocab = load_model('digits.pt')      # where run(..., save='digits.pt') left it, ready for inference
"""
import contextlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.schedule import valley
from fastai.learner import AvgSmoothLoss
from fastai.torch_core import set_seed

import runlog
from command import UsageError, is_stop, undisturbed
from experiments import Config
from layers import ATTENTION
from training import checkpoint, distributed
from training.data import get_dls
from training.files import find_images, label_of
from training.learner import fit, get_learner, keep_memory
from training.machine import device_name, get_device, settle
from training.measure import Heed, Measure
from xresnet import xresnet


def get_model(cfg, n_classes):
    "The network of `cfg`."
    return xresnet(cfg.arch, n_classes, ATTENTION[cfg.attention], cfg.places, cfg.stem, cfg.act, cfg.pool)


def n_parameters(module): return sum(p.numel() for p in module.parameters())


def prepare(cfg, device):
    "(cfg as it will run, its DataLoaders, its model): the model's weights are a function of the seed."
    torch.backends.cudnn.benchmark = True
    cfg = settle(cfg, device)
    if device.type == 'cpu': keep_memory(bool(cfg.keep_memory))
    distributed.join(device)
    with distributed.first_goes_first(): dls = get_dls(cfg, device)
    cfg = replace(cfg, loader=dls.loader, workers=dls.workers)
    set_seed(cfg.seed)
    return cfg, dls, get_model(cfg, len(dls.vocab))


def run(cfg, results=runlog.RESULTS, device=None, save=None, resume=False, checkpoint_every=None, hand_over=None):
    """Train once and append a row to runs.csv; returns the row {column: value}.

    `save`: a file for the model. `resume`: a run that is recorded is not trained again, one that was stopped goes on from
    its checkpoint, under its id. `checkpoint_every`: epochs; see checkpoint.Checkpoint. `hand_over`: takes the row instead of runs.csv.
    Whatever ends the training leaves its row: ok, diverged (a loss not finite), interrupted, failed; the exception
    that ended the last two goes on to the caller. Of several processes the first one writes.
    """
    first = distributed.is_first()
    if first: runlog.check(results)
    device = device or get_device()
    cfg, dls, model = prepare(cfg, device)
    with checkpoint.claim(cfg, dls.fingerprint, results) if resume and first else contextlib.nullcontext():
        begun = distributed.agreed(begin(cfg, dls.fingerprint, results, resume) if first else None)
        if begun['status']:
            if save and first: print(f'--save {save}: not written, the model of a recorded run is not kept', file=sys.stderr)
            return begun
        row = begun | asdict(cfg) | runlog.provenance() | dict(
            n_train=len(dls.train.dataset.labels), n_val=len(dls.valid_files), n_skipped=dls.skipped, n_parameters=n_parameters(model),
            device=device_name(device), data_fingerprint=dls.fingerprint)
        return fit_and_hand_over(cfg, dls, model, row, Path(results), save, checkpoint_every, hand_over or partial(record, results=results))


def fit_and_hand_over(cfg, dls, model, row, results, save, checkpoint_every, hand_over):
    "Fit `model`, and hand over `row` with what came of it, whatever ends it; returns it."
    run_id, first = row['run_id'], distributed.is_first()
    measure = Measure(partial(write_curve, run_id, results=results) if first else lambda curve: None)
    kept = checkpoint.Checkpoint(checkpoint.path(results, run_id), checkpoint.identity(cfg, row), checkpoint_every, row['resumed'] > 0,
                                 dls.device)
    learn = get_learner(cfg, dls, model, [measure, Heed(), kept])
    row['status'] = 'failed'
    try:
        fit(learn, cfg)
        predictions = {} if measure.diverged else measure.predictions()  # they may fail too, as the other processes are asked
        row['status'] = 'diverged' if measure.diverged else 'ok'
    except BaseException as e:
        if is_stop(e): row['status'] = 'interrupted'
        raise
    finally:
        with undisturbed():
            if hasattr(learn, 'precision'): learn.precision.leave()
            whole = row['status'] == 'ok'
            row |= measure.results(whole)
            if first and whole: write_predictions(run_id, results, files=np.array(dls.valid_files), **predictions)
            if first and save: write_model(save, cfg, dls.vocab, model) if whole else say_not_saved(save, row['status'])
            try:
                if first: hand_over(row)
            finally: kept.release()
    return row


def begin(cfg, digest, results, resume):
    "The first columns of a run's row, its status still blank; the whole row where `resume` finds it recorded."
    if resume:
        record = runlog.load(Path(results) / 'runs.csv')
        done, found = runlog.recorded(record, cfg, digest), checkpoint.find(cfg, digest, results)  # removes those that are done with
        if len(done):
            print(f'{summary(done.iloc[0])}  (recorded already)', flush=True)
            return done.iloc[0].to_dict()
        print(f'{found[1]["run_id"]}: goes on after epoch {found[1]["epoch"]} of {cfg.epochs}' if found else
              'nothing to go on with: starts anew', flush=True)
        if found:
            begun = {key: found[1][key] for key in ('run_id', 'started')}
            parts = record.resumed[record.run_id == begun['run_id']]
            return begun | dict(status='', resumed=1 + int(max([*parts, found[1].get('resumed', 0)])))
    return dict(zip(('run_id', 'started'), runlog.new_run(results)), status='', resumed=0)


def record(row, results):
    "Append `row` and say so; remove its checkpoint, which stays if the run is not done or its row could not be written."
    file = checkpoint.path(results, row['run_id'])
    try:
        print(f'{summary(row)}  -> {os.path.relpath(write(row, results))}', flush=True)
        if row['status'] in runlog.DONE: checkpoint.remove(file)
    finally:
        if file.exists(): print(f'its checkpoint is kept: --resume goes on with it ({os.path.relpath(file)})', flush=True)


def write(row, results):
    "Append `row`, or print it where that fails: it is not lost. Returns the path."
    try: return runlog.append(row, results)
    except (OSError, UsageError) as e:
        raise UsageError(f'{results}: the row could not be written ({e}); it is {json.dumps(row)}') from None


def write_curve(run_id, rows, results):
    "The curve so far. One that cannot be written is told: the next epoch writes all of it again."
    try: runlog.write_curve(run_id, rows, results)
    except OSError as e: print(f'{run_id}: its curve could not be written ({e}); going on', file=sys.stderr)


def write_predictions(run_id, results, **arrays):
    "Those of the last epoch. What cannot be written is told: the row is worth more."
    try: runlog.write_predictions(run_id, results, **arrays)
    except OSError as e: print(f'{run_id}: its predictions could not be written ({e})', file=sys.stderr)


def write_model(file, cfg, vocab, model):
    "For load_model. One that cannot be written is told: the row is worth more."
    try:
        with runlog.replacing(file, 'wb') as f: torch.save(dict(config=asdict(cfg), vocab=vocab, model=model.state_dict()), f)
    except (OSError, RuntimeError) as e: print(f'--save {file}: could not be written ({e})', file=sys.stderr)


def say_not_saved(file, status):
    "Says that a run that did not end ok leaves no model; a file of an earlier run could pass for it."
    older = '; the file there is of an earlier run' if Path(file).exists() else ''
    print(f'--save {file}: not written, as the run is {status}{older}', file=sys.stderr)


def summary(row):
    "A row in one line."
    model = Config(arch=row['arch'], attention=row['attention']).model
    what = '{dataset} {split} {size}px {model} seed {seed}  {fit_seconds:.0f} s'.format(**row, model=model)
    if row['status'] != 'ok': return '{status} after {epochs_done} of {epochs} epochs  '.format(**row) + what
    return 'accuracy {accuracy:.3f}  (max {max_accuracy:.3f} at epoch {max_accuracy_epoch})  '.format(**row) + what


def load_model(file):
    "(model in eval mode on the CPU, class names) from a file that `run(..., save=file)` wrote."
    saved = torch.load(file, map_location='cpu', weights_only=True)
    model = get_model(Config(**saved['config']), len(saved['vocab']))
    model.load_state_dict(saved['model'])
    return model.eval(), saved['vocab']


def dump(cfg):
    "The model of `cfg` as text: a line per module, its output shape for one image and its parameters."
    classes = {label_of(f) for f in find_images(Path(cfg.data), cfg.valid_pct)} if cfg.data else range(10)
    model = get_model(cfg, len(classes)).eval()
    shapes = {}
    def keep(name): return lambda m, i, o: shapes.update({name: tuple(o.shape)})
    for name, m in model.named_modules(): m.register_forward_hook(keep(name))
    with torch.no_grad(): model(torch.zeros(1, 3, cfg.size, cfg.size))
    lines = [f'{"module":34}{"type":22}{"output":22}{"parameters":>12}']
    for name, m in model.named_modules():
        if name: lines.append(f'{name:34}{type(m).__name__:22}{shapes.get(name, "")!s:22}{n_parameters(m):>12,}')
    return '\n'.join([*lines, f'{cfg.model}: {n_parameters(model):,} parameters'])


def find_lr(cfg, results=runlog.RESULTS, device=None):
    "(suggested learning rate, PNG of the plot) by fastai's lr_find, 'valley' rule; trains nothing that is kept."
    import matplotlib
    matplotlib.use('Agg')
    runlog.check(results)
    cfg, dls, model = prepare(cfg, device or get_device())
    learn = get_learner(cfg, dls, model)
    learn.recorder.smooth_loss = AvgSmoothLoss()  # on the host, where the plot wants it
    special = [f'-{k}{getattr(cfg, k)}' for k in ('sa_at', 'opt', 'mom', 'wd', 'mixup') if getattr(cfg, k) != getattr(Config, k)]
    file = Path(results) / 'lr_find' / f'{cfg.dataset}-{cfg.size}-{cfg.model}-bs{cfg.bs}{"".join(special)}.png'
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:  # lr_find keeps the first weights in a file there
        learn.path = Path(folder)
        try: lr = learn.lr_find(suggest_funcs=valley).valley
        except IndexError: raise UsageError('--lrfinder: the loss is not finite from the start, so there is no suggestion') from None
        matplotlib.pyplot.savefig(file, dpi=120)
    return lr, file
