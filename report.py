"""What the record says: each experiment beside its published numbers, with intervals and a verdict; no torch.

    python report.py [--results DIR]     prints the comparisons, writes results/tables and results/figures
    python report.py EXPERIMENT ...      prints those of these experiments only
    python report.py --readme            writes the table between the markers in README.md

Accuracies are fractions in files, percent in tables. A published mean of last epochs stands beside ours of last epochs, one
of best epochs beside ours of best epochs: the two are never mixed. Runs on other images, splits or archives, or of another
precision, are a set of their own and never pooled. How a verdict is reached: results/README.md.
"""
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import runlog
import stats
from command import Parser, exit_code
from experiments import EXPERIMENTS, IMAGES, SETTINGS, Config, UsageError, nearest, resolve

SET = ['split', 'source', 'precision', 'data_fingerprint', 'n_train', 'n_val']  # runs that differ in one of these are not pooled
PUBLISHED = ['dataset', 'split', 'size', 'epochs', 'arch', 'mixup', 'lr', 'bs']  # the settings that the published rows differ in
MARKERS = '<!-- table: written by python report.py --readme -->', '<!-- end of table -->'
RECIPE = [key for key in SETTINGS if key not in ('data', *SET)]
SUMMARY = ['dataset', 'split', 'size', 'epochs', 'arch', 'attention', 'precision', 'n', 'mean', 'sd', 'low', 'high', 'bca_low', 'bca_high',
           'median', 'min', 'max', 'mean_max', 'sd_max', 'diverged', 'interrupted', 'failed', 'seconds']  # of `summarise`, for readers


# --- the published record ---

def load_published(folder=runlog.RESULTS / 'published'):
    """One row per published mean: table, settings, variant, metric, n, mean, sd (fractions); blank settings are the defaults.

    Those of aggregates.csv, with the sd of the single runs where these are published too; and as table `fork` those of
    the fork's runs with the layer in one stage and in all four.
    """
    df = pd.read_csv(Path(folder) / 'aggregates.csv').fillna({'lr': Config.lr, 'bs': Config.bs})
    df = df.rename(columns={'source': 'publication', 'attention': 'variant', 'n_runs': 'n'}).assign(
        mean=lambda d: d.mean_pct / 100, sd=lambda d: d.stdev_pct / 100).drop(columns=['mean_pct', 'stdev_pct'])
    runs = load_published_runs(folder)
    first = runs[runs.source == 'sdoria:v0.1'].groupby('variant').accuracy.std()
    here = (df.table == 'main') & (df.dataset == 'imagewoof') & (df['size'] == 256) & (df.epochs == 5)
    df.loc[here, 'sd'] = df.variant.map(first)
    fork = runs[runs.source.str.startswith('mgrankin:Imagenette Simple Symmetric')].groupby(
        ['dataset', 'split', 'size', 'epochs', 'arch', 'lr', 'bs', 'metric', 'variant']).accuracy
    fork = fork.agg(n='size', mean='mean', sd='std').reset_index().assign(table='fork', mixup=0., publication='mgrankin')
    return pd.concat([df, fork], ignore_index=True)


def load_published_runs(folder=runlog.RESULTS / 'published'):
    "The 1,256 single runs, accuracy as a fraction, variant as in EXPERIMENTS."
    df = pd.read_csv(Path(folder) / 'runs.csv')
    everywhere = df.placement == 'last block of stages 1-4'
    return df.assign(accuracy=df.accuracy_pct / 100, variant=df.attention.where(~everywhere, df.attention + '@1,2,3,4'))


def published_mean(exp, arm, published):
    "The published row (a Series) that an arm of one of EXPERIMENTS answers to, or None."
    cfg = exp.arms[arm]
    here = published[published.table.isin(exp.tables) & (published.variant == variant(cfg))]
    here = here[(here[PUBLISHED] == [getattr(cfg, key) for key in PUBLISHED]).all(axis=1)]
    return here.iloc[0] if len(here) else None


def published_metric(exp, published):
    "'last' or 'max': what the published means of one of EXPERIMENTS are of; last where there are none."
    return next((p.metric for arm in exp.arms if (p := published_mean(exp, arm, published)) is not None), 'last')


def single_runs_sd(cfg, runs):
    "The sd within the sources of the single published `runs` (load_published_runs) of the settings of an arm; nan if there are none."
    settings = [key for key in PUBLISHED if key != 'mixup']  # the single runs are without
    here = (runs[settings] == [getattr(cfg, key) for key in settings]).all(axis=1) & (runs.opt == cfg.opt) & (runs.variant == variant(cfg))
    groups = runs[here & (cfg.mixup == 0)].groupby('source').accuracy
    return float(np.sqrt(((groups.count() - 1) * groups.var()).sum() / n)) if (n := (groups.count() - 1).sum()) else float('nan')


def variant(cfg): return cfg.attention + (f'@{cfg.sa_at}' if cfg.attention != 'none' and cfg.sa_at != Config.sa_at else '')


def set_right(folder=runlog.RESULTS / 'published'):
    "What the published record says and what its own single runs say: one row each (said, found), recomputed from runs.csv."
    runs = load_published_runs(folder)
    def pick(source, **settings):
        same = runs.source.str.startswith(source)
        for key, value in settings.items(): same &= runs[key] == value
        return 100 * runs.accuracy[same].to_numpy()
    def gap(a, b): return '{difference:+.2f} [{low:.2f}, {high:.2f}], P = {p:.2g}'.format(**stats.compare(a, b))
    fork, bs64 = 'mgrankin:Imagenette Simple Symmetric Self Attention.ipynb', 'mgrankin:Imagewoof_128_5_epoch-bs64'
    woof = dict(dataset='imagewoof', epochs=5, lr=0.003)
    plain, sym = (pick(s, variant='simple', size=256, **woof) for s in ('sdoria:v0.1', fork))
    small, full = (pick(s, size=128, **woof) for s in ('sdoria-resize:Imagewoof_128.ipynb', 'sdoria-resize:Imagewoof_128.ipynb ['))
    small = small[:len(small) - len(full)]  # the shorter name begins the longer one's
    batches = pick(bs64, size=128, **woof)
    long, other = pick(fork, epochs=400), pick(fork, size=128, **woof)
    chance = runs[runs.accuracy_pct == 10].groupby(['size', 'epochs', 'lr']).size()
    return pd.DataFrame([
        ('sym=1: a small improvement', f'the option has no effect in that code; 256 px, 5 epochs, sym=1 ({len(sym)} runs) against plain '
         f'({len(plain)}): {gap(plain, sym)}'),
        ('400 epochs, one layer (fork): mean 69.88', f'the {len(long)} runs have {long.mean():.2f}; with the {len(other)} of 128 px, '
         f'5 epochs, among them it is {np.concatenate([long, other]).mean():.2f}'),
        ('128 px is 128 px', f'from full-size images ({len(full)} runs) against the 160 px archive ({len(small)}): {gap(small, full)}'),
        ('the same settings give the same mean', f'{len(batches)} runs in one repository, {len(small)} in another: '
         f'{batches.mean():.2f} and {small.mean():.2f}, {gap(batches, small)}'),
        ('every run is a run', f'{chance.sum()} of {len(runs):,} published runs ended at 10.0 % (chance): '
         + ', '.join(f'{n} at {size} px, {epochs} epochs, lr {lr:g}' for (size, epochs, lr), n in chance.items())),
    ], columns=['said', 'found'])


# --- our runs ---

def summarise(runs):
    """One row per comparable setting and variant, fractions: the keys of stats.summary (n, mean, sd, intervals, ...) for the last epoch's
    accuracy of the runs that ended ok (of several with one seed the first), mean_max and sd_max of the best epoch's; how many diverged,
    failed or were interrupted; median seconds."""
    rows, keys = [], [*SETTINGS, *(key for key in SET if key not in SETTINGS)]
    for key, group in runs.groupby(keys, sort=False, dropna=False):
        ok = ended_ok(group)
        best = stats.summary(ok.max_accuracy)
        rows.append(dict(zip(keys, key)) | stats.summary(ok.accuracy) | dict(mean_max=best['mean'], sd_max=best['sd'])
                    | {status: (group.status == status).sum() for status in runlog.STATUSES[1:]} | dict(seconds=group.fit_seconds.median()))
    return pd.DataFrame(rows, columns=None if rows else [*keys, *SUMMARY])


def by_recipe(runs):
    "{recipe: the runs with it}; that of `none` has the layer at the default place."
    settings = runs[RECIPE].assign(sa_at=runs.sa_at.where(runs.attention != 'none', Config.sa_at))
    return {key: runs.iloc[at] for key, at in settings.groupby(RECIPE, dropna=False, sort=False).indices.items()} if len(runs) else {}


def recipe(cfg):
    "The settings but for the images and the precision, which have their own check."
    cfg = resolve(cfg)
    return tuple(getattr(cfg, key) for key in RECIPE)


def sets(exp, runs, own=None, recipes=None):
    """[(the SET columns of one set (dict), {arm: its runs})] of an Experiment, the latest first.

    `planned` in the dict: the split and the archive, which is whole, are those of `own`, the Experiment as EXPERIMENTS has it.
    Of an `exp` with another split or archive only the sets with these. `recipes`: by_recipe(runs), where it is known.
    """
    recipes = by_recipe(runs) if recipes is None else recipes
    arms = {name: recipes.get(recipe(cfg), runs[:0]) for name, cfg in exp.arms.items()}
    df = pd.concat([found.assign(arm=name) for name, found in arms.items()])
    cfg, out = resolve(next(iter((own or exp).arms.values()))), []
    asked = resolve(next(iter(exp.arms.values())))
    if (asked.split, asked.source) != (cfg.split, cfg.source): df = df[(df.split == asked.split) & (df.source == asked.source)]
    for key, group in df.groupby(SET, dropna=False, sort=True):
        key = dict(zip(SET, key))
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
        none = dict.fromkeys(SET) | dict(split=cfg.split, source=cfg.source, planned=True), {arm: runs[:0] for arm in exp.arms}
        said = {arm: published_mean(own, arm, published) if recipe(exp.arms[arm]) == recipe(own.arms[arm]) else None for arm in exp.arms}
        metric = next((p.metric for p in said.values() if p is not None), 'last')
        for key, arms in sets(exp, runs, own, recipes) or [none]:
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
    full = IMAGES.get((dataset, key['split']))
    return full is None or pd.isna(key['n_train']) or full == (key['n_train'], key['n_val'])


def narrow_enough(pairs, points):
    "Whether the interval of the difference of each of `pairs` of arms (accuracies) has that half-width, looking after every turn."
    return all(bool(stats.fixed_width_done(base, arm, points / 100)) for base, arm in pairs)


def done(exp, table):
    "{arm: runs that need no repetition} of the latest planned set in the rows of `gaps` of one experiment."
    rows = table[table.planned].head(len(exp.pairs()))
    count = {r[side]: r[f'ours_{side}_n'] + r[f'ours_{side}_diverged'] for _, r in rows.iterrows() for side in ('base', 'arm')}
    return {arm: int(count.get(arm, 0)) for arm in exp.arms}


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


# --- text ---

def title(r):
    "The experiment of a row of `gaps`, its metric and set where these are not the usual ones, and what its runs were made with and on."
    words = [r.experiment + (' (best epoch)' if r.metric == 'max' else '')]
    if not r.planned: words += [f'split {r.split}', f'archive {r.source}']
    if not pd.isna(r.precision): words.append(f'{r.precision}, data {r.data_fingerprint}')
    if not _whole(next(iter(EXPERIMENTS[r.experiment].arms.values())).dataset, r) and r.split == r.split:
        words.append(f'{int(r.n_train):,} + {int(r.n_val):,} images')
    return ', '.join(words)


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


# --- command ---

def readme_table(runs, published):
    "What README.md shows: every experiment with runs of ours, and those of the main table."
    table = gaps(EXPERIMENTS, runs, published)
    main = table.experiment.map(lambda name: 'main' in EXPERIMENTS[name].tables) & table.published_difference.notna()
    ran = (table.verdict != 'no runs') & (table.experiment != 'digits')
    return markdown(pd.concat([table[ran], table[main & ~ran]]))


def write_readme(table, file=Path(__file__).parent / 'README.md'):
    "Put `table` between the markers of README.md."
    before, _, rest = Path(file).read_text(encoding='utf-8').partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end: raise UsageError(f'{file}: the markers of the table are missing')
    Path(file).write_text(f'{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}', encoding='utf-8')


def write(table, runs, results, published):
    """results/tables (gaps and set_right, .csv and .md) and results/figures (png and svg); the same rows give the same bytes.

    What depends on the predictions, which are not in git, is left out.
    """
    import figures
    tables = Path(results) / 'tables'
    tables.mkdir(parents=True, exist_ok=True)
    lasting = table[[c for c in table if 'images' not in c]]
    for name, frame, words in (('gaps', lasting, markdown(table)), ('set_right', (right := set_right()), plain_markdown(right))):
        frame.to_csv(tables / f'{name}.csv', index=False, float_format='%.6g', lineterminator='\n')
        (tables / f'{name}.md').write_text(words + '\n', encoding='utf-8')
    figures.save(figures.forest(table), Path(results) / 'figures' / 'forest')
    for name, fig in figures.experiments(table, runs, published, results).items(): figures.save(fig, Path(results) / 'figures' / name)


def plain_markdown(frame):
    "A frame of texts as a Markdown table."
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in [frame.columns, ['---'] * frame.shape[1], *frame.to_numpy()])


def work(argv):
    ap = Parser(description='The experiments beside their published numbers.', allow_abbrev=False)
    ap.add_argument('names', nargs='*', metavar='EXPERIMENT', help='print these only, and write nothing (default: all that have runs)')
    ap.add_argument('--results', type=Path, default=runlog.RESULTS, help='results directory')
    ap.add_argument('--readme', action='store_true', help='write the table of our own record between the markers of README.md')
    args = ap.parse_args(argv)
    if args.readme and (args.names or args.results != runlog.RESULTS): raise UsageError('--readme: alone; the table is of all of results/')
    for name in args.names:
        if name not in EXPERIMENTS: raise UsageError(f'no experiment {name}{nearest(name, EXPERIMENTS)}; see reproduce.py --list')
    runs, published = runlog.load(args.results / 'runs.csv'), load_published()
    if args.readme: return write_readme(readme_table(runs, published))
    if runs.empty: raise UsageError(f'{args.results / "runs.csv"}: no runs yet; train_imagenette.py and scripts/reproduce.py make them')
    table = gaps({name: EXPERIMENTS[name] for name in args.names or EXPERIMENTS}, runs, published, args.results)
    if not args.names:
        try: write(table, runs, args.results, published)
        except OSError as e: raise UsageError(f'cannot write the tables and figures ({e})') from None
    shown = table if args.names else table[table.verdict != 'no runs']
    print(text(shown) if len(shown) else f'{len(runs)} runs, but no experiment has runs of two arms')


def main(argv=None): return exit_code('report.py', lambda: work(argv))


if __name__ == '__main__': sys.exit(main())
