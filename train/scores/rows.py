"""Arrays of any length, a few rows at a time: float64 arithmetic in little memory.

Stored outputs are float32 in mapped files. A score turns a chunk of rows into float64, computes,
and lets go of it, so that its memory does not grow with the number of images.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

CHUNK = 1 << 26
"""Bytes of float64 that one chunk of rows takes, what is computed from it included."""


def spans(count: int, columns: int) -> Iterator[slice]:
    """Yield slices that cover 0 .. count, each of at most `CHUNK` bytes of `columns` float64."""
    step = max(1, CHUNK // (8 * max(columns, 1)))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def by_rows(
    score: Callable[..., NDArray[np.floating]], arrays: Mapping[str, ArrayLike], beside: int = 0
) -> Floats:
    """Return score(chunk, ...) of all rows, float64 [n].

    Args:
        score: [m] of the arrays' chunks in float64, [m, ...] each, in the order given.
        arrays: [n] or [n, d] of equal n, by the word for them in an error message.
        beside: float64 columns that the score needs beside the arrays' own.

    Raises:
        ValueError: NaN or infinite entries, with the number of images that have them: a score of
            such an image would mean nothing.
    """
    given = {what: np.asarray(array) for what, array in arrays.items()}
    count = len(next(iter(given.values())))
    columns = sum(array.size // max(len(array), 1) for array in given.values())
    scores = np.empty(count)
    bad = dict.fromkeys(given, 0)
    for rows in spans(count, beside + 2 * columns):
        chunk = [array[rows].astype(np.float64) for array in given.values()]
        for what, part in zip(given, chunk, strict=True):
            finite = np.isfinite(part)
            if not finite.all():
                bad[what] += int(np.count_nonzero(~finite.reshape(len(part), -1).all(1)))
        if not any(bad.values()):
            scores[rows] = score(*chunk)
    for what, images in bad.items():
        if images:
            raise ValueError(
                f"{images} of {count} images have {what} that are NaN or infinite: the model has "
                "diverged, or the images were not normalised as in training"
            )
    return scores


def matrix(what: str, array: ArrayLike) -> np.ndarray:
    """Return an array checked to be [n, C], C >= 1."""
    values = np.asarray(array)
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"{what} must be [n, C] with C >= 1, got shape {values.shape}")
    return values


def percentile(values: np.ndarray, share: float) -> float:
    """Return the percentile of all entries of a float32 array, as numpy interpolates it, exactly.

    Two passes in little memory, for arrays that are larger than it: the bits of a float32 order as
    its value does once the negative ones are turned, so a histogram of the upper 16 bits finds the
    65,536th of the line in which the wanted rank lies, and one of the lower 16 bits the value.

    Args:
        values: float32, any shape, not empty, no NaN.
        share: in [0, 1]; 0.9 = the 90th percentile.
    """
    if values.dtype != np.float32 or not values.size:
        raise ValueError(f"needs float32 entries, got {values.size} of {values.dtype}")
    position = share * (values.size - 1)
    ranks = int(position), min(int(position) + 1, values.size - 1)
    upper = np.zeros(1 << 16, np.int64)
    for keys in _keys(values):
        upper += np.bincount(keys >> 16, minlength=1 << 16)
    ends = np.cumsum(upper)
    bins = [int(np.searchsorted(ends, rank, side="right")) for rank in ranks]
    lower = {bin: np.zeros(1 << 16, np.int64) for bin in bins}
    for keys in _keys(values):
        for bin, counts in lower.items():
            counts += np.bincount(keys[keys >> 16 == bin] & 0xFFFF, minlength=1 << 16)
    low, high = (
        _value(bin << 16 | int(np.searchsorted(np.cumsum(lower[bin]), rank - before, "right")))
        for rank, bin in zip(ranks, bins, strict=True)
        for before in [ends[bin] - upper[bin]]
    )
    return low + (high - low) * (position - ranks[0])


def _keys(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the entries as uint32 that order as they do."""
    table = values.reshape(len(values), -1)
    for rows in spans(len(table), 2 * table.shape[1]):
        bits = np.ascontiguousarray(table[rows]).view(np.uint32).ravel()
        yield np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))


def _value(key: int) -> float:
    bits = key ^ (1 << 31) if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))
