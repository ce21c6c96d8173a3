"""What watched predictions come to, in words: the verdict, and the text for a terminal.

What can be said is that images are no longer like the calibration images; whether known images have
changed or unknown ones have come no number can tell.
"""

import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backmix.pipeline.beton import printable
from backmix.train.decide.conformal import exact_rate, needed
from backmix.train.decide.drift import Shares, at_thresholds, rejected_of
from backmix.train.decide.predicted import Predictions
from backmix.train.decide.record import Record
from backmix.train.decide.watched import Watched
from backmix.train.decide.words import percent

_MOST_REASONS = 20
_DIGITS = re.compile(r"\d[\d.,]*")


@dataclass(frozen=True)
class Verdict:
    """What it comes to, in words."""

    changed: bool
    title: str
    sentences: tuple[str, ...]
    command: str
    """How to recalibrate; empty where nothing changed."""


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
        f"{when} {percent(below.sum() / total, 1)} are below the threshold ({below.sum():,} of "
        f"{total:,}); {percent(shares.expected[0] / total, 1)} are expected, and "
        f"{percent(shares.low[0] / total, 1)} to {percent(shares.high[0] / total, 1)} would be "
        "nothing special (95 %)."
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


def text_of(watched: Watched, verdict: Verdict, out: Path) -> str:
    """Return everything that matters as text for a terminal."""
    lines = [verdict.title, *verdict.sentences]
    if verdict.command:
        lines.append(f"  {verdict.command}")
    if alarms := watched.alarms():
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
        lines += [
            f"  {count:,} x {reason}" for reason, count in reasons_of(watched.predictions)[:5]
        ]
    lines += ["", *promise_of(watched), *(f"note: {note}" for note in notes_on(watched))]
    return "\n".join([*map(printable, lines), f"wrote {out}"])


def promise_of(watched: Watched) -> list[str]:
    """Say what was compared, and how rare false alarms are."""
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


def reasons_of(predictions: Predictions) -> list[tuple[str, int]]:
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


def notes_on(watched: Watched) -> list[str]:
    """Say which images are watched otherwise than a reader would think."""
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
