"""What a run writes while it goes: its logs, its status, the progress line.

log.jsonl and summary.csv hold nothing that depends on time or machine: they are cut back to the
checkpoint on resume, and end with the same bytes whether or not the run was interrupted. Times go
to time.jsonl, which only grows.
"""

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from backmix.train.checkpoint import is_locked, sync_folder, write_atomically
from backmix.train.loggers import Loggers

STATES = ("running", "stopped", "finished", "failed")
SUMMARY_HEAD = "epoch,step,train_loss,train_top1,lr\n"
"""Named as timm names its columns: top1 in percent."""
BEAT = 60.0
"""Seconds between two renewals of a running run's status.json."""
SILENT = 900.0
"""Seconds without a written byte after which a running run may be stuck."""


def write_status(
    run: Path,
    state: Literal["running", "stopped", "finished", "failed"],
    step: int,
    why: str = "",
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Say in status.json how the run stands: a scheduler reads it, not the exit code.

    Args:
        run: run folder.
        state: how it stands.
        step: steps taken.
        why: what stopped it.
        facts: further figures: epoch (finished ones), epochs, steps (of the whole run),
            images_per_s.
    """
    document = {"state": state, "step": step, "why": why, **(facts or {})}
    document |= {"host": os.uname().nodename, "pid": os.getpid()}
    document["time"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_atomically(run / "status.json", (json.dumps(document) + "\n").encode())


class Beat:
    """Renews the status of a running run, about once a minute."""

    def __init__(self, run: Path) -> None:
        """Begin with a status that is due."""
        self.run = run
        self.last = -math.inf

    def beat(self, step: int, facts: Mapping[str, Any]) -> None:
        """Renew the status where it is time; a full disk is no matter."""
        if time.monotonic() - self.last >= BEAT:
            self.last = time.monotonic()
            with contextlib.suppress(OSError):
                write_status(self.run, "running", step, facts=facts)


def read_status(run: Path) -> dict[str, Any]:
    """Return how a run stands: state, step and why; ValueError where there is no readable status.

    A run that says "running" without a process holding its folder was killed: it is "stopped".
    Runs say more, as `write_status` writes it; `silent` are the seconds since a run that goes on
    wrote anything.
    """
    try:
        document = json.loads((run / "status.json").read_text())
        state, step, why = document["state"], document["step"], document["why"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{run} is no run folder: it has no status.json") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{run}/status.json cannot be read: {error!r}") from error
    if state not in STATES or type(step) is not int or type(why) is not str:
        raise ValueError(f"{run}/status.json holds no status of a run: {document}")
    if state == "running" and not is_locked(run):
        return {**document, "state": "stopped", "why": "killed; the same command continues"}
    if state == "running":
        written = [path for name in _WRITTEN if (path := run / name).exists()]
        last = max((path.stat().st_mtime for path in written), default=time.time())
        return {**document, "silent": max(0.0, time.time() - last)}
    return document


_WRITTEN = ("status.json", "log.jsonl", "time.jsonl", "checkpoints")


def status_line(status: Mapping[str, Any]) -> str:
    """Return what `read_status` found as a line for people."""
    parts = [f"{status['state']} at step {status['step']:,}"]
    if "steps" in status:
        parts[0] += f" of {status['steps']:,}"
    if "epochs" in status:
        parts.append(f"epoch {status['epoch']} of {status['epochs']} done")
    if status["state"] == "running":
        if "images_per_s" in status:
            parts.append(f"{status['images_per_s']:,.0f} img/s")
        if "pid" in status:
            parts.append(f"process {status['pid']} on {status['host']}")
        if "silent" in status:
            parts.append(f"wrote {status['silent']:,.0f} s ago")
    line = ", ".join(parts)
    if status["why"]:
        line += f": {status['why']}"
    if status.get("silent", 0) > SILENT:
        line += (
            "\nnothing was written for a quarter of an hour: unless its steps between two log rows "
            "take that long, it is stuck; stop it with SIGKILL, and the same command continues"
        )
    return line


class GrowingFile:
    """A file that rows are appended to; a full disk keeps them in memory until there is room.

    A row that could be written in part only is cut off again, so the file always holds whole rows.
    If somebody removes it meanwhile, it is put back: a checkpoint counts its bytes.
    """

    def __init__(self, path: Path, length: int | None, head: str = "") -> None:
        """Open at `length`, cutting off what follows; None = begin anew with `head`."""
        if length is not None:
            there = path.stat().st_size if path.exists() else -1
            if there < length:
                wrong = f"has {there:,} bytes" if there >= 0 else "is not there"
                raise ValueError(
                    f"{path} {wrong}, but the checkpoint counts {length:,}: put it back, or remove "
                    f"{path.parent / 'checkpoints'} to begin anew"
                )
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.length = length or 0
        self.waiting = b"" if length is not None else head.encode()
        os.ftruncate(self.descriptor, self.length)

    def append(self, row: str) -> None:
        """Add a row; it reaches the file now if it can, or with a later one."""
        self.waiting += row.encode()
        with contextlib.suppress(OSError):
            self.write()

    def write(self) -> int:
        """Write what waits and return the file's length in bytes.

        Raises OSError naming the file where that fails, and nothing is lost.
        """
        try:
            self._put_back()
            written = os.pwrite(self.descriptor, self.waiting, self.length)
            if written < len(self.waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self.descriptor, self.length)
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error
        self.length += written
        self.waiting = b""
        return self.length

    def _put_back(self) -> None:
        if os.fstat(self.descriptor).st_nlink:
            return
        rows = os.pread(self.descriptor, self.length, 0)
        new = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            if os.pwrite(new, rows, 0) < len(rows):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.close(new)
            raise
        # The number stays: a thread may be waiting for the disk with it.
        os.dup2(new, self.descriptor)
        os.close(new)
        sync_folder(self.path.parent)

    def sync(self) -> None:
        """Wait until what is written is on the disk; for a thread beside the one that appends."""
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


class Log:
    """The growing files of one run. Rows reach the disk before the checkpoint that counts them."""

    def __init__(
        self,
        run: Path,
        lengths: dict[str, int] | None,
        loggers: Loggers | None = None,
    ) -> None:
        """Open for a fresh run (`lengths` None), or cut back to a checkpoint's lengths.

        `loggers` get every row, too.
        """

        def length(name: str) -> int | None:
            return None if lengths is None else lengths[name]

        self.rows = GrowingFile(run / "log.jsonl", length("log.jsonl"))
        self.summary = GrowingFile(run / "summary.csv", length("summary.csv"), SUMMARY_HEAD)
        times = run / "time.jsonl"
        self.times = GrowingFile(times, times.stat().st_size if times.exists() else None)
        self.began = time.perf_counter()
        self.loggers = loggers

    def row(self, record: dict[str, Any]) -> None:
        """Append a row to log.jsonl; values are plain numbers."""
        self.rows.append(json.dumps(record) + "\n")
        self._emit("train", record)

    def epoch(self, epoch: int, step: int, loss: float, accuracy: float, lr: float) -> None:
        """Append a row to summary.csv; the epoch is counted from 1, `accuracy` a share."""
        values = (f"{loss:.6g}", f"{100 * accuracy:.6g}", f"{lr:.6g}")
        self.summary.append(",".join((str(epoch), str(step), *values)) + "\n")
        figures = {"train_loss": loss, "train_top1": 100 * accuracy, "lr": lr}
        self._emit("epoch", {"step": step, "epoch": epoch, **figures})

    def time(self, record: dict[str, Any]) -> None:
        """Append a row to time.jsonl, with the seconds since this process began."""
        seconds = round(time.perf_counter() - self.began, 3)
        self.times.append(json.dumps({"seconds": seconds, **record}) + "\n")
        self._emit("time", record)

    def _emit(self, kind: str, record: dict[str, Any]) -> None:
        if self.loggers is not None:
            self.loggers.emit({"kind": kind, **record})

    def written(self) -> dict[str, int]:
        """Write all rows and return the lengths that a checkpoint of this moment must remember."""
        return {"log.jsonl": self.rows.write(), "summary.csv": self.summary.write()}

    def sync(self) -> None:
        """Wait until all rows that are written are on the disk."""
        self.rows.sync()
        self.summary.sync()

    def close(self) -> None:
        """Close all files, and let the loggers end."""
        for file in (self.rows, self.summary, self.times):
            file.close()
        if self.loggers is not None:
            self.loggers.close()


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
