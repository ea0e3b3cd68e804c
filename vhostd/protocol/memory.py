"""The guest's memory as a table of regions: what a front-end may share, and what is refused.

Invariants:
- No two regions overlap in guest addresses; none is empty or wraps. User addresses may overlap:
  they are the front-end's names for places, and memory that a guest sees twice has one such name.
- A region lies within its file at the time it is given, and the file is one that has a size.

A table is immutable: a change makes a new one, which the session keeps only after the engine has
taken it. Descriptors are not kept: the engine maps what it is given and the session closes them.

Pure but for fstat; called on the event loop's thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhostd.protocol.messages import RefusedError, RegionDescription, ViolationError

if TYPE_CHECKING:
    from vhostd._native import MemoryRegion

__all__ = ["MAX_MEM_SLOTS", "MemoryTable", "check_file", "for_engine"]

MAX_MEM_SLOTS = 509
"""Regions a guest may have with CONFIGURE_MEM_SLOTS; KVM's user slots less 3 of its own."""

_ADDRESS_END = 1 << 64


def check_file(region: RegionDescription, fd: int) -> None:
    """Refuses a descriptor that cannot hold `region`.

    Only regular files (memfd, hugetlbfs and shared-memory files are ones): their size can be
    checked, so no access within a region meets the end of its file.

    Raises:
        ViolationError: the descriptor is of another kind.
        RefusedError: the region lies beyond the end of the file.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ViolationError(
            f"the descriptor for guest memory at {region.guest_address:#x} is not a file that "
            "can be shared; start the front-end with shared memory (memfd or a file)"
        )
    end = region.mmap_offset + region.size_bytes
    if end > status.st_size:
        raise RefusedError(
            f"guest memory at {region.guest_address:#x} ends at offset {end:#x} of its file, "
            f"which has {status.st_size:#x} bytes"
        )


def for_engine(region: RegionDescription, fd: int) -> MemoryRegion:
    """The region as the engine takes it."""
    return {
        "guest_address": region.guest_address,
        "size_bytes": region.size_bytes,
        "user_address": region.user_address,
        "mmap_offset": region.mmap_offset,
        "fd": fd,
    }


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """The regions of a session, in the order they were given."""

    regions: tuple[RegionDescription, ...] = ()

    @classmethod
    def of(cls, regions: Iterable[RegionDescription]) -> MemoryTable:
        """Raises RefusedError if the regions break an invariant."""
        table = cls()
        for region in regions:
            table = table.with_region(region)
        return table

    def with_region(self, region: RegionDescription) -> MemoryTable:
        """Raises RefusedError if the region is bad, overlaps, or is one too many."""
        if len(self.regions) >= MAX_MEM_SLOTS:
            raise RefusedError(
                f"there are {MAX_MEM_SLOTS} memory regions already, the most a session may have; "
                "remove one with REM_MEM_REG first"
            )
        if region.size_bytes == 0:
            raise RefusedError(f"guest memory at {region.guest_address:#x} has no size")
        for what, start in (
            ("guest addresses", region.guest_address),
            ("user addresses", region.user_address),
            ("file offsets", region.mmap_offset),
        ):
            if start + region.size_bytes > _ADDRESS_END:
                raise RefusedError(
                    f"guest memory at {region.guest_address:#x} of {region.size_bytes:#x} bytes "
                    f"wraps around the end of {what}"
                )
        for other in self.regions:
            if _overlap(region, other):
                raise RefusedError(
                    f"guest memory at {region.guest_address:#x} overlaps the region at "
                    f"{other.guest_address:#x}"
                )
        return MemoryTable((*self.regions, region))

    def without(self, region: RegionDescription) -> MemoryTable:
        """The table less the region of these addresses and size; its offset does not matter.

        Raises RefusedError if there is none.
        """
        kept = tuple(r for r in self.regions if not _same_place(r, region))
        if len(kept) == len(self.regions):
            raise RefusedError(
                f"there is no memory region at guest address {region.guest_address:#x}, user "
                f"address {region.user_address:#x} of {region.size_bytes:#x} bytes to remove"
            )
        return MemoryTable(kept)

    @property
    def size_bytes(self) -> int:
        return sum(region.size_bytes for region in self.regions)


def _overlap(one: RegionDescription, other: RegionDescription) -> bool:
    return (
        one.guest_address < other.guest_address + other.size_bytes
        and other.guest_address < one.guest_address + one.size_bytes
    )


def _same_place(one: RegionDescription, other: RegionDescription) -> bool:
    return (
        one.guest_address == other.guest_address
        and one.user_address == other.user_address
        and one.size_bytes == other.size_bytes
    )
