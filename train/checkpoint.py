"""Checkpoints: one safetensors file each, whole or not at all, checked when read.

A file holds named tensors and, as its single metadata entry, one JSON document with the integers
of the run and a checksum of every tensor. (One entry with sorted keys, because several are written
in an order that differs between processes; safetensors itself finds truncation, but no flipped
bit.) Nothing is ever unpickled.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import xxhash
from torch import Tensor

KEEP = 2
"""Checkpoints kept in a run folder: a damaged one must not be the only one."""
_CHUNK = 1 << 24
_PAUSE = "BACKMIX_TEST_WRITE_PAUSE"
"""Environment variable: seconds to wait between chunks, so that a test can kill inside a write."""


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable: without it a power failure may undo them."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` as `write_parts` does."""
    pause = float(os.environ.get(_PAUSE, "0"))
    chunk = max(1, len(data) // 8) if pause else _CHUNK
    parts = (data[start : start + chunk] for start in range(0, len(data), chunk))
    write_parts(path, parts, len(data))


def write_parts(path: Path, parts: Iterable[bytes | memoryview], size: int) -> None:
    """Write parts beside `path`, make them durable, then rename: the old file or the new.

    Raises OSError naming the file, the bytes needed (`size`) and the bytes free, and leaves nothing
    behind.
    """
    beside = path.with_name(path.name + ".tmp")
    pause = float(os.environ.get(_PAUSE, "0"))
    try:
        with open(beside, "wb") as file:
            for part in parts:
                file.write(part)
                if pause:
                    file.flush()
                    time.sleep(pause)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno,
            f"cannot write {path}: {error.strerror} ({size:,} bytes needed, {free:,} free)",
        ) from error
    sync_folder(path.parent)


def _checksum(name: str, tensor: Tensor) -> str:
    """Return the xxh3-64 of a tensor's name, dtype, shape and bytes, as hex."""
    digest = xxhash.xxh3_64(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _document_checksum(document: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(document, sort_keys=True).encode())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and a JSON document atomically; equal contents give equal bytes.

    Args:
        path: the file's final name.
        tensors: on any device, any strides, of distinct storage or not.
        meta: what `json` can write.
    """
    plain = {name: value.detach().to("cpu").contiguous().clone() for name, value in tensors.items()}
    document: dict[str, Any] = {
        "meta": dict(meta),
        "sums": {name: _checksum(name, value) for name, value in plain.items()},
    }
    document["sum"] = _document_checksum(document)
    text = json.dumps(document, sort_keys=True)
    write_atomically(path, safetensors.torch.save(plain, {"backmix": text}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_tensors`; any damage is a ValueError naming file and place."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {})["backmix"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        found = document.pop("sum")
        sums = document["sums"]
        meta = document["meta"]
    except OSError:
        raise
    except Exception as error:  # safetensors and json raise types of their own
        raise ValueError(f"{path} is damaged or no file of backmix: {error}") from error
    if found != _document_checksum(document) or set(sums) != set(tensors):
        raise ValueError(f"{path} is damaged: its metadata does not match their checksum")
    for name, tensor in tensors.items():
        if _checksum(name, tensor) != sums[name]:
            raise ValueError(f"{path} is damaged: tensor {name} does not match its checksum")
    return tensors, meta


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the name of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}.safetensors"


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> Path:
    """Write the checkpoint of a step; only then delete those older than the last `KEEP`."""
    path = checkpoint_path(run, step)
    if not path.parent.exists():
        path.parent.mkdir()
        sync_folder(run)
    save_tensors(path, tensors, meta)
    for old in sorted(path.parent.glob("step-*.safetensors"))[:-KEEP]:
        old.unlink()
    return path


def newest_checkpoint(
    run: Path,
) -> tuple[tuple[dict[str, Tensor], dict[str, Any]] | None, list[str]]:
    """Return the newest checkpoint that verifies, or None, and what is to be said of the others.

    Left-over `.tmp` files are removed, and damaged files set aside under another name, so that they
    do not count among the kept ones: call it only while holding the run's lock.

    Raises:
        ValueError: there are checkpoints, and none of them verifies.
    """
    folder = run / "checkpoints"
    said: list[str] = []
    for torn in folder.glob("*.tmp"):
        torn.unlink()
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            return load_tensors(path), said
        except ValueError as error:
            path.rename(path.with_name(path.name + ".damaged"))
            said.append(f"{error}; it was set aside, falling back to the one before")
    if said:
        raise ValueError(
            f"no checkpoint of {run} can be read: {said[-1]}. To begin anew, remove {folder}."
        )
    return None, said


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 where there is nothing to continue from."""
    names = [path.name for path in (run / "checkpoints").glob("step-*.safetensors")]
    return int(max(names).removeprefix("step-").split(".")[0]) if names else 0


def is_locked(run: Path) -> bool:
    """Return whether a process holds the run folder."""
    try:
        with open(run / "run.lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder alone; a second process is refused with the holder's number.

    The lock is the kernel's (flock): it vanishes with its process, however that ends.
    """
    path = run / "run.lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ValueError(
                f"{run} is in use by process {holder}: wait for it, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
