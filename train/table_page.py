"""What a grid of runs came to: as one JSON document, and as a page made from the document alone.

The document is what is kept and published; the page can be made again from it at any time.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from backmix.train import protocols
from backmix.train.results import (
    OWN_SCORES,
    SCORE_NAMES,
    Group,
    Judged,
    Spread,
    pair_key,
    problem_of,
    row_of,
    unpaired,
    unpaired_notes,
)

COMMON = ("max_logit", "msp")
"""Scores that are shown of every method that has them, after its own."""


def table_document(groups: Sequence[Group]) -> dict[str, Any]:
    """Return every figure of a grid of runs as plain JSON values, in [0, 1].

    {"problem": protocol and family, "runs": [{"folder", "method", "list", "seed", "repeats",
    "model", "epochs", "commit", "torch", "device", "minutes", "command", "notes", "unpaired": why
    there is no difference to softmax, or nothing}], "sets":
    {UNKNOWN: {"known": [smallest, greatest number of images], "unknown": likewise, "cues": {CUE:
    [figure]}}}, "means": {NAME: [UNKNOWN]}, the groups of sets over which a bench takes the mean,
    "rows": [{"method", "unknown": a set or the name of such a mean, "score", "own": whether it is
    the method's own, "runs": [folder], "figures": {METRIC: [a value a run]}, "differences":
    {METRIC: [a value a pair]}}]}.
    `repeats` marks runs on a class list that poses the same problem as an earlier one.
    """
    runs = [run for group in groups for run in group.runs]
    baselines = {pair_key(run): run for run in runs if run.is_baseline}
    sets = dict.fromkeys(name for run in runs for name in run.metrics["unknown"])
    means = {name: mean["sets"] for run in runs for name, mean in run.means.items()}
    rows = []
    for unknown in (*sets, *means):
        for group in groups:
            judged = [run for run in group.runs if run.scores_on(unknown)]
            scores = dict.fromkeys(score for run in judged for score in run.scores_on(unknown))
            for score in scores:
                having = [run for run in judged if run.figure("auroc", unknown, score) is not None]
                row = row_of(score, group.label, having, unknown, baselines)
                changes = {name: list(spread.values) for name, spread in row.differences.items()}
                rows.append(
                    {
                        "method": group.label,
                        "unknown": unknown,
                        "score": score,
                        "own": score in _own_scores(group.runs[0]),
                        "runs": [run.folder.name for run in having],
                        "figures": {name: list(v.values) for name, v in row.figures.items()},
                        "differences": changes,
                    }
                )
    return {
        "problem": _each(problem_of(run) for run in runs),
        "runs": [
            _run(run, group.label) | {"unpaired": unpaired(run, baselines.values())}
            for group in groups
            for run in group.runs
        ],
        "sets": {unknown: _set(unknown, runs) for unknown in sets},
        "means": means,
        "rows": rows,
    }


def _own_scores(run: Judged) -> tuple[str, ...]:
    method = run.config["run"]["method"]
    return OWN_SCORES.get(method.get("host", method)["type"], ())


def _run(run: Judged, method: str) -> dict[str, Any]:
    split = run.metrics["split"]
    repeats = False
    if split is not None:
        one = protocols.split(split["protocol"], split["family"], split["list"])
        repeats = protocols.repeats(one) is not None
    return {
        "folder": run.folder.name,
        "method": method,
        "list": split and f"{split['family']}{split['list']}",
        "seed": run.config["run"]["seed"],
        "repeats": repeats,
        "model": run.config["run"]["model"],
        "epochs": run.config["run"]["epochs"],
        "commit": run.config["commit"],
        "torch": run.config["versions"]["torch"],
        "device": run.config["resolved"]["device"],
        "minutes": round((run.ended - run.began).total_seconds() / 60, 1),
        "command": run.config["command"],
        "notes": run.metrics["notes"],
    }


def _set(unknown: str, runs: Sequence[Judged]) -> dict[str, Any]:
    judged = [run for run in runs if unknown in run.metrics["unknown"]]
    known = [run.metrics["known"]["n"] for run in judged]
    images = [run.metrics["unknown"][unknown]["n"] for run in judged]
    cues: dict[str, list[float]] = {}
    for run in judged:
        for name, value in run.metrics["unknown"][unknown].get("cues", {}).items():
            cues.setdefault(name, []).append(value)
    return {
        "known": [min(known), max(known)],
        "unknown": [min(images), max(images)],
        "cues": cues,
    }


def table_page(document: Mapping[str, Any], level: int = 1, *, folded: bool = False) -> str:
    """Return a document as a Markdown page, figures in percent.

    Args:
        document: as `table_document` returns it.
        level: of the first heading.
        folded: put what goes into detail into <details> elements: for a page that holds more
            than this.
    """
    runs = document["runs"]
    by_folder = {run["folder"]: run for run in runs}
    lists = _each(run["list"] for run in runs if run["list"])
    models = _each(run["model"] for run in runs)
    epochs = _each(str(run["epochs"]) for run in runs)
    means = document.get("means", {})  # documents of before have none
    several = len(document["sets"]) > 1
    lines = [f"{'#' * level} {document['problem']}, {models}, {epochs} epochs", ""]
    lines += [
        f"{len(runs)} run{'s' * (len(runs) > 1)}: "
        + (f"class lists {lists}; " if lists else "")
        + f"seeds {_each(str(run['seed']) for run in runs)}; "
        f"commit {_each(run['commit'] for run in runs)}; "
        f"torch {_each(run['torch'] for run in runs)}; "
        f"{_each(run['device'] for run in runs)}.",
        "",
        "Mean ± sample standard deviation over the runs of a row, in percent. *to softmax*: the "
        "mean of the differences to the softmax run of the same class list, seed and data; a score "
        "that softmax has not is compared with its largest logit. FPR95: share of unknown images "
        "accepted where 95 % of the known ones are; there less is better. Nothing was fitted or "
        "chosen on these images.",
        "",
    ]
    notes = unpaired_notes((run["method"], run.get("unpaired", "")) for run in runs)
    lines += [*(f"- {note}" for note in notes), *([""] if notes else [])]
    if several:
        lines += [f"{'#' * (level + 1)} All unknown sets", "", *_overview(document)]
    for unknown in (*document["sets"], *means):
        rows = [row for row in document["rows"] if row["unknown"] == unknown]
        images = document["sets"].get(unknown)
        size = "unweighted, set by set"
        if images:
            size = f"{_range(images['known'])} known and {_range(images['unknown'])} unknown images"
        what = "Unknown set" if images else "Mean over"
        if folded and several:
            summary = f"{what} <code>{unknown}</code>: {size}"
            lines += ["<details>", f"<summary>{summary}</summary>", ""]
        else:
            lines += [f"{'#' * (level + 1)} {what} `{unknown}`", "", f"{size}.", ""]
        lines += [
            *_main_table(rows, by_folder),
            *_every_score(rows, folded=folded and not several),
            *_cues(images["cues"] if images else {}),
            *(["</details>", ""] if folded and several else []),
        ]
    told: dict[str, list[str]] = {}
    for run in runs:
        for note in run["notes"]:
            told.setdefault(note, []).append(run["folder"])
    for note, folders in told.items():
        everywhere = len(folders) == len(runs)
        lines.append(f"- {'' if everywhere else ', '.join(folders) + ': '}{note}")
    return "\n".join([*lines, ""] if told else lines)


def _overview(document: Mapping[str, Any]) -> list[str]:
    """Return the AUROC of each method on every set and mean, by its own and the common scores."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in document["rows"]:
        if row["own"] or row["score"] in COMMON:
            cell = _percent(row["figures"]["auroc"])
            change = _percent(row["differences"].get("auroc", []), sign=True)
            accuracy = {"": _percent(row["figures"]["accuracy"])}  # no set has no name
            each = found.setdefault((row["method"], row["score"]), accuracy)
            each[row["unknown"]] = f"{cell} ({change})" if change else cell
    unknown = *document["sets"], *document.get("means", {})
    columns = "", *unknown
    head = ["method", "score", "accuracy", *(f"`{name}`" for name in unknown)]
    body = [
        [method, SCORE_NAMES.get(score, score), *(cells.get(name, "") for name in columns)]
        for (method, score), cells in found.items()
    ]
    return ["AUROC, in brackets *to softmax*:", "", *_table(head, body)]


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, and an empty one."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (head, *body)]
    lines = [escaped[0], ["---"] * len(head), *escaped[1:]]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _main_table(rows: Sequence[Mapping[str, Any]], runs: Mapping[str, Any]) -> list[str]:
    """Return each method by its own scores and the common ones."""
    shown = [row for row in rows if row["own"] or row["score"] in COMMON]
    distinct = any(run["repeats"] for run in runs.values())
    head = ["method", "score", "runs", "accuracy", "AUROC", "to softmax"]
    head += ["AUROC, distinct lists"] if distinct else []
    head += ["OSCR", "to softmax", "FPR95", "to softmax"]
    body = []
    for row in shown:
        figures, changes = row["figures"], row["differences"]
        cells = [row["method"], SCORE_NAMES.get(row["score"], row["score"]), str(len(row["runs"]))]
        cells.append(_percent(figures["accuracy"]))
        for metric in ("auroc", "oscr", "fpr95_unknown_accepted"):
            cells.append(_percent(figures[metric]))
            pairs = changes.get(metric, [])
            change = _percent(pairs, sign=True)
            # Else a reader would take it for the mean over all runs of the row.
            cells.append(
                f"{change} ({len(pairs)} of {len(row['runs'])})"
                if 0 < len(pairs) < len(row["runs"])
                else change
            )
            if metric == "auroc" and distinct:
                each = zip(figures[metric], row["runs"], strict=True)
                cells.append(_percent([v for v, folder in each if not runs[folder]["repeats"]]))
        body.append(cells)
    return _table(head, body)


def _every_score(rows: Sequence[Mapping[str, Any]], *, folded: bool) -> list[str]:
    """Return the AUROC of every score under every method, where there are more than the shown."""
    scores = dict.fromkeys(row["score"] for row in rows)
    if len(scores) <= len(COMMON):
        return []
    methods = dict.fromkeys(row["method"] for row in rows)
    found = {(row["score"], row["method"]): row["figures"]["auroc"] for row in rows}
    body = [
        [
            SCORE_NAMES.get(score, score),
            *(_percent(found.get((score, method), [])) for method in methods),
        ]
        for score in scores
    ]
    table = _table(["score", *methods], body)
    if folded:
        return [
            "<details>",
            "<summary>AUROC of every score</summary>",
            "",
            *table,
            "</details>",
            "",
        ]
    return ["AUROC of every score:", "", *table]


def _cues(cues: Mapping[str, list[float]]) -> list[str]:
    """Return what trivial cues alone tell of a set: what a score has to beat."""
    if not cues:
        return []
    told = ", ".join(f"{name} {statistics.fmean(v):.1%}" for name, v in cues.items())
    return [f"Trivial cues alone, AUROC in the better direction: {told}.", ""]


def _percent(values: Sequence[float], sign: bool = False) -> str:
    return Spread(tuple(values)).percent(sign) if values else ""


def _each(words: Iterable[str]) -> str:
    """Return different words, each once, in order of appearance."""
    return ", ".join(dict.fromkeys(words))


def _range(ends: Sequence[int]) -> str:
    low, high = ends
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
