"""Rules: what is promised of all images, of each category, and of none; documents and damage."""

import copy
import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from backmix.train.decide.conformal import needed
from backmix.train.decide.rule import (
    SHRINKAGE,
    Rule,
    conditional_rule,
    global_rule,
    halves,
    rule_document,
    rule_of,
    shrunk_rule,
)

TWENTIETH, TENTH = Fraction(1, 20), Fraction(1, 10)


def names_of(count: int) -> list[str]:
    return [f"class {k}" for k in range(count)]


def drawn(random: np.random.Generator, n: int, share: Any, mean: Any) -> tuple[Any, Any]:
    """Predicted classes and scores of n known images: normal about the mean of their class."""
    classes = random.choice(len(share), n, p=share)
    return classes, random.normal(np.asarray(mean)[classes])


def rates(rule: Rule, mean: Any) -> np.ndarray:
    """Share of the known images of each class that a rule rejects, by the distribution itself."""
    return stats.norm.cdf(rule.thresholds - np.asarray(mean, float))


# --- one threshold for all ------------------------------------------------------------------------


def test_twenty_scores_by_hand() -> None:
    rule = global_rule(np.random.default_rng(0).permutation(np.arange(1.0, 21.0)), 3, TENTH)
    (category,) = rule.categories
    assert (category.n, category.k, category.threshold) == (20, 2, 2.0)
    assert category.mean_rate == 2 / 21
    assert rule.thresholds.tolist() == [2.0, 2.0, 2.0]
    accepted, p = rule.decide([0, 1, 2, 0, 1], [1.9, 2.0, 20.5, np.nan, 0.0])
    assert accepted.tolist() == [False, True, True, False, False]
    assert p[[0, 1, 2, 4]].tolist() == [2 / 21, 3 / 21, 21 / 21, 1 / 21]
    assert np.isnan(p[3])


def test_too_few_images_are_refused_with_the_number_needed() -> None:
    with pytest.raises(ValueError, match=r"^18 calibration .* 0.05: 19 are needed"):
        global_rule(np.zeros(18), 2, TWENTIETH)
    with pytest.raises(ValueError, match=r"44 .* with confidence 0.9: 45 are needed"):
        global_rule(np.zeros(44), 2, TWENTIETH, 0.9)
    with pytest.raises(ValueError, match=r"18 .*: 19 are needed"):
        conditional_rule(np.zeros(18), np.zeros(18, int), ["a", "b"], TWENTIETH)
    with pytest.raises(ValueError, match=r"37 .*: 38 are needed in two halves"):
        shrunk_rule(np.zeros(37), np.zeros(37, int), 2, TWENTIETH)


def test_scores_that_are_not_finite_are_refused_with_their_number() -> None:
    scores = np.arange(40.0)
    scores[[3, 5]] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 40 calibration images"):
        global_rule(scores, 2, TWENTIETH)


def test_equal_scores_reject_nobody_who_has_them() -> None:
    rule = global_rule(np.full(100, 3.5), 2, TWENTIETH)
    accepted, p = rule.decide([0, 1, 1], [3.5, 3.4999, 3.6])
    assert accepted.tolist() == [True, False, True]
    assert p.tolist() == [1.0, 1 / 101, 1.0]


# --- a threshold by class -------------------------------------------------------------------------


def test_classes_with_enough_images_have_their_own_scores_threshold() -> None:
    random = np.random.default_rng(1)
    classes = np.repeat([0, 1, 2, 3], [60, 100, 5, 30])
    scores = random.normal(size=len(classes)) + classes
    rule = conditional_rule(scores, classes, names_of(4), TWENTIETH)
    first, second, small = rule.categories
    assert (first.name, first.classes, first.n, first.k) == ("class 0", (0,), 60, 3)
    assert first.threshold == np.sort(scores[classes == 0])[2]
    assert (second.name, second.classes, second.n, second.k) == ("class 1", (1,), 100, 5)
    assert second.threshold == np.sort(scores[classes == 1])[4]
    # Class 2 has five images, too few: the next smaller class, 3, goes with it.
    assert (small.classes, small.calibrated_on) == ((2, 3), (2, 3))
    assert (small.n, small.k, small.threshold) == (35, 1, scores[classes >= 2].min())
    assert rule.category.tolist() == [0, 1, 2, 2]


def test_a_class_that_just_has_enough_stands_alone_and_serves_the_small_ones() -> None:
    classes = np.repeat([0, 1, 2, 3], [60, 19, 18, 9])
    scores = np.random.default_rng(1).normal(size=len(classes))
    rule = conditional_rule(scores, classes, names_of(4), TWENTIETH)
    decided = {part.classes: part.calibrated_on for part in rule.categories}
    # One image more, of the class that is decided about, and 19 are enough for class 1 alone; but
    # seen from class 2 or 3 it has no more than 19 of them with the new image.
    assert decided == {(0,): (0,), (1,): (1,), (2, 3): (1, 2, 3)}


@given(sizes=st.lists(st.integers(0, 60), min_size=2, max_size=12))
def test_every_class_is_calibrated_with_images_enough(sizes: list[int]) -> None:
    least = needed(TWENTIETH)
    classes = np.repeat(np.arange(len(sizes)), sizes)
    if len(classes) < least:
        return
    scores = np.random.default_rng(0).normal(size=len(classes))
    rule = conditional_rule(scores, classes, names_of(len(sizes)), TWENTIETH)
    decided = [class_ for part in rule.categories for class_ in part.classes]
    assert sorted(decided) == list(range(len(sizes)))
    for part in rule.categories:
        assert set(part.classes) <= set(part.calibrated_on)
        assert part.n == sum(sizes[class_] for class_ in part.calibrated_on) >= least
        if len(part.calibrated_on) > 1:  # not more classes than are needed
            assert min(sizes[class_] for class_ in part.calibrated_on) <= least
    for class_, size in enumerate(sizes):
        alone = rule.categories[rule.category[class_]].calibrated_on == (class_,)
        assert alone or size <= least or sum(s for s in sizes if s <= least) < least + 1


def test_each_class_keeps_the_rate_though_their_scores_differ() -> None:
    random, share, mean = np.random.default_rng(2), [0.5, 0.3, 0.2], [0.0, 4.0, -4.0]
    by_class, of_all = [], []
    for _ in range(1_000):
        classes, scores = drawn(random, 300, share, mean)
        by_class.append(rates(conditional_rule(scores, classes, names_of(3), TWENTIETH), mean))
        of_all.append(rates(global_rule(scores, 3, TWENTIETH), mean))
    found = np.mean(by_class, 0)
    assert (found <= 0.05 + 3 * np.std(by_class, 0) / np.sqrt(1_000)).all()
    assert (found > 0.03).all()  # of about 60, 90 and 150 images: k / (n + 1) is near 5 %
    assert np.mean(of_all, 0)[2] > 0.2  # one threshold rejects the lowest class far more


def test_small_classes_keep_the_rate_together() -> None:
    """A class is small by chance: were it pooled for that alone, its pool would reject too much.

    Three classes of about 20 images, of which 19 are enough, with low scores, and many tiny ones.
    """
    random, n = np.random.default_rng(3), 400
    share = np.array([0.5, *3 * [0.05], *20 * [0.0175]])
    mean = np.array([0.0, *3 * [-6.0], *20 * [0.0]])
    share /= share.sum()
    rejected, weight, promised = 0.0, 0.0, 0.0
    for _ in range(1_500):
        classes, scores = drawn(random, n, share, mean)
        rule = conditional_rule(scores, classes, names_of(len(share)), TWENTIETH)
        rate = rates(rule, mean)
        for part in rule.categories:
            if len(part.calibrated_on) > 1:
                of = list(part.classes)
                rejected += float((rate * share)[of].sum())
                weight += float(share[of].sum())
                promised += part.mean_rate * float(share[of].sum())
    assert weight > 100
    assert rejected / weight <= promised / weight + 0.001 <= 0.05


def test_strict_thresholds_of_classes_are_kept_as_often_as_they_say() -> None:
    random, share, mean = np.random.default_rng(4), [0.6, 0.4], [0.0, 2.0]
    kept = []
    for _ in range(1_000):
        classes, scores = drawn(random, 300, share, mean)
        rule = conditional_rule(scores, classes, names_of(2), TENTH, confidence=0.9)
        kept.append(rates(rule, mean) <= 0.1)
    assert (np.mean(kept, 0) >= 0.9 - 3 * np.sqrt(0.09 / 1_000)).all()


def test_p_values_and_decisions_agree_in_each_category() -> None:
    random = np.random.default_rng(5)
    classes, scores = drawn(random, 500, [0.6, 0.3, 0.1], [0, 3, -3])
    rule = conditional_rule(scores, classes, names_of(3), TWENTIETH)
    new_classes, new = drawn(random, 2_000, [0.4, 0.3, 0.3], [0, 2, -4])
    accepted, p = rule.decide(new_classes, new)
    level = np.array([part.mean_rate for part in rule.categories])[rule.category[new_classes]]
    assert (accepted == (p > level)).all()
    assert (accepted == (new >= rule.thresholds[new_classes])).all()
    assert 0 < accepted.mean() < 1


# --- between the two ------------------------------------------------------------------------------


def quantile_by_weights(s: np.ndarray, c: np.ndarray, class_: int, rate: float) -> float:
    """The smallest score at which the two distributions, mixed, reach the rate; term by term."""
    own = s[c == class_]
    share = len(own) / (len(own) + SHRINKAGE)
    for value in np.sort(s):
        of_own = (own <= value).mean() if len(own) else 0.0
        if share * of_own + (1 - share) * (s <= value).mean() >= rate - 1e-9:
            return float(value)
    raise AssertionError


def test_shrunk_thresholds_mix_the_distributions_by_size() -> None:
    random = np.random.default_rng(6)
    classes, scores = drawn(random, 600, [0.75, 0.22, 0.03], [0.0, 3.0, -3.0])
    classes = np.where(classes == 2, 3, classes)  # class 2 has no image at all
    rule = shrunk_rule(scores, classes, 4, TENTH)
    first, second = halves(600)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(600))
    expected = [quantile_by_weights(scores[first], classes[first], k, 0.1) for k in range(4)]
    assert rule.offsets.tolist() == expected
    rest = np.sort(scores[second] - rule.offsets[classes[second]])
    (part,) = rule.categories
    assert (part.n, part.k, part.threshold) == (300, 30, rest[29])
    assert expected[2] == np.sort(scores[first])[29]  # no image: the quantile of all
    assert len(set(expected)) >= 3


def test_shrunk_thresholds_keep_the_rate_over_all_images() -> None:
    random = np.random.default_rng(7)
    share, mean = np.array([0.6, 0.3, 0.07, 0.03]), np.array([0.0, 3.0, -3.0, 1.0])
    found = []
    for _ in range(1_000):
        classes, scores = drawn(random, 200, share, mean)
        found.append((rates(shrunk_rule(scores, classes, 4, TWENTIETH), mean) * share).sum())
    assert np.mean(found) == pytest.approx(5 / 101, abs=3 * np.std(found) / np.sqrt(1_000))


def test_halves_do_not_follow_the_order_of_the_images() -> None:
    first, second = halves(1_001)
    assert (len(first), len(second)) == (500, 501)
    assert abs(first.mean() - second.mean()) < 60  # of images in class order
    assert halves(1_001)[0].tolist() == first.tolist()


def test_an_image_at_the_offset_threshold_is_accepted() -> None:
    # In floating point (offset + threshold) may lie above a score whose rest is the threshold.
    random = np.random.default_rng(8)
    for _ in range(50):
        classes, scores = drawn(random, 80, [0.5, 0.5], [0.1, 1.7])
        rule = shrunk_rule(scores, classes, 2, TENTH)
        second = halves(80)[1]
        accepted, p = rule.decide(classes[second], scores[second])
        (part,) = rule.categories
        assert (~accepted).sum() == part.k - 1
        assert ((p <= part.mean_rate) == ~accepted).all()


# --- as a document --------------------------------------------------------------------------------


def some_rules() -> list[Rule]:
    random = np.random.default_rng(9)
    classes, scores = drawn(random, 300, [0.6, 0.35, 0.05], [0, 1, 2])
    return [
        global_rule(scores, 3, TWENTIETH),
        conditional_rule(scores, classes, names_of(3), TWENTIETH),
        shrunk_rule(scores, classes, 3, TWENTIETH, 0.9),
        global_rule(random.normal(size=20_000), 3, TWENTIETH),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_rule_comes_back_from_its_document(number: int) -> None:
    rule = some_rules()[number]
    again = rule_of(json.loads(json.dumps(rule_document(rule))))
    random = np.random.default_rng(0)
    classes, scores = random.integers(0, 3, 1_000), random.normal(0, 2, 1_000)
    for mine, others in zip(
        rule.decide(classes, scores), again.decide(classes, scores), strict=True
    ):
        assert mine.tolist() == others.tolist()
    assert again.thresholds.tolist() == rule.thresholds.tolist()
    assert [part.interval for part in again.categories] == [p.interval for p in rule.categories]
    assert rule_document(again) == rule_document(rule)


def damages() -> dict[str, Any]:
    def first(document: dict[str, Any]) -> dict[str, Any]:
        return document["categories"][0]

    return {
        "no offsets": lambda d: d.pop("offsets"),
        "offsets of text": lambda d: d.update(offsets="many"),
        "ragged offsets": lambda d: d.update(offsets=[[0], 1, 2]),
        "an infinite offset": lambda d: d.update(offsets=[float("inf"), 0, 0]),
        "a class too many": lambda d: d["offsets"].append(0.0),
        "a class too few": lambda d: d["offsets"].pop(),
        "no categories": lambda d: d.update(categories=[]),
        "categories of text": lambda d: d.update(categories=["all"]),
        "another way": lambda d: d.update(per_class="sometimes"),
        "a negative class": lambda d: first(d).update(classes=[-1]),
        "a class twice": lambda d: first(d).update(classes=[0, 1, 2]),
        "k of 0": lambda d: first(d).update(k=0),
        "another k": lambda d: first(d).update(k=first(d)["k"] + 1),
        "k of text": lambda d: first(d).update(k="one"),
        "another threshold": lambda d: first(d).update(threshold=first(d)["scores"][9]),
        "no threshold": lambda d: first(d).update(threshold=float("nan")),
        "an empty table": lambda d: first(d).update(scores=[], below=[], upto=[]),
        "a short table": lambda d: first(d)["scores"].pop(),
        "a table upside down": lambda d: first(d)["scores"].reverse(),
        "counts beyond n": lambda d: first(d).update(n=first(d)["n"] - 1),
        "counts that overlap": lambda d: first(d)["below"].__setitem__(5, 0),
        "negative counts": lambda d: first(d)["below"].__setitem__(0, -1),
        "nothing": lambda d: d.clear(),
    }


@pytest.mark.parametrize("what", damages())
def test_a_damaged_document_is_refused_in_words(what: str) -> None:
    document = copy.deepcopy(rule_document(some_rules()[1]))
    damages()[what](document)
    with pytest.raises(ValueError, match="no rule of backmix"):
        rule_of(document)
