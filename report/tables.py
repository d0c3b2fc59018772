"""Writes the comparisons as text: Markdown, tables for a terminal, a flat frame for a CSV, how many runs are needed."""
from io import StringIO
from itertools import chain
from pathlib import Path
from textwrap import wrap

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from command import shown
from experiments import EXPERIMENTS
from report import stats
from report.compare import (
    APART,
    DESCRIBED,
    INCOMPLETE,
    NO_RUNS,
    NO_VERDICT,
    SET_COLUMNS,
    SIDES,
    has_all_runs,
    has_runs,
    is_whole,
    once,
    once_a_set,
    up_to_date,
)
from report.published import load_published_runs, single_runs_sd
from runlog import RESULTS

HEAD = ['experiment', 'arms', 'published: first', 'second', 'change', 'ours: first', 'second', 'change [95 %]', 'test',
        'P (Holm)', 'permutation P', 'verdict']
ASKED = ['runs', 'what it asks', 'contrast', 'ours', 'change [95 %]', 'P (Holm)', 'verdict', 'commit of the plan']
LAYERS = ['runs', 'layer', 'the first arm → it', 'change [95 %]', 'adds']
BRIEF = ['experiment', 'arms', 'published', 'ours', 'change [95 %]', 'P (Holm)', 'verdict']
ONE_ARM = 'one arm: nothing to compare it with'
TERMINAL = 100  # characters in a line of a terminal


# --- the words of a row of compare.gaps ---
#
# A text that a table shows is a list of parts: a line of prose joins them with spaces, a narrow column has a line for
# each.

def titles(rows):
    "Returns a title for each row: the experiment, and of its set what tells it from the others of that experiment."
    found = {}  # (experiment, column of SET_COLUMNS): its values, in rows with runs
    for row in rows:
        for name in SET_COLUMNS:
            if row['precision'] is not None: found.setdefault((row['experiment'], name), set()).add(row[name])
    def differing(row): return {name for name in SET_COLUMNS if len(found.get((row['experiment'], name), ())) > 1}
    return [_title(row, differing(row)) for row in rows]


def _title(row, differing):
    "Returns the title of a row, with those columns of SET_COLUMNS that differ in its experiment."
    words = [row['experiment'] + (' (best epoch)' if row['metric'] == 'max' else '')]
    if row['folder']: words.append(f'folder {row["folder"]}')
    if not row['planned']: words.append(f'split {row["split"]}')
    if row['verdict']['verdict'] == NO_VERDICT or 'source' in differing: words.append(f'archive {row["source"]}')
    if 'precision' in differing and row['precision']: words.append(row['precision'])
    if 'data_fingerprint' in differing and row['data_fingerprint']: words.append(f'data {row["data_fingerprint"]}')
    if row['fault']: words.append(row['fault'])
    if not is_whole(row['dataset'], row): words.append(f'{int(row["n_train"]):,} + {int(row["n_val"]):,} images')
    return ', '.join(words)


def arms(row): return f'{row["base"]} → {row["arm"]}'


def percent(arm):
    """Returns '62.31 ± 1.2 (12)' of mean, sd and n, fractions.

    In brackets are the runs, '10 of 14' where not all count, and how many did not end ok.
    """
    notes = _notes(arm)
    if pd.isna(arm['mean']): return '–' if len(notes) == 1 else f'– ({", ".join(notes)})'
    spread = '' if pd.isna(arm['sd']) else f' ± {100 * arm["sd"]:.1f}'
    return f'{mean(arm)}{spread} ({", ".join(notes)})'


def _notes(arm):
    "Returns ['10 of 14', '1 diverged']: how many runs of an arm count, and how many did not end ok."
    ends = dict(diverged=arm.get('diverged'), unfinished=arm.get('other'))
    return [_count(arm)] + [f'{n} {word}' for word, n in ends.items() if n]


def mean(arm):
    "Returns '62.31' of the mean of an arm, a fraction."
    return '–' if pd.isna(arm['mean']) else f'{100 * arm["mean"]:.2f}'.removesuffix('0')


def _count(arm):
    "Returns '12', the runs of an arm; '10 of 14' where not all count, '?' where their number is not published."
    if pd.isna(arm['n']): return '?'
    total = arm.get('n_ok', arm['n'])
    return f'{arm["n"]:.0f}' if arm['n'] == total else f'{arm["n"]:.0f} of {total:.0f}'


def both(whose):
    "Returns ['62.3 → 65.2', '(12, 12)'] of base and arm, published or ours; ['–'] where neither has runs."
    sides = [whose[side] for side in SIDES]
    notes = [_notes(side) for side in sides]
    is_plain = max(map(len, notes)) == 1
    if is_plain and all(pd.isna(side['mean']) for side in sides): return ['–']
    runs = (', ' if is_plain else '; ').join(map(', '.join, notes))
    return [' → '.join(map(mean, sides)), f'({runs})']


def n_runs(whose):
    "Returns '12, 12', the runs of base and arm; ? where their number is not published."
    counts = [whose[side]['n'] for side in SIDES]
    return ', '.join('?' if pd.isna(n) else f'{n:.0f}' for n in counts)


def change(test):
    """Returns '+2.9 [1.1, 4.7]' in points, of difference, low and high; '' where there is no difference.

    There are two decimals where an end of the interval is within 0.1 points of 0.
    """
    if pd.isna(test['difference']): return ''
    points = f'{100 * test["difference"]:+.{_decimals(test)}f}'
    return points if pd.isna(test['low']) else f'{points} {interval(test)}'


def interval(test):
    "Returns '[1.1, 4.7]' in points, of low and high."
    decimals = _decimals(test)
    return f'[{100 * test["low"]:.{decimals}f}, {100 * test["high"]:.{decimals}f}]'


def _decimals(test): return 2 if min(abs(test['low']), abs(test['high'])) < 0.001 else 1


def published(row):
    "Returns the parts of the published change, with a word where the recipe of its numbers is assumed or not its own."
    recipe, words = row['published']['recipe'], change(row['published']['difference'])
    if recipe == 'other script': return ['no baseline:', 'other script']
    if not words: return []
    return [f'{words},', 'assumed recipe'] if recipe == 'assumed' else [words]


METHODS = {stats.PAIRED: 'paired t', stats.MODEL: 'seed + arm', stats.UNPAIRED: 'Welch'}


def method(test):
    "Returns the name of the test, with the seeds that the arms share where it uses them; '' without a test."
    if pd.isna(test['p']): return ''
    return METHODS[test['method']] + (f', {test["n_pairs"]} seeds' if test['n_pairs'] else '')


ANALYSES = dict(alike='like pairs', steps='one kind of step', all='all runs')  # of the same runs, see compare.gaps


def changes(row, analyses=ANALYSES):
    "Returns the change of a row, then what other `analyses` of the same runs say, a text each."
    return [' '.join(parts) for parts in change_parts(row, analyses)]


def change_parts(row, analyses=ANALYSES):
    """Returns the texts of `changes`, each as parts.

    There is more than one only where not all runs were made alike, see compare.gaps.
    """
    test, others = row['difference'], row['sensitivity']
    words = change(test)
    found = [[words] if words else []]
    if words and test['runs'] != 'all': found[0].append(f'({test["n_pairs"]} {test["runs"]})')
    elif words and others['mixed'] and not others['alike']['n_base']: found.append(['no like pairs'])
    for key in analyses:
        n_base, n_arm = others[key]['n_base'], others[key]['n_arm']
        if not n_base or not n_arm: continue
        runs = f'{n_base} {ANALYSES[key]}' if key == 'alike' else f'{ANALYSES[key]}, {n_base} and {n_arm}'
        found.append([f'{runs}:', change(others[key])])
    return found


def _with_images(row):
    "Returns `changes` with the interval over images behind the change that it belongs to."
    found = changes(row)
    return found[:1] + over_images(row) + found[1:]


def over_images(row):
    "Returns ['over images too: [1.6, 4.9]'], the interval over runs and images; [] where predictions are not at hand."
    return [] if np.isnan(row['images']['low']) else [f'over images too: {interval(row["images"])}']


def verdict(row):
    "Returns the verdict in words, and after a semicolon the one with the diverged runs at chance."
    return '; '.join(' '.join(parts) for parts in verdict_parts(row))


def verdict_parts(row):
    """Returns the verdict of a row and, where runs diverged, the one with these at chance, each as parts.

    In brackets are its reason where it is not the usual one, the half-width where nothing is claimed, whether not all
    runs were made alike, and how many runs there are so far.
    """
    found = row['verdict']
    if found['verdict'] in (NO_RUNS, APART, INCOMPLETE, NO_VERDICT):
        return [[f'{found["verdict"]}:', found['reason']]] if found['reason'] else [[found['verdict']]]
    notes = [found['reason']] if found['reason'] else []
    claimed, half_width = not np.isnan(found['claim']), found['half_width']
    if is_assumed(row): notes.append('assumed recipe')
    if not claimed and not np.isnan(half_width): notes.append(f'± {100 * half_width:.1f} points')
    if is_unlike(row): notes.append(UNLIKE)
    is_whole = found['n_runs'] >= found['n_wanted']
    if not is_whole: notes.append(f'{found["n_runs"]} of {found["n_wanted"]} runs')
    sides = [(row[side], row['ours'][side]) for side in SIDES]
    more = [f'{name} {arm["n_done"]} for {arm["n_wanted"]}' for name, arm in sides if arm['n_done'] > arm['n_wanted']]
    if more: notes.append(f'more runs than wanted: {", ".join(more)}')
    diverged = sum(arm['diverged'] for _, arm in sides)
    if diverged and not found['at_chance']: notes.append(f'{diverged} diverged, not counted')
    so_far = '' if is_whole or found['verdict'] in (stats.TOO_FEW, DESCRIBED) else 'so far:'
    words = [list(filter(None, [so_far, found['verdict'], f'({", ".join(notes)})' if notes else '']))]
    if found['at_chance']: words.append(['with the diverged runs at chance:', found['at_chance']])
    return words


UNLIKE = 'of unlike runs'


def is_unlike(row):
    "Returns whether the verdict is of runs of which not all have a partner that was made alike."
    return row['difference']['runs'] != 'like pairs' and row['sensitivity']['mixed']


def is_assumed(row):
    "Returns whether the recipe of the claim is assumed."
    return not np.isnan(row['verdict']['claim']) and row['published']['recipe'] == 'assumed'


def holm(row):
    "Returns '0.041 (0.12)', P and Holm's P; '' without a test, or where the pair is not one that is tested."
    return ' '.join(holm_parts(row))


def holm_parts(row):
    "Returns the text of `holm` as parts."
    test = row['difference']
    if np.isnan(test['p']) or not row['tested']: return []
    return [f'{test["p"]:.2g}', f'({test["holm_p"]:.2g})']


# --- tables ---

def markdown(rows):
    "Returns `gaps` as a Markdown table, in percent: mean ± standard deviation (runs), change with its 95 % interval."
    return markdown_table(HEAD, [_cells(row, title) for row, title in zip(rows, titles(rows))], numbers=range(2, 11))


def _cells(row, title):
    "Returns a row as the texts under HEAD."
    said, ours, test = row['published'], row['ours'], row['difference']
    permutation_p = '' if np.isnan(test['permutation_p']) or not row['tested'] else f'{test["permutation_p"]:.2g}'
    return [title, arms(row), percent(said['base']), percent(said['arm']), ' '.join(published(row)),
            percent(ours['base']), percent(ours['arm']), '<br>'.join(_with_images(row)), method(test), holm(row),
            permutation_p, verdict(row)]


def brief_markdown(rows):
    """Returns `gaps` as a Markdown table for readers: of each row the runs and the change that decide its verdict.

    Where these runs were not all made alike, the change of those that were stands below it.
    """
    lines = []
    for row, title in zip(rows, titles(rows)):
        said = '<br>'.join(' '.join(parts) for parts in (both(row['published']), published(row)) if parts)
        lines.append([title, arms(row), said, *_brief_cells(row)])
    return markdown_table(BRIEF, lines, numbers=range(2, 6))


def _brief_cells(row):
    "Returns the means and runs that decide the verdict of a row, their change, P and the verdict."
    ours = f'{" → ".join(mean(row["ours"][side]) for side in SIDES)} ({n_runs(row["ours"])})'
    return [ours, '<br>'.join(changes(row, ['alike'])), holm(row), verdict(row)]


def contrasts_markdown(rows):
    """Returns those of `gaps` that have runs and say what they ask as a Markdown table, with the commit of their plan.

    Runs with a fault are left out once all are made again.
    """
    rows = up_to_date(rows)
    lines = [[title, row['asks'], arms(row), *_brief_cells(row), EXPERIMENTS[row['experiment']].plan]
             for row, title in zip(rows, titles(rows)) if row['asks'] and has_runs(row)]
    return markdown_table(ASKED, lines, numbers=range(3, 6))


def layers_markdown(rows, beside):
    """Returns `beside`, compare.beside_first of the `rows` of `gaps`, as a Markdown table; '' where it is empty."""
    lines = []
    for row, title in zip(beside, titles([*rows, *beside])[len(rows):]):
        ours, changes, *_ = _brief_cells(row)
        lines.append([title, row['arm'], ours, changes, '' if np.isnan(row['adds']) else f'{row["adds"]:.1f}'])
    return markdown_table(LAYERS, lines, numbers=range(2, 5)) if lines else ''


def plain_markdown(frame):
    "Returns a frame of texts as a Markdown table."
    return markdown_table(frame.columns, frame.to_numpy())


def explanation(folder):
    "Returns the path from a folder, maybe one of other results, to results/README.md, which explains the tables."
    return Path(shown(RESULTS / 'README.md', folder)).as_posix()


def markdown_table(head, lines, numbers=()):
    "Returns a Markdown table of texts; the columns `numbers` are set flush right."
    rule = ['---:' if i in numbers else '---' for i in range(len(head))]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in [head, rule, *lines])


def text(rows, details=False, indent=0):
    "Returns `gaps` as tables for a terminal, at most TERMINAL characters wide; `details` adds the tests of each row."
    if not rows: return ' ' * indent + ONE_ARM
    groups = {}  # title: its rows
    for row, title in zip(rows, titles(rows)): groups.setdefault(title, []).append(row)
    lines = []
    for title, group in groups.items():
        lines += [title, *_table(group, TERMINAL - indent)]
        if details: lines += _details(group, TERMINAL - indent)
    return '\n'.join(' ' * indent + line for line in lines)


def _table(rows, width):
    "Returns the lines of a table of rows that have one title."
    table = Table(*BRIEF[1:], box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style='')
    table.columns[0].no_wrap = True
    for row in rows: table.add_row(*_cells_of_lines(row))
    console = Console(width=width, file=StringIO(), markup=False, color_system=None)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def _cells_of_lines(row):
    "Returns a row as the texts under BRIEF but for the title, each part on a line of its own."
    cells = [[arms(row)], both(row['published']) + published(row), both(row['ours']), chain(*change_parts(row)),
             holm_parts(row), chain(*verdict_parts(row))]
    return ['\n'.join(parts) for parts in cells]


def _details(rows, width):
    "Returns what the tests of the rows say, in lines."
    words = [f'{arms(row)}: {", ".join(_tests(row))}' for row in rows if holm(row)]
    return [line for text in words for line in wrap(text, width, subsequent_indent='    ')]


def _tests(row):
    "Returns what the tests of a row say, in short texts; results/README.md explains them."
    test, welch = row['difference'], row['welch']
    words = [method(test), f'better {_better(row)}', f'P = {test["p"]:.2g} (Holm {test["holm_p"]:.2g})',
             f'permutation P = {test["permutation_p"]:.2g}', f'Hedges g = {test["g"]:.2f}']
    if test['method'] != stats.UNPAIRED: words.append(f'Welch {interval(welch)}, P = {welch["p"]:.2g}')
    words += over_images(row)
    shares = {row[side]: images_share(row['ours'][side]) for side in SIDES}
    shares = [f'{share} of {arm}' for arm, share in shares.items() if share]
    return words + ([f"the validation images' share of the variance of runs: {', '.join(shares)}"] if shares else [])


def _better(row):
    "Returns how often the second arm is better: 'at 9 of 12 seeds (1 equal) and in 72% of all pairs of runs'."
    words = f'in {row["difference"]["beats"]:.0%} of all pairs of runs'
    if not row['difference']['n_pairs']: return words
    changes = [arm.value - base.value for base, arm in row['pairs']]
    better, equal = sum(d > stats.ROUNDING for d in changes), sum(abs(d) <= stats.ROUNDING for d in changes)
    return f'at {better} of {len(changes)} seeds{f" ({equal} equal)" if equal else ""} and {words}'


SHARE_RUNS = 10  # fewer runs do not tell their variance well enough for a share of it


def images_share(arm):
    """Returns the part of the variance of the runs that is of the validation images, with its interval, in words.

    '' without predictions, and of fewer than SHARE_RUNS runs: their share would as often as not pass 100 %.
    """
    share, n = arm['images_share'], int(arm['n'])
    if np.isnan(share) or n < SHARE_RUNS: return ''
    low, high = stats.share_range(share, n)
    if share > 1: return f'all, as far as {n} runs can tell (at least {low:.0%}),'
    return f'{share:.0%} [{low:.0%}, {high:.0%}]'


def frame(rows):
    """Returns `gaps` as a frame with one column per number, for a CSV: ours_base_mean of row['ours']['base']['mean'].

    A name is not repeated: row['difference']['difference'] is the column `difference`. The pairs have no column.
    """
    return pd.DataFrame([_flat(row, ['pairs']) for row in rows])


def _flat(nested, leave_out, path=()):
    "Returns {'ours_base_mean': value} of a nested dict."
    flat = {}
    for key, value in nested.items():
        if key in leave_out: continue
        names = path if path[-1:] == (key,) else (*path, key)
        flat |= _flat(value, leave_out, names) if isinstance(value, dict) else {'_'.join(names): value}
    return flat


# --- in three sentences ---

def conclusion(rows):
    """Returns what the record says in three sentences, a line each, counted from the verdicts of the tested `rows`.

    The first is of the published differences, the second of what nothing is published about, the third of what is open.
    A verdict counts here once its comparison has all the runs wanted. A comparison counts once for each set of images
    and precision on which it has runs, and once where it has none; runs with a fault count until all are made again.
    """
    rows = [row for row in rows if row['tested'] and row['experiment'] != 'digits']
    with_runs = once_a_set([row for row in rows if has_runs(row)])
    rows = with_runs + [row for row in once(with_runs + rows) if not has_runs(row)]
    def is_published(row): return not np.isnan(row['published']['difference']['difference'])
    lines = []
    for what, said in (('published differences', True), ('comparisons without a published number', False)):
        group = [row for row in rows if is_published(row) == said]
        lines.append(f'Of {len(group)} {what}, {_found([row for row in group if has_all_runs(row)])}.')
    left = [row for row in rows if not has_all_runs(row)]
    begun = sum(row['verdict']['n_runs'] > 0 for row in left)
    lines.append(f'Open are {len(left)} comparisons: {begun} with fewer runs than wanted, {len(left) - begun} without '
                 'runs.')
    return '\n'.join(lines)


def _found(rows):
    "Returns what was found in rows with all their runs, by verdict, in words."
    if not rows: return 'none has all its runs yet'
    verdicts = {}
    for row in rows:
        notes = [note for note, holds in (('assumed recipe', is_assumed(row)), (UNLIKE, is_unlike(row))) if holds]
        words = row['verdict']['verdict'] + (f' ({", ".join(notes)})' if notes else '')
        verdicts.setdefault(words, []).append(row)
    def name(row):
        said = row['published']['difference']['difference']
        words = f'{row["experiment"]}, {arms(row)}: {change(row["difference"])}'
        return words if np.isnan(said) else f'{words}, published {100 * said:+.1f}'
    found = [f'“{words}” for {len(group)} ({"; ".join(map(name, group))})' for words, group in verdicts.items()]
    return f'{len(rows)} {"has all its" if len(rows) == 1 else "have all their"} runs: {", ".join(found)}'


# --- how many runs it takes ---

LEAST = 0.001  # of smaller differences, a tenth of a point, no plan is made
GUESS = 10  # of fewer pairs the sd is known to a factor of more than 2.7


def plan(rows):
    """Returns how many runs of each arm the published difference and the one seen so far need, a line a row.

    They need them at the spread seen so far, else at the published one, else at that of single runs that were
    published with the same settings, for a P of 5 % over the number of comparisons of their experiment: Holm's first
    step. Where seeds are shared, it is the spread of the differences at a seed, of fewer than GUESS seeds a guess. The
    rows are those of the planned sets, or all where none is planned: with --split v2, say.
    """
    if not rows: return ONE_ARM
    singles, rows = load_published_runs(), [row for row in up_to_date(rows) if row['tested']]
    rows = [row for row in rows if row['planned']] or rows
    return '\n'.join(f'{title}  {arms(row)}: {_plan(row, singles)}' for row, title in zip(rows, titles(rows)))


def _plan(row, singles):
    "Returns the line of `plan` of a row, but for its title."
    have = f'have {row["ours"]["base"]["n_done"]} and {row["ours"]["arm"]["n_done"]}'
    whose, sd, paired = _spread(row, singles)
    differences = dict(published=row['published']['difference'], seen=row['difference'])
    needs = [_need(name, test, sd, paired, row['n_tests']) for name, test in differences.items()]
    if not any(needs): return f'no spread or no difference yet; {have}'
    level = '' if row['n_tests'] == 1 else f' at P 0.05 / {row["n_tests"]}'
    how = f'{"paired" if paired else "unpaired"}, at sd {100 * sd:.1f} ({whose}), 80 % power{level}'
    return f'{", ".join(filter(None, needs))}; {how}; {have}'


def _need(name, test, sd, paired, n_tests):
    "Returns how many runs an arm a difference needs, in words; '' where it is not known or the spread is not."
    d = test['difference']
    if pd.isna(d) or not sd > 0: return ''
    if name == 'published' and test['low'] <= 0 <= test['high']: return f'published {100 * d:+.1f} is no claim'
    if abs(d) < LEAST: return f'{name} {100 * d:+.1f} is too small to plan for'
    return f'{name} {100 * d:+.1f} needs {stats.runs_needed(d, sd, paired, alpha=stats.ALPHA / n_tests):,} runs an arm'


def _spread(row, singles):
    "Returns (whose it is, the sd that a plan is made with, whether it is that of pairs); the sd is nan without any."
    test = row['difference']
    if test['pair_sd'] > 0:
        guess = ': a guess' if test['n_pairs'] < GUESS else ''
        return f'of the differences at {test["n_pairs"]} seeds{guess}', test['pair_sd'], True
    spreads = {whose: [row[whose][side]['sd'] for side in SIDES] for whose in ('ours', 'published')}
    if not np.isnan(row['published']['difference']['difference']):
        exp_arms = EXPERIMENTS[row['experiment']].arms
        spreads['single runs published'] = [single_runs_sd(exp_arms[row[side]], singles) for side in SIDES]
    for whose, sds in spreads.items():
        sd = _pooled(sds)
        if sd > 0: return whose, sd, False
    return None, float('nan'), False


def _pooled(sds):
    "Returns the root mean square of the standard deviations that are known; nan if none is."
    known = [sd for sd in sds if not np.isnan(sd)]
    return float(np.sqrt(np.mean(np.square(known)))) if known else float('nan')
