"""Small .beton files of made photographs for the tests of the loaders."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg

from backmix.pipeline.beton import JPG, RAW, Flag, open_beton
from backmix.pipeline.writer import Record, Writer

CLASSES = ["ant", "bee", "cat"]


def photo(height: int, width: int, seed: int) -> np.ndarray:
    """Return a smooth coloured picture with a little grain, uint8 [h, w, 3]."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(a * y + b * x + c) for a, b, c in generator.uniform(-2, 2, (3, 3)) * [1, 1, 3]]
    picture = 128 + 80 * np.stack(waves, axis=2) + generator.normal(0, 4, (height, width, 1))
    return picture.clip(0, 255).astype(np.uint8)


def record(seed: int, mode: int, size: tuple[int, int] | None = None) -> Record:
    """Return sample `seed`: its size, class and pixels follow from the number."""
    generator = np.random.default_rng([seed, 1])
    height, width = size or generator.integers(30, 90, 2).tolist()
    pixels = photo(height, width, seed)
    data = pixels if mode == RAW else simplejpeg.encode_jpeg(pixels, 92, "RGB", "420")
    label = int(generator.integers(0, 3))
    return Record(data, mode, height, width, label, 0, f"{CLASSES[label]}/{seed}.jpg")


def write_records(path: Path, records: Sequence[Record], check: str = "") -> Path:
    """Write a file; `check` as if the converter had decoded the images."""
    options = {"check": check} if check else {}
    with Writer(
        path, samples=len(records), page_size=1 << 21, classes=CLASSES, options=options
    ) as writer:
        for one in records:
            writer.append(one)
    return path


def write_photos(path: Path, count: int, first: int = 0, check: str = "") -> Path:
    """Write `count` samples, every third raw."""
    return write_records(
        path, [record(k, RAW if k % 3 == 0 else JPG) for k in range(first, first + count)], check
    )


def damage(path: Path, sample: int, at: int = 40, count: int = 4) -> None:
    """Overwrite some stored bytes of a sample, `at` bytes after its start."""
    with open_beton(path) as data:
        start = int(data.pointers[sample]) + at
    with open(path, "r+b") as file:
        file.seek(start)
        old = file.read(count)
        file.seek(start)
        file.write(bytes(byte ^ 0x5A for byte in old))


def warning_record(seed: int, flags: int = int(Flag.WARNED)) -> Record:
    """Return a whole JPEG that the decoder warns of: bytes between the scan and the end mark."""
    good = record(seed, JPG)
    data = good.data[:-2] + bytes(range(64)) + good.data[-2:]  # the decoder reads some bytes ahead
    return Record(data, JPG, good.height, good.width, good.label, flags, good.name)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
