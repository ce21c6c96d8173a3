"""The pictures of docs/methods.md, drawn from real runs on the demo's images, and from formulas.

    python bench/method_figures.py --work FOLDER [--out docs] [--only NAME ...]
    python bench/method_figures.py --work FOLDER --evidence

FOLDER gets the images of seed 0 and a run of each method by its demo recipe, on one thread; what
is there already is not done again. The same runs give the same pictures to the byte.
"""

import argparse
import base64
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from backmix.kernels.location_confidence import location_confidence
from backmix.pipeline.batch import Place
from backmix.pipeline.beton import open_set
from backmix.train.augmentations import Op, draw_randaugment, operate
from backmix.train.checkpoint import load_tensors
from backmix.train.claims import (
    Network,
    Seen,
    background_evidence,
    class_evidence,
    look,
    open_network,
    ssod_locations,
    stored_images,
    true_foreground,
)
from backmix.train.cli import run as backmix
from backmix.train.demo import prepare_data
from backmix.train.demo_data import draw_sets, source_names
from backmix.train.known import training_subset
from backmix.train.methods.backmix import BackMixMethod
from backmix.train.methods.build import build
from backmix.train.methods.confusing import Confusion
from backmix.train.methods.ssod import SsodMethod, location_samples
from backmix.train.models.heads import ReciprocalPoints, Reconstruction, linear_head
from backmix.train.optim import learning_rate
from backmix.train.options import Arpl, PreviewOptions
from backmix.train.outputs import load_outputs
from backmix.train.preview import first_batch, ramp, run_examples
from backmix.train.recipes import cifar10_softmax, cifar10_strong_softmax

EPOCHS = {"arpl-cs": ["--epochs", "8"]}
"""The generator is far larger than the demo's network: on a CPU four passes must do."""
INK, SOFT, LINE = "#1f2328", "#57606a", "#8c959f"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
TIMES = "\N{MULTIPLICATION SIGN}"
TILE = 128
"""Side of an image in a picture."""


# --- parts of a picture ---------------------------------------------------------------------------


def svg(width: int, height: int, *parts: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="14" fill="{INK}">\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(
    x: float, y: float, words: str, *, bold: bool = False, at: str = "middle", fill: str = "",
    size: int = 0,
) -> str:  # fmt: skip
    style = ' font-weight="bold"' if bold else ""
    style += f' fill="{fill}"' if fill else ""
    style += f' font-size="{size}"' if size else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{at}"{style}>{escape(words)}</text>'


def picture(x: float, y: float, pixels: np.ndarray, side: int = TILE) -> str:
    """Show uint8 [h, w, 3], enlarged by a whole number so that no viewer smooths it."""
    factor = max(1, -(-side // pixels.shape[0]))
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1)).save(file, "png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    where = f'x="{x:g}" y="{y:g}" width="{side}" height="{side}"'
    return (
        f'<image {where} href="data:image/png;base64,{data}"/>'
        f'<rect {where} fill="none" stroke="{LINE}"/>'
    )


def colour(share: float) -> str:
    """Return the colour of a value in 0 .. 1."""
    return "#" + bytes(ramp(np.array(share)).tolist()).hex()


def cells(
    x: float, y: float, values: np.ndarray, least: float, greatest: float, *, side: int = TILE,
    form: str = ".1f",
) -> str:  # fmt: skip
    """Show values [g, g'] as coloured cells with their numbers."""
    rows, columns = values.shape
    height, width = side / rows, side / columns
    scaled = (values - least) / max(greatest - least, 1e-12)
    parts = []
    for (r, c), share in np.ndenumerate(scaled):
        left, top = x + c * width, y + r * height
        parts.append(
            f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" '
            f'fill="{colour(share)}" stroke="#ffffff"/>'
        )
        ink = "#ffffff" if share < 0.55 else INK
        words = format(values[r, c], form)
        parts.append(text(left + width / 2, top + height * 0.62, words, fill=ink, size=11))
    return "".join(parts)


def window(x: float, y: float, patch: Sequence[int], at: tuple[int, int], scale: float) -> str:
    ph, pw = int(patch[4]), int(patch[5])
    place = (
        f'x="{x + at[1] * scale:g}" y="{y + at[0] * scale:g}" '
        f'width="{pw * scale:g}" height="{ph * scale:g}" fill="none"'
    )
    return (
        f'<rect {place} stroke="#000000" stroke-width="4"/>'
        f'<rect {place} stroke="#f0e442" stroke-width="2"/>'
    )


def arrow(x: float, y: float, to: float, words: str = "") -> str:
    label = text((x + to) / 2, y - 8, words, size=12, fill=SOFT) if words else ""
    return (
        f'<path d="M{x:g} {y:g} H{to - 8:g}" stroke="{SOFT}" stroke-width="2"/>'
        f'<path d="M{to:g} {y:g} l-9 -5 v10 z" fill="{SOFT}"/>{label}'
    )


# --- what the pictures show -----------------------------------------------------------------------


class Runs:
    """The runs of the demo's recipes, seed 0."""

    def __init__(self, work: Path) -> None:
        self.folder = work / "seed0"
        prepare_data(self.folder, 0)

    def path(self, name: str) -> Path:
        """Return an evaluated run, trained first where it is not there."""
        run = self.folder / "runs" / name
        data = {part: str(self.folder / f"{part}.beton") for part in ("train", "test", "unknown")}
        train = ["train", f"demo-{name}", "--data", data["train"], "--out", str(run), "--quiet"]
        train += EPOCHS.get(name, [])
        unknown = ["--unknown", f"unknown={data['unknown']}"]
        if not (run / "model.safetensors").exists() and backmix(train):
            sys.exit(f"the run {name} failed")
        if not (run / "metrics.json").exists() and backmix(
            ["evaluate", str(run), "--test", data["test"], *unknown]
        ):
            sys.exit(f"the run {name} could not be evaluated")
        return run

    def network(self, name: str) -> Network:
        return open_network(self.path(name))

    def seen(self, network: Network, kind: str, count: int = 60) -> Seen:
        outputs = load_outputs(network.trained.run / "scores" / f"{kind}.safetensors")
        return look(network, stored_images(outputs, count))


def known_and_unknown(network: Network, known: Seen, unknown: Seen) -> tuple[int, int]:
    """Return a known image that is right and accepted by a wide margin, and an unknown one that is
    accepted, too: the most accepted of each."""
    right = known.logits.argmax(1).numpy() == known.labels
    k = np.where(right, known.logits.amax(1).numpy(), -np.inf)
    return int(k.argmax()), int(unknown.logits.amax(1).argmax())


@torch.inference_mode()
def softmax(runs: Runs) -> str:
    network = runs.network("softmax")
    known, unknown = runs.seen(network, "known"), runs.seen(network, "unknown")
    parts = [text(84, 22, "image", bold=True), text(284, 22, "evidence of its cells", bold=True)]
    parts += [text(484, 22, "their mean, class by class", bold=True)]
    names = network.trained.classes
    rows = zip((known, unknown), known_and_unknown(network, known, unknown), strict=True)
    evidence = [class_evidence(network.model.head, shown.maps[[n]])[0] for shown, n in rows]
    top = max(float(e.max()) for e in evidence)
    low = min(float(e.mean((1, 2)).min()) for e in evidence)
    for row, found in enumerate(evidence):
        y = 36 + row * 172
        shown, n = ((known, unknown)[row], known_and_unknown(network, known, unknown)[row])
        logits = found.mean((1, 2))
        best = int(logits.argmax())
        parts += [
            picture(20, y, shown.views[n]),
            cells(220, y, found[best].detach().numpy(), 0, top),
            text(84, y + 146, "known" if row == 0 else "unknown", fill=(BLUE, ORANGE)[row]),
            text(284, y + 146, f"for {names[best]}", fill=SOFT),
            arrow(156, y + 64, 212),
            arrow(356, y + 64, 412),
        ]
        scale = 120 / (float(max(e.mean((1, 2)).max() for e in evidence)) - low)
        zero = 470 - low * scale
        for k, value in enumerate(logits.tolist()):
            h = y + 4 + k * 20
            bar = sorted((zero, zero + value * scale))
            fill = GREEN if k == best else "#b8c0c8"
            parts.append(
                f'<rect x="{bar[0]:g}" y="{h}" width="{max(bar[1] - bar[0], 1):g}" height="15" '
                f'fill="{fill}"/>'
            )
            parts.append(text(462, h + 12, names[k].removeprefix("digit"), at="end", size=12))
            parts.append(text(bar[1] + 5, h + 12, f"{value:.1f}", at="start", size=12))
        parts.append(text(530, y + 146, f"max z = {float(logits.max()):.1f}", fill=SOFT))
    return svg(680, 372, *parts)


def mixing(runs: Runs) -> str:
    examples = run_examples(runs.path("backmix"), None, PreviewOptions(rows=8))
    shares = examples.pasted.mean((1, 2))
    n = int(shares.argmax())
    assert examples.heat is not None
    heat, patch = examples.heat[n], examples.patch[n]
    masked = examples.masked[n]
    parts = []
    heads = "target", "donor", "its map, from the bank", "masked: the hottest", "mix"
    below = (
        examples.target_names[n],
        examples.donor_names[n],
        "coolest 0, hottest 1",
        f"{masked.sum()} of {masked.size} cells",
        f"label: {examples.target_names[n]}",
    )
    for k, (head, foot) in enumerate(zip(heads, below, strict=True)):
        x = 16 + k * 172
        parts += [text(x + 64, 22, head, bold=True), text(x + 64, 182, foot, fill=SOFT)]
    scale = TILE / 32
    parts.append(picture(16, 34, examples.targets[n]) + window(16, 34, patch, patch[:2], scale))
    parts.append(picture(188, 34, examples.donors[n]) + window(188, 34, patch, patch[2:4], scale))
    parts.append(cells(360, 34, heat, 0, 1))
    donor = examples.donors[n].copy()
    owner = np.arange(32) * masked.shape[0] // 32
    donor[masked[owner][:, owner]] = [round(c) for c in (114.75,) * 3]
    parts.append(picture(532, 34, donor) + window(532, 34, patch, patch[2:4], scale))
    parts.append(picture(704, 34, examples.mixes[n]) + window(704, 34, patch, patch[:2], scale))
    parts += [arrow(318, 98, 358), arrow(490, 98, 530), arrow(662, 98, 702)]
    return svg(848, 198, *parts)


def sampling(runs: Runs) -> str:
    found = ssod_locations(runs.network("ssod"), 24)
    assert found.rejection is not None
    order = np.argsort(-found.unknown.sum((1, 2)), kind="stable")
    most = float(np.abs(found.rejection).max())
    parts = []
    for k, head in enumerate(
        ("training image", "P(own class) of a cell", "samples", "what the head learns")
    ):
        parts.append(text(84 + k * 184, 22, head, bold=True))
    for row, n in enumerate(order[:2]):
        y = 34 + row * 164
        p = found.p_true[n]
        signs = [(found.known[n], "+"), (found.unknown[n], TIMES)]
        sampled = np.where(found.known[n], 1.0, np.where(found.unknown[n], 0.0, 0.5))
        parts += [
            picture(20, y, found.views[n]),
            cells(204, y, p, 0, 1, form=".2f"),
            *_signs(388, y, sampled, signs),
            cells(572, y, found.rejection[n], -most, most),
            text(84, y + 146, found.names[n], fill=SOFT),
            text(452, y + 146, f"+ known, {TIMES} unknown, blank ignored", fill=SOFT, size=12),
            text(636, y + 146, "logit of “known”", fill=SOFT, size=12),
            arrow(152, y + 64, 200),
            arrow(336, y + 64, 384),
            arrow(520, y + 64, 568),
        ]
    return svg(720, 350, *parts)


def _signs(
    x: float, y: float, values: np.ndarray, signs: Sequence[tuple[np.ndarray, str]]
) -> list[str]:
    """Show which cells are samples: a coloured grid with signs and no numbers."""
    rows, columns = values.shape
    height, width = TILE / rows, TILE / columns
    parts = []
    for (r, c), value in np.ndenumerate(values):
        fill = "#eef1f4" if value == 0.5 else colour(value)
        left, top = x + c * width, y + r * height
        parts.append(
            f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" '
            f'fill="{fill}" stroke="#ffffff"/>'
        )
        for mark, sign in signs:
            if mark[r, c]:
                ink = INK if value > 0.5 else "#ffffff"
                middle = (left + width / 2, top + height / 2 + 6)
                parts.append(text(*middle, sign, size=18, bold=True, fill=ink))
    return parts


def reciprocal(runs: Runs) -> str:
    """Left the formula in two channels, right the features of a run on their principal axes."""
    side, half = 300, 3.0
    points = torch.tensor([[0.55, 0.2], [-0.45, 0.45], [-0.1, -0.6]])
    head = ReciprocalPoints(3, 2)
    with torch.no_grad():
        head.points.copy_(points)
        line = (torch.arange(100) + 0.5) / 100 * 2 * half - half
        y, x = torch.meshgrid(-line, line, indexing="ij")
        plane = torch.stack([x, y], -1).view(-1, 2, 1, 1)
        largest = head(plane).amax(1).view(100, 100).numpy()
    low, high = float(largest.min()), float(np.quantile(largest, 0.97))
    shown = ramp((largest - low) / (high - low))
    parts = [
        text(170, 22, "largest logit over the plane of two channels", bold=True),
        picture(20, 34, shown, side),
    ]
    scale = side / (2 * half)

    def place(point: Sequence[float]) -> tuple[float, float]:
        return 20 + (point[0] + half) * scale, 34 + (half - point[1]) * scale

    for k, point in enumerate(points.tolist()):
        px, py = place(point)
        away = [-c / float(np.hypot(*point)) for c in point]
        ex, ey = place([point[0] + 2.7 * away[0], point[1] + 2.7 * away[1]])
        parts += [
            f'<path d="M{px:.1f} {py:.1f} L{ex:.1f} {ey:.1f}" stroke="#ffffff" stroke-width="2" '
            'stroke-dasharray="5 4"/>',
            f'<circle cx="{ex:.1f}" cy="{ey:.1f}" r="4" fill="#ffffff"/>',
            f'<rect x="{px - 6:.1f}" y="{py - 6:.1f}" width="12" height="12" fill="{ORANGE}" '
            'stroke="#ffffff" stroke-width="2"/>',
            text(
                px + (11, -11, -11)[k],
                py - 6,
                f"p{k + 1}",
                fill="#ffffff",
                bold=True,
                at=("start", "end", "end")[k],
            ),
            text(ex + 8, ey + 14, f"class {k + 1}", fill="#ffffff", at="start"),
        ]
    parts.append(text(170, 354, "least (dark) near the points, where unknowns stay", fill=SOFT))

    network = runs.network("arpl")
    learned = network.model.head
    assert isinstance(learned, ReciprocalPoints)
    features = {
        kind: load_outputs(network.trained.run / "scores" / f"{kind}.safetensors")
        for kind in ("known", "unknown")
    }
    known, unknown = features["known"], features["unknown"]
    middle = known.features.mean(0)
    axes = np.linalg.svd(known.features - middle, full_matrices=False)[2][:2]
    axes *= np.sign(axes[:, np.abs(axes).argmax(1)].diagonal())[:, None]
    flat = {
        "known": (known.features[::6] - middle) @ axes.T,
        "unknown": (unknown.features[::6] - middle) @ axes.T,
        "points": (learned.points.detach().numpy() - middle) @ axes.T,
    }
    every = np.concatenate(list(flat.values()))
    least, extent = every.min(0), every.max(0) - every.min(0)
    parts.append(text(530, 22, "features of a run, on two principal axes", bold=True))
    parts.append(f'<rect x="370" y="34" width="320" height="300" fill="#f6f8fa" stroke="{LINE}"/>')

    def at(point: np.ndarray) -> tuple[float, float]:
        share = (point - least) / extent
        return 384 + 292 * share[0], 320 - 272 * share[1]

    for point in flat["known"]:
        cx, cy = at(point)
        parts.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill="{BLUE}" fill-opacity="0.6"/>'
        )
    for point in flat["unknown"]:
        cx, cy = at(point)
        d = f"M{cx - 3:.1f} {cy - 3:.1f} l6 6 m0 -6 l-6 6"
        parts.append(f'<path d="{d}" stroke="{INK}" stroke-width="1.2" fill="none"/>')
    for point in flat["points"]:
        cx, cy = at(point)
        parts.append(
            f'<rect x="{cx - 6:.1f}" y="{cy - 6:.1f}" width="12" height="12" fill="{ORANGE}" '
            'stroke="#ffffff" stroke-width="2"/>'
        )
    parts += [
        f'<circle cx="384" cy="350" r="4" fill="{BLUE}"/>',
        text(394, 354, "known", at="start", fill=SOFT),
        f'<path d="M462 346 l7 7 m0 -7 l-7 7" stroke="{INK}" stroke-width="1.5" fill="none"/>',
        text(476, 354, "unknown", at="start", fill=SOFT),
        f'<rect x="562" y="344" width="11" height="11" fill="{ORANGE}"/>',
        text(580, 354, "reciprocal points", at="start", fill=SOFT),
    ]
    return svg(710, 368, *parts)


def confusing(runs: Runs) -> str:
    network = runs.network("arpl-cs")
    options, run = network.trained.options.method, network.trained.options
    assert isinstance(options, Arpl) and isinstance(network.model.head, ReciprocalPoints)
    confusion = Confusion(options, run.augment, run.loader.size, run.seed, torch.device("cpu"))
    newest = sorted((network.trained.run / "checkpoints").glob("step-*.safetensors"))[-1]
    tensors, _ = load_tensors(newest)
    confusion.load(
        {k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")}
    )
    with open_set(network.trained.files) as data:
        subset = training_subset(run, data.labels, list(network.trained.known), data.classes)
        batch = first_batch(data, run.loader, subset, Place(0), 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in (run.augment.mean, run.augment.std))
    with torch.inference_mode():
        generated = confusion.images(batch, 0)
    pixels = (generated * std + mean).round().clamp(0, 255).to(torch.uint8)
    fakes = pixels.permute(0, 2, 3, 1).numpy()
    reals = batch.pool[batch.rows]
    passes = run.epochs // 2
    parts = [
        text(20, 22, "training images", at="start", bold=True),
        text(724, 22, "D learns to tell them from those below", at="end", fill=SOFT),
        text(20, 154, f"generated images, after {passes} passes", at="start", bold=True),
        text(
            724,
            154,
            "G learns to fool D, and to lie equally far from all points",
            at="end",
            fill=SOFT,
        ),
    ]
    for k in range(7):
        parts.append(picture(20 + k * 102, 34, reals[k].numpy(), 96))
        parts.append(picture(20 + k * 102, 166, fakes[k], 96))
    return svg(744, 276, *parts)


def rebuilding(runs: Runs) -> str:
    network = runs.network("pcssr")
    head = network.model.head
    assert isinstance(head, Reconstruction)
    known, unknown = runs.seen(network, "known"), runs.seen(network, "unknown")
    names = network.trained.classes
    right = known.logits.argmax(1).numpy() == known.labels
    first = int(np.flatnonzero(right)[0])
    picked = [(known, first), (unknown, int(unknown.logits.amax(1).argmin()))]
    parts = [
        text(84 + k * 190, 22, words, bold=True)
        for k, words in enumerate(("image", "error of its class", "probability of it"))
    ]
    found = []
    with torch.inference_mode():
        for shown, n in picked:
            logits = head.cell_logits(shown.maps[[n]])[0]
            best = int(shown.logits[n].argmax())
            errors = (logits[best].abs() / head.gamma).numpy()
            found.append((best, errors, logits.softmax(0)[best].numpy()))
    most = max(float(errors.max()) for _, errors, _ in found)
    for row, ((shown, n), (best, errors, q)) in enumerate(zip(picked, found, strict=True)):
        y = 34 + row * 168
        p = float(shown.logits[n].max().exp())
        parts += [
            picture(20, y, shown.views[n]),
            cells(210, y, errors, 0, most),
            cells(400, y, q, 0, 1, form=".2f"),
            text(84, y + 146, ("known", "unknown")[row], fill=(BLUE, ORANGE)[row]),
            text(274, y + 146, f"auto-encoder of {names[best]}", fill=SOFT),
            text(464, y + 146, f"mean p = {p:.2f}", fill=SOFT),
            arrow(154, y + 64, 204),
            arrow(344, y + 64, 394),
        ]
    return svg(548, 356, *parts)


def strong(runs: Runs) -> str:
    plain, recipe = cifar10_softmax(), cifar10_strong_softmax()
    parts = [text(200, 22, "learning rate over the epochs", bold=True)]
    left, top, width, height = 60, 36, 280, 220
    parts.append(
        f'<path d="M{left} {top} V{top + height} H{left + width}" stroke="{SOFT}" fill="none"/>'
    )
    for run, colour, name in ((recipe, BLUE, "strong"), (plain, ORANGE, "plain")):
        optim = run.optim
        rates = [
            learning_rate(
                optim.schedule,
                epoch,
                peak=optim.lr,
                steps=run.epochs,
                steps_per_epoch=1,
                warmup=optim.warmup,
                milestones=optim.milestones,
                factor=optim.factor,
                cycles=optim.cycles,
            )
            for epoch in range(run.epochs)
        ]
        path = " ".join(
            f"{left + width * epoch / recipe.epochs:.1f},{top + height * (1 - rate / 0.1):.1f}"
            for epoch, rate in enumerate(rates)
        )
        parts.append(f'<polyline points="{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
        where = (330, 60) if name == "strong" else (78, 214)
        parts.append(text(*where, name, at="end" if name == "strong" else "start", fill=colour))
    parts += [
        text(left - 6, top + 6, "0.1", at="end", size=12),
        text(left - 6, top + height + 4, "0", at="end", size=12),
        text(left, top + height + 18, "0", size=12),
        text(left + width, top + height + 18, str(recipe.epochs), size=12),
        text(560, 22, f"RandAugment at magnitude {recipe.augment.magnitude}", bold=True),
    ]
    examples = run_examples(runs.path("backmix"), None, PreviewOptions(rows=1))
    chosen = [Op.IDENTITY, Op.SOLARIZE, Op.BRIGHTNESS, Op.POSTERIZE, Op.ROTATE, Op.TRANSLATE_X]
    drawn = draw_randaugment(0, 0, np.arange(500), 0, recipe.augment.magnitude, True)
    for k, op in enumerate(chosen):
        image = torch.from_numpy(examples.targets[:1].copy())
        if op is not Op.IDENTITY:
            operate(image, drawn.of(np.flatnonzero(drawn.op == op)[:1]))
        x, y = 400 + k % 3 * 112, 36 + k // 3 * 132
        words = "the image" if op is Op.IDENTITY else op.name.lower().replace("_", " ")
        parts += [picture(x, y, image[0].numpy(), 96), text(x + 48, y + 114, words, size=12)]
    return svg(740, 300, *parts)


def mixed_sampling(runs: Runs) -> str:
    network = runs.network("backmix-ssod")
    run, model = network.trained.options, network.model
    newest = sorted((network.trained.run / "checkpoints").glob("step-*.safetensors"))[-1]
    tensors, _ = load_tensors(newest)
    plain = replace(run.method, probability=1.0, masks=None)
    shown = replace(run, method=plain, augment=replace(run.augment, flip=False, pad=0))
    with open_set(network.trained.files) as data, torch.inference_mode():
        subset = training_subset(run, data.labels, list(network.trained.known), data.classes)
        method = build(shown, model, data, subset, torch.device("cpu"))
        assert isinstance(method, BackMixMethod) and isinstance(method.host, SsodMethod)
        own = {k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")}
        method.load(own)
        batch = first_batch(data, run.loader, subset, Place(0, 16), 32)
        views = method.prepare(batch, method.draw(batch))
        regions = views.regions
        assert regions is not None
        logits, maps = model(views.images)
        right = logits.argmax(1) == batch.labels
        head = linear_head(model)
        p_true = location_confidence(maps, head.weight, head.bias, batch.labels).p_true
        known, unknown = location_samples(p_true, right, method.host.options, regions)
    mean, std = (torch.tensor(v)[:, None, None] for v in (run.augment.mean, run.augment.std))
    mixes = (views.images * std + mean).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    pasted = regions.pasted.mean((1, 2))
    # Few images show every kind of sample: the one with most of both.
    n = int((torch.minimum(known.sum((1, 2)), torch.tensor(4.0)) * (pasted > 0.08)).argmax())
    weights = np.where(unknown[n] > 0, -unknown[n].numpy(), known[n].numpy())
    y = 34
    patch = views.drawn.patch[n].tolist()
    heat = regions.heat[n].numpy()
    parts = [
        text(84 + k * 186, 22, words, bold=True)
        for k, words in enumerate(
            ("mix", "pasted share", "the target's own map", "samples of the step")
        )
    ]
    parts += [
        picture(20, y, mixes[n].numpy()) + window(20, y, patch, (patch[0], patch[1]), TILE / 32),
        cells(206, y, regions.pasted[n].numpy(), 0, 1, form=".2f"),
        cells(392, y, heat, float(heat.min()), float(heat.max()), form=".2f"),
        _weights(578, y, weights),
        text(84, y + 146, f"label: {network.trained.classes[int(batch.labels[n])]}", fill=SOFT),
        text(270, y + 146, "without fill", fill=SOFT),
        text(456, y + 146, "hottest, coolest quarter count", fill=SOFT, size=12),
        text(642, y + 146, "+ known; unknown with", fill=SOFT, size=12),
        text(642, y + 162, "the weight written", fill=SOFT, size=12),
    ]
    return svg(726, 204, *parts)


def _weights(x: float, y: float, weights: np.ndarray) -> str:
    """Show weights of known (above 0) and unknown (below 0) cells."""
    colours = np.where(weights > 0, 1.0, np.where(weights < 0, 0.0, 0.5))
    parts = _signs(x, y, colours, [])
    rows, columns = weights.shape
    for (r, c), value in np.ndenumerate(weights):
        if value:
            middle = (x + (c + 0.5) * TILE / columns, y + (r + 0.5) * TILE / rows + 4)
            words = "+" if value > 0 else f"{-value:.2f}"
            ink = INK if value > 0 else "#ffffff"
            size = 18 if value > 0 else 11
            parts.append(text(*middle, words, size=size, fill=ink, bold=value > 0))
    return "".join(parts)


FIGURES: dict[str, Callable[[Runs], str]] = {
    "softmax": softmax,
    "backmix": mixing,
    "ssod": sampling,
    "backmix-ssod": mixed_sampling,
    "arpl": reciprocal,
    "arpl-cs": confusing,
    "cssr": rebuilding,
    "strong": strong,
}


def evidence_table(runs: Runs) -> str:
    """Return the evidence of background of the runs, by true masks and by the coolest quarter."""
    truth = runs.folder / "truth"
    if not truth.exists():
        sets, _ = draw_sets(0)
        for kind in ("test", "unknown"):
            for name, mask in zip(source_names(sets[kind]), sets[kind].foreground, strict=True):
                path = truth / kind / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    lines = [
        "| method | other cells, known | background, known | background, unknown "
        "| beyond the middle: known | unknown | by the coolest quarter: known | unknown |",
        "|" + "---|" * 8,
    ]
    for name in ("softmax", "backmix", "ssod", "backmix-ssod", "arpl", "pcssr"):
        network = runs.network(name)
        row: list[str] = []
        shares: list[list[str]] = [[], []]
        middles = [0.0, 0.0]
        for kind, masks in (("known", "test"), ("unknown", "unknown")):
            outputs = load_outputs(network.trained.run / "scores" / f"{kind}.safetensors")
            images = stored_images(outputs, len(outputs))
            seen = look(network, images)
            grid = seen.maps.shape[2], seen.maps.shape[3]
            foreground = true_foreground(truth / masks, images, grid)
            for way, given in enumerate((foreground, None)):
                found = background_evidence(network, seen, given)
                if kind == "known":
                    middles[way] = float(np.median(found.of_rest))
                share = float((found.of_background > middles[way]).mean())
                shares[way].append(f"{share:.1%}")
                if way == 0:
                    if kind == "known":
                        row.append(f"{found.of_rest.mean():.1f}")
                    row.append(f"{found.of_background.mean():.1f}")
        lines.append("| " + " | ".join([name, *row, *shares[0], *shares[1]]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True, help="folder of images and runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--only", nargs="*", choices=sorted(FIGURES), default=sorted(FIGURES))
    parser.add_argument("--evidence", action="store_true", help="print evidence of background")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(asked.work)
    if asked.evidence:
        print(evidence_table(runs))
        return
    for name in asked.only:
        path = asked.out / f"method-{name}.svg"
        path.write_text(FIGURES[name](runs), encoding="utf-8")
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
