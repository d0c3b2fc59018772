"""Writes the plan and the page of a trial: a layer beside none and beside a plain convolution.

A plan is a dict, kept as results/trials/<name>.json. scripts/trial.py makes it before the first run:
name, layer, source, saved, git_commit, git_dirty, device, precision, data_fingerprint
arms            {arm: the Config as a dict}, their order that of the runs
contrasts       [[base, arm]]: what is compared, named before the first run
seed0, runs     the runs of each arm have the seeds seed0 to seed0+runs-1
until           points: the trial goes on until each difference is known to so many; None: it ends after `runs`
equal_time      {arm: the arm that it is with fewer epochs}: at the run time of the fastest arm
costs           {arm: parameters and multiply_adds of its layers, and what training.timing.measure_steps measured}
recorded        {arm: runs that were recorded before the plan was saved}
changes         [dict(saved, arms, runs, until, recorded)]: how the plan was before it was changed, and when
"""
import json
from contextlib import contextmanager
from pathlib import Path, PurePath

import numpy as np
from filelock import Timeout
from matplotlib import rc_context
from matplotlib.figure import Figure

import runlog
from command import UsageError
from experiments import SETTINGS, Config, Experiment, setting
from report import compare, figures, stats, tables
from report.published import load_published

# --- the plan ---

def path(results, name):
    "Returns where the plan of that name is kept."
    return results / 'trials' / f'{name}.json'


def load(results, name):
    "Returns the plan of that name, or None."
    file = path(results, name)
    if not file.exists(): return None
    try: plan = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as e: raise UsageError(f'{file}: not a plan ({e}); mend or move it') from None
    return dict(equal_time={}) | plan


def save(plan, results):
    "Writes a plan."
    with runlog.replacing(path(results, plan['name'])) as f: json.dump(plan, f, indent=1, ensure_ascii=False)


@contextmanager
def alone(results):
    "Lets one process at a time make or change plans and pages in a results folder: several loops may be at a trial."
    Path(results).mkdir(parents=True, exist_ok=True)
    try:
        with runlog.locked(Path(results) / '.trials.lock', timeout=600): yield
    except Timeout as e: raise UsageError(f'{e.lock_file}: another process has held it for ten minutes') from None


def experiment(plan):
    "Returns the plan as an Experiment."
    arms = {arm: Config(**cfg) for arm, cfg in plan['arms'].items()}
    contrasts = tuple(map(tuple, plan['contrasts']))
    return Experiment(f'{plan["layer"]} on trial', arms, plan['runs'], contrasts=contrasts)


def on_trial(plan):
    "Returns the Config of the layer on trial, the second arm of the first contrast."
    _, arm = plan['contrasts'][0]
    return experiment(plan).arms[arm]


def check_same(plan, layer, arms, data_fingerprint, results):
    "Raises UsageError unless a plan asks what `arms` {arm: settled Config} do, on the same images."
    file = path(results, plan['name'])
    if plan['data_fingerprint'] != data_fingerprint:
        raise UsageError(f'{file}: is a trial on other images (data {plan["data_fingerprint"]}, here '
                         f'{data_fingerprint}); give this one another --name')
    if plan['layer'] != layer: raise UsageError(f'{file}: is a trial of {plan["layer"]}; give this one another --name')
    planned = experiment(plan).arms
    for arm, cfg in arms.items():
        if arm not in planned: raise UsageError(f'{file}: has no arm {arm}; give this trial another --name')
        there, here = ({name: getattr(c, name) for name in SETTINGS} for c in (planned[arm], cfg))
        if setting(planned[arm]) == setting(cfg): continue
        what = ', '.join(f'{name} {there[name]}, here {here[name]}' for name in there if there[name] != here[name])
        raise UsageError(f'{file}: has another plan ({what}); give this trial another --name')


def seeds(plan, runs):
    "Returns the seeds that count: those planned, and with `until` also every later one up to the layer's last run."
    first, last = plan['seed0'], plan['seed0'] + plan['runs'] - 1
    if plan['until']: last = max([last, *runlog.of_config(runs, on_trial(plan)).seed])
    return range(first, last + 1)


def runs_of(plan, runs):
    "Returns the runs that count: of the plan's images, precision and seeds, without a known fault."
    runs = runs[(runs.data_fingerprint == plan['data_fingerprint']) & (runs.precision == plan['precision'])
                & (runlog.faults(runs) == '')]
    return runs[runs.seed.isin(seeds(plan, runs))]


# --- in words ---

def plan_text(plan):
    "Returns the plan in Markdown, as it is printed before the first run."
    cfg = on_trial(plan)
    source = f', source {plan["source"]}' if plan['source'] else ''
    contrasts = '; '.join(f'{arm} − {base}' for base, arm in plan['contrasts'])
    recorded = ', '.join(f'{n} of {arm}' for arm, n in plan['recorded'].items() if n)
    commit = (plan['git_commit'][:7] or 'unknown') + (' with changes' if plan['git_dirty'] else '')
    last = plan['seed0'] + plan['runs'] - 1
    images = f'folder {PurePath(cfg.data).name}' if cfg.dataset == 'custom' else cfg.dataset
    lines = [
        f'Layer: `{plan["layer"]}`{source}, at place {cfg.sa_at} of the network.',
        f'Arms, in turn, each turn with one seed: {", ".join(plan["arms"])}.',
        f'Contrasts: {contrasts}; accuracy of the last epoch, at the same seeds.',
        f'Images: {images}, split {cfg.split}, {cfg.size} px (data {plan["data_fingerprint"]}).',
        f'Recipe: {cfg.arch}, {cfg.epochs} epochs, batch {cfg.bs}, {cfg.opt}, lr {cfg.lr:g}, {cfg.schedule}, '
        f'{plan["precision"]}{special(cfg)}.',
        f'Stopping: {plan["runs"]} runs of each arm, seeds {plan["seed0"]} to {last}{more(plan["until"])}.',
        f'Saved {plan["saved"]}, commit {commit}, on {plan["device"]}.']
    if recorded: lines.append(f'Recorded before the plan was saved, and counted: {recorded}.')
    for change in plan['changes']:
        n_recorded = sum(change['recorded'].values())
        lines.append(f'Changed {change["saved"]}, when {n_recorded} runs were recorded; before, it was '
                     f'{change["runs"]} runs of {", ".join(change["arms"])}{more(change["until"])}.')
    return '\n'.join(f'- {line}' for line in lines)


def more(until):
    "Returns what `until` adds to the number of runs, in words."
    return f', and more until each difference is known to ± {until:g} points (95 %)' if until else ''


def special(cfg):
    "Returns what else of the settings is not the default, in words."
    said = {'dataset', 'split', 'size', 'arch', 'epochs', 'bs', 'opt', 'lr', 'schedule', 'precision', 'source',
            'attention', 'attention_source', 'sa_at'}
    rest = [name for name in SETTINGS if name not in said and getattr(cfg, name) != getattr(Config, name)]
    return ''.join(f', {name} {getattr(cfg, name)}' for name in rest)


def gaps(plan, runs, results):
    "Returns the rows of compare.gaps of the plan's contrasts."
    return compare.gaps({f'trial {plan["name"]}': experiment(plan)}, runs_of(plan, runs), load_published(), results)


def conclusion(row, bold='**'):
    "Returns a sentence on a row of `gaps`: the arm (in Markdown: bold), the difference, its interval, the verdict."
    what = f'{bold}{row["arm"]}{bold} against {row["base"]}'
    words = tables.verdict(row)
    if not compare.has_runs(row): return f'{what}: {words}.'
    changes, p = tables.changes(row), tables.holm(row)
    if not any(changes): return f'{what}: {words}.'
    test = f', P (Holm) {p}, {tables.method(row["difference"])}' if p else ''
    return f'{what}: {"; ".join(changes)} points{test}: {words}.'


def text(plan, runs, results):
    "Returns the conclusions for a terminal."
    return '\n'.join(conclusion(row, bold='') for row in gaps(plan, runs, results))


ARMS_HEAD = ['arm', 'parameters of the layer', 'multiply-adds an image', 'step (ms)', 'step / none [quartiles]',
             'memory of a step (MiB)', 'accuracy (%): mean ± sd (runs)']


def arms_table(plan, runs):
    "Returns the arms as a Markdown table: what a layer costs, and its accuracy."
    arms = of_arms(plan, runs)
    lines = []
    for arm, cost in plan['costs'].items():
        lines.append([arm, f'{cost["parameters"]:,}', f'{cost["multiply_adds"]:,}', f'{cost["step_ms"]:.1f}',
                      '{ratio:.2f} [{ratio_low:.2f}, {ratio_high:.2f}]'.format(**cost), f'{cost["peak_mb"]:,.0f}',
                      accuracy(arms[arm]) if arm in arms else 'not trained'])
    return tables.markdown_table(ARMS_HEAD, lines, numbers=range(1, 7))


def of_arms(plan, runs):
    "Returns {arm: those of its runs that count}."
    counted = runs_of(plan, runs)
    return {arm: runlog.of_config(counted, cfg) for arm, cfg in experiment(plan).arms.items()}


def accuracy(runs):
    "Returns the mean of the runs of an arm and their spread, in words."
    return tables.percent(stats.summary(list(compare.accuracies(runs).values())) | compare.other_ends(runs))


def known(plan, runs):
    "Returns whether each difference is known to the points that the plan asks for."
    return compare.known_to(plan['until'], experiment(plan).pairs(), of_arms(plan, runs), 'last')


def equal_time_text(plan):
    "Returns what the arms of equal run time are, in Markdown; '' where the plan has none."
    if not plan['equal_time']: return ''
    steps = step_ratios(plan)
    fastest = min(steps, key=steps.get)
    epochs = {arm: Config(**plan['arms'][arm]).epochs for arm in steps}
    lines = [f'{fastest} has the fastest step. A slower arm has as many epochs as fit in the same time, rounded:', '']
    for arm in plan['equal_time']:
        share = steps[arm] * epochs[arm] / (steps[fastest] * epochs[fastest])
        lines.append(f'- {arm}: {share:.0%} of the time of {fastest} in {epochs[fastest]} epochs.')
    return '\n'.join(lines)


def step_ratios(plan):
    "Returns {arm: the time of a step over that of none} of the arms that train."
    return {arm: cost['ratio'] for arm, cost in plan['costs'].items() if arm in plan['arms']}


NOTES = """\
Parameters and multiply-adds (of products and convolutions, in a forward pass) are those of all its layers together. A \
step is forward, loss, backward and optimizer on one batch of random numbers. It is the median of several, the arms in \
turn, and so is its ratio to none in the same turn; its quartiles show how much of it is noise. The memory of a step \
is the peak of the tensors that it allocates.

Intervals are of 95 %. How they are made and how a verdict is reached is written in \
results/README.md of the repository. P values are of {n_pairs} comparisons, in brackets after \
Holm's correction. The runs are {n_runs} rows of `runs.csv`, on {devices}."""


def page(plan, runs, results):
    "Returns the page of a trial in Markdown."
    rows = gaps(plan, runs, results)
    counted = runs_of(plan, runs)
    equal_time = [row for row in rows if {row['arm'], row['base']} & plan['equal_time'].keys()]
    devices = sorted(set(counted.device[counted.status == 'ok']) - {''})
    words = dict(n_pairs=len(rows), n_runs=len(counted), devices='; '.join(devices) or 'no machine yet')
    def lines(rows): return '\n'.join(f'- {conclusion(row)}' for row in rows)
    parts = [f'# Trial of {plan["layer"]}', lines([row for row in rows if row not in equal_time]),
             f'![every run, and the differences with their intervals]({plan["name"]}.png)',
             '## What it costs', arms_table(plan, runs),
             '## At equal run time' if plan['equal_time'] else '', lines(equal_time), equal_time_text(plan),
             '## Plan', plan_text(plan), '## Notes', NOTES.format(**words)]
    return '\n\n'.join(filter(None, parts)) + '\n'


# --- the figure ---

def figure(plan, runs, results):
    "Returns the figure of a trial: every run beside the mean of its arm, and the differences."
    exp = experiment(plan)
    cfg = next(iter(exp.arms.values()))
    arms = {arm: found for arm, found in of_arms(plan, runs).items() if compare.accuracies(found)}
    rows = [row for row in gaps(plan, runs, results) if not np.isnan(row['difference']['difference'])]
    with rc_context(figures.STYLE):
        fig = Figure(figsize=(figures.WIDTH, 3.2))
        left, right = (figures.place(fig, inches, 0.5, 2.95, 2.1) for inches in (0.55, 4.15))
        figures.points(left, exp, arms, load_published()[:0])
        figures.differences(right, rows)
        what = f'{cfg.dataset} {cfg.size} px, {cfg.arch}, {cfg.epochs} epochs'
        fig.suptitle(f'{plan["layer"]}: {what}', fontsize=8.5, x=0.01, y=0.98, ha='left', weight='bold')
        return fig


def write(plan, runs, results):
    "Writes results/trials/<name>.md, .png and .svg; returns the page's path."
    file = path(results, plan['name']).with_suffix('.md')
    figures.save(figure(plan, runs, results), file.with_suffix(''))
    with runlog.replacing(file) as f: f.write(page(plan, runs, results))
    return file


# --- equal run time ---

def add_equal_time(plan):
    """Adds to a plan the slower arms with as many epochs as fit in the run time of the fastest, and their contrasts.

    Raises UsageError where no arm is slow enough to lose an epoch.
    """
    steps = step_ratios(plan)
    fastest = min(steps, key=steps.get)
    at_time = {}  # arm: the arm that is trained for as long as the fastest
    for arm in steps:
        epochs = Config(**plan['arms'][arm]).epochs
        fewer = max(1, round(epochs * steps[fastest] / steps[arm]))
        at_time[arm] = arm
        if fewer == epochs: continue
        at_time[arm] = shorter = f'{arm} in {fewer} epochs'
        plan['arms'][shorter] = plan['arms'][arm] | dict(epochs=fewer)
        plan['costs'][shorter] = plan['costs'][arm]
        plan['equal_time'][shorter] = arm
    pairs = [[at_time[base], at_time[arm]] for base, arm in plan['contrasts']]
    pairs = [pair for pair in pairs if pair not in plan['contrasts']]
    if not pairs:
        slowest = max(steps.values()) / steps[fastest]
        epochs = Config(**plan['arms'][fastest]).epochs
        raise UsageError(f'--equal-time: the slowest step takes {slowest:.2f} times as long as the fastest, less than '
                         f'half an epoch in {epochs}; take more --epochs, or leave it out')
    plan['contrasts'] += pairs


def changed(before, after, recorded):
    "Returns the plan `after`; where it asks for something else than `before`, with one more entry in `changes`."
    def asked(plan): return dict(arms=list(plan['arms']), runs=plan['runs'], until=plan['until'])
    if asked(before) == asked(after): return after
    change = dict(saved=runlog.timestamp(), **asked(before), recorded=recorded)
    return after | dict(changes=[*before['changes'], change])
