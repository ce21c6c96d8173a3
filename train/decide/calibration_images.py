"""Which images a threshold is calibrated on: held-out known ones, and no training images.

Nothing is decoded before `compared_images`, which reads as much as it takes to tell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from backmix.pipeline.beton import open_set
from backmix.pipeline.sources.source import Item
from backmix.pipeline.subset import Subset, select
from backmix.train.decide.options import CalibrateOptions
from backmix.train.decide.overlap import other_form, overlap
from backmix.train.image_sets import BetonImages, FolderImages, ImageSet, few, image_files
from backmix.train.trained import Trained, read_run
from backmix.train.training_images import HELD_OUT, TRAIN, MissingImagesError, training_images

_NAME = "calibration"
_MOST_BEFORE = 16
"""Runs that began with one another's weights, of which the training images are looked at."""


@dataclass(frozen=True, eq=False)
class Known:
    """The calibration images, before the network has seen them."""

    images: ImageSet
    own: bool
    """Held out of the run's own training file."""
    notes: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    """Classes without an image."""


def known_images(trained: Trained, options: CalibrateOptions) -> Known:
    """Return the images that are asked for; nothing is decoded yet."""
    path = options.data
    if path is None:
        return _held_out(trained, options)
    if not path.exists():
        raise ValueError(f"--data {path}: there is no such file or folder")
    of = _of_folder if path.is_dir() else _of_file
    return of(trained, path, options)


def _held_out(trained: Trained, options: CalibrateOptions) -> Known:
    if not trained.options.val:
        raise ValueError(
            f"{trained.run} was trained on all of its known images (--val 0), and training images "
            "must not serve: name held-out known images with --data, a .beton file or a folder"
        )
    found = training_images(
        trained, options.train, "the images that --val held out of training lie in it"
    )
    for images in found:
        if images.name == HELD_OUT:
            absent = _without(trained, images.subset.labels)
            return Known(replace(images, name=_NAME), own=True, absent=absent)
    raise ValueError(
        f"--val {trained.options.val:g} held no image of {trained.run} out: name held-out known "
        "images with --data, a .beton file or a folder"
    )


def _of_file(trained: Trained, path: Path, options: CalibrateOptions) -> Known:
    with open_set([path]) as data:
        count = np.bincount(data.labels, minlength=len(data.classes))
        foreign = [
            name
            for name, images in zip(data.classes, count.tolist(), strict=True)
            if images and name not in trained.classes
        ]
        if foreign and not options.known_only:
            raise ValueError(
                f"--data {path} has images of {few(foreign)}, which {trained.run} does not know "
                f"(it knows {few(trained.classes)}): a threshold is calibrated on known images "
                "alone; --known-only leaves the others out"
            )
        shared = [k for k, name in enumerate(trained.classes) if name in data.classes]
        subset = select(data.labels, [data.classes.index(trained.classes[k]) for k in shared])
        if not len(subset):
            raise ValueError(
                f"--data {path} has no image of the known classes {few(trained.classes)}; its "
                f"classes are {few(data.classes)}"
            )
        labels = np.array(shared, np.int64)[subset.labels]
        images = BetonImages(_NAME, "known", (path,), data.digest, Subset(subset.index, labels))
    left_out = int(count.sum()) - len(subset)
    notes = (
        [f"{left_out:,} images of classes that the run does not know were left out"]
        if left_out
        else []
    )
    return Known(images, own=False, notes=tuple(notes), absent=_without(trained, labels))


def _of_folder(trained: Trained, path: Path, options: CalibrateOptions) -> Known:
    position = {name: label for label, name in enumerate(trained.classes)}
    items = [
        replace(item, label=position.get(item.name.split("/")[0], -1) if "/" in item.name else -1)
        for item in image_files(path)
    ]
    if not items:
        raise ValueError(f"--data {path}: no image in it or its subfolders")
    if wrong := _in_another_case(items, trained.classes):
        raise ValueError(
            f"--data {path} has a subfolder {wrong[0]}, and the run knows a class {wrong[1]}: name "
            "subfolders as the classes are named, upper and lower case included"
        )
    named = [item for item in items if item.label >= 0]
    others = len(items) - len(named)
    if options.known_only and not named:
        raise ValueError(
            f"--known-only: --data {path} has no subfolder with images that is named as one of the "
            f"known classes {few(trained.classes)}"
        )
    if named and others and not options.known_only:
        first = next(item.name for item in items if item.label < 0)
        raise ValueError(
            f"--data {path} has subfolders that are named as known classes, and {others:,} images "
            f"outside of these, the first is {first}: are they "
            "known, too? --known-only leaves them out; or name a folder with known images alone"
        )
    notes = []
    if named and others:
        outside = "outside of the subfolders named as known classes were left out"
        notes = [f"{others:,} images {outside}"]
    elif not named:
        folders = sorted({item.name.split("/")[0] for item in items if "/" in item.name})
        notes = ["all images of the folder are taken as known ones"]
        if folders:
            notes[0] += f", also those in {few(folders)}, which are no names of known classes"
    items = named or items
    labels = np.array([item.label for item in items])
    return Known(
        FolderImages(_NAME, "known", path, items),
        own=False,
        notes=tuple(notes),
        absent=_without(trained, labels) if named else (),
    )


def _in_another_case(items: Sequence[Item], classes: Sequence[str]) -> tuple[str, str] | None:
    """Return a subfolder and the class whose name it has but for upper and lower case."""
    folded = {name.casefold(): name for name in classes}
    for folder in {item.name.split("/")[0] for item in items if "/" in item.name}:
        meant = folded.get(folder.casefold())
        if meant is not None and folder not in classes:
            return folder, meant
    return None


def _without(trained: Trained, labels: np.ndarray) -> tuple[str, ...]:
    there = set(labels.tolist())
    return tuple(name for k, name in enumerate(trained.classes) if k not in there)


def absent_note(known: Known) -> list[str]:
    """Return a note where classes of the run have no calibration image."""
    if not known.absent:
        return []
    return [
        f"no calibration image is of {few(known.absent)}: what is promised is promised of images "
        "like the calibration images, in which these classes do not occur"
    ]


# --- are they training images? --------------------------------------------------------------------


def compared_images(
    trained: Trained, known: Known, options: CalibrateOptions, say: Callable[[str], None]
) -> tuple[Known, dict[str, Any]]:
    """Refuse training images, and those that were stored in another way; return facts about both.

    Copies of training images among those that --val held out are nobody's mistake: they are left
    out.
    """
    images = known.images
    before, notes = _before(trained)
    try:
        own = training_images(
            trained, options.train, "calibration images must not be training images"
        )
    except MissingImagesError as error:
        if not options.unchecked:
            raise ValueError(f"{error}; or go on without comparing: --unchecked") from error
        notes.append(
            "nobody has compared the calibration images with the training images, which are gone"
        )
        return replace(known, notes=(*known.notes, *notes)), {"compared": False, "repeated": None}
    own = [sets for sets in own if sets.name == TRAIN]
    for at in before:
        try:
            own += [sets for sets in training_images(at) if sets.name == TRAIN]
        except (ValueError, OSError):
            notes.append(
                f"the run began with the weights of {at.run}, whose training images are gone: "
                "nobody has compared the calibration images with them"
            )
    if not known.own and isinstance(images, BetonImages):
        for training in own[:1]:
            if differs := other_form(images, training):
                raise ValueError(
                    f"{differs}: the network sees another kind of pictures. Convert the "
                    "calibration images as the training images were, or name the folder that they "
                    "come from with --data where images are decided about as they are"
                )
    compared = [overlap(images, training, options.threads, say) for training in own]
    hit = np.logical_or.reduce([found.trained_on for found in compared])
    if hit.any():
        if not known.own or not isinstance(images, BetonImages) or hit.all():
            raise ValueError(_refusal(trained, images, hit))
        subset = Subset(images.subset.index[~hit], images.subset.labels[~hit])
        images = replace(images, subset=subset)
        notes.append(
            f"{int(hit.sum()):,} of the held-out images are equal to training images and were left "
            "out"
        )
    marks = compared[0].marks[~hit]
    repeated = len(marks) - len(np.unique(marks))
    if repeated:
        notes.append(
            f"{repeated:,} calibration images are copies of others: the promise counts each as an "
            "image of its own, so leave copies out where the images to come have none"
        )
    facts = {"compared": True, "repeated": repeated}
    return replace(known, images=images, notes=(*known.notes, *notes)), facts


def _refusal(trained: Trained, images: ImageSet, hit: np.ndarray) -> str:
    positions = np.flatnonzero(hit)
    match images:
        case BetonImages():
            with open_set(images.files) as data:
                names = [data.name(i) for i in images.subset.index[positions[:8]].tolist()]
        case FolderImages():
            names = [images.items[i].name for i in positions[:8].tolist()]
    more = f" and {len(positions) - len(names):,} more" if len(positions) > len(names) else ""
    hint = "; without --data those that --val held out are taken" if trained.options.val else ""
    return (
        f"{len(positions):,} of {len(images):,} calibration images are training images of "
        f"{trained.run}: {', '.join(names)}{more}. Their scores are too high, so that the "
        f"threshold would reject far more than it says: name images that nobody trained on{hint}"
    )


def _before(trained: Trained) -> tuple[list[Trained], list[str]]:
    """Return the runs whose weights this one began with, one before the other, and what is unknown.

    They were trained on images, too, which must not serve.
    """
    found: list[Trained] = []
    at = trained
    while len(found) < _MOST_BEFORE:
        source = at.options.init
        if source is None and not at.options.pretrained:
            return found, []
        if source is None or not (source / "config.json").is_file():
            what = source if source is not None else f"{at.options.model}, pretrained"
            return found, [
                f"the run began with the weights of {what}: whether these were trained on "
                "calibration images is not known"
            ]
        at = read_run(source)
        found.append(at)
    return found, []
