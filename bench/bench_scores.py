"""Scores of a large set from stored outputs: seconds and memory of each, on a CPU.

    PYTHONPATH=src:. nice python -m bench.bench_scores [--out FOLDER] [--images N] [--train N] ...

The outputs are made up from a seed: features relu(class centre + noise), logits W f + b. They
are stored and mapped as an evaluation does it. Then everything is fitted and every score is
computed, one after the other in one process, each once: they take seconds, and nothing is warmed
up. Memory is the most that the process has had in RAM meanwhile (VmHWM), pages of the mapped files
included, which the system may drop.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from backmix.train import scores
from backmix.train.outputs import Outputs, Spool, load_outputs, outputs_of, store
from backmix.train.scores import fit as fitting
from backmix.train.scores.rows import percentile
from bench import rows

STAGE = "scores"
MADE_AT_ONCE = 2048


def made(folder: Path, name: str, count: int, head: nn.Linear, seed: int) -> Outputs:
    """Make, store and map the outputs of one set."""
    random = np.random.default_rng(seed)
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    centres = np.random.default_rng(0).normal(0, 1, weight.shape).astype(np.float32)
    with Spool(folder) as spool:
        for start in range(0, count, MADE_AT_ONCE):
            size = min(MADE_AT_ONCE, count - start)
            labels = random.integers(0, len(centres), size)
            noise = random.standard_normal((size, weight.shape[1]), np.float32)
            features = np.maximum(centres[labels] + noise, 0)
            spool.add(
                {
                    "logits": features @ weight.T + bias,
                    "features": features,
                    "labels": labels,
                    "index": np.arange(start, start + size),
                }
            )
        outputs = outputs_of(spool.arrays(), name=name, kind="known", files=(), digest="", bad=())
        store(folder / f"{name}.safetensors", outputs)
    return load_outputs(folder / f"{name}.safetensors")


def fits(train: Outputs, head: scores.LinearHead) -> dict[str, Callable[[], object]]:
    """Return the parts of `fit_scores`; the last two take what the one before has found."""
    found: dict[str, Any] = {}

    def gaussians() -> None:
        found["gaussians"], found["covariance"] = fitting.fit_gaussians(
            train.features, train.labels
        )

    def residual() -> None:
        features, logits = train.features, train.logits
        mean, covariance = found["gaussians"].mean, found["covariance"]
        fitting.fit_residual(features, logits, head, mean, covariance)

    return {
        "fit temperature": lambda: fitting.fit_temperature(train.logits, train.labels),
        "fit knn": lambda: fitting.fit_bank(train.features, train.index),
        "fit react": lambda: percentile(train.features, fitting.REACT_SHARE),
        "fit mahalanobis, rmds": gaussians,
        "fit vim": residual,
    }


def calls(test: Outputs, head: scores.LinearHead, fit: scores.Fit) -> dict[str, Callable[[], Any]]:
    """Return every score of a linear head by name."""
    z, f, mean = test.logits, test.features, fit.gaussians.mean
    assert fit.linear is not None
    linear = fit.linear
    return {
        "msp": lambda: scores.msp(z),
        "temperature": lambda: scores.temperature(z, fit.temperature),
        "max_logit": lambda: scores.max_logit(z),
        "energy": lambda: scores.energy(z),
        "gen": lambda: scores.gen(z),
        "ash_s": lambda: scores.ash_s(f, head),
        "scale": lambda: scores.scale(f, head),
        "react": lambda: scores.react(f, head, linear.clip),
        "dice": lambda: scores.dice(f, head, mean),
        "vim": lambda: scores.vim(f, head, linear.residual),
        "fdbd": lambda: scores.fdbd(f, head, mean),
        "nci": lambda: scores.nci(f, head, mean),
        "knn": lambda: scores.knn(f, fit.bank, fit.k),
        "mahalanobis": lambda: scores.mahalanobis(f, fit.gaussians),
        "rmds": lambda: scores.rmds(f, fit.gaussians),
        "ssod": lambda: scores.ssod(z[:, 0]),
        "ssod_joint": lambda: scores.ssod_joint(z, z[:, 0]),
        "arpl": lambda: scores.arpl(z),
        "arpl_dot": lambda: scores.arpl_dot(z, f),
        "feature_norm": lambda: scores.feature_norm(f),
    }


def measured(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what a call returns, and its seconds and the process's memory."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the most there was
    before, used, start = _mib("VmRSS"), _cpu_seconds(), time.perf_counter()
    found = call()
    return found, {
        "seconds": round(time.perf_counter() - start, 3),
        "cpu_seconds": round(_cpu_seconds() - used, 3),
        "held_before_mib": before,
        "peak_rss_mib": _mib("VmHWM"),
    }


def _mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return round(int(line.split()[1]) / 1024, 1)
    raise KeyError(key)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    """Measure and write rows; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help=f"a folder; the rows go into {STAGE}.jsonl")
    parser.add_argument("--work", type=Path, help="where the outputs are stored [a tempdir]")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--train", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--channels", type=int, default=2_048)
    options = parser.parse_args()
    torch.manual_seed(0)
    module = nn.Linear(options.channels, options.classes)
    head = scores.linear_head(module)
    assert head is not None
    shape = {
        "images": options.images,
        "train": options.train,
        "classes": options.classes,
        "channels": options.channels,
    }
    case = ", ".join(f"{count:,} {what}" for what, count in shape.items())
    file = None
    if options.out is not None:
        common = {"bench": STAGE, "stage": STAGE, "case": case, "shape": shape}
        file = rows.Rows(options.out / f"{STAGE}.jsonl", common | rows.machine("cpu"))

    def publish(form: str, figures: dict[str, float]) -> None:
        load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        print(f"{form:24} {figures['seconds']:8.2f} s {figures['peak_rss_mib']:9.1f} MiB  {load}")
        if file is not None:
            times = rows.Times([1e3 * figures["seconds"]])
            file.write(form=form, config=figures, note=load, dtype="float64", **times.row)

    with tempfile.TemporaryDirectory(prefix="backmix-bench-", dir=options.work) as name:
        folder = Path(name)
        train = made(folder, "train", options.train, module, 1)
        test = made(folder, "known", options.images, module, 2)
        for form, call in fits(train, head).items():
            publish(form, measured(call)[1])
        fit, figures = measured(lambda: fitting.fit_scores(train, head))
        publish("fit, all", figures)
        for form, call in calls(test, head, fit).items():
            publish(form, measured(call)[1])
        every, figures = measured(lambda: scores.every_score(test, module, fit))
        publish("every score of a linear head", figures)
        stored = replace(test, scores=every)
        publish("store", measured(lambda: store(folder / "again.safetensors", stored))[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
