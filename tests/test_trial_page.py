"""The plan and the page of a trial, which need no torch."""
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

import runlog
from command import UsageError
from experiments import Config
from report import trial


def step(ms, none=10.):
    "Returns what training.timing.measure_steps says of an arm whose step takes `ms`."
    ratio = ms / none
    return dict(step_ms=ms, ratio=ratio, ratio_low=0.9 * ratio, ratio_high=1.1 * ratio, peak_mb=3.)


def made_plan(**changes):
    base = dict(dataset='digits', split='v2', size=32, arch='xresnet18', precision='fp32', epochs=10)
    arms = {arm: asdict(Config(**base, attention=arm)) for arm in ('none', 'conv', 'simple')}
    costs = {arm: dict(parameters=n, multiply_adds=n) | step(ms, 100.) for arm, n, ms in
             (('none', 0, 100.), ('conv', 4097, 103.), ('simple', 4097, 130.), ("fastai's simple", 4097, 150.))}
    return dict(name='made', layer='simple', source='', saved='2026-01-01T00:00:00Z', git_commit='abcdef012',
                git_dirty=0, device='a CPU', precision='fp32', data_fingerprint='d', arms=arms, costs=costs,
                seed0=0, runs=4, until=None, contrasts=[['none', 'simple'], ['conv', 'simple']], recorded={},
                equal_time={}, changes=[]) | changes


def made_runs(plan, tmp_path, seeds=range(4)):
    rng = np.random.default_rng(0)
    for arm, cfg in plan['arms'].items():
        for seed in seeds:
            runlog.append(cfg | dict(
                run_id=f'{arm}{seed}', status='ok', started='t', seed=seed, data_fingerprint='d', n_train=1, n_val=1,
                accuracy=0.5 + 0.02 * (cfg['attention'] == 'simple') + 0.001 * rng.normal(), device='a CPU'), tmp_path)
    return runlog.load(tmp_path / 'runs.csv')


def test_what_counts_are_the_planned_seeds_images_and_precision(tmp_path):
    plan = made_plan()
    runs = made_runs(plan, tmp_path, range(7))
    assert sorted(trial.runs_of(plan, runs).seed.unique()) == [0, 1, 2, 3]
    assert len(trial.runs_of(plan | dict(data_fingerprint='other'), runs)) == 0
    assert len(trial.runs_of(plan | dict(precision='bf16'), runs)) == 0
    assert len(trial.runs_of(plan, runs.assign(**runlog.FAULTS[0][1]))) == 0
    until = plan | dict(until=0.5)
    so_far = runs[(runs.attention != 'simple') | (runs.seed < 5)]
    assert sorted(trial.runs_of(until, so_far).seed.unique()) == [0, 1, 2, 3, 4]
    first, second = trial.gaps(plan, runs, tmp_path)
    assert (first['base'], second['base'], first['difference']['n_pairs']) == ('none', 'conv', 4)
    assert first['difference']['difference'] == pytest.approx(0.02, abs=0.005)
    text = trial.conclusion(first)
    assert text.startswith('**simple** against none: +') and 'P (Holm) ' in text
    assert 'difference' in text and text.endswith('points).')
    assert trial.accuracy(trial.of_arms(plan, runs)['none']).endswith('(4)')


def test_a_seed_counts_once_however_often_its_run_was_begun(tmp_path):
    runs = made_runs(made_plan(), tmp_path)
    none = runs[runs.attention == 'none']
    stopped = none[:1].assign(run_id='a', status='interrupted', accuracy=np.nan)
    assert trial.accuracy(pd.concat([stopped, none])) == trial.accuracy(none)
    assert trial.accuracy(pd.concat([stopped.assign(seed=9), none])).endswith('(4, 1 unfinished)')


def test_a_plan_names_its_images():
    plan = made_plan()
    pets = dict(dataset='custom', data='/somewhere/pets', source='auto')
    own = {arm: cfg | pets for arm, cfg in plan['arms'].items()}
    assert f'Images: {plan["arms"]["none"]["dataset"]}, split' in trial.plan_text(plan)
    assert 'Images: folder pets, split' in trial.plan_text(plan | dict(arms=own))


def test_a_plan_of_other_images_is_not_gone_on_with(tmp_path):
    plan = made_plan()
    arms = trial.experiment(plan).arms
    trial.check_same(plan, 'simple', arms, 'd', tmp_path)
    with pytest.raises(UsageError, match=r'other images \(data d, here e\); give this one another --name'):
        trial.check_same(plan, 'simple', arms, 'e', tmp_path)


def test_a_layer_that_always_diverges_has_a_whole_sentence(tmp_path):
    plan = made_plan()
    runs = made_runs(plan, tmp_path)
    runs.loc[runs.attention == 'simple', ['status', 'accuracy']] = 'diverged', np.nan
    first, _ = trial.gaps(plan, runs, tmp_path)
    words = '**simple** against none: too few runs to say (all runs of simple diverged'
    assert trial.conclusion(first).startswith(words)


def test_equal_time_takes_epochs_in_proportion(tmp_path):
    plan = made_plan()
    trial.add_equal_time(plan)
    assert list(plan['arms']) == ['none', 'conv', 'simple', 'simple in 8 epochs']  # conv: 9.7 epochs, rounded 10
    assert plan['arms']['simple in 8 epochs'] == plan['arms']['simple'] | dict(epochs=8)
    assert plan['contrasts'][2:] == [['none', 'simple in 8 epochs'], ['conv', 'simple in 8 epochs']]
    text = trial.page(plan, made_runs(plan, tmp_path), tmp_path)
    assert '- simple in 8 epochs: 104% of the time of none in 10 epochs.' in text
    with pytest.raises(UsageError, match=r'1\.30 times as long as the fastest, less than half an epoch in 1'):
        trial.add_equal_time(made_plan(arms={arm: cfg | dict(epochs=1) for arm, cfg in made_plan()['arms'].items()}))


def test_a_damaged_plan_is_one_line(tmp_path):
    (tmp_path / 'trials').mkdir()
    (tmp_path / 'trials' / 'x.json').write_text('{')
    with pytest.raises(UsageError, match=r'x\.json: not a plan'): trial.load(tmp_path, 'x')


def test_a_plan_from_before_equal_time_was_kept_in_it_is_read(tmp_path):
    plan = made_plan()
    trial.save({key: value for key, value in plan.items() if key != 'equal_time'}, tmp_path)
    assert trial.load(tmp_path, 'made') == plan


def test_the_page_says_it_in_numbers_that_follow_from_the_rows(tmp_path):
    plan = made_plan(recorded=dict(none=3, conv=0))
    runs = made_runs(plan, tmp_path)
    text = trial.page(plan, runs, tmp_path)
    mean = 100 * runs.accuracy[runs.attention == 'conv'].mean()
    assert f'| conv | 4,097 | 4,097 | 103.0 | 1.03 [0.93, 1.13] | 3 | {mean:.2f}'.removesuffix('0') in text
    assert "| fastai's simple | 4,097 | 4,097 | 150.0 | 1.50 [1.35, 1.65] | 3 | not trained |" in text
    assert 'Recorded before the plan was saved, and counted: 3 of none.' in text
    assert '12 rows of `runs.csv`' in text
    trial.write(plan, runs, tmp_path)
    assert (tmp_path / 'trials' / 'made.md').read_text(encoding='utf-8') == text
