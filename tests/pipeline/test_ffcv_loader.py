"""The ffcv loader against the real package: our boxes, its pixels, and no silent damage.

ffcv takes seconds to import, compiles for seconds per loader and changes settings of the whole
process, so one process of its own goes through everything once (`explore`) and the tests look at
what it found.
"""

import dataclasses
import gc
import importlib
import json
import os
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.beton import JPG, RAW, open_set
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.shards import ranges
from tests.pipeline.photos import (
    damage,
    open_descriptors,
    record,
    warning_record,
    write_photos,
    write_records,
)

N = 37
PLACES = [Place(3, 0), Place(3, 1), Place(3, 1, 13)]
FIELDS = ["index", "labels", "boxes", "sizes", "status"]
TRAIN = LoaderOptions(loader="ffcv", batch=8, size=48, crop="random", threads=2)
WHOLE = dataclasses.replace(TRAIN, crop="whole")
UNVERIFIED = dataclasses.replace(TRAIN, verify=False, max_bad=0.5)
ROOT = Path(__file__).parents[2]


def arrays(batches: list[Batch]) -> dict[str, np.ndarray]:
    """Everything that a loader delivered, as arrays."""
    found = {name: torch.cat([getattr(b, name) for b in batches]).numpy() for name in FIELDS}
    found["pixels"] = torch.cat([b.pool[b.rows] for b in batches]).numpy()
    found["lengths"] = np.array([len(b) for b in batches])
    found["consumed"] = np.array([b.place.consumed for b in batches])
    return found


def write_damaged(path: Path) -> Path:
    """12 images: 2 ends early, 4 has no header, 6 another size, 8 warns as noted, 9 unnoted."""
    records = [record(k, JPG if k else RAW, (60, 50)) for k in range(12)]
    records[2] = dataclasses.replace(records[2], data=records[2].data[:-400])
    records[6] = dataclasses.replace(records[6], height=61)
    records[8], records[9] = warning_record(8), warning_record(9, flags=0)
    write_records(path, records)
    damage(path, 4, at=0)
    return path


# --- in the process with ffcv ---------------------------------------------------------------------


def explore(folder: Path) -> None:
    """Go through everything with the real ffcv; leave arrays and facts in the folder."""
    photos, damaged, facts = sorted(folder.glob("photos*")), folder / "damaged.beton", {}
    torch.set_num_threads(3)
    before = numpys_state()
    train = open_loader(photos, TRAIN)
    opened: Any = train.engine
    facts["torch threads after opening"] = torch.get_num_threads()
    facts["numpy's generator untouched"] = before == numpys_state()
    for k, place in enumerate(PLACES):
        save(folder / f"train{k}.npz", list(train.batches(place)))
    facts["torch threads after epochs"] = torch.get_num_threads()
    later: list[int] = []
    new = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    new.start()
    new.join()
    facts["torch threads of a new thread"] = later[0]
    np.savez(folder / "stock.npz", pixels=stock_pixels(photos, np.load(folder / "train0.npz")))

    gc.collect()
    counts = threading.active_count(), open_descriptors()
    for epoch in range(20):
        for _ in train.batches(Place(0, epoch)):
            break
    facts["early exits leak nothing"] = counts == (threading.active_count(), open_descriptors())

    with open_loader(photos, TRAIN, split="eval") as evaluation:  # the second in this process
        evaluating = evaluation.batches(Place(0))
        both = list(zip(train.batches(PLACES[0]), evaluating, strict=True))
        save(folder / "beside.npz", [one for one, _ in both])
        save(folder / "eval.npz", [other for _, other in both])
        facts["second epoch at once"] = refusal(two_epochs_at_once, evaluation)
    facts["closed"] = refusal(lambda: list(evaluation.batches(Place(0))))

    with open_loader(damaged, UNVERIFIED) as loader:
        save(folder / "replaced.npz", list(loader.batches(Place(1))))
        facts["bad"] = sorted(loader.bad)
        damaged_engine: Any = loader.engine
        damaged_engine.plan = dataclasses.replace(loader.plan, training=False)
        save(folder / "left_out.npz", list(loader.batches(Place(1))))

    growing = dataclasses.replace(TRAIN, grow_from=32, grow=(0, 1))
    opened.plan = dataclasses.replace(train.plan, options=growing)
    for epoch in (0, 1):
        save(folder / f"grown{epoch}.npz", list(train.batches(Place(3, epoch))))
    opened.plan = train.plan

    damage(photos[0], 5)  # from here on by its checksum alone
    options = dataclasses.replace(TRAIN, on_bad="error")
    opened.plan = dataclasses.replace(train.plan, options=options)
    facts["checksum"] = refusal(lambda: list(train.batches(Place(0))))
    opened._stock.code = None
    facts["dead thread"] = refusal(lambda: list(train.batches(Place(0))))
    train.close()
    closed = open_descriptors()
    open_loader(photos, TRAIN).close()
    facts["closing leaks no file"] = closed == open_descriptors()
    (folder / "facts.json").write_text(json.dumps(facts))


def numpys_state() -> list[int]:
    state: Any = np.random.get_state()
    return state[1].tolist()


def save(path: Path, batches: list[Batch]) -> None:
    found: dict[str, Any] = arrays(batches)
    np.savez(path, **found)


def stock_pixels(paths: list[Path], delivered: Any) -> np.ndarray:
    """What stock ffcv means: the fast DCT, the box, OpenCV's INTER_AREA; second formula."""
    cv2 = importlib.import_module("cv2")
    views = []
    with open_set(paths) as data:
        for index, (y0, x0, h, w) in zip(delivered["index"], delivered["boxes"], strict=True):
            stored = data.region(int(index))
            if data.modes[index] == JPG:
                image = simplejpeg.decode_jpeg(stored, "RGB", fastdct=True)
            else:
                image = stored.reshape(*data.sizes[index], 3)
            part = np.ascontiguousarray(image[y0 : y0 + h, x0 : x0 + w])
            views.append(cv2.resize(part, (48, 48), interpolation=cv2.INTER_AREA))
    return np.stack(views)


def two_epochs_at_once(loader: Any) -> None:
    first = loader.batches(Place(0))
    next(first)
    next(loader.batches(Place(0)))


def refusal(act: Any, *arguments: Any) -> str:
    try:
        act(*arguments)
    except ValueError as error:
        return str(error)
    return ""


# --- here -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 3], ids=["one file", "three files"])
def found(request, tmp_path_factory) -> dict[str, Any]:
    """What the process found; the photographs in one file, or the same ones in three."""
    try:
        version("ffcv")
    except PackageNotFoundError:
        pytest.skip("ffcv is not installed: its loader was not tested")
    folder = tmp_path_factory.mktemp("ffcv")
    for k, chosen in enumerate(ranges(N, request.param)):
        write_photos(folder / f"photos{k}.beton", len(chosen), chosen.start)
    write_damaged(folder / "damaged.beton")
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    files = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}
    return files | {"facts": json.loads((folder / "facts.json").read_text())}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos.beton", N)


def turbo(path: Path, place: Place, **arguments) -> dict[str, np.ndarray]:
    options = dataclasses.replace(arguments.pop("options", TRAIN), loader="turbo")
    with open_loader(path, options, **arguments) as loader:
        return arrays(list(loader.batches(place)))


pytestmark = pytest.mark.timeout(300)  # the first test waits for the process with ffcv


@pytest.mark.parametrize("k", range(len(PLACES)))
def test_it_delivers_the_samples_and_boxes_of_turbo(found, photos, k):
    """Two epochs of one loader, and a start in the middle of a step."""
    expected = turbo(photos, PLACES[k])
    for name in [*FIELDS, "lengths", "consumed"]:
        assert np.array_equal(found[f"train{k}"][name], expected[name]), name


def test_its_pixels_are_those_of_the_fast_dct_and_inter_area(found):
    assert np.array_equal(found["train0"]["pixels"], found["stock"]["pixels"])


def test_views_grow_in_one_loader(found, photos):
    small = turbo(photos, Place(3, 0), options=dataclasses.replace(TRAIN, size=32))
    assert found["grown0"]["pixels"].shape == (N, 32, 32, 3)
    assert np.array_equal(found["grown0"]["boxes"], small["boxes"])
    assert np.abs(found["grown0"]["pixels"] - small["pixels"].astype(int)).mean() <= 2.5
    assert np.array_equal(found["grown1"]["pixels"], found["train1"]["pixels"])


def test_its_pixels_are_within_the_published_distance_of_the_meaning(found, photos):
    expected = turbo(photos, PLACES[0])["pixels"].astype(int)
    distance = np.abs(found["train0"]["pixels"] - expected)
    assert distance.mean() <= 2.5
    assert np.quantile(distance, 0.999) <= 30


def test_two_loaders_run_side_by_side(found, photos):
    assert np.array_equal(found["beside"]["pixels"], found["train0"]["pixels"])
    expected = turbo(photos, Place(0), split="eval")
    for name in [*FIELDS, "lengths", "consumed"]:
        assert np.array_equal(found["eval"][name], expected[name]), name


def test_damaged_images_are_found_and_replaced_as_by_turbo(found, tmp_path):
    """By the decoder's return code, without checksums; a warning that is noted is none of them."""
    path = write_damaged(tmp_path / "damaged.beton")
    expected = turbo(path, Place(1), options=UNVERIFIED)
    for name in [*FIELDS, "lengths", "consumed"]:
        assert np.array_equal(found["replaced"][name], expected[name]), name
    status = found["replaced"]["status"]
    assert (status == 2).sum() == 4
    assert found["replaced"]["index"][status == 1].tolist() == [8]
    redone = status > 0  # these come from our own decoder
    assert np.array_equal(found["replaced"]["pixels"][redone], expected["pixels"][redone])
    with open_set(path) as data:
        assert found["facts"]["bad"] == sorted(data.name(k) for k in (2, 4, 6, 9))


def test_evaluation_leaves_damaged_images_out(found):
    assert found["left_out"]["index"].tolist() == [0, 1, 3, 5, 7, 8, 10, 11]
    assert found["left_out"]["status"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


def test_a_damaged_checksum_can_stop_the_run(found):
    assert "sample 5" in found["facts"]["checksum"] and "checksum" in found["facts"]["checksum"]


def test_leaving_early_leaks_neither_threads_nor_files(found):
    assert found["facts"]["early exits leak nothing"]
    assert found["facts"]["closing leaks no file"]


def test_it_leaves_the_settings_of_the_process_alone(found):
    facts = found["facts"]
    assert facts["torch threads after opening"] == facts["torch threads after epochs"] == 3
    assert facts["torch threads of a new thread"] == 3
    assert facts["numpy's generator untouched"]


def test_a_dead_thread_of_ffcv_is_an_error_and_no_hang(found):
    assert found["facts"]["dead thread"].startswith("ffcv's thread ended early")


def test_what_it_cannot_do_it_says(found):
    assert "one epoch at a time" in found["facts"]["second epoch at once"]
    assert "closed" in found["facts"]["closed"]


def test_without_ffcv_the_message_says_how_to_install_it(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ValueError, match=r"pip install 'backmix\[ffcv\]'"):
        open_loader(photos, TRAIN)


if __name__ == "__main__":
    explore(Path(sys.argv[1]))
