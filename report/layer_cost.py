"""Shows what the layers cost, in tables and figures.

They are made from results/benchmarks/cost.csv, which `scripts/benchmark.py cost` measures.
"""
import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

import runlog
from report.figures import CLEAR, GREY, INK, OURS, STYLE, WIDTH
from report.tables import markdown_table


def load_cost(file=runlog.RESULTS / 'benchmarks' / 'cost.csv'):
    """Returns the table of `scripts/benchmark.py cost` with ms_image and mb_image, of one image.

    Where a shape was skipped they are nan.
    """
    df = pd.read_csv(file).fillna({'order': ''})
    return df.assign(ms_image=df.ms / df.B, mb_image=df.peak_mb / df.B, name=(df.layer + ' ' + df.order).str.strip())


def ratios(cost):
    """Returns one row per layer that fastai has, and shape: its time and memory an image beside fastai's.

    Each is in the order that it takes of itself. faster: fastai's time over ours
    in the same round, the median, with its quartiles faster_low and faster_high; memory: ours over fastai's.
    """
    ours = cost[cost.faster.notna() & cost.auto]
    columns = ['layer', 'C', 'N', 'order', 'ms_image', 'faster', 'faster_low', 'faster_high', 'mb_image', 'memory']
    return ours.sort_values(['layer', 'C', 'N'], ascending=[False, True, True])[columns].reset_index(drop=True)


def verdict(cost):
    "Returns how the layers stand beside fastai's, in a sentence for each."
    lines = []
    for layer, rows in ratios(cost).groupby('layer', sort=False):
        slower = (rows.faster < 1).sum()
        larger = (rows.memory > 1).sum()
        lines.append(f"{layer} is {rows.faster.min():.2f} to {rows.faster.max():.2f} times as fast as fastai's, "
                     f'slower at {slower} of {len(rows)} shapes, and takes {rows.memory.min():.2f} to '
                     f'{rows.memory.max():.2f} times its memory, more at {larger}.')
    return ' '.join(lines)


def beside_fastai(cost):
    "Returns the rows that have a counterpart in fastai, in the order that the layer takes of itself, in Markdown."
    rows = cost[cost.faster.notna() & (cost.auto | (cost.layer == 'sagan fused'))]
    layers = list(rows.layer.unique())
    head = ['C', 'N', 'images', *(word for layer in layers for word in (layer, 'memory'))]
    lines = []
    for (C, N, B), of_shape in rows.groupby(['C', 'N', 'B'], sort=False):
        cells = {row.layer: [f'{row.faster:.2f} [{row.faster_low:.2f}, {row.faster_high:.2f}]', f'{row.memory:.2f}']
                 for row in of_shape.itertuples()}
        lines.append([C, f'{N:,}', B, *(cell for layer in layers for cell in cells.get(layer, ['–', '–']))])
    return markdown_table(head, lines, {0, 1, 2, *range(4, len(head), 2)})


def sweeps(cost):
    """Returns {'N': (rows of one C, that C), 'C': (rows of one N, that N)}.

    They are the C that was measured at most N, and the N that was measured at most C.
    """
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
    """Returns one row per shape: simple attention against sagan.

    Simple is in the order that it takes of itself. Per image: ms and MiB of simple and of
    sagan (softmax, no N x N matrix kept); faster: sagan's time over that of simple; faster_unfused: the same of
    fastai's sagan, which holds the N x N matrix; memory: MiB of simple over sagan's; fastest_order: the order of simple
    that took the least time.
    """
    key, simple = ['C', 'N'], cost[cost.layer == 'simple']
    auto = simple[simple.auto].set_index(key)
    fastest = simple.sort_values('ms').drop_duplicates(key).set_index(key)
    sagan, unfused = (cost[cost.layer == name].set_index(key) for name in ('sagan', 'fastai sagan'))
    return pd.DataFrame(dict(order=auto.order, fastest_order=fastest.order,
                             simple_ms=auto.ms_image, sagan_ms=sagan.ms_image,
                             faster=sagan.ms_image / auto.ms_image, faster_unfused=unfused.ms_image / auto.ms_image,
                             simple_mb=auto.mb_image, sagan_mb=sagan.mb_image,
                             memory=auto.mb_image / sagan.mb_image)).reset_index()


def softmax_verdict(cost):
    "Returns whether simple attention wins against softmax attention without an N x N matrix, in a few sentences."
    table = against_softmax(cost).dropna(subset='faster')
    won = table[table.faster > 1]
    lost = table[table.faster <= 1]
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


LINES = {'simple': ('o', OURS, '-'), 'sagan': ('s', GREY, '--')}  # layers in `cost_plot`: marker, colour, line


def cost_plot(cost):
    """Returns a Figure of `ratios` of simple and sagan: speed and memory beside fastai's layer, against N and C.

    Bars go from quartile to quartile of the rounds, where these were measured.
    """
    every = sweeps(cost)
    found = ratios(cost)
    found = found[found.layer.isin(LINES)]
    with rc_context(STYLE):
        fig = Figure(figsize=(WIDTH, 4.6), layout='constrained')
        axes = fig.subplots(2, 2, sharex='col', sharey='row')
        for (x, (_, at)), column in zip(every.items(), axes.T):
            fixed = 'C' if x == 'N' else 'N'
            rows = found[found[fixed] == at]
            for layer, of_layer in rows.sort_values(x).groupby('layer', sort=False):
                marker, color, line = LINES[layer]
                at_x = of_layer[x] * (0.98 if layer == 'simple' else 1.02)  # so that no bar hides another
                for ax, y in zip(column, ('faster', 'memory')):
                    ax.plot(at_x, of_layer[y], line, marker=marker, color=color, ms=4, lw=1.2, label=layer)
                    last = of_layer[y].iloc[-1]
                    beside = rows[(rows[x] == rows[x].max()) & (rows.layer != layer)][y]
                    is_above = (last > beside).all() if (last != beside).all() else layer == 'simple'
                    up = 4.5 if is_above else -4.5  # so that the labels are apart
                    ax.annotate(layer, (at_x.iloc[-1], last), (7, up), textcoords='offset points', color=color,
                                **CLEAR)
                column[0].vlines(at_x, of_layer.faster_low, of_layer.faster_high, color=color, lw=1.2)
            column[0].set_title(f'{fixed} = {at}', loc='left')
            for ax in column:
                ax.axhline(1, color=INK, lw=0.6)
                _logarithmic(ax, 'x', sorted(rows[x].unique()))
                ax.margins(x=0.18)
            column[1].set_xlabel('N, positions' if x == 'N' else 'C, channels')
        for ax, words, values in zip(axes[:, 0], ("times as fast as fastai's", "memory over fastai's"),
                                     (found.faster, found.memory)):
            ax.set_ylabel(words)
            ends = np.log2(values.min()) // 1, -(-np.log2(values.max()) // 1)
            _logarithmic(ax, 'y', [2.**power for power in range(int(min(ends[0], 0)), int(max(ends[1], 0)) + 1)])
        return fig


def order_plot(cost):
    """Returns a Figure of what `channels` costs over `positions` in simple, against N: multiply-adds, time, memory.

    Below 1 `channels` costs less.
    """
    rows, C = sweeps(cost)['N']
    rows = rows[(rows.layer == 'simple') & rows.order.isin(['channels', 'positions'])]
    crossing = crossovers(cost).set_index('layer').loc['simple']
    lines = {'multiply_adds': ('multiply-adds', INK, ':', None), 'ms_image': ('time', OURS, '-', 'o'),
             'mb_image': ('memory', GREY, '--', 's')}
    with rc_context(STYLE):
        fig = Figure(figsize=(WIDTH, 2.8), layout='constrained')
        ax = fig.subplots()
        for measure, (words, color, style, marker) in lines.items():
            table = rows.pivot(index='N', columns='order', values=measure).dropna()
            where = {0.: 'below 1 at every N', float('inf'): 'below 1 at no N'}.get(
                crossing[measure], f'below 1 from N = {crossing[measure]:.0f}')
            ax.plot(table.index, table.channels / table.positions, style, color=color, marker=marker, ms=4, lw=1.2,
                    label=f'{words}, {where}')
        ax.axhline(1, color=INK, lw=0.6)
        ax.set(xlabel='N, positions', ylabel='channels over positions')
        ax.set_title(f'simple attention at C = {C}', loc='left')
        _logarithmic(ax, 'x', sorted(rows.N.unique()))
        _logarithmic(ax, 'y', [2.**power for power in range(-4, 4)])
        ax.legend(frameon=False)
        return fig


def _logarithmic(ax, which, ticks):
    "Makes the x or y axis logarithmic, with these ticks."
    getattr(ax, f'set_{which}scale')('log')
    axis = getattr(ax, f'{which}axis')
    axis.set_ticks(ticks, [f'{tick:g}' for tick in ticks])
    axis.set_ticks([], minor=True)
