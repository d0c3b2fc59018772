#!/usr/bin/env python
"""Repeat a published experiment by its name, arms in turn, each turn with one seed; what is already recorded is skipped.

    python scripts/reproduce.py --list                          every experiment: claim, published numbers, runs, verdict so far
    python scripts/reproduce.py woof-128-5                      as often as published
    python scripts/reproduce.py woof-128-5 --runs 3 --arms none,simple --split v2       any flag of train_imagenette.py overrides
    python scripts/reproduce.py woof-128-5 --dry-run            what would run
    python scripts/reproduce.py woof-128-5 --plan               how many runs each gap needs at the spread seen so far
    python scripts/reproduce.py woof-128-5 --until 0.5          goes on until each difference is known to half a point

One process for all runs; a run in it is the run of a fresh process. A failed or diverged run is recorded and the loop goes on;
after failed ones it ends with exit code 1. Ctrl-C and SIGTERM end it with what is recorded so far; called again, it goes on.
"""
import argparse
import statistics
import sys
import time
from dataclasses import replace
from math import inf
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import report
import runlog
import train_imagenette
from experiments import EXPERIMENTS, UsageError, fields, is_stop, nearest, schedule


def parse(argv):
    "(the flags of this command, the experiment with the overrides of its arms)."
    ap = train_imagenette.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ap.add_argument('name', nargs='?', help='an experiment, see --list')
    ap.add_argument('--list', action='store_true', help='every experiment with what is published and what is recorded')
    ap.add_argument('--runs', type=int, metavar='N', help='runs of each arm (default: as published)')
    ap.add_argument('--arms', metavar='A,B', help='these arms only, the first one the base')
    ap.add_argument('--seed0', type=int, default=0, metavar='SEED', help='first seed (default 0)')
    ap.add_argument('--dry-run', action='store_true', help="print the runs; don't train")
    ap.add_argument('--plan', action='store_true', help="print how many runs each gap needs; don't train")
    ap.add_argument('--until', type=float, metavar='POINTS', help='go on until the 95%% interval of each difference has this half-width')
    train_imagenette.add_run_flags(ap)
    args, flags = ap.parse_known_args(argv)
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
    given = overrides(flags)
    arms = {arm: replace(exp.arms[arm], **given) for arm in chosen}
    if len(set(arms.values())) < len(chosen): raise UsageError('these flags and --arms leave two arms the same: nothing to compare')
    if args.until is not None and len(arms) < 2: raise UsageError('--until: needs two arms')
    exp = replace(exp, runs=args.runs or exp.runs, arms=arms)
    replace(arms[chosen[0]], seed=args.seed0 + exp.runs - 1)  # the last seed is checked now
    return args, exp


def overrides(flags):
    "{field of Config: value} of the flags of train_imagenette.py that are given; not those that tell the arms or the runs apart."
    ap = train_imagenette.make_parser()
    for action in ap._actions: action.default = argparse.SUPPRESS
    given, unknown = ap.parse_known_args(flags)
    known = {f.name for f in fields(train_imagenette.Config)} - {'attention', 'sa_at', 'seed'}
    wrong = [*unknown, *(f'--{name.replace("_", "-")}' for name in vars(given).keys() - known)]
    if wrong: raise UsageError(f'unknown argument {wrong[0]}, or one that the experiment sets; see --help')
    return vars(given)


class Loop:
    "The runs of an experiment in this process, with those that the record already holds left out."
    def __init__(self, exp, args):
        self.training, self.exp, self.args = train_imagenette.load_training(), exp, args
        from data import find_set
        self.fingerprint = lambda cfg: find_set(cfg)[2]
        self.device, self.seconds, self.failed, self.digests = self.training.get_device(args.gpu), [], 0, {}

    def record(self): return runlog.load(self.args.results / 'runs.csv')

    def settled(self, cfg):
        "(`cfg` as it will run, the fingerprint of its data; None for a dry run, which fetches nothing)."
        cfg = self.training.settle(cfg, self.device)
        key = cfg.dataset, cfg.source, cfg.data
        if key not in self.digests: self.digests[key] = None if self.args.dry_run else self.fingerprint(cfg)
        return cfg, self.digests[key]

    def todo(self, runs, seed0):
        "What of `runs` runs of each arm from `seed0` on is not recorded yet."
        record, wanted = self.record(), schedule(self.exp.arms, runs, seed0)
        return [(arm, cfg) for arm, cfg in wanted if runlog.recorded(record, *self.settled(cfg)).empty]

    def train(self, todo):
        "Train what is to do. A run that fails has left its row, and the next one goes on; a mistake of the user ends the loop."
        for i, (arm, cfg) in enumerate(todo):
            left = f'  {statistics.mean(self.seconds) * (len(todo) - i) / 60:.0f} min left' if self.seconds else ''
            print(f'[{"#" * round(30 * i / len(todo)):30}] {i + 1}/{len(todo)}  {arm} seed {cfg.seed}{left}', flush=True)
            start = time.perf_counter()
            try: self.training.run(cfg, self.args.results, self.device, resume=True, checkpoint_every=self.args.checkpoint_every)
            except Exception as e:
                if isinstance(e, UsageError) or is_stop(e): raise
                self.failed += 1
                print(f'reproduce.py: {arm} seed {cfg.seed} failed: {e!r}; going on', file=sys.stderr)
            self.seconds.append(time.perf_counter() - start)

    def arms(self):
        "The accuracies of each arm on this machine's data and precision, those of the metric that is published."
        record, metric, out = self.record(), self.so_far().metric.iloc[0], []
        for cfg in self.exp.arms.values():
            cfg, digest = self.settled(cfg)
            runs = runlog.of_config(record, cfg)
            out.append(report.values(runs[runs.data_fingerprint == digest], metric)[0])
        return out

    def until(self, points, seed):
        "Go on, a run of each arm a turn, until each difference is known to `points`, or a turn has added nothing."
        while not report.narrow_enough(arms := self.arms(), points):
            self.train(self.todo(1, seed))
            seed += 1
            if sum(map(len, self.arms())) == sum(map(len, arms)): raise UsageError('--until: the last runs did not end ok; stopped')

    def so_far(self): return report.gaps({self.args.name: self.exp}, self.record(), report.load_published(), self.args.results)


def listing(results):
    "Every experiment, and a line or two for each of its gaps."
    table = report.gaps(EXPERIMENTS, runlog.load(results / 'runs.csv'), report.load_published(), results)
    for name, exp in EXPERIMENTS.items():
        print(f'{name:24}{exp.claim}; {exp.runs} runs an arm: {", ".join(exp.arms)}')
        print(report.text(table[table.experiment == name], indent=4))


def work(argv):
    args, exp = parse(argv)
    if args.list: return listing(args.results)
    record = runlog.load(args.results / 'runs.csv')
    if args.plan: return print(report.plan(report.gaps({args.name: exp}, record, report.load_published(), args.results)))
    loop = Loop(exp, args)
    todo = loop.todo(exp.runs, args.seed0)
    if args.dry_run:
        for arm, cfg in todo: print(f'{arm} seed {cfg.seed}: {cfg.dataset}, {cfg.size} px, {cfg.epochs} epochs, {cfg.model}')
        return print(f'{len(todo)} runs to do, {exp.runs * len(exp.arms) - len(todo)} recorded')
    runlog.check(args.results)
    train_imagenette.stop_on_signals()
    try:
        loop.train(todo)
        if args.until: loop.until(args.until, args.seed0 + exp.runs)
    finally: print(report.text(loop.so_far()), flush=True)
    if loop.failed: print(f'reproduce.py: {loop.failed} runs failed', file=sys.stderr)
    return int(loop.failed > 0)


def main(argv=None): return train_imagenette.exit_code('reproduce.py', lambda: work(argv))


if __name__ == '__main__': sys.exit(main())
