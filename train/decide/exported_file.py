"""What an exported file holds beside its program, read without running anything of it.

One JSON document under the name `backmix`: in an .onnx file an entry of its metadata, in a .pt2
file, which is a ZIP archive, the member `extra/backmix`. It carries the record, the self-test, and
checksums of itself and of the program, which find what was changed or damaged; they prove nothing
against somebody who computes them anew.
"""

import io
import json
import mmap
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from backmix.train.decide.record import Preprocessing, Record, record_document, record_of

SCHEMA = 1
KEY = "backmix"
ONNX, PT2 = ".onnx", ".pt2"
_METADATA = 14
"""Number of the field `metadata_props` of ONNX's ModelProto; its entries have a key, 1, and a
value, 2."""
_LARGEST = 1 << 28
"""Bytes of the largest document that is read."""
Bytes = bytes | mmap.mmap
_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class Document:
    """What an exported file says of itself."""

    record: Record
    self_test: Mapping[str, Any]
    """`verify.self_test`: what the program says of images that a formula makes."""
    provenance: Mapping[str, str]
    """Versions and date of the export; what was trained and calibrated says the record."""
    program: str
    """`program_digest`."""


def recipe(seen: Preprocessing) -> dict[str, str]:
    """Return in words how an image becomes a view, for who has no backmix."""
    box = "the whole image"
    if seen.crop != "whole":
        box = (
            f"the square whose side is floor({seen.eval_crop} * the shorter side), at least 1, "
            "from row (h - side) // 2 and column (w - side) // 2 on"
        )
    return {
        "decode": "RGB, 8 bits per value, turned as the EXIF orientation says, alpha dropped",
        "box": box,
        "resize": (
            f"to {seen.size} x {seen.size}: torch.nn.functional.interpolate of uint8 with "
            'mode="bilinear", align_corners=False, antialias=True; a box of that size is copied'
        ),
        "layout": f"uint8 [n, {seen.size}, {seen.size}, 3], RGB; the program normalises",
    }


def document_text(document: Document) -> str:
    """Return a document as JSON, with the checksum of all other values as `digest`."""
    plain = {
        "schema": SCHEMA,
        "record": record_document(document.record),
        "views": recipe(document.record.preprocessing),
        "self_test": dict(document.self_test),
        "provenance": dict(document.provenance),
        "program": document.program,
    }
    return json.dumps(plain | {"digest": _digest(plain)}, allow_nan=False)


def read_exported(path: Path) -> Document:
    """Return what an exported file says of itself, checked.

    Raises:
        ValueError: it is no exported file, of another program or version, or was changed.
        OSError: it cannot be read.
    """
    if path.suffix not in (ONNX, PT2):
        raise ValueError(f"{path} is no exported file: their names end in {ONNX} or {PT2}")
    try:
        if path.suffix == ONNX:
            with _mapped(path) as data:
                text, digest = _onnx_text(data), _digest_of(_onnx_program(data))
        else:
            with zipfile.ZipFile(path) as archive:
                text, digest = _pt2_text(archive), _digest_of(_pt2_program(archive))
    # NotImplementedError: zipfile's, of a compression or a version of ZIP that it does not know.
    except (_NotThis, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or no {path.suffix} file: {error}") from error
    if text is None:
        raise ValueError(
            f"{path} was not written by backmix export: nothing in it says what it decides by"
        )
    document = _document_of(text, path)
    if document.program != digest:
        raise ValueError(
            f"{path} was changed or damaged after it was written: its program is not the one that "
            "its checksum is of; export again"
        )
    return document


def _document_of(text: bytes, path: Path) -> Document:
    try:
        document = json.loads(text)
        schema = document["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no document of backmix export: {error!r}") from error
    if schema != SCHEMA:
        raise ValueError(
            f"{path} is of schema {schema!r}, this version of backmix reads {SCHEMA}: export "
            "again, or use the version that wrote it"
        )
    rest = {name: value for name, value in document.items() if name != "digest"}
    if document.get("digest") != _digest(rest):
        raise ValueError(
            f"{path} was changed or damaged after it was written: its document is not the one that "
            "its checksum is of. A threshold is changed by calibrating and exporting again"
        )
    try:
        return Document(
            record=record_of(document["record"], str(path)),
            self_test=dict(document["self_test"]),
            provenance=dict(document["provenance"]),
            program=str(document["program"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no document of backmix export: {error!r}") from error


def program_digest(data: bytes, suffix: str) -> str:
    """Return the xxh3-128 of everything in the bytes of an exported file but its document."""
    if suffix == ONNX:
        return _digest_of(_onnx_program(data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return _digest_of(_pt2_program(archive))


def _digest_of(parts: Iterator[bytes]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _digest(document: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())


# --- ONNX: a message of protocol buffers -------------------------------------------------------


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise _NotThis("it is empty") from None


class _NotThis(Exception):
    """Bytes that are no file of this kind."""


def metadata_entry(text: str) -> bytes:
    """Return the bytes that, behind a model's own, add our document to its metadata.

    Messages of protocol buffers are merged by putting one behind the other.
    """
    entry = b"".join(
        _varint(number << 3 | 2) + _varint(len(value)) + value
        for number, value in ((1, KEY.encode()), (2, text.encode()))
    )
    return _varint(_METADATA << 3 | 2) + _varint(len(entry)) + entry


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _onnx_text(data: Bytes) -> bytes | None:
    for number, start, end in _fields(data, 0, len(data)):
        if number != _METADATA:
            continue
        entry = {part: (first, last) for part, first, last in _fields(data, start, end)}
        key, value = (slice(*entry.get(part, (0, 0))) for part in (1, 2))
        if data[key] == KEY.encode():
            if value.stop - value.start > _LARGEST:
                raise _NotThis(f"its document has more than {_LARGEST:,} bytes")
            return data[value]
    return None


def _onnx_program(data: Bytes) -> Iterator[bytes]:
    for number, start, end in _fields(data, 0, len(data)):
        if number == _METADATA:
            continue
        yield f"{number} {end - start}\0".encode()
        for at in range(start, end, _CHUNK):
            yield data[at : min(at + _CHUNK, end)]


def _fields(data: Bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the fields of a message: number, first byte of the content, and the one behind it."""
    while at < end:
        tag, at = _read_varint(data, at, end)
        start = at
        match tag & 7:
            case 0:
                _, at = _read_varint(data, at, end)
            case 1:
                at += 8
            case 2:
                size, at = _read_varint(data, at, end)
                start, at = at, at + size
            case 5:
                at += 4
            case kind:
                raise _NotThis(f"there is no field of kind {kind}")
        if at > end or not tag >> 3:
            raise _NotThis(f"a field ends behind the file's {end:,} bytes, or has no number")
        yield tag >> 3, start, at


def _read_varint(data: Bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= end:
            raise _NotThis("it is cut off")
        byte = data[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise _NotThis("it holds a number of more than 64 bits")


# --- .pt2: an archive --------------------------------------------------------------------------


def _pt2_text(archive: zipfile.ZipFile) -> bytes | None:
    for member in archive.infolist():
        if _name(member) == f"extra/{KEY}":
            if member.file_size > _LARGEST or member.compress_type != zipfile.ZIP_STORED:
                raise _NotThis("its document is compressed, or too large")
            return archive.read(member)
    return None


def _pt2_program(archive: zipfile.ZipFile) -> Iterator[bytes]:
    for member in sorted(archive.infolist(), key=_name):
        # .data has a number that torch makes of all members, the document's among them.
        if _name(member) == f"extra/{KEY}" or _name(member).startswith(".data/"):
            continue
        if member.compress_type != zipfile.ZIP_STORED:  # torch compresses nothing
            raise _NotThis(f"{member.filename} is compressed")
        yield f"{_name(member)}\0{member.file_size}\0".encode()
        with archive.open(member) as file:
            while chunk := file.read(_CHUNK):
                yield chunk


def _name(member: zipfile.ZipInfo) -> str:
    """Return a member's name without the folder that all lie in."""
    return member.filename.partition("/")[2]
