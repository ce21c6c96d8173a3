"""What the kernel tests rely on where kernels are interpreted."""

import pytest
import torch
import triton
import triton.language as tl

from backmix.kernels import dispatch


@triton.jit
def _narrow_kernel(out_ptr, numbers_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out_ptr + place, tl.load(numbers_ptr + place).to(out_ptr.dtype.element_ty))


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="kernels are compiled here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_are_narrowed_to_nearest_halves_to_even(dtype: torch.dtype) -> None:
    # Every upper half of a float, with lower halves below, at and above the middle.
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    words = (upper + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).int().view(-1)
    numbers = words.view(torch.float32)
    numbers = numbers[numbers.isfinite()][: 2**18].contiguous()
    if dtype == torch.float16:
        numbers = numbers.clamp(-60000, 60000)
    out = torch.empty(2**18, dtype=dtype)
    _narrow_kernel[(1,)](out, numbers, SIZE=tl.constexpr(2**18))
    assert out.view(torch.int16).equal(numbers.to(dtype).view(torch.int16))
