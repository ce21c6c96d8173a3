"""The `turbo` loader: libjpeg-turbo in threads, straight from the memory map. Wheels only.

Decoding, hashing and resizing release the interpreter's lock, so threads are enough: no worker
processes, no copies between them, and the bytes never leave the page cache. Whoever asks for the
next batch also plans the one `prefetch` steps later.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait

import numpy as np
import torch

from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.decode import decoding_threads
from backmix.pipeline.plan import Part, Plan
from backmix.pipeline.regions import Regions
from backmix.pipeline.views import Views, as_batch, empty_views, fill_rows, register

CHUNK = 8
"""Images per task of a thread: fewer cost more calls, more leave threads idle at a batch's end."""


class Turbo:
    """Batches decoded ahead by threads; every batch has memory of its own and stays valid."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.bad: dict[int, str] = {}
        self.decoding = 0.0
        """Seconds in which threads were at work on batches taken so far, all threads together."""
        self._regions = _regions(plan)
        self._next: tuple[Place, Future[np.ndarray]] | None = None
        """Where the next epoch begins, and its order, which a thread computes meanwhile: on a large
        set a fifth of a second, in which no batch would be begun."""
        self._threads = decoding_threads(plan.options.threads)
        self._closed = False

    def batches(self, place: Place) -> Iterator[Batch]:
        """Yield this rank's batches from `place` to the end of the epoch.

        Raises ValueError for a bad image with `on_bad` error, and for more bad ones than `max_bad`.
        Leaving early ends the work begun for later batches.
        """
        pending: deque[tuple[Views, list[Future[float]]]] = deque()
        replaced = 0
        self._refuse_closed()
        known, self._next = self._next, None
        sequence = known[1].result() if known and known[0] == place else None

        def finish() -> Batch:
            nonlocal replaced
            views, tasks = pending[0]
            try:
                for task in tasks:  # in order of the rows: the same error is raised every time
                    self.decoding += task.result()
            except CancelledError:
                raise ValueError("the loader was closed while its batches were read") from None
            pending.popleft()
            replaced = register(self.plan, views, self.bad, replaced)
            return as_batch(self.plan, views, self.device)

        try:
            for part in self.plan.parts(place, sequence):
                pending.append(self._begin(part))
                self._order_ahead(part.place)
                if len(pending) > self.plan.options.prefetch:
                    yield finish()
            while pending:
                yield finish()
        finally:
            wait([task for _, tasks in pending for task in tasks if not task.cancel()])

    def _order_ahead(self, place: Place) -> None:
        """Have the order of the next epoch computed, in the second half of this one."""
        if (
            self._next is None
            and self.plan.training
            and 2 * place.consumed >= len(self.plan.subset)
        ):
            following = Place(place.seed, place.epoch + 1)
            self._next = following, self._threads.submit(self.plan.sequence, following)

    def _begin(self, part: Part) -> tuple[Views, list[Future[float]]]:
        """Hand the rows of a part to the threads."""
        self._refuse_closed()
        views = empty_views(self.plan, part, pinned=self.device.type == "cuda")
        n = len(views.index)
        return views, [
            self._threads.submit(self._fill, views, range(row, min(row + CHUNK, n)))
            for row in range(0, n, CHUNK)
        ]

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ValueError("the loader is closed")

    def _fill(self, views: Views, rows: range) -> float:
        """Decode some rows; returns the seconds that it took."""
        began = time.perf_counter()
        fill_rows(self.plan, views, rows, self._regions)
        return time.perf_counter() - began

    def close(self) -> None:
        """End the threads; batches already taken stay valid."""
        self._closed = True
        self._threads.shutdown(cancel_futures=True)


def _regions(plan: Plan) -> Regions | None:
    """Return the decoder of regions, None where images are to be decoded whole."""
    options = plan.options
    if options.decoder == "full" or (options.decoder == "auto" and options.crop == "whole"):
        return None
    try:
        return Regions(plan.data, options.verify)
    except ValueError:
        if options.decoder == "region":
            raise
        return None
