"""`backmix report`: one page about some runs, which opens from disk and asks no network.

Every figure in it is taken from the run folders (`results.py`); charts are SVG (`figures.py`),
pictures are drawn by `preview.py`. Names of classes, files and sets are foreign text: the template
escapes everything but the charts.
"""

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from backmix.train import metrics
from backmix.train.claims import (
    Evidence,
    Network,
    background_evidence,
    embedding,
    look,
    open_network,
    ssod_locations,
    stored_images,
    surrogate_features,
)
from backmix.train.decide.colleague import for_colleagues
from backmix.train.figures import (
    Chart,
    Histogram,
    Panel,
    Scatter,
    Series,
    acceptance_curve,
    histogram_chart,
    line_chart,
    scatter_chart,
)
from backmix.train.options import PreviewOptions, Ssod, host_of
from backmix.train.outputs import Outputs
from backmix.train.page import check_page, embedded, write_page
from backmix.train.preview import grid_picture, map_picture, run_examples
from backmix.train.results import (
    COMPARED,
    METRICS,
    OWN_SCORES,
    SCORE_NAMES,
    Group,
    Judged,
    Row,
    Table,
    markdown,
    read_all,
    run_folders,
    tables,
    unpaired,
    unpaired_notes,
)
from backmix.train.scores import SCORES

_SHARES = np.linspace(0, 1, 201)
"""Shares of accepted unknown images at which curves are read."""
_READ_AT = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Those that the data tables below the curves show."""
_MOST_PICTURES = 6
_LARGEST_EXACT = 64
"""Views up to this side are kept pixel by pixel; larger ones are compressed [pixels]."""
_LOOKED_AT = 512, 128
"""Images of a set whose background is measured: of small views, and of larger ones."""
_POINTS = 120
"""Features of each kind that are laid out in the plane."""
_BACKGROUNDS = (
    "background of known images",
    "of unknown images",
    "half of the other cells of known images are to the right",
)
_COMMON = ("max_logit", "msp", "energy")
"""Scores that are shown of every method, after its own; the others are folded away."""
_FUNCTIONS = {score.__name__: score for score in SCORES}


@dataclass(frozen=True)
class Picture:
    """A picture of one configuration, or why there is none."""

    label: str
    text: str
    source: str
    """data: URI; empty where there is no picture."""
    alt: str = ""
    """What it shows, for readers who do not see it."""


@dataclass(frozen=True)
class Claims:
    """What the runs show of the claims that methods make of image backgrounds."""

    locations: list[Picture]
    """SSOD: its samples and its rejection logits."""
    evidence: Chart | None
    """Class evidence in the background; None where no run's test images are at hand."""
    embeddings: list[Chart]
    """Features of known, unknown and what stands in for them."""
    missing: list[str]
    """What cannot be shown, and why."""


def write_report(runs: Sequence[Path], out: Path, program: str = "") -> str:
    """Write the page about finished and evaluated runs; returns its tables as Markdown.

    Args:
        runs: run folders, or the folder of a table, which stands for its runs; those that differ
            only in seed, class list or data are averaged.
        out: the HTML file; replaced if it exists.
        program: as in `trained.load_model`; without it what needs such a network is left out.

    Raises:
        ValueError: a folder holds no run, an unfinished or unevaluated one, or damaged files; the
            same run twice; or the packages of the extra `report` are not installed.
        OSError: `out` cannot be written.
    """
    check_page(out, "report")
    groups = read_all(run_folders(runs))
    results = tables(groups)
    notes = _notes(groups)
    values = {
        "title": _title(groups),
        "facts": _facts(groups),
        "colleagues": for_colleagues(groups, program),
        "tables": [(table, *_folded(table, groups)) for table in results],
        "score_names": SCORE_NAMES,
        "metric_names": METRICS,
        "compared": COMPARED,
        "notes": notes,
        "markdown": markdown(results),
        "charts": _charts(groups, results),
        "pictures": _pictures(groups),
        "claims": _claims(groups, program),
        "run_rows": _run_rows(groups),
        "health": _health(groups),
        "numbers": embedded(_numbers(groups)),
    }
    write_page(out, "report.html.j2", values)
    short = [
        replace(table, rows=tuple(row for _, rows in _folded(table, groups)[0] for row in rows))
        for table in results
    ]
    return "\n".join([markdown(short), *(f"- {note}" for note in notes)])


def main_scores(groups: Sequence[Group]) -> list[str]:
    """Return the scores that a reader wants first: those of the methods, then the common ones."""
    own = [score for group in groups for score in _own_scores(group)]
    return list(dict.fromkeys((*own, *_COMMON)))


def _own_scores(group: Group) -> tuple[str, ...]:
    method = group.runs[0].config["run"]["method"]
    return OWN_SCORES.get(method.get("host", method)["type"], ())


def _folded(
    table: Table, groups: Sequence[Group]
) -> tuple[list[tuple[str, list[Row]]], list[tuple[str, list[Row]]]]:
    """Return the rows of the main scores, score by score, and those of the others."""
    blocks = dict(table.blocks)
    main = [score for score in main_scores(groups) if score in blocks]
    others = [block for block in blocks.items() if block[0] not in main]
    return [(score, blocks[score]) for score in main], others


# --- text ---------------------------------------------------------------------------------------


def _title(groups: Sequence[Group]) -> str:
    labels = ", ".join(group.label for group in groups)
    return labels if len(labels) <= 90 else f"{len(groups)} configurations"


def _facts(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Return what the runs are and come from: names and values, each value once with its count."""
    runs = [run for group in groups for run in group.runs]
    first, last = min(run.began for run in runs), max(run.ended for run in runs)
    split = [
        f"{s['protocol']}, family {s['family']}, list {s['list']}"
        for run in runs
        if (s := run.metrics["split"])
    ]
    return [
        ("Runs", [f"{len(runs)}, of {len(groups)} configuration{'s' * (len(groups) > 1)}"]),
        ("Date", [f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"]),
        ("Known classes", _counted(_few(run.config["classes"]) for run in runs)),
        *([("Class lists", _counted(split))] if split else []),
        ("Seeds", [", ".join(map(str, sorted({run.config["run"]["seed"] for run in runs})))]),
        (
            "Training data",
            _counted(
                f"{', '.join(Path(file).name for file in run.config['data']['files'])}: "
                f"{run.config['data']['samples']:,} training images, digest "
                f"{run.config['data']['digest']}"
                for run in runs
            ),
        ),
        (
            "Network",
            _counted(
                f"{run.config['run']['model']} at {run.config['run']['loader']['size']} px, "
                f"{run.config['run']['epochs']} epochs"
                for run in runs
            ),
        ),
        ("Machine", _counted(_shown(run.config.get("resolved", {})) for run in runs)),
        ("Versions", _counted(_shown(run.config["versions"]) for run in runs)),
        ("Commit", _counted(run.config["commit"] for run in runs)),
    ]


def _notes(groups: Sequence[Group]) -> list[str]:
    """Return what a reader of the tables must know: each sentence once, with its rows' labels."""
    runs = [(group.label, run) for group in groups for run in group.runs]
    baselines = [run for _, run in runs if run.is_baseline]
    told: dict[str, Counter[str]] = {}
    for label, run in runs:
        for note in run.metrics.get("notes", []):
            told.setdefault(note, Counter())[label] += 1
    counts = Counter(label for label, _ in runs)
    notes = unpaired_notes((label, unpaired(run, baselines)) for label, run in runs)
    for note, labels in told.items():
        each = [
            label if number == counts[label] else f"{label} ({number} of {counts[label]} runs)"
            for label, number in labels.items()
        ]
        notes.append(note if labels == counts else f"{', '.join(each)}: {note}")
    return notes


def _run_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return one row per run, unknown set and score, with every figure."""
    return [
        {
            "label": group.label,
            "run": run.name,
            "unknown": unknown,
            "score": SCORE_NAMES.get(score, score),
            "accuracy": run.metrics["known"]["accuracy"],
            "figures": [figures[metric] for metric in METRICS],
        }
        for group in groups
        for run in group.runs
        for unknown, images in run.metrics["unknown"].items()
        for score, figures in images["scores"].items()
    ]


def _health(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return per run what went wrong on the way: void steps and unreadable test images."""
    return [
        {
            "label": group.label,
            "run": run.name,
            "folder": str(run.folder),
            "command": run.config["command"],
            "void": sum(row.get("bad_steps", 0) for row in run.log),
            "bad": [name for outputs in (run.known, *run.unknown.values()) for name in outputs.bad],
            "notes": run.metrics.get("notes", []),
        }
        for group in groups
        for run in group.runs
    ]


def _numbers(groups: Sequence[Group]) -> dict[str, Any]:
    """Return everything that the tables are made of, as plain values."""
    return {
        "groups": [
            {
                "label": group.label,
                "runs": [
                    {
                        "folder": str(run.folder),
                        "config": run.config,
                        "metrics": run.metrics,
                        "log": run.log,
                    }
                    for run in group.runs
                ],
            }
            for group in groups
        ]
    }


# --- charts -------------------------------------------------------------------------------------


def _charts(groups: Sequence[Group], results: Sequence[Table]) -> list[Chart]:
    charts = []
    for table in results:
        judged = [
            Group(group.label, runs)
            for group in groups
            if (runs := tuple(run for run in group.runs if table.unknown in run.unknown))
        ]
        there = {row.score for row in table.rows}
        scores = [
            score
            for score in main_scores(groups)
            if score in there and any(_has(group, table.unknown, score) for group in judged)
        ]
        if scores:
            charts += [
                _curves(judged, table, scores, "auroc"),
                _curves(judged, table, scores, "oscr"),
                _histograms(judged, table.unknown),
            ]
    return [*charts, _training(groups)]


def _values(outputs: Outputs, score: str) -> np.ndarray:
    """Return a score of a stored set, float64 [n]."""
    stored = outputs.scores.get(score)
    return _FUNCTIONS[score](outputs.logits) if stored is None else stored


def _has(group: Group, unknown: str, score: str) -> bool:
    """Return whether all runs of a group have a score that can be drawn."""
    return all(
        (score in outputs.scores or score in _FUNCTIONS)
        and run.figure("auroc", unknown, score) is not None
        for run in group.runs
        for outputs in (run.known, run.unknown[unknown])
    )


def _curves(groups: Sequence[Group], table: Table, scores: Sequence[str], area: str) -> Chart:
    """Return the ROC curves (area auroc) or OSCR curves (area oscr) of some scores."""
    known_axis = "known accepted" if area == "auroc" else "known accepted and right"
    panels = []
    rows = []
    for score in scores:
        series = []
        for group in (group for group in groups if _has(group, table.unknown, score)):
            curve = np.mean([_curve(run, table.unknown, score, area) for run in group.runs], 0)
            series.append(Series(group.label, _SHARES, curve))
            at = np.interp(_READ_AT, _SHARES, curve)
            rows.append((SCORE_NAMES.get(score, score), group.label, *(f"{y:.1%}" for y in at)))
        panels.append(
            Panel(
                SCORE_NAMES.get(score, score),
                "share of unknown accepted",
                f"share of {known_axis}",
                tuple(series),
                shares=True,
                chance=area == "auroc",
            )
        )
    name = METRICS[area]
    areas = "; ".join(
        f"{SCORE_NAMES.get(score, score)}: "
        + ", ".join(
            f"{row.label} {row.figures[area].percent()}" for row in table.rows if row.score == score
        )
        for score in scores
    )
    what = "ROC curves" if area == "auroc" else "OSCR curves"
    return Chart(
        title=f"{what}, unknown set “{table.unknown}”",
        text=f"Area under the curve ({name}, percent): {areas}. A curve is the mean over the runs.",
        svg=line_chart(panels),
        header=("score", "method", *(f"at {share:.0%} of unknown accepted" for share in _READ_AT)),
        rows=tuple(rows),
    )


def _curve(run: Judged, unknown: str, score: str, area: str) -> np.ndarray:
    known, counted = _values(run.known, score), np.ones(len(run.known), bool)
    if area == "oscr":
        counted = run.known.logits.argmax(1) == run.known.labels
    return acceptance_curve(known, counted, _values(run.unknown[unknown], score), _SHARES)


def _histograms(groups: Sequence[Group], unknown: str) -> Chart:
    """Return the scores of the first run of every configuration, each by its own score."""
    histograms, rows, accepted = [], [], []
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    for group in groups:
        run = group.runs[0]
        usable = [s for s in (*_own_scores(group), *_COMMON) if _has(group, unknown, s)]
        if not usable:
            continue
        score = usable[0]
        known, others = _values(run.known, score), _values(run.unknown[unknown], score)
        threshold = metrics.acceptance_threshold(known)
        name = SCORE_NAMES.get(score, score)
        histograms.append(Histogram(f"{group.label}, {run.name}: {name}", known, others, threshold))
        share = metrics.fpr95_unknown_accepted(known, others)
        accepted.append(f"{group.label} ({name}) {share:.1%}")
        for kind, values in (("known", known), ("unknown", others)):
            at = np.quantile(values, quantiles)
            rows.append((group.label, name, kind, *(f"{value:.2f}" for value in at)))
    return Chart(
        title=f"Scores of known and unknown images, unknown set “{unknown}”",
        text=(
            "Unknown images to the right of the line that 95% of the known ones reach, first run "
            f"of each method, by the method's own score: {', '.join(accepted)}."
        ),
        svg=histogram_chart(histograms, "score (right: more known)"),
        header=("method", "score", "images", *(f"{share:.0%} quantile" for share in quantiles)),
        rows=tuple(rows),
    )


def _training(groups: Sequence[Group]) -> Chart:
    """Return loss, accuracy and, where it was logged, mask hit over the epochs."""
    titles = {
        "loss": "Training loss",
        "accuracy": "Training accuracy",
        "mask_hit": "True foreground under the mask",
    }
    lines: dict[str, list[Series]] = {name: [] for name in titles}
    rows, ends = [], []
    for group in groups:
        x = _epochs(group.runs[0])
        for name, series in lines.items():
            means = [
                np.interp(x, _epochs(run), [row[name] for row in run.log])
                for run in group.runs
                if run.log and all(name in row for row in run.log)
            ]
            if means:
                series.append(Series(group.label, x, np.mean(means, 0)))
        shown = [
            series[-1].y for series in lines.values() if series and series[-1].name == group.label
        ]
        if shown:
            ends.append(f"{group.label} loss {shown[0][-1]:.3f}, accuracy {shown[1][-1]:.1%}")
            for at in sorted({round(i) for i in np.linspace(0, len(x) - 1, 10)}):
                figures = [f"{y[at]:.3f}" for y in shown]
                rows.append((group.label, f"{x[at]:.2f}", *figures, *[""] * (3 - len(figures))))
    panels = [
        Panel(titles[name], "epoch", "mean over the runs", tuple(series))
        for name, series in lines.items()
        if series
    ]
    return Chart(
        title="Training",
        text=f"At the end of training: {'; '.join(ends)}. On mixed images where the method mixes.",
        svg=line_chart(panels) if panels else "",
        header=("method", "epoch", "loss", "accuracy", "true foreground under the mask"),
        rows=tuple(rows),
    )


def _epochs(run: Judged) -> np.ndarray:
    """Return where the rows of a log stand, in epochs, float64 [rows]."""
    samples = run.config["data"]["samples"]
    return np.array([row["epoch"] + row["consumed"] / samples for row in run.log])


# --- pictures -----------------------------------------------------------------------------------


def _pictures(groups: Sequence[Group]) -> list[Picture]:
    mixing = [g for g in groups if g.runs[0].config["run"]["method"]["type"] == "BackMix"]
    return [_picture(group) for group in mixing[:_MOST_PICTURES]]


def _picture(group: Group) -> Picture:
    """Draw the mixes of a configuration's first run; its data may have gone, the page may not."""
    run = group.runs[0]
    small = _is_small(run)
    try:
        examples = run_examples(run.folder, None, PreviewOptions(rows=8 if small else 4))
        kind = "png" if small else "webp"
        source = _data_uri(grid_picture(examples, kind), kind)
    except (ValueError, OSError) as error:
        return Picture(group.label, f"There is no picture: {error}", "")
    pairs = zip(examples.target_names, examples.donor_names, strict=True)
    each = ", ".join(f"{target} with a patch of {donor}" for target, donor in pairs)
    maps = "the donor's map, " if examples.heat is not None else ""
    return Picture(
        group.label,
        f"First run ({run.name}). {examples.caption}",
        source,
        f"Target, {maps}donor with its mask, and mix of {len(examples.targets)} examples: {each}.",
    )


def _is_small(run: Judged) -> bool:
    return run.config["run"]["loader"]["size"] <= _LARGEST_EXACT


def _data_uri(picture: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


# --- claims -------------------------------------------------------------------------------------


def _claims(groups: Sequence[Group], program: str) -> Claims:
    """Look at the first run of every configuration; what has gone leaves a sentence."""
    locations, embeddings, missing = [], [], []
    measured: list[tuple[Group, str, Evidence, Evidence]] = []
    for group in groups[:_MOST_PICTURES]:
        run = group.runs[0]
        try:
            network = open_network(run.folder, program)
        except (ValueError, OSError) as error:
            missing.append(f"{group.label}: {error}")
            continue
        if isinstance(host_of(network.trained.options.method), Ssod):
            try:
                locations.append(_locations(group, network))
            except (ValueError, OSError) as error:
                missing.append(f"{group.label}, sampled locations: {error}")
        try:
            measured += _evidence_of(group, network)
        except (ValueError, OSError) as error:
            missing.append(f"{group.label}, evidence of background: {error}")
        if run.unknown:
            try:
                embeddings.append(_embedding(group, network, missing))
            except (ValueError, OSError) as error:
                missing.append(f"{group.label}, features: {error}")
    if len(groups) > _MOST_PICTURES:
        missing.append(f"the configurations after the first {_MOST_PICTURES}: they would be many")
    return Claims(locations, _evidence(measured), embeddings, missing)


def _locations(group: Group, network: Network) -> Picture:
    found = ssod_locations(network, 8 if _is_small(group.runs[0]) else 4)
    maps = [("P(own class)", found.p_true, (0.0, 1.0))]
    if found.rejection is not None:
        most = float(np.abs(found.rejection).max())
        maps.append(("rejection logit", found.rejection, (-most, most)))
    picture = map_picture(found.views, found.names, maps, (found.known, found.unknown))
    known, unknown = found.known.sum((1, 2)), found.unknown.sum((1, 2))
    run = group.runs[0]
    mixed = run.config["run"]["method"]["type"] == "BackMix"
    besides = " In training the mix says besides what is background." if mixed else ""
    each = ", ".join(
        f"{name}: {k} known, {u} unknown"
        for name, k, u in zip(found.names, known, unknown, strict=True)
    )
    return Picture(
        group.label,
        f"First run ({run.name}), training images without augmentation. By the "
        f"probability of the image's own class at a location, {found.rule}. "
        f"Of {found.known.size} locations {known.sum()} are known (+), {unknown.sum()} unknown (x)."
        f"{besides}",
        _data_uri(picture, "webp"),
        f"Training image, probability of its class at each location, and what the rejection head "
        f"says there. Locations sampled: {each}.",
    )


def _evidence_of(group: Group, network: Network) -> list[tuple[Group, str, Evidence, Evidence]]:
    """Return the evidence in known images, and in those of each unknown set."""
    run = group.runs[0]
    count = _LOOKED_AT[0] if _is_small(run) else _LOOKED_AT[1]

    def of(outputs: Outputs) -> Evidence:
        return background_evidence(network, look(network, stored_images(outputs, count)))

    known = of(run.known)
    sets = []
    problems = []
    for name, outputs in run.unknown.items():
        try:
            sets.append((group, name, known, of(outputs)))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if not sets:
        raise ValueError("; ".join(problems) or "there is no unknown set")
    return sets


def _evidence(measured: Sequence[tuple[Group, str, Evidence, Evidence]]) -> Chart | None:
    """Return the evidence of background cells, a panel a method, for its first unknown set."""
    if not measured:
        return None
    histograms, rows, sentences = [], [], []
    drawn = set()
    for group, unknown, known, others in measured:
        middle = float(np.median(known.of_rest))
        first = group.label not in drawn
        drawn.add(group.label)
        shares = []
        for name, found in (("known", known), (unknown, others)):
            share = float((found.of_background > middle).mean())
            shares.append(f"{name} {share:.1%}")
            if name != "known" or first:
                figures = (found.of_background.mean(), found.of_rest.mean(), found.largest.mean())
                images = f"{len(found.largest):,}"
                row = (group.label, name, images, *(f"{value:.2f}" for value in figures))
                rows.append((*row, f"{share:.1%}"))
        sentences.append(f"{group.label} {', '.join(shares)}")
        if first:
            title = f"{group.label}, “{unknown}”"
            backgrounds = known.of_background, others.of_background
            histograms.append(Histogram(title, *backgrounds, middle))
    return Chart(
        title="Class evidence of background cells",
        text=(
            "Background cells that speak for some class more than half of the other cells of "
            f"known images do, first run of each method: {'; '.join(sentences)}."
        ),
        svg=histogram_chart(
            histograms,
            "greatest logit of a cell",
            _BACKGROUNDS,
            "cells",
        ),
        header=(
            "method",
            "images",
            "number",
            "background, mean",
            "other cells, mean",
            "largest logit of the image, mean",
            "background above the line",
        ),
        rows=tuple(rows),
    )


def _embedding(group: Group, network: Network, missing: list[str]) -> Chart:
    """Return features in the plane; what stands in for unknown images may be missing."""
    run = group.runs[0]
    name, outputs = next(iter(run.unknown.items()))
    known, unknown = (_spaced(each.features) for each in (run.known, outputs))
    surrogate, what = None, ""
    try:
        surrogate, what = surrogate_features(network, _POINTS)
    except (ValueError, OSError) as error:
        missing.append(f"{group.label}, what stands in for unknown images: {error}")
    found = embedding(known, unknown, surrogate)
    kinds = {"known": "known", "unknown": "unknown", "surrogate": "stands in for unknown"}
    panels = [
        Scatter(title, tuple((kinds[kind], places) for kind, places in points.items()))
        for title, points in (("principal axes", found.pca), ("t-SNE", found.tsne))
    ]
    text = f"First run ({run.name}); {len(known)} known images, {len(unknown)} of “{name}”"
    if surrogate is None:
        text += ". Nothing stands in for unknown images here"
    else:
        text += (
            f", and {len(surrogate)} {what}, from training images. Nearer to one of these than to "
            f"any known image are {found.nearer['unknown']:.1%} of the unknown images and "
            f"{found.nearer['known']:.1%} of the known ones (to any other)"
        )
    rows = []
    for kind, points in found.pca.items():
        middle, spread = points.mean(0), points.std(0)
        row = (kinds[kind], str(len(points)))
        rows.append((*row, *(f"{m:.2f} ± {s:.2f}" for m, s in zip(middle, spread, strict=True))))
    return Chart(
        title=f"Directions of features: {group.label}",
        text=f"{text}. The two principal axes have {found.explained:.0%} of the variance.",
        svg=scatter_chart(panels),
        header=("kind", "number", "first axis", "second axis"),
        rows=tuple(rows),
    )


def _spaced(features: np.ndarray) -> np.ndarray:
    """Return at most `_POINTS` rows, evenly spaced."""
    count = min(_POINTS, len(features))
    return np.asarray(features[np.arange(count) * len(features) // max(count, 1)])


# --- small things -------------------------------------------------------------------------------


def _counted(values: Iterable[str]) -> list[str]:
    """Return each value once; with the number of runs where not all share it."""
    counts = Counter(values)
    if len(counts) == 1:
        return list(counts)
    return [f"{value} ({n} run{'s' * (n > 1)})" for value, n in counts.items()]


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12])
    return f"{len(names)}: {shown}, ..." if len(names) > 12 else f"{len(names)}: {shown}"


def _shown(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
