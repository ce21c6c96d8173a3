"""classifier32, the small VGG-like network of the open-set literature, at any width.

Nine 3 x 3 convolutions in three stages, as in Neal et al., "Open Set Learning with Counterfactual
Images", ECCV 2018, and in the papers that compare with it. The pooled last map feeds a linear head
directly, so the class activation map of class k is the map times row k of the head's weight.
"""

from torch import Tensor, nn

from backmix.train.models.heads import Head, classify


def _convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.2, inplace=True),
    ]


class Classifier32(nn.Module):
    """Nine convolutions, strides 1 1 2 three times; a head without bias."""

    head: Head
    rejection: nn.Linear | None
    """SSOD's head, known = positive; None where the method has none."""

    def __init__(self, classes: int, width: int = 64, dropout: float = 0.2):
        """Make the network with freshly drawn weights.

        Args:
            classes: number of classes K.
            width: channels of the first two convolutions; the others have twice as many.
            dropout: share of whole channels zeroed before each stage. Before the first stage these
                are colour channels of the input image.
        """
        super().__init__()
        wide = 2 * width
        self.features = nn.Sequential(
            nn.Dropout2d(dropout),
            *_convolution(3, width),
            *_convolution(width, width),
            *_convolution(width, wide, stride=2),
            nn.Dropout2d(dropout),
            *_convolution(wide, wide),
            *_convolution(wide, wide),
            *_convolution(wide, wide, stride=2),
            nn.Dropout2d(dropout),
            *_convolution(wide, wide),
            *_convolution(wide, wide),
            *_convolution(wide, wide, stride=2),
        )
        self.head = nn.Linear(wide, classes, bias=False)
        self.rejection = None
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.05)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [n, K] and the last feature map [n, 2 * width, g, g]."""
        features = self.features(images)
        return classify(self.head, features), features

    def grid(self, size: int) -> tuple[int, int]:
        """Return the height and width of the feature map for images of side `size` pixels."""
        side = -(-size // 8)
        return side, side
