"""One kernel launch as data: what runs on a GPU is exactly what is compiled without one.

A door builds a `Launch` from its tensors. `run` runs it; `offline.py` compiles the same object,
made from tensors on the device "meta", for GPUs that are not at hand.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Number = int | float


@dataclass(frozen=True)
class Launch:
    """A Triton function with everything it is called with."""

    function: Any
    """What `@triton.jit` made."""
    grid: tuple[int, ...]
    """Programs along each axis, all above 0."""
    arguments: dict[str, Tensor | Number | None]
    """By name, in the function's order; None is a pointer that is not used."""
    constants: dict[str, Any]
    """The `tl.constexpr` arguments, by name."""
    warps: int
    stages: int = 3
    maxnreg: int | None = None
    """Most registers of a thread; None = as many as the compiler likes."""

    def run(self) -> None:
        """Run the kernel on the device of its first tensor, on the current stream."""
        tensor = next(x for x in self.arguments.values() if isinstance(x, Tensor))
        on_device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
        with on_device:
            self.function[self.grid](
                **self.arguments,
                **self.constants,
                num_warps=self.warps,
                num_stages=self.stages,
                maxnreg=self.maxnreg,
            )

    def compiled_arguments(self) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
        """Return what the compiler is told of the arguments, as Triton derives it at run time.

        Tensors count as starting at multiples of 16 bytes, as all that torch allocates do.

        Returns:
            type of each argument in the function's order, as in "*bf16", "i32", "constexpr";
            values of the constants, among them arguments that are None or 1;
            names of the arguments that are multiples of 16.
        """
        types: dict[str, str] = {}
        constants = dict(self.constants)
        divisible: list[str] = []
        for parameter in self.function.params:
            name = parameter.name
            value = self.arguments.get(name)
            if parameter.is_constexpr:
                types[name] = "constexpr"
            elif value is None or (
                isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            ):
                types[name] = "constexpr"
                constants[name] = value
            elif isinstance(value, Tensor):
                types[name] = "*" + _TYPES[value.dtype]
                if not parameter.do_not_specialize_on_alignment:
                    divisible.append(name)
            elif isinstance(value, int):
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    divisible.append(name)
            else:
                types[name] = "fp32"
        return types, constants, tuple(divisible)


_TYPES = {
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}


def ceil_div(numerator: int, denominator: int) -> int:
    """Return numerator / denominator rounded up; both above 0."""
    return -(-numerator // denominator)
