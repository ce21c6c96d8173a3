"""Subsets: class lists as arithmetic, and a held-out share that is stratified and stable."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmix.pipeline.subset import Subset, hold_out, select


def test_labels_are_positions_in_the_class_list():
    subset = select(np.array([3, 0, 5, 3, 1, 5]), [5, 3])
    assert subset.index.tolist() == [0, 2, 3, 5]
    assert subset.labels.tolist() == [1, 0, 1, 0]


def test_a_class_that_the_data_lack_selects_nothing():
    assert len(select(np.array([0, 1, 1]), [7])) == 0


def test_a_class_named_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        select(np.array([0, 1]), [1, 1])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.floats(0, 0.99), st.integers(0, 99))
def test_a_held_out_share_is_exact_per_class_and_splits_the_set(stored, share, seed):
    labels = np.array(stored)
    whole = Subset(np.arange(len(labels)) * 3, labels)
    rest, held = hold_out(whole, share, seed)
    assert sorted([*rest.index, *held.index]) == whole.index.tolist()
    label_of = dict(zip(whole.index.tolist(), stored, strict=True))
    for part in (rest, held):
        assert [label_of[i] for i in part.index.tolist()] == part.labels.tolist()
        assert (np.diff(part.index) > 0).all()
    for label in set(stored):
        expected = int(share * stored.count(label) + 0.5)
        assert (held.labels == label).sum() == expected


def test_a_larger_share_holds_out_the_same_samples_and_more():
    whole = Subset(np.arange(200), np.arange(200) % 4)
    small, large = (set(hold_out(whole, share, 5)[1].index.tolist()) for share in (0.1, 0.4))
    assert small < large
    assert small != set(hold_out(whole, 0.1, 6)[1].index.tolist())


def test_a_share_outside_its_range_is_refused():
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="share"):
            hold_out(Subset(np.arange(3), np.zeros(3, int)), share, 0)
