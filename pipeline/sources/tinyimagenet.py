"""Tiny-ImageNet-200 in its official layout."""

import os
from collections.abc import Iterator
from pathlib import Path

from backmix.pipeline import images
from backmix.pipeline.sources.classes import class_list, read_classes
from backmix.pipeline.sources.folder import entries, is_folder
from backmix.pipeline.sources.source import (
    Item,
    Items,
    Source,
    note,
    read_lines,
    split_part,
    suffix,
)


def open_tinyimagenet(spec: str, rest: str, classes: list[str] | None) -> Source:
    """List `tinyimagenet:DIR` or a part of it."""
    root, part = split_part(rest, ("train", "val"))
    listed = Path(root) / "wnids.txt"
    if not listed.is_file():
        raise ValueError(f"{listed} is missing; tinyimagenet:DIR needs the official layout")
    # Class numbers are places in the sorted list of all classes, whatever of it is here.
    every = sorted(read_classes(listed))
    found = list(_tiny_train(root) if part == "train" else _tiny_val(root))
    for wnid, name in found:
        if wnid not in every:
            raise ValueError(f"{root}/{name}: its class {wnid} is not in {listed}")
    if not found:
        raise ValueError(f"{root}/{part} holds no images")
    present = sorted({wnid for wnid, _ in found})
    known = every if classes is None else class_list(present, classes, f"{root}/{part}")
    label_of = {wnid: label for label, wnid in enumerate(known)}
    names = [name for _, name in found]
    labels = [label_of[wnid] for wnid, _ in found]
    order = sorted(range(len(names)), key=lambda i: (labels[i], names[i]))
    notes = note("class without images", [wnid for wnid in known if wnid not in present])

    def make(i: int) -> Item:
        k = order[i]
        return Item(names[k], labels[k], f"{root}/{names[k]}")

    return Source(spec, known, Items(len(names), make), notes)


def _tiny_train(root: str) -> Iterator[tuple[str, str]]:
    """Yield (class, path below `root`) of the training images: train/WNID/images/FILE."""
    if not os.path.isdir(f"{root}/train"):
        raise ValueError(f"{root}/train is missing; tinyimagenet:DIR needs the official layout")
    for folder in entries(f"{root}/train"):
        if is_folder(folder) and os.path.isdir(f"{folder.path}/images"):
            for entry in entries(f"{folder.path}/images"):
                if suffix(entry.name) in images.SUFFIXES:
                    yield folder.name, f"train/{folder.name}/images/{entry.name}"


def _tiny_val(root: str) -> Iterator[tuple[str, str]]:
    """Yield (class, path below `root`) of the validation images, by val_annotations.txt."""
    annotations = Path(root) / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise ValueError(f"{annotations} is missing; it holds the labels of the val part")
    class_of: dict[str, str] = {}
    for number, line in enumerate(read_lines(annotations), 1):
        file, *columns = line.split("\t")
        if not columns:
            raise ValueError(
                f"{annotations}, line {number}: expected FILE, tab, class; got {line!r}"
            )
        class_of[file] = columns[0].strip()
    for entry in entries(f"{root}/val/images"):
        if suffix(entry.name) in images.SUFFIXES:
            if entry.name not in class_of:
                raise ValueError(f"{annotations} has no line for {entry.name}")
            yield class_of[entry.name], f"val/images/{entry.name}"
