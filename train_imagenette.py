#!/usr/bin/env python
"""Train an xresnet, with or without self-attention, from scratch on Imagenette or Imagewoof; one row per run.

    python train_imagenette.py --woof --size 256 --epochs 5 --sa
    python train_imagenette.py --dataset digits --size 32 --epochs 3 --arch xresnet18 --sa      (no download)
"""
import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from command import Parser, UsageError, exit_code, is_local_rank_0, nearest, stop_on_signals
from experiments import SWITCH, Config, fields, flag
from training.files import find_images


def switch(text):
    "0 or 1 as bool."
    if text not in ('0', '1'): raise argparse.ArgumentTypeError(f'{text!r}: 0 or 1')
    return text == '1'


def attention(text): return {'0': 'none', '1': 'simple'}.get(text, text)


def add_config_flags(ap, leave_out=(), **default):
    "A flag for each field of Config, with its aliases. `default`: of all flags, in place of the fields' own."
    for f in fields(Config):
        if f.name in leave_out or not f.metadata['flag']: continue
        names = [flag(f), *f.metadata['aliases']]
        names += ['--' + n[2:].replace('-', '_') for n in names if '-' in n[2:]]
        text = f.metadata['help'] + (f': {", ".join(map(str, c))}' if (c := f.metadata['choices']) else '')
        options = dict(type=f.type)
        if f.name == 'attention': options = dict(nargs='?', const='simple', type=attention)
        if c is SWITCH: options |= dict(nargs='?', const=1)
        metavar = 'NAME' if c and f.type is str else f.type.__name__.upper().replace('STR', 'TEXT')
        options |= dict(default=None if f.name == 'dataset' else f.default) | default  # that of dataset depends on --woof and --data
        ap.add_argument(*names, dest=f.name, metavar=metavar, **options,
                        help=f'{text} (default {f.default})'.replace('%', '%%') if f.default != '' else text)


def make_parser():
    "The flags: one per field of Config, the short forms of the source, and what concerns the command, not the run."
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_config_flags(ap)
    on = dict(nargs='?', const=True, default=False, type=switch, metavar='0|1')
    ap.add_argument('--woof', **on | dict(default=None), help='short for --dataset imagewoof')
    ap.add_argument('--sym', **on, help='with --sa: symmetric W, short for --sa simple_sym')
    ap.add_argument('--runs', type=int, default=1, metavar='N', help='train N times, with seeds seed to seed+N-1 (default 1)')
    ap.add_argument('--resume', **on, help='go on where this command was stopped: recorded runs are skipped, the last one continues')
    ap.add_argument('--scale-lr', **on, help='of several processes: multiply lr by their number')
    add_run_flags(ap)
    ap.add_argument('--save', type=Path, metavar='FILE', help='write the trained model here (with --runs: the last one)')
    ap.add_argument('--dump', **on, help="print the model with shapes and parameters; don't train")
    ap.add_argument('--lrfinder', **on, help="suggest a learning rate and save the plot; don't train")
    return ap


def add_run_flags(ap):
    "The flags of the commands that train: where, and what is kept."
    ap.add_argument('--gpu', type=int, metavar='N', help='CUDA device (default: the first, or the CPU)')
    ap.add_argument('--results', type=Path, default=Path(__file__).parent / 'results', metavar='DIR', help='results directory')
    ap.add_argument('--checkpoint-every', type=int, metavar='N', help='epochs between checkpoints (default 1; none in runs under a minute)')
    ap.add_argument('--no-checkpoint', dest='checkpoint_every', action='store_const', const=0, help='keep no checkpoints')


def parse(argv):
    "(Config, the other flags) of a command line; UsageError on a mistake."
    ap = make_parser()
    args, unknown = ap.parse_known_args(argv)
    if unknown:
        hint = nearest(unknown[0].split('=')[0], list(ap._option_string_actions))
        raise UsageError(f'unknown argument {unknown[0]}{hint}; see --help')
    config = {f.name: getattr(args, f.name) for f in fields(Config) if f.metadata['flag']}
    if args.woof is not None and args.dataset not in (None, 'imagenette', 'imagewoof'):
        raise UsageError(f'--woof and --dataset {args.dataset}: give one of them')
    if args.woof: config['dataset'] = 'imagewoof'
    elif not args.dataset: config['dataset'] = 'custom' if args.data and args.woof is None else 'imagenette'
    if args.sym and config['attention'] == 'none': print('--sym does nothing without --sa', file=sys.stderr)
    elif args.sym:
        if config['attention'] not in ('simple', 'simple_sym'): raise UsageError(f'--sym: for --sa simple only, not {config["attention"]}')
        config['attention'] = 'simple_sym'
    if args.runs < 1: raise UsageError(f'--runs {args.runs}: must be at least 1')
    check_run_flags(args)
    cfg = Config(**config)
    replace(cfg, seed=cfg.seed + args.runs - 1)  # the last seed is checked now, not after the run before it
    try:
        if cfg.data: find_images(Path(cfg.data), cfg.valid_pct)
    except OSError as e: raise UsageError(f'cannot read the data: {e}') from None
    if args.save and is_local_rank_0(): probe(args.save)
    return cfg, args


def check_run_flags(args):
    if (args.checkpoint_every or 0) < 0: raise UsageError(f'--checkpoint-every {args.checkpoint_every}: must be at least 1 (0: none)')


def probe(file):
    "Raise UsageError unless `file` can be written; leaves it as it was."
    new = not os.path.lexists(file)
    if not new and not file.is_file() and not file.is_dir(): raise UsageError(f'--save {file}: cannot be written (not a regular file)')
    try:
        with open(file, 'ab'): pass
        if new: file.unlink()
    except OSError as e: raise UsageError(f'--save {file}: cannot be written ({e.strerror})') from None


def train(cfg, args):
    "Does what the command line asks for."
    from training import distributed, run  # torch and fastai take seconds: not before the command line is known to be good
    from training.machine import get_device
    n = distributed.n_processes()
    if n > 1 and (args.dump or args.lrfinder): raise UsageError('--dump, --lrfinder: in one process')
    if args.scale_lr: cfg = replace(cfg, lr=cfg.lr * n)
    if args.dump: return print(run.dump(cfg), flush=True)
    device = get_device(args.gpu)
    if args.lrfinder:
        lr, file = run.find_lr(cfg, args.results, device)
        return print(f'suggested learning rate {lr:.1e}, plot in {os.path.relpath(file)}')
    stop_on_signals()
    for i in range(args.runs):
        run.run(replace(cfg, seed=cfg.seed + i), args.results, device, args.save, args.resume, args.checkpoint_every)


def main(argv=None): return exit_code('train_imagenette.py', lambda: train(*parse(argv)))


if __name__ == '__main__': sys.exit(main())
