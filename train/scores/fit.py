"""What scores are fitted to: the run's own training images, and those that it held out.

Clean images, seen once more by the finished network; never unknown images or test images. All of it
is streamed over the stored outputs in float64, a chunk at a time.
"""

from dataclasses import dataclass

import numpy as np

from backmix.pipeline import draws
from backmix.train.outputs import Outputs
from backmix.train.scores.cssr import Standard, standard_of
from backmix.train.scores.features import Gaussians, unit
from backmix.train.scores.linear import LinearHead, Residual
from backmix.train.scores.logits import log_sum_exp
from backmix.train.scores.rows import Floats, percentile, spans

MOST_NEIGHBOURS = 100_000
"""Training features among which neighbours are looked for; of more, a drawn part."""
RIDGE = 1e-6
"""Added to a covariance's diagonal, as a share of the diagonal's mean."""
REACT_SHARE = 0.90
"""ReAct clips above this percentile of the training features' entries."""
PRINCIPAL = 256
"""Dimensions of the principal space that ViM leaves out."""
COLDEST, HOTTEST = 0.01, 100.0
"""Bounds of the fitted temperature."""


@dataclass(frozen=True, eq=False)
class LinearFit:
    """What only the scores of a linear head need."""

    clip: float
    """ReAct's largest entry."""
    residual: Residual
    """ViM's."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Everything that scores learn from known images outside of the test set."""

    images: int
    """Training images."""
    held_out: int
    """Held-out images; 0 = the temperature is that of the training images."""
    temperature: float
    gaussians: Gaussians
    bank: np.ndarray
    """float32 [m, C]: training features of length 1."""
    k: int
    """Which neighbour counts."""
    linear: LinearFit | None
    """None where the head is not linear."""
    cssr: Standard | None
    """None where the head is not CSSR's."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures should know."""


def fit_scores(train: Outputs, head: LinearHead | None, held_out: Outputs | None = None) -> Fit:
    """Fit everything that scores need.

    Args:
        train: outputs of the training images, at least one; their arrays may be mapped files.
        head: the linear head, or None.
        held_out: outputs of the held-out images; for the temperature.

    Raises:
        ValueError: there are no images, or outputs that are not finite.
    """
    if not len(train):
        raise ValueError("scores are fitted to training images, and there are none")
    for outputs in (train, held_out):
        if outputs is not None:
            refuse_not_finite(outputs)
    notes = []
    calibrating = train
    if held_out is not None and len(held_out):
        calibrating = held_out
    else:
        notes.append(
            "no image was held out (--val): the temperature is fitted to the training images "
            "themselves, of which the network is too sure"
        )
    temperature = fit_temperature(calibrating.logits, calibrating.labels)
    if temperature in (COLDEST, HOTTEST):
        notes.append(
            f"the fitted temperature is at its bound, {temperature:g}: the images that it is "
            "fitted to do not determine it"
        )
    gaussians, covariance = fit_gaussians(train.features, train.labels)
    bank = fit_bank(train.features, train.index)
    if len(bank) < len(train):
        notes.append(f"neighbours are looked for among {len(bank):,} of {len(train):,} images")
    figures = {name: x for name, x in train.extras.items() if name.startswith("cssr_")}
    return Fit(
        images=len(train),
        held_out=0 if calibrating is train else len(calibrating),
        temperature=temperature,
        gaussians=gaussians,
        bank=bank,
        k=neighbours(train.logits.shape[1], len(train), len(bank)),
        linear=None if head is None else fit_linear(train, head, gaussians.mean, covariance),
        cssr=standard_of(figures) if figures else None,
        notes=tuple(notes),
    )


def refuse_not_finite(outputs: Outputs) -> None:
    """Raise ValueError where logits or features of an image are NaN or infinite."""
    for what in ("logits", "features"):
        array = getattr(outputs, what)
        bad = sum(
            int(np.count_nonzero(~np.isfinite(array[rows]).all(1)))
            for rows in spans(len(array), array.shape[1])
        )
        if bad:
            raise ValueError(
                f"{bad} of {len(array)} images of set {outputs.name} have {what} that are NaN or "
                "infinite: the model has diverged, or its training images are damaged"
            )


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the T in `COLDEST` .. `HOTTEST` with the least cross-entropy of z / T.

    Guo et al., On Calibration of Modern Neural Networks (2017). In 1 / T the cross-entropy is
    convex: Newton's steps on its derivative, mean of (E_p[z] - z_y), halving the bracket where a
    step would leave it. Where every image is right by some margin the least is at T = 0, and the
    lower bound is returned.

    Args:
        logits: float [n, K], n > 0.
        labels: int64 [n], 0 .. K - 1.
    """
    low, high = 1 / HOTTEST, 1 / COLDEST  # of 1 / T
    if _slope(logits, labels, high)[0] <= 0:
        return COLDEST
    if _slope(logits, labels, low)[0] >= 0:
        return HOTTEST
    sharpness = 1.0
    for _ in range(60):
        slope, curvature = _slope(logits, labels, sharpness)
        low, high = (sharpness, high) if slope < 0 else (low, sharpness)
        step = sharpness - slope / curvature if curvature > 0 else 0.0
        following = step if low < step < high else (low * high) ** 0.5
        if abs(following - sharpness) <= 1e-10 * sharpness:
            break
        sharpness = following
    return float(1 / sharpness)


def _slope(logits: np.ndarray, labels: np.ndarray, sharpness: float) -> tuple[float, float]:
    """Return first and second derivative of the mean cross-entropy of z * sharpness."""
    first = second = 0.0
    for rows in spans(len(logits), 4 * logits.shape[1]):
        z = logits[rows].astype(np.float64)
        z -= z.max(1, keepdims=True)
        p = np.exp(sharpness * z - log_sum_exp(sharpness * z)[:, None])
        expected = (p * z).sum(1)
        first += float((expected - z[np.arange(len(z)), labels[rows]]).sum())
        second += float((p * (z - expected[:, None]) ** 2).sum())
    return first / len(logits), second / len(logits)


def neighbours(classes: int, images: int, kept: int) -> int:
    """Return which neighbour counts: 50, 200 from 100 classes on, 1000 from 1,000 on.

    The paper's for CIFAR-10, CIFAR-100 and ImageNet; of a part of the training images the same
    share. Never more than there are.
    """
    usual = 50 if classes < 100 else 200 if classes < 1000 else 1000
    return min(kept, max(1, round(usual * kept / images)))


def fit_bank(features: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return training features of length 1, float32 [m, C], at most `MOST_NEIGHBOURS`.

    Of more images those with the smallest draws, which depend on the sample numbers alone.
    """
    chosen = np.arange(len(features))
    if len(features) > MOST_NEIGHBOURS:
        # Number 0 of this stream says what --val holds out; this is another draw.
        key = draws.words(0, 0, index, "holdout", 1)
        chosen = np.sort(np.argsort(key, kind="stable")[:MOST_NEIGHBOURS])
    bank = np.empty((len(chosen), features.shape[1]), np.float32)
    for rows in spans(len(chosen), 3 * features.shape[1]):
        bank[rows] = unit(features[chosen[rows]].astype(np.float64))
    return bank


def fit_gaussians(features: np.ndarray, labels: np.ndarray) -> tuple[Gaussians, Floats]:
    """Return the Gaussians of training features, and the covariance of all of them, [C, C].

    Covariances divide by the number of images. Two passes: means first, so that nothing is lost
    where they are large against the spread.

    Args:
        features: float [n, C], n > 0.
        labels: int64 [n]; classes without an image have no Gaussian.
    """
    count, channels = features.shape
    classes, own, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.zeros((len(classes), channels))
    for rows in spans(count, 3 * channels):
        order = np.argsort(own[rows], kind="stable")
        present, starts = np.unique(own[rows][order], return_index=True)
        part = features[rows].astype(np.float64)[order]
        means[present] += np.add.reduceat(part, starts, axis=0)
    means /= sizes[:, None]
    within = np.zeros((channels, channels))
    for rows in spans(count, 3 * channels):
        away = features[rows].astype(np.float64) - means[own[rows]]
        within += away.T @ away
    within /= count
    mean = sizes @ means / count
    offsets = means - mean
    covariance = within + offsets.T @ (offsets * (sizes / count)[:, None])
    whiten = _whitening(within, covariance)
    return (
        Gaussians(mean, whiten, offsets @ whiten.T, _whitening(covariance, covariance)),
        covariance,
    )


def _whitening(covariance: Floats, instead: Floats) -> Floats:
    """Return the inverse Cholesky factor of a covariance with its ridge.

    `instead` sizes the ridge where the covariance is zero: one image in each class.
    """
    size = np.trace(covariance) or np.trace(instead) or float(len(covariance))
    ridge = RIDGE * size / len(covariance)
    factor = np.linalg.cholesky(covariance + ridge * np.eye(len(covariance)))
    return np.linalg.inv(factor).astype(np.float64)


def fit_linear(train: Outputs, head: LinearHead, mean: Floats, covariance: Floats) -> LinearFit:
    """Return what the scores of a linear head need; mean and covariance are those of `train`."""
    clip = percentile(train.features, REACT_SHARE)
    return LinearFit(clip, fit_residual(train.features, train.logits, head, mean, covariance))


def fit_residual(
    features: np.ndarray,
    logits: np.ndarray,
    head: LinearHead,
    mean: Floats,
    covariance: Floats,
) -> Residual:
    """Return ViM's residual space and its size beside the logits.

    The space is orthogonal to the `PRINCIPAL` directions with the largest E[(R'(f - u))^2]; half of
    all directions where the features have, or the images span, no more than that. alpha = mean of
    max z over mean of |R'(f - u)|, over the training images; 0 where all these lengths are 0 but
    for rounding, as where fewer channels than the principal ones are ever alive: then nothing is
    known of how far known images reach into this space.

    Args:
        features: of the training images, float [n, C].
        logits: theirs, float [n, K].
        head: the linear head.
        mean, covariance: of these features, float64 [C] and [C, C].
    """
    count, channels = features.shape
    origin = -np.linalg.pinv(head.weight) @ head.bias
    offset = mean - origin
    _, directions = np.linalg.eigh(covariance + np.outer(offset, offset))  # ascending
    room = min(channels, count)
    basis = directions[:, : channels - (PRINCIPAL if PRINCIPAL < room else room // 2)]
    largest = float(logits.max(1).sum(dtype=np.float64))
    lengths = whole = 0.0
    for rows in spans(count, 4 * channels):
        away = features[rows].astype(np.float64) - origin
        lengths += float(np.linalg.norm(away @ basis, axis=1).sum())
        whole += float(np.linalg.norm(away, axis=1).sum())
    alpha = largest / lengths if lengths > 1e-12 * whole else 0.0
    return Residual(origin, np.ascontiguousarray(basis), alpha)
