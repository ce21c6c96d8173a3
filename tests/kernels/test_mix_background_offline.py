"""What the compiler makes of mix_background for GPUs that are not here."""

from __future__ import annotations

import re
from typing import Any

import pytest

from backmix.kernels.launch import ceil_div
from backmix.kernels.shipped import SHIPPED
from tests.kernels.support import compiled, expect_within_budget

pytestmark = pytest.mark.timeout(600)

TARGETS = (7.0, 10.5, 27.0)
"""Instructions for a stored element: as the bytes lie, flipped, with the window."""


def made(what: str) -> dict[str, dict[str, Any]]:
    return {key: made for key, made in compiled("mix_background").items() if what in key}


def test_registers_and_instructions_keep_their_budget() -> None:
    expect_within_budget("mix_background")


@pytest.mark.parametrize(
    "case",
    ["1024 x 224 px bf16", "256 x 224 px bf16, 14 x 14 cells", "256 x 223 x 224 px bf16"],
)
def test_few_instructions_make_an_element_on_hopper(case: str) -> None:
    (line,) = made(f"| {case} | sm_90").values()
    assert len(line["per_element"]) == 3, "each body is a loop of its own"
    # The figures are of full tiles; lanes beyond the end of a line count against the target, too.
    launch = SHIPPED["mix_background"]()[case]
    columns, numbers = launch.constants["COLUMNS"], 3 * launch.constants["W"]
    lanes = ceil_div(numbers, columns) * columns / numbers
    for figure, target in zip(line["per_element"], TARGETS, strict=True):
        assert figure * lanes <= target, (line["per_element"], lanes)


def test_five_blocks_share_a_processor_of_hopper() -> None:
    (line,) = made("1024 x 224 px bf16 | sm_90").values()
    warps = SHIPPED["mix_background"]()["1024 x 224 px bf16"].warps
    assert 5 * warps * 32 * ceil_div(line["registers"], 8) * 8 <= 65536


def test_every_store_is_of_16_bytes() -> None:
    for key, line in made("").items():
        stores = re.findall(r"st\.global\S*", line["ptx"])
        assert stores and set(stores) == {"st.global.v4.b32"}, (key, set(stores))


def test_nothing_is_fused_that_would_round_once_instead_of_twice() -> None:
    for key, line in made("").items():
        assert not re.search(r"\bfma\.", line["ptx"]), key
        normalised = "uint8" not in key
        assert ("sub.f32" in line["ptx"] and "mul.f32" in line["ptx"]) or not normalised, key
        assert not any("FFMA" in text for text in line["sass"]), key


def test_two_numbers_are_rounded_to_bf16_by_one_instruction() -> None:
    for key, line in made("bf16").items():
        assert "cvt.rn.bf16x2.f32" in line["ptx"], key
        assert not re.search(r"cvt\.rn\.bf16\.f32", line["ptx"]), key


def test_pixels_that_lie_as_they_go_are_loaded_8_at_a_time() -> None:
    for key, line in made("bf16").items():
        assert "ld.global.v2.b32" in line["ptx"], key
