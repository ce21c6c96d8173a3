"""Has anything changed since the threshold was calibrated? Tests that know how few images that was.

Given its calibration images, the rejection rate of a threshold is not k / (n + 1): it is a draw of
Beta(k, n + 1 - k), and p-values of new images are not uniform but follow a law that is off by about
1 / sqrt(n). A test against the uniform law itself would reject any threshold, if only the stream is
long enough. What is exact where calibration and new images are exchangeable, and scores have no
ties: cut the scores at some of the calibration scores, and the cells between the cuts, of m_0, m_1,
..., m_J of the n + 1 gaps between calibration scores, are drawn from by new images as from Polya's
urn, the next one from cell j with probability (m_j + c_j) / (n + 1 + i) after i images, c_j of them
in the cell (Dirichlet(m_0, ..., m_J) are the cells' shares: Wilks, Mathematical Statistics, 1962,
section 8.7). So the stream is compared with the calibration images and with all of the stream
before; the calibration's own uncertainty is in every figure. Two things follow.

- Rejected images of a window: beta-binomial(w; k, n + 1 - k), summed over categories.
- An e-process against any other law of the cells: the probability of what came under an alternative
  that is learned as it comes, divided by that under the urn. Its expectation stays 1 if nothing has
  changed, so it ever reaches 1 / a with probability a at most, however long the stream is (Ville,
  1939; conformal test martingales: Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World,
  2nd edition, 2022, chapter 8).

Scores with ties are ordered at random among their equals, which makes them continuous.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import signal, special

from backmix.pipeline import draws
from backmix.train.decide.conformal import Floats
from backmix.train.decide.rule import Category, Rule

CELLS = 16
"""Cells of accepted scores, each of as many calibration scores; what is rejected is one more."""
RESOLUTIONS = 2, 4, 8
"""Numbers of cells of accepted scores that alternatives distinguish."""
_EXPECTED = 10
"""Rejected images that a window expects."""
MOST_WINDOWS = 512
"""Windows that are chosen where the user does not say how long they are."""
_DIRECT = 1 << 20
"""Products of two lengths up to which a convolution is faster without Fourier's transform."""

_IMPOSSIBLE = 1e-14
"""Probability that is left out at the ends of a law."""

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Windows:
    """The rejection rate over time, in B windows."""

    ends: Counts
    """int64 [B]: images up to the end of each window."""
    rejected: Counts
    """int64 [B]: images with a score below the threshold."""
    expected: Floats
    """float64 [B]: of them on the average, if nothing changed."""
    low: Counts
    high: Counts
    """int64 [B] each: fewer or more is an alarm, at one level for all windows together."""
    usual_low: Counts
    usual_high: Counts
    """int64 [B] each: a single window lies between them in 95 % of all cases or more."""
    alarms: NDArray[np.int8]
    """int8 [B]: 1 = too many rejected, -1 = too few, 0 = neither."""

    @property
    def starts(self) -> Counts:
        """Images before each window, int64 [B]."""
        return np.append(0, self.ends[:-1])

    @property
    def sizes(self) -> Counts:
        """Images of each window, int64 [B]."""
        return np.diff(self.ends, prepend=0)


@dataclass(frozen=True, eq=False)
class Drift:
    """The e-process of a stream in B windows, and what it says."""

    log_e: Floats
    """float64 [B]: its natural logarithm at the end of each window."""
    log_e_accepted: Floats
    """float64 [B]: that of the scores of accepted images alone."""
    level: float
    """Probability of calling a change, and of calling one of the accepted scores, where there is
    none."""
    start: int | None
    """Window with which the change begins, as far as can be told; None = no change."""

    @property
    def accepted_too(self) -> bool:
        """Whether the scores of accepted images have changed among themselves."""
        return _first(self.log_e_accepted >= -np.log(self.level)) is not None


@dataclass(frozen=True, eq=False)
class Shares:
    """How some images fall into the cells, which are intervals of p-values; index 0 is rejected."""

    counts: Counts
    """int64 [1 + `CELLS`]."""
    expected: Floats
    """float64 [1 + `CELLS`]: of them on the average, if nothing changed."""
    low: Counts
    high: Counts
    """int64 [1 + `CELLS`] each: one cell lies between them in 95 % of all cases or more."""


def comparable(rule: Rule, predicted: Counts) -> NDArray[np.bool_]:
    """Return which images are exchangeable with calibration images if nothing has changed.

    Not those predicted as classes that share a threshold because they have few calibration images,
    or as a class that is calibrated on the images of others, too: what was calibrated together is
    more than these classes, or was chosen for having few.

    Args:
        rule: what is decided by.
        predicted: positions in the class list, int64 [m].
    """
    fine = [
        category.classes == category.calibrated_on
        and len(category.classes) in (1, len(rule.category))
        for category in rule.categories
    ]
    return np.array(fine)[rule.category[predicted]]


def at_thresholds(
    rule: Rule, predicted: Counts, scores: Floats
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which scores are below their thresholds, and which are not above, bool [m] each."""
    rest = scores - rule.offsets[predicted]  # as `Rule.decide` compares them
    own = np.array([category.threshold for category in rule.categories])
    thresholds = own[rule.category[predicted]]
    return rest < thresholds, rest <= thresholds


def window_size(rule: Rule, images: int) -> int:
    """Return how many images make a window: of them the rule expects to reject ten.

    Doubled until there are `MOST_WINDOWS` of them at most.
    """
    sizes = np.array([category.n for category in rule.categories])
    rates = np.array([category.mean_rate for category in rule.categories])
    size = int(np.ceil(_EXPECTED * sizes.sum() / (sizes * rates).sum()))
    while images > MOST_WINDOWS * size:
        size *= 2
    return size


def window_ends(images: int, size: int) -> Counts:
    """Return where windows of `size` images end; the last of them may be a shorter one."""
    return np.append(np.arange(size, images, size), images)


def cells_of(rule: Rule, predicted: Counts, scores: Floats, seed: int = 0) -> Counts:
    """Return the cell of each image, int64 [m]: 0 = rejected, then `CELLS` of accepted ones.

    Args:
        rule: what is decided by.
        predicted: positions in the class list, int64 [m].
        scores: float64 [m], finite.
        seed: of the order among equal scores.
    """
    own, rest = rule.category[predicted], scores - rule.offsets[predicted]
    keys = _keys(seed, len(scores), 0)
    found = np.zeros(len(scores), np.int64)
    for number, category in enumerate(rule.categories):
        rows = np.flatnonzero(own == number)
        s, key = rest[rows], keys[rows]
        for value, cut in _cuts(category, seed, number):
            found[rows] += (s > value) | ((s == value) & (key > cut))
    return found


def cell_masses(category: Category) -> Counts:
    """Return the urn's first content, int64 [1 + `CELLS`]: gaps between calibration scores."""
    return np.diff(_ranks(category), prepend=0, append=category.n + 1)


def rejection_windows(
    rule: Rule, predicted: Counts, scores: Floats, ends: Counts, level: float
) -> Windows:
    """Return the rejection rate over time against what it should be.

    Ties with the threshold make alarms rarer, never more frequent: too many are counted below it,
    too few up to it.

    Args:
        rule: what is decided by.
        predicted: positions in the class list, int64 [m].
        scores: float64 [m], finite.
        ends: of the windows, as of `window_ends`.
        level: probability of an alarm in any of the windows, if nothing changed (Bonferroni).
    """
    window, (is_below, is_upto) = _window_of(ends), at_thresholds(rule, predicted, scores)
    below = np.bincount(window[is_below], minlength=len(ends))
    upto = np.bincount(window[is_upto], minlength=len(ends))
    sizes = _by_category(rule, predicted, window, len(ends))
    urns = tuple((category.k, category.n) for category in rule.categories)
    limits = [_limits(urns, tuple(row.tolist()), level / len(ends)) for row in sizes]
    usual = [_limits(urns, tuple(row.tolist()), 0.05) for row in sizes]
    (low, high), (usual_low, usual_high) = np.array(limits).T, np.array(usual).T
    alarms = (below > high).astype(np.int8) - (upto < low).astype(np.int8)
    rates = np.array([category.mean_rate for category in rule.categories])
    expected = (sizes * rates).sum(1)
    return Windows(ends, below, expected, low, high, usual_low, usual_high, alarms)


def rejected_of(rule: Rule, predicted: Counts, level: float) -> tuple[float, int, int]:
    """Return how many of some known images are rejected: the mean, and the ends of an interval.

    Args:
        rule: what is decided by.
        predicted: positions in the class list, int64 [m].
        level: probability of lying outside, at most.
    """
    (sizes,) = _by_category(rule, predicted, np.zeros(len(predicted), np.int64), 1)
    urns = tuple((category.k, category.n) for category in rule.categories)
    rates = np.array([category.mean_rate for category in rule.categories])
    return float((sizes * rates).sum()), *_limits(urns, tuple(sizes.tolist()), level)


def shares_of(rule: Rule, predicted: Counts, cells: Counts) -> Shares:
    """Return how images fall into the cells against how they should.

    Args:
        rule: what is decided by.
        predicted: positions in the class list, int64 [m], m >= 1.
        cells: of `cells_of`, int64 [m].
    """
    (sizes,) = _by_category(rule, predicted, np.zeros(len(cells), np.int64), 1)
    masses = np.array([cell_masses(category) for category in rule.categories])
    n = np.array([category.n for category in rule.categories])
    limits = [
        _limits(tuple(zip(column, n.tolist(), strict=True)), tuple(sizes.tolist()), 0.05)
        for column in masses.T.tolist()
    ]
    low, high = np.array(limits).T
    counts = np.bincount(cells, minlength=1 + CELLS)
    expected = (sizes[:, None] / (n[:, None] + 1) * masses).sum(0)
    return Shares(counts, expected, low, high)


def drift_of(rule: Rule, predicted: Counts, cells: Counts, ends: Counts, level: float) -> Drift:
    """Return what the e-process says of a stream.

    With weight 1 / ((b + 1) (b + 2)) the law of the cells changes with window b = 0, 1, ... to one
    of which nothing is known beforehand (Dirichlet(1/2, ..., 1/2): Krichevsky and Trofimov, 1981):
    in the share of rejected images, in the scores of accepted ones (2, 4 or 8 cells), or in both,
    of equal weight each. These weights do not depend on how many windows there are: the promise
    holds over all looks at a growing stream together, as long as the windows stay the same.

    Args:
        rule: what is decided by.
        predicted: positions in the class list, int64 [m].
        cells: of `cells_of`, int64 [m].
        ends: of the windows.
        level: see `Drift`.
    """
    window, windows = _window_of(ends), len(ends)
    counts = _by_cell(window, cells, windows)
    usual = _log_usual(rule, predicted, cells, window, windows)
    masses = np.sum([cell_masses(category) for category in rule.categories], axis=0)
    log_e, log_e_accepted, best = np.full((3, windows), -np.inf)
    begun = np.zeros(windows, np.int64)
    for first in range(windows):
        found = _log_learned(np.cumsum(counts[first:], 0), masses) - (
            usual[:, first + 1 :] - usual[:, [first]]
        )
        rate, accepted = found[0], special.logsumexp(found[1:], axis=0) - np.log(len(RESOLUTIONS))
        whole = special.logsumexp([rate, accepted, rate + accepted], axis=0) - np.log(3)
        weight = -np.log((first + 1) * (first + 2))
        log_e[first:] = np.logaddexp(log_e[first:], weight + whole)
        log_e_accepted[first:] = np.logaddexp(log_e_accepted[first:], weight + accepted)
        better = whole > best[first:]
        begun[first:][better], best[first:][better] = first, whole[better]
    # Of the changes that have not begun by the end of window b the weight is 1 / (b + 2).
    yet = -np.log(np.arange(windows) + 2)
    log_e, log_e_accepted = np.logaddexp(log_e, yet), np.logaddexp(log_e_accepted, yet)
    seen = _first(log_e >= -np.log(level))
    start = None if seen is None else int(begun[seen + best[seen:].argmax()])
    return Drift(log_e, log_e_accepted, level, start)


def _log_usual(
    rule: Rule, predicted: Counts, cells: Counts, window: Counts, windows: int
) -> Floats:
    """Return log probabilities under the urns of all up to each window, [1 + R, windows + 1].

    Of which images are rejected, and of the accepted ones' cells by resolution.
    """
    found = np.zeros((1 + len(RESOLUTIONS), windows + 1))
    own = rule.category[predicted]
    for number, category in enumerate(rule.categories):
        rows = own == number
        counts = np.cumsum(_by_cell(window[rows], cells[rows], windows), 0)
        masses = cell_masses(category)
        for at, (of_counts, of_masses) in enumerate(zip(_cut(counts), _cut(masses), strict=True)):
            found[at, 1:] += _log_polya(of_counts, of_masses.astype(np.float64))
    return found


def _log_learned(counts: Counts, masses: Counts) -> Floats:
    """Return log probabilities of the same as `_log_usual` under laws that are learned, [1 + R, B].

    Args:
        counts: of each cell up to B times, int64 [B, 1 + CELLS].
        masses: of each cell, int64 [1 + CELLS]; where it is 0, as few calibration images make it,
            no image can be.
    """
    return np.stack(
        [
            _log_polya(of_counts, np.where(of_masses > 0, 0.5, 0.0))
            for of_counts, of_masses in zip(_cut(counts), _cut(masses), strict=True)
        ]
    )


def _log_polya(counts: Counts, masses: Floats) -> Floats:
    """Return the log probability of one sequence of draws with these counts, [...].

    Args:
        counts: of each cell, int64 [..., J].
        masses: the urn's first content, float64 [J]; what is 0 is never drawn.
    """
    there = masses > 0
    c, m = counts[..., there], masses[there]
    each = special.gammaln(m + c) - special.gammaln(m)
    total = special.gammaln(m.sum() + c.sum(-1)) - special.gammaln(m.sum())
    return each.sum(-1) - total


def _cut(cells: Counts) -> list[Counts]:
    """Return rejected and accepted of [..., 1 + CELLS], then the accepted by resolution."""
    rejected, accepted = cells[..., :1], cells[..., 1:]
    first = np.concatenate([rejected, accepted.sum(-1, keepdims=True)], -1)
    return [first] + [
        accepted.reshape(*accepted.shape[:-1], resolution, -1).sum(-1) for resolution in RESOLUTIONS
    ]


def _ranks(category: Category) -> Counts:
    """Return the ranks of the calibration scores that are cut at, int64 [CELLS], ascending.

    Where scores were left out of the table, the nearest rank that is known takes a rank's place.
    """
    k, n, table = category.k, category.n, category.table
    wanted = np.minimum(k + (n + 1 - k) * np.arange(CELLS) // CELLS, n)
    entry = np.searchsorted(table.upto, wanted)  # the first that reaches so far
    after = table.below[entry] + 1
    before = np.where(entry > 0, table.upto[entry - 1], after)
    nearest = np.where(wanted - before < after - wanted, before, after)
    return np.where(wanted >= after, wanted, nearest)


def _cuts(category: Category, seed: int, number: int) -> list[tuple[float, float]]:
    """Return value and key of the calibration scores that are cut at."""
    ranks, table = _ranks(category), category.table
    found = []
    for rank, entry in zip(
        ranks.tolist(), np.searchsorted(table.upto, ranks).tolist(), strict=True
    ):
        below, upto = int(table.below[entry]), int(table.upto[entry])
        keys = np.sort(_keys(seed, upto - below, 1 + number, below))
        found.append((float(table.values[entry]), float(keys[rank - below - 1])))
    return found


def _keys(seed: int, count: int, number: int, first: int = 0) -> Floats:
    """Return what orders equal scores, float64 [count] in [0, 1)."""
    words = draws.words(seed, 0, np.arange(first, first + count), "tie", number)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _window_of(ends: Counts) -> Counts:
    """Return the window of each image, int64 [m]."""
    return np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))


def _by_cell(window: Counts, cells: Counts, windows: int) -> Counts:
    """Return the images of each window and cell, int64 [windows, 1 + CELLS]."""
    width = 1 + CELLS
    return np.bincount(window * width + cells, minlength=windows * width).reshape(windows, width)


def _by_category(rule: Rule, predicted: Counts, window: Counts, windows: int) -> Counts:
    """Return the images of each window and category, int64 [windows, G]."""
    width = len(rule.categories)
    place = window * width + rule.category[predicted]
    return np.bincount(place, minlength=windows * width).reshape(windows, width)


def _limits(
    urns: tuple[tuple[int, int], ...], sizes: tuple[int, ...], level: float
) -> tuple[int, int]:
    """Return between which counts a sum of beta-binomials lies with probability 1 - level.

    Args:
        urns: k and n of each, as of the k-th of n calibration scores; k = 0 never counts.
        sizes: images of each.
        level: half of it is the most beyond each end.
    """
    drawn = sorted((size, k, n) for (k, n), size in zip(urns, sizes, strict=True) if size and k)
    first, law = _sum_law(tuple(drawn))
    # The largest count of which fewer are rare enough, the smallest of which more are.
    low = int(np.searchsorted(np.cumsum(law), level / 2, "right"))
    high = len(law) - 1 - int(np.searchsorted(np.cumsum(law[::-1]), level / 2, "right"))
    return first + low, first + high


@lru_cache(maxsize=1024)
def _sum_law(drawn: tuple[tuple[int, int, int], ...]) -> tuple[int, Floats]:
    """Return the law of a sum of beta-binomials (size, k, n): its first count, and from there on.

    Neighbours are added in pairs, the sums in pairs again, and what is next to impossible is left
    out: 1,000 categories of 1,000 images take a fraction of a second.
    """
    parts = [_beta_binomial(*each) for each in drawn] or [(0, np.ones(1))]
    while len(parts) > 1:
        paired = [_added(*two) for two in zip(parts[::2], parts[1::2], strict=False)]
        parts = paired + parts[len(paired) * 2 :]
    return parts[0]


def _added(one: tuple[int, Floats], other: tuple[int, Floats]) -> tuple[int, Floats]:
    direct = len(one[1]) * len(other[1]) <= _DIRECT
    add = np.convolve if direct else signal.fftconvolve
    return _trimmed(one[0] + other[0], np.asarray(add(one[1], other[1]), np.float64))


@lru_cache(maxsize=4096)
def _beta_binomial(size: int, k: int, n: int) -> tuple[int, Floats]:
    x, b = np.arange(size + 1), n + 1 - k
    log = special.betaln(x + k, size - x + b) - special.betaln(k, b)
    law = np.exp(log - np.log(size + 1) - special.betaln(size - x + 1, x + 1))
    return _trimmed(0, law)


def _trimmed(first: int, law: Floats) -> tuple[int, Floats]:
    """Leave out the ends of a law whose probability is below `_IMPOSSIBLE`."""
    start = int(np.searchsorted(np.cumsum(law), _IMPOSSIBLE))
    end = len(law) - int(np.searchsorted(np.cumsum(law[::-1]), _IMPOSSIBLE))
    return first + start, law[start:end]


def _first(where: NDArray[np.bool_]) -> int | None:
    return int(where.argmax()) if where.any() else None
