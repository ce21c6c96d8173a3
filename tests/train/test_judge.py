"""What stands in metrics.json: every figure against the function or formula that defines it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score

from backmix.train import metrics
from backmix.train.intervals import auroc_interval, fpr95_intervals, oscr_interval
from backmix.train.judge import Scored, judge, table
from backmix.train.results import METRICS

CLASSES = 3


def made(name: str, n: int, shift: float, seed: int, group: str = "", known: bool = False):
    """Return a set with the scores msp and gen and the cue brightness, drawn around `shift`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=n) if known else np.full(n, -1)
    predicted = np.where(rng.random(n) < 0.7, labels, 0) if known else rng.integers(CLASSES, size=n)
    scores = {
        "msp": rng.normal(shift, 1, n).round(1),
        "gen": rng.normal(2 * shift, 1, n),
        "brightness": rng.normal(-shift, 1, n),
    }
    return Scored(name, group, seed % 2, labels, predicted, scores)


KNOWN = made("known", 80, 1.0, 0, known=True)
SHIFTED = [
    made("rain", 30, 0.6, 1, "csid", known=True),
    made("art", 20, 0.2, 2, "csid", known=True),
]
UNKNOWN = [
    made("cats", 40, 0.2, 3, "near"),
    made("dogs", 50, 0.1, 4, "near"),
    made("noise", 60, -1.0, 5, "far"),
    made("more", 10, 0.0, 6),
]
HELD_OUT = made("val", 60, 1.0, 7, known=True)
DOCUMENT = judge(KNOWN, [SHIFTED[0], *UNKNOWN, SHIFTED[1]], HELD_OUT)
RIGHT = KNOWN.predicted == KNOWN.labels


@pytest.mark.parametrize("images", UNKNOWN, ids=lambda images: images.name)
@pytest.mark.parametrize("score", ["msp", "gen"])
def test_a_figure_is_what_its_name_says(images: Scored, score: str) -> None:
    found = DOCUMENT["unknown"][images.name]
    assert (found["n"], found["bad"], found["group"]) == (len(images), images.bad, images.group)
    f, k, u = found["scores"][score], KNOWN.scores[score], images.scores[score]
    for name in ("auroc", "aupr_known", "aupr_unknown", "dtacc"):
        assert f[name] == getattr(metrics, name)(k, u)
    for name in ("fpr95_unknown_accepted", "fpr95_known_rejected"):
        assert f[name] == getattr(metrics, name)(k, u)
    assert f["oscr"] == metrics.oscr(k, RIGHT, u)
    assert f["aurc_open"] == metrics.aurc(k, RIGHT, u)
    assert f["auroc_ci"] == auroc_interval(k, u).ends
    assert f["oscr_ci"] == oscr_interval(k, RIGHT, u).ends
    accepted, rejected = fpr95_intervals(k, u)
    assert f["fpr95_unknown_accepted_ci"] == accepted.ends
    assert f["fpr95_known_rejected_ci"] == rejected.ends
    for percent in (1, 5, 10):
        expected = metrics.ccr_at_fpr(k, RIGHT, u, percent / 100)
        assert (f[f"ccr_fpr{percent}"], f[f"realised_fpr{percent}"]) == expected


def test_a_cue_is_no_score_and_counts_in_either_direction() -> None:
    # The unknown images are the brighter ones here: an area below one half.
    for images in UNKNOWN:
        found = DOCUMENT["unknown"][images.name]
        assert set(found["scores"]) == {"msp", "gen"} and set(found["cues"]) == {"brightness"}
        area = metrics.auroc(KNOWN.scores["brightness"], images.scores["brightness"])
        assert found["cues"]["brightness"] == max(area, 1 - area)
    assert metrics.auroc(KNOWN.scores["brightness"], UNKNOWN[2].scores["brightness"]) < 0.2


def test_the_risk_of_the_classes_alone_stands_with_the_known_set() -> None:
    known = DOCUMENT["known"]
    assert known["accuracy"] == RIGHT.mean()
    assert set(known["scores"]) == {"msp", "gen"}
    assert known["scores"]["gen"] == {"aurc": metrics.aurc(KNOWN.scores["gen"], RIGHT)}


@pytest.mark.parametrize("images", UNKNOWN, ids=lambda images: images.name)
def test_macro_f1_takes_its_threshold_from_held_out_images(images: Scored) -> None:
    threshold = np.sort(HELD_OUT.scores["gen"])[60 - 57]  # 57 of 60 are at or above it
    predicted = np.concatenate(
        [np.where(s.scores["gen"] >= threshold, s.predicted, CLASSES) for s in (KNOWN, images)]
    )
    labels = np.concatenate([KNOWN.labels, np.full(len(images), CLASSES)])
    expected = f1_score(labels, predicted, average="macro")
    assert DOCUMENT["unknown"][images.name]["scores"]["gen"]["macro_f1"] == pytest.approx(expected)
    without = judge(KNOWN, [images])["unknown"][images.name]["scores"]["gen"]
    assert "macro_f1" not in without


def test_groups_are_plain_means_and_a_set_without_group_is_in_none() -> None:
    groups = DOCUMENT["groups"]
    assert {name: group["sets"] for name, group in groups.items()} == {
        "near": ["cats", "dogs"],
        "far": ["noise"],
    }
    cats, dogs = (DOCUMENT["unknown"][name] for name in ("cats", "dogs"))
    for metric, mean in groups["near"]["scores"]["gen"].items():
        both = cats["scores"]["gen"][metric] + dogs["scores"]["gen"][metric]
        assert mean == pytest.approx(both / 2)  # 40 and 50 images weigh the same
    assert "auroc_ci" not in groups["near"]["scores"]["gen"]
    both = cats["cues"]["brightness"] + dogs["cues"]["brightness"]
    assert groups["near"]["cues"]["brightness"] == pytest.approx(both / 2)


def test_known_images_under_shift_are_known() -> None:
    assert list(DOCUMENT["shifted"]) == ["rain", "art"]
    assert not set(DOCUMENT["shifted"]) & set(DOCUMENT["unknown"])
    for images in SHIFTED:
        found = DOCUMENT["shifted"][images.name]
        assert found["accuracy"] == (images.predicted == images.labels).mean()
        area = auroc_interval(KNOWN.scores["msp"], images.scores["msp"])
        assert found["scores"]["msp"] == {"auroc": area.value, "auroc_ci": area.ends}
    full = DOCUMENT["full_spectrum"]
    known = [KNOWN, *SHIFTED]
    assert full["n"] == 130
    assert full["accuracy"] == np.concatenate([s.predicted == s.labels for s in known]).mean()
    # As if one known set had held all of them.
    pooled = replace(
        KNOWN,
        labels=np.concatenate([s.labels for s in known]),
        predicted=np.concatenate([s.predicted for s in known]),
        scores={name: np.concatenate([s.scores[name] for s in known]) for name in KNOWN.scores},
    )
    whole = judge(pooled, UNKNOWN)
    for figures, expected in (
        (full["unknown"], whole["unknown"]),
        (full["groups"], whole["groups"]),
    ):
        for name in figures:
            for score, found in figures[name]["scores"].items():
                assert set(METRICS) == set(found)
                there = expected[name]["scores"][score]
                assert found == pytest.approx({metric: there[metric] for metric in found})
    assert full["groups"]["near"]["sets"] == ["cats", "dogs"]


def test_a_run_judged_on_known_images_alone_has_no_groups() -> None:
    document = judge(KNOWN, [])
    assert document["unknown"] == {} == document["groups"]
    assert "shifted" not in document and "full_spectrum" not in document


def test_single_images_make_a_document_without_nan() -> None:
    one = made("one", 1, 0.0, 8)
    single = made("known", 1, 1.0, 9, known=True)
    for document in (judge(KNOWN, [one]), judge(single, [one]), judge(single, [UNKNOWN[0]])):
        json.dumps(document, allow_nan=False)
        (found,) = document["unknown"].values()
        assert found["scores"]["msp"]["auroc_ci"] == [0, 1]


def test_the_table_shows_main_scores_groups_and_shift_in_a_hundred_columns() -> None:
    header = {"split": None, "classes": ["a", "b", "c"], "notes": ["the set x is missing: gone"]}
    text = table({**DOCUMENT, **header})
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    cats = DOCUMENT["unknown"]["cats"]
    (row,) = [line for line in lines if line.startswith("cats ")]
    low, high = cats["scores"]["msp"]["auroc_ci"]
    assert f"{100 * cats['scores']['msp']['auroc']:.2f} [{100 * low:6.2f} {100 * high:6.2f}]" in row
    # gen is no main score: it stands among the groups only, and those of the full spectrum.
    assert sum("gen" in line.split() for line in lines) == 2
    rows = [line for line in lines if line.startswith("gen ")]
    for row, judged in zip(rows, (DOCUMENT, DOCUMENT["full_spectrum"]), strict=True):
        for group in ("near", "far"):
            assert f"{100 * judged['groups'][group]['scores']['gen']['auroc']:.2f}" in row
    assert lines.count("near: mean over cats, dogs") == 2
    assert f"brightness {100 * cats['cues']['brightness']:.1f}" in text
    assert f"macro-F1 over K + 1 classes: msp {100 * cats['scores']['msp']['macro_f1']:.1f}" in text
    (row,) = [line for line in lines if line.startswith("rain ")]
    assert f"{100 * DOCUMENT['shifted']['rain']['accuracy']:.2f}" in row
    assert f"{100 * DOCUMENT['shifted']['rain']['scores']['msp']['auroc']:.2f}" in row
    assert "1 further scores and the metrics left out here: metrics.json" in lines
    assert lines[-1] == "note: the set x is missing: gone"


@pytest.mark.parametrize("asked", ["knn", "odin"])
def test_fitted_scores_stand_in_the_table_of_sets_without_a_group(asked: str) -> None:
    def with_scores(images: Scored, name: str = "") -> Scored:
        rng = np.random.default_rng(len(images))
        more = {asked: images.scores["gen"] + rng.normal(0, 1, len(images))}
        return replace(images, name=name or images.name, scores={**images.scores, **more})

    lone = [with_scores(UNKNOWN[3], f"set{number}") for number in range(7)]
    lone[3] = replace(lone[3], name="a-longer-name-of-a-set")
    document = judge(with_scores(KNOWN), [with_scores(UNKNOWN[0]), *lone])
    header = {"split": None, "classes": ["a", "b", "c"], "notes": []}
    lines = table({**document, **header}).splitlines()
    # Side by side in blocks; scores of the group "near" stand among its means, once.
    starts = [number for number, line in enumerate(lines) if line.startswith("other scores")]
    found: dict[str, dict[str, tuple[float, float]]] = {"gen": {}, asked: {}}
    for start in starts:
        names = lines[start - 1].split()
        assert max(map(len, lines[start - 1 : start + 4])) <= 100
        for line in lines[start + 2 : start + 4]:
            score, *figures = line.split()
            pairs = zip(map(float, figures[::2]), map(float, figures[1::2]), strict=True)
            found[score] |= dict(zip(names, pairs, strict=True))
    for score, of_sets in found.items():
        assert list(of_sets) == [images.name for images in lone]
        for name, (area, rejected) in of_sets.items():
            figures = document["unknown"][name]["scores"][score]
            assert area == pytest.approx(100 * figures["auroc"], abs=0.0051)
            assert rejected == pytest.approx(100 * figures["fpr95_known_rejected"], abs=0.0051)
    assert len(starts) > 1 and "all other metrics: metrics.json" in lines
    assert not any("further scores" in line for line in lines)
    # Of groups alone the means are enough.
    grouped = judge(with_scores(KNOWN), [with_scores(UNKNOWN[0])])
    text = table({**grouped, **header})
    assert "other scores" not in text and "2 further scores" in text
