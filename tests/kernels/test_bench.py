"""Bench rows: complete, and about what they say."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = set(runpy.run_path(str(ROOT / "bench" / "bench_kernels.py"))["KEYS"])


@pytest.mark.parametrize(
    "file", sorted((ROOT / "bench" / "results").glob("*-kernels.jsonl")), ids=lambda file: file.name
)
def test_every_stored_row_has_every_key(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows
    for row in rows:
        assert set(row) == KEYS
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["n"] >= 20


@pytest.mark.slow
def test_the_bench_writes_a_row_for_every_form(tmp_path: Path) -> None:
    bench = [sys.executable, str(ROOT / "bench" / "bench_kernels.py"), "--results", str(tmp_path)]
    subprocess.run(
        [*bench, "--seconds", "0", "--threads", "1"],
        check=True,
        capture_output=True,
        timeout=110,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
    )
    (file,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(row["kernel"], row["form"]) for row in rows} == {
        ("mix_background", "gather_normalise"),
        ("mix_background", "gather_normalise_lines"),
        ("mix_background", "eager"),
        ("update_cam_bank", "plain_whole_images"),
        ("update_cam_bank", "eager"),
    }
    assert all(set(row) == KEYS and row["device"].startswith("CPU") for row in rows)
