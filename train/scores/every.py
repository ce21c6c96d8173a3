"""All scores that apply to a network, by name: a score's name is its function's name."""

from collections.abc import Mapping

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
    z, f, extras = outputs.logits, outputs.features, outputs.extras
    scores = {"msp": msp(z)}
    if fit is not None:
        scores["temperature"] = temperature(z, fit.temperature)
    if not isinstance(head, Reconstruction):
        # The logits of CSSR are log p: their largest ranks as msp does, and their energy is 0.
        scores["max_logit"] = max_logit(z)
        scores["energy"] = energy(z)
    scores["gen"] = gen(z)
    if "odin" in extras:
        scores["odin"] = _plain("odin", extras)
    if isinstance(head, nn.Linear):
        scores |= _of_linear(f, head, fit)
    if fit is not None:
        scores["knn"] = knn(f, fit.bank, fit.k)
        scores["mahalanobis"] = mahalanobis(f, fit.gaussians)
        scores["rmds"] = rmds(f, fit.gaussians)
    if "rejection" in extras:
        scores["ssod"] = ssod(extras["rejection"])
        scores["ssod_joint"] = ssod_joint(z, extras["rejection"])
    if isinstance(head, ReciprocalPoints):
        scores["arpl"] = arpl(z)
        scores["arpl_dot"] = arpl_dot(z, f)
    if "cssr_s0" in extras:
        scores["cssr_s0"] = _plain("cssr_s0", extras)
    if fit is not None and fit.cssr is not None:
        scores["cssr"] = cssr(extras, fit.cssr)
    scores["feature_norm"] = feature_norm(f)
    return scores | {name: _plain(name, extras) for name in CUES if name in extras}


def _of_linear(features: np.ndarray, module: nn.Linear, fit: Fit | None) -> dict[str, Floats]:
    """Return the scores that compute the logits of a linear head anew."""
    head = linear_head(module)
    assert head is not None
    scores = {"ash_s": ash_s(features, head), "scale": scale(features, head)}
    if fit is not None and fit.linear is not None:
        mean = fit.gaussians.mean
        scores["react"] = react(features, head, fit.linear.clip)
        scores["dice"] = dice(features, head, mean)
        scores["vim"] = vim(features, head, fit.linear.residual)
        scores["fdbd"] = fdbd(features, head, mean)
        scores["nci"] = nci(features, head, mean)
    return scores


def _plain(name: str, extras: Mapping[str, np.ndarray]) -> Floats:
    """Return a stored figure as a score."""
    return by_rows(lambda values: values, {f"{name} figures": extras[name]})
