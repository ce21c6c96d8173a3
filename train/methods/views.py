"""Views of a batch without a donor: augmented for training, or plain; and draws on the device."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from backmix.kernels.mix_background import mix_background
from backmix.pipeline.batch import Batch
from backmix.pipeline.draws import MixDraws
from backmix.train.options import Augment

FULL = 65536
"""Side of a box that shows the whole image, in 16.16 fractions."""


@dataclass(frozen=True)
class DeviceDraws:
    """`MixDraws` as tensors on the batch's device; see there for shapes and dtypes."""

    flip: Tensor
    shift: Tensor | None
    donor: Tensor
    patch: Tensor
    tie: Tensor


def to_device(drawn: MixDraws, device: torch.device) -> DeviceDraws:
    """Copy draws to the device, without waiting for it."""

    def move(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

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
    n, device = len(batch), batch.pool.device
    return mix_background(
        batch.pool,
        batch.rows,
        batch.rows,
        bank=torch.zeros(1, 1, 1, device=device),
        bank_row=torch.zeros(n, dtype=torch.int64, device=device),
        box=full_boxes(n, device),
        patch=torch.zeros(n, 6, dtype=torch.int32, device=device),
        flip=torch.zeros(n, dtype=torch.bool, device=device) if drawn is None else drawn.flip,
        shift=None if drawn is None else drawn.shift,
        tie=torch.zeros(n, dtype=torch.int32, device=device),
        mask_cells=0,
        mean=augment.mean,
        std=augment.std,
        pad=border_of(augment),
        mode="none",
        dtype=dtype,
    )


def full_boxes(n: int, device: torch.device) -> Tensor:
    """Return n boxes of the whole image in 16.16 fractions, int32 [n, 4]."""
    boxes = torch.zeros(n, 4, dtype=torch.int32, device=device)
    boxes[:, 2:] = FULL
    return boxes
