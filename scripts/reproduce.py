#!/usr/bin/env python
"""Repeats an experiment by its name: the arms take turns, a seed a turn, and recorded runs are skipped.

    python scripts/reproduce.py --list                          lists every experiment, with its verdicts so far
    python scripts/reproduce.py woof-128-5                      runs each arm as often as the experiment says
    python scripts/reproduce.py woof-128-5 --runs 3 --arms none,simple --split v2
                                                                takes other settings in all arms
    python scripts/reproduce.py woof-128-5 --dry-run            says what would run
    python scripts/reproduce.py woof-128-5 --plan               says how many runs each comparison needs
    python scripts/reproduce.py woof-128-5 --until 0.5          goes on until each difference is known to half a point
    python scripts/reproduce.py woof-128-5 --jobs 2             trains two runs at once, on a CPU with one thread each
    python scripts/reproduce.py woof-128-5 --ray [ADDRESS]      trains as many runs at once as Ray has room for, here or
                                                                on the cluster at ADDRESS

There is one process for all runs, N with --jobs, and one a run with Ray; a run gives the same as in a fresh process.
A failed or diverged run is recorded, and the loop goes on; after failed ones it ends with exit code 1. Ctrl-C and
SIGTERM end it with what is recorded so far; called again, it goes on.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

sys.path.insert(0, str(Path(__file__).parent.parent))

import runlog
from command import Parser, UsageError, exit_code, nearest, say, stop_on_signals
from experiments import EXPERIMENTS
from report import compare, tables
from report.published import load_published
from training import loop


def parse(argv):
    "Returns (the flags of this command, the experiment with its overrides); raises UsageError on a mistake."
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                refused=loop.INSTEAD | {'--sa': 'the experiment has its layers; --arms takes some of them'})
    ap.add_argument('name', nargs='?', help='an experiment, see --list')
    ap.add_argument('--list', action='store_true', help='every experiment with what is published and what is recorded')
    ap.add_argument('--runs', type=int, metavar='N', help='runs of each arm (default: as the experiment says)')
    ap.add_argument('--arms', metavar='A,B', help='train these arms only, in this order')
    ap.add_argument('--plan', action='store_true', help="print how many runs each comparison needs; don't train")
    loop.add_flags(ap)
    args = ap.parse_args(argv)
    loop.check_flags(args)
    return args, None if args.list else chosen(args)


def chosen(args):
    "Returns the experiment that the flags name, with their arms, runs and overrides; raises UsageError on a mistake."
    if not args.name: raise UsageError('name an experiment; --list shows them')
    if args.name not in EXPERIMENTS:
        raise UsageError(f'no experiment {args.name}{nearest(args.name, EXPERIMENTS)}; see --list')
    exp = EXPERIMENTS[args.name]
    if exp.needs: raise UsageError(f'{args.name}: cannot be run here, its recipe needs {exp.needs}')
    names = arm_names(args.arms, exp.arms) if args.arms else list(exp.arms)
    if args.runs is not None and args.runs < 1: raise UsageError(f'--runs {args.runs}: must be at least 1')
    overrides = loop.overrides(args)
    arms = {name: replace(exp.arms[name], **overrides) for name in names}
    arms[names[0]].check_effects()
    if len(set(arms.values())) < len(names):
        raise UsageError('these flags and --arms leave two arms the same: nothing to compare')
    if args.until is not None and len(arms) < 2: raise UsageError('--until: needs two arms')
    exp = replace(exp, runs=args.runs or exp.runs, arms=arms)
    most = max(exp.wanted(name) for name in names)
    replace(arms[names[0]], seed=args.seed0 + most - 1)  # the last seed is checked now
    return exp


def arm_names(text, arms):
    "Returns the names in 'none,simple@1,2,3,4', which may have commas themselves; raises UsageError at another name."
    names = []
    while text:
        fitting = [arm for arm in arms if f'{text},'.startswith(f'{arm},')]
        if not fitting:
            raise UsageError(f'--arms {text.partition(",")[0]}: no such arm; there are {", ".join(arms)}')
        names.append(max(fitting, key=len))
        text = text[len(names[-1]) + 1:]
    return names


def so_far(args, exp):
    """Returns the comparisons of the arms of `exp` as recorded so far (compare.gaps), of those sets that have runs.

    They are made with all arms of the experiment, so that --arms changes neither which seeds are complete nor over how
    many comparisons Holm's correction is.
    """
    own, overrides = EXPERIMENTS[args.name], loop.overrides(args)
    arms = {name: replace(cfg, **overrides) for name, cfg in own.arms.items()}
    whole = replace(own, runs=exp.runs, arms=arms).with_pairs(exp.pairs())
    rows = compare.gaps({args.name: whole}, runlog.load(args.results / 'runs.csv'), load_published(), args.results)
    rows = [row for row in rows if {row['base'], row['arm']} <= exp.arms.keys()]
    begun = {compare.set_key(row) for row in rows if compare.has_begun(row)}
    return [row for row in rows if compare.set_key(row) in begun] or rows


def listing(results):
    "Prints every experiment: its claim, its command, what all its runs cost, and the table of its comparisons."
    runs = runlog.load(results / 'runs.csv')
    gaps, recipes = compare.gaps(EXPERIMENTS, runs, load_published(), results), compare.by_recipe(runs)
    for name, exp in EXPERIMENTS.items():
        done = compare.done(exp, runs, recipes)
        counts = ', '.join(f'{arm} {n}/{exp.wanted(arm)}' for arm, n in done.items())
        print_wrapped(f'{name}  {exp.claim}')
        print_wrapped(exp.command, indent=4)
        if exp.leader:
            print_wrapped('record of the leaderboard, with the layer: {} % (runs: {}), validated on another crop than '
                          'here'.format(*exp.leader), indent=4)
        if exp.needs: print_wrapped(f'not run here: its recipe needs {exp.needs}', indent=4)
        if exp.hours is not None:
            print_wrapped(f'all runs: about {exp.hours:g} hours on one RTX 2080 Ti of 2019', indent=4)
        print_wrapped(f'runs done / wanted: {counts}', indent=4)
        print(tables.text([row for row in gaps if row['experiment'] == name], indent=4), end='\n\n')


def print_wrapped(text, indent=0):
    "Prints a text in lines of the width of the tables."
    margin = ' ' * indent
    lines = wrap(text, tables.TERMINAL, initial_indent=margin, subsequent_indent=margin + '  ', break_on_hyphens=False)
    for line in lines: print(line)


def work(argv):
    "Does what the command line asks for; returns the exit code, or None."
    args, exp = parse(argv)
    if args.list: return listing(args.results)
    if args.plan: return print(tables.plan(so_far(args, exp)))
    runs = loop.Loop(exp, args, 'reproduce.py')
    todo = runs.todo(exp, args.seed0)
    if args.dry_run: return loop.print_runs(todo, exp)
    runlog.check(args.results)
    stop_on_signals()
    try:
        runs.do(todo)
        if args.until:
            runs.until(lambda found: compare.known_to(args.until, exp.pairs(), found, exp.metric), args.seed0)
    finally: say(tables.text(so_far(args, exp), details=True))
    if runs.failed: say(f'reproduce.py: {runs.failed} runs failed', sys.stderr)
    return int(runs.failed > 0)


def main(argv=None): return exit_code('reproduce.py', lambda: work(argv))


if __name__ == '__main__': sys.exit(main())
