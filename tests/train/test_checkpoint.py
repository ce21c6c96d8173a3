"""Checkpoints are whole or absent, reproducible to the byte, and no damage passes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from backmix.train import checkpoint
from backmix.train.checkpoint import (
    checkpoint_path,
    is_locked,
    load_tensors,
    locked,
    newest_checkpoint,
    save_checkpoint,
    save_tensors,
    write_atomically,
)

ROOT = Path(__file__).resolve().parents[2]


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(2, 3, 4, 5, generator=generator)
    return {
        "plain": torch.randn(4, 3, generator=generator),
        "channels_last": image.to(memory_format=torch.channels_last),
        "view": image[0, 1],
        "half": torch.randn(7, generator=generator).half(),
        "bfloat": torch.randn(7, generator=generator).bfloat16(),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2**40),
        "empty": torch.empty(0, 3),
    }


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors, meta = some_tensors(), {"step": 7, "place": {"epoch": 2}}
    save_tensors(tmp_path / "a", tensors, meta)
    loaded, read = load_tensors(tmp_path / "a")
    assert read == meta and set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_a_file_is_what_safetensors_itself_would_write(tmp_path: Path) -> None:
    """The header is ours, written beside the tensors' own memory: every dtype, byte for byte."""
    kinds = [dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)]
    tensors = some_tensors()
    for number, dtype in enumerate(set(kinds) & set(checkpoint._DTYPES)):
        tensors[f"{number % 3}{dtype}"] = torch.arange(5).to(dtype)
    meta = {"step": 7, "quotes": 'é "x"\n'}
    save_tensors(tmp_path / "a", tensors, meta)
    written = (tmp_path / "a").read_bytes()
    header = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
    plain = {name: value.contiguous().clone() for name, value in tensors.items()}
    assert written == safetensors.torch.save(plain, header["__metadata__"])
    read = load_file(tmp_path / "a")
    assert all(torch.equal(read[name], value) for name, value in plain.items())


def test_equal_contents_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_tensors(tmp_path / "a", tensors, {"x": 1, "y": 2})
    backwards = {name: tensors[name] for name in reversed(tensors)}
    save_tensors(tmp_path / "b", backwards, {"y": 2, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_tensors(path, {"w": torch.arange(6.0), "n": torch.tensor(3)}, {"step": 7})
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for byte in range(len(whole)):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            load_tensors(path)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a"
    save_tensors(path, {"w": torch.arange(60.0)}, {"step": 7})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="damaged"):
        load_tensors(path)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3)}, tmp_path / "a")
    with pytest.raises(ValueError, match="damaged or no file"):
        load_tensors(tmp_path / "a")


def test_only_the_last_checkpoints_are_kept_and_a_damaged_one_is_passed_over(
    tmp_path: Path,
) -> None:
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, step, {"w": torch.tensor(step)}, {"step": step})
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    torn = tmp_path / "checkpoints" / "step-00000025.safetensors.tmp"
    torn.write_bytes(b"half")
    newest = checkpoint_path(tmp_path, 20)
    newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
    found, said = newest_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 15
    assert len(said) == 1 and str(newest) in said[0]
    assert not torn.exists()
    # The damaged one is set aside: it must not crowd out good ones of earlier steps.
    save_checkpoint(tmp_path, 16, {"w": torch.tensor(16)}, {"step": 16})
    found, said = newest_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 16 and not said


def test_a_full_disk_leaves_the_old_file_and_says_how_much_was_missing(tmp_path: Path) -> None:
    """The limit on a file's size stands in for a full disk: the write fails in the middle."""
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from backmix.train.checkpoint import write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "path = Path(sys.argv[1]); write_atomically(path, b'old')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomically(path, b'x' * 5000)\n"
        "except OSError as error: print(error)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert "5,000 bytes needed" in out and str(tmp_path / "a") in out
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_any_call_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [left.name for left in tmp_path.iterdir()] == ["a"]


def test_when_every_checkpoint_is_damaged_nothing_begins_anew_silently(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"w": torch.tensor(step)}, {})
        checkpoint_path(tmp_path, step).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="no checkpoint of"):
        newest_checkpoint(tmp_path)


def test_a_run_folder_has_one_owner(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from backmix.train.checkpoint import locked\n"
        "try:\n    with locked(Path(sys.argv[1])): print('in')\n"
        "except ValueError as error: print(error)\n"
    )

    def second() -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={"PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()

    with locked(tmp_path):
        assert f"in use by process {os.getpid()}" in second()
    assert second() == "in"


HOLD = """
import errno, fcntl, os, sys, time
from pathlib import Path
from backmix.train.checkpoint import locked
def flock(file, how): raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
fcntl.flock = flock
with locked(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def without_locks(file: object, how: int) -> None:
    raise OSError(95, "Operation not supported")


def test_where_the_file_system_has_no_locks_a_lease_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.fcntl, "flock", without_locks)
    lock = tmp_path / "run.lock"

    def refused(holder: str) -> bool:
        with pytest.raises(ValueError, match=f"is in use by process {holder}: wait"):
            with locked(tmp_path):
                pass
        return is_locked(tmp_path)

    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env={"PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        assert refused(str(first.pid))
        first.kill()
        first.wait()
    assert not is_locked(tmp_path)  # its process is gone from this machine
    with locked(tmp_path):
        assert lock.read_text().split()[0] == str(os.getpid())
    assert lock.read_text() == ""

    lock.write_text("17 another-machine\n")
    assert refused("17 on another-machine")
    old = time.time() - 121
    os.utime(lock, (old, old))
    assert not is_locked(tmp_path)  # nobody has renewed it for two minutes
    with locked(tmp_path):
        assert is_locked(tmp_path)


def test_a_lease_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.fcntl, "flock", without_locks)
    monkeypatch.setattr(checkpoint, "_LEASE", 0.04)
    with locked(tmp_path):
        before = (tmp_path / "run.lock").stat().st_mtime_ns
        deadline = time.monotonic() + 60
        while (tmp_path / "run.lock").stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not is_locked(tmp_path)


def test_the_document_is_the_only_metadata(tmp_path: Path) -> None:
    """Several entries would be written in an order that differs from process to process."""
    save_tensors(tmp_path / "a", {"w": torch.arange(3)}, {"step": 1})
    data = (tmp_path / "a").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header["__metadata__"]) == {"backmix"}
