"""Training on many GPUs on paper: bytes, files and memory, by formulas from what is known of one.

Nothing here is measured; `tests/train/test_bench_scale.py` holds the constants against the
networks, and the bytes against what the code really sends and stores. `plot.py` makes the tables
of `docs/scale.md` of it. Needs no torch.
"""

import math
from dataclasses import dataclass

SAMPLES = 1_281_167
"""Training images of ImageNet-1k."""
GPUS = (8, 64, 512)
PER_NODE = 8
"""GPUs of a node."""
PER_GPU = 256
"""Images of a step on each GPU."""
LINK = 50e9
"""Bytes a second into and out of a GPU over the network: 400 Gb/s."""
FLOAT, DOUBLE, HALF, NUMBER = 4, 8, 2, 8
"""Bytes of float32, float64, float16 and of a row's number."""
CPU_GENERATOR, CUDA_GENERATOR = 5056, 16
"""Bytes of torch's generators."""


@dataclass(frozen=True)
class Network:
    """What a network of 1,000 classes is made of, at views of 224 pixels."""

    name: str
    parameters: int
    channels: int
    """That BatchNorm normalises, over all its layers."""
    norms: int
    """Layers of BatchNorm."""
    cells: int = 49
    """Of the last map."""

    @property
    def buffers(self) -> int:
        """Return the number of buffer entries: means, variances, and a count for each layer."""
        return 2 * self.channels + self.norms

    @property
    def bank_row(self) -> int:
        """Return the bytes of an image's map in BackMix's bank."""
        return HALF * self.cells

    @property
    def bank(self) -> int:
        """Return the bytes of the bank."""
        return SAMPLES * self.bank_row

    @property
    def weights(self) -> int:
        """Return the bytes of parameters and buffers; a layer's count is an int64."""
        return FLOAT * (self.parameters + 2 * self.channels) + 8 * self.norms


RESNET18 = Network("ResNet-18", 11_689_512, 4_800, 20)
RESNET50 = Network("ResNet-50", 25_557_032, 26_560, 53)


def ring(size: float, gpus: int) -> float:
    """Return what each GPU sends, and receives, to sum `size` bytes over all by a ring.

    2 (W - 1) / W times the bytes: a reduce-scatter and an all-gather (Patarasuk, Yuan: "Bandwidth
    optimal all-reduce algorithms for clusters of workstations", 2009).
    """
    return 2 * (gpus - 1) / gpus * size


def steps(gpus: int, samples: int = SAMPLES, per_gpu: int = PER_GPU) -> int:
    """Return the steps of an epoch; the last one may be short."""
    return math.ceil(samples / (gpus * per_gpu))


def gradients(network: Network, gpus: int) -> float:
    """Return the bytes of gradients, float32, that each GPU sends in a step."""
    return ring(FLOAT * network.parameters, gpus)


def statistics(network: Network, gpus: int) -> float:
    """Return the bytes of BatchNorm's statistics, float64, that each GPU sends in a step."""
    return ring(DOUBLE * network.buffers, gpus)


def rows(network: Network, gpus: int) -> float:
    """Return the bytes of the bank's rows and their numbers that each GPU receives in an epoch.

    Every row reaches every GPU but the one that wrote it: N (W - 1) / W rows.
    """
    return SAMPLES * (gpus - 1) / gpus * (network.bank_row + NUMBER)


def checkpoint(network: Network, gpus: int, *, running_mean: bool = False) -> int:
    """Return the bytes of a checkpoint: weights, momentum, running mean, bank, generators.

    Meters and names are left out: some 100 kB.
    """
    return (
        network.weights * (1 + running_mean)
        + FLOAT * network.parameters
        + network.bank
        + gpus * (CPU_GENERATOR + CUDA_GENERATOR)
    )


def memory(network: Network, kept_per_image: int, images: int = PER_GPU) -> dict[str, float]:
    """Return the bytes that a GPU holds in a step, by what they are for; workspace is left out.

    Args:
        network: the network.
        kept_per_image: bytes that autograd keeps of an image for the backward pass.
        images: of a step on this GPU.
    """
    return {
        "parameters, gradients, momentum": 3.0 * FLOAT * network.parameters,
        "running mean (`--ema`)": float(network.weights),
        "BatchNorm statistics, and their copy": 2.0
        * (network.weights - FLOAT * network.parameters),
        "bank": float(network.bank),
        "rows written, one byte each": float(SAMPLES + 1),
        "views, bf16": 2.0 * 3 * 224 * 224 * images,
        "the pool of the batch and of the next one, uint8": 2.0 * 3 * 224 * 224 * images,
        "kept for backward": float(kept_per_image * images),
    }
