"""The published record: the means and single runs of 2019, and what is wrong with them."""
from pathlib import Path

import numpy as np
import pandas as pd

import runlog
from experiments import Config
from report import stats

FOLDER = runlog.RESULTS / 'published'
VARIED = ['dataset', 'split', 'size', 'epochs', 'arch', 'mixup', 'lr', 'bs']  # the settings that the published rows differ in


def load_published(folder=FOLDER):
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


def load_published_runs(folder=FOLDER):
    "The 1,256 single runs, accuracy as a fraction, variant as in EXPERIMENTS."
    df = pd.read_csv(Path(folder) / 'runs.csv')
    everywhere = df.placement == 'last block of stages 1-4'
    return df.assign(accuracy=df.accuracy_pct / 100, variant=df.attention.where(~everywhere, df.attention + '@1,2,3,4'))


def published_mean(exp, arm, published):
    "The published row (a Series) that an arm of one of EXPERIMENTS answers to, or None."
    cfg = exp.arms[arm]
    here = published[published.table.isin(exp.tables) & (published.variant == variant(cfg))]
    here = here[(here[VARIED] == [getattr(cfg, key) for key in VARIED]).all(axis=1)]
    return here.iloc[0] if len(here) else None


def published_metric(exp, published):
    "'last' or 'max': what the published means of one of EXPERIMENTS are of; last where there are none."
    return next((p.metric for arm in exp.arms if (p := published_mean(exp, arm, published)) is not None), 'last')


def single_runs_sd(cfg, runs):
    "The sd within the sources of the single published `runs` (load_published_runs) of the settings of an arm; nan if there are none."
    settings = [key for key in VARIED if key != 'mixup']  # the single runs are without
    here = (runs[settings] == [getattr(cfg, key) for key in settings]).all(axis=1) & (runs.opt == cfg.opt) & (runs.variant == variant(cfg))
    groups = runs[here & (cfg.mixup == 0)].groupby('source').accuracy
    return float(np.sqrt(((groups.count() - 1) * groups.var()).sum() / n)) if (n := (groups.count() - 1).sum()) else float('nan')


def variant(cfg): return cfg.attention + (f'@{cfg.sa_at}' if cfg.attention != 'none' and cfg.sa_at != Config.sa_at else '')


def set_right(folder=FOLDER):
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
