"""Small images for tests: pixels like photographs, JPEGs of many kinds, class folders, tars."""

import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def photograph(seed: int = 0, height: int = 24, width: int = 32) -> np.ndarray:
    """Return pixels uint8 [height, width, 3]: slopes, an edge and a little noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    slopes = random.uniform(-120, 120, (2, 3))
    pixels = 128 + y[..., None] * slopes[0] + x[..., None] * slopes[1]
    pixels[y + x > random.uniform(0.4, 0.9)] += random.uniform(-60, 60, 3)
    pixels += random.normal(0, 4, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray | None = None, *, mode: str = "RGB", **save: Any) -> bytes:
    """Return a JPEG stream.

    Args:
        pixels: uint8 [h, w, 3]; None = `photograph()`.
        mode: of the file: RGB, L, CMYK.
        save: Pillow's options: quality, subsampling, progressive, exif, icc_profile, ...
    """
    image = Image.fromarray(photograph() if pixels is None else pixels).convert(mode)
    return encoded(image, "JPEG", **save)


def turned(orientation: int, pixels: np.ndarray | None = None) -> bytes:
    """Return a JPEG that asks by EXIF to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(pixels, exif=exif)


def encoded(image: Image.Image, form: str, **save: Any) -> bytes:
    """Return an image file as bytes, in one of Pillow's formats."""
    stream = BytesIO()
    image.save(stream, form, **save)
    return stream.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """Return a PNG of uint8 [h, w, 3] or [h, w], or of uint16 [h, w]."""
    return encoded(Image.fromarray(pixels), "PNG")


def with_stray_bytes(stream: bytes) -> bytes:
    """Return a whole JPEG that decodes with a warning: bytes too many before its end."""
    assert stream.endswith(b"\xff\xd9")
    return stream[:-2] + 200 * b"\x12" + b"\xff\xd9"


def class_folders(
    root: Path, classes: Sequence[str] = ("cat", "dog"), each: int = 3, **shape: int
) -> dict[str, bytes]:
    """Write a folder of JPEGs per class and return their bytes by name (`cat/0.jpg`, ...)."""
    files: dict[str, bytes] = {}
    for k, name in enumerate(classes):
        for i in range(each):
            files[f"{name}/{i}.jpg"] = jpeg(photograph(100 * k + i, **shape))
    write_files(root, files)
    return files


def write_files(root: Path, files: dict[str, bytes]) -> None:
    """Write files by their names below a folder."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def tar(path: Path, files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    """Write a plain tar with these members, in this order."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    return path
