"""Draws the record, from data frames: the differences of all comparisons, and the runs of an experiment seed by seed.

What a mark means is written beside it, and no colour is needed to tell two marks apart. Needs no torch.
"""
from pathlib import Path
from textwrap import wrap

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

import runlog
from command import UsageError
from experiments import EXPERIMENTS
from report import compare, stats, tables
from report.published import published_mean

INK, OURS, GREY, PALE = '#1a1a1a', '#174a73', '#757575', '#bdbdbd'  # text; our means; published; single seeds
STYLE = {'font.size': 8, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.edgecolor': INK,
         'axes.linewidth': 0.6, 'xtick.major.width': 0.6, 'ytick.major.width': 0.6, 'axes.titlesize': 8,
         'axes.labelsize': 8, 'xtick.labelsize': 7.5, 'ytick.labelsize': 7.5, 'text.color': INK}
WIDTH = 7.2  # inches: the text width of a page
LABELS = {'last': 'accuracy (%)', 'max': 'accuracy of the best epoch (%)'}
ENDS = 'difference', 'low', 'high'
WHOSE = 'ours', 'published'
FEW = 3  # fewer runs have no bar: that of two would be 13 times as long as their distance, and hide all others
CLEAR = dict(va='center', fontsize=7.5, path_effects=[withStroke(linewidth=2, foreground='white')])  # over other marks


def save(fig, path):
    "Writes path.png and path.svg; the same figure gives the same bytes."
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with rc_context({'svg.hashsalt': 'simple', 'svg.fonttype': 'none'}):
        fig.savefig(f'{path}.png', dpi=160, metadata={'Software': None})
        fig.savefig(f'{path}.svg', metadata={'Date': None, 'Creator': None})


def in_points(test, n=FEW):
    "Returns a difference and the ends of its interval, which are nan of fewer than FEW runs: `n` of an arm."
    d, low, high = (100 * test[key] for key in ENDS)
    return (d, low, high) if n >= FEW else (d, np.nan, np.nan)


# --- all differences ---

WIDEST = 3  # points to each side of 0 that a forest shows; above 0 as many as the largest difference; beyond are arrows
LINE = 0.168  # inches of a line of a forest
AXIS = 2.3, 4.6  # inches from the left, where the axis of a forest begins and ends
ASKS_AT, CHANGE_AT, RUNS_AT = 1.43, 4.75, 5.95  # inches from the left, where its columns of text begin


def forests(rows):
    """Returns {name: Figure} of all differences in `rows` (compare.gaps).

    `forest` has what the layers change, the claims with runs of ours first; `learning_rates` has the search for the
    learning rate of the baseline.
    """
    ours = set(map(id, compare.for_readers(rows)))
    def is_drawn(row): return id(row) in ours or not np.isnan(row['published']['difference']['difference'])
    groups = dict(forest=[], learning_rates=[])
    for row in compare.up_to_date(rows):
        if row['experiment'] == 'digits' or not _is_known(row) or not is_drawn(row): continue
        groups['learning_rates' if _is_of_rates(row) else 'forest'].append(row)
    return {name: forest(group) for name, group in groups.items() if group}


def _is_of_rates(row):
    "Returns whether the arms of the experiment of a row differ in their learning rates."
    exp = EXPERIMENTS.get(row['experiment'])
    return exp is not None and len({cfg.lr for cfg in exp.arms.values()}) > 1


def _is_known(row):
    return not np.isnan([row['published']['difference']['difference'], row['difference']['difference']]).all()


def forest(rows):
    """Returns a Figure of the differences of `rows` with their 95 % intervals, a group a claim.

    Of a comparison ours stands first, as a disc; below it stands the published one, as a hollow square. A difference
    whose spread is not known has no bar, and says so. A star marks an assumed recipe.
    """
    rows = [row for row in rows if _is_known(row)]
    if not rows: raise UsageError('no differences to plot')
    lines = list(_lines(rows))
    spacing = np.cumsum([0.6 if kind == 'claim' else 0 for kind, *_ in lines])  # a claim stands a little apart
    found = [100 * _test(row, whose)['difference'] for row in rows for whose in WHOSE]
    limits = -WIDEST, max(WIDEST, np.ceil(np.nanmax(found)))
    with rc_context(STYLE):
        rows_height = LINE * (len(lines) + spacing[-1])
        height = rows_height + 0.75
        fig = Figure(figsize=(WIDTH, height))
        width = AXIS[1] - AXIS[0]
        ax = fig.add_axes((AXIS[0] / WIDTH, 0.5 / height, width / WIDTH, rows_height / height))
        def write(left, y, words, **style):
            ax.text((left - AXIS[0]) / width, y, words, transform=ax.get_yaxis_transform(), va='center',
                    **dict(fontsize=7.5) | style)
        for y, (kind, words, row, whose) in zip(np.arange(len(lines)) + spacing, lines):
            if kind == 'claim': write(0.08, y, words, weight='bold')
            elif kind == 'title': write(0.08, y, words, color=GREY)
            else:
                write(0.2, y, words)
                if whose == 'ours' and row['asks']: write(ASKS_AT, y, row['asks'], color=GREY, fontsize=7)
                test, color = _test(row, whose), INK if whose == 'ours' else GREY
                ax.plot([0, 0], [y - 0.5, y + 0.5], color=INK, lw=0.6, zorder=0)
                n = _n_runs(row) if whose == 'ours' else FEW
                _bar(ax, in_points(test, n), y, whose, limits)
                unknown = '  no interval' if np.isnan(test['low']) else ''
                write(CHANGE_AT, y, tables.change(test) + unknown, color=color)
                star = ' *' if whose == 'published' and _is_by_assumed_recipe(row) else ''
                write(RUNS_AT, y, f'{whose} ({tables.n_runs(row[whose])}){star}', color=color)
        heads = {0.08: 'bold: a claim, or a question', AXIS[0]: 'second arm minus first', CHANGE_AT: 'points [95 %]',
                 RUNS_AT: 'by whom (runs)'}
        for x, head in heads.items(): write(x, -0.4, head, color=GREY)
        if any(map(_is_by_assumed_recipe, rows)): write(RUNS_AT, y + 1.2, '* assumed recipe', color=GREY)
        ax.set(xlim=limits, ylim=(len(lines) + spacing[-1] - 0.4, -0.6), yticks=[],
               xlabel='difference in accuracy (points)')
        for side in ('left', 'bottom'): ax.spines[side].set_visible(side == 'bottom')
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        ax.grid(axis='x', color=PALE, lw=0.3, alpha=0.6)
        ax.set_axisbelow(True)
        return fig


def _lines(rows):
    "Yields the lines of a forest, from above: (kind, words, row, whose); the claims with runs of ours come first."
    def is_ours(row): return not np.isnan(row['difference']['difference'])
    published_alone = [row | dict(fault='') for row in rows if not is_ours(row)]  # A fault is one of our runs.
    rows = [*filter(is_ours, rows), *compare.once(published_alone)]
    claims, words = {}, {id(row): title for row, title in zip(rows, tables.titles(rows))}
    for row in rows: claims.setdefault(_claim(row), []).append(row)
    for claim, group in sorted(claims.items(), key=lambda item: not any(map(is_ours, item[1]))):
        yield 'claim', claim, None, None
        titles, pairs = {words[id(row)] for row in group}, {tables.arms(row) for row in group}
        of_one_pair = len(pairs) == 1 and len(titles) > 1
        if of_one_pair: yield 'title', pairs.pop(), None, None
        before = None
        for row in sorted(group, key=lambda row: not is_ours(row)):
            title = words[id(row)]
            if title != before and not of_one_pair: yield 'title', f'{title}, {_images(row)}', None, None
            before = title
            label = f'{title}' if of_one_pair else _pair(row)
            for whose in WHOSE:
                if np.isnan(_test(row, whose)['difference']): continue
                yield 'row', label, row, whose
                label = ''


def _claim(row):
    name = row['experiment']
    return EXPERIMENTS[name].claim if name in EXPERIMENTS else name


def _images(row):
    "Returns the split of a row and the number of its validation images, where that is known, in words."
    if pd.isna(row['n_val']): return f'split {row["split"]}'
    words = f'{int(row["n_val"]):,} validation images'
    return f'split {row["split"]}, {words}' if row['planned'] else words


def _is_by_assumed_recipe(row):
    "Returns whether a difference is published by a recipe that is assumed in part."
    return row['published']['recipe'] == 'assumed' and not np.isnan(row['published']['difference']['difference'])


def _pair(row): return tables.arms(row) + ('' if row['tested'] else ' (described)')


def _test(row, whose):
    "Returns difference, low and high of a row of compare.gaps, 'published' or 'ours'."
    return row['published']['difference'] if whose == 'published' else row['difference']


def _n_runs(row):
    "Returns the runs of the arm of a row that has fewer."
    return min(row['ours'][side]['n'] for side in compare.SIDES)


def _bar(ax, ends, y, whose, limits):
    "Draws a difference with its interval at height `y`; what lies beyond the limits of the axis ends in an arrow."
    d, low, high = ends
    color, fill, mark, width = (OURS, OURS, 'o', 1.6) if whose == 'ours' else (GREY, 'white', 's', 0.9)
    if not np.isnan(low): ax.plot(np.clip([low, high], *limits), [y, y], color=color, lw=width)
    if limits[0] <= d <= limits[1]: ax.plot(d, y, mark, mfc=fill, mec=color, ms=4.2, mew=0.9, label=whose)
    for beyond, end, arrow in ((min(ends) < limits[0], limits[0], '<'), (max(ends) > limits[1], limits[1], '>')):
        if beyond: ax.plot(end, y, arrow, color=color, ms=4, clip_on=False)


# --- what each layer changes, and how much it adds ---

LAYER_AXES = (1.0, 3.9), (5.2, 7.0)  # inches from the left, where the axes of the change and of the size begin and end


def layers(rows):
    "Returns a Figure of `rows` (compare.beside_first): of each layer its change, and how many times its input it adds."
    titles = [f'{row["experiment"]}, {_images(row)}, {row["precision"]}' for row in rows]
    lines = []  # (title, None) before the rows of a set, ('', row)
    for row, title in zip(rows, titles): lines += [('', row)] if (title, None) in lines else [(title, None), ('', row)]
    with rc_context(STYLE):
        rows_height = LINE * len(lines)
        height = rows_height + 0.85
        fig = Figure(figsize=(WIDTH, height))
        change, size = (place(fig, left, 0.35, right - left, rows_height) for left, right in LAYER_AXES)
        def write(x, y, words, **style):
            change.text((x - LAYER_AXES[0][0]) / np.ptp(LAYER_AXES[0]), y, words, va='center', fontsize=7.5,
                        transform=change.get_yaxis_transform(), **style)
        found = np.array([in_points(row['difference']) for row in rows])
        limits = min(-1, np.floor(np.nanmin(found))), max(1, np.ceil(np.nanmax(found)))
        for y, (title, row) in enumerate(lines):
            if row is None:
                write(0.08, y, title, weight='bold')
                continue
            write(0.08, y, row['arm'])
            _bar(change, in_points(row['difference'], _n_runs(row)), y, 'ours', limits)
            write(LAYER_AXES[0][1] + 0.1, y, tables.change(row['difference']))
            size.plot([0, row['adds']], [y, y], color=PALE, lw=0.9)
            size.plot(row['adds'], y, 'o', mfc=OURS, mec=OURS, ms=4.2, clip_on=False)
        write(0.08, -0.9, f'{rows[0]["base"]} →', color=GREY)
        write(LAYER_AXES[0][0], -0.9, 'estimate, 95 % interval', color=GREY)
        write(LAYER_AXES[1][0], -0.9, 'mean of the runs', color=GREY)
        change.axvline(0, color=INK, lw=0.6, zorder=0)
        change.set(xlim=limits, xlabel='difference in accuracy (points)')
        size.set(xlim=(0, None), xlabel='adds, times its input')
        for ax in (change, size):
            ax.set(ylim=(len(lines) - 0.4, -0.6), yticks=[])
            ax.spines['left'].set_visible(False)
        return fig


# --- the runs of an experiment ---

def experiments(rows, runs, published, results=runlog.RESULTS):
    "Returns {name: Figure} of the experiments in the `rows` (compare.gaps) that have runs of two arms in common."
    names = {row['experiment']: None for row in compare.for_readers(rows) if _has_runs_of_both(row)}
    recipes = compare.by_recipe(runs)
    return {name: experiment(name, EXPERIMENTS[name], rows, runs, published, results, recipes) for name in names}


def _has_runs_of_both(row): return not np.isnan(row['difference']['difference'])


def experiment(name, exp, rows, runs, published, results=runlog.RESULTS, recipes=None):
    """Returns a Figure of an experiment: of each set of images the runs, the differences, and these after each epoch.

    Arms without runs are left out, and runs with a fault once all are made again. The planned sets come first, of these
    those that have all their runs, those without a fault before those with one, and large before small. Run times are
    not drawn: the record does not say which runs shared their machine with others.
    """
    rows, parts = compare.up_to_date(rows), []
    for key, arms in compare.sets(exp, runs, recipes=recipes):
        of_set = [row for row in rows if row['experiment'] == name and compare.set_key(row) == compare.set_key(key)]
        of_set = [row for row in of_set if _has_runs_of_both(row)]
        arms = {arm: found for arm, found in arms.items() if compare.accuracies(found, exp.metric)}
        if compare.for_readers(of_set): parts.append((key, arms, of_set))
    if not parts: raise UsageError(f'{name}: no runs of two arms to plot')
    def rank(key, arms, of_set):
        is_whole = all(compare.has_all_runs(row) for row in of_set)
        return not key['planned'], not is_whole, key['fault'], -sum(map(len, arms.values()))
    parts.sort(key=lambda part: rank(*part))
    with rc_context(STYLE):
        heights = [_height(arms, of_set) for _, arms, of_set in parts]
        fig = Figure(figsize=(WIDTH, sum(heights)))
        for top, (key, arms, of_set) in zip(np.cumsum([0, *heights]), parts):
            y, assumed = 1 - (top + 0.17) / sum(heights), any(map(_is_by_assumed_recipe, of_set))
            fig.text(0.08 / WIDTH, y, _what(name, key), fontsize=8.5, weight='bold')
            if assumed: fig.text(1 - RIGHT / WIDTH, y, 'published: assumed recipe', ha='right', color=GREY, size=7)
            first, second = (place(fig, left, top + below, *size) for left, below, *size in _two(arms, of_set))
            points(first, exp, arms, published if key['planned'] else published[:0])
            differences(second, of_set)
            by_epoch(fig, top + _height(arms, of_set) - _epochs_height(of_set), of_set, results)
        return fig


LEFT, RIGHT = 0.55, 0.1  # inches beside the axes
PANELS = 5  # panels of differences by epoch in a row


def place(fig, left, top, width, height):
    """Returns new axes at these inches from the left and the top of a figure.

    A layout that is solved for differs in its last digits from run to run, and so would the files.
    """
    whole_width, whole_height = fig.get_size_inches()
    return fig.add_axes((left / whole_width, 1 - (top + height) / whole_height, width / whole_width,
                         height / whole_height))


def _two(arms, rows):
    "Returns (left, top, width, height) in inches of the axes of the runs and of the differences of a set."
    if len(arms) <= 4 and len(rows) <= 4: return (LEFT, 0.45, 2.95, 2.1), (LEFT + 3.6, 0.45, 2.95, 2.1)
    width, height = WIDTH - LEFT - RIGHT, 1.45
    return (LEFT, 0.45, width, height), (LEFT, 0.45 + height + 0.3 + _names_height(_arm_names(arms)), width, height)


def _height(arms, rows):
    "Returns the inches of a set."
    _, (_, top, _, height) = _two(arms, rows)
    return top + height + _names_height(_pair_names(rows)) + 0.1 + _epochs_height(rows)


def _epochs_height(rows): return 0.25 + 1.5 * -(-len(rows) // PANELS)


def _what(name, key):
    "Returns the title of a set of images."
    images = 'validation images' if pd.isna(key['n_val']) else f'{int(key["n_val"]):,} validation images'
    words = [f'{name}: split {key["split"]}', images, compare.archive(key['source']), key['precision'], key['fault']]
    return ', '.join(filter(None, words))


def points(ax, exp, arms, published):
    """Draws every run, those of one seed joined by a line, and beside it the mean of its arm with its 95 % interval.

    A dashed line marks the published mean.
    """
    found = {arm: compare.accuracies(of_arm, exp.metric) for arm, of_arm in arms.items()}
    for seed in sorted(set().union(*found.values())):
        at = [x for x, of_arm in enumerate(found.values()) if seed in of_arm]
        values = [100 * of_arm[seed] for of_arm in found.values() if seed in of_arm]
        ax.plot(at, values, '-o', color=PALE, lw=0.6, ms=2.5, mew=0, label='seed')
    said = {arm: published_mean(exp, arm, published) for arm in found}
    for x, (arm, of_arm) in enumerate(found.items()):
        s = stats.summary([100 * accuracy for accuracy in of_arm.values()])
        if s['n'] >= FEW: ax.plot([x + 0.16] * 2, [s['low'], s['high']], color=OURS, lw=1.6)
        ax.plot(x + 0.16, s['mean'], 'o', color=OURS, ms=4.5, label='mean')
        ax.text(x + 0.25, s['mean'], f'{s["mean"]:.1f}', color=OURS, **CLEAR)
        if said[arm] is not None:
            ax.plot([x - 0.38, x - 0.06], 2 * [100 * said[arm]['mean']], color=INK, lw=1.1, ls=(0, (2.5, 1.5)),
                    label='published')
    ax.set(xlim=(-0.5, len(found) - 0.3), ylabel=LABELS[exp.metric])
    _name(ax, _arm_names(arms))
    dashed = ' · dashed: published' if any(row is not None for row in said.values()) else ''
    ax.set_title(f'line: a seed · disc: mean of all, 95 %{dashed}', fontsize=7, loc='left', color=GREY)


def differences(ax, rows):
    "Draws for each row of compare.gaps the difference at each seed, its mean with its interval, the published one."
    for x, row in enumerate(rows):
        values = np.array([100 * (arm.value - base.value) for base, arm in row['pairs']])
        ax.plot(x - 0.1 + 0.07 * (np.arange(len(values)) % 3 - 1), values, 'o', color=PALE, ms=3, mew=0, label='seed')
        d, low, high = in_points(row['difference'], _n_runs(row))
        ax.plot([x + 0.14] * 2, [low, high], color=OURS, lw=1.6)
        ax.plot(x + 0.14, d, 'o', color=OURS, ms=4.5, label='mean')
        ax.text(x + 0.22, d, f'{d:+.1f}', color=OURS, **CLEAR)
        d, low, high = in_points(row['published']['difference'])
        ax.plot([x - 0.32] * 2, [low, high], color=GREY, lw=0.9)
        ax.plot(x - 0.32, d, 's', mfc='white', mec=GREY, ms=4.2, mew=0.9, label='published')
    ax.axhline(0, color=INK, lw=0.6)
    ax.set(xlim=(-0.5, len(rows) - 0.3), ylabel='difference (points)')
    _name(ax, _pair_names(rows))
    is_published = [not np.isnan(row['published']['difference']['difference']) for row in rows]
    square = ' · square: published' if any(is_published) else ''
    is_mean = all(row['difference']['method'] == stats.PAIRED for row in rows)
    estimate = 'mean' if is_mean else 'estimate'
    ax.set_title(f'dot: a seed · disc: {estimate}, 95 % interval{square}', fontsize=7, loc='left', color=GREY)


def _arm_names(arms): return [f'{arm}\n{len(compare.ended_ok(found))} runs' for arm, found in arms.items()]


def _pair_names(rows):
    return ['\n'.join([row['arm'], f'− {row["base"]}', f'{len(row["pairs"])} seeds',
                       *wrap(row['asks'] if row['tested'] else 'described', 10)]) for row in rows]


def _longest(labels): return max((len(line) for label in labels for line in label.split('\n')), default=0)


def _names_size(labels):
    "Returns the font size with which names of ticks fit beside each other, or None."
    room = (WIDTH - LEFT - RIGHT) / (2.3 if len(labels) <= 4 else 1) / max(len(labels), 1)
    return next((size for size in (7.5, 6.5) if _longest(labels) * 0.57 * size / 72 <= room), None)


def _names_height(labels):
    "Returns the inches that names of ticks need."
    n_lines = max((label.count('\n') + 1 for label in labels), default=0)
    return max(0.5, 0.05 + 0.15 * n_lines) if _names_size(labels) else 0.15 + _longest(labels) * 0.06


def _name(ax, labels):
    "Names the ticks of the x axis, smaller or upright where they would not fit beside each other."
    size = _names_size(labels)
    ax.set_xticks(range(len(labels)), labels, fontsize=size or 7, rotation=0 if size else 90)


def by_epoch(fig, top, rows, results):
    """Draws the difference at shared seeds after each epoch, a panel for each row, with its 95 % interval.

    It begins `top` inches below the top of the figure.
    """
    found = [(row, epoch_differences(row['pairs'], results)) for row in rows]
    found = [(row, table) for row, table in found if len(table)]
    if not found: return
    whole = fig.get_size_inches()[1]
    title = 'the difference after each epoch at shared seeds, with its 95 % interval'
    fig.text(0.08 / WIDTH, 1 - (top + 0.15) / whole, title, fontsize=7, color=GREY)
    columns = min(PANELS, max(len(found), 3))
    step = (WIDTH - LEFT - RIGHT + 0.2) / columns
    most = max(abs(table[['low', 'high', 'difference']]).max().max() for _, table in found)
    for number, (row, table) in enumerate(found):
        ax = place(fig, LEFT + number % columns * step, top + 0.45 + number // columns * 1.5, step - 0.2, 0.85)
        ax.fill_between(table.index, table.low, table.high, color=PALE, alpha=0.6, lw=0)
        ax.plot(table.index, table.difference, '-o', color=OURS, lw=1.2, ms=2.5)
        ax.axhline(0, color=INK, lw=0.6)
        ax.set_title(f'{row["arm"]} − {row["base"]}', fontsize=7.5, loc='left')
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.margins(x=0.08)
        ax.set(ylim=(-1.1 * (most or 1), 1.1 * (most or 1)), xlabel='epoch')
        if number % columns: ax.set_yticklabels([])
        else: ax.set_ylabel('points')


def epoch_differences(pairs, results):
    """Returns difference, low and high (see `in_points`) after each epoch, of pairs of Runs whose curves are at hand.

    Runs of different lengths are at different points of their schedules: of these there is nothing.
    """
    curves = [[_curve(run.run_id, results) for run in pair] for pair in pairs]
    curves = [pair for pair in curves if len(pair[0]) and pair[0].index.equals(pair[1].index)]
    if not curves: return pd.DataFrame()
    base, arm = (pd.concat([pair[side] for pair in curves], axis=1) for side in (0, 1))
    tests = {epoch: in_points(stats.compare_paired(base.loc[epoch], arm.loc[epoch]), len(curves))
             for epoch in base.index}
    return pd.DataFrame(tests, index=ENDS).T


def _curve(run_id, results):
    "Returns the accuracy after each epoch of a run; empty where its curve is not at hand."
    return runlog.read_curve(run_id, results).set_index('epoch').accuracy.dropna()
