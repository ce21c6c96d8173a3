"""WRN-40-4 in the form that semi-supervised and open-set papers use (Huang et al., CSSR, 2022).

It differs from the published wide ResNet (Zagoruyko and Komodakis, BMVC 2016) in three ways that
results depend on: LeakyReLU(0.1), BatchNorm momentum 0.001, and blocks that change width convolve
their input without normalising it, except in the first stage. That code also normalises the input
there and throws the result away; the layer that nobody reads is left out here.
"""

import math

from torch import Tensor, nn

from backmix.train.models.heads import Head, classify


def _normalise(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels, momentum=0.001), nn.LeakyReLU(0.1, inplace=True))


class WideBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, normalised before each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, normalised: bool):
        """Make a block; `normalised` = the input is activated before the first convolution."""
        super().__init__()
        self.before1 = _normalise(inputs) if normalised else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.before2 = _normalise(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, [n, outputs, h / stride, w / stride]."""
        activated = self.before1(x)
        out = self.conv2(self.before2(self.conv1(activated)))
        # A projection reads what conv1 reads; an identity shortcut passes the raw input on.
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """Three stages of wide blocks, by default 64, 128 and 256 channels; the map is side / 4."""

    head: Head
    rejection: nn.Linear | None
    """SSOD's head, known = positive; None where the method has none."""

    def __init__(self, classes: int, depth: int = 6, widen: int = 4):
        """Make the network with freshly drawn weights.

        Args:
            classes: number of classes K.
            depth: blocks a stage; the network is counted as 6 * depth + 4 layers deep.
            widen: factor on the widths 16, 32, 64.
        """
        super().__init__()
        widths = [16 * widen, 32 * widen, 64 * widen]
        blocks: list[nn.Module] = []
        inputs = 16
        for stage, width in enumerate(widths):
            # Only the first stage normalises the input of a block that changes the width.
            blocks.append(WideBlock(inputs, width, 1 if stage == 0 else 2, normalised=stage == 0))
            blocks += [WideBlock(width, width, 1, normalised=True) for _ in range(depth - 1)]
            inputs = width
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), *blocks, _normalise(inputs)
        )
        self.head = nn.Linear(inputs, classes)
        self.rejection = None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                side = module.kernel_size[0]
                nn.init.normal_(
                    module.weight, 0.0, math.sqrt(2 / (side * side * module.out_channels))
                )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [n, K] and the last feature map [n, 64 * widen, g, g]."""
        features = self.features(images)
        return classify(self.head, features), features

    def grid(self, size: int) -> tuple[int, int]:
        """Return the height and width of the feature map for images of side `size` pixels."""
        side = -(-size // 4)
        return side, side
