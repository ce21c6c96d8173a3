"""The benches of the loaders: every form delivers all images, and the figures are what they say."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest

from bench import bench_loaders, parity
from tests.pipeline.photos import write_photos

N, JPEGS = 37, 24


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos.beton", N)


def installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("form", ["turbo", "turbo_region", "dali", "plain_dali"])
def test_a_lap_shows_every_jpeg_as_often_as_asked(photos, form):
    if "dali" in form and not installed("nvidia-dali-cuda130"):
        pytest.skip("DALI is not installed: not tested")
    if "region" in form and not installed("nvidia-nvimgcodec-cu13"):
        pytest.skip("nvImageCodec is not installed: not tested")
    lap = bench_loaders.open_form(form, photos, 32, 8, 2, "cpu")
    found = bench_loaders.timed(lap, 3)
    assert found["images"] == 3 * JPEGS
    assert 0 < found["cpu"] and 0 < found["wall"] < 20


def test_work_done_behind_the_lap_belongs_to_it():
    """A lap that returns early, as a reader's that works ahead, is timed to the end of its work."""
    import threading
    import time

    def burn(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    def lap(epochs: int) -> int:
        threading.Thread(target=burn, args=(0.3,)).start()
        return epochs

    found = bench_loaders.timed(lap, 2)
    assert found["images"] == 2 and found["cpu"] >= 0.28 and found["wall"] >= 0.28


def test_ratios_are_medians_over_the_turns(capsys):
    def laps(*seconds: float) -> list[dict[str, float]]:
        return [{"images": 10, "cpu": s, "wall": 2 * s} for s in seconds]

    bench_loaders.report({"turbo": laps(1, 2, 10), "stock_ffcv": laps(2, 3, 5)})
    ours, stock = capsys.readouterr().out.splitlines()
    assert "5.0 img/cpu-s (1.50 x stock_ffcv)" in ours and "2.5 img/wall-s" in ours
    assert "3.3 img/cpu-s" in stock and "x" not in stock


def test_the_figures_of_a_distance_are_those_of_its_values():
    away = np.zeros((1, 40, 25, 3), np.uint8)
    away[0, 0, 0], away[0, 5, 5, 0] = 9, 2
    found = parity.figures(away)
    assert found == {"mean": 29 / 3000, "p999": 2, "largest": 9, "largest_inside": 2, "images": 1}
    assert parity.figures(np.full((1, 4, 4, 3), 7, np.uint8))["p999"] == 7


def test_turbo_delivers_the_stated_pixels(photos):
    assert not parity.distances("turbo", photos, 24, 1).any()
