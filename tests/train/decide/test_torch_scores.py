"""Scores as torch expressions against the NumPy functions that define them."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from backmix.train.decide.torch_scores import (
    MOST_NUMBERS,
    TorchScore,
    log1p,
    softplus,
    torch_score,
)
from backmix.train.models.build import build
from backmix.train.models.heads import Head, ReciprocalPoints, Reconstruction, put_head
from backmix.train.outputs import Outputs
from backmix.train.scores import Fit, every_score, fit_scores, linear_head
from backmix.train.scores.cssr import CssrFit, standard_of

CHANNELS = 24
LINEAR = ("ash_s", "scale", "react", "dice", "vim", "fdbd", "nci")
ANY = ("msp", "temperature", "gen", "knn", "mahalanobis", "rmds", "feature_norm")


def outputs_of(head: nn.Linear | None, n: int, classes: int, seed: int, **extras: np.ndarray):
    """Outputs whose features have a heavy tail and zeros, and whose logits go to 60."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    features = random.exponential(1.0, (n, CHANNELS)) * random.integers(0, 2, (n, CHANNELS))
    features[np.arange(n), labels % CHANNELS] += 4.0
    features = features.astype(np.float32)
    if head is None:
        logits = random.normal(0, 1, (n, classes)).astype(np.float32)
        logits[np.arange(n), labels] += random.uniform(0, 60, n).astype(np.float32)
    else:
        with torch.no_grad():
            logits = head(torch.from_numpy(features)).numpy()
    return Outputs("set", "known", logits, features, labels, np.arange(n), (), "", extras=extras)


def said(outputs: Outputs, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    plain = {"logits": outputs.logits, "features": outputs.features, **outputs.extras}
    return {name: torch.from_numpy(array).double() for name, array in plain.items()} | more


def compare(name: str, outputs: Outputs, head: Head, fit: Fit | None) -> None:
    expected = every_score(outputs, head, fit)[name]
    found = torch_score(name, head, fit, None)(said(outputs))
    assert found.dtype == torch.float64 and found.shape == expected.shape
    assert len(np.unique(expected)) > len(expected) // 2  # else next to nothing was compared
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("classes", (2, 7, 130))  # GEN takes 100 of 130
@pytest.mark.parametrize("name", (*ANY, "max_logit", "energy", *LINEAR))
def test_a_score_of_a_linear_head_is_what_it_means(name: str, classes: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(CHANNELS, classes, bias=classes != 7)
    if classes > 2:
        with torch.no_grad():
            head.weight[1] = head.weight[0]  # no boundary between these, for fDBD
    fit = fit_scores(outputs_of(head, 400, classes, 1), linear_head(head))
    compare(name, outputs_of(head, 200, classes, 2), head, fit)


@pytest.mark.parametrize("name", ("ssod", "ssod_joint"))
def test_a_score_of_a_rejection_head_is_what_it_means(name: str) -> None:
    rejection = np.random.default_rng(0).normal(0, 20, 300).astype(np.float32)
    compare(name, outputs_of(None, 300, 5, 3, rejection=rejection), nn.Linear(CHANNELS, 5), None)


@pytest.mark.parametrize("name", ("arpl", "arpl_dot"))
def test_a_score_of_reciprocal_points_is_what_it_means(name: str) -> None:
    compare(name, outputs_of(None, 200, 5, 3), ReciprocalPoints(5, CHANNELS), None)


@pytest.mark.parametrize("grams", (True, False))
@pytest.mark.parametrize("reciprocal", (True, False))
def test_cssr_is_what_it_means(reciprocal: bool, grams: bool) -> None:
    torch.manual_seed(0)
    model = build("classifier32-quarter", 4, 32).eval()
    put_head(model, Reconstruction(4, 32, 8, 1.0, reciprocal=reciprocal))
    cssr = CssrFit(model, 1 << 26 if grams else 0)
    views = torch.randn(60, 3, 32, 32)
    with torch.inference_mode():
        logits, maps = model(views)
        maps[0, 3] = 0  # a channel that says nothing
        cssr.learn(logits[:40], maps[:40])
        cssr.finish_learning()
        figures = {name: x.numpy() for name, x in cssr.figures(logits, maps).items()}
    assert ("cssr_s2" in figures) is grams
    pooled = maps.mean((2, 3)).numpy()
    everything = Outputs(
        "set", "known", logits.numpy(), pooled, np.arange(60) % 4, np.arange(60), (), "",
        extras=figures,
    )  # fmt: skip
    fit = fit_scores(everything, None)
    expected = every_score(everything, model.head, fit)
    for name in ("cssr_s0", "cssr"):
        found = torch_score(name, model.head, fit, cssr)(said(everything, maps=maps))
        np.testing.assert_allclose(found.numpy(), expected[name], rtol=1e-6, atol=1e-7)


def test_a_feature_of_zeros_has_every_score() -> None:
    torch.manual_seed(0)
    head = nn.Linear(CHANNELS, 5)
    fit = fit_scores(outputs_of(head, 100, 5, 1), linear_head(head))
    outputs = outputs_of(head, 3, 5, 2)
    outputs.features[:] = 0
    outputs.features[1] = fit.gaussians.mean  # fDBD and NCI divide by the distance to it
    expected = every_score(outputs, head, fit)
    for name in (*ANY, *LINEAR):
        found = torch_score(name, head, fit, None)(said(outputs))
        # All training features are equally like a feature of zeros: knn may take any.
        rtol = 1e-7 if name == "knn" else 1e-10
        np.testing.assert_allclose(found.numpy(), expected[name], rtol=rtol, atol=1e-13)


@given(st.floats(-745, 745))
def test_softplus_keeps_the_last_digits(x: float) -> None:
    found = float(softplus(torch.tensor([x], dtype=torch.float64)))
    assert found == pytest.approx(np.logaddexp(0, x), rel=1e-14, abs=1e-310)


@given(st.floats(-0.5, 1.0))
def test_log1p_keeps_the_last_digits(x: float) -> None:
    found = float(log1p(torch.tensor([x], dtype=torch.float64)))
    assert found == pytest.approx(np.log1p(x), rel=1e-14, abs=1e-310)


@pytest.mark.parametrize("name", ("odin", "brightness", "file_size"))
def test_what_no_file_can_hold_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} cannot be exported: it (moves|looks)"):
        torch_score(name, nn.Linear(4, 3), None, None)


def test_scores_that_a_network_has_not_are_refused() -> None:
    for name in ("vim", "knn", "nonsense", "temperature"):
        with pytest.raises(ValueError, match=f"^{name} cannot be exported: this run has no such"):
            torch_score(name, nn.Linear(4, 3), None, None)
    with pytest.raises(ValueError, match=r"^ash_s cannot be exported"):
        torch_score("ash_s", ReciprocalPoints(3, 4), None, None)


def test_a_bank_of_neighbours_is_exported_up_to_its_limit() -> None:
    head = nn.Linear(CHANNELS, 5)
    fit = fit_scores(outputs_of(head, 100, 5, 1), linear_head(head))
    rows = MOST_NUMBERS // CHANNELS
    bank = np.broadcast_to(fit.bank[:1], (rows, CHANNELS))
    torch_score("knn", head, replace(fit, bank=bank), None)
    bank = np.broadcast_to(fit.bank[:1], (rows + 1, CHANNELS))
    with pytest.raises(ValueError, match="at most 16,777,216: decide with the run itself"):
        torch_score("knn", head, replace(fit, bank=bank), None)


class Everything(nn.Module):
    """Scores of one batch's outputs, side by side."""

    def __init__(self, scores: dict[str, TorchScore]):
        super().__init__()
        self.scores = nn.ModuleDict(scores)

    def forward(self, logits, features, rejection, maps, cssr_s0):  # as their exporter names them
        outputs = {
            "logits": logits.double(), "features": features.double(), "maps": maps,
            "rejection": rejection.double(), "cssr_s0": cssr_s0,
        }  # fmt: skip
        return tuple(score(outputs) for score in self.scores.values())


def test_onnx_runtime_computes_every_score(tmp_path: Path) -> None:
    """One file with all of them, for every operation that they need must be known there, too."""
    import onnxruntime

    torch.manual_seed(0)
    head = nn.Linear(CHANNELS, 120)  # GEN takes 100
    train, some = outputs_of(head, 400, 120, 1), outputs_of(head, 50, 120, 2)
    fit = fit_scores(train, linear_head(head))
    model = build("classifier32-quarter", 120, 32).eval()
    put_head(model, Reconstruction(120, CHANNELS, 4, 1.0, reciprocal=True))
    random = np.random.default_rng(3)
    maps = torch.from_numpy(random.normal(size=(400, CHANNELS, 2, 3)).astype(np.float32))
    cssr = CssrFit(model)
    cssr.learn(torch.from_numpy(train.logits), maps)
    cssr.finish_learning()
    figures = cssr.figures(torch.from_numpy(some.logits), maps[:50])
    fit = replace(fit, cssr=standard_of({name: x.numpy() for name, x in figures.items()}))
    extras = {name: x.numpy() for name, x in figures.items()}
    extras["rejection"] = random.normal(0, 20, 50).astype(np.float32)
    some = replace(some, extras=extras)

    expected = every_score(some, head, fit)
    expected |= every_score(some, ReciprocalPoints(120, CHANNELS), fit)
    scores = {name: torch_score(name, head, fit, cssr) for name in expected}
    assert len(scores) == 22
    arrays = {"logits": some.logits, "features": some.features, "rejection": extras["rejection"]}
    arrays |= {"maps": maps[:50].numpy(), "cssr_s0": extras["cssr_s0"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter's own old habits
        program = torch.onnx.export(
            Everything(scores).eval(),
            tuple(torch.from_numpy(array) for array in arrays.values()),
            dynamo=True,
            dynamic_shapes=[{0: torch.export.Dim("n", min=1)}] * 5,
            input_names=list(arrays),
            output_names=[f"{name} score" for name in scores],
            verbose=False,
        )
    assert program is not None
    program.save(tmp_path / "scores.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "scores.onnx")
    for rows in (slice(0, 50), slice(7, 8)):
        part = {name: array[rows] for name, array in arrays.items()}
        for name, found in zip(scores, session.run(None, part), strict=True):
            values = np.asarray(found)
            assert values.dtype == np.float64
            # Gram matrices are products in fp32, which adds in another order.
            rtol = 1e-6 if name == "cssr" else 1e-9
            np.testing.assert_allclose(
                values, expected[name][rows], rtol=rtol, atol=1e-12, err_msg=name
            )
