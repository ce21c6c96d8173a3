"""SSOD: which locations are samples, what they cost, when they begin to count, what they teach."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.beton import open_set
from backmix.train import loop, metrics
from backmix.train.check import check
from backmix.train.loop import steps
from backmix.train.methods.build import build_network
from backmix.train.methods.method import DeviceDraws, Regions, Views
from backmix.train.methods.ssod import (
    Gate,
    SsodMethod,
    _cool_and_hot,
    _extremes,
    location_samples,
    new_rejection,
)
from backmix.train.models.weights import read_weights
from backmix.train.options import Augment, BackMix, Optim, Run, Softmax, Split, Ssod
from backmix.train.prepare import begin, prepare_run
from backmix.train.state import State
from tests.runs import SIDE, poisoned, tiny_run, tiny_set, views_of, write_set
from tests.train.test_loop import NoWaiting, assert_same_bits_when_stopped, start

CPU = torch.device("cpu")
OPEN = Ssod(gate_known=0.0, gate_accuracy=0.0)
"""Opens after the first step, whatever that saw."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny(data: Path, out: Path, method: Any, **changes: object) -> Run:
    """A run with dropout in its network and a checkpoint every second step."""
    return tiny_run(data, out, method, **changes)


def quick(data: Path, out: Path, method: Any, **changes: object) -> Run:
    """A run of the smallest network, which has no dropout, with one checkpoint."""
    small = {"model": "classifier32-quarter", "save_steps": 0, "log_every": 50}
    return tiny(data, out, method, **{**small, **changes})


# --- by hand --------------------------------------------------------------------------------------


class ByHand(torch.nn.Module):
    """A network whose last map is what it is given, with a two-class head that reads channel 0.

    A cell with value x gives class 0 the probability sigmoid(x); the rejection head answers with
    channel 1, so both are written down cell by cell.
    """

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = torch.nn.Parameter(maps)
        self.head = torch.nn.Linear(2, 2, bias=False)
        self.rejection = new_rejection(2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
            self.rejection.weight.copy_(torch.tensor([[0.0, 1.0]]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.maps.mean((2, 3))), self.maps


def blank(regions: Regions | None = None) -> Views:
    """Views that nobody looks at."""
    nothing = torch.empty(0)
    return Views(nothing, DeviceDraws(nothing, None, nothing, nothing, nothing), regions=regions)


def log_odds(p: float) -> float:
    return math.log(p / (1 - p))


def by_hand(sure: list[list[float]], s: list[list[float]]) -> ByHand:
    """Images of one row of cells: the probability of class 0, and the rejection logit."""
    x = torch.tensor([[log_odds(p) for p in row] for row in sure])
    return ByHand(torch.stack([x, torch.tensor(s)], 1)[:, :, None])


def batch_of(labels: list[int]) -> Any:
    class Labels:
        def __len__(self) -> int:
            return len(labels)

    batch: Any = Labels()
    batch.labels = torch.tensor(labels)
    batch.images = len(labels)
    return batch


def method_of(options: Ssod, *, opened: bool = True, ramp: int = 4) -> SsodMethod:
    method = SsodMethod(options, Augment(), 0.0, torch.float32, ramp, CPU)
    if opened:
        method.gate.opened.fill_(ramp)
    return method


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_loss_is_the_balanced_mean_over_known_and_unknown_locations() -> None:
    """Three known, two unknown, three between; the second image is of class 1."""
    sure = [[0.97, 0.951, 0.5, 0.04], [0.03, 0.1, 0.96, 0.94]]
    s = [[0.3, -1.0, 9.0, 0.7], [2.0, 9.0, -0.4, 9.0]]
    model = by_hand(sure, s)
    out = method_of(Ssod(weight=0.5)).loss(blank(), batch_of([0, 1]), model)  # type: ignore[arg-type]
    known = (softplus(-0.3) + softplus(1.0) + softplus(-2.0)) / 3
    unknown = (softplus(0.7) + softplus(-0.4)) / 2
    pooled = [sum(map(log_odds, row)) / 4 for row in sure]
    entropy = (softplus(-pooled[0]) + softplus(pooled[1])) / 2
    assert out.loss.item() == pytest.approx(entropy + 0.5 * (known + unknown), rel=1e-5)
    assert out.scalars["rejection_loss"].item() == pytest.approx(known + unknown, rel=1e-5)
    assert out.scalars["known_share"].item() == pytest.approx(3 / 8)
    assert out.scalars["unknown_share"].item() == pytest.approx(2 / 8)
    # An image pays for its own locations: what the log names is the image, not the batch.
    first = softplus(-pooled[0]) + 0.5 * 2 * (
        (softplus(-0.3) + softplus(1.0)) / 3 + softplus(0.7) / 2
    )
    assert out.per_sample[0].item() == pytest.approx(first, rel=1e-5)
    assert out.per_sample.mean().item() == pytest.approx(out.loss.item(), rel=1e-6)


def test_the_gradient_is_that_of_both_means() -> None:
    """d softplus(-s) = -sigmoid(-s) over the known, d softplus(s) = sigmoid(s) over the unknown."""
    model = by_hand([[0.97, 0.96, 0.5, 0.01]], [[0.3, -1.0, 2.0, 0.7]])
    out = method_of(Ssod()).loss(blank(), batch_of([0]), model)  # type: ignore[arg-type]
    out.loss.backward()
    assert model.maps.grad is not None

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [-sigmoid(-0.3) / 2, -sigmoid(1.0) / 2, 0.0, sigmoid(0.7)]
    assert model.maps.grad[0, 1, 0].tolist() == pytest.approx(expected, rel=1e-5)
    # The labels of the locations have no gradient: channel 0 feels the cross-entropy alone.
    pooled = sum(map(log_odds, [0.97, 0.96, 0.5, 0.01])) / 4
    assert model.maps.grad[0, 0, 0].tolist() == pytest.approx([-sigmoid(-pooled) / 4] * 4, rel=1e-5)


@pytest.mark.parametrize(
    ("sure", "expected"),
    [
        ([[0.5, 0.6]], 0.0),
        ([[0.5, 0.99]], softplus(-1.5)),
        ([[0.01, 0.5]], softplus(2.0)),
    ],
    ids=["neither", "no unknown", "no known"],
)
def test_a_mean_of_nothing_is_nothing(sure: list[list[float]], expected: float) -> None:
    model = by_hand(sure, [[2.0, 1.5]])
    out = method_of(Ssod()).loss(blank(), batch_of([0]), model)  # type: ignore[arg-type]
    out.loss.backward()
    assert out.scalars["rejection_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert model.maps.grad is not None and model.maps.grad.isfinite().all()
    assert model.rejection.weight.grad is not None
    assert model.rejection.weight.grad.isfinite().all()


def test_a_location_that_is_sure_of_a_wrong_class_is_unknown() -> None:
    model = by_hand([[0.99, 0.99]], [[0.0, 0.0]])
    out = method_of(Ssod()).loss(blank(), batch_of([1]), model)  # type: ignore[arg-type]
    assert out.scalars["unknown_share"].item() == 1 and out.scalars["known_share"].item() == 0


def test_images_that_are_wrong_give_no_unknown_locations_if_so_asked() -> None:
    """The first image is classified right, the second wrong; both have both kinds."""
    model = by_hand([[0.99, 0.99, 0.02], [0.99, 0.02, 0.02]], [[1.0] * 3, [1.0] * 3])
    shares = {}
    for asked in (False, True):
        method = method_of(Ssod(require_correct=asked))
        out = method.loss(blank(), batch_of([0, 0]), model)  # type: ignore[arg-type]
        assert out.logits.argmax(1).tolist() == [0, 1]
        shares[asked] = [out.scalars[name].item() for name in ("known_share", "unknown_share")]
    assert shares[False] == pytest.approx([3 / 6, 3 / 6])
    assert shares[True] == pytest.approx([3 / 6, 1 / 6])


def test_a_share_of_the_locations_is_sampled_whatever_their_confidence() -> None:
    """The 2 of 8 most and least probable, none of which gamma would take."""
    p_true = torch.tensor([[[0.61, 0.45, 0.5, 0.62]], [[0.55, 0.44, 0.46, 0.58]]])
    right = torch.tensor([True, True])
    known, unknown = location_samples(p_true, right, Ssod(share=0.25))
    assert known[:, 0].tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]
    assert unknown[:, 0].tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("p", "share", "greatest", "lowest"),
    [
        ([3, 9, 1, 7, 5, 2], 0.34, [1, 3], [2, 5]),
        ([3, 9, 1, 7, 5, 2], 0.5, [1, 3, 4], [0, 2, 5]),
        ([3, 9, 1, 7, 5, 2], 0.01, [1], [2]),
        ([5, 5, 5, 5], 0.25, [], []),
        ([2, 9, 9, 9], 0.5, [1, 2, 3], [0]),  # most are as sure as can be
        ([2, 2, 2, 9], 0.5, [3], [0, 1, 2]),
        ([1, 1, 0.3, 1, 0.9, 1, 1, 1, 1, 1], 0.4, [0, 1, 3, 5, 6, 7, 8, 9], [2, 4]),  # no draw
        ([1, 5, 5, 9], 0.5, [3], [0]),
        ([1, 5, 5, 5, 9, 9], 0.34, [4, 5], [0, 1, 2, 3]),
    ],
)
def test_extremes_keep_ties_together_and_never_overlap(
    p: list[float], share: float, greatest: list[int], lowest: list[int]
) -> None:
    found = _extremes(torch.tensor(p), share)
    assert [torch.nonzero(x)[:, 0].tolist() for x in found] == [greatest, lowest]


def test_the_score_of_the_pooled_feature_is_the_mean_over_the_locations(data: Path) -> None:
    model = build_network(tiny(data, Path("unused"), Ssod()), 4)
    features = torch.randn(3, 64, 4, 4)
    assert model.rejection is not None
    with torch.no_grad():
        model.rejection.bias.fill_(0.7)
        locations = model.rejection(features.permute(0, 2, 3, 1)).mean((1, 2, 3))
        pooled = model.rejection(features.mean((2, 3)))[:, 0]
    assert torch.allclose(locations, pooled, atol=1e-6)


def test_a_fresh_rejection_head_is_small_and_unbiased() -> None:
    torch.manual_seed(0)
    head = new_rejection(20_000)
    assert head.weight.shape == (1, 20_000)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert abs(head.weight.mean().item()) < 3e-4 and head.bias.item() == 0


TWO_RANKS = """
import json
import sys
import torch
import torch.distributed as dist
from tests.train.test_ssod import batch_of, blank, by_hand, method_of
from backmix.train.options import Ssod
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
cells, s, labels = json.loads(sys.argv[3])
model = by_hand([cells[rank]], [s[rank]])
out = method_of(Ssod()).loss(blank(), batch_of([labels[rank]]), model)
out.loss.backward()
found = torch.cat([model.rejection.weight.grad[0], model.rejection.bias.grad])
dist.all_reduce(found)
shares = [out.scalars[name].item() for name in ("known_share", "unknown_share")]
print([*(found / 2).tolist(), *shares])
dist.destroy_process_group()
"""


def test_processes_that_train_together_count_together(tmp_path: Path) -> None:
    """Two with one image each give the head the gradient of one with both.

    One has three known locations and no unknown one, the other one and two: with counts of their
    own the one known location of the second would weigh as much as the three of the first.
    """
    given = ([[0.99, 0.97, 0.96], [0.98, 0.01, 0.02]], [[0.3, -1.0, 2.0], [0.7, 0.1, -0.5]], [0, 0])
    model = by_hand(given[0], given[1])
    out = method_of(Ssod()).loss(blank(), batch_of(given[2]), model)  # type: ignore[arg-type]
    out.loss.backward()
    weight, bias = model.rejection.weight.grad, model.rejection.bias.grad
    assert weight is not None and bias is not None
    expected = [*weight[0].tolist(), *bias.tolist(), 4 / 6, 2 / 6]

    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", TWO_RANKS]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), json.dumps(given)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        printed, errors = rank.communicate(timeout=100)
        assert rank.returncode == 0, errors
        assert json.loads(printed) == pytest.approx(expected, rel=1e-5)


# --- the locations of a mix -----------------------------------------------------------------------


def test_the_quarters_of_a_map_keep_ties_together_and_leave_the_border_out() -> None:
    nan = math.nan
    heat = torch.tensor(
        [
            [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]],  # 2 of 8
            [[0.1, 0.1, 0.1, 0.4], [0.5, 0.8, 0.8, 0.8]],
            [[nan, nan, nan, 0.4], [0.5, 0.6, 0.7, 0.8]],  # 1 of 5
            [[0.5] * 4, [0.5] * 4],
            [[nan, nan, nan, nan], [nan, 1.0, 2.0, 3.0]],  # 0 of 3
        ]
    )
    cool, hot = _cool_and_hot(heat)
    assert cool.flatten(1).int().tolist() == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [1] * 8,
        [0] * 8,
    ]
    assert hot.flatten(1).int().tolist() == [
        [0, 0, 0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 1],
        [1] * 8,
        [0] * 8,
    ]


def test_pasted_cells_are_unknown_with_their_share_and_the_map_limits_the_others() -> None:
    """A quarter of 12 cells is 3. One known, and by the map three cool cells of which two count."""
    cells = [  # probability of the class, heat, share pasted, rejection logit: what it is
        (0.99, 1.0, 0.0, 0.4),  # known
        (0.99, 0.9, 0.25, 0.3),  # sure and hot, but a quarter of it is pasted
        (0.99, 0.7, 0.0, 9.0),  # sure, and not hot enough
        (0.50, 0.8, 0.0, 9.0),  # hot, and not sure
        (0.01, 0.0, 0.0, 0.2),  # hopeless and cool: unknown
        (0.01, 0.1, 0.75, 0.1),  # the same, and pasted besides: unknown once
        (0.01, 0.5, 0.0, 9.0),  # hopeless, and not cool enough
        (0.50, 0.2, 0.0, 9.0),  # cool, and not hopeless
        (0.50, 0.5, 0.5, 0.0),  # half of it pasted
        (0.50, 0.5, 1.0, -0.1),  # all of it
        (0.50, 0.5, 0.0, 9.0),
        (0.50, 0.5, 0.0, 9.0),
    ]
    sure, heat, pasted, s = zip(*cells, strict=True)
    model = by_hand([list(sure)], [list(s)])
    regions = Regions(torch.tensor([[pasted]]), torch.tensor([[heat]]))
    out = method_of(Ssod()).loss(blank(regions), batch_of([0]), model)  # type: ignore[arg-type]
    weights = {0.3: 0.25, 0.2: 1.0, 0.1: 1.0, 0.0: 0.5, -0.1: 1.0}
    unknown = sum(w * softplus(x) for x, w in weights.items()) / sum(weights.values())
    assert out.scalars["rejection_loss"].item() == pytest.approx(softplus(-0.4) + unknown, rel=1e-5)
    assert out.scalars["known_share"].item() == pytest.approx(1 / 12)
    assert out.scalars["unknown_share"].item() == pytest.approx(3.75 / 12)


def test_less_than_one_pasted_cell_weighs_what_it_is() -> None:
    """The divisor is at least 1: a sliver of background in a batch is no full sample."""
    model = by_hand([[0.5, 0.5]], [[0.3, 0.3]])
    regions = Regions(torch.tensor([[[0.2, 0.0]]]), torch.full((1, 1, 2), math.nan))
    out = method_of(Ssod()).loss(blank(regions), batch_of([0]), model)  # type: ignore[arg-type]
    assert out.scalars["rejection_loss"].item() == pytest.approx(0.2 * softplus(0.3), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        (Ssod(gamma=0.3), {}, "--method.gamma must be 0.5 .. 1"),
        (Ssod(weight=-1), {}, "--method.weight"),
        (Ssod(share=0.6), {}, "--method.share must be 0 .. 0.5"),
        (Ssod(gate_known=2), {}, "--method.gate-known"),
        (Ssod(gate_accuracy=math.nan), {}, "--method.gate-accuracy"),
        (BackMix(host=Ssod(share=0.6)), {}, "--method.host.share must be"),
        (BackMix(host=Ssod(), cam_source="raw+loss"), {}, "--method.cam-source raw+loss needs"),
        (Ssod(train="head"), {}, "add --init"),
        (Ssod(), {"optim": Optim(label_smoothing=0.1)}, "--optim.label-smoothing 0.1 keeps"),
        (Ssod(gamma=0.9), {"optim": Optim(label_smoothing=0.1)}, "smooth by less than 0.1"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    data: Path, tmp_path: Path, method: Any, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        start(tiny(data, tmp_path / "run", method, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", [Ssod(share=0.1), Ssod(gamma=0.8), Softmax()])
def test_smoothing_that_leaves_known_locations_is_taken(data: Path, method: Any) -> None:
    check(tiny(data, Path("unused"), method, optim=Optim(label_smoothing=0.1)))


def test_there_is_no_loss_of_a_single_image() -> None:
    model = by_hand([[0.5]], [[0.0]])
    with pytest.raises(ValueError, match="mean over the locations of a batch"):
        method_of(Ssod()).per_sample(model.maps, model.maps, torch.tensor([0]), model)  # type: ignore[arg-type]


# --- the gate -------------------------------------------------------------------------------------


def watch(gate: Gate, known: float, accuracy: float, alive: float = 1.0) -> float:
    gate.watch(torch.tensor(known), torch.tensor(accuracy), torch.tensor(alive), least=(0.01, 0.5))
    return gate.weight().item()


@pytest.mark.parametrize(
    ("known", "accuracy", "opens"),
    [(0.02, 0.6, True), (0.009, 0.9, False), (0.5, 0.49, False), (0.0, 0.0, False)],
)
def test_the_gate_opens_only_when_both_conditions_hold(
    known: float, accuracy: float, opens: bool
) -> None:
    gate = Gate(4, CPU)
    assert gate.weight().item() == 0
    weights = [watch(gate, known, accuracy) for _ in range(6)]
    assert weights == ([0.25, 0.5, 0.75, 1.0, 1.0, 1.0] if opens else [0.0] * 6)


def test_the_gate_stays_open_and_rises_on() -> None:
    gate = Gate(4, CPU)
    watch(gate, 0.02, 0.6)
    assert [watch(gate, 0.0, 0.0) for _ in range(4)] == [0.5, 0.75, 1.0, 1.0]


def test_the_gates_means_are_plain_at_first_and_then_forget() -> None:
    gate, generator = Gate(4, CPU), np.random.default_rng(0)
    values = generator.random(150)
    expected = 0.0
    for step, value in enumerate(values):
        watch(gate, float(value), 0.0)
        expected = (
            value / (step + 1) + expected * step / (step + 1)
            if step < 100
            else (0.01 * value + 0.99 * expected)
        )
        if step in (0, 4, 99):
            assert gate.known.item() == pytest.approx(values[: step + 1].mean(), rel=1e-4)
    assert gate.known.item() == pytest.approx(expected, rel=1e-4)
    assert gate.opened.item() == 0


@pytest.mark.parametrize(("share", "opened"), [(0.2, 1), (0.0, 0)])
def test_a_fixed_share_of_known_locations_opens_no_gate(share: float, opened: int) -> None:
    """Where a share is known by definition it says nothing: the accuracy alone decides."""
    model = by_hand([[0.99, 0.98, 0.1, 0.2, 0.3]], [[0.0] * 5])
    method = method_of(Ssod(share=share, gate_known=0.9), opened=False)
    batch = batch_of([0])
    out = method.loss(blank(), batch, model)  # type: ignore[arg-type]
    assert out.scalars["known_share"].item() < 0.9 and out.logits.argmax().item() == 0
    method.after_step(out.figures, torch.ones(()))
    assert method.gate.opened.item() == opened


def test_a_void_step_leaves_the_gates_bits() -> None:
    gate = Gate(4, CPU)
    for step in range(3):
        watch(gate, 0.1 + 0.01 * step, 0.3 + 0.1 * step)
    before = {name: value.clone() for name, value in gate.tensors().items()}
    watch(gate, 0.9, 0.9, alive=0.0)
    assert all(torch.equal(gate.tensors()[name], value) for name, value in before.items())
    watch(gate, 0.9, 0.9)
    assert not any(torch.equal(gate.tensors()[name], value) for name, value in before.items())


def test_the_gate_survives_a_checkpoint() -> None:
    method = method_of(Ssod(), opened=False)
    for known in (0.0, 0.5, 0.02):
        watch(method.gate, known, 0.7)
    saved = {name: value.clone() for name, value in method.tensors().items()}
    other = method_of(Ssod(), opened=False)
    other.load(saved)
    assert watch(other.gate, 0.3, 0.2) == watch(method.gate, 0.3, 0.2) == 0.75
    assert all(torch.equal(method.tensors()[name], x) for name, x in other.tensors().items())


def open_steps(run: Run, count: int) -> tuple[State, list[dict[str, float]]]:
    """Take steps of a run; its state, and what each of them would have logged."""
    _, state, loader = prepare_run(run, "test", [])
    begin(state, run)
    rows = []
    with loader:
        taken = steps(state, loader, run, torch.autocast("cpu", enabled=False))
        for _ in range(count):
            next(taken)
            rows.append(state.interval.take())
    return state, rows


def many_classes(path: Path, classes: int = 64) -> Path:
    """Noise of so many classes, one image each: nothing can be learned of it quickly."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (classes, SIDE, SIDE, 3), dtype=np.uint8)
    return write_set(path, images, np.arange(classes), [f"class {k}" for k in range(classes)])


def test_many_classes_do_not_collapse_before_the_network_can_tell_them(tmp_path: Path) -> None:
    """The trap: of 64 classes a fresh network gives every one less than 1 - gamma everywhere.

    Behind the gate they cost nothing; without it every location is pulled to "unknown".
    """
    data = many_classes(tmp_path / "many.beton")
    optim = Optim(lr=0.05, weight_decay=0.0)
    base = replace(quick(data, tmp_path / "run", Ssod()), optim=optim)
    gated, rows = open_steps(base, 8)
    assert rows[0]["unknown_share"] == 1
    assert all(row["gate"] == 0 for row in rows)
    fresh = prepared(base)[0].model.rejection
    head = gated.model.rejection
    assert fresh is not None and head is not None
    assert torch.equal(head.weight, fresh.weight) and head.bias.item() == 0

    trapped, rows = open_steps(replace(base, method=OPEN), 8)
    assert rows[-1]["gate"] == 1
    assert trapped.model.rejection is not None
    assert trapped.model.rejection.bias.item() < -0.1


def prepared(run: Run, epoch: int = 0) -> tuple[State, Batch]:
    _, state, loader = prepare_run(run, "test", [])
    begin(state, run)
    with loader:
        return state, next(iter(loader.batches(Place(run.seed, epoch))))


def test_until_the_gate_opens_a_run_is_softmax_to_the_bit(data: Path, tmp_path: Path) -> None:
    """The rejection head draws after the body, and its gradient into the body is zero."""
    closed = Ssod(gate_accuracy=1.0, gate_known=1.0)
    one, _ = open_steps(quick(data, tmp_path / "a", closed), 6)
    other, _ = open_steps(quick(data, tmp_path / "b", Softmax()), 6)
    mine = one.model.state_dict()
    for name, value in other.model.state_dict().items():
        assert torch.equal(mine[name], value), name


# --- gradients through a real network -------------------------------------------------------------


def gradients(run: Run) -> dict[str, Tensor | None]:
    """Gradients of the rejection loss alone, by parameter."""
    state, batch = prepared(run)
    method, model = state.method, state.model
    assert isinstance(method, SsodMethod)
    method.gate.opened.fill_(method.ramp)
    views = views_of(method, batch)
    losses = []
    for weight in (2.0, 1.0):
        torch.manual_seed(0)  # the same dropout
        losses.append(
            replace_options(method, replace(method.options, weight=weight))
            .loss(views, batch, model)
            .loss
        )
    (losses[0] - losses[1]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def replace_options(method: SsodMethod, options: Ssod) -> SsodMethod:
    """The same method, with the same gate, under other options."""
    other = replace(method, options=options)
    other.gate = method.gate
    return other


def test_the_rejection_loss_reaches_the_body_in_joint_training_but_not_the_class_head(
    data: Path,
) -> None:
    found = gradients(tiny(data, Path("unused"), Ssod(share=0.25)))
    assert all(grad is not None for grad in found.values())
    moved = {name for name, grad in found.items() if grad is not None and grad.abs().max() > 1e-7}
    assert {"features.1.weight", "rejection.weight", "rejection.bias"} <= moved
    assert "head.weight" not in moved


def test_alone_the_rejection_head_is_all_that_has_a_gradient(data: Path, tmp_path: Path) -> None:
    before = tiny(data, tmp_path / "before", Softmax(), epochs=1)
    assert start(before) == 0
    run = tiny(data, tmp_path / "head", Ssod(train="head", share=0.25), init=before.out)
    found = gradients(run)
    assert {name for name, grad in found.items() if grad is not None} == {
        "rejection.weight",
        "rejection.bias",
    }


# --- runs -----------------------------------------------------------------------------------------


HEAD = Ssod(train="head", share=0.25)
METHODS = {
    "joint": replace(OPEN, share=0.2, require_correct=True),
    "gamma": OPEN,
    "head": HEAD,
    "mixes": BackMix(patch=12, host=OPEN, fill="keep"),
    "mixes, plain": BackMix(patch=12, host=replace(OPEN, pasted=False), cam_source="mix"),
    "mixes, head": BackMix(patch=12, host=HEAD, mask="grey"),
}


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short softmax run, to begin with."""
    torch.set_num_threads(1)
    run = tiny(data, tmp_path_factory.mktemp("trained") / "run", Softmax())
    assert start(run) == 0
    return run.out


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_ends_with_the_same_bits(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = tiny(data, tmp_path / "whole", METHODS[name], init=trained)
    assert start(run) == 0
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["gate"] == 1  # what is stopped in between is the ramp
    assert all(math.isfinite(row["rejection_loss"]) for row in rows)
    # Inside the ramp, inside the next epoch.
    assert_same_bits_when_stopped(run, tmp_path / "stopped", monkeypatch, (2, 2, 99))


@pytest.mark.parametrize("name", ["joint", "mixes"])
def test_a_void_step_leaves_everything_as_it_was(data: Path, tmp_path: Path, name: str) -> None:
    run = tiny(data, tmp_path / "run", METHODS[name])
    _, state, loader = prepare_run(run, "test", [])
    begin(state, run)
    with loader:
        taken = steps(state, loader, run, torch.autocast("cpu", enabled=False))
        next(taken)
        before = {key: value.clone() for key, value in state.tensors().items()}
        assert any(key.endswith("gate.opened") for key in before)
        real = state.method.prepare
        state.method.prepare = poisoned(real)  # type: ignore[method-assign]
        next(taken)
        state.method.prepare = real  # type: ignore[method-assign]
        after = state.tensors()
        for key, value in before.items():
            if key.startswith(("model.", "optimizer.", "method.")):
                assert torch.equal(value, after[key]), key
        next(taken)
        gate = next(key for key in before if key.endswith("gate.opened"))
        assert int(state.tensors()[gate]) == int(before[gate]) + 1


@pytest.mark.parametrize("mixes", [False, True])
def test_a_head_beside_a_network_that_is_never_sure_is_refused(
    data: Path, tmp_path: Path, mixes: bool
) -> None:
    """Of smoothed labels no location reaches gamma: all samples would be unknown."""
    smoothed = quick(
        data, tmp_path / "smoothed", Softmax(), epochs=1, optim=Optim(label_smoothing=0.1)
    )
    assert start(smoothed) == 0

    def beside(options: Ssod) -> Run:
        method = BackMix(patch=12, host=options) if mixes else options
        return quick(data, tmp_path / "run", method, init=smoothed.out)

    name = "method.host" if mixes else "method"
    with pytest.raises(ValueError, match=rf"label-smoothing 0\.1, .*--{name}\.share 0\.1"):
        prepare_run(beside(Ssod(train="head")), "test", [])
    for taken in (Ssod(train="head", share=0.1), Ssod(train="head", gamma=0.8), Ssod()):
        prepare_run(beside(taken), "test", [])[2].close()


def answers(run: Run, data: Path, classes: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Logits and pooled features of all images by a run's weights, evaluated; and labels."""
    model = build_network(run, classes)
    model.load_state_dict(read_weights(run.out, model))
    with open_set((data,)) as stored, torch.no_grad():
        pixels = np.stack([stored.region(i) for i in range(stored.n)])
        labels = np.array(stored.labels)
        images = torch.from_numpy(pixels.reshape(-1, SIDE, SIDE, 3)).permute(0, 3, 1, 2) / 255
        logits, features = model.eval()(images)
    return logits, features.mean((2, 3)), labels


@pytest.mark.parametrize("name", ["head", "mixes, head"])
def test_the_rejection_head_alone_leaves_the_network_to_the_bit(
    data: Path, trained: Path, tmp_path: Path, name: str
) -> None:
    """No weight, no BatchNorm statistics, no dropout; only the rejection head learns."""
    run = tiny(data, tmp_path / "run", METHODS[name], init=trained)
    assert start(run) == 0
    before = safetensors.torch.load_file(trained / "model.safetensors")
    after = safetensors.torch.load_file(run.out / "model.safetensors")
    assert set(after) == set(before)
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    beside = safetensors.torch.load_file(run.out / "heads.safetensors")
    assert set(beside) == {"rejection.weight", "rejection.bias"}
    assert beside["rejection.bias"].item() != 0
    host = replace(run, method=Softmax(), out=trained)
    assert torch.equal(answers(run, data, 4)[0], answers(host, data, 4)[0])


def test_the_log_of_a_frozen_network_shows_the_accuracy_of_evaluation(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    """So nothing is dropped while the rejection head learns; views are the plain ones here."""
    plain = Augment(flip=False, pad=0)
    run = tiny(data, tmp_path / "run", HEAD, init=trained, augment=plain, epochs=1, log_every=9)
    assert start(run) == 0
    row = json.loads((run.out / "log.jsonl").read_text())
    logits, _, labels = answers(replace(run, method=Softmax(), out=trained), data, 4)
    right = (logits.argmax(1).numpy() == labels).mean()
    assert row["accuracy"] == pytest.approx(right) and row["gate"] == 1


def test_a_trained_network_opens_the_gate_after_its_first_step(data: Path, tmp_path: Path) -> None:
    plain = Augment(flip=False, pad=0)
    before = quick(data, tmp_path / "before", Softmax(), augment=plain, epochs=12)
    assert start(before) == 0
    run = replace(before, out=tmp_path / "after", method=Ssod(), init=before.out)
    state, rows = open_steps(run, 5)
    assert [row["gate"] for row in rows] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert isinstance(state.method, SsodMethod) and state.method.gate.accuracy > 0.9


@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_wait_for_the_device(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("backmix.kernels.mix_background._reading_is_free", lambda tensor: False)
    run = tiny(data, tmp_path / "run", METHODS[name], init=trained)
    _, state, opened = prepare_run(run, "test", [])

    def waits(self: Tensor, *_: object) -> None:
        raise AssertionError("a copy to the host waits for the device")

    with opened:
        batches = list(opened.batches(Place(0)))
        autocast = torch.autocast("cpu", enabled=False)
        for copy in ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__"):
            monkeypatch.setattr(Tensor, copy, waits)
        with NoWaiting():
            for batch in batches:
                loop.take_step(state, batch, run, 0.1, autocast)


def test_a_mix_in_growing_views_knows_its_smaller_map(data: Path, tmp_path: Path) -> None:
    run = tiny(data, tmp_path / "run", METHODS["mixes"])
    run = replace(run, loader=replace(run.loader, size=32, grow_from=16, grow=(0, 2)))
    assert start(run) == 0
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["rejection_loss"]) for row in rows)


# --- what it learns -------------------------------------------------------------------------------


NAMES = ["red", "green", "blue", "nothing", "hole", "grey"]
KNOWN = tuple(NAMES[:3])


def scenes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bars anywhere on noise; what is unknown has the background of what is known."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(NAMES)
    images = generator.integers(0, 90, (count, SIDE, SIDE, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        y, x = generator.integers(2, 14, 2)
        bar = image[y : y + 12, x : x + 12]
        match NAMES[label]:
            case "red" | "green" | "blue":
                bar[..., label] += 140
            case "hole":
                bar //= 8
            case "grey":
                bar[:6, :6] += 70
    return images, labels


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bars")
    return (
        write_set(folder / "train.beton", *scenes(300, 0), NAMES),
        write_set(folder / "test.beton", *scenes(210, 1), NAMES),
    )


@pytest.mark.parametrize("name", ["joint", "head", "mixes"])
def test_the_rejection_head_tells_unknown_classes_from_known_ones(
    bars: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """Three of six classes are known; the margin over chance, 0.5, is 0.4.

    With weight 1 a joint run this short may lose a class: one that is learned after the gate has
    opened counts as unknown until then, and is pulled away with the background.
    """
    light = Ssod(weight=0.3)
    run = quick(bars[0], tmp_path / name, light, epochs=8, split=Split(known=KNOWN))
    if name == "head":
        before = replace(run, out=tmp_path / "before", method=Softmax())
        assert start(before) == 0
        run = replace(run, method=Ssod(train="head"), init=before.out, epochs=3)
    elif name == "mixes":
        run = replace(run, method=BackMix(patch=8, host=light, cam_source="mix"))
    assert start(run) == 0
    logits, features, labels = answers(run, bars[1], len(KNOWN))
    weights = safetensors.torch.load_file(run.out / "heads.safetensors")
    score = (features @ weights["rejection.weight"][0] + weights["rejection.bias"]).double().numpy()
    known = labels < len(KNOWN)
    assert (logits.argmax(1).numpy() == labels)[known].mean() > 0.95
    assert metrics.auroc(score[known], score[~known]) > 0.9
