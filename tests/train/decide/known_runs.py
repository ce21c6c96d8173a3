"""Runs to calibrate, made by hand: a training file, held-out files, networks of random weights."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import ArrayLike

from backmix.pipeline.beton import RAW, open_beton
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.writer import Record, Writer
from backmix.train.decide.calibrate import calibrate
from backmix.train.decide.options import CalibrateOptions
from backmix.train.methods.build import build_network
from backmix.train.models.build import Model
from backmix.train.options import Augment, Method, Run, Softmax
from backmix.train.run_folder import as_document

SIDE = 16
MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
CLASSES = ["d", "c", "b", "a"]
KNOWN = ("c", "a")
"""Of the runs, in their label order."""


def pictures(count: int, seed: int) -> np.ndarray:
    """Return images uint8 [n, 16, 16, 3] of more or less contrast; number % 4 is their class."""
    random = np.random.default_rng(seed)
    span = random.integers(2, 180, (count, 1, 1, 1))
    pixels = (random.integers(0, 256, (count, SIDE, SIDE, 3)) % span).astype(np.uint8)
    pixels += (20 * (np.arange(count) % 4)).astype(np.uint8)[:, None, None, None]
    return pixels


def write_beton(
    path: Path,
    pixels: np.ndarray,
    labels: ArrayLike | None = None,
    classes: Sequence[str] = CLASSES,
    options: dict[str, Any] | None = None,
) -> Path:
    """Write raw images; without labels those of `pictures`."""
    of = np.arange(len(pixels)) % len(classes) if labels is None else np.asarray(labels)
    side = pixels.shape[1]
    with Writer(
        path, samples=len(pixels), page_size=1 << 21, classes=list(classes), options=options or {}
    ) as writer:
        for number, (image, label) in enumerate(zip(pixels, of.tolist(), strict=True)):
            name = f"{classes[label]}/{number}.png"
            writer.append(Record(image.tobytes(), RAW, side, side, label, 0, name))
    return path


def write_run(
    out: Path, train: Path, method: Method | None = None, val: float = 0.0, **changes: Any
) -> Model:
    """Make a finished run on the classes `KNOWN`; return its network."""
    out.mkdir(parents=True)
    run = Run(
        data=(train,),
        out=out,
        model="classifier32-quarter",
        method=method or Softmax(),
        val=val,
        seed=5,
        loader=LoaderOptions(size=SIDE),
        augment=Augment(mean=MEAN, std=STD),
    )
    run = replace(run, **changes)
    with open_beton(train) as data:
        digest, known = data.digest, [data.classes.index(name) for name in KNOWN]
    config = {
        "run": as_document(run),
        "recipe": "by hand",
        "commit": "0123456789ab",
        "resolved": {},
        "classes": list(KNOWN),
        "known": known,
        "data": {"files": [str(train)], "digest": digest, "samples": 1},
    }
    (out / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = build_network(run, len(KNOWN))
    with torch.no_grad():
        for module in (model.head, model.rejection):  # fresh ones say nearly the same of all images
            for parameter in module.parameters() if isinstance(module, torch.nn.Linear) else ():
                parameter.copy_(torch.randn_like(parameter) * 100)
    safetensors.torch.save_file(model.state_dict(), out / "model.safetensors")
    return model.eval()


def calibrated(run: Path, **options: Any) -> str:
    """Calibrate a run on one thread of the CPU; return what it says."""
    asked = CalibrateOptions(**{"batch": 32, "threads": 1, "device": "cpu", **options})
    return calibrate(run, asked, ["backmix", "calibrate", str(run)])
