"""How views grow: the published rule, and what of it can be asked for; options that do nothing."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmix.pipeline.options import LoaderOptions, refuse_idle, size_at


def published(epoch: int, small: int, full: int, start: int, end: int) -> int:
    """The rule as ffcv's ImageNet training script has it."""
    if epoch <= start:
        return small
    if epoch >= end:
        return full
    between = np.interp([epoch], [start, end], [small, full])
    return int(np.round(between[0] / 32)) * 32


def test_the_published_recipe_of_16_epochs():
    options = LoaderOptions(size=192, grow_from=160, grow=(11, 13))
    assert [size_at(options, epoch) for epoch in range(16)] == [160] * 12 + [192] * 4


def test_growth_in_several_steps_by_hand():
    options = LoaderOptions(size=224, grow_from=96, grow=(2, 10))
    sizes = [size_at(options, epoch) for epoch in range(12)]
    assert sizes == [96, 96, 96, 128, 128, 128, 160, 192, 192, 192, 224, 224]


@given(
    epoch=st.integers(0, 200),
    small=st.integers(1, 12),
    more=st.integers(0, 12),
    start=st.integers(0, 100),
    length=st.integers(0, 100),
)
def test_growth_follows_the_published_rule(epoch, small, more, start, length):
    small, full, end = 32 * small, 32 * (small + more), max(1, start + length)
    options = LoaderOptions(size=full, grow_from=small, grow=(start, end))
    assert size_at(options, epoch) == published(epoch, small, full, start, end)


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 20), st.integers(1, 20))
def test_a_growing_view_never_shrinks_nor_leaves_its_range(small, more, start, length):
    options = LoaderOptions(size=small + more, grow_from=small, grow=(start, start + length))
    sizes = [size_at(options, epoch) for epoch in range(50)]
    assert sizes == sorted(sizes) and sizes[0] == small and sizes[-1] == small + more


def test_without_growth_every_epoch_has_the_full_size():
    assert {size_at(LoaderOptions(size=50), epoch) for epoch in range(20)} == {50}


@pytest.mark.parametrize("epoch", [0, 3])
def test_growth_of_no_length_is_a_jump_after_its_epoch(epoch):
    options = LoaderOptions(size=64, grow_from=32, grow=(3, 3))
    assert size_at(options, epoch) == 32 and size_at(options, 4) == 64


# --- options that do nothing ----------------------------------------------------------------------

DALI = {
    "hw_share": 0.5,
    "device_memory_padding": 1,
    "host_memory_padding": 1,
    "preallocate_hint": (1, 1),
}
USES = {
    "auto": {"decoder"},
    "turbo": {"decoder"},
    "resident": set(),
    "ffcv": set(),
    "dali": set(DALI),
    "fastest": {"decoder", *DALI},
}


@pytest.mark.parametrize("loader", USES)
@pytest.mark.parametrize(("name", "value"), [("decoder", "full"), *DALI.items()])
def test_an_option_of_another_loader_is_refused(loader: Any, name: str, value: Any) -> None:
    options = dataclasses.replace(LoaderOptions(loader=loader), **{name: value})
    if name in USES[loader]:
        refuse_idle(options)
    else:
        flag = "--loader." + name.replace("_", "-")
        with pytest.raises(ValueError, match=f"{flag} does nothing with --loader.loader {loader}:"):
            refuse_idle(options)


def test_what_is_not_set_is_no_mistake() -> None:
    for loader in USES:
        options: Any = {"loader": loader}
        refuse_idle(LoaderOptions(**options))


def test_a_window_needs_windowed_order() -> None:
    refuse_idle(LoaderOptions(order="windowed", window=3))
    with pytest.raises(ValueError, match=r"--loader.window does nothing without --loader.order"):
        refuse_idle(LoaderOptions(window=3))
