"""What a run writes while it goes: its logs, its status, the progress line.

log.jsonl and summary.csv hold nothing that depends on time or machine: they are cut back to the
checkpoint on resume, and end with the same bytes whether or not the run was interrupted. Times go
to time.jsonl, which only grows.
"""

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

from backmix.train.checkpoint import is_locked, write_atomically

STATES = ("running", "stopped", "finished", "failed")
SUMMARY_HEAD = "epoch,step,loss,accuracy\n"


def write_status(
    run: Path, state: Literal["running", "stopped", "finished", "failed"], step: int, why: str = ""
) -> None:
    """Say in status.json how the run stands: a scheduler reads it, not the exit code."""
    document = {"state": state, "step": step, "why": why}
    write_atomically(run / "status.json", (json.dumps(document) + "\n").encode())


def read_status(run: Path) -> dict[str, Any]:
    """Return how a run stands: state, step and why; ValueError where there is no readable status.

    A run that says "running" without a process holding its folder was killed: it is "stopped".
    """
    try:
        document = json.loads((run / "status.json").read_text())
        state, step, why = document["state"], document["step"], document["why"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{run} is no run folder: it has no status.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run}/status.json cannot be read: {error!r}") from error
    if state not in STATES or type(step) is not int or type(why) is not str:
        raise ValueError(f"{run}/status.json holds no status of a run: {document}")
    if state == "running" and not is_locked(run):
        return {"state": "stopped", "step": step, "why": "killed; the same command continues"}
    return {"state": state, "step": step, "why": why}


class GrowingFile:
    """A file that rows are appended to; a full disk keeps them in memory until there is room.

    A row that could be written in part only is cut off again, so the file always holds whole rows.
    """

    def __init__(self, path: Path, length: int | None, head: str = "") -> None:
        """Open at `length`, cutting off what follows; None = begin anew with `head`."""
        if length is not None and (not path.exists() or path.stat().st_size < length):
            raise ValueError(f"{path} is shorter than its checkpoint says ({length} bytes)")
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self.length = length or 0
        self.waiting = b"" if length is not None else head.encode()
        os.ftruncate(self.descriptor, self.length)

    def append(self, row: str) -> None:
        """Add a row; it reaches the file now if it can, or with a later one."""
        self.waiting += row.encode()
        with contextlib.suppress(OSError):
            self.write()

    def write(self) -> None:
        """Write what waits; OSError naming the file where that fails, and nothing is lost."""
        try:
            written = os.pwrite(self.descriptor, self.waiting, self.length)
            if written < len(self.waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self.descriptor, self.length)
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error
        self.length += written
        self.waiting = b""

    def make_durable(self) -> int:
        """Write what waits through to the disk; returns the file's length in bytes."""
        self.write()
        os.fsync(self.descriptor)
        return self.length

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


class Log:
    """The growing files of one run. Rows reach the disk before the checkpoint that counts them."""

    def __init__(self, run: Path, lengths: dict[str, int] | None) -> None:
        """Open for a fresh run (`lengths` None), or cut back to a checkpoint's lengths."""

        def length(name: str) -> int | None:
            return None if lengths is None else lengths[name]

        self.rows = GrowingFile(run / "log.jsonl", length("log.jsonl"))
        self.summary = GrowingFile(run / "summary.csv", length("summary.csv"), SUMMARY_HEAD)
        times = run / "time.jsonl"
        self.times = GrowingFile(times, times.stat().st_size if times.exists() else None)
        self.began = time.perf_counter()

    def row(self, record: dict[str, Any]) -> None:
        """Append a row to log.jsonl; values are plain numbers."""
        self.rows.append(json.dumps(record) + "\n")

    def epoch(self, epoch: int, step: int, loss: float, accuracy: float) -> None:
        """Append a row to summary.csv; the epoch is counted from 1."""
        self.summary.append(f"{epoch},{step},{loss:.6g},{accuracy:.6g}\n")

    def time(self, record: dict[str, Any]) -> None:
        """Append a row to time.jsonl, with the seconds since this process began."""
        seconds = round(time.perf_counter() - self.began, 3)
        self.times.append(json.dumps({"seconds": seconds, **record}) + "\n")

    def lengths(self) -> dict[str, int]:
        """Make all rows durable and return the lengths that a checkpoint must remember."""
        return {
            "log.jsonl": self.rows.make_durable(),
            "summary.csv": self.summary.make_durable(),
        }

    def close(self) -> None:
        """Close all files."""
        for file in (self.rows, self.summary, self.times):
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
