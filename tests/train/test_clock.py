"""Rates leave out what is not typical, waiting is told from working, and nobody waits for a GPU."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from backmix.pipeline.batch import Place
from backmix.train import clock as clock_module
from backmix.train.clock import Clock, GpuIdle, memory
from backmix.train.options import Softmax
from tests.runs import tiny_run, tiny_set


class Time:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(clock_module.time, "perf_counter", lambda: self.now)


def test_an_interval_counts_images_and_the_time_that_was_waited_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two steps of 1 s and 2 s for the loader, 1 s each for the rest: 5 s, 3 of them waiting."""
    at, clock = Time(monkeypatch), Clock(Place(0, 0, 8), "cpu")

    def loader() -> Iterator[Place]:
        at.now += 1
        yield Place(0, 0, 16)
        at.now += 2
        yield Place(0, 0, 20)

    for place in clock.fetched(loader()):
        at.now += 1
        clock.step(place, 32)
    row = clock.row()
    assert row["images_per_s"] == pytest.approx((20 - 8) / 5, abs=0.1)
    assert row["data_wait"] == pytest.approx(3 / 5) and row["warming"] is True
    assert row["rss_mib"] > 10 and "gpu_idle" not in row


def test_rates_leave_out_the_first_interval_and_those_in_which_views_grew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at, clock, rows = Time(monkeypatch), Clock(Place(0), "cpu"), []
    consumed, epoch = 0, 0
    for seconds, side in ((50.0, 32), (1.0, 32), (30.0, 64), (3.0, 64)):
        consumed += 100
        if side == 64 and not epoch:
            consumed, epoch = 100, 1  # the images of a new epoch are counted from 0
        at.now += seconds
        clock.step(Place(0, epoch, consumed), side)
        rows.append(clock.row())
    assert [row.get("warming", False) for row in rows] == [True, False, True, False]
    assert [row["images_per_s"] for row in rows] == [2.0, 100.0, 3.3, 33.3]
    assert clock.mean.images_per_s == pytest.approx(200 / 4)
    assert clock.text(left=3600).startswith("50 img/s, wait 0%, 2:00:00 left")


def test_before_anything_counts_all_there_is_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    at, clock = Time(monkeypatch), Clock(Place(0), "cpu")
    at.now += 2
    clock.step(Place(0, 0, 10), 32)
    assert clock.text(left=5) == "5 img/s, wait 0%, 0:00:10 left"


def test_a_run_says_how_it_fared_in_time_jsonl(tmp_path: Path) -> None:
    from backmix.train.run import train

    run = tiny_run(tiny_set(tmp_path / "tiny.beton"), tmp_path / "run", Softmax(), epochs=2)
    assert train(run, "test", []) == 0
    rows = [json.loads(line) for line in (run.out / "time.jsonl").read_text().splitlines()]
    assert rows[0]["event"] == "start"
    steps = [row["step"] for row in rows if "images_per_s" in row]
    assert steps == [2, 3, 4, 6] and [row.get("warming") for row in rows[1:3]] == [True, None]
    assert all(0 <= row["data_wait"] <= 1 and row["rss_mib"] > 0 for row in rows[1:])


class Event:
    """A CUDA event of a GPU that has got as far as `Event.passed` says."""

    made, passed = 0, 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = -1.0

    def record(self) -> None:
        self.at = Event.now

    now = 0.0

    def query(self) -> bool:
        return self.at <= Event.passed

    def elapsed_time(self, other: "Event") -> float:
        assert self.query() and other.query()  # a GPU would be waited for
        return other.at - self.at


def test_idle_time_is_read_of_steps_that_are_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 3 ms with 1 ms between them, then of 1 ms with 1 ms between: 1/4, then 1/2."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    idle = GpuIdle()

    def step(gap: float, work: float) -> None:
        idle.step_ends()
        idle.step_ends()  # an epoch's end: there was no batch to be had, and it is asked again
        Event.now += gap
        idle.step_begins()
        Event.now += work

    Event.now = Event.passed = 0.0
    for _ in range(5):
        step(1, 3)
    assert idle.share() is None  # the GPU has done nothing yet
    Event.passed = Event.now
    assert idle.share() == pytest.approx(1 / 4)
    for _ in range(4):
        step(1, 1)
    Event.passed = Event.now - 2  # the last step has not begun
    # From the begin of the fifth step: 3 work, then 1 gap, (1 work, 1 gap) twice.
    assert idle.share() == pytest.approx(3 / (3 + 1 + 2 + 2))
    assert len(idle.gaps) == 2 and len(idle.spare) > 0


@pytest.mark.gpu
def test_a_gpu_that_is_made_to_wait_is_idle() -> None:
    """Half of the time by the host's clock it is not asked for anything."""
    work = torch.randn(2048, 2048, device="cuda")

    def timed_step() -> float:
        start = time.perf_counter()
        for _ in range(20):
            torch.mm(work, work)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    timed_step()
    seconds = timed_step()
    idle = GpuIdle()
    for _ in range(6):
        idle.step_ends()
        time.sleep(seconds)
        idle.step_begins()
        timed_step()
    share = idle.share()
    assert share is not None and 0.3 < share < 0.7
    assert memory("cuda")["gpu_peak_mib"] >= 16
