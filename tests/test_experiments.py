"""EXPERIMENTS: what is compared, in which order it runs, and whether what an entry says is so."""
import re
import shlex
import subprocess
from dataclasses import asdict, replace

import pandas as pd
import pytest
from conftest import REPO

import train_imagenette
from experiments import EXPERIMENTS, Config, Experiment, attentions, planned_runs, resolve
from report import published as record


@pytest.fixture(scope='module')
def published(): return record.load_published()


# --- entries ---

@pytest.mark.parametrize('name', EXPERIMENTS)
def test_an_entry_has_a_claim_and_arms_that_differ(name):
    exp = EXPERIMENTS[name]
    assert exp.claim and len(exp.arms) > 1 and len({resolve(cfg) for cfg in exp.arms.values()}) == len(exp.arms)
    if isinstance(exp.runs, dict): assert exp.runs.keys() == exp.arms.keys()
    assert all(exp.arms.keys() >= set(pair) for pair in exp.contrasts)


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_the_command_of_an_entry_trains_its_second_arm(name):
    exp = EXPERIMENTS[name]
    python, program, *argv = shlex.split(exp.command)
    assert (python, program) == ('python', 'train_imagenette.py')
    cfg, _ = train_imagenette.parse(argv)
    assert resolve(cfg) == resolve(list(exp.arms.values())[1])


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_an_entry_expects_what_is_published(name, published):
    "A number of another script is not one to expect."
    exp, said = EXPERIMENTS[name], {}
    for arm in exp.arms:
        row = record.published_mean(exp, arm, published)
        if row is None or row.recipe == 'other script': continue
        said[arm] = (round(100 * row['mean'], 2), row.n)
        assert row.metric == exp.metric and row.n == exp.wanted(arm)
    assert exp.expect == said and bool(said) == bool(exp.tables)


def test_every_published_mean_is_an_arm_of_an_experiment(published):
    said = [record.published_mean(exp, arm, published) for exp in EXPERIMENTS.values() for arm in exp.arms]
    assert {row.name for row in said if row is not None} == set(published.index)


def test_no_baseline_is_expected_of_another_script(): assert EXPERIMENTS['woof-256-400'].expect.keys() == {'simple'}


BOARD = pd.read_csv(REPO / 'results' / 'published' / 'leaderboard.csv')


def test_every_record_of_the_leaderboard_is_an_experiment():
    "With the layer and without it, by the recipe of the record or, where that needs more, not under its name."
    names = []
    for row in BOARD.itertuples():
        exp = EXPERIMENTS[f'board-{row.dataset.removeprefix("image")}-{row.size}-{row.epochs}']
        names.append(exp)
        assert exp.leader == (row.accuracy_pct, row.n_runs) and bool(exp.needs) != row.recipe.startswith('fastai')
        assert list(exp.arms) == ['none', 'simple'] and not exp.tables and not exp.expect
        for cfg in map(resolve, exp.arms.values()):
            assert (cfg.dataset, cfg.split, cfg.size, cfg.epochs) == (row.dataset, 'v2', row.size, row.epochs)
            assert cfg.source == ('320' if row.size <= 224 else 'full') and bool(cfg.mixup) == (row.epochs >= 80)
            assert re.findall(r'at batches of (\d+)', exp.needs) in ([], [str(cfg.bs)])
            assert flags_of(row.recipe).items() <= asdict(cfg).items() or exp.needs
    assert len(names) == 24 and names == [exp for exp in EXPERIMENTS.values() if exp.leader]


def flags_of(recipe):
    "Returns the knobs that the flags of a recipe set, but for --sa, which one arm has, and --fp16, which no CPU has."
    words = re.sub(r'--(sa|fp16) 1', '', recipe[recipe.index('--'):].partition(';')[0]) if '--' in recipe else ''
    given = train_imagenette.parse(words.split())[0]
    return {name: value for name, value in asdict(given).items() if value != getattr(Config, name)}


# --- what is compared ---

def test_the_first_arm_is_compared_with_each_other_one_and_sagan_with_simple():
    exp = Experiment('', attentions(Config(), 'none', 'simple', 'sagan'), 2)
    assert exp.pairs() == [('none', 'simple'), ('none', 'sagan'), ('sagan', 'simple')]


def test_contrasts_named_beforehand_are_what_is_compared():
    arms = attentions(Config(), 'none', 'simple', 'sagan')
    exp = Experiment('', arms, 2, contrasts=(('none', 'sagan'), ('sagan', 'simple')))
    assert exp.pairs() == [('none', 'sagan'), ('sagan', 'simple')]
    fewer = {arm: arms[arm] for arm in ('none', 'sagan')}  # as with --arms none,sagan
    assert replace(exp, arms=fewer).pairs() == [('none', 'sagan')]
    fewer = {arm: arms[arm] for arm in ('none', 'simple')}  # no contrast is of these: the usual pairs
    assert replace(exp, arms=fewer).pairs() == [('none', 'simple')]


def test_the_experiment_attention_is_that_of_its_plan():
    exp = EXPERIMENTS['attention']
    assert exp.pairs() == [('none', 'conv'), ('conv', 'simple'), ('simple_n', 'simple'), ('swap', 'simple'),
                           ('mean', 'cov'), ('se', 'simple'), ('sagan', 'simple'), ('simple', 'simple_sym')]
    assert {arm for arm in exp.arms if exp.wanted(arm) == 10} == {'low_rank', 'channel', 'se'}
    assert {exp.wanted(arm) for arm in exp.arms} == {10, 14} and set(exp.complete) == set(exp.arms)
    assert exp.described() == [('none', 'low_rank'), ('none', 'channel')]
    questions = [exp.asks(*pair) for pair in exp.pairs()]
    assert all(questions) and len(set(questions)) == 8 and exp.asks('none', 'simple') == ''
    page = (REPO / 'results' / 'README.md').read_text(encoding='utf-8')
    assert all(f'\n| {exp.asks(*pair)} | {" → ".join(pair)} | ' in page for pair in exp.pairs())


@pytest.mark.parametrize('name', [name for name, exp in EXPERIMENTS.items() if exp.plan])
def test_a_plan_is_in_the_log_of_its_commit_and_of_today(name):
    plan = EXPERIMENTS[name].plan
    def is_planned(log): return re.search(rf'^## .*Plan: [^\n]*\n?[^\n]*`{name}`', log, re.M) is not None
    log = (REPO / 'results' / 'LOG.md').read_text(encoding='utf-8')
    assert is_planned(log) and plan in log
    then = subprocess.run(['git', 'show', f'{plan}:results/LOG.md'], cwd=REPO, capture_output=True, text=True)
    if then.returncode: pytest.skip('not in a clone with its history')
    assert is_planned(then.stdout)


def test_arms_of_no_contrast_are_described_beside_the_first_arm():
    arms = attentions(Config(), 'none', 'simple', 'sagan')
    assert Experiment('', arms, 2).described() == []
    assert Experiment('', arms, 2, contrasts=(('none', 'sagan'),)).described() == [('none', 'simple')]
    places = Experiment('', arms, 2, contrasts=(('sagan', 'simple'),))  # what each adds to none stands beside
    assert places.described() == [('none', 'simple'), ('none', 'sagan')]


def test_pairs_that_are_asked_for_are_tested_with_the_others():
    arms = attentions(Config(), 'none', 'simple', 'sagan', 'conv')
    exp = Experiment('', arms, 2, contrasts=(('none', 'simple'), ('none', 'sagan')))
    assert exp.with_pairs([('none', 'simple'), ('none', 'conv')]) == exp  # conv is described
    assert exp.with_pairs([('simple', 'none')]).pairs() == [('none', 'sagan'), ('simple', 'none')]
    assert exp.with_pairs([('simple', 'sagan')]).pairs() == [*exp.pairs(), ('simple', 'sagan')]
    asked = replace(exp, contrasts={('none', 'simple'): 'all of it'}).with_pairs([('simple', 'sagan')])
    assert [asked.asks(*pair) for pair in asked.pairs()] == ['all of it', '']


# --- arms and runs ---

def test_attentions_are_layers_and_places():
    base = Config(size=64, sa_at='2')
    arms = attentions(base, 'none', 'simple', 'simple@1.0,3')
    assert list(arms) == ['none', 'simple', 'simple@1.0,3'] and arms['none'] == base
    assert arms['simple'] == replace(base, attention='simple')
    assert arms['simple@1.0,3'] == replace(base, attention='simple', sa_at='1.0,3')


def test_arms_take_turns_with_the_same_seeds():
    arms = attentions(Config(), 'none', 'simple', 'sagan')
    runs = planned_runs(Experiment('', arms, 2), seed0=5)
    assert [(arm, cfg.seed) for arm, cfg in runs] == [(arm, seed) for seed in (5, 6) for arm in arms]
    assert all(replace(cfg, seed=0) == arms[arm] for arm, cfg in runs)
    fewer = planned_runs(Experiment('', arms, {'none': 2, 'simple': 3, 'sagan': 1}))
    turns = [('none', 0), ('simple', 0), ('sagan', 0), ('none', 1), ('simple', 1), ('simple', 2)]
    assert [(arm, cfg.seed) for arm, cfg in fewer] == turns


# --- the log ---

LOG = (REPO / 'results' / 'LOG.md').read_text(encoding='utf-8')


def test_the_log_has_the_newest_entry_first():
    dates = re.findall(r'^## (\d{4}-\d{2}-\d{2})', LOG, re.MULTILINE)
    assert dates and dates == sorted(dates, reverse=True)
    assert len(dates) == len(re.findall(r'^## ', LOG, re.MULTILINE))


def test_the_commits_that_the_log_names_are_there():
    "In a clone with its whole history."
    def git(*argv): return subprocess.run(['git', '-C', REPO, *argv], capture_output=True, text=True)
    if git('rev-parse', '--is-shallow-repository').stdout.strip() != 'false': pytest.skip('not a whole clone')
    named = set(re.findall(r'\b[0-9a-f]{7}\b', LOG))
    assert len(named) > 10
    for commit in named: assert git('merge-base', '--is-ancestor', commit, 'HEAD').returncode == 0, commit
