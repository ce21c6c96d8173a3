"""What every bench shares: rows and their file, clocks, ceilings, and the machine's facts.

A row is one JSON object with all of `KEYS`; what is unknown is null. A file is one stage on one
machine, a row a line, each written as soon as it is known: who is killed loses one row.
"""

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

KEYS = tuple(
    "bench case note kernel form stage shape dtype out_dtype memory_format ms_p20 ms_p50 ms_p80 n "
    "bytes flops gb_per_s tflops share_of_copy share_of_matmul copy_gb_per_s bf16_tflops l2 "
    "l2_resident host_us peak_mib registers config checked device sm_count driver torch triton "
    "python commit dirty utc unsteady".split()
)
"""Every row has all of them; what is unknown is null."""

Row = dict[str, Any]
Call = Callable[[], object]

# --- rows and their file -----------------------------------------------------------------------


def identity(row: Row) -> tuple[Any, ...]:
    """Return what a row is about: rows that agree in it repeat one another."""
    return tuple(row[key] for key in ("bench", "stage", "device", "case", "form", "l2"))


def load(paths: Iterable[Path]) -> list[Row]:
    """Return the rows of files in order; a last line cut short by a kill is left out."""
    rows = []
    for path in paths:
        lines = path.read_text().splitlines(keepends=True)
        rows += [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]
    return rows


@dataclass
class Rows:
    """Rows of one stage, appended to a file as they come."""

    path: Path
    common: Row
    """What every row says: `machine(...)`, bench, stage, ceilings."""
    skip_done: bool = False
    """Whether a row that the file has already need not be made again."""
    repeat: int = 0
    """Number of this pass over the stage: `skip_done` wants one row more than that."""
    written: list[Row] = field(default_factory=list)
    _before: Counter[tuple[Any, ...]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            stored = self.all()
            # A line that a kill cut short must not swallow the next row.
            self.path.write_text("".join(json.dumps(row) + "\n" for row in stored))
            self._before = Counter(identity(row) for row in stored)

    def done(self, **about: Any) -> bool:
        """Return whether the row about `case, form, l2` is there and need not be made."""
        row = dict.fromkeys(KEYS) | self.common | about
        return self.skip_done and self._before[identity(row)] > self.repeat

    def all(self) -> list[Row]:
        """Return what the file holds, this pass's rows last."""
        return load([self.path]) if self.path.exists() else []

    def write(self, **known: Any) -> Row:
        """Append a row at once; returns it. Keys that no row has are refused."""
        given = self.common | known
        unknown = sorted(given.keys() - set(KEYS))
        if unknown:
            raise KeyError(f"a row has no {', '.join(unknown)}")
        row = {key: given.get(key) for key in KEYS}
        row["utc"] = row["utc"] or now()
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.written.append(row)
        return row

    def finish(self, unsteady: bool) -> None:
        """Say of this pass's rows whether the machine kept its speed; until then it is unknown."""
        for row in self.written:
            row["unsteady"] = bool(row["unsteady"]) or unsteady
        stored = self.all()
        rows = stored[: len(stored) - len(self.written)] + self.written
        beside = self.path.with_suffix(".part")
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        beside.replace(self.path)


def now() -> str:
    """Return the time as rows write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- the machine -------------------------------------------------------------------------------


def machine(device: torch.device | str) -> Row:
    """Return what a row says of the machine and the code: `device` to `dirty`.

    The environment variable BENCH_COMMIT stands in for git where the copy has no repository.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    commit = _said("git", "rev-parse", "HEAD")
    changes = _said("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "device": properties.name if properties else f"CPU: {processor()}",
        "sm_count": properties.multi_processor_count if properties else None,
        "driver": _driver() if on_gpu else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": commit or os.environ.get("BENCH_COMMIT") or None,
        "dirty": bool(changes) if commit else None,
    }


def processor() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _driver() -> str | None:
    said = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0].strip() if said else None


def _said(*command: str) -> str | None:
    """Return what a program prints; None where there is no such program, or it fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
            cwd=Path(__file__).resolve().parents[1],
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- clocks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """How long one thing is timed: until its mean is known to 1 %, within these bounds."""

    least: int = 50
    most: int = 1000
    seconds: float = 1.0
    """After these, no more calls, but never fewer than 20."""
    in_a_row: int = 20
    """Calls of one graph, and of one look at the host's clock."""


FEWEST = 20
"""Repetitions under which nothing is called a percentile, unless `most` says fewer."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of each repetition."""

    ms: list[float]

    @property
    def row(self) -> Row:
        """Return the keys of a row that say it: 20th, 50th, 80th percentile, and how many."""
        low, median, high = np.percentile(self.ms, (20, 50, 80)).tolist()
        return {"ms_p20": low, "ms_p50": median, "ms_p80": high, "n": len(self.ms)}

    @property
    def median(self) -> float:
        """Return the median, ms."""
        return statistics.median(self.ms)

    @property
    def known(self) -> bool:
        """Return whether the standard error is below 1 % of the mean."""
        error = statistics.stdev(self.ms) / math.sqrt(len(self.ms)) if len(self.ms) > 1 else 1e9
        return error < 0.01 * statistics.fmean(self.ms)


class Clock(Protocol):
    """What differs between devices."""

    @property
    def device(self) -> torch.device:
        """Return where the calls work."""
        ...

    @property
    def l2_bytes(self) -> int:
        """Return the size of the L2 cache, bytes."""
        ...

    def laps(self, calls: Sequence[Call], before: Call | None = None) -> list[float]:
        """Return the ms of each call, in order; `before` runs ahead of each, unmeasured."""
        ...

    def capture(self, calls: Sequence[Call]) -> Call:
        """Return one call that repeats all of them with no host between."""
        ...

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""
        ...

    def peak_mib(self, call: Call) -> float | None:
        """Return the most memory that a call held beyond what was held before it, MiB."""
        ...


@dataclass(frozen=True)
class CpuClock:
    """A clock for CPUs; also stands in for a GPU's in tests."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable
    l2_bytes: int = 4096

    def laps(self, calls: Sequence[Call], before: Call | None = None) -> list[float]:
        """Call and look at the time."""
        times = []
        for call in calls:
            if before is not None:
                before()
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def capture(self, calls: Sequence[Call]) -> Call:
        """Return a call that makes all calls."""
        held = list(calls)
        return lambda: [call() for call in held]

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back here."""

    def peak_mib(self, call: Call) -> float | None:
        """Nobody counts memory here; the call is made."""
        call()
        return None


@dataclass(frozen=True)
class CudaClock:
    """Events on the device's own stream: the host's time is outside, gaps between launches in."""

    device: torch.device

    @property
    def l2_bytes(self) -> int:
        """Return the size of the L2 cache, bytes."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def laps(self, calls: Sequence[Call], before: Call | None = None) -> list[float]:
        """Record an event on either side of each call; wait once, at the end."""
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in calls
        ]
        for call, (start, end) in zip(calls, pairs, strict=True):
            if before is not None:
                before()
            start.record()
            call()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def capture(self, calls: Sequence[Call]) -> Call:
        """Capture a CUDA graph; results stay alive, so that each call writes memory of its own."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # once outside: nothing may be compiled during capture
            for call in calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for call in calls]

        def replay(_held: object = results) -> None:
            graph.replay()

        return replay

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)

    def peak_mib(self, call: Call) -> float | None:
        """Read the allocator's counters around one call."""
        self.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def clock(device: torch.device | str) -> Clock:
    """Return the clock of a device."""
    device = torch.device(device)
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def repeat(lap: Callable[[int], list[float]], effort: Effort) -> Times:
    """Take `lap(count)` until the mean is known to 1 %, `most` is reached, or time is up."""
    end = time.perf_counter() + effort.seconds
    times: list[float] = []
    while len(times) < effort.most:
        late = time.perf_counter() >= end
        if len(times) >= min(FEWEST, effort.least) and late:
            break
        if len(times) >= effort.least and Times(times).known:
            break
        times += lap(min(10, effort.most - len(times)))
    return Times(times)


def cold(clock: Clock, call: Call, effort: Effort) -> Times:
    """Time calls that find nothing of theirs in the L2 cache.

    Before each, four times the cache's size is *read*. Clearing a buffer would do, too, but it
    leaves the cache full of lines that the timed call then has to write back.
    """
    buffer = torch.zeros(max(4 * clock.l2_bytes // 4, 256), device=clock.device)
    total = torch.empty((), device=clock.device)

    def flush() -> None:
        torch.sum(buffer, 0, out=total)

    call()
    return repeat(lambda count: clock.laps([call] * count, flush), effort)


def sets_for(clock: Clock, bytes_per_call: int, most: int = 64) -> int:
    """Return how many sets of inputs hold four times the L2 cache, at least one."""
    return max(1, min(most, -(-4 * clock.l2_bytes // max(bytes_per_call, 1))))


def rotate(clock: Clock, calls: Sequence[Call], effort: Effort) -> Times:
    """Time calls that each take the next set of inputs, the device never idle for long.

    Args:
        calls: one per set; a call's result is held until its set comes round again, so that
            results do not share memory either.
    """
    held: list[object] = [None] * len(calls)
    turn = 0

    def hold(index: int) -> Call:
        def call() -> None:
            held[index] = calls[index]()

        return call

    def lap(count: int) -> list[float]:
        nonlocal turn
        chosen = [hold((turn + i) % len(calls)) for i in range(count)]
        turn = (turn + count) % len(calls)
        return clock.laps(chosen)

    for call in calls:
        call()
    return repeat(lap, effort)


def graphed(clock: Clock, calls: Sequence[Call], effort: Effort) -> Times:
    """Time a graph of 20 calls or more, over all sets; one repetition is a replay's mean."""
    chosen = list(calls) * -(-effort.in_a_row // len(calls))
    replay = clock.capture(chosen)
    replay()

    def lap(count: int) -> list[float]:
        return [ms / len(chosen) for ms in clock.laps([replay] * count)]

    return repeat(lap, effort)


def host_us(clock: Clock, call: Call, effort: Effort) -> float:
    """Return the host's time for one call, us: nobody waits for the device; median of 5 rounds."""
    spans = []
    for _ in range(min(5, effort.least)):
        clock.synchronize()
        start = time.perf_counter()
        for _ in range(effort.in_a_row):
            call()
        spans.append(1e6 * (time.perf_counter() - start) / effort.in_a_row)
    clock.synchronize()
    return statistics.median(spans)


def turns(forms: dict[str, Call], seconds: float, least: int = FEWEST) -> dict[str, Times]:
    """Time forms on a CPU, in turns, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {form: [] for form in forms}
    for call in forms.values():
        call()
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or time.perf_counter() < end:
        for form, call in forms.items():
            times[form] += CpuClock().laps([call])
    return {form: Times(ms) for form, ms in times.items()}


# --- ceilings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the machine gives at this moment."""

    copy_gb_per_s: float
    """Of a device copy of 4 GiB: bytes read plus bytes written."""
    bf16_tflops: float
    """Of a bf16 matrix product of side 8192, random numbers."""

    @property
    def row(self) -> Row:
        """Return the keys of a row that say it."""
        return {"copy_gb_per_s": self.copy_gb_per_s, "bf16_tflops": self.bf16_tflops}

    def drifted(self, later: "Ceilings") -> bool:
        """Return whether either ceiling moved by more than 5 %: the stage is then unsteady."""
        pairs = (
            (self.copy_gb_per_s, later.copy_gb_per_s),
            (self.bf16_tflops, later.bf16_tflops),
        )
        return any(abs(a - b) > 0.05 * max(a, b) for a, b in pairs)


def ceilings(
    clock: Clock, *, copy_bytes: int = 2**32, side: int = 8192, warm_s: float = 0.5
) -> Ceilings:
    """Measure copy bandwidth and matrix rate; 8 GiB of memory and a second on a large GPU.

    Args:
        warm_s: first so many seconds of products: an idle GPU's clock is low.
    """
    effort = Effort(least=20, most=40, seconds=2)
    a, b = (torch.randn(side, side, device=clock.device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    multiply = partial(torch.mm, a, b, out=product)
    end = time.perf_counter() + warm_s
    while time.perf_counter() < end:
        clock.laps([multiply] * 10)
    matmul = rotate(clock, [multiply], effort)

    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copy = rotate(clock, [partial(target.copy_, source)], effort)
    return Ceilings(2 * copy_bytes / copy.median / 1e6, 2 * side**3 / matmul.median / 1e9)


def rates(
    times: Times, ceilings: Ceilings | None, bytes: int, flops: int | None, l2_bytes: int
) -> Row:
    """Return what a row says of speed: times, rates, shares of the ceilings.

    A call whose bytes fit 0.8 of the L2 cache gets no share of the copy bandwidth.
    """
    median = times.median
    resident = bytes <= 0.8 * l2_bytes if ceilings else None
    gb_per_s = bytes / median / 1e6
    tflops = None if flops is None else flops / median / 1e9
    row = times.row | {
        "bytes": bytes,
        "flops": flops,
        "gb_per_s": gb_per_s,
        "tflops": tflops,
        "l2_resident": resident,
        "unsteady": True if times.row["ms_p80"] > 1.25 * times.row["ms_p20"] else None,
    }
    if ceilings is None:
        return row
    return (
        row
        | ceilings.row
        | {
            "share_of_copy": None if resident else gb_per_s / ceilings.copy_gb_per_s,
            "share_of_matmul": None if tflops is None else tflops / ceilings.bf16_tflops,
        }
    )
