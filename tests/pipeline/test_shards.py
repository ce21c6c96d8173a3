"""Shards: one data set in several files, made whole or not at all, opened whole or not at all."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmix.pipeline import convert as module
from backmix.pipeline.batch import Place
from backmix.pipeline.beton import JPG, open_beton, open_set
from backmix.pipeline.convert import convert
from backmix.pipeline.inspect import describe, verify
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import ConvertOptions, LoaderOptions
from backmix.pipeline.shards import paths, ranges, read_manifest
from tests.images import class_folders, jpeg, photograph, png, tar, write_files

PACKAGE = Path(module.__file__).parents[2]
NAMES = [f"o-0000{k}-of-00003.beton" for k in range(3)]
ALL = [*NAMES, "o.beton.jsonl"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images, the last of each class stored as pixels."""
    root = tmp_path_factory.mktemp("source") / "set"
    class_folders(root, each=9)
    write_files(root, {f"{name}/9.png": png(photograph(9)) for name in ("cat", "dog")})
    return root


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set in one file."""
    return make(source, tmp_path_factory.mktemp("whole") / "o.beton", shards=1)


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """The set in three files, beside which lies nothing else."""
    (tmp_path / "out").mkdir()
    return make(source, tmp_path / "out" / "o.beton")


def make(source: Path, out: Path, **options: Any) -> Path:
    options = {"workers": 1, "shards": 3} | options
    convert(f"folder:{source}", out, ConvertOptions(**options))
    return out


def files(out: Path) -> list[Path]:
    return paths(out, 3)


def manifest(out: Path) -> Path:
    return Path(f"{out}.jsonl")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sums(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# --- what is written ------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.integers(1, 500))
def test_ranges_follow_one_another_and_differ_by_one_at_most(total: int, count: int) -> None:
    found = ranges(total, count)
    assert [i for chosen in found for i in chosen] == list(range(total))
    assert len(found) == count
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_three_shards_hold_what_one_file_holds(whole: Path, out: Path) -> None:
    with open_set(whole) as one, open_set(manifest(out)) as several:
        assert [shard.n for shard in several.shards] == [6, 7, 7]
        for name in ("labels", "modes", "sizes", "byte_sizes", "flags", "hashes"):
            assert np.array_equal(getattr(one, name), getattr(several, name)), name
        assert one.classes == several.classes
        for i in range(one.n):
            assert one.name(i) == several.name(i)
            assert one.region(i).tobytes() == several.region(i).tobytes()
        rows = [json.loads(line) for line in manifest(out).read_text().splitlines()]
        assert [row["name"] for row in rows[:-1]] == [several.name(i) for i in range(20)]
        assert [row["sample"] for row in rows[:-1]] == list(range(20))
        assert rows[-1]["total"]["digest"] == several.digest
        assert rows[-1]["total"]["shards"] == [
            {"file": shard.path.name, "samples": shard.n, "digest": shard.digest}
            for shard in several.shards
        ]
    assert names(out.parent) == ALL


def test_the_files_do_not_depend_on_workers_or_source(source: Path, out: Path) -> None:
    expected = sums(out.parent)
    for workers in (2, 3):
        make(source, out, workers=workers, force=True)
        assert sums(out.parent) == expected
    packed = {str(p.relative_to(source)): p.read_bytes() for p in sorted(source.rglob("*.*"))}
    archive = tar(source.parent / "set.tar", packed)
    convert(f"tar:{archive}", out, ConvertOptions(workers=2, shards=3, force=True))
    assert sums(out.parent) == expected


def test_one_shard_is_the_plain_file(source: Path, whole: Path, tmp_path: Path) -> None:
    convert(f"folder:{source}", tmp_path / "o.beton", ConvertOptions(workers=1))
    assert sums(tmp_path) == sums(whole.parent)
    with open_beton(whole) as data:
        assert set(data.info) == {"classes", "options", "writer"}
    assert "shards" not in manifest(whole).read_text().splitlines()[-1]


def test_images_that_are_left_out_make_their_shard_smaller(tmp_path: Path) -> None:
    class_folders(tmp_path / "set", each=3)
    write_files(tmp_path / "set", {"cat/1.jpg": b"no image"})
    (tmp_path / "out").mkdir()
    out = make(tmp_path / "set", tmp_path / "out" / "o.beton", on_error="skip")
    assert [shard.samples for shard in read_manifest(manifest(out))] == [1, 2, 2]
    with open_set(files(out)) as data:
        assert [data.name(i) for i in range(2)] == ["cat/0.jpg", "cat/2.jpg"]


def test_a_shard_without_any_image_ends_the_run(tmp_path: Path) -> None:
    class_folders(tmp_path / "set", each=3)
    write_files(tmp_path / "set", {"cat/2.jpg": b"", "dog/0.jpg": b""})
    (tmp_path / "out").mkdir()
    problem = r"none of the 2 images .* o-00001-of-00003\.beton .* fewer --shards; .*cat/2\.jpg"
    with pytest.raises(ValueError, match=problem):
        make(tmp_path / "set", tmp_path / "out" / "o.beton", on_error="skip")
    assert names(tmp_path / "out") == []


def test_pages_chosen_wrongly_are_chosen_anew_for_all_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last image asks for larger pages than were chosen, when two shards are complete."""
    large = jpeg(photograph(3, 900, 900))
    write_files(tmp_path / "set", {"a/0.jpg": jpeg(), "a/1.jpg": jpeg(), "b/0.jpg": large})
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(module, "_largest", lambda *arguments: 1000)
    out = make(tmp_path / "set", tmp_path / "out" / "o.beton", mode="raw")
    with open_set(manifest(out)) as data:
        assert [shard.page_size for shard in data.shards] == [1 << 24] * 3
        assert data.n == 3


@pytest.mark.parametrize(("shards", "problem"), [(0, "1 to 500, not 0"), (21, "more than the 20")])
def test_impossible_numbers_of_shards_are_refused(
    source: Path, tmp_path: Path, shards: int, problem: str
) -> None:
    with pytest.raises(ValueError, match=f"--shards .*{problem}"):
        make(source, tmp_path / "o.beton", shards=shards)
    assert names(tmp_path) == []


# --- whole or not at all --------------------------------------------------------------------------


def test_existing_shards_are_kept_without_force(source: Path, out: Path) -> None:
    before = sums(out.parent)
    with pytest.raises(ValueError, match=r"o-00000-of-00003\.beton exists already.*--force"):
        make(source, out)
    assert sums(out.parent) == before
    make(source, out, force=True, mode="jpg")
    assert sums(out.parent).keys() == before.keys()
    assert not any(sums(out.parent)[name] == before[name] for name in before)


@pytest.mark.parametrize("force", [False, True])
def test_a_set_of_another_number_of_shards_is_in_the_way(
    source: Path, out: Path, whole: Path, tmp_path: Path, force: bool
) -> None:
    for shards in (1, 2):
        with pytest.raises(ValueError, match=r"o-00000-of-00003\.beton is there, of another"):
            make(source, out, shards=shards, force=force)
    assert names(out.parent) == ALL
    (tmp_path / "one").mkdir()
    one = make(source, tmp_path / "one" / "o.beton", shards=1)
    with pytest.raises(ValueError, match=r"o\.beton is there, of another"):
        make(source, one, force=force)
    assert names(one.parent) == ["o.beton", "o.beton.jsonl"]


def test_a_bad_image_in_the_last_shard_leaves_nothing(tmp_path: Path) -> None:
    class_folders(tmp_path / "set", each=3)
    (tmp_path / "out").mkdir()
    out = make(tmp_path / "set", tmp_path / "out" / "o.beton")
    before = sums(out.parent)
    write_files(tmp_path / "set", {"dog/9.jpg": b"no image"})
    with pytest.raises(ValueError, match=r"dog/9\.jpg: not an image"):
        make(tmp_path / "set", out, force=True)
    assert sums(out.parent) == before
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match=r"dog/9\.jpg: not an image"):
        make(tmp_path / "set", tmp_path / "new" / "o.beton")
    assert names(tmp_path / "new") == []


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_an_error_between_the_names_takes_them_all_back(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    error: BaseException,
) -> None:
    """Three links for the shards, then the manifest's rename."""
    calls = iter(range(9))

    def failing(act: Any) -> Any:
        def acting(*arguments: Any) -> None:
            if next(calls) == call:
                raise error
            act(*arguments)

        return acting

    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    # A file system without links: a refused link is tried as a rename, which is refused as well.
    monkeypatch.setattr(os, "rename", lambda *arguments: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        make(source, tmp_path / "o.beton")
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from backmix.pipeline import convert as module
from backmix.pipeline.convert import convert
from backmix.pipeline.options import ConvertOptions

at, force = int(sys.argv[3]), sys.argv[4] == "True"
numbers = iter(range(99))

def killing(act):
    def acting(*arguments):
        if next(numbers) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*arguments)
    return acting

if sys.argv[5] == "names":
    os.link, os.replace = killing(os.link), killing(os.replace)
else:
    module._place = killing(module._place)
convert(f"folder:{sys.argv[1]}", Path(sys.argv[2]),
        ConvertOptions(workers=1, shards=3, force=force, mode="jpg"))
"""


def killed(source: Path, out: Path, at: int, force: bool, where: str) -> int:
    command = [sys.executable, "-P", "-c", KILLED, str(source), str(out), str(at), str(force)]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    return subprocess.run([*command, where], env=environment, timeout=60).returncode


@pytest.mark.parametrize("at", [0, 6, 19])
def test_a_run_killed_in_any_shard_leaves_parts_that_the_next_removes(
    source: Path, tmp_path: Path, at: int
) -> None:
    out = tmp_path / "o.beton"
    assert killed(source, out, at, False, "images") == -signal.SIGKILL
    assert all(".part-" in name for name in names(tmp_path))
    make(source, out, shards=2)
    assert names(tmp_path) == ["o-00000-of-00002.beton", "o-00001-of-00002.beton", ALL[-1]]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_run_killed_between_the_names_is_seen_by_whoever_opens(
    source: Path, out: Path, at: int
) -> None:
    """Old and new shards together open neither by the old manifest nor by their names."""
    assert killed(source, out, at, True, "names") == -signal.SIGKILL
    with pytest.raises(ValueError, match="belongs to another conversion"):
        open_set(manifest(out))
    if at < 3:
        with pytest.raises(ValueError, match="two conversions"):
            open_set(files(out))
    make(source, out, force=True)
    assert names(out.parent) == ALL
    open_set(manifest(out)).close()


# --- opened by the manifest -----------------------------------------------------------------------


def test_the_manifest_of_one_file_opens_it(whole: Path) -> None:
    with open_set(str(manifest(whole))) as data, open_beton(whole) as file:
        assert data.paths == [whole] and data.digest == file.digest


def test_manifests_join_sets(out: Path, whole: Path) -> None:
    with open_set([manifest(out), whole, manifest(whole)]) as data:
        assert data.n == 60
        assert data.paths == [*files(out), whole, whole]


def test_a_missing_shard_is_named(out: Path) -> None:
    files(out)[1].unlink()
    with pytest.raises(ValueError, match=r"o\.beton\.jsonl lists 'o-00001-of-00003\.beton', which"):
        open_set(manifest(out))


def test_swapped_shards_are_named(out: Path) -> None:
    first, _, last = files(out)
    first.rename(out)
    last.rename(first)
    out.rename(last)
    problem = r"o-00000-.* not the file .* contents of 'o-00002-of-00003\.beton'.* renamed"
    with pytest.raises(ValueError, match=problem):
        open_set(manifest(out))


def test_a_foreign_shard_is_named(source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make(source, tmp_path / "other" / "o.beton", mode="jpg")
    files(other)[2].rename(files(out)[2])
    with pytest.raises(ValueError, match=r"o-00002-.* 7 samples and digest .* another conversion"):
        open_set(manifest(out))
    with pytest.raises(ValueError, match=r"o-00002-.* shards of two conversions"):
        open_set(files(out))


@pytest.mark.parametrize(
    "last",
    [
        "",
        "[]",
        "no JSON",
        9999 * "[",
        '{"total": 3}',
        '{"total": {"written": 1, "shards": []}}',
        '{"total": {"written": 1, "digest": 7}}',
        '{"total": {"written": true, "digest": "7"}}',
        *(
            f'{{"total": {{"written": 1, "shards": '
            f'[{{"file": {name}, "samples": 1, "digest": "a"}}]}}}}'
            for name in ('"../o.beton"', '"/o.beton"', '".."', '""', '"a\\u0000"', "3", '"a/"')
        ),
        '{"total": {"written": 2, "shards": [{"file": "a", "samples": 1, "digest": "a"}]}}',
        '{"total": {"written": 2, "shards": [{"file": "a", "samples": 1, "digest": "a"}, '
        '{"file": "a", "samples": 1, "digest": "a"}]}}',
    ],
)
def test_what_is_no_whole_manifest_is_refused(tmp_path: Path, last: str) -> None:
    path = tmp_path / "o.beton.jsonl"
    path.write_text('{"sample": 0, "name": "a", "class": "a"}\n' + last + "\n")
    with pytest.raises(ValueError, match=r"o\.beton\.jsonl is no whole manifest"):
        open_set(path)


def test_a_changed_manifest_opens_the_same_set_or_nothing(out: Path) -> None:
    sound = manifest(out).read_bytes()
    with open_set(manifest(out)) as data:
        digest = data.digest
    generator = np.random.default_rng(0)
    start = sound[:-1].rindex(b"\n") + 1
    opened = 0
    for _ in range(300):
        at = int(generator.integers(start, len(sound)))
        cut = sound[:at] if generator.random() < 0.2 else sound
        mutant = bytearray(cut)
        if cut is sound:
            mutant[at] = int(generator.integers(256))
        manifest(out).write_bytes(mutant)
        try:
            with open_set(manifest(out)) as data:
                opened += 1
                assert data.digest == digest
        except ValueError as error:
            assert str(out.parent) in str(error)
    assert 0 < opened < 250


def test_a_manifest_that_is_a_pipe_or_missing_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match="is not a file"):
        open_set(tmp_path / "p.jsonl")
    with pytest.raises(FileNotFoundError, match=r"q\.jsonl"):
        open_set(tmp_path / "q.jsonl")


# --- opened file by file --------------------------------------------------------------------------


def test_the_files_are_the_set_in_the_order_given(out: Path) -> None:
    with open_set(manifest(out)) as expected, open_set(sorted(out.parent.glob("*.beton"))) as data:
        assert data.digest == expected.digest
        with open_set(files(out)[::-1]) as turned:
            assert turned.name(0) == data.name(13)


def test_some_of_the_shards_are_no_set(out: Path) -> None:
    first, second, last = files(out)
    with pytest.raises(ValueError, match=r"1 of them were not given: 00001-of-00003; give all"):
        open_set([first, last])
    with pytest.raises(ValueError, match="2 of them were not given: 00000-of-00003, 00002-of-000"):
        open_set(second)
    with pytest.raises(ValueError, match="given twice"):
        open_set([first, second, last, second])


def test_one_shard_can_be_inspected_and_opened_as_a_file(out: Path) -> None:
    text = describe([files(out)[1]])
    assert "7 samples" in text and "shard 00001-of-00003" in text
    assert verify([files(out)[1]]) == []
    assert "20 samples" in describe([manifest(out)])
    with open_beton(files(out)[1]) as data:
        assert data.info["shard"]["number"] == 1


# --- loaders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["whole", "random"])
@pytest.mark.parametrize("loader", ["turbo", "resident", "dali"])
def test_loaders_deliver_the_same_from_one_file_and_from_shards(
    whole: Path, out: Path, loader: Any, crop: Any
) -> None:
    if loader == "dali" and importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed: not run")
    if loader == "resident" and crop == "random":
        pytest.skip("resident decodes whole images only")
    options = LoaderOptions(loader=loader, batch=8, size=24, threads=2, crop=crop)

    def delivered(given: Any) -> list[Any]:
        found: list[Any] = []
        with open_loader(given, options) as opened:
            for batch in (b for epoch in (0, 1) for b in opened.batches(Place(5, epoch))):
                tensors = (batch.index, batch.labels, batch.boxes, batch.pool[batch.rows])
                found.append((batch.place, [tensor.tolist() for tensor in tensors]))
        return found

    expected = delivered(whole)
    assert delivered(manifest(out)) == expected
    assert delivered(files(out)) == expected


READ = """
import sys
import numpy as np
from ffcv.fields.decoders import IntDecoder
from ffcv.fields.decoders import CenterCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption

found = []
for path in sys.argv[2:]:
    pipelines = {"image": [CenterCropRGBImageDecoder((24, 32), 1)], "label": [IntDecoder()]}
    loader = Loader(path, batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL,
                    drop_last=False, os_cache=True, pipelines=pipelines)
    found += [label for _, labels in loader for label in labels.ravel().tolist()]
np.save(sys.argv[1], found)
"""


@pytest.mark.slow  # ffcv's import takes seconds, and every Loader compiles its pipeline
@pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="ffcv is not installed")
def test_stock_ffcv_reads_every_shard(out: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", READ, str(tmp_path / "found.npy")]
    subprocess.run([*command, *map(str, files(out))], check=True, timeout=200)
    with open_set(files(out)) as data:
        assert (data.modes == JPG).sum() == 18
        assert np.load(tmp_path / "found.npy").tolist() == data.labels.tolist()
