"""What the methods claim of image backgrounds, as arrays: nothing is drawn here.

Three measurements on a finished run. How much class evidence lies in the background (the claim of
BackMix: less than in a network trained without mixing). Which locations of training images serve as
samples of known and unknown (the rule of SSOD). Where such substitutes for unknown images lie among
the features of known and of really unknown ones. Everything is computed in evaluation mode, from
the images that the run names; whoever moved them gets a ValueError.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from backmix.kernels.location_confidence import location_confidence
from backmix.pipeline.batch import Place
from backmix.pipeline.beton import open_set
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.subset import Subset
from backmix.train.image_sets import BetonImages
from backmix.train.known import training_subset
from backmix.train.methods.backmix import foreground_shares
from backmix.train.methods.ssod import location_samples, rejection_logits
from backmix.train.methods.views import unmixed
from backmix.train.models.build import Model
from backmix.train.models.heads import CellSums, ReciprocalPoints, Reconstruction, cam_inputs
from backmix.train.options import BackMix, PreviewOptions, Ssod, host_of
from backmix.train.outputs import Outputs
from backmix.train.preview import first_batch, run_examples
from backmix.train.trained import Trained, load_model, read_run

COOL_SHARE = 0.25
"""Share of an image's cells that count as its background, where no mask says more."""
COVERED = 0.5
"""A cell of a mix is background where visible pasted pixels cover at least this share of it."""
_BATCH = 64
_MOST_LOCATIONS = 256
"""Images of which SSOD's samples are taken: no more than a batch of that many."""


@dataclass(frozen=True, eq=False)
class Network:
    """A finished run, opened."""

    trained: Trained
    model: Model
    """In evaluation mode, on the CPU."""


@dataclass(frozen=True, eq=False)
class Seen:
    """n images, and what the network makes of them."""

    views: np.ndarray
    """uint8 [n, H, W, 3]."""
    labels: np.ndarray
    """int64 [n], -1 = unknown."""
    logits: Tensor
    """float32 [n, K]."""
    maps: Tensor
    """float32 [n, C, g, g']: the last feature map."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """How much the cells of n images speak for any class."""

    cells: np.ndarray
    """float64 [n, g, g']: the greatest logit of each cell, over the classes."""
    background: np.ndarray
    """bool [n, g, g']."""
    largest: np.ndarray
    """float64 [n]: the greatest logit of each image."""

    @property
    def of_background(self) -> np.ndarray:
        """The evidence of all background cells, float64 [m]."""
        return self.cells[self.background]

    @property
    def of_rest(self) -> np.ndarray:
        """The evidence of all other cells, float64 [m]."""
        return self.cells[~self.background]


@dataclass(frozen=True, eq=False)
class Locations:
    """What SSOD's rule says of the locations of n training images, before flip and shift."""

    views: np.ndarray
    """uint8 [n, H, W, 3]."""
    names: tuple[str, ...]
    """Their classes."""
    p_true: np.ndarray
    """float32 [n, g, g']: probability of the image's own class at each location."""
    known: np.ndarray
    """bool [n, g, g']: locations that are samples of known ones."""
    unknown: np.ndarray
    """bool [n, g, g']: locations that are samples of unknown ones."""
    rejection: np.ndarray | None
    """float32 [n, g, g']: logit of the rejection head, larger = more known; None without one."""
    features: np.ndarray
    """float32 [n, g, g', C]."""
    rule: str
    """The rule in words."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """Directions of features in the plane, by kind: known, unknown and, if any, surrogate."""

    pca: dict[str, np.ndarray]
    """float64 [m, 2] by kind: on the two principal axes of known and unknown images together."""
    explained: float
    """Share of their variance that these axes have."""
    tsne: dict[str, np.ndarray]
    """float64 [m, 2] by kind."""
    nearer: dict[str, float]
    """Of known and of unknown images: the share that lies nearer to a surrogate than to any (other)
    known image; empty without surrogates."""


def open_network(run: Path, program: str = "") -> Network:
    """Open a finished run, `program` as in `load_model`; ValueError says what is missing."""
    return Network(read_run(run), load_model(run, program))


def look(network: Network, images: BetonImages) -> Seen:
    """Show a network some images, as an evaluation does."""
    view = network.trained.loader
    options = LoaderOptions(
        loader="turbo", batch=_BATCH, size=view.size, crop=view.crop, eval_crop=view.eval_crop
    )
    parts = []
    with open_loader(images.files, options, split="eval", subset=images.subset) as loader:
        for batch in loader.batches(Place(seed=0)):
            with torch.inference_mode():
                logits, maps = network.model(unmixed(batch, network.trained.augment, None))
            parts.append((batch.pool[batch.rows], batch.labels, logits, maps))
    views, labels, logits, maps = (torch.cat(column) for column in zip(*parts, strict=True))
    return Seen(views.numpy(), labels.numpy(), logits, maps)


def stored_images(outputs: Outputs, count: int) -> BetonImages:
    """Return at most `count` images of an evaluated set, evenly spaced in its order.

    Raises:
        ValueError: the set is a folder, or its files are not there or not the same any more.
    """
    files = tuple(map(Path, outputs.files))
    for file in files:
        if not file.exists():
            raise ValueError(_absent(file))
        if file.is_dir():
            raise ValueError(f"{file} is a folder; this is measured on sets in .beton files")
    with open_set(files) as data:
        if data.digest != outputs.digest:
            raise ValueError(f"{', '.join(outputs.files)} is not what the run was judged on")
    n = len(outputs)
    chosen = np.arange(min(count, n)) * n // max(min(count, n), 1)
    subset = Subset(outputs.index[chosen].astype(np.int64), outputs.labels[chosen])
    return BetonImages(outputs.name, outputs.kind, files, outputs.digest, subset)


def class_evidence(head: nn.Module, maps: Tensor) -> Tensor:
    """Return how much each cell speaks for each class, float32 [n, K, g, g'].

    Linear: w_k . F_l + b_k, whose mean over the cells is the image's logit. Reciprocal points:
    -(1 + 2 / C) p_k . F_l + |p_k|^2 / C, whose mean is the image's logit but for |f|^2 / C, which
    all classes share. Reconstruction: the cell's logit, of which the network's p is made.

    Args:
        head: the network's class head.
        maps: its last feature maps, float32 [n, C, g, g'].

    Raises:
        ValueError: a head of which no evidence of cells is defined, or maps of one cell.
    """
    if maps.shape[2] * maps.shape[3] == 1:
        raise ValueError("the network has no map that says which cell speaks for what")
    match head:
        case Reconstruction():
            return head.cell_logits(maps)
        case CellSums():
            return maps
        case ReciprocalPoints():
            _, weights = cam_inputs(head, maps)
            constant = head.points.square().mean(1)
        case nn.Linear():
            weights = head.weight
            constant = head.bias if head.bias is not None else weights.new_zeros(len(weights))
        case _:
            raise ValueError(f"evidence of cells is not defined for a {type(head).__name__} head")
    return torch.einsum("nchw,kc->nkhw", maps, weights) + constant[:, None, None]


@torch.inference_mode()
def background_evidence(
    network: Network, seen: Seen, foreground: np.ndarray | None = None
) -> Evidence:
    """Return how much class evidence lies in background, and how much elsewhere.

    Args:
        network: the run.
        seen: images that were shown to it.
        foreground: true share of foreground of each cell, [n, g, g']: background is where it is 0.
            Without it, background is the coolest quarter of each image's cells by the map of its
            predicted class, and at least one.

    Raises:
        ValueError: the head has no evidence of cells, or `foreground` has another shape.
    """
    cells = class_evidence(network.model.head, seen.maps).amax(1).double().numpy()
    if foreground is None:
        background = coolest(_predicted_map(network, seen))
    elif foreground.shape != cells.shape:
        raise ValueError(f"foreground has shape {foreground.shape}, the cells {cells.shape}")
    else:
        background = foreground == 0
    return Evidence(cells, background, seen.logits.amax(1).double().numpy())


def coolest(heat: np.ndarray, share: float = COOL_SHARE) -> np.ndarray:
    """Return each image's coolest cells, bool [n, g, g']; of equal ones the first.

    Args:
        heat: [n, g, g'].
        share: of the cells, rounded down, but at least one.
    """
    flat = heat.reshape(len(heat), -1)
    count = max(int(share * flat.shape[1] + 1e-9), 1)
    chosen = np.zeros(flat.shape, bool)
    np.put_along_axis(chosen, flat.argsort(1, kind="stable")[:, :count], True, 1)
    return chosen.reshape(heat.shape)


def true_foreground(masks: Path, images: BetonImages, grid: tuple[int, int]) -> np.ndarray:
    """Return the share of foreground of each cell by given masks, float16 [n, g, g'].

    For runs whose views are whole images; as `--method.masks`, a PNG per source name.

    Raises:
        ValueError: a mask is missing, no image, or of another size than its image.
    """
    with open_set(images.files) as data:
        return foreground_shares(masks, data, images.subset, grid)


def ssod_locations(network: Network, count: int, seed: int = 0) -> Locations:
    """Apply SSOD's rule to some training images, in plain views and evaluation mode.

    The options are the run's where it is one of SSOD, else the defaults. With a share instead of
    gamma, the extremes are those of a whole batch.

    Args:
        network: a run with a linear head.
        count: how many images to return.
        seed: which images.

    Raises:
        ValueError: another head, or the training data have gone or changed.
    """
    head, model, run = network.model.head, network.model, network.trained.options
    if not isinstance(head, nn.Linear):
        raise ValueError("SSOD's rule reads the linear class head, which this network has not")
    host = host_of(run.method)
    options = host if isinstance(host, Ssod) else Ssod()
    with open_set(_training_files(network)) as data:
        if data.digest != network.trained.digest:
            raise ValueError(f"{data.paths[0]} is not what the run was trained on")
        subset = training_subset(run, data.labels, list(network.trained.known), data.classes)
        most = min(max(count, min(run.loader.batch, _MOST_LOCATIONS)), len(subset))
        batch = first_batch(data, run.loader, subset, Place(seed), most)
    with torch.inference_mode():
        logits, maps = model(unmixed(batch, network.trained.augment, None))
        right = logits.argmax(1) == batch.labels
        p_true = location_confidence(maps, head.weight, head.bias, batch.labels).p_true
        known, unknown = (kind > 0 for kind in location_samples(p_true, right, options))
        rejection = None if model.rejection is None else rejection_logits(model, maps)
    return Locations(
        views=batch.pool[batch.rows[:count]].numpy(),
        names=tuple(network.trained.classes[label] for label in batch.labels[:count].tolist()),
        p_true=p_true[:count].numpy(),
        known=known[:count].numpy(),
        unknown=unknown[:count].numpy(),
        rejection=None if rejection is None else rejection[:count].numpy(),
        features=maps[:count].permute(0, 2, 3, 1).numpy(),
        rule=_rule(options),
    )


def pasted_features(network: Network, mixes: int) -> np.ndarray:
    """Return the features of cells that BackMix fills with other images' background, [m, C].

    Cells of which visible pasted pixels cover at least half, in mixes with the masks of the run's
    newest checkpoint, before flip and shift.

    Args:
        network: a run of BackMix.
        mixes: how many mixes to look at.

    Raises:
        ValueError: no run of BackMix, no checkpoint, or its data have gone or changed.
    """
    examples = run_examples(network.trained.run, None, PreviewOptions(rows=mixes))
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (network.trained.augment.mean, network.trained.augment.std)
    )
    views = torch.from_numpy(examples.mixes).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        _, maps = network.model((views - mean) / std)
    shares = cell_means(examples.pasted, (maps.shape[2], maps.shape[3]))
    return maps.permute(0, 2, 3, 1).numpy()[shares >= COVERED]


def surrogate_features(network: Network, count: int) -> tuple[np.ndarray, str]:
    """Return the features of what stands in for unknown images in training, and what that is.

    BackMix: cells of pasted background. Other networks with a linear head: locations that SSOD's
    rule calls unknown.

    Args:
        network: the run.
        count: how many features at most, evenly spaced, float32 [m, C], m <= count.

    Raises:
        ValueError: there are none, or the training data have gone or changed.
    """
    if isinstance(network.trained.options.method, BackMix):
        found, what = pasted_features(network, _BATCH), "cells of pasted background"
    else:
        locations = ssod_locations(network, _BATCH)
        found, what = (
            locations.features[locations.unknown],
            "locations that SSOD's rule calls unknown",
        )
    if not len(found):
        raise ValueError(f"no {what} were found in {_BATCH} training images")
    chosen = np.arange(min(count, len(found))) * len(found) // min(count, len(found))
    return found[chosen], what


def embedding(
    known: np.ndarray, unknown: np.ndarray, surrogate: np.ndarray | None, seed: int = 0
) -> Embedding:
    """Return features in the plane, by principal axes and by t-SNE, and who lies near whom.

    Pedregosa et al., "Scikit-learn" (JMLR 2011); van der Maaten, Hinton: "Visualizing Data using
    t-SNE" (JMLR 2008). Features are divided by their lengths first: a location's is another than
    that of a mean over locations. The axes are those of known and unknown images; surrogates are
    laid beside. Neighbours are looked for in all channels.

    Args:
        known: pooled features of known test images, [n, C]; few hundred, as t-SNE takes n^2.
        unknown: of unknown ones, [m, C].
        surrogate: of what stands in for them in training, [l, C], or None.
        seed: of t-SNE.

    Raises:
        ValueError: fewer than two known or unknown images, or a feature that is not finite.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    if min(len(known), len(unknown)) < 2:
        raise ValueError("features are laid out from two known and two unknown images on")
    parts = {"known": known, "unknown": unknown}
    if surrogate is not None and len(surrogate):
        parts["surrogate"] = surrogate
    units = {kind: _directions(values) for kind, values in parts.items()}
    every = np.concatenate(list(units.values()))
    ends = np.cumsum([len(values) for values in units.values()])[:-1]

    def by_kind(points: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(units, np.split(points, ends), strict=True))

    axes = PCA(2, svd_solver="full").fit(np.concatenate([units["known"], units["unknown"]]))
    perplexity = min(30.0, (len(every) - 1) / 3)
    # Hundreds of points are too few to share, and shared sums would differ between machines.
    with threadpool_limits(1):
        flat = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(every)
    nearer = {}
    if "surrogate" in units:
        for kind in ("known", "unknown"):
            to_surrogate = (units[kind] @ units["surrogate"].T).max(1)
            alike = units[kind] @ units["known"].T
            if kind == "known":
                np.fill_diagonal(alike, -np.inf)
            nearer[kind] = float((to_surrogate > alike.max(1)).mean())
    return Embedding(
        pca=by_kind(axes.transform(every)),
        explained=float(axes.explained_variance_ratio_.sum()),
        tsne=by_kind(flat.astype(np.float64)),
        nearer=nearer,
    )


def cell_means(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the mean of each cell's pixels, float64 [n, *grid] of [n, H, W].

    Pixel y belongs to cell (y * cells) // H.
    """
    for axis, cells in zip((1, 2), grid, strict=True):
        side = pixels.shape[axis]
        owner = np.arange(side) * cells // side
        weights = (owner == np.arange(cells)[:, None]).astype(np.float64)
        weights /= weights.sum(1, keepdims=True)
        pixels = np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis)
    return pixels


def _predicted_map(network: Network, seen: Seen) -> np.ndarray:
    """Return the activation map of each image's predicted class, [n, g, g']."""
    maps, weights = cam_inputs(network.model.head, seen.maps)
    return torch.einsum("nchw,nc->nhw", maps, weights[seen.logits.argmax(1)]).numpy()


def _training_files(network: Network) -> tuple[Path, ...]:
    for file in network.trained.files:
        if not file.exists():
            raise ValueError(f"the training data: {_absent(file)}")
    return network.trained.files


def _rule(options: Ssod) -> str:
    if options.share:
        return f"known: the {options.share:.0%} most sure, unknown: the {options.share:.0%} least"
    return f"known: at least {options.gamma:g}, unknown: at most {1 - options.gamma:g}"


def _directions(features: np.ndarray) -> np.ndarray:
    """Return features divided by their lengths, float64 [n, C]; a zero one stays zero."""
    wide = np.asarray(features, np.float64)
    if not np.isfinite(wide).all():
        raise ValueError("there are features that are NaN or infinite")
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(length > 0, length, 1)


def _absent(file: Path) -> str:
    """Return what is said of a file that is not there; a run keeps its path as it was given."""
    if file.is_absolute():
        return f"{file} is not there any more"
    return f"{file} is not there, seen from {Path.cwd()}: call this from where the run was called"
