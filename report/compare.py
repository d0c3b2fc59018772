"""Compares our runs with each other and with the published record: gaps, intervals, verdicts.

A published mean of last epochs stands beside ours of last epochs, one of best epochs beside ours of best epochs: the two are never
mixed. Runs on other images, splits or archives, or of another precision, are a stratum of their own and never pooled. How a verdict is
reached: results/README.md.
"""
from pathlib import Path

import numpy as np
import pandas as pd

import runlog
from experiments import EXPERIMENTS, N_IMAGES, SETTINGS, resolve, setting
from report import stats
from report.published import published_mean

STRATUM = ['split', 'source', 'precision', 'data_fingerprint', 'n_train', 'n_val']  # runs that differ in one of these are not pooled
RECIPE = [key for key in SETTINGS if key not in STRATUM]
SUMMARY = ['dataset', 'split', 'size', 'epochs', 'arch', 'attention', 'precision', 'n', 'mean', 'sd', 'low', 'high', 'bca_low', 'bca_high',
           'median', 'min', 'max', 'mean_max', 'sd_max', 'diverged', 'interrupted', 'failed', 'seconds']  # of `summarise`, for readers


# --- our runs ---

def summarise(runs):
    """One row per comparable setting and variant, fractions: the keys of stats.summary (n, mean, sd, intervals, ...) for the last epoch's
    accuracy of the runs that ended ok (of several with one seed the first), mean_max and sd_max of the best epoch's; how many diverged,
    failed or were interrupted; median seconds."""
    rows, keys = [], [*SETTINGS, *(key for key in STRATUM if key not in SETTINGS)]
    for key, group in runs.groupby(keys, sort=False, dropna=False):
        ok = ended_ok(group)
        best = stats.summary(ok.max_accuracy)
        rows.append(dict(zip(keys, key)) | stats.summary(ok.accuracy) | dict(mean_max=best['mean'], sd_max=best['sd'])
                    | {status: (group.status == status).sum() for status in runlog.STATUSES[1:]} | dict(seconds=group.fit_seconds.median()))
    return pd.DataFrame(rows, columns=None if rows else [*keys, *SUMMARY])


def by_recipe(runs):
    "Returns {recipe: the runs with it}."
    return runlog.by_setting(runs, RECIPE)


def recipe(cfg):
    "Returns the settings but for the images and the precision, which have their own check."
    return setting(resolve(cfg), RECIPE)


def strata(exp, runs, own=None, recipes=None):
    """[(the STRATUM columns of one set (dict), {arm: its runs})] of an Experiment, the latest first.

    `planned` in the dict: the split and the archive, which is whole, are those of `own`, the Experiment as EXPERIMENTS has it.
    Of an `exp` with another split or archive only the sets with these. `recipes`: by_recipe(runs), where it is known.
    """
    recipes = by_recipe(runs) if recipes is None else recipes
    arms = {name: recipes.get(recipe(cfg), runs[:0]) for name, cfg in exp.arms.items()}
    df = pd.concat([found.assign(arm=name) for name, found in arms.items()])
    cfg, out = resolve(next(iter((own or exp).arms.values()))), []
    asked = resolve(next(iter(exp.arms.values())))
    if (asked.split, asked.source) != (cfg.split, cfg.source): df = df[(df.split == asked.split) & (df.source == asked.source)]
    for key, group in df.groupby(STRATUM, dropna=False, sort=True):
        key = dict(zip(STRATUM, key))
        planned = (key['split'], key['source']) == (cfg.split, cfg.source) and _whole(cfg.dataset, key)
        out.append((key | dict(planned=planned), {name: group[group.arm == name] for name in exp.arms}, group.started.max()))
    return [(key, arms) for key, arms, _ in sorted(out, key=lambda s: (s[0]['planned'], s[2]), reverse=True)]


def ended_ok(runs):
    "The runs that ended ok, by seed; of several with one seed the first, as they are no independent repetitions."
    return runs[runs.status == 'ok'].sort_values(['seed', 'run_id']).drop_duplicates('seed')


def values(runs, metric):
    "(accuracies of the runs that ended ok, their seeds)."
    ok = ended_ok(runs)
    return ok['max_accuracy' if metric == 'max' else 'accuracy'].to_numpy(float), ok.seed.tolist()


def correct(runs, results):
    "(runs, images) of 0 and 1 from the predictions at hand of the runs that ended ok; None if one is missing."
    arrays = []
    for run_id in ended_ok(runs).run_id:
        file = Path(results) / 'predictions' / f'{run_id}.npz'
        if not file.exists(): return None
        with np.load(file) as saved: arrays.append(saved['logits'].argmax(1) == saved['targets'])
    return np.array(arrays) if arrays else None


# --- the comparisons ---

def gaps(experiments, runs, published, results=runlog.RESULTS):
    """One row per experiment, set and pair of arms (Experiment.pairs): `arm` minus `base`, ours and published; fractions.

    published_<side>_n, _mean, _sd, <side> being base or arm; published_difference, _low, _high, _p; ours_<side>_ and the keys of
    stats.summary, _diverged, _other, _images_share (of the variance, by the validation images); of the difference the keys of
    stats.compare, those of stats.compare_paired in their place where the arms have the same seeds (paired; but beats, which stays beside
    better_seeds), welch_low, welch_high, welch_p, images_low, images_high (bootstrap over images and runs, where the predictions are
    at hand); holm_p over the rows; verdict; seconds of a run. Without runs one row a pair.
    """
    rows, recipes = [], by_recipe(runs)
    for name, exp in experiments.items():
        own, cfg = EXPERIMENTS.get(name, exp), resolve(next(iter(exp.arms.values())))
        none = dict.fromkeys(STRATUM) | dict(split=cfg.split, source=cfg.source, planned=True), {arm: runs[:0] for arm in exp.arms}
        said = {arm: published_mean(own, arm, published) if recipe(exp.arms[arm]) == recipe(own.arms[arm]) else None for arm in exp.arms}
        metric = next((p.metric for p in said.values() if p is not None), 'last')
        for key, arms in strata(exp, runs, own, recipes) or [none]:
            theirs = said if key['split'] == 'v1' and _whole(cfg.dataset, key) else dict.fromkeys(said)
            sides = {arm: _side(found, metric, results) for arm, found in arms.items()}
            for base, arm in exp.pairs():
                row = _gap(key, sides[base], sides[arm], theirs[base], theirs[arm])
                so_far = _so_far(row, exp.wanted(base), exp.wanted(arm))
                verdict = f'{row["verdict"]}{so_far}'.replace(') (', ', ')
                rows.append(dict(experiment=name, **key, base=base, arm=arm, metric=metric) | row | dict(verdict=verdict))
    if not rows: return pd.DataFrame()  # of one arm
    table = pd.DataFrame(rows)
    return table.assign(holm_p=stats.holm(table.p))


def _side(runs, metric, results):
    "What `_gap` needs of an arm: its accuracies and seeds, predictions (or None), seconds, and the columns ours_<side>_*."
    accuracies, seeds = values(runs, metric)
    right = correct(runs, results) if metric == 'last' else None
    share = stats.validation_noise(right)['share'] if right is not None else float('nan')
    bad = dict(diverged=(runs.status == 'diverged').sum(), other=(~runs.status.isin(runlog.DONE)).sum())
    return dict(accuracies=accuracies, seeds=seeds, correct=right, seconds=runs.fit_seconds,
                columns=stats.summary(accuracies) | bad | dict(images_share=share))


def _gap(key, base, arm, said_base, said_arm):
    "The columns of `gaps` from the `_side`s and the published rows (or None) of two arms of a set."
    theirs = {side: {k: p[k] if p is not None else float('nan') for k in ('mean', 'sd', 'n')}
              for side, p in (('base', said_base), ('arm', said_arm))}
    row = {f'published_{side}_{k}': v for side, numbers in theirs.items() for k, v in numbers.items()}
    row |= {f'ours_{side}_{k}': v for side, s in (('base', base), ('arm', arm)) for k, v in s['columns'].items()}
    published = stats.compare_summaries(*theirs['base'].values(), *theirs['arm'].values())
    row |= {f'published_{k}': published[k] for k in ('difference', 'low', 'high', 'p')}
    welch = stats.compare(base['accuracies'], arm['accuracies'])
    paired = base['seeds'] == arm['seeds'] and len(base['seeds']) > 1
    by_seed = stats.compare_paired(base['accuracies'], arm['accuracies']) if paired else dict(beats=float('nan'))
    row |= welch | {k: v for k, v in by_seed.items() if k not in ('n', 'beats')} | dict(paired=paired, better_seeds=by_seed['beats'])
    row |= {f'welch_{k}': welch[k] for k in ('low', 'high', 'p')}
    both = base['correct'] is not None and arm['correct'] is not None
    images = stats.image_bootstrap(base['correct'], arm['correct']) if both else dict.fromkeys(('low', 'high'), float('nan'))
    row |= dict(images_low=images['low'], images_high=images['high'], seconds=pd.concat([base['seconds'], arm['seconds']]).median())
    if not base['seeds'] or not arm['seeds']: return row | dict(verdict='no runs')
    if not key['planned'] and published['difference'] == published['difference']:
        return row | dict(verdict=f'no verdict: {key["source"]} px archive')
    claim = float('nan') if published['low'] <= 0 <= published['high'] else published['difference']
    return row | dict(verdict=stats.verdict(row['low'], row['high'], claim))


def _so_far(row, *wanted):
    "' (4 of 6 runs)' of the arm of a row of `gaps` with the fewest runs for those wanted, where a verdict on fewer than these is given."
    n, want = min(((row[f'ours_{side}_n'] + row[f'ours_{side}_diverged'], w) for side, w in zip(('base', 'arm'), wanted)),
                  key=lambda pair: pair[0] / pair[1])
    return f' ({n} of {want} runs)' if 0 < n < want and not row['verdict'].startswith(('no verdict', 'no runs')) else ''


def _whole(dataset, key):
    "Whether a set (or a row with none) is on the full archive, where there is one."
    full = N_IMAGES.get((dataset, key['split']))
    return full is None or pd.isna(key['n_train']) or full == (key['n_train'], key['n_val'])


def narrow_enough(pairs, points):
    "Whether the interval of the difference of each of `pairs` of arms (accuracies) has that half-width, looking after every turn."
    return all(bool(stats.fixed_width_done(base, arm, points / 100)) for base, arm in pairs)


def done(exp, table):
    "{arm: runs that need no repetition} of the latest planned set in the rows of `gaps` of one experiment."
    rows = table[table.planned].head(len(exp.pairs()))
    count = {r[side]: r[f'ours_{side}_n'] + r[f'ours_{side}_diverged'] for _, r in rows.iterrows() for side in ('base', 'arm')}
    return {arm: int(count.get(arm, 0)) for arm in exp.arms}


def title(r):
    "The experiment of a row of `gaps`, its metric and set where these are not the usual ones, and what its runs were made with and on."
    words = [r.experiment + (' (best epoch)' if r.metric == 'max' else '')]
    if not r.planned: words += [f'split {r.split}', f'archive {r.source}']
    if not pd.isna(r.precision): words.append(f'{r.precision}, data {r.data_fingerprint}')
    if not _whole(next(iter(EXPERIMENTS[r.experiment].arms.values())).dataset, r) and r.split == r.split:
        words.append(f'{int(r.n_train):,} + {int(r.n_val):,} images')
    return ', '.join(words)
