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

from backmix.kernels.mix_background import box_fractions, mask_views, view_heat
from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.beton import BetonSet, open_set
from backmix.pipeline.loader import LARGEST_VIEW, open_loader
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.subset import Subset
from backmix.train.check import check
from backmix.train.checkpoint import load_tensors, write_atomically
from backmix.train.known import training_subset
from backmix.train.methods.backmix import BackMixMethod
from backmix.train.methods.build import build as build_method
from backmix.train.methods.build import build_network
from backmix.train.methods.softmax import SoftmaxMethod
from backmix.train.options import Augment, BackMix, PreviewOptions
from backmix.train.run_folder import read_config, run_of

Data = Path | Sequence[Path]
"""One .beton file, or the shards of one."""

_SMALLEST_TILE = 160
"""Shortest side of a tile [pixels]; smaller views are enlarged by a whole number, unsmoothed."""
_ACROSS = 2
"""Examples side by side."""
_HEADS: tuple[str, ...] = "target", "donor, its mask hatched", "mix"
_HEAT_HEAD = "the donor's map"
_INK, _PAPER, _GREY = (17, 17, 17), (255, 255, 255), (90, 90, 90)
_BLUE, _YELLOW = (0, 114, 178), (240, 228, 66)
_RAMP = (0, 34, 78), (124, 123, 120), (254, 232, 56)
"""Colours of the least, the middle and the greatest value: the ends and the middle of cividis
(Nunez, Anderton, Renslow, PLoS ONE 2018), which all eyes see as dark to light."""
_FEWEST_PIXELS = 30
"""Cells of at least this side have their value written on them [pixels]."""


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
    heat: np.ndarray | None = None
    """float32 [n, g, g']: the donors' activation maps, which the masks are read from; None where
    they are not."""

    @property
    def pasted(self) -> np.ndarray:
        """Which pixels of the mixes show a donor: in the patch, not masked; bool [n, H, W]."""
        n, height, width, _ = self.mixes.shape
        ty, tx, dy, dx, ph, pw = (self.patch[:, k, None] for k in range(6))
        y, x = np.arange(height)[None], np.arange(width)[None]
        # Pixel y of a donor belongs to cell (y * cells) // side, as in the kernel.
        cells = self.masked.shape[1:]
        row = (y - ty + dy).clip(0, height - 1) * cells[0] // height
        column = (x - tx + dx).clip(0, width - 1) * cells[1] // width
        inside_y, inside_x = (y >= ty) & (y < ty + ph), (x >= tx) & (x < tx + pw)
        hidden = self.masked[np.arange(n)[:, None, None], row[:, :, None], column[:, None, :]]
        return inside_y[:, :, None] & inside_x[:, None, :] & ~hidden


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
        plain = Augment(flip=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        method = BackMixMethod(
            options=BackMix(mask="random", patch=_patch_within(patch, side)),
            host=SoftmaxMethod(plain, 0.0),
            augment=plain,
            bank=torch.zeros(beton.n, cells, cells),
            truth=None,
            row_of=torch.arange(beton.n),
            label_of=beton.labels,
        )
        subset = Subset(np.arange(beton.n), beton.labels)
        batch = first_batch(
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
        trained = run_of(config["run"])
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
            augment=replace(trained.augment, flip=False, pad=0, pool="none"),
        )
        # The bank has the grid of the views that the run was trained on, whatever is shown here.
        model = build_network(trained, len(config["known"]))
        method = build_method(shown, model, beton, subset, torch.device("cpu"))
        assert isinstance(method, BackMixMethod)
        method.side = side  # the patch is given for the views shown here
        try:
            own = {k.removeprefix("method."): v for k, v in tensors.items() if k[:7] == "method."}
            method.load(own)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{checkpoints[-1]} holds no masks of this run: {error}") from error
        batch = first_batch(
            beton,
            replace(trained.loader, size=side),
            subset,
            Place(options.seed, int(meta["place"]["epoch"])),
            options.rows,
        )
        return _examples(method, batch, config["classes"], _run_caption(trained.method))


def grid_picture(examples: Examples, kind: Literal["png", "webp"] = "png") -> bytes:
    """Draw examples, three tiles each, two examples side by side, names below; an image file.

    Patches are outlined where they were cut and where they were pasted; masked cells are hatched.
    Where masks are read from maps, the donor's map is a fourth tile: dark blue its least value,
    yellow its greatest.

    Args:
        examples: what to draw.
        kind: png keeps every pixel; webp is ten times smaller where views are photographs.
    """
    factor = _factor(examples.targets)
    rows, below = [], []
    for number, (target, donor) in enumerate(
        zip(examples.target_names, examples.donor_names, strict=True)
    ):
        rows.append(_tiles(examples, number, factor))
        below.append([target, donor, f"label {target}"])
    heads = list(_HEADS)
    if examples.heat is not None:
        heads.insert(1, _HEAT_HEAD)
        for number, tiles in enumerate(rows):
            tiles.insert(1, _heated(examples.donors[number], examples.heat[number], factor))
            below[number].insert(1, examples.donor_names[number])
    return _sheet(rows, heads, below, kind)


def map_picture(
    views: np.ndarray,
    names: Sequence[str],
    maps: Sequence[tuple[str, np.ndarray, tuple[float, float]]],
    marks: Sequence[np.ndarray] = (),
    kind: Literal["png", "webp"] = "webp",
) -> bytes:
    """Draw images with maps of their cells beside, two images side by side; an image file.

    A cell's colour goes from dark blue (least) to yellow (greatest); where there is room its value
    stands on it. The first map carries the marks: + on the cells of the first, x on those of the
    second.

    Args:
        views: uint8 [n, H, W, 3].
        names: what stands below the images, [n].
        maps: heading, values [n, g, g'], and what is least and greatest for the colours.
        marks: at most two, bool [n, g, g'] each.
        kind: as of `grid_picture`.
    """
    factor = _factor(views)
    rows = []
    for number, view in enumerate(views):
        tiles = [Image.fromarray(view.repeat(factor, 0).repeat(factor, 1))]
        for which, (_, values, (least, greatest)) in enumerate(maps):
            scaled = (values[number] - least) / max(greatest - least, 1e-12)
            tile = _heated(view, scaled, factor)
            _write_values(tile, values[number], scaled)
            if which == 0:
                for mark, shape in zip(marks, "+x", strict=False):
                    _draw_marks(tile, mark[number], shape)
            tiles.append(tile)
        rows.append(tiles)
    heads = ["image", *(head for head, _, _ in maps)]
    below = [[name, *[""] * len(maps)] for name in names]
    return _sheet(rows, heads, below, kind)


def _factor(views: np.ndarray) -> int:
    """Return by which whole number views [n, H, W, 3] are enlarged."""
    return -(-_SMALLEST_TILE // min(views.shape[1:3]))


def _sheet(
    rows: Sequence[Sequence[Image.Image]],
    heads: Sequence[str],
    below: Sequence[Sequence[str]],
    kind: Literal["png", "webp"],
) -> bytes:
    """Lay out rows of tiles of one size, two rows side by side, with texts; an image file."""
    n, tiles = len(rows), len(heads)
    tile_w, tile_h = rows[0][0].size
    gap, head, foot, between = 8, 26, 24, 28
    across = min(_ACROSS, n)
    down = -(-n // across)
    block = tiles * (tile_w + gap) - gap
    picture = Image.new(
        "RGB",
        (across * block + (across - 1) * between + 2 * gap, head + down * (tile_h + foot + gap)),
        _PAPER,
    )
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=14)
    for column in range(across):
        for tile, text in enumerate(heads):
            x = gap + column * (block + between) + tile * (tile_w + gap)
            text = _shortened(text, font, tile_w + gap)
            draw.text((x + tile_w / 2, head / 2), text, _INK, font, anchor="mm")
    for number, (images, texts) in enumerate(zip(rows, below, strict=True)):
        x = gap + number % across * (block + between)
        y = head + number // across * (tile_h + foot + gap)
        for tile, (image, text) in enumerate(zip(images, texts, strict=True)):
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


def ramp(values: np.ndarray) -> np.ndarray:
    """Return the colours of values in 0 .. 1, uint8 [..., 3]; what lies outside is clipped."""
    places = np.linspace(0, 1, len(_RAMP))
    channels = [np.interp(values, places, column) for column in zip(*_RAMP, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _heated(view: np.ndarray, scaled: np.ndarray, factor: int) -> Image.Image:
    """Return an enlarged view in grey under the colours of its cells, [g, g'] in 0 .. 1."""
    height, width = factor * view.shape[0], factor * view.shape[1]
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    colours = ramp(scaled)[y * scaled.shape[0] // height, x * scaled.shape[1] // width]
    grey = view.mean(2, keepdims=True).repeat(factor, 0).repeat(factor, 1)
    return Image.fromarray((0.35 * grey + 0.65 * colours).astype(np.uint8))


def _cell_boxes(tile: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
    """Return top, left, bottom, right of the cells of a tile, int [g, g', 4]."""
    (width, height), (rows, columns) = tile.size, shape
    # The first pixel y of cell k is the least with (y * rows) // height = k.
    y = -(-np.arange(rows + 1) * height // rows)
    x = -(-np.arange(columns + 1) * width // columns)
    corners = np.broadcast_arrays(y[:-1, None], x[None, :-1], y[1:, None] - 1, x[None, 1:] - 1)
    return np.stack(corners, -1)


def _write_values(tile: Image.Image, values: np.ndarray, scaled: np.ndarray) -> None:
    """Write each cell's value into its lower part, where there is room."""
    boxes = _cell_boxes(tile, values.shape)
    top, left, bottom, right = boxes[0, 0]
    if min(bottom - top, right - left) < _FEWEST_PIXELS:
        return
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(size=12)
    for place in np.ndindex(values.shape):
        top, left, bottom, right = boxes[place]
        ink = _INK if scaled[place] > 0.5 else _PAPER
        text = _short(float(values[place]))
        draw.text(((left + right) / 2, bottom - 9), text, ink, font, anchor="mm")


def _short(value: float) -> str:
    """Return a value in at most five letters."""
    text = f"{value:.2f}" if abs(value) < 9.95 else f"{value:.0f}"
    return "0" if text.strip("-0.") == "" else text


def _draw_marks(tile: Image.Image, marked: np.ndarray, shape: str) -> None:
    """Draw a + or an x, white in a dark rim, into the upper part of the marked cells."""
    draw = ImageDraw.Draw(tile)
    boxes = _cell_boxes(tile, marked.shape)
    for place in zip(*np.nonzero(marked), strict=True):
        top, left, bottom, right = (int(value) for value in boxes[place])
        room = min(bottom - top, right - left) + 1
        arm = max(room // 6, 2)
        y, x = top + (room // 3 if room >= _FEWEST_PIXELS else room // 2), (left + right) // 2
        lines = (
            [(x - arm, y, x + arm, y), (x, y - arm, x, y + arm)]
            if shape == "+"
            else [(x - arm, y - arm, x + arm, y + arm), (x - arm, y + arm, x + arm, y - arm)]
        )
        for width, colour in ((6, _INK), (3, _PAPER)):
            for line in lines:
                draw.line(line, colour, width)


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


def first_batch(
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
    views = method.prepare(batch, method.draw(batch))
    augment, drawn = method.augment, views.drawn
    mean, std = (torch.tensor(values)[:, None, None] for values in (augment.mean, augment.std))
    mixes = (views.images * std + mean).round().clamp(0, 255).to(torch.uint8)
    masked = mask_views(
        method.masking_bank(),
        method.row_of[batch.pool_index[drawn.donor]],
        box_fractions(batch.boxes, batch.sizes)[drawn.donor],
        drawn.tie,
        method.mask_cells(),
        mode=method.mode(),
    )
    names = [classes[int(label)] for label in batch.labels.tolist()]
    heat = None
    if method.options.mask in ("cam", "inverse"):
        # A donor's map beside it, in the donor's own view.
        rows = method.row_of[batch.pool_index[drawn.donor]]
        boxes = box_fractions(batch.boxes, batch.sizes)[drawn.donor]
        heat = _scaled(view_heat(method.bank, rows, boxes).float().numpy())
    return Examples(
        targets=batch.pool[batch.rows].numpy(),
        donors=batch.pool[drawn.donor].numpy(),
        masked=masked.numpy(),
        mixes=mixes.permute(0, 2, 3, 1).numpy(),
        patch=drawn.patch.numpy(),
        target_names=tuple(names),
        donor_names=tuple(names[row] for row in drawn.donor.tolist()),
        caption=caption,
        heat=heat,
    )


def _scaled(maps: np.ndarray) -> np.ndarray:
    """Return maps [n, g, g'] from 0, their least, to 1, their greatest; a flat one is 0."""
    least = maps.min((1, 2), keepdims=True)
    extent = maps.max((1, 2), keepdims=True) - least
    return (maps - least) / np.where(extent > 0, extent, 1)


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
