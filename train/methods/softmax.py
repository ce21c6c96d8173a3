"""Cross-entropy alone: the baseline of every table."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backmix.pipeline.batch import Batch
from backmix.train.methods.method import DeviceDraws, Out, Views
from backmix.train.methods.views import augmented, draw_plain
from backmix.train.models.build import Model
from backmix.train.options import Augment


@dataclass
class SoftmaxMethod:
    """Train on flipped and shifted views with cross-entropy."""

    augment: Augment
    label_smoothing: float
    views: torch.dtype = torch.float32
    """dtype of the images that the network is given."""

    def draw(self, batch: Batch) -> DeviceDraws:
        """Return flips and shifts."""
        return draw_plain(batch, self.augment)

    def prepare(self, batch: Batch, drawn: DeviceDraws) -> Views:
        """Return the augmented views."""
        return augmented(batch, self.augment, drawn, self.views)

    def loss(self, views: Views, batch: Batch, model: Model) -> Out:
        """Return the cross-entropy of the views."""
        logits, features = model(views.images)
        per_sample = self.per_sample(logits, features, batch.labels, model)
        return Out(per_sample.mean(), logits, features, per_sample.detach())

    def per_sample(self, logits: Tensor, features: Tensor, labels: Tensor, model: Model) -> Tensor:
        """Return the cross-entropy of each image."""
        return F.cross_entropy(
            logits.float(), labels, reduction="none", label_smoothing=self.label_smoothing
        )

    def learns_maps(self, epoch: int) -> bool:
        """Return True: every step shows the bank something."""
        return True

    def after_backward(
        self, batch: Batch, views: Views, out: Out, model: Model, alive: Tensor
    ) -> None:
        """Learn nothing: there is no bank."""

    def after_step(self, figures: dict[str, Tensor], alive: Tensor) -> None:
        """Learn nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: the method has no state."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take nothing."""
