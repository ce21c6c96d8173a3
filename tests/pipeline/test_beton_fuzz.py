"""Damaged files: an error or the right data, never anything else.

First files of some kilobytes, so that every byte and every length can be tried, not a sample of
them; then files as they are, mutants of which a child process opens, reads and loads.
"""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from backmix.pipeline import writer as writer_module
from backmix.pipeline.beton import JPG, RAW, Beton, open_beton
from backmix.pipeline.convert import convert
from backmix.pipeline.options import ConvertOptions
from backmix.pipeline.writer import Record, Writer
from tests.images import jpeg, photograph, png, write_files
from tests.pipeline import mutants

PAGE = 4096
SHAPES = ((20, 30), (16, 16), (9, 31), (24, 24), (8, 8))
MODES = (RAW, JPG, RAW, JPG, JPG)
LABELS = (0, 1, 2, 1, 0)
NAMES = ("a/0", "b/1", "c/2", "b/3", "a/4")


def stored_images() -> list[bytes]:
    images = []
    for k, ((h, w), mode) in enumerate(zip(SHAPES, MODES, strict=True)):
        pixels = np.random.default_rng(k).integers(0, 256, (h, w, 3), np.uint8)
        images.append(simplejpeg.encode_jpeg(pixels) if mode == JPG else pixels.tobytes())
    return images


IMAGES = stored_images()


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> bytes:
    """Return a file of two pages as our writer makes it, but with small pages."""
    path = tmp_path_factory.mktemp("fuzz") / "x.beton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "MIN_PAGE_SIZE", PAGE)
        with Writer(path, samples=5, page_size=PAGE, classes=["a", "b", "c"], options={}) as writer:
            for k, (h, w) in enumerate(SHAPES):
                writer.append(Record(IMAGES[k], MODES[k], h, w, LABELS[k], k, NAMES[k]))
    content = path.read_bytes()
    with open_beton(path) as data:
        assert data.pages.tolist() == [1, 1, 1, 2, 2]
    return content


@pytest.fixture(scope="module")
def stock(ours) -> bytes:
    """Return the same file as stock ffcv would write it: no extension."""
    start = struct.unpack_from("<Q", ours, 16)[0]
    end = 3 * PAGE
    content = bytearray(ours[:end] + ours[start:])
    struct.pack_into("<Q", content, 16, end)
    content[41:81] = bytes(40)
    return bytes(content)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("mutants") / "x.beton"


def opened(path: Path, content: bytes | bytearray | None = None) -> Beton | None:
    """Return the open file, None where the reader refused it; other exceptions fail the test.

    Args:
        path: the file.
        content: written there first.
    """
    if content is not None:
        # A new file each time: a file system may wait for the disk where one is written anew.
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    try:
        return open_beton(path)
    except ValueError as error:
        assert str(path) in str(error)
        return None


def flipped(path: Path, content: bytes, places: Iterable[int], flip: int) -> Iterator[int]:
    """Yield each place, with the file's byte there changed and all others as in `content`."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    with open(path, "r+b", buffering=0) as file:
        for place in places:
            os.pwrite(file.fileno(), bytes([content[place] ^ flip]), place)
            yield place
            os.pwrite(file.fileno(), content[place : place + 1], place)


def shortened(path: Path, content: bytes) -> Iterator[int]:
    """Yield each length below the whole, with the file cut to it."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        yield length


def check_all_or_nothing(data: Beton) -> int:
    """Assert that an opened mutant of our file is right, or says where not; return the bad ones."""
    assert data.n == 5
    assert data.labels.tolist() == list(LABELS)
    assert data.modes.tolist() == list(MODES)
    assert data.sizes.tolist() == [list(shape) for shape in SHAPES]
    assert data.classes == ["a", "b", "c"]
    assert [data.name(i) for i in range(5)] == list(NAMES)
    assert data.flags is not None and data.flags.tolist() == [0, 1, 2, 3, 4]
    bad = 0
    for i, image in enumerate(IMAGES):
        try:
            assert bytes(data.region(i)) == image
        except ValueError as error:
            assert f"sample {i} ({NAMES[i]})" in str(error)
            bad += 1
    data.close()
    return bad


def check_decodes_right_or_not_at_all(data: Beton) -> None:
    """Assert that an opened mutant of the stock file gives right pictures, or none.

    Labels are left out: in a stock file nothing tells a changed label from a right one.
    """
    for i in range(data.n):
        stored, (h, w) = data.region(i), data.sizes[i].tolist()
        if data.modes[i] == RAW:
            pixels = stored.reshape(h, w, 3)
        else:
            try:
                pixels = simplejpeg.decode_jpeg(stored, "RGB", strict=True)
            except ValueError:
                continue
            if pixels.shape != (h, w, 3):
                continue
        expected = np.frombuffer(IMAGES[i], np.uint8)
        if MODES[i] == JPG:
            expected = simplejpeg.decode_jpeg(IMAGES[i], "RGB")
        assert np.array_equal(pixels, expected.reshape(*SHAPES[i], 3))
    data.close()


def test_the_files_are_sound(ours, stock, scratch):
    data = opened(scratch, ours)
    assert data is not None and check_all_or_nothing(data) == 0
    data = opened(scratch, stock)
    assert data is not None and data.n == 5
    check_decodes_right_or_not_at_all(data)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_changed_byte_of_our_file_is_found(ours, scratch, flip):
    """In header and tables at opening, in an image at reading, and nowhere twice."""
    metadata_end = 2106 + 24 * 5
    covered = [*range(metadata_end), *range(3 * PAGE, len(ours))]
    for place in flipped(scratch, ours, covered, flip):
        assert opened(scratch) is None, f"byte {place} may be changed unnoticed"
    images = [len(image) for image in IMAGES]
    regions = [range(PAGE, PAGE + sum(images[:3])), range(2 * PAGE, 2 * PAGE + sum(images[3:]))]
    for region in regions:
        for _ in flipped(scratch, ours, region[::4], flip):
            data = opened(scratch)
            assert data is not None and check_all_or_nothing(data) == 1


def test_a_changed_byte_outside_of_everything_changes_nothing(ours, scratch):
    places = (2106 + 24 * 5, PAGE - 1, 2 * PAGE - 1, 3 * PAGE - 1)
    for _ in flipped(scratch, ours, places, 0xFF):
        data = opened(scratch)
        assert data is not None and check_all_or_nothing(data) == 0


def test_our_file_cut_anywhere_is_refused(ours, scratch):
    for length in shortened(scratch, ours):
        assert opened(scratch) is None, f"cut to {length} bytes"


def test_our_file_with_something_behind_it_is_refused(ours, scratch):
    for more in (b"\0", bytes(24), ours[-24:], bytes(PAGE), ours):
        assert opened(scratch, ours + more) is None


def test_a_stock_file_cut_anywhere_is_refused(stock, scratch):
    for length in shortened(scratch, stock):
        assert opened(scratch) is None, f"cut to {length} bytes"


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_changed_byte_in_a_stock_files_tables_gives_an_error_or_the_right_data(
    stock, scratch, flip
):
    places = [*range(2106 + 24 * 5), *range(3 * PAGE, len(stock))]
    for _ in flipped(scratch, stock, places, flip):
        data = opened(scratch)
        if data is not None:
            check_decodes_right_or_not_at_all(data)


def test_a_half_written_file_is_refused(ours, stock, scratch):
    """The stock writer puts the header first; ours puts it last."""
    for content in (ours, stock):
        no_table = bytearray(content)
        struct.pack_into("<Q", no_table, 16, 0)
        assert opened(scratch, no_table) is None
        assert opened(scratch, bytes(PAGE) + content[PAGE:]) is None


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, float, int, int]]:
    """Draw some damages: kind, place as a share of the file, length, value."""
    kinds = st.sampled_from(["set", "zero", "delete", "insert", "copy", "cut", "integer"])
    places = st.one_of(st.floats(0, 1, exclude_max=True), st.floats(0, 0.2), st.floats(0.8, 0.999))
    values = st.one_of(st.sampled_from([0, 1, 24, PAGE, 1 << 31, 1 << 63, 2**64 - 1]), bits64)
    damage = st.tuples(kinds, places, st.integers(1, 64), values)
    return draw(st.lists(damage, min_size=1, max_size=6))


bits64 = st.integers(0, 2**64 - 1)


def damaged(content: bytes, steps: list[tuple[str, float, int, int]]) -> bytes:
    mutant = bytearray(content)
    for kind, share, length, value in steps:
        place = int(share * len(mutant))
        word = struct.pack("<Q", value)
        if kind == "set":
            mutant[place : place + 1] = word[:1]
        elif kind == "zero":
            mutant[place : place + length] = bytes(len(mutant[place : place + length]))
        elif kind == "delete":
            del mutant[place : place + length]
        elif kind == "insert":
            mutant[place:place] = (word * 8)[:length]
        elif kind == "copy":  # a piece of the file over another
            source = value % max(len(mutant), 1)
            piece = mutant[source : source + length]
            mutant[place : place + len(piece)] = piece
        elif kind == "cut":
            del mutant[place:]
        elif kind == "integer":
            mutant[place : place + 8] = word[: len(mutant[place : place + 8])]
    return bytes(mutant)


@given(steps=damages())
def test_any_damage_to_our_file_gives_an_error_or_the_right_data(ours, scratch, steps):
    content = damaged(ours, steps)
    data = opened(scratch, content)
    if data is not None and content[41:81] != bytes(40):
        check_all_or_nothing(data)


@given(steps=damages())
def test_any_damage_to_a_stock_file_is_survived(stock, scratch, steps):
    """Without checksums the data may be wrong; the reader must still stay inside the file."""
    content = damaged(stock, steps)
    data = opened(scratch, content)
    if data is not None:
        assert data.n <= len(content)
        for i in range(data.n):
            assert 0 < len(data.region(i)) <= PAGE * 1024
            data.where(i)
        data.close()


# --- whole files, in a process that may crash -----------------------------------------------------

MUTANTS = max(150, settings.default.max_examples) if settings.default else 150
"""Of each file; thousands in `make soak`."""

# JPEG and raw, as stock ffcv writes them: one file each, as it has one mode a file.
WRITE_STOCK = """
import multiprocessing
import sys
from PIL import Image
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter

multiprocessing.set_start_method("fork", force=True)
folder, *files = sys.argv[1:]


class Images:
    def __len__(self):
        return len(files)

    def __getitem__(self, i):
        return Image.open(files[i]).convert("RGB"), i % 3


for mode in ("jpg", "raw"):
    fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
    writer = DatasetWriter(f"{folder}/stock-{mode}.beton", fields, page_size=1 << 21, num_workers=1)
    writer.from_indexed_dataset(Images(), chunksize=3)
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mutants.Child]:
    with mutants.Child(tmp_path_factory.mktemp("child")) as started:
        yield started


def strip(path: Path, to: Path) -> None:
    """Make a stock file of ours: without a locator nobody finds the checksums."""
    content = bytearray(path.read_bytes())
    content[41:81] = bytes(40)
    to.write_bytes(content)


def try_mutants(child: mutants.Child, name: str) -> None:
    """Assert of every mutant that it is refused, or right; print how many were what."""
    outcomes: Counter[str] = Counter()
    wrong = []
    for number in range(MUTANTS):
        found, what = child.attempt(name, number)
        outcomes[found] += 1
        if found not in (*mutants.FINE, mutants.OTHER):
            wrong.append(f"mutant {number} ({what}): {found}")
    print(f"{name}, {MUTANTS} mutants: {json.dumps(dict(outcomes.most_common()))}")
    assert not wrong, "\n".join(wrong[:20])
    # Mutants reach behind the first check. Pixels of a stock file are right whatever they are.
    assert outcomes["refused"] and outcomes["as undamaged"]
    assert outcomes["sample refused"] or name == "stock-raw"


@pytest.mark.slow  # starts torch and DALI, and opens some hundreds of loaders
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["ours", "stripped"])
def test_a_damaged_file_never_crashes_hangs_or_gives_wrong_data(
    child: mutants.Child, name: str, tmp_path: Path
) -> None:
    if not (child.folder / "ours.beton").exists():
        files = {
            "a/420.jpg": jpeg(photograph(0, 60, 80), subsampling="4:2:0"),
            "a/444.jpg": jpeg(photograph(1, 48, 40), subsampling="4:4:4"),
            "a/gray.jpg": jpeg(photograph(2, 50, 33), mode="L"),
            "b/progressive.jpg": jpeg(photograph(3, 64, 64), progressive=True),
            "b/restarts.jpg": jpeg(photograph(4, 40, 70), restart_marker_blocks=3),
            "c/pixels.png": png(photograph(5, 40, 44)),
            "c/more.png": png(photograph(6, 17, 90)),
        }
        write_files(tmp_path, files)
        convert(f"folder:{tmp_path}", child.folder / "ours.beton", ConvertOptions(workers=1))
        strip(child.folder / "ours.beton", child.folder / "stripped.beton")
    try_mutants(child, name)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["real-ours", "stock-jpg", "stock-raw"])
def test_a_damaged_file_of_photographs_never_crashes_hangs_or_gives_wrong_data(
    child: mutants.Child, name: str, tmp_path: Path
) -> None:
    if name.startswith("stock") and importlib.util.find_spec("ffcv") is None:
        pytest.skip("ffcv is not installed: not run")
    if not (child.folder / f"{name}.beton").exists():
        sample = Path(os.environ["BACKMIX_DATA"]) / "imagenet-sample"
        found = sorted(sample.glob("*/*.JPEG"), key=lambda path: path.stat().st_size)[4:64:6]
        assert len(found) == 10
        if name == "real-ours":
            write_files(tmp_path, {f"{k % 3}/{k}.jpg": f.read_bytes() for k, f in enumerate(found)})
            options = ConvertOptions(workers=1, mode="proportion", seed=1)
            convert(f"folder:{tmp_path}", child.folder / f"{name}.beton", options)
            with open_beton(child.folder / f"{name}.beton") as data:
                assert set(data.modes.tolist()) == {JPG, RAW}
        else:
            words = [sys.executable, "-W", "ignore", "-c", WRITE_STOCK, child.folder, *found]
            subprocess.run(words, check=True, timeout=300, capture_output=True)
    try_mutants(child, name)


def test_a_hang_and_a_crash_are_told_with_their_mutant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child that the tests above trust in: here one that misbehaves."""
    monkeypatch.setattr(mutants, "SECONDS", 1)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\nprint('1', flush=True)\n"
        "for line in sys.stdin:\n"
        "    time.sleep(60) if line == 'x 1\\n' else os.abort()\n"
    )
    start = subprocess.Popen
    monkeypatch.setattr(
        mutants.subprocess, "Popen", lambda words, **more: start([*words[:1], program], **more)
    )
    with mutants.Child(tmp_path) as child:
        assert child.attempt("x", 1)[0] == "hang"
        monkeypatch.setattr(mutants, "SECONDS", 60)
        assert child.attempt("x", 2)[0] == "crash, code -6"
