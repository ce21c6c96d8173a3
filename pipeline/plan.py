"""What a loader delivers, as arithmetic: order, shares of the ranks, boxes, replacements.

All loaders follow one plan, so that they deliver the same samples with the same boxes in the same
batches. It touches no pixels and needs no torch.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from backmix.pipeline import draws, order
from backmix.pipeline.beton import BetonSet
from backmix.pipeline.options import LoaderOptions, size_at
from backmix.pipeline.subset import Subset

if TYPE_CHECKING:
    from backmix.pipeline.batch import Place


@dataclass(frozen=True)
class Part:
    """One rank's images of one step."""

    positions: np.ndarray
    """int64 [n]: positions in the subset."""
    place: "Place"
    """Where the loader is after this step, all ranks together."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The samples of a run and how they are dealt out."""

    data: BetonSet
    subset: Subset
    options: LoaderOptions
    training: bool
    """Shuffled, cropped at random if asked, bad images replaced; else stored order, fixed crops."""
    rank: int = 0
    world: int = 1

    def parts(self, place: "Place", sequence: np.ndarray | None = None) -> Iterator[Part]:
        """Yield this rank's part of every step from `place` to the end of the epoch.

        The steps lie on a fixed grid: step g takes the positions g * batch onwards of the epoch's
        order, and a place inside a step yields the rest of it first. In training a step is cut
        into mix groups, which are dealt whole and contiguously to the ranks; where there are fewer
        groups than ranks, some parts are empty.

        Args:
            place: where to begin.
            sequence: `sequence(place)`, where somebody has computed it already.
        """
        n, batch = len(self.subset), self.options.batch
        if not 0 <= place.consumed <= n or not 0 <= place.epoch < 1 << 32:
            raise ValueError(
                f"epoch {place.epoch}, sample {place.consumed} is no place in a set of {n} "
                "samples: it belongs to other data"
            )
        sequence = self.sequence(place) if sequence is None else sequence
        group = self.options.mix_group if self.training else 1
        start = place.consumed
        while start < n:
            end = min(start // batch * batch + batch, n)
            groups = -(-(end - start) // group)
            first = start + groups * self.rank // self.world * group
            last = min(start + groups * (self.rank + 1) // self.world * group, end)
            yield Part(sequence[first:last], dataclasses.replace(place, consumed=end))
            start = end

    def size(self, place: "Place") -> int:
        """Return the side of the views in the epoch of `place` [pixels]."""
        return size_at(self.options, place.epoch) if self.training else self.options.size

    def boxes(self, place: "Place", index: np.ndarray) -> np.ndarray:
        """Return the crops of the samples `index` in the epoch of `place`, int32 [n, 4]."""
        sizes, options = self.data.sizes[index], self.options
        if options.crop == "whole":
            return draws.whole_boxes(sizes)
        if not self.training:
            return draws.centre_boxes(sizes, options.eval_crop)
        return draws.crop_boxes(place.seed, place.epoch, index, sizes, options.scale, options.ratio)

    def substitute(self, place: "Place", position: int, attempt: int) -> int:
        """Draw the position of a sample to deliver for the bad one at `position`; never itself.

        Args:
            place: its seed and epoch key the draw.
            position: position in the subset.
            attempt: 0, 1, ...: the sample drawn may be bad, too.
        """
        n = len(self.subset)
        index = self.subset.index[position : position + 1]
        x = draws.block(place.seed, place.epoch, index, "replacement", attempt)[0, :1]
        return int((position + 1 + draws.below(x, n - 1)[0]) % n)

    @property
    def most_bad(self) -> int:
        """Bad images that an epoch may have; one is always allowed, however small the set."""
        return max(1, int(self.options.max_bad * len(self.subset)))

    def sequence(self, place: "Place") -> np.ndarray:
        """Return the positions of the epoch of `place` in their order, int64 [n]."""
        n = len(self.subset)
        if not self.training:
            return np.arange(n)
        if self.options.order == "full":
            return order.order(place.seed, place.epoch, n)
        pages = self.data.pages[self.subset.index]
        return order.windowed_order(place.seed, place.epoch, pages, self.options.window)
