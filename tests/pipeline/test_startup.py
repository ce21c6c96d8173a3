"""As many samples as ImageNet has: opening makes arrays, and no Python object per sample."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from backmix.pipeline import order
from backmix.pipeline.batch import Place
from backmix.pipeline.beton import RAW, open_set
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.writer import Record, Writer

N = 1_281_167
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Images of one pixel, with names, labels and checksums as `convert` writes them."""
    path = tmp_path_factory.mktemp("large") / "large.beton"
    pixel = np.zeros((1, 1, 3), np.uint8)
    classes = [f"n{k:08}" for k in range(1000)]
    with Writer(path, samples=N, page_size=1 << 21, classes=classes, options={}) as writer:
        for k in range(N):
            writer.append(Record(pixel, RAW, 1, 1, k % 1000, 0, f"{classes[k % 1000]}/{k}.JPEG"))
    return path


def resident_memory() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_opening_makes_no_object_per_sample(large):
    gc.collect()
    objects, memory = len(gc.get_objects()), resident_memory()
    with open_set(large) as data:
        assert data.n == N
        assert len(gc.get_objects()) - objects < 1000
        # Copies of the tables, and the file itself, which is mapped.
        assert resident_memory() - memory < 120 * N + large.stat().st_size
        assert data.name(N - 1) == f"n{(N - 1) % 1000:08}/{N - 1}.JPEG"


@pytest.mark.parametrize("shuffle", ["full", "windowed"])
def test_an_epoch_begins_without_an_object_per_sample(large, shuffle):
    options = LoaderOptions(
        loader="turbo", batch=256, size=4, crop="random", order=shuffle, threads=2
    )
    gc.collect()
    objects = len(gc.get_objects())
    with open_loader(large, options) as loader:
        batch = next(loader.batches(Place(1)))
        assert len(batch) == 256 and len(gc.get_objects()) - objects < 10_000
        if shuffle == "full":
            assert batch.index.tolist() == order.order(1, 0, N)[:256].tolist()
        last = list(loader.batches(Place(1, 0, N - 15)))
        assert [len(batch) for batch in last] == [15]
