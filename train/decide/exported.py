"""The network of an exported file: from views to decisions, in one program.

    images uint8 [n, S, S, 3] -> class_index, probability, score, threshold, p_value, accept  [n]

Normalising, the run's network, its score and the rule of its record, made of plain torch operations
whatever kernels the network is trained with.
"""

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from backmix.train.decide.record import Record
from backmix.train.decide.rule import Rule
from backmix.train.decide.torch_scores import log_odds, torch_score
from backmix.train.models.build import Model
from backmix.train.models.heads import Reconstruction, put_head
from backmix.train.scores import Fit
from backmix.train.scores.cssr import CssrFit, cell_figures

INPUT = "images"
OUTPUTS = ("class_index", "probability", "score", "threshold", "p_value", "accept")
"""int64, four times float64, and bool, [n] each."""
_AT_ONCE = 2**18
"""Numbers of one image's reconstructions that are held at a time: 1 MiB."""


class Exported(nn.Module):
    """A run's network, score and rule as one module."""

    mean: Tensor
    scale: Tensor

    def __init__(self, model: Model, record: Record, fit: Fit | None, cssr: CssrFit | None):
        """Take copies of everything; the model stays as it is.

        Args:
            model: in evaluation mode, on the CPU.
            record: what is decided by.
            fit: what its score learned from the training images; None = nothing.
            cssr: what CSSR's did.

        Raises:
            ValueError: the score cannot be exported, and why.
        """
        super().__init__()
        shown = record.preprocessing
        self.score = torch_score(record.score, model.head, fit, cssr)
        self.rule = TorchRule(record.rule)
        self.model = copy.deepcopy(model)
        if isinstance(self.model.head, Reconstruction):
            put_head(self.model, PlainReconstruction(self.model.head))
        self.register_buffer("mean", torch.tensor(shown.mean))
        self.register_buffer("scale", torch.tensor([1 / std for std in shown.std]))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return `OUTPUTS` of views uint8 [n, S, S, 3]."""
        views = ((images.float() - self.mean) * self.scale).permute(0, 3, 1, 2)
        logits, maps = self.model(views)
        outputs = self._read(logits, maps)
        z = outputs["logits"]
        # What is not finite may still give a number, and must not.
        bad = ~(z.isfinite().all(1) & outputs["features"].isfinite().all(1))
        predicted = z.argmax(1)
        probability = torch.sigmoid(log_odds(z)).masked_fill(bad, math.nan)
        score = self.score(outputs).masked_fill(bad, math.nan)
        return predicted, probability, score, *self.rule(predicted, score)

    def _read(self, logits: Tensor, maps: Tensor) -> dict[str, Tensor]:
        """Return what scores read, as `passes` stores it."""
        features = maps.mean((2, 3))
        outputs = {"logits": logits.double(), "features": features.double(), "maps": maps}
        if self.model.rejection is not None:
            outputs["rejection"] = self.model.rejection(features).squeeze(1).double()
        if isinstance(self.model.head, Reconstruction):
            outputs |= cell_figures(self.model, logits, maps)
        return outputs


class PlainReconstruction(Reconstruction):
    """CSSR's head without its kernel, a fixed number of classes at a time."""

    def __init__(self, head: Reconstruction):
        """Share the weights of a head."""
        nn.Module.__init__(self)
        self.gamma, self.reciprocal = head.gamma, head.reciprocal
        self.encoder, self.decoder = head.encoder, head.decoder

    def cell_logits(self, features: Tensor) -> Tensor:
        """Return each cell's logits, fp32 [n, K, g, g'], of maps [n, C, g, g']."""
        cells = features.flatten(2).mT[:, None]  # [n, 1, cells, C]
        at_once = max(1, _AT_ONCE // (cells.shape[2] * cells.shape[3]))
        errors = []
        for encoder, decoder in zip(
            self.encoder.split(at_once), self.decoder.split(at_once), strict=True
        ):
            rebuilt = (cells @ encoder.mT).tanh() @ decoder  # [n, some classes, cells, C]
            errors.append((rebuilt - cells).abs().sum(3))
        logits = torch.cat(errors, 1) * (self.gamma if self.reciprocal else -self.gamma)
        logits = logits.clamp(-self.CLIP, self.CLIP)
        return logits.unflatten(2, features.shape[2:])


class TorchRule(nn.Module):
    """`Rule.decide` as torch operations."""

    thresholds: Tensor
    limits: Tensor
    offsets: Tensor
    category: Tensor
    first: Tensor
    last: Tensor
    images: Tensor
    values: Tensor
    upto: Tensor
    below: Tensor

    def __init__(self, rule: Rule):
        """Keep thresholds and tables, those of all categories one after the other."""
        super().__init__()
        tables = [category.table for category in rule.categories]
        lengths = np.array([len(table.values) for table in tables])
        last = np.cumsum(lengths)
        # Behind a table's last entry all of its calibration scores are smaller.
        below = [np.append(table.below, table.n) for table in tables]
        constants = {
            "thresholds": rule.thresholds,
            "limits": np.array([category.threshold for category in rule.categories]),
            "offsets": rule.offsets,
            "category": rule.category,
            "first": last - lengths,
            "last": last,
            "images": np.array([table.n for table in tables]),
            "values": np.concatenate([table.values for table in tables]),
            "upto": np.concatenate([table.upto for table in tables]),
            "below": np.concatenate(below),
        }
        for name, value in constants.items():
            self.register_buffer(name, torch.from_numpy(np.array(value)))
        self.steps = tuple(2**power for power in reversed(range(int(lengths.max()).bit_length())))
        """Of a binary search in the longest table."""

    def forward(self, predicted: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return thresholds float64 [n], p-values float64 [n], and which are accepted, bool [n].

        Args:
            predicted: int64 [n].
            score: float64 [n]; a NaN is not accepted, and its p-value is NaN.
        """
        thresholds = self.thresholds.index_select(0, predicted)
        rest = score - self.offsets.index_select(0, predicted)
        own = self.category.index_select(0, predicted)
        first, last = self.first.index_select(0, own), self.last.index_select(0, own)
        place = first - 1  # of the last entry that is not larger
        for step in self.steps:
            further = place + step
            at = torch.minimum(further, last - 1)
            inside = (further < last) & (self.values.index_select(0, at) <= rest)
            place = torch.where(inside, further, place)
        at = torch.maximum(place, first)
        same = (place >= first) & (self.values.index_select(0, at) == rest)
        # Each table before this one has one more number below its entries.
        above = self.below.index_select(0, place + 1 + own)
        count = torch.where(same, self.upto.index_select(0, at), above)
        p_values = (1 + count).double() / (self.images.index_select(0, own) + 1).double()
        p_values = p_values.masked_fill(score.isnan(), math.nan)
        # The score less the offset against the category's threshold, as it was calibrated; the
        # threshold with the offset added to it may round to the other side.
        return thresholds, p_values, rest >= self.limits.index_select(0, own)
