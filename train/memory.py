"""How a process that computes on a CPU treats memory that it has used before."""

import ctypes

import torch

# <malloc.h>
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST = 1 << 30


def keep_freed_memory(device: torch.device) -> bool:
    """Keep freed memory for the next step instead of giving it back to the system, on a CPU.

    A step frees the feature maps that the next one needs again. By default glibc hands blocks of
    more than 32 MiB, and a free end of its heap, back to the kernel, which fills every page with
    zeros before it lends it again: 8 to 22 % of the CPU time of a step (docs/notes.md, by
    bench/bench_memory.py). The process holds its greatest need from then on. Blocks above 1 GiB are
    lent and given back as before.

    Returns:
        False on another device, and where the C library has no `mallopt` that takes this (musl,
        macOS): nothing is changed.
    """
    if device.type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, -1))
