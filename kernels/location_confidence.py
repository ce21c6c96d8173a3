"""location_confidence: softmax at every location, of which only two numbers are kept.

The sampler of SSOD labels each location of a feature map by how sure the classifier is of the
image's own class there. The logits of all locations are a large matrix of which nothing else is
wanted: at 12,544 locations and 21,841 classes 548 MB in bf16. So a program multiplies a block of
locations with a block of classes and keeps of each location only three numbers: the greatest logit,
the sum of exponentials below it, and the logit of the true class if it is among these classes. A
second, small kernel joins them over the blocks of classes as softmax is joined online (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018), in an order that never changes.

Operations: 2 n C K on the tensor cores, beside them about 9 instructions, one an exponential, a
logit. Bytes: features and weight once, 8 per location out, and 24 per location and block of classes
between the kernels. Floor: operations / matrix rate, or bytes / copy bandwidth if that is more.
"""

import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from backmix.kernels import configs, dispatch
from backmix.kernels.launch import Launch, ceil_div

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Confidence(NamedTuple):
    """How sure a classifier is at each location."""

    p_true: Tensor
    """Probability of the image's own class, fp32 [n] or [n, h, w]; 0 where there is none."""
    p_max: Tensor
    """Probability of the most probable class, fp32 of the same shape."""


# --- meaning -----------------------------------------------------------------------------------


@torch.no_grad()
def location_confidence_meaning(
    features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> Confidence:
    """Return both probabilities: the specification in plain PyTorch, and the CPU's form.

    The arguments are those of `location_confidence`.
    """
    rows = _rows(features)
    # Autocast would narrow the logits, whose differences decide.
    with torch.autocast(features.device.type, enabled=False):
        logits = rows.float() @ weight.to(features.dtype).float().T
    if bias is not None:
        logits += bias.float()
    probabilities = logits.softmax(1)
    own = labels.repeat_interleave(math.prod(features.shape[2:]))
    known = (own >= 0) & (own < len(weight))
    p_true = probabilities.gather(1, torch.where(known, own, 0)[:, None])[:, 0]
    return _shaped(torch.where(known, p_true, 0.0), probabilities.amax(1), features)


def _rows(features: Tensor) -> Tensor:
    """Return features with one location a row, [n, C] or [n h w, C]; a view if channels-last."""
    return features if features.ndim == 2 else features.permute(0, 2, 3, 1).flatten(0, 2)


def _shaped(p_true: Tensor, p_max: Tensor, features: Tensor) -> Confidence:
    """Return the probabilities of `_rows(features)` in the shape of the locations."""
    shape = (len(features), *features.shape[2:])
    return Confidence(p_true.view(shape), p_max.view(shape))


# --- kernels -----------------------------------------------------------------------------------

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["n", "locations"])
def _location_confidence_kernel(
    p_true_ptr,  # fp32 [n]; this and the next only if there is one block of classes
    p_max_ptr,  # fp32 [n]
    partial_ptr,  # fp32 [3, class blocks, n]: greatest logit, sum of exponentials, true logit
    features_ptr,  # fp32, bf16 or fp16 [n, CHANNELS]
    weight_ptr,  # as features [CLASSES, CHANNELS]
    bias_ptr,  # fp32, bf16 or fp16 [CLASSES], or None
    labels_ptr,  # int64 [n / locations]
    n,  # locations of all images
    locations,  # of one image
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of locations
):
    CLASS_BLOCKS: tl.constexpr = (CLASSES + BLOCK_K - 1) // BLOCK_K
    # GROUP blocks of locations meet one block of classes after another, so that the features of a
    # group stay in the L2 cache and the weight passes through it once per group.
    program = tl.program_id(0)
    group = program // (GROUP * CLASS_BLOCKS)
    within = program - group * (GROUP * CLASS_BLOCKS)
    blocks = tl.minimum(tl.cdiv(n, BLOCK_N) - group * GROUP, GROUP)
    class_block = within // blocks
    first = (group * GROUP + within - class_block * blocks) * BLOCK_N
    # Rows beyond the last repeat it, so that no load of them needs a mask; they are not stored.
    row = tl.arange(0, BLOCK_N)
    live = row < n - first
    row = tl.minimum(row, n - 1 - first)

    # Classes beyond the last repeat it, too, and a bias of -inf takes them out.
    start = class_block * BLOCK_K
    class_ = start + tl.arange(0, BLOCK_K)
    real = class_ < CLASSES
    if bias_ptr is None:
        bias = tl.where(real, 0.0, float("-inf"))
    else:
        bias = tl.load(bias_ptr + class_, mask=real, other=float("-inf")).to(tl.float32)
    class_row = tl.minimum(class_, CLASSES - 1) - start

    # 64-bit once, for the block: n * CHANNELS passes 2^31 at 1,048,576 locations of 2,048.
    feature_block = features_ptr + first.to(tl.int64) * CHANNELS
    weight_block = weight_ptr + start.to(tl.int64) * CHANNELS
    channel = tl.arange(0, BLOCK_C)
    feature = row[:, None] * CHANNELS + channel[None, :]
    weight = class_row[:, None] * CHANNELS + channel[None, :]
    # The bias is where the sum starts: adding it afterwards costs an instruction per logit.
    logit = tl.zeros([BLOCK_N, BLOCK_K], tl.float32) + bias[None, :]
    for c in tl.range(0, CHANNELS, BLOCK_C):
        if CHANNELS % BLOCK_C == 0:
            x = tl.load(feature_block + c + feature)
            w = tl.load(weight_block + c + weight)
        else:
            inside = channel[None, :] < CHANNELS - c
            x = tl.load(feature_block + c + feature, mask=inside, other=0.0)
            w = tl.load(weight_block + c + weight, mask=inside, other=0.0)
        logit = tl.dot(x, tl.trans(w), logit, input_precision="ieee")

    label = tl.load(labels_ptr + (first + row) // locations)
    label = tl.where((label >= 0) & (label < CLASSES), label, -1).to(tl.int32)
    greatest = tl.max(logit, 1)
    total = tl.sum(tl.exp2((logit - _finite(greatest)[:, None]) * _LOG2E), 1)
    own = class_[None, :] == label[:, None]
    true = tl.max(tl.where(own, logit, float("-inf")), 1)
    if CLASS_BLOCKS == 1:
        _store(p_true_ptr + first, p_max_ptr + first, row, live, label >= 0, greatest, total, true)
    else:
        step = tl.full([], CLASS_BLOCKS, tl.int64) * n
        partial = partial_ptr + class_block.to(tl.int64) * n + first + row
        tl.store(partial, greatest, mask=live)
        tl.store(partial + step, total, mask=live)
        tl.store(partial + 2 * step, true, mask=live)


@triton.jit(do_not_specialize=["n", "locations"])
def _join_kernel(
    p_true_ptr,  # fp32 [n]
    p_max_ptr,  # fp32 [n]
    partial_ptr,  # fp32 [3, CLASS_BLOCKS, n] of the kernel above
    labels_ptr,  # int64 [n / locations]
    n,
    locations,
    CLASSES: tl.constexpr,
    CLASS_BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,  # the next power of two
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < n
    row = tl.minimum(row, n - 1)  # as above
    label = tl.load(labels_ptr + row // locations)
    known = (label >= 0) & (label < CLASSES)

    block = tl.arange(0, PADDED_BLOCKS)
    step = tl.full([], CLASS_BLOCKS, tl.int64) * n
    partial = partial_ptr + block.to(tl.int64)[:, None] * n + row[None, :]
    there = (block < CLASS_BLOCKS)[:, None]
    # What is not there has no logit: nothing is greater than -inf, nothing adds to the sum.
    greatests = tl.load(partial, mask=there, other=float("-inf"))
    totals = tl.load(partial + step, mask=there, other=0.0)
    trues = tl.load(partial + 2 * step, mask=there, other=float("-inf"))
    greatest = tl.max(greatests, 0)
    total = tl.sum(totals * tl.exp2((greatests - _finite(greatest)[None, :]) * _LOG2E), 0)
    true = tl.max(trues, 0)
    _store(p_true_ptr, p_max_ptr, row, live, known, greatest, total, true)


@triton.jit
def _store(p_true_ptr, p_max_ptr, row, live, known, greatest, total, true):
    """Store what the three numbers of each location amount to."""
    # p_max is 1 / total, but 0 / 0 where every logit is -inf.
    p_max = tl.exp2((greatest - _finite(greatest)) * _LOG2E) / total
    p_true = tl.exp2((true - _finite(greatest)) * _LOG2E) / total
    tl.store(p_max_ptr + row, p_max, mask=live)
    tl.store(p_true_ptr + row, tl.where(known, p_true, 0.0), mask=live)


@triton.jit
def _finite(greatest):
    """Return what to subtract from logits: 0 where all are -inf, because -inf - -inf is NaN."""
    return tl.where(greatest == float("-inf"), 0.0, greatest)


def launches(
    p_true: Tensor,
    p_max: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    blocks: configs.ConfidenceBlocks | None = None,
) -> list[Launch]:
    """Return what the op runs: the product and, beyond one block of classes, the join.

    Args:
        p_true: fp32 [n], n > 0, written; as p_max.
        features: [n, C], contiguous; the fast path wants rows of whole 16 bytes.
        weight: [K, C], contiguous, of features' dtype.
        blocks: None = those of the table.
    """
    n, channels = features.shape
    classes = len(weight)
    if blocks is None:
        capability = (9, 0)  # of a launch that is only compiled, or interpreted
        if features.is_cuda:
            capability = torch.cuda.get_device_capability(features.device)
        blocks = configs.confidence_blocks(classes, features.itemsize, capability)
    class_blocks = ceil_div(classes, blocks.classes)
    split = class_blocks > 1
    partial = None
    if split:
        partial = torch.empty((3, class_blocks, n), dtype=torch.float32, device=features.device)
    of_images = {"labels_ptr": labels, "n": n, "locations": n // len(labels)}
    product = Launch(
        _location_confidence_kernel,
        (ceil_div(n, blocks.locations) * class_blocks,),
        {
            "p_true_ptr": None if split else p_true,
            "p_max_ptr": None if split else p_max,
            "partial_ptr": partial,
            "features_ptr": features,
            "weight_ptr": weight,
            "bias_ptr": bias,
            **of_images,
        },
        {
            "CLASSES": classes,
            "CHANNELS": channels,
            "BLOCK_N": blocks.locations,
            "BLOCK_K": blocks.classes,
            "BLOCK_C": blocks.channels,
            "GROUP": blocks.group,
        },
        warps=blocks.warps,
        stages=blocks.stages,
    )
    if not split:
        return [product]
    join = Launch(
        _join_kernel,
        (ceil_div(n, blocks.joined),),
        {"p_true_ptr": p_true, "p_max_ptr": p_max, "partial_ptr": partial, **of_images},
        {
            "CLASSES": classes,
            "CLASS_BLOCKS": class_blocks,
            "PADDED_BLOCKS": triton.next_power_of_2(class_blocks),
            "BLOCK_N": blocks.joined,
        },
        warps=4,
    )
    return [product, join]


# --- op ----------------------------------------------------------------------------------------


@torch.library.custom_op("backmix::location_confidence", mutates_args=())
def _location_confidence_triton(
    features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the kernels on features [n, C] and weight [K, C] of one dtype, labels [n / locations]."""
    p_true = torch.empty(len(features), dtype=torch.float32, device=features.device)
    p_max = torch.empty_like(p_true)
    if len(features):  # a grid of no programs is an error
        bias = None if bias is None else bias.contiguous()
        for launch in launches(
            p_true, p_max, _dense(features), _dense(weight), bias, labels.contiguous()
        ):
            launch.run()
    return p_true, p_max


@_location_confidence_triton.register_fake
def _(
    features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    p_true = features.new_empty(features.shape[:1], dtype=torch.float32)
    return p_true, torch.empty_like(p_true)


def _dense(rows: Tensor) -> Tensor:
    """Return rows that follow each other and have whole 16 bytes, zeros behind; a copy if need be.

    Rows of another length can only be loaded in small pieces, which spills registers.
    """
    missing = -rows.shape[1] % (16 // rows.itemsize)
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()


# --- door --------------------------------------------------------------------------------------


@torch.no_grad()
def location_confidence(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    backend: Literal["torch", "triton"] | None = None,
    check: bool = False,
) -> Confidence:
    """Return how probable the image's own class and the most probable class are at each location.

    The classifier, applied to each location l: p = softmax(weight @ features[l] + bias), of which
    p[label] and max p are returned. Nothing has a gradient, whatever the arguments have. Never
    waits for a device, and the Triton form keeps no logits. The same arguments give the same bits.

    The products are those of the features' dtype: weight is rounded to it, as autocast does, which
    for a fp32 weight is one more pass over it at each call. Sums, bias and softmax are fp32. A
    location with a logit that is NaN or +inf is NaN; a class of bias -inf has probability 0.

    Args:
        features: [n, C], or a feature map [n, C, h, w]; fp32, bf16 or fp16. Channels-last memory is
            read as it is, another layout is copied once, and so are rows of no whole 16 bytes.
        weight: of the linear layer, [K, C], fp32, bf16 or fp16; K up to 65,536.
        bias: [K], fp32, bf16 or fp16, or None.
        labels: class of each image, int64 [n]; outside 0..K-1 = no class of these, p_true is 0.
        backend: "torch" or "triton"; None = the environment variable BACKMIX_KERNELS, else the
            best form there is. The plain form keeps all logits, twice.
        check: look at the labels, too, and name the first outside 0..K-1. This waits for the
            device.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: wrong shape, device or option; with `check`, a label out of range.
    """
    _check_tensors(features, weight, bias, labels)
    classes = len(weight)
    too_many = f"{classes:,} classes, the most are 65,536" if classes > 65_536 else None
    form = dispatch.choose(backend, "location_confidence", features.device, unsupported=too_many)
    if check:
        bad = (labels < 0) | (labels >= classes)
        dispatch.refuse("labels", labels, bad, f"must be in 0..{classes - 1}")
    if form == "torch":
        return location_confidence_meaning(features, weight, bias, labels)
    p_true, p_max = _location_confidence_triton(
        _rows(features), weight.to(features.dtype), bias, labels
    )
    return _shaped(p_true, p_max, features)


def _check_tensors(features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    """Refuse tensors of another dtype, shape or device than they must have."""
    dispatch.expect_tensors(features=features, weight=weight, labels=labels)
    device = features.device
    if features.ndim not in (2, 4):
        shape = list(features.shape)
        raise ValueError(f"features must have shape [n, C] or [n, C, h, w], got {shape}")
    rest = ("h", "w")[: features.ndim - 2]
    dispatch.expect("features", features, _FLOATS, ("n", "C", *rest), device)
    dispatch.expect("weight", weight, _FLOATS, ("K", features.shape[1]), device)
    if 0 in weight.shape:
        raise ValueError(f"weight must have classes and channels, got shape {list(weight.shape)}")
    if bias is not None:
        dispatch.expect("bias", bias, _FLOATS, (len(weight),), device)
    dispatch.expect("labels", labels, (torch.int64,), (len(features),), device)
