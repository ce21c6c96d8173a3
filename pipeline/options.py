"""The options of conversion and loading; standard library only, so that `--help` stays instant."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How images are stored."""

    mode: Literal["auto", "jpg", "raw", "smart", "proportion"] = "auto"
    """auto: copy a JPEG byte for byte where that is safe, store everything else raw (--preset: as
    it says). jpg: JPEG always. raw: pixels always. smart: JPEG where the pixels exceed
    --smart-threshold. proportion: JPEG for a share of the samples, drawn per sample."""
    smart_threshold: int | None = None
    """smart: pixels (height x width x 3) above this many bytes are stored as JPEG [bytes]."""
    compress_probability: float = 0.5
    """proportion: share of the samples stored as JPEG. No other mode takes it."""
    quality: int | None = None
    """JPEG quality 1..100 of what is encoded; given, it re-encodes every JPEG (default 90)."""
    max_side: int | None = None
    """Shrink images so that the longer side is at most this [pixels]."""
    preset: Literal["none", "s500", "s384", "s256"] = "none"
    """Make a smaller set of JPEGs. s500, s384: the longer side at most 500 or 384 pixels. s256: the
    shorter side at most 256. What is shrunk, and what is no JPEG, is encoded at quality 90, with
    some loss; the rest is copied."""
    classes: Path | None = None
    """File with one class name a line: fixes the class list and its order."""
    check: Literal["scaled", "full", "none"] = "scaled"
    """Decode every source image: at 1/8 scale (finds truncation), in full, or not at all."""
    on_error: Literal["stop", "skip"] = "stop"
    """An image that cannot be decoded stops the run, or is listed in the manifest and left out."""
    workers: int = 0
    """Worker processes; 0 = one per core. The file is the same for any number."""
    shards: int = 1
    """More than 1: that many files, OUT-00000-of-00003.beton and so on, of neighbouring images, and
    one manifest, which may be given where a .beton is."""
    page_size: int | None = None
    """Bytes per page, a power of two; default: from the largest sample [bytes]."""
    seed: int = 0
    """proportion: seed of the draw. No other mode takes it."""
    force: bool = False
    """Replace an existing file."""


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How batches are made. Decoder, threads, prefetch and memory hints never change results."""

    loader: Literal["auto", "resident", "turbo", "ffcv", "dali", "fastest"] = "auto"
    """resident: all images decoded once and kept on the device. turbo: libjpeg-turbo in threads.
    ffcv: the stock ffcv pipeline. dali: NVIDIA DALI, on the GPU where the batches go to one. auto:
    resident in training on whole images of at most 2 GiB in all, else turbo. fastest: where auto
    trains by turbo, time turbo, ffcv and dali on the data, as far as they are installed, and take
    the fastest; their pixels differ by little, so the run remembers it."""
    batch: int = 128
    """Images per step, all ranks together."""
    size: int = 32
    """Side of the square view [pixels]."""
    grow_from: int = 0
    """Training begins with views of this side and ends with --loader.size; 0, with
    --loader.grow 0 0 = always that [pixels]."""
    grow: tuple[int, int] = (0, 0)
    """Finished epochs at which the views begin to grow, and from which on they have the full size;
    in between linearly, in multiples of 32 pixels."""
    crop: Literal["whole", "random"] = "whole"
    """whole: the whole image, resized to the view. random: random-resized-crop in training,
    centre crop in evaluation."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the random crop's share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the random crop's width / height."""
    eval_crop: float = 0.875
    """Side of the centre crop as a share of the shorter side (crop random, in evaluation)."""
    group: int = 0
    """Size of the mix groups that donors stay in; 0 = min(64, batch)."""
    order: Literal["full", "windowed"] = "full"
    """Shuffle over the whole set, or inside windows of pages (data larger than memory)."""
    window: int = 16
    """Pages per window (order windowed)."""
    decoder: Literal["auto", "full", "region"] = "auto"
    """turbo: what is decoded of a JPEG. full: the whole image. region: no more than the crop, by
    nvImageCodec (extra region), where the converter has decoded the image and its checksum is
    right. auto: region where it is installed. The pixels are the same."""
    threads: int = 0
    """Decoding threads; 0 = one per core."""
    prefetch: int = 3
    """Batches decoded ahead."""
    hw_share: float = 0.65
    """dali: share of the JPEGs that the GPU's JPEG engine decodes, 0 to 1, where it has one. Engine
    and shaders may differ in pixels by little: 0 or 1 where runs must repeat bit by bit."""
    device_memory_padding: int = 16 << 20
    """dali: memory of the GPU that each decoding thread has from the start, DALI's default; what a
    larger image needs is allocated when it comes. Nothing on the CPU [bytes]."""
    host_memory_padding: int = 8 << 20
    """dali: likewise, pinned memory of the host, twice for each thread [bytes]."""
    preallocate_hint: tuple[int, int] = (0, 0)
    """dali: width and height for which the GPU's JPEG engine has memory from the start; 0 0 = it
    grows with the images. Nothing on the CPU [pixels]."""
    on_bad: Literal["replace", "error"] = "replace"
    """An undecodable image in training: draw another one for it, or stop."""
    max_bad: float = 0.001
    """Share of an epoch that may be replaced before the run stops."""
    verify: bool = True
    """Whether every sample's checksum is checked when it is read."""

    @property
    def mix_group(self) -> int:
        """Images per mix group."""
        return self.group or min(64, self.batch)


GROWTH_STEP = 32
"""While the view grows its side is a multiple of this [pixels]."""


def size_at(options: LoaderOptions, epoch: int) -> int:
    """Return the side of the training views of an epoch (0 is the first) [pixels].

    The rule of ffcv's ImageNet recipes.
    """
    if not options.grow_from:
        return options.size
    first, last = options.grow
    if epoch <= first:
        return options.grow_from
    if epoch >= last:
        return options.size
    side = options.grow_from + (options.size - options.grow_from) * (epoch - first) / (last - first)
    side = round(side / GROWTH_STEP) * GROWTH_STEP
    return min(max(side, options.grow_from), options.size)


_HEEDED_BY = {
    "decoder": ("turbo", "auto", "fastest"),
    "hw_share": ("dali", "fastest"),
    "device_memory_padding": ("dali", "fastest"),
    "host_memory_padding": ("dali", "fastest"),
    "preallocate_hint": ("dali", "fastest"),
}


def refuse_idle(options: LoaderOptions) -> None:
    """Raise ValueError for an option that was set, and that nothing of what is asked for heeds.

    For options as somebody gave them: where `fastest` has chosen a loader, those for the others
    rightly stand idle.
    """
    idle = LoaderOptions()
    for name, loaders in _HEEDED_BY.items():
        if getattr(options, name) != getattr(idle, name) and options.loader not in loaders:
            raise ValueError(
                f"--loader.{name.replace('_', '-')} does nothing with --loader.loader "
                f"{options.loader}: leave it out, or choose --loader.loader {loaders[0]}"
            )
    if options.window != idle.window and options.order != "windowed":
        raise ValueError("--loader.window does nothing without --loader.order windowed")


def refuse_unknown_choices(options: Any, prefix: str) -> None:
    """Raise ValueError for a field whose value is none of its choices.

    The command line never lets one through; calls from Python can.

    Args:
        options: one of the dataclasses above.
        prefix: what stands before the field's name in the message, as on the command line.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            flag = prefix + field.name.replace("_", "-")
            raise ValueError(f"{flag} must be {', '.join(get_args(field.type))}; not {value!r}")


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
