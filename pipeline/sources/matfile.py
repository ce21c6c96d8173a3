"""MATLAB 5 files: the numbers, texts, cells and structures that data sets are published in.

A reader of our own, since it is handed files from anywhere: every size is checked against what is
there before it is used, nesting and numbers of arrays have limits, and errors name the byte.
Format: "MAT-File Level 5 File Format", The MathWorks. Objects, functions, sparse and complex
arrays are refused.
"""

import math
import zlib
from io import SEEK_END
from typing import Any, BinaryIO, Literal

import numpy as np

_Order = Literal["little", "big"]
_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_MOST_PER_BYTE = 1032  # what deflate can make of a byte at most
_CHUNK = 1 << 20
_MAX_DEPTH = 8  # cells and structures inside each other
_MAX_ARRAYS = 1_000_000
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8"}
_NUMBERS[13] = "u8"
_TEXTS = {1: "latin-1", 2: "utf-8", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4"}
_CLASSES |= {14: "i8", 15: "u8"}
_CELL, _STRUCT, _CHAR = 1, 2, 4
_COMPLEX = 0x0800


def read_mat(file: BinaryIO, where: str, wanted: set[str]) -> dict[str, Any]:
    """Read the variables of these names; others are passed over.

    Args:
        file: at any place; it can be sought.
        where: its name, for messages.
        wanted: names of variables. Those that are not there are not in the result.

    Returns:
        By name: an array of numbers with MATLAB's shape, a str, a list (cells), or a list of dicts
        (a structure array).

    Raises:
        ValueError: no MATLAB 5 file, damaged, or a wanted variable of another kind.
    """
    length = file.seek(0, SEEK_END)
    file.seek(0)
    head = file.read(_HEADER)
    order = _byte_order(head, where)
    found: dict[str, Any] = {}
    at = _HEADER
    while at < length and len(found) < len(wanted):
        tag = _read(file, at, 8, length, where)
        kind = int.from_bytes(tag[:4], order)
        size = int.from_bytes(tag[4:], order)
        body = at + 8
        if size > length - body:
            raise ValueError(
                f"{where} is truncated: the element at byte {at} needs {size} bytes, "
                f"{length - body} are there; copy it again"
            )
        if kind == _COMPRESSED:
            content = _inflate(file, body, size, order, f"{where}, the variable at byte {at}")
            inside = f"{where}, decompressed from byte {at}"
        elif kind == _MATRIX:
            content = _read(file, body, size, length, where)
            inside = f"{where}, after byte {body}"
        else:
            raise ValueError(f"{where}: element of type {kind} at byte {at}; it is damaged")
        reader = _Reader(order, inside)
        name, value = reader.matrix(memoryview(content), 0, wanted)
        if name in wanted:
            found[name] = value
        at = body + (size if kind == _COMPRESSED else -(-size // 8) * 8)
    return found


def _byte_order(head: bytes, where: str) -> _Order:
    if head.startswith((b"MATLAB 7.3", b"\x89HDF")):
        raise ValueError(
            f"{where} is a MATLAB 7.3 file (HDF5), which is not read here; save it again in MATLAB "
            "with -v7, or with scipy.io.savemat"
        )
    if head[124:128] == b"\0\1IM":
        return "little"
    if head[124:128] == b"\1\0MI":
        return "big"
    raise ValueError(f"{where} is no MATLAB 5 file")


def _read(file: BinaryIO, at: int, size: int, length: int, where: str) -> bytearray:
    if size > length - at:
        raise ValueError(f"{where} is truncated at byte {length}; copy it again")
    content = bytearray(size)
    file.seek(at)
    view = memoryview(content)
    while view:
        count = file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise OSError(f"{where} became shorter while it was read")
        view = view[count:]
    return content


def _inflate(file: BinaryIO, at: int, size: int, order: _Order, where: str) -> bytearray:
    """Decompress one matrix without its tag; never more bytes than the tag announces."""
    file.seek(at)
    unpacker = zlib.decompressobj()
    left = size
    waiting = b""

    def more(most: int) -> bytes:
        """Return up to `most` decompressed bytes; none at the end."""
        nonlocal left, waiting
        while True:
            if not waiting and left:
                waiting = file.read(min(left, _CHUNK))
                left -= len(waiting)
                if not waiting:
                    raise OSError(f"{where}: the file became shorter while it was read")
            had = waiting
            try:
                piece = unpacker.decompress(had, most)
            except zlib.error as error:
                raise ValueError(f"{where} is damaged: {error}; copy the file again") from error
            waiting = unpacker.unconsumed_tail
            if piece or unpacker.eof or (not had and not left):
                return piece

    tag = b""
    while len(tag) < 8 and (piece := more(8 - len(tag))):
        tag += piece
    kind, announced = int.from_bytes(tag[:4], order), int.from_bytes(tag[4:], order)
    if len(tag) < 8 or kind != _MATRIX:
        raise ValueError(f"{where} holds no matrix; it is damaged")
    if announced > _MOST_PER_BYTE * size:
        raise ValueError(f"{where} cannot hold the {announced} bytes that it announces")
    content = bytearray(announced)
    filled = 0
    while filled < announced:
        piece = more(min(announced - filled, 16 * _CHUNK))
        if not piece:
            raise ValueError(
                f"{where} is damaged: {filled} bytes instead of {announced}; copy the file again"
            )
        content[filled : filled + len(piece)] = piece
        filled += len(piece)
    if more(1) or not unpacker.eof:  # the end, where the checksum is compared
        raise ValueError(f"{where} is damaged: it goes on, or ends early; copy the file again")
    return content


class _Reader:
    """Reads one variable; offsets in messages count from its first byte."""

    def __init__(self, order: _Order, where: str) -> None:
        self._order: _Order = order
        self._where = where
        self._arrays = 0

    def matrix(
        self, data: memoryview, base: int, wanted: set[str] | None, depth: int = 0
    ) -> tuple[str, Any]:
        """Return name and value of a matrix; None for one that is not among the wanted."""
        self._arrays += 1
        if self._arrays > _MAX_ARRAYS or depth > _MAX_DEPTH:
            raise self._damaged(base, "too many arrays in each other")
        if not data:  # an empty place in a cell
            return "", np.empty((0, 0))
        kind, flags, at = self._element(data, 0, base)
        if kind != 6 or len(flags) != 8:
            raise self._damaged(base, "a matrix without flags")
        bits = int.from_bytes(flags[:4], self._order)
        kind, raw, at = self._element(data, at, base)
        if kind != 5 or not 8 <= len(raw) <= 32 or len(raw) % 4:
            raise self._damaged(base, "a matrix without dimensions")
        shape = tuple(np.frombuffer(raw, self._type("i4")).tolist())
        if min(shape) < 0:
            raise self._damaged(base, f"a matrix of {shape}")
        kind, raw, at = self._element(data, at, base)
        if kind not in _TEXTS or len(raw) > 255:
            raise self._damaged(base, "a matrix without a name")
        name = bytes(raw).decode("latin-1")
        if wanted is not None and name not in wanted:
            return name, None
        if bits & _COMPLEX:
            raise ValueError(f"{self._where}: the variable {name!r} holds complex numbers")
        return name, self._value(bits & 0xFF, shape, data, at, base, depth, name)

    def _value(
        self,
        kind: int,
        shape: tuple[int, ...],
        data: memoryview,
        at: int,
        base: int,
        depth: int,
        name: str,
    ) -> Any:
        count = math.prod(shape)
        if kind in _CLASSES:
            stored, raw, _ = self._element(data, at, base)
            if stored not in _NUMBERS:
                raise self._damaged(base + at, f"numbers of type {stored}")
            numbers = self._numbers(raw, _NUMBERS[stored], base + at)
            if len(numbers) != count:
                raise self._damaged(base + at, f"{len(numbers)} numbers for {list(shape)}")
            return numbers.astype(_CLASSES[kind], copy=False).reshape(shape, order="F")
        if kind == _CHAR:
            stored, raw, _ = self._element(data, at, base)
            if stored not in _TEXTS:
                raise self._damaged(base + at, f"text of type {stored}")
            encoding = _TEXTS[stored]
            if encoding in ("utf-16", "utf-32"):
                encoding += "-le" if self._order == "little" else "-be"
            return bytes(raw).decode(encoding, "replace")
        if kind == _CELL:
            self._within_limits(count, base)
            cells = []
            for _ in range(count):
                _, value, at = self._inner(data, at, base, depth)
                cells.append(value)
            return cells
        if kind == _STRUCT:
            fields, at = self._fields(data, at, base)
            self._within_limits(count * max(1, len(fields)), base)
            rows = []
            for _ in range(count):
                row: dict[str, Any] = {}
                for field in fields:
                    _, row[field], at = self._inner(data, at, base, depth)
                rows.append(row)
            return rows
        raise ValueError(
            f"{self._where}: the variable {name!r} is of class {kind}; read are numbers, text, "
            "cells and structures"
        )

    def _within_limits(self, count: int, base: int) -> None:
        if count > _MAX_ARRAYS:
            raise self._damaged(base, f"{count} arrays in one")

    def _inner(self, data: memoryview, at: int, base: int, depth: int) -> tuple[str, Any, int]:
        kind, body, following = self._element(data, at, base)
        if kind != _MATRIX:
            raise self._damaged(base + at, f"element of type {kind} instead of an array")
        name, value = self.matrix(body, base + at + 8, None, depth + 1)
        return name, value, following

    def _fields(self, data: memoryview, at: int, base: int) -> tuple[list[str], int]:
        _, raw, at = self._element(data, at, base)
        width = int.from_bytes(raw, self._order) if len(raw) == 4 else 0
        _, text, following = self._element(data, at, base)
        if not 1 <= width <= 64 or len(text) % width:
            raise self._damaged(base + at, "unreadable field names")
        cut = [bytes(text[k : k + width]) for k in range(0, len(text), width)]
        names = [name.split(b"\0")[0].decode("latin-1") for name in cut]
        if len(set(names)) < len(names):
            raise self._damaged(base + at, "a field name twice")
        return names, following

    def _element(self, data: memoryview, at: int, base: int) -> tuple[int, memoryview, int]:
        """Return (type, content, offset of what follows) of the element at `at`."""
        if at + 8 > len(data):
            raise self._damaged(base + at, "it ends too early")
        word = int.from_bytes(data[at : at + 4], self._order)
        if word >> 16:  # up to four bytes, in the tag itself
            if word >> 16 > 4:
                raise self._damaged(base + at, "a short element of more than 4 bytes")
            return word & 0xFFFF, data[at + 4 : at + 4 + (word >> 16)], at + 8
        size = int.from_bytes(data[at + 4 : at + 8], self._order)
        body = at + 8
        if size > len(data) - body:
            raise self._damaged(
                base + at, f"an element needs {size} bytes, {len(data) - body} are there"
            )
        return word, data[body : body + size], body + -(-size // 8) * 8

    def _numbers(self, raw: memoryview, kind: str, at: int) -> np.ndarray:
        if len(raw) % np.dtype(kind).itemsize:
            raise self._damaged(at, f"{len(raw)} bytes of numbers of type {kind}")
        return np.frombuffer(raw, self._type(kind))

    def _type(self, kind: str) -> np.dtype:
        return np.dtype(kind).newbyteorder("<" if self._order == "little" else ">")

    def _damaged(self, at: int, what: str) -> ValueError:
        return ValueError(f"{self._where}: {what} at byte {at} of it; the file is damaged")
