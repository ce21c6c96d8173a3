"""update_cam_bank: class activation maps of a batch, moved to the stored frame, blended in.

The map of an image is the evidence for its own class at each location of the last feature map
(Zhou et al., "Learning deep features for discriminative localization", CVPR 2016). The network saw
a crop, flipped, shifted, perhaps with a pasted window; the bank keeps one small running mean per
training image in the frame of the *stored* image, so that maps of different crops meet. Cells that
this crop did not show keep their value.
Bytes: the feature map is read once; each sample writes one bank row of g x g' cells.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from backmix.kernels import dispatch

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# --- meaning -----------------------------------------------------------------------------------


@torch.no_grad()
def update_cam_bank_meaning(
    bank: Tensor,
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bank_row: Tensor,
    *,
    box: Tensor,
    flip: Tensor | None,
    shift: Tensor | None,
    patch: Tensor | None,
    size: tuple[int, int],
    rate: float | Tensor,
    normalise: Literal["image", "none"],
) -> None:
    """Blend the maps into the bank: the specification in plain PyTorch, and the CPU's form.

    The arguments are those of `update_cam_bank`; size is (1, 1) where it does not matter.
    """
    if len(bank) == 0 or len(labels) == 0:
        return
    rows, columns = bank.shape[1:]
    value = _class_maps(features, weight, labels)
    if normalise == "image":
        value = _unit_range(value)

    # Which view cell each stored cell takes, and whether the view shows it.
    y0, x0, box_height, box_width = box.long()[:, :, None].unbind(1)
    down = _Side(start=y0, length=box_height, cells=rows, pixels=size[0])
    right = _Side(start=x0, length=box_width, cells=columns, pixels=size[1])
    none = torch.zeros_like(y0)
    sy, sx = (none, none) if shift is None else shift.long()[:, :, None].unbind(1)
    row, row_seen = down.view_cells(shift=sy)
    column, column_seen = right.view_cells(shift=sx, flip=flip)
    seen = row_seen[:, :, None] & column_seen[:, None, :]
    if patch is not None:
        ty, tx, _, _, patch_height, patch_width = patch.long()[:, :, None].unbind(1)
        seen &= ~(
            down.within(ty, patch_height)[:, :, None] & right.within(tx, patch_width)[:, None]
        )
    cell = row[:, :, None] * columns + column[:, None, :]
    value = value.flatten(1).gather(1, cell.flatten(1)).view_as(cell)

    # The running mean. One value that is not finite would stay in it for ever.
    if not isinstance(rate, Tensor):
        rate = torch.full((), rate, device=bank.device)
    written = bank_row >= 0
    stored = bank.index_select(0, bank_row.clamp(min=0))
    old = stored.float()
    new = (old + rate * (value - old)).to(bank.dtype)
    moves = seen & written[:, None, None] & new.isfinite() & (rate != 0)
    new = torch.where(moves, new, stored)

    # A sample that writes nothing repeats a sample that writes, or, where there is none, row 0 as
    # it is: one write of n rows, without asking the device which of them count.
    some = written.int().argmax()
    sample = torch.where(written, torch.arange(len(written), device=bank.device), some)
    bank.index_copy_(0, bank_row[sample].clamp(min=0), new[sample])


@dataclass(frozen=True)
class _Side:
    """One side of the stored frame, cut into cells, and the part of it that the box shows."""

    start: Tensor
    """Start of the box, 16.16 of this side, int64 [n, 1]."""
    length: Tensor
    """Length of the box, 16.16, int64 [n, 1]."""
    cells: int
    pixels: int
    """Length of the view and of the output along this side; 1 where no pixel matters."""

    @property
    def span(self) -> Tensor:
        """Return the length of the box in the units of `centres`, int64 [n, 1]."""
        return self.cells * self.length

    @property
    def centres(self) -> Tensor:
        """Return the centres of the stored cells, counted from the start of the box, [n, cells]."""
        cell = torch.arange(self.cells, device=self.start.device)
        return (2 * cell + 1) * 32768 - self.cells * self.start

    def view_cells(self, *, shift: Tensor, flip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the features' cell under each stored centre, and whether there is one.

        Args:
            shift: in pixels, int64 [n, 1].
            flip: mirror this side, bool [n].

        Returns:
            cell, int64 [n, cells], clamped; seen, bool [n, cells].
        """
        centre, span = self.centres, self.span
        seen = (centre >= 0) & (centre < span)
        if flip is not None:
            centre = torch.where(flip[:, None], span - 1 - centre, centre)
        moved = centre * self.pixels - shift * span
        seen &= (moved >= 0) & (moved < self.pixels * span)
        cell = moved // (self.pixels * self.length).clamp(min=1)
        return cell.clamp(0, self.cells - 1), seen

    def within(self, start: Tensor, size: Tensor) -> Tensor:
        """Return which centres lie on the view's pixels start..start+size-1, bool [n, cells]."""
        centre = self.centres * self.pixels
        return (centre >= start * self.span) & (centre < (start + size) * self.span)


def _class_maps(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return sum over c of weight[label, c] * features[c], fp32 [n, g, g'].

    An unknown label (-1) reads class 0: such a sample is not written.
    """
    own = weight.index_select(0, labels.clamp(min=0)).float()
    # No matrix product: on some devices that would not be fp32.
    return (own[:, :, None, None] * features.float()).sum(1)


def _unit_range(maps: Tensor) -> Tensor:
    """Move each map to 0..1 by its least and greatest cell; a flat map is 0.5 everywhere.

    A map with a cell that is not finite becomes NaN everywhere, so that nothing of it is written.
    """
    least, greatest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    span = greatest - least
    flat = span <= 1e-6 * greatest.abs().clamp(min=1e-12)
    unit = torch.where(flat, 0.5, (maps - least) / torch.where(flat, 1.0, span))
    return torch.where(span.isfinite(), unit, torch.nan)


# --- door --------------------------------------------------------------------------------------


def update_cam_bank(
    bank: Tensor,
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bank_row: Tensor,
    *,
    box: Tensor,
    flip: Tensor | None = None,
    shift: Tensor | None = None,
    patch: Tensor | None = None,
    size: tuple[int, int] | None = None,
    rate: float | Tensor = 0.1,
    normalise: Literal["image", "none"] = "image",
    backend: Literal["torch", "triton"] | None = None,
    check: bool = False,
) -> None:
    """Blend the class activation maps of n images into their rows of the bank, in place.

    bank[row, cell] += rate * (map - bank[row, cell]) for every stored cell whose centre the network
    saw; other cells, and values that are not finite, leave the bank as it is. Call it with the
    weight that made the logits: after the forward pass, before the optimizer's step. Never waits
    for a device.

    Args:
        bank: fp16 or fp32 [m, g, g'], contiguous; one row per training image.
        features: last feature map before the mean over locations, [n, C, g, g'] of the bank's
            grid, fp32, bf16 or fp16, in any memory format.
        weight: of the linear layer after that mean, [K, C], fp32, bf16 or fp16.
        labels: class of each image, int64 [n], 0..K-1 where the row is written.
        bank_row: int64 [n]; below 0 = not written (padding, replaced images). Each other row at
            most once.
        box: the images' crops as 16.16 fractions of the stored image (`box_fractions`), int32
            [n, 4] as y0, x0, h, w.
        flip: bool [n]; flip, shift and patch as they were given to `mix_background`, and only if
            the features come from its output. None = the network saw the view itself.
        shift: int32 [n, 2], in pixels.
        patch: int32 [n, 6]; cells under the pasted window are not written.
        size: H, W of the view in pixels; required with shift or patch.
        rate: weight of the new map, 0..1; a float, or a 0-d fp32 tensor on the device. At 0 every
            bit stays.
        normalise: "image" moves each map to 0..1; "none" takes it as it is.
        backend: "torch" or "triton"; None = the environment variable BACKMIX_KERNELS, else the
            best form there is.
        check: look at the values, too, and name the first bad sample. This waits for the device.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: wrong shape, device, layout or option; with `check`, a value out of range.
    """
    dispatch.choose(backend, "update_cam_bank", torch.device("cpu"))
    _check_tensors(bank, features, weight, labels, bank_row, box, flip, shift, patch)
    _check_options(size, shift, patch, rate, normalise, bank.device)
    size = size or (1, 1)
    if check:
        _check_values(bank, weight, labels, bank_row, box, patch, size)
    update_cam_bank_meaning(
        bank,
        features,
        weight,
        labels,
        bank_row,
        box=box,
        flip=flip,
        shift=shift,
        patch=patch,
        size=size,
        rate=rate,
        normalise=normalise,
    )


def _check_tensors(
    bank: Tensor,
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bank_row: Tensor,
    box: Tensor,
    flip: Tensor | None,
    shift: Tensor | None,
    patch: Tensor | None,
) -> None:
    """Refuse tensors of the wrong dtype, shape, device or layout; looks at no values."""
    dispatch.expect_tensors(bank=bank, labels=labels)
    expect, device, n = dispatch.expect, bank.device, len(labels)
    dispatch.expect_bank(bank, device)
    expect("features", features, _FLOATS, (n, "C", *bank.shape[1:]), device)
    expect("weight", weight, _FLOATS, ("K", features.shape[1]), device)
    expect("labels", labels, (torch.int64,), (n,), device)
    expect("bank_row", bank_row, (torch.int64,), (n,), device)
    expect("box", box, (torch.int32,), (n, 4), device)
    if flip is not None:
        expect("flip", flip, (torch.bool,), (n,), device)
    if shift is not None:
        expect("shift", shift, (torch.int32,), (n, 2), device)
    if patch is not None:
        expect("patch", patch, (torch.int32,), (n, 6), device)


def _check_options(
    size: tuple[int, int] | None,
    shift: Tensor | None,
    patch: Tensor | None,
    rate: float | Tensor,
    normalise: str,
    device: torch.device,
) -> None:
    """Refuse options that are unknown, out of range or missing."""
    if size is None and (shift is not None or patch is not None):
        raise ValueError("size must be given as (H, W) in pixels, because shift or patch is given")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (H, W) in pixels, at least 1, got {size}")
    if isinstance(rate, Tensor):
        dispatch.expect("rate", rate, (torch.float32,), (), device)
    elif not isinstance(rate, float | int):
        raise TypeError(f"rate must be a float or a tensor, got {type(rate).__name__}")
    elif not 0 <= rate <= 1:
        raise ValueError(f"rate must be in 0..1, got {rate}")
    if normalise not in ("image", "none"):
        raise ValueError(f"normalise must be image or none, got {normalise!r}")


def _check_values(
    bank: Tensor,
    weight: Tensor,
    labels: Tensor,
    bank_row: Tensor,
    box: Tensor,
    patch: Tensor | None,
    size: tuple[int, int],
) -> None:
    """Refuse values out of range, naming the first bad sample. Waits for the device."""
    written = bank_row >= 0
    bad = bank_row >= len(bank)
    dispatch.refuse("bank_row", bank_row, bad, f"must be below {len(bank)}, the bank's rows")
    bad = written & ((labels < 0) | (labels >= len(weight)))
    dispatch.refuse("labels", labels, bad, f"must be in 0..{len(weight) - 1}, or bank_row below 0")
    ordered = bank_row.sort(stable=True)
    again = torch.zeros_like(written)
    again[ordered.indices[1:]] = ordered.values[1:] == ordered.values[:-1]
    bad = written & again
    dispatch.refuse("bank_row", bank_row, bad, "must not occur twice in a batch")
    dispatch.refuse_boxes(box)
    if patch is not None:
        dispatch.refuse_patches(patch, *size)
