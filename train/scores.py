"""Scores of stored logits: how known an image looks, larger = more known, always.

Pure functions float [n, K] -> float64 [n]; nothing is fitted, nothing is kept. Logits are those of
the trained classifier, K >= 2 classes. Anything not finite in them is an error that counts the
images: a score of such an image would mean nothing.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def msp(logits: ArrayLike) -> Floats:
    """Return the maximum softmax probability as log odds, so that it never saturates.

    z_y - log sum_{k != y} exp z_k with y = argmax z, which is log(p / (1 - p)) of the top class's
    probability p: the same order as max softmax (Hendrycks and Gimpel, A Baseline for Detecting
    Misclassified and Out-of-Distribution Examples, 2017), but two images stay apart where p is
    1.0 in floating point for both. p itself is 1 / (1 + exp(-score)).

    >>> msp([[2.0, 2.0], [0.0, 100.0]]).tolist()
    [0.0, 100.0]
    """
    z = _finite(logits)
    top = z.argmax(1)[:, None]
    others = z.copy()
    np.put_along_axis(others, top, -np.inf, 1)
    return np.take_along_axis(z, top, 1)[:, 0] - _log_sum_exp(others)


def max_logit(logits: ArrayLike) -> Floats:
    """Return the largest logit: max_k z_k (Vaze et al., Open-Set Recognition, 2022).

    >>> max_logit([[1.0, 3.0, 2.0]]).tolist()
    [3.0]
    """
    return _finite(logits).max(1)


def energy(logits: ArrayLike, temperature: float = 1.0) -> Floats:
    """Return the negative free energy T * log sum_k exp(z_k / T) (Liu et al., 2020).

    Between max z and max z + T log K. Sign as everywhere here: larger = more known.

    >>> energy([[0.0, 0.0]]).tolist() == [float(np.log(2))]
    True
    """
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    return temperature * _log_sum_exp(_finite(logits) / temperature)


SCORES = (msp, max_logit, energy)
"""The scores that need nothing but logits; a score's name is its function's name."""


def _log_sum_exp(z: Floats) -> Floats:
    top = z.max(1)
    return top + np.log(np.exp(z - top[:, None]).sum(1))


def _finite(logits: ArrayLike) -> Floats:
    """Return the logits as float64 [n, K], checked."""
    z = np.asarray(logits, np.float64)
    if z.ndim != 2 or z.shape[1] < 2:
        raise ValueError(f"logits must be [n, K] with K >= 2 classes, got shape {z.shape}")
    bad = int(np.count_nonzero(~np.isfinite(z).all(1)))
    if bad:
        raise ValueError(
            f"{bad} of {len(z)} images have logits that are NaN or infinite: the model has "
            "diverged, or the images were not normalised as in training"
        )
    return z
