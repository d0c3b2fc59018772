"""The published record: its files, what is read from them, and what is wrong with it, computed here a second time."""
import csv
from statistics import mean, stdev

import pytest
from conftest import REPO
from scipy.stats import ttest_ind

from experiments import EXPERIMENTS, Config
from report import published as record
from report import stats

FILES = REPO / 'results' / 'published'


@pytest.fixture(scope='module')
def published(): return record.load_published()


def rows(file, **settings):
    "Returns the rows {column: text} of a published file that have these texts."
    with open(FILES / file, newline='', encoding='utf-8') as f: every = list(csv.DictReader(f))
    return [row for row in every if all(row[key] == value for key, value in settings.items())]


def single_runs(source, **settings):
    "Returns the accuracies in percent of the single runs of a source (a part of its name) with these texts."
    return [float(row['accuracy_pct']) for row in rows('runs.csv', **settings) if source in row['source']]


# --- the files ---

def test_the_readme_of_the_files_counts_them():
    text = (FILES / 'README.md').read_text(encoding='utf-8')
    counts = {'aggregates.csv': '{} rows', 'runs.csv': '{:,} single runs', 'leaderboard.csv': 'the {} records'}
    for file, words in counts.items(): assert words.format(len(rows(file))) in text


def test_a_blank_setting_is_the_default(published):
    names = ['lr', 'bs', 'opt', 'schedule', 'mom', 'act']
    assert published.loc[0, names].tolist() == [3e-3, 64, 'adam', 'one_cycle', 0.9, 'relu']
    assert not published[record.VARIED].isna().any().any()


def test_the_means_are_those_of_the_file_and_of_the_fork(published):
    assert len(published) == len(rows('aggregates.csv')) + 16 and (published.table == 'fork').sum() == 16


def test_published_runs_have_the_published_means():
    "The 10 runs of the first release, read from its notebook, against its README."
    assert round(mean(single_runs('sdoria:v0.1', attention='none')), 1) == 61.9
    assert round(mean(single_runs('sdoria:v0.1', attention='simple')), 1) == 67.6
    runs = record.load_published_runs()
    assert sorted(runs.variant.unique()) == ['none', 'simple', 'simple@1,2,3,4']
    assert sorted(runs.schedule.unique()) == ['flat_cos', 'one_cycle']


def test_the_published_t_tests_are_met(published):
    for name, difference, p in [('woof-128-50-r18', 0.007, 0.0157), ('woof-128-100-r18', 0.006, 0.0153)]:
        exp = EXPERIMENTS[name]
        a, b = (record.published_mean(exp, arm, published) for arm in ('none', 'simple'))
        test = stats.compare_summaries(a['mean'], a.sd, a.n, b['mean'], b.sd, b.n)
        assert round(test['difference'], 3) == difference and test['student_p'] == pytest.approx(p, abs=2e-4)


# --- the replication ---

def test_the_independent_replication():
    none, simple = (single_runs('lessw2020', act='mish', attention=name) for name in ('none', 'simple'))
    assert (len(none), round(mean(none), 2), round(stdev(none), 2)) == (20, 73.65, 1.13)
    assert (len(simple), round(mean(simple), 2), round(stdev(simple), 2)) == (20, 74.97, 1.30)
    low, high = ttest_ind(simple, none, equal_var=False).confidence_interval()
    assert (round(mean(simple) - mean(none), 2), round(low, 2), round(high, 2)) == (1.32, 0.54, 2.10)
    exp, means = EXPERIMENTS['woof-128-5-ranger'], record.load_published()
    base, arm = (record.published_mean(exp, name, means) for name in ('none', 'simple'))
    test = stats.compare_summaries(base['mean'], base.sd, base.n, arm['mean'], arm.sd, arm.n)
    assert (test['difference'], test['low'], test['high']) == pytest.approx((0.0132, low / 100, high / 100), abs=5e-5)


# --- recipes ---

def test_the_recipe_of_which_least_is_known_counts(published):
    def weakest(name):
        exp = EXPERIMENTS[name]
        return record.weakest_recipe(*(record.published_mean(exp, arm, published) for arm in exp.arms))
    assert weakest('woof-256-5') == weakest('woof-128-5-ranger') == weakest('woof-256-5-stages') == 'documented'
    assert weakest('woof-128-5') == weakest('nette-256-5') == 'assumed'
    assert weakest('woof-256-400') == 'other script' and weakest('attention') == ''
    assert set(published.recipe) == set(record.RECIPES)


@pytest.mark.parametrize('name, dataset, size, epochs, said, n, points, errors', [
    ('nette-256-5', 'imagenette', 256, 5, 85.3, 6, -2.6, -7.4),
    ('woof-256-400', 'imagewoof', 256, 400, 91.0, 1, 1.9, 4.1),
    ('woof-256-80', 'imagewoof', 256, 80, 90.3, 10, 0.8, 3.4),
    ('woof-128-5', 'imagewoof', 128, 5, 65.2, 12, -0.8, -1.7),
    ('woof-256-5', 'imagewoof', 256, 5, 67.6, 10, 0.1, 0.2),
    ('woof-256-20', 'imagewoof', 256, 20, 85.66, 10, 0.4, 1.5),
    ('nette-128-5', 'imagenette', 128, 5, 86.3, 10, 0.3, 1.0),
    ('nette-256-20', 'imagenette', 256, 20, 94.4, 6, 0.0, 0.2),
])
def test_the_source_against_the_single_runs_of_the_fork(name, dataset, size, epochs, said, n, points, errors):
    fork = single_runs('Self Attention.ipynb', dataset=dataset, size=str(size), epochs=str(epochs))
    difference = said - mean(fork)
    error = stdev(fork) * (1 / n + 1 / len(fork))**0.5
    assert (round(difference, 1), round(difference / error, 1)) == (points, errors)
    table = record.source_against_fork().set_index(['dataset', 'size', 'epochs'])
    row = table.loc[dataset, size, epochs]
    assert (row.difference, row.z) == pytest.approx((difference / 100, difference / error))
    recipe = Config(dataset=dataset, split='v1', size=size, epochs=epochs, attention='simple')
    assert EXPERIMENTS[name].arms['simple'] == recipe
    shown = record.source_against_fork_text()
    assert (f'{points:+.1f}', f'{errors:+.1f}') in zip(shown['difference'], shown['standard errors'])


# --- what is wrong ---

@pytest.fixture(scope='module')
def shown():
    "Returns a function: the texts found and shows of the row of `set_right` whose claim begins so."
    table = record.set_right()

    def find(said):
        row, = (row for _, row in table.iterrows() if row.said.startswith(said))
        return row.found, row.shows
    return find


def words(a, b):
    "Returns the difference b - a and Welch's interval as `set_right` prints them."
    low, high = ttest_ind(b, a, equal_var=False).confidence_interval()
    return f'{mean(b) - mean(a):+.2f} [{low:.2f}, {high:.2f}]'


def test_the_numbers_of_what_is_wrong_are_recomputed(shown):
    woof = dict(dataset='imagewoof', epochs='5')
    plain = single_runs('sdoria:v0.1', attention='simple')
    assert words(plain, single_runs('Self Attention.ipynb', size='256', **woof)) in shown('sym=1')[0]
    resize = [row for row in rows('runs.csv', size='128', **woof) if 'sdoria-resize' in row['source']]
    small = [float(row['accuracy_pct']) for row in resize if 'full-size' not in row['source']]
    full = [float(row['accuracy_pct']) for row in resize if 'full-size' in row['source']]
    assert (round(mean(small), 2), round(mean(full), 2)) == (61.25, 63.89)
    assert words(small, full) in shown('128 px is')[0]
    assert 'different machines' in shown('128 px is')[1]
    batch = single_runs('mgrankin:Imagewoof_128_5_epoch-bs64', opt='adam')
    assert '62.51 and 61.25' in shown('the same settings')[0] and words(batch, small) in shown('the same settings')[0]
    assert 'one person' in shown('the same settings')[1]
    assert 'the 6 runs have 89.10; with the 30 of 128 px, 5 epochs, among them it is 69.88' in shown('400 epochs')[0]
    assert f'{sum(float(row["accuracy_pct"]) == 10 for row in rows("runs.csv"))} of 1,296' in shown('every run')[0]
    assert 'not why' in shown('every run')[1]
    assert 'leaderboard' in shown('90.2')[0] and 'no difference' in shown('90.2')[1]
    assert 'public for 4 of 16 means' in shown('one recipe')[0]


@pytest.mark.parametrize('dataset, size, one, four', [
    ('imagewoof', '128', 66.0, 67.5), ('imagewoof', '256', 67.5, 69.3), ('imagenette', '128', 86.0, 87.2)])
def test_several_layers_helped_the_fork_at_5_epochs(dataset, size, one, four, shown):
    settings = dict(dataset=dataset, size=size, epochs='5')
    few, many = (single_runs(part, **settings) for part in ('Self Attention.ipynb', 'with more layers.ipynb'))
    assert (round(mean(few), 1), round(mean(many), 1)) == (one, four)
    assert f'{dataset} {size} px, 5 epochs: {words(few, many)}' in shown('adding several layers')[0]


def test_after_400_epochs_four_layers_lost_one_run_and_nothing_else(shown):
    one, four = (single_runs(part, epochs='400') for part in ('Self Attention.ipynb', 'with more layers.ipynb'))
    learned = [accuracy for accuracy in four if accuracy != 10]
    words = ('6 runs each: 1 with four layers ended at chance, '
             f'the others have {mean(learned):.2f} against {mean(one):.2f}')
    found, shows = shown('adding several layers')
    assert words in found and (len(four), len(learned)) == (6, 5) and 'but for that run' in shows
