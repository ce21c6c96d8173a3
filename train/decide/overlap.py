"""Are calibration images training images? And were they stored in the same way?

A network scores what it was trained on too high: a threshold from such images rejects far more of
what is to come than it says. Images are recognised by the xxh3-64 of what a .beton stores of them
and, where one file holds a JPEG and the other one its pixels, by that of the pixels; images of a
folder are brought into the form in which the training set would have stored them. What was cropped,
shrunk or encoded anew on the way between is not recognised.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from backmix.pipeline.beton import RAW, BetonSet, Flag, open_set
from backmix.pipeline.convert import QUALITY, limits, store
from backmix.pipeline.decode import decoding_threads, read_image
from backmix.pipeline.images import decode_rgb, is_jpeg
from backmix.pipeline.options import ConvertOptions, refuse_unknown_choices
from backmix.pipeline.sources.source import Item
from backmix.train.image_sets import BetonImages, FolderImages, ImageSet

Marks = NDArray[np.uint64]
_AT_ONCE = 1024
_STORING = ("mode", "smart_threshold", "quality", "max_side", "preset")
"""Options of a conversion that say in which form an image is stored."""


@dataclass(frozen=True, eq=False)
class Overlap:
    """What the comparison found; n calibration images."""

    trained_on: NDArray[np.bool_]
    """bool [n]: whether the network was trained on it."""
    marks: Marks
    """uint64 [n]: checksums of the files or samples, equal where these are."""


def overlap(
    images: ImageSet, training: BetonImages, threads: int, say: Callable[[str], None]
) -> Overlap:
    """Compare calibration images with training images, byte by byte and pixel by pixel.

    Args:
        images: of the calibration.
        training: those that the run was trained on, and no others.
        threads: of decoding; 0 = one per core.
        say: called with a line of progress now and then.

    Raises:
        ValueError, OSError: a file is damaged or cannot be read.
    """
    with open_set(training.files) as own, decoding_threads(threads) as pool:
        there = training.subset.index
        trained = stored_marks(own, there, "training images", say)
        raw = own.modes[there] == RAW
        match images:
            case BetonImages():
                with open_set(images.files) as data:
                    here = images.subset.index
                    marks = stored_marks(data, here, "calibration images", say)
                    hit = np.isin(marks, trained)
                    lossless = data.modes[here] == RAW
                    sizes = data.sizes[here]
                    todo = np.flatnonzero(~hit & ~lossless & _among(sizes, own.sizes[there][raw]))
                    pixels = _pixel_marks(data, here[todo], pool, "calibration images", say)
                    hit[todo] = _found(pixels, trained[raw])
                    plain = np.where(lossless, marks, 0)
            case FolderImages():
                marks, forms, plain, sizes = _of_folder(images, own, pool, say)
                hit = _found(forms, trained).any(1)
        # Pixels here that may be those of a training JPEG: only these are decoded.
        like = ~raw & _among(own.sizes[there], sizes[(plain != 0) & ~hit])
        hit |= _found(plain, _pixel_marks(own, there[like], pool, "training images", say))
    return Overlap(hit, marks)


def stored_marks(
    data: BetonSet, index: NDArray[np.int64], what: str, say: Callable[[str], None]
) -> Marks:
    """Return the xxh3-64 of what is stored of samples, uint64 [m]; a stock file is read for it."""
    if data.hashes is not None:
        return data.hashes[index]
    found = np.empty(len(index), np.uint64)
    for k, sample in enumerate(index.tolist()):
        found[k] = xxhash.xxh3_64_intdigest(data.region(sample, verify=False).data)
        if k % _AT_ONCE == 0:
            say(f"{what}: checksums of {k:,} of {len(index):,}")
    return found


def _pixel_marks(
    data: BetonSet,
    index: NDArray[np.int64],
    pool: Executor,
    what: str,
    say: Callable[[str], None],
) -> Marks:
    """Return the xxh3-64 of the pixels of samples, uint64 [m]; 0 of what cannot be decoded."""

    def mark(sample: int) -> int:
        try:
            return _mark(read_image(data, sample)[0])
        except ValueError:
            return 0  # the pass over the images says what is wrong with it

    found = np.empty(len(index), np.uint64)
    for start in range(0, len(index), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        found[some] = list(pool.map(mark, index[some].tolist()))
        say(f"{what}: pixels of {start:,} of {len(index):,}")
    return found


def _of_folder(
    images: FolderImages, own: BetonSet, pool: Executor, say: Callable[[str], None]
) -> tuple[Marks, Marks, Marks, NDArray[np.int32]]:
    """Return what files are recognised by.

    The checksum of the bytes [n]; those of each form that the training set may hold it in [n, f];
    that of the pixels where the file keeps them without loss [n], else 0; and sizes int32 [n, 2].
    """
    wants, options = _storing(own)

    def look(item: Item) -> tuple[int, list[int], int, tuple[int, ...]]:
        try:
            data = item.read()
            whole = xxhash.xxh3_64_intdigest(data)
            stored = [store(item, want, options, data).data for want in wants]
            pixels = decode_rgb(data)
        except (ValueError, OSError):
            return 0, [0] * (len(wants) + 1), 0, (0, 0)
        forms = [whole, *(xxhash.xxh3_64_intdigest(form) for form in stored)]
        return whole, forms, 0 if is_jpeg(data) else _mark(pixels), pixels.shape[:2]

    found = []
    for start in range(0, len(images), _AT_ONCE):
        found += pool.map(look, images.items[start : start + _AT_ONCE])
        say(f"calibration images: checksums of {start:,} of {len(images):,}")
    whole, forms, plain, sizes = zip(*found, strict=True)
    marks = np.array(whole, np.uint64)
    missing = marks == 0  # unreadable files are no copies of one another
    marks[missing] = np.arange(1, 1 + np.count_nonzero(missing), dtype=np.uint64)
    return marks, np.array(forms, np.uint64), np.array(plain, np.uint64), np.array(sizes, np.int32)


def _storing(own: BetonSet) -> tuple[tuple[str, ...], ConvertOptions]:
    """Return the forms in which a training set may hold an image, and the options of storing."""
    options = _options(own.info.get("options"))
    if options.preset != "none":
        return ("jpg",), options
    if options.mode == "proportion":
        return ("jpg", "raw"), options
    return tuple(dict.fromkeys((options.mode, "raw"))), options


def _mark(pixels: NDArray[np.uint8]) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(pixels).data)


def _found(marks: Marks, among: Marks) -> NDArray[np.bool_]:
    """Return which checksums are among others; 0 is none."""
    return np.isin(marks, among) & (marks != 0)


def _among(sizes: NDArray[np.int32], others: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return which sizes [n, 2] are among others [m, 2]."""

    def key(pairs: NDArray[np.int32]) -> NDArray[np.int64]:
        return pairs[:, 0].astype(np.int64) << 32 | pairs[:, 1]

    return np.isin(key(sizes), key(others))


@dataclass(frozen=True, eq=False)
class _Form:
    """How some samples of a .beton were stored."""

    options: ConvertOptions
    """Of the conversion; only what says in which form an image is stored."""
    sizes: NDArray[np.int32]
    """int32 [n, 2]: height, width."""
    raw: NDArray[np.bool_]
    encoded: NDArray[np.bool_]
    """JPEGs that the conversion made; the others are copies of their source."""

    def shrunk(self, options: ConvertOptions, exactly: bool) -> bool:
        """Return whether a side is at the limit that options set, or else beyond it."""
        for limit, side in zip(
            limits(options), (self.sizes.max(1), self.sizes.min(1)), strict=True
        ):
            if limit is not None and ((side == limit) if exactly else (side > limit)).any():
                return True
        return False


def other_form(images: BetonImages, training: BetonImages) -> str:
    """Say in what two sets were stored differently, where that can change what the network sees.

    Shrunk to another size, or encoded as JPEG with another quality or in one of the sets alone.
    Empty where they were stored alike, where no image of the calibration would look different, and
    where a file does not say how it was made (a stock file).

    Args:
        images: of the calibration.
        training: those that the run was trained on.
    """
    here, there = _form(images), _form(training)
    if here is None or there is None or not _differs(here, there):
        return ""
    named = [
        f"{name} {getattr(there.options, name)}, the calibration images {name} "
        f"{getattr(here.options, name)}"
        for name in _STORING
        if getattr(here.options, name) != getattr(there.options, name)
    ]
    return f"the training images were stored with {'; '.join(named)}"


def _differs(here: _Form, there: _Form) -> bool:
    """Return whether the training set would have stored the calibration images otherwise."""
    if here.options == there.options:
        return False
    if here.shrunk(there.options, exactly=False):
        return True
    if limits(here.options) != limits(there.options) and here.shrunk(here.options, exactly=True):
        return True
    if here.encoded.any():
        return not there.encoded.any() or _quality(here) != _quality(there)
    copied = ~here.raw & ~here.encoded
    pixels_become_jpeg = there.options.mode == "jpg" or there.options.preset != "none"
    return bool(
        (there.options.quality is not None and copied.any())
        or (pixels_become_jpeg and here.raw.any())
    )


def _quality(form: _Form) -> int:
    return form.options.quality or QUALITY


def _form(images: BetonImages) -> _Form | None:
    with open_set(images.files) as data:
        noted = data.info.get("options")
        if data.flags is None or not isinstance(noted, dict):
            return None
        index = images.subset.index
        raw = data.modes[index] == RAW
        copied = data.flags[index] & Flag.PASSTHROUGH != 0
        return _Form(_options(noted), data.sizes[index], raw, ~raw & ~copied)


def _options(noted: object) -> ConvertOptions:
    """Return what the note of a file says of the form in which its images are stored."""
    given = noted if isinstance(noted, dict) else {}
    options = ConvertOptions(**{name: given[name] for name in _STORING if name in given})
    numbers = (options.smart_threshold, options.quality, options.max_side)
    try:
        refuse_unknown_choices(options, "--")
        if all(number is None or type(number) is int for number in numbers):
            return options
    except (ValueError, TypeError):  # a file may say anything
        pass
    return ConvertOptions()
