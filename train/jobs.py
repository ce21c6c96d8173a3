"""Commands of `backmix` side by side, each in a process of its own: the demo's and the table's."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from backmix.train.log import read_status

_COMMAND = f"""\
import ctypes, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})  # PR_SET_PDEATHSIG
from backmix.train.cli import main
main()
"""
"""Program of a command's process: `backmix`, which gets SIGTERM when its parent dies, even killed.

It asks for that itself: between fork and exec, in a process with threads, Python code is not safe.
"""

Say = Callable[[str], None]


@dataclass
class Job:
    """Commands to be run one after the other."""

    name: str
    commands: deque[list[str]]
    log: Path
    began: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)


def run_jobs(
    waiting: Sequence[Job],
    workers: int,
    say: Say,
    *,
    keep_going: bool = False,
    watch: Callable[[Sequence[Job]], None] = lambda running: None,
) -> dict[str, str]:
    """Run jobs side by side, each of its commands in a process of its own.

    No process outlives this one: on Linux they are stopped with it even where it is killed, except
    in the instant before their program begins.

    Args:
        waiting: what is to be done, in this order.
        workers: jobs at a time.
        say: takes a line when a job ends.
        keep_going: go on with the others where a job fails; its message is said and returned.
        watch: called every tenth of a second with the jobs that run.

    Returns the messages of the jobs that failed, by name; without `keep_going` there are none.

    Raises:
        ValueError: a command failed. The others are stopped; they write a checkpoint first, so
            nothing is lost.
    """
    queue, running = deque(waiting), []
    failed: dict[str, str] = {}
    done = 0
    # SIGTERM as Ctrl-C: a run left behind would go on, and hold its folder's lock.
    on_terminate = None
    if threading.current_thread() is threading.main_thread():
        on_terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while queue or running:
            while queue and len(running) < workers:
                running.append(_start(queue.popleft()))
            time.sleep(0.1)
            watch(running)
            for job in list(running):
                try:
                    if not _has_ended(job):
                        continue
                    end = f"done in {time.monotonic() - job.began:.0f} s"
                except ValueError as error:
                    if not keep_going:
                        raise
                    failed[job.name] = str(error)
                    end = f"FAILED: {str(error).removeprefix(f'{job.name}: ')}"
                running.remove(job)
                done += 1
                say(f"    {done}/{len(waiting)} {job.name}: {end}")
    finally:
        for job in running:
            if job.process and job.process.poll() is None:
                job.process.terminate()
        for job in running:
            if job.process:
                job.process.wait()
        if on_terminate is not None:
            signal.signal(signal.SIGTERM, on_terminate)
    return failed


def finished(run: Path) -> bool:
    """Return whether the training run of a folder has reached its end."""
    return (run / "status.json").exists() and read_status(run)["state"] == "finished"


def _start(job: Job) -> Job:
    job.began = job.began or time.monotonic()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        job.process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *job.commands[0]],
            stdout=log,
            stderr=subprocess.STDOUT,
            # Threads that wait for each other would spin on a core that another run needs.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return job


def _has_ended(job: Job) -> bool:
    """Look after a running job: start its next command; ValueError where one has failed."""
    assert job.process is not None
    code = job.process.poll()
    if code is None:
        return False
    if code != 0:
        lines = job.log.read_text(errors="replace").splitlines()
        said = [line for line in lines if any(letter.isalnum() for letter in line)]
        raise ValueError(
            f"{job.name}: `backmix {' '.join(job.commands[0])}` ended with code {code}: "
            f"{said[-1] if said else 'it said nothing'} (all of it in {job.log})"
        )
    job.commands.popleft()
    if not job.commands:
        return True
    _start(job)
    return False
