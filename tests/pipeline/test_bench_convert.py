"""The bench of converting: every form stores all images, and the figures are what they say."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from backmix.pipeline.beton import Flag, open_beton
from bench import bench_convert
from tests.images import class_folders

N = 40


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    class_folders(root / "few", each=3)
    bench_convert.linked(root / "few", root / "images", N)
    return root


def test_files_are_repeated_in_turn(linked: Path) -> None:
    links = sorted(linked.glob("images/*/*.jpg"), key=lambda link: link.name)
    assert len(links) == N
    targets = [link.resolve().relative_to((linked / "few").resolve()).as_posix() for link in links]
    first = ["cat/0.jpg", "cat/1.jpg", "cat/2.jpg", "dog/0.jpg", "dog/1.jpg", "dog/2.jpg"]
    assert targets == [first[k % 6] for k in range(N)]


@pytest.mark.parametrize("form", bench_convert.OURS)
def test_a_lap_of_ours_stores_every_image_as_the_form_says(linked: Path, form: str) -> None:
    out = linked / f"{form}.beton"
    found = bench_convert.timed(bench_convert.open_form(form, linked / "images", out, 1))
    assert (found["images"], found["bytes"]) == (N, out.stat().st_size)
    assert 0 < found["wall"] < 60 and 0 < found["cpu"]
    with open_beton(out) as data:
        assert data.n == N and data.flags is not None
        copied = data.flags & Flag.PASSTHROUGH != 0
        assert copied.all() == copied.any() == (form != "encoded")


@pytest.mark.slow  # compiles nothing, but imports ffcv twice
@pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="ffcv is not installed")
def test_forms_take_turns_and_become_rows(linked: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "bench.bench_convert", "--images", linked / "few"]
    words += ["--count", "20", "--rounds", "2", "--workers", "1", "--out", tmp_path]
    words += ["--form", "unchecked", "--form", "stock_ffcv"]
    root = Path(bench_convert.__file__).parents[1]
    done = subprocess.run(
        [str(word) for word in words],
        cwd=root,
        env={"PYTHONPATH": f"{root / 'src'}:{root}", "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
        capture_output=True,
        text=True,
        check=True,
        timeout=110,
    )
    ours, stock = done.stdout.splitlines()
    assert "x stock_ffcv" in ours and "x" not in stock.split("stock_ffcv")[1]
    rows = [json.loads(line) for line in (tmp_path / "convert.jsonl").read_text().splitlines()]
    assert [row["form"] for row in rows] == ["unchecked"] * 2 + ["stock_ffcv"] * 2
    assert all(row["n"] == 2 and row["ms_p50"] > 0 for row in rows)


def test_the_time_of_children_counts() -> None:
    def lap() -> tuple[int, int]:
        code = "import time\nwhile time.process_time() < 0.4: pass"
        subprocess.run([sys.executable, "-c", code], check=True)
        return 1, 1

    begin = time.process_time()
    found = bench_convert.timed(lap)
    assert found["cpu"] >= 0.35 and time.process_time() - begin < 0.3


def test_ratios_are_medians_over_the_turns() -> None:
    def laps(*seconds: float) -> list[dict[str, float]]:
        return [{"images": 10, "wall": s} for s in seconds]

    assert bench_convert.ratio(laps(1, 2, 10), laps(2, 3, 5), "wall") == (0.5, 1.5, 2.0)


def test_made_photographs_take_as_many_bytes_as_real_ones(tmp_path: Path) -> None:
    bench_convert.photographs(tmp_path / "made", 3)
    sizes = [path.stat().st_size for path in (tmp_path / "made").iterdir()]
    assert len(sizes) == 3 and 0.2 < np.mean(sizes) / (375 * 500) < 1.0
