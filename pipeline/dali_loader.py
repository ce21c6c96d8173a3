"""The `dali` loader: NVIDIA DALI cuts our boxes out of the stored images, on a GPU or on the CPU.

DALI gets the stored bytes as views of the memory map, without a copy, and our boxes and sizes
beside them; it draws nothing and knows no epochs. What it may not see (a checksum or a header that
is wrong, a JPEG that decodes with a warning) is decoded by our own rules (`decode.py`), and so is
every image of a batch on which DALI fails: one damaged image costs it the whole batch. DALI is
imported only when such a loader is opened.

The decoded pixels are those of libjpeg-turbo on the CPU, exactly; DALI's resize is the stated one
within a level, but for the outermost ring of the view: there it repeats the crop's edge where torch
weighs what is inside (`docs/loaders.md`).
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.beton import JPG, RAW, Flag
from backmix.pipeline.decode import checked_at_conversion, decoding_threads
from backmix.pipeline.options import usable_cores
from backmix.pipeline.plan import Part, Plan
from backmix.pipeline.views import Views, as_batch, empty_views, fill_rows, register, to_device

CHUNK = 32
"""Images per task of the threads that check what DALI will get."""
MOST_FAILURES = 8
"""Batches in a row on which DALI may fail. Damage is found before, so that many mean that DALI
does not work here, and everything would quietly be decoded on the CPU."""


@dataclass(eq=False)
class _Step:
    """A part of a step on its way: checked by our threads, then with DALI."""

    views: Views
    stored: list[np.ndarray | None]
    """What DALI gets of each row; None: the row is filled already."""
    checks: list[Future[None]]
    running: list[tuple["_Graph", np.ndarray]] = field(default_factory=list)
    """Where DALI works on the step, and on which of its rows (int64 [k])."""


class Dali:
    """Batches from one persistent DALI pipeline, or two where JPEGs and pixels are stored.

    A batch's pool is DALI's own output, not a copy, and DALI writes other memory the next time. On
    a GPU it belongs to the stream that is current when the batch is taken.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.bad: dict[int, str] = {}
        self._good = checked_at_conversion(plan.data, plan.options.verify)
        self._graphs = {
            mode: _Graph(plan, device, mode)
            for mode in (JPG, RAW)
            if (plan.data.modes[plan.subset.index] == mode).any()
        }
        self._threads = decoding_threads(plan.options.threads)
        self._running = False
        self._closed = False

    def batches(self, place: Place) -> Iterator[Batch]:
        """Yield this rank's batches from `place` to the end of the epoch, one epoch at a time.

        Raises ValueError for a bad image with `on_bad` error, for more bad ones than `max_bad`, and
        if DALI fails again and again. Leaving early waits for the batches that DALI has begun.
        """
        if self._running:
            raise ValueError(
                "the dali loader reads one epoch at a time: finish or close the other first"
            )
        for mode, graph in self._graphs.items():
            if graph.interrupted or graph.failures:
                self._graphs[mode] = _Graph(self.plan, self.device, mode)
        prefetch = self.plan.options.prefetch
        checking: deque[_Step] = deque()
        running: deque[_Step] = deque()
        replaced = 0

        def finish() -> Batch:
            nonlocal replaced
            views = self._finish(running[0])
            running.popleft()
            replaced = register(self.plan, views, self.bad, replaced)
            return as_batch(self.plan, views, self.device)

        self._running = True
        try:
            for part in self.plan.parts(place):
                checking.append(self._check(part))
                if len(checking) > min(1, prefetch):  # with a step's time to be checked in
                    running.append(self._start(checking.popleft()))
                if len(running) > prefetch:
                    yield finish()
            while checking:
                running.append(self._start(checking.popleft()))
            while running:
                yield finish()
        finally:
            wait([task for step in checking for task in step.checks if not task.cancel()])
            for step in running:
                for graph, _ in step.running:
                    graph.discard()
            self._running = False

    def _check(self, part: Part) -> _Step:
        """Let the threads look at what a part has stored."""
        if self._closed:
            raise ValueError("the loader is closed")
        views = empty_views(self.plan, part)
        n = len(views.index)
        stored: list[np.ndarray | None] = [None] * n
        return _Step(
            views,
            stored,
            [
                self._threads.submit(
                    self._check_rows, views, stored, range(row, min(row + CHUNK, n))
                )
                for row in range(0, n, CHUNK)
            ],
        )

    def _check_rows(self, views: Views, stored: list[np.ndarray | None], rows: range) -> None:
        """Find what DALI gets of some rows, and fill those that it shall not see."""
        for row in rows:
            stored[row] = self._readable(int(views.index[row]))
            if stored[row] is None:
                fill_rows(self.plan, views, range(row, row + 1))

    def _readable(self, index: int) -> np.ndarray | None:
        """Return the stored bytes of a sample if DALI will decode them as `read_image` does.

        DALI reads no further than the box, and takes foreign data in between for good. So a sample
        that no converter has decoded, or whose bytes are not verified, is once decoded strictly
        here, at 1/8 scale.
        """
        data, verify = self.plan.data, self.plan.options.verify
        try:
            stored = data.region(index, verify)
            if data.modes[index] == RAW:
                return stored
            if data.flags is not None and data.flags[index] & Flag.WARNED:
                return None
            if simplejpeg.decode_jpeg_header(stored)[:2] != tuple(data.sizes[index].tolist()):
                return None
            if not self._good[index]:
                simplejpeg.decode_jpeg(stored, "RGB", min_height=1, min_width=1)
                self._good[index] = True
        except ValueError:
            return None
        return stored

    def _start(self, step: _Step) -> _Step:
        """Hand a checked step to DALI; an error found by the checks waits for the step's turn."""
        if not all([_ended_well(task) for task in step.checks]):
            return step
        views = step.views
        given = np.array([stored is not None for stored in step.stored], bool)
        for mode, graph in self._graphs.items():
            rows = np.flatnonzero(given & (self.plan.data.modes[views.index] == mode))
            if len(rows):
                step.running.append((graph, rows))
                graph.start([step.stored[row] for row in rows], views, rows)
        return step

    def _finish(self, step: _Step) -> Views:
        """Return the views of a step, all rows filled."""
        try:
            for task in step.checks:  # in order of the rows: the same error is raised every time
                task.result()
        except CancelledError:
            raise ValueError("the loader was closed while its batches were read") from None
        if self._closed:
            raise ValueError("the loader was closed while its batches were read")
        views, arrived = step.views, []
        while step.running:
            graph, rows = step.running[0]
            try:
                pixels = graph.collect()
            except RuntimeError as error:
                if graph.failures > MOST_FAILURES:
                    raise ValueError(
                        f"DALI failed on {graph.failures} batches in a row, though their images "
                        f"decode without it: {_reason(error)}; choose --loader.loader turbo"
                    ) from error
                self._fill(views, rows)
            else:
                arrived.append((rows, pixels))
            finally:
                step.running.pop(0)
        views.pixels = self._joined(views.pixels, arrived)
        return views

    def _fill(self, views: Views, rows: np.ndarray) -> None:
        """Decode rows by our own rules, sample by sample."""
        tasks = [
            self._threads.submit(fill_rows, self.plan, views, range(row, row + 1))
            for row in rows.tolist()
        ]
        for task in tasks:
            task.result()

    def _joined(self, host: Tensor, arrived: list[tuple[np.ndarray, Tensor]]) -> Tensor:
        """Return the pixels of a step: DALI's own memory where it did all rows, else one copy.

        Args:
            host: uint8 [n, H, W, 3]: the rows that DALI did not do.
            arrived: rows, and their views from DALI.
        """
        if len(arrived) == 1 and len(arrived[0][0]) == len(host):
            return arrived[0][1]
        if self.device.type != "cuda":
            for rows, pixels in arrived:
                host[torch.from_numpy(rows)] = pixels
            return host
        joined = torch.empty_like(host, device=self.device)
        ours = np.ones(len(host), bool)
        for rows, pixels in arrived:
            joined.index_copy_(0, to_device(rows, self.device), pixels)
            ours[rows] = False
        if ours.any():
            rows = np.flatnonzero(ours)
            pixels = to_device(host.numpy()[rows], self.device)
            joined.index_copy_(0, to_device(rows, self.device), pixels)
        return joined

    def close(self) -> None:
        """End the threads and DALI; batches already taken stay valid."""
        self._closed = True
        self._threads.shutdown(cancel_futures=True)
        self._graphs.clear()


def _ended_well(task: Future[None]) -> bool:
    """Wait for a task; `wait` would wait for ever for one that was cancelled."""
    try:
        return task.exception() is None
    except CancelledError:
        return False


def _reason(error: RuntimeError) -> str:
    """Return what DALI says between its traceback of our graph and its farewell."""
    said = str(error).partition("encountered:")[2] or str(error)
    return " ".join(said.replace("Current pipeline object is no longer valid.", "").split())


# --- DALI -----------------------------------------------------------------------------------------


class _Graph:
    """One persistent pipeline from stored images, boxes and a size to views; first in, first out.

    Any number of batches may be begun before the first is collected; the executor keeps them all.
    """

    def __init__(self, plan: Plan, device: torch.device, mode: int) -> None:
        self._mode = mode
        self._device = device
        self._data = plan.data
        depth = plan.options.prefetch + 1
        # DALI reads the memory map itself: a batch's views live until its output is consumed, by
        # DALI's rule `depth` batches later.
        self._inputs: deque[list[Any]] = deque(maxlen=depth + 2)
        self.interrupted = False
        """Whether a call did not return: nobody knows which batches it still has."""
        self.failures = 0
        """Batches that failed since the last good one."""
        groups = -(-plan.options.batch // (plan.options.mix_group if plan.training else 1))
        share = -(-groups // plan.world) * (plan.options.mix_group if plan.training else 1)
        batch = min(share, plan.options.batch)
        try:
            self._pipeline: Any = _pipeline(plan, device, mode, batch, depth)
            self._warm_up(depth)
        except RuntimeError as error:
            raise ValueError(
                f"DALI does not work on {device}: {_reason(error)}; choose --loader.loader turbo"
            ) from error

    def start(self, stored: list[Any], views: Views, rows: np.ndarray) -> None:
        """Begin a batch.

        Args:
            stored: the stored bytes of each image, views of the map.
            views: what the batch is made for.
            rows: int64 [k]: the rows of `views` that `stored` belongs to.
        """
        boxes = views.boxes[rows]
        if self._mode == RAW:
            sizes = views.sizes[rows]
            # Rows of pixels lie together: only those of the box are taken, and uploaded.
            stored = [
                one.reshape(height, width, 3)[y0 : y0 + h]
                for one, (height, width), (y0, _, h, _) in zip(
                    stored, sizes.tolist(), boxes.tolist(), strict=True
                )
            ]
        self._give(stored, boxes, views.pixels.shape[1:3])

    def collect(self) -> Tensor:
        """Return the oldest batch begun, uint8 [k, H, W, 3], memory that nobody else writes.

        On a GPU the work may be under way still, in order on the current stream. Raises
        RuntimeError if DALI failed on it.
        """
        self.interrupted = True
        try:
            if self._device.type == "cuda":
                stream = torch.cuda.current_stream(self._device)
                (views,) = self._pipeline.outputs(cuda_stream=stream)
                with torch.cuda.device(self._device):  # the stream that DLPack asks for
                    pixels = torch.from_dlpack(views.as_tensor())
            else:
                (views,) = self._pipeline.outputs()
                pixels = torch.from_dlpack(views.as_tensor())
            self.failures = 0
        except RuntimeError:
            self.failures += 1
            self.interrupted = False
            raise
        self.interrupted = False
        return pixels

    def discard(self) -> None:
        """Wait for the oldest batch begun, and forget it."""
        if self.interrupted:
            return  # it may not be there; such a pipeline is not used again
        try:
            self.collect()
        except RuntimeError:
            pass

    def _give(self, stored: list[Any], boxes: np.ndarray, size: tuple[int, ...]) -> None:
        self.interrupted = True
        axes = [1] if self._mode == RAW else [0, 1]
        inputs = {
            "stored": stored,
            "start": np.ascontiguousarray(boxes[:, axes], np.int32),
            "shape": np.ascontiguousarray(boxes[:, 2:][:, axes], np.int32),
            "size": np.full((len(stored), 2), size, np.float32),
        }
        self._inputs.append(list(inputs.values()))
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)
        self._pipeline.schedule_run()
        self.interrupted = False

    def _warm_up(self, depth: int) -> None:
        """Run on small images: what is missing for DALI to work shows now, not in the first epoch.

        The first run of a pipeline begins `depth` batches at once; after it they come singly.
        """
        pixels = np.zeros((64, 64, 3), np.uint8)
        stored = np.frombuffer(simplejpeg.encode_jpeg(pixels), np.uint8)
        inputs = {
            "stored": [pixels if self._mode == RAW else stored],
            "start": np.zeros((1, 1 if self._mode == RAW else 2), np.int32),
            "shape": np.full((1, 1 if self._mode == RAW else 2), 64, np.int32),
            "size": np.full((1, 2), 8, np.float32),
        }
        for _ in range(depth):
            for name, values in inputs.items():
                self._pipeline.feed_input(name, values)
        self._pipeline.schedule_run()
        for _ in range(depth):
            self._pipeline.outputs()


def _pipeline(plan: Plan, device: torch.device, mode: int, batch: int, depth: int) -> Any:
    """Return the built DALI pipeline for JPEGs or for pixels.

    Args:
        plan: threads, hardware share and memory hints count.
        device: a CUDA device: it decodes and resizes there; else on the CPU.
        mode: JPG or RAW.
        batch: most images of one run.
        depth: runs begun ahead.
    """
    try:
        dali: Any = import_module("nvidia.dali")
        fn: Any = import_module("nvidia.dali.fn")
    except (ImportError, OSError) as error:
        raise ValueError(
            f"the dali loader needs NVIDIA DALI ({error}): pip install 'backmix[dali-cu13]', or "
            "'backmix[dali-cu12]' for drivers older than 580; or choose --loader.loader turbo"
        ) from error
    types, gpu = dali.types, device.type == "cuda"
    number = None
    if gpu:
        number = torch.cuda.current_device() if device.index is None else device.index

    def given(name: str, kind: Any, dimensions: int, layout: str | None = None) -> Any:
        return fn.external_source(
            name=name, dtype=kind, ndim=dimensions, layout=layout, no_copy=True
        )

    pipeline = dali.Pipeline(
        batch_size=batch,
        num_threads=plan.options.threads or usable_cores(),
        device_id=number,
        seed=0,  # nothing is drawn; else DALI takes one from the clock
        prefetch_queue_depth=depth,
    )
    with pipeline:
        start, shape = given("start", types.INT32, 1), given("shape", types.INT32, 1)
        if mode == JPG:
            images = fn.decoders.image_slice(
                given("stored", types.UINT8, 1),
                start,
                shape,
                axis_names="HW",
                device="mixed" if gpu else "cpu",
                adjust_orientation=False,  # boxes are in pixels of the image as it is stored
                jpeg_fancy_upsampling=True,  # on the CPU it always is
                affine=False,  # decoding threads bound to cores fight with others there
                hw_decoder_load=plan.options.hw_share,
                device_memory_padding=plan.options.device_memory_padding,
                host_memory_padding=plan.options.host_memory_padding,
                preallocate_width_hint=plan.options.preallocate_hint[0],
                preallocate_height_hint=plan.options.preallocate_hint[1],
            )
        else:
            pixels = given("stored", types.UINT8, 3, "HWC")
            images = fn.slice(pixels.gpu() if gpu else pixels, start, shape, axis_names="W")
        views = fn.resize(
            images,
            size=given("size", types.FLOAT, 1),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        pipeline.set_outputs(views)
    pipeline.build()
    return pipeline
