"""What is decided about one image, in words and numbers: of the command as of the Python door."""

import math
from dataclasses import dataclass
from typing import Literal

from backmix.train.decide.decider import Decisions

Outcome = Literal["accept", "reject", "error"]
COLUMNS = ("file", "class", "probability", "score", "threshold", "p_value", "decision", "reason")
"""Of every output, in this order."""


@dataclass(frozen=True)
class Decision:
    """What is decided about one image."""

    decision: Outcome
    """accept, reject, or error: the image could not be read, and nothing is decided about it."""
    class_name: str | None = None
    """The known class that it is most like; None after an error, as all numbers."""
    probability: float | None = None
    """Of that class among the known ones, 0 .. 1: says nothing about being known at all."""
    score: float | None = None
    """Larger = more known."""
    threshold: float | None = None
    """Of the class: accepted where the score is at least this."""
    p_value: float | None = None
    """At most this share of known images has so small a score, 0 .. 1."""
    reason: str = ""
    """Why it was not accepted; empty where it was."""

    @property
    def accepted(self) -> bool:
        """Whether the image is taken for one of the known classes."""
        return self.decision == "accept"

    def row(self, file: str) -> dict[str, str | float | None]:
        """Return it by `COLUMNS`."""
        values = (file, self.class_name, self.probability, self.score, self.threshold, self.p_value)
        return dict(zip(COLUMNS, (*values, self.decision, self.reason), strict=True))


def failed(reason: str) -> Decision:
    """Return the decision about an image that could not be read."""
    # A path in the reason may be no UTF-8, which no output could hold.
    return Decision("error", reason=reason.encode(errors="backslashreplace").decode())


def decisions(decided: Decisions, classes: tuple[str, ...]) -> list[Decision]:
    """Return what was decided about n images, one by one.

    An image with a score that is NaN or infinite is an error: with such a score nothing is known
    of it, and it is not accepted.
    """
    columns = (
        decided.predicted,
        decided.probability,
        decided.score,
        decided.threshold,
        decided.p_value,
        decided.accepted,
    )
    return [
        _decision(classes[predicted], *rest)
        for predicted, *rest in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _decision(
    name: str, probability: float, score: float, threshold: float, p: float, accepted: bool
) -> Decision:
    if not math.isfinite(score):
        return failed(f"the network's score of it is {score:g}, no number to decide by")
    reason = "" if accepted else below(score, threshold, p)
    outcome: Outcome = "accept" if accepted else "reject"
    return Decision(outcome, name, probability, score, threshold, p, reason)


def below(score: float, threshold: float, p: float) -> str:
    """Say why an image is rejected by a threshold.

    >>> below(3.21, 4.5, 0.012)
    'p-value 0.012: score 3.21 is below the threshold 4.5'
    """
    pairs = [(f"{score:.{digits}g}", f"{threshold:.{digits}g}") for digits in range(4, 18)]
    # As few digits as tell the two apart.
    one, other = next((pair for pair in pairs if pair[0] != pair[1]), pairs[-1])
    return f"p-value {p:.2g}: score {one} is below the threshold {other}"


def among_rejected(p: float, limit: float, share: float) -> str:
    """Say why an image is rejected by Benjamini and Hochberg's rule.

    >>> among_rejected(0.0012, 0.0034, 0.1)
    'p-value 0.0012 is at most 0.0034: of images so rejected 10 % at most are expected to be known'
    """
    return (
        f"p-value {p:.2g} is at most {limit:.2g}: of images so rejected {100 * share:g} % at most "
        "are expected to be known"
    )
