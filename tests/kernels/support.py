"""What the kernel tests share: devices, ugly sizes, poison, the derived tolerance, the compiler."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backmix.kernels import dispatch

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not dispatch.INTERPRETED, reason="a GPU is here: kernels are compiled, not interpreted"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
"""Where the Triton forms run: interpreted on the CPU, or compiled on a GPU."""
UGLY = (1, 2, 3, 17, 31, 33, 113)
"""Sizes that fit no block."""
_GUARD = 64
ROOT = Path(__file__).resolve().parents[2]


def poison(dtype: torch.dtype) -> float | int | bool:
    """Return what must never be read: NaN, or 0xAB in every byte."""
    if dtype.is_floating_point:
        return float("nan")
    if dtype == torch.bool:
        return True
    return int.from_bytes(b"\xab" * dtype.itemsize, "little", signed=dtype.is_signed)


def poisoned(tensor: Tensor, device: str | torch.device = "cpu", offset: int = _GUARD) -> Tensor:
    """Return an equal tensor, same strides, inside a larger allocation full of poison.

    Args:
        tensor: dense, in any order of its axes.
        device: of the result.
        offset: elements before it; _GUARD keeps it at a multiple of 16 bytes.
    """
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = size if tensor.numel() else 0
    room = torch.full(
        (offset + size + _GUARD,), poison(tensor.dtype), dtype=tensor.dtype, device=device
    )
    inside = room.as_strided(tensor.shape, tensor.stride(), offset)
    inside.copy_(tensor)
    return inside


class Guarded:
    """An output with guards around it: poison before the kernel runs, looked at afterwards."""

    def __init__(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: str
    ) -> None:
        size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        size = size if 0 not in shape else 0
        self.room = torch.full((size + 2 * _GUARD,), poison(dtype), dtype=dtype, device=device)
        self.before = self.room.clone()
        self.out = self.room.as_strided(shape, strides, _GUARD)
        self.size = size

    def expect_guards_untouched(self) -> None:
        """Fail if a byte outside the output was written."""

        def ends(room: Tensor) -> Tensor:
            return torch.cat((room[:_GUARD], room[_GUARD + self.size :])).view(torch.uint8)

        assert ends(self.room).equal(ends(self.before)), "written outside the output"


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill what torch.empty* returns with poison, so that a value never written shows."""

    def filled(make: Any) -> Any:
        def made(*arguments: Any, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            return tensor if tensor.device.type == "meta" else tensor.fill_(poison(tensor.dtype))

        return made

    with (
        mock.patch("torch.empty", filled(torch.empty)),
        mock.patch("torch.empty_like", filled(torch.empty_like)),
        mock.patch("torch.empty_strided", filled(torch.empty_strided)),
    ):
        yield


class NoWaiting(TorchDispatchMode):
    """Raises where a device would make the host wait, or where host data would be copied to it."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.WAITS), f"{name} waits for the device"
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        assert all(t.device.type == "meta" for t in tensors), f"{name} touches a host tensor"
        if name in ("index", "index_put", "index_put_"):
            assert all(t.dtype != torch.bool for t in tensors[1:2]), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Make everything an error that waits for the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def expect_close(kernel: Tensor, reference: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """Require the kernel's error to be at most twice that of plain PyTorch, and two roundings.

    max|o - r| <= 2 max|p - r| + 2 eps max|r|, and the same of the means; o the kernel, r the
    meaning in float64, p the meaning in the kernel's own arithmetic.
    """
    if reference.numel() == 0:
        assert kernel.shape == reference.shape
        return
    assert kernel.shape == reference.shape and kernel.isfinite().all()
    o, p = kernel.detach().double().cpu(), plain.detach().double().cpu()
    r = reference.detach().double().cpu()
    eps = torch.finfo(dtype).eps
    for reduce in (torch.amax, torch.mean):
        error, allowed = (
            reduce((o - r).abs()),
            2 * reduce((p - r).abs()) + 2 * eps * reduce(r.abs()),
        )
        assert error <= allowed, f"{reduce.__name__} error {error:.3g}, allowed {allowed:.3g}"


@functools.cache
def compiled(kernel: str) -> dict[str, dict[str, Any]]:
    """Return what the compiler made of a door's shipped launches, by `offline.budget_key`.

    Of each: ptx, sass (lines) and the figures of the budget. In a process of its own, because this
    one may interpret its kernels and could not compile; with an empty cache, so that it does.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "dump.json"
        found = subprocess.run(
            [sys.executable, "-m", "backmix.kernels.offline", "--kernel", kernel, "--dump", dump],
            env={**environment, "PYTHONPATH": str(ROOT / "src"), "TRITON_CACHE_DIR": folder},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert found.returncode == 0, found.stderr[-3000:]
        return json.loads(dump.read_text())


def expect_within_budget(kernel: str) -> None:
    """Fail if a shipped launch is hollow, spills, or has left its line of the budget.

    Registers may move by 16; instructions may shrink, and grow by a quarter, in all and in each
    loop for an element.
    """
    import triton

    budget = json.loads((ROOT / "kernels" / "budget.json").read_text())
    if triton.__version__ not in budget:
        pytest.skip(f"the budget has no lines for triton {triton.__version__}: not checked")
    lines = {
        key: line
        for key, line in budget[triton.__version__].items()
        if key.startswith(f"{kernel} |")
    }
    found = compiled(kernel)
    assert lines.keys() == found.keys(), "run python -m backmix.kernels.offline --write"
    for key, made in found.items():
        assert "st.global" in made["ptx"] and made["registers"] > 16, f"{key} is hollow"
        assert "trap;" not in made["ptx"], f"{key} is a trap"
        assert made["stack"] == 0, f"{key} spills {made['stack']} bytes"
        for figure, wanted in lines[key].items():
            if figure == "registers":
                assert abs(made[figure] - wanted) <= 16, (key, figure, made[figure], wanted)
            elif figure == "per_element":  # of each loop that stores
                assert len(made[figure]) == len(wanted), (key, figure, made[figure], wanted)
                for now, before in zip(made[figure], wanted, strict=True):
                    assert now <= 1.25 * before, (key, figure, made[figure], wanted)
            else:
                assert made[figure] <= 1.25 * wanted, (key, figure, made[figure], wanted)
