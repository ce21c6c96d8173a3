"""update_cam_bank: class activation maps of a batch, moved to the stored frame, blended in.

The map of an image is the evidence for its own class at each location of the last feature map
(Zhou et al., "Learning deep features for discriminative localization", CVPR 2016). The network saw
a crop, flipped, shifted, perhaps with a pasted window; the bank keeps one small running mean per
training image in the frame of the *stored* image, so that maps of different crops meet. Cells that
this crop did not show keep their value.
The map may have another grid than the bank, as it does where views grow while a network trains.
The kernel has one program per sample, because the map's scale needs all cells: it holds the map's
cells as rows of a tile, walks the channels, and then every stored cell fetches its value.
Bytes: the feature map is read once, and nothing else counts: n * C * h * w * itemsize; each sample
reads one row of the weight and moves one bank row. Operations: one multiply-add per element.
Floor: bytes / copy bandwidth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from backmix.kernels import configs, dispatch
from backmix.kernels.launch import Launch

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

    # Which cell of the map each stored cell takes, and whether the view shows it.
    y0, x0, box_height, box_width = box.long()[:, :, None].unbind(1)
    map_rows, map_columns = features.shape[2:]
    down = _Side(y0, box_height, cells=rows, map_cells=map_rows, pixels=size[0])
    right = _Side(x0, box_width, cells=columns, map_cells=map_columns, pixels=size[1])
    none = torch.zeros_like(y0)
    sy, sx = (none, none) if shift is None else shift.long()[:, :, None].unbind(1)
    row, row_seen = down.taken_cells(shift=sy)
    column, column_seen = right.taken_cells(shift=sx, flip=flip)
    seen = row_seen[:, :, None] & column_seen[:, None, :]
    if patch is not None:
        ty, tx, _, _, patch_height, patch_width = patch.long()[:, :, None].unbind(1)
        seen &= ~(
            down.within(ty, patch_height)[:, :, None] & right.within(tx, patch_width)[:, None]
        )
    cell = row[:, :, None] * map_columns + column[:, None, :]
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
    """Stored cells along this side."""
    map_cells: int
    """Cells of the map along this side of the view."""
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

    def taken_cells(self, *, shift: Tensor, flip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the map's cell under each stored centre, and whether there is one.

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
        cell = moved * self.map_cells // (self.pixels * span).clamp(min=1)
        return cell.clamp(0, self.map_cells - 1), seen

    def within(self, start: Tensor, size: Tensor) -> Tensor:
        """Return which centres lie on the view's pixels start..start+size-1, bool [n, cells]."""
        centre = self.centres * self.pixels
        return (centre >= start * self.span) & (centre < (start + size) * self.span)


def _class_maps(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return sum over c of weight[label, c] * features[c], fp32 [n, h, w].

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


# --- kernel ------------------------------------------------------------------------------------

LONGEST_SIDE = 1023
"""Pixels of a view's side up to which the cell arithmetic fits 32 bits: 2 * 16 * 65537 * 1023."""


@triton.jit
def _taken_cell(place, length, CELLS: tl.constexpr, MAP_CELLS: tl.constexpr):
    """Return place * MAP_CELLS // (length * CELLS), the map's cell at 0 <= place < length * CELLS.

    In two steps where the grids differ, so that 32 bits hold it: length is at most 65537 * 1023.
    """
    length = tl.maximum(length, 1)
    cell = place // length
    if MAP_CELLS != CELLS:
        cell = (cell * MAP_CELLS + (place - cell * length) * MAP_CELLS // length) // CELLS
    return cell


@triton.jit(do_not_specialize=["bank_rows", "classes", "height", "width"])
def _update_cam_bank_kernel(
    bank_ptr,  # fp16 or fp32 [bank_rows, ROWS, COLUMNS], in and out
    features_ptr,  # fp32, bf16 or fp16 [n, C, MAP_ROWS, MAP_COLUMNS] by its strides
    weight_ptr,  # fp32, bf16 or fp16 [classes, C] by its strides
    labels_ptr,  # int64 [n]
    bank_row_ptr,  # int64 [n]
    box_ptr,  # int32 [n, 4] as y0, x0, h, w, 16.16
    flip_ptr,  # bool [n] or None
    shift_ptr,  # int32 [n, 2] or None
    patch_ptr,  # int32 [n, 6] or None
    rate_ptr,  # fp32 [] or None
    rate,  # where rate_ptr is None
    bank_rows,
    classes,
    height,  # of the view in pixels, at most LONGEST_SIDE; 1 where no pixel matters
    width,
    sample_stride,  # of the features
    channel_stride,
    cell_stride,
    weight_row_stride,
    weight_stride,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    MAP_COLUMNS: tl.constexpr,
    NORMALISE: tl.constexpr,  # whether a map is moved to 0..1
    CELLS: tl.constexpr,  # power of two, at least ROWS * COLUMNS and MAP_ROWS * MAP_COLUMNS
    BLOCK_C: tl.constexpr,  # channels of a tile
    UNROLL: tl.constexpr,  # tiles of a turn of the loop
    STAGES: tl.constexpr,
):
    # All that is known of the sample, asked for at once: the answers take longer than the asking.
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(bank_row_ptr + sample)
    label = tl.load(labels_ptr + sample)
    y0 = tl.load(box_ptr + sample * 4)
    x0 = tl.load(box_ptr + sample * 4 + 1)
    box_height = tl.load(box_ptr + sample * 4 + 2)
    box_width = tl.load(box_ptr + sample * 4 + 3)
    if rate_ptr is not None:
        rate = tl.load(rate_ptr)
    if (row < 0) | (row >= bank_rows) | (rate == 0):  # foreign memory is never written
        return

    # Which cell of the map each stored cell takes, and whether the view shows it: `_Side`, in 32
    # bits.
    cell = tl.arange(0, CELLS)
    tall = ROWS * box_height
    wide = COLUMNS * box_width
    down = (2 * (cell // COLUMNS) + 1) * 32768 - ROWS * y0
    right = (2 * (cell % COLUMNS) + 1) * 32768 - COLUMNS * x0
    seen = (down >= 0) & (down < tall) & (right >= 0) & (right < wide) & (cell < ROWS * COLUMNS)
    if patch_ptr is not None:
        ty = tl.load(patch_ptr + sample * 6)
        tx = tl.load(patch_ptr + sample * 6 + 1)
        patch_height = tl.load(patch_ptr + sample * 6 + 4)
        patch_width = tl.load(patch_ptr + sample * 6 + 5)
        pasted = (down * height >= ty * tall) & (down * height < (ty + patch_height) * tall)
        pasted &= (right * width >= tx * wide) & (right * width < (tx + patch_width) * wide)
        seen &= ~pasted
    if flip_ptr is not None:
        right = tl.where(tl.load(flip_ptr + sample), wide - 1 - right, right)
    down *= height
    right *= width
    if shift_ptr is not None:
        # A shift of a whole side or more shows nothing; longer ones would overflow.
        sy = tl.load(shift_ptr + sample * 2)
        sx = tl.load(shift_ptr + sample * 2 + 1)
        down -= tl.minimum(tl.maximum(sy, -height), height) * tall
        right -= tl.minimum(tl.maximum(sx, -width), width) * wide
        seen &= (down >= 0) & (down < height * tall) & (right >= 0) & (right < width * wide)
    # Where it is shown the dividend is at least 0, so that truncation is the floor.
    map_row = _taken_cell(down, height * box_height, ROWS, MAP_ROWS)
    map_row = tl.where(seen, map_row, 0)
    map_column = _taken_cell(right, width * box_width, COLUMNS, MAP_COLUMNS)
    map_column = tl.where(seen, map_column, 0)
    stored = bank_ptr + row * (ROWS * COLUMNS) + cell
    old = tl.load(stored, mask=seen, other=0).to(tl.float32)

    # The map. 64 bits for the sample's first element: 21,400 maps of 7 x 7 x 2048 pass 2^31. Rows
    # that pad the tile repeat the last cell: that costs no bytes and changes no extreme, and what
    # needs no mask is loaded ahead of all arithmetic.
    label = tl.minimum(tl.maximum(label, 0), classes - 1)  # a class that is not there reads another
    channel = tl.arange(0, BLOCK_C)
    at = features_ptr + sample * sample_stride
    at += tl.minimum(cell, MAP_ROWS * MAP_COLUMNS - 1)[:, None] * cell_stride
    at += channel[None, :] * channel_stride
    weight_at = weight_ptr + label * weight_row_stride + channel * weight_stride
    total = tl.zeros((CELLS, BLOCK_C), tl.float32)
    for start in tl.range(0, C, BLOCK_C, num_stages=STAGES, loop_unroll_factor=UNROLL):
        if C % BLOCK_C == 0:
            feature = tl.load(at)
            own = tl.load(weight_at)
        else:
            live = channel < C - start
            feature = tl.load(at, mask=live[None, :], other=0)
            own = tl.load(weight_at, mask=live, other=0)
        total += own.to(tl.float32)[None, :] * feature.to(tl.float32)
        at += BLOCK_C * channel_stride
        weight_at += BLOCK_C * weight_stride
    value = tl.sum(total, 1)

    infinity = float("inf")
    if NORMALISE:
        # min and max pass a NaN by, so what is not finite becomes -infinity, and the span with it.
        level = tl.where(tl.abs(value) < infinity, value, -infinity)
        least = tl.min(level, 0)
        greatest = tl.max(level, 0)
        span = greatest - least
        flat = span <= 1e-6 * tl.maximum(tl.abs(greatest), 1e-12)
        # Rounded as a division is, so that the greatest cell is 1.
        unit = tl.div_rn(value - least, tl.zeros_like(value) + tl.where(flat, 1.0, span))
        value = tl.where(span < infinity, tl.where(flat, 0.5, unit), float("nan"))
    value = tl.gather(value, map_row * MAP_COLUMNS + map_column, 0)

    # The running mean. One value that is not finite would stay in it for ever.
    new = old + rate * (value - old)
    # From 65520 on fp16 rounds to infinity.
    limit = 65520.0 if bank_ptr.dtype.element_ty == tl.float16 else infinity
    moves = seen & (tl.abs(new) < limit)
    new = tl.where(moves, new, 0)
    tl.store(stored, new.to(bank_ptr.dtype.element_ty), mask=moves)


def launch(
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
    normalise: str,
    config: configs.CamBankConfig | None = None,
) -> Launch:
    """Return the launch that does what `update_cam_bank_meaning` says.

    Args:
        config: block sizes; None = those of `configs`. The others are those of the meaning; n > 0,
            sides up to LONGEST_SIDE where shift or patch is given.
    """
    rows, columns = bank.shape[1:]
    channels, map_rows, map_columns = features.shape[1:]
    cells = max(rows * columns, map_rows * map_columns)
    features = _evenly_spaced(features)
    sample_stride, channel_stride, cell_stride = _strides(features)
    if config is None:
        config = configs.update_cam_bank(
            channels, cells, features.element_size(), channels_last=channel_stride == 1
        )
    # Without shift and window the pixels cancel out.
    height, width = (1, 1) if shift is None and patch is None else size
    return Launch(
        _update_cam_bank_kernel,
        (len(labels),),
        {
            "bank_ptr": bank,
            "features_ptr": features,
            "weight_ptr": weight,
            "labels_ptr": labels.contiguous(),
            "bank_row_ptr": bank_row.contiguous(),
            "box_ptr": box.contiguous(),
            "flip_ptr": None if flip is None else flip.contiguous(),
            "shift_ptr": None if shift is None else shift.contiguous(),
            "patch_ptr": None if patch is None else patch.contiguous(),
            "rate_ptr": rate if isinstance(rate, Tensor) else None,
            "rate": 0.0 if isinstance(rate, Tensor) else float(rate),
            "bank_rows": len(bank),
            "classes": len(weight),
            "height": height,
            "width": width,
            "sample_stride": sample_stride,
            "channel_stride": channel_stride,
            "cell_stride": cell_stride,
            "weight_row_stride": weight.stride(0),
            "weight_stride": weight.stride(1),
        },
        {
            "C": channels,
            "ROWS": rows,
            "COLUMNS": columns,
            "MAP_ROWS": map_rows,
            "MAP_COLUMNS": map_columns,
            "NORMALISE": normalise == "image",
            "CELLS": triton.next_power_of_2(cells),
            "BLOCK_C": config.channels,
            "UNROLL": config.unroll,
            "STAGES": config.stages,
        },
        warps=config.warps,
        maxnreg=config.maxnreg,
    )


def _strides(features: Tensor) -> tuple[int, int, int]:
    """Return the elements between samples, channels and cells; cells count along the rows."""
    sample, channel, row, column = features.stride()
    return sample, channel, column if features.shape[3] > 1 else row


def _evenly_spaced(features: Tensor) -> Tensor:
    """Return the features with one distance between all neighbouring cells, copied if need be.

    Both memory formats have it, and so have slices of their channels or samples.
    """
    channels, rows, columns = features.shape[1:]
    _, channel, cell = _strides(features)
    even = rows == 1 or columns == 1 or features.stride(2) == columns * cell
    # Inside a sample the kernel counts in 32 bits.
    last = (rows * columns - 1) * cell + (channels - 1) * channel
    if even and last < 2**31:
        return features
    return features.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("backmix::update_cam_bank", mutates_args=("bank",))
def _update_cam_bank_op(
    bank: Tensor,
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bank_row: Tensor,
    box: Tensor,
    flip: Tensor | None,
    shift: Tensor | None,
    patch: Tensor | None,
    height: int,
    width: int,
    rate: float,
    rate_on_device: Tensor | None,
    normalise: str,
) -> None:
    """Run the kernel where a compiled graph calls it; the door calls it without this wrapper."""
    launch(
        bank,
        features,
        weight,
        labels,
        bank_row,
        box=box,
        flip=flip,
        shift=shift,
        patch=patch,
        size=(height, width),
        rate=rate if rate_on_device is None else rate_on_device,
        normalise=normalise,
    ).run()


@_update_cam_bank_op.register_fake
def _(*_: object) -> None:
    return None


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
        features: last feature map before the mean over locations, [n, C, h, w], fp32, bf16 or
            fp16, in any memory format; channels-last is the fast one. Both formats and slices of
            them are read in place, other strides are copied first. Its grid may be another than
            the bank's, sides up to 16: a stored cell takes the cell of the map that its centre
            lies in.
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
        size: H, W of the view in pixels; required with shift or patch, and the Triton form then
            takes sides up to 1,023.
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
    _check_tensors(bank, features, weight, labels, bank_row, box, flip, shift, patch)
    _check_options(size, shift, patch, rate, normalise, bank.device)
    size = size or (1, 1)
    form = dispatch.choose(
        backend, "update_cam_bank", bank.device, unsupported=_too_large(size, shift, patch)
    )
    if check:
        _check_values(bank, weight, labels, bank_row, box, patch, size)
    arguments = bank, features.detach(), weight.detach(), labels, bank_row
    if form == "torch":
        update_cam_bank_meaning(
            *arguments,
            box=box,
            flip=flip,
            shift=shift,
            patch=patch,
            size=size,
            rate=rate,
            normalise=normalise,
        )
    elif len(bank) == 0 or len(labels) == 0:
        return
    elif torch.compiler.is_compiling():
        number, tensor = (0.0, rate) if isinstance(rate, Tensor) else (float(rate), None)
        _update_cam_bank_op(*arguments, box, flip, shift, patch, *size, number, tensor, normalise)
    else:
        launch(
            *arguments,
            box=box,
            flip=flip,
            shift=shift,
            patch=patch,
            size=size,
            rate=rate,
            normalise=normalise,
        ).run()


def _too_large(size: tuple[int, int], shift: Tensor | None, patch: Tensor | None) -> str | None:
    """Return why the Triton form cannot take views of this size, None if it can."""
    if (shift is None and patch is None) or max(size) <= LONGEST_SIDE:
        return None
    return f"with shift or patch a view's sides are at most {LONGEST_SIDE} px, here {max(size)}"


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
    expect("features", features, _FLOATS, (n, "C", "h", "w"), device)
    if not all(1 <= side <= dispatch.LARGEST_GRID for side in features.shape[2:]):
        raise ValueError(
            f"features must have a grid of 1..{dispatch.LARGEST_GRID} cells a side, got shape "
            f"{list(features.shape)}"
        )
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
    pair = isinstance(size, Sequence) and len(size) == 2
    if size is not None and not (pair and min(size) >= 1):
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
