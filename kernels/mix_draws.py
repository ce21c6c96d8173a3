"""mix_draws: the draws of `mix_background` made on the device that will use them.

The host draws the same integers (`pipeline/draws.py: mix_draws`) and copies them over. This kernel
makes that copy unnecessary; the bench stage `draws` compares the two, and training uses the host's.
One image per lane, six blocks of the generator each; 16 bytes read and 45 written per image, so
nothing but the launch costs. There is no plain PyTorch form: the host's is the meaning.
"""

import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from backmix.kernels import configs, dispatch, philox
from backmix.kernels.launch import Launch, ceil_div

# The numbers of `pipeline.draws.STREAMS`, which needs no torch and so is not imported from here.
FLIP = tl.constexpr(2)
SHIFT = tl.constexpr(3)
DONOR = tl.constexpr(4)
PATCH = tl.constexpr(5)
TIE = tl.constexpr(6)
APPLY = tl.constexpr(7)


class DeviceDraws(NamedTuple):
    """The draws of `mix_background` for the n images of a batch, on their device."""

    flip: Tensor
    """bool [n]."""
    shift: Tensor | None
    """int32 [n, 2]: sy, sx in -pad .. pad; None without pad."""
    donor: Tensor
    """int64 [n]: pool row; the image's own row where there is nobody else."""
    patch: Tensor
    """int32 [n, 6]: ty, tx, dy, dx, ph, pw; zeros where nothing is pasted."""
    tie: Tensor
    """int32 [n]: one random word per image."""


@triton.jit(do_not_specialize=["seed", "epoch", "n", "pool_rows", "applied"])
def _mix_draws_kernel(
    flip_ptr,  # bool [n], out
    shift_ptr,  # int32 [n, 2], out, or None
    donor_ptr,  # int64 [n], out
    patch_ptr,  # int32 [n, 6], out
    tie_ptr,  # int32 [n], out
    index_ptr,  # int64 [n]
    rows_ptr,  # int64 [n]
    seed,  # philox.signed(seed, 64)
    epoch,  # philox.signed(epoch, 32)
    n,
    pool_rows,
    applied,  # a patch is pasted where 24 random bits are below this, 0 .. 2^24
    GROUP: tl.constexpr,  # images of a mix group; 0 = the whole pool
    HEIGHT: tl.constexpr,  # of the view
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,  # of the patch
    INSIDE: tl.constexpr,  # whether patches lie whole in the view
    FLIPS: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,  # images of a program
):
    image = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = image < n
    index = tl.load(index_ptr + image, mask=live, other=0)
    row = tl.load(rows_ptr + image, mask=live, other=0)

    if FLIPS:
        words = philox.block_in_kernel(seed, epoch, index, FLIP, 0)
        flip = (words[0] >> 31) == 1
    else:
        flip = image < 0
    tl.store(flip_ptr + image, flip, mask=live)
    if PAD > 0:
        words = philox.block_in_kernel(seed, epoch, index, SHIFT, 0)
        at = shift_ptr + 2 * image
        tl.store(at, philox.below_in_kernel(words[0], 2 * PAD + 1) - PAD, mask=live)
        tl.store(at + 1, philox.below_in_kernel(words[1], 2 * PAD + 1) - PAD, mask=live)
    words = philox.block_in_kernel(seed, epoch, index, TIE, 0)
    tl.store(tie_ptr + image, words[0].to(tl.int32, bitcast=True), mask=live)

    # Candidates are numbered cyclically from the image's own place, so that one draw below the
    # number of the others never meets the image itself.
    words = philox.block_in_kernel(seed, epoch, index, DONOR, 0)
    if GROUP > 0:
        first = image // GROUP * GROUP
        count = tl.minimum(first + GROUP, n) - first
        step = philox.below_in_kernel(words[0], tl.maximum(count - 1, 0)) + 1
        place = first + (image - first + step) % tl.maximum(count, 1)
        donor = tl.load(rows_ptr + place, mask=live, other=0)
        found = count > 1
    else:
        step = philox.below_in_kernel(words[0], pool_rows - 1) + 1
        donor = (row + step) % pool_rows
        found = (tl.zeros_like(image) + pool_rows) > 1
    tl.store(donor_ptr + image, tl.where(found, donor, row), mask=live)

    words = philox.block_in_kernel(seed, epoch, index, APPLY, 0)
    pasted = found & ((words[0] >> 8).to(tl.int32) < applied)
    words = philox.block_in_kernel(seed, epoch, index, PATCH, 0)
    _store_patch(patch_ptr + 6 * image, words[0], words[2], live, pasted, HEIGHT, SIDE, INSIDE)
    _store_patch(patch_ptr + 6 * image + 1, words[1], words[3], live, pasted, WIDTH, SIDE, INSIDE)


@triton.jit
def _store_patch(
    patch_ptr,  # int32 [n], every sixth
    target,  # uint32 [n], random words
    donor,
    live,
    pasted,
    LENGTH: tl.constexpr,
    SIDE: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """Store where the patch starts in the target and in the donor, and its extent; of one axis."""
    if INSIDE:
        start = philox.below_in_kernel(target, LENGTH - SIDE + 1)
        extent = tl.zeros_like(start) + SIDE
    else:
        whole = philox.below_in_kernel(target, LENGTH) - SIDE // 2
        start = tl.maximum(whole, 0)
        extent = tl.minimum(whole + SIDE, LENGTH) - start
    tl.store(patch_ptr, tl.where(pasted, start, 0), mask=live)
    corner = philox.below_in_kernel(donor, LENGTH - extent + 1)
    tl.store(patch_ptr + 2, tl.where(pasted, corner, 0), mask=live)
    tl.store(patch_ptr + 4, tl.where(pasted, extent, 0), mask=live)


def launch(
    out: DeviceDraws,
    seed: int,
    epoch: int,
    index: Tensor,
    *,
    rows: Tensor,
    pool_rows: int,
    group: int,
    size: tuple[int, int],
    patch: int,
    position: str,
    probability: float,
    flip: bool,
    pad: int,
    block: int | None = None,
) -> Launch:
    """Return the launch that fills `out`; the other arguments are those of the door."""
    block = block or configs.MIX_DRAWS.images
    return Launch(
        _mix_draws_kernel,
        (ceil_div(len(index), block),),
        {
            "flip_ptr": out.flip,
            "shift_ptr": out.shift,
            "donor_ptr": out.donor,
            "patch_ptr": out.patch,
            "tie_ptr": out.tie,
            "index_ptr": index,
            "rows_ptr": rows,
            "seed": philox.signed(seed, 64),
            "epoch": philox.signed(epoch, 32),
            "n": len(index),
            "pool_rows": pool_rows,
            # x * 2^-24 < probability, in integers; the product is exact in a double.
            "applied": math.ceil(probability * 2**24),
        },
        {
            "GROUP": group,
            "HEIGHT": size[0],
            "WIDTH": size[1],
            "SIDE": patch,
            "INSIDE": position == "inside",
            "FLIPS": flip,
            "PAD": pad,
            "BLOCK": block,
        },
        warps=configs.MIX_DRAWS.warps,
    )


def empty(n: int, pad: int, device: torch.device | str) -> DeviceDraws:
    """Return room for the draws of n images."""

    def room(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return DeviceDraws(
        flip=room(torch.bool, n),
        shift=room(torch.int32, n, 2) if pad else None,
        donor=room(torch.int64, n),
        patch=room(torch.int32, n, 6),
        tie=room(torch.int32, n),
    )


def mix_draws_on_device(
    seed: int,
    epoch: int,
    index: Tensor,
    *,
    rows: Tensor,
    pool_rows: int,
    group: int,
    size: tuple[int, int],
    patch: int,
    position: Literal["inside", "clipped"] = "inside",
    probability: float = 1.0,
    flip: bool = True,
    pad: int = 0,
) -> DeviceDraws:
    """Draw flip, shift, donor, patch and tie word of every image of a batch, on its device.

    The integers of `pipeline.draws.mix_draws` with donors of any class; its arguments, too. Never
    waits for the device.

    Args:
        seed: 0 .. 2^64 - 1.
        epoch: 0 .. 2^32 - 1.
        index: sample numbers, int64 [n], 0 .. 2^56 - 1.
        rows: pool row of each image, int64 [n].
        pool_rows: rows of the pool.
        group: images per mix group; 0 = donors are all rows of the pool.
        size: H, W of the view [pixels].
        patch: side of the patch [pixels], at most the shorter side of the view.
        position: inside: whole in the view; clipped: around a uniform centre, cut off.
        probability: share of the images that get a patch.
        flip: whether to flip half of the images.
        pad: largest shift [pixels].

    Raises:
        TypeError: index or rows are not int64.
        ValueError: another shape or device, an option out of range, no GPU.
    """
    dispatch.expect_tensors(index=index)
    dispatch.expect("index", index, (torch.int64,), ("n",), index.device)
    dispatch.expect("rows", rows, (torch.int64,), index.shape, index.device)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in 0 .. 2^64 - 1, got {seed}")
    if not 0 <= epoch < 1 << 32:
        raise ValueError(f"epoch must be in 0 .. 2^32 - 1, got {epoch}")
    if group < 0 or pad < 0:
        raise ValueError(f"group and pad must be 0 or more, got {group} and {pad}")
    if not 1 <= patch <= min(size):
        raise ValueError(f"patch must be in 1 .. {min(size)} (the view), got {patch}")
    if position not in ("inside", "clipped"):
        raise ValueError(f"position must be inside or clipped, got {position!r}")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in 0 .. 1, got {probability}")
    dispatch.choose("triton", "mix_draws", index.device)
    out = empty(len(index), pad, index.device)
    if len(index):
        launch(
            out,
            seed,
            epoch,
            index.contiguous(),
            rows=rows.contiguous(),
            pool_rows=pool_rows,
            group=group,
            size=size,
            patch=patch,
            position=position,
            probability=probability,
            flip=flip,
            pad=pad,
        ).run()
    return out
