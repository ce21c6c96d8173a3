"""`backmix monitor`: is the rejection rate of a calibrated threshold still what was promised?

Tables of `backmix predict` in, words and one self-contained page out. The statistics are in
`drift.py`. What can be said is that images are no longer like the calibration images; whether known
images have changed or unknown ones have come no number can tell, so the page shows the rejected
ones. Names of files and classes are foreign text: the template escapes them.
"""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backmix.pipeline.beton import printable
from backmix.train.decide.conformal import Floats, exact_rate, needed
from backmix.train.decide.drift import (
    Counts,
    Drift,
    Shares,
    Windows,
    at_thresholds,
    cells_of,
    comparable,
    drift_of,
    rejected_of,
    rejection_windows,
    shares_of,
    window_ends,
    window_size,
)
from backmix.train.decide.options import MonitorOptions
from backmix.train.decide.predicted import Predictions, read_predictions
from backmix.train.decide.record import Record, read_record
from backmix.train.decide.thumbnails import Tile, thumbnails
from backmix.train.figures import Chart, Rates, cells_chart, rate_chart
from backmix.train.page import check_page, embedded, write_page

MOST_WINDOWS = 4096
"""Windows that may be asked for."""
_MOST_REASONS = 20
_MOST_ALARMS = 50
_DIGITS = re.compile(r"\d[\d.,]*")


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


@dataclass(frozen=True)
class Verdict:
    """What it comes to, in words."""

    changed: bool
    title: str
    sentences: tuple[str, ...]
    command: str
    """How to recalibrate; empty where nothing changed."""


def monitor(
    files: Sequence[Path],
    options: MonitorOptions,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[str, bool]:
    """Watch predictions and write the page.

    Args:
        files: tables of `backmix predict`, in the order in which they came about.
        options: against which record, and how.
        say: called with a line of progress now and then.

    Returns the text for the terminal, and whether to calibrate again.

    Raises:
        ValueError: what is wrong with the options, the record or the tables, and what to do.
        OSError: what cannot be read or written.
    """
    check_page(options.out, "page")
    record = read_record(options.against)
    say("reading the tables")
    watched = watch(record, read_predictions(files, record), options)
    verdict = verdict_on(watched, options.against)
    tiles = _tiles(watched, options.pictures, say)
    values = {
        "verdict": verdict,
        "facts": _facts(watched, options),
        "charts": [_rate_chart(watched), _cells_chart(watched)],
        "alarms": _alarms(watched),
        "more_alarms": max(int(np.count_nonzero(watched.windows.alarms)) - _MOST_ALARMS, 0),
        "promise": _promise(watched),
        "reasons": _reasons(watched.predictions),
        "notes": _notes(watched),
        "tiles": tiles,
        "rejected": int(watched.predictions.rejected.sum()),
        "numbers": embedded(_numbers(watched, verdict)),
    }
    write_page(options.out, "decide/monitor.html.j2", values)
    return _text(watched, verdict, options.out), verdict.changed


def watch(record: Record, predictions: Predictions, options: MonitorOptions) -> Watched:
    """Return what the tests say; half of the level is for the windows, half for the drift.

    Raises:
        ValueError: an option that cannot be.
    """
    if not 0 < options.level < 1:
        raise ValueError(f"--level must lie between 0 and 1, got {options.level:g}")
    if options.window < 0 or options.pictures < 0:
        raise ValueError("--window and --pictures must not be negative")
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


def verdict_on(watched: Watched, against: Path) -> Verdict:
    """Return what the tests come to.

    Args:
        watched: the tests.
        against: the run folder or its record, for the command that calibrates again.
    """
    if watched.start is None:
        return Verdict(
            False,
            "No change is seen",
            (
                f"As far as {len(watched.cells):,} images can tell, they are like those of the "
                "calibration.",
                _rejected(watched, 0, "Of all images"),
            ),
            "",
        )
    rule, since = watched.record.rule, watched.shares(watched.start)
    where = watched.place(watched.start)
    _, low, high = rejected_of(rule, watched.predicted[watched.start :], 0.01)
    more = int(since.counts[0] > high) - int(since.counts[0] < low)
    sentences = [_rejected(watched, watched.start, "Since then")]
    words = {1: "More", -1: "Fewer"}
    if more:
        title = f"{words[more]} images are rejected than expected since about {where}"
    elif watched.drift.start is None:
        first = int(np.flatnonzero(watched.windows.alarms)[0])
        more = int(watched.windows.alarms[first])
        title = f"{words[more]} images than expected were rejected for a while, from {where} on"
    else:
        title = f"Scores have changed since about {where}, the share of rejected images hardly"
    sentences += _explanations(watched, since, more)
    run = against if against.is_dir() else against.parent
    least = needed(exact_rate(watched.record.rate), watched.record.confidence)
    least *= 2 if rule.per_class == "shrunk" else 1  # in two halves
    sentences.append(
        f"To calibrate again takes known images like those that come now, with their classes, that "
        f"were never trained on: at least {least:,}, better {max(1000, 10 * least):,}. The record "
        "so far is kept beside the new one."
    )
    return Verdict(True, title, tuple(sentences), _command(watched.record, run))


def _command(record: Record, run: Path) -> str:
    """Return the command that calibrates as it was done, on other images."""
    words = ["backmix", "calibrate", str(run), "--data", "NEW", "--score", record.score]
    words += ["--reject-rate", record.rate]
    if record.confidence is not None:
        words += ["--confidence", f"{record.confidence:g}"]
    words += {"off": [], "conditional": ["--per-class"], "shrunk": ["--per-class", "--shrink"]}[
        record.rule.per_class
    ]
    words += ["--size", str(record.preprocessing.size)]
    if record.precision != "fp32":
        words += ["--precision", record.precision]
    return shlex.join(words)


def _rejected(watched: Watched, first: int, when: str) -> str:
    """Say how many images from `first` on were rejected, and how many should have been."""
    shares, total = watched.shares(first), len(watched.cells) - first
    below, _ = at_thresholds(
        watched.record.rule,
        watched.predicted[first:],
        watched.predictions.scores[watched.compared][first:],
    )
    return (
        f"{when} {_percent(below.sum() / total)} are below the threshold ({below.sum():,} of "
        f"{total:,}); {_percent(shares.expected[0] / total)} are expected, and "
        f"{_percent(shares.low[0] / total)} to {_percent(shares.high[0] / total)} would be nothing "
        "special (95 %)."
    )


def _explanations(watched: Watched, since: Shares, more: int) -> list[str]:
    if watched.drift.accepted_too:
        # The middle of each accepted cell among the accepted, 0 .. 1, weighted.
        ends = np.cumsum(since.expected[1:])
        middle = (ends - since.expected[1:] / 2) / ends[-1]
        mean = (since.counts[1:] * middle).sum() / max(since.counts[1:].sum(), 1)
        how = "lower" if mean < 0.5 else "higher"
        return [
            f"The scores of the accepted images have changed, too: they are {how} than those of "
            "the calibration. Known images have changed, or unknown ones pass for known; either "
            "way the threshold no longer means what it did: calibrate again."
        ]
    if more > 0:
        return [
            "The scores of the accepted images have not changed noticeably. Either unknown images "
            "have come, and rejecting them is what the threshold is for; or known images of a new "
            "kind, which should not be rejected. Look at the rejected images: where they show "
            "known classes, calibrate again."
        ]
    return [
        "The threshold no longer keeps the share that was asked for: calibrate again."
        if more
        else "Look at the rejected images, and calibrate again where they show known classes."
    ]


# --- text ---------------------------------------------------------------------------------------


def _text(watched: Watched, verdict: Verdict, out: Path) -> str:
    """Return everything that matters as text for a terminal."""
    lines = [verdict.title, *verdict.sentences]
    if verdict.command:
        lines.append(f"  {verdict.command}")
    if alarms := _alarms(watched):
        lines += ["", "windows outside the limits:"]
        lines += [
            f"  {row['from']} to {row['to']}: {row['rejected']:,} of {row['images']:,} rejected, "
            f"{row['low']:,} to {row['high']:,} are no alarm"
            for row in alarms[:5]
        ]
        count = int(np.count_nonzero(watched.windows.alarms))
        lines += [f"  and {count - 5:,} more"] if count > 5 else []
    errors = len(watched.predictions.errors)
    if errors:
        lines += ["", f"{errors:,} of {len(watched.predictions.names):,} rows are errors:"]
        lines += [f"  {count:,} x {reason}" for reason, count in _reasons(watched.predictions)[:5]]
    lines += ["", *_promise(watched), *(f"note: {note}" for note in _notes(watched))]
    return "\n".join([*map(printable, lines), f"wrote {out}"])


def _promise(watched: Watched) -> list[str]:
    n = sum(category.n for category in watched.record.rule.categories)
    largest = float(watched.drift.log_e.max()) / np.log(10)
    most = 2 / watched.level
    return [
        f"Compared: {len(watched.cells):,} images with {n:,} calibration images, whose own "
        "uncertainty is part of every limit.",
        f"False alarms: with probability {watched.level:g} at most, if nothing has changed; half "
        f"of it for the {len(watched.windows.ends):,} windows of {watched.size:,} images together, "
        f"half for the drift of the p-values, which is called at an e-value of {most:g} (the "
        f"largest was {_power(largest)}).",
    ]


def _power(exponent: float) -> str:
    return f"{10**exponent:.2g}" if exponent < 4 else f"10^{exponent:.0f}"


def _facts(watched: Watched, options: MonitorOptions) -> list[tuple[str, list[str]]]:
    record, predictions = watched.record, watched.predictions
    ends = [*predictions.starts[1:].tolist(), len(predictions.names)]
    rows = np.diff(ends, prepend=0).tolist()
    tables = [
        f"{printable(str(file))}: {count:,} rows"
        for file, count in zip(predictions.files, rows, strict=True)
    ]
    sure = "" if record.confidence is None else f", with confidence {record.confidence:g}"
    n = sum(category.n for category in record.rule.categories)
    many = len(record.rule.categories)
    by = f", in {many} categories by predicted class" if many > 1 else ""
    return [
        ("Predictions", tables),
        (
            "Threshold",
            [
                f"{printable(str(options.against))}: score {record.score}, share of known images "
                f"rejected {record.rate}{sure}"
            ],
        ),
        ("Calibration", [f"{n:,} images{by}, {record.facts.get('date', 'date unknown')}"]),
        ("Classes", [f"{len(record.classes):,}"]),
    ]


def _reasons(predictions: Predictions) -> list[tuple[str, int]]:
    """Return the reasons of errors and how often each is given; numbers in them do not count."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for reason in predictions.errors.values():
        kind = _DIGITS.sub("#", reason)
        first.setdefault(kind, reason)
        counts[kind] += 1
    found = [
        (printable(first[kind] if count == 1 else kind), count)
        for kind, count in counts.most_common(_MOST_REASONS)
    ]
    rest = counts.total() - sum(count for _, count in found)
    return [*found, *([("other reasons", rest)] if rest else [])]


def _notes(watched: Watched) -> list[str]:
    predictions, notes = watched.predictions, []
    below, _ = at_thresholds(watched.record.rule, predictions.predicted, predictions.scores)
    if differ := int(np.count_nonzero(below != predictions.rejected)):
        notes.append(
            f"{differ:,} rows are decided otherwise than by the threshold (backmix predict --fdr "
            "does so); what is watched here is what the threshold says of their scores"
        )
    if left := len(predictions.scores) - len(watched.compared):
        notes.append(
            f"{left:,} images are not compared: they are predicted as classes with few calibration "
            "images, which share a threshold"
        )
    return notes


# --- page ---------------------------------------------------------------------------------------


def _rate_chart(watched: Watched) -> Chart:
    windows = watched.windows
    sizes = windows.sizes
    share = watched.windows.rejected / sizes
    svg = rate_chart(
        Rates(
            np.append(0, windows.ends),
            100 * share,
            100 * windows.expected / sizes,
            (100 * windows.usual_low / sizes, 100 * windows.usual_high / sizes),
            (100 * windows.low / sizes, 100 * windows.high / sizes),
            windows.alarms != 0,
            None if watched.start is None else float(watched.start),
        ),
        "images",
        "rejected [%]",
    )
    count = int(np.count_nonzero(windows.alarms))
    return Chart(
        title="Share of rejected images over time",
        text=(
            f"{len(sizes):,} windows of {watched.size:,} images; {_percent(share.min())} to "
            f"{_percent(share.max())} of a window are below the threshold, on the average "
            f"{_percent(windows.rejected.sum() / sizes.sum())}. "
            f"Outside the limits: {count or 'none'}."
        ),
        svg=svg,
        header=(
            "from",
            "to",
            "images",
            "rejected",
            "share",
            "expected",
            "95% of single windows",
            "no alarm",
            "",
        ),
        rows=tuple(
            (
                row["from"],
                row["to"],
                f"{row['images']:,}",
                f"{row['rejected']:,}",
                _percent(row["rejected"] / row["images"]),
                f"{row['expected']:.1f}",
                f"{row['usual_low']:,} to {row['usual_high']:,}",
                f"{row['low']:,} to {row['high']:,}",
                {1: "too many", 0: "", -1: "too few"}[row["alarm"]],
            )
            for row in map(lambda number: _window(watched, number), range(len(sizes)))
        ),
    )


def _window(watched: Watched, number: int) -> dict[str, Any]:
    windows = watched.windows
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
        "from": printable(watched.place(int(windows.starts[number]))),
        "to": printable(watched.place(int(windows.ends[number]) - 1)),
        **{name: column[number].item() for name, column in columns.items()},
    }


def _alarms(watched: Watched) -> list[dict[str, Any]]:
    """Return the first windows outside the limits."""
    return [
        _window(watched, number)
        for number in np.flatnonzero(watched.windows.alarms)[:_MOST_ALARMS].tolist()
    ]


def _cells_chart(watched: Watched) -> Chart:
    shares = watched.shares(watched.start or 0)
    there = shares.expected > 0  # few calibration images make fewer cells
    counts, expected, low, high = (
        array[there] for array in (shares.counts, shares.expected, shares.low, shares.high)
    )
    edges = np.append(0, np.cumsum(expected) / expected.sum())
    when = "of all images" if watched.start is None else f"since {watched.place(watched.start)}"
    outside = int(np.count_nonzero((counts < low) | (counts > high)))
    rows = []
    for number in range(len(counts)):
        rows.append(
            (
                f"{edges[number]:.3f} to {edges[number + 1]:.3f}",
                f"{counts[number]:,}",
                f"{expected[number]:.1f}",
                f"{low[number]:,} to {high[number]:,}",
            )
        )
    return Chart(
        title=f"P-values {printable(when)}",
        text=(
            "Each step is a range of p-values, small = unlike the known images; the first one is "
            f"rejected. Of {counts.sum():,} images {counts[0]:,} are in it, {expected[0]:.0f} are "
            f"expected. Outside the band, in which a step lies in 95 % of all cases if nothing has "
            f"changed: {outside} of {len(counts)} steps."
        ),
        svg=cells_chart(edges, counts / expected, low / expected, high / expected, "p-value"),
        header=("p-value", "images", "expected", "95% of single steps"),
        rows=tuple(rows),
    )


def _tiles(watched: Watched, most: int, say: Callable[[str], None]) -> list[Tile]:
    """Return pictures of rejected images, the least known first."""
    predictions = watched.predictions
    rejected = np.flatnonzero(predictions.rejected)
    order = np.lexsort((predictions.scores[rejected], watched.p_values[rejected]))
    chosen = rejected[order][:most].tolist()
    names = [predictions.names[int(predictions.rows[image])] for image in chosen]
    tiles = []
    for image, name, picture in zip(chosen, names, thumbnails(names, say), strict=True):
        class_ = printable(watched.record.classes[int(predictions.predicted[image])])
        score, p = predictions.scores[image], watched.p_values[image]
        tiles.append(
            Tile(
                picture.source,
                printable(picture.problem),
                f"Rejected image {printable(name)}, most like {class_}",
                (
                    printable(name),
                    f"most like {class_}",
                    f"score {score:.4g}, p-value {p:.2g}",
                ),
            )
        )
    return tiles


def _numbers(watched: Watched, verdict: Verdict) -> dict[str, Any]:
    """Return what the page is made of, as plain values."""
    shares = watched.shares(watched.start or 0)
    return {
        "changed": verdict.changed,
        "title": verdict.title,
        "start": None if watched.start is None else watched.place(watched.start),
        "level": watched.level,
        "images": len(watched.cells),
        "errors": len(watched.predictions.errors),
        "windows": [_window(watched, number) for number in range(len(watched.windows.ends))],
        "log_e": watched.drift.log_e.tolist(),
        "log_e_accepted": watched.drift.log_e_accepted.tolist(),
        "cells": {
            "counts": shares.counts.tolist(),
            "expected": shares.expected.tolist(),
            "low": shares.low.tolist(),
            "high": shares.high.tolist(),
        },
    }


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")
