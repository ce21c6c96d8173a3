"""Scores of whole runs: what is fitted to which images, which head has which scores, extras."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from scipy import ndimage

from backmix.pipeline.beton import JPG, RAW, open_beton
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.subset import hold_out, select
from backmix.pipeline.writer import Record, Writer
from backmix.train.evaluate import evaluate
from backmix.train.methods.build import build_network
from backmix.train.models.build import Model
from backmix.train.options import (
    Arpl,
    Augment,
    BackMix,
    Cssr,
    EvaluateOptions,
    Method,
    Run,
    Softmax,
    Ssod,
)
from backmix.train.outputs import Outputs, load_outputs
from backmix.train.run_folder import as_document
from backmix.train.scores import CUES, every_score, fit_scores, linear_head, odin
from backmix.train.scores.cssr import CssrFit

SIDE = 16
MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
CLASSES = ["d", "c", "b", "a"]
COMMON = {"msp", "gen", "feature_norm", "brightness", "contrast", "sharpness", "file_size"}
FITTED = {"temperature", "knn", "mahalanobis", "rmds"}
OF_LINEAR = {"ash_s", "scale"}
OF_LINEAR_FIT = {"react", "dice", "vim", "fdbd", "nci"}


def write_beton(path: Path, count: int, seed: int) -> np.ndarray:
    """Write images whose brightness tells their class a little, label = number % 4."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 180, (count, SIDE, SIDE, 3), np.uint8)
    pixels += (20 * (np.arange(count) % 4)).astype(np.uint8)[:, None, None, None]
    with Writer(path, samples=count, page_size=1 << 21, classes=CLASSES, options={}) as writer:
        for number, image in enumerate(pixels):
            writer.append(Record(image.tobytes(), RAW, SIDE, SIDE, number % 4, 0, f"{number}.png"))
    return pixels


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set, a test set, and a folder of unknown images."""
    folder = tmp_path_factory.mktemp("runs")
    write_beton(folder / "train.beton", 120, 0)
    write_beton(folder / "test.beton", 40, 1)
    (folder / "scenes").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "scenes" / f"{number}.png")
    return folder


def write_run(place: Path, out: Path, method: Method, val: float = 0.0) -> Model:
    """Make a finished run with a network of random weights, known classes c and a."""
    out.mkdir(parents=True)
    run = Run(
        data=(place / "train.beton",),
        out=out,
        model="classifier32-quarter",
        method=method,
        val=val,
        seed=5,
        loader=LoaderOptions(size=SIDE),
        augment=Augment(mean=MEAN, std=STD),
    )
    with open_beton(place / "train.beton") as data:
        digest = data.digest
    config = {
        "run": as_document(run),
        "resolved": {},
        "classes": ["c", "a"],
        "known": [1, 3],
        "data": {"files": [str(place / "train.beton")], "digest": digest, "samples": 60},
    }
    (out / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = build_network(run, 2)
    if model.rejection is not None:  # a fresh one says next to nothing
        torch.nn.init.normal_(model.rejection.weight)
    safetensors.torch.save_file(model.state_dict(), out / "model.safetensors")
    return model.eval()


def outputs_of(run: Path, name: str) -> Outputs:
    return load_outputs(run / "scores" / f"{name}.safetensors")


def judged(place: Path, run: Path, **options: Any) -> dict[str, Any]:
    sets = EvaluateOptions(
        test=(place / "test.beton",), unknown=(f"scenes={place / 'scenes'}",), batch=32, threads=1
    )
    return evaluate(run, replace(sets, **options))


def views_of(pixels: np.ndarray) -> torch.Tensor:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


METHODS: dict[str, tuple[Method, set[str], set[str]]] = {
    "softmax": (Softmax(), {"max_logit", "energy"} | OF_LINEAR, OF_LINEAR_FIT),
    "ssod": (
        Ssod(),
        {"max_logit", "energy", "ssod", "ssod_joint"} | OF_LINEAR,
        OF_LINEAR_FIT,
    ),
    "arpl": (Arpl(), {"max_logit", "energy", "arpl", "arpl_dot"}, set()),
    "pcssr": (Cssr(latent=4), {"cssr_s0"}, {"cssr"}),
    "rcssr": (Cssr(kind="reciprocal", latent=4), {"cssr_s0"}, {"cssr"}),
    "backmix on ssod": (
        BackMix(host=Ssod()),
        {"max_logit", "energy", "ssod", "ssod_joint"} | OF_LINEAR,
        OF_LINEAR_FIT,
    ),
}
"""Method, its scores beside the common ones, and those that only a fit gives."""


@pytest.mark.parametrize("name", METHODS)
def test_every_head_has_its_scores_on_every_set(place: Path, tmp_path: Path, name: str) -> None:
    method, own, with_fit = METHODS[name]
    write_run(place, tmp_path / "run", method, val=0.2)
    for fit in (False, True):
        document = judged(place, tmp_path / "run", fit=fit)
        expected = COMMON | own | (FITTED | with_fit if fit else set())
        sets = ["known", "unknown", "scenes"] + (["val"] if fit else [])
        for images in sets:
            stored = outputs_of(tmp_path / "run", images)
            assert set(stored.scores) == expected, images
            for score, values in stored.scores.items():
                assert np.isfinite(values).all() and values.dtype == np.float64, score
        figures = document["unknown"]["scenes"]
        assert set(figures["scores"]) == expected - set(CUES)
        assert set(figures["cues"]) == expected & set(CUES)
        assert (document["fit"] is None) == (not fit)


@pytest.mark.parametrize("val", [0.0, 0.2])
def test_a_fit_is_one_to_the_runs_own_images(place: Path, tmp_path: Path, val: float) -> None:
    run = tmp_path / "run"
    model = write_run(place, run, Softmax(), val)
    document = judged(place, run, fit=True)
    with open_beton(place / "train.beton") as data:
        rest, held = hold_out(select(data.labels, [1, 3]), val, 5)
    train = outputs_of(run, "train")
    assert train.index.tolist() == rest.index.tolist()
    assert train.labels.tolist() == rest.labels.tolist()
    assert train.kind == "known" and not train.scores
    assert len(rest) + len(held) == 60
    val_outputs = outputs_of(run, "val") if val else None
    if val_outputs is not None:
        assert val_outputs.index.tolist() == held.index.tolist()
    assert (run / "scores" / "val.safetensors").exists() == bool(val)
    # Fitted anew to what is stored, the scores are the stored ones to the bit.
    fit = fit_scores(train, linear_head(model.head), val_outputs)
    for name in ("known", "unknown", "scenes"):
        stored = outputs_of(run, name)
        again = every_score(stored, model.head, fit)
        assert again.keys() == stored.scores.keys()
        for score, values in again.items():
            np.testing.assert_array_equal(values, stored.scores[score], err_msg=score)
    assert document["fit"] == {
        "images": len(rest),
        "held_out": len(held),
        "temperature": fit.temperature,
        "neighbour": min(50, len(rest)),
    }
    said = any("no image was held out" in note for note in document["notes"])
    assert said == (val == 0)


def test_training_images_are_seen_clean_and_in_evaluation_mode(place: Path, tmp_path: Path) -> None:
    model = write_run(place, tmp_path / "run", Softmax())
    judged(place, tmp_path / "run", fit=True)
    train = outputs_of(tmp_path / "run", "train")
    with open_beton(place / "train.beton") as data:
        pixels = np.stack([data.region(i).reshape(SIDE, SIDE, 3) for i in train.index])
    with torch.no_grad():
        logits, maps = model(views_of(pixels))
    np.testing.assert_allclose(train.logits, logits.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(train.features, maps.mean((2, 3)).numpy(), rtol=1e-4, atol=1e-5)


def test_an_evaluation_without_fit_leaves_nothing_of_the_one_with(place, tmp_path: Path) -> None:
    write_run(place, tmp_path / "run", Softmax(), 0.2)
    judged(place, tmp_path / "run", fit=True)
    judged(place, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run" / "scores").iterdir()}
    assert names == {f"{name}.safetensors" for name in ("known", "unknown", "scenes")}


def test_the_training_set_must_be_there_and_the_runs_own(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(place, run, Softmax())
    before = judged(place, run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["files"] = ["/nowhere/train.beton"]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"/nowhere/train\.beton is not there.*--train FILE"):
        judged(place, run, fit=True)
    with pytest.raises(ValueError, match=r"test\.beton is not what .* was trained on.*--train"):
        judged(place, run, fit=True, train=(place / "test.beton",))
    assert json.loads((run / "metrics.json").read_text()) == before
    found = judged(place, run, fit=True, train=(place / "train.beton",))
    assert found["fit"]["images"] == 60


@pytest.mark.parametrize("name", ["train", "val"])
def test_the_names_of_the_runs_own_sets_are_taken(place: Path, tmp_path: Path, name: str) -> None:
    write_run(place, tmp_path / "run", Softmax())
    with pytest.raises(ValueError, match=f"{name} is the name of the run's own images; choose"):
        judged(place, tmp_path / "run", unknown=(f"{name}={place / 'scenes'}",))


def test_ssod_is_what_its_head_says_of_the_pooled_feature(place: Path, tmp_path: Path) -> None:
    model = write_run(place, tmp_path / "run", Ssod())
    judged(place, tmp_path / "run")
    stored = outputs_of(tmp_path / "run", "unknown")
    assert model.rejection is not None
    with torch.no_grad():
        expected = model.rejection(torch.from_numpy(stored.features))[:, 0].numpy()
    np.testing.assert_allclose(stored.scores["ssod"], expected, rtol=1e-5, atol=1e-6)
    assert stored.scores["ssod"].std() > 0


@pytest.mark.parametrize("kind", ["prototype", "reciprocal"])
def test_cssr_is_in_deviations_of_the_training_images(place: Path, tmp_path: Path, kind) -> None:
    run = tmp_path / "run"
    write_run(place, run, Cssr(kind=kind, latent=4))
    judged(place, run, fit=True)
    train, known = outputs_of(run, "train"), outputs_of(run, "known")
    parts = [name for name in train.extras if name.startswith("cssr_")]
    assert parts == ["cssr_s0", "cssr_s1", "cssr_s2"]
    expected = sum(
        (known.extras[part] - train.extras[part].mean()) / (train.extras[part].std() + 1e-8)
        for part in parts
    )
    np.testing.assert_allclose(known.scores["cssr"], expected, rtol=1e-9)


def test_cssr_without_its_third_part_is_said_to_be_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CssrFit.__init__, "__defaults__", (1,))
    run = tmp_path / "run"
    write_run(place, run, Cssr(latent=4))
    document = judged(place, run, fit=True)
    assert any("goes without its third part" in note for note in document["notes"])
    assert "cssr_s2" not in outputs_of(run, "known").extras


def test_cues_are_those_of_the_pixels_that_are_shown(place: Path, tmp_path: Path) -> None:
    write_run(place, tmp_path / "run", Softmax())
    judged(place, tmp_path / "run")
    stored = outputs_of(tmp_path / "run", "unknown")
    with open_beton(place / "test.beton") as data:
        pixels = np.stack([data.region(i).reshape(SIDE, SIDE, 3) for i in stored.index])
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    expected = {
        "brightness": grey.mean((1, 2)),
        "contrast": grey.std((1, 2)),
        "sharpness": np.array([abs(ndimage.laplace(g)[1:-1, 1:-1]).mean() for g in grey]),
        "file_size": np.full(len(grey), 3.0 * SIDE * SIDE),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(stored.scores[name], values, rtol=1e-5, err_msg=name)
    scenes = outputs_of(tmp_path / "run", "scenes")
    sizes = [(place / "scenes" / f"{number}.png").stat().st_size for number in range(3)]
    assert scenes.scores["file_size"].tolist() == sizes


def test_a_bad_image_has_no_extras_either(place: Path, tmp_path: Path) -> None:
    write_run(place, tmp_path / "run", Softmax())
    (tmp_path / "scenes").mkdir()
    for number in (0, 2):
        source = place / "scenes" / f"{number}.png"
        (tmp_path / "scenes" / source.name).write_bytes(source.read_bytes())
    (tmp_path / "scenes" / "1.png").write_bytes(b"no image")
    content = bytearray((place / "test.beton").read_bytes())
    with open_beton(place / "test.beton") as data:
        content[int(data.pointers[7]) + 5] ^= 1
    (tmp_path / "test.beton").write_bytes(content)
    judged(
        place,
        tmp_path / "run",
        test=(tmp_path / "test.beton",),
        unknown=(f"scenes={tmp_path / 'scenes'}",),
        odin=True,
    )
    scenes, known = (outputs_of(tmp_path / "run", name) for name in ("scenes", "known"))
    assert scenes.index.tolist() == [0, 2] and 7 not in known.index.tolist()
    assert len(scenes.bad) == len(known.bad) == 1
    assert {len(values) for values in scenes.arrays().values()} == {2}
    assert {len(values) for values in known.arrays().values()} == {19}


def test_file_sizes_are_those_of_the_encoded_images(place: Path, tmp_path: Path) -> None:
    sizes = []
    with Writer(
        tmp_path / "jpg.beton", samples=4, page_size=1 << 21, classes=CLASSES, options={}
    ) as writer:
        for number in range(4):
            path = tmp_path / f"{number}.jpg"
            with Image.open(place / "scenes" / "0.png") as image:
                image.save(path, quality=30 + 20 * number)
            sizes.append(path.stat().st_size)
            writer.append(Record(path.read_bytes(), JPG, SIDE, SIDE, number, 0, path.name))
    assert len(set(sizes)) == 4
    write_run(place, tmp_path / "run", Softmax())
    judged(place, tmp_path / "run", test=(tmp_path / "jpg.beton",))
    assert outputs_of(tmp_path / "run", "known").scores["file_size"].tolist() == sizes[1::2]
    assert outputs_of(tmp_path / "run", "unknown").scores["file_size"].tolist() == sizes[::2]


def test_odin_is_asked_for_and_leaves_the_network_alone(place: Path, tmp_path: Path) -> None:
    model = write_run(place, tmp_path / "run", Softmax())
    judged(place, tmp_path / "run", odin=True)
    stored = outputs_of(tmp_path / "run", "unknown")
    with open_beton(place / "test.beton") as data:
        pixels = np.stack([data.region(i).reshape(SIDE, SIDE, 3) for i in stored.index])
    expected = odin(lambda x: model(x)[0], views_of(pixels), STD).numpy()
    # At a temperature of 1000 the scores are log odds near log(1 / (K - 1)) = 0.
    np.testing.assert_allclose(stored.scores["odin"], expected, rtol=1e-3, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = outputs_of(tmp_path / "run", "unknown").logits
    judged(place, tmp_path / "run")
    np.testing.assert_array_equal(outputs_of(tmp_path / "run", "unknown").logits, plain)


def test_odin_of_a_linear_network_in_closed_form() -> None:
    weight = torch.randn(3, 3 * 4 * 4, dtype=torch.float64, generator=torch.manual_seed(0))
    views = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    std, t, step = (50.0, 60.0, 70.0), 2.0, 0.01
    moved = []
    for view in views:
        z = weight @ view.flatten() / t
        p = torch.exp(z) / torch.exp(z).sum()
        # d/dx of -log p_y is sum_k p_k w_k - w_y, over T.
        slope = ((p @ weight - weight[z.argmax()]) / t).view(3, 4, 4)
        per_pixel = torch.tensor([255 * step / s for s in std], dtype=torch.float64)
        moved.append(view - per_pixel[:, None, None] * slope.sign())
    z = torch.stack(moved).flatten(1) @ weight.T / t
    p = torch.softmax(z, 1).amax(1)
    found = odin(lambda x: x.flatten(1) @ weight.T, views, std, t, step)
    torch.testing.assert_close(found, torch.log(p / (1 - p)))
    with torch.inference_mode():
        again = odin(lambda x: x.flatten(1) @ weight.T, views.clone(), std, t, step)
    torch.testing.assert_close(again, found)
