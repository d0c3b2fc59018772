"""Tables and figures from the record: pure functions of data frames, no torch.

    python report.py [--results DIR]      the comparison with the published numbers, as Markdown
    python report.py --readme             the same, written between the markers in README.md

Accuracies are fractions in files, percent in tables. A published mean of last-epoch accuracies stands beside ours of
last epochs, a published mean of best epochs beside ours of best epochs: the two are never mixed.
"""
import argparse
import sys
from pathlib import Path

import pandas as pd

import runlog
from experiments import IMAGES, Config, UsageError, fields, resolve

# What makes runs comparable: every setting but the variant itself, the repetition and what no result depends on.
NO_SETTINGS = 'attention', 'sa_at', 'seed', 'loader', 'workers', 'fused', 'channels_last', 'compile', 'keep_memory', 'meta'
SETTINGS = [f.name for f in fields(Config) if f.name not in NO_SETTINGS]
GROUP = [*SETTINGS, 'n_train', 'n_val', 'data_fingerprint']
TITLE = ['dataset', 'split', 'size', 'epochs', 'arch']  # the settings named in every title; the others where not the default
PUBLISHED = [*TITLE, 'mixup', 'lr', 'bs']  # the settings that the published rows differ in; in the others they have the defaults
MARKERS = '<!-- table: written by python report.py --readme -->', '<!-- end of table -->'


# --- data frames ---

def load_published(folder=runlog.RESULTS / 'published'):
    "The published means of aggregates.csv, accuracies as fractions; blank settings are the source's defaults."
    df = pd.read_csv(Path(folder) / 'aggregates.csv')
    df = df.fillna({'lr': Config.lr, 'bs': Config.bs}).rename(columns={'source': 'publication', 'attention': 'variant', 'n_runs': 'n'})
    return df.assign(mean=df.mean_pct / 100, sd=df.stdev_pct / 100)


def variant(runs):
    "The arm of each run: its attention, with the places where they are not the source's (simple@1,2,3,4)."
    return runs.attention.where((runs.attention == 'none') | (runs.sa_at == Config.sa_at), runs.attention + '@' + runs.sa_at)


def summarise(runs):
    """One row per comparable setting and variant: n, mean and standard deviation (fractions) of the last epoch's accuracy
    and of the best epoch's (_max) over the runs that ended ok; `not_ok` counts the others."""
    df = runs.assign(variant=variant(runs), ok=runs.status == 'ok')
    last, best = df.accuracy.where(df.ok), df.max_accuracy.where(df.ok)
    grouped = df.assign(last=last, best=best).groupby([*GROUP, 'variant'], sort=False, dropna=False)
    return grouped.agg(n=('ok', 'sum'), mean=('last', 'mean'), sd=('last', 'std'), mean_max=('best', 'mean'), sd_max=('best', 'std'),
                       not_ok=('ok', lambda ok: (~ok).sum()), seconds=('fit_seconds', 'median')).reset_index()


def published_for(settings, name, published):
    """The published row (a Series) for `settings` (of GROUP) and the variant `name`, or None. A later table overrules an earlier.

    None too for runs on other than the full archive of that size, or with any other setting off the default.
    """
    full = IMAGES.get((settings['dataset'], settings['split']))
    if special(settings, PUBLISHED) or ('n_train' in settings and (settings['n_train'], settings['n_val']) != full): return None
    same = published.variant == name
    for key in PUBLISHED: same &= published[key] == settings[key]
    return published[same].iloc[-1] if same.any() else None


def said_of(settings, name, published):
    """{variant: its published row or None} of the pair none and `name`.

    Where the source compared at equal run time, that without attention is the one of the same table, of more epochs.
    """
    said = {arm: published_for(settings, arm, published) for arm in ('none', name)}
    if said['none'] is None and said[name] is not None:
        said['none'] = published[(published.variant == 'none') & (published.table == said[name].table)].iloc[-1]
    return said


def comparison(runs, published):
    """One row per setting and variant with attention, ours and published; a side without runs is NaN.

    Columns: the settings, variant, metric (last or max), epochs_none (where they differ), for side in (ours, published)
    and arm in (none, variant): <side>_<arm>_n, _mean, _sd; fractions. Ours come first, then what was published and no
    run of ours stands beside; there, what was published without attention and is in no pair, has a row of its own.
    """
    ours = summarise(runs)
    rows, met = [], set()
    for _, group in ours.groupby(GROUP, sort=False, dropna=False):
        settings, arms = group.iloc[0], {r.variant: r for r in group.itertuples()}
        for name in [v for v in arms if v != 'none'] or ['none']:
            said, pair = said_of(settings, name, published), arms
            if said['none'] is not None and said['none'].epochs != settings.epochs:
                if 'none' in arms: said['none'] = None  # ours are of equal epochs
                else:
                    same = (ours[GROUP] == pd.Series(dict(settings) | dict(epochs=said['none'].epochs))[GROUP]).all(axis=1)
                    pair = arms | dict(zip(['none'], ours[same & (ours.variant == 'none')].itertuples()))
            met |= {p.name for p in said.values() if p is not None}
            rows.append(_row(settings, name, pair, said))
    for _, p in published.sort_values('variant', key=lambda v: v == 'none', kind='stable').iterrows():  # pairs first
        if p.name in met: continue
        said = said_of(p, p.variant, published) | {p.variant: p}
        met |= {q.name for q in said.values()}
        rows.append(_row(p, p.variant, {}, said))
    table = pd.DataFrame(rows)
    titles, ours = table.apply(title, axis=1), table.data_fingerprint.notna()
    rest = table.precision + ', data ' + table.data_fingerprint  # told only where the titles of two settings are the same
    twice = ours & (titles.map(rest[ours].groupby(titles[ours]).nunique()) > 1)
    return table.assign(title=titles.where(~twice, titles + ', ' + rest))


def _row(settings, name, arms, said):
    "A row of `comparison`: `arms` {variant: row of summarise}, `said` {variant: published row or None}."
    metric = next((p.metric for p in said.values() if p is not None), 'last')
    row = {key: settings.get(key) for key in GROUP} | dict(variant=name, metric=metric)
    row['epochs_none'] = said['none'].epochs if said['none'] is not None else settings.epochs
    suffix = '_max' if metric == 'max' else ''
    for arm, column in (('none', 'none'), (name, 'variant')):
        r, p = arms.get(arm), said.get(arm)
        row |= {f'ours_{column}_n': r.n if r else 0, f'ours_{column}_mean': getattr(r, 'mean' + suffix, float('nan')),
                f'ours_{column}_sd': getattr(r, 'sd' + suffix, float('nan')), f'ours_{column}_not_ok': r.not_ok if r else 0}
        row |= {f'published_{column}_{k}': p[k] if p is not None else float('nan') for k in ('n', 'mean', 'sd')}
    return row


# --- text ---

def title(settings):
    "A setting in words: 'imagewoof v1, 128 px, 5 epochs, xresnet50', then what is not the default."
    epochs, without = settings['epochs'], settings.get('epochs_none')
    epochs = f'{epochs} epochs' + (f' (without: {without})' if without not in (None, epochs) else '')
    text = f'{settings["dataset"]} {settings["split"]}, {settings["size"]} px, {epochs}, {settings["arch"]}'
    text = ', '.join([text, *(f'{key} {settings[key]}' for key in special(settings, TITLE))])
    full, n = IMAGES.get((settings['dataset'], settings['split'])), settings.get('n_train')
    return text if pd.isna(n) or not full or n == full[0] else f'{text}, only {n} training images'


def special(settings, known):
    "The settings not in `known` that are off their default; the precision, which follows from the device, is left out."
    default = resolve(Config(dataset='imagenette', size=int(settings['size'])))
    return [key for key in SETTINGS if key not in (*known, 'precision') and not pd.isna(settings.get(key))
            and settings[key] != getattr(default, key) and not (key == 'source' and settings[key] == 'auto')]


def percent(mean, sd, n, not_ok=0):
    "'62.31 ± 1.2 (12)' from fractions: the number of runs in brackets, with those that did not end ok."
    if pd.isna(mean): return '–' if not not_ok else f'– ({not_ok} not ok)'
    spread = '' if pd.isna(sd) else f' ± {100 * sd:.1f}'
    count = '?' if pd.isna(n) else int(n)
    return f'{100 * mean:.2f}'.removesuffix('0') + f'{spread} ({count}' + (f', {not_ok} not ok)' if not_ok else ')')


def markdown(table):
    "A `comparison` as a Markdown table, in percent: mean ± standard deviation (runs), change ± its standard error."
    def side_cells(r, side):
        arms = {arm: [r.get(f'{side}_{arm}_{k}', 0) for k in ('mean', 'sd', 'n', 'not_ok')] for arm in ('none', 'variant')}
        (m0, sd0, n0, _), (m1, sd1, n1, _) = arms.values()
        if r.variant == 'none': return [percent(*arms['none']), '–', '']
        if pd.isna(m1 - m0): return [*(percent(*a) for a in arms.values()), '']
        error = (sd0**2 / n0 + sd1**2 / n1)**0.5  # NaN where a standard deviation is
        return [*(percent(*a) for a in arms.values()), f'{100 * (m1 - m0):+.1f}' + ('' if pd.isna(error) else f' ± {100 * error:.1f}')]

    def cells(r):
        name = r.title + (' (best epoch)' if r.metric == 'max' else '')
        return [name, r.variant, *side_cells(r, 'published'), *side_cells(r, 'ours')]
    head = ['experiment', 'attention', 'published: without', 'with', 'change', 'ours: without', 'with', 'change']
    lines = [head, ['---', '---'] + ['---:'] * 6, *(cells(r) for _, r in table.iterrows())]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


# --- figures ---

def strip_plot(runs, published=None):
    "Every run as a point: a panel per setting, a column per variant, a bar at its mean, a diamond at the published mean."
    from matplotlib.figure import Figure
    df = runs[runs.status == 'ok'].assign(variant=lambda d: variant(d))
    groups = list(df.groupby(GROUP, sort=False, dropna=False))
    if not groups: raise UsageError('no runs that ended ok: nothing to plot')
    fig = Figure(figsize=(6.4, 2.6 * len(groups)), layout='constrained')
    for ax, (_, group) in zip(fig.subplots(len(groups), squeeze=False)[:, 0], groups):
        names = sorted(group.variant.unique(), key=lambda v: (v != 'none', v))
        for x, name in enumerate(names):
            acc = 100 * group.accuracy[group.variant == name].to_numpy()
            spread = [x + 0.06 * (i % 5 - 2) for i in range(len(acc))]
            ax.plot(spread, acc, 'o', mfc='none', color='C0', label=None if x else 'a run')
            ax.hlines(acc.mean(), x - 0.25, x + 0.25, color='black', label=None if x else 'mean of ours')
            p = published_for(group.iloc[0], name, published) if published is not None else None
            if p is not None and p.metric == 'last':
                ax.plot(x + 0.33, 100 * p['mean'], 'D', color='C1', label=None if x else 'published mean')
        ax.set_xticks(range(len(names)), [f'{v}\nn = {(group.variant == v).sum()}' for v in names])
        ax.set_xlim(-0.5, len(names) - 0.5)
        ax.set_title(title(group.iloc[0]), fontsize=9)
        ax.set_ylabel('accuracy, last epoch (%)', fontsize=8)
        ax.legend(fontsize=7)
    return fig


# --- command ---

def readme_table(runs, published):
    "What README.md shows: all runs of ours on Imagenette and Imagewoof, the main table and the three-way one as published."
    ours = runs[runs.dataset.isin(['imagenette', 'imagewoof']) & (runs.data == '')]
    return markdown(comparison(ours, published[published.table.isin(['main', 'three-way'])]))


def write_readme(table, file=Path(__file__).parent / 'README.md'):
    "Put `table` between the markers of README.md."
    text = Path(file).read_text(encoding='utf-8')
    before, _, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end: raise UsageError(f'{file}: the markers of the table are missing')
    Path(file).write_text(f'{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}', encoding='utf-8')


def main(argv=None):
    ap = argparse.ArgumentParser(description='The comparison with the published numbers, as Markdown.', allow_abbrev=False)
    ap.add_argument('--results', type=Path, default=runlog.RESULTS, help='results directory')
    ap.add_argument('--readme', action='store_true', help='write the table between the markers of README.md')
    args = ap.parse_args(argv)
    try:
        runs, published = runlog.load(args.results / 'runs.csv'), load_published()
        if args.readme: return write_readme(readme_table(runs, published))
        if runs.empty: raise UsageError(f'{args.results / "runs.csv"}: no runs yet; train_imagenette.py makes them')
        print(markdown(comparison(runs, published)))
    except UsageError as e:
        print(f'report.py: {e}', file=sys.stderr)
        return 2


if __name__ == '__main__': sys.exit(main())
