"""Every knob of a training run, on one page; standard library only, so that `--help` is instant.

The attribute docstrings are the help texts of the command line.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from backmix.pipeline.options import LoaderOptions


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which classes of the data are known; the other classes are never shown in training."""

    protocol: Literal["cifar10", "svhn", "cifar+10", "cifar+50", "tiny-imagenet"] | None = None
    """A published protocol; without one the known classes are those of --split.known."""
    family: Literal["A", "B-cac", "B-dias", "C", "F"] = "A"
    """Family of published class lists; figures of different families must not be compared."""
    list: int = 0
    """Number of the list within its family, 0..4."""
    known: tuple[str, ...] = ()
    """Names of the known classes in label order, where no protocol is given; empty = all."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens to every training view, after mixing: flip, shift, normalise."""

    flip: bool = True
    """Mirror a view with probability 1/2."""
    pad: int = 0
    """Shift a view by -pad..pad in both directions: the pad-and-crop augmentation [pixels]."""
    border: Literal["black", "mean", "reflect"] = "black"
    """What a shift brings in from outside the image."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from the pixels of each channel [0..255]."""
    std: tuple[float, float, float] = (255.0, 255.0, 255.0)
    """The pixels of each channel are divided by this [0..255]."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Optimizer, learning rate and its schedule."""

    kind: Literal["sgd", "adam"] = "sgd"
    """sgd with momentum, or adam."""
    lr: float = 0.1
    """Peak learning rate for the global batch."""
    momentum: float = 0.9
    """Momentum (sgd)."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    weight_decay: float = 1e-4
    """Weight decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """matrices: no decay of biases and normalisation. all: decay everything, as ARPL does."""
    schedule: Literal["milestones", "linear", "cosine", "cyclic"] = "milestones"
    """milestones: falls by --optim.factor at each. linear, cosine: warm-up, then down to 0.
    cyclic: as ffcv's ImageNet recipes, with the peak at epoch 2."""
    milestones: tuple[float, ...] = ()
    """milestones: epochs after which the rate falls."""
    factor: float = 0.1
    """milestones: what the rate is multiplied by."""
    warmup: float = 0.0
    """linear, cosine: share of the run spent rising."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 = no clipping."""


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Cross-entropy alone: the baseline of every table."""


@dataclass(frozen=True, kw_only=True)
class BackMix:
    """BackMix (Wang et al., TPAMI 2025): paste patches of other images' backgrounds."""

    patch: int = 8
    """Side of the square patch [pixels of the view]."""
    probability: float = 1.0
    """Share of the images that receive a patch."""
    position: Literal["inside", "clipped"] = "inside"
    """inside: whole patches only. clipped: centre anywhere, cut at the border (as CutMix)."""
    onto: Literal["anywhere", "cool"] = "anywhere"
    """cool: of eight drawn places in the target the one with the least class evidence."""
    mask: Literal["cam", "none", "random", "inverse", "grey", "oracle"] = "cam"
    """Which donor cells are foreground: cam: the hottest of its class activation map. none: no
    masking. random: as many at random. inverse: the coolest. grey: all, which makes the patch
    plain fill (the Cutout control). oracle: those with most true foreground, by --method.masks."""
    mask_ratio: float = 0.25
    """Share of the donor's cells taken as foreground."""
    fill: Literal["grey", "mean", "donor", "keep"] = "grey"
    """What a masked donor pixel shows: grey 127.5, the mean of --augment.mean (0 after
    normalising), the donor's mean colour, or the target as it was."""
    donor: Literal["any", "other", "same"] = "any"
    """Classes that donors may have, seen from the target."""
    cam_source: Literal["raw", "raw+loss", "mix"] = "raw"
    """Where activation maps come from. raw: an extra evaluation-mode pass of the unaugmented view
    (faithful). raw+loss: that view is trained on as well. mix: the training pass (fast)."""
    raw_weight: float = 0.5
    """raw+loss: weight of the raw view's loss."""
    rate: float = 0.1
    """Weight of a new map in the bank's running mean."""
    normalise: Literal["image", "none"] = "image"
    """Maps enter the bank scaled to [0, 1] per image, or as they are."""
    warmup: int = 0
    """Epochs without mixing at the start; the bank fills meanwhile."""
    masks: Path | None = None
    """Folder of foreground masks: a PNG per source name (x/1.jpg -> x/1.png), 0 = background.
    Needed by mask oracle; otherwise logs how much true foreground the mask covers (mask_hit)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    data: tuple[Path, ...]
    """The training set: one .beton file, all shards of one, or a manifest (.beton.jsonl)."""
    out: Path
    """Run folder; the same command continues an unfinished run."""
    seed: int = 0
    """Seed of everything random: weights, order, augmentation, mixing."""
    epochs: int = 100
    """Passes over the known training images."""
    model: Literal[
        "classifier32",
        "classifier32-half",
        "classifier32-quarter",
        "resnet18-cifar",
        "wrn40-4",
        "resnet18",
        "resnet50",
    ] = "classifier32"
    """Network."""
    val: float = 0.0
    """Share of the known training images held out of training, stratified by class."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network; auto: bf16 autocast where the device has it in hardware."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    threads: int = 0
    """Threads of CPU arithmetic; 0 = one per core. Part of the run: other bits with another."""
    log_every: int = 50
    """Steps between two rows of log.jsonl."""
    save_minutes: float = 10.0
    """Minutes between checkpoints; one is also written at the end and on SIGTERM or Ctrl-C."""
    save_steps: int = 0
    """Steps between checkpoints, in addition; 0 = by time alone."""
    quiet: bool = False
    """No progress."""
    profile: int = 0
    """Trace so many steps of this start for ui.perfetto.dev, into RUN/profile, and print what took
    most time; the bits stay the same. 0 = none."""
    split: Split = field(default_factory=Split)
    """Known and unknown classes."""
    loader: LoaderOptions = field(default_factory=LoaderOptions)
    """Batches."""
    augment: Augment = field(default_factory=Augment)
    """Flip, shift, normalise."""
    optim: Optim = field(default_factory=Optim)
    """Optimizer."""
    method: Softmax | BackMix = field(default_factory=Softmax)
    """Training method."""


MAY_CHANGE = frozenset(
    {
        "data",
        "out",
        "device",
        "save_minutes",
        "save_steps",
        "quiet",
        "profile",
        "loader.decoder",
        "loader.threads",
        "loader.prefetch",
        "loader.on_bad",
        "loader.max_bad",
        "loader.verify",
    }
)
"""What the command that continues a run may change.

The data may move, but their digest must be the same. Another device computes other bits; the rest
changes nothing, as long as the data have no bad images.
"""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What a trained run is judged on, and how its images are read."""

    test: tuple[Path, ...] = ()
    """The known test set: one .beton file, all shards of one, or a manifest, with the class names
    of the training set. Its other classes are the unknown set `unknown` (see --unknown-data)."""
    unknown_data: tuple[Path, ...] = ()
    """Protocols cifar+10 and cifar+50: the CIFAR-100 test set, as .beton; its classes that the
    protocol lists are the unknown set `unknown`."""
    unknown: tuple[str, ...] = ()
    """NAME=PATH ...: further unknown sets, each every image of a .beton file, or of a folder and
    all its subfolders."""
    batch: int = 256
    """Images per forward pass."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network; scores and metrics are always float64."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    threads: int = 0
    """Decoding threads; 0 = one per core."""


@dataclass(frozen=True, kw_only=True)
class PreviewOptions:
    """What a preview shows."""

    run: Path | None = None
    """Run whose bank gives the masks; without one the masks are random."""
    rows: int = 6
    """Examples to draw."""
    size: int = 0
    """Side of the view [pixels]; 0 = that of the run, or of the images, at most 224."""
    patch: int = 0
    """Side of the patch [pixels]; 0 = that of the run, or a quarter of the view's side (half of it
    from 64 px)."""
    seed: int = 0
    """Seed of the draws: which images, donors and places."""
