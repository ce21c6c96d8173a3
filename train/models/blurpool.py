"""BlurPool: a fixed blur before every convolution that has a stride.

Zhang, "Making Convolutional Networks Shift-Invariant Again" (ICML 2019): who leaves pixels out
should blur before. In the form of ffcv's ImageNet recipes (github.com/libffcv/ffcv-imagenet), whose
blur has the size of its input, so that maps keep theirs. Max-pooling is left alone, and so is a
stem that reads the image itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_CHANNELS = 16
"""Convolutions with fewer input channels are left alone."""


def add_blurpool(model: nn.Module) -> None:
    """Blur what the network's strided convolutions read, by (1 2 1) x (1 2 1) / 16, zeros around.

    Those are the convolutions that have a stride above 1 in height or width and at least
    `LEAST_CHANNELS` input channels. Nothing is learned or stored: parameters, their names and the
    state_dict stay as they are, so that weights fit the network with and without.

    Raises:
        ValueError: the network has no such convolution.
    """
    # A hook, not another class: libraries have convolutions with a forward pass of their own.
    strided = [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
        and max(module.stride) > 1
        and module.in_channels >= LEAST_CHANNELS
    ]
    if not strided:
        raise ValueError(
            f"--blurpool: this network has no convolution with a stride and at least "
            f"{LEAST_CHANNELS} input channels, so there is nothing to blur: leave it out, "
            "and where the recipe has it, give --no-blurpool"
        )
    row = torch.tensor([1.0, 2.0, 1.0])
    for module in strided:
        kernel = torch.outer(row, row) / 16
        kernel = kernel.to(module.weight).repeat(module.in_channels, 1, 1, 1)
        module.register_buffer("blur", kernel, persistent=False)
        module.register_forward_pre_hook(_blurred)


def _blurred(convolution: nn.Conv2d, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return what the convolution reads instead of its input, of the same shape."""
    kernel: Tensor = convolution.blur  # type: ignore[assignment]
    return F.conv2d(inputs[0], kernel, padding=1, groups=convolution.in_channels)
