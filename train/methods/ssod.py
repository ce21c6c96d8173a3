"""SSOD: a rejection head that learns from the locations of the training images themselves.

Pei: "Image Background Serves as Good Proxy for Out-of-distribution Data" (2023). P(class | x) =
P(class | x, known) P(known | x): the class head says the first factor, a second linear head the
other. Its samples are locations of the last feature map. Where the class head, applied to the
location, is sure of the image's class, the location is known; where it gives that class almost
nothing, the location is background, and unknown. No paper or code that we know says what happens
before the class head can tell; the gate below is our own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from backmix.kernels.location_confidence import location_confidence
from backmix.pipeline.batch import Batch
from backmix.train.methods.method import DeviceDraws, Out, Regions, Views
from backmix.train.methods.views import augmented, draw_plain
from backmix.train.models.build import Model
from backmix.train.models.heads import linear_head
from backmix.train.options import Augment, Ssod

LATEST_WEIGHT = 0.01
"""Weight of a new step in the gate's running means, once they are older than 100 steps."""
HEAT_SHARE = 0.25
"""On mixes: share of an image's cells that count as hot, and as cool."""


def new_rejection(channels: int) -> nn.Linear:
    """Return a fresh rejection head: v from N(0, 0.01), c = 0."""
    head = nn.Linear(channels, 1)
    nn.init.normal_(head.weight, 0.0, 0.01)
    nn.init.zeros_(head.bias)
    return head


def freeze(model: Model) -> None:
    """Let nothing but the rejection head learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("rejection."))


def rejection_logits(model: Model, features: Tensor) -> Tensor:
    """Return s = v . F + c at each location, float [n, g, g'] of maps [n, C, g, g'].

    Their mean over an image's locations is the head's answer to its pooled feature: the score.
    """
    assert model.rejection is not None
    return model.rejection(features.permute(0, 2, 3, 1)).squeeze(-1)


class Gate:
    """When the rejection loss begins to count: not before the class head can tell anything.

    A fresh network gives every class about 1 / K. From K = 1 / (1 - gamma) on that makes every
    location unknown, and the rejection head would learn to refuse everything and pull all features
    with it. So the loss has weight 0 until known locations and right answers have been seen, both
    as running means over the steps; then it rises to 1 within an epoch, and the gate stays open.
    The means are plain ones over the first 100 steps and then forget, 1 % a step: so a network
    that was trained before opens the gate after its first step.
    """

    def __init__(self, ramp: int, device: torch.device) -> None:
        """Begin closed; `ramp` is the number of steps from the opening to weight 1."""
        self.ramp = ramp
        self.known = torch.zeros((), device=device)
        self.accuracy = torch.zeros((), device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.opened = torch.zeros((), dtype=torch.int64, device=device)

    def weight(self) -> Tensor:
        """Return the weight of the rejection loss in the step at hand, 0-d in [0, 1]."""
        return (self.opened / self.ramp).clamp(max=1)

    def watch(
        self, known: Tensor, accuracy: Tensor, alive: Tensor, *, least: tuple[float, float]
    ) -> None:
        """Take the figures of a step in; a void one changes nothing.

        Args:
            known: share of the batch's locations that are known, 0-d.
            accuracy: share of its images that are classified right, 0-d.
            alive: 1, or 0 in a void step.
            least: what the running means of both must reach.
        """
        rate = (1 / (self.steps + 1)).clamp(min=LATEST_WEIGHT)
        means = [
            old.lerp(new, rate) for old, new in ((self.known, known), (self.accuracy, accuracy))
        ]
        opens = (self.opened > 0) | ((means[0] >= least[0]) & (means[1] >= least[1]))
        after = (*means, self.steps + 1, self.opened + opens)
        for state, value in zip(self.tensors().values(), after, strict=True):
            state.copy_(torch.where(alive > 0, value, state))

    def tensors(self) -> dict[str, Tensor]:
        """Return the running means, the steps behind them, and the steps since the opening."""
        return {
            "gate.known": self.known,
            "gate.accuracy": self.accuracy,
            "gate.steps": self.steps,
            "gate.opened": self.opened,
        }


@dataclass
class SsodMethod:
    """Train on flipped and shifted views with cross-entropy and the rejection head's loss.

    L = CE + weight (L1 + L0), L1 = mean over the known locations of softplus(-s), L0 = mean over
    the unknown ones of softplus(s), s the rejection head's logit. Two means, because there are far
    more unknown locations early and far more known ones late. A mean of nothing is 0.
    """

    options: Ssod
    augment: Augment
    label_smoothing: float
    views: torch.dtype
    ramp: int
    """Steps over which the rejection loss rises after its gate has opened: one epoch."""
    device: torch.device

    def __post_init__(self) -> None:
        """Close the gate."""
        self.gate = Gate(self.ramp, self.device)

    def draw(self, batch: Batch) -> DeviceDraws:
        """Return flips and shifts."""
        return draw_plain(batch, self.augment)

    def prepare(self, batch: Batch, drawn: DeviceDraws) -> Views:
        """Return the augmented views."""
        return augmented(batch, self.augment, drawn, self.views)

    def loss(self, views: Views, batch: Batch, model: Model) -> Out:
        """Return the loss of the class head and of the rejection head.

        With the rejection head alone the network is in evaluation mode: neither dropout nor
        BatchNorm statistics that move.
        """
        if self.options.train == "head":
            model.eval()
        logits, features = model(views.images)
        entropy = F.cross_entropy(
            logits.float(), batch.labels, reduction="none", label_smoothing=self.label_smoothing
        )
        right = logits.detach().argmax(1) == batch.labels
        head = linear_head(model)
        p = location_confidence(features, head.weight, head.bias, batch.labels).p_true
        known, unknown = location_samples(p, right, self.options, views.regions)
        s = rejection_logits(model, features).float()

        figures = self._figures(batch, known, unknown, right)
        count_known, count_unknown = figures["known"].clamp(min=1), figures["unknown"].clamp(min=1)
        # Each image's part of both means, times the images, so that their mean is the whole: also
        # that over several processes, in which a mean counts as many times as it has images.
        parts = F.softplus(-s) * (known / count_known) + F.softplus(s) * (unknown / count_unknown)
        rejection = parts.sum((1, 2)) * figures["images"]
        joint = self.options.train == "joint"
        gate = self.gate.weight() if joint else torch.ones_like(figures["right"])
        per_sample = entropy + self.options.weight * gate * rejection
        scalars = {
            "known_share": figures["known"] / figures["locations"],
            "unknown_share": figures["unknown"] / figures["locations"],
            "gate": gate,
            "rejection_loss": rejection.detach().mean(),
        }
        return Out(per_sample.mean(), logits, features, per_sample.detach(), scalars, figures)

    def per_sample(self, logits: Tensor, features: Tensor, labels: Tensor, model: Model) -> Tensor:
        """Refuse: the two means couple the images of a batch."""
        raise ValueError(
            "the loss of SSOD is a mean over the locations of a batch, not over images: it has no "
            "raw+loss; --method.cam-source raw or mix"
        )

    def learns_maps(self, epoch: int) -> bool:
        """Return True: every step shows the bank something."""
        return True

    def after_backward(
        self, batch: Batch, views: Views, out: Out, model: Model, alive: Tensor
    ) -> None:
        """Learn nothing from a part by itself."""

    def after_step(self, figures: dict[str, Tensor], alive: Tensor) -> None:
        """Let the gate see the step; with the rejection head alone there is none."""
        options = self.options
        if options.train == "head":
            return
        # A share of the locations is known by its own definition.
        least = (0.0 if options.share else options.gate_known, options.gate_accuracy)
        known = figures["known"] / figures["locations"]
        self.gate.watch(known, figures["right"] / figures["images"], alive, least=least)

    def tensors(self) -> dict[str, Tensor]:
        """Return the gate."""
        return self.gate.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the gate back."""
        for name, state in self.gate.tensors().items():
            state.copy_(tensors[name])

    def _figures(
        self, batch: Batch, known: Tensor, unknown: Tensor, right: Tensor
    ) -> dict[str, Tensor]:
        """Return counts over all processes that train together, 0-d float32."""
        images = torch.full_like(known[0, 0, 0], len(batch))  # filled there, never copied
        counts = {
            "known": known.sum(),
            "unknown": unknown.sum(),
            "right": right.sum(),
            "images": images,
            "locations": images * known[0].numel(),
        }
        if dist.is_available() and dist.is_initialized():
            sums = torch.stack([count.float() for count in counts.values()]) * (batch.images > 0)
            dist.all_reduce(sums)
            counts = dict(zip(counts, sums.unbind(), strict=True))
        return counts


def location_samples(
    p_true: Tensor, right: Tensor, options: Ssod, regions: Regions | None = None
) -> tuple[Tensor, Tensor]:
    """Return how much each location counts as known and as unknown, float32 [n, g, g'] each.

    0 or 1, but for pasted background, which is unknown with the share of the cell it covers.

    Args:
        p_true: probability of the image's own class at each location, [n, g, g'].
        right: which images are classified right, bool [n].
        options: gamma, or share; require_correct.
        regions: what a mix knows of its cells; None = plain views.
    """
    if options.share:
        known, unknown = _extremes(p_true, options.share)
    else:
        known, unknown = p_true >= options.gamma, p_true <= 1 - options.gamma
    if options.require_correct:
        unknown = unknown & right[:, None, None]
    if regions is None:
        return known.float(), unknown.float()
    cool, hot = _cool_and_hot(regions.heat)
    known = known & hot & (regions.pasted == 0)
    return known.float(), torch.maximum(regions.pasted, (unknown & cool).float())


def _extremes(p: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return which values are among the greatest, and which among the least, bool as p.

    Equal values are in together, and none is in both: those that fill the middle are in neither.
    So the shares are `share` where no values are equal. Where many are 1, as in a network that is
    sure of its training images, all of these are among the greatest, and only what is less than 1
    can be among the least, be it fewer than `share`: a draw among equal ones would call locations
    unknown that the class head is as sure of as of any other.

    Args:
        p: any shape, not empty.
        share: of the values in each of the two, above 0 and up to 0.5; at least one value.
    """
    ascending = p.flatten().sort().values
    count = max(int(share * len(ascending) + 1e-9), 1)
    least, most = ascending[count - 1], ascending[-count]
    greatest = (p >= most) & ((p > least) | (p == ascending[-1]))
    lowest = (p <= least) & ((p < most) | (p == ascending[0]))
    return greatest & ~lowest, lowest & ~greatest


def _cool_and_hot(heat: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's coolest and hottest quarter of the cells that it shows, bool [n, g, g'].

    Equal cells are in together, so in a map that says nothing all cells are both.

    Args:
        heat: float [n, g, g'], NaN where the image shows nothing.
    """
    cells = heat.flatten(1)
    shown = ~cells.isnan()
    count = (HEAT_SHARE * shown.sum(1, keepdim=True)).long()
    last = (count - 1).clamp(min=0)
    rising = torch.where(shown, cells, torch.inf).sort(1).values
    falling = torch.where(shown, cells, -torch.inf).sort(1, descending=True).values
    some = shown & (count > 0)
    cool = some & (cells <= rising.gather(1, last))
    hot = some & (cells >= falling.gather(1, last))
    return cool.view_as(heat), hot.view_as(heat)
