"""Strong augmentations of uint8 views: RandAugment, and the pool of CSSR.

The published recipes call Pillow, one image at a time. Here every operation takes all images of a
batch that drew it, on any device, and gives Pillow's bytes. What is drawn is known on the host
(pure functions of seed, epoch and sample), so the images that share an operation are found without
asking the device, and nothing waits for it.

Cubuk, Zoph, Shlens, Le: "RandAugment" (NeurIPS 2020 workshops), with the operations and ranges of
the public code of Vaze, Han, Vedaldi, Zisserman: "Open-Set Recognition: A Good Closed-Set
Classifier Is All You Need" (ICLR 2022); the public code of Huang et al.: "Class-Specific Semantic
Reconstruction for Open Set Recognition" (TPAMI 2022).
"""

from dataclasses import dataclass
from enum import IntEnum, auto

import numpy as np
import torch
from torch import Tensor

from backmix.pipeline import draws


class Op(IntEnum):
    """An operation on one image; what its value means stands beside it."""

    IDENTITY = auto()
    AUTOCONTRAST = auto()
    """Stretch each channel to 0..255."""
    EQUALIZE = auto()
    """Flatten each channel's histogram."""
    INVERT = auto()
    """255 - pixel."""
    POSTERIZE = auto()
    """Bits that are kept, 1..8."""
    SOLARIZE = auto()
    """Pixels from this level on are inverted."""
    SOLARIZE_ADD = auto()
    """This is added, then pixels from 128 on are inverted."""
    COLOR = auto()
    """Distance from the image's grey version: 0 grey, 1 as it is."""
    CONTRAST = auto()
    """Distance from the image's mean grey: 0 plain, 1 as it is."""
    BRIGHTNESS = auto()
    """Factor of the pixels."""
    SHARPNESS = auto()
    """Distance from the smoothed image: 0 smooth, 1 as it is."""
    ROTATE = auto()
    """Degrees anticlockwise."""
    SHEAR_X = auto()
    """Pixels to the left per row."""
    SHEAR_Y = auto()
    """Pixels up per column."""
    TRANSLATE_X = auto()
    """Pixels to the left."""
    TRANSLATE_Y = auto()
    """Pixels up."""
    CUTOUT = auto()
    """Side of the square that is painted over [pixels]; see `cutout_boxes`."""


POINT = (Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD, Op.BRIGHTNESS)
"""Operations in which a pixel's new value depends on its old one alone."""
WARP = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)
"""Operations that move pixels; what comes from outside is black. Their value takes a sign."""
MOVES = (Op.ROTATE, Op.TRANSLATE_X, Op.TRANSLATE_Y)
"""Operations that the recipe for digits leaves out."""

RANDAUGMENT = (
    (Op.AUTOCONTRAST, 0.0, 1.0),
    (Op.EQUALIZE, 0.0, 1.0),
    (Op.INVERT, 0.0, 1.0),
    (Op.ROTATE, 0.0, 30.0),
    (Op.POSTERIZE, 0.0, 4.0),
    (Op.SOLARIZE, 0.0, 256.0),
    (Op.SOLARIZE_ADD, 0.0, 110.0),
    (Op.COLOR, 0.1, 1.9),
    (Op.CONTRAST, 0.1, 1.9),
    (Op.BRIGHTNESS, 0.1, 1.9),
    (Op.SHARPNESS, 0.1, 1.9),
    (Op.SHEAR_X, 0.0, 0.3),
    (Op.SHEAR_Y, 0.0, 0.3),
    (Op.CUTOUT, 0.0, 40.0),
    (Op.TRANSLATE_X, 0.0, 100.0),
    (Op.TRANSLATE_Y, 0.0, 100.0),
)
"""RandAugment's operations with their values at magnitudes 0 and 30."""
RANDAUGMENT_CUTOUT = (125, 123, 114)
"""Colour of RandAugment's Cutout."""

CSSR = (
    (Op.BRIGHTNESS, 1.8, 0.1),
    (Op.COLOR, 0.9, 0.05),
    (Op.EQUALIZE, 0.0, 0.0),
    (Op.IDENTITY, 0.0, 0.0),
    (Op.POSTERIZE, 4.0, 4.0),
    (Op.ROTATE, 15.0, 0.0),
    (Op.SHARPNESS, 1.8, 0.05),
    (Op.SHEAR_X, 0.3, 0.0),
    (Op.SHEAR_Y, 0.3, 0.0),
    (Op.SOLARIZE, -256.0, 256.0),
)
"""CSSR's operations; at strength v = 1..9 the value is first * v / 10 + second."""
CSSR_WHOLE = (Op.POSTERIZE, Op.ROTATE, Op.SOLARIZE)
"""Operations for which CSSR rounds first * v / 10 towards 0."""
CSSR_CUTOUT = (127, 127, 127)
"""Colour of CSSR's Cutout."""


# --- the two pools -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """One operation for each of n images, on the host."""

    op: np.ndarray
    """int64 [n], of `Op`."""
    value: np.ndarray
    """float64 [n], with its sign."""
    place: np.ndarray
    """float64 [n, 2]: Cutout's centre, y and x as shares of the way across, in (0, 1]."""

    def of(self, rows: np.ndarray) -> "Drawn":
        """Return the draws of some of the images."""
        return Drawn(self.op[rows], self.value[rows], self.place[rows])


def randaugment(
    images: Tensor,
    seed: int,
    epoch: int,
    index: np.ndarray,
    *,
    operations: int,
    magnitude: int,
    moves: bool,
) -> Tensor:
    """Apply RandAugment to a batch, in place, and return it.

    Args:
        images: uint8 [n, H, W, 3], contiguous.
        seed, epoch, index: as in `draws.block`; index has n sample numbers.
        operations: how many follow one another, drawn with replacement and always applied.
        magnitude: 0..30; the value of every operation lies at magnitude / 30 of its range.
        moves: whether rotations and translations are among the operations.
    """
    for layer in range(operations):
        drawn = draw_randaugment(seed, epoch, index, layer, magnitude, moves)
        operate(images, drawn)
    return images


def draw_randaugment(
    seed: int, epoch: int, index: np.ndarray, layer: int, magnitude: int, moves: bool
) -> Drawn:
    """Draw one of RandAugment's operations for each image; the arguments are its own.

    Rotations, shears and translations take a random sign. Values are fixed by the magnitude.
    """
    pool = [line for line in RANDAUGMENT if moves or line[0] not in MOVES]
    values = np.array([magnitude / 30 * (high - low) + low for _, low, high in pool])
    ops = np.array([op for op, _, _ in pool])
    values[ops == Op.POSTERIZE] = np.maximum(np.floor(values[ops == Op.POSTERIZE]), 1)
    x = draws.block(seed, epoch, index, "strong", layer)
    chosen = draws.below(x[:, 0], len(pool))
    return _signed(ops[chosen], values[chosen], x[:, 1], 1 - draws.uniform(x[:, 2:]))


def cssr(images: Tensor, seed: int, epoch: int, index: np.ndarray) -> Tensor:
    """Apply CSSR's operations and its Cutout to a batch, in place, and return it.

    Two operations of `CSSR`, drawn with replacement, each applied with probability 1/2; then a
    square of half the shorter side in grey.

    Args:
        images: uint8 [n, H, W, 3], contiguous.
        seed, epoch, index: as in `draws.block`; index has n sample numbers.
    """
    for layer in range(2):
        operate(images, draw_cssr(seed, epoch, index, layer))
    height, width = images.shape[1:3]
    place = draws.uniform(draws.block(seed, epoch, index, "strong", 2)[:, :2])
    side = np.full(len(index), float(min(height, width) // 2))
    boxes = cutout_boxes(side, place * (height, width), height, width)
    return images.copy_(paint(images, boxes, CSSR_CUTOUT))


def draw_cssr(seed: int, epoch: int, index: np.ndarray, layer: int) -> Drawn:
    """Draw one of CSSR's operations for each image; IDENTITY where it is not applied."""
    slopes, bases = np.array([line[1] for line in CSSR]), np.array([line[2] for line in CSSR])
    ops = np.array([op for op, _, _ in CSSR])
    x = draws.block(seed, epoch, index, "strong", layer)
    chosen = draws.below(x[:, 0], len(CSSR))
    strength = 1 + draws.below(x[:, 2], 9)
    value = strength * slopes[chosen] / 10
    value = np.where(np.isin(ops[chosen], CSSR_WHOLE), np.trunc(value), value) + bases[chosen]
    applied = x[:, 3] >> np.uint32(31) == 1
    op = np.where(applied, ops[chosen], Op.IDENTITY)
    return _signed(op, value, x[:, 1], np.ones((len(index), 2)))


def cssr_contrast(seed: int, epoch: int, index: np.ndarray) -> np.ndarray:
    """Draw what CSSR multiplies a normalised view by: uniform in [0.1, 2), float32 [n]."""
    x = draws.block(seed, epoch, index, "strong", 2)[:, 2]
    return (0.1 + 1.9 * draws.uniform(x)).astype(np.float32)


def _signed(op: np.ndarray, value: np.ndarray, word: np.ndarray, place: np.ndarray) -> Drawn:
    """Turn the values of warps around where the word's highest bit is set."""
    negative = (word >> np.uint32(31) == 1) & np.isin(op, WARP)
    return Drawn(op, np.where(negative, -value, value), place)


# --- operations on batches ---------------------------------------------------------------------


def operate(images: Tensor, drawn: Drawn) -> Tensor:
    """Apply to every image the operation that it drew, in place, and return the batch.

    Args:
        images: uint8 [n, H, W, 3], contiguous.
        drawn: operations of the n images.
    """
    families = (POINT, WARP, *((op,) for op in Op if op not in (Op.IDENTITY, *POINT, *WARP)))
    for family in families:
        rows = np.flatnonzero(np.isin(drawn.op, family))
        if len(rows):
            where = _moved(rows, images.device)
            part = images.index_select(0, where)
            images.index_copy_(0, where, _changed(part, drawn.of(rows)))
    return images


def _changed(images: Tensor, drawn: Drawn) -> Tensor:
    """Return images changed by operations of one family, uint8 as `images`."""
    height, width = images.shape[1:3]
    match drawn.op[0]:
        case op if op in POINT:
            tables = _moved(point_tables(drawn.op, drawn.value), images.device)
            return look_up(images, tables[:, None].expand(-1, 3, -1))
        case op if op in WARP:
            return warp(images, warp_matrices(drawn.op, drawn.value, height, width))
        case Op.AUTOCONTRAST:
            return autocontrast(images)
        case Op.EQUALIZE:
            return equalize(images)
        case Op.COLOR:
            return blend(_grey(images)[..., None], images, drawn.value)
        case Op.CONTRAST:
            return blend(_mean_grey(images)[:, None, None, None], images, drawn.value)
        case Op.SHARPNESS:
            return blend(smooth(images), images, drawn.value)
        case Op.CUTOUT:
            # The published centre is NumPy's uniform(side), which lies between 1 and the side.
            centre = 1 + drawn.place * (height - 1, width - 1)
            boxes = cutout_boxes(drawn.value, centre, height, width)
            return paint(images, boxes, RANDAUGMENT_CUTOUT)
        case op:
            raise AssertionError(f"{op} has no family")


def point_tables(op: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the new value of each of the 256 levels, uint8 [n, 256].

    Args:
        op: of `POINT`, int64 [n].
        value: float64 [n].
    """
    level = np.arange(256)
    value = value[:, None]
    added = np.clip(level + value, 0, 255).astype(np.int64)
    # Pillow computes brightness in fp32.
    brighter = np.clip(value.astype(np.float32) * level.astype(np.float32), 0, 255)
    kept = 256 - (1 << np.clip(8 - value.astype(np.int64), 0, 8))
    return np.select(
        [op[:, None] == case for case in POINT],
        [
            np.broadcast_to(255 - level, added.shape),
            level & kept,
            np.where(level < value, level, 255 - level),
            np.where(added < 128, added, 255 - added),
            brighter.astype(np.int64),
        ],
    ).astype(np.uint8)


def warp_matrices(op: np.ndarray, value: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return which point of the input each output pixel shows, int64 [n, 6], 16.16 fractions.

    The pixel in column x and row y shows the input's pixel under
    (m0 * x + m1 * y + m2, m3 * x + m4 * y + m5), Pillow's fixed-point form.

    Args:
        op: of `WARP`, int64 [n].
        value: float64 [n].
        height, width: of the images [pixels].
    """
    turned = op == Op.ROTATE
    angle = np.where(turned, -np.radians(value % 360), 0)
    cosine, sine = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    a, b = cosine, np.where(op == Op.SHEAR_X, value, sine)
    d, e = np.where(op == Op.SHEAR_Y, value, -sine), cosine
    cx, cy = np.where(turned, width / 2, 0), np.where(turned, height / 2, 0)  # turned about here
    c = np.where(op == Op.TRANSLATE_X, value, a * -cx + b * -cy + cx)
    f = np.where(op == Op.TRANSLATE_Y, value, d * -cx + e * -cy + cy)
    first = np.stack([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5], axis=1)
    return np.floor(first * 65536 + 0.5).astype(np.int64)


def cutout_boxes(value: np.ndarray, centre: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the squares of Cutout, int64 [n, 4] as y0, x0, y1, x1, the last ones included.

    As the published code draws them: the corner lies half a side before the centre, at least 0; the
    square reaches one side further, its last row and column included, at most to the border. So a
    square of side 16 has 17 rows, and only the right and the lower border cut it.

    Args:
        value: side [pixels], float64 [n], at least 0.
        centre: y, x [pixels], float64 [n, 2].
        height, width: of the images [pixels].
    """
    first = np.maximum(centre - value[:, None] / 2, 0).astype(np.int64)
    last = np.minimum(first + value[:, None], (height, width)).astype(np.int64)
    return np.concatenate([first, last], axis=1)


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Return images whose levels are replaced by those of a table per image and channel.

    Args:
        images: uint8 [n, H, W, 3].
        tables: uint8 [n, 3, 256].
    """
    n = len(images)
    return tables.reshape(n, 768).gather(1, _levels(images).view(n, -1)).view_as(images)


def autocontrast(images: Tensor) -> Tensor:
    """Return images whose channels are stretched to 0..255; a channel of one level stays."""
    pixels = images.view(len(images), -1, 3)
    low, high = pixels.amin(1).double()[..., None], pixels.amax(1).double()[..., None]
    level = torch.arange(256, dtype=torch.float64, device=images.device)
    # In fp64 and in Pillow's order: where the exact value is whole, rounding decides. A division
    # of tensors, because torch divides a number by multiplying with the reciprocal.
    scale = torch.full_like(high, 255) / (high - low)
    stretched = (level * scale + -low * scale).clamp(0, 255)
    return look_up(images, torch.where(high > low, stretched, level).to(torch.uint8))


def equalize(images: Tensor) -> Tensor:
    """Return images whose channels have about as many pixels at every level."""
    n, (height, width) = len(images), images.shape[1:3]
    device = images.device
    levels = _levels(images)
    keys = levels + 768 * torch.arange(n, device=device)[:, None, None]
    counts = torch.zeros(n * 768, dtype=torch.int64, device=device)
    counts.scatter_add_(0, keys.view(-1), torch.ones_like(keys).view(-1))
    counts = counts.view(n, 3, 256)
    brightest = images.view(n, -1, 3).amax(1).long()[..., None]
    step = (height * width - counts.gather(2, brightest)) // 255
    below = counts.cumsum(2) - counts
    spread = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    level = torch.arange(256, device=device)
    return look_up(images, torch.where(step > 0, spread, level).to(torch.uint8))


def blend(base: Tensor, images: Tensor, factor: np.ndarray) -> Tensor:
    """Return base + factor * (image - base), in fp32, cut to 0..255 and rounded down.

    Args:
        base: integers that broadcast to the images.
        images: uint8 [n, H, W, 3].
        factor: float64 [n]; above 1 it leads away from the base.
    """
    weight = _moved(factor.astype(np.float32), images.device)[:, None, None, None]
    start = base.float()
    return (start + weight * (images.float() - start)).clamp_(0, 255).to(torch.uint8)


def smooth(images: Tensor) -> Tensor:
    """Return the mean of 3 x 3 pixels, the middle one counting five times; the border stays."""
    x = images.int()
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * x[:, 1:-1, 1:-1]
    x[:, 1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13 to the nearest; there are no halves
    return x


def warp(images: Tensor, matrices: np.ndarray) -> Tensor:
    """Return images that show their nearest pixel under each moved point, black outside.

    Args:
        images: uint8 [n, H, W, 3], contiguous.
        matrices: int64 [n, 6], as `warp_matrices`.
    """
    n, (height, width) = len(images), images.shape[1:3]
    m = _moved(matrices, images.device)[..., None, None]
    y = torch.arange(height, device=images.device)[:, None]
    x = torch.arange(width, device=images.device)
    column = (m[:, 0] * x + m[:, 1] * y + m[:, 2]) >> 16
    row = (m[:, 3] * x + m[:, 4] * y + m[:, 5]) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    image = torch.arange(n, device=images.device)[:, None, None]
    source = (image * height + row.clamp(0, height - 1)) * width + column.clamp(0, width - 1)
    shown = images.view(-1, 3).index_select(0, source.view(-1)).view_as(images)
    return shown * inside[..., None]


def paint(images: Tensor, boxes: np.ndarray, colour: tuple[int, int, int]) -> Tensor:
    """Return images with one filled rectangle each.

    Args:
        images: uint8 [n, H, W, 3].
        boxes: int64 [n, 4] as y0, x0, y1, x1, the last ones included.
        colour: of the rectangles [0..255].
    """
    y0, x0, y1, x1 = _moved(boxes, images.device)[:, :, None].unbind(1)
    y = torch.arange(images.shape[1], device=images.device)
    x = torch.arange(images.shape[2], device=images.device)
    inside = ((y >= y0) & (y <= y1))[:, :, None] & ((x >= x0) & (x <= x1))[:, None, :]
    return torch.where(inside[..., None], _moved(np.array(colour, np.uint8), y.device), images)


def _levels(images: Tensor) -> Tensor:
    """Return 256 * channel + level of every element, int64 [n, H * W, 3]."""
    return images.view(len(images), -1, 3).long() + 256 * torch.arange(3, device=images.device)


def _grey(images: Tensor) -> Tensor:
    """Return the brightness of the pixels by Pillow's integer weights, int32 [n, H, W]."""
    red, green, blue = images.int().unbind(3)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _mean_grey(images: Tensor) -> Tensor:
    """Return the mean of the images' rounded brightness, rounded to nearest, int64 [n]."""
    grey = _grey(images).flatten(1)
    return (2 * grey.sum(1) + grey.shape[1]) // (2 * grey.shape[1])


def _moved(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy what the host drew to the device, without waiting for it."""
    return torch.from_numpy(array).to(device, non_blocking=True)
