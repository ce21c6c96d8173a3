"""mix_background: paste a masked window of another image, then flip, shift and normalise.

BackMix regularises open-set recognition with the backgrounds of other training images (Wang et
al., "BackMix: regularizing open set recognition by removing underlying fore-background priors",
TPAMI 2025). The window comes from a donor whose most class-specific cells, by its class activation
map in the bank, are filled with one colour: what is pasted is background, and the label stays.
Everything from decoded bytes to the network's input happens in this one function, and in the Triton
form in one kernel: a program owns some columns of some rows of one image, works out its columns
once, sorts the donor's cells only where the window meets it, and then walks down its rows.
Bytes per pixel and channel: 1 read, and 1, 2 or 4 written, by the output's type; floor = those
bytes / copy bandwidth. That floor is reached only with few instructions per byte (docs/kernels.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from backmix.kernels import configs, dispatch
from backmix.kernels.launch import Launch, ceil_div

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


# --- kernel ------------------------------------------------------------------------------------


@triton.jit
def _by_channel(channel, red, green, blue):
    """Return what belongs to each element's channel."""
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def _spread(of_row, COLUMNS: tl.constexpr):
    """Give each lane of a tile its row's value: [ROWS] -> [ROWS * COLUMNS]."""
    ROWS: tl.constexpr = of_row.shape[0]
    return tl.reshape(tl.broadcast_to(of_row[:, None], (ROWS, COLUMNS)), (ROWS * COLUMNS,))


@triton.jit
def _reflected_position(position, SIDE: tl.constexpr):
    """Mirror positions into 0..SIDE-1 without repeating the edge."""
    if SIDE == 1:
        return position * 0
    else:
        PERIOD: tl.constexpr = 2 * SIDE - 2
        position = position % PERIOD
        position = tl.where(position < 0, position + PERIOD, position)  # % truncates
        return tl.minimum(position, PERIOD - position)


@triton.jit
def _output_value(pixel, mean, scale, OUT: tl.constexpr):
    """Return pixel values as output values before narrowing: subtract, then multiply, or as is."""
    if OUT == tl.uint8:
        return pixel
    else:
        return (pixel.to(tl.float32) - mean) * scale


@triton.jit
def _output_colour(value, mean, scale, OUT: tl.constexpr):
    """Return colours in pixel units as output values before narrowing."""
    if OUT == tl.uint8:
        value = tl.minimum(tl.maximum(value, 0.0), 255.0)
        # Adding 1.5 * 2^23 leaves no bits for a fraction: rounds to nearest, halves to even.
        return ((value + 12582912.0) - 12582912.0).to(tl.int32)
    else:
        return (value - mean) * scale


@triton.jit
def _hashed(word):
    """Mix the bits of uint32 words, as `_hash`."""
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _hottest_cells(
    bank_ptr,  # fp16 or fp32 [G, G2], one row of the bank
    box_ptr,  # int32 [4], 16.16
    tie,  # int32
    hottest,  # int32, 1 .. G * G2 - 1
    G: tl.constexpr,
    G2: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Return which cells of the view are hottest, bool [SIDE * SIDE]; as `mask_views`."""
    number = tl.arange(0, SIDE * SIDE)
    i = number // SIDE
    j = number % SIDE
    real = (i < G) & (j < G2)
    y0 = tl.load(box_ptr)
    x0 = tl.load(box_ptr + 1)
    height = tl.load(box_ptr + 2)
    width = tl.load(box_ptr + 3)
    row = (2 * G * y0 + (2 * i + 1) * height) >> 17
    column = (2 * G2 * x0 + (2 * j + 1) * width) >> 17
    row = tl.minimum(tl.maximum(row, 0), G - 1)
    column = tl.minimum(tl.maximum(column, 0), G2 - 1)
    heat = tl.load(bank_ptr + row * G2 + column, mask=real, other=0.0).to(tl.float32) + 0.0

    bits = heat.to(tl.int32, bitcast=True)
    bits = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    bits = tl.where(heat == heat, bits, -(2**31))
    cell = (16 * i + j).to(tl.uint32)
    draw = _hashed(tie.to(tl.uint32, bitcast=True) + _hashed(cell))
    key = (bits.to(tl.int64) << 32) | ((draw & 0xFFFFFF00) | cell).to(tl.int64)
    # Cells that are padding come last: no real cell's key is below, and not all are asked for.
    key = tl.where(real, key, -(2**63))
    ordered = tl.sort(key, descending=True)
    threshold = tl.sum(tl.where(number == hottest - 1, ordered, 0))
    return real & (key >= threshold)


@triton.jit
def _packed(chosen, FIRST: tl.constexpr, CELLS: tl.constexpr):
    """Return cells FIRST .. FIRST + 63 of bool [CELLS] as the bits of one int64."""
    bit = tl.arange(0, CELLS) - FIRST
    one = tl.full((CELLS,), 1, tl.int64)
    return tl.sum(tl.where(chosen & (bit >= 0) & (bit < 64), one << (bit & 63), 0))


_PER_SAMPLE = ["target_ptr", "donor_ptr", "bank_row_ptr", "box_ptr", "patch_ptr"]
_PER_SAMPLE += ["flip_ptr", "shift_ptr", "tie_ptr", "fill_ptr"]


@triton.jit(
    do_not_specialize=["hottest", "inverted", "steps"],
    # They are read one number at a time: slices of an epoch's draws need no variant of their own.
    do_not_specialize_on_alignment=_PER_SAMPLE,
)
def _mix_background_kernel(
    out_ptr,  # [n, H, W, 3], in memory
    pool_ptr,  # uint8 [P, H, W, 3]
    target_ptr,  # int64 [n]
    donor_ptr,  # int64 [n]
    bank_ptr,  # fp16 or fp32 [m, G, G2]
    bank_row_ptr,  # int64 [n]
    box_ptr,  # int32 [n, 4], 16.16
    patch_ptr,  # int32 [n, 6] as ty, tx, dy, dx, ph, pw
    flip_ptr,  # bool [n]
    shift_ptr,  # int32 [n, 2] as sy, sx, or None
    tie_ptr,  # int32 [n]
    fill_ptr,  # fp32 [n, 3], or None = the colour fill_r, fill_g, fill_b
    hottest,  # int32; how many cells to find, 0 = do not look; below G * G2
    inverted,  # int32; 0 = they are the masked ones, -1 = all the others are
    steps,  # int32; of a program
    mean_r,
    mean_g,
    mean_b,
    scale_r,  # 1 / std
    scale_g,
    scale_b,
    fill_r,
    fill_g,
    fill_b,
    pad_r,
    pad_g,
    pad_b,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    G2: tl.constexpr,
    SIDE: tl.constexpr,  # power of two that holds G and G2, 2 .. 16
    KEEP: tl.constexpr,  # a masked pixel of the window shows the target, not the fill
    PADDED: tl.constexpr,  # shifted, and outside is a colour
    REFLECTED: tl.constexpr,  # shifted, and outside is mirrored
    COLUMNS: tl.constexpr,  # of a tile; elements, not pixels
    ROWS: tl.constexpr,  # of a tile
    UNROLL: tl.constexpr,  # tiles of a step, one below the other: their loads are in flight at once
):
    """Program (tile + TILES * sample, chunk) makes COLUMNS elements of `steps` steps of rows."""
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    LINE: tl.constexpr = 3 * W
    TILES: tl.constexpr = (LINE + COLUMNS - 1) // COLUMNS
    STEP: tl.constexpr = ROWS * UNROLL
    EVEN: tl.constexpr = H % STEP == 0

    tile = tl.program_id(0) % TILES
    sample = (tl.program_id(0) // TILES).to(tl.int64)
    chunk = tl.program_id(1)
    first_row = chunk * steps * STEP
    steps = tl.minimum(steps, (H + STEP - 1) // STEP - chunk * steps)

    # 64-bit once, for the images' first bytes: a resident pool may pass 2^31 bytes.
    target = tl.load(target_ptr + sample)
    target_image_ptr = pool_ptr + target * (H * LINE)
    out_image_ptr = out_ptr + sample * (H * LINE)
    flip = tl.load(flip_ptr + sample)
    sy = 0
    sx = 0
    if shift_ptr is not None:
        sy = tl.load(shift_ptr + 2 * sample)
        sx = tl.load(shift_ptr + 2 * sample + 1)
    ty = tl.load(patch_ptr + 6 * sample)
    tx = tl.load(patch_ptr + 6 * sample + 1)
    ph = tl.load(patch_ptr + 6 * sample + 4)
    pw = tl.load(patch_ptr + 6 * sample + 5)

    # All that depends on the column alone. Lanes beyond the line work on its last pixel and do not
    # store: that costs no bytes, and the loads need no masks.
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, ROWS * COLUMNS)
    element = tile * COLUMNS + lane % COLUMNS
    live = element < LINE
    x = element // 3
    channel = element - 3 * x
    mean = _by_channel(channel, mean_r, mean_g, mean_b)
    scale = _by_channel(channel, scale_r, scale_g, scale_b)
    xf = tl.minimum(x, W - 1) + sx
    column_shown = (xf >= 0) & (xf < W)
    if REFLECTED:
        xf = _reflected_position(xf, W)
    xv = tl.where(flip, W - 1 - xf, xf)
    source = 3 * xv + channel
    if PADDED:
        pad = _output_colour(_by_channel(channel, pad_r, pad_g, pad_b), mean, scale, OUT)
    lane_row = lane // COLUMNS  # as _spread(row), but the compiler sees where it changes
    tile_offset = lane_row * LINE + element

    # The steps [begin, begin + pasted) may show the window, the others cannot. Where a shift is
    # mirrored the window may show twice, so every step counts.
    low = ty - sy - first_row
    begin = tl.minimum(tl.maximum(low, 0) // STEP, steps)
    end = tl.minimum((tl.maximum(low + ph, 0) + (STEP - 1)) // STEP, steps)
    x_first = tile * COLUMNS // 3 + sx
    x_last = tl.minimum(tile * COLUMNS + (COLUMNS - 1), LINE - 1) // 3 + sx
    left = tl.where(flip, W - 1 - x_last, x_first)
    right = tl.where(flip, W - 1 - x_first, x_last)
    meets = (tx <= right) & (tx + pw > left)
    if REFLECTED:
        begin = tl.where(sy == 0, begin, 0)
        end = tl.where(sy == 0, end, steps)
        meets = meets | (sx != 0)
    pasted = tl.where(meets & (ph > 0) & (pw > 0), end - begin, 0)

    i = 0
    if (flip == 0) & (sx == 0) & (sy == 0):
        # Plain: as the bytes lie.
        while i < steps - pasted:
            y = first_row + (i + tl.where(i >= begin, pasted, 0)) * STEP
            i += 1
            from_ptr = target_image_ptr + y.to(tl.int64) * LINE + tile_offset
            to_ptr = out_image_ptr + y.to(tl.int64) * LINE + tile_offset
            for u in tl.static_range(UNROLL):
                here = live if EVEN else live & (y + u * ROWS + lane_row < H)
                pixel = tl.load(from_ptr + u * ROWS * LINE, mask=here, other=0)
                value = _output_value(pixel, mean, scale, OUT)
                tl.store(to_ptr + u * ROWS * LINE, value.to(OUT), mask=here)
    else:
        # Moved: flipped or shifted, byte by byte; neighbours read the same lines of the cache.
        while i < steps - pasted:
            y = first_row + (i + tl.where(i >= begin, pasted, 0)) * STEP
            i += 1
            to_ptr = out_image_ptr + y.to(tl.int64) * LINE + tile_offset
            for u in tl.static_range(UNROLL):
                yv = y + u * ROWS + row
                here = live if EVEN else live & (y + u * ROWS + lane_row < H)
                yv = (yv if EVEN else tl.minimum(yv, H - 1)) + sy
                if REFLECTED:
                    yv = _reflected_position(yv, H)
                from_ptr = target_image_ptr + _spread(yv.to(tl.int64) * LINE, COLUMNS) + source
                if PADDED:
                    shown = _spread((yv >= 0) & (yv < H), COLUMNS) & column_shown
                    pixel = tl.load(from_ptr, mask=shown, other=0).to(tl.int32)
                    value = _output_value(pixel, mean, scale, OUT)
                    value = tl.where(shown, value, pad)
                else:
                    pixel = tl.load(from_ptr).to(tl.int32)
                    value = _output_value(pixel, mean, scale, OUT)
                tl.store(to_ptr + u * ROWS * LINE, value.to(OUT), mask=here)

    if pasted > 0:
        # With the window: each pixel is the target's, the donor's or masked.
        donor = tl.load(donor_ptr + sample)
        dy = tl.load(patch_ptr + 6 * sample + 2)
        dx = tl.load(patch_ptr + 6 * sample + 3)
        # Inside the window the donor's pixel lies this many bytes behind the target's.
        delta = (donor - target) * (H * LINE) + (dy - ty).to(tl.int64) * LINE + 3 * (dx - tx)

        # The mask is at most 4 words of 64 cells; a line of SIDE cells lies within one.
        words_0 = tl.full((), 0, tl.int64)
        words_1 = words_0
        words_2 = words_0
        words_3 = words_0
        if hottest > 0:
            bank_row = tl.load(bank_row_ptr + sample)
            tie = tl.load(tie_ptr + sample)
            chosen = _hottest_cells(
                bank_ptr + bank_row * (G * G2), box_ptr + 4 * sample, tie, hottest, G, G2, SIDE
            )
            words_0 = _packed(chosen, 0, SIDE * SIDE)
            if SIDE == 16:
                words_1 = _packed(chosen, 64, SIDE * SIDE)
                words_2 = _packed(chosen, 128, SIDE * SIDE)
                words_3 = _packed(chosen, 192, SIDE * SIDE)

        # Of a column in the window the bit of its cell, of others none: a pixel then is looked up
        # by the `and` of a number of its row and a number of its column.
        in_columns = (xv >= tx) & (xv < tx + pw)
        cell_column = tl.where(in_columns, xv - tx + dx, 0) * G2 // W
        column_bit = tl.where(in_columns, 1 << cell_column, 0)
        if not KEEP:
            if fill_ptr is not None:
                fill_r = tl.load(fill_ptr + 3 * sample)
                fill_g = tl.load(fill_ptr + 3 * sample + 1)
                fill_b = tl.load(fill_ptr + 3 * sample + 2)
            fill = _by_channel(channel, fill_r, fill_g, fill_b)
            fill = _output_colour(fill, mean, scale, OUT)

        y = first_row + begin * STEP
        after = first_row + end * STEP
        while y < after:
            to_ptr = out_image_ptr + y.to(tl.int64) * LINE + tile_offset
            for u in tl.static_range(UNROLL):
                yv = y + u * ROWS + row
                here = live if EVEN else live & (y + u * ROWS + lane_row < H)
                yv = (yv if EVEN else tl.minimum(yv, H - 1)) + sy
                if REFLECTED:
                    yv = _reflected_position(yv, H)
                in_rows = (yv >= ty) & (yv < ty + ph)
                cell_row = tl.where(in_rows, yv - ty + dy, 0) * G // H
                if SIDE == 16:
                    upper = tl.where(cell_row < 12, words_2, words_3)
                    words = tl.where(cell_row < 4, words_0, words_1)
                    words = tl.where(cell_row < 8, words, upper)
                    word = (words >> ((cell_row & 3) * 16).to(tl.int64)).to(tl.int32) ^ inverted
                else:
                    word = (words_0 >> (cell_row * SIDE).to(tl.int64)).to(tl.int32) ^ inverted
                masked = (_spread(tl.where(in_rows, word, 0), COLUMNS) & column_bit) != 0
                donated = (_spread(tl.where(in_rows, ~word, 0), COLUMNS) & column_bit) != 0

                # One load from either image: of two masked ones the second costs more than this.
                own_ptr = target_image_ptr + _spread(yv.to(tl.int64) * LINE, COLUMNS)
                from_ptr = tl.where(donated, own_ptr + delta, own_ptr) + source
                if PADDED:
                    shown = _spread((yv >= 0) & (yv < H), COLUMNS) & column_shown
                    needed = shown if KEEP else shown & ~masked
                    pixel = tl.load(from_ptr, mask=needed, other=0).to(tl.int32)
                elif KEEP:
                    pixel = tl.load(from_ptr).to(tl.int32)
                else:
                    pixel = tl.load(from_ptr, mask=~masked, other=0).to(tl.int32)
                value = _output_value(pixel, mean, scale, OUT)
                if PADDED:
                    value = tl.where(shown, value, pad)
                if not KEEP:
                    value = tl.where(masked, fill, value)
                tl.store(to_ptr + u * ROWS * LINE, value.to(OUT), mask=here)
            y += STEP


def launch(
    out: Tensor,
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
    hottest: int,
    inverted: bool,
    mean: Sequence[float],
    std: Sequence[float],
    fill: Tensor | None,
    fill_colour: Sequence[float] | None,
    pad: Sequence[float] | None,
    blocks: configs.MixBackgroundBlocks | None = None,
) -> Launch:
    """Return the launch of the kernel.

    The arguments are those of `mix_background`, but:

    Args:
        out: as `mix_background` returns it, not empty.
        hottest: how many of the hottest cells to find, 0 .. g * g' - 1.
        inverted: mask all other cells, instead.
        fill: fp32 [n, 3] or None.
        fill_colour: without `fill`; both None = keep.
        pad: None = reflect.
        blocks: None = as `configs` says for these shapes.
    """
    n, (height, width), (rows, columns) = len(target), pool.shape[1:3], bank.shape[1:]
    if blocks is None:
        blocks = configs.mix_background_blocks(n, height, width, out.element_size())

    def channels(name: str, colour: Sequence[float] | None) -> dict[str, float]:
        values = (0.0, 0.0, 0.0) if colour is None else colour
        return {f"{name}_{c}": float(x) for c, x in zip("rgb", values, strict=True)}

    return Launch(
        _mix_background_kernel,
        grid=(
            n * ceil_div(3 * width, blocks.columns),
            ceil_div(height, blocks.rows * blocks.unroll * blocks.steps),
        ),
        arguments={
            "out_ptr": out,
            "pool_ptr": pool,
            # What is per sample is small, so a copy is cheap where lines do not lie together.
            "target_ptr": target.contiguous(),
            "donor_ptr": donor.contiguous(),
            "bank_ptr": bank,
            "bank_row_ptr": bank_row.contiguous(),
            "box_ptr": box.contiguous(),
            "patch_ptr": patch.contiguous(),
            "flip_ptr": flip.contiguous(),
            "shift_ptr": None if shift is None else shift.contiguous(),
            "tie_ptr": tie.contiguous(),
            "fill_ptr": None if fill is None else fill.contiguous(),
            "hottest": hottest,
            "inverted": -int(inverted),
            "steps": blocks.steps,
            **channels("mean", mean),
            # Divided in double and then narrowed, as in the meaning.
            **channels("scale", [1 / s for s in std]),
            **channels("fill", fill_colour),
            **channels("pad", pad),
        },
        constants={
            "H": height,
            "W": width,
            "G": rows,
            "G2": columns,
            "SIDE": triton.next_power_of_2(max(rows, columns, 2)),
            "KEEP": fill is None and fill_colour is None,
            "PADDED": shift is not None and pad is not None,
            "REFLECTED": shift is not None and pad is None,
            "COLUMNS": blocks.columns,
            "ROWS": blocks.rows,
            "UNROLL": blocks.unroll,
        },
        warps=blocks.warps,
        maxnreg=blocks.maxnreg,
    )


# --- custom operator ---------------------------------------------------------------------------


def _run(*arguments: Any) -> None:
    """Launch the kernel with the arguments of `launch`."""
    launch(*arguments).run()


# For torch.compile alone: a plain call of the door would pay more for it than for the launch.
_mix_background_op = torch.library.custom_op(
    "backmix::mix_background",
    _run,
    mutates_args=("out",),
    schema="(Tensor(a!) out, Tensor pool, Tensor target, Tensor donor, Tensor bank, "
    "Tensor bank_row, Tensor box, Tensor patch, Tensor flip, Tensor? shift, Tensor tie, "
    "int hottest, bool inverted, float[] mean, float[] std, Tensor? fill, float[]? fill_colour, "
    "float[]? pad) -> ()",
)


@_mix_background_op.register_fake
def _(*_arguments: Any) -> None:
    """Nothing is made: the door makes the output, with its real strides."""


def _empty_output(n: int, pool: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for the output of n images, in the shape and strides of `mix_background`."""
    height, width = pool.shape[1:3]
    nhwc = torch.empty((n, height, width, 3), dtype=dtype, device=pool.device)
    return nhwc if dtype == torch.uint8 else nhwc.permute(0, 3, 1, 2)


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
    _check_tensors(pool, target, donor, bank, bank_row, box, patch, flip, shift, tie)
    _check_options(mode, mask_cells, bank.shape[1] * bank.shape[2])
    _check_colours(mean, std, fill, pad, len(target), pool.device)
    if check:
        _check_values(pool, target, donor, bank, bank_row, box, patch)
    _check_output(out, dtype, len(target), pool)
    if dispatch.choose(backend, "mix_background", pool.device) == "triton":
        out = _empty_output(len(target), pool, dtype) if out is None else out
        if len(target):
            hottest, inverted = _search(mode, mask_cells, bank.shape[1] * bank.shape[2])
            colour = mean if fill is None else fill
            (_mix_background_op if torch.compiler.is_compiling() else _run)(
                out,
                pool,
                target,
                donor,
                bank,
                bank_row,
                box,
                patch,
                flip,
                shift,
                tie,
                hottest,
                inverted,
                _floats(mean),
                _floats(std),
                colour.detach() if isinstance(colour, Tensor) else None,
                None if isinstance(colour, Tensor | str) else _floats(colour),
                None if isinstance(pad, str) else _floats(pad),
            )
        return out
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


def _search(mode: Mode, mask_cells: int, cells: int) -> tuple[int, bool]:
    """Return how many of the hottest cells to find, and whether all the others are masked.

    Of the first there are fewer than `cells`; 0 = the bank is not looked at.
    """
    masked = {"none": 0, "grey": cells}.get(mode, mask_cells)
    if masked in (0, cells):
        return 0, masked > 0
    return (cells - masked, True) if mode == "inverse" else (masked, False)


def _floats(values: Sequence[float]) -> list[float]:
    return [float(x) for x in values]


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
    if torch.compiler.is_compiling():
        return  # which cannot ask where a tensor starts
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
    if isinstance(values, Tensor):  # the host would have to wait for its values
        return False
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
