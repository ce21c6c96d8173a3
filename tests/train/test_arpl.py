"""ARPL: its head, its loss, its activation maps, and whole runs of it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backmix.pipeline.batch import Place
from backmix.train import loop
from backmix.train.checkpoint import checkpoint_path, load_tensors
from backmix.train.methods.arpl import ArplMethod, open_space
from backmix.train.methods.backmix import BackMixMethod
from backmix.train.methods.build import build_network
from backmix.train.models.heads import ReciprocalPoints, cam_inputs
from backmix.train.options import Arpl, Augment, BackMix, Optim, Run
from backmix.train.prepare import prepare_run
from backmix.train.trained import load_model
from tests.runs import tiny_images, tiny_run, tiny_set, views_of
from tests.train.test_loop import NoWaiting, assert_same_bits_when_stopped, start

PLAIN = torch.autocast("cpu", enabled=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run_of(data: Path, out: Path, method: Arpl | BackMix, **changes: object) -> Run:
    base = {"model": "classifier32-quarter", "epochs": 2, **changes}
    return replace(tiny_run(data, out), method=method, **base)  # type: ignore[arg-type]


def head_and_maps(
    classes: int = 3, channels: int = 5, n: int = 4
) -> tuple[ReciprocalPoints, Tensor]:
    torch.manual_seed(3)
    head = ReciprocalPoints(classes, channels).double()
    with torch.no_grad():
        head.points.mul_(8)
        head.radius.fill_(0.4)
    return head, torch.randn(4, 5, 2, 3, dtype=torch.float64)


def by_loops(head: ReciprocalPoints, maps: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """Logits and squared distances over C, one number at a time."""
    points = head.points.tolist()
    channels = len(points[0])
    logits, distances = [], []
    for image in maps.tolist():
        f = [sum(sum(row) for row in channel) / 6 for channel in image]
        apart = [sum((a - b) ** 2 for a, b in zip(f, p, strict=True)) / channels for p in points]
        along = [sum(a * b for a, b in zip(f, p, strict=True)) for p in points]
        distances.append(apart)
        logits.append([d - s for d, s in zip(apart, along, strict=True)])
    return logits, distances


def test_logits_and_distances_are_the_sums_written_out() -> None:
    head, maps = head_and_maps()
    logits, distances = by_loops(head, maps)
    assert head(maps).tolist() == [pytest.approx(row, rel=1e-12) for row in logits]
    assert head.distances(maps).tolist() == [pytest.approx(row, rel=1e-12) for row in distances]


def test_logits_by_hand() -> None:
    """f = (1, 2), p = (3, 0) and (0, -1): |f - p|^2 / 2 = 4 and 5, f . p = 3 and -2."""
    head = ReciprocalPoints(2, 2)
    with torch.no_grad():
        head.points.copy_(torch.tensor([[3.0, 0.0], [0.0, -1.0]]))
    maps = torch.tensor([[[[0.0, 2.0]], [[3.0, 1.0]]]])
    assert head(maps).tolist() == [[1.0, 7.0]]
    assert head.distances(maps).tolist() == [[4.0, 5.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_does_not_round_distances(dtype: torch.dtype) -> None:
    """Features as they come, then fp32: the error is that of 128 sums, not of 8 bits."""
    torch.manual_seed(0)
    head = ReciprocalPoints(6, 128)
    maps = (3 + torch.randn(32, 128, 4, 4)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        logits, distances = head(maps), head.distances(maps)
    assert logits.dtype == distances.dtype == torch.float32
    exact, maps = head.double(), maps.double()
    torch.testing.assert_close(logits.double(), exact(maps), rtol=0, atol=1e-5)
    torch.testing.assert_close(distances.double(), exact.distances(maps), rtol=2e-6, atol=0)


def test_the_head_begins_as_published() -> None:
    torch.manual_seed(0)
    head = ReciprocalPoints(200, 512)
    assert head.points.std().item() == pytest.approx(0.1, rel=0.01)
    assert abs(head.points.mean().item()) < 1e-3
    assert head.radius.tolist() == [0.0]


def test_gradients_of_logits_distances_and_hinge() -> None:
    head, maps = head_and_maps()
    labels = torch.tensor([0, 2, 1, 1])

    def of(maps: Tensor, points: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        state = {"points": points, "radius": radius}
        logits = torch.func.functional_call(head, state, (maps,))
        # The second call under another name: functional_call calls `forward` alone.
        products = maps.mean((2, 3)) @ points.T
        return logits, open_space(logits + products, labels, radius)

    arguments = [value.clone().requires_grad_() for value in (maps, head.points, head.radius)]
    assert torch.autograd.gradcheck(of, arguments)
    ours = head.distances(maps)
    torch.testing.assert_close(ours, head(maps) + maps.mean((2, 3)) @ head.points.T)


def test_the_open_space_by_hand() -> None:
    """Inside R - 1 costs nothing; outside one for one, and the radius is pulled after."""
    distances = torch.tensor([[0.5, 9.0], [9.0, 3.0], [2.5, 9.0]], requires_grad=True)
    radius = torch.tensor([3.0], requires_grad=True)
    outside = open_space(distances, torch.tensor([0, 1, 0]), radius)
    assert outside.tolist() == [0.0, 1.0, 0.5]
    outside.sum().backward()
    assert radius.grad is not None and distances.grad is not None
    assert radius.grad.tolist() == [-2.0]
    assert distances.grad.tolist() == [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize(("smoothing", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.0, 2.5)])
def test_the_loss_is_the_formula_image_by_image(
    data: Path, tmp_path: Path, smoothing: float, temperature: float
) -> None:
    """CE against the smoothed target, plus 0.7 max(0, d_y - R + 1), in float64 loops."""
    options = Arpl(weight=0.7, temperature=temperature)
    run = run_of(data, tmp_path / "run", options, optim=Optim(label_smoothing=smoothing))
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        batch = next(iter(loader.batches(Place(0))))
    head = state.model.head
    assert isinstance(head, ReciprocalPoints)
    views = views_of(state.method, batch)
    with torch.no_grad():  # some images inside, some outside
        distances = head.distances(state.model(views.images)[1])
        head.radius.copy_(1 + distances.median())
    out = state.method.loss(views, batch, state.model)
    assert isinstance(state.method, ArplMethod)
    again = state.method.per_sample(out.logits, out.features, batch.labels, state.model)

    expected, outside = [], 0
    points = head.points.detach().double()
    for maps, label in zip(out.features.detach().double(), batch.labels.tolist(), strict=True):
        f = maps.flatten(1).mean(1)
        z = [float((f - p).square().sum() / len(f) - (f * p).sum()) for p in points]
        scaled = [value / temperature for value in z]
        total = math.log(sum(math.exp(value - max(scaled)) for value in scaled)) + max(scaled)
        target = [smoothing / len(z) + (1 - smoothing) * (k == label) for k in range(len(z))]
        entropy = sum(t * (total - s) for t, s in zip(target, scaled, strict=True))
        beyond = float((f - points[label]).square().mean()) - head.radius.item() + 1
        outside += beyond > 0
        expected.append(entropy + 0.7 * max(beyond, 0.0))
    assert 0 < outside < len(batch)
    assert out.per_sample.tolist() == pytest.approx(expected, rel=1e-5)
    assert again.tolist() == pytest.approx(expected, rel=1e-5)
    assert out.loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert out.scalars["radius"].item() == head.radius.item()


def test_activation_maps_are_exact() -> None:
    """The mean of class k's map and |p_k|^2 / C differ from logit k by |f|^2 / C, for all k."""
    torch.manual_seed(0)
    head = ReciprocalPoints(6, 128).double()
    maps = F.leaky_relu(torch.randn(20, 128, 4, 4, dtype=torch.float64), 0.2)
    seen, weights = cam_inputs(head, maps)
    of_cells = torch.einsum("kc,ncij->nkij", weights, seen)
    left = head(maps) - of_cells.mean((2, 3)) - head.points.square().sum(1) / 128
    common = maps.mean((2, 3)).square().sum(1, keepdim=True) / 128
    torch.testing.assert_close(left, common.expand_as(left), rtol=1e-12, atol=1e-12)


def test_activation_maps_are_exact_in_fp32() -> None:
    """Differences of logits are those of the maps' means, to 2e-7 of the terms' size."""
    torch.manual_seed(0)
    head = ReciprocalPoints(6, 128)
    maps = F.leaky_relu(torch.randn(20, 128, 4, 4), 0.2)
    with torch.no_grad():
        seen, weights = cam_inputs(head, maps)
        of_cells = torch.einsum("kc,ncij->nkij", weights, seen).mean((2, 3))
        from_maps = of_cells + head.points.square().sum(1) / 128
        logits = head(maps)
    apart = (logits - logits[:, :1]) - (from_maps - from_maps[:, :1])
    size = maps.mean((2, 3)).norm(dim=1, keepdim=True) * head.points.norm(dim=1)
    assert (apart.abs() / size).max() < 2e-7


@pytest.mark.parametrize(("name", "head"), [("classifier32-quarter", "head"), ("resnet18", "fc")])
def test_points_and_radius_are_parts_of_the_network(data: Path, name: str, head: str) -> None:
    run = run_of(data, Path("unused"), Arpl(), model=name)
    run = replace(run, loader=replace(run.loader, size=64))
    model = build_network(run, 4).eval()
    names = [key for key in model.state_dict() if key.startswith(f"{head}.")]
    assert names == [f"{head}.points", f"{head}.radius"]
    assert f"{head}.weight" not in dict(model.named_parameters())
    with torch.inference_mode():
        logits, features = model(torch.randn(2, 3, 64, 64))
    assert torch.equal(logits, model.head(features)) and logits.shape == (2, 4)


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_the_optimizer_trains_points_and_radius(data: Path, tmp_path: Path, decay: str) -> None:
    """Weight decay acts on the radius with decay `all` alone: by the update written out."""
    optim = Optim(lr=0.5, momentum=0.0, weight_decay=0.1, decay=decay)  # type: ignore[arg-type]
    run = run_of(data, tmp_path / "run", Arpl(weight=0.2), optim=optim)
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        batch = next(iter(loader.batches(Place(0))))
    head = state.model.head
    assert isinstance(head, ReciprocalPoints)
    with torch.no_grad():
        head.radius.fill_(0.5)
    before = head.points.detach().clone()
    loop.take_step(state, batch, run, 0.5, PLAIN)
    # All images lie further out than R - 1 < 0, so the gradient of R is -0.2.
    shrunk = 0.5 * 0.1 * 0.5 if decay == "all" else 0.0
    assert head.radius.item() == pytest.approx(0.5 + 0.5 * 0.2 - shrunk, rel=1e-6)
    assert not torch.equal(head.points, before)


@pytest.mark.parametrize("method", [Arpl(), BackMix(host=Arpl(), patch=12)], ids=["alone", "host"])
def test_a_stopped_run_ends_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Arpl | BackMix
) -> None:
    run = run_of(data, tmp_path / "whole", method)
    assert start(run) == 0
    assert_same_bits_when_stopped(run, tmp_path / "stopped", monkeypatch, (1, 3, 99))
    tensors, _ = load_tensors(checkpoint_path(run.out, 6))
    assert "optimizer.head.points.momentum_buffer" in tensors and "model.head.radius" in tensors


def test_a_step_does_not_wait_for_the_device(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(data, tmp_path / "run", Arpl())
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        batches = list(loader.batches(Place(0)))
    monkeypatch.setattr("backmix.kernels.mix_background._reading_is_free", lambda tensor: False)
    with NoWaiting():
        for batch in batches:
            loop.take_step(state, batch, run, 0.1, PLAIN)


@pytest.mark.parametrize("source", ["raw", "raw+loss", "mix"])
def test_backmix_trains_arpl_on_mixes(data: Path, tmp_path: Path, source: str) -> None:
    """The loss is ARPL's of the mix (and of the plain views), and the bank takes its maps."""
    method = BackMix(host=Arpl(), patch=12, cam_source=source, raw_weight=0.5)  # type: ignore[arg-type]
    run = run_of(data, tmp_path / "run", method)
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        batch = next(iter(loader.batches(Place(0))))
    backmix = state.method
    assert isinstance(backmix, BackMixMethod)
    shown = views_of(backmix, batch)
    out = backmix.loss(shown, batch, state.model)
    head = state.model.head
    assert isinstance(head, ReciprocalPoints)

    def of(views: Tensor) -> Tensor:
        logits, features = state.model(views)
        own = head.distances(features)[torch.arange(len(batch)), batch.labels]
        hinge = (own - head.radius + 1).clamp(min=0)
        return F.cross_entropy(logits, batch.labels) + 0.1 * hinge.mean()

    if source != "raw+loss":
        assert out.loss.item() == pytest.approx(of(shown.images).item(), rel=1e-5)
    out.loss.backward()
    backmix.after_backward(batch, shown, out, state.model, torch.ones(()))
    learnt = (backmix.bank != 0.5).flatten(1).any(1)
    assert set(learnt.nonzero().flatten().tolist()) == set(backmix.row_of[batch.index].tolist())


def fresh_accuracy(run: Run) -> float:
    """The share of fresh images, drawn as the training set was, that a finished run names right."""
    pixels, labels = tiny_images(200, 4, seed=9)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        logits, _ = load_model(run.out)(images)
    return (logits.argmax(1) == torch.from_numpy(labels)).double().mean().item()


@pytest.mark.parametrize("method", [Arpl(), BackMix(host=Arpl(), patch=8)], ids=["alone", "host"])
def test_a_small_training_names_fresh_images(
    data: Path, tmp_path: Path, method: Arpl | BackMix
) -> None:
    """Four classes, chance 0.25: at least 0.75 after 36 steps on 40 images."""
    augment = Augment(flip=False, pad=2)
    run = run_of(data, tmp_path / "run", method, epochs=12, augment=augment, save_steps=0)
    assert start(run) == 0
    assert fresh_accuracy(run) > 0.75


@pytest.mark.parametrize(
    ("arpl", "name"),
    [
        (Arpl(weight=-0.1), "weight"),
        (Arpl(weight=math.nan), "weight"),
        (Arpl(temperature=0.0), "temperature"),
        (Arpl(beta=math.inf), "beta"),
    ],
)
def test_settings_outside_their_ranges_are_refused(
    data: Path, tmp_path: Path, arpl: Arpl, name: str
) -> None:
    with pytest.raises(ValueError, match=f"--method.{name} must be"):
        start(run_of(data, tmp_path / "run", arpl))
    with pytest.raises(ValueError, match=f"--method.host.{name} must be"):
        start(run_of(data, tmp_path / "run", BackMix(host=arpl)))
    assert not (tmp_path / "run").exists()
