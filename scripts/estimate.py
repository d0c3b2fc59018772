#!/usr/bin/env python
"""Estimates what the experiments cost: writes results/tables/cost.md and cost.csv.

A run costs its multiply-adds: three forward passes for a training image, one for a validation image. What a
device does in a second is measured: by the wall times published for xresnet18 at 128 px, by our training steps in
results/benchmarks, and by our runs on CUDA in results/runs.csv, which may have shared their GPU. That it does as many
in another network at another size is assumed. Several devices take the runs one by one, the longest first.
"""
import argparse
import heapq
import sys
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import training  # noqa: F401, I001  (first: it silences a warning that torch gives as fastai is imported)

import pandas as pd

import runlog
from command import Parser, exit_code
from experiments import EXPERIMENTS, N_IMAGES, Config, planned_runs, resolve
from layer_source import is_outside
from report.published import load_published, published_mean
from report.tables import explanation, markdown_table

DEVICES = 1, 8, 64
COUNTS = N_IMAGES | {('digits', 'v2'): (1_437, 360)}


# --- the multiply-adds of a run ---

@lru_cache
def forward(arch, attention, sa_at, size, stem=Config.stem):
    "Returns the multiply-adds of one image through the network."
    import torch  # It takes seconds: not before the command line is known to be good.
    from torch.utils.flop_counter import FlopCounterMode

    from training.run import get_model
    model = get_model(Config(arch=arch, attention=attention, sa_at=sa_at, stem=stem), 10).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as flops: model(torch.zeros(1, 3, size, size))
    return flops.get_total_flops() / 2


def of_training(epochs, n_train, n_val, *network):
    "Returns the multiply-adds of training: `network` is what `forward` takes."
    return epochs * (3 * n_train + n_val) * forward(*network)


def multiply_adds(cfg):
    "Returns the multiply-adds of a run."
    cfg = resolve(cfg)
    network = cfg.arch, cfg.attention, cfg.sa_at, cfg.size, cfg.stem
    return of_training(cfg.epochs, *COUNTS[cfg.dataset, cfg.split], *network)


# --- what a device does in a second ---

@lru_cache
def rates(results=runlog.RESULTS):
    "Returns {what was measured: multiply-adds a second}; its name begins with the device."
    return _published_rates() | _step_rates(Path(results)) | _run_rates(Path(results))


def _published_rates():
    timed = load_published().query('wall_time_min > 0')
    names = ['dataset', 'split', 'size', 'epochs', 'arch']
    done = [multiply_adds(Config(attention=row.variant, **row[names])) for _, row in timed.iterrows()]
    timed = timed.assign(device=timed.note.str.removeprefix('one '), rate=done / (60 * timed.wall_time_min))
    return {f'{device}, 2019: {len(rows)} published wall times of xresnet18, 128 px': rows.rate.mean()
            for device, rows in timed.groupby('device')}


def _step_rates(results):
    found = {}
    for file in sorted(results.glob('**/benchmarks/step.csv')):
        for row in pd.read_csv(file).itertuples():
            arch, _, attention = row.model.partition('+')
            per_image = 3 * forward(arch, attention or 'none', Config.sa_at, row.size)
            name = f'{row.device}: training step of {row.model}, {row.size} px, {row.precision}'
            found[name] = row.ours_images_per_second * per_image
    return found


def _run_rates(results):
    runs = runlog.load(results / 'runs.csv')
    runs = runs[(runs.status == 'ok') & ~runs.device.str.contains('threads') & ~runs.attention.map(is_outside)]
    columns = 'epochs', 'n_train', 'n_val', 'arch', 'attention', 'sa_at', 'size', 'stem'
    settings = zip(*(runs[name] for name in columns))
    runs = runs.assign(multiply_adds=[of_training(*setting) for setting in settings])
    return {f'{device}: {len(rows)} runs of {arch}, {size} px': rows.multiply_adds.sum() / rows.fit_seconds.sum()
            for (device, arch, size), rows in runs.groupby(['device', 'arch', 'size'])}


# --- what the experiments cost ---

def published_runs():
    "Returns the runs behind every published mean, [Config with its seed], each once."
    published = load_published()
    runs = {cfg: None for exp in EXPERIMENTS.values() for arm, cfg in planned_runs(exp)
            if published_mean(exp, arm, published) is not None}
    return list(runs)


def makespan(seconds, n):
    "Returns the seconds until `n` devices have done runs of these `seconds`, the longest first."
    free = [0.] * n
    for s in sorted(seconds, reverse=True): heapq.heappush(free, heapq.heappop(free) + s)
    return max(free)


def costs(results=runlog.RESULTS):
    """Returns two frames: the multiply-adds of each experiment, and the hours of all published runs by each rate.

    An experiment counts all of its runs, so that runs which two experiments share are in both.
    """
    by_name = {name: [multiply_adds(cfg) for _, cfg in planned_runs(exp)] for name, exp in EXPERIMENTS.items()}
    table = [dict(experiment=name, runs=len(runs), multiply_adds=sum(runs)) for name, runs in by_name.items()]
    published = pd.Series([multiply_adds(cfg) for cfg in published_runs()])
    rows = []
    for what, rate in rates(results).items():
        hours = published / rate / 3600
        row = dict(measured=what, multiply_adds_per_second=rate, runs=len(hours), longest_run_hours=hours.max())
        rows.append(row | {f'hours_on_{n}': makespan(hours, n) for n in DEVICES})
    return pd.DataFrame(table), pd.DataFrame(rows)


HEAD = """\
# What the runs cost

Estimated, training and validation together; [how]({}#what-the-published-tables-cost)."""
WHAT = "The hours of all runs behind the published means, at the rate of each machine that was measured:"


def markdown(table, hours, folder):
    "Returns both frames as Markdown, for a `folder`. The hours of an experiment are those on the first device."
    device, rate = hours.measured[0].partition(',')[0], hours.multiply_adds_per_second[0]
    lines = []
    for row in table.itertuples():
        n = row.multiply_adds
        lines.append([row.experiment, row.runs, f'{n / 1e15:,.1f}', f'{rounded(n / rate / 3600):,}'])
    all_hours = hours.hours_on_1[0]
    in_all = f'{all_hours * 3600 * rate / 1e15:,.0f}'
    lines.append(['every published mean, each run once', hours.runs[0], in_all, f'{all_hours:,.0f}'])
    head = ['experiment', 'runs', '10^15 multiply-adds, all runs', f'hours on one {device}']
    experiments = markdown_table(head, lines, range(1, 4))
    lines = []
    for row in hours.itertuples():
        on_each = [f'{rounded(getattr(row, f"hours_on_{n}")):,} h' for n in DEVICES]
        speed = f'{row.multiply_adds_per_second / 1e12:.2g}'
        lines.append([row.measured, speed, f'{rounded(row.longest_run_hours):,} h', *on_each])
    head = ['what was measured', '10^12 multiply-adds a second', 'longest run',
            *(f'on {n} device{"s" * (n > 1)}' for n in DEVICES)]
    parts = HEAD.format(explanation(folder)), experiments, WHAT, markdown_table(head, lines, range(1, 6))
    return '\n\n'.join(parts) + '\n'


def rounded(hours):
    "Returns hours to two digits, as EXPERIMENTS has them: 0.013, 2.8, 130."
    digits = float(f'{hours:.2g}')
    return int(digits) if digits >= 10 else digits


def work(argv):
    "Does what the command line asks for."
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ap.add_argument('--results', type=Path, default=runlog.RESULTS, metavar='DIR', help='results directory')
    args = ap.parse_args(argv)
    table, hours = costs(args.results)
    tables = args.results / 'tables'
    tables.mkdir(parents=True, exist_ok=True)
    hours.to_csv(tables / 'cost.csv', index=False, float_format='%.6g', lineterminator='\n')
    page = markdown(table, hours, tables)
    (tables / 'cost.md').write_text(page, encoding='utf-8')
    print(page)


def main(argv=None): return exit_code('estimate.py', lambda: work(argv))


if __name__ == '__main__': sys.exit(main())
