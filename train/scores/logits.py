"""Scores of logits alone, float [n, K] of K >= 2 classes -> float64 [n]; larger = more known."""

import numpy as np
from numpy.typing import ArrayLike

from backmix.train.scores.rows import Floats, by_rows

GEN_CLASSES = 100
"""Classes that GEN sums over, the most probable ones."""


def msp(logits: ArrayLike) -> Floats:
    """Return the maximum softmax probability as log odds, so that it never saturates.

    z_y - log sum_{k != y} exp z_k with y = argmax z, which is log(p / (1 - p)) of the top class's
    probability p: the same order as max softmax (Hendrycks and Gimpel, A Baseline for Detecting
    Misclassified and Out-of-Distribution Examples, 2017), but two images stay apart where p is
    1.0 in floating point for both. p itself is 1 / (1 + exp(-score)).

    >>> msp([[2.0, 2.0], [0.0, 100.0]]).tolist()
    [0.0, 100.0]
    """
    return by_rows(log_odds, {"logits": class_logits(logits)})


def temperature(logits: ArrayLike, temperature: float) -> Floats:
    """Return `msp` of z / T (Guo et al., On Calibration of Modern Neural Networks, 2017).

    T is fitted to held-out known images. With two classes the order is that of `msp`, with more it
    is neither that nor the order of `max_logit`.

    >>> temperature([[0.0, 100.0]], 4).tolist()
    [25.0]
    """
    _positive(temperature)
    return by_rows(lambda z: log_odds(z / temperature), {"logits": class_logits(logits)})


def max_logit(logits: ArrayLike) -> Floats:
    """Return the largest logit: max_k z_k (Vaze et al., Open-Set Recognition, 2022).

    >>> max_logit([[1.0, 3.0, 2.0]]).tolist()
    [3.0]
    """
    return by_rows(lambda z: z.max(1), {"logits": class_logits(logits)})


def energy(logits: ArrayLike, temperature: float = 1.0) -> Floats:
    """Return the negative free energy T * log sum_k exp(z_k / T) (Liu et al., 2020).

    Between max z and max z + T log K. Sign as everywhere here: larger = more known.

    >>> energy([[0.0, 0.0]]).tolist() == [float(np.log(2))]
    True
    """
    _positive(temperature)
    return by_rows(
        lambda z: temperature * log_sum_exp(z / temperature), {"logits": class_logits(logits)}
    )


def gen(logits: ArrayLike, gamma: float = 0.1, classes: int = GEN_CLASSES) -> Floats:
    """Return the negative generalised entropy -sum p^g (1 - p)^g of the most probable classes.

    Liu, Lochman, Zach: GEN (CVPR 2023). In [-M 4^-g, 0], M = min(classes, K). Computed from log p
    and log(1 - p): with g = 0.1 even a probability of 1e-30 counts 1e-3, which p in floating point
    would lose.

    Args:
        logits: float [n, K].
        gamma: g > 0.
        classes: M, at least 1.

    >>> round(float(gen([[0.0, 0.0]], gamma=0.5)[0]), 12)
    -1.0
    """
    if not gamma > 0 or classes < 1:
        raise ValueError(f"gamma must be above 0 and classes at least 1, got {gamma}, {classes}")

    def score(z: Floats) -> Floats:
        odds, rows, top = log_odds(z), np.arange(len(z)), z.argmax(1)
        log_p = z - log_sum_exp(z)[:, None]
        # Of all classes but the top one p <= 1/2: nothing is lost, and the term rises with p.
        log_p[rows, top] = -np.inf
        terms = np.exp(gamma * (log_p + np.log1p(-np.exp(np.minimum(log_p, -np.log(2.0))))))
        kept = min(classes, z.shape[1]) - 1
        others = np.partition(terms, terms.shape[1] - kept, 1)[:, -kept:] if kept else terms[:, :0]
        # log p = -log(1 + e^-odds), log(1 - p) = -log(1 + e^odds)
        first = np.exp(-gamma * (np.logaddexp(0, -odds) + np.logaddexp(0, odds)))
        return -(first + others.sum(1))

    return by_rows(score, {"logits": class_logits(logits)})


def log_odds(z: Floats) -> Floats:
    """Return log(p / (1 - p)) of the top class's softmax, [n], of logits [n, K]."""
    top = z.argmax(1)[:, None]
    others = z.copy()
    np.put_along_axis(others, top, -np.inf, 1)
    return np.take_along_axis(z, top, 1)[:, 0] - log_sum_exp(others)


def log_sum_exp(z: Floats) -> Floats:
    """Return log sum_k exp z_k, [n], of logits [n, K]."""
    top = z.max(1)
    return top + np.log(np.exp(z - top[:, None]).sum(1))


def class_logits(logits: ArrayLike) -> np.ndarray:
    """Return logits checked to be [n, K] with K >= 2 classes."""
    values = np.asarray(logits)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"logits must be [n, K] with K >= 2 classes, got shape {values.shape}")
    return values


def _positive(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
