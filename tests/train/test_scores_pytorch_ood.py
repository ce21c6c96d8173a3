"""The scores against pytorch-ood, whose own are larger = more unknown."""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from backmix.train.scores import (
    ash_s,
    dice,
    energy,
    fdbd,
    gen,
    knn,
    linear_head,
    mahalanobis,
    max_logit,
    msp,
    nci,
    odin,
    react,
    rmds,
    scale,
    temperature,
    vim,
)
from backmix.train.scores.fit import fit_bank, fit_gaussians, fit_residual, fit_temperature
from backmix.train.scores.rows import percentile

K, C, N = 6, 64, 200


@pytest.fixture(scope="module")
def other(torchvision: ModuleType) -> ModuleType:
    """Its detectors; the package needs torchvision to be imported."""
    pytest.importorskip("pytorch_ood", reason="pytorch-ood is not installed: not run")
    import pytorch_ood.detector

    return pytorch_ood.detector


@pytest.fixture(scope="module")
def problem() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % K
    centres = 2 * torch.rand(K, C, generator=made)
    train = (centres[labels] + 0.5 * torch.randn(2000, C, generator=made)).relu()
    test = 1.5 * torch.rand(N, C, generator=made)
    weight = 0.3 * torch.randn(K, C, generator=made)
    bias = torch.randn(K, generator=made)
    return {
        "labels": labels,
        "train": train,
        "test": test,
        "weight": weight,
        "bias": bias,
        "logits": test @ weight.T + bias,
    }


@pytest.fixture(scope="module")
def head(problem: dict[str, torch.Tensor]) -> nn.Linear:
    head = nn.Linear(C, K)
    with torch.no_grad():
        head.weight.copy_(problem["weight"])
        head.bias.copy_(problem["bias"])
    return head


def ours(head: nn.Linear):
    found = linear_head(head)
    assert found is not None
    return found


def gaussians(problem: dict[str, torch.Tensor]):
    return fit_gaussians(problem["train"].numpy(), problem["labels"].numpy())


def test_scores_of_logits(other: ModuleType, problem: dict[str, torch.Tensor]) -> None:
    z = problem["logits"]
    theirs = other.MaxLogit.score(z)
    np.testing.assert_allclose(max_logit(z.numpy()), -theirs.numpy(), rtol=1e-6)
    np.testing.assert_allclose(energy(z.numpy()), -other.EnergyBased.score(z).numpy(), rtol=1e-5)
    cold = -other.EnergyBased.score(z, t=3.0).numpy()
    np.testing.assert_allclose(energy(z.numpy(), 3.0), cold, rtol=1e-5)
    probability = -other.MaxSoftmax.score(z).numpy()
    np.testing.assert_allclose(1 / (1 + np.exp(-msp(z.numpy()))), probability, rtol=1e-5)
    warm = -other.MaxSoftmax.score(z, t=2.5).numpy()
    odds = temperature(z.numpy(), 2.5)
    np.testing.assert_allclose(1 / (1 + np.exp(-odds)), warm, rtol=1e-5)


@pytest.mark.parametrize("kept", [2, 4, K])
def test_gen(other: ModuleType, problem: dict[str, torch.Tensor], kept: int) -> None:
    z = problem["logits"] / 2  # theirs clips probabilities at 1e-7
    theirs = -kept * other.GEN.score(z, gamma=0.1, M=kept).numpy()
    np.testing.assert_allclose(gen(z.numpy(), 0.1, kept), theirs, rtol=1e-5)


def test_the_fitted_temperature_is_no_worse(other: ModuleType) -> None:
    labels = torch.arange(2000) % K
    made = torch.Generator().manual_seed(0)
    z = 3 * nn.functional.one_hot(labels, K) + 3 * torch.randn(2000, K, generator=made)
    detector = other.TemperatureScaling(None).fit_logits(z, labels)

    def loss(t: float) -> float:
        return float(nn.functional.cross_entropy(z.double() / t, labels))

    found = fit_temperature(z.numpy(), labels.numpy())
    assert loss(found) <= loss(float(detector.t.detach())) + 1e-9
    assert all(loss(found) < loss(found * factor) for factor in (0.99, 1.01))


def test_react(other: ModuleType, problem: dict[str, torch.Tensor], head: nn.Linear) -> None:
    detector = other.ReAct(None, head).fit_feature_maps(problem["train"], problem["labels"])
    clip = percentile(problem["train"].numpy(), 0.9)
    assert clip == pytest.approx(detector.threshold, rel=1e-6)
    theirs = -detector.predict_feature_maps(problem["test"]).numpy()
    np.testing.assert_allclose(react(problem["test"].numpy(), ours(head), clip), theirs, rtol=1e-5)


@pytest.mark.parametrize("share", [0.65, 0.85, 0.90])
def test_ash_and_scale(
    other: ModuleType, problem: dict[str, torch.Tensor], head: nn.Linear, share: float
) -> None:
    maps = problem["test"][:, :, None, None]

    def flat_head(maps: torch.Tensor) -> torch.Tensor:
        return head(maps.flatten(1))

    f = problem["test"].numpy()
    for detector, score in (
        (other.ASH(None, flat_head, "ash-s", share), ash_s),
        (other.SCALE(None, flat_head, share), scale),
    ):
        theirs = -detector.predict_feature_maps(maps).numpy()
        np.testing.assert_allclose(score(f, ours(head), share), theirs, rtol=2e-5)


def test_dice(other: ModuleType, problem: dict[str, torch.Tensor], head: nn.Linear) -> None:
    detector = other.DICE(None, head.weight, head.bias, 0.9)
    detector.fit_features(problem["train"], problem["labels"])
    theirs = -detector.predict_features(problem["test"]).numpy()
    mean = gaussians(problem)[0].mean
    np.testing.assert_allclose(dice(problem["test"].numpy(), ours(head), mean), theirs, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 50])
def test_knn(other: ModuleType, problem: dict[str, torch.Tensor], k: int) -> None:
    detector = other.KNN(None, k=k).fit_features(problem["train"], problem["labels"])
    theirs = -detector.predict_features(problem["test"]).numpy()
    bank = fit_bank(problem["train"].numpy(), np.arange(2000))
    np.testing.assert_allclose(knn(problem["test"].numpy(), bank, k), theirs, atol=1e-6)


def test_mahalanobis_and_rmds(other: ModuleType, problem: dict[str, torch.Tensor]) -> None:
    """Theirs does not divide the scatter by the number of images, and halves the distance."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        _compare_distances(other, problem)
    finally:
        torch.set_default_dtype(dtype)


def _compare_distances(other: ModuleType, problem: dict[str, torch.Tensor]) -> None:
    train, test = problem["train"].double(), problem["test"].double()
    fit = gaussians(problem)[0]
    detector = other.Mahalanobis(None).fit_features(train, problem["labels"])
    theirs = -2 * len(train) * detector.predict_features(test).numpy()
    np.testing.assert_allclose(mahalanobis(test.numpy(), fit), theirs, rtol=1e-4)
    relative = other.RMD(None).fit_features(train, problem["labels"])
    theirs = -len(train) * relative.predict_features(test).numpy()
    np.testing.assert_allclose(rmds(test.numpy(), fit), theirs, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("principal", [16, 32])
def test_vim(
    other: ModuleType,
    problem: dict[str, torch.Tensor],
    head: nn.Linear,
    principal: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("backmix.train.scores.fit.PRINCIPAL", principal)
    detector = other.ViM(None, principal, head.weight, head.bias)
    detector.fit_features(problem["train"], problem["labels"])
    theirs = -detector.predict_features(problem["test"]).numpy()
    fit, covariance = gaussians(problem)
    train = problem["train"]
    logits = head(train).detach().numpy()
    residual = fit_residual(train.numpy(), logits, ours(head), fit.mean, covariance)
    assert residual.basis.shape == (C, C - principal)
    assert residual.alpha == pytest.approx(detector.alpha, rel=1e-4)
    found = vim(problem["test"].numpy(), ours(head), residual)
    np.testing.assert_allclose(found, theirs, atol=1e-3)  # theirs is fp32


def test_fdbd_and_nci(other: ModuleType, problem: dict[str, torch.Tensor], head: nn.Linear) -> None:
    mean = gaussians(problem)[0].mean
    f = problem["test"]
    boundary = other.fDBD(None, head).fit_features(problem["train"])
    theirs = -(K - 1) * boundary.predict_features(f).detach().numpy()
    np.testing.assert_allclose(fdbd(f.numpy(), ours(head), mean), theirs, rtol=1e-4)
    for alpha in (0.0, 1e-2):
        collapse = other.NCI(None, head, alpha=alpha).fit_features(problem["train"])
        theirs = -collapse.predict_features(f).detach().numpy()
        found = nci(f.numpy(), ours(head), mean, alpha)
        np.testing.assert_allclose(found, theirs, rtol=1e-4, atol=1e-5)


def test_odin(other: ModuleType) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, K))
    network = network.double()  # in fp32 a probability near 1/6 has three digits left
    views = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    std = (50.0, 60.0, 70.0)
    detector = other.ODIN(network, eps=0.0014, temperature=1000.0, norm_std=[s / 255 for s in std])
    theirs = -detector.predict(views).numpy()
    found = odin(network, views, std).numpy()
    np.testing.assert_allclose(1 / (1 + np.exp(-found)), theirs, rtol=1e-12)
    assert not np.allclose(found, odin(network, views, std, step=0.0).numpy(), rtol=1e-9)
