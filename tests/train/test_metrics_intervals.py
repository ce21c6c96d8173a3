"""Confidence intervals against the slow formula, the bootstrap, and what they promise: coverage."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmix.train import metrics
from backmix.train.intervals import (
    auroc_interval,
    bootstrap,
    delong,
    difference,
    fpr95_intervals,
    oscr_interval,
)

Z = 1.959963984540054  # of 95 %, two-sided


def slow_delong(known, correct, unknown) -> tuple[np.ndarray, np.ndarray]:
    """Return areas and covariance by the placements of DeLong et al., pair by pair."""
    placed_known, placed_unknown = [], []
    for k, c, u in zip(known, correct, unknown, strict=True):
        half = [[c[i] * ((a > b) + (a == b) / 2) for b in u] for i, a in enumerate(k)]
        placed_known.append([sum(row) / len(u) for row in half])
        placed_unknown.append([sum(column) / len(k) for column in zip(*half, strict=True)])
    areas = [sum(row) / len(row) for row in placed_known]
    spread = np.zeros((len(known), len(known)))
    for placed in (placed_known, placed_unknown):
        n = len(placed[0])
        for a, one in enumerate(placed):
            for b, two in enumerate(placed):
                both = sum((x - areas[a]) * (y - areas[b]) for x, y in zip(one, two, strict=True))
                spread[a, b] += both / (n - 1) / n
    return np.array(areas), spread


values = st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 1.0, 3.0, math.inf])


@given(st.integers(2, 7), st.integers(2, 7), st.data())
def test_areas_and_covariances_equal_the_sum_over_pairs(n, m, data) -> None:
    def rows(length, of=values):
        row = st.lists(of, min_size=length, max_size=length)
        return data.draw(st.lists(row, min_size=3, max_size=3))

    known, unknown, correct = rows(n), rows(m), rows(n, st.booleans())
    areas, spread = delong(known, unknown, np.array(correct))
    expected = slow_delong(known, correct, unknown)
    np.testing.assert_allclose(areas, expected[0], atol=1e-12)
    np.testing.assert_allclose(spread, expected[1], atol=1e-12)
    for row in range(3):
        right = np.array(correct[row])
        assert areas[row] == pytest.approx(metrics.oscr(known[row], right, unknown[row]))


def test_an_interval_is_worked_by_hand() -> None:
    # Pairs won: 2, 2, 1 of 2 by the known, 3 and 2 of 3 against the unknown: area 5/6. Variances
    # of (1, 1, 1/2) and (1, 2/3): 1/12 and 1/18.
    interval = auroc_interval([3, 2, 1], [0, 1.5])
    assert interval.value == 5 / 6
    error = math.sqrt(1 / 12 / 3 + 1 / 18 / 2)
    odds, width = math.log(5), Z * error / (5 / 36)
    assert interval.low == pytest.approx(1 / (1 + math.exp(width - odds)))
    assert interval.high == pytest.approx(1 / (1 + math.exp(-width - odds)))


def test_the_interval_of_an_area_covers_what_it_promises() -> None:
    # Two normals one and two standard deviations apart: the true area is Phi(d / sqrt 2).
    rng = np.random.default_rng(1)
    for distance in (1.0, 2.5):
        true = NormalDist().cdf(distance / math.sqrt(2))
        held = 0
        for _ in range(400):
            interval = auroc_interval(rng.normal(distance, 1, 60), rng.normal(0, 1, 80), 0.9)
            held += interval.low <= true <= interval.high
        # Of 400 at 90 % the count has a standard deviation of 6.
        assert 340 <= held <= 384


def test_delong_agrees_with_the_bootstrap() -> None:
    rng = np.random.default_rng(2)
    known, unknown = rng.normal(1.2, 1, 300).round(1), rng.normal(0, 1, 200).round(1)
    right = rng.random(300) < 0.8
    for interval, drawn in (
        (
            auroc_interval(known, unknown),
            bootstrap(metrics.auroc, [known], [unknown], replicates=4000),
        ),
        (
            oscr_interval(known, right, unknown),
            bootstrap(metrics.oscr, [known, right], [unknown], replicates=4000),
        ),
    ):
        assert interval.value == drawn.value
        # The ends of 4000 replicates scatter by about 1 % of the width; at 90 % instead of 95 %
        # each would lie 8 % further in.
        width = interval.high - interval.low
        assert interval.low == pytest.approx(drawn.low, abs=0.05 * width)
        assert interval.high == pytest.approx(drawn.high, abs=0.05 * width)


def test_a_paired_difference_agrees_with_the_bootstrap_and_is_narrower() -> None:
    rng = np.random.default_rng(3)
    easy, hard = rng.normal(1.5, 1, 250), rng.normal(0, 1, 250)
    first = easy + rng.normal(0, 0.3, 250), hard + rng.normal(0, 0.3, 250)
    second = easy + rng.normal(0.3, 0.3, 250), hard + rng.normal(0, 0.3, 250)
    found = difference(first, second)

    def change(a, b, c, d):
        return metrics.auroc(b, d) - metrics.auroc(a, c)

    drawn = bootstrap(change, [first[0], second[0]], [first[1], second[1]])
    width = found.high - found.low
    assert found.value == pytest.approx(drawn.value)
    assert found.low == pytest.approx(drawn.low, abs=0.15 * width)
    assert found.high == pytest.approx(drawn.high, abs=0.15 * width)
    one, two = auroc_interval(*first), auroc_interval(*second)
    assert width < 0.6 * math.hypot(one.high - one.low, two.high - two.low)
    assert found.low > 0  # beyond luck, though the two intervals overlap
    assert two.low < one.high


def test_a_difference_of_oscr_takes_each_networks_own_mistakes() -> None:
    rng = np.random.default_rng(4)
    known, unknown = rng.normal(1, 1, 50), rng.normal(0, 1, 40)
    first, second = rng.random(50) < 0.6, rng.random(50) < 0.9
    found = difference((known, unknown), (known, unknown), (first, second))
    change = metrics.oscr(known, second, unknown) - metrics.oscr(known, first, unknown)
    assert found.value == pytest.approx(change)
    _, spread = slow_delong([known, known], [first, second], [unknown, unknown])
    error = math.sqrt(spread[0, 0] + spread[1, 1] - 2 * spread[0, 1])
    assert found.high - found.value == pytest.approx(Z * error)


def test_equal_scores_do_not_differ() -> None:
    rng = np.random.default_rng(5)
    same = rng.normal(1, 1, 30), rng.normal(0, 1, 30)
    found = difference(same, (7 * same[0] + 1, 7 * same[1] + 1))  # the same order
    assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-7)


def test_a_perfect_score_is_not_called_certain() -> None:
    # Ten disjoint pairs, all won: at area A that happens with chance A^10 or less.
    interval = auroc_interval(np.arange(10) + 100, np.arange(30))
    assert (interval.value, interval.high) == (1, 1)
    assert interval.low**10 == pytest.approx(0.025)
    mirrored = auroc_interval(np.arange(30), np.arange(10) + 100)
    assert (mirrored.value, mirrored.low) == (0, 0)
    assert mirrored.high == pytest.approx(1 - interval.low)
    assert auroc_interval([1.0], [0.0, 0.5]).ends == [0, 1]
    constant = auroc_interval(np.zeros(9), np.zeros(7))
    assert (constant.value, constant.ends) == (0.5, [0.5, 0.5])


@given(st.lists(values, min_size=2, max_size=9), st.lists(values, min_size=2, max_size=9))
def test_an_interval_holds_its_value_and_stays_a_share(known, unknown) -> None:
    for interval in (auroc_interval(known, unknown), *fpr95_intervals(known, unknown)):
        assert 0 <= interval.low <= interval.high <= 1
    interval = auroc_interval(known, unknown)
    assert interval.low - 1e-12 <= interval.value <= interval.high + 1e-12
    assert interval.value == metrics.auroc(known, unknown)


def test_fpr_intervals_are_those_of_drawing_images_anew() -> None:
    rng = np.random.default_rng(6)
    known, unknown = rng.normal(1.5, 1, 150).round(2), rng.normal(0, 1, 90).round(2)
    accepted, rejected = fpr95_intervals(known, unknown)
    for interval, figure in (
        (accepted, metrics.fpr95_unknown_accepted),
        (rejected, metrics.fpr95_known_rejected),
    ):
        drawn = bootstrap(figure, [known], [unknown], replicates=3000)
        assert interval.value == drawn.value == figure(known, unknown)
        assert interval.low == pytest.approx(drawn.low, abs=0.03)
        assert interval.high == pytest.approx(drawn.high, abs=0.03)
        assert interval.high - interval.low > 0.1


def test_an_image_at_the_threshold_is_beyond_it_in_an_interval_too() -> None:
    same = np.ones(30)
    for interval in fpr95_intervals(same, same):
        # All of 30 images: at share p that happens with chance p^30.
        assert (interval.value, interval.high) == (1, 1)
        assert interval.low**30 == pytest.approx(0.025)


def test_no_image_of_a_few_beyond_the_threshold_is_not_called_certain() -> None:
    perfect = fpr95_intervals(np.arange(200) + 100.0, np.arange(20.0), 0.9)
    for interval, images in zip(perfect, (20, 200), strict=True):
        assert (interval.value, interval.low) == (0, 0)
        assert (1 - interval.high) ** images == pytest.approx(0.05)
    # Four standard deviations apart 0.93 % of the unknown images pass: none of 50 in two of three
    # draws. Of 400 intervals at 95 % the count that holds has a standard deviation of 4.
    rng = np.random.default_rng(8)
    true = 1 - NormalDist().cdf(4 + NormalDist().inv_cdf(0.05))
    held = 0
    for _ in range(400):
        interval, _ = fpr95_intervals(rng.normal(4, 1, 500), rng.normal(0, 1, 50))
        held += interval.low <= true <= interval.high
    assert held >= 368


def test_a_seed_fixes_an_interval() -> None:
    rng = np.random.default_rng(7)
    known, unknown = rng.normal(1, 1, 40), rng.normal(0, 1, 40)
    assert fpr95_intervals(known, unknown) == fpr95_intervals(known, unknown)
    same = [bootstrap(metrics.dtacc, [known], [unknown], replicates=50, seed=s) for s in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


def test_a_bootstrap_is_percentiles_of_figures_of_drawn_images() -> None:
    rng = np.random.default_rng(9)
    known, unknown = rng.normal(1, 1, 30), rng.normal(0, 1, 20)
    drawn = np.random.default_rng(4)
    rows = [(drawn.integers(30, size=30), drawn.integers(20, size=20)) for _ in range(200)]
    found = [metrics.dtacc(known[k], unknown[u]) for k, u in rows]
    interval = bootstrap(metrics.dtacc, [known], [unknown], 0.8, replicates=200, seed=4)
    assert interval.ends == np.quantile(found, [0.1, 0.9]).tolist()


def test_each_side_of_a_bootstrap_keeps_its_size_and_its_rows_together() -> None:
    known, twice = np.arange(20.0), 2 * np.arange(20.0)
    seen = []

    def figure(k, double, u):
        assert len(k) == 20 and len(u) == 5 and (double == 2 * k).all()
        assert set(u) <= set(range(100, 105))
        seen.append((tuple(k), tuple(u)))
        return float(k.mean())

    bootstrap(figure, [known, twice], [np.arange(100, 105)], replicates=30)
    assert len(set(seen)) == 31  # 30 draws and the images themselves


def test_wrong_requests_are_named() -> None:
    with pytest.raises(ValueError, match=r"the confidence must be in \(0, 1\), got 95"):
        auroc_interval([1, 2], [0, 1], 95)
    with pytest.raises(ValueError, match=r"got sets of \[2, 3\] known and \[2, 2\] unknown"):
        delong([[1, 2], [1, 2, 3]], [[0, 1], [0, 1]])
    with pytest.raises(ValueError, match="two images on each side, got 1 known, 2 unknown"):
        delong([[1]], [[0, 1]])
    with pytest.raises(ValueError, match="images on both sides"):
        bootstrap(metrics.auroc, [[]], [[1.0]])
    with pytest.raises(ValueError, match="at least one replicate, got 0"):
        bootstrap(metrics.auroc, [[1.0]], [[1.0]], replicates=0)
    with pytest.raises(ValueError, match="1 of 2 known scores are NaN"):
        auroc_interval([1, math.nan], [0, 1])
    with pytest.warns(RuntimeWarning, match="no unknown images"):
        assert math.isnan(auroc_interval([1, 2], []).low)
