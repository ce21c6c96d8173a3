"""`--log-to`: the log's rows, given to TensorBoard, Weights & Biases or MLflow as well.

None of them is imported unless it is asked for, and none can stop, slow down or change a run: each
works in a thread of its own, behind a queue with an end, and what it raises is said once. All get
the same names: `train/NAME` of log.jsonl, `epoch/NAME` of summary.csv, `time/NAME` of time.jsonl.
"""

import importlib.util
import json
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAITING = 1000
"""Rows that may wait for a slow logger; further ones are lost to it."""
PATIENCE = 15.0
"""Seconds that all loggers together have to end when the run does: a scheduler waits for it."""

Emit = Callable[[int, Mapping[str, float]], None]
Opened = tuple[Emit, Callable[[], None]]
"""What takes a step and its figures, and what is called at the end."""


@dataclass(frozen=True)
class Start:
    """What a logger is told when it begins."""

    run: Path
    """Run folder."""
    step: int
    """Steps taken; rows after it, of a start that was killed, come again."""
    config: Mapping[str, Any]
    """The content of config.json."""


def _tensorboard(start: Start) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    purge = start.step + 1 if start.step else None
    writer = SummaryWriter(str(start.run / "tensorboard"), purge_step=purge)
    text = json.dumps(start.config, indent=1, sort_keys=True)
    writer.add_text("config", f"```json\n{text}\n```", start.step)

    def emit(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return emit, writer.close


def _wandb(start: Start) -> Opened:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "backmix"),
        dir=str(start.run),
        id=_kept(start.run / "wandb.id", lambda: uuid.uuid4().hex),
        name=start.run.name,
        resume="allow",
        config=dict(start.config),
        settings=wandb.Settings(console="off"),
    )

    def emit(step: int, figures: Mapping[str, float]) -> None:
        run.log(dict(figures), step=step)

    return emit, run.finish


def _mlflow(start: Start) -> Opened:
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
    from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

    # Without a server of the user's, files in the run folder, and no data base elsewhere.
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = (start.run.resolve() / "mlruns").as_uri()
    client = MlflowClient(tracking_uri=uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "backmix")

    def begin() -> str:
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        run = client.create_run(experiment, run_name=start.run.name).info.run_id
        flat = [Param(key, value[:500]) for key, value in _flat(start.config) if value]
        for first in range(0, len(flat), 100):  # MLflow takes a hundred at a time
            client.log_batch(run, params=flat[first : first + 100])
        return run

    run = _kept(start.run / "mlflow.id", begin)
    client.update_run(run, status="RUNNING")

    def emit(step: int, figures: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in figures.items()]
        client.log_batch(run, metrics=metrics)

    return emit, lambda: client.set_terminated(run)


LOGGERS: dict[str, Callable[[Start], Opened]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
"""By the name of `--log-to`, which is that of the package, too."""


def _kept(path: Path, make: Callable[[], str]) -> str:
    """Return the name that a run has in another program, the same after every resume."""
    if not path.exists() or not path.read_text().strip():  # killed while it was written
        path.write_text(make() + "\n")
    return path.read_text().strip()


def _flat(document: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted name, value as text) of a nested document."""
    found = []
    for name, value in document.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", str(value)))
    return found


class Loggers:
    """All loggers of a run."""

    def __init__(self, names: Sequence[str], start: Start, say: Callable[[str], None]) -> None:
        """Begin with those whose package is installed; `say` shows a line, from any thread."""
        self.workers = []
        for name in dict.fromkeys(names):
            if name in sys.modules or importlib.util.find_spec(name) is not None:
                self.workers.append(_Worker(name, LOGGERS[name], start, say))
            else:
                say(f"--log-to {name}: not installed (pip install {name}); the run goes on without")

    def emit(self, record: Mapping[str, Any]) -> None:
        """Give a row to all; never waits, never raises.

        Args:
            record: `kind` (train, epoch, time), `step`, and figures; what is no number is left out.
        """
        kind, step = record["kind"], record["step"]
        figures = {
            f"{kind}/{name}": value
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        if figures:
            for worker in self.workers:
                worker.put(step, figures)

    def close(self) -> None:
        """Let all end, but wait no longer than `PATIENCE`; say what was lost."""
        end = time.monotonic() + PATIENCE
        for worker in self.workers:
            worker.ask_to_end(end)
        for worker in self.workers:
            worker.wait(end)


class _Worker:
    """One logger in its thread."""

    def __init__(
        self,
        name: str,
        opens: Callable[[Start], Opened],
        start: Start,
        say: Callable[[str], None],
    ) -> None:
        self.name, self.opens, self.start, self.say = name, opens, start, say
        self.rows: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(WAITING)
        self.given = self.taken = 0
        self.told = self.over = False
        self.thread = threading.Thread(target=self._work, name=f"log to {name}", daemon=True)
        self.thread.start()

    def put(self, step: int, figures: Mapping[str, float]) -> None:
        self.given += 1
        try:
            self.rows.put_nowait((step, figures))
        except queue.Full:
            pass  # `given` counts it, `taken` will not

    def ask_to_end(self, end: float) -> None:
        try:
            self.rows.put(None, timeout=max(end - time.monotonic(), 0.0))
        except queue.Full:
            self.over = True

    def wait(self, end: float) -> None:
        self.thread.join(max(end - time.monotonic(), 0.0))
        lost = self.given - self.taken
        if lost or self.thread.is_alive():
            slow = "" if not self.thread.is_alive() else f", and it has not ended in {PATIENCE:g} s"
            self.say(
                f"--log-to {self.name}: {lost:,} of {self.given:,} rows were lost{slow}; "
                f"{self.start.run} has them all"
            )

    def _work(self) -> None:
        # BaseException: some end the process when they have no key; it is this thread that ends.
        try:
            emit, close = self.opens(self.start)
        except BaseException as error:
            self._tell(error)
            while self.rows.get() is not None:
                pass
            return
        while (row := self.rows.get()) is not None and not self.over:
            try:
                emit(*row)
                self.taken += 1
            except BaseException as error:
                self._tell(error)
        try:
            close()
        except BaseException as error:
            self._tell(error)

    def _tell(self, error: BaseException) -> None:
        if not self.told:
            self.told = True
            why = (str(error) or repr(error)).splitlines()[0]
            self.say(f"--log-to {self.name}: {type(error).__name__}: {why}; the run goes on")
