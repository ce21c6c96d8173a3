"""Everything random about a sample, as pure functions of (seed, epoch, sample number).

One counter-based generator (Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) instead of a generator with a state: no draw depends on batch, worker, rank or
loader, and any of them can be repeated alone. The same integers are computed on the device by
`kernels/philox.py`. numpy only; torch is deliberately not needed here.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Position = Literal["inside", "clipped"]
DonorClass = Literal["any", "other", "same"]

STREAMS = {
    "order": 0,
    "crop": 1,
    "flip": 2,
    "shift": 3,
    "donor": 4,
    "patch": 5,
    "tie": 6,
    "apply": 7,
    "replacement": 8,
    "holdout": 9,
    "proportion": 10,
    "strong": 11,
}
"""Stream numbers: part of every result ever computed, so they are never renumbered.

255 is taken, too: the generated images of ARPL+CS (`train/methods/confusing.py`).
"""

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85
CROP_TRIES = 10
_IN_CACHE = 8192
"""Samples whose words are computed together, so that what lies between fits a core's cache."""


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Return the Philox4x32-10 block of every counter.

    Args:
        counter: uint32 [..., 4], first word least significant.
        key: two 32-bit integers.

    Returns uint32 [..., 4].
    """
    # 64-bit lanes hold 32-bit words, so that one multiplication gives both halves of a product.
    x0, x1, x2, x3 = (counter[..., word].astype(np.uint64) for word in range(4))
    k0, k1 = key
    for _ in range(10):
        first, second = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            (second >> HALF) ^ x1 ^ np.uint64(k0),
            second & LOW,
            (first >> HALF) ^ x3 ^ np.uint64(k1),
            first & LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def block(seed: int, epoch: int, index: np.ndarray, stream: str, number: int = 0) -> np.ndarray:
    """Return four random 32-bit words per sample, uint32 [n, 4].

    Args:
        seed: 0 .. 2^64 - 1.
        epoch: 0 .. 2^32 - 1.
        index: sample numbers, int64 [n], 0 .. 2^56 - 1.
        stream: what the words are for, a key of `STREAMS`.
        number: which draw of this stream, for those that need more than four words.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"the seed must be in 0 .. 2^64 - 1, got {seed}")
    index = np.asarray(index, np.int64)
    counter = np.empty((*index.shape, 4), np.uint32)
    counter[..., 0] = index & 0xFFFFFFFF
    counter[..., 1] = index >> 32 | STREAMS[stream] << 24
    counter[..., 2] = epoch
    counter[..., 3] = number
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


def words(seed: int, epoch: int, index: np.ndarray, stream: str, number: int = 0) -> np.ndarray:
    """Return one random 64-bit word per sample, uint64 [n]: the first two of `block`."""
    found = np.empty(len(index), np.uint64)
    for start in range(0, len(index), _IN_CACHE):  # for a whole ImageNet, five times as fast
        some = slice(start, start + _IN_CACHE)
        x = block(seed, epoch, index[some], stream, number).astype(np.uint64)
        found[some] = x[..., 0] | x[..., 1] << HALF
    return found


def uniform(x: np.ndarray) -> np.ndarray:
    """Map random words, uint32, to float64 in [0, 1) with 24 bits; exact in fp32, too."""
    return (x >> np.uint32(8)) * 2.0**-24


def below(x: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """Map random words, uint32, to integers 0 .. n - 1 (0 where n is 0), int64; n < 2^31."""
    return (x.astype(np.int64) * n) >> 32


def whole_boxes(sizes: np.ndarray) -> np.ndarray:
    """Return the boxes (0, 0, h, w) of whole images, int32 [n, 4], from sizes [n, 2]."""
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(np.int32)


def centre_boxes(sizes: np.ndarray, share: float) -> np.ndarray:
    """Return central squares, `share` of the shorter side, rounded down; int32 [n, 4].

    The usual evaluation crop ("shorter side to 256, then the central 224") as a box of the stored
    image, so that one resampling is enough: share = 224 / 256. It lies within a pixel of that.
    """
    sizes = np.asarray(sizes, np.int32)
    side = np.maximum((share * sizes.min(axis=1)).astype(np.int32), 1)[:, None]
    return np.concatenate([(sizes - side) // 2, side, side], axis=1).astype(np.int32)


def crop_boxes(
    seed: int,
    epoch: int,
    index: np.ndarray,
    sizes: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Draw the random-resized-crop of every sample by torchvision's rule.

    A try draws an area (uniform) and a ratio of width to height (log-uniform), rounds the sides
    half to even, and is accepted if the box fits; its corner is then uniform over all places. Of
    ten tries the first accepted counts; if there is none, the centred box is taken that keeps all
    of the side that limits it, at the ratio's limit.

    Args:
        seed, epoch, index: as in `block`.
        sizes: h, w of the stored images, int32 [n, 2], at least 1.
        scale: range of the box's share of the area.
        ratio: range of width / height.

    Returns int32 [n, 4] as y0, x0, h, w.
    """
    index = np.asarray(index, np.int64)
    sizes = np.asarray(sizes, np.int64)
    boxes = _fallback_boxes(sizes, ratio)
    left, right = np.log(ratio)
    pending = np.arange(len(index))
    # A try has a counter of its own, so drawing the later ones only where they are needed changes
    # nothing but the time.
    for attempt in range(CROP_TRIES):
        x = block(seed, epoch, index[pending], "crop", attempt)
        height, width = sizes[pending].T
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform(x[:, 0]))
        shape = np.exp(left + (right - left) * uniform(x[:, 1]))
        w = np.rint(np.sqrt(area * shape)).astype(np.int64)
        h = np.rint(np.sqrt(area / shape)).astype(np.int64)
        fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
        y0, x0 = below(x[:, 2], height - h + 1), below(x[:, 3], width - w + 1)
        boxes[pending[fits]] = np.stack([y0, x0, h, w], axis=1)[fits]
        pending = pending[~fits]
        if not len(pending):
            break
    return boxes


def _fallback_boxes(sizes: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """Return the centred boxes for images in which no try fitted, int32 [n, 4]."""
    height, width = sizes.T
    shape = width / height
    h = np.where(shape < ratio[0], np.rint(width / ratio[0]), height)
    w = np.where(shape > ratio[1], np.rint(height * ratio[1]), width)
    h, w = np.maximum(h, 1).astype(np.int64), np.maximum(w, 1).astype(np.int64)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1).astype(np.int32)


@dataclass(frozen=True)
class MixDraws:
    """The draws of `mix_background` for the n images of a batch."""

    flip: np.ndarray
    """bool [n]."""
    shift: np.ndarray | None
    """int32 [n, 2]: sy, sx in -pad .. pad; None without pad."""
    donor: np.ndarray
    """int64 [n]: pool row; the image's own row where there is nobody else."""
    patch: np.ndarray
    """int32 [n, 6]: ty, tx, dy, dx, ph, pw; zeros where nothing is pasted."""
    tie: np.ndarray
    """int32 [n]: one random word per image."""


def mix_draws(
    seed: int,
    epoch: int,
    index: np.ndarray,
    *,
    rows: np.ndarray,
    pool_rows: int,
    group: int,
    size: tuple[int, int],
    patch: int,
    position: Position = "inside",
    probability: float = 1.0,
    flip: bool = True,
    pad: int = 0,
    donor_class: DonorClass = "any",
    labels: np.ndarray | None = None,
) -> MixDraws:
    """Draw flip, shift, donor, patch and tie word of every image of a batch.

    Args:
        seed, epoch, index: as in `block`.
        rows: pool row of each image, int64 [n].
        pool_rows: rows of the pool, P.
        group: images per mix group: image i takes its donor among the images group * (i // group)
            onwards, the last group may be short; 0 = among all rows of the pool.
        size: H, W of the view [pixels].
        patch: side of the patch [pixels], at most the shorter side of the view.
        position: inside: the corner is uniform over all places where the patch lies in the view,
            the last row and column included. clipped: its centre is uniform over the view, and
            what sticks out is cut off.
        probability: share of the images that get a patch.
        flip: whether to flip half of the images.
        pad: largest shift [pixels].
        donor_class: any image, one of another class, or one of the same class; never the image
            itself. Where there is no such image, nothing is pasted.
        labels: class of every row of the pool, int64 [P]; needed unless donor_class is any.
    """
    height, width = size
    if not 1 <= patch <= min(size):
        raise ValueError(f"the patch side must be in 1 .. {min(size)} (the view), got {patch}")
    for choice, choices in ((position, Position), (donor_class, DonorClass)):
        if choice not in get_args(choices):
            raise ValueError(f"expected one of {', '.join(get_args(choices))}; got {choice!r}")
    if not 0 <= probability <= 1:
        raise ValueError(f"the probability of a patch must be in 0 .. 1, got {probability}")
    index = np.asarray(index, np.int64)
    donor, found = _donors(
        block(seed, epoch, index, "donor")[:, 0],
        np.asarray(rows, np.int64),
        pool_rows,
        group,
        donor_class,
        labels,
    )
    x = block(seed, epoch, index, "patch")
    place = _patches_inside if position == "inside" else _patches_clipped
    apply = uniform(block(seed, epoch, index, "apply")[:, 0]) < probability
    flipped = block(seed, epoch, index, "flip")[:, 0] >> np.uint32(31) == 1
    shift = block(seed, epoch, index, "shift")[:, :2]
    return MixDraws(
        flip=flipped if flip else np.zeros(len(index), bool),
        shift=(below(shift, 2 * pad + 1) - pad).astype(np.int32) if pad else None,
        donor=donor,
        patch=np.where((apply & found)[:, None], place(x, height, width, patch), 0).astype(
            np.int32
        ),
        tie=block(seed, epoch, index, "tie")[:, 0].view(np.int32),
    )


def _patches_inside(x: np.ndarray, height: int, width: int, patch: int) -> np.ndarray:
    """Return patches that lie whole in both views, int64 [n, 6], from words uint32 [n, 4]."""
    places = np.array([height, width, height, width]) - patch + 1
    return np.concatenate([below(x, places), np.full((len(x), 2), patch)], axis=1)


def _patches_clipped(x: np.ndarray, height: int, width: int, patch: int) -> np.ndarray:
    """Return patches around uniform centres, cut off at the view's border, int64 [n, 6]."""
    sides = np.array([height, width])
    first = below(x[:, :2], sides) - patch // 2
    corner = np.maximum(first, 0)
    extent = np.minimum(first + patch, sides) - corner
    return np.concatenate([corner, below(x[:, 2:], sides - extent + 1), extent], axis=1)


def _donors(
    x: np.ndarray,
    rows: np.ndarray,
    pool_rows: int,
    group: int,
    donor_class: str,
    labels: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the donor's pool row of every image, int64 [n], and whether there is one, bool [n].

    Candidates are numbered cyclically from the image's own place, so that one draw below the
    number of the others never meets the image itself.
    """
    if group:  # candidates are the images of the batch
        own, candidates = np.arange(len(rows)), rows
        first = own // group * group
        count = np.minimum(first + group, len(rows)) - first
    else:  # candidates are the rows of the pool
        own, candidates = rows, np.arange(pool_rows)
        first, count = np.zeros_like(rows), np.full_like(rows, pool_rows)

    if donor_class == "any":
        others = count - 1
        step = below(x, others) + 1
        donor = candidates[first + (own - first + step) % np.maximum(count, 1)]
    else:
        if labels is None:
            raise ValueError(f"donors of the {donor_class} class need the labels of the pool")
        arranged, place, run, length = _runs(labels[candidates], group)
        place, run, length = place[own], run[own], length[own]
        if donor_class == "same":
            others = length - 1
            chosen = run + (place - run + 1 + below(x, others)) % length
        else:
            others = count - length
            chosen = first + (run - first + length + below(x, others)) % count
        donor = candidates[arranged[chosen]]
    return np.where(others > 0, donor, rows), others > 0


def _runs(labels: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Arrange candidates by class inside their groups.

    Returns int64 [m] each: the candidates in that arrangement, and for every candidate its place
    in it, the place where its class's run begins, and the length of that run.
    """
    m = len(labels)
    # Short integers take numpy's radix sort: a pool of 50,000 rows is arranged at every step.
    short = labels - labels.min(initial=0)
    if short.max(initial=0) < 1 << 16:
        short = short.astype(np.uint16)
    if group:
        arranged = np.lexsort((short, np.arange(m) // group))
    else:
        arranged = np.argsort(short, kind="stable")
    sorted_labels = labels[arranged]
    begins = np.ones(m, bool)
    begins[1:] = sorted_labels[1:] != sorted_labels[:-1]
    if group:
        begins[::group] = True  # the arrangement keeps every group at its own places
    starts = np.flatnonzero(begins)
    number = np.cumsum(begins) - 1
    lengths = np.diff(np.append(starts, m))
    place = np.empty(m, np.int64)
    place[arranged] = np.arange(m)
    return arranged, place, starts[number[place]], lengths[number[place]]
