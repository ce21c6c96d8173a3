"""What every door does first: choose the form that runs, and refuse arguments that cannot be meant.

Every kernel has two forms: "torch", its meaning in plain PyTorch, on any device; and "triton", on
CUDA devices. Checks named `expect*` look at dtypes and shapes only and never wait for a device;
those named `refuse*` look at values and do wait (`check=True`).
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from triton import knobs

Form = Literal["torch", "triton"]

LARGEST_GRID = 16
OLDEST_CAPABILITY = (8, 0)
"""Compute capability from which the Triton forms are tested: Ampere."""
INTERPRETED = bool(knobs.runtime.interpret)
"""Whether TRITON_INTERPRET=1 was set when the kernels were made: they then run on the CPU, slowly,
for tests."""

# Read once, so that a run cannot change its forms; empty is unset.
_ENVIRONMENT = os.environ.get("BACKMIX_KERNELS") or None
_said: set[tuple[str, str]] = set()


def choose(
    backend: str | None, kernel: str, device: torch.device, *, unsupported: str | None = None
) -> Form:
    """Return the form to run.

    The caller's wish comes first, then the environment variable BACKMIX_KERNELS; without either,
    Triton runs where it can. The plain form on a CUDA device is slow: unless the caller asked for
    it by argument, that is said once per kernel and reason.

    Args:
        backend: the caller's wish, "torch", "triton" or None.
        kernel: name of the kernel, for the messages.
        device: of the tensors.
        unsupported: why the Triton form cannot take these arguments, None if it can.

    Raises:
        ValueError: the wish is unknown, or cannot be met.
    """
    wish, source = (
        (backend, "backend") if backend is not None else (_ENVIRONMENT, "BACKMIX_KERNELS")
    )
    if wish not in (None, "torch", "triton"):
        raise ValueError(f"{source} must be torch or triton, got {wish!r}")
    if wish == "torch":
        if backend is None and device.type == "cuda":
            _say(kernel, "BACKMIX_KERNELS=torch asks for it")
        return "torch"
    obstacle = _obstacle(device) or unsupported
    if obstacle is None and (wish == "triton" or device.type == "cuda"):
        return "triton"
    if wish == "triton":
        raise ValueError(
            f"{source}=triton: the Triton form of {kernel} cannot run here: {obstacle}; "
            "leave the choice open or ask for torch"
        )
    if device.type == "cuda":
        assert obstacle is not None
        _say(kernel, obstacle)
    return "torch"


def _obstacle(device: torch.device) -> str | None:
    """Return why no Triton form runs on a device, None if one does."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        return None
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"the tensors are on {device}, not on a CUDA device"


def _say(kernel: str, reason: str) -> None:
    """Warn that the plain form runs on a GPU, once per kernel and reason."""
    if (kernel, reason) in _said:
        return
    _said.add((kernel, reason))
    warnings.warn(
        f"{kernel} runs its plain PyTorch form on the GPU, which is slow: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


@contextlib.contextmanager
def override(form: Form) -> Iterator[None]:
    """Ask for a form wherever the caller of a door leaves the choice open, inside `with`."""
    global _ENVIRONMENT
    before, _ENVIRONMENT = _ENVIRONMENT, form
    try:
        yield
    finally:
        _ENVIRONMENT = before


def expect_tensors(**arguments: object) -> None:
    """Refuse arguments that are no tensors with at least one axis, by their names."""
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(argument).__name__}")
        if argument.ndim == 0:
            raise ValueError(f"{name} must have axes, got a single number")


def expect(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | str],
    device: torch.device,
) -> None:
    """Refuse a tensor of another dtype, shape or device.

    Args:
        shape: per axis its length, or a letter that stands for any length.

    Raises:
        TypeError: another dtype, or no tensor at all.
        ValueError: another shape or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {names(dtypes)}, got {names([tensor.dtype])}")
    sides = tensor.shape  # made anew each time it is asked for; and a list beats a generator
    fits = len(sides) == len(shape) and all(
        [isinstance(want, str) or want == got for want, got in zip(shape, sides, strict=True)]
    )
    if not fits:
        wanted = ", ".join(str(side) for side in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the other tensors, got {tensor.device}")


def expect_bank(bank: Tensor, device: torch.device) -> None:
    """Refuse a bank that is not fp16 or fp32 [m, g, g'], contiguous, with sides 1..16."""
    expect("bank", bank, (torch.float16, torch.float32), ("m", "g", "g'"), device)
    if not all(1 <= side <= LARGEST_GRID for side in bank.shape[1:]):
        raise ValueError(
            f"bank must have a grid of 1..{LARGEST_GRID} cells a side, got shape {list(bank.shape)}"
        )
    if not bank.is_contiguous():
        raise ValueError("bank must be contiguous")


def names(dtypes: Sequence[torch.dtype]) -> str:
    """Return dtypes as words: `float16 or float32`."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def refuse(name: str, values: Tensor, bad: Tensor, rule: str) -> None:
    """Raise ValueError for the first bad sample, if there is one.

    Args:
        name: of the argument.
        values: the argument, [n, ...].
        bad: bool [n].
        rule: what should be, as in `must be ...`.
    """
    if bad.any():
        sample = int(bad.int().argmax())
        raise ValueError(f"{name}[{sample}] {rule}, got {values[sample].tolist()}")


def refuse_boxes(box: Tensor) -> None:
    """Refuse boxes that are empty or leave the image; int32 [n, 4], 16.16 fractions."""
    y0, x0, height, width = box.long().unbind(1)
    # The start and the size were rounded apart, so their sum may be one above the whole.
    bad = (y0 < 0) | (x0 < 0) | (height < 1) | (width < 1)
    bad |= (y0 + height > 65537) | (x0 + width > 65537)
    refuse("box", box, bad, "must lie inside the image (0, 0, 65536, 65536)")


def refuse_patches(patch: Tensor, height: int, width: int) -> None:
    """Refuse patches that leave the target's or the donor's view; int32 [n, 6]."""
    ty, tx, dy, dx, patch_height, patch_width = patch.long().unbind(1)
    bad = (patch_height < 0) | (patch_width < 0)
    for corner, size, side in (
        (ty, patch_height, height),
        (dy, patch_height, height),
        (tx, patch_width, width),
        (dx, patch_width, width),
    ):
        bad |= (patch_height * patch_width > 0) & ((corner < 0) | (corner + size > side))
    refuse("patch", patch, bad, f"must lie inside views of {height} x {width} pixels")
