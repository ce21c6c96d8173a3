"""Rows of a prediction that goes on: appended batch by batch, so that nothing done is done twice.

OUT.part holds a line of JSON for each image decided about, in order; OUT.part.json says what they
belong to. Killed at any time, even by a power failure, it is cut back to the last batch that is
whole, and the rest is done again: batches lie at fixed places, so that the numbers are the same.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from backmix.train.checkpoint import sync_folder, write_atomically
from backmix.train.decide.decision import COLUMNS
from backmix.train.decide.rows import Row, as_line

SCHEMA = 1
SYNC_SECONDS = 1.0
"""Seconds between two waits for the disk: so much work a power failure costs at most."""
_WORDS = {
    "record": "another threshold",
    "images": "another list of images",
    "batch": "another --batch",
    "limit_pixels": "another --limit-pixels",
    "schema": "another version of backmix",
}
"""What has changed where two journals differ in a value."""


class Journal:
    """The rows of one output so far; a context manager, held by one process."""

    def __init__(
        self,
        out: Path,
        belongs: Mapping[str, Any],
        ends: np.ndarray,
        text: Callable[[int], str],
    ) -> None:
        """Open, and continue where rows are there.

        Args:
            out: the file that the rows are for.
            belongs: what they belong to: `record`, `images`, `batch`, `limit_pixels`.
            ends: int64, ascending: the number of images up to the end of each batch.
            text: returns the name of an image by its number.

        Raises:
            ValueError: the rows that are there belong to something else, or another process is
                writing them.
            OSError: a file cannot be read or written.
        """
        self.path = out.with_name(out.name + ".part")
        self._note = out.with_name(out.name + ".part.json")
        self._out = out
        self.rows = 0
        """Rows that are in the file."""
        self._length = 0
        self._synced = time.monotonic()
        self._descriptor = self._held()
        try:
            self._begin({"schema": SCHEMA, **belongs}, ends, text)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _held(self) -> int:
        """Open the file and lock it; the kernel's lock goes with the process, however it ends."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise ValueError(
                    f"{self._out} is being written by another process (it holds {self.path}): wait "
                    "for it, or choose another -o"
                ) from None
            except OSError:  # a file system without locks
                return descriptor
            # Whoever held it before may have finished and removed it meanwhile.
            try:
                if os.path.samestat(os.stat(self.path), os.fstat(descriptor)):
                    return descriptor
            except FileNotFoundError:
                pass
            os.close(descriptor)

    def _begin(self, belongs: dict[str, Any], ends: np.ndarray, text: Callable[[int], str]) -> None:
        if os.fstat(self._descriptor).st_size:
            self._refuse_others(belongs)
            self.rows, self._length = _whole_batches(self.path, ends, text)
            os.ftruncate(self._descriptor, self._length)
        else:  # also left empty by a process killed between the two files
            write_atomically(self._note, (json.dumps(belongs) + "\n").encode())

    def _refuse_others(self, belongs: Mapping[str, Any]) -> None:
        try:
            there = json.loads(self._note.read_bytes())
            changed = [name for name in belongs if there[name] != belongs[name]]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            changed = [""]
        if changed:
            what = " and ".join(_WORDS.get(name, "something else") for name in changed)
            raise ValueError(
                f"{self.path} holds the rows of a prediction that was not finished, of {what}: "
                f"delete {self.path}, or choose another -o"
            )

    def append(self, rows: Sequence[Row]) -> None:
        """Add the rows of one batch, in one piece.

        Raises:
            OSError: naming the file; what was there before is kept.
        """
        data = "".join(map(as_line, rows)).encode()
        try:
            written = os.pwrite(self._descriptor, data, self._length)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                self.sync()
        except OSError as error:
            os.ftruncate(self._descriptor, self._length)
            raise OSError(
                error.errno,
                f"cannot write {self.path}: {error.strerror}; {self.rows:,} rows are kept, the "
                "same command goes on",
            ) from error
        self._length += written
        self.rows += len(rows)

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        os.fsync(self._descriptor)
        self._synced = time.monotonic()

    def read(self) -> Iterator[Row]:
        """Yield all rows from the first."""
        with open(self.path, "rb") as file:
            for _ in range(self.rows):
                yield json.loads(file.readline())

    def remove(self) -> None:
        """Remove both files: the rows are elsewhere now."""
        os.ftruncate(self._descriptor, 0)  # without rows the note means nothing
        self._note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)  # last: the lock goes with it, and the next may begin
        sync_folder(self.path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._length:
            self.remove()
        os.close(self._descriptor)


def _whole_batches(path: Path, ends: np.ndarray, text: Callable[[int], str]) -> tuple[int, int]:
    """Return the rows and bytes of all batches that are whole, up to the first damage."""
    rows = at = 0
    following = iter(ends.tolist())
    end = next(following, None)
    kept = (0, 0)
    with open(path, "rb") as file:
        for line in file:
            if end is None or not _is_row(line, text(rows)):
                break
            rows, at = rows + 1, at + len(line)
            if rows == end:
                kept = rows, at
                end = next(following, None)
    return kept


def _is_row(line: bytes, file: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return False
    return (
        line.endswith(b"\n")
        and isinstance(row, dict)
        and tuple(row) == COLUMNS
        and row["file"] == file
    )
