"""Views of a batch, plain or augmented for training, and draws on the device."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from backmix.kernels.mix_background import mix_background
from backmix.pipeline.batch import Batch
from backmix.pipeline.draws import MixDraws, mix_draws
from backmix.pipeline.views import to_device as pinned_to_device
from backmix.train.augmentations import cssr, cssr_contrast, randaugment
from backmix.train.methods.method import DeviceDraws, Views
from backmix.train.options import Augment

FULL = 65536
"""Side of a box that shows the whole image, in 16.16 fractions."""


def to_device(drawn: MixDraws, device: torch.device) -> DeviceDraws:
    """Copy draws to the device, without waiting for it."""

    def move(array: np.ndarray) -> Tensor:
        return pinned_to_device(array, device)

    return DeviceDraws(
        flip=move(drawn.flip),
        shift=None if drawn.shift is None else move(drawn.shift),
        donor=move(drawn.donor),
        patch=move(drawn.patch),
        tie=move(drawn.tie),
    )


def border_of(augment: Augment) -> tuple[float, float, float] | Literal["reflect"]:
    """Return the `pad` argument of `mix_background`: a colour in pixel units, or "reflect"."""
    match augment.border:
        case "black":
            return (0.0, 0.0, 0.0)
        case "mean":
            return augment.mean
        case "reflect":
            return "reflect"


def unmixed(
    batch: Batch,
    augment: Augment,
    drawn: DeviceDraws | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return normalised views in which nothing is pasted, [n, 3, H, W] channels-last.

    Args:
        batch: the images.
        augment: normalisation and border.
        drawn: flips and shifts to apply; None = the plain views.
        dtype: of the views.
    """
    if drawn is None:
        return normalised(batch.pool, batch.rows, augment, dtype)
    return _shown(batch.pool, batch.rows, augment, drawn.flip, drawn.shift, dtype)


def normalised(
    pool: Tensor, rows: Tensor, augment: Augment, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return images as they are but for (pixel - mean) / std, [n, 3, H, W] channels-last.

    Args:
        pool: uint8 [P, H, W, 3].
        rows: which of them, int64 [n].
        augment: mean and std.
        dtype: of the views.
    """
    still = torch.zeros(len(rows), dtype=torch.bool, device=pool.device)
    return _shown(pool, rows, augment, still, None, dtype)


def _shown(
    pool: Tensor,
    rows: Tensor,
    augment: Augment,
    flip: Tensor,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return rows of a pool, flipped, shifted and normalised; as `mix_background` without donors.

    Of dtype uint8, which is not normalised, [n, H, W, 3].
    """
    n, device = len(rows), pool.device
    return mix_background(
        pool,
        rows,
        rows,
        bank=torch.zeros(1, 1, 1, device=device),
        bank_row=torch.zeros(n, dtype=torch.int64, device=device),
        box=full_boxes(n, device),
        patch=torch.zeros(n, 6, dtype=torch.int32, device=device),
        flip=flip,
        shift=shift,
        tie=torch.zeros(n, dtype=torch.int32, device=device),
        mask_cells=0,
        mean=augment.mean,
        std=augment.std,
        pad=border_of(augment),
        mode="none",
        dtype=dtype,
    )


def draw_plain(batch: Batch, augment: Augment) -> DeviceDraws:
    """Return the draws of a method that mixes nothing: flips and shifts, and no patch."""
    height, width = batch.pool.shape[1:3]
    drawn = mix_draws(
        batch.place.seed,
        batch.place.epoch,
        batch.host.index,
        rows=batch.host.rows,
        pool_rows=len(batch.pool),
        group=batch.group,
        size=(height, width),
        patch=1,
        probability=0.0,
        flip=augment.flip,
        pad=augment.pad,
    )
    return to_device(drawn, batch.pool.device)


def augmented(batch: Batch, augment: Augment, drawn: DeviceDraws, dtype: torch.dtype) -> Views:
    """Return the training views of a method that mixes nothing."""

    def make(flip: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _shown(batch.pool, batch.rows, augment, flip, shift, dtype)

    return Views(with_pool(make, batch, augment, drawn, dtype), drawn)


def with_pool(
    make: Callable[[Tensor, Tensor | None, torch.dtype], Tensor],
    batch: Batch,
    augment: Augment,
    drawn: DeviceDraws,
    dtype: torch.dtype,
) -> Tensor:
    """Return training views with the strong operations of `augment.pool` at their place.

    RandAugment comes before flip and shift, CSSR's operations after them; both before normalising.

    Args:
        make: (flip, shift, dtype) -> views, which may be mixes, as `mix_background` returns them:
            of a float dtype normalised, [n, 3, H, W], of uint8 not, [n, H, W, 3].
        batch: the images, for their sample numbers.
        augment: the pool, normalisation and border.
        drawn: flips and shifts.
        dtype: of the result.

    Returns [n, 3, H, W] channels-last.
    """
    if augment.pool == "none":
        return make(drawn.flip, drawn.shift, dtype)
    seed, epoch, index = batch.place.seed, batch.place.epoch, batch.host.index
    rows = torch.arange(len(batch), device=batch.pool.device)
    still = torch.zeros_like(drawn.flip)
    if augment.pool == "randaugment":
        images = randaugment(
            make(still, None, torch.uint8),
            seed,
            epoch,
            index,
            operations=augment.operations,
            magnitude=augment.magnitude,
            moves=augment.moves,
        )
        return _shown(images, rows, augment, drawn.flip, drawn.shift, dtype)
    images = cssr(make(drawn.flip, drawn.shift, torch.uint8), seed, epoch, index)
    views = _shown(images, rows, augment, still, None, dtype)
    scale = pinned_to_device(cssr_contrast(seed, epoch, index), views.device)
    return views.mul_(scale[:, None, None, None])


def full_boxes(n: int, device: torch.device) -> Tensor:
    """Return n boxes of the whole image in 16.16 fractions, int32 [n, 4]."""
    boxes = torch.zeros(n, 4, dtype=torch.int32, device=device)
    boxes[:, 2:] = FULL
    return boxes
