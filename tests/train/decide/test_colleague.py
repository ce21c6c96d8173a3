"""The part of the report in plain words: its figures are those of the stored scores."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import special, stats

from backmix.pipeline.beton import open_set
from backmix.train import report
from backmix.train.decide.colleague import Colleague, for_colleagues
from backmix.train.decide.conformal import exact_rate
from backmix.train.decide.record import Preprocessing, Record, write_record
from backmix.train.decide.rule import Rule, conditional_rule, global_rule
from backmix.train.digests import file_digest, weights_digest
from backmix.train.evaluate import evaluate
from backmix.train.options import EvaluateOptions, Softmax, Split
from backmix.train.outputs import load_outputs, store
from backmix.train.results import read_all
from backmix.train.run import train
from backmix.train.scores import fit_scores, linear_head, score_of
from backmix.train.scores.fit_file import FIT, write_fit
from backmix.train.trained import load_model
from tests.runs import tiny_images, tiny_run, tiny_set, write_set

CLASSES = ("<b>round</b>", "flat")
SIDE = 32


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Path:
    """A run of two classes, judged on two unknown sets: of the test file, and a folder."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("judged")
    names = [*CLASSES, "c", "d"]
    write_set(root / "train.beton", *tiny_images(40, 4), names)
    write_set(root / "test.beton", *tiny_images(240, 4, seed=1), names)
    (root / "folder").mkdir()
    for number, image in enumerate(tiny_images(30, 4, seed=2)[0]):
        Image.fromarray(image).save(root / "folder" / f"{number:02d}.png")
    run = tiny_run(root / "train.beton", root / "run", Softmax(), save_steps=0)
    run = replace(run, model="classifier32-quarter", split=Split(known=CLASSES))
    assert train(run, "test", ["backmix", "train"]) == 0
    options = EvaluateOptions(
        test=(root / "test.beton",),
        unknown=(f"things={root / 'folder'}",),
        threads=1,
        device="cpu",
    )
    evaluate(run.out, options)
    return run.out


def calibrated(run: Path, rule: Rule, **changes) -> Record:
    """Write a record into a run."""
    augment = json.loads((run / "config.json").read_text())["run"]["augment"]
    seen = Preprocessing(SIDE, "whole", 1.0, tuple(augment["mean"]), tuple(augment["std"]))
    made = Record(
        "max_logit", {}, "0.1", None, rule, CLASSES, seen, "fp32", weights_digest(run), "", {}, {}
    )
    made = replace(made, **changes)
    write_record(run / "threshold.json", made)
    return made


def scores_of(run: Path, name: str) -> np.ndarray:
    return load_outputs(run / "scores" / f"{name}.safetensors").scores["max_logit"]


def usual(run: Path) -> Rule:
    """A threshold that refuses 11 of the 120 known test images: the 12th smallest is accepted."""
    return global_rule(scores_of(run, "known"), 2, exact_rate("0.1"))


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / "run")
    return folder / "run"


def of(run: Path) -> Colleague:
    (found,) = for_colleagues(read_all([run]))
    return found


def test_a_run_without_a_threshold_has_no_part(judged, tmp_path):
    run = copied(judged, tmp_path)
    assert for_colleagues(read_all([run])) == []


def test_shares_are_those_of_the_stored_scores(judged, tmp_path):
    run = copied(judged, tmp_path)
    rule = usual(run)
    calibrated(run, rule)
    rows = {name: (share, remark) for name, share, remark in of(run).summary}
    outputs = load_outputs(run / "scores" / "known.safetensors")
    accepted = scores_of(run, "known") >= rule.thresholds[0]
    right = outputs.logits.argmax(1) == outputs.labels
    assert np.count_nonzero(~accepted) == 11
    share, remark = rows["Good images refused"]
    exact = stats.binomtest(11, 120).proportion_ci(method="exact")
    assert share.count == "11 of 120" and share.percent == "9.2 %" and remark == "as promised"
    assert share.interval == f"{100 * exact.low:.1f} % to {100 * exact.high:.1f} %"
    share, remark = rows["Accepted good images in the right class"]
    assert share.count == f"{np.count_nonzero(right & accepted)} of 109"
    assert remark == f"without refusing any: {100 * right.mean():.1f} %"
    for name, n in (("unknown", 120), ("things", 30)):
        caught = int((scores_of(run, name) < rule.thresholds[0]).sum())
        assert rows[f"Unknown images caught, “{name}”"][0].count == f"{caught} of {n}"


def test_the_promise_is_said_with_its_interval_and_number(judged, tmp_path):
    run = copied(judged, tmp_path)
    calibrated(run, usual(run))
    low, high = stats.beta.interval(0.95, 12, 109)  # k = floor(0.1 * 121)
    first, second, third = of(run).promise
    assert "Of good images, 10 % at most are refused, on the average over" in first
    assert "comes from 120 such images that nothing was trained on" in second
    assert f"between {100 * low:.1f} % and {100 * high:.1f} %" in second
    assert "Of unknown images nothing can be promised" in third
    calibrated(run, usual(run), confidence=0.9, data={"compared": False})
    first, second, _ = of(run).promise
    assert "this very threshold, with 90 % confidence" in first
    assert "nobody has checked" in second


def test_a_test_set_that_is_refused_more_than_promised_is_said_to_be(judged, tmp_path):
    run = copied(judged, tmp_path)
    scores = scores_of(run, "known")
    for shift, remark in ((0.0, "as promised"), (1.0, "more than"), (-1.0, "fewer than")):
        calibrated(run, global_rule(scores + shift * 9 * scores.std(), 2, Fraction(1, 10)))
        assert of(run).summary[0][2].startswith(remark)


def test_classes_and_confusions_are_counted(judged, tmp_path):
    run = copied(judged, tmp_path)
    rule = usual(run)
    calibrated(run, rule)
    found = of(run)
    sets = {
        name: load_outputs(run / "scores" / f"{name}.safetensors")
        for name in ("known", "unknown", "things")
    }
    said = {
        name: np.where(o.scores["max_logit"] >= rule.thresholds[0], o.logits.argmax(1), 2)
        for name, o in sets.items()
    }
    labels = sets["known"].labels
    for name, refused, right in found.classes:
        of_class = said["known"][labels == CLASSES.index(name)]
        k = CLASSES.index(name)
        assert refused.count == f"{np.count_nonzero(of_class == 2)} of {len(of_class)}"
        assert right.count == f"{np.sum(of_class == k)} of {np.sum(of_class != 2)}"
    shares = [float(refused.percent.split()[0]) for _, refused, _ in found.classes]
    assert sorted(shares, reverse=True) == shares
    assert found.columns == (*CLASSES, "refused")
    rows = {row[0]: row[1:] for row in found.confusion}
    for k, name in enumerate(CLASSES):
        wanted = np.bincount(said["known"][labels == k], minlength=3)
        assert rows[name] == tuple(map(str, wanted))
    for name in ("unknown", "things"):
        assert rows[f"unknown: {name}"] == tuple(map(str, np.bincount(said[name], minlength=3)))


def test_many_classes_show_the_commonest_confusions(judged, tmp_path, monkeypatch):
    run = copied(judged, tmp_path)
    rule = usual(run)
    calibrated(run, rule)
    monkeypatch.setattr("backmix.train.decide.colleague._MOST_CLASSES", 1)
    found = of(run)
    assert not found.confusion and not found.columns
    counts = {(truth, said): int(count) for truth, said, count in found.confused}
    things = load_outputs(run / "scores" / "things.safetensors")
    accepted = things.scores["max_logit"] >= rule.thresholds[0]
    for k, name in enumerate(CLASSES):
        wanted = int(np.count_nonzero(accepted & (things.logits.argmax(1) == k)))
        assert counts.get(("unknown: things", name), 0) == wanted
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert all(truth != said for truth, said in counts)


def pixels_of(source: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        return np.array(image.convert("RGB"))


def test_pictures_are_the_hardest_errors_both_ways(judged, tmp_path):
    run = copied(judged, tmp_path)
    rule = usual(run)
    calibrated(run, rule)
    good, unknown, things = of(run).pictures
    known = load_outputs(run / "scores" / "known.safetensors")
    least = int(scores_of(run, "known").argmin())
    with open_set([judged.parent / "test.beton"]) as data:
        image = data.region(int(known.index[least])).reshape(SIDE, SIDE, 3)
        assert np.array_equal(pixels_of(good.tiles[0].source), image)
        most = int(scores_of(run, "unknown").argmax())
        number = load_outputs(run / "scores" / "unknown.safetensors").index[most]
        image = data.region(int(number)).reshape(SIDE, SIDE, 3)
        assert np.array_equal(pixels_of(unknown.tiles[0].source), image)
    assert f"is {CLASSES[known.labels[least]]}, most like " in good.tiles[0].lines[0]
    most = int(scores_of(run, "things").argmax())
    with Image.open(judged.parent / "folder" / f"{most:02d}.png") as image:
        assert np.array_equal(pixels_of(things.tiles[0].source), np.array(image))
    scores = [float(re.findall(r"score (\S+),", tile.lines[1])[0]) for tile in good.tiles]
    assert scores == sorted(scores) and len(scores) == 8


def test_pictures_that_have_gone_or_changed_leave_the_reason(judged, tmp_path):
    run, folder, beton = copied(judged, tmp_path), tmp_path / "folder", tmp_path / "test.beton"
    calibrated(run, usual(run))
    shutil.copytree(judged.parent / "folder", folder)
    tiny_set(beton, seed=7)  # another file
    for name, path in (("things", folder), ("unknown", beton)):
        outputs = load_outputs(run / "scores" / f"{name}.safetensors")
        store(run / "scores" / f"{name}.safetensors", replace(outputs, files=(str(path),)))
    best = folder / f"{int(scores_of(run, 'things').argmax()):02d}.png"
    Image.new("RGB", (5, 5)).save(best)
    _, unknown, things = of(run).pictures
    assert all("is not what the run was judged on" in tile.problem for tile in unknown.tiles)
    assert "not the image that was judged any more" in things.tiles[0].problem
    assert things.tiles[1].source
    best.unlink()
    _, _, things = of(run).pictures
    assert all("no longer holds the images" in tile.problem for tile in things.tiles)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "others"}, "other weights than the run has now"),
        ({"classes": ("x", "y")}, "other classes than the evaluation's"),
        (
            {"score": "knn"},
            "is not what the score knn was fitted to when the threshold",
        ),
        ({"preprocessing": None}, "evaluated at 32 px, the threshold was chosen at 40 px"),
    ],
)
def test_another_evaluation_than_the_records_has_no_figures(judged, tmp_path, changes, message):
    run = copied(judged, tmp_path)
    made = calibrated(run, usual(run))
    if "preprocessing" in changes:
        changes = {"preprocessing": replace(made.preprocessing, size=40)}
    calibrated(run, usual(run), **changes)
    found = of(run)
    assert message in found.missing and found.promise and not found.summary


def rewritten(run: Path, **changes) -> None:
    """Change what metrics.json says of the evaluation; None = it does not say it."""
    document = json.loads((run / "metrics.json").read_text())
    for name, value in changes.items():
        del document[name]
        document |= {name: value} if value is not None else {}
    (run / "metrics.json").write_text(json.dumps(document))


def test_an_evaluation_in_another_precision_or_with_other_weights_has_no_figures(judged, tmp_path):
    run = copied(judged, tmp_path)
    document = json.loads((run / "metrics.json").read_text())
    assert document["precision"] == "fp32" and document["weights"] == weights_digest(run)
    calibrated(run, usual(run), precision="bf16")
    found = of(run)
    assert "evaluated in fp32, the threshold was chosen in bf16" in found.missing
    assert "Evaluate with --precision bf16" in found.missing and not found.summary
    calibrated(run, usual(run))
    rewritten(run, weights="others")
    assert "evaluated with other weights than it has now" in of(run).missing


def test_an_evaluation_of_an_earlier_version_has_figures_and_says_what_is_not_known(
    judged, tmp_path
):
    run = copied(judged, tmp_path)
    calibrated(run, usual(run))
    assert not of(run).caution
    before = of(run).summary
    rewritten(run, precision=None, weights=None)
    found = of(run)
    assert found.summary == before and not found.missing
    assert "it is not known whether they are those of the threshold, fp32" in found.caution


def fitted(run: Path, score: str, temperature: float, **changes) -> Record:
    """Fit scores to the known test images, write the fit with this temperature, calibrate."""
    known, model = load_outputs(run / "scores" / "known.safetensors"), load_model(run)
    fit = replace(fit_scores(known, linear_head(model.head)), temperature=temperature)
    write_fit(run / FIT, fit)
    scores = score_of(score, known.logits, known.features, known.extras, model.head, fit)
    rule = global_rule(scores, 2, exact_rate("0.1"))
    return calibrated(run, rule, score=score, fit=file_digest(run / FIT), **changes)


@pytest.mark.parametrize("score", ("temperature", "knn", "vim"))
def test_a_fitted_score_is_judged_by_the_fit_of_the_threshold(judged, tmp_path, score):
    """The evaluation stored scores by another fit, those of other images at that."""
    run = copied(judged, tmp_path)
    made = fitted(run, score, temperature=7.0)
    for name in ("known", "unknown", "things"):
        outputs = load_outputs(run / "scores" / f"{name}.safetensors")
        others = {**outputs.scores, score: np.full(len(outputs), 1e9)}
        store(run / "scores" / f"{name}.safetensors", replace(outputs, scores=others))
    rows = {name: share for name, share, _ in of(run).summary}
    assert rows["Good images refused"].count == "11 of 120"
    if score == "temperature":
        z = load_outputs(run / "scores" / "things.safetensors").logits.astype(np.float64) / 7
        caught = special.softmax(z, 1).max(1) < made.rule.thresholds[0]
        assert rows["Unknown images caught, “things”"].count == f"{caught.sum()} of 30"


def test_a_fit_that_is_not_the_thresholds_has_no_figures(judged, tmp_path):
    run = copied(judged, tmp_path)
    fitted(run, "temperature", temperature=7.0)
    before = (run / FIT).read_bytes()
    fitted(run, "temperature", temperature=3.0)
    (run / FIT).write_bytes(before)
    assert "is not what the score temperature was fitted to" in of(run).missing


def test_mirror_images_and_a_damaged_record_leave_the_reason(judged, tmp_path):
    run = copied(judged, tmp_path)
    calibrated(run, usual(run))
    document = json.loads((run / "metrics.json").read_text())
    document["views"]["flip"] = True
    (run / "metrics.json").write_text(json.dumps(document))
    assert "at 32 px and with mirror images" in of(run).missing
    (run / "threshold.json").write_text("{")
    found = of(run)
    assert "threshold.json cannot be read" in found.missing and not found.promise
    report.write_report([run], tmp_path / "report.html")
    assert "threshold.json cannot be read" in unescape((tmp_path / "report.html").read_text())


def test_a_threshold_chosen_on_the_test_images_is_said_to_flatter(judged, tmp_path):
    run = copied(judged, tmp_path)
    digest = load_outputs(run / "scores" / "known.safetensors").digest
    calibrated(run, usual(run), data={"digest": digest})
    assert "may flatter" in of(run).caution
    calibrated(run, usual(run), data={"digest": "others"})
    assert not of(run).caution


def test_a_threshold_by_class_has_a_row_for_each(judged, tmp_path):
    run = copied(judged, tmp_path)
    known = load_outputs(run / "scores" / "known.safetensors")
    predicted = np.arange(200) % 2
    scores = np.random.default_rng(0).normal(size=200) + float(known.scores["max_logit"].mean())
    calibrated(run, conditional_rule(scores, predicted, CLASSES, Fraction(1, 10)))
    found = of(run)
    assert [row[:3] for row in found.categories] == [(name, "100", "9.9 %") for name in CLASSES]
    assert "Of the good images of each category below" in found.promise[0]


def test_the_page_shows_it_first_and_escapes_names(judged, tmp_path):
    run = copied(judged, tmp_path)
    calibrated(run, usual(run))
    out = tmp_path / "report.html"
    report.write_report([run], out)
    page = out.read_text()
    part = page[page.index('id="in-plain-words"') : page.index('<h2 id="results"')]
    assert "<b>round" not in page and "&lt;b&gt;round&lt;/b&gt;" in part
    assert part.count("<img") == part.count('<img src="data:image/png;base64,') >= 17
    alts = re.findall(r'<img [^>]*alt="([^"]+)"', part)
    assert len(alts) == part.count("<img") and "11 of 120" in part
    levels = [int(level) for level in re.findall(r"<h(\d)", part)]
    assert levels == [3, 4, 4, 4]
    assert len(page) < 5_000_000
