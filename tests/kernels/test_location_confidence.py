"""location_confidence: both forms against a slow formula, hostile values, compilers, errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from backmix.kernels import configs
from backmix.kernels.configs import ConfidenceBlocks
from backmix.kernels.location_confidence import (
    Confidence,
    _location_confidence_triton,
    location_confidence,
    location_confidence_meaning,
)
from tests.kernels.support import (
    DEVICES,
    UGLY,
    poisoned,
    poisoned_allocations,
    waiting_is_an_error,
)

FP16_OR_32 = [torch.float32, torch.float16]
DTYPES = [*FP16_OR_32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
"""The interpreter multiplies bf16 wrongly."""
SMALL = ConfidenceBlocks(32, 16, 32, warps=4, stages=2, group=2, joined=32)
"""Blocks of which a small case has several of each."""

NUMPY_SAYS = ("ignore:invalid value", "ignore:overflow", "ignore:All-NaN slice")
"""What NumPy, under the interpreter, says of infinities and NaN, which these tests are about."""


@contextmanager
def blocks(wanted: ConfidenceBlocks) -> Iterator[None]:
    with mock.patch.object(configs, "confidence_blocks", lambda *_: wanted):
        yield


@dataclass
class Case:
    features: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor

    def run(self, **options: Any) -> Confidence:
        return location_confidence(self.features, self.weight, self.bias, self.labels, **options)

    def to(self, device: str) -> Case:
        bias = None if self.bias is None else poisoned(self.bias, device)
        return Case(
            poisoned(self.features, device),
            poisoned(self.weight, device),
            bias,
            poisoned(self.labels, device),
        )


def random_case(
    n: int,
    channels: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    *,
    spread: float = 3.0,
    bias: bool = True,
    side: tuple[int, ...] = (),
    seed: int = 0,
) -> Case:
    """Logits of standard deviation `spread`."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(n, channels, *side, generator=rng)
    if side:
        features = features.to(memory_format=torch.channels_last)
    weight = torch.randn(classes, channels, generator=rng) * spread / math.sqrt(channels)
    return Case(
        features.to(dtype),
        weight.to(dtype),
        torch.randn(classes, generator=rng) if bias else None,
        torch.randint(-1, classes + 1, (n,), generator=rng),
    )


def slow(case: Case) -> tuple[Tensor, Tensor]:
    """Return p_true and p_max in float64, one location after another, from the definition."""
    features = case.features.double().cpu().numpy()
    weight = case.weight.to(case.features.dtype).double().cpu().numpy()
    bias = np.zeros(len(weight)) if case.bias is None else case.bias.double().cpu().numpy()
    p_true = np.zeros((len(features), *features.shape[2:]))
    p_max = np.zeros_like(p_true)
    for place in np.ndindex(p_true.shape):
        label = int(case.labels[place[0]])
        channels = features[(place[0], slice(None), *place[1:])]
        logit = [math.fsum(w * channels) + b for w, b in zip(weight, bias, strict=True)]
        p = [1 / math.fsum(math.exp(other - z) for other in logit) for z in logit]
        p_true[place] = p[label] if 0 <= label < len(p) else 0.0
        p_max[place] = max(p)
    return torch.from_numpy(p_true), torch.from_numpy(p_max)


def rounding(case: Case) -> Tensor:
    """Return by how much of itself a probability may be off, per location.

    Rounding moves a logit by about eps of the sum of its products' absolute values. A probability
    takes two logits, and their difference is scaled and raised; the exponential, the sum and the
    division add a few eps of their own.
    """
    rows = case.features.double().abs().movedim(1, -1)
    sums = rows @ case.weight.double().abs().T
    if case.bias is not None:
        sums += case.bias.double().abs()
    return (8 + 4 * sums.amax(-1)) * torch.finfo(torch.float32).eps


def expect_right(case: Case, device: str, wanted: ConfidenceBlocks | None = SMALL) -> None:
    there = case.to(device)
    with poisoned_allocations():
        if wanted is None:
            found = there.run(backend="triton")
        else:
            with blocks(wanted):
                found = there.run(backend="triton")
    off = rounding(case)
    for ours, reference in zip(found, slow(case), strict=True):
        assert ours.dtype == torch.float32 and ours.shape == reference.shape
        error = (ours.double().cpu() - reference).abs()
        assert (error <= off * reference).all(), (error / reference / off).max()


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch", pytest.param("triton", id="triton")])
def test_a_worked_example(form: Any) -> None:
    # Logits (0, log 2, log 5) and, with the second channel, (log 8, log 2, log 5).
    weight = torch.tensor([[0.0, math.log(8)], [math.log(2), 0.0], [math.log(5), 0.0]])
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    case = Case(features, weight, None, torch.tensor([1, 1, -1, 3]))
    if form == "triton":
        case = case.to("cuda" if torch.cuda.is_available() else "cpu")
    p_true, p_max = case.run(backend=form)
    expected = torch.tensor([[2 / 8, 2 / 15, 0.0, 0.0], [5 / 8, 8 / 15, 8 / 15, 5 / 8]])
    torch.testing.assert_close(torch.stack([p_true, p_max]).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_meaning_is_softmax(dtype: torch.dtype) -> None:
    case = random_case(5, 33, 17, dtype, side=(2, 3))
    case.weight = case.weight.float() * 1.001  # is rounded to the features' dtype
    for found, reference in zip(case.run(backend="torch"), slow(case), strict=True):
        torch.testing.assert_close(found.double(), reference, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
# One below, at and one above a block and two blocks of classes; many blocks.
@pytest.mark.parametrize("classes", [2, 15, 16, 17, 31, 32, 33, 113])
def test_any_number_of_classes(device: str, dtype: torch.dtype, classes: int) -> None:
    expect_right(random_case(33, 33, classes, dtype), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", UGLY)
def test_any_number_of_locations(device: str, n: int) -> None:
    # Blocks of 32 in groups of 2: the last group is whole, short, or alone.
    expect_right(random_case(n, 17, 33), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [*UGLY, 64, 65])
def test_any_number_of_channels(device: str, dtype: torch.dtype, channels: int) -> None:
    expect_right(random_case(5, channels, 18, dtype), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 100, 128, 129, 300])
def test_the_blocks_that_run_in_training(device: str, dtype: torch.dtype, classes: int) -> None:
    expect_right(random_case(130, 72, classes, dtype), device, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [None, torch.float32, torch.float16, torch.bfloat16])
def test_any_bias(device: str, bias: torch.dtype | None) -> None:
    case = random_case(7, 16, 20)
    case.bias = None if bias is None else case.bias.to(bias)  # type: ignore[union-attr]
    expect_right(case, device)


@pytest.mark.parametrize("device", DEVICES)
def test_the_weight_may_have_another_dtype(device: str) -> None:
    case = random_case(9, 24, 20, torch.float16)
    case.weight = case.weight.float() * 1.001
    expect_right(case, device)


@pytest.mark.parametrize("device", DEVICES)
def test_the_size_of_the_blocks_does_not_matter(device: str) -> None:
    case = random_case(70, 40, 50).to(device)
    found = []
    for shape in ((32, 16, 16), (16, 64, 32), (64, 32, 64)):
        with blocks(ConfidenceBlocks(*shape, warps=4, stages=2, group=3, joined=16)):
            found.append(case.run(backend="triton"))
    for other in found[1:]:
        torch.testing.assert_close(tuple(other), tuple(found[0]), rtol=1e-5, atol=1e-7)


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [(1, 1), (4, 4), (3, 5)])
def test_a_feature_map_has_a_confidence_at_each_location(device: str, side: Any) -> None:
    case = random_case(3, 24, 20, side=side)
    assert case.to(device).run(backend="triton").p_true.shape == (3, *side)
    expect_right(case, device)


@pytest.mark.parametrize("device", DEVICES)
def test_the_memory_format_does_not_matter(device: str) -> None:
    case = random_case(3, 24, 20, side=(2, 3)).to(device)
    wide = torch.full((3, 2, 3, 48), torch.nan, device=device)
    wide[..., ::2] = case.features.permute(0, 2, 3, 1)
    found = case.run(backend="triton")
    for features in (case.features.contiguous(), wide[..., ::2].permute(0, 3, 1, 2)):
        other = replace(case, features=features).run(backend="triton")
        assert other.p_true.equal(found.p_true) and other.p_max.equal(found.p_max)
    rows = Case(
        case.features.permute(0, 2, 3, 1).reshape(18, 24).T.contiguous().T,
        case.weight.T.contiguous().T,
        case.bias,
        case.labels.repeat_interleave(6),
    ).run(backend="triton")
    assert rows.p_true.equal(found.p_true.flatten()) and rows.p_max.equal(found.p_max.flatten())


def test_channels_last_features_are_not_copied() -> None:
    features = random_case(3, 24, 20, side=(2, 3)).features
    from backmix.kernels.location_confidence import _dense, _rows

    assert _dense(_rows(features)).data_ptr() == features.data_ptr()


# --- hostile values ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [SMALL, None], ids=["several blocks", "one block"])
@pytest.mark.parametrize("label", [-(2**63), -1, 18, 19, 2**32 + 3, 2**63 - 1])
def test_a_label_of_no_class_has_probability_0(device: str, wanted: Any, label: int) -> None:
    case = random_case(3, 16, 18)
    case.labels = torch.tensor([4, label, 5])
    expect_right(case, device, wanted)
    assert case.to(device).run(backend="triton").p_true[1] == 0


@pytest.mark.filterwarnings(*NUMPY_SAYS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [SMALL, None], ids=["several blocks", "one block"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_nan_and_alone(device: str, wanted: Any, bad: float) -> None:
    case = random_case(40, 16, 33)
    clean = location_confidence_meaning(case.features, case.weight, case.bias, case.labels)
    case.features[[3, 35], 2] = bad
    case.labels[3], case.labels[35] = 1, -1
    case.weight[:, 2] = 1.0
    clean = location_confidence_meaning(
        case.features.nan_to_num(0, 0, 0), case.weight, case.bias, case.labels
    )
    with blocks(wanted) if wanted else mock.MagicMock():
        found = case.to(device).run(backend="triton")
    meant = location_confidence_meaning(case.features, case.weight, case.bias, case.labels)
    for ours, plain, others in zip(found, meant, clean, strict=True):
        torch.testing.assert_close(ours.cpu(), plain, equal_nan=True, rtol=1e-5, atol=1e-7)
        keep = [row for row in range(40) if row not in (3, 35)]
        torch.testing.assert_close(ours.cpu()[keep], others[keep], rtol=1e-5, atol=1e-7)
    assert found.p_max[[3, 35]].isnan().all() and found.p_true[3].isnan()
    assert found.p_true[35] == 0  # of no class, whatever the logits


@pytest.mark.filterwarnings(*NUMPY_SAYS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [SMALL, None], ids=["several blocks", "one block"])
def test_a_class_taken_out_by_its_bias_has_probability_0(device: str, wanted: Any) -> None:
    case = random_case(6, 16, 40)
    assert case.bias is not None
    case.labels = torch.tensor([0, 15, 16, 31, 32, 39])
    case.bias[:32] = -torch.inf  # two whole blocks
    expect_right_by_meaning(case, device, wanted)
    with blocks(wanted) if wanted else mock.MagicMock():
        found = case.to(device).run(backend="triton")
        assert found.p_true[:4].eq(0).all() and found.p_true[4:].gt(0).all()
        case.bias[:] = -torch.inf
        assert torch.stack(case.to(device).run(backend="triton")).isnan().all()
    assert torch.stack(case.run(backend="torch")).isnan().all()


def expect_right_by_meaning(case: Case, device: str, wanted: ConfidenceBlocks | None) -> None:
    meant = location_confidence_meaning(case.features, case.weight, case.bias, case.labels)
    with blocks(wanted) if wanted else mock.MagicMock():
        found = case.to(device).run(backend="triton")
    for ours, plain in zip(found, meant, strict=True):
        torch.testing.assert_close(ours.cpu(), plain, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.filterwarnings(*NUMPY_SAYS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [SMALL, None], ids=["several blocks", "one block"])
def test_huge_logits_do_not_overflow(device: str, wanted: Any) -> None:
    features = torch.tensor([[1e30, 1.0], [-1e30, 1.0], [0.0, 1.0]])
    weight = torch.zeros(40, 2)
    weight[7, 0], weight[35, 0] = 3e8, -3e8  # logits of 3e38, the last that fp32 can hold
    case = Case(features, weight, None, torch.tensor([7, 7, 7]))
    with blocks(wanted) if wanted else mock.MagicMock():
        p_true, p_max = case.to(device).run(backend="triton")
    assert p_true[:2].tolist() == [1.0, 0.0] and p_max[:2].tolist() == [1.0, 1.0]
    torch.testing.assert_close(p_true[2].item(), 1 / 40)


@pytest.mark.parametrize("device", DEVICES)
def test_no_probability_is_above_1_or_below_the_share_of_one_class(device: str) -> None:
    for spread in (0.0, 1.0, 100.0):
        case = random_case(33, 16, 33, spread=spread, bias=spread > 0).to(device)
        with blocks(SMALL):
            p_true, p_max = case.run(backend="triton")
        assert p_max.le(1).all() and p_max.ge(1 / 33 * (1 - 1e-6)).all()
        assert p_true.le(p_max).all() and p_true.ge(0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_location_does_not_depend_on_the_others(device: str) -> None:
    case = random_case(70, 24, 40).to(device)
    with blocks(SMALL):
        whole = case.run(backend="triton")
        for row in (0, 31, 32, 69):
            alone = Case(case.features[row : row + 1], case.weight, case.bias, case.labels[[row]])
            found = alone.run(backend="triton")
            assert found.p_true[0] == whole.p_true[row] and found.p_max[0] == whole.p_max[row]


@pytest.mark.parametrize("device", DEVICES)
def test_twice_the_same_bits(device: str) -> None:
    case = random_case(70, 40, 100, torch.float16).to(device)
    with blocks(SMALL):
        first, second = case.run(backend="triton"), case.run(backend="triton")
    assert first.p_true.equal(second.p_true) and first.p_max.equal(second.p_max)


# --- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("side", [(), (2, 3), (0, 3)])
def test_no_locations_have_no_confidence(form: Any, side: tuple[int, ...]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 2 if 0 in side else 0
    found = Case(
        torch.zeros(n, 8, *side, device=device),
        torch.zeros(3, 8, device=device),
        None,
        torch.zeros(n, dtype=torch.int64, device=device),
    ).run(backend=form, check=True)
    assert all(p.shape == (n, *side) and p.dtype == torch.float32 for p in found)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_nothing_has_a_gradient(form: Any) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = random_case(3, 16, 18).to(device)
    assert case.bias is not None
    for tensor in (case.features, case.weight, case.bias):
        tensor.requires_grad_()
    found = case.run(backend=form)
    assert not found.p_true.requires_grad and not found.p_max.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_op_is_what_torch_expects(device: str, bias: bool) -> None:
    case = random_case(6, 16, 18, bias=bias).to(device)
    rows = case.features
    for labels in (case.labels, case.labels[:2]):
        arguments = (rows, case.weight, case.bias, labels)
        torch.library.opcheck(_location_confidence_triton, arguments)
    with torch._subclasses.FakeTensorMode() as fake:
        there = [None if a is None else fake.from_tensor(a) for a in arguments]
        faked = _location_confidence_triton(*there)  # type: ignore[arg-type]
    for real, made in zip(_location_confidence_triton(*arguments), faked, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (made.shape, made.stride(), made.dtype)


class Network(torch.nn.Module):
    """A convolution, a classifier, and a head that is asked whether a location is known."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.classifier = torch.nn.Linear(16, 18)
        self.known = torch.nn.Linear(16, 1)

    def forward(self, images: Tensor, labels: Tensor, backend: Any) -> Tensor:
        """SSOD: the sampler's labels stand on location_confidence, without a gradient."""
        features = self.body(images).relu()
        p_true = location_confidence(
            features, self.classifier.weight, self.classifier.bias, labels, backend=backend
        ).p_true
        score = self.known(features.permute(0, 2, 3, 1))[..., 0]
        inside, outside = p_true >= 0.06, p_true <= 0.05
        softplus = torch.nn.functional.softplus
        loss = (softplus(-score) * inside).sum() / inside.sum().clamp(min=1)
        loss = loss + (softplus(score) * outside).sum() / outside.sum().clamp(min=1)
        logits = self.classifier(features.mean((2, 3)))
        return loss + torch.nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_training_step_compiles_as_one_graph(device: str, dynamic: Any, backend: Any) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = Network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3):
        images = torch.randn(n, 3, 8, 8, device=device)
        labels = torch.arange(n, device=device)
        gradients = []
        for form in (compiled, network):
            network.zero_grad()
            form(images, labels, backend).backward()
            gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_does_not_narrow_the_logits(backend: Any) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = random_case(5, 16, 18, torch.float16).to(device)
    found = case.run(backend=backend)
    with torch.autocast(device, torch.bfloat16):
        inside = case.run(backend=backend)
    assert inside.p_true.equal(found.p_true) and inside.p_max.equal(found.p_max)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": [1.0]}, TypeError, "features must be a tensor, got list"),
        ({"features": torch.zeros(4, 5, 3)}, ValueError, r"\[n, C\] or \[n, C, h, w\], got \[4, 5"),
        ({"features": torch.zeros(4, 5).double()}, TypeError, "features must be float32 or"),
        ({"weight": torch.zeros(3, 6)}, ValueError, r"weight must have shape \[K, 5\], got \[3, 6"),
        ({"weight": torch.zeros(0, 5)}, ValueError, "weight must have classes and channels"),
        ({"weight": torch.zeros(3, 5).int()}, TypeError, "weight must be float32 or .* got int32"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[3\], got \[4\]"),
        ({"bias": torch.zeros(3).double()}, TypeError, "bias must be .*, got float64"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be int64, got float32"),
        ({"labels": torch.arange(3)}, ValueError, r"labels must have shape \[4\], got \[3\]"),
        ({"weight": torch.zeros(3, 5, device="meta")}, ValueError, "weight must be on cpu"),
        ({"backend": "cuda"}, ValueError, "backend must be torch or triton, got 'cuda'"),
        ({"check": True}, ValueError, r"labels\[2\] must be in 0\.\.2, got 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {
        "features": torch.zeros(4, 5),
        "weight": torch.zeros(3, 5),
        "bias": torch.zeros(3),
        "labels": torch.tensor([0, 2, 3, -1]),
    }
    with pytest.raises(error, match=message):
        location_confidence(**(arguments | changes))


def test_more_classes_than_the_kernel_takes_are_said() -> None:
    case = random_case(1, 1, 65_537)
    with pytest.raises(ValueError, match="65,537 classes, the most are 65,536"):
        case.run(backend="triton")
    assert case.run().p_max.isfinite().all()


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 2048, 1000, (7, 7)), (64, 512, 21_841, (4, 4))])
def test_the_shapes_of_training_on_a_gpu(shape: Any) -> None:
    n, channels, classes, side = shape
    rng = torch.Generator("cuda").manual_seed(0)
    features = torch.randn(n, channels, *side, generator=rng, device="cuda").bfloat16()
    case = Case(
        features.to(memory_format=torch.channels_last),
        (torch.randn(classes, channels, generator=rng, device="cuda") / channels**0.5).bfloat16(),
        torch.randn(classes, generator=rng, device="cuda"),
        torch.randint(classes, (n,), generator=rng, device="cuda"),
    )
    with waiting_is_an_error():
        found = case.run()
    rows = case.features.permute(0, 2, 3, 1).flatten(0, 2).double()
    assert case.bias is not None
    p = (rows @ case.weight.double().T + case.bias).softmax(1)
    own = p.gather(1, case.labels.repeat_interleave(side[0] * side[1])[:, None])[:, 0]
    torch.testing.assert_close(found.p_true.flatten().double(), own, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found.p_max.flatten().double(), p.amax(1), rtol=1e-3, atol=1e-7)


@pytest.mark.gpu
def test_more_features_than_32_bits_can_count() -> None:
    n, channels = 2**31 // 2048 + 300, 2048  # 4.3 GB
    case = random_case(64, channels, 300, torch.bfloat16).to("cuda")
    features = torch.zeros(n, channels, dtype=torch.bfloat16, device="cuda")
    features[-64:] = case.features
    labels = torch.zeros(n, dtype=torch.int64, device="cuda")
    labels[-64:] = case.labels
    found = replace(case, features=features, labels=labels).run()
    alone = case.run()
    torch.testing.assert_close(found.p_true[-64:], alone.p_true, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.p_max[-64:], alone.p_max, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
def test_a_graph_replays_it() -> None:
    case = random_case(256, 128, 300, torch.bfloat16).to("cuda")
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.run()
    case.features.mul_(-1)
    graph.replay()
    expected = case.run()
    assert found.p_true.equal(expected.p_true) and found.p_max.equal(expected.p_max)
