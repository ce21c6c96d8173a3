"""MATLAB files and SVHN: read as scipy reads them, refused in words where they are damaged."""

import os
import random
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from backmix.pipeline.sources.matfile import read_mat
from backmix.pipeline.sources.open import open_source

NUMBERS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")


def saved(content: dict[str, Any], *, compressed: bool = True) -> bytes:
    stream = BytesIO()
    savemat(stream, content, do_compression=compressed)
    return stream.getvalue()


def read(data: bytes, *names: str) -> dict[str, Any]:
    return read_mat(BytesIO(data), "a.mat", set(names))


def synsets() -> np.ndarray:
    rows = [(1, "n02", 0, "a dog"), (2, "n01", 0, ""), (3, "n00", 2, "both")]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O"), ("words", "O")]
    array = np.empty((len(rows), 1), kinds)
    for i, row in enumerate(rows):
        array[i, 0] = row
    return array


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_are_read_as_scipy_reads_them(compressed: bool, kind: str) -> None:
    array = np.arange(2 * 3 * 5).astype(kind).reshape(2, 3, 5)
    data = saved({"other": "text", "X": array, "y": array[0]}, compressed=compressed)
    found = read(data, "X", "y", "absent")
    assert set(found) == {"X", "y"}
    stock = loadmat(BytesIO(data))
    for name in found:
        assert found[name].dtype == stock[name].dtype == np.dtype(kind)
        np.testing.assert_array_equal(found[name], stock[name])


@pytest.mark.parametrize("compressed", [True, False])
def test_structures_texts_and_cells_are_read(compressed: bool) -> None:
    cells = np.empty((1, 2), object)
    cells[0, 0], cells[0, 1] = "é", np.array([[1.5]])
    data = saved({"synsets": synsets(), "cells": cells}, compressed=compressed)
    found = read(data, "synsets", "cells")
    rows = found["synsets"]
    assert [row["WNID"] for row in rows] == ["n02", "n01", "n00"]
    assert [row["ILSVRC2012_ID"].item() for row in rows] == [1, 2, 3]
    assert [row["words"] for row in rows] == ["a dog", "", "both"]
    assert found["cells"][0] == "é"
    assert found["cells"][1].item() == 1.5


def test_big_endian_files_are_read() -> None:
    def element(kind: int, body: bytes) -> bytes:
        return struct.pack(">II", kind, len(body)) + body + -len(body) % 8 * b"\0"

    body = element(6, struct.pack(">II", 11, 0)) + element(5, struct.pack(">ii", 1, 3))
    body += element(1, b"y") + element(4, struct.pack(">HHH", 1, 2, 300))
    data = 124 * b" " + b"\1\0MI" + element(14, body)
    np.testing.assert_array_equal(read(data, "y")["y"], [[1, 2, 300]])


def test_a_file_of_version_7_3_is_refused_in_words() -> None:
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM"
    with pytest.raises(ValueError, match=r"MATLAB 7\.3 file \(HDF5\).*-v7"):
        read(head + 400 * b"\0", "X")
    with pytest.raises(ValueError, match="no MATLAB 5 file"):
        read(b"", "X")


@pytest.mark.parametrize("compressed", [True, False])
def test_every_cut_of_a_file_is_an_error_or_a_missing_variable(compressed: bool) -> None:
    data = saved({"X": np.arange(300, dtype="u2"), "s": synsets()}, compressed=compressed)
    for length in range(0, len(data), 7):
        try:
            found = read(data[:length], "X", "s")
        except ValueError:
            continue
        assert set(found) < {"X", "s"}, "the file ends between two variables"


@pytest.mark.parametrize("compressed", [True, False])
def test_mutants_are_errors_in_words_and_never_anything_else(compressed: bool) -> None:
    data = saved({"s": synsets(), "X": np.arange(60, dtype="u1")}, compressed=compressed)
    chance = random.Random(0)
    refused = 0
    for _ in range(3000):
        mutant = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            mutant[at] = chance.choice((0, 1, 14, 15, 127, 128, 255, mutant[at] ^ 1))
        try:
            read(bytes(mutant), "s", "X")
        except ValueError as error:
            assert "a.mat" in str(error)
            refused += 1
    assert refused > 1000


def variable(announced: int, body: bytes) -> bytes:
    packed = zlib.compress(struct.pack("<II", 14, announced) + body)
    head = b"MATLAB 5.0".ljust(124) + b"\0\1IM"
    return head + struct.pack("<II", 15, len(packed)) + packed


def test_announced_sizes_are_believed_only_as_far_as_the_bytes_go() -> None:
    with pytest.raises(ValueError, match="at byte 128 cannot hold the 4294967295 bytes"):
        read(variable(2**32 - 1, b""), "X")
    with pytest.raises(ValueError, match="100 bytes instead of 104"):
        read(variable(104, 100 * b"\0"), "X")
    with pytest.raises(ValueError, match="goes on, or ends early"):
        read(variable(96, 100 * b"\0"), "X")
    good = saved({"X": np.arange(300, dtype="u2")})
    broken_sum = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(ValueError, match=r"a\.mat, the variable at byte 128 is damaged"):
        read(broken_sum, "X")


def test_nesting_without_end_is_refused() -> None:
    body = b""
    for _ in range(50):
        head = struct.pack("<IIII", 6, 8, 1, 0) + struct.pack("<IIii", 5, 8, 1, 1)
        inner = head + struct.pack("<II", 1, 0) + body
        body = struct.pack("<II", 14, len(inner)) + inner
    with pytest.raises(ValueError, match="too many arrays in each other"):
        read(b"MATLAB 5.0".ljust(124) + b"\0\1IM" + body, "")


# --- SVHN ----------------------------------------------------------------------------------------


def svhn(root: Path, part: str = "train", count: int = 12) -> np.ndarray:
    """Write a part of SVHN and return its pictures, uint8 [n, 32, 32, 3]."""
    root.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    digits = np.array([[k % 10 + 1] for k in range(count)], np.uint8)
    content = {"X": pixels.transpose(1, 2, 3, 0), "y": digits}
    (root / f"{part}_32x32.mat").write_bytes(saved(content))
    return pixels


def test_svhn_gives_pictures_in_order_and_ten_means_the_digit_0(tmp_path: Path) -> None:
    pixels = svhn(tmp_path)
    source = open_source(f"svhn:{tmp_path}")
    assert source.classes == list("0123456789")
    assert [item.label for item in source.items] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert source.items[7].name == "train/000007"
    for item, picture in zip(source.items, pixels, strict=True):
        np.testing.assert_array_equal(item.pixels, picture)
    for part in ("test", "extra"):
        svhn(tmp_path, part, count=1)
        (item,) = open_source(f"svhn:{tmp_path}//{part}").items
        assert (item.name, item.label) == (f"{part}/000000", 1)


def test_a_class_list_renumbers_the_digits(tmp_path: Path) -> None:
    svhn(tmp_path, count=3)
    source = open_source(f"svhn:{tmp_path}", ["3", "2", "1", "none"])
    assert [item.label for item in source.items] == [2, 1, 0]
    with pytest.raises(ValueError, match="does not name: '3'"):
        open_source(f"svhn:{tmp_path}", ["1", "2"])


def test_what_is_no_svhn_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_32x32\.mat is missing"):
        open_source(f"svhn:{tmp_path}")
    with pytest.raises(ValueError, match="no part 'val'"):
        open_source(f"svhn:{tmp_path}//val")
    good = np.zeros((32, 32, 3, 2), np.uint8)
    for content, message in [
        ({"y": [1, 2]}, "X must be uint8 .* it is no numbers"),
        ({"X": good.astype("f4"), "y": [1, 2]}, r"it is float32 \[32, 32, 3, 2\]"),
        ({"X": good[:, :, :1], "y": [1, 2]}, r"it is uint8 \[32, 32, 1, 2\]"),
        ({"X": good, "y": [1, 2, 3]}, "2 pictures in X and 3 labels in y"),
        ({"X": good}, "2 pictures in X and no labels in y"),
        ({"X": good, "y": [1, 11]}, "label 2 in y is 11; expected 1 to 10"),
        ({"X": good, "y": [1.5, 1]}, r"label 1 in y is 1\.5"),
    ]:
        (tmp_path / "train_32x32.mat").write_bytes(saved(content))
        with pytest.raises(ValueError, match=message):
            open_source(f"svhn:{tmp_path}")


@pytest.mark.real
def test_real_svhn_is_read_as_scipy_reads_it() -> None:
    root = os.environ["BACKMIX_DATA"]
    source = open_source(f"svhn:{root}/svhn")
    stock = loadmat(f"{root}/svhn/train_32x32.mat")
    assert len(source.items) == 200
    assert [item.label for item in source.items] == [int(y) % 10 for y in stock["y"][:, 0]]
    for i in range(0, 200, 7):
        np.testing.assert_array_equal(source.items[i].pixels, stock["X"][..., i])
