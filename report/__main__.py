"""Prints each experiment beside its published numbers, with intervals and a verdict.

    python -m report [--results DIR]     prints the comparisons, writes results/tables and results/figures
    python -m report EXPERIMENT ...      prints those of these experiments only
    python -m report --readme            writes the table between the markers in README.md

Accuracies are fractions in files, percent in tables.
"""
import sys
from pathlib import Path

import runlog
from command import Parser, UsageError, exit_code, nearest, shown
from experiments import EXPERIMENTS
from report import figures, tables
from report.compare import beside_first, for_readers, gaps, has_all_runs, has_runs, on_own_images, once, up_to_date
from report.published import load_published, set_right, source_against_fork, source_against_fork_text

MARKERS = '<!-- table: written by python -m report --readme -->', '<!-- end of table -->'
HEADS = {  # of results/tables/<name>.md
    'gaps': '# Every comparison\n\nMeans are percent ± standard deviation (runs), changes are points [95 % interval]: '
            '[how a verdict is reached](../README.md#how-a-verdict-is-reached).',
    'contrasts': '# Is it attention?\n\n[What the layers of each contrast have, and what it says'
                 '](../README.md#is-it-attention).',
    'set_right': '# What is wrong in the published record\n\nComputed from the published single runs: what is said, '
                 'what is found, and what that shows ([more](../README.md#what-is-wrong-in-the-published-record)).',
    'source_against_fork': "# The source's means beside the fork's runs\n\nWhether the recipe that is assumed can be "
                           'the one that was used ([more](../README.md#what-is-wrong-in-the-published-record)).',
}

ABOUT_LAYERS = ('Each layer beside the first arm, the largest change first. What is no contrast of the plan is '
                'described, not tested. `adds`: how many times its input a layer adds after the last epoch, by root '
                'mean square over eight validation images.')


def readme_table(runs, published):
    """Returns what README.md shows: every tested comparison that has all the runs wanted.

    Left out are those of digits, and those that say what they ask, which have a table of their own.
    """
    rows = up_to_date(for_readers(gaps(EXPERIMENTS, runs, published)))
    def is_shown(row): return row['tested'] and row['experiment'] != 'digits' and not row['asks'] and has_all_runs(row)
    return tables.brief_markdown(list(filter(is_shown, rows)))


def write_readme(table, file=runlog.RESULTS.parent / 'README.md'):
    "Puts `table` between the markers of README.md."
    before, _, rest = Path(file).read_text(encoding='utf-8').partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end: raise UsageError(f'{file}: the markers of the table are missing')
    Path(file).write_text(f'{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}', encoding='utf-8')


def write(rows, runs, results, published):
    """Writes results/tables (.md, and .csv of numbers) and results/figures (.png and .svg).

    The same rows and predictions give the same bytes.
    """
    results = Path(results)
    right = set_right()
    waiting = [row for row in once(sorted(rows, key=has_runs, reverse=True)) if not has_runs(row) and row['planned']]
    def is_published(row): return tables.both(row['published']) != ['–']
    published_alone = list(filter(is_published, waiting))
    others = dict.fromkeys(row['experiment'] for row in waiting if not is_published(row))
    found = [tables.markdown(for_readers(rows))]
    if published_alone: found += ['## Published, without runs of ours', tables.markdown(published_alone)]
    if others: found += ['## Neither published nor run', f'Some or all comparisons of {", ".join(others)}.']
    _write_table(results, 'gaps', tables.frame(rows), *found)
    beside = beside_first(rows, runs, published, results)
    layers = tables.layers_markdown(rows, beside)
    _write_markdown(results, 'contrasts', tables.contrasts_markdown(rows),
                    *(['## Each layer', ABOUT_LAYERS, layers] if layers else []))
    _write_table(results, 'set_right', right, tables.plain_markdown(right))
    _write_table(results, 'source_against_fork', source_against_fork(),
                 tables.plain_markdown(source_against_fork_text()))
    drawn = figures.forests(rows) | figures.experiments(rows, runs, published, results)
    if beside: drawn['layers'] = figures.layers(beside)
    for name, fig in drawn.items(): figures.save(fig, results / 'figures' / name)


def _write_table(results, name, frame, *markdown):
    "Writes results/tables/<name>.csv and .md."
    _write_markdown(results, name, *markdown)
    frame.to_csv(results / 'tables' / f'{name}.csv', index=False, float_format='%.6g', lineterminator='\n')


def _write_markdown(results, name, *markdown):
    "Writes results/tables/<name>.md: its head, then these parts."
    folder = results / 'tables'
    folder.mkdir(parents=True, exist_ok=True)
    head = HEADS[name].replace('../README.md', tables.explanation(folder))
    (folder / f'{name}.md').write_text('\n\n'.join([head, *markdown]) + '\n', encoding='utf-8')


def parse(argv):
    "Returns the arguments of a command line; raises UsageError on a mistake."
    ap = Parser(prog='python -m report', allow_abbrev=False,
                description='Prints the experiments beside their published numbers, and writes tables and figures of '
                            'them to results/tables and results/figures.')
    ap.add_argument('names', nargs='*', metavar='EXPERIMENT',
                    help='print these only, and write nothing (default: all that have runs)')
    ap.add_argument('--results', type=Path, default=runlog.RESULTS, help='results directory')
    ap.add_argument('--readme', action='store_true',
                    help='write the table of our own record between the markers of README.md')
    args = ap.parse_args(argv)
    if args.readme and (args.names or args.results != runlog.RESULTS):
        raise UsageError('--readme: without EXPERIMENT and --results; the table is of all of results/')
    for name in args.names:
        if name in EXPERIMENTS: continue
        raise UsageError(f'no experiment {name}{nearest(name, EXPERIMENTS)}; see reproduce.py --list')
    return args


def make_report(argv):
    "Does what the command line asks for."
    args = parse(argv)
    file = args.results / 'runs.csv'
    runs = runlog.load(file)
    published = load_published()
    if args.readme: return write_readme(readme_table(runs, published))
    if runs.empty: raise UsageError(f'{file}: no runs yet; train_imagenette.py and scripts/reproduce.py make them')
    rows = gaps({name: EXPERIMENTS[name] for name in args.names or EXPERIMENTS}, runs, published, args.results)
    if args.names: return print(tables.text(rows, details=True))
    try: write(rows, runs, args.results, published)
    except OSError as e: raise UsageError(f'cannot write the tables and figures ({e})') from None
    begun = for_readers(rows + gaps(on_own_images(runs), runs, published, args.results))
    print(tables.text(begun) if begun else f'{len(runs)} runs, but none of two arms to compare')
    print(f'-> {shown(args.results / "tables")}, {shown(args.results / "figures")}')


def main(argv=None): return exit_code('report', lambda: make_report(argv))


if __name__ == '__main__': sys.exit(main())
