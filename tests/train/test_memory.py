"""Freed memory is used again without the kernel's help."""

import io
import json
import subprocess
import sys

import pytest

from bench import bench_memory

_FAULTS = """
import ctypes, resource, torch
from backmix.train.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        pointer = libc.malloc(48 << 20)
        ctypes.memset(pointer, 1, 48 << 20)
        libc.free(pointer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
before = faults()
assert not keep_freed_memory(torch.device("cuda"))
assert keep_freed_memory(torch.device("cpu"))
faults()  # the heap grows once
print(before, faults())
"""


def test_pages_are_not_asked_for_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    pages = 20 * (48 << 20) // (2 << 20)  # at least, were all of them huge ones of 2 MiB
    assert before >= pages > 10 * after


@pytest.mark.parametrize(
    "network", ["classifier32-quarter, training", "resnet18 at 224 px, seeing"]
)
def test_the_bench_counts_steps_per_cpu_second(
    network: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {
        name: (model, side, 2, trained)
        for name, (model, side, _, trained) in bench_memory.NETWORKS.items()
    }
    monkeypatch.setattr(bench_memory, "NETWORKS", small)
    monkeypatch.setattr(bench_memory, "LAP", 0.05)
    monkeypatch.setattr(sys, "stdin", io.StringIO("lap\n"))
    assert bench_memory.serve(network, bench_memory.GIVEN) == 0
    ready, lap = capsys.readouterr().out.splitlines()
    figures = json.loads(lap)
    assert ready == "ready" and set(figures) == {"rate", "kernel", "mib"}
    assert 0 < figures["rate"] <= 1e6 and 0 <= figures["kernel"] < 1 < figures["mib"]
