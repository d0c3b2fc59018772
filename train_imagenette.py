#!/usr/bin/env python
"""Trains an xresnet, with or without self-attention, from scratch on Imagenette or Imagewoof; each run writes a row.

    python train_imagenette.py --woof --size 256 --epochs 5 --sa
    python train_imagenette.py --dataset digits --size 32 --epochs 3 --arch xresnet18 --sa      (no download)
"""
import argparse
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from command import (
    Parser,
    UsageError,
    add_run_flags,
    check_run_flags,
    exit_code,
    is_local_rank_0,
    nearest,
    shown,
    stop_on_signals,
    weights_file,
)
from experiments import Config, add_config_flags, fields, flag
from layer_source import is_file, is_outside
from training.files import find_images

PROGRAM = 'train_imagenette.py'
IN_2019 = """Command lines of 2019 (--woof 1 --sa 1 --epoch 5 --sched_type flat_and_anneal) still run. What differs:
  - --lr and --bs are 3e-3 and 64 by default, as in the documented results; in that script they were 1e-3 and 256.
  - --sym 1 makes W symmetric; there it had no effect.
  - A loss that is not finite ends the run, as diverged; there the step was skipped, and training went on.
  - fastai's own script multiplied --lr by --bs / 256 and by the number of GPUs. Here --lr stays as it is, as in the
    source's script on one GPU; --scale-lr multiplies it by the number of processes.
  - The replication with Mish had --arch mxresnet50 (here also --act mish) and full-size images, --source full.
"""


# --- flags ---

def switch(text):
    "Returns whether the text is 1; it must be 0 or 1."
    if text not in ('0', '1'): raise argparse.ArgumentTypeError(f'{text!r}: 0 or 1')
    return text == '1'


def make_parser():
    "Returns the parser: a flag per field of Config, the short forms of 2019, and what concerns the command alone."
    ap = Parser(description=__doc__, epilog=IN_2019, formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False)
    add_config_flags(ap)
    on = dict(nargs='?', const=True, default=False, type=switch, metavar='0|1')
    ap.add_argument('--woof', **on | dict(default=None), help='short for --dataset imagewoof')
    ap.add_argument('--sym', **on, help='with --sa: W is symmetric, short for --sa simple_sym')
    ap.add_argument('--fp16', **on | dict(default=None), help='short for --precision fp16; 0: fp32')
    ap.add_argument('--runs', '--run', type=int, default=1, metavar='N',
                    help='train N times, with seeds seed to seed+N-1 (default 1)')
    ap.add_argument('--resume', **on,
                    help='go on where this command was stopped: recorded runs are skipped, the last one continues')
    ap.add_argument('--scale-lr', **on, help='with several processes: multiply lr by their number')
    ap.add_argument('--local-rank', help=argparse.SUPPRESS)  # torch.distributed.launch gives it; LOCAL_RANK says it too
    add_run_flags(ap)
    ap.add_argument('--save', type=Path, metavar='FILE',
                    help='write the trained model here (with --runs: the last one); also its weights as .safetensors')
    ap.add_argument('--export', type=Path, metavar='FILE',
                    help='also write the trained model for other tools: *.onnx, or *.pkl for load_learner of fastai')
    ap.add_argument('--log-to', metavar='NAME',
                    help=f'show the runs while they train, in results/logs [{", ".join(TOOLS)}]')
    ap.add_argument('--dump', **on, help="print the model with shapes and parameters; don't train")
    ap.add_argument('--lrfinder', **on, help="suggest a learning rate and save the plot; don't train")
    return ap


# --- command lines ---

def parse(argv):
    "Returns (Config, the other flags) of a command line; raises UsageError on a mistake."
    ap = make_parser()
    args, unknown = ap.parse_known_args(argv)
    if unknown:
        refuse(unknown[0])
        hint = nearest(unknown[0].split('=')[0], list(ap._option_string_actions))
        raise UsageError(f'unknown argument {unknown[0]}{hint}; see --help')
    if args.runs < 1: raise UsageError(f'--runs {args.runs}: must be at least 1')
    check_run_flags(args)
    cfg = config_of(args)
    cfg.check_effects()
    replace(cfg, seed=cfg.seed + args.runs - 1)  # the last seed is checked now, not after the run before it
    try:
        if cfg.data: find_images(Path(cfg.data), cfg.valid_pct)
    except OSError as e: raise UsageError(f'cannot read the data: {e}') from None
    if args.dump and args.lrfinder: raise UsageError('--dump, --lrfinder: give one of them')
    if (args.dump or args.lrfinder) and (args.save or args.export):
        raise UsageError('--save, --export: with --dump and --lrfinder there is no trained model')
    if args.log_to: check_tool(args.log_to)
    if args.export: check_export(args.export, cfg.attention)
    if args.save and args.save.suffix == '.safetensors':
        raise UsageError(f'--save {args.save}: take another suffix, such as .pt; its .safetensors is written beside it')
    if args.save and args.export and os.path.realpath(args.save) == os.path.realpath(args.export):
        raise UsageError(f'--save and --export {args.export}: give them two names')
    if is_local_rank_0():
        if args.save:
            probe('--save', args.save)
            probe('--save', weights_file(args.save))
        if args.export: probe('--export', args.export)
        for note in notes_on_others(sys.argv[1:] if argv is None else argv, args):
            print(f'{PROGRAM}: {note}', file=sys.stderr)
    return cfg, args


def config_of(args):
    "Returns the Config of the flags; raises UsageError where they do not go together."
    config = {f.name: getattr(args, f.name) for f in fields(Config) if f.metadata['flag']}
    if args.woof is not None and args.dataset not in (None, 'imagenette', 'imagewoof'):
        raise UsageError(f'--woof and --dataset {args.dataset}: give one of them')
    if args.woof: config['dataset'] = 'imagewoof'
    elif not args.dataset: config['dataset'] = 'custom' if args.data and args.woof is None else 'imagenette'
    with_mish = args.arch.startswith('mxresnet')  # of the replication of 2019
    if with_mish: config['arch'] = args.arch[1:]
    if args.act is None: config['act'] = 'mish' if with_mish else Config.act
    if args.fp16 is not None:
        config['precision'] = 'fp16' if args.fp16 else 'fp32'
        if args.precision not in ('auto', config['precision']):
            raise UsageError(f'--fp16 and --precision {args.precision}: give one of them')
    if args.sym and args.attention != 'none':
        if args.attention not in ('simple', 'simple_sym'):
            raise UsageError(f'--sym: for --sa simple only, not {args.attention}')
        config['attention'] = 'simple_sym'
    cfg = Config(**config)
    if with_mish and cfg.act != 'mish':
        raise UsageError(f'--arch {args.arch} and --act {args.act}: that network has Mish; take --arch {cfg.arch}')
    return cfg


TOOLS = {'csv': (), 'tensorboard': ('tensorboard',), 'wandb': ('wandb',)}  # of --log-to: the packages that it needs
EXPORTS = {'.onnx': ('onnx', 'onnxscript', 'onnxruntime'), '.pkl': ()}  # of --export, by the suffix


def check_tool(name):
    "Raises UsageError unless runs can be sent to this tool."
    if name not in TOOLS:
        raise UsageError(f'--log-to {name}: unknown; choose from {", ".join(TOOLS)}{nearest(name, TOOLS)}')
    check_installed(f'--log-to {name}', TOOLS[name])


def check_export(file, attention):
    "Raises UsageError unless the format that the suffix of `file` names can be written of a network with `attention`."
    if file.suffix not in EXPORTS: raise UsageError(f'--export {file}: the name must end in {" or ".join(EXPORTS)}')
    if file.suffix == '.pkl' and is_outside(attention) and is_file(attention.rpartition(':')[0]):
        raise UsageError(f'--export {file}: load_learner cannot import a layer from a file ({attention}); take .onnx')
    check_installed(f'--export {file}', EXPORTS[file.suffix])


def check_installed(what, packages):
    "Raises UsageError where one of these packages is missing."
    missing = ' '.join(package for package in packages if not find_spec(package))
    if missing: raise UsageError(f'{what}: needs what is not installed; pip install {missing}')


def probe(what, file):
    "Raises UsageError unless `file` can be written; leaves it as it was."
    new = not os.path.lexists(file)
    if not new and not file.is_file() and not file.is_dir():
        raise UsageError(f'{what} {file}: cannot be written (not a regular file)')
    try:
        with open(file, 'ab'): pass
        if new: file.unlink()
    except OSError as e: raise UsageError(f'{what} {file}: cannot be written ({e.strerror})') from None


# --- command lines of 2019 ---

REFUSED = {  # flags of the scripts of others that have no meaning here
    '--debias': 'adam corrects its averages always, as torch does; leave it out',
    '--decay': 'the momentum of sgd adds gradients up, as torch does, and that of adam averages them; leave it out',
    '--pretrained': 'every network is trained from scratch here; leave it out',
    '--repro': 'every run is reproducible here; --seed N says which one it is',
    '--blurpool': 'MaxBlurPool is of another package (kornia); leave it out, and take --pool MaxPool',
}
SWITCHES_OF_2019 = {'--woof', '--sa', '--sym', '--dump', '--lrfinder'}
NAMES_OF_2019 = {'--epoch', '--run', '--sched_type'}
DEFAULTS_OF_2019 = {'--lr': 0.001, '--bs': 256}
FLAGS_OF_FASTAI_IN_2019 = {'--gpu', '--woof', '--lr', '--size', '--alpha', '--mom', '--eps', '--epochs', '--epoch',
                           '--bs', '--mixup', '--opt', '--arch', '--dump'}  # those of its own script
NAMES_OF_LESSW2020 = {'--run', '--sched_type'}  # The replication with Mish has them, and so has the fork.
DEFAULTS_OF_LESSW2020 = {'--arch': 'mxresnet50', '--source': 'full'}
SWITCHES_OF_2020 = {'--fp16'}
NAMES_OF_2020 = {'--act_fn', 'MaxPool', 'AvgPool'}  # fastai's script, up to fastai 2.8.12
DEFAULTS_OF_2020 = {'--lr': 0.01, '--opt': 'ranger', '--act': 'mish', '--schedule': 'flat_cos', '--split': 'v2',
                    '--source': '320', '--stem': '32-32-64', '--precision': 'fp32'}


def refuse(word):
    "Raises UsageError at a flag of another script that has no meaning here."
    name = word.partition('=')[0]
    if name in REFUSED: raise UsageError(f'{name}: {REFUSED[name]}')


def notes_on_others(argv, args):
    "Returns what a reader of a command line of 2019 or 2020 must know: in which of its flags this command differs."
    words = [part for word in argv for part in word.split('=', 1)]
    if is_of_2020(words): notes = notes_on_2020(words, args)
    else: notes = notes_on_2019(words, args) if is_of_2019(words) else []
    if args.sym and args.attention == 'none': notes.append('--sym does nothing without --sa')
    elif args.sym: notes.append('--sym 1 makes W symmetric; in 2019 it had no effect')
    return notes


def notes_on_2020(words, args):
    "Returns the note on a command line of 2020, if its script had other defaults for what it leaves out."
    defaults = not_given(DEFAULTS_OF_2020, words)
    if args.size > 128: defaults.pop('--source', None)  # It took the archive that is taken here.
    if '--fp16' in words: defaults.pop('--precision', None)
    return [f"in fastai's script of 2020 the default was {compared(defaults)}"] if defaults else []


def notes_on_2019(words, args):
    "Returns the notes on a command line of 2019: other defaults, and what only one of its several scripts did."
    notes, defaults = [], not_given(DEFAULTS_OF_2019, words)
    if defaults: notes.append(f'in 2019 the default was {compared(defaults)}, as in the documented results')
    if may_be_of_fastai(words) and is_given('--bs', words) and args.bs != 256:
        lr = args.lr if is_given('--lr', words) else DEFAULTS_OF_2019['--lr']
        notes.append("fastai's own script of 2019 multiplied --lr by --bs/256: "
                     f'its line on one GPU is --lr {lr * args.bs / 256:g} here')
    defaults = not_given(DEFAULTS_OF_LESSW2020, words)
    if args.size > 224: defaults.pop('--source', None)  # Full-size images are taken here, too.
    if NAMES_OF_LESSW2020 & set(words) and ('--arch' in defaults or (defaults and 'mxresnet50' in words)):
        notes.append(f"in lessw2020's script the default was {compared(defaults)}")
    return notes


def not_given(defaults, words):
    "Returns those of another script's defaults whose knobs the words of a command line do not give."
    return {name: value for name, value in defaults.items() if not is_given(name, words)}


def compared(defaults):
    "Returns the other script's defaults in words, then ours."
    here = {name: getattr(Config, name[2:]) for name in defaults}
    then, now = (' '.join(f'{name} {value}' for name, value in values.items()) for values in (defaults, here))
    return f'{then}; here it is {now}'


def is_given(name, words):
    "Returns whether the words of a command line give a knob, by its flag or one of its aliases."
    names = {name} | {alias for f in fields(Config) if flag(f) == name for alias in f.metadata['aliases']}
    return bool(names & {word.replace('_', '-') for word in words})


def is_of_2020(words):
    "Returns whether a command line is written as for fastai's script of 2020 to 2.8.12: --act_fn, or --fp16 1."
    return bool(NAMES_OF_2020 & set(words)) or has_value(SWITCHES_OF_2020, words)


def is_of_2019(words):
    """Returns whether a command line is written as for the script of 2019.

    There each switch was followed by 0 or 1 (--sa 1), and some flags had another name. Command lines of today have
    neither, so that only those who bring one of 2019 read what has changed.
    """
    return bool(NAMES_OF_2019 & set(words)) or has_value(SWITCHES_OF_2019, words)


def may_be_of_fastai(words):
    "Returns whether fastai's own script of 2019 understood the flags of a command line: the source's has more."
    return {word for word in words if word.startswith('--')} <= FLAGS_OF_FASTAI_IN_2019


def has_value(switches, words):
    "Returns whether one of these switches is followed by 0 or 1, as nobody needs to write it today."
    return any(word in switches and value in ('0', '1') for word, value in pairwise(words))


# --- what the command does ---

def train(cfg, args):
    "Does what the command line asks for."
    # torch and fastai take seconds to import: not before the command line is known to be good
    from training import distributed, run
    from training.machine import get_device
    n = distributed.n_processes()
    if n > 1 and (args.dump or args.lrfinder): raise UsageError('--dump, --lrfinder: in one process')
    if args.scale_lr: cfg = replace(cfg, lr=cfg.lr * n)
    if args.dump: return print(run.dump(cfg), flush=True)
    device = get_device(args.gpu)
    if args.lrfinder:
        lr, file = run.find_lr(cfg, args.results, device)
        return print(f'suggested learning rate {lr:.1e}, plot in {shown(file)}')
    stop_on_signals()
    for i in range(args.runs):
        run.run(replace(cfg, seed=cfg.seed + i), args.results, device, args.save, args.resume, args.checkpoint_every,
                log_to=args.log_to, export=args.export)


def main(argv=None): return exit_code(PROGRAM, lambda: train(*parse(argv)))


if __name__ == '__main__': sys.exit(main())
