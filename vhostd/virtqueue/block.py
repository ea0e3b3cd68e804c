"""A virtio-blk disk behind a vhost-user socket, as a client library.

`BlockDevice` negotiates, sets up memory and queues, and moves data: one request at a time (`read`,
`write`, `flush`, …) or pipelined (`submit_*`, then `reap`). Import and export go through it, and so
do the tests, which also use `submit`, where the layout of the descriptors is free.

Invariants:
- Every submitted request is reaped once, or the device is closed or restarted.
- The number of requests in flight is bounded by the queues and by the guest memory; beyond,
  `submit_*` raises BusyError and changes nothing.

A device belongs to one thread at a time.
"""

from __future__ import annotations

import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from vhostd.errors import UnavailableError, UnsupportedError, UsageError, VhostdError
from vhostd.protocol.features import ProtocolFeature, VirtioFeature
from vhostd.virtqueue.config import BlockConfig
from vhostd.virtqueue.constants import ID_BYTES, SECTOR_BYTES, BlockRequest, BlockStatus
from vhostd.virtqueue.driver import Buffer, SplitDriver, wait_for_used
from vhostd.virtqueue.errors import BackendError, RequestError
from vhostd.virtqueue.frontend import DEFAULT_PROTOCOL_FEATURES, Frontend
from vhostd.virtqueue.memory import GuestMemory

__all__ = ["DRIVER_FEATURES", "BlockDevice", "Completion", "Extent"]

DRIVER_FEATURES = int(
    VirtioFeature.BLK_SIZE_MAX
    | VirtioFeature.BLK_SEG_MAX
    | VirtioFeature.BLK_GEOMETRY
    | VirtioFeature.BLK_RO
    | VirtioFeature.BLK_BLK_SIZE
    | VirtioFeature.BLK_FLUSH
    | VirtioFeature.BLK_TOPOLOGY
    | VirtioFeature.BLK_CONFIG_WCE
    | VirtioFeature.BLK_MQ
    | VirtioFeature.BLK_DISCARD
    | VirtioFeature.BLK_WRITE_ZEROES
    | VirtioFeature.INDIRECT_DESC
    | VirtioFeature.EVENT_IDX
    | VirtioFeature.VERSION_1
)
"""What this driver can use."""

HEADER = struct.Struct("<IIQ")
"""type, reserved, sector (virtio 1.3, 5.2.6)."""
EXTENT = struct.Struct("<QII")
"""sector, sectors, flags: struct virtio_blk_discard_write_zeroes."""
WRITE_ZEROES_UNMAP = 1

_LARGEST_REQUEST_BYTES = 1 << 20
_PAGE_BYTES = 4096


class Extent(NamedTuple):
    """A part of the disk, for discard and write-zeroes."""

    offset_bytes: int
    len_bytes: int


class Completion(NamedTuple):
    """A request that was used by the device.

    Attributes:
        token: what `submit` returned.
        status: the status byte; `BlockStatus.UNWRITTEN` if the device left it alone.
        data: the writable bytes before the status, whether the device wrote them or not.
        used_bytes: the length of the used element.
    """

    token: int
    status: int
    data: bytes
    used_bytes: int


@dataclass(slots=True)
class _Request:
    token: int
    buffers: list[int]
    """To be released."""
    writable: list[Buffer]
    what: str


class BlockDevice:
    """A disk at a socket. Use it as a context manager, or call `close`.

    Args:
        path: the vhost-user socket.
        queues, queue_size: how many, and entries of each.
        features: virtio features wanted; those not offered are left out.
        protocol_features: likewise.
        memory: guest memory to use (and to close with the device); None: one region of
            `memory_bytes`.
        timeout_s: for an answer to a message, and for a request in the synchronous methods.
        kick, call: false to have no such descriptor (the device polls; we poll).
        start: false to leave the queues to the caller (`start`).

    Raises:
        NotFoundError, UnavailableError: no socket, nobody there, or no answer.
        UnsupportedError: the back-end lacks what this driver needs.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        queues: int = 1,
        queue_size: int = 128,
        features: int = DRIVER_FEATURES,
        protocol_features: int = DEFAULT_PROTOCOL_FEATURES,
        memory: GuestMemory | None = None,
        memory_bytes: int = 64 << 20,
        timeout_s: float = 30.0,
        kick: bool = True,
        call: bool = True,
        start: bool = True,
    ) -> None:
        self.path = os.fspath(path)
        self.timeout_s = timeout_s
        self.queue_size = queue_size
        self._wanted = features
        self._wanted_protocol = protocol_features
        self._kick, self._call = kick, call
        self._next_token = 0
        self._next_queue = 0
        self.queues: list[SplitDriver] = []
        self._requests: list[dict[int, _Request]] = []
        self.memory = GuestMemory(memory_bytes) if memory is None else memory
        self.frontend: Frontend | None = None
        try:
            self.connect()
            self._check(queues)
            if start:
                self.start(queues)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Life

    def connect(self) -> None:
        """Connects and negotiates; reads the config space."""
        self.frontend = frontend = Frontend(self.path, timeout_s=self.timeout_s)
        frontend.negotiate(self._wanted, protocol_wanted=self._wanted_protocol)
        self.features = frontend.features
        self.config = self.read_config()

    def read_config(self) -> BlockConfig:
        """The config space as it is now. A back-end without CONFIG has no capacity to tell."""
        frontend = self._connected()
        if not frontend.has(ProtocolFeature.CONFIG):
            raise UnsupportedError(
                f"the back-end at {self.path} does not offer CONFIG, so the size of its disk "
                "cannot be known"
            )
        return BlockConfig.decode(frontend.get_config())

    def _check(self, queues: int) -> None:
        frontend = self._connected()
        if not self.features & VirtioFeature.VERSION_1:
            raise UnsupportedError(f"the back-end at {self.path} does not offer VERSION_1")
        if queues > frontend.max_queues:
            raise UsageError(
                f"the back-end at {self.path} has {frontend.max_queues} queues, not {queues}; "
                "ask for fewer"
            )

    def start(self, queues: int = 1, *, share_memory: bool = True) -> None:
        """Shares the memory, makes queues and starts them."""
        frontend = self._connected()
        if share_memory:
            self._share_memory()
        for index in range(queues):
            queue = SplitDriver(
                self.memory,
                size=self.queue_size,
                features=self.features,
                kick=self._kick,
                call=self._call,
            )
            self.queues.append(queue)
            self._requests.append({})
            frontend.start_vring(index, queue)

    def _share_memory(self) -> None:
        """The first 8 regions by SET_MEM_TABLE, the others one by one."""
        frontend = self._connected()
        regions = self.memory.regions
        frontend.set_memory(regions[:8])
        for region in regions[8:]:
            frontend.add_region(region)

    def stop(self) -> list[int]:
        """Stops all queues; returns their next available indexes."""
        return self._connected().stop_vrings(range(len(self.queues)))

    def resume(self, bases: Sequence[int]) -> None:
        """Starts the queues again where they were stopped."""
        frontend = self._connected()
        for index, (queue, base) in enumerate(zip(self.queues, bases, strict=True)):
            frontend.start_vring(index, queue, base=base)

    def reconnect(self) -> None:
        """A new session with the same memory. Requests that were in flight are given up."""
        if self.frontend is not None:
            self.frontend.close()
        self.connect()
        self._share_memory()
        for index, queue in enumerate(self.queues):
            self._give_up(index)
            self._connected().start_vring(index, queue, base=queue.available_index)

    def _give_up(self, index: int) -> None:
        self.queues[index].forget()
        for request in self._requests[index].values():
            self._release(request.buffers)
        self._requests[index].clear()

    def close(self) -> None:
        """Ends the session; what is in flight is given up. A second call does nothing."""
        if self.frontend is not None:
            self.frontend.close()
            self.frontend = None
        for queue in self.queues:
            queue.close()
        self.queues.clear()
        self._requests.clear()
        self.memory.close()

    def _connected(self) -> Frontend:
        if self.frontend is None:
            raise UnavailableError(f"the disk at {self.path} is closed; open it again")
        return self.frontend

    # What the disk is

    def has(self, feature: VirtioFeature) -> bool:
        return bool(self.features & feature)

    @property
    def capacity_bytes(self) -> int:
        return self.config.capacity_sectors * SECTOR_BYTES

    @property
    def block_bytes(self) -> int:
        """The logical block: offsets and lengths are multiples of it."""
        return self.config.block_bytes if self.has(VirtioFeature.BLK_BLK_SIZE) else SECTOR_BYTES

    @property
    def read_only(self) -> bool:
        return self.has(VirtioFeature.BLK_RO)

    @property
    def max_request_bytes(self) -> int:
        """Data of one request that the device's limits and ours allow."""
        return max(
            self.block_bytes,
            min(_LARGEST_REQUEST_BYTES, self._max_segment_bytes() * self._max_segments())
            // self.block_bytes
            * self.block_bytes,
        )

    @property
    def max_write_zeroes_bytes(self) -> int:
        """What one extent of a write-zeroes may have."""
        sectors = self.config.max_write_zeroes_sectors or _LARGEST_REQUEST_BYTES // SECTOR_BYTES
        return max(self.block_bytes, sectors * SECTOR_BYTES // self.block_bytes * self.block_bytes)

    def _max_segment_bytes(self) -> int:
        if self.has(VirtioFeature.BLK_SIZE_MAX) and self.config.size_max_bytes:
            return self.config.size_max_bytes
        return _LARGEST_REQUEST_BYTES

    def _max_segments(self) -> int:
        limit = self.queue_size - 2
        if self.has(VirtioFeature.BLK_SEG_MAX) and self.config.seg_max:
            limit = min(limit, self.config.seg_max)
        return max(1, limit)

    # Pipelined

    @property
    def in_flight(self) -> int:
        return sum(len(requests) for requests in self._requests)

    def submit_read(self, offset_bytes: int, len_bytes: int, *, queue: int | None = None) -> int:
        """Starts a read of up to `max_request_bytes`; returns its token."""
        sector = self._sector(offset_bytes, len_bytes)
        return self.submit(BlockRequest.IN, sector, data_in_bytes=len_bytes, queue=queue)

    def submit_write(
        self, offset_bytes: int, data: bytes | bytearray | memoryview, *, queue: int | None = None
    ) -> int:
        """Starts a write of up to `max_request_bytes`. The data is copied before this returns."""
        sector = self._sector(offset_bytes, len(data))
        return self.submit(BlockRequest.OUT, sector, data_out=data, queue=queue)

    def submit_flush(self, *, queue: int | None = None) -> int:
        return self.submit(BlockRequest.FLUSH, queue=queue)

    def submit_discard(self, extents: Sequence[Extent], *, queue: int | None = None) -> int:
        return self.submit(BlockRequest.DISCARD, data_out=self._extents(extents, 0), queue=queue)

    def submit_write_zeroes(
        self, extents: Sequence[Extent], *, unmap: bool = True, queue: int | None = None
    ) -> int:
        flags = WRITE_ZEROES_UNMAP if unmap else 0
        data = self._extents(extents, flags)
        return self.submit(BlockRequest.WRITE_ZEROES, data_out=data, queue=queue)

    def _sector(self, offset_bytes: int, len_bytes: int) -> int:
        if (offset_bytes | len_bytes) % SECTOR_BYTES or offset_bytes < 0:
            raise UsageError(
                f"{len_bytes} bytes at {offset_bytes} of {self.path} are not whole sectors of "
                f"{SECTOR_BYTES} bytes"
            )
        return offset_bytes // SECTOR_BYTES

    def _extents(self, extents: Sequence[Extent], flags: int) -> bytes:
        return b"".join(
            EXTENT.pack(self._sector(e.offset_bytes, e.len_bytes), e.len_bytes // 512, flags)
            for e in extents
        )

    def submit(
        self,
        kind: int,
        sector: int = 0,
        *,
        data_out: bytes | bytearray | memoryview = b"",
        data_in_bytes: int = 0,
        readable_cuts: Iterable[int] | None = None,
        writable_cuts: Iterable[int] | None = None,
        indirect: bool | None = None,
        place: Callable[[int], int] | None = None,
        queue: int | None = None,
        kick: bool | None = None,
    ) -> int:
        """Starts any request, in any layout; returns its token.

        The device reads header and `data_out` as one stream, and writes `data_in_bytes` and the
        status as another. Cuts are byte positions in the streams where a descriptor ends and the
        next begins; by default the header, the data (in segments the device allows) and the
        status have descriptors of their own.

        Args:
            indirect: None: if it was negotiated and saves descriptors.
            place: gives a guest address for a piece of so many bytes, which then stays the
                caller's.
            queue: None: one after the other.
            kick: None: as the device wants; False also leaves the chain unpublished.

        Raises BusyError if the queue or the memory is full; reap first.
        """
        at = self._pick_queue(queue)
        driver = self.queues[at]
        out_bytes = HEADER.size + len(data_out)
        segment = self._max_segment_bytes()
        if readable_cuts is None:
            readable_cuts = range(HEADER.size, out_bytes, segment)
        if writable_cuts is None:
            writable_cuts = (*range(segment, data_in_bytes, segment), data_in_bytes)
        header = HEADER.pack(kind & 0xFFFFFFFF, 0, sector)
        mine: list[int] = []
        try:
            buffers = []
            for start, end in _pieces(out_bytes, readable_cuts):
                address = self._place(end - start, place, mine)
                # At most one piece has bytes of both.
                if start < HEADER.size:
                    self.memory.write(address, header[start:end])
                if end > HEADER.size:
                    skip = max(0, HEADER.size - start)
                    piece = memoryview(data_out)[start + skip - HEADER.size : end - HEADER.size]
                    self.memory.write(address + skip, piece)
                buffers.append(Buffer(address, end - start))
            writable = []
            for start, end in _pieces(data_in_bytes + 1, writable_cuts):
                address = self._place(end - start, place, mine)
                writable.append(Buffer(address, end - start, writable=True))
            self.memory.write(
                writable[-1].address + writable[-1].len_bytes - 1, bytes([BlockStatus.UNWRITTEN])
            )
            buffers += writable
            if indirect is None:
                indirect = self.has(VirtioFeature.INDIRECT_DESC) and len(buffers) > 1
            head = driver.add(buffers, indirect=indirect)
        except VhostdError:
            self._release(mine)
            raise
        token = self._next_token
        self._next_token += 1
        what = f"{_kind_name(kind)} at sector {sector} of {self.path}"
        self._requests[at][head] = _Request(token, mine, writable, what)
        if kick is not False:
            driver.publish(kick=kick)
        return token

    def publish(self, *, queue: int = 0, kick: bool | None = None) -> bool:
        """Shows what was submitted with `kick=False`; returns whether the device was notified."""
        return self.queues[queue].publish(kick=kick)

    def reap(
        self, *, minimum: int = 1, timeout_s: float | None = None, queue: int | None = None
    ) -> list[Completion]:
        """What has completed; waits until that is at least `minimum` (or all that is in flight).

        `queue`: look at that one only.

        Raises UnavailableError if that takes longer than `timeout_s`, or the back-end goes away;
        what had completed by then is lost to the caller.
        """
        found: list[Completion] = []
        chosen = range(len(self.queues)) if queue is None else (queue,)
        queues = [self.queues[at] for at in chosen]
        minimum = min(minimum, sum(len(self._requests[at]) for at in chosen))
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        lost_fd = self._connected().fileno()
        while True:
            left_s = deadline - time.monotonic() if len(found) < minimum else 0
            used = wait_for_used(queues, max(0.0, left_s), lost_fd=lost_fd)
            for at, elements in zip(chosen, used, strict=True):
                for head, used_bytes in elements:
                    found.append(self._complete(self._requests[at].pop(head), used_bytes))
            if len(found) >= minimum:
                return found
            if time.monotonic() >= deadline:
                raise UnavailableError(
                    f"the back-end at {self.path} completed {len(found)} of {minimum} requests "
                    f"in {limit_s:g} s"
                )

    def wait_for(self, token: int) -> Completion:
        """Reaps until one request is done; it must be the only one in flight."""
        done = self.reap()
        if len(done) != 1 or done[0].token != token:
            raise BackendError(f"the back-end at {self.path} completed a request twice")
        return done[0]

    def _complete(self, request: _Request, used_bytes: int) -> Completion:
        pieces = [self.memory.read(b.address, b.len_bytes) for b in request.writable]
        last = pieces[-1]
        status = last[-1]
        pieces[-1] = last[:-1]
        if not pieces[-1]:
            pieces.pop()
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._release(request.buffers)
        return Completion(request.token, status, data, used_bytes)

    def _place(self, size_bytes: int, place: Callable[[int], int] | None, mine: list[int]) -> int:
        if place is not None:
            return place(size_bytes)
        align = _PAGE_BYTES if size_bytes >= _PAGE_BYTES else 16
        mine.append(self.memory.allocate(size_bytes, align=align))
        return mine[-1]

    def _release(self, buffers: Iterable[int]) -> None:
        for address in buffers:
            self.memory.release(address)

    def _pick_queue(self, queue: int | None) -> int:
        if queue is not None:
            return queue
        if not self.queues:
            raise UsageError(f"the disk at {self.path} has no queue started; call start first")
        self._next_queue = (self._next_queue + 1) % len(self.queues)
        return self._next_queue

    # One at a time

    def request(self, kind: int, sector: int = 0, **layout: object) -> Completion:
        """`submit`, and wait for it; whatever its status. Nothing else may be in flight."""
        if self.in_flight:
            raise UsageError("synchronous requests need an empty pipeline; reap first")
        return self.wait_for(self.submit(kind, sector, **layout))  # type: ignore[arg-type]

    def read(self, offset_bytes: int, len_bytes: int) -> bytes:
        """Any length in sectors, in as many requests as it takes. Raises RequestError."""
        if not len_bytes:
            return b""
        step = self.max_request_bytes
        found: dict[int, bytes] = {}
        starts = iter(range(0, len_bytes, step))
        tokens: dict[int, int] = {}

        def submit(start: int) -> None:
            size = min(step, len_bytes - start)
            tokens[self.submit_read(offset_bytes + start, size)] = start

        for done in self._pipeline(starts, submit):
            start = tokens[done.token]
            self._must_be_ok(f"read of {step} bytes at {offset_bytes + start}", done)
            found[start] = done.data
        return b"".join(found[start] for start in sorted(found))

    def write(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Any length in sectors, in as many requests as it takes. Raises RequestError."""
        step = self.max_request_bytes
        view = memoryview(data)
        tokens: dict[int, int] = {}

        def submit(start: int) -> None:
            token = self.submit_write(offset_bytes + start, view[start : start + step])
            tokens[token] = start

        for done in self._pipeline(iter(range(0, len(view), step)), submit):
            start = offset_bytes + tokens[done.token]
            self._must_be_ok(f"write of up to {step} bytes at {start}", done)

    def flush(self) -> None:
        """Returns when everything written before is durable.

        Without FLUSH negotiated every write is durable already (virtio 1.3, 5.2.6.2).
        """
        if self.has(VirtioFeature.BLK_FLUSH):
            self._must_be_ok("flush", self.request(BlockRequest.FLUSH))

    def discard(self, offset_bytes: int, len_bytes: int) -> None:
        """Any length; gives the space back. The content is undefined until it is written."""
        self._unmap(BlockRequest.DISCARD, offset_bytes, len_bytes, 0)

    def write_zeroes(self, offset_bytes: int, len_bytes: int, *, unmap: bool = True) -> None:
        """Any length; reads as zeroes afterwards. `unmap`: the space may be given back."""
        flags = WRITE_ZEROES_UNMAP if unmap else 0
        self._unmap(BlockRequest.WRITE_ZEROES, offset_bytes, len_bytes, flags)

    def _unmap(self, kind: BlockRequest, offset_bytes: int, len_bytes: int, flags: int) -> None:
        discard = kind is BlockRequest.DISCARD
        if not self.has(VirtioFeature.BLK_DISCARD if discard else VirtioFeature.BLK_WRITE_ZEROES):
            raise UnsupportedError(f"the disk at {self.path} does not offer {kind.name}")
        config = self.config
        limit = config.max_discard_sectors if discard else config.max_write_zeroes_sectors
        sector, left = self._sector(offset_bytes, len_bytes), len_bytes // SECTOR_BYTES
        aligned = self.block_bytes // SECTOR_BYTES
        limit = max(aligned, (limit or left) // aligned * aligned)
        while left:
            here = min(left, limit)
            done = self.request(kind, data_out=EXTENT.pack(sector, here, flags))
            self._must_be_ok(f"{kind.name} of {here} sectors at sector {sector}", done)
            sector += here
            left -= here

    def get_id(self) -> str:
        """The disk's serial, up to 20 bytes."""
        done = self.request(BlockRequest.GET_ID, data_in_bytes=ID_BYTES)
        self._must_be_ok("GET_ID", done)
        return done.data.split(b"\0")[0].decode("ascii", "replace")

    def set_write_cache(self, enabled: bool) -> None:
        """Writes `writeback` (needs CONFIG_WCE)."""
        self._connected().set_config(BlockConfig.WRITEBACK_OFFSET, bytes([enabled]))
        self.config = self.read_config()

    def _pipeline(
        self, starts: Iterator[int], submit: Callable[[int], None]
    ) -> Iterator[Completion]:
        """Keeps up to 8 requests in flight until `starts` is used up."""
        if self.in_flight:
            raise UsageError("synchronous requests need an empty pipeline; reap first")
        done: deque[Completion] = deque()
        try:
            while True:
                while self.in_flight < min(8, self.queue_size // 4 or 1):
                    start = next(starts, None)
                    if start is None:
                        break
                    submit(start)
                if not self.in_flight:
                    return
                done.extend(self.reap())
                while done:
                    yield done.popleft()
        finally:
            # After a failed request the others are still under way.
            while self.frontend is not None and self.in_flight:
                self.reap(minimum=self.in_flight)

    def _must_be_ok(self, what: str, done: Completion) -> None:
        if done.status != BlockStatus.OK:
            raise RequestError(f"{what} of {self.path}", done.status)


def _pieces(total_bytes: int, cuts: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of the pieces of a stream, none of them empty."""
    start = 0
    for cut in (*sorted(set(cuts)), total_bytes):
        if start < cut <= total_bytes:
            yield start, cut
            start = cut


def _kind_name(kind: int) -> str:
    try:
        return BlockRequest(kind).name
    except ValueError:
        return f"request of type {kind}"
