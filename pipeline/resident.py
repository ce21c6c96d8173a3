"""The `resident` loader: the whole subset decoded once and kept on the device as the pool.

After that a batch is index arithmetic. For small images (CIFAR-10: 154 MB), and for donors from
the whole training set rather than from the batch.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backmix.pipeline.batch import Batch, HostRows, Place
from backmix.pipeline.decode import cut, decoding_threads, read_image
from backmix.pipeline.plan import Part, Plan
from backmix.pipeline.views import GOOD, MOST_ATTEMPTS, REPLACED, WARNED, to_device, too_many_bad

CHUNK = 1024
"""Images decoded before they are copied to a device that is not the host."""
SHARE = 0.7
"""Most of the free memory that a pool may take."""
CGROUP = Path("/sys/fs/cgroup")
"""Where a container's own limit is found."""


class Resident:
    """Batches are rows of one pool; row p of the pool shows position p of the subset.

    A bad image's row shows a substitute, so that it can be drawn as a donor like any other; its
    number is in `pool_index`. When the bad image's own turn comes, its replacement is drawn anew in
    every epoch, as by the other loaders.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if plan.training and plan.options.crop == "random":
            raise ValueError(
                "the resident loader decodes every image once, so it cannot cut another crop in "
                "every epoch: choose --loader.loader turbo, or --loader.crop whole"
            )
        if plan.training and plan.options.grow_from:
            raise ValueError(
                "the resident loader keeps every image in one size, so its views cannot grow: "
                "choose --loader.loader turbo, or --loader.grow-from 0"
            )
        self.plan = plan
        self.device = device
        size, n = plan.options.size, len(plan.subset)
        _require_memory(n * size * size * 3, n, size, device)
        self._boxes = plan.boxes(Place(seed), plan.subset.index)
        self._status = np.zeros(n, np.uint8)
        self._errors: dict[int, str] = {}
        self._pool = self._decode_all(progress)
        self._pool_index = plan.subset.index.copy()
        self._substitute_bad_rows(Place(seed))
        bad = plan.subset.index[list(self._errors)].tolist()
        self.bad = {index: plan.data.name(index) for index in bad}
        self._device_index = to_device(self._pool_index, device)

    def batches(self, place: Place) -> Iterator[Batch]:
        """Yield this rank's batches from `place` to the end of the epoch; the pool is shared."""
        for part in self.plan.parts(place):
            yield self._batch(part)

    def whole_steps(self, place: Place) -> tuple[Batch, list[Place]]:
        """Return the images of all steps left in an epoch that are not short, as one batch.

        With the place after each of these steps; the batch has no rows where there is no such step.
        """
        parts = [p for p in self.plan.parts(place) if len(p.positions) == self.plan.options.batch]
        positions = [part.positions for part in parts]
        everything = np.concatenate(positions) if parts else np.zeros(0, np.int64)
        return self._batch(Part(everything, place)), [part.place for part in parts]

    def _batch(self, part: Part) -> Batch:
        rows = part.positions
        bad = np.isin(rows, list(self._errors)) if self._errors else np.zeros(len(rows), bool)
        if not self.plan.training:
            rows, bad = rows[~bad], bad[~bad]
        elif bad.any():
            rows = rows.copy()
            rows[bad] = [self._replacement(part.place, int(row)) for row in rows[bad]]
        index = self.plan.subset.index[rows]
        status = np.where(bad, REPLACED, self._status[rows]).astype(np.uint8)
        return Batch(
            pool=self._pool,
            pool_index=self._device_index,
            rows=to_device(rows, self.device),
            index=to_device(index, self.device),
            labels=to_device(self.plan.subset.labels[rows], self.device),
            boxes=to_device(self._boxes[rows], self.device),
            sizes=to_device(self.plan.data.sizes[index], self.device),
            status=to_device(status, self.device),
            group=0,
            place=part.place,
            host=HostRows(self._pool_index, rows),
        )

    def close(self) -> None:
        """Do nothing: the pool goes with the last batch that holds it."""

    def _decode_all(self, progress: Callable[[int, int], None] | None) -> Tensor:
        n, size = len(self.plan.subset), self.plan.options.size
        try:
            pool = torch.zeros(n, size, size, 3, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:
            raise ValueError(
                f"{n} images of {size} x {size} pixels do not fit the memory of {self.device}: "
                "choose --loader.loader turbo, or a smaller --loader.size"
            ) from error
        on_host = self.device.type == "cpu"
        with decoding_threads(self.plan.options.threads) as threads:
            for first in range(0, n, CHUNK):
                count = min(CHUNK, n - first)
                chunk = pool[first : first + count]
                pixels = (chunk if on_host else torch.zeros_like(chunk, device="cpu")).numpy()
                tasks = [
                    threads.submit(self._decode, pixels, first, range(row, min(row + 32, count)))
                    for row in range(0, count, 32)
                ]
                wait(tasks)
                for task in tasks:
                    task.result()
                if not on_host:
                    chunk.copy_(torch.from_numpy(pixels))
                if progress:
                    progress(first + count, n)
        self._errors = dict(sorted(self._errors.items()))
        return pool

    def _decode(self, pixels: np.ndarray, first: int, rows: range) -> None:
        for row in rows:
            position = first + row
            try:
                index = int(self.plan.subset.index[position])
                image, warned = read_image(self.plan.data, index, self.plan.options.verify)
                cut(image, self._boxes[position], pixels[row])
                self._status[position] = WARNED if warned else GOOD
            except ValueError as error:
                if self.plan.training and self.plan.options.on_bad == "error":
                    raise
                self._errors[position] = str(error)

    def _substitute_bad_rows(self, place: Place) -> None:
        if self.plan.training and len(self._errors) > self.plan.most_bad:
            last = next(reversed(self._errors.values()))
            raise ValueError(too_many_bad(self.plan, len(self._errors), self.plan.most_bad, last))
        if not self.plan.training:
            return  # bad images are left out, and there are no donors
        for position in self._errors:
            row = self._replacement(place, position)
            self._pool[position] = self._pool[row]
            self._pool_index[position] = self._pool_index[row]

    def _replacement(self, place: Place, position: int) -> int:
        """Return the good position that stands in for a bad one in the epoch of `place`."""
        for attempt in range(MOST_ATTEMPTS if len(self.plan.subset) > 1 else 0):
            row = self.plan.substitute(place, position, attempt)
            if row not in self._errors:
                return row
        raise ValueError(f"{self._errors[position]}; and no good sample was found to replace it")


def _require_memory(needed: int, n: int, size: int, device: torch.device) -> None:
    """Refuse a pool that would not leave room for anything else."""
    free = _free_memory(device)
    if free is not None and needed > SHARE * free:
        raise ValueError(
            f"{n} images of {size} x {size} pixels need {needed / 1e9:.1f} GB on {device}, where "
            f"{free / 1e9:.1f} GB are free (at most {SHARE:.0%} of them may be used): choose "
            "--loader.loader turbo, or a smaller --loader.size"
        )


def _free_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes, None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
        limit = (CGROUP / "memory.max").read_text("ascii").strip()
        if limit != "max":
            used = int((CGROUP / "memory.current").read_text("ascii"))
            # Files that were read lately count as used, and go when the memory is wanted.
            statistics = (CGROUP / "memory.stat").read_text("ascii").splitlines()
            used -= int(dict(line.split() for line in statistics).get("inactive_file", 0))
            free.append(max(0, int(limit) - used))
    except (OSError, KeyError, ValueError):
        pass
    return min(free, default=None)
