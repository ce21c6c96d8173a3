"""Checkpoints from a copy, in a thread: what they hold, what waits for them, what may go wrong."""

import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backmix.train import checkpoint, saves
from backmix.train.checkpoint import checkpoint_path, load_tensors, newest_checkpoint
from backmix.train.log import Log, Progress
from backmix.train.options import Run
from backmix.train.saves import MOST_FAILED_SAVES, Saves

SECONDS = 60.0


class Held:
    """A state of one tensor; each step adds 1 to it."""

    def __init__(self, device: str = "cpu") -> None:
        self.step = 0
        self.value = torch.zeros(4, 3, device=device)

    def go(self) -> None:
        self.step += 1
        self.value += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"value": self.value, "turned": self.value.T, "number": torch.tensor(self.step)}

    def meta(self) -> dict[str, Any]:
        return {"step": self.step}


class Said(Progress):
    """What would be shown."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def show(self, text: str, *, final: bool = False) -> None:
        self.lines.append(text)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path, None)
    yield made
    made.close()


def saves_of(tmp_path: Path, log: Log, **changes: object) -> Any:
    """Saves whose states are `Held`."""
    run = Run(data=(), out=tmp_path, save_steps=1, save_minutes=1000)
    return Saves(replace(run, **changes), log)  # type: ignore[arg-type]


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let no checkpoint be written until the event is set."""
    real, go = saves.save_checkpoint, threading.Event()

    def waiting(*arguments: Any) -> Path:
        assert go.wait(SECONDS)
        return real(*arguments)

    monkeypatch.setattr(saves, "save_checkpoint", waiting)
    return go


def test_a_checkpoint_holds_the_moment_of_its_copy(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and rows that come while it is written are none of its business."""
    go, state, made = held_back(monkeypatch), Held(), saves_of(tmp_path, log)
    state.go()
    log.row({"step": 1})
    made.try_to_write(state, Said())
    state.go()  # it did not wait for the write, which nobody allowed yet
    log.row({"step": 2})
    log.epoch(1, 2, 0.5, 0.25, 0.1)
    assert not list((tmp_path / "checkpoints").glob("*"))
    go.set()
    made.finish()
    tensors, meta = load_tensors(checkpoint_path(tmp_path, 1))
    assert torch.equal(tensors["value"], torch.ones(4, 3))
    assert torch.equal(tensors["turned"], torch.ones(3, 4)) and int(tensors["number"]) == 1
    head = "epoch,step,train_loss,train_top1,lr\n"
    assert meta == {
        "step": 1,
        "log": {"log.jsonl": len('{"step": 1}\n'), "summary.csv": len(head)},
    }
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "summary.csv").read_text() == head + "1,2,0.5,25,0.1\n"


def test_the_next_checkpoint_waits_for_the_one_before(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is copied into the same memory."""
    go, state, made = held_back(monkeypatch), Held(), saves_of(tmp_path, log)
    state.go()
    made.try_to_write(state, Said())
    state.go()
    second = threading.Thread(target=made.try_to_write, args=(state, Said()), daemon=True)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go.set()
    second.join(SECONDS)
    made.finish()
    for step in (1, 2):
        tensors, _ = load_tensors(checkpoint_path(tmp_path, step))
        assert torch.equal(tensors["value"], torch.full((4, 3), float(step)))


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_them(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the checkpoint, and its name, before an older one is removed."""
    state, made, done = Held(), saves_of(tmp_path, log, keep=1), []
    real = {"fsync": os.fsync, "replace": os.replace}

    def fsync(descriptor: int) -> None:
        done.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real["fsync"](descriptor)

    def rename(old: Path, new: Path) -> None:
        done.append(f"rename {Path(new).name}")
        real["replace"](old, new)

    def remove(path: Path, missing_ok: bool = False) -> None:
        done.append(f"remove {path.name}")
        os.unlink(path)

    state.go()
    made.write(state)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(Path, "unlink", remove)
    state.go()
    made.write(state)
    assert done == [
        "sync log.jsonl",
        "sync summary.csv",
        "sync step-00000002.safetensors.tmp",
        "rename step-00000002.safetensors",
        "sync checkpoints",
        "remove step-00000001.safetensors",
    ]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_ones_are_kept(tmp_path: Path, log: Log, keep: int) -> None:
    state, made = Held(), saves_of(tmp_path, log, keep=keep)
    for _ in range(5):
        state.go()
        made.try_to_write(state, Said())
    made.finish()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}.safetensors" for step in range(6 - keep, 6)]


def test_a_disk_that_stays_full_ends_the_run_and_one_with_room_again_does_not(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    free = [1 << 40]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(1 << 41, 0, free[0]))
    state, made, said = Held(), saves_of(tmp_path, log), Said()

    def save() -> None:
        assert made.due(state)
        made.try_to_write(state, said)
        made.finish()
        state.go()

    state.go()
    save()
    size = checkpoint_path(tmp_path, 1).stat().st_size
    free[0] = int(1.1 * size) - 1
    for _ in range(MOST_FAILED_SAVES - 1):
        save()
    assert len(said.lines) == MOST_FAILED_SAVES - 1
    assert f"{size:,} bytes needed, {free[0]:,} free" in said.lines[0]
    assert "step-00000002" in said.lines[0] and "No space left on device" in said.lines[0]
    assert "the checkpoint of step 1 is intact, going on" in said.lines[0]
    free[0] = int(1.1 * size) + 1
    save()  # one that can be written is a new start of the count
    free[0] = 0
    for _ in range(MOST_FAILED_SAVES):
        save()
    with pytest.raises(OSError, match="No space left"):
        made.due(state)
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 4
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_what_is_not_the_disks_fault_ends_the_run_at_once(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Path:
        raise KeyError("dtype")

    state, made = Held(), saves_of(tmp_path, log)
    with monkeypatch.context() as patch:
        patch.setattr(saves, "save_checkpoint", broken)
        made.try_to_write(state, Said())
        made.finish()
    with pytest.raises(KeyError):
        made.due(state)


def test_the_last_checkpoint_is_waited_for_and_says_why_it_failed(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own reason alone: what was wrong before does not matter once it is written."""
    state, made = Held(), saves_of(tmp_path, log)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        made.try_to_write(state, Said())
        with pytest.raises(OSError, match=r"step-00000000.*No space left.*bytes needed"):
            made.write(state)
    assert not list((tmp_path / "checkpoints").iterdir())
    made.write(state)
    assert checkpoint_path(tmp_path, 0).exists()


def test_what_somebody_removes_meanwhile_is_put_back(tmp_path: Path, log: Log) -> None:
    state, made = Held(), saves_of(tmp_path, log)
    log.row({"step": 1})
    made.write(state)
    (tmp_path / "log.jsonl").unlink()
    shutil.rmtree(tmp_path / "checkpoints")
    log.row({"step": 2})
    state.go()
    made.write(state)
    _, meta = load_tensors(checkpoint_path(tmp_path, 1))
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert meta["log"]["log.jsonl"] == (tmp_path / "log.jsonl").stat().st_size


def test_a_run_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    log = Log(out, None)
    state, made, said = Held(), saves_of(out, log), Said()
    made.write(state)
    shutil.rmtree(out)
    made.try_to_write(state, said)
    made.finish()
    assert len(said.lines) == 1 and str(out) in said.lines[0] and "No such file" in said.lines[0]
    with pytest.raises(OSError, match="No such file"):
        made.write(state)
    log.close()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, log: Log) -> None:
    """A file in its place stands for a read-only folder, which would not keep root out."""
    (tmp_path / "checkpoints").write_text("")
    state, made, said = Held(), saves_of(tmp_path, log), Said()
    made.try_to_write(state, said)
    made.finish()
    assert len(said.lines) == 1 and "Not a directory" in said.lines[0]
    assert str(checkpoint_path(tmp_path, 0)) in said.lines[0]


def test_log_rows_that_do_not_fit_keep_the_checkpoint_back(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would count rows that are in no file."""
    state, made, said = Held(), saves_of(tmp_path, log), Said()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda descriptor, data, offset: 0)
        log.row({"step": 1})
        made.try_to_write(state, said)
        made.finish()
    assert "log.jsonl: No space left" in said.lines[0]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.gpu
def test_a_gpus_tensors_are_copied_into_pinned_memory_once_allocated() -> None:
    copies, state = checkpoint.HostCopies(), Held("cuda")
    state.value = state.value.to(memory_format=torch.contiguous_format)
    first = copies.take(state.tensors())
    where = first["value"].data_ptr()
    assert first["value"].is_pinned() and not first["number"].is_pinned()
    for _ in range(3):
        state.go()
    second = copies.take(state.tensors())
    assert second["value"].data_ptr() == where
    assert torch.equal(second["value"], state.value.cpu())
    assert torch.equal(second["turned"], state.value.T.cpu())


def test_copies_are_no_views_and_use_the_same_memory_again() -> None:
    copies, state = checkpoint.HostCopies(), Held()
    first = copies.take(state.tensors())
    where = first["turned"].data_ptr()
    state.go()
    assert not first["value"].any() and first["turned"].is_contiguous()
    assert copies.take(state.tensors())["turned"].data_ptr() == where
    grown = SimpleNamespace(value=torch.ones(5, 3))
    assert copies.take({"turned": grown.value})["turned"].shape == (5, 3)
