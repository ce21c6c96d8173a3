"""A scorer says of a view what an evaluation stores of it, whatever the score, head or batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backmix.train.decide.decider import Decider, open_decider
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.record import THRESHOLD, read_record, write_record
from backmix.train.decide.scorer import own_score, run_scorer, said_of
from backmix.train.evaluate import evaluate
from backmix.train.options import Arpl, BackMix, Cssr, EvaluateOptions, Method, Softmax, Ssod
from backmix.train.outputs import Outputs, load_outputs
from backmix.train.scores import CUES, score_of
from backmix.train.scores.every import NEED_FIT, names_of_scores
from backmix.train.trained import load_model, read_run
from tests.train.decide.known_runs import (
    KNOWN,
    calibrated,
    pictures,
    write_beton,
    write_run,
)

METHODS: dict[str, tuple[Method, str]] = {
    "softmax": (Softmax(), "max_logit"),
    "ssod": (BackMix(host=Ssod()), "ssod"),
    "arpl": (Arpl(), "arpl"),
    "cssr": (Cssr(latent=4), "cssr_s0"),
    "rcssr": (Cssr(kind="reciprocal", latent=4), "cssr_s0"),
}
LINEAR = ("softmax", "ssod")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every method, evaluated with every score on test.beton."""
    folder = tmp_path_factory.mktemp("scorer")
    train = write_beton(folder / "train.beton", pictures(120, 0))
    write_beton(folder / "held.beton", pictures(160, 1))
    write_beton(folder / "test.beton", pictures(60, 2))
    for name, (method, _) in METHODS.items():
        write_run(folder / name, train, method, val=0.2)
        options = EvaluateOptions(
            test=(folder / "test.beton",), fit=True, batch=30, threads=1, device="cpu"
        )
        evaluate(folder / name, options)
    return folder


def test_views() -> torch.Tensor:
    """The views of the known images of test.beton, which are as large as they are."""
    pixels = pictures(60, 2)
    return torch.from_numpy(pixels[np.isin(np.arange(60) % 4, [1, 3])])


test_views.__test__ = False  # type: ignore[attr-defined]


def stored(place: Path, name: str) -> Outputs:
    return load_outputs(place / name / "scores" / "known.safetensors")


def opened(run: Path) -> Decider:
    return open_decider(run, PredictOptions(device="cpu"))


@pytest.mark.parametrize("name", METHODS)
def test_every_score_is_that_of_an_evaluation(place: Path, name: str) -> None:
    known = stored(place, name)
    model = load_model(place / name)
    names = names_of_scores(model.head, model.rejection is not None)
    # The list that needs no outputs is the list of what an evaluation computed.
    assert sorted(names) == sorted(set(known.scores) - set(CUES) - {"odin"})
    views = test_views()
    for score in names:
        calibrated(place / name, score=score, data=place / "held.beton", known_only=True)
        decider = opened(place / name)
        assert bool(decider.record.fit) == (score in NEED_FIT)
        batch = decider.scorer(views[:30])
        assert batch.predicted.tolist() == known.logits[:30].argmax(1).tolist()
        z = torch.from_numpy(known.logits[:30]).double()
        expected = z.softmax(1).max(1).values.numpy()
        np.testing.assert_allclose(batch.probability, expected, rtol=1e-12)
        mine = known.scores[score]
        if score in ("msp", "max_logit", "energy", "gen", "ssod", "ssod_joint", "arpl", "cssr_s0"):
            assert batch.score.tobytes() == mine[:30].tobytes(), score  # the very same batch
        scale = np.abs(mine).max()
        np.testing.assert_allclose(batch.score, mine[:30], rtol=1e-9, atol=1e-9 * scale)
        one = np.concatenate([decider.scorer(view[None]).score for view in views[:6]])
        np.testing.assert_allclose(one, mine[:6], rtol=1e-5, atol=1e-5 * scale, err_msg=score)


@pytest.mark.parametrize("name", METHODS)
def test_the_score_that_decides_unasked_is_the_methods_own(place: Path, name: str) -> None:
    trained = read_run(place / name)
    assert own_score(trained) == METHODS[name][1]
    calibrated(place / name, data=place / "held.beton", known_only=True)
    assert read_record(place / name).score == METHODS[name][1]


@pytest.mark.parametrize("name", METHODS)
def test_one_score_alone_is_one_of_all(place: Path, name: str) -> None:
    known, model = stored(place, name), load_model(place / name)
    for score in ("msp", "gen", METHODS[name][1]):
        found = score_of(score, known.logits, known.features, known.extras, model.head)
        assert found.tobytes() == known.scores[score].tobytes()
    with pytest.raises(KeyError):
        score_of("knn", known.logits, known.features, known.extras, model.head)


def test_a_view_of_another_side_is_shown_so(place: Path) -> None:
    scorer = run_scorer(place / "softmax", "energy", size=24, device="cpu")
    assert scorer.preprocessing.size == 24 and scorer.classes == KNOWN
    evaluate(
        place / "softmax",
        EvaluateOptions(test=(place / "test.beton",), size=24, batch=30, threads=1, device="cpu"),
    )
    known = stored(place, "softmax")
    from backmix.pipeline.folder_images import box_view

    box = np.array([0, 0, 16, 16], np.int32)
    views = np.stack([box_view(view, box, 24)[0] for view in test_views().numpy()])
    said = scorer(torch.from_numpy(views))
    np.testing.assert_array_equal(said.score, known.scores["energy"])


def test_an_image_that_is_not_finite_costs_the_others_nothing() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 3)).astype(np.float32)
    features = random.normal(size=(6, 4)).astype(np.float32)
    whole = said_of("msp", logits, features, {})
    logits[1, 2], features[3, 0] = np.nan, np.inf
    said = said_of("msp", logits, features, {"rejection": np.array([0, 0, 0, 0, -np.inf, 0])})
    assert np.flatnonzero(np.isnan(said.score)).tolist() == [1, 3, 4]
    assert np.isnan(said.probability).tolist() == np.isnan(said.score).tolist()
    for k in (0, 2, 5):
        assert (said.score[k], said.predicted[k]) == (whole.score[k], whole.predicted[k])
    nothing = said_of("msp", np.full((2, 3), np.nan, np.float32), features[:2], {})
    assert np.isnan(nothing.score).all() and nothing.predicted.tolist() == [0, 0]


def test_scores_that_cannot_decide_are_refused_with_the_reason_and_the_list(place: Path) -> None:
    def refused(score: str, name: str = "softmax") -> str:
        with pytest.raises(ValueError, match=f"--score {score}") as error:
            run_scorer(place / name, score, device="cpu")
        return str(error.value)

    assert "backward pass" in refused("odin")
    assert "control" in refused("brightness") and "control" in refused("feature_norm")
    assert "there are msp, temperature, max_logit, energy" in refused("mps")
    assert "there are" in refused("max_logit", "cssr")  # its logits are log p
    assert "there are" in refused("ssod")
    with pytest.raises(ValueError, match="needs what it was fitted to"):
        run_scorer(place / "softmax", "knn", device="cpu")


# --- what a decider refuses -----------------------------------------------------------------------


def test_decisions_are_the_rules_of_the_scores(place: Path) -> None:
    calibrated(place / "softmax", data=place / "held.beton", known_only=True, per_class=True)
    decider = opened(place / "softmax")
    found = decider.decide(test_views())
    assert (found.accepted == (found.score >= found.threshold)).all()
    thresholds = decider.record.rule.thresholds
    assert found.threshold.tolist() == thresholds[found.predicted].tolist()
    level = np.array([part.mean_rate for part in decider.record.rule.categories])
    own = level[decider.record.rule.category[found.predicted]]
    assert ((found.p_value > own) == found.accepted).all()


def changes() -> dict[str, tuple[str, Callable[[Path], Any]]]:
    def weights(run: Path) -> None:
        write_run(run.with_name("other"), run.with_name("train.beton"), Arpl())
        (run / "model.safetensors").write_bytes(
            (run.with_name("other") / "model.safetensors").read_bytes()
        )

    def config(old: str, new: str) -> Callable[[Path], Any]:
        def change(run: Path) -> None:
            text = (run / "config.json").read_text()
            assert old in text
            (run / "config.json").write_text(text.replace(old, new))

        return change

    return {
        "weights": ("other weights", weights),
        "mean": ("mean was", config("[100.0, 110.0, 120.0]", "[100.0, 110.0, 121.0]")),
        "crop": ("crop was", config('"crop": "whole"', '"crop": "random"')),
        "classes": ("class list differs", config('["c", "a"]', '["c", "x"]')),
        "fit": ("not what the score knn was fitted to", lambda r: (r / "fit.safetensors").unlink()),
    }


@pytest.mark.parametrize("what", changes())
def test_a_threshold_of_another_network_is_refused(tmp_path: Path, what: str) -> None:
    train = write_beton(tmp_path / "train.beton", pictures(120, 0))
    run = tmp_path / "run"
    write_run(run, train, val=0.4)
    calibrated(run, score="knn")
    assert opened(run).record.score == "knn"
    message, change = changes()[what]
    change(run)
    with pytest.raises(ValueError, match=message) as error:
        opened(run)
    assert "calibrate again" in str(error.value)


def test_an_earlier_threshold_can_be_opened_by_its_file(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, place / "train.beton", val=0.4)
    calibrated(run, score="msp")
    calibrated(run, score="energy")
    (kept,) = run.glob("threshold.2*.json")
    assert opened(kept).record.score == "msp"
    assert opened(run).record.score == opened(run / THRESHOLD).record.score == "energy"
    record = read_record(run)
    write_record(tmp_path / "stray.json", record)
    with pytest.raises(ValueError, match="no run folder"):
        opened(tmp_path / "stray.json")
