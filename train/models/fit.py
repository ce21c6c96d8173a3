"""Whether a network has what a method needs of it, before a run trains it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from backmix.train.models.any import FIDELITY, AnyModel
from backmix.train.models.build import Model
from backmix.train.models.heads import Reconstruction
from backmix.train.models.libraries import published_views, published_weights
from backmix.train.models.weights import begin_with, take
from backmix.train.options import BackMix, Cssr, Run, Softmax, Ssod, host_of


def needs_map(run: Run) -> bool:
    """Return whether a run's method asks which cell of the last map speaks for what."""
    method = run.method
    if isinstance(host_of(method), Ssod | Cssr):
        return True
    if not isinstance(method, BackMix):
        return False
    return method.mask not in ("none", "grey") or method.onto == "cool"


def refuse_unfit(run: Run, model: Model) -> None:
    """Refuse a network of which the run's method needs more than it has.

    Raises:
        ValueError: saying what is missing and what can be trained instead.
    """
    if not isinstance(model, AnyModel):
        return
    name = type(run.method).__name__
    if needs_map(run) and model.maps == "none":
        raise ValueError(
            f"--model {run.model} has no map that says which part of an image speaks for which "
            f"class, as {name} needs it: {model.why_not}. Softmax and ARPL do without, and "
            "docs/models.md lists networks that have one"
        )
    if not isinstance(host_of(run.method), Softmax) and not isinstance(model.head, nn.Linear):
        raise ValueError(
            f"--model {run.model}: {type(host_of(run.method)).__name__} takes the place of the one "
            f"linear layer that gives the logits, or stands beside it, and there is none; softmax "
            "does without"
        )


def refuse_clipped(run: Run, model: Model) -> None:
    """Refuse a CSSR head that would begin, and stay, where all its logits are cut off.

    A cell's error adds up over the channels, whose sizes are about 1 behind BatchNorm and ReLU;
    where gamma times it passes the limit in all classes, no weight has a gradient. A fresh
    ResNet-50's are 1.04 on the mean, so that at gamma 0.1 all its cells are beyond.

    Raises:
        ValueError: with a gamma that would do.
    """
    head = model.head
    if not isinstance(head, Reconstruction):
        return
    channels = head.encoder.shape[2]
    if head.gamma * channels > head.CLIP:
        name = "method.host" if isinstance(run.method, BackMix) else "method"
        raise ValueError(
            f"--{name}.gamma {head.gamma:g}: a location's error adds up over the {channels:,} "
            f"channels of {run.model}; where these are about 1, all its logits would be cut off at "
            f"{head.CLIP:g}, and nothing be learned: use --{name}.gamma "
            f"{0.5 * head.CLIP / channels:.2g}"
        )


def first_weights(run: Run, model: Model) -> list[str]:
    """Load what a fresh run begins with, by --init or --pretrained; return lines for people."""
    lines = []
    host = host_of(run.method)
    if run.init is not None:
        lines += begin_with(model, run.init, head=isinstance(host, Ssod) and host.train == "head")
    elif run.pretrained:
        weights = published_weights(run.model, classes=_classes(model), size=run.loader.size)
        lines += take(model, weights, f"--pretrained {run.model}")
    if isinstance(model, AnyModel) and (run.init is not None or run.pretrained):
        lines += _other_views(run, model)
    return lines


def found_maps(run: Run, model: Model, images: Callable[[], Tensor]) -> dict[str, Any]:
    """Return what is known of a network's maps, for config.json; empty for our own networks.

    Args:
        run: the options.
        model: the network with the weights that the run begins with.
        images: returns some training images as the network is shown them; called where the fidelity
            of its map is not known without.
    """
    if not isinstance(model, AnyModel):
        return {}
    found = model.describe()
    if model.maps == "local":
        found["fidelity"] = round(model.fidelity(images()), 4)
    return found


def judge_maps(run: Run, found: dict[str, Any]) -> list[str]:
    """Return lines for people about a network's maps.

    Raises:
        ValueError: the method needs a map, and that of this network says too little.
    """
    fidelity = found.get("fidelity")
    if not found or not needs_map(run):
        return []
    if fidelity is None:
        spot = found["map"]
        return [f"{run.model}: exact maps, {spot['side']} of {spot['module']} ({spot['layout']})"]
    said = (
        f"{run.model}: local maps by {' '.join(found['tail'])}, fidelity {fidelity:.3f} with the "
        "weights that it begins with"
    )
    # Not "<": NaN, of a network that gives every image the same, is not enough either.
    if not fidelity >= FIDELITY and not run.approximate_cam:
        raise ValueError(
            f"{said}, below {FIDELITY}: its layers between map and classifier make something else "
            "of a cell than of the whole. --approximate-cam trains with it all the same; with "
            "pretrained weights (--init, --pretrained) it may be higher"
        )
    return [said]


def _classes(model: Model) -> int:
    assert isinstance(model, AnyModel)
    return model.classes


def _other_views(run: Run, model: AnyModel) -> list[str]:
    """Return a warning where the run shows images otherwise than the published weights saw them."""
    published = published_views(run.model, model.net)
    if published is None:
        return []
    given = (*run.augment.mean, *run.augment.std)
    theirs = (*published.mean, *published.std)
    if all(abs(a - b) < 0.5 for a, b in zip(given, theirs, strict=True)):
        return []
    mean, std = (" ".join(f"{v:g}" for v in values) for values in (published.mean, published.std))
    return [
        f"{run.model} was published with weights for other views than this run's: add "
        f"--augment.mean {mean} --augment.std {std}; it saw {published.size} pixels"
    ]
