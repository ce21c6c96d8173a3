"""The processes that train one run together: who they are, and what they tell one another.

torchrun, or whoever else starts them, says in the environment who each is: RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT. A run that was started without is a world of one, in which
nothing here communicates. What the host must know travels between hosts (gloo), so that no device
is waited for; what is sent is JSON, or tensors as safetensors lays them out, and never unpickled.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from backmix.pipeline import draws
from backmix.pipeline.options import usable_cores

ORPHANED = 1000
"""What a process that has lost its launcher asks for in place of a signal's number."""
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_KEY = "backmix failed"
"""Under this name the first process that fails leaves word for the others."""
_LOOK = 1.0
"""Seconds between two looks for such word."""
_PATIENCE = 10.0
"""Seconds that a process has to end by itself once another one has failed."""
_MEETING = 600.0
"""Seconds that a process waits for the others to start."""
_HEARING = 3.0
"""Seconds that a process which fails waits for the others to take notice."""
_ASK = 1.0
"""Seconds between two agreements about stopping, by the first process's clock."""
_DROPOUT = 254
"""Number of the stream of draws that seeds dropout, beside `pipeline.draws.STREAMS`."""


class EndedByAnother(SystemExit):
    """This process ends because another one failed, and that one has said why: exit code 1."""


class SaidError(ValueError):
    """Why this process ends, which the others have been told."""


class LostError(SaidError):
    """Another process is gone without a word; the run can go on from its last checkpoint."""


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process on its machine, and of the GPU that it uses."""
    local_size: int = 1
    """Processes on this machine, as far as the launcher says."""
    hosts: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    """The group in which the hosts talk; None in a world of one."""
    store: Store | None = field(default=None, compare=False, repr=False)
    heard: list[tuple[str, bool]] = field(default_factory=list, compare=False, repr=False)
    """The word that another process has left, once it was read."""

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder and speaks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier(group=self.hosts)

    def gathered(self, value: Any) -> list[Any]:
        """Return what every process gave, by rank; anything that `json` can write."""
        if self.size == 1:
            return [value]
        return [json.loads(data) for data in self._gathered_bytes(json.dumps(value).encode())]

    def of_first(self, value: Any) -> Any:
        """Return what the first process gave; anything that `json` can write."""
        if self.size == 1:
            return value
        return json.loads(self._sent_bytes(json.dumps(value).encode() if self.first else b""))

    def gathered_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return what every process gave, by rank, on the host; for small tensors."""
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        if self.size == 1:
            return [plain]
        return [
            safetensors.torch.load(data)
            for data in self._gathered_bytes(safetensors.torch.save(plain))
        ]

    def tensors_of_first(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Return the tensors of the first process, on the host; None where it has none."""
        if self.size == 1:
            return None if tensors is None else dict(tensors)
        named = None
        if self.first and tensors is not None:
            named = {n: [str(t.dtype), list(t.shape)] for n, t in tensors.items()}
        named = self.of_first(named)
        if named is None:
            return None
        received = {}
        for name, (dtype, shape) in named.items():
            if self.first:
                assert tensors is not None
                value = tensors[name].detach().cpu().contiguous()
            else:
                value = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            if value.numel():
                dist.broadcast(value.view(-1).view(torch.uint8), 0, group=self.hosts)
            received[name] = value
        return received

    def summed(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes of some figures that the hosts know, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.hosts)
        return total.tolist()

    def greatest(self, values: Sequence[int]) -> list[int]:
        """Return the greatest over all processes of each of some integers."""
        if self.size == 1:
            return list(values)
        most = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.hosts)
        return most.tolist()

    def average_buffers(self, model: nn.Module, weight: float) -> int:
        """Make the buffers of a network the same everywhere: the mean over all processes.

        Those of the running statistics, in truth; the mean is taken in float64, so buffers that are
        equal everywhere keep their bits. Integers are rounded. Call it in every step, from buffers
        that were equal before it.

        Args:
            model: the network.
            weight: of this process; the sum over all is 1. Of weight 0 nothing is taken, NaN
                included.

        Returns the bytes that were reduced.
        """
        buffers = [buffer for buffer in model.buffers() if buffer.numel()]
        if self.size == 1 or not buffers:
            return 0
        flat = torch.cat([buffer.reshape(-1).double() for buffer in buffers])
        flat = flat * weight if weight else torch.zeros_like(flat)
        dist.all_reduce(flat)
        for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            if not buffer.is_floating_point():
                mean = mean.round()
            buffer.copy_(mean.view_as(buffer))
        return flat.nbytes

    def explain(self, error: Exception) -> BaseException:
        """Return what this process is to end with, now that it cannot go on.

        Of several processes that fail together one speaks: the first that failed, whose connections
        the others miss.

        Returns the error itself, which names the process, where this is the one that speaks;
        `EndedByAnother` where another one does; `LostError` where one is gone without a word.
        """
        if self.size == 1 or isinstance(error, SaidError):
            return error
        lost = _is_lost_connection(error)
        if lost:
            if self.word(_HEARING)[0]:
                return EndedByAnother(1)
            error = LostError(
                "the connection to another process of this run is lost: it was killed, or its "
                "machine is gone; the same command continues"
            )
        mine = str(error) if lost else f"process {self.rank} of {self.size}: {error}"
        if self.heard or not self.tell(mine, lost):
            return EndedByAnother(1)
        if lost or not isinstance(error, ValueError | OSError):
            return error
        return SaidError(mine)

    def tell(self, why: str, lost: bool = False) -> bool:
        """Leave word why this process ends; returns whether it was the first to do so.

        Args:
            why: for people.
            lost: whether it only misses another one.
        """
        if self.store is None:
            return True
        word = json.dumps([self.rank, why, lost])
        try:
            return self.store.compare_set(_KEY, "", word).decode() == word
        except (RuntimeError, ValueError):  # the store has gone with its launcher
            return True

    def word(self, seconds: float = 0.0) -> tuple[str, bool]:
        """Return why the first process that failed did, and whether it only missed another one.

        Nothing where none has failed, after waiting for it a while.
        """
        end = time.monotonic() + seconds
        while self.store is not None:
            if self.heard:
                return self.heard[0]
            try:
                if self.store.check([_KEY]):
                    _, why, lost = json.loads(self.store.get(_KEY))
                    self.heard.append((why, lost))
                    self.store.set(f"{_KEY}: heard by {self.rank}", "")
                    return why, lost
            except (RuntimeError, ValueError):
                break
            if time.monotonic() >= end:
                break
            time.sleep(0.1)
        return "", False

    def wait_until_heard(self) -> None:
        """Wait a moment, where this process has left word, until the others have read it.

        Without a launcher that keeps it the word is gone with the first process.
        """
        others = [f"{_KEY}: heard by {rank}" for rank in range(self.size) if rank != self.rank]
        end = time.monotonic() + _HEARING
        with contextlib.suppress(RuntimeError, ValueError):
            if self.store is None or not self.store.check([_KEY]):
                return
            rank, _, lost = json.loads(self.store.get(_KEY))
            if rank != self.rank or lost:  # the others miss the same one
                return
            while not self.store.check(others) and time.monotonic() < end:
                time.sleep(0.05)

    def _gathered_bytes(self, data: bytes) -> list[bytes]:
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self.hosts)
        longest = max(int(length) for length in lengths)
        padded = torch.from_numpy(np.frombuffer(data.ljust(longest, b"\0"), np.uint8).copy())
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.hosts)
        return [
            part.numpy().tobytes()[: int(length)]
            for part, length in zip(parts, lengths, strict=True)
        ]

    def _sent_bytes(self, data: bytes) -> bytes:
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0, group=self.hosts)
        value = torch.zeros(int(length), dtype=torch.uint8)
        if self.first:
            value = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        if len(value):
            dist.broadcast(value, 0, group=self.hosts)
        return value.numpy().tobytes()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_lost_connection(error: Exception) -> bool:
    """Return whether an error is torch's word for another process that does not answer."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "onnection", "Broken pipe", "imed out", "Socket")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def is_launched() -> bool:
    """Return whether a launcher started this process and says in the environment who it is."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def under_torchrun() -> bool:
    """Return whether torchrun started this process, for which any exit code but 0 is a failure."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined(
    kind: str, last_words: Callable[[str, bool], None] = lambda why, lost: None
) -> Iterator[World]:
    """Join the processes that the environment speaks of; a world of one where it names none.

    Leaving it waits for all, so that nobody misses anybody's connections. With an exception nobody
    is waited for: the others are told and end, within seconds, whatever they wait for.

    Args:
        kind: cpu or cuda.
        last_words: called with why another process failed, and whether that only missed a lost one,
            where this one cannot be brought to end by itself and is ended.

    Raises:
        ValueError: the environment makes no sense, or the others cannot be reached.
        EndedByAnother: in place of this process's own error, where another one spoke first.
    """
    world, ours = _join(kind)
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(world, over, last_words), daemon=True)
    if world.size > 1:
        watch.start()
    try:
        yield world
        world.barrier()
    except KeyboardInterrupt:
        world.tell("interrupted")
        world.wait_until_heard()
        raise
    except Exception as error:
        explained = world.explain(error)
        world.wait_until_heard()
        if explained is error:
            raise
        raise explained from error
    finally:
        over.set()
        if world.size > 1:
            watch.join()
            if ours:
                with contextlib.suppress(RuntimeError, ValueError):
                    dist.destroy_process_group()


def _watch(world: World, over: threading.Event, last_words: Callable[[str, bool], None]) -> None:
    """End this process where another one has failed and this one waits for it in vain."""
    while not over.wait(_LOOK):
        why, lost = world.word()
        if why:
            if over.wait(_PATIENCE):
                return
            if world.first:
                with contextlib.suppress(OSError):
                    last_words(why, lost)
            os._exit(1)


def _join(kind: str) -> tuple[World, bool]:
    """Return the world, and whether its groups are ours to end."""
    if not is_launched():
        return World(), False
    rank, size, local_rank, local_size = _place()
    if size == 1:
        return World(local_rank=gpu(local_rank) if kind == "cuda" else local_rank), False
    if kind == "cuda":
        local_rank = gpu(local_rank)
        torch.cuda.set_device(local_rank)
    ours = not dist.is_initialized()  # Ray Train has joined already
    try:
        if ours:
            store, _, _ = next(rendezvous("env://"))
            store = _fresh(store, rank, size)
            dist.init_process_group(
                "nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=size
            )
        else:
            store = _fresh(dist.distributed_c10d._get_default_store(), rank, size)
        hosts = dist.new_group(backend="gloo")
        assert isinstance(hosts, dist.ProcessGroup)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"process {rank} of {size} cannot reach the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {_first_line(error)}"
        ) from error
    return World(rank, size, local_rank, local_size, hosts, store), ours


def _fresh(store: Store, rank: int, size: int) -> Store:
    """Return a corner of a store that nobody has written to before.

    torchrun keeps one store over all restarts, with what processes that are gone by now have left
    in it, their addresses among them (torch 2.13). So the first process makes up a name, and all
    the others answer to it with one of their own, until they find that in its reply.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        answers = [f"backmix/{mine}/{other}" for other in range(1, size)]
        store.set("backmix/name", mine)
        _wait_for(lambda: store.check(answers))
        heard = [store.get(answer).decode() for answer in answers]
        store.set(f"backmix/{mine}", json.dumps([mine, *heard]))
        return PrefixStore(f"backmix/{mine}", store)
    found = ""

    def replied() -> bool:
        nonlocal found
        if not store.check(["backmix/name"]):
            return False
        found = store.get("backmix/name").decode()
        store.set(f"backmix/{found}/{rank}", mine)
        reply = f"backmix/{found}"
        # An earlier first process may have left a name, and a reply to others.
        return store.check([reply]) and mine in json.loads(store.get(reply))

    _wait_for(replied)
    return PrefixStore(f"backmix/{found}", store)


def _wait_for(met: Callable[[], bool]) -> None:
    end = time.monotonic() + _MEETING
    while not met():
        if time.monotonic() > end:
            raise RuntimeError(f"not all of them came within {_MEETING:.0f} s")
        time.sleep(0.05)


def _place() -> tuple[int, int, int, int]:
    """Return rank, size, local rank and local size as the environment says them."""
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing and not dist.is_initialized() and os.environ["WORLD_SIZE"] != "1":
        raise ValueError(
            f"the environment says RANK {os.environ['RANK']}, but not {', '.join(missing)}: "
            "several processes are started by torchrun"
        )
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError as error:
        raise ValueError(
            f"RANK, WORLD_SIZE and LOCAL_RANK in the environment must be numbers: {error}"
        ) from error
    if not 0 <= rank < size or local_rank < 0 or local_size < 1:
        raise ValueError(f"the environment says RANK {rank} of WORLD_SIZE {size}")
    return rank, size, local_rank, local_size


def gpu(local_rank: int) -> int:
    """Return the number of the GPU of a process; Slurm may show each its own one alone."""
    count = torch.cuda.device_count()
    if local_rank < count:
        return local_rank
    if count == 1 and "SLURM_PROCID" in os.environ:
        return 0
    raise ValueError(
        f"process {local_rank} of this machine has no GPU: there are {count}; --nproc-per-node "
        f"{count}"
    )


def cores(world: World) -> int:
    """Return how many cores are this process's share of its machine."""
    return max(1, usable_cores() // world.local_size)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return what seeds a process's dropout: another stream for each seed, step and rank."""
    counter = np.array([step & 0xFFFFFFFF, _DROPOUT << 24, rank, step >> 32], np.uint32)
    word = draws.philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return int(word[0]) << 32 | int(word[1])


def spread(forward: nn.Module, unused: bool) -> DistributedDataParallel:
    """Let the gradients of a forward pass be averaged over all processes.

    Buffers are not sent around: `World.average_buffers` does better.

    Args:
        forward: whose parameters are equal everywhere.
        unused: whether a step may leave parameters without a gradient, which costs a walk through
            the graph in each.
    """
    spread = DistributedDataParallel(
        forward, find_unused_parameters=unused, gradient_as_bucket_view=True
    )
    spread.broadcast_buffers = False  # as an argument it is deprecated from torch 2.13 on
    return spread


def refuse_too_many(world: World, batch: int, group: int) -> str:
    """Refuse more processes than a step has mix groups, which are dealt whole.

    Args:
        world: this process among the others.
        batch: images per step.
        group: images per mix group.

    Returns what is to be said where the groups are not dealt evenly, or nothing.

    Raises:
        ValueError: with the numbers that are allowed.
    """
    groups = batch // group
    if world.size > groups:
        smaller = [g for g in range(1, group) if batch % g == 0 and batch // g >= world.size]
        other = f"; a fresh run can have --loader.group {max(smaller)}" if smaller else ""
        raise ValueError(
            f"--loader.batch {batch} has {groups} mix groups of {group} images, which are dealt "
            f"whole: {world.size} processes are too many, 1 to {groups} can share them{other}"
        )
    if groups % world.size == 0:
        return ""
    even = ", ".join(str(size) for size in range(1, groups + 1) if groups % size == 0)
    return (
        f"{groups} mix groups of {group} images over {world.size} processes: some wait for the "
        f"others in every step; {even} processes share them evenly"
    )


class Agreement:
    """What all processes do after a step: stop, save, or go on, all of them the same.

    They agree about once a second, at steps that the first one's clock foresees.
    """

    def __init__(self, world: World, step: int) -> None:
        """Begin to count at a step; the agreement after the next one is the first."""
        self.world = world
        self.parent = os.getppid() if is_launched() else None
        self.next = step + 1
        self.asked, self.at, self.ahead = step, time.monotonic(), 1

    def now(self, step: int, signal: int, due: bool) -> tuple[int, bool]:
        """Return the signal that one of the processes was sent, and whether a checkpoint is due.

        Args:
            step: steps taken; the same for all.
            signal: that this process was sent, 0 = none.
            due: whether this process thinks that a checkpoint is due: the first one decides.

        A process whose launcher is gone has `ORPHANED` for a signal.
        """
        if self.parent is not None and os.getppid() != self.parent:
            signal = signal or ORPHANED
        if self.world.size == 1:
            return signal, due
        if step < self.next:
            return 0, False
        first = self.world.first
        signal, saves, ahead = self.world.greatest(
            [signal, first and due, self._ahead(step) if first else 0]
        )
        self.next = step + ahead
        return signal, bool(saves)

    def _ahead(self, step: int) -> int:
        """Return the steps to the next agreement; at most twice those to this one."""
        now = time.monotonic()
        rate = max(step - self.asked, 1) / max(now - self.at, 1e-6)
        self.ahead = max(1, min(2 * self.ahead, int(rate * _ASK)))
        self.asked, self.at = step, now
        return self.ahead
