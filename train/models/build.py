"""The networks by name.

Each returns (logits [n, K], feature map [n, C, g, g]). With the linear head that they are made
with, logits = head(map.mean((2, 3))), so the class activation map of class k is the map times row k
of the head's weight, exactly; methods put other heads in its place (`heads.py`).
"""

from backmix.train.models.any import AnyModel, any_model
from backmix.train.models.classifier32 import Classifier32
from backmix.train.models.libraries import is_foreign
from backmix.train.models.resnet import BasicBlock, Bottleneck, ResNet
from backmix.train.models.wrn import WideResNet

Model = Classifier32 | ResNet | WideResNet | AnyModel

NAMES = (
    "classifier32",
    "classifier32-half",
    "classifier32-quarter",
    "resnet18-cifar",
    "wrn40-4",
    "resnet18",
    "resnet50",
)
"""What `build` knows. resnet18 and resnet50 are made for 224 px, the others for 32 to 64 px."""


def build(name: str, classes: int, size: int) -> Model:
    """Make a network with weights drawn from torch's default generator.

    Args:
        name: one of `NAMES`.
        classes: number of classes K, at least 2.
        size: side of the images [pixels]; a feature map of one cell is refused, because it
            cannot show where a class is.

    Raises:
        ValueError: unknown name, fewer than two classes, or images too small for the network.
    """
    if classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {classes}")
    if is_foreign(name):
        return any_model(name, classes, size)
    model = _model(name, classes)
    if model.grid(size) <= (1, 1):
        raise ValueError(
            f"{name} leaves one cell of an image of {size} x {size} pixels, which cannot show "
            f"where a class is; use larger images, or a network for small ones like classifier32"
        )
    return model


def _model(name: str, classes: int) -> Model:
    match name:
        case "classifier32":
            return Classifier32(classes)
        case "classifier32-half":
            return Classifier32(classes, width=32)
        case "classifier32-quarter":
            return Classifier32(classes, width=16, dropout=0.0)
        case "resnet18-cifar":
            return ResNet(BasicBlock, (2, 2, 2, 2), classes, stem="cifar")
        case "wrn40-4":
            return WideResNet(classes)
        case "resnet18":
            return ResNet(BasicBlock, (2, 2, 2, 2), classes, stem="imagenet")
        case "resnet50":
            return ResNet(Bottleneck, (3, 4, 6, 3), classes, stem="imagenet")
        case _:
            raise ValueError(f"no model is called {name!r}; there are {', '.join(NAMES)}")
