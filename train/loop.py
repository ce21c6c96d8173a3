"""The training loop: one step, and the steps of a run.

Nothing in a step waits for the device. What the loop needs to continue is in `State`, and between
two steps nothing else is: leaving `steps` anywhere is safe. Logs, checkpoints and signals are the
caller's (`run.py`).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.loader import Loader
from backmix.train.optim import learning_rate, set_learning_rate
from backmix.train.options import Run
from backmix.train.profile import fetched, part
from backmix.train.state import State


@dataclass(frozen=True)
class Step:
    """What a step tells its caller; the figures are on the device."""

    loss: Tensor
    """0-d, of this step."""
    end_of_epoch: bool
    """Whether all samples of the epoch have been taken."""


def take_step(
    state: State, batch: Batch, run: Run, rate: float, autocast: AbstractContextManager
) -> Tensor:
    """Take one optimizer step; returns its loss, 0-d on the device.

    A step whose gradient is not finite is void: parameters, momentum, BatchNorm statistics and bank
    stay as they were, without the host knowing yet.
    """
    set_learning_rate(state.optimizer, rate)
    with part("mix"):
        images = state.method.prepare(batch)
    with part("forward"), autocast:
        out = state.method.loss(images, batch, state.model)
    with part("backward"):
        state.optimizer.zero_grad(set_to_none=True)
        out.loss.backward()

    parameters = [p for p in state.model.parameters() if p.grad is not None]
    if run.optim.clip > 0:
        norm = torch.nn.utils.clip_grad_norm_(parameters, run.optim.clip, foreach=True)
    else:
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    void = ~torch.isfinite(norm)
    alive = 1.0 - void.float()

    with part("bank"), autocast:
        state.method.after_backward(batch, out, state.model, alive)
    # Fused optimizers leave out the update where found_inf is 1: the test stays on the device.
    setattr(state.optimizer, "found_inf", void.float())  # noqa: B010
    setattr(state.optimizer, "grad_scale", None)  # noqa: B010
    with part("optimizer"):
        state.optimizer.step()
    for buffer, safe in zip(state.model.buffers(), state.safe_buffers, strict=True):
        torch.where(void, safe, buffer, out=safe)
        buffer.copy_(safe)

    count(state, batch, out.logits, out.per_sample, norm, void, out.scalars)
    return out.loss.detach()


def count(
    state: State,
    batch: Batch,
    logits: Tensor,
    per_sample: Tensor,
    norm: Tensor,
    void: Tensor,
    scalars: dict[str, Tensor],
) -> None:
    """Add a step to the meters and keep the sample numbers of the first void one."""
    right = torch.where(void, 0, (logits.detach().argmax(1) == batch.labels).sum())
    seen = torch.where(void, 0, len(batch))
    loss = torch.where(void, 0.0, per_sample.sum())
    state.interval.add(
        loss=loss,
        right=right,
        seen=seen,
        steps=torch.ones((), device=norm.device),
        grad_norm=torch.where(void, 0.0, norm.detach()),
        **{
            name: torch.where(void, 0.0, torch.nan_to_num(value.detach(), posinf=0, neginf=0))
            for name, value in scalars.items()
        },
    )
    state.epoch.add(loss=loss, right=right, seen=seen)
    broken = ~torch.isfinite(per_sample)
    first = void & (state.void_steps == 0)
    named = torch.full_like(state.void_samples, -1)
    most = min(len(named), len(batch))
    named[:most] = torch.where(broken, batch.index, -1).sort(descending=True).values[:most]
    state.void_samples.copy_(torch.where(first, named, state.void_samples))
    state.void_steps += void


def steps(
    state: State, loader: Loader, run: Run, autocast: AbstractContextManager
) -> Iterator[Step]:
    """Take all steps from the state's place to the end of the run, yielding after each."""
    per_epoch = -(-loader.samples // run.loader.batch)
    total = run.epochs * per_epoch
    while state.place.epoch < run.epochs:
        for batch in fetched(loader.batches(state.place)):
            rate = learning_rate(
                run.optim.schedule,
                state.step,
                peak=run.optim.lr,
                steps=total,
                steps_per_epoch=per_epoch,
                warmup=run.optim.warmup,
                milestones=run.optim.milestones,
                factor=run.optim.factor,
                cycles=run.optim.cycles,
            )
            loss = take_step(state, batch, run, rate, autocast)
            state.step += 1
            state.place = batch.place
            yield Step(loss, batch.place.consumed == loader.samples)
        state.place = Place(run.seed, state.place.epoch + 1)
