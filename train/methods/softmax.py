"""Cross-entropy alone: the baseline of every table."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backmix.pipeline.batch import Batch
from backmix.train.methods.method import Out, Regions
from backmix.train.methods.views import augmented
from backmix.train.models.build import Model
from backmix.train.options import Augment


@dataclass
class SoftmaxMethod:
    """Train on flipped and shifted views with cross-entropy."""

    augment: Augment
    label_smoothing: float
    views: torch.dtype = torch.float32
    """dtype of the images that the network is given."""

    def prepare(self, batch: Batch) -> Tensor:
        """Return the augmented views; no patch is ever pasted."""
        return augmented(batch, self.augment, self.views)

    def loss(
        self, images: Tensor, batch: Batch, model: Model, regions: Regions | None = None
    ) -> Out:
        """Return the cross-entropy of the views."""
        logits, features = model(images)
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

    def after_backward(self, batch: Batch, out: Out, model: Model, alive: Tensor) -> None:
        """Learn nothing: there is no bank."""

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: the method has no state."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take nothing."""
