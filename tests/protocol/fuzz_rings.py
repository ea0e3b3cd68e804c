"""Fuzzes rings: batches of chains, most of them nearly right, each judged beforehand by the
reference device.

A case is one chain. In a batch (one queue, up to 32 chains) chains are valid or changed in a field
or two; now and then one breaks the ring, which is then stopped and started again on the same
connection. What must hold:
- the chains that the reference takes before the ring breaks are used, with the same lengths and
  statuses, in any order;
- where it says that the ring breaks, the error descriptor is signalled, and where not, it is not;
- nothing hangs.

Where a batch lets the device write over what it reads (descriptors, headers, the rings of all
queues), only the last is asked, of all batches that run with it. Belongs to one thread.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import select
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vhostd.errors import VhostdError
from vhostd.protocol.features import VirtioFeature
from vhostd.virtqueue.block import DRIVER_FEATURES, BlockDevice
from vhostd.virtqueue.config import BlockConfig
from vhostd.virtqueue.constants import BlockRequest, DescriptorFlag, FrontendRequest
from vhostd.virtqueue.driver import SplitDriver
from vhostd.virtqueue.layout import DESCRIPTOR
from vhostd.virtqueue.memory import GuestMemory
from vhostd.virtqueue.reference import BrokenRingError, Chain, ReferenceRing
from vhostd.virtqueue.reference_block import ReferenceDisk

NEXT, WRITE, INDIRECT = DescriptorFlag.NEXT, DescriptorFlag.WRITE, DescriptorFlag.INDIRECT
QUEUES = 4
QUEUE_SIZE = 256
CHAINS = 32
SLOT = QUEUE_SIZE // CHAINS
"""Descriptors that belong to one chain of a batch."""
SLOT_BYTES = 8192
EVENT_TIMEOUT_MS = 30_000
RECONNECT_EVERY = 2000
MIB = 1 << 20

CONTROL_AT, CONTROL_BYTES = 0x1_0000_0000, 2 * MIB
"""Rings, headers, tables, statuses and what is written: the device only reads it (but statuses)."""
SINK_AT, SINK_BYTES = 0x2_0000_0000, 4 * MIB
"""What is read: the device only writes it."""


class FuzzError(AssertionError):
    """The back-end did what it must not; the message says how to repeat it."""


class _Shadow:
    """`DeviceMemory` over the guest's, whose writes go nowhere."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    def pieces(self, address: int, len_bytes: int) -> int:
        found = self._memory.spans(address, len_bytes)
        if found is None or address + len_bytes > 1 << 64:
            raise BrokenRingError(f"there is no guest memory at {address:#x}")
        return found

    def read(self, address: int, len_bytes: int) -> bytes:
        return self._memory.read(address, len_bytes)

    def write(self, address: int, data: bytes) -> None:
        pass


class _Judge(ReferenceDisk):
    """A disk that is never touched: statuses only."""

    def __post_init__(self) -> None:
        self.data = bytearray()

    def load(self, offset_bytes: int, len_bytes: int) -> bytes:
        return b""

    def store(self, offset_bytes: int, data: bytes) -> None:
        pass

    def zero(self, offset_bytes: int, len_bytes: int) -> None:
        pass


@dataclass(slots=True)
class _Batch:
    """What the reference says of one batch."""

    queue: SplitDriver
    first_used: int
    used: Counter[tuple[int, int]] = field(default_factory=Counter)
    statuses: list[tuple[int, int]] = field(default_factory=list)
    """Address and value, of those that only one chain writes."""
    broken: str | None = None
    checked: bool = True


class RingFuzzer:
    """Runs cases against the socket at `path` until `run` has done enough of them."""

    def __init__(self, path: Path, *, seed: int) -> None:
        self._path = path
        self._seed = seed
        self._rng = random.Random(seed)
        self.cases = 0
        self.broken = 0
        self.unjudged = 0
        self._rounds = 0

    def run(self, cases: int, *, report: Callable[[str], None] = lambda _: None) -> None:
        """At least so many cases. Raises FuzzError."""
        goal = self.cases + cases
        while self.cases < goal:
            event_idx = self._rng.random() < 0.5
            features = DRIVER_FEATURES & ~(0 if event_idx else VirtioFeature.EVENT_IDX)
            memory = GuestMemory(CONTROL_BYTES, guest_address=CONTROL_AT)
            memory.add_region(SINK_AT, SINK_BYTES)
            with BlockDevice(
                self._path,
                queues=QUEUES,
                queue_size=QUEUE_SIZE,
                features=features,
                memory=memory,
            ) as device:
                self._prepare(device)
                for _ in range(RECONNECT_EVERY // (QUEUES * CHAINS) + 1):
                    self._round(device)
                    if self.cases >= goal:
                        break
            report(f"{self.cases} chains ({self.unjudged} not judged), {self.broken} broken rings")

    def _prepare(self, device: BlockDevice) -> None:
        memory = device.memory
        self._shadow = _Shadow(memory)
        config: BlockConfig = device.config
        self._capacity = config.capacity_sectors
        self._disk = _Judge(
            device.capacity_bytes,
            device.block_bytes,
            device.read_only,
            max_unmap_sectors=config.max_discard_sectors,
            max_unmap_segments=config.max_discard_segments,
        )
        self._pools = []
        for _ in device.queues:
            self._pools.append(memory.allocate(CHAINS * SLOT_BYTES, align=SLOT_BYTES))
            memory.write(self._pools[-1], self._rng.randbytes(CHAINS * SLOT_BYTES))

    def _round(self, device: BlockDevice) -> None:
        self._rounds += 1
        before = self.cases
        batches = []
        for at, queue in enumerate(device.queues):
            batches.append(self._batch(queue, at))
        if not all(batch.checked for batch in batches):
            # What one lets the device overwrite may be the others' descriptors.
            self.unjudged += self.cases - before
            for batch in batches:
                batch.checked = False
        for batch in batches:
            batch.queue.kick()
        for at, batch in enumerate(batches):
            self._await(batch)
            self._check(device, batch)
            if batch.broken is not None or not batch.checked:
                self.broken += batch.broken is not None
                self._restart(device, at, batch.queue)

    # Making

    def _batch(self, queue: SplitDriver, at: int) -> _Batch:
        rng = self._rng
        memory = queue.memory
        start = queue.available_index
        count = rng.randint(1, CHAINS)
        for number in range(count):
            slot_at = self._pools[at] + number * SLOT_BYTES
            sink_at = SINK_AT + (at * CHAINS + number) * SLOT_BYTES
            head = self._chain(queue, memory, number * SLOT, slot_at, sink_at)
            queue.write_available((start + number) % QUEUE_SIZE, head)
        self.cases += count
        end = start + count
        if rng.random() < 0.01:
            end = start + rng.choice([QUEUE_SIZE + 1, 0x8000, 0xFFFF, rng.randrange(1 << 16)])
        batch = self._foresee(queue, at, start, end & 0xFFFF)
        queue.store_available_index(end & 0xFFFF)
        return batch

    def _chain(
        self, queue: SplitDriver, memory: GuestMemory, first: int, slot_at: int, sink_at: int
    ) -> int:
        """Writes one chain; returns what goes into the available ring."""
        rng = self._rng
        kind = rng.choice([0, 0, 0, 1, 1, 1, 4, 8, 11, 13, 13])
        sectors = rng.choice([1, 1, 2, 7, 8])
        sector = rng.randrange(self._capacity - 8)
        out, room = b"", 0
        if kind == BlockRequest.IN:
            room = sectors * 512
        elif kind == BlockRequest.OUT:
            out = b"\x5a" * (sectors * 512)
        elif kind == BlockRequest.GET_ID:
            room = rng.choice([20, 20, 5, 64])
        elif kind in (BlockRequest.DISCARD, BlockRequest.WRITE_ZEROES):
            flags = rng.choice([0, 0, 1, 2])
            out = struct.pack("<QII", sector, sectors, flags) * rng.choice([1, 1, 1, 2, 0])
        soft = rng.random()
        if soft < 0.05:
            kind = rng.choice([2, 99, 1 << 31, rng.randrange(1 << 32)])
        elif soft < 0.12:
            edge = self._capacity
            sector = rng.choice([edge, edge - 1, 1 << 55, 2**64 - 1, rng.randrange(1 << 64)])
        elif soft < 0.16:
            room += rng.choice([1, 511, -1]) if room else 0
        readable = struct.pack("<IIQ", kind, rng.randrange(1 << 32), sector) + out
        # The slot: readable bytes, then an indirect table, then the status.
        memory.write(slot_at, readable)
        memory.write(slot_at + SLOT_BYTES - 1, b"\xff")
        rows = [
            (slot_at + start, length, 0)
            for start, length in self._cut(len(readable), [16] if rng.random() < 0.8 else [])
        ]
        rows += [(sink_at + start, length, int(WRITE)) for start, length in self._cut(room, [])]
        rows.append((slot_at + SLOT_BYTES - 1, 1, int(WRITE)))
        hard = rng.random()
        if hard < 0.03:
            self._spoil(rows)
        if rng.random() < 0.5 or len(rows) > SLOT:
            return self._indirect(queue, memory, first, slot_at + 6144, rows)
        for index, (address, length, flags) in enumerate(rows):
            last = index + 1 == len(rows)
            following = 0 if last else first + index + 1
            if rng.random() < 0.002:
                following = rng.choice([first, QUEUE_SIZE, 0xFFFF, rng.randrange(QUEUE_SIZE)])
            queue.write_descriptor(
                first + index, address, length, flags | (0 if last else NEXT), following
            )
        if rng.random() < 0.002:
            return rng.choice([QUEUE_SIZE, 0xFFFF, rng.randrange(QUEUE_SIZE)])
        return first

    def _cut(self, total: int, cuts: list[int]) -> list[tuple[int, int]]:
        """(start, length) of up to three pieces; none for nothing."""
        if total <= 0:
            return []
        if self._rng.random() < 0.4:
            cuts = [*cuts, self._rng.randrange(total)]
        edges = [0, *sorted({cut for cut in cuts if 0 < cut < total}), total]
        return [(a, b - a) for a, b in itertools.pairwise(edges)]

    def _spoil(self, rows: list[tuple[int, int, int]]) -> None:
        """Changes a field, swaps two descriptors, or drops one."""
        rng = self._rng
        at = rng.randrange(len(rows))
        address, length, flags = rows[at]
        what = rng.randrange(7)
        if what == 0:
            address = rng.choice([0, SINK_AT + SINK_BYTES - 8, 2**64 - 4, rng.randrange(1 << 64)])
        elif what == 1:
            address = rng.choice([CONTROL_AT, SINK_AT]) + rng.randrange(CONTROL_BYTES)
        elif what == 2:
            length = rng.choice([0, 1, 0xFFFFFFFF, rng.randrange(1 << 32)])
        elif what == 3:
            length = max(1, length + rng.choice([-1, 1, 512]))
        elif what == 4:
            flags ^= WRITE
        elif what == 5 and len(rows) > 1:
            other = rng.randrange(len(rows))
            rows[at], rows[other] = rows[other], rows[at]
            return
        elif len(rows) > 1:
            del rows[at]
            return
        rows[at] = (address, length, flags)

    def _indirect(
        self,
        queue: SplitDriver,
        memory: GuestMemory,
        first: int,
        table: int,
        rows: list[tuple[int, int, int]],
    ) -> int:
        rng = self._rng
        encoded = b""
        for index, (address, length, flags) in enumerate(rows):
            last = index + 1 == len(rows)
            bits, following = flags | (0 if last else NEXT), index + 1
            if rng.random() < 0.002:
                bits, following = rng.randrange(8), rng.choice([0, following, 0xFFFF])
            encoded += DESCRIPTOR.pack(address, length, bits, 0 if last else following)
        memory.write(table, encoded)
        size, bits = len(encoded), int(INDIRECT)
        odd = rng.random()
        if odd < 0.003:
            size = rng.choice([0, 1, size - 1, size - 16, size + 16, 0xFFFFFFF0])
        elif odd < 0.006:
            bits |= rng.choice([NEXT, WRITE])
        elif odd < 0.008:
            table = rng.choice([0, SINK_AT + SINK_BYTES - 16, 2**64 - 16])
        queue.write_descriptor(first, table, size, bits, rng.randrange(QUEUE_SIZE))
        return first

    # Judging

    def _foresee(self, queue: SplitDriver, at: int, start: int, end: int) -> _Batch:
        batch = _Batch(queue, queue.used_index)
        ring = ReferenceRing(
            self._shadow,
            size=QUEUE_SIZE,
            features=queue.features,
            addresses=queue.addresses,
            base=start,
        )
        # The index is not shown to the device yet, so it is put here for the reference only.
        ahead = (end - start) & 0xFFFF
        if ahead > QUEUE_SIZE:
            batch.broken = f"available index {end} is {ahead} ahead"
            return batch
        written: list[tuple[int, int]] = []
        statuses: list[tuple[int, int]] = []
        for number in range(ahead):
            head = queue.available_entry((start + number) % QUEUE_SIZE)
            try:
                chain = ring.walk(head)
            except BrokenRingError as error:
                batch.broken = str(error)
                break
            status, filled, total = self._disk.judge(self._shadow, chain)
            if status is None:
                batch.used[head, 0] += 1
                continue
            batch.used[head, filled + 1 if filled == total else filled] += 1
            address, length = chain.writable[-1]
            statuses.append((address + length - 1, int(status)))
            written += chain.writable
            batch.checked = batch.checked and self._is_apart(chain, self._pools[at])
        # A status byte that other chains write too says nothing, and all queues share the sink.
        for address, value in statuses:
            if (
                address < SINK_AT
                and sum(start <= address < start + length for start, length in written) == 1
            ):
                batch.statuses.append((address, value))
        return batch

    @staticmethod
    def _is_apart(chain: Chain, pool_at: int) -> bool:
        """Whether the device writes only where it does not read, and reads only what stays as it
        was when it was foreseen: the batch's own slots, but for the statuses at their ends."""
        for address, length in chain.writable:
            in_sink = address >= SINK_AT and address + length <= SINK_AT + SINK_BYTES
            is_status = length == 1 and address % SLOT_BYTES == SLOT_BYTES - 1
            if not in_sink and not is_status:
                return False
        return all(
            pool_at <= address < pool_at + CHAINS * SLOT_BYTES
            and address % SLOT_BYTES + length < SLOT_BYTES
            for address, length in chain.readable
        )

    # Waiting

    def _await(self, batch: _Batch) -> None:
        queue = batch.queue
        goal = (batch.first_used + batch.used.total()) & 0xFFFF
        poll = select.poll()
        for fd in (queue.call_fd, queue.error_fd):
            if fd is not None:
                poll.register(fd, select.POLLIN)
        broken = False
        while True:
            queue.take_calls()
            queue.set_used_event(goal - 1)
            broken = broken or queue.is_broken()
            if not batch.checked:
                # Anything may come of it; it must only be over when the ring is stopped.
                return
            if queue.used_index == goal and broken == (batch.broken is not None):
                return
            if broken and batch.broken is None:
                raise FuzzError(f"{self._where()}: a ring was called broken that is not")
            if not poll.poll(EVENT_TIMEOUT_MS):
                raise FuzzError(
                    f"{self._where()}: used index {queue.used_index} instead of {goal}, "
                    f"{'broken' if broken else 'not broken'}; expected: "
                    f"{batch.broken or 'not broken'}"
                )

    def _check(self, device: BlockDevice, batch: _Batch) -> None:
        if not batch.checked:
            return
        queue = batch.queue
        count = batch.used.total()
        elements = (queue.used_element(batch.first_used + number) for number in range(count))
        found = Counter((head, len_bytes) for head, len_bytes in elements)
        if found != batch.used:
            raise FuzzError(
                f"{self._where()}: used {sorted((found - batch.used).elements())} instead of "
                f"{sorted((batch.used - found).elements())} (head, length)"
            )
        for at, value in batch.statuses:
            (status,) = device.memory.read(at, 1)
            if status != value:
                raise FuzzError(
                    f"{self._where()}: the status at {at:#x} is {status} instead of {value}"
                )

    def _restart(self, device: BlockDevice, at: int, queue: SplitDriver) -> None:
        frontend = device.frontend
        assert frontend is not None
        try:
            frontend.stop_vring(at)
            queue.reset()
            with contextlib.suppress(BlockingIOError):
                queue.take_calls()
            queue.is_broken()
            frontend.start_vring(at, queue)
            frontend.ask_u64(FrontendRequest.GET_FEATURES)
        except VhostdError as error:
            raise FuzzError(f"{self._where()}: the session ended: {error}") from error

    def _where(self) -> str:
        return f"seed {self._seed}, round {self._rounds}"
