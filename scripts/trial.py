#!/usr/bin/env python
"""Puts a layer on trial against none and against a plain convolution with the parameters of simple attention.

    python scripts/trial.py my_layers.py:MyLayer                   Imagewoof v2, 64 px, xresnet18, 5 epochs: a night
    python scripts/trial.py my_layers.py:MyLayer --dataset digits  the same way in minutes, without a download
    python scripts/trial.py timm.layers:EcaModule --jobs 2         a layer of a package; two runs side by side
    python scripts/trial.py simple --runs 6 --sa-at 2              a layer of ours, six seeds, elsewhere in the network
    python scripts/trial.py my_layers.py:MyLayer --until 0.5       until each difference is known to half a point
    python scripts/trial.py my_layers.py:MyLayer --equal-time      slower arms with fewer epochs too: equal run time

A layer is any callable n_channels -> torch.nn.Module that keeps the shape. The knobs of train_imagenette.py are flags
here, too, for all arms: --data DIR takes images of your own. The arms take turns, each turn with one seed. The plan is
printed and saved before the first run. The page results/trials/<name>.md with its figure is written at the end, also
when the trial is stopped: called again, it continues.
"""
import argparse
import os
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {'KINETO_LOG_LEVEL': '99', 'TORCH_CPP_LOG_LEVEL': 'ERROR'}  # torch's profiler would write lines

import runlog
from command import Parser, UsageError, exit_code, stop_on_signals
from experiments import Config, Experiment
from layer_source import is_outside
from layer_source import parse as parse_layer
from report import trial
from training import loop

RUNS = 10
DEFAULTS = dict(split='v2', size=64, arch='xresnet18', epochs=5)
DIGITS = DEFAULTS | dict(size=32, epochs=3)


def parse(argv):
    "Returns (the flags of this command, {arm: Config}, the arm on trial)."
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                refused=loop.INSTEAD | {'--sa': 'the layer stands first, without a flag'})
    ap.add_argument('layer', help='FILE.py:NAME, PACKAGE.MODULE:NAME, or a layer of ours')
    ap.add_argument('--runs', type=int, metavar='N', help=f'runs of each arm (default {RUNS})')
    ap.add_argument('--name', help="the page's name (default: of the layer, its source and the images)")
    ap.add_argument('--equal-time', action='store_true', help='also train the slower arms for as long as the fastest')
    loop.add_flags(ap, leave_out=('attention', 'seed'))
    args = ap.parse_args(argv)
    loop.check_flags(args)
    if args.equal_time and (getattr(args, 'cuda_graphs', 0) or getattr(args, 'compile', 0)):
        raise UsageError('--equal-time: is worked out from plain steps; leave --cuda-graphs and --compile out')
    if args.runs is not None and args.runs < 1: raise UsageError(f'--runs {args.runs}: must be at least 1')
    given = loop.overrides(args)
    given.setdefault('dataset', 'custom' if given.get('data') else 'imagewoof')
    base = Config(**(DIGITS if given['dataset'] == 'digits' else DEFAULTS) | given)
    layer = replace(base, attention=args.layer).attention  # as the record has it
    if layer == 'none': raise UsageError('none: is what a layer is compared with')
    arm = parse_layer(layer)[1] if is_outside(layer) else layer
    if is_outside(layer) and arm in ('none', 'conv'): arm = layer
    layers = {'none': 'none', 'conv': 'conv', arm: args.layer}
    arms = {name: replace(base, attention=attention) for name, attention in layers.items()}
    arms[arm].check_effects()
    replace(base, seed=args.seed0 + (args.runs or RUNS) - 1)  # the last seed is checked now
    if args.name is None: args.name = default_name(arm, arms[arm])
    if not args.name.replace('-', '').replace('_', '').replace('.', '').isalnum():
        raise UsageError(f'--name {args.name}: letters, digits, and . - _ only')
    return args, arms, arm


def default_name(arm, cfg):
    "Returns the name of a trial that is given none."
    source = f'-{cfg.attention_source[:6]}' if cfg.attention_source else ''
    return f'{arm.rpartition(":")[2]}{source}-{cfg.dataset}-{cfg.size}px-{cfg.epochs}ep'


def settled(runs, arms):
    "Returns {arm: its Config as it will run}; how many loader processes it has is left to each run."
    return {name: replace(runs.settled(cfg)[0], workers=cfg.workers) for name, cfg in arms.items()}


def make_plan(args, runs, arms, arm):
    "Returns the plan of a new trial, with the costs of its arms measured."
    from training.machine import device_name, get_device
    _, fingerprint = runs.settled(arms[arm])
    arms = settled(runs, arms)
    cfg = arms[arm]
    device = runs.device if args.ray is None else get_device()
    plan = dict(
        name=args.name, layer=cfg.attention, source=cfg.attention_source, saved=runlog.timestamp(),
        **{key: value for key, value in runlog.provenance().items() if key.startswith('git_')},
        device=device_name(device), precision=cfg.precision, data_fingerprint=fingerprint,
        arms={name: asdict(cfg) for name, cfg in arms.items()},
        contrasts=[[base, arm] for base in ('none', 'conv') if base != arm],
        seed0=args.seed0, runs=args.runs or RUNS, until=args.until,
        costs=measure(arms, arm, device, threads=1 if args.jobs > 1 else None), equal_time={}, changes=[])
    if args.equal_time: trial.add_equal_time(plan)
    return plan | dict(recorded=recorded(plan, runs.record()))


def measure(arms, arm, device, threads):
    "Returns {arm: what its layer costs}, that of fastai's own layer among them where there is one."
    from training import layer, timing
    attention = arms[arm].attention
    if attention in timing.PEERS:
        peer = f'fastai.layers:{timing.PEERS[attention].__name__}'
        arms = arms | {f"fastai's {attention}": replace(arms[arm], attention=peer)}
    print(f'measuring a training step of {", ".join(arms)} ...', flush=True)
    steps = timing.measure_steps(arms, device, threads)
    costs = {}
    for name, cfg in arms.items():
        cost = layer.cost(cfg, device)
        costs[name] = dict(parameters=cost['attention_parameters'], multiply_adds=cost['attention_multiply_adds'])
    return {name: cost | steps[name] for name, cost in costs.items()}


def recorded(plan, record):
    "Returns {arm: how many of its planned runs are recorded as ok}."
    return {arm: int((runs.status == 'ok').sum()) for arm, runs in trial.of_arms(plan, record).items()}


def the_plan(args, runs, arms, arm):
    "Returns the plan of the trial: the one that is saved, with what the flags change in it, or a new one."
    before = trial.load(args.results, args.name)
    if before is None: return make_plan(args, runs, arms, arm)
    _, fingerprint = runs.settled(arms[arm])
    arms = settled(runs, arms)
    trial.check_same(before, arms[arm].attention, arms, fingerprint, args.results)
    if args.seed0 not in (0, before['seed0']):
        raise UsageError(f'--seed0 {args.seed0}: the plan begins with seed {before["seed0"]}; give another --name')
    plan = deepcopy(before) | dict(runs=args.runs or before['runs'], until=args.until or before['until'])
    for name, planned in plan['arms'].items():  # where files are, and what only makes runs faster, can differ today
        cfg = arms[plan['equal_time'].get(name, name)]
        plan['arms'][name] = asdict(cfg) | dict(epochs=planned['epochs'])
    if args.equal_time and not plan['equal_time']: trial.add_equal_time(plan)
    return trial.changed(before, plan, recorded(before, runs.record()))


def put_on_trial(argv):
    "Does what the command line asks for; returns the exit code."
    args, arms, arm = parse(argv)
    runs = loop.Loop(None, args, 'trial.py')
    check_layer(runs, arms[arm])
    if args.dry_run: return dry_run(args, runs, arms)
    runlog.check(args.results)
    stop_on_signals()
    with trial.alone(args.results):
        plan = the_plan(args, runs, arms, arm)
        trial.save(plan, args.results)
    print(f'{trial.plan_text(plan)}\n-> {trial.path(args.results, plan["name"])}', flush=True)
    runs.exp = exp = trial.experiment(plan)
    try:
        runs.do(runs.todo(exp, plan['seed0']))
        if plan['until']: runs.until(lambda _: trial.known(plan, runs.record()), plan['seed0'] + plan['runs'])
    finally:
        record = runs.record()
        with trial.alone(args.results): page = trial.write(plan, record, args.results)
        print(f'{trial.text(plan, record, args.results)}\n-> {page}', flush=True)
    if runs.failed: print(f'trial.py: {runs.failed} runs failed', file=sys.stderr)
    return int(runs.failed > 0)


def check_layer(runs, cfg):
    "Raises UsageError unless the layer works on the shapes that it will meet; for a cluster, on this machine."
    from training import layer
    from training.machine import get_device, settle
    device = runs.device
    if runs.args.ray is not None:
        device, cfg = get_device(), replace(cfg, precision='auto', compile=0, cuda_graphs=0)
    layer.check(settle(cfg, device), device)


def dry_run(args, runs, arms):
    "Prints the runs that a new trial would do."
    exp = Experiment('', arms, args.runs or RUNS)
    loop.print_runs(runs.todo(exp, args.seed0), exp)


def main(argv=None): return exit_code('trial.py', lambda: put_on_trial(argv))


if __name__ == '__main__': sys.exit(main())
