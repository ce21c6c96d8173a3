"""mix_background: paste a masked window of another image, then flip, shift and normalise.

BackMix regularises open-set recognition with the backgrounds of other training images (Wang et
al., "BackMix: regularizing open set recognition by removing underlying fore-background priors",
TPAMI 2025). The window comes from a donor whose most class-specific cells, by its class activation
map in the bank, are filled with one colour: what is pasted is background, and the label stays.
Everything from decoded bytes to the network's input happens in this one function.
Bytes per pixel and channel: 1 read, and 1, 2 or 4 written, by the output's type.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from backmix.kernels import dispatch

Mode = Literal["cam", "inverse", "none", "grey"]
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)

_WORD = 0xFFFFFFFF


# --- meaning: the mask -------------------------------------------------------------------------


def box_fractions(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Return pixel boxes as 16.16 fractions of the stored image's sides, rounded to nearest.

    The whole image is (0, 0, 65536, 65536). All cell arithmetic on fractions is exact.

    Args:
        boxes: y0, x0, h, w in pixels of the stored image, integers [n, 4].
        sizes: h, w of the stored image in pixels, integers [n, 2], at least 1.

    Returns:
        y0, x0, h, w as fractions, int32 [n, 4].
    """
    dispatch.expect_tensors(boxes=boxes, sizes=sizes)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [n, 4], got {list(boxes.shape)}")
    if sizes.shape != (len(boxes), 2):
        raise ValueError(f"sizes must be [{len(boxes)}, 2] as boxes, got {list(sizes.shape)}")
    sides = torch.cat((sizes, sizes), 1).long()
    return ((boxes.long() * 65536 + sides // 2) // sides).int()


def mask_views(
    bank: Tensor, bank_row: Tensor, box: Tensor, tie: Tensor, mask_cells: int, mode: Mode = "cam"
) -> Tensor:
    """Return the masked cells of each donor's view, bool [n, g, g'].

    A view cell takes the bank's value of the stored cell under its centre. The `mask_cells`
    hottest cells are masked (mode inverse: the coolest); NaN is the coolest of all, and ties fall
    at random by `tie`, the same way everywhere. The arguments are those of `mix_background`.
    """
    rows, columns = bank.shape[1:]
    everything = rows * columns
    count = {"none": 0, "grey": everything}.get(mode, mask_cells)
    if count in (0, everything):
        return bank.new_full((len(bank_row), rows, columns), count > 0, dtype=torch.bool)

    key = _order_keys(view_heat(bank, bank_row, box), tie).flatten(1)
    # Keys are unique, so a threshold masks exactly `count` cells.
    ascending = key.sort(1).values
    if mode == "inverse":
        masked = key < ascending[:, count, None]
    else:
        masked = key >= ascending[:, everything - count, None]
    return masked.view(-1, rows, columns)


def view_heat(bank: Tensor, bank_row: Tensor, box: Tensor) -> Tensor:
    """Return the bank's maps as the views show them: a cell, the stored cell under its centre.

    The arguments are those of `mix_background`. Returns [n, g, g'] of the bank's dtype.
    """
    y0, x0, height, width = box.long().unbind(1)
    row = _stored_cell(y0, height, bank.shape[1])  # [n, g]
    column = _stored_cell(x0, width, bank.shape[2])  # [n, g']
    maps = bank.index_select(0, bank_row)  # unlike bank[bank_row], -1 is no row
    sample = torch.arange(len(bank_row), device=bank.device)[:, None, None]
    return maps[sample, row[:, :, None], column[:, None, :]]


def _stored_cell(start: Tensor, length: Tensor, cells: int) -> Tensor:
    """Return the stored cell under the centre of each view cell along one side, int64 [n, cells].

    Args:
        start: start of the box along this side, 16.16, int64 [n].
        length: its length, 16.16, int64 [n].
        cells: cells along this side, in the view as in the bank.
    """
    centre = 2 * torch.arange(cells, device=start.device) + 1
    return ((2 * cells * start[:, None] + centre * length[:, None]) >> 17).clamp(0, cells - 1)


def _order_keys(heat: Tensor, tie: Tensor) -> Tensor:
    """Return int64 keys [n, g, g'], unique within a sample, that order cells by heat, then by draw.

    Upper word: the float's bits made monotone, NaN least, -0 equal to +0. Lower word: a hash of
    the sample's random word and the cell, with the cell's number in the lowest byte.
    """
    heat = heat.float() + 0.0  # -0 + 0 = +0
    bits = heat.view(torch.int32)
    bits = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    upper = torch.where(heat.isnan(), -(2**31), bits).long()

    rows, columns = heat.shape[1:]
    cell = 16 * torch.arange(rows, device=heat.device)[:, None] + torch.arange(
        columns, device=heat.device
    )
    draw = _hash((tie.long()[:, None, None] + _hash(cell)) & _WORD)
    return (upper << 32) | (draw & ~255) | cell


def _hash(word: Tensor) -> Tensor:
    """Mix the bits of words in [0, 2^32) held in int64: xor-shift, multiply, twice."""
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = word ^ (word >> shift)
        word = (word * multiplier) & _WORD  # int64 wraps; the lower 32 bits stay right
    return word ^ (word >> 16)


# --- meaning: the pixels -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Which view coordinates each output coordinate shows; all int64, one line per sample."""

    height: int
    width: int
    flip: Tensor
    """bool [n, 1]."""
    sy: Tensor
    """int64 [n, 1]."""
    sx: Tensor
    """int64 [n, 1]."""
    reflect: bool

    def rows(self, y: Tensor) -> Tensor:
        """Return the view row of output rows y; outside 0..H-1 where there is none."""
        return _reflected(y + self.sy, self.height) if self.reflect else y + self.sy

    def columns(self, x: Tensor) -> Tensor:
        """Return the view column of output columns x; outside 0..W-1 where there is none."""
        xf = _reflected(x + self.sx, self.width) if self.reflect else x + self.sx
        return torch.where(self.flip, self.width - 1 - xf, xf)

    def outside(self) -> Tensor:
        """Return which output pixels show nothing of the view, bool [n, H, W]."""
        yv = self.rows(torch.arange(self.height, device=self.sy.device))
        xv = self.columns(torch.arange(self.width, device=self.sx.device))
        no_row, no_column = (yv < 0) | (yv >= self.height), (xv < 0) | (xv >= self.width)
        return no_row[:, :, None] | no_column[:, None, :]

    def pixel(self, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Return the number of pixel (y, x) of an image in a stack of images.

        Args:
            image: number of the image, int64 [n, 1].
            y: int64 [n or 1, a], clamped into the image.
            x: int64 [n or 1, b], clamped into the image.

        Returns:
            int64 [n, a, b].
        """
        line = image * self.height + y.clamp(0, self.height - 1)
        return (line * self.width)[:, :, None] + x.clamp(0, self.width - 1)[:, None, :]


@torch.no_grad()
def mix_background_meaning(
    pool: Tensor,
    target: Tensor,
    donor: Tensor,
    *,
    masked: Tensor,
    patch: Tensor,
    flip: Tensor,
    shift: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    fill: Tensor | str,
    pad: Tensor | str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the mixed batch: the specification in plain PyTorch, and the CPU's form.

    First which pixel of the pool each output pixel shows, then one gather, then the colours.
    Only the window is computed a second time, with the donor.

    Args:
        masked: masked cells of the donors' views, bool [n, g, g'].
        fill: pixel units, fp32 [n or 1, 3], or "keep".
        pad: pixel units, fp32 [1, 3], or "reflect".

    The other arguments are those of `mix_background`.
    """
    n, (height, width) = len(target), pool.shape[1:3]
    sy, sx = torch.zeros_like(target)[:, None], torch.zeros_like(target)[:, None]
    if shift is not None:
        sy, sx = shift.long()[:, :, None].unbind(1)
    frame = _Frame(height, width, flip[:, None], sy, sx, reflect=isinstance(pad, str))

    source, place, hot = _shown(frame, target, donor, patch, masked, keep=isinstance(fill, str))
    # One gather, one normalisation; then the colours that are no pixel of the pool.
    pixels = pool.view(-1, 3).index_select(0, source)
    del source  # the largest tensor but the result
    mixed = _values(pixels.view(n * height, width * 3), dtype, mean, std).view(-1, 3)
    if not isinstance(fill, str):
        _paint(mixed, hot, _values(fill, dtype, mean, std), place)
    if shift is not None and not isinstance(pad, str):
        _paint(mixed, frame.outside(), _values(pad, dtype, mean, std))
    mixed = mixed.view(n, height, width, 3).to(dtype)
    return mixed if dtype == torch.uint8 else mixed.permute(0, 3, 1, 2)


def _shown(
    frame: _Frame, target: Tensor, donor: Tensor, patch: Tensor, masked: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which pixel of the pool each output pixel shows, and where the fill goes.

    Returns:
        source: pixel of the pool, clamped into the image, int64 [n * H * W].
        place: output pixels around the patches, int64 [n, a, b].
        hot: which of those are masked pixels of the patch, bool [n, a, b].
    """
    device, height, width = target.device, frame.height, frame.width
    # The target everywhere: (y, x) of the output shows (yv, xv) of the view.
    yv = frame.rows(torch.arange(height, device=device))
    xv = frame.columns(torch.arange(width, device=device))
    source = frame.pixel(target[:, None], yv, xv).view(-1)

    # The donor inside the window, which starts at (ty, tx) in the view and at (dy, dx) in its own.
    y, x = _window(frame, patch)
    place = frame.pixel(torch.arange(len(target), device=device)[:, None], y, x)
    ty, tx, dy, dx, patch_height, patch_width = patch.long()[:, :, None].unbind(1)
    down, right = frame.rows(y) - ty, frame.columns(x) - tx
    in_row, in_column = (down >= 0) & (down < patch_height), (right >= 0) & (right < patch_width)
    inside = in_row[:, :, None] & in_column[:, None, :]
    yd, xd = (dy + down).clamp(0, height - 1), (dx + right).clamp(0, width - 1)
    cell_rows, cell_columns = masked.shape[1:]
    cell_row, cell_column = yd * cell_rows // height, xd * cell_columns // width
    cell = (cell_row * cell_columns)[:, :, None] + cell_column[:, None, :]
    hot = inside & masked.flatten(1).gather(1, cell.flatten(1)).view_as(cell)

    before = source.index_select(0, place.view(-1)).view_as(place)
    pasted = inside & ~hot if keep else inside
    after = torch.where(pasted, frame.pixel(donor[:, None], yd, xd), before)
    source.index_copy_(0, place.view(-1), after.view(-1))
    return source, place, hot


def _window(frame: _Frame, patch: Tensor) -> tuple[Tensor, Tensor]:
    """Return output rows [n or 1, a] and columns [n or 1, b] that hold every pixel of the patches.

    Small where that is known without waiting for the device, else the whole output. Coordinates
    are clamped into the output, so a line may come twice.
    """
    device = patch.device
    if frame.reflect or not _reading_is_free(patch):  # a mirrored margin may show the patch again
        y, x = torch.arange(frame.height, device=device), torch.arange(frame.width, device=device)
        return y[None], x[None]
    ty, tx, _dy, _dx, _height, patch_width = patch.long()[:, :, None].unbind(1)
    largest_height, largest_width = patch[:, 4:].amax(0).tolist() if len(patch) else (0, 0)
    left = torch.where(frame.flip, frame.width - tx - patch_width, tx)
    y = ty - frame.sy + torch.arange(largest_height, device=device)
    x = left - frame.sx + torch.arange(largest_width, device=device)
    return y.clamp(0, frame.height - 1), x.clamp(0, frame.width - 1)


def _paint(pixels: Tensor, chosen: Tensor, colour: Tensor, place: Tensor | None = None) -> None:
    """Write each sample's colour into the chosen places; a place may come twice.

    Args:
        pixels: [N, 3].
        chosen: bool [n, a, b].
        colour: [n or 1, 3], of the dtype of `pixels`.
        place: int64 [n, a, b], positions in `pixels`; None = all of them, in order.
    """
    n, a, b = chosen.shape
    if _reading_is_free(chosen):
        some = torch.from_numpy(np.flatnonzero(chosen.numpy()))  # much faster than torch's nonzero
        colours = colour.expand(n, 3).index_select(0, some // max(a * b, 1))
        pixels.index_copy_(0, some if place is None else place.view(-1)[some], colours)
        return
    everything = torch.arange(len(pixels), device=pixels.device)
    place = everything if place is None else place.view(-1)
    before = pixels.index_select(0, place).view(n, a, b, 3)
    after = torch.where(chosen[..., None], colour[:, None, None], before)
    pixels.index_copy_(0, place, after.view(-1, 3))


def _reading_is_free(tensor: Tensor) -> bool:
    """Return whether Python may look at values without waiting for a device."""
    return tensor.device.type == "cpu"


def _reflected(position: Tensor, side: int) -> Tensor:
    """Mirror positions into 0..side-1 without repeating the edge: -1 -> 1, side -> side - 2."""
    period = max(2 * (side - 1), 1)
    position = position % period  # floors, so that -1 becomes period - 1
    return torch.minimum(position, period - position) if side > 1 else position


def _values(
    numbers: Tensor, dtype: torch.dtype, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Turn pixel values 0..255 into values of the output before narrowing, fp32 or uint8.

    (number - mean) * (1 / std) in fp32. Subtract, then multiply: no fused operation can round this
    differently, so that every form gives the same bits.

    Args:
        numbers: lines of w pixels, uint8 or fp32 [m, 3 w]. Whole lines at once, because steps of
            three channels are slow on a CPU.
        dtype: of the output; uint8 is only rounded.
    """
    if dtype == torch.uint8:
        whole = numbers.dtype == torch.uint8
        return numbers if whole else numbers.round().clamp(0, 255).to(torch.uint8)
    width = numbers.shape[1] // 3

    def line(per_channel: Sequence[float]) -> Tensor:
        channels = [torch.full((width,), float(x), device=numbers.device) for x in per_channel]
        return torch.stack(channels, 1).view(-1)

    centred = numbers.to(torch.float32, copy=True).sub_(line(mean))
    return centred.mul_(line([1 / s for s in std]))


# --- door --------------------------------------------------------------------------------------


def mix_background(
    pool: Tensor,
    target: Tensor,
    donor: Tensor,
    *,
    bank: Tensor,
    bank_row: Tensor,
    box: Tensor,
    patch: Tensor,
    flip: Tensor,
    shift: Tensor | None = None,
    tie: Tensor,
    mask_cells: int,
    mean: Sequence[float],
    std: Sequence[float],
    fill: Tensor | Sequence[float] | Literal["keep"] | None = None,
    pad: Sequence[float] | Literal["reflect"] = (0, 0, 0),
    mode: Mode = "cam",
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    backend: Literal["torch", "triton"] | None = None,
    check: bool = False,
) -> Tensor:
    """Paste a masked window of another image into each image, then flip, shift and normalise.

    For n images. The view of an image is its row of the pool, as it is. The paste happens in the
    view; then the mix is flipped, then shifted (the view pixel shown at output (0, 0) is (sy, sx)
    of the flipped mix). Labels do not change. Never waits for a device.

    Args:
        pool: decoded pixels, uint8 [P, H, W, 3], contiguous.
        target: pool rows that receive, int64 [n].
        donor: pool rows that give, int64 [n]. A donor may be the target itself.
        bank: class activation maps in the frame of the stored images, fp16 or fp32 [m, g, g'],
            contiguous, 1 <= g, g' <= 16; larger = more of the image's class.
        bank_row: the donors' rows of the bank, int64 [n].
        box: the donors' crops as 16.16 fractions of the stored image (`box_fractions`), int32
            [n, 4] as y0, x0, h, w.
        patch: int32 [n, 6] as ty, tx, dy, dx, ph, pw: corner in the target's view, corner in the
            donor's view, size, in pixels; inside the views, last row and column included. With
            ph * pw = 0 nothing is pasted.
        flip: mirror left and right, bool [n].
        shift: sy, sx in pixels, int32 [n, 2]; None = no shift.
        tie: one random word per sample, int32 [n]; decides between equally hot cells.
        mask_cells: how many cells of the donor's view are masked, 0..g * g'.
        mean: per channel, in pixel units 0..255.
        std: per channel, in pixel units, above 0.
        fill: colour of masked donor pixels in pixel units: None = mean (exactly 0 in the output),
            three floats, fp32 [n, 3], or "keep" = the target stays where the donor is masked.
        pad: colour outside the shifted image in pixel units, or "reflect" = mirrored without
            repeating the edge.
        mode: "cam" masks the hottest cells, "inverse" the coolest, "none" no cell, "grey" every
            cell (the Cutout control).
        dtype: of the output. uint8 = the mix itself, not normalised, colours rounded.
        out: where to write; made here if None. Must not overlap the pool.
        backend: "torch" or "triton"; None = the environment variable BACKMIX_KERNELS, else the
            best form there is.
        check: look at the values, too, and name the first bad sample. This waits for the device.

    Returns:
        `out`: [n, 3, H, W] with channels-last strides, or uint8 [n, H, W, 3].

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: wrong shape, device, layout or option; with `check`, a value out of range.
    """
    dispatch.choose(backend, "mix_background", torch.device("cpu"))
    _check_tensors(pool, target, donor, bank, bank_row, box, patch, flip, shift, tie)
    _check_options(mode, mask_cells, bank.shape[1] * bank.shape[2])
    _check_colours(mean, std, fill, pad, len(target), pool.device)
    if check:
        _check_values(pool, target, donor, bank, bank_row, box, patch)
    _check_output(out, dtype, len(target), pool)
    mixed = mix_background_meaning(
        pool,
        target,
        donor,
        masked=mask_views(bank, bank_row, box, tie, mask_cells, mode),
        patch=patch,
        flip=flip,
        shift=shift,
        mean=mean,
        std=std,
        fill=_colour(mean if fill is None else fill, pool.device),
        pad=_colour(pad, pool.device),
        dtype=dtype,
    )
    return mixed if out is None else out.copy_(mixed)


def _check_output(out: Tensor | None, dtype: torch.dtype, n: int, pool: Tensor) -> None:
    """Refuse an output type that is not offered, or an `out` that does not fit."""
    if dtype not in OUTPUTS:
        raise TypeError(f"dtype must be {dispatch.names(OUTPUTS)}, got {dispatch.names([dtype])}")
    if out is None:
        return
    height, width = pool.shape[1:3]
    if dtype == torch.uint8:
        shape, strides = (n, height, width, 3), (height * width * 3, width * 3, 3, 1)
    else:
        shape, strides = (n, 3, height, width), (height * width * 3, 1, width * 3, 3)
    dispatch.expect("out", out, (dtype,), shape, pool.device)
    if out.stride() != strides:
        raise ValueError(f"out must have strides {strides} (channels last), got {out.stride()}")
    if out.storage_offset() * out.element_size() % 16:
        raise ValueError("out must start at a multiple of 16 bytes of its storage")


def _colour(values: Tensor | Sequence[float] | str, device: torch.device) -> Tensor | str:
    """Return three floats as fp32 [1, 3] on the device, without a copy that the host waits for.

    What is a tensor or a word already stays.
    """
    if isinstance(values, Tensor | str):
        return values
    return torch.stack([torch.full((1,), float(x), device=device) for x in values], 1)


def _check_tensors(
    pool: Tensor,
    target: Tensor,
    donor: Tensor,
    bank: Tensor,
    bank_row: Tensor,
    box: Tensor,
    patch: Tensor,
    flip: Tensor,
    shift: Tensor | None,
    tie: Tensor,
) -> None:
    """Refuse tensors of the wrong dtype, shape, device or layout; looks at no values."""
    dispatch.expect_tensors(pool=pool, target=target)
    expect, device, n = dispatch.expect, pool.device, len(target)
    expect("pool", pool, (torch.uint8,), ("P", "H", "W", 3), device)
    if 0 in pool.shape[1:3]:
        raise ValueError(f"pool must have pixels, got shape {list(pool.shape)}")
    if not pool.is_contiguous():
        raise ValueError("pool must be contiguous; call .contiguous() once, when the pool is made")
    expect("target", target, (torch.int64,), ("n",), device)
    expect("donor", donor, (torch.int64,), (n,), device)
    dispatch.expect_bank(bank, device)
    expect("bank_row", bank_row, (torch.int64,), (n,), device)
    expect("box", box, (torch.int32,), (n, 4), device)
    expect("patch", patch, (torch.int32,), (n, 6), device)
    expect("flip", flip, (torch.bool,), (n,), device)
    if shift is not None:
        expect("shift", shift, (torch.int32,), (n, 2), device)
    expect("tie", tie, (torch.int32,), (n,), device)


def _check_options(mode: str, mask_cells: int, cells: int) -> None:
    """Refuse an unknown mode, or more masked cells than there are."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if not isinstance(mask_cells, int):
        raise TypeError(f"mask_cells must be an int, got {type(mask_cells).__name__}")
    if not 0 <= mask_cells <= cells:
        raise ValueError(f"mask_cells must be in 0..{cells}, the bank's cells, got {mask_cells}")


def _check_colours(
    mean: Sequence[float],
    std: Sequence[float],
    fill: Tensor | Sequence[float] | str | None,
    pad: Sequence[float] | str,
    n: int,
    device: torch.device,
) -> None:
    """Refuse colours that are not three finite floats or one of the other choices."""
    if isinstance(fill, Tensor):
        dispatch.expect("fill", fill, (torch.float32,), (n, 3), device)
        fill = None
    for name, choice, word in (("fill", fill, "keep"), ("pad", pad, "reflect")):
        if isinstance(choice, str) and choice != word:
            raise ValueError(f"{name} must be three floats or {word!r}, got {choice!r}")
    for name, values in (("mean", mean), ("std", std), ("fill", fill), ("pad", pad)):
        if name in ("fill", "pad") and (values is None or isinstance(values, str)):
            continue
        if not _is_colour(values):
            raise ValueError(f"{name} must be three finite floats, got {values}")
    if min(std) <= 0:
        raise ValueError(f"std must be above 0, got {std}")


def _is_colour(values: Any) -> bool:
    try:
        return len(values) == 3 and all(math.isfinite(x) for x in values)
    except TypeError:  # a single number, or no numbers
        return False


def _check_values(
    pool: Tensor,
    target: Tensor,
    donor: Tensor,
    bank: Tensor,
    bank_row: Tensor,
    box: Tensor,
    patch: Tensor,
) -> None:
    """Refuse values out of range, naming the first bad sample. Waits for the device."""
    refuse = dispatch.refuse
    for name, row, count in (
        ("target", target, len(pool)),
        ("donor", donor, len(pool)),
        ("bank_row", bank_row, len(bank)),
    ):
        refuse(name, row, (row < 0) | (row >= count), f"must be in 0..{count - 1}")
    dispatch.refuse_boxes(box)
    height, width = pool.shape[1:3]
    dispatch.refuse_patches(patch, height, width)
