"""Computes the statistics of the record: pure functions of arrays, with numpy and scipy only.

Arms are one-dimensional arrays of accuracies, one value per run; a difference is b minus a, in the unit of the values.
What the values do not determine is nan. Random resampling is seeded and does not depend on the order of the runs: the
same values give the same result to the bit. Intervals are 95% intervals.
"""
from functools import lru_cache
from itertools import chain, combinations
from math import comb

import numpy as np
from scipy import optimize, special
from scipy import stats as st

NAN = float('nan')
SEED = 2019
EXACT = 200_000  # up to so many splits or sign patterns are all tried; of more a random sample is
CELLS = 1_000_000  # about so many values are drawn in a resampling: 10 runs take the same time as 10,000
ROUNDING = 1e-9  # values that are no further apart than this are equal


# --- one arm ---

def summary(values):
    """Returns n, mean, sd (ddof 1), low and high (t interval of the mean), bca_low and bca_high, median, min and max.

    Without spread there is no interval. Fewer than 4 values have no bootstrap interval either: it would be [min, max],
    as one resample in 27 of 3 values holds the smallest alone.
    """
    values = np.sort(np.asarray(values, float))  # so that the order of the runs does not matter, to the last bit
    mean, sd, n = (float(number) for number in _moments(values))
    half = float(_half(sd / n**0.5 if n else NAN, n - 1))
    bca_low, bca_high = _bca(values) if n > 3 and sd > 0 else (NAN, NAN)
    median, least, most = (float(f(values)) if n else NAN for f in (np.median, np.min, np.max))
    return dict(n=int(n), mean=mean, sd=sd, low=mean - half, high=mean + half, bca_low=bca_low, bca_high=bca_high,
                median=median, min=least, max=most)


def _bca(values):
    "Returns the ends of the bootstrap interval of the mean, bias-corrected and accelerated."
    interval = st.bootstrap((values,), np.mean, n_resamples=_resamples(values.size), rng=SEED, method='BCa',
                            batch=max(1, CELLS // values.size)).confidence_interval
    return float(interval.low), float(interval.high)


def _moments(x):
    "Returns (mean, sd, n) along the last axis; the sd of equal values is exactly 0, that of fewer than two is nan."
    n = x.shape[-1]
    unknown = np.full(x.shape[:-1], NAN)
    if n == 0: return unknown, unknown, n
    if n == 1: return x.mean(-1), unknown, n
    return x.mean(-1), np.where(np.ptp(x, -1) <= ROUNDING, 0., x.std(-1, ddof=1)), n


def _half(error, df):
    "Returns the half-width of the t interval from the standard error; nan without spread."
    return st.t.ppf(0.975, df) * np.where(error > 0, error, NAN)


def _resamples(n): return int(np.clip(CELLS // n, 999, 9_999))


# --- two arms ---

def compare_summaries(mean_a, sd_a, n_a, mean_b, sd_b, n_b):
    """Compares two arms by their summary numbers: returns the keys of `compare`, nan where it takes the runs or an sd.

    difference; low, high and p of Welch's test; student_p of the test that assumes equal variances, as the published P
    values do; g: Hedges' g, the difference over the pooled sd with the exact small-sample factor.
    """
    difference = mean_b - mean_a
    error, df = _welch(sd_a, n_a, sd_b, n_b)
    half = _half(error, df)
    within = n_a + n_b - 2
    pooled = _pooled_sd(sd_a, n_a, sd_b, n_b)
    pooled_error = pooled * (1 / n_a + 1 / n_b)**0.5 if n_a and n_b else NAN
    row = dict(difference=difference, low=difference - half, high=difference + half, p=_t_test(difference, error, df),
               student_p=_t_test(difference, pooled_error, within), permutation_p=NAN,
               g=difference / pooled * _unbiased(within), beats=NAN)
    return {key: float(value) for key, value in row.items()}


def _t_test(difference, error, df):
    "Returns the two-sided P value of a difference with this standard error; nan without spread."
    return 2 * st.t.sf(abs(difference) / error, df) if error > 0 else NAN


def _pooled_sd(sd_a, n_a, sd_b, n_b):
    "Returns the root of the pooled variance; nan without spread or of fewer than two runs an arm."
    within = n_a + n_b - 2
    if not within > 0: return NAN
    return (((n_a - 1) * sd_a**2 + (n_b - 1) * sd_b**2) / within)**0.5 or NAN


def _unbiased(df):
    "Returns Hedges' factor against the bias of difference over sd: gamma(df/2) / (sqrt(df/2) gamma((df-1)/2))."
    if not df > 1: return NAN
    return np.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / (df / 2)**0.5


def _welch(sd_a, n_a, sd_b, n_b):
    """Returns the standard error of the difference and its Welch-Satterthwaite degrees of freedom.

    Both are nan of fewer than two runs an arm or without spread.
    """
    with np.errstate(all='ignore'):
        a = np.where(n_a > 1, np.square(sd_a) / np.float64(n_a), NAN)
        b = np.where(n_b > 1, np.square(sd_b) / np.float64(n_b), NAN)
        return np.sqrt(a + b), (a + b)**2 / (a**2 / (n_a - np.float64(1)) + b**2 / (n_b - np.float64(1)))


def compare(a, b):
    """Compares two arms by their runs: returns the keys of `compare_summaries`, all of them.

    permutation_p is two-sided in |difference|, exact up to 200,000 splits (10 runs against 10), else of up to 9,999
    random ones. beats is the chance that a run of b is better than a run of a; ties count half. Where neither arm has
    any spread, see `_without_spread`.
    """
    a, b = np.sort(np.asarray(a, float)), np.sort(np.asarray(b, float))
    row = _compare_runs(a, b)
    if np.isnan(row['difference']): return row
    runs = np.concatenate([a, b])
    splits, exact = _splits(len(a), len(b))
    shifted = splits @ (runs - runs.mean()) * (1 / len(a) + 1 / len(b))  # minus the difference of each split
    row['permutation_p'] = _share(shifted, row['difference'], exact)
    no_spread = len(a) > 1 and len(b) > 1 and max(np.ptp(a), np.ptp(b)) <= ROUNDING
    return row | _without_spread(row, comb(len(runs), len(a))) if no_spread else row


def _compare_runs(a, b):
    "Returns what `compare` does of two sorted arms, but without the permutation test."
    row = compare_summaries(*_moments(a), *_moments(b))
    if np.isnan(row['difference']): return row
    below, not_above = np.searchsorted(a, b - ROUNDING), np.searchsorted(a, b + ROUNDING)  # runs of a, for each of b
    return row | dict(beats=float((below + not_above).mean() / 2 / len(a)))


def _without_spread(row, n_outcomes):
    """Returns low, high and p of a difference whose spread is seen to be 0, where no t test can be made.

    The interval is the difference itself, and the test is the permutation test. Both are nan where that test could not
    reach 5 %: the most extreme two of its `n_outcomes` are more than that.
    """
    if 2 / n_outcomes > 0.05: return {}
    return dict(low=row['difference'], high=row['difference'], p=row['permutation_p'])


def _share(shifted, difference, exact):
    """Returns the two-sided P value: the share of the `shifted` differences that are as far from 0 as the one seen.

    Of a random sample of them the one seen counts as one more.
    """
    far = int((abs(shifted) >= abs(difference) - ROUNDING).sum())
    return far / len(shifted) if exact else (far + 1) / (len(shifted) + 1)


@lru_cache(maxsize=4)
def _splits(n_a, n_b):
    "Returns (a matrix (splits, n_a + n_b) with 1 at the runs taken for a, else 0; whether it holds all splits)."
    n, count = n_a + n_b, comb(n_a + n_b, n_a)
    if count > EXACT:
        seen = np.tile(np.arange(n) < n_a, (_resamples(n), 1))
        return np.random.default_rng(SEED).permuted(seen, axis=1) * 1., False
    taken = np.fromiter(chain.from_iterable(combinations(range(n), n_a)), int, count * n_a).reshape(count, n_a)
    splits = np.zeros((count, n))
    np.put_along_axis(splits, taken, 1, axis=1)
    return splits, True


# --- two arms that share seeds ---

PAIRED, MODEL, UNPAIRED = 'paired', 'seed + arm', 'unpaired'  # the methods of `compare_by_seed`
SHARED = 5  # seeds that arms have to share, where not all match, for their pairing to be used


def compare_by_seed(a, b):
    """Compares two arms {seed: accuracy} of which some seeds may be in one arm only.

    Returns the keys of `compare`, with difference, low, high, p and permutation_p of the method that the seeds allow;
    method, n_pairs (the seeds that count as pairs), pair_sd (the sd of the differences at these) and better_seeds (the
    share of these at which b is better).

    paired      all seeds match: the paired t test
    seed + arm  at least SHARED match: the model of `compare_blocks`, in which runs without a partner count too; its
                permutation test flips the signs of the pairs
    unpaired    fewer match, or they do not determine the model: Welch's test
    """
    a, b = ({seed: arm[seed] for seed in sorted(arm)} for arm in (a, b))  # the order of the runs must not matter
    pairs = [seed for seed in a if seed in b]
    matched = len(pairs) == len(a) == len(b)
    values = [np.fromiter(arm.values(), float) for arm in (a, b)]
    pairs_a, pairs_b = (np.array([arm[seed] for seed in pairs]) for arm in (a, b))
    paired = compare_paired(pairs_a, pairs_b)
    if matched and pairs: test = {key: paired[key] for key in ('difference', 'low', 'high', 'p')}
    else:
        only_a, only_b = ([arm[seed] for seed in arm if seed not in other] for arm, other in ((a, b), (b, a)))
        test = compare_blocks(pairs_a, pairs_b, only_a, only_b) if len(pairs) >= SHARED else None
    if not test: return compare(*values) | dict(method=UNPAIRED, n_pairs=0, pair_sd=NAN, better_seeds=NAN)
    return _compare_runs(*map(np.sort, values)) | test | dict(
        permutation_p=paired['permutation_p'], method=PAIRED if matched else MODEL, n_pairs=len(pairs),
        pair_sd=paired['sd'], better_seeds=paired['beats'])


def compare_paired(a, b):
    """Compares arms whose runs share seeds, in the same order, by the paired t test.

    Returns n, difference, its sd, low, high and p; permutation_p by flipping signs, exact up to 17 pairs; beats, the
    share of seeds at which b is better, where ties count half. Where all differences are equal, see `_without_spread`.
    """
    d = np.sort(np.asarray(b, float) - np.asarray(a, float))
    mean, sd, n = (float(number) for number in _moments(d))
    error = sd / n**0.5 if n and sd > 0 else NAN
    half = _half(error, n - 1)
    row = dict(n=int(n), difference=mean, sd=sd, low=float(mean - half), high=float(mean + half),
               p=float(_t_test(mean, error, n - 1)), permutation_p=NAN, beats=NAN)
    if np.isnan(mean): return row
    signs, exact = _signs(len(d))
    better, equal = d > ROUNDING, abs(d) <= ROUNDING
    row |= dict(permutation_p=float(_share(signs @ d / n, mean, exact)), beats=float((better + equal / 2).mean()))
    return row | _without_spread(row, 2**len(d)) if sd == 0 else row


@lru_cache(maxsize=2)
def _signs(n):
    "Returns (a matrix (patterns, n) of -1 and 1, whether it holds all patterns)."
    if 2**n > EXACT: return np.random.default_rng(SEED).integers(2, size=(_resamples(n), n)) * 2 - 1, False
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1) * 2 - 1, True


def compare_blocks(pairs_a, pairs_b, only_a, only_b):
    """Compares two arms by the model: accuracy = arm + seed + rest, where a seed is a block of one or two runs.

    The effects of the seeds and the rest are random, so that runs without a partner count by what they tell of the mean
    of their arm. Estimated by restricted maximum likelihood (REML), with the standard error and the degrees of freedom
    of Kenward and Roger (1997). The covariance of a pair may be negative: with pairs alone this is the paired t test.
    Returns difference, low, high and p; None where the runs do not determine the covariance.
    """
    a, b, only_a, only_b = (np.asarray(x, float) for x in (pairs_a, pairs_b, only_a, only_b))
    # The sum and the difference of a pair are independent: (b - a) / sqrt(2) has the variance s (1 - r),
    # (a + b) / sqrt(2) has s (1 + r), and a single run s. So all rows have s (1 + c r), with a c of -1, 1 or 0.
    y = np.concatenate([(b - a) / 2**0.5, (a + b) / 2**0.5, only_a, only_b])
    counts = [a.size, a.size, only_a.size, only_b.size]
    arms = np.repeat(np.array([[-0.5**0.5, 0.5**0.5], [0.5**0.5, 0.5**0.5], [1, 0], [0, 1]]), counts, axis=0)
    c = np.repeat([-1., 1., 0., 0.], counts)
    if not np.isfinite(y).all() or min(np.ptp(b - a), np.ptp(a + b)) <= ROUNDING: return None
    r = _reml_correlation(y, arms, c)
    means, s = _weighted_fit(y, arms, 1 / (1 + c * r))[:2]
    difference = means[1] - means[0]
    error, df = _kenward_roger(arms, [np.ones_like(c), c], 1 / (s * (1 + c * r)), np.array([-1., 1.]))
    half = float(_half(error, df))
    row = dict(difference=difference, low=difference - half, high=difference + half, p=_t_test(difference, error, df))
    return {key: float(value) for key, value in row.items()}


def _weighted_fit(y, x, weights):
    "Returns (coefficients, variance, -2 log restricted likelihood but for a constant) of rows of these weights."
    information = (x.T * weights) @ x
    coefficients = np.linalg.solve(information, (x.T * weights) @ y)
    rest, freedom = y - x @ coefficients, len(y) - x.shape[1]
    variance = (weights * rest**2).sum() / freedom
    determinants = np.linalg.slogdet(information)[1] - np.log(weights).sum()
    return coefficients, variance, freedom * np.log(variance) + determinants


def _reml_correlation(y, x, c):
    "Returns the r, from -1 to 1, of the greatest restricted likelihood of rows whose variance goes as 1 + c r."
    def misfit(r): return _weighted_fit(y, x, 1 / (1 + c * r))[2]
    grid = np.linspace(-1, 1, 22)
    best = int(np.argmin([misfit(r) for r in grid[1:-1]])) + 1
    between = (grid[best - 1], grid[best + 1])
    return optimize.minimize_scalar(misfit, bounds=between, method='bounded', options=dict(xatol=1e-9)).x


def _kenward_roger(x, kernels, weights, contrast):
    """Returns (standard error, degrees of freedom) of `contrast` of the coefficients.

    The variance of row i is the sum over k of t_k kernels[k][i], that is 1 / weights[i], with t estimated by REML. The
    letters are those of Kenward and Roger (1997): Phi, P and Q, and W, the covariance of t.
    """
    def product(rows): return (x.T * rows) @ x
    n_kernels = range(len(kernels))
    phi = np.linalg.inv(product(weights))
    p = [-product(weights**2 * kernel) for kernel in kernels]
    q = [[product(weights**3 * k * other) for other in kernels] for k in kernels]
    information = np.empty((len(kernels), len(kernels)))
    for i in n_kernels:
        for j in n_kernels:
            total = (weights**2 * kernels[i] * kernels[j]).sum()
            information[i, j] = (total - 2 * np.trace(phi @ q[i][j]) + np.trace(phi @ p[i] @ phi @ p[j])) / 2
    w = np.linalg.inv(information)
    surplus = sum(w[i, j] * (q[i][j] - p[i] @ phi @ p[j]) for i in n_kernels for j in n_kernels)
    variance = contrast @ phi @ contrast
    slopes = np.array([-contrast @ phi @ p[k] @ phi @ contrast for k in n_kernels])
    adjusted = variance + 2 * contrast @ phi @ surplus @ phi @ contrast
    return adjusted**0.5, 2 * variance**2 / (slopes @ w @ slopes)


def holm(ps, n=None):
    """Returns Holm's adjusted P values of `n` comparisons; nan stays nan.

    Without `n` a comparison whose P is nan does not count. With it, those beyond the known P values count as if their P
    were larger than all of these.
    """
    ps = np.asarray(ps, float)
    order = np.argsort(ps)[:np.isfinite(ps).sum()]  # nan is sorted last
    n = len(order) if n is None else n
    adjusted = np.full(ps.shape, NAN)
    adjusted[order] = np.minimum(np.maximum.accumulate(ps[order] * (n - np.arange(len(order)))), 1)
    return adjusted


# --- the verdict ---

TOO_FEW = 'too few runs to say'
ALPHA = 0.05
FINE = 0.01  # where there is no claim, a difference of up to one point is not worth reporting


def verdict(low, high, p, published=NAN, fine=FINE):
    """Returns the verdict on our interval of a difference beside the `published` difference; all are fractions.

    `p` is Holm's P. An interval that excludes 0 counts only where Holm's P is below 5 % too: else the runs are too few.
    A published difference of nan or 0 is no claim. Then an interval that holds 0 and stays within `fine` of it says
    more than that the runs were few. The rule is the table in results/README.md, "How a verdict is reached".
    """
    if np.isnan(low) or np.isnan(high) or np.isnan(p): return TOO_FEW
    if fails_holm(low, high, p): return TOO_FEW
    if np.isnan(published) or published == 0:
        if low > 0 or high < 0: return 'difference'
        return 'no difference seen' if max(-low, high) <= fine else TOO_FEW
    if published < 0: low, high, published = -high, -low, -published
    if high < 0: return 'opposite direction'
    if low <= 0: return 'not seen' if high < published and high - low < published else TOO_FEW
    if high < published: return 'same direction but smaller'
    return 'larger than published' if low > published else 'reproduced'


def fails_holm(low, high, p):
    "Returns whether an interval excludes 0, but Holm's P does not allow to say so."
    return bool((low > 0 or high < 0) and not p < ALPHA)


# --- how many runs ---

def runs_needed(difference, sd, paired=False, power=0.8, alpha=ALPHA):
    """Returns the runs per arm with which a two-sided t test finds `difference` between arms of one `sd`.

    `paired`: it is the paired test, and `sd` is that of the differences at a seed. `power` is the chance to find it.
    The result is nan if the difference or the sd is 0 or nan.
    """
    effect = abs(difference) / sd if sd > 0 and abs(difference) > ROUNDING else NAN
    if not effect > 0: return NAN

    def enough(n):
        df, shift = (n - 1, effect * n**0.5) if paired else (2 * n - 2, effect * (n / 2)**0.5)
        t = st.t.ppf(1 - alpha / 2, df)
        above, below = st.nct.sf(t, df, shift), st.nct.cdf(-t, df, shift)
        return np.nan_to_num(above, nan=1) + np.nan_to_num(below) >= power  # they are nan where they are almost 1 and 0
    few, many = 1, 2
    while not enough(many): few, many = many, 2 * many
    while many - few > 1:
        n = (few + many) // 2
        few, many = (few, n) if enough(n) else (n, many)
    return many


LEAST_RUNS = 10  # of each arm, before runs may stop


def fixed_width_done(a, b, half_width, n_min=LEAST_RUNS, paired=False):
    """Returns whether runs may stop, along the last axis, for many experiments at once.

    They may when both arms have n_min runs and sqrt(1 + 2/n) times the half-width of the interval is at most
    `half_width`; n: the runs of the smaller arm. Without any spread the half-width is 0, see `_without_spread`. The
    interval is Welch's, or with `paired` that of the paired t test; then the runs are in the order of their seeds. This
    is the rule of Chow and Robbins (1965) with 2 sd²/n in place of their 1/n, which has no unit, and t in place of the
    normal quantile. Who looks after every pair stops when the sd happens to be small; the added term and n_min make up
    for it: of normal data, difference ± half_width then keeps its 95%, and the narrower interval at the stop more than
    93%.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    (_, sd_a, n_a), (_, sd_b, n_b) = _moments(a), _moments(b)
    n = min(n_a, n_b)
    if n < max(n_min, 2): return np.zeros(sd_a.shape, bool)[()]
    error, df = (_moments(b - a)[1] / n**0.5, n - 1) if paired else _welch(sd_a, n_a, sd_b, n_b)
    half = np.where(error == 0, 0, _half(error, df))
    return (half * (1 + 2 / n)**0.5 <= half_width)[()]


# --- with validation predictions ---

def validation_noise(correct):
    """Returns how much of the runs' spread the finite validation set makes; `correct`: (R runs, n images) of 0 and 1.

    variance: of the runs' accuracies (ddof 1). from_images: the sum over images of R/(R-1) p(1-p) / n², where p is the
    share of runs that are right on the image: an unbiased estimate of what `variance` would be, on average over
    validation sets of n independent images, were all runs equally accurate on the distribution of the images.
    beyond: n/(n-1) (variance - from_images), the unbiased estimate of the variance of that true accuracy, by chance
    below 0. share: from_images / variance.
    From E_set[Var(accuracy)] = (1 - 1/n) Var(true accuracy) + E_image[p(1-p)] / n (Jordan 2023, arXiv:2304.01910).
    """
    correct = np.asarray(correct, float)
    runs, n = correct.shape
    if runs < 2 or n < 2: return dict.fromkeys(('variance', 'from_images', 'beyond', 'share'), NAN)
    variance = float(_moments(correct.mean(1))[1]**2)
    from_images = float(correct.var(0, ddof=1).sum() / n**2)
    return dict(variance=variance, from_images=from_images, beyond=n / (n - 1) * (variance - from_images),
                share=from_images / variance if variance else NAN)


def share_range(share, runs):
    """Returns the 95 % interval of `validation_noise`'s share, of this many runs, as far as it is below 1.

    It is that of the variance of normal runs, beside which `from_images` is known well: of 4 runs its ends are a factor
    of 43 apart, of 10 a factor of 7.
    """
    df = runs - 1
    low, high = (float(share * st.chi2.ppf(end, df) / df) for end in (0.025, 0.975))
    return min(low, 1.), min(high, 1.)


def over_images(correct_a, correct_b, paired=False):
    """Returns difference, low and high of two arms for new runs and new images.

    `correct_a`, `correct_b`: (runs, n images) of 0 and 1, on the same images; `paired`: run i of both has one seed. The
    variance of the difference is that of the runs (or of the pairs), plus that of the images less the part that the
    runs have counted already: what the chance of each run's images adds to their variance. Neither the rest nor the
    variance of the runs without that part is taken to be below 0, so that the whole is never below that of the images
    alone. The interval is the t interval of as many runs.
    """
    a, b = np.asarray(correct_a, float), np.asarray(correct_b, float)
    difference, n = float(b.mean() - a.mean()) if a.size and b.size else NAN, a.shape[1]
    unknown = dict(difference=difference, low=NAN, high=NAN)
    if min(len(a), len(b), n) < 2: return unknown
    arms = [b - a] if paired else [a, b]
    of_runs = sum(x.mean(1).var(ddof=1) / len(x) for x in arms)
    counted = sum(x.var(0, ddof=1).mean() / len(x) / n for x in arms)
    of_runs = max(of_runs, counted)
    of_images = max((b.mean(0) - a.mean(0)).var(ddof=1) / n - counted, 0)
    half = float(st.t.ppf(0.975, sum(len(x) - 1 for x in arms)) * (of_runs + of_images)**0.5)
    return dict(difference=difference, low=difference - half, high=difference + half) if half > ROUNDING else unknown
