"""Questions that images made at will can answer: the demo's, with true masks and known backgrounds.

    python bench/questions.py correlation|length|options --out FOLDER [--seeds 2] [--write FILE]

correlation: how methods fare as background and class go together more and more. At a correlation
of 1 a classifier may learn the background alone, and a class activation map then lights up the
background: what BackMix pastes is the object. Which map source, warm-up or host mends that?
length: how the difference to softmax grows with training.
options: which of BackMix's options matter: patch, share, mask, map source, bank.

Every figure comes from a row of `backmix table demo`. A run of 16 epochs on one thread takes about
half a minute on an idle core; the same command goes on where it was stopped. `--write` adds to the
file that `bench/plot.py` makes a table of docs/results.md from: columns may have commands of their
own.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backmix.pipeline.convert import convert
from backmix.pipeline.options import ConvertOptions
from backmix.train.checkpoint import write_atomically
from backmix.train.demo_data import write_demo_data
from backmix.train.options import TableOptions
from backmix.train.table import run_table


@dataclass(frozen=True)
class Column:
    """What the runs of a column have in common."""

    correlation: float = 0.75
    """Share of known images on their class's kind of background; 0.75 is the demo's."""
    epochs: int = 16
    """Epochs of training; 16 are the demo's."""


@dataclass(frozen=True)
class Question:
    """A grid of rows and columns."""

    rows: dict[str, str]
    """Name in the table -> row of `backmix table demo`."""
    columns: tuple[Column, ...]


_ALWAYS = {"softmax": "softmax", "Cutout": "cutout", "BackMix": "backmix"}
_MASKS = {
    "random mask": "backmix --method.mask random",
    "inverse mask": "backmix --method.mask inverse",
    "oracle mask": "backmix --method.mask oracle",
}
_SSOD = {"SSOD": "ssod", "BackMix + SSOD": "backmix-ssod"}
QUESTIONS = {
    "correlation": Question(
        {
            **_ALWAYS,
            "raw maps": "backmix --method.cam-source raw",
            "warm-up 5": "backmix --method.warmup 5",
            **_MASKS,
            "other class": "backmix --method.donor other",
            **_SSOD,
            "PCSSR": "pcssr",
            "BackMix + PCSSR": "backmix-pcssr",
        },
        tuple(Column(correlation=rho) for rho in (0.5, 0.75, 0.9, 0.95)),
    ),
    "length": Question(
        {**_ALWAYS, "oracle mask": _MASKS["oracle mask"], **_SSOD},
        tuple(Column(epochs=epochs) for epochs in (12, 30, 100, 300)),
    ),
    "options": Question(
        {
            **_ALWAYS,
            "patch 8": "backmix --method.patch 8",
            "patch 8, Cutout": "cutout --method.patch 8",
            "on all images": "backmix --method.probability 1",
            "on all images, Cutout": "cutout --method.probability 1",
            "no mask": "backmix --method.mask none",
            **_MASKS,
            "a quarter masked": "backmix --method.mask-ratio 0.25",
            "three quarters masked": "backmix --method.mask-ratio 0.75",
            "masked pixels keep the target": "backmix --method.fill keep",
            "raw maps": "backmix --method.cam-source raw",
            "raw maps, trained on, weight 0.5": "backmix --method.cam-source raw+loss",
            "raw maps, trained on, weight 1": "backmix --method.cam-source raw+loss"
            " --method.raw-weight 1",
            "raw maps, bank rate 0.1": "backmix --method.cam-source raw --method.rate 0.1",
            "bank rate 0.3": "backmix --method.rate 0.3",
            "bank rate 0.1": "backmix --method.rate 0.1",
            "donors of other classes": "backmix --method.donor other",
            "donors of the same class": "backmix --method.donor same",
            "onto cool places": "backmix --method.onto cool",
        },
        (Column(),),
    ),
}
"""True masks are given to every mix, so that how much true foreground a mask covers is logged; only
the oracle uses them."""
Figures = dict[str, str | float]
SETS = ("train", "test", "unknown", "conflict")


def main() -> int:
    """Train and judge what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--correlations", type=float, nargs="+", help="columns, instead of all")
    parser.add_argument("--epochs", type=int, nargs="+", help="columns, instead of all")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", nargs="+", help="rows, instead of all")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--write", type=Path, help="add the figures to this file, for bench/plot.py"
    )
    asked = parser.parse_args()
    question = QUESTIONS[asked.question]
    unknown = sorted(set(asked.rows or ()) - set(question.rows))
    if unknown:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(question.rows)}")
    rows = {name: question.rows[name] for name in asked.rows or question.rows}
    columns = question.columns
    if asked.correlations:
        columns = tuple(
            Column(correlation, columns[0].epochs) for correlation in asked.correlations
        )
    if asked.epochs:
        columns = tuple(Column(columns[0].correlation, epochs) for epochs in asked.epochs)
    found: list[Figures] = []
    configs: list[dict[str, Any]] = []
    for column in columns:
        for seed in range(asked.seeds):
            images = asked.out / f"correlation-{column.correlation:g}" / f"seed{seed}"
            prepare(images, seed, column.correlation)
            folder = images / f"epochs-{column.epochs}"
            options = TableOptions(
                out=folder,
                data=(images / "train.beton",),
                test=(images / "test.beton",),
                unknown=(f"unknown={images / 'unknown.beton'}",),
                methods=",".join(row(text, images) for text in rows.values()),
                first_seed=seed,
                epochs=column.epochs,
                workers=asked.workers,
                quiet=True,
            )
            run_table("demo", options, say=lambda line: print(line.split("\n")[0], flush=True))
            for name, text in rows.items():
                figures, config = read(folder, row(text, images).split())
                at = {"correlation": column.correlation, "epochs": column.epochs, "seed": seed}
                found.append({"row": name, **at, **figures})
                configs.append(config)
    try:
        document = {**facts(configs), "figures": found}
        print(page(document))
        if asked.write:
            if asked.write.exists():
                document = added(json.loads(asked.write.read_text()), document, asked.write)
            write_atomically(asked.write, f"{json.dumps(document, indent=1)}\n".encode())
    except ValueError as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 1
    return 0


def row(text: str, images: Path) -> str:
    """Return a row of the grid, with the true masks where it mixes by a mask."""
    masked = text.startswith("backmix")
    return f"{text} --method.masks {images / 'images' / 'masks'}" if masked else text


def prepare(folder: Path, seed: int, correlation: float) -> None:
    """Write and convert the images of one seed and correlation, where that has not been done."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "images").exists():
        write_demo_data(folder / "images", seed, correlation)
    for name in SETS:
        if not (folder / f"{name}.beton").exists():
            source = f"folder:{folder / 'images' / name}"
            convert(source, folder / f"{name}.beton", ConvertOptions(workers=1))


def read(folder: Path, words: list[str]) -> tuple[Figures, dict[str, Any]]:
    """Return the figures of a row's run, and its config.json.

    They are AUROC of the largest logit (CSSR: S0), accuracy, and the last mask hit if there is one.

    Raises:
        ValueError: the folder has no judged run of that row.
    """
    for path in sorted((folder / "runs").glob("*/metrics.json")):
        config = json.loads((path.parent / "config.json").read_text())
        command = config["command"].split()
        own = command[command.index("--seed") + 2 :]
        if command[2] != f"demo-{words[0]}" or own != words[1:]:
            continue
        metrics = json.loads(path.read_text())
        scores = metrics["unknown"]["unknown"]["scores"]
        # CSSR's logits are log-probabilities: the largest says no more than MSP.
        score = "max_logit" if "max_logit" in scores else "cssr_s0"
        log = (path.parent / "log.jsonl").read_text().splitlines()
        hits = [json.loads(line).get("mask_hit") for line in log]
        return {
            "auroc": scores[score]["auroc"],
            "accuracy": metrics["known"]["accuracy"],
            **({"hit": hits[-1]} if hits[-1] is not None else {}),
        }, config
    raise ValueError(f"{folder}: no finished run of the row {' '.join(words)!r}")


def facts(configs: list[dict[str, Any]]) -> dict[str, str]:
    """Return the commit and torch that all runs have in common.

    Raises:
        ValueError: they differ.
    """
    found = {(config["commit"], config["versions"]["torch"]) for config in configs}
    if len(found) > 1:
        told = ", ".join(f"{commit[:12]} with torch {torch}" for commit, torch in sorted(found))
        raise ValueError(f"the runs are of several states, {told}: another --out begins anew")
    ((commit, torch),) = found
    return {"commit": commit, "torch": torch}


def added(older: dict[str, Any], newer: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the figures of both documents; of the same row, column and seed the newer ones.

    Raises:
        ValueError: they are of another commit or torch; `path` is where the older one lies.
    """
    for what in ("commit", "torch"):
        if older[what] != newer[what]:
            raise ValueError(
                f"{path} has figures of {what} {older[what]}, these are of {newer[what]}: write to "
                "another file, or move that one away"
            )
    cells = {_cell_of(figures): figures for figures in older["figures"] + newer["figures"]}
    return {**newer, "figures": list(cells.values())}


def _cell_of(figures: Figures) -> tuple[str | float, ...]:
    return tuple(figures[key] for key in ("row", "correlation", "epochs", "seed"))


def page(document: dict[str, Any]) -> str:
    """Return the table: AUROC of every row and column, difference to softmax, and mask hit.

    The difference is the mean over the seeds, with the standard deviation from three seeds on.
    """
    found: list[Figures] = document["figures"]
    rows = list(dict.fromkeys(str(figures["row"]) for figures in found))
    columns = sorted({(float(f["correlation"]), int(f["epochs"])) for f in found})
    seeds = sorted({int(figures["seed"]) for figures in found})

    def of(row: str, column: tuple[float, int], figure: str) -> dict[int, float]:
        return {
            int(f["seed"]): float(f[figure])
            for f in found
            if (f["row"], f["correlation"], f["epochs"]) == (row, *column) and figure in f
        }

    def named(column: tuple[float, int]) -> str:
        correlation, epochs = column
        if len({epochs for _, epochs in columns}) > 1:
            return f"{epochs} epochs"
        return f"{correlation:g}" if len(columns) > 1 else "AUROC"

    counts = {column: len(of(rows[0], column, "auroc")) for column in columns}
    uneven = len(set(counts.values())) > 1
    told = [f" ({n} seed{'s' if n > 1 else ''})" if uneven else "" for n in counts.values()]
    heads = [named(column) + text for column, text in zip(columns, told, strict=True)]
    with_hit = [column for column in columns if any(of(row, column, "hit") for row in rows)]
    hits = [f"hit {named(c)}" if len(columns) > 1 else "hit" for c in with_hit]
    head = ["method", *heads, *hits]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [row]
        for column in columns:
            values, base = of(row, column, "auroc"), of("softmax", column, "auroc")
            paired = [values[seed] - base[seed] for seed in values if seed in base]
            cells.append(_told(values.values(), () if row == "softmax" else paired))
        for column in with_hit:
            share = of(row, column, "hit").values()
            cells.append(f"{100 * statistics.fmean(share):.0f} %" if share else "")
        lines.append("| " + " | ".join(cells) + " |")
    epochs = sorted({epochs for _, epochs in columns})
    lines += [
        "",
        f"Seeds {', '.join(map(str, seeds))}; {', '.join(map(str, epochs))} epochs; commit "
        f"{document['commit'][:12]}; torch {document['torch']}; CPU.",
    ]
    return "\n".join(lines)


def _told(values: Iterable[float], paired: Iterable[float]) -> str:
    values, paired = [100 * v for v in values], [100 * d for d in paired]
    if not values:
        return ""
    text = f"{statistics.fmean(values):.1f}"
    if paired:
        spread = f" ± {statistics.stdev(paired):.1f}" if len(paired) > 2 else ""
        text += f" ({statistics.fmean(paired):+.1f}{spread})".replace("-", "\u2212")
    return text


if __name__ == "__main__":
    sys.exit(main())
