"""How methods fare as background and class go together more and more: the demo's images, at will.

At a correlation of 1 a classifier may learn the background alone, and a class activation map then
lights up the background: what BackMix pastes is the object. Which map source, warm-up or host
mends that is what this measures: a row of `backmix table` per method, a folder per correlation and
seed, and at the end one table of all.

    python bench/correlation.py --out FOLDER [--correlations 0.5 0.75 0.9 0.95] [--seeds 2]
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

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
SETS = ("train", "test", "unknown", "conflict")


def main() -> int:
    """Train and judge what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--correlations", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.95])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--workers", type=int, default=0)
    asked = parser.parse_args()
    found: dict[tuple[str, float], list[dict[str, float]]] = {}
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
            for name, figures in read(folder, asked.rows).items():
                found.setdefault((name, correlation), []).append(figures)
    print(page(found, asked.rows, asked.correlations))
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


def read(folder: Path, rows: list[str]) -> dict[str, dict[str, float]]:
    """Return AUROC of the largest logit, accuracy and last mask hit of each row."""
    runs = sorted((folder / "runs").glob("*/metrics.json"))
    commands = {json.loads((p.parent / "config.json").read_text())["command"]: p for p in runs}
    result = {}
    for name in rows:
        words = row(name, folder).split()
        for command, path in commands.items():
            recipe, own = command.split()[2], command.split()
            own = own[own.index("--seed") + 2 :]
            if recipe == f"demo-{words[0]}" and own == words[1:]:
                metrics = json.loads(path.read_text())
                log = (path.parent / "log.jsonl").read_text().splitlines()
                hits = [json.loads(line).get("mask_hit") for line in log]
                result[name] = {
                    "auroc": metrics["unknown"]["unknown"]["scores"]["max_logit"]["auroc"],
                    "accuracy": metrics["known"]["accuracy"],
                    **({"hit": hits[-1]} if hits[-1] is not None else {}),
                }
    return result


def page(
    found: dict[tuple[str, float], list[dict[str, float]]],
    rows: list[str],
    correlations: list[float],
) -> str:
    """Return the table: AUROC of every row and correlation, mean over seeds, and the mask hit."""
    head = ["method", *(f"{c:g}" for c in correlations), *(f"hit {c:g}" for c in correlations)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name in rows:
        cells = [name]
        for figure, form in (("auroc", "{:.1f}"), ("hit", "{:.0f} %")):
            for correlation in correlations:
                values = [r[figure] for r in found.get((name, correlation), []) if figure in r]
                cells.append(form.format(100 * statistics.fmean(values)) if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
