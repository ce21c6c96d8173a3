"""Kernels come with a test and a bench case; the table of costs is what the rows give."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOORS = ("mix_background", "update_cam_bank")
DIGITS = {"mix_background": 1, "update_cam_bank": 2}
ROWS = [
    json.loads(line)
    for path in sorted((ROOT / "bench" / "results").glob("cpu-*-kernels.jsonl"))[-1:]
    for line in path.read_text().splitlines()
]


@pytest.mark.parametrize("name", DOORS)
def test_a_kernel_has_its_test_file_and_its_bench_case(name: str) -> None:
    assert (ROOT / "kernels" / f"{name}.py").exists()
    assert (ROOT / "tests" / "kernels" / f"test_{name}.py").exists()
    assert f'"{name}"' in (ROOT / "bench" / "bench_kernels.py").read_text()


def test_the_table_of_costs_is_current() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert ROWS
    for row in ROWS:
        low, middle, high = (
            f"{row[key]:.{DIGITS[row['kernel']]}f}" for key in ("ms_p20", "ms_p50", "ms_p80")
        )
        assert f"{middle} ({low}-{high})" in page, (row["case"], row["form"])
