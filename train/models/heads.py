"""What reads the last feature map: class heads beside the linear one, and what each says of a cell.

A network is a body, whose last map is [n, C, g, g'], and a head. The linear head is a plain
`nn.Linear` on the pooled map, so that its weights fit other libraries' files; the heads of ARPL and
CSSR are modules of their own that read the map itself. SSOD adds a rejection head beside the class
head.
"""

import math

import torch
from torch import Tensor, nn

from backmix.kernels.class_reconstruction import class_reconstruction


class ReciprocalPoints(nn.Module):
    """ARPL's head: one reciprocal point p_k in R^C per class, and one radius R.

    Chen, Peng, Wang, Tian: "Adversarial Reciprocal Points Learning for Open Set Recognition" (TPAMI
    2021). A reciprocal point stands for what its class is not, so the logit of class k grows with
    the distance of the pooled feature f in R^C: z_k = |f - p_k|^2 / C - f . p_k. As in the
    authors' code the squared distance is divided by C, the product is not.
    """

    def __init__(self, classes: int, channels: int):
        """Draw the points from 0.1 N(0, 1); the radius begins at 0."""
        super().__init__()
        self.points = nn.Parameter(0.1 * torch.randn(classes, channels))
        self.radius = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [n, K] of maps [n, C, g, g'], at least float32 also under autocast."""
        distances, products = self._terms(features)
        return distances - products

    def distances(self, features: Tensor) -> Tensor:
        """Return |f - p_k|^2 / C [n, K] of maps [n, C, g, g'], at least float32."""
        return self._terms(features)[0]

    def _terms(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return |f - p_k|^2 / C and f . p_k, [n, K] each."""
        # Autocast would round f and p_k to 8 bits before squares of nearly equal size are
        # subtracted. Multiplied out, nothing of the size [n, K, C] is ever made.
        with torch.autocast(features.device.type, enabled=False):
            wide = torch.promote_types(features.dtype, torch.float32)
            pooled = features.mean((2, 3), dtype=wide)
            points = self.points.to(wide)
            products = pooled @ points.T
            squares = pooled.square().sum(1, keepdim=True) + points.square().sum(1)
            return (squares - 2 * products) / points.shape[1], products


class Reconstruction(nn.Module):
    """CSSR's head: an auto-encoder per class that sees one cell at a time.

    Huang, Wang, Wang, Zhu, Hu: "Class-Specific Semantic Reconstruction for Open Set Recognition"
    (TPAMI 2022). With the features F_l of cell l and e_k(l) = |D_k tanh(E_k F_l) - F_l|_1, a cell's
    logit is -gamma e_k(l) for prototypes (PCSSR: the class that rebuilds best) and +gamma e_k(l)
    for reciprocal points (RCSSR: the class that rebuilds worst).
    """

    CLIP = 100.0
    """A cell's logits lie in -CLIP .. CLIP; what is clipped has no gradient. Channels that are 1 on
    the mean and not rebuilt at all come to gamma times their number."""

    def __init__(self, classes: int, channels: int, latent: int, gamma: float, *, reciprocal: bool):
        """Draw the weights as torch draws those of 1 x 1 convolutions; there are no biases.

        Args:
            classes: number of classes K.
            channels: of the feature map, C.
            latent: what an auto-encoder squeezes C channels into, L.
            gamma: logit per unit of reconstruction error, above 0.
            reciprocal: whether a class is known by the error of its auto-encoder being large.
        """
        super().__init__()
        self.gamma = gamma
        self.reciprocal = reciprocal
        self.encoder = nn.Parameter(torch.empty(classes, latent, channels))
        """[K, L, C]"""
        self.decoder = nn.Parameter(torch.empty(classes, latent, channels))
        """[K, L, C], from latents to channels: the transposed kernel of the convolution."""
        nn.init.uniform_(self.encoder, -(channels**-0.5), channels**-0.5)
        nn.init.uniform_(self.decoder, -(latent**-0.5), latent**-0.5)

    def cell_logits(self, features: Tensor) -> Tensor:
        """Return each cell's logits, fp32 [n, K, g, g'] in -CLIP .. CLIP, of maps [n, C, g, g']."""
        n, _, height, width = features.shape
        cells = features.permute(0, 2, 3, 1).flatten(0, 2)
        errors = class_reconstruction(cells, self.encoder, self.decoder)
        logits = errors * (self.gamma if self.reciprocal else -self.gamma)
        logits = logits.clamp(-self.CLIP, self.CLIP)
        return logits.view(n, height, width, -1).permute(0, 3, 1, 2)

    def forward(self, features: Tensor) -> Tensor:
        """Return log p, fp32 [n, K], of maps [n, C, g, g'].

        p_k is the mean over the cells of softmax_k. It is never computed itself: cells that are
        sure of another class have probabilities that fp32 rounds to 0.
        """
        of_cells = self.cell_logits(features).flatten(2).log_softmax(1)
        return of_cells.logsumexp(2) - math.log(of_cells.shape[2])

    @torch.no_grad()
    def cell_probabilities(self, features: Tensor) -> Tensor:
        """Return the softmax of `cell_logits` over the classes, without gradients."""
        return self.cell_logits(features).softmax(1)


class Pointwise(nn.Linear):
    """A 1 x 1 convolution that classifies one cell, as the linear layer that it is.

    Its parameters are the convolution's own and are not registered here.
    """

    def __init__(self, convolution: nn.Conv2d):
        nn.Module.__init__(self)
        self.of = (convolution,)  # in a tuple, no child
        self.in_features = convolution.in_channels
        self.out_features = convolution.out_channels

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The kernel as [K, C]."""
        return self.of[0].weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias [K], if there is one."""
        return self.of[0].bias


class CellSums(nn.Module):
    """The head of a network whose map has a channel per class already: logits are its means.

    Also of one whose logits come from no single linear layer: then they are a map of one cell.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [n, K] of maps [n, K, g, g']."""
        return features.mean((2, 3))


Head = nn.Linear | ReciprocalPoints | Reconstruction | CellSums


def linear_head(model: nn.Module) -> nn.Linear:
    """Return the class head of a network where it is linear; TypeError where it is not."""
    head = model.head
    if not isinstance(head, nn.Linear):
        raise TypeError(f"the head is a {type(head).__name__}, not linear")
    return head


def put_head(model: nn.Module, head: Head) -> None:
    """Give a network another class head, under the name that its own linear one has.

    Networks of other people keep it beside (`any.AnyModel.put_head`).
    """
    if hasattr(model, "put_head"):
        model.put_head(head)  # type: ignore[operator]
        return
    name = "fc" if hasattr(model, "fc") else "head"
    setattr(model, name, head)


def classify(head: nn.Module, features: Tensor) -> Tensor:
    """Return the logits [n, K] that a head gives to maps [n, C, g, g']."""
    return head(features.mean((2, 3))) if isinstance(head, nn.Linear) else head(features)


def cam_inputs(head: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps [n, D, g, g'] and weights [K, D] whose product is the activation map of a class.

    The map of class k is sum_d weights[k, d] maps[:, d], up to an order-preserving change: what
    `update_cam_bank` takes. Linear: the features and its weight (Zhou et al., "Learning Deep
    Features for Discriminative Localization", 2016). Reciprocal points: |f|^2 / C is common to all
    classes, so the logits are linear in f with the weight -(1 + 2 / C) p_k. Reconstruction: each
    cell's class probabilities are a map already; the weights are the identity. Cell sums: the
    features are the maps.
    """
    match head:
        case ReciprocalPoints():
            return features, head.points.detach() * -(1 + 2 / head.points.shape[1])
        case Reconstruction():
            return head.cell_probabilities(features), torch.eye(
                len(head.encoder), device=features.device
            )
        case nn.Linear():
            return features, head.weight.detach()
        case CellSums():
            return features, torch.eye(features.shape[1], device=features.device)
        case _:
            raise TypeError(f"no activation maps are known of a head that is {type(head).__name__}")
