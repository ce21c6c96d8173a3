"""Killed anywhere, a run ends with the same bits: SIGKILL from outside, at random and aimed.

A random kill almost never lands inside a checkpoint's write, so half of them are aimed: the writer
is slowed down, and the killer waits until the unfinished file is there.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from backmix.train.options import Run
from tests.runs import tiny_run, tiny_set
from tests.train.test_loop import fingerprint

RUNS, KILLS = 3, 8
SECONDS = 60.0


def child(run: Run, pause: float) -> None:
    """Run in a process of its own, with a slow writer where asked."""
    os.environ["BACKMIX_TEST_WRITE_PAUSE"] = str(pause)
    from backmix.train.run import train

    raise SystemExit(train(run, "test", ["backmix", "train"]))


@pytest.fixture(scope="module")
def start() -> Callable[[Run, float], BaseProcess]:
    """Start a run in a new process; torch is imported once, in the server that forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["backmix.train.run"])

    def begin(run: Run, pause: float) -> BaseProcess:
        process = context.Process(target=child, args=(run, pause))
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
@pytest.mark.timeout(600)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(
    tmp_path: Path, start: Callable[[Run, float], BaseProcess]
) -> None:
    data = tiny_set(tmp_path / "tiny.beton", count=80)
    run = tiny_run(data, tmp_path / "whole", epochs=8, save_steps=3, log_every=4)
    whole = start(run, 0.0)
    whole.join(SECONDS)
    assert whole.exitcode == 0

    generator = np.random.default_rng(11)
    written = 0
    for number in range(RUNS):
        other = replace(run, out=tmp_path / f"killed-{number}")
        killed = attempts = 0
        while killed < KILLS:
            attempts += 1
            aimed = attempts % 2 == 0
            process = start(other, 0.03 if aimed else 0.0)
            if aimed:
                written += kill_in_a_write(process, other.out, float(generator.uniform(0, 0.4)))
            process.join(float(generator.uniform(0.05, 0.6)))
            process.kill()
            process.join(SECONDS)
            killed += process.exitcode == -signal.SIGKILL
            assert attempts < 10 * KILLS
        last = start(other, 0.0)
        last.join(SECONDS)
        assert last.exitcode == 0
        assert fingerprint(other.out) == fingerprint(run.out), f"run {number}"
    print(f"{RUNS * KILLS} kills, {written} of them inside a checkpoint's write")
    assert written >= RUNS * KILLS // 4


def test_a_second_start_on_a_live_run_is_refused(
    tmp_path: Path, start: Callable[[Run, float], BaseProcess]
) -> None:
    run = tiny_run(tiny_set(tmp_path / "tiny.beton"), tmp_path / "run", epochs=1000)
    first = start(run, 0.0)
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
