"""Small data sets and runs for the tests of training: a few colours and shapes as classes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from backmix.pipeline.batch import Batch
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.writer import Record, Writer, page_size_for
from backmix.train.methods import method as methods
from backmix.train.options import Augment, BackMix, Method, Optim, Run

SIDE = 32


TINY = (
    "--model classifier32-quarter --epochs 2 --loader.batch 16 --threads 1 --augment.pad 2 "
    "--optim.lr 0.05 --precision fp32 --device cpu"
)
"""Options of `backmix train` for a run of seconds."""


def tiny_images(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 32, 32, 3] whose class is the place of a bright square, and labels [n]."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = generator.integers(0, 110, (count, SIDE, SIDE, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        y, x = 4 + 12 * (label // 2), 4 + 14 * (label % 2)
        image[y : y + 10, x : x + 10] += 120
    return images, labels


def write_set(path: Path, images: np.ndarray, labels: np.ndarray, classes: list[str]) -> Path:
    """Write raw images as a .beton file."""
    with Writer(
        path,
        samples=len(images),
        page_size=page_size_for(images[0].nbytes),
        classes=classes,
        options={},
    ) as writer:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            name = f"{classes[label]}/{number}.png"
            writer.append(Record(image.tobytes(), 1, SIDE, SIDE, int(label), 0, name))
    return path


def tiny_set(path: Path, count: int = 40, classes: int = 4, seed: int = 0) -> Path:
    """Write a small set with classes a, b, c, ..."""
    images, labels = tiny_images(count, classes, seed)
    return write_set(path, images, labels, [chr(ord("a") + k) for k in range(classes)])


def tiny_run(data: Path, out: Path, method: Method | None = None, **changes: object) -> Run:
    """A run of 3 epochs of 3 steps on one thread, with dropout and BatchNorm in the network."""
    base = Run(
        data=(data,),
        out=out,
        epochs=3,
        model="classifier32-half",
        threads=1,
        precision="fp32",
        device="cpu",
        log_every=2,
        save_steps=2,
        quiet=True,
        loader=LoaderOptions(batch=16, group=8, threads=1, loader="turbo"),
        augment=Augment(flip=True, pad=2),
        optim=Optim(lr=0.05, schedule="linear", warmup=0.2),
        method=method or BackMix(patch=12, fill="keep", rate=0.5),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def views_of(method: methods.Method, batch: Batch) -> methods.Views:
    """Return what the network is shown of a batch."""
    return method.prepare(batch, method.draw(batch))


def poisoned(
    prepare: Callable[..., methods.Views], row: int | None = None
) -> Callable[..., methods.Views]:
    """Return a method's `prepare` whose views, or one of them, are NaN."""

    def broken(*arguments: Any) -> methods.Views:
        views = prepare(*arguments)
        images = views.images.clone()
        images[slice(None) if row is None else row] = math.nan
        return replace(views, images=images)

    return broken
