"""One step: parts and their gradient, the running mean of the weights, compiling, waiting."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from backmix.pipeline.batch import Batch, Place, cut, stand_in
from backmix.train import loop
from backmix.train.arithmetic import set_arithmetic
from backmix.train.check import check, check_parts
from backmix.train.checkpoint import checkpoint_path, load_tensors
from backmix.train.ema import Ema
from backmix.train.forward import compile_step
from backmix.train.loop import steps
from backmix.train.methods.backmix import BackMixMethod
from backmix.train.methods.ssod import SsodMethod
from backmix.train.options import Arpl, BackMix, Cssr, Method, Run, Softmax, Ssod
from backmix.train.prepare import begin, prepare_run
from backmix.train.run import train
from backmix.train.state import State
from backmix.train.trained import load_model
from backmix.train.world import World
from tests.runs import poisoned, tiny_run, tiny_set, views_of
from tests.train.test_loop import NoWaiting, assert_same_bits_when_stopped

PLAIN = torch.autocast("cpu", enabled=False)
OPEN = Ssod(gate_known=0.0, gate_accuracy=0.0)
HOSTS: dict[str, Method] = {
    "softmax": Softmax(),
    "ssod": OPEN,
    "arpl": Arpl(),
    "cssr": Cssr(latent=8),
    "backmix": BackMix(patch=12, rate=0.5),
    "mix": BackMix(patch=12, cam_source="mix", onto="cool", rate=0.5),
    "raw+loss": BackMix(patch=12, cam_source="raw+loss"),
    "backmix-ssod": BackMix(patch=12, host=OPEN),
    "backmix-arpl": BackMix(patch=12, host=Arpl(), cam_source="mix"),
    "backmix-cssr": BackMix(patch=12, host=Cssr(latent=8)),
}


class GroupNormed(nn.Module):
    """A network whose images know nothing of one another."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 4, 1)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 8), nn.GroupNorm(2, 16)])
        self.active = nn.ReLU()
        self.head = nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.active(self.norms[0](self.first(images)))
        return self.head(self.active(self.norms[1](self.second(x))).mean((2, 3)))


def group_normed(classes: int) -> nn.Module:
    """What --model calls."""
    return GroupNormed(classes)


GROUPED = "tests.train.test_step:group_normed"
BATCHED = "tests.nets:plain"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run_of(data: Path, method: Method, loader: str = "turbo", **changes: Any) -> Run:
    """Three steps an epoch: 16, 16 and 8 images in mix groups of 4."""
    run = tiny_run(data, Path("unused"), method, model=GROUPED, epochs=2)
    return replace(run, loader=replace(run.loader, group=4, loader=loader), **changes)


def walk(run: Run, change: Callable[[State], None] = lambda state: None) -> tuple[State, list]:
    """Take all steps; returns the state and the losses."""
    _, state, loader = prepare_run(run, "test", [])
    begin(state, run)
    change(state)
    with loader:
        return state, [step.loss.item() for step in steps(state, loader, run, PLAIN)]


def batches_of(run: Run) -> tuple[State, list[Batch]]:
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        return state, list(loader.batches(Place(run.seed)))


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["turbo", "resident"])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_of_a_batch_show_what_the_whole_shows(data: Path, loader: str, parts: int) -> None:
    """Every image finds the same donor, patch and flip; together the parts are the batch."""
    state, (batch, *_) = batches_of(run_of(data, HOSTS["mix"], loader))
    assert isinstance(state.method, BackMixMethod)
    state.method.bank.copy_(torch.rand(state.method.bank.shape))
    whole = views_of(state.method, batch)
    assert (whole.drawn.patch[:, 4] > 0).all() and whole.drawn.flip.any()
    pieces = cut(batch, parts)
    assert [len(piece) for piece in pieces] == {
        ("turbo", 2): [8, 8], ("turbo", 3): [4, 4, 8], ("turbo", 4): [4, 4, 4, 4],
        ("resident", 2): [8, 8], ("resident", 3): [5, 5, 6], ("resident", 4): [4, 4, 4, 4],
    }[loader, parts]  # fmt: skip
    shown = [views_of(state.method, piece) for piece in pieces]
    assert torch.equal(torch.cat([views.images for views in shown]), whole.images)
    for name in ("index", "labels", "boxes", "sizes", "status"):
        assert torch.equal(torch.cat([getattr(p, name) for p in pieces]), getattr(batch, name))
    assert np.array_equal(np.concatenate([p.host.index for p in pieces]), batch.host.index)
    for piece in pieces:
        assert torch.equal(piece.pool_index[piece.rows], piece.index)
        assert len(piece.pool) == (len(batch.pool) if loader == "resident" else len(piece))


def test_more_parts_than_groups_leave_some_empty(data: Path) -> None:
    _, (_, _, last) = batches_of(run_of(data, Softmax()))
    assert len(last) == 8
    assert [len(piece) for piece in cut(last, 4)] == [0, 4, 0, 4]


@pytest.mark.parametrize("loader", ["turbo", "resident"])
@pytest.mark.parametrize("name", ["softmax", "backmix", "mix", "raw+loss", "arpl", "backmix-cssr"])
def test_a_step_in_parts_is_the_step(data: Path, name: str, loader: str) -> None:
    """Losses, weights, bank and meters; parts of unequal size, and a last step with fewer."""
    run = run_of(data, HOSTS[name], loader)
    state, losses = walk(run)
    near = 2e-4 if name == "arpl" else 2e-5  # it takes small differences of large squares
    figures = state.epoch.take(), state.interval.take()
    for parts in (2, 3, 4):
        other, found = walk(replace(run, accumulate=parts))
        assert found == pytest.approx(losses, abs=near)
        before, after = state.tensors(), other.tensors()
        for key in (k for k in before if k.startswith("model.")):
            assert torch.allclose(before[key], after[key], atol=near), key
        if "method.bank" in before:
            assert (before["method.bank"] != 0.5).any()
            assert torch.allclose(before["method.bank"], after["method.bank"], atol=2e-3)
        for one, again in zip(figures, (other.epoch.take(), other.interval.take()), strict=True):
            assert again == pytest.approx(one, rel=10 * near)


def test_batchnorm_sees_the_parts(data: Path) -> None:
    """So it counts them, and its statistics are other ones; this is what the option says."""
    run = run_of(data, Softmax(), model=BATCHED)
    whole, _ = walk(run)
    state, _ = walk(replace(run, accumulate=2))
    counted = [
        int(value)
        for one in (whole, state)
        for name, value in one.model.named_buffers()
        if name.endswith("body.1.num_batches_tracked")
    ]
    assert counted == [6, 12]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_gate_of_ssod_counts_steps(data: Path, parts: int) -> None:
    """It opens once a step at most, after three of them here, and rises within three more."""
    run = run_of(data, replace(OPEN, gate_accuracy=0.0), accumulate=parts)
    state, _ = walk(run)
    assert isinstance(state.method, SsodMethod)
    gate = state.method.gate
    assert int(gate.steps) == int(gate.opened) == 6 and gate.ramp == 3


def test_the_gate_of_ssod_sees_the_whole_step(data: Path) -> None:
    """Its means weigh a part by its images: 4, 4 and 8 of them."""
    run = run_of(data, Ssod(gate_known=0.9, gamma=0.6))
    gates = []
    for parts in (1, 3):
        state, (batch, *_) = batches_of(replace(run, accumulate=parts))
        with torch.no_grad():  # else a fresh network is sure of nothing
            state.model.head.weight.mul_(40)  # type: ignore[union-attr, operator]
        loop.take_step(state, batch, replace(run, accumulate=parts), 0.0, PLAIN)
        assert isinstance(state.method, SsodMethod)
        gates.append([state.method.gate.known.item(), state.method.gate.accuracy.item()])
    assert 0 < gates[0][0] < 1 and 0 < gates[0][1] < 1
    assert gates[1] == pytest.approx(gates[0], rel=1e-6)


def test_what_cannot_be_cut_is_refused(data: Path) -> None:
    run = run_of(data, Softmax())
    check_parts(replace(run, accumulate=4), "turbo", 1)
    check_parts(replace(run, accumulate=16), "resident", 1)
    with pytest.raises(ValueError, match=r"has 4 of them .*at most --accumulate 4, .*--loader.gr"):
        prepare_run(replace(run, accumulate=5), "test", [])
    with pytest.raises(ValueError, match=r"has 2 of them .*2 processes.*at most --accumulate 2"):
        check_parts(replace(run, accumulate=3), "turbo", 2)
    with pytest.raises(ValueError, match=r"--accumulate 17 .*images of it \(16\): at most 16"):
        check_parts(replace(run, accumulate=17), "resident", 1)
    with pytest.raises(ValueError, match=r"--accumulate must be 1 \.\."):
        check(replace(run, accumulate=0))


@pytest.mark.parametrize("option", ["accumulate", "compile"])
@pytest.mark.parametrize("mixes", [False, True])
def test_the_steps_of_a_gan_are_neither_cut_nor_compiled(
    data: Path, option: str, mixes: bool
) -> None:
    host = Arpl(confusing=True)
    run = run_of(data, BackMix(host=host, patch=8) if mixes else host)
    with pytest.raises(ValueError, match=f"--{option} with --method.*confusing.*leave --{option}"):
        check(replace(run, **{option: 2 if option == "accumulate" else True}))


# --- parts of several processes -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "backmix"])
def test_shares_of_processes_average_to_the_gradient_of_the_step(data: Path, name: str) -> None:
    """By hand: three processes have 4, 8 and 4 images of a step, and one of them takes two parts.

    Each one's gradient is what it would bring along to the mean over processes.
    """
    run = run_of(data, HOSTS[name])
    state, (batch, *_) = batches_of(run)
    whole = loop.take_part(state, batch, 1.0, PLAIN)
    expected = {n: p.grad.clone() for n, p in state.model.named_parameters() if p.grad is not None}
    state.model.zero_grad()
    for piece in (*cut(batch, 4), stand_in(cut(batch, 5)[0], 3)):
        loop.take_part(state, piece, piece.images * 3 / 16, PLAIN)
    assert whole.out.loss.item() > 0 and len(expected) == 10
    for key, parameter in state.model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad / 3, expected[key], atol=1e-6), key


@pytest.mark.parametrize("name", HOSTS)
def test_an_image_that_stands_for_none_leaves_everything_as_it_was(data: Path, name: str) -> None:
    """No gradient, no buffer, no map, no figure of the log."""
    run = run_of(data, HOSTS[name], model="classifier32-quarter")
    state, (batch, *_) = batches_of(run)
    nothing = stand_in(cut(batch, 5)[0], int(batch.index[2]))
    assert nothing.images == 0 and len(nothing) == 1
    state.world = World(0, 2)
    before = {key: value.clone() for key, value in _of_model(state).items()}
    state.optimizer.zero_grad()
    part = loop.take_part(state, nothing, 0.0, PLAIN)
    grads = [p.grad for p in state.model.parameters() if p.grad is not None]
    assert grads and not any(grad.any() for grad in grads)
    loop.count(state, [part], 8, torch.ones(()), torch.zeros((), dtype=torch.bool))
    sums = state.interval.take()
    assert set(sums) >= {"loss", "right", "seen", "steps"} and not any(sums.values())
    after = _of_model(state)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def _of_model(state: State) -> dict[str, Tensor]:
    named = dict(state.model.state_dict())
    return named | {f"method.{k}": v for k, v in state.method.tensors().items()}


# --- void steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("name", ["ssod", "mix", "backmix-ssod"])
def test_a_void_step_leaves_everything_as_it_was(data: Path, name: str, parts: int) -> None:
    """One image of one part is poisoned: the whole step is void, and the image is named."""
    run = run_of(
        data, HOSTS[name], model="classifier32-quarter", accumulate=parts, ema=0.5, ema_every=1
    )
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        taken = steps(state, loader, run, PLAIN)
        next(taken)
        before = {key: value.clone() for key, value in state.tensors().items()}
        real, calls = state.method.prepare, [0]

        def third(*arguments: Any) -> Any:
            calls[0] += 1
            last = calls[0] == parts
            return (poisoned(real, row=1) if last else real)(*arguments)

        state.method.prepare = third  # type: ignore[method-assign]
        next(taken)
        state.method.prepare = real  # type: ignore[method-assign]
        after = state.tensors()
        kept = ("model.", "optimizer.", "method.", "ema.")
        assert {key.split(".")[0] + "." for key in before} >= set(kept)
        for key, value in before.items():
            if key.startswith(kept):
                assert torch.equal(value, after[key]), key
        assert int(state.void_steps) == 1
        index = next(iter(_second(run))).index
        first = 16 // parts * (parts - 1)
        named = state.take_void_samples()
        assert int(index[first + 1]) in named and set(named) <= set(index[first:].tolist())
        next(taken)
        assert all(torch.isfinite(p).all() for p in state.model.parameters())
        assert int(state.void_steps) == 1


def _second(run: Run) -> list[Batch]:
    return [batches_of(run)[1][1]]


# --- running mean of the weights ------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
def test_the_running_mean_is_the_mean(data: Path, every: int) -> None:
    """Parameters and statistics of BatchNorm by a loop over float64 numbers; integers copied."""
    run = run_of(data, Softmax(), model=BATCHED, ema=0.8, ema_every=every)
    _, state, loader = prepare_run(run, "test", [])
    begin(state, run)
    mean = {name: value.double().numpy().copy() for name, value in state.model.state_dict().items()}
    with loader:
        for number, _ in enumerate(steps(state, loader, run, PLAIN), 1):
            if number % every:
                continue
            for name, value in state.model.state_dict().items():
                now = value.double().numpy()
                whole = not value.is_floating_point()
                mean[name] = (
                    now.copy() if whole else mean[name] + (1 - 0.8**every) * (now - mean[name])
                )
    assert state.ema is not None
    assert any("running_var" in name for name in mean)
    found = state.weights()
    assert found.keys() == mean.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), mean[name], rtol=2e-5, atol=2e-7)
        assert value.dtype == state.model.state_dict()[name].dtype
    moved = [n for n, v in found.items() if not torch.equal(v, state.model.state_dict()[n])]
    assert len(moved) > 5


@pytest.mark.parametrize("loader", ["turbo", "resident"])
def test_a_stopped_run_with_a_running_mean_ends_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    run = tiny_run(data, tmp_path / "whole", HOSTS["backmix"], ema=0.9, ema_every=2, accumulate=2)
    run = replace(run, loader=replace(run.loader, loader=loader))
    assert train(run, "test", []) == 0
    assert_same_bits_when_stopped(run, tmp_path / "stopped", monkeypatch, (1, 2, 4, 99))


def test_what_a_run_leaves_behind_is_the_mean(data: Path, tmp_path: Path) -> None:
    """In model.safetensors, which evaluation and --init read; the next mean begins there."""
    run = tiny_run(data, tmp_path / "run", Softmax(), ema=0.9, save_steps=0, model=BATCHED)
    assert train(run, "test", []) == 0
    tensors, _ = load_tensors(checkpoint_path(run.out, 9))
    weights = load_model(run.out, BATCHED).state_dict()
    assert len(weights) > 10
    for name, value in weights.items():
        assert torch.equal(value, tensors[f"ema.{name}"]), name
    assert not torch.equal(weights["net.classifier.weight"], tensors["model.net.classifier.weight"])
    again = replace(run, out=tmp_path / "next", init=run.out)
    _, state, loader = prepare_run(again, "test", [])
    loader.close()
    begin(state, again)
    for name, value in weights.items():
        assert torch.equal(state.model.state_dict()[name], value), name
        assert torch.equal(state.weights()[name], value), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ema": 1.0}, "--ema must be 0"),
        ({"ema": math.nan}, "--ema must be 0"),
        ({"ema": 0.9, "ema_every": 0}, "--ema-every"),
        ({"ema_every": 2}, "does nothing without --ema"),
    ],
)
def test_means_that_mean_nothing_are_refused(
    data: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check(run_of(data, Softmax(), **options))


def test_a_mean_of_a_network_without_integers_and_buffers() -> None:
    model: Any = nn.Linear(2, 2)
    ema, first = Ema(model, 0.5), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    ema.step(1, torch.zeros(()))
    assert torch.equal(ema.mean["weight"], first)
    ema.step(2, torch.ones(()))
    assert torch.allclose(ema.mean["weight"], model.weight - 0.5)


# --- compiling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTS)
def test_network_and_loss_compile_whole_and_once_for_each_shape(data: Path, name: str) -> None:
    """No graph break, and after the first epoch nothing is compiled anew: 16 and 8 images."""
    own = name == "softmax"
    run = run_of(data, HOSTS[name], model="classifier32-quarter" if own else BATCHED)
    _, expected = walk(run)
    torch._dynamo.reset()
    counters = [CompileCounterWithBackend("aot_eager") for _ in range(2)]

    def compile_it(state: State) -> None:
        options = {"fullgraph": True, "dynamic": False}
        state.forward = torch.compile(state.forward, backend=counters[0], **options)  # type: ignore[call-overload]
        state.model.compile(backend=counters[1], **options)

    _, state, loader = prepare_run(run, "test", [])
    compile_it(state)
    losses, compiled = [], []
    with loader:
        for step in steps(state, loader, run, PLAIN):
            losses.append(step.loss.item())
            compiled.append(tuple(counter.frame_count for counter in counters))
    raw = name in ("backmix", "backmix-ssod", "backmix-cssr")
    assert compiled == [(n, n * raw) for n in (1, 1, 2, 2, 2, 2)]
    # Where a location is known or not, and which cell is hottest, rounding can decide.
    assert losses == pytest.approx(expected, rel=1e-3 if "ssod" in name else 1e-4)


def test_growing_views_in_parts_compile_each_shape_once(data: Path) -> None:
    run = run_of(data, HOSTS["mix"], model=BATCHED, accumulate=2)
    run = replace(run, epochs=3, loader=replace(run.loader, size=32, grow_from=16, grow=(0, 1)))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    counts = []
    _, state, loader = prepare_run(run, "test", [])
    state.forward = torch.compile(state.forward, backend=counter, fullgraph=True, dynamic=False)  # type: ignore[assignment]
    with loader:
        for _ in steps(state, loader, run, PLAIN):
            counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 3, 3, 4, 4, 4, 4]


def test_without_a_compiler_compiling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model: Any = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler.*apt install"):
        compile_step(model, model)


def test_compiling_asks_only_for_what_the_oldest_torch_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of torch 2.10: a limit of recompilations is no argument of torch.compile there."""
    asked: list[set[str]] = []
    monkeypatch.setattr(torch, "compile", lambda _, **options: asked.append(set(options)))
    model: Any = nn.Linear(2, 2)
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would take the limit away
        compile_step(model, model)
        assert torch._dynamo.config.recompile_limit == 64
    known = {"fullgraph", "dynamic", "backend", "mode", "options", "disable"}
    assert len(asked) == 2 and all(options <= known for options in asked)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own
def test_a_compiled_run_ends_and_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the compiler that --compile uses; losses are those of the run as it is."""
    torch._dynamo.reset()
    run = tiny_run(data, tmp_path / "plain", HOSTS["backmix"], model=BATCHED, epochs=2)
    assert train(run, "test", []) == 0
    compiled = replace(run, out=tmp_path / "compiled", compile=True, ema=0.9)
    assert train(compiled, "test", []) == 0
    assert_same_bits_when_stopped(compiled, tmp_path / "stopped", monkeypatch, (2, 99))
    plain, other = ((one.out / "log.jsonl").read_text().splitlines() for one in (run, compiled))
    for row, again in zip(plain, other, strict=True):
        assert eval_row(again) == pytest.approx(eval_row(row), rel=2e-3)
    ours, theirs = (load_model(one.out, BATCHED).state_dict() for one in (compiled, run))
    assert ours.keys() == theirs.keys()


def eval_row(line: str) -> dict[str, float]:
    import json

    return {key: value for key, value in json.loads(line).items() if key in ("loss", "lr")}


# --- waiting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("parts", [1, 2])
def test_no_step_waits_for_the_device(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str, parts: int
) -> None:
    """With a running mean, clipping and parts; the doors' CPU form may look at values."""
    monkeypatch.setattr("backmix.kernels.mix_background._reading_is_free", lambda tensor: False)
    run = run_of(data, HOSTS[name], model=BATCHED, accumulate=parts, ema=0.9, ema_every=2)
    run = replace(run, optim=replace(run.optim, clip=1.0))
    state, batches = batches_of(run)

    def waits(self: Tensor, *_: object) -> None:
        raise AssertionError("a copy to the host waits for the device")

    for copy in ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, copy, waits)
    with NoWaiting():
        for batch in batches:
            loop.take_step(state, batch, run, 0.1, PLAIN)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.repeat_interleave(torch.tensor([1, 2, 0])),
        lambda x: x.unique(),
    ],
)
def test_what_waits_is_seen(wait: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        wait(torch.tensor([1.0, -1.0, 2.0]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_waits_for_the_gpu(data: Path, name: str, parts: int, compiled: bool) -> None:
    run = run_of(data, HOSTS[name], model=BATCHED, accumulate=parts, ema=0.9, ema_every=2)
    run = replace(run, device="cuda", precision="bf16", optim=replace(run.optim, clip=1.0))
    autocast: AbstractContextManager = torch.autocast("cuda", torch.bfloat16)
    _, state, loader = prepare_run(run, "test", [])
    if compiled:
        torch._dynamo.reset()
        state.forward = compile_step(state.forward, state.model)
    with loader:
        batches = list(loader.batches(Place(run.seed)))
        for batch in batches:  # kernels are compiled and memory is found
            loop.take_step(state, batch, run, 0.01, autocast)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                loop.take_step(state, batch, run, 0.01, autocast)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(state.void_steps) == 0


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.fixture
def switches() -> Any:
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]


@pytest.mark.usefixtures("switches")
def test_a_gpu_may_choose_unless_it_must_not(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    run = run_of(data, Softmax())
    grown = replace(run, loader=replace(run.loader, grow_from=16, grow=(0, 1)))
    exact = replace(run, deterministic=True)

    def chosen(run: Run) -> tuple[str, bool, bool, bool]:
        set_arithmetic(run, torch.device("cuda"))
        return (
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
        )

    assert chosen(run) == ("high", True, True, False)
    assert chosen(grown) == ("high", True, False, False)
    assert chosen(exact) == ("highest", False, False, True)
    set_arithmetic(run, torch.device("cpu"))
    assert torch.are_deterministic_algorithms_enabled()  # on a CPU nothing is touched
    assert chosen(run) == ("high", True, True, False)
