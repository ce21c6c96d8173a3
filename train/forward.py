"""The forward pass of a step as one module: what is compiled, and what averages over processes."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import nn

from backmix.pipeline.batch import Batch
from backmix.train.methods.method import Method, Out, Views
from backmix.train.models.build import Model


class Forward(nn.Module):
    """Network and loss, from views to what backward starts from.

    DistributedDataParallel wraps this, and torch.compile that, so neither is ever seen by
    checkpoints and evaluation, which know the network alone.
    """

    def __init__(self, model: Model, method: Method) -> None:
        """Join a network and the method that trains it."""
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, views: Views, batch: Batch) -> Out:
        """Return the method's loss of the views."""
        return self.method.loss(views, batch, self.model)


ForwardPass = Callable[[Views, Batch], Out]
"""`Forward`, or what wraps it."""

SHAPES = 64
"""Shapes that network and loss are compiled for at most: each size of growing views is one, and
each with the short last batch of its epochs another."""

COMPILERS = ("g++", "clang++", "c++", "gcc", "clang", "cc")


def compile_step(forward: ForwardPass, model: Model) -> ForwardPass:
    """Return network and loss compiled; the network is compiled by itself, too, in place.

    The latter is for BackMix, which shows it plain images besides; it costs nothing before. Every
    shape is compiled for itself, when it is first seen.

    Args:
        forward: the forward pass, after what averages over processes has wrapped it.
        model: its network.

    Raises:
        ValueError: there is no C++ compiler, which torch.compile calls on every device.
    """
    from torch._dynamo import config  # which takes a second

    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS)))):
        raise ValueError(
            f"--compile needs a C++ compiler, and there is none of {', '.join(COMPILERS)}: install "
            "one (apt install g++), name it in the environment variable CXX, or leave --compile out"
        )
    # As an argument of torch.compile the limit is known from torch 2.12 on only.
    config.recompile_limit = max(config.recompile_limit, SHAPES)
    model.compile(dynamic=False)
    return torch.compile(forward, dynamic=False)  # type: ignore[arg-type, return-value]
