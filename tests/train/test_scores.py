"""The scores of logits against arithmetic with fifty digits, and where floating point saturates."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmix.train.scores import (
    SCORES,
    arpl,
    arpl_dot,
    energy,
    gen,
    max_logit,
    msp,
    ssod,
    ssod_joint,
    temperature,
)


def exact(z: list[float]) -> tuple[float, float]:
    """Return log(p / (1 - p)) of the top class and log-sum-exp, with 50 digits."""
    with localcontext() as context:
        context.prec = 50
        powers = [Decimal(v).exp() for v in z]
        top = max(range(len(z)), key=lambda k: z[k])
        others = sum((p for k, p in enumerate(powers) if k != top), Decimal(0))
        return float((powers[top] / others).ln()), float(sum(powers, Decimal(0)).ln())


logits = st.lists(
    st.floats(-50, 50, allow_nan=False, allow_subnormal=False, width=32), min_size=2, max_size=8
)


@given(logits)
def test_scores_equal_exact_arithmetic(z: list[float]) -> None:
    odds, free = exact(z)
    # Both differ from the exact value by a few roundings of the largest term.
    close = 1e-15 * (4 * max(abs(v) for v in z) + len(z))
    assert msp([z])[0] == pytest.approx(odds, abs=close, rel=4e-16)
    assert energy([z])[0] == pytest.approx(free, abs=close, rel=4e-16)
    assert max_logit([z])[0] == max(z)


@given(logits, st.floats(0.05, 3), st.integers(1, 9))
def test_gen_equals_exact_arithmetic(z: list[float], gamma: float, classes: int) -> None:
    with localcontext() as context:
        context.prec = 60
        powers = sorted((Decimal(v).exp() for v in z), reverse=True)
        total = sum(powers, Decimal(0))
        rest = [sum((q for j, q in enumerate(powers) if j != k), Decimal(0)) for k in range(len(z))]
        kept = list(zip(powers, rest, strict=True))[:classes]
        exact = -sum(
            (((p / total).ln() + (r / total).ln()) * Decimal(gamma)).exp() for p, r in kept
        )
    assert gen([z], gamma, classes)[0] == pytest.approx(float(exact), rel=1e-12)


@given(logits, st.floats(-60, 60), st.floats(0.1, 20))
def test_joint_and_tempered_scores_equal_exact_arithmetic(z: list[float], g: float, t: float):
    with localcontext() as context:
        context.prec = 60
        powers = [Decimal(v).exp() for v in z]
        known = 1 / (1 + Decimal(-g).exp())
        joint = (max(powers) / sum(powers, Decimal(0))).ln() + known.ln()
        tempered = [(Decimal(v) / Decimal(t)).exp() for v in z]
        top = max(range(len(z)), key=lambda k: z[k])
        rest = sum((p for k, p in enumerate(tempered) if k != top), Decimal(0))
        odds = float((tempered[top] / rest).ln())
    assert ssod_joint([z], [g])[0] == pytest.approx(float(joint), rel=1e-12, abs=1e-14)
    close = 1e-15 * (4 * max(abs(v) / t for v in z) + len(z))
    assert temperature([z], t)[0] == pytest.approx(odds, abs=close, rel=4e-16)


def test_hand_worked_values() -> None:
    # p = (1/2, 1/4, 1/4): the odds of the top class are 1; the powers sum to 4.
    z = np.log([[2.0, 1.0, 1.0]])
    assert msp(z)[0] == pytest.approx(0, abs=1e-15)
    assert energy(z)[0] == pytest.approx(math.log(4))
    assert energy(z, 2)[0] == pytest.approx(2 * math.log(math.sqrt(2) + 2))
    assert max_logit(z)[0] == math.log(2)


def test_msp_ranks_as_the_softmax_does() -> None:
    z = np.random.default_rng(0).normal(0, 3, (2000, 6))
    p = np.exp(z - z.max(1, keepdims=True))
    top = (p / p.sum(1, keepdims=True)).max(1)
    order = np.argsort(top)
    assert (np.diff(msp(z)[order]) >= -1e-13).all()
    np.testing.assert_allclose(1 / (1 + np.exp(-msp(z))), top, rtol=1e-13)


def test_msp_tells_images_apart_where_the_softmax_is_one() -> None:
    z = np.array([[100.0, 0.0], [101.0, 0.0], [700.0, 0.0], [5000.0, -5000.0]], np.float32)
    assert msp(z).tolist() == [100.0, 101.0, 700.0, 10000.0]


@pytest.mark.parametrize("score", SCORES)
def test_scores_neither_overflow_nor_change_their_input(score) -> None:
    z = np.array([[1e30, -1e30, 0.0], [-3e38, -3e38, -3e38]], np.float32)
    z.setflags(write=False)
    assert np.isfinite(score(z)).all()
    assert score(z).dtype == np.float64
    assert score(np.empty((0, 4))).shape == (0,)


@pytest.mark.parametrize("score", SCORES)
def test_logits_that_are_not_finite_are_counted(score) -> None:
    z = np.zeros((5, 3))
    z[1, 2], z[4, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 5 images have logits that are NaN or infinite"):
        score(z)
    with pytest.raises(ValueError, match=r"K >= 2 classes, got shape \(4, 1\)"):
        score(np.zeros((4, 1)))


def test_a_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        energy([[0.0, 1.0]], 0)
    with pytest.raises(ValueError, match="temperature must be positive, got nan"):
        temperature([[0.0, 1.0]], math.nan)
    with pytest.raises(ValueError, match="gamma must be above 0 and classes at least 1, got 0"):
        gen([[0.0, 1.0]], 0)


def test_gen_is_right_where_fp32_and_float64_probabilities_would_be_zero_or_one() -> None:
    # p = (1, e^-40, e^-800): 1 - p of the first is e^-40, p of the third no float64.
    exact = -(2 * math.exp(-4) + math.exp(-80))
    assert gen([[800.0, 760.0, 0.0]])[0] == pytest.approx(exact, rel=1e-13)
    assert gen([[800.0, 760.0, 0.0]], classes=1)[0] == pytest.approx(-math.exp(-4), rel=1e-13)


@given(logits, st.floats(-1e3, 1e3))
def test_a_constant_added_to_all_logits(z: list[float], shift: float) -> None:
    moved = [v + shift for v in z]
    for score in (msp, gen):
        assert score([moved])[0] == pytest.approx(score([z])[0], rel=1e-11, abs=1e-11)
    for score in (max_logit, energy):
        assert score([moved])[0] == pytest.approx(score([z])[0] + shift, rel=1e-11, abs=1e-11)


@given(st.permutations(range(6)))
def test_the_order_of_the_classes_does_not_matter(order: list[int]) -> None:
    z = np.random.default_rng(0).normal(0, 4, (20, 6))
    for score in SCORES:
        np.testing.assert_allclose(score(z[:, order]), score(z), rtol=1e-13)


def test_ssod_is_its_logit() -> None:
    assert ssod(np.array([3.5, -1e30], np.float32)).tolist() == [3.5, float(np.float32(-1e30))]
    with pytest.raises(ValueError, match="1 of 2 images have rejection logits that are NaN"):
        ssod(np.array([0, np.nan]))
    with pytest.raises(ValueError, match=r"rejection logits must be \[n\], got shape \(1, 2\)"):
        ssod_joint([[0.0, 1.0]], [[0.0, 1.0]])


def test_arpl_scores_with_and_without_the_length_of_the_feature() -> None:
    random = np.random.default_rng(0)
    features, points = random.normal(size=(30, 7)), random.normal(size=(4, 7))
    squares = ((features[:, None] - points[None]) ** 2).sum(2) / 7
    z = squares - features @ points.T
    np.testing.assert_allclose(arpl(z), z.max(1))
    linear = -(1 + 2 / 7) * features @ points.T + (points**2).sum(1) / 7
    np.testing.assert_allclose(arpl_dot(z, features), linear.max(1), rtol=1e-12, atol=1e-12)
