"""The Python door: `backmix.load(PATH).predict(images)`.

```text
model = backmix.load("runs/a")
for decision in model.predict(["a.jpg", "b.jpg"]):
    print(decision.class_name if decision.accepted else decision.reason)
```
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
from PIL import Image

from backmix.pipeline.decode import decoding_threads
from backmix.pipeline.folder_images import problem_of, usual_view
from backmix.pipeline.images import MAX_PIXELS, check_size, decode_rgb, rgb_of
from backmix.pipeline.loader import MOST_THREADS
from backmix.pipeline.sources.source import Item
from backmix.pipeline.views import to_device
from backmix.train.decide.decider import Decider, open_decider
from backmix.train.decide.decision import Decision, decisions, failed
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.record import Record

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""An image: the path of a file, the bytes of one, a Pillow image, or uint8 [h, w, 3] or [h, w]."""
FEW = 8
"""Images that are read in the calling thread; more are read by several."""


def load(
    path: str | os.PathLike[str],
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    model: str = "",
    trust: bool = False,
) -> "Predictor":
    """Open what decides about images.

    Args:
        path: a run folder with a threshold (`backmix calibrate`), one of its threshold files, or an
            exported file (`backmix export`).
        device: auto: the GPU where there is one.
        model: of a run of --model MODULE:CALLABLE the same once more: it is imported.
        trust: open a .pt2 file: torch runs what is in it, so only your own or a trusted party's.

    Raises:
        ValueError: there is no threshold, it does not belong to the network, or what else is wrong,
            and what to do.
        OSError: what cannot be read.
    """
    options = PredictOptions(device=device, model=model, trust=trust)
    return Predictor(open_decider(Path(path), options))


@dataclass(frozen=True, eq=False)
class Predictor:
    """A network with its threshold, in memory.

    Several threads may call it at once: each reads its own images, and they take turns at the
    network. Calls keep nothing.
    """

    decider: Decider
    _turn: Lock = field(default_factory=Lock, repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the known classes."""
        return self.decider.record.classes

    @property
    def record(self) -> Record:
        """What is decided by, and where that comes from."""
        return self.decider.record

    def predict(
        self,
        images: Picture | Sequence[Picture],
        *,
        batch: int = 256,
        threads: int = 0,
        limit_pixels: int = MAX_PIXELS,
    ) -> list[Decision]:
        """Return a decision about each image, in order.

        An image that cannot be read does not raise: its decision is `error`, with the reason, in
        the words of `backmix predict`. The decisions are those of the command, too; of files also
        the numbers, but for what another composition of the batches changes (1e-5, relative).
        Pillow decodes JPEGs by a library of its own: pixels can differ by a level.

        Args:
            images: paths, encoded images (bytes), Pillow images or arrays uint8 [h, w, 3] (RGB) or
                [h, w] (gray), mixed at will; or one array uint8 [n, h, w, 3]; or a single image,
                whose decision comes as a list of one.
            batch: images per pass through the network.
            threads: that read and decode; 0 = one per core.
            limit_pixels: larger images are not decoded [pixels].

        Raises:
            ValueError: an array of another shape or dtype, and which one; options out of range.
            TypeError: something that is no image, and which one.
        """
        if batch < 1 or not 0 <= threads <= MOST_THREADS or not 1 <= limit_pixels <= MAX_PIXELS:
            raise ValueError(
                f"batch must be at least 1, threads 0 to {MOST_THREADS} and limit_pixels 1 to "
                f"{MAX_PIXELS:,}; got {batch}, {threads} and {limit_pixels}"
            )
        pictures = _several(images)
        for number, picture in enumerate(pictures):
            _refuse(number, picture)
        seen = self.decider.record.preprocessing

        def view(picture: Picture) -> np.ndarray | str:
            try:
                pixels = _pixels(picture, limit_pixels)
            except (ValueError, OSError, MemoryError) as error:
                return problem_of(error)
            return usual_view(pixels, seen.size, seen.crop, seen.eval_crop)[0]

        few = len(pictures) <= FEW or threads == 1
        with nullcontext() if few else decoding_threads(threads) as pool:
            return [
                decision
                for start in range(0, len(pictures), batch)
                for decision in self._decided(_views(view, pictures[start : start + batch], pool))
            ]

    def _decided(self, views: "list[np.ndarray | str]") -> Iterator[Decision]:
        """Yield the decisions about views, and about images with what is wrong with them."""
        good = [view for view in views if not isinstance(view, str)]
        found = iter(())
        if good:
            tensor = to_device(np.stack(good), self.decider.scorer.device)
            with self._turn:
                decided = self.decider.decide(tensor)
            found = iter(decisions(decided, self.classes))
        for view in views:
            yield failed(view) if isinstance(view, str) else next(found)


def _views(
    view: Callable[[Picture], np.ndarray | str],
    pictures: Sequence[Picture],
    pool: ThreadPoolExecutor | None,
) -> list[np.ndarray | str]:
    """Return the view of each image, or what is wrong with it."""
    return list((pool.map if pool else map)(view, pictures))


def _several(images: Picture | Sequence[Picture]) -> Sequence[Picture]:
    match images:
        case np.ndarray():
            return list(images) if images.ndim == 4 else [images]
        case str() | bytes() | os.PathLike() | Image.Image():
            return [images]
        case _:
            return list(images)


def _refuse(number: int, picture: Picture) -> None:
    """Refuse what is no image, whatever is in it."""
    match picture:
        case np.ndarray():
            colour = picture.ndim == 3 and picture.shape[2] == 3
            if picture.dtype != np.uint8 or not (colour or picture.ndim == 2):
                raise ValueError(
                    f"image {number} is an array of {picture.dtype} {list(picture.shape)}: give "
                    "uint8 [h, w, 3] (RGB) or [h, w] (gray), not normalised"
                )
        case str() | bytes() | os.PathLike() | Image.Image():
            pass
        case _:
            raise TypeError(
                f"image {number} is a {type(picture).__name__}: give a path, the bytes of a file, "
                "a Pillow image, or an array of uint8"
            )


def _pixels(picture: Picture, limit: int) -> np.ndarray:
    """Return an image, uint8 [h, w, 3]."""
    match picture:
        case np.ndarray():
            check_size(picture.shape[0], picture.shape[1], limit)
            return picture if picture.ndim == 3 else np.stack([picture] * 3, axis=2)
        case Image.Image():
            return rgb_of(picture, limit)
        case bytes():
            return decode_rgb(picture, limit)
        case _:
            return decode_rgb(Item("", -1, os.fsdecode(picture)).read(), limit)
