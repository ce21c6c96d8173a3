"""Scores that belong to a method's own head; float64 [n], larger = more known."""

import numpy as np
from numpy.typing import ArrayLike

from backmix.train.scores.logits import class_logits, log_odds, max_logit
from backmix.train.scores.rows import Floats, by_rows, matrix


def ssod(rejection: ArrayLike) -> Floats:
    """Return SSOD's logit of being known, g = v . f + c (Pei, 2023); it does not saturate.

    Args:
        rejection: what the rejection head says of each image's pooled feature, float [n].
    """
    return by_rows(lambda g: g, {"rejection logits": _vector(rejection)})


def ssod_joint(logits: ArrayLike, rejection: ArrayLike) -> Floats:
    """Return log max_k p_k + log sigmoid(g): P(class | known, x) P(known | x) as a logarithm.

    Args:
        logits: of the class head, float [n, K], K >= 2.
        rejection: as in `ssod`.

    >>> round(float(ssod_joint([[0.0, 0.0]], [0.0])[0] / np.log(2)), 12)
    -2.0
    """

    def score(z: Floats, g: Floats) -> Floats:
        return -np.logaddexp(0, -log_odds(z)) - np.logaddexp(0, -g)

    return by_rows(score, {"logits": class_logits(logits), "rejection logits": _vector(rejection)})


def arpl(logits: ArrayLike) -> Floats:
    """Return ARPL's score, the largest |f - p_k|^2 / C - f . p_k (Chen et al., TPAMI 2021).

    These are the logits of its head [n, K], so this is their `max_logit`.
    """
    return max_logit(logits)


def arpl_dot(logits: ArrayLike, features: ArrayLike) -> Floats:
    """Return ARPL's score without |f|^2 / C, which all its logits share.

    What is left, max_k of -(1 + 2 / C) f . p_k + |p_k|^2 / C, is linear in f: the difference to
    `arpl` is what the size of the feature says.

    Args:
        logits: of ARPL's head, float [n, K], K >= 2.
        features: the pooled features f, float [n, C].
    """

    def score(z: Floats, f: Floats) -> Floats:
        return z.max(1) - (f * f).sum(1) / f.shape[1]

    return by_rows(
        score, {"logits": class_logits(logits), "features": matrix("features", features)}
    )


def _vector(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"the rejection logits must be [n], got shape {array.shape}")
    return array
