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


@dataclass(frozen=True)
class Regions:
    """What a mix knows of the cells of its last feature map, for a host that asks."""

    pasted: Tensor
    """float32 [n, g, g']: share of the cell that visible pasted pixels cover (not fill), in [0, 1],
    after flip and shift."""
    heat: Tensor
    """float32 [n, g, g']: the target's own activation map from the bank, in the frame of the mix;
    NaN where the mix shows border."""


class Method(Protocol):
    """A training method: it owns views and loss, the loop owns time.

    What it trains beside the network's body are modules of the network (`models/heads.py`), made by
    `build.build_network`, so that optimizer, checkpoint and evaluation need not know of them.
    """

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


class HostMethod(Method, Protocol):
    """A method that can also be trained on the mixes of BackMix."""

    def loss(
        self, images: Tensor, batch: Batch, model: Model, regions: Regions | None = None
    ) -> Out:
        """Run the forward pass of one step, on plain views or on mixes with what they know."""
        ...

    def per_sample(self, logits: Tensor, features: Tensor, labels: Tensor, model: Model) -> Tensor:
        """Return the loss of each image, float32 [n], with its gradient.

        For methods whose loss is a mean over images; ValueError where it is not.
        """
        ...

    def learns_maps(self, epoch: int) -> bool:
        """Return whether BackMix's bank takes maps from the steps of an epoch."""
        ...
