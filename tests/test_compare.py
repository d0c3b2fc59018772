"The comparisons: which runs are compared, with what is published, and what the verdict is."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats as st
import statsmodels.formula.api as smf
from made_runs import PUBLISHED, SMALL, all_gaps, gap, gaps, make_runs

import runlog
from command import UsageError
from experiments import EXPERIMENTS, Config, Experiment, knobs, resolve
from report import compare, figures, stats, tables
from report import published as record

# --- what is compared ---

def test_runs_on_images_of_ones_own_that_differ_in_the_layer_are_compared():
    own = dict(dataset='custom', data='pets', size=64, bs=32, arch='xresnet18')
    base, arm = make_runs('none', [0.5, 0.52, 0.51], **own), make_runs('simple', [0.6, 0.61, 0.63], **own)
    others = [make_runs('simple', [0.7], sa_at='2', **own), make_runs('simple', [0.6], **own | dict(size=128)),
              base.assign(data_fingerprint='other', run_id=base.run_id + 'x'), make_runs('simple', [0.6], size=64)]
    runs = pd.concat([arm, base, *others], ignore_index=True)
    (name, exp), = compare.on_own_images(runs).items()
    assert name == 'own images (no plan), 64 px, 5 epochs, xresnet18, bs 32'
    assert list(exp.arms) == ['none', 'simple', 'simple@2'] and exp.runs == {'none': 3, 'simple': 3, 'simple@2': 1}
    rows = [row for row in compare.gaps({name: exp}, runs, PUBLISHED) if compare.has_runs(row)]
    row = next(row for row in rows if row['arm'] == 'simple')
    assert row['difference']['difference'] == pytest.approx(0.1033, abs=1e-3) and row['difference']['n_pairs'] == 3
    assert f'{name}, folder pets' in tables.text(rows) and 'none → simple' in tables.text(rows)


def test_repetitions_and_failures_on_own_images_are_no_runs_that_are_wanted():
    own = dict(dataset='custom', data='pets', size=64)
    base, arm = make_runs('none', [0.5, 0.52], **own), make_runs('simple', [0.6, 0.61], **own)
    more = [base[:1].assign(run_id='again'), arm[:1].assign(run_id='broken', status='failed', seed=7)]
    (exp,) = compare.on_own_images(pd.concat([base, arm, *more], ignore_index=True)).values()
    assert exp.runs == {'none': 2, 'simple': 2}


def test_a_gap_is_that_of_stats_beside_the_published_one():
    a, b = [0.60, 0.64, 0.62], [0.65, 0.66, 0.70]
    r = gap('woof-128-5', make_runs('none', a), make_runs('simple', b))
    assert r['difference'].items() >= stats.compare_by_seed(dict(enumerate(a)), dict(enumerate(b))).items()
    assert (r['difference']['method'], r['difference']['p']) == (stats.PAIRED, pytest.approx(st.ttest_rel(b, a).pvalue))
    assert r['welch']['p'] == pytest.approx(st.ttest_ind(b, a, equal_var=False).pvalue)
    summary = {k: v for k, v in stats.summary(b).items() if not np.isnan(v)}
    assert r['ours']['arm'].items() >= summary.items()
    said = r['published']
    assert ((said['base']['mean'], said['arm']['mean'], said['difference']['difference'])
            == pytest.approx((0.623, 0.652, 0.029)))
    test = r['difference']
    assert r['verdict']['verdict'] == stats.verdict(test['low'], test['high'], test['holm_p'], 0.029)
    assert (r['verdict']['n_runs'], r['verdict']['n_wanted'], r['ours']['seconds']) == (3, 12, 60)
    assert tables.verdict(r) == r['verdict']['verdict'] + ' (assumed recipe, 3 of 12 runs)'


def test_pairs_need_the_same_seeds():
    r = gap('woof-128-5', make_runs('none', [0.6, 0.7]), make_runs('simple', [0.6, 0.75], seed0=1))
    assert r['difference']['method'] == stats.UNPAIRED
    assert r['difference']['p'] == stats.compare([0.6, 0.7], [0.6, 0.75])['p']


def test_of_one_seed_the_first_run_counts():
    first, again = make_runs('simple', [0.6, 0.7]), make_runs('simple', [0.9]).assign(run_id='z', fused=0)
    r = gap('woof-128-5', make_runs('none', [0.6, 0.65]), again, first)
    assert r['ours']['arm']['n'] == r['difference']['n_pairs'] == 2 and r['ours']['arm']['mean'] == pytest.approx(0.65)


def test_sagan_is_compared_with_simple_too():
    runs = [make_runs('none', [0.6, 0.62]), make_runs('sagan', [0.61, 0.63, None]), make_runs('simple', [0.66, 0.67])]
    rows = all_gaps('woof-128-5', *runs)
    assert [(r['base'], r['arm']) for r in rows] == [
        ('none', 'simple'), ('none', 'sagan'), ('none', 'simple_sym'), ('sagan', 'simple')]
    assert rows[3]['difference']['difference'] == pytest.approx(0.045)
    assert rows[3]['published']['difference']['difference'] == pytest.approx(0.652 - 0.640)
    sagan = rows[3]['ours']['base']
    assert (sagan['n'], rows[3]['ours']['arm']['n'], sagan['diverged']) == (2, 2, 1)
    two = replace(EXPERIMENTS['woof-128-5'], arms={a: EXPERIMENTS['woof-128-5'].arms[a] for a in ('sagan', 'simple')})
    assert two.pairs() == [('sagan', 'simple')]


def test_a_published_difference_whose_interval_holds_0_is_no_claim():
    settings = dict(arch='xresnet18', lr=8e-3, size=256, mixup=0.2)
    a, b = [0.90, 0.902] * 8, [0.9015, 0.9005] * 8
    r = gap('woof-256-50-r18-mixup', make_runs('none', a, epochs=50, **settings),
            make_runs('simple', b, epochs=47, **settings))
    said = r['published']['difference']
    assert said['low'] < 0 < said['high'] and said['difference'] < 0 and np.isnan(r['verdict']['claim'])
    assert r['verdict']['verdict'] == 'no difference seen'


def test_a_verdict_on_fewer_runs_than_wanted_says_so():
    runs = [make_runs('none', [0.6, 0.61] * 6), make_runs('simple', [0.65, 0.655] * 5 + [None])]
    words = tables.verdict(gap('woof-128-5', *runs))
    assert words == ('so far: larger than published (assumed recipe, 11 of 12 runs); '
                     'with the diverged runs at chance: too few runs to say')
    assert tables.verdict(gap('woof-128-5', *runs, make_runs('simple', [0.65, 0.66], seed0=10))).startswith(
        'larger than published (assumed recipe)')
    assert tables.verdict(gap('woof-128-5', runs[0])) == 'no runs: simple'


def test_what_did_not_end_ok_is_counted():
    failed = make_runs('none', [0.1] * 2).assign(status='failed', run_id=['x', 'y'], seed=[0, 7])  # 0 ended ok later
    r = gap('woof-128-5', make_runs('none', [0.6, 0.62, None]), failed, make_runs('simple', [0.65]))
    base = r['ours']['base']
    assert (base['n'], base['diverged'], base['other'], r['ours']['arm']['diverged']) == (2, 1, 1, 0)
    assert base['mean'] == pytest.approx(0.61) and '61.0 ± 1.4 (2, 1 diverged, 1 unfinished)' in tables.markdown([r])
    assert tables.both(r['ours']) == ['61.0 → 65.0', '(2, 1 diverged, 1 unfinished; 1)']
    assert '| 61.0 → 65.0 (2, 1) |' in tables.brief_markdown([r])


def test_last_and_best_epoch_are_never_mixed():
    settings = dict(arch='xresnet18', lr=8e-3)
    r = gap('woof-128-50-r18', make_runs('none', [0.7, 0.72], [0.8, 0.82], epochs=50, **settings),
            make_runs('simple', [0.8], [0.85], epochs=47, **settings))
    assert r['metric'] == 'max' and [r['ours'][side]['mean'] for side in compare.SIDES] == pytest.approx([0.81, 0.85])
    r = gap('woof-128-5', make_runs('none', [0.6], [0.65]), make_runs('simple', [0.7], [0.75]))
    assert r['metric'] == 'last' and [r['ours'][side]['mean'] for side in compare.SIDES] == [0.6, 0.7]
    entry = Experiment('its best epochs', EXPERIMENTS['woof-128-5'].arms, 1, metric='max')  # nothing is published of it
    runs = pd.concat([make_runs('none', [0.6], [0.65]), make_runs('simple', [0.7], [0.75])])
    r = compare.gaps({'new': entry}, runs, PUBLISHED)[0]
    assert r['metric'] == 'max' and [r['ours'][side]['mean'] for side in compare.SIDES] == [0.65, 0.75]


@pytest.mark.parametrize('other, verdict', [
    (dict(split='v2'), 'so far: difference'), (dict(source='320'), 'no verdict: 320 px archive'),
    (dict(n=(200, 200)), 'so far: difference'),
])
def test_other_images_are_a_set_of_their_own(other, verdict):
    ours, others = [[make_runs('none', [0.6, 0.61], **s), make_runs('simple', [0.7, 0.712], **s)] for s in ({}, other)]
    rows = gaps('woof-128-5', *ours, *others)
    assert [r['ours']['base']['n'] for r in rows] == [2, 2] and tables.verdict(rows[1]).startswith(verdict)
    assert [not np.isnan(r['published']['difference']['difference']) for r in rows] == [True, 'source' in other]
    assert len(set(tables.titles(rows))) == 2


@pytest.mark.parametrize('other', [
    dict(lr=8e-3), dict(mixup=0.2), dict(stem='32-32-64'), dict(opt='sgd'), dict(pct_noise=50), dict(act='mish'),
    dict(wd=0.5), dict(label_smoothing=0.), dict(dataset='digits'), dict(size=64), dict(sa_at='1,2'),
])
def test_runs_of_other_settings_are_not_of_the_experiment(other):
    r = gap('woof-128-5', make_runs('simple', [0.6], **other), make_runs('none', [0.6]))
    assert (r['ours']['base']['n'], r['ours']['arm']['n'], r['verdict']['verdict']) == (1, 0, 'no runs')


def test_a_verdict_is_that_of_the_experiment_whatever_the_flags():
    runs = [make_runs(a, values, **s) for s in ({}, dict(source='320'), dict(opt='sgd')) for a, values in
            (('none', [0.6, 0.61, 0.605]), ('simple', [0.64, 0.646, 0.642]))]
    plain, other, sgd = (gaps('woof-128-5', *runs, **flags) for flags in ({}, dict(source='320'), dict(opt='sgd')))
    assert ([tables.verdict(r) for r in plain[1:]] == [tables.verdict(r) for r in other]
            == ['no verdict: 320 px archive'])
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
    words = ('fp32', 'fp16') if value == 'fp16' else ('data f', 'data g')
    assert set(tables.titles(rows)) == {f'woof-128-5, {word}' for word in words}
    assert tables.titles(rows[:1]) == ['woof-128-5'] and [r['ours']['arm']['n'] for r in rows] == [2, 2]


def test_runs_with_a_known_fault_stand_apart_and_are_made_again():
    (fault, columns), cfg = runlog.FAULTS[0], resolve(Config(dataset='imagewoof', precision='fp32'))
    commit = columns['git_commit']
    sound = [make_runs(arm, [0.6, 0.62, 0.63]).assign(git_commit=commit) for arm in ('none', 'simple')]
    faulty = [runs[:2].assign(cuda_graphs=1) for runs in sound]
    rows = gaps('woof-128-5', *faulty)
    assert tables.titles(rows) == [f'woof-128-5, {fault}'] and rows[0]['ours']['arm']['n'] == 2
    assert set(compare.done(EXPERIMENTS['woof-128-5'], pd.concat(faulty)).values()) == {0}
    assert runlog.recorded(faulty[0], cfg, 'f').empty and len(runlog.recorded(sound[0], cfg, 'f')) == 1
    both = gaps('woof-128-5', *sound, *faulty)
    assert {title: row['ours']['arm']['n'] for title, row in zip(tables.titles(both), both)} == {
        'woof-128-5': 3, f'woof-128-5, {fault}': 2}
    alone = all_gaps('woof-128-5', faulty[0], sound[1])
    words = [tables.verdict(row) for row in alone if (row['base'], row['arm']) == ('none', 'simple')]
    assert words[0] == f'not comparable: fault {fault} and none'


def test_a_fault_is_told_by_any_columns(monkeypatch):
    runs = make_runs('none', [0.6, 0.62, 0.63]).assign(git_commit=['a', 'b', 'b'], torch=['2.14', '2.14', '2.15'])
    monkeypatch.setattr(runlog, 'FAULTS', [('one', dict(git_commit='a')), ('two', dict(git_commit='b', torch='2.15'))])
    assert runlog.faults(runs).tolist() == ['one', '', 'two'] and runlog.faults(runs[:0]).empty
    assert runlog.faults(runs.assign(git_commit='')).tolist() == [''] * 3


def test_runs_with_a_fault_count_until_all_are_made_again():
    def arms(n): return [make_runs(arm, [0.6 + 0.001 * i for i in range(n)]) for arm in ('none', 'simple', 'sagan')]
    faulty = [runs.assign(**runlog.FAULTS[0][1]) for runs in arms(12)]
    for n, sets in ((0, {'gradient fault'}), (11, {'gradient fault', ''}), (12, {''})):
        every = all_gaps('woof-128-5', *faulty, *arms(n))
        found = [row for row in compare.up_to_date(every) if compare.has_runs(row)]
        assert {row['fault'] for row in found} == sets and len(found) == 3 * len(sets)
        assert 'Of 3 published differences, 3 have all their runs' in tables.conclusion(every)
        chosen = compare.once_a_set([row for row in every if compare.has_runs(row)])
        assert {row['fault'] for row in chosen} == ({'gradient fault'} if n < 12 else {''}) and len(chosen) == 3
        words = [words for kind, words, *_ in figures._lines(found) if kind == 'title']
        assert ['gradient fault' in title for title in words] == [fault != '' for fault in sorted(sets)]


def test_of_two_sets_that_lack_runs_the_one_without_the_fault_counts():
    faulty = [make_runs(arm, [0.6, 0.61, 0.62]).assign(**runlog.FAULTS[0][1]) for arm in ('none', 'simple')]
    sound = [make_runs(arm, [0.6, 0.61]) for arm in ('none', 'simple')]
    every = [row for row in all_gaps('woof-128-5', *faulty, *sound) if compare.has_runs(row)]
    assert {row['fault'] for row in every} == {'gradient fault', ''}
    assert [row['fault'] for row in compare.once_a_set(every)] == ['']


def test_without_runs_the_published_numbers_are_shown(published):
    rows = compare.gaps(EXPERIMENTS, runlog.load('/no/such/file'), published)
    assert {r['experiment'] for r in rows} == set(EXPERIMENTS) and {tables.verdict(r) for r in rows} == {'no runs'}
    assert all(np.isnan(r['difference']['p']) for r in rows)
    assert len(tables.markdown(rows).splitlines()) == len(rows) + 2


def test_holm_is_over_the_comparisons_of_an_experiment_on_one_set():
    values = dict(none=[0.6, 0.62, 0.64], simple=[0.66, 0.67, 0.69], sagan=[0.61, 0.66, 0.65])
    runs = [make_runs(arm, accuracies, **SMALL) for arm, accuracies in values.items()]
    both = pd.concat([*runs, *(frame.assign(precision='fp16') for frame in runs)])
    exp = EXPERIMENTS['woof-64-5-r18']
    exp = replace(exp, arms={arm: replace(cfg, precision='auto') for arm, cfg in exp.arms.items()})
    rows = compare.gaps({'woof-64-5-r18': exp}, both, PUBLISHED)
    assert [len(all_gaps('woof-64-5-r18', both, **other)) for other in ({}, dict(precision='fp16'))] == [3, 3]
    for of_set in (rows[:3], rows[3:]):
        p, holm_p = ([r['difference'][key] for r in of_set] for key in ('p', 'holm_p'))
        assert holm_p == pytest.approx(stats.holm(p, 3).tolist(), nan_ok=True) and holm_p[0] == 3 * p[0]
    assert f'{p[0]:.2g} ({holm_p[0]:.2g})' in tables.markdown(rows)


def test_holm_counts_every_contrast_that_was_named_beforehand():
    runs = [make_runs(a, values)
            for a, values in (('none', [0.6, 0.62, 0.64]), ('simple', [0.66, 0.67, 0.69]), ('sagan', [0.7]))]
    exp = replace(EXPERIMENTS['woof-128-5'], complete=(),
                  contrasts=(('none', 'simple'), ('sagan', 'simple'), ('simple', 'simple_sym')))
    first, *others = compare.gaps({'woof-128-5': exp}, pd.concat(runs), PUBLISHED)
    assert first['difference']['holm_p'] == 3 * first['difference']['p']  # two of the three have no P yet
    assert all(np.isnan(r['difference']['holm_p']) for r in others)


def test_arms_of_no_contrast_are_shown_and_not_tested():
    spread = np.array([0.60, 0.61, 0.63, 0.62])
    shifts = dict(none=[0, 0, 0, 0], simple=[0.02, 0.03, 0.03, 0.02], conv=[0.01, 0, 0.01, 0],
                  low_rank=[0.02, 0.03, 0.02, 0.03])
    runs = [make_runs(arm, list(spread + shift), **SMALL) for arm, shift in shifts.items()]
    rows = all_gaps('attention', *runs)
    (row,) = [row for row in rows if row['arm'] == 'low_rank']
    test = st.ttest_rel(spread + shifts['low_rank'], spread).confidence_interval()
    assert row['base'] == 'none' and not row['tested'] and np.isnan(row['difference']['holm_p'])
    assert [row['difference'][end] for end in ('low', 'high')] == pytest.approx([test.low, test.high])
    assert tables.verdict(row) == 'described, not tested (± 0.9 points, 4 of 14 runs)' and tables.holm(row) == ''
    assert not any(line.startswith('none → low_rank: ') for line in tables.text(rows, details=True).splitlines())
    assert 'none → low_rank' in tables.text(rows) and 'low_rank' not in tables.plan(rows)
    tested = [row for row in rows if row['tested']]
    assert [row['difference']['holm_p'] for row in tested] == pytest.approx(
        stats.holm([row['difference']['p'] for row in tested], 8).tolist(), nan_ok=True)


def test_seeds_count_only_where_the_plan_s_arms_have_completed_them():
    "As in woof-128-5, where simple_sym came later and is not waited for; a run that diverged is complete."
    runs = [make_runs('none', [0.60, 0.62, 0.61, 0.60]), make_runs('simple', [0.64, 0.65, 0.66, 0.70]),
            make_runs('sagan', [0.61, 0.63, None])]
    as_planned = dict(complete=EXPERIMENTS['woof-128-5'].complete)
    rows = all_gaps('woof-128-5', *runs, make_runs('simple_sym', [0.64, 0.66]), **as_planned)
    rows = {(r['base'], r['arm']): r for r in rows}
    first = rows['none', 'simple']
    test = st.ttest_rel([0.64, 0.65, 0.66], [0.60, 0.62, 0.61])
    assert (first['difference']['runs'], first['difference']['p']) == ('complete seeds', pytest.approx(test.pvalue))
    assert [(base.seed, arm.seed) for base, arm in first['pairs']] == [(0, 0), (1, 1), (2, 2)]
    assert (first['verdict']['n_runs'], first['ours']['arm']['n'], first['ours']['arm']['n_ok']) == (3, 3, 4)
    assert tables.changes(first) == ['+4.0 [1.5, 6.5] (3 complete seeds)', 'all runs, 4 and 4: +5.5 [0.6, 10.4]']
    assert rows['none', 'sagan']['chance']['n_pairs'] == 3 and rows['none', 'simple_sym']['ours']['arm']['n'] == 2
    none_whole = all_gaps('woof-128-5', *runs[:2], make_runs('sagan', [0.61], seed0=7), **as_planned)
    assert {tables.verdict(r) for r in none_whole if r['arm'] != 'simple_sym'} == {'no complete seed'}
    more = all_gaps('woof-128-5', make_runs('none', [0.6] * 13), make_runs('simple', [0.6] * 13),
                    make_runs('sagan', [0.6] * 12), **as_planned)
    assert more[0]['ours']['base']['n'] == 12  # none of them was to run at seed 12: there, too, all or none count


def test_an_arm_that_has_only_begun_is_not_waited_for():
    runs = make_runs('none', [0.6, 0.62, 0.61]), make_runs('simple', [0.64, 0.65, 0.66])
    begun = make_runs('sagan', [0.1], seed0=1).assign(status='interrupted')
    row = all_gaps('woof-128-5', *runs, begun, complete=('none', 'simple', 'sagan'))[0]
    assert (row['ours']['arm']['n'], row['difference']['runs']) == (3, 'all')


def test_complete_seeds_are_counted_from_the_first_that_is_done():
    "Of 10 seeds from 100 on, sagan was to run at the first six."
    arms = dict(none=10, simple=10, sagan=6)
    runs = [make_runs(arm, [0.5 + i / 100 for i in range(n)], seed0=100, **SMALL) for arm, n in arms.items()]
    row = all_gaps('woof-64-5-r18', *runs, complete=tuple(arms))[0]
    assert (row['ours']['arm']['n'], row['difference']['runs']) == (10, 'all')


def test_a_difference_that_holm_does_not_allow_is_none():
    "The interval of none → simple excludes 0, but three comparisons are made: t is 2.5 with 11 degrees of freedom."
    spread = np.resize([0.01, -0.01], 12)
    t = 2.5 * spread.std(ddof=1) / 12**0.5
    arms = dict(none=np.zeros(12), simple=spread + t, sagan=np.roll(spread, 1), simple_sym=spread)
    runs = [make_runs(arm, list(0.6 + values), **SMALL) for arm, values in arms.items()]
    one = replace(EXPERIMENTS['woof-64-5-r18'], contrasts=(('none', 'simple'),))
    r, (alone, *_) = gap('woof-64-5-r18', *runs), compare.gaps({'woof-64-5-r18': one}, pd.concat(runs[:2]), PUBLISHED)
    for test in (r['difference'], alone['difference']):
        assert test['low'] > 0 and test['p'] == pytest.approx(2 * st.t.sf(2.5, 11))
    more = 'more runs than wanted: none 12 for 10, simple 12 for 10'
    words = f"too few runs to say (not after Holm's correction, ± 0.7 points, {more})"
    assert tables.verdict(r) == words
    assert r['difference']['holm_p'] == pytest.approx(3 * r['difference']['p'])
    assert tables.verdict(alone) == f'difference (± 0.7 points, {more})'


def test_arms_with_some_seeds_in_common_are_compared_at_their_seeds():
    """14 runs against 6 of the record: the runs of `none` at the other seeds are worse, which Welch's test takes for an
    effect."""
    runs = runlog.load()
    small = runs[(runs.split == 'v2') & (runs['size'] == 64) & (runs.precision == 'fp32')
                 & (runs.opt == 'adam') & (runs.fused == 1)]
    small = small[small.attention.isin(['none', 'sagan']) & (small.seed < 14)].drop_duplicates(['attention', 'seed'])
    (r,) = [r for r in compare.gaps({'woof-64-5-r18': EXPERIMENTS['woof-64-5-r18']}, small, PUBLISHED)
            if r['arm'] == 'sagan']
    test = r['difference']
    assert (test['method'], test['n_pairs'], r['ours']['base']['n'], r['ours']['arm']['n']) == (stats.MODEL, 6, 14, 6)
    frame = small.assign(arm=(small.attention == 'sagan').astype(int), y=100 * small.accuracy.astype(float))
    fit = smf.mixedlm('y ~ arm', frame, groups=frame.seed.astype(int)).fit(reml=True)
    assert 100 * test['difference'] == pytest.approx(fit.params['arm'], abs=0.01)
    both = frame[frame.seed < 6].pivot(index='seed', columns='arm', values='y').astype(float)
    assert (both[1] - both[0]).mean() == pytest.approx(0.44, abs=0.005)  # at the six shared seeds
    assert r['welch']['p'] < 0.05 < test['p'] and r['welch']['low'] > 0 > test['low']
    welch = st.ttest_ind(frame.y[frame.arm == 1], frame.y[frame.arm == 0], equal_var=False)
    assert r['welch']['p'] == pytest.approx(welch.pvalue)


# --- runs that were not made alike ---

def made(attention, accuracies, seed0=0, **columns):
    frame = make_runs(attention, accuracies, seed0=seed0).assign(torch='2.14', device='CPU A')
    return frame.assign(**columns,
                        run_id=[f'{attention}-{columns.get("torch", "")}{columns.get("fused", "")}-{seed0 + i}'
                                for i in range(len(frame))])


OTHER_STEPS = dict(loader='device', fused=0, channels_last=0, compile=1, cuda_graphs=1, keep_memory=0)


def test_these_are_the_other_ways_to_compute_a_step():
    assert list(OTHER_STEPS) == knobs(role='speed')
    assert all(getattr(Config, name) != value for name, value in OTHER_STEPS.items())


NONE, SIMPLE = [0.60, 0.62, 0.61, 0.63, 0.60, 0.61, 0.62], [0.63, 0.64, 0.65, 0.64, 0.63, 0.66, 0.64]


@pytest.mark.parametrize('column, other',
                         [('torch', '2.15'), ('device', 'CPU B'), ('device', 'CPU A, 2 threads'), *OTHER_STEPS.items()])
def test_the_like_pairs_decide_where_there_are_five_and_all_runs_stand_beside(column, other):
    runs = [made('none', NONE[:2], **{column: other}), made('none', NONE[2:], seed0=2), made('simple', SIMPLE)]
    r = gap('woof-128-5', *runs)
    paired = st.ttest_rel(SIMPLE[2:], NONE[2:])
    assert (r['difference']['runs'], r['difference']['n_pairs']) == ('like pairs', 5)
    assert (r['ours']['base']['n'], r['ours']['base']['n_ok']) == (5, 7)
    assert r['difference']['p'] == pytest.approx(paired.pvalue)
    assert r['ours']['arm']['mean'] == pytest.approx(np.mean(SIMPLE[2:]))
    beside = r['sensitivity']['all']
    everything = st.ttest_rel(SIMPLE, NONE)
    assert (beside['n_base'], beside['p']) == (7, pytest.approx(everything.pvalue))
    assert tables.changes(r)[0].endswith('(5 like pairs)')
    assert tables.changes(r)[-1].startswith('all runs, 7 and 7: +2.9 [')
    assert 'all runs, 7 and 7:' in tables.text([r]) and 'all runs' in tables.markdown([r])
    assert f'(5, 5) | {tables.change(r["difference"])} (5 like pairs) |' in tables.brief_markdown([r])
    assert (r['verdict']['n_runs'], r['verdict']['n_done'], r['verdict']['n_wanted']) == (5, 7, 12)
    if column in OTHER_STEPS:
        assert r['sensitivity']['steps']['n_base'] == 5
        assert tables.changes(r)[1].startswith('one kind of step, 5 and 7')


def test_fewer_than_five_like_pairs_stand_beside_all_runs():
    runs = [made('none', NONE[:3], torch='2.15'), made('none', NONE[3:], seed0=3), made('simple', SIMPLE)]
    r = gap('woof-128-5', *runs)
    assert (r['difference']['runs'], r['difference']['n_pairs'], r['sensitivity']['alike']['n_pairs']) == ('all', 7, 4)
    assert tables.changes(r)[1].startswith('4 like pairs: +2.') and ', of unlike runs, ' in tables.verdict(r)
    apart = gap('woof-128-5', made('none', NONE, torch='2.15'), made('simple', SIMPLE))
    assert tables.changes(apart)[1:] == ['no like pairs']


@pytest.mark.parametrize('columns', [{}, dict(workers=3), dict(meta='x'), dict(git_commit='1')])
def test_runs_that_were_all_made_alike_need_no_second_analysis(columns):
    r = gap('woof-128-5', made('none', NONE[:2], **columns), made('none', NONE[2:], seed0=2), made('simple', SIMPLE))
    assert r['difference']['runs'] == 'all' and len(tables.changes(r)) == 1 and not r['sensitivity']['mixed']


def test_seeds_on_different_machines_are_alike_where_both_arms_of_a_seed_are():
    runs = [made(a, values[at], seed0=at.start, device=device) for a, values in (('none', NONE), ('simple', SIMPLE))
            for at, device in ((slice(0, 3), 'CPU A'), (slice(3, 7), 'CPU B'))]
    r = gap('woof-128-5', *runs)
    assert (r['difference']['runs'], r['difference']['n_pairs']) == ('all', 7) and len(tables.changes(r)) == 1


def test_of_a_seed_that_ran_twice_the_like_pair_counts():
    "As the first runs of simple were plain steps, and none had only the others."
    twice = [made('simple', [0.5] * 3, fused=0).assign(run_id=['a', 'b', 'c']), made('simple', SIMPLE)]
    r = gap('woof-128-5', made('none', NONE), *twice)
    assert (r['difference']['runs'], r['difference']['n_pairs']) == ('like pairs', 7)
    assert r['ours']['arm']['mean'] == pytest.approx(np.mean(SIMPLE)) and r['sensitivity']['all']['n_arm'] == 7
    assert r['sensitivity']['all']['difference'] == pytest.approx(np.mean([0.5] * 3 + SIMPLE[3:]) - np.mean(NONE))


# --- runs that diverged, or have no accuracy ---

def test_an_arm_that_diverged_is_shown_with_two_verdicts():
    a = [0.60, 0.61, 0.62, 0.60, 0.61, 0.62]
    r = gap('woof-128-5', make_runs('none', a), make_runs('simple', [None] * 6))
    assert r['verdict']['verdict'] == stats.TOO_FEW and r['verdict']['reason'] == 'all runs of simple diverged'
    test = st.ttest_rel([0.1] * 6, a)
    assert (r['chance']['difference'], r['chance']['p']) == pytest.approx((0.1 - np.mean(a), test.pvalue))
    assert r['verdict']['at_chance'] == 'opposite direction'
    assert compare.has_runs(r) and '– (0, 6 diverged)' in tables.markdown([r])
    assert tables.verdict(r).endswith('; with the diverged runs at chance: opposite direction')


def test_a_seed_that_ended_ok_and_diverged_counts_once():
    ok, diverged = make_runs('none', [0.6 + i / 100 for i in range(9)]), make_runs('none', [None], seed0=3)
    runs = pd.concat([ok, diverged.assign(run_id='d', torch='2.0'), make_runs('simple', [0.65] * 10)])
    r = gap('woof-128-5', runs)
    assert (r['verdict']['n_runs'], r['verdict']['n_wanted']) == (9, 12)
    assert compare.done(EXPERIMENTS['woof-128-5'], runs) == dict(none=9, simple=10, sagan=0, simple_sym=0)


def test_a_diverged_seed_is_not_mended_by_a_second_run():
    none, simple = make_runs('none', [0.6, 0.62, 0.61]), make_runs('simple', [0.65, None, 0.66])
    again = make_runs('simple', [0.64], seed0=1).assign(run_id='z')  # later than all
    r = gap('woof-128-5', none, simple, again)
    assert (r['ours']['arm']['n'], r['ours']['arm']['diverged'], r['chance']['n_pairs']) == (2, 1, 3)
    assert 'with the diverged runs at chance: ' in tables.verdict(r)


def test_diverged_runs_on_images_of_ones_own_are_named_in_the_verdict():
    "How many classes there are is not in the record, so there is no accuracy of guessing."
    own = dict(dataset='custom', data='pets', size=64)
    runs = pd.concat([make_runs('none', [0.6, 0.62, 0.61], **own), make_runs('simple', [0.65, None, 0.66], **own)])
    r, = compare.gaps(compare.on_own_images(runs), runs, PUBLISHED)
    assert '1 diverged, not counted' in tables.verdict(r)


def test_one_diverged_run_of_many_changes_the_second_verdict_alone():
    a, b = [0.60, 0.61, 0.62, 0.60, 0.61, 0.62, 0.6], [0.64, 0.64, 0.65, 0.64, 0.64, 0.65, None]
    r = gap('woof-128-5', make_runs('none', a), make_runs('simple', b))
    assert r['verdict']['verdict'] == 'reproduced'
    at_chance = st.ttest_rel([*b[:6], 0.1], a)
    assert r['chance']['p'] == pytest.approx(at_chance.pvalue) and r['verdict']['at_chance'] == stats.TOO_FEW
    assert not gap('woof-128-5', make_runs('none', a[:6]), make_runs('simple', b[:6]))['verdict']['at_chance']


def test_holm_is_taken_anew_with_the_runs_at_chance():
    a, b = [0.60, 0.61, 0.62, 0.60], [0.65, 0.66, 0.68, None]
    rows = all_gaps('woof-128-5', make_runs('none', a), make_runs('simple', b),
                    make_runs('sagan', [0.60, 0.615, 0.61, 0.60]))
    ps = [r['chance']['p'] if r['ours']['base']['diverged'] or r['ours']['arm']['diverged'] else r['difference']['p']
          for r in rows]
    assert [rows[i]['chance']['holm_p'] for i in (0, 3)] == pytest.approx(stats.holm(ps)[[0, 3]].tolist())


def test_an_ok_row_without_an_accuracy_does_not_blank_its_arm():
    runs = make_runs('none', [0.6, 0.62, 0.61])
    runs.loc[1, ['accuracy', 'max_accuracy']] = np.nan
    r = gap('woof-128-5', runs, make_runs('simple', [0.65, 0.66, 0.67]))
    base = r['ours']['base']
    assert (base['n'], base['other'], base['mean']) == (2, 1, pytest.approx(0.605))
    assert not np.isnan(r['difference']['difference'])
    assert '(2, 1 unfinished)' in tables.markdown([r])


def test_arms_that_are_wholly_apart_without_spread_are_a_difference():
    r = gap('woof-128-5', make_runs('none', [0.6] * 10), make_runs('simple', [0.7] * 10))
    assert r['verdict']['verdict'] == 'larger than published' and r['difference']['p'] == pytest.approx(2 / 1024)


def test_arms_on_different_images_say_so():
    runs = [make_runs('none', [0.6, 0.61]),
            make_runs('simple', [0.65, 0.66]).assign(data_fingerprint='g', precision='fp16')]
    rows = gaps('woof-128-5', *runs)
    words = 'not comparable: precision fp32 and fp16, data_fingerprint f and g'
    assert [tables.verdict(r) for r in rows] == [words] * 2 and all(map(compare.has_runs, rows))
    both = gaps('woof-128-5', *runs, make_runs('simple', [0.65]))
    assert [tables.verdict(r) for r in both[1:]] == ['no runs: none'] and not both[0]['verdict']['reason']


# --- predictions ---

def test_predictions_give_the_share_of_the_images(tmp_path, published, capsys):
    rng = np.random.default_rng(0)
    targets = rng.integers(10, size=500)
    runs = pd.concat([make_runs('none', [0.5] * 3), make_runs('simple', [0.5] * 3)])
    logits = {i: rng.random((500, 10)) for i in runs.run_id}
    files = np.array(['f'] * 500)
    for i, values in logits.items(): runlog.write_predictions(i, tmp_path, logits=values, targets=targets, files=files)
    right = {arm: np.array([logits[f'{arm}1285-{i}'].argmax(1) == targets for i in range(3)])
             for arm in ('none', 'simple')}
    exp = {'woof-128-5': EXPERIMENTS['woof-128-5']}
    r = compare.gaps(exp, runs, published, tmp_path)[0]
    assert r['ours']['arm']['images_share'] == stats.validation_noise(right['simple'])['share']
    low = stats.over_images(right['none'], right['simple'], paired=True)['low']
    assert r['images']['low'] == pytest.approx(low)
    assert not tables.images_share(r['ours']['arm'])  # of three runs
    file = tmp_path / 'predictions' / 'none1285-0.npz'
    whole = file.read_bytes()
    backwards = slice(None, None, -1)  # the same images in another order
    named = np.array([f'{i:03}' for i in range(500)])
    for i, values in logits.items():
        order = backwards if i == 'none1285-0' else slice(None)
        runlog.write_predictions(i, tmp_path, logits=values[order], targets=targets[order], files=named[order])
    assert compare.gaps(exp, runs, published, tmp_path)[0]['images']['low'] == pytest.approx(low)
    others = np.array([f'{name}x' for name in named])
    runlog.write_predictions('none1285-0', tmp_path, logits=logits['none1285-0'], targets=targets, files=others)
    assert np.isnan(compare.gaps(exp, runs, published, tmp_path)[0]['images']['low'])  # of other images
    for content, words in ((whole[:1000], 'none1285-0.npz: cannot be read'), (None, '')):
        file.write_bytes(content) if content else file.unlink()
        assert np.isnan(compare.gaps(exp, runs, published, tmp_path)[0]['images']['low'])
        assert words in capsys.readouterr().err


# --- which runs are done, and how many it takes ---

def test_recorded_is_the_same_configuration_seed_and_data():
    cfg = resolve(Config(dataset='imagewoof', precision='fp32', seed=1))
    runs = make_runs('none', [0.6, None, 0.7])
    assert len(runlog.recorded(runs, cfg, 'f')) == 1  # it diverged: a result
    for other in (dict(seed=3), dict(precision='fp16'), dict(epochs=6)):
        assert runlog.recorded(runs, replace(cfg, **other), 'f').empty
    assert runlog.recorded(runs, cfg, 'g').empty and runlog.recorded(runs.assign(status='failed'), cfg, 'f').empty


def test_plan_and_narrow_enough():
    rng = np.random.default_rng(0)
    runs = [make_runs(a, list(m + 0.01 * rng.standard_normal(40))) for a, m in (('none', 0.6), ('simple', 0.62))]
    r = gap('woof-128-5', *runs)
    sd = np.std(runs[1].accuracy.to_numpy() - runs[0].accuracy.to_numpy(), ddof=1)
    needed = stats.runs_needed(0.652 - 0.623, sd, paired=True, alpha=0.05 / 4)
    assert f'published +2.9 needs {needed} runs an arm, ' in tables.plan([r]) and needed > 1
    assert (f'; paired, at sd {100 * sd:.1f} (of the differences at 40 seeds), 80 % power at P 0.05 / 4; have 40 and 40'
            in tables.plan([r]))
    few = gap('woof-128-5', *(run[:9] for run in runs))
    assert '(of the differences at 9 seeds: a guess), ' in tables.plan([few])
    arms = [compare.accuracies(r) for r in runs]
    assert compare.narrow_enough([arms], 1.) and not compare.narrow_enough([arms], 0.3)
    assert not compare.narrow_enough([arms, [arms[0], {seed: 3 * y for seed, y in arms[1].items()}]], 1.)  # each pair
    # too few, however close
    assert not compare.narrow_enough([[{seed: a[seed] for seed in range(5)} for a in arms]], 5.)
    assert 'sd 0.9 (published)' in tables.plan(gaps('woof-128-50-r18', runs[0][:0]))
    sd = record.single_runs_sd(EXPERIMENTS['woof-128-5'].arms['simple'], record.load_published_runs())
    # the fork's 30; of none two notebooks' 20, and 20 from full-size images
    assert sd == pytest.approx(0.014156, abs=1e-6)
    plan = tables.plan(gaps('woof-128-5', runs[0][:0]))
    assert f'sd {100 * np.sqrt((0.01790**2 + sd**2) / 2):.1f} (single runs published)' in plan


def test_until_counts_the_pairs_of_seeds():
    "A spread that the seeds share does not matter: unpaired, the half-width is 2 points, paired 0.2."
    rng = np.random.default_rng(0)
    effects, noise = 0.03 * rng.standard_normal(20), 0.003 * rng.standard_normal((2, 20))
    arms = [dict(enumerate(effects + noise[i])) for i in (0, 1)]
    apart = [arms[0], {seed + 100: y for seed, y in arms[1].items()}]
    assert compare.narrow_enough([arms], 0.3) and not compare.narrow_enough([apart], 0.3)
    more = [arms[0], arms[1] | {99: 0.9}]  # a run whose partner failed
    assert compare.narrow_enough([more], 0.3)


def test_until_ends_where_all_differences_are_equal():
    values = [0.60, 0.62, 0.61, 0.63, 0.60] * 2
    runs = {arm: make_runs(arm, [value + shift for value in values])
            for arm, shift in (('none', 0), ('simple', 0.02))}
    assert compare.known_to(0.1, [('none', 'simple')], runs, 'last')
    few = {arm: found[:9] for arm, found in runs.items()}
    assert not compare.known_to(0.1, [('none', 'simple')], few, 'last')
    alike = {arm: make_runs(arm, [0.1] * 10) for arm in runs}
    with pytest.raises(UsageError, match='end alike'): compare.known_to(0.1, [('none', 'simple')], alike, 'last')


def test_runs_done_are_those_of_the_latest_planned_set():
    runs = [make_runs('none', [0.6, None, 0.62]), make_runs('simple', [0.65]), make_runs('none', [0.6] * 9, split='v2')]
    exp = EXPERIMENTS['woof-128-5']
    assert {key['planned'] for key, _ in compare.sets(exp, pd.concat(runs))} == {True, False}
    assert compare.done(exp, pd.concat(runs)) == dict(none=3, simple=1, sagan=0, simple_sym=0)
    assert set(compare.done(exp, runs[2]).values()) == {0}


def test_summary_is_that_of_numpy_and_counts_what_did_not_end_ok():
    values = [0.60, 0.64, 0.62]
    s = compare.summarise(pd.concat([make_runs('none', [*values, None]),
                                     make_runs('simple', [0.7])])).set_index('attention')
    assert s.n.to_dict() == {'none': 3, 'simple': 1} and s.diverged.to_dict() == {'none': 1, 'simple': 0}
    again = make_runs('none', [0.9]).assign(run_id='z', fused=0)  # of one seed the first run counts
    assert compare.summarise(pd.concat([make_runs('none', values), again]))['mean'][0] == pytest.approx(np.mean(values))
    assert s['mean']['none'] == pytest.approx(np.mean(values)) and s.sd['none'] == pytest.approx(np.std(values, ddof=1))
    assert compare.summarise(again[:0])[compare.SUMMARY].columns.tolist() == compare.SUMMARY
