"""Metrics of open-set recognition: numpy in, one float in [0, 1] out.

Every score is larger for "more known"; an image is accepted where its score reaches a threshold.
Counts are int64 with half credits doubled, and there is one division at the end, so results are
exact rationals rounded once (the areas under precision-recall curves, sums of fractions, within
two units of the last place): no threshold grid, no interpolation, the same bits everywhere.

Scores may be +-inf (log scores are), never NaN. Where a mean is over nothing the result is NaN and
a RuntimeWarning says which scores were missing. The arrays of the caller are never changed.

Formulas below write k_i, i = 1..n, for the scores of known test images, c_i = 1 where such an image
got its right class, and u_j, j = 1..m, for the scores of unknown images. H(a, b) is 1 where a > b,
1/2 where a = b, else 0.
"""

import math
import warnings
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def accuracy(correct: ArrayLike) -> float:
    """Return the share of known images that got their right class, without any rejection.

    Args:
        correct: whether each known image was classified correctly, bool [n].

    >>> accuracy([True, True, False, True])
    0.75
    """
    right = _flags("correct", correct)
    if not _all_given("accuracy", correct=right):
        return math.nan
    return int(np.count_nonzero(right)) / len(right)


def auroc(known: ArrayLike, unknown: ArrayLike) -> float:
    """Return the chance that a random known image outscores a random unknown one, ties half.

    (1 / nm) * sum_ij H(k_i, u_j), the area under the ROC curve; O((n + m) log(n + m)).

    Args:
        known: scores of known images, [n].
        unknown: scores of unknown images, [m].

    >>> auroc([0.9, 0.8, 0.3], [0.1, 0.3])
    0.9166666666666666
    """
    k, u = as_scores("known", known), as_scores("unknown", unknown)
    if not _all_given("auroc", known=k, unknown=u):
        return math.nan
    return int(doubled_wins(k, u).sum()) / (2 * len(k) * len(u))


def auroc_ties_lost(known: ArrayLike, unknown: ArrayLike) -> float:
    """Return the AUROC that counts every tie as lost: (1 / nm) * sum_ij [k_i > u_j].

    Only for comparison with published results whose code counts so; it is at most `auroc`, and
    the gap is large where a saturated softmax ties many images at exactly 1.

    Args:
        known: scores of known images, [n].
        unknown: scores of unknown images, [m].

    >>> auroc_ties_lost([0.9, 0.8, 0.3], [0.1, 0.3])
    0.8333333333333334
    """
    k, u = as_scores("known", known), as_scores("unknown", unknown)
    if not _all_given("auroc_ties_lost", known=k, unknown=u):
        return math.nan
    return int(np.searchsorted(np.sort(u), k, "left").sum()) / (len(k) * len(u))


def oscr(known: ArrayLike, correct: ArrayLike, unknown: ArrayLike) -> float:
    """Return the open-set classification rate: the AUROC that a wrong class forfeits.

    (1 / nm) * sum_ij c_i H(k_i, u_j), the exact area under the share of known images that are
    correct *and* accepted, over the share of unknown images accepted, as the threshold passes
    all scores (Dhamija et al., Reducing Network Agnostophobia, 2018, with ties half). At most
    min(auroc, accuracy); a constant score gets half the accuracy.

    Args:
        known: scores of known images, [n].
        correct: whether each of them got its right class, bool [n].
        unknown: scores of unknown images, [m].

    >>> oscr([0.9, 0.8, 0.3], [True, False, True], [0.1, 0.3])
    0.5833333333333334
    """
    k, u = as_scores("known", known), as_scores("unknown", unknown)
    right = as_flags("correct", correct, len(k))
    if not _all_given("oscr", known=k, unknown=u):
        return math.nan
    return int(doubled_wins(k, u)[right].sum()) / (2 * len(k) * len(u))


def acceptance_threshold(known: ArrayLike, share: float = 0.95) -> float:
    """Return the largest score t such that k_i >= t for at least `share` of the known images.

    One of the scores themselves, never an interpolation: the ceil(share * n)-th largest. NaN
    without known images.

    Args:
        known: scores of known images, [n].
        share: in (0, 1], taken as the decimal number it is written as (0.95 = 19/20).

    >>> acceptance_threshold([0.1, 0.4, 0.6, 0.9], 0.75)
    0.4
    """
    k = as_scores("known", known)
    if not _all_given("acceptance_threshold", known=k):
        return math.nan
    return float(np.sort(k)[len(k) - ceil_share(share, len(k))])


def rejection_threshold(unknown: ArrayLike, share: float = 0.95) -> float:
    """Return the smallest score t such that u_j <= t for at least `share` of the unknown images.

    The ceil(share * m)-th smallest score; images at or below it are rejected. NaN without unknown
    images.

    Args:
        unknown: scores of unknown images, [m].
        share: in (0, 1], taken as the decimal number it is written as.

    >>> rejection_threshold([0.1, 0.4, 0.6, 0.9], 0.75)
    0.6
    """
    u = as_scores("unknown", unknown)
    if not _all_given("rejection_threshold", unknown=u):
        return math.nan
    return float(np.sort(u)[ceil_share(share, len(u)) - 1])


def fpr95_unknown_accepted(known: ArrayLike, unknown: ArrayLike) -> float:
    """Return the share of unknown images accepted where at least 95 % of the known ones are.

    (1 / m) * sum_j [u_j >= t] with t = acceptance_threshold(known). The reading of FPR95 in most
    open-set papers; 1 - this is their TNR at 95 % TPR. It can differ by tens of points from
    `fpr95_known_rejected`.

    Args:
        known: scores of known images, [n].
        unknown: scores of unknown images, [m].

    >>> fpr95_unknown_accepted([3, 4, 5], [0, 3, 2, 9])
    0.5
    """
    k, u = as_scores("known", known), as_scores("unknown", unknown)
    if not _all_given("fpr95_unknown_accepted", known=k, unknown=u):
        return math.nan
    return int(np.count_nonzero(u >= acceptance_threshold(k))) / len(u)


def fpr95_known_rejected(known: ArrayLike, unknown: ArrayLike) -> float:
    """Return the share of known images rejected where at least 95 % of the unknown ones are.

    (1 / n) * sum_i [k_i <= t] with t = rejection_threshold(unknown). The reading of FPR95 where
    unknown (out-of-distribution) is the positive class.

    Args:
        known: scores of known images, [n].
        unknown: scores of unknown images, [m].

    >>> fpr95_known_rejected([3, 4, 5, 2], [0, 3, 2])
    0.5
    """
    k, u = as_scores("known", known), as_scores("unknown", unknown)
    if not _all_given("fpr95_known_rejected", known=k, unknown=u):
        return math.nan
    return int(np.count_nonzero(k <= rejection_threshold(u))) / len(k)


def aupr_known(known: ArrayLike, unknown: ArrayLike) -> float:
    """Return the average precision with known images as the positives ("AUPR-in").

    sum_t (R_t - R_{t-1}) * P_t over the distinct scores t from above, R_t the share of known
    images at or above t and P_t the known share of all images at or above t: tied scores form one
    step. A constant score gets n / (n + m).

    Args:
        known: scores of known images, [n].
        unknown: scores of unknown images, [m].

    >>> aupr_known([0.9, 0.8, 0.3, 0.2], [0.5, 0.1])
    0.8875
    """
    k, u = as_scores("known", known), as_scores("unknown", unknown)
    if not _all_given("aupr_known", known=k, unknown=u):
        return math.nan
    return _average_precision(k, u)


def aupr_unknown(known: ArrayLike, unknown: ArrayLike) -> float:
    """Return the average precision with unknown images as the positives ("AUPR-out").

    As `aupr_known`, the scores passed from below. A constant score gets m / (n + m).

    Args:
        known: scores of known images, [n].
        unknown: scores of unknown images, [m].

    >>> aupr_unknown([3, 4, 5], [0, 1, 2])
    1.0
    """
    k, u = as_scores("known", known), as_scores("unknown", unknown)
    if not _all_given("aupr_unknown", known=k, unknown=u):
        return math.nan
    return _average_precision(-u, -k)


def aupr_trapz(positive: ArrayLike, negative: ArrayLike) -> float:
    """Return the trapezoid area under the precision-recall curve that starts at (0, 1).

    What several published tables print as AUPR; it flatters (a constant score on 4 positives and
    2 negatives gets 0.83 instead of 0.67), so it serves the comparison with such tables only.
    Known images as positives: aupr_trapz(known, unknown). Unknown ones: aupr_trapz(-unknown,
    -known).

    Args:
        positive: scores of the positives, larger = more positive, [n].
        negative: scores of the others, [m].

    >>> aupr_trapz([1, 1, 1, 1], [1, 1])
    0.8333333333333333
    """
    p, q = as_scores("positive", positive), as_scores("negative", negative)
    if not _all_given("aupr_trapz", positive=p, negative=q):
        return math.nan
    _, accepted, others = _steps(p, q)
    precision = np.concatenate([[1.0], accepted / (accepted + others)])
    gained = np.diff(accepted, prepend=0)
    return math.fsum(gained * (precision[1:] + precision[:-1])) / (2 * len(p))


def dtacc(known: ArrayLike, unknown: ArrayLike) -> float:
    """Return the detection accuracy at the best threshold, both sides weighing the same.

    max_t (TPR(t) + 1 - FPR(t)) / 2 over all thresholds, +-infinity included, so at least 1/2.

    Args:
        known: scores of known images, [n].
        unknown: scores of unknown images, [m].

    >>> dtacc([0.9, 0.8, 0.3, 0.2], [0.5, 0.1])
    0.75
    """
    k, u = as_scores("known", known), as_scores("unknown", unknown)
    if not _all_given("dtacc", known=k, unknown=u):
        return math.nan
    _, accepted, others = _steps(k, u)
    # (TPR - FPR) * nm in integers; the threshold above all scores gives 0.
    best = max(0, int((accepted * len(u) - others * len(k)).max()))
    pairs = len(k) * len(u)
    return (best + pairs) / (2 * pairs)


def ccr_at_fpr(
    known: ArrayLike, correct: ArrayLike, unknown: ArrayLike, fpr: float
) -> tuple[float, float]:
    """Return the correct-classification rate at a rate of accepted unknowns, and the real rate.

    With t = the ceil(fpr * m)-th largest unknown score: (1 / n) * sum_i c_i [k_i > t] and
    (1 / m) * sum_j [u_j > t]. The published convention is strict (s > t), so the realised rate
    lies below the one asked for: 0.04 at 0.05 of 100 unknown images. Print it beside.

    Args:
        known: scores of known images, [n].
        correct: whether each of them got its right class, bool [n].
        unknown: scores of unknown images, [m].
        fpr: in (0, 1], taken as the decimal number it is written as.

    >>> ccr_at_fpr([0.9, 0.8, 0.3], [True, False, True], [0.1, 0.5, 0.7, 0.85], 0.5)
    (0.3333333333333333, 0.25)
    """
    k, u = as_scores("known", known), as_scores("unknown", unknown)
    right = as_flags("correct", correct, len(k))
    if not _all_given("ccr_at_fpr", known=k, unknown=u):
        return math.nan, math.nan
    threshold = np.sort(u)[len(u) - ceil_share(fpr, len(u))]
    accepted = int(np.count_nonzero(k[right] > threshold))
    return accepted / len(k), int(np.count_nonzero(u > threshold)) / len(u)


def roc_curve(
    known: ArrayLike, unknown: ArrayLike, counted: ArrayLike | None = None
) -> tuple[Floats, Floats, Floats]:
    """Return (threshold, share of unknown accepted, share of known accepted) for plotting.

    One point per distinct score from above, images at or above the threshold being accepted;
    before them the point (inf, 0, 0). Straight lines between the points enclose `auroc`; a tie of
    known and unknown scores is a sloped piece, as its half credit has it.

    Args:
        known: scores of known images, [n], n > 0.
        unknown: scores of unknown images, [m], m > 0.
        counted: which known images count when accepted, bool [n]; None = all. With those of the
            right class the curve encloses `oscr` instead, and ends at the accuracy.

    Raises:
        ValueError: where a side is empty; there is no curve then.

    >>> threshold, unknown_accepted, known_accepted = roc_curve([2, 1], [1])
    >>> unknown_accepted.tolist(), known_accepted.tolist()
    ([0.0, 0.0, 1.0], [0.0, 0.5, 1.0])
    """
    k, u = as_scores("known", known), as_scores("unknown", unknown)
    if not len(k) or not len(u):
        raise ValueError(
            f"a ROC curve needs scores on both sides, got {len(k)} known, {len(u)} unknown"
        )
    values, accepted, others = _steps(k, u)
    if counted is not None:
        right = k[as_flags("counted", counted, len(k))]
        accepted = len(right) - np.searchsorted(np.sort(right), values, "left")
    return (
        np.concatenate([[np.inf], values]),
        np.concatenate([[0.0], others / len(u)]),
        np.concatenate([[0.0], accepted / len(k)]),
    )


def risk_curve(scores: ArrayLike, wrong: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Return (threshold, coverage, risk) of accepting the images whose score reaches a threshold.

    One point per distinct score from above. Coverage is the share of all images that is accepted,
    risk the share of the accepted that is wrong (El-Yaniv and Wiener, 2010). What counts as wrong
    is the caller's choice; `aurc` names the two that are common.

    Args:
        scores: of all images, larger = accepted earlier, [n], n > 0.
        wrong: whether accepting each of them is an error, bool [n].

    >>> threshold, coverage, risk = risk_curve([3, 2, 2, 1], [False, True, False, True])
    >>> coverage.tolist(), [round(r, 4) for r in risk.tolist()]
    ([0.25, 0.75, 1.0], [0.0, 0.3333, 0.5])
    """
    s = as_scores("", scores)
    error = as_flags("wrong", wrong, len(s))
    if not len(s):
        raise ValueError("a risk-coverage curve needs scores, got none")
    values, errors, fine = _steps(s[error], s[~error])
    accepted = errors + fine
    return values, accepted / len(s), errors / accepted


def aurc(known: ArrayLike, correct: ArrayLike, unknown: ArrayLike = ()) -> float:
    """Return the area under the risk-coverage curve, the mean risk over all coverages.

    Less is better. (1 / N) * sum_{i = 1..N} (errors among the i images of the largest scores) / i
    (Geifman et al., Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, 2019). Two
    readings, by what is given:

    - known images alone, N = n: an error is a wrong class. How well the score finds the
      classifier's own mistakes.
    - known and unknown images, N = n + m: every accepted unknown image is an error, too (Xia and
      Bouganis, Augmenting Softmax Information for Selective Classification with
      Out-of-Distribution Data, 2022). It depends on the share of unknown images m / N, so it
      compares scores on one pair of sets and nothing else.

    Within a run of equal scores the errors are spread evenly, the mean over all orders of the run:
    a constant score gets the share of errors.

    Args:
        known: scores of known images, [n].
        correct: whether each of them got its right class, bool [n].
        unknown: scores of unknown images, [m]; empty = the first reading.

    >>> aurc([3, 2, 1], [True, False, True]) == (0 / 1 + 1 / 2 + 1 / 3) / 3
    True
    """
    k, u = as_scores("known", known), as_scores("unknown", unknown)
    right = as_flags("correct", correct, len(k))
    if not _all_given("aurc", known=k):
        return math.nan
    _, errors, fine = _steps(np.concatenate([k[~right], u]), k[right])
    size = np.diff(errors + fine, prepend=0)
    gained = np.diff(errors, prepend=0)
    # At the j-th of a run of equal scores: the errors before it and j / size of its own.
    place = np.arange(1, len(k) + len(u) + 1)
    before = np.repeat(errors - gained, size)
    within = place - np.repeat(errors + fine - size, size)
    # One division of integers each: (before + within * gained / size) / place.
    runs = np.repeat(size, size)
    count = before * runs + within * np.repeat(gained, size)
    return math.fsum(count / (runs * place)) / len(place)


def macro_f1(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Return the mean over the classes of F1 = 2 TP / (2 TP + FP + FN).

    With K known classes, "unknown" is one class more: a rejected image is predicted as K, and
    unknown images have the label K (`with_rejection` makes both). The mean is over the classes that
    have an image or a prediction, K + 1 where all are there.

    Args:
        labels: class of every image, integers >= 0, [n].
        predicted: class given to each, [n].

    >>> macro_f1([0, 0, 1, 2], [0, 2, 2, 2])  # F1 of 2/3, 0 and 1/2
    0.38888888888888884
    """
    y, guess = (
        _classes(name, array) for name, array in (("labels", labels), ("predicted", predicted))
    )
    if len(y) != len(guess):
        raise ValueError(f"{len(y)} labels but {len(guess)} predictions")
    if not _all_given("macro_f1", labels=y):
        return math.nan
    classes = int(max(y.max(), guess.max())) + 1
    hits = np.bincount(y[y == guess], minlength=classes)
    total = np.bincount(y, minlength=classes) + np.bincount(guess, minlength=classes)
    there = total > 0
    return math.fsum(2 * hits[there] / total[there]) / int(there.sum())


def with_rejection(
    predicted: ArrayLike, scores: ArrayLike, threshold: float, classes: int
) -> NDArray[np.int64]:
    """Return the predictions of an open-set classifier: `classes` where an image is rejected.

    Args:
        predicted: class of the largest logit, 0 .. classes - 1, [n].
        scores: larger = more known, [n].
        threshold: an image is accepted where its score is at least this. It must come from
            held-out known images (`acceptance_threshold` of their scores), never from the test set.
        classes: number K of known classes; the class "unknown" is number K.

    Returns int64 [n].

    >>> with_rejection([0, 1, 1], [0.9, 0.2, 0.5], 0.5, 2).tolist()
    [0, 2, 1]
    """
    s = as_scores("", scores)
    return np.where(s >= threshold, _classes("predicted", predicted), classes)


def doubled_wins(known: Floats, unknown: Floats) -> Ints:
    """Return 2 * sum_j H(k_i, u_j) of every known image, int64 [n]."""
    ranked, order = np.sort(unknown), np.argsort(known)
    rising = known[order]  # what is looked up in order is found some three times as fast
    wins = np.empty(len(known), np.int64)
    # below + (below or tied) counts a win as 2 and a tie as 1.
    wins[order] = np.searchsorted(ranked, rising, "left") + np.searchsorted(ranked, rising, "right")
    return wins


def _steps(positive: Floats, negative: Floats) -> tuple[Floats, Ints, Ints]:
    """Return the distinct scores from above and how many of each side lie at or above them."""
    values, place = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    at = np.bincount(place[: len(positive)], minlength=len(values))
    other = np.bincount(place[len(positive) :], minlength=len(values))
    return values[::-1], np.cumsum(at[::-1]), np.cumsum(other[::-1])


def _average_precision(positive: Floats, negative: Floats) -> float:
    _, accepted, others = _steps(positive, negative)
    gained = np.diff(accepted, prepend=0)
    # gained * accepted stays an integer, so each step is rounded once, in its division.
    return math.fsum(gained * accepted / (accepted + others)) / len(positive)


def ceil_share(share: float, count: int) -> int:
    """Return ceil(share * count) of the number as it was written: 0.07 of 100 is 7, not 8."""
    exact = Fraction(str(share)) if math.isfinite(share) else Fraction(0)
    if not 0 < exact <= 1:
        raise ValueError(f"a share must be in (0, 1], got {share}")
    return math.ceil(exact * count)


def as_scores(name: str, values: ArrayLike) -> Floats:
    """Return scores as float64 [n]; ValueError where they are no such array or hold NaN."""
    array = np.asarray(values, np.float64)
    what = f"{name} scores".strip()
    if array.ndim != 1:
        raise ValueError(f"the {what} must be one array [n], got shape {array.shape}")
    missing = int(np.count_nonzero(np.isnan(array)))
    if missing:
        raise ValueError(f"{missing} of {len(array)} {what} are NaN: they cannot be ranked")
    return array


def _classes(name: str, values: ArrayLike) -> Ints:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} must be one array [n] of class numbers, got {array.dtype} {array.shape}"
        )
    if array.size and array.min() < 0:
        raise ValueError(f"{name} must be class numbers from 0 on, got {array.min()}")
    return array.astype(np.int64)


def _flags(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.size and array.dtype != np.bool_:
        raise ValueError(f"{name} must hold booleans, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must be one array [n], got shape {array.shape}")
    return array.astype(np.bool_)


def as_flags(name: str, values: ArrayLike, count: int) -> NDArray[np.bool_]:
    """Return flags as bool [count]; ValueError where they are no such array."""
    array = _flags(name, values)
    if len(array) != count:
        raise ValueError(f"{count} known scores but {len(array)} entries of {name}")
    return array


def _all_given(metric: str, **arrays: np.ndarray) -> bool:
    missing = [name for name, array in arrays.items() if not len(array)]
    if missing:
        # Neither 0 nor 1 would be true; the caller sees NaN and learns why.
        reason = f"{metric} has no {' and no '.join(missing)} images to count: the result is NaN"
        warnings.warn(reason, RuntimeWarning, stacklevel=3)
    return not missing
