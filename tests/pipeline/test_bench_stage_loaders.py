"""The bench's stage of the loaders: what is measured first, what the clock counts, who is left out.

No GPU is needed: all of it runs on the CPU with tiny images; what only a GPU can do is not tested.
"""

import os
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import codec, rows, stage_loaders
from bench.stage_loaders import FORMS, FULL, TINY, Beside, Point, Stage, deliver, points

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
INSTALLED = {form for form, package in FORMS.items() if stage_loaders.installed(package)}


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), "--stage", "loaders", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
    )


def test_the_most_wanted_is_measured_first_and_every_number_of_threads_somewhere() -> None:
    found = points(FULL, ["original", "s256"], [*FORMS], 16)
    assert len(found) == len(set(found)) == len({(point.case, point.name) for point in found})
    assert {point.threads for point in found} == {1, 2, 4, 8, 16}
    whole = [point.threads == 16 for point in found]
    assert whole == sorted(whole, reverse=True), "all threads first"
    for side in (224, 160):
        for name in ("original", "s256"):
            beside = {
                p.name for p in found if p.case.startswith(f"{name}, {side} px, 16") if p.beside
            }
            assert {"turbo", "turbo_region", "dali, engine 0", "dali, engine 1"} <= beside
    assert {point.threads for point in points(FULL, ["a"], ["turbo"], 6)} == {1, 2, 4}


def test_the_clock_counts_what_arrives_while_it_runs() -> None:
    made = 0

    def stream() -> Generator[int]:
        nonlocal made
        while True:
            time.sleep(0.3 if made < 3 else 0.004)  # opening is slow
            made += 1
            yield 8

    source = stream()
    found = deliver(source, SimpleNamespace(seconds=0.2, least=2), CPU)  # type: ignore[arg-type]
    assert found.images == 8 * len(found.ms) < 8 * made
    assert 0.2 <= found.wall < 0.4
    assert 0.4 < rows.Times(found.ms).median < 2, "0.5 ms for an image"
    assert found.cpu < found.wall, "waiting is no work"
    assert next(source) == 8, "the stream goes on"


class Step:
    """Stands in for a training: a step is 10 ms of waiting."""

    taken = 0

    def take(self, count: int) -> None:
        time.sleep(0.01 * count)
        self.taken += count


def test_a_training_goes_on_until_its_block_ends_and_no_longer() -> None:
    beside = Beside(Step(), CPU, None)  # type: ignore[arg-type]
    times = beside.alone(0.1)
    assert 9 < times.median < 30 and beside.ms == times.median and beside.cpu < 0.01
    with beside.trains() as ends:
        before = len(ends)
        time.sleep(0.1)
        assert len(ends) >= before + 3
    taken = beside.training.taken  # type: ignore[attr-defined]
    time.sleep(0.05)
    assert beside.training.taken == taken  # type: ignore[attr-defined]


def test_a_training_that_fails_is_not_taken_for_a_quick_one() -> None:
    def failing(count: int) -> None:
        raise ValueError("no step")

    beside = Beside(SimpleNamespace(take=failing), CPU, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no step"), beside.trains():
        pass
    with pytest.raises(ValueError, match="no step"):
        beside.alone(0.1)


def test_a_form_that_fails_again_and_again_is_left_out_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def broken_dali(stage: Stage, point: Point) -> Generator[int]:
        opened.append(point.form)
        if point.form == "dali":
            raise RuntimeError("no engine")
        while True:
            yield 4

    monkeypatch.setattr(stage_loaders, "open_stream", broken_dali)
    monkeypatch.setattr(stage_loaders, "trained", lambda _: Beside(Step(), CPU, None, 10.0))  # type: ignore[arg-type]
    out = rows.Rows(tmp_path / "a.jsonl", {"bench": "loaders", "stage": "loaders", "device": "x"})
    data = {"original": Path("a"), "s256": Path("b")}
    setting = replace(TINY, seconds=0.1)
    stage = Stage(setting, data, CPU, out, time.perf_counter() + 60, ["dali", "turbo"])
    stage_loaders.measure(stage)
    assert opened.count("dali") == stage_loaders.PATIENCE == len(stage.reasons)
    found = {(row["case"], row["form"]) for row in out.all()}
    wanted = points(TINY, [*data], ["turbo"], stage_loaders.usable_cores())
    assert found == {(point.case, "turbo") for point in wanted}
    for row in out.all():
        slower = row["config"]["step_slower"]
        assert 0.5 < slower < 10 if "beside" in row["case"] else slower is None

    late = Stage(TINY, data, CPU, out, time.perf_counter(), ["turbo"])
    stage_loaders.measure(late)
    assert late.left == len(wanted) and opened.count("turbo") == len(wanted), (
        "no time, nothing done"
    )


def test_kernels_whose_long_names_begin_alike_are_added_up() -> None:
    template = "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda"
    times = [(f"{template}(unsigned char)", 3.0), (f"{template}(float)", 4.0)]
    times += [(f"short {n}", 0.1) for n in range(20)]
    found = stage_loaders.longest(times)
    assert found["all"] == pytest.approx(9.0), "nothing is lost"
    assert found[template[:60]] == 7.0 and len(found) == 1 + 12


def test_made_photographs_are_as_large_as_those_of_imagenet(tmp_path: Path) -> None:
    sizes = []
    for seed in range(3):
        stage_loaders.photograph(FULL.height_width, seed).save(tmp_path / "a.jpg", quality=92)
        sizes.append((tmp_path / "a.jpg").stat().st_size)
    assert 85_000 < sum(sizes) / 3 < 125_000


@pytest.mark.skipif("nvimgcodec" not in INSTALLED, reason="nvImageCodec is not installed")
@pytest.mark.parametrize("whole", [False, True])
def test_nvimagecodec_alone_decodes_the_stated_pixels_on_the_cpu(
    tmp_path: Path, whole: bool
) -> None:
    data = stage_loaders.made(TINY, tmp_path)["original"]
    away = codec.distances(codec.decoder(1, CPU, 0.0, whole), data, 5, 11)
    assert away.shape == (11, codec.REGION, codec.REGION, 3) and not away.any()


def test_a_stage_runs_from_end_to_end(tmp_path: Path) -> None:
    check_stage(launch("--tiny", "--form", "turbo", "--out", str(tmp_path)), tmp_path, {"turbo"})


@pytest.mark.slow  # half a minute
@pytest.mark.skipif(not find_spec("nvidia"), reason="neither DALI nor nvImageCodec is installed")
def test_every_form_delivers_alone_and_beside_a_training_and_again_for_nothing(
    tmp_path: Path,
) -> None:
    words = ("--tiny", "--skip-done", "--out", str(tmp_path))
    check_stage(launch(*words), tmp_path, INSTALLED)
    found = rows.load([tmp_path / "loaders.jsonl"])
    pixels = [row for row in found if row["case"].startswith("pixels")]
    assert len(pixels) == 3 * len({"dali", "nvimgcodec"} & INSTALLED)
    for row in pixels:
        assert row["config"]["repeats"] and row["config"]["largest_inside"] <= 1
    assert launch(*words).returncode == 0
    again = rows.load([tmp_path / "loaders.jsonl"])
    assert [row["form"] for row in again[len(found) :]] == ["stage"]


def check_stage(done: subprocess.CompletedProcess[str], folder: Path, forms: set[str]) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = rows.load([folder / "loaders.jsonl"])
    assert "failed: nothing" in found[-1]["note"] and found[-1]["form"] == "stage"
    timed = [row for row in found if "images_per_s" in (row["config"] or {})]
    cores = stage_loaders.usable_cores()
    wanted = points(TINY, ["original", "s256"], [form for form in FORMS if form in forms], cores)
    assert {(row["case"], row["form"]) for row in timed} == {(p.case, p.name) for p in wanted}
    for row in timed:
        assert row["config"]["images_per_s"] > 0 and row["n"] >= 2
    seam = {row["form"] for row in found if row["case"].startswith("seam")}
    assert {"copy", "mix_background"} <= seam


def test_a_dry_run_prints_what_would_be_timed_and_runs_every_form_once() -> None:
    done = launch("--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "s256, 160 px, 16 threads, beside training: " in done.stdout
    for form in INSTALLED:
        assert f"{form}: 8 images on the CPU" in done.stdout
