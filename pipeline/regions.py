"""Decode only that part of a JPEG which a view shows: the package nvImageCodec, on the CPU.

A decoder of whole images throws away what the crop leaves out; this one skips it. The pixels are
those of `decode.py`, exactly, so that which decoder works is of no consequence but time; on opening
it has to prove that. The package is optional (extra `region`, or with DALI).

A region's decoder stops where the region ends, and takes foreign data for good. So it is given only
bytes that have been decoded whole and strictly before: those that the converter decoded, whose
checksum was verified just now.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import simplejpeg

from backmix.pipeline.beton import JPG, BetonSet, Flag
from backmix.pipeline.decode import checked_at_conversion, cut

NARROWEST = 16
"""Columns that are decoded at least. At a region's edges the package decodes the chroma that it
needs beside it and drops it, but not for the first column alone."""
WORTHWHILE = 0.95
"""Largest share of an image that is decoded as a region; above it there is nothing to skip."""

_loading = threading.Lock()


class Regions:
    """Cuts boxes out of the JPEGs of a data set, for any number of threads.

    Raises ValueError where the package is missing, or its pixels are not ours.
    """

    def __init__(self, data: BetonSet, verify: bool) -> None:
        self._data = data
        self._good = checked_at_conversion(data, verify) & (data.modes == JPG)
        if data.flags is not None:
            self._good &= (data.flags & Flag.WARNED) == 0
        self._codec: Any = _load()
        rgb = {"sample_format": self._codec.SampleFormat.I_RGB, "apply_exif_orientation": False}
        self._params = self._codec.DecodeParams(**rgb, color_spec=self._codec.ColorSpec.SRGB)
        self._own = threading.local()
        self._prove()

    def show(self, index: int, box: np.ndarray, view: np.ndarray) -> bool:
        """Write the box of a sample, resized, into `view`, if that can be done by its region.

        Args:
            index: sample number.
            box: y0, x0, h, w inside the image.
            view: uint8 [H, W, 3].

        Returns whether it was; else the image is to be decoded whole. Raises ValueError if the
        sample does not match its checksum.
        """
        height, width = self._data.sizes[index].tolist()
        if not self._good[index] or int(box[2]) * int(box[3]) > WORTHWHILE * height * width:
            return False
        stored = self._data.region(index)
        try:
            if simplejpeg.decode_jpeg_header(stored)[:2] != (height, width):
                return False
        except ValueError:  # `read_image` says it, with the sample's name
            return False
        part = self.decode(stored, box, width)
        if part is None:
            return False
        cut(part, np.array([0, 0, *box[2:]]), view)
        return True

    def decode(self, stored: np.ndarray, box: np.ndarray, width: int) -> np.ndarray | None:
        """Return the box of a JPEG, uint8 [h, w, 3]; valid until the thread's next one.

        Args:
            stored: the JPEG, uint8.
            box: y0, x0, h, w inside the image.
            width: of the image [pixels].

        Returns None where the package does not decode it.
        """
        y0, x0, h, w = box.tolist()
        left, right = max(x0 - max(NARROWEST - w, 0), 0), min(x0 + max(w, NARROWEST), width)
        own = self._own
        if not hasattr(own, "decoder"):
            own.decoder, own.image = self._decoder(), None
        try:
            stream = self._codec.CodeStream(stored)
            region = self._codec.Region(y0, left, y0 + h, right)
            part = stream.get_sub_code_stream(region=region)
            own.image = own.decoder.decode(part, image=own.image, params=self._params)
        except RuntimeError:
            own.image = None
        if own.image is None:
            return None
        pixels = np.asarray(own.image)
        if pixels.shape != (h, right - left, 3) or pixels.dtype != np.uint8:
            return None
        return pixels[:, x0 - left : x0 - left + w]

    def _decoder(self) -> Any:
        """Return a decoder for one thread; with one thread of its own it works in the caller's."""
        codec = self._codec
        return codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[codec.Backend(codec.BackendKind.CPU_ONLY)],
        )

    def _prove(self) -> None:
        """Compare boxes of made images with the whole images; raise ValueError if one differs."""
        picture = np.random.default_rng(0).integers(0, 256, (67, 93, 3), np.uint8)
        boxes = [(0, 0, 67, 1), (20, 1, 3, 40), (33, 31, 34, 62), (5, 77, 60, 3), (1, 16, 1, 32)]
        for kind in ("444", "422", "420"):
            stored = np.frombuffer(simplejpeg.encode_jpeg(picture, 80, "RGB", kind), np.uint8)
            whole = simplejpeg.decode_jpeg(stored, "RGB")
            for y0, x0, h, w in boxes:
                part = self.decode(stored, np.array([y0, x0, h, w]), picture.shape[1])
                if part is None or not np.array_equal(part, whole[y0 : y0 + h, x0 : x0 + w]):
                    raise ValueError(
                        "the installed nvidia-nvimgcodec decodes other pixels than libjpeg-turbo "
                        "does: choose --loader.decoder full"
                    )


def _load() -> Any:
    """Import the package; raises ValueError where it is missing or does not load."""
    with _loading, _silence():
        try:
            return import_module("nvidia.nvimgcodec")
        except (ImportError, OSError) as error:
            raise ValueError(
                f"decoding regions needs nvImageCodec ({error}): pip install 'backmix[region]'; "
                "or choose --loader.decoder full"
            ) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Discard what native code writes to stderr.

    On import the package complains in red of each GPU library that is not there; none is used.
    """
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
