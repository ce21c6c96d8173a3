"""The generator on tensors: published vectors, and the same words as on the host."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backmix.kernels import philox
from backmix.pipeline import draws


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers for philox4x32, 10 rounds
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox.philox(torch.tensor(counter), key).tolist() == list(words)


@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    index=st.lists(st.integers(0, 2**56 - 1), max_size=4),
    stream=st.sampled_from(sorted(draws.STREAMS)),
    number=st.integers(0, 2**32 - 1),
)
def test_the_same_words_as_on_the_host(
    seed: int, epoch: int, index: list[int], stream: str, number: int
) -> None:
    there = philox.block(
        seed, epoch, torch.tensor(index, dtype=torch.int64), draws.STREAMS[stream], number
    )
    here = draws.block(seed, epoch, np.array(index, np.int64), stream, number)
    assert there.dtype == torch.int64 and there.tolist() == here.tolist()
