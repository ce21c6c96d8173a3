"""`Batch` and `Place`: what a loader yields, and where it is after having yielded it."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a loader is: three integers, the same for every number of ranks."""

    seed: int
    epoch: int = 0
    consumed: int = 0
    """Samples of this epoch taken by all ranks together."""


@dataclass(frozen=True, eq=False)
class HostRows:
    """Sample numbers as the host knows them, for the draws: reading them waits for no device."""

    pool_index: np.ndarray
    """int64 [P], as in `Batch`."""
    rows: np.ndarray
    """int64 [n], as in `Batch`."""
    stands_in: bool = False
    """Whether the image stands for none: see `stand_in`."""

    @property
    def index(self) -> np.ndarray:
        """Sample number of each image, int64 [n]."""
        return self.pool_index[self.rows]


@dataclass(frozen=True)
class Batch:
    """n images as rows of a pool of decoded pixels; cropped and resized, nothing else.

    Flip, shift, mixing and normalisation are the kernel's work (`kernels/mix_background.py`).
    """

    pool: Tensor
    """uint8 [P, H, W, 3], contiguous: this batch's pixels (P = n), or the whole resident set."""
    pool_index: Tensor
    """int64 [P]: sample number that each pool row shows."""
    rows: Tensor
    """int64 [n]: pool row of each image."""
    index: Tensor
    """int64 [n]: sample number in the data set, after replacement; equals pool_index[rows]."""
    labels: Tensor
    """int64 [n]: position in the run's class list, -1 = unknown."""
    boxes: Tensor
    """int32 [n, 4]: y0, x0, h, w of the crop that the row shows, in pixels of the stored image."""
    sizes: Tensor
    """int32 [n, 2]: h, w of the stored image."""
    status: Tensor
    """uint8 [n]: 0 good, 1 a stored JPEG decoded with a warning, 2 replaced by another sample."""
    group: int
    """Mix groups: row i of the batch takes its donor among the rows of group i // group;
    0 = from the whole pool (resident)."""
    place: Place
    """Where the loader is after this batch."""
    host: HostRows
    """pool_index and rows once more, on the host."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> int:
        """How many images count: all, or none of a batch that stands in for an empty one."""
        return 0 if self.host.stands_in else len(self)


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into so many parts, one after the other, without copying pixels.

    Mix groups stay whole, so every image finds the same donor as in the whole batch; where there
    are fewer groups than parts, some parts are empty. With a resident pool, whose images may be cut
    anywhere, the parts differ by one image at most.
    """
    if parts == 1:
        return [batch]
    unit = batch.group or 1
    units = -(-len(batch) // unit)
    borders = [min(units * part // parts * unit, len(batch)) for part in range(parts + 1)]
    return [_rows(batch, first, last) for first, last in pairwise(borders)]


def _rows(batch: Batch, first: int, last: int) -> Batch:
    """Return images first .. last - 1 of a batch, and of a batch pool their pixels alone."""
    here = slice(first, last)
    own = {
        name: getattr(batch, name)[here] for name in ("index", "labels", "boxes", "sizes", "status")
    }
    if batch.group == 0:
        host = replace(batch.host, rows=batch.host.rows[here])
        return replace(batch, rows=batch.rows[here], host=host, **own)
    return replace(
        batch,
        pool=batch.pool[here],
        pool_index=batch.pool_index[here],
        rows=batch.rows[here] - first,
        host=replace(
            batch.host,
            pool_index=batch.host.pool_index[here],
            rows=batch.host.rows[here] - first,
        ),
        **own,
    )


def stand_in(batch: Batch, sample: int) -> Batch:
    """Return a batch of one black image in the place of an empty one.

    Processes that train together take every step together, also those that have no image of it:
    theirs has weight 0, and nothing is learned from it.

    Args:
        batch: an empty one.
        sample: number of any training sample.
    """
    device = batch.pool.device
    one = torch.zeros(1, dtype=torch.int64, device=device)
    number = np.array([sample], np.int64)
    side = torch.tensor([batch.pool.shape[1:3]], dtype=torch.int32)
    box = torch.cat([torch.zeros_like(side), side], 1)
    return replace(
        batch,
        pool=batch.pool.new_zeros(1, *batch.pool.shape[1:]),
        pool_index=one + sample,
        rows=one,
        index=one + sample,
        labels=one,
        boxes=box.to(device, non_blocking=True),
        sizes=side.to(device, non_blocking=True),
        status=batch.status.new_zeros(1),
        group=1,
        host=HostRows(number, np.zeros(1, np.int64), stands_in=True),
    )
