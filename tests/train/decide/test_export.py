"""Exported files: what they say is what `evaluate` stores, and what cannot be exported is said."""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from backmix.pipeline.beton import open_beton
from backmix.pipeline.folder_images import usual_view
from backmix.pipeline.options import LoaderOptions
from backmix.train.decide import export as exporting
from backmix.train.decide.decider import Decider, open_decider
from backmix.train.decide.export import export
from backmix.train.decide.exported import Exported, PlainReconstruction, TorchRule
from backmix.train.decide.exported_file import read_exported
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.record import THRESHOLD, Record, record_document, write_record
from backmix.train.decide.rule import Rule, conditional_rule, global_rule, shrunk_rule
from backmix.train.decide.scorer import Scorer, run_scorer
from backmix.train.decide.verify import TOLERANCE, formula_views, score_range
from backmix.train.digests import file_digest, weights_digest
from backmix.train.evaluate import evaluate
from backmix.train.methods.build import build_network
from backmix.train.models.build import Model
from backmix.train.models.heads import Reconstruction
from backmix.train.options import (
    Arpl,
    Augment,
    Cssr,
    EvaluateOptions,
    Method,
    Run,
    Softmax,
    Ssod,
)
from backmix.train.outputs import Outputs, load_outputs
from backmix.train.passes import Viewing, learn_cssr
from backmix.train.run_folder import as_document
from backmix.train.scores import fit_scores, linear_head
from backmix.train.scores.fit_file import FIT, write_fit
from backmix.train.trained import load_model, read_run
from backmix.train.training_images import training_images
from tests.train.decide.calibrated import CLASSES, SIDE, pictures, write_beton

TRUST = PredictOptions(device="cpu", trust=True)
RATE = Fraction(1, 10)


@dataclass(frozen=True)
class Place:
    """A run that was evaluated and calibrated, and its test images."""

    run: Path
    views: torch.Tensor
    known: Outputs
    record: Record


def shown(count: int, seed: int, size: int) -> np.ndarray:
    """Return pictures as the loaders show them, uint8 [n, size, size, 3]."""
    images = pictures(count, seed=seed)
    return np.stack([usual_view(image, size, "whole", 1.0)[0] for image in images])


def make_run(
    folder: Path, method: Method, score: str, per_class: str = "conditional", **changes: Any
) -> Place:
    """Make a run of random weights, evaluate it with --fit, and choose a threshold."""
    train = write_beton(folder / "train.beton", pictures(180, seed=1))
    test = write_beton(folder / "test.beton", pictures(150, seed=2))
    run = folder / "run"
    run.mkdir()
    options = Run(
        data=(train,),
        out=run,
        model="classifier32-quarter",
        method=method,
        loader=LoaderOptions(size=SIDE),
        augment=Augment(mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0)),
    )
    options = replace(options, **changes)
    with open_beton(train) as data:
        digest = data.digest
    config = {
        "run": as_document(options),
        "resolved": {},
        "classes": list(CLASSES),
        "known": list(range(len(CLASSES))),
        "data": {"files": [str(train)], "digest": digest, "samples": 180},
    }
    (run / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    network = build_network(options, len(CLASSES))
    if network.rejection is not None:  # a fresh one says next to nothing
        torch.nn.init.normal_(network.rejection.weight)
    settle(network, options)
    tensors = {name.removeprefix("net."): x for name, x in network.state_dict().items()}
    safetensors.torch.save_file(tensors, run / "model.safetensors")
    sets = EvaluateOptions(test=(test,), fit=True, batch=32, threads=1, model=options.model)
    evaluate(run, sets)
    known = load_outputs(run / "scores" / "known.safetensors")
    write_fit_of(run, options.model)
    record = choose(run, score, per_class, options.model)
    views = torch.from_numpy(shown(150, 2, options.loader.size))
    return Place(run, views, known, record)


def settle(network: Model, options: Run) -> None:
    """Let BatchNorm see images: without, all images look alike to a network of random weights."""
    seen = options.augment
    views = torch.from_numpy(shown(180, 1, options.loader.size)).float() - torch.tensor(seen.mean)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.momentum = None  # the mean of all
    with torch.no_grad():
        network.train()((views / torch.tensor(seen.std)).permute(0, 3, 1, 2))
    network.eval()


def write_fit_of(run: Path, model: str) -> None:
    """Write what scores learned from the training images, as calibrating does."""
    network = load_model(run, model)
    cssr = None
    if isinstance(network.head, Reconstruction):
        say: Callable[[str], None] = lambda text: None  # noqa: E731
        viewing = Viewing(
            network, read_run(run), EvaluateOptions(threads=1), torch.device("cpu"), say, say
        )
        cssr = learn_cssr(viewing, training_images(read_run(run), ())[0])
    train = load_outputs(run / "scores" / "train.safetensors")
    write_fit(run / FIT, fit_scores(train, linear_head(network.head)), cssr)


def choose(run: Path, score: str, per_class: str, model: str = "") -> Record:
    """Choose a threshold on images of their own and write it into the run."""
    scorer = run_scorer(run, score, fit=run / FIT, device="cpu", model=model)
    said = scorer(torch.from_numpy(shown(300, 3, scorer.preprocessing.size)))
    rule: Rule = {
        "off": lambda: global_rule(said.score, len(CLASSES), RATE),
        "conditional": lambda: conditional_rule(said.score, said.predicted, CLASSES, RATE),
        "shrunk": lambda: shrunk_rule(said.score, said.predicted, len(CLASSES), RATE),
    }[per_class]()
    record = Record(
        score=score,
        parameters={},
        rate="0.1",
        confidence=None,
        rule=rule,
        classes=CLASSES,
        preprocessing=scorer.preprocessing,
        precision="fp32",
        weights=weights_digest(run),
        fit=file_digest(run / FIT),
        data={"images": 300},
        facts={},
    )
    write_record(run / THRESHOLD, record)
    return record


def agree(place: Place, decider: Decider, tolerance: float = 1e-5) -> None:
    """Compare decisions about all test images with those that `evaluate`'s scores lead to."""
    stored = place.known.scores[place.record.score]
    classes = place.known.logits.argmax(1)
    accepted, p_values = place.record.rule.decide(classes, stored)
    assert 0 < accepted.sum() < len(accepted)
    scale = np.maximum(np.abs(stored), score_range(place.record.rule))
    for size in (len(stored), 7, 1):  # whole, with a rest, and one by one
        rows = range(0, len(stored) if size > 1 else 5, size)
        for start in rows:
            some = slice(start, start + size)
            found = decider.decide(place.views[some])
            np.testing.assert_array_equal(found.predicted, classes[some])
            np.testing.assert_array_equal(found.accepted, accepted[some])
            assert (np.abs(found.score - stored[some]) <= tolerance * scale[some]).all()
            np.testing.assert_allclose(found.p_value, p_values[some], atol=2 / 300)
            np.testing.assert_array_equal(
                found.threshold, place.record.rule.thresholds[classes[some]]
            )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_run(tmp_path_factory.mktemp("export"), Softmax(), "vim")


@pytest.fixture(scope="module")
def onnx_file(place: Place) -> Path:
    out = place.run.parent / "model.onnx"
    said = export(place.run, out)
    assert "self-test of 4 images is right under ONNX Runtime" in said and str(out) in said
    return out


@pytest.fixture(scope="module")
def pt2_file(place: Place) -> Path:
    out = place.run.parent / "model.pt2"
    assert "self-test of 4 images is right under torch" in export(place.run, out)
    return out


# --- the same decisions ------------------------------------------------------------------------


def test_the_run_decides_as_its_evaluation(place: Place) -> None:
    agree(place, open_decider(place.run, TRUST))


def test_an_onnx_file_decides_as_the_evaluation(place: Place, onnx_file: Path) -> None:
    decider = open_decider(onnx_file, PredictOptions())  # needs no trust
    agree(place, decider)
    assert record_document(decider.record) == record_document(place.record)


def test_a_pt2_file_decides_as_the_evaluation(place: Place, pt2_file: Path) -> None:
    decider = open_decider(pt2_file, TRUST)
    agree(place, decider)
    assert record_document(decider.record) == record_document(place.record)


@pytest.mark.gpu
def test_a_pt2_file_runs_on_a_gpu(place: Place, pt2_file: Path) -> None:
    decider = open_decider(pt2_file, PredictOptions(device="cuda", trust=True))
    found = decider.decide(place.views.to(decider.scorer.device))
    stored = place.known.scores["vim"]
    scale = np.maximum(np.abs(stored), score_range(place.record.rule))
    assert (np.abs(found.score - stored) <= 1e-4 * scale).all()


def test_what_a_file_says_of_itself_follows_from_the_rule(place: Place, onnx_file: Path) -> None:
    """Thresholds, p-values and decisions of the file itself, which backmix's decider reads not."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file)
    names = [output.name for output in session.get_outputs()]
    said = [np.asarray(x) for x in session.run(None, {"images": place.views.numpy()})]
    found = dict(zip(names, said, strict=True))
    rule = place.record.rule
    accepted, p_values = rule.decide(found["class_index"], found["score"])
    np.testing.assert_array_equal(found["accept"], accepted)
    np.testing.assert_array_equal(found["p_value"], p_values)
    np.testing.assert_array_equal(found["threshold"], rule.thresholds[found["class_index"]])
    z = place.known.logits.astype(np.float64)
    softmax = np.exp(z - z.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    np.testing.assert_allclose(found["probability"], softmax.max(1), atol=1e-5)
    dtypes = {name: values.dtype.name for name, values in found.items()}
    assert dtypes == {
        "class_index": "int64", "probability": "float64", "score": "float64",
        "threshold": "float64", "p_value": "float64", "accept": "bool",
    }  # fmt: skip


def test_the_files_are_whole_and_hold_nothing_of_ours(onnx_file: Path, pt2_file: Path) -> None:
    """No operation that another runtime has not, and no weights beside the file."""
    import onnx

    model = onnx.load(onnx_file, load_external_data=False)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    program = torch.export.load(pt2_file)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and all(name.startswith("aten.") for name in called), called
    beside = {path.name for path in onnx_file.parent.iterdir()}
    assert beside == {"train.beton", "test.beton", "run", onnx_file.name, pt2_file.name}


METHODS: dict[str, tuple[Method, str, str, dict[str, Any]]] = {
    "arpl": (Arpl(), "arpl_dot", "shrunk", {}),
    "ssod": (Ssod(), "ssod_joint", "off", {}),
    "cssr": (Cssr(latent=4), "cssr", "conditional", {}),
    "callable": (Softmax(), "knn", "shrunk", {"model": "tests.nets:widened"}),
    "timm": (
        Softmax(),
        "max_logit",
        "off",
        {"model": "timm/mobilenetv3_small_050", "loader": LoaderOptions(size=64)},
    ),
    "blurred": (Softmax(), "gen", "off", {"blurpool": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", (".onnx", ".pt2"))
@pytest.mark.parametrize("name", METHODS)
def test_every_network_and_head_decides_as_its_evaluation(
    name: str, suffix: str, tmp_path: Path
) -> None:
    method, score, per_class, changes = METHODS[name]
    if "timm" in changes.get("model", ""):
        if importlib.util.find_spec("timm") is None:
            pytest.skip("timm is not installed: not run")
    place = make_run(tmp_path, method, score, per_class, **changes)
    out = tmp_path / f"model{suffix}"
    export(place.run, out, model=changes.get("model", ""))
    # Networks of 50 layers and more round more than those of ten.
    agree(place, open_decider(out, TRUST), 1e-4 if name == "timm" else 1e-5)


# --- parts -------------------------------------------------------------------------------------


@given(st.data())
def test_the_rule_as_torch_operations_is_the_rule(data: st.DataObject) -> None:
    """Every rule, tables of unequal length, scores that are entries, between them and outside."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    classes = data.draw(st.integers(2, 6))
    n = data.draw(st.integers(60, 400))
    scores = random.normal(size=n).round(data.draw(st.integers(1, 6)))  # few digits: many ties
    predicted = random.integers(0, classes, n) * random.integers(0, 2, n)
    names = [str(number) for number in range(classes)]
    rule = data.draw(
        st.sampled_from(
            [
                global_rule(scores, classes, RATE),
                conditional_rule(scores, predicted, names, RATE),
                shrunk_rule(scores, predicted, classes, RATE),
            ]
        )
    )
    asked = np.concatenate([scores, scores + 1e-9, [np.inf, -np.inf, np.nan, 0.0], rule.thresholds])
    own = random.integers(0, classes, len(asked))
    own[-classes:] = range(classes)
    thresholds, p_values, accept = TorchRule(rule)(torch.from_numpy(own), torch.from_numpy(asked))
    expected, p_expected = rule.decide(own, asked)
    np.testing.assert_array_equal(accept.numpy(), expected)
    np.testing.assert_array_equal(p_values.numpy(), p_expected)
    np.testing.assert_array_equal(thresholds.numpy(), rule.thresholds[own])


def test_outputs_that_are_not_finite_are_not_accepted(place: Place) -> None:
    """vim reads the features, which are sound here, and would give a number."""
    scorer = open_decider(place.run, TRUST).scorer
    assert isinstance(scorer, Scorer)
    network = Exported(scorer.model, place.record, scorer.fit, None).eval()
    with torch.no_grad():
        assert network(place.views)[5].any()
        linear = network.model.head
        assert isinstance(linear, torch.nn.Linear)
        linear.weight[0, 0] = torch.nan
        _, probability, score, _, p_value, accept = network(place.views)
    assert torch.stack([probability, score, p_value]).isnan().all() and not accept.any()


@pytest.mark.parametrize("reciprocal", (True, False))
def test_the_head_of_cssr_without_its_kernel_is_the_head(
    reciprocal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backmix.train.decide.exported._AT_ONCE", 2 * 6 * 8)  # 2 of 5 classes
    torch.manual_seed(0)
    head = Reconstruction(5, 8, 4, 2.0, reciprocal=reciprocal)
    maps = torch.randn(7, 8, 2, 3)
    maps[0] *= 1000  # clipped
    torch.testing.assert_close(PlainReconstruction(head).cell_logits(maps), head.cell_logits(maps))
    torch.testing.assert_close(PlainReconstruction(head)(maps), head(maps))


# --- what is said where it cannot be -----------------------------------------------------------


def test_what_can_be_seen_at_once_is_refused_at_once(place: Place, tmp_path: Path) -> None:
    for out, why in (
        (tmp_path / "model.pt", "ends in .onnx or .pt2"),
        (tmp_path / "none" / "model.pt2", "its folder is not there"),
        (tmp_path, "ends in .onnx or .pt2"),
    ):
        with pytest.raises(ValueError, match=why):
            export(place.run, out)
    with pytest.raises(ValueError, match="has no threshold: backmix calibrate"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_bytes((place.run / "config.json").read_bytes())
        export(tmp_path / "run", tmp_path / "model.pt2")


def test_an_exported_file_is_not_exported(onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is an exported file already"):
        export(onnx_file, tmp_path / "again.pt2")


def test_a_threshold_of_bf16_is_not_exported(place: Place, tmp_path: Path) -> None:
    half = place.run / "half.json"
    write_record(half, replace(place.record, precision="bf16"))
    with pytest.raises(ValueError, match="calibrate with --precision fp32 before exporting"):
        export(half, tmp_path / "model.pt2")
    half.unlink()


def test_a_missing_converter_is_named_with_what_installs_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ValueError, match=rf"{module}.*pip install 'backmix\[onnx\]'"):
                export(place.run, tmp_path / "model.onnx")


def test_a_network_too_large_for_onnx_is_sent_to_pt2(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "MOST_ONNX", 1000)
    with pytest.raises(ValueError, match=r"an \.onnx file .* holds 1,000 at most: export to \.pt2"):
        export(place.run, tmp_path / "model.onnx")


class _Looks(torch.nn.Module):
    """A network that decides by what it sees which way it goes."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.network(images)
        return -logits if logits.sum() > 0 else logits


def looks(classes: int) -> torch.nn.Module:
    from tests.nets import plain

    return _Looks(plain(classes))


def test_a_network_that_cannot_be_traced_is_refused_in_words(tmp_path: Path) -> None:
    model = "tests.train.decide.test_export:looks"
    place = make_run(tmp_path, Softmax(), "max_logit", "off", model=model)
    with pytest.raises(ValueError, match=r"torch\.export cannot trace this network: "):
        export(place.run, tmp_path / "model.pt2", model=model)
    assert not (tmp_path / "model.pt2").exists()
    with pytest.raises(ValueError, match="if you trust it, add --model"):
        export(place.run, tmp_path / "model.pt2")


def test_a_network_of_nan_is_refused(tmp_path: Path) -> None:
    place = make_run(tmp_path, Softmax(), "max_logit", "off")
    weights = safetensors.torch.load_file(place.run / "model.safetensors")
    weights["head.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(weights, place.run / "model.safetensors")
    record = replace(place.record, weights=weights_digest(place.run))
    write_record(place.run / THRESHOLD, record)
    with pytest.raises(ValueError, match="outputs of the self-test's images are NaN or infinite"):
        export(place.run, tmp_path / "model.pt2")


def test_a_file_that_fails_its_self_test_takes_no_ones_place(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.pt2"
    out.write_text("the one before")
    true = exporting.self_test

    def other(decider: Decider) -> dict[str, Any]:
        test = true(decider)
        scores = test["outputs"]["score"]
        scores[2] += 2 * TOLERANCE * max(abs(scores[2]), test["range"])
        return test

    monkeypatch.setattr(exporting, "self_test", other)
    with pytest.raises(ValueError, match=r"model\.pt2 fails its self-test: score of image 2 is "):
        export(place.run, out)
    assert out.read_text() == "the one before"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_two_exports_to_one_name_at_once_verify_what_each_has_written(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another whole export happens while the first one is about to replay its self-test."""
    out, true, said = tmp_path / "model.pt2", exporting.verified, list[str]()

    def meanwhile(*args: Any, **options: Any) -> str:
        monkeypatch.setattr(exporting, "verified", true)
        said.append(export(place.run, out))
        return true(*args, **options)

    monkeypatch.setattr(exporting, "verified", meanwhile)
    said.append(export(place.run, out))
    assert [f"{out}: the self-test of 4 images is right" in text for text in said] == [True, True]
    assert read_exported(out).record.classes == CLASSES
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_the_document_tells_everything(place: Place, onnx_file: Path) -> None:
    document = read_exported(onnx_file)
    assert document.record.classes == CLASSES
    assert document.self_test["outputs"]["class_index"] == list(
        open_decider(place.run, TRUST).decide(torch.from_numpy(formula_views(SIDE))).predicted
    )
    assert set(document.provenance) == {"backmix", "torch", "onnx", "onnxscript", "on"}
