"Makes rows of the record out of accuracies, and compares them: for the tests of the reports."
from dataclasses import asdict, replace

import pandas as pd

import runlog
from experiments import EXPERIMENTS, N_IMAGES, Config, resolve
from report import compare
from report import published as record

PUBLISHED = record.load_published()


def make_runs(attention, accuracies, max_accuracies=None, seed0=0, n=None, **config):
    "Rows of runs.csv as a frame, of the full archive; an accuracy of None is a diverged run."
    cfg = resolve(Config(**dict(dataset='imagewoof', attention=attention) | config))
    n_train, n_val = n or N_IMAGES.get((cfg.dataset, cfg.split), (1437, 360))
    same = asdict(cfg) | dict(precision='fp32', fit_seconds=60., data_fingerprint='f', n_train=n_train, n_val=n_val)
    rows = [same | dict(run_id=f'{attention}{cfg.size}{cfg.epochs}-{i}',
                        status='diverged' if a is None else 'ok', seed=seed0 + i,
                        accuracy=a, max_accuracy=m, started=f'2026-01-01T00:00:{i % 60:02d}Z')
            for i, (a, m) in enumerate(zip(accuracies, max_accuracies or accuracies))]
    df = pd.DataFrame(rows, columns=list(runlog.COLUMNS)).astype({'accuracy': float, 'max_accuracy': float})
    return df.astype({name: 'Int64' for name, kind in runlog.COLUMNS.items() if kind is int})


def all_gaps(name, *runs, complete=(), **overrides):
    "Returns the rows of compare.gaps of one experiment, with these settings in all arms; every seed counts."
    exp = EXPERIMENTS[name]
    exp = replace(exp, complete=complete, arms={arm: replace(cfg, **overrides) for arm, cfg in exp.arms.items()})
    return compare.gaps({name: exp}, pd.concat(runs), PUBLISHED)


def gaps(name, *runs, arm='simple', **overrides):
    "Returns those of an arm against the first arm: one for each set of images."
    rows = all_gaps(name, *runs, **overrides)
    return [row for row in rows if row['base'] == rows[0]['base'] and row['arm'] == arm]


def gap(name, *runs, **overrides):
    "Returns the one of `gaps`."
    (row,) = gaps(name, *runs, **overrides)
    return row


SMALL = dict(split='v2', size=64, arch='xresnet18')  # of woof-64-5-r18
