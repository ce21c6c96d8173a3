"""Scores of pooled features against those of the training images; float64 [n], larger = more known.

They ask nothing of the head, so they exist for every network.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from backmix.train.scores.rows import Floats, by_rows, matrix


@dataclass(frozen=True, eq=False)
class Gaussians:
    """A normal distribution per class with one covariance, and one of all training features."""

    mean: Floats
    """float64 [C]: of all training features."""
    whiten: Floats
    """float64 [C, C]: (f - mean) @ whiten.T has unit covariance within the classes."""
    centres: Floats
    """float64 [K, C]: class means, whitened; only of classes that have training images."""
    whiten_all: Floats
    """float64 [C, C]: as `whiten`, for the covariance of all training features together."""


def feature_norm(features: ArrayLike) -> Floats:
    """Return the Euclidean length of the pooled feature, |f|: a control, in either direction."""
    return by_rows(lambda f: np.linalg.norm(f, axis=1), {"features": matrix("features", features)})


def knn(features: ArrayLike, bank: np.ndarray, k: int) -> Floats:
    """Return minus the distance to the k-th nearest training feature, all of length 1.

    Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors (ICML 2022). In [-2, 0].
    Neighbours are ranked by products in fp32, which are right to about 1e-7; the distance itself is
    float64.

    Args:
        features: float [n, C].
        bank: training features of length 1 (`unit`), float32 [m, C].
        k: 1 .. m.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be 1 .. {len(bank)}, the number of training features, got {k}")
    place = len(bank) - k

    def score(f: Floats) -> Floats:
        own = unit(f)
        likeness = own.astype(np.float32) @ bank.T
        nearest = (likeness == np.partition(likeness, place, 1)[:, place, None]).argmax(1)
        return -np.linalg.norm(own - bank[nearest], axis=1)

    # 9 bytes of an image and a training feature, and only 2 are counted: few images at a time
    # would take twice as long, so this takes up to 4.5 times `rows.CHUNK`.
    return by_rows(score, {"features": matrix("features", features)}, len(bank) // 4)


def mahalanobis(features: ArrayLike, fit: Gaussians) -> Floats:
    """Return minus the squared Mahalanobis distance to the nearest class.

    -min_c (f - mu_c)' S^-1 (f - mu_c), S pooled within the classes (Lee et al., NeurIPS 2018,
    without their input step).
    """
    return by_rows(
        lambda f: -_to_classes(f - fit.mean, fit).min(1),
        {"features": matrix("features", features)},
        3 * len(fit.mean) + 2 * len(fit.centres),
    )


def rmds(features: ArrayLike, fit: Gaussians) -> Floats:
    """Return the relative distance -min_c [d_c - d_0], d_0 to all training features together.

    d_c as in `mahalanobis`, d_0 with the mean and covariance of all (Ren et al., A Simple Fix to
    Mahalanobis Distance, 2021).
    """

    def score(f: Floats) -> Floats:
        away = f - fit.mean
        overall = ((away @ fit.whiten_all.T) ** 2).sum(1)
        return overall - _to_classes(away, fit).min(1)

    return by_rows(
        score,
        {"features": matrix("features", features)},
        4 * len(fit.mean) + 2 * len(fit.centres),
    )


def unit(features: Floats) -> Floats:
    """Return features of length 1; zeros stay zeros."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1.0)


def _to_classes(away: Floats, fit: Gaussians) -> Floats:
    """Return squared distances [m, K] of features less the mean, [m, C]."""
    white = away @ fit.whiten.T
    squares = (white**2).sum(1)[:, None] + (fit.centres**2).sum(1) - 2 * white @ fit.centres.T
    return np.maximum(squares, 0.0)
