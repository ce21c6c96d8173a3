"""Predictions held against the record that they were made with: windows, drift, and since when.

The statistics are in `drift.py`; what they come to is said by `verdict.py`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from backmix.pipeline.beton import printable
from backmix.train.decide.conformal import Floats
from backmix.train.decide.drift import (
    Counts,
    Drift,
    Shares,
    Windows,
    cells_of,
    comparable,
    drift_of,
    rejection_windows,
    shares_of,
    window_ends,
    window_size,
)
from backmix.train.decide.options import MonitorOptions
from backmix.train.decide.predicted import Predictions
from backmix.train.decide.record import Record

MOST_WINDOWS = 4096
"""Windows that may be asked for."""
MOST_ALARMS = 50
"""Windows outside the limits that are listed."""
MOST_PICTURES = 1000
"""Rejected images that may be asked for."""


@dataclass(frozen=True, eq=False)
class Watched:
    """What some predictions say about a record, of m images that can be compared."""

    record: Record
    predictions: Predictions
    compared: Counts
    """int64 [m]: which of the predictions' scores are compared."""
    size: int
    """Images of a window."""
    level: float
    windows: Windows
    drift: Drift
    cells: Counts
    """int64 [m]"""
    p_values: Floats
    """float64: of all scores of the predictions, whether they are compared or not."""
    start: int | None
    """Image, of the m, with which the change begins; None = there is no change."""

    def place(self, image: int) -> str:
        """Say where an image is: its row and its file."""
        return self.predictions.place(int(self.predictions.rows[self.compared[image]]))

    @property
    def predicted(self) -> Counts:
        """Positions in the class list, int64 [m]."""
        return self.predictions.predicted[self.compared]

    def shares(self, first: int) -> Shares:
        """Return how images from `first` on fall into the cells."""
        return shares_of(self.record.rule, self.predicted[first:], self.cells[first:])

    def window(self, number: int) -> dict[str, Any]:
        """Return a window as plain values: its first and last row, counts and limits."""
        windows = self.windows
        columns = {
            "images": windows.sizes,
            "rejected": windows.rejected,
            "expected": windows.expected,
            "usual_low": windows.usual_low,
            "usual_high": windows.usual_high,
            "low": windows.low,
            "high": windows.high,
            "alarm": windows.alarms,
        }
        return {
            "from": printable(self.place(int(windows.starts[number]))),
            "to": printable(self.place(int(windows.ends[number]) - 1)),
            **{name: column[number].item() for name, column in columns.items()},
        }

    def alarms(self) -> list[dict[str, Any]]:
        """Return the first `MOST_ALARMS` windows outside the limits."""
        found = np.flatnonzero(self.windows.alarms)[:MOST_ALARMS]
        return [self.window(number) for number in found.tolist()]


def refuse(options: MonitorOptions) -> None:
    """Refuse options that cannot be, before anything is read.

    Raises:
        ValueError: what is wrong.
    """
    if not 0 < options.level < 1:
        raise ValueError(f"--level must lie between 0 and 1, got {options.level:g}")
    if options.window < 0:
        raise ValueError(f"--window must not be negative, got {options.window}")
    if not 0 <= options.pictures <= MOST_PICTURES:
        raise ValueError(
            f"--pictures must be 0 to {MOST_PICTURES:,}, which is more than a page usually has "
            f"room for; got {options.pictures:,}"
        )


def watch(record: Record, predictions: Predictions, options: MonitorOptions) -> Watched:
    """Return what the tests say; half of the level is for the windows, half for the drift.

    Raises:
        ValueError: no image can be compared, or there would be too many windows.
    """
    rule = record.rule
    compared = np.flatnonzero(comparable(rule, predictions.predicted))
    if not len(compared):
        raise ValueError(
            f"all {len(predictions.scores):,} images are predicted as classes with few calibration "
            "images, which share a threshold: these cannot be watched by themselves. Calibrate "
            "without --per-class, or with more images"
        )
    predicted, scores = predictions.predicted[compared], predictions.scores[compared]
    size = options.window or window_size(rule, len(scores))
    if len(scores) > MOST_WINDOWS * size:
        raise ValueError(
            f"--window {size} makes {-(-len(scores) // size):,} windows, {MOST_WINDOWS:,} are "
            f"possible: at least {-(-len(scores) // MOST_WINDOWS):,} images a window"
        )
    ends = window_ends(len(scores), size)
    windows = rejection_windows(rule, predicted, scores, ends, options.level / 2)
    cells = cells_of(rule, predicted, scores)
    drift = drift_of(rule, predicted, cells, ends, options.level / 2)
    start = None
    if drift.start is not None:
        start = int(windows.starts[drift.start])
    elif windows.alarms.any():
        start = int(windows.starts[np.flatnonzero(windows.alarms)[0]])
    _, p_values = rule.decide(predictions.predicted, predictions.scores)
    return Watched(
        record,
        predictions,
        compared,
        size,
        options.level,
        windows,
        drift,
        cells,
        p_values,
        start,
    )
