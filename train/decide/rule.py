"""What is decided by: thresholds of a score, one for all images or by predicted class.

An image is accepted where its score is at least the threshold of its predicted class. Classes that
share a threshold are a category, calibrated by itself on the calibration images predicted as one of
its classes (Mondrian conformal prediction: Vovk et al., 2005), so that the promise holds within
each category. Conditioning is on the predicted class: the true one is not known when it matters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from backmix.pipeline import draws
from backmix.train.decide.conformal import (
    Floats,
    PValues,
    needed,
    rank,
    rate_interval,
    strict_rank,
    threshold_at,
)

PerClass = Literal["off", "conditional", "shrunk"]
SHRINKAGE = 100
"""Calibration images of a class at which its own scores weigh as much as those of all classes."""


@dataclass(frozen=True, eq=False)
class Category:
    """Classes that share a promise."""

    name: str
    classes: tuple[int, ...]
    """Those whose images it decides about: positions in the run's class list."""
    calibrated_on: tuple[int, ...]
    """Those whose images it was calibrated on: the same, or some more."""
    n: int
    """Calibration images predicted as one of these."""
    k: int
    """Rank of the threshold among their scores, 1 .. n."""
    threshold: float
    table: PValues

    @property
    def mean_rate(self) -> float:
        """Share of known images of the category that is rejected, on the average."""
        return self.k / (self.n + 1)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share that this very threshold rejects."""
        return rate_interval(self.n, self.k)


@dataclass(frozen=True, eq=False)
class Rule:
    """How images are decided about; K classes."""

    per_class: PerClass
    """off: one category. conditional: one for each class with enough calibration images, and one
    for all the others together. shrunk: one category, whose scores are less the class's offset."""
    offsets: Floats
    """float64 [K]: taken from the score first, by predicted class; 0 unless shrunk."""
    category: NDArray[np.int64]
    """int64 [K]: the category of each predicted class."""
    categories: tuple[Category, ...]

    @property
    def thresholds(self) -> Floats:
        """float64 [K]: of the score, by predicted class."""
        own = np.array([category.threshold for category in self.categories])
        return self.offsets + own[self.category]

    def decide(self, predicted: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
        """Return which images are accepted, bool [n], and their p-values, float64 [n].

        Args:
            predicted: position in the run's class list, int [n].
            scores: float64 [n]; a NaN is not accepted, and its p-value is NaN.
        """
        classes, s = np.asarray(predicted, np.int64), np.asarray(scores, np.float64)
        own, rest = self.category[classes], s - self.offsets[classes]
        accepted, p = np.zeros(len(s), bool), np.full(len(s), np.nan)
        for number in np.unique(own).tolist():
            rows, category = own == number, self.categories[number]
            # What was compared in calibrating: less the offset, not with it added to the threshold.
            accepted[rows] = rest[rows] >= category.threshold
            p[rows] = category.table.of_scores(rest[rows])
        return accepted, p


def global_rule(
    scores: ArrayLike, classes: int, rate: Fraction, confidence: float | None = None
) -> Rule:
    """Return one threshold for all images.

    Args:
        scores: of the calibration images, float64 [n].
        classes: K.
        rate: share of known images that may be rejected.
        confidence: that this very threshold keeps the rate; None = on the average it does.

    Raises:
        ValueError: too few images, with the number needed.
    """
    whole = _of_all(_scores(scores), classes, rate, confidence)
    return Rule("off", np.zeros(classes), np.zeros(classes, np.int64), (whole,))


def conditional_rule(
    scores: ArrayLike,
    predicted: ArrayLike,
    names: Sequence[str],
    rate: Fraction,
    confidence: float | None = None,
) -> Rule:
    """Return a threshold for each class that has enough images, and one for the others together.

    A class with fewer calibration images predicted as it than `needed` is calibrated together with
    all such classes and, until these have enough, with the next smaller ones: the promise then
    holds for them as a whole, no more for each of them. Which classes go together for an image to
    be decided about is found as if it were a calibration image more of its predicted class. Chosen
    from the calibration images alone, a class would be among the small ones because it happens to
    have few images, and those few would stand for too small a share of what is to come. (So a class
    that just has enough is calibrated by itself, and its images serve the small ones, too.)

    With `confidence`, it is exact for classes with a threshold of their own, and nearly so for
    those that share one.

    Args:
        scores: of the calibration images, float64 [n].
        predicted: their classes, int [n].
        names: of the classes.
        rate, confidence: as for `global_rule`.

    Raises:
        ValueError: too few images for any threshold, with the number needed.
    """
    s, c = _scores(scores), np.asarray(predicted, np.int64)
    least, sizes = needed(rate, confidence), np.bincount(c, minlength=len(names))
    if len(s) < least:
        raise too_few(len(s), least, rate, confidence)
    deciding: dict[tuple[int, ...], list[int]] = {}
    for class_ in range(len(names)):
        deciding.setdefault(_together(sizes, class_, least), []).append(class_)
    made, category = [], np.zeros(len(names), np.int64)
    for number, (members, classes) in enumerate(deciding.items()):
        category[classes] = number
        rows = np.isin(c, members)
        made.append(
            _category(
                _named(names, classes, members), tuple(classes), members, s[rows], rate, confidence
            )
        )
    return Rule("conditional", np.zeros(len(names)), category, tuple(made))


def _named(names: Sequence[str], classes: Sequence[int], members: Sequence[int]) -> str:
    """Return what a category is called: its classes, and whether others lend it their images."""
    own = ", ".join(names[class_] for class_ in classes[:3])
    own += f" and {len(classes) - 3:,} more" if len(classes) > 3 else ""
    if len(members) == 1:
        return own
    return (
        f"{own} (with all of {len(members):,} classes)" if len(classes) == 1 else f"{own} together"
    )


def _together(sizes: NDArray[np.int64], class_: int, least: int) -> tuple[int, ...]:
    """Return the classes on whose images one class is calibrated, ascending.

    A function of the numbers of images with the one that is to be decided about among them, and of
    nothing else, so that this image and the calibration images stay exchangeable.
    """
    counted = sizes.copy()
    counted[class_] += 1
    order = np.argsort(counted, kind="stable")
    few = max(
        int(np.count_nonzero(counted <= least)),
        1 + int(np.searchsorted(np.cumsum(counted[order]), least + 1)),
    )
    pool = order[:few] if counted[order[0]] <= least else order[:0]
    return tuple(sorted(pool.tolist())) if class_ in pool else (class_,)


def shrunk_rule(
    scores: ArrayLike,
    predicted: ArrayLike,
    classes: int,
    rate: Fraction,
    confidence: float | None = None,
) -> Rule:
    """Return thresholds by class, each between the class's own and that of all classes.

    From one half of the images: t_c = the smallest s with l F_c(s) + (1 - l) F(s) >= rate, where
    F_c is the distribution of the class's scores, F that of all, l = n_c / (n_c + `SHRINKAGE`).
    That promises nothing by itself. The threshold of s - t_c, one for all classes, is calibrated on
    the other half, which restores the promise over all images together; of a single class nothing
    is promised.

    Args:
        scores: of the calibration images, float64 [n].
        predicted: their classes, int [n].
        classes: K.
        rate, confidence: as for `global_rule`.

    Raises:
        ValueError: too few images, with the number needed.
    """
    s, c = _scores(scores), np.asarray(predicted, np.int64)
    if len(s) < 2 * (least := needed(rate, confidence)):
        raise too_few(len(s), 2 * least, rate, confidence, " in two halves")
    first, second = halves(len(s))
    offsets = _shrunk(s[first], c[first], classes, float(rate))
    rest = s[second] - offsets[c[second]]
    whole = _of_all(rest, classes, rate, confidence)
    return Rule("shrunk", offsets, np.zeros(classes, np.int64), (whole,))


def halves(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of n images in two drawn halves: of offsets, and of the threshold."""
    order = np.argsort(draws.words(0, 0, np.arange(n), "holdout", 2), kind="stable")
    return order[: n // 2], order[n // 2 :]


def _shrunk(s: Floats, c: NDArray[np.int64], classes: int, rate: float) -> Floats:
    """Return the mixed quantile of each class, float64 [K]."""
    order = np.argsort(s, kind="stable")
    s, c, n = s[order], c[order], len(s)
    found = np.empty(classes)
    for class_ in range(classes):
        own = c == class_
        size = int(own.sum())
        share = size / (size + SHRINKAGE)
        weight = np.full(n, (1 - share) / n)
        weight[own] += share / max(size, 1)
        reached = np.flatnonzero(np.cumsum(weight) >= rate - 1e-9)
        found[class_] = s[reached[0]]
    return found


def _of_all(s: Floats, classes: int, rate: Fraction, confidence: float | None) -> Category:
    everything = tuple(range(classes))
    return _category("all classes", everything, everything, s, rate, confidence)


def _category(
    name: str,
    classes: tuple[int, ...],
    calibrated_on: tuple[int, ...],
    s: Floats,
    rate: Fraction,
    confidence: float | None,
) -> Category:
    n = len(s)
    k = rank(n, rate) if confidence is None else strict_rank(n, rate, confidence)
    if not k:
        raise too_few(n, needed(rate, confidence), rate, confidence)
    threshold = threshold_at(s, k)
    return Category(name, classes, calibrated_on, n, k, threshold, PValues.of(s, threshold))


def too_few(
    n: int, least: int, rate: Fraction, confidence: float | None, how: str = ""
) -> ValueError:
    """Return the error that says how many calibration images are needed.

    Args:
        n: images that there are.
        least: images that are needed.
        rate, confidence: as for `global_rule`.
        how: what is done with them, where that doubles the number.
    """
    sure = "" if confidence is None else f" with confidence {confidence:g}"
    return ValueError(
        f"{n:,} calibration images are too few for a rejection rate of {float(rate):g}{sure}: "
        f"{least:,} are needed{how}, or a larger rate"
    )


def _scores(scores: ArrayLike) -> Floats:
    s = np.asarray(scores, np.float64)
    bad = int(np.count_nonzero(~np.isfinite(s)))
    if bad:
        raise ValueError(
            f"{bad} of {len(s)} calibration images have a score that is NaN or infinite: the "
            "model has diverged, or the images are damaged"
        )
    return s


def rule_document(rule: Rule) -> dict[str, Any]:
    """Return a rule as plain JSON values."""
    return {
        "per_class": rule.per_class,
        "offsets": rule.offsets.tolist(),
        "categories": [
            {
                "name": category.name,
                "classes": list(category.classes),
                "calibrated_on": list(category.calibrated_on),
                "n": category.n,
                "k": category.k,
                "threshold": category.threshold,
                "mean_rate": category.mean_rate,
                "interval": list(category.interval),
                "scores": category.table.values.tolist(),
                "below": category.table.below.tolist(),
                "upto": category.table.upto.tolist(),
            }
            for category in rule.categories
        ],
    }


def rule_of(document: dict[str, Any]) -> Rule:
    """Return the rule of a document of `rule_document`.

    Raises:
        ValueError: the document is no such thing, and what is wrong with it.
    """
    try:
        offsets = np.array(document["offsets"], np.float64)
        made = tuple(_category_of(part) for part in document["categories"])
        category = np.full(len(offsets), -1, np.int64)
        for number, part in enumerate(made):
            if not set(part.classes) | set(part.calibrated_on) <= set(range(len(offsets))):
                raise ValueError(f"category {part.name!r} has a class that there is not")
            if (category[list(part.classes)] >= 0).any():
                raise ValueError(f"a class of category {part.name!r} is in another one, too")
            category[list(part.classes)] = number
        rule = Rule(document["per_class"], offsets, category, made)
        if wrong := _wrong(rule):
            raise ValueError(wrong)
    except (KeyError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"no rule of backmix: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"no rule of backmix: {error}") from error
    return rule


def _category_of(part: dict[str, Any]) -> Category:
    table = PValues(
        int(part["n"]),
        np.array(part["scores"], np.float64),
        np.array(part["below"], np.int64),
        np.array(part["upto"], np.int64),
    )
    return Category(
        str(part["name"]),
        tuple(map(int, part["classes"])),
        tuple(map(int, part["calibrated_on"])),
        table.n,
        int(part["k"]),
        float(part["threshold"]),
        table,
    )


def _wrong(rule: Rule) -> str:
    """Return what cannot be in a rule, or nothing."""
    if rule.per_class not in ("off", "conditional", "shrunk"):
        return f"per_class is {rule.per_class!r}"
    if not len(rule.offsets) or (rule.category < 0).any():
        return "a class has no category"
    if not np.isfinite(rule.offsets).all():
        return "an offset is not finite"
    for part in rule.categories:
        table = part.table
        flat = all(array.ndim == 1 for array in (table.values, table.below, table.upto))
        if not flat or not len(table.values) == len(table.below) == len(table.upto) >= 1:
            return f"category {part.name!r} has no table of p-values"
        finite = np.isfinite(table.values).all() and (np.diff(table.values) > 0).all()
        # Each entry holds at least one score, and the next one begins where it ends, or later.
        inside = (table.below < table.upto).all() and (table.upto[:-1] <= table.below[1:]).all()
        if not (finite and inside and 0 <= table.below[0] and table.upto[-1] <= table.n):
            return f"the table of category {part.name!r} is not in order"
        at = np.flatnonzero(table.values == part.threshold)
        if not len(at) or not table.below[at[0]] < part.k <= table.upto[at[0]]:
            return f"the threshold of category {part.name!r} is not score number {part.k}"
    return ""
