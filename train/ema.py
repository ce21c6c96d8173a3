"""A running mean of the weights (Polyak and Juditsky, 1992), which is what a run leaves behind.

Statistics of BatchNorm are averaged like weights, and not taken from the network as it is: weights
and statistics of different ages do not fit each other. Integers (the batches that BatchNorm has
counted) are copied.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from backmix.train.models.build import Model


class Ema:
    """mean <- decay mean + (1 - decay) weights, for all floating parameters and buffers."""

    def __init__(self, model: Model, decay: float, every: int = 1) -> None:
        """Begin with the weights as they are.

        Args:
            model: the network that is trained.
            decay: of one step, in (0, 1).
            every: steps between two updates, which then count for so many.
        """
        self.every = every
        self.rate = 1 - decay**every
        self.live = {
            name: value.detach()
            for name, value in model.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor)
        }
        self.mean = {name: value.clone() for name, value in self.live.items()}
        """By the names of the network's own `state_dict`."""
        names = [name for name, value in self.live.items() if value.is_floating_point()]
        self.floats = [self.mean[n] for n in names], [self.live[n] for n in names]

    def begin(self) -> None:
        """Begin anew with the weights as they are now."""
        for name, value in self.live.items():
            self.mean[name].copy_(value)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take `mean` back, as a checkpoint holds it; KeyError where a name is missing."""
        for name, value in self.mean.items():
            value.copy_(tensors[name])

    def step(self, step: int, alive: Tensor) -> None:
        """Take the weights in, if it is time.

        Args:
            step: how many have been taken, this one included.
            alive: float32 0-d, 1, or 0 in a void step, which changes nothing.
        """
        if step % self.every:
            return
        # A lerp whose weight is on the device: the host does not know whether the step was void.
        mean, live = self.floats
        moved = torch._foreach_sub(live, mean)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(moved, alive * self.rate)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_add_(mean, moved)  # type: ignore[reportPrivateImportUsage]
        for name, value in self.live.items():
            if not value.is_floating_point():
                self.mean[name].copy_(value)
