"""Small pictures of images that a table names, for a page: found again, decoded, made small."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import isfile, lexists

import numpy as np
from PIL import Image

from backmix.pipeline import shards
from backmix.pipeline.beton import BetonSet, open_set
from backmix.pipeline.decode import read_image
from backmix.pipeline.folder_images import problem_of
from backmix.pipeline.images import decode_rgb, encode_jpeg, shrink
from backmix.pipeline.sources.source import Item, split_file, suffix
from backmix.pipeline.sources.tar import tar_members
from backmix.train.decide.sources import name_of

SIDE = 160
"""Longer side of a picture [pixels]."""
MOST_BYTES = 3_500_000
"""Of all pictures of a page together, as they stand in it."""
_EXACT = 64
"""Images up to this side are kept pixel by pixel [pixels]."""
_QUALITY = 80


@dataclass(frozen=True)
class Thumbnail:
    """A small picture, or why there is none."""

    source: str = ""
    """data: URI; empty where there is no picture."""
    problem: str = ""


@dataclass(frozen=True)
class Tile:
    """An image on a page."""

    source: str
    """data: URI; empty where there is no picture."""
    problem: str
    """Why there is none."""
    alt: str
    """What it shows, for readers who do not see it."""
    lines: tuple[str, ...]
    """What stands below it."""


def thumbnail(pixels: np.ndarray) -> Thumbnail:
    """Return a small picture of pixels, uint8 [h, w, 3]."""
    small = shrink(pixels, max_side=SIDE)
    if max(small.shape[:2]) <= _EXACT:
        file = io.BytesIO()
        Image.fromarray(small).save(file, "png", optimize=True)
        return Thumbnail(_data_uri(file.getvalue(), "png"))
    return Thumbnail(_data_uri(encode_jpeg(small, _QUALITY), "jpeg"))


def thumbnails(
    texts: Sequence[str], say: Callable[[str], None] = lambda text: None
) -> list[Thumbnail]:
    """Return small pictures of images as a table of predictions names them, [n].

    Paths count from the working folder, as they did when the table was made. Images are decoded
    within the limits of all others; when all pictures together reach `MOST_BYTES` the rest is left
    out.

    Args:
        texts: paths, TAR//MEMBER or FILE.beton//NAME, as `sources.as_text` writes them.
        say: called with a line of progress now and then.
    """
    with _Finder(texts) as finder:
        found, total = [], 0
        for number, text in enumerate(texts):
            say(f"pictures: {number:,} of {len(texts):,}")
            if total >= MOST_BYTES:
                found.append(Thumbnail(problem="left out: the page would be too large"))
                continue
            try:
                found.append(thumbnail(finder.pixels(text)))
            except (ValueError, OSError) as error:
                found.append(Thumbnail(problem=problem_of(error)))
            total += len(found[-1].source)
        return found


class _Finder:
    """Reads images by their texts; what lies in one container is looked up together."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._places = {text: _split(name_of(text)) for text in texts}
        self._wanted: dict[str, set[str]] = {}
        for file, member in self._places.values():
            if member:
                self._wanted.setdefault(file, set()).add(member)
        self._tars: dict[str, dict[str, Item]] = {}
        self._betons: dict[str, tuple[BetonSet, dict[str, int]]] = {}

    def pixels(self, text: str) -> np.ndarray:
        """Return an image, uint8 [h, w, 3]; ValueError or OSError where it cannot be had."""
        file, member = self._places[text]
        if not lexists(file):
            raise ValueError("not there any more, or named from another folder")
        if not member:
            return decode_rgb(Item(file, -1, file).read())
        if suffix(file) == ".beton" or shards.is_manifest(file):
            data, numbers = self._beton(file)
            if member not in numbers:
                raise ValueError("not in its .beton file any more")
            return read_image(data, numbers[member])[0]
        if file not in self._tars:
            wanted = self._wanted[file]
            self._tars[file] = {
                m.name: Item(m.name, -1, file, m.offset, m.size)
                for m in tar_members(file)
                if m.kind == "file" and m.name in wanted
            }
        if member not in self._tars[file]:
            raise ValueError("not in its tar any more")
        return decode_rgb(self._tars[file][member].read())

    def _beton(self, file: str) -> tuple[BetonSet, dict[str, int]]:
        if file not in self._betons:
            data, wanted = open_set([file]), self._wanted[file]
            numbers = {name: i for i in range(data.n) if (name := data.name(i)) in wanted}
            self._betons[file] = data, numbers
        return self._betons[file]

    def __enter__(self) -> "_Finder":
        return self

    def __exit__(self, *exception: object) -> None:
        for data, _ in self._betons.values():
            data.close()


def _split(name: str) -> tuple[str, str]:
    """Return a file and, of a container, the name in it."""
    return (name, "") if isfile(name) else split_file(name)


def _data_uri(picture: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
