"""A network that costs next to nothing, for measuring what goes on around one.

    backmix train RECIPE --model bench.small_net:patches ...

Every patch of 32 x 32 pixels becomes a cell, as in a ResNet: 7 x 7 cells of a view of 224 pixels.
"""

from torch import Tensor, nn

CHANNELS = 64


class Patches(nn.Module):
    """One convolution without overlap, BatchNorm, the mean over the cells, a linear classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, CHANNELS, kernel_size=32, stride=32, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.active = nn.ReLU()
        self.head = nn.Linear(CHANNELS, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.active(self.norm(self.cells(images))).mean((2, 3)))


def patches(classes: int) -> nn.Module:
    """Return the network for so many classes."""
    return Patches(classes)
