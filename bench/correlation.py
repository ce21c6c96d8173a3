"""How methods fare as background and class go together more and more: the demo's images, at will.

At a correlation of 1 a classifier may learn the background alone, and a class activation map then
lights up the background: what BackMix pastes is the object. Which map source, warm-up or host
mends that is what this measures: a row of `backmix table` per method, a folder per correlation and
seed, and at the end one table of all.

    python bench/correlation.py --out FOLDER [--correlations 0.5 0.75 0.9 0.95] [--seeds 2] \\
        [--write bench/results/correlation.json]

A run of one thread takes about half a minute on an idle core; the same command goes on where it was
stopped. `--write` leaves what `bench/plot.py` makes the table of docs/results.md from.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from backmix.pipeline.convert import convert
from backmix.pipeline.options import ConvertOptions
from backmix.train.demo_data import write_demo_data
from backmix.train.options import TableOptions
from backmix.train.table import run_table

ROWS = {
    "softmax": "softmax",
    "Cutout": "cutout",
    "BackMix": "backmix",
    "raw maps": "backmix --method.cam-source raw",
    "warm-up 5": "backmix --method.warmup 5",
    "random mask": "backmix --method.mask random",
    "inverse mask": "backmix --method.mask inverse",
    "oracle mask": "backmix --method.mask oracle",
    "other class": "backmix --method.donor other",
    "SSOD": "ssod",
    "BackMix + SSOD": "backmix-ssod",
    "PCSSR": "pcssr",
    "BackMix + PCSSR": "backmix-pcssr",
}
"""Name in the table -> row of `backmix table demo`. True masks are given to every mix, so that how
much true foreground a mask covers is logged; only the oracle uses them."""
Figures = dict[str, str | float]
SETS = ("train", "test", "unknown", "conflict")


def main() -> int:
    """Train and judge what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--correlations", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.95])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--write", type=Path, help="the file for bench/plot.py")
    asked = parser.parse_args()
    found: list[Figures] = []
    facts: dict[str, Any] = {}
    for correlation in asked.correlations:
        for seed in range(asked.seeds):
            folder = asked.out / f"correlation-{correlation:g}" / f"seed{seed}"
            prepare(folder, seed, correlation)
            options = TableOptions(
                out=folder,
                data=(folder / "train.beton",),
                test=(folder / "test.beton",),
                unknown=(f"unknown={folder / 'unknown.beton'}",),
                methods=",".join(row(name, folder) for name in asked.rows),
                first_seed=seed,
                workers=asked.workers,
                quiet=True,
            )
            run_table("demo", options, say=lambda line: print(line.split("\n")[0], flush=True))
            for name, (figures, config) in read(folder, asked.rows).items():
                found.append({"row": name, "correlation": correlation, "seed": seed, **figures})
                facts = {
                    "commit": config["commit"],
                    "torch": config["versions"]["torch"],
                    "epochs": config["run"]["epochs"],
                }
    document = {**facts, "figures": found}
    print(page(document))
    if asked.write:
        asked.write.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def row(name: str, folder: Path) -> str:
    """Return a row of the grid, with the true masks where it mixes by a mask."""
    text = ROWS[name]
    masked = text.startswith("backmix")
    return f"{text} --method.masks {folder / 'images' / 'masks'}" if masked else text


def prepare(folder: Path, seed: int, correlation: float) -> None:
    """Write and convert the images of one seed and correlation, where that has not been done."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "images").exists():
        write_demo_data(folder / "images", seed, correlation)
    for name in SETS:
        if not (folder / f"{name}.beton").exists():
            source = f"folder:{folder / 'images' / name}"
            convert(source, folder / f"{name}.beton", ConvertOptions(workers=1))


def read(folder: Path, rows: list[str]) -> dict[str, tuple[Figures, dict[str, Any]]]:
    """Return AUROC of the largest logit (CSSR: S0), accuracy and last mask hit of each row.

    And beside them the row's config.json.
    """
    runs = sorted((folder / "runs").glob("*/metrics.json"))
    configs = {path: json.loads((path.parent / "config.json").read_text()) for path in runs}
    commands = {config["command"]: path for path, config in configs.items()}
    result = {}
    for name in rows:
        words = row(name, folder).split()
        for command, path in commands.items():
            recipe, own = command.split()[2], command.split()
            own = own[own.index("--seed") + 2 :]
            if recipe == f"demo-{words[0]}" and own == words[1:]:
                metrics = json.loads(path.read_text())
                scores = metrics["unknown"]["unknown"]["scores"]
                # CSSR's logits are log-probabilities: the largest says no more than MSP.
                score = "max_logit" if "max_logit" in scores else "cssr_s0"
                log = (path.parent / "log.jsonl").read_text().splitlines()
                hits = [json.loads(line).get("mask_hit") for line in log]
                figures = {
                    "auroc": scores[score]["auroc"],
                    "accuracy": metrics["known"]["accuracy"],
                    **({"hit": hits[-1]} if hits[-1] is not None else {}),
                }
                result[name] = figures, configs[path]
    return result


def page(document: dict[str, Any]) -> str:
    """Return the table: AUROC of every row and correlation, difference to softmax, and mask hit."""
    found: list[Figures] = document["figures"]
    rows = list(dict.fromkeys(figures["row"] for figures in found))
    correlations = sorted({float(figures["correlation"]) for figures in found})
    seeds = sorted({int(figures["seed"]) for figures in found})

    def of(row: object, correlation: float, figure: str) -> dict[int, float]:
        return {
            int(f["seed"]): float(f[figure])
            for f in found
            if f["row"] == row and f["correlation"] == correlation and figure in f
        }

    pairs = {c: len(of("softmax", c, "auroc")) for c in correlations}
    uneven = len(set(pairs.values())) > 1
    named = [f"{c:g}" + f" ({pairs[c]} seeds)".replace("1 seeds", "1 seed") * uneven for c in pairs]
    head = ["method", *named, *(f"hit {c:g}" for c in correlations)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [str(row)]
        for correlation in correlations:
            values, base = (of(name, correlation, "auroc") for name in (row, "softmax"))
            mean = f"{100 * statistics.fmean(values.values()):.1f}" if values else ""
            paired = [values[seed] - base[seed] for seed in values if seed in base]
            if row != "softmax" and paired:
                mean += f" ({100 * statistics.fmean(paired):+.1f})".replace("-", "\u2212")
            cells.append(mean)
        for correlation in correlations:
            hits = of(row, correlation, "hit").values()
            cells.append(f"{100 * statistics.fmean(hits):.0f} %" if hits else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Seeds {', '.join(map(str, seeds))}; {document['epochs']} epochs; commit "
        f"{document['commit'][:12]}; torch {document['torch']}; CPU.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
