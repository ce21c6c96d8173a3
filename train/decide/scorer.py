"""Views in, class and score out: what `evaluate` stores of an image, for one batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backmix.pipeline.loader import LARGEST_VIEW
from backmix.train.decide.record import Preprocessing
from backmix.train.methods.views import normalised
from backmix.train.models.build import Model
from backmix.train.models.heads import Head
from backmix.train.options import Arpl, Augment, Cssr, Ssod, host_of
from backmix.train.passes import device_of, say_of, see, seen_at, try_size
from backmix.train.scores import CUES, Fit, score_of
from backmix.train.scores.cssr import CssrFit
from backmix.train.scores.every import NEED_FIT, names_of_scores
from backmix.train.scores.fit_file import read_fit
from backmix.train.scores.logits import log_sum_exp
from backmix.train.trained import Trained, load_model, read_run


@dataclass(frozen=True, eq=False)
class Said:
    """What is said of n images."""

    predicted: NDArray[np.int64]
    """int64 [n]: position of the class in the run's list."""
    probability: NDArray[np.float64]
    """float64 [n]: softmax of the predicted class, of CSSR its p; NaN where the score is."""
    score: NDArray[np.float64]
    """float64 [n], larger = more known; NaN where the network's outputs are not finite."""


@dataclass(frozen=True, eq=False)
class Scorer:
    """A network and one of its scores."""

    model: Model
    """In evaluation mode, on the device."""
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    score: str
    precision: str
    """fp32 or bf16."""
    device: torch.device
    fit: Fit | None = None
    """What the score was fitted to; None where it needs nothing."""
    cssr: CssrFit | None = None

    @torch.inference_mode()
    def __call__(self, views: Tensor) -> Said:
        """Return what is said of views, uint8 [n, S, S, 3] on the device, n >= 1.

        The numbers of an evaluation: of the same batch the same logits, bit for bit, and of other
        batches, in which the device may add in another order, to about 1e-6 of them.
        """
        seen = self.preprocessing
        rows = torch.arange(len(views), device=views.device)
        images = normalised(views, rows, Augment(mean=seen.mean, std=seen.std))
        side = see(self.model, images, self.precision)
        logits, features, extras = say_of(self.model, side, self.cssr)
        return said_of(
            self.score,
            logits.cpu().numpy(),
            features.cpu().numpy(),
            {name: extra.cpu().numpy() for name, extra in extras.items()},
            self.model.head,
            self.fit,
        )


def run_scorer(
    run: Path,
    score: str,
    *,
    fit: Path | None = None,
    size: int = 0,
    precision: str = "fp32",
    device: str = "auto",
    model: str = "",
) -> Scorer:
    """Return the scorer of a finished run.

    Args:
        run: run folder.
        score: one of those that can decide about images (`refuse_score`).
        fit: file of `write_fit`, for a score that needs one (`NEED_FIT`).
        size: side of the views [pixels]; 0 = the run's.
        precision: fp32 or bf16.
        device: auto, cpu or cuda.
        model: of a run of --model MODULE:CALLABLE the same once more.

    Raises:
        ValueError: what is wrong with the run or the options, and what to do.
    """
    trained = read_run(run)
    chosen = device_of(device)
    network = load_model(run, model).to(chosen)
    refuse_score(score, network)
    if size and size != trained.loader.size:
        refuse_size(network, size, chosen)
    learned = None, None
    if score in NEED_FIT:
        if fit is None:
            raise ValueError(f"the score {score} needs what it was fitted to: calibrate again")
        learned = read_fit(fit, network)
    return Scorer(
        network,
        trained.classes,
        preprocessing_of(seen_at(trained, size)),
        score,
        precision,
        chosen,
        *learned,
    )


def refuse_size(model: Model, size: int, device: torch.device) -> None:
    """Refuse a side of views that is out of range, or that the network cannot be shown."""
    if not 1 <= size <= LARGEST_VIEW:
        raise ValueError(f"--size must be 1 to {LARGEST_VIEW} pixels, got {size}")
    try_size(model, size, device)


def preprocessing_of(trained: Trained) -> Preprocessing:
    """Return how a run's evaluation shows an image to the network."""
    seen, augment = trained.loader, trained.augment
    return Preprocessing(seen.size, seen.crop, seen.eval_crop, augment.mean, augment.std)


def own_score(trained: Trained) -> str:
    """Return the score that decides where none is named: the method's own, else the largest logit.

    Of a method with several the one that needs no fit: SSOD's rejection logit, ARPL's distance,
    S0 of CSSR.
    """
    match host_of(trained.options.method):
        case Ssod():
            return "ssod"
        case Arpl():
            return "arpl"
        case Cssr():
            return "cssr_s0"
        case _:
            return "max_logit"


def refuse_score(score: str, model: Model) -> None:
    """Refuse a score that the network does not have, or that cannot decide about new images.

    Raises:
        ValueError: saying why, and which ones can.
    """
    there = names_of_scores(model.head, model.rejection is not None)
    if score in there:
        return
    if score == "odin":
        why = "it takes a backward pass of every image, which neither predict nor an export makes"
    elif score in CUES:
        why = "it is a control without a direction: neither large nor small means known"
    else:
        why = "there is no such score of this network"
    raise ValueError(f"--score {score}: {why}; there are {', '.join(there)}")


def said_of(
    score: str,
    logits: NDArray[np.float32],
    features: NDArray[np.float32],
    extras: Mapping[str, np.ndarray],
    head: Head | None = None,
    fit: Fit | None = None,
) -> Said:
    """Return class, probability and score of what a network said of n images.

    Args:
        score: its name.
        logits: [n, K].
        features: pooled, [n, C].
        extras: what else was said, [n] each.
        head: the network's class head.
        fit: what the score was fitted to.
    """
    parts = [logits, features, *(extra[:, None] for extra in extras.values())]
    good = np.asarray(np.isfinite(np.concatenate(parts, 1)).all(1))
    probability, scores = np.full(len(logits), np.nan), np.full(len(logits), np.nan)
    if not good.all():  # one image's NaN must not cost the others their scores
        logits, features = logits[good], features[good]
        extras = {name: extra[good] for name, extra in extras.items()}
    predicted = np.zeros(len(good), np.int64)
    if len(logits):
        predicted[good] = logits.argmax(1)
        z = logits.astype(np.float64)
        probability[good] = np.exp(z.max(1) - log_sum_exp(z))
        scores[good] = score_of(score, logits, features, extras, head, fit)
    return Said(predicted, probability, scores)
