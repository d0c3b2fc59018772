#!/usr/bin/env python
"""Repeat a published experiment by its name, arms in turn, each turn with one seed; what is already recorded is skipped.

    python scripts/reproduce.py --list                          every experiment: claim, published numbers, runs, verdict so far
    python scripts/reproduce.py woof-128-5                      as often as published
    python scripts/reproduce.py woof-128-5 --runs 3 --arms none,simple --split v2       any flag of train_imagenette.py overrides
    python scripts/reproduce.py woof-128-5 --dry-run            what would run
    python scripts/reproduce.py woof-128-5 --plan               how many runs each gap needs at the spread seen so far
    python scripts/reproduce.py woof-128-5 --until 0.5          goes on until each difference is known to half a point
    python scripts/reproduce.py woof-128-5 --ray [ADDRESS]      as many runs at once as Ray has room for, here or on the cluster at ADDRESS

One process for all runs, or with Ray one a run; a run of either is the run of a fresh process. A failed or diverged run is recorded and
the loop goes on; after failed ones it ends with exit code 1. Ctrl-C and SIGTERM end it with what is recorded so far; called again, it
goes on.
"""
import argparse
import os
import sys
import time
from dataclasses import replace
from math import inf
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import runlog
import train_imagenette
from command import Busy, Parser, UsageError, exit_code, is_stop, nearest, stop_on_signals
from experiments import EXPERIMENTS, Config, fields, planned_runs
from report import compare, tables
from report.published import load_published
from training import cluster

ARMS = 'attention', 'sa_at', 'seed'  # what tells the arms and the runs apart


def parse(argv):
    "(the flags of this command, the experiment with the overrides of its arms)."
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ap.add_argument('name', nargs='?', help='an experiment, see --list')
    ap.add_argument('--list', action='store_true', help='every experiment with what is published and what is recorded')
    ap.add_argument('--runs', type=int, metavar='N', help='runs of each arm (default: as published)')
    ap.add_argument('--arms', metavar='A,B', help='these arms only, the first one the base')
    ap.add_argument('--seed0', type=int, default=0, metavar='SEED', help='first seed (default 0)')
    ap.add_argument('--dry-run', action='store_true', help="print the runs; don't train")
    ap.add_argument('--plan', action='store_true', help="print how many runs each gap needs; don't train")
    ap.add_argument('--until', type=float, metavar='POINTS', help='go on until the 95%% interval of each difference has this half-width')
    ap.add_argument('--ray', nargs='?', const='', metavar='ADDRESS', help="hand the runs to Ray: this machine's own, or the cluster there")
    ap.add_argument('--cpus-per-run', type=float, default=1, metavar='N', help='with --ray: cores of a run (default 1)')
    ap.add_argument('--gpus-per-run', type=float, metavar='N', help='with --ray: GPUs of a run, 0.25 say (default 1, without any 0)')
    train_imagenette.add_run_flags(ap)
    overrides = ap.add_argument_group('in place of what the experiment sets, in all arms')
    train_imagenette.add_config_flags(overrides, leave_out=ARMS, default=argparse.SUPPRESS)
    args, unknown = ap.parse_known_args(argv)
    if unknown: raise UsageError(f'unknown argument {unknown[0]}, or one that the experiment sets; see --help')
    if int(os.environ.get('WORLD_SIZE', 1)) > 1: raise UsageError('one process starts the runs: several at once by --ray')
    if args.list: return args, None
    if args.name not in EXPERIMENTS:
        raise UsageError(f'no experiment {args.name}{nearest(args.name, EXPERIMENTS)}; see --list' if args.name else 'name one, see --list')
    exp = EXPERIMENTS[args.name]
    chosen = args.arms.split(',') if args.arms else list(exp.arms)
    for arm in chosen:
        if arm not in exp.arms: raise UsageError(f'--arms {arm}: no such arm; there are {", ".join(exp.arms)}')
    if args.runs is not None and args.runs < 1: raise UsageError(f'--runs {args.runs}: must be at least 1')
    if args.until is not None and not 0 < args.until < inf: raise UsageError(f'--until {args.until}: must be a number above 0')
    train_imagenette.check_run_flags(args)
    check_ray_flags(args)
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    arms = {arm: replace(exp.arms[arm], **given) for arm in chosen}
    if len(set(arms.values())) < len(chosen): raise UsageError('these flags and --arms leave two arms the same: nothing to compare')
    if args.until is not None and len(arms) < 2: raise UsageError('--until: needs two arms')
    exp = replace(exp, runs=args.runs or exp.runs, arms=arms)
    replace(arms[chosen[0]], seed=args.seed0 + max(map(exp.wanted, exp.arms)) - 1)  # the last seed is checked now
    return args, exp


def check_ray_flags(args):
    cpus, gpus = args.cpus_per_run, args.gpus_per_run
    if args.ray is None and (cpus != 1 or gpus is not None): raise UsageError('--cpus-per-run, --gpus-per-run: with --ray only')
    if not (cpus >= 1 and cpus == int(cpus)): raise UsageError(f'--cpus-per-run {cpus:g}: must be 1 or more whole cores')
    if gpus is not None and not (gpus in (0, 1) or 0 < gpus < 1): raise UsageError(f'--gpus-per-run {gpus:g}: must be from 0 to 1')
    if args.ray is not None and args.gpu is not None: raise UsageError('--gpu: with --ray each run has the GPU that Ray gives it')


class Loop:
    "The runs of an experiment, in this process or on Ray, with those that the record already holds left out."
    def __init__(self, exp, args):
        self.exp, self.args, self.digests = exp, args, {}
        self.failed = self.left = 0  # runs; left: to another process
        from training.machine import get_device  # torch and fastai take seconds: not before the command line is known to be good
        if args.ray is None: self.each, self.device = self.here, get_device(args.gpu)
        else:
            self.cluster = cluster.Cluster(args.ray, args.results, args.cpus_per_run, args.gpus_per_run)
            self.each, self.device = self.cluster.each, self.cluster.device

    def record(self): return runlog.load(self.args.results / 'runs.csv')

    def settled(self, cfg):
        "(`cfg` as it will run, the fingerprint of its data; None for a dry run, which fetches nothing)."
        from training.data import find_set
        from training.machine import settle
        cfg = settle(cfg, self.device)
        key = cfg.dataset, cfg.source, cfg.data
        if key not in self.digests: self.digests[key] = None if self.args.dry_run else find_set(cfg)[2]
        return cfg, self.digests[key]

    def todo(self, exp, seed0):
        "What of the runs of `exp` from `seed0` on is not recorded yet."
        record = self.record()
        return [(arm, cfg) for arm, cfg in planned_runs(exp, seed0) if runlog.recorded(record, *self.settled(cfg)).empty]

    def do(self, todo):
        "Train what is to do, but for the runs that another process is at. One that fails has left its row, and the others go on."
        start = time.perf_counter()
        for done, (arm, cfg, error) in enumerate(self.each(todo, self.args.checkpoint_every), 1):
            if isinstance(error, Busy):
                self.left += 1
                print(f'{error}: skipped', file=sys.stderr)
            elif error:
                self.failed += 1
                print(f'reproduce.py: {arm} seed {cfg.seed} failed: {error}; going on', file=sys.stderr)
            left = (time.perf_counter() - start) / done * (len(todo) - done) / 60
            print(f'[{"#" * round(30 * done / len(todo)):30}] {done}/{len(todo)}  {arm} seed {cfg.seed}  {left:.0f} min left', flush=True)

    def here(self, todo, checkpoint_every):
        """Train `todo` in this process, one after the other; yields (arm, cfg, the error of a run that failed or was not begun, or None)
        as each ends. A mistake of the user ends it."""
        from training.run import run
        for arm, cfg in todo:
            print(f'{arm} seed {cfg.seed}:', flush=True)
            error = None
            try: run(cfg, self.args.results, self.device, resume=True, checkpoint_every=checkpoint_every)
            except Busy as e: error = e
            except Exception as e:
                if isinstance(e, UsageError) or is_stop(e): raise
                error = repr(e)
            yield arm, cfg, error

    def arms(self):
        "{arm: its accuracies on this machine's data and precision}, those of the metric that is published."
        record, metric, out = self.record(), self.so_far()[0]['metric'], {}
        for arm, cfg in self.exp.arms.items():
            cfg, digest = self.settled(cfg)
            runs = runlog.of_config(record, cfg)
            out[arm] = compare.values(runs[runs.data_fingerprint == digest], metric)[0]
        return out

    def until(self, points, seed):
        "Go on, a run of each arm a turn, until each difference is known to `points`; UsageError where more runs cannot tell it."
        turn = replace(self.exp, runs=1)
        while True:
            arms, left = self.arms(), self.left
            if compare.narrow_enough([(arms[a], arms[b]) for a, b in self.exp.pairs()], points): return
            if all(len(a) >= 10 and np.ptp(a) == 0 for a in arms.values()):
                raise UsageError('--until: all runs of an arm end alike; stopped')
            while not (todo := self.todo(turn, seed)): seed += 1
            self.do(todo)
            if self.left > left: seed += 1
            elif all(len(a) == len(arms[arm]) for arm, a in self.arms().items()):
                raise UsageError('--until: the last runs did not end ok; stopped')

    def so_far(self): return compare.gaps({self.args.name: self.exp}, self.record(), load_published(), self.args.results)


def listing(results):
    "Every experiment, and a line or two for each of its gaps."
    gaps = compare.gaps(EXPERIMENTS, runlog.load(results / 'runs.csv'), load_published(), results)
    for name, exp in EXPERIMENTS.items():
        rows = [row for row in gaps if row['experiment'] == name]
        counts = ', '.join(f'{arm} {n}/{exp.wanted(arm)}' for arm, n in compare.done(exp, rows).items())
        print(f'{name:24}{exp.claim}; runs done / wanted: {counts}')
        print(tables.text(rows, indent=4))


def work(argv):
    args, exp = parse(argv)
    if args.list: return listing(args.results)
    record = runlog.load(args.results / 'runs.csv')
    if args.plan: return print(tables.plan(compare.gaps({args.name: exp}, record, load_published(), args.results)))
    loop = Loop(exp, args)
    todo = loop.todo(exp, args.seed0)
    if args.dry_run:
        for arm, cfg in todo: print(f'{arm} seed {cfg.seed}: {cfg.dataset}, {cfg.size} px, {cfg.epochs} epochs, {cfg.model}')
        return print(f'{len(todo)} runs to do, {len(planned_runs(exp)) - len(todo)} recorded')
    runlog.check(args.results)
    stop_on_signals()
    try:
        loop.do(todo)
        if args.until: loop.until(args.until, args.seed0)
    finally: print(tables.text(loop.so_far()), flush=True)
    if loop.failed: print(f'reproduce.py: {loop.failed} runs failed', file=sys.stderr)
    return int(loop.failed > 0)


def main(argv=None): return exit_code('reproduce.py', lambda: work(argv))


if __name__ == '__main__': sys.exit(main())
