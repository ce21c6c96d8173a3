"""What it is worth on a CPU to keep freed memory: CPU time of a step, with and without.

    python -m bench.bench_memory [--turns 6]

Two processes a network, one of which keeps the memory that it frees (train/memory.py), take turns:
training steps of classifier32, of a quarter of its width, and a ResNet-18 that sees 224 px. Prints
images per CPU-second, the share of the CPU time that the kernel takes, and the greatest memory.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import nn

from backmix.train.memory import keep_freed_memory
from backmix.train.models.build import build
from bench.turns import Lap, take_turns

NETWORKS = {
    "classifier32, training": ("classifier32", 32, 64, True),
    "classifier32-quarter, training": ("classifier32-quarter", 32, 64, True),
    "resnet18 at 224 px, seeing": ("resnet18", 224, 64, False),
}
"""Name -> network, side of the images, images a step, whether it is trained."""
LAP = 3.0
"""CPU-seconds of a lap."""
KEPT, GIVEN = "kept", "given back"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        torch.set_num_threads(1)
        return serve(*asked.serve)
    for name in NETWORKS:
        laps = take_turns(
            {form: _started(name, form) for form in (KEPT, GIVEN)}, asked.turns, "lap"
        )
        if len(laps) < 2:  # take_turns has said why
            return 1
        for form in (GIVEN, KEPT):
            print(f"{name}, freed memory {form}: {_told(laps[form])}", flush=True)
        pairs = zip(laps[KEPT], laps[GIVEN], strict=True)
        ratios = sorted(kept["rate"] / given["rate"] for kept, given in pairs)
        print(
            f"{name}: ratio {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}) over {asked.turns} turns",
            flush=True,
        )
    return 0


def _told(laps: list[Lap]) -> str:
    rates = sorted(lap["rate"] for lap in laps)
    kernel = statistics.median(lap["kernel"] for lap in laps)
    return (
        f"{statistics.median(rates):,.0f} images per CPU-second ({rates[0]:,.0f} to "
        f"{rates[-1]:,.0f}), kernel {100 * kernel:.1f} %, {laps[-1]['mib']:,.0f} MiB"
    )


def _started(name: str, form: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "bench.bench_memory", "--serve", name, form]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def serve(name: str, form: str) -> int:
    """Print `ready`, then for every line of stdin the figures of a lap as JSON."""
    torch.manual_seed(0)
    if form == KEPT and not keep_freed_memory(torch.device("cpu")):
        print("this C library keeps nothing", file=sys.stderr)
        return 1
    network, side, images, trained = NETWORKS[name]
    step = _step(network, side, images, trained=trained)
    for _ in range(3):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        before, steps = os.times(), 0
        while (now := os.times()).user + now.system - before.user - before.system < LAP:
            step()
            steps += 1
        kernel = now.system - before.system
        seconds = now.user - before.user + kernel
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        lap = {"rate": steps * images / seconds, "kernel": kernel / seconds, "mib": most}
        print(json.dumps(lap), flush=True)
    return 0


def _step(network: str, side: int, images: int, *, trained: bool) -> Callable[[], object]:
    """Return what does one step, as a run on a CPU does it: channels last, bf16 where trained."""
    model = build(network, 6, side).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    views = torch.rand(images, 3, side, side).to(memory_format=torch.channels_last)
    labels = torch.arange(images) % 6
    if not trained:
        model.eval()
        return torch.inference_mode()(lambda: model(views))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = model(views)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    sys.exit(main())
