import shutil
import subprocess
import time
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from conftest import REPO

import runlog
from command import UsageError
from experiments import EXPERIMENTS, N_IMAGES, Config, Experiment, attentions, planned_runs, resolve
from report import __main__ as main
from report import compare, figures, stats, tables
from report import published as record


@pytest.fixture(scope='module')
def published(): return record.load_published()


def make_runs(attention, accuracies, max_accuracies=None, seed0=0, n=None, **config):
    "Rows of runs.csv as a frame, of the full archive; an accuracy of None is a diverged run."
    cfg = resolve(Config(**dict(dataset='imagewoof', attention=attention) | config))
    n_train, n_val = n or N_IMAGES.get((cfg.dataset, cfg.split), (1437, 360))
    same = asdict(cfg) | dict(precision='fp32', fit_seconds=60., data_fingerprint='f', n_train=n_train, n_val=n_val)
    rows = [same | dict(run_id=f'{attention}{cfg.size}{cfg.epochs}-{i}', status='diverged' if a is None else 'ok', seed=seed0 + i,
                        accuracy=a, max_accuracy=m, started=f'2026-01-01T00:00:{i % 60:02d}Z')
            for i, (a, m) in enumerate(zip(accuracies, max_accuracies or accuracies))]
    df = pd.DataFrame(rows, columns=list(runlog.COLUMNS)).astype({'accuracy': float, 'max_accuracy': float})
    return df.astype({name: 'Int64' for name, kind in runlog.COLUMNS.items() if kind is int})


def all_gaps(name, *runs, **overrides):
    "Returns the rows of compare.gaps of one experiment, with these settings in all arms."
    exp = EXPERIMENTS[name]
    exp = replace(exp, arms={arm: replace(cfg, **overrides) for arm, cfg in exp.arms.items()})
    return compare.gaps({name: exp}, pd.concat(runs), record.load_published())


def gaps(name, *runs, arm='simple', **overrides):
    "Returns those of an arm against the first arm: one for each set of images."
    rows = all_gaps(name, *runs, **overrides)
    return [row for row in rows if row['base'] == rows[0]['base'] and row['arm'] == arm]


def gap(name, *runs, **overrides):
    "Returns the one of `gaps`."
    (row,) = gaps(name, *runs, **overrides)
    return row


# --- experiments ---

def test_arms_take_turns_with_the_same_seeds():
    arms = attentions(Config(), 'none', 'simple', 'simple@1,2', epochs=4)
    assert [(a, c.seed) for a, c in planned_runs(Experiment('', arms, 2), 5)] == [(a, s) for s in (5, 6) for a in arms]
    fewer = Experiment('', arms, {'none': 2, 'simple': 3, 'simple@1,2': 1})
    assert [(a, c.seed) for a, c in planned_runs(fewer)] == [('none', 0), ('simple', 0), ('simple@1,2', 0), ('none', 1), ('simple', 1),
                                                         ('simple', 2)]
    assert [(c.attention, c.sa_at, c.epochs) for c in arms.values()] == [('none', '1', 5), ('simple', '1', 4), ('simple', '1,2', 4)]


def test_contrasts_named_beforehand_are_what_is_compared():
    arms = attentions(Config(), 'none', 'simple', 'sagan')
    exp = Experiment('', arms, 2, contrasts=(('none', 'sagan'), ('sagan', 'simple')))
    assert exp.pairs() == [('none', 'sagan'), ('sagan', 'simple')]
    assert replace(exp, contrasts=()).pairs() == [('none', 'simple'), ('none', 'sagan'), ('sagan', 'simple')]
    fewer = {arm: arms[arm] for arm in ('none', 'sagan')}  # as with --arms none,sagan
    assert replace(exp, arms=fewer).pairs() == [('none', 'sagan')]
    fewer = {arm: arms[arm] for arm in ('none', 'simple')}  # no contrast is of these: the usual pairs
    assert replace(exp, arms=fewer).pairs() == [('none', 'simple')]
    for name, exp in EXPERIMENTS.items():
        assert all(len(pair) == 2 and exp.arms.keys() >= set(pair) for pair in exp.contrasts), name


# --- comparisons ---

def test_a_gap_is_that_of_stats_beside_the_published_one():
    a, b = [0.60, 0.64, 0.62], [0.65, 0.66, 0.70]
    r = gap('woof-128-5', make_runs('none', a), make_runs('simple', b))
    paired = stats.compare_paired(a, b)
    assert r['difference'].items() >= {k: paired[k] for k in ('difference', 'low', 'high', 'p', 'permutation_p')}.items()
    assert r['difference'].items() >= {k: stats.compare(a, b)[k] for k in ('student_p', 'g', 'beats')}.items()
    assert r['ours']['arm'].items() >= stats.summary(b).items()
    assert r['difference']['paired'] and r['welch'].items() <= stats.compare(a, b).items()
    said = r['published']
    assert (said['base']['mean'], said['arm']['mean'], said['difference']['difference']) == pytest.approx((0.623, 0.652, 0.029))
    assert r['verdict']['verdict'] == stats.verdict(r['difference']['low'], r['difference']['high'], 0.029)
    assert (r['verdict']['n_runs'], r['verdict']['n_wanted'], r['ours']['seconds']) == (3, 12, 60)
    assert tables.verdict(r) == r['verdict']['verdict'] + ' (3 of 12 runs)'


def test_pairs_need_the_same_seeds():
    r = gap('woof-128-5', make_runs('none', [0.6, 0.7]), make_runs('simple', [0.6, 0.75], seed0=1))
    assert not r['difference']['paired'] and r['difference']['p'] == stats.compare([0.6, 0.7], [0.6, 0.75])['p']


def test_of_one_seed_the_first_run_counts():
    first, again = make_runs('simple', [0.6, 0.7]), make_runs('simple', [0.9]).assign(run_id='z', fused=0)
    r = gap('woof-128-5', make_runs('none', [0.6, 0.65]), again, first)
    assert r['ours']['arm']['n'] == 2 and r['difference']['paired'] and r['ours']['arm']['mean'] == pytest.approx(0.65)


def test_sagan_is_compared_with_simple_too():
    runs = [make_runs('none', [0.6, 0.62]), make_runs('sagan', [0.61, 0.63, None]), make_runs('simple', [0.66, 0.67])]
    rows = all_gaps('woof-128-5', *runs)
    assert [(r['base'], r['arm']) for r in rows] == [('none', 'simple'), ('none', 'sagan'), ('none', 'simple_sym'), ('sagan', 'simple')]
    assert rows[3]['difference']['difference'] == pytest.approx(0.045)
    assert rows[3]['published']['difference']['difference'] == pytest.approx(0.652 - 0.640)
    sagan = rows[3]['ours']['base']
    assert (sagan['n'], rows[3]['ours']['arm']['n'], sagan['diverged']) == (2, 2, 1)
    two = replace(EXPERIMENTS['woof-128-5'], arms={a: EXPERIMENTS['woof-128-5'].arms[a] for a in ('sagan', 'simple')})
    assert two.pairs() == [('sagan', 'simple')]


def test_a_published_difference_whose_interval_holds_0_is_no_claim():
    settings = dict(arch='xresnet18', lr=8e-3, size=256, mixup=0.2)
    a, b = [0.90, 0.902] * 8, [0.901, 0.903] * 8
    r = gap('woof-256-50-r18-mixup', make_runs('none', a, epochs=50, **settings), make_runs('simple', b, epochs=47, **settings))
    said = r['published']['difference']
    assert said['low'] < 0 < said['high'] and said['difference'] < 0 and np.isnan(r['verdict']['claim'])
    assert r['verdict']['verdict'] == stats.verdict(r['difference']['low'], r['difference']['high'])


def test_a_verdict_on_fewer_runs_than_wanted_says_so():
    runs = [make_runs('none', [0.6, 0.61] * 6), make_runs('simple', [0.65, 0.655] * 5 + [None])]
    assert tables.verdict(gap('woof-128-5', *runs)) == 'larger than published (11 of 12 runs)'
    assert tables.verdict(gap('woof-128-5', *runs, make_runs('simple', [0.65], seed0=11))) == 'larger than published'
    assert tables.verdict(gap('woof-128-5', runs[0])) == 'no runs'
    assert tables.verdict(gap('woof-128-5', runs[0], make_runs('simple', [None]))) == 'no runs'


def test_what_did_not_end_ok_is_counted():
    failed = make_runs('none', [0.1]).assign(status='failed', run_id='x')
    r = gap('woof-128-5', make_runs('none', [0.6, 0.62, None]), failed, make_runs('simple', [0.65]))
    base = r['ours']['base']
    assert (base['n'], base['diverged'], base['other'], r['ours']['arm']['diverged']) == (2, 1, 1, 0)
    assert base['mean'] == pytest.approx(0.61) and '61.0 ± 1.4 (2, 1 diverged, 1 unfinished)' in tables.text([r])


def test_last_and_best_epoch_are_never_mixed():
    settings = dict(arch='xresnet18', lr=8e-3)
    r = gap('woof-128-50-r18', make_runs('none', [0.7, 0.72], [0.8, 0.82], epochs=50, **settings),
            make_runs('simple', [0.8], [0.85], epochs=47, **settings))
    assert r['metric'] == 'max' and [r['ours'][side]['mean'] for side in compare.SIDES] == pytest.approx([0.81, 0.85])
    r = gap('woof-128-5', make_runs('none', [0.6], [0.65]), make_runs('simple', [0.7], [0.75]))
    assert r['metric'] == 'last' and [r['ours'][side]['mean'] for side in compare.SIDES] == [0.6, 0.7]


@pytest.mark.parametrize('other, verdict', [
    (dict(split='v2'), 'difference'), (dict(source='320'), 'no verdict: 320 px archive'), (dict(n=(200, 200)), 'difference'),
])
def test_other_images_are_a_set_of_their_own(other, verdict):
    ours, others = [[make_runs('none', [0.6, 0.61], **s), make_runs('simple', [0.7, 0.712], **s)] for s in ({}, other)]
    rows = gaps('woof-128-5', *ours, *others)
    assert [r['ours']['base']['n'] for r in rows] == [2, 2] and tables.verdict(rows[1]).startswith(verdict)
    assert [not np.isnan(r['published']['difference']['difference']) for r in rows] == [True, 'source' in other]
    assert len({tables.title(r) for r in rows}) == 2


@pytest.mark.parametrize('other', [
    dict(lr=8e-3), dict(mixup=0.2), dict(stem='32-32-64'), dict(opt='sgd'), dict(pct_noise=50), dict(act='mish'),
    dict(wd=0.5), dict(label_smoothing=0.), dict(dataset='digits'), dict(size=64), dict(sa_at='1,2'),
])
def test_runs_of_other_settings_are_not_of_the_experiment(other):
    r = gap('woof-128-5', make_runs('simple', [0.6], **other), make_runs('none', [0.6]))
    assert (r['ours']['base']['n'], r['ours']['arm']['n'], r['verdict']['verdict']) == (1, 0, 'no runs')


def test_a_verdict_is_that_of_the_experiment_whatever_the_flags():
    runs = [make_runs(a, values, **s) for s in ({}, dict(source='320'), dict(opt='sgd')) for a, values in
            (('none', [0.6, 0.61]), ('simple', [0.64, 0.646]))]
    plain, other, sgd = (gaps('woof-128-5', *runs, **flags) for flags in ({}, dict(source='320'), dict(opt='sgd')))
    assert [tables.verdict(r) for r in plain[1:]] == [tables.verdict(r) for r in other] == ['no verdict: 320 px archive']
    assert np.isnan(sgd[0]['published']['difference']['difference'])  # it is not the recipe that was published
    assert sgd[0]['verdict']['verdict'] == 'difference'


@pytest.mark.parametrize('same', [dict(data='x', source='160'), dict(loader='device'), dict(fused=0), dict(meta='x')])
def test_runs_that_differ_in_speed_alone_are_repetitions(same):
    r = gap('woof-128-5', make_runs('simple', [0.6]), make_runs('simple', [0.7], seed0=1, **same))
    assert r['ours']['arm']['n'] == 2


@pytest.mark.parametrize('column, value', [('precision', 'fp16'), ('data_fingerprint', 'g')])
def test_sets_are_told_apart(column, value):
    runs = [make_runs(a, [0.6, 0.62]).assign(**c) for a in ('none', 'simple') for c in ({}, {column: value})]
    rows = gaps('woof-128-5', *runs)
    assert len({tables.title(r) for r in rows}) == 2 and [r['ours']['arm']['n'] for r in rows] == [2, 2]


def test_without_runs_the_published_numbers_are_shown(published):
    rows = compare.gaps(EXPERIMENTS, runlog.load('/no/such/file'), published)
    assert {r['experiment'] for r in rows} == set(EXPERIMENTS) and {tables.verdict(r) for r in rows} == {'no runs'}
    assert all(np.isnan(r['difference']['p']) for r in rows)
    assert len(tables.markdown(rows).splitlines()) == len(rows) + 2


def test_holm_is_over_the_rows_shown():
    runs = [make_runs('none', [0.6, 0.62, 0.64]), make_runs('simple', [0.66, 0.67, 0.69]), make_runs('sagan', [0.61, 0.66, 0.65])]
    rows = all_gaps('woof-128-5', *runs)
    p, holm_p = ([r['difference'][key] for r in rows] for key in ('p', 'holm_p'))
    assert holm_p == pytest.approx(stats.holm(p).tolist(), nan_ok=True) and holm_p[0] == 3 * p[0]
    assert f'{p[0]:.2g} ({holm_p[0]:.2g})' in tables.markdown(rows)


def test_predictions_give_the_share_of_the_images(tmp_path, published):
    rng = np.random.default_rng(0)
    targets = rng.integers(10, size=500)
    runs = pd.concat([make_runs('none', [0.5] * 3), make_runs('simple', [0.5] * 3)])
    logits = {i: rng.random((500, 10)) for i in runs.run_id}
    files = np.array(['f'] * 500)
    for i, values in logits.items(): runlog.write_predictions(i, tmp_path, logits=values, targets=targets, files=files)
    right = {arm: np.array([logits[f'{arm}1285-{i}'].argmax(1) == targets for i in range(3)]) for arm in ('none', 'simple')}
    exp = {'woof-128-5': EXPERIMENTS['woof-128-5']}
    r = compare.gaps(exp, runs, published, tmp_path)[0]
    assert r['ours']['arm']['images_share'] == stats.validation_noise(right['simple'])['share']
    assert r['images']['low'] == stats.image_bootstrap(right['none'], right['simple'])['low']
    (tmp_path / 'predictions' / 'none1285-0.npz').unlink()
    assert np.isnan(compare.gaps(exp, runs, published, tmp_path)[0]['images']['low'])


def test_recorded_is_the_same_configuration_seed_and_data():
    cfg = resolve(Config(dataset='imagewoof', precision='fp32', seed=1))
    runs = make_runs('none', [0.6, None, 0.7])
    assert len(runlog.recorded(runs, cfg, 'f')) == 1  # it diverged: a result
    for other in (dict(seed=3), dict(precision='fp16'), dict(epochs=6)): assert runlog.recorded(runs, replace(cfg, **other), 'f').empty
    assert runlog.recorded(runs, cfg, 'g').empty and runlog.recorded(runs.assign(status='failed'), cfg, 'f').empty


def test_plan_and_narrow_enough():
    rng = np.random.default_rng(0)
    runs = [make_runs(a, list(m + 0.01 * rng.standard_normal(40))) for a, m in (('none', 0.6), ('simple', 0.62))]
    r = gap('woof-128-5', *runs)
    sd = np.sqrt(np.mean([r['ours'][side]['sd']**2 for side in compare.SIDES]))
    needed = stats.runs_needed(0.652 - 0.623, sd)
    assert f'published +2.9 needs {needed}, ' in tables.plan([r]) and needed > 1
    arms = [compare.values(r, 'last')[0] for r in runs]
    assert compare.narrow_enough([arms], 1.) and not compare.narrow_enough([arms], 0.3)
    assert not compare.narrow_enough([arms, [arms[0], arms[1] * 3]], 1.)  # each pair
    assert not compare.narrow_enough([[a[:5] for a in arms]], 5.)  # too few to stop, however close
    assert 'sd 0.9 (published)' in tables.plan(gaps('woof-128-50-r18', runs[0][:0]))
    sd = record.single_runs_sd(EXPERIMENTS['woof-128-5'].arms['simple'], record.load_published_runs())
    assert sd == pytest.approx(0.014156, abs=1e-6)  # the fork's 30; of none two notebooks' 20, and 20 from full-size images
    plan = tables.plan(gaps('woof-128-5', runs[0][:0]))
    assert f'sd {100 * np.sqrt((0.01790**2 + sd**2) / 2):.1f} (single runs published)' in plan


def test_runs_done_are_those_of_the_latest_planned_set():
    runs = [make_runs('none', [0.6, None, 0.62]), make_runs('simple', [0.65]), make_runs('none', [0.6] * 9, split='v2')]
    exp, rows = EXPERIMENTS['woof-128-5'], all_gaps('woof-128-5', *runs)
    assert {r['planned'] for r in rows} == {True, False}
    assert compare.done(exp, rows) == dict(none=3, simple=1, sagan=0, simple_sym=0)
    assert set(compare.done(exp, [r for r in rows if not r['planned']]).values()) == {0}


def test_a_plan_of_another_split_is_that_of_its_runs():
    runs = [make_runs(a, values, split='v2') for a, values in (('none', [0.6, 0.62]), ('simple', [0.64, 0.66]))]
    line, *others = tables.plan(all_gaps('woof-128-5', *runs, split='v2')).splitlines()
    assert line.startswith('woof-128-5, split v2, archive 160, fp32, data f  simple - none: seen +4.0 needs') and len(others) == 3


def test_a_flat_frame_has_a_column_for_each_number_and_no_name_twice():
    flat = tables.frame(all_gaps('woof-128-5', make_runs('none', [0.6, 0.62]), make_runs('simple', [0.65, 0.66]))).iloc[0]
    names = ['ours_base_mean', 'published_arm_mean', 'published_difference', 'difference', 'difference_low', 'verdict', 'verdict_n_wanted']
    assert flat[names].tolist() == pytest.approx([0.61, 0.652, 0.029, 0.045, flat.difference_low, flat.verdict, 12])
    assert not any(isinstance(value, dict) for value in flat)


# --- files ---

@pytest.mark.slow(4)
def test_the_same_rows_give_the_same_bytes(tmp_path, published):
    runs = pd.concat([make_runs('none', [0.60, 0.64, None]), make_runs('simple', [0.65, 0.66])])
    for i in runs.run_id[:2]: runlog.write_curve(i, [dict(epoch=e, accuracy=0.1 * e) for e in (1, 2)], tmp_path)
    rows = compare.gaps(EXPERIMENTS, runs, published)
    files = []
    for _ in range(2):
        main.write(rows, runs, tmp_path, published)
        files.append({f.relative_to(tmp_path): f.read_bytes() for d in ('tables', 'figures') for f in sorted((tmp_path / d).iterdir())})
    assert files[0] == files[1]
    assert {f.name for f in files[0]} == {'gaps.csv', 'gaps.md', 'set_right.csv', 'set_right.md', 'forest.png', 'forest.svg',
                                          'woof-128-5.png', 'woof-128-5.svg'}
    back = pd.read_csv(tmp_path / 'tables' / 'gaps.csv')
    differences = [row['difference']['difference'] for row in rows]
    assert back.difference.tolist() == pytest.approx(differences, rel=1e-5, nan_ok=True)


def test_figures_show_every_run_and_every_difference(published, tmp_path):
    runs = pd.concat([make_runs('none', [0.60, 0.64, None]), make_runs('simple', [0.65])])
    exp = EXPERIMENTS['woof-128-5']
    axes = figures.experiment('woof-128-5', exp, runs, published, tmp_path).axes
    shown = {m: sum(len(line.get_xdata()) for line in axes[0].lines if line.get_marker() == m) for m in 'os*'}
    assert shown == {'o': 2, 's': 1, '*': 3}  # runs without and with, three published means
    assert sum(len(line.get_xdata()) for line in axes[2].lines) == 3
    rows = compare.gaps({'woof-128-5': exp}, runs, published)
    marks = [line.get_marker() for line in figures.forest(rows).axes[0].lines]
    assert marks.count('s') == 3 and marks.count('o') == 1
    with pytest.raises(UsageError, match='no runs'): figures.experiment('woof-128-5', exp, runs[:0], published, tmp_path)


def test_figures_show_the_metric_that_is_published(published, tmp_path):
    settings, name = dict(arch='xresnet18', lr=8e-3, split='v2'), 'woof-128-50-r18'  # of v2 nothing is published
    runs = pd.concat([make_runs('none', [0.7, 0.72], [0.8, 0.82], epochs=50, **settings),
                      make_runs('simple', [0.7], [0.85], epochs=47, **settings)])
    points, _, time = figures.experiment(name, EXPERIMENTS[name], runs, published, tmp_path).axes
    for ax in (points, time):
        assert list(ax.lines[0].get_ydata()) == pytest.approx([80, 82]) and ax.get_ylabel() == 'accuracy of the best epoch (%)'


def assert_within(fig, texts):
    for text in texts:
        box = text.get_window_extent()
        assert fig.bbox.x0 - 1 <= box.x0 and box.x1 <= fig.bbox.x1 + 1, text.get_text()


def test_the_forest_is_labelled_with_n_and_split_and_nothing_is_cut_off(published, tmp_path):
    runs = pd.concat([make_runs('none', [0.60, 0.64]), make_runs('simple', [0.65]), make_runs('none', [0.6], split='v2')])
    fig = figures.forest(compare.gaps(EXPERIMENTS, runs, published))
    figures.save(fig, tmp_path / 'forest')
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert 'woof-128-5, fp32, data f, split v1: none → simple  (12/12; 2/1)' in labels and all('split' in s for s in labels)
    assert 'woof-256-400, split v1: none → simple  (?/1; –/–)' in labels
    assert_within(fig, [fig.axes[0].xaxis.label, *fig.axes[0].get_yticklabels()])


def test_the_times_of_different_devices_are_called_not_comparable_and_nothing_is_cut_off(published, tmp_path):
    for device, words in (['a'] * 3, 'minutes of a run'), (['a', 'a', 'b'], 'minutes of a run\n(different devices'):
        runs = pd.concat([make_runs('none', [0.60, 0.64]), make_runs('simple', [0.65])]).assign(device=device)
        fig = figures.experiment('woof-128-5', EXPERIMENTS['woof-128-5'], runs, published, tmp_path)
        figures.save(fig, tmp_path / 'woof')
        assert fig.axes[2].get_xlabel().startswith(words) and ('not comparable' in fig.axes[2].get_xlabel()) == ('b' in device)
        assert_within(fig, [t for ax in fig.axes for t in (ax.xaxis.label, ax.yaxis.label, ax.title)])


@pytest.mark.slow(10)
def test_ten_thousand_rows_in_under_3_seconds(published):
    rng = np.random.default_rng(0)
    arms = [cfg for exp in EXPERIMENTS.values() for cfg in exp.arms.values()]
    each = 10_000 // len(arms)
    runs = pd.concat([make_runs(c.attention, list(0.6 + 0.02 * rng.standard_normal(each)), **{
        k: getattr(c, k) for k in ('dataset', 'split', 'size', 'epochs', 'arch', 'lr', 'mixup', 'sa_at')}) for c in arms])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        compare.gaps(EXPERIMENTS, runs, published)
        seconds.append(time.process_time() - start)
    assert len(runs) > 9_900 and min(seconds) < 3


def unchanged(path): return subprocess.run(['git', 'diff', '--quiet', 'HEAD', '--', path], cwd=REPO).returncode == 0


def test_readme_is_not_stale(published, tmp_path):
    if not unchanged('results/runs.csv'): pytest.skip('runs of your own are in results/runs.csv')
    readme = tmp_path / 'README.md'
    readme.write_text((REPO / 'README.md').read_text())
    main.write_readme(main.readme_table(runlog.load(), published), readme)
    assert readme.read_text() == (REPO / 'README.md').read_text(), 'run: python report.py --readme'
    readme.write_text('no markers')
    with pytest.raises(UsageError, match='markers'): main.write_readme('', readme)


@pytest.mark.slow(4)
def test_command(tmp_path, capsys):
    assert main.main(['--results', str(tmp_path)]) == 2 and capsys.readouterr().err.count('\n') == 1
    for arm in ('none', 'simple'): runlog.append(make_runs(arm, [0.5]).iloc[0].dropna().to_dict(), tmp_path)
    assert not main.main(['--results', str(tmp_path)]) and 'none → simple: too few runs to say' in capsys.readouterr().out
    assert not main.main(['woof-256-5', '--results', str(tmp_path)]) and 'published +5.7 [3.6, 7.8]' in capsys.readouterr().out
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'tables').write_text('a file where the folder should be')
    shutil.copy(tmp_path / 'runs.csv', tmp_path / 'full')
    assert main.main(['--results', str(tmp_path / 'full')]) == 2 and capsys.readouterr().err.count('\n') == 1
    assert main.main(['woof-128', '--results', str(tmp_path)]) == 2 and 'did you mean woof-128-5?' in capsys.readouterr().err


def test_results_readme_explains_every_column():
    text = (runlog.RESULTS / 'README.md').read_text()
    cells = [line.split('|')[1] for line in text.split('## Columns')[1].splitlines() if line.startswith('| ')]
    assert {name.strip() for cell in cells for name in cell.split(',')} - {'column'} == set(runlog.COLUMNS)


def test_summary_is_that_of_numpy_and_counts_what_did_not_end_ok():
    values = [0.60, 0.64, 0.62]
    s = compare.summarise(pd.concat([make_runs('none', [*values, None]), make_runs('simple', [0.7])])).set_index('attention')
    assert s.n.to_dict() == {'none': 3, 'simple': 1} and s.diverged.to_dict() == {'none': 1, 'simple': 0}
    again = make_runs('none', [0.9]).assign(run_id='z', fused=0)  # of one seed the first run counts
    assert compare.summarise(pd.concat([make_runs('none', values), again]))['mean'][0] == pytest.approx(np.mean(values))
    assert s['mean']['none'] == pytest.approx(np.mean(values)) and s.sd['none'] == pytest.approx(np.std(values, ddof=1))
