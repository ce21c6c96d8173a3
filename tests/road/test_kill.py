"""Killed anywhere, a run ends with the same bits: SIGKILL from outside, at random and aimed.

A random kill almost never lands inside a checkpoint's write, so two of three are aimed. Either the
writer is slowed down, and the killer waits until the unfinished file is there; or the process dies
when it comes by one of `POINTS`. The environment variable BACKMIX_SOAK_KILLS asks for more of them.
"""

import itertools
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backmix.train.options import Run
from tests.runs import tiny_run, tiny_set
from tests.train.test_loop import fingerprint

KILLS = int(os.environ.get("BACKMIX_SOAK_KILLS", "24"))
EACH = 8
"""Kills of one run."""
SECONDS = 60.0

POINTS = ("copied", "begun", "counted", "synced", "renamed", "removing", "removed")
"""Places on a checkpoint's way to the disk, in their order: the state has been copied; the thread
begins; the log's rows are about to be made durable; the file is durable, and not yet named; it is
named, and the folder not yet durable; an old one is about to go; it is gone."""


def die_at(point: str, count: int) -> None:
    """Let SIGKILL end this process when it comes by a place for the `count`-th time."""
    from backmix.train import checkpoint, log, saves

    left = [count]

    def come_by() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(holder: Any, name: str, *, after: bool = False) -> None:
        real = getattr(holder, name)

        def wrapped(*arguments: Any, **more: Any) -> Any:
            # Of files only checkpoints count: the status is renamed and removed as well.
            named = [a for a in arguments if isinstance(a, Path)]
            ours = not named or any("step-" in path.name for path in named) or holder is saves
            if ours and not after:
                come_by()
            result = real(*arguments, **more)
            if ours and after:
                come_by()
            return result

        setattr(holder, name, wrapped)

    match point:
        case "copied":
            wrap(checkpoint.HostCopies, "take", after=True)
        case "begun":
            wrap(saves, "save_checkpoint")
        case "counted":
            wrap(log.Log, "sync")
        case "synced" | "renamed":
            wrap(os, "replace", after=point == "renamed")
        case "removing" | "removed":
            wrap(Path, "unlink", after=point == "removed")


def child(run: Run, pause: float, point: str, count: int) -> None:
    """Run in a process of its own, with a slow writer, or a place to die at, where asked."""
    os.environ["BACKMIX_TEST_WRITE_PAUSE"] = str(pause)
    if point:
        die_at(point, count)
    from backmix.train.run import train

    raise SystemExit(train(run, "test", ["backmix", "train"]))


Starts = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def start() -> Starts:
    """Start a run in a new process; torch is imported once, in the server that forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["backmix.train.run"])

    def begin(run: Run, pause: float = 0.0, point: str = "", count: int = 0) -> BaseProcess:
        process = context.Process(target=child, args=(run, pause, point, count))
        process.start()
        return process

    return begin


def kill_in_a_write(process: BaseProcess, out: Path, wait: float) -> bool:
    """Kill while an unfinished checkpoint is on the disk; returns whether that came about."""
    time.sleep(wait)
    deadline = time.monotonic() + SECONDS
    while process.is_alive() and time.monotonic() < deadline:
        if any((out / "checkpoints").glob("*.tmp")):
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join(SECONDS)
            return any((out / "checkpoints").glob("*.tmp"))
        time.sleep(0.001)
    return False


@pytest.mark.slow  # two dozen starts of a run, about a minute
@pytest.mark.timeout(120 + 20 * KILLS)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(
    tmp_path: Path, start: Starts
) -> None:
    data = tiny_set(tmp_path / "tiny.beton", count=80)
    run = tiny_run(data, tmp_path / "whole", epochs=8, save_steps=3, log_every=4)
    whole = start(run)
    whole.join(SECONDS)
    assert whole.exitcode == 0
    expected = fingerprint(run.out)

    generator = np.random.default_rng(11)
    kinds: Counter[str] = Counter()
    points = itertools.cycle(POINTS)
    for number in range(-(-KILLS // EACH)):
        other = replace(run, out=tmp_path / f"killed-{number}")
        killed = attempts = 0
        while killed < EACH:
            attempts += 1
            kind = ("time", "write", "point")[attempts % 3]
            if kind == "point":
                kind = next(points)
                process = start(other, point=kind, count=int(generator.integers(1, 4)))
                process.join(SECONDS)
            else:
                process = start(other, pause=0.03 if kind == "write" else 0.0)
                if kind == "write":
                    wait = float(generator.uniform(0, 0.4))
                    kind = "write" if kill_in_a_write(process, other.out, wait) else "time"
                process.join(float(generator.uniform(0.05, 0.6)))
                process.kill()
                process.join(SECONDS)
            hit = process.exitcode == -signal.SIGKILL
            killed += hit
            kinds[kind] += hit
            assert attempts < 10 * EACH
        last = start(other)
        last.join(SECONDS)
        assert last.exitcode == 0
        assert fingerprint(other.out) == expected, f"run {number}, after {dict(kinds)}"
        assert not list((other.out / "checkpoints").glob("*.tmp"))
        shutil.rmtree(other.out)
    print(f"{kinds.total()} kills: {dict(kinds)}")
    assert kinds.total() >= KILLS and kinds["write"] >= KILLS // 8
    assert sum(kinds[point] for point in POINTS) >= KILLS // 6


def test_a_second_start_on_a_live_run_is_refused(tmp_path: Path, start: Starts) -> None:
    run = tiny_run(tiny_set(tmp_path / "tiny.beton"), tmp_path / "run", epochs=1000)
    first = start(run)
    deadline = time.monotonic() + SECONDS
    log = run.out / "log.jsonl"  # a row in it: steps have been taken, so there is something to keep
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    from backmix.train.run import train

    with pytest.raises(ValueError, match=f"in use by process {first.pid}"):
        train(run, "test", [])
    os.kill(first.pid or 0, signal.SIGTERM)
    first.join(SECONDS)
    assert first.exitcode == 75
