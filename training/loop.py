"""Trains the runs of an experiment that the record does not hold yet: one by one, side by side, or on Ray."""
import argparse
import os
import sys
import time
from dataclasses import fields, replace

import runlog
from command import Busy, UsageError, add_run_flags, check_run_flags, is_stop, lack_of_memory, say
from experiments import Config, add_config_flags, planned_runs

ARMS = 'attention', 'sa_at', 'seed'  # what tells the arms and the runs apart
INSTEAD = {  # short forms of train_imagenette.py, and what to take here
    '--woof': 'take --dataset imagewoof', '--fp16': 'take --precision fp16', '--seed': 'take --seed0, the first seed',
    '--sym': 'take the layer simple_sym', '--run': 'take --runs', '--resume': 'leave it out, the loop always does so',
}


# --- the flags of the commands that train an experiment ---

def add_flags(ap, leave_out=ARMS):
    "Adds the flags that say how the runs are done, and as overrides those of Config but for `leave_out`."
    def add(flag, **options): ap.add_argument(flag, **options)
    add('--seed0', type=int, default=0, metavar='SEED', help='first seed (default 0)')
    add('--until', type=float, metavar='POINTS',
        help='go on until the 95%% interval of each difference has this half-width')
    add('--dry-run', action='store_true',
        help="print the runs; don't train (runs on other copies of the images count as recorded then)")
    add('--jobs', type=int, default=1, metavar='N',
        help='train N runs side by side, on a CPU with one thread each (default 1)')
    add('--ray', nargs='?', const='', metavar='ADDRESS',
        help="hand the runs to Ray: this machine's own, or the cluster there")
    add('--cpus-per-run', type=float, default=1., metavar='N', help='with --ray: cores of a run (default 1)')
    add('--gpus-per-run', type=float, metavar='N',
        help='with --ray: GPUs of a run, 0.25 say (default 1, without any 0)')
    add_run_flags(ap)
    group = ap.add_argument_group('in all arms, in place of what is set for them')
    add_config_flags(group, leave_out=leave_out, default=argparse.SUPPRESS)


def check_flags(args):
    "Raises UsageError where a flag of `add_flags` has a value that is not possible."
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise UsageError('one process starts the runs: several at once by --jobs or --ray')
    if args.until is not None and not 0 < args.until < float('inf'):
        raise UsageError(f'--until {args.until}: must be a number above 0')
    if not 1 <= args.jobs <= 1024: raise UsageError(f'--jobs {args.jobs}: must be from 1 to 1024')
    if args.ray is not None and args.jobs > 1: raise UsageError('--jobs, --ray: give one of them')
    check_run_flags(args)
    check_ray_flags(args)


def check_ray_flags(args):
    cpus, gpus = args.cpus_per_run, args.gpus_per_run
    if args.ray is None and (cpus != 1 or gpus is not None):
        raise UsageError('--cpus-per-run, --gpus-per-run: with --ray only')
    if not (cpus >= 1 and cpus.is_integer()):
        raise UsageError(f'--cpus-per-run {cpus:g}: must be 1 or more whole cores')
    if gpus is not None and not (gpus in (0, 1) or 0 < gpus < 1):
        raise UsageError(f'--gpus-per-run {gpus:g}: must be from 0 to 1')
    if args.ray is not None and args.gpu is not None:
        raise UsageError('--gpu: with --ray each run has the GPU that Ray gives it')


def overrides(args):
    "Returns {name: value} of the fields of Config that the command line gives."
    return {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}


# --- the runs ---

def print_runs(todo, exp):
    "Prints the runs of an Experiment that are to do, and how many are recorded."
    for arm, cfg in todo:
        print(f'{arm} seed {cfg.seed}: {cfg.dataset}, {cfg.size} px, {cfg.epochs} epochs, {cfg.model}')
    print(f'{len(todo)} runs to do, {len(planned_runs(exp)) - len(todo)} recorded')


class Loop:
    """Trains the runs of an Experiment that the record does not hold yet.

    `args` has the flags of `add_flags`; messages begin with the name `program`. `failed` counts the runs that failed,
    `left` those that another process was training.
    """
    def __init__(self, exp, args, program):
        self.exp, self.args, self.program, self.fingerprints = exp, args, program, {}
        self.failed = self.left = 0
        # torch and fastai take seconds: not before the command line is known to be good
        if args.ray is not None:
            from training.cluster import Cluster
            cluster = Cluster(args.ray, args.results, args.cpus_per_run, args.gpus_per_run)
            self.each, self.device = cluster.each, cluster.device
            return
        from training.machine import get_device
        self.each, self.device = self.here, get_device(args.gpu)
        if args.jobs > 1:
            from training.jobs import Jobs
            self.each = Jobs(args.jobs, args.results, self.device).each

    def record(self): return runlog.load(self.args.results / 'runs.csv')

    def settled(self, cfg):
        """Returns (`cfg` as it will run, the fingerprint of its data).

        The fingerprint is None in a dry run, which fetches nothing.
        """
        from training.data import find_set
        from training.machine import settle
        cfg = settle(cfg, self.device)
        key = cfg.dataset, cfg.source, cfg.data, cfg.valid_pct, cfg.skip_damaged
        if key not in self.fingerprints:
            self.fingerprints[key] = None if self.args.dry_run else find_set(cfg).fingerprint
        return cfg, self.fingerprints[key]

    def todo(self, exp, seed0):
        "Returns [(arm, Config)] of the runs of `exp` from `seed0` on that are not recorded yet."
        record = self.record()
        return [(arm, cfg) for arm, cfg in planned_runs(exp, seed0)
                if runlog.recorded(record, *self.settled(cfg)).empty]

    def do(self, todo):
        """Trains the runs to do, but for those that another process is training.

        A run that fails has left its row, and the others go on.
        """
        start, skipped = time.perf_counter(), 0
        for done, (arm, cfg, error) in enumerate(self.each(todo, self.args.checkpoint_every), 1):
            if isinstance(error, Busy):
                skipped += 1
                say(f'{error}: skipped', file=sys.stderr)
            elif error:
                self.failed += 1
                say(f'{self.program}: {arm} seed {cfg.seed} failed: {error}; going on', file=sys.stderr)
            bar = '#' * round(30 * done / len(todo))
            minutes = (time.perf_counter() - start) / done * (len(todo) - done) / 60
            left = f'  {minutes:.0f} min left' if done > skipped else ''  # Another process trains those skipped.
            say(f'[{bar:30}] {done}/{len(todo)}  {arm} seed {cfg.seed}{left}')
        self.left += skipped

    def here(self, todo, checkpoint_every):
        """Trains `todo` in this process, one after the other; yields (arm, cfg, error) as each ends.

        The error is that of a run that failed or was not begun, else None. A mistake of the user ends the loop. So does
        a failure after which the device cannot be used.
        """
        from training.machine import is_usable
        from training.run import run
        for arm, cfg in todo:
            say(f'{arm} seed {cfg.seed}:')
            error = None
            try: run(cfg, self.args.results, self.device, resume=True, checkpoint_every=checkpoint_every)
            except Busy as e: error = e
            except Exception as e:
                if isinstance(e, UsageError) or is_stop(e): raise
                error = lack_of_memory(e) or repr(e)
            yield arm, cfg, error
            if error and not isinstance(error, Busy) and not is_usable(self.device):
                return say(f'{self.device} cannot be used any more; the same command goes on', sys.stderr)

    def runs(self):
        "Returns {arm: its runs in the record} on this machine's data and precision, whatever their end."
        record, found = self.record(), {}
        for arm, cfg in self.exp.arms.items():
            cfg, fingerprint = self.settled(cfg)
            runs = runlog.of_config(record, cfg)
            found[arm] = runs[runs.data_fingerprint == fingerprint]
        return found

    def until(self, enough, seed):
        """Goes on from `seed`, a run of each arm a turn, until `enough` holds of `runs()`.

        Raises UsageError where no run of a turn ends ok.
        """
        runs = self.runs()
        while not enough(runs):
            seed, todo = self.next_turn(seed)
            left, before = self.left, runs
            self.do(todo)
            runs = self.runs()
            if self.left > left: seed += 1
            elif all(n_ok(runs[arm]) == n_ok(before[arm]) for arm in runs):
                raise UsageError('--until: the last runs did not end ok; stopped')

    def next_turn(self, seed):
        "Returns (the first seed from `seed` on with a run of an arm that is not recorded yet, `todo` of its turn)."
        turn = replace(self.exp, runs=1)
        while True:
            todo = self.todo(turn, seed)
            if todo: return seed, todo
            seed += 1


def n_ok(runs): return int((runs.status == 'ok').sum())
