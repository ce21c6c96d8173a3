"""PCSSR and RCSSR: the head, its loss, its maps as a host of BackMix, and its three scores."""

import math
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backmix.kernels.class_reconstruction import (
    class_reconstruction,
    class_reconstruction_meaning,
)
from backmix.kernels.update_cam_bank import update_cam_bank
from backmix.pipeline.batch import Place
from backmix.pipeline.beton import open_set
from backmix.train import loop
from backmix.train.loop import steps
from backmix.train.methods.backmix import BackMixMethod
from backmix.train.methods.cssr import CssrMethod
from backmix.train.methods.views import unmixed
from backmix.train.metrics import auroc
from backmix.train.models import heads
from backmix.train.models.classifier32 import Classifier32
from backmix.train.models.heads import Reconstruction, cam_inputs, put_head
from backmix.train.options import Augment, BackMix, Cssr, Optim, Run
from backmix.train.prepare import prepare_run
from backmix.train.recipes import HALF, QUARTER
from backmix.train.scores.cssr import CssrFit, Standard, cell_figures, cssr, standard_of
from backmix.train.trained import load_model
from tests.runs import poisoned, tiny_run, tiny_set, views_of, write_set
from tests.train.test_loop import NoWaiting, assert_same_bits_when_stopped, start

scores_module = import_module("backmix.train.scores.cssr")  # `scores` shows the function instead

PROTOTYPE = Cssr(latent=16)
RECIPROCAL = Cssr(kind="reciprocal", latent=16)
METHODS = {
    "prototype": PROTOTYPE,
    "reciprocal": RECIPROCAL,
    "backmix": BackMix(host=RECIPROCAL, patch=12, fill="keep", rate=0.5),
    "raw+loss": BackMix(host=PROTOTYPE, patch=12, cam_source="raw+loss", donor="other"),
    "mix": BackMix(host=PROTOTYPE, patch=12, cam_source="mix", onto="cool", warmup=1),
}
KINDS = pytest.mark.parametrize("reciprocal", [False, True], ids=["prototype", "reciprocal"])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


def head_of(
    reciprocal: bool = False, classes: int = 3, channels: int = 6, gamma: float = 0.4
) -> Reconstruction:
    torch.manual_seed(classes)
    return Reconstruction(classes, channels, 4, gamma, reciprocal=reciprocal)


def maps(n: int, channels: int = 6, seed: int = 0) -> Tensor:
    """Maps [n, C, 2, 3], channels-last as a network makes them, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, channels, 2, 3, generator=generator)
    return drawn.contiguous(memory_format=torch.channels_last)


def network(head: Reconstruction) -> Classifier32:
    model = Classifier32(2, width=1)
    put_head(model, head)
    return model


def logits_by_loops(head: Reconstruction, features: Tensor) -> np.ndarray:
    """The cells' logits one number at a time, float64 [n, K, g, g']."""
    x = features.double().numpy()
    encoder, decoder = (w.detach().double().numpy() for w in (head.encoder, head.decoder))
    n, channels, height, width = x.shape
    out = np.zeros((n, len(encoder), height, width))
    for i, k, row, column in np.ndindex(*out.shape):
        hidden = [math.tanh(encoder[k, u] @ x[i, :, row, column]) for u in range(len(encoder[k]))]
        error = 0.0
        for c in range(channels):
            rebuilt = sum(h * decoder[k, u, c] for u, h in enumerate(hidden))
            error += abs(rebuilt - x[i, c, row, column])
        logit = head.gamma * error if head.reciprocal else -head.gamma * error
        out[i, k, row, column] = min(100.0, max(-100.0, logit))
    return out


def p_by_loops(head: Reconstruction, features: Tensor) -> np.ndarray:
    """The mean over the cells of their softmax, float64 [n, K]."""
    logits = logits_by_loops(head, features)
    p = np.zeros(logits.shape[:2])
    for i in range(len(p)):
        for row, column in np.ndindex(*logits.shape[2:]):
            powers = [math.exp(z) for z in logits[i, :, row, column]]
            p[i] += np.array(powers) / sum(powers)
    return p / (logits.shape[2] * logits.shape[3])


# --- head --------------------------------------------------------------------------------------


@KINDS
def test_p_is_the_mean_of_the_cells_softmax(reciprocal: bool) -> None:
    head, features = head_of(reciprocal), maps(5)
    log_p = head(features)
    assert log_p.dtype == torch.float32 and log_p.shape == (5, 3)
    np.testing.assert_allclose(log_p.detach().exp(), p_by_loops(head, features), rtol=1e-5)
    cells = head.cell_logits(features).detach()
    np.testing.assert_allclose(cells, logits_by_loops(head, features), rtol=1e-5)


@KINDS
def test_logits_end_at_a_hundred(reciprocal: bool) -> None:
    head, features = (
        head_of(reciprocal),
        maps(4) * torch.tensor([0.0, 1e-3, 60.0, 1e30])[:, None, None, None],
    )
    cells = head.cell_logits(features)
    expected = logits_by_loops(head, features)
    assert (abs(expected[2:]) == 100).any() and (abs(expected[2]) < 100).any()
    np.testing.assert_allclose(cells.detach(), expected, rtol=1e-5, atol=1e-6)
    head(features).sum().backward()
    assert head.encoder.grad is not None and head.encoder.grad.isfinite().all()


def test_the_weights_begin_as_those_of_convolutions() -> None:
    """Their bounds and spread, against 1 x 1 convolutions that torch made itself."""
    torch.manual_seed(0)
    head = Reconstruction(20, 48, 12, 0.1, reciprocal=False)
    down = [nn.Conv2d(48, 12, 1, bias=False).weight for _ in range(20)]
    up = [nn.Conv2d(12, 48, 1, bias=False).weight for _ in range(20)]
    pairs = ((head.encoder.detach(), torch.stack(down)), (head.decoder.detach(), torch.stack(up)))
    for own, theirs in ((one, other.detach()) for one, other in pairs):
        assert own.numel() == theirs.numel()
        assert float(own.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=1e-3)
        assert float(own.std()) == pytest.approx(float(theirs.std()), rel=0.02)
        assert abs(float(own.mean())) < 0.02 * float(own.std()) + 0.005
    assert {name for name, _ in head.named_parameters()} == {"encoder", "decoder"}


def loss_of_convolutions(
    x: Tensor, encoder: Tensor, decoder: Tensor, labels: Tensor, factor: float
) -> Tensor:
    """-log p_y as the paper's code has it, layer by layer: softmax, then the mean, then the log."""
    logits = []
    for down, up in zip(encoder, decoder, strict=True):
        hidden = nn.functional.conv2d(x, down[:, :, None, None]).tanh()
        rebuilt = nn.functional.conv2d(hidden, up.T[:, :, None, None])
        logits.append((factor * (rebuilt - x).abs().sum(1)).clamp(-100, 100))
    p = torch.stack(logits, 1).softmax(1).mean((2, 3))
    return -p.gather(1, labels[:, None]).log().mean()


@KINDS
def test_the_losss_gradients_are_those_of_the_convolutions(reciprocal: bool) -> None:
    head, features = head_of(reciprocal), maps(5).requires_grad_()
    labels = torch.tensor([0, 1, 2, 2, 0])
    method = CssrMethod(Augment(), torch.float32)
    loss = method.per_sample(head(features), features, labels, network(head)).mean()
    found = torch.autograd.grad(loss, [features, head.encoder, head.decoder])
    wide = [y.detach().double().requires_grad_() for y in (features, head.encoder, head.decoder)]
    factor = head.gamma if reciprocal else -head.gamma
    expected = loss_of_convolutions(wide[0], wide[1], wide[2], labels, factor)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(found, torch.autograd.grad(expected, wide), strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


@KINDS
def test_the_kernels_form_trains_the_same_head(
    reciprocal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted: the form that GPUs run, with padding, through permuted maps."""
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(
            heads, "class_reconstruction", partial(class_reconstruction, backend=backend)
        )
        head, features = head_of(reciprocal), maps(3).requires_grad_()
        log_p = head(features)
        gradients = torch.autograd.grad(log_p[:, 1].sum(), [features, *head.parameters()])
        found.append([log_p.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@KINDS
def test_the_gradients_are_differences(reciprocal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, which the door refuses: its specification stands in its place."""
    monkeypatch.setattr(heads, "class_reconstruction", class_reconstruction_meaning)
    head = head_of(reciprocal).double()

    def log_p(features: Tensor, encoder: Tensor, decoder: Tensor) -> Tensor:
        weights = {"encoder": encoder, "decoder": decoder}
        return torch.func.functional_call(head, weights, (features,))

    inputs = [y.detach().double().requires_grad_() for y in (maps(2), *head.parameters())]
    assert torch.autograd.gradcheck(log_p, inputs)


def test_a_class_without_any_probability_still_has_a_finite_loss() -> None:
    """Class 1 rebuilds a feature of 1e4 perfectly, class 0 not at all: p_0 = exp(-100)."""
    head = Reconstruction(2, 1, 1, 1.0, reciprocal=False)
    head.load_state_dict(
        {"encoder": torch.tensor([[[0.0]], [[1.0]]]), "decoder": torch.tensor([[[0.0]], [[1e4]]])}
    )
    log_p = head(torch.full((1, 1, 2, 2), 1e4, requires_grad=True))
    assert log_p.tolist() == [[-100.0, 0.0]]
    (-log_p[0, 0]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_in_bf16_the_softmax_stays_in_fp32() -> None:
    head, features = head_of(channels=64, gamma=0.1), maps(8, channels=64)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = head(features.bfloat16())
    assert narrow.dtype == torch.float32
    # In bf16 they would sum to 1 within 4e-3.
    assert torch.allclose(narrow.exp().sum(1), torch.ones(8), atol=1e-5)
    assert torch.allclose(narrow, head(features), atol=0.02)


# --- as a host of BackMix ----------------------------------------------------------------------


@KINDS
def test_the_map_of_a_class_is_its_probability_in_each_cell(reciprocal: bool) -> None:
    head, features = head_of(reciprocal), maps(4)
    shown, weights = cam_inputs(head, features)
    assert not shown.requires_grad
    powers = np.exp(logits_by_loops(head, features))
    q = powers / powers.sum(1, keepdims=True)
    for k in range(3):
        heat = torch.einsum("d,ndhw->nhw", weights[k], shown)
        np.testing.assert_allclose(heat, q[:, k], rtol=1e-5)
    bank = torch.full((4, 2, 3), 0.5)
    labels = torch.tensor([2, 0, 1, 1])
    whole = torch.tensor([[0, 0, 65536, 65536]] * 4, dtype=torch.int32)
    update_cam_bank(bank, shown, weights, labels, torch.arange(4), box=whole, rate=1.0)
    own = q[np.arange(4), labels]
    low, high = own.min((1, 2), keepdims=True), own.max((1, 2), keepdims=True)
    np.testing.assert_allclose(bank, (own - low) / (high - low), atol=1e-4)


def prepared(data: Path, method: Cssr | BackMix, epoch: int = 1):
    """A method with the second epoch's first batch, and its network."""
    _, state, loader = prepare_run(cssr_run(data, Path("unused"), method), "test", [])
    with loader:
        batch = next(iter(loader.batches(Place(0, epoch))))
    return state.method, batch, state.model


def cssr_run(data: Path, out: Path, method: Cssr | BackMix, **changes: object) -> Run:
    return replace(tiny_run(data, out), method=method, **changes)  # type: ignore[arg-type]


def test_the_bank_takes_the_probabilities_of_the_plain_view(data: Path) -> None:
    method, batch, model = prepared(data, replace(METHODS["backmix"], rate=1.0))
    assert isinstance(method, BackMixMethod)
    views = views_of(method, batch)
    out = method.loss(views, batch, model)
    method.after_backward(batch, views, out, model, torch.ones(()))
    model.eval()
    with torch.no_grad():
        _, features = model(unmixed(batch, method.augment, None))
        q = model.head.cell_logits(features).softmax(1)  # type: ignore[union-attr, operator]
    own = q[torch.arange(len(batch)), batch.labels]
    low, high = own.amin((1, 2), keepdim=True), own.amax((1, 2), keepdim=True)
    stored = method.bank[method.row_of[batch.index]].float()
    assert torch.allclose(stored, (own - low) / (high - low), atol=2e-3)


def test_the_raw_views_count_with_their_weight(data: Path) -> None:
    options = BackMix(host=PROTOTYPE, patch=12, cam_source="raw+loss", raw_weight=0.25)
    method, batch, model = prepared(data, options)
    assert isinstance(method, BackMixMethod)
    model.eval()  # without dropout the same views give the same logits
    views = views_of(method, batch)
    out = method.loss(views, batch, model)
    mixed, _ = model(views.images)
    raw, _ = model(unmixed(batch, method.augment, None))
    rows = torch.arange(len(batch))
    expected = -mixed[rows, batch.labels].mean() - 0.25 * raw[rows, batch.labels].mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


# --- in the loop -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reciprocal", "backmix", "raw+loss", "mix"])
def test_a_stopped_run_ends_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = cssr_run(data, tmp_path / "whole", METHODS[name], epochs=2)
    assert start(run) == 0
    # inside an epoch, and at its end
    assert_same_bits_when_stopped(run, tmp_path / "stopped", monkeypatch, (2, 3, 99))


@pytest.mark.parametrize("name", ["prototype", "backmix", "mix"])
def test_a_step_does_not_wait_for_the_device(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("backmix.kernels.mix_background._reading_is_free", lambda tensor: False)
    run = cssr_run(data, Path("unused"), METHODS[name])
    _, state, opened = prepare_run(run, "test", [])

    def waits(self: Tensor, *_: object) -> None:
        raise AssertionError("a copy to the host waits for the device")

    with opened:
        batches = list(opened.batches(Place(0, 1)))
        autocast = torch.autocast("cpu", enabled=False)
        for copy in ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__"):
            monkeypatch.setattr(Tensor, copy, waits)
        with NoWaiting():
            for batch in batches:
                loop.take_step(state, batch, run, 0.1, autocast)


def test_a_void_step_leaves_everything_as_it_was(data: Path) -> None:
    run = cssr_run(data, Path("unused"), METHODS["backmix"])
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        taken = steps(state, loader, run, torch.autocast("cpu", enabled=False))
        next(taken)
        before = {name: value.clone() for name, value in state.tensors().items()}
        real = state.method.prepare
        state.method.prepare = poisoned(real, row=1)  # type: ignore[method-assign]
        assert not torch.isfinite(next(taken).loss)
    after = state.tensors()
    assert "model.head.encoder" in before and "method.bank" in before
    for name, value in before.items():
        if name.startswith(("model.", "optimizer.", "method.")):
            assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("mixes", [False, True])
def test_a_head_that_could_learn_nothing_is_refused(
    data: Path, tmp_path: Path, mixes: bool
) -> None:
    """64 channels: at gamma 2 a cell of features near 1 is 128 away from nothing; 1.5 leaves 96."""

    def fresh(gamma: float) -> None:
        host = Cssr(latent=8, gamma=gamma)
        method = BackMix(host=host, patch=12) if mixes else host
        run = tiny_run(data, tmp_path / "run", method)
        prepare_run(run, "test", [])[2].close()

    fresh(1.5)
    name = r"--method\.host\.gamma" if mixes else r"--method\.gamma"
    with pytest.raises(ValueError, match=rf"{name} 2: .* 64 channels.* use {name} 0\.78"):
        fresh(2.0)


def test_a_finished_network_comes_back_with_its_head(data: Path, tmp_path: Path) -> None:
    run = cssr_run(data, tmp_path / "run", METHODS["backmix"], epochs=1)
    assert start(run) == 0
    model = load_model(run.out)
    assert isinstance(model.head, Reconstruction)
    assert model.head.reciprocal and model.head.encoder.shape == (4, 16, 64)
    _, state, loader = prepare_run(run, "test", [])
    loader.close()
    fresh = state.model.head.encoder  # type: ignore[union-attr]
    assert isinstance(fresh, Tensor) and not torch.equal(model.head.encoder, fresh)


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        (Cssr(latent=0), {}, r"--method\.latent must be 1"),
        (Cssr(gamma=0.0), {}, r"--method\.gamma must be"),
        (Cssr(gamma=math.nan), {}, r"--method\.gamma must be"),
        (BackMix(host=Cssr(gamma=-1.0)), {}, r"--method\.host\.gamma must be"),
        (Cssr(), {"optim": Optim(label_smoothing=0.1)}, r"--optim\.label-smoothing 0\.1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    data: Path, tmp_path: Path, method: Cssr | BackMix, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        start(cssr_run(data, tmp_path / "run", method, **changes))
    assert not (tmp_path / "run").exists()


# --- scores ------------------------------------------------------------------------------------


def gram_by_loops(features: np.ndarray) -> np.ndarray:
    """G of one image [C, g, g'], float64 [C, C]."""
    flat = features.reshape(len(features), -1).astype(np.float64)
    gram = np.zeros((len(flat), len(flat)))
    for i, j in np.ndindex(*gram.shape):
        moment = sum(float(a) ** 8 * float(b) ** 8 for a, b in zip(flat[i], flat[j], strict=True))
        gram[i, j] = math.copysign(abs(moment) ** (1 / 8), moment)
    return gram


def scores_by_loops(
    head: Reconstruction, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[str, np.ndarray]:
    """S0, S1 and S2 of the test images, as the paper's code defines them, image by image."""
    classes, channels = len(head.encoder), train[1].shape[1]
    predicted = train[0].argmax(1).tolist()
    features = train[1].double().numpy()
    activity = np.zeros((classes, channels))
    grams = np.zeros((classes, channels, channels))
    for k in range(classes):
        own = [f for f, y in zip(features, predicted, strict=True) if y == k]
        if own:
            activity[k] = np.mean([abs(f).mean((1, 2)) for f in own], 0)
            grams[k] = np.mean([gram_by_loops(f) for f in own], 0)
    share = activity / activity.sum(0)
    scores: dict[str, list[float]] = {"cssr_s0": [], "cssr_s1": [], "cssr_s2": []}
    cells = logits_by_loops(head, test[1])
    for image, y, logits in zip(
        test[1].double().numpy(), test[0].argmax(1).tolist(), cells, strict=True
    ):
        first, second = [], []
        for row, column in np.ndindex(*image.shape[1:]):
            cell = image[:, row, column]
            own = logits[y, row, column]
            first.append(own if head.reciprocal else own / np.abs(cell).mean() ** 2)
            second.append(np.mean([share[y, c] * cell[c] for c in range(channels)]))
        scores["cssr_s0"].append(float(np.mean(first)))
        scores["cssr_s1"].append(float(np.mean(second)))
        scores["cssr_s2"].append(float((gram_by_loops(image) * grams[y]).sum()))
    unit = max((g * g).sum() for g in grams)
    return {
        name: np.array(values) / (unit if name == "cssr_s2" else 1)
        for name, values in scores.items()
    }


def predictions(n: int, seed: int = 0) -> Tensor:
    """log p [n, 3] of any network; each class is predicted of some images."""
    drawn = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(1)
    assert len(drawn.argmax(1).unique()) == 3
    return drawn


def fitted(head: Reconstruction, *batches: tuple[Tensor, Tensor], **options: int) -> CssrFit:
    fit = CssrFit(network(head), **options)
    for logits, features in batches:
        fit.learn(logits, features)
    fit.finish_learning()
    return fit


@KINDS
def test_the_scores_are_their_definitions(reciprocal: bool) -> None:
    head = head_of(reciprocal)
    learned, judged = (predictions(40), maps(40)), (predictions(9, 1), maps(9, seed=1))
    fit = fitted(head, *zip(*(whole.split(16) for whole in learned), strict=True))
    found = fit.figures(*judged)
    expected = scores_by_loops(head, learned, judged)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.float64
        np.testing.assert_allclose(found[name], values, rtol=1e-5)
    unfitted = cell_figures(fit.model, *judged)
    assert set(unfitted) == {"cssr_s0"}
    assert torch.equal(unfitted["cssr_s0"], found["cssr_s0"])


def test_the_fit_is_the_same_however_the_images_come(monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of()
    logits, features = predictions(30), maps(30)
    judged = predictions(9, 1), maps(9, seed=1)
    whole = fitted(head, (logits, features)).figures(*judged)
    monkeypatch.setattr(scores_module, "_AT_ONCE", 2 * 6**2)  # two images at a time
    for order, size in ((torch.arange(30), 7), (torch.arange(30).flip(0), 1)):
        batches = zip(logits[order].split(size), features[order].split(size), strict=True)
        parts = fitted(head, *batches).figures(*judged)
        for name, values in whole.items():
            torch.testing.assert_close(parts[name], values, rtol=1e-12, atol=0)


def test_the_standard_is_that_of_the_training_figures() -> None:
    drawn = np.random.default_rng(0).normal([5.0, -1e5, 1e-3], [2.0, 3e4, 1e-4], (500, 3))
    names: list[str] = ["cssr_s0", "cssr_s1", "cssr_s2"]
    train_figures = dict(zip(names, drawn.T, strict=True))
    standard = standard_of(train_figures)
    parts = (drawn - drawn.mean(0)) / (drawn.std(0) + 1e-8)
    found = cssr(train_figures, standard)
    np.testing.assert_allclose(found, parts.sum(1), rtol=1e-10, atol=1e-10)
    assert abs(found.mean()) < 1e-9
    by_hand = Standard({"cssr_s0": 1.0, "cssr_s1": -2.0}, {"cssr_s0": 0.5, "cssr_s1": 4.0})
    values = {"cssr_s0": [2.0], "cssr_s1": [0.0], "other": [9.0]}
    assert cssr(values, by_hand)[0] == pytest.approx(2.0 + 0.5, abs=1e-6)


@pytest.mark.parametrize(("most", "off"), [(3 * 6**2, False), (3 * 6**2 - 1, True)])
def test_s2_is_left_out_where_it_would_be_too_large(most: int, off: bool) -> None:
    said = predictions(20), maps(20)
    fit = fitted(head_of(), said, most_gram=most)
    figures = fit.figures(*said)
    assert ("cssr_s2" not in figures) == off
    plain = {name: values.numpy() for name, values in figures.items()}
    score = cssr(plain, standard_of(plain))
    parts = [(v - v.mean()) / v.std() for v in plain.values()]
    np.testing.assert_allclose(score, np.sum(parts, 0), rtol=1e-5, atol=1e-6)
    assert bool(fit.without_gram) == off
    if off:
        assert "3 classes with 6 channels have 108 numbers, more than 107" in fit.without_gram


def test_the_limit_leaves_out_imagenet_and_keeps_tiny_imagenet() -> None:
    """Without making the matrices of either: on the device "meta"."""
    with torch.device("meta"):
        assert CssrFit(network(head_of(classes=1000, channels=512))).grams is None
        assert CssrFit(network(head_of(classes=200, channels=512))).grams is not None


@pytest.mark.parametrize("size", [1e-18, 1e-3, 1e4, 1e18, 1e37])
def test_scores_neither_overflow_nor_vanish(size: float) -> None:
    """Sixteenth powers of the outer ones are 0 or infinite in fp32, fourth powers, too."""
    learned, judged = (predictions(20), maps(20)), (predictions(9, 1), maps(9, seed=1))
    expected = fitted(head_of(), learned).figures(*judged)
    larger = fitted(head_of(), (learned[0], learned[1] * size))
    found = larger.figures(judged[0], judged[1] * size)
    np.testing.assert_allclose(found["cssr_s1"], expected["cssr_s1"] * size, rtol=1e-5)
    np.testing.assert_allclose(found["cssr_s2"], expected["cssr_s2"], rtol=1e-5)
    assert all(values.isfinite().all() for values in found.values())


def test_channels_of_very_different_size_keep_their_products() -> None:
    """One scale for the whole image would lose the small channels: 1e-4 to the 16th is 1e-64."""
    logits, features = predictions(12), maps(12) * torch.logspace(-6, 6, 6)[:, None, None]
    features[:, 0, 0, 0], features[:, 1, 1, 2] = 0, 0
    fit = CssrFit(network(head_of()))
    fit.learn(logits, features)
    assert fit.grams is not None
    own = logits.argmax(1) == 1
    expected = sum(gram_by_loops(image) for image in features[own].numpy())
    np.testing.assert_allclose(fit.grams[1], expected, rtol=1e-4)


def test_features_that_are_zero_are_not_called_known() -> None:
    head, logits, features = head_of(), predictions(6), maps(6)
    features[0] = 0
    features[1, :, :, 1:] = 0  # two cells are left
    found = cell_figures(network(head), logits, features)["cssr_s0"]
    assert (found[0] < found[1:]).all() and float(found[0]) == pytest.approx(-0.4 * 6 / 1e-6)
    left = features[1:2, :, :, :1]
    own = (
        logits_by_loops(head, left)[0, int(logits[1].argmax())] / left[0].abs().mean(0).numpy() ** 2
    )
    assert float(found[1]) == pytest.approx(own.mean(), rel=1e-5)
    # Of reciprocal points no error is the least known there is.
    found = cell_figures(network(head_of(reciprocal=True)), logits, features)["cssr_s0"]
    assert float(found[0]) == 0 and (found[1:] > 0).all()


def test_a_network_that_has_died_scores_all_images_alike() -> None:
    said = predictions(6), torch.zeros(6, 6, 2, 3)
    figures = {name: x.numpy() for name, x in fitted(head_of(), said).figures(*said).items()}
    assert (cssr(figures, standard_of(figures)) == 0).all()


def test_a_class_that_nothing_was_taken_for_knows_nothing() -> None:
    logits, features = predictions(12), maps(12)
    some = logits.argmax(1) != 2
    figures = fitted(head_of(), (logits[some], features[some])).figures(logits, features)
    for name in ("cssr_s1", "cssr_s2"):
        assert (figures[name][~some] == 0).all() and (figures[name][some] != 0).all()


def test_what_cannot_be_scored_is_refused() -> None:
    logits, features = predictions(5), maps(5)
    fit = CssrFit(network(head_of()))
    with pytest.raises(ValueError, match="there were none"):
        fit.finish_learning()
    spoilt = features.clone()
    spoilt[1, 0, 0, 0], spoilt[3, 1, 1, 1] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"2 of 5 training images have features or logits"):
        fit.learn(logits, spoilt)
    with pytest.raises(TypeError, match="CSSR need its head, not a Linear"):
        cell_figures(Classifier32(2, width=1), logits, features)
    with pytest.raises(ValueError, match=r"cssr_s0 of 1 of 2 images is NaN or infinite"):
        standard_of({"cssr_s0": [0.0, math.nan]})
    with pytest.raises(ValueError, match=r"cssr_s1 is of no training image"):
        standard_of({"cssr_s0": [1.0], "cssr_s1": []})
    with pytest.raises(ValueError, match=r"cssr needs cssr_s2"):
        cssr({"cssr_s0": [1.0]}, standard_of({"cssr_s0": [1.0], "cssr_s2": [1.0]}))


# --- real training -----------------------------------------------------------------------------


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits of scikit-learn, uint8 [1797, 32, 32, 3], and what they show."""
    from sklearn.datasets import load_digits

    ink, shown = load_digits(return_X_y=True)
    large = np.kron(ink.reshape(-1, 8, 8), np.ones((4, 4))) * 15.9
    return np.repeat(large[..., None], 3, 3).astype(np.uint8), np.asarray(shown)


@pytest.mark.parametrize("name", ["prototype", "reciprocal", "backmix"])
def test_a_short_training_beats_chance(tmp_path: Path, name: str) -> None:
    """Six digits known, four unknown: classes 1 in 6 by chance, AUROC 0.5."""
    images, shown = digits()
    order = np.random.default_rng(0).permutation(np.flatnonzero(shown < 6))
    train_rows, test_rows = order[:512], order[512:]
    unknown_rows = np.flatnonzero(shown >= 6)
    data = write_set(
        tmp_path / "digits.beton", images[train_rows], shown[train_rows], [str(k) for k in range(6)]
    )
    hosts = {"prototype": "prototype", "reciprocal": "reciprocal", "backmix": "reciprocal"}
    host = Cssr(kind=hosts[name], latent=16, gamma=0.3)  # type: ignore[arg-type]
    method = BackMix(host=host, patch=8, fill="mean") if name == "backmix" else host
    base = tiny_run(data, tmp_path / "run")
    run = replace(
        base,
        method=method,
        epochs=5,
        model="classifier32-quarter",
        loader=replace(base.loader, batch=64, loader="resident"),
        augment=Augment(flip=False, pad=2, mean=HALF, std=QUARTER),
        optim=Optim(lr=0.4, momentum=0.0, weight_decay=5e-4, schedule="linear", warmup=0.2),
    )
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        for _ in steps(state, loader, run, torch.autocast("cpu", enabled=False)):
            pass
    model = state.model.eval()

    def said(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        views = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float()
        return model((views - 127.5) / 63.75)

    with torch.inference_mode():
        train_said, test_said, unknown_said = map(said, (train_rows, test_rows, unknown_rows))
        fit = CssrFit(model)
        fit.learn(*train_said)
        fit.finish_learning()
        train, known, unknown = (
            {key: values.numpy() for key, values in fit.figures(*one).items()}
            for one in (train_said, test_said, unknown_said)
        )
    standard = standard_of(train)
    accuracy = (test_said[0].argmax(1).numpy() == shown[test_rows]).mean()
    assert accuracy > 0.7
    assert auroc(cssr(known, standard), cssr(unknown, standard)) > 0.7
    assert auroc(known["cssr_s0"], unknown["cssr_s0"]) > 0.7
    if name == "backmix":
        method_ = state.method
        assert isinstance(method_, BackMixMethod)
        assert not (method_.bank == 0.5).flatten(1).all(1).any()
        with open_set(run.data) as stored:
            assert len(method_.bank) == stored.n
