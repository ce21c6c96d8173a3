"""Class lists: read from a file, made of the folders that are there, or of numbers alone."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from backmix.pipeline import images
from backmix.pipeline.beton import MAX_CLASSES
from backmix.pipeline.sources.source import note, read_lines, some, suffix

MAX_CLASS_NAME = 255
"""Longest class name [bytes of UTF-8]."""
UNKNOWN = "unknown"
"""The class of images whose list gives all of them the label -1."""


def read_classes(path: Path) -> list[str]:
    """Read a class list: one name a line, UTF-8, empty lines left out.

    Raises:
        ValueError: no names, a name twice, or a name that cannot be one.
    """
    names = [line.strip() for line in read_lines(path) if line.strip()]
    if not names:
        raise ValueError(f"{path} names no class; write one class name a line")
    check_class_names(names, str(path))
    return names


def check_class_names(names: Sequence[str], where: str) -> None:
    """Raise ValueError for a class name that cannot be one, or is there twice."""
    for name in names:
        check_class_name(name, where)
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"{where} names a class twice: {some(twice)}")


def check_class_name(name: str, where: str) -> None:
    """Raise ValueError for a class name that cannot be one."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{where}: the class name {name!r} is not valid UTF-8") from None
    if size > MAX_CLASS_NAME:
        raise ValueError(f"{where}: the class name {name[:60]!r}... is longer than 255 bytes")
    if not name.isprintable():
        raise ValueError(f"{where}: the class name {name!r} holds characters that do not print")
    if not name.strip():
        raise ValueError(f"{where}: a class name is empty")


def class_list(found: list[str], wanted: list[str] | None, where: str) -> list[str]:
    """Return the class list: `wanted` if it covers all that was found, or what was found."""
    if wanted is None:
        return found
    foreign = sorted(set(found) - set(wanted))
    if len(foreign) == len(found):
        raise ValueError(
            f"the class list ({some(wanted)}) names none of the classes in {where} ({some(found)})"
        )
    if foreign:
        raise ValueError(
            f"{where} holds classes that the class list does not name: {some(foreign)}; add them "
            "to the list, or take their images away"
        )
    return wanted


def by_name(
    stored: np.ndarray, names: list[str], wanted: list[str] | None, where: str
) -> tuple[np.ndarray, list[str], list[str]]:
    """Return labels, class list and notes where label k of the source means `names[k]`.

    Args:
        stored: int64 [n], the source's own labels, each a position in `names`.
        names: the source's class list.
        wanted: the class list asked for; it has to name the classes that have images.
        where: the source, for messages.
    """
    counts = np.bincount(stored, minlength=len(names))
    present = [name for name, count in zip(names, counts, strict=True) if count]
    known = names if wanted is None else class_list(present, wanted, where)
    place = {name: k for k, name in enumerate(known)}
    labels = np.array([place.get(name, -1) for name in names], np.int64)[stored]
    held = set(present)
    return labels, known, note("class without images", [name for name in known if name not in held])


def by_number(
    stored: np.ndarray, wanted: list[str] | None, where: Callable[[int], str]
) -> tuple[np.ndarray, list[str], list[str]]:
    """Return labels, class list and notes where a source knows its classes by number only.

    The names are the numbers, or those of the list that was asked for, in its order. Images that
    all have the label -1 are of one class, `unknown`.

    Args:
        stored: int64 [n], n > 0, the source's labels.
        wanted: the class list asked for.
        where: says where label i stands, for messages.
    """
    low, high = int(stored.min()), int(stored.max())
    if low == high == -1:
        return by_name(np.zeros_like(stored), [UNKNOWN], wanted, where(0))
    if low < 0:
        i = int(np.argmax(stored < 0))
        raise ValueError(
            f"{where(i)}: label {stored[i]} beside others that are not negative; keep images "
            "without a class in a source of their own"
        )
    most = MAX_CLASSES if wanted is None else len(wanted)
    if high >= most:
        i = int(np.argmax(stored >= most))
        what = f"at most {most:,} classes" if wanted is None else f"the class list names {most:,}"
        raise ValueError(f"{where(i)}: label {stored[i]}, but {what}, counted from 0")
    names = wanted if wanted is not None else [str(k) for k in range(high + 1)]
    return by_name(stored, names, wanted, where(0))


class Listing:
    """Collects the files of class folders; says in the end what it took and what it left."""

    def __init__(self, where: str) -> None:
        """Begin the listing of the source that messages name as `where`."""
        self.where = where
        self.ignored: list[str] = []
        self._names: dict[str, list[str]] = {}

    def add_class(self, name: str) -> None:
        """Take a class, which may be known already."""
        if name not in self._names:
            check_class_name(name, self.where)
            self._names[name] = []

    def add(self, class_name: str, path: str) -> None:
        """Take a file of a class if its name is an image's."""
        if suffix(path) in images.SUFFIXES:
            self._names[class_name].append(path)
        else:
            self.ignored.append(path)

    def finish(
        self, wanted: list[str] | None
    ) -> tuple[list[str], np.ndarray, list[str], list[str]]:
        """Return names in stored order, their labels, the class list and the notes.

        Args:
            wanted: the class list asked for. A class of it may have no images, and a folder that it
                does not name may have none; without a list, a folder without images is an error.
        """
        if not any(self._names.values()):
            seen = f" ({len(self.ignored)} other files, such as {some(self.ignored)})"
            raise ValueError(
                f"{self.where} holds no images in class folders{seen if self.ignored else ''}; "
                f"files are taken by their endings: {' '.join(sorted(images.SUFFIXES))}"
            )
        empty = sorted(name for name, files in self._names.items() if not files)
        if empty and wanted is None:
            # As a class it could not be trained on; left out, it would number the others anew.
            raise ValueError(
                f"{self.where} has class folders without images: {some(empty)}; take them away, or "
                "name the classes with --classes FILE, which then may have none"
            )
        found = sorted(name for name, files in self._names.items() if files)
        classes = class_list(found, wanted, self.where)
        notes = note("class without images", [c for c in classes if not self._names.get(c)])
        notes += note("file left out (no image by its ending)", self.ignored)
        names: list[str] = []
        counts: list[int] = []
        for class_name in classes:
            found = sorted(self._names.pop(class_name, []))
            counts.append(len(found))
            names += found
        return names, np.repeat(np.arange(len(classes)), counts), classes, notes
