"""What the compiler makes of location_confidence for GPUs that are not here."""

from __future__ import annotations

import re

import pytest

from tests.kernels.support import compiled, expect_within_budget

pytestmark = pytest.mark.timeout(600)

PRODUCTS = {"sm_80": "mma.sync.aligned", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


def test_registers_and_instructions_keep_their_budget() -> None:
    expect_within_budget("location_confidence")


@pytest.mark.parametrize("arch", PRODUCTS)
def test_16_bit_products_run_on_the_tensor_cores(arch: str) -> None:
    found = {key: made for key, made in compiled("location_confidence").items() if arch in key}
    products = [made["ptx"] for key, made in found.items() if "bf16" in key]
    assert len(products) == 3
    for ptx in products:
        assert PRODUCTS[arch] in ptx
        # Features and weight go to shared memory past the registers, 16 bytes at a time.
        assert set(re.findall(r"cp\.async\.c[ag]\.\S+ \[[^,]*, \[[^,]*, (\S+?),", ptx)) == {"0x10"}


def test_fp32_products_are_fp32() -> None:
    for key, made in compiled("location_confidence").items():
        if "fp32" in key:
            assert "tf32" not in made["ptx"] and "fma.rn.f32" in made["ptx"]


def test_a_step_of_hopper_overlaps_the_next() -> None:
    for key, made in compiled("location_confidence").items():
        if "bf16 | sm_90" in key and "x 10 " not in key:
            # The wait of the loop leaves the newest product under way.
            assert re.search(r"wgmma\.wait_group\.sync\.aligned\s+1;", made["ptx"])


def test_logits_never_leave_the_registers() -> None:
    for key, made in compiled("location_confidence").items():
        # Three numbers, or two, of each location, by as many threads as hold a part of it.
        stores = sum("st.global" in line for line in made["ptx"].splitlines())
        assert stores <= 3 * 8, (key, stores)
