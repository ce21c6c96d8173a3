"""How far each loader's pixels are from the stated ones, on random crops of a .beton file.

    PYTHONPATH=. python -m bench.parity --data FILE.beton --out FOLDER [--size PIXELS ...]

The stated meaning: libjpeg-turbo's accurate DCT with fancy upsampling of the whole image, the box,
torch's antialiased bilinear resize of uint8. Distances are in levels of 0..255 over all values of
all images. Prints the table of `docs/loaders.md`; a row's `config` holds the figures.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backmix.pipeline.batch import Place
from backmix.pipeline.beton import open_set
from backmix.pipeline.decode import cut, read_image
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import LoaderOptions
from bench import rows

STAGE = "parity"
FORMS = {"turbo": "cpu", "ffcv": "cpu", "dali": "cpu", "dali_gpu": "cuda"}
"""Where each form's batches go."""


def distances(form: str, data: Path, size: int, epochs: int) -> np.ndarray:
    """Return the distance of every value to the stated one, uint8 [n, size, size, 3].

    Args:
        form: one of FORMS.
        data: a .beton file.
        size: side of the views [pixels].
        epochs: passes over the file, each with other crops.
    """
    loader: Any = form.removesuffix("_gpu")
    options = LoaderOptions(loader=loader, batch=64, size=size, crop="random")
    found = []
    view = np.empty((size, size, 3), np.uint8)
    with open_set(data) as stored, open_loader(data, options, device=FORMS[form]) as opened:
        for epoch in range(epochs):
            for batch in opened.batches(Place(0, epoch)):
                pixels = batch.pool[batch.rows].cpu().numpy()
                for shown, index, box in zip(
                    pixels, batch.host.index.tolist(), batch.boxes.cpu().numpy(), strict=True
                ):
                    cut(read_image(stored, index)[0], box, view)
                    found.append(np.maximum(shown, view) - np.minimum(shown, view))
    return np.stack(found)


def figures(away: np.ndarray) -> dict[str, float]:
    """Return mean, 99.9th percentile and largest, and the largest inside the outermost ring."""
    counts = np.bincount(away.ravel(), minlength=256)
    within = np.searchsorted(counts.cumsum(), 0.999 * away.size)
    return {
        "mean": float((counts * np.arange(256)).sum() / away.size),
        "p999": int(within),
        "largest": int(away.max()),
        "largest_inside": int(away[:, 1:-1, 1:-1].max()),
        "images": len(away),
    }


def main() -> int:
    """Print the table and write the rows; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="one .beton file")
    parser.add_argument("--out", type=Path, help=f"a folder; the rows go into {STAGE}.jsonl")
    parser.add_argument("--size", type=int, action="append", help="side of the views [pixels]")
    parser.add_argument("--epochs", type=int, default=4, help="passes, each with other crops")
    options = parser.parse_args()
    print("| loader | view | mean | 99.9 % of all values within | greatest | inside the ring |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in options.size or (224, 160, 64):
        for form, device in FORMS.items():
            if device == "cuda" and not torch.cuda.is_available():
                continue
            try:
                found = figures(distances(form, options.data, size, options.epochs))
            except ValueError as error:
                print(f"{form}: {error}", file=sys.stderr)
                continue
            print(
                f"| {form} | {size} px | {found['mean']:.3f} | {found['p999']} | "
                f"{found['largest']} | {found['largest_inside']} |",
                flush=True,
            )
            if options.out is not None:
                common = {"bench": "parity", "stage": STAGE, **rows.machine(device)}
                rows.Rows(options.out / f"{STAGE}.jsonl", common).write(
                    case=f"{size} px random crops of {options.data.name}", form=form, config=found
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
