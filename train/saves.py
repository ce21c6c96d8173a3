"""What a run writes between two steps: a row of its log, a checkpoint, at last the weights."""

import threading
import time
from collections.abc import Mapping
from typing import Any

from backmix.train.checkpoint import HostCopies, newest_step, save_checkpoint
from backmix.train.log import Log, Progress
from backmix.train.models.weights import classes_of, write_weights
from backmix.train.options import Run
from backmix.train.state import State

MOST_VOID_STEPS = 10
"""Void steps between two log rows that end the run."""
MOST_VOID_ROWS = 3
"""Log rows in succession with void steps that end the run."""
MOST_FAILED_SAVES = 3
"""Checkpoints in a row that may fail to be written (a full disk) before the run ends."""


def take_row(state: State) -> tuple[dict[str, Any], int]:
    """Return a row of the meters for log.jsonl and its steps, and let them start anew.

    All processes call it, and all get the same row. Void steps count in `bad_steps` alone: the
    other figures are of the steps that were taken.
    """
    void = int(state.void_steps)
    named = state.take_void_samples() if void else []
    sums = state.interval.take(state.world)
    seen, taken = sums.pop("seen"), round(sums.pop("steps"))
    good = max(taken - void, 1)
    row = {
        "step": state.step,
        "epoch": state.place.epoch,
        "consumed": state.place.consumed,
        "samples": round(seen),
        "loss": sums.pop("loss") / max(seen, 1),
        "accuracy": sums.pop("right") / max(seen, 1),
        "lr": float(state.optimizer.param_groups[0]["lr"]),
        "grad_norm": sums.pop("grad_norm") / good,
        "bad_steps": void,
        # Sorted, as a resumed run takes them from its checkpoint.
        **{name: value / good for name, value in sorted(sums.items())},
    }
    if void:
        row["bad_samples"] = named
    state.void_steps.zero_()
    state.void_rows = state.void_rows + 1 if void else 0
    return row, taken


def refuse_many_voids(state: State, row: Mapping[str, Any], taken: int, run: Run) -> None:
    """End the run where too many steps were void, up to a row that is in the log by now."""
    void = row["bad_steps"]
    if void > MOST_VOID_STEPS or state.void_rows >= MOST_VOID_ROWS:
        raise ValueError(
            f"{run.out}: {void} of the last {taken} steps up to step {state.step} had a gradient "
            f"that is not finite; samples of the first: {row.get('bad_samples', [])}. A lower "
            "--optim.lr or --optim.clip 1 usually helps."
        )


class Saves:
    """When checkpoints are due, how they get to the disk, and what happens when one cannot.

    A step waits only until its tensors are copied within the memory of the host; a thread then
    writes the copy. One is written at a time: the next one waits for it.
    """

    def __init__(self, run: Run, log: Log) -> None:
        """Count from now."""
        self.run = run
        self.log = log
        self.last = time.monotonic()
        self.copies = HostCopies()
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        """Why the last one was not written."""
        self.failed = 0
        """How many in a row were not."""

    def due(self, state: State) -> bool:
        """Return whether it is time, by minutes or by steps.

        Raises what kept the last ones from being written, where they were too many in a row.
        """
        if self.error is not None and self.failed >= MOST_FAILED_SAVES:
            raise self.error
        by_steps = self.run.save_steps and state.step % self.run.save_steps == 0
        return bool(by_steps) or time.monotonic() - self.last >= self.run.save_minutes * 60

    def write(self, state: State) -> None:
        """Write the checkpoint, and wait until it is on the disk."""
        self._begin(state, None)
        self.finish()
        if self.error is not None:
            raise self.error

    def try_to_write(self, state: State, progress: Progress) -> None:
        """Begin to write the checkpoint; if that fails say so, the one before is intact."""
        self._begin(state, progress)

    def finish(self) -> None:
        """Wait until nothing is being written any more."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _begin(self, state: State, progress: Progress | None) -> None:
        """Copy the state, and let a thread write the copy."""
        self.finish()
        self.last = time.monotonic()
        whole = state.tensors()  # which all processes make together, whatever happens here
        try:
            lengths = self.log.written()
        except OSError as error:
            self._fail(error, progress)
            return
        tensors = self.copies.take(whole)
        meta = {**state.meta(), "log": lengths}
        step, keep = state.step, self.run.keep

        def write() -> None:
            try:
                self.log.sync()  # the rows that this checkpoint counts
                save_checkpoint(self.run.out, step, tensors, meta, keep)
            except Exception as error:
                self._fail(error, progress)
            else:
                self.error, self.failed = None, 0

        # A daemon, so that a second Ctrl-C ends the process: a torn file is no checkpoint.
        self.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self.thread.start()

    def _fail(self, error: Exception, progress: Progress | None) -> None:
        # What is not the disk's fault would fail again.
        self.failed = self.failed + 1 if isinstance(error, OSError) else MOST_FAILED_SAVES
        self.error = error
        if progress is not None and self.failed < MOST_FAILED_SAVES:
            before = newest_step(self.run.out)
            there = f"the checkpoint of step {before} is intact" if before else "there is none yet"
            progress.show(f"{error}; {there}, going on", final=True)


def write_model(run: Run, state: State) -> None:
    """Write the weights alone, for whoever wants them."""
    write_weights(run.out, state.weights(), run.model, classes_of(state.model))
