"""Find the parts of a classifier by watching it: what gives the logits, and the map before it.

Names of layers say little: the last entry of a list of features may be 320 channels wide where the
classifier reads 1,280. So two images are shown to the network in evaluation mode, hooks write down
what every layer takes and gives, and the values decide:

1. The classifier is the linear layer (or 1 x 1 convolution of the pooled map) whose output is the
   network's output; h is what it reads.
2. A tensor over more than one cell whose mean over the cells is h is the last feature map F. Then
   mean over cells of (w_k . F_l) + b_k is logit k, and the map w_k . F of class k is its class
   activation map, exactly (Zhou et al., "Learning Deep Features for Discriminative Localization",
   2016).
3. Where layers stand between mean and classifier (ConvNeXt normalises, MobileNetV3 has a wider
   layer), they are its `tail`. Applied to each cell as if it were the whole map they give a map
   that the classifier reads; how well its mean agrees with h is to be measured (`any.py`).
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

TOLERANCE = 1e-4
"""Values are equal if they differ by less than this share of the greatest."""
MOST_CALLS = 256
"""Calls of layers that are remembered, from the last; those of a head are a dozen."""
MOST_MAPS = 12
"""Maps from the last that are tried as the one that a tail begins with."""
MOST_PREFIX = 8
"""Tokens before those of the cells, such as class and register tokens."""

_NOTHING = (nn.Identity, nn.Flatten, _DropoutNd)
"""Layers that do nothing to the rows of one cell in evaluation mode."""

Layout = Literal["NCHW", "NHWC", "tokens"]


@dataclass(frozen=True)
class Spot:
    """Where in a network its last feature map is found."""

    module: str
    """Name of a layer."""
    side: Literal["input", "output"]
    """Whether the layer takes the map or gives it."""
    layout: Layout
    """tokens: [n, prefix + g * g, C]."""
    prefix: int = 0
    """Tokens that are no cells."""


@dataclass(frozen=True)
class Layer:
    """A layer between the mean over the cells and the classifier."""

    module: str
    layout: Literal["rows", "NCHW", "NHWC", "tokens"]
    """How it takes one cell: [n, C], [n, C, 1, 1], [n, 1, 1, C] or [n, 1, C]."""


@dataclass(frozen=True)
class Parts:
    """What was found."""

    classifier: str | None
    """Name of the linear layer, or 1 x 1 convolution, that gives the logits; None where no single
    one does."""
    spot: Spot | None
    """The last feature map; None where there is none that says which cell speaks for what."""
    tail: tuple[Layer, ...] = ()
    """Empty where the map's mean is what the classifier reads: then its maps are exact."""
    summed: bool = False
    """The map has a channel per class, and its mean is the logits: no classifier is needed."""
    why_not: str = ""
    """Where there is no map: what stands in the way, as the end of a sentence."""


@dataclass(frozen=True)
class _Call:
    """A layer at work."""

    name: str
    module: nn.Module
    began: int
    ended: int
    leaf: bool
    """Whether no other layer worked within it."""
    single: bool
    """Whether it took one tensor and gave one."""
    given: Tensor | None
    gave: Tensor | None


def as_map(tensor: Tensor, spot: Spot) -> Tensor:
    """Return what lies at a spot as a map [n, C, g, g'] (a view)."""
    match spot.layout:
        case "NCHW":
            return tensor
        case "NHWC":
            return tensor.permute(0, 3, 1, 2)
        case "tokens":
            side = _side(tensor.shape[1] - spot.prefix)
            return tensor[:, spot.prefix :].unflatten(1, (side, side)).permute(0, 3, 1, 2)


def shaped(rows: Tensor, layer: Layer) -> Tensor:
    """Return rows [n, C] as a layer takes them."""
    match layer.layout:
        case "rows":
            return rows
        case "NCHW":
            return rows[:, :, None, None]
        case "NHWC":
            return rows[:, None, None]
        case "tokens":
            return rows[:, None]


@torch.no_grad()
def probe(network: nn.Module, images: Tensor) -> Parts:
    """Find the classifier and the last feature map of a network, which is not changed.

    Args:
        network: from images [n, 3, H, W] to logits [n, K]; on the images' device.
        images: at least two that differ, of the size that is to be trained.

    Raises:
        ValueError: the network does not take the images, or returns something else than logits.
    """
    with evaluating(network), _in_general_position(network), _watching(network) as calls:
        logits = network(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        shape = f" {list(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise ValueError(
            f"must return logits [n, K] for images [n, 3, H, W], but returned a "
            f"{type(logits).__name__}{shape}"
        )
    found = list(calls)
    classifier = next((call for call in reversed(found) if _gives(call, logits)), None)
    if classifier is None:
        spot = _spot_of(found, logits)
        if spot is not None:
            return Parts(None, spot, summed=True)
        return Parts(None, None, why_not="its output is not that of one linear layer")
    assert classifier.given is not None
    h = classifier.given.flatten(1)
    spot = _spot_of(found, h)
    if spot is not None:
        return Parts(classifier.name, spot)
    behind = _spot_with_tail(found, classifier, h)
    if behind is not None:
        return Parts(classifier.name, *behind)
    return Parts(classifier.name, None, why_not=_why_not(found, classifier, h))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put all layers into evaluation mode meanwhile; each gets its own mode back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _in_general_position(network: nn.Module) -> Iterator[None]:
    """Move parameters and statistics that are constant off their values meanwhile.

    What is fresh may do nothing: a BatchNorm with mean 0 and variance 1 hands on what it reads, a
    classifier of zeros gives what any other one gives. Trained, they do something else.
    """
    generator = torch.Generator().manual_seed(0)
    before: list[tuple[Tensor, Tensor]] = []
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point() and tensor.numel() and tensor.amin() == tensor.amax():
            before.append((tensor, tensor.clone()))
            noise = 0.1 * torch.randn(tensor.shape, generator=generator)
            # Variances stay positive.
            tensor.copy_(
                torch.where(tensor == 0, noise.to(tensor), tensor * noise.exp().to(tensor))
            )
    try:
        yield
    finally:
        for tensor, values in before:
            tensor.copy_(values)


@contextmanager
def _watching(network: nn.Module) -> Iterator[deque[_Call]]:
    """Write down the last calls of all layers, in the order in which they end."""
    calls: deque[_Call] = deque(maxlen=MOST_CALLS)
    names = {module: name for name, module in network.named_modules()}
    began: list[tuple[int, Tensor | None]] = []
    clock = 0

    def before(module: nn.Module, args: tuple[object, ...]) -> None:
        nonlocal clock
        clock += 1
        began.append((clock, _kept(args[0] if args else None)))

    def after(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        nonlocal clock
        start, given = began.pop()
        clock += 1
        calls.append(
            _Call(
                names[module],
                module,
                start,
                clock,
                leaf=clock == start + 1,
                single=len(args) == 1 and isinstance(output, Tensor),
                given=given,
                gave=_kept(output),
            )
        )

    handles = []
    for module in network.modules():
        if module is not network and type(module) is not nn.ModuleList:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _kept(value: object) -> Tensor | None:
    """Return a tensor as it is to be remembered.

    One of a single cell as it is now. A map itself: what is written into it in place before it is
    pooled (DenseNet's last ReLU) belongs to it.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    return value.clone() if value.ndim == 2 or value[0].numel() in value.shape[1:] else value


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def _gives(call: _Call, logits: Tensor) -> bool:
    """Return whether a linear layer, or a 1 x 1 convolution of one cell, gives the logits."""
    if call.given is None or call.gave is None or not call.single:
        return False
    if isinstance(call.module, nn.Conv2d):
        one = call.module.kernel_size == (1, 1) and call.module.groups == 1
        return one and call.given[0, 0].numel() == 1 and _same(call.gave.flatten(1), logits)
    return isinstance(call.module, nn.Linear) and call.given.ndim == 2 and _same(call.gave, logits)


def _side(cells: int) -> int:
    """Return the side of a square of cells, 0 where they are none."""
    side = round(max(cells, 0) ** 0.5)
    return side if side * side == cells else 0


def _spots(call: _Call) -> Iterator[tuple[Spot, Tensor, int]]:
    """Yield every way to read a call's output and input as a map of several cells, and since when.

    Maps are [n, C, g, g'].
    """
    sides: tuple[tuple[Literal["output", "input"], Tensor | None, int], ...] = (
        ("output", call.gave, call.ended),
        ("input", call.given, call.began),
    )
    for side, tensor, since in sides:
        if tensor is None:
            continue
        spots = []
        if tensor.ndim == 4:
            spots = [Spot(call.name, side, "NCHW"), Spot(call.name, side, "NHWC")]
        elif tensor.ndim == 3:
            prefixes = range(min(MOST_PREFIX, tensor.shape[1]) + 1)
            fitting = [p for p in prefixes if _side(tensor.shape[1] - p) > 1]
            spots = [Spot(call.name, side, "tokens", prefix) for prefix in fitting]
        for spot in spots:
            features = as_map(tensor, spot)
            if features.shape[2] * features.shape[3] > 1:
                yield spot, features, since


def _spot_of(calls: list[_Call], mean: Tensor) -> Spot | None:
    """Return the last map whose mean over the cells is `mean` [n, C]."""
    seen: set[str] = set()
    for call in reversed(calls):
        if call.name not in seen:  # a layer that works twice keeps its last map
            for spot, features, _ in _spots(call):
                if features.shape[1] == mean.shape[1] and _same(features.mean((2, 3)), mean):
                    return spot
        seen.add(call.name)
    return None


def _spot_with_tail(
    calls: list[_Call], classifier: _Call, h: Tensor
) -> tuple[Spot, tuple[Layer, ...]] | None:
    """Return the last map from whose mean layers lead to h, and these layers."""
    tried = 0
    seen: set[str] = set()
    begun = sorted(calls, key=lambda call: call.began)
    for call in reversed(calls):
        if call.name not in seen:
            several = list(_spots(call))
            for spot, features, since in several:
                tail = _tail(features.mean((2, 3)), since, begun, classifier, h)
                if tail is not None:
                    return spot, tail
            tried += bool(several)
        if tried == MOST_MAPS:
            return None
        seen.add(call.name)
    return None


def _tail(
    x: Tensor, since: int, calls: list[_Call], classifier: _Call, h: Tensor
) -> tuple[Layer, ...] | None:
    """Return the layers that make h of x [n, C], one after another; None where they do not.

    Of layers within layers the outermost; `calls` are in the order in which they began.
    """
    layers: list[Layer] = []
    for call in calls:
        if not since <= call.began < classifier.began or call.ended > classifier.began:
            continue  # before, within one that was taken, after, or around the classifier
        if call.single and call.given is not None and call.gave is not None:
            rows, gave = _rows(call.given), _rows(call.gave)
            if gave is not None and (
                # It takes the map: fine if all it does is to pool it.
                _same(gave[0], x) if rows is None else _same(rows[0], x)
            ):
                if rows is not None and not isinstance(call.module, _NOTHING):
                    layers.append(Layer(call.name, rows[1]))
                x, since = gave[0], call.ended
                continue
        if call.leaf:
            return None
    return tuple(layers) if _same(x, h) else None


def _rows(
    tensor: Tensor,
) -> tuple[Tensor, Literal["rows", "NCHW", "NHWC", "tokens"]] | None:
    """Return a tensor of one cell as rows [n, C], and how the cell was shaped."""
    shape = tuple(tensor.shape[1:])
    if len(shape) == 1:
        return tensor, "rows"
    if shape[1:] == (1, 1):
        return tensor.flatten(1), "NCHW"
    if shape[:-1] == (1, 1):
        return tensor.flatten(1), "NHWC"
    if len(shape) == 2 and shape[0] == 1:
        return tensor.flatten(1), "tokens"
    return None


def _why_not(calls: list[_Call], classifier: _Call, h: Tensor) -> str:
    """Say what stands between the last map and the classifier, in the order of likelihood."""
    rows = [h]
    rows += [c.given.flatten(1) for c in calls if c.leaf and c.given is not None and c.single]
    for call in reversed(calls):
        taken = call.given
        if "Pool" in type(call.module).__name__ and taken is not None and taken.ndim == 4:
            if taken[0, 0].numel() == 1:
                return "its last map has one cell of an image of this size"
        for tensor in (call.gave, call.given):
            if tensor is None:
                continue
            if tensor.ndim == 3 and any(
                _same(tensor[:, i], h) for i in range(2)[: tensor.shape[1]]
            ):
                return "its classifier reads a class token, which has no place in the image"
            if tensor.ndim == 4 and tensor[0, 0].numel() > 1:
                if any(_same(tensor.amax((2, 3)), row) for row in rows):
                    return "it pools its last map by the maximum, not by the mean"
                if any(
                    isinstance(c.module, nn.Linear)
                    and c.given is not None
                    and c.given.ndim == 2
                    and _same(tensor.flatten(1), c.given)
                    for c in calls
                ):
                    return "it flattens its last map instead of taking the mean over the cells"
    return "no map of several cells has a mean that leads to its classifier"
