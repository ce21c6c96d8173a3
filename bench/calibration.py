"""Does a threshold keep its rate on images that it has not seen? Random halves of stored scores.

    PYTHONPATH=src:. python -m bench.calibration RUN/scores/known.safetensors [--score NAME]
    PYTHONPATH=src:. python -m bench.calibration RUN/calibration.safetensors --test RUN/scores/...

Known images are cut into two halves, again and again: one half calibrates, the other one is judged.
However the scores are distributed, the images rejected of m other ones are then Beta-binomial
(m; k, n + 1 - k) where no two scores are equal, so every half is one draw of that law; beside the
rules stands what an interpolated quantile does. With --test, the threshold of the first file judges
the images of the second, once: whether the two are alike is what halves of one set cannot show.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from backmix.train.decide.conformal import exact_rate, rank, strict_rank
from backmix.train.decide.rule import conditional_rule, global_rule, shrunk_rule
from backmix.train.outputs import load_outputs
from backmix.train.scores import score_of

CONFIDENCE = 0.9
Floats = NDArray[np.float64]
Classes = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Scores:
    """Of n known images."""

    predicted: Classes
    """int64 [n]"""
    score: Floats
    """float64 [n], larger = more known."""
    classes: int
    """K."""

    def part(self, rows: NDArray[np.int64]) -> "Scores":
        """Return those of some images."""
        return Scores(self.predicted[rows], self.score[rows], self.classes)


@dataclass(frozen=True)
class Judged:
    """What one rule did over all halves."""

    name: str
    rate: float
    n: int
    """Calibration images."""
    m: int
    """Judged images."""
    k: int
    """Rank of the threshold where there is one for all; 0 = there is not."""
    seen: tuple[float, ...]
    """Rejected share of the judged images, half by half."""
    worst: float
    """The largest mean share over the halves of a predicted class."""

    @property
    def promised(self) -> float | None:
        """Mean rate; None where the rule promises none."""
        return self.k / (self.n + 1) if self.k else None

    @property
    def inside(self) -> int | None:
        """Halves whose share lies in the central 95 % of the Beta-binomial."""
        if not self.k:
            return None
        law = stats.betabinom(self.m, self.k, self.n + 1 - self.k)
        low, high = law.ppf(0.025), law.ppf(0.975)
        return sum(low <= round(share * self.m) <= high for share in self.seen)

    @property
    def above(self) -> int:
        """Halves whose share is above the rate that was asked for."""
        return sum(share > self.rate for share in self.seen)


def read(path: Path, name: str) -> Scores:
    """Return a score of stored outputs: the stored one, or computed where it needs no fit."""
    outputs = load_outputs(path)
    if name in outputs.scores:
        scores = outputs.scores[name]
    else:
        try:
            scores = score_of(name, outputs.logits, outputs.features, outputs.extras)
        except KeyError:
            raise ValueError(f"{path} has no score {name}: {', '.join(outputs.scores)}") from None
    return Scores(outputs.logits.argmax(1), np.asarray(scores), outputs.logits.shape[1])


Rejects = Callable[[Scores, Scores], NDArray[np.bool_]]
"""(calibration images, judged images) -> which of the latter are rejected, bool [m]."""


def rules(rate: Fraction) -> dict[str, tuple[Rejects, Callable[[int], int]]]:
    """Return the rules by name, with the rank of each at n images (0 = it has none)."""

    def of_all(own: Scores, other: Scores) -> NDArray[np.bool_]:
        rule = global_rule(own.score, own.classes, rate)
        return ~rule.decide(other.predicted, other.score)[0]

    def strict(own: Scores, other: Scores) -> NDArray[np.bool_]:
        rule = global_rule(own.score, own.classes, rate, CONFIDENCE)
        return ~rule.decide(other.predicted, other.score)[0]

    def by_class(own: Scores, other: Scores) -> NDArray[np.bool_]:
        names = [str(k) for k in range(own.classes)]
        rule = conditional_rule(own.score, own.predicted, names, rate)
        return ~rule.decide(other.predicted, other.score)[0]

    def shrunk(own: Scores, other: Scores) -> NDArray[np.bool_]:
        rule = shrunk_rule(own.score, own.predicted, own.classes, rate)
        return ~rule.decide(other.predicted, other.score)[0]

    def quantile(own: Scores, other: Scores) -> NDArray[np.bool_]:
        return other.score < np.quantile(own.score, float(rate))

    return {
        "one threshold": (of_all, lambda n: rank(n, rate)),
        f"one, confidence {CONFIDENCE:g}": (strict, lambda n: strict_rank(n, rate, CONFIDENCE)),
        "by predicted class": (by_class, lambda n: 0),
        "by class, shrunk": (shrunk, lambda n: 0),
        "np.quantile": (quantile, lambda n: 0),
    }


def halves(known: Scores, rate: Fraction, count: int, seed: int) -> list[Judged]:
    """Return what each rule did over `count` random halves."""
    random, n = np.random.default_rng(seed), len(known.score) // 2
    cuts = [random.permutation(len(known.score)) for _ in range(count)]
    return _judged([(known.part(cut[:n]), known.part(cut[n:])) for cut in cuts], rate)


def _judged(pairs: Sequence[tuple[Scores, Scores]], rate: Fraction) -> list[Judged]:
    found = []
    n, m = len(pairs[0][0].score), len(pairs[0][1].score)
    for name, (rejects, k) in rules(rate).items():
        rejected = [rejects(own, other) for own, other in pairs]
        of, refused = np.zeros(pairs[0][0].classes), np.zeros(pairs[0][0].classes)
        for (_, other), rows in zip(pairs, rejected, strict=True):
            of += np.bincount(other.predicted, minlength=len(of))
            refused += np.bincount(other.predicted[rows], minlength=len(of))
        seen = tuple(float(rows.mean()) for rows in rejected)
        worst = float((refused[of > 0] / of[of > 0]).max())
        found.append(Judged(name, float(rate), n, m, k(n), seen, worst))
    return found


def table(judged: Sequence[Judged]) -> str:
    """Return the rows as Markdown, shares in percent."""
    lines = [
        "| rule | asked | calibrated on | judged | promised | seen, mean | smallest to largest | "
        "in the 95 % interval | above what was asked | worst class, mean |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in judged:
        promised = "" if row.promised is None else f"{100 * row.promised:.2f}"
        inside = "" if row.inside is None else f"{row.inside} of {len(row.seen)}"
        lines.append(
            f"| {row.name} | {100 * row.rate:g} | {row.n:,} | {row.m:,} | {promised} | "
            f"{100 * np.mean(row.seen):.2f} | {100 * min(row.seen):.2f} to "
            f"{100 * max(row.seen):.2f} | {inside} | {row.above} of {len(row.seen)} | "
            f"{100 * row.worst:.2f} |"
        )
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("scores", type=Path, help="stored outputs of known images")
    parser.add_argument("--test", type=Path, help="stored outputs of others, judged by the first")
    parser.add_argument("--score", default="max_logit", help="its name in metrics.json")
    parser.add_argument("--rate", nargs="+", default=["0.05", "0.01"], help="rejection rates")
    parser.add_argument("--halves", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(words)
    known = read(asked.scores, asked.score)
    for rate in map(exact_rate, asked.rate):
        if asked.test is None:
            judged = halves(known, rate, asked.halves, asked.seed)
        else:
            judged = _judged([(known, read(asked.test, asked.score))], rate)
        print(table(judged), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
