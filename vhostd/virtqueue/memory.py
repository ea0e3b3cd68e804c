"""Guest memory as a driver has it: regions of memfds, and an allocator of buffers in them.

Invariants:
- Regions do not overlap, in guest addresses or in user addresses; gaps between them are allowed.
- A buffer from `allocate` lies in one region, and no two live buffers overlap.
- User addresses are names, not pointers: vhost-user only needs them to be consistent, so the
  default is the guest address plus a constant, which shows mistakes of one for the other.

A memory belongs to one thread at a time, as the queues in it do.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
import os
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from vhostd.errors import BusyError, UsageError

__all__ = ["DEFAULT_GUEST_ADDRESS", "USER_OFFSET", "GuestMemory", "Region", "fence"]

DEFAULT_GUEST_ADDRESS = 0x4000_0000
USER_OFFSET = 0x7E00_0000_0000


def fence() -> None:
    """A full memory barrier.

    Releasing a lock and then acquiring it is the one ordering Python offers: what was stored
    before the release is seen before what is loaded after the acquire. A lock of its own, so that
    threads do not meet here.
    """
    lock = threading.Lock()
    lock.acquire()
    lock.release()
    lock.acquire()


@dataclass(slots=True, eq=False)
class Region:
    """One piece of guest memory. `fd` is owned; the file begins `mmap_offset` before the region."""

    guest_address: int
    size_bytes: int
    user_address: int
    mmap_offset: int
    fd: int
    mapping: mmap.mmap
    view: memoryview
    free: list[tuple[int, int]] = field(default_factory=list)
    """Free ranges as (offset, size), sorted, never touching each other."""

    @property
    def end(self) -> int:
        return self.guest_address + self.size_bytes

    def close(self) -> None:
        # Someone may still hold a piece of it: then it is unmapped when they let go.
        with contextlib.suppress(BufferError):
            self.view.release()
            self.mapping.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class GuestMemory:
    """The memory of one guest. `size_bytes` makes one region; more come with `add_region`."""

    def __init__(self, size_bytes: int = 0, *, guest_address: int = DEFAULT_GUEST_ADDRESS) -> None:
        self.regions: list[Region] = []
        self._starts: list[int] = []
        self._allocated: dict[int, int] = {}
        if size_bytes:
            self.add_region(guest_address, size_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add_region(
        self,
        guest_address: int,
        size_bytes: int,
        *,
        user_address: int | None = None,
        mmap_offset: int = 0,
    ) -> Region:
        """A new memfd of `mmap_offset + size_bytes`. Sizes and addresses are whole pages.

        Raises UsageError if it overlaps another region.
        """
        page = mmap.PAGESIZE
        if size_bytes <= 0 or (size_bytes | guest_address | mmap_offset) % page:
            raise UsageError(
                f"guest memory of {size_bytes} bytes at {guest_address:#x} is not whole pages of "
                f"{page} bytes"
            )
        user = (guest_address + USER_OFFSET) % (1 << 64) if user_address is None else user_address
        for other in self.regions:
            if guest_address < other.end and other.guest_address < guest_address + size_bytes:
                raise UsageError(
                    f"guest memory at {guest_address:#x} overlaps the region at "
                    f"{other.guest_address:#x}"
                )
            other_user = other.user_address
            if user < other_user + other.size_bytes and other_user < user + size_bytes:
                raise UsageError(f"guest memory at {guest_address:#x} overlaps in user addresses")
        fd = os.memfd_create("vhostd-guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, mmap_offset + size_bytes)
            mapping = mmap.mmap(fd, size_bytes, offset=mmap_offset)
        except OSError:
            os.close(fd)
            raise
        region = Region(
            guest_address,
            size_bytes,
            user,
            mmap_offset,
            fd,
            mapping,
            memoryview(mapping),
            [(0, size_bytes)],
        )
        at = bisect.bisect(self._starts, guest_address)
        self._starts.insert(at, guest_address)
        self.regions.insert(at, region)
        return region

    def remove_region(self, region: Region) -> None:
        """Forgets and closes a region; its buffers are gone. Tell the back-end first."""
        at = self.regions.index(region)
        del self.regions[at]
        del self._starts[at]
        for address in [a for a in self._allocated if region.guest_address <= a < region.end]:
            del self._allocated[address]
        region.close()

    def close(self) -> None:
        """Closes all regions. Views handed out keep their mapping until they are released."""
        for region in self.regions:
            region.close()
        self.regions.clear()
        self._starts.clear()
        self._allocated.clear()

    def region_of(self, address: int) -> Region | None:
        """The region a guest address lies in; None for a gap."""
        at = bisect.bisect(self._starts, address) - 1
        if at < 0:
            return None
        region = self.regions[at]
        return region if address < region.end else None

    def user_address(self, address: int) -> int:
        """The user address of a guest address."""
        region = self._need(address)
        return region.user_address + address - region.guest_address

    def view(self, address: int, len_bytes: int) -> memoryview:
        """Bytes within one region, to read and write in place."""
        region = self._need(address)
        start = address - region.guest_address
        if start + len_bytes > region.size_bytes:
            raise UsageError(
                f"{len_bytes} bytes at {address:#x} reach beyond the region at "
                f"{region.guest_address:#x}"
            )
        return region.view[start : start + len_bytes]

    def read(self, address: int, len_bytes: int) -> bytes:
        """A copy of bytes that may go on in the next region."""
        found = []
        while len_bytes:
            region = self._need(address)
            here = min(len_bytes, region.end - address)
            start = address - region.guest_address
            found.append(bytes(region.view[start : start + here]))
            address += here
            len_bytes -= here
        return found[0] if len(found) == 1 else b"".join(found)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copies in bytes that may go on in the next region."""
        done = 0
        while done < len(data):
            region = self._need(address)
            here = min(len(data) - done, region.end - address)
            start = address - region.guest_address
            piece = data if here == len(data) else memoryview(data)[done : done + here]
            region.view[start : start + here] = piece
            address += here
            done += here

    def spans(self, address: int, len_bytes: int) -> int | None:
        """In how many adjoining regions a range lies; None if not all of it is guest memory."""
        count = 0
        while len_bytes > 0:
            region = self.region_of(address)
            if region is None:
                return None
            here = min(len_bytes, region.end - address)
            address += here
            len_bytes -= here
            count += 1
        return count

    def allocate(self, size_bytes: int, *, align: int = 16, region: Region | None = None) -> int:
        """The guest address of a new buffer, with whatever was there before.

        Raises BusyError if no region has that much in one piece.
        """
        for candidate in self.regions if region is None else (region,):
            for at, (offset, size) in enumerate(candidate.free):
                start = -(-offset // align) * align
                rest = size - (start - offset) - size_bytes
                if rest < 0:
                    continue
                pieces = []
                if start > offset:
                    pieces.append((offset, start - offset))
                if rest:
                    pieces.append((start + size_bytes, rest))
                candidate.free[at : at + 1] = pieces
                address = candidate.guest_address + start
                self._allocated[address] = size_bytes
                return address
        raise BusyError(
            f"guest memory has no {size_bytes} free bytes; reap requests first, or give the "
            "device more memory"
        )

    def release(self, address: int) -> None:
        """Gives back a buffer of `allocate`."""
        size = self._allocated.pop(address)
        region = self._need(address)
        start = address - region.guest_address
        free = region.free
        at = bisect.bisect(free, (start, size))
        if at < len(free) and free[at][0] == start + size:
            size += free.pop(at)[1]
        if at and sum(free[at - 1]) == start:
            at -= 1
            start, before = free.pop(at)
            size += before
        free.insert(at, (start, size))

    @property
    def allocated_bytes(self) -> int:
        return sum(self._allocated.values())

    def _need(self, address: int) -> Region:
        region = self.region_of(address)
        if region is None:
            raise UsageError(f"there is no guest memory at {address:#x}")
        return region
