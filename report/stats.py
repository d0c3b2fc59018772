"""The statistics of the record: pure functions of arrays, numpy and scipy only.

Arms are one-dimensional arrays of accuracies, a value per run; differences are b minus a, in the unit of the values.
What the values do not determine is nan. Random resampling is seeded and blind to the order of the runs: the same values
give the same result to the bit. Intervals are of 95%.
"""
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
from scipy import special
from scipy import stats as st

NAN = float('nan')
SEED = 2019
EXACT = 200_000  # splits or sign patterns up to this many are all tried
CELLS = 1_000_000  # values drawn in a resampling, about; that many of 10 runs or of 10,000 take the same time
ROUNDING = 1e-9  # values no further apart than this are equal


# --- one arm ---

def summary(values):
    """n, mean, sd (ddof 1), low and high (t interval of the mean), bca_low and bca_high (bootstrap), median, min, max.

    Without spread there is no interval. No bootstrap of fewer than 3 values either: it can only be [min, max].
    """
    values = np.sort(np.asarray(values, float))  # the order of the runs must not matter, to the last bit
    mean, sd, n = (float(m) for m in _moments(values))
    half = float(_half(sd / n**0.5 if n else NAN, n - 1))
    bca = st.bootstrap((values,), np.mean, n_resamples=_resamples(n), batch=max(1, CELLS // values.size), rng=SEED,
                       method='BCa').confidence_interval if n > 2 and sd > 0 else (NAN, NAN)
    rest = (float(f(values)) if n else NAN for f in (np.median, np.min, np.max))
    return dict(zip(('n', 'mean', 'sd', 'low', 'high', 'bca_low', 'bca_high', 'median', 'min', 'max'),
                    (int(n), mean, sd, mean - half, mean + half, *map(float, bca), *rest)))


def _moments(x):
    "(mean, sd, n) along the last axis; the sd of equal values is 0 exactly, of fewer than two nan."
    n = x.shape[-1]
    if n == 0: return np.full(x.shape[:-1], NAN), np.full(x.shape[:-1], NAN), n
    sd = np.where(np.ptp(x, -1) > ROUNDING, x.std(-1, ddof=1), x[..., 0] * 0) if n > 1 else np.full(x.shape[:-1], NAN)
    return x.mean(-1), sd, n


def _half(error, df):
    "Half-width of the t interval from the standard error; nan without spread."
    return st.t.ppf(0.975, df) * np.where(error > 0, error, NAN)


def _resamples(n): return int(np.clip(CELLS // n, 999, 9_999))


# --- two arms ---

def compare_summaries(mean_a, sd_a, n_a, mean_b, sd_b, n_b):
    """Two arms from their summary numbers: the keys of `compare`, nan where the runs themselves are needed or an sd is nan.

    difference; low, high, p: Welch; student_p: of equal variances, the test of the published P values; g: Hedges', the
    difference over the pooled sd, with the exact small-sample factor.
    """
    error, df = _welch(sd_a, n_a, sd_b, n_b)
    difference, half = mean_b - mean_a, _half(error, df)
    within = n_a + n_b - 2
    pooled = ((((n_a - 1) * sd_a**2 + (n_b - 1) * sd_b**2) / within)**0.5 or NAN) if within > 0 else NAN
    unbiased = np.exp(special.gammaln(within / 2) - special.gammaln((within - 1) / 2)) / (within / 2)**0.5 if within > 1 else NAN
    p = [2 * st.t.sf(abs(difference) / e, d) for e, d in
         ((error if error > 0 else NAN, df), (pooled * (1 / n_a + 1 / n_b)**0.5 if n_a and n_b else NAN, within))]
    numbers = difference, difference - half, difference + half, p[0], p[1], NAN, difference / pooled * unbiased, NAN
    return dict(zip(('difference', 'low', 'high', 'p', 'student_p', 'permutation_p', 'g', 'beats'), map(float, numbers)))


def _welch(sd_a, n_a, sd_b, n_b):
    "Standard error of the difference and its Welch-Satterthwaite degrees of freedom; nan of fewer than two runs or without spread."
    with np.errstate(all='ignore'):
        a, b = (np.where(n > 1, np.square(sd) / n, NAN) for sd, n in ((sd_a, np.float64(n_a)), (sd_b, np.float64(n_b))))
        return np.sqrt(a + b), (a + b)**2 / (a**2 / (n_a - np.float64(1)) + b**2 / (n_b - np.float64(1)))


def compare(a, b):
    """Two arms from their runs: as `compare_summaries`, and permutation_p, two-sided in |difference|; beats, the chance that a run
    of b is better than a run of a, ties counted half.

    The permutation test is exact up to 200,000 splits (10 runs against 10), else of up to 9,999 random ones.
    """
    a, b = (np.sort(np.asarray(x, float)) for x in (a, b))
    row = compare_summaries(*_moments(a), *_moments(b))
    if np.isnan(row['difference']): return row
    both = np.concatenate([a, b])
    splits, exact = _splits(len(a), len(b))
    shifted = splits @ (both - both.mean()) * (1 / len(a) + 1 / len(b))  # minus the difference of each split
    beats = (np.searchsorted(a, b - ROUNDING) + np.searchsorted(a, b + ROUNDING)).mean() / 2 / len(a)
    return row | dict(permutation_p=_share(shifted, row['difference'], exact), beats=float(beats))


def _share(shifted, difference, exact):
    "Two-sided p value: the share of `shifted` differences as far from 0 as the one seen, which is one of them."
    far = int((abs(shifted) >= abs(difference) - ROUNDING).sum())
    return far / len(shifted) if exact else (far + 1) / (len(shifted) + 1)


@lru_cache(maxsize=4)
def _splits(n_a, n_b):
    "(0/1 matrix (splits, n_a + n_b) that marks the runs taken for a, whether it holds all splits)."
    n, count = n_a + n_b, comb(n_a + n_b, n_a)
    if count > EXACT: return np.random.default_rng(SEED).permuted(np.tile(np.arange(n) < n_a, (_resamples(n), 1)), axis=1) * 1., False
    splits = np.zeros((count, n))
    taken = np.fromiter((i for c in combinations(range(n), n_a) for i in c), int, count * n_a).reshape(count, n_a)
    np.put_along_axis(splits, taken, 1, axis=1)
    return splits, True


def compare_paired(a, b):
    """Arms whose runs share seeds, in the same order: n, difference, low, high and p of the paired t test; permutation_p by flipping
    signs, exact up to 17 pairs; beats, the share of seeds at which b is better, ties counted half."""
    d = np.sort(np.asarray(b, float) - np.asarray(a, float))
    mean, sd, n = (float(m) for m in _moments(d))
    error = sd / n**0.5 if n and sd > 0 else NAN
    half = _half(error, n - 1)
    row = dict(n=int(n), difference=mean, low=mean - half, high=mean + half, p=2 * st.t.sf(abs(mean) / error, n - 1),
               permutation_p=NAN, beats=NAN)
    if not np.isnan(mean):
        signs, exact = _signs(len(d))
        row |= dict(permutation_p=_share(signs @ d / n, mean, exact), beats=((d > ROUNDING) + 0.5 * (abs(d) <= ROUNDING)).mean())
    return {key: value if key == 'n' else float(value) for key, value in row.items()}


def _signs(n):
    "(matrix (patterns, n) of -1 and 1, whether it holds all patterns)."
    if 2**n > EXACT: return np.random.default_rng(SEED).integers(2, size=(_resamples(n), n)) * 2 - 1, False
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1) * 2 - 1, True


def holm(ps):
    "Holm's adjusted p values; nan stays nan and is not counted as a comparison."
    ps = np.asarray(ps, float)
    order = np.argsort(ps)[:np.isfinite(ps).sum()]  # nan is sorted last
    adjusted = np.full(ps.shape, NAN)
    adjusted[order] = np.minimum(np.maximum.accumulate(ps[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


# --- words ---

def verdict(low, high, published=NAN, fine=0.01):
    """The words for our interval of a difference beside the `published` difference (nan or 0: no claim), all fractions.

    The rule is the table in results/README.md, "How a verdict is reached". `fine`: where there is no claim, differences up to it
    are none worth telling: an interval that holds 0 and stays within them says more than that the runs were few.
    """
    if np.isnan(low) or np.isnan(high): return 'too few runs to say'
    if np.isnan(published) or published == 0:
        words = 'difference' if low > 0 or high < 0 else 'no difference seen' if max(-low, high) <= fine else 'too few runs to say'
        return f'{words} (± {50 * (high - low):.1f} points)'
    if published < 0: low, high, published = -high, -low, -published
    if high < 0: return 'opposite direction'
    if low <= 0: return 'not seen' if high < published and high - low < published else 'too few runs to say'
    return 'same direction but smaller' if high < published else 'larger than published' if low > published else 'reproduced'


# --- how many runs ---

def runs_needed(difference, sd, power=0.8, alpha=0.05):
    "Runs per arm for a two-sided t test of arms of one `sd` to find `difference` with that power; nan if 0 or either is nan."
    effect = abs(difference) / sd if sd > 0 else NAN
    if not effect > 0: return NAN

    def enough(n):
        df, shift = 2 * n - 2, effect * (n / 2)**0.5
        t = st.t.ppf(1 - alpha / 2, df)
        return st.nct.sf(t, df, shift) + st.nct.cdf(-t, df, shift) >= power
    few, many = 1, 2
    while not enough(many): few, many = many, 2 * many
    while many - few > 1:
        n = (few + many) // 2
        few, many = (few, n) if enough(n) else (n, many)
    return many


def fixed_width_done(a, b, half_width, n_min=10):
    """Whether runs may stop: both arms have n_min and sqrt(1 + 2/n) times the half-width of Welch's interval is at most `half_width`.

    Chow and Robbins (1965) with 2 sd²/n in place of their 1/n, which has no unit, and t in place of the normal quantile; n: of the
    smaller arm. Who looks after every pair stops when sd happens to be small; the added term and n_min make up for it: of normal
    data, difference ± half_width then keeps its 95% and the narrower Welch interval at the stop more than 93%.
    Along the last axis, for many experiments at once.
    """
    (_, sd_a, n_a), (_, sd_b, n_b) = (_moments(np.asarray(x, float)) for x in (a, b))
    n = min(n_a, n_b)
    if n < max(n_min, 2): return np.zeros(sd_a.shape, bool)[()]
    return (_half(*_welch(sd_a, n_a, sd_b, n_b)) * (1 + 2 / n)**0.5 <= half_width)[()]


# --- with validation predictions ---

def validation_noise(correct):
    """How much of the runs' spread is the finite validation set's; `correct`: (R runs, n images) of 0 and 1, of one arm.

    variance: of the runs' accuracies (ddof 1). from_images: sum over images of R/(R-1) p(1-p) / n², p the share of runs right on
    it: an unbiased estimate of what `variance` would be, on average over validation sets of n independent images, were all runs
    equally accurate on the distribution the images are from. beyond: n/(n-1) (variance - from_images), the unbiased estimate of
    the variance of that true accuracy; by chance below 0. share: from_images / variance.
    From E_set[Var(accuracy)] = (1 - 1/n) Var(true accuracy) + E_image[p(1-p)] / n (Jordan 2023, arXiv:2304.01910).
    """
    correct = np.asarray(correct, float)
    runs, n = correct.shape
    if runs < 2 or n < 2: return dict.fromkeys(('variance', 'from_images', 'beyond', 'share'), NAN)
    variance = float(_moments(correct.mean(1))[1]**2)
    from_images = float(correct.var(0, ddof=1).sum() / n**2)
    return dict(variance=variance, from_images=from_images, beyond=n / (n - 1) * (variance - from_images),
                share=from_images / variance if variance else NAN)


def image_bootstrap(correct_a, correct_b, resamples=4_999):
    """difference, low, high of two arms' accuracies for new runs and new images: (runs, n images) of 0 and 1, the same images.

    A bootstrap over images, the same for both arms, and over the runs of each arm. It counts the noise of single predictions three
    times (Owen 2007, the pigeonhole bootstrap), so its percentiles are drawn in to the unbiased variance of the difference:
    that of the runs, plus that of the images less the part the runs have counted, which is taken to be 0 at least. Then they are
    spread by t over the normal quantile, as the runs are few.
    """
    a, b = (np.asarray(x, float) for x in (correct_a, correct_b))
    difference, n = float(b.mean() - a.mean()) if a.size and b.size else NAN, a.shape[1]
    if min(len(a), len(b), n) < 2: return dict(difference=difference, low=NAN, high=NAN)
    runs = sum(x.mean(1).var(ddof=1) / len(x) for x in (a, b))
    images = (b.mean(0) - a.mean(0)).var(ddof=1) / n - sum(x.var(0, ddof=1).mean() / len(x) / n for x in (a, b))
    rng = np.random.default_rng(SEED)
    drawn = np.concatenate([_redrawn(rng, a, b, part) for part in _parts(resamples, max(1, CELLS // n))])
    if not drawn.std() > ROUNDING: return dict(difference=difference, low=NAN, high=NAN)
    scale = ((runs + max(images, 0)) / drawn.var())**0.5 * st.t.ppf(0.975, len(a) + len(b) - 2) / st.norm.ppf(0.975)
    low, high = difference + scale * (np.quantile(drawn, (0.025, 0.975)) - difference)
    return dict(difference=difference, low=float(low), high=float(high))


def _parts(total, part): return [min(part, total - done) for done in range(0, total, part)]


def _redrawn(rng, a, b, size):
    "`size` differences of arms (runs, images) with images and runs drawn anew."
    images = _weights(rng, size, a.shape[1])
    of_a, of_b = (((images @ x.T) * _weights(rng, size, len(x))).sum(1) for x in (a, b))
    return of_b - of_a


def _weights(rng, size, n):
    "(size, n): the share of each of n in `size` resamples of n."
    drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n) / n
