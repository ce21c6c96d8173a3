"""Which samples of a data set a run uses, and their labels: arithmetic, no file per split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backmix.pipeline import draws


@dataclass(frozen=True)
class Subset:
    """Some samples of a data set, in stored order, with the labels that a run gives them."""

    index: np.ndarray
    """int64 [m]: sample numbers, ascending."""
    labels: np.ndarray
    """int64 [m]: position in the run's class list, -1 = unknown."""

    def __len__(self) -> int:
        return len(self.index)


def select(stored_labels: np.ndarray, known: Sequence[int]) -> Subset:
    """Return the samples whose stored class is in `known`; its position there is their label.

    Args:
        stored_labels: class of every sample of the data set, int64 [N].
        known: stored class numbers, each once.
    """
    if len(set(known)) != len(known):
        raise ValueError(f"the class list names a class twice: {list(known)}")
    position = np.full(int(max([*known, stored_labels.max(initial=-1)])) + 1, -1, np.int64)
    position[np.asarray(known, np.int64)] = np.arange(len(known))
    index = np.flatnonzero(position[stored_labels] >= 0)
    return Subset(index, position[stored_labels[index]])


def hold_out(subset: Subset, share: float, seed: int) -> tuple[Subset, Subset]:
    """Split off a stratified share: per class the samples with the smallest hold-out draws.

    Returns (rest, held). The draw depends on (seed, sample) alone, so a sample that is held out
    for a share stays held out for every larger one while its class stays the same.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the held-out share must be in [0, 1), got {share}")
    held = np.zeros(len(subset), bool)
    if share:
        # Class by class, inside a class by the draw: its first ones are held out. A loop over
        # classes would look at every sample a thousand times.
        _, class_of, count = np.unique(subset.labels, return_inverse=True, return_counts=True)
        if len(count) < 1 << 16:
            class_of = class_of.astype(np.uint16)  # numpy sorts short integers by their digits
        drawn = np.argsort(draws.words(seed, 0, subset.index, "holdout"), kind="stable")
        arranged = drawn[np.argsort(class_of[drawn], kind="stable")]
        first = np.cumsum(count) - count
        rank = np.arange(len(subset)) - np.repeat(first, count)
        taken = np.floor(share * count + 0.5).astype(np.int64)
        held[arranged[rank < np.repeat(taken, count)]] = True
    return (
        Subset(subset.index[~held], subset.labels[~held]),
        Subset(subset.index[held], subset.labels[held]),
    )
