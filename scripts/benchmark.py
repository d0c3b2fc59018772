#!/usr/bin/env python
"""Measures ours against fastai's own, side by side: alternating calls, medians, ratios above 1 in our favour.

    python scripts/benchmark.py layer [--quick]                forward + backward of the attention layers, time and
                                                               peak memory
    python scripts/benchmark.py step [--quick] [--data DIR]    a training step of xresnet50 + simple at 128 px,
                                                               loading included
    python scripts/benchmark.py network [--quick]              a training step with each layer, over one without
    python scripts/benchmark.py loader [--quick] [--data DIR]  each loader: alone, in the step, and the step on one
                                                               batch over and over
    python scripts/benchmark.py switches [--quick]             a training step of xresnet18 + simple at 64 px with each
                                                               speed-up switched the other way
    python scripts/benchmark.py run [--quick] [FLAGS]          whole runs of train_imagenette.py FLAGS, with and
                                                               without attention
    python scripts/benchmark.py cost [--quick]                 every layer in every order, against N and against C;
                                                               about 8 minutes

Prints a table and writes it with the hardware and the versions to results/benchmarks/<what>.csv. Without --data step
and loader use random JPEGs of Imagewoof's usual size, 213x160, so that nothing is downloaded.

Limits: `matrix_share` is the share of the device's own rate of matrix products that the multiply-adds of convolutions
and products amount to; `floor_seconds` is what a step takes if these run at that rate and every tensor that an
operation reads or writes moves once at the rate of a copy, one after the other.
"""
import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import runlog
import train_imagenette
from command import Parser, exit_code
from experiments import Config, keys_of

PROGRAM = 'benchmark.py'
SHORT_RUN = ['--dataset', 'digits', '--size', '32', '--arch', 'xresnet18', '--epochs', '1']


def parse(argv):
    "Returns the arguments of a command line; raises UsageError on a mistake."
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ap.add_argument('what', choices=keys_of('training/benchmarks.py', 'BENCHMARKS'))
    ap.add_argument('--quick', action='store_true', help='smaller shapes and fewer repetitions, under a minute')
    ap.add_argument('--data', help='folder train|val/<class>/<image> for the step (default: random images)')
    ap.add_argument('--gpu', type=int, help='CUDA device (default: the first, or the CPU)')
    ap.add_argument('--results', type=Path, default=runlog.RESULTS, help='results directory')
    args, flags = ap.parse_known_args(argv)
    if flags and args.what != 'run': raise ap.unknown(flags[0])
    if args.what == 'run':
        flags += ['--data', args.data] if args.data else []
        args.config = train_imagenette.parse(flags or SHORT_RUN)[0]
    return args


def measure(args):
    "Does what the command line asks for."
    # torch's profiler writes lines for each use unless torch is imported with these.
    os.environ |= {'KINETO_LOG_LEVEL': '99', 'TORCH_CPP_LOG_LEVEL': 'ERROR'}
    # torch and fastai take seconds to import: not before the command line is known to be good
    import pandas as pd

    from report.layer_cost import beside_fastai
    from training.benchmarks import BENCHMARKS
    from training.machine import device_name, get_device, prepare_device
    device = get_device(args.gpu)
    prepare_device(Config(), device)
    table = pd.DataFrame(BENCHMARKS[args.what](args, device))
    print(table.to_string(index=False, float_format=lambda v: f'{v:.3g}'))
    if args.what == 'cost': print(beside_fastai(table))
    file = args.results / 'benchmarks' / f'{args.what}{"-quick" * args.quick}.csv'
    file.parent.mkdir(parents=True, exist_ok=True)
    table = table.round(4).assign(device=device_name(device), started=runlog.timestamp(), **runlog.provenance())
    table.to_csv(file, index=False)
    print(f'-> {file}')


def main(argv=None): return exit_code(PROGRAM, lambda: measure(parse(argv)))


if __name__ == '__main__': sys.exit(main())
