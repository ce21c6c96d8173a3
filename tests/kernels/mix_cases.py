"""Arguments for mix_background: what the tests of its two forms share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backmix.kernels.mix_background import mix_background

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
WHOLE = (0, 0, 65536, 65536)


def ints(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Case:
    """The arguments of one call."""

    pool: Tensor
    target: Tensor
    donor: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def mixed(self, **changes: Any) -> Tensor:
        return mix_background(self.pool, self.target, self.donor, **{**self.options, **changes})

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        options = {
            name: change(value) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return Case(change(self.pool), change(self.target), change(self.donor), options)


def random_patches(rng: np.random.Generator, n: int, height: int, width: int) -> Tensor:
    rows = []
    for _ in range(n):
        ph, pw = rng.integers(0, height + 1), rng.integers(0, width + 1)
        ty, dy = rng.integers(0, height - ph + 1, 2)
        tx, dx = rng.integers(0, width - pw + 1, 2)
        rows.append((ty, tx, dy, dx, ph, pw))
    return ints(np.array(rows, np.int32).reshape(n, 6))


def random_case(
    seed: int,
    *,
    n: int = 3,
    side: tuple[int, int] = (9, 7),
    grid: tuple[int, int] = (4, 3),
    **options: Any,
) -> Case:
    """Random arguments; the pool lies in the middle of memory that is full of 255."""
    rng = np.random.default_rng(seed)
    rows, (height, width) = 5, side
    memory = torch.full((rows + 2, height, width, 3), 255, dtype=torch.uint8)
    pool = memory[1:-1]
    pool.copy_(torch.from_numpy(rng.integers(0, 250, pool.shape, np.uint8)))
    # Few different values, so that there are ties; one row of NaN, one with both zeros.
    bank = torch.from_numpy(rng.integers(-3, 4, (6, *grid)).astype(np.float32) / 4)
    bank[1] = torch.nan
    bank[2] = torch.where(bank[2] > 0, 0.0, -0.0)
    start, end = np.sort(rng.integers(0, 65537, (2, n, 2)), 0)
    return Case(
        pool,
        torch.from_numpy(rng.integers(0, rows, n)),
        torch.from_numpy(rng.integers(0, rows, n)),
        {
            "bank": bank.half() if seed % 2 else bank,
            "bank_row": torch.from_numpy(rng.integers(0, 6, n)),
            "box": ints(np.concatenate((start, np.maximum(end - start, 1)), 1)),
            "patch": random_patches(rng, n, height, width),
            "flip": torch.from_numpy(rng.random(n) < 0.5),
            "shift": ints(rng.integers(-4, 5, (n, 2))),
            "tie": ints(rng.integers(-(2**31), 2**31, n)),
            "mask_cells": int(rng.integers(0, grid[0] * grid[1] + 1)),
            "mean": MEAN,
            "std": STD,
            **options,
        },
    )
