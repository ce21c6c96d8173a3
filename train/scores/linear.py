"""Scores that compute the logits of a linear head anew, from changed features or weights.

All take the pooled features f, float [n, C], and the head z = W f + b; float64 [n], larger = more
known. Unless said otherwise the score is the energy log sum_k exp z_k of the changed logits. Heads
of another form (reciprocal points, auto-encoders) have no such W: these scores do not exist there.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from backmix.train.scores.logits import log_sum_exp
from backmix.train.scores.rows import Floats, by_rows, matrix

ASH_SHARE = 0.90
"""Share of the entries that ASH-S prunes."""
SCALE_SHARE = 0.85
"""Share of the entries that SCALE's factor leaves out."""
DICE_SHARE = 0.90
"""Share of the weights that DICE prunes."""
NCI_ALPHA = 1e-4
"""Weight of the feature's size in NCI."""


class LinearHead(NamedTuple):
    """z = W f + b."""

    weight: Floats
    """float64 [K, C]"""
    bias: Floats
    """float64 [K]"""


@dataclass(frozen=True, eq=False)
class Residual:
    """What of a feature the training features hardly use (ViM); `fit_residual` finds it."""

    origin: Floats
    """float64 [C]: u = -pinv(W) b, the feature whose logits are nearest to 0."""
    basis: Floats
    """float64 [C, C - D]: orthonormal columns R that the training features use least."""
    alpha: float
    """Size of the virtual logit per length of the residual."""


def react(features: ArrayLike, head: LinearHead, clip: float) -> Floats:
    """Return ReAct: energy of W min(f, c) + b (Sun, Guo, Li, NeurIPS 2021).

    Args:
        features: float [n, C].
        head: the linear head.
        clip: c, the 90th percentile of all entries of the training features.
    """
    return _rebuilt(features, head, lambda f: np.minimum(f, clip))


def ash_s(features: ArrayLike, head: LinearHead, share: float = ASH_SHARE) -> Floats:
    """Return ASH-S: energy of W f' + b, f' the largest entries of f times exp(S1 / S2).

    Djurisic et al., Extremely Simple Activation Shaping (ICLR 2023). S1 sums all entries, S2 the
    C - round(C share) that are kept. Made for f >= 0: negative entries (of a LeakyReLU) count as 0.
    Where nothing is above 0, f' = 0.
    """

    def shaped(f: Floats) -> Floats:
        kept, factor = _largest(f, share)
        return np.where(kept, f, 0.0) * factor

    return _rebuilt(features, head, lambda f: shaped(np.maximum(f, 0.0)))


def scale(features: ArrayLike, head: LinearHead, share: float = SCALE_SHARE) -> Floats:
    """Return SCALE: energy of W f exp(S1 / S2) + b (Xu et al., ICLR 2024).

    S1 and S2 as in `ash_s`, but nothing is pruned. Negative entries count as 0 here, too.
    """

    def shaped(f: Floats) -> Floats:
        return f * _largest(f, share)[1]

    return _rebuilt(features, head, lambda f: shaped(np.maximum(f, 0.0)))


def dice(
    features: ArrayLike, head: LinearHead, mean: ArrayLike, share: float = DICE_SHARE
) -> Floats:
    """Return DICE: energy of (W * M) f + b (Sun, Li, ECCV 2022).

    M_kc is 1 where W_kc mean_c lies above the `share` percentile of all of them, else 0.

    Args:
        features: float [n, C].
        head: the linear head.
        mean: of the training features, float [C].
        share: of the weights that are pruned.
    """
    return _rebuilt(features, pruned(head, mean, share), lambda f: f)


def pruned(head: LinearHead, mean: ArrayLike, share: float = DICE_SHARE) -> LinearHead:
    """Return the head that DICE leaves; arguments as for `dice`."""
    given = head.weight * np.asarray(mean, np.float64)
    kept = np.where(given > np.percentile(given, 100 * share), head.weight, 0.0)
    return LinearHead(kept, head.bias)


def fdbd(features: ArrayLike, head: LinearHead, mean: ArrayLike) -> Floats:
    """Return fDBD: the sum of the distances to all class boundaries over |f - mean|.

    Liu, Qin, Fast Decision Boundary based Out-of-Distribution Detector (ICML 2024). The boundary to
    class k is (z_y - z_k) / |w_y - w_k| away, y = argmax z. Classes of equal weights have none; a
    feature that is the mean itself scores 0.

    Args:
        features: float [n, C].
        head: the linear head.
        mean: of the training features, float [C].
    """
    centre = np.asarray(mean, np.float64)
    sizes = (head.weight**2).sum(1)

    def score(f: Floats) -> Floats:
        z = _logits(f, head)
        classes, own = np.unique(z.argmax(1), return_inverse=True)
        squares = sizes[classes][:, None] + sizes - 2 * head.weight[classes] @ head.weight.T
        # What rounding leaves of two equal rows is no distance.
        apart = squares > 1e-14 * (sizes[classes][:, None] + sizes)
        per_logit = np.where(apart, 1 / np.sqrt(np.where(apart, squares, 1.0)), 0.0)
        distances = ((z.max(1)[:, None] - z) * per_logit[own]).sum(1)
        return _over(distances, np.linalg.norm(f - centre, axis=1))

    return by_rows(score, {"features": _checked(features, head)}, 5 * len(sizes))


def nci(features: ArrayLike, head: LinearHead, mean: ArrayLike, alpha: float = NCI_ALPHA) -> Floats:
    """Return NCI: w_y . (f - mean) / |f - mean| + alpha |f|_1, y = argmax z.

    Liu, Qin, Detecting Out-of-Distribution through the Lens of Neural Collapse (CVPR 2025).

    Args:
        features: float [n, C].
        head: the linear head.
        mean: of the training features, float [C].
        alpha: weight of the feature's size.
    """
    centre = np.asarray(mean, np.float64)

    def score(f: Floats) -> Floats:
        away = f - centre
        along = (head.weight[_logits(f, head).argmax(1)] * away).sum(1)
        return _over(along, np.linalg.norm(away, axis=1)) + alpha * np.abs(f).sum(1)

    return by_rows(score, {"features": _checked(features, head)}, 3 * len(head.bias))


def vim(features: ArrayLike, head: LinearHead, residual: Residual) -> Floats:
    """Return ViM: log sum exp z - alpha |R'(f - u)| (Wang et al., CVPR 2022).

    The second term is the virtual logit: how much of the feature lies where the training features
    hardly ever are.
    """

    def score(f: Floats) -> Floats:
        outside = np.linalg.norm((f - residual.origin) @ residual.basis, axis=1)
        return log_sum_exp(_logits(f, head)) - residual.alpha * outside

    return by_rows(score, {"features": _checked(features, head)}, len(head.bias) * 3)


def _rebuilt(features, head: LinearHead, change) -> Floats:
    """Return the energy of the head's logits of changed features."""
    return by_rows(
        lambda f: log_sum_exp(_logits(change(f), head)),
        {"features": _checked(features, head)},
        2 * len(head.bias) + 2 * head.weight.shape[1],
    )


def largest_count(channels: int, share: float) -> int:
    """Return how many of a feature's entries are kept where this share is pruned, at least 1."""
    if not 0 <= share < 1:
        raise ValueError(f"the share of pruned entries must be in [0, 1), got {share}")
    return max(1, channels - round(channels * share))


def _largest(f: Floats, share: float) -> tuple[np.ndarray, Floats]:
    """Return which entries of rows [m, C] are kept, and exp(S1 / S2), [m, 1]; 1 where S2 = 0."""
    channels = f.shape[1]
    count = largest_count(channels, share)
    rows = np.arange(len(f))[:, None]
    kept = np.zeros(f.shape, bool)
    kept[rows, np.argpartition(f, channels - count, 1)[:, -count:]] = True
    some = np.where(kept, f, 0.0).sum(1)
    ratio = np.where(some > 0, f.sum(1) / np.where(some > 0, some, 1.0), 0.0)
    return kept, np.exp(ratio)[:, None]


def _logits(f: Floats, head: LinearHead) -> Floats:
    return f @ head.weight.T + head.bias


def _over(numerator: Floats, length: Floats) -> Floats:
    return np.where(length > 0, numerator / np.where(length > 0, length, 1.0), 0.0)


def _checked(features: ArrayLike, head: LinearHead) -> np.ndarray:
    values = matrix("features", features)
    if values.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"the features have {values.shape[1]} channels, the head reads {head.weight.shape[1]}"
        )
    return values
