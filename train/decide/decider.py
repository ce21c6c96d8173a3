"""What decides about images, whatever it was opened from: views in, decisions out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backmix.train.decide.deployed import DeployedScorer, open_exported
from backmix.train.decide.exported_file import ONNX, PT2
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.record import Preprocessing, Record, read_record
from backmix.train.decide.scorer import Said, preprocessing_of, run_scorer
from backmix.train.digests import file_digest, weights_digest
from backmix.train.passes import seen_at
from backmix.train.scores.every import NEED_FIT
from backmix.train.scores.fit_file import FIT
from backmix.train.trained import read_run


class SaysOfViews(Protocol):
    """A network with its score: a run's, or one of an exported file."""

    @property
    def device(self) -> torch.device:
        """Where the views must lie."""
        ...

    def __call__(self, views: Tensor) -> Said:
        """Return what is said of views, uint8 [n, S, S, 3]."""
        ...


@dataclass(frozen=True, eq=False)
class Decisions:
    """What is decided about n images."""

    predicted: NDArray[np.int64]
    """int64 [n]: position of the class in the record's list."""
    probability: NDArray[np.float64]
    """float64 [n]"""
    score: NDArray[np.float64]
    """float64 [n]; NaN where the network's outputs are not finite: never accepted."""
    threshold: NDArray[np.float64]
    """float64 [n]: of the predicted class."""
    p_value: NDArray[np.float64]
    """float64 [n]: small = unlike the known images; NaN where the score is."""
    accepted: NDArray[np.bool_]
    """bool [n]"""


@dataclass(frozen=True, eq=False)
class Decider:
    """A record, and the network that it was made for."""

    record: Record
    scorer: SaysOfViews

    def decide(self, views: Tensor) -> Decisions:
        """Return what is decided about views, uint8 [n, S, S, 3] on the scorer's device."""
        said = self.scorer(views)
        accepted, p = self.record.rule.decide(said.predicted, said.score)
        thresholds = self.record.rule.thresholds[said.predicted]
        return Decisions(said.predicted, said.probability, said.score, thresholds, p, accepted)


def open_decider(path: Path, options: PredictOptions) -> Decider:
    """Open a run folder, one of its threshold files, or an exported file.

    Raises:
        ValueError: there is no threshold, it is of another network or preprocessing than the run's,
            a .pt2 file is not trusted, or what else is wrong, and what to do.
        OSError: what cannot be read.
    """
    if path.suffix in (ONNX, PT2) and not path.is_dir():
        document, program = open_exported(path, device=options.device, trust=options.trust)
        return Decider(document.record, DeployedScorer(program))
    return _of_run(path, options)


def _of_run(path: Path, options: PredictOptions) -> Decider:
    run = path.parent if path.is_file() else path
    trained = read_run(run)
    record = read_record(path)
    if record.weights != weights_digest(run):
        raise ValueError(
            f"the threshold in {path} was chosen for other weights than those in {run}: calibrate "
            "again (backmix calibrate)"
        )
    fit = fit_file(run, record)
    seen = preprocessing_of(seen_at(trained, record.preprocessing.size))
    if record.classes != trained.classes or seen != record.preprocessing:
        raise ValueError(
            f"the threshold in {path} was chosen for other classes or another preprocessing than "
            f"config.json of {run} says ({_differences(record, seen)}): calibrate again"
        )
    scorer = run_scorer(
        run,
        record.score,
        fit=fit,
        size=record.preprocessing.size,
        precision=record.precision,
        device=options.device,
        model=options.model,
    )
    return Decider(record, scorer)


def fit_file(run: Path, record: Record) -> Path | None:
    """Return the file of what a record's score was fitted to; None where the score needs none.

    Raises:
        ValueError: it is not there, or not the one that the threshold was chosen with.
    """
    if record.score not in NEED_FIT:
        return None
    path = run / FIT
    if not path.is_file() or file_digest(path) != record.fit:
        raise ValueError(
            f"{path} is not what the score {record.score} was fitted to when the threshold of "
            f"{run} was chosen: calibrate again"
        )
    return path


def _differences(record: Record, seen: Preprocessing) -> str:
    """Say in what the run's preprocessing differs from the record's."""
    found = [
        f"{name} was {getattr(record.preprocessing, name)}, is {getattr(seen, name)}"
        for name in ("size", "crop", "eval_crop", "mean", "std")
        if getattr(record.preprocessing, name) != getattr(seen, name)
    ]
    return "; ".join(found) or "the class list differs"
