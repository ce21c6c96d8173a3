"""Scores of stored outputs: how known an image looks, larger = more known, always.

Pure functions of one pass's logits and pooled features, float64 [n]. Some need what `fit_scores`
learns from the run's own training images. `every_score` returns all that apply to a network.
"""

from backmix.train.scores.cssr import cssr
from backmix.train.scores.cues import CUES, image_cues
from backmix.train.scores.every import every_score, linear_head, score_of
from backmix.train.scores.features import feature_norm, knn, mahalanobis, rmds
from backmix.train.scores.fit import Fit, fit_scores
from backmix.train.scores.heads import arpl, arpl_dot, ssod, ssod_joint
from backmix.train.scores.linear import LinearHead, ash_s, dice, fdbd, nci, react, scale, vim
from backmix.train.scores.logits import energy, gen, max_logit, msp, temperature
from backmix.train.scores.odin import odin

SCORES = (msp, max_logit, energy, gen)
"""The scores that need nothing but logits; a score's name is its function's name."""

__all__ = [
    "CUES",
    "SCORES",
    "Fit",
    "LinearHead",
    "arpl",
    "arpl_dot",
    "ash_s",
    "cssr",
    "dice",
    "energy",
    "every_score",
    "fdbd",
    "feature_norm",
    "fit_scores",
    "gen",
    "image_cues",
    "knn",
    "linear_head",
    "mahalanobis",
    "max_logit",
    "msp",
    "nci",
    "odin",
    "react",
    "rmds",
    "scale",
    "score_of",
    "ssod",
    "ssod_joint",
    "temperature",
    "vim",
]
