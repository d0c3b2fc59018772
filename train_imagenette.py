#!/usr/bin/env python
"""Trains an xresnet, with or without self-attention, from scratch on Imagenette or Imagewoof; each run writes a row.

    python train_imagenette.py --woof --size 256 --epochs 5 --sa
    python train_imagenette.py --dataset digits --size 32 --epochs 3 --arch xresnet18 --sa      (no download)
"""
import argparse
import os
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

from command import (
    LATER,
    Busy,
    Parser,
    UsageError,
    add_run_flags,
    check_run_flags,
    exit_code,
    is_local_rank_0,
    nearest,
    say,
    shown,
    stop_on_signals,
    weights_file,
)
from experiments import Config, add_config_flags
from layer_source import is_file, is_outside
from training.files import find_images
from training.others import IN_2019, REFUSED, notes_on_others

PROGRAM = 'train_imagenette.py'


# --- flags ---

def switch(text):
    "Returns whether the text is 1; it must be 0 or 1."
    if text not in ('0', '1'): raise argparse.ArgumentTypeError(f'{text!r}: 0 or 1')
    return text == '1'


def make_parser():
    "Returns the parser: a flag per field of Config, the short forms of 2019, and what concerns the command alone."
    ap = Parser(description=__doc__, epilog=IN_2019, formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False, refused=REFUSED)
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
    args = make_parser().parse_args(argv)
    cfg = config_of(args)
    check(cfg, args)
    return cfg, args


def check(cfg, args):
    "Raises UsageError where flags do not go together, or a file that they name cannot be read or written."
    if args.runs < 1: raise UsageError(f'--runs {args.runs}: must be at least 1')
    check_run_flags(args)
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
    if not is_local_rank_0(): return
    if args.save:
        probe('--save', args.save)
        probe('--save', weights_file(args.save))
    if args.export: probe('--export', args.export)


def config_of(args):
    "Returns the Config of the flags; raises UsageError where they do not go together."
    config = {f.name: getattr(args, f.name) for f in fields(Config) if f.metadata['flag']}
    if args.woof is not None and args.dataset not in (None, 'imagewoof' if args.woof else 'imagenette'):
        raise UsageError(f'--woof{"" if args.woof else " 0"} and --dataset {args.dataset}: give one of them')
    if args.woof: config['dataset'] = 'imagewoof'
    elif not args.dataset: config['dataset'] = 'custom' if args.data and args.woof is None else 'imagenette'
    with_mish = args.arch.lower().startswith('mxresnet')  # of the replication of 2019
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


# --- what the command does ---

def train(cfg, args):
    "Trains as the command line asks, or shows the model, or looks for a learning rate; returns the exit code, or None."
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
    code = 0
    for i in range(args.runs):
        try:
            run.run(replace(cfg, seed=cfg.seed + i), args.results, device, args.save, args.resume,
                    args.checkpoint_every, log_to=args.log_to, export=args.export)
        except Busy as e:
            code = LATER
            if is_local_rank_0(): say(f'{PROGRAM}: {e}', sys.stderr)
    return code


def work(argv):
    """Does what the command line asks for; returns the exit code, or None.

    Says what in the command line differs from the script that it was written for.
    """
    cfg, args = parse(argv)
    if is_local_rank_0():
        for note in notes_on_others(sys.argv[1:] if argv is None else argv, args):
            say(f'{PROGRAM}: {note}', sys.stderr)
    return train(cfg, args)


def main(argv=None): return exit_code(PROGRAM, lambda: work(argv))


if __name__ == '__main__': sys.exit(main())
