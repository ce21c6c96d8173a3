"""PCSSR and RCSSR: class-specific semantic reconstruction.

Huang, Wang, Wang, Zhu, Hu: "Class-Specific Semantic Reconstruction for Open Set Recognition" (TPAMI
2022). All that is learned is the network's head (`models/heads.py`, `Reconstruction`), whose logits
are log-probabilities already; its scores are in `scores/cssr.py`.
"""

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
class CssrMethod:
    """Train on flipped and shifted views with -log p_y, p the mean of the cells' softmax."""

    augment: Augment
    views: torch.dtype
    """dtype of the images that the network is given."""

    def draw(self, batch: Batch) -> DeviceDraws:
        """Return flips and shifts."""
        return draw_plain(batch, self.augment)

    def prepare(self, batch: Batch, drawn: DeviceDraws) -> Views:
        """Return the augmented views."""
        return augmented(batch, self.augment, drawn, self.views)

    def loss(self, views: Views, batch: Batch, model: Model) -> Out:
        """Return the mean of -log p_y over the views."""
        logits, features = model(views.images)
        per_sample = self.per_sample(logits, features, batch.labels, model)
        return Out(per_sample.mean(), logits, features, per_sample.detach())

    def per_sample(self, logits: Tensor, features: Tensor, labels: Tensor, model: Model) -> Tensor:
        """Return -log p_y of each image: its logits are log p."""
        return F.nll_loss(logits.float(), labels, reduction="none")

    def learns_maps(self, epoch: int) -> bool:
        """Return True: every step shows the bank something."""
        return True

    def after_backward(
        self, batch: Batch, views: Views, out: Out, model: Model, alive: Tensor
    ) -> None:
        """Learn nothing after the gradients."""

    def after_step(self, figures: dict[str, Tensor], alive: Tensor) -> None:
        """Learn nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: what is learned are modules of the network."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take nothing."""
