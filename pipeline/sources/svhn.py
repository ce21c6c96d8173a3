"""SVHN, cropped digits: `train_32x32.mat`, `test_32x32.mat`, `extra_32x32.mat`."""

import os

import numpy as np

from backmix.pipeline.sources.classes import by_name
from backmix.pipeline.sources.matfile import read_mat
from backmix.pipeline.sources.source import Item, Items, Source, split_part

_SHAPE = (32, 32, 3)  # rows, columns, colours; the pictures count along a fourth axis


def open_svhn(spec: str, rest: str, classes: list[str] | None) -> Source:
    """List `svhn:DIR` or a part of it; the pixels are held in memory (3 KiB a picture)."""
    folder, part = split_part(rest, ("train", "test", "extra"))
    path = f"{folder}/{part}_32x32.mat"
    if not os.path.isfile(path):
        raise ValueError(
            f"{path} is missing; svhn:DIR needs the cropped digits (Format 2), and svhn:DIR//test "
            "or svhn:DIR//extra name the other parts"
        )
    with open(path, "rb") as file:
        found = read_mat(file, path, {"X", "y"})
    planes = _pictures(found.get("X"), path)
    digits = _digits(found.get("y"), len(planes), path)
    names = [str(digit) for digit in range(10)]
    labels, known, notes = by_name(digits, names, classes, path)

    def make(i: int) -> Item:
        pixels = np.ascontiguousarray(planes[i].transpose(2, 1, 0))
        return Item(f"{part}/{i:06d}", int(labels[i]), pixels=pixels)

    return Source(spec, known, Items(len(planes), make), notes, in_memory=True, files=[path])


def _pictures(x: object, path: str) -> np.ndarray:
    """Return uint8 [n, 3, 32, 32]: colour, column, row, as MATLAB stores them."""
    # MATLAB drops a last axis of length 1.
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.shape[:3] != _SHAPE or x.ndim > 4:
        what = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else "no numbers"
        raise ValueError(f"{path}: X must be uint8 [32, 32, 3, n], it is {what}")
    if x.size == 0:
        raise ValueError(f"{path} holds no pictures")
    return x.reshape(-1, order="F").reshape(-1, *reversed(_SHAPE))


def _digits(y: object, count: int, path: str) -> np.ndarray:
    """Return the digits, int64 [n]: the file writes the digit 0 as 10."""
    if not isinstance(y, np.ndarray) or y.size != count:
        what = f"{y.size} labels" if isinstance(y, np.ndarray) else "no labels"
        raise ValueError(f"{path}: {count} pictures in X and {what} in y")
    flat = y.reshape(-1, order="F")
    wrong = ~np.isin(flat, np.arange(11))
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(f"{path}: label {i + 1} in y is {flat[i]}; expected 1 to 10")
    return flat.astype(np.int64) % 10
