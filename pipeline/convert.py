"""`backmix convert`: a source of images becomes one .beton file and its manifest.

Images are read and checked by worker processes and stored in the order of the source through a
bounded window, so the file does not depend on the number of workers, and memory not on the number
of images. A JPEG is copied byte for byte where that is safe (`images.copy_refusal`). Whatever ends
the run early leaves nothing under the final names; placing the samples is `writer.py`'s work.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

import numpy as np

from backmix.pipeline import draws, images, shards
from backmix.pipeline.beton import JPG, RAW, Flag, open_beton, printable
from backmix.pipeline.interrupt import interrupted_by
from backmix.pipeline.options import ConvertOptions, refuse_unknown_choices, usable_cores
from backmix.pipeline.sources.classes import read_classes
from backmix.pipeline.sources.open import open_source
from backmix.pipeline.sources.source import Item, Source
from backmix.pipeline.writer import (
    Record,
    Writer,
    check_page_size,
    page_size_for,
    remove_dead_parts,
)

QUALITY = 90
"""JPEG quality of what is encoded where none is asked for: stock ffcv's."""

# Most pixels of the longer side, and of the shorter.
_PRESETS = {"none": (None, None), "s500": (500, None), "s384": (384, None), "s256": (None, 256)}

# Results that wait for an earlier one, per worker, and in all [bytes].
_WINDOW = 16
_HELD_BYTES = 256 * 2**20
# Requests that are sent to a worker at once, when it has half as many left or fewer: enough to work
# on while others are served. A socket holds all that a worker can have of so many characters, so
# that sending never waits for a worker that itself waits until its result is taken. An item with
# longer names goes to a worker that has nothing to do. Results have as much room on their way back,
# some photographs': a worker goes on with the next while they wait to be taken.
_QUEUE = 8
_QUEUE_CHARACTERS = 1 << 11
_SOCKET_BYTES = 1 << 18
# A worker's start costs as much as some dozens of images.
_ITEMS_PER_WORKER = 16
# Enough for the headers of most images, and of nearly all; one with more is read whole.
_HEADER_BYTES = (1 << 12, 1 << 16)
# Headers that are looked at as one task, as handing over a task costs more than one look; and tasks
# of which the first shows whether threads help.
_HEADERS = 32
_HEADER_TASKS = 32
# Where a header takes less, nobody waited for a disk, and threads would wait for one another [s].
_QUICK = 2e-4
_MODE_NAMES = {JPG: "jpg", RAW: "raw"}


@dataclass
class Summary:
    """What a conversion did."""

    out: Path
    classes: list[str]
    files: list[Path]
    """The .beton file, `out`, or its shards."""
    written: int = 0
    bytes: int = 0
    """Size of the .beton file, or of all shards."""
    page_size: int = 0
    copied: int = 0
    """JPEGs stored byte for byte; the others were encoded."""
    quality: int = QUALITY
    """Of what was encoded, 1..100."""
    warned: int = 0
    """Images that were whole but made the decoder complain."""
    modes: Counter[str] = field(default_factory=Counter)
    """Samples by stored mode, `jpg` and `raw`."""
    class_counts: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of every image that was left out."""
    notes: list[str] = field(default_factory=list)
    """What the source held and was not taken."""
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.written / max(self.seconds, 1e-9)
        empty = sum(not self.class_counts[name] for name in self.classes)
        classes = f"{len(self.classes):,} classes" + (f" ({empty:,} without any)" if empty else "")
        encoded = self.modes["jpg"] - self.copied
        place = str(self.files[0])
        if len(self.files) > 1:
            place += f" to {self.files[-1].name}, listed in {_manifest_path(self.out).name}"
        lines = [
            f"{printable(place)}: {self.written:,} images of {classes}, "
            f"{self.bytes:,} bytes, {self.seconds:.1f} s ({rate:,.0f} images/s)",
            f"stored as JPEG {self.modes['jpg']:,} (copied byte for byte {self.copied:,}"
            + (f", encoded {encoded:,} at quality {self.quality}" if encoded else "")
            + f"), as pixels {self.modes['raw']:,}; page size {self.page_size:,} bytes",
        ]
        if self.warned:
            lines.append(f"decoded with a warning {self.warned:,} (see the manifest)")
        lines += self.notes
        if self.skipped:
            lines.append(f"left out {len(self.skipped):,}:")
            lines += [
                f"  {printable(name)}: {printable(reason)}" for name, reason in self.skipped[:10]
            ]
            if len(self.skipped) > 10:
                lines.append(f"  ... and {len(self.skipped) - 10:,} more (see the manifest)")
        return "\n".join(lines)


def convert(
    source: str,
    out: Path,
    options: ConvertOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Convert a source of images to a .beton file with a manifest beside it.

    Args:
        source: what to convert, see `sources.open.SCHEMES`.
        out: the file to write; the manifest is `OUT.jsonl` beside it (for `train.beton`,
            `train.beton.jsonl`). With `shards` the files are `train-00000-of-00003.beton` and so
            on, and only the manifest has this name.
        progress: called with (images done, images in all), first with 0.

    Raises:
        ValueError: wrong options or source, an existing `out` without `force`, or an image that
            cannot be decoded (unless `on_error` is `skip`).
        OSError: reading or writing failed, or a worker process died; the message names the file.
        KeyboardInterrupt: SIGINT, or SIGTERM while this runs in the main thread.
    """
    _check(options)
    out = Path(out)
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is not a folder; create it first")
    _check_names(out, options)
    start = time.monotonic()
    with interrupted_by(signal.SIGTERM):  # as by Ctrl-C, so that part files are removed
        listed = open_source(source, read_classes(options.classes) if options.classes else None)
        if options.shards > len(listed.items):
            raise ValueError(
                f"--shards {options.shards} is more than the {len(listed.items)} images of {source}"
            )
        _keep_the_source(listed, [*shards.paths(out, options.shards), _manifest_path(out)])
        wants = _wants(options, len(listed.items))
        page_size = options.page_size
        while True:
            try:
                with _Crew(_workers(listed, options), options) as crew:
                    if page_size is None:  # the workers start meanwhile
                        page_size = page_size_for(_largest(listed, wants, options))
                    summary = _write(listed, wants, crew, out, options, page_size, progress)
                break
            except _WrongPages as wrong:
                # A JPEG whose header looked fit to be copied is stored as pixels after all, and
                # they exceed the page; or what asked for a huge page was left out. Rare enough to
                # start over rather than to measure by decoding everything twice.
                page_size = page_size_for(wrong.largest)
    summary.seconds = time.monotonic() - start
    return summary


def _check(options: ConvertOptions) -> None:
    refuse_unknown_choices(options, "--")
    if options.mode == "raw" and options.quality is not None:
        raise ValueError("--quality has no effect with --mode raw, which encodes nothing")
    if options.mode != "smart" and options.smart_threshold is not None:
        raise ValueError(f"--smart-threshold needs --mode smart, not {options.mode}")
    if options.quality is not None and not 1 <= options.quality <= 100:
        raise ValueError(f"--quality must be 1 to 100, not {options.quality}")
    if options.max_side is not None and options.max_side < 1:
        raise ValueError(f"--max-side must be at least 1 pixel, not {options.max_side}")
    if options.mode != "proportion":
        idle = ConvertOptions()
        for name in ("compress_probability", "seed"):
            if getattr(options, name) != getattr(idle, name):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} needs --mode proportion, not {options.mode}")
    if not 0 <= options.compress_probability <= 1:
        raise ValueError(
            f"--compress-probability must be 0 to 1, not {options.compress_probability}"
        )
    if options.smart_threshold is not None and options.smart_threshold < 0:
        raise ValueError(f"--smart-threshold must not be negative: {options.smart_threshold}")
    if options.preset != "none":
        _refuse_beside_preset(options)
    if options.page_size is not None:
        check_page_size(options.page_size)
    if not 1 <= options.shards <= shards.MOST:
        raise ValueError(f"--shards must be 1 to {shards.MOST}, not {options.shards}")
    if options.workers < 0:
        raise ValueError(f"--workers must not be negative: {options.workers}")


def _refuse_beside_preset(options: ConvertOptions) -> None:
    said = f"--preset {options.preset} decides on size, quality and mode: leave out"
    if options.max_side is not None:
        raise ValueError(f"{said} --max-side, or the preset")
    if options.quality is not None:
        raise ValueError(f"{said} --quality, or the preset")
    if options.mode != "auto":
        raise ValueError(f"{said} --mode {options.mode}, or the preset")


def _check_names(out: Path, options: ConvertOptions) -> None:
    """Refuse names that are taken or cannot be written, before the work and not after it."""
    manifest = _manifest_path(out)
    files = shards.paths(out, options.shards)
    for path in (*files, manifest):
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file to write")
        # A killed run may leave its manifest without the file; it is in nobody's way.
        harmless = path == manifest and _is_manifest(manifest)
        if not options.force and os.path.lexists(path) and not harmless:
            raise ValueError(f"{path} exists already: choose another name, or use --force")
    # Two sets under one name would have one manifest, and a pattern such as train-*.beton would
    # take both. Not even --force removes files that it does not write anew.
    for path in [out, *shards.siblings(out)]:
        if path not in files and os.path.lexists(path):
            raise ValueError(
                f"{path} is there, of another conversion to {out.name} with another number of "
                "shards: remove it first, or choose another name"
            )
    with _Manifest(manifest):  # a folder that cannot be written to fails here
        pass
    for path in shards.siblings(out, parts=True):  # of a killed run with another number of them
        remove_dead_parts(path)


def _manifest_path(out: Path) -> Path:
    return out.with_name(out.name + shards.MANIFEST_SUFFIX)


def _is_manifest(path: Path) -> bool:
    """Return whether the first line is a row as `_Manifest` writes it."""
    if not path.is_file():
        return False
    try:
        with open(path, encoding="utf-8") as file:
            row = json.loads(file.readline(1 << 20))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and {"sample", "name", "class"} <= row.keys()


def _keep_the_source(listed: Source, written: list[Path]) -> None:
    """Refuse to replace what is being read."""
    sources = [path for path in (listed.items[0].path, *listed.files) if os.path.exists(path)]
    for path in written:
        if os.path.exists(path) and any(os.path.samefile(source, path) for source in sources):
            raise ValueError(f"{path} is the source itself: choose another name")


def _wants(options: ConvertOptions, count: int) -> Callable[[int], str]:
    """Return how each sample shall be stored: sample number to `auto`, `jpg`, `raw`, `smart`."""
    if options.preset != "none":
        return lambda i: "jpg"
    if options.mode != "proportion":
        return lambda i: options.mode
    words = draws.block(options.seed, 0, np.arange(count), "proportion")
    encoded = draws.uniform(words[:, 0]) < options.compress_probability
    return lambda i: "jpg" if encoded[i] else "raw"


# --- what becomes of one image -------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """One image as it goes into the file."""

    data: Any
    """Bytes-like: a JPEG stream, or height x width x 3 bytes."""
    mode: int
    """`beton.JPG` or `beton.RAW`."""
    height: int
    width: int
    flags: int
    done: list[str]
    """What was done to the source's image, for the manifest; the first word tells the way."""


def limits(options: ConvertOptions) -> tuple[int | None, int | None]:
    """Return the most pixels of the longer and of the shorter side; None = any."""
    return (options.max_side, None) if options.preset == "none" else _PRESETS[options.preset]


def store(item: Item, want: str, options: ConvertOptions, data: bytes | None = None) -> Stored:
    """Read one image and bring it into the form in which it is stored.

    Args:
        item: the image.
        want: `auto`, `jpg`, `raw` or `smart`.
        options: `quality`, `max_side`, `preset`, `smart_threshold` and `check` count here.
        data: the encoded image, where it cannot be read through the item.

    Raises:
        ValueError: it cannot be decoded, or is larger than the limits of `images`.
        OSError: it cannot be read.
    """
    if item.pixels is not None:
        plan = _plan(want, item.pixels.shape[:2], options)
        return _stored_pixels(item.pixels, plan, 0, [], options)
    data = item.read() if data is None else data
    facts = images.jpeg_facts(data) if images.is_jpeg(data) else None
    refusal = images.copy_refusal(facts) if facts else ""
    if facts and _plan(want, facts.size, options, jpeg=True, fit=not refusal) == "copy":
        copied = _copy(item, data, facts, options)
        if copied is not None:
            return copied
    decoded = images.decode(data, facts)
    flags, notes = _misnamed(item.name, decoded.format)
    plan = _plan(want, decoded.pixels.shape[:2], options, jpeg=facts is not None)
    notes += [f"not copied: {refusal}"] if refusal else []
    notes += decoded.notes
    return _stored_pixels(decoded.pixels, plan, decoded.flags | flags, notes, options)


def _plan(
    want: str,
    size: tuple[int, ...],
    options: ConvertOptions,
    *,
    jpeg: bool = False,
    fit: bool = False,
) -> str:
    """Decide between `copy`, `jpg` and `raw`.

    Args:
        want: what was asked for this sample.
        size: height and width of the source's image [pixels].
        options: `quality`, `max_side`, `preset` and `smart_threshold` count here.
        jpeg: the source is a JPEG.
        fit: the source is a JPEG that may be stored byte for byte.
    """
    height, width = images.shrunk_size(size[0], size[1], *limits(options))
    if want == "smart":
        # As stock ffcv: by bytes of pixels, and everything raw where no threshold is given.
        threshold = options.smart_threshold
        want = "jpg" if threshold is not None and 3 * height * width > threshold else "raw"
    if want == "raw":
        return "raw"
    anew = options.quality is not None or (height, width) != tuple(size)
    if fit and not anew:
        return "copy"
    # auto: pixels that were no JPEG before stay pixels, as coding them would let a network tell
    # sources apart by their artefacts; what was a JPEG and must be coded anew becomes one again.
    return "jpg" if want == "jpg" or (jpeg and anew) else "raw"


def _copy(
    item: Item, data: bytes, facts: images.JpegFacts, options: ConvertOptions
) -> Stored | None:
    """Return the JPEG as it is, or None where it decodes with a warning only."""
    images.check_size(facts.height, facts.width)
    stream = data[: facts.end]
    if options.check != "none" and images.check_jpeg(stream, scaled=options.check == "scaled"):
        return None
    flags, notes = _misnamed(item.name, "JPEG")
    if facts.end < len(data):
        notes.append(f"{len(data) - facts.end} bytes behind the end marker dropped")
    flags |= images.stream_flags(facts) | Flag.PASSTHROUGH
    return Stored(stream, JPG, facts.height, facts.width, int(flags), ["copied", *notes])


def _stored_pixels(
    pixels: np.ndarray, plan: str, flags: int, notes: list[str], options: ConvertOptions
) -> Stored:
    small = images.shrink(pixels, *limits(options))
    if small is not pixels:
        notes = [*notes, f"shrunk from {pixels.shape[1]} x {pixels.shape[0]}"]
    height, width, _ = small.shape
    if plan == "jpg":
        quality = options.quality or QUALITY
        data = images.encode_jpeg(small, quality)
        done = [f"encoded at quality {quality}", *notes]
        # The new stream decodes without a warning, and nobody wrote a profile into it.
        flags = flags & ~(Flag.WARNED | Flag.ICC) | images.ENCODED_FLAGS
        return Stored(data, JPG, height, width, int(flags), done)
    return Stored(small.reshape(-1).data, RAW, height, width, int(flags), ["pixels", *notes])


def _misnamed(name: str, content: str) -> tuple[int, list[str]]:
    promised = images.SUFFIXES.get(os.path.splitext(name)[1].lower(), content)
    if promised == content:
        return 0, []
    return Flag.MISNAMED, [f"is {content}, not {promised} as named"]


def _largest(listed: Source, wants: Callable[[int], str], options: ConvertOptions) -> int:
    """Return the expected bytes of the largest stored image, from headers alone."""
    count = len(listed.items)

    def expected(i: int) -> int:
        return _expected(listed.items[i], wants(i), options)

    if listed.in_memory:
        return max(map(expected, range(count)))
    largest = 0
    if listed.stream:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on large images
            for i, data in enumerate(listed.stream()):
                largest = max(largest, _expected(listed.items[i], wants(i), options, data or b""))
        return largest

    def largest_from(start: int) -> int:
        return max(map(expected, range(start, min(start + _HEADERS, count))))

    tasks = range(0, count, _HEADERS)
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as threads:
        warnings.simplefilter("ignore")  # Pillow's remarks on large images
        for first in range(0, len(tasks), _HEADER_TASKS):
            begin = time.monotonic()
            largest = max(largest, largest_from(tasks[first]))
            quick = time.monotonic() - begin < _QUICK * _HEADERS
            rest = tasks[first + 1 : first + _HEADER_TASKS]
            largest = max(largest, *(map if quick else threads.map)(largest_from, rest), 0)
    return largest


def _expected(item: Item, want: str, options: ConvertOptions, data: bytes | None = None) -> int:
    if item.pixels is not None:
        size = item.pixels.shape[:2]
        plan = _plan(want, size, options)
    else:
        try:
            if data is not None:
                file_size = len(data)
                size, jpeg, fit = _header_of(data)
            else:
                file_size = os.stat(item.path).st_size if item.size is None else item.size
                size, jpeg, fit = _header(item)
            images.check_size(*size)
        except (OSError, ValueError):  # reported when its turn comes
            return 1
        plan = _plan(want, size, options, jpeg=jpeg, fit=fit)
        if plan == "copy":
            return file_size
    height, width = images.shrunk_size(size[0], size[1], *limits(options))
    # An encoded image takes less than a byte a pixel, save noise at the highest qualities; pages
    # have room for four times this figure, more than the pixels themselves take.
    return height * width * (1 if plan == "jpg" else 3) + 4096


def _header(item: Item) -> tuple[tuple[int, int], bool, bool]:
    """Return size, whether it is a JPEG, and whether it may be copied, from the file's head."""
    for limit in _HEADER_BYTES:
        with contextlib.suppress(ValueError):
            return _header_of(item.read(limit))
    return _header_of(item.read())


def _header_of(data: bytes) -> tuple[tuple[int, int], bool, bool]:
    if not images.is_jpeg(data):
        return images.image_size(data), False, False
    facts = images.jpeg_facts(data, whole=False)
    return facts.size, True, not images.copy_refusal(replace(facts, end=0))  # as if it had one


# --- workers -------------------------------------------------------------------------------------


class _WrongPages(Exception):
    """The pages that were chosen for the expected sizes are too small, or far too large."""

    def __init__(self, largest: int) -> None:
        super().__init__(largest)
        self.largest = largest


# What stands before a message: bytes of its head (JSON), and of the data behind it.
_FRAME = struct.Struct("<IQ")


def _send(connection: socket.socket, said: bytes, data: Any = b"") -> None:
    """Send a message: its head, and bytes."""
    head = _FRAME.pack(len(said), len(data)) + said
    # By one call, as most fit into the socket's buffer; then what is left of either.
    sent = connection.sendmsg([head, data])
    connection.sendall(head[sent:])
    connection.sendall(memoryview(data)[max(sent - len(head), 0) :])


def _recv(connection: socket.socket) -> tuple[bytes, memoryview]:
    """Receive a message; EOFError if the other side is gone."""
    said, length = _FRAME.unpack(_exactly(connection, _FRAME.size))
    both = _exactly(connection, said + length)
    return bytes(both[:said]), both[said:]


def _exactly(connection: socket.socket, length: int) -> memoryview:
    whole = memoryview(np.empty(length, np.uint8))  # pyright: ignore[reportArgumentType]
    at = 0
    while at < length:
        found = connection.recv_into(whole[at:], length - at, socket.MSG_WAITALL)
        if not found:
            raise EOFError
        at += found
    return whole


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: socket.socket
    tasks: deque[tuple[int, Item]] = field(default_factory=deque)
    """What it was given, in order; it works on the first."""


class _Crew:
    """Worker processes, each started fresh and fed through its own socket.

    Not multiprocessing's pools: those import the user's main module again, and tell that a worker
    died but not over which file. Here each worker has a short queue of its own, so a closed socket
    names the file. Messages are JSON and bytes. A worker ends when its socket closes, so none
    survives this process, however that ends.

    Where images come out of a stream, their bytes go to the workers with the requests, and a worker
    gets one only when it has nothing else to do: two processes that each wait until the other one
    reads would wait for ever.
    """

    def __init__(self, count: int, options: ConvertOptions) -> None:
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(_start_worker(options))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()

    def run(
        self,
        items: Sequence[Item],
        wants: Callable[[int], str],
        stream: Iterator[bytes | None] | None = None,
    ) -> Iterator[Stored | str]:
        """Yield for each item, in order, what is stored or why it cannot be."""
        most = _QUEUE if stream is None else 1
        window = _WINDOW * len(self._workers)
        ready: dict[int, Stored | str] = {}
        held = given = 0
        for turn in range(len(items)):
            while True:
                # The item whose turn it is has always been given, so waiting for room in memory
                # cannot be for ever.
                while given < min(turn + window, len(items)) and held < _HELD_BYTES:
                    worker = min(self._workers, key=lambda worker: len(worker.tasks))
                    long = _characters(items[given]) > _QUEUE_CHARACTERS
                    if len(worker.tasks) > (0 if long else most // 2):
                        break
                    if stream is None:
                        # Many at once while many are left, so that workers end together.
                        share = (len(items) - given) // (4 * len(self._workers))
                        until = min(turn + window, given + min(max(1, share), most))
                        given = _give(worker, items, range(given, until), wants)
                        continue
                    data = next(stream)
                    if data is None or len(data) > images.MAX_BYTES:
                        ready[given] = _unfit(data)
                        given += 1
                    else:
                        given = _give(worker, items, range(given, given + 1), wants, data)
                if turn in ready:
                    break
                # Where no more can be held, only the worker whose turn it is may hand over.
                busy = [
                    worker
                    for worker in self._workers
                    if worker.tasks and (held < _HELD_BYTES or worker.tasks[0][0] == turn)
                ]
                for index, result in _results_of(busy):
                    ready[index] = result
                    held += _size(result)
            result = ready.pop(turn)
            held -= _size(result)
            yield result


def _characters(item: Item) -> int:
    return len(item.name) + len(item.path)


def _give(
    worker: _Worker,
    items: Sequence[Item],
    chosen: range,
    wants: Callable[[int], str],
    data: bytes | None = None,
) -> int:
    """Send requests to a worker, at least one; return the number of the next item."""
    requests = []
    size = 0
    for index in chosen:
        item = items[index]
        size += _characters(item)
        if requests and size > _QUEUE_CHARACTERS:
            break
        requests.append([item.name, item.path, item.offset, item.size, wants(index)])
        worker.tasks.append((index, item))
    try:
        _send(worker.connection, json.dumps([requests, data is not None]).encode(), data or b"")
    except OSError as error:
        raise _died(worker) from error
    return chosen[0] + len(requests)


def _results_of(busy: list[_Worker]) -> Iterator[tuple[int, Stored | str]]:
    """Wait for workers; yield the result of each that has one."""
    ready = set(wait([worker.connection for worker in busy]))
    for worker in busy:
        if worker.connection in ready:
            try:
                said, data = _recv(worker.connection)
            except (EOFError, OSError) as error:
                raise _died(worker) from error
            head = json.loads(said)
            index, _ = worker.tasks.popleft()
            yield index, head if isinstance(head, str) else Stored(data, *head)


def _unfit(data: bytes | None) -> str:
    if data is None:
        return "there are no bytes of it"
    return f"{len(data):,} bytes; images may have {images.MAX_BYTES:,} at most"


def _size(result: Stored | str) -> int:
    return len(result) if isinstance(result, str) else len(result.data)


def _died(worker: _Worker) -> ChildProcessError:
    code = worker.process.wait()
    # What it handed over before is not what it died of. A reset is told once, ahead of the data.
    resets = 0
    while len(worker.tasks) > 1:
        try:
            _recv(worker.connection)
        except ConnectionResetError:
            resets += 1
            if resets > 1:
                break
        except (EOFError, OSError):
            break
        else:
            worker.tasks.popleft()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return ChildProcessError(
        f"a worker process {how} while it worked on {_where(worker.tasks[0][1])}; if memory ran "
        "out, use fewer --workers, otherwise look at this file"
    )


# -P and PYTHONPATH: a worker shall find this package, not whatever lies in the working folder.
_WORKER = "import sys; from backmix.pipeline.convert import work; work(*sys.argv[1:])"


def _start_worker(options: ConvertOptions) -> _Worker:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    package = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    fields = ("quality", "max_side", "preset", "smart_threshold", "check")
    settings = json.dumps({name: getattr(options, name) for name in fields})
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _WORKER, str(theirs.fileno()), settings],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            # Nothing here is for numpy's own threads, whose start takes time.
            env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for this process, which then ends the workers
        )
    return _Worker(process, ours)


def work(descriptor: str, settings: str) -> None:
    """Serve as a worker process: requests come in and results go out through a socket.

    Args:
        descriptor: number of the socket's file descriptor.
        settings: the options that `store` heeds, as JSON.
    """
    warnings.simplefilter("ignore")  # Pillow's remarks; what matters is raised or noted
    options = ConvertOptions(**json.loads(settings))
    with (
        socket.socket(fileno=int(descriptor)) as connection,
        contextlib.suppress(EOFError, ConnectionError),
    ):
        while True:
            said, data = _recv(connection)
            requests, follows = json.loads(said)
            given = bytes(data) if follows else None
            for name, path, offset, size, want in requests:
                result = _attempt(Item(name, 0, path, offset, size), want, options, given)
                if isinstance(result, str):
                    _send(connection, json.dumps(result).encode())
                else:
                    head = [result.mode, result.height, result.width, result.flags, result.done]
                    _send(connection, json.dumps(head).encode(), result.data)


def _attempt(
    item: Item, want: str, options: ConvertOptions, data: bytes | None = None
) -> Stored | str:
    """Return what is stored of an item, or why it cannot be."""
    try:
        return store(item, want, options, data)
    except (ValueError, OSError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        return said or str(error) or type(error).__name__


def _where(item: Item) -> str:
    if not item.path:
        return printable(item.name)
    own = item.size is None and item.path.endswith(item.name)
    place = item.path if own else f"{item.path}: {item.name}"
    return printable(f"{item.listed}: {place}" if item.listed else place)


# --- writing -------------------------------------------------------------------------------------


def _workers(listed: Source, options: ConvertOptions) -> int:
    if listed.in_memory:  # nothing to decode: a process costs more than it saves
        return 0
    return min(options.workers or usable_cores(), 1 + len(listed.items) // _ITEMS_PER_WORKER)


def _results(
    listed: Source, wants: Callable[[int], str], crew: _Crew, options: ConvertOptions
) -> Generator[Stored | str, None, None]:
    if listed.in_memory:
        for i in range(len(listed.items)):
            yield _attempt(listed.items[i], wants(i), options)
    else:
        yield from crew.run(listed.items, wants, listed.stream() if listed.stream else None)


def _write(
    listed: Source,
    wants: Callable[[int], str],
    crew: _Crew,
    out: Path,
    options: ConvertOptions,
    page_size: int,
    progress: Callable[[int, int], None] | None,
) -> Summary:
    files = shards.paths(out, options.shards)
    summary = Summary(out, listed.classes, files, page_size=page_size, notes=listed.notes)
    summary.quality = options.quality or QUALITY
    total = len(listed.items)
    largest = 0
    if progress:
        progress(0, total)
    with (
        contextlib.closing(_results(listed, wants, crew, options)) as results,
        _Manifest(_manifest_path(out)) as manifest,
        contextlib.ExitStack() as unfinished,
    ):
        writers: list[Writer] = []
        contents: list[dict[str, Any]] = []
        for k, chosen in enumerate(shards.ranges(total, len(files))):
            previous = contents[-1]["digest"] if contents else ""
            before = summary.written
            writer = Writer(
                files[k],
                samples=len(chosen),
                page_size=page_size,
                classes=listed.classes,
                options=_noted(options),
                force=options.force,
                shard=shards.Position(k, len(files), previous) if len(files) > 1 else None,
            )
            writers.append(unfinished.enter_context(writer))
            for i in chosen:
                item, result = listed.items[i], next(results)
                if isinstance(result, str):
                    _skip(item, result, options, summary, manifest)
                else:
                    largest = max(largest, len(result.data))
                    if largest > page_size and options.page_size is None:
                        raise _WrongPages(largest)
                    _place(item, result, summary, writer, manifest)
                if progress:
                    progress(i + 1, total)
            last = k + 1 == len(files)
            if summary.written == before:
                raise ValueError(_nothing(listed, summary, chosen, files[k]))
            far_too_large = 4 * page_size_for(largest) <= page_size
            if last and summary.skipped and far_too_large and options.page_size is None:
                raise _WrongPages(largest)
            writer.seal()
            with open_beton(writer.part) as data:
                contents.append({"file": files[k].name, "samples": data.n, "digest": data.digest})
        totals: dict[str, Any] = {"written": summary.written, "skipped": len(summary.skipped)}
        totals |= {"page_size": page_size, "modes": dict(sorted(summary.modes.items()))}
        totals |= {"options": _noted(options)}
        totals |= {"digest": shards.joint_digest([shard["digest"] for shard in contents])}
        if len(files) > 1:
            totals |= {"shards": contents}
        manifest.write({"total": totals})
        _publish(writers, manifest)
    summary.bytes = sum(path.stat().st_size for path in files)
    return summary


def _nothing(listed: Source, summary: Summary, chosen: range, path: Path) -> str:
    """Say that no image of a file could be decoded."""
    total = len(listed.items)
    name, reason = summary.skipped[-len(chosen)]
    if len(chosen) == total:
        what = f"none of the {total} images of {listed.spec} can be decoded"
    else:
        what = (
            f"none of the {len(chosen)} images of {listed.spec} that belong into {path.name} can "
            "be decoded, and no shard may be empty: choose fewer --shards"
        )
    return f"{what}; the first, {printable(name)}: {reason}"


def _publish(writers: list[Writer], manifest: "_Manifest") -> None:
    """Give complete files their names, a set's all or none."""
    if len(writers) == 1:
        # The file, once it is there under its name, has its manifest; and a run that fails before
        # leaves the manifest of an earlier one as it was. The digest ties the two together.
        manifest.publish()
        writers[0].publish()
        return
    # A manifest opens a set: it comes last. Where old shards are replaced, a run that is killed
    # here leaves some of both, which their digests and notes do not let anybody open together.
    try:
        for writer in writers:
            writer.publish()
        manifest.publish()
    except BaseException:
        for writer in writers:
            writer.withdraw()
        raise


def _noted(options: ConvertOptions) -> dict[str, Any]:
    """Return the options that the file's content depends on: no path, no number of workers."""
    left_out = ("classes", "on_error", "workers", "shards", "page_size", "force")
    return {key: value for key, value in asdict(options).items() if key not in left_out}


def _skip(
    item: Item, reason: str, options: ConvertOptions, summary: Summary, manifest: "_Manifest"
) -> None:
    if options.on_error == "stop":
        raise ValueError(f"{_where(item)}: {reason}; --on-error skip leaves such images out")
    name = _printable(item.name)
    reason += f" ({item.listed})" if item.listed else ""
    summary.skipped.append((name, reason))
    class_name = summary.classes[item.label]
    manifest.write({"sample": None, "name": name, "class": class_name, "skipped": reason})


def _place(
    item: Item, stored: Stored, summary: Summary, writer: Writer, manifest: "_Manifest"
) -> None:
    name = _printable(item.name)
    class_name = summary.classes[item.label]
    height, width = stored.height, stored.width
    writer.append(
        Record(stored.data, stored.mode, height, width, item.label, stored.flags, item.name)
    )
    mode = _MODE_NAMES[stored.mode]
    manifest.write(
        {
            "sample": summary.written,
            "name": name,
            "class": class_name,
            "label": item.label,
            "height": height,
            "width": width,
            "mode": mode,
            "bytes": len(stored.data),
            "done": stored.done,
        }
    )
    summary.written += 1
    summary.modes[mode] += 1
    summary.class_counts[class_name] += 1
    summary.copied += bool(stored.flags & Flag.PASSTHROUGH)
    summary.warned += any(note.startswith(images.WARNING_NOTE) for note in stored.done)


def _printable(name: str) -> str:
    """Return a file name as valid Unicode: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


class _Manifest:
    """The JSON lines beside the file; whole or not at all, like it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part = path.with_name(f"{path.name}.part-{os.getpid()}")
        with self._named_errors():
            remove_dead_parts(path)
            self._file = open(self._part, "w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # the last buffer may find no room
            self._file.close()
        self._part.unlink(missing_ok=True)

    def write(self, row: dict[str, Any]) -> None:
        with self._named_errors():
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def publish(self) -> None:
        """Give the finished manifest its name."""
        with self._named_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._part, self.path)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"{self.path}: {error.strerror}; nothing was left behind") from error
