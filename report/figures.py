"""Figures of the record, from data frames: every run as a point beside the published mean, curves, time, all
differences; no torch."""
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

import runlog
from command import UsageError
from experiments import EXPERIMENTS, knobs
from report import compare, stats, tables
from report.published import published_mean, published_metric

MARKS = 'os^Dv<>'  # an arm each: readable without colour
STYLES = ['-', '--', ':', '-.']
WIDEST = 10  # points shown in the forest plot; what goes on beyond ends in an arrow


def save(fig, path):
    "path.png and path.svg; the same figure gives the same bytes."
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with rc_context({'svg.hashsalt': 'simple', 'svg.fonttype': 'none'}):
        fig.savefig(f'{path}.png', dpi=120, metadata={'Software': None})
        fig.savefig(f'{path}.svg', metadata={'Date': None, 'Creator': None})


def experiments(rows, runs, published, results=runlog.RESULTS):
    "Returns {name: Figure} of the experiments in the `rows` (compare.gaps) that have runs of two arms."
    names, recipes = {row['experiment']: None for row in rows if compare.has_runs(row)}, compare.by_recipe(runs)
    return {name: experiment(name, EXPERIMENTS[name], runs, published, results, recipes) for name in names}


def experiment(name, exp, runs, published, results, recipes=None):
    "A row for each set of an experiment: its runs, its learning curves, accuracy against time."
    found, metric = compare.sets(exp, runs, recipes=recipes), published_metric(exp, published)
    if not found: raise UsageError(f'{name}: no runs to plot')
    fig = Figure(figsize=(13, 3.6 * len(found)), layout='constrained')
    for axes, (key, arms) in zip(fig.subplots(len(found), 3, squeeze=False), found):
        what = (f'{name}, split {key["split"]}, {key["source"]} px archive, {key["precision"]}, '
                f'{int(key["n_val"]):,} validation images')
        points(axes[0], exp, arms, published if key['planned'] else published[:0], metric)
        curves(axes[1], arms, results)
        time(axes[2], arms, metric)
        axes[0].set_title(what, fontsize=8, loc='left')
    return fig


LABELS = {'last': 'accuracy (%)', 'max': 'accuracy of the best epoch (%)'}


def points(ax, exp, arms, published, metric):
    "Every run as a point, its arm's mean with its 95% interval, the published mean as a star."
    for x, (arm, found) in enumerate(arms.items()):
        said = published_mean(exp, arm, published)
        acc = 100 * np.array(list(compare.accuracies(found, metric).values()))
        ax.plot([x - 0.1 + 0.05 * (i % 5 - 2) for i in range(len(acc))], acc, MARKS[x % 7], mfc='none', color=f'C{x}',
                ms=5)
        s = stats.summary(acc)
        half = 0 if np.isnan(s['low']) else s['mean'] - s['low']
        ax.errorbar(x + 0.15, s['mean'], half, fmt='_', color='black', capsize=4,
                    label=None if x else 'mean, 95 % interval')
        if said is not None:
            ax.plot(x + 0.3, 100 * said['mean'], '*', color='black', ms=10, label=None if x else 'published mean')
    ax.set_xticks(range(len(arms)), [f'{arm}\nn = {len(compare.ended_ok(found))}' for arm, found in arms.items()],
                  fontsize=8, rotation=90 if len(arms) > 5 else 0)
    ax.set(xlim=(-0.5, len(arms) - 0.5), ylabel=LABELS[metric])
    ax.legend(fontsize=7)


def curves(ax, arms, results):
    "Mean validation accuracy after each epoch, with a band of one standard deviation over the runs."
    for x, (arm, found) in enumerate(arms.items()):
        files = [Path(results) / 'curves' / f'{i}.csv' for i in compare.ended_ok(found).run_id]
        tables = [pd.read_csv(f).set_index('epoch').accuracy for f in files if f.exists()]
        if not tables: continue
        acc = 100 * pd.concat(tables, axis=1)
        mean, sd = acc.mean(axis=1), acc.std(axis=1).fillna(0)
        ax.plot(mean.index, mean, STYLES[x % 4], color=f'C{x}', marker=MARKS[x % 7], ms=4,
                label=f'{arm} (n = {acc.shape[1]})')
        ax.fill_between(mean.index, mean - sd, mean + sd, color=f'C{x}', alpha=0.15)
    ax.set(xlabel='epoch', ylabel='validation accuracy (%), band: ± sd')
    if ax.lines: ax.legend(fontsize=7)


def time(ax, arms, metric):
    """Accuracy against the minutes of a run, which are comparable where all runs were of one device and the same
    speed-ups."""
    for x, (arm, found) in enumerate(arms.items()):
        minutes = compare.ended_ok(found).fit_seconds / 60
        acc = 100 * np.array(list(compare.accuracies(found, metric).values()))
        if len(acc): ax.plot(minutes, acc, MARKS[x % 7], mfc='none', color=f'C{x}', label=f'{arm} (n = {len(acc)})')
    ways = pd.concat([compare.ended_ok(found) for found in arms.values()])
    ways = ways[['device', *knobs(role='speed')]].drop_duplicates()
    note = '\n(different devices or speed-ups: not comparable)' if len(ways) > 1 else ''
    ax.set(xlabel=f'minutes of a run{note}', ylabel=LABELS[metric])
    if ax.lines: ax.legend(fontsize=7)


def forest(rows):
    "All differences with their 95% intervals: published (where their spread is) hollow, ours filled; n beside them."
    rows = [row for row in rows
            if not all(np.isnan(_test(row, whose)['difference']) for whose in ('published', 'ours'))]
    if not rows: raise UsageError('no differences to plot')
    fig = Figure(figsize=(9, 1 + 0.42 * len(rows)), layout='constrained')
    ax = fig.subplots()
    for y, row in enumerate(rows):
        for dy, whose, marker, fill in ((-0.12, 'published', 's', 'none'), (0.12, 'ours', 'o', 'black')):
            d, low, high = (100 * _test(row, whose)[key] for key in ('difference', 'low', 'high'))
            if np.isnan(d): continue
            error = None if np.isnan(low) else [[d - low], [high - d]]
            ax.errorbar(d, y + dy, xerr=error, fmt=marker, mfc=fill, color='black', ms=5, capsize=2)
            for end, arrow in ((low, '<'), (high, '>'), (d, '<' if d < 0 else '>')):
                if abs(end) > WIDEST: ax.plot(WIDEST * np.sign(end), y + dy, arrow, color='black', ms=6, clip_on=False)
    ax.set_yticks(range(len(rows)), [_label(row, title) for row, title in zip(rows, tables.titles(rows))], fontsize=7)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.axvline(0, color='black', lw=0.8)
    ax.set_xlim(-WIDEST, WIDEST)
    ax.set_xlabel('difference in accuracy (points), 95 % interval\n'
                  'squares: published, circles: ours; (runs: published; ours)',
                  fontsize=8)
    return fig


def _test(row, whose):
    "Returns difference, low and high of a row of compare.gaps, 'published' or 'ours'."
    return row['published']['difference'] if whose == 'published' else row['difference']


def _label(row, title):
    "Returns what stands beside a row of the forest."
    split = f', split {row["split"]}' if row['planned'] else ''
    return f'{title}{split}: {row["base"]} → {row["arm"]}  ({_n(row["published"])}; {_n(row["ours"])})'


def _n(whose):
    "Returns the runs of both arms, 12/12; ? where their number is not published, – where nothing is."
    counts = []
    for arm in (whose[side] for side in compare.SIDES):
        n = '?' if pd.isna(arm['n']) else str(int(arm['n']))
        counts.append('–' if pd.isna(arm['mean']) else n)
    return '/'.join(counts)
