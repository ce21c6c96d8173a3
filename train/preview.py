"""The picture of the mix: target, donor with its mask, and what the network is shown.

Drawn for `backmix preview` and for the report, from the same draws, masks and pixels as training.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from backmix.kernels.mix_background import box_fractions, mask_views
from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.beton import BetonSet, open_set
from backmix.pipeline.loader import LARGEST_VIEW, open_loader
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.subset import Subset
from backmix.train.check import check
from backmix.train.checkpoint import load_tensors, write_atomically
from backmix.train.methods.backmix import BackMixMethod
from backmix.train.methods.build import build as build_method
from backmix.train.models.build import build as build_model
from backmix.train.options import Augment, BackMix, Optim, PreviewOptions, Run, Split
from backmix.train.run import training_subset
from backmix.train.run_folder import read_config

Data = Path | Sequence[Path]
"""One .beton file, or the shards of one."""

_SMALLEST_TILE = 160
"""Shortest side of a tile [pixels]; smaller views are enlarged by a whole number, unsmoothed."""
_ACROSS = 2
"""Examples side by side."""
_HEADS = "target", "donor, its mask hatched", "mix"
_INK, _PAPER, _GREY = (17, 17, 17), (255, 255, 255), (90, 90, 90)
_BLUE, _YELLOW = (0, 114, 178), (240, 228, 66)


@dataclass(frozen=True)
class Examples:
    """n mixes and what they were made of, before flip and shift."""

    targets: np.ndarray
    """uint8 [n, H, W, 3]."""
    donors: np.ndarray
    """uint8 [n, H, W, 3]."""
    masked: np.ndarray
    """bool [n, g, g']: cells of the donor's view that are not shown."""
    mixes: np.ndarray
    """uint8 [n, H, W, 3]."""
    patch: np.ndarray
    """int32 [n, 6]: ty, tx, dy, dx, ph, pw; ph * pw = 0 where nothing is pasted."""
    target_names: tuple[str, ...]
    donor_names: tuple[str, ...]
    caption: str
    """One sentence: whose masks these are."""


def write_preview(data: Data, out: Path, options: PreviewOptions) -> str:
    """Draw some mixes of a data set into a PNG file and return its caption.

    Args:
        data: one .beton file, or the shards of one; with a run, the data it was trained on.
        out: the file; replaced if it exists.
        options: what to draw.

    Raises:
        ValueError: the name does not end in .png, an option is out of its range, the data or the
            run cannot be read, or the run is not one of BackMix.
        OSError: `out` cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"-o must name a .png file; {out.name or 'an empty name'} is none")
    examples = (
        run_examples(options.run, data, options) if options.run else random_examples(data, options)
    )
    write_atomically(out, grid_picture(examples))
    return examples.caption


def random_examples(data: Data, options: PreviewOptions) -> Examples:
    """Return mixes of whole images with random masks: before training there are no others."""
    _check_wishes(options)
    with open_set(data) as beton:
        if not beton.n:
            raise ValueError(f"{', '.join(map(str, beton.paths))} holds no images")
        side = options.size or min(224, int(np.median(beton.sizes.min(1))))
        patch = options.patch or max(1, side // 4 if side < 64 else side // 2)
        cells = 4 if side < 64 else 7
        method = BackMixMethod(
            options=BackMix(mask="random", patch=_patch_within(patch, side)),
            augment=Augment(flip=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
            label_smoothing=0.0,
            bank=torch.zeros(beton.n, cells, cells),
            truth=None,
            row_of=torch.arange(beton.n),
            label_of=beton.labels,
        )
        subset = Subset(np.arange(beton.n), beton.labels)
        batch = _first_batch(
            beton, LoaderOptions(size=side), subset, Place(options.seed), options.rows
        )
        caption = f"Masks are random: {method.options.mask_ratio:.0%} of the cells of every donor."
        return _examples(method, batch, beton.classes, caption)


def run_examples(run: Path, data: Data | None, options: PreviewOptions) -> Examples:
    """Return mixes by the options of a run, with the masks of its newest checkpoint.

    Args:
        run: run folder of a BackMix run.
        data: the run's training data; None = the files that it names.
        options: how many examples, and what differs from the run.

    Raises:
        ValueError: an option is out of its range, no BackMix run, no checkpoint, or other data
            than the run's.
    """
    _check_wishes(options)
    config = read_config(run)
    try:
        trained = run_options(config["run"])
        check(trained)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{run}/config.json is no configuration of a run: {error!r}") from error
    if len(config["classes"]) != len(config["known"]):
        raise ValueError(
            f"{run}/config.json is damaged: it has {len(config['classes'])} classes and "
            f"{len(config['known'])} numbers of known ones"
        )
    if not isinstance(trained.method, BackMix):
        raise ValueError(f"{run} was not trained with BackMix: it mixes nothing")
    checkpoints = sorted((run / "checkpoints").glob("step-*.safetensors"))
    if not checkpoints:
        raise ValueError(f"{run} has no checkpoint to take the masks from: train it first")
    tensors, meta = load_tensors(checkpoints[-1])

    with open_set(data or trained.data) as beton:
        if beton.digest != config["data"]["digest"]:
            raise ValueError(
                f"{', '.join(map(str, beton.paths))} is not what {run} was trained on: its "
                f"digest is {beton.digest}, the run's {config['data']['digest']}"
            )
        subset = training_subset(trained, beton.labels, config["known"], beton.classes)
        side = options.size or trained.loader.size
        patch = _patch_within(options.patch or trained.method.patch, side)
        # Every example gets a patch, and the picture shows it where it was cut and pasted.
        shown = replace(
            trained,
            method=replace(trained.method, patch=patch, probability=1.0, warmup=0),
            augment=replace(trained.augment, flip=False, pad=0),
        )
        # The bank has the grid of the views that the run was trained on, whatever is shown here.
        model = build_model(trained.model, len(config["known"]), trained.loader.size)
        method = build_method(shown, model, beton, subset, torch.device("cpu"))
        assert isinstance(method, BackMixMethod)
        try:
            method.load({"bank": tensors["method.bank"]})
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{checkpoints[-1]} holds no masks of this run: {error}") from error
        batch = _first_batch(
            beton,
            replace(trained.loader, size=side),
            subset,
            Place(options.seed, int(meta["place"]["epoch"])),
            options.rows,
        )
        return _examples(method, batch, config["classes"], _run_caption(trained.method))


def run_options(document: dict[str, Any]) -> Run:
    """Return the options of a run from the `run` part of its config.json."""

    def plain(section: dict[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}

    sections = {"split": Split, "loader": LoaderOptions, "augment": Augment, "optim": Optim}
    fields = plain(document) | {
        name: make(**plain(document[name])) for name, make in sections.items()
    }
    method = plain(document["method"])
    kind = method.pop("type")
    if kind == "BackMix":
        masks = method.pop("masks")
        fields["method"] = BackMix(**method, masks=None if masks is None else Path(masks))
    else:
        del fields["method"]
    fields |= {"data": tuple(map(Path, document["data"])), "out": Path(document["out"])}
    return Run(**fields)


def grid_picture(examples: Examples, kind: Literal["png", "webp"] = "png") -> bytes:
    """Draw examples, three tiles each, two examples side by side, names below; an image file.

    Patches are outlined where they were cut and where they were pasted; masked cells are hatched.

    Args:
        examples: what to draw.
        kind: png keeps every pixel; webp is ten times smaller where views are photographs.
    """
    n, height, width, _ = examples.targets.shape
    factor = -(-_SMALLEST_TILE // min(height, width))
    tile_h, tile_w = height * factor, width * factor
    gap, head, foot, between = 8, 26, 24, 28
    across = min(_ACROSS, n)
    down = -(-n // across)
    block = 3 * tile_w + 2 * gap
    picture = Image.new(
        "RGB",
        (across * block + (across - 1) * between + 2 * gap, head + down * (tile_h + foot + gap)),
        _PAPER,
    )
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=14)
    for column in range(across):
        for tile, text in enumerate(_HEADS):
            x = gap + column * (block + between) + tile * (tile_w + gap)
            draw.text((x + tile_w / 2, head / 2), text, _INK, font, anchor="mm")
    for number in range(n):
        x = gap + number % across * (block + between)
        y = head + number // across * (tile_h + foot + gap)
        tiles = _tiles(examples, number, factor)
        below = (
            examples.target_names[number],
            examples.donor_names[number],
            f"label {examples.target_names[number]}",
        )
        for tile, (image, text) in enumerate(zip(tiles, below, strict=True)):
            left = x + tile * (tile_w + gap)
            picture.paste(image, (left, y))
            text = _shortened(text, font, tile_w)
            draw.text((left + tile_w / 2, y + tile_h + foot / 2), text, _GREY, font, anchor="mm")
    file = io.BytesIO()
    if kind == "png":
        picture.save(file, "png", optimize=True)
    else:
        picture.save(file, "webp", quality=90)
    return file.getvalue()


def _check_wishes(options: PreviewOptions) -> None:
    """Refuse options outside their ranges, by the names that the user typed."""
    if options.rows < 1:
        raise ValueError(f"--rows must be at least 1, got {options.rows}")
    if not 0 <= options.size <= LARGEST_VIEW:
        raise ValueError(f"--size must be 0 to {LARGEST_VIEW} pixels, got {options.size}")
    if not 0 <= options.seed < 1 << 64:
        raise ValueError(f"--seed must be in 0 .. 2^64 - 1, got {options.seed}")


def _patch_within(patch: int, side: int) -> int:
    if not 1 <= patch <= side:
        raise ValueError(f"--patch must be in 1 .. {side} (the view), got {patch}")
    return patch


def _first_batch(
    beton: BetonSet, options: LoaderOptions, subset: Subset, place: Place, count: int
) -> Batch:
    """Return the first `count` images of an epoch, as their loader would cut them."""
    few = replace(
        options, loader="turbo", batch=count, group=count, threads=1, prefetch=1,
        grow_from=0, grow=(0, 0),
    )  # fmt: skip
    with open_loader(beton.paths, few, split="train", subset=subset, seed=place.seed) as loader:
        return next(iter(loader.batches(place)))


def _examples(
    method: BackMixMethod, batch: Batch, classes: Sequence[str], caption: str
) -> Examples:
    """Mix a batch by a method that neither flips nor shifts, and keep what it was made of."""
    views = method.prepare(batch)
    augment, drawn = method.augment, method.drawn
    assert drawn is not None
    mean, std = (torch.tensor(values)[:, None, None] for values in (augment.mean, augment.std))
    mixes = (views * std + mean).round().clamp(0, 255).to(torch.uint8)
    masked = mask_views(
        method.masking_bank(),
        method.row_of[batch.pool_index[drawn.donor]],
        box_fractions(batch.boxes, batch.sizes)[drawn.donor],
        drawn.tie,
        method.mask_cells(),
        mode=method.mode(),
    )
    names = [classes[int(label)] for label in batch.labels.tolist()]
    return Examples(
        targets=batch.pool[batch.rows].numpy(),
        donors=batch.pool[drawn.donor].numpy(),
        masked=masked.numpy(),
        mixes=mixes.permute(0, 2, 3, 1).numpy(),
        patch=drawn.patch.numpy(),
        target_names=tuple(names),
        donor_names=tuple(names[row] for row in drawn.donor.tolist()),
        caption=caption,
    )


def _run_caption(method: BackMix) -> str:
    """Say in a sentence where the masks come from and what else training does."""
    share = f"{method.mask_ratio:.0%} of each donor's cells"
    whose = {
        "cam": f"Masks: the hottest {share} by the run's class activation maps.",
        "inverse": f"Masks: the coolest {share} by the run's class activation maps.",
        "oracle": f"Masks: the {share} with most true foreground.",
        "random": f"Masks: {share}, at random.",
        "none": "Nothing is masked.",
        "grey": "Everything is masked: the patch is plain fill.",
    }[method.mask]
    return (
        f"{whose} Shown before flip and shift; in training {method.probability:.0%} of the images "
        "receive a patch."
    )


def _tiles(examples: Examples, number: int, factor: int) -> list[Image.Image]:
    """Return the enlarged target, donor and mix of one example, with outlines and hatching."""
    ty, tx, dy, dx, ph, pw = (int(value) for value in examples.patch[number])
    tiles = []
    for pixels, (y, x), masked in (
        (examples.targets[number], (ty, tx), None),
        (examples.donors[number], (dy, dx), examples.masked[number]),
        (examples.mixes[number], (ty, tx), None),
    ):
        enlarged = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
        if masked is not None:
            enlarged = _hatched(enlarged, masked)
        if ph * pw:
            _outline(enlarged, y * factor, x * factor, ph * factor, pw * factor)
        tiles.append(Image.fromarray(enlarged))
    return tiles


def _hatched(pixels: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """Return the pixels with masked cells tinted blue and hatched in white and dark lines."""
    height, width, _ = pixels.shape
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    # Pixel y belongs to cell (y * cells) // side, as in the kernel.
    inside = masked[y * masked.shape[0] // height, x * masked.shape[1] // width]
    phase = (y + x) % 12
    tinted = (0.6 * pixels + 0.4 * np.array(_BLUE)).astype(np.uint8)
    tinted = np.where((phase < 2)[..., None], np.array(_PAPER, np.uint8), tinted)
    tinted = np.where(((phase == 2) | (phase == 3))[..., None], np.array(_INK, np.uint8), tinted)
    return np.where(inside[..., None], tinted, pixels)


def _outline(pixels: np.ndarray, y: int, x: int, height: int, width: int) -> None:
    """Draw a frame just inside a window: yellow between dark lines, visible on any picture.

    A window that is too small for all the lines gets the outer ones.
    """
    fitting = (min(height, width) + 1) // 2
    for inset, colour in enumerate((_INK, _YELLOW, _YELLOW, _INK)[:fitting]):
        window = pixels[y + inset : y + height - inset, x + inset : x + width - inset]
        window[[0, -1]] = colour
        window[:, [0, -1]] = colour


def _shortened(text: str, font: Any, width: int) -> str:
    """Return the text, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
