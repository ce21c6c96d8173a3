"""Weights in and out: what a run begins with, and what it leaves to others.

`model.safetensors` holds the network alone, under the names that it has in its own library, so that
`timm.create_model(NAME, num_classes=K, checkpoint_path=FILE)` and torchvision's
`load_state_dict(..., strict=True)` take it as it is. What a method learned beside the network lies
in `heads.safetensors`: the rejection head of SSOD and, of networks that are not our own, the heads
of ARPL and CSSR.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from backmix.train.checkpoint import write_safetensors
from backmix.train.models.any import AnyModel
from backmix.train.models.build import Model
from backmix.train.models.heads import CellSums, ReciprocalPoints, Reconstruction

NETWORK = "model.safetensors"
HEADS = "heads.safetensors"
_BESIDE = ("rejection.", "method_head.")
"""Names of what a method learns beside a network."""
_NET = "net."
"""What the names of a network that is not our own begin with in its model."""
_GENERATED = ".generated."
"""In the names of the second half of a pair of BatchNorms, that of generated images."""
_WRAPPERS = ("module.", "_orig_mod.")
"""What other programs put before all names: DataParallel and its kin, torch.compile."""
_INSIDE = ("state_dict", "model", "model_state_dict", "net")
"""Under which other programs keep a network's weights in a file."""
_FEW = 4
_MOST_INSIDE = 8
"""How deep a file may hide a network's weights; a damaged one may hold itself."""


def write_weights(folder: Path, tensors: Mapping[str, Tensor], arch: str, classes: int) -> None:
    """Write a model's weights to `folder`: the network, and what was learned beside it.

    Args:
        folder: where `NETWORK` and, where there is something for it, `HEADS` are written.
        tensors: the model's state_dict.
        arch: --model; without its library in the file, as timm names networks there.
        classes: number of classes.
    """
    import backmix

    parts: dict[str, dict[str, Tensor]] = {HEADS: {}, NETWORK: {}}
    for name, value in tensors.items():
        part = HEADS if name.startswith(_BESIDE) else NETWORK
        plain = value.detach().to("cpu").contiguous().clone()
        parts[part][name.removeprefix(_NET)] = plain
    about = {
        "format": "pt",
        "arch": arch.rpartition("/")[2],
        "num_classes": str(classes),
        "backmix": backmix.__version__,
    }
    for name, part in parts.items():  # the network last: where it is, all is
        if part:
            write_safetensors(folder / name, part, about)
        else:
            (folder / name).unlink(missing_ok=True)


def read_weights(run: Path, model: Model) -> dict[str, Tensor]:
    """Return the weights of a run under the names that its model has for them.

    Raises:
        safetensors.SafetensorError, OSError: a file is damaged or missing.
    """
    tensors = safetensors.torch.load_file(run / NETWORK)
    if (run / HEADS).is_file():
        tensors |= safetensors.torch.load_file(run / HEADS)
    return _named(model, tensors)


def classes_of(model: Model) -> int:
    """Return how many classes a network tells apart."""
    if isinstance(model, AnyModel):
        return model.classes
    match model.head:
        case nn.Linear() as head:
            return head.out_features
        case ReciprocalPoints() as head:
            return len(head.points)
        case Reconstruction() as head:
            return len(head.encoder)
        case CellSums():
            raise TypeError("our own networks have heads with weights")


def begin_with(model: Model, source: Path, *, head: bool = False) -> list[str]:
    """Load the weights of a finished run, or of a file with the network's own names.

    Files: .safetensors, or what torch.save wrote (.pt, .pth, ...), of which nothing but tensors is
    read. A class head of another width or kind keeps its fresh weights, and so does a rejection
    head that is missing. What is left over in the file is refused for our own networks and said for
    others, whose files may hold heads that are used in training alone.

    Args:
        model: the network.
        source: run folder, or file.
        head: whether the class head must be there, too.

    Returns:
        What was loaded, left fresh and left over, in few lines.

    Raises:
        ValueError: naming the file, and what is missing, too much, or of another shape.
    """
    given = _read(source)
    return take(model, given, f"--init {source}", head=head)


def take(
    model: Model, given: Mapping[str, Tensor], source: str, *, head: bool = False
) -> list[str]:
    """Load weights that have the network's own names; see `begin_with`.

    Args:
        model: the network.
        given: weights by name.
        source: what messages call them.
        head: whether the class head must be there, too.
    """
    tensors = _named(model, given)
    wanted = model.state_dict()
    # Of a network without pairs of BatchNorms (ARPL+CS) both halves begin with the one there is.
    for name in wanted:
        alone = name.replace(_GENERATED, ".")
        if name not in tensors and alone in tensors:
            tensors[name] = tensors[alone]
    ours = _class_head(model)
    fresh, unread, problems = [], [], []
    for name, value in wanted.items():
        may_be_fresh = not head and (name.startswith(ours) or _has_row_a_class(model, value))
        if name not in tensors:
            if name.startswith("rejection."):
                fresh.append(name)
                continue
            if may_be_fresh:
                fresh.append(name)
            elif not name.endswith("num_batches_tracked"):  # old files have none
                problems.append(f"lacks {_bare(name)}")
        elif not _is_plain(tensors[name]):
            problems.append(f"{_bare(name)} is sparse, quantised, complex or without its numbers")
        elif tensors[name].shape != value.shape:
            if may_be_fresh:
                fresh.append(f"{_bare(name)} ({_shape(tensors[name])} there, {_shape(value)} here)")
            else:
                problems.append(
                    f"{_bare(name)} is {_shape(tensors[name])}, the network's {_shape(value)}"
                )
    for name in tensors:
        if name not in wanted and not name.startswith(_BESIDE) and not name.startswith(ours):
            unread.append(_bare(name))
    if unread and not isinstance(model, AnyModel):
        problems += [f"has {name}, which the network has not" for name in unread]
    if problems:
        raise ValueError(f"{source} does not fit the network: {_few(problems, '; ')}")
    fitting = {
        name: value
        for name, value in tensors.items()
        if name in wanted and value.shape == wanted[name].shape
    }
    model.load_state_dict(fitting, strict=False)
    lines = []
    if fresh:
        lines.append(f"left fresh: {_few(map(_bare, fresh))}")
    if unread:
        lines.append(f"left over: {_few(unread)}")
    said = f"{source}: {len(fitting)} of {len(wanted)} tensors taken"
    return [f"{said}; {'; '.join(lines)}"] if lines else [said]


def _class_head(model: Model) -> tuple[str, ...]:
    """Return what the names of a class head begin with, the network's own and one in its place."""
    if isinstance(model, AnyModel):
        classifier = model.parts.classifier
        own = () if classifier is None else (f"{_NET}{classifier}.",)
        return (*own, "method_head.")
    return ("fc.",) if hasattr(model, "fc") else ("head.",)


def _has_row_a_class(model: Model, value: Tensor) -> bool:
    """Return whether a tensor may be of a class head that is no single layer."""
    if not isinstance(model, AnyModel) or model.parts.classifier is not None:
        return False
    return value.shape[:1] == (model.classes,)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor of a file is an array of real numbers that can be copied."""
    special = tensor.is_nested or tensor.is_quantized or tensor.is_meta or tensor.is_complex()
    return tensor.layout is torch.strided and not special


def _named(model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of files under the names that a model has for them."""
    prefix = _NET if isinstance(model, AnyModel) else ""
    return {
        name if name.startswith(_BESIDE) else prefix + name: value
        for name, value in tensors.items()
    }


def _bare(name: str) -> str:
    return name.removeprefix(_NET)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _few(items: Iterable[str], separator: str = ", ") -> str:
    listed = list(items)
    more = f"{separator}and {len(listed) - _FEW} more" if len(listed) > _FEW else ""
    return separator.join(listed[:_FEW]) + more


def _read(source: Path) -> dict[str, Tensor]:
    """Return the tensors of a run folder or of a file, by the names that they have there."""
    path = source / NETWORK if source.is_dir() else source
    if not path.is_file():
        hint = "the run is not finished" if (source / "config.json").exists() else "no such file"
        raise ValueError(f"--init {source}: there is no {path} ({hint})")
    if path.suffix != ".safetensors":
        return _unwrapped(_saved_by_torch(path), path)
    try:
        tensors = safetensors.torch.load_file(path)
        if source.is_dir() and (source / HEADS).is_file():
            tensors |= safetensors.torch.load_file(source / HEADS)
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"--init {path} is damaged, or no safetensors file: {error}") from error
    return _unwrapped(tensors, path)


def _saved_by_torch(path: Path) -> object:
    """Return what torch.save wrote; nothing but tensors, numbers, texts and their containers."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle, zip and torch raise types of their own
        # Torch's first lines say how to read the file all the same; what is in it stands below.
        other = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        first = f"it holds {other[1]}" if other else repr(error).splitlines()[0]
        raise ValueError(
            f"--init {path} is damaged, or holds more than weights, which may be anything and is "
            f"not read ({first}); write it anew where it comes from: torch.save("
            "model.state_dict(), FILE)"
        ) from error


def _unwrapped(found: object, path: Path) -> dict[str, Tensor]:
    """Return the weights in what a file holds, without what other programs put around them."""
    for _ in range(_MOST_INSIDE):
        if isinstance(found, Mapping):
            inside = (found[key] for key in _INSIDE if isinstance(found.get(key), Mapping))
            found = next(inside, found)
    if not isinstance(found, Mapping) or not any(isinstance(v, Tensor) for v in found.values()):
        kind = f"the keys {_few(map(str, found))}" if isinstance(found, Mapping) else type(found)
        raise ValueError(
            f"--init {path} holds {kind}, and no weights by name, neither by themselves nor under "
            f"{', '.join(_INSIDE)}"
        )
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    while prefix := next((w for w in _WRAPPERS if all(n.startswith(w) for n in tensors)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors
