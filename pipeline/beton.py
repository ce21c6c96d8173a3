"""Read .beton files: every offset checked before use, arrays instead of one object per sample.

A .beton is what FFCV's DatasetWriter writes; ours carry checksums, flags and names in an extension
block that stock readers never look at. `docs/format.md` describes both byte by byte. This module
holds the layout, which `writer.py` shares, and the reader. It decodes no image, and it needs numpy
and xxhash only. Nothing in a file is trusted: sizes and offsets are checked against the file's
length before anything is read or allocated.
"""

import json
import mmap
import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from backmix.pipeline import shards

VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", (1024,))])
_ARGUMENTS = 17  # offset of `arguments` in a descriptor
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
REGION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

INT_FIELD = 1
IMAGE_FIELD = 2
_BLOB = np.dtype([("ptr", "<u8"), ("size", "<u8")])
# What one field takes of a sample's record, by type id. 255, a user's own class, is not here: its
# width stands nowhere in the file, so not even the other fields of such a file can be found.
_RECORDS = {
    0: np.dtype("<f8"),  # Float
    INT_FIELD: np.dtype("<i8"),
    IMAGE_FIELD: IMAGE,
    3: _BLOB,  # Bytes
    4: np.dtype("<u8"),  # NDArray
    5: _BLOB,  # JSON
    6: np.dtype("<u8"),  # TorchTensor
}

JPG = 0
RAW = 1
MAX_FIELDS = 64
MAX_PIXELS = 178_956_970
"""Most pixels of one image: twice Pillow's warning level, 537 MB decoded."""
MAX_CLASSES = 1_000_000
"""Most classes: the length of the class list that a damaged label could ask for."""

MAGIC = b"BMIXEXT1"
LOCATOR = np.dtype(
    [
        ("magic", "S8"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("body_hash", "<u8"),
        ("locator_hash", "<u8"),
    ]
)
BODY = np.dtype([("magic", "S8"), ("version", "<u4"), ("num_tables", "<u4")])
BODY_VERSION = 1
BODY_ALIGNMENT = 64
ENTRY = np.dtype(
    [("name", "S16"), ("dtype", "S8"), ("count", "<u8"), ("offset", "<u8"), ("hash", "<u8")]
)
_MAX_TABLES = 64
_MAX_JSON = 1 << 28
_TABLE_DTYPES = {
    "sample_hash": "<u8",
    "page_hash": "<u8",
    "flags": "<u4",
    "head_hash": "<u8",
    "size": "<u8",
    "json": "|u1",
    "names": "|u1",
}
_OPTIONAL_TABLES = {"names"}


class Flag(IntFlag):
    """What is known of a sample beyond its pixels: bits of the `flags` table.

    Bits 3 and 4 hold the chroma subsampling (`subsampling`), bits 12 to 15 the number of the
    colour mode that the image was normalised from.
    """

    PASSTHROUGH = 1 << 0
    """The JPEG of the source, byte for byte."""
    PROGRESSIVE = 1 << 1
    GRAY = 1 << 2
    HARDWARE = 1 << 5
    """A hardware JPEG decoder can take it, as far as its header tells."""
    ROTATED = 1 << 6
    """The source's EXIF orientation was applied."""
    NORMALISED = 1 << 7
    """Converted to 8-bit RGB from another colour mode."""
    MISNAMED = 1 << 8
    """The source's content was not what its name said."""
    ANIMATED = 1 << 9
    """The first frame of several."""
    ICC = 1 << 10
    """The JPEG has a colour profile; of pixels: their source had."""
    WARNED = 1 << 11
    """The JPEG decodes with a warning; of pixels: their source did."""


SUBSAMPLING_SHIFT = 3
SUBSAMPLINGS = ("444", "422", "420", "other")
NORMALISED_SHIFT = 12


def subsampling(flags: np.ndarray) -> np.ndarray:
    """Return each sample's position in `SUBSAMPLINGS`; it means something for JPEGs only."""
    return flags >> SUBSAMPLING_SHIFT & 3


def align_up(offset: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` that is >= `offset`."""
    return -(-offset // alignment) * alignment


def record_dtype(type_ids: Sequence[int]) -> np.dtype:
    """Return the layout of one sample's metadata record: fields `f0`, `f1`, ... in file order.

    The fields are aligned by their dtype's own rule; an image record is packed, alignment 1.
    """
    records = [(f"f{k}", _RECORDS[type_id]) for k, type_id in enumerate(type_ids)]
    return np.dtype(records, align=True)


def head_hashes(head: bytes, metadata: Any, table: Any) -> list[int]:
    """Return the three values of the `head_hash` table.

    Args:
        head: header and descriptors, with the locator's bytes zeroed.
        metadata: the metadata records, bytes-like.
        table: the allocation table, bytes-like.
    """
    return [xxhash.xxh3_64_intdigest(part) for part in (head, metadata, table)]


@dataclass(eq=False)
class Beton:
    """One open .beton file, memory-mapped. Arrays are indexed by sample number, 0 .. n - 1.

    The arrays are copies and outlive `close()`; the views that `region` returns keep the map
    alive. A file that somebody shortens while it is open kills the process (SIGBUS), as with every
    memory map.
    """

    path: Path
    page_size: int
    labels: np.ndarray
    """int64 [N]: the first Int field; zeros where the file has none."""
    modes: np.ndarray
    """uint8 [N]: 0 = jpg, 1 = raw (h x w x 3 bytes, RGB)."""
    sizes: np.ndarray
    """int32 [N, 2]: height, width [pixels]."""
    pointers: np.ndarray
    """uint64 [N]: where the image starts in the file [bytes]."""
    byte_sizes: np.ndarray
    """uint64 [N]: length of the stored image [bytes]."""
    pages: np.ndarray
    """int64 [N]: page that holds the image, counted from the start of the file."""
    flags: np.ndarray | None
    """uint32 [N]: bits of `Flag`; None in a stock file."""
    hashes: np.ndarray | None
    """uint64 [N]: xxh3-64 of the stored image; None in a stock file."""
    page_hashes: np.ndarray | None
    """uint64 [P]: xxh3-64 of each page, from the first page that holds an image to the last."""
    classes: list[str]
    """Class names by label; `class_0`, `class_1`, ... for a stock file, which names none."""
    info: dict[str, Any]
    """What the writer noted (`writer`, `options`, ...); empty for a stock file."""
    digest: str
    """xxh3-128 of header, descriptors, metadata, extension and allocation table, hexadecimal."""
    _names: tuple[np.ndarray, np.ndarray] | None
    _map: mmap.mmap
    _bytes: np.ndarray | None

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.labels)

    def region(self, i: int, verify: bool = True) -> np.ndarray:
        """Return the stored bytes of sample i, a read-only uint8 view of the map.

        Raises ValueError if they do not match their checksum; stock files have none.
        """
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        self._check_index(i)
        start = int(self.pointers[i])
        stored = self._bytes[start : start + int(self.byte_sizes[i])]
        if verify and self.hashes is not None:
            if xxhash.xxh3_64_intdigest(stored.data) != int(self.hashes[i]):
                raise ValueError(
                    f"{self.where(i)} does not match its checksum: the file is damaged; copy or "
                    "convert it again (backmix inspect --verify lists all such samples)"
                )
        return stored

    def mapped(self) -> np.ndarray:
        """Return the whole file, a read-only uint8 view of the map, which it keeps alive."""
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        return self._bytes

    def damaged_pages(self) -> Iterator[int]:
        """Yield the numbers of the pages whose bytes do not match their checksum, as `pages`.

        Reads every page; they cover also the bytes between the samples. Stock files have no
        checksums and yield none.
        """
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        if self.page_hashes is not None:
            for number, expected in enumerate(self.page_hashes.tolist(), int(self.pages.min())):
                start = number * self.page_size
                page = self._bytes[start : start + self.page_size]
                if xxhash.xxh3_64_intdigest(page.data) != expected:
                    yield number

    def name(self, i: int) -> str:
        """Return the source name of sample i, or `sample i` where the file stores none."""
        self._check_index(i)
        if self._names is None:
            return f"sample {i}"
        ends, blob = self._names
        return blob[int(ends[i]) : int(ends[i + 1])].tobytes().decode("utf-8", "replace")

    def where(self, i: int) -> str:
        """Say where sample i is, for messages: file, number, source name and byte."""
        self._check_index(i)
        name = f" ({printable(self.name(i))})" if self._names is not None else ""
        return f"{self.path}: sample {i}{name} at byte {self.pointers[i]}"

    def _check_index(self, i: int) -> None:
        if not 0 <= i < self.n:
            raise IndexError(f"{self.path} has samples 0 to {self.n - 1}, there is no {i}")

    def close(self) -> None:
        """Let go of the map; it is unmapped when the last view of a region is gone."""
        self._bytes = None
        try:
            self._map.close()
        except BufferError:  # somebody still holds a region
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(eq=False)
class BetonSet:
    """One or several .beton files as one data set: the samples of the first, then the next, ...

    The attributes are those of `Beton`, over all samples; `pages` is made unique over the files.
    """

    shards: list[Beton]
    labels: np.ndarray
    modes: np.ndarray
    sizes: np.ndarray
    pointers: np.ndarray
    """uint64 [N]: offset in the sample's own file."""
    byte_sizes: np.ndarray
    pages: np.ndarray
    flags: np.ndarray | None
    """None if any of the files is a stock file."""
    hashes: np.ndarray | None
    """None if any of the files is a stock file; `region` checks those that exist all the same."""
    classes: list[str]
    info: dict[str, Any]
    """The note of the first file."""
    digest: str
    """The file's digest; for several files one over all of theirs, in order."""
    _starts: list[int]

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.labels)

    @property
    def paths(self) -> list[Path]:
        """The files, in order."""
        return [shard.path for shard in self.shards]

    def locate(self, i: int) -> tuple[Beton, int]:
        """Return the file that holds sample i, and the sample's number there."""
        if not 0 <= i < self.n:
            raise IndexError(f"the data set has samples 0 to {self.n - 1}, there is no {i}")
        k = bisect_right(self._starts, i) - 1
        return self.shards[k], i - self._starts[k]

    def region(self, i: int, verify: bool = True) -> np.ndarray:
        """Return the stored bytes of sample i; see `Beton.region`."""
        shard, local = self.locate(i)
        return shard.region(local, verify)

    def name(self, i: int) -> str:
        """Return the source name of sample i, or `sample i` where its file stores none."""
        shard, local = self.locate(i)
        return f"sample {i}" if shard._names is None else shard.name(local)

    def where(self, i: int) -> str:
        """Say where sample i is: its file, and its number and byte there."""
        shard, local = self.locate(i)
        return shard.where(local)

    def close(self) -> None:
        """Close every file."""
        for shard in self.shards:
            shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_beton(path: str | os.PathLike[str]) -> Beton:
    """Open one .beton file and check its header and tables whole.

    Stock files are accepted with any fields that stock ffcv knows; the first RGBImage field is the
    image, the first Int field the label. A file with our extension is checked against its checksums
    as well: a changed byte in header, descriptors, metadata, extension or allocation table is
    always found. The images' own bytes are checked when they are read (`Beton.region`).

    Raises ValueError, naming file and byte, for what is damaged or no .beton file, and OSError for
    what cannot be read.
    """
    path = Path(path)
    return _read(path, _map(path))


def open_set(
    paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str], *, partial: bool = False
) -> BetonSet:
    """Open one or several .beton files as one data set with one numbering.

    A manifest (`.jsonl`) stands for the files that it lists, in its order; each must be the one
    that it was written with. Shards that are given themselves come in the order given, and must be
    all of their set, unless `partial` says that some will do.

    The class lists must be the same. Stock files name no classes: several of them make one set by
    their labels, but not together with files that do name them. Raises as `open_beton` does, and
    ValueError for missing, mixed or foreign shards.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not several:
        raise ValueError("no .beton file was given")
    opened: list[Beton] = []
    given: list[Beton] = []
    try:
        for path in several:
            if shards.is_manifest(path):
                _open_listed(Path(path), opened)
            else:
                opened.append(open_beton(path))
                given.append(opened[-1])
        if not partial:
            shards.refuse_parts(given)
        return _join(opened)
    except BaseException:
        for file in opened:
            file.close()
        raise


def _open_listed(manifest: Path, opened: list[Beton]) -> None:
    """Open the files of a manifest, and append each to `opened`, which the caller closes."""
    listed = shards.read_manifest(manifest)
    for k, expected in enumerate(listed):
        try:
            opened.append(open_beton(expected.path))
        except FileNotFoundError:
            raise shards.missing(manifest, expected) from None
        shards.check_listed(manifest, listed, k, opened[-1])


def printable(text: str) -> str:
    """Return `text` with control and other invisible characters escaped, fit for a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# --- one file -------------------------------------------------------------------------------------


class _Source:
    """A mapped file under examination: bounded reads, and errors that say where."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.mapped = mapped
        self.length = len(mapped)

    def read(self, dtype: np.dtype, count: int, offset: int, what: str) -> np.ndarray:
        """Return `count` items at `offset` as a view, or raise if they leave the file."""
        end = offset + count * dtype.itemsize
        if end > self.length:
            raise self.damaged(offset, f"{what} would end at byte {end} of {self.length}")
        return np.frombuffer(self.mapped, dtype, count, offset)

    def damaged(self, offset: int, problem: str) -> ValueError:
        return ValueError(
            f"{self.path}: {problem} (at byte {offset}); the file is damaged or incomplete: copy "
            "or convert it again"
        )


def _map(path: Path) -> mmap.mmap:
    # Looked at before it is opened: opening a pipe would wait for its writer.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a file")
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length < HEADER.itemsize:
            raise ValueError(f"{path} is no .beton file: it has only {length} bytes")
        return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)


def _read(path: Path, mapped: mmap.mmap) -> Beton:
    source = _Source(path, mapped)
    header = _read_header(source)
    descriptors = source.read(
        DESCRIPTOR, int(header["num_fields"]), HEADER.itemsize, "the field descriptors"
    )
    type_ids = _field_types(source, descriptors)
    metadata = _read_metadata(source, header, len(descriptors), type_ids)
    table = _read_table(source, header, metadata)
    n = len(metadata)

    image = metadata[f"f{type_ids.index(IMAGE_FIELD)}"]
    pointers = np.ascontiguousarray(image["data_ptr"])
    byte_sizes = _byte_sizes(source, pointers, table)
    modes = np.ascontiguousarray(image["mode"])
    sizes = np.stack([image["height"], image["width"]], 1).astype(np.int32)
    _check_images(source, modes, sizes, byte_sizes, pointers)

    page_size = int(header["page_size"])
    shift = np.uint64(page_size.bit_length() - 1)
    pages = (pointers >> shift).astype(np.int64)
    labels = np.zeros(n, np.int64)
    if INT_FIELD in type_ids:
        labels = metadata[f"f{type_ids.index(INT_FIELD)}"].astype(np.int64)

    body, tables = _read_extension(source, header, descriptors, type_ids, metadata, table)
    if tables:
        _check_tables(source, tables, byte_sizes, pages)
    info = _read_info(source, tables)

    digest = xxhash.xxh3_128()
    for part in (source.read(HEADER, 1, 0, "the header"), descriptors, metadata, body, table):
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return Beton(
        path=path,
        page_size=page_size,
        labels=labels,
        modes=modes,
        sizes=sizes,
        pointers=pointers,
        byte_sizes=byte_sizes,
        pages=pages,
        flags=_copied(tables, "flags"),
        hashes=_copied(tables, "sample_hash"),
        page_hashes=_copied(tables, "page_hash"),
        classes=_class_names(source, labels, info),
        info=info,
        digest=digest.hexdigest(),
        _names=_read_names(source, tables, n),
        _map=mapped,
        _bytes=np.frombuffer(mapped, np.uint8),
    )


def _read_header(source: _Source) -> np.void:
    header = source.read(HEADER, 1, 0, "the header")[0]
    if header["version"] != VERSION:
        raise ValueError(
            f"{source.path} is no .beton file of version {VERSION}: it starts with version "
            f"{header['version']}"
        )
    if not 1 <= header["num_fields"] <= MAX_FIELDS:
        raise source.damaged(2, f"{header['num_fields']} fields, not 1 to {MAX_FIELDS}")
    page_size = int(header["page_size"])
    if page_size < 4096 or page_size & (page_size - 1):
        raise source.damaged(4, f"page size {page_size} is no power of two from 4096")
    if header["num_samples"] == 0:
        raise source.damaged(8, "the file holds no samples")
    return header


def _field_types(source: _Source, descriptors: np.ndarray) -> list[int]:
    type_ids = [int(type_id) for type_id in descriptors["type_id"]]
    for k, type_id in enumerate(type_ids):
        if type_id not in _RECORDS:
            name = printable(descriptors["name"][k].decode("ascii", "replace"))
            raise ValueError(
                f"{source.path}: field {name!r} has type {type_id} (at byte "
                f"{HEADER.itemsize + k * DESCRIPTOR.itemsize}), whose layout the file does not "
                "tell; write it again with stock field types"
            )
    if IMAGE_FIELD not in type_ids:
        raise ValueError(f"{source.path} holds no RGBImage field, only types {type_ids}")
    return type_ids


def _read_metadata(
    source: _Source, header: np.void, num_fields: int, type_ids: list[int]
) -> np.ndarray:
    start = HEADER.itemsize + num_fields * DESCRIPTOR.itemsize
    return source.read(record_dtype(type_ids), int(header["num_samples"]), start, "the metadata")


def _read_table(source: _Source, header: np.void, metadata: np.ndarray) -> np.ndarray:
    """Return the allocation table, every row of which lies in the pages and overlaps no other."""
    start = int(header["alloc_table_ptr"])
    first = HEADER.itemsize + int(header["num_fields"]) * DESCRIPTOR.itemsize + metadata.nbytes
    if start < first:
        # The stock writer leaves 0 here until it has finished.
        raise source.damaged(16, f"the allocation table would start at byte {start}")
    rows, rest = divmod(source.length - start, REGION.itemsize)
    if start > source.length or rest:
        raise source.damaged(16, f"no whole allocation table from byte {start} to the end")
    table = source.read(REGION, rows, start, "the allocation table")

    def refuse(bad: np.ndarray, problem: str) -> None:
        if bad.any():
            row = int(bad.argmax())
            raise source.damaged(
                start + row * REGION.itemsize, f"row {row} of the allocation table {problem}"
            )

    refuse(table["sample_id"] >= np.uint64(len(metadata)), "names a sample that does not exist")
    ptr, size = np.ascontiguousarray(table["ptr"]), np.ascontiguousarray(table["size"])
    refuse((ptr < first) | (ptr > start), "points outside the data pages")
    # No sum before this line: ptr <= start here, so start - ptr cannot wrap around.
    refuse(size > start - ptr, "ends behind the data pages")
    last = ptr + np.maximum(size, 1) - np.uint64(1)
    shift = np.uint64(int(header["page_size"]).bit_length() - 1)
    refuse((ptr >> shift != last >> shift) & (size > 0), "crosses the end of a page")
    _check_overlaps(source, ptr[size > 0], size[size > 0])
    return table


def _check_overlaps(source: _Source, ptr: np.ndarray, size: np.ndarray) -> None:
    """Refuse regions that share bytes, unless they are the same region."""
    if (ptr[1:] < ptr[:-1]).any():
        order = np.argsort(ptr, kind="stable")
        ptr, size = ptr[order], size[order]
    same = (ptr[1:] == ptr[:-1]) & (size[1:] == size[:-1])
    bad = (ptr[1:] < ptr[:-1] + size[:-1]) & ~same
    if bad.any():
        k = int(bad.argmax())
        raise source.damaged(int(ptr[k + 1]), "two regions of the allocation table overlap")


def _byte_sizes(source: _Source, pointers: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the length of the region that each image pointer names; uint64 [N], all > 0.

    A sample that has rows of its own in the table must point at one of them. One without any may
    share another sample's region: files that repeat images virtually are written so.
    """
    n = len(pointers)
    if len(table) == n and np.array_equal(table["ptr"], pointers):
        if np.array_equal(table["sample_id"], np.arange(n, dtype=np.uint64)):
            sizes = np.ascontiguousarray(table["size"])
            _require_regions(source, sizes, pointers)
            return sizes
    table = table[table["size"] > 0]  # an empty Bytes field may start where an image does
    owner = table["sample_id"].astype(np.int64)
    fits = table["ptr"] == pointers[owner]
    sizes = np.zeros(n, np.uint64)
    sizes[owner[fits]] = table["size"][fits]
    listed = np.zeros(n, bool)
    listed[owner] = True
    sharing = np.flatnonzero(~listed)
    if len(sharing) and len(table):
        order = np.argsort(table["ptr"], kind="stable")
        ptr = table["ptr"][order]
        at = np.minimum(np.searchsorted(ptr, pointers[sharing]), len(ptr) - 1)
        found = ptr[at] == pointers[sharing]
        sizes[sharing[found]] = table["size"][order][at[found]]
    _require_regions(source, sizes, pointers)
    return sizes


def _require_regions(source: _Source, sizes: np.ndarray, pointers: np.ndarray) -> None:
    if not sizes.all():
        i = int((sizes == 0).argmax())
        raise source.damaged(
            int(pointers[i]), f"sample {i} has no bytes according to the allocation table"
        )


def _check_images(
    source: _Source,
    modes: np.ndarray,
    sizes: np.ndarray,
    byte_sizes: np.ndarray,
    pointers: np.ndarray,
) -> None:
    def refuse(bad: np.ndarray, problem: str) -> None:
        if bad.any():
            i = int(bad.argmax())
            what = f"mode {modes[i]}, {sizes[i, 0]} x {sizes[i, 1]} pixels, {byte_sizes[i]} bytes"
            raise source.damaged(int(pointers[i]), f"sample {i} {problem}: {what}")

    pixels = sizes[:, 0].astype(np.int64) * sizes[:, 1]
    refuse(modes > RAW, "is stored in no known mode (0 jpg, 1 raw)")
    refuse(pixels == 0, "has no pixels")
    refuse(pixels > MAX_PIXELS, f"has more than {MAX_PIXELS} pixels")
    refuse((modes == RAW) & (byte_sizes != (3 * pixels).astype(np.uint64)), "has not 3 h w bytes")


def _class_names(source: _Source, labels: np.ndarray, info: dict[str, Any]) -> list[str]:
    limit = len(info["classes"]) if info else MAX_CLASSES
    bad = (labels < 0) | (labels >= limit)
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(
            f"{source.path}: sample {i} has label {labels[i]}, not 0 to {limit - 1}; the first Int "
            "field must hold the class number"
        )
    return info["classes"] if info else [f"class_{k}" for k in range(int(labels.max()) + 1)]


# --- the extension block --------------------------------------------------------------------------


def _read_extension(
    source: _Source,
    header: np.void,
    descriptors: np.ndarray,
    type_ids: list[int],
    metadata: np.ndarray,
    table: np.ndarray,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the extension's body and its tables, all checksums verified; both empty if none."""
    arguments = descriptors["arguments"][type_ids.index(IMAGE_FIELD)]
    if not arguments.any():
        return np.zeros(0, np.uint8), {}
    at = locator_offset(type_ids)
    locator = np.frombuffer(arguments[: LOCATOR.itemsize].tobytes(), LOCATOR)[0]
    sound = locator["locator_hash"] == xxhash.xxh3_64_intdigest(arguments[:32].tobytes())
    if locator["magic"] != MAGIC or not sound or arguments[LOCATOR.itemsize :].any():
        raise source.damaged(at, "the arguments of the image field are no sound extension locator")
    start, length = int(locator["offset"]), int(locator["length"])
    pages_end = int((table["ptr"] + table["size"]).max())
    if not pages_end <= start <= start + length <= int(header["alloc_table_ptr"]):
        raise source.damaged(at, f"the extension at byte {start} is not between pages and table")
    body = source.read(np.dtype(np.uint8), length, start, "the extension")
    tables = _read_tables(source, body, start)
    if xxhash.xxh3_64_intdigest(body.data) != locator["body_hash"]:
        raise source.damaged(start, "the extension does not match its checksum")

    head = bytearray(source.mapped[: HEADER.itemsize + descriptors.nbytes])
    head[at : at + LOCATOR.itemsize] = bytes(LOCATOR.itemsize)
    found = head_hashes(bytes(head), metadata.view(np.uint8), table.view(np.uint8))
    parts = ("header and field descriptors do", "metadata does", "allocation table does")
    for k, part in enumerate(parts):
        if tables["head_hash"][k : k + 1].tolist() != [found[k]]:
            raise source.damaged(0, f"the {part} not match the checksum in the extension")
    return body, tables


def locator_offset(type_ids: Sequence[int]) -> int:
    """Return the file offset of the extension's locator: the first image field's arguments."""
    k = list(type_ids).index(IMAGE_FIELD)
    return HEADER.itemsize + k * DESCRIPTOR.itemsize + _ARGUMENTS


def _read_tables(source: _Source, body: np.ndarray, start: int) -> dict[str, np.ndarray]:
    """Return the known tables of the body by name; those of later writers are passed over."""
    if len(body) < BODY.itemsize:
        raise source.damaged(start, f"an extension of {len(body)} bytes")
    head = np.frombuffer(body, BODY, 1)[0]
    if head["magic"] != MAGIC:
        raise source.damaged(start, "the extension does not start with its mark")
    if head["version"] != BODY_VERSION:
        raise ValueError(
            f"{source.path}: extension of version {head['version']} (at byte {start}), this "
            f"program reads version {BODY_VERSION}: use a newer one, or the file is damaged"
        )
    count = int(head["num_tables"])
    if count > _MAX_TABLES or len(body) < BODY.itemsize + count * ENTRY.itemsize:
        raise source.damaged(start, f"the extension lists {count} tables")
    tables: dict[str, np.ndarray] = {}
    for entry in np.frombuffer(body, ENTRY, count, BODY.itemsize):
        name = entry["name"].decode("ascii", "replace")
        if name not in _TABLE_DTYPES:
            continue
        if entry["dtype"] != _TABLE_DTYPES[name].encode() or name in tables:
            raise source.damaged(start, f"the extension's directory names table {name} wrongly")
        dtype = np.dtype(_TABLE_DTYPES[name])
        offset, rows = int(entry["offset"]), int(entry["count"])
        if offset + rows * dtype.itemsize > len(body):
            raise source.damaged(start, f"table {name} would leave the extension")
        table = np.frombuffer(body, dtype, rows, offset)
        if xxhash.xxh3_64_intdigest(table.view(np.uint8).data) != entry["hash"]:
            raise source.damaged(start + offset, f"table {name} does not match its checksum")
        tables[name] = table
    missing = sorted(set(_TABLE_DTYPES) - _OPTIONAL_TABLES - set(tables))
    if missing:
        raise source.damaged(start, f"the extension lacks the tables {missing}")
    return tables


def _check_tables(
    source: _Source, tables: dict[str, np.ndarray], byte_sizes: np.ndarray, pages: np.ndarray
) -> None:
    """Refuse tables that do not fit the samples: a checksum tells damage, not sense."""
    n = len(byte_sizes)
    num_pages = int(pages.max() - pages.min()) + 1
    for name, count in (("sample_hash", n), ("flags", n), ("size", n), ("page_hash", num_pages)):
        if len(tables[name]) != count:
            raise source.damaged(0, f"table {name} has {len(tables[name])} rows, not {count}")
    if not np.array_equal(tables["size"], byte_sizes):
        raise source.damaged(0, "the extension's sizes contradict the allocation table")


def _copied(tables: dict[str, np.ndarray], name: str) -> np.ndarray | None:
    return tables[name].copy() if tables else None


def _read_names(
    source: _Source, tables: dict[str, np.ndarray], n: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (offsets uint64 [N + 1], UTF-8 bytes) of the source names, if the file has them."""
    if "names" not in tables:
        return None
    packed = tables["names"]
    if len(packed) < 8 * (n + 1):
        raise source.damaged(0, f"{len(packed)} bytes hold no names of {n} samples")
    offsets = packed[: 8 * (n + 1)].view("<u8").copy()
    blob = packed[8 * (n + 1) :].copy()
    if offsets[0] != 0 or offsets[-1] != len(blob) or (offsets[1:] < offsets[:-1]).any():
        raise source.damaged(0, "the offsets of the samples' names do not ascend")
    return offsets, blob


def _read_info(source: _Source, tables: dict[str, np.ndarray]) -> dict[str, Any]:
    if not tables:
        return {}
    packed = tables["json"]
    if len(packed) > _MAX_JSON:
        raise source.damaged(0, f"a note of {len(packed)} bytes")
    try:
        info = json.loads(packed.tobytes())
    except (ValueError, RecursionError) as error:
        raise source.damaged(0, f"the extension's note is no JSON ({error})") from None
    classes = info.get("classes") if isinstance(info, dict) else None
    if not isinstance(classes, list) or not 0 < len(classes) <= MAX_CLASSES:
        raise source.damaged(0, "the extension's note has no list of classes")
    if not all(isinstance(name, str) for name in classes):
        raise source.damaged(0, "the extension's note has a class whose name is no text")
    return info


# --- several files --------------------------------------------------------------------------------


def _join(files: list[Beton]) -> BetonSet:
    classes = max((file.classes for file in files), key=len)
    stock = [not file.info for file in files]
    for shard in files:
        if shard.classes != classes and not all(stock):
            raise ValueError(
                f"{shard.path} has other classes ({_start(shard.classes)}) than the other files "
                f"({_start(classes)}): shards of one data set must have the same class list"
            )

    def joined(name: str) -> Any:
        parts = [getattr(file, name) for file in files]
        if any(part is None for part in parts):
            return None
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    counts = [int(file.pages.max()) + 1 for file in files]
    first_pages = np.repeat(np.cumsum([0, *counts[:-1]]), [file.n for file in files])
    starts = np.cumsum([0, *(file.n for file in files[:-1])]).tolist()
    return BetonSet(
        shards=files,
        **{
            name: joined(name)
            for name in (
                "labels",
                "modes",
                "sizes",
                "pointers",
                "byte_sizes",
                "flags",
                "hashes",
            )
        },
        pages=joined("pages") + first_pages,
        classes=classes,
        info=files[0].info,
        digest=shards.joint_digest([file.digest for file in files]),
        _starts=starts,
    )


def _start(classes: list[str]) -> str:
    shown = ", ".join(printable(name) for name in classes[:3])
    return f"{len(classes)}: {shown}" + (", ..." if len(classes) > 3 else "")
