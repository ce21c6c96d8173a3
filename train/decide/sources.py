"""What is decided about: files, folders, tars, .beton files and lists of names, as one list.

The list is made before anything is read; an image costs its name, of a .beton not even that. The
text by which an image is named in every output is made so that it can be found again (`name_of`).
"""

import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from backmix.pipeline import shards
from backmix.pipeline.beton import BetonSet, open_set
from backmix.pipeline.images import SUFFIXES
from backmix.pipeline.sources.source import Item, Items, suffix
from backmix.pipeline.sources.tar import tar_members
from backmix.train.image_sets import image_files

STANDARD_INPUT = "-"
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
"""Endings of tars. Compressed ones are refused in words, not taken for images."""
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})|\\(.)", re.S)


@dataclass(frozen=True, eq=False)
class Files:
    """Image files and members of tars, which are read one by one."""

    items: Sequence[Item]
    """Each is made when it is asked for; `name` is the one to print, before `as_text`."""

    def __len__(self) -> int:
        return len(self.items)

    def name(self, i: int) -> str:
        """Return the name of image i: its path, or TAR//MEMBER."""
        return self.items[i].name

    def mark(self, digest: xxhash.xxh3_128) -> None:
        """Add to a digest what makes these images these."""
        for item in self.items:
            place = "" if item.size is None else f"\0{item.offset}\0{item.size}"
            digest.update(f"{item.name}{place}\0\0".encode("utf-8", "surrogateescape"))


@dataclass(frozen=True, eq=False)
class Stored:
    """All samples of a .beton file, or of those that a manifest lists; open until `close`."""

    path: str
    """As it was given."""
    data: BetonSet

    def __len__(self) -> int:
        return self.data.n

    def name(self, i: int) -> str:
        """Return the name of sample i: FILE//NAME, and `sample I` where none is stored."""
        return f"{self.path}//{self.data.name(i)}"

    def mark(self, digest: xxhash.xxh3_128) -> None:
        """Add to a digest what makes these images these."""
        name = self.path.encode("utf-8", "surrogateescape")
        digest.update(b"%s\0%s\0\0" % (name, self.data.digest.encode()))


@dataclass(frozen=True, eq=False)
class Images:
    """Everything to decide about, in order; `with` closes the .beton files."""

    parts: tuple[Files | Stored, ...]
    """None of them empty, and no two neighbours both `Files`."""
    starts: tuple[int, ...]
    """Of each part: the images before it."""

    def __len__(self) -> int:
        return self.starts[-1] + len(self.parts[-1])

    def text(self, i: int) -> str:
        """Return the text that names image i in every output."""
        k = bisect_right(self.starts, i) - 1
        return as_text(self.parts[k].name(i - self.starts[k]))

    def digest(self) -> str:
        """Return what identifies the list: names, order, places in tars, .beton files' digests.

        Goes through all of it.
        """
        digest = xxhash.xxh3_128()
        for part in self.parts:
            part.mark(digest)
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the .beton files."""
        for part in self.parts:
            if isinstance(part, Stored):
                part.data.close()

    def __enter__(self) -> "Images":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def find_images(sources: Sequence[str], stdin: BinaryIO | None = None) -> Images:
    """List the images of all sources, in the order given.

    Args:
        sources: image files (whatever their names end in), folders with all their subfolders (by
            relative path; hidden files and those without an image's ending are passed over), plain
            tars (likewise, in stored order), .beton files or manifests, and `-`: the names of image
            files on standard input.
        stdin: standard input.

    Raises:
        ValueError: nothing to decide about, or a source that is no such thing.
        OSError: a source that is not there or cannot be listed.
    """
    if not sources:
        raise ValueError("nothing to decide about: name images, folders, tars or .beton files")
    if list(sources).count(STANDARD_INPUT) > 1:
        raise ValueError("- stands for standard input, which can be read once only")
    parts: list[Files | Stored] = []
    files: list[Sequence[Item]] = []  # neighbours, which become one part: whole batches of them
    try:
        for source in sources:
            found = _open(source, stdin)
            if isinstance(found, Stored):
                _close(files, parts)
                parts.append(found)
            if not len(found):
                raise ValueError(_empty(source))
            if not isinstance(found, Stored):
                files.append(found)
        _close(files, parts)
        counts = [0, *(len(part) for part in parts[:-1])]
        return Images(tuple(parts), tuple(np.cumsum(counts).tolist()))
    except BaseException:
        Images(tuple(parts), ()).close()
        raise


def _close(files: list[Sequence[Item]], parts: list[Files | Stored]) -> None:
    """Make one part of neighbouring files."""
    if files:
        parts.append(Files(_chain(_paths_joined(files))))
        files.clear()


def _open(source: str, stdin: BinaryIO | None) -> Sequence[Item] | Stored:
    if source == STANDARD_INPUT:
        return _Paths(_names(stdin.read() if stdin else b""))
    if not os.path.lexists(source):
        raise ValueError(f"there is no {source}")
    if os.path.isdir(source):
        return _Paths([os.path.join(source, item.name) for item in image_files(Path(source))])
    if suffix(source) == ".beton" or shards.is_manifest(source):
        # Shards may come one by one, as a shell's `*` gives them.
        return Stored(source, open_set([source], partial=True))
    if source.lower().endswith(_TARS):
        return _members(source)
    return _Paths([source])


def _empty(source: str) -> str:
    if source == STANDARD_INPUT:
        return "standard input (-) names no file: write one name a line"
    if os.path.isdir(source):
        return f"no image in {source} or its subfolders"
    return f"{source} holds no images"


class _Paths(Items):
    """Files by their paths, which are their names."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(len(paths), lambda i: Item(paths[i], -1, paths[i]))
        self.paths = paths


def _paths_joined(several: Sequence[Sequence[Item]]) -> list[Sequence[Item]]:
    """Return sequences with neighbouring paths made one: a shell's `*` names files one by one."""
    joined: list[Sequence[Item]] = []
    for one in several:
        if joined and isinstance(one, _Paths) and isinstance(last := joined[-1], _Paths):
            last.paths.extend(one.paths)
            joined[-1] = _Paths(last.paths)
        else:
            joined.append(one)
    return joined


def _chain(several: Sequence[Sequence[Item]]) -> Sequence[Item]:
    starts = np.cumsum([0, *map(len, several)]).tolist()

    def make(i: int) -> Item:
        k = bisect_right(starts, i) - 1
        return several[k][i - starts[k]]

    return Items(starts[-1], make) if len(several) > 1 else several[0]


def _names(listed: bytes) -> list[str]:
    """Return the file names of standard input: one a line, or NUL after each where there are NULs.

    Empty ones are passed over. Line ends may be Windows'; a name that ends so needs NULs.
    """
    if b"\0" in listed:
        return [os.fsdecode(name) for name in listed.split(b"\0") if name]
    lines = listed.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")
    return [os.fsdecode(line) for line in lines if line]


def _members(path: str) -> Sequence[Item]:
    """List the images of a tar in stored order; of several members of a name the last counts."""
    if not os.path.isfile(path):  # opening a pipe would wait for its writer
        raise ValueError(f"{path} is not a file")
    found: dict[str, tuple[int, int]] = {}
    for member in tar_members(path):
        hidden = any(part.startswith(".") for part in member.name.split("/"))
        if member.kind == "file" and suffix(member.name) in SUFFIXES and not hidden:
            found.pop(member.name, None)
            found[member.name] = (member.offset, member.size)
    names = list(found)
    places = np.array(list(found.values()), np.int64).reshape(-1, 2)

    def make(i: int) -> Item:
        offset, size = places[i].tolist()
        return Item(f"{path}//{names[i]}", -1, path, offset, size)

    return Items(len(names), make)


def as_text(name: str) -> str:
    r"""Return a name as text that every format can hold.

    Names are kept as they are, whatever characters they hold, but for those whose bytes are no
    UTF-8: they are quoted as bash reads it and `ls` prints it, `$'caf\xe9.jpg'`, with `\\` and `\'`
    for backslash and quote. A name that begins with `$'` itself is quoted, too.

    >>> as_text("a, b.jpg"), as_text("caf\udce9.jpg")
    ('a, b.jpg', "$'caf\\xe9.jpg'")
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        pass
    else:
        if not name.startswith("$'"):
            return name
    return "$'" + "".join(map(_escaped, name)) + "'"


def _escaped(c: str) -> str:
    if "\udc80" <= c <= "\udcff":  # a byte that is no UTF-8, as Python holds it in names
        return f"\\x{ord(c) - 0xDC00:02x}"
    return f"\\{c}" if c in "\\'" else c


def name_of(text: str) -> str:
    """Return the name that `as_text` made a text of.

    >>> name_of(as_text("caf\udce9 '1'.jpg")) == "caf\udce9 '1'.jpg"
    True
    """
    if not (text.startswith("$'") and text.endswith("'") and len(text) > 2):
        return text

    def restored(escape: re.Match[str]) -> str:
        return chr(0xDC00 + int(escape[1], 16)) if escape[1] else escape[2]

    return _ESCAPE.sub(restored, text[2:-1])
