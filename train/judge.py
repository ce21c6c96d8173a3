"""Figures of stored scores: how well the known images part from each unknown set."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backmix.train import metrics
from backmix.train.image_sets import KNOWN, SHIFTED, UNKNOWN, few
from backmix.train.intervals import auroc_interval, fpr95_intervals, oscr_interval
from backmix.train.models.heads import Head
from backmix.train.outputs import Outputs
from backmix.train.scores import CUES, Fit, every_score
from backmix.train.scores.every import NEED_FIT

MAIN_SCORES = ("msp", "max_logit", "energy", "ssod", "ssod_joint", "arpl", "cssr_s0", "cssr")
"""Scores that the table shows of every set: the common ones, and those of the methods."""
ASKED_FOR = NEED_FIT | {"odin"}
"""Scores that cost passes of their own (--fit, --odin); with one of them the table shows all."""
CCR_PERCENT = (1, 5, 10)
"""Shares of accepted unknown images at which the correct-classification rate is read."""


@dataclass(frozen=True)
class Scored:
    """The scores of one set of n images, larger = more known."""

    name: str
    group: str
    """What the set is averaged with: near, far, csid (known images under shift), another
    bench's group, or nothing."""
    bad: int
    """Images that could not be read and have no score."""
    labels: np.ndarray
    """int64 [n]: position in the run's class list, -1 = unknown."""
    predicted: np.ndarray
    """int64 [n]: class of the largest logit."""
    scores: Mapping[str, np.ndarray]
    """float64 [n] by the score's name; the same names for every set of a run."""

    def __len__(self) -> int:
        return len(self.labels)


def scored(
    outputs: Outputs, group: str = "", head: Head | None = None, fit: Fit | None = None
) -> Scored:
    """Return all scores of a set that apply; the same ones for every set of a run.

    Args:
        outputs: what the network said of the set.
        group: what the set is averaged with.
        head: the network's class head, and
        fit: what its scores learned from the training images; without them only the scores that
            need neither.

    Raises:
        ValueError: naming the set that has outputs not finite.
    """
    try:
        scores = every_score(outputs, head, fit)
    except ValueError as error:
        raise ValueError(f"set {outputs.name}: {error}") from error
    predicted = outputs.logits.argmax(1)
    return Scored(outputs.name, group, len(outputs.bad), outputs.labels, predicted, scores)


def judge(
    known: Scored, others: Sequence[Scored], held_out: Scored | None = None
) -> dict[str, Any]:
    """Return the figures of one known set and several others, each in [0, 1].

    - "known": {"n", "bad", "accuracy", "scores": {SCORE: {"aurc"}}}; bad = images that could not be
      read and are in no figure.
    - "unknown": {SET: {"n", "bad", "group", "scores": {SCORE: {METRIC: figure}}, "cues": {CUE:
      figure}}}. The metrics are those of `metrics.py`, `aurc_open` the risk with unknown images as
      errors, `ccr_fpr5` and `realised_fpr5` the two results of `ccr_at_fpr`; METRIC_ci are the ends
      of its 95 % interval. A cue's figure is the larger of AUROC and 1 - AUROC.
    - "groups": {GROUP: {"sets": [SET], "scores", "cues"}}: the unweighted mean over the sets of a
      group, intervals left out.
    - "shifted", where there are known images under a covariate shift (group csid): {SET: {"n",
      "bad", "accuracy", "scores": {SCORE: {"auroc", "auroc_ci"}}}}, the AUROC of `known` against
      them: 1/2 where the score does not mind the shift.
    - "full_spectrum", with "shifted": {"n", "accuracy", "unknown", "groups"}: known images and
      shifted ones together as the known set, against each unknown set and in the mean over groups:
      the metrics that are compared between runs, without intervals.

    Args:
        known: the known test set.
        others: unknown sets, and known sets under shift.
        held_out: known images that are neither trained on nor tested. Their scores set the
            threshold that accepts 95 % of them, and "macro_f1" over K + 1 classes is among the
            metrics.
    """
    unknown = [images for images in others if images.group != SHIFTED]
    shifted = [images for images in others if images.group == SHIFTED]
    correct = known.predicted == known.labels
    result: dict[str, Any] = {
        KNOWN: {
            "n": len(known),
            "bad": known.bad,
            "accuracy": metrics.accuracy(correct),
            "scores": {name: {"aurc": metrics.aurc(k, correct)} for name, k in _judged(known)},
        },
        UNKNOWN: {images.name: _unknown(known, images, held_out) for images in unknown},
    }
    result["groups"] = _groups(result[UNKNOWN])
    if shifted:
        result["shifted"] = {images.name: _shifted(known, images) for images in shifted}
        result["full_spectrum"] = _full_spectrum([known, *shifted], unknown)
    return result


def _unknown(known: Scored, images: Scored, held_out: Scored | None) -> dict[str, Any]:
    correct = known.predicted == known.labels
    scores = {}
    for name, k in _judged(known):
        scores[name] = _figures(k, correct, images.scores[name])
        if held_out is not None:
            threshold = metrics.acceptance_threshold(held_out.scores[name])
            scores[name]["macro_f1"] = _macro_f1(known, images, name, threshold)
    cues = {}
    for name in CUES:
        if name in known.scores and name in images.scores:
            area = metrics.auroc(known.scores[name], images.scores[name])
            cues[name] = max(area, 1 - area)
    return {
        "n": len(images),
        "bad": images.bad,
        "group": images.group,
        "scores": scores,
        "cues": cues,
    }


def _figures(k: np.ndarray, correct: np.ndarray, u: np.ndarray) -> dict[str, Any]:
    """Return every metric of one score, with the intervals beside."""
    area, rate = auroc_interval(k, u), oscr_interval(k, correct, u)
    accepted, rejected = fpr95_intervals(k, u)
    figures = {
        "auroc": area.value,
        "auroc_ci": area.ends,
        "oscr": rate.value,
        "oscr_ci": rate.ends,
        "aupr_known": metrics.aupr_known(k, u),
        "aupr_unknown": metrics.aupr_unknown(k, u),
        "fpr95_unknown_accepted": accepted.value,
        "fpr95_unknown_accepted_ci": accepted.ends,
        "fpr95_known_rejected": rejected.value,
        "fpr95_known_rejected_ci": rejected.ends,
        "dtacc": metrics.dtacc(k, u),
        "aurc_open": metrics.aurc(k, correct, u),
    }
    for percent in CCR_PERCENT:
        ccr, realised = metrics.ccr_at_fpr(k, correct, u, percent / 100)
        figures |= {f"ccr_fpr{percent}": ccr, f"realised_fpr{percent}": realised}
    return figures


def _macro_f1(known: Scored, images: Scored, name: str, threshold: float) -> float:
    # Any number that no class has will do for "unknown": the mean is over the classes there are.
    sets = known, images
    classes = 1 + max(int(max(s.labels.max(), s.predicted.max())) for s in sets)
    labels = np.concatenate([known.labels, np.full(len(images), classes)])
    predicted = [
        metrics.with_rejection(s.predicted, s.scores[name], threshold, classes) for s in sets
    ]
    return metrics.macro_f1(labels, np.concatenate(predicted))


def _shifted(known: Scored, images: Scored) -> dict[str, Any]:
    scores = {}
    for name, k in _judged(known):
        area = auroc_interval(k, images.scores[name])
        scores[name] = {"auroc": area.value, "auroc_ci": area.ends}
    return {
        "n": len(images),
        "bad": images.bad,
        "accuracy": metrics.accuracy(images.predicted == images.labels),
        "scores": scores,
    }


def _full_spectrum(known: Sequence[Scored], unknown: Sequence[Scored]) -> dict[str, Any]:
    correct = np.concatenate([images.predicted == images.labels for images in known])
    pooled = {
        name: np.concatenate([images.scores[name] for images in known])
        for name, _ in _judged(known[0])
    }
    sets = {}
    for images in unknown:
        scores = {}
        for name, k in pooled.items():
            u = images.scores[name]
            scores[name] = {
                "auroc": metrics.auroc(k, u),
                "oscr": metrics.oscr(k, correct, u),
                "aupr_known": metrics.aupr_known(k, u),
                "aupr_unknown": metrics.aupr_unknown(k, u),
                "fpr95_unknown_accepted": metrics.fpr95_unknown_accepted(k, u),
                "fpr95_known_rejected": metrics.fpr95_known_rejected(k, u),
                "dtacc": metrics.dtacc(k, u),
            }
        sets[images.name] = {"group": images.group, "scores": scores}
    return {
        "n": len(correct),
        "accuracy": metrics.accuracy(correct),
        UNKNOWN: sets,
        "groups": _groups(sets),
    }


def _judged(images: Scored) -> list[tuple[str, np.ndarray]]:
    """Return the scores that are more than a cue."""
    return [(name, score) for name, score in images.scores.items() if name not in CUES]


def _groups(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the unweighted means over the sets of each group."""
    found = {}
    for group in dict.fromkeys(images["group"] for images in sets.values() if images["group"]):
        names = [name for name, images in sets.items() if images["group"] == group]
        members = [sets[name] for name in names]
        scores = {
            score: {
                metric: statistics.fmean(m["scores"][score][metric] for m in members)
                for metric, figure in figures.items()
                if isinstance(figure, float)
            }
            for score, figures in members[0]["scores"].items()
        }
        cues = members[0].get("cues", {})
        shared = [cue for cue in cues if all(cue in m["cues"] for m in members)]
        found[group] = {
            "sets": names,
            "scores": scores,
            "cues": {cue: statistics.fmean(m["cues"][cue] for m in members) for cue in shared},
        }
    return found


def table(document: dict[str, Any]) -> str:
    """Return the main content of metrics.json as text for a terminal, figures in percent.

    Of every unknown set the main scores, and with --fit or --odin two figures of all others; of
    groups of sets, whose means are what is quoted, all scores instead.
    """
    known = document[KNOWN]
    split = document["split"]
    lines = [
        f"known classes: {few(document['classes'])}",
        *([f"split: {split['protocol']} {split['family']}{split['list']}"] if split else []),
        f"accuracy {100 * known['accuracy']:.2f} % on {known['n']:,} known images" + _bad(known),
    ]
    if document[UNKNOWN]:
        lines += ["", *_set_rows(document[UNKNOWN])]
        lone = {name: images for name, images in document[UNKNOWN].items() if not images["group"]}
        others = _others(document[UNKNOWN])
        if lone and ASKED_FOR.intersection(others):
            lines += ["", *_other_rows(lone, others), "all other metrics: metrics.json"]
        elif others:
            count = len(others)
            lines.append(f"{count} further scores and the metrics left out here: metrics.json")
    if document.get("groups"):
        lines += ["", *_group_rows(document["groups"])]
    if document.get("shifted"):
        lines += ["", *_shifted_rows(document)]
    return "\n".join([*lines, *(f"note: {note}" for note in document["notes"])])


def _set_rows(sets: Mapping[str, Any]) -> list[str]:
    width = max(len("unknown set"), *map(len, sets))
    shown = {name: _main(images["scores"]) for name, images in sets.items()}
    wide = max(len("score"), *(len(score) for scores in shown.values() for score in scores))
    blank = f"{'':{width}} {'':>7}  {'':{wide}}"
    lines = [
        f"{blank}  AUROC                           ---- AUPR ----  ------ FPR95 ------",
        f"{'unknown set':{width}} {'images':>7}  {'score':{wide}}         95 % interval      OSCR"
        "   known unknown   unknown    known",
        f"{blank}                                                  accepted rejected",
    ]
    for name, images in sets.items():
        head = f"{name:{width}} {images['n']:7,}"
        for score in shown[name]:
            figures = images["scores"][score]
            f = {metric: 100 * x for metric, x in figures.items() if isinstance(x, float)}
            low, high = (100 * end for end in figures["auroc_ci"])
            lines.append(
                f"{head}  {score:{wide}} {f['auroc']:6.2f} [{low:6.2f} {high:6.2f}]  "
                f"{f['oscr']:8.2f}  {f['aupr_known']:6.2f} {f['aupr_unknown']:7.2f}  "
                f"{f['fpr95_unknown_accepted']:8.2f} {f['fpr95_known_rejected']:8.2f}"
            )
            head = " " * len(head)
        if "macro_f1" in next(iter(images["scores"].values())):
            f1 = {score: images["scores"][score]["macro_f1"] for score in shown[name]}
            lines += _beside(head, "macro-F1 over K + 1 classes:", f1)
        if images["cues"]:
            lines += _beside(head, "cues, either way:", images["cues"])
        if images["bad"]:
            lines.append(f"{name}:{_bad(images)}")
    return lines


def _others(sets: Mapping[str, Any]) -> list[str]:
    """Return the scores that are no main ones; every set has the same."""
    scores = next(iter(sets.values()))["scores"]
    return [score for score in scores if score not in MAIN_SCORES]


def _other_rows(sets: Mapping[str, Any], scores: Sequence[str]) -> list[str]:
    """Return AUROC and FPR95 of scores, the sets side by side, in a hundred columns."""
    wide = max(len("other scores"), *map(len, scores))
    column = max(18, *(len(name) + 2 for name in sets))
    at_once = max(1, (100 - wide) // column)
    lines: list[str] = []
    for start in range(0, len(sets), at_once):
        names = list(sets)[start : start + at_once]
        lines += [
            *([""] if lines else []),
            " " * wide + "".join(f"{name:>{column}}" for name in names),
            f"{'other scores':{wide}}" + f"{'AUROC':>{column - 9}}    FPR95" * len(names),
            f"{'':{wide}}" + f"{'rejected':>{column}}" * len(names),
        ]
        for score in scores:
            cells = ""
            for name in names:
                figures = sets[name]["scores"][score]
                cells += f"{100 * figures['auroc']:{column - 9}.2f}"
                cells += f"{100 * figures['fpr95_known_rejected']:9.2f}"
            lines.append(f"{score:{wide}}{cells}")
    return lines


def _beside(head: str, what: str, figures: Mapping[str, float]) -> list[str]:
    """Return a row of figures with their names, below the scores of a set."""
    text = ", ".join(f"{name} {100 * figure:.1f}" for name, figure in figures.items())
    indent = " " * (len(head) + 2)
    return textwrap.wrap(f"{what} {text}", 100, initial_indent=indent, subsequent_indent=indent)


def _group_rows(groups: Mapping[str, Any]) -> list[str]:
    """Return the means of the groups side by side, as the literature prints them."""
    scores = dict.fromkeys(score for group in groups.values() for score in group["scores"])
    cues = dict.fromkeys(cue for group in groups.values() for cue in group["cues"])
    wide = max(len("mean of group"), *(len(name) for name in (*scores, *cues)))
    lines = [
        *(f"{name}: mean over {', '.join(group['sets'])}" for name, group in groups.items()),
        " " * wide + "".join(f"  {name:>8} AUROC   FPR95" for name in groups),
        f"{'mean of group':{wide}}" + f"  {'':>8}       rejected" * len(groups),
    ]
    for score in scores:
        cells = ""
        for group in groups.values():
            figures = group["scores"][score]
            cells += f"  {100 * figures['auroc']:14.2f}"
            cells += f" {100 * figures['fpr95_known_rejected']:7.2f}"
        lines.append(f"{score:{wide}}{cells}")
    for cue in cues:
        cells = ""
        for group in groups.values():
            area = group["cues"].get(cue)
            cells += f"  {'' if area is None else format(100 * area, '.2f'):>14} {'':>7}"
        lines.append(f"{cue:{wide}}{cells}".rstrip() + "  (cue)")
    return lines


def _shifted_rows(document: Mapping[str, Any]) -> list[str]:
    sets = document["shifted"]
    width = max(len("known under shift"), *map(len, sets))
    scores = _main(next(iter(sets.values()))["scores"])
    lines = [
        f"{'':{width}} {'':>7} {'':>8}   AUROC of the test set against it (50 = shift not minded)",
        f"{'known under shift':{width}} {'images':>7} {'accuracy':>8}"
        + "".join(f" {score:>11}" for score in scores),
    ]
    for name, images in sets.items():
        areas = "".join(f" {100 * images['scores'][score]['auroc']:11.2f}" for score in scores)
        lines.append(f"{name:{width}} {images['n']:7,} {100 * images['accuracy']:8.2f}{areas}")
        if images["bad"]:
            lines.append(f"{name}:{_bad(images)}")
    full = document["full_spectrum"]
    lines += [
        "",
        "full spectrum, all known images together: accuracy "
        f"{100 * full['accuracy']:.2f} % on {full['n']:,} images",
        *(_group_rows(full["groups"]) if full["groups"] else ()),
    ]
    return lines


def _main(scores: Mapping[str, Any]) -> list[str]:
    return [score for score in scores if score in MAIN_SCORES]


def _bad(images: dict[str, Any]) -> str:
    return f" ({images['bad']:,} could not be read and were left out)" if images["bad"] else ""
