"""The scores of CSSR: how well the predicted class knows an image, cell by cell and as a whole.

Huang, Wang, Wang, Zhu, Hu: "Class-Specific Semantic Reconstruction for Open Set Recognition" (TPAMI
2022), and its public code. With the feature map F (C channels, cells l), the predicted class y, its
logit c(l) of a cell, and a(l) = mean over channels of |F_l|:

    S0 = mean_l c(l) / a(l)^2 for prototypes, mean_l c(l) for reciprocal points
    S1 = mean_l mean_i P[y, i] F_l[i],  P[k, i] = A[k, i] / sum_k' A[k', i]
    S2 = sum_ij G_ij Gbar[y]_ij,  G_ij = (sum_l F_l[i]^8 F_l[j]^8)^(1/8)

where A[k] is the mean of |F| over cells and training images predicted as k, and Gbar[k] the mean of
their G. `cssr` is the sum of the three, each less its mean and divided by its standard deviation
over the training images. A and Gbar, means and deviations come from the same clean images here; the
public code takes the latter two from augmented ones.

Two passes over the clean training images, in evaluation mode, then one over each set to be judged:

    fit = CssrFit(model)
    for each training batch:  fit.learn(logits, maps)
    fit.finish_learning()
    for each training batch:  fit.figures(logits, maps)   -> training figures
    standard = standard_of(training figures)
    for each batch of a set:  fit.figures(logits, maps)   -> figures;  cssr(figures, standard)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from backmix.train.models.build import Model
from backmix.train.models.heads import Reconstruction

Floats = NDArray[np.float64]

MOST_GRAM = 2**26
"""Numbers of the classes' mean Gram matrices, K C^2, up to which S2 is computed: 512 MiB."""
LIVE = 1e-6
"""A cell whose features are smaller on the mean of their sizes says nothing to prototypes' S0."""
_AT_ONCE = 2**24
"""Numbers of the Gram matrices that are made at a time: 64 MiB in fp32, 128 in float64."""


@torch.no_grad()
def cell_figures(model: Model, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Return what needs no fit: {"cssr_s0": float64 [n]}.

    Args:
        model: a network with CSSR's head.
        logits: [n, K], its log p; the largest is the predicted class.
        features: [n, C, g, g'], the maps that the head read; fp32, bf16 or fp16.

    Raises:
        TypeError: the network has another head.
    """
    head = _head_of(model)
    own = logits.argmax(1)[:, None, None]
    cells = head.cell_logits(features).flatten(2).double()
    own_cells = cells.gather(1, own.expand(-1, 1, cells.shape[2])).squeeze(1)  # [n, cells]
    if head.reciprocal:
        return {"cssr_s0": own_cells.mean(1)}
    size = features.flatten(2).abs().double().mean(1)
    live = size >= LIVE
    ratio = torch.where(live, own_cells / torch.where(live, size, 1.0).square(), 0.0)
    mean = ratio.sum(1) / live.sum(1).clamp(min=1)
    # What is nothing everywhere would be rebuilt without an error: the best of all scores. It gets
    # that of features of this size which are not rebuilt at all.
    nothing = -head.gamma * features.shape[1] / LIVE
    return {"cssr_s0": torch.where(live.any(1), mean, nothing)}


class CssrFit:
    """What the classes' training images look like to a network with CSSR's head.

    Sums are float64. One image's features may be of any size: S2 is in units of the largest
    <Gbar[k], Gbar[k]>, so that it fits fp32 whatever their scale. Call everything outside of
    autocast.
    """

    def __init__(self, model: Model, most_gram: int = MOST_GRAM):
        """Begin without any image.

        Args:
            model: a network with CSSR's head, on the device of the maps that will come.
            most_gram: S2 is left out where its K C^2 numbers would be more.

        Raises:
            TypeError: the network has another head.
        """
        encoder = _head_of(model).encoder
        classes, _, channels = encoder.shape
        self.model = model

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=encoder.device)

        self.images = zeros(classes)
        """Training images predicted as each class, [K]."""
        self.activity = zeros(classes, channels)
        """[K, C]; sums of |F| while learning, then the shares P."""
        self.grams: Tensor | None = None
        """[K, C, C]; sums of G while learning, then Gbar."""
        self.unit = 1.0
        """Of S2."""
        self.without_gram = ""
        """Why there is no S2; empty where there is one."""
        if classes * channels**2 > most_gram:
            self.without_gram = (
                f"cssr goes without its third part: the Gram matrices of {classes:,} classes with "
                f"{channels:,} channels have {classes * channels**2:,} numbers, more than "
                f"{most_gram:,}"
            )
        else:
            self.grams = zeros(classes, channels, channels)

    @torch.no_grad()
    def learn(self, logits: Tensor, features: Tensor) -> None:
        """Add a batch of clean training images; arguments as for `cell_figures`.

        Raises:
            ValueError: features or logits of an image are not finite.
        """
        _refuse_not_finite(logits, features)
        predicted = logits.argmax(1)
        member = torch.nn.functional.one_hot(predicted, len(self.images)).double()
        self.images += member.sum(0)
        self.activity += member.T @ features.abs().double().mean((2, 3))
        if self.grams is not None:
            for class_, rows in _by_class(predicted, _images_at_once(features)):
                self.grams[class_] += _gram(features[rows]).sum(0)

    def finish_learning(self) -> None:
        """Turn sums into means and shares; of a class that no image was predicted as, zeros.

        Raises:
            ValueError: there was no image.
        """
        if not self.images.sum() > 0:
            raise ValueError("the scores of CSSR need training images, and there were none")
        count = self.images.clamp(min=1)
        mean = self.activity / count[:, None]
        total = mean.sum(0)
        self.activity = mean / torch.where(total > 0, total, 1.0)
        if self.grams is not None:
            self.grams /= count[:, None, None]
            largest = float(self.grams.square().sum((1, 2)).max())
            self.unit = largest or 1.0

    @torch.no_grad()
    def figures(self, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Return S0, S1 and, where there is one, S2 of a batch, after `finish_learning`.

        Arguments as for `cell_figures`. {"cssr_s0": .., "cssr_s1": .., "cssr_s2": ..}, float64 [n].
        """
        predicted = logits.argmax(1)
        pooled = features.double().mean((2, 3))
        figures = cell_figures(self.model, logits, features)
        figures["cssr_s1"] = (self.activity[predicted] * pooled).mean(1)
        if self.grams is not None:
            likeness = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
            for class_, rows in _by_class(predicted, _images_at_once(features)):
                own = self.grams[class_].flatten() / self.unit
                likeness[rows] = _gram(features[rows]).flatten(1) @ own
            figures["cssr_s2"] = likeness
        return figures


@dataclass(frozen=True)
class Standard:
    """Mean and standard deviation of each figure over the clean training images."""

    mean: Mapping[str, float]
    deviation: Mapping[str, float]


def standard_of(figures: Mapping[str, ArrayLike]) -> Standard:
    """Return the standard of training figures, each [n], by their names.

    Raises:
        ValueError: a figure is of no image, or not finite.
    """
    plain = {name: _finite(name, values) for name, values in figures.items()}
    for name, values in plain.items():
        if not len(values):
            raise ValueError(f"{name} is of no training image, so it has no mean")
    return Standard(
        {name: float(values.mean()) for name, values in plain.items()},
        {name: float(values.std()) for name, values in plain.items()},
    )


def cssr(figures: Mapping[str, ArrayLike], standard: Standard) -> Floats:
    """Return CSSR's score, float64 [n]: the sum of the figures in training deviations.

    sum_i (S_i - mean_i) / (deviation_i + 1e-8) over the figures of the standard.

    Raises:
        ValueError: a figure of the standard is missing, or not finite.

    >>> standard = standard_of({"cssr_s0": [0.0, 2.0], "cssr_s1": [1.0, 5.0]})
    >>> cssr({"cssr_s0": [3.0], "cssr_s1": [1.0]}, standard).round(6).tolist()
    [1.0]
    """
    missing = sorted(set(standard.mean) - set(figures))
    if missing:
        raise ValueError(
            f"cssr needs {', '.join(missing)}, which was not computed for these images"
        )
    parts = [
        (_finite(name, figures[name]) - mean) / (standard.deviation[name] + 1e-8)
        for name, mean in standard.mean.items()
    ]
    return np.sum(parts, 0)


def _head_of(model: Model) -> Reconstruction:
    head = model.head
    if not isinstance(head, Reconstruction):
        raise TypeError(f"the scores of CSSR need its head, not a {type(head).__name__}")
    return head


def _gram(features: Tensor) -> Tensor:
    """Return G of maps [n, C, g, g'], float64 [n, C, C].

    Sixteenth powers leave fp32 from 256 on, and below 0.004. With each channel divided by its
    largest size they lie in 0 .. 1, and what becomes 0 for being too small, below 1e-38, is an
    error of less than 4e-5 of the product of the two channels' largest sizes. Eighth powers are
    positive, so the sign that the public code gives G is always +.
    """
    cells = features.flatten(2).float().abs()
    largest = cells.amax(2, keepdim=True)
    powers = (cells / torch.where(largest > 0, largest, 1.0)).square().square().square()
    with torch.autocast(features.device.type, enabled=False):
        root = (powers @ powers.mT).sqrt().sqrt().sqrt()
    largest = largest.double()
    return root.double() * largest * largest.mT


def _by_class(predicted: Tensor, most: int) -> list[tuple[int, Tensor]]:
    """Return (class, rows of images predicted as it), at most so many rows at a time."""
    return [
        (class_, rows)
        for class_ in predicted.unique().tolist()
        for rows in (predicted == class_).nonzero().flatten().split(most)
    ]


def _images_at_once(features: Tensor) -> int:
    return max(1, _AT_ONCE // features.shape[1] ** 2)


def _refuse_not_finite(logits: Tensor, features: Tensor) -> None:
    bad = ~(logits.isfinite().all(1) & features.flatten(1).isfinite().all(1))
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(bad)} training images have features or logits that are NaN "
            "or infinite: the model has diverged, or the images were not normalised as in training"
        )


def _finite(name: str, values: ArrayLike) -> Floats:
    plain = np.asarray(values, np.float64)
    bad = int(np.count_nonzero(~np.isfinite(plain)))
    if bad:
        raise ValueError(
            f"{name} of {bad} of {plain.size} images is NaN or infinite: the model has diverged, "
            "or the images were not normalised as in training"
        )
    return plain
