"""Philox4x32-10 on the device: the same words as `pipeline/draws.py`, drawn where they are needed.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Two forms:
`block` on tensors, and `block_in_kernel` for use inside a Triton kernel. PyTorch has no 32-bit
unsigned arithmetic, so there every word is an int64 in [0, 2^32); in Triton it is a uint32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower word of a 32 x 32 bit product."""
    # In 16-bit halves: the whole product may not fit int64's 63 bits.
    low = (word & 0xFFFF) * multiplier
    middle = (word >> 16) * multiplier + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & _WORD


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Return the four random words of each counter.

    Args:
        counter: int64 [..., 4], words in [0, 2^32).
        key: two words in [0, 2^32).
    """
    x0, x1, x2, x3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        upper0, lower0 = _multiply(x0, _MULTIPLIERS[0])
        upper1, lower1 = _multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = upper1 ^ x1 ^ k0, lower1, upper0 ^ x3 ^ k1, lower0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack((x0, x1, x2, x3), -1)


def block(seed: int, epoch: int, index: Tensor, stream: int, number: int = 0) -> Tensor:
    """Return four random words for each sample, int64 [n, 4] in [0, 2^32).

    Args:
        seed: seed of the run, 0 <= seed < 2^64.
        epoch: 0 <= epoch < 2^32.
        index: sample numbers, int64 [n], 0 <= index < 2^56.
        stream: number of the stream, `pipeline.draws.STREAMS[name]`, 0 <= stream < 256.
        number: which draw of the stream, 0 <= number < 2^32.
    """
    counter = torch.stack(
        (
            index & _WORD,
            (index >> 32) | (stream << 24),
            torch.full_like(index, epoch),
            torch.full_like(index, number),
        ),
        -1,
    )
    return philox(counter, (seed & _WORD, seed >> 32))


@triton.jit
def block_in_kernel(seed, epoch, index, stream, number):
    """Return four random words for each sample, each uint32 [n]: `block` inside a kernel.

    Args:
        seed: `signed(seed, 64)`, an integer argument of the kernel.
        epoch: `signed(epoch, 32)`, likewise.
        index: int64 [n], 0 <= index < 2^56.
        stream: 0 <= stream < 256, tl.constexpr or an integer.
        number: likewise; from 2^31 on as `signed(number, 32)`.
    """
    # All four counters must be 32 bits wide: from 64-bit ones tl.philox makes another generator.
    word0 = index.to(tl.uint32)
    word1 = ((index >> 32) | (stream << 24)).to(tl.uint32)
    word2 = tl.zeros_like(word0) + epoch
    word3 = tl.zeros_like(word0) + number
    return tl.philox(seed, word0, word1, word2, word3)


@triton.jit
def below_in_kernel(word, n):
    """Map random words, uint32, to integers 0 .. n - 1 (0 where n is 0), int32; 0 <= n < 2^31."""
    return tl.umulhi(word, (tl.zeros_like(word) + n).to(tl.uint32)).to(tl.int32)


def signed(number: int, bits: int) -> int:
    """Return the signed integer with the same bits: what a kernel takes for an unsigned number."""
    return number - (1 << bits) if number >> (bits - 1) else number
