"""Calibrating runs: which images serve, which are refused, what is written, what is said."""

import os
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from backmix.pipeline import beton
from backmix.pipeline.beton import open_beton, open_set
from backmix.pipeline.convert import convert
from backmix.pipeline.decode import read_image
from backmix.pipeline.options import ConvertOptions
from backmix.pipeline.subset import hold_out, select
from backmix.train.checkpoint import locked
from backmix.train.decide import calibrate as module
from backmix.train.decide.decider import open_decider
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.record import Record, read_record
from backmix.train.decide.rule import conditional_rule, global_rule, shrunk_rule
from backmix.train.digests import file_digest, weights_digest
from backmix.train.outputs import Outputs, load_outputs
from backmix.train.trained import read_run
from backmix.train.training_images import training_images
from tests.train.decide.known_runs import (
    KNOWN,
    calibrated,
    pictures,
    write_beton,
    write_run,
)


def read(run: Path) -> Record:
    return read_record(run)


def stored(run: Path) -> Outputs:
    return load_outputs(run / "calibration.safetensors")


def refusal(run: Path, **options: Any) -> str:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "run.lock"}
    with pytest.raises((ValueError, OSError)) as error:
        calibrated(run, **options)
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "run.lock"}
    assert before == after  # nothing is left behind
    return str(error.value)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A run whose training held two of five images out, and a file of other known images."""
    train = write_beton(tmp_path / "train.beton", pictures(200, 0))
    write_run(tmp_path / "run", train, val=0.4)
    write_beton(
        tmp_path / "known.beton", pictures(120, 1), [1, 3] * 60, classes=["x", "c", "y", "a"]
    )
    return tmp_path


# --- the usual way --------------------------------------------------------------------------------


def test_held_out_images_give_the_threshold(place: Path) -> None:
    run = place / "run"
    said = calibrated(run)
    with open_beton(place / "train.beton") as data:
        labels = data.labels
    _, held = hold_out(select(labels, [1, 3]), 0.4, 5)
    outputs, record = stored(run), read(run)
    assert outputs.index.tolist() == held.index.tolist()
    scores = np.sort(outputs.logits.max(1).astype(np.float64))
    (part,) = record.rule.categories
    assert len(scores) == 40 and (part.n, part.k) == (40, 2)
    assert part.threshold == scores[1] == record.rule.thresholds[0]
    assert outputs.scores["max_logit"].tolist() == outputs.logits.max(1).tolist()
    assert (record.score, record.rate, record.confidence) == ("max_logit", "0.05", None)
    assert record.classes == KNOWN and record.precision == "fp32" and record.fit == ""
    assert record.weights == weights_digest(run)
    assert record.data["images"] == "held_out" and record.data["n"] == 40
    assert record.data["compared"] is True and record.data["repeated"] == 0
    assert record.data["digest"] == outputs.digest == read_run(run).digest
    assert record.facts["run"]["commit"] == "0123456789ab"
    assert record.facts["command"] == f"backmix calibrate {run}"
    assert set(record.facts["versions"]) >= {"torch", "numpy", "backmix"}
    assert "2 of 40" in said and "at most 5 %" in said and "4.88 %" in said
    assert "0.61 % and 13.16 %" in said  # of Beta(2, 39)
    assert "of unknown images nothing is" in said
    assert "needs 45 images" in said  # --confidence 0.9 would be refused
    accepted = open_decider(run, PredictOptions(device="cpu")).record.rule.decide(
        outputs.logits.argmax(1), outputs.scores["max_logit"]
    )[0]
    assert (~accepted).sum() == 1
    right = outputs.logits.argmax(1) == outputs.labels
    assert record.data["right"] == right.sum()
    assert record.data["accepted_right"] == (right & accepted).sum()


def test_images_of_a_file_are_matched_by_class_names(place: Path) -> None:
    said = calibrated(place / "run", data=place / "known.beton", reject_rate="0.1")
    outputs = stored(place / "run")
    assert outputs.labels.tolist() == [0, 1] * 60  # c = 0 and a = 1, whatever their numbers there
    assert read(place / "run").rule.categories[0].k == 12
    assert read(place / "run").data["images"] == "given" and "known.beton" in said


def test_images_of_a_folder_are_taken_as_known(place: Path) -> None:
    folder = place / "folder"
    for number, pixels in enumerate(pictures(60, 3)):
        path = folder / ("c" if number % 3 == 0 else "somewhere/deep") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "somewhere" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    said = calibrated(place / "run", data=folder / "somewhere")
    record, outputs = read(place / "run"), stored(place / "run")
    assert record.data["n"] == 40 and record.data["bad"] == 1
    assert set(outputs.labels.tolist()) == {-1} and record.data["labelled"] == 0
    assert "taken as known" in said and "1 could not be read" in said
    # Some images are of known classes for sure: are the others as well?
    assert "also those in deep" in said
    said = refusal(place / "run", data=folder)
    assert "41 images outside of these" in said and "--known-only" in said
    said = calibrated(place / "run", data=folder, known_only=True)
    assert set(stored(place / "run").labels.tolist()) == {0} and read(place / "run").data["n"] == 20
    assert "41 images outside" in said and "no calibration image is of a" in said
    assert "no subfolder with images" in refusal(
        place / "run", data=folder / "somewhere", known_only=True
    )
    (folder / "c").rename(folder / "C")
    assert "has a subfolder C, and the run knows a class c" in refusal(place / "run", data=folder)


@pytest.mark.parametrize("options", [{}, {"confidence": 0.9}, {"per_class": True}])
def test_the_rule_is_that_of_the_scores(place: Path, options: dict[str, Any]) -> None:
    write_beton(place / "many.beton", pictures(600, 4), np.arange(600) % 2, classes=list(KNOWN))
    calibrated(place / "run", data=place / "many.beton", score="msp", **options)
    outputs, rate = stored(place / "run"), Fraction(1, 20)
    scores, predicted = outputs.scores["msp"], outputs.logits.argmax(1)
    confidence = options.get("confidence")
    if options.get("per_class"):
        expected = conditional_rule(scores, predicted, KNOWN, rate)
    else:
        expected = global_rule(scores, 2, rate, confidence)
    found = read(place / "run").rule
    assert found.per_class == expected.per_class
    assert found.thresholds.tolist() == expected.thresholds.tolist()


def test_a_shrunk_rule_promises_over_all_and_shows_each_class(place: Path) -> None:
    write_beton(place / "many.beton", pictures(600, 4), np.arange(600) % 2, classes=list(KNOWN))
    said = calibrated(place / "run", data=place / "many.beton", per_class=True, shrink=True)
    outputs, record = stored(place / "run"), read(place / "run")
    predicted = outputs.logits.argmax(1)
    expected = shrunk_rule(outputs.scores["max_logit"], predicted, 2, Fraction(1, 20))
    assert record.rule.thresholds.tolist() == expected.thresholds.tolist()
    of, rejected = record.data["by_class"]
    assert sum(of) == 300 and sum(rejected) == record.rule.categories[0].k - 1
    assert "of a single class nothing is promised" in said


def test_the_earlier_threshold_is_kept_under_its_date(place: Path) -> None:
    run = place / "run"
    calibrated(run)
    first = (run / "threshold.json").read_bytes()
    date = read(run).facts["date"]
    for rate in ("0.1", "0.2", "0.3"):
        calibrated(run, reject_rate=rate)
    kept = sorted(run.glob("threshold.2*.json"))
    assert len(kept) == 3
    assert first in [path.read_bytes() for path in kept]
    assert kept[0].name.startswith("threshold." + date[:10])
    assert {read_record(path).rate for path in kept} == {"0.05", "0.1", "0.2"}
    (run / "threshold.json").write_text("damaged")
    os.utime(run / "threshold.json", (1e9, 1e9))
    calibrated(run)
    assert (run / "threshold.2001-09-09T01-46-40Z.json").read_text() == "damaged"


def test_views_of_another_side_are_remembered(place: Path) -> None:
    calibrated(place / "run", size=24)
    assert read(place / "run").preprocessing.size == 24
    decider = open_decider(place / "run", PredictOptions(device="cpu"))
    assert decider.scorer.preprocessing.size == 24  # type: ignore[attr-defined]


# --- scores that are fitted -----------------------------------------------------------------------


def test_a_fitted_score_leaves_what_it_learned_in_the_run(place: Path) -> None:
    run = place / "run"
    calibrated(run, score="knn", data=place / "known.beton")
    record = read(run)
    assert record.fit == file_digest(run / "fit.safetensors")
    assert record.parameters["fitted_to"] == record.parameters["features"] == 60
    calibrated(run, score="msp")  # which needs none, and leaves the earlier one its own
    assert read(run).fit == ""
    (kept,) = run.glob("threshold.2*.json")
    assert open_decider(kept, PredictOptions(device="cpu")).record.score == "knn"


def test_a_temperature_is_not_calibrated_on_the_images_that_it_is_fitted_to(place: Path) -> None:
    run = place / "run"
    assert "not to the held-out ones" in calibrated(run, score="temperature")
    assert read(run).parameters["held_out"] == 0
    said = calibrated(run, score="temperature", data=place / "known.beton")
    assert read(run).parameters["held_out"] == 40 and "the temperature is" not in said
    pixels = pictures(200, 0)
    held = training_images(read_run(run))[1].subset
    write_beton(place / "same.beton", pixels[held.index], held.labels, classes=list(KNOWN))
    assert "not to the held-out" in calibrated(run, score="temperature", data=place / "same.beton")
    assert read(run).parameters["held_out"] == 0
    write_run(place / "all", place / "train.beton")
    said = calibrated(place / "all", score="temperature", data=place / "known.beton")
    assert "no image was held out" in said


# --- training images ------------------------------------------------------------------------------


def test_the_training_file_itself_is_refused(place: Path) -> None:
    said = refusal(place / "run", data=place / "train.beton", known_only=True)
    assert said.startswith("60 of 100 calibration images are training images")
    assert "without --data those that --val held out are taken" in said
    assert "and 52 more" in said


def test_a_few_training_images_among_others_are_refused_with_their_names(place: Path) -> None:
    pixels = pictures(60, 9)
    trained_on = training_images(read_run(place / "run"))[0].subset
    pixels[[7, 31]] = pictures(200, 0)[trained_on.index[[0, 5]]]
    path = write_beton(place / "mixed.beton", pixels, np.arange(60) % 2, classes=list(KNOWN))
    said = refusal(place / "run", data=path)
    assert said.startswith("2 of 60") and "a/7.png, a/31.png" in said and "more." not in said


def test_images_of_the_file_that_were_never_trained_on_serve(place: Path) -> None:
    own = training_images(read_run(place / "run"))
    held = own[1].subset
    pixels = pictures(200, 0)
    write_beton(place / "held.beton", pixels[held.index], held.labels, classes=list(KNOWN))
    calibrated(place / "run", data=place / "held.beton")
    of_file = stored(place / "run")
    calibrated(place / "run")
    assert of_file.logits.tobytes() == stored(place / "run").logits.tobytes()


def photographs(folder: Path, count: int, seed: int, form: str = "jpg", each: int = 1) -> None:
    """Write larger images into a folder for each known class."""
    random = np.random.default_rng(seed)
    for number in range(count):
        pixels = random.integers(0, 256, (6, 8, 3), np.uint8)
        image = Image.fromarray(pixels).resize((40, 30), Image.Resampling.BICUBIC)
        path = folder / KNOWN[number % 2] / f"{number}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


@pytest.fixture
def of_jpegs(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a run, trained on a conversion of a folder of photographs."""

    def make(form: str = "jpg", **options: Any) -> Path:
        photographs(tmp_path / "train", 40, 0, form)
        photographs(tmp_path / "new", 40, 1, form)
        asked = ConvertOptions(workers=1, **options)
        convert("folder:" + str(tmp_path / "train"), tmp_path / "train.beton", asked)
        write_run(tmp_path / "run", tmp_path / "train.beton")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("jpg", {}),
        ("jpg", {"mode": "raw"}),
        ("png", {}),
        ("png", {"mode": "jpg"}),
        ("jpg", {"preset": "s384"}),
        ("jpg", {"max_side": 20}),
        ("png", {"mode": "proportion"}),
        ("png", {"mode": "smart", "smart_threshold": 100}),
    ],
)
def test_training_images_are_recognised_as_files(
    of_jpegs: Callable[..., Path], form: str, options: dict[str, Any]
) -> None:
    place = of_jpegs(form, **options)
    said = refusal(place / "run", data=place / "train")
    assert said.startswith("40 of 40 calibration images are training images")
    assert "a/1." in said
    calibrated(place / "run", data=place / "new")


@pytest.mark.parametrize(("trained", "new"), [("auto", "raw"), ("raw", "auto"), ("raw", "raw")])
def test_training_images_are_recognised_by_their_pixels(
    of_jpegs: Callable[..., Path], trained: Any, new: Any
) -> None:
    place = of_jpegs(mode=trained)
    for name in ("train", "new"):
        convert(
            "folder:" + str(place / name),
            place / f"{name}2.beton",
            ConvertOptions(workers=1, mode=new),
        )
    said = refusal(place / "run", data=place / "train2.beton")
    assert said.startswith("40 of 40")
    calibrated(place / "run", data=place / "new2.beton")


def test_a_decoded_copy_of_a_training_jpeg_is_recognised(of_jpegs: Callable[..., Path]) -> None:
    place = of_jpegs()
    with open_set(place / "train.beton") as data:
        pixels = read_image(data, 3)[0]
    Image.fromarray(pixels).save(next((place / "new").iterdir()) / "copy.png")
    assert "1 of 41" in refusal(place / "run", data=place / "new")


def test_stock_files_have_no_checksums_and_are_compared_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = beton._join

    def stock(files: Any) -> Any:
        return replace(whole(files), hashes=None, flags=None)

    monkeypatch.setattr(beton, "_join", stock)
    said = refusal(place / "run", data=place / "train.beton", known_only=True)
    assert said.startswith("60 of 100 calibration images are training images")
    calibrated(place / "run", data=place / "known.beton")


def test_copies_among_the_held_out_images_are_left_out(tmp_path: Path) -> None:
    pixels = pictures(200, 0)
    rest, held = hold_out(select(np.arange(200) % 4, [1, 3]), 0.4, 5)
    pixels[held.index[[2, 9]]] = pixels[rest.index[[1, 1]]]
    pixels[held.index[12]] = pixels[held.index[11]]
    write_run(tmp_path / "run", write_beton(tmp_path / "train.beton", pixels), val=0.4)
    said = calibrated(tmp_path / "run")
    outputs, kept = stored(tmp_path / "run"), np.delete(held.index, [2, 9])
    assert outputs.index.tolist() == kept.tolist()
    assert "2 of the held-out images are equal to training images" in said
    assert "1 calibration images are copies of others" in said
    assert read(tmp_path / "run").data["repeated"] == 1


def test_the_images_of_the_run_that_it_began_with_do_not_serve_either(place: Path) -> None:
    write_beton(place / "later.beton", pictures(200, 8))
    write_run(place / "later", place / "later.beton", init=place / "run")
    first = training_images(read_run(place / "run"))[0].subset
    pixels = pictures(200, 0)[first.index]
    write_beton(place / "first.beton", pixels, first.labels, classes=list(KNOWN))
    assert refusal(place / "later", data=place / "first.beton").startswith("60 of 60")
    calibrated(place / "later", data=place / "known.beton")
    (place / "train.beton").rename(place / "moved.beton")
    assert "training images are gone" in calibrated(place / "later", data=place / "known.beton")
    write_run(place / "wild", place / "later.beton", init=place / "weights.pt")
    assert "is not known" in calibrated(place / "wild", data=place / "known.beton")


def test_a_training_file_that_is_gone_must_be_named_or_left_unchecked(place: Path) -> None:
    (place / "train.beton").rename(place / "moved.beton")
    said = refusal(place / "run", data=place / "known.beton")
    assert "train.beton is not there" in said and "--train FILE" in said and "--unchecked" in said
    assert "--train FILE" in refusal(place / "run")
    calibrated(place / "run", data=place / "known.beton", train=(place / "moved.beton",))
    assert read(place / "run").data["compared"] is True
    said = calibrated(place / "run", data=place / "known.beton", unchecked=True)
    assert read(place / "run").data["compared"] is False and "nobody has compared" in said
    said = refusal(place / "run", data=place / "known.beton", unchecked=True, score="knn")
    assert "the score knn is fitted to the training images" in said
    said = refusal(place / "run", data=place / "known.beton", train=(place / "known.beton",))
    assert "is not what" in said and "was trained on" in said
    said = refusal(
        place / "run",
        data=place / "moved.beton",
        known_only=True,
        train=(place / "moved.beton",),
        unchecked=True,
    )
    assert "are training images" in said  # where it is there it is compared


# --- other preprocessing --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "new", "words"),
    [
        ({"max_side": 20}, {}, "max_side 20, the calibration images max_side None"),
        ({}, {"max_side": 20}, "max_side None, the calibration images max_side 20"),
        ({"quality": 50}, {}, "quality 50"),
        ({"quality": 50}, {"quality": 95}, "quality 95"),
        ({}, {"quality": 95}, "quality 95"),
        ({"max_side": 20}, {"max_side": 24}, "max_side 24"),
        ({"max_side": 24}, {"max_side": 20}, "max_side 24, the calibration images max_side 20"),
    ],
)
def test_images_that_were_stored_in_another_way_are_refused(
    of_jpegs: Callable[..., Path], trained: dict[str, Any], new: dict[str, Any], words: str
) -> None:
    place = of_jpegs(**trained)
    convert("folder:" + str(place / "new"), place / "new.beton", ConvertOptions(workers=1, **new))
    said = refusal(place / "run", data=place / "new.beton")
    assert "the training images were stored with" in said and words in said


@pytest.mark.parametrize(
    ("form", "trained", "new"),
    [
        ("jpg", {"max_side": 20}, {"max_side": 20}),
        ("jpg", {"preset": "s384"}, {"max_side": 40}),  # no image reaches either limit
        ("jpg", {"preset": "s500"}, {"check": "full"}),
        ("png", {}, {"mode": "raw"}),
        ("jpg", {"mode": "raw"}, {"mode": "auto"}),
        ("png", {"mode": "jpg"}, {"mode": "jpg", "quality": 90}),  # the default, said
    ],
)
def test_options_that_change_no_image_do_no_harm(
    of_jpegs: Callable[..., Path], form: str, trained: dict[str, Any], new: dict[str, Any]
) -> None:
    place = of_jpegs(form, **trained)
    if new.get("max_side") == 40:
        photographs(place / "small", 40, 5)
        for path in (place / "small").rglob("*.jpg"):
            Image.open(path).resize((36, 30)).save(path)
        (place / "new").rename(place / "old")
        (place / "small").rename(place / "new")
    convert("folder:" + str(place / "new"), place / "new.beton", ConvertOptions(workers=1, **new))
    calibrated(place / "run", data=place / "new.beton")


@pytest.mark.parametrize(
    "note",
    [{"max_side": "wide"}, {"preset": "s9"}, {"quality": [1]}, {"mode": {}}, {"quality": True}],
)
def test_a_file_may_say_anything_about_its_making(place: Path, note: dict[str, Any]) -> None:
    path = write_beton(
        place / "odd.beton", pictures(40, 3), np.arange(40) % 2, list(KNOWN), options=note
    )
    calibrated(place / "run", data=path)


# --- what is refused ------------------------------------------------------------------------------


def test_images_of_classes_that_the_run_does_not_know_are_named(place: Path) -> None:
    write_beton(place / "all.beton", pictures(160, 7))
    said = refusal(place / "run", data=place / "all.beton")
    assert "images of d, b, which" in said and "it knows c, a" in said and "--known-only" in said
    said = calibrated(place / "run", data=place / "all.beton", known_only=True)
    assert "80 images of classes that the run does not know were left out" in said
    assert read(place / "run").data["n"] == 80
    write_beton(place / "other.beton", pictures(40, 7), classes=["u", "v"])
    assert "no image of the known classes" in refusal(
        place / "run", data=place / "other.beton", known_only=True
    )


def test_a_class_without_images_is_said_and_falls_into_the_pool(place: Path) -> None:
    path = write_beton(place / "one.beton", pictures(80, 3), [1] * 80, classes=["a", "c"])
    said = calibrated(place / "run", data=path, per_class=True)
    record = read(place / "run")
    assert record.data["absent"] == ["a"] and "no calibration image is of a" in said
    assert sum(part.n for part in record.rule.categories) >= 80
    assert sorted(k for part in record.rule.categories for k in part.classes) == [0, 1]
    assert "nearly" not in said
    assert "holds nearly" in calibrated(place / "run", data=path, per_class=True, confidence=0.9)


def test_a_class_that_the_file_does_not_even_name_moves_no_label(place: Path) -> None:
    path = write_beton(place / "one.beton", pictures(80, 3), [0] * 80, classes=["a"])
    calibrated(place / "run", data=path)
    assert set(stored(place / "run").labels.tolist()) == {1}  # a is the run's second class
    assert read(place / "run").data["absent"] == ["c"]


def test_too_few_images_are_refused_with_the_number_needed(place: Path) -> None:
    run = place / "run"
    assert "40 calibration images are too few" in refusal(run, reject_rate="0.01")
    assert "99 are needed" in refusal(run, reject_rate="0.01")
    assert "45 are needed" in refusal(run, confidence=0.9)
    assert "58 are needed in two halves" in refusal(
        run, reject_rate="0.0334", per_class=True, shrink=True
    )


def test_a_network_that_says_nan_is_refused(place: Path) -> None:
    path = place / "run" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights[max(weights)].fill_(float("nan"))
    safetensors.torch.save_file(weights, path)
    said = refusal(place / "run")
    assert "NaN or infinite" in said and "40 of 40" in said and str(place / "run") in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reject_rate": "5"}, "--reject-rate: a rate lies between 0 and 1"),
        ({"reject_rate": "5%"}, "--reject-rate: a rate is a number"),
        ({"confidence": 0.4}, "--confidence must be in [0.5, 1)"),
        ({"confidence": 1.0}, "--confidence must be in [0.5, 1)"),
        ({"confidence": float("nan")}, "--confidence must be in [0.5, 1)"),
        ({"shrink": True}, "add --per-class"),
        ({"known_only": True}, "--data, which is not given"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"threads": -1}, "--threads must be 0"),
        ({"size": -3}, "--size must be 1"),
        ({"size": 99_999}, "--size must be 1"),
        ({"precision": "fp8"}, "--precision must be"),
        ({"score": "odin"}, "backward pass"),
        ({"score": "sharpness"}, "control"),
        ({"score": "max-logit"}, "there are msp, temperature, max_logit"),
        ({"data": Path("nowhere")}, "there is no such file or folder"),
        ({"data": Path(__file__)}, "test_calibrate.py"),
    ],
)
def test_mistakes_are_named(place: Path, options: dict[str, Any], words: str) -> None:
    assert words in refusal(place / "run", **options)


def test_folders_without_images_are_refused(place: Path) -> None:
    empty = place / "empty"
    empty.mkdir()
    assert "no image in it or its subfolders" in refusal(place / "run", data=empty)
    for number in range(30):
        (empty / f"{number}.png").write_bytes(b"no image")
    said = refusal(place / "run", data=empty)
    assert "no image that can be read" in said and "0.png" in said


def test_a_run_that_held_nothing_out_says_what_is_needed(place: Path) -> None:
    write_run(place / "all", place / "train.beton")
    assert "--val 0" in refusal(place / "all") and "--data" in refusal(place / "all")
    (place / "none").mkdir()
    assert "has no config.json" in refusal(place / "none")
    (place / "run" / "model.safetensors").unlink()
    assert "the run is not finished" in refusal(place / "run")


def test_two_cannot_calibrate_one_run_at_a_time(place: Path) -> None:
    with locked(place / "run"), pytest.raises(ValueError, match="in use by process"):
        calibrated(place / "run")


def test_equal_scores_at_the_threshold_are_said(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "score_of", lambda name, logits, *rest: np.full(len(logits), 2.0))
    said = calibrated(place / "run")
    assert "40 calibration images of all classes have the very score of the threshold" in said


def test_a_calibration_that_fails_to_write_leaves_the_earlier_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place / "run"
    calibrated(run, score="knn", data=place / "known.beton")
    before = (run / "threshold.json").read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_record", full)
    with pytest.raises(OSError, match="No space"):
        calibrated(run, score="vim", data=place / "known.beton")
    assert (run / "threshold.json").read_bytes() == before
    with pytest.raises(ValueError, match="not what the score knn was fitted to"):
        open_decider(run, PredictOptions(device="cpu"))
