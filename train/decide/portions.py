"""Images as views, batch by batch, with what is wrong with those that cannot be read.

Batches lie at fixed places of the list: whoever goes on in the middle is given the same ones.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backmix.pipeline.batch import Place
from backmix.pipeline.beton import BetonSet
from backmix.pipeline.decode import read_image
from backmix.pipeline.folder_images import Shown, read_views, usual_view
from backmix.pipeline.images import check_size
from backmix.pipeline.options import LoaderOptions, usable_cores
from backmix.pipeline.plan import Plan
from backmix.pipeline.sources.source import Items
from backmix.pipeline.subset import Subset
from backmix.pipeline.turbo import Turbo
from backmix.pipeline.views import to_device
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.record import Preprocessing
from backmix.train.decide.sources import Files, Images, Stored
from backmix.train.pace import Pace


@dataclass(frozen=True, eq=False)
class Portion:
    """Neighbouring images of the list, those of one batch."""

    first: int
    """Number of the first one."""
    count: int
    views: Tensor | None
    """Of those that can be read, uint8 [n, S, S, 3] on the device; None where there are none."""
    numbers: np.ndarray
    """int64 [n]: which ones."""
    problems: Mapping[int, str]
    """What is wrong with the others, by number."""

    def __len__(self) -> int:
        return self.count

    @property
    def range(self) -> range:
        """Return the numbers of all its images."""
        return range(self.first, self.first + self.count)


@dataclass(frozen=True, eq=False)
class Reader:
    """How images are read."""

    seen: Preprocessing
    """How the network sees them."""
    device: torch.device
    """Where their views go."""
    options: PredictOptions
    """Batch, threads and limit."""
    pace: Pace
    """Is told how long the threads were at work."""


def batch_ends(images: Images, options: PredictOptions) -> np.ndarray:
    """Return the number of images up to the end of each batch, int64 ascending."""
    return np.concatenate(
        [
            start + _ends(part, options)
            for part, start in zip(images.parts, images.starts, strict=True)
        ]
    )


def _ends(part: Files | Stored, options: PredictOptions) -> np.ndarray:
    n, batch = len(part), options.batch
    if isinstance(part, Stored):
        small = _small(part.data, options.limit_pixels)
        if len(small):  # batches of the loader, and whatever it leaves out before and in them
            return np.append(small[batch::batch], n)
    return np.append(np.arange(batch, n, batch), n)


def _small(data: BetonSet, limit: int) -> np.ndarray:
    """Return the samples of at most so many pixels, int64, ascending."""
    return np.flatnonzero(data.sizes.astype(np.int64).prod(1) <= limit)


def portions(images: Images, begin: int, reader: Reader) -> Iterator[Portion]:
    """Read the images, batch by batch.

    Args:
        images: all of them.
        begin: number of the first one to read: 0, or the end of a batch.
        reader: how.
    """
    reader.pace.threads = reader.options.threads or usable_cores()
    for part, start in zip(images.parts, images.starts, strict=True):
        done = max(0, begin - start)
        if done >= len(part):
            continue
        if isinstance(part, Files):
            yield from _of_files(part, start, done, reader)
        else:
            yield from _of_stored(part, start, done, reader)


def _of_files(part: Files, start: int, done: int, reader: Reader) -> Iterator[Portion]:
    """Read a part from image `done` on; `start` images lie before it."""
    seen, options = reader.seen, reader.options

    def show(pixels: np.ndarray) -> Shown:
        return usual_view(pixels, seen.size, seen.crop, seen.eval_crop)

    rest = Items(len(part) - done, lambda i: part.items[done + i])
    for read in read_views(
        rest, show, batch=options.batch, threads=options.threads, limit=options.limit_pixels
    ):
        reader.pace.decoding += sum(image.seconds for image in read)
        good = [image for image in read if not image.problem]
        before = start + done
        yield Portion(
            before + read[0].number,
            len(read),
            to_device(np.stack([image.view for image in good]), reader.device) if good else None,
            np.array([before + image.number for image in good], np.int64),
            {before + image.number: image.problem for image in read if image.problem},
        )


def _of_stored(part: Stored, start: int, done: int, reader: Reader) -> Iterator[Portion]:
    """Read a part from image `done` on; `start` images lie before it."""
    data, seen, options = part.data, reader.seen, reader.options
    small = _small(data, options.limit_pixels)
    ends = _ends(part, options)
    taken = int(np.searchsorted(ends, done, "right"))  # batches that are done
    firsts = np.append(0, ends[:-1])[taken:].tolist()

    def portion(first: int, end: int, good: np.ndarray, views: Tensor | None) -> Portion:
        bad = np.setdiff1d(np.arange(first, end), good).tolist()
        return Portion(
            start + first,
            end - first,
            views,
            start + good,
            {start + i: _wrong(data, i, options.limit_pixels) for i in bad},
        )

    if not len(small):
        for first, end in zip(firsts, ends[taken:].tolist(), strict=True):
            yield portion(first, end, small, None)
        return
    chosen = LoaderOptions(
        loader="turbo",
        batch=options.batch,
        size=seen.size,
        crop=seen.crop,  # pyright: ignore[reportArgumentType]
        eval_crop=seen.eval_crop,
        threads=options.threads,
    )
    subset = Subset(small, np.full(len(small), -1, np.int64))
    engine = Turbo(Plan(data, subset, chosen, training=False), reader.device)
    try:
        place = Place(seed=0, consumed=taken * options.batch)
        steps = zip(firsts, ends[taken:].tolist(), engine.batches(place), strict=True)
        for first, end, batch in steps:
            views = batch.pool if len(batch) else None
            yield portion(first, end, batch.host.index, views)
        reader.pace.decoding += engine.decoding
    finally:
        engine.close()


def _wrong(data: BetonSet, i: int, limit: int) -> str:
    """Return what is wrong with a sample that was left out: by looking at it once more."""
    try:
        height, width = data.sizes[i].tolist()
        check_size(height, width, limit)
        read_image(data, i)
    except ValueError as error:
        return str(error).removeprefix(data.where(i)).strip()
    return "it could not be read, but can be now"
