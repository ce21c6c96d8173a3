"""`inspect`: what it says of a file, and that it finds every damage and nothing else."""

import struct
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from backmix.pipeline.beton import JPG, RAW, Flag
from backmix.pipeline.inspect import describe, verify
from backmix.pipeline.writer import Record, Writer

PAGE = 1 << 21


def picture(h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def mixed(path: Path, classes: list[str] | None = None, count: int = 10) -> Path:
    """Samples 0, 2, 4, ... are raw, 1, 3, 5, ... JPEGs with 4:4:4 chroma; three classes in turn."""
    names = classes or ["cat", "dog", "eel", "fly"]
    options = {"mode": "auto", "quality": None}
    with Writer(path, samples=count, page_size=PAGE, classes=names, options=options) as writer:
        for k in range(count):
            h, w = 8 + k, 20
            data, flags = picture(h, w, k), 0
            if k % 2:
                data = simplejpeg.encode_jpeg(data, colorsubsampling="444")
                flags = Flag.PASSTHROUGH | Flag.HARDWARE
            mode = JPG if k % 2 else RAW
            writer.append(Record(data, mode, h, w, k % 3, flags, f"{names[k % 3]}/{k}.png"))
    return path


def stripped(path: Path) -> Path:
    """Make a stock file of ours: without a locator nobody finds the checksums."""
    content = bytearray(path.read_bytes())
    content[41:81] = bytes(40)
    path.write_bytes(content)
    return path


def change(path: Path, place: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)


def pointer(path: Path, sample: int) -> int:
    return struct.unpack_from("<Q", path.read_bytes(), 2106 + 24 * sample + 5)[0]


def test_a_description_tells_what_is_in_the_file(tmp_path):
    text = describe([mixed(tmp_path / "x.beton")])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    raw = sum(3 * 20 * (8 + k) for k in range(0, 10, 2))
    assert raw == 3600
    assert lines[0].startswith(f"file {tmp_path / 'x.beton'}: 10 samples, 4.0 MiB")
    assert "pages 1 page of 2 MiB" in lines
    assert any(line.startswith("modes jpg 5 (") and "raw 5 (3.5 KiB)" in line for line in lines)
    assert "height 8 to 17 pixels (median 12)" in lines
    assert "width 20 pixels" in lines
    assert "flags copied byte for byte 5, hardware-decodable 5, chroma 444 5" in lines
    assert any(line.startswith("extension yes") for line in lines)
    assert "options mode=auto, quality=None" in lines
    assert "4 classes, each with 0 to 4 samples (median 3); 1 without any" in lines
    assert lines[-4:] == ["cat 4", "dog 3", "eel 3", "fly 0"]


def test_a_stock_file_is_said_to_have_no_checksums(tmp_path):
    text = describe([stripped(mixed(tmp_path / "x.beton"))])
    assert "no: no checksums" in text and "class_2" in text and "flags" not in text


def test_shards_are_described_together(tmp_path):
    text = describe([mixed(tmp_path / "0.beton"), mixed(tmp_path / "1.beton", count=5)])
    assert "0.beton: 10 samples" in text and "1.beton: 5 samples" in text
    assert "15 samples, 8.0 MiB" in text and "2 pages of 2 MiB" in text


def test_hundreds_of_classes_stay_readable(tmp_path):
    text = describe([mixed(tmp_path / "x.beton", classes=[f"n{k:08}" for k in range(365)])])
    lines = text.splitlines()
    assert len(lines) < 40
    assert lines[-1] == "  ... and 345 more classes with 0 samples"
    assert sum(line.startswith("  n0000") for line in lines) == 20


def test_a_list_of_one_row_too_many_is_shown_whole(tmp_path):
    text = describe([mixed(tmp_path / "x.beton", classes=[f"class {k}" for k in range(21)])])
    assert "class 20" in text and "more classes" not in text


def test_a_sound_file_verifies(tmp_path):
    calls: list[tuple[int, int]] = []
    path = mixed(tmp_path / "x.beton", count=200)
    assert verify([path], lambda *call: calls.append(call)) == []
    assert calls == [(64, 200), (128, 200), (192, 200), (200, 200)]


def test_each_damaged_sample_is_listed_in_order_by_name(tmp_path):
    paths = [mixed(tmp_path / "0.beton", count=70), mixed(tmp_path / "1.beton", count=100)]
    change(paths[0], pointer(paths[0], 3) + 200, b"\x55\xaa\x55\xaa")
    change(paths[1], pointer(paths[1], 96) + 7, b"\x55\xaa\x55\xaa")
    first, second = verify(paths)
    assert first == (
        f"{paths[0]}: sample 3 (cat/3.png) at byte {pointer(paths[0], 3)}: does not match its "
        "checksum"
    )
    assert second.startswith(f"{paths[1]}: sample 96 (cat/96.png) at byte")


def test_a_change_between_the_samples_is_found_by_the_pages_checksum(tmp_path):
    path = mixed(tmp_path / "x.beton")
    change(path, 2 * PAGE - 1, b"\1")
    assert verify([path]) == [
        f"{path}: page 1, {PAGE} bytes from byte {PAGE}: does not match its checksum, though its "
        "samples do"
    ]


def test_a_jpeg_that_does_not_decode_is_found_without_checksums(tmp_path):
    path = stripped(mixed(tmp_path / "x.beton"))
    change(path, pointer(path, 5), b"\0\0")
    (problem,) = verify([path])
    assert problem.startswith(f"{path}: sample 5 at byte {pointer(path, 5)}: does not decode (")


def test_a_jpeg_of_another_size_is_found(tmp_path):
    path = stripped(mixed(tmp_path / "x.beton"))
    change(path, 2106 + 24 * 5 + 1, struct.pack("<H", 21))  # the width in the metadata
    (problem,) = verify([path])
    assert problem.endswith("the JPEG has 13 x 20 pixels, not 13 x 21")


@pytest.mark.parametrize(("flags", "found"), [(0, 1), (int(Flag.WARNED), 0)])
def test_a_warning_that_was_there_at_conversion_is_no_problem(tmp_path, flags, found):
    image = simplejpeg.encode_jpeg(picture(16, 16))
    # A missing end is a warning to libjpeg-turbo; it fills up what it does not find.
    warned = image[:-40]
    with pytest.raises(ValueError, match="Premature end"):
        simplejpeg.decode_jpeg(warned, strict=True)
    path = tmp_path / "x.beton"
    with Writer(path, samples=1, page_size=PAGE, classes=["a"], options={}) as writer:
        writer.append(Record(warned, JPG, 16, 16, 0, flags, "w.jpg"))
    assert len(verify([path])) == found


def test_damaged_tables_end_both(tmp_path):
    path = mixed(tmp_path / "x.beton")
    change(path, 2106, b"\7")
    for command in (describe, verify):
        with pytest.raises(ValueError, match=r"x\.beton"):
            command([path])
