"""Tests of change: exact where that can be counted, and held by simulation where it matters."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from backmix.train.decide import drift
from backmix.train.decide.rule import Rule, conditional_rule, global_rule

RATE = Fraction(1, 20)
HALF = 0.5


def made(calibration: np.ndarray, rate: Fraction = RATE) -> Rule:
    return global_rule(calibration, 1, rate)


def alarms(rule: Rule, scores: np.ndarray, level: float, predicted: np.ndarray | None = None):
    """Return whether windows or drift alarm, half of the level each, and the drift."""
    predicted = np.zeros(len(scores), np.int64) if predicted is None else predicted
    ends = drift.window_ends(len(scores), drift.window_size(rule, len(scores)))
    windows = drift.rejection_windows(rule, predicted, scores, ends, level / 2)
    cells = drift.cells_of(rule, predicted, scores)
    found = drift.drift_of(rule, predicted, cells, ends, level / 2)
    return bool(windows.alarms.any()), found.start is not None, windows, found


# --- windows --------------------------------------------------------------------------------------


def test_a_window_expects_ten_rejected_and_there_are_not_too_many():
    rule = made(np.arange(1000.0))  # k = 50 of 1001 gaps: 10 * 1001 / 50 = 200.2
    assert drift.window_size(rule, 5000) == 201
    assert drift.window_size(rule, 201 * 512) == 201
    assert drift.window_size(rule, 201 * 512 + 1) == 402
    assert drift.window_ends(450, 201).tolist() == [201, 402, 450]
    assert drift.window_ends(402, 201).tolist() == [201, 402]
    assert drift.window_ends(7, 201).tolist() == [7]


@pytest.mark.parametrize("level", (0.05, 0.001))
def test_limits_of_one_category_are_those_of_the_beta_binomial(level):
    low, high = drift._limits(((50, 1000),), (201,), level)
    law = stats.betabinom(201, 50, 951)
    assert law.cdf(low - 1) <= level / 2 < law.cdf(low)
    assert law.sf(high) <= level / 2 < law.sf(high - 1)


def test_limits_of_several_categories_are_those_of_the_sum():
    urns, sizes, level = ((3, 40), (5, 90), (2, 25)), (30, 4, 0), 0.05
    law = np.zeros(35)
    for a, b in itertools.product(range(31), range(5)):
        law[a + b] += stats.betabinom.pmf(a, 30, 3, 38) * stats.betabinom.pmf(b, 4, 5, 86)
    low, high = drift._limits(urns, sizes, level)
    assert law[:low].sum() <= level / 2 < law[: low + 1].sum()
    assert law[high + 1 :].sum() <= level / 2 < law[high:].sum()


def test_a_long_convolution_is_that_of_the_sum(monkeypatch):
    drawn = ((150, 7, 60), (200, 5, 90), (300, 3, 40))
    first, direct = drift._sum_law.__wrapped__(drawn)
    monkeypatch.setattr(drift, "_DIRECT", 0)
    start, by_fourier = drift._sum_law.__wrapped__(drawn)
    whole = np.zeros((2, 651))
    whole[0, first : first + len(direct)] = direct
    whole[1, start : start + len(by_fourier)] = by_fourier
    assert whole[0] == pytest.approx(whole[1], abs=1e-13)
    assert whole.sum(1) == pytest.approx(1)


def test_a_sum_of_many_categories_is_that_of_their_moments():
    """Mean and variance of beta-binomials in closed form, added."""
    drawn = tuple((1000 + i, 1 + i % 3, 40 + i % 7) for i in range(300))
    first, law = drift._sum_law(drawn)
    x = first + np.arange(len(law))
    laws = [stats.betabinom(size, k, n + 1 - k) for size, k, n in drawn]
    mean = (law * x).sum()
    assert mean == pytest.approx(sum(each.mean() for each in laws))
    assert (law * (x - mean) ** 2).sum() == pytest.approx(sum(each.var() for each in laws))


def test_windows_count_what_is_below_the_threshold_of_each_class():
    names = ("a", "b")
    calibration = np.concatenate([np.arange(100.0), np.arange(1000.0, 1100.0)])
    rule = conditional_rule(calibration, np.repeat([0, 1], 100), names, RATE)
    assert rule.thresholds.tolist() == [4.0, 1004.0]  # k = floor(0.05 * 101) = 5
    predicted = np.array([0, 1, 1, 0, 1, 0])
    scores = np.array([3.9, 1003.9, 50.0, 4.0, 1004.0, 3.0])
    windows = drift.rejection_windows(rule, predicted, scores, np.array([3, 6]), 0.01)
    assert windows.rejected.tolist() == [3, 1]
    assert windows.expected == pytest.approx([3 * 5 / 101] * 2)
    assert windows.starts.tolist() == [0, 3] and windows.sizes.tolist() == [3, 3]


def test_too_many_and_too_few_are_alarms():
    rule = made(np.random.default_rng(0).normal(size=2000))
    scores = np.concatenate([np.full(201, 3.0), np.full(40, -9.0), np.full(161, 3.0)])
    windows = drift.rejection_windows(
        rule, np.zeros(402, np.int64), scores, np.array([201, 402]), 0.01
    )
    assert windows.alarms.tolist() == [-1, 1]


def test_ties_with_the_threshold_are_neither_too_many_nor_too_few():
    """All scores are equal: none is rejected, which is no sign of a change."""
    rule = made(np.zeros(200))
    scores = np.zeros(2000)
    in_windows, in_drift, windows, _ = alarms(rule, scores, 0.2)
    assert not windows.rejected.any() and windows.low.max() > 0
    assert not in_windows and not in_drift


# --- cells ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", (19, 40, 1000, 20_000))
def test_cells_are_cut_at_calibration_scores(n):
    """Of 20,000 scores the table keeps 4,096; the cuts lie at ones that are kept."""
    random = np.random.default_rng(n)
    calibration = np.sort(random.normal(size=n))
    rule = made(calibration)
    masses = drift.cell_masses(rule.categories[0])
    assert masses.sum() == n + 1 and masses[0] == rule.categories[0].k
    scores = random.normal(size=500)
    cuts = calibration[np.cumsum(masses)[:-1] - 1]
    found = drift.cells_of(rule, np.zeros(500, np.int64), scores)
    assert np.array_equal(found, np.searchsorted(cuts, scores))
    assert np.array_equal(found == 0, scores < rule.thresholds[0])
    # The accepted cells are of equal mass, as far as whole scores allow it.
    spread = 1 if n <= 4096 else n / 1000
    assert np.ptp(masses[1:]) <= spread


def test_equal_scores_fall_into_cells_by_their_masses():
    """Half of the calibration scores are one value: over seeds the cells come as they should."""
    calibration = np.concatenate([np.arange(-50.0, 0.0), np.zeros(50)])
    rule = made(calibration)
    category = rule.categories[0]
    cells = np.concatenate(
        [drift.cells_of(rule, np.zeros(20, np.int64), np.zeros(20), seed) for seed in range(400)]
    )
    masses = drift.cell_masses(category)
    inside = np.cumsum(masses) > 50  # gaps 51 .. 101 are those around the equal scores
    found = np.bincount(cells, minlength=17)[inside]
    expected = np.diff(np.clip(np.append(0, np.cumsum(masses)), 50, 101))[inside] / 51 * len(cells)
    assert not np.bincount(cells, minlength=17)[~inside].any()
    # Those of one seed are not independent: 400 seeds of 20.
    assert found == pytest.approx(expected, rel=0.2)


def test_shares_are_compared_with_the_beta_binomial():
    random = np.random.default_rng(0)
    rule = made(random.normal(size=500))
    predicted, scores = np.zeros(300, np.int64), random.normal(size=300)
    shares = drift.shares_of(rule, predicted, drift.cells_of(rule, predicted, scores))
    masses = drift.cell_masses(rule.categories[0])
    assert shares.counts.sum() == 300
    assert shares.expected == pytest.approx(300 * masses / 501)
    law = stats.betabinom(300, masses[3], 501 - masses[3])
    assert law.cdf(shares.low[3] - 1) <= 0.025 < law.cdf(shares.low[3])
    assert law.sf(shares.high[3]) <= 0.025 < law.sf(shares.high[3] - 1)
    mean, low, high = drift.rejected_of(rule, predicted, 0.05)
    assert mean == pytest.approx(300 * 25 / 501)
    assert (low, high) == (shares.low[0], shares.high[0])


# --- e-process ------------------------------------------------------------------------------------


def urn_probability(rule: Rule, predicted: list[int], cells: tuple[int, ...]) -> float:
    """The probability of a sequence of cells, drawn one by one from the urns."""
    found = 1.0
    urns = [drift.cell_masses(category).astype(float) for category in rule.categories]
    for class_, cell in zip(predicted, cells, strict=True):
        urn = urns[rule.category[class_]]
        found *= urn[cell] / urn.sum()
        urn[cell] += 1
    return found


def two_categories(n: int) -> Rule:
    scores, classes = np.arange(2.0 * n), np.arange(2 * n) % 2
    return conditional_rule(scores, classes, ("a", "b"), Fraction(1, 8))


@pytest.mark.parametrize(
    ("rule", "predicted", "ends"),
    [
        (made(np.arange(5.0), Fraction(1, 3)), [0, 0, 0], [1, 2, 3]),  # six cells for 17
        (made(np.arange(5.0), Fraction(1, 3)), [0, 0, 0], [2, 3]),
        (made(np.arange(5.0), Fraction(1, 3)), [0, 0, 0], [3]),
        (made(np.arange(30.0)), [0, 0], [1, 2]),
        (two_categories(20), [0, 1], [1, 2]),
        (two_categories(20), [1, 1], [2]),
    ],
)
def test_the_expectation_of_the_e_process_is_one(rule, predicted, ends):
    """Over all sequences that there can be: any that are called too likely would show."""
    there = [np.flatnonzero(drift.cell_masses(c)).tolist() for c in rule.categories]
    total, whole, accepted = 0.0, 0.0, 0.0
    for cells in itertools.product(*(there[rule.category[class_]] for class_ in predicted)):
        p = urn_probability(rule, predicted, cells)
        found = drift.drift_of(rule, np.array(predicted), np.array(cells), np.array(ends), 0.01)
        total += p
        whole += p * np.exp(found.log_e[-1])
        accepted += p * np.exp(found.log_e_accepted[-1])
    assert total == pytest.approx(1)
    assert whole == pytest.approx(1, abs=1e-12)
    assert accepted == pytest.approx(1, abs=1e-12)


def test_the_e_process_is_that_of_its_definition():
    """Image by image, with the predictive probabilities of urn and learned law."""
    random = np.random.default_rng(3)
    rule = made(random.normal(size=60))
    masses = drift.cell_masses(rule.categories[0])
    cells = random.integers(0, 17, 40)
    ends = np.array([7, 14, 21, 28, 35, 40])

    def parts(c: int) -> list[tuple[int, int]]:  # (law, cell of it) that an image is a draw of
        found = [(0, int(c > 0))]
        if c:
            found += [(1 + at, (c - 1) * r // 16) for at, r in enumerate((2, 4, 8))]
        return found

    widths = (2, 2, 4, 8)
    urns = [np.array([masses[0], masses[1:].sum()], float)]
    urns += [masses[1:].reshape(r, -1).sum(1).astype(float) for r in (2, 4, 8)]
    whole, accepted = np.zeros((2, len(ends)))
    for first in range(len(ends)):
        begin = 0 if first == 0 else ends[first - 1]
        now = [urn.copy() for urn in urns]
        learned = [np.full(width, HALF) for width in widths]
        ratio = np.ones(4)
        for i, c in enumerate(cells.tolist()):
            for law, cell in parts(c):
                if i >= begin:
                    ratio[law] *= learned[law][cell] / learned[law].sum()
                    ratio[law] /= now[law][cell] / now[law].sum()
                    learned[law][cell] += 1
                now[law][cell] += 1
            for at in np.flatnonzero(ends == i + 1):
                weight = 1 / ((first + 1) * (first + 2))
                a = ratio[1:].mean()
                whole[at] += weight * ((ratio[0] + a + ratio[0] * a) / 3 if at >= first else 1)
                accepted[at] += weight * (a if at >= first else 1)
    rest = 1 / (len(ends) + 1)  # changes after the last window
    found = drift.drift_of(rule, np.zeros(40, np.int64), cells, ends, 0.01)
    assert np.exp(found.log_e) == pytest.approx(whole + rest)
    assert np.exp(found.log_e_accepted) == pytest.approx(accepted + rest)


def test_more_images_do_not_change_what_was_seen_before():
    """The promise holds over all looks at a growing stream: no look depends on what comes after."""
    random = np.random.default_rng(0)
    rule = made(random.normal(size=300))
    predicted, scores = np.zeros(2000, np.int64), random.normal(0.2, 1, 2000)
    cells = drift.cells_of(rule, predicted, scores)
    assert np.array_equal(cells[:900], drift.cells_of(rule, predicted[:900], scores[:900]))
    long = drift.drift_of(rule, predicted, cells, drift.window_ends(2000, 150), 0.01)
    short = drift.drift_of(rule, predicted[:900], cells[:900], drift.window_ends(900, 150), 0.01)
    assert long.log_e[:6] == pytest.approx(short.log_e)


# --- simulation -----------------------------------------------------------------------------------

LAWS = {
    "continuous": lambda random, m: random.normal(size=m),
    "few values": lambda random, m: random.normal(size=m).round(),
    "saturated": lambda random, m: np.minimum(random.normal(size=m), -1.2),
}


@pytest.mark.parametrize(
    ("law", "streams"), [("continuous", 500), ("few values", 200), ("saturated", 200)]
)
def test_streams_ten_times_as_long_as_the_calibration_rarely_alarm(law, streams):
    random, level = np.random.default_rng(1), 0.05
    false = sum(
        any(alarms(made(LAWS[law](random, 200)), LAWS[law](random, 2000), level)[:2])
        for _ in range(streams)
    )
    assert false <= stats.binom.ppf(0.999, streams, level)


def test_a_test_against_the_uniform_law_would_nearly_always_alarm():
    """Why there is none: p-values from 100 calibration images are not uniform, changed or not."""
    random = np.random.default_rng(2)
    uniform = ours = 0
    for _ in range(20):
        rule, scores = made(random.normal(size=100)), random.normal(size=10_000)
        _, p = rule.decide(np.zeros(len(scores), np.int64), scores)
        uniform += stats.kstest(p, "uniform").pvalue < 0.01
        ours += any(alarms(rule, scores, 0.01)[:2])
    assert uniform >= 19 and ours <= 1


def test_categories_rarely_alarm():
    random, level, streams, names = np.random.default_rng(4), 0.05, 100, ("a", "b", "c")
    weights = np.array([0.7, 0.28, 0.02])  # c has too few calibration images of its own

    def drawn(m: int) -> tuple[np.ndarray, np.ndarray]:
        classes = random.choice(3, m, p=weights)
        return random.normal(5.0 * classes, 1 + classes), classes

    false = 0
    for _ in range(streams):
        calibration, classes = drawn(300)
        rule = conditional_rule(calibration, classes, names, RATE)
        assert len(rule.categories) > 1
        scores, predicted = drawn(3000)
        compared = drift.comparable(rule, predicted)
        assert compared[predicted == 0].all() and not compared[predicted == 2].any()
        scores, predicted = scores[compared], predicted[compared]
        false += any(alarms(rule, scores, level, predicted)[:2])
    assert false <= stats.binom.ppf(0.999, streams, level)


def test_a_class_that_is_calibrated_on_the_images_of_others_too_is_not_compared():
    """a has just enough calibration images of its own; b and a together stand for b."""
    random = np.random.default_rng(5)
    classes = np.repeat([0, 1], [19, 200])
    rule = conditional_rule(random.normal(2.0 * classes), classes, ("a", "b"), RATE)
    assert [part.calibrated_on for part in rule.categories] == [(0,), (0, 1)]
    assert drift.comparable(rule, np.array([0, 1])).tolist() == [True, False]


CHANGES = {
    "less known": lambda random, m: random.normal(-0.4, 1, m),
    "more known": lambda random, m: random.normal(0.4, 1, m),
    "10 % unknown": lambda random, m: np.where(
        random.random(m) < 0.1, random.normal(-3, 0.5, m), random.normal(size=m)
    ),
    "wider": lambda random, m: random.normal(0, 1.4, m),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen_and_their_beginning_is_found(change):
    """500 calibration images, 2,000 images before the change and 2,000 after."""
    random, streams = np.random.default_rng(5), 30
    seen, near, too = 0, 0, 0
    for _ in range(streams):
        rule = made(random.normal(size=500))
        scores = np.concatenate([random.normal(size=2010), CHANGES[change](random, 2000)])
        _, by_drift, windows, found = alarms(rule, scores, 0.01)
        seen += by_drift
        too += found.accepted_too
        if found.start is not None:
            near += abs(int(windows.starts[found.start]) - 2010) <= 201
    assert seen >= 29 and near >= 27
    if change == "10 % unknown":
        assert too <= 1  # rejected images alone have become more
    else:
        assert too >= 24
