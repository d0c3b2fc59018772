#!/usr/bin/env python
"""What every published row costs to run again, on 1, 8 and 64 GPUs: writes results/tables/cost.md and cost.csv.

The runs are those of reproduce.py for all experiments that answer to a published mean, each setting and seed once. A run's work is its
multiply-adds: three forward passes for a training image, one for a validation image. What a device does a second is measured: the wall
times published for xresnet18 at 128 px, our steps in results/benchmarks, our runs on CUDA in results/runs.csv. That it does as many in
another network at another size is assumed. Several devices take the runs one by one, the longest first.
"""
import heapq
import sys
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

import runlog
from experiments import EXPERIMENTS, N_IMAGES, Config, planned_runs
from layer_source import is_outside
from report.published import load_published, published_mean
from training.run import get_model

DEVICES = 1, 8, 64


@lru_cache
def forward(arch, attention, sa_at, size):
    "Multiply-adds of one image through the network."
    model = get_model(Config(arch=arch, attention=attention, sa_at=sa_at), 10).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as flops: model(torch.zeros(1, 3, size, size))
    return flops.get_total_flops() / 2


def multiply_adds(cfg):
    "Multiply-adds of a run."
    n_train, n_val = N_IMAGES[cfg.dataset, cfg.split]
    return cfg.epochs * (3 * n_train + n_val) * forward(cfg.arch, cfg.attention, cfg.sa_at, cfg.size)


def rates(results=runlog.RESULTS):
    "{what was measured: multiply-adds a second}: a device with what it ran."
    published, out = load_published(), {}
    timed = published[published.wall_time_min.notna()]
    seconds = timed.wall_time_min * 60
    done = [multiply_adds(Config(dataset=r.dataset, split=r.split, size=r['size'], epochs=r.epochs, arch=r.arch, attention=r.variant))
            for _, r in timed.iterrows()]
    for device, rows in timed.assign(rate=done / seconds).groupby(timed.note.str.removeprefix('one ')):
        out[f'{device}, 2019: {len(rows)} published wall times of xresnet18, 128 px'] = rows.rate.mean()
    for file in sorted(Path(results).glob('**/benchmarks/step.csv')):
        for r in pd.read_csv(file).itertuples():
            arch, _, attention = r.model.partition('+')
            per_image = 3 * forward(arch, attention or 'none', Config.sa_at, r.size)
            out[f'{r.device}: training step of {r.model}, {r.size} px, {r.precision}'] = r.ours_images_per_second * per_image
    runs = runlog.load(Path(results) / 'runs.csv')
    runs = runs[(runs.status == 'ok') & ~runs.device.str.contains('threads') & ~runs.attention.map(is_outside)]
    for (device, arch, attention, sa_at, size), rows in runs.groupby(['device', 'arch', 'attention', 'sa_at', 'size']):
        total = rows.epochs * (3 * rows.n_train + rows.n_val) * forward(arch, attention, sa_at, size)
        what = f'{device}: {len(rows)} runs of {Config(arch=arch, attention=attention).model}, {size} px'
        out[what] = (total / rows.fit_seconds).median()
    return out


def published_runs():
    "{(Config with its seed): the first experiment it is of}, of every published row."
    published = load_published()
    return {cfg: name for name, exp in reversed(EXPERIMENTS.items()) for arm, cfg in planned_runs(exp)
            if published_mean(exp, arm, published) is not None}


def makespan(seconds, n):
    "Seconds until `n` devices have done runs of these `seconds`, the longest first."
    free = [0.] * n
    for s in sorted(seconds, reverse=True): heapq.heappush(free, heapq.heappop(free) + s)
    return max(free)


def costs(results=runlog.RESULTS):
    "(a row per experiment with its runs and multiply-adds, a row per measured rate with the hours of all on 1, 8 and 64 devices)."
    runs = published_runs()
    each = pd.DataFrame([dict(experiment=name, runs=1, multiply_adds=multiply_adds(cfg)) for cfg, name in runs.items()])
    table = each.groupby('experiment').sum().reindex([name for name, exp in EXPERIMENTS.items() if exp.tables]).reset_index()
    hours = [dict(measured=what, multiply_adds_per_second=rate, longest_run_hours=each.multiply_adds.max() / rate / 3600)
             | {f'hours_on_{n}': makespan(each.multiply_adds / rate, n) / 3600 for n in DEVICES} for what, rate in rates(results).items()]
    return table, pd.DataFrame(hours)


def markdown(table, hours):
    "Both tables as Markdown; the hours of each experiment are on the first device."
    first, rate = hours.iloc[0], hours.multiply_adds_per_second.iloc[0]
    lines = [f'| experiment | runs | 10^15 multiply-adds | hours on one {first.measured.partition(",")[0]} |', '|---|---:|---:|---:|']
    lines += [f'| {r.experiment} | {r.runs} | {r.multiply_adds / 1e15:,.0f} | {r.multiply_adds / rate / 3600:,.1f} |'
              for r in table.itertuples()]
    lines += [f'| all | {table.runs.sum()} | {table.multiply_adds.sum() / 1e15:,.0f} | {first.hours_on_1:,.0f} |', '']
    lines += ['| what was measured | 10^12 multiply-adds a second | longest run | 1 | 8 | 64 |', '|---|---:|---:|---:|---:|---:|']
    lines += [f'| {r.measured} | {r.multiply_adds_per_second / 1e12:.3f} | {r.longest_run_hours:,.1f} h | '
              + ' | '.join(f'{getattr(r, f"hours_on_{n}"):,.0f} h' for n in DEVICES) + ' |' for r in hours.itertuples()]
    return '\n'.join(lines) + '\n'


def main(results=runlog.RESULTS):
    table, hours = costs(results)
    tables = Path(results) / 'tables'
    tables.mkdir(parents=True, exist_ok=True)
    hours.to_csv(tables / 'cost.csv', index=False, float_format='%.6g', lineterminator='\n')
    (tables / 'cost.md').write_text(markdown(table, hours), encoding='utf-8')
    print(markdown(table, hours))


if __name__ == '__main__': main()
