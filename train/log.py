"""What a run writes while it goes: its logs, its status, the progress line.

log.jsonl and summary.csv hold nothing that depends on time or machine: they are cut back to the
checkpoint on resume, and end with the same bytes whether or not the run was interrupted. Times go
to time.jsonl, which only grows.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

from backmix.train.checkpoint import write_atomically

SUMMARY_HEAD = "epoch,step,loss,accuracy\n"


def write_status(
    run: Path, state: Literal["running", "stopped", "finished", "failed"], step: int, why: str = ""
) -> None:
    """Say in status.json how the run stands: a scheduler reads it, not the exit code."""
    document = {"state": state, "step": step, "why": why}
    write_atomically(run / "status.json", (json.dumps(document) + "\n").encode())


def read_status(run: Path) -> dict[str, Any]:
    """Return status.json of a run folder; ValueError where there is none."""
    try:
        document = json.loads((run / "status.json").read_text())
        return {"state": str(document["state"]), "step": int(document["step"]), **document}
    except FileNotFoundError:
        raise ValueError(f"{run} is no run folder: it has no status.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run}/status.json cannot be read: {error}") from error


def _cut(path: Path, length: int) -> None:
    """Cut a file back to a length that it had; rows after it are written again."""
    if not path.exists() or path.stat().st_size < length:
        raise ValueError(f"{path} is shorter than its checkpoint says ({length} bytes)")
    os.truncate(path, length)


class Log:
    """The growing files of one run. Rows reach the disk before the checkpoint that counts them."""

    def __init__(self, run: Path, lengths: dict[str, int] | None) -> None:
        """Open for a fresh run (`lengths` None), or cut back to a checkpoint's lengths."""
        self.run = run
        names = ("log.jsonl", "summary.csv")
        for name in names:
            if lengths is None:
                (run / name).write_text("" if name == "log.jsonl" else SUMMARY_HEAD)
            else:
                _cut(run / name, lengths[name])
        self.files = {name: open(run / name, "a") for name in (*names, "time.jsonl")}
        self.began = time.perf_counter()

    def row(self, record: dict[str, Any]) -> None:
        """Append a row to log.jsonl; values are plain numbers."""
        self.files["log.jsonl"].write(json.dumps(record) + "\n")

    def epoch(self, epoch: int, step: int, loss: float, accuracy: float) -> None:
        """Append a row to summary.csv; the epoch is counted from 1."""
        self.files["summary.csv"].write(f"{epoch},{step},{loss:.6g},{accuracy:.6g}\n")

    def time(self, record: dict[str, Any]) -> None:
        """Append a row to time.jsonl, with the seconds since this process began."""
        seconds = round(time.perf_counter() - self.began, 3)
        self.files["time.jsonl"].write(json.dumps({"seconds": seconds, **record}) + "\n")
        self.files["time.jsonl"].flush()

    def lengths(self) -> dict[str, int]:
        """Make all rows durable and return the lengths that a checkpoint must remember."""
        result = {}
        for name in ("log.jsonl", "summary.csv"):
            file = self.files[name]
            file.flush()
            os.fsync(file.fileno())
            result[name] = file.tell()
        return result

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()


class Progress:
    """One line that is rewritten on a terminal, a plain line now and then elsewhere."""

    def __init__(self, quiet: bool, seconds: float = 10.0) -> None:
        """Say nothing where `quiet`; elsewhere than a terminal a line every `seconds`."""
        self.quiet = quiet
        self.terminal = sys.stderr.isatty()
        self.seconds = 0.5 if self.terminal else seconds
        self.last = 0.0

    def show(self, text: str, *, final: bool = False) -> None:
        """Show the current state; `final` lines are always shown and stay."""
        now = time.monotonic()
        if self.quiet or not (final or now - self.last >= self.seconds):
            return
        self.last = now
        if self.terminal:
            print(f"\r\x1b[K{text}", end="\n" if final else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
