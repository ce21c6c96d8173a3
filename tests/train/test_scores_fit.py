"""What scores learn from training images: against other libraries, loops, and in small chunks."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.spatial import distance
from scipy.special import log_softmax
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors
from torch import nn

from backmix.train.metrics import auroc
from backmix.train.models.heads import ReciprocalPoints, Reconstruction
from backmix.train.outputs import Outputs
from backmix.train.scores import (
    CUES,
    Fit,
    LinearHead,
    every_score,
    feature_norm,
    fit_scores,
    knn,
    linear_head,
    mahalanobis,
    rmds,
)
from backmix.train.scores import fit as fitting
from backmix.train.scores import rows as chunking
from backmix.train.scores.fit import fit_bank, fit_gaussians, fit_temperature, neighbours
from backmix.train.scores.rows import percentile
from bench.bench_scores import calls

K, C = 4, 10
RANDOM = np.random.default_rng(7)
LABELS = RANDOM.integers(0, K, 300)
TRAIN = (3 * RANDOM.normal(size=(K, C))[LABELS] + RANDOM.normal(size=(300, C))).astype(np.float32)
TEST = (3 * RANDOM.normal(size=(50, C))).astype(np.float32)


def outputs(
    features: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    extras: dict[str, np.ndarray] | None = None,
) -> Outputs:
    return Outputs(
        name="set",
        kind="known",
        logits=logits.astype(np.float32),
        features=features.astype(np.float32),
        labels=labels,
        index=np.arange(len(labels)),
        files=(),
        digest="",
        extras=extras or {},
    )


def toy(seed: int = 0, known: bool = True, count: int = 400) -> tuple[nn.Linear, Outputs]:
    """A head that reads two channels a class, and features that show one class, or no class well.

    Unknown features are weak in the channels of all classes, and live in the last two.
    """
    random = np.random.default_rng(seed)
    head = nn.Linear(C, K)
    with torch.no_grad():
        head.weight.copy_(torch.eye(K, C) + torch.eye(K, C).roll(K, 1))
        head.bias.copy_(torch.linspace(-0.2, 0.2, K))
    labels = random.integers(0, K, count)
    features = 0.4 * random.random((count, C))
    if known:
        for half in (0, K):
            features[np.arange(count), labels + half] += 2 + random.random(count)
    else:
        features[:, 2 * K :] += 2 * random.random((count, C - 2 * K))
    logits = features @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    if known:  # not every image is right, so that there is a best temperature
        labels = np.where(random.random(count) < 0.05, (labels + 1) % K, labels)
    return head, outputs(features, logits, labels)


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 50, 300])
def test_knn_is_the_distance_to_the_kth_neighbour(k: int) -> None:
    def unit(features: np.ndarray) -> np.ndarray:
        features = features.astype(np.float64)
        return features / np.sqrt((features**2).sum(1))[:, None]

    other = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(unit(TRAIN))
    distances, _ = other.kneighbors(unit(TEST))
    bank = fit_bank(TRAIN, np.arange(300))
    assert bank.dtype == np.float32 and bank.shape == (300, C)
    np.testing.assert_allclose(knn(TEST, bank, k), -distances[:, -1], atol=3e-7)


def test_knn_of_training_images_and_of_no_direction_at_all() -> None:
    bank = fit_bank(TRAIN, np.arange(300))
    np.testing.assert_allclose(knn(TRAIN, bank, 1), 0, atol=1e-7)
    assert (knn(TRAIN[:2] * [[1e-20], [1e20]], bank, 1) > -1e-7).all()
    # Zeros have no direction: 1 away from everything, instead of NaN.
    np.testing.assert_allclose(knn(np.zeros((1, C)), bank, 5), -1, atol=1e-7)
    for k in (0, 301):
        with pytest.raises(ValueError, match=rf"k must be 1 .. 300, .*, got {k}"):
            knn(TEST, bank, k)


def test_a_large_bank_is_a_part_drawn_by_sample_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MOST_NEIGHBOURS", 60)
    index = 1000 + np.arange(300)
    bank = fit_bank(TRAIN, index)
    assert bank.shape == (60, C)
    whole = TRAIN / np.linalg.norm(TRAIN, axis=1, keepdims=True)
    chosen = [int(np.abs(whole - row).max(1).argmin()) for row in bank]
    assert chosen == sorted(set(chosen))
    # The same images are chosen whatever their order.
    order = np.random.default_rng(0).permutation(300)
    again = fit_bank(TRAIN[order], index[order])
    assert {row.tobytes() for row in again} == {row.tobytes() for row in bank}
    found = fit_scores(outputs(TRAIN, TRAIN[:, :K], LABELS), None)
    assert found.k == 10  # a fifth of 50
    assert any("among 60 of 300 images" in note for note in found.notes)


@pytest.mark.parametrize(
    ("classes", "images", "kept", "k"),
    [
        (6, 30_000, 30_000, 50),
        (100, 50_000, 50_000, 200),
        (1000, 1_281_167, 1_281_167, 1000),
        (1000, 1_281_167, 100_000, 78),
        (6, 20, 20, 20),
        (6, 1, 1, 1),
        (10, 10_000_000, 100_000, 1),
    ],
)
def test_which_neighbour_counts(classes: int, images: int, kept: int, k: int) -> None:
    assert neighbours(classes, images, kept) == k


def within(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return class means and pooled covariance by a loop."""
    means = np.array([features[labels == k].mean(0) for k in range(K)])
    away = np.array([f - means[k] for f, k in zip(features, labels, strict=True)])
    return means, away.T @ away / len(features)


def test_mahalanobis_is_the_distance_to_the_nearest_class(monkeypatch) -> None:
    monkeypatch.setattr(fitting, "RIDGE", 0.0)
    train, test = TRAIN.astype(np.float64), TEST.astype(np.float64)
    means, covariance = within(train, LABELS)
    gaussians, total = fit_gaussians(TRAIN, LABELS)
    precision = np.linalg.inv(covariance)
    lengths = [min(distance.mahalanobis(f, m, precision) for m in means) for f in test]
    nearest = -(np.array(lengths) ** 2)
    np.testing.assert_allclose(mahalanobis(TEST, gaussians), nearest, rtol=1e-9)
    overall = EmpiricalCovariance().fit(train)
    np.testing.assert_allclose(total, overall.covariance_, rtol=1e-9, atol=1e-9)
    expected = nearest + overall.mahalanobis(test)
    np.testing.assert_allclose(rmds(TEST, gaussians), expected, rtol=1e-9, atol=1e-9)


def test_mahalanobis_with_its_ridge_to_the_last_digits() -> None:
    means, covariance = within(TRAIN.astype(np.float64), LABELS)
    covariance += 1e-6 * np.trace(covariance) / C * np.eye(C)
    gaussians, _ = fit_gaussians(TRAIN, LABELS)
    expected = [
        max(-(f - m) @ np.linalg.solve(covariance, f - m) for m in means)
        for f in TEST.astype(np.float64)
    ]
    np.testing.assert_allclose(mahalanobis(TEST, gaussians), expected, rtol=1e-11)


@given(st.integers(0, 1000))
def test_mahalanobis_distances_see_no_affine_change(seed: int) -> None:
    random = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(random.normal(size=(C, C)))
    change = turn * np.exp(random.uniform(-1, 1, C))
    shift = 5 * random.normal(size=C)
    train, test = TRAIN.astype(np.float64), TEST.astype(np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "RIDGE", 0.0)
        before, _ = fit_gaussians(train, LABELS)
        after, _ = fit_gaussians(train @ change + shift, LABELS)
    for score in (mahalanobis, rmds):
        np.testing.assert_allclose(
            score(test @ change + shift, after), score(test, before), rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("labels", [[0], [0, 1, 2], [2, 2, 0, 0]])
def test_gaussians_of_next_to_no_images_are_finite(labels: list[int]) -> None:
    gaussians, _ = fit_gaussians(TRAIN[: len(labels)], np.array(labels))
    assert len(gaussians.centres) == len(set(labels))
    assert np.isfinite(mahalanobis(TEST, gaussians)).all()
    assert np.isfinite(rmds(TEST, gaussians)).all()
    own = np.array([TRAIN[: len(labels)][np.array(labels) == k].mean(0) for k in set(labels)])
    np.testing.assert_allclose(mahalanobis(own, gaussians), 0, atol=1e-4)


def test_equal_images_make_no_error() -> None:
    gaussians, _ = fit_gaussians(np.ones((6, C)), np.array([0, 0, 1, 1, 2, 2]))
    assert (mahalanobis(np.ones((1, C)), gaussians) == 0).all()
    assert (mahalanobis(np.zeros((1, C)), gaussians) < 0).all()


def test_means_that_are_large_against_the_spread_cost_nothing() -> None:
    labels = np.arange(300) % K
    noise = RANDOM.normal(size=(300, C))
    near, _ = fit_gaussians(noise, labels)
    far, _ = fit_gaussians(noise + 1e7, labels)
    np.testing.assert_allclose(
        mahalanobis(noise + 1e7, far), mahalanobis(noise, near), rtol=1e-5, atol=1e-6
    )


def test_the_norm_is_a_cue() -> None:
    np.testing.assert_allclose(feature_norm([[3.0, 4.0], [0.0, 0.0]]), [5, 0])
    assert "feature_norm" in CUES


# --- percentile, temperature ---------------------------------------------------------------------


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    st.floats(0, 1),
)
def test_the_percentile_is_numpys(entries: list[float], share: float) -> None:
    values = np.array(entries, np.float32)
    expected = np.percentile(values.astype(np.float64), 100 * share)
    scale = float(np.abs(values).max())
    assert percentile(values, share) == pytest.approx(expected, rel=1e-12, abs=1e-12 * scale)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_the_percentile_of_a_table_in_chunks(share: float, monkeypatch) -> None:
    monkeypatch.setattr(chunking, "CHUNK", 4000)
    values = np.random.default_rng(0).normal(size=(211, 37)).astype(np.float32)
    values[values < -1] = -1.0  # ties
    values[:3] = [[0.0], [-0.0], [1e-45]]
    expected = np.percentile(values.astype(np.float64), 100 * share)
    assert percentile(values, share) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="needs float32 entries, got 0 of float32"):
        percentile(values[:0], share)


def test_the_temperature_has_the_least_cross_entropy() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 5, 500)
    for sharpness in (0.05, 1.0, 3.0, 20.0):
        z = random.normal(size=(500, 5))
        z[np.arange(500), labels] += 1.5
        z *= sharpness

        def loss(log_t: float, z=z) -> float:
            return -log_softmax(z / np.exp(log_t), 1)[np.arange(500), labels].mean()

        best: Any = minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9})
        found = fit_temperature(z, labels)
        assert np.log(found) == pytest.approx(best.x, abs=1e-6)


def test_a_temperature_that_the_images_do_not_determine() -> None:
    z = np.array([[3.0, 1.0], [0.0, 2.0]])
    assert fit_temperature(z, np.array([0, 1])) == fitting.COLDEST  # all right
    assert fit_temperature(z, np.array([1, 0])) == fitting.HOTTEST  # all wrong
    assert fit_temperature(np.zeros((3, 2)), np.array([0, 1, 1])) in (
        fitting.COLDEST,
        fitting.HOTTEST,
    )
    found = fit_scores(outputs(TRAIN[:2], z, np.array([0, 1])), None)
    assert any("at its bound, 0.01" in note for note in found.notes)


def test_the_temperature_is_that_of_the_held_out_images() -> None:
    _, train = toy(0)
    _, held = toy(1, count=200)
    held = replace(held, logits=held.logits * 4)
    alone, both = fit_scores(train, None), fit_scores(train, None, held)
    assert both.temperature == fit_temperature(held.logits, held.labels)
    assert alone.temperature == fit_temperature(train.logits, train.labels)
    assert both.held_out == 200 and alone.held_out == 0
    assert any("temperature is fitted to the training images" in note for note in alone.notes)
    assert not both.notes


# --- all together --------------------------------------------------------------------------------

LINEAR = {
    *("msp", "temperature", "max_logit", "energy", "gen", "ash_s", "scale", "react", "dice"),
    *("vim", "fdbd", "nci", "knn", "mahalanobis", "rmds", "feature_norm"),
}


def test_every_score_calls_the_known_images_known() -> None:
    head, train = toy(0)
    fit = fit_scores(train, linear_head(head))
    known, unknown = (every_score(toy(seed, known=seed == 1)[1], head, fit) for seed in (1, 2))
    assert set(known) == set(unknown) == LINEAR
    for name in LINEAR - {"feature_norm"}:
        # DICE keeps 4 weights of 40, so not every class has one left.
        assert auroc(known[name], unknown[name]) > (0.7 if name == "dice" else 0.9), name
        assert known[name].dtype == np.float64 and known[name].shape == (400,)


def test_the_bench_times_every_score() -> None:
    head, train = toy(0)
    linear = linear_head(head)
    assert linear is not None
    fit = fit_scores(train, linear)
    timed = calls(train, linear, fit)
    assert set(timed) == LINEAR | {"ssod", "ssod_joint", "arpl", "arpl_dot"}
    for name, scores in every_score(train, head, fit).items():
        np.testing.assert_array_equal(timed[name](), scores, err_msg=name)


def test_which_scores_there_are() -> None:
    head, train = toy(0)
    fit = fit_scores(train, linear_head(head))
    bare = {"msp", "max_logit", "energy", "gen", "feature_norm"}
    assert set(every_score(train)) == bare
    assert set(every_score(train, head)) == bare | {"ash_s", "scale"}
    fitted = {"temperature", "knn", "mahalanobis", "rmds"}
    assert set(every_score(train, None, fit)) == bare | fitted
    # Other heads have no W to compute logits with.
    points = ReciprocalPoints(K, C)
    plain = fit_scores(train, linear_head(points))
    assert plain.linear is None
    assert set(every_score(train, points, plain)) == bare | fitted | {"arpl", "arpl_dot"}
    rejecting = replace(train, extras={"rejection": np.zeros(400, np.float32)})
    assert set(every_score(rejecting, head)) - set(every_score(train, head)) == {
        "ssod",
        "ssod_joint",
    }
    seen = replace(train, extras={name: np.ones(400) for name in ("brightness", "odin")})
    assert set(every_score(seen)) == bare | {"brightness", "odin"}


def test_the_scores_of_cssr_are_in_training_deviations() -> None:
    figures = {
        "cssr_s0": np.linspace(-3, 1, 400),
        "cssr_s1": np.linspace(5, 9, 400) ** 2,
    }
    _, train = toy(0)
    train = replace(train, extras=figures)
    head = Reconstruction(K, C, 2, 0.1, reciprocal=False)
    fit = fit_scores(train, linear_head(head))
    scores = every_score(train, head, fit)
    # log p as logits: max_logit and energy say nothing that msp does not.
    assert set(scores) == {
        *("msp", "temperature", "gen", "knn", "mahalanobis", "rmds", "cssr_s0", "cssr"),
        "feature_norm",
    }
    expected = sum((s - s.mean()) / s.std() for s in figures.values())
    np.testing.assert_allclose(scores["cssr"], expected, rtol=1e-6)
    assert set(every_score(train, head)) == {"msp", "gen", "cssr_s0", "feature_norm"}


def test_chunks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    head, train = toy(0)
    _, test = toy(1, known=False, count=123)
    test = replace(test, extras={"rejection": RANDOM.normal(size=123)})

    def all_of_it() -> tuple[Fit, dict[str, np.ndarray]]:
        fit = fit_scores(train, linear_head(head), test_as_held_out)
        return fit, every_score(test, head, fit)

    test_as_held_out = toy(3, count=77)[1]
    fit, whole = all_of_it()
    monkeypatch.setattr(chunking, "CHUNK", 3000)
    assert len(list(chunking.spans(400, 3 * C))) > 30
    chunked, parts = all_of_it()
    assert fit.linear is not None and chunked.linear is not None
    assert chunked.linear.clip == fit.linear.clip
    assert (chunked.bank == fit.bank).all()
    assert chunked.temperature == pytest.approx(fit.temperature, rel=1e-9)
    assert list(parts) == list(whole)
    for name, scores in whole.items():
        np.testing.assert_allclose(parts[name], scores, rtol=1e-7, atol=1e-9, err_msg=name)


def test_react_clips_at_the_ninetieth_percentile_of_all_entries() -> None:
    head, train = toy(0)
    fit = fit_scores(train, linear_head(head))
    assert fit.linear is not None
    expected = np.percentile(train.features.astype(np.float64), 90)
    assert fit.linear.clip == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("images", [1, 2, 3, 7])
def test_a_fit_to_few_images_gives_scores(images: int) -> None:
    head, test = toy(1)
    few = toy(0, count=images)[1]
    fit = fit_scores(few, linear_head(head))
    assert fit.k == images and fit.images == images
    for name, scores in every_score(test, head, fit).items():
        assert np.isfinite(scores).all(), name


def test_outputs_that_are_not_finite_are_not_fitted_to() -> None:
    head, train = toy(0)
    for what in ("logits", "features"):
        broken = getattr(train, what).copy()
        broken[[4, 7], 1] = np.nan
        damaged = replace(train, name="train", **{what: broken})
        with pytest.raises(ValueError, match=f"2 of 400 images of set train have {what} that"):
            fit_scores(damaged, linear_head(head))
        with pytest.raises(ValueError, match="2 of 400 images of set train"):
            fit_scores(train, linear_head(head), damaged)
    with pytest.raises(ValueError, match="training images, and there are none"):
        fit_scores(toy(0, count=0)[1], None)


@pytest.mark.parametrize("name", ["odin", "cssr_s0", "brightness"])
def test_a_stored_figure_that_is_not_finite_is_refused(name: str) -> None:
    _, train = toy(0, count=5)
    broken = replace(train, extras={name: np.array([0, np.nan, 0, 0, np.inf])})
    with pytest.raises(ValueError, match=f"2 of 5 images have {name} figures that are NaN"):
        every_score(broken)


def test_a_head_without_bias_has_one_of_zeros() -> None:
    head = linear_head(nn.Linear(C, K, bias=False))
    assert head is not None and head.bias.tolist() == [0] * K
    assert isinstance(head, LinearHead) and head.weight.dtype == np.float64
