"""`State`: every tensor and integer that a run's future depends on, saved and loaded by name."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backmix.pipeline.batch import Place
from backmix.train.ema import Ema
from backmix.train.exchange import Exchange
from backmix.train.forward import Forward, ForwardPass
from backmix.train.methods.method import Method
from backmix.train.models.build import Model
from backmix.train.world import World, dropout_seed

RING = 64
"""How many sample numbers of the first void step are kept to be named."""


@dataclass
class Meters:
    """Sums on the device, float64, fetched by one copy."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    stays: bool = False
    """Whether the sums always are the same tensors, which begin anew at 0."""

    def add(self, **values: Tensor) -> None:
        """Add 0-d tensors to the sums of their names."""
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), dtype=torch.float64, device=value.device)
            self.sums[name] += value

    def take(self, world: World | None = None) -> dict[str, float]:
        """Return all sums, over all processes, and start anew; the host waits for the device."""
        if not self.sums:
            return {}
        names = sorted(self.sums) if world else list(self.sums)
        fetched = torch.stack([self.sums[name] for name in names]).tolist()
        if self.stays:
            for value in self.sums.values():
                value.zero_()
        else:
            self.sums = {}
        return dict(zip(names, world.summed(fetched) if world else fetched, strict=True))


@dataclass
class State:
    """A run between two steps."""

    model: Model
    optimizer: torch.optim.Optimizer
    method: Method
    place: Place
    step: int = 0
    interval: Meters = field(default_factory=Meters)
    """Since the last row of log.jsonl."""
    epoch: Meters = field(default_factory=Meters)
    """Since the last row of summary.csv."""
    void_steps: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    """Steps that were not taken because a gradient was not finite, since the last log row."""
    void_samples: Tensor = field(default_factory=lambda: torch.full((RING,), -1))
    """Samples with a non-finite loss in the first of them, -1 = none."""
    void_rows: int = 0
    """Log rows in succession that had void steps."""
    safe_buffers: list[Tensor] = field(default_factory=list)
    """Copies of the model's buffers as the last good step left them."""
    forward: ForwardPass = field(init=False)
    """`Forward` of model and method, or what wraps it; the loop calls nothing else."""
    ema: Ema | None = None
    """Running mean of the weights."""
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    """Within it a backward pass keeps its gradients to this process."""
    world: World = field(default_factory=World)
    """The processes that train together. All but the meters, the samples of a void step and the
    generators of dropout is equal in all of them; the meters are sums over all."""
    exchange: Exchange | None = None
    """How rows of a bank reach the other processes."""
    traffic: dict[str, int] = field(default_factory=dict)
    """Bytes that went between the processes since the epoch began, by what they were."""

    def __post_init__(self) -> None:
        """Let the loop call the network as it is; others may wrap it."""
        self.forward = Forward(self.model, self.method)

    def keep_buffers(self) -> None:
        """Remember the model's buffers; a void step takes them back."""
        self.safe_buffers = [buffer.clone() for buffer in self.model.buffers()]

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that a run is judged by, under the network's names."""
        return dict(self.model.state_dict() if self.ema is None else self.ema.mean)

    def exchanged(self) -> dict[str, int]:
        """Return what this process sent to others since the last call, by kind, and begin anew.

        Bytes of gradients and buffers that were averaged, and of the bank's rows that came.
        """
        if self.exchange is not None:
            self.traffic["bank_bytes"] = self.exchange.received
            self.exchange.received = 0
        traffic, self.traffic = self.traffic, {}
        return traffic

    def take_void_samples(self) -> list[int]:
        """Return the sample numbers of the first void step, those of all processes, and forget."""
        lists = self.world.gathered(self.void_samples.tolist())
        self.void_samples.fill_(-1)
        return sorted({n for numbers in lists for n in numbers if n >= 0}, reverse=True)[:RING]

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint holds, by name; all processes call it together.

        What differs between them stands there once for each: the first one's under its own name,
        that of process 2 after `rank2.`, and so on.
        """
        if self.exchange is not None:
            self.exchange.settle()
        named = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                named[f"optimizer.{name}.{slot}"] = value
        named |= {f"method.{name}": value for name, value in self.method.tensors().items()}
        if self.ema is not None:
            named |= {f"ema.{name}": value for name, value in self.ema.mean.items()}
        named["void_steps"] = self.void_steps
        for rank, own in enumerate(self.world.gathered_tensors(self._own_tensors())):
            prefix = f"rank{rank}." if rank else ""
            named |= {prefix + name: value for name, value in own.items()}
        return named

    def _own_tensors(self) -> dict[str, Tensor]:
        """Return what is this process's own."""
        named = {"void_samples": self.void_samples, "generator.cpu": torch.get_rng_state()}
        for meters, label in ((self.interval, "interval"), (self.epoch, "epoch")):
            named |= {f"{label}.{name}": value for name, value in meters.sums.items()}
        device = self.void_steps.device
        if device.type == "cuda":
            named["generator.cuda"] = torch.cuda.get_rng_state(device)
        return named

    def meta(self) -> dict[str, Any]:
        """Return the integers that a checkpoint holds."""
        place = self.place
        return {
            "step": self.step,
            "void_rows": self.void_rows,
            "processes": self.world.size,
            "place": {"seed": place.seed, "epoch": place.epoch, "consumed": place.consumed},
        }

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Take back what `tensors` and `meta` returned; nothing of the fresh state remains.

        Raises:
            ValueError: the tensors are not those of this model and method.
        """
        device = self.void_steps.device
        try:
            self.model.load_state_dict(_under(tensors, "model."))
            self._load_optimizer(_under(tensors, "optimizer."))
            self.method.load(_under(tensors, "method."))
            if self.ema is not None:
                self.ema.load(_under(tensors, "ema."))
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"the checkpoint belongs to another model or method: {error}"
            ) from error
        self.void_steps.copy_(tensors["void_steps"])
        self.step = int(meta["step"])
        self.void_rows = int(meta["void_rows"])
        self.place = Place(**meta["place"])
        self.keep_buffers()
        processes = int(meta.get("processes", 1))
        every = [tensors, *(_under(tensors, f"rank{rank}.") for rank in range(1, processes))]
        rank = self.world.rank
        if processes == self.world.size:
            self._load_own(every[rank])
            torch.set_rng_state(every[rank]["generator.cpu"])
            if device.type == "cuda" and "generator.cuda" in every[rank]:
                torch.cuda.set_rng_state(every[rank]["generator.cuda"], device)
        else:
            self._load_own(_merged(every) if self.world.first else _nothing(every))
            torch.manual_seed(dropout_seed(self.place.seed, self.step, rank))

    def _load_own(self, own: Mapping[str, Tensor]) -> None:
        """Take back the meters and the samples of a void step."""
        device = self.void_steps.device
        for meters, label in ((self.interval, "interval."), (self.epoch, "epoch.")):
            meters.sums = {n: value.to(device) for n, value in _under(own, label).items()}
        self.void_samples.copy_(own["void_samples"])

    def _load_optimizer(self, slots: Mapping[str, Tensor]) -> None:
        """Fill the optimizer's state in place of its parameters' memory format."""
        parameters = dict(self.model.named_parameters())
        for key, value in slots.items():
            name, slot = key.rsplit(".", 1)
            parameter = parameters[name]
            if value.ndim == 0:
                self.optimizer.state[parameter][slot] = value.to(parameter.device)
            else:
                self.optimizer.state[parameter][slot] = torch.zeros_like(parameter).copy_(value)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _merged(every: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return what several processes had of their own as that of one."""
    numbers = torch.cat([own["void_samples"] for own in every]).sort(descending=True).values
    merged = {"void_samples": numbers[:RING]}
    for own in every:
        for name in own:
            if name.startswith(("interval.", "epoch.")):
                merged[name] = merged.get(name, torch.zeros_like(own[name])) + own[name]
    return merged


def _nothing(every: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the own things of a process that has done nothing yet; of the same names."""
    nothing = {name: torch.zeros_like(value) for name, value in _merged(every).items()}
    return nothing | {"void_samples": torch.full((RING,), -1)}
