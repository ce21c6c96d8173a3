"""What a prediction comes to, in words."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from backmix.pipeline.beton import printable
from backmix.train.decide.conformal import Floats, benjamini_hochberg
from backmix.train.decide.record import Record
from backmix.train.decide.rows import Row

STOPPED = 75
"""Exit code of a prediction that a signal stopped, and that the same command continues."""
KINDS = 1000
"""Kinds of errors that are counted apart."""
_SHOWN = 8
_NUMBER = re.compile(r"\d[\d,.]*")


@dataclass
class Errors:
    """Images of one kind of error."""

    reason: str
    """Of the first of them."""
    count: int = 0
    files: list[str] = field(default_factory=list)
    """The first three."""


@dataclass
class Summary:
    """What a prediction comes to."""

    out: Path
    images: int = 0
    """Decided about, those that could not be read among them."""
    accepted: int = 0
    rejected: int = 0
    errors: dict[str, Errors] = field(default_factory=dict)
    """By kind: the reason without its numbers."""
    expected: str = ""
    """How many known images are rejected: a sentence."""
    stopped: str = ""
    """What stopped it, and how it goes on; empty where it is finished."""

    @property
    def unread(self) -> int:
        """Images that could not be read."""
        return self.images - self.accepted - self.rejected

    @property
    def exit_code(self) -> int:
        """Of the command: 0, or `STOPPED`."""
        return STOPPED if self.stopped else 0

    def count(self, row: Row) -> None:
        """Add a row."""
        self.images += 1
        self.accepted += row["decision"] == "accept"
        self.rejected += row["decision"] == "reject"
        if row["decision"] == "error":
            kind = _NUMBER.sub("0", row["reason"])
            if kind not in self.errors and len(self.errors) >= KINDS:
                kind = "other reasons"
            errors = self.errors.setdefault(kind, Errors(row["reason"]))
            errors.count += 1
            if len(errors.files) < 3:
                errors.files.append(row["file"])

    def __str__(self) -> str:
        """Return it as lines for a terminal."""
        if self.stopped:
            return self.stopped
        decided = max(self.accepted + self.rejected, 1)
        lines = [
            f"{self.images:,} images: {self.accepted:,} accepted, {self.rejected:,} rejected "
            f"({100 * self.rejected / decided:.1f} %)"
            + (f", {self.unread:,} could not be read" if self.unread else "")
        ]
        kinds = sorted(self.errors.values(), key=lambda errors: -errors.count)
        for errors in kinds[:_SHOWN]:
            names = ", ".join(errors.files) + (", ..." if errors.count > len(errors.files) else "")
            lines.append(f"  {errors.count:,}: {printable(f'{errors.reason} ({names})')}")
        if rest := kinds[_SHOWN:]:
            count = sum(errors.count for errors in rest)
            lines.append(f"  {count:,} for {len(rest):,} further reasons, see the column reason")
        return "\n".join([*lines, self.expected, f"wrote {self.out}"])


def expectation(record: Record) -> str:
    """Say how many known images are rejected by a record's thresholds.

    A sentence such as "of known images 5 % are expected to be rejected (95 % interval 3.7 to 6.4 %;
    1,000 calibration images)".
    """
    parts = record.rule.categories
    rates = [100 * part.mean_rate for part in parts]
    n = parts[0].n if len(parts) == 1 else record.data["n"]  # categories may share images
    facts = [f"{n:,} calibration images"]
    if record.confidence is not None:
        rate = 100 * float(record.rate)
        facts.insert(0, f"at most {rate:g} % with confidence {record.confidence:g}")
    if len(parts) == 1:
        low, high = (100 * end for end in parts[0].interval)
        share = f"{rates[0]:.2g} %"
        facts.insert(0, f"95 % interval {low:.2g} to {high:.2g} %")
    else:
        share = f"{min(rates):.2g} to {max(rates):.2g} %, by predicted class,"
    return f"of known images {share} are expected to be rejected ({'; '.join(facts)})"


def discoveries(p_values: Floats, share: float, record: Record) -> str:
    """Say what --fdr comes to; where it rejects nothing, what would have been needed.

    Args:
        p_values: of all images, float64 [n], NaN = it could not be read.
        share: the one of --fdr.
        record: what was decided by.
    """
    said = (
        f"of the rejected images {100 * share:g} % at most are expected to be known "
        "(Benjamini-Hochberg over all images of this call)"
    )
    p = np.sort(p_values[~np.isnan(p_values)])
    if not len(p) or benjamini_hochberg(p, share).any():
        return said
    m, equal = len(p), int(np.searchsorted(p, p[0], "right"))
    needed = share * equal / m
    said = (
        f"--fdr {share:g} rejects nothing: the smallest p-value is {p[0]:.2g} ({equal:,} of {m:,} "
        f"images have it), {needed:.2g} or less was needed"
    )
    n = max(category.n for category in record.rule.categories)
    if needed < 1 / (n + 1):
        enough = math.ceil(m / (share * (n + 1)))
        said += f"; {n:,} calibration images give none below {1 / (n + 1):.2g}, "
        said += (
            f"which {enough:,} of the images would have to have"
            if enough <= m
            else "which is too much were it that of every image: calibrate on more"
        )
    # The share from which on there is an image on Benjamini and Hochberg's line, rounded up.
    least = float((p * m / np.arange(1, m + 1)).min())
    step = 10.0 ** (math.floor(math.log10(least)) - 1)
    least = math.ceil(least / step) * step
    return said + (f". --fdr {least:.2g} would reject some" if least < 1 else ". No --fdr would")
