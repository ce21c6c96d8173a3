"""The dali loader against the real package, on its CPU backend: turbo's samples, its own resize.

The tests marked gpu run the same on a CUDA device. The reference is the turbo loader, whose pixels
are the stated ones.
"""

import dataclasses
import gc
import importlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from backmix.pipeline import dali_loader
from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.beton import JPG, RAW, open_set
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import LoaderOptions
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
FIELDS = ["index", "labels", "boxes", "sizes", "status"]
TRAIN = LoaderOptions(loader="dali", batch=8, size=48, crop="random", threads=2)
ROOT = Path(__file__).parents[2]


def installed() -> bool:
    for build in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            distribution(build)
        except PackageNotFoundError:
            continue
        return True
    return False


needs_dali = pytest.mark.skipif(not installed(), reason="DALI is not installed: not tested")
on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """37 samples, every third raw, sides of 30 to 90 px."""
    return write_photos(tmp_path_factory.mktemp("photos") / "photos.beton", N)


def write_damaged(path: Path) -> Path:
    """12 images: 2 ends early, 4 has no header, 6 another size, 8 warns as noted, 9 unnoted: DALI
    decodes the latter two without a word."""
    records = [record(k, JPG if k else RAW, (60, 50)) for k in range(12)]
    records[2] = dataclasses.replace(records[2], data=records[2].data[:-400])
    records[6] = dataclasses.replace(records[6], height=61)
    records[8], records[9] = warning_record(8), warning_record(9, flags=0)
    write_records(path, records)
    damage(path, 4, at=0)
    return path


def delivered(loader: Any, place: Place) -> dict[str, np.ndarray]:
    """Everything that a loader delivers from a place on, as arrays."""
    return arrays(list(loader.batches(place)))


def arrays(batches: list[Batch]) -> dict[str, np.ndarray]:
    found = {name: torch.cat([getattr(b, name) for b in batches]).cpu().numpy() for name in FIELDS}
    found["pixels"] = torch.cat([b.pool[b.rows] for b in batches]).cpu().numpy()
    found["lengths"] = np.array([len(b) for b in batches])
    found["consumed"] = np.array([b.place.consumed for b in batches])
    return found


def by_turbo(paths: Any, place: Place, options=TRAIN, **arguments) -> dict[str, np.ndarray]:
    with open_loader(paths, dataclasses.replace(options, loader="turbo"), **arguments) as loader:
        return delivered(loader, place)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Assert that all but the pixels agree, and these within a level inside the outermost ring."""
    for name in [*FIELDS, "lengths", "consumed"]:
        assert np.array_equal(found[name], expected[name]), name
    assert distance(found, expected)[:, 1:-1, 1:-1].max(initial=0) <= 1


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> np.ndarray:
    return np.abs(found["pixels"].astype(int) - expected["pixels"])


def refusal(act: Any) -> str:
    with pytest.raises(ValueError) as caught:
        act()
    return str(caught.value)


# --- what is delivered ----------------------------------------------------------------------------


@needs_dali
@pytest.mark.parametrize("device", ["cpu", on_gpu])
def test_it_delivers_what_turbo_delivers(photos, device):
    """Two epochs of one loader, a start in the middle of a step, and evaluation."""
    with open_loader(photos, TRAIN, device=device) as loader:
        for place in (Place(3, 0), Place(3, 1), Place(3, 1, 13)):
            assert_same(delivered(loader, place), by_turbo(photos, place))
        assert not loader.bad
        (batch, *_) = loader.batches(Place(0))
        assert batch.pool.is_contiguous() and batch.pool.device.type == device
    with open_loader(photos, TRAIN, device=device, split="eval") as loader:
        assert_same(delivered(loader, Place(0)), by_turbo(photos, Place(0), split="eval"))


@needs_dali
@pytest.mark.parametrize("mode", [JPG, RAW])
def test_files_of_one_kind_and_several_files_are_delivered(tmp_path, mode):
    paths = [tmp_path / "a.beton", tmp_path / "b.beton"]
    for first, path in zip((0, 7), paths, strict=True):
        write_records(path, [record(first + k, mode) for k in range(7)])
    with open_loader(paths, TRAIN) as loader:
        assert_same(delivered(loader, Place(2)), by_turbo(paths, Place(2)))


@needs_dali
def test_every_rank_gets_its_own_share(photos):
    options = dataclasses.replace(TRAIN, batch=16, group=4)
    for rank in range(3):
        arguments: dict[str, Any] = {"rank": rank, "world": 3}
        with open_loader(photos, options, **arguments) as loader:
            assert_same(
                delivered(loader, Place(5)), by_turbo(photos, Place(5), options, **arguments)
            )


@needs_dali
def test_threads_and_prefetch_change_nothing(photos):
    with open_loader(photos, TRAIN) as loader:
        expected = delivered(loader, Place(9))
    for threads, prefetch in ((1, 0), (1, 1), (3, 7)):
        options = dataclasses.replace(TRAIN, threads=threads, prefetch=prefetch)
        with open_loader(photos, options) as loader:
            found = delivered(loader, Place(9))
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


@needs_dali
def test_a_batch_stays_as_it_is_while_others_are_made(photos):
    with open_loader(photos, TRAIN) as loader:
        batches = list(loader.batches(Place(1)))
        copies = [batch.pool.clone() for batch in batches]
        for epoch in range(2, 6):
            delivered(loader, Place(1, epoch))
    assert all(torch.equal(batch.pool, copy) for batch, copy in zip(batches, copies, strict=True))


@needs_dali
def test_another_resolution_needs_no_other_pipeline(photos):
    with open_loader(photos, TRAIN) as loader:
        opened: Any = loader.engine
        graphs = dict(opened._graphs)
        for size in (48, 32, 64):
            options = dataclasses.replace(TRAIN, size=size)
            opened.plan = dataclasses.replace(opened.plan, options=options)
            assert_same(delivered(loader, Place(4)), by_turbo(photos, Place(4), options))
        assert opened._graphs == graphs


@needs_dali
def test_views_grow_in_one_loader(photos):
    growing = dataclasses.replace(TRAIN, grow_from=24, grow=(0, 1))
    with open_loader(photos, growing) as loader:
        for epoch, side in [(0, 24), (1, 48), (0, 24)]:
            fixed = dataclasses.replace(TRAIN, size=side)
            found = delivered(loader, Place(4, epoch))
            assert found["pixels"].shape == (N, side, side, 3)
            assert_same(found, by_turbo(photos, Place(4, epoch), fixed))


# --- its pixels -----------------------------------------------------------------------------------


@needs_dali
def test_an_image_of_the_view_s_size_is_copied_bit_for_bit(tmp_path):
    records = [record(k, RAW if k % 2 else JPG, (48, 48)) for k in range(6)]
    path = write_records(tmp_path / "x.beton", records)
    with open_loader(path, TRAIN, split="eval") as loader:
        opened: Any = loader.engine
        opened.plan = dataclasses.replace(
            loader.plan, options=dataclasses.replace(TRAIN, crop="whole")
        )
        (batch,) = loader.batches(Place(0))
    for k, one in enumerate(records):
        whole = one.data if one.mode == RAW else simplejpeg.decode_jpeg(one.data)
        assert np.array_equal(batch.pool[k].numpy(), whole)


@needs_dali
@pytest.mark.parametrize("device", ["cpu", on_gpu])
def test_its_pixels_are_within_the_published_distance_of_the_meaning(tmp_path, device):
    """Colour in 4:2:0, 4:2:2 and 4:4:4, and gray; boxes that shrink, grow, and both."""
    records = []
    for k in range(24):
        pixels = photo(150 + 5 * k, 260 - 4 * k, k)
        kind = ("420", "422", "444", "gray")[k % 4]
        if kind == "gray":
            data = simplejpeg.encode_jpeg(
                pixels.mean(2, keepdims=True).astype(np.uint8), 92, "GRAY"
            )
        else:
            data = simplejpeg.encode_jpeg(pixels, 92, "RGB", kind)
        records.append(
            dataclasses.replace(record(k, JPG), data=data, height=150 + 5 * k, width=260 - 4 * k)
        )
    path = write_records(tmp_path / "x.beton", records)
    options = dataclasses.replace(TRAIN, size=112)
    with open_loader(path, options, device=device) as loader:
        away = distance(delivered(loader, Place(0)), by_turbo(path, Place(0), options))
    assert away.mean() <= 0.2
    assert np.quantile(away, 0.999) <= 1
    assert away[:, 1:-1, 1:-1].max() <= (1 if device == "cpu" else 4)


@needs_dali
@pytest.mark.real
def test_real_photographs_are_within_the_published_distance(tmp_path):
    files = sorted((Path(os.environ["BACKMIX_DATA"]) / "imagenet-sample").rglob("*.JPEG"))
    records = []
    for k, file in enumerate(files):
        data = file.read_bytes()
        try:
            height, width = simplejpeg.decode_jpeg(data).shape[:2]
        except ValueError:
            continue  # one of them warns
        records.append(dataclasses.replace(record(k, JPG), data=data, height=height, width=width))
    path = write_records(tmp_path / "x.beton", records)
    options = dataclasses.replace(TRAIN, size=224, batch=64)
    with open_loader(path, options) as loader:
        away = distance(delivered(loader, Place(1)), by_turbo(path, Place(1), options))
    assert away.mean() <= 0.2 and np.quantile(away, 0.999) <= 1 and away.max() <= 20
    assert away[:, 1:-1, 1:-1].max() <= 1


# --- damaged images -------------------------------------------------------------------------------


@needs_dali
@pytest.mark.parametrize("verify", [True, False])
def test_damaged_images_are_found_and_replaced_as_by_turbo(tmp_path, verify):
    path = write_damaged(tmp_path / "damaged.beton")
    options = dataclasses.replace(TRAIN, verify=verify, max_bad=0.5)
    with open_loader(path, options) as loader:
        for epoch in range(2):
            found = delivered(loader, Place(1, epoch))
            assert_same(found, by_turbo(path, Place(1, epoch), options))
            assert (found["status"] == 2).sum() == 4
            assert set(found["index"][found["status"] == 1]) == {8}
        with open_set(path) as data:
            assert sorted(loader.bad) == sorted(data.name(k) for k in (2, 4, 6, 9))
    with open_loader(path, options, split="eval") as loader:
        found = delivered(loader, Place(0))
    assert found["index"].tolist() == [0, 1, 3, 5, 7, 8, 10, 11]
    assert found["status"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


@needs_dali
def test_errors_are_those_of_turbo_in_word_and_place(tmp_path):
    path = write_damaged(tmp_path / "damaged.beton")
    for change in ({"on_bad": "error"}, {"max_bad": 0.1}):
        options = dataclasses.replace(TRAIN, batch=2, group=2, **change)
        said = []
        for name in ("turbo", "dali"):
            with open_loader(path, dataclasses.replace(options, loader=name)) as loader:
                good = []
                message = refusal(lambda: good.extend(loader.batches(Place(3))))  # noqa: B023
                said.append((len(good), message))
        assert said[0] == said[1]


@needs_dali
def test_a_batch_that_dali_gives_up_is_decoded_sample_by_sample(tmp_path):
    """Damage that nobody saw before: DALI loses the whole batch, and goes on with the next."""
    records = [record(k, JPG, (60, 50)) for k in range(24)]
    records[5] = dataclasses.replace(records[5], data=records[5].data[:-400])
    path = write_records(tmp_path / "x.beton", records)
    options = dataclasses.replace(TRAIN, max_bad=0.5)
    with open_loader(path, options) as loader:
        opened: Any = loader.engine
        opened._good[:] = True
        for epoch in range(3):
            found = delivered(loader, Place(1, epoch))
            assert_same(found, by_turbo(path, Place(1, epoch), options))
            assert (found["status"] == 2).sum() == 1
        assert len(loader.bad) == 1


@needs_dali
def test_dali_that_always_fails_is_an_error_with_its_own_words(photos, monkeypatch):
    options = dataclasses.replace(TRAIN, batch=1, group=1)
    with open_loader(photos, options) as loader:

        def outputs() -> Any:
            raise RuntimeError("Error in operator\nencountered:\n\n  no memory\n")

        opened: Any = loader.engine
        for graph in opened._graphs.values():
            monkeypatch.setattr(graph._pipeline, "outputs", outputs)
        monkeypatch.setattr(dali_loader, "_Graph", None)  # it is not made anew within an epoch
        message = refusal(lambda: delivered(loader, Place(0)))
    assert "batches in a row" in message and "no memory;" in message and "turbo" in message


@needs_dali
def test_after_an_interruption_the_next_epoch_is_right(photos, monkeypatch):
    """Ctrl-C between DALI's inputs must not pair an image with another one's box."""
    with open_loader(photos, TRAIN) as loader:
        opened: Any = loader.engine
        pipeline = next(iter(opened._graphs.values()))._pipeline
        feed, given = pipeline.feed_input, []

        def interrupted(name: str, values: Any) -> None:
            given.append(name)
            if len(given) == 6:
                raise KeyboardInterrupt
            feed(name, values)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "feed_input", interrupted)
            with pytest.raises(KeyboardInterrupt):
                delivered(loader, Place(0))
        assert_same(delivered(loader, Place(0)), by_turbo(photos, Place(0)))


# --- leaving, closing, refusing -------------------------------------------------------------------


def footprint() -> tuple[int, int, int]:
    """Threads of the process, not Python's alone; open files; resident bytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/task")), open_descriptors(), pages * os.sysconf("SC_PAGESIZE")


@needs_dali
def test_leaving_early_leaks_no_thread_no_file_no_memory(photos):
    options = dataclasses.replace(TRAIN, size=224)
    with open_loader(photos, options) as loader:
        for epoch in range(4):
            for _ in loader.batches(Place(0, epoch)):
                break
        threads, files, memory = footprint()
        for epoch in range(20):
            for _ in loader.batches(Place(0, epoch)):
                break
        after = footprint()
        assert after[:2] == (threads, files)
        assert after[2] - memory < 20e6
        assert_same(delivered(loader, Place(7)), by_turbo(photos, Place(7), options))


@needs_dali
def test_closed_loaders_leave_nothing_behind(photos):
    def open_and_close() -> None:
        with open_loader(photos, TRAIN) as loader:
            next(iter(loader.batches(Place(0))))

    open_and_close()
    threads, files, _ = footprint()
    for _ in range(5):
        open_and_close()
    assert footprint()[:2] == (threads, files)


@needs_dali
def test_what_it_cannot_do_it_says(photos):
    with open_loader(photos, TRAIN) as loader:
        first = loader.batches(Place(0))
        next(first)
        assert "one epoch at a time" in refusal(lambda: next(loader.batches(Place(0))))
        first.close()  # pyright: ignore[reportAttributeAccessIssue]
        assert len(delivered(loader, Place(0))["index"]) == N
        second = loader.batches(Place(0))
        next(second)
    assert "closed while" in refusal(lambda: list(second))
    assert "closed" in refusal(lambda: list(loader.batches(Place(0))))
    options = dataclasses.replace(TRAIN, batch=16, group=16, prefetch=1)
    with open_loader(photos, options) as loader:  # one step of three is still to be checked
        third = loader.batches(Place(0))
        next(third)
        opened: Any = loader.engine
        opened._threads.shutdown(cancel_futures=True)
    assert "closed while" in refusal(lambda: list(third))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hw_share": -0.1}, "--loader.hw-share must be in [0, 1], got -0.1"),
        ({"hw_share": 1.5}, "--loader.hw-share must be in [0, 1], got 1.5"),
        ({"device_memory_padding": -1}, "--loader.device-memory-padding must be 0 to 8589934592"),
        ({"host_memory_padding": 1 << 40}, "--loader.host-memory-padding must be 0 to"),
        ({"preallocate_hint": (0, 500)}, "--loader.preallocate-hint must be a width and a height"),
        ({"preallocate_hint": (70_000, 500)}, "1 to 65535 pixels, or 0 0; got 70000 500"),
        ({"preallocate_hint": (-1, -1)}, "--loader.preallocate-hint"),
    ],
)
def test_shares_and_hints_out_of_range_are_refused(photos, given, message):
    options = dataclasses.replace(TRAIN, **given)
    assert message in refusal(lambda: open_loader(photos, options))


@needs_dali
def test_it_leaves_the_settings_of_the_process_alone(photos):
    before = torch.get_num_threads(), torch.get_rng_state(), str(np.random.get_state())
    affinity = os.sched_getaffinity(0)
    with open_loader(photos, TRAIN) as loader:
        delivered(loader, Place(0))
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert str(np.random.get_state()) == before[2]
    assert os.sched_getaffinity(0) == affinity


def test_without_dali_the_message_says_how_to_install_it(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    message = refusal(lambda: open_loader(photos, TRAIN))
    assert "backmix[dali-cu13]" in message and "backmix[dali-cu12]" in message


def test_dali_is_imported_only_when_it_is_asked_for(photos):
    program = (
        "import sys; from backmix.pipeline.loader import open_loader; "
        "from backmix.pipeline.options import LoaderOptions; "
        f"open_loader({str(photos)!r}, LoaderOptions(loader='turbo')).close(); "
        "sys.exit('nvidia.dali' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


@needs_dali
def test_hints_reach_the_decoder_and_change_nothing(photos, monkeypatch):
    decoders: Any = importlib.import_module("nvidia.dali.fn").decoders
    real, seen = decoders.image_slice, {}

    def image_slice(*inputs: Any, **options: Any) -> Any:
        seen.update(options)
        return real(*inputs, **options)

    monkeypatch.setattr(decoders, "image_slice", image_slice)
    hints: Any = {
        "hw_share": 0.25,
        "device_memory_padding": 1 << 20,
        "host_memory_padding": 3 << 20,
        "preallocate_hint": (640, 480),
    }
    with open_loader(photos, dataclasses.replace(TRAIN, **hints)) as loader:
        assert_same(delivered(loader, Place(4)), by_turbo(photos, Place(4)))
    assert seen["hw_decoder_load"] == 0.25
    assert (seen["device_memory_padding"], seen["host_memory_padding"]) == (1 << 20, 3 << 20)
    assert (seen["preallocate_width_hint"], seen["preallocate_height_hint"]) == (640, 480)


@needs_dali
@pytest.mark.parametrize("mode", [JPG, RAW])
def test_the_graph_for_a_gpu_can_be_written_down_without_one(photos, mode, monkeypatch):
    """Operators, their devices and their arguments are checked by DALI before it is built."""
    dali: Any = importlib.import_module("nvidia.dali")
    with open_loader(photos, TRAIN) as loader:
        opened: Any = loader.engine
        with monkeypatch.context() as patch:
            patch.setattr(dali.Pipeline, "build", lambda self: None)
            dali_loader._pipeline(opened.plan, torch.device("cuda:0"), mode, 8, 4)
        if not torch.cuda.is_available():
            message = refusal(lambda: dali_loader._Graph(opened.plan, torch.device("cuda:0"), mode))
            assert message.startswith("DALI does not work on cuda:0: ") and "turbo" in message


# --- with a GPU -----------------------------------------------------------------------------------


@needs_dali
@pytest.mark.gpu
def test_nothing_is_read_after_its_memory_was_given_away(photos):
    """Work queued on the pool of a batch that is dropped at once sees that batch's pixels."""
    options = dataclasses.replace(TRAIN, size=224)
    with open_loader(photos, options, device="cuda") as loader:
        expected = [batch.pool.long().sum().item() for batch in loader.batches(Place(0))]
        weight = torch.rand(4096, 4096, device="cuda")
        for _ in range(50):
            found = []
            for batch in loader.batches(Place(0)):
                weight = (weight @ weight).clamp(0, 1)  # keeps the stream behind the host
                found.append(batch.pool.long().sum())
                del batch
            assert torch.stack(found).tolist() == expected
