"""What the first process of a run writes and shows, for all of them."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backmix.pipeline.options import size_at
from backmix.train.clock import Clock
from backmix.train.log import Beat, Log, Progress, write_status
from backmix.train.options import Run
from backmix.train.profile import Profile
from backmix.train.saves import Saves, write_model
from backmix.train.state import State
from backmix.train.world import (
    ORPHANED,
)


@dataclass
class Desk:
    """Where the first process writes for all of them."""

    run: Run
    state: State
    log: Log
    saves: Saves
    profile: Profile
    progress: Progress
    total: int
    """Steps of the whole run."""

    def __post_init__(self) -> None:
        self.clock = Clock(self.state.place, self.state.void_steps.device.type)
        self.beat = Beat(self.run.out)

    def facts(self, end_of_epoch: bool) -> dict[str, float]:
        """Return the figures that stand in status.json."""
        done = {"epoch": self.state.place.epoch + end_of_epoch, "epochs": self.run.epochs}
        mean = self.clock.mean
        rate = {"images_per_s": round(mean.images_per_s, 1)} if mean.steps else {}
        return {**done, "steps": self.total, **rate}

    def step(self) -> None:
        """Count a step."""
        self.profile.step()
        self.clock.step(self.state.place, size_at(self.run.loader, self.state.place.epoch))

    def epoch(self, sums: Mapping[str, float]) -> None:
        """Write the row of an epoch, and what went between the processes in it."""
        seen = max(sums["seen"], 1)
        rate = float(self.state.optimizer.param_groups[0]["lr"])
        means = sums["loss"] / seen, sums["right"] / seen
        self.log.epoch(self.state.place.epoch + 1, self.state.step, *means, rate)
        if self.state.world.size > 1:
            row = {"event": "exchange", "step": self.state.step, "epoch": self.state.place.epoch}
            self.log.time(row | self.state.exchanged())

    def row(self, row: Mapping[str, Any], bad: int, named: Sequence[str], end: bool) -> None:
        """Write a row of the log.

        Args:
            row: of log.jsonl.
            bad: images that were replaced so far.
            named: those of them that have not been named yet.
            end: whether this is the end of an epoch.
        """
        self.log.row(dict(row))
        self.log.time({"step": self.state.step, **self.clock.row(), "replaced": bad})
        self.beat.beat(self.state.step, self.facts(end))
        for line in named:
            self.progress.show(f"replaced: {line}", final=True)

    def show(self) -> None:
        """Show how far the run is."""
        state, run = self.state, self.run
        self.progress.show(
            f"{run.out.name}: epoch {state.place.epoch + 1}/{run.epochs}, step {state.step:,}/"
            f"{self.total:,}, {self.clock.text(self.total - state.step)}"
        )

    def stopped(self, signal_number: int, end: bool) -> None:
        """Write that the run was stopped."""
        why = "its launcher is gone"
        if signal_number != ORPHANED:
            why = signal.Signals(signal_number).name
        write_status(self.run.out, "stopped", self.state.step, why, self.facts(end))
        step = self.state.step
        self.progress.show(f"stopped at step {step}; the same command continues", final=True)

    def finished(self) -> None:
        """Write the weights, and that the run is finished."""
        write_model(self.run, self.state)
        write_status(self.run.out, "finished", self.state.step, facts=self.facts(False))
        self.progress.show(f"finished {self.run.out}: {self.state.step} steps", final=True)
