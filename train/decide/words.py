"""What a record promises, in words for a terminal."""

import math
import textwrap

from backmix.train.decide.conformal import exact_rate, needed, share_interval
from backmix.train.decide.record import Record
from backmix.train.decide.rule import Category

_WIDTH = 100
MOST_ROWS = 40
"""Classes that are shown of a rule by class."""


def promise(record: Record, *also: str) -> str:
    """Return threshold, promise, interval and notes of a record; `also` are further last lines."""
    data = record.data
    parts = record.rule.categories
    whose = "known images that --val held out"
    if data.get("images") != "held_out":
        whose = f"known images of {', '.join(data.get('files', ()))}"
    bad = f"; {data['bad']:,} could not be read" if data.get("bad") else ""
    lines = [
        f"score {record.score} (larger = more known) of {data['n']:,} {whose}{bad}",
        *(_of_all(record, parts[0]) if len(parts) == 1 else []),
        *(_by_class(record) if record.rule.per_class != "off" else []),
        *_wrapped(*_promised(record)),
        *_accuracy(record),
        *(line for note in data.get("notes", ()) for line in _note(note)),
    ]
    return "\n".join([*lines, *also])


def percent(share: float, digits: int = 2) -> str:
    """Return a share in percent, of a small one with two digits at least that are no leading zeros.

    Args:
        share: 0 .. 1.
        digits: after the point, of shares that are not small.

    >>> percent(0.05), percent(0.05, digits=1), percent(0.00049, digits=1), percent(0.0)
    ('5.00 %', '5.0 %', '0.049 %', '0.00 %')
    """
    if share > 0:
        digits = max(digits, 1 - math.floor(math.log10(100 * share)))
    return f"{100 * share:.{digits}f} %"


def _of_all(record: Record, part: Category) -> list[str]:
    of = f"score number {part.k:,} of {part.n:,}"
    if record.rule.per_class == "shrunk":
        return _wrapped(
            f"accepted: a score of at least {part.threshold:.6g} above the offset of its class "
            f"({of}, from below, in the half that is not used for the offsets)"
        )
    return [f"accepted: a score of at least {part.threshold:.6g} ({of}, from below)"]


def _by_class(record: Record) -> list[str]:
    if record.rule.per_class == "shrunk":
        return _shrunk_rows(record)
    rows = [
        (part.name, part.n, part.k, part.threshold, part.mean_rate, part.interval)
        for part in record.rule.categories
    ]
    width = max(len("predicted class"), *(len(row[0]) for row in rows[:MOST_ROWS]))
    lines = [f"{'predicted class':{width}}  images      k   threshold  rejected   95 % interval"]
    for name, n, k, threshold, mean, (low, high) in rows[:MOST_ROWS]:
        lines.append(
            f"{name:{width}} {n:7,} {k:6,}  {threshold:10.5g}  {percent(mean):>8}   "
            f"{percent(low)} to {percent(high)}"
        )
    return lines + _more(len(rows))


def _shrunk_rows(record: Record) -> list[str]:
    of, rejected = record.data["by_class"]
    width = max(len("predicted class"), *(len(name) for name in record.classes[:MOST_ROWS]))
    lines = [f"{'predicted class':{width}}  images   threshold  seen to be rejected, 95 % interval"]
    thresholds = record.rule.thresholds.tolist()
    for k, name in enumerate(record.classes[:MOST_ROWS]):
        seen = "no image"
        if of[k]:
            low, high = share_interval(rejected[k], of[k])
            seen = f"{percent(rejected[k] / of[k]):>8}   {percent(low)} to {percent(high)}"
        lines.append(f"{name:{width}} {of[k]:7,}  {thresholds[k]:10.5g}  {seen}")
    return lines + _more(len(record.classes))


def _more(count: int) -> list[str]:
    return [f"and {count - MOST_ROWS:,} more: threshold.json"] if count > MOST_ROWS else []


def _promised(record: Record) -> list[str]:
    """Return the guarantee, and what it is not, a paragraph each."""
    rate, parts = f"{100 * float(exact_rate(record.rate)):g} %", record.rule.categories
    of, each = "known images like these", ""
    if len(parts) > 1:
        of, each = "known images predicted as one class", ", in each row of the table by itself"
    if record.confidence is None:
        said = (
            f"promised: of {of} at most {rate} are rejected, on the average over calibration "
            f"sets{each}"
        )
        if len(parts) == 1:
            low, high = parts[0].interval
            said += (
                f" (k / (n + 1) = {percent(parts[0].mean_rate)}). What this very threshold "
                f"rejects lies between {percent(low)} and {percent(high)} with 95 % probability"
            )
        said += _surer(record)
    else:
        sure = f"{100 * record.confidence:g} %"
        said = (
            f"promised: with confidence {sure} this very threshold rejects at most {rate} of {of}"
        )
        said += f"{each}; on the average {percent(parts[0].mean_rate)}" if len(parts) == 1 else each
    paragraphs = [said]
    if record.rule.per_class == "shrunk":
        paragraphs.append(
            "The rate is promised over all classes together; of a single class nothing is promised."
        )
    if record.rule.per_class == "conditional" and any(len(p.calibrated_on) > 1 for p in parts):
        least = needed(exact_rate(record.rate), record.confidence)
        nearly = "" if record.confidence is None else ", and the confidence holds nearly"
        paragraphs.append(
            f"Classes with fewer than {least:,} images share a threshold, where need be with some "
            f"that have more: the rate is promised of them together, not of each{nearly}."
        )
    paragraphs.append(
        "It holds while the images to come are like the calibration images; of unknown images "
        "nothing is promised."
    )
    return paragraphs


def _surer(record: Record) -> str:
    """Return what --confidence would do, or what it would need."""
    parts, least = record.rule.categories, needed(exact_rate(record.rate), 0.9)
    lower, n = "a lower one", parts[0].n
    if len(parts) > 1:
        lower, n = "lower ones", record.data["n"]
    if n >= least:
        return f"; --confidence 0.9 chooses {lower} to keep the rate in nine of ten cases"
    least *= 2 if record.rule.per_class == "shrunk" else 1
    return f"; --confidence 0.9, to keep the rate in nine of ten cases, needs {least:,} images"


def _accuracy(record: Record) -> list[str]:
    data = record.data
    if not data.get("labelled") or not data.get("accepted"):
        return []
    low, high = share_interval(data["accepted_right"], data["accepted"])
    return _wrapped(
        f"accuracy on the calibration images: {percent(data['right'] / data['labelled'])} of all, "
        f"{percent(data['accepted_right'] / data['accepted'])} of the accepted ones (95 % interval "
        f"{percent(low)} to {percent(high)})"
    )


def _note(note: str) -> list[str]:
    return textwrap.wrap(f"note: {note}", _WIDTH, subsequent_indent="  ")


def _wrapped(*paragraphs: str) -> list[str]:
    return [line for text in paragraphs for line in textwrap.wrap(text, _WIDTH)]
