"""class_reconstruction: how badly each class's auto-encoder rebuilds a feature, never stored whole.

CSSR classifies by the L1 error of one small auto-encoder per class (Huang et al., "Class-specific
semantic reconstruction for open set recognition", TPAMI 2023): error[n, k] is the sum over channels
of |reconstruction - x|. The reconstructions are [n, K, C], 25.7 GB at 12,544 features, 1,000
classes and 512 channels, of which only that sum is wanted. So the latents are one ordinary matrix
product for many classes at once, and a kernel multiplies 128 of them with a class's decoder, takes
the absolute differences while they are in registers and adds them up. Backward makes the
differences again, because only their signs s are wanted: with t the latents of a class, B its
decoder and g the gradient of its error,

    d decoder = t' (g s)    d latents = g (s B') (1 - t^2)    d x has -sum over classes of g s

each in a kernel that sums in registers in an order that never changes. The latents are rounded to
the dtype of x before either direction reads them, so both see the same differences.

Operations: 4 n K C L forward and 8 n K C L backward that count; 6 n K C L more are done to make
differences again, and 2 more where the latents were not kept. Beside each product, per feature,
class and channel: 2 fp32 additions forward, 8 fp32 instructions backward. Floor: operations /
matrix rate, or these instructions / issue rate if that is more, as for the differences at 16
latents.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from backmix.kernels import configs, dispatch
from backmix.kernels.launch import Launch, ceil_div

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_LATENTS = 64
_KEPT_BYTES = 512 * 2**20
"""Latents up to this size are kept for backward; larger ones are made again."""
_CHUNK_BYTES = 128 * 2**20
"""Of latents, and of their gradients, of the classes that are worked on at a time."""
_MEANING_ELEMENTS = 2**25
"""Of the reconstructions that the plain form holds at a time."""


# --- meaning -----------------------------------------------------------------------------------


def class_reconstruction_meaning(x: Tensor, encoder: Tensor, decoder: Tensor) -> Tensor:
    """Return the errors, fp32 [n, K]: the specification in plain PyTorch, and the CPU's form.

    Products are in the dtype of the arguments, which must be one; the errors of float64 arguments
    are float64. All classes at once would need [n, K, C], so they are taken in chunks, and with
    more than one chunk each is computed again in backward.
    """
    at_once = max(1, _MEANING_ELEMENTS // max(1, x.numel()))
    if at_once >= len(encoder):
        return _errors(x, encoder, decoder)
    errors = []
    for some in zip(encoder.split(at_once), decoder.split(at_once), strict=True):
        if torch.is_grad_enabled():
            made = checkpoint(_errors, x, *some, use_reentrant=False, preserve_rng_state=False)
            errors.append(made)
        else:
            errors.append(_errors(x, *some))
    return torch.cat(errors, 1)


def _errors(x: Tensor, encoder: Tensor, decoder: Tensor) -> Tensor:
    """Return the errors of a few classes; holds [K, n, C]."""
    latents = (x @ encoder.flatten(0, 1).T).tanh().unflatten(1, encoder.shape[:2])  # [n, K, L]
    rebuilt = latents.transpose(0, 1) @ decoder  # [K, n, C]
    wide = torch.promote_types(x.dtype, torch.float32)
    return (rebuilt.to(wide) - x.to(wide)).abs().sum(2).T


# --- kernels -----------------------------------------------------------------------------------
#
# Every length but the number of classes is padded with zeros to whole blocks before a kernel sees
# it, so none masks a load. Padding changes nothing: latents of zeros are 0, the difference in a
# channel of zeros is 0, and so is its sign.


@triton.jit
def _error_kernel(
    error_ptr,  # fp32 [classes, n]
    x_ptr,  # [n, channels]
    latent_ptr,  # [n, classes * L], rows latent_row apart
    decoder_ptr,  # [classes, L, channels]
    n,
    channels,
    classes,
    latent_row,
    group,  # classes of a program
    L: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add up |latents @ decoder - x| over the channels, for a block of rows and some classes.

    x stays in registers while the classes pass, so that its bytes are read once per program; the
    price is that the sum of a class waits in memory from one block of channels to the next.
    """
    row = tl.arange(0, ROWS)
    unit = tl.arange(0, L)
    channel = tl.arange(0, CHANNELS)
    # 64-bit: rows times a row's length passes 2^31. Inside a block 32 bits are enough.
    first_row = (tl.program_id(0) * ROWS).to(tl.int64)
    x_ptr += first_row * channels
    latent_ptr += first_row * latent_row
    error_ptr += first_row
    decoder_size = channels.to(tl.int64) * L
    error_size = n.to(tl.int64)
    first = tl.program_id(1) * group
    last = tl.minimum(first + group, classes)
    for start in range(0, channels, CHANNELS):
        x = tl.load(x_ptr + start + (row[:, None] * channels + channel[None, :])).to(tl.float32)
        for class_ in range(first, last):
            latent = tl.load(latent_ptr + class_ * L + (row[:, None] * latent_row + unit[None, :]))
            decoder = tl.load(
                decoder_ptr
                + (class_ * decoder_size + start)
                + (unit[:, None] * channels + channel[None, :])
            )
            error = error_ptr + class_ * error_size + row
            # Asked for before the product, used after it.
            before = tl.load(error, mask=(row >= 0) & (start > 0), other=0)
            difference = tl.dot(latent, decoder, input_precision="ieee") - x
            tl.store(error, before + tl.sum(tl.abs(difference), 1))
        # The next block of channels reads these sums, perhaps in other threads.
        tl.debug_barrier()


@triton.jit
def _sign(difference, LIMIT: tl.constexpr):
    """Return the sign of each difference times LIMIT; differences below 2^-40 (1e-12) count less.

    bf16 holds 2^-40, so that one instruction does it; fp16 does not, and takes two.
    """
    if LIMIT == 1:
        return tl.clamp(difference * 1099511627776.0, -1.0, 1.0)
    return tl.clamp(difference, -LIMIT, LIMIT)


@triton.jit
def _sign_sum_kernel(
    sum_ptr,  # fp32 [groups of classes, n, channels]
    x_ptr,  # [n, channels]
    latent_ptr,  # [n, classes * L], rows latent_row apart
    decoder_ptr,  # [classes, L, channels]
    gradient_ptr,  # fp32 [classes, n], of the errors
    n,
    channels,
    classes,
    latent_row,
    group,  # classes of a program
    L: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Add up gradient * sign(latents @ decoder - x) over some classes, for a tile of x."""
    row = tl.arange(0, ROWS)
    unit = tl.arange(0, L)
    channel = tl.arange(0, CHANNELS)
    first_row = (tl.program_id(0) * ROWS).to(tl.int64)
    first_channel = tl.program_id(2) * CHANNELS
    tile = row[:, None] * channels + channel[None, :]
    latent_ptr += first_row * latent_row
    gradient_ptr += first_row
    decoder_ptr += first_channel
    decoder_size = channels.to(tl.int64) * L
    gradient_size = n.to(tl.int64)
    x = tl.load(x_ptr + first_row * channels + first_channel + tile).to(tl.float32)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    first = tl.program_id(1) * group
    for class_ in range(first, tl.minimum(first + group, classes)):
        latent = tl.load(latent_ptr + class_ * L + (row[:, None] * latent_row + unit[None, :]))
        decoder = tl.load(
            decoder_ptr + class_ * decoder_size + (unit[:, None] * channels + channel[None, :])
        )
        gradient = tl.load(gradient_ptr + class_ * gradient_size + row)
        difference = tl.dot(latent, decoder, input_precision="ieee") - x
        total += _sign(difference, LIMIT) * (gradient * (1 / LIMIT))[:, None]
    first_row += tl.program_id(1) * gradient_size
    tl.store(sum_ptr + first_row * channels + first_channel + tile, total)


@triton.jit
def _factor_kernel(
    out_ptr,  # gradient of the fixed factor, parts out_part apart
    x_ptr,  # [i, j], rows x_row apart
    fixed_ptr,  # [classes, i, L] by the strides fixed_*
    moving_ptr,  # [classes, j, L] by the strides moving_*
    gradient_ptr,  # fp32 [classes, n], of the errors
    n,
    moving_length,  # of j
    classes,
    share,  # of j, of a program
    x_row,
    fixed_class,
    fixed_row,
    fixed_unit,
    moving_class,
    moving_row,
    moving_unit,
    out_part,
    out_class,
    out_row,
    out_unit,
    L: tl.constexpr,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    GROUP: tl.constexpr,
    OF_DECODER: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Write the gradient of one factor of the product latents @ decoder, for GROUP classes.

    differences[i, j] = sum over units of fixed[i, unit] * moving[j, unit] - x[i, j], and the
    gradient of `fixed` is signs @ moving. The decoder's: i are channels, j rows, x is transposed,
    and the gradient of a row's error is multiplied into the row's latents. The latents': i are
    rows, j channels, and that gradient and the slope of tanh are multiplied into the result. The
    classes of a group share each tile of x: at 16 latents those are most of the bytes.
    """
    i = tl.arange(0, FIXED)
    j = tl.arange(0, MOVING)
    unit = tl.arange(0, L)
    first_i = (tl.program_id(1) * FIXED).to(tl.int64)
    # Classes that do not exist repeat the last one, and are not stored.
    k0 = tl.program_id(0).to(tl.int64) * GROUP
    k1 = tl.minimum(k0 + 1, classes - 1)
    k2 = tl.minimum(k0 + 2, classes - 1)
    k3 = tl.minimum(k0 + 3, classes - 1)
    fixed_ptr += first_i * fixed_row
    fixed = i[:, None] * fixed_row + unit[None, :] * fixed_unit
    f0 = tl.load(fixed_ptr + k0 * fixed_class + fixed)
    t0 = tl.zeros([FIXED, L], tl.float32)
    f1, f2, f3, t1, t2, t3 = f0, f0, f0, t0, t0, t0
    if GROUP > 1:
        f1 = tl.load(fixed_ptr + k1 * fixed_class + fixed)
    if GROUP > 2:
        f2 = tl.load(fixed_ptr + k2 * fixed_class + fixed)
        f3 = tl.load(fixed_ptr + k3 * fixed_class + fixed)

    x_ptr += first_i * x_row
    tile = i[:, None] * x_row + j[None, :]
    moving = j[:, None] * moving_row + unit[None, :] * moving_unit
    wide_row = tl.full([], 1, tl.int64) * moving_row
    first_j = tl.program_id(2) * share
    for start in range(first_j, tl.minimum(first_j + share, moving_length), MOVING):
        x = tl.load(x_ptr + start + tile).to(tl.float32)
        here = moving_ptr + start * wide_row
        weight = gradient_ptr + start + j
        t0 = _add(t0, x, f0, here + k0 * moving_class + moving, weight + k0 * n, OF_DECODER, LIMIT)
        if GROUP > 1:
            there = here + k1 * moving_class + moving
            t1 = _add(t1, x, f1, there, weight + k1 * n, OF_DECODER, LIMIT)
        if GROUP > 2:
            there = here + k2 * moving_class + moving
            t2 = _add(t2, x, f2, there, weight + k2 * n, OF_DECODER, LIMIT)
            there = here + k3 * moving_class + moving
            t3 = _add(t3, x, f3, there, weight + k3 * n, OF_DECODER, LIMIT)

    out = out_ptr + tl.program_id(2).to(tl.int64) * out_part + first_i * out_row
    out += i[:, None] * out_row + unit[None, :] * out_unit
    weight = gradient_ptr + first_i + i
    _finish(out + k0 * out_class, t0, f0, weight + k0 * n, True, OF_DECODER, LIMIT)
    if GROUP > 1:
        there = out + (k0 + 1) * out_class
        _finish(there, t1, f1, weight + k1 * n, k0 + 1 < classes, OF_DECODER, LIMIT)
    if GROUP > 2:
        there = out + (k0 + 2) * out_class
        _finish(there, t2, f2, weight + k2 * n, k0 + 2 < classes, OF_DECODER, LIMIT)
        there = out + (k0 + 3) * out_class
        _finish(there, t3, f3, weight + k3 * n, k0 + 3 < classes, OF_DECODER, LIMIT)


@triton.jit
def _add(
    total,
    x,
    fixed,
    moving_ptr,
    gradient_ptr,
    OF_DECODER: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Return total + LIMIT * signs @ moving for one class and one tile of x."""
    moving = tl.load(moving_ptr)
    difference = tl.dot(fixed, tl.trans(moving), input_precision="ieee") - x
    # Signs are exact in every dtype; what would be rounded is kept out of them.
    sign = _sign(difference, LIMIT).to(moving.dtype)
    if OF_DECODER:
        gradient = tl.load(gradient_ptr)
        moving = (moving.to(tl.float32) * gradient[:, None]).to(moving.dtype)
    return tl.dot(sign, moving, total, input_precision="ieee")


@triton.jit
def _finish(
    out_ptr,
    total,
    fixed,
    gradient_ptr,
    exists,
    OF_DECODER: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Store the gradient of one class, narrowed to the output's dtype."""
    total *= 1 / LIMIT
    if not OF_DECODER:
        latent = fixed.to(tl.float32)
        total *= tl.load(gradient_ptr)[:, None] * (1 - latent * latent)
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=exists)


def error_launch(
    error: Tensor,
    x: Tensor,
    latents: Tensor,
    decoder: Tensor,
    blocks: configs.ReconstructionBlocks,
) -> Launch:
    """Return what writes the errors of a chunk of classes.

    Args:
        error: fp32 [K, n], written.
        x: [n, C]; n and C are multiples of the blocks.
        latents: of these classes, [n, K * L], its rows any length apart; L is 16, 32 or 64.
        decoder: [K, L, C].
    """
    (n, channels), classes = x.shape, len(decoder)
    row_blocks = n // blocks.rows
    group = _classes_per_program(classes, row_blocks)
    return Launch(
        _error_kernel,
        (row_blocks, ceil_div(classes, group)),
        {
            "error_ptr": error,
            "x_ptr": x,
            "latent_ptr": latents,
            "decoder_ptr": decoder,
            "n": n,
            "channels": channels,
            "classes": classes,
            "latent_row": latents.stride(0),
            "group": group,
        },
        {"L": decoder.shape[1], "ROWS": blocks.rows, "CHANNELS": blocks.channels},
        warps=blocks.warps,
        stages=blocks.stages,
    )


def sign_sum_launch(
    x: Tensor,
    latents: Tensor,
    decoder: Tensor,
    gradient: Tensor,
    blocks: configs.ReconstructionBlocks,
) -> tuple[Launch, Tensor]:
    """Return what adds up gradient * sign over a chunk of classes, and where: fp32 [parts, n, C].

    Arguments as for `error_launch`; gradient is fp32 [K, n].
    """
    (n, channels), classes = x.shape, len(decoder)
    row_blocks, channel_blocks = n // blocks.rows, channels // blocks.channels
    group = _classes_per_program(classes, row_blocks * channel_blocks)
    parts = ceil_div(classes, group)
    sums = torch.empty((parts, n, channels), dtype=torch.float32, device=x.device)
    launch = Launch(
        _sign_sum_kernel,
        (row_blocks, parts, channel_blocks),
        {
            "sum_ptr": sums,
            "x_ptr": x,
            "latent_ptr": latents,
            "decoder_ptr": decoder,
            "gradient_ptr": gradient,
            "n": n,
            "channels": channels,
            "classes": classes,
            "latent_row": latents.stride(0),
            "group": group,
        },
        {
            "L": decoder.shape[1],
            "ROWS": blocks.rows,
            "CHANNELS": blocks.channels,
            "LIMIT": _limit(x),
        },
        warps=blocks.warps,
        stages=blocks.stages,
    )
    return launch, sums


def latent_gradient_launch(
    out: Tensor,
    x: Tensor,
    latents: Tensor,
    decoder: Tensor,
    gradient: Tensor,
    blocks: configs.ReconstructionBlocks,
) -> Launch:
    """Return what writes the gradient of the encoder's products, before their tanh.

    Arguments as for `sign_sum_launch`; out is [n, K * L] in the dtype of x.
    """
    classes, latent_count, channels = decoder.shape
    return _factor_launch(
        out,
        (0, latent_count, out.stride(0), 1),
        x,
        latents,
        (latent_count, latents.stride(0), 1),
        decoder,
        (latent_count * channels, 1, channels),
        gradient,
        (classes, latent_count, channels),
        False,
        blocks,
    )


def decoder_gradient_launch(
    x: Tensor,
    latents: Tensor,
    decoder: Tensor,
    gradient: Tensor,
    blocks: configs.ReconstructionBlocks,
) -> tuple[Launch, Tensor]:
    """Return what writes the decoder's gradient, and where: fp32 [parts, K, L, C].

    Arguments as for `sign_sum_launch`, but x is transposed, [C, n] and contiguous.
    """
    classes, latent_count, channels = decoder.shape
    n = x.shape[1]
    programs = ceil_div(classes, blocks.group) * (channels // blocks.fixed)
    # With few classes the rows are shared out, too.
    steps = n // blocks.moving
    share = blocks.moving * ceil_div(steps, max(1, min(steps, configs.PROGRAMS // programs)))
    size = latent_count * channels
    parts = ceil_div(n, share)
    out = torch.empty((parts, *decoder.shape), dtype=torch.float32, device=x.device)
    launch = _factor_launch(
        out,
        (classes * size, size, 1, channels),
        x,
        decoder,
        (size, 1, channels),
        latents,
        (latent_count, latents.stride(0), 1),
        gradient,
        (classes, latent_count, share),
        True,
        blocks,
    )
    return launch, out


def _factor_launch(
    out: Tensor,
    out_strides: tuple[int, int, int, int],
    x: Tensor,
    fixed: Tensor,
    fixed_strides: tuple[int, int, int],
    moving: Tensor,
    moving_strides: tuple[int, int, int],
    gradient: Tensor,
    sizes: tuple[int, int, int],
    of_decoder: bool,
    blocks: configs.ReconstructionBlocks,
) -> Launch:
    """Return a launch of `_factor_kernel`.

    Args:
        out_strides: of part, class, row and unit; the others without part.
        sizes: classes, latents of a class, and how much of x's second axis a program does.
    """
    classes, latent_count, share = sizes
    rows, columns = x.shape
    names = ("class", "row", "unit")
    return Launch(
        _factor_kernel,
        (ceil_div(classes, blocks.group), rows // blocks.fixed, ceil_div(columns, share)),
        {
            "out_ptr": out,
            "x_ptr": x,
            "fixed_ptr": fixed,
            "moving_ptr": moving,
            "gradient_ptr": gradient,
            "n": gradient.shape[1],
            "moving_length": columns,
            "classes": classes,
            "share": share,
            "x_row": columns,
            **{f"fixed_{name}": s for name, s in zip(names, fixed_strides, strict=True)},
            **{f"moving_{name}": s for name, s in zip(names, moving_strides, strict=True)},
            **{f"out_{name}": s for name, s in zip(("part", *names), out_strides, strict=True)},
        },
        {
            "L": latent_count,
            "FIXED": blocks.fixed,
            "MOVING": blocks.moving,
            "GROUP": blocks.group,
            "OF_DECODER": of_decoder,
            "LIMIT": _limit(x),
        },
        warps=blocks.warps,
        stages=blocks.stages,
    )


def _limit(x: Tensor) -> float:
    """Return what stands for the sign 1 in products."""
    return 1.0 if x.dtype == torch.float16 else 2.0**-40


def _classes_per_program(classes: int, tiles: int) -> int:
    """Return how many classes a program takes, so that there are about three waves of programs."""
    return ceil_div(classes, max(1, min(classes, configs.PROGRAMS // tiles)))


# --- ops ---------------------------------------------------------------------------------------


@torch.library.custom_op("backmix::class_reconstruction", mutates_args=())
def _class_reconstruction_triton(
    x: Tensor, encoder: Tensor, decoder: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Return the errors, and the latents if they are to be kept and are not too large.

    The latents, padded, are what backward may read; [0, ...] where it must make them again.
    """
    n, classes = len(x), len(encoder)
    error = torch.empty((n, classes), dtype=torch.float32, device=x.device)
    kept = torch.empty(_kept_shape(x, encoder, keep), dtype=x.dtype, device=x.device)
    if n == 0:
        return error, kept
    blocks, x, encoder, decoder = _padded(x, encoder, decoder)
    with torch.autocast(x.device.type, enabled=False):
        for part in [slice(0, classes)] if len(kept) else _chunks(x, encoder):
            latents = _latents(x, encoder[part], kept if len(kept) else None)
            columns = torch.empty(
                (len(encoder[part]), len(x)), dtype=torch.float32, device=x.device
            )
            error_launch(columns, x, latents, decoder[part], blocks).run()
            error[:, part] = columns[:, :n].T
    return error, kept


@_class_reconstruction_triton.register_fake
def _(x: Tensor, encoder: Tensor, decoder: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    error = x.new_empty((x.shape[0], encoder.shape[0]), dtype=torch.float32)
    return error, x.new_empty(_kept_shape(x, encoder, keep))


@torch.library.custom_op("backmix::class_reconstruction_backward", mutates_args=())
def _class_reconstruction_backward(
    gradient: Tensor, x: Tensor, encoder: Tensor, decoder: Tensor, kept: Tensor, for_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x ([0] unless asked for), encoder and decoder, in their dtypes.

    Args:
        gradient: of the errors, fp32 [n, K].
        kept: the latents that forward kept, or [0, ...].
    """
    (n, channels), latent_count = x.shape, encoder.shape[1]
    dx = torch.zeros(_gradient_shape(x, for_x), dtype=x.dtype, device=x.device)
    dencoder = torch.zeros(encoder.shape, dtype=x.dtype, device=x.device)
    ddecoder = torch.zeros(decoder.shape, dtype=x.dtype, device=x.device)
    if n == 0:
        return dx, dencoder, ddecoder
    blocks, x, encoder, decoder = _padded(x, encoder, decoder)
    transposed = x.T.contiguous()
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if for_x else None
    width = encoder.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        for part in _chunks(x, encoder):
            own = decoder[part]
            if len(kept):
                latents = kept[:, part.start * width : part.stop * width]
            else:
                latents = _latents(x, encoder[part], None)
            weight = torch.zeros((len(own), len(x)), dtype=torch.float32, device=x.device)
            weight[:, :n] = gradient[:, part].T

            launch, parts = decoder_gradient_launch(transposed, latents, own, weight, blocks)
            launch.run()
            ddecoder[part] = parts.sum(0)[:, :latent_count, :channels]
            del parts
            before_tanh = torch.empty(latents.shape, dtype=x.dtype, device=x.device)
            latent_gradient_launch(before_tanh, x, latents, own, weight, blocks).run()
            of_encoder = (before_tanh.T @ x).view(own.shape)
            dencoder[part] = of_encoder[:, :latent_count, :channels]
            if total is not None:
                launch, parts = sign_sum_launch(x, latents, own, weight, blocks)
                launch.run()
                total -= parts.sum(0) if len(parts) > 1 else parts[0]
                total += before_tanh @ encoder[part].flatten(0, 1)
                del parts
            # Else they would live until those of the next chunk have been made.
            del latents, weight, before_tanh, of_encoder
    if total is not None:
        dx.copy_(total[:n, :channels])
    return dx, dencoder, ddecoder


@_class_reconstruction_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, encoder: Tensor, decoder: Tensor, kept: Tensor, for_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(_gradient_shape(x, for_x)),
        x.new_empty(encoder.shape),
        x.new_empty(decoder.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what backward reads."""
    x, encoder, decoder, _ = inputs
    ctx.save_for_backward(x, encoder, decoder, output[1])
    # Else autograd makes a gradient of zeros for the latents, as large as they are.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Hand the gradient of the errors to the backward op, which itself has no gradient."""
    x, encoder, decoder, kept = ctx.saved_tensors
    for_x = ctx.needs_input_grad[0]
    dx, dencoder, ddecoder = _class_reconstruction_backward(
        gradient, x, encoder, decoder, kept, for_x
    )
    return dx if for_x else None, dencoder, ddecoder, None


_class_reconstruction_triton.register_autograd(_backward, setup_context=_setup_context)


def _kept_shape(x: Tensor, encoder: Tensor, keep: bool) -> tuple[int, int]:
    """Return the shape of the latents that forward keeps for backward."""
    blocks = configs.reconstruction_blocks(encoder.shape[1], x.itemsize)
    rows = _up(x.shape[0], blocks.padding)
    columns = encoder.shape[0] * _width(encoder.shape[1])
    return (rows if keep and rows * columns * x.itemsize <= _KEPT_BYTES else 0, columns)


def _gradient_shape(x: Tensor, for_x: bool) -> tuple[int, int]:
    """Return the shape of the gradient of x, empty unless it is asked for."""
    return (x.shape[0] if for_x else 0, x.shape[1])


def _padded(
    x: Tensor, encoder: Tensor, decoder: Tensor
) -> tuple[configs.ReconstructionBlocks, Tensor, Tensor, Tensor]:
    """Return the block sizes, and the tensors contiguous with zeros up to whole blocks.

    What fits already is not copied: rows and channels that are multiples of 128 (32 for fp32), and
    16, 32 or 64 latents.
    """
    (n, channels), latents = x.shape, encoder.shape[1]
    blocks = configs.reconstruction_blocks(latents, x.itemsize)
    more_units = _width(latents) - latents
    more_rows = _up(n, blocks.padding) - n
    more_channels = _up(channels, blocks.padding) - channels
    if more_rows or more_channels:
        x = pad(x, (0, more_channels, 0, more_rows))
    if more_units or more_channels:
        encoder = pad(encoder, (0, more_channels, 0, more_units))
        decoder = pad(decoder, (0, more_channels, 0, more_units))
    return blocks, x.contiguous(), encoder.contiguous(), decoder.contiguous()


def _chunks(x: Tensor, encoder: Tensor) -> Iterator[slice]:
    """Yield slices of the classes, even ones, whose latents are no larger than a chunk."""
    classes, width, _ = encoder.shape
    most = max(1, _CHUNK_BYTES // (len(x) * width * x.itemsize))
    step = ceil_div(classes, ceil_div(classes, most))
    for first in range(0, classes, step):
        yield slice(first, min(first + step, classes))


def _latents(x: Tensor, encoder: Tensor, out: Tensor | None) -> Tensor:
    """Return tanh(x encoder'), [n, K * L] in the dtype of x, written to `out` if there is one."""
    return torch.mm(x, encoder.flatten(0, 1).T, out=out).tanh_()


def _up(length: int, multiple: int) -> int:
    """Return the next multiple that is not below length."""
    return ceil_div(length, multiple) * multiple


def _width(latents: int) -> int:
    """Return the latents of a class as the kernels want them: 16, 32 or 64."""
    return 16 if latents <= 16 else 32 if latents <= 32 else 64


# --- door --------------------------------------------------------------------------------------


def class_reconstruction(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    *,
    backend: Literal["torch", "triton"] | None = None,
    check: bool = False,
) -> Tensor:
    """Return the L1 error of every class's auto-encoder on every feature, with gradients.

    error[n, k] = sum over c of |sum over l of tanh(encoder_k x_n)_l decoder_k[l, c] - x[n, c]|.
    Sign, factor and clamp of CSSR's logits are the caller's. The sign of 0 is 0. Differences and
    sums are fp32, products and latents in the dtype of x; the same arguments give the same bits.
    Never waits for a device. There are no second derivatives in the Triton form.

    Dtypes: encoder and decoder are cast to the dtype of x, inside `torch.autocast` all three to
    autocast's, and the gradients come back in each argument's own. fp32 is computed as fp32, on
    the ordinary pipes, but for PyTorch's own matrix products where TF32 has been allowed: train in
    bf16. fp16 needs a scaled loss, as everywhere.

    Memory of the Triton form beside arguments, errors and gradients: the latents up to 512 MiB
    until backward (larger ones are made again, so nothing is held then), and while a direction
    runs, of a chunk of classes, 128 MiB of latents unless they were held, as much of their
    gradients, and the decoders' gradient in fp32; and x some seven times in its own dtype. At
    12,544 x 512 features, 1,000 classes and 16 latents in bf16 that is 0.64 GB, of which 0.40 are
    held; at 64 latents 0.34 GB, or 0.58 at 2,048 channels. The plain form holds 2^25 differences,
    several times.

    Args:
        x: features, [n, C], fp32, bf16 or fp16; a channels-last map [b, C, h, w] is
            `x.permute(0, 2, 3, 1).flatten(0, 2)`.
        encoder: [K, L, C], fp32, bf16 or fp16. The Triton form takes up to 64 latents, and 8
            million features (2 million in fp32); fast are 16, 32 and 64 latents, with n and C
            multiples of 128. Else the arguments are padded, in a copy.
        decoder: [K, L, C], the weights from latents to channels.
        backend: "torch" or "triton"; None = the environment variable BACKMIX_KERNELS, else the
            best form there is.
        check: look at the values, too, and refuse what is not finite. This waits for the device.

    Returns:
        The errors, fp32 [n, K].

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: wrong shape, device or option; with `check`, a value that is not finite.
    """
    _check_tensors(x, encoder, decoder)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    form = dispatch.choose(
        backend,
        "class_reconstruction",
        x.device,
        unsupported=_unsupported(len(x), encoder.shape[1], dtype.itemsize),
    )
    if check:
        _check_values(x=x, encoder=encoder, decoder=decoder)
    x, encoder, decoder = x.to(dtype), encoder.to(dtype), decoder.to(dtype)
    if form == "torch":
        return class_reconstruction_meaning(x, encoder, decoder)
    keep = torch.is_grad_enabled() and any(y.requires_grad for y in (x, encoder, decoder))
    return _class_reconstruction_triton(x, encoder, decoder, keep)[0]


def _unsupported(n: int, latents: int, itemsize: int) -> str | None:
    """Return what of a problem's size is beyond the kernels, None if nothing is."""
    if latents > _MOST_LATENTS:
        return f"{latents} latents, the most are {_MOST_LATENTS}"
    # Blocks of features are the second axis of a grid, which CUDA limits.
    most = 65_535 * configs.reconstruction_blocks(latents, itemsize).fixed
    return f"{n:,} features, the most are {most:,}" if n > most else None


def _check_tensors(x: Tensor, encoder: Tensor, decoder: Tensor) -> None:
    """Refuse tensors of another dtype, shape or device than they must have."""
    dispatch.expect_tensors(x=x, encoder=encoder, decoder=decoder)
    dispatch.expect("x", x, _FLOATS, ("n", "C"), x.device)
    dispatch.expect("encoder", encoder, _FLOATS, ("K", "L", x.shape[1]), x.device)
    dispatch.expect("decoder", decoder, _FLOATS, encoder.shape, x.device)
    if 0 in encoder.shape:
        shape = list(encoder.shape)
        raise ValueError(f"encoder must have classes, latents and channels, got shape {shape}")


def _check_values(**arguments: Tensor) -> None:
    """Refuse values that are not finite, naming the first bad row. Waits for the device."""
    for name, values in arguments.items():
        bad = ~values.isfinite().flatten(1).all(1)
        if bad.any():
            raise ValueError(f"{name}[{int(bad.int().argmax())}] must be finite")
