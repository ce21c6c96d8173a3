"""What the loop asks of a training method; the methods satisfy it without inheriting anything."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from backmix.pipeline.batch import Batch
from backmix.train.models.build import Model


@dataclass
class Out:
    """What a method's loss returns; everything stays on the device."""

    loss: Tensor
    """0-d, what backward starts from."""
    logits: Tensor
    """float [n, K] of the trained views."""
    features: Tensor
    """float [n, C, g, g']: last feature map of the views that the bank learns from."""
    per_sample: Tensor
    """float [n]: loss of each image, to name the samples of a step that is void."""
    scalars: dict[str, Tensor] = field(default_factory=dict)
    """Further 0-d figures for the log, averaged over its interval."""


class Method(Protocol):
    """A training method: it owns views and loss, the loop owns time."""

    def prepare(self, batch: Batch) -> Tensor:
        """Return the views to train on: mixed, normalised, float [n, 3, H, W] channels-last."""
        ...

    def loss(self, images: Tensor, batch: Batch, model: Model) -> Out:
        """Run the forward pass of one step."""
        ...

    def after_backward(self, batch: Batch, out: Out, model: Model, alive: Tensor) -> None:
        """Learn from the step before the optimizer moves; `alive` is 1, or 0 in a void step."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that the method's future depends on."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` returned."""
        ...
