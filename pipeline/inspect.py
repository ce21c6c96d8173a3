"""Say what a .beton holds, and check every byte of it; behind `backmix inspect`.

`describe` reads the tables only. `verify` reads and decodes every sample, which is what finds a
damaged image in a stock file: stock files carry no checksums.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import simplejpeg

from backmix.pipeline.beton import (
    JPG,
    RAW,
    SUBSAMPLINGS,
    BetonSet,
    Flag,
    open_set,
    printable,
    subsampling,
)
from backmix.pipeline.options import usable_cores
from backmix.pipeline.shards import position

_CLASS_ROWS = 20
"""Most classes that are listed one by one."""
_TASK_SAMPLES = 64
"""Samples per task of the verifying threads."""


def describe(paths: Sequence[str | os.PathLike[str]]) -> str:
    """Return a page of text about the data set in these .beton files; some shards of one will do.

    Raises ValueError or OSError, as `open_set` does, if a file's header or tables are damaged.
    """
    with open_set(paths, partial=True) as data:
        rows = [*_files(data), *_modes(data), *_pixels(data), *_extension(data)]
        width = max(len(key) for key, _ in rows)
        lines = [f"{key:<{width}}  {value}".rstrip() for key, value in rows]
        return "\n".join([*lines, "", *_classes(data)])


def verify(
    paths: Sequence[str | os.PathLike[str]], progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Check every sample of these .beton files; return one line for each problem, in file order.

    A sample is good if its bytes match their checksum (where the file has them), it decodes
    without error or warning, and the picture has the size that the metadata says. A warning that
    was there at conversion (`Flag.WARNED`) is no problem. The checksums of whole pages are
    compared, too; they cover the unused bytes between the samples.

    Args:
        paths: .beton files of one data set, some or all, or its manifest.
        progress: called with (samples checked, samples in all) now and then.

    Raises ValueError or OSError, as `open_set` does, if a file's header or tables are damaged.
    """
    with open_set(paths, partial=True) as data, ThreadPoolExecutor(usable_cores()) as threads:
        problems: list[str] = []
        bad: list[int] = []
        tasks = range(0, data.n, _TASK_SAMPLES)
        try:
            for start, found in zip(
                tasks, threads.map(lambda start: _check_samples(data, start), tasks), strict=True
            ):
                bad += [i for i, _ in found]
                problems += [problem for _, problem in found]
                if progress is not None:
                    progress(min(start + _TASK_SAMPLES, data.n), data.n)
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
        return problems + _check_pages(data, set(data.pages[bad].tolist()))


# --- verify ---------------------------------------------------------------------------------------


def _check_samples(data: BetonSet, start: int) -> list[tuple[int, str]]:
    """Return (sample, problem) for the bad ones among a task's samples."""
    samples = range(start, min(start + _TASK_SAMPLES, data.n))
    return [(i, problem) for i in samples if (problem := _problem(data, i)) is not None]


def _problem(data: BetonSet, i: int) -> str | None:
    """Return what is wrong with sample i, or None."""
    try:
        stored = data.region(i)
    except ValueError:
        return f"{data.where(i)}: does not match its checksum"
    if data.modes[i] == RAW:
        return None  # any bytes are a picture; their number was checked at opening
    h, w = (int(side) for side in data.sizes[i])
    warned = data.flags is not None and bool(data.flags[i] & Flag.WARNED)
    try:
        # The header first: a damaged one could ask for 65535 x 65535 pixels.
        found_h, found_w, *_ = simplejpeg.decode_jpeg_header(stored, strict=not warned)
        if (found_h, found_w) != (h, w):
            return f"{data.where(i)}: the JPEG has {found_h} x {found_w} pixels, not {h} x {w}"
        simplejpeg.decode_jpeg(stored, "RGB", strict=not warned)
    except ValueError as error:
        return f"{data.where(i)}: does not decode ({error})"
    return None


def _check_pages(data: BetonSet, known: set[int]) -> list[str]:
    """Return the damaged pages beyond those that are `known` from their samples."""
    problems = []
    first = 0  # the set counts pages on from shard to shard
    for shard in data.shards:
        problems += [
            f"{shard.path}: page {number}, {shard.page_size} bytes from byte "
            f"{number * shard.page_size}: does not match its checksum, though its samples do"
            for number in shard.damaged_pages()
            if first + number not in known
        ]
        first += int(shard.pages.max()) + 1
    return problems


# --- describe -------------------------------------------------------------------------------------


def _files(data: BetonSet) -> Iterator[tuple[str, str]]:
    for k, shard in enumerate(data.shards):
        held = f"{_count(shard.n, 'sample')}, {_size(shard.path.stat().st_size)}"
        if place := position(shard):
            held += f", shard {place.number:05}-of-{place.count:05}"
        yield ("file" if k == 0 else ""), f"{printable(str(shard.path))}: {held}"
    if len(data.shards) > 1:
        total = sum(shard.path.stat().st_size for shard in data.shards)
        yield "in all", f"{_count(data.n, 'sample')}, {_size(total)}"
    sizes = sorted({shard.page_size for shard in data.shards})
    pages = _count(len(np.unique(data.pages)), "page")
    yield "pages", f"{pages} of {' or '.join(_size(size) for size in sizes)}"
    yield "digest", data.digest


def _modes(data: BetonSet) -> Iterator[tuple[str, str]]:
    parts = []
    for mode, name in ((JPG, "jpg"), (RAW, "raw")):
        chosen = data.modes == mode
        if chosen.any():
            stored = int(data.byte_sizes[chosen].sum())
            parts.append(f"{name} {int(chosen.sum()):,} ({_size(stored)})")
    yield "modes", ", ".join(parts)


def _pixels(data: BetonSet) -> Iterator[tuple[str, str]]:
    for name, values in (("height", data.sizes[:, 0]), ("width", data.sizes[:, 1])):
        yield name, _spread(values, "pixels")
    yield "stored", _spread(data.byte_sizes, "bytes")


def _extension(data: BetonSet) -> Iterator[tuple[str, str]]:
    if data.flags is None or data.hashes is None:
        yield "extension", "no: no checksums; a changed byte in an image may go unnoticed"
        return
    yield "extension", "yes: a checksum for every sample, page and table"
    yield "flags", ", ".join(_flag_counts(data, data.flags)) or "none set"
    writers = sorted({str(shard.info.get("writer", "unknown")) for shard in data.shards})
    yield "written by", printable(", ".join(writers))
    options = data.info.get("options")
    if isinstance(options, dict) and options:
        shown = ", ".join(f"{key}={value}" for key, value in sorted(options.items()))
        yield "options", printable(shown)


def _flag_counts(data: BetonSet, flags: np.ndarray) -> Iterator[str]:
    names = {
        Flag.PASSTHROUGH: "copied byte for byte",
        Flag.PROGRESSIVE: "progressive",
        Flag.GRAY: "gray",
        Flag.HARDWARE: "hardware-decodable",
        Flag.ROTATED: "rotated by EXIF",
        Flag.NORMALISED: "from another colour mode",
        Flag.MISNAMED: "misnamed",
        Flag.ANIMATED: "first frame of several",
        Flag.ICC: "with colour profile",
        Flag.WARNED: "decoding with a warning",
    }
    for flag, name in names.items():
        count = int(np.count_nonzero(flags & np.uint32(flag)))
        if count:
            yield f"{name} {count:,}"
    # Gray JPEGs have no chroma to subsample.
    coloured = (data.modes == JPG) & (flags & np.uint32(Flag.GRAY) == 0)
    counts = np.bincount(subsampling(flags[coloured]), minlength=len(SUBSAMPLINGS))
    for name, count in zip(SUBSAMPLINGS, counts.tolist(), strict=True):
        if count:
            yield f"chroma {name} {count:,}"


def _classes(data: BetonSet) -> Iterator[str]:
    """Yield the table of classes: all of them, or the first ones and a summary of the rest."""
    counts = np.bincount(data.labels, minlength=len(data.classes))
    empty = int((counts == 0).sum())
    heading = f"{_count(len(counts), 'class', 'classes')}, each with {_spread(counts, 'samples')}"
    yield heading + (f"; {empty:,} without any" if empty else "")
    # One more row would cost no more space than the line that says that it is missing.
    shown = len(counts) if len(counts) <= _CLASS_ROWS + 1 else _CLASS_ROWS
    names = [printable(name) for name in data.classes[:shown]]
    width = max(len(name) for name in names)
    for name, count in zip(names, counts[:shown].tolist(), strict=True):
        yield f"  {name:<{width}}  {count:>9,}"
    if shown < len(counts):
        rest = len(counts) - shown
        yield f"  ... and {rest:,} more classes with {int(counts[shown:].sum()):,} samples"


def _spread(values: np.ndarray, unit: str) -> str:
    low, high = int(values.min()), int(values.max())
    if low == high:
        return f"{low:,} {unit}"
    return f"{low:,} to {high:,} {unit} (median {float(np.median(values)):,.0f})"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _size(length: int) -> str:
    """Return a number of bytes for people, in powers of 1024."""
    if length < 1024:
        return f"{length} bytes"
    power = min((length.bit_length() - 1) // 10, 4)
    value = length / 1024**power
    digits = 0 if value >= 100 or value == int(value) else 1
    return f"{value:.{digits}f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
