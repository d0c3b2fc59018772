from math import ceil, isnan

import numpy as np
import pandas as pd
import pytest
import scipy.stats as st
import statsmodels.formula.api as smf
from conftest import REPO
from statsmodels.stats.meta_analysis import effectsize_smd
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from report import stats

NAN = float('nan')
PUBLISHED = pd.read_csv(REPO / 'results' / 'published' / 'runs.csv')


def runs(source, **where):
    rows = PUBLISHED[PUBLISHED.source == source]
    for key, value in where.items(): rows = rows[rows[key] == value]
    return rows.accuracy_pct.to_numpy() / 100


PAIRS = {  # the first release, 10 runs against 10; the two batches of 20; the fork's 120 against 60 of unequal spread
    'v0.1': (runs('sdoria:v0.1', attention='none'), runs('sdoria:v0.1', attention='simple')),
    'resize': (runs('sdoria-resize:Imagewoof_128.ipynb', epochs=5),
               runs('sdoria-resize:Imagewoof_128.ipynb [128 px from full-size images]', epochs=5)),
    'fork': (runs('mgrankin:Imagewoof_128_5_epoch-bs64.ipynb'), runs('mgrankin:Imagewoof_128_5_epoch.ipynb')[:60]),
}
pairs = pytest.mark.parametrize('a, b', PAIRS.values(), ids=PAIRS)


def farthest(x, y, axis): return abs(x.mean(axis=axis) - y.mean(axis=axis))


# --- one arm ---

@pytest.mark.parametrize('values', [arm for pair in PAIRS.values() for arm in pair])
def test_summary(values):
    s, ref = stats.summary(values), DescrStatsW(values)
    assert s['n'] == len(values) and (s['mean'], s['sd']) == pytest.approx((ref.mean, np.std(values, ddof=1)))
    assert (s['low'], s['high']) == pytest.approx(ref.tconfint_mean())
    assert [s[k] for k in ('median', 'min', 'max')] == pytest.approx([np.median(values), values.min(), values.max()])
    # other draws, unsorted
    bca = st.bootstrap((values,), np.mean, n_resamples=20_000, rng=1, method='BCa').confidence_interval
    assert (s['bca_low'], s['bca_high']) == pytest.approx(bca, abs=0.05 * (bca.high - bca.low))
    assert stats.summary(values[::-1]) == s


def test_four_values_have_a_bootstrap_interval_within_them_and_three_have_none():
    "The smallest alone makes a resample of 3 in 1 of 27 cases, more than 2.5 %, of 4 in 1 of 256."
    three, four = stats.summary([0.5, 0.6, 0.7]), stats.summary([0.5, 0.6, 0.7, 0.75])
    assert isnan(three['bca_low']) and isnan(three['bca_high']) and three['low'] < 0.5
    assert four['min'] < four['bca_low'] < four['mean'] < four['bca_high'] < four['max']


@pytest.mark.filterwarnings('error')
def test_what_is_not_a_number_is_not_without_spread():
    s = stats.summary([0.6, NAN, 0.7])
    assert s['n'] == 3 and isnan(s['mean']) and isnan(s['sd']) and isnan(s['low'])
    assert isnan(stats.compare([0.6, NAN], [0.7, 0.8])['p'])
    assert isnan(stats.compare_paired([0.6, NAN], [0.7, 0.8])['p'])


@pytest.mark.parametrize('values, known', [
    ([], {}), ([0.6], dict(mean=0.6, median=0.6, min=0.6, max=0.6)),
    ([0.1] * 3, dict(mean=0.1, sd=0, median=0.1, min=0.1, max=0.1)),
    ([0.6, 0.7], dict(mean=0.65, sd=0.005**0.5, low=0.65 - 12.7062 * 0.05, high=0.65 + 12.7062 * 0.05, median=0.65,
                      min=0.6, max=0.7)),
], ids=['none', 'one', 'equal', 'two'])
@pytest.mark.filterwarnings('error')
def test_summary_of_few_or_equal_values_has_no_more_than_they_say(values, known):
    s = stats.summary(values)
    assert s.pop('n') == len(values) and {k: v for k, v in s.items() if not isnan(v)} == pytest.approx(known, abs=1e-5)


# --- two arms ---

@pairs
def test_compare(a, b):
    c, ref = stats.compare(a, b), CompareMeans(DescrStatsW(b), DescrStatsW(a))
    assert c['difference'] == pytest.approx(b.mean() - a.mean())
    assert (c['low'], c['high']) == pytest.approx(ref.tconfint_diff(usevar='unequal'))
    assert c['p'] == pytest.approx(st.ttest_ind(a, b, equal_var=False).pvalue)
    assert c['student_p'] == pytest.approx(st.ttest_ind(a, b).pvalue)
    g = effectsize_smd(b.mean(), b.std(ddof=1), len(b), a.mean(), a.std(ddof=1), len(a))[0]
    assert c['g'] == pytest.approx(g, rel=5e-4)  # statsmodels takes the approximate factor 1 - 3/(4 df - 1)
    assert c['beats'] == pytest.approx(st.mannwhitneyu(b, a).statistic / len(a) / len(b))
    assert stats.compare(a[::-1], b[::-1]) == c


@pairs
def test_summary_numbers_give_the_same_as_the_runs(a, b):
    c = stats.compare(a, b)
    s = stats.compare_summaries(a.mean(), a.std(ddof=1), len(a), b.mean(), b.std(ddof=1), len(b))
    assert s.keys() == c.keys() and {k for k, v in s.items() if isnan(v)} == {'permutation_p', 'beats'}
    assert {k: c[k] for k in s if not isnan(s[k])} == pytest.approx({k: v for k, v in s.items() if not isnan(v)})


def test_published_t_tests():
    "Difference 0.007, P = 0.0157 and 0.006, P = 0.0153: Student's of the means, sds and n; Welch's are about the same."
    table = pd.read_csv(REPO / 'results' / 'published' / 'aggregates.csv')
    for epochs, difference, student, welch in ((50, 0.007, 0.0157, 0.0159), (100, 0.006, 0.0153, 0.0153)):
        rows = table[table.table == f'same run time ~{epochs} epochs'].set_index('attention')
        none, simple = (rows.loc[arm, ['mean_pct', 'stdev_pct', 'n_runs']].tolist() for arm in ('none', 'simple'))
        c = stats.compare_summaries(*none, *simple)
        assert round(c['difference'] / 100, 3) == difference
        assert (round(c['student_p'], 4), round(c['p'], 4)) == (student, welch)
        assert c['low'] > 0


def test_hedges_g_is_unbiased():
    """The mean of g over arms of 4 and 3 normal runs is the true difference over the sd; without the factor it is a
    fifth more."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (10_000, 4)), rng.normal(1, 1, (10_000, 3))
    arms = zip(a.mean(1), a.std(1, ddof=1), b.mean(1), b.std(1, ddof=1))
    assert np.mean([stats.compare_summaries(m, s, 4, n, t, 3)['g'] for m, s, n, t in arms]) == pytest.approx(
        1, abs=0.04)


def test_permutation_p():
    a, b = PAIRS['v0.1']
    a9, b9 = a[:9], b[:9] - 0.04  # an effect of about its noise, and ties
    exact = st.permutation_test((a9, b9), farthest, vectorized=True, alternative='greater', n_resamples=np.inf).pvalue
    assert stats.compare(a9, b9)['permutation_p'] == pytest.approx(exact) and exact > 0.01
    a, b = PAIRS['resize']
    b = b - 0.02
    p = st.permutation_test((a, b), farthest, vectorized=True, alternative='greater', n_resamples=40_000, batch=4_000,
                            rng=1).pvalue
    assert stats.compare(a, b)['permutation_p'] == pytest.approx(p, abs=0.02) and 0.1 < p < 0.9
    assert stats.compare(a, b + 1)['permutation_p'] == 1e-4  # never 0: what was seen is one of the 10,000


def test_ties_count_half_whatever_the_rounding():
    c = stats.compare([0.1 + 0.2, 0.5], [0.3, 0.3])
    assert c['beats'] == 0.25 and c['permutation_p'] == 1  # half of four pairs tie at 0.3, which is not 0.1 + 0.2


@pytest.mark.parametrize('n', [10, 17, 20])
def test_compare_paired(n):
    a, b = PAIRS['resize' if n > 10 else 'v0.1']
    a, b = a[:n], b[:n] - 0.02
    c, ref = stats.compare_paired(a, b), st.ttest_rel(b, a)
    assert (c['n'], c['difference'], c['p']) == pytest.approx((n, (b - a).mean(), ref.pvalue))
    assert (c['low'], c['high']) == pytest.approx(ref.confidence_interval())
    assert c['beats'] == pytest.approx(((b - a > 1e-12).sum() + (abs(b - a) < 1e-12).sum() / 2) / n)
    signs = st.permutation_test((b - a,), lambda x, axis: abs(x.mean(axis=axis)), permutation_type='samples',
                                vectorized=True, alternative='greater',
                                n_resamples=np.inf if n < 20 else 50_000, batch=10_000, rng=1).pvalue
    assert c['permutation_p'] == pytest.approx(signs, rel=1e-9 if n < 20 else None, abs=0.02 if n == 20 else None)
    order = np.random.default_rng(0).permutation(n)
    assert stats.compare_paired(a[order], b[order]) == c


@pytest.mark.parametrize('a, b, known', [
    ([], [], {}), ([0.6], [], {}), ([0.6], [0.7], dict(difference=0.1, permutation_p=1, beats=1)),
    ([0.6], [0.6, 0.7], dict(difference=0.05, permutation_p=1, beats=0.75)),
    ([0.1] * 3, [0.3] * 3, dict(difference=0.2, permutation_p=0.1, beats=1)), ([0.1] * 3, [NAN] * 3, {}),
])
@pytest.mark.filterwarnings('error')
def test_arms_too_few_have_no_interval(a, b, known):
    assert {k: v for k, v in stats.compare(a, b).items() if not isnan(v)} == pytest.approx(known)


@pytest.mark.filterwarnings('error')
def test_arms_without_spread_are_told_apart_by_the_permutation_test():
    "Four runs against four that are wholly apart: 2 of the 70 splits are as far."
    c = stats.compare([0.1] * 4, [0.3] * 4)
    p = st.permutation_test(([0.1] * 4, [0.3] * 4), farthest, vectorized=True, alternative='greater',
                            n_resamples=np.inf).pvalue
    assert (c['low'], c['high'], c['p']) == pytest.approx((0.2, 0.2, 2 / 70)) and p == pytest.approx(2 / 70)
    equal = stats.compare([0.1] * 4, [0.1] * 4)
    assert (equal['low'], equal['high'], equal['p']) == (0, 0, 1)
    assert isnan(stats.compare([0.1] * 3, [0.3] * 3)['p'])  # 2 of 20 splits: no outcome could be below 5 %
    assert stats.compare_paired([0.50] * 3 + [0.60] * 3, [0.52] * 3 + [0.62] * 3)['p'] == pytest.approx(2 / 64)
    assert isnan(stats.compare_paired([0.50] * 3 + [0.60] * 2, [0.52] * 3 + [0.62] * 2)['p'])  # 2 of 32


@pytest.mark.filterwarnings('error')
def test_what_was_not_published_is_nan():
    for sd, n in ((NAN, 12), (0.02, NAN), (0.02, 1), (0.02, 0)):
        c = stats.compare_summaries(0.623, 0.02, 12, 0.652, sd, n)
        assert c.pop('difference') == pytest.approx(0.029) and all(isnan(c[k]) for k in ('low', 'high', 'p'))
    one = stats.compare_paired([0.6], [0.7])
    assert isnan(one['low']) and isnan(one['p']) and isnan(stats.compare_paired([], [])['difference'])
    assert isnan(stats.compare_paired([0.60, 0.62], [0.62, 0.64])['low'])  # equal differences, but for rounding


# --- arms that share some seeds ---

def arms_of(n_shared, only_a, only_b, correlation, rng, sds=(1, 1), shift=0.):
    "Returns two arms {seed: value} of normal data that share seeds."
    seed_effects = rng.normal(size=n_shared + only_a + only_b)
    def values(seeds, sd, mean):
        rest = rng.normal(size=len(seeds))
        found = mean + sd * (correlation**0.5 * seed_effects[seeds] + (1 - correlation)**0.5 * rest)
        return dict(zip(map(int, seeds), found))
    everything = np.arange(len(seed_effects))
    return (values(everything[:n_shared + only_a], sds[0], 0.),
            values(np.delete(everything, slice(n_shared, n_shared + only_a)), sds[1], shift))


def long_frame(a, b):
    "Returns columns seed, arm and y."
    return pd.DataFrame([(seed, k, y) for k, arm in enumerate((a, b)) for seed, y in arm.items()],
                        columns=['seed', 'arm', 'y'])


def parts(a, b):
    "Returns what compare_blocks takes."
    shared = sorted(a.keys() & b.keys())
    return ([a[s] for s in shared], [b[s] for s in shared], [a[s] for s in a if s not in b],
            [b[s] for s in b if s not in a])


@pytest.mark.parametrize('design', [(6, 8, 0), (10, 4, 4), (6, 2, 5)])
def test_blocks_are_the_mixed_model_of_statsmodels(design):
    """The estimate is that of MixedLM; the standard error is a little above that of its variance components taken as
    known."""
    met = 0
    for number in range(4):
        a, b = arms_of(*design, 0.8, np.random.default_rng(number), shift=0.7)
        found = stats.compare_blocks(*parts(a, b))
        frame = long_frame(a, b)
        fit = smf.mixedlm('y ~ arm', frame, groups='seed').fit(reml=True)
        if not fit.converged or fit.cov_re.iloc[0, 0] < 1e-2: continue  # statsmodels has no negative correlation
        met += 1
        assert found['difference'] == pytest.approx(fit.params['arm'], abs=2e-3)
        of_seed = fit.cov_re.iloc[0, 0] * np.equal.outer(frame.seed.to_numpy(), frame.seed.to_numpy())
        x = np.column_stack([np.ones(len(frame)), frame.arm])
        known = np.linalg.inv(x.T @ np.linalg.solve(of_seed + fit.scale * np.eye(len(frame)), x))[1, 1]**0.5
        error = (found['high'] - found['low']) / 2 / st.t.ppf(0.975, dense_kenward_roger(a, b)[2])
        assert 0.999 < error / known < 1.2
    assert met >= 2


def dense_kenward_roger(a, b):
    """Returns (difference, adjusted standard error, df) of Kenward and Roger's formulas with whole matrices, seeds as
    blocks."""
    frame = long_frame(a, b)
    y, x = frame.y.to_numpy(), np.column_stack([frame.arm == 0, frame.arm == 1]).astype(float)
    kernels = [np.eye(len(y)), np.equal.outer(frame.seed.to_numpy(), frame.seed.to_numpy()).astype(float)]

    def misfit(share):
        v = kernels[0] + share * kernels[1]
        inverse = np.linalg.inv(v)
        phi = np.linalg.inv(x.T @ inverse @ x)
        p = inverse - inverse @ x @ phi @ x.T @ inverse
        return ((len(y) - 2) * np.log(y @ p @ y) + np.linalg.slogdet(v)[1] - np.linalg.slogdet(phi)[1]), p, phi, inverse
    grid = np.concatenate([np.linspace(-0.499, 1, 200), np.geomspace(1.01, 1e4, 200)])
    for _ in range(3):  # finer and finer
        best = min(range(len(grid)), key=lambda i: misfit(grid[i])[0])
        share, grid = grid[best], np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 50)
    _, p, phi, inverse = misfit(share)
    scale = y @ p @ y / (len(y) - 2)
    p, phi, inverse = p / scale, phi * scale, inverse / scale
    slopes = [-x.T @ inverse @ k @ inverse @ x for k in kernels]
    seconds = [[x.T @ inverse @ k @ inverse @ other @ inverse @ x for other in kernels] for k in kernels]
    w = np.linalg.inv([[np.trace(p @ k @ p @ other) / 2 for other in kernels] for k in kernels])
    surplus = sum(w[i, j] * (seconds[i][j] - slopes[i] @ phi @ slopes[j]) for i in (0, 1) for j in (0, 1))
    contrast = np.array([-1, 1])
    gradient = np.array([contrast @ phi @ slope @ phi @ contrast for slope in slopes])
    variance = contrast @ phi @ contrast
    adjusted = contrast @ (phi + 2 * phi @ surplus @ phi) @ contrast
    return contrast @ phi @ x.T @ inverse @ y, adjusted**0.5, 2 * variance**2 / (gradient @ w @ gradient)


@pytest.mark.parametrize('design, correlation', [((6, 8, 0), 0.5), ((6, 2, 5), 0), ((3, 3, 1), 0.8)])
def test_blocks_have_the_interval_of_kenward_and_roger(design, correlation):
    a, b = arms_of(*design, correlation, np.random.default_rng(5))
    found, (difference, error, df) = stats.compare_blocks(*parts(a, b)), dense_kenward_roger(a, b)
    half = st.t.ppf(0.975, df) * error
    assert ((found['difference'], found['low'], found['high'])
            == pytest.approx((difference, difference - half, difference + half), abs=3e-3))
    assert found['p'] == pytest.approx(2 * st.t.sf(abs(difference) / error, df), abs=1e-3)


@pytest.mark.parametrize('n, correlation', [(4, 0.8), (10, 0.), (12, 0.5)])
def test_blocks_of_pairs_alone_are_the_paired_t_test(n, correlation):
    "So is the model with seeds and arms as fixed effects, by least squares."
    a, b = arms_of(n, 0, 0, correlation, np.random.default_rng(3), shift=1)
    ref = st.ttest_rel(list(b.values()), list(a.values()))
    found = stats.compare_blocks(*parts(a, b))
    assert ((found['difference'], found['p'])
            == pytest.approx((np.mean(list(b.values())) - np.mean(list(a.values())), ref.pvalue)))
    assert (found['low'], found['high']) == pytest.approx(ref.confidence_interval())
    ols = smf.ols('y ~ arm + C(seed)', long_frame(a, b)).fit()
    assert (ols.params['arm'], ols.pvalues['arm']) == pytest.approx((found['difference'], found['p']))
    row = stats.compare_by_seed(a, b)
    assert row['method'] == stats.PAIRED and (row['low'], row['p']) == pytest.approx((found['low'], found['p']))


def test_seeds_that_are_shared_choose_the_method():
    rng = np.random.default_rng(2)
    a, b = arms_of(6, 8, 0, 0.5, rng)
    row = stats.compare_by_seed(a, b)
    assert (row['method'], row['n_pairs']) == (stats.MODEL, 6)
    assert row.items() >= stats.compare_blocks(*parts(a, b)).items()
    pairs = [list(side) for side in zip(*((a[s], b[s]) for s in b))]
    paired = stats.compare_paired(*pairs)
    assert ((row['permutation_p'], row['better_seeds'], row['pair_sd'])
            == (paired['permutation_p'], paired['beats'], paired['sd']))
    few, apart = {s: b[s] for s in range(4)} | {98: 0.2, 99: 0.3}, {s + 100: y for s, y in b.items()}
    for other in (few, apart):
        row = stats.compare_by_seed(a, other)
        ref = st.ttest_ind(list(other.values()), list(a.values()), equal_var=False)
        assert (row['method'], row['n_pairs']) == (stats.UNPAIRED, 0) and row['p'] == pytest.approx(ref.pvalue)
    shuffled = dict(sorted(a.items(), key=lambda item: item[1]))
    assert stats.compare_by_seed(shuffled, b) == stats.compare_by_seed(a, b)


def test_equal_differences_at_shared_seeds_throw_no_run_away():
    "The model could not tell how much of the spread is that of the seeds: all runs count, as if no seed were shared."
    a = dict(enumerate([0.5, 0.6, 0.7, 0.65, 0.55, 0.62]))
    b = {seed: a[seed] + 0.1 for seed in range(5)}
    row, ref = stats.compare_by_seed(a, b), st.ttest_ind(list(b.values()), list(a.values()), equal_var=False)
    assert (row['method'], row['n_pairs'], row['p']) == (stats.UNPAIRED, 0, pytest.approx(ref.pvalue))


@pytest.mark.parametrize('design, correlation, least', [
    ((6, 8, 0), 0., 0.93), ((6, 8, 0), 0.7, 0.93), ((10, 4, 4), 0.5, 0.935), ((5, 9, 0), 0.5, 0.92)])
def test_blocks_cover_the_difference(design, correlation, least):
    "Where the seeds matter, in less width than Welch's interval."
    rng, holds, width, welch = np.random.default_rng(0), [], [], []
    for _ in range(600):
        a, b = arms_of(*design, correlation, rng)
        found = stats.compare_blocks(*parts(a, b))
        interval = st.ttest_ind(list(b.values()), list(a.values()), equal_var=False).confidence_interval()
        holds.append(found['low'] <= 0 <= found['high'])
        width.append(found['high'] - found['low'])
        welch.append(interval.high - interval.low)
    assert np.mean(holds) >= least
    if correlation == 0.7: assert np.mean(width) < 0.8 * np.mean(welch)


def test_holm():
    ps = [0.01, NAN, 0.04, 0.03, 0.005, 0.6]
    ref = multipletests([p for p in ps if not isnan(p)], method='holm')[1]
    assert stats.holm(ps).tolist() == pytest.approx([ref[0], NAN, *ref[1:]], nan_ok=True)
    assert stats.holm([]).size == 0 and np.isnan(stats.holm([NAN])).all()
    of_eight = multipletests([0.01, 0.04, 0.03, 0.005, 0.6, 1, 1, 1], method='holm')[1]  # three that have no P yet
    assert stats.holm([0.01, NAN, 0.04, 0.03, 0.005, 0.6], 8).tolist() == pytest.approx(
        [of_eight[0], NAN, *of_eight[1:5]], nan_ok=True)


# --- words ---

@pytest.mark.parametrize('low, high, words', [
    (1, 3, 'reproduced'), (2, 3, 'reproduced'), (1, 2, 'reproduced'), (0.5, 1.5, 'same direction but smaller'),
    (2.5, 3, 'larger than published'), (-2, -1, 'opposite direction'), (-0.9, 1, 'not seen'), (0, 1, 'not seen'),
    (-1, 0, 'not seen'), (-1, 1, 'too few runs to say'),
    (-9, 0.1, 'too few runs to say'), (-1, 2, 'too few runs to say'),
    (0, 3, 'too few runs to say'),
    (NAN, NAN, 'too few runs to say'),
])
def test_verdict_beside_a_claim_of_2(low, high, words):
    assert stats.verdict(low, high, 0.01, 2) == words and stats.verdict(-high, -low, 0.01, -2) == words


@pytest.mark.parametrize('low, high, words', [
    (0.001, 0.041, 'difference'), (-0.02, -0.01, 'difference'), (-0.006, 0.004, 'no difference seen'),
    (-0.01, 0.01, 'no difference seen'), (-0.0099, 0.005, 'no difference seen'), (-0.0101, 0, 'too few runs to say'),
    (-0.002, 0.012, 'too few runs to say'), (0, 0.03, 'too few runs to say'), (NAN, NAN, 'too few runs to say'),
])
def test_verdict_without_a_claim(low, high, words):
    assert stats.verdict(low, high, 0.01) == words and stats.verdict(low, high, 0.01, 0.) == words


@pytest.mark.parametrize('low, high, claim',
                         [(1, 3, 2), (0.5, 1, 2), (-2, -1, 2), (0.01, 0.02, NAN), (-0.004, -0.002, NAN)])
def test_no_verdict_is_said_that_holm_does_not_allow(low, high, claim):
    "An interval that excludes 0 by itself: neither that there is a difference, nor that there is none."
    assert stats.verdict(low, high, 0.049, claim) != stats.TOO_FEW
    for p in (0.05, 0.3, NAN): assert stats.verdict(low, high, p, claim) == stats.TOO_FEW
    assert stats.fails_holm(low, high, 0.05) and not stats.fails_holm(low, high, 0.049)


def test_an_interval_that_holds_0_needs_no_p_below_5_percent():
    assert stats.verdict(-0.5, 1, 0.9, 2) == 'not seen' and stats.verdict(-0.005, 0.005, 0.9) == 'no difference seen'
    assert not stats.fails_holm(-0.5, 1, 0.9)


def test_readme_has_every_verdict_and_no_other():
    text = (REPO / 'results' / 'README.md').read_text().split('| our interval |')[1].split('\n\n')[0]
    said = {line.split('|')[3].strip() for line in text.splitlines() if line.startswith('|')} - {'the verdict', '---'}
    ends = [NAN, -3, -2, -1, -0.005, 0, 0.005, 1, 2, 3]
    built = {stats.verdict(low, high, 0.01, claim) for low in ends for high in ends for claim in (NAN, -2, 0, 2)
             if not low > high}
    assert said == built


# --- how many runs ---

@pytest.mark.parametrize('difference, sd, power, alpha', [
    (0.029, 0.022, 0.8, 0.05), (-0.029, 0.022, 0.8, 0.05), (0.007, 0.0086, 0.8, 0.05), (0.007, 0.0086, 0.9, 0.01),
    (0.0003, 0.0054, 0.8, 0.05), (0.05, 0.01, 0.8, 0.05),
])
def test_runs_needed(difference, sd, power, alpha):
    n = TTestIndPower().solve_power(abs(difference) / sd, power=power, alpha=alpha)
    assert stats.runs_needed(difference, sd, power=power, alpha=alpha) == ceil(n)
    pairs = TTestPower().solve_power(abs(difference) / sd, power=power, alpha=alpha)
    assert stats.runs_needed(difference, sd, paired=True, power=power, alpha=alpha) == max(ceil(pairs), 2)


@pytest.mark.parametrize('paired', [False, True])
def test_runs_needed_falls_as_the_difference_grows(paired):
    """The far tail of the noncentral t, which is not a number where it is next to nothing, once made it 82 runs at 4.5
    sd."""
    needed = [stats.runs_needed(effect, 1, paired) for effect in (0.3, 0.5, 1, 2, 3, 4, 4.5, 5, 7, 10, 30, 1e3, 1e9)]
    assert needed == sorted(needed, reverse=True) and needed[-1] == 2


@pytest.mark.filterwarnings('error')
def test_runs_needed_of_nothing_is_nan():
    assert all(isnan(stats.runs_needed(*args))
               for args in ((0, 0.02), (NAN, 0.02), (0.02, NAN), (0.02, 0), (0, 0), (2e-17, 0.02)))
    assert stats.runs_needed(1, 0.01) == 2


def stopped(half_width, sds=(1, 1), n_min=10, experiments=4_000, most=150):
    """(share of experiments in which difference ± half_width holds the truth, 0; the same of the Welch interval): looks
    after every pair."""
    a, b = (np.random.default_rng(seed).normal(0, sd, (experiments, most)) for seed, sd in enumerate(sds))
    wide, welch, going = 0, 0, np.arange(experiments)
    for n in range(n_min, most + 1):
        done = stats.fixed_width_done(a[going, :n], b[going, :n], half_width, n_min)
        x, y = a[going[done], :n], b[going[done], :n]
        wide += (abs(y.mean(1) - x.mean(1)) <= half_width).sum()
        welch += (st.ttest_ind(y, x, axis=1, equal_var=False).pvalue > 0.05).sum() if done.any() else 0
        going = going[~done]
        if not going.size: return wide / experiments, welch / experiments
    raise AssertionError(f'{going.size} experiments of {experiments} still go on')


@pytest.mark.parametrize('n, sds',
                         [(8, (1, 1)), (13, (1, 1)), (20, (1, 1)), (40, (1, 1)), (20, (0.5, 1.5)), (40, (1.4, 0.2))])
def test_stopping_at_a_width_keeps_the_coverage(n, sds):
    "`n`: the runs per arm that would do were the sds known."
    wide, welch = stopped(1.96 * (sum(sd**2 for sd in sds) / n)**0.5, sds)
    assert wide >= 0.947 and welch >= 0.93


@pytest.mark.parametrize('n, correlation', [(8, 0.5), (13, 0.5), (20, 0.8), (40, 0.)])
def test_stopping_at_a_width_of_pairs_keeps_the_coverage(n, correlation):
    half_width, rng, most = 1.96 * (2 * (1 - correlation) / n)**0.5, np.random.default_rng(0), 150
    effects = rng.normal(size=(4_000, most))
    a, b = (correlation**0.5 * effects + (1 - correlation)**0.5 * rng.normal(size=effects.shape) for _ in range(2))
    holds, paired, going = 0, 0, np.arange(len(a))
    for n_pairs in range(10, most + 1):
        done = stats.fixed_width_done(a[going, :n_pairs], b[going, :n_pairs], half_width, paired=True)
        d = (b - a)[going[done], :n_pairs]
        holds += (abs(d.mean(1)) <= half_width).sum()
        paired += (st.ttest_1samp(d, 0, axis=1).pvalue > 0.05).sum() if done.any() else 0
        going = going[~done]
        if not going.size: break
    assert not going.size and holds / len(a) >= 0.947 and paired / len(a) >= 0.93


def test_stopping_without_a_least_n_covers_less():
    half_width = 1.96 * (2 / 8)**0.5
    assert stopped(half_width, n_min=2)[1] < stopped(half_width)[1] - 0.01


def test_fixed_width_done_needs_the_least_n_the_width_and_spread():
    a = np.tile([0.60, 0.62], 10)
    interval = CompareMeans(DescrStatsW(a), DescrStatsW(a)).tconfint_diff(usevar='unequal')
    half = np.diff(interval)[0] / 2 * (1 + 2 / 20)**0.5
    assert stats.fixed_width_done(a, a, half + 1e-9) and not stats.fixed_width_done(a, a, half - 1e-9)
    assert not stats.fixed_width_done(a, a[:9], 1) and stats.fixed_width_done(a, a[:9], 1, n_min=9)
    b = a + np.resize([0.01, 0.02, 0.03], 20)
    half = np.diff(st.ttest_rel(b, a).confidence_interval())[0] / 2 * (1 + 2 / 20)**0.5
    assert stats.fixed_width_done(a, b, half + 1e-9, paired=True)
    assert not stats.fixed_width_done(a, b, half - 1e-9, paired=True)
    assert not stats.fixed_width_done([], [], 1, n_min=0)


def test_runs_may_stop_where_there_is_no_spread_as_their_interval_is_the_difference():
    a = np.tile([0.60, 0.62], 5)
    assert stats.compare_paired(a, a + 0.01)['low'] == stats.compare_paired(a, a + 0.01)['high']
    assert stats.fixed_width_done(a, a + 0.01, 1e-9, paired=True) and not stats.fixed_width_done(a, a + 0.01, 1e-9)
    assert stats.fixed_width_done(a * 0, a * 0 + 1, 1e-9) and not stats.fixed_width_done(a[:9], a[:9], 1, paired=True)


# --- with validation predictions ---

def predictions(rng, n_runs, n, run_sd=0., image_sd=0., shift=0., of_seeds=0.):
    """A function (images' own) -> right or not (n_runs, n): normal scores of image (sd 2), arm and image, seed, run and
    the single prediction."""
    own = rng.normal(0, image_sd, n) + shift + of_seeds
    return lambda image: (image + own + run_sd * rng.normal(size=(n_runs, 1)) + rng.normal(size=(n_runs, n)) > 0) * 1


def chance(spread, shift=0.): return st.norm.cdf((1 + shift) / (1 + 4 + spread**2)**0.5)


def test_validation_noise_by_hand():
    # accuracies 3/4 and 1/4; two images right in one run of two: 2/1 * 1/4 each
    v = stats.validation_noise([[1, 1, 0, 1], [1, 0, 0, 0]])
    assert (v['variance'], v['from_images'], v['share']) == pytest.approx((0.125, 1 / 16, 0.5))
    assert v['beyond'] == pytest.approx(4 / 3 * (0.125 - 1 / 16))
    assert all(isnan(x) for x in stats.validation_noise([[1, 0, 1]]).values())
    assert isnan(stats.validation_noise([[1, 0], [1, 0]])['share'])


@pytest.mark.parametrize('run_sd', [0, 0.3])
def test_validation_noise_finds_the_variance_of_the_true_accuracy(run_sd):
    """Over many sets of 100 images and 8 runs the mean of `beyond` is the variance of the runs' accuracies on all
    images there could be."""
    rng = np.random.default_rng(0)
    found = [stats.validation_noise(predictions(rng, 8, 100, run_sd)(rng.normal(1, 2, 100))) for _ in range(4_000)]
    # an image's score and a prediction's: variance 4 + 1
    truth = st.norm.cdf((1 + run_sd * rng.normal(size=1_000_000)) / 5**0.5).var()
    beyond = np.array([v['beyond'] for v in found])
    assert beyond.mean() == pytest.approx(truth, abs=4 * beyond.std() / len(beyond)**0.5)
    assert (np.mean([v['from_images'] for v in found]) > 20 * beyond.mean()) == (run_sd == 0)


@pytest.mark.parametrize('n_runs', [4, 10, 24])
def test_share_range_holds_the_share_of_normal_runs(n_runs):
    "Runs of variance 1, of which a quarter is of the images: the share seen is 0.25 over the variance seen."
    seen = np.random.default_rng(0).normal(size=(600, n_runs)).var(1, ddof=1)
    ranges = np.array([stats.share_range(0.25 / variance, n_runs) for variance in seen])
    assert np.mean((ranges[:, 0] <= 0.25) & (0.25 <= ranges[:, 1])) == pytest.approx(0.95, abs=0.025)
    assert ranges.max() <= 1 and (n_runs > 4) == (np.mean(0.25 / seen > 1) < 0.03)  # of 4 runs it often passes 1


@pytest.mark.parametrize('n_runs, run_sd, image_sd', [(3, 0, 0), (12, 0.3, 0), (12, 0, 1)])
def test_over_images_covers_the_difference_on_all_images(n_runs, run_sd, image_sd):
    rng = np.random.default_rng(0)
    truth = chance((run_sd**2 + image_sd**2)**0.5, 0.3) - chance(run_sd)
    holds, width, seen = [], [], []
    for _ in range(400):
        image = rng.normal(1, 2, 200)
        a, b = predictions(rng, n_runs, 200, run_sd)(image), predictions(rng, n_runs, 200, run_sd, image_sd, 0.3)(image)
        r = stats.over_images(a, b)
        holds.append(r['low'] <= truth <= r['high'])
        width.append(r['high'] - r['low'])
        seen.append(r['difference'])
    assert np.mean(holds) >= 0.925 and np.mean(width) < 1.15 * 2 * st.t.ppf(0.975, 2 * n_runs - 2) * np.std(seen)


def test_over_images_of_pairs_covers_the_difference_and_is_narrower_where_seeds_matter():
    rng = np.random.default_rng(0)
    truth = chance((0.2**2 + 0.5**2)**0.5, 0.3) - chance((0.2**2 + 0.5**2)**0.5)
    holds, narrower = [], []
    for _ in range(400):
        image, of_seeds = rng.normal(1, 2, 200), rng.normal(0, 0.5, (12, 1))
        a, b = (predictions(rng, 12, 200, 0.2, 0, shift, of_seeds)(image) for shift in (0, 0.3))
        paired, apart = (stats.over_images(a, b, is_paired) for is_paired in (True, False))
        holds.append(paired['low'] <= truth <= paired['high'])
        narrower.append((paired['high'] - paired['low']) / (apart['high'] - apart['low']))
    assert 0.925 <= np.mean(holds) <= 0.985 and np.mean(narrower) < 0.8


def test_over_images_of_equal_or_too_few_arms():
    a = np.random.default_rng(0).integers(2, size=(5, 300))
    r = stats.over_images(a, a[::-1])
    assert r['difference'] == pytest.approx(0) and r['low'] < 0 < r['high'] and r == stats.over_images(a, a[::-1])
    assert isnan(stats.over_images(a[:1], a)['low']) and isnan(stats.over_images(a * 0, a * 0)['low'])
