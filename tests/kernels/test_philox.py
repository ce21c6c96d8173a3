"""The generator on tensors and in kernels: published vectors, the same words as on the host."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backmix.kernels import mix_draws, philox
from backmix.kernels.launch import Launch
from backmix.kernels.mix_draws import mix_draws_on_device
from backmix.pipeline import draws
from tests.kernels.support import DEVICES, poisoned, poisoned_allocations

known_answers = pytest.mark.parametrize(
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


@known_answers
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


# --- in a kernel ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "epoch", "number"])
def _block_kernel(out_ptr, index_ptr, seed, epoch, stream, number, n, BLOCK: tl.constexpr):
    sample = tl.arange(0, BLOCK)
    live = sample < n
    index = tl.load(index_ptr + sample, mask=live, other=0)
    words = philox.block_in_kernel(seed, epoch, index, stream, number)
    at = out_ptr + 4 * sample
    for word in tl.static_range(4):
        tl.store(at + word, words[word].to(tl.int64), mask=live)


def block_in_kernel(
    seed: int, epoch: int, index: Tensor, stream: int, number: int, device: str
) -> Tensor:
    out = torch.full((len(index), 4), -1, dtype=torch.int64, device=device)
    Launch(
        _block_kernel,
        (1,),
        {
            "out_ptr": out,
            "index_ptr": index.to(device),
            "seed": philox.signed(seed, 64),
            "epoch": philox.signed(epoch, 32),
            "stream": stream,
            "number": philox.signed(number, 32),
            "n": len(index),
        },
        {"BLOCK": 16},
        warps=1,
    ).run()
    return out.cpu()


@pytest.mark.parametrize("device", DEVICES)
@known_answers
def test_known_answers_in_a_kernel(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...], device: str
) -> None:
    index = torch.tensor([counter[0] | (counter[1] & 0xFFFFFF) << 32])
    got = block_in_kernel(
        key[0] | key[1] << 32, counter[2], index, counter[1] >> 24, counter[3], device
    )
    assert got.tolist() == [list(words)]


@pytest.mark.parametrize("device", DEVICES)
@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    index=st.lists(st.integers(0, 2**56 - 1), min_size=1, max_size=16),
    stream=st.sampled_from(sorted(draws.STREAMS)),
    number=st.integers(0, 2**32 - 1),
)
def test_a_kernel_draws_the_same_words(
    device: str, seed: int, epoch: int, index: list[int], stream: str, number: int
) -> None:
    samples = torch.tensor(index, dtype=torch.int64)
    arguments = (seed, epoch, samples, draws.STREAMS[stream], number)
    here = draws.block(seed, epoch, samples.numpy(), stream, number)
    assert block_in_kernel(*arguments, device).tolist() == here.tolist()
    assert philox.block(*arguments).tolist() == here.tolist()


# --- the draws of mix_background -----------------------------------------------------------------


def test_the_streams_have_the_numbers_of_the_host() -> None:
    for name in ("flip", "shift", "donor", "patch", "tie", "apply"):
        assert getattr(mix_draws, name.upper()).value == draws.STREAMS[name]


def expect_the_draws_of_the_host(
    device: str, seed: int, epoch: int, index: Tensor, rows: Tensor, **options: Any
) -> None:
    there = mix_draws_on_device(
        seed, epoch, poisoned(index, device), rows=poisoned(rows, device), **options
    )
    here = draws.mix_draws(seed, epoch, index.numpy(), rows=rows.numpy(), **options)
    assert (there.shift is None) == (here.shift is None)
    for name in ("flip", "shift", "donor", "patch", "tie"):
        tensor, array = getattr(there, name), getattr(here, name)
        if array is not None:
            assert tensor.cpu().numpy().dtype == array.dtype, name
            np.testing.assert_array_equal(tensor.cpu().numpy(), array, err_msg=name)


@functools.cache
def batch(n: int, pool_rows: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(n)
    index = torch.from_numpy(rng.integers(0, 2**56, n))
    return index, torch.from_numpy(rng.permutation(pool_rows)[:n])


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    n=st.sampled_from([1, 2, 17, 129]),
    group=st.sampled_from([0, 1, 2, 5, 64]),
    position=st.sampled_from(["inside", "clipped"]),
    probability=st.sampled_from([0.0, 2.0**-24, 0.3, 0.5, 1.0]),
    flip=st.booleans(),
    pad=st.sampled_from([0, 1, 4]),
    shape=st.sampled_from([(4, 4, 1), (5, 9, 5), (33, 17, 16), (224, 224, 112)]),
)
def test_the_device_draws_what_the_host_draws(
    device: str,
    seed: int,
    epoch: int,
    n: int,
    shape: tuple[int, int, int],
    group: int,
    **options: Any,
) -> None:
    pool_rows = n if group else n + n // 2  # a pool of one row has nobody to donate
    index, rows = batch(n, pool_rows)
    options |= {"pool_rows": pool_rows, "group": group, "size": shape[:2], "patch": shape[2]}
    with poisoned_allocations():
        expect_the_draws_of_the_host(device, seed, epoch, index, rows, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_nobody_draws_for_an_empty_batch(device: str) -> None:
    none = torch.empty(0, dtype=torch.int64)
    options: dict[str, Any] = {"pool_rows": 7, "group": 0, "size": (4, 4), "patch": 2}
    expect_the_draws_of_the_host(device, 0, 0, none, none, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"epoch": 2**32}, ValueError, "epoch must be in"),
        ({"pad": -1}, ValueError, "group and pad must be 0 or more, got 0 and -1"),
        ({"patch": 5}, ValueError, r"patch must be in 1 \.\. 4"),
        ({"position": "outside"}, ValueError, "position must be inside or clipped"),
        ({"probability": 1.5}, ValueError, "probability must be in"),
        ({"rows": torch.zeros(2)}, TypeError, "rows must be int64"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, ValueError, "rows must have shape"),
        (
            {"index": torch.zeros(2).long().to("meta"), "rows": torch.zeros(2).long().to("meta")},
            ValueError,
            "mix_draws cannot run here",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    two = torch.zeros(2, dtype=torch.int64)
    arguments: dict[str, Any] = {"seed": 0, "epoch": 0, "index": two, "rows": two, "pool_rows": 2}
    arguments |= {"group": 0, "size": (4, 4), "patch": 2}
    with pytest.raises(error, match=message):
        mix_draws_on_device(**arguments | changes)
