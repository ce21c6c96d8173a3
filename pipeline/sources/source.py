"""What every source is made of: the listed images, and the tools of the modules that list them."""

import glob
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

from backmix.pipeline import images

_MAX_NOTED = 5
_MAX_TEXT = 1 << 30  # a list of names or labels [bytes]
_MAX_FILES = 100_000  # that one pattern may name
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source: its pixels, or where its bytes are."""

    name: str
    """Path inside the source, `/` between the parts."""
    label: int
    """Position in the source's class list."""
    path: str = ""
    """File that holds the bytes; empty where the pixels are here."""
    offset: int = 0
    size: int | None = None
    """Bytes from `offset`; None = the whole file."""
    pixels: np.ndarray | None = None
    """uint8 [h, w, 3] RGB."""
    listed: str = ""
    """Where a list names it, for messages: file and line."""

    def read(self, limit: int | None = None) -> bytes:
        """Return the encoded image, or its first `limit` bytes.

        Raises:
            ValueError: it is no regular file, or larger than `images.MAX_BYTES`.
            OSError: the file cannot be read, or is shorter than it was.
        """
        # Before it is opened: that would wait for ever for the other end of a pipe.
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise ValueError("it is not a regular file")
        with open(self.path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size if self.size is None else self.size
            if size > images.MAX_BYTES:
                raise ValueError(f"{size:,} bytes; images may have {images.MAX_BYTES:,} at most")
            wanted = size if limit is None else min(size, limit)
            data = os.pread(file.fileno(), wanted, self.offset)
        if len(data) < wanted:
            raise OSError(f"{self.path} ends before byte {self.offset + wanted}")
        return data


@dataclass(frozen=True)
class Source:
    """A listed source."""

    spec: str
    """As the user wrote it."""
    classes: list[str]
    items: Sequence[Item]
    """In the order in which they are stored; each Item is made when it is asked for."""
    notes: list[str] = field(default_factory=list)
    """What was found and not taken, and classes without images: sentences for people."""
    in_memory: bool = False
    """The items carry pixels; nothing is left to read or decode."""
    files: Sequence[str] = ()
    """Archives, tables and lists that it was listed from."""
    stream: Callable[[], Iterator[bytes | None]] | None = None
    """Where images cannot be read one by one (`Item.read` will not do): starts reading the encoded
    images in the order of the items, from the first; None stands for one that is not there. An
    error of the stream is an error of the file, not of one image."""


class Items(Sequence[Item]):
    """Items that are made when asked for: a million of them cost their names and some arrays."""

    def __init__(self, count: int, make: Callable[[int], Item]) -> None:
        """Hold `count` items, the i-th of which is `make(i)`."""
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"item {index} of {self._count}")
        return self._make(index % self._count)


def split_part(rest: str, parts: tuple[str, ...]) -> tuple[str, str]:
    """Split DIR//PART; the first of `parts` where none is named."""
    folder, slashes, part = rest.rpartition("//")
    if not slashes:
        return rest, parts[0]
    if part not in parts:
        raise ValueError(f"{rest}: no part {part!r}; write DIR//{' or DIR//'.join(parts)}")
    return folder, part


def split_file(rest: str) -> tuple[str, str]:
    """Split FILE//MORE at the first `//` that ends the name of a file."""
    at = rest.find("//")
    while at >= 0:
        if os.path.isfile(rest[:at]):
            return rest[:at], rest[at + 2 :]
        at = rest.find("//", at + 1)
    return rest.partition("//")[0] if not os.path.isfile(rest) else rest, ""


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, whose ends may be Windows', too."""
    if path.stat().st_size > _MAX_TEXT:
        raise ValueError(f"{path} has more than {_MAX_TEXT:,} bytes; that is no list")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    # Not splitlines(): file names may hold what it takes for the end of a line.
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return [] if lines == [""] else lines


def expand_files(pattern: str, what: str) -> list[str]:
    """Return the files that a pattern names, in its order.

    Args:
        pattern: the name of a file, or with `{000..019}` and `{a,b}` (every one must be there)
            and `*`, `?`, `[...]` (sorted by name).
        what: of the files, in the singular, for messages.
    """
    if os.path.isfile(pattern):
        return [pattern]
    files: list[str] = []
    for name in _expand_braces(pattern):
        if os.path.isfile(name):
            files.append(name)
        elif found := [path for path in sorted(glob.glob(name)) if os.path.isfile(path)]:
            files += found
        else:
            hint = f"; it is a folder: write {name}/*" if os.path.isdir(name) else ""
            of = f", of {pattern}" if name != pattern else ""
            raise ValueError(f"there is no {what} {name}{of}{hint}")
        if len(files) > _MAX_FILES:
            raise ValueError(f"{pattern} names more than {_MAX_FILES:,} files")
    return files


def _expand_braces(pattern: str) -> Iterator[str]:
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    bounds = _RANGE.fullmatch(found[1])
    if bounds:
        first, last = bounds.groups()
        step = 1 if int(first) <= int(last) else -1
        width = len(first) if first.startswith("0") or last.startswith("0") else 0
        numbers = range(int(first), int(last) + step, step)
        if len(numbers) > _MAX_FILES:
            raise ValueError(f"{pattern} names more than {_MAX_FILES:,} files")
        words = [f"{number:0{width}}" for number in numbers]
    elif "," in found[1]:
        words = found[1].split(",")
    else:
        raise ValueError(f"{pattern}: {found[0]} is neither {{FIRST..LAST}} nor {{ONE,OTHER}}")
    for word in words:
        yield from _expand_braces(pattern[: found.start()] + word + pattern[found.end() :])


def suffix(name: str) -> str:
    """Return the ending of a file's name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def note(what: str, names: Sequence[str]) -> list[str]:
    """Return the sentence that tells which names there are; none where there are none."""
    return [f"{what}, {len(names)}: {some(names)}"] if names else []


def some(names: Sequence[str]) -> str:
    """Return the first names for a message, and how many there are."""
    more = f", ... ({len(names)} in all)" if len(names) > _MAX_NOTED else ""
    return ", ".join(repr(name) for name in names[:_MAX_NOTED]) + more
