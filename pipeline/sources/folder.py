"""Class folders: one folder per class, images at any depth below it."""

import os
from collections.abc import Iterator

from backmix.pipeline import images
from backmix.pipeline.sources.classes import Listing
from backmix.pipeline.sources.source import Item, Items, Source, some, suffix

_MAX_DEPTH = 100  # folders inside each other


def open_folder(spec: str, rest: str, classes: list[str] | None) -> Source:
    """List `folder:DIR`."""
    root = rest.rstrip("/") or "/"
    if not os.path.isdir(root):
        kind = "is not a folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"{root} {kind}; folder:DIR needs a folder with one folder per class")
    folders: list[str] = []
    stray: list[str] = []
    for entry in entries(root):
        (folders if is_folder(entry) else stray).append(entry.name)
    listing = Listing(root)
    for name in sorted(folders):
        listing.add_class(name)
        for path in walk(root, name):
            listing.add(name, path)
    images_beside = [name for name in stray if suffix(name) in images.SUFFIXES]
    if not folders and images_beside:
        raise ValueError(
            f"{root} holds images but no class folders ({some(images_beside)}); move the images "
            "of each class into a folder of its name"
        )
    listing.ignored += stray
    names, labels, known, notes = listing.finish(classes)

    def make(i: int) -> Item:
        return Item(names[i], int(labels[i]), f"{root}/{names[i]}")

    return Source(spec, known, Items(len(names), make), notes)


def entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the visible entries of a folder, sorted by name."""
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        # Not for --on-error skip: how many images are lost with a folder nobody can tell.
        raise OSError(
            f"the folder {folder} cannot be listed ({error.strerror}): make it readable, or move "
            "it away"
        ) from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself: taken for a file, it fails later with its name
        return False


def walk(root: str, below: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Yield the files below `root/below` as paths relative to `root`, links followed."""
    status = os.stat(f"{root}/{below}")
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{root}/{below} is a link to a folder that it lies in; remove the link")
    if len(above) == _MAX_DEPTH:
        raise ValueError(f"{root}/{below} lies more than {_MAX_DEPTH} folders deep")
    for entry in entries(f"{root}/{below}"):
        path = f"{below}/{entry.name}"
        if is_folder(entry):
            yield from walk(root, path, (*above, here))
        elif entry.is_symlink() or entry.is_file():  # a dangling link fails later, with its name
            yield path
