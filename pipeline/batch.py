"""`Batch` and `Place`: what a loader yields, and where it is after having yielded it."""

from dataclasses import dataclass

import numpy as np
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
