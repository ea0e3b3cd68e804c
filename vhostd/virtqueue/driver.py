"""The driver side of a split virtqueue: virtio 1.3, 2.7.

Two layers in one class. The honest one (`add`, `publish`, `reap`) keeps the rules of the
specification. The raw one (`write_descriptor`, `write_available`, `store_available_index`) writes
whatever it is told, for tests of what a hostile guest may do.

Invariants of the honest layer:
- A descriptor is free or belongs to one chain that was added and not yet reaped.
- The available index is stored after the entries it covers, and the need to kick is judged after
  a full barrier (2.7.13).
- A used element that names no outstanding chain is a BackendError, not an assumption.

The ring's fields are little-endian (VERSION_1); a big-endian host is not supported. A queue
belongs to one thread at a time.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vhostd.errors import BusyError, UnavailableError, UnsupportedError, UsageError
from vhostd.protocol.features import VirtioFeature
from vhostd.virtqueue.constants import AvailFlag, DescriptorFlag, UsedFlag
from vhostd.virtqueue.errors import BackendError
from vhostd.virtqueue.layout import (
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    USED_ELEMENT,
    RingAddresses,
    SplitLayout,
)
from vhostd.virtqueue.memory import GuestMemory, Region, fence

__all__ = ["Buffer", "SplitDriver", "Used", "wait_for_used"]

_POLL_PAUSE_S = 0.0001
"""Between looks at a ring that has no call descriptor."""


class Buffer(NamedTuple):
    """One descriptor's worth: guest memory the device reads, or writes."""

    address: int
    len_bytes: int
    writable: bool = False


class Used(NamedTuple):
    """An element of the used ring: the head of the chain, and how much the device wrote."""

    head: int
    len_bytes: int


@dataclass(slots=True)
class _Chain:
    descriptors: list[int]
    table: int | None
    """Guest address of the indirect table."""


class SplitDriver:
    """One queue, its ring in `memory`, and its eventfds.

    Args:
        size: entries, a power of 2.
        features: negotiated virtio features (EVENT_IDX and INDIRECT_DESC matter here).
        kick, call: false for a queue without that descriptor: polled by the device, or by us.
        region: where the ring is put.
        addresses: places for the three parts, which need not follow each other.
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        size: int,
        features: int,
        kick: bool = True,
        call: bool = True,
        region: Region | None = None,
        addresses: RingAddresses | None = None,
    ) -> None:
        if sys.byteorder != "little":
            raise UnsupportedError("the driver side runs on little-endian machines only")
        self.memory = memory
        self.layout = SplitLayout(size)
        self.size = size
        self.features = features
        self.event_idx = bool(features & VirtioFeature.EVENT_IDX)
        self._ring_buffer: int | None = None
        if addresses is None:
            self._ring_buffer = memory.allocate(self.layout.total_bytes, align=4096, region=region)
            addresses = self.layout.at(self._ring_buffer)
        self.addresses = addresses
        layout = self.layout
        self._descriptors = memory.view(addresses.descriptor, layout.descriptor_bytes)
        self._available = memory.view(addresses.available, layout.available_bytes).cast("H")
        self._used = memory.view(addresses.used, layout.used_bytes)
        # Indexes and flags are loaded and stored as whole 16-bit words.
        self._used_words = self._used.cast("H")
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self.kick_fd = os.eventfd(0, flags) if kick else None
        self.call_fd = os.eventfd(0, flags) if call else None
        self.error_fd = os.eventfd(0, flags)
        self.kicks = 0
        """How many times the device was notified."""
        self.reset()

    # Life

    def reset(self) -> None:
        """A ring as new. The device must not be running it."""
        self._descriptors[:] = bytes(len(self._descriptors))
        self._available[:] = memoryview(bytes(self.layout.available_bytes)).cast("H")
        self._used[:] = bytes(len(self._used))
        self._free = list(range(self.size - 1, -1, -1))
        self._chains: dict[int, _Chain] = {}
        self._next_available = 0
        self._published = 0
        self._last_used = 0
        if self.call_fd is None:
            self.disable_calls()

    def close(self) -> None:
        """Closes the eventfds and lets go of the memory. A second call does nothing."""
        for fd in (self.kick_fd, self.call_fd, self.error_fd):
            if fd is not None:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.kick_fd = self.call_fd = None
        self.error_fd = -1
        for view in (self._used_words, self._used, self._available, self._descriptors):
            view.release()
        if self._ring_buffer is not None:
            if self.memory.region_of(self._ring_buffer) is not None:
                self.memory.release(self._ring_buffer)
            self._ring_buffer = None

    # The honest layer

    @property
    def free_descriptors(self) -> int:
        return len(self._free)

    @property
    def in_flight(self) -> int:
        """Chains that were added and not reaped."""
        return len(self._chains)

    def add(self, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Puts a chain into the next available entry and returns its head; not yet shown.

        Raises BusyError if there are not enough free descriptors, UsageError for a chain that
        the specification forbids.
        """
        needed = 1 if indirect else len(buffers)
        if not buffers:
            raise UsageError("a chain has at least one buffer")
        if needed > self.size:
            raise UsageError(f"a chain of {needed} does not fit a queue of {self.size}")
        if needed > len(self._free):
            raise BusyError(
                f"the queue has {len(self._free)} free descriptors of {needed}; reap first"
            )
        table = None
        if indirect:
            if not self.features & VirtioFeature.INDIRECT_DESC:
                raise UsageError("indirect descriptors were not negotiated")
            table = self.memory.allocate(DESCRIPTOR_BYTES * len(buffers))
            self.memory.write(table, encode_table(buffers))
            head = self._free.pop()
            length = DESCRIPTOR_BYTES * len(buffers)
            self.write_descriptor(head, table, length, DescriptorFlag.INDIRECT, 0)
            used = [head]
        else:
            used = [self._free.pop() for _ in buffers]
            head = used[0]
            for at, (address, len_bytes, writable) in enumerate(buffers):
                flags = DescriptorFlag.WRITE if writable else 0
                following = 0
                if at + 1 < len(buffers):
                    flags |= DescriptorFlag.NEXT
                    following = used[at + 1]
                self.write_descriptor(used[at], address, len_bytes, flags, following)
        self._chains[head] = _Chain(used, table)
        self.write_available(self._next_available % self.size, head)
        self._next_available = (self._next_available + 1) & 0xFFFF
        return head

    def publish(self, *, kick: bool | None = None) -> bool:
        """Shows the chains added since the last call, and notifies the device if it wants that.

        `kick` overrules what the device wants. Returns whether it was notified.
        """
        old, new = self._published, self._next_available
        self.store_available_index(new)
        self._published = new
        wanted = self.device_wants_kick(old, new) if kick is None else kick
        if wanted:
            self.kick()
        return wanted

    def device_wants_kick(self, old: int, new: int) -> bool:
        """virtio 1.3, 2.7.10: judged after a full barrier."""
        fence()
        if self.event_idx:
            event = self._used_words[self.layout.avail_event_offset // 2]
            return ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)
        return not self._used_words[0] & UsedFlag.NO_NOTIFY

    def kick(self) -> None:
        """Notifies the device, whether it wants it or not."""
        if self.kick_fd is not None:
            os.eventfd_write(self.kick_fd, 1)
            self.kicks += 1

    def reap(self) -> list[Used]:
        """Takes what the device has used, and frees the descriptors. Does not wait."""
        found: list[Used] = []
        end = self._used_words[1]
        if end == self._last_used:
            return found
        # Elements are loaded after the index that covers them.
        fence()
        if ((end - self._last_used) & 0xFFFF) > self.size:
            raise BackendError(
                f"the used index went from {self._last_used} to {end}, which is more than the "
                f"{self.size} entries of the queue"
            )
        while self._last_used != end:
            slot = self._last_used % self.size
            head, len_bytes = USED_ELEMENT.unpack_from(self._used, 4 + 8 * slot)
            chain = self._chains.pop(head, None)
            if chain is None:
                raise BackendError(
                    f"used element {slot} names chain {head}, which is not in flight"
                )
            self._free.extend(reversed(chain.descriptors))
            if chain.table is not None:
                self.memory.release(chain.table)
            self._last_used = (self._last_used + 1) & 0xFFFF
            found.append(Used(head, len_bytes))
        return found

    def enable_calls(self, *, after: int = 0) -> None:
        """Asks for a call once more than `after` further elements are used (EVENT_IDX), or any."""
        if self.event_idx:
            self._available[self.layout.used_event_offset // 2] = (self._last_used + after) & 0xFFFF
        else:
            self._available[0] = 0
        fence()

    def disable_calls(self) -> None:
        """Asks not to be called. With EVENT_IDX: not before the index has gone round."""
        if self.event_idx:
            self._available[self.layout.used_event_offset // 2] = (self._last_used - 1) & 0xFFFF
        else:
            self._available[0] = AvailFlag.NO_INTERRUPT

    def wait(self, timeout_s: float) -> list[Used]:
        """Waits until the device has used something; an empty list if it did not in time."""
        return wait_for_used([self], timeout_s)[0]

    def take_calls(self) -> int:
        """How often the device called since the last time; the eventfd is cleared."""
        if self.call_fd is None:
            return 0
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0

    def renew_call(self) -> int:
        """A new call descriptor; tell the back-end of it."""
        if self.call_fd is not None:
            os.close(self.call_fd)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self.call_fd

    def is_broken(self) -> bool:
        """Whether the device has signalled the error descriptor since the last call."""
        try:
            return os.eventfd_read(self.error_fd) > 0
        except BlockingIOError:
            return False

    # The raw layer

    def write_descriptor(
        self, index: int, address: int, len_bytes: int, flags: int, following: int
    ) -> None:
        DESCRIPTOR.pack_into(
            self._descriptors, DESCRIPTOR_BYTES * index, address, len_bytes, flags, following
        )

    def write_available(self, slot: int, head: int) -> None:
        self._available[2 + slot] = head

    def store_available_index(self, index: int) -> None:
        """Shows everything up to `index` to the device."""
        fence()
        self._available[1] = index

    @property
    def available_index(self) -> int:
        return self._available[1]

    def available_entry(self, slot: int) -> int:
        return self._available[2 + slot]

    def set_used_event(self, index: int) -> None:
        """Asks for a call when the element of this index is used, or without EVENT_IDX for any."""
        self._available[self.layout.used_event_offset // 2] = index & 0xFFFF
        fence()

    @property
    def used_index(self) -> int:
        """As the device has stored it."""
        return self._used_words[1]

    @property
    def last_used(self) -> int:
        """Up to where elements were reaped."""
        return self._last_used

    def used_element(self, index: int) -> Used:
        """The element of a (free-running) used index."""
        return Used(*USED_ELEMENT.unpack_from(self._used, 4 + 8 * (index % self.size)))

    def start_at(self, index: int) -> None:
        """Makes an idle ring begin at `index`: what a guest has after `index` requests."""
        if self._chains:
            raise UsageError("the ring has requests in flight; only an idle one can be moved")
        self._next_available = self._published = self._last_used = index & 0xFFFF
        self._available[1] = index & 0xFFFF
        self._used_words[1] = index & 0xFFFF
        # What a device asked for before it was stopped must not keep the first kick from it.
        self._used_words[self.layout.avail_event_offset // 2] = index & 0xFFFF

    def forget(self) -> None:
        """Gives up on chains in flight: the device has stopped, or its ring is broken.

        The ring goes on where the device can start again: everything counts as used.
        """
        for chain in self._chains.values():
            self._free.extend(chain.descriptors)
            if chain.table is not None:
                self.memory.release(chain.table)
        self._chains.clear()
        self.start_at(self._next_available)


def encode_table(buffers: Sequence[Buffer]) -> bytes:
    """An indirect table (virtio 1.3, 2.7.5.3) that chains the buffers in order."""
    table = bytearray(DESCRIPTOR_BYTES * len(buffers))
    for at, (address, len_bytes, writable) in enumerate(buffers):
        last = at + 1 == len(buffers)
        flags = (DescriptorFlag.WRITE if writable else 0) | (0 if last else DescriptorFlag.NEXT)
        DESCRIPTOR.pack_into(
            table, DESCRIPTOR_BYTES * at, address, len_bytes, flags, 0 if last else at + 1
        )
    return bytes(table)


def wait_for_used(
    queues: Sequence[SplitDriver], timeout_s: float, *, lost_fd: int | None = None
) -> list[list[Used]]:
    """What each queue has used, as soon as one has used something; all empty at the time-out.

    `lost_fd`: a socket; when it is closed by the peer, UnavailableError.
    """
    found = [queue.reap() for queue in queues]
    if any(found):
        return found
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    if lost_fd is not None:
        poll.register(lost_fd, select.POLLRDHUP)
    pause_s: float | None = None
    for queue in queues:
        if queue.call_fd is None:
            pause_s = _POLL_PAUSE_S
        else:
            poll.register(queue.call_fd, select.POLLIN)
    while True:
        for queue in queues:
            if queue.call_fd is not None:
                queue.take_calls()
                queue.enable_calls()
        found = [queue.reap() for queue in queues]
        left_s = deadline - time.monotonic()
        if any(found) or left_s <= 0:
            return found
        wait_s = left_s if pause_s is None else min(left_s, pause_s)
        for fd, _event in poll.poll(wait_s * 1000):
            if fd == lost_fd:
                raise UnavailableError(
                    "the back-end closed the connection with requests in flight; see its log"
                )
