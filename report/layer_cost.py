"""Shows what the layers cost: tables and figures from results/benchmarks/cost.csv, which `scripts/benchmark.py cost`
measures."""
import numpy as np
import pandas as pd

import runlog


def load_cost(file=runlog.RESULTS / 'benchmarks' / 'cost.csv'):
    """Returns the table of `scripts/benchmark.py cost` with ms_image and mb_image, of one image; nan where a shape was
    skipped."""
    df = pd.read_csv(file).fillna({'order': ''})
    return df.assign(ms_image=df.ms / df.B, mb_image=df.peak_mb / df.B, name=(df.layer + ' ' + df.order).str.strip())


def sweeps(cost):
    """Returns {'N': (rows of one C, that C), 'C': (rows of one N, that N)}: of the C with most N, of the N with most
    C."""
    C = cost.groupby('C').N.nunique().idxmax()
    N = cost.groupby('N').C.nunique().idxmax()
    return {'N': (cost[cost.C == C], C), 'C': (cost[cost.N == N], N)}


def crossovers(cost):
    """Returns for each layer the N from which on `channels` costs less than `positions`, by each of three measures.

    The measures are multiply-adds, time and memory. Between two measured N it is taken on a straight line in
    logarithms; 0 means at every N, inf at none. By multiply-adds it is N = C:
    2 C^2 N + C^3 = C^2 N + 2 C N^2 is (2 N + C)(N - C) = 0.
    """
    rows, C = sweeps(cost)['N']
    rows = rows[rows.order.isin(['channels', 'positions'])]
    found = {layer: dict(layer=layer, C=C) for layer in rows.layer.unique()}
    for measure in ('multiply_adds', 'ms_image', 'mb_image'):
        table = rows.pivot(index='N', columns=['layer', 'order'], values=measure)
        for layer, row in found.items(): row[measure] = _crossing(table[layer].dropna())
    return pd.DataFrame(found.values())


def _crossing(costs):
    "Returns the N (the index) after which `channels` stays below `positions`, see `crossovers`."
    log = np.log(costs.channels / costs.positions).to_numpy()
    N = np.log(costs.index.to_numpy(float))
    i = max(np.flatnonzero(log >= 0), default=-1)  # the last N where it is not below
    if i == len(N) - 1: return float('inf')
    if i == -1: return 0.
    return float(np.exp(N[i] + (N[i + 1] - N[i]) * log[i] / (log[i] - log[i + 1])))


def against_softmax(cost):
    """One row per shape: simple attention (in the order of the fewest multiply-adds, which 'auto' takes) against sagan.

    Per image: ms and MiB of simple and of sagan (softmax, no N x N matrix kept); faster: sagan's time over that of
    simple; faster_unfused: the same of fastai's sagan, which holds the N x N matrix; memory: MiB of simple over
    sagan's; fastest_order: the order of simple that took the least time.
    """
    key, simple = ['C', 'N'], cost[cost.layer == 'simple']
    auto, fastest = (simple.sort_values(by, kind='stable').drop_duplicates(key).set_index(key)
                     for by in ('multiply_adds', 'ms'))
    sagan, unfused = (cost[cost.layer == name].set_index(key) for name in ('sagan', 'fastai sagan'))
    return pd.DataFrame(dict(order=auto.order, fastest_order=fastest.order,
                             simple_ms=auto.ms_image, sagan_ms=sagan.ms_image,
                             faster=sagan.ms_image / auto.ms_image, faster_unfused=unfused.ms_image / auto.ms_image,
                             simple_mb=auto.mb_image, sagan_mb=sagan.mb_image,
                             memory=auto.mb_image / sagan.mb_image)).reset_index()


def softmax_verdict(cost):
    """Does simple attention still win against softmax attention that keeps no N x N matrix? In a few sentences, from
    the table."""
    table = against_softmax(cost).dropna(subset='faster')
    won, lost = table[table.faster > 1], table[table.faster <= 1]
    text = [f'On {cost.device.iloc[0]}, torch {cost.torch.iloc[0]}, simple attention takes less time than softmax '
            f'attention that keeps no N x N matrix at {len(won)} of {len(table)} shapes. '
            f'sagan takes {table.faster.min():.2g} to {table.faster.max():.2g} times as long as simple, '
            f'and {1 / table.memory.max():.2g} to {1 / table.memory.min():.2g} times the memory.']
    if len(lost): text.append('sagan wins at (C, N) = ' + ', '.join(f'({r.C}, {r.N})' for r in lost.itertuples()) + '.')
    for column, (rows, at) in sweeps(table).items():
        low, *_, high = rows.sort_values(column).itertuples()
        text.append(f'At {"C" if column == "N" else "N"} = {at} the factor goes from {low.faster:.2g} '
                    f'at {column} = {getattr(low, column)} '
                    f'to {high.faster:.2g} at {column} = {getattr(high, column)}.')
    auto = (table.order == table.fastest_order).sum()
    text.append('The order of the fewest multiply-adds is also the fastest of simple '
                f'at {auto} of the {len(table)} shapes.')
    return ' '.join(text)


def cost_plot(cost):
    """Time and memory of an image against N and C, log-log: a marker for each order, a line style for each layer.

    Vertical lines: the N at which `channels` overtakes `positions` in simple, by multiply-adds and as measured.
    """
    from matplotlib.figure import Figure
    markers = {'channels': 'o', 'positions': 's', 'source': '^', '': 'D'}
    styles = ['-', '--', ':', '-.', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3))]
    crossing = crossovers(cost).set_index('layer').loc['simple']
    fig = Figure(figsize=(11, 8), layout='constrained')
    axes = fig.subplots(2, 2, sharex='col', sharey='row')
    for (x, (rows, at)), column in zip(sweeps(cost).items(), axes.T):
        for ax, y, label in zip(column, ('ms_image', 'mb_image'),
                                ('time, forward + backward (ms an image)', 'peak memory (MiB an image)')):
            for i, (layer, lines) in enumerate(rows.groupby('layer', sort=False)):
                for order, line in lines.sort_values(x).groupby('order', sort=False):
                    ax.plot(line[x], line[y], color=f'C{i}', ls=styles[i % len(styles)], marker=markers[order], ms=6,
                            mew=1.2, lw=1.2, mfc='none' if layer.startswith('fastai') else None,
                            label=line['name'].iloc[0])
            ax.set(xscale='log', yscale='log', xlabel=x, ylabel=label, title=f'{"C" if x == "N" else "N"} = {at}')
            ax.set_xticks(sorted(rows[x].unique()), sorted(rows[x].unique()), minor=False)
            ax.set_xticks([], minor=True)
            if x == 'C': continue
            overtaken = []
            for by, style, words in (('multiply_adds', '-', 'multiply-adds'), (y, '--', 'measured')):
                where = {0.: 'at every N', float('inf'): 'at no N'}.get(crossing[by], f'from N = {crossing[by]:.0f}')
                line = ax.axvline(crossing[by] if where.startswith('from') else float('nan'), color='black', lw=1,
                                  ls=style)
                overtaken.append((line, f'simple: channels below positions {where}, {words}'))
            ax.legend(*zip(*overtaken), fontsize=7)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside right center', fontsize=8)
    return fig
