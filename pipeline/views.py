"""A part of a step while it is made: its samples, their pixels, and what stands in for bad ones.

Shared by the loaders that decode. A bad image in training is replaced by another sample with its
own label and box; in evaluation it is left out. Either way it is listed by name.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from backmix.pipeline.batch import Batch, HostRows
from backmix.pipeline.decode import cut, read_image
from backmix.pipeline.plan import Part, Plan
from backmix.pipeline.regions import Regions

GOOD, WARNED, REPLACED, MISSING = 0, 1, 2, 255
MOST_ATTEMPTS = 100
"""Replacements drawn for one image; so many bad ones in a row mean that the file is gone."""


@dataclass(eq=False)
class Views:
    """The images of one part, row by row as they will stand in the batch."""

    part: Part
    pixels: Tensor
    """uint8 [n, H, W, 3]."""
    index: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    sizes: np.ndarray
    status: np.ndarray
    """uint8 [n]; MISSING = left out of the batch."""
    faults: list[tuple[int, int, str]] = field(default_factory=list)
    """Row, sample number and message of every image that was found bad."""


def empty_views(plan: Plan, part: Part, *, pinned: bool = False) -> Views:
    """Return the views of a part with everything known but the pixels."""
    index = plan.subset.index[part.positions]
    size = plan.size(part.place)
    try:
        pixels = torch.empty(len(index), size, size, 3, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:
        raise ValueError(
            f"{len(index)} images of {size} x {size} pixels do not fit the memory: lower "
            "--loader.batch, --loader.size or --loader.prefetch"
        ) from error
    return Views(
        part,
        pixels,
        index,
        plan.subset.labels[part.positions],
        plan.boxes(part.place, index),
        plan.data.sizes[index],
        np.zeros(len(index), np.uint8),
    )


def fill_rows(plan: Plan, views: Views, rows: range, regions: Regions | None = None) -> None:
    """Decode some rows of the views; threads may fill different rows at the same time.

    With `regions` no more than the boxes is decoded, where that gives the same.
    """
    pixels = views.pixels.numpy()
    for row in rows:
        try:
            if regions and regions.show(int(views.index[row]), views.boxes[row], pixels[row]):
                continue
            _show(plan, views, row, pixels[row])
        except ValueError as error:
            replace_row(plan, views, row, error)


def replace_row(plan: Plan, views: Views, row: int, error: ValueError) -> None:
    """Put another sample into a row whose own is bad; in evaluation, mark it missing.

    Raises the error itself with `on_bad` error, and ValueError if no good sample can be found.
    """
    _note(views, row, error)
    if not plan.training:
        views.status[row] = MISSING
        return
    if plan.options.on_bad == "error":
        raise error
    own, pixels = int(views.part.positions[row]), views.pixels[row].numpy()
    for attempt in range(MOST_ATTEMPTS if len(plan.subset) > 1 else 0):
        position = plan.substitute(views.part.place, own, attempt)
        index = plan.subset.index[position]
        views.index[row], views.labels[row] = index, plan.subset.labels[position]
        views.sizes[row] = plan.data.sizes[index]
        views.boxes[row] = plan.boxes(views.part.place, np.array([index]))[0]
        try:
            _show(plan, views, row, pixels)
        except ValueError as another:
            _note(views, row, another)
        else:
            views.status[row] = REPLACED
            return
    raise ValueError(f"{error}; and no good sample was found to replace it")


def _show(plan: Plan, views: Views, row: int, pixels: np.ndarray) -> None:
    image, warned = read_image(plan.data, int(views.index[row]), plan.options.verify)
    cut(image, views.boxes[row], pixels)
    views.status[row] = WARNED if warned else GOOD


def _note(views: Views, row: int, error: ValueError) -> None:
    views.faults.append((row, int(views.index[row]), str(error)))


def register(plan: Plan, views: Views, bad: dict[int, str], count: int) -> int:
    """Enter the bad samples of finished views into a loader's list, in order of the rows.

    Args:
        plan: what is delivered.
        views: finished views.
        bad: name by sample number, extended.
        count: images replaced in this epoch before these views.

    Returns the count after them. Raises ValueError when it passes the limit in training.
    """
    views.faults.sort(key=lambda fault: fault[0])
    for _, index, _ in views.faults:
        bad.setdefault(index, plan.data.name(index))
    count += int((views.status == REPLACED).sum())
    # A rank sees its own share of the epoch only, so it allows its share of the bad ones.
    limit = max(1, plan.most_bad // plan.world)
    if plan.training and count > limit:
        raise ValueError(too_many_bad(plan, count, limit, views.faults[-1][2]))
    return count


def too_many_bad(plan: Plan, count: int, limit: int, last: str) -> str:
    """Say that an epoch has more bad images than allowed, and which was the last."""
    where = f" in the share of rank {plan.rank} of {plan.world}" if plan.world > 1 else ""
    return (
        f"{count} images of this epoch are bad, {limit} of {len(plan.subset)} are allowed{where} "
        f"(max_bad {plan.options.max_bad:g}); the last: {last}"
    )


def as_batch(plan: Plan, views: Views, device: torch.device) -> Batch:
    """Return finished views as a batch on the device, without the missing rows."""
    pixels = views.pixels
    kept = np.flatnonzero(views.status != MISSING)
    if len(kept) < len(views.status):
        pixels = pixels[torch.from_numpy(kept)]
    index = to_device(views.index[kept], device)
    return Batch(
        # A pinned source is not written again before its copy has ended: torch's allocator of
        # pinned memory waits for the stream.
        pool=pixels.to(device, non_blocking=True),
        pool_index=index,
        rows=torch.arange(len(kept), device=device),
        index=index,
        labels=to_device(views.labels[kept], device),
        boxes=to_device(views.boxes[kept], device),
        sizes=to_device(views.sizes[kept], device),
        status=to_device(views.status[kept], device),
        group=plan.options.mix_group,
        place=views.part.place,
        host=HostRows(views.index[kept], np.arange(len(kept))),
    )


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Return a small array on the device, without waiting for it."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
