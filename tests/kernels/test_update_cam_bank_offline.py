"""What the compiler makes of update_cam_bank and of the device's draws, without a GPU."""

import re

import pytest

from tests.kernels.support import compiled, expect_within_budget

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("kernel", ["update_cam_bank", "mix_draws"])
def test_registers_stack_and_instructions_are_within_budget(kernel: str) -> None:
    expect_within_budget(kernel)


def test_channels_last_features_are_loaded_16_bytes_at_a_time() -> None:
    for key, made in compiled("update_cam_bank").items():
        if "NCHW" not in key:
            assert "ld.global.v4.b32" in made["ptx"], key
            # What is narrower belongs to the cells, not to the channels.
            narrow = re.findall(r"ld\.global(?:\.v2)?\.[bu]16 ", made["ptx"])
            assert len(narrow) <= 1, key


def test_a_turn_asks_for_all_its_bytes_before_it_uses_the_first() -> None:
    # 8 loads of features and 4 of the weight: 32 KB of a block are on the way at once.
    made = {key: one for key, one in compiled("update_cam_bank").items() if " bf16 |" in key}
    assert made
    for key, one in made.items():
        assert first_loads(one["sass"]) >= 12, key


def first_loads(sass: list[str]) -> int:
    """Return the longest run of 16-byte loads with no arithmetic on floats in between."""
    longest = run = 0
    for line in sass:
        if "LDG" in line and ".128" in line:
            run += 1
        elif "FFMA" in line:
            run = 0
        longest = max(longest, run)
    return longest


def test_the_greatest_cell_is_divided_to_exactly_1() -> None:
    for key, made in compiled("update_cam_bank").items():
        assert "div.rn.f32" in made["ptx"] and "div.full" not in made["ptx"], key


def test_nothing_is_added_atomically() -> None:
    for key, made in compiled("update_cam_bank").items():
        assert not re.search(r"\b(atom|red)\.global", made["ptx"]), key
