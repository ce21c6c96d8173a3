"""The loaders side by side on one .beton: images per CPU-second and per second of the wall.

    PYTHONPATH=. python -m bench.bench_loaders --data FILE.beton --out FOLDER [--form NAME ...]

Each form lives in a process of its own, opened once and warmed up; then they take turns, so that a
busy moment hits all of them. All deliver random-resized-crops of the file's JPEGs at one size with
as many threads. A lap begins and ends with the process idle, so that work done ahead is neither
missed nor counted twice. `stock_ffcv` draws crops of its own of the same distribution; `plain_dali`
is DALI's own file reader with our boxes, on the same images as files.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from importlib import import_module
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from backmix.pipeline import draws
from backmix.pipeline.batch import Place
from backmix.pipeline.beton import JPG, RAW, open_set
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.subset import Subset
from backmix.pipeline.writer import Record, Writer
from bench import rows
from bench.turns import take_turns

STAGE = "loaders"
OURS = {"turbo": "full", "turbo_region": "region", "ffcv": "full", "dali": "full"}
"""Our loaders, and what turbo decodes of a JPEG."""
FORMS = (*OURS, "stock_ffcv", "plain_dali")
AGAINST = {
    "turbo": "stock_ffcv",
    "turbo_region": "stock_ffcv",
    "ffcv": "stock_ffcv",
    "dali": "plain_dali",
}
"""What each of our loaders is measured by."""
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
PREFETCH = 3

Lap = Callable[[int], int]
"""Delivers all images that many times; returns how many they were."""


# --- the forms ------------------------------------------------------------------------------------


def open_form(form: str, data: Path, size: int, batch: int, threads: int, device: str) -> Lap:
    """Open a loader on the file's JPEGs; it lives as long as the lap that is returned.

    The arguments are those of `open_stream`.
    """
    stream = open_stream(form, data, size, batch, threads, device)
    n = len(jpegs(data))

    def lap(epochs: int) -> int:
        images = 0
        while images < epochs * n:
            images += next(stream)
        return images

    return lap


def jpegs(data: Path) -> np.ndarray:
    """Return the numbers of a file's samples that are stored as JPEGs, int64 [n]."""
    with open_set(data) as stored:
        return np.flatnonzero(stored.modes == JPG)


def open_stream(
    form: str,
    data: Path,
    size: int,
    batch: int,
    threads: int,
    device: str,
    *,
    hw_share: float = 0.65,
    repeat: int = 1,
) -> Generator[int]:
    """Deliver the file's JPEGs over and over; yields the images of each batch. Close it.

    Args:
        form: one of FORMS.
        data: a .beton file.
        size: side of the views [pixels].
        batch: images per batch.
        threads: decoding threads.
        device: where batches go; stock ffcv stays on the CPU.
        hw_share: of the JPEGs, for the GPU's JPEG engine; both dali forms.
        repeat: how often an epoch of our loaders shows each image: at its end they run dry.
    """
    if form in OURS:
        return _ours(form, data, size, batch, threads, device, hw_share, repeat)
    if form == "stock_ffcv":
        return _stock_ffcv(data, size, batch, threads)
    return _plain_dali(data, size, batch, threads, device, hw_share)


def _ours(
    form: str,
    data: Path,
    size: int,
    batch: int,
    threads: int,
    device: str,
    hw_share: float,
    repeat: int,
) -> Generator[int]:
    loader: Any = form.removesuffix("_region")
    decoder: Any = OURS[form]
    options = LoaderOptions(
        loader=loader,
        decoder=decoder,
        batch=batch,
        group=1,
        size=size,
        crop="random",
        scale=SCALE,
        ratio=RATIO,
        threads=threads,
        prefetch=PREFETCH,
        hw_share=hw_share,
    )
    index = np.repeat(jpegs(data), repeat)
    subset = Subset(index, np.zeros(len(index), np.int64))
    with open_loader(data, options, subset=subset, device=device) as opened:
        for epoch in count():
            with closing(opened.batches(Place(0, epoch))) as batches:  # pyright: ignore[reportArgumentType]
                for one in batches:
                    yield len(one)


def _stock_ffcv(data: Path, size: int, batch: int, threads: int) -> Generator[int]:
    fields: Any = import_module("ffcv.fields")
    decoders: Any = import_module("ffcv.fields.rgb_image")
    loader: Any = import_module("ffcv.loader")
    handlers = import_module("ffcv.reader").Reader(str(data)).handlers
    image = next(k for k, field in handlers.items() if isinstance(field, fields.RGBImageField))
    decoder = decoders.RandomResizedCropRGBImageDecoder((size, size), SCALE, RATIO)
    stock = loader.Loader(
        str(data),
        batch_size=batch,
        num_workers=threads,
        os_cache=True,
        order=loader.OrderOption.RANDOM,
        seed=0,
        indices=jpegs(data),
        pipelines={name: None for name in handlers} | {image: [decoder]},
        drop_last=False,
        batches_ahead=PREFETCH,
    )
    while True:
        for (images,) in stock:
            yield len(images)


def _plain_dali(
    data: Path, size: int, batch: int, threads: int, device: str, hw_share: float
) -> Generator[int]:
    """DALI as its documentation has it, but for the boxes; its reader goes round and round."""
    dali: Any = import_module("nvidia.dali")
    fn: Any = import_module("nvidia.dali.fn")
    types, gpu = dali.types, device != "cpu"
    index = jpegs(data)
    n, position = len(index), 0

    with open_set(data) as stored, TemporaryDirectory(prefix="backmix-bench-") as folder:
        files = [f"{folder}/{k}.jpg" for k in index.tolist()]
        for k, file in zip(index.tolist(), files, strict=True):
            Path(file).write_bytes(stored.region(k).tobytes())

        def boxes() -> tuple[np.ndarray, np.ndarray]:
            nonlocal position
            positions = np.arange(position, position + batch)
            position += batch
            samples = index[positions % n]
            found = draws.crop_boxes(
                0, int(positions[0] // n), samples, stored.sizes[samples], SCALE, RATIO
            ).astype(np.int32)
            return np.ascontiguousarray(found[:, :2]), np.ascontiguousarray(found[:, 2:])

        pipeline = dali.Pipeline(
            batch_size=batch,
            num_threads=threads,
            device_id=0 if gpu else None,
            prefetch_queue_depth=PREFETCH,
        )
        with pipeline:
            streams, _ = fn.readers.file(files=files)
            start, shape = fn.external_source(boxes, num_outputs=2, dtype=types.INT32, ndim=1)
            images = fn.decoders.image_slice(
                streams,
                start,
                shape,
                axis_names="HW",
                device="mixed" if gpu else "cpu",
                hw_decoder_load=hw_share,
            )
            linear = {"interp_type": types.INTERP_LINEAR, "antialias": True}
            pipeline.set_outputs(fn.resize(images, size=[size, size], **linear))
        pipeline.build()
        while True:
            pipeline.run()
            yield batch


# --- the clock ------------------------------------------------------------------------------------


def timed(lap: Lap, epochs: int) -> dict[str, float]:
    """Time a lap from idle to idle; returns images, CPU-seconds and seconds of the wall."""
    _wait_until_idle()
    start, used = time.perf_counter(), time.process_time()
    images = lap(epochs)
    end = _wait_until_idle()
    return {"images": images, "cpu": time.process_time() - used, "wall": end - start}


def _wait_until_idle() -> float:
    """Wait until this process has done next to nothing five times in a row; return since when."""
    since, quiet = time.perf_counter(), 0
    while quiet < 5:
        used = time.process_time()
        time.sleep(0.02)
        if time.process_time() - used < 0.002:
            quiet += 1
        else:
            since, quiet = time.perf_counter(), 0
    return since


def serve(options: argparse.Namespace) -> None:
    """Be one form: a lap for every line on stdin, its times as a line on stdout."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what native code prints is no answer
    lap = open_form(
        options.serve, options.data, options.size, options.batch, options.threads, options.device
    )
    lap(1)
    print("ready", file=out)
    for line in sys.stdin:
        print(json.dumps(timed(lap, int(line))), file=out)


# --- opening --------------------------------------------------------------------------------------


def opening(samples: int, rounds: int) -> list[float]:
    """Return how long it takes to open a file of so many samples of one pixel, each time [ms]."""
    with TemporaryDirectory(prefix="backmix-bench-") as folder:
        path, pixel = Path(folder) / "large.beton", np.zeros((1, 1, 3), np.uint8)
        with Writer(path, samples=samples, page_size=1 << 21, classes=["a"], options={}) as writer:
            for k in range(samples):
                writer.append(Record(pixel, RAW, 1, 1, 0, 0, f"a/{k}.JPEG"))
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            with open_set(path):
                times.append(1e3 * (time.perf_counter() - start))
    return times


# --- the turns ------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Let the forms take turns; returns the laps of each. A form that cannot start is left out."""
    words = [sys.executable, "-m", "bench.bench_loaders", "--data", str(options.data)]
    words += ["--size", str(options.size), "--batch", str(options.batch)]
    words += ["--threads", str(options.threads), "--device", options.device]
    serving = {
        form: subprocess.Popen(
            [*words, "--serve", form], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for form in options.form or FORMS
    }
    return take_turns(serving, options.rounds, str(options.epochs))


def report(laps: dict[str, list[dict[str, float]]]) -> None:
    """Print rates, and ratios to what each loader is measured by: medians over the turns."""
    for form, some in laps.items():
        line = f"{form:12}"
        for clock in ("cpu", "wall"):
            rate = statistics.median(lap["images"] / lap[clock] for lap in some)
            line += f" {rate:8.1f} img/{clock}-s"
            against = laps.get(AGAINST.get(form, ""))
            if against:
                ratio = statistics.median(
                    (a["images"] / a[clock]) / (b["images"] / b[clock])
                    for a, b in zip(some, against, strict=True)
                )
                line += f" ({ratio:.2f} x {AGAINST[form]})"
        print(line)


def main() -> int:
    """Measure and write rows; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="one .beton file")
    parser.add_argument("--out", type=Path, help=f"a folder; the rows go into {STAGE}.jsonl")
    parser.add_argument("--form", choices=FORMS, action="append", help="only this; may repeat")
    parser.add_argument("--size", type=int, default=224, help="side of the views [pixels]")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="turns of every form")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the file in a turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--opening", type=int, default=0, help="open a file of so many samples")
    parser.add_argument("--serve", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return 0
    laps = measure(options)
    report(laps)
    opened = opening(options.opening, options.rounds) if options.opening else []
    if opened:
        print(f"open {options.opening:,} samples: {statistics.median(opened):.0f} ms")
    if options.out is None:
        return 0
    common = {"bench": "loaders", "stage": STAGE, **rows.machine(options.device)}
    file = rows.Rows(options.out / f"{STAGE}.jsonl", common)
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    if opened:
        file.write(
            case=f"open {options.opening:,} samples", form="open_set", **rows.Times(opened).row
        )
    setting = {"threads": options.threads, "batch": options.batch, "data": options.data.name}
    for form, some in laps.items():
        for clock in ("cpu", "wall"):
            times = rows.Times([1e3 * lap[clock] / lap["images"] for lap in some])
            file.write(
                case=f"{options.size} px random crops, {clock} time per image",
                form=form,
                shape={"images": int(some[0]["images"]), "side": options.size},
                config=setting,
                note=load,
                **times.row,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
