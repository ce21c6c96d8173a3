"""Processes that train together do what one process does, and remain equal among themselves."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch import Tensor, nn

from backmix.pipeline.order import order
from backmix.train import passes
from backmix.train import run as run_module
from backmix.train import world as world_module
from backmix.train.checkpoint import load_tensors
from backmix.train.evaluate import evaluate
from backmix.train.exchange import Exchange
from backmix.train.loop import Step
from backmix.train.methods.method import Views
from backmix.train.methods.softmax import SoftmaxMethod
from backmix.train.options import (
    Arpl,
    BackMix,
    EvaluateOptions,
    Method,
    Run,
    Softmax,
    Split,
    Ssod,
)
from backmix.train.run import train
from backmix.train.state import State
from backmix.train.world import Agreement, World, dropout_seed, joined, refuse_too_many
from tests.images import class_folders, write_files
from tests.ranks import outcomes, together
from tests.runs import tiny_run, tiny_set

BATCH, GROUP, COUNT = 24, 4, 80
"""Six mix groups a step, and two in the last one of an epoch: with three processes one has none."""
STEPS = 40
METHODS: dict[str, Method] = {
    "softmax": Softmax(),
    "backmix": BackMix(patch=12, fill="keep", rate=0.5),
}


class GroupNet(nn.Module):
    """Two convolutions with GroupNorm: no figure of an image depends on the others."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.body(images).mean((2, 3)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton", count=COUNT)


def run_of(data: Path, out: Path, method: Method, loader: str = "turbo", **changes: object) -> Run:
    run = tiny_run(
        data,
        out,
        method,
        model="tests.train.test_world:GroupNet",
        epochs=STEPS // 4,
        log_every=1,
        save_steps=0,
    )
    loading = replace(run.loader, batch=BATCH, group=GROUP, loader=loader)  # type: ignore[arg-type]
    return replace(run, loader=loading, **changes)  # type: ignore[arg-type]


def digest(state: State) -> str:
    """Everything that must be equal in all processes after every step."""
    tensors = dict(state.model.state_dict()) | {"void": state.void_steps}
    for name, value in state.method.tensors().items():
        at_once = state.exchange is None or state.exchange.most
        if name != "bank" or at_once or state.place.consumed == COUNT:
            tensors[name] = value
    for number, slots in enumerate(state.optimizer.state.values()):
        tensors |= {f"{number}.{name}": value for name, value in slots.items()}
    found = xxhash.xxh3_64()
    for name, value in sorted(tensors.items()):
        found.update(name.encode())
        found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def trained(run: Run, kill: tuple[int, int] = (-1, 0), poison: tuple[int, int] = (-1, 0)) -> Any:
    """Train in this process, one of several; returns the exit code and the digest of every step.

    Args:
        run: the options.
        kill: rank that is sent SIGTERM, and after how many steps.
        poison: rank whose images are made infinite, and in which step, from 0.
    """
    digests: list[str] = []
    original, prepare = run_module.steps, SoftmaxMethod.prepare

    def watched(state: State, *rest: Any) -> Iterator[Step]:
        for step in original(state, *rest):
            digests.append(digest(state))
            if kill == (rank(), state.step):
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    def poisoned(self: SoftmaxMethod, *rest: Any) -> Views:
        views = prepare(self, *rest)
        bad = poison == (rank(), len(digests))
        return replace(views, images=views.images / 0) if bad else views

    run_module.steps = watched  # type: ignore[assignment]
    SoftmaxMethod.prepare = poisoned  # type: ignore[method-assign]
    world_module._ASK = 0.0  # agree after every step
    return train(run, "test", ["backmix", "train"]), digests


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def curve(out: Path) -> np.ndarray:
    return np.array([row["loss"] for row in rows(out)])


def assert_same_curve(one: np.ndarray, other: np.ndarray) -> None:
    """The bits differ, since those of a convolution depend on how many images it is given."""
    assert len(one) == len(other) == STEPS
    assert np.abs(one - other)[:10].max() < 1e-5
    assert np.abs(one - other).max() < 1e-3


def equal_digests(returned: list[Any]) -> list[str]:
    """The digests of every step, which are the same in all processes."""
    codes, digests = zip(*returned, strict=True)
    assert set(codes) == {0}
    assert all(each == digests[0] for each in digests)
    return digests[0]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The loss curves of one process."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for name, loader in (("softmax", "turbo"), ("backmix", "turbo"), ("backmix", "resident")):
        out = folder / f"{name}-{loader}"
        assert together(1, trained, run_of(data, out, METHODS[name], loader))[0][0] == 0
        found[f"{name}-{loader}"] = curve(out)
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["softmax-turbo", "backmix-turbo", "backmix-resident"])
def test_the_losses_are_those_of_one_process_on_the_same_images(
    kind: str, size: int, data: Path, tmp_path: Path, alone: dict[str, np.ndarray]
) -> None:
    name, loader = kind.split("-")
    run = run_of(data, tmp_path / "run", METHODS[name], loader)
    digests = equal_digests(together(size, trained, run))
    assert len(set(digests)) == STEPS
    assert_same_curve(curve(run.out), alone[kind])
    assert [row["samples"] for row in rows(run.out)] == [24, 24, 24, 8] * (STEPS // 4)


def test_parts_and_processes_together_give_the_same_losses(
    data: Path, tmp_path: Path, alone: dict[str, np.ndarray]
) -> None:
    """Three parts a step in each of two processes; of the last step two parts have no images."""
    run = run_of(data, tmp_path / "run", METHODS["backmix"], accumulate=3)
    equal_digests(together(2, trained, run))
    assert_same_curve(curve(run.out), alone["backmix-turbo"])


def test_uneven_shares_of_a_step_weigh_as_much_as_they_have_images(
    data: Path, tmp_path: Path
) -> None:
    """Five mix groups over two processes; the means of SSOD are over both."""
    method = Ssod(gate_known=0.0, gate_accuracy=0.0, gamma=0.5)
    base = run_of(data, tmp_path / "one", method, epochs=8)
    base = replace(base, loader=replace(base.loader, batch=20))
    together(1, trained, base)
    other = replace(base, out=tmp_path / "two")
    equal_digests(together(2, trained, other))
    one, two = rows(base.out), rows(other.out)
    for name in ("loss", "rejection_loss", "known_share", "gate", "grad_norm"):
        difference = [abs(a[name] - b[name]) for a, b in zip(one, two, strict=True)]
        assert max(difference[:5]) < 1e-5, name  # later a location may be on either side of gamma
    assert one[-1]["gate"] == 1 and {row["known_share"] for row in one} != {0}


def test_a_step_that_is_void_in_one_process_is_void_in_all(data: Path, tmp_path: Path) -> None:
    """BatchNorm, too: no process keeps statistics of such a step."""
    run = run_of(data, tmp_path / "run", Softmax(), model="classifier32-quarter", epochs=2)
    together(2, trained, run, (-1, 0), (1, 2))
    digests = equal_digests(
        together(2, trained, replace(run, out=tmp_path / "again"), (-1, 0), (1, 2))
    )
    found = rows(run.out)
    assert [row["bad_steps"] for row in found] == [0, 0, 1, 0, 0, 0, 0, 0]
    third = order(0, 0, COUNT)[2 * BATCH : 3 * BATCH]
    assert found[2]["bad_samples"] == sorted(third[BATCH // 2 :].tolist(), reverse=True)
    assert found[2]["samples"] == 0
    assert all(np.isfinite(row["loss"]) for row in found)
    assert len(set(digests)) == 8  # `void_steps` is part of them


def test_running_statistics_are_those_of_all_images(data: Path, tmp_path: Path) -> None:
    """After one step: the mean over the processes of what each has seen, by its images."""
    run = run_of(data, tmp_path / "run", Softmax(), model="classifier32-quarter", epochs=1)
    run = replace(run, loader=replace(run.loader, batch=40, group=8))  # 24 and 16 of 40
    found = together(2, statistics, run)
    assert found[0][0] == found[1][0]
    (mean, own), (_, other) = found
    assert own != other
    expected = 0.4 * np.array(own) + 0.6 * np.array(other)
    np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-9)


def statistics(run: Run) -> tuple[list[float], list[float]]:
    """Statistics after the first step, and what this process alone had made of them."""
    kept: list[list[float]] = []
    average = World.average_buffers

    def first_mean(model: nn.Module) -> list[float]:
        return next(b for b in model.buffers() if b.is_floating_point()).tolist()

    def watched(self: World, model: nn.Module, weight: float) -> int:
        own = first_mean(model)
        sent = average(self, model, weight)
        if not kept:
            kept.extend([first_mean(model), own])
        return sent

    World.average_buffers = watched  # type: ignore[method-assign]
    assert train(run, "test", []) == 0
    return kept[0], kept[1]


def test_the_gan_of_arpl_is_the_same_in_all_processes(tmp_path: Path) -> None:
    """Its own optimizers step inside the loss; in every second epoch pairs of BatchNorms rest."""
    few = tiny_set(tmp_path / "few.beton", count=8)
    method = Arpl(confusing=True)
    run = run_of(few, tmp_path / "run", method, model="classifier32-quarter", epochs=2)
    run = replace(run, loader=replace(run.loader, batch=8, group=4))
    equal_digests(together(2, trained, run))
    assert [row.get("gan_void") for row in rows(run.out)] == [0, None]


@pytest.mark.parametrize("kind", ["backmix-turbo", "backmix-resident"])
def test_a_run_of_two_goes_on_in_one_and_in_three(
    kind: str, data: Path, tmp_path: Path, alone: dict[str, np.ndarray]
) -> None:
    """Stopped in the middle of an epoch and of an interval of the log; one of two is told to."""
    name, loader = kind.split("-")
    begun = run_of(data, tmp_path / "begun", METHODS[name], loader, log_every=4)
    codes = [code for code, _ in together(2, trained, begun, (1, 18))]
    assert codes == [75, 75]
    status = json.loads((begun.out / "status.json").read_text())
    assert (status["state"], status["step"], status["why"]) == ("stopped", 18, "SIGTERM")
    tensors, meta = load_tensors(next((begun.out / "checkpoints").iterdir()))
    assert meta["processes"] == 2 and tensors["rank1.interval.seen"] == 24
    whole = run_of(data, tmp_path / "whole", METHODS[name], loader, log_every=4)
    together(1, trained, whole)
    for size in (1, 3):
        out = tmp_path / f"on-{size}"
        out.mkdir()
        for path in begun.out.rglob("*"):
            if path.is_file():
                (out / path.relative_to(begun.out)).parent.mkdir(exist_ok=True)
                (out / path.relative_to(begun.out)).write_bytes(path.read_bytes())
        equal_digests(together(size, trained, replace(begun, out=out)))
        for one, other in zip(rows(whole.out), rows(out), strict=True):
            assert (one["step"], one["samples"]) == (other["step"], other["samples"])
            assert abs(one["loss"] - other["loss"]) < 1e-3
            assert abs(one["grad_norm"] - other["grad_norm"]) < 1e-2


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_number_of_processes_goes_on_with_the_same_bits(
    size: int, data: Path, tmp_path: Path
) -> None:
    """With dropout and BatchNorm: the generators of all processes are in the checkpoint.

    Of three processes the sums of gradients depend on where in a message each of them lies; the
    first step after the stop is one in which all have images.
    """
    method = METHODS["backmix"]
    model = "classifier32-half" if size == 2 else "tests.train.test_world:GroupNet"
    run = run_of(data, tmp_path / "whole", method, model=model, epochs=3)
    whole = equal_digests(together(size, trained, run))
    other = replace(run, out=tmp_path / "stopped")
    assert {code for code, _ in together(size, trained, other, (0, 6))} == {75}
    rest = equal_digests(together(size, trained, other))
    assert rest == whole[6:]
    assert (other.out / "log.jsonl").read_bytes() == (run.out / "log.jsonl").read_bytes()


def test_bytes_of_the_bank_are_those_of_its_rows(data: Path, tmp_path: Path) -> None:
    """Once an epoch each row comes to every process, whatever the loader."""
    for loader in ("turbo", "resident"):
        run = run_of(data, tmp_path / loader, METHODS["backmix"], loader, epochs=1)
        run = replace(run, loader=replace(run.loader, batch=40))
        together(2, trained, run)
        written = [json.loads(x) for x in (run.out / "time.jsonl").read_text().splitlines()]
        [row] = [row for row in written if row.get("event") == "exchange"]
        assert row["bank_bytes"] == COUNT // 2 * (8 + 2 * 8 * 8)
        parameters = sum(p.numel() for p in GroupNet(4).parameters())
        assert (row["gradient_bytes"], row["buffer_bytes"]) == (2 * 4 * parameters, 0)


def exchanged(most: int) -> tuple[list[list[float]], list[float]]:
    """Exchange rows of a small bank; some processes write none, one a row that does not count."""
    with joined("cpu") as world:
        bank = torch.zeros(9, 1, 2, dtype=torch.float16)
        exchange = Exchange(world, bank, most)
        after = []
        written: list[list[int]]
        for written in ([[0, 3], [8], []], [[], [], []], [[-1, -1], [-1], [0]]):
            mine = torch.tensor(written[world.rank], dtype=torch.int64)
            for row in mine.tolist():
                if row >= 0:
                    bank[row] = 100 * len(after) + 10 * (world.rank + 1) + row
            exchange.wrote(mine)
            exchange.after_step()
            exchange.settle()
            after.append(bank[:, 0, 1].tolist())
        return after, bank[:, 0, 0].tolist()


@pytest.mark.parametrize("most", [0, 2])
def test_every_row_of_a_bank_reaches_every_process(most: int) -> None:
    found = together(3, exchanged, most)
    first = [10.0, 0, 0, 13, 0, 0, 0, 0, 28]
    last = [230.0, *first[1:]]
    assert all(each == ([first, first, last], last) for each in found)


def talk() -> tuple[Any, ...]:
    with joined("cpu") as world:
        mine = {"x": torch.tensor([world.rank]), "e": torch.empty(0, 3)}
        some = {"h": torch.arange(3, dtype=torch.bfloat16), "b": torch.tensor(True)}
        sent = world.tensors_of_first(some if world.first else None)
        assert sent is not None
        return (
            world.gathered({"rank": world.rank, "text": "ü" * world.rank}),
            world.of_first({"a": [1, None]} if world.first else None),
            [t["x"].tolist() for t in world.gathered_tensors(mine)],
            {name: (str(value.dtype), value.tolist()) for name, value in sent.items()},
            world.tensors_of_first(None),
            world.greatest([world.rank, -world.rank]),
            world.summed([0.5, world.rank]),
        )


def test_what_one_process_says_reaches_the_others() -> None:
    expected = (
        [{"rank": rank, "text": "ü" * rank} for rank in range(3)],
        {"a": [1, None]},
        [[0], [1], [2]],
        {"h": ("torch.bfloat16", [0, 1, 2]), "b": ("torch.bool", True)},
        None,
        [2, 0],
        [1.5, 3],
    )
    assert together(3, talk) == [expected] * 3


def test_a_mean_of_equal_buffers_keeps_their_bits() -> None:
    assert all(together(3, averaged))


def averaged() -> bool:
    with joined("cpu") as world:
        module = nn.Module()
        generator = torch.Generator().manual_seed(0)
        module.register_buffer("equal", torch.randn(1000, generator=generator))
        module.register_buffer("count", torch.tensor(2**40 + 1))
        module.register_buffer("own", torch.tensor([float(world.rank), 1.0]))
        broken = torch.full((2,), torch.nan if world.rank == 2 else 1.0)
        module.register_buffer("broken", broken)
        before = module.get_buffer("equal").clone()
        world.average_buffers(module, (0.25, 0.75, 0.0)[world.rank])
        return (
            torch.equal(module.get_buffer("equal"), before)
            and int(module.get_buffer("count")) == 2**40 + 1
            and module.get_buffer("own").tolist() == [0.75, 1.0]
            and module.get_buffer("broken").tolist() == [1, 1]
        )


def broken(run: Run) -> int:
    """Train; the data of one process vanish in the middle of it."""
    original = run_module.steps

    def failing(state: State, *rest: Any) -> Iterator[Step]:
        for step in original(state, *rest):
            if rank() == 1 and state.step == 3:
                raise OSError("the disk of this machine is gone")
            yield step

    run_module.steps = failing  # type: ignore[assignment]
    return train(run, "test", [])


def test_an_error_in_one_process_ends_all_with_its_message(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path / "run", Softmax(), save_steps=2)
    said = [message for _, message in outcomes(3, broken, run)]
    why = "process 1 of 3: the disk of this machine is gone"
    assert said == ["EndedByAnother: 1", f"SaidError: {why}", "EndedByAnother: 1"]
    status = json.loads((run.out / "status.json").read_text())
    assert (status["state"], status["step"], status["why"]) == ("failed", 2, why)


def plain(run: Run) -> int:
    return train(run, "test", [])


def test_what_all_processes_refuse_is_said_once(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path / "run", Softmax())
    said = [text for _, text in outcomes(3, plain, replace(run, epochs=0))]
    assert sum("--epochs must be" in text for text in said) == 1
    assert said.count("EndedByAnother: 1") == 2
    assert not run.out.exists()
    few = replace(run, loader=replace(run.loader, batch=24, group=12))
    said = [text for _, text in outcomes(3, plain, few)]
    assert "3 processes are too many, 1 to 2 can share them" in said[0]
    assert "--loader.group 8" in said[0]
    assert said[1:] == ["EndedByAnother: 1"] * 2
    said = [text for _, text in outcomes(2, plain, replace(run, sync_batchnorm=True))]
    assert sum("--sync-batchnorm needs GPUs" in text for text in said) == 1
    small = replace(run.loader, loader="resident")
    said = [text for _, text in outcomes(2, plain, replace(run, graph=True, loader=small))]
    assert sum("--graph" in text for text in said) == 1, said


@pytest.mark.parametrize(
    ("size", "batch", "group", "said"),
    [
        (1, 64, 64, ""),
        (2, 128, 64, ""),
        (4, 24, 4, "1, 2, 3, 6 processes share them evenly"),
        (6, 24, 4, ""),
    ],
)
def test_groups_are_counted_out(size: int, batch: int, group: int, said: str) -> None:
    remark = refuse_too_many(World(0, size), batch, group)
    assert (said in remark) if said else remark == ""
    with pytest.raises(ValueError, match=f"1 to {batch // group} can share"):
        refuse_too_many(World(0, batch // group + 1), batch, group)


def agreed(steps: int) -> list[tuple[int, bool]]:
    """Ask after every step; process 2 is sent a signal at step 5, process 0 wants to save at 9."""
    world_module._ASK = 0.0
    with joined("cpu") as world:
        agreement = Agreement(world, 0)
        return [
            agreement.now(step, 15 if (world.rank, step) == (2, 5) else 0, step == 9 - world.rank)
            for step in range(1, steps + 1)
        ]


def test_all_agree_when_to_stop_and_when_to_save() -> None:
    """Whether a checkpoint is due the first process says alone; a signal counts from any."""
    found = together(3, agreed, 10)
    expected = [(15, False) if step == 5 else (0, step == 9) for step in range(1, 11)]
    assert found == [expected] * 3


def test_agreements_are_about_a_second_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 100 steps a second by the first process's clock: at 1, 3, 7, ... and then every 100."""
    now = 0.0
    monkeypatch.setattr(world_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(World, "greatest", lambda self, values: list(values))
    agreement = Agreement(World(0, 2), 0)
    asked = []
    for step in range(1, 600):
        now = step / 100
        if agreement.now(step, 9, False)[0]:
            asked.append(step)
    assert asked[:4] == [1, 3, 7, 15]
    assert {b - a for a, b in pairwise(asked[7:])} == {100}


def test_dropout_differs_by_seed_step_and_process() -> None:
    seeds = {dropout_seed(a, b, c) for a in (0, 1 << 40) for b in (0, 7, 1 << 33) for c in (0, 1)}
    assert len(seeds) == 12
    assert all(0 <= seed < 1 << 64 for seed in seeds)


def test_a_lone_process_of_a_launcher_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined("cpu") as world:
        assert world == World()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR"), joined("cpu"):
        pass
    monkeypatch.setenv("RANK", "two")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match="must be numbers"), joined("cpu"):
        pass


def judged(run: Path, options: EvaluateOptions) -> dict[str, Any]:
    torch.set_num_threads(1)
    return evaluate(run, options)


@pytest.mark.parametrize("size", [2, 3])
def test_an_evaluation_is_that_of_one_process_to_the_bit(
    size: int, evaluated: tuple[Path, EvaluateOptions], tmp_path: Path
) -> None:
    """Batches of four; a folder with a broken image; a set of less than a batch."""
    one, options = evaluated
    out = tmp_path / "run"
    shutil.copytree(one, out)
    shutil.rmtree(out / "scores")
    documents = together(size, judged, out, options)
    assert documents[0]["known"] and documents[1:] == [{}] * (size - 1)
    assert (out / "metrics.json").read_bytes() == (one / "metrics.json").read_bytes()
    assert len(list((one / "scores").iterdir())) == 5
    for path in (one / "scores").iterdir():
        assert (out / "scores" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in out.iterdir()} == {path.name for path in one.iterdir()}
    times = [json.loads(line) for line in (out / "time.jsonl").read_text().splitlines()]
    passes = [row for row in times if row.get("event") == "evaluate"][-5:]
    assert [row["images"] for row in passes] == [68, 12, 50, 9, 2]


@pytest.fixture(scope="module")
def evaluated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvaluateOptions]:
    """A run that one process has judged, and how."""
    folder = tmp_path_factory.mktemp("evaluated")
    run = run_of(data, folder / "run", Softmax(), model="classifier32-quarter", epochs=1, val=0.125)
    run = replace(run, split=Split(known=("a", "b", "c", "d")))
    together(1, trained, run)
    class_folders(folder / "far", each=5)
    write_files(folder / "far", {"cat/3.jpg": b"no image"})
    class_folders(folder / "few", each=1)
    test = tiny_set(folder / "test.beton", count=50, seed=1)
    unknown = (f"far={folder / 'far'}", f"few={folder / 'few'}")
    options = EvaluateOptions(test=(test,), unknown=unknown, fit=True, batch=4)
    together(1, judged, run.out, options)
    return run.out, options


def unreadable(run: Path, options: EvaluateOptions) -> dict[str, Any]:
    """Judge; process 1 cannot write its share."""
    if rank() == 1:
        passes.store = lambda *arguments: (_ for _ in ()).throw(OSError(28, "no room"))  # type: ignore[assignment]
    return evaluate(run, options)


def test_an_error_in_one_process_leaves_the_evaluation_before(
    evaluated: tuple[Path, EvaluateOptions], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(evaluated[0], out)
    said = [text for _, text in outcomes(3, unreadable, out, evaluated[1])]
    assert "no room" in said[1] and said[0] == said[2] == "EndedByAnother: 1"
    for path in evaluated[0].rglob("*.json*"):
        assert (out / path.relative_to(evaluated[0])).read_bytes() == path.read_bytes()
    assert not (out / "scores.new").exists()
