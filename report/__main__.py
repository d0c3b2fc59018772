"""Prints each experiment beside its published numbers, with intervals and a verdict.

    python -m report [--results DIR]     prints the comparisons, writes results/tables and results/figures
    python -m report EXPERIMENT ...      prints those of these experiments only
    python -m report --readme            writes the table between the markers in README.md

Accuracies are fractions in files, percent in tables.
"""
import sys
from pathlib import Path

import pandas as pd

import runlog
from command import Parser, UsageError, exit_code, nearest
from experiments import EXPERIMENTS
from report import figures
from report.compare import gaps
from report.published import load_published, set_right
from report.tables import markdown, plain_markdown, text

MARKERS = '<!-- table: written by python -m report --readme -->', '<!-- end of table -->'


def readme_table(runs, published):
    "What README.md shows: every experiment with runs of ours, and those of the main table."
    table = gaps(EXPERIMENTS, runs, published)
    main = table.experiment.map(lambda name: 'main' in EXPERIMENTS[name].tables) & table.published_difference.notna()
    ran = (table.verdict != 'no runs') & (table.experiment != 'digits')
    return markdown(pd.concat([table[ran], table[main & ~ran]]))


def write_readme(table, file=runlog.RESULTS.parent / 'README.md'):
    "Put `table` between the markers of README.md."
    before, _, rest = Path(file).read_text(encoding='utf-8').partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end: raise UsageError(f'{file}: the markers of the table are missing')
    Path(file).write_text(f'{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}', encoding='utf-8')


def write(table, runs, results, published):
    """results/tables (gaps and set_right, .csv and .md) and results/figures (png and svg); the same rows give the same bytes.

    What depends on the predictions, which are not in git, is left out.
    """
    tables = Path(results) / 'tables'
    tables.mkdir(parents=True, exist_ok=True)
    lasting = table[[c for c in table if 'images' not in c]]
    for name, frame, words in (('gaps', lasting, markdown(table)), ('set_right', (right := set_right()), plain_markdown(right))):
        frame.to_csv(tables / f'{name}.csv', index=False, float_format='%.6g', lineterminator='\n')
        (tables / f'{name}.md').write_text(words + '\n', encoding='utf-8')
    figures.save(figures.forest(table), Path(results) / 'figures' / 'forest')
    for name, fig in figures.experiments(table, runs, published, results).items(): figures.save(fig, Path(results) / 'figures' / name)


def work(argv):
    ap = Parser(description='The experiments beside their published numbers.', allow_abbrev=False)
    ap.add_argument('names', nargs='*', metavar='EXPERIMENT', help='print these only, and write nothing (default: all that have runs)')
    ap.add_argument('--results', type=Path, default=runlog.RESULTS, help='results directory')
    ap.add_argument('--readme', action='store_true', help='write the table of our own record between the markers of README.md')
    args = ap.parse_args(argv)
    if args.readme and (args.names or args.results != runlog.RESULTS): raise UsageError('--readme: alone; the table is of all of results/')
    for name in args.names:
        if name not in EXPERIMENTS: raise UsageError(f'no experiment {name}{nearest(name, EXPERIMENTS)}; see reproduce.py --list')
    runs, published = runlog.load(args.results / 'runs.csv'), load_published()
    if args.readme: return write_readme(readme_table(runs, published))
    if runs.empty: raise UsageError(f'{args.results / "runs.csv"}: no runs yet; train_imagenette.py and scripts/reproduce.py make them')
    table = gaps({name: EXPERIMENTS[name] for name in args.names or EXPERIMENTS}, runs, published, args.results)
    if not args.names:
        try: write(table, runs, args.results, published)
        except OSError as e: raise UsageError(f'cannot write the tables and figures ({e})') from None
    shown = table if args.names else table[table.verdict != 'no runs']
    print(text(shown) if len(shown) else f'{len(runs)} runs, but no experiment has runs of two arms')


def main(argv=None): return exit_code('report', lambda: work(argv))


if __name__ == '__main__': sys.exit(main())
