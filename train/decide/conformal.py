"""Thresholds with a guarantee, from the scores of known images that nobody trained on.

Scores are larger = more known. n calibration images with scores s_(1) <= ... <= s_(n) that are
exchangeable with the known images to come; alpha is the share of known images that may be rejected.
Split conformal prediction (Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005;
Bates, Candes, Lei, Romano, Sesia: Testing for Outliers with Conformal p-values, Annals of
Statistics 2023): with k = floor(alpha (n + 1)), an image is rejected where its score is below
s_(k), and a known one is with probability k / (n + 1) at most, on the average over calibration
sets. The rate of one threshold is random: Beta(k, n + 1 - k) where no two scores are equal. Nothing
is promised about unknown images.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
SMALLEST_RATE = Fraction(1, 10**9)
"""A threshold for it takes a billion images."""
MOST_ENTRIES = 4096
"""Entries of a table of p-values; of more calibration scores some are left out."""


def exact_rate(rate: str | float) -> Fraction:
    """Return a rate as the decimal number that it is written as, strictly between 0 and 1.

    In floating point 0.29 * 100 is 28.999999999999996, and the rank one too small.

    Raises:
        ValueError: no number, not between 0 and 1, or less than `SMALLEST_RATE`.

    >>> exact_rate("0.05"), exact_rate(0.29)
    (Fraction(1, 20), Fraction(29, 100))
    """
    text = str(rate)
    try:
        # As floating point first: 1e-999999999 would be a fraction of a billion digits.
        exact = Fraction(text) if "/" in text or 0 < float(text) < 1 else None
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"a rate is a number between 0 and 1 such as 0.05, got {rate}") from None
    if exact is None or not 0 < exact < 1:
        raise ValueError(f"a rate lies between 0 and 1, both excluded, got {rate}")
    if exact < SMALLEST_RATE:
        raise ValueError(f"a rate must be at least 1e-9, got {rate}")
    return exact


def rank(n: int, rate: Fraction) -> int:
    """Return k = floor(rate (n + 1)): the threshold is the k-th smallest score; 0 = there is none.

    >>> [rank(n, Fraction(1, 20)) for n in (18, 19, 100, 1000)]
    [0, 1, 5, 50]
    """
    return rate.numerator * (n + 1) // rate.denominator


def strict_rank(n: int, rate: Fraction, confidence: float) -> int:
    """Return the largest k whose threshold rejects at most `rate` with this confidence; 0 = none.

    The rate of the k-th smallest score is Beta(k, n + 1 - k), and P(Beta <= rate) =
    P(Bin(n, rate) >= k). Never more than `rank`: at confidences near 1/2 the mean rate counts, too.

    >>> [strict_rank(n, Fraction(1, 20), 0.9) for n in (19, 100, 1000)]
    [0, 2, 41]
    """
    alpha = float(rate)
    low, high = 0, rank(n, rate) + 1
    while high - low > 1:  # P(Bin >= k) falls with k; k = 0 always holds, `high` is never asked
        k = (low + high) // 2
        low, high = (k, high) if stats.binom.sf(k - 1, n, alpha) >= confidence else (low, k)
    return low


def needed(rate: Fraction, confidence: float | None = None) -> int:
    """Return the least number of calibration images for which there is a threshold.

    >>> needed(Fraction(1, 20)), needed(Fraction(1, 100)), needed(Fraction(1, 20), 0.9)
    (19, 99, 45)
    """
    if confidence is None:
        return ceil(1 / rate) - 1
    # P(Bin(n, rate) >= 1) = 1 - (1 - rate)^n
    alone = ceil(np.log1p(-confidence) / np.log1p(-float(rate))) - 2  # what rounding costs
    n = max(needed(rate), alone)
    while not strict_rank(n, rate, confidence):
        n += 1
    return n


def rate_interval(n: int, k: int, level: float = 0.95) -> tuple[float, float]:
    """Return the central interval of the share of known images that the k-th score rejects.

    >>> [round(end, 4) for end in rate_interval(1000, 50)]
    [0.0373, 0.0643]
    """
    if not 1 <= k <= n:
        raise ValueError(f"the rank must be 1 .. {n}, got {k}")
    low, high = stats.beta.interval(level, k, n + 1 - k)
    return float(low), float(high)


def share_interval(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of a share of which `count` of n independent images were seen.

    Clopper and Pearson (1934).

    >>> [round(end, 4) for end in share_interval(0, 10)]
    [0.0, 0.3085]
    """
    if not 0 <= count <= n or not n:
        raise ValueError(f"the count must be 0 .. {n} of at least one image, got {count}")
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, count, n - count + 1)) if count else 0.0
    high = float(stats.beta.isf(tail, count + 1, n - count)) if count < n else 1.0
    return low, high


def threshold_at(scores: ArrayLike, k: int) -> float:
    """Return the k-th smallest score, 1 <= k <= n: what is below it is rejected."""
    values = np.asarray(scores, np.float64)
    if not 1 <= k <= len(values):
        raise ValueError(f"the rank must be 1 .. {len(values)}, got {k}")
    return float(np.partition(values, k - 1)[k - 1])


def benjamini_hochberg(p_values: ArrayLike, share: float) -> NDArray[np.bool_]:
    """Return which images to show as unknown, so that at most `share` of them are known, expected.

    Benjamini and Hochberg (1995): the images with p <= share r / m, r the largest number for which
    r of the m images have so small a p-value. Valid for conformal p-values, which depend on one
    another positively (Bates et al., 2023).

    Args:
        p_values: float [m], NaN = no image; it is not shown and does not count.
        share: of known images among the shown ones, the false discovery rate; in (0, 1).

    >>> benjamini_hochberg([0.01, 0.9, 0.03, 0.02], 0.05).tolist()
    [True, False, True, True]
    """
    if not 0 < share < 1:
        raise ValueError(
            f"the share of known images among the shown ones is in (0, 1), got {share}"
        )
    p = np.asarray(p_values, np.float64)
    there = np.sort(p[~np.isnan(p)])
    # Conformal p-values often lie on the line itself: rounding must not part them from it.
    line = share * np.arange(1, len(there) + 1) * (1 + 1e-12)
    passing = np.flatnonzero(there * len(there) <= line)
    if not len(passing):
        return np.zeros(len(p), bool)
    return p <= there[passing[-1]]  # NaN is not


@dataclass(frozen=True, eq=False)
class PValues:
    """A table of calibration scores, from which p-values of new images are read.

    p = (1 + #{i: s_i <= s}) / (n + 1): small = unlike the known images. For a known image
    P(p <= a) <= a. Where scores between the entries were left out p is taken too large, never too
    small, so that this holds all the same; the lower half of the entries is complete.
    """

    n: int
    """Calibration scores."""
    values: Floats
    """float64 [m], ascending, each once."""
    below: NDArray[np.int64]
    """int64 [m]: calibration scores smaller than each value."""
    upto: NDArray[np.int64]
    """int64 [m]: calibration scores smaller than each value, or equal to it."""

    @staticmethod
    def of(scores: ArrayLike, keep: float | None = None, most: int = MOST_ENTRIES) -> "PValues":
        """Return the table of calibration scores.

        Args:
            scores: float [n], finite, n >= 1.
            keep: a score that becomes an entry whatever is left out: the threshold.
            most: entries, at least 2, and one for `keep`.

        Raises:
            ValueError: there is no score, or one that is not finite.
        """
        if not np.size(scores) or not np.isfinite(scores).all():
            raise ValueError("p-values need calibration scores, all of them finite")
        values, counts = np.unique(np.asarray(scores, np.float64), return_counts=True)
        upto = np.cumsum(counts)
        if len(values) > most:
            half = most // 2
            rest = np.linspace(half, len(values) - 1, most - half).astype(np.int64)
            kept = np.union1d(np.arange(half), rest)
            if keep is not None:
                kept = np.union1d(kept, np.flatnonzero(values == keep))
            values, upto, counts = values[kept], upto[kept], counts[kept]
        return PValues(int(np.size(scores)), values, upto - counts, upto)

    def of_scores(self, scores: ArrayLike) -> Floats:
        """Return the p-values of scores, float64 [m]; NaN for NaN."""
        s = np.asarray(scores, np.float64)
        place = np.searchsorted(self.values, s, "right") - 1  # the last entry that is not larger
        above = np.append(self.below, self.n)[place + 1]
        at = np.maximum(place, 0)
        count = np.where((place >= 0) & (self.values[at] == s), self.upto[at], above)
        return np.where(np.isnan(s), np.nan, (1 + count) / (self.n + 1))
