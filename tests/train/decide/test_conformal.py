"""The mathematics of thresholds: ranks and intervals by hand, guarantees by simulation."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from backmix.train.decide.conformal import (
    PValues,
    benjamini_hochberg,
    exact_rate,
    needed,
    rank,
    rate_interval,
    share_interval,
    strict_rank,
    threshold_at,
)

TWENTIETH, HUNDREDTH, TENTH = Fraction(1, 20), Fraction(1, 100), Fraction(1, 10)

# rate, n, k, mean rate, ends of the 95 % interval of the rate, k at 90 % confidence (0 = none).
# Computed beforehand with other code: quantiles of the Beta, sums of binomial probabilities.
RANKS = [
    (TWENTIETH, 19, 1, 0.0500, 0.0013, 0.1765, 0),
    (TWENTIETH, 100, 5, 0.0495, 0.0164, 0.0993, 2),
    (TWENTIETH, 200, 10, 0.0498, 0.0242, 0.0837, 6),
    (TWENTIETH, 1_000, 50, 0.0500, 0.0373, 0.0643, 41),
    (TWENTIETH, 3_000, 150, 0.0500, 0.0425, 0.0581, 135),
    (TWENTIETH, 10_000, 500, 0.0500, 0.0458, 0.0544, 472),
    (HUNDREDTH, 100, 1, 0.0099, 0.0003, 0.0362, 0),
    (HUNDREDTH, 1_000, 10, 0.0100, 0.0048, 0.0170, 6),
    (TENTH, 1_000, 100, 0.0999, 0.0821, 0.1192, 88),
]

# rate, n, k, mean [%], ends of the 90 % interval [%], k at 95 % confidence, its mean [%]
NINETY = [
    (TWENTIETH, 100, 5, 4.95, 1.99, 8.92, 2, 1.98),
    (TWENTIETH, 500, 25, 4.99, 3.50, 6.68, 17, 3.39),
    (TWENTIETH, 1_000, 50, 5.00, 3.92, 6.18, 39, 3.90),
    (TWENTIETH, 5_000, 250, 5.00, 4.50, 5.52, 225, 4.50),
    (TWENTIETH, 50_000, 2_500, 5.00, 4.84, 5.16, 2_420, 4.84),
    (HUNDREDTH, 500, 5, 1.00, 0.39, 1.82, 2, 0.40),
    (HUNDREDTH, 1_000, 10, 1.00, 0.54, 1.57, 5, 0.50),
    (HUNDREDTH, 10_000, 100, 1.00, 0.84, 1.17, 84, 0.84),
]


@pytest.mark.parametrize(("rate", "n", "k", "mean", "low", "high", "strict"), RANKS)
def test_ranks_and_intervals_are_those_of_the_table(rate, n, k, mean, low, high, strict) -> None:
    assert rank(n, rate) == k
    assert k / (n + 1) == pytest.approx(mean, abs=5e-5)
    assert rate_interval(n, k) == pytest.approx((low, high), abs=5e-5)
    assert strict_rank(n, rate, 0.9) == strict


@pytest.mark.parametrize(("rate", "n", "k", "mean", "low", "high", "strict", "its_mean"), NINETY)
def test_ninety_percent_intervals_and_strict_ranks_are_those_of_the_table(
    rate, n, k, mean, low, high, strict, its_mean
) -> None:
    assert rank(n, rate) == k
    assert 100 * k / (n + 1) == pytest.approx(mean, abs=0.0051)
    ends = rate_interval(n, k, 0.9)
    assert (100 * ends[0], 100 * ends[1]) == pytest.approx((low, high), abs=0.0051)
    assert strict_rank(n, rate, 0.95) == strict
    assert 100 * strict / (n + 1) == pytest.approx(its_mean, abs=0.0051)


def test_with_eighteen_images_there_is_no_threshold_for_five_percent() -> None:
    assert rank(18, TWENTIETH) == 0
    assert (needed(TWENTIETH), needed(HUNDREDTH), needed(Fraction(1, 1000))) == (19, 99, 999)


@given(
    rate=st.fractions(min_value=Fraction(1, 300), max_value=Fraction(99, 100), max_denominator=300),
    confidence=st.none() | st.floats(0.5, 0.99),
)
def test_needed_is_the_least_number_of_images(rate: Fraction, confidence: float | None) -> None:
    def k(n: int) -> int:
        return rank(n, rate) if confidence is None else strict_rank(n, rate, confidence)

    least = needed(rate, confidence)
    assert k(least) >= 1
    assert least == 1 or k(least - 1) == 0


@given(
    n=st.integers(1, 400),
    rate=st.fractions(min_value=Fraction(1, 100), max_value=Fraction(1, 2), max_denominator=100),
    confidence=st.floats(0.5, 0.99),
)
def test_strict_rank_is_the_largest_that_binomial_probabilities_allow(n, rate, confidence) -> None:
    p = stats.binom.pmf(np.arange(n + 1), n, float(rate))
    at_least = p[::-1].cumsum()[::-1]  # P(Bin >= k), a sum of its own
    allowed = [k for k in range(rank(n, rate) + 1) if k == 0 or at_least[k] >= confidence + 1e-12]
    surely_not = [k for k in range(1, n + 1) if at_least[k] < confidence - 1e-12]
    found = strict_rank(n, rate, confidence)
    assert found >= max(allowed)
    assert found not in surely_not and found <= rank(n, rate)


def test_rates_are_taken_as_written() -> None:
    assert 0.29 * 100 < 29  # what floating point makes of it
    assert rank(99, exact_rate("0.29")) == rank(99, exact_rate(0.29)) == 29
    assert exact_rate("1e-3") == Fraction(1, 1000) and exact_rate("1/20") == TWENTIETH


@pytest.mark.parametrize(
    "rate",
    [
        "0",
        "1",
        "-0.1",
        "5 %",
        "nan",
        "inf",
        "1/0",
        "",
        "2/1",
        "1e-999999999",
        "1e999999999",
        "1e-10",
    ],
)
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match="rate"):
        exact_rate(rate)


def test_a_threshold_is_a_score_and_never_between_two() -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 21.0))
    assert threshold_at(scores, rank(20, TENTH)) == 2.0  # one of the twenty lies below
    with pytest.raises(ValueError, match=r"1 \.\. 20"):
        threshold_at(scores, 21)
    with pytest.raises(ValueError, match=r"1 \.\. 20"):
        threshold_at(scores, 0)


# --- the rate of a threshold, over calibration sets -----------------------------------------------


def rates_of(n: int, k: int, repetitions: int, seed: int) -> np.ndarray:
    """Rates of thresholds of `repetitions` calibrations, of scores that are normally distributed.

    A threshold t rejects the share Phi(t) of all known images.
    """
    scores = np.random.default_rng(seed).normal(3.0, 2.0, (repetitions, n))
    thresholds = np.array([threshold_at(row, k) for row in scores])
    return stats.norm.cdf(thresholds, 3.0, 2.0)


@pytest.mark.parametrize(("n", "rate"), [(100, TWENTIETH), (500, TWENTIETH), (1_000, HUNDREDTH)])
def test_the_rate_of_a_thousand_calibrations_is_a_beta(n: int, rate: Fraction) -> None:
    k = rank(n, rate)
    rates = rates_of(n, k, 1_000, seed=n)
    # Kolmogorov: the largest distance of 1,000 draws to their own distribution passes 1.63 / sqrt
    # of 1,000 = 0.0515 in one of a hundred cases; the next rank's Beta is further away (below).
    distance = stats.kstest(rates, stats.beta(k, n + 1 - k).cdf).statistic
    assert distance < 0.0515
    assert stats.kstest(rates, stats.beta(k + 1, n - k).cdf).statistic > 0.07
    spread = stats.beta.std(k, n + 1 - k) / np.sqrt(len(rates))
    assert rates.mean() == pytest.approx(k / (n + 1), abs=3 * spread)


def test_conformal_keeps_the_rate_where_an_interpolated_quantile_does_not() -> None:
    n, repetitions = 500, 4_000
    scores = np.random.default_rng(1).normal(size=(repetitions, n))
    conformal = stats.norm.cdf(np.partition(scores, 24, axis=1)[:, 24])
    assert rank(n, TWENTIETH) == 25
    naive = stats.norm.cdf(np.quantile(scores, 0.05, axis=1))
    strict = strict_rank(n, TWENTIETH, 0.95)
    surely = stats.norm.cdf(np.partition(scores, strict - 1, axis=1)[:, strict - 1])
    # Standard errors: 0.00015 of the means, 0.008 and 0.003 of the shares.
    assert conformal.mean() == pytest.approx(25 / 501, abs=0.0006)
    assert naive.mean() == pytest.approx(0.0520, abs=0.0006)
    assert (naive > 0.05).mean() == pytest.approx(0.55, abs=0.03)
    assert stats.binom.cdf(16, n, 0.05) == pytest.approx(0.034, abs=0.001)  # what that must be
    assert (surely > 0.05).mean() == pytest.approx(0.034, abs=0.012)


def test_an_interpolated_quantile_of_thirty_scores_rejects_several_times_its_rate() -> None:
    scores = np.random.default_rng(2).normal(size=(20_000, 30))
    naive = stats.norm.cdf(np.quantile(scores, 0.01, axis=1))
    assert naive.mean() == pytest.approx(0.038, abs=0.002)
    assert rank(30, HUNDREDTH) == 0  # where we have no threshold at all


def test_intervals_hold_the_rate_as_often_as_they_say() -> None:
    n, k = 200, 10
    rates = rates_of(n, k, 4_000, seed=3)
    low, high = rate_interval(n, k)
    assert ((low <= rates) & (rates <= high)).mean() == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 40), (40, 40), (1, 1)])
def test_share_intervals_are_those_of_scipy(count: int, n: int) -> None:
    expected = stats.binomtest(count, n).proportion_ci(0.95, "exact")
    assert share_interval(count, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


# --- p-values -------------------------------------------------------------------------------------


def counted(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """P-values by their definition: pairs counted one by one."""
    return (1 + (calibration[None, :] <= scores[:, None]).sum(1)) / (len(calibration) + 1)


def test_p_values_by_hand() -> None:
    table = PValues.of([3.0, 1.0, 2.0, 2.0])
    assert table.of_scores([0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 9.0]).tolist() == [
        *(1 / 5, 2 / 5, 2 / 5, 4 / 5, 4 / 5, 5 / 5, 5 / 5)
    ]
    assert np.isnan(table.of_scores([np.nan])).all()
    assert table.of_scores([-np.inf, np.inf]).tolist() == [1 / 5, 1]
    assert table.of_scores([]).tolist() == []


@given(
    calibration=st.lists(st.integers(-6, 6), min_size=1, max_size=60),
    scores=st.lists(st.integers(-14, 14), max_size=30),
)
def test_p_values_are_counts_with_ties(calibration: list[int], scores: list[int]) -> None:
    s, new = np.array(calibration, float), np.array(scores) / 2
    assert PValues.of(s).of_scores(new).tolist() == counted(s, new).tolist()


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 300),
    most=st.integers(2, 40),
    k=st.integers(1, 300),
    levels=st.sampled_from([7, 50, 10_000]),
)
def test_a_thinned_table_never_gives_too_small_a_p_value_nor_another_decision(
    seed: int, n: int, most: int, k: int, levels: int
) -> None:
    random, k = np.random.default_rng(seed), min(k, n)
    s = random.integers(0, levels, n) / 3.0
    threshold = threshold_at(s, k)
    table = PValues.of(s, threshold, most)
    assert len(table.values) <= most + 1
    new = np.concatenate([random.integers(-1, levels + 1, 50) / 3.0, s, s - 0.1, s + 0.1])
    exact, read = counted(s, new), table.of_scores(new)
    assert (read >= exact).all()
    lower = new < np.unique(s)[: most // 2].max()
    assert (read[lower] == exact[lower]).all()
    # Rejected below the threshold, and where p <= k / (n + 1): the same images.
    assert ((read <= k / (n + 1)) == (new < threshold)).all()


@pytest.mark.parametrize("most", [4096, 20])
@pytest.mark.parametrize("levels", [None, 12])
def test_p_values_of_known_images_are_super_uniform(most: int, levels: int | None) -> None:
    random = np.random.default_rng(5)
    p = []
    for _ in range(2_000):
        s = random.normal(size=60)
        if levels:
            s = np.round(s * levels / 6)
        p.append(PValues.of(s[:59], most=most).of_scores(s[59:])[0])
    for level in (0.05, 0.1, 0.25, 0.5, 0.9):
        share = (np.array(p) <= level).mean()
        spread = np.sqrt(level * (1 - level) / len(p))
        assert share <= level + 3 * spread
        if levels is None and most == 4096:  # 60 divides these levels: equality
            assert share >= level - 3 * spread


@pytest.mark.parametrize("scores", [[], [1.0, np.nan], [np.inf]])
def test_a_table_needs_finite_scores(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        PValues.of(scores)


# --- batches --------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 500), m=st.integers(1, 60), share=st.sampled_from([0.01, 0.05, 0.1, 0.5])
)
def test_benjamini_hochberg_is_scipys(seed: int, m: int, share: float) -> None:
    random = np.random.default_rng(seed)
    p = random.uniform(size=m) ** random.integers(1, 6)
    adjusted = stats.false_discovery_control(p)
    assert benjamini_hochberg(p, share).tolist() == (adjusted <= share).tolist()


def test_p_values_on_the_line_are_shown_whatever_rounding_says() -> None:
    # 35 of 100 p-values are 7 / 100 = 0.2 * 35 / 100, of 99 calibration images.
    p = np.concatenate([np.full(35, 7 / 100), np.full(65, 0.9)])
    assert p[0] * 100 > 0.2 * 35  # in floating point
    assert benjamini_hochberg(p, 0.2).sum() == 35
    assert benjamini_hochberg(p, 0.1999).sum() == 0


def test_images_without_a_p_value_neither_show_nor_count() -> None:
    p = np.array([0.01, np.nan, 0.04, np.nan])
    assert benjamini_hochberg(p, 0.05).tolist() == [True, False, True, False]
    assert benjamini_hochberg([np.nan], 0.05).tolist() == [False]
    assert benjamini_hochberg([], 0.05).tolist() == []
    with pytest.raises(ValueError, match="share"):
        benjamini_hochberg(p, 1.0)


def test_the_share_of_known_images_among_the_shown_ones_is_kept() -> None:
    random, share, proportions, found = np.random.default_rng(7), 0.2, [], []
    known, unknown = 80, 20
    for _ in range(600):
        table = PValues.of(random.normal(size=300))
        scores = np.concatenate([random.normal(size=known), random.normal(-3.5, 1, unknown)])
        shown = benjamini_hochberg(table.of_scores(scores), share)
        proportions.append(shown[:known].sum() / max(shown.sum(), 1))
        found.append(shown[known:].mean())
    spread = np.std(proportions) / np.sqrt(len(proportions))
    # Expected: the share of the known images times 0.2, 0.16; without the correction 0.2 would be
    # kept by showing nothing, so most unknown images must be found as well.
    assert np.mean(proportions) <= share * known / (known + unknown) + 3 * spread
    assert np.mean(found) > 0.6
