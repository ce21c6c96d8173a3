"""Predictions watched: what is read, what is said, and what stands on the page."""

import base64
import csv
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from scipy import stats

from backmix.train import cli
from backmix.train.decide import predicted, thumbnails
from backmix.train.decide.decision import COLUMNS
from backmix.train.decide.monitor import monitor
from backmix.train.decide.options import MonitorOptions
from backmix.train.decide.predicted import read_predictions
from backmix.train.decide.record import Preprocessing, Record, write_record
from backmix.train.decide.rows import write_rows
from backmix.train.decide.rule import conditional_rule, global_rule
from backmix.train.decide.sources import as_text
from backmix.train.decide.verdict import verdict_on
from backmix.train.decide.watched import watch
from tests.runs import write_set

CLASSES = ("cat", "dog", "<script>alert(1)</script>")
RATE = Fraction(1, 20)


def record(seed: int = 0, n: int = 1000, **changes) -> Record:
    rule = global_rule(np.random.default_rng(seed).normal(size=n), len(CLASSES), RATE)
    seen = Preprocessing(32, "whole", 1.0, (127.5, 127.5, 127.5), (64.0, 64.0, 64.0))
    made = Record(
        "max_logit", {}, "0.05", None, rule, CLASSES, seen, "fp32", "w", "", {}, {"date": "today"}
    )
    return replace(made, **changes)


RECORD = record()


def rows(
    scores, names=None, made: Record = RECORD, classes=None, errors=()
) -> Iterator[dict[str, Any]]:
    """Rows of a table of predictions, as `backmix predict` writes them."""
    scores = np.asarray(scores, float)
    classes = np.arange(len(scores)) % len(made.classes) if classes is None else classes
    accepted, p = made.rule.decide(classes, scores)
    for i, score in enumerate(scores.tolist()):
        name = names[i] if names else f"image{i}.png"
        if i in errors:
            yield dict(zip(COLUMNS, (name, *[None] * 5, "error", errors[i]), strict=True))
            continue
        threshold = float(made.rule.thresholds[classes[i]])
        decision = "accept" if accepted[i] else "reject"
        values = (name, made.classes[classes[i]], 0.5, score, threshold, float(p[i]), decision, "")
        yield dict(zip(COLUMNS, values, strict=True))


@pytest.fixture
def at(tmp_path: Path) -> Path:
    write_record(tmp_path / "threshold.json", RECORD)
    return tmp_path


def watched(folder: Path, scores, made: Record = RECORD, **options):
    path = folder / "out.jsonl"
    write_rows(path, rows(scores, made=made))
    chosen = MonitorOptions(against=folder, out=folder / "page.html", **options)
    return watch(made, read_predictions([path], made), chosen)


def normal(m: int, seed: int = 1, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, m)


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ("csv", "json", "jsonl", "parquet"))
def test_every_format_is_read_back_bit_for_bit(at, ending):
    names = ["a, b.png", 'quo"te.png', "new\nline.png", "é.png", "$'caf\\xe9.png'", "x.png"]
    scores = [1.5, -7.25, 1 / 3, 2.0, -9.0, 0.1]
    path = at / f"out.{ending}"
    write_rows(path, rows(scores, names, errors={3: "truncated, at byte 7"}))
    found = read_predictions([path], RECORD)
    assert found.names == names
    assert found.rows.tolist() == [0, 1, 2, 4, 5]
    assert found.scores.tolist() == [scores[i] for i in (0, 1, 2, 4, 5)]
    assert found.predicted.tolist() == [0, 1, 2, 1, 2]
    assert found.rejected.tolist() == [False, True, False, True, False]
    assert found.errors == {3: "truncated, at byte 7"}


def test_rows_count_on_over_files_and_places_do_not(at):
    files = [at / "a.csv", at / "b.csv", at / "c.parquet"]
    for path, count in zip(files, (3, 0, 2), strict=True):
        write_rows(path, rows(np.zeros(count)))
    found = read_predictions(files, RECORD)
    assert found.place(2) == f"row 3 of {files[0]}"
    assert found.place(3) == f"row 1 of {files[2]}"


def changed(path: Path, row: int, column: str, value: str) -> None:
    with open(path, newline="") as file:
        table = list(csv.reader(file))
    table[row][COLUMNS.index(column)] = value
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(table)


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (0, "score", "Score", "no table of backmix predict: it has no column score"),
        (2, "score", "NaN", "row 2: a score and a threshold are expected, not 'NaN'"),
        (2, "score", "", "row 2: a score and a threshold are expected, not ''"),
        (2, "score", "inf", "row 2: a score and a threshold are expected, not 'inf'"),
        (2, "score", "high", "row 2: a score and a threshold are expected, not 'high'"),
        (3, "threshold", "-1.5", "row 3 was decided with the threshold -1.5, the record has"),
        (1, "class", "horse", "row 1: the class 'horse' is none of the record's"),
        (1, "decision", "yes", "row 1: a file and the decision accept, reject or error"),
    ],
)
def test_a_damaged_table_is_refused_with_its_row(at, row, column, value, message):
    path = at / "out.csv"
    write_rows(path, rows(normal(5)))
    changed(path, row, column, value)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_predictions([path], RECORD)
    assert str(path) in str(caught.value)


ROW = dict(zip(COLUMNS, ("a.png", "cat", 1.0, 1.0, 1.0, 0.5, "accept", ""), strict=True))
ERROR = json.dumps(ROW | {"decision": "error"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("out.csv", "", "is empty"),
        ("out.csv", "image,label\na.png,3\n", "it has no column file, class"),
        ("out.csv", ",".join(COLUMNS) + "\na,b\n", "row 1, has 2 columns, its first line 8"),
        ("out.csv", ",".join(COLUMNS) + "\n", "there is no row in"),
        ("out.csv", "\udcff\udcfe", "is damaged or no csv"),
        ("out.json", "[]", "there is no row in"),
        ("out.json", "{}", "no list of rows"),
        ("out.json", "[1]", "row 1 has no file, class"),
        (
            "out.json",
            json.dumps([ROW | {"class": ["cat"]}]),
            "row 1: the class \"['cat']\" is none",
        ),
        (
            "out.json",
            json.dumps([ROW | {"threshold": 10**400}]),
            "row 1: a score and a threshold are",
        ),
        ("out.json", json.dumps([ROW | {"decision": "error", "reason": 5}]), "a.png: 5"),
        ("out.csv", ";".join(COLUMNS) + "\n", "separated by semicolons, save it with commas"),
        ("out.json", "[{", "row 1, is damaged"),
        ("out.json", " ", "no list of rows"),
        ("out.json", "[", "row 1, is damaged"),
        ("out.json", f"[{ERROR}", "row 1, is damaged: no comma and no ] behind it"),
        ("out.json", f"[{ERROR},]", "row 2, is damaged"),
        ("out.json", f"[{ERROR}] [", "row 1, is damaged: there is more behind the list"),
        ("out.json", f"[{ERROR},\udcff", "is damaged"),
        ("out.json", "[" + "[" * 100_000, "is damaged"),
        ("out.jsonl", '{"file": "a.png"}\n', "row 1 has no class"),
        ("out.jsonl", "{\n", "row 1, is damaged"),
        ("out.parquet", "PAR1", "is damaged or no parquet"),
        ("out.xlsx", "x", "end in .csv, .json, .jsonl, .parquet"),
        ("out.csv.part", "x", "end in .csv, .json, .jsonl, .parquet"),
    ],
)
def test_what_is_no_table_is_refused(at, name, content, message):
    (at / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_predictions([at / name], RECORD)


@pytest.mark.parametrize("chunk", (1, 2, 7, 1 << 16))
@pytest.mark.parametrize("indent", (None, 2))
def test_a_json_list_is_read_in_pieces_however_it_is_laid_out(at, monkeypatch, chunk, indent):
    names = ['quo"te].png', "new\nline, {.png", "\U0001f600.png", "x.png"]
    table = list(rows([1.5, -7.25, 1 / 3, -9e-300], names))
    text = json.dumps(table, indent=indent, ensure_ascii=chunk == 2)
    path = at / "out.json"
    path.write_text(f"\ufeff {text}\n", encoding="utf-8")
    monkeypatch.setattr(predicted, "_CHUNK", chunk)
    found = read_predictions([path], RECORD)
    assert found.names == names and found.scores.tolist() == [1.5, -7.25, 1 / 3, -9e-300]


def test_a_row_without_an_end_is_damaged_before_all_of_the_file_is_read(monkeypatch):
    monkeypatch.setattr(predicted, "_CHUNK", 8)
    monkeypatch.setattr(predicted, "_LARGEST_ROW", 64)
    file = io.StringIO('[{"file": "' + 1000 * "a")
    text = predicted._JsonText(file)
    assert text.takes("[")
    with pytest.raises(json.JSONDecodeError):
        text.value()
    assert len(file.read()) > 800


def test_a_parquet_that_is_damaged_inside_or_has_a_column_twice_is_refused_by_name(at):
    path = at / "out.parquet"
    write_rows(path, rows(normal(200)))
    table = parquet.read_table(path)
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(50) + data[54:])  # the head of the first page
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged or no parquet")):
        read_predictions([path], RECORD)
    twice = pa.table([*table.columns, table.column(0)], names=[*COLUMNS, COLUMNS[0]])
    parquet.write_table(twice, path)
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged or no parquet")):
        read_predictions([path], RECORD)


def test_empty_lines_at_the_end_of_a_csv_are_no_rows(at):
    path = at / "out.csv"
    write_rows(path, rows(normal(5)))
    path.write_bytes(path.read_bytes() + b"\n\r\n")
    assert len(read_predictions([path], RECORD).names) == 5


def test_no_score_a_file_that_is_not_there_and_the_same_file_twice_are_refused(at):
    path = at / "out.csv"
    write_rows(path, rows([0.0, 0.0], errors={0: "no image", 1: "no image"}))
    with pytest.raises(ValueError, match=r"all 2 rows are errors.*image0\.png: no image"):
        read_predictions([path], RECORD)
    with pytest.raises(ValueError, match="is no file"):
        read_predictions([at / "gone.csv"], RECORD)
    with pytest.raises(ValueError, match="named twice"):
        read_predictions([path, at / ".." / at.name / "out.csv"], RECORD)


def test_rows_of_another_calibration_are_refused(at):
    path = at / "out.csv"
    write_rows(path, rows(normal(50), made=record(seed=9)))
    with pytest.raises(ValueError, match=r"threshold\.DATE\.json"):
        read_predictions([path], RECORD)


# --- what is said ---------------------------------------------------------------------------------


def test_nothing_has_changed(at):
    found = watched(at, normal(3000))
    verdict = verdict_on(found, at)
    below = int((normal(3000) < RECORD.rule.thresholds[0]).sum())
    assert not verdict.changed and verdict.title == "No change is seen" and not verdict.command
    assert (
        f"{below:,} of 3,000" in verdict.sentences[1]
        and "5.0 % are expected" in verdict.sentences[1]
    )


def test_half_of_the_level_is_for_the_windows_and_half_for_the_drift(at):
    found = watched(at, normal(3015), level=0.02)  # 15 windows of 201 images
    law, each = stats.betabinom(201, 50, 951), 0.02 / 2 / 15
    assert law.cdf(found.windows.low[3] - 1) <= each / 2 < law.cdf(found.windows.low[3])
    assert law.sf(found.windows.high[3]) <= each / 2 < law.sf(found.windows.high[3] - 1)
    assert found.drift.level == 0.02 / 2
    assert (found.drift.start is not None) == (found.drift.log_e.max() >= np.log(2 / 0.02))


def test_unknown_images_are_told_from_known_ones_that_changed(at):
    before = normal(2010)
    unknown = np.where(np.arange(2000) % 8 == 0, -3.0, normal(2000, 2))
    verdict = verdict_on(watched(at, np.append(before, unknown)), at)
    assert verdict.changed
    assert (
        verdict.title
        == f"More images are rejected than expected since about row 2,011 of {at}/out.jsonl"
    )
    assert "have not changed noticeably" in verdict.sentences[1]
    verdict = verdict_on(watched(at, np.append(before, normal(2000, 2, -0.5))), at)
    assert verdict.title.startswith("More images are rejected than expected since about row 2,011")
    assert "they are lower" in verdict.sentences[1]


def test_images_that_are_better_known_are_a_change_too(at):
    verdict = verdict_on(watched(at, np.append(normal(2010), normal(2000, 2, 0.6))), at)
    assert verdict.title.startswith("Fewer images are rejected than expected since about row 2,011")
    assert "they are higher" in verdict.sentences[1]


def test_scores_that_change_above_the_threshold_alone_are_a_change(at):
    scores = normal(2000, 2)
    moved = np.where(scores > -1, np.abs(scores), scores)
    verdict = verdict_on(watched(at, np.append(normal(2010), moved)), at)
    assert "the share of rejected images hardly" in verdict.title and verdict.changed


def test_a_short_burst_is_found_in_its_window(at):
    scores = normal(6030)
    scores[2010:2040] = -3
    found = watched(at, scores)
    alarm = np.flatnonzero(found.windows.alarms)
    assert alarm.tolist() == [10] and found.place(int(found.windows.starts[10])).startswith(
        "row 2,011 "
    )


def test_the_command_calibrates_as_it_was_done(at):
    classes = np.arange(300) % 2
    scores = np.random.default_rng(0).normal(size=300)
    rule = conditional_rule(scores, classes, CLASSES, Fraction(1, 10), 0.9)
    made = record(rule=rule, rate="0.1", confidence=0.9, precision="bf16")
    found = watched(at, normal(600, mean=-3), made=made)
    verdict = verdict_on(found, at / "threshold.json")
    assert verdict.command == (
        f"backmix calibrate {at} --data NEW --score max_logit --reject-rate 0.1 --confidence 0.9 "
        "--per-class --size 32 --precision bf16"
    )
    assert "at least 22" in verdict.sentences[-1]  # 1 - 0.9^22 is the first of at least 0.9


def test_rows_decided_by_another_rule_are_watched_by_their_scores(at):
    path = at / "out.csv"
    table = [row | {"decision": "accept"} for row in rows(normal(400))]
    write_rows(path, table)
    text, _ = monitor([path], MonitorOptions(against=at, out=at / "page.html"))
    below = int((normal(400) < RECORD.rule.thresholds[0]).sum())
    assert (
        below
        and f"note: {below} rows are decided otherwise" in text
        and f"({below} of 400)" in text
    )


def test_classes_that_share_a_threshold_are_not_compared(at):
    """Classes 1 and 2 have too few calibration images, and are calibrated together."""
    classes = np.repeat([0, 1, 2], [60, 12, 10])
    scores = np.random.default_rng(0).normal(size=82)
    made = record(rule=conditional_rule(scores, classes, CLASSES, RATE))
    found = watched(at, normal(900), made=made)
    assert found.predicted.tolist() == [0] * 300 and len(found.cells) == 300
    assert found.place(2) == f"row 7 of {at}/out.jsonl"
    write_record(at / "threshold.json", made)
    page = MonitorOptions(against=at, out=at / "page.html")
    text, _ = monitor([at / "out.jsonl"], page)
    assert "note: 600 images are not compared" in text
    write_rows(at / "few.csv", rows(normal(30), made=made, classes=np.full(30, 2)))
    with pytest.raises(ValueError, match="all 30 images are predicted as classes with few"):
        monitor([at / "few.csv"], page)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 0.0}, "--level must lie between 0 and 1"),
        ({"level": float("nan")}, "--level must lie between 0 and 1"),
        ({"window": -1}, "--window must not be negative, got -1"),
        ({"pictures": -1}, "--pictures must be 0 to 1,000"),
        ({"pictures": 1001}, "--pictures must be 0 to 1,000"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(at, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        monitor([at / "gone.csv"], MonitorOptions(against=at, out=at / "page.html", **options))


def test_too_many_windows_are_refused_with_the_length_that_is_possible(at):
    message = "--window 1 makes 5,000 windows, 4,096 are possible: at least 2 images"
    with pytest.raises(ValueError, match=re.escape(message)):
        watched(at, normal(5000), window=1)


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(at):
    with pytest.raises(ValueError, match="there is no folder"):
        monitor([at / "gone.csv"], MonitorOptions(against=at, out=at / "no" / "page.html"))
    with pytest.raises(ValueError, match="needs a name"):
        monitor([at / "gone.csv"], MonitorOptions(against=at, out=at))


def test_the_exit_code_says_whether_to_calibrate_again(at, capsys):
    write_rows(at / "good.csv", rows(normal(1000)))
    write_rows(at / "bad.csv", rows(normal(1000, mean=-1)))
    for name, code in (("good.csv", 0), ("bad.csv", 3), ("gone.csv", 1)):
        words = ["monitor", str(at / name), "--against", str(at), "--out", str(at / "page.html")]
        assert cli.run(words) == code
    said = capsys.readouterr()
    assert "No change is seen" in said.out and "More images are rejected" in said.out
    assert "gone.csv is no file" in said.err


# --- the page -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def save(path: Path, colour: int, size=(40, 30)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, str]:
    """The page of a stream with unknown images in files, a tar, a .beton, and gone ones."""
    folder = tmp_path_factory.mktemp("drawn")
    write_record(folder / "threshold.json", RECORD)
    save(folder / "img" / "caf\udce9.png", 10)
    save(folder / "img" / "b.png", 20)
    with tarfile.open(folder / "t.tar", "w") as tar:
        tar.add(folder / "img" / "b.png", "in/b.png")
    stored = np.full((3, 32, 32, 3), 30, np.uint8)
    write_set(folder / "d.beton", stored, np.zeros(3, np.int64), ["x"])
    names = [f"{folder}/img/gone<b>.png"] * 1000
    found = ["img/caf\udce9.png", "img/b.png", "t.tar//in/b.png", "d.beton//x/2.png", "d.beton//no"]
    scores = normal(1000)
    scores[500:] = np.where(np.arange(500) % 5 == 0, -4, scores[500:])
    for place, name in enumerate(found):
        names[place], scores[place] = as_text(f"{folder}/{name}"), -9.0 + place
    errors = {i: f"truncated: {i} bytes are there" for i in range(100, 107)} | {107: "a <b>folder"}
    write_rows(folder / "out.parquet", rows(scores, names, errors=errors))
    page = folder / "page.html"
    _, recalibrate = monitor(
        [folder / "out.parquet"], MonitorOptions(against=folder, out=page, pictures=6)
    )
    assert recalibrate
    return folder, page.read_text(encoding="utf-8")


def test_the_page_is_one_document_that_asks_no_network(drawn):
    _, text = drawn
    page = Page(text)
    assert text.startswith("<!doctype html>") and page.of("html") == [{"lang": "en"}]
    assert not page.of("link") and not page.of("iframe")
    assert [script.get("type") for script in page.of("script")] == ["application/json"]
    loaded = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']*)", text)
    assert all(place.startswith(("data:", "#")) for place in loaded)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert len(text) < 5_000_000


def test_the_page_says_the_verdict_first_and_has_its_headings_in_order(drawn):
    _, text = drawn
    page = Page(text)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    (title,) = re.findall(r"<h1>(.*?)</h1>", text)
    assert title.startswith("More images are rejected than expected since about row")
    assert text.index("backmix calibrate") < text.index("<svg")


def test_foreign_names_are_text(drawn):
    _, text = drawn
    assert "<script>alert" not in text and "gone<b>" not in text and "a <b>folder" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "a &lt;b&gt;folder" in text


def test_charts_have_words_a_table_and_letters_that_can_be_read(drawn):
    _, text = drawn
    figures = re.findall(r"<figure aria-labelledby.*?</figure>", text, re.S)
    assert len(figures) == 2
    for figure in figures:
        assert "<figcaption>" in figure and "Data of this chart" in figure
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", figure)]
        assert sizes and min(sizes) * 4 / 3 >= 11
        assert not re.search(r"#[0-9a-f]{6}\b", figure.lower()), "a colour outside the theme"


def test_errors_are_counted_by_reason_whatever_numbers_they_hold(drawn):
    _, text = drawn
    assert re.search(r"<td>truncated: # bytes are there</td><td class=\"n\">7</td>", text)
    assert re.search(r"<td>a &lt;b&gt;folder</td><td class=\"n\">1</td>", text)


def test_rejected_images_are_shown_the_least_known_first(drawn):
    _, text = drawn
    captions = re.findall(r"<li><figure>\s*(.*?)<figcaption>(.*?)</figcaption>", text, re.S)
    assert len(captions) == 6
    scores = [float(re.search(r"score (\S+),", caption)[1]) for _, caption in captions]  # type: ignore[index]
    assert scores == [-9, -8, -7, -6, -5, -4]
    colours = []
    for picture, _ in captions[:4]:
        found = re.search(r'src="data:image/\w+;base64,([^"]+)" alt="([^"]+)"', picture)
        assert found and found[2].startswith("Rejected image ")
        with Image.open(io.BytesIO(base64.b64decode(found[1]))) as image:
            colours.append(image.convert("RGB").getpixel((5, 5)))
    assert colours == [(10, 0, 0), (20, 0, 0), (20, 0, 0), (30, 30, 30)]
    assert "not in its .beton file any more" in captions[4][0]
    assert "not there any more" in captions[5][0]
    assert "caf\\xe9.png" in captions[0][1]


def test_the_numbers_of_the_page_are_in_it(drawn):
    _, text = drawn
    (found,) = re.findall(r'id="numbers">(.*?)</script>', text, re.S)
    numbers = json.loads(found)
    assert numbers["changed"] and numbers["errors"] == 8 and numbers["images"] == 992
    assert sum(window["images"] for window in numbers["windows"]) == 992
    assert max(numbers["log_e"]) >= np.log(2 / 0.01)


def test_many_pictures_stay_below_the_size_of_a_page(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (150, 150, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    monkeypatch.setattr(thumbnails, "MOST_BYTES", 40_000)
    found = thumbnails.thumbnails([str(tmp_path / "a.png")] * 20)
    shown = [each for each in found if each.source]
    assert 1 < len(shown) < 20 and all("too large" in each.problem for each in found[len(shown) :])


def test_pictures_keep_the_limits_of_all_images(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "empty.png").touch()
    names = [str(tmp_path / name) for name in ("bomb.png", "dot.png", "empty.png")]
    bomb, dot, empty = thumbnails.thumbnails([*names, str(tmp_path)])[:3]
    assert "178956970" in bomb.problem and not bomb.source
    assert dot.source and empty.problem == "the file is empty"


def test_no_pictures_where_none_are_asked_for(at):
    write_rows(at / "out.csv", rows(normal(400)))
    monitor([at / "out.csv"], MonitorOptions(against=at, out=at / "page.html", pictures=0))
    text = (at / "page.html").read_text()
    assert "<img" not in text and "none is shown" in text
