"""Steps of a run on a resident pool as one recorded program: `--graph`.

A small network at batch 64 keeps a GPU busy for less time than Python needs to launch a step's
kernels. So everything a step reads lies on the device before the epoch begins, drawn for all of
its images at once; a step finds its own part there by its number, which it counts up itself; and
on a GPU it is recorded as a CUDA graph, which the host starts with one call. What it computes is
`loop.take_step`, and the same.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from backmix.pipeline.batch import Batch, HostRows, Place
from backmix.pipeline.loader import Loader
from backmix.pipeline.resident import Resident
from backmix.train.loop import Step, rate_at, take_step
from backmix.train.methods.method import DeviceDraws
from backmix.train.options import Run
from backmix.train.state import State

WARM_UP = 3
"""Steps that a process takes before it records one: kernels are compiled and memory is found."""
_OF_IMAGES = ("rows", "index", "labels", "boxes", "sizes", "status")
"""Fields of a batch that have a row per image."""


@dataclass(frozen=True)
class Tape:
    """What the steps of an epoch read, [m, ...] each: always the same tensors, filled anew."""

    batch: Batch
    drawn: DeviceDraws

    def fill(self, batch: Batch, drawn: DeviceDraws) -> None:
        """Take the images of an epoch, m at most, and their draws."""
        for name in _OF_IMAGES:
            getattr(self.batch, name)[: len(batch)].copy_(getattr(batch, name))
        for name, value in vars(drawn).items():
            if value is not None:
                getattr(self.drawn, name)[: len(batch)].copy_(value)

    def at(self, number: Tensor, lanes: Tensor) -> tuple[Batch, DeviceDraws]:
        """Return the batch of a step and its draws.

        Args:
            number: of the step on the tape, int64 0-d.
            lanes: 0 .. n - 1 for steps of n images.
        """
        take = number * len(lanes) + lanes
        images = {name: getattr(self.batch, name).index_select(0, take) for name in _OF_IMAGES}
        nobody = HostRows(self.batch.host.pool_index, np.zeros(0, np.int64))
        drawn = self.drawn.each(lambda value: value.index_select(0, take))
        return replace(self.batch, **images, host=nobody), drawn


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Let what happens inside have a stream of its own on a GPU: steps are recorded on one."""
    if device.type != "cuda":
        yield
        return
    before, own = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    own.wait_stream(before)
    with torch.cuda.stream(own):
        yield
    before.wait_stream(own)


@contextmanager
def to_be_recorded(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let the step of an optimizer be recorded inside.

    Adam's refuses unless its groups say `capturable`, which they must not elsewhere: it warns. To
    its fused form, whose state is on the device anyway, the word means nothing further.
    """
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def recorded_steps(
    state: State, loader: Loader, run: Run, autocast: AbstractContextManager
) -> Iterator[Step]:
    """Take all steps from the state's place to the end of the run, yielding after each.

    As `loop.steps`, to the bit on a CPU. On a GPU it goes on inside `own_stream` alone. The loss of
    a step is overwritten by the next one.
    """
    pool = loader.engine
    assert isinstance(pool, Resident)
    batch = run.loader.batch
    per_epoch = -(-loader.samples // batch)
    program: _Program | None = None
    while state.place.epoch < run.epochs:
        images, places = pool.whole_steps(state.place)
        if places:
            drawn = state.method.draw(images)
            if program is None:
                program = _Program(state, run, autocast, images, drawn, loader.samples)
            program.begin(images, drawn)
        for place in places:
            assert program is not None
            loss = program.step()
            state.step += 1
            state.place = place
            yield Step(loss, place.consumed == loader.samples)
        if state.place.consumed < loader.samples:  # a short step ends the epoch
            for rest in loader.batches(state.place):
                loss = take_step(state, rest, run, rate_at(run, state.step, per_epoch), autocast)
                state.step += 1
                state.place = rest.place
                yield Step(loss, rest.place.consumed == loader.samples)
        state.place = Place(run.seed, state.place.epoch + 1)


class _Program:
    """A step as a function of tensors that stay where they are."""

    def __init__(
        self,
        state: State,
        run: Run,
        autocast: AbstractContextManager,
        images: Batch,
        drawn: DeviceDraws,
        samples: int,
    ) -> None:
        """Make room for the steps of an epoch.

        Args:
            state: is changed by every step.
            run: the options.
            autocast: of the network.
            images, drawn: of the first epoch, for dtypes and shapes.
            samples: images of an epoch.
        """
        self.state, self.run, self.autocast = state, run, autocast
        device = images.rows.device
        per_epoch = -(-samples // run.loader.batch)

        def room(value: Tensor) -> Tensor:
            return torch.zeros(samples, *value.shape[1:], dtype=value.dtype, device=device)

        self.tape = Tape(
            replace(images, **{name: room(getattr(images, name)) for name in _OF_IMAGES}),
            drawn.each(room),
        )
        self.lanes = torch.arange(run.loader.batch, device=device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        """Of the next step on the tape."""
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        """Of the next step in the run."""
        rates = [rate_at(run, step, per_epoch) for step in range(run.epochs * per_epoch)]
        self.rates = torch.tensor(rates, dtype=torch.float32, device=device)
        self.loss = torch.zeros((), device=device)
        self.replay: Callable[[], None] | None = None
        self.taken = 0
        # A graph writes into the tensors that it was recorded with.
        state.interval.stays = state.epoch.stays = True

    def begin(self, images: Batch, drawn: DeviceDraws) -> None:
        """Take the images of the rest of an epoch."""
        self.tape.fill(images, drawn)
        self.number.zero_()
        self.total.fill_(self.state.step)

    def step(self) -> Tensor:
        """Take the next step; returns its loss, 0-d, which the next one overwrites."""
        if self.replay is None and self.taken == WARM_UP and self.lanes.is_cuda:
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as those that pin memory, may go on meanwhile.
            with (
                to_be_recorded(self.state.optimizer),
                torch.cuda.graph(
                    graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
                ),
            ):
                self._step()
            self.replay = graph.replay
        self.taken += 1
        (self.replay or self._step)()
        return self.loss

    def _step(self) -> None:
        batch, drawn = self.tape.at(self.number, self.lanes)
        rate = self.rates.index_select(0, self.total[None]).squeeze(0)
        self.loss.copy_(take_step(self.state, batch, self.run, rate, self.autocast, drawn=drawn))
        self.number += 1
        self.total += 1
