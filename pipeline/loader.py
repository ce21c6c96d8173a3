"""The door to the loaders: check what was asked for, and open the one that serves it.

Every loader delivers the same samples with the same boxes in the same batches; they differ in
speed, in memory, in where donors come from (`Batch.group`), and a little in pixels:
`docs/loaders.md`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
import torch

from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.beton import BetonSet, open_set
from backmix.pipeline.dali_loader import Dali
from backmix.pipeline.fastest import fastest
from backmix.pipeline.ffcv_loader import Ffcv
from backmix.pipeline.options import LoaderOptions, refuse_unknown_choices
from backmix.pipeline.plan import Plan
from backmix.pipeline.resident import Resident
from backmix.pipeline.subset import Subset
from backmix.pipeline.turbo import Turbo

LARGEST_AUTOMATIC_POOL = 2 << 30
"""Bytes of the largest pool that `auto` keeps resident."""
MOST_THREADS = 1024
LARGEST_VIEW = 16_384
"""Longest side of a view [pixels]: 805 MB."""
LARGEST_PADDING = 8 << 30
"""Bytes that a decoding thread of DALI may have from the start."""
LONGEST_SIDE = 65_535
"""Of a JPEG [pixels]."""

Kind = Literal["resident", "turbo", "ffcv", "dali"]


class Engine(Protocol):
    """What reads and decodes the samples of a plan: all in which the loaders differ."""

    bad: dict[int, str]
    """Sample number and name of what was found bad so far, each once."""

    def batches(self, place: Place) -> Iterator[Batch]:
        """As `Loader.batches`."""
        ...

    def close(self) -> None:
        """Release threads and memory; the files are closed afterwards."""
        ...


@dataclass(frozen=True, eq=False)
class Loader:
    """An open data set and what reads it; `with` closes it."""

    plan: Plan
    engine: Engine

    @property
    def resident(self) -> bool:
        """Whether the pool is the whole subset, row p showing position p."""
        return isinstance(self.engine, Resident)

    @property
    def subset(self) -> Subset:
        """The samples that this loader delivers."""
        return self.plan.subset

    @property
    def samples(self) -> int:
        """Samples of an epoch, all ranks together."""
        return len(self.plan.subset)

    @property
    def bad(self) -> list[str]:
        """Names of the samples found bad so far (replaced, or left out), each once."""
        return list(self.engine.bad.values())

    def batches(self, place: Place) -> Iterator[Batch]:
        """Yield this rank's batches from `place` to the end of the epoch.

        The last batch of an epoch may be short; in evaluation the stored order is delivered, the
        epoch does not matter, and bad images are left out.
        """
        return self.engine.batches(place)

    def close(self) -> None:
        """Release threads, memory and files; batches already taken stay valid."""
        self.engine.close()
        self.plan.data.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_loader(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    options: LoaderOptions,
    *,
    split: Literal["train", "eval"] = "train",
    subset: Subset | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
) -> Loader:
    """Open a loader on one .beton file, or on several as one data set.

    Args:
        paths: the file or files, in the order of their samples.
        options: batch, view, crop, order, threads and so on. Decoder, threads, prefetch and memory
            hints never change results; what the loader that serves does not heed does nothing.
        split: train: shuffled, random crops if asked, bad images replaced. eval: stored order,
            whole images or centre crops, bad images left out.
        subset: the samples to use and their labels; default: all, with their stored labels.
        seed: 0 .. 2^64 - 1; keys what a resident pool shows in the rows of bad images. All other
            draws are keyed by the place that `batches` is given.
        device: where the batches go.
        rank, world: this process and the number of processes; each gets its share of every step.
        progress: called with (done, all) while a resident pool is decoded.
        say: called with the lines of `--loader.loader fastest`.

    Raises ValueError for options that cannot be served and for damaged files, OSError for files
    that cannot be read.
    """
    _check(options, split, seed, rank, world)
    device = torch.device(device)
    data = open_set(paths)
    try:
        chosen = _chosen(data, subset)
        plan = Plan(data, chosen, options, split == "train", rank, world)
        match _choose(plan, device, say):
            case "resident":
                return Loader(plan, Resident(plan, device, seed, progress))
            case "turbo":
                return Loader(plan, Turbo(plan, device))
            case "ffcv":
                return Loader(plan, Ffcv(plan, device))
            case "dali":
                return Loader(plan, Dali(plan, device))
    except BaseException:
        data.close()
        raise


def choose(
    data: BetonSet,
    options: LoaderOptions,
    subset: Subset,
    *,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = print,
) -> Kind:
    """Return the loader that `open_loader` would take for training.

    For `fastest` that takes seconds, and another call may choose another one: a run asks once.

    Args:
        data: the data set, open.
        options, subset, device, say: as in `open_loader`.
    """
    _check(options, "train", 0, 0, 1)
    return _choose(Plan(data, subset, options, True), torch.device(device), say)


def _choose(plan: Plan, device: torch.device, say: Callable[[str], None]) -> Kind:
    """Return the loader that serves a plan.

    Auto depends on options and data alone, not on the machine: donors of a resident pool come from
    the whole set, so another choice on another machine would be another training run.
    """
    options = plan.options
    if options.loader != "auto" and options.loader != "fastest":
        return options.loader
    small = len(plan.subset) * options.size**2 * 3 <= LARGEST_AUTOMATIC_POOL
    if plan.training and options.crop == "whole" and small and not options.grow_from:
        return "resident"
    if options.loader == "auto" or not plan.training:
        return "turbo"
    if plan.world > 1:
        raise ValueError(
            "--loader.loader fastest is for one process: several could choose different loaders"
        )
    return fastest(plan.data, options, plan.subset, device, say)


def _chosen(data: BetonSet, subset: Subset | None) -> Subset:
    """Return the subset to deliver, checked against the data."""
    if subset is None:
        return Subset(np.arange(data.n), data.labels)
    if not len(subset):
        raise ValueError(
            "the subset holds no samples: none of the classes asked for is in the data"
        )
    if len(subset.labels) != len(subset):
        raise ValueError(f"the subset has {len(subset)} samples, but {len(subset.labels)} labels")
    if subset.index.min() < 0 or subset.index.max() >= data.n:
        raise ValueError(
            f"the subset names sample {subset.index.max()}, the data has samples 0 to "
            f"{data.n - 1}: it was made for other files"
        )
    return dataclasses.replace(subset, index=np.asarray(subset.index, np.int64))


def _check(options: LoaderOptions, split: str, seed: int, rank: int, world: int) -> None:
    """Refuse options outside their ranges, in the words of the command line."""

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise ValueError(problem)

    refuse_unknown_choices(options, "--loader.")
    low, high = options.scale
    narrow, wide = options.ratio
    require(split in ("train", "eval"), f"the split must be train or eval, got {split!r}")
    require(options.batch >= 1, f"--loader.batch must be at least 1, got {options.batch}")
    require(
        1 <= options.size <= LARGEST_VIEW,
        f"--loader.size must be 1 to {LARGEST_VIEW} pixels, got {options.size}",
    )
    first, last = options.grow
    require(
        0 <= options.grow_from <= options.size,
        f"--loader.grow-from must be 0 to {options.size} pixels (--loader.size), "
        f"got {options.grow_from}; with 0, and --loader.grow 0 0, views do not grow",
    )
    require(
        0 <= first <= last and (last > 0) == (options.grow_from > 0),
        "growing views need --loader.grow-from PIXELS and --loader.grow FIRST LAST, with epochs "
        f"0 <= FIRST <= LAST, LAST at least 1, or 0 and 0 0 for views of one size; "
        f"got {options.grow_from} and {first} {last}",
    )
    require(
        0 < low <= high <= 1, f"--loader.scale must be two shares 0 < a <= b <= 1, got {low} {high}"
    )
    require(
        1e-3 <= narrow <= wide <= 1e3,
        f"--loader.ratio must be 0.001 <= a <= b <= 1000, got {narrow} {wide}",
    )
    require(
        0 < options.eval_crop <= 1, f"--loader.eval-crop must be in (0, 1], got {options.eval_crop}"
    )
    require(options.window >= 1, f"--loader.window must be at least 1 page, got {options.window}")
    require(
        0 <= options.threads <= MOST_THREADS,
        f"--loader.threads must be 0 to {MOST_THREADS}, got {options.threads}",
    )
    require(options.prefetch >= 0, f"--loader.prefetch must be 0 or more, got {options.prefetch}")
    require(
        0 <= options.hw_share <= 1, f"--loader.hw-share must be in [0, 1], got {options.hw_share}"
    )
    for name in ("device_memory_padding", "host_memory_padding"):
        padding = getattr(options, name)
        require(
            0 <= padding <= LARGEST_PADDING,
            f"--loader.{name.replace('_', '-')} must be 0 to {LARGEST_PADDING} bytes, each thread "
            f"has so many; got {padding}",
        )
    sides = options.preallocate_hint
    require(
        sides == (0, 0) or all(1 <= side <= LONGEST_SIDE for side in sides),
        f"--loader.preallocate-hint must be a width and a height of 1 to {LONGEST_SIDE} pixels, or "
        f"0 0; got {sides[0]} {sides[1]}",
    )
    require(0 <= options.max_bad <= 1, f"--loader.max-bad must be in [0, 1], got {options.max_bad}")
    require(options.group >= 0, f"--loader.group must be 0 or more, got {options.group}")
    require(0 <= seed < 1 << 64, f"the seed must be in 0 .. 2^64 - 1, got {seed}")
    require(0 <= rank < world, f"the rank must be in 0 .. {world - 1}, got {rank}")
    group = options.mix_group
    if split == "train" and options.batch % group:
        fitting = max(g for g in range(1, 65) if options.batch % g == 0)
        raise ValueError(
            f"--loader.batch {options.batch} is not made of whole mix groups of {group} images: "
            f"choose another batch, or --loader.group {fitting}"
        )
