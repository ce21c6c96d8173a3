"""`--profile N`: a trace of some steps of a run, with the parts of a step named in it.

The trace is Chrome's format, gzipped: https://ui.perfetto.dev and chrome://tracing open it. Nothing
that a run computes depends on whether it is traced.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

PARTS = ("data", "mix", "forward", "backward", "bank", "optimizer")
"""The named parts of a step, in their order."""

_WAIT, _WARMUP, _ROWS = 5, 3, 15
_NOTHING = contextlib.nullcontext()
_tracing = False

Item = TypeVar("Item")


def part(name: str) -> AbstractContextManager[object]:
    """Name what happens inside `with` in the trace, where one is taken; else do nothing."""
    return record_function(name) if _tracing else _NOTHING


def fetched(items: Iterable[Item]) -> Iterator[Item]:
    """Yield what a loader yields; the time it is waited for is the part "data"."""
    remaining = iter(items)
    while True:
        with part("data"):
            try:
                item = next(remaining)
            except StopIteration:
                return
        yield item


class Profile:
    """The trace of one run: `step` is called after each step, and inside `with`.

    The first steps of a process are left out: they allocate, compile and fill caches. A disk
    without room costs the trace, never the run.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        *,
        first: int,
        left: int,
        device: str,
        say: Callable[[str], None],
    ) -> None:
        """Plan the trace.

        Args:
            run: run folder; the trace goes to profile/ in it.
            steps: how many steps to trace; 0 = none, and nothing is done.
            first: number of the next step, from 1.
            left: steps that the run has still to take.
            device: cpu or cuda.
            say: shows a line.
        """
        self.device, self.say = device, say
        self.active = min(steps, max(left - 1, 0))  # one is needed to warm up the profiler itself
        self.skipped = min(_WAIT + _WARMUP, left - self.active)
        self.path = run / "profile" / f"step-{first + self.skipped:08d}.json.gz"
        self.taken = -self.skipped
        self.profiler: profile | None = None
        if self.active < steps:
            say(f"--profile {steps}: the run has {left} steps left, {self.active} can be traced")

    def __enter__(self) -> Self:
        """Start, where there is something to trace."""
        global _tracing
        if self.active:
            warmup = min(_WARMUP, self.skipped)
            self.profiler = profile(
                activities=[ProfilerActivity.CPU]
                + [ProfilerActivity.CUDA] * (self.device == "cuda"),
                schedule=schedule(
                    wait=self.skipped - warmup, warmup=warmup, active=self.active, repeat=1
                ),
                on_trace_ready=self._write,
                record_shapes=False,
                acc_events=True,  # one cycle only; without it torch warns that earlier ones go
            )
            self.profiler.start()
            _tracing = True
        return self

    def step(self) -> None:
        """Count a step that has been taken; the trace is written after its last."""
        if self.profiler is not None:
            self.taken += 1
            if self.taken == 0 and self.device == "cuda":
                torch.cuda.synchronize()  # else what is still to run of earlier steps would count
            self.profiler.step()
            if self.taken == self.active:
                self._end()

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Write what there is of a run that stopped early; of one that failed, nothing."""
        if self.profiler is not None:
            if kind is not None:
                self.taken = 0
            elif self.taken <= 0:
                self.say("the run stopped before the first step that was to be traced: no trace")
            with contextlib.suppress(RuntimeError) if kind else contextlib.nullcontext():
                self._end()

    def _end(self) -> None:
        global _tracing
        _tracing = False
        profiler, self.profiler = self.profiler, None
        if profiler is not None:
            profiler.stop()

    def _write(self, profiler: profile) -> None:
        if self.taken <= 0:
            return
        writing = self.path.with_name(f"writing-{os.getpid()}-{self.path.name}")
        try:
            self.path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(writing))  # gzips by the name's end
            os.replace(writing, self.path)
        except (OSError, RuntimeError) as error:
            writing.unlink(missing_ok=True)
            self.say(f"the trace of {self.taken} steps could not be written: {error}")
        else:
            self.say(f"wrote {self.path}: {self.taken} steps, for ui.perfetto.dev")
        print(table(profiler.key_averages(), self.taken, self.device), flush=True)


def table(rows: Iterable[Any], steps: int, device: str) -> str:
    """Return the parts of a step and what took most time in it, as text.

    Args:
        rows: what `key_averages` of a profiler returns.
        steps: how many steps they sum up.
        device: cuda: the kernels, by their time on the GPU. cpu: the operators, by their own time.
    """
    rows = [row for row in rows if row.device_type.name.lower() == device]

    def own(row: Any) -> float:
        return row.self_device_time_total if device == "cuda" else row.self_cpu_time_total

    def whole(row: Any) -> float:
        return row.device_time_total if device == "cuda" else row.cpu_time_total

    # On a GPU a stretch is the kernels that its own thread launched; backward's are another's.
    told = [name for name in PARTS if (device, name) != ("cuda", "backward")]
    spans = {row.key: whole(row) for row in rows if row.key in told}
    work = sorted((row for row in rows if not _is_span(row) and own(row) > 0), key=own)[::-1]
    everything = max(sum(own(row) for row in work), 1e-9)
    lines = [f"of {steps} steps on {device}, ms a step:"]
    lines += [f"{spans[name] / steps / 1e3:10.3f}  {name}" for name in told if name in spans]
    lines += [f"the {min(_ROWS, len(work))} that took most of it, with share and calls a step:"]
    lines += [
        f"{own(row) / steps / 1e3:10.3f} {own(row) / everything:6.1%} {row.count / steps:8.1f}  "
        f"{row.key[:80]}"
        for row in work[:_ROWS]
    ]
    return "\n".join(lines)


def _is_span(row: Any) -> bool:
    """Return whether a row is a named stretch of time, and no operator or kernel of its own."""
    named = row.key in PARTS or row.key.startswith(("ProfilerStep", "Optimizer."))
    return named or bool(getattr(row, "is_user_annotation", False))
