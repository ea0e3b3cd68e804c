"""A hostile guest: what it may put into its ring and its memory.

Each case costs the guest its ring (the error descriptor is signalled, and the ring can be started
again) or its request; never the daemon, its other ring, or its neighbour, who does verified I/O all
the while (`target`). Not asked of others, who end the session or, some of them, themselves.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.protocol.backends import Backend
from tests.protocol.helpers import check_io, must_be_ok, pattern, poll_until
from vhostd.errors import UnavailableError
from vhostd.protocol.features import VirtioFeature
from vhostd.virtqueue.block import DRIVER_FEATURES, HEADER, BlockDevice
from vhostd.virtqueue.constants import (
    BlockRequest,
    BlockStatus,
    DescriptorFlag,
    FrontendRequest,
)
from vhostd.virtqueue.driver import SplitDriver
from vhostd.virtqueue.errors import BackendError
from vhostd.virtqueue.layout import DESCRIPTOR

NEXT, WRITE, INDIRECT = DescriptorFlag.NEXT, DescriptorFlag.WRITE, DescriptorFlag.INDIRECT
SIZE = 16
EVENT_TIMEOUT_MS = 20_000

Row = tuple[int, int, int, int]
"""address, length, flags, next."""


class Victim:
    """A device with a ring to be broken (0) and one that must go on (1)."""

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        self.queue: SplitDriver = device.queues[0]
        self.memory = device.memory
        self.header = self.memory.allocate(16)
        self.memory.write(self.header, HEADER.pack(BlockRequest.IN, 0, 0))
        self.data = self.memory.allocate(65536, align=4096)
        self.table = self.memory.allocate(65536, align=4096)
        region = self.memory.regions[0]
        self.end = region.end
        """The first address that is not memory."""

    def post(self, rows: Sequence[Row], *, head: int = 0) -> None:
        """Descriptors from 0 on, and one available entry."""
        for at, row in enumerate(rows):
            self.queue.write_descriptor(at, *row)
        self.post_head(head)

    def post_head(self, head: int, *, ahead: int = 1) -> None:
        index = self.queue.available_index
        self.queue.write_available(index % SIZE, head)
        self.queue.store_available_index((index + ahead) & 0xFFFF)
        self.queue.kick()

    def post_indirect(
        self, rows: Sequence[Row], *, length: int | None = None, flags: int = 0
    ) -> None:
        for at, row in enumerate(rows):
            self.memory.write(self.table + 16 * at, DESCRIPTOR.pack(*row))
        size = 16 * len(rows) if length is None else length
        self.post([(self.table, size, INDIRECT | flags, 1)])

    @property
    def good(self) -> list[Row]:
        """A read of one sector."""
        return [
            (self.header, 16, NEXT, 1),
            (self.data, 512, NEXT | WRITE, 2),
            (self.data + 512, 1, WRITE, 0),
        ]


@contextmanager
def victim(target: Backend, *, features: int = DRIVER_FEATURES) -> Iterator[Victim]:
    with target.device(queues=2, queue_size=SIZE, features=features) as device:
        yield Victim(device)


def _await_broken(queue: SplitDriver) -> None:
    poll = select.poll()
    poll.register(queue.error_fd, select.POLLIN)
    assert poll.poll(EVENT_TIMEOUT_MS), "the error descriptor was not signalled"
    assert queue.is_broken()


def _io_on_the_other_ring(device: BlockDevice) -> None:
    data = pattern("other ring", 4096)
    token = device.submit_write(8192, data, queue=1)
    assert [c.token for c in device.reap(queue=1)] == [token]
    token = device.submit_read(8192, 4096, queue=1)
    assert must_be_ok(device.reap(queue=1)[0]).data == data


def _restart(device: BlockDevice) -> None:
    """The guest resets its device: the ring must work again."""
    frontend = device.frontend
    assert frontend is not None
    frontend.stop_vring(0)
    device.queues[0].reset()
    frontend.start_vring(0, device.queues[0])
    token = device.submit_read(0, 4096, queue=0)
    assert [c.token for c in device.reap()] == [token]


def _table_over_the_end(v: Victim) -> None:
    """Its first descriptor is in memory, and leads to one that is not."""
    v.memory.write(v.end - 16, DESCRIPTOR.pack(v.header, 16, NEXT, 1))
    v.post([(v.end - 16, 48, INDIRECT, 0)])


BREAKING: dict[str, Callable[[Victim], None]] = {
    "a loop of one": lambda v: v.post([(v.data, 16, NEXT, 0)]),
    "a loop of two": lambda v: v.post([(v.data, 16, NEXT, 1), (v.data, 16, NEXT, 0)]),
    "a loop behind a good start": lambda v: v.post([*v.good[:2], (v.data, 1, WRITE | NEXT, 2)]),
    "a next beyond the table": lambda v: v.post([(v.header, 16, NEXT, SIZE)]),
    "a next far beyond the table": lambda v: v.post([(v.header, 16, NEXT, 0xFFFF)]),
    "a head beyond the table": lambda v: v.post_head(SIZE),
    "a head far beyond the table": lambda v: v.post_head(0xFFFF),
    "an address that is no memory": lambda v: v.post([(v.end, 16, 0, 0)]),
    "address 0": lambda v: v.post([(0, 16, 0, 0)]),
    "the last address": lambda v: v.post([(2**64 - 1, 1, 0, 0)]),
    "a buffer over the end of memory": lambda v: v.post([(v.end - 8, 16, 0, 0)]),
    "a buffer over the end of addresses": lambda v: v.post([(2**64 - 8, 16, 0, 0)]),
    "a buffer before memory": lambda v: v.post([(v.memory.regions[0].guest_address - 8, 16, 0, 0)]),
    "the longest buffer": lambda v: v.post([(v.data, 0xFFFFFFFF, 0, 0)]),
    "a user address": lambda v: v.post([(v.memory.user_address(v.data), 16, 0, 0)]),
    "data that is no memory": lambda v: v.post(
        [v.good[0], (v.end, 512, NEXT | WRITE, 2), v.good[2]]
    ),
    "a status that is no memory": lambda v: v.post([*v.good[:2], (v.end, 1, WRITE, 0)]),
    "a descriptor of no length": lambda v: v.post([(v.header, 0, 0, 0)]),
    "data of no length": lambda v: v.post([v.good[0], (v.data, 0, NEXT | WRITE, 2), v.good[2]]),
    "readable behind writable": lambda v: v.post(
        [(v.data, 512, NEXT | WRITE, 1), (v.header, 16, 0, 0)]
    ),
    "an index one too far": lambda v: v.post_head(0, ahead=SIZE + 1),
    "an index half around": lambda v: v.post_head(0, ahead=0x8000),
    "an index that went back": lambda v: v.post_head(0, ahead=-1),
    "an indirect table of no length": lambda v: v.post_indirect([], length=0),
    "an indirect table of half a descriptor": lambda v: v.post_indirect(v.good, length=8),
    "an indirect table of a broken length": lambda v: v.post_indirect(v.good, length=47),
    "an indirect table that is no memory": lambda v: v.post([(v.end, 48, INDIRECT, 0)]),
    "an indirect table over the end of memory": _table_over_the_end,
    "an indirect table over the end of addresses": lambda v: v.post(
        [(2**64 - 16, 48, INDIRECT, 0)]
    ),
    "an indirect table in an indirect table": lambda v: v.post_indirect(
        [(v.table, 48, INDIRECT, 0)]
    ),
    "an indirect table at the end of one": lambda v: v.post_indirect(
        [*v.good[:2], (v.table, 48, INDIRECT, 0)]
    ),
    "an indirect table with a next": lambda v: v.post_indirect(v.good, flags=NEXT),
    "an indirect table with a loop": lambda v: v.post_indirect([(v.data, 16, NEXT, 0)] * 4),
    "an indirect next beyond the table": lambda v: v.post_indirect([(v.header, 16, NEXT, 3)] * 3),
    "an indirect table of too many pieces": lambda v: v.post_indirect(
        [(v.data, 1, NEXT, at + 1) for at in range(3000)]
    ),
    "an indirect table of 4 GiB": lambda v: v.post_indirect(
        [(v.data, 1, NEXT, 0)], length=0xFFFFFFF0
    ),
    "an indirect address that is no memory": lambda v: v.post_indirect([(v.end, 16, 0, 0)]),
    "an indirect descriptor of no length": lambda v: v.post_indirect([(v.header, 0, 0, 0)]),
}


@pytest.mark.parametrize("case", BREAKING)
def test_a_broken_ring_costs_only_itself(target: Backend, case: str) -> None:
    with victim(target) as v:
        BREAKING[case](v)
        _await_broken(v.queue)
        assert v.queue.used_index == 0
        _io_on_the_other_ring(v.device)
        _restart(v.device)


def test_an_indirect_table_that_was_not_negotiated_breaks_the_ring(target: Backend) -> None:
    features = DRIVER_FEATURES & ~VirtioFeature.INDIRECT_DESC
    with victim(target, features=features) as v:
        v.post_indirect(v.good)
        _await_broken(v.queue)
        _io_on_the_other_ring(v.device)


def test_requests_before_the_broken_one_are_done(target: Backend) -> None:
    with victim(target) as v:
        data = pattern("before", 512)
        for at in range(3):
            v.device.submit(BlockRequest.OUT, at, data_out=data, queue=0, kick=False, indirect=True)
        index = 3
        v.queue.write_available(index, 0xFFFF)
        v.queue.store_available_index(index + 1)
        v.queue.kick()
        _await_broken(v.queue)
        poll_until(lambda: v.queue.used_index == 3, "three requests")
        assert all(c.status == BlockStatus.OK for c in v.device.reap(minimum=3))


# Requests that are wrong, in rings that are right.


def _answer(
    v: Victim, rows: Sequence[Row], *, status_at: int | None = None
) -> tuple[int, int | None]:
    """Used length, and the status byte."""
    if status_at is not None:
        v.memory.write(status_at, b"\xff")
    before = v.queue.used_index
    v.post(rows)
    poll_until(lambda: v.queue.used_index == before + 1, "the request")
    length = v.queue.used_element(before).len_bytes
    return length, None if status_at is None else v.memory.read(status_at, 1)[0]


def test_a_request_without_room_for_a_status_is_used(target: Backend) -> None:
    with victim(target) as v:
        assert _answer(v, [(v.header, 16, 0, 0)]) == (0, None)
        assert _answer(v, [v.good[0], (v.data, 4096, 0, 0)]) == (0, None)
        _io_on_the_other_ring(v.device)


def test_a_request_without_a_whole_header_fails(target: Backend) -> None:
    with victim(target) as v:
        status = v.data + 512
        for rows in (
            [(v.data, 512, NEXT | WRITE, 1), (status, 1, WRITE, 0)],
            [(v.header, 1, NEXT, 1), (status, 1, WRITE, 0)],
            [(v.header, 15, NEXT, 1), (status, 1, WRITE, 0)],
        ):
            assert _answer(v, rows, status_at=status)[1] == BlockStatus.IOERR


def test_a_request_larger_than_allowed_fails(target: Backend) -> None:
    """The same memory again and again: 130 times 4 MiB."""
    with target.device(queues=2, queue_size=SIZE, memory_bytes=16 << 20) as device:
        v = Victim(device)
        large = v.memory.allocate(4 << 20, align=4096)
        status = v.memory.allocate(1)
        for kind, flags in ((BlockRequest.IN, WRITE), (BlockRequest.OUT, 0)):
            v.memory.write(v.header, HEADER.pack(kind, 0, 0))
            rows: list[Row] = [(v.header, 16, NEXT, 1)]
            rows += [(large, 4 << 20, flags | NEXT, at + 2) for at in range(130)]
            rows += [(status, 1, WRITE, 0)]
            for at, row in enumerate(rows):
                v.memory.write(v.table + 16 * at, DESCRIPTOR.pack(*row))
            v.memory.write(status, b"\xff")
            before = v.queue.used_index
            v.post([(v.table, 16 * len(rows), INDIRECT, 0)])
            poll_until(lambda before=before: v.queue.used_index == before + 1, "the answer")  # type: ignore[misc]
            assert v.memory.read(status, 1)[0] == BlockStatus.IOERR


def test_a_read_over_its_own_ring_harms_nobody_else(target: Backend) -> None:
    """The guest may have its rings overwritten; that is its own affair."""
    for turn in range(10):
        with victim(target) as v:
            at = v.queue.addresses
            # Nothing of the other ring may lie in the page that will be overwritten.
            while v.memory.allocate(16) < at.descriptor + 4096:
                pass
            for address in (at.descriptor, at.available, at.used):
                rows = [v.good[0], (address & ~511, 4096, NEXT | WRITE, 2), v.good[2]]
                v.post(rows)
            _io_on_the_other_ring(v.device)
            v.device.close()
        assert target.is_alive(), turn


def test_a_chain_that_changes_after_the_kick_harms_nobody_else(target: Backend, seed: int) -> None:
    """Descriptors, header and index are rewritten while the device reads them."""
    rng = random.Random(seed)
    with victim(target) as v:
        stop = threading.Event()

        def scribble() -> None:
            while not stop.is_set():
                address = rng.choice([v.data, v.end, 0, v.header, 2**64 - 8])
                length = rng.choice([0, 1, 16, 512, 0xFFFFFFFF])
                v.queue.write_descriptor(rng.randrange(3), address, length, rng.randrange(8), 1)
                v.memory.write(v.header, struct.pack("<II", rng.choice([0, 1, 4, 8, 11]), 0))

        thread = threading.Thread(target=scribble)
        thread.start()
        try:
            for _ in range(30):
                for _ in range(50):
                    v.post(v.good)
                if v.queue.is_broken():
                    _io_on_the_other_ring(v.device)
                    assert v.device.frontend is not None
                    v.device.frontend.stop_vring(0)
                    v.queue.reset()
                    v.device.frontend.start_vring(0, v.queue)
        finally:
            stop.set()
            thread.join()
        _io_on_the_other_ring(v.device)


# Rings and memory that are not there.


def test_a_ring_outside_memory_is_refused(target: Backend) -> None:
    with victim(target) as v:
        frontend = v.device.frontend
        assert frontend is not None
        frontend.stop_vring(0)
        user = v.memory.user_address
        at = v.queue.addresses
        good = (user(at.descriptor), user(at.used), user(at.available))
        end = user(v.end - 16) + 16
        for which in range(3):
            for bad in (0, 16, end, end - 16, 2**64 - 16, at.descriptor):
                addresses = list(good)
                addresses[which] = bad
                results = [
                    frontend.tell_for_result(request, payload, fds)
                    for request, payload, fds in (
                        (FrontendRequest.SET_VRING_NUM, struct.pack("=II", 0, SIZE), []),
                        (
                            FrontendRequest.SET_VRING_ADDR,
                            struct.pack("=IIQQQQ", 0, 0, *addresses, 0),
                            [],
                        ),
                        (
                            FrontendRequest.SET_VRING_KICK,
                            struct.pack("=Q", 0),
                            [v.queue.kick_fd or 0],
                        ),
                    )
                ]
                assert any(results), (which, hex(bad))
                frontend.stop_vring(0)
        _io_on_the_other_ring(v.device)
        _restart(v.device)


def test_memory_cannot_be_taken_from_under_a_ring_in_use(target: Backend) -> None:
    """REM_MEM_REG of the region with the rings: refused, or the ring stops; never a crash."""
    with victim(target) as v:
        frontend = v.device.frontend
        assert frontend is not None
        try:
            frontend.remove_region(v.memory.regions[0])
        except BackendError:
            _io_on_the_other_ring(v.device)
            return
        v.post(v.good)
        frontend.ask_u64(FrontendRequest.GET_FEATURES)


@pytest.mark.parametrize("with_io", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("keep_bytes", [0, 4096, 1 << 20])
def test_memory_truncated_under_the_device_costs_only_the_session(
    vhostd_target: Backend, keep_bytes: int, with_io: bool
) -> None:
    """Touching a page beyond the end of its file is SIGBUS; the reference in Python dies of it."""
    memory_bytes = 4 << 20
    device = vhostd_target.device(
        queues=2, queue_size=SIZE, memory_bytes=memory_bytes, timeout_s=10
    )
    frontend = device.frontend
    assert frontend is not None
    kicks = [queue.kick_fd for queue in device.queues]
    if with_io:
        for at in range(10):
            device.submit_read(at * 4096, 4096, queue=0)
    # From here on nothing of ours may touch the mapping either, until the file is whole again.
    fd = device.memory.regions[0].fd
    os.ftruncate(fd, keep_bytes)
    try:
        for kick in kicks:
            assert kick is not None
            os.eventfd_write(kick, 1)
        # The session is ended by the daemon, or goes on if it never touched what is gone.
        with contextlib.suppress(UnavailableError):
            for _ in range(100):
                frontend.get_config()
    finally:
        os.ftruncate(fd, memory_bytes)
        device.close()
    with vhostd_target.device() as again:
        check_io(again, "after truncation")


def test_the_error_descriptor_is_optional(target: Backend) -> None:
    with victim(target) as v:
        frontend = v.device.frontend
        assert frontend is not None
        frontend.tell_vring_fd(FrontendRequest.SET_VRING_ERR, 0, None)
        v.post_head(0xFFFF)
        _io_on_the_other_ring(v.device)
        _restart(v.device)
