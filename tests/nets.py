"""Small networks that know nothing of backmix, one of each kind that `models/probe.py` tells apart.

Each function takes the number of classes: what `--model tests.nets:NAME` calls. All take 32 px.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def body(channels: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, channels, 3, 2, 1, bias=False),
        nn.BatchNorm2d(channels),
    )


class Tailed(nn.Module):
    """Body, ReLU written into the map in place, mean, layers, classifier."""

    def __init__(self, classes: int, *layers: nn.Module, channels: int = 16, width: int = 16):
        super().__init__()
        self.body = body(channels)
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu_(self.body(images))
        return self.classifier(self.layers(self.pool(features)))


def plain(classes: int) -> nn.Module:
    """Exact, by functional pooling of what a functional, in-place ReLU wrote into a layer's map."""
    return Tailed(classes)


def dropped(classes: int) -> nn.Module:
    """Exact, with dropout before the classifier."""
    return Tailed(classes, nn.Dropout(0.5))


def normed(classes: int) -> nn.Module:
    """A BatchNorm between mean and classifier, which does nothing while it is fresh."""
    return Tailed(classes, nn.BatchNorm1d(16))


def widened(classes: int) -> nn.Module:
    """A hidden layer, BatchNorm and dropout between mean and classifier."""
    layers = nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Hardswish(inplace=True), nn.Dropout(0.3)
    return Tailed(classes, *layers, width=24)


def far_from_linear(classes: int) -> nn.Module:
    """A layer that is blind to small means and hears single cells."""
    network = Tailed(classes, nn.Hardshrink(1.0))
    nn.init.constant_(network.body[4].weight, 1.0)  # type: ignore[arg-type]
    return network


class _MaxPooled(Tailed):
    def pool(self, features: Tensor) -> Tensor:
        return features.amax((2, 3))


def max_pooled(classes: int) -> nn.Module:
    """Pools its map by the maximum."""
    return _MaxPooled(classes)


class _Flattened(Tailed):
    def pool(self, features: Tensor) -> Tensor:
        return features.flatten(1)


def flattened(classes: int) -> nn.Module:
    """Flattens its map into hidden layers."""
    return _Flattened(classes, nn.Linear(16 * 8 * 8, 16), nn.ReLU())


class _TwoHeads(Tailed):
    def __init__(self, classes: int):
        super().__init__(classes)
        self.other = nn.Linear(16, classes)
        for head in (self.other, self.classifier):  # as transformers begin
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.pool(F.relu(self.body(images)))
        return (self.classifier(pooled) + self.other(pooled)) / 2


def two_heads(classes: int) -> nn.Module:
    """The mean of two classifiers that both begin with zeros."""
    return _TwoHeads(classes)


class _ClassToken(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, classes)

    def tokens(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        token = self.token.expand(len(tokens), -1, -1)
        return self.norm(self.block(torch.cat([token, tokens], 1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.tokens(images)[:, 0])


def class_token(classes: int) -> nn.Module:
    """A transformer whose classifier reads a class token."""
    return _ClassToken(classes)


class _MeanToken(_ClassToken):
    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.tokens(images)[:, 1:].mean(1))


def mean_token(classes: int) -> nn.Module:
    """A transformer whose classifier reads the mean of all tokens but the class token."""
    return _MeanToken(classes)


class _Tuple(Tailed):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images), None


def returns_a_tuple(classes: int) -> nn.Module:
    return _Tuple(classes)


class _TupleInTraining(Tailed):
    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return (logits, None) if self.training else logits


def returns_a_tuple_in_training(classes: int) -> nn.Module:
    return _TupleInTraining(classes)


class _Typo(Tailed):
    def pool(self, features: Tensor) -> Tensor:
        return {"mean": features.mean((2, 3))}["maen"]


def has_a_typo(classes: int) -> nn.Module:
    return _Typo(classes)


def swin(classes: int) -> nn.Module:
    """timm's Swin transformer, small: maps are NHWC."""
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(2, 4),
        num_classes=classes, drop_path_rate=0.0,
    )  # fmt: skip


def mixer(classes: int) -> nn.Module:
    """timm's MLP mixer, small: maps are tokens."""
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(classes, 32, patch_size=8, num_blocks=2, embed_dim=16)


def convnext(classes: int) -> nn.Module:
    """timm's ConvNeXt, small: it normalises after pooling."""
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(num_classes=classes, output_stride=8, depths=(1,) * 4, dims=(8, 8, 16, 16))


def not_a_network(classes: int) -> int:
    return classes


def broken(classes: int) -> nn.Module:
    raise KeyError(f"no weights for {classes} classes")


def leaves(classes: int) -> nn.Module:
    raise SystemExit(f"usage: nets.py {classes}")


def wants_two(classes: int, width: int) -> nn.Module:
    return nn.Linear(classes, width)


def wrong_width(classes: int) -> nn.Module:
    return Tailed(classes + 1)
