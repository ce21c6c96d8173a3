"""The order of an epoch: permutations that depend on (seed, epoch) and on nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmix.pipeline import draws
from backmix.pipeline.order import order, windowed_order


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 300))
def test_the_order_is_a_permutation(seed, epoch, n):
    assert sorted(order(seed, epoch, n).tolist()) == list(range(n))


def test_the_order_is_that_of_the_first_release():
    """A change here would break every checkpoint: these numbers are frozen."""
    assert order(1, 2, 8).tolist() == [4, 2, 3, 7, 0, 6, 5, 1]
    assert windowed_order(0, 0, np.arange(20) // 3, 2).tolist() == (
        [5, 2, 1, 3, 4, 0, 17, 19, 16, 18, 15, 11, 7, 9, 8, 6, 10, 14, 12, 13]
    )


def test_the_order_sorts_the_samples_words():
    words = draws.words(9, 4, np.arange(50), "order").tolist()
    assert order(9, 4, 50).tolist() == sorted(range(50), key=lambda k: words[k])


def test_equal_words_leave_positions_in_their_order(monkeypatch):
    tied = np.array([7, 3, 7, 3, 3, 9] * 20, np.uint64)
    monkeypatch.setattr(draws, "words", lambda seed, epoch, index, stream: tied[index])
    expected = sorted(range(120), key=lambda k: tied[k])  # Python's sort is stable
    assert order(0, 0, 120).tolist() == expected


def test_epochs_and_seeds_shuffle_differently():
    shuffled = {tuple(order(seed, epoch, 20)) for seed in range(5) for epoch in range(5)}
    assert len(shuffled) == 25


def test_every_position_comes_first_as_often():
    first = np.bincount([order(0, epoch, 8)[0] for epoch in range(2000)], minlength=8)
    assert (abs(first - 250) < 70).all()  # 4.7 standard deviations


@given(
    st.lists(st.integers(0, 12), max_size=60),
    st.integers(1, 15),
    st.integers(0, 2**64 - 1),
    st.integers(0, 50),
)
def test_a_window_reads_its_pages_to_the_end_before_the_next_begins(pages, window, seed, epoch):
    pages = np.array(pages, np.int64)
    shuffled = windowed_order(seed, epoch, pages, window)
    assert sorted(shuffled.tolist()) == list(range(len(pages)))
    remaining = len(np.unique(pages))
    visited = pages[shuffled].tolist()
    start = 0
    while remaining:
        here = min(window, remaining)
        members: set[int] = set()
        end = start
        while end < len(visited) and (visited[end] in members or len(members) < here):
            members.add(visited[end])
            end += 1
        # All samples of these pages are read here.
        assert end - start == int(np.isin(pages, list(members)).sum())
        start, remaining = end, remaining - here
    assert start == len(pages)


def test_windows_hold_other_pages_in_every_epoch():
    pages = np.arange(40) // 4
    first = {frozenset(pages[windowed_order(0, epoch, pages, 2)[:8]]) for epoch in range(10)}
    assert len(first) > 5


def test_samples_are_shuffled_inside_a_window():
    pages = np.zeros(30, np.int64)
    assert windowed_order(3, 1, pages, 4).tolist() == order(3, 1, 30).tolist()


def test_a_window_without_pages_is_refused():
    with pytest.raises(ValueError, match="at least one page"):
        windowed_order(0, 0, np.arange(3), 0)
