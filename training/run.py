"""Trains one run: Config -> DataLoaders -> model -> Learner -> a row of results/runs.csv.

    row = run(Config(dataset='digits', size=32, arch='xresnet18', attention='simple'), save='digits.pt')
    model, class_names = load_model('digits.pt')
"""
import contextlib
import json
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
from command import UsageError, in_a_line, is_stop, say, shown, undisturbed, weights_file
from experiments import Config, knobs, model_name
from training import checkpoint, distributed, layer, trackers
from training.arch import network
from training.data import get_dls
from training.files import find_images, labels_of
from training.host import keep_memory
from training.layer import n_parameters
from training.learner import fit, get_learner
from training.machine import device_name, get_device, prepare_device, settle
from training.measure import Heed, Measure


def get_model(cfg, n_classes):
    "Returns the network of `cfg`."
    return network(cfg.arch, n_classes, layer.get_layer(cfg), cfg.places, cfg.stem, cfg.act, cfg.pool)


def prepare(cfg, device):
    "Returns (`cfg` as it will run, its DataLoaders, its model); the weights of the model are a function of the seed."
    cfg = settle(cfg, device)
    prepare_device(cfg, device)
    layer.check(cfg, device)
    if device.type == 'cpu': keep_memory(bool(cfg.keep_memory))
    distributed.join(device)
    with distributed.first_goes_first(): dls = get_dls(cfg, device)
    cfg = replace(cfg, loader=dls.loader, workers=dls.workers)
    images = f'{len(dls.train.dataset.labels)} and {len(dls.valid_files)}, data {dls.fingerprint}'
    distributed.check_alike(images=images, **{name: getattr(cfg, name) for name in checkpoint.FOR_LIFE})
    set_seed(cfg.seed)
    return cfg, dls, get_model(cfg, len(dls.vocab))


def run(cfg, results=runlog.RESULTS, device=None, save=None, resume=False, checkpoint_every=None, hand_over=None,
        log_to=None, export=None):
    """Trains once and appends a row to runs.csv; returns the row {column: value}.

    save              the file for the trained model
    resume            a run that is recorded is not trained again, and its row is returned; a run that was stopped
                      is continued from its checkpoint, under its id
    checkpoint_every  epochs, see checkpoint.Checkpoint
    hand_over         is called with the row in place of appending it
    log_to            a tool that shows the run while it trains, see trackers.py
    export            another file for the trained model, for other tools, see export.py

    Whatever ends the training leaves its row, with the status ok, diverged (a loss was not finite), interrupted or
    failed. The exception behind the last two is raised again after that. Where several processes train together, the
    first one writes.
    """
    first = distributed.is_rank_0()
    if first: runlog.check(results)
    device = device or get_device()
    cfg, dls, model = prepare(cfg, device)
    with contextlib.ExitStack() as claims:
        begun, found = begin(cfg, dls, results, resume, claims)
        if begun['status']:
            for what, file in (('--save', save), ('--export', export)):
                if file and first:
                    say(f'{what} {file}: not written, the model of a recorded run is not kept', file=sys.stderr)
            return begun
        row = begun | asdict(cfg) | runlog.provenance() | layer.cost(cfg, device) | dict(
            n_train=len(dls.train.dataset.labels), n_val=len(dls.valid_files), n_skipped=dls.skipped,
            n_parameters=n_parameters(model),
            device=device_name(device), data_fingerprint=dls.fingerprint)
        file = checkpoint.path(results, row['run_id'])
        saver = checkpoint.Checkpoint(file, checkpoint.identity(cfg, row), checkpoint_every, found)
        hand_over = hand_over or partial(keep, results=results)
        try:
            tracking = outlets(cfg, dls, model, row, results, log_to, export if first else None)
            return fit_and_hand_over(cfg, dls, model, row, [saver, *tracking], Path(results), save, export, hand_over)
        finally: saver.release()


def outlets(cfg, dls, model, row, results, log_to, export):
    """Returns the callbacks of `log_to`, and tries `export` with the untrained model.

    Where one of them fails, the run does not start, and leaves no curve: else it would be known after the training.
    """
    try:
        if export: try_export(export, cfg, dls.vocab, model)
        return trackers.callbacks(log_to, cfg, row['run_id'], row['resumed'], results)
    except UsageError:
        if not row['resumed']: runlog.curve_file(row['run_id'], results).unlink(missing_ok=True)
        raise


def begin(cfg, dls, results, resume, claims):
    """Returns (the first columns of the run's row, its status still blank; the checkpoint it continues from, or None).

    Where `resume` finds the run recorded, the columns are its whole row; `claims`, an ExitStack, keeps other processes
    from the run. All processes that train it together get what the first one finds, or its UsageError.
    """
    found = None
    def first_columns():
        nonlocal found
        if not resume: return new_row(results)
        claims.enter_context(checkpoint.claim(cfg, dls.fingerprint, results))
        begun, found = look_up(cfg, dls, results)
        return begun
    begun = distributed.agreed(first_columns)
    continues = not begun['status'] and begun['resumed'] > 0
    if continues and not found:
        file = checkpoint.path(results, begun['run_id'])
        found = checkpoint.Found(file, checkpoint.load(file, dls.device), held=None)
    return begun, found


def new_row(results):
    "Returns the first columns of the row of a run that starts now."
    run_id, started = runlog.new_run(results)
    return dict(run_id=run_id, started=started, status='', resumed=0)


def look_up(cfg, dls, results):
    "Looks for the run in the record, then for its checkpoint, and prints what it finds; returns what `begin` does."
    runs = runlog.load(Path(results) / 'runs.csv')
    checkpoint.tidy(runs, results)
    done = runlog.recorded(runs, cfg, dls.fingerprint)
    if len(done):
        say(f'{summary(done.iloc[0])}  (recorded already)')
        return done.iloc[0].to_dict(), None
    found = checkpoint.find(cfg, dls.fingerprint, runs, results, dls.device)
    if not found:
        say('there is no checkpoint of this run: it starts from the beginning')
        return new_row(results), None
    run_id, state = found.state['run_id'], found.state
    say(f'{run_id}: continues after epoch {state["epoch"]} of {cfg.epochs}')
    times = [*runs.resumed[runs.run_id == run_id], state.get('resumed', 0)]  # A part that was killed has left no row.
    return dict(run_id=run_id, started=state['started'], status='', resumed=1 + int(max(times))), found


def fit_and_hand_over(cfg, dls, model, row, cbs, results, save, export, hand_over):
    "Fits `model`, adds what came of it to `row`, whatever ended the fit, and hands the row over; returns it."
    run_id, first = row['run_id'], distributed.is_rank_0()
    measure = Measure(partial(write_curve, run_id, results=results) if first else lambda curve: None)
    learn = get_learner(cfg, dls, model, [measure, Heed(), *cbs])
    row['status'] = 'failed'
    try:
        fit(learn, cfg)
        # The predictions are part of the run: to collect them asks the other processes, which may be gone.
        predictions = {} if measure.diverged else measure.predictions()
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
            if first and save:
                if whole: write_model(save, cfg, dls.vocab, model, run_id)
                else: say_not_saved('--save', save, row['status'])
            if first and export and not whole: say_not_saved('--export', export, row['status'])
            if first: hand_over(row)
    if first and export and whole: write_export(export, cfg, dls.vocab, model)  # It takes long: the row is there.
    return row


# --- what a run writes ---

def keep(row, results):
    """Appends `row` and prints a line about it; removes the checkpoint of a run that is done.

    The checkpoint stays where the run is not done, or its row could not be written.
    """
    file = checkpoint.path(results, row['run_id'])
    try:
        written_to = append(row, results)
        say(f'{summary(row)}  -> {shown(written_to)}')
        if row['status'] in runlog.DONE: checkpoint.remove(file)
    finally:
        if file.exists():
            say(f'the checkpoint is kept, and --resume continues from it ({shown(file)})')


def append(row, results):
    "Appends `row` and returns the path of its file; where that fails, the row stands in the UsageError that is raised."
    try: return runlog.append(row, results)
    except (OSError, UsageError) as e:
        raise UsageError(f'{results}: the row could not be written ({e}); it is {json.dumps(row)}') from None


def write_curve(run_id, rows, results):
    "Writes the curve so far, or prints why it could not be written: the next epoch writes all of it again."
    try: runlog.write_curve(run_id, rows, results)
    except OSError as e: say(f'{run_id}: its curve could not be written ({e}); the run goes on', file=sys.stderr)


def write_predictions(run_id, results, **arrays):
    "Writes the predictions of the last epoch, or prints why they could not be written: the row is worth more."
    try: runlog.write_predictions(run_id, results, **arrays)
    except OSError as e: say(f'{run_id}: its predictions could not be written ({e})', file=sys.stderr)


def write_model(file, cfg, vocab, model, run_id):
    "Writes the model for `load_model`, and its weights as safetensors beside it."
    saved = dict(config=asdict(cfg), vocab=vocab, run_id=run_id)
    with at_best('--save', file):
        saved['model'] = model.state_dict()
        with runlog.replacing(file, 'wb') as f: torch.save(saved, f)
    if 'model' not in saved: return
    beside = weights_file(Path(file))
    with at_best('--save', beside), runlog.replacing(beside, 'wb') as f: f.write(safetensors_of(saved))


def write_export(file, cfg, vocab, model):
    "Writes the model for other tools."
    from training.export import export  # Few runs need it.
    with at_best('--export', file): export(file, model, cfg, vocab)


@contextlib.contextmanager
def at_best(what, file):
    "Prints why the block could not write `file`, if so, and goes on: the row is worth more."
    try: yield
    except Exception as e:  # What pickle and the exporters raise has no end.
        say(f'{what} {file}: could not be written ({in_a_line(e)})', file=sys.stderr)


def try_export(file, cfg, vocab, model):
    "Raises UsageError where the untrained model cannot be exported."
    from training.export import exported
    try: exported(file, model, cfg, vocab)
    except Exception as e:
        raise UsageError(f'--export {file}: this model cannot be exported ({in_a_line(e)})') from None


def safetensors_of(saved):
    """Returns the weights of what `--save` keeps as the bytes of a safetensors file, with the rest as its metadata.

    Weights that two modules share are written for each; what a module keeps beside tensors is left out.
    """
    import safetensors.torch  # Few runs need it.
    weights = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, value in saved['model'].items() if isinstance(value, torch.Tensor)}
    return safetensors.torch.save(weights, {key: json.dumps(saved[key]) for key in ('config', 'vocab', 'run_id')})


def say_not_saved(what, file, status):
    "Says that a run that did not end ok leaves no model; a file of an earlier run could pass for it."
    older = '; the file there is of an earlier run' if Path(file).exists() else ''
    say(f'{what} {file}: not written, as the run is {status}{older}', file=sys.stderr)


def summary(row):
    "Returns a row as one line of text."
    model = model_name(row['arch'], row['attention'])
    what = '{dataset} {split} {size}px {model} seed {seed}  {fit_seconds:.0f} s'.format(**row, model=model)
    if row['status'] != 'ok': return '{status} after {epochs_done} of {epochs} epochs  '.format(**row) + what
    return 'accuracy {accuracy:.3f}  (max {max_accuracy:.3f} at epoch {max_accuracy_epoch})  '.format(**row) + what


# --- the model of a run ---

def load_model(file):
    "Returns (model in eval mode on the CPU, class names) from a file that `run(..., save=file)` wrote."
    return built(file, read_model(file))


def built(file, saved):
    "Returns what `load_model` does from what `read_model` has read of a file."
    try: cfg = Config(**saved['config'] | dict(attention_source=''))  # what is there now
    except TypeError as e:
        raise UsageError(f'{file}: was saved by another version of this code ({in_a_line(e)})') from None
    except UsageError as e:
        there = saved['config'].get('attention_file')
        if not there: raise
        raise UsageError(f'{file}: its layer was in {there}, put it there or in the working directory ({e})') from None
    has_changed = cfg.attention_source != saved['config'].get('attention_source', '')
    if has_changed: say(f'{file}: the source of {cfg.attention} has changed since it was saved', file=sys.stderr)
    model = get_model(cfg, len(saved['vocab']))
    try: model.load_state_dict(saved['model'])
    except RuntimeError as e: raise UsageError(f'{file}: its weights do not fit {cfg.model} ({in_a_line(e)})') from None
    return model.eval(), saved['vocab']


def read_model(file):
    "Returns dict(config, vocab, model: the weights, run_id) from a file that `run(..., save=file)` wrote."
    try: saved = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as e:  # what a damaged file makes torch and pickle raise has no end
        advice = 'weights_only' in str(e)  # torch's: to load what may run foreign code
        why = type(e).__name__ if advice or not str(e) else str(e).splitlines()[0]
        raise UsageError(f'{file}: cannot be read as a model that --save wrote ({why})') from None
    if not isinstance(saved, dict) or not saved.keys() >= {'config', 'vocab', 'model'}:
        raise UsageError(f'{file}: not a model that --save wrote')
    return saved


def dump(cfg):
    "Returns the model of `cfg` as text: a line per module, with its output shape for one image and its parameters."
    n_classes = 10
    if cfg.data:
        n_classes = len(set(labels_of(find_images(Path(cfg.data), cfg.valid_pct)).values()))
    device = torch.device('cpu')
    layer.check(settle(replace(cfg, precision='fp32', compile=0, cuda_graphs=0), device), device)
    model = get_model(cfg, n_classes).eval()
    shapes = {}
    def keep_shape(name):
        def hook(module, inputs, output):  # the output of an LSTM is a tuple
            if isinstance(output, torch.Tensor): shapes[name] = tuple(output.shape)
        return hook
    for name, module in model.named_modules(): module.register_forward_hook(keep_shape(name))
    with torch.no_grad(): model(torch.zeros(1, 3, cfg.size, cfg.size))
    lines = [f'{"module":34}{"type":22}{"output":22}{"parameters":>12}']
    for name, module in model.named_modules():
        if not name: continue  # It is the model itself.
        shape = str(shapes.get(name, ''))
        lines.append(f'{name:34}{type(module).__name__:22}{shape:22}{n_parameters(module):>12,}')
    return '\n'.join([*lines, f'{cfg.model}: {n_parameters(model):,} parameters'])


# --- a learning rate for a run ---

def find_lr(cfg, results=runlog.RESULTS, device=None):
    """Returns (suggested learning rate, PNG file of the plot), by fastai's lr_find and its rule 'valley'.

    It trains nothing that is kept. Raises UsageError where the loss is not finite from the start.
    """
    import matplotlib
    matplotlib.use('Agg')
    runlog.check(results)
    file = Path(results) / 'lr_find' / f'{lr_plot_name(cfg)}.png'  # before `prepare` writes out what auto means
    cfg, dls, model = prepare(cfg, device or get_device())
    learn = get_learner(cfg, dls, model)
    learn.recorder.smooth_loss = AvgSmoothLoss()  # on the host, where the plot wants it
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        learn.path = Path(folder)  # lr_find keeps the first weights in a file there.
        try: lr = learn.lr_find(suggest_funcs=valley).valley
        except IndexError:
            raise UsageError('--lrfinder: the loss is not finite from the start, so there is no suggestion') from None
        matplotlib.pyplot.savefig(file, dpi=120)
    return lr, file


def lr_plot_name(cfg):
    """Returns a name for the plot of `cfg`, such as digits-32-xresnet18-bs64-optsgd.

    After what every name has come the knobs that were given, as far as they make another setting.
    """
    name = f'{cfg.dataset}-{cfg.size}-{cfg.model.replace(":", "-")}-bs{cfg.bs}'
    for knob in knobs(role='result'):
        value = getattr(cfg, knob)
        if knob not in IN_EVERY_NAME and value != getattr(Config, knob): name += f'-{knob}{value}'
    return name


IN_EVERY_NAME = 'dataset', 'size', 'arch', 'attention', 'bs'
