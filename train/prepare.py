"""From a run's options to what the loop needs: data, network, method, optimizer, and loader."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from backmix.pipeline.batch import Place
from backmix.pipeline.beton import BetonSet, open_set
from backmix.pipeline.loader import Loader, choose, open_loader
from backmix.pipeline.subset import Subset
from backmix.train.arithmetic import set_arithmetic
from backmix.train.check import check_device, check_loader
from backmix.train.ema import Ema
from backmix.train.exchange import Exchange
from backmix.train.known import known_classes, refuse_unfit_init, training_subset
from backmix.train.memory import keep_freed_memory
from backmix.train.methods.backmix import BackMixMethod
from backmix.train.methods.build import build as build_method
from backmix.train.methods.build import build_network
from backmix.train.methods.method import Method
from backmix.train.methods.views import unmixed
from backmix.train.models.build import Model
from backmix.train.models.fit import first_weights, found_maps, refuse_clipped
from backmix.train.models.libraries import synchronise_batchnorm
from backmix.train.optim import make_optimizer
from backmix.train.options import Arpl, Run, host_of
from backmix.train.run_folder import (
    Config,
    Resolved,
    resolve,
)
from backmix.train.state import State
from backmix.train.world import (
    World,
    cores,
    dropout_seed,
    refuse_too_many,
    spread,
)

FIDELITY_IMAGES = 64
"""Training images on which the fidelity of a network's maps is measured, at most."""


def prepare_run(
    run: Run,
    recipe: str,
    command: list[str],
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
    world: World | None = None,
) -> tuple[Config, State, Loader]:
    """Open the data and make model, optimizer and method of a run, as its seed makes them.

    `progress` is called with (done, all) while a resident pool is decoded, `say` with the lines of
    `--loader.loader fastest`, of which an unfinished run keeps what it began with. `world` are the
    processes that do it together: the first one decides what `auto` and `fastest` become.
    """
    world = world or World()
    resolved = Resolved(**world.of_first(asdict(resolve(run, cores(world))) if world.first else {}))
    device = device_of(resolved, world)
    check_device(run, device.type)
    torch.set_num_threads(resolved.threads)
    keep_freed_memory(device)
    set_arithmetic(run, device)
    with open_set(run.data) as data:
        known = known_classes(run, data.classes)
        refuse_unfit_init(run, [data.classes[number] for number in known], data)
        subset = training_subset(run, data.labels, known, data.classes)
        loader_options = run.loader
        if run.loader.loader == "fastest" and resolved.loader:
            loader_options = replace(run.loader, loader=resolved.loader)
        chosen = ""
        if world.first:
            chosen = choose(data, loader_options, subset, device=device, say=say)
            group = run.loader.mix_group
            uneven = refuse_too_many(world, run.loader.batch, group)
            if uneven:
                say(uneven)
        kind = world.of_first(chosen)
        resolved = replace(resolved, loader=kind)
        check_loader(run, kind, world.size)
        config = Config.of(run, recipe, command, resolved, data, known, len(subset))
        refuse_other_copies(world, data.digest)
        views = view_dtype(resolved)
        state = fresh_state(run, data, subset, len(known), device, views)
        state.world = world
    threads = run.loader.threads or (cores(world) if world.size > 1 else 0)
    loader = open_loader(
        run.data,
        replace(run.loader, loader=kind, threads=threads),
        split="train",
        subset=subset,
        seed=run.seed,
        device=str(device),
        rank=world.rank,
        world=world.size,
        progress=progress,
    )
    return config, state, loader


def device_of(resolved: Resolved, world: World) -> torch.device:
    """Return where this process computes: each process of a machine has a GPU of its own."""
    if resolved.device == "cuda" and world.size > 1:
        return torch.device("cuda", world.local_rank)
    return torch.device(resolved.device)


def refuse_other_copies(world: World, digest: str) -> None:
    """Refuse processes that read other data than the first one does."""
    digests = world.gathered([digest, os.uname().nodename])
    others = sorted({host for other, host in digests if other != digests[0][0]})
    if others:
        raise ValueError(
            f"--data is another file on {', '.join(others)} than on {digests[0][1]}: every machine "
            "must read the same data"
        )


def view_dtype(resolved: Resolved) -> torch.dtype:
    """Return the dtype of the images that the network is given.

    On a GPU in bf16 autocast, bf16: half the bytes, and the rounding that the first convolution
    would do. On a CPU always fp32.
    """
    on_gpu = resolved.device == "cuda" and resolved.precision == "bf16"
    return torch.bfloat16 if on_gpu else torch.float32


def fresh_state(
    run: Run,
    data: BetonSet,
    subset: Subset,
    classes: int,
    device: torch.device,
    views: torch.dtype,
) -> State:
    """Make model, optimizer and method as the run's seed makes them; `views` as `view_dtype`."""
    model, optimizer = fresh_network(run, classes, device)
    method = build_method(run, model, data, subset, device, views)
    state = first_state(model, optimizer, method, Place(run.seed), device)
    if run.ema > 0:
        state.ema = Ema(model, run.ema, run.ema_every)
    return state


def fresh_network(
    run: Run, classes: int, device: torch.device
) -> tuple[Model, torch.optim.Optimizer]:
    """Make the network as the run's seed makes it, in training mode, and its optimizer."""
    torch.manual_seed(run.seed)
    model = build_network(run, classes)
    refuse_clipped(run, model)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    optimizer = make_optimizer(
        model.named_parameters(),
        kind=run.optim.kind,
        lr=run.optim.lr,
        momentum=run.optim.momentum,
        nesterov=run.optim.nesterov,
        weight_decay=run.optim.weight_decay,
        decay=run.optim.decay,
    )
    return model, optimizer


def first_state(
    model: Model,
    optimizer: torch.optim.Optimizer,
    method: Method,
    place: Place,
    device: torch.device,
) -> State:
    """Return the state before the first step, all of it on the device."""
    state = State(model, optimizer, method, place)
    state.void_steps = state.void_steps.to(device)
    state.void_samples = state.void_samples.to(device)
    state.keep_buffers()
    return state


@dataclass(frozen=True)
class Beginning:
    """What a fresh run begins with."""

    said: list[str]
    """Lines for people."""
    head: bool
    """Whether the class head has been trained before."""


def begin(state: State, run: Run) -> Beginning:
    """Take the weights of --init or --pretrained into the state of a fresh run."""
    before = [weights.detach().clone() for weights in _head_weights(state.model)]
    said = first_weights(run, state.model)
    after = _head_weights(state.model)
    if said:
        state.keep_buffers()
        if state.ema is not None:
            state.ema.begin()
    if state.world.rank:  # dropout; the first process goes on from where the weights were drawn
        torch.manual_seed(dropout_seed(run.seed, 0, state.world.rank))
    return Beginning(said, any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))


def _head_weights(model: Model) -> list[torch.Tensor]:
    """Return what a class head has learned; one that is a view of a convolution owns nothing."""
    head = model.head
    return [head.weight] if isinstance(head, nn.Linear) else list(head.parameters())


def fill_bank(state: State, run: Run, loader: Loader) -> bool:
    """Let BackMix know from the first step on what a trained network knows of its images.

    Each process looks at its share of them, whole images all. Returns whether there is a bank that
    learns.
    """
    method, world = state.method, state.world
    if not (isinstance(method, BackMixMethod) and method.learns):
        return False
    exchange = Exchange(world, method.bank) if world.size > 1 else None
    whole = replace(run.loader, loader="turbo", crop="whole", grow_from=0, grow=(0, 0))
    with open_loader(
        run.data,
        whole,
        split="eval",
        subset=loader.subset,
        device=state.void_steps.device,
        rank=world.rank,
        world=world.size,
    ) as images:
        method.exchange = exchange
        method.fill_bank(images.batches(Place(run.seed)), state.model)
        method.exchange = state.exchange
    if exchange is not None:
        exchange.settle()
    return True


def fitness(run: Run, state: State, subset: Subset) -> dict[str, Any]:
    """Return what is known of a network's maps with the weights that the run begins with."""

    def images() -> torch.Tensor:
        options = replace(run.loader, loader="turbo", grow_from=0, grow=(0, 0), prefetch=1)
        options = replace(options, batch=min(FIDELITY_IMAGES, len(subset)), group=0)
        with open_loader(run.data, options, split="train", subset=subset, seed=run.seed) as few:
            batch = next(iter(few.batches(Place(run.seed))))
        return unmixed(batch, run.augment, None).to(state.void_steps.device)

    return found_maps(run, state.model, images)


def train_with_others(state: State, run: Run, loader: Loader) -> None:
    """Let a state that is equal in all processes remain so in every step."""
    world = state.world
    if world.size == 1:
        return
    if run.sync_batchnorm:
        synchronise_batchnorm(state.model)
    host, forward = host_of(run.method), state.forward
    assert isinstance(forward, nn.Module)
    # The BatchNorms of generated images rest in every second epoch.
    confusing = isinstance(host, Arpl) and host.confusing
    side = run.loader.grow_from or run.loader.size
    idle = confusing or has_idle_parameters(state.model, side)
    # Otherwise messages are laid out anew after the first step of a process, and of three or more
    # the sums depend on the layout: a run that goes on would part from one that did not stop.
    steady = state.void_steps.device.type == "cpu" and world.size > 2
    together = spread(forward, unused=idle or steady)
    state.forward, state.no_sync = together, together.no_sync
    if isinstance(state.method, BackMixMethod) and state.method.learns:
        group = run.loader.mix_group
        most = -(-(run.loader.batch // group) // world.size) * group
        state.exchange = Exchange(world, state.method.bank, most if loader.resident else 0)
        state.method.exchange = state.exchange


def has_idle_parameters(model: Model, side: int) -> bool:
    """Return whether the body of a network has trained parameters that its outputs do not heed."""
    others = [module for module in (model.head, model.rejection) if module is not None]
    apart = {id(p) for module in others for p in module.parameters()}
    body = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    if not body:
        return False
    model.eval()  # neither dropout nor another look at the BatchNorm statistics
    logits, maps = model(torch.zeros(1, 3, side, side, device=body[0].device))
    model.train()
    outputs = logits.float().sum() + maps.float().sum()
    return any(g is None for g in torch.autograd.grad(outputs, body, allow_unused=True))
