"""Which sample comes next: permutations as pure functions of (seed, epoch). numpy only.

Computed where they are needed and never stored: with the place (three integers) they are the whole
state of a loader.
"""

import numpy as np

from backmix.pipeline import draws


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return a permutation of 0 .. n - 1, int64 [n]: the positions sorted by a random word each.

    A stable sort of counter-based words, rather than a library's shuffle, is the same for ever.
    """
    words = draws.words(seed, epoch, np.arange(n), "order")
    # Without two equal words, which among 2^64 hardly ever happens, a sort need not be stable; that
    # is three times as fast.
    found = np.argsort(words)
    ascending = words[found]
    if (ascending[1:] == ascending[:-1]).any():
        found = np.argsort(words, kind="stable")
    return found


def windowed_order(seed: int, epoch: int, pages: np.ndarray, window: int) -> np.ndarray:
    """Return a permutation that reads a file window by window, int64 [n].

    The pages are shuffled, cut into windows of `window` pages, and the samples shuffled inside
    each window; so no more than one window must be in memory. Samples of pages that do not share a
    window never meet: sorted files need wide windows, or to be written in shuffled order.

    Args:
        seed, epoch: as in `order`.
        pages: page of each position, int64 [n].
        window: pages per window, at least 1.
    """
    if window < 1:
        raise ValueError(f"the window must hold at least one page, got {window}")
    present, page = np.unique(pages, return_inverse=True)
    # Draw number 1: pages and positions are counters of the same stream.
    shuffled = np.argsort(draws.words(seed, epoch, present, "order", 1), kind="stable")
    turn = np.empty(len(present), np.int64)
    turn[shuffled] = np.arange(len(present))
    sample = draws.words(seed, epoch, np.arange(len(pages)), "order")
    return np.lexsort((sample, turn[page] // window))
