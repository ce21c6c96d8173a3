"""How fast a pass over images goes, and what held it up: the loader or the network."""

import time
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Some = TypeVar("Some", bound=Sized)
Moment = float | torch.cuda.Event
"""A point of a device's queue: seconds of the host's clock on a CPU, an event on a GPU."""


def moment(device: torch.device) -> Moment:
    """Return the point up to which the device has been given work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: Moment, end: Moment) -> float:
    """Return the seconds of the device between two points; both must have been reached."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1e3
    assert not isinstance(begin, torch.cuda.Event) and not isinstance(end, torch.cuda.Event)
    return end - begin


@dataclass
class Pace:
    """One pass over one set of images: how many, and where its time went."""

    name: str
    """Of the set."""
    images: int = 0
    seconds: float = 0.0
    """Of the whole pass, its start included."""
    waited: float = 0.0
    """Seconds in which the host waited for the next batch."""
    decoding: float = 0.0
    """Seconds in which decoding threads were at work, all threads together."""
    threads: int = 1
    """Threads that decode."""
    computing: float = 0.0
    """Seconds in which the device had a batch to compute."""
    began: float = field(default_factory=time.perf_counter)

    @property
    def rates(self) -> dict[str, float]:
        """Return images a second: of the pass, and as the loader and the network alone would go.

        A loader alone has all its threads at work all the time; a network alone always has the next
        batch. Both are timed beside one another: where they share cores, each is faster alone.
        """
        return {
            "images_per_s": self.images / max(self.seconds, 1e-9),
            "loader_images_per_s": self.images * self.threads / max(self.decoding, 1e-9),
            "network_images_per_s": self.images / max(self.computing, 1e-9),
        }

    @property
    def row(self) -> dict[str, object]:
        """Return what time.jsonl says of the pass; `waiting` is a share of its seconds."""
        return {
            "seconds": round(self.seconds, 3),
            "event": "evaluate",
            "set": self.name,
            "images": self.images,
            **{name: round(rate, 1) for name, rate in self.rates.items()},
            "waiting": round(self.waited / max(self.seconds, 1e-9), 3),
        }

    def arriving(self, batches: Iterator[Some]) -> Iterator[Some]:
        """Yield batches, counting their images and the seconds until each was there."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self.images += len(batch)
            yield batch

    def end(self) -> None:
        """Note that the pass is over."""
        self.seconds = time.perf_counter() - self.began

    def __str__(self) -> str:
        """Return it as a line for a terminal."""
        whole, loader, network = self.rates.values()
        waiting = self.waited / max(self.seconds, 1e-9)
        return (
            f"{self.name}: {self.images:,} images in {self.seconds:,.1f} s, {whole:,.0f} a second "
            f"(the loader can deliver {loader:,.0f}, the network takes {network:,.0f}); "
            f"{waiting:.0%} of the time went into waiting for images"
        )


class OnTheirWay:
    """Tensors of a device that are being copied to the host.

    On a GPU the copies are queued behind the work that makes the tensors, into pinned memory, and
    nobody waits before `arrays`: asked for a batch later, they are there, and the device has had
    work meanwhile.
    """

    def __init__(self, tensors: Mapping[str, Tensor], begin: Moment, device: torch.device) -> None:
        """Begin to copy.

        Args:
            tensors: on the device or on the host.
            begin: where the work on them began.
            device: computes them.
        """
        self._begin, self._computed = begin, moment(device)
        self._tensors = {name: _begin_copy(tensor) for name, tensor in tensors.items()}
        self._copied = moment(device)

    def arrays(self) -> tuple[dict[str, np.ndarray], float]:
        """Return them, and the seconds that the device took to make them; waits for the copies."""
        if isinstance(self._copied, torch.cuda.Event):
            self._copied.synchronize()
        seconds = seconds_between(self._begin, self._computed)
        return {name: tensor.numpy() for name, tensor in self._tensors.items()}, seconds


def _begin_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
