"""Damaged files in every loader: an error, a replacement or the right pixels, never anything else.

`test_beton_fuzz.py` does this for the reader. Here mutants of whole files, most of them damaged in
their images and most with right checksums, go through each loader in a child process, and mutants
of manifests through the reader.
"""

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import settings

from backmix.pipeline.beton import JPG, RAW, open_set
from backmix.pipeline.convert import convert
from backmix.pipeline.options import ConvertOptions
from tests.images import jpeg, photograph, png, write_files
from tests.pipeline import loader_mutants, mutants

EXAMPLES = settings.default.max_examples if settings.default else 50
"""50, and 5,000 in `make soak`."""
MUTANTS = {"full": 0.5, "region": 1, "resident": 1, "ffcv": 0.16, "dali": 0.3, "manifest": 2}
"""How many of each file, in examples."""
RENEWED = 250
"""Mutants after which a child gives way to another: what is compiled for a loader stays."""


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


NEEDS = {"region": "nvidia.nvimgcodec", "ffcv": "ffcv", "dali": "nvidia.dali"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of JPEGs of many kinds and of pixels; the same as a stock file; and three shards."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("files")
    pixels = np.ascontiguousarray(photograph(7, 41, 59))
    files = {
        "a/420.jpg": jpeg(photograph(0, 60, 80), subsampling="4:2:0"),
        "a/444.jpg": jpeg(photograph(1, 48, 40), subsampling="4:4:4"),
        "a/440.jpg": simplejpeg.encode_jpeg(pixels, 85, "RGB", "440"),
        "a/gray.jpg": jpeg(photograph(2, 50, 33), mode="L"),
        "b/progressive.jpg": jpeg(photograph(3, 64, 64), progressive=True),
        "b/restarts.jpg": jpeg(photograph(4, 40, 70), restart_marker_blocks=3),
        "b/thin.jpg": jpeg(photograph(8, 90, 3)),
        "c/pixels.png": png(photograph(5, 40, 44)),
        "c/more.png": png(photograph(6, 17, 90)),
    }
    write_files(source, files)
    convert(f"folder:{source}", folder / "ours.beton", ConvertOptions(workers=1))
    convert(f"folder:{source}", folder / "set.beton", ConvertOptions(workers=1, shards=3))
    with open_set(folder / "ours.beton") as data:
        assert set(data.modes.tolist()) == {JPG, RAW}
    content = bytearray((folder / "ours.beton").read_bytes())
    content[41:81] = bytes(40)  # without a locator nobody finds the checksums
    (folder / "stripped.beton").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def child(folder: Path) -> Iterator[mutants.Child]:
    # ffcv compiles, which on a busy machine may take a minute.
    with mutants.Child(folder, "tests.pipeline.loader_mutants", seconds=600) as started:
        yield started


def try_mutants(child: mutants.Child, name: str, way: str) -> Counter[str]:
    """Assert of every mutant that it is refused, or right; print how many were what."""
    outcomes: Counter[str] = Counter()
    wrong = []
    count = int(EXAMPLES * MUTANTS[way])
    for number in range(count):
        found, what = child.attempt(name, number, way)
        outcomes[found] += 1
        if found not in (*mutants.FINE, mutants.OTHER):
            wrong.append(f"mutant {number} ({what}): {found}")
        if number % RENEWED == RENEWED - 1:
            child.stop()
    print(f"{way} {name}, {count} mutants: {json.dumps(dict(outcomes.most_common()))}")
    assert not wrong, "\n".join(wrong[:20])
    return outcomes


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["ours", "stripped"])
@pytest.mark.parametrize("way", list(loader_mutants.WAYS))
def test_a_damaged_file_never_crashes_hangs_or_shows_wrong_pixels(
    child: mutants.Child, name: str, way: str
) -> None:
    if way in NEEDS and not installed(NEEDS[way]):
        pytest.skip(f"{NEEDS[way]} is not installed: not run")
    outcomes = try_mutants(child, name, way)
    assert outcomes["sample refused"]  # mutants reach behind the reader's checks


@pytest.mark.parametrize("name", ["ours", "set"])
def test_a_damaged_manifest_opens_the_same_set_or_nothing(child: mutants.Child, name: str) -> None:
    outcomes = try_mutants(child, name, "manifest")
    assert outcomes["refused"] and outcomes["as undamaged"]
