"""Writes the comparisons as text: Markdown, lines for a terminal, a flat frame for a CSV, how many runs are needed."""
import numpy as np
import pandas as pd

from experiments import EXPERIMENTS
from report import stats
from report.compare import NO_RUNS, NO_VERDICT, SIDES, is_whole
from report.published import load_published_runs, single_runs_sd

HEAD = ['experiment', 'arms', 'published: first', 'second', 'change', 'ours: first', 'second', 'change [95 %]',
        'P (Holm)', 'verdict']
ONE_ARM = 'one arm: nothing to compare it with'


# --- the words of a row of compare.gaps ---

def title(row):
    "Returns the experiment, its metric and set where they are not the usual ones, and the precision and data of its runs."
    words = [row['experiment'] + (' (best epoch)' if row['metric'] == 'max' else '')]
    if not row['planned']: words += [f'split {row["split"]}', f'archive {row["source"]}']
    if row['precision'] is not None: words.append(f'{row["precision"]}, data {row["data_fingerprint"]}')
    dataset = next(iter(EXPERIMENTS[row['experiment']].arms.values())).dataset
    if not is_whole(dataset, row): words.append(f'{int(row["n_train"]):,} + {int(row["n_val"]):,} images')
    return ', '.join(words)


def percent(arm):
    "Returns '62.31 ± 1.2 (12)' of mean, sd and n, fractions: in brackets the runs, with those that did not end ok."
    counts = dict(diverged=arm.get('diverged'), unfinished=arm.get('other'))
    bad = ''.join(f', {n} {word}' for word, n in counts.items() if n)
    if pd.isna(arm['mean']): return f'– (0{bad})' if bad else '–'
    mean = f'{100 * arm["mean"]:.2f}'.removesuffix('0')
    spread = '' if pd.isna(arm['sd']) else f' ± {100 * arm["sd"]:.1f}'
    n = '?' if pd.isna(arm['n']) else int(arm['n'])
    return f'{mean}{spread} ({n}{bad})'


def change(test):
    "Returns '+2.9 [1.1, 4.7]' in points, of difference, low and high; '' where there is no difference."
    if pd.isna(test['difference']): return ''
    points = f'{100 * test["difference"]:+.1f}'
    return points if pd.isna(test['low']) else f'{points} {interval(test)}'


def interval(test):
    "Returns '[1.1, 4.7]' in points, of low and high."
    return f'[{100 * test["low"]:.1f}, {100 * test["high"]:.1f}]'


def verdict(row):
    "Returns the verdict in words, with its half-width where nothing is claimed, and how many runs there are so far."
    found = row['verdict']
    if found['verdict'] == NO_RUNS: return NO_RUNS
    if found['verdict'] == NO_VERDICT: return f'{NO_VERDICT}: {found["reason"]}'
    notes = []
    half_width = found['half_width'] if np.isnan(found['claim']) else np.nan
    if not np.isnan(half_width): notes.append(f'± {100 * half_width:.1f} points')
    if 0 < found['n_runs'] < found['n_wanted']: notes.append(f'{found["n_runs"]} of {found["n_wanted"]} runs')
    return f'{found["verdict"]} ({", ".join(notes)})' if notes else found['verdict']


def cells(row):
    "Returns a row of `gaps` as the texts under HEAD."
    published, ours, test = row['published'], row['ours'], row['difference']
    p = '' if np.isnan(test['p']) else f'{test["p"]:.2g} ({test["holm_p"]:.2g})'
    return [title(row), f'{row["base"]} → {row["arm"]}', percent(published['base']), percent(published['arm']),
            change(published['difference']), percent(ours['base']), percent(ours['arm']), change(test), p, verdict(row)]


# --- tables ---

def markdown(rows):
    "Returns `gaps` as a Markdown table, in percent: mean ± standard deviation (runs), change with its 95 % interval."
    lines = [HEAD, ['---', '---'] + ['---:'] * 7 + ['---'], *(cells(row) for row in rows)]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def plain_markdown(frame):
    "Returns a frame of texts as a Markdown table."
    lines = [frame.columns, ['---'] * frame.shape[1], *frame.to_numpy()]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def text(rows, indent=0):
    "Returns `gaps` for a terminal: two lines a row, the second with the tests."
    lines = []
    for row in rows:
        name, arms, *said, theirs, base, arm, ours, _, words = cells(row)
        published = '–' if set(said) == {'–'} else f'{theirs or "–"}: {" → ".join(said)}'
        lines.append(f'{name}  {arms}: {words}; published {published}; ours {ours or "–"}: {base} → {arm}')
        if not np.isnan(row['difference']['p']): lines.append('    ' + ', '.join(_tests(row)))
    return '\n'.join(' ' * indent + line for line in lines or [ONE_ARM])


def _tests(row):
    "Returns what the tests of a row say, in short texts."
    test, welch = row['difference'], row['welch']
    where = f'in {test["beats"]:.0%} of the pairs of runs'
    if test['paired']: where = f'at {test["better_seeds"]:.0%} of the seeds and {where}'
    lines = [f'paired by seed, better {where}' if test['paired'] else f'better {where}',
             f'P = {test["p"]:.2g} (Holm {test["holm_p"]:.2g})',
             f'permutation P = {test["permutation_p"]:.2g}',
             f'Hedges g = {test["g"]:.2f}']
    if test['paired']: lines.append(f'Welch {interval(welch)}, P = {welch["p"]:.2g}')
    if not np.isnan(row['images']['low']): lines.append(f'over runs and images {interval(row["images"])}')
    shares = [row['ours'][side]['images_share'] for side in SIDES]
    shares = [f'{share:.0%}' for share in shares if not np.isnan(share)]
    if shares: lines.append(f"the validation images' share of the variance: {', '.join(shares)}")
    return lines


def frame(rows):
    """Returns `gaps` as a frame with one column per number, for a CSV: ours_base_mean of row['ours']['base']['mean'].

    A name is not repeated: row['difference']['difference'] is the column `difference`.
    """
    return pd.DataFrame([_flat(row) for row in rows])


def _flat(nested, path=()):
    "Returns {'ours_base_mean': value} of a nested dict."
    flat = {}
    for key, value in nested.items():
        names = path if path[-1:] == (key,) else (*path, key)
        flat |= _flat(value, names) if isinstance(value, dict) else {'_'.join(names): value}
    return flat


# --- how many runs it takes ---

def plan(rows):
    """Returns how many runs of each arm the published difference and the one seen so far need, a line a row.

    They need them at the spread seen so far, else at the published one, else at that of single runs that were published
    with the same settings. The rows are those of the planned sets, or all where none is planned: with --split v2, say.
    """
    if not rows: return ONE_ARM
    singles, planned = load_published_runs(), [row for row in rows if row['planned']]
    return '\n'.join(_plan(row, singles) for row in planned or rows)


def _plan(row, singles):
    whose, sd = _spread(row, singles)
    differences = dict(published=row['published']['difference']['difference'], seen=row['difference']['difference'])
    needs = [f'{words} {100 * d:+.1f} needs {stats.runs_needed(d, sd):,.0f}' for words, d in differences.items()
             if abs(d) > 0 and sd > 0]
    words = f'{", ".join(needs)} runs an arm, unpaired, at sd {100 * sd:.1f} ({whose}), 80 % power'
    name = row['experiment'] if row['planned'] else title(row)
    have = f'have {row["ours"]["base"]["n"]} and {row["ours"]["arm"]["n"]}'
    return f'{name}  {row["arm"]} - {row["base"]}: {words if needs else "no spread or no difference yet"}; {have}'


def _spread(row, singles):
    "Returns (whose it is, the sd that a plan is made with); (None, nan) where none is known."
    spreads = {whose: [row[whose][side]['sd'] for side in SIDES] for whose in ('ours', 'published')}
    if not np.isnan(row['published']['difference']['difference']):
        arms = EXPERIMENTS[row['experiment']].arms
        spreads['single runs published'] = [single_runs_sd(arms[row[side]], singles) for side in SIDES]
    for whose, sds in spreads.items():
        sd = _pooled(sds)
        if sd > 0: return whose, sd
    return None, float('nan')


def _pooled(sds):
    "Returns the root mean square of the standard deviations that are known; nan if none is."
    known = [sd for sd in sds if not np.isnan(sd)]
    return float(np.sqrt(np.mean(np.square(known)))) if known else float('nan')
