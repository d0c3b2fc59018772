"""Compares our runs with each other and with the published record: differences, intervals, verdicts.

A published mean of last epochs stands beside ours of last epochs, one of best epochs beside ours of best epochs: the
two are never mixed. Runs on other images, splits or archives, of another precision, or with a known fault are a set of
their own and are never pooled. How a verdict is reached: results/README.md.
"""
import sys
from collections import Counter, namedtuple
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path, PurePath

import numpy as np
import pandas as pd

import runlog
from command import UsageError
from experiments import EXPERIMENTS, N_IMAGES, SETTINGS, Config, Experiment, knobs, resolve, setting, variant
from report import stats
from report.published import published_mean, weakest_recipe

NAN = float('nan')
# of a set of runs: those that differ in one of these are not pooled; fault: runlog.faults
SET_COLUMNS = ['split', 'source', 'precision', 'data_fingerprint', 'n_train', 'n_val', 'fault']
RECIPE = [key for key in SETTINGS if key not in SET_COLUMNS]
SUMMARY = ['dataset', 'split', 'size', 'epochs', 'arch', 'attention', 'sa_at', 'opt', 'lr', 'precision', 'fault', 'n',
           'mean', 'sd', 'low', 'high', 'mean_max', 'diverged', 'interrupted', 'failed', 'seconds']  # for readers
STEPS = knobs(role='speed')  # how a step is computed
WAY = [*STEPS, 'torch', 'device']  # how a run was made: what can move its accuracy without being a setting
LIKE_PAIRS = 5  # so many pairs of runs that were made alike decide the verdict where not all runs were
CHANCE = dict.fromkeys(('imagenette', 'imagewoof', 'digits'), 0.1)  # the accuracy of guessing
METRICS = dict(last='accuracy', max='max_accuracy')
SIDES = 'base', 'arm'
NO_RUNS, APART, INCOMPLETE, NO_VERDICT = 'no runs', 'not comparable', 'no complete seed', 'no verdict'
DESCRIBED = 'described, not tested'  # of a pair that is no contrast of its experiment
TEST = 'method', 'n_pairs', 'difference', 'low', 'high', 'p'  # of stats.compare_by_seed, what is kept of other analyses
NO_TEST = dict.fromkeys(TEST, NAN) | dict(method='', n_pairs=0)
NOT_BESIDE = NO_TEST | dict(n_base=0, n_arm=0)


# --- our runs ---

def summarise(runs):
    """Returns one row per comparable setting and variant, in fractions.

    It has the keys of stats.summary for the last epoch's accuracy of the runs that ended ok, where a seed with several
    runs counts once, by its first; mean_max and sd_max of the best epoch's; how many runs diverged, failed or were
    interrupted; and the median seconds of a run.
    """
    rows, keys = [], [*SETTINGS, *(key for key in SET_COLUMNS if key not in SETTINGS)]
    for key, group in runs.assign(fault=runlog.faults(runs)).groupby(keys, sort=False, dropna=False):
        ok = ended_ok(group)
        best = stats.summary(ok.max_accuracy)
        ends = {status: (group.status == status).sum() for status in runlog.STATUSES[1:]}
        rows.append(dict(zip(keys, key)) | stats.summary(ok.accuracy) | dict(mean_max=best['mean'], sd_max=best['sd'])
                    | ends | dict(seconds=group.fit_seconds.median()))
    return pd.DataFrame(rows, columns=None if rows else list(dict.fromkeys([*keys, *SUMMARY])))


def by_recipe(runs):
    "Returns {recipe: [(the SET_COLUMNS of one set (dict), its runs)]}."
    runs = runs.assign(fault=runlog.faults(runs),
                       set_number=lambda df: df.groupby(SET_COLUMNS, dropna=False).ngroup())
    found = {}
    for key, alike in runlog.by_setting(runs, RECIPE).items():
        of_sets = [alike.iloc[at] for at in alike.groupby('set_number').indices.values()]
        found[key] = [(of_set[SET_COLUMNS].iloc[0].to_dict(), of_set) for of_set in of_sets]
    return found


def recipe(cfg):
    "Returns the settings but for the images and the precision, which have their own check."
    return setting(resolve(cfg), RECIPE)


def sets(exp, runs, own=None, recipes=None):
    """Returns [(the SET_COLUMNS of one set (dict), {arm: its runs})] of an Experiment.

    The planned ones come first, of these those without a fault, then the latest.

    `planned` in the dict says whether the split and the archive, which is whole, are those of `own`, the Experiment as
    EXPERIMENTS has it; `folder` is the name of the folder of images of the user's, else ''. Of an `exp` with another
    split or archive only the sets with these are returned. `recipes` is by_recipe(runs), where that is known already.
    """
    recipes = by_recipe(runs) if recipes is None else recipes
    planned = _planned_images(own or exp)
    asked = _planned_images(exp)
    dataset = next(iter(exp.arms.values())).dataset
    found = {}  # number of the set: (its columns, {arm: its runs})
    for name, cfg in exp.arms.items():
        for key, of_set in recipes.get(recipe(cfg), []):
            here = dict(split=key['split'], source=key['source'])
            if asked != planned and asked != here: continue
            if cfg.precision not in ('auto', key['precision']): continue
            number = of_set.set_number.iloc[0]
            if number not in found:
                columns = key | dict(planned=planned == here and is_whole(dataset, key), folder=_folder(of_set))
                found[number] = columns, dict.fromkeys(exp.arms, runs[:0])
            _, arms = found[number]
            arms[name] = of_set
    def rank(of_set):
        columns, arms = of_set
        latest = max(of_arm.started.max() for of_arm in arms.values() if len(of_arm))
        return columns['planned'], not columns['fault'], latest
    return sorted(found.values(), key=rank, reverse=True)


def _folder(of_set):
    "Returns the name of the folder that the latest run of a set had its images from; '' of a dataset with a name."
    latest = of_set.sort_values('started').iloc[-1]
    return PurePath(latest.data).name if latest.dataset == 'custom' else ''


def _planned_images(exp):
    "Returns {split, source} of the arms of an Experiment, which are on the same images."
    cfg = resolve(next(iter(exp.arms.values())))
    return dict(split=cfg.split, source=cfg.source)


def archive(source):
    "Returns the column `source` in words."
    return dict(auto='no archive', full='full-size archive').get(source, f'{source} px archive')


def is_whole(dataset, key):
    "Returns whether a set (or a row of `gaps`) is on the full archive, where there is one."
    full = N_IMAGES.get((dataset, key['split']))
    return full is None or pd.isna(key['n_train']) or full == (key['n_train'], key['n_val'])


def on_own_images(runs):
    """Returns {name: Experiment} of the runs on images of the user's (--data) that differ in the layer alone.

    Such an Experiment has no plan: as many runs are wanted as there are.
    """
    found = {}
    alike = [name for name in RECIPE if name not in ('attention', 'attention_source', 'sa_at')]
    for key, group in runlog.by_setting(runs[runs.dataset == 'custom'], alike).items():
        arms, wanted = {}, {}
        for of_arm in runlog.by_setting(group, RECIPE).values():
            row = of_arm.iloc[0]
            try: cfg = Config(**{f.name: f.type(row[f.name]) for f in fields(Config)})
            except UsageError: continue  # a layer that is no more
            name = variant(cfg)
            if name in arms: name += f' {cfg.attention_source[:6]}'  # another version of the user's layer
            done = of_arm[of_arm.status.isin(runlog.DONE)]
            n_seeds = done.groupby('data_fingerprint').seed.nunique().max() if len(done) else 1
            arms[name], wanted[name] = cfg, int(n_seeds)
        if len(arms) < 2: continue
        arms = {name: arms[name] for name in sorted(arms, key=lambda name: name != 'none')}
        found[_own_name(dict(zip(alike, key)))] = Experiment(claim='', arms=arms, runs=wanted)
    return found


def _own_name(settings):
    "Returns a name for runs on images of the user's, with the settings that are not the defaults."
    words = ['own images (no plan)', f'{settings.pop("size")} px', f'{settings.pop("epochs")} epochs',
             settings.pop('arch')]
    return ', '.join(words + [f'{name} {value}' for name, value in settings.items()
                              if name != 'dataset' and value != getattr(Config, name)])


def ended_ok(runs, metric='last'):
    """Returns the runs that ended ok and have an accuracy, by seed: the first of each seed.

    Several runs of one seed are no independent repetitions, and a seed whose first run diverged has none.
    """
    ok = runs[(runs.status == 'ok') & runs[METRICS[metric]].notna() & ~runs.seed.isin(diverged_seeds(runs))]
    return ok.sort_values(['seed', 'run_id']).drop_duplicates('seed')


def diverged_seeds(runs):
    "Returns the seeds whose first run that is done diverged: a later one does not mend them."
    done = runs[runs.status.isin(runlog.DONE)].sort_values(['seed', 'run_id']).drop_duplicates('seed')
    return done.seed[done.status == 'diverged'].tolist()


def other_ends(runs, metric='last'):
    "Returns how many seeds diverged, and how many others have no run that ended ok."
    ok, diverged = set(accuracies(runs, metric)), set(diverged_seeds(runs))
    return dict(diverged=len(diverged), other=len(set(runs.seed) - ok - diverged))


def accuracies(runs, metric='last'):
    "Returns {seed: accuracy} of the runs that `ended_ok`."
    ok = ended_ok(runs, metric)
    return dict(zip(ok.seed.tolist(), ok[METRICS[metric]].tolist()))


def correct(run_ids, results):
    """Returns (runs, images) of 0 and 1 from the predictions of these runs, the images in the order of their names.

    It is None if those of a run are not at hand, or are of other images.
    """
    files = [Path(results) / 'predictions' / f'{run_id}.npz' for run_id in run_ids]
    if not files or not all(file.exists() for file in files): return None
    found = [_predictions(file, file.stat().st_mtime) for file in files]
    if None in found or len({names for names, _ in found}) > 1: return None
    return np.array([right for _, right in found])


@lru_cache(maxsize=1_000)
def _predictions(file, changed):
    """Returns (a hash of the names of the images, whether each is classified correctly, in the order of the names).

    It is None of a damaged file. `changed`, the time of the file, is part of the cache's key: a file that was written
    again is read again.
    """
    try:
        with np.load(file) as saved:
            order = saved['files'].argsort()
            return hash(tuple(saved['files'][order])), (saved['logits'].argmax(1) == saved['targets'])[order]
    except Exception as e:  # what damaged files make zipfile and numpy raise has no end
        print(f'{file}: cannot be read, so there are no intervals over images ({e})', file=sys.stderr)
        return None


# --- the comparisons ---

def gaps(experiments, runs, published, results=runlog.RESULTS):
    """Returns one row per experiment, set and pair of arms: `arm` minus `base`, in fractions.

    The pairs are Experiment.pairs, which are tested, and Experiment.described, which are not. A row is a nested dict.
    An experiment without runs has one for each of its pairs.
    experiment, dataset, the SET_COLUMNS, planned, folder (see `sets`), base, arm, tested, asks (Experiment.asks),
    metric ('last' or 'max'), n_tests (the comparisons that Holm's correction is over; 0 of a pair that is not tested)
    published    base, arm: mean, sd, n; difference: difference, low, high, p; recipe: documented, assumed, other script
    ours         base, arm: the keys of stats.summary of the runs that `difference` is of; n_ok, diverged, other (ends),
                 n_done (at seeds that count), n_wanted, images_share (of the variance, by the validation images);
                 seconds: the median of a run
    pairs        [(Run of base, Run of arm)] of one seed each, among the runs that `difference` is of
    difference   the keys of stats.compare_by_seed; holm_p; runs: 'all', 'complete seeds', 'like pairs' (`_analyses`)
    sensitivity  alike, steps, all: the TEST keys, n_base and n_arm of the other analyses; nan where there is none;
                 mixed: whether some runs have no partner that was made alike
    chance       the TEST keys and holm_p with the diverged runs at chance; nan where none diverged
    welch        difference, low, high, p of the unpaired test
    images       low, high for new runs and new images, where the predictions are at hand
    verdict      verdict, reason, at_chance (the verdict with the diverged runs at chance), claim (nan: none),
                 half_width; n_runs (that it is of), n_done and n_wanted of the arm that lacks most
    """
    steps, way = (runs.groupby(columns, dropna=False).ngroup() for columns in (STEPS, WAY))
    runs = runs.assign(steps=steps, way=way)
    recipes = by_recipe(runs)
    return [row for name, exp in experiments.items() for row in _gaps_of(name, exp, runs, recipes, published, results)]


def _gaps_of(name, exp, runs, recipes, published, results):
    "Returns the rows of `gaps` of one experiment."
    own = EXPERIMENTS.get(name, exp)
    said = {arm: _said(exp, own, arm, published) for arm in exp.arms}
    found = sets(exp, runs, own, recipes) or [_set_without_runs(exp, runs)]
    apart = _apart(exp, found)
    rows = []
    for key, arms in found:
        for row in _gaps_of_set(exp, key, arms, said, results):
            verdict = _verdict(row, apart.get((row['base'], row['arm']), ''))
            rows.append(dict(experiment=name, **row, verdict=verdict))
    return rows


def _set_without_runs(exp, runs):
    "Returns the SET_COLUMNS, as far as they are planned, and {arm: no runs} of an Experiment."
    columns = dict.fromkeys(SET_COLUMNS) | _planned_images(exp) | dict(fault='', planned=True, folder='')
    no_runs = {arm: runs[:0] for arm in exp.arms}
    return columns, no_runs


def _gaps_of_set(exp, key, arms, said, results):
    """Returns the rows of `gaps` of one set, but for the experiment's name and the verdict.

    key, arms   the SET_COLUMNS and {arm: its runs}, see `sets`
    said        {arm: its published row or None}
    """
    dataset = next(iter(exp.arms.values())).dataset
    is_comparable = key['split'] == 'v1' and is_whole(dataset, key)
    theirs = said if is_comparable else dict.fromkeys(said)
    complete = complete_seeds(exp, arms)
    ours = {arm: _arm(of_arm, exp.metric, exp.wanted(arm), complete.get(arm)) for arm, of_arm in arms.items()}
    def row(base, arm, tested):
        names = dict(dataset=dataset, **key, metric=exp.metric, base=base, arm=arm, tested=tested,
                     asks=exp.asks(base, arm))
        return names | _gap(ours[base], ours[arm], theirs[base], theirs[arm], results)
    tested = [row(*pair, True) for pair in exp.pairs()]
    described = [row(*pair, False) for pair in exp.described()]
    _correct_for_many(tested, len(tested) if exp.contrasts else None)
    n_tests = sum(not np.isnan(r['difference']['p']) for r in tested)
    if exp.contrasts or not n_tests: n_tests = len(tested)
    return [r | dict(n_tests=n_tests) for r in tested] + [r | dict(n_tests=0) for r in described]


def complete_seeds(exp, arms):
    """Returns {arm: the seeds that count} of the arms of `exp.complete`, from {arm: its runs} of one set.

    They are the seeds at which all of these arms that were to run are done. An arm of which no run is done yet is not
    waited for. The planned seeds are counted from the first one that was begun.
    """
    done = {arm: set(arms[arm].seed[arms[arm].status.isin(runlog.DONE)]) for arm in exp.complete if arm in arms}
    done = {arm: seeds for arm, seeds in done.items() if seeds}
    every = set().union(*done.values())
    first = min((of_arm.seed.min() for of_arm in arms.values() if len(of_arm)), default=0)
    def is_complete(seed):
        planned = [seeds for arm, seeds in done.items() if seed - first < exp.wanted(arm)] or done.values()
        return all(seed in seeds for seeds in planned)
    complete = set(filter(is_complete, every))
    return {arm: complete for arm in done}


def _said(exp, own, arm, published):
    "Returns the published row of an arm; None where there is none, or where overrides have changed the arm's recipe."
    if not own.tables or recipe(exp.arms[arm]) != recipe(own.arms[arm]): return None
    return published_mean(own, arm, published)


def _apart(exp, found):
    "Returns {(base, arm): why} of the pairs whose arms both have runs, but in no set (of `sets`) together."
    reasons = {}
    done = [(key, {arm for arm, runs in arms.items() if runs.status.isin(runlog.DONE).any()}) for key, arms in found]
    for pair in exp.pairs() + exp.described():
        if any(arms >= set(pair) for _, arms in done): continue
        keys = [next((key for key, arms in done if arm in arms), None) for arm in pair]
        if None in keys: continue
        values = {name: [key[name] or 'none' for key in keys] for name in SET_COLUMNS}
        differ = [f'{name} {one} and {other}' for name, (one, other) in values.items() if one != other]
        reasons[pair] = ', '.join(differ)
    return reasons


Run = namedtuple('Run', 'seed run_id value way steps')


def _arm(runs, metric, n_wanted, complete=None):
    """Returns what `_gap` needs of an arm: its Runs that ended ok, by seed; those that diverged, at chance; counts.

    Of several runs of a seed the first that is done says how the seed ended. Where not all seeds count, `complete` are
    those that do.
    """
    columns = runs.seed, runs.run_id, runs[METRICS[metric]].astype(float), runs.way, runs.steps
    every = [Run(*values) for values in zip(*(column.tolist() for column in columns))]
    diverged = diverged_seeds(runs)
    ok = sorted(run for run, status in zip(every, runs.status)
                if status == 'ok' and run.seed not in diverged and not np.isnan(run.value))
    def counts_at(seed): return complete is None or seed in complete
    counted = [run for run in ok if counts_at(run.seed)]
    diverged_counted = [seed for seed in diverged if counts_at(seed)]
    counts = dict(n_ok=len({run.seed for run in ok}), **other_ends(runs, metric), n_wanted=n_wanted,
                  n_done=len({run.seed for run in counted}) + len(diverged_counted))
    chance = CHANCE.get(runs.dataset.iloc[0]) if len(runs) else None
    at_chance = {} if chance is None else dict.fromkeys(diverged_counted, chance)
    return dict(ok=ok, counted=counted, at_chance=at_chance, counts=counts, seconds=runs.fit_seconds,
                last_epoch=metric == 'last')


def _gap(base, arm, said_base, said_arm, results):
    "Returns the parts of a row of `gaps`, but for the verdict, from the `_arm`s and the published rows of two arms."
    which, chosen, sensitivity = _analyses(base, arm)
    values = [{run.seed: run.value for run in ok} for ok in chosen]
    ours, right = {}, {}
    for side, ok, of_arm in zip(SIDES, chosen, (base, arm)):
        right[side] = correct([run.run_id for run in ok], results) if of_arm['last_epoch'] else None
        share = NAN if right[side] is None else stats.validation_noise(right[side])['share']
        ours[side] = _summary(tuple(run.value for run in ok)) | of_arm['counts'] | dict(images_share=share)
    ours['seconds'] = pd.concat([base['seconds'], arm['seconds']]).median()
    partner = {run.seed: run for run in chosen[1]}
    pairs = [(run, partner[run.seed]) for run in chosen[0] if run.seed in partner]
    return dict(published=_published(said_base, said_arm), ours=ours, pairs=pairs,
                difference=stats.compare_by_seed(*values) | dict(runs=which, holm_p=NAN), sensitivity=sensitivity,
                chance=_at_chance(values, base['at_chance'], arm['at_chance']) | dict(holm_p=NAN),
                welch=_welch(ours['base'], ours['arm']),
                images=_over_images(**right, paired=len(pairs) == len(chosen[0]) == len(chosen[1])))


def _welch(base, arm):
    "Returns difference, low, high and p of Welch's test of two arms from their summaries."
    test = stats.compare_summaries(*(side[key] for side in (base, arm) for key in ('mean', 'sd', 'n')))
    return {key: test[key] for key in ('difference', 'low', 'high', 'p')}


@lru_cache(maxsize=1_000)
def _summary(values): return stats.summary(values)


def _analyses(base, arm):
    """Returns which runs the verdict is of, these runs of both arms, and the other analyses; of runs that ended ok.

    The verdict is of like pairs (runs of one seed with the same torch, device and speed-ups) if not all runs are in
    such pairs and at least LIKE_PAIRS are there; else of all runs that count. The other analyses are of the pairs that
    are `alike`, of the runs with the most common kind of `steps`, and of `all` runs that ended ok. One that equals an
    earlier one is left empty.
    """
    counted = base['counted'], arm['counted']
    everything = _first_of_seeds(base['ok']), _first_of_seeds(arm['ok'])
    chosen = tuple(map(_first_of_seeds, counted))
    which = 'all' if chosen == everything else 'complete seeds'
    others = dict.fromkeys(('alike', 'steps', 'all'), NOT_BESIDE) | dict(mixed=False)
    if len({run.way for runs in counted for run in runs}) > 1:
        most = Counter(run.steps for runs in counted for run in runs).most_common(1)[0][0]
        steps = tuple(_first_of_seeds([run for run in runs if run.steps == most]) for runs in counted)
        alike = _like_pairs(*counted)
        others['mixed'] = alike != chosen
        if others['mixed'] and len(alike[0]) >= LIKE_PAIRS: which, chosen = 'like pairs', alike
        if steps not in (chosen, everything): others['steps'] = _beside(*steps)
        if alike != chosen: others['alike'] = _beside(*alike)
    if everything != chosen: others['all'] = _beside(*everything)
    return which, chosen, others


def _first_of_seeds(ok):
    "Returns the first of the Runs of each seed."
    return list({run.seed: run for run in reversed(ok)}.values())[::-1]


def _like_pairs(base, arm):
    "Returns, of both arms, the first runs of each seed that were made alike."
    known = {(run.seed, run.way): run for run in reversed(arm)}
    pairs = {}
    for run in base:
        partner = known.get((run.seed, run.way))
        if partner: pairs.setdefault(run.seed, (run, partner))
    return tuple([pair[side] for pair in pairs.values()] for side in (0, 1))


def _beside(base, arm):
    "Returns the TEST keys, n_base and n_arm of an analysis that stands beside the one of the verdict."
    test = stats.compare_by_seed(*({run.seed: run.value for run in ok} for ok in (base, arm)))
    return {key: test[key] for key in TEST} | dict(n_base=len(base), n_arm=len(arm))


def _at_chance(values, base, arm):
    "Returns the TEST keys of two arms {seed: accuracy} with the diverged runs {seed: chance} of base and arm added."
    if not base and not arm: return NO_TEST
    test = stats.compare_by_seed(values[0] | base, values[1] | arm)
    return {key: test[key] for key in TEST}


def _published(base, arm):
    "Returns the published part of a row of `gaps`, of the published rows of two arms (or None)."
    weakest = weakest_recipe(base, arm)
    base, arm = _mean_sd_n(base), _mean_sd_n(arm)
    test = stats.compare_summaries(*base.values(), *arm.values())
    if weakest == 'other script': test = dict.fromkeys(test, NAN)  # a number that is not of this source is no baseline
    difference = {key: test[key] for key in ('difference', 'low', 'high', 'p')}
    return dict(base=base, arm=arm, difference=difference, recipe=weakest)


def _mean_sd_n(row):
    "Returns mean, sd and n of a published row; nan of None."
    keys = 'mean', 'sd', 'n'
    return dict.fromkeys(keys, NAN) if row is None else {key: row[key] for key in keys}


def _over_images(base, arm, paired):
    """Returns low and high of the difference for new runs and new images; nan where predictions are not at hand.

    `base` and `arm` are as `correct` returns them; `paired`: both have the same seeds, in the same order.
    """
    if base is None or arm is None: return dict(low=NAN, high=NAN)
    interval = stats.over_images(base, arm, paired)
    return dict(low=interval['low'], high=interval['high'])


def _correct_for_many(family, n):
    """Sets holm_p in the tests of the rows of one experiment and set, which is nan before.

    `n` is the number of comparisons; None: of those that have a P.
    """
    for row, p in zip(family, stats.holm([row['difference']['p'] for row in family], n)):
        row['difference']['holm_p'] = float(p)
    ps = [row['difference']['p'] if np.isnan(row['chance']['p']) else row['chance']['p'] for row in family]
    for row, p in zip(family, stats.holm(ps, n)): row['chance']['holm_p'] = float(p)


def _verdict(row, apart):
    "Returns the verdict part of a row of `gaps`; `apart`: why its arms have no runs in common, if so."
    sides = [row['ours'][side] for side in SIDES]
    test = row['difference']
    said = row['published']['difference']
    least = min(sides, key=lambda side: side['n_done'] / side['n_wanted'])
    found = dict(verdict=NO_RUNS, reason='', at_chance='', claim=NAN, half_width=(test['high'] - test['low']) / 2,
                 n_runs=test['n_pairs'] if test['runs'] == 'like pairs' else least['n_done'], n_done=least['n_done'],
                 n_wanted=least['n_wanted'])
    if not least['n_done']:
        if apart: return found | dict(verdict=APART, reason=apart)
        without = [row[name] for name, side in zip(SIDES, sides) if not side['n_ok'] + side['diverged']]
        if not without: return found | dict(verdict=INCOMPLETE)
        return found | dict(reason=without[0] if len(without) == 1 else '')
    if not row['tested']: return found | dict(verdict=DESCRIBED)
    if not row['planned'] and not np.isnan(said['difference']):
        return found | dict(verdict=NO_VERDICT, reason=archive(row['source']))
    claim = NAN if said['low'] <= 0 <= said['high'] else said['difference']
    found |= dict(claim=claim, verdict=stats.verdict(test['low'], test['high'], test['holm_p'], claim))
    if stats.fails_holm(test['low'], test['high'], test['holm_p']): found['reason'] = "not after Holm's correction"
    gone = [row[name] for name, side in zip(SIDES, sides) if not side['n_ok']]
    if gone: found['reason'] = f'all runs of {" and ".join(gone)} diverged'
    chance = row['chance']
    if chance['method']: found['at_chance'] = stats.verdict(chance['low'], chance['high'], chance['holm_p'], claim)
    return found


def narrow_enough(pairs, points):
    """Returns whether the difference of each of `pairs` of arms {seed: accuracy} is known to that half-width.

    It allows for looking after every turn. Arms that share enough seeds are compared at these.
    """
    def is_narrow(base, arm):
        shared = sorted(base.keys() & arm.keys())
        paired = len(shared) >= stats.LEAST_RUNS
        values = [[arm[seed] for seed in (shared if paired else arm)] for arm in (base, arm)]
        return bool(stats.fixed_width_done(*values, points / 100, paired=paired))
    return all(is_narrow(base, arm) for base, arm in pairs)


def known_to(points, pairs, runs, metric):
    """Returns whether the difference of each of `pairs` of arms is known to `points`, from {arm: its runs}.

    Raises UsageError where more runs cannot tell it, as those of each arm all end alike.
    """
    arms = {arm: accuracies(found, metric) for arm, found in runs.items()}
    if all(len(arm) >= stats.LEAST_RUNS and len(set(arm.values())) == 1 for arm in arms.values()):
        raise UsageError('--until: in each arm all runs end alike; stopped')
    return narrow_enough([(arms[base], arms[arm]) for base, arm in pairs], points)


def done(exp, runs, recipes=None):
    "Returns {arm: seeds that need no repetition} of the latest set of an Experiment that is as planned and faultless."
    planned = [arms for key, arms in sets(exp, runs, recipes=recipes) if key['planned'] and not key['fault']]
    def n_done(of_arm): return of_arm.seed[of_arm.status.isin(runlog.DONE)].nunique()
    return {arm: n_done(planned[0][arm]) if planned else 0 for arm in exp.arms}


def set_key(row):
    "Returns what tells the set of a row of `gaps`, or a key of `sets`, from other sets."
    return tuple(str(row[name]) for name in SET_COLUMNS)


def has_begun(row):
    "Returns whether an arm of a row of `gaps` has a run, whatever its end."
    return any(row['ours'][side][ends] for side in SIDES for ends in ('n_ok', 'diverged', 'other'))


def for_readers(rows):
    """Returns the rows of `gaps` that have runs, for readers.

    Those that are only described are left out where no comparison of their experiment has runs on the same images.
    """
    with_runs = [row for row in rows if has_runs(row)]
    begun = {(row['experiment'], set_key(row)) for row in with_runs if row['tested']}
    return [row for row in with_runs if (row['experiment'], set_key(row)) in begun]


def beside_first(rows, runs, published, results=runlog.RESULTS):
    """Returns what each arm does beside the first, as rows of `gaps`, the best first.

    They are of the experiments that say what their contrasts ask, on each set without a fault on which all of these
    have all their runs. `rows` are `gaps` of the record. adds: how many times its input a layer adds, the mean of
    branch_ratio after the last epoch over the runs in `pairs`; nan where no curve has it.
    """
    whole = {}  # (experiment, set): whether all contrasts have all their runs
    for row in rows:
        if row['asks'] and row['tested'] and not row['fault']:
            place = row['experiment'], set_key(row)
            whole[place] = whole.get(place, True) and has_all_runs(row)
    found = []
    for name in dict.fromkeys(name for (name, _), is_whole_set in whole.items() if is_whole_set):
        first, *others = EXPERIMENTS[name].arms
        exp = replace(EXPERIMENTS[name], contrasts=tuple((first, arm) for arm in others))
        beside = [row for row in gaps({name: exp}, runs, published, results) if whole.get((name, set_key(row)))]
        found += sorted(beside, key=lambda row: -row['difference']['difference'])
    return [row | dict(adds=_added(row, results)) for row in found]


def _added(row, results):
    curves = [runlog.read_curve(run.run_id, results) for _, run in row['pairs']]
    return pd.Series([curve.branch_ratio.iloc[-1] for curve in curves if len(curve)], dtype=float).mean()


def up_to_date(rows):
    "Returns the rows of `gaps` without those with a fault of which all runs have been made again without it."
    again = {_but_for_the_fault(row) for row in rows if not row['fault'] and has_all_runs(row)}
    return [row for row in rows if not row['fault'] or _but_for_the_fault(row) not in again]


def once_a_set(rows):
    "Returns of the rows of `gaps` that differ in a fault alone the one with all its runs, or else that without it."
    best = sorted(rows, key=lambda row: (has_all_runs(row), not row['fault']))
    chosen = {_but_for_the_fault(row): row for row in best}
    return [row for row in rows if chosen[_but_for_the_fault(row)] is row]


def _but_for_the_fault(row): return _pair(row), *(str(row[name]) for name in SET_COLUMNS if name != 'fault')


def once(rows):
    "Returns the first of the rows of `gaps` of each experiment and pair of arms."
    return list({_pair(row): row for row in reversed(rows)}.values())[::-1]


def _pair(row): return row['experiment'], row['base'], row['arm']


def has_all_runs(row):
    "Returns whether both arms of a row of `gaps` have all the runs wanted."
    return row['verdict']['n_done'] >= row['verdict']['n_wanted']


def has_runs(row):
    "Returns whether both arms of a row of `gaps` have runs, be it of different images or at different seeds."
    return row['verdict']['verdict'] != NO_RUNS
