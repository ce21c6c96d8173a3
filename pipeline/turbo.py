"""The `turbo` loader: libjpeg-turbo in threads, straight from the memory map. Wheels only.

Decoding, hashing and resizing release the interpreter's lock, so threads are enough: no worker
processes, no copies between them, and the bytes never leave the page cache. Whoever asks for the
next batch also plans the one `prefetch` steps later.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait

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
        self._regions = _regions(plan)
        self._threads = decoding_threads(plan.options.threads)
        self._closed = False

    def batches(self, place: Place) -> Iterator[Batch]:
        """Yield this rank's batches from `place` to the end of the epoch.

        Raises ValueError for a bad image with `on_bad` error, and for more bad ones than `max_bad`.
        Leaving early ends the work begun for later batches.
        """
        pending: deque[tuple[Views, list[Future[None]]]] = deque()
        replaced = 0

        def finish() -> Batch:
            nonlocal replaced
            views, tasks = pending[0]
            try:
                for task in tasks:  # in order of the rows: the same error is raised every time
                    task.result()
            except CancelledError:
                raise ValueError("the loader was closed while its batches were read") from None
            pending.popleft()
            replaced = register(self.plan, views, self.bad, replaced)
            return as_batch(self.plan, views, self.device)

        try:
            for part in self.plan.parts(place):
                pending.append(self._begin(part))
                if len(pending) > self.plan.options.prefetch:
                    yield finish()
            while pending:
                yield finish()
        finally:
            wait([task for _, tasks in pending for task in tasks if not task.cancel()])

    def _begin(self, part: Part) -> tuple[Views, list[Future[None]]]:
        """Hand the rows of a part to the threads."""
        if self._closed:
            raise ValueError("the loader is closed")
        views = empty_views(self.plan, part, pinned=self.device.type == "cuda")
        n = len(views.index)
        return views, [
            self._threads.submit(
                fill_rows, self.plan, views, range(row, min(row + CHUNK, n)), self._regions
            )
            for row in range(0, n, CHUNK)
        ]

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
