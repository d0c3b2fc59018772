from math import ceil, isnan

import numpy as np
import pandas as pd
import pytest
import scipy.stats as st
from conftest import REPO
from statsmodels.stats.meta_analysis import effectsize_smd
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower
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
    bca = st.bootstrap((values,), np.mean, n_resamples=20_000, rng=1, method='BCa').confidence_interval  # other draws, unsorted
    assert (s['bca_low'], s['bca_high']) == pytest.approx(bca, abs=0.05 * (bca.high - bca.low))
    assert stats.summary(values[::-1]) == s


@pytest.mark.parametrize('values, known', [
    ([], {}), ([0.6], dict(mean=0.6, median=0.6, min=0.6, max=0.6)), ([0.1] * 3, dict(mean=0.1, sd=0, median=0.1, min=0.1, max=0.1)),
    ([0.6, 0.7], dict(mean=0.65, sd=0.005**0.5, low=0.65 - 12.7062 * 0.05, high=0.65 + 12.7062 * 0.05, median=0.65, min=0.6, max=0.7)),
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
        assert round(c['difference'] / 100, 3) == difference and (round(c['student_p'], 4), round(c['p'], 4)) == (student, welch)
        assert c['low'] > 0


def test_hedges_g_is_unbiased():
    "The mean of g over arms of 4 and 3 normal runs is the true difference over the sd; without the factor it is a fifth more."
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (10_000, 4)), rng.normal(1, 1, (10_000, 3))
    arms = zip(a.mean(1), a.std(1, ddof=1), b.mean(1), b.std(1, ddof=1))
    assert np.mean([stats.compare_summaries(m, s, 4, n, t, 3)['g'] for m, s, n, t in arms]) == pytest.approx(1, abs=0.04)


def test_permutation_p():
    a, b = PAIRS['v0.1']
    a9, b9 = a[:9], b[:9] - 0.04  # an effect of about its noise, and ties
    exact = st.permutation_test((a9, b9), farthest, vectorized=True, alternative='greater', n_resamples=np.inf).pvalue
    assert stats.compare(a9, b9)['permutation_p'] == pytest.approx(exact) and exact > 0.01
    a, b = PAIRS['resize']
    b = b - 0.02
    p = st.permutation_test((a, b), farthest, vectorized=True, alternative='greater', n_resamples=40_000, batch=4_000, rng=1).pvalue
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
    signs = st.permutation_test((b - a,), lambda x, axis: abs(x.mean(axis=axis)), permutation_type='samples', vectorized=True,
                                alternative='greater', n_resamples=np.inf if n < 20 else 50_000, batch=10_000, rng=1).pvalue
    assert c['permutation_p'] == pytest.approx(signs, rel=1e-9 if n < 20 else None, abs=0.02 if n == 20 else None)
    order = np.random.default_rng(0).permutation(n)
    assert stats.compare_paired(a[order], b[order]) == c


@pytest.mark.parametrize('a, b, known', [
    ([], [], {}), ([0.6], [], {}), ([0.6], [0.7], dict(difference=0.1, permutation_p=1, beats=1)),
    ([0.6], [0.6, 0.7], dict(difference=0.05, permutation_p=1, beats=0.75)),
    ([0.1] * 3, [0.3] * 3, dict(difference=0.2, permutation_p=0.1, beats=1)), ([0.1] * 3, [NAN] * 3, {}),
])
@pytest.mark.filterwarnings('error')
def test_arms_too_few_or_without_spread_have_no_interval(a, b, known):
    assert {k: v for k, v in stats.compare(a, b).items() if not isnan(v)} == pytest.approx(known)


@pytest.mark.filterwarnings('error')
def test_what_was_not_published_is_nan():
    for sd, n in ((NAN, 12), (0.02, NAN), (0.02, 1), (0.02, 0)):
        c = stats.compare_summaries(0.623, 0.02, 12, 0.652, sd, n)
        assert c.pop('difference') == pytest.approx(0.029) and all(isnan(c[k]) for k in ('low', 'high', 'p'))
    one = stats.compare_paired([0.6], [0.7])
    assert isnan(one['low']) and isnan(one['p']) and isnan(stats.compare_paired([], [])['difference'])
    assert isnan(stats.compare_paired([0.60, 0.62], [0.62, 0.64])['low'])  # equal differences, but for rounding


def test_holm():
    ps = [0.01, NAN, 0.04, 0.03, 0.005, 0.6]
    ref = multipletests([p for p in ps if not isnan(p)], method='holm')[1]
    assert stats.holm(ps).tolist() == pytest.approx([ref[0], NAN, *ref[1:]], nan_ok=True)
    assert stats.holm([]).size == 0 and np.isnan(stats.holm([NAN])).all()


# --- words ---

@pytest.mark.parametrize('low, high, words', [
    (1, 3, 'reproduced'), (2, 3, 'reproduced'), (1, 2, 'reproduced'), (0.5, 1.5, 'same direction but smaller'),
    (2.5, 3, 'larger than published'), (-2, -1, 'opposite direction'), (-0.9, 1, 'not seen'), (0, 1, 'not seen'), (-1, 0, 'not seen'),
    (-1, 1, 'too few runs to say'), (-9, 0.1, 'too few runs to say'), (-1, 2, 'too few runs to say'), (0, 3, 'too few runs to say'),
    (NAN, NAN, 'too few runs to say'),
])
def test_verdict_beside_a_claim_of_2(low, high, words):
    assert stats.verdict(low, high, 2) == words and stats.verdict(-high, -low, -2) == words


@pytest.mark.parametrize('low, high, words', [
    (0.001, 0.041, 'difference'), (-0.02, -0.01, 'difference'), (-0.006, 0.004, 'no difference seen'),
    (-0.002, 0.012, 'too few runs to say'), (0, 0.03, 'too few runs to say'), (NAN, NAN, 'too few runs to say'),
])
def test_verdict_without_a_claim(low, high, words):
    assert stats.verdict(low, high) == words and stats.verdict(low, high, 0.) == words


def test_readme_has_every_verdict_and_no_other():
    text = (REPO / 'results' / 'README.md').read_text().split('## How a verdict is reached')[1].split('\n## ')[0]
    said = {line.split('|')[3].strip() for line in text.splitlines() if line.startswith('|')} - {'the verdict', '---'}
    ends = [NAN, -3, -2, -1, -0.005, 0, 0.005, 1, 2, 3]
    built = {stats.verdict(low, high, claim) for low in ends for high in ends for claim in (NAN, -2, 0, 2)
             if not low > high}
    assert said == built


# --- how many runs ---

@pytest.mark.parametrize('difference, sd, power, alpha', [
    (0.029, 0.022, 0.8, 0.05), (-0.029, 0.022, 0.8, 0.05), (0.007, 0.0086, 0.8, 0.05), (0.007, 0.0086, 0.9, 0.01),
    (0.0003, 0.0054, 0.8, 0.05), (0.05, 0.01, 0.8, 0.05),
])
def test_runs_needed(difference, sd, power, alpha):
    n = TTestIndPower().solve_power(abs(difference) / sd, power=power, alpha=alpha)
    assert stats.runs_needed(difference, sd, power, alpha) == ceil(n)


@pytest.mark.filterwarnings('error')
def test_runs_needed_of_nothing_is_nan():
    assert all(isnan(stats.runs_needed(*args)) for args in ((0, 0.02), (NAN, 0.02), (0.02, NAN), (0.02, 0)))
    assert stats.runs_needed(1, 0.01) == 2


def stopped(half_width, sds=(1, 1), n_min=10, experiments=4_000, most=150):
    "(share of experiments in which difference ± half_width holds the truth, 0; the same of the Welch interval): looks after every pair."
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


@pytest.mark.parametrize('n, sds', [(8, (1, 1)), (13, (1, 1)), (20, (1, 1)), (40, (1, 1)), (20, (0.5, 1.5)), (40, (1.4, 0.2))])
def test_stopping_at_a_width_keeps_the_coverage(n, sds):
    "`n`: the runs per arm that would do were the sds known."
    wide, welch = stopped(1.96 * (sum(sd**2 for sd in sds) / n)**0.5, sds)
    assert wide >= 0.947 and welch >= 0.93


def test_stopping_without_a_least_n_covers_less():
    half_width = 1.96 * (2 / 8)**0.5
    assert stopped(half_width, n_min=2)[1] < stopped(half_width)[1] - 0.01


def test_fixed_width_done_needs_the_least_n_the_width_and_spread():
    a = np.tile([0.60, 0.62], 10)
    half = np.diff(CompareMeans(DescrStatsW(a), DescrStatsW(a)).tconfint_diff(usevar='unequal'))[0] / 2 * (1 + 2 / 20)**0.5
    assert stats.fixed_width_done(a, a, half + 1e-9) and not stats.fixed_width_done(a, a, half - 1e-9)
    assert not stats.fixed_width_done(a, a[:9], 1) and stats.fixed_width_done(a, a[:9], 1, n_min=9)
    assert not stats.fixed_width_done(a * 0, a * 0, 1) and not stats.fixed_width_done([], [], 1, n_min=0)


# --- with validation predictions ---

def predictions(rng, n_runs, n, run_sd=0., image_sd=0., shift=0.):
    "A function (images' own) -> right or not (n_runs, n): normal scores of image (sd 2), arm and image, run, and the single prediction."
    own = rng.normal(0, image_sd, n) + shift
    return lambda image: (image + own + run_sd * rng.normal(size=(n_runs, 1)) + rng.normal(size=(n_runs, n)) > 0) * 1


def chance(spread, shift=0.): return st.norm.cdf((1 + shift) / (1 + 4 + spread**2)**0.5)


def test_validation_noise_by_hand():
    v = stats.validation_noise([[1, 1, 0, 1], [1, 0, 0, 0]])  # accuracies 3/4 and 1/4; two images right in one run of two: 2/1 * 1/4 each
    assert (v['variance'], v['from_images'], v['share']) == pytest.approx((0.125, 1 / 16, 0.5))
    assert v['beyond'] == pytest.approx(4 / 3 * (0.125 - 1 / 16))
    assert all(isnan(x) for x in stats.validation_noise([[1, 0, 1]]).values())
    assert isnan(stats.validation_noise([[1, 0], [1, 0]])['share'])


@pytest.mark.parametrize('run_sd', [0, 0.3])
def test_validation_noise_finds_the_variance_of_the_true_accuracy(run_sd):
    "Over many sets of 100 images and 8 runs the mean of `beyond` is the variance of the runs' accuracies on all images there could be."
    rng = np.random.default_rng(0)
    found = [stats.validation_noise(predictions(rng, 8, 100, run_sd)(rng.normal(1, 2, 100))) for _ in range(4_000)]
    truth = st.norm.cdf((1 + run_sd * rng.normal(size=1_000_000)) / 5**0.5).var()  # an image's score and a prediction's: variance 4 + 1
    beyond = np.array([v['beyond'] for v in found])
    assert beyond.mean() == pytest.approx(truth, abs=4 * beyond.std() / len(beyond)**0.5)
    assert (np.mean([v['from_images'] for v in found]) > 20 * beyond.mean()) == (run_sd == 0)


@pytest.mark.parametrize('n_runs, run_sd, image_sd', [(3, 0, 0), (12, 0.3, 0), (12, 0, 1)])
def test_image_bootstrap_covers_the_difference_on_all_images(n_runs, run_sd, image_sd):
    rng = np.random.default_rng(0)
    truth = chance((run_sd**2 + image_sd**2)**0.5, 0.3) - chance(run_sd)
    holds, width, seen = [], [], []
    for _ in range(400):
        image = rng.normal(1, 2, 200)
        a, b = predictions(rng, n_runs, 200, run_sd)(image), predictions(rng, n_runs, 200, run_sd, image_sd, 0.3)(image)
        r = stats.image_bootstrap(a, b, 499)
        holds.append(r['low'] <= truth <= r['high'])
        width.append(r['high'] - r['low'])
        seen.append(r['difference'])
    assert np.mean(holds) >= 0.925 and np.mean(width) < 1.15 * 2 * st.t.ppf(0.975, 2 * n_runs - 2) * np.std(seen)


def test_image_bootstrap_of_equal_or_too_few_arms():
    a = np.random.default_rng(0).integers(2, size=(5, 300))
    r = stats.image_bootstrap(a, a[::-1])
    assert r['difference'] == pytest.approx(0) and r['low'] < 0 < r['high'] and r == stats.image_bootstrap(a, a[::-1])
    assert isnan(stats.image_bootstrap(a[:1], a)['low']) and isnan(stats.image_bootstrap(a * 0, a * 0)['low'])
