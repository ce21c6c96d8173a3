"""What the kernels are compared with, each in the best form we could write it.

Plain functions of tensors; `cases.py` checks them against the kernels' meanings before anybody is
timed. Those that torch.compile gets are written for it: indices stay vectors along one side until
the last expression, images are gathered once, and memory is channels-last.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backmix.kernels.mix_background import view_heat

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Turns a function into a compiled one."""

# --- mix_background ----------------------------------------------------------------------------


def hottest_cells(heat: Tensor, count: int) -> Tensor:
    """Return the `count` hottest cells of each map, bool [n, g, g'], for distinct values.

    Counts the hotter cells of each cell: a reduction that a compiler fuses, where a sort is a call
    to a library.
    """
    value = heat.flatten(1).float()
    hotter = (value[:, None, :] > value[:, :, None]).sum(2, dtype=torch.int32)
    return (hotter < count).view_as(heat)


def mix_plan(
    target: Tensor,
    donor: Tensor,
    bank: Tensor,
    bank_row: Tensor,
    box: Tensor,
    patch: Tensor,
    flip: Tensor,
    shift: Tensor | None,
    *,
    side: int,
    mask_cells: int,
) -> tuple[Tensor, ...]:
    """Return for each line and column of the output what it shows: the small part of a mix.

    Returns:
        line, donor_line: lines of the pool as one tall image, int32 [n, H], clamped.
        column, donor_column: int32 [n, W], clamped.
        in_row, in_column: whether the patch has them, bool [n, H], [n, W].
        hot: whether a line of the patch has masked cells: their columns as bits, int32 [n, H].
        cell_column: the bit of each column, int32 [n, W].
        no_row, no_column: whether the view has none, bool [n, H], [n, W].
    """
    grid_rows, grid_columns = bank.shape[1:]
    masked = hottest_cells(view_heat(bank, bank_row, box), mask_cells)
    bits = torch.arange(grid_columns, device=bank.device, dtype=torch.int32)
    words = (masked.int() << bits).sum(2, dtype=torch.int32)  # [n, g]

    along = torch.arange(side, device=bank.device, dtype=torch.int32)[None]
    yv, xf = along, along
    if shift is not None:
        yv, xf = yv + shift[:, :1], xf + shift[:, 1:]
    xv = torch.where(flip[:, None], side - 1 - xf, xf)
    ty, tx, dy, dx, height, width = patch[:, :, None].unbind(1)
    down, right = yv - ty, xv - tx
    yd, xd = (dy + down).clamp(0, side - 1), (dx + right).clamp(0, side - 1)
    n = len(target)
    last = side - 1
    return (
        (target.int() * side)[:, None] + yv.clamp(0, last),
        (donor.int() * side)[:, None] + yd,
        xv.clamp(0, last),
        xd,
        (down >= 0) & (down < height),
        (right >= 0) & (right < width),
        words.gather(1, (yd * grid_rows // side).long()),
        xd * grid_columns // side,
        ((yv < 0) | (yv > last)).expand(n, side),
        ((xv < 0) | (xv > last)).expand(n, side),
    )


def mix_pixels(
    pool: Tensor,
    plan: tuple[Tensor, ...],
    mean: Tensor,
    inverse: Tensor,
    pad: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the mixed batch from its plan: one gather, one expression, one output.

    Args:
        mean, inverse: fp32 [3]; inverse = 1 / std. The fill is the mean, 0 after normalising.
        pad: normalised colour outside the view, fp32 [3]; None = there is no outside.
    """
    line, donor_line, column, donor_column, in_row, in_column, hot, cell, no_row, no_column = plan
    side = column.shape[1]
    inside = in_row[:, :, None] & in_column[:, None, :]
    masked = inside & (((hot[:, :, None] >> cell[:, None, :]) & 1) != 0)
    # int32 is enough for the bench's pools: 50,000 x 32 x 32 pixels.
    row = torch.where(inside, donor_line[:, :, None], line[:, :, None])
    pixel = row * side + torch.where(inside, donor_column[:, None, :], column[:, None, :])
    value = (pool.view(-1, 3)[pixel].float() - mean) * inverse
    value = torch.where(masked[..., None], 0.0, value)
    if pad is not None:
        value = torch.where((no_row[:, :, None] | no_column[:, None, :])[..., None], pad, value)
    return value.to(dtype).permute(0, 3, 1, 2)


def mix_in_one_graph(wrap: Wrap) -> Callable[..., Tensor]:
    """Return a mix that the compiler sees whole: it may compute the plan anew for each pixel."""

    def mix(draws: tuple[Any, ...], options: dict[str, Any], *pixels: Any) -> Tensor:
        pool, *rest = pixels
        return mix_pixels(pool, mix_plan(*draws, **options), *rest)

    return wrap(mix)


def mix_in_two_graphs(wrap: Wrap) -> Callable[..., Tensor]:
    """Return a mix whose plan is stored first: short vectors to read instead of arithmetic."""
    plan, paste = wrap(mix_plan), wrap(mix_pixels)

    def mix(draws: tuple[Any, ...], options: dict[str, Any], *pixels: Any) -> Tensor:
        pool, *rest = pixels
        return paste(pool, plan(*draws, **options), *rest)

    return mix


def mix_with_torchvision(
    pool: Tensor,
    target: Tensor,
    donor: Tensor,
    bank: Tensor,
    bank_row: Tensor,
    patch: Tensor,
    flip: Tensor,
    shift: Tensor | None,
    mean: list[float],
    std: list[float],
    mask_cells: int,
    dtype: torch.dtype,
) -> Tensor:
    """Mix step by step with torchvision v2's functions, on the device, for whole images as boxes.

    Its own CutMix draws one box for a whole batch and pastes from the same place, so pasting is
    indexing here; pixels stay uint8 as long as they can.
    """
    steps = _torchvision_steps()
    n, side = len(target), pool.shape[1]
    along = torch.arange(side, device=pool.device)[None]
    ty, tx, dy, dx, height, width = patch.long()[:, :, None].unbind(1)
    in_row = (along >= ty) & (along < ty + height)
    in_column = (along >= tx) & (along < tx + width)
    inside = (in_row[:, :, None] & in_column[:, None, :])[:, None]
    yd = (along - ty + dy).clamp(0, side - 1)[:, :, None]
    xd = (along - tx + dx).clamp(0, side - 1)[:, None, :]

    heat = bank[bank_row].float()
    least = heat.flatten(1).topk(mask_cells).values[:, -1]
    hot = F.interpolate((heat >= least[:, None, None]).float()[:, None], (side, side)) > 0
    sample = torch.arange(n, device=pool.device)[:, None, None]
    hot = inside & hot[:, 0][sample, yd, xd][:, None]

    pasted = pool[donor[:, None, None], yd, xd].permute(0, 3, 1, 2)
    images = torch.where(inside, pasted, pool[target].permute(0, 3, 1, 2))
    images = torch.where(flip[:, None, None, None], steps.horizontal_flip(images), images)
    hot = torch.where(flip[:, None, None, None], steps.horizontal_flip(hot), hot)
    if shift is not None:  # pad all, then crop each
        margin = 4
        y = (along + shift[:, :1] + margin)[:, :, None]
        x = (along + shift[:, 1:] + margin)[:, None, :]
        images = steps.pad(images, [margin]).permute(0, 2, 3, 1)[sample, y, x].permute(0, 3, 1, 2)
        hot = steps.pad(hot, [margin])[:, 0][sample, y, x][:, None]
    images = steps.to_dtype(images, torch.float32, scale=True)
    images = steps.normalize(images, [m / 255 for m in mean], [s / 255 for s in std])
    images = images.masked_fill_(hot, 0.0)
    return images.to(dtype, memory_format=torch.channels_last)


def _torchvision_steps() -> Any:
    """Return torchvision's v2 functions.

    Raises:
        ImportError: it is not installed, or made for another torch.
    """
    try:
        from torchvision.transforms.v2 import functional
    except RuntimeError as error:
        raise ImportError(f"torchvision does not load here: {error}") from error
    return functional


def kornia_steps(
    mean: list[float], std: list[float], device: torch.device
) -> Callable[[Tensor, Tensor, torch.dtype], Tensor]:
    """Return flip, CutMix and normalisation as kornia's users write it: its own draws, no mask."""
    from kornia.augmentation import (  # pyright: ignore[reportMissingImports]
        Normalize,
        RandomCutMixV2,
        RandomHorizontalFlip,
    )

    flip, cutmix = RandomHorizontalFlip(p=0.5), RandomCutMixV2(p=1.0, data_keys=["input"])
    normalise = Normalize(
        torch.tensor([m / 255 for m in mean], device=device),
        torch.tensor([s / 255 for s in std], device=device),
    )

    def steps(pool: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
        images = pool[target].permute(0, 3, 1, 2).contiguous().float() / 255
        mixed = cutmix(flip(images))
        mixed = mixed[0] if isinstance(mixed, list | tuple) else mixed
        return normalise(mixed).to(dtype, memory_format=torch.channels_last)

    return steps


def timm_prefetch(pool: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise a batch as timm's prefetcher does: three passes, no mixing, in the output's type.

    Args:
        mean, std: [1, 3, 1, 1] of the output's dtype.
    """
    return pool.permute(0, 3, 1, 2).to(mean.dtype).sub_(mean).div_(std)


def gather_normalise(pool: Tensor, target: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """Gather and normalise with the lines that most loops have; no mask, paste, flip or shift."""
    x = pool[target].permute(0, 3, 1, 2).float()
    return x.sub_(mean[:, None, None]).mul_(inverse[:, None, None])


def gather_normalise_lines(
    pool: Tensor, target: Tensor, mean_line: Tensor, inverse_line: Tensor
) -> Tensor:
    """Do the same the fastest way found on a CPU: whole lines instead of steps of three."""
    n, side = len(target), pool.shape[1]
    x = pool.index_select(0, target).view(n * side, 3 * side).float()
    return x.sub_(mean_line).mul_(inverse_line).view(n, side, side, 3).permute(0, 3, 1, 2)


# --- update_cam_bank ---------------------------------------------------------------------------


def bank_rows_after(
    bank: Tensor,
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bank_row: Tensor,
    box: Tensor,
    flip: Tensor,
    rate: float,
) -> Tensor:
    """Return the new bank rows, fp16 [n, g, g']: the update without writing, for the compiler.

    Left to it, the write may copy the whole bank; the caller writes the rows instead. For rows that
    are all written, without shift and patch.
    """
    own = weight.index_select(0, labels).float()
    value = (own[:, :, None, None] * features.float()).sum(1)
    least, greatest = value.amin((1, 2), keepdim=True), value.amax((1, 2), keepdim=True)
    span = greatest - least
    flat = span <= 1e-6 * greatest.abs().clamp(min=1e-12)
    value = torch.where(flat, 0.5, (value - least) / torch.where(flat, 1.0, span))
    value = torch.where(span.isfinite(), value, torch.nan)

    rows, columns = bank.shape[1:]
    row, row_seen = _seen(box[:, 0, None], box[:, 2, None], rows, None)
    column, column_seen = _seen(box[:, 1, None], box[:, 3, None], columns, flip[:, None])
    seen = row_seen[:, :, None] & column_seen[:, None, :]
    sample = torch.arange(len(box), device=box.device)[:, None, None]
    value = value[sample, row[:, :, None], column[:, None, :]]
    stored = bank[bank_row]
    old = stored.float()
    new = (old + rate * (value - old)).to(bank.dtype)
    return torch.where(seen & new.isfinite(), new, stored)


def _seen(start: Tensor, length: Tensor, cells: int, flip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the view cell under each stored cell's centre along a side, and whether it is seen."""
    centre = (2 * torch.arange(cells, device=start.device, dtype=torch.int32) + 1) * 32768
    centre = centre - cells * start
    seen = (centre >= 0) & (centre < cells * length)
    if flip is not None:
        centre = torch.where(flip, cells * length - 1 - centre, centre)
    return (centre.clamp(min=0) // length).clamp(max=cells - 1), seen


def bank_for_whole_images(
    bank: Tensor, features: Tensor, weight: Tensor, labels: Tensor, row: Tensor, rate: float
) -> None:
    """Update the bank for boxes that are whole images: no boxes, nothing checked."""
    maps = torch.einsum("nc,ncij->nij", weight[labels], features)
    maps = maps - maps.amin((1, 2), keepdim=True)
    maps = maps / maps.amax((1, 2), keepdim=True)
    bank[row] = bank[row].float().lerp(maps.float(), rate).to(bank.dtype)


# --- location_confidence -----------------------------------------------------------------------


def softmax_of_logits(
    rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return p(true) and p(max) as most would write it: logits, softmax, two reads.

    Args:
        rows: [n, C]; labels: int64 [n], all known.
    """
    probability = F.linear(rows, weight, bias).float().softmax(1)
    return probability.gather(1, labels[:, None])[:, 0], probability.amax(1)


def rows_of_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return p(true) and p(max) of stored logits, [n, K], with nothing stored between."""
    logits = logits.float()
    greatest = logits.amax(1)
    total = (logits - greatest[:, None]).exp().sum(1)
    true = logits.gather(1, labels[:, None])[:, 0]
    return (true - greatest).exp() / total, 1 / total


def product_then_rows(wrap: Wrap) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the library's product with compiled rows behind it."""
    rows = wrap(rows_of_logits)

    def confidence(
        x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        return rows(F.linear(x, weight, bias), labels)

    return confidence


def product_and_rows(wrap: Wrap) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return both as one graph: the compiler may choose a product of its own."""

    def confidence(
        x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        return rows_of_logits(F.linear(x, weight, bias), labels)

    return wrap(confidence)


# --- class_reconstruction ----------------------------------------------------------------------


def reconstruct_class_by_class(x: Tensor, encoder: Tensor, decoder: Tensor) -> Tensor:
    """Return the errors as CSSR's code does: a Python loop over classes, then stacked."""
    errors = []
    for a, b in zip(encoder, decoder, strict=True):
        reconstruction = torch.tanh(x @ a.T) @ b
        errors.append((reconstruction - x).abs().float().sum(1))
    return torch.stack(errors, 1)


def reconstruct_chunk(x: Tensor, encoder: Tensor, decoder: Tensor) -> Tensor:
    """Return the errors of a few classes at once, fp32 [n, k]: two products, [k, n, C] stored."""
    k, latent, channels = encoder.shape
    z = torch.tanh(x @ encoder.reshape(k * latent, channels).T)
    z = z.view(-1, k, latent).transpose(0, 1)  # [k, n, L]
    reconstruction = torch.bmm(z, decoder)  # [k, n, C]
    return (reconstruction.float() - x.float()).abs().sum(2).T


def in_chunks(chunk: Callable[..., Tensor], classes: int) -> Callable[..., Tensor]:
    """Return a function of x, encoder, decoder that takes `classes` classes at a time."""

    def reconstruct(x: Tensor, encoder: Tensor, decoder: Tensor) -> Tensor:
        pairs = zip(encoder.split(classes), decoder.split(classes), strict=True)
        return torch.cat([chunk(x, a, b) for a, b in pairs], 1)

    return reconstruct
