"""Makes Triton's interpreter round to bfloat16 as GPUs do, for every test of a kernel."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _bfloat16_is_rounded() -> Iterator[None]:
    """Round float32 to bfloat16 to nearest, halves to even: the interpreter cuts off.

    Its arithmetic on bfloat16 stays wrong, so kernels compute in float32. `test_interpreter.py`
    checks what this replaces. Nothing is imported before the tests start: whether kernels are
    interpreted is decided when Triton is.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    before = interpreter._convert_float

    def convert(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return before(numbers, source, target, rounding)
        floats = torch.from_numpy(np.ascontiguousarray(numbers).view(np.float32).copy())
        return floats.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(numbers.shape)

    interpreter._convert_float = convert
    yield
    interpreter._convert_float = before
