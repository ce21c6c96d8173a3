"""Functions run in several processes at once that train together, for the tests."""

import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

SECONDS = 90.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["backmix.train.run", "torch._dynamo", "tests.runs"])


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun says to a process of one machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _one(
    rank: int, size: int, port: int, found: Any, work: Callable[..., Any], arguments: tuple
) -> None:
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= environment(rank, size, port)
    try:
        found.put((rank, True, work(*arguments)))
    except BaseException as error:
        found.put((rank, False, f"{type(error).__name__}: {error}"))
        if not isinstance(error, SystemExit | ValueError):
            traceback.print_exc()
        raise SystemExit(1) from error


def begin(size: int, work: Callable[..., Any], *arguments: Any) -> tuple[list[BaseProcess], Any]:
    """Start `work` in so many processes; returns them and the queue of what they return."""
    found, port = _CONTEXT.Queue(), free_port()
    processes = [
        _CONTEXT.Process(target=_one, args=(rank, size, port, found, work, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return list(processes), found


def outcomes(size: int, work: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
    """Return by rank whether `work` returned, and what, or with what it ended."""
    processes, found = begin(size, work, *arguments)
    by_rank: dict[int, tuple[bool, Any]] = {}
    try:
        while len(by_rank) < size:
            rank, good, value = found.get(timeout=SECONDS)
            by_rank[rank] = (good, value)
        for process in processes:
            process.join(SECONDS)
            assert process.exitcode in (0, 1), process.exitcode
    except queue.Empty:
        raise AssertionError(f"only the processes {sorted(by_rank)} came to an end") from None
    finally:
        for process in processes:
            process.kill()
    return [by_rank[rank] for rank in range(size)]


def together(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work` returns, by rank; none of them may fail."""
    ended = outcomes(size, work, *arguments)
    assert all(good for good, _ in ended), ended
    return [value for _, value in ended]
