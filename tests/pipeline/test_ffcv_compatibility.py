"""Both directions with the real ffcv package: it reads what we write, we read what it writes.

ffcv runs in processes of its own: importing it changes torch's number of threads, its Loader leaves
threads behind, and an error in its pipeline is a hang, which here is a timeout.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from backmix.pipeline.beton import JPG, RAW, open_beton
from backmix.pipeline.writer import Record, Writer

pytestmark = [
    pytest.mark.slow,  # ffcv's import takes seconds, and every Loader compiles its pipeline
    pytest.mark.skipif(
        importlib.util.find_spec("ffcv") is None, reason="ffcv is not installed: not run"
    ),
]

SIDE = (48, 40)
PAGE = 1 << 21

LOAD = """
import sys
import numpy as np
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from ffcv.transforms import ToTensor

target, *files = sys.argv[1:]
found = {}
for k, file in enumerate(files):
    file, cache = file.rsplit(":", 1)
    reader = Reader(file)
    found[f"{k}.table"] = reader.alloc_table.view("<u8").reshape(-1, 3)
    found[f"{k}.names"] = np.array(reader.field_names)
    image = reader.metadata["f0"]
    found[f"{k}.records"] = np.stack([image[key] for key in image.dtype.names], 1).astype(np.uint64)
    found[f"{k}.labels"] = reader.metadata["f1"]
    if cache == "none":
        continue
    pipelines = {
        "image": [SimpleRGBImageDecoder(), ToTensor()],
        "label": [IntDecoder(), ToTensor()],
    }
    loader = Loader(file, batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL,
                    drop_last=False, os_cache=cache == "os", pipelines=pipelines)
    # A batch is a view of a buffer that is written again.
    batches = [(images.numpy().copy(), labels.numpy().copy()) for images, labels in loader]
    found[f"{k}.pixels"], found[f"{k}.loaded"] = (np.concatenate(part) for part in zip(*batches))
np.savez(target, **found)
"""

WRITE = """
import multiprocessing
import sys
import numpy as np
from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
from ffcv.writer import DatasetWriter

multiprocessing.set_start_method("fork", force=True)
source, folder = sys.argv[1:]
with np.load(source) as stored:
    images = [stored[f"arr_{k}"] for k in range(len(stored.files))]


class Images:
    def __len__(self):
        return len(images)

    def __getitem__(self, i):
        return images[i], i % 5


class Everything(Images):
    def __getitem__(self, i):
        blob = np.arange(i + 1, dtype=np.uint8)
        return blob, i / 2, images[i], np.full(3, i), {"i": int(i)}, i % 5


modes = {
    "raw": {},
    "jpg": {"jpeg_quality": 80},
    "smart": {"smart_threshold": 40 * 40 * 3},
    "proportion": {"compress_probability": 0.5},
}
for mode, options in modes.items():
    for workers in (1, 2):
        fields = {"image": RGBImageField(write_mode=mode, **options), "label": IntField()}
        writer = DatasetWriter(f"{folder}/{mode}-{workers}.beton", fields, page_size=1 << 21,
                               num_workers=workers)
        writer.from_indexed_dataset(Images(), chunksize=3)
fields = {"blob": BytesField(), "number": FloatField(), "a_name_of_more_than_16": RGBImageField(),
          "array": NDArrayField(np.dtype("int64"), (3,)), "note": JSONField(), "label": IntField()}
writer = DatasetWriter(f"{folder}/everything.beton", fields, page_size=1 << 21, num_workers=2)
writer.from_indexed_dataset(Everything(), chunksize=3)
"""


def in_a_process_of_its_own(code: str, *arguments: Path | str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with child:
        try:
            _, errors = child.communicate(timeout=110)
        except subprocess.TimeoutExpired:
            # The writer's workers, too: they would go on waiting for one another.
            os.killpg(child.pid, signal.SIGKILL)
            _, errors = child.communicate()
    assert child.returncode == 0, errors.decode(errors="replace")[-3000:]


def smooth(h: int, w: int, seed: int) -> np.ndarray:
    """Return a picture that JPEG keeps nearly: uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w] / max(h, w)
    waves = [np.sin(rng.uniform(1, 4) * y + rng.uniform(1, 4) * x) for _ in range(3)]
    return np.round(127 + 60 * np.stack(waves, 2)).astype(np.uint8)


# --- stock ffcv reads what we wrote ---------------------------------------------------------------


def write_ours(path: Path, modes: list[int], side: tuple[int, int] = SIDE, announced: int = 0):
    """Write one picture per mode; return what a stock pipeline must make of each."""
    expected = []
    with Writer(
        path,
        samples=announced or len(modes),
        page_size=PAGE,
        classes=[f"class {k}" for k in range(7)],
        options={},
    ) as writer:
        for k, mode in enumerate(modes):
            pixels = data = smooth(*side, k)
            if mode == JPG:
                data = simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420")
                # The stock decoders ask for the fast DCT.
                pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=True)
            expected.append(pixels)
            writer.append(Record(data, mode, *side, k % 7, k, f"{k}.png"))
    return np.stack(expected)


MIXED = [JPG, RAW, RAW, JPG, JPG, RAW, JPG, RAW, JPG]
# Two pictures of 600 x 500 pixels fill a page of 2 MiB.
OURS = {
    "jpg": ([JPG] * 9, SIDE, "os"),
    "raw": ([RAW] * 9, SIDE, "os"),
    "mixed": (MIXED, SIDE, "os"),
    "pages": ([RAW] * 5 + MIXED, (600, 500), "os"),
    "whole pages": ([RAW] * 5 + MIXED, (600, 500), "process"),
    "fewer than announced": (MIXED, SIDE, "none"),
}


@pytest.fixture(scope="module")
def read_by_ffcv(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """Return by case: what we wrote (`expected`, `path`) and what stock ffcv read of it."""
    folder = tmp_path_factory.mktemp("ours")
    cases, arguments = {}, []
    for case, (modes, side, cache) in OURS.items():
        path = folder / f"{case}.beton"
        announced = 100_000 if case == "fewer than announced" else 0
        cases[case] = {"expected": write_ours(path, modes, side, announced), "path": path}
        arguments.append(f"{path}:{cache}")
    in_a_process_of_its_own(LOAD, folder / "found.npz", *arguments)
    with np.load(folder / "found.npz") as found:
        for k, case in enumerate(cases):
            for key in found.files:
                if key.startswith(f"{k}."):
                    cases[case][key.split(".")[1]] = found[key]
    return cases


@pytest.mark.parametrize("case", [case for case in OURS if OURS[case][2] != "none"])
def test_its_loader_gives_our_pixels_and_labels(read_by_ffcv, case):
    found = read_by_ffcv[case]
    modes = np.array(OURS[case][0])
    assert found["loaded"].ravel().tolist() == [k % 7 for k in range(len(modes))]
    assert np.array_equal(found["pixels"][modes == RAW], found["expected"][modes == RAW])
    # The system's libjpeg-turbo and simplejpeg's may differ by version: equal where tried (2.1.5
    # and 3.1.2), and one level is what another rounding of the fast DCT could cost.
    distance = np.abs(found["pixels"].astype(int) - found["expected"])[modes == JPG]
    assert distance.max(initial=0) <= 1


@pytest.mark.parametrize("case", OURS)
def test_its_reader_finds_our_tables(read_by_ffcv, case):
    found = read_by_ffcv[case]
    with open_beton(found["path"]) as data:
        n = len(OURS[case][0])
        assert found["names"].tolist() == ["image", "label"]
        assert np.array_equal(found["labels"], data.labels)
        columns = [data.modes, data.sizes[:, 1], data.sizes[:, 0], data.pointers]
        assert np.array_equal(found["records"], np.stack(columns, 1).astype(np.uint64))
        rows = np.stack([np.arange(n, dtype=np.uint64), data.pointers, data.byte_sizes], 1)
        assert np.array_equal(found["table"], rows)


def test_the_files_of_these_tests_have_one_and_several_pages(read_by_ffcv):
    for case, pages in (("mixed", 1), ("pages", 5)):
        with open_beton(read_by_ffcv[case]["path"]) as data:
            assert len(np.unique(data.pages)) == pages


# --- we read what stock ffcv wrote ----------------------------------------------------------------

SIZES = [(16 + 7 * k % 60, 16 + 11 * k % 50) for k in range(17)] + [(500, 600)] * 5


@pytest.fixture(scope="module")
def written_by_ffcv(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    np.savez(folder / "images.npz", *(smooth(h, w, k) for k, (h, w) in enumerate(SIZES)))
    in_a_process_of_its_own(WRITE, folder / "images.npz", folder)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("mode", ["raw", "jpg", "smart", "proportion"])
def test_we_read_its_files(written_by_ffcv, mode, workers):
    with open_beton(written_by_ffcv / f"{mode}-{workers}.beton") as data:
        assert data.n == len(SIZES)
        assert data.sizes.tolist() == [list(size) for size in SIZES]
        assert data.labels.tolist() == [k % 5 for k in range(len(SIZES))]
        assert data.hashes is None and data.classes == [f"class_{k}" for k in range(5)]
        raw_bytes = np.array([3 * h * w for h, w in SIZES])
        as_jpg = {
            "raw": np.zeros(len(SIZES), bool),
            "jpg": np.ones(len(SIZES), bool),
            "smart": raw_bytes > 40 * 40 * 3,
            "proportion": data.modes == JPG,
        }[mode]
        assert np.array_equal(data.modes == JPG, as_jpg)
        for k, (h, w) in enumerate(SIZES):
            stored = data.region(k)
            if as_jpg[k]:
                pixels = simplejpeg.decode_jpeg(stored, "RGB", strict=True)
                # Quality 80 changes these pictures by 3 levels at most in the mean; any two of them
                # differ by 8.
                distance = np.abs(pixels.astype(int) - smooth(h, w, k))
                assert pixels.shape == (h, w, 3) and distance.mean() < 5
            else:
                assert np.array_equal(stored.reshape(h, w, 3), smooth(h, w, k))


def test_proportion_mixes_the_modes(written_by_ffcv):
    """Else the test above would not have seen a mixed file."""
    modes = []
    for workers in (1, 2):
        with open_beton(written_by_ffcv / f"proportion-{workers}.beton") as data:
            modes += data.modes.tolist()
    assert {JPG, RAW} == set(modes)


def test_we_read_its_files_with_fields_of_every_kind(written_by_ffcv):
    with open_beton(written_by_ffcv / "everything.beton") as data:
        assert data.labels.tolist() == [k % 5 for k in range(len(SIZES))]
        for k, (h, w) in enumerate(SIZES):
            assert np.array_equal(data.region(k).reshape(h, w, 3), smooth(h, w, k))
