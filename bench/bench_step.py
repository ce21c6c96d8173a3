"""One training step of ResNet-50: softmax, BackMix fast, BackMix faithful, in turns.

    python -m bench.bench_step --out FOLDER [--skip-done] [--repeat N] [--dry-run] [--tiny]

Run from the repository's root with PYTHONPATH=src:. there; `gpu.py` runs it as its last stage.

The loop's own `take_step` on the real network and methods; only the images are made up: batches of
random bytes that lie on the device, so that no loader is timed. Host draws, copies, meters and the
optimizer are all in a step. The question is what BackMix adds, so the methods take turns of a few
steps each, A B C A B C, and each round gives one difference. `--tiny` is for tests.
"""

import argparse
import itertools
import statistics
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.subset import Subset
from backmix.train.bench_step import Training, synthetic, turns
from backmix.train.bench_step import timed as in_seconds
from backmix.train.methods.backmix import BackMixMethod
from backmix.train.methods.method import Method
from backmix.train.methods.softmax import SoftmaxMethod
from backmix.train.models.build import Model
from backmix.train.options import BackMix, Run
from backmix.train.prepare import first_state, fresh_network
from backmix.train.recipes import imagenet_rn50
from bench import rows

STAGE = "step_resnet50"
FORMS = ("softmax", "backmix_mix", "backmix_raw")


@dataclass(frozen=True)
class Setting:
    """What is trained, and how long it is timed."""

    images: int
    """Per batch."""
    side: int
    """Of an image [pixels]."""
    classes: int
    samples: int
    """Of the training set: rows of the bank."""
    rounds: int
    steps: int
    """Per turn."""
    compile: bool


FULL = Setting(
    images=256, side=224, classes=1000, samples=1_281_167, rounds=20, steps=8, compile=True
)
TINY = Setting(images=4, side=64, classes=10, samples=40, rounds=2, steps=1, compile=False)


def case_name(setting: Setting) -> str:
    """Return the case's name."""
    return f"ResNet-50, {setting.images} x {setting.side} px"


def methods(
    run: Run, setting: Setting, model: Model, device: torch.device, views: torch.dtype
) -> dict[str, Method]:
    """Return the methods by the name of their form."""

    def backmix(options: BackMix) -> BackMixMethod:
        grid = model.grid(setting.side)
        return BackMixMethod(
            options=options,
            host=SoftmaxMethod(run.augment, run.optim.label_smoothing, views),
            augment=run.augment,
            bank=torch.rand(setting.samples, *grid, device=device).half(),
            truth=None,
            row_of=torch.arange(setting.samples, device=device),
            label_of=np.zeros(setting.samples, np.int64),
            views=views,
        )

    options = BackMix(patch=setting.side // 2)
    made = (
        SoftmaxMethod(run.augment, run.optim.label_smoothing, views),
        backmix(replace(options, cam_source="mix")),
        backmix(replace(options, cam_source="raw")),
    )
    return dict(zip(FORMS, made, strict=True))


def trainings(
    setting: Setting, device: torch.device, autocast: AbstractContextManager, views: torch.dtype
) -> dict[str, Training]:
    """Return the trainings by form. All share one network, whose values cost no time."""
    loader = LoaderOptions(batch=setting.images, size=setting.side)
    run = replace(imagenet_rn50(16), data=(), out=Path(), loader=loader, blurpool=False)
    model, optimizer = fresh_network(run, setting.classes, device)
    if setting.compile:
        model.compile()  # in place: `model.head` and the rest stay what they are
    numbers = np.arange(setting.samples)
    labels = np.random.default_rng(1).integers(0, setting.classes, setting.samples)
    n = setting.images
    batches = synthetic(Subset(numbers, labels), setting.side, n, n, device)

    def training(method: Method) -> Training:
        state = first_state(model, optimizer, method, batches[0].place, device)
        return Training(state, run, itertools.cycle(batches), autocast)

    made = methods(run, setting, model, device, views)
    return {form: training(method) for form, method in made.items()}


def timed(
    forms: dict[str, Training], setting: Setting, device: torch.device, end: float
) -> dict[str, list[float]]:
    """Return by form the ms of a step, one value per round; no new round begins after `end`."""

    def turn(training: Training) -> float:
        _, seconds = in_seconds(partial(training.take, setting.steps), device)
        return 1e3 * seconds / setting.steps

    return turns(
        {form: partial(turn, training) for form, training in forms.items()}, setting.rounds, end
    )


def added(times: dict[str, list[float]], form: str) -> dict[str, float]:
    """Return what a form adds to the first one: medians over the rounds of the differences."""
    base = next(iter(times.values()))
    differences = [a - b for a, b in zip(times[form], base, strict=True)]
    low, median, high = np.percentile(differences, (20, 50, 80)).tolist()
    return {
        "added_ms_p20": low,
        "added_ms_p50": median,
        "added_ms_p80": high,
        "added_percent": 100 * median / statistics.median(base),
    }


def measure(setting: Setting, device: torch.device, file: rows.Rows, seconds: float) -> None:
    """Time all forms and write a row for each."""
    start = time.perf_counter()
    clock = rows.clock(device)
    bf16 = device.type == "cuda"
    views = torch.bfloat16 if bf16 else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    torch.backends.cudnn.benchmark = True
    forms = trainings(setting, device, autocast, views)
    peaks: dict[str, float | None] = {}
    for form, training in forms.items():
        training.take(3 if setting.compile else 1)  # compiles, allocates, chooses algorithms
        peaks[form] = clock.peak_mib(partial(training.take, 1))
    ready = time.perf_counter() - start

    times = timed(forms, setting, device, start + seconds)
    for training in forms.values():
        training.refuse_void_steps()
    side = setting.side
    for form, ms in times.items():
        figures = rows.Times(ms)
        more = added(times, form)
        config: dict[str, Any] = {
            "rounds": len(ms),
            "steps_per_turn": setting.steps,
            "compiled": setting.compile,
            "cudnn_benchmark": True,
            "warm_up_seconds": round(ready, 1),
            "images_per_s": setting.images / figures.median * 1e3,
            **more,
        }
        row = file.write(
            case=case_name(setting),
            kernel="step",
            form=form,
            shape={"B": setting.images, "H": side, "W": side, "K": setting.classes}
            | {"P": setting.images},
            dtype="bfloat16" if bf16 else "float32",
            memory_format="channels_last",
            peak_mib=peaks[form],
            config=config,
            checked=True,
            note="n turns A B C; checked: no void step; peak_mib beyond weights and banks",
            **figures.row,
        )
        print(
            f"step {row['case']} {form:12} {figures.median:9.2f} ms "
            f"{config['images_per_s']:8.0f} img/s {more['added_percent']:+6.1f} %  "
            f"({row['device']})",
            flush=True,
        )
    first = [ms[: len(ms) // 2] for ms in times.values()]
    last = [ms[len(ms) // 2 :] for ms in times.values()]
    drift = max(
        abs(statistics.median(a) / statistics.median(b) - 1)
        for a, b in zip(first, last, strict=True)
    )
    file.finish(unsteady=drift > 0.05)


def main() -> int:
    """Time the steps; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help=f"a folder; the rows go into {STAGE}.jsonl")
    parser.add_argument("--skip-done", action="store_true")
    parser.add_argument("--repeat", type=int, default=1, help="passes over the stage")
    parser.add_argument("--rounds", type=int, help="turns of every form")
    parser.add_argument("--steps", type=int, help="steps of a turn")
    parser.add_argument(
        "--seconds", type=float, default=230, help="no new round after these, warm-up included"
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small images, on a CPU too, for tests")
    options = parser.parse_args()
    setting = TINY if options.tiny else FULL
    setting = replace(
        setting,
        rounds=options.rounds or setting.rounds,
        steps=options.steps or setting.steps,
    )
    if options.dry_run:
        print(f"  {setting}; its kernels are those of mix_imagenet and bank")
        return 0
    if options.out is None:
        parser.error("--out is needed")
    if not (options.tiny or torch.cuda.is_available()):
        print("no CUDA device here: try --dry-run, or --tiny")
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for repeat in range(options.repeat):
        file = rows.Rows(
            options.out / f"{STAGE}.jsonl",
            {"bench": "step", "stage": STAGE, **rows.machine(device)},
            skip_done=options.skip_done,
            repeat=repeat,
        )
        if all(file.done(case=case_name(setting), form=form) for form in FORMS):
            print(f"{case_name(setting)}: done already")
        else:
            measure(setting, device, file, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
