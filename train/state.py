"""`State`: every tensor and integer that a run's future depends on, saved and loaded by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backmix.pipeline.batch import Place
from backmix.train.methods.method import Method
from backmix.train.models.build import Model

RING = 64
"""How many sample numbers of the first void step are kept to be named."""


@dataclass
class Meters:
    """Sums on the device, float64, fetched by one copy."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        """Add 0-d tensors to the sums of their names."""
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), dtype=torch.float64, device=value.device)
            self.sums[name] += value

    def take(self) -> dict[str, float]:
        """Return all sums and start anew; the host waits for the device."""
        if not self.sums:
            return {}
        fetched = torch.stack(list(self.sums.values())).tolist()
        result = dict(zip(self.sums, fetched, strict=True))
        self.sums = {}
        return result


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

    def keep_buffers(self) -> None:
        """Remember the model's buffers; a void step takes them back."""
        self.safe_buffers = [buffer.clone() for buffer in self.model.buffers()]

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint holds, by name."""
        named = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                named[f"optimizer.{name}.{slot}"] = value
        named |= {f"method.{name}": value for name, value in self.method.tensors().items()}
        for meters, label in ((self.interval, "interval"), (self.epoch, "epoch")):
            named |= {f"{label}.{name}": value for name, value in meters.sums.items()}
        named |= {"void_steps": self.void_steps, "void_samples": self.void_samples}
        named["generator.cpu"] = torch.get_rng_state()
        if self.void_steps.device.type == "cuda":
            named["generator.cuda"] = torch.cuda.get_rng_state()
        return named

    def meta(self) -> dict[str, Any]:
        """Return the integers that a checkpoint holds."""
        place = self.place
        return {
            "step": self.step,
            "void_rows": self.void_rows,
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
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"the checkpoint belongs to another model or method: {error}"
            ) from error
        for meters, label in ((self.interval, "interval."), (self.epoch, "epoch.")):
            meters.sums = {n: value.to(device) for n, value in _under(tensors, label).items()}
        self.void_steps.copy_(tensors["void_steps"])
        self.void_samples.copy_(tensors["void_samples"])
        torch.set_rng_state(tensors["generator.cpu"])
        if device.type == "cuda" and "generator.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["generator.cuda"])
        self.step = int(meta["step"])
        self.void_rows = int(meta["void_rows"])
        self.place = Place(**meta["place"])
        self.keep_buffers()

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
