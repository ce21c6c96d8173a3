"""The scores against arithmetic with fifty digits, and where floating point would saturate."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmix.train.scores import SCORES, energy, max_logit, msp


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
