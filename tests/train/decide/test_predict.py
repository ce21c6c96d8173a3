"""Predictions: the numbers of an evaluation, a row an image whatever happens, and going on."""

import csv
import io
import json
import os
import re
import signal
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from backmix.pipeline.convert import convert
from backmix.pipeline.options import ConvertOptions
from backmix.train.decide import predict as module
from backmix.train.decide import rows as rows_module
from backmix.train.decide.conformal import benjamini_hochberg
from backmix.train.decide.decision import COLUMNS, below
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.predict import predict
from backmix.train.decide.record import Preprocessing, Record, read_record
from backmix.train.decide.rule import global_rule
from backmix.train.decide.summary import KINDS, Summary, discoveries
from backmix.train.evaluate import evaluate
from backmix.train.options import EvaluateOptions
from backmix.train.outputs import load_outputs
from tests.images import class_folders, encoded, jpeg, photograph, png, tar, write_files
from tests.train.decide.calibrated import CLASSES, SIDE, calibrated, pictures, write_beton

OPTIONS = PredictOptions(batch=5, device="cpu", threads=2)
COUNT = 23


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated run, and the same images as a .beton and as files."""
    place = tmp_path_factory.mktemp("predict")
    calibrated(place / "run")
    images = pictures(COUNT)
    write_beton(place / "set.beton", images)
    write_files(place / "files", {f"{i:02}.png": png(image) for i, image in enumerate(images)})
    return place


def decided(
    run: Path, *sources: str | Path, out: Path, **changes: Any
) -> tuple[list[dict[str, Any]], Summary]:
    summary = predict(run, [*map(str, sources)], out, replace(OPTIONS, **changes))
    return json.loads(out.read_text()), summary


@pytest.fixture(scope="module")
def stored(place: Path) -> list[dict[str, Any]]:
    """Rows of the .beton."""
    return decided(place / "run", place / "set.beton", out=place / "stored.json")[0]


@pytest.mark.parametrize("crop", ["whole", "random"])
def test_the_numbers_are_those_of_an_evaluation(tmp_path: Path, crop) -> None:
    run = calibrated(tmp_path / "run", crop)
    images = pictures(COUNT, side=20)
    write_beton(tmp_path / "set.beton", images)
    write_files(tmp_path / "files", {f"{i:02}.png": png(one) for i, one in enumerate(images)})
    evaluate(run, EvaluateOptions(test=(tmp_path / "set.beton",), batch=5, device="cpu"))
    outputs = load_outputs(run / "scores" / "known.safetensors")
    z = outputs.logits.astype(np.float64)
    power = np.exp(z - z.max(1, keepdims=True))
    threshold = read_record(run).rule.categories[0].threshold

    rows, summary = decided(run, tmp_path / "set.beton", out=tmp_path / "b.json")
    assert [row["score"] for row in rows] == outputs.scores["max_logit"].tolist()  # to the bit
    assert [row["class"] for row in rows] == [CLASSES[k] for k in z.argmax(1)]
    probability = power.max(1) / power.sum(1)
    np.testing.assert_allclose([row["probability"] for row in rows], probability, rtol=1e-12)
    assert {row["threshold"] for row in rows} == {threshold}
    accepted = outputs.scores["max_logit"] >= threshold
    assert [row["decision"] == "accept" for row in rows] == accepted.tolist()
    assert 0 < accepted.sum() < COUNT
    counts = (summary.images, summary.accepted, summary.rejected, summary.unread)
    assert counts == (COUNT, accepted.sum(), COUNT - accepted.sum(), 0)

    for sources in (["files"], [f"files/{i:02}.png" for i in range(COUNT)]):
        files, _ = decided(run, *(tmp_path / name for name in sources), out=tmp_path / "f.json")
        assert [row["score"] for row in files] == [row["score"] for row in rows]  # same batches
    larger, _ = decided(run, tmp_path / "files", out=tmp_path / "l.json", batch=256)
    for one, other in zip(larger, rows, strict=True):
        assert one["score"] == pytest.approx(other["score"], rel=1e-5, abs=1e-6)
        assert one["decision"] == other["decision"]


def test_p_values_count_calibration_scores(place: Path, stored) -> None:
    part = read_record(place / "run").rule.categories[0]
    assert len(part.table.values) == part.n  # a complete table
    for row in stored:
        below_or_same = int((part.table.values <= row["score"]).sum())
        assert row["p_value"] == (1 + below_or_same) / (part.n + 1)
        assert (row["decision"] == "reject") == (row["p_value"] <= 0.3)
        assert (row["reason"] == "") == (row["decision"] == "accept")


def test_a_reason_has_as_many_digits_as_it_needs() -> None:
    assert below(1.0, 2.0, 0.0123) == "p-value 0.012: score 1 is below the threshold 2"
    said = below(1.000001, 1.000002, 0.5)
    assert "score 1.000001 is below the threshold 1.000002" in said


@pytest.fixture
def mixed(place: Path, tmp_path: Path) -> tuple[list[str], list[str]]:
    """Sources with broken images among good ones, and what should be said of each image."""
    good = [png(image) for image in pictures(3, seed=4)]
    whole = jpeg(photograph(1))
    write_files(
        tmp_path / "in",
        {
            "a.png": good[0],
            "b.jpg": whole[: len(whole) // 2],
            "c.png": b"",
            "d.txt": b"no image, and not asked for",
            "e.jpg": b"text",
            "f.png": good[1],
        },
    )
    (tmp_path / "in" / "g.png").symlink_to("gone")
    (tmp_path / "in" / "h.jpg").write_bytes(jpeg(photograph(2)))
    os.mkfifo(tmp_path / "in" / "i.png")
    members = {"x/y.png": good[2], "x/z.png": good[0][:50], "w.jpg": jpeg(photograph(3))}
    sources = ["in", str(tar(tmp_path / "t.tar", members)), str(place / "set.beton"), "in/h.jpg"]
    said = ["", "JPEG ends|truncated", "the file is empty", "not an image", "", "No such file"]
    said += ["", "not a regular file", "", ".", "", *[""] * COUNT, ""]
    return sources, said


def test_broken_images_are_rows_with_the_reason(
    place: Path, mixed, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources, said = mixed
    rows, summary = decided(place / "run", *sources, out=tmp_path / "o.json")
    assert len(rows) == len(said)
    names = [f"in/{name}" for name in "a.png b.jpg c.png e.jpg f.png g.png h.jpg i.png".split()]
    names += [f"{tmp_path}/t.tar//{name}" for name in ("x/y.png", "x/z.png", "w.jpg")]
    names += [f"{place}/set.beton//{i}.png" for i in range(COUNT)]
    assert [row["file"] for row in rows] == [*names, "in/h.jpg"]
    for row, problem in zip(rows, said, strict=True):
        assert tuple(row) == COLUMNS
        assert (row["decision"] == "error") == bool(problem)
        if problem:
            assert re.search(problem, row["reason"])
            assert [row[name] for name in COLUMNS[1:6]] == [None] * 5
    # Each good image is decided about as it is alone.
    for row in (rows[0], rows[6], rows[8]):
        name = "in/a.png" if row is rows[0] else row["file"]
        if "//" not in name:
            alone, _ = decided(place / "run", name, out=tmp_path / "alone.json")
            assert alone[0]["score"] == pytest.approx(row["score"], rel=1e-5, abs=1e-6)
    assert rows[-1]["score"] == pytest.approx(rows[6]["score"], rel=1e-5, abs=1e-6)
    assert summary.unread == sum(map(bool, said)) == 6
    text = str(summary)
    assert f"{len(rows)} images" in text and "6 could not be read" in text
    assert "1: the file is empty (in/c.png)" in text


def test_kinds_of_errors_are_counted_together() -> None:
    summary = Summary(Path("o.csv"))
    for i in range(5):
        summary.count({"decision": "error", "reason": f"{i:,} bytes", "file": f"{i}\x1b.png"})
    summary.count({"decision": "accept", "reason": "", "file": "a"})
    assert r"5: 0 bytes (0\x1b.png, 1\x1b.png, 2\x1b.png, ...)" in str(summary)
    for i in range(2 * KINDS):
        letters = "".join(chr(97 + int(digit)) for digit in str(i))
        summary.count({"decision": "error", "reason": letters, "file": "a"})
    assert len(summary.errors) <= KINDS + 1
    assert sum(errors.count for errors in summary.errors.values()) == 5 + 2 * KINDS


def test_damaged_samples_of_a_beton_are_rows_with_the_reason(place: Path, tmp_path: Path) -> None:
    from backmix.pipeline.beton import open_beton

    data = bytearray((place / "set.beton").read_bytes())
    with open_beton(place / "set.beton") as beton:
        for i in (0, 6, 20, 21, 22):
            data[int(beton.pointers[i]) + 7] ^= 1
    (tmp_path / "set.beton").write_bytes(data)
    rows, _ = decided(place / "run", tmp_path / "set.beton", out=tmp_path / "o.json")
    assert [i for i, row in enumerate(rows) if row["decision"] == "error"] == [0, 6, 20, 21, 22]
    assert rows[6]["reason"].startswith("does not match its checksum")
    assert rows[6]["file"] == f"{tmp_path}/set.beton//6.png"


def test_shards_singly_and_by_their_manifest(place: Path, tmp_path: Path) -> None:
    options = ConvertOptions(mode="raw", shards=3, workers=1)
    class_folders(tmp_path / "photos", CLASSES, each=4)
    convert(f"folder:{tmp_path}/photos", tmp_path / "s.beton", options)
    shards = sorted(tmp_path.glob("s-*.beton"))
    assert len(shards) == 3
    rows, _ = decided(place / "run", *shards, tmp_path / "s.beton.jsonl", out=tmp_path / "o.json")
    names = [row["file"].split("//") for row in rows]
    assert [name for _, name in names[:12]] == [name for _, name in names[12:]]
    assert [file for file, _ in names[12:]] == [f"{tmp_path}/s.beton.jsonl"] * 12
    files, _ = decided(place / "run", tmp_path / "photos", out=tmp_path / "o.json")
    for one, other, file in zip(rows[:12], rows[12:], files, strict=True):
        assert one["score"] == pytest.approx(other["score"], rel=1e-5, abs=1e-6)
        assert one["score"] == pytest.approx(file["score"], rel=1e-5, abs=1e-6)


def test_where_nothing_can_be_read_there_are_rows_and_an_error(place: Path, tmp_path: Path) -> None:
    write_files(tmp_path, {"in/a.png": b"?", "in/b.png": b"?"})
    with pytest.raises(ValueError, match=r"not one of 2 images .* in/a.png: not an image|in/a.png"):
        decided(place / "run", tmp_path / "in", out=tmp_path / "o.json")
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [row["decision"] for row in rows] == ["error", "error"]
    assert not list(tmp_path.glob("o.json.*"))


def test_a_score_that_is_no_number_is_an_error(place: Path, tmp_path: Path, monkeypatch) -> None:
    real = module.open_decider

    def open_decider(path: Path, options: PredictOptions):
        decider = real(path, options)

        class Scorer:
            device = decider.scorer.device

            def __call__(self, views):
                said = decider.scorer(views)
                return replace(said, score=np.where(np.arange(len(views)) == 1, np.nan, said.score))

        return replace(decider, scorer=Scorer())

    monkeypatch.setattr(module, "open_decider", open_decider)
    rows, _ = decided(place / "run", place / "set.beton", out=tmp_path / "o.json")
    wrong = [i for i, row in enumerate(rows) if row["decision"] == "error"]
    assert wrong == [1, 6, 11, 16, 21]
    assert "score of it is nan" in rows[1]["reason"]


# --- formats and names ----------------------------------------------------------------------------

ODD = [
    b"a,b.png",
    b'q"q.png',
    b"new\nline\r.png",
    b"caf\xe9.png",
    "über 😀.png".encode(),
    b"$'.png",
]


def from_csv(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(row[name]) if row[name] else None for name in COLUMNS[2:6]}
        row["class"] = row["class"] or None
    return rows


READ: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".csv": from_csv,
    ".json": lambda path: json.loads(path.read_bytes()),
    ".jsonl": lambda path: [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]],
    ".parquet": lambda path: parquet.read_table(path).to_pylist(),
}


def test_every_format_holds_the_same_rows(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows_module, "AT_ONCE", 3)  # several row groups
    for name, image in zip(ODD, pictures(len(ODD)), strict=True):
        (Path(os.fsdecode(b"in/" + name))).parent.mkdir(exist_ok=True)
        Path(os.fsdecode(b"in/" + name)).write_bytes(png(image))
    (tmp_path / "in" / "bad.png").write_bytes(b"")
    found = {}
    for ending, read in READ.items():
        out = tmp_path / f"o{ending}"
        assert predict(place / "run", ["in"], out, OPTIONS).images == len(ODD) + 1
        found[ending] = read(out)
        assert all(tuple(row) == COLUMNS for row in found[ending])
    assert found[".csv"] == found[".json"] == found[".jsonl"] == found[".parquet"]
    from backmix.train.decide.sources import name_of

    names = [os.fsencode(name_of(row["file"])) for row in found[".csv"]]
    assert sorted(names) == sorted([*(b"in/" + name for name in ODD), b"in/bad.png"])
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".tmp", ".part"))]


def test_names_from_standard_input(place: Path, tmp_path: Path) -> None:
    names = [f"{place}/files/{i:02}.png" for i in (4, 2)]
    listed = io.BytesIO("\n".join([*names, "gone.png"]).encode())
    predict(place / "run", ["-"], tmp_path / "o.json", OPTIONS, stdin=listed)
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [row["file"] for row in rows] == [*names, "gone.png"]
    assert [row["decision"] == "error" for row in rows] == [False, False, True]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("o.txt", "ends in .csv, .json, .jsonl, .parquet"),
        ("o", "ends in"),
        ("no/o.csv", "there is no folder"),
        ("folder.csv", "is a folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused_first(place, tmp_path, out, message) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match=message):
        predict(place / "run", ["gone"], tmp_path / out, OPTIONS)


def test_the_files_of_the_run_are_never_replaced(place: Path) -> None:
    before = (place / "run" / "threshold.json").read_bytes()
    with pytest.raises(ValueError, match="choose another place"):
        predict(place / "run", ["gone"], place / "run" / "threshold.json", OPTIONS)
    assert (place / "run" / "threshold.json").read_bytes() == before


def test_parquet_without_pyarrow_is_refused_first(place, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rows_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'backmix\[parquet\]'"):
        predict(place / "run", ["gone"], tmp_path / "o.parquet", OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "--batch must be at least 1"),
        ({"threads": -1}, "--threads must be 0 to"),
        ({"limit_pixels": 0}, "--limit-pixels must be 1 to 178,956,970"),
        ({"limit_pixels": 178_956_971}, "--limit-pixels"),
        ({"fdr": 1.0}, "--fdr must lie between 0 and 1"),
    ],
)
def test_options_out_of_range_are_refused(place, tmp_path, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        predict(place / "run", ["gone"], tmp_path / "o.csv", replace(OPTIONS, **change))


def test_an_output_that_is_there_stays_until_there_is_another(place, tmp_path) -> None:
    out = tmp_path / "o.csv"
    out.write_text("before")
    with pytest.raises(ValueError, match="there is no gone"):
        predict(place / "run", ["gone"], out, OPTIONS)
    assert out.read_text() == "before"
    predict(place / "run", [str(place / "set.beton")], out, OPTIONS)
    assert out.read_text().startswith(",".join(COLUMNS) + "\n")


# --- sizes ----------------------------------------------------------------------------------------


def header(width: int, height: int) -> bytes:
    """Return a PNG that promises more pixels than it holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_odd_sizes(place: Path, tmp_path: Path) -> None:
    large = bytearray(jpeg())
    frame = large.index(b"\xff\xc0") + 5
    large[frame : frame + 4] = struct.pack(">HH", 20_000, 20_000)
    write_files(
        tmp_path / "in",
        {
            "a1x1.png": png(np.zeros((1, 1, 3), np.uint8)),
            "b1x900.jpg": jpeg(np.zeros((1, 900, 3), np.uint8)),
            "c-bomb.png": header(20_000, 20_000),
            "d-bomb.jpg": bytes(large),
            "e.png": png(photograph(1, 30, 40)),
            "f.gif": encoded(Image.fromarray(photograph(1, 30, 41)), "GIF"),
        },
    )
    rows, _ = decided(place / "run", tmp_path / "in", out=tmp_path / "o.json", limit_pixels=1200)
    error = [row["decision"] == "error" for row in rows]
    assert error == [False, False, True, True, False, True]
    assert rows[3]["reason"] == "20000 x 20000 pixels are more than 1,200"
    assert rows[5]["reason"] == "41 x 30 pixels are more than 1,200"
    rows, _ = decided(place / "run", tmp_path / "in", out=tmp_path / "o.json")
    assert [row["decision"] == "error" for row in rows] == [False, False, True, True, False, False]
    assert "20000 x 20000 pixels are more than 178,956,970" in rows[3]["reason"]
    assert "exceeds limit" in rows[2]["reason"] or "178,956,970" in rows[2]["reason"]


def test_the_limit_of_pixels_in_a_beton(place: Path, tmp_path: Path) -> None:
    from backmix.pipeline.writer import Record, Writer

    # Larger ones at the start, at the end, between batches, and a batch of them alone.
    sides = [20, 16, 16, 20, 16, *[20] * 7, 16, 16, 16, 16, 20, 16, 20]
    with Writer(
        tmp_path / "s.beton", samples=99, page_size=1 << 21, classes=["a"], options={}
    ) as writer:
        for i, side in enumerate(sides):
            image = pictures(1, seed=i, side=side)[0]
            writer.append(Record(image.tobytes(), 1, side, side, 0, 0, f"{i}"))
    small = [i for i, side in enumerate(sides) if side == SIDE]
    for batch in (1, 3, 5, 99):
        out, limits = tmp_path / f"{batch}.json", {"batch": batch, "limit_pixels": 256}
        rows, _ = decided(place / "run", tmp_path / "s.beton", out=out, **limits)
        assert [row["file"].rpartition("//")[2] for row in rows] == [*map(str, range(len(sides)))]
        assert [i for i, row in enumerate(rows) if row["decision"] != "error"] == small
        assert rows[0]["reason"] == "20 x 20 pixels are more than 256"
        every, _ = decided(place / "run", tmp_path / "s.beton", out=out, batch=batch)
        for i in small:
            assert every[i]["score"] == pytest.approx(rows[i]["score"], rel=1e-5, abs=1e-6)
    with pytest.raises(ValueError, match="not one of 19 images"):
        decided(place / "run", tmp_path / "s.beton", out=tmp_path / "o.json", limit_pixels=9)


# --- false discoveries ----------------------------------------------------------------------------


def test_false_discoveries_are_decided_over_all_images(place: Path, tmp_path: Path, stored) -> None:
    write_files(tmp_path, {"bad.png": b""})
    least = min(range(COUNT), key=lambda i: stored[i]["score"])
    # Eight more of the least known image, so that there is something to discover.
    sources = [tmp_path / "bad.png", place / "set.beton", *[place / f"files/{least:02}.png"] * 8]
    expected = [*stored, *[stored[least]] * 8]
    ordered = sorted(row["p_value"] for row in expected)
    rejected = set()
    just = 1.01 * stored[least]["p_value"] * len(expected) / 9  # those nine, and hardly others
    for share in (0.001, just, 0.9):
        rows, summary = decided(place / "run", *sources, out=tmp_path / "o.json", fdr=share)
        small = [p for r, p in enumerate(ordered, 1) if p * len(ordered) <= share * r]
        limit = max(small, default=0.0)
        assert rows[0]["decision"] == "error"
        for row, before in zip(rows[1:], expected, strict=True):
            assert row["p_value"] == before["p_value"]
            assert (row["decision"] == "reject") == (row["p_value"] <= limit)
            assert (row["reason"] == "") == (row["decision"] == "accept")
        assert summary.rejected == sum(p <= limit for p in ordered)
        said = f"{100 * share:g} % at most are expected to be known" in str(summary)
        assert said == bool(limit)
        rejected.add(summary.rejected)
    assert len(rejected) == 3 and 0 in rejected


def with_table(n: int) -> Record:
    """A record of n calibration images."""
    scores = np.arange(float(n))
    seen = Preprocessing(SIDE, "whole", 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    rule = global_rule(scores, 1, Fraction("0.1"))
    return Record("msp", {}, "0.1", None, rule, ("a",), seen, "fp32", "", "", {}, {})


def test_where_nothing_is_discovered_it_is_said_what_was_needed() -> None:
    """Of ten images and one that could not be read; the line is at share r / 10."""
    p = np.array([0.03, 0.03, np.nan, *[0.5] * 7, 0.9])
    said = discoveries(p, 0.1, with_table(99))
    assert "the smallest p-value is 0.03 (2 of 10 images have it), 0.02 or less was needed" in said
    assert said.endswith("needed. --fdr 0.15 would reject some")  # 0.03 * 10 / 2
    assert benjamini_hochberg(p, 0.15).sum() == 2 and not benjamini_hochberg(p, 0.149).any()
    assert "10 % at most are expected to be known" in discoveries(p / 1.5, 0.1, with_table(99))
    said = discoveries(p, 0.1, with_table(39))  # no p-value below 1 / 40: 3 * 0.1 / 10 is above it
    assert "39 calibration images give none below 0.025, which 3 of the images would have" in said
    said = discoveries(p, 0.02, with_table(39))  # all ten would need 0.02
    assert "none below 0.025, which is too much were it that of every image" in said
    assert discoveries(np.ones(4), 0.5, with_table(99)).endswith("No --fdr would")


@pytest.mark.parametrize("seed", range(5))
def test_the_share_that_is_named_rejects_some_and_a_hundredth_less_does_not(seed: int) -> None:
    p = np.random.default_rng(seed).uniform(0.02, 1, 30)
    said = discoveries(p, 0.001, with_table(99))
    share = float(re.findall(r"--fdr (\S+) would reject some", said)[0])
    assert benjamini_hochberg(p, share).any() and not benjamini_hochberg(p, 0.9 * share).any()


# --- stopped and continued ------------------------------------------------------------------------


def test_stopped_and_continued_it_ends_with_the_same_bytes(place: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "in", {f"{i}.png": b"?" for i in range(3)})
    sources = [str(place / "files"), str(place / "set.beton"), str(tmp_path / "in")]
    sources += [str(place / "files")]
    whole = tmp_path / "whole.csv"
    predict(place / "run", sources, whole, OPTIONS)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        out = tmp_path / f"{number}.csv"
        said: list[str] = []
        starts = 0

        def say(text: str, number: int = number) -> None:
            if " a second" in text:  # after every batch
                os.kill(os.getpid(), number)

        while True:
            summary = predict(place / "run", sources, out, OPTIONS, say=say, tell=said.append)
            starts += 1
            if not summary.exit_code:
                break
            assert summary.exit_code == 75 and not out.exists()
            assert f"stopped by {signal.Signals(number).name}" in str(summary)
            assert "the same command goes on" in str(summary)
            assert starts < 100
        assert starts == 5 + 5 + 6  # batches: of 23 files, 23 samples, 3 + 23 files
        assert any("are done, going on" in line for line in said)
        assert out.read_bytes() == whole.read_bytes()
        assert not list(tmp_path.glob("*.part*"))


def test_what_changed_meanwhile_is_refused(place: Path, tmp_path: Path) -> None:
    run = calibrated(tmp_path / "run", seed=1)
    out, sources = tmp_path / "o.csv", [str(place / "files")]

    def say(text: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    assert predict(run, sources, out, OPTIONS, say=say).exit_code == 75
    part = (tmp_path / "o.csv.part").read_bytes()
    for changed, source, options in [
        ("another threshold", place / "run", OPTIONS),
        ("another --batch", run, replace(OPTIONS, batch=6)),
        ("another --limit-pixels", run, replace(OPTIONS, limit_pixels=10_000)),
    ]:
        with pytest.raises(ValueError, match=f"of {changed}: delete"):
            predict(source, sources, out, options)
    with pytest.raises(ValueError, match="of another list of images: delete"):
        predict(run, [*sources, str(place / "set.beton")], out, OPTIONS)
    assert (tmp_path / "o.csv.part").read_bytes() == part
    # Another number of threads, or deciding by false discoveries, changes no row of it.
    summary = predict(run, sources, out, replace(OPTIONS, threads=1, fdr=0.5))
    assert summary.images == COUNT
    # The rows of a finished prediction whose process was killed before it removed them.
    finished = out.read_bytes()
    predict(run, sources, out, OPTIONS, say=say)
    assert predict(run, sources, out, replace(OPTIONS, fdr=0.5)).images == COUNT
    assert out.read_bytes() == finished


def test_stopped_before_the_first_batch_there_is_nothing_to_continue(
    place: Path, tmp_path: Path, monkeypatch
) -> None:
    def decide(decider, images, options, journal, stop, say, tell) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module, "_decide", decide)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT before anything was done"):
        predict(place / "run", [str(place / "files")], tmp_path / "o.csv", OPTIONS)
    assert not list(tmp_path.iterdir())


def test_progress_says_how_far_and_how_long(place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    predict(place / "run", [str(place / "set.beton")], tmp_path / "o.csv", OPTIONS, say=said.append)
    assert re.fullmatch(r"5 of 23 images, [\d,]+ a second, \d+:\d\d:\d\d left", said[0])
    assert said[4].startswith("23 of 23 images") and said[4].endswith("0:00:00 left")
    assert said[-1] == f"writing {tmp_path}/o.csv"
