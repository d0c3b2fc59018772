"""Reads the published means and single runs of 2019; says what is known of their recipes, and what is wrong with them.

All of it is of split v1, but for the leaderboard. Accuracies are fractions in data frames and percent in texts.
"""
from pathlib import Path

import numpy as np
import pandas as pd

import runlog
from experiments import Config, variant
from report import stats

FOLDER = runlog.RESULTS / 'published'
RECIPES = 'documented', 'assumed', 'other script'  # what is known of how a published number was made: the most first
BLANKS = {name: getattr(Config, name) for name in ('lr', 'bs', 'opt', 'schedule', 'ann_start', 'mom', 'act')}
VARIED = ['dataset', 'split', 'size', 'epochs', 'arch', 'mixup', *BLANKS]  # what the published rows differ in
FORK = 'mgrankin:Imagenette Simple Symmetric Self Attention'  # two notebooks: one layer, and one layer a stage


# --- the means and the single runs ---

def load_published(folder=FOLDER):
    """Returns one row per published mean: table, settings, variant, metric, n, mean, sd, recipe.

    The rows are those of aggregates.csv, with the sd of the single runs where these are published too. The means of the
    fork's single runs, with the layer in one stage and in all four, follow as table `fork`. A setting that is blank in
    the file has its default here. For lr and bs of a row whose `recipe` is not documented this is a guess: that the row
    was made as the documented ones.
    """
    means = pd.read_csv(Path(folder) / 'aggregates.csv')
    means = means.rename(columns={'source': 'publication', 'attention': 'variant', 'n_runs': 'n'})
    means = means.assign(mean=means.mean_pct / 100, sd=means.stdev_pct / 100).drop(columns=['mean_pct', 'stdev_pct'])
    runs = load_published_runs(folder)
    first = runs[runs.source == 'sdoria:v0.1'].groupby('variant').accuracy.std()
    of_first = (means.table == 'main') & (means.dataset == 'imagewoof') & (means['size'] == 256) & (means.epochs == 5)
    means.loc[of_first, 'sd'] = means.variant.map(first)
    return pd.concat([means, _fork_means(runs)], ignore_index=True).fillna(BLANKS)


def _fork_means(runs):
    "Returns the means of the fork's single runs, as rows of `load_published`."
    keys = ['dataset', 'split', 'size', 'epochs', 'arch', 'lr', 'bs', 'metric', 'variant']
    means = runs[runs.source.str.startswith(FORK)].groupby(keys).accuracy.agg(n='size', mean='mean', sd='std')
    return means.reset_index().assign(table='fork', mixup=0., publication='mgrankin', recipe='documented')


def load_published_runs(folder=FOLDER):
    "Returns the single runs: accuracy as a fraction, the variant and the schedule by the names that EXPERIMENTS has."
    runs = pd.read_csv(Path(folder) / 'runs.csv').fillna({'act': Config.act})
    in_every_stage = runs.placement == 'last block of stages 1-4'
    variant = runs.attention.where(~in_every_stage, runs.attention + '@1,2,3,4')
    schedule = runs.schedule.replace('flat_and_anneal', 'flat_cos')
    return runs.assign(accuracy=runs.accuracy_pct / 100, variant=variant, schedule=schedule)


def published_mean(exp, arm, published):
    "Returns the published row (a Series) that an arm of one of EXPERIMENTS answers to, or None."
    cfg = exp.arms[arm]
    rows = published[published.table.isin(exp.tables) & (published.variant == variant(cfg))]
    rows = rows[(rows[VARIED] == [getattr(cfg, key) for key in VARIED]).all(axis=1)]
    return rows.iloc[0] if len(rows) else None


def weakest_recipe(*rows):
    "Returns the recipe, among those of published rows (or None), of which the least is known; '' without any."
    recipes = [row.recipe for row in rows if row is not None]
    return max(recipes, key=RECIPES.index, default='')


def single_runs_sd(cfg, runs):
    """Returns the sd, within their sources, of the published single `runs` that have the settings of an arm, or nan.

    None of these runs is with mixup, and the file does not say their momentum or where their annealing starts.
    """
    if cfg.mixup: return float('nan')
    settings = [key for key in VARIED if key in runs]
    same = (runs[settings] == [getattr(cfg, key) for key in settings]).all(axis=1)
    batches = runs[same & (runs.variant == variant(cfg))].groupby('source').accuracy
    freedom = batches.count() - 1
    return float(np.sqrt((freedom * batches.var()).sum() / freedom.sum())) if freedom.sum() else float('nan')


# --- whether the recipe that is assumed can be the one that was used ---

def source_against_fork(folder=FOLDER):
    """Returns, for each mean of the main table with the layer, its difference from the fork's single runs; fractions.

    Both are of the same code. The fork's recipe is public: lr 3e-3, bs 64, no mixup. The same is assumed of the source.
    As the spread of the source is not published, the standard error takes that of the fork for both. `z` is the
    difference in standard errors.
    """
    means = load_published(folder)
    keys = ['dataset', 'size', 'epochs']
    source = means[(means.table == 'main') & (means.variant == 'simple')][[*keys, 'recipe', 'mean', 'n']]
    fork = means[(means.table == 'fork') & (means.variant == 'simple')][[*keys, 'mean', 'sd', 'n']]
    both = source.merge(fork, on=keys, suffixes=('', '_fork')).rename(columns={'sd': 'sd_fork'})
    error = both.sd_fork * (1 / both.n + 1 / both.n_fork)**0.5
    difference = both['mean'] - both.mean_fork
    return both.assign(difference=difference, standard_error=error, z=difference / error)


def source_against_fork_text(folder=FOLDER):
    "Returns `source_against_fork` as a frame of texts, in percent."
    def cells(row):
        where = f'{row.dataset.capitalize()} {row["size"]} px, {row.epochs} epochs'
        source = f'{100 * row["mean"]:.2f} ({row.n:.0f})'
        fork = f'{100 * row.mean_fork:.2f} ± {100 * row.sd_fork:.2f} ({row.n_fork:.0f})'
        return [where, row.recipe, source, fork, f'{100 * row.difference:+.1f}', f'{row.z:+.1f}']
    names = ['with the layer', "source's recipe", 'source (runs)', 'fork ± sd (runs)', 'difference', 'standard errors']
    return pd.DataFrame([cells(row) for _, row in source_against_fork(folder).iterrows()], columns=names)


# --- what is wrong ---

def set_right(folder=FOLDER):
    """Returns what the published record says, what its own single runs say, and what this can show: one row each.

    The columns are `said`, `found` and `shows`. All numbers are computed from the files in `folder`.
    """
    runs = load_published_runs(folder)
    means = load_published(folder)
    leaderboard = pd.read_csv(Path(folder) / 'leaderboard.csv')
    return pd.DataFrame(columns=['said', 'found', 'shows'], data=[
        _recipes(means, source_against_fork(folder)),
        _baseline_at_400(means),
        _symmetry(runs),
        _several_layers(runs),
        _other_places(runs),
        _mean_at_400(runs),
        _archive(runs),
        _batches(runs),
        _chance(runs),
        _metrics(means),
        _leaderboard(leaderboard),
    ])


def _percent(runs, source, **settings):
    "Returns the accuracies, in percent, of the runs of a source (the start of its name) with these settings."
    same = runs.source.str.startswith(source)
    for key, value in settings.items(): same &= runs[key] == value
    return 100 * runs.accuracy[same].to_numpy()


def _gap(a, b):
    "Returns the difference b - a of two arrays in words, with Welch's interval and P."
    test = stats.compare(a, b)
    return f'{test["difference"]:+.2f} [{test["low"]:.2f}, {test["high"]:.2f}], P = {test["p"]:.2g}'


# Each of these returns one row of `set_right`.

def _recipes(means, against):
    main = means[means.table == 'main']
    documented = (main.recipe == 'documented').sum()
    apart = against[against.z.abs() > 3]
    def words(row):
        where = f'{row.dataset} {row["size"]} px, {row.epochs} epochs'
        single = ', a single run' if row.n == 1 else ''
        return f'{100 * row.difference:+.1f} points ({row.z:+.1f}) at {where}{single}'
    differences = ', '.join(words(row) for _, row in apart.iterrows())
    return ('one recipe (lr 3e-3, bs 64, no mixup) made the main table',
            f'it is public for {documented} of {len(main)} means; with the layer, {len(apart)} of the others are more '
            f"than 3 standard errors from the fork's runs with it: {differences}",
            'ours can meet or miss such a row because of its recipe: it is reproduced under the assumed one at most')


def _baseline_at_400(means):
    row = means[(means.recipe == 'other script')].iloc[0]
    return (f'{100 * row["mean"]:.1f} is the baseline at 256 px, {row.epochs} epochs',
            'it is an entry of the leaderboard of May 2019, by another script: lr 1e-2, mixup 0.2, 4 GPUs',
            'no difference can be taken from it: the 91.0 with the layer has no baseline')


def _symmetry(runs):
    settings = dict(variant='simple', size=256, dataset='imagewoof', epochs=5, lr=0.003)
    plain = _percent(runs, 'sdoria:v0.1', **settings)
    symmetric = _percent(runs, f'{FORK}.ipynb', **settings)
    return ('sym=1: a small improvement',
            f'256 px, 5 epochs, sym=1 ({len(symmetric)} runs) against plain ({len(plain)}): {_gap(plain, symmetric)}',
            'the option has no effect in that code: both are the same layer, run by two people')


def _several_layers(runs):
    def both(dataset, size, epochs):
        settings = dict(dataset=dataset, size=size, epochs=epochs)
        return [_percent(runs, FORK, variant=variant, **settings) for variant in ('simple', 'simple@1,2,3,4')]
    def change(*case): return '{} {} px, {} epochs: '.format(*case) + _gap(*both(*case))
    cases = [('imagewoof', 128, 5), ('imagewoof', 256, 5), ('imagenette', 128, 5), ('imagenette', 256, 5),
             ('imagewoof', 256, 20), ('imagenette', 256, 20), ('imagewoof', 256, 80)]
    one, four = both('imagewoof', 256, 400)
    learned = four[four > 11]  # chance is 10 %
    n_lost = len(four) - len(learned)
    changes = [*(change(*case) for case in cases),
               f'imagewoof 256 px, 400 epochs, {len(four)} runs each: {n_lost} with four layers ended at chance, '
               f'the others have {learned.mean():.2f} against {one.mean():.2f}']
    return ('adding several layers makes results worse',
            f"the fork's 30 runs with four layers minus its 30 with one: {'; '.join(changes)}",
            'the opposite at 5 epochs and, on imagewoof, at 20; no loss later but for that run. The two arms are two '
            'notebooks, not run in turn')


def _other_places(runs):
    single = runs.placement.nunique() - 2  # without none and all stages
    return ('other positions have been tested with worse results',
            f'no number is published: all runs with one layer have it in {single} place; the source itself added later '
            'that this "hasn\'t been really tested thoroughly"',
            'nothing; the experiment woof-64-5-r18-places asks it')


def _mean_at_400(runs):
    own = _percent(runs, f'{FORK}.ipynb', epochs=400)
    left_over = _percent(runs, f'{FORK}.ipynb', dataset='imagewoof', size=128, epochs=5)
    mixed = np.concatenate([own, left_over]).mean()
    return ('400 epochs, one layer (fork): mean 69.88',
            f'the {len(own)} runs have {own.mean():.2f}; with the {len(left_over)} of 128 px, 5 epochs, among them '
            f'it is {mixed:.2f}',
            'the mean is of a list that was not emptied before these runs')


def _archive(runs):
    settings = dict(dataset='imagewoof', size=128, epochs=5)
    from_160 = _percent(runs[~runs.source.str.contains('full-size')], 'sdoria-resize', **settings)
    from_full = _percent(runs[runs.source.str.contains('full-size')], 'sdoria-resize', **settings)
    return ('128 px is 128 px',
            f'{from_full.mean():.2f} from full-size images ({len(from_full)} runs), {from_160.mean():.2f} from the 160 '
            f'px archive ({len(from_160)}): {_gap(from_160, from_full)}',
            'the two batches were made on different machines: whether the archive or the machine did it cannot be told')


def _batches(runs):
    settings = dict(dataset='imagewoof', size=128, epochs=5, opt='adam')
    first = _percent(runs, 'mgrankin:Imagewoof_128_5_epoch-bs64', **settings)
    second = _percent(runs[~runs.source.str.contains('full-size')], 'sdoria-resize', **settings)
    return ('the same settings give the same mean',
            f'two batches of {len(first)} and {len(second)} runs have {first.mean():.2f} and {second.mean():.2f}: '
            f'{_gap(first, second)}',
            'both batches are of one person, the machines and versions are not published. Batches of the same settings '
            'can differ, so arms have to run in turn')


def _chance(runs):
    at_chance = runs[runs.accuracy_pct == 10].sort_values(['size', 'epochs'])
    where = [f'{run["size"]} px, {run.epochs} epochs, lr {run.lr:g}, {run.opt}' for _, run in at_chance.iterrows()]
    return ('every run is a run',
            f'{len(at_chance)} of {len(runs):,} published runs ended at 10.0 %, which is chance: {"; ".join(where)}',
            'that they ended so, not why: a loss that is not a number is one possible cause, and not documented')


def _metrics(means):
    source = means[means.publication.str.startswith('SimpleSelfAttention')]
    counts = source.metric.value_counts()
    return ('the tables of the source show average accuracy',
            f'{counts["last"]} means are of the last epoch, which is documented for Imagewoof 256 px, 5 epochs alone; '
            f'{counts["max"]} later ones are of the best epoch on the validation images',
            'a best epoch is no lower than a last one: the two are never compared here')


def _leaderboard(leaderboard):
    return ('the records of the leaderboards use the layer',
            f'so do all {len(leaderboard)}, as far as their pages show; none has a run without it beside it',
            'nothing about what the layer adds to them')
