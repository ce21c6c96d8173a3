"""Killed anywhere, a prediction ends with the same bytes: no row lost, none there twice.

SIGKILL at random times, and aimed: while a batch is half written, between two files, before and
after the finished file gets its name.
"""

import itertools
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backmix.pipeline.beton import RAW
from backmix.pipeline.writer import Record, Writer
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.predict import predict
from tests.images import png, write_files
from tests.train.decide.calibrated import CLASSES, SIDE, calibrated, pictures

SECONDS = 60.0
POINTS = ("torn", "row", "writing", "renamed", "removed", "noted")
"""Places to die at: half of a batch's bytes are written; a row of the finished file is about to be;
that file is about to get its name; it has it; the journal is empty and its note gone, its own file
not yet; of the next one the note is there, and no row."""


def die_at(point: str, count: int) -> None:
    """Let SIGKILL end this process when it comes by a place for the `count`-th time."""
    from backmix.train.decide import journal

    left = [count]

    def come_by() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(holder: Any, name: str, *, before: bool, ours: Callable[..., bool]) -> None:
        real = getattr(holder, name)

        def wrapped(*arguments: Any, **more: Any) -> Any:
            if before and ours(*arguments):
                come_by()
            result = real(*arguments, **more)
            if not before and ours(*arguments):
                come_by()
            return result

        setattr(holder, name, wrapped)

    def is_out(source: Path, target: Path) -> bool:
        return target.suffix == ".csv"

    match point:
        case "torn":
            real = os.pwrite

            def pwrite(descriptor: int, data: bytes, offset: int) -> int:
                left[0] -= 1
                if not left[0]:
                    real(descriptor, data[: len(data) // 2], offset)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(descriptor, data, offset)

            os.pwrite = pwrite  # type: ignore[assignment]
        case "noted":
            wrap(journal, "write_atomically", before=False, ours=lambda *_: True)
        case "row":
            real_read = journal.Journal.read

            def read(self: Any) -> Any:
                for row in real_read(self):
                    come_by()
                    yield row

            journal.Journal.read = read  # type: ignore[method-assign]
        case "writing" | "renamed":
            wrap(os, "replace", before=point == "writing", ours=is_out)
        case "removed":
            wrap(
                Path,
                "unlink",
                before=False,
                ours=lambda path, **_: path.name.endswith(".part.json"),
            )


def child(run: Path, sources: list[str], out: Path, batch: int, point: str, count: int) -> None:
    """Predict in a process of its own."""
    import torch

    torch.set_num_threads(1)
    if point:
        die_at(point, count)
    predict(run, sources, out, PredictOptions(batch=batch, device="cpu", threads=1))


Starts = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def start() -> Starts:
    """Start a prediction in a new process; torch is imported once, in the server that forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "scipy.stats"])

    def begin(
        run: Path, sources: list[str], out: Path, batch: int, point: str = "", count: int = 0
    ) -> BaseProcess:
        process = context.Process(target=child, args=(run, sources, out, batch, point, count))
        process.start()
        return process

    return begin


def repeated(path: Path, count: int, each: int) -> Path:
    """Write `count` samples, the images of which are `each` different ones, repeated."""
    images = pictures(each, seed=5)
    with Writer(
        path, samples=count, page_size=1 << 21, classes=list(CLASSES), options={}
    ) as writer:
        for i in range(count):
            if i < each:
                writer.append(Record(images[i].tobytes(), RAW, SIDE, SIDE, 0, 0, f"{i}.png"))
            else:
                writer.repeat(i % each, 0, f"{i}.png")
    return path


def killed_again_and_again(
    folder: Path, start: Starts, rows: int, batch: int, kills: int, pause: tuple[float, float]
) -> Counter[str]:
    run = calibrated(folder / "run")
    write_files(folder / "in", {f"{i}.png": png(image) for i, image in enumerate(pictures(9))})
    write_files(folder / "in", {"5,\n.png": b"", "x.png": b"?"})
    sources = [str(folder / "in"), str(repeated(folder / "s.beton", rows, 300)), str(folder / "in")]
    whole = folder / "whole.csv"
    first = start(run, sources, whole, batch)
    first.join(2 * SECONDS)
    assert first.exitcode == 0
    expected = whole.read_bytes()
    assert expected.count(b"s.beton//") == rows

    generator = np.random.default_rng(3)
    out, kinds = folder / "o.csv", Counter[str]()
    for point in itertools.islice(itertools.cycle(["", *POINTS, ""]), 10 * kills):
        if out.exists() and not list(folder.glob("o.csv.*")):  # finished: the same once more
            assert out.read_bytes() == expected
            out.unlink()
        last_count = {"torn": rows // batch // 2, "row": rows}.get(point, 1)
        count = int(generator.integers(1, 1 + last_count))
        process = start(run, sources, out, batch, point, count)
        process.join(float(generator.uniform(*pause)) if not point else 2 * SECONDS)
        process.kill()
        process.join(SECONDS)
        kinds[point or "time"] += process.exitcode == -signal.SIGKILL
        if kinds.total() >= kills and len(kinds) == 1 + len(POINTS) and min(kinds.values()):
            break
    last = start(run, sources, out, batch)
    last.join(2 * SECONDS)
    assert last.exitcode == 0
    assert out.read_bytes() == expected
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["in", "o.csv", "run", "s.beton", "whole.csv"]
    return kinds


@pytest.mark.slow
@pytest.mark.timeout(600)  # ten processes, one after the other
def test_a_prediction_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, start: Starts
) -> None:
    kinds = killed_again_and_again(tmp_path, start, 600, 50, 7, (0.2, 0.6))
    assert set(kinds) == {"time", *POINTS}


@pytest.mark.slow  # 100,000 images, decided about several times
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_rows_survive_kills(tmp_path: Path, start: Starts) -> None:
    kinds = killed_again_and_again(tmp_path, start, 100_000, 500, 20, (1.0, 12.0))
    print(f"{kinds.total()} kills: {dict(kinds)}")
    assert kinds["time"] >= 3
