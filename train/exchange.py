"""BackMix's bank on many processes: each writes the rows of its own images, all read all rows.

Every process holds the whole bank. With donors from the batch a row is read once an epoch, in the
step in which its image is trained on and before that step writes it, so what others wrote in the
same epoch is not needed before its end: rows written are marked, and exchanged when an epoch ends
and before every checkpoint. Donors of a resident pool may be any image in any step: there the rows
of a step are exchanged in it. Either way an epoch brings every row to every process once. A row has
one writer between two exchanges, since an image is trained on once an epoch, and not by a stand-in.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from backmix.train.world import World

CHUNK = 8 << 20
"""Bytes that a process sends at a time."""
_NUMBER = 8
"""Bytes of a row's number."""


@dataclass
class Exchange:
    """Which rows of a bank this process has written, and how they reach the others."""

    world: World
    bank: Tensor
    """fp16 [N, g, g'], changed in place; equal on all processes after an exchange."""
    most: int = 0
    """Rows that a process writes in a step at most, where each step is exchanged; 0 = when asked
    to `settle`."""
    received: int = 0
    """Bytes that came from the other processes so far."""
    marked: Tensor = field(init=False)
    """uint8 [N + 1]: rows written since the last exchange; the last entry stands for no row."""
    step: list[Tensor] = field(default_factory=list)
    """Rows written in the step in hand, int64, -1 = none."""

    def __post_init__(self) -> None:
        self.marked = torch.zeros(len(self.bank) + 1, dtype=torch.uint8, device=self.bank.device)

    def wrote(self, rows: Tensor) -> None:
        """Note rows that have just been written, int64 [n], -1 = none; nobody is waited for."""
        if self.most:
            self.step.append(rows)
        else:
            self.marked.scatter_(0, torch.where(rows < 0, len(self.bank), rows), 1)

    def after_step(self) -> None:
        """Exchange the rows of a step, where that is asked for: two equal steps, equal shapes.

        Every process calls it in every step, whether it has written anything or not.
        """
        if not self.most:
            return
        mine = torch.full((self.most,), -1, device=self.bank.device)
        if self.step:
            rows = torch.cat(self.step)
            mine[: len(rows)] = rows
        self.step = []
        numbers, values = self._from_all(mine, self.bank[mine.clamp(min=0)])
        # What is no row becomes a second copy of the last one: every shape stays fixed.
        last = numbers.argmax(0, keepdim=True)
        top = numbers.gather(0, last)
        spare = values.index_select(0, last)
        spare = torch.where((top >= 0)[:, None, None], spare, self.bank[:1])
        empty = numbers < 0
        values = torch.where(empty[:, None, None], spare, values)
        numbers = torch.where(empty, top.clamp(min=0), numbers)
        self.bank.index_copy_(0, numbers, values)

    def settle(self) -> None:
        """Exchange all rows that were marked since the last time; the hosts wait for it."""
        if self.most:
            return
        mine = self.marked[:-1].nonzero()[:, 0]
        [longest] = self.world.greatest([len(mine)])
        at_once = max(1, CHUNK // (_NUMBER + self.bank[:1].nbytes))
        for start in range(0, longest, at_once):
            count = min(at_once, longest - start)
            part = torch.full((count,), -1, device=self.bank.device)
            rows = mine[start : start + count]
            part[: len(rows)] = rows
            numbers, values = self._from_all(part, self.bank[part.clamp(min=0)])
            there = numbers >= 0
            self.bank[numbers[there]] = values[there]
        self.marked.zero_()

    def _from_all(self, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers and values of all processes, one after the other: equally many each.

        Args:
            rows: int64 [n], -1 = none.
            values: as the bank's rows, [n, g, g'].
        """
        n, size = len(rows), self.world.size
        columns = [rows[:, None].view(torch.uint8), values.reshape(n, -1).view(torch.uint8)]
        packed = torch.cat(columns, dim=1)
        found = torch.empty((size * n, packed.shape[1]), dtype=torch.uint8, device=packed.device)
        dist.all_gather(list(found.chunk(size)), packed)
        self.received += found.nbytes - packed.nbytes
        numbers = found[:, :_NUMBER].contiguous().view(torch.int64)[:, 0]
        others = found[:, _NUMBER:].contiguous().view(self.bank.dtype)
        return numbers, others.view(-1, *self.bank.shape[1:])
