"""Steps on a resident pool as one program: the same bits as the loop's, drawn an epoch at once."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from backmix.train import recorded
from backmix.train.loop import steps
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

    class Stopped(Exception):
        pass

    real = recorded._Program.step
    taken = 0

    def step(program: recorded._Program) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == 3:
            raise Stopped
        return real(program)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded._Program, "step", step)
        with pytest.raises(Stopped):
            train(broken, "test", ["backmix", "train"])
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


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_cuda_graph_computes_the_steps_of_the_loop(
    data: Path, tmp_path: Path, method: Method, kind: Literal["sgd", "adam"]
) -> None:
    """As far as kernels that add in any order let it: losses over two epochs, to 1e-3."""
    run = replace(
        resident(data, tmp_path / "graph", method),
        device="cuda",
        optim=Optim(kind=kind, lr=0.01 if kind == "sgd" else 1e-4),
    )
    losses = []
    for graph in (True, False):
        _, state, loader = prepare_run(replace(run, graph=graph), "test", ["backmix"])
        autocast = torch.autocast("cuda", enabled=False)
        with loader, own_stream(torch.device("cuda")):
            going = (recorded_steps if graph else steps)(state, loader, run, autocast)
            losses.append([float(step.loss) for step in going])
        assert state.step == len(losses[-1]) > WARM_UP + 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
