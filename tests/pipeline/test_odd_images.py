"""What becomes of odd and damaged images: the tables of docs/data.md, row by row.

The table stands on the page for people; here every row meets an image that answers its description
and has to become what the row says, from conversion to the loaders.
"""

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backmix.pipeline import images
from backmix.pipeline.batch import Place
from backmix.pipeline.beton import open_set
from backmix.pipeline.convert import convert
from backmix.pipeline.decode import read_image
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import ConvertOptions, LoaderOptions
from tests.images import encoded, jpeg, photograph, png, turned, with_stray_bytes, write_files

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
HEADING = "| image | becomes | the manifest says |"
LOADERS = ["turbo", *(["dali"] if find_spec("nvidia") and find_spec("nvidia.dali") else [])]


def wide_tables(stream: bytes) -> bytes:
    """Return a baseline JPEG as an extended one whose quantisation tables have 16 bits."""
    at = stream.index(b"\xff\xdb")
    out = stream[:at]
    while stream[at : at + 2] == b"\xff\xdb":
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        body, at = stream[at + 4 : at + 2 + length], at + 2 + length
        assert len(body) == 65
        wide = bytes([body[0] | 0x10]) + b"".join(bytes([0, value]) for value in body[1:])
        out += b"\xff\xdb" + (2 + len(wide)).to_bytes(2, "big") + wide
    return (out + stream[at:]).replace(b"\xff\xc0", b"\xff\xc1", 1)


def twelve_bits() -> bytes:
    stream = bytearray(jpeg())
    stream[stream.index(b"\xff\xc0") + 4] = 12
    return bytes(stream)


def ycck() -> bytes:
    stream = bytearray(jpeg(mode="CMYK"))
    stream[stream.index(b"Adobe") + 11] = 2
    return bytes(stream)


def picture(k: int = 0) -> Image.Image:
    return Image.fromarray(photograph(k))


def several(form: str, mode: str = "RGB", **save: object) -> bytes:
    frames = [picture(k).convert(mode) for k in range(2)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], **save)


def deep(mode: str, form: str) -> bytes:
    values = photograph(1)[..., 0].astype({"I;16": np.uint16, "F": np.float32}[mode]) * 256
    return encoded(Image.fromarray(values), form)


def exif(tail: bytes) -> bytes:
    """Return a JPEG whose EXIF block ends in the midst of its first directory."""
    block = b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + tail
    head = jpeg()
    return head[:2] + b"\xff\xe1" + (2 + len(block)).to_bytes(2, "big") + block + head[2:]


MADE: dict[str, list[tuple[str, Callable[[], bytes]]]] = {
    "gray": [("x.jpg", lambda: jpeg(mode="L"))],
    "progressive": [("x.jpg", lambda: jpeg(progressive=True))],
    "quantisation tables of 16 bits": [("x.jpg", lambda: wide_tables(jpeg()))],
    "1 x 1, 7 x 7, 17 x 17 pixels": [
        (f"{n}.jpg", lambda n=n: jpeg(photograph(n, n, n))) for n in (1, 7, 17)
    ],
    "a broken EXIF block, or one of an orientation that is none": [
        ("x.jpg", lambda: exif(b"\x01\x12")),
        ("y.jpg", lambda: turned(0)),
    ],
    "several pictures in one file (MPO), a camera's table behind the end": [
        ("x.mpo", lambda: several("MPO")),
        ("y.jpg", lambda: jpeg() + b"camera"),
    ],
    "EXIF orientation 2 to 8": [(f"{k}.jpg", lambda k=k: turned(k)) for k in range(2, 9)],
    "CMYK": [("x.jpg", lambda: jpeg(mode="CMYK"))],
    "YCCK": [("x.jpg", ycck)],
    "arithmetic coding": [],  # no encoder at hand: real images only
    "stray bytes between header segments": [
        ("x.jpg", lambda: jpeg().replace(b"\xff\xdb", b"\x00\x01\x02\x03\xff\xdb", 1))
    ],
    "stray bytes in the image data": [("x.jpg", lambda: with_stray_bytes(jpeg()))],
    "PNG, WebP, PPM and others, 8 bits": [
        ("x.png", lambda: png(photograph())),
        ("x.webp", lambda: encoded(picture(), "WEBP")),
        ("x.ppm", lambda: encoded(picture(), "PPM")),
        ("x.bmp", lambda: encoded(picture(), "BMP")),
        ("x.tif", lambda: encoded(picture(), "TIFF")),
    ],
    "a PNG named .JPEG": [("x.JPEG", lambda: png(photograph()))],
    "16 bits per value (PNG, TIFF)": [
        ("x.png", lambda: deep("I;16", "PNG")),
        ("x.tif", lambda: deep("I;16", "TIFF")),
    ],
    "an alpha channel": [("x.png", lambda: encoded(picture().convert("RGBA"), "PNG"))],
    "a palette (GIF, PNG)": [
        ("x.gif", lambda: encoded(picture().convert("P"), "GIF")),
        ("x.png", lambda: encoded(picture().convert("P"), "PNG")),
    ],
    "1 bit per pixel": [("x.png", lambda: encoded(picture().convert("1"), "PNG"))],
    "an animation (GIF, PNG, WebP)": [
        ("x.png", lambda: several("PNG")),
        ("x.webp", lambda: several("WEBP")),
    ],
    "empty": [("x.jpg", lambda: b"")],
    "no image": [("x.png", lambda: b"<html>404</html>")],
    "a JPEG cut short": [("x.jpg", lambda: jpeg()[:-40])],
    "a JPEG cut short, with an end marker": [
        ("x.jpg", lambda: jpeg(photograph(0, 99, 99))[:-400] + b"\xff\xd9")
    ],
    "a JPEG without a frame": [("x.jpg", lambda: b"\xff\xd8\xff\xd9")],
    "a JPEG cut in its header": [("x.jpg", lambda: jpeg()[:30])],
    "a JPEG of 12 bits": [("x.jpg", twelve_bits)],
    "another format cut short": [("x.png", lambda: png(photograph())[:-200])],
    "floating-point pixels": [("x.tif", lambda: deep("F", "TIFF"))],
}
"""Images by the description of their row. Each is made when it is wanted."""

REAL = {
    "16bit.cropped.tif": "16 bits per value (PNG, TIFF)",
    "blend_op_over.png": "an animation (GIF, PNG, WebP)",
    "broken_exif_dpi.jpg": "a broken EXIF block, or one of an orientation that is none",
    "frame_size.mpo": "several pictures in one file (MPO), a camera's table behind the end",
    "hopper.gif": "a palette (GIF, PNG)",
    "hopper.ppm": "PNG, WebP, PPM and others, 8 bits",
    "hopper.webp": "PNG, WebP, PPM and others, 8 bits",
    "hopper_16bit_qtables.jpg": "quantisation tables of 16 bits",
    "hopper_gray.jpg": "gray",
    **{f"hopper_orientation_{k}.jpg": "EXIF orientation 2 to 8" for k in range(2, 9)},
    "junk_jpeg_header.jpg": "stray bytes between header segments",
    "mode_16bit.png": "an animation (GIF, PNG, WebP)",
    "pil_sample_cmyk.jpg": "YCCK",
    "png_named.JPEG": "a PNG named .JPEG",
    "transparent.png": "an alpha channel",
    "truncated_jpeg.jpg": "a JPEG cut short",
    "empty.jpg": "empty",
    "jpg-cmyk-1.jpg": "CMYK",
    "jpg-gray.jpg": "gray",
    "jpg-progressive.jpg": "progressive",
    "jpg-size-17x17.jpg": "1 x 1, 7 x 7, 17 x 17 pixels",
    "jpg-size-1x1.jpg": "1 x 1, 7 x 7, 17 x 17 pixels",
    "jpg-size-7x7.jpg": "1 x 1, 7 x 7, 17 x 17 pixels",
    "missing-sof.jpg": "a JPEG cut in its header",
    "monkey12.jpg": "a JPEG of 12 bits",
    "testimgari.jpg": "arithmetic coding",
    "testimgint.jpg": None,  # ordinary JPEGs
    "testorig.jpg": None,
}
"""Files of the real set of odd images by their row."""


def table() -> dict[str, tuple[str, str]]:
    """Return the rows of the page: what an image becomes, and what the manifest says."""
    lines = PAGE.read_text().split(HEADING)[1].splitlines()[2:]
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        image, becomes, says = (cell.strip() for cell in line.strip("|").split("|"))
        rows[image] = becomes, says.strip("`")
    return rows


def check(folder: Path, row_of: dict[str, str | None]) -> None:
    """Convert a folder and assert that every image became what its row says, then load them.

    Args:
        folder: class folders.
        row_of: the row of each image, by its name below the folder; None = copied.
    """
    out = folder.parent / "odd.beton"
    convert(f"folder:{folder}", out, ConvertOptions(workers=1, on_error="skip"))
    *lines, _ = [json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == set(row_of)
    rows = table()
    with open_set(out) as data:
        for line in lines:
            row = row_of[line["name"]]
            becomes, says = rows[row] if row else ("copied", "copied")
            left_out = line["sample"] is None
            assert left_out == (becomes == "left out"), f"{row}: {line}"
            if left_out:
                found = line["skipped"]
            else:
                found = ", ".join(line["done"])
                assert line["done"][0] == {"copied": "copied", "pixels": "pixels"}[becomes]
                stored, warned = read_image(data, line["sample"])
                source = (folder / line["name"]).read_bytes()
                np.testing.assert_array_equal(stored, images.decode(source).pixels)
                assert not warned
            for part in says.split(" ... "):
                assert part in found, f"{line['name']}, {row}: {found!r} does not say {part!r}"
    for loader in LOADERS:
        options = LoaderOptions(loader=loader, batch=8, size=16, threads=1)  # pyright: ignore[reportArgumentType]
        with open_loader(out, options, split="eval") as opened:
            status = [s for batch in opened.batches(Place(0)) for s in batch.status.tolist()]
        assert status == [0] * sum(line["sample"] is not None for line in lines)


def test_the_page_and_the_images_have_the_same_rows() -> None:
    assert list(table()) == list(MADE)
    assert {row for row in REAL.values() if row} <= set(MADE)


def test_odd_images_become_what_the_page_says(tmp_path: Path) -> None:
    row_of: dict[str, str | None] = {}
    for k, (row, made) in enumerate(MADE.items()):
        for name, make in made:
            write_files(tmp_path / "set", {f"{k:02}/{name}": make()})
            row_of[f"{k:02}/{name}"] = row
    check(tmp_path / "set", row_of)


@pytest.mark.real
def test_real_odd_images_become_what_the_page_says(tmp_path: Path) -> None:
    root = Path(os.environ["BACKMIX_DATA"]) / "odd-images"
    row_of = {}
    for path in sorted(root.glob("*/*")):
        name = f"{path.parent.name}/{path.name}"
        (tmp_path / "set" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "set" / name)
        row_of[name] = REAL[path.name]
    assert len(row_of) == len(REAL) == 34
    check(tmp_path / "set", row_of)
