"""From every kind of source to a file: the same bytes for any number of workers, and checked."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backmix.pipeline import images
from backmix.pipeline.beton import JPG, RAW, open_beton
from backmix.pipeline.convert import convert
from backmix.pipeline.inspect import verify
from backmix.pipeline.options import ConvertOptions
from backmix.pipeline.writer import check_page_size
from tests.images import jpeg, photograph, png, tar, turned, write_files
from tests.pipeline import test_sources_imagenet as imagenet
from tests.pipeline.test_sources_mat import svhn

COUNT = 40


def pictures(*, broken: bool = False) -> dict[str, bytes]:
    """Return images of many kinds by file name; the ninth may be cut."""
    found: dict[str, bytes] = {}
    for k in range(COUNT):
        pixels = photograph(k, 20 + 7 * (k % 5), 31)
        kind = ("jpg", "png", "jpeg")[k % 3]
        data = png(pixels) if kind == "png" else turned(6, pixels) if k % 4 == 2 else jpeg(pixels)
        found[f"{k:03}.{kind}"] = data[:-40] if broken and k == 8 else data
    return found


def in_list(root: Path, files: dict[str, bytes]) -> str:
    write_files(root / "images", files)
    lines = [f"{name} {k % 4}" for k, name in enumerate(files)]
    (root / "list.txt").write_text("\n".join(lines))
    return f"list:{root}/list.txt//{root}/images"


def in_webdataset(root: Path, files: dict[str, bytes]) -> str:
    for part in (0, 1):
        members: dict[str, bytes] = {}
        for k, (name, data) in enumerate(files.items()):
            if k * 2 // COUNT == part:
                members |= {name: data, f"{name.partition('.')[0]}.cls": b"%d" % (k % 4)}
        tar(root / f"data-{part}.tar", members)
    return f"webdataset:{root}/data-{{0..1}}.tar"


def in_parquet(root: Path, files: dict[str, bytes]) -> str:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": data, "path": name} for name, data in files.items()]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(rows, kind), "label": [k % 4 for k in range(COUNT)]}
    pq.write_table(pa.table(columns), root / "train.parquet", row_group_size=7)
    return f"parquet:{root}/train.parquet"


def in_svhn(root: Path, files: dict[str, bytes]) -> str:
    svhn(root, count=COUNT)
    return f"svhn:{root}"


def in_imagenet(root: Path, files: dict[str, bytes]) -> str:
    return f"imagenet:{imagenet.lay_out(root, 'tars')}"


ALL = [in_list, in_webdataset, in_parquet, in_svhn, in_imagenet]
ONE_BY_ONE = [in_list, in_webdataset, in_parquet]


def sha256(out: Path) -> str:
    return hashlib.sha256(out.read_bytes() + Path(f"{out}.jsonl").read_bytes()).hexdigest()


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("make", ALL)
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, make: Callable[[Path, dict[str, bytes]], str]
) -> None:
    (tmp_path / "set").mkdir()
    spec = make(tmp_path / "set", pictures())
    sums = set()
    for workers in (1, 2, 4):
        out = tmp_path / f"{workers}.beton"
        convert(spec, out, ConvertOptions(workers=workers))
        sums.add(sha256(out))
        assert verify([out]) == []
    assert len(sums) == 1


@pytest.mark.parametrize("make", ONE_BY_ONE)
def test_the_same_images_are_stored_alike_from_every_source(
    tmp_path: Path, make: Callable[[Path, dict[str, bytes]], str]
) -> None:
    files = pictures()
    (tmp_path / "set").mkdir()
    out = tmp_path / "o.beton"
    (tmp_path / "names").write_text("ant\nbee\ncat\ndog\n")
    options = ConvertOptions(workers=2, classes=tmp_path / "names")
    summary = convert(make(tmp_path / "set", files), out, options)
    assert summary.classes == ["ant", "bee", "cat", "dog"]
    with open_beton(out) as data:
        assert data.labels.tolist() == [k % 4 for k in range(COUNT)]
        for i, source in enumerate(files.values()):
            if data.modes[i] == JPG:
                assert data.region(i).tobytes() == source
            else:
                pixels = data.region(i).reshape(*data.sizes[i], 3)
                np.testing.assert_array_equal(pixels, images.decode_rgb(source))
        assert (data.modes == RAW).sum() == summary.modes["raw"] == 20


@pytest.mark.parametrize("make", ONE_BY_ONE)
def test_a_broken_image_stops_the_run_or_is_left_out(
    tmp_path: Path, make: Callable[[Path, dict[str, bytes]], str]
) -> None:
    (tmp_path / "set").mkdir()
    spec = make(tmp_path / "set", pictures(broken=True))
    out = tmp_path / "o.beton"
    with pytest.raises(ValueError, match=r"008.*: truncated JPEG.*--on-error skip"):
        convert(spec, out, ConvertOptions(workers=2))
    assert not out.exists()
    sums = set()
    for workers in (1, 3):
        summary = convert(spec, out, ConvertOptions(workers=workers, on_error="skip", force=True))
        assert (summary.written, len(summary.skipped)) == (COUNT - 1, 1)
        assert rows(out)[8]["skipped"].startswith("truncated JPEG")
        sums.add(sha256(out))
    assert len(sums) == 1


@pytest.mark.parametrize("count", [4, COUNT])
def test_a_file_of_a_list_that_is_not_there_is_named_with_its_line(
    tmp_path: Path, count: int
) -> None:
    spec = in_list(tmp_path, dict(list(pictures().items())[:count]))
    listed = tmp_path / "list.txt"
    listed.write_text("\n" + listed.read_text())
    (tmp_path / "images" / "003.jpg").unlink()
    line = 5
    with pytest.raises(ValueError) as caught:
        convert(spec, tmp_path / "o.beton", ConvertOptions(workers=2))
    assert str(caught.value).startswith(
        f"{listed}, line {line}: {tmp_path}/images/003.jpg: No such file or directory; --on-error"
    )
    summary = convert(spec, tmp_path / "o.beton", ConvertOptions(workers=2, on_error="skip"))
    reason = f"No such file or directory ({listed}, line {line})"
    assert summary.skipped == [("003.jpg", reason)]
    assert rows(summary.out)[3]["skipped"] == reason


def test_rows_of_a_parquet_without_bytes_are_left_out_by_name(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns = {"image": pa.array([jpeg(), None, b"", jpeg()]), "label": [0, 0, 0, 0]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    out = tmp_path / "o.beton"
    summary = convert(f"parquet:{tmp_path}/a.parquet", out, ConvertOptions(on_error="skip"))
    assert summary.skipped == [
        ("a/0000001", "there are no bytes of it"),
        ("a/0000002", "the file is empty"),
    ]
    with pytest.raises(ValueError, match=r"a\.parquet: a/0000001: there are no bytes of it"):
        convert(f"parquet:{tmp_path}/a.parquet", tmp_path / "p.beton", ConvertOptions())


def test_images_larger_than_a_socket_holds_pass_through_a_stream(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    noise = np.random.default_rng(0).integers(0, 256, (6, 700, 700, 3), dtype=np.uint8)
    streams = [jpeg(pixels, quality=98) for pixels in noise]
    assert min(map(len, streams)) > 700_000
    columns = {"image": [streams[k % 6] for k in range(48)], "label": 48 * [0]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=10)
    out = tmp_path / "o.beton"
    convert(f"parquet:{tmp_path}/a.parquet", out, ConvertOptions(workers=3, check="none"))
    with open_beton(out) as data:
        assert [data.region(i).tobytes() for i in range(6)] == streams
    convert(
        f"parquet:{tmp_path}/a.parquet",
        tmp_path / "small.beton",
        ConvertOptions(workers=2, preset="s256"),
    )
    with open_beton(tmp_path / "small.beton") as data:
        assert (data.sizes == 256).all()


def test_pages_that_prove_too_small_start_the_stream_again(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    flat = jpeg(np.full((800, 1000, 3), 90, np.uint8))
    stray = flat[:-2] + 200 * b"\x12" + b"\xff\xd9"  # looks fit to be copied, but warns
    columns = {"image": [jpeg(), stray, jpeg()], "label": [0, 0, 0]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    out = tmp_path / "o.beton"
    summary = convert(f"parquet:{tmp_path}/a.parquet", out, ConvertOptions(workers=1))
    assert summary.modes == {"jpg": 2, "raw": 1}
    check_page_size(summary.page_size)
    assert summary.page_size == 1 << 24


def test_no_file_that_is_being_read_is_overwritten(tmp_path: Path) -> None:
    for make, names in [
        (in_webdataset, ["data-0.tar", "data-1.tar"]),
        (in_list, ["list.txt", "images/000.jpg"]),
        (in_svhn, ["train_32x32.mat"]),
        (in_imagenet, ["ILSVRC2012_img_train.tar"]),
    ]:
        spec = make(tmp_path, pictures())
        for name in names:
            with pytest.raises(ValueError, match="is the source itself"):
                convert(spec, tmp_path / name, ConvertOptions(force=True))


@pytest.mark.parametrize("part", ["train", "val"])
def test_imagenet_gives_one_file_in_whatever_form_it_is_held(tmp_path: Path, part: str) -> None:
    sums = set()
    for k, form in enumerate(imagenet.FORMS):
        out = tmp_path / f"{k}.beton"
        root = imagenet.lay_out(tmp_path / str(k), form)
        convert(f"imagenet:{root}//{part}", out, ConvertOptions(workers=1))
        sums.add(sha256(out))
    if part == "train":
        out = tmp_path / "folder.beton"
        convert(f"folder:{tmp_path}/2/train", out, ConvertOptions(workers=1))
        sums.add(sha256(out))
    assert len(sums) == 1


@pytest.mark.slow
def test_stock_ffcv_reads_what_new_sources_become(tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="ffcv is not installed: not run")
    from tests.pipeline.test_ffcv_compatibility import LOAD, in_a_process_of_its_own

    files = {f"{k:03}.jpg": jpeg(photograph(k, 48, 40)) for k in range(COUNT)}
    outs = []
    for make in ONE_BY_ONE:
        root = tmp_path / make.__name__
        root.mkdir()
        outs.append(tmp_path / f"{make.__name__}.beton")
        convert(make(root, files), outs[-1], ConvertOptions(workers=2))
    arguments = [f"{out}:os" for out in outs]
    in_a_process_of_its_own(LOAD, tmp_path / "found.npz", *arguments)
    with np.load(tmp_path / "found.npz") as found:
        for k in range(len(outs)):
            assert found[f"{k}.loaded"].reshape(-1).tolist() == [i % 4 for i in range(COUNT)]
            for i, data in enumerate(files.values()):
                expected = images.decode_rgb(data).astype(int)
                assert np.abs(found[f"{k}.pixels"][i] - expected).max() <= 3
