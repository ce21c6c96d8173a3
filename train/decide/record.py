"""threshold.json: what a run's images are decided by, and where that comes from.

A run folder has one; an exported file carries the same document. What is in it is trusted no more
than any other file: everything is checked when it is read, and a checksum finds what was changed
by hand or by a damaged disk.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from backmix.train.checkpoint import write_atomically
from backmix.train.decide.conformal import exact_rate
from backmix.train.decide.rule import Rule, rule_document, rule_of

THRESHOLD = "threshold.json"
"""Its name in a run folder."""
SCHEMA = 1
_LARGEST = 1 << 28
"""Bytes of the largest document that is read: 10,000 classes with tables of their own."""


@dataclass(frozen=True)
class Preprocessing:
    """What makes of a decoded image, uint8 [h, w, 3] RGB, what the network sees.

    The view is the whole image (crop "whole") or its centre square of `eval_crop` times the shorter
    side, resampled to `size` x `size`; then (pixel - mean) / std by channel, fp32.
    """

    size: int
    """Side of the view [pixels]."""
    crop: str
    """whole or random, as --loader.crop: whole image or centre crop."""
    eval_crop: float
    """Side of the centre crop as a share of the shorter side."""
    mean: tuple[float, float, float]
    """In 0 .. 255."""
    std: tuple[float, float, float]
    """In 0 .. 255."""


@dataclass(frozen=True, eq=False)
class Record:
    """What images are decided by."""

    score: str
    """Its name in metrics.json; larger = more known."""
    parameters: Mapping[str, Any]
    """What the score depends on, for people."""
    rate: str
    """Share of known images that may be rejected, as it was asked for."""
    confidence: float | None
    """That this very threshold keeps the rate; None = on the average over calibration sets."""
    rule: Rule
    classes: tuple[str, ...]
    """Names in label order."""
    preprocessing: Preprocessing
    precision: str
    """fp32 or bf16."""
    weights: str
    """`weights_digest` of the run."""
    fit: str
    """`file_digest` of its fit.safetensors; empty where the score needs none."""
    data: Mapping[str, Any]
    """The calibration images: which, how many, how they compare with the training images."""
    facts: Mapping[str, Any]
    """Run, versions, commit, date and command."""


def record_document(record: Record) -> dict[str, Any]:
    """Return a record as plain JSON values.

    `threshold` is for people and other programs: the score from which on an image is accepted, or
    by class name where it differs. `digest` is the checksum of all other values.
    """
    thresholds = record.rule.thresholds.tolist()
    same, seen = len(set(thresholds)) == 1, record.preprocessing
    document = {
        "schema": SCHEMA,
        "score": record.score,
        "direction": "larger = more known; accepted where the score is at least the threshold",
        "parameters": dict(record.parameters),
        "threshold": thresholds[0] if same else dict(zip(record.classes, thresholds, strict=True)),
        "rate": record.rate,
        "confidence": None if record.confidence is None else float(record.confidence),
        "classes": list(record.classes),
        "preprocessing": {
            "size": seen.size,
            "crop": seen.crop,
            # 255 and 255.0 are equal, but not their texts, of which the digest is made.
            "eval_crop": float(seen.eval_crop),
            "mean": [float(value) for value in seen.mean],
            "std": [float(value) for value in seen.std],
        },
        "precision": record.precision,
        "weights": record.weights,
        "fit": record.fit,
        "data": dict(record.data),
        "facts": dict(record.facts),
        "rule": rule_document(record.rule),
    }
    document = json.loads(json.dumps(document, allow_nan=False))  # tuples become lists
    return document | {"digest": _digest(document)}


def record_of(document: Any, where: str) -> Record:
    """Return the record of a document of `record_document`.

    Args:
        document: of a file, so anything.
        where: the file, for messages.

    Raises:
        ValueError: it is no record, of another version, or changed since it was written.
    """
    if not isinstance(document, dict) or "schema" not in document or "rule" not in document:
        raise ValueError(f"{where} is no record of backmix calibrate")
    if document["schema"] != SCHEMA:
        raise ValueError(
            f"{where} is of schema {document['schema']!r}, this version of backmix reads {SCHEMA}: "
            "calibrate again, or use the version that wrote it"
        )
    rest = {name: value for name, value in document.items() if name != "digest"}
    try:
        if document["digest"] != _digest(rest):
            raise ValueError("it was changed or damaged after it was written")
        record = _record(rest)
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where} is no record of backmix calibrate: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}; calibrate again") from error
    return record


def _record(document: Mapping[str, Any]) -> Record:
    given = document["preprocessing"]
    record = Record(
        score=str(document["score"]),
        parameters=dict(document["parameters"]),
        rate=str(document["rate"]),
        confidence=None if document["confidence"] is None else float(document["confidence"]),
        rule=rule_of(document["rule"]),
        classes=tuple(map(str, document["classes"])),
        preprocessing=Preprocessing(
            int(given["size"]),
            str(given["crop"]),
            float(given["eval_crop"]),
            _three(given["mean"]),
            _three(given["std"]),
        ),
        precision=str(document["precision"]),
        weights=str(document["weights"]),
        fit=str(document["fit"]),
        data=dict(document["data"]),
        facts=dict(document["facts"]),
    )
    exact_rate(record.rate)
    seen = record.preprocessing
    if len(record.classes) != len(record.rule.category):
        raise ValueError(
            f"it has {len(record.classes)} classes, its rule {len(record.rule.category)}"
        )
    usable = (
        seen.size >= 1
        and seen.crop in ("whole", "random")
        and 0 < seen.eval_crop <= 1
        and all(map(math.isfinite, (*seen.mean, *seen.std)))
        and min(seen.std) > 0
    )
    if not usable or record.precision not in ("fp32", "bf16"):
        raise ValueError("its preprocessing or precision is none that there is")
    return record


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = values  # ValueError for another number of them
    return float(red), float(green), float(blue)


def write_record(path: Path, record: Record) -> None:
    """Write a record, whole or not at all.

    Raises:
        OSError: naming the file.
    """
    rows = [
        f" {json.dumps(name)}: {json.dumps(value)}"
        for name, value in record_document(record).items()
    ]
    write_atomically(path, ("{\n" + ",\n".join(rows) + "\n}\n").encode())


def read_record(path: Path) -> Record:
    """Return the record of a run folder, or of its file.

    Raises:
        ValueError: there is none, and what to do; or it is damaged, or of another version.
        OSError: it cannot be read.
    """
    file = path / THRESHOLD if path.is_dir() else path
    if not file.is_file():
        what = "has no threshold" if path.is_dir() else "is no file"
        raise ValueError(f"{path} {what}: backmix calibrate RUN chooses one")
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"{file} has more than {_LARGEST:,} bytes: no record of backmix calibrate")
    try:
        document = json.loads(file.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no {THRESHOLD}: name that file, or its run folder") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}; calibrate again") from error
    return record_of(document, str(file))


def record_digest(record: Record) -> str:
    """Return what identifies a record."""
    return record_document(record)["digest"]


def _digest(document: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())
