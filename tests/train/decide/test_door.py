"""The Python door: the command's decisions, of everything that is an image."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import backmix
from backmix import Decision, Predictor
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.predict import predict
from tests.images import jpeg, photograph, png, turned, write_files
from tests.train.decide.calibrated import CLASSES, calibrated, pictures


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("door")
    calibrated(place / "run", crop="random")
    images = pictures(9, side=20)
    write_files(place / "in", {f"{i}.png": png(image) for i, image in enumerate(images)})
    write_files(place / "in", {"t.jpg": turned(6), "x.png": b"", "y.jpg": b"?"})
    return place


@pytest.fixture(scope="module")
def model(place: Path) -> Predictor:
    return backmix.load(place / "run", device="cpu")


def close(one: Decision, other: Decision) -> bool:
    if one.score is None or other.score is None:
        return one == other
    same = (one.decision, one.class_name) == (other.decision, other.class_name)
    return same and one.score == pytest.approx(other.score, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_decisions_are_those_of_the_command(place: Path, model: Predictor, threads: int) -> None:
    out = place / "o.json"
    predict(place / "run", [str(place / "in")], out, PredictOptions(batch=4, device="cpu"))
    rows = json.loads(out.read_text())
    paths = [row["file"] for row in rows]
    found = model.predict(paths, batch=4, threads=threads)
    assert [one.row(path) for one, path in zip(found, paths, strict=True)] == rows  # to the bit
    assert [one.accepted for one in found] == [row["decision"] == "accept" for row in rows]
    assert {one.decision for one in found} == {"accept", "reject", "error"}
    assert model.classes == CLASSES


def test_every_form_of_an_image_is_decided_about_alike(place: Path, model: Predictor) -> None:
    pixels = pictures(1, seed=9, side=24)[0]
    path = place / "one.png"
    path.write_bytes(png(pixels))
    with Image.open(path) as opened:
        forms = [path, str(path), path.read_bytes(), opened, pixels, pixels[::-1][::-1]]
        every = [*model.predict(forms), *model.predict(pixels), *model.predict(pixels[None])]
    every += [*model.predict(path), *model.predict(path.read_bytes())]
    assert len(every) == len(forms) + 4
    assert all(close(every[0], one) for one in every)


def test_gray_and_turned_images(model: Predictor) -> None:
    gray = pictures(1, seed=3, side=24)[0][:, :, 0]
    one, two, three = model.predict([gray, np.stack([gray] * 3, 2), Image.fromarray(gray)])
    assert close(one, two) and close(one, three)
    data = turned(6, photograph(5))
    from io import BytesIO

    as_bytes, as_image, upright = model.predict(
        [data, Image.open(BytesIO(data)), jpeg(photograph(5))]
    )
    # Pillow's own decoder rounds otherwise.
    assert as_bytes.score == pytest.approx(as_image.score, rel=0.02)
    assert as_bytes.score != pytest.approx(upright.score, rel=0.02)


def test_a_batch_of_arrays(model: Predictor) -> None:
    images = pictures(7, seed=5)
    whole = model.predict(images)
    assert [one.row("") for one in whole] == [one.row("") for one in model.predict(list(images))]
    assert all(
        close(one, model.predict(image)[0]) for one, image in zip(whole, images, strict=True)
    )
    assert model.predict([]) == [] and model.predict(images[:0]) == []


def test_what_cannot_be_read_is_said_and_does_not_raise(place: Path, model: Predictor) -> None:
    good = pictures(1)[0]
    large = np.zeros((9, 9, 3), np.uint8)
    found = model.predict([b"", "gone.png", good, place, png(large), large], limit_pixels=80)
    assert [one.decision == "error" for one in found] == [True, True, True, True, True, True]
    found = model.predict([b"", "gone.png", good, place], limit_pixels=256)
    reasons = ["the file is empty", "No such file or directory", "", "it is not a regular file"]
    assert [one.reason if one.decision == "error" else "" for one in found] == reasons
    assert found[0] == Decision("error", reason="the file is empty")
    torn = Image.new("RGB", (8, 8))
    torn.load = lambda: (_ for _ in ()).throw(OSError("image file is truncated"))
    assert model.predict(torn)[0].reason == "image file is truncated"


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([np.zeros((4, 4, 3))], ValueError, r"image 0 is an array of float64 \[4, 4, 3\]"),
        ([b"", np.zeros((4, 4, 4), np.uint8)], ValueError, "image 1 is an array of uint8"),
        (np.zeros((2, 4, 4, 1), np.uint8), ValueError, "image 0"),
        (np.zeros(4, np.uint8), ValueError, "image 0"),
        ([3], TypeError, "image 0 is a int"),
    ],
)
def test_what_is_no_image_raises(model: Predictor, images, error, message) -> None:
    with pytest.raises(error, match=message):
        model.predict(images)


def test_options_out_of_range_raise(model: Predictor) -> None:
    for options in ({"batch": 0}, {"threads": -1}, {"limit_pixels": 0}):
        with pytest.raises(ValueError, match="batch must be at least 1"):
            model.predict([], **options)


def test_several_threads_may_ask_at_once(place: Path, model: Predictor) -> None:
    paths = sorted((place / "in").iterdir())
    expected = model.predict(paths)
    found: list[list[Decision]] = []
    lots = [threading.Thread(target=lambda: found.append(model.predict(paths))) for _ in range(8)]
    for thread in lots:
        thread.start()
    for thread in lots:
        thread.join()
    assert found == [expected] * 8


def test_threads_take_turns_at_the_network(place: Path, model: Predictor) -> None:
    inside, most = [0], [0]

    class Scorer:
        device = model.decider.scorer.device

        def __call__(self, views):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            said = model.decider.scorer(views)
            inside[0] -= 1
            return said

    watched = Predictor(replace(model.decider, scorer=Scorer()))
    lots = [threading.Thread(target=watched.predict, args=(pictures(2),)) for _ in range(4)]
    for thread in lots:
        thread.start()
    for thread in lots:
        thread.join()
    assert most == [1]


def test_what_has_no_threshold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json|no run"):
        backmix.load(tmp_path)
    run = calibrated(tmp_path / "run")
    (run / "threshold.json").unlink()
    with pytest.raises(ValueError, match="no threshold: backmix calibrate"):
        backmix.load(run)
