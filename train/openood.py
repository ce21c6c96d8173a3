"""Published benches of out-of-distribution detection, read from where their files lie.

OpenOOD v1.5 (Zhang et al., 2023; github.com/Jingkang50/OpenOOD): a folder with `benchmark_imglist`,
whose lists name the images of every set, `images_classic` and `images_largescale`. A line of a list
is a path, a space, and a class number; -1 = unknown. SSOD's benches (Pei, 2023): folders or .beton
files of known names. What sets there are, of how many images, stands in `benchmarks.json`.

Class number k is the k-th of the benchmark's classes: CIFAR in its official order, which is that of
the alphabet; ImageNet by the sorted WordNet ids, ImageNet-200 being the 200 classes of ImageNet-R.

No list is trusted: paths stay below their folder, every image is listed once, numbers are those of
the benchmark's classes. Where a path names a class, as CIFAR's and ImageNet-R's do, it must be that
of the number. Damaged and missing images are found when they are read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from backmix.pipeline.sources.source import Item, read_lines

LISTS = "benchmark_imglist"
KNOWN_SET = "known"
_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"-?\d{1,9}")


@dataclass(frozen=True)
class Listed:
    """The images of one list."""

    name: str
    group: str
    """near, far, csid (known images under shift), or nothing for the known test set."""
    items: Sequence[Item]
    """With their positions in the run's class list, or -1."""
    share: float
    """Views are the central square of this share of the resized image's shorter side."""


@dataclass(frozen=True)
class Found:
    """What there is of a benchmark."""

    sets: tuple[Listed, ...]
    """The known test set first."""
    missing: Mapping[str, str]
    """Sets that are not there, and why."""
    notes: tuple[str, ...]
    """What differs from the published benchmark: sentences for people."""


def benchmark_for(classes: Sequence[str]) -> str:
    """Return the OpenOOD benchmark whose number of known classes is the run's.

    Raises:
        ValueError: there is none.

    >>> benchmark_for([str(k) for k in range(200)])
    'imagenet200'
    """
    numbers = {benchmark["number"]: name for name, benchmark in _table()["openood"].items()}
    if len(classes) not in numbers:
        there = ", ".join(f"{name} {number}" for number, name in numbers.items())
        raise ValueError(
            f"the run knows {len(classes)} classes, but OpenOOD's benchmarks have {there}: they "
            "are for networks trained on all classes of their known set"
        )
    return numbers[len(classes)]


def find_openood(root: Path, name: str, classes: Sequence[str], view: int) -> Found:
    """Read the lists of an OpenOOD benchmark.

    Args:
        root: folder with `benchmark_imglist` and the image folders.
        name: cifar10, cifar100, imagenet200 or imagenet.
        classes: of the run, in label order; they must be the benchmark's.
        view: side of the run's views [pixels].

    Raises:
        ValueError: a list that is damaged, naming the line; other classes; no known test set.
    """
    benchmark = _table()["openood"][name]
    labels, notes = _run_labels(name, classes)
    lists = root / LISTS / name
    if not lists.is_dir():
        raise ValueError(
            f"--openood {root}: there is no {lists}; the folder of OpenOOD's data holds {LISTS}/, "
            "images_classic/ and images_largescale/ side by side"
        )
    if view != benchmark["view"]:
        notes.append(
            f"OpenOOD's views for {name} have {benchmark['view']} px, those of this run {view}"
        )
    sets, missing = [], {}
    for entry in benchmark["sets"]:
        path, folder = lists / f"{entry['list']}.txt", root / entry["folder"]
        what = f"{entry['name']} ({entry['group']})" if entry["group"] else "the known test set"
        if not path.is_file():
            missing[entry["name"]] = f"there is no {path}"
            continue
        known = entry["group"] in ("", "csid")
        items = read_list(path, folder, labels if known else None, classes)
        if not any(Path(item.path).exists() for item in items):
            missing[entry["name"]] = (
                f"none of the {len(items):,} images of {path} is there, such as {items[0].path}"
            )
            continue
        if entry["images"] not in (None, len(items)):
            notes.append(
                f"{what}: {path.name} lists {len(items):,} images, the published list "
                f"{entry['images']:,}"
            )
        share = entry.get("share", benchmark["share"])
        sets.append(Listed(entry["name"], entry["group"], items, share))
    if KNOWN_SET in missing:
        raise ValueError(
            f"--openood {root}: the known test set of {name} is missing: {missing[KNOWN_SET]}"
        )
    return Found(tuple(sets), missing, tuple(notes))


def read_list(
    path: Path, folder: Path, labels: Sequence[int] | None, classes: Sequence[str] = ()
) -> list[Item]:
    """Read one list.

    Args:
        path: the list.
        folder: what its paths count from.
        labels: the run's label of every class number; None = all images are unknown, and so must
            the list say.
        classes: names of the run's labels, for the check against the paths.

    Raises:
        ValueError: naming the line and what is wrong with it.
    """
    items: list[Item] = []
    lines: dict[str, int] = {}
    # Classes that are called 0, 1, ... would be found in paths that mean something else.
    names = {} if labels is None else {c: k for k, c in enumerate(classes) if not c.isdigit()}
    below = str(folder)
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        written, _, word = line.strip().partition(" ")
        if not _NUMBER.fullmatch(word.strip()):
            raise ValueError(
                f"{where}: expected a path, a space and a class number, got {line.strip()!r}"
            )
        parts = [part for part in written.split("/") if part not in ("", ".")]
        if written.startswith("/") or ".." in parts or "\0" in written or not parts:
            raise ValueError(f"{where}: {written!r} is no path below {folder}")
        name = "/".join(parts)
        if lines.setdefault(name, number) != number:
            raise ValueError(f"{where}: {name} again, which line {lines[name]} lists already")
        label = _label(int(word), labels, where)
        for part in parts[:-1]:
            if names.get(part, label) != label:
                raise ValueError(
                    f"{where}: class number {word.strip()} is {classes[label]}, but the path says "
                    f"{part}"
                )
        items.append(Item(name, label, f"{below}/{name}", listed=where))
    if not items:
        raise ValueError(f"{path} lists no image")
    return items


def _label(number: int, labels: Sequence[int] | None, where: str) -> int:
    if labels is None:
        if number != -1:
            raise ValueError(
                f"{where}: class number {number} in a list of unknown images, whose number is -1"
            )
        return -1
    if not 0 <= number < len(labels):
        raise ValueError(
            f"{where}: class number {number}, but there are the classes 0 .. {len(labels) - 1}"
        )
    return labels[number]


def _run_labels(name: str, classes: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return the run's label of every class number of a benchmark, and what is to be said of it."""
    benchmark = _table()["openood"][name]
    count, official = benchmark["number"], benchmark["classes"]
    if len(classes) != count:
        raise ValueError(
            f"OpenOOD's {name} has {count} known classes, the run {len(classes)}: a benchmark is "
            "for networks trained on all classes of its known set"
        )
    place = {written: label for label, written in enumerate(classes)}
    wnids = all(_WNID.fullmatch(written) for written in classes)
    orders = [
        [str(k) for k in range(count)],  # of a set converted from OpenOOD's own list
        official or (sorted(classes) if wnids else []),
    ]
    for order in orders:
        if set(order) == place.keys():
            return [place[written] for written in order], []
    if wnids or name.startswith("cifar"):
        strange = [written for written in classes if written not in official]
        raise ValueError(
            f"the run's classes are not those of OpenOOD's {name} ({', '.join(official[:5])}, "
            f"...): {', '.join(strange[:5])} are none of them"
        )
    return list(range(count)), [
        f"the run's classes are not called by WordNet ids: number k of OpenOOD's {name} was taken "
        f"for the run's class k, {classes[0]} for 0"
    ]


def find_bench(root: Path, name: str) -> tuple[dict[str, tuple[Path, str]], dict[str, str]]:
    """Find the sets of one of SSOD's benches by the names of folders and .beton files.

    Upper case, hyphens and blanks in the names do not matter.

    Args:
        root: folder that holds them side by side.
        name: ssod-cifar10 or ssod-imagenet.

    Returns path and group by the set's name, and why the others are missing.

    Raises:
        ValueError: no such folder, two candidates for a set, or none for any.
    """
    if not root.is_dir():
        raise ValueError(f"--bench {name} {root}: there is no such folder")
    there: dict[str, list[Path]] = {}
    for path in sorted(root.iterdir()):
        if path.is_dir() or path.suffix == ".beton":
            plain = re.sub(r"[-_ ]", "", path.name.removesuffix(".beton").lower())
            there.setdefault(plain, []).append(path)
    found, missing = {}, {}
    for entry in _table()["benches"][name]:
        wanted = [word.replace("_", "") for word in entry["folders"]]
        paths = [path for word in wanted for path in there.get(word, [])]
        if len(paths) > 1:
            raise ValueError(
                f"--bench {name} {root}: {', '.join(path.name for path in paths)} could each be "
                f"the set {entry['name']}; name one with --unknown {entry['name']}=PATH instead"
            )
        if paths:
            found[entry["name"]] = paths[0], entry["group"]
        else:
            missing[entry["name"]] = f"{root} has no folder or .beton called {entry['folders'][0]}"
    if not found:
        raise ValueError(f"--bench {name} {root}: none of its sets is there: {', '.join(missing)}")
    return found, missing


def bench_sizes(name: str) -> dict[str, int | None]:
    """Return the usual number of images of every set of a bench; None where several are in use."""
    return {entry["name"]: entry["images"] for entry in _table()["benches"][name]}


@cache
def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("benchmarks.json").read_text(encoding="utf-8"))
