"""Decoding no more than the crop: the pixels of the whole image, and no damage let through."""

import dataclasses
import io
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from backmix.pipeline import regions
from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.beton import JPG, open_set
from backmix.pipeline.convert import convert
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import ConvertOptions, LoaderOptions
from backmix.pipeline.regions import Regions
from tests.pipeline.photos import (
    damage,
    open_descriptors,
    photo,
    record,
    warning_record,
    write_photos,
    write_records,
)

N = 37
ROOT = Path(__file__).parents[2]


def installed() -> bool:
    try:
        return find_spec("nvidia.nvimgcodec") is not None
    except ImportError:
        return False


needs_package = pytest.mark.skipif(
    not installed(), reason="nvImageCodec is not installed: decoding regions was not tested"
)


def options(**changes) -> LoaderOptions:
    chosen: dict[str, Any] = {
        "loader": "turbo",
        "batch": 8,
        "size": 24,
        "crop": "random",
        "threads": 2,
    }
    return LoaderOptions(**chosen | {"decoder": "region", "max_bad": 0.2} | changes)


START = Place(1)


def read(path: Path, place: Place = START, split: Any = "train", **changes) -> list[Batch]:
    with open_loader(path, options(**changes), split=split) as loader:
        return list(loader.batches(place))


def assert_same(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        for name in ("pool", "index", "labels", "boxes", "status"):
            assert (getattr(one, name) == getattr(other, name)).all(), name


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """Widths of the images of which regions were decoded, without those of the proof."""
    widths, decode = [], Regions.decode

    def noting(self, stored, box, width):
        widths.append(width)
        return decode(self, stored, box, width)

    prove = Regions._prove

    def proving(self):
        prove(self)
        widths.clear()

    monkeypatch.setattr(Regions, "decode", noting)
    monkeypatch.setattr(Regions, "_prove", proving)
    return widths


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """37 samples as the converter leaves them, every third raw."""
    return write_photos(tmp_path_factory.mktemp("photos") / "photos.beton", N, check="scaled")


# --- pixels ---------------------------------------------------------------------------------------


def encoded(kind: str, pixels: np.ndarray) -> bytes:
    if kind in ("444", "422", "420", "440", "411"):
        return simplejpeg.encode_jpeg(pixels, 88, "RGB", kind)
    if kind == "gray":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[:, :, :1]), 88, "GRAY", "Gray")
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if kind == "progressive gray":
        image.convert("L").save(file, "JPEG", progressive=True)
    elif kind == "rgb":  # no YCbCr: told by Adobe's mark
        image.save(file, "JPEG", keep_rgb=True)
    elif kind == "restarts":
        image.save(file, "JPEG", subsampling=2, restart_marker_blocks=3)
    else:
        image.save(file, "JPEG", progressive=True, subsampling=int(kind[-1]))
    return file.getvalue()


KINDS = ["444", "422", "420", "440", "411", "gray", "rgb", "restarts"]
KINDS += ["progressive 0", "progressive 1", "progressive 2", "progressive gray"]


@needs_package
@pytest.mark.parametrize("kind", KINDS)
def test_a_region_has_the_pixels_of_the_whole_image(photos, kind):
    """At odd sizes, down to one pixel, at every edge."""
    generator = np.random.default_rng(0)
    with open_set(photos) as data:
        decoder = Regions(data, True)
        for height, width in [(1, 1), (5, 61), (61, 5), (16, 16), (17, 33), (63, 65), (101, 99)]:
            grain = generator.normal(0, 20, (height, width, 3))
            pixels = (photo(height, width, 1) + grain).clip(0, 255).astype(np.uint8)
            stored = np.frombuffer(encoded(kind, pixels), np.uint8)
            whole = simplejpeg.decode_jpeg(stored, "RGB")
            boxes = [(0, 0, height, 1), (0, width - 1, height, 1), (height - 1, 0, 1, width)]
            for _ in range(60):
                h, w = generator.integers(1, [height + 1, width + 1]).tolist()
                y0, x0 = generator.integers(0, [height - h + 1, width - w + 1]).tolist()
                boxes.append((y0, x0, h, w))
            for y0, x0, h, w in boxes:
                part = decoder.decode(stored, np.array([y0, x0, h, w]), width)
                assert part is not None
                assert np.array_equal(part, whole[y0 : y0 + h, x0 : x0 + w]), (y0, x0, h, w)


@needs_package
@pytest.mark.parametrize("threads", [1, 5])
def test_turbo_delivers_the_same_with_and_without_regions(photos, used, threads):
    for place in (Place(3), Place(3, 5), Place(3, 5, 19)):
        whole = read(photos, place, decoder="full")
        assert not used
        assert_same(read(photos, place, threads=threads), whole)
        assert_same(read(photos, place, decoder="auto", threads=threads), whole)
        assert used
        used.clear()
    assert_same(read(photos, split="eval"), read(photos, split="eval", decoder="full"))
    assert used


@needs_package
def test_every_region_is_of_a_jpeg_whose_crop_leaves_something_out(photos, used):
    with open_set(photos) as data:
        jpegs = int((data.modes == JPG).sum())
    assert_same(read(photos, crop="whole"), read(photos, crop="whole", decoder="full"))
    assert not used
    read(photos, scale=(0.1, 0.2))
    assert len(used) == jpegs


@pytest.mark.real
@needs_package
def test_turbo_delivers_the_same_of_real_photographs(tmp_path, used):
    source = Path(os.environ["BACKMIX_DATA"]) / "imagenet-sample"
    path = tmp_path / "real.beton"
    convert(f"folder:{source}", path, ConvertOptions())
    for epoch in range(3):
        place = Place(0, epoch)
        size: dict[str, Any] = {"size": 160, "batch": 64}
        assert_same(read(path, place, **size), read(path, place, decoder="full", **size))
    assert len(used) > 150  # in the last epoch


# --- damage ---------------------------------------------------------------------------------------


@needs_package
def test_damage_behind_the_crop_is_found_as_without_regions(tmp_path, used):
    path = write_photos(tmp_path / "x.beton", N, check="scaled")
    with open_set(path) as data:
        for sample in (5, 7):
            damage(path, sample, at=int(data.byte_sizes[sample]) - 20)
    for split in ("train", "eval"):
        batches = read(path, split=split)
        assert used
        assert_same(batches, read(path, split=split, decoder="full"))
        delivered = np.concatenate([batch.index.numpy() for batch in batches])
        assert not np.isin(delivered, [5, 7]).any()
    with pytest.raises(ValueError, match=r"sample [57] .*checksum"):
        read(path, on_bad="error")


@needs_package
@pytest.mark.parametrize(("check", "verify"), [("", True), ("none", True), ("full", False)])
def test_bytes_that_nobody_vouches_for_are_decoded_whole(tmp_path, used, check, verify):
    """A scan that ends early, behind the crop: no region's decoder would see it."""
    records = [record(k, JPG, (60, 60)) for k in range(12)]
    records[3] = dataclasses.replace(records[3], data=records[3].data[:-60] + b"\xff\xd9")
    path = write_records(tmp_path / "x.beton", records, check)
    batches = read(path, split="eval", verify=verify, eval_crop=0.3)
    assert not used
    assert 3 not in np.concatenate([batch.index.numpy() for batch in batches])


@needs_package
def test_a_known_warning_is_reported_as_without_regions(tmp_path, used):
    records = [*(record(k, JPG, (50, 40)) for k in range(6)), warning_record(6)]
    path = write_records(tmp_path / "x.beton", records, "scaled")
    (batch,) = read(path, split="eval")
    assert batch.status.tolist() == [0] * 6 + [1] and len(used) == 6


@needs_package
def test_what_the_package_cannot_decode_is_decoded_whole(photos, monkeypatch):
    expected = read(photos, decoder="full")
    loader = open_loader(photos, options())
    monkeypatch.setattr(Regions, "decode", lambda *arguments: None)
    with loader:
        assert_same(list(loader.batches(Place(1))), expected)


# --- the package ----------------------------------------------------------------------------------


@needs_package
def test_a_package_with_other_pixels_is_not_used(photos, monkeypatch):
    decode = Regions.decode

    def off_by_one(*arguments):
        part = decode(*arguments)
        return None if part is None else part ^ 1

    expected = read(photos, decoder="full")
    monkeypatch.setattr(Regions, "decode", off_by_one)
    with pytest.raises(ValueError, match=r"other pixels .*--loader.decoder full"):
        read(photos)
    assert_same(read(photos, decoder="auto"), expected)


def test_without_the_package_auto_decodes_whole_and_region_says_how_to_get_it(photos, monkeypatch):
    expected = read(photos, decoder="full")
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    before = threading.active_count(), open_descriptors()
    with pytest.raises(ValueError, match=r"pip install 'backmix\[region\]'"):
        open_loader(photos, options())
    assert (threading.active_count(), open_descriptors()) == before
    assert_same(read(photos, decoder="auto"), expected)


@needs_package
def test_loaders_with_regions_leave_no_thread_and_no_file_behind(photos):
    read(photos)
    before = threading.active_count(), open_descriptors()
    for epoch in range(20):
        with open_loader(photos, options()) as loader:
            for _ in loader.batches(Place(0, epoch)):
                break
    assert (threading.active_count(), open_descriptors()) == before


@needs_package
def test_importing_the_package_prints_nothing_and_leaves_stderr_as_it_was():
    """It complains in red of every GPU library that it misses."""
    code = (
        "import os\n"
        "from backmix.pipeline import regions\n"
        "regions._load()\n"
        "os.write(2, b'still here')\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0 and done.stderr == "still here"


def test_silence_swallows_native_output_and_ends(capfd):
    with regions._silence():
        os.write(2, b"swallowed")
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"
