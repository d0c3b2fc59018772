"""The comparisons as text: cells, Markdown, lines for a terminal, and how many runs are still needed."""
import numpy as np
import pandas as pd

from experiments import EXPERIMENTS
from report import stats
from report.compare import title
from report.published import load_published_runs, single_runs_sd


def percent(mean, sd, n, *others):
    "'62.31 ± 1.2 (12)' from fractions: the number of runs in brackets, with those that diverged and those that did not finish."
    bad = ''.join(f', {int(k)} {word}' for k, word in zip(others, ('diverged', 'unfinished')) if k)
    if pd.isna(mean): return f'– (0{bad})' if bad else '–'
    spread, count = '' if pd.isna(sd) else f' ± {100 * sd:.1f}', '?' if pd.isna(n) else int(n)
    return f'{100 * mean:.2f}'.removesuffix('0') + f'{spread} ({count}{bad})'


def change(difference, low, high):
    "'+2.9 [1.1, 4.7]' in points."
    if pd.isna(difference): return ''
    return f'{100 * difference:+.1f}' + ('' if pd.isna(low) else f' [{100 * low:.1f}, {100 * high:.1f}]')


HEAD = ['experiment', 'arms', 'published: first', 'second', 'change', 'ours: first', 'second', 'change [95 %]', 'P (Holm)', 'verdict']


def cells(r):
    "A row of `gaps` as the texts under HEAD."
    def side(whose, arm, *more): return percent(*(r[f'{whose}_{arm}_{k}'] for k in ('mean', 'sd', 'n', *more)))
    theirs = change(*(r[f'published_{k}'] for k in ('difference', 'low', 'high')))
    ours = [side('ours', arm, 'diverged', 'other') for arm in ('base', 'arm')]
    return [title(r), f'{r.base} → {r["arm"]}', side('published', 'base'), side('published', 'arm'), theirs, *ours,
            change(r.difference, r.low, r.high), '' if np.isnan(r.p) else f'{r.p:.2g} ({r.holm_p:.2g})', r.verdict]


def markdown(table):
    "`gaps` as a Markdown table, in percent: mean ± standard deviation (runs), change with its 95 % interval."
    lines = [HEAD, ['---', '---'] + ['---:'] * 7 + ['---'], *(cells(r) for _, r in table.iterrows())]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def text(table, indent=0):
    "`gaps` for a terminal: two lines a row, the second with the tests."
    if table.empty: return 'one arm: nothing to compare it with'
    lines = []
    for _, r in table.iterrows():
        name, arms, *said, theirs, base, arm, ours, _, verdict = cells(r)
        published = f'{theirs or "–"}: {" → ".join(said)}' if set(said) != {'–'} else '–'
        lines.append(f'{name}  {arms}: {verdict}; published {published}; ours {ours or "–"}: {base} → {arm}')
        if not np.isnan(r.p):
            how = f'paired by seed, better at {r.better_seeds:.0%} of the seeds and' if r.paired else 'better'
            more = [f'{how} in {r.beats:.0%} of the pairs of runs', f'P = {r.p:.2g} (Holm {r.holm_p:.2g})',
                    f'permutation P = {r.permutation_p:.2g}', f'Hedges g = {r.g:.2f}']
            if r.paired: more.append(f'Welch [{100 * r.welch_low:.1f}, {100 * r.welch_high:.1f}], P = {r.welch_p:.2g}')
            if not np.isnan(r.images_low): more.append(f'over runs and images [{100 * r.images_low:.1f}, {100 * r.images_high:.1f}]')
            shares = [f'{s:.0%}' for s in (r.ours_base_images_share, r.ours_arm_images_share) if not np.isnan(s)]
            if shares: more.append(f"the validation images' share of the variance: {', '.join(shares)}")
            lines.append('    ' + ', '.join(more))
    return '\n'.join(' ' * indent + line for line in lines)


def plain_markdown(frame):
    "A frame of texts as a Markdown table."
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in [frame.columns, ['---'] * frame.shape[1], *frame.to_numpy()])


def plan(table):
    """How many runs of each arm the published difference and the one seen so far need, at the spread seen so far, else the published
    one, else that of single runs published with the same settings.

    Of the planned sets, or of all where none is: with --split v2, say.
    """
    if table.empty: return 'one arm: nothing to compare it with'
    lines, singles = [], load_published_runs()
    for _, r in (table[table.planned] if table.planned.any() else table).iterrows():
        arms, said = EXPERIMENTS[r.experiment].arms, not np.isnan(r.published_difference)
        spreads = {whose: [r[f'{whose}_{side}_sd'] for side in ('base', 'arm')] for whose in ('ours', 'published')}
        spreads['single runs published'] = [single_runs_sd(arms[r[side]], singles) for side in ('base', 'arm') if said]
        whose, sd = next(((whose, sd) for whose, sds in spreads.items() if (sd := _pooled(sds)) > 0), (None, float('nan')))
        needs = [f'{words} {100 * d:+.1f} needs {stats.runs_needed(d, sd):,.0f}' for words, d in
                 (('published', r.published_difference), ('seen', r.difference)) if abs(d) > 0 and sd > 0]
        words = f'{", ".join(needs)} runs an arm, unpaired, at sd {100 * sd:.1f} ({whose}), 80 % power' if needs else \
            'no spread or no difference yet'
        lines.append(f'{r.experiment if r.planned else title(r)}  {r["arm"]} - {r.base}: {words}; have {r.ours_base_n} and {r.ours_arm_n}')
    return '\n'.join(lines)


def _pooled(sds):
    "The root mean square of the standard deviations that are known; nan if none is."
    known = [sd for sd in sds if not np.isnan(sd)]
    return float(np.sqrt(np.mean(np.square(known)))) if known else float('nan')
