"""Damage .beton files and say what becomes of each mutant, in a process that may crash or hang.

    python -m tests.pipeline.mutants FOLDER

reads lines `NAME NUMBER` from stdin: mutant NUMBER of FOLDER/NAME.beton, a function of the two
alone. It tries the reader, every sample, the loader `turbo`, and for every fourth `dali`, and
answers with one line of JSON. `Child` is the other end; `loader_mutants.py` tries single loaders.
"""

import json
import os
import resource
import select
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from backmix.pipeline import beton
from backmix.pipeline.batch import Place
from backmix.pipeline.beton import open_set
from backmix.pipeline.decode import read_image
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.subset import Subset

SECONDS = 60
"""How long one mutant may take. They take milliseconds; a busy machine is no hang."""
MOST_BYTES = 3 << 30
"""Resident memory that no mutant may drive a child to; torch and DALI take a fifth of it."""
FINE = ("refused", "sample refused", "as undamaged")
"""Outcomes that are right for any mutant."""
OTHER = "other data"
"""The outcome that only files without checksums, and files whose checksums were made anew after
the damage, may have."""
LOADERS = ("turbo", "dali") if find_spec("nvidia") and find_spec("nvidia.dali") else ("turbo",)
_INTEGERS = (0, 1, 2, 24, 255, 4096, 65535, 1 << 21, 1 << 31, 1 << 32, 1 << 63, 2**64 - 1)
_MOST_SAMPLES = 32
_LOADER = {"batch": 4, "group": 1, "size": 32, "crop": "random", "threads": 1, "max_bad": 1.0}


# --- the mutants ----------------------------------------------------------------------------------


@dataclass
class Base:
    """An undamaged file, and where what lies in it."""

    name: str
    content: bytes
    sealed: bool
    """It has an extension block, and so checksums."""
    parts: dict[str, list[tuple[int, int]]]
    """Start and end of each part's pieces [bytes]."""


def read_base(path: Path) -> Base:
    """Take a file apart."""
    content = path.read_bytes()
    header = np.frombuffer(content, beton.HEADER, 1)[0]
    table = int(header["alloc_table_ptr"])
    descriptors_end = 24 + 1041 * int(header["num_fields"])
    with open_set(path) as data:
        starts, sizes = data.pointers.tolist(), data.byte_sizes.tolist()
        sealed = data.hashes is not None
        metadata_end = descriptors_end + 24 * data.n
    images = list(zip(starts, sizes, strict=True))
    parts = {
        "header": [(0, 24)],
        "descriptors": [(24 + 1041 * k, 24 + 1041 * k + 60) for k in range(2)],
        "metadata": [(descriptors_end, metadata_end)],
        "image heads": [(start, start + min(size, 700)) for start, size in images],
        "images": [(start, start + size) for start, size in images],
        "table": [(table, len(content))],
        "anywhere": [(0, len(content))],
    }
    if sealed:
        at = int(np.frombuffer(content, beton.LOCATOR, 1, 41)[0]["offset"])
        tables = int(np.frombuffer(content, beton.BODY, 1, at)[0]["num_tables"])
        parts["locator"] = [(41, 81)]
        parts["directory"] = [(at, at + 16 + 48 * tables)]
        parts["extension"] = [(at, table)]
    return Base(path.stem, content, sealed, parts)


def mutant(
    base: Base, number: int, parts: Sequence[str] = (), resealed: float = 0.3
) -> tuple[str, bool, bytes]:
    """Return what was damaged, whether the checksums were made anew, and the damaged file.

    Args:
        base: the undamaged file.
        number: of the mutant.
        parts: keys of `base.parts` that may be damaged; empty: all.
        resealed: share of the mutants whose checksums are made anew, where the file has any.
    """
    random = np.random.default_rng([number, zlib.crc32(base.name.encode())])
    content = bytearray(base.content)
    said = []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        part = str(random.choice(parts or list(base.parts)))
        start, end = base.parts[part][random.integers(len(base.parts[part]))]
        kind = str(random.choice(list(_DAMAGES), p=_SHARES))
        place = int(random.integers(start, end))
        _DAMAGES[kind](content, random, min(place, max(len(content) - 1, 0)), start, end)
        said.append(f"{kind} in {part}")
    anew = base.sealed and bool(random.random() < resealed) and _seal(content)
    return " + ".join(said), anew, bytes(content)


_Damage = Callable[[bytearray, np.random.Generator, int, int, int], None]


def _flip(content: bytearray, random: np.random.Generator, place: int, *_: int) -> None:
    if content:
        content[place] ^= 1 << int(random.integers(8))


def _set(content: bytearray, random: np.random.Generator, place: int, *_: int) -> None:
    content[place : place + 1] = bytes([int(random.integers(256))])


def _integer(content: bytearray, random: np.random.Generator, place: int, *_: int) -> None:
    width = int(random.choice([2, 4, 8]))
    value = (
        int(random.integers(1 << 63)) if random.random() < 0.3 else int(random.choice(_INTEGERS))
    )
    order = "little" if random.random() < 0.8 else "big"
    written = (value % (1 << 8 * width)).to_bytes(width, order)
    content[place : place + width] = written[: len(content) - place]


def _add(content: bytearray, random: np.random.Generator, place: int, *_: int) -> None:
    """Change a number by a little: what passes more checks than noise does."""
    old = int.from_bytes(content[place : place + 4], "little")
    new = (old + int(random.integers(-300, 300))) % (1 << 32)
    content[place : place + 4] = new.to_bytes(4, "little")[: len(content) - place]


def _zero(content: bytearray, random: np.random.Generator, place: int, *_: int) -> None:
    count = min(int(random.integers(1, 65)), len(content) - place)
    content[place : place + count] = bytes(count)


def _copy(
    content: bytearray, random: np.random.Generator, place: int, start: int, end: int
) -> None:
    """Write a piece of the same part over another: rows, markers and tables change places."""
    source = int(random.integers(start, end))
    piece = content[source : source + int(random.integers(1, 65))]
    content[place : place + len(piece)] = piece[: len(content) - place]


def _delete(content: bytearray, random: np.random.Generator, place: int, *_: int) -> None:
    del content[place : place + int(random.integers(1, 65))]


def _insert(content: bytearray, random: np.random.Generator, place: int, *_: int) -> None:
    content[place:place] = random.bytes(int(random.integers(1, 65)))


def _cut(content: bytearray, random: np.random.Generator, place: int, *_: int) -> None:
    del content[place:]


_DAMAGES: dict[str, _Damage] = {
    "flip": _flip,
    "set": _set,
    "integer": _integer,
    "add": _add,
    "zero": _zero,
    "copy": _copy,
    "delete": _delete,
    "insert": _insert,
    "cut": _cut,
}
_SHARES = (0.2, 0.1, 0.2, 0.2, 0.08, 0.12, 0.03, 0.03, 0.04)


def _seal(content: bytearray) -> bool:
    """Make all checksums of a damaged file anew, as far as its tables can be found.

    A checksum tells damage, not sense: what a malicious or mistaken writer could write has right
    ones, and the checks behind them have to hold as well.
    """
    try:
        header = np.frombuffer(bytes(content[:24]), beton.HEADER)[0]
        locator = np.frombuffer(bytes(content[41:81]), beton.LOCATOR)[0]
        n, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
        at, length = int(locator["offset"]), int(locator["length"])
        if max(n, table, at, length) > len(content):
            return False
        metadata = bytes(content[2106 : 2106 + 24 * n])
        records = np.frombuffer(metadata, beton.record_dtype((2, 1)))
        rows = np.frombuffer(bytes(content[table:]), beton.REGION)
        body = bytearray(content[at : at + length])
        tables = int(np.frombuffer(bytes(body), beton.BODY, 1)[0]["num_tables"])
        entries = np.frombuffer(bytes(body), beton.ENTRY, min(tables, 64), 16).copy()
        head = bytearray(content[:2106])
        head[41:81] = bytes(40)
        shift = int(header["page_size"]).bit_length() - 1
        pages = records["f0"]["data_ptr"] >> np.uint64(shift)
        made = {
            b"sample_hash": [
                xxhash.xxh3_64_intdigest(bytes(content[int(ptr) : int(ptr) + int(size)]))
                for ptr, size in zip(records["f0"]["data_ptr"], rows["size"], strict=False)
            ],
            b"page_hash": [
                xxhash.xxh3_64_intdigest(bytes(content[k << shift : k + 1 << shift]))
                for k in range(int(pages.min()), min(int(pages.max()), int(pages.min()) + 64) + 1)
            ],
            b"head_hash": beton.head_hashes(bytes(head), metadata, rows.tobytes()),
        }
        for entry in entries:
            start = int(entry["offset"])
            if entry["name"] in made:
                packed = np.array(made[entry["name"]], "<u8").tobytes()
                body[start : start + len(packed)] = packed
            width = {b"<u8": 8, b"<u4": 4}.get(entry["dtype"], 1)
            span = bytes(body[start : start + width * int(entry["count"])])
            entry["hash"] = xxhash.xxh3_64_intdigest(span)
        body[16 : 16 + entries.nbytes] = entries.tobytes()
        content[at : at + length] = body
        body_hash = xxhash.xxh3_64_intdigest(bytes(body))
        sealed = np.array((beton.MAGIC, at, length, body_hash, 0), beton.LOCATOR)
        sealed["locator_hash"] = xxhash.xxh3_64_intdigest(sealed.tobytes()[:32])
        content[41:81] = sealed.tobytes()
    except (ValueError, IndexError, OverflowError, MemoryError):
        return False
    return True


# --- what becomes of them -------------------------------------------------------------------------


@dataclass
class Truth:
    """What the undamaged file holds."""

    labels: list[int]
    names: list[str]
    pixels: list[np.ndarray]
    views: dict[str, list[tuple[int, np.ndarray]]] = field(default_factory=dict)
    """By loader: sample number and view, in order of the epoch."""


def read_truth(path: Path) -> Truth:
    """Read the undamaged file by every way."""
    with open_set(path) as data:
        truth = Truth(
            data.labels.tolist(),
            [data.name(i) for i in range(data.n)],
            [read_image(data, i)[0].copy() for i in range(data.n)],
        )
    for loader in LOADERS:
        truth.views[loader] = [(index, view) for index, _, view in _epoch(path, loader)]
    return truth


def _epoch(path: Path, loader: Any, count: int | None = None) -> list[tuple[int, int, np.ndarray]]:
    """Return sample number, status and view of an epoch's rows."""
    subset = None
    if count is not None:
        subset = Subset(np.arange(count), np.zeros(count, np.int64))
    found = []
    with open_loader(path, LoaderOptions(loader=loader, **_LOADER), subset=subset) as opened:
        for batch in opened.batches(Place(1, 2)):
            views = batch.pool[batch.rows].numpy()
            rows = zip(batch.index.tolist(), batch.status.tolist(), views, strict=True)
            found += [(index, status, view.copy()) for index, status, view in rows]
    return found


def outcome(truth: Truth, path: Path, loaders: tuple[str, ...]) -> str:
    """Open and read a mutant by every way; anything but ValueError is for the caller to see."""
    try:
        data = open_set(path)
    except ValueError as error:
        _expect(str(path) in str(error), f"the error does not name the file: {error}")
        return "refused"
    refused = other = False
    with data:
        same = data.n == len(truth.labels) and data.labels.tolist() == truth.labels
        same &= [data.name(i) for i in range(min(data.n, _MOST_SAMPLES))] == truth.names
        other |= not same
        for i in range(min(data.n, _MOST_SAMPLES)):
            try:
                pixels = read_image(data, i)[0]
            except ValueError as error:
                _expect(f"sample {i}" in str(error), f"the error names no sample: {error}")
                refused = True
            else:
                other |= i >= len(truth.pixels) or not np.array_equal(pixels, truth.pixels[i])
        for loader in loaders:
            try:
                rows = _epoch(path, loader, _MOST_SAMPLES if data.n > _MOST_SAMPLES else None)
            except ValueError as error:
                _expect(len(str(error)) > 20, f"no error in words: {error}")
                refused = True
                continue
            if not same:
                continue
            for (index, status, view), (own, right) in zip(rows, truth.views[loader], strict=True):
                if status == 2:  # replaced, as it should be when its own is refused
                    _expect(refused, f"{loader} replaced sample {own}, which the reader reads")
                else:
                    other |= index != own or not np.array_equal(view, right)
    return OTHER if other else "sample refused" if refused else "as undamaged"


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise AssertionError(problem)


def main(folder: Path) -> None:
    """Serve mutants until stdin ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what native code prints is no answer
    bases: dict[str, tuple[Base, Truth]] = {}
    target = folder / f"mutant-{os.getpid()}.beton"
    print(json.dumps("ready"), file=out)
    for line in sys.stdin:
        name, number = line.split()
        if name not in bases:
            path = folder / f"{name}.beton"
            bases[name] = read_base(path), read_truth(path)
        base, truth = bases[name]
        what, anew, content = mutant(base, int(number))
        target.unlink(missing_ok=True)  # a new file: maps of the old one stay as they are
        target.write_bytes(content)
        loaders = LOADERS if int(number) % 4 == 0 else LOADERS[:1]
        try:
            found = outcome(truth, target, loaders)
        except Exception as error:  # reported, and judged by the other end
            found = f"{type(error).__name__}: {error}"
        unsealed = anew or not base.sealed or content[41:81] == bytes(40)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([found, what, unsealed, peak]), file=out)
    target.unlink(missing_ok=True)


# --- the other end --------------------------------------------------------------------------------


@dataclass
class Child:
    """A process that tries mutants, replaced by another one when it dies or hangs."""

    folder: Path
    module: str = "tests.pipeline.mutants"
    """What the process runs, on the folder."""
    seconds: int | None = None
    """How long one mutant may take; default `SECONDS`."""
    process: "subprocess.Popen[str] | None" = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def attempt(self, name: str, number: int, *more: str) -> tuple[str, str]:
        """Return the outcome of a mutant, and what was damaged; never waits for long.

        Args:
            name: of the undamaged file.
            number: of the mutant.
            more: further words of the line that the process reads.
        """
        if self.process is None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(f"{' '.join([name, str(number), *more])}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # told by the missing answer
        said = self._line(self.seconds or SECONDS)
        if not said:
            crash = f"crash, code {self.process.wait()}" if said == "" else "hang"
            self.stop()
            return crash, "unknown"
        found, what, unsealed, peak = json.loads(said)
        if found == OTHER and not unsealed:
            found = "wrong data in spite of checksums"
        if peak > MOST_BYTES:
            found = f"{peak >> 20} MiB of memory"
            self.stop()
        return found, what

    def _start(self) -> None:
        root = Path(__file__).resolve().parents[2]
        words = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-P"]
        paths = [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]
        with open(self.folder / "stderr.txt", "a") as errors:
            self.process = subprocess.Popen(
                [*words, "-m", self.module, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        assert self._line(120), (self.folder / "stderr.txt").read_text()[-2000:]

    def _line(self, seconds: float) -> str | None:
        """Return the next line of the child, empty if it is gone, None if it is silent."""
        assert self.process is not None and self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
