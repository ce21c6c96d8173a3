"""Read damaged files by one loader, in a process that may crash or hang, and judge every row.

    python -m tests.pipeline.loader_mutants FOLDER

reads lines `NAME NUMBER WAY` from stdin and answers with one line of JSON, as `mutants.py`, whose
`Child` is the other end. WAY is a key of `WAYS`: mutant NUMBER of FOLDER/NAME.beton is read by that
loader, some behind an undamaged file, some for evaluation. What a row must show is computed here
from the bytes as they are, damaged or not, so that a wrong row is told also where the checksums
were made anew. WAY manifest: a mutant of FOLDER/NAME.beton.jsonl is opened and read.
"""

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg

from backmix.pipeline import ffcv_loader, shards
from backmix.pipeline.batch import Place
from backmix.pipeline.beton import JPG, BetonSet, open_set
from backmix.pipeline.decode import cut, read_image
from backmix.pipeline.loader import Loader, open_loader
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.plan import Plan
from backmix.pipeline.subset import Subset
from tests.pipeline import mutants

WAYS: dict[str, dict[str, Any]] = {
    "full": {"loader": "turbo", "decoder": "full"},
    "region": {"loader": "turbo", "decoder": "region"},
    "resident": {"loader": "resident", "crop": "whole"},
    "ffcv": {"loader": "ffcv"},
    "dali": {"loader": "dali"},
}
"""The loaders, and their options."""
READS_NO_MORE_THAN_THE_BOX = ("region", "dali")
"""Ways that, of a JPEG whose right checksum tells that a converter has decoded it, look at no more
than is shown."""
_PLACE = Place(1, 2)
_MOST_SAMPLES = 32


class Wrong(Exception):
    """A defect, in words."""


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise Wrong(problem)


# --- .beton files ---------------------------------------------------------------------------------


def mutant(base: mutants.Base, number: int) -> tuple[str, bool, bytes]:
    """Return what was damaged, whether its checksums were made anew, and the damaged file.

    Most are damaged in their images alone, and most have right checksums: what the reader refuses
    no loader sees.
    """
    parts = ["image heads", "images"] if number % 5 < 3 else []
    return mutants.mutant(base, number, parts, resealed=0.7)


def judge(truth: mutants.Truth, before: list[Path], path: Path, way: str, number: int) -> str:
    """Open a mutant by one loader, read an epoch and return what became of it.

    Args:
        truth: what the undamaged file holds.
        before: undamaged files that are opened with the mutant, before it.
        path: the mutant.
        way: a key of `WAYS`.
        number: of the mutant.

    Raises Wrong for a defect.
    """
    paths, labels = [*before, path], truth.labels * (1 + len(before))
    try:
        data = open_set(paths)
    except ValueError as error:
        _expect(any(str(one) in str(error) for one in paths), f"no file is named: {error}")
        return "refused"
    with data:
        bad, right = _readable(data, truth, len(labels))
        other = data.labels.tolist() != labels or not right
        vouched = data.hashes is not None
        try:
            for index, view, box in _delivered(paths, data, way, number, bad):
                if index in bad:
                    trusted = vouched and way in READS_NO_MORE_THAN_THE_BOX
                    _expect(trusted, f"sample {index} was delivered, but cannot be read")
                    other = True
                else:
                    _compare(data, index, box, view, way)
        except ValueError as error:
            _expect(bool(bad), f"the reader reads everything, but the loader says: {error}")
            named = any(data.where(i) in str(error) for i in bad)
            _expect(named, f"no sample, or a sound one, is named: {error}")
            return "sample refused"
    return mutants.OTHER if other else "sample refused" if bad else "as undamaged"


def _readable(data: BetonSet, truth: mutants.Truth, expected: int) -> tuple[set[int], bool]:
    """Return the samples that cannot be read, and whether the others are as undamaged."""
    bad, right = set(), data.n == expected
    for i in range(min(data.n, _MOST_SAMPLES)):
        try:
            pixels = read_image(data, i)[0]
        except ValueError:
            bad.add(i)
        else:
            right &= np.array_equal(pixels, truth.pixels[i % len(truth.pixels)])
    return bad, right


def _delivered(
    paths: list[Path], data: BetonSet, way: str, number: int, bad: set[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield sample number, view and box of the rows of an epoch, their places and status checked.

    Raises ValueError as the loader does.
    """
    n = min(data.n, _MOST_SAMPLES)
    subset = Subset(np.arange(n), data.labels[:n])
    training, threads = number % 4 != 3, 2 if number % 8 == 0 else 1
    common = {"batch": 4, "group": 1, "size": 32, "crop": "random", "max_bad": 1.0}
    chosen = {"threads": threads, "on_bad": "error" if number % 16 == 5 else "replace"}
    options = LoaderOptions(**common | chosen | WAYS[way])
    split: Literal["train", "eval"] = "train" if training else "eval"
    with _opened(paths, options, subset, split, anew=number % 10 == 0) as loader:
        plan = loader.plan
        own = [i for part in plan.parts(_PLACE) for i in part.positions.tolist()]
        rows = list(_rows(loader))
        if not training:  # bad ones are left out, but for those whose damage was not looked at
            shown = {row[0] for row in rows}
            own = [i for i in own if i not in bad or i in shown]
        _expect(len(own) == len(rows), f"{len(rows)} rows, not {len(own)}")
        for i, (index, status, label, view, box) in zip(own, rows, strict=True):
            replaced = status == 2
            _expect(replaced or index == i, f"sample {index} stands where {i} belongs")
            _expect(not replaced or i in bad, f"sample {i} was replaced, but can be read")
            _expect(label == data.labels[index], f"sample {index} has label {label}")
            expected = plan.boxes(_PLACE, np.array([index]))[0]
            _expect(np.array_equal(box, expected), f"sample {index} has box {box}, not {expected}")
            yield index, view, box


@contextmanager
def _opened(
    paths: list[Path],
    options: LoaderOptions,
    subset: Subset,
    split: Literal["train", "eval"],
    anew: bool,
) -> Iterator[Loader]:
    """Open a loader, and close it. Opening ffcv's takes a second of compilation.

    So that one is opened `anew` for some mutants; for the others, and if the shapes fit, a pipeline
    that is there already gets the mutant's plan and addresses.
    """
    if options.loader != "ffcv" or anew:
        with open_loader(paths, options, subset=subset, split=split) as loader:
            yield loader
        return
    with open_set(paths) as data:
        key = data.n, len(subset), options.threads
        if key not in _KEPT:
            _KEPT[key] = open_loader(paths, options, subset=subset, split=split)
        engine: Any = _KEPT[key].engine
        largest = int(data.sizes[subset.index].astype(np.int64).prod(axis=1).max())
        if 3 * largest > engine._scratch.shape[1]:
            with open_loader(paths, options, subset=subset, split=split) as loader:
                yield loader
            return
        engine.plan = Plan(data, subset, options, split == "train")
        engine.bad = {}
        engine._images[:], engine._maps = ffcv_loader._where(data)
        yield Loader(engine.plan, engine)


_KEPT: dict[tuple[int, int, int], Loader] = {}


def _rows(loader: Loader) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray]]:
    """Yield sample number, status, label, view and box of the rows of an epoch."""
    for batch in loader.batches(_PLACE):
        yield from zip(
            batch.index.tolist(),
            batch.status.tolist(),
            batch.labels.tolist(),
            batch.pool[batch.rows].numpy(),
            batch.boxes.numpy(),
            strict=True,
        )


def _compare(data: BetonSet, index: int, box: np.ndarray, view: np.ndarray, way: str) -> None:
    """Raise Wrong unless a view shows what its loader says that it shows."""
    means = np.empty_like(view)
    cut(read_image(data, index)[0], box, means)
    if way == "dali":  # a level off, but for the outermost ring
        inside = np.abs(view.astype(int) - means)[1:-1, 1:-1]
        right = inside.max() <= 1
    else:
        right = np.array_equal(view, means)
        if way == "ffcv" and not right:  # what ffcv itself has found good
            right = np.array_equal(view, _by_ffcv(data, index, box, view.shape[0]))
    _expect(bool(right), f"sample {index} shows other pixels of its box {box.tolist()}")


def _by_ffcv(data: BetonSet, index: int, box: np.ndarray, side: int) -> np.ndarray:
    """Return a view as ffcv makes it: fast DCT, the box, OpenCV's INTER_AREA."""
    cv2 = import_module("cv2")
    image = read_image(data, index)[0]
    if data.modes[index] == JPG:
        image = simplejpeg.decode_jpeg(data.region(index), "RGB", fastdct=True, strict=False)
    y0, x0, h, w = box.tolist()
    part = np.ascontiguousarray(image[y0 : y0 + h, x0 : x0 + w])
    return cv2.resize(part, (side, side), interpolation=cv2.INTER_AREA)


# --- manifests ------------------------------------------------------------------------------------

_NAMES = ["", ".", "..", "/", "../x", "/etc/passwd", "a\0", "\ud800", "\udcff", 300 * "x", "x/"]
_NAMES += ["\n", "no such file", "set.beton", "set.beton.jsonl", "set-00001-of-00003.beton"]
_VALUES: list[Any] = [None, True, 0, -1, 1, 1.5, 1 << 63, 10**400, float("nan"), [], {}, [[]], ""]


def manifest_mutant(content: bytes, number: int) -> tuple[str, bool, bytes]:
    """Return what was damaged, whether the digest was made anew, and the damaged manifest."""
    generator = np.random.default_rng([number, 7])
    start = content[:-1].rindex(b"\n") + 1
    if generator.random() < 0.4:  # bytes, most of them of the last line
        parts = {"last line": [(start, len(content))], "anywhere": [(0, len(content))]}
        chosen = ["last line", "last line", "anywhere"]
        base = mutants.Base("manifest", content, False, parts)
        return mutants.mutant(base, number, chosen)
    row = json.loads(content[start:])
    said = [_change(row, generator) for _ in range(generator.choice([1, 1, 2, 4]))]
    anew = bool(generator.random() < 0.5)
    if anew:
        try:
            listed = row["total"]["shards"]
            row["total"]["written"] = sum(shard["samples"] for shard in listed)
            row["total"]["digest"] = shards.joint_digest([shard["digest"] for shard in listed])
        except (KeyError, TypeError, ValueError):
            anew = False
    last = json.dumps(row, ensure_ascii=bool(generator.random() < 0.5)) + "\n"
    return ", ".join(said), anew, content[:start] + last.encode("utf-8", "surrogatepass")


def _change(row: Any, generator: np.random.Generator) -> str:
    """Change one value somewhere in a JSON document, and say how."""
    holders = [row]
    for holder in holders:
        inside = holder.values() if isinstance(holder, dict) else holder
        holders += [value for value in inside if isinstance(value, dict | list) and value]
    holder = holders[generator.integers(len(holders))]
    keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        return "nothing"
    if "file" in holder and generator.random() < 0.5:
        keys = ["file"]
    key, other = (keys[generator.integers(len(keys))] for _ in range(2))
    kind = str(generator.choice(["value", "value", "value", "remove", "swap", "copy"]))
    if kind == "value":
        values = _NAMES if key == "file" else _VALUES
        holder[key] = values[generator.integers(len(values))]
    elif kind == "remove":
        del holder[key]
    elif kind == "swap":
        holder[key], holder[other] = holder[other], holder[key]
    else:
        holder[key] = json.loads(json.dumps(holder[other]))
    return f"{kind} of {key}"


def judge_manifest(expected: list[tuple[str, bytes]], path: Path) -> str:
    """Open a damaged manifest, and read by it; return what became of it.

    Args:
        expected: what `contents` says of the undamaged one.
        path: the manifest.
    """
    try:
        found = contents(path)
    except (ValueError, OSError) as error:
        _expect(str(path.parent) in str(error), f"no file is named: {error}")
        return "refused"
    return "as undamaged" if found == expected else mutants.OTHER


def contents(path: Path) -> list[tuple[str, bytes]]:
    """Return name and view of every sample of a set."""
    options = LoaderOptions(loader="turbo", decoder="full", batch=8, size=16, threads=1)
    with open_set(path) as data, open_loader(path, options, split="eval") as loader:
        rows = [(index, view.tobytes()) for index, _, _, view, _ in _rows(loader)]
        return [(data.name(index), view) for index, view in rows]


# --- the child ------------------------------------------------------------------------------------


class Server:
    """Makes mutants of the files of a folder, in a folder of its own, and judges them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own = folder / f"mutants-{os.getpid()}"
        (self.own / "manifests").mkdir(parents=True)
        self._files: dict[str, tuple[mutants.Base, mutants.Truth]] = {}
        self._manifests: dict[str, tuple[bytes, list[tuple[str, bytes]]]] = {}

    def attempt(self, name: str, number: int, way: str) -> tuple[str, str, bool]:
        """Return outcome, damage, and whether other data are no defect."""
        if way == "manifest":
            what, unsealed, act = self._damaged_manifest(name, number)
        else:
            what, unsealed, act = self._damaged_file(name, number, way)
        try:
            return act(), what, unsealed
        except Wrong as error:
            return str(error), what, unsealed
        except Exception as error:  # judged by the other end
            return f"{type(error).__name__}: {error}", what, unsealed

    def _damaged_file(
        self, name: str, number: int, way: str
    ) -> tuple[str, bool, Callable[[], str]]:
        sound, target = self.folder / f"{name}.beton", self.own / f"{name}.beton"
        if name not in self._files:
            self._files[name] = mutants.read_base(sound), mutants.read_truth(sound)
        base, truth = self._files[name]
        what, anew, content = mutant(base, number)
        target.unlink(missing_ok=True)  # a new file: maps of the old one stay as they are
        target.write_bytes(content)
        unsealed = anew or not base.sealed or content[41:81] == bytes(40)
        before = [sound] if number % 2 else []
        return what, unsealed, lambda: judge(truth, before, target, way, number)

    def _damaged_manifest(self, name: str, number: int) -> tuple[str, bool, Callable[[], str]]:
        target = self.own / "manifests" / f"{name}.beton.jsonl"
        if name not in self._manifests:
            sound = self.folder / target.name
            self._manifests[name] = sound.read_bytes(), contents(sound)
            for file in self.folder.glob(f"{name}*.beton"):
                target.with_name(file.name).symlink_to(file)
        sound_bytes, expected = self._manifests[name]
        what, anew, content = manifest_mutant(sound_bytes, number)
        target.write_bytes(content)
        return what, anew, lambda: judge_manifest(expected, target)


def main(folder: Path) -> None:
    """Serve mutants until stdin ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what native code prints is no answer
    server = Server(folder)
    print(json.dumps("ready"), file=out)
    for line in sys.stdin:
        name, number, way = line.split()
        found, what, unsealed = server.attempt(name, int(number), way)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([found, what, unsealed, peak]), file=out)
    shutil.rmtree(server.own)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
