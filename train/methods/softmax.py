"""Cross-entropy alone: the baseline of every table."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backmix.pipeline.batch import Batch
from backmix.pipeline.draws import mix_draws
from backmix.train.methods.method import Out
from backmix.train.methods.views import to_device, unmixed
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
        height, width = batch.pool.shape[1:3]
        drawn = mix_draws(
            batch.place.seed,
            batch.place.epoch,
            batch.host.index,
            rows=batch.host.rows,
            pool_rows=len(batch.pool),
            group=batch.group,
            size=(height, width),
            patch=1,
            probability=0.0,
            flip=self.augment.flip,
            pad=self.augment.pad,
        )
        return unmixed(batch, self.augment, to_device(drawn, batch.pool.device), self.views)

    def loss(self, images: Tensor, batch: Batch, model: Model) -> Out:
        """Return the cross-entropy of the views."""
        logits, features = model(images)
        per_sample = F.cross_entropy(
            logits.float(), batch.labels, reduction="none", label_smoothing=self.label_smoothing
        )
        return Out(per_sample.mean(), logits, features, per_sample.detach())

    def after_backward(self, batch: Batch, out: Out, model: Model, alive: Tensor) -> None:
        """Learn nothing: there is no bank."""

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: the method has no state."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take nothing."""
