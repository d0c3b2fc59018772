#!/usr/bin/env python
"""Repeat a published experiment by its name, arms in turn, each turn with one seed; what is already recorded is skipped.

    python scripts/reproduce.py --list                          every experiment: claim, published numbers, runs, verdict so far
    python scripts/reproduce.py woof-128-5                      as often as published
    python scripts/reproduce.py woof-128-5 --runs 3 --arms none,simple --split v2       any flag of train_imagenette.py overrides
    python scripts/reproduce.py woof-128-5 --dry-run            what would run
    python scripts/reproduce.py woof-128-5 --plan               how many runs each gap needs at the spread seen so far
    python scripts/reproduce.py woof-128-5 --until 0.5          goes on until each difference is known to half a point
    python scripts/reproduce.py woof-128-5 --jobs 2             two runs side by side, on a CPU with one thread each
    python scripts/reproduce.py woof-128-5 --ray [ADDRESS]      as many runs at once as Ray has room for, here or on the cluster at ADDRESS

One process for all runs, N with --jobs, or with Ray one a run; a run of either is the run of a fresh process. A failed or diverged run is
recorded and the loop goes on; after failed ones it ends with exit code 1. Ctrl-C and SIGTERM end it with what is recorded so far; called
again, it goes on.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import runlog
from command import Parser, UsageError, exit_code, nearest, stop_on_signals
from experiments import EXPERIMENTS, planned_runs
from report import compare, tables
from report.published import load_published
from training import loop


def parse(argv):
    "(the flags of this command, the experiment with the overrides of its arms)."
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ap.add_argument('name', nargs='?', help='an experiment, see --list')
    ap.add_argument('--list', action='store_true', help='every experiment with what is published and what is recorded')
    ap.add_argument('--runs', type=int, metavar='N', help='runs of each arm (default: as published)')
    ap.add_argument('--arms', metavar='A,B', help='these arms only, the first one the base')
    ap.add_argument('--plan', action='store_true', help="print how many runs each gap needs; don't train")
    loop.add_flags(ap)
    args, unknown = ap.parse_known_args(argv)
    if unknown: raise UsageError(f'unknown argument {unknown[0]}, or one that the experiment sets; see --help')
    loop.check_flags(args)
    if args.list: return args, None
    if args.name not in EXPERIMENTS:
        raise UsageError(f'no experiment {args.name}{nearest(args.name, EXPERIMENTS)}; see --list' if args.name else 'name one, see --list')
    exp = EXPERIMENTS[args.name]
    chosen = args.arms.split(',') if args.arms else list(exp.arms)
    for arm in chosen:
        if arm not in exp.arms: raise UsageError(f'--arms {arm}: no such arm; there are {", ".join(exp.arms)}')
    if args.runs is not None and args.runs < 1: raise UsageError(f'--runs {args.runs}: must be at least 1')
    given = loop.overrides(args)
    arms = {arm: replace(exp.arms[arm], **given) for arm in chosen}
    if len(set(arms.values())) < len(chosen): raise UsageError('these flags and --arms leave two arms the same: nothing to compare')
    if args.until is not None and len(arms) < 2: raise UsageError('--until: needs two arms')
    exp = replace(exp, runs=args.runs or exp.runs, arms=arms)
    replace(arms[chosen[0]], seed=args.seed0 + max(map(exp.wanted, exp.arms)) - 1)  # the last seed is checked now
    return args, exp


def listing(results):
    "Prints every experiment and the table of its comparisons."
    runs = runlog.load(results / 'runs.csv')
    gaps, recipes = compare.gaps(EXPERIMENTS, runs, load_published(), results), compare.by_recipe(runs)
    for name, exp in EXPERIMENTS.items():
        rows = [row for row in gaps if row['experiment'] == name]
        counts = ', '.join(f'{arm} {n}/{exp.wanted(arm)}' for arm, n in compare.done(exp, runs, recipes).items())
        print(f'{name:24}{exp.claim}; runs done / wanted: {counts}')
        print(tables.text(rows, indent=4))


def work(argv):
    args, exp = parse(argv)
    if args.list: return listing(args.results)
    published = load_published()
    def so_far(): return compare.gaps({args.name: exp}, runlog.load(args.results / 'runs.csv'), published, args.results)
    if args.plan: return print(tables.plan(so_far()))
    runs = loop.Loop(exp, args, 'reproduce.py')
    todo = runs.todo(exp, args.seed0)
    if args.dry_run:
        for arm, cfg in todo: print(f'{arm} seed {cfg.seed}: {cfg.dataset}, {cfg.size} px, {cfg.epochs} epochs, {cfg.model}')
        return print(f'{len(todo)} runs to do, {len(planned_runs(exp)) - len(todo)} recorded')
    runlog.check(args.results)
    stop_on_signals()
    try:
        runs.do(todo)
        if args.until:
            metric = so_far()[0]['metric']
            runs.until(lambda found: compare.known_to(args.until, exp.pairs(), found, metric), args.seed0)
    finally: print(tables.text(so_far(), details=True), flush=True)
    if runs.failed: print(f'reproduce.py: {runs.failed} runs failed', file=sys.stderr)
    return int(runs.failed > 0)


def main(argv=None): return exit_code('reproduce.py', lambda: work(argv))


if __name__ == '__main__': sys.exit(main())
