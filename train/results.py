"""What finished runs came to, side by side: read from run folders, averaged, compared in pairs.

Runs that differ only in seed, class list or data file are repetitions of one configuration and form
one row. A difference to the baseline is always taken between two runs of the same seed, class list
and data, never between two means. Nothing is drawn here.
"""

import itertools
import json
import reprlib
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any

from backmix.train.log import read_status
from backmix.train.options import MAY_CHANGE
from backmix.train.outputs import Outputs, load_outputs
from backmix.train.run_folder import read_config

METRICS = {
    "auroc": "AUROC",
    "oscr": "OSCR",
    "fpr95_unknown_accepted": "FPR95, unknown accepted",
    "fpr95_known_rejected": "FPR95, known rejected",
    "aupr_known": "AUPR, known",
    "aupr_unknown": "AUPR, unknown",
    "dtacc": "DTACC",
}
"""Figures of a score on an unknown set, by their names in metrics.json and in print."""
SCORE_NAMES = {
    "msp": "MSP",
    "temperature": "MSP at temperature",
    "max_logit": "MaxLogit",
    "energy": "Energy",
    "gen": "GEN",
    "odin": "ODIN",
    "react": "ReAct",
    "ash_s": "ASH-S",
    "scale": "SCALE",
    "dice": "DICE",
    "vim": "ViM",
    "fdbd": "fDBD",
    "nci": "NCI",
    "knn": "KNN",
    "mahalanobis": "Mahalanobis",
    "rmds": "RMDS",
    "feature_norm": "feature norm",
    "ssod": "SSOD head",
    "ssod_joint": "SSOD joint",
    "arpl": "ARPL",
    "arpl_dot": "ARPL without norm",
    "cssr": "CSSR",
    "cssr_s0": "CSSR S0",
}
"""Scores by their names in metrics.json and in print."""
OWN_SCORES = {
    "Ssod": ("ssod", "ssod_joint"),
    "Arpl": ("arpl", "arpl_dot"),
    "Cssr": ("cssr", "cssr_s0"),
}
"""Scores that a method brings, by its options' type."""
COMPARED = ("auroc", "oscr")
"""Figures whose paired difference to the baseline is printed."""

_REPEATED = MAY_CHANGE | {"seed", "threads", "split.list", "split.known", "method.masks"}
"""Options in which repetitions of one configuration may differ."""
_MASKS = {
    "cam": "BackMix",
    "none": "patch without mask",
    "random": "random mask",
    "inverse": "inverse mask",
    "grey": "Cutout",
    "oracle": "oracle mask",
}


@dataclass(frozen=True)
class Judged:
    """A finished and evaluated run."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    log: tuple[dict[str, Any], ...]
    """Rows of log.jsonl."""
    known: Outputs
    unknown: dict[str, Outputs]
    """By the set's name."""
    began: datetime
    ended: datetime

    @property
    def options(self) -> dict[str, Any]:
        """The resolved options by dotted name."""
        return _flat(self.config["run"])

    @property
    def is_baseline(self) -> bool:
        """Whether this is plain softmax, which the others are compared with."""
        return self.config["run"]["method"]["type"] == "Softmax"

    @property
    def name(self) -> str:
        """What tells the run from its repetitions: class list and seed."""
        split = self.metrics["split"]
        published = f"list {split['family']}{split['list']}, " if split else ""
        return f"{published}seed {self.config['run']['seed']}"

    def figure(self, metric: str, unknown: str, score: str) -> float | None:
        """Return a figure in [0, 1], or None where this run was not judged on that set."""
        if metric == "accuracy":
            return self.means.get(unknown, self.metrics["known"])["accuracy"]
        return self.scores_on(unknown).get(score, {}).get(metric)

    def scores_on(self, unknown: str) -> dict[str, Any]:
        """Return the figures of every score on an unknown set, or on the mean of a group."""
        found = self.metrics["unknown"].get(unknown) or self.means.get(unknown)
        return found["scores"] if found else {}

    @property
    def means(self) -> dict[str, Any]:
        """The means over groups of unknown sets, by words that name the group and its sets.

        {"sets", "scores", "accuracy", "n": known images}. Where there are known images under a
        shift the same once more with these among the known ones: the full spectrum.
        """
        found = {}
        full = self.metrics.get("full_spectrum", {})
        for title, known, judged in (
            ("", self.metrics["known"], self.metrics),
            (", full spectrum", full, full),
        ):
            for name, group in judged.get("groups", {}).items():
                of_known = {key: known[key] for key in ("accuracy", "n")}
                found[f"{name}{title}: {', '.join(group['sets'])}"] = group | of_known
        return found


@dataclass(frozen=True)
class Group:
    """The repetitions of one configuration."""

    label: str
    runs: tuple[Judged, ...]
    """By class list, then seed."""


@dataclass(frozen=True)
class Spread:
    """Some repeated figures and what they come to."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """The sample standard deviation (n - 1); None of a single figure."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def percent(self, sign: bool = False) -> str:
        """Return `84.3 ± 2.0` in percent; of a single figure without the spread."""
        form = "+.1f" if sign else ".1f"
        mean = format(100 * self.mean, form).replace("-", "\N{MINUS SIGN}")
        return mean if self.sd is None else f"{mean} ± {100 * self.sd:.1f}"


@dataclass(frozen=True)
class Row:
    """One configuration under one score."""

    score: str
    label: str
    runs: int
    figures: dict[str, Spread]
    """By metric, `accuracy` among them."""
    differences: dict[str, Spread]
    """By metric: run minus its baseline run; absent where no run has one."""


@dataclass(frozen=True)
class Table:
    """All configurations on one unknown set, or on the mean over a group of sets."""

    unknown: str
    """The set; of a group its name and its sets."""
    images: str
    """Sizes of the known and the unknown set."""
    mean: bool
    """Figures are unweighted means over the sets of a group."""
    rows: tuple[Row, ...]

    @property
    def blocks(self) -> list[tuple[str, list[Row]]]:
        """The rows of each score."""
        scores = dict.fromkeys(row.score for row in self.rows)
        return [(score, [row for row in self.rows if row.score == score]) for score in scores]


def read_judged(folder: Path) -> Judged:
    """Read a run folder.

    Raises:
        ValueError: it is no run folder, its run is not finished or not evaluated, or a file in it
            is damaged; the message says which, and what to do.
    """
    if not folder.is_dir():
        why = "it is a file" if folder.exists() else "there is no such folder"
        raise ValueError(f"{folder} is no run folder: {why}")
    config = read_config(folder)
    status = read_status(folder)
    if status["state"] != "finished":
        why = f" ({status['why']})" if status.get("why") else ""
        raise ValueError(
            f"{folder} is not finished: {status['state']} at step {status['step']}{why}; the "
            "command that started it continues it"
        )
    if not (folder / "metrics.json").exists():
        raise ValueError(
            f"{folder} has not been evaluated: run `backmix evaluate {folder} --test FILE.beton` "
            "first"
        )
    _check_config(folder / "config.json", config)
    metrics = _read_metrics(folder / "metrics.json")
    return Judged(
        folder=folder,
        config=config,
        metrics=metrics,
        log=_read_log(folder / "log.jsonl"),
        known=_outputs(folder, "known"),
        unknown={name: _outputs(folder, name) for name in metrics["unknown"]},
        began=_time(folder / "config.json"),
        ended=_time(folder / "status.json"),
    )


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """Return run folders: those given, and instead of a folder of `backmix table` its runs.

    Raises:
        ValueError: a table's folder without a finished table, or with a damaged one.
    """
    found = []
    for folder in folders:
        stored, runs = folder / "table.json", folder / "runs"
        if (folder / "config.json").exists() or not runs.is_dir():
            found.append(folder)
            continue
        if not stored.exists():
            raise ValueError(
                f"{folder} holds a table that is not done: finish it with the command that began "
                f"it, or name runs: {runs}/*/"
            )
        document = _parsed(stored, _text(stored))
        for run in _part(stored, document, list, "runs"):
            found.append(runs / _part(stored, run, str, "folder"))
    return found


def read_all(folders: Sequence[Path]) -> list[Group]:
    """Read run folders and group the repetitions; the baseline first, then in the given order.

    Raises:
        ValueError: as `read_judged`; no folder at all; or two folders that hold the same run.
    """
    if not folders:
        raise ValueError("no run folder was given")
    unique = {folder.resolve(): folder for folder in folders}
    runs = [read_judged(folder) for folder in unique.values()]
    grouped: dict[str, list[Judged]] = {}
    for run in sorted(runs, key=lambda run: not run.is_baseline):
        grouped.setdefault(configuration(run.config["run"]), []).append(run)
    for group in grouped.values():
        group.sort(key=_repetition)
        for first, second in itertools.pairwise(group):
            if _repetition(first) == _repetition(second):
                raise ValueError(
                    f"{first.folder} and {second.folder} are the same run twice (same options, "
                    "seed, classes and data): leave one of them out"
                )
    labels = _labels([group[0] for group in grouped.values()])
    return [
        Group(label, tuple(group)) for label, group in zip(labels, grouped.values(), strict=True)
    ]


def tables(groups: Sequence[Group]) -> list[Table]:
    """Return one table per unknown set, in the order in which the runs name them, then the groups.

    Means over other sets are other figures: a group that lacks a set in some runs is two groups.
    """
    runs = [run for group in groups for run in group.runs]
    baselines = {pair_key(run): run for run in runs if run.is_baseline}
    sets = dict.fromkeys(name for run in runs for name in run.metrics["unknown"])
    means = dict.fromkeys(name for run in runs for name in run.means)
    return [_table(name, groups, baselines) for name in (*sets, *means)]


def markdown(some: Sequence[Table]) -> str:
    """Return the tables as Markdown, figures in percent."""
    parts = []
    for table in some:
        head = ["score", "method", "runs", "accuracy", "AUROC", "to softmax", "OSCR", "to softmax"]
        what = "Mean over" if table.mean else "Unknown set"
        lines = [f"{what} `{table.unknown}` ({table.images}), percent:", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in table.rows:
            cells = [SCORE_NAMES.get(row.score, row.score), row.label, str(row.runs)]
            cells.append(row.figures["accuracy"].percent())
            for metric in COMPARED:
                difference = row.differences.get(metric)
                cells.append(row.figures[metric].percent())
                cells.append(difference.percent(sign=True) if difference else "")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def method_label(method: Mapping[str, Any]) -> str:
    """Return the usual name of a method from its options in config.json."""
    match method["type"]:
        case "BackMix":
            name, host = _MASKS[method["mask"]], method.get("host", {"type": "Softmax"})
            return name if host["type"] == "Softmax" else f"{name} + {method_label(host)}"
        case "Ssod":
            return "SSOD" if method["train"] == "joint" else "SSOD, head only"
        case "Arpl":
            return "ARPL+CS" if method["confusing"] else "ARPL"
        case "Cssr":
            return "PCSSR" if method["kind"] == "prototype" else "RCSSR"
        case kind:
            return kind.lower()


def _table(unknown: str, groups: Sequence[Group], baselines: Mapping[str, Judged]) -> Table:
    runs = [run for group in groups for run in group.runs if run.scores_on(unknown)]
    scores = dict.fromkeys(score for run in runs for score in run.scores_on(unknown))
    rows = []
    for score in scores:
        for group in groups:
            judged = [run for run in group.runs if run.figure("auroc", unknown, score) is not None]
            if judged:
                rows.append(row_of(score, group.label, judged, unknown, baselines))
    means = [run.means[unknown] for run in runs if unknown in run.means]
    if means:
        known = _range(mean["n"] for mean in means)
        return Table(unknown, f"{known} known images, each set alike", True, tuple(rows))
    known = _range(run.metrics["known"]["n"] for run in runs)
    images = _range(run.metrics["unknown"][unknown]["n"] for run in runs)
    return Table(unknown, f"{known} known and {images} unknown images", False, tuple(rows))


def row_of(
    score: str,
    label: str,
    runs: Sequence[Judged],
    unknown: str,
    baselines: Mapping[str, Judged],
) -> Row:
    """Return the figures of repeated runs under one score; `baselines` by `pair_key`.

    A score that the baseline has not is compared with its largest logit.
    """
    figures, differences = {}, {}
    for metric in ("accuracy", *METRICS):
        values, changes = [], []
        for run in runs:
            value = run.figure(metric, unknown, score)
            assert value is not None
            values.append(value)
            baseline = baselines.get(pair_key(run))
            before = baseline and baseline.figure(metric, unknown, score)
            if baseline and before is None:
                before = baseline.figure(metric, unknown, "max_logit")
            if before is not None and not run.is_baseline:
                changes.append(value - before)
        figures[metric] = Spread(tuple(values))
        if changes:
            differences[metric] = Spread(tuple(changes))
    return Row(score, label, len(runs), figures, differences)


def _labels(firsts: Sequence[Judged]) -> list[str]:
    """Return a readable, unique label for every group, from one run of each.

    Groups of the same method are told apart by their recipes, or where these are the same by the
    options in which they differ; where the runs solve different problems, every label names its
    own, as such figures cannot be compared.
    """
    bases = [method_label(run.config["run"]["method"]) for run in firsts]
    labels = []
    for run, base in zip(firsts, bases, strict=True):
        alike = [other.options for other, b in zip(firsts, bases, strict=True) if b == base]
        differing = [
            f"{name.rsplit('.', 1)[-1].replace('_', ' ')} {_shown(value)}"
            for name, value in run.options.items()
            if name not in _REPEATED and any(other.get(name) != value for other in alike)
        ]
        recipes = [r.config["recipe"] for r, b in zip(firsts, bases, strict=True) if b == base]
        if len(recipes) > 1 and len(set(recipes)) == len(recipes):
            differing = [run.config["recipe"]]
        labels.append(f"{base} ({', '.join(differing)})" if differing else base)
    problems = [problem_of(run) for run in firsts]
    if len(set(problems)) == 1:
        return labels
    return [f"{label} [{problem}]" for label, problem in zip(labels, problems, strict=True)]


def problem_of(run: Judged) -> str:
    """Return the protocol and family that a run was judged by."""
    split = run.metrics["split"]
    return f"{split['protocol']} {split['family']}" if split else "no protocol"


def configuration(options: Mapping[str, Any]) -> str:
    """Return what all repetitions of a configuration share, as one string.

    Args:
        options: of a run, as config.json has them under `run`.
    """
    return json.dumps(_shared(_flat(options)), sort_keys=True)


def _shared(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, by dotted name, in which repetitions of a configuration agree."""
    kept = {name: value for name, value in options.items() if name not in _REPEATED}
    # Every class list and seed begins with a network of its own: only whether there is one counts.
    kept["init"] = kept.get("init") is not None
    return kept


def _repetition(run: Judged) -> tuple[int, int, list[str], str]:
    """Return what tells a run from the others of its group, ordered as they are printed."""
    options = run.config["run"]
    digest = run.config["data"]["digest"]
    return (options["split"]["list"], options["seed"], run.config["classes"], digest)


def pair_key(run: Judged) -> str:
    """Return a key that a run shares with its baseline: all but the method is the same."""
    return json.dumps([_training(run), _repetition(run)], sort_keys=True)


def _training(run: Judged) -> dict[str, Any]:
    """Return the options, by dotted name, in which a run and its baseline agree."""
    options = run.options
    # ARPL+CS makes two passes an epoch: twice the epochs are the same training.
    passes = 2 if any(options.get(f"method.{at}confusing") for at in ("", "host.")) else 1
    kept = {k: v for k, v in _shared(options).items() if not k.startswith("method.")}
    kept["epochs"] = options["epochs"] / passes
    kept["optim.milestones"] = [at / passes for at in options["optim.milestones"]]
    return kept


def unpaired(run: Judged, baselines: Iterable[Judged]) -> str:
    """Return why a run has no difference to softmax; nothing where it has one, or is softmax."""
    found = list(baselines)
    if run.is_baseline or any(pair_key(run) == pair_key(baseline) for baseline in found):
        return ""
    if not found:
        return "there is no softmax run"
    alike = [baseline for baseline in found if _repetition(run) == _repetition(baseline)]
    if not alike:
        return "there is no softmax run of the same class list, seed and data"
    here = _training(run)
    differing = []
    for there in map(_training, alike):
        names = [k for k in here.keys() | there.keys() if here.get(k) != there.get(k)]
        differing.append([f"{k} {_told(there.get(k))}, not {_told(here.get(k))}" for k in names])
    return f"the softmax run has {'; '.join(sorted(min(differing, key=len)))}"


def unpaired_notes(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Return sentences on the rows without a difference to softmax.

    Args:
        reasons: of every run the label of its row, and what `unpaired` says of it.
    """
    runs = list(reasons)
    counts = Counter(label for label, _ in runs)
    notes = []
    for (label, reason), number in Counter(runs).items():
        if reason:
            some = "" if number == counts[label] else f" ({number} of {counts[label]} runs)"
            notes.append(f"{label}{some} is not compared with softmax: {reason}")
    return notes


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _check_config(path: Path, config: Any) -> None:
    """Raise ValueError where config.json lacks what is compared or printed here."""
    for name in ("seed", "epochs", "split.list", "loader.size"):
        _part(path, config, int, "run", *name.split("."))
    kind = _part(path, config, str, "run", "method", "type")
    if kind == "BackMix":
        mask = _part(path, config, str, "run", "method", "mask")
        if mask not in _MASKS:
            raise ValueError(f"{path} is damaged: there is no run.method.mask {mask!r}")
    _texts(path, config, "classes")
    _texts(path, config, "data", "files")
    if _part(path, config, int, "data", "samples") < 1:
        raise ValueError(f"{path} is damaged: data.samples must be at least 1")
    _part(path, config, dict, "versions")
    for name in ("data.digest", "run.model", "commit", "command"):
        _part(path, config, str, *name.split("."))


def _read_metrics(path: Path) -> dict[str, Any]:
    """Read metrics.json; ValueError names it and what is wrong with it."""
    document = _parsed(path, _text(path))
    if _part(path, document, dict | None, "split") is not None:
        for name in ("protocol", "family", "list"):
            _part(path, document, str | int, "split", name)
    if "notes" in document:
        _texts(path, document, "notes")
    _part(path, document, int, "known", "n")
    figures: list[tuple[str, ...]] = [("known", "accuracy")]
    for name in _part(path, document, dict, "unknown"):
        _part(path, document, int, "unknown", name, "n")
        scores = ("unknown", name, "scores")
        for score in _part(path, document, dict, *scores):
            figures += [(*scores, score, metric) for metric in METRICS]
    if "full_spectrum" in document:
        _part(path, document, int, "full_spectrum", "n")
        figures.append(("full_spectrum", "accuracy"))
    for groups in (("groups",), ("full_spectrum", "groups")):
        for name in _part(path, document, dict, *groups) if groups[0] in document else ():
            _texts(path, document, *groups, name, "sets")
            scores = (*groups, name, "scores")
            for score in _part(path, document, dict, *scores):
                figures += [(*scores, score, metric) for metric in METRICS]
    for names in figures:
        if not 0 <= _part(path, document, float | int, *names) <= 1:
            raise ValueError(f"{path} is damaged: {'.'.join(names)} is not a number in 0 .. 1")
    return document


def _read_log(path: Path) -> tuple[dict[str, Any], ...]:
    """Read the rows of log.jsonl; ValueError names the file, the line and what is wrong with it."""
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        where = f"{path}, line {number},"
        row = _parsed(where, line)
        for name in ("epoch", "consumed", "loss", "accuracy"):
            _part(where, row, float | int, name)
        for name in {"mask_hit", "bad_steps"} & set(row):
            _part(where, row, float | int, name)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is damaged: it has no rows")
    return tuple(rows)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _parsed(where: Path | str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from error


def _part(where: Path | str, document: Any, kind: type | UnionType, *names: str) -> Any:
    """Return document[name][...]; ValueError where it is missing or of another kind."""
    part = document
    for name in names:
        if not isinstance(part, dict) or name not in part:
            raise ValueError(f"{where} is damaged: it has no {'.'.join(names)}")
        part = part[name]
    if not isinstance(part, kind):
        raise ValueError(f"{where} is damaged: {'.'.join(names)} is {reprlib.repr(part)}")
    return part


def _texts(where: Path, document: Any, *names: str) -> None:
    for text in _part(where, document, list, *names):
        if not isinstance(text, str):
            raise ValueError(f"{where} is damaged: {'.'.join(names)} holds {reprlib.repr(text)}")


def _outputs(folder: Path, name: str) -> Outputs:
    path = folder / "scores" / f"{name}.safetensors"
    if not path.exists():
        raise ValueError(f"{path} is missing: run `backmix evaluate {folder}` again")
    return load_outputs(path)


def _time(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _range(numbers: Iterable[int]) -> str:
    found = list(numbers)
    least, most = min(found, default=0), max(found, default=0)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _told(value: Any) -> str:
    """Return an option's value for a sentence: numbers without a needless .0."""
    if isinstance(value, list):
        return " ".join(map(_told, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
