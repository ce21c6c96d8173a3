"""From a source to a file: what is copied, what is coded, and that the bytes never vary."""

import hashlib
import json
import os
import struct
import warnings
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backmix.pipeline import convert as module
from backmix.pipeline import draws, images
from backmix.pipeline.beton import JPG, RAW, Flag, open_beton
from backmix.pipeline.convert import Summary, convert
from backmix.pipeline.inspect import describe
from backmix.pipeline.options import ConvertOptions
from tests.images import (
    class_folders,
    encoded,
    jpeg,
    photograph,
    png,
    tar,
    turned,
    with_stray_bytes,
    write_files,
)


def run(root: Path, out: Path | None = None, **options: Any) -> Summary:
    """Convert a class folder with one worker, unless told otherwise."""
    options = {"workers": 1} | options
    return convert(f"folder:{root}", out or root.parent / "out.beton", ConvertOptions(**options))


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines()]


def sha256(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def mixed_folder(root: Path) -> dict[str, bytes]:
    """Write JPEGs that can be copied and all kinds of other images; one class has one image."""
    palette = Image.fromarray(photograph(4)).quantize(16)
    files = {
        "a/copied.jpg": jpeg(photograph(0)),
        "a/gray.JPG": jpeg(photograph(1), mode="L"),
        "a/pixels.png": png(photograph(2)),
        "a/progressive.jpeg": jpeg(photograph(3), progressive=True),
        "a/trailing.jpg": jpeg(photograph(8)) + b"camera maker's table",
        "b/cmyk.jpg": jpeg(photograph(4), mode="CMYK"),
        "b/misnamed.JPEG": png(photograph(5)),
        "b/palette.gif": encoded(palette, "GIF"),
        "b/turned.jpg": turned(6, photograph(6)),
        "b/warned.jpg": with_stray_bytes(jpeg(photograph(7))),
        "one/x.webp": encoded(Image.fromarray(photograph(9)), "WEBP", lossless=True),
    }
    write_files(root, files)
    return files


def test_a_fit_jpeg_is_stored_byte_for_byte_and_everything_else_as_pixels(tmp_path: Path) -> None:
    files = mixed_folder(tmp_path / "set")
    out = tmp_path / "out.beton"
    summary = run(tmp_path / "set", out)
    copied = {"a/copied.jpg", "a/gray.JPG", "a/progressive.jpeg", "a/trailing.jpg"}
    with open_beton(out) as data:
        assert data.n == len(files)
        assert data.classes == ["a", "b", "one"]
        assert data.labels.tolist() == [0] * 5 + [1] * 5 + [2]
        for i, (name, source) in enumerate(files.items()):
            assert data.name(i) == name
            stored = data.region(i).tobytes()
            if name in copied:
                assert data.modes[i] == JPG
                assert stored == source.removesuffix(b"camera maker's table")
            else:
                assert data.modes[i] == RAW
                pixels = np.frombuffer(stored, np.uint8).reshape(*data.sizes[i], 3)
                np.testing.assert_array_equal(pixels, images.decode_rgb(source))
        flags = dict(zip(files, data.flags.tolist(), strict=True))  # pyright: ignore[reportOptionalMemberAccess]
    assert {name for name in files if flags[name] & Flag.PASSTHROUGH} == copied
    assert flags["a/gray.JPG"] & Flag.GRAY
    assert flags["a/progressive.jpeg"] & Flag.PROGRESSIVE
    assert [name for name in files if flags[name] & Flag.MISNAMED] == ["b/misnamed.JPEG"]
    assert [name for name in files if flags[name] & Flag.ROTATED] == ["b/turned.jpg"]
    assert [name for name in files if flags[name] & Flag.WARNED] == ["b/warned.jpg"]
    assert (summary.written, summary.copied, summary.warned) == (11, 4, 1)
    assert summary.modes == {"jpg": 4, "raw": 7}
    assert summary.class_counts == {"a": 5, "b": 5, "one": 1}
    assert summary.bytes == out.stat().st_size


def test_the_manifest_says_of_every_image_what_was_done(tmp_path: Path) -> None:
    files = mixed_folder(tmp_path / "set")
    write_files(tmp_path / "set", {"b/broken.jpg": files["a/copied.jpg"][:-9]})
    out = tmp_path / "out.beton"
    summary = run(tmp_path / "set", out, on_error="skip")
    *rows, total = manifest(out)
    with open_beton(out) as data:
        digest = data.digest
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == sorted([*files, "b/broken.jpg"])
    assert [row["sample"] for row in rows if row["sample"] is not None] == list(range(11))
    assert by_name["b/broken.jpg"] == {
        "sample": None,
        "name": "b/broken.jpg",
        "class": "b",
        "skipped": "truncated JPEG: the end marker is missing",
    }
    assert summary.skipped == [("b/broken.jpg", "truncated JPEG: the end marker is missing")]
    assert by_name["b/turned.jpg"] == {
        "sample": 8,
        "name": "b/turned.jpg",
        "class": "b",
        "label": 1,
        "height": 32,
        "width": 24,
        "mode": "raw",
        "bytes": 32 * 24 * 3,
        "done": ["pixels", "not copied: EXIF orientation 6", "turned by EXIF orientation 6"],
    }
    assert by_name["a/copied.jpg"]["done"] == ["copied"]
    assert by_name["a/trailing.jpg"]["done"][1] == "20 bytes behind the end marker dropped"
    assert by_name["b/misnamed.JPEG"]["done"] == ["pixels", "is PNG, not JPEG as named"]
    assert total == {
        "total": {
            "written": 11,
            "skipped": 1,
            "page_size": 1 << 21,
            "modes": {"jpg": 4, "raw": 7},
            "options": {
                "mode": "auto",
                "smart_threshold": None,
                "compress_probability": 0.5,
                "quality": None,
                "max_side": None,
                "preset": "none",
                "check": "scaled",
                "seed": 0,
            },
            "digest": digest,
        }
    }
    assert "left out 1:\n  b/broken.jpg: truncated JPEG" in str(summary)


def test_the_bytes_do_not_depend_on_workers_names_or_packing(tmp_path: Path) -> None:
    files = mixed_folder(tmp_path / "set")
    for k in range(40):
        files[f"c/{k:02}.jpg"] = jpeg(photograph(k, 20 + 7 * (k % 5), 31))
    write_files(tmp_path / "set", files)
    sums = set()
    for workers in (1, 2, 4):
        out = tmp_path / f"with-{workers}.beton"
        run(tmp_path / "set", out, workers=workers)
        sums.add(sha256(out, Path(f"{out}.jsonl")))
    reversed_tar = tar(tmp_path / "set.tar", dict(reversed(files.items())))
    out = tmp_path / "tar.beton"
    convert(f"tar:{reversed_tar}", out, ConvertOptions(workers=2))
    sums.add(sha256(out, Path(f"{out}.jsonl")))
    assert len(sums) == 1


def test_mode_jpg_copies_what_it_can_and_codes_the_rest(tmp_path: Path) -> None:
    files = mixed_folder(tmp_path / "set")
    run(tmp_path / "set", mode="jpg")
    with open_beton(tmp_path / "out.beton") as data:
        assert data.modes.tolist() == [JPG] * len(files)
        assert data.region(0).tobytes() == files["a/copied.jpg"]
        stored = data.region(2).tobytes()
        assert stored == images.encode_jpeg(photograph(2), 90)
        with Image.open(BytesIO(stored)) as image:
            assert image.size == (32, 24)


def test_mode_raw_decodes_everything(tmp_path: Path) -> None:
    files = mixed_folder(tmp_path / "set")
    run(tmp_path / "set", mode="raw")
    with open_beton(tmp_path / "out.beton") as data:
        assert data.modes.tolist() == [RAW] * len(files)
        pixels = data.region(0).reshape(24, 32, 3)
        np.testing.assert_array_equal(pixels, images.decode_rgb(files["a/copied.jpg"]))


def test_mode_smart_codes_where_the_pixels_exceed_the_threshold(tmp_path: Path) -> None:
    sizes = [(10, 10), (10, 11), (20, 20)]
    write_files(
        tmp_path / "set", {f"a/{i}.png": png(photograph(i, *size)) for i, size in enumerate(sizes)}
    )
    run(tmp_path / "set", mode="smart", smart_threshold=300)
    with open_beton(tmp_path / "out.beton") as data:
        assert data.modes.tolist() == [RAW, JPG, JPG]
    run(tmp_path / "set", mode="smart", force=True)  # stock ffcv: no threshold, all raw
    with open_beton(tmp_path / "out.beton") as data:
        assert data.modes.tolist() == [RAW, RAW, RAW]


def test_mode_proportion_is_drawn_per_sample_from_the_seed(tmp_path: Path) -> None:
    write_files(tmp_path / "set", {f"a/{i:03}.png": png(photograph(i, 8, 8)) for i in range(200)})
    run(tmp_path / "set", mode="proportion", compress_probability=0.3, seed=5, workers=2)
    words = draws.block(5, 0, np.arange(200), "proportion")
    with open_beton(tmp_path / "out.beton") as data:
        expected = np.where(words[:, 0] / 2**32 < 0.3, JPG, RAW)
        np.testing.assert_array_equal(data.modes, expected)
        assert 40 <= (data.modes == JPG).sum() <= 80


def test_quality_codes_every_jpeg_anew_and_leaves_pixels_alone(tmp_path: Path) -> None:
    files = mixed_folder(tmp_path / "set")
    summary = run(tmp_path / "set", quality=50)
    assert summary.copied == 0
    with open_beton(tmp_path / "out.beton") as data:
        names = list(files)
        pixels = images.decode_rgb(files["a/copied.jpg"])
        assert data.region(0).tobytes() == images.encode_jpeg(pixels, 50)
        raw = [names[i] for i in np.flatnonzero(data.modes == RAW)]
    assert raw == ["a/pixels.png", "b/misnamed.JPEG", "b/palette.gif", "one/x.webp"]


def test_max_side_ends_the_copying_only_where_it_bites(tmp_path: Path) -> None:
    files = {
        "a/large.jpg": jpeg(photograph(0, 40, 60)),
        "a/large.png": png(photograph(1, 60, 40)),
        "a/small.jpg": jpeg(photograph(2, 20, 30)),
        "a/turned.jpg": turned(6, photograph(3, 40, 60)),
    }
    write_files(tmp_path / "set", files)
    run(tmp_path / "set", max_side=30)
    with open_beton(tmp_path / "out.beton") as data:
        assert data.sizes.tolist() == [[20, 30], [30, 20], [20, 30], [30, 20]]
        assert data.modes.tolist() == [JPG, RAW, JPG, JPG]
        assert data.region(2).tobytes() == files["a/small.jpg"]
        small = images.shrink(images.decode_rgb(files["a/large.jpg"]), 30)
        assert data.region(0).tobytes() == images.encode_jpeg(small, 90)


@pytest.mark.parametrize(
    ("preset", "wide", "tall"),
    [
        ("s500", (500, 400), (333, 500)),
        ("s384", (384, 307), (256, 384)),
        ("s256", (320, 256), (256, 384)),
    ],
)
def test_a_preset_shrinks_to_baseline_jpegs_and_copies_what_is_small_enough(
    tmp_path: Path, preset: Any, wide: tuple[int, int], tall: tuple[int, int]
) -> None:
    y, x = np.mgrid[:512, :640]
    pixels = np.stack([x % 256, y % 256, (x + y) % 256], 2).astype(np.uint8)
    files = {
        "a/0.jpg": jpeg(pixels, subsampling=0, progressive=True),
        "a/1.png": png(pixels),
        "a/2.jpg": jpeg(photograph(1, 600, 400)),
        "a/3.jpg": jpeg(photograph(2, 100, 250), progressive=True),
        "a/4.png": png(photograph(3, 100, 250)),
        "a/5.jpg": turned(6, photograph(4, 100, 250)),
    }
    write_files(tmp_path / "set", files)
    summary = run(tmp_path / "set", preset=preset)
    assert summary.modes == {"jpg": 6}
    assert "stored as JPEG 6 (copied byte for byte 1, encoded 5 at quality 90), as pixels 0" in str(
        summary
    )
    with open_beton(tmp_path / "out.beton") as data:
        expected = [wide, wide, tall, (250, 100), (250, 100), (100, 250)]
        assert [(width, height) for height, width in data.sizes.tolist()] == expected
        for i in (0, 1, 2, 4, 5):
            facts = images.jpeg_facts(data.region(i).tobytes())
            assert (facts.frame, facts.subsampling) == (0xC0, "420")
            assert (facts.restart_interval, facts.scans) == (0, 1)
        assert data.region(3).tobytes() == files["a/3.jpg"], "no pixel changes: copied"
        side = {"s256": {"short_side": 256}}.get(preset, {"max_side": int(preset[1:])})
        small = images.shrink(pixels, **side)
        assert data.region(1).tobytes() == images.encode_jpeg(small, 90)
        assert data.info["options"]["preset"] == preset  # pyright: ignore[reportOptionalSubscript]
    *rows, total = manifest(tmp_path / "out.beton")
    assert rows[0]["done"] == ["encoded at quality 90", "shrunk from 640 x 512"]
    assert rows[3]["done"] == ["copied"]
    assert total["total"]["options"]["preset"] == preset
    assert f"preset={preset}" in describe([tmp_path / "out.beton"])


def test_shrinking_keeps_what_is_thin_and_never_enlarges() -> None:
    assert images.shrunk_size(3, 9000, 500) == (1, 500)
    assert images.shrunk_size(300, 9000, short_side=256) == (256, 7680)
    assert images.shrunk_size(255, 9000, short_side=256) == (255, 9000)
    assert images.shrunk_size(500, 500, 500) == (500, 500)


def test_pixels_in_memory_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (7, 3073), dtype=np.uint8)
    rows[:, 0] = range(7)
    (tmp_path / "test_batch.bin").write_bytes(rows.tobytes())
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    monkeypatch.setattr(module, "_start_worker", None)
    out = tmp_path / "out.beton"
    convert(f"cifar:{tmp_path}//test", out, ConvertOptions())
    with open_beton(out) as data:
        assert data.labels.tolist() == list(range(7))
        assert data.modes.tolist() == [RAW] * 7
        planes = rows[3, 1:].reshape(3, 32, 32)
        np.testing.assert_array_equal(data.region(3).reshape(32, 32, 3), planes.transpose(1, 2, 0))
        assert data.name(3) == "test_batch/00003"


def test_the_check_decides_what_is_found(tmp_path: Path) -> None:
    stream = jpeg(photograph(0, 100, 100))
    lost = stream[: len(stream) * 3 // 4] + b"\xff\xd9"  # headers and end marker are fine
    write_files(tmp_path / "set", {"a/0.jpg": lost})
    for check in ("scaled", "full"):
        with pytest.raises(ValueError, match=r"a/0\.jpg: damaged JPEG"):
            run(tmp_path / "set", check=check)
    run(tmp_path / "set", check="none")
    with open_beton(tmp_path / "out.beton") as data:
        assert data.region(0).tobytes() == lost


def test_the_page_is_chosen_from_the_largest_sample(tmp_path: Path) -> None:
    write_files(
        tmp_path / "set",
        {"a/0.png": png(np.zeros((600, 700, 3), np.uint8)), "a/1.png": png(photograph())},
    )
    summary = run(tmp_path / "set")  # 600 x 700 x 3 bytes, four times: 5.04 MB
    assert summary.page_size == 1 << 23
    assert run(tmp_path / "set", page_size=1 << 21, force=True).page_size == 1 << 21


def test_a_sample_larger_than_expected_enlarges_the_pages(tmp_path: Path) -> None:
    # The header lets it be copied (40 kB); its warning makes it 2.4 MB of pixels.
    flat = with_stray_bytes(jpeg(np.full((800, 1000, 3), 90, np.uint8)))
    write_files(tmp_path / "set", {"a/0.jpg": jpeg(), "a/1.jpg": flat})
    summary = run(tmp_path / "set")
    assert summary.page_size == 1 << 24
    assert summary.modes == {"jpg": 1, "raw": 1}
    with pytest.raises(ValueError, match="choose a page size"):
        run(tmp_path / "set", page_size=1 << 21, force=True)
    assert summary.out.stat().st_size == summary.bytes, "the earlier file is untouched"


def png_header(height: int, width: int) -> bytes:
    """Return the first bytes of a PNG that claims this size."""
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIB", 13, b"IHDR", width, height, 8)


def test_a_claim_of_an_absurd_size_stops_neither_the_others_nor_enlarges_their_pages(
    tmp_path: Path,
) -> None:
    files = {
        "a/0.jpg": jpeg(),
        "a/1.png": png_header(100_000, 100_000),
        "a/2.png": png_header(12_000, 12_000),
    }
    write_files(tmp_path / "set", files)
    summary = run(tmp_path / "set", on_error="skip")
    assert [name for name, _ in summary.skipped] == ["a/1.png", "a/2.png"]
    assert (summary.written, summary.page_size) == (1, 1 << 21)
    with pytest.raises(ValueError, match=r"a/1\.png: "):
        run(tmp_path / "set", force=True)


def test_large_images_raise_no_warnings_of_pillow(tmp_path: Path) -> None:
    bmp = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 54)
    bmp += struct.pack("<IiiHHIIiiII", 40, 10_000, 10_000, 1, 24, 0, 0, 0, 0, 0, 0)
    write_files(tmp_path / "set", {"a/0.jpg": jpeg(), "a/1.bmp": bmp})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(tmp_path / "set", on_error="skip")
    assert not seen


def test_an_image_that_is_encoded_anew_is_no_longer_flagged_for_its_warning(tmp_path: Path) -> None:
    write_files(tmp_path / "set", {"a/0.jpg": with_stray_bytes(jpeg())})
    for mode, flagged in (("auto", True), ("jpg", False)):
        summary = run(tmp_path / "set", mode=mode, force=True)
        assert summary.warned == 1
        with open_beton(summary.out) as data:
            assert data.flags is not None
            assert bool(data.flags[0] & Flag.WARNED) == flagged


def test_names_reach_the_terminal_without_control_characters(tmp_path: Path) -> None:
    write_files(tmp_path / "set", {"a/0.jpg": jpeg(), "a/1\x1b[2J.jpg": b"?"})
    assert "left out 1:\n  a/1\\x1b[2J.jpg: " in str(run(tmp_path / "set", on_error="skip"))
    with pytest.raises(ValueError, match=r"a/1\\x1b\[2J\.jpg: not an image"):
        run(tmp_path / "set", force=True)


def test_a_class_list_fixes_labels_and_names(tmp_path: Path) -> None:
    class_folders(tmp_path / "set", ["cat", "dog"], each=1)
    (tmp_path / "list").write_text("dog\nemu\ncat\n")
    summary = run(tmp_path / "set", classes=tmp_path / "list")
    with open_beton(tmp_path / "out.beton") as data:
        assert data.classes == ["dog", "emu", "cat"]
        assert data.labels.tolist() == [0, 2]
    assert "class without images, 1: 'emu'" in str(summary)
    assert "2 images of 3 classes (1 without any)" in str(summary)
    assert "3 classes, each with 0 to 1 samples (median 1); 1 without any" in describe(
        [summary.out]
    )


def test_progress_counts_from_zero_to_all(tmp_path: Path) -> None:
    class_folders(tmp_path / "set", each=2)
    seen: list[tuple[int, int]] = []
    convert(
        f"folder:{tmp_path}/set",
        tmp_path / "out.beton",
        ConvertOptions(workers=2),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 4) for i in range(5)]


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_a_file_name_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/set/a"
    os.makedirs(folder)
    with open(folder + b"/caf\xe9.jpg", "wb") as file:
        file.write(jpeg())
    run(tmp_path / "set")
    with open_beton(tmp_path / "out.beton") as data:
        assert data.name(0) == manifest(tmp_path / "out.beton")[0]["name"] == "a/caf\\udce9.jpg"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 0}, "--quality must be 1 to 100"),
        ({"quality": 101}, "--quality"),
        ({"max_side": 0}, "--max-side"),
        (
            {"compress_probability": 1.5, "mode": "proportion"},
            "--compress-probability must be 0 to 1, not 1.5",
        ),
        ({"compress_probability": 0.2}, "--compress-probability needs --mode proportion, not auto"),
        ({"seed": 1, "mode": "jpg"}, "--seed needs --mode proportion, not jpg"),
        ({"seed": 1, "preset": "s256"}, "--seed needs --mode proportion"),
        ({"mode": "smart", "smart_threshold": -1}, "--smart-threshold"),
        ({"workers": -1}, "--workers"),
        ({"preset": "s100"}, "--preset must be none, s500, s384, s256; not 's100'"),
        ({"preset": "s256", "max_side": 9}, "--preset s256 decides .* leave out --max-side"),
        ({"preset": "s256", "quality": 9}, "--preset s256 decides .* leave out --quality"),
        ({"preset": "s500", "mode": "raw"}, "--preset s500 decides .* leave out --mode raw"),
        ({"page_size": 3_000_000}, "page size"),
        ({"page_size": 0}, "page size"),
        ({"mode": "raw", "quality": 90}, "--quality has no effect with --mode raw"),
        ({"smart_threshold": 9}, "--smart-threshold needs --mode smart"),
        ({"mode": "jpeg"}, "--mode must be auto, jpg, raw, smart, proportion; not 'jpeg'"),
        ({"check": "fast"}, "--check must be"),
        ({"on_error": "ignore"}, "--on-error must be"),
        ({"seed": -1, "mode": "proportion"}, "seed"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    class_folders(tmp_path / "set", each=1)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "set", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_a_wrong_page_size_is_refused_before_anything_is_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="page size"):
        run(tmp_path / "nowhere", page_size=0)


def test_what_is_encoded_anew_has_no_flag_of_the_old_stream(tmp_path: Path) -> None:
    """Profile and warning are in the bytes of the source, not in those made from its pixels."""
    profile = jpeg(photograph(0, 40, 60), icc_profile=b"p" * 200)
    write_files(tmp_path / "set", {"a/0.jpg": profile, "a/1.jpg": with_stray_bytes(profile)})
    found = {}
    for name, changes in {"copied": {}, "anew": {"quality": 80}, "raw": {"mode": "raw"}}.items():
        run(tmp_path / "set", tmp_path / f"{name}.beton", **changes)
        with open_beton(tmp_path / f"{name}.beton") as data:
            assert data.flags is not None
            found[name] = [Flag(flag) & (Flag.ICC | Flag.WARNED) for flag in data.flags.tolist()]
            if name == "anew":
                assert not any(b"ICC_PROFILE" in data.region(i).tobytes() for i in range(2))
    both = [Flag.ICC, Flag.ICC | Flag.WARNED]
    assert found == {"copied": both, "anew": [0, 0], "raw": both}


def test_names_of_any_length_reach_the_workers(tmp_path: Path) -> None:
    """Requests go to busy workers, too, so they must fit a socket that nobody reads just then."""
    deep = "/".join(["d" * 200] * 12)
    large = jpeg(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8), quality=95)
    assert len(large) > 300_000
    names = [f"{'a' if k % 3 else deep}/{k:03}.jpg" for k in range(90)]
    files = tar(tmp_path / "a.tar", {f"c/{name}": large for name in names})
    convert(f"tar:{files}", tmp_path / "o.beton", ConvertOptions(workers=3, check="none"))
    with open_beton(tmp_path / "o.beton") as data:
        assert [data.name(i) for i in range(data.n)] == sorted(f"c/{name}" for name in names)
        assert all(data.region(i).tobytes() == large for i in range(data.n))


def test_every_option_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    table = page.split("## All options")[1].split("\n## ")[0]
    for option in fields(ConvertOptions):
        assert f"| `--{option.name.replace('_', '-')}" in table, f"--{option.name} is not explained"


@pytest.mark.real
def test_imagenet_files_pass_through(tmp_path: Path) -> None:
    root = Path(os.environ["BACKMIX_DATA"]) / "imagenet-sample"
    out = tmp_path / "out.beton"
    summary = convert(f"folder:{root}", out, ConvertOptions())
    # can_opener asks to be turned by its EXIF block; thunder_snake's orientation 0 means nothing.
    assert (summary.written, summary.copied) == (182, 181)
    turned_row = next(row for row in manifest(out) if row["mode"] == "raw")
    assert turned_row["class"] == "n02951585_can_opener"
    assert (turned_row["height"], turned_row["width"]) == (392, 294)
    with open_beton(out) as data:
        for i in np.flatnonzero(data.modes == JPG).tolist():
            assert data.region(i).tobytes() == (root / data.name(i)).read_bytes()


@pytest.mark.real
def test_odd_images_are_converted_or_listed(tmp_path: Path) -> None:
    root = Path(os.environ["BACKMIX_DATA"]) / "odd-images"
    summary = convert(f"folder:{root}", tmp_path / "o.beton", ConvertOptions(on_error="skip"))
    assert [Path(name).name for name, _ in summary.skipped] == [
        "truncated_jpeg.jpg",
        "empty.jpg",
        "missing-sof.jpg",
        "monkey12.jpg",
    ]
    assert (summary.written, summary.copied, summary.warned) == (30, 11, 1)
