"""The loop: what a run writes, how it stops and goes on, and what a void step leaves alone."""

import hashlib
import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from backmix.pipeline import loader as loader_module
from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.order import order
from backmix.train import loop
from backmix.train import run as run_module
from backmix.train.checkpoint import checkpoint_path, load_tensors, locked
from backmix.train.log import GrowingFile, read_status, write_status
from backmix.train.loop import steps
from backmix.train.methods.backmix import BackMixMethod
from backmix.train.methods.softmax import SoftmaxMethod
from backmix.train.options import Augment, BackMix, Method, Optim, Run, Softmax, Split, Ssod
from backmix.train.prepare import begin, fill_bank, prepare_run
from backmix.train.run import train
from backmix.train.state import State
from backmix.train.trained import load_model
from tests.runs import poisoned, tiny_images, tiny_run, tiny_set, views_of

METHODS = {
    "softmax": Softmax(),
    "raw": BackMix(patch=12, fill="keep", rate=0.5),
    "raw+loss": BackMix(patch=12, cam_source="raw+loss", donor="other"),
    "mix": BackMix(patch=12, cam_source="mix", onto="cool", fill="donor", warmup=1),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def fingerprint(run: Path) -> dict[str, str]:
    """The sha256 of everything that must end the same: state, weights, log and summary."""
    names = ["model.safetensors", "log.jsonl", "summary.csv"]
    names += [f"checkpoints/{p.name}" for p in sorted((run / "checkpoints").iterdir())[-1:]]
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names}


def start(run: Run) -> int:
    return train(run, "test", ["backmix", "train"])


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let SIGTERM arrive after so many steps of this process."""
    real, taken = loop.take_step, [0]

    def counted(*arguments: object) -> torch.Tensor:
        taken[0] += 1
        if taken[0] == count:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "take_step", counted)


def assert_same_bits_when_stopped(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...]
) -> None:
    """Hold a finished run against one that is stopped after so many steps of each start."""
    other = replace(run, out=out)
    codes = []
    for count in counts:
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            codes.append(start(other))
    assert codes == [75] * (len(counts) - 1) + [0]
    assert fingerprint(other.out) == fingerprint(run.out)


def test_a_run_writes_its_folder(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert start(tiny_run(data, out)) == 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8, 9]  # every 2, and at epochs' ends
    assert sum(row["samples"] for row in rows) == 3 * 40
    assert rows[1]["consumed"] == 40 and rows[1]["epoch"] == 0
    summary = (out / "summary.csv").read_text().splitlines()
    assert summary[0] == "epoch,step,train_loss,train_top1,lr" and len(summary) == 4
    assert read_status(out)["state"] == "finished"
    config = json.loads((out / "config.json").read_text())
    assert config["classes"] == ["a", "b", "c", "d"]
    assert config["run"]["method"]["type"] == "BackMix"
    assert config["resolved"] == {
        "device": "cpu",
        "precision": "fp32",
        "threads": 1,
        "loader": "turbo",
    }


def test_the_loss_of_the_log_is_the_mean_over_the_samples(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, tmp_path / "run", Softmax(), epochs=1, log_every=3)
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        losses = [
            float(step.loss)
            for step in steps(state, loader, run, torch.autocast("cpu", enabled=False))
        ]
    assert start(run) == 0
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    sizes = [16, 16, 8]
    expected = sum(loss * n for loss, n in zip(losses, sizes, strict=True)) / 40
    assert row["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("loader", ["turbo", "resident"])
def test_a_stopped_run_ends_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, loader: str
) -> None:
    run = tiny_run(data, tmp_path / "whole", METHODS[name])
    run = replace(run, loader=replace(run.loader, loader=loader))
    assert start(run) == 0
    other = replace(run, out=tmp_path / "stopped")
    codes = []
    for count in (1, 2, 3, 99):  # inside an epoch, at its end, in the next one
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            codes.append(start(other))
    assert codes == [75, 75, 75, 0]
    assert fingerprint(other.out) == fingerprint(run.out)


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_with_growing_views_ends_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = tiny_run(data, tmp_path / "whole", METHODS[name])
    grown = replace(run.loader, loader="turbo", size=32, grow_from=16, grow=(0, 2))
    run = replace(run, loader=grown)
    seen = []
    real = loop.take_step

    def noting(state: State, batch: Batch, *rest: object) -> torch.Tensor:
        seen.append((state.place.epoch, batch.pool.shape[1]))
        return real(state, batch, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", noting)
        assert start(run) == 0
    assert set(seen) == {(0, 16), (1, 32), (2, 32)}
    other = replace(run, out=tmp_path / "stopped")
    codes = []
    for count in (2, 2, 99):  # inside the small epoch, inside the first large one
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            codes.append(start(other))
    assert codes == [75, 75, 0]
    assert fingerprint(other.out) == fingerprint(run.out)


def test_views_that_begin_too_small_are_refused(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, tmp_path / "run", BackMix(patch=8))
    grown = replace(run.loader, loader="turbo", size=32, grow_from=16, grow=(0, 2))
    with pytest.raises(
        ValueError, match=r"--loader.grow-from 8: classifier32-half leaves one cell"
    ):
        start(replace(run, loader=replace(grown, grow_from=8)))
    with pytest.raises(ValueError, match=r"--loader.grow-from must be 0 to 32 pixels"):
        start(replace(run, loader=replace(grown, grow_from=-1)))
    with pytest.raises(ValueError, match=r"--augment.pad must be 0 \.\. 15"):
        start(replace(run, loader=grown, augment=Augment(pad=16)))
    assert not run.out.exists()


def test_a_run_remembers_which_loader_was_the_fastest(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timed once, at the first start; what is the fastest later does not matter."""
    run = tiny_run(data, tmp_path / "turbo", Softmax())
    crops = replace(run.loader, loader="turbo", crop="random")
    run = replace(run, loader=crops)
    assert start(run) == 0
    other = replace(run, out=tmp_path / "fastest", loader=replace(crops, loader="fastest"))
    timings: list[str] = ["turbo", "ffcv"]
    monkeypatch.setattr(loader_module, "fastest", lambda *arguments: timings.pop(0))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert start(other) == 75
    assert start(other) == 0
    assert timings == ["ffcv"]
    config = json.loads((other.out / "config.json").read_text())
    assert config["resolved"]["loader"] == "turbo"
    assert config["run"]["loader"]["loader"] == "fastest"
    assert fingerprint(other.out) == fingerprint(run.out)


def test_a_finished_run_is_left_as_it_is(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, tmp_path / "run", Softmax())
    assert start(run) == 0
    before = fingerprint(run.out)
    assert start(run) == 0
    assert fingerprint(run.out) == before


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(data, tmp_path / "whole")
    assert start(run) == 0
    other = replace(run, out=tmp_path / "damaged")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert start(other) == 75
    newest = checkpoint_path(other.out, 7)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    assert start(other) == 0
    assert fingerprint(other.out) == fingerprint(run.out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 5}, "seed was 0, is 5"),
        ({"method": BackMix(patch=8, fill="keep", rate=0.5)}, "method.patch was 12, is 8"),
        ({"method": Softmax()}, "method was BackMix, is Softmax"),
        ({"split": Split(known=("a", "b"))}, "split.known"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_alone(
    data: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    run = tiny_run(data, tmp_path / "run")
    assert start(run) == 0
    before = fingerprint(run.out)
    with pytest.raises(ValueError, match="another configuration") as refused:
        start(replace(run, **change))  # type: ignore[arg-type]
    assert said in str(refused.value)
    assert fingerprint(run.out) == before and read_status(run.out)["state"] == "finished"


def test_a_run_without_a_checkpoint_takes_other_options(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, tmp_path / "run", Softmax())
    run.out.mkdir()
    wrong = replace(run, split=Split(known=("zebra",)))
    with pytest.raises(ValueError, match="zebra"):
        start(wrong)
    (run.out / "config.json").write_text("{}")
    assert start(run) == 0


def test_a_folder_that_a_failed_start_made_is_removed(data: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing\.beton"):
        start(tiny_run(tmp_path / "missing.beton", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_continued_run_that_fails_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that asks for the status must not start it for ever."""
    copy = tmp_path / "copy.beton"
    copy.write_bytes(data.read_bytes())
    run = tiny_run(copy, tmp_path / "run", Softmax())
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert start(run) == 75
    copy.unlink()
    with pytest.raises(OSError, match=r"copy\.beton"):
        start(run)
    assert read_status(run.out)["state"] == "failed"


def test_a_killed_run_does_not_count_as_running(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, tmp_path / "run", Softmax())
    assert start(run) == 0
    write_status(run.out, "running", 4)
    assert read_status(run.out)["state"] == "stopped"
    with locked(run.out):
        assert read_status(run.out)["state"] == "running"


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"state": "odd", "step": 1, "why": ""}', '{"state": "running"}', "x"]
)
def test_a_damaged_status_is_said_to_be(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(ValueError, match=r"status\.json"):
        read_status(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"run": 1}', '{"run": {}, "data": {}}', "x"])
def test_a_damaged_configuration_is_said_to_be(data: Path, tmp_path: Path, text: str) -> None:
    run = tiny_run(data, tmp_path / "run", Softmax())
    assert start(run) == 0
    (run.out / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        start(run)


def test_a_signal_before_the_first_step_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(data, tmp_path / "run", Softmax())
    real = run_module.prepare_run

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prepare_run", interrupted)
        assert start(run) == 130  # there is nothing to continue
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert start(run) == 75
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prepare_run", interrupted)
        assert start(run) == 75
    assert start(run) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"log_every": 0}, "--log-every"),
        ({"threads": -1}, "--threads"),
        ({"val": 1.5}, "--val"),
        ({"save_minutes": math.nan}, "--save-minutes"),
        ({"seed": -1}, "--seed"),
        ({"keep": 0}, "--keep"),
        ({"optim": Optim(lr=math.nan)}, "--optim.lr"),
        ({"optim": Optim(label_smoothing=2.0)}, "--optim.label-smoothing"),
        ({"optim": Optim(warmup=2.0)}, "--optim.warmup"),
        ({"optim": Optim(milestones=(math.nan,))}, "--optim.milestones"),
        ({"augment": Augment(pad=40)}, "--augment.pad"),
        ({"augment": Augment(std=(0.0, 1.0, 1.0))}, "--augment.std"),
        ({"split": Split(protocol="cifar10", known=("a",))}, "--split.known"),
        ({"split": Split(protocol="cifar10")}, "splits 10 classes"),
        ({"val": 0.95}, "no training image is left"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_anything_is_written(
    data: Path, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        start(replace(tiny_run(data, tmp_path / "run"), **options))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_log_on_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows wait until there is room; a row written in part is cut off."""
    real, room = os.pwrite, [6]

    def little(descriptor: int, data: bytes, offset: int) -> int:
        return real(descriptor, data[: room[0]], offset)

    monkeypatch.setattr(os, "pwrite", little)
    file = GrowingFile(tmp_path / "log", None)
    file.append("one\n")
    file.append("second\n")
    assert (tmp_path / "log").read_text() == "one\n"
    with pytest.raises(OSError, match=r"cannot write .*log: No space left"):
        file.write()
    assert (tmp_path / "log").read_text() == "one\n"
    room[0] = 1000
    assert file.write() == len("one\nsecond\n")
    assert (tmp_path / "log").read_text() == "one\nsecond\n"
    file.close()


def test_other_data_are_refused(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, tmp_path / "run")
    assert start(run) == 0
    other = tiny_set(tmp_path / "other.beton", seed=1)
    with pytest.raises(ValueError, match="digest"):
        start(replace(run, data=(other,)))


def test_a_void_step_leaves_everything_as_it_was(data: Path, tmp_path: Path) -> None:
    """A loss that is not finite: parameters, momentum, BatchNorm and bank keep their bits."""
    run = tiny_run(data, tmp_path / "run", BackMix(patch=12, cam_source="mix"), epochs=2)
    _, state, loader = prepare_run(run, "test", [])
    autocast = torch.autocast("cpu", enabled=False)
    with loader:
        taken = steps(state, loader, run, autocast)
        next(taken)
        before = {name: value.clone() for name, value in state.tensors().items()}
        real = state.method.prepare
        state.method.prepare = poisoned(real, row=1)  # type: ignore[method-assign]
        loss = next(taken).loss
        state.method.prepare = real  # type: ignore[method-assign]
        assert not torch.isfinite(loss)
        after = state.tensors()
        for name, value in before.items():
            if name.startswith(("model.", "optimizer.", "method.")):
                assert torch.equal(value, after[name]), name
        assert int(state.void_steps) == 1
        next(taken)
        assert int(state.void_steps) == 1
        changed = state.tensors()["model.head.weight"]
        assert torch.isfinite(changed).all() and not torch.equal(
            changed, before["model.head.weight"]
        )


def test_void_steps_count_in_no_figure_but_their_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three steps is void: the row's loss is the mean over the images of the other two."""
    run = tiny_run(data, tmp_path / "run", Softmax(), epochs=1, log_every=3)
    real, seen = SoftmaxMethod.loss, []

    def second_is_void(self, views, batch, model):
        second = len(seen) == 1
        shown = replace(views, images=views.images * (math.nan if second else 1))
        out = real(self, shown, batch, model)
        out.scalars["figure"] = torch.tensor(math.inf if second else 0.25)
        seen.append(out.per_sample)
        return out

    monkeypatch.setattr(SoftmaxMethod, "loss", second_is_void)
    assert start(run) == 0
    row = json.loads((run.out / "log.jsonl").read_text())
    assert row["bad_steps"] == 1 and row["samples"] == 24 and len(row["bad_samples"]) == 16
    assert row["loss"] == pytest.approx(torch.cat([seen[0], seen[2]]).mean().item(), rel=1e-6)
    assert row["figure"] == 0.25


def test_a_state_comes_back_whole(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, tmp_path / "run", BackMix(patch=12, cam_source="mix"))
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        taken = steps(state, loader, run, torch.autocast("cpu", enabled=False))
        for _ in range(4):
            next(taken)
    state.void_rows = 2
    state.void_steps += 3
    state.void_samples[:2] = torch.tensor([7, 9])
    saved = {name: value.clone() for name, value in state.tensors().items()}
    _, fresh, other = prepare_run(run, "test", [])
    other.close()
    fresh.load(saved, state.meta())
    assert fresh.meta() == state.meta()
    back = fresh.tensors()
    assert set(back) == set(saved)
    for name, value in saved.items():
        assert torch.equal(back[name], value), name
    for buffer, safe in zip(fresh.model.buffers(), fresh.safe_buffers, strict=True):
        assert torch.equal(buffer, safe)


def test_a_clipped_step_moves_no_further_than_the_clip(data: Path, tmp_path: Path) -> None:
    optim = Optim(lr=1.0, momentum=0.0, weight_decay=0.0, clip=1e-3)
    run = replace(tiny_run(data, tmp_path / "run", Softmax()), optim=optim)
    _, state, loader = prepare_run(run, "test", [])
    before = [p.detach().clone() for p in state.model.parameters()]
    with loader:
        next(steps(state, loader, run, torch.autocast("cpu", enabled=False)))
    after = [p.detach() for p in state.model.parameters()]
    moved = [(p - q).square().sum() for p, q in zip(after, before, strict=True)]
    assert 0.9e-3 < float(torch.stack(moved).sum().sqrt()) < 1.01e-3


def test_labels_are_smoothed(data: Path, tmp_path: Path) -> None:
    run = replace(tiny_run(data, tmp_path / "run", Softmax()), optim=Optim(label_smoothing=0.3))
    run = replace(run, model="classifier32-quarter")
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        batch = next(iter(loader.batches(Place(0))))
    views = views_of(state.method, batch)
    out = state.method.loss(views, batch, state.model)
    logits, _ = state.model(views.images)
    expected = F.cross_entropy(logits, batch.labels, label_smoothing=0.3)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_run_that_is_only_void_ends_with_the_samples_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SoftmaxMethod, "prepare", poisoned(SoftmaxMethod.prepare))
    run = tiny_run(data, tmp_path / "run", Softmax(), epochs=30, log_every=12)
    first = set(order(0, 2, 40)[:16].tolist())  # the third log row in a row ends it, in epoch 2
    with pytest.raises(ValueError, match=r"[0-9]+ of the last [0-9]+ steps") as ended:
        start(run)
    named = set(json.loads(str(ended.value).split("samples of the first: ")[1].split("]")[0] + "]"))
    assert named == first
    assert read_status(run.out)["state"] == "failed"


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a device: `.item()`, and sizes that depend on data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, given = str(func), kwargs or {}
        waits = any(word in name for word in self.FORBIDDEN)
        if name.startswith(("aten.index.", "aten.index_put")):
            chosen = (place for place in args[1] if place is not None)
            waits = any(place.dtype in (torch.bool, torch.uint8) for place in chosen)
        if name.startswith("aten.repeat_interleave.Tensor"):
            waits = given.get("output_size") is None
        assert not waits, f"{name} waits for the device"
        return func(*args, **given)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("loader", ["turbo", "resident"])
def test_a_step_does_not_wait_for_the_device(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, loader: str
) -> None:
    """The doors' CPU form may look at values; the form of other devices is forced here."""
    monkeypatch.setattr("backmix.kernels.mix_background._reading_is_free", lambda tensor: False)
    run = tiny_run(data, tmp_path / "run", METHODS[name])
    run = replace(run, loader=replace(run.loader, loader=loader))
    _, state, opened = prepare_run(run, "test", [])

    def waits(self: torch.Tensor, *_: object) -> None:
        raise AssertionError("a copy to the host waits for the device")

    with opened:
        batches = list(opened.batches(Place(0)))
        autocast = torch.autocast("cpu", enabled=False)
        for copy in ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__"):
            monkeypatch.setattr(torch.Tensor, copy, waits)
        with NoWaiting():
            for batch in batches:
                loop.take_step(state, batch, run, 0.1, autocast)


def test_held_out_images_are_not_trained_on(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, tmp_path / "run", Softmax(), val=0.2)
    _, _, loader = prepare_run(run, "test", [])
    with loader:
        assert loader.samples == 32
        assert np.bincount(loader.subset.labels).tolist() == [8, 8, 8, 8]


def test_known_classes_keep_the_order_that_was_asked_for(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, tmp_path / "run", Softmax(), split=Split(known=("c", "a")))
    config, state, loader = prepare_run(run, "test", [])
    with loader:
        assert config.classes == ["c", "a"] and config.known == [2, 0]
        assert state.model.head.out_features == 2 and loader.samples == 20


@pytest.mark.parametrize("known", [("x",), ("a", "a")])
def test_a_class_list_that_names_nothing_is_refused(
    data: Path, tmp_path: Path, known: tuple[str, ...]
) -> None:
    run = tiny_run(data, tmp_path / "run", Softmax(), split=Split(known=known))
    with pytest.raises(ValueError, match=r"--split\.known"):
        prepare_run(run, "test", [])


def test_weights_that_know_what_must_not_be_learned_are_refused(data: Path, tmp_path: Path) -> None:
    def of(known: str, method: Method, **changes: object) -> Run:
        split = Split(known=tuple(known))
        return tiny_run(data, tmp_path / known, method, split=split, epochs=1, **changes)

    before = of("ab", Softmax())
    assert start(before) == 0
    with pytest.raises(ValueError, match=r"--init .* was trained on b, unknown in this run"):
        prepare_run(of("ac", Softmax(), init=before.out), "test", [])
    with pytest.raises(ValueError, match=r"knows the classes a, b, this run b, a: a rejection"):
        prepare_run(of("ba", Ssod(train="head"), init=before.out), "test", [])
    with pytest.raises(ValueError, match=r"--val 0\.2 holds images out that --init .* \(--val 0 "):
        prepare_run(of("ab", Softmax(), init=before.out, val=0.2), "test", [])
    again = of("ba", Softmax(), init=before.out)
    _, state, loader = prepare_run(again, "test", [])
    loader.close()
    begin(state, again)
    weights = load_model(before.out).state_dict()
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("kind", ["resident", "turbo"])
def test_backmix_knows_from_the_first_step_what_a_trained_network_knows(
    data: Path, tmp_path: Path, kind: str
) -> None:
    """The maps of all images, by a formula of their own; a fresh head says nothing, and is left."""
    before = tiny_run(data, tmp_path / "before", Softmax(), epochs=1)
    assert start(before) == 0
    run = tiny_run(data, tmp_path / "run", METHODS["raw"], init=before.out)
    run = replace(run, loader=replace(run.loader, loader=kind))  # type: ignore[arg-type]
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        assert begin(state, run).head
        assert fill_bank(state, run, loader)
    model = load_model(before.out)
    assert isinstance(state.method, BackMixMethod) and isinstance(model.head, torch.nn.Linear)
    images, labels = tiny_images(40, 4)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        _, features = model(pixels)
        maps = torch.einsum("nc,ncij->nij", model.head.weight[torch.from_numpy(labels)], features)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    expected = (maps - low) / (high - low)
    assert (state.method.bank.float() - expected).abs().max() < 2e-3
    assert state.model.training and (state.method.bank.amax((1, 2)) == 1).all()

    other = replace(run, split=Split(known=("a", "b", "c")), out=tmp_path / "other")
    weights = before.out / "model.safetensors"  # of four classes
    _, state, loader = prepare_run(replace(other, init=weights), "test", [])
    loader.close()
    assert not begin(state, replace(other, init=weights)).head


def test_the_optimizer_state_is_saved_under_parameter_names(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, tmp_path / "run", Softmax())
    assert start(run) == 0
    tensors, meta = load_tensors(checkpoint_path(run.out, 9))
    assert "optimizer.head.weight.momentum_buffer" in tensors
    assert meta["place"] == {"seed": 0, "epoch": 3, "consumed": 0}
    assert "generator.cpu" in tensors
