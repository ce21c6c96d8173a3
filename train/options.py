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
    family: Literal["A", "B-cac", "B-dias", "C", "F", "OpenOOD"] = "A"
    """Family of published class lists; figures of different families must not be compared."""
    list: int = 0
    """Number of the list within its family, 0..4."""
    known: tuple[str, ...] = ()
    """Names of the known classes in label order, where no protocol is given; empty = all."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens to every training view, after mixing: strong pool, flip, shift, normalise."""

    flip: bool = True
    """Whether views are mirrored, each with probability 1/2."""
    pad: int = 0
    """Shift a view by -pad..pad in both directions: the pad-and-crop augmentation [pixels]."""
    border: Literal["black", "mean", "reflect"] = "black"
    """What a shift brings in from outside the image."""
    pool: Literal["none", "randaugment", "cssr"] = "none"
    """Strong operations on every view. randaugment: before flip and shift. cssr: after them, two of
    ten, each with probability 1/2, then Cutout of half the side; the normalised view is multiplied
    by 0.1 .. 2."""
    operations: int = 1
    """randaugment: operations one after another (its N)."""
    magnitude: int = 9
    """randaugment: their strength, 0..30 (its M)."""
    moves: bool = True
    """randaugment: whether rotations and translations are among the operations; not for digits."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from the pixels of each channel [0..255]."""
    std: tuple[float, float, float] = (255.0, 255.0, 255.0)
    """The pixels of each channel are divided by this [0..255]."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Optimizer, learning rate and its schedule."""

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    """sgd with momentum, adam, or adamw, whose weight decay is no part of the gradient."""
    lr: float = 0.1
    """Peak learning rate for the global batch."""
    momentum: float = 0.9
    """Momentum (sgd)."""
    nesterov: bool = False
    """Whether the momentum is Nesterov's (sgd)."""
    weight_decay: float = 1e-4
    """Weight decay."""
    decay: Literal["matrices", "all", "ffcv"] = "matrices"
    """matrices: no decay of biases and normalisation. all: decay everything, as ARPL does. ffcv:
    everything but parameters with "bn" in their name, as ffcv's ImageNet recipes do."""
    schedule: Literal["milestones", "linear", "cosine", "restarts", "cyclic", "onecycle"] = (
        "milestones"
    )
    """milestones: falls by --optim.factor at each. linear, cosine: down to 0. restarts: cosine
    cycles down to a thousandth. cyclic: as ffcv's ImageNet recipes, with the peak at epoch 2.
    onecycle: up like a cosine from a 25th of the peak over the warm-up (0.3 is usual), then down
    to next to nothing."""
    milestones: tuple[float, ...] = ()
    """milestones: epochs after which the rate falls."""
    factor: float = 0.1
    """milestones: what the rate is multiplied by."""
    cycles: int = 3
    """restarts: how often the rate starts anew from its peak, the first time included."""
    warmup: float = 0.0
    """All but cyclic: share of the run spent rising."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 = no clipping."""


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Cross-entropy alone: the baseline of every table."""


@dataclass(frozen=True, kw_only=True)
class Ssod:
    """SSOD (Pei, 2023): a second head learns to reject from sure and hopeless locations."""

    train: Literal["joint", "head"] = "joint"
    """joint: network and rejection head together, from scratch or from --init. head: the rejection
    head alone, on the network of --init, whose logits keep their bits."""
    weight: float = 1.0
    """Weight of the rejection head's loss."""
    gamma: float = 0.95
    """A location is known where its true class has at least this probability, unknown where it has
    at most 1 - gamma, ignored in between; 0.5 .. 1."""
    share: float = 0.0
    """Above 0: instead of gamma, this share of the batch's locations with most and with least
    probability of the true class; up to 0.5. 0.1 needs no gamma, whatever the number of classes.
    Equal ones are in together, and none is in both, so that the shares may differ."""
    require_correct: bool = False
    """Images that are classified wrongly give no unknown locations."""
    gate_known: float = 0.01
    """joint: the rejection head's loss waits until this share of the locations is known, where it
    is gamma that says so ..."""
    gate_accuracy: float = 0.5
    """joint: ... and this share of the images is classified right, both as running means; then it
    rises to its weight within an epoch, and stays."""
    pasted: bool = True
    """As a host of BackMix: whether pasted background is unknown, with the share of the cell that
    it covers; then only the coolest quarter of the image's own map can be unknown besides, and only
    the hottest, where nothing is pasted, known."""


@dataclass(frozen=True, kw_only=True)
class Arpl:
    """ARPL (Chen et al., TPAMI 2021): a point of "otherness" per class that features flee from."""

    weight: float = 0.1
    """Weight of the open-space term, which keeps features within the learned radius."""
    temperature: float = 1.0
    """Logits are divided by this in the loss."""
    confusing: bool = False
    """ARPL+CS: a GAN makes confusing samples of 32 or 64 pixels. Epochs 0, 2, 4, ... train with
    them, epochs 1, 3, 5, ... without: one epoch of the paper is two of --epochs."""
    beta: float = 0.1
    """ARPL+CS: weight of the certainty that generated images meet, in network and generator."""


CONFUSING_SIZES = (32, 64)
"""Sides that images can be generated with [pixels]."""


@dataclass(frozen=True, kw_only=True)
class Cssr:
    """CSSR (Huang et al., TPAMI 2022): a point-wise auto-encoder per class."""

    kind: Literal["prototype", "reciprocal"] = "prototype"
    """prototype (PCSSR): the class whose auto-encoder errs least. reciprocal (RCSSR): most."""
    latent: int = 64
    """Latent dimensions of an auto-encoder; on a GPU at most 64 are fast."""
    gamma: float = 0.1
    """Logit of a location per unit of reconstruction error, which grows with the channels; where
    that would pass 100 it is clipped, and nothing is learned."""


@dataclass(frozen=True, kw_only=True)
class BackMix:
    """BackMix (Wang et al., TPAMI 2025): paste patches of other images' backgrounds."""

    host: Softmax | Ssod | Arpl | Cssr = field(default_factory=Softmax)
    """What is trained on the mixes."""
    patch: int = 8
    """Side of the square patch in views of --loader.size [pixels]; while views grow it keeps its
    share of their side."""
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
    model: str = "classifier32"
    """Network: classifier32 (-half, -quarter), resnet18-cifar, wrn40-4, resnet18 or resnet50;
    timm/NAME or torchvision/NAME; MODULE:CALLABLE, which is called with the number of classes."""
    pretrained: bool = False
    """timm and torchvision models: begin with their published weights, which are downloaded; from
    a file --init does. A class head of another width stays fresh."""
    blurpool: bool = False
    """Blur before every convolution that has a stride and at least 16 channels, as ffcv's ImageNet
    recipes do; the weights keep their names."""
    approximate_cam: bool = False
    """Let BackMix, SSOD and CSSR work with a timm, torchvision or own network whose maps are not
    exact and have a fidelity below 0.95 (docs/models.md)."""
    val: float = 0.0
    """Share of the known training images held out of training, stratified by class."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network; auto: bf16 autocast where the device has it in hardware."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    threads: int = 0
    """Threads of CPU arithmetic; 0 = one per core. Part of the run: other bits with another."""
    accumulate: int = 1
    """Forward and backward passes that the images of a step are cut into, for memory; BatchNorm
    sees the parts."""
    ema: float = 0.0
    """Above 0: keep a running mean of the weights with this decay a step, and evaluate that one."""
    ema_every: int = 1
    """Steps between two updates of the running mean, which then counts them all at once."""
    compile: bool = False
    """Compile network and loss (torch.compile): a minute or more at the start, then fewer passes
    over memory on a GPU."""
    graph: bool = False
    """Resident pool: draw for an epoch at once and, on a GPU, replay each step as one CUDA graph,
    which small networks need to be fast."""
    sync_batchnorm: bool = False
    """Several GPUs: BatchNorm over the images of all of them."""
    deterministic: bool = False
    """On a GPU: only algorithms that give the same bits again, which are slower."""
    log_every: int = 50
    """Steps between two rows of log.jsonl."""
    save_minutes: float = 10.0
    """Minutes between checkpoints; one is also written at the end and on SIGTERM or Ctrl-C."""
    save_steps: int = 0
    """Steps between checkpoints, in addition; 0 = by time alone."""
    keep: int = 2
    """Checkpoints kept; a damaged one must not be the only one."""
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Further places for the log's rows; the run goes on whatever happens to them."""
    dry_run: bool = False
    """Only say what would be done: the resolved options, the network, memory and data needed."""
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
    method: Softmax | Ssod | Arpl | Cssr | BackMix = field(default_factory=Softmax)
    """Training method."""
    init: Path | None = None
    """Begin with these weights: a finished run folder, which must not know what is unknown here, or
    a file with the names of --model: .safetensors, or of torch.save (.pt, .pth), of which nothing
    but tensors is read. A class head of another width stays fresh."""


Host = Softmax | Ssod | Arpl | Cssr
"""Methods that can be trained on plain views or, as hosts of BackMix, on mixes."""


Method = Host | BackMix
METHODS = (Softmax, Ssod, Arpl, Cssr, BackMix)
"""Every method; its options' type names it in config.json."""


def host_of(method: Method) -> Host:
    """Return what a method does to the network: itself, or BackMix's host."""
    return method.host if isinstance(method, BackMix) else method


MAY_CHANGE = frozenset(
    {
        "data",
        "out",
        "device",
        "save_minutes",
        "save_steps",
        "quiet",
        "profile",
        "keep",
        "log_to",
        "dry_run",
        "loader.decoder",
        "loader.threads",
        "loader.prefetch",
        "loader.device_memory_padding",
        "loader.host_memory_padding",
        "loader.preallocate_hint",
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
    openood: Path | None = None
    """Instead of --test: the folder of OpenOOD v1.5's data, with benchmark_imglist, images_classic
    and images_largescale. Its lists name the known test set, near and far unknown sets and known
    images under covariate shift."""
    benchmark: Literal["cifar10", "cifar100", "imagenet200", "imagenet"] | None = None
    """--openood: its benchmark; without one, that of the run's number of classes."""
    bench: tuple[Literal["ssod-cifar10", "ssod-imagenet"], Path] | None = None
    """NAME DIR: the unknown sets of SSOD's bench for CIFAR-10 or ImageNet, folders or .beton files
    in DIR that have their names."""
    fit: bool = False
    """Fit the scores that need it (nearest neighbours, Mahalanobis, ViM, ...) to the run's own
    training images, and the temperature to those that --val held out: a pass over them first."""
    train: tuple[Path, ...] = ()
    """--fit: the training set, where it no longer lies where the run read it."""
    odin: bool = False
    """Compute ODIN, too, which takes a backward pass and a second forward pass of every image."""
    model: str = ""
    """The --model of a run of MODULE:CALLABLE once more: evaluating imports that program."""
    batch: int = 256
    """Images per forward pass."""
    size: int = 0
    """Side of the views, where another than the run's is wanted, often a larger one; 0 = the run's
    [pixels]."""
    flip: bool = False
    """Average what the network says of each image with what it says of its mirror image: logits,
    features, figures of the methods. Published open-set figures are without."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network; scores and metrics are always float64."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    threads: int = 0
    """Decoding threads; 0 = one per core."""


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """The grid of a table, and what its cells are trained and judged on."""

    out: Path
    """Folder of the table; the same command continues it."""
    data: tuple[Path, ...] = ()
    """The training set: one .beton file, all shards of one, or a manifest."""
    test: tuple[Path, ...] = ()
    """The test set, with known and unknown classes."""
    unknown_data: tuple[Path, ...] = ()
    """cifar+10 and cifar+50: the CIFAR-100 test set."""
    unknown: tuple[str, ...] = ()
    """NAME=PATH ...: further unknown sets, as for `backmix evaluate`."""
    openood: Path | None = None
    """Instead of --test: the folder of OpenOOD v1.5's data, as for `backmix evaluate`; usually with
    --family all."""
    benchmark: Literal["cifar10", "cifar100", "imagenet200", "imagenet"] | None = None
    """--openood: its benchmark; without one, that of the runs' number of classes."""
    bench: tuple[Literal["ssod-cifar10", "ssod-imagenet"], Path] | None = None
    """NAME DIR: the unknown sets of one of SSOD's benches, as for `backmix evaluate`."""
    methods: str = "softmax,cutout,backmix,ssod,arpl"
    """Rows, with commas between them: methods of the recipes, each with training options of its own
    where wanted, such as "backmix --method.patch 16"."""
    family: Literal["A", "B-cac", "B-dias", "C", "F", "OpenOOD", "all"] = "A"
    """Family of published class lists; all: every class of the files is known, and what is unknown
    comes by --unknown."""
    lists: tuple[int, ...] = ()
    """Numbers of the class lists; empty = all of the family."""
    seeds: int = 1
    """Seeds of every row and list."""
    first_seed: int = 0
    """The first of them."""
    budget: Literal["full", "small"] = "full"
    """full: the recipes as they are. small: for two CPU cores: a quarter-width classifier32 and 12
    epochs for every method, which shows tendencies and no published figure."""
    epochs: int = 0
    """Epochs of every cell; 0 = as the budget says. (ARPL+CS: twice as many passes.)"""
    options: str = ""
    """Further training options of all cells in one string, after an equals sign:
    --options="--loader.batch 256"."""
    fit: bool = False
    """Judge by the scores that are fitted on training images, too."""
    size: int = 0
    """Side of the views that are judged; 0 = that of training [pixels]."""
    flip: bool = False
    """Judge by the mean over each image and its mirror image."""
    workers: int = 0
    """Cells trained side by side; 0 = one per core with the small budget, else one."""
    quiet: bool = False
    """No progress."""


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
