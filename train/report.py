"""`backmix report`: one page about some runs, which opens from disk and asks no network.

Every figure in it is taken from the run folders (`results.py`); charts are SVG (`figures.py`),
pictures are drawn by `preview.py`. Names of classes, files and sets are foreign text: the template
escapes everything but the charts.
"""

import base64
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backmix.train import metrics
from backmix.train.checkpoint import write_atomically
from backmix.train.figures import (
    Chart,
    Histogram,
    Panel,
    Series,
    acceptance_curve,
    histogram_chart,
    line_chart,
)
from backmix.train.options import PreviewOptions
from backmix.train.preview import grid_picture, run_examples
from backmix.train.results import (
    COMPARED,
    METRICS,
    SCORE_NAMES,
    Group,
    Judged,
    Table,
    markdown,
    read_all,
    tables,
)
from backmix.train.scores import SCORES

_SHARES = np.linspace(0, 1, 201)
"""Shares of accepted unknown images at which curves are read."""
_READ_AT = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Those that the data tables below the curves show."""
_MOST_PICTURES = 6
_LARGEST_EXACT = 64
"""Views up to this side are kept pixel by pixel; larger ones are compressed [pixels]."""
_FUNCTIONS = {score.__name__: score for score in SCORES}


@dataclass(frozen=True)
class Picture:
    """The mixes of one configuration, or why there are none."""

    label: str
    text: str
    source: str
    """data: URI; empty where there is no picture."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Class of target and of donor, in reading order."""


def write_report(runs: Sequence[Path], out: Path) -> str:
    """Write the page about finished and evaluated runs; returns its tables as Markdown.

    Args:
        runs: run folders; those that differ only in seed, class list or data are averaged.
        out: the HTML file; replaced if it exists.

    Raises:
        ValueError: a folder holds no run, an unfinished or unevaluated one, or damaged files; the
            same run twice; or the packages of the extra `report` are not installed.
        OSError: `out` cannot be written.
    """
    if not out.name:
        raise ValueError("the page needs a name: -o FILE.html")
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the report needs the package {error.name}: pip install 'backmix[report]'"
        ) from error
    if not out.parent.is_dir():
        raise ValueError(f"{out} cannot be written: there is no folder {out.parent}")
    groups = read_all(runs)
    results = tables(groups)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        title=_title(groups),
        facts=_facts(groups),
        tables=results,
        score_names=SCORE_NAMES,
        metric_names=METRICS,
        compared=COMPARED,
        markdown=markdown(results),
        charts=_charts(groups, results),
        pictures=_pictures(groups),
        groups=groups,
        run_rows=_run_rows(groups),
        health=_health(groups),
        numbers=_embedded(_numbers(groups)),
    )
    write_atomically(out, page.encode())
    return markdown(results)


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


def _embedded(value: Any) -> str:
    """Return JSON that may stand inside a script element: nothing in it can end the element."""
    text = json.dumps(value)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


# --- charts -------------------------------------------------------------------------------------


def _charts(groups: Sequence[Group], results: Sequence[Table]) -> list[Chart]:
    charts = []
    for table in results:
        judged = [
            Group(group.label, runs)
            for group in groups
            if (runs := tuple(run for run in group.runs if table.unknown in run.unknown))
        ]
        scores = [s for s in dict.fromkeys(row.score for row in table.rows) if s in _FUNCTIONS]
        if scores:
            charts += [
                _curves(judged, table, scores, "auroc"),
                _curves(judged, table, scores, "oscr"),
                _histograms(
                    judged, table.unknown, "max_logit" if "max_logit" in scores else scores[0]
                ),
            ]
    return [*charts, _training(groups)]


def _curves(groups: Sequence[Group], table: Table, scores: Sequence[str], area: str) -> Chart:
    """Return the ROC curves (area auroc) or OSCR curves (area oscr) of all scores."""
    known_axis = "known accepted" if area == "auroc" else "known accepted and right"
    panels = []
    rows = []
    for score in scores:
        series = []
        for group in groups:
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
    known, counted = _FUNCTIONS[score](run.known.logits), np.ones(len(run.known), bool)
    if area == "oscr":
        counted = run.known.logits.argmax(1) == run.known.labels
    return acceptance_curve(known, counted, _FUNCTIONS[score](run.unknown[unknown].logits), _SHARES)


def _histograms(groups: Sequence[Group], unknown: str, score: str) -> Chart:
    """Return the scores of the first run of every configuration, known and unknown."""
    histograms, rows, accepted = [], [], []
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    for group in groups:
        run = group.runs[0]
        known, others = (
            _FUNCTIONS[score](outputs.logits) for outputs in (run.known, run.unknown[unknown])
        )
        threshold = metrics.acceptance_threshold(known)
        histograms.append(Histogram(f"{group.label}, {run.name}", known, others, threshold))
        share = metrics.fpr95_unknown_accepted(known, others)
        accepted.append(f"{group.label} {share:.1%}")
        for kind, values in (("known", known), ("unknown", others)):
            at = np.quantile(values, quantiles)
            rows.append((group.label, kind, *(f"{value:.2f}" for value in at)))
    name = SCORE_NAMES.get(score, score)
    return Chart(
        title=f"{name} of known and unknown images, unknown set “{unknown}”",
        text=(
            "Unknown images to the right of the line that 95% of the known ones reach, first run "
            f"of each method: {', '.join(accepted)}."
        ),
        svg=histogram_chart(histograms, f"{name} (right: more known)"),
        header=("method", "images", *(f"{share:.0%} quantile" for share in quantiles)),
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
    mixing = [group for group in groups if not group.runs[0].is_baseline]
    return [_picture(group) for group in mixing[:_MOST_PICTURES]]


def _picture(group: Group) -> Picture:
    """Draw the mixes of a configuration's first run; its data may have gone, the page may not."""
    run = group.runs[0]
    small = run.config["run"]["loader"]["size"] <= _LARGEST_EXACT
    try:
        examples = run_examples(run.folder, None, PreviewOptions(rows=8 if small else 4))
        kind = "png" if small else "webp"
        encoded = base64.b64encode(grid_picture(examples, kind)).decode()
    except (ValueError, OSError) as error:
        return Picture(group.label, f"There is no picture: {error}", "")
    return Picture(
        group.label,
        f"First run ({run.name}). {examples.caption}",
        f"data:image/{kind};base64,{encoded}",
        tuple(zip(examples.target_names, examples.donor_names, strict=True)),
    )


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
