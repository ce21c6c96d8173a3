"""Write .beton files: the same bytes for the same samples, whole or not at all.

Samples are placed in the order in which they are appended, by their sizes alone; nothing of the
machine, the time or the number of workers enters the file. It grows beside its final name as
`OUT.part-<pid>` and gets that name when everything is on the disk. This module neither reads nor
decodes images (`images.py`) and knows no sources (`convert.py`).
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from backmix import __version__
from backmix.pipeline import beton
from backmix.pipeline.shards import Position

FIELDS = (("image", beton.IMAGE_FIELD), ("label", beton.INT_FIELD))
MIN_PAGE_SIZE = 1 << 21
"""Smallest page that stock ffcv writes [bytes]."""
MAX_PAGE_SIZE = 1 << 30
"""Largest page [bytes]: stock ffcv reads a page by one pread, which Linux cuts short of 2 GiB."""
MAX_NAME = 4096
"""Longest source name [bytes of UTF-8]: Linux allows no longer path."""
_ZEROS = bytes(1 << 20)


@dataclass(frozen=True)
class Record:
    """One sample as it is stored."""

    data: Any
    """The image, bytes-like: one JPEG stream, or height x width x 3 bytes RGB."""
    mode: int
    """`beton.JPG` or `beton.RAW`."""
    height: int
    width: int
    label: int
    """Position in the class list."""
    flags: int
    """Bits of `beton.Flag`."""
    name: str
    """Where the sample came from, relative to the source: for messages and for masks by name."""


def page_size_for(largest: int) -> int:
    """Return the page size for samples of at most `largest` bytes [bytes].

    The smallest power of two that is at least 2 MiB and four times the largest sample, which bounds
    what page ends waste; at most 1 GiB. Raises ValueError if the sample does not fit that.
    """
    if largest > MAX_PAGE_SIZE:
        raise ValueError(f"a sample of {largest} bytes does not fit a page of {MAX_PAGE_SIZE}")
    page_size = MIN_PAGE_SIZE
    while page_size < min(4 * largest, MAX_PAGE_SIZE):
        page_size *= 2
    return page_size


def check_page_size(page_size: int) -> None:
    """Raise ValueError for a number of bytes that pages cannot have."""
    if page_size & (page_size - 1) or not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE:
        raise ValueError(
            f"the page size must be a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE} "
            f"bytes, not {page_size}"
        )


class Writer:
    """Writes one .beton file; a context manager.

    ```text
    with Writer(path, samples=2, page_size=1 << 21, classes=["cat", "dog"], options={}) as writer:
        writer.append(record)
    ```
    Leaving the block finishes the file and gives it its name; an exception, KeyboardInterrupt
    included, removes what was written. A process that is killed leaves its part file, which the
    next Writer for the same name removes. `seal` and `publish` are the two halves of `close`, for
    what must happen between them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        samples: int,
        page_size: int,
        classes: list[str],
        options: dict[str, Any],
        force: bool = False,
        shard: Position | None = None,
    ) -> None:
        """Begin the file.

        Args:
            path: final name; its folder must exist.
            samples: number of samples that will be appended at most; their metadata's place is
                reserved. Fewer are legal.
            page_size: bytes, a power of two from 2 MiB to 1 GiB; no sample may be larger.
            classes: class names by label, each once.
            options: noted in the file as JSON, `inspect` prints it. No times, no absolute paths:
                the file shall depend on its samples only.
            force: replace an existing file, at the end and in one step.
            shard: noted in the file: its place among the shards of a set.

        Raises ValueError for wrong arguments and for an existing file without `force`, OSError for
        what the file system refuses.
        """
        self.path = Path(path)
        check_page_size(page_size)
        if samples < 1:
            raise ValueError(f"{self.path}: there are no samples to write")
        if not 0 < len(classes) <= beton.MAX_CLASSES or len(set(classes)) != len(classes):
            raise ValueError(f"{self.path}: needs different class names, got {len(classes)}")
        note: dict[str, Any] = {"classes": classes, "options": options}
        note["writer"] = f"backmix {__version__}"
        if shard is not None:
            note["shard"] = shard.note()
        # ASCII only: escapes keep even the half characters of undecodable folder names.
        self._note = json.dumps(note, sort_keys=True, separators=(",", ":")).encode("ascii")
        self._samples = samples
        self._classes = len(classes)
        self._page_size = page_size
        self._force = force
        self._sealed: os.stat_result | None = None
        self._over = False
        self._type_ids = [type_id for _, type_id in FIELDS]
        self._metadata = np.zeros(samples, beton.record_dtype(self._type_ids))
        self._sizes = np.zeros(samples, np.uint64)
        self._hashes = np.zeros(samples, np.uint64)
        self._flags = np.zeros(samples, np.uint32)
        self._own = np.ones(samples, bool)
        self._name_ends = np.zeros(samples + 1, np.uint64)
        self._names = bytearray()
        self._page_hashes: list[int] = []
        self._page = xxhash.xxh3_64()
        self._count = 0
        self._first_page = beton.align_up(self._metadata_start + self._metadata.nbytes, page_size)
        self._end = self._first_page
        self._page_end = self._first_page + page_size

        self._refuse_existing()
        remove_dead_parts(self.path)
        self.part = self.path.with_name(f"{self.path.name}.part-{os.getpid()}")
        self._file = open(self.part, "xb", buffering=1 << 20)
        try:
            self._file.seek(self._first_page)
        except BaseException:
            self.abort()
            raise

    @property
    def _metadata_start(self) -> int:
        return beton.HEADER.itemsize + len(FIELDS) * beton.DESCRIPTOR.itemsize

    def append(self, record: Record) -> None:
        """Store the next sample. On any error of the disk the part file is removed at once."""
        data = memoryview(record.data).cast("B")
        self._check(record, len(data))
        try:
            if self._end + len(data) > self._page_end:
                self._end_page()
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from error
        i = self._count
        self._metadata["f0"][i] = (record.mode, record.width, record.height, self._end)
        self._sizes[i] = len(data)
        self._hashes[i] = xxhash.xxh3_64_intdigest(data)
        self._flags[i] = record.flags
        self._page.update(data)
        self._end += len(data)
        self._add(record.label, record.name)

    def repeat(self, i: int, label: int, name: str) -> None:
        """Add a sample that shows the stored bytes of sample i once more; they take no room again.

        Stock ffcv reads such files, too, but for its orders that go by pages, which leave out
        samples without bytes of their own.
        """
        if not 0 <= i < self._count:
            raise ValueError(
                f"{self.path}: there is no sample {i} to repeat, {self._count} were stored"
            )
        self._check_sample(label, name)
        for column in (self._metadata["f0"], self._sizes, self._hashes, self._flags):
            column[self._count] = column[i]
        self._own[self._count] = False
        self._add(label, name)

    def _add(self, label: int, name: str) -> None:
        self._metadata["f1"][self._count] = label
        # Half characters of undecodable file names become escapes: the names are valid UTF-8.
        self._names += name.encode("utf-8", "backslashreplace")
        self._count += 1
        self._name_ends[self._count] = len(self._names)

    def close(self) -> None:
        """Finish the file and give it its name; everything is on the disk when this returns."""
        self.seal()
        self.publish()

    def seal(self) -> None:
        """Finish the file under the name of its part; everything is on the disk then."""
        if self._file.closed:
            return
        with self._removed_on_errors():
            self._finish()
            self._sealed = os.fstat(self._file.fileno())
            self._check_part()
            self._refuse_existing()
            self._file.close()

    def publish(self) -> None:
        """Give the sealed file its name, in one step, and make the name durable."""
        if self._sealed is None or self._over:
            return
        with self._removed_on_errors():
            self._check_part()
            self._rename()
            self._over = True
            _sync_folder(self.path)

    def withdraw(self) -> None:
        """Take the name away again, unless with `force`: what it stood for before is lost."""
        if self._sealed is not None and not self._force:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path), self._sealed):
                    self.path.unlink()

    def abort(self) -> None:
        """Remove what was written, unless it has its name already."""
        try:
            self._file.close()
        except OSError:  # the last buffer finds no room either
            pass
        self._over = True
        self.part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _removed_on_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failed(error) from error
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _check(self, record: Record, length: int) -> None:
        """Refuse what the reader would refuse, with the sample's name."""
        who = self._check_sample(record.label, record.name)
        if length > self._page_size:
            raise ValueError(
                f"{who} takes {length} bytes and does not fit a page of {self._page_size}: choose "
                f"a page size of {page_size_for(length)} bytes"
            )
        h, w = record.height, record.width
        if not (0 < h <= 65535 and 0 < w <= 65535 and h * w <= beton.MAX_PIXELS):
            raise ValueError(
                f"{who} has {h} x {w} pixels: the format holds sides of 1 to 65535 and "
                f"{beton.MAX_PIXELS} pixels"
            )
        if record.mode not in (beton.JPG, beton.RAW):
            raise ValueError(f"{who} has mode {record.mode}, not 0 (jpg) or 1 (raw)")
        if length == 0 or (record.mode == beton.RAW and length != 3 * h * w):
            raise ValueError(f"{who} of {h} x {w} pixels has {length} bytes")
        if not 0 <= record.flags < 1 << 32:
            raise ValueError(f"{who} has flags {record.flags}, not 32 bits")

    def _check_sample(self, label: int, name: str) -> str:
        """Refuse what no sample may be, whatever its bytes; returns how messages call it."""
        if self._file.closed:
            raise ValueError(f"{self.path}: the writer is closed, no more samples can be added")
        who = f"{self.path}: sample {self._count} ({beton.printable(name)})"
        if self._count == self._samples:
            raise ValueError(f"{who} is one more than the {self._samples} announced")
        if not 0 <= label < self._classes:
            raise ValueError(f"{who} has label {label}, there are {self._classes} classes")
        if len(name) > MAX_NAME or len(name.encode("utf-8", "replace")) > MAX_NAME:
            raise ValueError(f"{who[:200]}... has a name of more than {MAX_NAME} bytes")
        return who

    def _end_page(self) -> None:
        """Fill the page with zeros: stock ffcv reads whole pages only."""
        while self._end < self._page_end:
            zeros = _ZEROS[: self._page_end - self._end]
            self._file.write(zeros)
            self._page.update(zeros)
            self._end += len(zeros)
        self._page_end += self._page_size
        self._page_hashes.append(self._page.intdigest())
        self._page.reset()

    def _finish(self) -> None:
        n = self._count
        if n == 0:
            raise ValueError(f"{self.path}: no sample was stored, the file would be empty")
        self._end_page()
        metadata = self._metadata[:n]
        own = np.flatnonzero(self._own[:n])
        table = np.zeros(len(own), beton.REGION)
        table["sample_id"] = own
        table["ptr"] = metadata["f0"]["data_ptr"][own]
        table["size"] = self._sizes[own]

        tables = {
            "sample_hash": self._hashes[:n],
            "page_hash": np.array(self._page_hashes, np.uint64),
            "flags": self._flags[:n],
            "head_hash": np.zeros(3, np.uint64),
            "size": self._sizes[:n],
            "json": np.frombuffer(self._note, np.uint8),
            "names": np.concatenate(
                [self._name_ends[: n + 1].view(np.uint8), np.frombuffer(self._names, np.uint8)]
            ),
        }
        # The header says where the allocation table starts, and a checksum in the extension before
        # that table covers the header: lay the extension out first, fill in its checksums after.
        length = len(_body(tables))
        head = self._head(n, self._end + length)
        hashes = beton.head_hashes(bytes(head), metadata.view(np.uint8), table.view(np.uint8))
        tables["head_hash"] = np.array(hashes, np.uint64)
        body = _body(tables)
        at = beton.locator_offset(self._type_ids)
        head[at : at + beton.LOCATOR.itemsize] = _locator(self._end, body)

        self._file.write(body)
        self._file.write(table.tobytes())
        self._file.seek(self._metadata_start)
        self._file.write(metadata.tobytes())
        self._file.seek(0)
        self._file.write(head)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _head(self, n: int, table_start: int) -> bytearray:
        """Return header and field descriptors, without the extension's locator."""
        header = np.array(
            (beton.VERSION, len(FIELDS), self._page_size, n, table_start), beton.HEADER
        )
        descriptors = np.zeros(len(FIELDS), beton.DESCRIPTOR)
        for k, (name, type_id) in enumerate(FIELDS):
            descriptors[k]["type_id"] = type_id
            descriptors["name"][k] = name.encode("ascii")
        return bytearray(header.tobytes() + descriptors.tobytes())

    def _check_part(self) -> None:
        """Refuse to give the name to a file that another writer began under our part's name."""
        assert self._sealed is not None
        try:
            ours = os.path.samestat(os.stat(self.part), self._sealed)
        except FileNotFoundError:
            ours = False
        if not ours:
            raise ValueError(
                f"{self.part} is not the file that was written here: another run writes "
                f"{self.path.name}, too; let one of them finish"
            )

    def _rename(self) -> None:
        if self._force:
            os.replace(self.part, self.path)
        else:
            try:
                # Unlike a rename, a link never replaces a file that has appeared meanwhile.
                os.link(self.part, self.path)
            except FileExistsError:
                self._refuse_existing()
                raise
            except OSError:  # a file system without hard links
                self._refuse_existing()
                os.rename(self.part, self.path)
            self.part.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder: name a file to write")
        if not self._force and os.path.lexists(self.path):
            raise ValueError(f"{self.path} exists already: choose another name, or use --force")

    def _failed(self, error: OSError) -> OSError:
        """Remove the part file and return an error that says what failed, and what was missing."""
        if error.errno is None or error.filename is not None:  # it says so itself
            self.abort()
            return error
        written = self._end - self._first_page
        problem = (
            f"{self.path}: {os.strerror(error.errno)} after {self._count} of {self._samples} "
            f"samples and {written} bytes of images"
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            problem += f"; {_free_space(self.path.parent)}: make room or choose another disk"
        self.abort()
        failed = OSError(f"{problem}; nothing was left behind")
        failed.errno = error.errno
        return failed


def _sync_folder(path: Path) -> None:
    """Make the name of `path` durable: a rename alone may be lost when the power fails."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno == errno.EINVAL:  # a file system that syncs no folders
            return
        raise OSError(
            f"{path} is complete, but a power failure may still take it away: its folder could not "
            f"be written through to the disk ({error.strerror})"
        ) from error


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free} bytes are free in {folder}"
    except OSError:
        return f"how much is free in {folder} is unknown"


def _body(tables: dict[str, np.ndarray]) -> bytes:
    """Return the extension block: its head, the directory and the tables, aligned."""
    entries = np.zeros(len(tables), beton.ENTRY)
    body = bytearray(beton.BODY.itemsize + entries.nbytes)
    for k, (name, table) in enumerate(tables.items()):
        body += bytes(beton.align_up(len(body), beton.BODY_ALIGNMENT) - len(body))
        packed = table.tobytes()
        code = table.dtype.str.encode("ascii")
        checksum = xxhash.xxh3_64_intdigest(packed)
        entries[k] = (name.encode("ascii"), code, len(table), len(body), checksum)
        body += packed
    body += bytes(beton.align_up(len(body), beton.BODY_ALIGNMENT) - len(body))
    head = np.array((beton.MAGIC, beton.BODY_VERSION, len(tables)), beton.BODY)
    body[: beton.BODY.itemsize + entries.nbytes] = head.tobytes() + entries.tobytes()
    return bytes(body)


def _locator(start: int, body: bytes) -> bytes:
    """Return the 40 bytes by which a reader finds the extension block."""
    locator = np.array(
        (beton.MAGIC, start, len(body), xxhash.xxh3_64_intdigest(body), 0), beton.LOCATOR
    )
    locator["locator_hash"] = xxhash.xxh3_64_intdigest(locator.tobytes()[:32])
    return locator.tobytes()


def remove_dead_parts(path: Path) -> None:
    """Remove part files of `path` whose writer's process is gone."""
    for part in path.parent.iterdir():
        owner = part.name.removeprefix(f"{path.name}.part-")
        if owner != part.name and owner.isdecimal() and not _runs(int(owner)):
            part.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    if pid == os.getpid():
        # Our own number in front of our own start: a container restarted, where all begin at 1.
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
