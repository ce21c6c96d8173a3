"""Open-set runs on small images: steps as the loop takes them, recorded, and several runs at once.

    python -m bench.stage_osr --out FOLDER [--method NAME ...] [--skip-done] [--repeat N]
        [--dry-run] [--tiny]

Run from the repository's root with PYTHONPATH=src:. there; `gpu.py` runs it as its stage `osr`.

classifier32, 30,000 images of 32 pixels made up of random bytes, batch 64: the recipes of CIFAR-10
as they are, through `train.run.prepare_run` and the real loops, without logs and checkpoints. Forms
of a method take turns of some hundred steps each. `graph` is `--graph`; `graph x 4` are four such
runs in one process, each on a stream of its own. Without `--method` each method has a process of
its own: one whose steps cannot be recorded spoils its process for all others. `--tiny` is for
tests.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from backmix.pipeline.writer import Record, Writer, page_size_for
from backmix.train.bench_step import timed as in_seconds
from backmix.train.bench_step import turns
from backmix.train.loop import Step, steps
from backmix.train.prepare import prepare_run
from backmix.train.recipes import parse_run
from backmix.train.recorded import WARM_UP, recorded_steps
from bench import rows

STAGE = "osr"
METHODS = ("softmax", "cutout", "backmix", "ssod", "arpl")
SIDE, CLASSES, EPOCHS = 32, 6, 100
START_S = 12.0
"""Seconds that a process needs about before it can measure, on a GPU."""


@dataclass(frozen=True)
class Setting:
    """What is trained, and how long it is timed."""

    samples: int
    rounds: int
    steps: int
    """Of each run in a turn."""
    model: str
    together: tuple[int, ...]
    """Runs at a time, by softmax alone."""


FULL = Setting(samples=30_000, rounds=12, steps=200, model="classifier32", together=(2, 4, 8))
TINY = Setting(samples=128, rounds=2, steps=1, model="classifier32-quarter", together=(2,))


def write_images(path: Path, samples: int) -> None:
    """Write random images as a .beton file."""
    pixels = np.random.default_rng(0).integers(0, 256, (samples, SIDE, SIDE, 3), dtype=np.uint8)
    names = [str(label) for label in range(CLASSES)]
    with Writer(
        path,
        samples=samples,
        page_size=page_size_for(pixels[0].nbytes),
        classes=names,
        options={},
    ) as writer:
        for number, image in enumerate(pixels):
            label = number % CLASSES
            writer.append(Record(image.tobytes(), 1, SIDE, SIDE, label, 0, f"{number}.png"))


def forms(setting: Setting, method: str) -> dict[str, tuple[bool, int]]:
    """Return the forms of a method by name: whether steps are recorded, and runs at a time."""
    together = setting.together if method == "softmax" else ()
    return {"loop": (False, 1), "graph": (True, 1)} | {f"graph x {n}": (True, n) for n in together}


class Going:
    """Some runs that take steps in turns, each on a stream of its own.

    Up to torch 2.11 at least all recorded steps of a process read seed and offset of dropout from
    the same two numbers on the device, which each replay writes first: of runs beside each other
    one may drop what another was to drop. That moves no time, but no run should be trained so.
    """

    def __init__(
        self, data: Path, setting: Setting, method: str, graph: bool, count: int, files: ExitStack
    ) -> None:
        """Prepare runs that differ by their seed."""
        self.runs: list[tuple[Callable[[], AbstractContextManager[object]], Iterator[Step]]] = []
        self.states = []
        self.streams: list[torch.cuda.Stream] = []
        self.precision = ""
        for seed in range(count):
            words = ["--data", str(data), "--out", "none", "--seed", str(seed)]
            words += ["--split.protocol", "None", "--model", setting.model, "--threads", "1"]
            words += ["--loader.loader", "resident", *(["--graph"] if graph else [])]
            run = parse_run(f"cifar10-{method}", words)
            config, state, loader = prepare_run(run, "bench", ["bench"])
            files.enter_context(loader)
            device = config.resolved.device
            autocast = torch.autocast(
                device, torch.bfloat16, enabled=config.resolved.precision == "bf16"
            )
            within: Callable[[], AbstractContextManager[object]] = nullcontext
            if device == "cuda":
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                within = partial(torch.cuda.stream, stream)
                self.streams.append(stream)
            going = (recorded_steps if graph else steps)(state, loader, run, autocast)
            self.runs.append((within, going))
            self.states.append(state)
            self.precision = config.resolved.precision

    def take(self, count: int) -> None:
        """Take so many steps of every run, one of each at a time.

        The current stream waits for them: an event recorded there afterwards is past when they are.
        """
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream())
        for _ in range(count):
            for within, going in self.runs:
                with within():
                    next(going)
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)


def measure(
    setting: Setting, method: str, device: torch.device, file: rows.Rows, seconds: float
) -> None:
    """Time all forms of a method and write a row for each."""
    start = time.perf_counter()
    asked = forms(setting, method)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
        data = Path(folder) / "images.beton"
        write_images(data, setting.samples)
        made = {}
        for name, (graph, count) in asked.items():
            made[name] = Going(data, setting, method, graph, count, files)
            made[name].take(WARM_UP + 2)  # compiles, allocates, records
        ready = time.perf_counter() - start

        def turn(going: Going) -> float:
            _, spent = in_seconds(partial(going.take, setting.steps), device)
            return 1e3 * spent / setting.steps / len(going.runs)

        times = turns(
            {name: partial(turn, going) for name, going in made.items()},
            setting.rounds,
            start + seconds,
        )
    for name, ms in times.items():
        _, count = asked[name]
        figures = rows.Times(ms)
        void = sum(int(state.void_steps) for state in made[name].states)
        batch = 64
        per_run = EPOCHS * -(-30_000 // batch) * figures.median / 1e3
        row = file.write(
            case=f"{setting.model}, {method}",
            kernel="step",
            form=name,
            shape={"B": batch, "H": SIDE, "W": SIDE, "K": CLASSES, "P": setting.samples},
            dtype="bfloat16" if made[name].precision == "bf16" else "float32",
            memory_format="channels_last",
            config={
                "rounds": len(ms),
                "steps_per_turn": setting.steps,
                "runs_at_a_time": count,
                "images_per_s": batch / figures.median * 1e3,
                "seconds_per_100_epochs": per_run,
                "warm_up_seconds": round(ready, 1),
            },
            checked=void == 0,
            note="ms of a step of one run, all runs of a form together; checked: no void step",
            **figures.row,
        )
        print(
            f"osr {row['case']:24} {row['form']:10} {figures.median:8.3f} ms a step "
            f"{per_run:7.1f} s a run ({row['device']})",
            flush=True,
        )
    first = [statistics.median(ms[: len(ms) // 2]) for ms in times.values()]
    last = [statistics.median(ms[len(ms) // 2 :]) for ms in times.values()]
    file.finish(unsteady=max(abs(a / b - 1) for a, b in zip(first, last, strict=True)) > 0.05)


def main() -> int:
    """Time the steps; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help=f"a folder; the rows go into {STAGE}.jsonl")
    parser.add_argument("--method", choices=METHODS, action="append", help="only; may repeat")
    parser.add_argument("--skip-done", action="store_true")
    parser.add_argument("--repeat", type=int, default=1, help="passes over the stage")
    parser.add_argument("--seconds", type=float, default=230, help="no new round after these")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="few images, on a CPU too, for tests")
    options = parser.parse_args()
    setting = TINY if options.tiny else FULL
    if options.dry_run:
        for method in options.method or METHODS:
            print(f"  {method}: {', '.join(forms(setting, method))}")
        print(f"  {setting}; its kernels are those of mix_cifar and bank")
        return 0
    if options.out is None:
        parser.error("--out is needed")
    if not (options.tiny or torch.cuda.is_available()):
        print("no CUDA device here: try --dry-run, or --tiny")
        return 1
    if not options.method:
        return each_alone(sys.argv[1:], options.seconds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = options.seconds / (options.repeat * len(options.method))
    for repeat in range(options.repeat):
        for method in options.method:
            file = rows.Rows(
                options.out / f"{STAGE}.jsonl",
                {"bench": "step", "stage": STAGE, **rows.machine(device)},
                skip_done=options.skip_done,
                repeat=repeat,
            )
            case = f"{setting.model}, {method}"
            if all(file.done(case=case, form=form) for form in forms(setting, method)):
                print(f"{case}: done already")
            else:
                measure(setting, method, device, file, seconds)
    return 0


def each_alone(words: list[str], seconds: float) -> int:
    """Measure every method in a process of its own; 1 if one failed.

    Args:
        words: of the command line, without a method.
        seconds: for all of them.
    """
    end = time.perf_counter() + seconds
    failed = []
    for number, method in enumerate(METHODS):
        share = (end - time.perf_counter()) / (len(METHODS) - number) - START_S
        own = ["--method", method, "--seconds", str(max(share, 0.0))]
        command = [sys.executable, "-m", "bench.stage_osr", *words, *own]
        code = subprocess.run(command, check=False).returncode
        if code:
            print(f"osr {method}: FAILED ({code})", flush=True)
            failed.append(method)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
