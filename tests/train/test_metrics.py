"""The metrics against hand-worked cases, scikit-learn, and the pair-counting definition."""

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    auc,
    average_precision_score,
    f1_score,
    precision_recall_curve,
    roc_auc_score,
)

from backmix.train.metrics import (
    acceptance_threshold,
    accuracy,
    aupr_known,
    aupr_trapz,
    aupr_unknown,
    aurc,
    auroc,
    auroc_ties_lost,
    ccr_at_fpr,
    dtacc,
    fpr95_known_rejected,
    fpr95_unknown_accepted,
    macro_f1,
    oscr,
    rejection_threshold,
    risk_curve,
    roc_curve,
    with_rejection,
)

# Worked by hand (M1 pair by pair below) and by independent code. Each row: known scores, correct,
# unknown scores, then acc, AUROC, OSCR, AP known, AP unknown, trapezoid known, trapezoid unknown,
# unknown accepted and its threshold, known rejected and its threshold, DTACC.
CASES = {
    "M1 ties": (
        ([0.9, 0.8, 0.7, 0.6, 0.2], [1, 1, 0, 1, 1], [0.75, 0.5, 0.2]),
        (0.8, 0.7, 0.566667, 0.835, 0.555556, 0.825833, 0.594444),
        (1.0, 0.2, 0.6, 0.75, 0.733333),
    ),
    "M2 perfect": (
        ([3, 4, 5], [1, 1, 1], [0, 1, 2]),
        (1, 1, 1, 1, 1, 1, 1),
        (0, 3, 0, 2, 1),
    ),
    "M3 constant": (
        ([1, 1, 1, 1], [1, 1, 0, 0], [1, 1]),
        (0.5, 0.5, 0.25, 0.666667, 0.333333, 0.833333, 0.666667),
        (1, 1, 1, 1, 0.5),
    ),
    "M4 reversed": (
        ([0, 1], [1, 1], [2, 3]),
        (1, 0, 0, 0.416667, 0.416667, 0.291667, 0.291667),
        (1, 0, 1, 3, 0.5),
    ),
    "M5 wrong and sure": (
        ([0.9, 0.8, 0.3, 0.2], [0, 0, 1, 1], [0.5, 0.1]),
        (0.5, 0.75, 0.25, 0.8875, 0.75, 0.870833, 0.708333),
        (0.5, 0.2, 0.5, 0.5, 0.75),
    ),
    "M6 twenty": (
        ([i / 20 for i in range(1, 21)], [1] * 19 + [0], [0.03, 0.05, 0.10, 0.52, 1.0]),
        (0.95, 0.685, 0.64, 0.834402, 0.550476, 0.836674, 0.582373),
        (0.6, 0.10, 1.0, 1.0, 0.75),
    ),
}
BINARY = (auroc, aupr_known, aupr_unknown, fpr95_unknown_accepted, fpr95_known_rejected, dtacc)


@pytest.mark.parametrize("case", CASES)
def test_the_hand_worked_cases_come_out(case: str) -> None:
    (known, right, unknown), areas, thresholds = CASES[case]
    k, c, u = np.array(known, float), np.array(right, bool), np.array(unknown, float)
    got = (
        accuracy(c),
        auroc(k, u),
        oscr(k, c, u),
        aupr_known(k, u),
        aupr_unknown(k, u),
        aupr_trapz(k, u),
        aupr_trapz(-u, -k),
    )
    assert got == pytest.approx(areas, abs=5e-7)
    got = (
        fpr95_unknown_accepted(k, u),
        acceptance_threshold(k),
        fpr95_known_rejected(k, u),
        rejection_threshold(u),
        dtacc(k, u),
    )
    assert got == pytest.approx(thresholds, abs=5e-7)


def test_the_pairs_of_the_first_case_are_counted_by_hand() -> None:
    # .9 and .8 win 3 each, .7 and .6 win 2 each, .2 ties once: 10.5 of 15; .7 is the wrong one.
    (known, right, unknown), _, _ = CASES["M1 ties"]
    assert auroc(known, unknown) == 10.5 / 15
    assert oscr(known, np.array(right, bool), unknown) == 8.5 / 15
    assert auroc_ties_lost(known, unknown) == 10 / 15


def test_a_saturated_score_costs_what_was_worked_out() -> None:
    # 3 known images and 1 unknown one share the top value; 1 known lies below both unknown ones.
    known, unknown = [1.0, 1.0, 1.0, 0.2], [1.0, 0.5]
    assert auroc(known, unknown) == (3 * 1.5 + 0) / 8
    assert auroc_ties_lost(known, unknown) == 3 / 8


def test_ccr_at_fpr_is_strict_and_says_the_real_rate() -> None:
    unknown = np.arange(100) / 100
    known = np.array([0.945, 0.95, 0.955, 0.99])
    right = np.array([True, True, True, False])
    # The 5th largest unknown score is 0.95: only 0.955 and 0.99 lie above, the latter is wrong.
    assert ccr_at_fpr(known, right, unknown, 0.05) == (0.25, 0.04)
    assert ccr_at_fpr(known, right, unknown, 1.0) == (0.75, 0.99)


def test_a_share_is_the_decimal_number_that_was_written() -> None:
    # In binary 0.95 * 20 rounds to 19.0 and 0.07 * 100 to 7.000000000000001: ceil would give 8.
    scores = np.arange(100.0)
    assert rejection_threshold(scores, 0.07) == 6.0
    assert acceptance_threshold(np.arange(20.0)) == 1.0


values = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.25, 1.0, 3.0, math.inf])
sides = st.lists(values, min_size=1, max_size=12)


@given(sides, sides, st.data())
def test_areas_equal_their_pair_counting_definition(known, unknown, data) -> None:
    right = data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known)))
    pairs = len(known) * len(unknown)

    def half(a: float, b: float) -> Fraction:
        return Fraction(2 * (a > b) + (a == b), 2)

    won = sum(half(a, b) for a in known for b in unknown)
    scored = sum(half(a, b) for a, c in zip(known, right, strict=True) if c for b in unknown)
    strict = sum(a > b for a in known for b in unknown)
    assert auroc(known, unknown) == float(Fraction(won) / pairs)
    assert oscr(known, np.array(right), unknown) == float(Fraction(scored) / pairs)
    assert auroc_ties_lost(known, unknown) == float(Fraction(strict, pairs))


@given(sides, sides)
def test_thresholds_and_steps_equal_their_slow_definitions(known, unknown) -> None:
    def share(side: list[float], accept) -> Fraction:
        return Fraction(sum(accept(s) for s in side), len(side))

    level = Fraction(19, 20)
    t = max(t for t in known if share(known, lambda s, t=t: s >= t) >= level)
    assert acceptance_threshold(known) == t
    assert fpr95_unknown_accepted(known, unknown) == float(share(unknown, lambda s: s >= t))
    r = min(t for t in unknown if share(unknown, lambda s, t=t: s <= t) >= level)
    assert rejection_threshold(unknown) == r
    assert fpr95_known_rejected(known, unknown) == float(share(known, lambda s: s <= r))

    best = Fraction(1, 2)  # the threshold above everything
    precision = Fraction(0)
    before = Fraction(0)
    for t in sorted({*known, *unknown}, reverse=True):
        tpr, fpr = (share(side, lambda s, t=t: s >= t) for side in (known, unknown))
        best = max(best, (tpr + 1 - fpr) / 2)
        hits, false = tpr * len(known), fpr * len(unknown)
        precision += (tpr - before) * hits / (hits + false)
        before = tpr
    assert dtacc(known, unknown) == float(best)
    assert aupr_known(known, unknown) == pytest.approx(float(precision), rel=4e-16)


@given(sides, sides)
def test_areas_equal_scikit_learn(known, unknown) -> None:
    # scikit-learn refuses infinities: ranks carry the same order.
    ranks = np.unique([*known, *unknown], return_inverse=True)[1].astype(float)
    k, u = ranks[: len(known)], ranks[len(known) :]
    truth = np.r_[np.ones(len(k)), np.zeros(len(u))]
    assert auroc(k, u) == pytest.approx(roc_auc_score(truth, ranks), abs=1e-12)
    assert aupr_known(k, u) == pytest.approx(average_precision_score(truth, ranks), abs=1e-12)
    assert aupr_unknown(k, u) == pytest.approx(
        average_precision_score(1 - truth, -ranks), abs=1e-12
    )
    precision, recall, _ = precision_recall_curve(truth, ranks)
    assert aupr_trapz(k, u) == pytest.approx(auc(recall, precision), abs=1e-12)


def test_ten_thousand_real_valued_scores_equal_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    k, u = rng.normal(1, 1, 6000).round(2), rng.normal(0, 1, 4000).round(2)  # with ties
    truth = np.r_[np.ones(6000), np.zeros(4000)]
    assert auroc(k, u) == pytest.approx(roc_auc_score(truth, np.r_[k, u]), abs=1e-12)
    assert aupr_unknown(k, u) == pytest.approx(
        average_precision_score(1 - truth, -np.r_[k, u]), abs=1e-12
    )


@given(sides, sides, st.data())
def test_only_the_order_of_the_scores_counts(known, unknown, data) -> None:
    right = np.array(data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known))))
    k, u = np.array(known), np.array(unknown)
    for bent in (np.arctan, lambda s: 7 * s + 3, np.cbrt):
        for metric in BINARY:
            assert metric(bent(k), bent(u)) == metric(k, u)
        assert oscr(bent(k), right, bent(u)) == oscr(k, right, u)
        assert ccr_at_fpr(bent(k), right, bent(u), 0.3) == ccr_at_fpr(k, right, u, 0.3)


@given(sides, sides)
def test_swapping_the_sides_mirrors_the_areas(known, unknown) -> None:
    k, u = np.array(known), np.array(unknown)
    assert Fraction(auroc(k, u)).limit_denominator(999) == 1 - Fraction(
        auroc(u, k)
    ).limit_denominator(999)
    assert auroc(-u, -k) == auroc(k, u)
    assert aupr_unknown(k, u) == aupr_known(-u, -k)
    assert fpr95_known_rejected(k, u) == fpr95_unknown_accepted(-u, -k)
    assert dtacc(-u, -k) == dtacc(k, u)


@given(sides, sides, st.data())
def test_oscr_lies_below_auroc_and_accuracy(known, unknown, data) -> None:
    right = np.array(data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known))))
    assert oscr(known, right, unknown) <= min(auroc(known, unknown), accuracy(right))
    assert oscr(known, np.ones(len(known), bool), unknown) == auroc(known, unknown)


@given(sides, sides)
def test_the_curve_encloses_the_auroc(known, unknown) -> None:
    threshold, accepted, hit = roc_curve(known, unknown)
    assert float(np.trapezoid(hit, accepted)) == pytest.approx(auroc(known, unknown), abs=1e-12)
    assert (accepted[0], hit[0], accepted[-1], hit[-1]) == (0, 0, 1, 1)
    assert (np.diff(threshold[1:]) < 0).all()


@given(sides, sides, st.data())
def test_the_curve_of_the_right_ones_encloses_the_oscr(known, unknown, data) -> None:
    right = np.array(data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known))))
    _, accepted, hit = roc_curve(known, unknown, right)
    area = float(np.trapezoid(hit, accepted))
    assert area == pytest.approx(oscr(known, right, unknown), abs=1e-12)
    assert hit[-1] == accuracy(right)


def test_the_risk_of_accepting_is_counted_by_hand() -> None:
    # By score: right, wrong, right. Risks 0, 1/2, 1/3.
    assert aurc([3, 2, 1], [True, False, True]) == pytest.approx(5 / 18, abs=1e-15)
    # With an unknown image between the last two: right, wrong, unknown, right: 0, 1/2, 2/3, 2/4.
    assert aurc([3, 2, 1], [True, False, True], [1.5]) == pytest.approx(5 / 12, abs=1e-15)
    # A tie of the wrong and the right one: at the second half an error is accepted, 1/4 of risk.
    assert aurc([3, 2, 2], [True, False, True]) == pytest.approx((0 + 1 / 4 + 1 / 3) / 3, abs=1e-15)
    threshold, coverage, risk = risk_curve([3, 2, 1, 1.5], [False, True, False, True])
    assert threshold.tolist() == [3, 2, 1.5, 1]
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == [0, 0.5, 2 / 3, 0.5]


@given(sides, sides, st.data())
def test_the_area_of_risk_is_the_mean_over_all_orders_of_ties(known, unknown, data) -> None:
    known, unknown = known[:3], unknown[:2]  # 120 orders
    right = data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known)))
    pool = [*zip(known, [not r for r in right], strict=True), *((u, True) for u in unknown)]
    areas = []
    for order in itertools.permutations(pool):
        ranked = sorted(order, key=lambda image: -image[0])  # stable: ties stay in this order
        risks = [
            Fraction(sum(wrong for _, wrong in ranked[:i]), i) for i in range(1, len(ranked) + 1)
        ]
        areas.append(sum(risks) / len(risks))
    expected = float(sum(areas) / len(areas))
    assert aurc(known, np.array(right), unknown) == pytest.approx(expected, abs=1e-12)


@given(sides, st.data())
def test_the_area_of_risk_lies_between_the_best_and_the_worst_order(known, data) -> None:
    right = np.array(data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known))))
    best, worst = aurc(right.astype(float), right), aurc(-right.astype(float), right)
    assert best - 1e-12 <= aurc(known, right) <= worst + 1e-12
    constant = aurc(np.zeros(len(right)), right)
    assert constant == pytest.approx(1 - accuracy(right), abs=1e-12)


def test_macro_f1_counts_unknown_as_a_class_and_equals_scikit_learn() -> None:
    # Of class 0 one is rejected, an unknown image is taken for 1: F1 of 2/3, 2/3 and 1/2.
    predicted = with_rejection([0, 0, 1, 1, 0], [0.9, 0.3, 0.8, 0.7, 0.2], 0.5, classes=2)
    assert predicted.tolist() == [0, 2, 1, 1, 2]
    assert macro_f1([0, 0, 1, 2, 2], predicted) == pytest.approx((2 / 3 + 2 / 3 + 1 / 2) / 3)
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(7, size=500), rng.integers(6, size=500)
    assert macro_f1(labels, guesses) == pytest.approx(f1_score(labels, guesses, average="macro"))
    # A class without images and predictions is not counted as a failure.
    assert macro_f1([0, 5], [0, 5]) == 1.0


def test_a_threshold_for_f1_accepts_the_image_that_reaches_it() -> None:
    held_out = np.arange(20) / 20
    threshold = acceptance_threshold(held_out)
    assert threshold == 0.05
    assert with_rejection([0, 0], [0.05, 0.049], threshold, 1).tolist() == [0, 1]


def test_nan_is_an_error_that_names_and_counts() -> None:
    bad = np.array([1.0, math.nan, 2.0, math.nan])
    for metric in (*BINARY, auroc_ties_lost, roc_curve):
        with pytest.raises(ValueError, match="2 of 4 known scores are NaN"):
            metric(bad, np.array([1.0]))
        with pytest.raises(ValueError, match="2 of 4 unknown scores are NaN"):
            metric(np.array([1.0]), bad)


def test_infinite_log_scores_are_ranked() -> None:
    assert auroc([math.inf, 0.0], [-math.inf, math.inf]) == (0.5 + 1 + 1) / 4


def test_an_empty_side_gives_nan_and_says_which() -> None:
    for metric in BINARY:
        with pytest.warns(RuntimeWarning, match="no unknown images"):
            assert math.isnan(metric([1.0], []))
    with pytest.warns(RuntimeWarning, match="no known images"):
        assert math.isnan(oscr([], np.array([], bool), [1.0]))
    with pytest.warns(RuntimeWarning, match="no correct images"):
        assert math.isnan(accuracy([]))
    with pytest.raises(ValueError, match="1 known, 0 unknown"):
        roc_curve([1.0], [])
    with pytest.warns(RuntimeWarning, match="no known images"):
        assert math.isnan(aurc([], np.array([], bool), [1.0]))
    with pytest.warns(RuntimeWarning, match="no labels images"):
        assert math.isnan(macro_f1([], []))
    with pytest.raises(ValueError, match="needs scores, got none"):
        risk_curve([], [])


def test_wrong_shapes_and_kinds_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"known scores must be one array \[n\], got shape \(1, 2\)"
    ):
        auroc([[1.0, 2.0]], [1.0])
    with pytest.raises(ValueError, match="correct must hold booleans, got int64"):
        oscr([1.0], np.array([1]), [1.0])
    with pytest.raises(ValueError, match="2 known scores but 1 entries of correct"):
        oscr([1.0, 2.0], [True], [1.0])
    with pytest.raises(ValueError, match=r"a share must be in \(0, 1\], got 0"):
        ccr_at_fpr([1.0], [True], [1.0], 0)
    with pytest.raises(ValueError, match="labels must be class numbers from 0 on, got -1"):
        macro_f1([0, -1], [0, 1])
    with pytest.raises(
        ValueError, match=r"predicted must be one array \[n\] of class numbers, got f"
    ):
        macro_f1([0], [0.5])
    with pytest.raises(ValueError, match="2 labels but 1 predictions"):
        macro_f1([0, 1], [0])


def test_the_arrays_of_the_caller_stay_as_they_were() -> None:
    k, u, c = np.array([3.0, 1.0, 2.0]), np.array([2.5, 0.5]), np.array([True, False, True])
    for array in (k, u, c):
        array.setflags(write=False)  # a write would raise
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metric in (*BINARY, auroc_ties_lost, aupr_trapz, roc_curve):
            metric(k, u)
        oscr(k, c, u)
        aurc(k, c, u)
        roc_curve(k, u, c)
        ccr_at_fpr(k, c, u, 0.5)
    assert k.tolist() == [3.0, 1.0, 2.0]


def test_counts_beyond_float_precision_stay_exact() -> None:
    # 10^4 x 10^4 pairs of which all but one tie are won.
    known = np.arange(1.0, 10_001.0)
    unknown = np.zeros(10_000)
    unknown[0] = 1.0
    assert auroc(known, unknown) == (2 * 10**8 - 1) / (2 * 10**8)
