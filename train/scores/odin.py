"""ODIN: the softmax at a high temperature, of an image moved a step towards its own class."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 1000.0
"""T of both the step and the score."""
STEP = 0.0014
"""Length of the step in every pixel, for pixels in 0 .. 1."""


def odin(
    logits: Callable[[Tensor], Tensor],
    views: Tensor,
    std: tuple[float, float, float],
    temperature: float = TEMPERATURE,
    step: float = STEP,
) -> Tensor:
    """Return ODIN's score of normalised views, float64 [n]; larger = more known.

    Liang, Li, Srikant, Enhancing the Reliability of Out-of-distribution Image Detection (ICLR
    2018): x' = x - step sign(dL/dx), L the cross-entropy of z(x) / T with the predicted class; then
    max softmax of z(x') / T, here as log odds like `msp`: the same order, but near 1 / K, where
    T = 1000 puts it, fp32 probabilities would tie.

    Args:
        logits: the network in evaluation mode: float [n, K] of views.
        views: float [n, 3, H, W], pixels normalised as (pixel - mean) / std.
        std: in pixel units, 0 .. 255: what turns the step into one of normalised views.
        temperature: T > 0.
        step: in pixels of 0 .. 1.
    """
    # Not even the caller's inference mode may reach in here: the step needs a gradient.
    with torch.inference_mode(False), torch.enable_grad():
        start = views.detach().clone().requires_grad_()
        z = logits(start).float() / temperature
        loss = F.cross_entropy(z, z.detach().argmax(1), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, start)
    per_channel = torch.tensor(std, device=views.device, dtype=views.dtype)
    moved = views - gradient.sign() * (255 * step / per_channel)[:, None, None]
    with torch.no_grad():
        z = logits(moved).double() / temperature
    top = z.argmax(1, keepdim=True)
    others = z.scatter(1, top, -torch.inf)
    return z.gather(1, top).squeeze(1) - others.logsumexp(1)
