"""A text file with a line per image: its path, a space or a tab, its label.

OpenOOD's image lists are such files: numbers for labels, paths with spaces among them.
"""

import os
from pathlib import Path

import numpy as np

from backmix.pipeline.sources.classes import by_name, by_number, check_class_name
from backmix.pipeline.sources.source import Item, Items, Source, note, read_lines, split_file
from backmix.pipeline.writer import MAX_NAME


def open_list(spec: str, rest: str, classes: list[str] | None) -> Source:
    """List `list:FILE` or `list:FILE//ROOT`."""
    file, root = split_file(rest)
    if not os.path.isfile(file):
        raise ValueError(f"{file} is not a file; write list:FILE, or list:FILE//ROOT")
    if not root:
        root = "/" if rest.endswith("///") else os.path.dirname(file) or "."
    if not os.path.isdir(root):
        raise ValueError(f"{root} is not a folder; list:FILE//ROOT: the paths count from ROOT")
    root = root.rstrip("/")
    names: list[str] = []
    words: list[str] = []
    numbers: list[int] = []  # of the lines
    first: dict[str, int] = {}
    repeated: list[str] = []
    for number, line in enumerate(read_lines(Path(file)), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        path, word = _fields(line, where)
        name = _below(path, root, where)
        before = first.setdefault(name, len(names))
        if before < len(names):
            if words[before] != word:
                raise ValueError(
                    f"{where}: {name} has the label {word}, but {words[before]} in line "
                    f"{numbers[before]}"
                )
            repeated.append(name)
        names.append(name)
        words.append(word)
        numbers.append(number)
    if not names:
        raise ValueError(f"{file} names no image; write a path and a label a line")
    counted = [_is_number(word) for word in words]
    if 2 * sum(counted) > len(words) and not all(counted):
        i = counted.index(False)
        raise ValueError(
            f"{file}, line {numbers[i]}: the label {words[i]!r} is no class number, but most are; "
            "as names, all classes would be numbered anew, in the order of their sorted names"
        )
    if all(counted):
        stored = np.array([int(word) for word in words], np.int64)
        labels, known, notes = by_number(stored, classes, lambda i: f"{file}, line {numbers[i]}")
    else:
        for i, word in enumerate(words):
            check_class_name(word, f"{file}, line {numbers[i]}")
        found = sorted(set(words))
        place = {word: k for k, word in enumerate(found)}
        labels, known, notes = by_name(
            np.array([place[word] for word in words], np.int64), found, classes, file
        )
    notes += note("image listed more than once and stored as often", repeated)

    def make(i: int) -> Item:
        where = f"{file}, line {numbers[i]}"
        return Item(names[i], int(labels[i]), f"{root}/{names[i]}", listed=where)

    return Source(spec, known, Items(len(names), make), notes, files=[file])


def _fields(line: str, where: str) -> tuple[str, str]:
    """Return path and label: split at the last tab if there is one, else at the last blank."""
    path, tab, word = line.rstrip().rpartition("\t")
    if not tab:
        path, _, word = line.rstrip().rpartition(" ")
    if not path.strip() or not word.strip():
        raise ValueError(f"{where}: expected a path, a space or a tab, and a label; got {line!r}")
    return path.strip(), word.strip()


def _below(path: str, root: str, where: str) -> str:
    """Return a listed path as one below the root."""
    name = path
    if path.startswith("/"):
        if not path.startswith(f"{root}/"):
            raise ValueError(
                f"{where}: {path} does not lie below {root or '/'}; name the folder that all paths "
                "begin with: list:FILE//ROOT"
            )
        name = path.removeprefix(f"{root}/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name or not parts:
        raise ValueError(f"{where}: {path!r} is no path below {root or '/'}")
    name = "/".join(parts)
    if len(os.fsencode(name)) > MAX_NAME:
        raise ValueError(f"{where}: a path of more than {MAX_NAME} bytes")
    return name


def _is_number(word: str) -> bool:
    digits = word.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) <= 18
