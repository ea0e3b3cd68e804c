"""A guest that writes stamped data of random shapes, many requests at a time, until it is stopped.

Half of the requests go to a small hot part of the disk, in sectors, so that requests in flight
share blocks. Reads are judged as they come. One thread.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.crash.model import BLOCK_BYTES, SECTOR_BYTES, Change, CrashModel, Flush
from vhostd.errors import BusyError, UnavailableError
from vhostd.virtqueue.block import BlockDevice, Extent
from vhostd.virtqueue.constants import BlockStatus

__all__ = ["Counts", "Workload", "read_all"]

BLOCK_SECTORS = BLOCK_BYTES // SECTOR_BYTES
HOT_SECTORS = 64 * BLOCK_SECTORS


@dataclass(slots=True)
class Counts:
    """What was asked, over all runs."""

    requests: int = 0
    completed: int = 0
    failed: int = 0
    in_flight_at_kill: int = 0
    written_bytes: int = 0
    flushes: int = 0
    others: dict[str, int] = field(default_factory=dict)

    def add(self, what: str) -> None:
        self.others[what] = self.others.get(what, 0) + 1


@dataclass(slots=True)
class _Read:
    first: int
    begun: int


class Workload:
    """Random requests on `device`, told to `model`.

    Args:
        budget_bytes: after so much was written it ends by itself.
        may_fail: whether changes may end in IOERR; a change that did may have happened.
            Reads and flushes must always succeed.
    """

    def __init__(
        self,
        device: BlockDevice,
        model: CrashModel,
        choices: random.Random,
        *,
        depth: int = 24,
        budget_bytes: int = 24 << 20,
        counts: Counts | None = None,
        may_fail: bool = False,
    ) -> None:
        self._may_fail = may_fail
        self.device = device
        self.model = model
        self.depth = depth
        self.budget_bytes = budget_bytes
        self.counts = Counts() if counts is None else counts
        self._choices = choices
        self._pending: dict[int, Change | Flush | _Read] = {}
        self._limit_sectors = min(
            device.config.max_write_zeroes_sectors, device.config.max_discard_sectors, 4096
        )

    def run(self, *, after: Callable[[int], None] = lambda completed: None) -> bool:
        """Until the back-end goes away (True), or the budget is spent and all is done (False).

        after: called with the number of completions so far, whenever there are new ones.
        """
        completed = 0
        try:
            while self.budget_bytes > 0 or self._pending:
                while self.budget_bytes > 0 and len(self._pending) < self.depth:
                    try:
                        self._submit()
                    except BusyError:
                        break
                completed += self._reap(1)
                after(completed)
        except UnavailableError:
            # What was used before the end counts as completed: the guest sees it.
            self._reap(0)
            self.counts.in_flight_at_kill += len(self._pending)
            self._pending.clear()
            return True
        return False

    def _reap(self, minimum: int) -> int:
        done = self.device.reap(minimum=minimum)
        for completion in done:
            what = self._pending.pop(completion.token)
            if completion.status == BlockStatus.IOERR and self._may_fail:
                assert isinstance(what, Change), f"{what} failed"
                self.counts.failed += 1
                continue
            assert completion.status == BlockStatus.OK, f"{what}: status {completion.status}"
            if isinstance(what, Change):
                self.model.finish(what)
            elif isinstance(what, Flush):
                self.model.finish_flush(what)
                self.counts.flushes += 1
            else:
                self.model.check_read(what.first, completion.data, what.begun)
        self.counts.completed += len(done)
        return len(done)

    def _submit(self) -> None:
        kinds = {"write": 70, "flush": 5, "zeroes": 7, "discard": 3, "read": 15}
        kind = self._choices.choices(list(kinds), list(kinds.values()))[0]
        queue = self._choices.randrange(len(self.device.queues))
        if kind == "flush":
            if self.model.write_through:
                return
            flush = self.model.begin_flush()
            self._pending[self.device.submit_flush(queue=queue)] = flush
        elif kind == "read":
            first, sectors = self._place(256)
            begun = self.model.clock
            at, length = first * SECTOR_BYTES, sectors * SECTOR_BYTES
            token = self.device.submit_read(at, length, queue=queue)
            self._pending[token] = _Read(first, begun)
        else:
            self._change(kind, queue)
        self.counts.requests += 1
        self.counts.add(kind)

    def _change(self, kind: str, queue: int) -> None:
        first, sectors = self._place(2048 if kind == "write" else self._limit_sectors)
        if kind == "discard":
            # Only whole blocks are sure to be zeroes.
            end = (first + sectors + BLOCK_SECTORS - 1) // BLOCK_SECTORS * BLOCK_SECTORS
            first -= first % BLOCK_SECTORS
            sectors = end - first
            if sectors > self._limit_sectors:
                return
        extent = Extent(first * SECTOR_BYTES, sectors * SECTOR_BYTES)
        change = self.model.begin(first, sectors, zero=kind != "write")
        try:
            if kind == "write":
                data = self.model.payload(change)
                token = self.device.submit_write(extent.offset_bytes, data, queue=queue)
            elif kind == "discard":
                token = self.device.submit_discard([extent], queue=queue)
            else:
                unmap = self._choices.random() < 0.5
                token = self.device.submit_write_zeroes([extent], unmap=unmap, queue=queue)
        except BusyError:
            self.model.cancel(change)
            raise
        self._pending[token] = change
        self.budget_bytes -= extent.len_bytes if kind == "write" else BLOCK_BYTES
        self.counts.written_bytes += extent.len_bytes if kind == "write" else 0

    def _place(self, largest: int) -> tuple[int, int]:
        """First sector and count: small ones often, and half of them where others are too."""
        choices = self._choices
        shape = choices.random()
        if shape < 0.4:
            sectors = choices.randint(1, BLOCK_SECTORS)
        elif shape < 0.85:
            sectors = BLOCK_SECTORS * choices.randint(1, 8)
        elif shape < 0.98:
            sectors = choices.randint(1, 256)
        else:
            sectors = choices.randint(1, 2048)
        sectors = min(sectors, largest, self.model.sectors)
        reach = HOT_SECTORS if choices.random() < 0.5 else self.model.sectors
        first = choices.randrange(max(1, min(reach, self.model.sectors - sectors + 1)))
        if choices.random() < 0.5:
            first -= first % BLOCK_SECTORS
        return first, sectors


def read_all(device: BlockDevice) -> bytes:
    """The whole disk."""
    return device.read(0, device.capacity_bytes)
