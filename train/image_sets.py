"""Which images a run is judged on: the known test set, and the unknown ones beside it."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from backmix.pipeline.beton import BetonSet, open_set
from backmix.pipeline.images import SUFFIXES
from backmix.pipeline.sources.source import Item
from backmix.pipeline.subset import Subset, select
from backmix.train import protocols
from backmix.train.openood import bench_sizes, benchmark_for, find_bench, find_openood
from backmix.train.options import EvaluateOptions
from backmix.train.trained import Trained

KNOWN, UNKNOWN = "known", "unknown"
"""Names of the known test set, and of the unknown set that the class list or a protocol makes."""
SHIFTED = "csid"
"""Group of known images under a covariate shift: other cameras, weather, styles."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class BetonImages:
    """Some samples of a .beton as one set."""

    name: str
    kind: Literal["known", "unknown"]
    files: tuple[Path, ...]
    digest: str
    subset: Subset
    absent: int = 0
    """Classes that were asked for and have no image in the files."""
    group: str = ""
    """What the set is averaged with: the group of a bench, or nothing."""

    def __len__(self) -> int:
        return len(self.subset)


@dataclass(frozen=True)
class FolderImages:
    """Image files below a folder as one set: all that are there, or those of a list."""

    name: str
    kind: Literal["known", "unknown"]
    folder: Path
    items: Sequence[Item]
    """The files; a known set's with their positions in the run's class list, the others with -1."""
    group: str = ""
    """What the set is averaged with: near, far, csid, another bench's group, or nothing."""
    share: float | None = None
    """Views are the central square of this share of the resized image's shorter side
    (`central_view`); None = what the run's evaluation shows of any image."""

    def __len__(self) -> int:
        return len(self.items)


ImageSet = BetonImages | FolderImages


@dataclass(frozen=True)
class Sets:
    """What a run is judged on."""

    images: tuple[ImageSet, ...]
    """The known test set first; none of them empty."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Sets of a published bench that are not there, and why."""
    notes: tuple[str, ...] = ()
    """What differs from a published bench: sentences for people."""


def image_sets(trained: Trained, options: EvaluateOptions) -> Sets:
    """Return the known test set and every other one.

    Raises:
        ValueError: sets that are asked for and cannot be had, and what to do.
    """
    if options.benchmark is not None and options.openood is None:
        raise ValueError(f"--benchmark {options.benchmark} needs OpenOOD's data: --openood DIR")
    if options.openood is not None:
        found = _openood(trained, options.openood, options)
    elif not options.test:
        raise ValueError(
            f"what shall {trained.run} be judged on? Name its test set: --test FILE.beton, or "
            "OpenOOD's data: --openood DIR"
        )
    else:
        found = Sets(_of_test_file(trained, options))
    more = [(f"--unknown {given}", _named(given)) for given in options.unknown]
    bench = Sets(())
    if options.bench is not None:
        name, root = options.bench
        bench = _bench(name, root)
        more += [(f"--bench {name}", images) for images in bench.images]
    names = {images.name for images in found.images}
    for asked, images in more:
        if images.name in names:
            raise ValueError(f"{asked}: there is a set of the name {images.name} already")
        names.add(images.name)
    notes = [note for _, images in more if (note := _known_among(trained, images))]
    return Sets(
        (*found.images, *(images for _, images in more)),
        {**found.missing, **bench.missing},
        (*found.notes, *bench.notes, *notes),
    )


def _known_among(trained: Trained, images: ImageSet) -> str:
    """Return a note where a set of unknown images has images of known classes, by their names."""
    if not isinstance(images, BetonImages):
        return ""
    with open_set(images.files) as data:
        there = {data.classes[number] for number in np.unique(data.labels[images.subset.index])}
    # Numbers name no class: the 3 of one set has nothing to do with the 3 of another.
    known = [name for name in trained.classes if name in there and not name.isdigit()]
    if not known:
        return ""
    return (
        f"the unknown set {images.name} has images of the run's known classes {few(known)}, which "
        "count as unknown there"
    )


def _of_test_file(trained: Trained, options: EvaluateOptions) -> tuple[ImageSet, ...]:
    """Return the known images of the test file, and those of its other classes."""
    with open_set(options.test) as test:
        where = ", ".join(map(str, options.test))
        known = _known(trained, test, where, options.test)
        split = trained.split
        if split is not None and split.unknown_source == "cifar100":
            return known, _cifar100(split, options)
        if options.unknown_data:
            raise ValueError(
                "--unknown-data belongs to the protocols cifar+10 and cifar+50; other unknown "
                "sets are given as --unknown NAME=PATH"
            )
        if split is not None and len(test.classes) != split.classes:
            raise ValueError(
                f"{where} has {len(test.classes)} classes, but {split.protocol} splits "
                f"{split.classes}: the test file must hold the unknown classes, too"
            )
        others = [n for n, name in enumerate(test.classes) if name not in trained.classes]
        rest = _samples(UNKNOWN, options.test, test, others)
        return (known, rest) if len(rest) else (known,)


def _openood(trained: Trained, root: Path, options: EvaluateOptions) -> Sets:
    if options.test or options.unknown_data:
        raise ValueError(
            "--openood brings its own known test set: leave out --test and --unknown-data"
        )
    name = options.benchmark or benchmark_for(trained.classes)
    found = find_openood(root, name, trained.classes, trained.loader.size)
    sets = tuple(
        FolderImages(
            listed.name,
            "known" if listed.group in ("", SHIFTED) else "unknown",
            root,
            listed.items,
            listed.group,
            listed.share,
        )
        for listed in found.sets
    )
    return Sets(sets, found.missing, found.notes)


def _bench(name: str, root: Path) -> Sets:
    found, missing = find_bench(root, name)
    sets = tuple(
        _at(set_name, path, f"--bench {name} {root}", group)
        for set_name, (path, group) in found.items()
    )
    usual = bench_sizes(name)
    notes = tuple(
        f"{images.name} has {len(images):,} images, the usual set {usual[images.name]:,}"
        for images in sets
        if usual[images.name] not in (None, len(images))
    )
    return Sets(sets, missing, notes)


def _known(trained: Trained, test: BetonSet, where: str, files: tuple[Path, ...]) -> BetonImages:
    missing = [name for name in trained.classes if name not in test.classes]
    if missing:
        raise ValueError(
            f"{where} lacks the known classes {few(missing)}; its classes are "
            f"{few(test.classes)}. The test file needs the class names of the training file "
            "(backmix convert --classes FILE fixes a class list)"
        )
    subset = select(test.labels, [test.classes.index(name) for name in trained.classes])
    if not len(subset):
        raise ValueError(f"{where} has no image of the known classes {few(trained.classes)}")
    return BetonImages(KNOWN, "known", files, test.digest, subset)


def _cifar100(split: protocols.Split, options: EvaluateOptions) -> BetonImages:
    if not options.unknown_data:
        raise ValueError(
            f"{split.protocol} takes its unknown images from CIFAR-100: name the .beton of its "
            "test set with --unknown-data FILE"
        )
    with open_set(options.unknown_data) as data:
        where = ", ".join(map(str, options.unknown_data))
        if len(data.classes) != 100:
            raise ValueError(f"{where} has {len(data.classes)} classes, CIFAR-100 has 100")
        images = _samples(UNKNOWN, options.unknown_data, data, split.unknown)
    if not len(images):
        raise ValueError(f"{where} has no image of the unknown classes of {split.protocol}")
    return images


def _named(given: str) -> ImageSet:
    name, equals, text = given.partition("=")
    if not equals or not text or not _NAME.fullmatch(name):
        raise ValueError(
            f"--unknown {given}: write NAME=PATH, the name of letters, digits and . _ + -"
        )
    return _at(name, Path(text), f"--unknown {given}")


def _at(name: str, path: Path, asked: str, group: str = "") -> ImageSet:
    """Return all images of a folder or of a .beton as one unknown set."""
    if path.is_dir():
        items = image_files(path)
        if not items:
            raise ValueError(f"{asked}: no image in {path} or its subfolders")
        return FolderImages(name, "unknown", path, items, group)
    if not path.exists():
        raise ValueError(f"{asked}: there is no {path}")
    with open_set([path]) as data:
        if not data.n:
            raise ValueError(f"{asked}: {path} has no samples")
        return _samples(name, (path,), data, range(len(data.classes)), group)


def _samples(
    name: str,
    files: tuple[Path, ...],
    data: BetonSet,
    classes: Sequence[int],
    group: str = "",
) -> BetonImages:
    index = np.flatnonzero(np.isin(data.labels, list(classes)))
    subset = Subset(index, np.full(len(index), -1, np.int64))
    absent = len(classes) - len(np.unique(data.labels[index]))
    return BetonImages(name, "unknown", files, data.digest, subset, absent, group)


def image_files(folder: Path) -> list[Item]:
    """Return the images below a folder by relative path, unknown; hidden files are passed over.

    Raises OSError naming a folder that cannot be listed: how many images it holds nobody can tell.
    """

    def refuse(error: OSError) -> None:
        raise OSError(
            f"the folder {error.filename} cannot be listed ({error.strerror}): make it readable, "
            "or move it away"
        ) from error

    found = []
    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                path = Path(root, name)
                found.append(Item(path.relative_to(folder).as_posix(), -1, str(path)))
    return sorted(found, key=lambda item: item.name)


def few(names: Sequence[str]) -> str:
    """Return the first eight names, and how many more there are."""
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
