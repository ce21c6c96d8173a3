"""Time the kernels' doors against the plain steps they replace: one JSON row per case and form.

    python bench/bench_kernels.py [--results FOLDER] [--seconds 5] [--threads 2]

Imports torch, numpy and backmix.kernels only, so that it runs on a bare machine. Here on a CPU:
the doors run their meanings, and no row claims a share of any ceiling. Within a case the forms
take turns, so that a busy moment hits all of them. A form that gives a wrong result ends the bench.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backmix.kernels.mix_background import mix_background
from backmix.kernels.update_cam_bank import update_cam_bank

KEYS = tuple(
    "bench case note kernel form stage shape dtype out_dtype memory_format ms_p20 ms_p50 ms_p80 n "
    "bytes flops gb_per_s tflops share_of_copy share_of_matmul copy_gb_per_s bf16_tflops l2 "
    "l2_resident host_us peak_mib registers config checked device sm_count driver torch triton "
    "python commit dirty utc unsteady".split()
)
"""Every row has all of them; what is unknown is null."""
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
MIN_ROUNDS = 20


@dataclass(frozen=True)
class Case:
    """One set of inputs, and the forms that do the same work on it."""

    name: str
    kernel: str
    shape: dict[str, float]
    bytes: int
    """Read and written at least once."""
    dtype: str
    out_dtype: str
    forms: dict[str, Callable[[], object]]
    note: str


def mix_case(n: int, side: int, grid: int, rows: int, pad: int, patch_share: float) -> Case:
    """n views out of a pool of `rows`, with a square patch of `patch_share` of the area."""
    draw = torch.Generator().manual_seed(0)

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    patch = round(side * patch_share**0.5)
    pool = random(0, 256, rows, side, side, 3).to(torch.uint8)
    target, donor = random(0, rows, n), random(0, rows, n)
    corners = random(0, side - patch + 1, n, 4)
    arguments: dict[str, Any] = {
        "bank": torch.rand(rows, grid, grid, generator=draw).half(),
        "bank_row": donor,
        "box": torch.tensor([[0, 0, 65536, 65536]], dtype=torch.int32).expand(n, 4),
        "tie": random(-(2**31), 2**31, n).int(),
        "mask_cells": grid * grid // 4,
        "mean": MEAN,
        "std": STD,
    }
    draws: dict[str, Any] = {
        "patch": torch.cat((corners, torch.full((n, 2), patch)), 1).int(),
        "flip": random(0, 2, n).bool(),
        "shift": random(-pad, pad + 1, n, 2).int() if pad else None,
    }
    nothing: dict[str, Any] = {
        "patch": torch.zeros(n, 6, dtype=torch.int32),
        "flip": torch.zeros(n, dtype=torch.bool),
    }
    mean, inverse = torch.tensor(MEAN), torch.tensor([1 / s for s in STD])
    mean_line, inverse_line = mean.repeat(side), inverse.repeat(side)

    def plain() -> Tensor:
        """The lines that most loops have."""
        x = pool[target].permute(0, 3, 1, 2).float()
        return x.sub_(mean[:, None, None]).mul_(inverse[:, None, None])

    def plain_lines() -> Tensor:
        """The fastest way found to write them: whole lines instead of steps of three channels."""
        x = pool.index_select(0, target).view(n * side, 3 * side).float()
        return x.sub_(mean_line).mul_(inverse_line).view(n, side, side, 3).permute(0, 3, 1, 2)

    unmixed = mix_background(pool, target, donor, check=True, **arguments, **nothing)
    if not (unmixed.equal(plain()) and unmixed.equal(plain_lines())):
        sys.exit("mix_background without a patch differs from gather and normalise")
    mix_background(pool, target, donor, check=True, **arguments, **draws)
    return Case(
        name=f"{n} x {side} px" + (", shifted" if pad else ""),
        kernel="mix_background",
        shape={"B": n, "H": side, "W": side, "h": grid, "w": grid, "P": rows}
        | {"patch_share": patch_share},
        bytes=n * side * side * 3 * (1 + 4),
        dtype="uint8",
        out_dtype="float32",
        forms={
            "gather_normalise": plain,
            "gather_normalise_lines": plain_lines,
            "eager": lambda: mix_background(pool, target, donor, **arguments, **draws),
        },
        note="gather_normalise forms only gather and normalise: no mask, paste, flip or shift",
    )


def bank_case(n: int, grid: int, channels: int, classes: int, rows: int) -> Case:
    """n feature maps into a bank of `rows`."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(n, channels, grid, grid, generator=draw).relu()
    features = features.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(classes, channels, generator=draw)
    labels = torch.randint(0, classes, (n,), generator=draw)
    row = torch.randperm(rows, generator=draw)[:n]
    box = torch.tensor([[0, 0, 65536, 65536]], dtype=torch.int32).expand(n, 4)
    bank = torch.full((rows, grid, grid), 0.5, dtype=torch.float16)

    def plain(bank: Tensor = bank) -> None:
        """The same for whole images only: no box, no checks of what is seen or finite."""
        maps = torch.einsum("nc,ncij->nij", weight[labels], features)
        maps = maps - maps.amin((1, 2), keepdim=True)
        bank[row] = bank[row].float().lerp(maps / maps.amax((1, 2), keepdim=True), 0.1).half()

    expected, got = bank.clone(), bank.clone()
    plain(expected)
    update_cam_bank(got, features, weight, labels, row, box=box, check=True)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-5)
    return Case(
        name=f"{n} x {grid} x {grid} x {channels}",
        kernel="update_cam_bank",
        shape={"B": n, "h": grid, "w": grid, "C": channels, "K": classes},
        bytes=4 * features.numel() + 2 * 2 * n * grid * grid,
        dtype="float32",
        out_dtype="float16",
        forms={
            "plain_whole_images": plain,
            "eager": lambda: update_cam_bank(bank, features, weight, labels, row, box=box),
        },
        note="plain_whole_images knows no boxes",
    )


def timed(forms: dict[str, Callable[[], object]], seconds: float) -> dict[str, np.ndarray]:
    """Call the forms in turns for about `seconds`; return each one's times, ms."""
    times: dict[str, list[float]] = {form: [] for form in forms}
    for call in forms.values():
        call()
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < MIN_ROUNDS or time.perf_counter() < end:
        for form, call in forms.items():
            start = time.perf_counter()
            call()
            times[form].append(1e3 * (time.perf_counter() - start))
    return {form: np.array(values) for form, values in times.items()}


def git(*arguments: str) -> str | None:
    """Return what git says, None where there is no repository or no commit."""
    found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def processor() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> None:
    """Run all cases, print a table, and append the rows to a file of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--seconds", type=float, default=5, help="per case [s]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    started = datetime.now(UTC)
    machine = {
        "bench": "kernels",
        "stage": "kernels",
        "device": f"CPU: {processor()}",
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "utc": started.isoformat(timespec="seconds"),
        "config": {"threads": options.threads},
        "checked": True,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"cpu-{started:%Y%m%dT%H%M%SZ}-kernels.jsonl"
    cases = [
        lambda: mix_case(512, 32, grid=4, rows=50_000, pad=4, patch_share=1 / 16),
        lambda: mix_case(512, 32, grid=4, rows=50_000, pad=0, patch_share=1 / 16),
        lambda: mix_case(64, 224, grid=7, rows=64, pad=0, patch_share=1 / 4),
        lambda: bank_case(512, 4, channels=128, classes=6, rows=50_000),
        lambda: bank_case(64, 7, channels=2048, classes=1000, rows=50_000),
    ]
    with file.open("x") as out:
        for make in cases:
            case = make()
            for form, ms in timed(case.forms, options.seconds).items():
                low, median, high = np.percentile(ms, (20, 50, 80)).tolist()
                known = machine | {
                    "case": case.name,
                    "kernel": case.kernel,
                    "form": form,
                    "shape": case.shape,
                    "dtype": case.dtype,
                    "out_dtype": case.out_dtype,
                    "memory_format": "channels_last",
                    "ms_p20": low,
                    "ms_p50": median,
                    "ms_p80": high,
                    "n": len(ms),
                    "bytes": case.bytes,
                    "gb_per_s": case.bytes / median / 1e6,
                    "unsteady": high > 1.25 * low,
                    "note": f"{case.note}; load average {os.getloadavg()[0]:.1f}",
                }
                out.write(json.dumps({key: known.get(key) for key in KEYS}) + "\n")
                out.flush()
                print(f"{case.kernel:16} {case.name:20} {form:22} {median:8.2f} ms  (CPU)")
    print(f"rows: {file}")


if __name__ == "__main__":
    main()
