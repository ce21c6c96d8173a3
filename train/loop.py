"""The training loop: one step, and the steps of a run.

Nothing in a step waits for the device. What the loop needs to continue is in `State`, and between
two steps nothing else is: leaving `steps` anywhere is safe. Logs, checkpoints and signals are the
caller's (`run.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backmix.pipeline.batch import Batch, Place, cut, stand_in
from backmix.pipeline.loader import Loader
from backmix.train.methods.method import DeviceDraws, Out, Views
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
    state: State,
    batch: Batch,
    run: Run,
    rate: float | Tensor,
    autocast: AbstractContextManager,
    drawn: DeviceDraws | None = None,
) -> Tensor:
    """Take one optimizer step; returns its loss, 0-d on the device.

    With `drawn`, what the method has drawn for the batch before, the host computes nothing.

    The gradient is that of the mean over all images of the step, in however many parts
    (--accumulate) and processes they are. A step whose gradient is not finite is void: parameters,
    momentum, BatchNorm statistics, EMA and bank stay as they were, without the host knowing yet.
    """
    set_learning_rate(state.optimizer, rate)
    state.optimizer.zero_grad(set_to_none=True)
    size = state.world.size
    images = batch.place.consumed - state.place.consumed if size > 1 else len(batch)
    parts: list[Part] = []
    pieces = _pieces(batch, run.accumulate, size)
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        with nullcontext() if last else state.no_sync():
            weight = piece.images * size / images
            parts.append(take_part(state, piece, weight, autocast, drawn))
    if size > 1:
        mean_over_processes(state, batch.images / images)

    parameters = [p for p in state.model.parameters() if p.grad is not None]
    if run.optim.clip > 0:
        norm = torch.nn.utils.clip_grad_norm_(parameters, run.optim.clip, foreach=True)
    else:
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    void = ~torch.isfinite(norm)
    alive = 1.0 - void.float()

    with part("bank"), autocast:
        for taken in parts:
            state.method.after_backward(taken.batch, taken.views, taken.out, state.model, alive)
        state.method.after_step(_summed([taken.out.figures for taken in parts]), alive)
        if state.exchange is not None:
            state.exchange.after_step()
    # Fused optimizers leave out the update where found_inf is 1: the test stays on the device.
    setattr(state.optimizer, "found_inf", void.float())  # noqa: B010
    setattr(state.optimizer, "grad_scale", None)  # noqa: B010
    with part("optimizer"):
        state.optimizer.step()
    for buffer, safe in zip(state.model.buffers(), state.safe_buffers, strict=True):
        torch.where(void, safe, buffer, out=safe)
        buffer.copy_(safe)
    if state.ema is not None:
        with part("ema"):
            state.ema.step(state.step + 1, alive)

    count(state, parts, images, norm, void)
    shares = [taken.out.loss * (taken.batch.images / len(batch)) for taken in parts]
    return torch.stack(shares).sum() if len(shares) > 1 else parts[0].out.loss


def mean_over_processes(state: State, share: float) -> None:
    """Let all processes have the same running statistics, and count what went between them.

    Args:
        state: whose gradients are the same everywhere already.
        share: of the images of the step that this process has seen.
    """
    sent = {
        "buffer_bytes": state.world.average_buffers(state.model, share),
        "gradient_bytes": sum(
            p.grad.nbytes for p in state.model.parameters() if p.grad is not None
        ),
    }
    for name, count in sent.items():
        state.traffic[name] = state.traffic.get(name, 0) + count


def _pieces(batch: Batch, parts: int, processes: int) -> list[Batch]:
    """Return the parts that a batch is cut into.

    Empty ones are left out, but where several processes train together: there all take equally many
    parts, since they wait for one another in each, and an image without weight stands in.
    """
    pieces = cut(batch, parts)
    if processes == 1:
        return [piece for piece in pieces if len(piece)]
    return [piece if len(piece) else stand_in(piece, batch.host.index[0]) for piece in pieces]


@dataclass(frozen=True)
class Part:
    """What is left of a part of a step after its backward pass, without graph and images."""

    batch: Batch
    views: Views
    out: Out


def take_part(
    state: State,
    batch: Batch,
    weight: float,
    autocast: AbstractContextManager,
    drawn: DeviceDraws | None = None,
) -> Part:
    """Add the gradient of a part of a step to what is there.

    Args:
        state: is left as it is, but for gradients and the buffers of the network.
        batch: the part.
        weight: what the mean over its images counts in the step; 0 for a stand-in, which changes no
            buffer either.
        autocast: of the forward pass.
        drawn: what the method has drawn for the part; None = it draws now.
    """
    with part("mix"):
        views = state.method.prepare(batch, drawn or state.method.draw(batch))
    before = [] if batch.images else [buffer.clone() for buffer in state.model.buffers()]
    with part("forward"), autocast:
        out = state.forward(views, batch)
    with part("backward"):
        (out.loss if weight == 1 else out.loss * weight).backward()
    if before:
        for buffer, value in zip(state.model.buffers(), before, strict=True):
            buffer.copy_(value)
    nothing = views.images.new_empty(0)
    return Part(
        batch,
        replace(views, images=nothing, plain=None, regions=None),
        replace(
            out,
            loss=out.loss.detach(),
            logits=out.logits.detach(),
            features=out.features.detach(),
        ),
    )


def _summed(figures: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sums of equally named figures."""
    first, *others = figures
    total = dict(first)
    for other in others:
        for name, value in other.items():
            total[name] = total[name] + value
    return total


def count(state: State, parts: Sequence[Part], images: int, norm: Tensor, void: Tensor) -> None:
    """Add a step to the meters and keep the sample numbers of the first void one.

    Args:
        state: holds the meters: of this process, whose sums over all processes are those of a run.
        parts: of the step, as far as this process has taken them.
        images: of the step in all processes; what is a mean over a step counts by its share.
        norm: of the gradient, 0-d.
        void: whether the step was not taken, bool 0-d.
    """
    broken = []
    for taken in parts:
        batch, out, share = taken.batch, taken.out, taken.batch.images / images
        mine = void if batch.images else torch.ones_like(void)
        right = torch.where(mine, 0, (out.logits.argmax(1) == batch.labels).sum())
        seen = torch.where(mine, 0, len(batch))
        loss = torch.where(mine, 0.0, out.per_sample.sum())
        state.interval.add(
            loss=loss,
            right=right,
            seen=seen,
            steps=torch.full((), share, device=norm.device),
            grad_norm=torch.where(mine, 0.0, norm.detach() * share),
            **{
                name: torch.where(
                    mine, 0.0, torch.nan_to_num(value.detach(), posinf=0, neginf=0) * share
                )
                for name, value in out.scalars.items()
            },
        )
        state.epoch.add(loss=loss, right=right, seen=seen)
        if batch.images:
            broken.append(torch.where(torch.isfinite(out.per_sample), -1, batch.index))
    first = void & (state.void_steps == 0)
    named = torch.full_like(state.void_samples, -1)
    if broken:
        found = torch.cat(broken).sort(descending=True).values[: len(named)]
        named[: len(found)] = found
    state.void_samples.copy_(torch.where(first, named, state.void_samples))
    state.void_steps += void


def rate_at(run: Run, step: int, per_epoch: int) -> float:
    """Return the learning rate of a step, 0 being the first, at so many steps an epoch."""
    return learning_rate(
        run.optim.schedule,
        step,
        peak=run.optim.lr,
        steps=run.epochs * per_epoch,
        steps_per_epoch=per_epoch,
        warmup=run.optim.warmup,
        milestones=run.optim.milestones,
        factor=run.optim.factor,
        cycles=run.optim.cycles,
    )


def steps(
    state: State,
    loader: Loader,
    run: Run,
    autocast: AbstractContextManager,
    fetch: Callable[[Iterable[Batch]], Iterator[Batch]] = fetched,
) -> Iterator[Step]:
    """Take all steps from the state's place to the end of the run, yielding after each.

    `fetch` goes through the loader's batches; a clock's counts the time that they take.
    """
    per_epoch = -(-loader.samples // run.loader.batch)
    while state.place.epoch < run.epochs:
        for batch in fetch(loader.batches(state.place)):
            rate = rate_at(run, state.step, per_epoch)
            if not len(batch):  # the others have an image each, or more
                batch = stand_in(batch, int(loader.subset.index[0]))
            loss = take_step(state, batch, run, rate, autocast)
            state.step += 1
            state.place = batch.place
            end_of_epoch = batch.place.consumed == loader.samples
            if end_of_epoch and state.exchange is not None:
                state.exchange.settle()
            yield Step(loss, end_of_epoch)
        state.place = Place(run.seed, state.place.epoch + 1)
