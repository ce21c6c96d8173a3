"""Weights that a run begins with."""

import json
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

OWN = "rejection."
"""Names of the parameters that a network may have beside those it begins with."""


def begin_with(model: nn.Module, source: Path) -> None:
    """Load the weights of a finished run, or of a .safetensors file with the model's own names.

    A rejection head may be missing on either side: it keeps its fresh weights, or is left out.

    Raises:
        ValueError: naming the file, and what is missing, too much, or of another shape.
    """
    path = source / "model.safetensors" if source.is_dir() else source
    if not path.is_file():
        hint = "the run is not finished" if (source / "config.json").exists() else "no such file"
        raise ValueError(f"--init {source}: there is no {path} ({hint})")
    try:
        given = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"--init {path} is damaged, or no safetensors file: {error}") from error
    wanted = model.state_dict()
    needed = {name for name in wanted if not name.startswith(OWN)}
    offered = {name for name in given if name in wanted or not name.startswith(OWN)}
    problems = [f"lacks {name}" for name in sorted(needed - offered)]
    problems += [f"has {name}, which the network has not" for name in sorted(offered - set(wanted))]
    problems += [
        f"{name} is {list(given[name].shape)}, the network's {list(wanted[name].shape)}"
        for name in sorted(offered & set(wanted))
        if given[name].shape != wanted[name].shape
    ]
    if problems:
        few = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if problems[4:] else "")
        raise ValueError(f"--init {path} does not fit the network: {few}")
    model.load_state_dict({name: given[name] for name in offered}, strict=False)
