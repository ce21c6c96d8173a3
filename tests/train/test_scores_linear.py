"""Scores with changed features or weights of a linear head, each against a second formula."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp

from backmix.train.scores import (
    LinearHead,
    ash_s,
    dice,
    energy,
    fdbd,
    nci,
    react,
    scale,
    vim,
)
from backmix.train.scores.fit import PRINCIPAL, fit_gaussians, fit_residual

K, C, N = 5, 12, 40
RANDOM = np.random.default_rng(3)
HEAD = LinearHead(RANDOM.normal(size=(K, C)), RANDOM.normal(size=K))
FEATURES = np.where(RANDOM.random((N, C)) < 0.7, RANDOM.exponential(1, (N, C)), -0.3)
"""A LeakyReLU's: negative entries among them."""
TRAIN = RANDOM.exponential(1, (200, C)) + RANDOM.normal(size=(1, C))
MEAN = TRAIN.mean(0)

Score = Callable[..., np.ndarray]
FITTED: dict[str, Score] = {
    "react": lambda f, head: react(f, head, 1.5),
    "ash_s": ash_s,
    "scale": scale,
    "dice": lambda f, head: dice(f, head, MEAN),
    "fdbd": lambda f, head: fdbd(f, head, MEAN),
    "nci": lambda f, head: nci(f, head, MEAN),
    "vim": lambda f, head: vim(f, head, residual(TRAIN, head)),
}


def residual(train: np.ndarray, head: LinearHead):
    """Return ViM's fit to training features."""
    gaussians, covariance = fit_gaussians(train, np.zeros(len(train), np.int64))
    logits = train @ head.weight.T + head.bias
    return fit_residual(train, logits, head, gaussians.mean, covariance)


def free_energy(features: np.ndarray, weight: np.ndarray = HEAD.weight) -> np.ndarray:
    return np.asarray(logsumexp(features @ weight.T + HEAD.bias, axis=1))


def test_react_clips_from_above() -> None:
    clipped = np.array([[min(entry, 1.5) for entry in row] for row in FEATURES])
    np.testing.assert_allclose(react(FEATURES, HEAD, 1.5), free_energy(clipped), rtol=1e-13)
    np.testing.assert_allclose(react(FEATURES, HEAD, FEATURES.max()), free_energy(FEATURES))


@pytest.mark.parametrize(("share", "count"), [(0.9, 1), (0.85, 2), (0.65, 4), (0.5, 6), (0, 12)])
def test_ash_keeps_the_largest_and_scale_all(share: float, count: int) -> None:
    pruned, scaled = [], []
    for row in np.maximum(FEATURES, 0):
        order = np.argsort(row)
        kept = row.copy()
        kept[order[: C - count]] = 0
        factor = np.exp(row.sum() / row[order[C - count :]].sum())
        pruned.append(kept * factor)
        scaled.append(row * factor)
    np.testing.assert_allclose(
        ash_s(FEATURES, HEAD, share), free_energy(np.array(pruned)), rtol=1e-12
    )
    np.testing.assert_allclose(
        scale(FEATURES, HEAD, share), free_energy(np.array(scaled)), rtol=1e-12
    )


def test_a_feature_without_positive_entries_leaves_the_bias() -> None:
    for score in (ash_s, scale):
        for nothing in (np.zeros((1, C)), -np.ones((1, C))):
            np.testing.assert_allclose(score(nothing, HEAD), free_energy(np.zeros((1, C))))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1"):
        ash_s(FEATURES, HEAD, 1.0)


def test_dice_keeps_the_weights_that_give_most() -> None:
    given_ = np.array([[HEAD.weight[k, c] * MEAN[c] for c in range(C)] for k in range(K)])
    ranked = np.sort(given_.ravel())
    place = 0.9 * (K * C - 1)
    low = ranked[int(place)]
    threshold = low + (place - int(place)) * (ranked[int(place) + 1] - low)
    kept = np.where(given_ > threshold, HEAD.weight, 0)
    assert np.count_nonzero(kept) == 6  # of 60 weights
    np.testing.assert_allclose(dice(FEATURES, HEAD, MEAN), free_energy(FEATURES, kept), rtol=1e-13)


def test_fdbd_sums_distances_to_boundaries() -> None:
    expected = []
    for f in FEATURES:
        z = [float(HEAD.weight[k] @ f + HEAD.bias[k]) for k in range(K)]
        y = int(np.argmax(z))
        total = 0.0
        for k in range(K):
            if k != y:
                # The boundary's nearest point: project f on w_y - w_k, where both logits agree.
                normal = HEAD.weight[y] - HEAD.weight[k]
                foot = f - (z[y] - z[k]) / (normal @ normal) * normal
                np.testing.assert_allclose(
                    HEAD.weight[y] @ foot + HEAD.bias[y], HEAD.weight[k] @ foot + HEAD.bias[k]
                )
                total += float(np.linalg.norm(f - foot))
        expected.append(total / np.linalg.norm(f - MEAN))
    np.testing.assert_allclose(fdbd(FEATURES, HEAD, MEAN), expected, rtol=1e-12)


def test_fdbd_and_nci_where_there_is_no_distance() -> None:
    twins = LinearHead(np.repeat(HEAD.weight[:1], 3, 0), np.array([0.0, 1.0, 2.0]))
    assert fdbd(FEATURES, twins, MEAN).tolist() == [0.0] * N
    assert fdbd(MEAN[None], HEAD, MEAN).tolist() == [0.0]
    assert nci(MEAN[None], HEAD, MEAN, alpha=0).tolist() == [0.0]


def test_nci_is_the_cosine_times_the_weight_and_the_length() -> None:
    expected = []
    for f in FEATURES:
        own = HEAD.weight[np.argmax(HEAD.weight @ f + HEAD.bias)]
        away = f - MEAN
        cosine = own @ away / np.linalg.norm(own) / np.linalg.norm(away)
        expected.append(cosine * np.linalg.norm(own) + 0.01 * sum(abs(entry) for entry in f))
    np.testing.assert_allclose(nci(FEATURES, HEAD, MEAN, alpha=0.01), expected, rtol=1e-12)


@pytest.mark.parametrize("channels", [12, 300])
def test_vim_is_energy_less_the_part_outside_of_the_principal_space(channels: int) -> None:
    """Second formula: Pythagoras with the principal directions of the data matrix itself."""
    random = np.random.default_rng(1)
    spread = np.geomspace(3, 0.01, channels)
    train = random.normal(size=(700, channels)) * spread + 0.1
    f = random.normal(size=(N, channels))
    head = LinearHead(random.normal(size=(K, channels)), random.normal(size=K))
    found = residual(train, head)
    origin = -np.linalg.lstsq(head.weight, head.bias, rcond=None)[0]
    np.testing.assert_allclose(found.origin, origin, atol=1e-12)
    _, _, directions = np.linalg.svd(train - origin, full_matrices=False)
    principal = directions[: PRINCIPAL if channels > PRINCIPAL else channels // 2]
    assert found.basis.shape[1] == channels - len(principal)

    def outside(features: np.ndarray) -> np.ndarray:
        away = features - origin
        return np.sqrt((away**2).sum(1) - ((away @ principal.T) ** 2).sum(1))

    logits = train @ head.weight.T + head.bias
    alpha = logits.max(1).mean() / outside(train).mean()
    expected = logsumexp(f @ head.weight.T + head.bias, axis=1) - alpha * outside(f)
    np.testing.assert_allclose(vim(f, head, found), expected, rtol=1e-8)


@pytest.mark.parametrize("images", [1, 2, 5, 20])
def test_vim_keeps_a_residual_where_images_are_few(images: int) -> None:
    found = residual(TRAIN[:images], HEAD)
    assert found.basis.shape[1] == C - min(C, images) // 2
    assert np.isfinite(vim(FEATURES, HEAD, found)).all()


@pytest.mark.parametrize("alive", [1, 4, 5, 9])
def test_vim_makes_no_score_of_rounding_where_few_channels_live(alive: int) -> None:
    live = np.arange(C) < alive
    found = residual((TRAIN * live).astype(np.float32), HEAD)
    f = np.abs(FEATURES) * live
    # u is one direction more of those that are in use; half of all 12 are principal.
    assert (found.alpha == 0) == (alive + 1 <= C // 2)
    if found.alpha == 0:
        np.testing.assert_allclose(vim(f, HEAD, found), free_energy(f), rtol=1e-12)
    else:
        assert found.alpha < 100
    # What is small, as fp32 leaves it, but no rounding of float64 counts: alpha grows to match.
    whisper = residual((TRAIN * np.where(live, 1, 1e-7)).astype(np.float32), HEAD)
    assert (1e4 < whisper.alpha < 1e10) == (found.alpha == 0)


def test_vim_without_bias_begins_at_the_origin() -> None:
    plain = LinearHead(HEAD.weight, np.zeros(K))
    assert (residual(TRAIN, plain).origin == 0).all()


@given(st.permutations(range(K)), st.permutations(range(C)))
def test_the_order_of_classes_and_channels_does_not_matter(classes, channels) -> None:
    moved = LinearHead(HEAD.weight[classes][:, channels], HEAD.bias[classes])
    expected = {
        "react": react(FEATURES, HEAD, 1.5),
        "ash_s": ash_s(FEATURES, HEAD),
        "scale": scale(FEATURES, HEAD),
        "dice": dice(FEATURES, HEAD, MEAN),
        "fdbd": fdbd(FEATURES, HEAD, MEAN),
        "nci": nci(FEATURES, HEAD, MEAN),
        "vim": vim(FEATURES, HEAD, residual(TRAIN, HEAD)),
    }
    f, mean = FEATURES[:, channels], MEAN[channels]
    found = {
        "react": react(f, moved, 1.5),
        "ash_s": ash_s(f, moved),
        "scale": scale(f, moved),
        "dice": dice(f, moved, mean),
        "fdbd": fdbd(f, moved, mean),
        "nci": nci(f, moved, mean),
        "vim": vim(f, moved, residual(TRAIN[:, channels], moved)),
    }
    for name, scores in expected.items():
        np.testing.assert_allclose(found[name], scores, rtol=1e-9, err_msg=name)


@given(st.integers(0, 100))
def test_vim_sees_no_rotation_of_feature_space(seed: int) -> None:
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(C, C)))
    turned = LinearHead(HEAD.weight @ turn, HEAD.bias)
    np.testing.assert_allclose(
        vim(FEATURES @ turn, turned, residual(TRAIN @ turn, turned)),
        vim(FEATURES, HEAD, residual(TRAIN, HEAD)),
        rtol=1e-9,
    )


@pytest.mark.parametrize("name", FITTED)
def test_what_is_not_finite_or_does_not_fit_is_refused(name: str) -> None:
    score = FITTED[name]
    assert score(np.empty((0, C)), HEAD).shape == (0,)
    broken = FEATURES.copy()
    broken[[3, 9], 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 40 images have features that are NaN or infinite"):
        score(broken, HEAD)
    with pytest.raises(ValueError, match="the features have 11 channels, the head reads 12"):
        score(FEATURES[:, 1:], HEAD)
    with pytest.raises(ValueError, match=r"must be \[n, C\] with C >= 1, got shape \(12,\)"):
        score(FEATURES[0], HEAD)


@pytest.mark.parametrize("name", FITTED)
def test_a_score_keeps_its_input_and_reads_float32(name: str) -> None:
    plain = FEATURES.astype(np.float32)
    plain.setflags(write=False)
    score = FITTED[name]
    assert score(plain, HEAD).dtype == np.float64
    np.testing.assert_array_equal(score(plain, HEAD), score(plain.astype(np.float64), HEAD))


def test_nothing_changed_is_the_energy() -> None:
    plain = np.abs(FEATURES)
    logits = plain @ HEAD.weight.T + HEAD.bias
    np.testing.assert_allclose(react(plain, HEAD, np.inf), energy(logits), rtol=1e-13)
