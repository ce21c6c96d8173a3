"""All scores that apply to a network, by name: a score's name is its function's name."""

from collections.abc import Callable, Mapping

import numpy as np
from torch import nn

from backmix.train.models.heads import Head, ReciprocalPoints, Reconstruction
from backmix.train.outputs import Outputs
from backmix.train.scores.cssr import cssr
from backmix.train.scores.cues import CUES
from backmix.train.scores.features import feature_norm, knn, mahalanobis, rmds
from backmix.train.scores.fit import Fit
from backmix.train.scores.heads import arpl, arpl_dot, ssod, ssod_joint
from backmix.train.scores.linear import (
    LinearHead,
    ash_s,
    dice,
    fdbd,
    nci,
    react,
    scale,
    vim,
)
from backmix.train.scores.logits import energy, gen, max_logit, msp, temperature
from backmix.train.scores.rows import Floats, by_rows

Formulas = dict[str, Callable[[], Floats]]
"""How each score is computed, by its name."""
NEED_FIT = frozenset(
    {
        *("temperature", "knn", "mahalanobis", "rmds"),
        *("react", "dice", "vim", "fdbd", "nci", "cssr"),
    }
)
"""Scores that are computed from what `fit_scores` learned."""


def linear_head(head: nn.Module) -> LinearHead | None:
    """Return weight and bias of a linear head in float64; None of another one."""
    if not isinstance(head, nn.Linear):
        return None
    weight = head.weight.detach().double().cpu().numpy()
    bias = np.zeros(len(weight)) if head.bias is None else head.bias.detach().double().cpu().numpy()
    return LinearHead(weight, bias)


def every_score(
    outputs: Outputs, head: Head | None = None, fit: Fit | None = None
) -> dict[str, Floats]:
    """Return every score that there is for a set, float64 [n] by name; larger = more known.

    Which ones depends on head, fit and extras, never on the images: one run's sets all have the
    same.

    Args:
        outputs: what the network said of the set.
        head: its class head; without it no score that needs its weights.
        fit: of `fit_scores`; without it no score that needs one.

    Raises:
        ValueError: outputs that are not finite, with the number of images.
    """
    formulas = _formulas(outputs.logits, outputs.features, outputs.extras, head, fit)
    return {name: compute() for name, compute in formulas.items()}


def score_of(
    name: str,
    logits: np.ndarray,
    features: np.ndarray,
    extras: Mapping[str, np.ndarray],
    head: Head | None = None,
    fit: Fit | None = None,
) -> Floats:
    """Return one of the scores of `every_score`, float64 [n]; nothing else is computed.

    Args:
        name: of the score.
        logits: float [n, K].
        features: pooled, float [n, C].
        extras: what else was said of the images, [n] each.
        head, fit: as in `every_score`.

    Raises:
        ValueError: outputs that are not finite, with the number of images.
        KeyError: there is no such score for this head, fit and extras.
    """
    return _formulas(logits, features, extras, head, fit)[name]()


def names_of_scores(head: nn.Module, rejection: bool) -> tuple[str, ...]:
    """Return the names of `every_score` for a network, those with a fit included, cues excluded.

    Args:
        head: its class head.
        rejection: whether it has a rejection head, too.
    """
    names = ["msp", "temperature"]
    if not isinstance(head, Reconstruction):
        names += ["max_logit", "energy"]
    names += ["gen"]
    if isinstance(head, nn.Linear):
        names += ["ash_s", "scale", "react", "dice", "vim", "fdbd", "nci"]
    names += ["knn", "mahalanobis", "rmds"]
    if rejection:
        names += ["ssod", "ssod_joint"]
    if isinstance(head, ReciprocalPoints):
        names += ["arpl", "arpl_dot"]
    if isinstance(head, Reconstruction):
        names += ["cssr_s0", "cssr"]
    return tuple(names)


def _formulas(
    z: np.ndarray,
    f: np.ndarray,
    extras: Mapping[str, np.ndarray],
    head: Head | None,
    fit: Fit | None,
) -> Formulas:
    scores: Formulas = {"msp": lambda: msp(z)}
    if fit is not None:
        scores["temperature"] = lambda: temperature(z, fit.temperature)
    if not isinstance(head, Reconstruction):
        # The logits of CSSR are log p: their largest ranks as msp does, and their energy is 0.
        scores["max_logit"] = lambda: max_logit(z)
        scores["energy"] = lambda: energy(z)
    scores["gen"] = lambda: gen(z)
    if "odin" in extras:
        scores["odin"] = lambda: _plain("odin", extras)
    if isinstance(head, nn.Linear):
        scores |= _of_linear(f, head, fit)
    if fit is not None:
        scores["knn"] = lambda: knn(f, fit.bank, fit.k)
        scores["mahalanobis"] = lambda: mahalanobis(f, fit.gaussians)
        scores["rmds"] = lambda: rmds(f, fit.gaussians)
    if "rejection" in extras:
        scores["ssod"] = lambda: ssod(extras["rejection"])
        scores["ssod_joint"] = lambda: ssod_joint(z, extras["rejection"])
    if isinstance(head, ReciprocalPoints):
        scores["arpl"] = lambda: arpl(z)
        scores["arpl_dot"] = lambda: arpl_dot(z, f)
    if "cssr_s0" in extras:
        scores["cssr_s0"] = lambda: _plain("cssr_s0", extras)
    if fit is not None and (standard := fit.cssr) is not None:
        scores["cssr"] = lambda: cssr(extras, standard)
    scores["feature_norm"] = lambda: feature_norm(f)
    for name in CUES:
        if name in extras:
            scores[name] = lambda name=name: _plain(name, extras)
    return scores


def _of_linear(features: np.ndarray, module: nn.Linear, fit: Fit | None) -> Formulas:
    """Return the scores that compute the logits of a linear head anew."""
    head = linear_head(module)
    assert head is not None
    scores: Formulas = {
        "ash_s": lambda: ash_s(features, head),
        "scale": lambda: scale(features, head),
    }
    if fit is not None and (linear := fit.linear) is not None:
        mean = fit.gaussians.mean
        scores["react"] = lambda: react(features, head, linear.clip)
        scores["dice"] = lambda: dice(features, head, mean)
        scores["vim"] = lambda: vim(features, head, linear.residual)
        scores["fdbd"] = lambda: fdbd(features, head, mean)
        scores["nci"] = lambda: nci(features, head, mean)
    return scores


def _plain(name: str, extras: Mapping[str, np.ndarray]) -> Floats:
    """Return a stored figure as a score."""
    return by_rows(lambda values: values, {f"{name} figures": extras[name]})
