"""Where the parts of a split virtqueue lie: virtio 1.3, 2.7.

    descriptor table   16 bytes a descriptor                    aligned to 16
    available ring     flags, idx, ring[size], used_event       aligned to 2
    used ring          flags, idx, {id, len}[size], avail_event aligned to 4

Pure functions; any thread.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vhostd.errors import UsageError
from vhostd.virtqueue.constants import MAX_QUEUE_SIZE

__all__ = ["DESCRIPTOR", "DESCRIPTOR_BYTES", "USED_ELEMENT", "RingAddresses", "SplitLayout"]

DESCRIPTOR = struct.Struct("<QIHH")
"""address, len_bytes, flags, next."""
USED_ELEMENT = struct.Struct("<II")
"""id, len_bytes."""
DESCRIPTOR_BYTES = DESCRIPTOR.size


@dataclass(frozen=True, slots=True)
class RingAddresses:
    """Guest addresses of the three parts."""

    descriptor: int
    available: int
    used: int


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """Sizes and offsets for a queue of `size` entries, a power of 2 up to 32768.

    Room for the event indexes is always counted: a driver may leave it unused.
    """

    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_QUEUE_SIZE or self.size & (self.size - 1):
            raise UsageError(
                f"a split virtqueue cannot have {self.size} entries; use a power of 2 up to "
                f"{MAX_QUEUE_SIZE}"
            )

    @property
    def descriptor_bytes(self) -> int:
        return DESCRIPTOR_BYTES * self.size

    @property
    def available_bytes(self) -> int:
        return 6 + 2 * self.size

    @property
    def used_bytes(self) -> int:
        return 6 + 8 * self.size

    @property
    def available_offset(self) -> int:
        """From the descriptor table's start, when the parts follow each other."""
        return self.descriptor_bytes

    @property
    def used_offset(self) -> int:
        return -(-(self.available_offset + self.available_bytes) // 4) * 4

    @property
    def total_bytes(self) -> int:
        return self.used_offset + self.used_bytes

    @property
    def used_event_offset(self) -> int:
        """In the available ring (virtio 1.3, 2.7.7)."""
        return 4 + 2 * self.size

    @property
    def avail_event_offset(self) -> int:
        """In the used ring (virtio 1.3, 2.7.10)."""
        return 4 + 8 * self.size

    def at(self, address: int) -> RingAddresses:
        """The three parts one behind the other; `address` is aligned to 16."""
        return RingAddresses(address, address + self.available_offset, address + self.used_offset)
