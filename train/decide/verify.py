"""The self-test of exported files: images that a formula makes, and what is said of them.

The pixel of image i at row y, column x and channel c (red = 0) is, in whole numbers,

    (i x y + (3 + c) x + (7 - c) y + 61 i) mod 256,  i = 0 .. 3

smooth slopes in the first image, ever finer patterns in the others.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backmix.train.decide.decider import Decider
from backmix.train.decide.deployed import Program, open_exported
from backmix.train.decide.exported import OUTPUTS
from backmix.train.decide.exported_file import Document
from backmix.train.decide.rule import Rule

IMAGES = 4
FORMULA = "(i * x * y + (3 + c) * x + (7 - c) * y + 61 * i) % 256"
TOLERANCE = 1e-4
"""Of a score, as a share of its size or of the range of the calibration scores, whichever is
larger; of a probability, as it is. Rounding in fp32 alone moves the logits of a deep network by
6e-6 of their size; what is wrong with a program moves scores by far more than this."""


def formula_views(size: int) -> NDArray[np.uint8]:
    """Return the images of the self-test, uint8 [4, S, S, 3].

    >>> formula_views(32)[1, 2, 5].tolist()  # 10 + 15 + 14 + 61, 10 + 20 + 12 + 61, ...
    [100, 103, 106]
    """
    i, y, x, c = np.ogrid[:IMAGES, :size, :size, :3]
    return ((i * x * y + (3 + c) * x + (7 - c) * y + 61 * i) % 256).astype(np.uint8)


def self_test(decider: Decider) -> dict[str, Any]:
    """Return what is decided about the images of the self-test, as plain JSON values.

    Raises:
        ValueError: the network's outputs are not finite.
    """
    size = decider.record.preprocessing.size
    decided = decider.decide(torch.from_numpy(formula_views(size)))
    if not np.isfinite(decided.score).all():
        raise ValueError(
            "the network's outputs of the self-test's images are NaN or infinite: it cannot be "
            "exported"
        )
    figures = (
        decided.predicted,
        decided.probability,
        decided.score,
        decided.threshold,
        decided.p_value,
        decided.accepted,
    )
    return {
        "images": IMAGES,
        "size": size,
        "formula": f"image i, row y, column x, channel c: {FORMULA}",
        "tolerance": TOLERANCE,
        "range": score_range(decider.record.rule),
        "outputs": {name: values.tolist() for name, values in zip(OUTPUTS, figures, strict=True)},
    }


def score_range(rule: Rule) -> float:
    """Return the distance between the smallest and the largest calibration score.

    Of classes with offsets: scores less these.
    """
    tables = [category.table.values for category in rule.categories]
    return float(max(table[-1] for table in tables) - min(table[0] for table in tables))


def verify_export(path: Path, *, trust: bool = False) -> str:
    """Replay the self-test of an exported file, on the CPU; return what was found, for people.

    Raises:
        ValueError: the file is none, was changed, is not trusted, or does not say what it should.
        OSError: it cannot be read.
    """
    return verified(path, path, trust=trust)


def verified(path: Path, called: Path, *, trust: bool) -> str:
    """Verify a file that people know by another name; see `verify_export`."""
    document, program = open_exported(path, device="cpu", trust=trust)
    largest = replay(called, document, program)
    record = document.record
    wrote = ", ".join(f"{name} {value}" for name, value in document.provenance.items())
    thresholds = np.unique(record.rule.thresholds)
    chosen = f"{thresholds[0]:.6g}"
    if len(thresholds) > 1:
        chosen = f"{chosen} to {thresholds[-1]:.6g} by class"
    return "\n".join(
        [
            f"{called}: the self-test of {IMAGES} images is right under {program.runtime}; the "
            f"largest error of a score is {largest:.1e}, {TOLERANCE:.0e} are allowed",
            f"{record.score} of {len(record.classes)} classes, threshold {chosen}, at most "
            f"{record.rate} of the known images rejected",
            f"written by {wrote}",
        ]
    )


def replay(path: Path, document: Document, program: Program) -> float:
    """Compare a program with what its file says of it; return the scores' largest error.

    The images together, and each by itself: a program may hold for one size of batch alone.

    Args:
        path: what messages call the file.
        document, program: of `open_exported`.

    Raises:
        ValueError: what differs.
    """
    test, rule = document.self_test, document.record.rule
    size = document.record.preprocessing.size
    try:
        wanted = {name: np.array(test["outputs"][name]) for name in OUTPUTS}
        shapes = {values.shape for values in wanted.values()}
        if shapes != {(IMAGES,)} or test["size"] != size:
            raise ValueError(f"{path} has a self-test of other images than this version makes")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has no self-test: {error!r}") from error
    views = torch.from_numpy(formula_views(size)).to(program.device)
    scale = np.maximum(np.abs(wanted["score"]), score_range(rule))
    largest = 0.0
    for rows in (slice(0, IMAGES), *(slice(i, i + 1) for i in range(IMAGES))):
        try:
            found = program(views[rows])
        except Exception as error:  # of the runtime, or of what is in the file
            first = (str(error) or repr(error)).strip().splitlines()[0]
            raise ValueError(f"{path} does not run under {program.runtime}: {first}") from error
        some = {name: values[rows] for name, values in wanted.items()}
        errors = np.abs(found["score"] - some["score"]) / np.where(scale > 0, scale, 1.0)[rows]
        _refuse(path, "score", errors <= TOLERANCE, found, some, rows)
        apart = np.abs(found["probability"] - some["probability"])
        _refuse(path, "probability", apart <= TOLERANCE, found, some, rows)
        same = found["class_index"] == some["class_index"]
        _refuse(path, "class_index", same, found, some, rows)
        # The rest follows from class and score, to the last digit.
        accepted, p_values = rule.decide(found["class_index"], found["score"])
        thresholds = rule.thresholds[found["class_index"]]
        follows = {"threshold": thresholds, "p_value": p_values, "accept": accepted}
        for name, values in follows.items():
            _refuse(path, name, found[name] == values, found, follows, rows)
        largest = max(largest, float(errors.max()))
    return largest


def _refuse(
    path: Path,
    name: str,
    right: NDArray[np.bool_],
    found: Mapping[str, NDArray[Any]],
    wanted: Mapping[str, NDArray[Any]],
    rows: slice,
) -> None:
    """Raise ValueError where an output of an image is not right."""
    wrong = np.flatnonzero(~right)
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"{path} fails its self-test: {name} of image {rows.start + at} is "
            f"{found[name][at].item()}, and should be {wanted[name][at].item()}. Do not use it; "
            "export again, with the versions that will run it"
        )
