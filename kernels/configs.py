"""Block sizes and warps of every kernel, in one place: chosen by shape, never timed at run time.

Timing kernels while training would let noise decide how a run computes. These are constants: set
by counting registers and instructions for now, and by `bench/gpu.py --stage tune` where a GPU has
been measured; docs/kernels.md says which.
"""

import dataclasses
import itertools
from dataclasses import dataclass

# --- mix_draws -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixDrawsConfig:
    """Of `mix_draws_on_device`."""

    images: int
    """Of a program; a power of two."""
    warps: int


MIX_DRAWS = MixDrawsConfig(images=128, warps=4)

# --- update_cam_bank -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CamBankConfig:
    """Of `update_cam_bank`."""

    channels: int
    """Of a tile, which holds all cells of the sample; a power of two."""
    unroll: int
    """Tiles of one turn of the loop: all their loads are on the way before the first is used."""
    warps: int
    stages: int = 1
    """Turns on the way at once, through shared memory; 1 = through registers only."""
    maxnreg: int | None = 128
    """Without a limit the compiler saves registers by asking for less at a time."""


def update_cam_bank(
    channels: int, cells: int, itemsize: int, *, channels_last: bool
) -> CamBankConfig:
    """Return the block sizes for features [n, channels, cells] with elements of `itemsize` bytes.

    A turn of the loop asks for 32 KB, which is 8 loads of 16 bytes by each of 256 threads.
    """
    padded = 1 << (cells - 1).bit_length()
    if not channels_last:
        return CamBankConfig(channels=min(4096 // padded, 64), unroll=2, warps=8)
    row = min(256, 16384 // padded)
    block = min(row // itemsize, 1 << (channels - 1).bit_length())
    tile = padded * block * itemsize
    unroll = max(1, min(4, 32768 // tile, channels // block))
    return CamBankConfig(channels=block, unroll=unroll, warps=8 if tile * unroll >= 8192 else 4)


# --- location_confidence -------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfidenceBlocks:
    """Of `location_confidence`; all but warps and stages are powers of two."""

    locations: int
    """Of a program."""
    classes: int
    """Of a program."""
    channels: int
    """Of one step of the matrix product."""
    warps: int
    stages: int
    """Steps under way at once, in shared memory."""
    group: int = 32
    """Blocks of locations that go through all classes together."""
    joined: int = 32
    """Locations of a program of the join."""


def confidence_blocks(classes: int, itemsize: int, capability: tuple[int, int]) -> ConfidenceBlocks:
    """Return the block sizes for features with elements of `itemsize` bytes.

    At 12,544 locations and 1,000 classes 128 x 256 makes 392 programs, three waves of 131 on the
    132 processors of an H100 or H200.

    Args:
        capability: compute capability of the device.
    """
    power = max(16, 1 << (classes - 1).bit_length())
    if itemsize == 4:  # products on the ordinary pipes, operands in registers
        few = power < 128
        return ConfidenceBlocks(64, min(power, 128), 16, warps=4 if few else 8, stages=3)
    if power <= 128:  # bound by the features' bytes: several small programs a processor
        return ConfidenceBlocks(64, power, 64, warps=4, stages=3)
    # A stage is 48 KiB of shared memory. Data-centre GPUs have room for four; the others have 99
    # KiB, two stages, and the matrix instructions they run keep one more in registers.
    data_centre = capability in ((8, 0), (8, 7)) or 9 <= capability[0] <= 11
    return ConfidenceBlocks(128, 256, 64, warps=8, stages=4 if data_centre else 3)


# --- mix_background ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixBackgroundBlocks:
    """Of `mix_background`. A program makes `columns` numbers of `rows * unroll * steps` lines."""

    columns: int
    """Of a tile, in numbers, three a pixel; a power of two."""
    rows: int
    """Of a tile; a power of two."""
    unroll: int
    """Tiles of a step: loads of so many lines are under way at once."""
    steps: int
    warps: int
    maxnreg: int | None = None


def mix_background_blocks(n: int, height: int, width: int, itemsize: int) -> MixBackgroundBlocks:
    """Return the block sizes for n images, written with `itemsize` bytes a number.

    Tiles are as wide as wastes at most a seventh of the lanes, for a flipped line is read byte by
    byte and neighbouring threads should find the same lines in the cache: 256 at 224 px, 32 at
    32 px. They are as high as gives each thread one store of 16 bytes. A program makes 112 lines,
    which pays for working out its columns, or 56 where that leaves too few programs.
    """
    line, warps = 3 * width, 4
    wide = [c for c in (256, 128, 64) if -(-line // c) * c <= line * 8 / 7]
    columns = wide[0] if wide else 32
    rows = max(1, warps * 32 * (16 // itemsize) // columns)
    unroll = 2 if itemsize > 1 and height >= 2 * rows else 1
    lines = 112 if n * -(-line // columns) * -(-height // 112) >= 4096 else 56
    return MixBackgroundBlocks(columns, rows, unroll, max(1, lines // (rows * unroll)), warps)


def mix_background_candidates(
    n: int, height: int, width: int, itemsize: int
) -> list[MixBackgroundBlocks]:
    """Return the block sizes that `bench/gpu.py --stage tune` tries, the chosen ones first."""
    found = [mix_background_blocks(n, height, width, itemsize)]
    found.append(dataclasses.replace(found[0], maxnreg=80))
    for warps, columns, unroll, lines in itertools.product(
        (4, 8), (32, 64, 128, 256), (1, 2, 4), (56, 112, 224)
    ):
        rows = max(1, warps * 32 * (16 // itemsize) // columns)
        steps = lines // (rows * unroll)
        wasted = -(-3 * width // columns) * columns / (3 * width)
        if wasted <= 4 / 3 and rows * unroll <= height and steps:
            steps = min(steps, -(-height // (rows * unroll)))
            found.append(MixBackgroundBlocks(columns, rows, unroll, steps, warps))
    return list(dict.fromkeys(found))


# --- class_reconstruction ------------------------------------------------------------------------

PROGRAMS = 396
"""Programs that a launch of `class_reconstruction` aims at: three waves of an H100 or H200."""


@dataclass(frozen=True)
class ReconstructionBlocks:
    """Of `class_reconstruction`; all but warps and stages are powers of two."""

    rows: int
    """Of a tile of the errors and of the sums of signs, features."""
    channels: int
    """Of the same tile."""
    fixed: int
    """Of a tile of the factors' gradients: along the factor whose gradient it is."""
    moving: int
    """Of the same tile, along the sum."""
    group: int
    """Classes of a program of the factors' gradients: 1, 2 or 4."""
    warps: int
    stages: int = 3

    @property
    def padding(self) -> int:
        """Return what the numbers of features and channels must be multiples of."""
        return max(self.rows, self.channels, self.fixed, self.moving)


def reconstruction_blocks(latents: int, itemsize: int) -> ReconstructionBlocks:
    """Return the block sizes for features with elements of `itemsize` bytes.

    A tile of 128 x 128 differences is 64 registers of a thread, as much as x beside it; a larger
    one spills. Four classes of 16 latents keep as many sums as one of 64.
    """
    if itemsize == 4:  # products on the ordinary pipes, operands in registers
        return ReconstructionBlocks(32, 32, 32, 32, group=1, warps=4)
    group = 4 if latents <= 16 else 2 if latents <= 32 else 1
    return ReconstructionBlocks(128, 128, fixed=128, moving=64, group=group, warps=8)
