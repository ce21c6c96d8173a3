"""update_cam_bank against hand-worked cases, a slow second formula, and what must always hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from backmix.kernels.mix_background import box_fractions, mask_views
from backmix.kernels.update_cam_bank import update_cam_bank
from tests.kernels.support import NoWaiting, waiting_is_an_error

WHOLE = (0, 0, 65536, 65536)


def ints(values: object) -> Tensor:
    return torch.tensor(np.asarray(values, np.int32))


@dataclass
class Case:
    """The arguments of one call."""

    bank: Tensor
    features: Tensor
    weight: Tensor
    labels: Tensor
    bank_row: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def updated(self, **changes: Any) -> Tensor:
        """The bank after the call; the case's own stays."""
        bank = self.bank.clone()
        options = {**self.options, **changes}
        named = {
            name: options.pop(name, getattr(self, name))
            for name in ("features", "weight", "labels", "bank_row")
        }
        update_cam_bank(bank, *named.values(), **options)
        return bank

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        options = {
            name: change(value) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return Case(
            change(self.bank),
            change(self.features),
            change(self.weight),
            change(self.labels),
            change(self.bank_row),
            options,
        )


def random_case(
    seed: int,
    *,
    n: int = 4,
    grid: tuple[int, int] = (4, 3),
    map_grid: tuple[int, int] | None = None,
    channels: int = 5,
    dtype: torch.dtype = torch.float32,
    moved: bool = True,
) -> Case:
    rng = np.random.default_rng(seed)
    rows, classes, (height, width) = 6, 3, rng.integers(1, 12, 2).tolist()
    start, end = np.sort(rng.integers(0, 65537, (2, n, 2)), 0)
    ph, pw = rng.integers(0, height + 1, n), rng.integers(0, width + 1, n)
    ty, tx = rng.integers(0, height - ph + 1), rng.integers(0, width - pw + 1)
    options: dict[str, Any] = {
        "box": ints(np.concatenate((start, np.maximum(end - start, 1)), 1)),
        "rate": float(rng.choice([0.1, 0.5, 1.0])),
    }
    if moved:
        options |= {
            "flip": torch.from_numpy(rng.random(n) < 0.5),
            "shift": ints(rng.integers(-3, 4, (n, 2))),
            "patch": ints(np.stack((ty, tx, ty, tx, ph, pw), 1)),
            "size": (height, width),
        }
    bank_row = rng.permutation(rows)[:n]
    bank_row[rng.random(n) < 0.2] = -1
    features = torch.from_numpy(
        rng.normal(size=(n, channels, *(map_grid or grid))).astype(np.float32)
    )
    if seed % 2:
        features = features.contiguous(memory_format=torch.channels_last)
    return Case(
        torch.from_numpy(rng.random((rows, *grid), np.float32)).to(
            torch.float16 if seed % 3 else torch.float32
        ),
        features.to(dtype),
        torch.from_numpy(rng.normal(size=(classes, channels)).astype(np.float32)).to(dtype),
        torch.from_numpy(rng.integers(0, classes, n)),
        torch.from_numpy(bank_row),
        options,
    )


# --- the second formula: loops in float64, written from the definition ----------------------------


def cell_at(place: int, whole: int, cells: int) -> int:
    """The first of equal cells, cut from a length, that ends behind a place."""
    return next(k for k in range(cells) if place * cells < (k + 1) * whole)


def slow_update(case: Case, normalise: str = "image") -> tuple[np.ndarray, np.ndarray]:
    """Return the new bank and how far a cell of it may be off, by summation order and fp16."""
    o = case.options
    bank = case.bank.double().numpy().copy()
    off = np.zeros_like(bank)
    g, g2 = bank.shape[1:]
    map_rows, map_columns = case.features.shape[2:]
    height, width = o.get("size", (1, 1))
    for s, row in enumerate(case.bank_row.tolist()):
        if row < 0:
            continue
        weight = case.weight[case.labels[s]].double().numpy()[:, None, None]
        products = weight * case.features[s].double().numpy()
        value, spread = products.sum(0), 1.0
        if normalise == "image":
            flat = np.ptp(value) == 0
            spread = 1.0 if flat else np.ptp(value)
            value = np.full_like(value, 0.5) if flat else (value - value.min()) / spread
        y0, x0, bh, bw = o["box"][s].tolist()
        flip = "flip" in o and o["flip"][s].item()
        sy, sx = o["shift"][s].tolist() if "shift" in o else (0, 0)
        ty, tx, _, _, ph, pw = o["patch"][s].tolist() if "patch" in o else (0,) * 6
        for i in range(g):
            for j in range(g2):
                ny, nx = (2 * i + 1) * 32768 - g * y0, (2 * j + 1) * 32768 - g2 * x0
                if not (0 <= ny < g * bh and 0 <= nx < g2 * bw):
                    continue
                if (
                    ty * g * bh <= ny * height < (ty + ph) * g * bh
                    and tx * g2 * bw <= nx * width < (tx + pw) * g2 * bw
                ):
                    continue
                nx = g2 * bw - 1 - nx if flip else nx
                my, mx = ny * height - sy * g * bh, nx * width - sx * g2 * bw
                if not (0 <= my < height * g * bh and 0 <= mx < width * g2 * bw):
                    continue
                seen = value[
                    cell_at(my, height * g * bh, map_rows),
                    cell_at(mx, width * g2 * bw, map_columns),
                ]
                bank[row, i, j] += o["rate"] * (seen - bank[row, i, j])
                eps = 2.0**-10 if case.bank.dtype == torch.float16 else 2.0**-23
                rounding = 4 * eps * abs(bank[row, i, j])
                off[row, i, j] = rounding + 1e-6 * np.abs(products).sum(0).max() / spread
    return bank, off


@given(
    seed=st.integers(0, 2**20),
    grid=st.tuples(st.integers(1, 16), st.integers(1, 16)) | st.just((4, 3)),
    map_grid=st.none() | st.tuples(st.integers(1, 16), st.integers(1, 16)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    normalise=st.sampled_from(["image", "none"]),
    moved=st.booleans(),
)
def test_every_cell_is_what_the_definition_says(
    seed: int,
    grid: tuple[int, int],
    map_grid: tuple[int, int] | None,
    dtype: torch.dtype,
    normalise: str,
    moved: bool,
) -> None:
    case = random_case(seed, grid=grid, map_grid=map_grid, dtype=dtype, moved=moved)
    got = case.updated(normalise=normalise, check=True)
    expected, off = slow_update(case, normalise)
    assert (np.abs(got.double().numpy() - expected) <= off).all()
    untouched = torch.from_numpy(off == 0)
    assert got[untouched].equal(case.bank[untouched])


# --- hand-worked ---------------------------------------------------------------------------------


def worked(values: list[list[float]], **options: Any) -> Case:
    """One channel of weight 1, so that the features are the map; a 2 x 2 bank of halves."""
    return Case(
        torch.full((1, 2, 2), 0.5),
        torch.tensor([[values]]),
        torch.ones(1, 1),
        torch.tensor([0]),
        torch.tensor([0]),
        {"box": ints([WHOLE]), "rate": 0.5, "size": (4, 4), **options},
    )


MAP = [[0.0, 0.25], [0.5, 1.0]]


worked_examples = pytest.mark.parametrize(
    ("options", "bank"),
    [
        ({}, [[0.25, 0.375], [0.5, 0.75]]),
        ({"flip": torch.tensor([True])}, [[0.375, 0.25], [0.75, 0.5]]),
        ({"shift": ints([(1, 0)])}, [[0.25, 0.375], [0.5, 0.75]]),
        ({"shift": ints([(2, 0)])}, [[0.5, 0.5], [0.25, 0.375]]),
        ({"patch": ints([(0, 0, 0, 0, 2, 2)])}, [[0.5, 0.375], [0.5, 0.75]]),
        (
            {"box": box_fractions(ints([(0, 0, 2, 4)]), ints([(4, 4)]))},
            [[0.5, 0.75], [0.5, 0.5]],
        ),
        # The stored centre lies on the border of the view's columns 0 and 1: the right one plain,
        # the left one mirrored.
        ({"box": ints([(0, 0, 65536, 32768)])}, [[0.375, 0.5], [0.75, 0.5]]),
        (
            {"box": ints([(0, 0, 65536, 32768)]), "flip": torch.tensor([True])},
            [[0.25, 0.5], [0.5, 0.5]],
        ),
        # The centre of cell (0, 0) is pixel position (1, 1): the first of the second window, the
        # first after the first window.
        ({"patch": ints([(0, 0, 0, 0, 1, 1)])}, [[0.25, 0.375], [0.5, 0.75]]),
        ({"patch": ints([(1, 1, 0, 0, 1, 1)])}, [[0.5, 0.375], [0.5, 0.75]]),
        ({"patch": ints([(0, 0, 0, 0, 4, 1)])}, [[0.25, 0.375], [0.5, 0.75]]),
        ({"patch": ints([(0, 0, 0, 0, 1, 4)])}, [[0.25, 0.375], [0.5, 0.75]]),
    ],
    ids=[
        "plain",
        "flip",
        "shift by one",
        "shift by two",
        "window",
        "upper half",
        "border",
        "border, flip",
        "window ends",
        "window begins",
        "narrow window",
        "low window",
    ],
)


@worked_examples
def test_the_worked_examples(options: dict[str, Any], bank: list[list[float]]) -> None:
    assert worked(MAP, **options).updated(check=True)[0].tolist() == bank


small_maps = pytest.mark.parametrize(
    ("options", "bank"),
    [
        # Centres lie at 1/6, 1/2 and 5/6 of a side: in the map's cells 0, 1 and 1.
        ({}, [[0, 0.25, 0.25], [0.5, 1, 1], [0.5, 1, 1]]),
        # The centre on the border belongs to the left cell once it is mirrored.
        ({"flip": torch.tensor([True])}, [[0.25, 0, 0], [1, 0.5, 0.5], [1, 0.5, 0.5]]),
        # Two of four pixels down: rows at -1/3, 0 and 1/3 of the side.
        ({"shift": ints([(2, 0)])}, [[0.5] * 3, [0, 0.25, 0.25], [0, 0.25, 0.25]]),
        # Columns from 0.2 to 0.95: the centres lie outside, at 0.4 and at 0.84 of the crop. The
        # cell of a view cut in three that holds 0.4 has its own centre on the map's border.
        (
            {"box": ints([(0, 13107, 65536, 49152)])},
            [[0.5, 0, 0.25], [0.5, 0.5, 1], [0.5, 0.5, 1]],
        ),
        # The centre of the image is pixel position (2, 2), the first behind the window.
        ({"patch": ints([(0, 0, 0, 0, 2, 2)])}, [[0.5, 0.25, 0.25], [0.5, 1, 1], [0.5, 1, 1]]),
    ],
    ids=["plain", "flip", "shift", "crop", "window"],
)


def small_map(**options: Any) -> Case:
    """The map of `worked` in a bank of 3 x 3 halves, taken over at once."""
    case = worked(MAP, **{"rate": 1.0, **options})
    case.bank = torch.full((1, 3, 3), 0.5)
    return case


@small_maps
def test_a_stored_cell_takes_the_cell_of_a_smaller_map_that_its_centre_lies_in(
    options: dict[str, Any], bank: list[list[float]]
) -> None:
    assert small_map(**options).updated(check=True)[0].tolist() == bank


@pytest.mark.parametrize(
    ("cells", "map_cells", "taken"),
    [
        (7, 5, [0, 1, 1, 2, 3, 3, 4]),  # ResNet: 160 px in the bank of 224 px
        (7, 6, [0, 1, 2, 3, 3, 4, 5]),  # 192 px
        (4, 2, [0, 0, 1, 1]),
        (3, 7, [1, 3, 5]),  # a finer map: the cell in the middle
    ],
)
def test_whole_images_spread_their_maps_evenly(
    cells: int, map_cells: int, taken: list[int]
) -> None:
    case = worked([list(map(float, range(map_cells)))] * map_cells, rate=1.0)
    case.bank = torch.full((1, cells, cells), 0.5)
    assert case.updated(normalise="none")[0].tolist() == [taken] * cells
    case.features = case.features.transpose(2, 3)
    assert case.updated(normalise="none")[0].T.tolist() == [taken] * cells


def test_a_map_is_moved_to_0_and_1() -> None:
    case = worked([[-6.0, -5.0], [-4.0, -2.0]], rate=1.0)
    assert case.updated()[0].tolist() == MAP
    assert case.updated(normalise="none")[0].tolist() == [[-6.0, -5.0], [-4.0, -2.0]]


flat_maps = pytest.mark.parametrize(
    ("level", "more"), [(0.0, 0.0), (3.0, 0.0), (-1e-20, 0.0), (0.0, 1e-19), (1e3, 1e-4)]
)


@flat_maps
def test_a_flat_map_says_one_half_everywhere(level: float, more: float) -> None:
    case = worked([[level, level + more], [level, level]], rate=1.0)
    case.bank.zero_()
    assert case.updated().eq(0.5).all()


@pytest.mark.parametrize(("height", "seen"), [(32768, False), (32769, True)])
def test_a_box_that_ends_at_a_centre_does_not_show_it(height: int, seen: bool) -> None:
    case = worked(MAP, rate=1.0, box=ints([(0, 0, height, 65536)]))
    case.bank, case.features = torch.zeros(1, 1, 1), torch.ones(1, 1, 1, 1)
    assert (case.updated().item() == 0.5) is seen


def test_the_map_is_the_true_classs() -> None:
    features = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # channel 0 left, channel 1 right
    case = Case(
        torch.zeros(1, 1, 2),
        features,
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        torch.tensor([1]),
        torch.tensor([0]),
        {"box": ints([WHOLE]), "rate": 1.0},
    )
    assert case.updated().tolist() == [[[0.0, 1.0]]]
    assert case.updated(labels=torch.tensor([0])).tolist() == [[[1.0, 0.0]]]


# --- what must always hold -----------------------------------------------------------------------


@given(seed=st.integers(0, 2**20), grid=st.tuples(st.integers(1, 16), st.integers(1, 16)))
def test_what_a_view_wrote_is_read_at_the_cell_that_wrote_it(
    seed: int, grid: tuple[int, int]
) -> None:
    case = random_case(seed, n=1, grid=grid, moved=False)
    g, g2 = grid
    # Cell (i, j) of the features says its own number; -1 in the bank = nobody wrote.
    case.features = torch.arange(float(g * g2)).view(1, 1, g, g2)
    case.weight, case.labels = torch.ones(1, 1), torch.tensor([0])
    case.bank, case.bank_row = torch.full((1, g, g2), -1.0), torch.tensor([0])
    bank = case.updated(rate=1.0, normalise="none", check=True)[0].long()
    y0, x0, bh, bw = case.options["box"][0].tolist()
    for number in bank[bank >= 0].tolist():
        i, j = divmod(number, g2)
        r = (2 * g * y0 + (2 * i + 1) * bh) // 2**17
        c = (2 * g2 * x0 + (2 * j + 1) * bw) // 2**17
        assert bank[r, c] == number


def test_a_whole_box_reads_its_own_map() -> None:
    case = random_case(1, n=1, moved=False)
    case.bank_row.zero_()
    case.options |= {"box": ints([WHOLE]), "rate": 1.0}
    value = torch.einsum("c,cij->ij", case.weight[case.labels[0]], case.features[0])
    order = value.flatten().argsort(descending=True)
    for count in range(13):
        masked = mask_views(case.updated(), torch.tensor([0]), ints([WHOLE]), ints([0]), count)
        assert set(masked.flatten().nonzero()[:, 0].tolist()) == set(order[:count].tolist())


@pytest.mark.parametrize("rows", [(-1, 2, -1, 0), (0, -1, 2, -1), (-1, 0, -1, 2)])
def test_rows_below_zero_are_not_written(rows: tuple[int, ...]) -> None:
    case = random_case(2, moved=False)
    case.bank_row = torch.tensor(rows)
    case.labels = case.labels.where(case.bank_row >= 0, -1)
    case.options["box"] = ints([WHOLE] * 4)
    before, after = case.bank, case.updated(check=True)
    assert after[[1, 3, 4, 5]].equal(before[[1, 3, 4, 5]])
    for sample, row in enumerate(rows):
        if row >= 0:
            alone = case.bank_row.where(torch.arange(4) == sample, -1)
            assert after[row].equal(case.updated(bank_row=alone)[row])
            assert not after[row].equal(before[row])
    assert case.updated(bank_row=torch.full((4,), -1)).equal(before)


@pytest.mark.parametrize("tensor", [False, True])
def test_rate_0_leaves_every_bit(tensor: bool) -> None:
    case = random_case(1, n=4, moved=False)
    every_pattern = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    case.bank = every_pattern.view(torch.float16)[: 65536 // 12 * 12].view(-1, 4, 3).clone()
    rows = torch.tensor([0, 2730, 5460, 1])  # with -0, NaN, +-subnormal
    case.options["box"] = ints([WHOLE] * 4)
    rate = torch.zeros(()) if tensor else 0.0
    after = case.updated(rate=rate, bank_row=rows)
    assert after.view(torch.int16).equal(case.bank.view(torch.int16))


def test_a_rate_on_the_device_equals_a_float() -> None:
    case = random_case(4)
    rate = torch.tensor(case.options["rate"])
    assert case.updated(rate=rate).equal(case.updated())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_written(bad: float) -> None:
    case = random_case(1, n=2, moved=False)
    case.options["box"] = ints([WHOLE] * 2)
    case.bank_row, case.labels = torch.tensor([0, 1]), torch.tensor([0, 0])
    clean = case.updated()
    case.features[0, 0, 1, 2] = bad
    image, none = case.updated(), case.updated(normalise="none")
    assert image[0].equal(case.bank[0]) and image[1].equal(clean[1])  # no scale: no map
    assert none[0, 1, 2] == case.bank[0, 1, 2]
    assert none.isfinite().all() and not none[0, 0, 0].equal(case.bank[0, 0, 0])


def test_what_fp16_cannot_hold_is_not_written() -> None:
    case = worked([[0.0, 1.0], [2.0, 1e6]], rate=1.0)
    case.bank = case.bank.half()
    assert case.updated(normalise="none")[0].tolist() == [[0.0, 1.0], [2.0, 0.5]]


def test_the_order_of_the_batch_does_not_matter() -> None:
    case = random_case(7, n=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    per_sample = {k: v[order] for k, v in case.options.items() if isinstance(v, Tensor)}
    names = ("features", "labels", "bank_row")
    shuffled = {name: getattr(case, name)[order] for name in names}
    assert case.updated(**shuffled, **per_sample).equal(case.updated())


def test_the_memory_format_of_the_features_does_not_matter() -> None:
    case = random_case(8, grid=(7, 7), channels=33)
    last = case.features.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(case.updated(features=last), case.updated(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_an_empty_batch_writes_nothing(rate: float) -> None:
    case = random_case(9, n=0)
    assert case.updated(rate=rate, check=True).equal(case.bank)


def test_the_running_mean_forgets_its_start_at_its_rate() -> None:
    case = worked([[0.0, 1.0], [1.0, 0.0]], rate=0.1)
    for _ in range(10):
        case.bank = case.updated()
    # 0.5 * 0.9^10 of the start is left.
    torch.testing.assert_close(case.bank[0, 0, 0].item(), 0.5 * 0.9**10, rtol=1e-5, atol=0)


def test_features_and_weight_with_gradients_are_welcome() -> None:
    case = random_case(10)
    weight = case.weight.clone().requires_grad_()
    features = case.features.clone().requires_grad_()
    after = case.updated(weight=weight, features=features)
    assert not after.requires_grad and after.equal(case.updated())


# --- other devices -------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
def test_no_value_is_read_on_a_device(moved: bool, rate: Any) -> None:
    # Meta tensors have no values: whatever needs one fails.
    case = random_case(11, moved=moved)
    case.options["rate"] = rate
    there = case.map(lambda t: t.to("meta"))
    with NoWaiting():
        update_cam_bank(
            there.bank,
            there.features,
            there.weight,
            there.labels,
            there.bank_row,
            **there.options,
        )


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bank_and_never_waits() -> None:
    case = random_case(12, n=5)
    there = case.map(lambda t: t.to("cuda"))
    bank = there.bank.clone()
    arguments = (there.features, there.weight, there.labels, there.bank_row)
    with waiting_is_an_error():
        update_cam_bank(bank, *arguments, **there.options)
    expected, off = slow_update(case)
    assert (np.abs(bank.double().cpu().numpy() - expected) <= off).all()


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": torch.zeros(4, 5, 3)}, ValueError, "features must have shape"),
        ({"features": torch.zeros(4, 5, 17, 3)}, ValueError, "features must have a grid of 1..16"),
        ({"features": torch.zeros(4, 5, 4, 0)}, ValueError, "features must have a grid of 1..16"),
        ({"features": torch.zeros(4, 5, 4, 3).double()}, TypeError, "features must be float32 or"),
        ({"weight": torch.zeros(3, 6)}, ValueError, r"weight must have shape \[K, 5\]"),
        ({"labels": ints([0] * 4)}, TypeError, "labels must be int64, got int32"),
        ({"bank_row": torch.arange(3)}, ValueError, r"bank_row must have shape \[4\]"),
        ({"box": torch.zeros(4, 4)}, TypeError, "box must be int32"),
        ({"size": None}, ValueError, r"size must be given as \(H, W\)"),
        ({"size": (0, 4)}, ValueError, r"size must be \(H, W\) in pixels"),
        ({"rate": 1.5}, ValueError, r"rate must be in 0\.\.1, got 1\.5"),
        ({"rate": float("nan")}, ValueError, "rate must be in"),
        ({"rate": torch.zeros(1)}, ValueError, "rate must have shape"),
        ({"rate": "x"}, TypeError, "rate must be a float or a tensor, got str"),
        ({"labels": 0}, TypeError, "labels must be a tensor, got int"),
        ({"rate": torch.zeros((), dtype=torch.float64)}, TypeError, "rate must be float32"),
        ({"normalise": "class"}, ValueError, "normalise must be image or none"),
        ({"backend": "cuda"}, ValueError, "backend must be torch or triton"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        random_case(13).updated(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bank_row": torch.tensor([0, 6, 1, 2])}, r"bank_row\[1\] must be below 6"),
        ({"bank_row": torch.tensor([4, 2, -1, 2])}, r"bank_row\[3\] must not occur twice"),
        (
            {"labels": torch.tensor([0, 3, 0, 0]), "bank_row": torch.arange(4)},
            r"labels\[1\] must be in 0\.\.2",
        ),
        (
            {"labels": torch.tensor([0, 0, -1, 0]), "bank_row": torch.arange(4)},
            r"labels\[2\] must be in 0\.\.2",
        ),
        ({"box": ints([WHOLE, (0, 0, 1, 0), WHOLE, WHOLE])}, r"box\[1\] must lie inside"),
        ({"patch": ints([(0, 0, 0, 0, 99, 1)] * 4)}, r"patch\[0\] must lie inside views of"),
    ],
    ids=["row", "twice", "label", "unknown", "box", "patch"],
)
def test_check_names_the_first_bad_sample(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_case(14).updated(check=True, **changes)


def test_a_bank_may_skip_several_samples() -> None:
    rows = torch.tensor([-1, -1, -2, 5])
    assert random_case(15).updated(check=True, bank_row=rows).shape == (6, 4, 3)
