"""Steps on a resident pool as one program: the same bits as the loop's, drawn an epoch at once."""

import hashlib
import json
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backmix.kernels import dispatch
from backmix.kernels.launch import Launch
from backmix.pipeline.resident import Resident
from backmix.train import recorded
from backmix.train.ema import Ema
from backmix.train.loop import steps, take_step
from backmix.train.optim import make_optimizer
from backmix.train.options import (
    Arpl,
    Augment,
    BackMix,
    Cssr,
    Method,
    Optim,
    Run,
    Softmax,
    Ssod,
)
from backmix.train.prepare import prepare_run
from backmix.train.recorded import WARM_UP, own_stream, recorded_steps, to_be_recorded
from backmix.train.run import train
from backmix.train.state import State
from tests.runs import tiny_run, tiny_set

METHODS = {
    "softmax": Softmax(),
    "ssod": Ssod(gate_accuracy=0.0, gate_known=0.0),
    "arpl": Arpl(),
    "pcssr": Cssr(latent=4),
    "raw": BackMix(patch=12, fill="keep", rate=0.5),
    "raw+loss": BackMix(patch=12, cam_source="raw+loss", donor="other"),
    "mix": BackMix(patch=12, cam_source="mix", fill="donor", warmup=1),
    "backmix-ssod": BackMix(patch=12, host=Ssod(share=0.1)),
}
"""Every host, and the ways in which BackMix keeps its bank."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def resident(data: Path, out: Path, method: Method | None = None) -> Run:
    """A tiny run with a resident pool and --graph."""
    run = tiny_run(data, out, method or Softmax())
    return replace(run, loader=replace(run.loader, loader="resident"), graph=True)


def fingerprint(run: Path) -> dict[str, str]:
    """The sha256 of what must be equal; config.json and times may differ."""
    names = ["model.safetensors", "log.jsonl", "summary.csv"]
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names}


def trained(run: Run) -> dict[str, str]:
    assert train(run, "test", ["backmix", "train"]) == 0
    return fingerprint(run.out)


def stop(run: Run, number: int) -> None:
    """Train until the step of this number, counted from 1, is to be taken, and fail there."""
    real, taken = recorded._Program.step, iter(range(1, number + 1))

    def step(program: recorded._Program) -> torch.Tensor:
        if next(taken) == number:
            raise InterruptedError
        return real(program)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded._Program, "step", step)
        with pytest.raises(InterruptedError):
            train(run, "test", ["backmix", "train"])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_ends_with_the_bits_of_the_loop(data: Path, tmp_path: Path, method: Method) -> None:
    """Over epochs with a short last step, with a shift, a schedule, an EMA and clipping."""
    run = replace(resident(data, tmp_path / "graph", method), ema=0.9)
    run = replace(run, optim=replace(run.optim, clip=1.0))
    assert trained(run) == trained(replace(run, out=tmp_path / "loop", graph=False))


def test_a_stopped_run_goes_on_within_an_epoch(data: Path, tmp_path: Path) -> None:
    run = resident(data, tmp_path / "whole", METHODS["raw"])
    whole = trained(run)
    broken = replace(run, out=tmp_path / "broken", save_steps=1)
    stop(broken, 3)
    assert trained(broken) == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": BackMix(patch=12, onto="cool")}, "onto cool"),
        ({"method": Arpl(confusing=True), "epochs": 2}, "generated images"),
        ({"augment": Augment(pool="randaugment")}, "pool randaugment"),
        ({"accumulate": 2}, "--accumulate 2"),
        ({"compile": True}, "--compile"),
        ({"ema": 0.9, "ema_every": 2}, "--ema-every 2"),
        ({"profile": 1}, "--profile"),
    ],
)
def test_what_needs_the_host_in_every_step_is_refused(
    data: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    run = resident(data, tmp_path / "run")
    with pytest.raises(ValueError, match=f"--graph does not go with .*{said}"):
        train(replace(run, **change), "test", ["backmix", "train"])  # type: ignore[arg-type]


def test_another_loader_is_refused(data: Path, tmp_path: Path) -> None:
    run = resident(data, tmp_path / "run")
    run = replace(run, loader=replace(run.loader, loader="turbo"))
    with pytest.raises(ValueError, match="--graph does not go with the turbo loader"):
        train(run, "test", ["backmix", "train"])


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_the_step_of_every_optimizer_can_be_recorded(
    kind: Literal["sgd", "adam", "adamw"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch refuses to record Adam's step unless it is told that it may."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = make_optimizer([("weight", weight)], kind=kind, lr=0.1)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda **options: torch.device("cuda")
    )
    recording = SimpleNamespace(is_capturing=lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: recording)
    with to_be_recorded(optimizer):
        optimizer.step()
    assert not any(group.get("capturable", False) for group in optimizer.param_groups)


# --- what a recorded step may not do ------------------------------------------------------------


def elsewhere(value: Tensor) -> Tensor:
    """A tensor of the same shape and strides on a device without memory."""
    return torch.empty_like(value, device="meta")


def move_tensors(owner: object) -> None:
    """Move what a method, its gate and its host hold."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, Tensor):
            setattr(owner, name, elsewhere(value))
        elif name in ("gate", "host"):
            move_tensors(value)


def move(state: State) -> None:
    """Move all that a state holds but its generators."""
    before = list(state.model.parameters())
    state.model.to("meta")
    moved: dict[Tensor, Any] = dict(zip(before, state.model.parameters(), strict=True))
    for group in state.optimizer.param_groups:
        group["params"] = [moved[parameter] for parameter in group["params"]]
        group["lr"] = elsewhere(group["lr"])
    for parameter, slots in list(state.optimizer.state.items()):
        there = {name: elsewhere(value) for name, value in slots.items()}
        state.optimizer.state[moved[parameter]] = there
        del state.optimizer.state[parameter]
    move_tensors(state.method)
    for meters in (state.interval, state.epoch):
        meters.sums = {name: elsewhere(value) for name, value in meters.sums.items()}
    state.void_steps, state.void_samples = map(elsewhere, (state.void_steps, state.void_samples))
    state.ema = Ema(state.model, 0.9)
    state.keep_buffers()


class OneDevice(TorchDispatchMode):
    """Refuses operations between two devices: in a graph there is no copy from the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) <= 1, f"{func} is of {devices}"
        return out


@pytest.fixture
def a_device_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "meta" pass for a GPU: its kernels are asked for, and do nothing."""

    def fused(parameters: list[Tensor], gradients: list[Tensor], *slots: Any, **more: Any) -> None:
        held = [tensors for tensors in slots if len(tensors) == len(parameters)]
        for number, parameter in enumerate(parameters):
            for tensors in (gradients, *held):
                if tensors[number].ndim:  # Adam's steps are numbers
                    assert tensors[number].stride() == parameter.stride()
        assert {more[name].device.type for name in ("lr", "found_inf")} == {"meta"}

    for name in ("_fused_sgd_", "_fused_adam_"):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda p, *a, r=real, **k: (fused if p[0].is_meta else r)(p, *a, **k)
        )
    monkeypatch.setattr("torch.nn.utils.clip_grad._device_has_foreach_support", lambda device: True)
    autocast, is_on = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *a, **k: nullcontext() if kind == "meta" else autocast(kind, *a, **k),
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *a: a != ("meta",) and is_on(*a))
    monkeypatch.setattr(dispatch, "choose", lambda *a, **k: "triton")
    monkeypatch.setattr(Launch, "run", lambda launch: None)


ALSO = {
    "adam": Softmax(),
    "grey": BackMix(patch=12, mask="grey"),
    "random": BackMix(patch=12, mask="random"),
    "backmix-arpl": BackMix(patch=12, host=Arpl(), cam_source="mix"),
    "backmix-cssr": BackMix(patch=12, host=Cssr(latent=4)),
}


@pytest.mark.usefixtures("a_device_without_memory")
@pytest.mark.parametrize("name", [*METHODS, *ALSO])
def test_a_step_reads_nothing_and_brings_nothing_from_the_host(
    data: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of "meta" cannot be read, and constants of the host's are seen."""
    run = replace(resident(data, tmp_path / "run", (METHODS | ALSO)[name]), ema=0.9)
    run = replace(run, optim=replace(run.optim, clip=1.0, kind="adam" if name == "adam" else "sgd"))
    autocast = torch.autocast("cpu", enabled=False)
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        batch = next(iter(loader.batches(state.place)))
        with monkeypatch.context() as on_the_host:
            on_the_host.setattr(dispatch, "choose", lambda *a, **k: "torch")
            take_step(state, batch, run, 0.1, autocast)  # makes the optimizer's state
        assert isinstance(loader.engine, Resident)
        images, places = loader.engine.whole_steps(state.place)
        drawn = state.method.draw(images).each(elsewhere)
    assert len(places) == 2
    move(state)
    tensors = {
        field.name: elsewhere(value)
        for field in fields(images)
        if isinstance(value := getattr(images, field.name), Tensor)
    }
    images = replace(images, **tensors)
    program = recorded._Program(state, run, autocast, images, drawn, loader.samples)
    program.begin(images, drawn)
    with OneDevice():
        program._step()


def test_what_comes_from_the_host_is_seen() -> None:
    there = torch.zeros(3, device="meta")
    for wrong in (lambda: there + torch.tensor(1.0), lambda: there.copy_(torch.zeros(3))):
        with pytest.raises(AssertionError, match="is of"), OneDevice():
            wrong()


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "precision", "near"),
    [("sgd", "fp32", 1e-3), ("adam", "fp32", 1e-3), ("sgd", "bf16", 1e-2)],
)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_cuda_graph_computes_the_steps_of_the_loop(
    data: Path,
    tmp_path: Path,
    method: Method,
    kind: Literal["sgd", "adam"],
    precision: Literal["fp32", "bf16"],
    near: float,
) -> None:
    """As far as kernels that add in any order let it: losses over three epochs."""
    run = replace(
        resident(data, tmp_path / "graph", method),
        device="cuda",
        precision=precision,
        optim=Optim(kind=kind, lr=0.01 if kind == "sgd" else 1e-4),
    )
    losses = []
    for graph in (True, False):
        _, state, loader = prepare_run(replace(run, graph=graph), "test", ["backmix"])
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")
        with loader, own_stream(torch.device("cuda")):
            going = (recorded_steps if graph else steps)(state, loader, run, autocast)
            losses.append([float(step.loss) for step in going])
        assert state.step == len(losses[-1]) > WARM_UP + 2
        assert int(state.void_steps) == 0
    assert losses[0] == pytest.approx(losses[1], abs=near)


@pytest.mark.gpu
def test_a_recorded_run_on_a_gpu_goes_on_where_it_stopped(data: Path, tmp_path: Path) -> None:
    """With the dropout that it would have had: replays count as many numbers as steps."""
    run = replace(resident(data, tmp_path / "whole", METHODS["raw"]), device="cuda", epochs=5)
    trained(run)
    broken = replace(run, out=tmp_path / "broken", save_steps=1)
    stop(broken, WARM_UP + 4)
    trained(broken)
    rows = [
        [json.loads(line) for line in (one.out / "log.jsonl").read_text().splitlines()]
        for one in (run, broken)
    ]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    losses = [[row["loss"] for row in some] for some in rows]
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)
