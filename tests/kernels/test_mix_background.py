"""mix_background against hand-worked cases, a slow second formula, and what must always hold."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backmix.kernels import mix_background as module
from backmix.kernels.mix_background import box_fractions, mask_views, view_heat
from tests.kernels.mix_cases import MEAN, STD, WHOLE, Case, ints, random_case
from tests.kernels.support import NoWaiting, waiting_is_an_error

# --- the second formula: loops, Python integers, written from the definition ---------------------


def slow_hash(word: int) -> int:
    word ^= word >> 16
    word = word * 0x7FEB352D % 2**32
    word ^= word >> 15
    word = word * 0x846CA68B % 2**32
    return word ^ word >> 16


def slow_key(value: float, tie: int, i: int, j: int) -> tuple[bool, float, int]:
    heat = -np.inf if np.isnan(value) else float(value)
    number = 16 * i + j
    draw = slow_hash((tie + slow_hash(number)) % 2**32)
    return (not np.isnan(value), heat, (draw & ~255) | number)  # NaN below -inf


def slow_masked(case: Case, sample: int, mode: str) -> set[tuple[int, int]]:
    o = case.options
    bank = o["bank"].float().numpy()
    g, g2 = bank.shape[1:]
    y0, x0, bh, bw = o["box"][sample].tolist()
    keys = {}
    for i in range(g):
        for j in range(g2):
            r = min(max((2 * g * y0 + (2 * i + 1) * bh) // 2**17, 0), g - 1)
            c = min(max((2 * g2 * x0 + (2 * j + 1) * bw) // 2**17, 0), g2 - 1)
            value = bank[o["bank_row"][sample], r, c]
            keys[i, j] = slow_key(value, o["tie"][sample].item(), i, j)
    order = sorted(keys, key=lambda cell: keys[cell], reverse=mode != "inverse")
    count = {"none": 0, "grey": g * g2}.get(mode, o["mask_cells"])
    return set(order[:count])


def slow_reflect(position: int, side: int) -> int:
    while not 0 <= position < side:
        if side == 1:
            return 0
        position = -position if position < 0 else 2 * (side - 1) - position
    return position


def slow_mix(case: Case, *, mode: str, fill: Any, pad: Any) -> np.ndarray:
    """Pixels before normalising, fp32 [n, H, W, 3]."""
    o, pool = case.options, case.pool.numpy().astype(np.float32)
    n, (height, width) = len(case.target), pool.shape[1:3]
    g, g2 = o["bank"].shape[1:]
    out = np.empty((n, height, width, 3), np.float32)
    for s in range(n):
        masked = slow_masked(case, s, mode)
        ty, tx, dy, dx, ph, pw = o["patch"][s].tolist()
        sy, sx = (0, 0) if o["shift"] is None else o["shift"][s].tolist()
        colour = o["mean"] if fill is None else fill[s] if isinstance(fill, Tensor) else fill
        for y in range(height):
            for x in range(width):
                yv, xf = y + sy, x + sx
                if pad == "reflect":
                    yv, xf = slow_reflect(yv, height), slow_reflect(xf, width)
                xv = width - 1 - xf if o["flip"][s] else xf
                if not (0 <= yv < height and 0 <= xv < width):
                    out[s, y, x] = pad
                    continue
                out[s, y, x] = pool[case.target[s], yv, xv]
                if ty <= yv < ty + ph and tx <= xv < tx + pw:
                    yd, xd = dy + yv - ty, dx + xv - tx
                    if (yd * g // height, xd * g2 // width) not in masked:
                        out[s, y, x] = pool[case.donor[s], yd, xd]
                    elif not isinstance(fill, str):
                        out[s, y, x] = colour
    return out


def slow_output(pixels: np.ndarray, dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        return torch.from_numpy(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    inverse = (1 / np.array(STD)).astype(np.float32)
    values = (pixels - np.array(MEAN, np.float32)) * inverse
    return torch.from_numpy(values).permute(0, 3, 1, 2).to(dtype)


FILLS = st.sampled_from([None, (0, 127.5, 300), "keep", "each"])
PADS = st.sampled_from([(0, 0, 0), (1.5, 2.5, -7), "reflect"])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8])


@settings(max_examples=3 * settings().max_examples)
@given(
    seed=st.integers(0, 2**20),
    side=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    grid=st.tuples(st.integers(1, 16), st.integers(1, 16)) | st.just((2, 3)),
    mode=st.sampled_from(["cam", "cam", "inverse", "none", "grey"]),
    fill=FILLS,
    pad=PADS,
    shifted=st.booleans(),
    dtype=DTYPES,
)
def test_every_pixel_is_what_the_definition_says(
    seed: int,
    side: tuple[int, int],
    grid: tuple[int, int],
    mode: str,
    fill: Any,
    pad: Any,
    shifted: bool,
    dtype: torch.dtype,
) -> None:
    case = random_case(seed, side=side, grid=grid)
    if not shifted:
        case.options["shift"] = None
    if fill == "each":
        fill = torch.from_numpy(np.random.default_rng(seed).random((3, 3), np.float32) * 255)
    out = case.mixed(mode=mode, fill=fill, pad=pad, dtype=dtype, check=True)
    expected = slow_output(slow_mix(case, mode=mode, fill=fill, pad=pad), dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


# --- hand-worked ---------------------------------------------------------------------------------


def worked() -> Case:
    """A 4 x 4 target of 10s, a donor with pixel (y, x) = 100 + 4 y + x, and a 2 x 2 map."""
    donor = (100 + torch.arange(16)).view(4, 4, 1).expand(4, 4, 3)
    return Case(
        torch.stack((torch.full((4, 4, 3), 10), donor)).to(torch.uint8),
        torch.tensor([0]),
        torch.tensor([1]),
        {
            "bank": torch.tensor([[[0.1, 0.9], [0.2, 0.3]]]),
            "bank_row": torch.tensor([0]),
            "box": ints([WHOLE]),
            "patch": ints([(1, 1, 0, 1, 2, 2)]),
            "flip": torch.tensor([True]),
            "shift": ints([(1, -1)]),
            "tie": ints([0]),
            "mask_cells": 1,
            "mean": (0, 0, 0),
            "std": (1, 1, 1),
            "fill": (77, 77, 77),
            "pad": (5, 5, 5),
        },
    )


F, P = 77.0, 5.0


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, [[P, 10, F, 101], [P, 10, F, 105], [P, 10, 10, 10], [P, P, P, P]]),
        (
            {"shift": None},
            [[10, 10, 10, 10], [10, F, 101, 10], [10, F, 105, 10], [10, 10, 10, 10]],
        ),
        (
            {"shift": None, "flip": torch.tensor([False])},
            [[10, 10, 10, 10], [10, 101, F, 10], [10, 105, F, 10], [10, 10, 10, 10]],
        ),
        # Mirrored rows 1, 2, 3, 2 and columns 1, 0, 1, 2 of the flipped mix.
        (
            {"pad": "reflect"},
            [[F, 10, F, 101], [F, 10, F, 105], [10, 10, 10, 10], [F, 10, F, 105]],
        ),
        # The coolest cell is (0, 0): the donor's column 1 of rows 0 and 1.
        ({"mode": "inverse"}, [[P, 10, 102, F], [P, 10, 106, F], [P, 10, 10, 10], [P, P, P, P]]),
        ({"mode": "none"}, [[P, 10, 102, 101], [P, 10, 106, 105], [P, 10, 10, 10], [P, P, P, P]]),
        ({"mode": "grey"}, [[P, 10, F, F], [P, 10, F, F], [P, 10, 10, 10], [P, P, P, P]]),
        ({"fill": "keep"}, [[P, 10, 10, 101], [P, 10, 10, 105], [P, 10, 10, 10], [P, P, P, P]]),
    ],
    ids=["all", "no shift", "nothing moved", "reflect", "inverse", "none", "grey", "keep"],
)
def test_the_worked_example(changes: dict[str, Any], rows: list[list[float]]) -> None:
    out = worked().mixed(**changes)
    assert out[0].tolist() == [rows, rows, rows]


def test_the_bank_is_read_through_the_box() -> None:
    bank = torch.arange(16.0).view(1, 4, 4)
    box = box_fractions(ints([(2, 0, 4, 8)]), ints([(8, 8)]))
    heat = view_heat(bank, torch.tensor([0]), box)
    assert heat[0].tolist() == [[4, 5, 6, 7], [4, 5, 6, 7], [8, 9, 10, 11], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("mode", "count", "masked"),
    [
        ("cam", 2, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]),
        ("cam", 6, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]),
        ("cam", 10, [[0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
        ("inverse", 4, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_the_donors_map_is_seen_through_its_box(
    mode: Any, count: int, masked: list[list[int]]
) -> None:
    # Stored 8 x 8, crop (2, 0, 4, 8): the view's cells hold rows 4..7, 4..7, 8..11, 8..11.
    bank = torch.arange(16.0).view(1, 4, 4)
    box = box_fractions(ints([(2, 0, 4, 8)]), ints([(8, 8)]))
    seen = mask_views(bank, torch.tensor([0]), box, ints([0]), count, mode)
    assert seen[0].int().tolist() == masked


def test_a_filled_pixel_is_exactly_zero_by_default_and_the_mean_elsewhere() -> None:
    case = random_case(0, patch=ints([(0, 0, 0, 0, 9, 7)] * 3), shift=None, mode="grey")
    assert case.mixed().eq(0).all()
    assert case.mixed(dtype=torch.uint8)[0, 0, 0].tolist() == [124, 116, 104]


def test_colours_of_bytes_are_rounded_half_to_even_and_cut_off() -> None:
    case = worked()
    grey = {"mode": "grey", "dtype": torch.uint8}
    mix = case.mixed(fill=(-3, 126.5, 300), pad=(254.5, -0.6, 255.6), **grey)
    assert mix[0, 0, 2].tolist() == [0, 126, 255]
    assert mix[0, 0, 0].tolist() == [254, 0, 255]


# --- what must always hold -----------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_patches_reach_the_last_row_and_column(flip: bool) -> None:
    case = random_case(
        1,
        n=1,
        patch=ints([(7, 5, 7, 5, 2, 2)]),
        flip=torch.tensor([flip]),
        shift=None,
        mode="none",
        dtype=torch.uint8,
    )
    out = case.mixed()[0]
    out = out.flip(1) if flip else out
    assert out[-2:, -2:].equal(case.pool[case.donor[0], -2:, -2:])
    assert out[:-2].equal(case.pool[case.target[0], :-2])
    assert out[:, :-2].equal(case.pool[case.target[0], :, :-2])


def test_without_a_patch_it_is_plain_augmentation() -> None:
    case = random_case(2, patch=ints([(0, 0, 0, 0, 0, 0)] * 3), dtype=torch.uint8)
    flipped = torch.where(
        case.options["flip"][:, None, None, None],
        case.pool[case.target].flip(2),
        case.pool[case.target],
    )
    padded = torch.nn.functional.pad(flipped, (0, 0, 4, 4, 4, 4))
    for sample, (sy, sx) in enumerate(case.options["shift"].tolist()):
        expected = padded[sample, 4 + sy : 13 + sy, 4 + sx : 11 + sx]
        assert case.mixed()[sample].equal(expected)


def test_all_cells_masked_equals_grey_and_no_cell_equals_none() -> None:
    case = random_case(3)
    assert case.mixed(mask_cells=12).equal(case.mixed(mode="grey"))
    assert case.mixed(mask_cells=0).equal(case.mixed(mode="none"))
    assert not case.mixed(mask_cells=0).equal(case.mixed(mask_cells=12))


@given(seed=st.integers(0, 2**20), count=st.integers(0, 12))
def test_the_hottest_and_the_coolest_cells_together_are_all_cells(seed: int, count: int) -> None:
    o = random_case(seed, n=8).options
    arguments = (o["bank"], o["bank_row"], o["box"], o["tie"])
    hottest = mask_views(*arguments, count)
    coolest = mask_views(*arguments, 12 - count, "inverse")
    assert (hottest ^ coolest).all()
    assert hottest.sum((1, 2)).tolist() == [count] * 8


def test_nan_is_the_coolest_value_and_the_zeros_are_equal() -> None:
    bank = torch.tensor([[[torch.nan, -torch.inf], [-2.0, torch.nan]]])
    nan = mask_views(bank, torch.tensor([0]), ints([WHOLE]), ints([7]), 2)
    assert nan[0].tolist() == [[False, True], [True, False]]
    ties = torch.arange(64, dtype=torch.int32)
    zeros, box = torch.zeros(64, dtype=torch.int64), ints([WHOLE]).expand(64, 4)
    mixed_signs = torch.tensor([[[0.0, -0.0], [-0.0, 0.0]]])
    one_sign = torch.zeros(1, 2, 2)
    assert mask_views(mixed_signs, zeros, box, ties, 2).equal(
        mask_views(one_sign, zeros, box, ties, 2)
    )


def test_ties_fall_on_every_cell_alike() -> None:
    n = 10_000
    ties = torch.arange(n, dtype=torch.int32)  # neighbouring words, the worst case for the hash
    bank, row = torch.full((1, 4, 4), 0.5), torch.zeros(n, dtype=torch.int64)
    masked = mask_views(bank, row, ints([WHOLE]).expand(n, 4), ties, 1)
    count = masked.sum(0).flatten().double()
    chi_square = ((count - n / 16) ** 2 / (n / 16)).sum()
    assert chi_square < 44.3  # 15 degrees of freedom, one in 10,000
    assert masked.equal(mask_views(bank, row, ints([WHOLE]).expand(n, 4), ties, 1))


def test_a_sample_alone_gives_the_same_bits() -> None:
    case = random_case(4, n=5)
    together = case.mixed()
    per_sample = ("bank_row", "box", "patch", "flip", "shift", "tie")
    for s in range(5):
        options = {k: v[s : s + 1] if k in per_sample else v for k, v in case.options.items()}
        alone = Case(case.pool, case.target[s : s + 1], case.donor[s : s + 1], options).mixed()
        assert alone.equal(together[s : s + 1])


def test_reading_changes_nothing() -> None:
    case = random_case(5)
    before = case.map(Tensor.clone)
    case.mixed()
    assert case.pool.equal(before.pool)
    bank = case.options["bank"]
    assert bank.view(torch.int16).equal(before.options["bank"].view(torch.int16))


@pytest.mark.parametrize("pad", [(9, 8, 7), "reflect"])
def test_mixing_first_and_augmenting_later_gives_the_same_image(pad: Any) -> None:
    case = random_case(6, pad=pad, fill=(1, 2, 3))
    still = {"flip": torch.zeros(3, dtype=torch.bool), "shift": None}
    mix = case.mixed(dtype=torch.uint8, **still)
    rows = torch.arange(3)
    later = replace(case, pool=mix, target=rows, donor=rows)
    assert later.mixed(patch=torch.zeros(3, 6, dtype=torch.int32)).equal(case.mixed())


@pytest.mark.parametrize(
    ("dtype", "strides"),
    [
        (torch.float32, (189, 1, 21, 3)),
        (torch.float16, (189, 1, 21, 3)),
        (torch.uint8, (189, 21, 3, 1)),
    ],
)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_images_lie_channels_last(n: int, dtype: torch.dtype, strides: tuple[int, ...]) -> None:
    out = random_case(7, n=n).mixed(dtype=dtype, check=True)
    assert out.dtype == dtype
    assert out.shape == ((n, 9, 7, 3) if dtype == torch.uint8 else (n, 3, 9, 7))
    assert out.stride() == strides


def test_an_empty_batch_needs_neither_pool_nor_bank() -> None:
    case = random_case(8, n=0)
    empty = replace(case, pool=torch.empty(0, 9, 7, 3, dtype=torch.uint8))
    assert empty.mixed(bank=torch.empty(0, 4, 3)).shape == (0, 3, 9, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_out_is_filled_and_returned(dtype: torch.dtype) -> None:
    case = random_case(9, dtype=dtype)
    expected = case.mixed()
    memory = torch.full((5, 9, 16, 3), 77, dtype=dtype)  # guards before, between and behind
    assert expected.numel() == 3 * 189
    whole = memory.view(-1)[16 : 16 + 3 * 189]
    nhwc = whole.view(3, 9, 7, 3)
    out = nhwc if dtype == torch.uint8 else nhwc.permute(0, 3, 1, 2)
    assert case.mixed(out=out) is out
    assert out.equal(expected)
    assert memory.view(-1)[:16].eq(77).all() and memory.view(-1)[16 + 3 * 189 :].eq(77).all()


def test_gradients_do_not_flow() -> None:
    assert not random_case(10, fill=torch.ones(3, 3, requires_grad=True)).mixed().requires_grad


# --- other devices -------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [None, "keep", (1, 2, 3), "each"])
@pytest.mark.parametrize("pad", [(0, 0, 0), "reflect"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_no_value_is_read_on_a_device(fill: Any, pad: Any, dtype: torch.dtype) -> None:
    fill = torch.ones(3, 3) if fill == "each" else fill
    # Meta tensors have no values: whatever needs one fails.
    case = random_case(11, fill=fill, pad=pad, dtype=dtype).map(lambda t: t.to("meta"))
    with NoWaiting():
        out = case.mixed()
    assert out.device.type == "meta"
    assert out.stride() == random_case(11, dtype=dtype).mixed().stride()


@given(seed=st.integers(0, 2**20), fill=FILLS, pad=PADS, dtype=DTYPES)
def test_the_form_for_devices_gives_the_same_bits(
    seed: int, fill: Any, pad: Any, dtype: torch.dtype
) -> None:
    fill = torch.ones(3, 3) * 9.5 if fill == "each" else fill
    case = random_case(seed, fill=fill, pad=pad, dtype=dtype)
    expected = case.mixed()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_reading_is_free", lambda tensor: False)
        assert case.mixed().equal(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_a_gpu_gives_the_same_bits_and_never_waits(dtype: torch.dtype) -> None:
    case = random_case(12, n=16, dtype=dtype)
    there = case.map(lambda t: t.to("cuda"))
    with waiting_is_an_error():
        out = there.mixed()
    assert out.cpu().equal(case.mixed())


# --- boxes ---------------------------------------------------------------------------------------


@given(data=st.data(), height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_box_fractions_are_the_nearest_65536ths(
    data: st.DataObject, height: int, width: int
) -> None:
    y0, x0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    h, w = data.draw(st.integers(1, height - y0)), data.draw(st.integers(1, width - x0))
    got = box_fractions(ints([(y0, x0, h, w)]), ints([(height, width)]))
    assert got.dtype == torch.int32
    sides = (height, width, height, width)
    for fraction, pixels, side in zip(got[0].tolist(), (y0, x0, h, w), sides, strict=True):
        assert abs(Fraction(fraction) - Fraction(pixels * 65536, side)) <= Fraction(1, 2)


def test_the_whole_image_is_65536_whatever_its_size() -> None:
    sizes = ints([(1, 7), (333, 500), (65535, 31)])
    boxes = torch.cat((torch.zeros_like(sizes), sizes), 1)
    assert box_fractions(boxes, sizes).tolist() == [list(WHOLE)] * 3


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"patch": torch.zeros(3, 6)}, TypeError, "patch must be int32, got float32"),
        (
            {"patch": ints([[0] * 5] * 3)},
            ValueError,
            r"patch must have shape \[3, 6\], got \[3, 5\]",
        ),
        ({"tie": ints([1])}, ValueError, r"tie must have shape \[3\]"),
        ({"flip": ints([1, 0, 1])}, TypeError, "flip must be bool"),
        (
            {"bank": torch.zeros(6, 4, 3, dtype=torch.bfloat16)},
            TypeError,
            "bank must be float16 or",
        ),
        ({"bank": torch.zeros(6, 17, 3)}, ValueError, r"bank must have a grid of 1\.\.16"),
        ({"bank": torch.zeros(6, 3, 4).mT}, ValueError, "bank must be contiguous"),
        ({"bank": torch.zeros(6, 4, 3, device="meta")}, ValueError, "bank must be on cpu"),
        ({"bank_row": ints([0, 0, 0])}, TypeError, "bank_row must be int64"),
        ({"mask_cells": 13}, ValueError, r"mask_cells must be in 0\.\.12"),
        ({"mode": "gray"}, ValueError, "mode must be one of cam, inverse, none, grey"),
        ({"mask_cells": 2.0}, TypeError, "mask_cells must be an int, got float"),
        ({"mean": (1, 2)}, ValueError, "mean must be three finite floats"),
        ({"mean": 0.5}, ValueError, "mean must be three finite floats, got 0.5"),
        ({"std": 1}, ValueError, "std must be three finite floats, got 1"),
        ({"std": "abc"}, ValueError, "std must be three finite floats"),
        ({"std": (1, 0, 1)}, ValueError, "std must be above 0"),
        ({"fill": "gray"}, ValueError, "fill must be three floats or 'keep'"),
        ({"fill": (0, 0, float("nan"))}, ValueError, "fill must be three finite floats"),
        ({"fill": torch.zeros(2, 3)}, ValueError, r"fill must have shape \[3, 3\]"),
        ({"pad": "mirror"}, ValueError, "pad must be three floats or 'reflect'"),
        ({"dtype": torch.float64}, TypeError, "dtype must be float32 or bfloat16"),
        ({"out": torch.empty(3, 3, 9, 7)}, ValueError, "out must have strides"),
        ({"out": torch.empty(3, 9, 7, 3)}, ValueError, "out must have shape"),
        ({"shift": [(0, 0)] * 3}, TypeError, "shift must be a tensor, got list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        random_case(13).mixed(**changes)


def test_a_pool_that_is_no_pool_is_named() -> None:
    case = random_case(14)
    with pytest.raises(ValueError, match="pool must be contiguous"):
        replace(case, pool=case.pool.flip(0).mT.contiguous().mT).mixed()
    numpy_pool: Any = case.pool.numpy()
    with pytest.raises(TypeError, match="pool must be a tensor, got ndarray"):
        replace(case, pool=numpy_pool).mixed()
    row: Any = 0
    with pytest.raises(TypeError, match="target must be a tensor, got int"):
        replace(case, target=row).mixed()
    with pytest.raises(ValueError, match="target must have axes"):
        replace(case, target=torch.tensor(0)).mixed()
    with pytest.raises(TypeError, match="pool must be uint8, got float32"):
        replace(case, pool=case.pool.float()).mixed()
    with pytest.raises(ValueError, match=r"pool must have shape \[P, H, W, 3\]"):
        replace(case, pool=case.pool.permute(0, 3, 1, 2)).mixed()
    with pytest.raises(ValueError, match="target must have shape"):
        replace(case, target=case.target[None]).mixed()


@pytest.mark.parametrize(
    ("name", "sample", "value", "message"),
    [
        ("bank_row", 1, 6, r"bank_row\[1\] must be in 0\.\.5, got 6"),
        ("bank_row", 2, -1, r"bank_row\[2\] must be in 0\.\.5, got -1"),
        ("patch", 0, (8, 0, 0, 0, 2, 2), r"patch\[0\] must lie inside views of 9 x 7 pixels"),
        ("patch", 2, (0, 0, 0, 6, 2, 2), r"patch\[2\] must lie inside"),
        ("patch", 1, (0, 0, 0, 0, -1, 2), r"patch\[1\] must lie inside"),
        ("patch", 1, (-1, 0, 0, 0, 1, 1), r"patch\[1\] must lie inside"),
        ("box", 1, (0, 0, 0, 65536), r"box\[1\] must lie inside the image"),
        ("box", 0, (40000, 0, 40000, 65536), r"box\[0\] must lie inside the image"),
    ],
)
def test_check_names_the_first_bad_sample(name: str, sample: int, value: Any, message: str) -> None:
    case = random_case(15)
    changed = case.options[name].clone()
    changed[sample] = torch.tensor(value)
    with pytest.raises(ValueError, match=message):
        case.mixed(check=True, **{name: changed})


@pytest.mark.parametrize("row", [-1, 6])
def test_a_row_that_is_not_there_is_never_another_one(row: int) -> None:
    case = random_case(17, mask_cells=3)
    with pytest.raises(IndexError):
        case.mixed(bank_row=torch.tensor([0, row, 1]))
    with pytest.raises(IndexError):
        replace(case, target=torch.tensor([0, row, 1])).mixed()


def test_check_looks_at_pool_rows() -> None:
    case = random_case(16)
    with pytest.raises(ValueError, match=r"target\[1\] must be in 0\.\.4, got 5"):
        replace(case, target=torch.tensor([0, 5, 9])).mixed(check=True)
    with pytest.raises(ValueError, match=r"donor\[0\] must be in 0\.\.4, got -1"):
        replace(case, donor=torch.tensor([-1, 5, 9])).mixed(check=True)
