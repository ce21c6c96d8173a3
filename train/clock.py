"""Where the time of a run goes: images per second, waiting for data, an idle GPU, memory.

Nothing here waits for the device, and nothing that a run computes depends on it.
"""

import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from backmix.pipeline.batch import Place
from backmix.train.profile import fetched

Item = TypeVar("Item")


class Clock:
    """What `time.jsonl` and the progress line say of time.

    Rates leave out the first interval of the log after the start and after each change of the
    views' size, in which caches are filled and kernels compiled and chosen.
    """

    def __init__(self, place: Place, device: str) -> None:
        """Count from now and from here; `device` is cpu or cuda."""
        self.device = device
        self.place = place
        self.side: int | None = None
        self.warming = True
        self.waited = 0.0
        """Seconds of this interval in which the host waited for the loader."""
        self.images = self.steps = 0
        """Of this interval, all processes together."""
        self.began = time.perf_counter()
        self.counted = _Sums()
        """Of the intervals that count in the rates."""
        self.all = _Sums()
        self.idle = GpuIdle() if device == "cuda" else None

    def fetched(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield what a loader yields, and count the time that it is waited for."""
        remaining = fetched(items)
        while True:
            if self.idle is not None:
                self.idle.step_ends()
            asked = time.perf_counter()
            try:
                item = next(remaining)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - asked
            if self.idle is not None:
                self.idle.step_begins()
            yield item

    def step(self, place: Place, side: int) -> None:
        """Count a step that has been asked for.

        Args:
            place: where the loader is after it.
            side: of its views [pixels].
        """
        same = place.epoch == self.place.epoch
        self.images += place.consumed - (self.place.consumed if same else 0)
        self.steps += 1
        self.place = place
        self.warming |= self.side not in (None, side)
        self.side = side

    def row(self) -> dict[str, Any]:
        """Return the figures of this interval, and begin another one.

        Returns:
            images_per_s; data_wait, the share of the time in which the host waited for the loader;
            on a GPU gpu_idle, the share of the time in which it had finished one step and not begun
            the next; `warming` where the interval counts in no rate; and what `memory` returns.
        """
        now = time.perf_counter()
        sums = _Sums(now - self.began, self.waited, self.images, self.steps)
        self.all += sums
        if not self.warming:
            self.counted += sums
        row: dict[str, Any] = {"images_per_s": round(sums.images_per_s, 1)}
        row["data_wait"] = round(sums.data_wait, 4)
        if self.idle is not None and (idle := self.idle.share()) is not None:
            row["gpu_idle"] = round(idle, 4)
        if self.warming:
            row["warming"] = True
        self.began, self.waited, self.images, self.steps = now, 0.0, 0, 0
        self.warming = False
        return row | memory(self.device)

    @property
    def mean(self) -> "_Sums":
        """Return the sums over all intervals that count; over all there are, where none does."""
        if self.counted.steps:
            return self.counted
        now = _Sums(time.perf_counter() - self.began, self.waited, self.images, self.steps)
        return self.all + now

    def text(self, left: int) -> str:
        """Return images per second, waiting, and what `left` steps will take, for the progress."""
        mean = self.mean
        seconds = int(mean.seconds / max(mean.steps, 1) * left)
        return (
            f"{mean.images_per_s:,.0f} img/s, wait {mean.data_wait:.0%}, "
            f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
        )


class _Sums:
    """Seconds, of them waiting for data, images and steps."""

    def __init__(
        self, seconds: float = 0.0, waited: float = 0.0, images: int = 0, steps: int = 0
    ) -> None:
        self.seconds, self.waited, self.images, self.steps = seconds, waited, images, steps

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.seconds + other.seconds,
            self.waited + other.waited,
            self.images + other.images,
            self.steps + other.steps,
        )

    @property
    def images_per_s(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    @property
    def data_wait(self) -> float:
        return min(self.waited / max(self.seconds, 1e-9), 1.0)


class GpuIdle:
    """The share of the time in which the GPU had finished one step and not begun the next.

    Events on the stream of the steps say when it was there; only those that it has passed are
    looked at, so that nobody waits for it.
    """

    def __init__(self) -> None:
        """Begin before the first step."""
        self.spare: list[torch.cuda.Event] = []
        self.end: torch.cuda.Event | None = None
        self.gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        """End of a step and begin of the next one, oldest first."""

    def step_ends(self) -> None:
        """Note that all work of a step has been given to the GPU."""
        if self.end is None:  # else an epoch ended, and there was no batch to be had
            self.end = self._now()

    def step_begins(self) -> None:
        """Note that the work of the next step begins."""
        assert self.end is not None
        self.gaps.append((self.end, self._now()))
        self.end = None

    def share(self) -> float | None:
        """Return the share of the steps that are through since the last call, None if too few."""
        passed = 0
        while passed < len(self.gaps) and self.gaps[passed][1].query():
            passed += 1
        if passed < 2:
            return None
        first, *gaps = self.gaps[:passed]
        idle = sum(end.elapsed_time(begin) for end, begin in gaps)
        total = first[1].elapsed_time(gaps[-1][1])
        self.spare += [event for gap in self.gaps[: passed - 1] for event in gap]
        self.gaps = self.gaps[passed - 1 :]  # the next interval begins where this one ends
        return idle / max(total, 1e-9)

    def _now(self) -> torch.cuda.Event:
        event = self.spare.pop() if self.spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def memory(device: str) -> dict[str, int]:
    """Return the memory that this process has, in MiB.

    Returns:
        rss_mib, resident now, files in memory included; on a GPU gpu_peak_mib of tensors and
        gpu_reserved_mib, both the most so far, and alloc_retries, how often it was full.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident = pages * resource.getpagesize()
    except OSError:  # no Linux: the most so far
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"rss_mib": resident >> 20}
    if device == "cuda":
        found["gpu_peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        found["gpu_reserved_mib"] = torch.cuda.max_memory_reserved() >> 20
        found["alloc_retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    return found
