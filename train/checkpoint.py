"""Checkpoints: one safetensors file each, whole or not at all, checked when read.

A file holds named tensors and, as its single metadata entry, one JSON document with the integers
of the run and a checksum of every tensor. (One entry with sorted keys, because several are written
in an order that differs between processes; safetensors itself finds truncation, but no flipped
bit.) Nothing is ever unpickled.

The file is written from the tensors' own memory, tensor by tensor: safetensors' own `save` makes
two more copies of everything and keeps Python's interpreter for itself meanwhile, 1.2 seconds per
GiB as measured, in which no step of a training that goes on could be started.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash
from torch import Tensor

_CHUNK = 1 << 24
_PAUSE = "BACKMIX_TEST_WRITE_PAUSE"
"""Environment variable: seconds to wait, eight times in a file, so that a test can kill there."""
_LEASE = 120.0
"""Seconds after which a lease that was not renewed is taken over."""
_ROOM = 1.1
"""Free space that must be there before a file of tensors is begun, as a multiple of its size."""
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
"""Names of the dtypes in a safetensors header, in the order in which safetensors itself lays them
out, from the last to the first: the widest first, so that all are aligned."""


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable: without it a power failure may undo them."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int | None:
    """Return the bytes free where `folder` lies or will lie; None where nobody knows."""
    there = next((at for at in (folder, *folder.parents) if at.exists()), None)
    try:
        usage = shutil.disk_usage(there) if there else None
    except OSError:
        return None
    return usage.free if usage and usage.total else None  # some mounts say 0 of 0


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` as `write_parts` does."""
    parts = (data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK))
    write_parts(path, parts, len(data))


def write_parts(path: Path, parts: Iterable[bytes | memoryview], size: int) -> None:
    """Write parts beside `path`, make them durable, then rename: the old file or the new.

    Raises OSError naming the file, the bytes needed (`size`) and the bytes free, and leaves nothing
    behind.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            _write(file, parts, size)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):  # the folder may be gone, or not be written any more
            beside.unlink(missing_ok=True)
        raise _no_room(path, size, error.errno, error.strerror) from error
    sync_folder(path.parent)


def _write(file: Any, parts: Iterable[bytes | memoryview], size: int) -> None:
    pause = float(os.environ.get(_PAUSE, "0"))
    written = 0
    for part in parts:
        file.write(part)
        before, written = written, written + len(part)
        if pause and 8 * before // max(size, 1) != 8 * written // max(size, 1):
            file.flush()
            time.sleep(pause)


def _no_room(path: Path, size: int, number: int | None, why: str | None) -> OSError:
    free = free_bytes(path.parent)
    known = "" if free is None else f", {free:,} free"
    return OSError(number, f"cannot write {path}: {why} ({size:,} bytes needed{known})")


def _checksum(name: str, tensor: Tensor) -> str:
    """Return the xxh3-64 of a tensor's name, dtype, shape and bytes, as hex."""
    digest = xxhash.xxh3_64(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(_memory(tensor))
    return digest.hexdigest()


def _document_checksum(document: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(document, sort_keys=True).encode())


class HostCopies:
    """Copies of tensors in the host's memory, into the same buffers each time.

    Pinned where the tensors are a GPU's, so that the copies run at the bus's speed.
    """

    def __init__(self) -> None:
        """Begin without buffers."""
        self.buffers: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return contiguous copies; they hold until the next call, which writes over them.

        Args:
            tensors: on any device, any strides, of distinct storage or not.
        """
        copies = {}
        for name, value in tensors.items():
            buffer = self.buffers.get(name)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            copies[name] = buffer.copy_(value.detach(), non_blocking=True)
        for device in {value.device for value in tensors.values() if value.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self.buffers = copies
        return copies


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor of the host, without a copy."""
    flat = tensor.reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and a JSON document atomically; equal contents give equal bytes.

    Args:
        path: the file's final name.
        tensors: on any device, any strides, of distinct storage or not.
        meta: what `json` can write.
    """
    _write_tensors(path, HostCopies().take(tensors), meta)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    document: dict[str, Any] = {
        "meta": dict(meta),
        "sums": {name: _checksum(name, value) for name, value in tensors.items()},
    }
    document["sum"] = _document_checksum(document)
    write_safetensors(path, tensors, {"backmix": json.dumps(document, sort_keys=True)})


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file atomically, the same bytes for the same contents.

    Unlike safetensors' own `save`, which writes several entries of metadata in another order in
    every process.

    Args:
        path: the file's final name.
        tensors: contiguous, on the host.
        metadata: goes into the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    rank = {dtype: number for number, dtype in enumerate(_DTYPES)}
    names = sorted(tensors, key=lambda name: (-rank[tensors[name].dtype], name))
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    size = 8 + len(text) + end
    free = free_bytes(path.parent)
    if free is not None and free < _ROOM * size:
        raise _no_room(path, size, errno.ENOSPC, os.strerror(errno.ENOSPC))

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            yield _memory(tensors[name])

    write_parts(path, parts(), size)


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
    run: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of a step; only then delete those older than the last `keep`.

    Args:
        run: run folder.
        step: steps taken.
        tensors: contiguous, on the host (`HostCopies`).
        meta: what `json` can write.
        keep: at least 1.
    """
    path = checkpoint_path(run, step)
    if not path.parent.exists():
        path.parent.mkdir()
        sync_folder(run)
    _write_tensors(path, tensors, meta)
    for old in sorted(path.parent.glob("step-*.safetensors"))[:-keep]:
        old.unlink(missing_ok=True)
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
    path = run / "run.lock"
    try:
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:  # a file system without locks
                return _leased(path)
    except OSError:
        return False
    return False


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder alone; a second process is refused with the holder's number.

    The lock is the kernel's (flock): it vanishes with its process, however that ends. On a file
    system without locks it is a lease: the file names process and machine, and a thread renews its
    time; a lease that nobody has renewed for two minutes, or whose process is gone from this
    machine, is taken over.
    """
    path = run / "run.lock"
    with open(path, "a+") as file, ExitStack() as held:
        taken, has_locks = False, True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:
            taken, has_locks = _leased(path), False
        if taken:
            file.seek(0)
            pid, *host = file.read().split() or ["unknown"]
            where = f" on {host[0]}" if host and host[0] != os.uname().nodename else ""
            raise ValueError(f"{run} is in use by process {pid}{where}: wait for it, or stop it")
        file.truncate(0)
        file.write(f"{os.getpid()} {os.uname().nodename}\n")
        file.flush()
        if not has_locks:
            held.callback(file.truncate, 0)
            held.enter_context(_renewed(path))
        yield


def _leased(path: Path) -> bool:
    """Return whether the process that a lock file names still renews it."""
    pid, *host = path.read_text().split() or ["0"]
    if pid == "0" or time.time() - path.stat().st_mtime > _LEASE:
        return False
    return host != [os.uname().nodename] or Path(f"/proc/{pid}").exists()


@contextmanager
def _renewed(path: Path) -> Iterator[None]:
    """Renew the time of a lock file now and then."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(_LEASE / 4):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
