"""`--loader.loader fastest`: time the loaders that are installed on the data, and take the fastest.

Each is timed in a process of its own, so that nothing that ffcv or DALI set or keep stays with the
training run, and a crash of theirs costs no more than a line. Pixels differ a little from loader to
loader (`docs/loaders.md`): the choice is part of a run, which remembers it (`train/run.py`).
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import backmix
from backmix.pipeline.batch import Place
from backmix.pipeline.beton import BetonSet
from backmix.pipeline.interrupt import interrupted_by
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.subset import Subset

Candidate = Literal["turbo", "ffcv", "dali"]

SAMPLES = 8192
"""Samples that are read over and over, spread over the data."""
SECONDS = 3.0
"""How long each loader is timed, once it runs."""
PATIENCE = 120.0
"""Seconds after which a loader is given up: ffcv compiles, DALI starts a GPU."""
PROGRAM = f"""\
import ctypes, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)})  # PR_SET_PDEATHSIG
from backmix.pipeline.fastest import main
main()
"""
"""Of a loader's process, which ends when this one does, even if it is killed. It asks for that
itself: between fork and exec, in a process with threads, Python code is not safe."""
CLEAR = 1.05
"""How many times the rate of `turbo`, whose pixels are the stated ones, another must have: less is
what two timings of the same loader differ by."""


def fastest(
    data: BetonSet,
    options: LoaderOptions,
    subset: Subset,
    device: torch.device,
    say: Callable[[str], None],
) -> Candidate:
    """Return the loader that delivers the training batches of a subset fastest on this machine.

    Args:
        data: the data set, open.
        options: how batches are made; the views are timed at their full size.
        subset: the samples that a run will use.
        device: where the batches go.
        say: called with a line for each loader's rate, and one for the choice.

    Raises KeyboardInterrupt at SIGINT or SIGTERM, to this process, whatever it does with them
    otherwise, or to a loader's: a choice among the others would be none.
    """
    rates = {}
    installed = _installed()
    if len(installed) > 1:
        some = subset.index[np.linspace(0, len(subset) - 1, min(SAMPLES, len(subset))).astype(int)]
        # Nothing of a run is there yet that would have to be saved first.
        with interrupted_by(signal.SIGINT, signal.SIGTERM):
            _fetch(data, some)
            for candidate in installed:
                rate = _rate(data.paths, options, candidate, some, device)
                if isinstance(rate, str):
                    say(f"{candidate}: not timed: {rate}")
                else:
                    say(f"{candidate}: {rate:,.0f} images per second")
                    rates[candidate] = rate
    chosen = pick(rates)
    say(f"fastest: taking {chosen}" + ("" if len(installed) > 1 else ", no other is installed"))
    return chosen


def pick(rates: dict[Candidate, float]) -> Candidate:
    """Return the fastest by its rate; turbo where no other is clearly faster."""
    others: list[Candidate] = ["ffcv", "dali"]
    best = max(others, key=lambda candidate: rates.get(candidate, 0))
    return best if rates.get(best, 0) > CLEAR * rates.get("turbo", 0) else "turbo"


def _installed() -> list[Candidate]:
    """Return the loaders that can be tried."""
    found: list[Candidate] = ["turbo"]
    if find_spec("ffcv"):
        found.append("ffcv")
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        found.append("dali")
    return found


def _fetch(data: BetonSet, index: np.ndarray) -> None:
    """Read samples for as long as a loader is timed, so that the first one finds them in memory."""
    end = time.perf_counter() + SECONDS
    for sample in index.tolist():
        np.bitwise_xor.reduce(data.region(sample, verify=False)[::4096])
        if time.perf_counter() > end:
            return


def _rate(
    paths: Sequence[Path],
    options: LoaderOptions,
    candidate: Candidate,
    index: np.ndarray,
    device: torch.device,
) -> float | str:
    """Return a loader's images per second, measured in a process of its own, or what hinders it."""
    request = {
        "paths": [str(path) for path in paths],
        "options": dataclasses.asdict(
            dataclasses.replace(
                options, loader=candidate, max_bad=1.0, on_bad="replace", grow_from=0, grow=(0, 0)
            )
        ),
        "index": index.tolist(),
        "device": str(device),
        "seconds": SECONDS,
    }
    home = str(Path(backmix.__file__).parents[1])
    search = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(  # an interruption kills it
            [sys.executable, "-P", "-c", PROGRAM],
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=PATIENCE,
            env=os.environ | {"PYTHONPATH": search},
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer in {PATIENCE:.0f} s"
    if -done.returncode in (signal.SIGINT, signal.SIGTERM):  # as a terminal sends to all
        raise KeyboardInterrupt("interrupted while the loaders were timed")
    try:
        answer = json.loads(done.stdout)
        return answer["error"] if "error" in answer else float(answer["rate"])
    except (ValueError, KeyError, TypeError):
        return f"its process ended with code {done.returncode}"


# --- in the process of a loader -------------------------------------------------------------------


def measure(request: dict[str, Any]) -> float:
    """Return images per second of the loader that a request describes."""
    from backmix.pipeline.loader import open_loader  # which imports this module

    index = np.array(request["index"], np.int64)
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in request["options"].items()
    }
    chosen = LoaderOptions(**options)
    device = torch.device(request["device"])
    subset = Subset(index, np.zeros(len(index), np.int64))
    taken, images, epoch, start, now = 0, 0, 0, 0.0, 0.0
    with open_loader(request["paths"], chosen, subset=subset, device=device) as loader:
        # The clock starts when what was read ahead meanwhile is as much as there will be at its
        # end.
        while not start or now - start < request["seconds"]:
            for batch in loader.batches(Place(0, epoch)):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                taken, now = taken + 1, time.perf_counter()
                if start:
                    images += len(batch)
                    if now - start >= request["seconds"]:
                        break
                elif taken > chosen.prefetch + 2:
                    start = now
            epoch += 1
    return images / (now - start)


def main() -> None:
    """Answer the request on stdin, with one line of JSON on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what native code prints is no answer
    try:
        answer: dict[str, Any] = {"rate": measure(json.load(sys.stdin))}
    except (ValueError, OSError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), file=out, flush=True)
