"""How sure a figure is: confidence intervals of the metrics over the images that were drawn.

They answer "what would other images of the same kinds have given?" for one trained network; what
another training run would have given only further seeds and class lists can say.

AUROC and OSCR are means over all pairs of a known and an unknown image, whose variance has a closed
form (DeLong et al., Comparing the Areas under Two or More Correlated Receiver Operating
Characteristic Curves, 1988), here by ranks in O((n + m) log(n + m)) (Sun and Xu, Fast
Implementation of DeLong's Algorithm, 2014). Everything else is bootstrapped: known and unknown
images are drawn anew with replacement, each side in its own size. All intervals are two-sided.

With H and the names of `metrics.py`, an image's *placement* is its share of the pairs it stands in:
v_i = c_i (1/m) sum_j H(k_i, u_j) and w_j = (1/n) sum_i c_i H(k_i, u_j). The area A is the mean of
either, and its variance is estimated by var(v) / n + var(w) / m (sample variances, n - 1).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from backmix.train import metrics
from backmix.train.metrics import Floats, as_flags, as_scores, ceil_share, doubled_wins

CONFIDENCE = 0.95
"""How often such an interval holds the true value, unless told otherwise."""
REPLICATES = 1000
"""How often a bootstrap draws the images anew, unless told otherwise."""
_CHEAP_REPLICATES = 10_000


@dataclass(frozen=True)
class Interval:
    """Where a figure lies: its value and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def ends(self) -> list[float]:
        """The two ends, as metrics.json holds them."""
        return [self.low, self.high]


def auroc_interval(
    known: ArrayLike, unknown: ArrayLike, confidence: float = CONFIDENCE
) -> Interval:
    """Return the AUROC with its DeLong interval.

    The interval is made on the log odds of the area, where it is closer to a normal distribution
    and cannot leave (0, 1): logit A -+ z s / (A (1 - A)), s the standard error.

    Where every pair is won (or lost) the variance is 0 and says nothing: then the end is the
    Clopper-Pearson bound of min(n, m) disjoint and so independent pairs, all won,
    (alpha / 2)^(1 / min(n, m)): wide, but it holds. With a single image on a side nothing can be
    said: (0, 1).

    Args:
        known: scores of known images, [n].
        unknown: scores of unknown images, [m].
        confidence: in (0, 1).

    >>> auroc_interval([2, 3, 4, 5], [0, 1, 2.5, 3.5], 0.9).value
    0.8125
    """
    return oscr_interval(known, np.ones(np.shape(known), bool), unknown, confidence)


def oscr_interval(
    known: ArrayLike, correct: ArrayLike, unknown: ArrayLike, confidence: float = CONFIDENCE
) -> Interval:
    """Return the OSCR with its DeLong interval: as `auroc_interval`, wrong images winning nothing.

    Args:
        known: scores of known images, [n].
        correct: whether each of them got its right class, bool [n].
        unknown: scores of unknown images, [m].
        confidence: in (0, 1).
    """
    z = _quantile(confidence)
    area = metrics.oscr(known, correct, unknown)
    if math.isnan(area):
        return Interval(math.nan, math.nan, math.nan)
    n, m = np.size(known), np.size(unknown)
    if min(n, m) < 2:
        return Interval(area, 0.0, 1.0)
    if area in (0.0, 1.0):
        bound = ((1 - confidence) / 2) ** (1 / min(n, m))
        low, high = (bound, 1.0) if area else (0.0, 1 - bound)
        return Interval(area, low, high)
    _, covariance = delong([known], [unknown], correct)
    error = math.sqrt(covariance[0, 0]) / (area * (1 - area))
    odds = math.log(area / (1 - area))
    low, high = (1 / (1 + math.exp(-(odds + side * z * error))) for side in (-1, 1))
    return Interval(area, low, high)


def delong(
    known: Sequence[ArrayLike], unknown: Sequence[ArrayLike], correct: ArrayLike | None = None
) -> tuple[Floats, Floats]:
    """Return the areas of s scores on the same images and the covariance of these areas.

    Args:
        known: scores of the same n known images under each score, s arrays [n], n >= 2.
        unknown: scores of the same m unknown images under each score, s arrays [m], m >= 2.
        correct: which known images can win a pair, bool [n] for all scores or [s, n] for each of
            them (two networks err on different images); None = all, which makes the areas AUROCs.

    Returns areas float64 [s] and covariance float64 [s, s].

    Raises:
        ValueError: sets of unequal sizes, or with a single image, which has no variance.
    """
    k = [as_scores("known", row) for row in known]
    u = [as_scores("unknown", row) for row in unknown]
    sizes = {len(row) for row in k}, {len(row) for row in u}
    if not k or len(k) != len(u) or any(len(size) != 1 for size in sizes):
        raise ValueError(
            f"DeLong's covariance compares scores of the same images; got sets of "
            f"{[len(row) for row in k]} known and {[len(row) for row in u]} unknown scores"
        )
    n, m = len(k[0]), len(u[0])
    if min(n, m) < 2:
        raise ValueError(f"a variance needs two images on each side, got {n} known, {m} unknown")
    right = np.ones((len(k), n), bool)
    if correct is not None:
        right = np.broadcast_to(np.asarray(correct), right.shape)
    v, w = np.empty((len(k), n)), np.empty((len(k), m))
    for row, (ks, us) in enumerate(zip(k, u, strict=True)):
        counts = as_flags("correct", right[row], n)
        v[row] = doubled_wins(ks, us) * counts / (2 * m)
        # An unknown image wins against what lies above it: all pairs less those it takes itself.
        winners = ks[counts]
        w[row] = (2 * len(winners) - doubled_wins(us, winners)) / (2 * n)
    spread = np.atleast_2d(np.cov(v)) / n + np.atleast_2d(np.cov(w)) / m
    return v.mean(1), spread


def difference(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    correct: tuple[ArrayLike, ArrayLike] | None = None,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Return the area of the second minus that of the first, on the same images, with its interval.

    Two scores of one network, or one score of two networks. Much narrower than the two intervals
    suggest, as both see the same easy and hard images: its variance is var A_1 + var A_2 -
    2 cov(A_1, A_2). In [-1, 1]; where the interval leaves out 0, the difference is more than luck
    with the images.

    Args:
        first: known and unknown scores, [n] and [m].
        second: known and unknown scores of the same images in the same order.
        correct: which known images each got right, two of bool [n]: the difference is of OSCR.
            None: of AUROC.
        confidence: in (0, 1).
    """
    z = _quantile(confidence)
    both = None if correct is None else np.stack([np.asarray(flags) for flags in correct])
    area, covariance = delong([first[0], second[0]], [first[1], second[1]], both)
    value = float(area[1] - area[0])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    half = z * math.sqrt(max(variance, 0.0))  # of equal scores it may round below 0
    return Interval(value, max(value - half, -1.0), min(value + half, 1.0))


def fpr95_intervals(
    known: ArrayLike, unknown: ArrayLike, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[Interval, Interval]:
    """Return both FPR95 with bootstrap intervals: unknown accepted, known rejected.

    The bootstrap's own distribution without drawing images: of n uniform draws from the sorted
    scores the r-th smallest is the score number floor(n b), b from Beta(r, n + 1 - r), and of the m
    other draws a binomial number lies beyond it.

    Where the share is 0 (or 1) drawing the same images anew says next to nothing of the next one:
    then the interval reaches at least as far as that of Clopper and Pearson for m images none (all)
    of which lay beyond, 1 - (alpha / 2)^(1 / m) or (alpha / 2)^(1 / m).

    Args:
        known: scores of known images, [n].
        unknown: scores of unknown images, [m].
        confidence: in (0, 1).
        seed: of the draws.
    """
    _quantile(confidence)
    k, u = as_scores("known", known), as_scores("unknown", unknown)
    accepted = metrics.fpr95_unknown_accepted(k, u)
    rejected = metrics.fpr95_known_rejected(k, u)
    if not len(k) or not len(u):
        nothing = Interval(math.nan, math.nan, math.nan)
        return nothing, nothing
    return (
        _share_beyond(accepted, k, u, confidence, seed),
        # The mirror image: the unknown ones set the threshold, from above.
        _share_beyond(rejected, -u, -k, confidence, seed),
    )


def bootstrap(
    figure: Callable[..., float],
    known: Sequence[ArrayLike],
    unknown: Sequence[ArrayLike],
    confidence: float = CONFIDENCE,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Interval:
    """Return any figure with its stratified bootstrap interval (percentiles).

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993. Figures that are differences, of
    two scores or two networks, are paired where they get the arrays of both.

    Args:
        figure: called as figure(*known, *unknown) with the arrays of a replicate.
        known: what there is of every known image (scores, correct, ...), arrays [n]: all are drawn
            with the same row numbers.
        unknown: the same of the unknown images, arrays [m].
        confidence: in (0, 1).
        replicates: how often the images are drawn.
        seed: of the draws; the same seed gives the same interval.

    >>> k, right, u = [1.0, 2.0, 3.0, 4.0], [True, False, True, True], [0.0, 2.5]
    >>> bootstrap(lambda k, right, u: metrics.oscr(k, right, u), [k, right], [u]).value
    0.625
    """
    if replicates < 1:
        raise ValueError(f"a bootstrap needs at least one replicate, got {replicates}")
    _quantile(confidence)
    sides = [[np.asarray(array) for array in side] for side in (known, unknown)]
    counts = [{len(array) for array in side} for side in sides]
    if any(len(lengths) != 1 or 0 in lengths for lengths in counts):
        raise ValueError("a bootstrap needs images on both sides, and arrays of equal length")
    n, m = (lengths.pop() for lengths in counts)
    generator = np.random.default_rng(seed)
    found = np.empty(replicates)
    # One at a time: of 10,000 images drawing takes a tenth of the time of a figure that ranks them,
    # so blocks of replicates would save next to nothing.
    for number in range(replicates):
        rows, others = generator.integers(n, size=n), generator.integers(m, size=m)
        found[number] = figure(
            *(array[rows] for array in sides[0]), *(array[others] for array in sides[1])
        )
    value = figure(*sides[0], *sides[1])
    return Interval(value, *_percentiles(found, confidence))


def _share_beyond(
    value: float, setting: Floats, counted: Floats, confidence: float, seed: int
) -> Interval:
    """Return the interval of the share of `counted` at or above the threshold of `setting`."""
    n, m = len(setting), len(counted)
    # The ceil(95 % of n)-th largest is the rank-th smallest.
    rank = n - ceil_share(0.95, n) + 1
    generator = np.random.default_rng(seed)
    place = np.minimum(n * generator.beta(rank, n + 1 - rank, _CHEAP_REPLICATES), n - 1)
    threshold = np.sort(setting)[place.astype(np.int64)]
    beyond = m - np.searchsorted(np.sort(counted), threshold, "left")
    low, high = _percentiles(generator.binomial(m, beyond / m) / m, confidence)
    bound = ((1 - confidence) / 2) ** (1 / m)
    if value == 0:
        high = max(high, 1 - bound)
    elif value == 1:
        low = min(low, bound)
    return Interval(value, low, high)


def _percentiles(found: Floats, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def _quantile(confidence: float) -> float:
    """Return the z of a two-sided interval: 1.96 for 0.95."""
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence must be in (0, 1), got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
