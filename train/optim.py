"""Optimizers in the one form that the loop needs, and schedules as functions of the step.

No scheduler objects: the learning rate is computed from the step number, so nothing is saved.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Schedule = Literal["milestones", "linear", "cosine", "restarts", "cyclic", "onecycle"]


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    kind: Literal["sgd", "adam", "adamw"] = "sgd",
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: Literal["matrices", "all", "ffcv"] = "matrices",
) -> torch.optim.SGD | torch.optim.Adam | torch.optim.AdamW:
    """Return a fused optimizer whose learning rate is one tensor, changed by `set_learning_rate`.

    Fused because a step with non-finite gradients is masked on the device (`found_inf`), which the
    other forms refuse. Call it after the model has its final device and memory format.

    Args:
        named_parameters: such as `model.named_parameters()`; frozen ones are left out.
        kind: sgd, or adam with betas 0.9 and 0.999; adamw decays apart from the gradient.
        lr: learning rate of the first step.
        momentum: sgd only, without dampening.
        nesterov: sgd only.
        weight_decay: added to the gradient as weight_decay * parameter; adamw takes
            lr * weight_decay * parameter off the parameter instead.
        decay: matrices = parameters of two and more dimensions only, that is neither biases nor
            normalisation; all = every parameter, as the older open-set papers do; ffcv = every
            parameter without "bn" in its name, as ffcv's ImageNet recipes do. There that spares
            most of the normalisation, but not the one beside a shortcut ("downsample.1"), and no
            bias of the class head.

    Raises:
        ValueError: no parameters, or a setting out of its range.
    """
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    parameters = [parameter for _, parameter in named]
    if not parameters:
        raise ValueError("there are no parameters to train")
    if kind == "sgd" and nesterov and momentum <= 0:
        raise ValueError("nesterov needs a momentum above 0")
    groups = [
        {"params": decayed, "weight_decay": weight_decay if decays else 0.0}
        for decays in (True, False)
        if (decayed := [p for name, p in named if _is_decayed(decay, name, p) == decays])
    ]
    rate = torch.tensor(lr, dtype=torch.float32, device=parameters[0].device)
    if kind == "adam":
        return torch.optim.Adam(groups, lr=rate, fused=True)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True)
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum > 0:
        # Without these, a masked first step leaves buffers that were allocated and never written.
        # With dampening 0, zeros give the same bits as no buffers.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _is_decayed(
    decay: Literal["matrices", "all", "ffcv"], name: str, parameter: nn.Parameter
) -> bool:
    match decay:
        case "matrices":
            return parameter.ndim > 1
        case "all":
            return True
        case "ffcv":
            return "bn" not in name


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Write the learning rate into the optimizer's own tensor, which captured graphs read."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


def learning_rate(
    schedule: Schedule,
    step: int,
    *,
    peak: float,
    steps: int,
    steps_per_epoch: int,
    warmup: float = 0.0,
    milestones: Sequence[float] = (),
    factor: float = 0.1,
    cycles: int = 1,
) -> float:
    """Return the learning rate of a step by the schedule's name.

    Args:
        schedule: milestones, linear, cosine, restarts, cyclic or onecycle: the functions below.
        step: number of the step, 0 <= step < steps.
        peak: the highest learning rate.
        steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of one epoch.
        warmup: share of the run spent rising (all but cyclic).
        milestones: epochs after which the rate drops (milestones).
        factor: what it is multiplied by then (milestones).
        cycles: how often the rate starts from its peak (restarts).
    """
    match schedule:
        case "milestones":
            rising, progress = _phase(step, steps, warmup)
            if rising:
                return peak * progress
            return stepped(step, steps_per_epoch, peak, milestones, factor)
        case "linear":
            return linear(step, steps, peak, warmup)
        case "cosine":
            return cosine(step, steps, peak, warmup)
        case "restarts":
            epochs = steps // steps_per_epoch
            rise = round(warmup * epochs)
            return restarts(step // steps_per_epoch, peak, epochs // cycles, rise)
        case "cyclic":
            return cyclic(step, steps, steps_per_epoch, peak)
        case "onecycle":
            return onecycle(step, steps, peak, warmup)


def stepped(
    step: int, steps_per_epoch: int, peak: float, milestones: Sequence[float], factor: float = 0.1
) -> float:
    """Return peak, times `factor` for every milestone [epochs] that is over.

    >>> stepped(299, 10, 0.1, [30, 60, 90]), stepped(300, 10, 0.1, [30, 60, 90])
    (0.1, 0.010000000000000002)
    """
    passed = sum(step >= milestone * steps_per_epoch for milestone in milestones)
    return peak * factor**passed


def linear(step: int, steps: int, peak: float, warmup: float = 0.0) -> float:
    """Rise linearly to the peak over the share `warmup` of the steps, then fall linearly.

    The line runs through 0 one step before the first and one step after the last, so that no step
    is wasted at rate 0.

    >>> [linear(step, 10, 1.0, 0.2) for step in (0, 1, 2, 6, 9)]
    [0.3333333333333333, 0.6666666666666666, 1.0, 0.5, 0.125]
    """
    rising, progress = _phase(step, steps, warmup)
    return peak * (progress if rising else 1 - progress)


def cosine(step: int, steps: int, peak: float, warmup: float = 0.0) -> float:
    """Rise linearly to the peak over the share `warmup` of the steps, then fall like a cosine."""
    rising, progress = _phase(step, steps, warmup)
    return peak * (progress if rising else (1 + math.cos(math.pi * progress)) / 2)


def restarts(epoch: int, peak: float, cycle: int, rise: int) -> float:
    """Fall from the peak to a thousandth of it like a cosine, again and again.

    As Vaze et al. ("Open-Set Recognition: A Good Closed-Set Classifier Is All You Need", ICLR 2022)
    run it, who set the rate after every epoch to that epoch's own: each epoch is one late. With a
    warm-up the first epoch runs at a thousandth of the peak, and the rate rises linearly to the
    cosine's value at epoch `rise`.

    Args:
        epoch: number of the epoch, from 0.
        peak: the highest learning rate.
        cycle: epochs from peak to peak, at least 1.
        rise: epochs of the warm-up, at most `cycle`.

    >>> [round(restarts(epoch, 1.0, 4, 2), 4) for epoch in range(10)]
    [0.001, 0.2507, 0.5005, 0.5005, 0.1473, 1.0, 0.8537, 0.5005, 0.1473, 1.0]
    """
    floor = 1e-3 * peak

    def falling(epoch: int) -> float:
        return floor + (peak - floor) * (1 + math.cos(math.pi * epoch / cycle)) / 2

    if rise and epoch <= rise:
        return floor + (falling(rise) - floor) * epoch / rise
    return falling(max(epoch - 1, 0) % cycle)


def cyclic(step: int, steps: int, steps_per_epoch: int, peak: float) -> float:
    """Go linearly through (0, peak / 10,000), (2 epochs, peak), (last epoch's end, 0).

    The schedule of ffcv's ImageNet recipes. Runs of two epochs and less only rise.
    """
    epoch, epochs = step / steps_per_epoch, steps / steps_per_epoch
    if epoch < 2:
        return peak * (1e-4 + (1 - 1e-4) * epoch / 2)
    return peak * (epochs - epoch) / (epochs - 2)


def onecycle(step: int, steps: int, peak: float, warmup: float = 0.3) -> float:
    """Rise like a cosine from peak / 25 to the peak, then fall like one to peak / 250,000.

    Smith and Topin, "Super-Convergence" (2018), in the form of torch's OneCycleLR with its own
    values and cosine annealing; the momentum stays as it is. The peak lies at step
    warmup * steps - 1, between two steps where that is no whole number.

    >>> [round(onecycle(step, 10, 1.0, 0.3), 4) for step in (0, 1, 2, 3, 9)]
    [0.04, 0.52, 1.0, 0.9505, 0.0]
    """
    top = warmup * steps - 1
    if step < top:
        low, progress = peak / 25, 1 - step / top
    else:
        low, progress = peak / 250_000, (step - top) / max(steps - 1 - top, 1e-9)
    return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2


def _phase(step: int, steps: int, warmup: float) -> tuple[bool, float]:
    """Return whether the step belongs to the warm-up, and how far that phase is, in [0, 1]."""
    rise = round(warmup * steps)
    if step < rise:
        return True, (step + 1) / (rise + 1)
    return False, (step - rise) / (steps - rise)
