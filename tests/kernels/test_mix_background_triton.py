"""The Triton form of mix_background: the bits of its meaning, interpreted or on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backmix.kernels import configs, dispatch
from backmix.kernels import mix_background as module
from backmix.kernels.configs import MixBackgroundBlocks
from backmix.kernels.mix_background import mix_background
from tests.kernels.mix_cases import WHOLE, Case, ints, random_case, random_patches
from tests.kernels.support import DEVICES, UGLY, Guarded, poisoned, poisoned_allocations

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
SIDES = [(32, 32), (33, 47), (37, 21), *zip(UGLY, reversed(UGLY), strict=True), (2, 64)]
GRIDS = [(1, 1), (4, 4), (7, 7), (4, 3), (2, 8)]  # a 16 x 16 sort is slow to interpret
MODES = ["cam", "cam", "inverse", "none", "grey"]
FILLS = [None, (0, 127.5, 300), "keep", "each"]
PADS = [(0, 0, 0), (1.5, 2.5, -7), "reflect"]


@pytest.fixture(autouse=True)
def _one_program_an_image(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels are interpreted, cost is by the operation: one large block is far quicker."""
    if not dispatch.INTERPRETED or "blocks" in request.node.name:
        return

    def large(n: int, height: int, width: int, itemsize: int) -> MixBackgroundBlocks:
        columns = 1 << max(4, (3 * width - 1).bit_length())
        rows = min(1 << (height - 1).bit_length(), 2**18 // columns)
        return MixBackgroundBlocks(columns, rows, unroll=1, steps=1, warps=4)

    monkeypatch.setattr(configs, "mix_background_blocks", large)


def expect_same_bits(case: Case, device: str, **changes: Any) -> None:
    """Run both forms: the kernel on poisoned copies there, into a guarded output."""
    expected = case.mixed(backend="torch", **changes)
    there = case.map(lambda tensor: poisoned(tensor, device))
    changes = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in changes.items()}
    guarded = Guarded(tuple(expected.shape), expected.stride(), expected.dtype, device)
    assert there.mixed(backend="triton", out=guarded.out, **changes) is guarded.out
    guarded.expect_guards_untouched()
    assert guarded.out.cpu().equal(expected)


def any_options(seed: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    while True:
        chosen = [choices[rng.integers(len(choices))] for choices in (MODES, FILLS, PADS)]
        mode, fill, pad = chosen
        if fill == "each":
            fill = torch.from_numpy(rng.random((3, 3), np.float32) * 300 - 20)
        options: dict[str, Any] = {"mode": mode, "fill": fill, "pad": pad}
        if rng.random() < 0.3:
            options["shift"] = None
        yield options


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES, ids=str)
def test_every_size_gives_the_meanings_bits(
    side: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    seed = 1000 * side[0] + 10 * side[1] + DTYPES.index(dtype)
    options = any_options(seed)
    for turn in range(2):
        case = random_case(seed + turn, side=side, grid=GRIDS[(seed + turn) % len(GRIDS)])
        expect_same_bits(case, device, dtype=dtype, **next(options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_written_and_lies_as_the_meanings(dtype: torch.dtype, device: str) -> None:
    case = random_case(2)
    expected = case.mixed(backend="torch", dtype=dtype)
    there = case.map(lambda tensor: tensor.to(device))
    with poisoned_allocations():
        out = there.mixed(backend="triton", dtype=dtype)
    assert out.cpu().equal(expected) and out.stride() == expected.stride()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("fill", "pad"),
    list(itertools.product(["none", "colour", "keep", "each"], ["colour", "reflect"])),
)
def test_every_option_gives_the_meanings_bits(fill: Any, pad: Any, device: str) -> None:
    fill = {"none": None, "colour": (255, 0.3, -9), "keep": "keep", "each": torch.rand(3, 3)}[fill]
    pad = (9, 200, 0.7) if pad == "colour" else pad
    for mode, shifted in itertools.product(["cam", "inverse", "none", "grey"], [True, False]):
        case = random_case(len(mode) + shifted, fill=fill, pad=pad, mode=mode)
        case.options["shift"] = case.options["shift"] if shifted else None
        dtype = torch.float32 if shifted else torch.bfloat16
        expect_same_bits(case, device, dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grid", [(16, 16), (5, 16), (9, 2)])
def test_large_grids_give_the_meanings_bits(grid: tuple[int, int], device: str) -> None:
    patch = ints([(0, 0, 0, 0, 19, 23)])
    case = random_case(5, n=1, side=(19, 23), grid=grid, patch=patch, shift=None)
    case.options["mask_cells"] = grid[0] * grid[1] // 3
    expected = case.mixed(backend="torch")
    there = case.map(lambda tensor: tensor.to(device))
    assert there.mixed(backend="triton").cpu().equal(expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 11, 12])
@pytest.mark.parametrize("mode", ["cam", "inverse"])
def test_any_number_of_cells_is_masked(mode: str, count: int, device: str) -> None:
    for seed in range(2):
        expect_same_bits(random_case(seed), device, mode=mode, mask_cells=count)


SPECIAL = [
    [0.5] * 12,
    [torch.nan] * 12,
    [torch.nan, -torch.inf, torch.inf, 0.0, -0.0, 1e-40, -1e-40, 6e-8, -6e-8, 65504, -65504, 1],
    [0.0, -0.0] * 6,
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_special_heats_are_ordered_as_the_meaning_orders_them(
    dtype: torch.dtype, device: str
) -> None:
    n = len(SPECIAL)
    patch = ints([(0, 0, 0, 0, 9, 7)] * n)
    case = random_case(3, n=n, patch=patch, box=ints([WHOLE] * n), shift=None)
    case.options |= {"bank": torch.tensor(SPECIAL).view(n, 4, 3).to(dtype), "mask_cells": 5}
    case.options["bank_row"] = torch.arange(n)
    for mode in ("cam", "inverse"):
        expect_same_bits(case, device, mode=mode)


BOXES = [WHOLE, (0, 0, 1, 1), (65535, 65535, 1, 1), (0, 30000, 65536, 35536), (9, 9, 300, 50000)]


@pytest.mark.parametrize("device", DEVICES)
def test_boxes_at_every_edge_read_the_meanings_cells(device: str) -> None:
    n = len(BOXES)
    patch = ints([(0, 0, 0, 0, 9, 7)] * n)
    case = random_case(4, n=n, patch=patch, box=ints(BOXES), mask_cells=5)
    expect_same_bits(case, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pad", [(1, 2, 3), "reflect"])
def test_one_hot_corner_is_found_after_every_flip_and_shift(pad: Any, device: str) -> None:
    moves = list(itertools.product([False, True], [-4, 0, 4, -40], [-3, 0, 3, 40]))
    n = len(moves)
    bank = torch.zeros(1, 4, 3)
    bank[0, 0, 2] = 1
    patch = ints([(0, 0, 0, 0, 9, 7)] * n)
    case = random_case(6, n=n, patch=patch, box=ints([WHOLE] * n), pad=pad, mask_cells=1)
    case.options |= {"bank": bank, "bank_row": torch.zeros(n, dtype=torch.int64)}
    case.options["flip"] = torch.tensor([flip for flip, _, _ in moves])
    case.options["shift"] = ints([move[1:] for move in moves])
    expect_same_bits(case, device)


PATCHES = [
    (0, 0, 0, 0, 0, 0),
    (3, 2, 5, 4, 0, 3),
    (3, 2, 5, 4, 3, 0),
    (8, 6, 0, 0, 1, 1),
    (0, 0, 8, 6, 1, 1),
    (8, 0, 2, 0, 1, 7),
    (0, 6, 0, 1, 9, 1),
    (0, 0, 0, 0, 9, 7),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("moved", [True, False])
def test_windows_of_every_kind_end_where_they_should_in_all_blocks(
    moved: bool, device: str
) -> None:
    n = len(PATCHES)
    case = random_case(7, n=n, patch=ints(PATCHES))
    case.options["shift"] = case.options["shift"] if moved else None
    expect_same_bits(case, device)
    # The same in pieces: a program of few rows and columns meets or misses each window.
    expect_any_blocks_give_the_same_bits(case, device)


def expect_any_blocks_give_the_same_bits(case: Case, device: str) -> None:
    expected = case.mixed(backend="torch")
    there = case.map(lambda tensor: tensor.to(device))
    for blocks in (
        MixBackgroundBlocks(columns=16, rows=2, unroll=1, steps=1, warps=1),
        MixBackgroundBlocks(columns=8, rows=1, unroll=2, steps=2, warps=1),
        MixBackgroundBlocks(columns=32, rows=4, unroll=2, steps=1, warps=4),
    ):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(configs, "mix_background_blocks", lambda *_, b=blocks: b)
            assert there.mixed(backend="triton").cpu().equal(expected), blocks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pad", [(1, 2, 3), "reflect"])
def test_block_sizes_do_not_matter(pad: Any, device: str) -> None:
    expect_any_blocks_give_the_same_bits(random_case(8, n=2, pad=pad), device)


@pytest.mark.parametrize("device", DEVICES)
def test_the_shipped_blocks_give_the_meanings_bits(device: str) -> None:
    patch = ints([(50, 100, 13, 70, 112, 112)])
    case = random_case(9, n=1, side=(224, 224), grid=(7, 7), patch=patch, shift=None)
    case.options["mask_cells"] = 14
    for flip in (False, True):
        expect_same_bits(case, device, flip=torch.tensor([flip]), dtype=torch.float16)


# --- what a caller may do ------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_batch_is_made_without_a_launch(dtype: torch.dtype, device: str) -> None:
    case = random_case(10, n=0)
    empty = replace(case, pool=torch.empty(0, 9, 7, 3, dtype=torch.uint8))
    there = empty.map(lambda tensor: tensor.to(device))
    out = there.mixed(backend="triton", dtype=dtype)
    assert out.shape == ((0, 9, 7, 3) if dtype == torch.uint8 else (0, 3, 9, 7))
    assert out.stride() == random_case(10).mixed(dtype=dtype).stride()
    assert there.mixed(backend="triton", dtype=dtype, out=out) is out


@pytest.mark.parametrize("device", DEVICES)
def test_draws_may_be_slices_of_larger_tensors(device: str) -> None:
    case = random_case(11, fill=torch.rand(3, 3).requires_grad_())
    expected = case.mixed(backend="torch")

    def sliced(tensor: Tensor) -> Tensor:
        wide = torch.stack((tensor, tensor), -1)[..., 0]
        return wide if len(tensor) == 3 and not wide.is_contiguous() else tensor

    there = case.map(lambda tensor: sliced(tensor.to(device)))
    assert not there.options["patch"].is_contiguous() and not there.target.is_contiguous()
    out = there.mixed(backend="triton")
    assert out.cpu().equal(expected) and not out.requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_a_pool_that_starts_anywhere_gives_the_same_bits(device: str) -> None:
    case = random_case(12)
    expected = case.mixed(backend="torch")
    memory = torch.zeros(case.pool.numel() + 1, dtype=torch.uint8, device=device)
    there = case.map(lambda tensor: tensor.to(device))
    there.pool = memory[1:].view(case.pool.shape).copy_(case.pool)
    assert there.mixed(backend="triton").cpu().equal(expected)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_beyond_2_to_the_31_bytes_are_found(device: str) -> None:
    side = 64
    rows = 2**31 // (3 * side * side) + 3
    pool = torch.empty(rows, side, side, 3, dtype=torch.uint8, device=device)  # of zeros, unread
    few = torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8)
    places = torch.tensor([0, rows - 2, rows - 1])
    for place, image in zip(places.tolist(), few, strict=True):
        pool[place] = image.to(device)
    patch = random_patches(np.random.default_rng(13), 3, side, side)
    case = random_case(13, side=(side, side), patch=patch)
    case = replace(case, pool=few, target=torch.tensor([1, 2, 0]), donor=torch.tensor([2, 0, 1]))
    expected = case.mixed(backend="torch")
    far = replace(case, target=places[case.target], donor=places[case.donor])
    far = replace(far.map(lambda t: t.to(device) if t is not far.pool else t), pool=pool)
    assert far.mixed(backend="triton").cpu().equal(expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_alone_gives_the_same_bits_and_so_does_a_second_call(device: str) -> None:
    case = random_case(14, n=3).map(lambda tensor: tensor.to(device))
    together = case.mixed(backend="triton")
    assert case.mixed(backend="triton").equal(together)
    names = ("bank_row", "box", "patch", "flip", "shift", "tie")
    for s in range(3):
        options = {k: v[s : s + 1] if k in names else v for k, v in case.options.items()}
        alone = Case(case.pool, case.target[s : s + 1], case.donor[s : s + 1], options)
        assert alone.mixed(backend="triton").equal(together[s : s + 1])


def test_without_an_interpreter_the_wish_for_triton_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="Triton form of mix_background cannot run here"):
        random_case(15).mixed(backend="triton")


# --- torch.compile -------------------------------------------------------------------------------


def arguments(case: Case, out: Tensor) -> tuple[Any, ...]:
    """Return the arguments of the custom operator for a case without options."""
    o = case.options
    per_sample = (o["bank"], o["bank_row"], o["box"], o["patch"], o["flip"], o["shift"], o["tie"])
    mean, std = list(o["mean"]), list(o["std"])
    colours = (mean, std, None, mean, [0.0, 0.0, 0.0])
    return out, case.pool, case.target, case.donor, *per_sample, 3, False, *colours


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_is_what_it_says(device: str) -> None:
    case = random_case(16).map(lambda tensor: tensor.to(device))
    out = torch.empty_like(case.mixed(backend="torch"))
    torch.library.opcheck(module._mix_background_op, arguments(case, out))
    without = list(arguments(case, out))
    without[9] = None  # no shift
    without[15:18] = [torch.rand(3, 3, device=device), None, None]  # a fill each, mirrored
    torch.library.opcheck(module._mix_background_op, tuple(without))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("given", [False, True])
def test_a_compiled_function_mixes_without_a_break(
    dtype: torch.dtype, given: bool, device: str
) -> None:
    torch.compiler.reset()

    def mixed(pool: Tensor, target: Tensor, donor: Tensor, options: dict[str, Any]) -> Tensor:
        out = mix_background(pool, target, donor, backend="triton", dtype=dtype, **options)
        return out + 1

    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    for n in (3, 5):  # the second time with a size that may vary
        case = random_case(17, n=n).map(lambda tensor: tensor.to(device))
        plain = case.mixed(dtype=dtype, backend="triton")
        if given:
            case.options["out"] = torch.empty_like(plain)
        out = compiled(case.pool, case.target, case.donor, case.options)
        assert out.equal(plain + 1)
        assert out.stride() == plain.stride()
        assert not given or case.options["out"].equal(plain)


def test_the_output_under_fake_tensors_has_the_real_strides() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = random_case(18)
    for dtype in DTYPES:
        real = case.mixed(dtype=dtype)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = module._empty_output(3, case.pool, dtype)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


# --- only on a GPU -------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_runs_the_kernel_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(19).map(lambda tensor: tensor.to("cuda"))
    expected = case.mixed(backend="torch")
    monkeypatch.setattr(module, "mix_background_meaning", None)
    assert case.mixed().equal(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_batch_has_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(20)
    n, side = 64, 224
    case = random_case(20, n=n, side=(side, side), grid=(7, 7), mask_cells=14)
    case.options["patch"] = random_patches(rng, n, side, side)
    for shift in (None, case.options["shift"]):
        expected = case.mixed(dtype=dtype, shift=shift)
        there = case.map(lambda tensor: tensor.to("cuda"))
        assert (
            there.mixed(dtype=dtype, shift=None if shift is None else shift.cuda())
            .cpu()
            .equal(expected)
        )


@pytest.mark.gpu
def test_offsets_of_16384_images_do_not_overflow() -> None:
    n = 16_384
    if torch.cuda.mem_get_info()[0] < 9e9:
        pytest.skip("needs 9 GB of free GPU memory")
    pool = torch.randint(0, 256, (n, 224, 224, 3), dtype=torch.uint8, device="cuda")
    case = random_case(21, n=n, side=(224, 224), grid=(7, 7), shift=None).map(lambda t: t.cuda())
    rows = torch.arange(n, device="cuda")
    case = replace(case, pool=pool, target=rows, donor=rows.flip(0))
    out = case.mixed(dtype=torch.bfloat16)
    for s in (0, 1, n // 2, n - 2, n - 1):
        names = ("bank_row", "box", "patch", "flip", "tie")
        options = {k: v[s : s + 1].cpu() if k in names else v for k, v in case.options.items()}
        options["bank"] = case.options["bank"].cpu()
        few = pool[[s, n - 1 - s]].cpu()
        alone = Case(few, torch.tensor([0]), torch.tensor([1]), options)
        assert out[s : s + 1].cpu().equal(alone.mixed(dtype=torch.bfloat16))


@pytest.mark.gpu
def test_a_graph_can_be_captured_and_replayed() -> None:
    case = random_case(22, n=16).map(lambda tensor: tensor.to("cuda"))
    out = case.mixed()  # compiles, before the capture
    expected = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.mixed(out=out)
    out.zero_()
    graph.replay()
    assert out.equal(expected)
