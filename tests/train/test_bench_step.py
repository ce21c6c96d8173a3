"""`backmix bench-step`: loader, step and both, in turns, on the code that trains."""

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.loader import Loader
from backmix.train import bench_step as bench_module
from backmix.train.bench_step import FORMS, Lap, bench_step, synthetic, table, timed, turns
from backmix.train.cli import run as command
from backmix.train.options import BackMix, Run, Softmax
from backmix.train.prepare import prepare_run
from tests.runs import tiny_run, tiny_set


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Run:
    return tiny_run(data, tmp_path / "never", Softmax())


def test_forms_take_turns_until_the_time_is_up() -> None:
    order: list[str] = []
    forms = {name: lambda name=name: order.append(name) or len(order) for name in "AB"}
    assert turns(forms, 3, time.perf_counter() + 60) == {"A": [1, 3, 5], "B": [2, 4, 6]}
    order.clear()
    assert turns(forms, 9, time.perf_counter() - 1) == {"A": [1, 3], "B": [2, 4]}


def test_a_slow_loader_is_what_is_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It delivers at the rate that is known, and training follows at most at that rate."""
    real, pause = Loader.batches, 0.15

    def slow(self: Loader, place: Place) -> Iterator[Batch]:
        for batch in real(self, place):
            time.sleep(pause)
            yield batch

    monkeypatch.setattr(Loader, "batches", slow)
    said: list[str] = []
    laps = bench_step(run, 2, 3, 60, said.append)
    assert set(laps) == set(FORMS) and not run.out.exists()
    for form in ("loader", "both"):
        for lap in laps[form]:
            assert lap.rate <= lap.images / (3 * pause)
            assert lap.images in (3 * 16, 2 * 16 + 8)  # 40 images: every third batch is short
    assert all(lap.data_wait >= 3 * pause / lap.seconds - 0.1 for lap in laps["both"])
    assert all(lap.images == 3 * 16 for lap in laps["step"])
    assert "classifier32-half, batch 16, 32 px, fp32, on cpu with 1 threads" in said[0]
    assert said[-1] == "2 turns of 3 steps each"


def test_turns_become_shorter_where_time_is_short(run: Run) -> None:
    said: list[str] = []
    bench_step(run, 2, 1000, 0.001, said.append)
    assert said[-1] == "2 turns of 2 steps each"


def test_synthetic_batches_are_of_the_training_set(data: Path, tmp_path: Path) -> None:
    """Numbers and labels belong together, as the bank wants them, and every crop is a crop."""
    run = tiny_run(data, tmp_path / "never", BackMix(patch=12))
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        label_of = dict(zip(loader.subset.index, loader.subset.labels, strict=True))
        made = synthetic(loader.subset, 32, 16, 8, torch.device("cpu"))
        for batch in made:
            assert batch.pool.shape == (16, 32, 32, 3) and batch.group == 8
            assert [label_of[i] for i in batch.index.tolist()] == batch.labels.tolist()
            assert torch.equal(batch.pool_index[batch.rows], batch.index)
            inside = batch.boxes[:, :2] + batch.boxes[:, 2:] <= batch.sizes
            assert inside.all() and (batch.boxes[:, 2:] > 0).all()
        training = bench_module.Training(
            state, run, itertools.cycle(made), torch.autocast("cpu", enabled=False)
        )
        bank = state.method.tensors()["bank"].clone()
        assert training.take(3) == 48 and state.step == 3
        training.refuse_void_steps()
        assert not torch.equal(state.method.tensors()["bank"], bank)  # the real step
        state.void_steps += 1
        with pytest.raises(ValueError, match="1 of 3 steps"):
            training.refuse_void_steps()


def test_the_table_compares_turns_of_the_same_round() -> None:
    """A slow round of both is not counted as the loader's: the share is 0.8 in each."""
    laps = {
        "loader": [Lap(100, 0.5), Lap(100, 1.0)],
        "step": [Lap(100, 1.0), Lap(100, 2.0)],
        "both": [Lap(80, 1.0, 0.25, 0.1), Lap(80, 2.0, 0.35, 0.3)],
    }
    lines = table(laps).splitlines()
    assert lines[0].split()[-5:] == ["150.0", "img/s", "(120.0", "..", "180.0)"]
    assert "80.0%" in lines[3] and "30.0% of the time" in lines[4] and "20.0%" in lines[5]


def test_the_command_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "--threads 1 --precision fp32 --model classifier32-quarter --loader.batch 16".split()
    words += ["--split.protocol", "None", "--rounds", "2", "--steps", "2", "--seconds", "1"]
    assert command(["bench-step", "cifar10-softmax", "--data", str(data), *words]) == 0
    out = capsys.readouterr().out
    assert "the loader alone delivers" in out and "share of the ceiling" in out
    assert not list(tmp_path.iterdir())
    assert command(["bench-step", "cifar10-softmaxx", "--data", str(data)]) == 2
    assert "did you mean cifar10-softmax?" in capsys.readouterr().err
    assert command(["bench-step", "cifar10-softmax", "--data", str(data), "--rounds", "1"]) == 2


@pytest.mark.gpu
def test_on_a_gpu_the_time_is_the_gpus(data: Path, tmp_path: Path) -> None:
    """Work that is still to be done when the host is through counts."""
    device = torch.device("cuda")
    work = torch.randn(4096, 4096, device=device)
    torch.mm(work, work)
    _, one = timed(lambda: work @ work, device)
    start = time.perf_counter()
    _, many = timed(lambda: [work @ work for _ in range(50)], device)
    assert 20 * one < many <= time.perf_counter() - start
    run = replace(tiny_run(data, tmp_path / "never", Softmax()), device="cuda")
    laps = bench_step(run, 2, 3, 60)
    assert all(lap.gpu_idle is not None and 0 <= lap.gpu_idle <= 1 for lap in laps["both"])
    assert not os.path.exists(run.out)
