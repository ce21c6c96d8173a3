"""Confusing samples of ARPL+CS: a GAN beside the network, and pairs of BatchNorms in it.

Chen, Peng, Wang, Tian: "Adversarial Reciprocal Points Learning for Open Set Recognition" (TPAMI
2021). The generator learns images that look real and lie equally far from all reciprocal points;
the network learns to keep them there. Widths, kernels and initial weights are those of the authors'
code, which follow Radford, Metz, Chintala: "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks" (ICLR 2016).
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from backmix.pipeline import draws
from backmix.pipeline.batch import Batch
from backmix.pipeline.views import to_device
from backmix.train.models.build import Model
from backmix.train.models.heads import ReciprocalPoints
from backmix.train.options import CONFUSING_SIZES, Arpl, Augment

LATENT = 100
"""Numbers that an image is generated from."""
GENERATOR = {4: 512, 8: 256, 16: 128, 32: 64}
"""Channels of the generator's hidden maps, by their side; those smaller than the image are made."""
DISCRIMINATOR = (128, 256, 512, 1024)
"""Channels of the discriminator's hidden maps."""
SLOPE = 0.2
"""Of the discriminator's LeakyReLU."""
STREAM = 255
"""Number of the stream of draws, beside `pipeline.draws.STREAMS`; never changed."""
SAME, FRESH = 0, 1
"""Which images of a step: those that discriminator and generator learn from, or the network."""


class PairedBatchNorm(nn.BatchNorm2d):
    """A BatchNorm for real images, and a second one, `generated`, for generated images.

    The first keeps its own names in `state_dict`, so that a network of pairs holds all the names of
    the plain one, and besides, for a BatchNorm called NAME, `NAME.generated.weight`, `.bias`,
    `.running_mean`, `.running_var` and `.num_batches_tracked`.
    """

    def __init__(self, real: nn.BatchNorm2d):
        """Make a pair, both as `real` is."""
        super().__init__(real.num_features, real.eps, real.momentum)
        self.load_state_dict(real.state_dict())
        self.generated = copy.deepcopy(real)
        self.generating = False
        """Which one a whole batch passes; `generating` below sets it, evaluation never does."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise maps [n, C, h, w] by the one or the other."""
        return self.generated(input) if self.generating else super().forward(input)


def pair_norms(model: Model) -> None:
    """Replace every BatchNorm of a network by a pair that begins with two equal halves."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, PairedBatchNorm(child))


@contextmanager
def generating(model: Model) -> Iterator[None]:
    """Let all batches pass the BatchNorms of generated images meanwhile."""
    pairs = [module for module in model.modules() if isinstance(module, PairedBatchNorm)]
    for pair in pairs:
        pair.generating = True
    try:
        yield
    finally:
        for pair in pairs:
            pair.generating = False


def new_generator(size: int) -> nn.Sequential:
    """Return a generator without weights: [n, 100, 1, 1] -> [n, 3, size, size] in 0 .. 1.

    Transposed 4 x 4 convolutions, the first from one cell to 4 x 4, each further one doubling the
    side; BatchNorm and ReLU between them.

    Raises:
        ValueError: a size that is not one of `CONFUSING_SIZES`.
    """
    if size not in CONFUSING_SIZES:
        allowed = " or ".join(map(str, CONFUSING_SIZES))
        raise ValueError(f"images can be generated with sides of {allowed} pixels, not {size}")
    hidden = [channels for side, channels in GENERATOR.items() if side < size]
    layers: list[nn.Module] = [nn.ConvTranspose2d(LATENT, hidden[0], 4, bias=False)]
    for inputs, outputs in pairwise((*hidden, 3)):
        layers += [nn.BatchNorm2d(inputs, track_running_stats=False), nn.ReLU(inplace=True)]
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.Sigmoid())


def new_discriminator() -> nn.Sequential:
    """Return a discriminator without weights: [n, 3, S, S], S at least 32 -> logits [n, 1].

    4 x 4 convolutions, three of stride 2 and one of stride 1 without padding; BatchNorm after the
    two in the middle; a Sigmoid on the last maps, their mean, a linear layer. Its Sigmoid is left
    to the loss, which is more exact so.
    """
    first, second, third, last = DISCRIMINATOR
    return nn.Sequential(
        nn.Conv2d(3, first, 4, stride=2, padding=1, bias=False),
        nn.LeakyReLU(SLOPE, inplace=True),
        nn.Conv2d(first, second, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(second, track_running_stats=False),
        nn.LeakyReLU(SLOPE, inplace=True),
        nn.Conv2d(second, third, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(third, track_running_stats=False),
        nn.LeakyReLU(SLOPE, inplace=True),
        nn.Conv2d(third, last, 4, bias=False),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(last, 1),
    )


def draw_weights(network: nn.Module, random: torch.Generator) -> None:
    """Draw convolutions from N(0, 0.02), BatchNorms from N(1, 0.02), linear ones as torch does."""
    for module in network.modules():
        match module:
            case nn.Conv2d() | nn.ConvTranspose2d():
                nn.init.normal_(module.weight, 0.0, 0.02, generator=random)
            case nn.BatchNorm2d():
                nn.init.normal_(module.weight, 1.0, 0.02, generator=random)
                nn.init.zeros_(module.bias)
            case nn.Linear():
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=random)
                nn.init.uniform_(module.bias, -bound, bound, generator=random)


def latents(seed: int, epoch: int, index: np.ndarray, which: int) -> np.ndarray:
    """Draw what images are generated from: standard normal, float32 [n, 100].

    A pure function of its arguments, so that nothing is saved to continue a run.

    Args:
        seed, epoch, index: as in `pipeline.draws.block`; an image is drawn beside each sample.
        which: SAME or FRESH.
    """
    index = np.asarray(index, np.int64)[:, None]
    blocks = -(-LATENT // 4)
    counter = np.empty((len(index), blocks, 4), np.uint32)
    counter[..., 0] = index & 0xFFFFFFFF
    counter[..., 1] = index >> 32 | STREAM << 24
    counter[..., 2] = epoch
    counter[..., 3] = blocks * which + np.arange(blocks)
    words = draws.philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(len(index), -1, 2)
    # Box and Muller (1958): two uniform numbers, the first never 0, give two normal ones.
    radius = np.sqrt(-2 * np.log((words[..., 0] + 1.0) * 2.0**-32))
    angle = words[..., 1] * (2 * np.pi * 2.0**-32)
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return normal.reshape(len(index), -1)[:, :LATENT].astype(np.float32)


def certainty(distances: Tensor) -> Tensor:
    """Return E = exp(mean over images of sum_k q_k log q_k), 0-d in 1/K .. 1.

    q is the softmax of the distances, float [n, K]: 1/K where every image lies equally far from all
    reciprocal points, 1 where all are sure of a class. As in the authors' code the mean over the
    images is inside the exponential, and the distances are without the product that logits have.
    """
    log_q = F.log_softmax(distances, 1)
    return (log_q.exp() * log_q).sum(1).mean().exp()


class Confusion:
    """Generator, discriminator and their optimizers, which step on their own.

    Every even epoch a batch passes three steps: the discriminator learns to tell its images from
    generated ones, the generator learns to be taken for real and to be confusing, and the network
    learns from the batch and from freshly generated images. All three networks stay in training
    mode; no running statistics of generator and discriminator are kept, since nothing reads them.
    """

    def __init__(
        self, options: Arpl, augment: Augment, size: int, seed: int, device: torch.device
    ) -> None:
        """Draw both networks' weights; a pure function of the seed.

        Args:
            options: beta is the weight of the certainty.
            augment: generated images are normalised as the run's views are.
            size: side of the views [pixels].
            seed: of the run.
            device: where everything lives.

        Raises:
            ValueError: a size that no generator is made for.
        """
        self.beta = options.beta
        word = draws.philox(
            np.array([0, STREAM << 24, 0, 0xFFFFFFFF], np.uint32), (seed & 0xFFFFFFFF, seed >> 32)
        )
        random = torch.Generator().manual_seed(int(word[0]) << 32 | int(word[1]))
        with torch.device("meta"):  # the run's own generator is left alone
            networks = new_generator(size), new_discriminator()
        for network in networks:
            draw_weights(network.to_empty(device="cpu"), random)
            network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.generator, self.discriminator = networks
        self.optimizers = {
            "generator": _adam(self.generator),
            "discriminator": _adam(self.discriminator),
        }
        self.device = device
        mean, std = torch.tensor([augment.mean, augment.std]).view(2, 1, 3, 1, 1)
        self.scale, self.offset = (255 / std).to(device), (mean / std).to(device)
        self.live = self._named()
        """Weights and Adam's state: always the same tensors, changed in place."""
        self.safe = {name: value.clone() for name, value in self.live.items()}
        """Copies of them from before the steps of the batch in hand."""

    def images(self, batch: Batch, which: int) -> Tensor:
        """Generate an image beside each of a batch, normalised, float [n, 3, size, size]."""
        place = batch.place
        z = to_device(latents(place.seed, place.epoch, batch.host.index, which), self.device)
        return self.generator(z[:, :, None, None]) * self.scale - self.offset

    def take_steps(self, images: Tensor, batch: Batch, model: Model) -> dict[str, Tensor]:
        """Let the discriminator learn from views and generated images, then the generator.

        Args:
            images: the views, float [n, 3, size, size].
            batch: what they are made of.
            model: the network; the BatchNorms of generated images see them, nothing else changes.

        Returns figures for the log: both losses, and whether a gradient was not finite so that a
        step was left out.
        """
        for name, value in self.live.items():
            self.safe[name].copy_(value)
        generated = self.images(batch, SAME)
        of_real, of_generated = self.discriminator(images), self.discriminator(generated.detach())
        told_apart = _taken_for(of_real, 1.0) + _taken_for(of_generated, 0.0)
        void = _step(self.optimizers["discriminator"], told_apart, batch.images)

        taken = _taken_for(self.discriminator(generated), 1.0)
        confused = taken + self.beta * self._certainty(generated, model)
        void = void | _step(self.optimizers["generator"], confused, batch.images)
        return {
            "discriminator_loss": told_apart.detach(),
            "generator_loss": confused.detach(),
            "gan_void": void.float(),
        }

    def fresh_certainty(self, batch: Batch, model: Model) -> Tensor:
        """Return the certainty of freshly generated images, 0-d, for the network's loss."""
        with torch.no_grad():
            generated = self.images(batch, FRESH)
        return self._certainty(generated, model)

    def settle(self, alive: Tensor) -> None:
        """Take the steps of this batch back where `alive` is 0: a void step changes nothing."""
        for name, value in self.live.items():
            torch.where(alive > 0, value, self.safe[name], out=value)

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and Adam's state, by the names of network, parameter and slot."""
        return dict(self.live)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` returned."""
        for name, value in self.live.items():
            value.copy_(tensors[name])

    def _named(self) -> dict[str, Tensor]:
        named = {}
        for label, optimizer in self.optimizers.items():
            network = self.generator if label == "generator" else self.discriminator
            for name, parameter in network.named_parameters():
                named[f"{label}.{name}"] = parameter.detach()
                for slot, value in optimizer.state[parameter].items():
                    named[f"{label}.{name}.{slot}"] = value
        return named

    def _certainty(self, generated: Tensor, model: Model) -> Tensor:
        assert isinstance(model.head, ReciprocalPoints)
        with generating(model):
            _, features = model(generated)
        return certainty(model.head.distances(features))


def _taken_for(logits: Tensor, target: float) -> Tensor:
    """Return the discriminator's binary cross-entropy with 1 = real, 0 = generated."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _adam(network: nn.Module) -> torch.optim.Adam:
    """Return Adam with the settings of the authors' code, its state there from the beginning."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
    for parameter in network.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _step(optimizer: torch.optim.Adam, loss: Tensor, images: int) -> Tensor:
    """Take a step unless a gradient is not finite; returns whether it was left out, 0-d bool.

    Only the optimizer's own parameters receive gradients, whatever else the loss went through: the
    mean over all `images` of which the loss is one, in all processes that train together.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Under autocast, backward would round even the products that forward kept in fp32.
    with torch.autocast(loss.device.type, enabled=False):
        gradients = _over_processes(torch.autograd.grad(loss, parameters), images)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    void = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients, foreach=True))
    setattr(optimizer, "found_inf", void.float())  # noqa: B010
    setattr(optimizer, "grad_scale", None)  # noqa: B010
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    # Autocast keeps casts of weights, which have just changed, until its context ends.
    torch.clear_autocast_cache()
    return void


def _over_processes(gradients: Sequence[Tensor], images: int) -> Sequence[Tensor]:
    """Return the mean of gradients over the processes that train together.

    Args:
        gradients: of a mean over the images of this process.
        images: how many these are; of none nothing is taken.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return gradients
    flat = torch.cat([*(g.reshape(-1) for g in gradients), gradients[0].new_ones(1)])
    flat = flat * images if images else torch.zeros_like(flat)
    dist.all_reduce(flat)
    means = (flat[:-1] / flat[-1]).split([g.numel() for g in gradients])
    # As the parameters lie in memory, which fused optimizers want.
    return [
        torch.empty_like(g).copy_(mean.view_as(g)) for g, mean in zip(gradients, means, strict=True)
    ]
