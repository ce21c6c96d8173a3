"""One stored sample -> pixels: verified, decoded strictly, cut and resized.

This is what the pixels of a batch *mean*: libjpeg-turbo's accurate DCT and fancy upsampling of the
whole image, then the box, then torch's antialiased bilinear resize of uint8. Stored raw pixels take
the same way from the box on.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch.nn import functional

from backmix.pipeline.beton import RAW, BetonSet, Flag
from backmix.pipeline.options import usable_cores


def read_image(data: BetonSet, index: int, verify: bool = True) -> tuple[np.ndarray, bool]:
    """Return the whole image of a sample, uint8 [h, w, 3] RGB, and whether it decoded with warning.

    A JPEG that the decoder warns of is accepted only where the converter saw the same and noted it:
    a warning nobody expected is what damage looks like.

    Raises ValueError, naming file, sample and byte, if it is damaged.
    """
    stored = data.region(index, verify)
    height, width = data.sizes[index].tolist()
    if data.modes[index] == RAW:
        return stored.reshape(height, width, 3), False
    try:
        # Before decoding: a damaged header could ask for gigabytes.
        found = simplejpeg.decode_jpeg_header(stored)[:2]
        if found != (height, width):
            raise ValueError(f"its header says {found[0]} x {found[1]} pixels")
        try:
            return simplejpeg.decode_jpeg(stored, "RGB"), False
        except ValueError:
            expected = data.flags is not None and data.flags[index] & Flag.WARNED
            if not expected:
                raise
            return simplejpeg.decode_jpeg(stored, "RGB", strict=False), True
    except ValueError as error:
        raise ValueError(
            f"{data.where(index)} does not decode as JPEG of {height} x {width} pixels ({error}); "
            "backmix inspect --verify lists all such samples"
        ) from None


def checked_at_conversion(data: BetonSet, verify: bool) -> np.ndarray:
    """Return which samples' bytes, if their checksums are right, the converter has decoded.

    Args:
        data: the data set.
        verify: whether checksums are looked at; if not, nothing is known of any sample.

    Returns bool [N].
    """
    return np.concatenate(
        [
            np.full(shard.n, verify and shard.hashes is not None and _was_checked(shard.info))
            for shard in data.shards
        ]
    )


def _was_checked(info: dict[str, Any]) -> bool:
    options = info.get("options")
    return isinstance(options, dict) and options.get("check") in ("scaled", "full")


def cut(image: np.ndarray, box: np.ndarray, view: np.ndarray) -> None:
    """Write the box of an image, resized, into `view`.

    Args:
        image: uint8 [h, w, 3].
        box: y0, x0, h, w inside the image; of the view's own size it is copied as it is.
        view: uint8 [H, W, 3], written.
    """
    y0, x0, h, w = box.tolist()
    part = image[y0 : y0 + h, x0 : x0 + w]
    if part.shape == view.shape:
        view[...] = part
        return
    # torch warns of read-only memory, here the file's map; and what is not contiguous it copies
    # itself, at a third of the speed.
    if not (part.flags.writeable and part.flags.c_contiguous):
        part = part.copy()
    # The axis is added before the permutation: only so torch sees channels-last strides, and takes
    # its vectorised path.
    images = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(
        images, size=view.shape[:2], mode="bilinear", align_corners=False, antialias=True
    )
    view[...] = resized[0].permute(1, 2, 0).numpy()


def decoding_threads(count: int) -> ThreadPoolExecutor:
    """Start threads that decode beside a training loop; count 0 = one per core that we may use.

    torch's kernels would give each of these threads an OpenMP team of its own. The number of
    threads is a setting of the calling thread and, for threads that call torch later, of the
    process: every thread sets 1 for itself, and when all have done so the caller's number is set
    again, so that the training step keeps its threads.
    """
    count = count or usable_cores()
    training_threads = torch.get_num_threads()
    everybody = threading.Barrier(count + 1)

    def settle() -> None:
        torch.get_num_threads()  # a thread's first call takes over the number of the process
        torch.set_num_threads(1)
        everybody.wait()

    threads = ThreadPoolExecutor(count, thread_name_prefix="backmix-decode")
    try:
        for _ in range(count):
            threads.submit(settle)
        everybody.wait()
    except BaseException as error:  # let those go that wait
        everybody.abort()
        threads.shutdown()
        if isinstance(error, RuntimeError):  # a limit on the number of threads, or on memory
            raise OSError(
                f"cannot start {count} threads ({error}); lower --loader.threads"
            ) from error
        raise
    finally:
        torch.set_num_threads(training_threads)
    return threads
