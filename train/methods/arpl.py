"""ARPL, and with `Confusion` ARPL+CS: learn what each class is not, and flee from it.

Chen, Peng, Wang, Tian: "Adversarial Reciprocal Points Learning for Open Set Recognition" (TPAMI
2021). The points and the radius are the network's head (`models/heads.py`); this file is the loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backmix.pipeline.batch import Batch
from backmix.train.methods.confusing import Confusion
from backmix.train.methods.method import DeviceDraws, Out, Views
from backmix.train.methods.views import augmented, draw_plain
from backmix.train.models.build import Model
from backmix.train.models.heads import ReciprocalPoints
from backmix.train.options import Arpl, Augment


def open_space(distances: Tensor, labels: Tensor, radius: Tensor) -> Tensor:
    """Return how far each image lies outside its class's bounded space, [n]: max(0, d_y - R + 1).

    Args:
        distances: |f - p_k|^2 / C, float [n, K].
        labels: int64 [n].
        radius: R, float [1].
    """
    own = distances.gather(1, labels[:, None])[:, 0]
    return F.relu(own - radius + 1)


@dataclass
class ArplMethod:
    """Train on flipped and shifted views: cross-entropy of the distance logits, and a radius.

    L = CE(z / T, y) + weight * mean of `open_space`. With `confusion`, in epochs 0, 2, 4, ... also
    beta * E of freshly generated images, after discriminator and generator have taken their steps.
    """

    options: Arpl
    augment: Augment
    label_smoothing: float
    views: torch.dtype
    """dtype of the images that the network is given."""
    confusion: Confusion | None = None
    """The generated images of ARPL+CS."""

    def draw(self, batch: Batch) -> DeviceDraws:
        """Return flips and shifts."""
        return draw_plain(batch, self.augment)

    def prepare(self, batch: Batch, drawn: DeviceDraws) -> Views:
        """Return the augmented views."""
        return augmented(batch, self.augment, drawn, self.views)

    def loss(self, views: Views, batch: Batch, model: Model) -> Out:
        """Return the loss of the views."""
        confusion = self.confusion if self._confuses(batch.place.epoch) else None
        of_gan = {} if confusion is None else confusion.take_steps(views.images, batch, model)
        logits, features = model(views.images)
        head = _head(model)
        outside = open_space(head.distances(features), batch.labels, head.radius)
        per_sample = self._cross_entropy(logits, batch.labels) + self.options.weight * outside
        loss = per_sample.mean()
        figures = {}
        if confusion is not None:
            certain = confusion.fresh_certainty(batch, model)
            loss = loss + self.options.beta * certain
            figures = {"certainty": certain.detach()}
            of_gan = figures | of_gan
        own = {"open_space": outside.detach().mean(), "radius": head.radius.detach()[0]}
        return Out(loss, logits, features, per_sample.detach(), of_gan | own, figures)

    def per_sample(self, logits: Tensor, features: Tensor, labels: Tensor, model: Model) -> Tensor:
        """Return the loss of each image, without generated ones.

        Raises:
            ValueError: with generated images, whose term belongs to no image.
        """
        if self.confusion is not None:
            raise ValueError("the loss of ARPL+CS is no mean over the images of a batch")
        head = _head(model)
        outside = open_space(head.distances(features), labels, head.radius)
        return self._cross_entropy(logits, labels) + self.options.weight * outside

    def learns_maps(self, epoch: int) -> bool:
        """Return whether the bank learns: with generated images in every second pass."""
        return not self._confuses(epoch)

    def after_backward(
        self, batch: Batch, views: Views, out: Out, model: Model, alive: Tensor
    ) -> None:
        """Learn nothing from a part by itself."""

    def after_step(self, figures: dict[str, Tensor], alive: Tensor) -> None:
        """Take the steps of discriminator and generator back where the network takes none."""
        if self.confusion is not None and "certainty" in figures:
            self.confusion.settle(alive)

    def tensors(self) -> dict[str, Tensor]:
        """Return generator, discriminator and their optimizers' state, where there are any."""
        return {} if self.confusion is None else self.confusion.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take them back."""
        if self.confusion is not None:
            self.confusion.load(tensors)

    def _confuses(self, epoch: int) -> bool:
        """Return whether an epoch is a pass with generated images."""
        return self.confusion is not None and epoch % 2 == 0

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits / self.options.temperature,
            labels,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )


def _head(model: Model) -> ReciprocalPoints:
    assert isinstance(model.head, ReciprocalPoints)
    return model.head
