"""The page about watched predictions: charts, tables and pictures of rejected images.

Names of files and classes are foreign text: the template escapes them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from backmix.pipeline.beton import printable
from backmix.train.decide.options import MonitorOptions
from backmix.train.decide.thumbnails import Tile, thumbnails
from backmix.train.decide.verdict import Verdict, notes_on, promise_of, reasons_of
from backmix.train.decide.watched import MOST_ALARMS, Watched
from backmix.train.decide.words import percent
from backmix.train.figures import Chart, Rates, cells_chart, rate_chart
from backmix.train.page import embedded


def page_values(
    watched: Watched, verdict: Verdict, options: MonitorOptions, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return what the template `monitor.html.j2` shows.

    Args:
        watched: the tests.
        verdict: what they come to.
        options: as the user gave them.
        say: called with a line of progress now and then.
    """
    return {
        "verdict": verdict,
        "facts": _facts(watched, options),
        "charts": [_rate_chart(watched), _cells_chart(watched)],
        "alarms": watched.alarms(),
        "more_alarms": max(int(np.count_nonzero(watched.windows.alarms)) - MOST_ALARMS, 0),
        "promise": promise_of(watched),
        "reasons": reasons_of(watched.predictions),
        "notes": notes_on(watched),
        "tiles": _tiles(watched, options.pictures, say),
        "rejected": int(watched.predictions.rejected.sum()),
        "numbers": embedded(_numbers(watched, verdict)),
    }


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
            f"{len(sizes):,} windows of {watched.size:,} images; {percent(share.min(), 1)} to "
            f"{percent(share.max(), 1)} of a window are below the threshold, on the average "
            f"{percent(windows.rejected.sum() / sizes.sum(), 1)}. "
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
                percent(row["rejected"] / row["images"], 1),
                f"{row['expected']:.1f}",
                f"{row['usual_low']:,} to {row['usual_high']:,}",
                f"{row['low']:,} to {row['high']:,}",
                {1: "too many", 0: "", -1: "too few"}[row["alarm"]],
            )
            for row in map(watched.window, range(len(sizes)))
        ),
    )


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
        "windows": [watched.window(number) for number in range(len(watched.windows.ends))],
        "log_e": watched.drift.log_e.tolist(),
        "log_e_accepted": watched.drift.log_e_accepted.tolist(),
        "cells": {
            "counts": shares.counts.tolist(),
            "expected": shares.expected.tolist(),
            "low": shares.low.tolist(),
            "high": shares.high.tolist(),
        },
    }
