"""Image files as batches: read, decoded and cut as the loaders do it with a .beton, in order.

For images that are looked at once, such as the unknown sets of an evaluation: nothing is converted
and nothing is drawn.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash

from backmix.pipeline.batch import Batch, HostRows, Place
from backmix.pipeline.decode import cut, decoding_threads
from backmix.pipeline.draws import centre_boxes, whole_boxes
from backmix.pipeline.images import MAX_PIXELS, check_size, decode_rgb
from backmix.pipeline.sources.source import Item
from backmix.pipeline.views import to_device

AHEAD = 2
"""Batches that are read and decoded while the one before them is used."""


@dataclass
class Reading:
    """What only reading tells; complete when the last batch has been taken."""

    bad: list[str] = field(default_factory=list)
    """Images that were left out: file, what is wrong, and the line of the list that names it."""
    file_sizes: list[int] = field(default_factory=list)
    """Bytes of the encoded images that were not left out, in their order."""
    digest: str = ""
    """Identifies names and bytes of all images."""
    marks: bytearray = field(default_factory=bytearray)
    """What the digest is made of: 16 bytes for each image."""
    decoding: float = 0.0
    """Seconds in which threads read and decoded, all threads together."""


@dataclass(frozen=True)
class Read:
    """One image: its view, or what is wrong with it.

    Without its bytes: hundreds of large files wait here while the batches before them are used.
    """

    number: int
    """Position among the images."""
    file_size: int
    """Of the encoded image [bytes]."""
    mark: bytes
    """Identifies its name and its bytes; 16 bytes."""
    view: np.ndarray
    """uint8 [S, S, 3]; empty, as `box` and `size`, where it cannot be read."""
    box: np.ndarray
    size: np.ndarray
    problem: str
    """What is wrong with it; empty where there is a view."""
    seconds: float
    """That it took."""


Shown = tuple[np.ndarray, np.ndarray]
"""A view, uint8 [S, S, 3], and its box y0, x0, h, w in the image, int32 [4]."""


def box_view(pixels: np.ndarray, box: np.ndarray, size: int) -> Shown:
    """Return a box of an image as a view, resampled once: what the loaders show of a .beton.

    Args:
        pixels: uint8 [h, w, 3].
        box: y0, x0, h, w inside the image, int32 [4].
        size: side S of the view [pixels].
    """
    view = np.empty((size, size, 3), np.uint8)
    cut(pixels, box, view)
    return view, box


def usual_view(pixels: np.ndarray, size: int, crop: str, eval_crop: float) -> Shown:
    """Return what the loaders show of an image in evaluation.

    Args:
        pixels: uint8 [h, w, 3].
        size: side S of the view [pixels].
        crop, eval_crop: as in `LoaderOptions`.
    """
    shape = np.array([pixels.shape[:2]], np.int32)
    box = whole_boxes(shape) if crop == "whole" else centre_boxes(shape, eval_crop)
    return box_view(pixels, box[0], size)


def central_view(pixels: np.ndarray, size: int, share: float) -> Shown:
    """Return the usual test view: shorter side to size / share, then the central square.

    Pixel by pixel what torchvision's Resize and CenterCrop make of a Pillow image (bilinear, with
    antialiasing), but for single levels of rounding. `draws.centre_boxes` shows nearly the same
    with one resampling less, from a corner that lies up to a pixel beside.

    Args:
        pixels: uint8 [h, w, 3].
        size: side S of the view [pixels].
        share: of the resized shorter side that is shown, in (0, 1]: 224 / 256.

    Raises:
        ValueError: so long an image that the resized one would be too large.

    >>> central_view(np.zeros((300, 500, 3), np.uint8), 224, 224 / 256)[1].tolist()
    [19, 119, 262, 262]
    """
    height, width = pixels.shape[:2]
    short = round(size / share)
    # Plain truncation, as torchvision has it.
    tall = short if height <= width else int(short * height / width)
    wide = short if width <= height else int(short * width / height)
    check_size(tall, wide)
    whole = np.empty((tall, wide, 3), np.uint8)
    cut(pixels, np.array([0, 0, height, width], np.int32), whole)
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    box = centre_boxes(np.array([[height, width]], np.int32), share)[0]
    return whole[top : top + size, left : left + size], box


def read_batches(
    items: Sequence[Item],
    show: Callable[[np.ndarray], Shown],
    reading: Reading,
    *,
    batch: int,
    threads: int,
    device: torch.device | str,
) -> Iterator[Batch]:
    """Read images batch by batch; those that cannot be read are left out and named in `reading`.

    Truncated images are such images, whatever a decoder would make of them.

    Args:
        items: the images, with their labels (-1 = unknown).
        show: makes the view of an image, uint8 [h, w, 3]: `box_view` or `central_view`.
        reading: is filled.
        batch: images per batch, those that are left out among them; a batch of such images alone is
            not given out.
        threads: of decoding; 0 = one per core.
        device: where the batches lie.

    Yields batches whose `index` is the position in `items`. Meanwhile threads read `AHEAD` batches
    further.
    """

    for images in read_views(items, show, batch=batch, threads=threads):
        good = []
        for image in images:
            item = items[image.number]
            reading.decoding += image.seconds
            reading.marks += image.mark
            if image.problem:
                listed = f" ({item.listed})" if item.listed else ""
                reading.bad.append(f"{item.path}: {image.problem}{listed}")
            else:
                reading.file_sizes.append(image.file_size)
                good.append(image)
        if good:
            yield _batch_of(good, items, device)
    reading.digest = digest_of(bytes(reading.marks))


def read_views(
    items: Sequence[Item],
    show: Callable[[np.ndarray], Shown],
    *,
    batch: int,
    threads: int,
    limit: int = MAX_PIXELS,
) -> Iterator[list[Read]]:
    """Yield the images batch by batch, in order, those that cannot be read among them.

    Args:
        items, show, batch, threads: as for `read_batches`.
        limit: most pixels of an image that is decoded.
    """

    def read(number: int) -> Read:
        began, item, data = time.perf_counter(), items[number], b""
        view = box = size = np.empty(0)
        problem = ""
        try:
            data = item.read()
            pixels = decode_rgb(data, limit)
            view, box = show(pixels)
            size = np.array(pixels.shape[:2], np.int32)
        except (ValueError, OSError, MemoryError) as error:
            problem = problem_of(error)
        mark = _mark(item.name, data)
        seconds = time.perf_counter() - began
        return Read(number, len(data), mark, view, box, size, problem, seconds)

    pending: deque[list[Future[Read]]] = deque()
    with decoding_threads(threads) as pool:
        try:
            for start in range(0, len(items) + AHEAD * batch, batch):
                numbers = range(start, min(start + batch, len(items)))
                pending.append([pool.submit(read, number) for number in numbers])
                if len(pending) > AHEAD and (begun := pending.popleft()):
                    yield [task.result() for task in begun]
        finally:
            for begun in pending:
                for task in begun:
                    task.cancel()


def _mark(name: str, data: bytes) -> bytes:
    digest = xxhash.xxh3_128(f"{name}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
    digest.update(data)
    return digest.digest()


def digest_of(marks: bytes) -> str:
    """Return what identifies images, from the checksums of each, one after the other."""
    return xxhash.xxh3_128(marks).hexdigest()


def problem_of(error: Exception) -> str:
    """Return what is wrong with an image, without its name."""
    if isinstance(error, MemoryError):
        return "too little memory to decode it: fewer --threads may do"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _batch_of(images: Sequence[Read], items: Sequence[Item], device: torch.device | str) -> Batch:
    device = torch.device(device)

    def tensor(values: Sequence[np.ndarray | int]) -> torch.Tensor:
        return to_device(np.stack(values), device)

    n = len(images)
    numbers = np.array([image.number for image in images])
    index = to_device(numbers, device)
    return Batch(
        pool=tensor([image.view for image in images]),
        pool_index=index,
        rows=torch.arange(n, device=device),
        index=index,
        labels=tensor([items[number].label for number in numbers.tolist()]),
        boxes=tensor([image.box for image in images]),
        sizes=tensor([image.size for image in images]),
        status=torch.zeros(n, dtype=torch.uint8, device=device),
        group=n,
        place=Place(seed=0),
        host=HostRows(numbers, np.arange(n)),
    )
