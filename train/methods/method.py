"""What the loop asks of a training method; the methods satisfy it without inheriting anything."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from backmix.pipeline.batch import Batch
from backmix.train.models.build import Model


@dataclass(frozen=True)
class DeviceDraws:
    """`MixDraws` as tensors on the batch's device; see there for shapes and dtypes."""

    flip: Tensor
    shift: Tensor | None
    donor: Tensor
    patch: Tensor
    tie: Tensor

    def each(self, of: Callable[[Tensor], Tensor]) -> "DeviceDraws":
        """Return `of` of every tensor that is there."""
        return DeviceDraws(
            flip=of(self.flip),
            shift=None if self.shift is None else of(self.shift),
            donor=of(self.donor),
            patch=of(self.patch),
            tie=of(self.tie),
        )


@dataclass(frozen=True)
class Regions:
    """What a mix knows of the cells of its last feature map, for a host that asks."""

    pasted: Tensor
    """float32 [n, g, g']: share of the cell that visible pasted pixels cover (not fill), in [0, 1],
    after flip and shift."""
    heat: Tensor
    """float32 [n, g, g']: the target's own activation map from the bank, in the frame of the mix;
    NaN where the mix shows border."""


@dataclass(frozen=True)
class Views:
    """What the network is shown of a batch, and how it was made; everything is on the device."""

    images: Tensor
    """float [n, 3, H, W] channels-last: augmented, mixed, normalised."""
    drawn: DeviceDraws
    """The draws as they were used: the places of the patches are those that were chosen."""
    plain: Tensor | None = None
    """float [n, 3, H, W]: the same images with nothing done to them but normalising, where they are
    trained on as well."""
    regions: Regions | None = None
    """What the mix knows of its cells, where the host asks for it."""
    scalars: dict[str, Tensor] = field(default_factory=dict)
    """0-d figures of the views for the log."""


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
    figures: dict[str, Tensor] = field(default_factory=dict)
    """0-d sums that `after_step` learns from, over all processes: those of a step's parts are added
    up."""


class Method(Protocol):
    """A training method: it owns views and loss, the loop owns time.

    It keeps nothing of the batch in hand: a batch may be cut into parts, each of which goes the way
    of draw, prepare, loss and after_backward by itself. What it trains beside the network's body
    are modules of the network (`models/heads.py`), made by `build.build_network`, so that
    optimizer, checkpoint and evaluation need not know of them.
    """

    def draw(self, batch: Batch) -> DeviceDraws:
        """Draw for every image, on the host; the copies to the device are not waited for."""
        ...

    def prepare(self, batch: Batch, drawn: DeviceDraws) -> Views:
        """Return the views to train on, made on the device."""
        ...

    def loss(self, views: Views, batch: Batch, model: Model) -> Out:
        """Run the forward pass; reads what it is given and writes nothing but the model's buffers,
        so that it can be compiled."""
        ...

    def after_backward(
        self, batch: Batch, views: Views, out: Out, model: Model, alive: Tensor
    ) -> None:
        """Learn from a part before the optimizer moves; `alive` is 1, or 0 in a void step."""
        ...

    def after_step(self, figures: dict[str, Tensor], alive: Tensor) -> None:
        """Learn once a step from `Out.figures`, summed over its parts; `alive` as above."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that the method's future depends on."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` returned."""
        ...


class HostMethod(Method, Protocol):
    """A method that can also be trained on the mixes of BackMix."""

    def per_sample(self, logits: Tensor, features: Tensor, labels: Tensor, model: Model) -> Tensor:
        """Return the loss of each image, float32 [n], with its gradient.

        For methods whose loss is a mean over images; ValueError where it is not.
        """
        ...

    def learns_maps(self, epoch: int) -> bool:
        """Return whether BackMix's bank takes maps from the steps of an epoch."""
        ...
