"""Time the kernels' meanings on a CPU against plain steps: one JSON row per case and form.

    PYTHONPATH=src:. python -m bench.bench_kernels [--results FOLDER] [--seconds 5] [--threads 2]

What `make bench` runs. The doors run their PyTorch forms here; every row says CPU, none claims a
share of any ceiling. Within a case the forms take turns, so that a busy moment hits all of them. A
form that gives a wrong result ends the bench. Last comes what the compiler made of the kernels.
"""

import argparse
import dataclasses
import json
import os
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import triton

from backmix.kernels.offline import BUDGET
from bench import baselines, cases, rows
from bench.cases import Bank, Case, Form, Locations, Mix, Reconstruction

FP32 = torch.float32
CIFAR = Mix(512, 32, 4, 8, rows=50_000, dtype=FP32)
SHAPES = (
    dataclasses.replace(CIFAR, pad=4),
    CIFAR,
    Mix(64, 224, 7, 112, dtype=FP32),
    Bank(512, 4, 128, 6, 50_000, boxes=False, dtype=FP32),
    Bank(64, 7, 2048, 1000, 50_000, boxes=False, dtype=FP32),
    Locations(16, 7, 2048, 1000, FP32),
    Reconstruction(784, 20, 512, 16, "forward", FP32),
    Reconstruction(784, 20, 512, 16, "both", FP32),
)
UNTIMED = ("triton", "compile", "matmul", "steps_torchvision", "steps_kornia", "timm_prefetch")
"""Forms that are for GPUs."""


def case_of(shape: cases.Shape) -> Case:
    """Return a shape's case with the forms that a CPU is asked for."""
    clock = rows.CpuClock()
    case = cases.CASES[type(shape)](shape, clock, cases.Compiler(clock, "eager"))
    forms = {name: make for name, make in case.forms.items() if name not in UNTIMED}
    if isinstance(shape, Mix):
        forms = gathers(shape) | forms
        note = "gather_normalise forms only gather and normalise: no mask, paste, flip or shift"
        case = dataclasses.replace(case, note=note)
    return dataclasses.replace(case, forms=forms)


def gathers(shape: Mix) -> dict[str, partial[Form]]:
    """Return the forms that only gather and normalise, checked against a mix of nothing."""
    device = torch.device("cpu")
    inputs = cases.mix_inputs(shape, device, 0, cases.resident_pool(shape, device))
    still = {"patch": torch.zeros_like(inputs.draws["patch"]), "shift": None}
    still["flip"] = torch.zeros_like(inputs.draws["flip"])
    unmixed = dataclasses.replace(inputs, draws=inputs.draws | still).door(shape, "torch")
    mean, inverse = torch.tensor(cases.MEAN), torch.tensor([1 / s for s in cases.STD])
    lines = mean.repeat(shape.side), inverse.repeat(shape.side)
    calls = {
        "gather_normalise": partial(
            baselines.gather_normalise, inputs.pool, inputs.target, mean, inverse
        ),
        "gather_normalise_lines": partial(
            baselines.gather_normalise_lines, inputs.pool, inputs.target, *lines
        ),
    }

    def form(call: partial[torch.Tensor]) -> Form:
        return Form([call], lambda: cases.equal(call(), unmixed))

    return {name: partial(form, call) for name, call in calls.items()}


def print_budget() -> None:
    """Print what the compiler made of the kernels for an H100 or H200, as `kernels/` holds it."""
    lines = json.loads(BUDGET.read_text()).get(triton.__version__) if BUDGET.exists() else None
    if lines is None:
        print(f"\nno figures of compiled kernels for triton {triton.__version__}")
        return
    print(f"\n{'compiled for sm_90, triton ' + triton.__version__:60} registers  stack  instr.")
    for key, line in lines.items():
        if key.endswith("sm_90"):
            figures = f"{line['registers']:9}  {line['stack']:5}  {line['instructions']:6}"
            print(f"{key.removesuffix(' | sm_90'):60} {figures}")


def main() -> int:
    """Run all cases, print a table, and append the rows to a file of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--seconds", type=float, default=5, help="per case [s]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for tests")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    started = datetime.now(UTC)
    facts = rows.machine("cpu") | {"bench": "kernels", "stage": "kernels"}
    facts |= {"utc": started.isoformat(timespec="seconds"), "checked": True}
    path = options.results / f"cpu-{started:%Y%m%dT%H%M%SZ}-kernels.jsonl"
    out = rows.Rows(path, facts | {"config": {"threads": options.threads}})
    for shape in SHAPES:
        case = case_of(dataclasses.replace(shape.tiny(), dtype=FP32) if options.tiny else shape)
        forms = {name: make() for name, make in case.forms.items()}
        for form in forms.values():
            form.verify()
        calls = {name: form.calls[0] for name, form in forms.items()}
        for name, times in rows.turns(calls, options.seconds).items():
            row = out.write(
                case=case.name,
                kernel=case.kernel,
                form=name,
                shape=case.shape,
                dtype=case.dtype,
                out_dtype=case.out_dtype,
                memory_format=case.memory_format,
                note=f"{case.note}; load average {os.getloadavg()[0]:.1f}",
                **rows.rates(times, None, case.bytes, case.flops, 0),
            )
            print(f"{case.kernel:21} {case.name:48} {name:22} {row['ms_p50']:8.2f} ms  (CPU)")
    out.finish(unsteady=False)
    print_budget()
    print(f"rows: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
