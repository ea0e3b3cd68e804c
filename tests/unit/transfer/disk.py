"""A disk in memory that completes requests in any order it likes, and can fail."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from vhostd.virtqueue.errors import BackendError


class Done(NamedTuple):
    token: int
    status: int
    data: bytes


class MemoryDisk:
    """`vhostd.transfer.copy.Disk`.

    Attributes:
        durable: the content that a flush confirmed.
        fail_at: requests that touch this byte fail.
        dead: every request raises.
    """

    block_bytes = 512
    max_request_bytes = 256 << 10
    max_write_zeroes_bytes = 1 << 20

    def __init__(self, size_bytes: int, *, seed: int = 0) -> None:
        self.capacity_bytes = size_bytes
        self.content = bytearray(size_bytes)
        self.durable = bytes(size_bytes)
        self.fail_at: int | None = None
        self.dead = False
        self.most_in_flight = 0
        self.read_bytes = 0
        self._rng = random.Random(seed)
        self._waiting: dict[int, Any] = {}
        self._next = 0

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    def _submit(self, work: Any) -> int:
        if self.dead:
            raise BackendError("the disk is gone")
        self._next += 1
        self._waiting[self._next] = work
        self.most_in_flight = max(self.most_in_flight, len(self._waiting))
        return self._next

    def submit_read(self, offset_bytes: int, len_bytes: int) -> int:
        assert 0 < len_bytes <= self.max_request_bytes
        return self._submit((offset_bytes, len_bytes, None))

    def submit_write(self, offset_bytes: int, data: Any) -> int:
        assert 0 < len(data) <= self.max_request_bytes
        return self._submit((offset_bytes, len(data), bytes(data)))

    def submit_write_zeroes(self, extents: Any) -> int:
        ((offset_bytes, len_bytes),) = extents
        assert 0 < len_bytes <= self.max_write_zeroes_bytes
        return self._submit((offset_bytes, len_bytes, bytes(len_bytes)))

    def reap(self, *, minimum: int = 1) -> list[Any]:
        if self.dead:
            raise BackendError("the disk is gone")
        done: list[Any] = []
        while self._waiting and (len(done) < minimum or self._rng.random() < 0.5):
            token = self._rng.choice(list(self._waiting))
            done.append(self._complete(token, *self._waiting.pop(token)))
        return done

    def _complete(self, token: int, offset: int, length: int, data: bytes | None) -> Done:
        end = offset + length
        assert end <= self.capacity_bytes
        if self.fail_at is not None and offset <= self.fail_at < end:
            return Done(token, 1, b"")
        if data is None:
            self.read_bytes += length
            return Done(token, 0, bytes(self.content[offset:end]))
        self.content[offset:end] = data
        return Done(token, 0, b"")

    def flush(self) -> None:
        assert not self._waiting
        if self.dead:
            raise BackendError("the disk is gone")
        self.durable = bytes(self.content)
