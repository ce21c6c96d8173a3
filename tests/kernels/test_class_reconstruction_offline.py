"""What the compiler makes of class_reconstruction, for GPUs that are not here."""

import re

import pytest

from tests.kernels.support import compiled, expect_within_budget

pytestmark = pytest.mark.timeout(600)


def test_no_launch_is_hollow_spills_or_leaves_its_budget() -> None:
    expect_within_budget("class_reconstruction")


def test_products_run_on_the_matrix_pipes_of_each_generation() -> None:
    wanted = {
        "sm_80": r"mma\.sync\.aligned\.m16n8k16\S*bf16",
        "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n(128|64)k16\.f32\.bf16\.bf16",
        "sm_100": r"tcgen05\.mma\S*kind::f16",
    }
    for key, made in compiled("class_reconstruction").items():
        if "bf16" in key:
            assert re.search(wanted[key.split(" | ")[2]], made["ptx"]), key


def test_factors_are_copied_8_or_16_bytes_at_a_time() -> None:
    for key, made in compiled("class_reconstruction").items():
        if "bf16" in key:
            sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x(\w+)", made["ptx"])
            # 4 bytes are one fp32 number of a row: its gradient, or its sum so far.
            assert "10" in sizes and set(sizes) <= {"4", "8", "10"}, key


def test_a_sign_is_one_instruction_on_hopper() -> None:
    for key, made in compiled("class_reconstruction").items():
        if "errors" in key or "fp32" in key or not key.endswith("sm_90"):
            continue
        assert "min.xorsign.abs.f32" in made["ptx"], key
