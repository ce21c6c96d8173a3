"""`backmix bench-step`: what the loader can deliver, what a step consumes, and both together.

All three in turns within one process, so that a slow moment of the machine hits all: the loader
alone, the step alone on batches of random bytes that lie on the device, and training as it is. The
step alone is the ceiling; the share of it that training reaches says what the loader costs.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from backmix.pipeline.batch import Batch, HostRows, Place
from backmix.pipeline.loader import Loader
from backmix.pipeline.options import size_at
from backmix.pipeline.subset import Subset
from backmix.train.check import check
from backmix.train.clock import Clock
from backmix.train.forward import compile_step
from backmix.train.loop import take_step
from backmix.train.options import Run
from backmix.train.prepare import prepare_run
from backmix.train.state import State

BATCHES = 4
"""Different synthetic batches that the steps go through."""
RATE = 1e-3
"""Learning rate: what is learned does not matter, and the loss must stay finite."""
FORMS = ("loader", "step", "both")

Taken = TypeVar("Taken")


def synthetic(
    subset: Subset, side: int, images: int, group: int, device: torch.device, epoch: int = 1
) -> list[Batch]:
    """Return batches of random bytes on the device, each image cut out of a larger one.

    Args:
        subset: the training samples: numbers and labels are drawn from it.
        side: of the images [pixels].
        images: of a batch.
        group: size of the mix groups.
        device: where the batches lie.
        epoch: that the batches say they are of.
    """
    made = np.random.default_rng(0)
    batches = []
    for number in range(BATCHES):
        rows = made.choice(len(subset), images, replace=len(subset) < images)
        index = np.asarray(subset.index[rows], np.int64)
        stored = made.integers(side, 2 * side, (images, 2))
        height_width = (stored * made.uniform(0.5, 1, (images, 2))).astype(int)
        corner = made.integers(0, stored - height_width + 1)

        def move(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(array).to(device, dtype)

        shape = (images, side, side, 3)
        batches.append(
            Batch(
                pool=torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
                pool_index=move(index, torch.int64),
                rows=torch.arange(images, device=device),
                index=move(index, torch.int64),
                labels=move(np.asarray(subset.labels[rows], np.int64), torch.int64),
                boxes=move(np.concatenate([corner, height_width], 1), torch.int32),
                sizes=move(stored, torch.int32),
                status=torch.zeros(images, dtype=torch.uint8, device=device),
                group=group,
                place=Place(seed=0, epoch=epoch, consumed=number * images),
                host=HostRows(index, np.arange(images)),
            )
        )
    return batches


@dataclass
class Training:
    """A training that goes on where it stopped, on whatever batches come."""

    state: State
    run: Run
    batches: Iterator[Batch]
    autocast: AbstractContextManager

    def take(self, count: int) -> int:
        """Take so many steps, fewer where the batches end; returns how many images they had."""
        images = 0
        for batch in itertools.islice(self.batches, count):
            take_step(self.state, batch, self.run, RATE, self.autocast)
            self.state.step += 1
            images += len(batch)
        return images

    def refuse_void_steps(self) -> None:
        """Raise ValueError where a step was void: its time would be that of nothing learnt."""
        void = int(self.state.void_steps)
        if void:
            raise ValueError(f"{void} of {self.state.step} steps had a gradient that is not finite")


def timed(call: Callable[[], Taken], device: torch.device) -> tuple[Taken, float]:
    """Return what `call` returns, and the seconds until the device has done all it asked for.

    On a GPU between two events on its stream, which is empty before; on a CPU by the clock.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        return call(), time.perf_counter() - start
    torch.cuda.synchronize(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    result = call()
    last.record()
    torch.cuda.synchronize(device)
    return result, first.elapsed_time(last) / 1e3


def turns(
    forms: Mapping[str, Callable[[], Taken]], rounds: int, end: float
) -> dict[str, list[Taken]]:
    """Let forms take turns, A B C A B C, and return what each gave, one value per round.

    Args:
        forms: by name, in their order.
        rounds: turns of each.
        end: no new round begins after this time of `perf_counter`, but two are taken at least.
    """
    taken: dict[str, list[Taken]] = {form: [] for form in forms}
    for done in range(rounds):
        if done >= 2 and time.perf_counter() > end:
            break
        for form, turn in forms.items():
            taken[form].append(turn())
    return taken


@dataclass(frozen=True)
class Lap:
    """One turn of one form."""

    images: int
    seconds: float
    data_wait: float = 0.0
    """Share of the time in which the host waited for the loader."""
    gpu_idle: float | None = None
    """Share of the time in which the GPU had finished one step and not begun the next."""

    @property
    def rate(self) -> float:
        """Return images per second."""
        return self.images / max(self.seconds, 1e-9)


class Bench:
    """The three forms of one run."""

    def __init__(self, run: Run, state: State, loader: Loader, precision: str) -> None:
        """Take what a start of the run would train with.

        Args:
            run: the options.
            state: at the beginning; its network is trained on.
            loader: open.
            precision: fp32 or bf16.
        """
        self.run, self.state, self.loader = run, state, loader
        self.device = state.void_steps.device
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
        # The last epoch's views are the largest, and everything that begins later has begun.
        self.place = Place(run.seed, run.epochs - 1)
        self.side = size_at(run.loader, self.place.epoch)
        group = run.loader.mix_group
        made = synthetic(
            loader.subset, self.side, run.loader.batch, group, self.device, self.place.epoch
        )
        self.alone = Training(state, run, itertools.cycle(made), autocast)
        self.training = Training(state, run, iter(()), autocast)
        self.ahead = run.loader.prefetch + 1
        """Batches that are decoded before anybody asks: they count in no rate."""

    def delivered(self) -> Generator[Batch, None, None]:
        """Yield the loader's batches, epoch after epoch, from where it was last."""
        while True:
            for batch in self.loader.batches(self.place):
                self.place = batch.place
                yield batch
            self.place = Place(self.run.seed, self.place.epoch + 1)

    def loader_alone(self, steps: int) -> Lap:
        """Return a lap of fetching batches, and doing nothing with them."""
        with contextlib.closing(self.delivered()) as batches:
            for _ in itertools.islice(batches, self.ahead):
                pass
            fetch = partial(sum, map(len, itertools.islice(batches, steps)))
            return Lap(*timed(fetch, self.device))

    def step_alone(self, steps: int) -> Lap:
        """Return a lap of steps on batches that lie on the device."""
        self.alone.take(1)
        return Lap(*timed(partial(self.alone.take, steps), self.device))

    def both(self, steps: int) -> Lap:
        """Return a lap of training."""
        clock = Clock(self.place, self.device.type)
        with contextlib.closing(self.delivered()) as batches:
            self.training.batches = clock.fetched(batches)
            self.training.take(self.ahead)
            clock.row()
            lap = Lap(*timed(partial(self.training.take, steps), self.device))
        row = clock.row()
        self.training.batches = iter(())
        return replace(lap, data_wait=row["data_wait"], gpu_idle=row.get("gpu_idle"))


def bench_step(
    run: Run,
    rounds: int,
    steps: int,
    seconds: float,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Lap]]:
    """Return the laps of `FORMS` for a run as it would start; nothing is written.

    Args:
        run: the options.
        rounds: turns of each form, at least 2.
        steps: of a turn, at most; fewer where they would take longer than `seconds` in all.
        seconds: for all turns together, about.
        say: shows a line.

    Raises:
        ValueError: as a start of the run would; or every step was void.
    """
    check(run)
    config, state, loader = prepare_run(run, "", [], say=say)
    with loader:
        if run.compile:
            state.forward = compile_step(state.forward, state.model)
        bench = Bench(run, state, loader, config.resolved.precision)
        resolved = config.resolved
        say(
            f"{run.model}, batch {run.loader.batch}, {bench.side} px, {resolved.precision}, on "
            f"{resolved.device} with {resolved.threads} threads; loader {resolved.loader}"
        )
        bench.step_alone(1)  # compiles, allocates, chooses algorithms
        once = bench.step_alone(1)
        share = seconds / (rounds * len(FORMS) * max(once.seconds, 1e-6))
        each = max(2, min(steps, int(share)))
        forms = {
            "loader": partial(bench.loader_alone, each),
            "step": partial(bench.step_alone, each),
            "both": partial(bench.both, each),
        }
        laps = turns(forms, rounds, time.perf_counter() + seconds)
        bench.training.refuse_void_steps()
        say(f"{len(laps['both'])} turns of {each} steps each")
    return laps


def table(laps: Mapping[str, list[Lap]]) -> str:
    """Return what was measured, as text: medians, and the 20th and 80th percentile beside them."""
    named = {
        "loader": "the loader alone delivers",
        "step": "a step alone consumes",
        "both": "training as it is",
    }
    lines = []
    for form, text in named.items():
        low, median, high = np.percentile([lap.rate for lap in laps[form]], (20, 50, 80))
        lines.append(f"{text:26} {median:10,.1f} img/s   ({low:,.1f} .. {high:,.1f})")
    shares = [both.rate / step.rate for both, step in zip(laps["both"], laps["step"], strict=True)]
    waits = [lap.data_wait for lap in laps["both"]]
    low, median, high = np.percentile(shares, (20, 50, 80))
    lines.append(f"{'share of the ceiling':26} {median:10.1%}         ({low:.1%} .. {high:.1%})")
    lines.append(f"{'host waits for the loader':26} {statistics.median(waits):10.1%} of the time")
    idle = [lap.gpu_idle for lap in laps["both"] if lap.gpu_idle is not None]
    if idle:
        lines.append(f"{'the GPU is idle':26} {statistics.median(idle):10.1%} of the time")
    return "\n".join(lines)
