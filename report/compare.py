"""Compares our runs with each other and with the published record: differences, intervals, verdicts.

A published mean of last epochs stands beside ours of last epochs, one of best epochs beside ours of best epochs: the
two are never mixed. Runs on other images, splits or archives, or of another precision, are a set of their own and are
never pooled. How a verdict is reached: results/README.md.
"""
from pathlib import Path

import numpy as np
import pandas as pd

import runlog
from command import UsageError
from experiments import EXPERIMENTS, N_IMAGES, SETTINGS, resolve, setting
from report import stats
from report.published import published_mean

NAN = float('nan')
SET = ['split', 'source', 'precision', 'data_fingerprint', 'n_train', 'n_val']  # runs that differ in one are not pooled
RECIPE = [key for key in SETTINGS if key not in SET]
SUMMARY = ['dataset', 'split', 'size', 'epochs', 'arch', 'attention', 'precision', 'n', 'mean', 'sd', 'low', 'high',
           'bca_low', 'bca_high', 'median', 'min', 'max', 'mean_max', 'sd_max', 'diverged', 'interrupted', 'failed',
           'seconds']  # of `summarise`, for readers
SIDES = 'base', 'arm'
NO_RUNS, NO_VERDICT = 'no runs', 'no verdict'  # the verdicts that rest on no interval


# --- our runs ---

def summarise(runs):
    """Returns one row per comparable setting and variant, in fractions.

    It has the keys of stats.summary for the last epoch's accuracy of the runs that ended ok, where a seed with several
    runs counts once, by its first; mean_max and sd_max of the best epoch's; how many runs diverged, failed or were
    interrupted; and the median seconds of a run.
    """
    rows, keys = [], [*SETTINGS, *(key for key in SET if key not in SETTINGS)]
    for key, group in runs.groupby(keys, sort=False, dropna=False):
        ok = ended_ok(group)
        best = stats.summary(ok.max_accuracy)
        ends = {status: (group.status == status).sum() for status in runlog.STATUSES[1:]}
        rows.append(dict(zip(keys, key)) | stats.summary(ok.accuracy) | dict(mean_max=best['mean'], sd_max=best['sd'])
                    | ends | dict(seconds=group.fit_seconds.median()))
    return pd.DataFrame(rows, columns=None if rows else [*keys, *SUMMARY])


def by_recipe(runs):
    "Returns {recipe: the runs with it}."
    return runlog.by_setting(runs, RECIPE)


def recipe(cfg):
    "Returns the settings but for the images and the precision, which have their own check."
    return setting(resolve(cfg), RECIPE)


def sets(exp, runs, own=None, recipes=None):
    """Returns [(the SET columns of one set (dict), {arm: its runs})] of an Experiment, the latest first.

    `planned` in the dict says whether the split and the archive, which is whole, are those of `own`, the Experiment as
    EXPERIMENTS has it. Of an `exp` with another split or archive only the sets with these are returned. `recipes` is
    by_recipe(runs), where that is known already.
    """
    recipes = by_recipe(runs) if recipes is None else recipes
    arms = {name: recipes.get(recipe(cfg), runs[:0]) for name, cfg in exp.arms.items()}
    df = pd.concat([found.assign(arm=name) for name, found in arms.items()])
    planned, asked = _images(own or exp), _images(exp)
    if asked != planned: df = df[(df.split == asked['split']) & (df.source == asked['source'])]
    found = []
    for values, group in df.groupby(SET, dropna=False, sort=True):
        key = dict(zip(SET, values))
        dataset = next(iter(exp.arms.values())).dataset
        key['planned'] = planned == {name: key[name] for name in planned} and is_whole(dataset, key)
        of_arms = {name: group[group.arm == name] for name in exp.arms}
        found.append((key['planned'], group.started.max(), key, of_arms))
    found.sort(key=lambda found: found[:2], reverse=True)
    return [(key, of_arms) for _, _, key, of_arms in found]


def _images(exp):
    "Returns {split, source} of the arms of an Experiment, which are on the same images."
    cfg = resolve(next(iter(exp.arms.values())))
    return dict(split=cfg.split, source=cfg.source)


def is_whole(dataset, key):
    "Returns whether a set (or a row of `gaps`) is on the full archive, where there is one."
    full = N_IMAGES.get((dataset, key['split']))
    return full is None or pd.isna(key['n_train']) or full == (key['n_train'], key['n_val'])


def ended_ok(runs):
    "Returns the runs that ended ok, by seed: the first of each seed, as several are no independent repetitions."
    return runs[runs.status == 'ok'].sort_values(['seed', 'run_id']).drop_duplicates('seed')


def values(runs, metric):
    "Returns (the accuracies of the runs that ended ok, their seeds)."
    ok = ended_ok(runs)
    return ok['max_accuracy' if metric == 'max' else 'accuracy'].to_numpy(float), ok.seed.tolist()


def correct(runs, results):
    "Returns (runs, images) of 0 and 1 from the predictions of the runs that ended ok; None if one is not at hand."
    arrays = []
    for run_id in ended_ok(runs).run_id:
        file = Path(results) / 'predictions' / f'{run_id}.npz'
        if not file.exists(): return None
        with np.load(file) as saved: arrays.append(saved['logits'].argmax(1) == saved['targets'])
    return np.array(arrays) if arrays else None


# --- the comparisons ---

def gaps(experiments, runs, published, results=runlog.RESULTS):
    """Returns one row per experiment, set and pair of arms (Experiment.pairs): `arm` minus `base`, in fractions.

    A row is a nested dict; an experiment without runs has one for each of its pairs.
    experiment, the SET columns, planned (see `sets`), base, arm, metric ('last' or 'max')
    published   base, arm: mean, sd, n; difference: difference, low, high, p
    ours        base, arm: the keys of stats.summary, n_wanted, diverged, other (ends), images_share (of the variance,
                by the validation images); seconds: the median of a run
    difference  the keys of stats.compare, those of stats.compare_paired in their place where the arms have the same
                seeds (paired), but for beats; better_seeds: beats of the latter; holm_p, over all rows
    welch       difference, low, high, p of the unpaired test
    images      low, high of a bootstrap over images and runs, where the predictions are at hand
    verdict     verdict, reason, claim (nan: none), half_width; n_runs and n_wanted of the arm that lacks most
    """
    rows, recipes = [], by_recipe(runs)
    for name, exp in experiments.items():
        own, dataset = EXPERIMENTS.get(name, exp), next(iter(exp.arms.values())).dataset
        said = {arm: _said(exp, own, arm, published) for arm in exp.arms}
        metric = next((p['metric'] for p in said.values() if p['metric']), 'last')
        none = dict.fromkeys(SET) | _images(exp) | dict(planned=True), {arm: runs[:0] for arm in exp.arms}
        for key, arms in sets(exp, runs, own, recipes) or [none]:
            comparable = key['split'] == 'v1' and is_whole(dataset, key)
            theirs = said if comparable else dict.fromkeys(said, UNSAID)
            ours = {arm: _arm(found, metric, exp.wanted(arm), results) for arm, found in arms.items()}
            for base, arm in exp.pairs():
                names = dict(experiment=name, **key, base=base, arm=arm, metric=metric)
                rows.append(names | _gap(key, ours[base], ours[arm], theirs[base], theirs[arm]))
    holm_ps = stats.holm([row['difference']['p'] for row in rows])
    for row, p in zip(rows, holm_ps): row['difference']['holm_p'] = float(p)
    return rows


UNSAID = dict(mean=NAN, sd=NAN, n=NAN, metric=None)


def _said(exp, own, arm, published):
    "Returns mean, sd, n and metric of the published row of an arm; UNSAID where its recipe is no more that of `own`."
    if recipe(exp.arms[arm]) != recipe(own.arms[arm]): return UNSAID
    row = published_mean(own, arm, published)
    return UNSAID if row is None else {key: row[key] for key in UNSAID}


def _arm(runs, metric, n_wanted, results):
    "Returns what `_gap` needs of an arm: accuracies, seeds, correct (predictions or None), seconds, and its row."
    accuracies, seeds = values(runs, metric)
    right = correct(runs, results) if metric == 'last' else None
    share = stats.validation_noise(right)['share'] if right is not None else NAN
    row = stats.summary(accuracies) | dict(n_wanted=n_wanted, diverged=int((runs.status == 'diverged').sum()),
                                           other=int((~runs.status.isin(runlog.DONE)).sum()), images_share=share)
    return dict(accuracies=accuracies, seeds=seeds, correct=right, seconds=runs.fit_seconds, row=row)


def _gap(key, base, arm, said_base, said_arm):
    "Returns the parts of a row of `gaps` from the `_arm`s and the published numbers of two arms of a set."
    published = _published(said_base, said_arm)
    difference, welch = _difference(base, arm)
    seconds = pd.concat([base['seconds'], arm['seconds']]).median()
    ours = dict(base=base['row'], arm=arm['row'], seconds=seconds)
    return dict(published=published, ours=ours, difference=difference, welch=welch, images=_over_images(base, arm),
                verdict=_verdict(key, ours, difference, published['difference']))


def _published(base, arm):
    "Returns the published part of a row of `gaps`."
    base, arm = ({key: side[key] for key in ('mean', 'sd', 'n')} for side in (base, arm))
    difference = stats.compare_summaries(*base.values(), *arm.values())
    return dict(base=base, arm=arm, difference={key: difference[key] for key in ('difference', 'low', 'high', 'p')})


def _difference(base, arm):
    "Returns (the difference of two `_arm`s, the same by the unpaired test)."
    unpaired = stats.compare(base['accuracies'], arm['accuracies'])
    welch = {key: unpaired[key] for key in ('difference', 'low', 'high', 'p')}
    paired = base['seeds'] == arm['seeds'] and len(base['seeds']) > 1
    if not paired: return unpaired | dict(paired=False, better_seeds=NAN), welch
    by_seed = stats.compare_paired(base['accuracies'], arm['accuracies'])
    in_place = {key: by_seed[key] for key in ('difference', 'low', 'high', 'p', 'permutation_p')}
    return unpaired | in_place | dict(paired=True, better_seeds=by_seed['beats']), welch


def _over_images(base, arm):
    "Returns low and high of the difference for new runs and new images; nan where predictions are not at hand."
    if base['correct'] is None or arm['correct'] is None: return dict(low=NAN, high=NAN)
    interval = stats.image_bootstrap(base['correct'], arm['correct'])
    return dict(low=interval['low'], high=interval['high'])


def _verdict(key, ours, difference, published):
    "Returns the verdict part of a row of `gaps`."
    counts = [(n_done(ours[side]), ours[side]['n_wanted']) for side in SIDES]
    n_runs, n_wanted = min(counts, key=lambda count: count[0] / count[1])
    row = dict(verdict=NO_RUNS, reason='', claim=NAN, half_width=NAN, n_runs=n_runs, n_wanted=n_wanted)
    if not ours['base']['n'] or not ours['arm']['n']: return row
    low, high, claim = difference['low'], difference['high'], published['difference']
    row['half_width'] = (high - low) / 2
    if not key['planned'] and not np.isnan(claim):
        return row | dict(verdict=NO_VERDICT, reason=f'{key["source"]} px archive')
    if published['low'] <= 0 <= published['high']: claim = NAN
    return row | dict(verdict=stats.verdict(low, high, claim), claim=claim)


def n_done(arm):
    "Returns how many runs of an arm (a row of `gaps`: ours, base or arm) need no repetition."
    return arm['n'] + arm['diverged']


def narrow_enough(pairs, points):
    """Returns whether the interval of the difference of each of `pairs` of arms (accuracies) has that half-width.

    It allows for looking after every turn.
    """
    return all(bool(stats.fixed_width_done(base, arm, points / 100)) for base, arm in pairs)


def known_to(points, pairs, runs, metric):
    """Returns whether the difference of each of `pairs` of arms is known to `points`, from {arm: its runs}.

    Raises UsageError where more runs cannot tell it, as those of each arm all end alike.
    """
    accuracies = {arm: values(found, metric)[0] for arm, found in runs.items()}
    if narrow_enough([(accuracies[a], accuracies[b]) for a, b in pairs], points): return True
    if all(len(a) >= 10 and np.ptp(a) == 0 for a in accuracies.values()):
        raise UsageError('--until: all runs of an arm end alike; stopped')
    return False


def done(exp, rows):
    "Returns {arm: runs that need no repetition} of the latest planned set in the rows of `gaps` of one experiment."
    latest = [row for row in rows if row['planned']][:len(exp.pairs())]
    count = {row[side]: n_done(row['ours'][side]) for row in latest for side in SIDES}
    return {arm: count.get(arm, 0) for arm in exp.arms}


def has_runs(row):
    "Returns whether both arms of a row of `gaps` have runs."
    return row['verdict']['verdict'] != NO_RUNS
