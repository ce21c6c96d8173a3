"""Converting side by side: `backmix convert` and stock ffcv's DatasetWriter on the same images.

    PYTHONPATH=. python -m bench.bench_convert [--images FOLDER] --out FOLDER [--form NAME ...]

Stock ffcv knows one thing to do with a JPEG: decode it and encode it anew. Ours does the same
(`encoded`), or copies the bytes and decodes them for the check's sake (`checked`), or copies them
(`unchecked`). Each form lives in a process of its own, which has imported what it needs; then they
take turns, so that a busy moment hits all of them. A lap is a whole conversion, worker processes
started and ended, page cache warm, into the same folder. What ours does beyond is in its time: it
lists the folder, hashes, waits until the file is on the disk, and writes a manifest.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from backmix.pipeline.convert import QUALITY, convert
from backmix.pipeline.images import SUFFIXES
from backmix.pipeline.options import ConvertOptions
from bench import rows
from bench.turns import take_turns

STAGE = "convert"
STOCK = "stock_ffcv"
OURS: dict[str, dict[str, Any]] = {
    "encoded": {"mode": "jpg", "quality": QUALITY},
    "checked": {"mode": "jpg"},
    "unchecked": {"mode": "jpg", "check": "none"},
}
"""The options of each of our forms; each is measured by stock ffcv."""
FORMS = (*OURS, STOCK)

Lap = Callable[[], tuple[int, int]]
"""Converts all images once; returns how many they were, and the file's bytes."""


# --- the images -----------------------------------------------------------------------------------


def photographs(folder: Path, count: int) -> None:
    """Write JPEGs of 500 x 375 pixels, 4:2:0: blotches of all sizes, as photographs have them."""
    folder.mkdir(parents=True)
    for k in range(count):
        random = np.random.default_rng(k)
        pixels = np.zeros((375, 500, 3), np.float32)
        for cells in (3, 8, 20, 60, 200):
            coarse = random.integers(0, 256, (cells, cells, 3), np.uint8)
            smooth = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            pixels += (np.asarray(smooth, np.float32) - 128) / cells**0.5
        picture = (128 + pixels).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{k}.jpg", quality=92)


def linked(images: Path, folder: Path, count: int) -> None:
    """Fill a folder with as many links to the images of a folder, again and again in one order."""
    found = sorted(p for p in images.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise SystemExit(f"{images} holds no images")
    for k in range(count):
        image = found[k % len(found)]
        link = folder / image.parent.name / f"{k:06}{image.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image.resolve())


# --- the forms ------------------------------------------------------------------------------------


def open_form(form: str, folder: Path, out: Path, workers: int) -> Lap:
    """Import what a form needs; returns its lap.

    Args:
        form: one of FORMS.
        folder: class folders with the images.
        out: the file that every lap writes and removes.
        workers: worker processes.
    """
    if form == STOCK:
        return _stock_ffcv(folder, out, workers)
    options = ConvertOptions(workers=workers, force=True, **OURS[form])

    def lap() -> tuple[int, int]:
        summary = convert(f"folder:{folder}", out, options)
        return summary.written, summary.bytes

    return lap


class _Images:
    """What people hand to the DatasetWriter: torchvision's ImageFolder does no more."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(str(path) for path in folder.rglob("*") if path.is_file())
        names = sorted({os.path.dirname(file) for file in self.files})
        self.labels = [names.index(os.path.dirname(file)) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        with Image.open(self.files[i]) as image:
            return image.convert("RGB"), self.labels[i]


def _stock_ffcv(folder: Path, out: Path, workers: int) -> Lap:
    fields: Any = import_module("ffcv.fields")
    writer: Any = import_module("ffcv.writer")
    images = _Images(folder)
    # As its documentation has it, but for chunks that give every worker something to do to the end.
    chunk = max(1, min(100, len(images) // (4 * workers)))

    def lap() -> tuple[int, int]:
        stored = {
            "image": fields.RGBImageField(write_mode="jpg", jpeg_quality=QUALITY),
            "label": fields.IntField(),
        }
        stock = writer.DatasetWriter(str(out), stored, num_workers=workers)
        stock.from_indexed_dataset(images, chunksize=chunk)
        for process in multiprocessing.active_children():  # it does not wait for their end
            process.join()
        return len(images), out.stat().st_size

    return lap


# --- the clock ------------------------------------------------------------------------------------


def timed(lap: Lap) -> dict[str, float]:
    """Time a lap; returns images, bytes, seconds of the wall, and CPU-seconds with all children."""
    start, used = time.perf_counter(), _cpu_seconds()
    images, size = lap()
    wall = time.perf_counter() - start
    return {"images": images, "bytes": size, "wall": wall, "cpu": _cpu_seconds() - used}


def _cpu_seconds() -> float:
    """Return what this process and its children that have ended have used."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def serve(options: argparse.Namespace) -> None:
    """Be one form: a lap for every line on stdin, its times as a line on stdout."""
    multiprocessing.set_start_method("fork", force=True)  # the only one that stock ffcv works with
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what native code prints is no answer
    file = options.folder / f"{options.serve}.beton"
    lap = open_form(options.serve, options.folder / "images", file, options.workers)
    print("ready", file=out)
    for _ in sys.stdin:
        found = timed(lap)
        file.unlink()
        file.with_name(file.name + ".jsonl").unlink(missing_ok=True)
        os.sync()  # nobody shall wait for what somebody else has written
        print(json.dumps(found), file=out)


# --- the turns ------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Let the forms take turns; returns the laps of each. A form that cannot start is left out."""
    words = [sys.executable, "-m", "bench.bench_convert", "--folder", str(folder)]
    words += ["--workers", str(options.workers)]
    serving = {
        form: subprocess.Popen(
            [*words, "--serve", form],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.loud else subprocess.DEVNULL,
            text=True,
        )
        for form in options.form or FORMS
    }
    laps = take_turns(serving, options.rounds + 1, "")
    return {form: some[1:] for form, some in laps.items()}  # the first only warms up


def ratio(
    ours: list[dict[str, float]], stock: list[dict[str, float]], clock: str
) -> tuple[float, float, float]:
    """Return how many times as fast ours is by a clock: lowest, median and highest of the turns."""
    each = [
        (a["images"] / a[clock]) / (b["images"] / b[clock])
        for a, b in zip(ours, stock, strict=True)
    ]
    return min(each), statistics.median(each), max(each)


def report(laps: dict[str, list[dict[str, float]]]) -> None:
    """Print rates, and ratios to stock ffcv: medians over the turns, and their span."""
    for form, some in laps.items():
        line = f"{form:10} {statistics.median(lap['bytes'] for lap in some) / 2**20:7.1f} MiB"
        for clock in ("wall", "cpu"):
            rate = statistics.median(lap["images"] / lap[clock] for lap in some)
            line += f" {rate:8.1f} img/{clock}-s"
            if form != STOCK and laps.get(STOCK):
                low, median, high = ratio(some, laps[STOCK], clock)
                line += f" ({median:.2f} x {STOCK}, {low:.2f} to {high:.2f})"
        print(line)


def main() -> int:
    """Measure and write rows; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=Path, help="a folder of JPEGs; else some are generated")
    parser.add_argument("--count", type=int, default=1500, help="images; files are repeated")
    parser.add_argument("--out", type=Path, help=f"a folder; the rows go into {STAGE}.jsonl")
    parser.add_argument("--work", type=Path, help="where the .beton files are written [a tempdir]")
    parser.add_argument("--form", choices=FORMS, action="append", help="only this; may repeat")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="turns of every form, beside a first")
    parser.add_argument("--loud", action="store_true", help="show what the forms print")
    parser.add_argument("--serve", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return 0
    with tempfile.TemporaryDirectory(prefix="backmix-bench-", dir=options.work) as folder:
        images = options.images
        if images is None:
            images = Path(folder) / "made"
            photographs(images / "made", min(options.count, 200))
        linked(images, Path(folder) / "images", options.count)
        laps = measure(options, Path(folder))
    report(laps)
    if options.out is None:
        return 0
    common = {"bench": STAGE, "stage": STAGE, **rows.machine("cpu")}
    file = rows.Rows(options.out / f"{STAGE}.jsonl", common)
    note = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    kind = "photographs" if options.images else "made images"
    for form, some in laps.items():
        for clock in ("wall", "cpu"):
            times = rows.Times([1e3 * lap[clock] / lap["images"] for lap in some])
            file.write(
                case=f"{kind}, {clock} time per image",
                form=form,
                shape={"images": options.count},
                bytes=round(statistics.median(lap["bytes"] for lap in some)),
                config={"workers": options.workers},
                note=note,
                **times.row,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
