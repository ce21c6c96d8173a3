"""`--dry-run`: what a run would do and need, before it does anything; nothing is written.

All that a start would refuse is refused here, too. Data, classes, network and method are made as
the run's seed makes them, on the CPU; the loader is opened, and nothing is decoded beyond what
finding out about a foreign network's maps takes.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backmix.pipeline.beton import JPG, BetonSet, Flag, open_set
from backmix.pipeline.loader import choose, open_loader
from backmix.pipeline.options import size_at
from backmix.pipeline.subset import Subset
from backmix.train.bench_step import synthetic
from backmix.train.check import check, check_device, check_loader
from backmix.train.checkpoint import free_bytes, is_locked
from backmix.train.known import known_classes, refuse_unfit_init, training_subset
from backmix.train.methods.backmix import BackMixMethod
from backmix.train.models.fit import judge_maps
from backmix.train.optim import learning_rate
from backmix.train.options import Run
from backmix.train.prepare import begin, fitness, fresh_state, view_dtype
from backmix.train.run import remarks
from backmix.train.run_folder import (
    Config,
    Resolved,
    newest_step,
    refuse_other_data,
    refuse_other_options,
    resolve,
)
from backmix.train.state import State
from backmix.train.world import World, refuse_too_many

UNDECIDED = "fastest: timed at the start"
"""What is said of the loader where the start is to find it out."""
_SMALL = 4
"""Images of the batch whose activations are counted; half as many are subtracted."""


def dry_run(run: Run, recipe: str, command: list[str]) -> int:
    """Print what this start would do; returns the exit code.

    Of several processes that a launcher started the first one speaks; figures are each process's.

    Raises:
        ValueError, OSError: what a start would raise.
    """
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines(run, recipe, command)), flush=True)
    return 0


def lines(run: Run, recipe: str, command: list[str]) -> list[str]:
    """Return what there is to say, line by line."""
    run = replace(run, dry_run=False)
    check(run)
    _refuse_folder(run.out)
    refuse_other_options(run)
    resolved = resolve(run)
    torch.set_num_threads(resolved.threads)
    with open_set(run.data) as data:
        known = known_classes(run, data.classes)
        refuse_unfit_init(run, [data.classes[number] for number in known], data)
        subset = training_subset(run, data.labels, known, data.classes)
        check_device(run, resolved.device)
        kind = _loader(run, resolved, data, subset)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        refuse_too_many(World(size=processes), run.loader.batch, run.loader.mix_group)
        if kind != UNDECIDED:
            check_loader(run, kind, processes)
        resolved = replace(resolved, loader=kind)
        config = Config.of(run, recipe, command, resolved, data, known, len(subset))
        refuse_other_data(run, config)
        said = about_data(data, subset, len(known))
        state = fresh_state(
            run, data, subset, len(known), torch.device("cpu"), view_dtype(resolved)
        )
    said_of_weights = []
    if not newest_step(run.out):
        said_of_weights = begin(state, run).said
        said_of_weights += judge_maps(run, fitness(run, state, subset))
    document = json.dumps(asdict(config), indent=1, sort_keys=True)
    return [
        document,
        "",
        *said,
        "",
        *about_network(run, state),
        *said_of_weights,
        "",
        *about_memory(run, resolved, state, subset),
        "",
        *about_disk(run, state),
        "",
        *about_time(run, len(subset)),
        *remarks(run, len(subset)),
        "",
        _about_start(run),
    ]


def _about_start(run: Run) -> str:
    step = newest_step(run.out)
    if step:
        return f"a start would continue {run.out} at step {step:,}; nothing was written"
    return f"a start would begin {run.out}; nothing was written"


def _refuse_folder(out: Path) -> None:
    """Refuse a run folder that a start could not have."""
    there = next(at for at in (out, *out.absolute().parents) if at.exists())
    if not there.is_dir():
        raise NotADirectoryError(20, "is no folder", str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(13, "the run folder cannot be written here", str(there))
    if is_locked(out):
        raise ValueError(f"{out} is in use by another process: wait for it, or stop it")


def _loader(run: Run, resolved: Resolved, data: BetonSet, subset: Subset) -> str:
    """Return what would read the data, which is opened to see whether it can."""
    options = run.loader
    if options.loader == "fastest":
        if not resolved.loader:
            return UNDECIDED
        options = replace(options, loader=resolved.loader)  # type: ignore[arg-type]
    kind = choose(data, options, subset, device=resolved.device)
    if kind != "resident":  # which would decode everything
        chosen = replace(options, loader=kind)
        with open_loader(run.data, chosen, split="train", subset=subset, device=resolved.device):
            pass
    return kind


def about_data(data: BetonSet, subset: Subset, known: int) -> list[str]:
    """Return what is known of the data set."""
    size = sum(path.stat().st_size for path in data.paths)
    stored = np.asarray(data.byte_sizes)
    jpegs = int((np.asarray(data.modes) == JPG).sum())
    sides = np.asarray(data.sizes)
    found = [
        f"data: {data.n:,} images of {len(data.classes):,} classes in {len(data.paths)} "
        f"file{'s' if len(data.paths) > 1 else ''}, {_bytes(size)}",
        f"  trained on: {len(subset):,} images of {known:,} classes",
        f"  {jpegs:,} JPEG, {data.n - jpegs:,} raw; {_bytes(int(stored.mean()))} an image, "
        f"{int(np.median(sides[:, 0]))} x {int(np.median(sides[:, 1]))} pixels in the median",
        f"  pages: {len(np.unique(data.pages)):,} of {_bytes(data.shards[0].page_size)}",
    ]
    if data.flags is None:
        found.append("  a stock file: no checksums, what is bad shows when it is decoded")
    else:
        warned = int(((data.flags & Flag.WARNED) != 0).sum())
        found.append(f"  {warned:,} decode with a warning")
    skipped = _left_out(data)
    if skipped is not None:
        found.append(f"  {skipped:,} bad ones were left out by the conversion")
    return found


def _left_out(data: BetonSet) -> int | None:
    """Return how many images the manifest says were left out; None where there is none."""
    first = data.paths[0]
    try:
        last = Path(f"{first}.jsonl").read_text().splitlines()[-1]
        return int(json.loads(last)["total"]["skipped"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def about_network(run: Run, state: State) -> list[str]:
    """Return the network's parts with their parameters and multiplications, and its map."""
    model, size = state.model, run.loader.size
    shapes: dict[str, tuple[int, ...]] = {}
    parts = dict(model.named_children())

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])

        return hook

    hooks = [part.register_forward_hook(note(name)) for name, part in parts.items()]
    model.eval()
    counter = FlopCounterMode(display=False, depth=2)
    with torch.no_grad(), counter:
        _, features = model(torch.zeros(1, 3, size, size).to(memory_format=torch.channels_last))
    model.train()
    for hook in hooks:
        hook.remove()
    counts = counter.get_flop_counts()
    macs = {name: sum(found.values()) // 2 for name, found in counts.items()}
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = f", {trained:,} of them trained" if trained < parameters else ""
    root = type(model).__name__
    rows = [
        (
            name,
            type(part).__name__,
            f"{sum(p.numel() for p in part.parameters()):,}",
            f"{macs.get(f'{root}.{name}', 0) / 1e6:,.1f}",
            " x ".join(map(str, shapes.get(name, ()))),
        )
        for name, part in parts.items()
    ]
    table = [("part", "kind", "parameters", "million MACs", "output"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    grid = model.grid(size)
    return [
        f"network {run.model}: {len(layers)} convolutions and linear layers, {parameters:,} "
        f"parameters{frozen}, {macs['Global'] / 1e6:,.1f} million MACs for an image of {size} x "
        f"{size}",
        *(
            "  "
            + "  ".join(
                cell.rjust(width) if column in (2, 3) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ),
        f"  map of {grid[0]} x {grid[1]} cells with {features.shape[1]:,} channels",
    ]


def about_memory(run: Run, resolved: Resolved, state: State, subset: Subset) -> list[str]:
    """Return the memory that training takes, on the device and on the host."""
    size, processes = run.loader.size, int(os.environ.get("WORLD_SIZE", "1"))
    images = math.ceil(run.loader.batch / processes)
    part = math.ceil(images / run.accumulate)
    pixels = size * size * 3
    model = state.model
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    activations = activation_bytes(run, resolved, state, subset)
    resident = resolved.loader == "resident"
    views = 2 if view_dtype(resolved) == torch.bfloat16 else 4
    bank = state.method.bank.nbytes if isinstance(state.method, BackMixMethod) else 0
    method = sum(t.nbytes for t in state.method.tensors().values()) - bank
    buffers = sum(b.nbytes for b in model.buffers())
    rows = [
        ("weights and buffers", sum(p.nbytes for p in model.parameters()) + buffers),
        ("gradients", trained),
        (f"optimizer ({run.optim.kind})", optimizer_bytes(run, state)),
        ("copy of the buffers", buffers),
        ("running mean of the weights", sum(t.nbytes for t in state.ema.mean.values()))
        if state.ema is not None
        else ("", 0),
        (f"bank of {len(subset):,} maps", bank),
        ("the method's own", method),
        ("all images, decoded", len(subset) * pixels if resident else 0),
        (f"a batch of {images:,}, as bytes and as views", images * pixels * (1 + views)),
        (f"activations of {part:,} images, about", int(activations * part)),
    ]
    rows = [row for row in rows if row[1]]
    total = sum(number for _, number in rows)
    ahead = 0 if resident else (run.loader.prefetch + 1) * images * pixels
    host = [
        ("batches decoded ahead", ahead),
        ("the copy that a checkpoint is written from", checkpoint_bytes(run, state)),
    ]
    where = "GPU" if resolved.device == "cuda" else "CPU"
    each = f" of each of {processes} processes" if processes > 1 else ""
    return [
        f"memory of the {where}{each}: {_bytes(total)}, without workspaces of the libraries",
        *_rows(rows),
        f"memory of the host{each}, beside: {_bytes(sum(number for _, number in host))}, and the "
        "page cache, which the data fill as far as there is room",
        *_rows([row for row in host if row[1]]),
    ]


def optimizer_bytes(run: Run, state: State) -> int:
    """Return the bytes of the optimizer's state once every parameter has been updated."""
    trained = sum(p.nbytes for p in state.model.parameters() if p.requires_grad)
    slots = int(run.optim.momentum > 0) if run.optim.kind == "sgd" else 2
    return slots * trained


def checkpoint_bytes(run: Run, state: State) -> int:
    """Return the bytes of a checkpoint, but for its header."""
    there = sum(
        value.nbytes for slots in state.optimizer.state.values() for value in slots.values()
    )
    held = sum(tensor.nbytes for tensor in state.tensors().values())
    return held - there + optimizer_bytes(run, state)


def activation_bytes(run: Run, resolved: Resolved, state: State, subset: Subset) -> float:
    """Return about how many bytes an image's forward pass keeps for its backward pass.

    Counted on a batch of `_SMALL` images less one of half as many, so that what all images share
    does not count. Compiled, a network keeps less.
    """
    kept = [_kept_bytes(run, resolved, state, subset, n) for n in (_SMALL // 2, _SMALL)]
    return max(kept[1] - kept[0], 0) / (_SMALL - _SMALL // 2)


def _kept_bytes(run: Run, resolved: Resolved, state: State, subset: Subset, images: int) -> int:
    epoch = run.epochs - 1
    side = size_at(run.loader, epoch)
    [batch, *_] = synthetic(subset, side, images, images, torch.device("cpu"), epoch)
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    bf16 = resolved.precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        views = state.method.prepare(batch, state.method.draw(batch))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            state.method.loss(views, batch, state.model)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def about_disk(run: Run, state: State) -> list[str]:
    """Return what the run folder will hold."""
    one = checkpoint_bytes(run, state)
    most = (run.keep + 1) * one
    weights = sum(value.nbytes for value in state.model.state_dict().values())
    free = free_bytes(run.out)
    found = [
        f"disk: {_bytes(most + weights)} in {run.out}"
        + (f", where {_bytes(free)} are free" if free is not None else ""),
        *_rows(
            [
                (f"{run.keep} checkpoints and the one that is being written", most),
                ("model.safetensors", weights),
            ]
        ),
    ]
    if free is not None and free < 1.1 * (most + weights):
        found.append("  THAT IS TOO LITTLE: make room, or choose another --out")
    return found


def about_time(run: Run, samples: int) -> list[str]:
    """Return steps, and the learning rate and the views' side at some of them."""
    per_epoch = math.ceil(samples / run.loader.batch)
    total = run.epochs * per_epoch
    found = [
        f"{run.epochs:,} epochs of {per_epoch:,} steps: {total:,} steps of {run.loader.batch:,} "
        f"images, the last one of an epoch of {samples - (per_epoch - 1) * run.loader.batch:,}",
        "  step  epoch  side  learning rate",
    ]
    widths = len(f"{total:,}")
    for step in _some(total, run.optim.warmup):
        rate = learning_rate(
            run.optim.schedule,
            step,
            peak=run.optim.lr,
            steps=total,
            steps_per_epoch=per_epoch,
            warmup=run.optim.warmup,
            milestones=run.optim.milestones,
            factor=run.optim.factor,
            cycles=run.optim.cycles,
        )
        epoch = step // per_epoch
        found.append(f"  {step:>{widths},}  {epoch:5}  {size_at(run.loader, epoch):4}  {rate:.4g}")
    return found


def _some(total: int, warmup: float) -> Iterator[int]:
    """Yield some steps: the ends, the quarters, and where the warm-up is over."""
    spots = {0, int(warmup * total), total // 4, total // 2, 3 * total // 4, total - 1}
    yield from sorted(step for step in spots if step < total)


def _rows(rows: Sequence[tuple[str, int]]) -> list[str]:
    width = max((len(_bytes(number)) for _, number in rows), default=0)
    return [f"  {_bytes(number):>{width}}  {name}" for name, number in rows]


def _bytes(number: int) -> str:
    """Return a number of bytes as people read it."""
    value, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
