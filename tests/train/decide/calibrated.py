"""A run folder with a threshold, made by hand: random weights, a rule of random images' scores."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch

from backmix.pipeline.beton import RAW
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.writer import Record as Sample
from backmix.pipeline.writer import Writer
from backmix.train.decide.record import THRESHOLD, Record, write_record
from backmix.train.decide.rule import global_rule
from backmix.train.decide.scorer import run_scorer
from backmix.train.digests import weights_digest
from backmix.train.models.build import build
from backmix.train.options import Augment, Run
from backmix.train.run_folder import as_document

CLASSES = ("cat", "dog", "owl")
SIDE = 16
RATE = "0.3"


def pictures(count: int, seed: int = 0, side: int = SIDE) -> np.ndarray:
    """Return random images, uint8 [n, side, side, 3], of more or less contrast."""
    random = np.random.default_rng(seed)
    span = random.integers(2, 256, (count, 1, 1, 1))
    return (random.integers(0, 256, (count, side, side, 3)) % span).astype(np.uint8)


def write_beton(path: Path, images: np.ndarray, names: list[str] | None = None) -> Path:
    """Write images as raw samples of the first class, and so on in turn."""
    side = images.shape[1]
    with Writer(
        path, samples=len(images), page_size=1 << 21, classes=list(CLASSES), options={}
    ) as writer:
        for i, image in enumerate(images):
            name = names[i] if names else f"{i}.png"
            writer.append(Sample(image.tobytes(), RAW, side, side, i % len(CLASSES), 0, name))
    return path


def write_run(run: Path, crop: Literal["whole", "random"] = "whole", seed: int = 0) -> Path:
    """Make a run folder with a network of random weights."""
    run.mkdir(parents=True)
    options = Run(
        data=(Path("train.beton"),),
        out=run,
        model="classifier32-quarter",
        loader=LoaderOptions(size=SIDE, crop=crop),
        augment=Augment(mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0)),
    )
    config = {
        "run": as_document(options),
        "resolved": {},
        "classes": list(CLASSES),
        "known": list(range(len(CLASSES))),
        "data": {"files": ["train.beton"], "digest": "0", "samples": 1},
    }
    (run / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = build("classifier32-quarter", len(CLASSES), SIDE)
    with torch.no_grad():  # else all scores are nearly the same
        next(iter(model.head.parameters())).mul_(10_000)
    safetensors.torch.save_file(model.state_dict(), run / "model.safetensors")
    return run


def calibrated(run: Path, crop: Literal["whole", "random"] = "whole", seed: int = 0) -> Path:
    """Make a run folder with a threshold that rejects three of ten such pictures."""
    write_run(run, crop, seed)
    scorer = run_scorer(run, "max_logit", device="cpu")
    scores = scorer(torch.from_numpy(pictures(99, seed=77))).score
    record = Record(
        score="max_logit",
        parameters={},
        rate=RATE,
        confidence=None,
        rule=global_rule(scores, len(CLASSES), Fraction(RATE)),
        classes=CLASSES,
        preprocessing=scorer.preprocessing,
        precision="fp32",
        weights=weights_digest(run),
        fit="",
        data={"images": 99},
        facts={},
    )
    write_record(run / THRESHOLD, record)
    return run
