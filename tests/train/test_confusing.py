"""ARPL+CS: generator and discriminator, pairs of BatchNorms, and the two kinds of passes."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from backmix.pipeline import draws
from backmix.pipeline.batch import Batch, Place
from backmix.train import loop
from backmix.train.checkpoint import checkpoint_path, load_tensors
from backmix.train.methods import arpl as arpl_module
from backmix.train.methods import confusing
from backmix.train.methods.arpl import ArplMethod
from backmix.train.methods.backmix import BackMixMethod
from backmix.train.methods.build import build_network
from backmix.train.methods.confusing import (
    FRESH,
    SAME,
    Confusion,
    PairedBatchNorm,
    certainty,
    generating,
    latents,
    new_discriminator,
    new_generator,
)
from backmix.train.models.build import Model
from backmix.train.models.heads import ReciprocalPoints
from backmix.train.options import Arpl, Augment, BackMix, Run, Softmax
from backmix.train.prepare import begin, prepare_run
from backmix.train.state import State
from backmix.train.trained import load_model
from tests.runs import poisoned, tiny_images, tiny_run, tiny_set, views_of
from tests.train.test_loop import NoWaiting, fingerprint, start, stop_after

PLAIN = torch.autocast("cpu", enabled=False)
BF16 = torch.autocast("cpu", torch.bfloat16)
CS = Arpl(confusing=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of the same form with few channels: 14 million weights are slow on a CPU."""
    monkeypatch.setattr(confusing, "GENERATOR", {4: 16, 8: 12, 16: 8, 32: 4})
    monkeypatch.setattr(confusing, "DISCRIMINATOR", (8, 12, 16, 20))


def run_of(data: Path, out: Path, method: Arpl | BackMix = CS, **changes: object) -> Run:
    base = {"model": "classifier32-quarter", "epochs": 2, **changes}
    return replace(tiny_run(data, out), method=method, **base)  # type: ignore[arg-type]


def prepared(run: Run) -> tuple[State, list[Batch], list[Batch]]:
    """The state before the first step, and the batches of epochs 0 and 1."""
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        return state, list(loader.batches(Place(0, 0))), list(loader.batches(Place(0, 1)))


def confusion_of(state: State) -> Confusion:
    method = state.method
    host = method.host if isinstance(method, BackMixMethod) else method
    assert isinstance(host, ArplMethod) and host.confusion is not None
    return host.confusion


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The names whose values differ; NaN differs from everything."""
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


# Networks


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        # 100, 512, 256, 128, (64,) 3 channels, 16 weights a pair, 2 a channel of each BatchNorm
        (32, 16 * (100 * 512 + 512 * 256 + 256 * 128 + 128 * 3) + 2 * (512 + 256 + 128)),
        (64, 16 * (100 * 512 + 512 * 256 + 256 * 128 + 128 * 64 + 64 * 3) + 2 * (960)),
    ],
)
def test_the_generator_has_the_published_form(size: int, parameters: int) -> None:
    generator = new_generator(size)
    assert sum(p.numel() for p in generator.parameters()) == parameters
    sides = []
    for module in generator:
        if isinstance(module, nn.ConvTranspose2d):
            module.register_forward_hook(lambda _, i, o: sides.append((o.shape[1], o.shape[2])))
    out = generator(torch.randn(2, 100, 1, 1))
    assert out.shape == (2, 3, size, size) and 0 <= out.min() and out.max() <= 1
    grown = [(512, 4), (256, 8), (128, 16), (64, 32)]
    assert sides == [*grown[: 3 if size == 32 else 4], (3, size)]


@pytest.mark.parametrize("size", [32, 64])
def test_the_discriminator_is_the_published_one_written_out(size: int) -> None:
    discriminator = new_discriminator()
    confusing.draw_weights(discriminator, torch.Generator().manual_seed(5))
    convolutions = 16 * (3 * 128 + 128 * 256 + 256 * 512 + 512 * 1024)
    expected = convolutions + 2 * (256 + 512) + 1024 + 1
    assert sum(p.numel() for p in discriminator.parameters()) == expected
    first, second, scale2, shift2, third, scale3, shift3, last, weight, bias = (
        discriminator.parameters()
    )
    images = torch.rand(3, 3, size, size)
    x = F.leaky_relu(F.conv2d(images, first, stride=2, padding=1), 0.2)
    for kernel, scale, shift in ((second, scale2, shift2), (third, scale3, shift3)):
        x = F.conv2d(x, kernel, stride=2, padding=1)
        spread, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (spread + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]
        x = F.leaky_relu(x, 0.2)
    pooled = torch.sigmoid(F.conv2d(x, last)).mean((2, 3))
    torch.testing.assert_close(discriminator(images), pooled @ weight.T + bias)


@pytest.mark.parametrize("size", [28, 48, 128, 224])
def test_other_sizes_are_refused(data: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"sides of 32 or 64 pixels, not {size}"):
        new_generator(size)
    run = run_of(data, tmp_path / "run")
    with pytest.raises(ValueError, match=r"--method.confusing generates images of 32 or 64 pixels"):
        start(replace(run, loader=replace(run.loader, size=size)))
    assert not run.out.exists()


def test_weights_begin_as_published() -> None:
    confusion = Confusion(CS, Augment(), 32, 0, torch.device("cpu"))
    for network in (confusion.generator, confusion.discriminator):
        assert network.training and not list(network.buffers())
        for module in network:
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.03)
                assert abs(module.weight.mean().item()) < 2e-3
            elif isinstance(module, nn.BatchNorm2d):
                assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
                assert not module.bias.any()
            elif isinstance(module, nn.Linear):
                assert 0.9 / 32 < module.weight.abs().max() <= 1 / 32


@pytest.mark.usefixtures("narrow")
def test_weights_are_a_function_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    made = [Confusion(CS, Augment(), 32, seed, torch.device("cpu")) for seed in (1, 1, 2**64 - 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (confusion.tensors() for confusion in made)
    assert not moved(first, same)
    drawn = moved(first, other)  # eight convolutions, five BatchNorms, a linear layer of two
    assert len(drawn) == 15 and not any("exp_avg" in name for name in drawn)


# Draws


def test_latents_are_box_muller_of_the_stated_blocks() -> None:
    index = np.array([0, 7, 2**40 + 3])
    drawn = latents(2**40 + 5, 6, index, FRESH)
    assert drawn.shape == (3, 100) and drawn.dtype == np.float32
    for row, sample in enumerate(index.tolist()):
        for column in (0, 1, 2, 3, 50, 99):
            counter = [sample & 0xFFFFFFFF, sample >> 32 | 255 << 24, 6, 25 + column // 4]
            words = draws.philox(np.array(counter, np.uint32), (5, 2**8))
            first, second = words[column % 4 // 2 * 2 : column % 4 // 2 * 2 + 2].tolist()
            radius = math.sqrt(-2 * math.log((first + 1) / 2**32))
            angle = 2 * math.pi * second / 2**32
            expected = radius * (math.sin(angle) if column % 2 else math.cos(angle))
            assert drawn[row, column] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_latents_are_standard_normal_and_independent() -> None:
    drawn = latents(0, 0, np.arange(4000), SAME).astype(np.float64)
    n = drawn.size
    # Standard errors of mean, variance and fourth moment: 1, sqrt 2 and sqrt 96 over sqrt n.
    assert abs(drawn.mean()) < 4 / n**0.5
    assert abs((drawn**2).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((drawn**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for other in (
        latents(0, 0, np.arange(4000), FRESH),
        latents(0, 2, np.arange(4000), SAME),
        latents(1, 0, np.arange(4000), SAME),
        np.roll(drawn, 1, axis=0),
        np.roll(drawn, 1, axis=1),
    ):
        assert abs((drawn * other).mean()) < 4 / n**0.5


def test_latents_belong_to_the_sample_not_to_its_batch() -> None:
    whole = latents(3, 4, np.array([5, 9, 2]), SAME)
    assert np.array_equal(whole[1:], latents(3, 4, np.array([9, 2]), SAME))


# Certainty


def test_certainty_is_the_exponential_of_the_mean_by_hand() -> None:
    """One image sure (entropy 0), one torn between two (ln 2): exp(-ln 2 / 2) = 0.7071."""
    distances = torch.tensor([[50.0, 0.0, 0.0], [0.0, 40.0, 40.0]], dtype=torch.float64)
    assert certainty(distances).item() == pytest.approx(0.5**0.5, rel=1e-12)


@given(
    st.integers(1, 5),
    st.integers(2, 8),
    st.floats(0, 300),
    st.integers(0, 2**32 - 1),
)
def test_certainty_is_the_formula_and_stays_within_its_bounds(n, classes, size, seed):
    distances = size * np.random.default_rng(seed).random((n, classes))
    value = certainty(torch.from_numpy(distances)).item()
    entropies = []
    for row in distances.tolist():
        shares = [math.exp(d - max(row)) for d in row]
        shares = [share / sum(shares) for share in shares]
        entropies.append(-sum(share * math.log(share) for share in shares if share))
    assert value == pytest.approx(math.exp(-sum(entropies) / n), rel=1e-9)
    assert 1 / classes * (1 - 1e-12) <= value <= 1


def test_certainty_is_least_where_all_points_are_equally_far() -> None:
    assert certainty(torch.full((4, 7), 3.0)).item() == pytest.approx(1 / 7)
    assert certainty(torch.tensor([[1e4, 0.0]])).item() == 1.0  # fp32 probability exactly 0


def test_the_gradient_of_certainty() -> None:
    torch.manual_seed(0)
    distances = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(certainty, distances)


# Pairs of BatchNorms


@pytest.mark.parametrize("name", ["classifier32", "resnet18-cifar", "wrn40-4"])
def test_a_network_of_pairs_holds_the_plain_one(name: str) -> None:
    run = replace(run_of(Path("unused"), Path("unused")), model=name)
    torch.manual_seed(4)
    paired = build_network(run, 4)
    torch.manual_seed(4)
    plain = build_network(replace(run, method=Arpl()), 4)
    theirs, ours = plain.state_dict(), paired.state_dict()
    extra = {key for key in ours if ".generated." in key}
    assert set(ours) - extra == set(theirs)
    norms = [key.removesuffix(".running_mean") for key in theirs if key.endswith("running_mean")]
    slots = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert extra == {f"{norm}.generated.{slot}" for norm in norms for slot in slots}
    assert not any(type(module) is nn.BatchNorm2d for module in _outside_pairs(paired))
    images = torch.rand(4, 3, 32, 32)
    momenta = {m.momentum for m in plain.modules() if isinstance(m, nn.BatchNorm2d)}
    assert {m.momentum for m in paired.modules() if isinstance(m, nn.BatchNorm2d)} == momenta
    for network in (plain, paired):
        torch.manual_seed(5)  # dropout
        network(images)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, paired.state_dict()[key]), key
    assert torch.equal(plain.eval()(images)[0], paired.eval()(images)[0])


def _outside_pairs(model: nn.Module) -> Iterator[nn.Module]:
    inside = {id(m.generated) for m in model.modules() if isinstance(m, PairedBatchNorm)}
    return (module for module in model.modules() if id(module) not in inside)


def test_generated_images_pass_a_network_of_their_own() -> None:
    """All convolutions are shared, and no BatchNorm is: weights, batch and running statistics."""
    run = run_of(Path("unused"), Path("unused"))
    paired = build_network(run, 4)
    plain = build_network(replace(run, method=Arpl()), 4)
    with torch.no_grad():
        for module in paired.modules():
            if isinstance(module, PairedBatchNorm):
                module.generated.weight.add_(torch.randn(module.num_features))
                module.generated.running_mean.add_(1)  # type: ignore[union-attr]
    taken = {k.replace(".generated", ""): v for k, v in paired.state_dict().items()}
    plain.load_state_dict(taken)
    images = torch.rand(4, 3, 32, 32)
    real = {k: v.clone() for k, v in paired.state_dict().items() if ".generated." not in k}
    with generating(paired):
        assert torch.equal(paired(images)[0], plain(images)[0])
        assert torch.equal(paired.eval()(images)[0], plain.eval()(images)[0])
    for key, value in paired.state_dict().items():
        if ".generated." in key:
            assert torch.equal(value, plain.state_dict()[key.replace(".generated", "")]), key
        else:
            assert torch.equal(value, real[key]), key


def test_the_switch_falls_back_after_an_error() -> None:
    model = build_network(run_of(Path("unused"), Path("unused")), 4)
    with pytest.raises(RuntimeError, match="channels"), generating(model):
        model(torch.rand(2, 5, 32, 32))
    pairs = [m for m in model.modules() if isinstance(m, PairedBatchNorm)]
    assert len(pairs) == 9 and not any(pair.generating for pair in pairs)


# One step


def as_plain(model: Model, run: Run, *, generated: bool) -> Model:
    """A network without pairs, with the weights that real or generated images meet."""
    tensors = model.state_dict()
    plain = build_network(replace(run, method=Arpl()), 4).to(tensors["head.points"].dtype)
    plain.load_state_dict(
        {
            key: tensors[key]
            if not generated or "running" in key or "num_batches" in key
            else tensors.get(_of_generated(key, tensors), tensors[key])
            for key in plain.state_dict()
        }
    )
    return plain


def _of_generated(key: str, tensors: dict[str, Tensor]) -> str:
    module, slot = key.rsplit(".", 1)
    name = f"{module}.generated.{slot}"
    return name if name in tensors else key


def in_double(state: State, monkeypatch: pytest.MonkeyPatch) -> Confusion:
    """Let the network and the GAN compute in float64, where no last bit decides a sign."""
    confusion = confusion_of(state)
    state.model.double()
    for label, network in (
        ("generator", confusion.generator.double()),
        ("discriminator", confusion.discriminator.double()),
    ):
        confusion.optimizers[label] = confusing._adam(network)
    confusion.live = confusion._named()
    confusion.safe = copies(confusion.live)
    drawn = confusing.latents
    monkeypatch.setattr(confusing, "latents", lambda *given: drawn(*given).astype(np.float64))
    return confusion


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("mean", [0.0, 120.0])
def test_one_step_is_the_three_published_ones(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mean: float
) -> None:
    """Derived again: probabilities, logarithms, unfused Adam, two plain networks for the pair."""
    augment = Augment(mean=(mean, mean / 2, mean / 4), std=(64.0, 32.0, 128.0))  # exact in fp32
    run = run_of(data, tmp_path / "run", Arpl(confusing=True, beta=0.3), augment=augment)
    state, (batch, *_), _ = prepared(run)
    confusion = in_double(state, monkeypatch)
    with torch.no_grad():
        for name, value in state.model.named_parameters():
            if name.endswith("generated.weight"):  # else the two halves are still alike
                value.add_(0.1 * torch.randn_like(value))
        assert isinstance(state.model.head, ReciprocalPoints)
        state.model.head.points.mul_(10)  # else any two images are alike to it
    generator = copy.deepcopy(confusion.generator)
    discriminator = copy.deepcopy(confusion.discriminator)
    for_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999), foreach=False)
    for_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999), foreach=False)
    on_real = as_plain(state.model, run, generated=False)
    on_generated = as_plain(state.model, run, generated=True)
    head = on_real.head
    assert isinstance(head, ReciprocalPoints)

    def images_of(which: int) -> Tensor:
        z = torch.from_numpy(latents(0, 0, batch.index.numpy(), which)).double()
        pixels = 255 * generator(z.view(16, 100, 1, 1))
        shift, scale = torch.tensor(augment.mean), torch.tensor(augment.std)
        return ((pixels.movedim(1, 3) - shift) / scale).movedim(3, 1)

    def p_real(images: Tensor) -> Tensor:
        return torch.sigmoid(discriminator(images))

    def confidence(images: Tensor) -> Tensor:
        """E, from differences written out."""
        pooled = on_generated(images)[1].mean((2, 3))
        q = (pooled[:, None] - head.points).square().mean(2).softmax(1)
        return (q * q.log()).sum(1).mean().exp()

    shown = views_of(state.method, batch)
    shown = replace(shown, images=shown.images.double())
    views = shown.images
    fakes = images_of(SAME)
    for_d.zero_grad()
    told = -(p_real(views).log().mean() + (1 - p_real(fakes.detach())).log().mean())
    told.backward()
    for_d.step()
    for_g.zero_grad()
    confused = -p_real(fakes).log().mean() + 0.3 * confidence(fakes)
    confused.backward()
    for_g.step()
    on_real.zero_grad()
    on_generated.zero_grad()
    logits, features = on_real(views)
    own = (features.mean((2, 3)) - head.points[batch.labels]).square().mean(1)
    hinge = (own - head.radius + 1).clamp(min=0).mean()
    certain = confidence(images_of(FRESH).detach())
    assert abs(confidence(images_of(SAME)) / certain - 1) > 1e-6
    total = F.cross_entropy(logits, batch.labels) + 0.1 * hinge + 0.3 * certain
    total.backward()

    out = state.method.loss(shown, batch, state.model)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-9)
    figures = {name: value.item() for name, value in out.scalars.items()}
    assert figures["discriminator_loss"] == pytest.approx(told.item(), rel=1e-9)
    assert figures["generator_loss"] == pytest.approx(confused.item(), rel=1e-9)
    assert figures["certainty"] == pytest.approx(certain.item(), rel=1e-9)
    assert figures["gan_void"] == 0
    for label, theirs, optimizer in (
        ("generator", generator, for_g),
        ("discriminator", discriminator, for_d),
    ):
        for name, q in theirs.named_parameters():
            expected = {"": q.detach()}
            expected |= {f".{slot}": value for slot, value in optimizer.state[q].items()}
            for slot, value in expected.items():
                ours = confusion.tensors()[f"{label}.{name}{slot}"]
                torch.testing.assert_close(ours, value, rtol=1e-7, atol=1e-12)
    out.loss.backward()
    gradients = {name: p.grad for name, p in state.model.named_parameters()}
    shared = dict(on_generated.named_parameters())
    tensors = state.model.state_dict()
    for name, parameter in on_real.named_parameters():
        expected, of_generated = parameter.grad, shared[name].grad
        assert expected is not None
        if _of_generated(name, tensors) != name:
            own = gradients[_of_generated(name, tensors)]
            torch.testing.assert_close(own, of_generated, rtol=1e-6, atol=1e-10)
        elif of_generated is not None:
            expected = expected + of_generated  # seen by both kinds of images
        torch.testing.assert_close(gradients[name], expected, rtol=1e-6, atol=1e-10)


@pytest.mark.usefixtures("narrow")
def test_what_an_even_and_an_odd_epoch_move(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path / "run")
    state, even, odd = prepared(run)
    names = {name for name in state.tensors() if "num_batches" not in name}
    gan = {name for name in names if name.startswith("method.")}
    assert len(gan) == (10 + 10) * 4  # parameters; each with Adam's three slots
    of_generated = {name for name in names if ".generated." in name}
    of_real = {name for name in names if name.startswith("model.")} - of_generated
    before = copies(state.tensors())
    loop.take_step(state, even[0], run, 0.1, PLAIN)
    between = copies(state.tensors())
    # A fresh network is hardly sure of anything: the weights' gradients are below their last bits.
    plain = {name for name in of_generated if name.startswith("model.") and "weight" in name}
    assert moved(before, between) >= of_real | gan | (of_generated - plain)
    loop.take_step(state, odd[0], run, 0.1, PLAIN)
    changed = moved(between, state.tensors())
    assert changed >= of_real and not changed & (of_generated | gan)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("epoch", [0, 1])
def test_real_statistics_never_see_generated_images(data: Path, tmp_path: Path, epoch: int) -> None:
    """They are what the plain network keeps, that sees the views alone, to the bit."""
    run = run_of(data, tmp_path / "run")
    state, *passes = prepared(run)
    batch = passes[epoch][0]
    plain = as_plain(state.model, run, generated=False)
    views = views_of(state.method, batch)
    plain(views.images)
    state.method.loss(views, batch, state.model)
    ours = dict(state.model.named_buffers())
    counted = 0
    for name, value in plain.named_buffers():
        assert torch.equal(ours[name], value), name
        counted += 1
    assert counted == 27


def test_generated_images_look_like_views_to_the_network() -> None:
    """Black and white pixels are normalised as those of the run, in the views' memory format."""
    augment = Augment(mean=(1.0, 120.0, 255.0), std=(10.0, 20.0, 30.0))
    confusion = Confusion(CS, augment, 32, 0, torch.device("cpu"))
    batch = _numbers(3)
    assert confusion.images(batch, SAME).is_contiguous(memory_format=torch.channels_last)
    for grey in (0.0, 1.0):
        confusion.generator = nn.Sequential(_Grey(grey))
        shown = confusion.images(batch, SAME)
        for channel in range(3):
            expected = (255 * grey - augment.mean[channel]) / augment.std[channel]
            assert torch.allclose(shown[:, channel], torch.tensor(expected), atol=1e-5)


class _Grey(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, z: Tensor) -> Tensor:
        return torch.full((len(z), 3, 32, 32), self.value)


def _numbers(n: int) -> Batch:
    """What generating needs of a batch: place and sample numbers."""

    class Host:
        index = np.arange(n)

    class Numbers:
        host, place = Host, Place(0)

    return Numbers  # type: ignore[return-value]


@pytest.mark.usefixtures("narrow")
def test_autocast_never_uses_weights_of_before_a_step(data: Path, tmp_path: Path) -> None:
    """Casts of weights are kept while autocast lasts: G must not meet D as it was before its step.

    What D says of the same images a third time, and G of fresh numbers, is what both say in a new
    context, to the bit.
    """
    run = run_of(data, tmp_path / "run")
    state, (batch, *_), _ = prepared(run)
    confusion = confusion_of(state)
    for optimizer in confusion.optimizers.values():
        optimizer.param_groups[0]["lr"] = 0.05  # a step that 8 bits show
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    for network in (confusion.generator, confusion.discriminator):
        network.register_forward_hook(
            lambda module, i, o: calls.setdefault(module, []).append((i[0].detach(), o.detach()))
        )
    views = views_of(state.method, batch)
    with BF16:
        state.method.loss(views, batch, state.model)
    assert [len(taken) for taken in calls.values()] == [2, 3]
    for network, taken in list(calls.items()):
        given, said = taken[-1]
        with BF16, torch.no_grad():
            assert torch.equal(network(given), said)
    # Else nothing was shown: D's second and third images are the same, what it says is not.
    second, third = calls[confusion.discriminator][1:3]
    assert torch.equal(second[0], third[0]) and not torch.equal(second[1], third[1])


def test_a_step_under_autocast_has_the_gradient_of_its_loss() -> None:
    """What forward computed in fp32, as the distances of the head, backward must not round."""
    layer = nn.Linear(16, 5)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    layer(x).square().mean().backward()
    assert layer.weight.grad is not None
    expected, found = layer.weight.grad.clone(), []
    layer.weight.register_hook(found.append)
    optimizer = confusing._adam(layer)
    with BF16:
        with torch.autocast("cpu", enabled=False):
            loss = layer(x).square().mean()
        confusing._step(optimizer, loss, len(x))
    assert torch.equal(found[0], expected)


# Void steps


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("cause", ["views", "loss of the network"])
def test_a_void_step_leaves_everything_as_it_was(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    """Also where discriminator and generator had finite gradients and took their steps."""
    run = run_of(data, tmp_path / "run")
    state, (first, second, third), _ = prepared(run)
    loop.take_step(state, first, run, 0.1, PLAIN)
    before = copies(state.tensors())
    with monkeypatch.context() as patch:
        if cause == "views":
            patch.setattr(ArplMethod, "prepare", poisoned(ArplMethod.prepare))
        else:
            patch.setattr(arpl_module, "open_space", lambda d, y, r: d[:, 0] * math.inf)
        loop.take_step(state, second, run, 0.1, PLAIN)
    assert int(state.void_steps) == 1
    after = state.tensors()
    kept = {n for n in before if n.startswith(("model.", "optimizer.", "method."))}
    assert not moved(before, after) & kept
    loop.take_step(state, third, run, 0.1, PLAIN)
    assert int(state.void_steps) == 1 and moved(before, state.tensors()) >= {
        name for name in kept if name.startswith("method.")
    }


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_void_step_of_the_gan_does_not_stop_the_network(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: float
) -> None:
    """Poisoned is the loss of generated images (D's alone), or that of being real (D's and G's)."""
    run = run_of(data, tmp_path / "run")
    state, (first, second, _), _ = prepared(run)
    loop.take_step(state, first, run, 0.1, PLAIN)
    before = copies(state.tensors())
    real = confusing._taken_for
    monkeypatch.setattr(
        confusing,
        "_taken_for",
        lambda logits, t: real(logits, t) * (math.inf if t == target else 1.0),
    )
    loop.take_step(state, second, run, 0.1, PLAIN)
    changed = moved(before, state.tensors())
    assert int(state.void_steps) == 0
    assert state.interval.sums["gan_void"] == 1
    assert "model.head.points" in changed
    assert not any(name.startswith("method.discriminator") for name in changed)
    stepped = {name.split(".")[1] for name in changed if name.startswith("method.")}
    assert stepped == (set() if target else {"generator"})


# Whole runs


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "method", [CS, BackMix(host=CS, patch=12, fill="keep")], ids=["alone", "host"]
)
def test_a_stopped_run_ends_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Arpl | BackMix
) -> None:
    """Stopped inside an even epoch, at its end, and in the second even epoch."""
    run = run_of(data, tmp_path / "whole", method, epochs=4)
    assert start(run) == 0
    other = replace(run, out=tmp_path / "stopped")
    codes = []
    for count in (2, 1, 5, 99):
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            codes.append(start(other))
    assert codes == [75, 75, 75, 0]
    assert fingerprint(other.out) == fingerprint(run.out)
    tensors, _ = load_tensors(checkpoint_path(run.out, 12))
    host = "host." if isinstance(method, BackMix) else ""
    for name in ("generator.0.weight", "discriminator.12.bias"):
        for slot in ("", ".step", ".exp_avg", ".exp_avg_sq"):
            assert f"method.{host}{name}{slot}" in tensors
    assert tensors[f"method.{host}generator.0.weight.step"] == 6  # steps of the even epochs


@pytest.mark.usefixtures("narrow")
def test_a_run_in_bf16_logs_the_figures_of_its_passes(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path / "run", precision="bf16", log_every=3)
    assert start(run) == 0
    even, odd = map(json.loads, (run.out / "log.jsonl").read_text().splitlines())
    assert even["bad_steps"] == odd["bad_steps"] == even["gan_void"] == 0
    assert 0.25 <= even["certainty"] <= 1 and even["discriminator_loss"] > 0
    assert (
        {"radius", "open_space"}
        < set(odd)
        == set(even)
        - {
            "certainty",
            "discriminator_loss",
            "gan_void",
            "generator_loss",
        }
    )


@pytest.mark.usefixtures("narrow")
def test_both_halves_of_a_pair_begin_with_the_norm_of_a_plain_network(
    data: Path, tmp_path: Path
) -> None:
    before = run_of(data, tmp_path / "plain", Softmax())  # type: ignore[arg-type]
    assert start(before) == 0
    run = run_of(data, tmp_path / "run", init=before.out)
    state, *_ = prepared(run)
    begin(state, run)
    trained, found = load_model(before.out).state_dict(), state.model.state_dict()
    pairs = [name for name in found if ".generated." in name]
    assert len(pairs) == 9 * 5
    for name in (*trained, *pairs):
        if not name.startswith("head."):
            assert torch.equal(found[name], trained[name.replace(".generated.", ".")]), name
    assert state.model.state_dict()["features.2.running_mean"].abs().max() > 0
    real, generated = (found[f"features.2.{part}weight"] for part in ("", "generated."))
    assert real.data_ptr() != generated.data_ptr()


@pytest.mark.usefixtures("narrow")
def test_a_checkpoint_of_plain_arpl_is_refused(data: Path, tmp_path: Path) -> None:
    state, *_ = prepared(run_of(data, tmp_path / "run"))
    plain, *_ = prepared(run_of(data, tmp_path / "run", Arpl()))
    with pytest.raises(ValueError, match="another model or method"):
        state.load(plain.tensors(), plain.meta())


@pytest.mark.usefixtures("narrow")
def test_backmix_gives_its_mixes_to_both_passes_and_to_the_discriminator(
    data: Path, tmp_path: Path
) -> None:
    """The bank learns in the odd epochs alone, from evaluation passes of the real BatchNorms."""
    run = run_of(data, tmp_path / "run", BackMix(host=CS, patch=12, rate=1.0))
    state, even, odd = prepared(run)
    backmix = state.method
    assert isinstance(backmix, BackMixMethod)
    confusion = confusion_of(state)
    seen: list[Tensor] = []
    confusion.discriminator.register_forward_hook(lambda _, images, out: seen.append(*images))
    trained: list[Tensor] = []
    state.model.register_forward_hook(
        lambda _, images, out: trained.append(*images) if state.model.training else None
    )
    mixes = views_of(backmix, even[0]).images
    assert not torch.equal(mixes, views_of(confusion_host(backmix), even[0]).images)
    loop.take_step(state, even[0], run, 0.1, PLAIN)
    assert torch.equal(seen[0], mixes) and len(seen) == 3
    assert len(trained) == 3 and torch.equal(trained[1], mixes)
    assert (backmix.bank == 0.5).all()

    seen.clear()
    trained.clear()
    mixes = views_of(backmix, odd[0]).images
    loop.take_step(state, odd[0], run, 0.1, PLAIN)
    assert not seen and len(trained) == 1 and torch.equal(trained[0], mixes)
    learnt = (backmix.bank != 0.5).flatten(1).any(1)
    assert set(learnt.nonzero().flatten().tolist()) == set(backmix.row_of[odd[0].index].tolist())


def confusion_host(backmix: BackMixMethod) -> ArplMethod:
    assert isinstance(backmix.host, ArplMethod)
    return backmix.host


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("method", [CS, BackMix(host=CS, patch=12)], ids=["alone", "host"])
def test_a_step_does_not_wait_for_the_device(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Arpl | BackMix
) -> None:
    run = run_of(data, tmp_path / "run", method)
    state, even, odd = prepared(run)
    monkeypatch.setattr("backmix.kernels.mix_background._reading_is_free", lambda tensor: False)

    def waits(self: Tensor, *_: object) -> None:
        raise AssertionError("a copy to the host waits for the device")

    for name in ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, waits)
    with NoWaiting():
        for batch in (*even[1:], *odd[:1]):
            loop.take_step(state, batch, run, 0.1, PLAIN)


def accuracy(model: Model, seed: int = 9) -> float:
    """The share of 200 fresh images that a network in evaluation mode names right."""
    pixels, labels = tiny_images(200, 4, seed=seed)
    with torch.inference_mode():
        logits, _ = model(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    return (logits.argmax(1) == torch.from_numpy(labels)).double().mean().item()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("method", [CS, BackMix(host=CS, patch=8)], ids=["alone", "host"])
def test_a_small_training_names_fresh_images(
    data: Path, tmp_path: Path, method: Arpl | BackMix
) -> None:
    """Four classes, chance 0.25: at least 0.75 after 36 steps on 40 images, 18 of them confused."""
    augment = Augment(flip=False, pad=2)
    run = run_of(data, tmp_path / "run", method, epochs=12, augment=augment, save_steps=0)
    assert start(run) == 0
    model = load_model(run.out)
    assert not any(m.generating for m in model.modules() if isinstance(m, PairedBatchNorm))
    assert accuracy(model) > 0.75


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 3}, "--epochs must be even, got 3"),
        ({"grow": True}, "leave --loader.grow-from out"),
    ],
)
def test_what_generated_images_cannot_go_with_is_refused(
    data: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    grow = "grow" in changes
    changes = {name: value for name, value in changes.items() if name != "grow"}
    for method, name in ((CS, "method"), (BackMix(host=CS), "method.host")):
        run = run_of(data, tmp_path / "run", method, **changes)
        if grow:
            run = replace(run, loader=replace(run.loader, size=64, grow_from=32, grow=(0, 1)))
        with pytest.raises(ValueError, match=said) as refused:
            start(run)
        assert f"--{name}.confusing" in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_two_losses_at_once_are_refused(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path / "run", BackMix(host=CS, cam_source="raw+loss"))
    with pytest.raises(ValueError, match=r"--method.cam-source raw\+loss"):
        start(run)
    method = ArplMethod(
        CS,
        Augment(),
        0.0,
        torch.float32,
        Confusion(CS, Augment(), 32, 0, torch.device("cpu")),
    )
    model = build_network(run_of(data, tmp_path / "run"), 4)
    features = torch.rand(2, 32, 4, 4)
    with pytest.raises(ValueError, match="no mean over the images"):
        method.per_sample(model.head(features), features, torch.tensor([0, 1]), model)
