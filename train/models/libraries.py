"""Networks of other people: timm's, torchvision's, and those that a function of the user returns.

Neither library is needed by anything else here; each is imported when a network of it is asked for.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_KEPT: list[torch.library.Library] = []


@dataclass(frozen=True)
class Published:
    """How the images were shown to a network when its published weights were trained."""

    mean: tuple[float, ...]
    """Per channel, of pixels in 0 .. 255."""
    std: tuple[float, ...]
    """Per channel, of pixels in 0 .. 255."""
    size: int
    """Side of the images [pixels]."""


def is_foreign(name: str) -> bool:
    """Return whether a --model names a network that is not our own."""
    return "/" in name or ":" in name


def make_network(name: str, classes: int, size: int) -> nn.Module:
    """Make a network with fresh weights, drawn from torch's default generator.

    Args:
        name: `timm/NAME`, `torchvision/NAME` or `MODULE:CALLABLE`.
        classes: number of classes K, at least 2.
        size: side of the images [pixels], for networks that are built for one size.

    Raises:
        ValueError: an unknown name with the nearest ones, a package that is not installed with the
            line that installs it, or what a callable did wrong.
    """
    library, _, rest = name.partition("/")
    if library == "timm" and rest:
        return _timm_network(rest, classes, size, pretrained=False)
    if library == "torchvision" and rest:
        return _torchvision_network(rest, num_classes=classes)
    if ":" in name and "/" not in name:
        return _called(name, classes)
    raise ValueError(
        f"--model {name}: networks that are not backmix's own are named timm/NAME, "
        "torchvision/NAME or MODULE:CALLABLE"
    )


def published_weights(name: str, classes: int, size: int) -> dict[str, Tensor]:
    """Download a network's published weights, by name; what has another width stands as it was.

    Args:
        name: `timm/NAME` or `torchvision/NAME`.
        classes: number of classes K.
        size: side of the images [pixels].

    Raises:
        ValueError: no weights are published, or they cannot be downloaded here.
    """
    library, _, rest = name.partition("/")
    if library not in ("timm", "torchvision") or not rest:
        raise ValueError(
            f"--pretrained: weights are published for timm/NAME and torchvision/NAME, not for "
            f"{name}: begin with a file, --init FILE"
        )
    try:
        # Drawing weights only to replace them must not move the caller's generator.
        with torch.random.fork_rng(devices=[]):
            if library == "torchvision":
                return _torchvision_network(rest, weights="DEFAULT").state_dict()
            network = _timm_network(rest, classes, size, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"--pretrained: the weights of {name} cannot be had here ({_first_line(error)}). "
            "Without a way to the net, download them elsewhere and begin with --init FILE"
        ) from error
    weights = network.state_dict()
    if _timm_config(network).get("num_classes") != classes:
        heads = network.get_classifier()  # type: ignore[operator]
        several = nn.ModuleList(heads if isinstance(heads, tuple) else [heads])
        own = {id(tensor) for tensor in several.state_dict(keep_vars=True).values()}
        named = network.state_dict(keep_vars=True).items()
        weights = {key: weights[key] for key, tensor in named if id(tensor) not in own}
    return weights


def published_views(name: str, network: nn.Module) -> Published | None:
    """Return how images were shown to a library's network; None where nobody says."""
    library, _, rest = name.partition("/")
    if library == "timm":
        config = _timm_config(network)
        mean, std, size = (config.get(key) for key in ("mean", "std", "input_size"))
        if not (mean and std and size):
            return None
    elif library == "torchvision":
        models = import_library("torchvision").models
        try:
            views = models.get_model_weights(rest).DEFAULT.transforms()
        except (AttributeError, ValueError):
            return None
        mean, std, size = views.mean, views.std, views.crop_size
        if getattr(network, "transform_input", None) is False:
            # Made with its weights the network turns such views into -1 .. 1 itself; made without,
            # as here and by whoever reads our files, it has to be shown -1 .. 1.
            mean = std = (0.5, 0.5, 0.5)
    else:
        return None
    return Published(
        tuple(round(255 * value, 3) for value in mean),
        tuple(round(255 * value, 3) for value in std),
        int(size[-1]),
    )


def synchronise_batchnorm(model: nn.Module) -> None:
    """Let every BatchNorm of a network see the batches of all processes, in place.

    timm's have an activation within, which torch's own conversion would lose.
    """
    timm = sys.modules.get("timm")
    convert = timm.layers.convert_sync_batchnorm if timm else None
    (convert or nn.SyncBatchNorm.convert_sync_batchnorm)(model)
    model.train(model.training)  # networks that are tapped look for their layers


def declare_torchvision_operators() -> None:
    """Let torchvision be imported beside a CPU build of torch; elsewhere do nothing.

    The wheels of PyPI are built for a GPU build: their operators do not load beside another, and
    the import then fails for want of two schemas that no network calls.
    """
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # the schemas live as long as the library object


def import_library(name: str) -> ModuleType:
    """Import timm or torchvision; ValueError with the line that installs it."""
    try:
        if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision"):
            try:
                importlib.import_module("torchvision")
            except RuntimeError:
                for partial in [key for key in sys.modules if key.split(".")[0] == "torchvision"]:
                    del sys.modules[partial]
                declare_torchvision_operators()
        importlib.import_module("torchvision.models")
        return importlib.import_module(name)
    except ImportError as error:
        wanted = "torchvision" if "torchvision" in str(error) else name
        raise ValueError(
            f"--model {name}/...: {wanted} is not installed here ({error}); install it with: "
            f"pip install 'backmix[{name}]'"
        ) from error


def _timm_network(name: str, classes: int, size: int, *, pretrained: bool) -> nn.Module:
    timm = import_library("timm")
    if not timm.is_model(name):
        raise ValueError(_unknown("timm", name, timm.list_models()))
    options: dict[str, Any] = {}
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True))
        raise ValueError(
            f"--model timm/{name}: {_first_line(error)} There are {tags or 'none'}"
        ) from error
    if config is not None and config.fixed_input_size:
        options["img_size"] = size
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"--model timm/{name} cannot be made for {classes} classes and images of {size} x "
            f"{size} pixels: {_first_line(error)}"
        ) from error


def _torchvision_network(name: str, **options: Any) -> nn.Module:
    models = import_library("torchvision").models
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(_unknown("torchvision", name, known))
    if name in ("googlenet", "inception_v3") and not options.get("weights"):
        # Without: a second output while training, and a slow way to draw weights.
        options |= {"aux_logits": False, "init_weights": True}
    return models.get_model(name, **options)


def _called(name: str, classes: int) -> nn.Module:
    """Return what MODULE:CALLABLE returns for a number of classes."""
    module_name, _, path = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: what is installed comes first
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"--model {name}: {module_name} cannot be imported: {error}"
            ) from error
        raise ValueError(
            f"--model {name}: there is no module {error.name}, neither installed nor in "
            f"{os.getcwd()}; PYTHONPATH names further folders"
        ) from error
    except (Exception, SystemExit) as error:  # a script ends when it is imported
        raise ValueError(
            f"--model {name}: {module_name} cannot be imported: {_where(error)}"
        ) from error
    function: Any = module
    for part in path.split("."):
        if not hasattr(function, part):
            near = _nearest(part, [n for n in vars(module) if not n.startswith("_")])
            raise ValueError(f"--model {name}: {module_name} has no {path}{near}")
        function = getattr(function, part)
    if not callable(function):
        raise ValueError(f"--model {name}: {path} of {module_name} cannot be called")
    return _network_of(name, function, classes)


def _network_of(name: str, function: Callable[..., Any], classes: int) -> nn.Module:
    try:
        inspect.signature(function).bind(classes)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--model {name} must take the number of classes as its only argument: {error}"
        ) from error
    try:
        network = function(classes)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model {name}, called with {classes}: {_where(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"--model {name} returned a {type(network).__name__}, not a torch.nn.Module"
        )
    return network


def _timm_config(network: nn.Module) -> Mapping[str, Any]:
    """Return timm's pretrained configuration of a network, as far as there is one."""
    config = getattr(network, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else {}


def _unknown(library: str, name: str, known: list[str]) -> str:
    return f"{library} {import_library(library).__version__} has no network {name!r}" + (
        _nearest(name, known)
        or f"; `python -c 'import {library}'` and its list_models() name them all"
    )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"; the nearest are {', '.join(near)}" if near else ""


def _where(error: BaseException) -> str:
    """Return an error with the file and line where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_first_line(error)}{place}"


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).strip().splitlines()[0]
