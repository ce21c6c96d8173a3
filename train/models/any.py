"""Any classifier, as the methods need it: (logits, last feature map), with its own names in files.

`AnyModel` runs a network that knows nothing of it and takes the map out by a hook. Three cases:

* *exact*: the mean of the map is what the linear classifier reads. The map is handed on as it is.
* *local*: layers stand between mean and classifier. They are applied to each cell as if it were
  the whole map (a 1 x 1 convolution that was always there, with its norms and activations), and
  the map that results is moved as a whole, by one vector an image, so that its mean is what the
  classifier reads. Logits stay the network's own; class activation maps, which are read for their
  differences between cells, do not feel the move. How well the unmoved map agrees with the logits
  is its `fidelity`.
* *none*: no map says which cell speaks for what. What the classifier reads is handed on as a map of
  one cell: enough for methods and scores that pool the map first.
"""

from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from backmix.train.models.heads import CellSums, Head, Pointwise
from backmix.train.models.libraries import make_network
from backmix.train.models.probe import Layer, Parts, as_map, evaluating, probe, shaped

FIDELITY = 0.95
"""Least fidelity of a local map that is used without being told to."""
_FIXED = (_BatchNorm, _DropoutNd)
"""Layers that are in evaluation mode where a tail is applied to cells."""


def any_model(name: str, classes: int, size: int) -> "AnyModel":
    """Make a network of timm, torchvision or a callable, with fresh weights.

    Args:
        name: `timm/NAME`, `torchvision/NAME` or `MODULE:CALLABLE`.
        classes: number of classes K.
        size: side of the images [pixels].

    Raises:
        ValueError: there is no such network, or it is no classifier of that many classes.
    """
    return tapped(make_network(name, classes, size), size, classes, name)


def tapped(
    network: nn.Module, size: int, classes: int | None = None, name: str = "the network"
) -> "AnyModel":
    """Return a network that was made already as one that gives (logits, map), its weights its own.

    Args:
        network: from images float [n, 3, size, size] to logits [n, K].
        size: side of the images [pixels].
        classes: number of classes K that it must have; None = as many as it has.
        name: what errors call it.

    Raises:
        ValueError: it does not take such images, or gives no logits.
    """
    generator = torch.Generator().manual_seed(0)
    like = next(network.parameters(), torch.empty(0))
    images = torch.randn(2, 3, size, size, generator=generator).to(like)
    try:
        parts = probe(network, images)
        with evaluating(network), torch.no_grad():
            found = network(images).shape[1]
    except ValueError as error:
        raise ValueError(f"--model {name}: {error}") from error
    except Exception as error:  # whatever a network of other people raises
        first = (str(error) or repr(error)).strip().splitlines()[0]
        raise ValueError(
            f"--model {name} does not take images of {size} x {size} pixels: "
            f"{type(error).__name__}: {first}"
        ) from error
    if classes is not None and found != classes:
        raise ValueError(f"--model {name} gives {found} logits, but there are {classes} classes")
    return AnyModel(network, parts, found, name)


class AnyModel(nn.Module):
    """A network of any make; its own parameters are `net.*` here, and bare in files."""

    rejection: nn.Linear | None
    """SSOD's head, known = positive; None where the method has none."""
    method_head: Head | None
    """ARPL's or CSSR's head, in place of the network's classifier."""

    def __init__(self, net: nn.Module, parts: Parts, classes: int, name: str):
        """Tap a network at the places that `probe` found.

        Args:
            net: from images to logits.
            parts: what `probe` found in it.
            classes: number of classes K.
            name: what errors call it.
        """
        super().__init__()
        self.net = net
        self.parts = parts
        self.classes = classes
        self.name = name
        self.rejection = None
        self.method_head = None
        self.maps_in_training = True
        """Whether local maps are computed in training mode, too; exact ones cost nothing."""
        self.sums = CellSums()
        self._grids: dict[int, tuple[int, int]] = {}
        self._map: Tensor | None = None
        self._read: Tensor | None = None
        self._hooked: tuple[nn.Module, ...] = ()
        self._hooks: list[Any] = []
        self._tail: tuple[tuple[nn.Module, Layer], ...] = ()
        self.tap()

    @property
    def head(self) -> Head:
        """What reads the map: the network's classifier, or the head that a method put there."""
        if self.method_head is not None:
            return self.method_head
        if self.parts.classifier is None:
            return self.sums
        classifier = self._hooked[-1]
        if isinstance(classifier, nn.Conv2d):
            return Pointwise(classifier)
        assert isinstance(classifier, nn.Linear)
        return classifier

    @property
    def maps(self) -> Literal["exact", "local", "none"]:
        """How the map comes about; see the top of this file."""
        if self.parts.spot is None:
            return "none"
        return "local" if self.parts.tail else "exact"

    @property
    def why_not(self) -> str:
        """Where there is no map: what stands in the way, as the end of a sentence."""
        return self.parts.why_not

    def put_head(self, head: Head) -> None:
        """Let a head of another kind read the map; the network's classifier goes.

        Raises:
            ValueError: the network has no linear classifier whose place could be taken.
        """
        if self.parts.classifier is None:
            raise ValueError(f"--model {self.name}: {self.why_not or 'it sums up a map per class'}")
        parent, _, name = self.parts.classifier.rpartition(".")
        setattr(self.net.get_submodule(parent), name, nn.Identity())
        self.method_head = head
        self.tap()

    def tap(self) -> None:
        """Hook the layers that map and classifier input are taken from; layers may be replaced.

        To be called after layers were replaced by others (`train` does it, too) and before
        torch.compile.
        """
        parts, find = self.parts, self.net.get_submodule
        spot, classifier = parts.spot, parts.classifier
        wanted = tuple(find(name) for name in (spot and spot.module, classifier) if name)
        self._tail = tuple((find(layer.module), layer) for layer in parts.tail)
        if len(wanted) == len(self._hooked) and all(map(_is, wanted, self._hooked)):
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._hooked = [], wanted
        # Bound methods, not closures: a deep copy of the model then hooks itself.
        if spot is not None:
            module = wanted[0]
            self._hooks.append(
                module.register_forward_hook(self._keep_output)
                if spot.side == "output"
                else module.register_forward_pre_hook(self._keep_input)
            )
        if classifier is not None:
            self._hooks.append(wanted[-1].register_forward_pre_hook(self._keep_read))

    def train(self, mode: bool = True) -> "AnyModel":
        """Set the mode of all layers."""
        super().train(mode)
        self.tap()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [n, K] and the last feature map [n, C, g, g'] that `head` reads.

        One cell where there is no map, and where a local one is not wanted in training.
        """
        logits = self.net(images)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"--model {self.name} returns a {type(logits).__name__} in training, and logits "
                "[n, K] in evaluation: it must return logits always"
            )
        seen, self._map = self._map, None
        read, self._read = self._read, None
        spot = self.parts.spot
        skipped = self.parts.tail and self.training and not self.maps_in_training
        if spot is None or skipped:
            features = (logits if read is None else read)[:, :, None, None]
        else:
            assert seen is not None
            features = as_map(seen, spot)
            if self._tail:
                cells, whole = self._local(features)
                move = whole - cells.mean((1, 2))
                features = (cells + move[:, None, None]).to(features.dtype).permute(0, 3, 1, 2)
        if self.method_head is not None:
            logits = self.method_head(features)
        return logits, features

    def grid(self, size: int) -> tuple[int, int]:
        """Return the height and width of the map for images of side `size` pixels.

        Asked for the first time, it shows the network one image of that size.

        Raises:
            ValueError: the network does not take such images.
        """
        if size not in self._grids:
            like = next(self.parameters())
            images = like.new_zeros(1, 3, size, size)
            try:
                with evaluating(self), torch.no_grad():
                    height, width = self(images)[1].shape[2:]
            except (RuntimeError, AssertionError) as error:
                first = (str(error) or repr(error)).strip().splitlines()[0]
                raise ValueError(
                    f"--model {self.name} does not take images of {size} x {size} pixels: {first}"
                ) from error
            self._grids[size] = (height, width)
        return self._grids[size]

    @torch.no_grad()
    def fidelity(self, images: Tensor) -> float:
        """Return how well the unmoved map agrees with the network, in -1 .. 1; 1 for an exact one.

        The correlation, over images and classes, of the mean over the cells of the local logits
        with the logits; where the classifier gives every image the same ones (it begins with zeros,
        say) that of what it reads.

        Args:
            images: float [n, 3, H, W], normalised, as many as there is time for.

        Raises:
            ValueError: there is no map.
        """
        spot = self.parts.spot
        if spot is None:
            raise ValueError(f"--model {self.name}: {self.why_not}")
        if not self.parts.tail:
            return 1.0
        with evaluating(self):
            self.net(images)
            seen, self._map, self._read = self._map, None, None
            assert seen is not None
            cells, whole = self._local(as_map(seen, spot))
        pair = torch.stack([cells.mean((1, 2)), whole]).double()
        head = self.head
        if isinstance(head, nn.Linear):
            logits = pair @ head.weight.double().T
            if logits.std(1).amax() > 0:
                pair = logits if head.bias is None else logits + head.bias.double()
        return float(torch.corrcoef(pair.flatten(1))[0, 1])

    def describe(self) -> dict[str, Any]:
        """Return what was found, as plain values for config.json."""
        spot = self.parts.spot
        return {
            "maps": self.maps,
            "map": None if spot is None else asdict(spot),
            "tail": [layer.module for layer in self.parts.tail],
            "classifier": self.parts.classifier,
            "why_not": self.why_not,
        }

    def _local(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the tail makes of each cell [n, g, g', D], and of their mean [n, D], fp32."""
        n, channels, height, width = features.shape
        cells = features.permute(0, 2, 3, 1).reshape(-1, channels)
        rows = torch.cat([cells, features.mean((2, 3))])
        for module, layer in self._tail:
            # BatchNorm knows pooled maps; cells of one batch are no sample of them.
            fixed = [m for m in module.modules() if isinstance(m, _FIXED) and m.training]
            for part in fixed:
                part.training = False
            rows = module(shaped(rows, layer)).flatten(1)
            for part in fixed:
                part.training = True
        rows = rows.float()
        return rows[:-n].view(n, height, width, -1), rows[-n:]

    def _keep_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._map = output

    def _keep_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._map = args[0]

    def _keep_read(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._read = args[0].flatten(1)


def _is(a: object, b: object) -> bool:
    return a is b
