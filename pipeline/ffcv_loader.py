"""The `ffcv` loader: stock ffcv's compiled pipeline, made to cut our boxes and to admit failures.

Stock ffcv draws its own crops from an unseeded generator and drops the decoder's return code, so
that a damaged image comes out as black or as another image. Here a decoder of our own reads the box
of each sample from, and writes the return code into, arrays that belong to us. ffcv decodes with
the fast DCT and resizes with OpenCV's INTER_AREA: its pixels are a little off those of the other
loaders (`docs/loaders.md`). ffcv is imported only when such a loader is opened.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from queue import Empty
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import simplejpeg
import torch

from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.beton import (
    DESCRIPTOR,
    HEADER,
    IMAGE,
    IMAGE_FIELD,
    JPG,
    REGION,
    VERSION,
    BetonSet,
)
from backmix.pipeline.decode import cut, read_image
from backmix.pipeline.options import usable_cores
from backmix.pipeline.plan import Plan
from backmix.pipeline.views import (
    GOOD,
    WARNED,
    Views,
    as_batch,
    empty_views,
    register,
    replace_row,
)


class Ffcv:
    """Batches from one persistent ffcv Loader over all files; every batch has its own memory."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.bad: dict[int, str] = {}
        self._running = False
        # Compiled code holds the addresses of these, so they live as long as the loader.
        self._images, self._maps = _where(plan.data)
        self._boxes = np.zeros((plan.data.n, 4), np.int32)
        self._codes = np.zeros(plan.data.n, np.int32)
        pixels = plan.data.sizes[plan.subset.index].astype(np.int64).prod(axis=1).max()
        self._scratch = np.empty(
            (plan.options.threads or usable_cores(), int(pixels) * 3), np.uint8
        )
        training_threads = torch.get_num_threads()
        try:
            self._stock: Any
            self._stock, self._decoder = _open_stock(
                plan, self._images, self._boxes, self._codes, self._scratch
            )
        finally:
            torch.set_num_threads(training_threads)  # ffcv sets its own number, twice

    def batches(self, place: Place) -> Iterator[Batch]:
        """Yield this rank's batches from `place` to the end of the epoch, one epoch at a time.

        Raises ValueError for a bad image with `on_bad` error, and for more bad ones than `max_bad`.
        """
        if self._stock is None:
            raise ValueError("the loader is closed")
        if self._running:
            raise ValueError(
                "the ffcv loader reads one epoch at a time: finish or close the other first"
            )
        parts = list(self.plan.parts(place))
        if not parts:
            return
        index = self.plan.subset.index[np.concatenate([part.positions for part in parts])]
        self._boxes[index] = self.plan.boxes(place, index)
        self._codes[index] = 0
        self._decoder.side = self.plan.size(place)
        maps = self._maps  # closing the loader meanwhile must not unmap what ffcv's threads read
        epoch = _start_epoch(self._stock, index.astype(np.uint64))
        self._running = True
        try:
            arrived = _arrivals(epoch, torch.get_num_threads())
            rest, replaced = np.empty(0), 0
            for part in parts:
                views = empty_views(self.plan, part, pinned=self.device.type == "cuda")
                pixels, row = views.pixels.numpy(), 0
                while row < len(pixels):
                    if self._stock is None:
                        raise ValueError("the loader was closed while its batches were read")
                    if not len(rest):
                        rest = next(arrived)
                    taken = min(len(pixels) - row, len(rest))
                    pixels[row : row + taken] = rest[:taken]
                    row, rest = row + taken, rest[taken:]
                self._judge(views)
                replaced = register(self.plan, views, self.bad, replaced)
                yield as_batch(self.plan, views, self.device)
        finally:
            _end_epoch(epoch)
            del maps
            self._running = False

    def _judge(self, views: Views) -> None:
        """Set the status of every row, and replace what is damaged."""
        data, verify = self.plan.data, self.plan.options.verify
        codes = self._codes[views.index]
        pixels = views.pixels.numpy()
        for row in range(len(codes)):
            index = int(views.index[row])
            try:
                if codes[row] or not _header_fits(data.region(index, verify), data, index):
                    # libjpeg-turbo says -1 for a harmless warning, too, and for an error it leaves
                    # another image's pixels: decode again, by the strict rules of all loaders.
                    image, warned = read_image(data, index, verify)
                    cut(image, views.boxes[row], pixels[row])
                    views.status[row] = WARNED if warned else GOOD
            except ValueError as error:
                replace_row(self.plan, views, row, error)

    def close(self) -> None:
        """Let go of ffcv's loader and its maps; batches already taken stay valid."""
        self._stock = None
        self._maps = []


def _header_fits(stored: np.ndarray, data: Any, index: int) -> bool:
    """Whether a JPEG says the size that the file says: ffcv would quietly scale it."""
    if data.modes[index] != JPG:
        return True
    return simplejpeg.decode_jpeg_header(stored)[:2] == tuple(data.sizes[index].tolist())


def _where(data: BetonSet) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return where every image is in memory, and the maps of the files, to be held meanwhile.

    So ffcv reads any number of files as one, through one pipeline that is compiled once; and by
    the offsets that our reader has checked.

    Returns: int64 [N, 5]: address, length [bytes], height, width, mode; and a map for each file.
    """
    maps = [shard.mapped() for shard in data.shards]
    bases = [array.ctypes.data for array in maps]
    base = np.repeat(np.array(bases, np.int64), [shard.n for shard in data.shards])
    address = base + data.pointers.astype(np.int64)
    columns = (address, data.byte_sizes, data.sizes[:, 0], data.sizes[:, 1], data.modes)
    return np.stack([column.astype(np.int64) for column in columns], axis=1), maps


# --- stock ffcv -----------------------------------------------------------------------------------


def _open_stock(
    plan: Plan, images: np.ndarray, boxes: np.ndarray, codes: np.ndarray, scratch: np.ndarray
) -> tuple[Any, Any]:
    """Return an ffcv Loader whose only output is the views of our boxes, and its decoder.

    It is opened on a stand-in of one sample, and its decoder reads the files: of a file ffcv would
    take the tables unchecked, and make Python objects of every row.

    Args:
        plan: what is delivered.
        images: int64 [N, 5] by sample number, as `_where` returns it.
        boxes: int32 [N, 4] by sample number, read by the decoder.
        codes: int32 [N] by sample number, written by the decoder: 0, or -1 on error or warning.
        scratch: uint8 [threads, P], a whole decoded image for each thread.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of distutils and of numba, nothing of ours
            # By name, so that this file can be checked where ffcv is not installed.
            numba: Any = import_module("numba")
            loader: Any = import_module("ffcv.loader")
    except ImportError as error:
        raise ValueError(
            f"the ffcv loader needs the package ffcv ({error}): pip install 'backmix[ffcv]', which "
            "needs g++, pkg-config, libturbojpeg and OpenCV; or choose --loader.loader turbo"
        ) from error
    # Two loaders read at the same time, training and validation, share numba's threads: its own
    # work queue would abort the process.
    if numba.config.THREADING_LAYER == "default":
        numba.config.THREADING_LAYER = "omp"

    options = plan.options
    decoder = _box_decoder(options.size, images, boxes, codes, scratch)
    with TemporaryDirectory(prefix="backmix-") as folder:
        path = Path(folder) / "one.beton"
        path.write_bytes(_stand_in())
        stock = loader.Loader(
            str(path),
            batch_size=-(-min(options.batch, len(plan.subset)) // plan.world),
            num_workers=min(len(scratch), numba.config.NUMBA_NUM_THREADS),
            os_cache=True,
            order=loader.OrderOption.SEQUENTIAL,  # never used: every epoch brings its own
            seed=0,  # else it takes one from numpy's global generator
            pipelines={"image": [decoder]},
            drop_last=False,
            batches_ahead=max(1, options.prefetch),
        )
    # Else it would map the stand-in. Read-only, as a map is: every later Loader changes the type of
    # writable arrays for the whole process, and code compiled for that would not be found again.
    nothing = np.zeros(1, np.uint8)
    nothing.setflags(write=False)
    stock.memory_manager.context.mmap = nothing
    return stock, decoder


def _stand_in() -> bytes:
    """Return a .beton file of one image, of which ffcv sees the tables only."""
    field = np.zeros(1, DESCRIPTOR)
    field["type_id"], field["name"] = IMAGE_FIELD, b"image"
    table = HEADER.itemsize + DESCRIPTOR.itemsize + IMAGE.itemsize
    header = np.array([(VERSION, 1, 1 << 21, 1, table)], HEADER)
    parts = (header, field, np.zeros(1, IMAGE), np.zeros(1, REGION))
    return b"".join(part.tobytes() for part in parts)


def _box_decoder(
    size: int, images: np.ndarray, boxes: np.ndarray, codes: np.ndarray, scratch: np.ndarray
) -> Any:
    """Return ffcv's decoder of crops with our boxes and with the return code kept.

    numba freezes the value of every array that compiled code closes over, so the arrays are passed
    as addresses. What is written there is int32 because ffcv marks the type "contiguous uint8" as
    read-only for the whole process, once its first Loader exists.

    Stock ffcv decodes every image of a step, in every slot, into memory of its own, gigabytes that
    it asks for anew in every epoch; here each thread keeps one image's memory, which stays in its
    cache.

    Its `side` is that of the views [pixels]; ffcv asks for it at the start of every epoch.

    Args:
        size: the first side.
        images, boxes, codes, scratch: as in `_open_stock`.
    """
    fields: Any = import_module("ffcv.fields.rgb_image")
    native: Any = import_module("ffcv.libffcv")
    query: Any = import_module("ffcv.pipeline.allocation_query").AllocationQuery
    compiler: Any = import_module("ffcv.pipeline.compiler").Compiler
    numba: Any = import_module("numba")
    types, carray = numba.types, numba.carray

    def pointer(kind: Any) -> Any:
        """Return a function for compiled code: an address -> a pointer to `kind`."""

        def at(typing_context: Any, address: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

            return types.CPointer(kind)(types.int64), generate

        return import_module("numba.extending").intrinsic(at)

    int32_at, uint8_at, int64_at = map(pointer, (types.int32, types.uint8, types.int64))
    thread = numba.get_thread_id
    n, (threads, length) = len(boxes), scratch.shape
    images_address = images.ctypes.data
    boxes_address, codes_address = boxes.ctypes.data, codes.ctypes.data
    scratch_address = scratch.ctypes.data

    class BoxDecoder(fields.ResizedCropRGBImageDecoder):
        side = size

        def declare_state_and_memory(self, previous_state: Any) -> Any:
            views, uint8 = (self.side, self.side, 3), np.dtype(np.uint8)
            state = dataclasses.replace(previous_state, jit_mode=True, shape=views, dtype=uint8)
            return state, query(views, uint8)

        @property
        def get_crop_generator(self) -> Any:  # abstract in the parent, not used by our code
            raise NotImplementedError

        def generate_code(self) -> Any:
            jpg = JPG
            samples = compiler.get_iterator()
            decode_jpeg = compiler.compile(native.imdecode)
            cut_and_resize = compiler.compile(native.resize_crop)

            def decode(batch_indices, views, metadata, storage_state):
                image_of = carray(int64_at(images_address), (n, 5))
                room = carray(uint8_at(scratch_address), (threads, length))
                box_of = carray(int32_at(boxes_address), (n, 4))
                code_of = carray(int32_at(codes_address), (n,))
                for row in samples(len(batch_indices)):
                    sample = batch_indices[row]
                    stored = carray(uint8_at(image_of[sample, 0]), (image_of[sample, 1],))
                    height, width = np.uint32(image_of[sample, 2]), np.uint32(image_of[sample, 3])
                    if image_of[sample, 4] == jpg:
                        image = room[thread()]
                        code_of[sample] = decode_jpeg(
                            stored, image, height, width, height, width, 0, 0, 1, 1, False, False
                        )
                        image = image[: 3 * height * width]
                        image = image.reshape(height, width, 3)
                    else:
                        image = stored.reshape(height, width, 3)
                    y0, x0 = box_of[sample, 0], box_of[sample, 1]
                    y1, x1 = y0 + box_of[sample, 2], x0 + box_of[sample, 3]
                    cut_and_resize(image, y0, y1, x0, x1, views[row])
                return views[: len(batch_indices)]

            decode.is_parallel = True  # pyright: ignore[reportFunctionMemberAccess]
            return decode

    return BoxDecoder((size, size))


def _start_epoch(stock: Any, order: np.ndarray) -> Any:
    """Start ffcv's thread on the samples `order`, uint64 [n], and return it."""
    iterator: Any = import_module("ffcv.loader.epoch_iterator")

    class Epoch(iterator.EpochIterator):
        """Stock ffcv's thread dies and its reader waits for ever; this one keeps the reason."""

        error: BaseException | None = None

        def run(self) -> None:
            try:
                super().run()
            except BaseException as error:
                self.error = error

    return Epoch(stock, order)


def _arrivals(epoch: Any, training_threads: int) -> Iterator[np.ndarray]:
    """Yield the views as ffcv finishes them, uint8 [k, H, W, 3], each valid until the next."""
    first = True
    while True:
        try:
            item = epoch.output_queue.get(timeout=0.2)
        except Empty:
            if epoch.is_alive() or not epoch.output_queue.empty():
                continue
            raise ValueError(f"ffcv's thread ended early: {epoch.error!r}") from epoch.error
        if first:
            # The thread set torch's number of threads, for itself and for threads to come.
            torch.set_num_threads(training_threads)
            first = False
        if item is None:
            return
        yield item[1][0]


def _end_epoch(epoch: Any) -> None:
    """End ffcv's thread, wherever it is, and wait for it.

    It looks at its own end signal only while its queue is full, so its work is taken away instead,
    and the queue kept empty until it notices.
    """
    epoch.iter_ixes = iter(())
    while epoch.is_alive():
        try:
            epoch.output_queue.get(timeout=0.02)
        except Empty:
            pass
    epoch.join()
    epoch.close()
