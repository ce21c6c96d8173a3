"""Stored outputs: what any reader of safetensors finds in them, growing, mapping, damage."""

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch

from backmix.train import outputs as module
from backmix.train.outputs import Outputs, Spool, load_outputs, store


def some(count: int = 7) -> Outputs:
    random = np.random.default_rng(0)
    return Outputs(
        name="scenes",
        kind="unknown",
        logits=random.normal(size=(count, 3)).astype(np.float32),
        features=random.normal(size=(count, 5)).astype(np.float32),
        labels=np.full(count, -1),
        index=np.arange(count) * 3,
        files=("a.beton", "b.beton"),
        digest="12ab",
        bad=("x.png: no image",),
        extras={
            "rejection": random.normal(size=count).astype(np.float32),
            "pair": random.normal(size=(count, 2)),
        },
        scores={"msp": random.normal(size=count)},
    )


def assert_same(one: Outputs, two: Outputs) -> None:
    for name in ("name", "kind", "files", "digest", "bad"):
        assert getattr(one, name) == getattr(two, name)
    assert one.arrays().keys() == two.arrays().keys()
    for name, array in one.arrays().items():
        other = two.arrays()[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape), name
        np.testing.assert_array_equal(array, other, err_msg=name)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_what_is_stored_comes_back(tmp_path: Path, count: int) -> None:
    path = tmp_path / "scenes.safetensors"
    store(path, some(count))
    assert_same(load_outputs(path), some(count))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_any_reader_of_safetensors_finds_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "scenes.safetensors"
    store(path, some())
    found = safetensors.numpy.load_file(path)
    assert set(found) == {
        *("logits", "features", "labels", "index"),
        *("extra.rejection", "extra.pair", "score.msp"),
    }
    for name, array in some().arrays().items():
        np.testing.assert_array_equal(found[name], array)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert '"digest": "12ab"' in file.metadata()["backmix"]


def test_equal_outputs_make_equal_files(tmp_path: Path) -> None:
    store(tmp_path / "a", some())
    store(tmp_path / "b", some())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_arrays_are_aligned_and_what_is_changed_in_them_stays_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "scenes.safetensors"
    store(path, some())
    found = load_outputs(path)
    for name, array in found.arrays().items():
        assert array.ctypes.data % array.itemsize == 0, name
    torch.from_numpy(found.logits).zero_()
    found.scores["msp"][:] = 0
    assert_same(load_outputs(path), some())
    path.unlink()
    assert (found.features == some().features).all()


def test_many_loaded_outputs_keep_no_file_open(tmp_path: Path) -> None:
    path = tmp_path / "scenes.safetensors"
    store(path, some())
    before = len(list(Path("/proc/self/fd").iterdir()))
    held = [load_outputs(path) for _ in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert all(len(outputs) == 7 for outputs in held)


def test_any_strides_and_any_chunk_are_stored(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 16)
    turned = replace(some(), logits=np.asfortranarray(some().logits))
    store(tmp_path / "a", turned)
    assert_same(load_outputs(tmp_path / "a"), some())


def test_unequal_lengths_are_refused() -> None:
    for change in ({"labels": np.zeros(3, np.int64)}, {"extras": {"rejection": np.zeros(6)}}):
        with pytest.raises(ValueError, match="outputs of scenes have unequal lengths"):
            replace(some(), **change)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_file_cut_short_is_damaged(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "scenes.safetensors"
    store(path, some())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"scenes\.safetensors is damaged or holds no outputs"):
        load_outputs(path)


def test_another_programs_file_is_no_outputs(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"logits": np.zeros((2, 2), np.float16)}, path)
    with pytest.raises(ValueError, match="is damaged or holds no outputs"):
        load_outputs(path)
    safetensors.numpy.save_file({"logits": np.zeros((2, 2))}, path, {"backmix": "{}"})
    with pytest.raises(ValueError, match="is damaged or holds no outputs"):
        load_outputs(path)


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "scenes.safetensors"
    store(path, some())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("backmix.train.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*scenes.safetensors: No space left .* free"):
        store(path, some(3))
    monkeypatch.undo()
    assert_same(load_outputs(path), some())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_spool_grows_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def parts() -> Iterator[dict[str, np.ndarray]]:
        for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
            yield {name: array[rows] for name, array in some().arrays().items()}

    with Spool(tmp_path) as spool:
        for part in parts():
            spool.add(part)
        assert spool.rows == 7
        found = spool.arrays()
        assert not list(tmp_path.iterdir())
    for name, array in some().arrays().items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_a_spool_takes_one_kind_of_rows(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        spool.add({"logits": np.zeros((2, 3), np.float32)})
        for wrong in (np.zeros((2, 4), np.float32), np.zeros((2, 3))):
            with pytest.raises(AssertionError):
                spool.add({"logits": wrong})
    with Spool(tmp_path) as empty:
        assert empty.arrays() == {} and empty.rows == 0
