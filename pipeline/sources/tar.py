"""Plain tars: listed by reading their headers only, images read from their place; no unpacking."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from backmix.pipeline.sources.classes import Listing
from backmix.pipeline.sources.source import Item, Items, Source, note, split_file
from backmix.pipeline.writer import MAX_NAME

# The tar format: POSIX.1-2017, pax "ustar interchange format" and "pax extended header".
_BLOCK = 512
MAX_MEMBERS = 1 << 24
"""Most members of a tar, twelve times those of ImageNet."""
_MAX_TAR_NAME = 1 << 20  # one GNU long name or pax header [bytes]
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def open_tar(spec: str, rest: str, classes: list[str] | None) -> Source:
    """List `tar:FILE//PREFIX`."""
    path, prefix = split_file(rest)
    prefix = _clean(prefix)
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file; write tar:FILE//PREFIX, or tar:FILE")
    where = f"{path}//{prefix}" if prefix else path
    listing = Listing(where)
    found: dict[str, tuple[int, int]] = {}
    links: list[str] = []
    others: list[str] = []
    inside = prefix + "/" if prefix else ""
    outside = ""
    for member in tar_members(path):
        name = member.name
        if not name.startswith(inside) or name == inside:
            outside = outside or name
            continue
        name = name[len(inside) :]
        parts = name.split("/")
        if any(part.startswith(".") for part in parts):
            continue
        if member.kind == "folder":
            listing.add_class(parts[0])
        elif member.kind == "link":
            links.append(name)
        elif member.kind == "other":
            others.append(name)
        elif len(parts) == 1:
            listing.ignored.append(name)
        else:
            if name not in found:
                listing.add_class(parts[0])
                listing.add(parts[0], name)
            found[name] = (member.offset, member.size)  # as tar does: the last of a name counts
    if outside and not found:
        raise ValueError(f"{path} holds no files in folders below {prefix}, but {outside!r}, ...")
    names, labels, known, notes = listing.finish(classes)
    notes += note("link inside the tar left out", links)
    notes += note("special file inside the tar left out", others)
    places = np.array([found[name] for name in names], np.int64)
    del found

    def make(i: int) -> Item:
        offset, size = places[i].tolist()
        return Item(names[i], int(labels[i]), path, offset, size)

    return Source(spec, known, Items(len(names), make), notes, files=[path])


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a tar."""

    name: str
    kind: str
    """`file`, `folder`, `link` or `other`."""
    offset: int
    """Where its content begins, counted from the start of the file [bytes]."""
    size: int


def tar_members(path: str, within: Member | None = None) -> Iterator[Member]:
    """Yield the members of a plain tar by reading its headers only.

    Args:
        path: the file.
        within: a member of it that is a tar itself: yield the members of that one.

    Raises:
        ValueError: no tar, compressed, damaged, truncated, or with sparse members, endless names,
            names that lead out of it or members without end.
    """
    where = path if within is None else f"{path} ({within.name} inside it)"
    with open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        start = 0 if within is None else within.offset
        end = os.fstat(descriptor).st_size if within is None else within.offset + within.size
        at = start
        extended: dict[str, str] = {}
        count = 0
        while True:
            header = os.pread(descriptor, max(0, min(_BLOCK, end - at)), at)
            if len(header) < _BLOCK:
                if at == start:
                    raise ValueError(f"{where} is not a tar file: {end - at} bytes are no header")
                raise ValueError(
                    f"{where} is truncated: it ends at byte {end} without the closing block of "
                    "zeros; copy it again"
                )
            if not any(header):
                return
            _check_header(header, where, at, first=at == start)
            kind = header[156:157]
            size = _number(header[124:136], where, at)
            if kind not in b"xgLK" and "size" in extended:
                size = _decimal(extended["size"], where, at)
            body = at + _BLOCK
            # Links and folders carry no data whatever their size says.
            following = body + (0 if kind in b"123456" else -(-size // _BLOCK) * _BLOCK)
            if body + size > end and kind not in b"123456":
                raise ValueError(
                    f"{where} is truncated: the member at byte {at} needs {size} bytes, "
                    f"{max(0, end - body)} are there; copy it again"
                )
            if kind in b"xLKg":
                if size > _MAX_TAR_NAME:
                    raise ValueError(f"{where}: extended header of {size} bytes at byte {at}")
                content = os.pread(descriptor, size, body)
                if kind == b"L":
                    extended["path"] = _text(content.split(b"\0")[0])
                elif kind == b"x":
                    extended |= _pax(content, where, at)
                at = following
                continue
            if kind == b"S" or any(key.startswith("GNU.sparse") for key in extended):
                raise ValueError(f"{where}: the member at byte {at} is sparse; repack without -S")
            name = extended.get("path") or _ustar_name(header)
            _check_name(name, where, at)
            count += 1
            if count > MAX_MEMBERS:
                raise ValueError(f"{where} has more than {MAX_MEMBERS:,} members")
            yield Member(_clean(name), _kind(kind, name), body, size)
            extended = {}
            at = following


def _check_name(name: str, where: str, at: int) -> None:
    if len(os.fsencode(name)) > MAX_NAME:
        raise ValueError(
            f"{where}: the member at byte {at} has a name of more than {MAX_NAME} bytes: "
            f"{name[:60]!r}..."
        )
    # Nothing is written under these names; but nobody packs images like this, and the names go on
    # into manifests and tables.
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(
            f"{where}: the member at byte {at} has a name that leads out of the archive: "
            f"{name[:60]!r}; repack it with relative names"
        )


def _check_header(header: bytes, path: str, at: int, *, first: bool) -> None:
    # The checksum is the sum of all bytes with its own eight read as spaces.
    field_ = header[148:156].strip(b" \0")
    try:
        stored = int(field_, 8)
    except ValueError:
        stored = -1
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if stored == total:
        return
    # Old writers summed signed bytes.
    if stored == total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        return
    if first:
        for magic, program in _COMPRESSED.items():
            if header.startswith(magic):
                raise ValueError(
                    f"{path} is compressed with {program}: single images cannot be read from it "
                    "without decompressing all before them; decompress it once (to a plain tar)"
                )
        raise ValueError(f"{path} is not a tar file")
    raise ValueError(f"{path} is damaged: no valid tar header at byte {at}; copy it again")


def _number(raw: bytes, path: str, at: int) -> int:
    """Read a size: octal digits, or GNU's base 256 where the first bit is set."""
    if raw[0] & 0x80:
        value = int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
        if raw[0] & 0x40 or value >= 1 << 63:
            raise ValueError(f"{path}: impossible size in the tar header at byte {at}")
        return value
    try:
        return int(raw.strip(b" \0") or b"0", 8)
    except ValueError:
        raise ValueError(f"{path}: unreadable size in the tar header at byte {at}") from None


def _decimal(text: str, path: str, at: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ValueError(f"{path}: unreadable size in the extended header before byte {at}")
    return int(text)


def _pax(content: bytes, path: str, at: int) -> dict[str, str]:
    """Read pax records: `LENGTH KEY=VALUE\\n`, the length counting itself."""
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = content[len(digits) + 1 : length]
        if length > len(content) or not record.endswith(b"\n") or b"=" not in record:
            raise ValueError(f"{path}: unreadable extended header at byte {at}")
        key, _, value = record[:-1].partition(b"=")
        records[_text(key)] = _text(value)
        content = content[length:]
    return records


def _ustar_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and prefix:
        name = prefix + b"/" + name
    return _text(name)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _clean(name: str) -> str:
    """Return a member's name without `./`, doubled and outer slashes."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _kind(flag: bytes, name: str) -> str:
    if flag == b"5" or (flag in b"0\0" and name.endswith("/")):
        return "folder"
    if flag in b"0\x007":
        return "file"
    return "link" if flag in b"12" else "other"
