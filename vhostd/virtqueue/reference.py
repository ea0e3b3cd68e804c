"""The device side of a split virtqueue, to be read: virtio 1.3, 2.7, in plain Python.

What the engine does in Rust is done here without a thought for speed, as an oracle for tests:
same memory, same ring, same verdict. What a broken ring is, is written down once, in `walk`.

Invariants:
- No value from the ring is used as an index, address or length before it was checked.
- A BrokenRingError leaves the ring as it was; the device must not go on with it.

A ring belongs to one thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from vhostd.errors import UsageError
from vhostd.protocol.features import VirtioFeature
from vhostd.virtqueue.constants import AvailFlag, DescriptorFlag, UsedFlag
from vhostd.virtqueue.layout import (
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    USED_ELEMENT,
    RingAddresses,
    SplitLayout,
)
from vhostd.virtqueue.memory import fence

__all__ = ["MAX_CHAIN_PIECES", "BrokenRingError", "Chain", "DeviceMemory", "ReferenceRing"]

MAX_CHAIN_PIECES = 1024
"""What the device takes of one chain; a piece is a descriptor's part in one memory region."""
_MAX_INDIRECT = 1 << 16
"""`next` has 16 bits, so no larger table can be meant."""


class BrokenRingError(UsageError):
    """The driver broke the ring: the device stops it, and says so on the error descriptor."""


class DeviceMemory(Protocol):
    """Guest memory by guest address. `pieces` raises BrokenRingError outside of it."""

    def read(self, address: int, len_bytes: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None: ...
    def pieces(self, address: int, len_bytes: int) -> int:
        """In how many regions the range lies, one directly behind the other."""


@dataclass(slots=True)
class Chain:
    """A chain whose every descriptor was checked: (address, length) in order."""

    head: int
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)
    pieces: int = 0

    @property
    def readable_bytes(self) -> int:
        return sum(length for _, length in self.readable)

    @property
    def writable_bytes(self) -> int:
        return sum(length for _, length in self.writable)


class ReferenceRing:
    """One split virtqueue, as the device sees it. `base`: where it goes on."""

    def __init__(
        self,
        memory: DeviceMemory,
        *,
        size: int,
        features: int,
        addresses: RingAddresses,
        base: int = 0,
    ) -> None:
        self.memory = memory
        self.layout = SplitLayout(size)
        self.size = size
        self.features = features
        self.addresses = addresses
        self.event_idx = bool(features & VirtioFeature.EVENT_IDX)
        for address, len_bytes, align in (
            (addresses.descriptor, self.layout.descriptor_bytes, 16),
            (addresses.available, 4 + 2 * size + 2 * self.event_idx, 2),
            (addresses.used, 4 + 8 * size + 2 * self.event_idx, 4),
        ):
            if address % align:
                raise BrokenRingError(f"a part of the ring at {address:#x} is not aligned")
            memory.pieces(address, len_bytes)
        self.next_available = base
        # Not 0: after a reconnect the driver goes on where it was.
        self.next_used = self._u16(addresses.used + 2)
        self._signalled: int | None = None

    def available(self) -> int:
        """How many chains wait (2.7.13.3: the index, then what it covers)."""
        index = self._u16(self.addresses.available + 2)
        ahead = (index - self.next_available) & 0xFFFF
        if ahead > self.size:
            raise BrokenRingError(
                f"available index {index} is {ahead} ahead of {self.next_available}; the queue "
                f"has {self.size} entries"
            )
        fence()
        return ahead

    def pop(self) -> Chain | None:
        """The next chain; None if there is none."""
        if not self.available():
            return None
        slot = self.next_available % self.size
        head = self._u16(self.addresses.available + 4 + 2 * slot)
        chain = self.walk(head)
        self.next_available = (self.next_available + 1) & 0xFFFF
        return chain

    def walk(self, head: int) -> Chain:
        """Follows a chain through the table and perhaps, at its end, one indirect table."""
        chain = Chain(head)
        index, left = head, self.size
        while True:
            if index >= self.size:
                raise BrokenRingError(f"descriptor {index} is outside the table of {self.size}")
            if not left:
                raise BrokenRingError(f"the chain at {head} has a loop")
            left -= 1
            address, length, flags, following = self._descriptor(
                self.addresses.descriptor + DESCRIPTOR_BYTES * index
            )
            if flags & DescriptorFlag.INDIRECT:
                self._walk_indirect(chain, address, length, flags)
                return chain
            self._append(chain, address, length, flags)
            if not flags & DescriptorFlag.NEXT:
                return chain
            index = following

    def _walk_indirect(self, chain: Chain, table: int, len_bytes: int, flags: int) -> None:
        if not self.features & VirtioFeature.INDIRECT_DESC:
            raise BrokenRingError("an indirect table, which was not negotiated")
        if flags & DescriptorFlag.NEXT:
            raise BrokenRingError("a descriptor with both INDIRECT and NEXT")
        count, rest = divmod(len_bytes, DESCRIPTOR_BYTES)
        if not count or rest or count > _MAX_INDIRECT:
            raise BrokenRingError(f"an indirect table of {len_bytes} bytes")
        index, left = 0, count
        while True:
            if index >= count:
                raise BrokenRingError(f"descriptor {index} is outside its table of {count}")
            if not left:
                raise BrokenRingError("an indirect table with a loop")
            left -= 1
            at = table + DESCRIPTOR_BYTES * index
            self.memory.pieces(at, DESCRIPTOR_BYTES)
            address, length, flags, following = self._descriptor(at)
            if flags & DescriptorFlag.INDIRECT:
                raise BrokenRingError("an indirect table inside an indirect table")
            self._append(chain, address, length, flags)
            if not flags & DescriptorFlag.NEXT:
                return
            index = following

    def _append(self, chain: Chain, address: int, length: int, flags: int) -> None:
        if not length:
            raise BrokenRingError("a descriptor of length 0")
        chain.pieces += self.memory.pieces(address, length)
        if chain.pieces > MAX_CHAIN_PIECES:
            raise BrokenRingError(f"a chain of more than {MAX_CHAIN_PIECES} pieces")
        if flags & DescriptorFlag.WRITE:
            chain.writable.append((address, length))
        elif chain.writable:
            raise BrokenRingError("a readable descriptor after a writable one")
        else:
            chain.readable.append((address, length))

    def push(self, head: int, len_bytes: int) -> None:
        """Writes a used element and then the index that shows it (2.7.8)."""
        slot = self.next_used % self.size
        self.memory.write(self.addresses.used + 4 + 8 * slot, USED_ELEMENT.pack(head, len_bytes))
        self.next_used = (self.next_used + 1) & 0xFFFF
        fence()
        self._store(self.addresses.used + 2, self.next_used)

    def wants_call(self) -> bool:
        """Whether the driver wants a call for what was used since this was last asked (2.7.7)."""
        fence()
        if not self.event_idx:
            return not self._u16(self.addresses.available) & AvailFlag.NO_INTERRUPT
        event = self._u16(self.addresses.available + self.layout.used_event_offset)
        old, self._signalled = self._signalled, self.next_used
        if old is None:
            return True
        return ((self.next_used - event - 1) & 0xFFFF) < ((self.next_used - old) & 0xFFFF)

    def enable_kicks(self) -> bool:
        """Asks for notifications; True if there is something already, for which none may come."""
        if self.event_idx:
            event = self.addresses.used + self.layout.avail_event_offset
            self._store(event, self.next_available)
        else:
            self._store(self.addresses.used, 0)
        fence()
        return self.available() > 0

    def disable_kicks(self) -> None:
        """With EVENT_IDX nothing needs to be done: the index stays behind."""
        if not self.event_idx:
            self._store(self.addresses.used, UsedFlag.NO_NOTIFY)

    def _descriptor(self, address: int) -> tuple[int, int, int, int]:
        raw: tuple[int, int, int, int] = DESCRIPTOR.unpack(
            self.memory.read(address, DESCRIPTOR_BYTES)
        )
        return raw

    def _u16(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 2), "little")

    def _store(self, address: int, value: int) -> None:
        self.memory.write(address, value.to_bytes(2, "little"))
