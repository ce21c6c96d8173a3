"""Evaluation of run folders made by hand: which images, labels, figures and errors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from backmix.pipeline.beton import RAW, open_beton
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.writer import Record, Writer
from backmix.train.evaluate import evaluate
from backmix.train.judge import table
from backmix.train.models.build import Model, build
from backmix.train.models.heads import linear_head
from backmix.train.options import Augment, EvaluateOptions, Run, Split
from backmix.train.outputs import Outputs, load_outputs
from backmix.train.protocols import split
from backmix.train.run_folder import as_document
from backmix.train.trained import load_model

SIDE = 16
MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
CIFAR10: list[str] = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]


def write_beton(path: Path, classes: list[str], labels: list[int], seed: int) -> np.ndarray:
    """Write images of random pixels, one per label; return them, uint8 [n, SIDE, SIDE, 3]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), SIDE, SIDE, 3), np.uint8)
    with Writer(
        path, samples=len(labels), page_size=1 << 21, classes=classes, options={}
    ) as writer:
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            writer.append(Record(image.tobytes(), RAW, SIDE, SIDE, label, 0, f"{number}.png"))
    return pixels


def write_run(
    run: Path, classes: list[str], known: list[int], split: dict[str, Any] | None = None
) -> Model:
    """Make a run folder with a network of random weights; return the network."""
    run.mkdir()
    options = Run(
        data=(Path("train.beton"),),
        out=run,
        model="classifier32-quarter",
        split=Split(**split) if split else Split(),
        loader=LoaderOptions(size=SIDE),
        augment=Augment(mean=MEAN, std=STD),
    )
    config = {
        "run": as_document(options),
        "resolved": {},
        "classes": classes,
        "known": known,
        "data": {"files": ["train.beton"], "digest": "0", "samples": 1},
    }
    (run / "config.json").write_text(json.dumps(config))
    torch.manual_seed(len(classes))
    model = build("classifier32-quarter", len(classes), SIDE)
    safetensors.torch.save_file(model.state_dict(), run / "model.safetensors")
    return model.eval()


def logits_of(model: Model, pixels: np.ndarray) -> torch.Tensor:
    """Return logits by the plain formula: (pixel - mean) / std, then the network."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    images = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        return model(images)[0]


def save_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def judged(place: Path) -> dict[str, Any]:
    """One evaluation that most tests look at: classes c, a known; b and d not; two folders more."""
    labels = [0, 1, 2, 3, 2, 0, 1, 3, 0, 2, 2, 1]
    test = place / "test.beton"
    # The file's class order is not the run's: training called them c = 0 and a = 1.
    pixels = write_beton(test, ["d", "c", "b", "a"], labels, seed=1)
    run = place / "run"
    model = write_run(run, ["c", "a"], [2, 0])
    folder = place / "scenes"
    others = np.random.default_rng(5).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    save_png(folder / "b" / "2.PNG", others[1])
    save_png(folder / "a.png", others[0])
    save_png(folder / "c" / "deep" / "3.png", others[2])
    save_png(folder / ".hidden" / "4.png", others[2])
    (folder / "notes.txt").write_text("no image")
    (folder / "b" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    options = EvaluateOptions(
        test=(test,), unknown=(f"scenes={folder}", f"all={test}"), batch=5, threads=2
    )
    document = evaluate(run, options)
    return {
        "run": run,
        "model": model,
        "labels": np.array(labels),
        "pixels": pixels,
        "others": others,
        "test": test,
        "folder": folder,
        "document": document,
        "options": options,
    }


def outputs_of(judged: dict[str, Any], name: str) -> Outputs:
    return load_outputs(judged["run"] / "scores" / f"{name}.safetensors")


def test_labels_follow_class_names_not_numbers(judged) -> None:
    known = outputs_of(judged, "known")
    expected = np.flatnonzero(np.isin(judged["labels"], [1, 3]))
    assert known.index.tolist() == expected.tolist()
    assert known.labels.tolist() == [{1: 0, 3: 1}[label] for label in judged["labels"][expected]]
    assert (known.kind, known.bad) == ("known", ())


def test_classes_outside_the_list_are_the_unknown_set(judged) -> None:
    unknown = outputs_of(judged, "unknown")
    expected = np.flatnonzero(np.isin(judged["labels"], [0, 2]))
    assert unknown.index.tolist() == expected.tolist()
    assert (unknown.labels == -1).all()
    assert unknown.kind == "unknown"


def test_logits_are_those_of_the_plain_formula(judged) -> None:
    expected = logits_of(judged["model"], judged["pixels"])
    for name in ("known", "unknown", "all"):
        outputs = outputs_of(judged, name)
        # fp32 through nine layers in another batch size: another order of sums.
        torch.testing.assert_close(
            torch.from_numpy(outputs.logits), expected[outputs.index], rtol=1e-4, atol=1e-5
        )


def test_the_head_turns_features_into_logits(judged) -> None:
    outputs = outputs_of(judged, "all")
    head = judged["model"].head.weight.detach().numpy()
    np.testing.assert_allclose(outputs.features @ head.T, outputs.logits, rtol=1e-4, atol=1e-5)


def test_a_folder_is_searched_whole_and_its_bad_image_is_named(judged) -> None:
    scenes = outputs_of(judged, "scenes")
    # In the order of their paths: a.png, b/2.PNG, b/broken.jpg, c/deep/3.png.
    assert scenes.index.tolist() == [0, 1, 3]
    assert len(scenes.bad) == 1 and "broken.jpg" in scenes.bad[0]
    expected = logits_of(judged["model"], judged["others"])
    torch.testing.assert_close(torch.from_numpy(scenes.logits), expected, rtol=1e-4, atol=1e-5)
    assert judged["document"]["unknown"]["scenes"]["bad"] == 1


def test_the_figures_are_those_of_the_stored_logits(judged) -> None:
    known, unknown = outputs_of(judged, "known"), outputs_of(judged, "unknown")
    right = known.logits.argmax(1) == known.labels
    document = json.loads((judged["run"] / "metrics.json").read_text())
    assert document == judged["document"]
    assert document["known"]["accuracy"] == right.mean()
    assert document["known"]["n"] == 5 and document["unknown"]["unknown"]["n"] == 7
    figures = document["unknown"]["unknown"]["scores"]
    truth = np.r_[np.ones(len(known)), np.zeros(len(unknown))]
    for name, score in {
        "max_logit": lambda z: z.max(1),
        "energy": lambda z: np.log(np.exp(z.astype(float)).sum(1)),
        "msp": lambda z: np.exp(z.max(1)) / np.exp(z.astype(float)).sum(1),
    }.items():
        k, u = score(known.logits), score(unknown.logits)
        assert figures[name]["auroc"] == pytest.approx(roc_auc_score(truth, np.r_[k, u]))
        pairs = (k[:, None] > u[None]) + 0.5 * (k[:, None] == u[None])
        assert figures[name]["oscr"] == pytest.approx((pairs * right[:, None]).mean())
    for images in document["unknown"].values():
        for score in images["scores"].values():
            for figure in score.values():
                assert all(0 <= number <= 1 for number in np.ravel(figure))


def test_the_table_says_the_figures_in_percent(judged) -> None:
    text = table(judged["document"])
    figures = judged["document"]["unknown"]["scenes"]["scores"]["energy"]
    assert f"{100 * figures['auroc']:.2f}" in text
    assert f"{100 * judged['document']['known']['accuracy']:.2f} % on 5 known images" in text
    assert "scenes: (1 could not be read and were left out)" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_batch_size_changes_nothing_but_rounding(judged, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, ["c", "a"], [2, 0])
    evaluate(run, replace(judged["options"], batch=64, threads=1))
    for name in ("known", "unknown", "scenes"):
        one, two = outputs_of(judged, name), load_outputs(run / "scores" / f"{name}.safetensors")
        np.testing.assert_allclose(one.logits, two.logits, rtol=1e-4, atol=1e-5)
        assert one.index.tolist() == two.index.tolist()
        assert (one.digest, one.files) == (two.digest, two.files)


def test_a_larger_image_of_a_folder_is_shown_as_that_of_a_file(place: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(8).integers(0, 256, (40, 31, 3), np.uint8)
    with Writer(
        tmp_path / "one.beton", samples=1, page_size=1 << 21, classes=["x"], options={}
    ) as writer:
        writer.append(Record(pixels.tobytes(), RAW, 40, 31, 0, 0, "x.png"))
    save_png(tmp_path / "folder" / "x.png", pixels)
    write_beton(tmp_path / "test.beton", ["a", "b"], [0, 1], seed=1)
    for crop in ("whole", "random"):
        run = tmp_path / crop
        write_run(run, ["a", "b"], [0, 1])
        config = json.loads((run / "config.json").read_text())
        config["run"]["loader"]["crop"] = crop
        (run / "config.json").write_text(json.dumps(config))
        sets = (f"file={tmp_path / 'one.beton'}", f"folder={tmp_path / 'folder'}")
        evaluate(run, EvaluateOptions(test=(tmp_path / "test.beton",), unknown=sets))
        file, folder = (
            load_outputs(run / "scores" / f"{name}.safetensors") for name in ("file", "folder")
        )
        np.testing.assert_array_equal(file.logits, folder.logits)
    # The centre crop of 31 * 0.875 = 27 px shows something else than the whole image.
    whole = load_outputs(tmp_path / "whole" / "scores" / "file.safetensors")
    assert abs(whole.logits - file.logits).max() > 1e-4


def test_a_protocol_takes_its_unknown_classes_from_the_same_file(tmp_path: Path) -> None:
    labels = [*range(10), 3, 3]
    write_beton(tmp_path / "test.beton", CIFAR10, labels, seed=2)
    known = split("cifar10", "A", 1).known
    chosen = {"protocol": "cifar10", "family": "A", "list": 1, "known": []}
    write_run(tmp_path / "run", [CIFAR10[c] for c in known], list(known), chosen)
    document = evaluate(tmp_path / "run", EvaluateOptions(test=(tmp_path / "test.beton",)))
    unknown = load_outputs(tmp_path / "run" / "scores" / "unknown.safetensors")
    assert unknown.index.tolist() == [2, 3, 5, 8, 10, 11]
    assert load_outputs(tmp_path / "run" / "scores" / "known.safetensors").labels.tolist() == [
        known.index(c) for c in (0, 1, 4, 6, 7, 9)
    ]
    assert document["split"] == {"protocol": "cifar10", "family": "A", "list": 1}
    assert "list A1 poses the same problem as A0" in table(document)
    assert "no image in the test files" not in table(document)


def test_a_part_of_a_protocols_unknown_classes_is_said_to_be_one(tmp_path: Path) -> None:
    known = split("cifar10", "A", 0).known
    write_beton(tmp_path / "test.beton", CIFAR10, [*known, 2, 3], seed=2)  # without 5 and 8
    chosen = {"protocol": "cifar10", "family": "A", "list": 0, "known": []}
    write_run(tmp_path / "run", [CIFAR10[c] for c in known], list(known), chosen)
    document = evaluate(tmp_path / "run", EvaluateOptions(test=(tmp_path / "test.beton",)))
    assert "2 of the protocol's unknown classes have no image" in table(document)


def test_cifar_plus_ten_takes_its_unknown_classes_from_the_second_file(tmp_path: Path) -> None:
    hundred = [f"fine{c:02}" for c in range(100)]
    write_beton(tmp_path / "ten.beton", CIFAR10, list(range(10)), seed=2)
    write_beton(tmp_path / "hundred.beton", hundred, list(range(99, -1, -1)), seed=3)
    chosen = split("cifar+10", "B-dias", 2)
    config = {"protocol": "cifar+10", "family": "B-dias", "list": 2, "known": []}
    run = tmp_path / "run"
    write_run(run, [CIFAR10[c] for c in chosen.known], list(chosen.known), config)
    options = EvaluateOptions(test=(tmp_path / "ten.beton",))
    with pytest.raises(ValueError, match=r"CIFAR-100: name the \.beton of its test set with --unk"):
        evaluate(run, options)
    with pytest.raises(ValueError, match=r"ten\.beton has 10 classes, CIFAR-100 has 100"):
        evaluate(run, replace(options, unknown_data=(tmp_path / "ten.beton",)))
    document = evaluate(run, replace(options, unknown_data=(tmp_path / "hundred.beton",)))
    outputs = load_outputs(run / "scores" / "unknown.safetensors")
    assert sorted(99 - outputs.index) == sorted(chosen.unknown)
    assert document["known"]["n"] == 4


def test_a_damaged_sample_is_left_out_and_named(judged, tmp_path: Path) -> None:
    with open_beton(judged["test"]) as data:
        at = int(data.pointers[3])
    content = bytearray(judged["test"].read_bytes())
    content[at + 7] ^= 1
    (tmp_path / "test.beton").write_bytes(content)
    write_run(tmp_path / "run", ["c", "a"], [2, 0])
    document = evaluate(tmp_path / "run", EvaluateOptions(test=(tmp_path / "test.beton",)))
    known = load_outputs(tmp_path / "run" / "scores" / "known.safetensors")
    assert known.bad == ("3.png",)
    assert 3 not in known.index and len(known) == 4
    assert document["known"]["bad"] == 1
    assert "(1 could not be read and were left out)" in table(document)


def test_an_evaluation_takes_the_place_of_the_one_before(judged, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, ["c", "a"], [2, 0])
    options = EvaluateOptions(test=(judged["test"],))
    evaluate(run, replace(options, unknown=(f"old={judged['test']}",)))
    evaluate(run, replace(options, unknown=(f"new={judged['test']}",)))
    assert {path.name for path in (run / "scores").iterdir()} == {
        "known.safetensors",
        "unknown.safetensors",
        "new.safetensors",
    }


@pytest.mark.parametrize("obstacle", ["scores/known.safetensors", "metrics.json.tmp"])
def test_new_scores_never_stand_beside_old_figures(judged, tmp_path: Path, obstacle) -> None:
    run = tmp_path / "run"
    write_run(run, ["c", "a"], [2, 0])
    (run / "metrics.json").write_text("of before")
    # A folder in the way of a file: the one fails before all scores are in place, the other after.
    (run / obstacle).mkdir(parents=True)
    options = EvaluateOptions(test=(judged["test"],))
    with pytest.raises(OSError):
        evaluate(run, options)
    assert not (run / "metrics.json").exists()
    (run / obstacle).rmdir()
    assert evaluate(run, options) == json.loads((run / "metrics.json").read_text())
    assert not (run / "scores.new").exists()


def test_a_test_set_of_known_classes_alone_gives_the_accuracy(tmp_path: Path) -> None:
    write_beton(tmp_path / "test.beton", ["a", "b", "e"], [0, 1, 0], seed=4)
    write_run(tmp_path / "run", ["a", "b", "e"], [0, 1, 2])
    document = evaluate(tmp_path / "run", EvaluateOptions(test=(tmp_path / "test.beton",)))
    assert document["unknown"] == {} and document["known"]["n"] == 3
    assert "the known test set has no image of e" in table(document)


def test_the_training_file_as_test_set_is_said(judged, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, ["c", "a"], [2, 0])
    config = json.loads((run / "config.json").read_text())
    with open_beton(judged["test"]) as data:
        config["data"]["digest"] = data.digest
    (run / "config.json").write_text(json.dumps(config))
    document = evaluate(run, EvaluateOptions(test=(judged["test"],)))
    assert "the training file itself" in table(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": ()}, "Name its test set: --test FILE.beton"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"threads": -1}, "^--threads must be 0 to 1024, got -1"),
        ({"threads": 5000}, "^--threads must be 0 to 1024, got 5000"),
        ({"train": (Path("x.beton"),)}, "--train names the images .* are fitted to: add --fit"),
        ({"unknown": ("scenes",)}, "--unknown scenes: write NAME=PATH"),
        ({"unknown": ("../x=TEST",)}, "write NAME=PATH"),
        ({"unknown": ("x=/nowhere",)}, "there is no /nowhere"),
        ({"unknown": ("x=EMPTY",)}, "no image in"),
        ({"unknown": ("known=TEST",)}, "there is a set of the name"),
        ({"unknown": ("x=TEST", "x=TEST")}, "there is a set of the name"),
        ({"unknown": ("x=BROKEN",)}, "the set x has no image that can be read; the first is"),
        ({"unknown_data": (Path("x.beton"),)}, "--unknown-data belongs to the protocols cifar"),
        ({"test": (Path("OTHER"),)}, "other.beton lacks the known classes a; its classes are c, e"),
    ],
)
def test_a_mistake_is_said_and_keeps_the_figures(judged, tmp_path: Path, change, message) -> None:
    run = tmp_path / "run"
    write_run(run, ["c", "a"], [2, 0])
    (run / "metrics.json").write_text("of before")
    (run / "scores").mkdir()
    (run / "scores" / "known.safetensors").write_text("of before")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no image")
    write_beton(tmp_path / "other.beton", ["c", "e"], [0, 1], seed=1)
    places = {
        "TEST": judged["test"],
        "EMPTY": tmp_path / "empty",
        "BROKEN": tmp_path / "broken",
        "OTHER": tmp_path / "other.beton",
    }

    def placed(value: Any) -> Any:
        text = str(value)
        for word, path in places.items():
            text = text.replace(word, str(path))
        return type(value)(text) if isinstance(value, str | Path) else value

    change = {
        name: tuple(placed(v) for v in value) if isinstance(value, tuple) else value
        for name, value in change.items()
    }
    options = replace(EvaluateOptions(test=(judged["test"],)), **change)
    with pytest.raises(ValueError, match=message):
        evaluate(run, options)
    assert (run / "metrics.json").read_text() == "of before"
    assert (run / "scores" / "known.safetensors").read_text() == "of before"
    assert [path.name for path in (run / "scores").iterdir()] == ["known.safetensors"]


def test_a_protocol_needs_the_whole_class_list(judged, tmp_path: Path) -> None:
    chosen = {"protocol": "cifar10", "family": "A", "list": 0, "known": []}
    write_run(tmp_path / "run", ["c", "a"], [2, 0], chosen)
    with pytest.raises(ValueError, match=r"test\.beton has 4 classes, but cifar10 splits 10"):
        evaluate(tmp_path / "run", EvaluateOptions(test=(judged["test"],)))


def test_what_is_wrong_with_a_run_folder_is_said(judged, tmp_path: Path) -> None:
    options = EvaluateOptions(test=(judged["test"],))
    with pytest.raises(ValueError, match=r"is no run folder: it has no config\.json"):
        evaluate(tmp_path, options)
    run = tmp_path / "run"
    write_run(run, ["c", "a"], [2, 0])
    weights = (run / "model.safetensors").read_bytes()
    for content, message in (
        (weights[: len(weights) // 2], "model.safetensors is damaged, or not of a classifier32-"),
        (b"", "is damaged, or not of"),
    ):
        (run / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_model(run)
    (run / "model.safetensors").unlink()
    (run / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors is no file: the weights of the run"):
        evaluate(run, options)
    (run / "model.safetensors").rmdir()
    with pytest.raises(ValueError, match=r"has no model\.safetensors: the run is not finished"):
        evaluate(run, options)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "run": {}}))
    with pytest.raises(ValueError, match=r"config\.json is no configuration of a run"):
        evaluate(run, options)


def test_weights_of_another_class_count_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "two", ["c", "a"], [2, 0])
    write_run(tmp_path / "three", ["c", "a", "b"], [2, 0, 1])
    weights = (tmp_path / "two" / "model.safetensors").read_bytes()
    (tmp_path / "three" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="not of a classifier32-quarter with 3 classes"):
        load_model(tmp_path / "three")


def test_loading_a_model_draws_no_random_numbers(judged) -> None:
    state = torch.get_rng_state()
    load_model(judged["run"])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_diverged_model_is_named_with_its_set(judged, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = write_run(run, ["c", "a"], [2, 0])
    torch.nn.init.constant_(linear_head(model).weight, float("nan"))
    safetensors.torch.save_file(model.state_dict(), run / "model.safetensors")
    with pytest.raises(ValueError, match="set known: 5 of 5 images have logits that are NaN"):
        evaluate(run, EvaluateOptions(test=(judged["test"],)))
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "model.safetensors",
        "run.lock",
    ]


def test_a_diverged_model_has_no_accuracy_either(tmp_path: Path) -> None:
    write_beton(tmp_path / "test.beton", ["a", "b"], [0, 1, 0], seed=4)
    run = tmp_path / "run"
    model = write_run(run, ["a", "b"], [0, 1])
    torch.nn.init.constant_(linear_head(model).weight, float("nan"))
    safetensors.torch.save_file(model.state_dict(), run / "model.safetensors")
    with pytest.raises(ValueError, match=f"^{run}: set known: 3 of 3 images have logits that are"):
        evaluate(run, EvaluateOptions(test=(tmp_path / "test.beton",)))
    assert not (run / "metrics.json").exists()


def test_a_run_in_use_is_refused(judged, tmp_path: Path) -> None:
    from backmix.train.checkpoint import locked

    run = tmp_path / "run"
    write_run(run, ["c", "a"], [2, 0])
    with locked(run), pytest.raises(ValueError, match="is in use by process"):
        evaluate(run, EvaluateOptions(test=(judged["test"],)))
