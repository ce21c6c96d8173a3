"""update_cam_bank's Triton form: the definition again, and what only a kernel can get wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backmix.kernels.configs import CamBankConfig
from backmix.kernels.update_cam_bank import _update_cam_bank_op, launch, update_cam_bank
from tests.kernels.support import DEVICES, UGLY, Guarded, poisoned
from tests.kernels.test_update_cam_bank import (
    MAP,
    WHOLE,
    Case,
    flat_maps,
    ints,
    random_case,
    slow_update,
    small_map,
    small_maps,
    worked,
    worked_examples,
)

# The interpreter computes with numpy, which warns where the kernel means an infinity or a NaN.
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]
BLOCKS = CamBankConfig(channels=16, unroll=1, warps=4)


def kernel(
    case: Case, device: str, *, config: CamBankConfig | None = None, **changes: Any
) -> Tensor:
    """Return the bank after the kernel; its neighbours in memory must be as they were."""

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dense = value.ndim and value.numel() and 0 not in value.stride()
        return poisoned(value, device) if dense else value.to(device)

    arguments = {name: there(value) for name, value in {**vars(case), **changes}.items()}
    options = {name: there(changes.get(name, v)) for name, v in arguments.pop("options").items()}
    bank = arguments.pop("bank")
    guarded = Guarded(tuple(bank.shape), bank.stride(), bank.dtype, device)
    guarded.out.copy_(bank)
    if config is None:
        update_cam_bank(guarded.out, **{**options, **arguments}, backend="triton")
    else:
        defaults = {"flip": None, "shift": None, "patch": None, "size": (1, 1)}
        defaults |= {"normalise": "image"}
        launch(guarded.out, **{**defaults, **options, **arguments}, config=config).run()
    guarded.expect_guards_untouched()
    return guarded.out.cpu()


def expect_the_definition(case: Case, got: Tensor, normalise: str = "image") -> None:
    expected, off = slow_update(case, normalise)
    error = np.abs(got.double().numpy() - expected)
    assert (error <= off).all(), f"off by {error.max():.3g}, allowed {off[error > off].min():.3g}"
    untouched = torch.from_numpy(off == 0)
    assert got[untouched].equal(case.bank[untouched])


# --- values --------------------------------------------------------------------------------------


@worked_examples
def test_the_worked_examples(device: str, options: dict[str, Any], bank: list[list[float]]) -> None:
    assert kernel(worked(MAP, **options), device)[0].tolist() == bank


@small_maps
def test_a_stored_cell_takes_the_cell_of_a_smaller_map_that_its_centre_lies_in(
    device: str, options: dict[str, Any], bank: list[list[float]]
) -> None:
    assert kernel(small_map(**options), device)[0].tolist() == bank


@flat_maps
def test_a_flat_map_says_one_half_everywhere(device: str, level: float, more: float) -> None:
    case = worked([[level, level + more], [level, level]], rate=1.0)
    case.bank.zero_()
    assert kernel(case, device).eq(0.5).all()


@pytest.mark.parametrize(("length", "seen"), [(32768, False), (32769, True)])
@pytest.mark.parametrize("side", [0, 1])
def test_a_box_that_ends_at_a_centre_does_not_show_it(
    device: str, length: int, seen: bool, side: int
) -> None:
    box = ints([(0, 0, 65536, length) if side else (0, 0, length, 65536)])
    case = worked(MAP, rate=1.0, box=box)
    case.bank, case.features = torch.zeros(1, 1, 1), torch.ones(1, 1, 1, 1)
    assert (kernel(case, device).item() == 0.5) is seen


@pytest.mark.parametrize("map_grid", [(3, 3), (2, 1), (5, 5)])
def test_a_box_that_leaves_the_image_writes_no_foreign_cell(
    device: str, map_grid: tuple[int, int]
) -> None:
    case = random_case(2, grid=(3, 3), map_grid=map_grid, moved=False)  # 9 cells in a tile of 16
    case.options["box"] = ints([(-65536, -65536, 2**18, 2**18)] * 4)
    case.bank_row = torch.tensor([5, 0, 1, 2])
    expect_the_definition(case, kernel(case, device))


def test_a_label_that_is_no_class_reads_no_foreign_memory(device: str) -> None:
    case = random_case(6)
    for label, instead in ((3, 2), (2**40, 2), (-(2**40), 0)):
        expected = kernel(case, device, labels=torch.full((4,), instead))
        assert kernel(case, device, labels=torch.full((4,), label)).equal(expected)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    grid=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    map_grid=st.none() | st.tuples(st.integers(1, 16), st.integers(1, 16)),
    channels=st.sampled_from([1, 5, 16, 24]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    normalise=st.sampled_from(["image", "none"]),
    moved=st.booleans(),
)
def test_every_cell_is_what_the_definition_says(
    device: str,
    seed: int,
    grid: tuple[int, int],
    map_grid: tuple[int, int] | None,
    channels: int,
    dtype: torch.dtype,
    normalise: str,
    moved: bool,
) -> None:
    case = random_case(
        seed, grid=grid, map_grid=map_grid, channels=channels, dtype=dtype, moved=moved
    )
    expect_the_definition(case, kernel(case, device, normalise=normalise), normalise)


@pytest.mark.parametrize("channels", [*UGLY, 15, 16, 32])
@pytest.mark.parametrize("unroll", [1, 2])
def test_any_number_of_channels_fits_the_tiles(device: str, channels: int, unroll: int) -> None:
    case = random_case(channels, grid=(3, 5), channels=channels)
    config = CamBankConfig(channels=16, unroll=unroll, warps=4)
    expect_the_definition(case, kernel(case, device, config=config))


@pytest.mark.parametrize("stages", [2, 3])
def test_tiles_may_pass_through_shared_memory(device: str, stages: int) -> None:
    case = random_case(5, grid=(7, 7), channels=128)
    config = CamBankConfig(channels=32, unroll=1, warps=4, stages=stages)
    expect_the_definition(case, kernel(case, device, config=config))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_resnet_50_at_224_pixels(device: str, dtype: torch.dtype, channels_last: bool) -> None:
    case = random_case(11, n=3, grid=(7, 7), channels=2048, dtype=dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    case.features = case.features.relu().contiguous(memory_format=layout)
    expect_the_definition(case, kernel(case, device))


@pytest.mark.parametrize("map_grid", [(16, 16), (15, 16), (16, 15)])
@pytest.mark.parametrize("corner", range(8))
def test_the_largest_view_overflows_nothing(
    device: str, corner: int, map_grid: tuple[int, int]
) -> None:
    # Every term at its largest: a grid of 16, sides of 1,023 px, shifts and boxes at their ends.
    grid = (16, 16) if map_grid == (16, 16) else (15, 15)
    case = random_case(2, n=4, grid=grid, map_grid=map_grid)
    first, far, out = (1 if corner >> bit & 1 else 0 for bit in range(3))
    start, length = (32768, 32769) if first else (0, 65537)
    case.options |= {
        "box": ints([(start, 0, length, 65537), (0, start, 65537, length)] * 2),
        "shift": ints([(1022, -1022), (-1022, 1022), (5000, 0), (-5, 2**30)]) * (1 if far else -1),
        "patch": ints([(0, 1022, 0, 0, 1023, 1), (1022, 0, 0, 0, 1, 1023)] * 2),
        "flip": torch.tensor([True, False, True, False]).logical_xor(torch.tensor(out == 1)),
        "size": (1023, 1023),
    }
    if not far:
        case.options["shift"] //= 3
    expect_the_definition(case, kernel(case, device))


def test_larger_views_are_left_to_the_plain_form(device: str) -> None:
    case = random_case(3)
    case.options["size"] = (40, 1024)
    with pytest.raises(ValueError, match="sides are at most 1023 px, here 1024"):
        kernel(case, device)
    del case.options["shift"], case.options["patch"]  # then no pixel matters
    expect_the_definition(case, kernel(case, device))


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(7, 5), (7, 1), (1, 5)])
def test_the_strides_of_the_features_change_no_bit(device: str, grid: tuple[int, int]) -> None:
    case = random_case(9, grid=grid, channels=33)
    case.features = case.features.contiguous(memory_format=torch.channels_last)
    expected = kernel(case, device, config=BLOCKS)
    n, c, h, w = case.features.shape
    there = case.map(lambda t: t.to(device))
    options = {"normalise": "image", **there.options, "config": BLOCKS}
    for room in (
        torch.empty(n, c, h, w),
        torch.empty(n, c, w, h).transpose(2, 3),
        torch.empty(n, h, w, c + 3)[..., :c].permute(0, 3, 1, 2),
        torch.empty(h, w, n, c).permute(2, 3, 0, 1),
        torch.empty(n, c, h, 2 * w)[..., ::2],
        torch.empty(n, c, h, 2 * w)[..., :w],
        torch.empty(2 * n, c, 2 * h, w)[::2, :, ::2],
    ):
        features = torch.empty_strided(room.shape, room.stride(), device=device)
        features.copy_(case.features)
        bank = there.bank.clone()
        arguments = there.weight, there.labels, there.bank_row
        launch(bank, features, *arguments, **options).run()
        assert bank.cpu().equal(expected)


def test_other_arguments_may_be_views_too(device: str) -> None:
    case = random_case(6, moved=False)
    case.options["box"] = ints([WHOLE] * 4)
    expected = kernel(case, device)
    twice = torch.stack((case.labels, case.bank_row), 1).to(device)
    wide = case.weight.new_full((3, 10), torch.nan).to(device)
    wide[:, ::2] = case.weight
    got = kernel(
        case,
        device,
        box=ints([WHOLE]).to(device).expand(4, 4),
        labels=twice[:, 0],
        bank_row=twice[:, 1],
        weight=wide[:, ::2],
    )
    assert got.equal(expected)


def test_an_odd_address_is_read_all_the_same(device: str) -> None:
    case = random_case(7, grid=(4, 4), channels=32)
    there = case.map(lambda t: poisoned(t, device, offset=1))
    update_cam_bank(
        there.bank,
        there.features,
        there.weight,
        there.labels,
        there.bank_row,
        **there.options,
        backend="triton",
    )
    expect_the_definition(case, there.bank.cpu())


# --- what must always hold -----------------------------------------------------------------------


def test_twice_the_same_bits_alone_and_in_any_order(device: str) -> None:
    case = random_case(7, n=6, grid=(5, 3), channels=40)
    case.bank_row = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    expected = kernel(case, device)
    assert kernel(case, device).equal(expected)

    def some(of: Tensor) -> Case:
        options = {k: v[of] if isinstance(v, Tensor) else v for k, v in case.options.items()}
        rows = case.features[of], case.weight, case.labels[of], case.bank_row[of]
        return Case(case.bank, *rows, options)

    assert kernel(some(torch.tensor([3, 0, 5, 1, 4, 2])), device).equal(expected)
    for sample, row in enumerate(case.bank_row.tolist()):
        assert kernel(some(torch.tensor([sample])), device)[row].equal(expected[row])


@pytest.mark.parametrize("rows", [(-1, 2, -1, 0), (6, 1, 2**40, -(2**40)), (-1,) * 4])
def test_rows_that_are_not_in_the_bank_are_not_written(device: str, rows: tuple[int, ...]) -> None:
    case = random_case(2, moved=False)
    case.options["box"] = ints([WHOLE] * 4)
    case.bank_row = torch.tensor(rows)
    written = (case.bank_row >= 0) & (case.bank_row < 6)
    case.labels = case.labels.where(written, 2**40)
    after = kernel(case, device)
    left = [row for row in range(6) if row not in rows]
    assert after[left].equal(case.bank[left])
    for sample in written.nonzero().flatten().tolist():
        alone = case.bank_row.where(torch.arange(4) == sample, -1)
        row = rows[sample]
        assert after[row].equal(kernel(case, device, bank_row=alone)[row])
        assert not after[row].equal(case.bank[row])


@pytest.mark.parametrize("tensor", [False, True])
def test_rate_0_leaves_every_bit(device: str, tensor: bool) -> None:
    case = random_case(1, n=4, moved=False)
    every_pattern = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    case.bank = every_pattern.view(torch.float16)[: 65536 // 12 * 12].view(-1, 4, 3).clone()
    rows = torch.tensor([0, 2730, 5460, 1])  # with -0, NaN, +-subnormal
    case.options["box"] = ints([WHOLE] * 4)
    after = kernel(case, device, rate=torch.zeros(()) if tensor else 0, bank_row=rows)
    assert after.view(torch.int16).equal(case.bank.view(torch.int16))


def test_a_rate_on_the_device_equals_a_float(device: str) -> None:
    case = random_case(4)
    rate = torch.tensor(case.options["rate"])
    assert kernel(case, device, rate=rate).equal(kernel(case, device))
    nan = torch.tensor(torch.nan)
    assert kernel(case, device, rate=nan).equal(case.bank)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_written(device: str, bad: float) -> None:
    case = random_case(1, n=2, moved=False)
    case.options["box"] = ints([WHOLE] * 2)
    case.bank_row, case.labels = torch.tensor([0, 1]), torch.tensor([0, 0])
    clean = kernel(case, device)
    case.features[0, 0, 1, 2] = bad
    image, none = kernel(case, device), kernel(case, device, normalise="none")
    assert image[0].equal(case.bank[0]) and image[1].equal(clean[1])  # no scale: no map
    assert none[0, 1, 2] == case.bank[0, 1, 2]
    assert none.isfinite().all() and not none[0, 0, 0].equal(case.bank[0, 0, 0])
    case.features[0] = bad
    assert kernel(case, device)[0].equal(case.bank[0])


def test_a_span_beyond_fp32_is_not_written(device: str) -> None:
    case = worked([[-3e38, 0.0], [1.0, 3e38]], rate=1.0)
    assert kernel(case, device).equal(case.bank)


def test_what_fp16_cannot_hold_is_not_written(device: str) -> None:
    for largest, kept in ((65519.0, 65504.0), (65520.0, 0.5), (-65520.0, 0.5)):
        case = worked([[0.0, 1.0], [2.0, largest]], rate=1.0)
        case.bank = case.bank.half()
        after = kernel(case, device, normalise="none")
        assert after[0].tolist() == [[0.0, 1.0], [2.0, kept]]


def test_a_nan_of_the_bank_stays(device: str) -> None:
    case = worked(MAP, rate=1.0)
    case.bank[0, 1, 1] = torch.nan
    assert kernel(case, device)[0, 1, 1].isnan()


@pytest.mark.parametrize("empty", ["batch", "bank"])
def test_an_empty_batch_or_bank_is_no_launch(device: str, empty: str) -> None:
    case = random_case(9, n=0)
    if empty == "bank":
        case = random_case(9)
        case.bank, case.bank_row = case.bank[:0], torch.full((4,), -1)
    assert kernel(case, device).equal(case.bank)


# --- in graphs -----------------------------------------------------------------------------------


def arguments_of_the_op(case: Case, device: str, rate: Tensor | None = None) -> tuple[Any, ...]:
    o = case.map(lambda t: t.to(device)).options
    rest = case.bank, case.features, case.weight, case.labels, case.bank_row
    return (
        *(t.clone().to(device) for t in rest),
        *(o["box"], o.get("flip"), o.get("shift"), o.get("patch")),
        *(*o.get("size", (1, 1)), o["rate"], rate, "image"),
    )


@pytest.mark.parametrize("moved", [False, True])
def test_the_op_keeps_the_rules_of_ops(device: str, moved: bool) -> None:
    case = random_case(8, moved=moved)
    rate = torch.tensor(0.25, device=device) if moved else None
    torch.library.opcheck(_update_cam_bank_op, arguments_of_the_op(case, device, rate))


@pytest.mark.parametrize("tensor", [False, True])
def test_it_compiles_into_one_graph(device: str, tensor: bool) -> None:
    case = random_case(10)
    rate = torch.tensor(0.5, device=device) if tensor else 0.5
    there = case.map(lambda t: t.to(device))
    there.features.requires_grad_()
    there.weight.requires_grad_()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    @torch.compile(fullgraph=True, backend=backend)
    def step(bank: Tensor, features: Tensor, weight: Tensor) -> Tensor:
        options = {**there.options, "rate": rate}
        update_cam_bank(
            bank, features, weight, there.labels, there.bank_row, **options, backend="triton"
        )
        return features.sum() * weight.sum()

    bank = there.bank.clone()
    step(bank, there.features, there.weight).backward()
    assert bank.cpu().equal(kernel(case, device, rate=rate)) and not bank.requires_grad
    assert any("backmix.update_cam_bank" in target for target in seen)


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_another_rate(device: str) -> None:
    if device == "cpu":
        pytest.skip("CUDA graphs are of CUDA")
    case = random_case(12, grid=(7, 7), channels=64)
    there = case.map(lambda t: t.to(device))
    rate = torch.tensor(0.0, device=device)

    def update(bank: Tensor) -> None:
        options = {**there.options, "rate": rate}
        arguments = there.features, there.weight, there.labels, there.bank_row
        update_cam_bank(bank, *arguments, **options)

    update(there.bank.clone())  # compiles
    bank, graph = there.bank.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(bank)
    graph.replay()
    assert bank.equal(there.bank)
    rate.fill_(0.5)
    graph.replay()
    assert bank.cpu().equal(kernel(case, device, rate=0.5))


@pytest.mark.gpu
def test_offsets_beyond_32_bits_are_reached(device: str) -> None:
    if device == "cpu":
        pytest.skip("too large for the interpreter")
    n, rows, channels, grid = 22_000, 44_000_000, 2048, (7, 7)
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free GPU memory")
    small = random_case(12, n=2, grid=grid, channels=channels, dtype=torch.bfloat16, moved=False)
    small.options["box"] = ints([WHOLE] * 2)
    small.bank_row = torch.tensor([0, 1])
    bank = torch.full((rows, *grid), 0.5, dtype=torch.float16, device=device)
    features = torch.empty(
        (n, channels, *grid),
        dtype=torch.bfloat16,
        device=device,
        memory_format=torch.channels_last,
    )
    features[-2:] = small.features.to(device)
    bank_row = torch.full((n,), -1, device=device)
    bank_row[-2:] = torch.tensor([rows - 2, rows - 1], device=device)
    labels = small.labels.to(device).repeat(n // 2)
    box = ints([WHOLE]).to(device).expand(n, 4)
    update_cam_bank(bank, features, small.weight.to(device), labels, bank_row, box=box, rate=1.0)
    small.bank.fill_(0.5)
    small.features = small.features.contiguous(memory_format=torch.channels_last)
    expected = kernel(small, device, rate=1.0)[:2]
    assert bank[-2:].cpu().equal(expected.half())
    assert bank[:-2].eq(0.5).all()
