"""What a virtio-blk device answers, to be read: virtio 1.3, 5.2.6, in plain Python.

An oracle for tests, as `reference` is for the ring: the disk is a bytearray, and each request is
carried out at once. The order of the checks is that of the engine, because a request that is wrong
in two ways has one status only.

A disk belongs to one thread at a time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from vhostd.virtqueue.constants import ID_BYTES, SECTOR_BYTES, BlockRequest, BlockStatus
from vhostd.virtqueue.reference import Chain, DeviceMemory

__all__ = ["ReferenceDisk"]

_HEADER = struct.Struct("<IIQ")
_EXTENT = struct.Struct("<QII")
_UNMAP = 1


@dataclass(slots=True)
class ReferenceDisk:
    """A disk in memory. The limits are what its config space says."""

    size_bytes: int
    block_bytes: int = 512
    read_only: bool = False
    serial: bytes = b"reference"
    max_request_bytes: int = 126 << 20
    max_unmap_sectors: int = 1 << 22
    max_unmap_segments: int = 32
    data: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self.data = bytearray(self.size_bytes)

    # The medium. Ranges were checked.

    def load(self, offset_bytes: int, len_bytes: int) -> bytes:
        return bytes(self.data[offset_bytes : offset_bytes + len_bytes])

    def store(self, offset_bytes: int, data: bytes) -> None:
        self.data[offset_bytes : offset_bytes + len(data)] = data

    def zero(self, offset_bytes: int, len_bytes: int) -> None:
        self.data[offset_bytes : offset_bytes + len_bytes] = bytes(len_bytes)

    # Requests

    def handle(self, memory: DeviceMemory, chain: Chain) -> int:
        """Carries out a chain; returns the length for the used ring."""
        status, filled, total = self.judge(memory, chain)
        if status is None:
            return 0
        address, length = chain.writable[-1]
        memory.write(address + length - 1, bytes([status]))
        return filled + 1 if filled == total else filled

    def judge(self, memory: DeviceMemory, chain: Chain) -> tuple[BlockStatus | None, int, int]:
        """Does everything but writing the status.

        Returns the status (None: no room for one), the bytes of data that were filled without a
        gap, and how many there is room for.
        """
        if not chain.writable:
            return None, 0, 0
        room = chain.writable_bytes - 1
        if chain.readable_bytes < _HEADER.size:
            return BlockStatus.IOERR, 0, room
        stream = b"".join(memory.read(address, length) for address, length in chain.readable)
        kind, _reserved, sector = _HEADER.unpack_from(stream)
        out = stream[_HEADER.size :]
        if kind == BlockRequest.IN:
            if not self._transfer_ok(sector, room):
                return BlockStatus.IOERR, 0, room
            start = sector * SECTOR_BYTES
            self._scatter(memory, chain, self.load(start, room))
            return BlockStatus.OK, room, room
        if kind == BlockRequest.GET_ID:
            identity = self.serial.ljust(ID_BYTES, b"\0")[: min(room, ID_BYTES)]
            self._scatter(memory, chain, identity)
            return BlockStatus.OK, len(identity), room
        return self._without_data_in(kind, sector, out), 0, room

    def _without_data_in(self, kind: int, sector: int, out: bytes) -> BlockStatus:
        if kind == BlockRequest.FLUSH:
            return BlockStatus.OK
        if kind not in (BlockRequest.OUT, BlockRequest.DISCARD, BlockRequest.WRITE_ZEROES):
            return BlockStatus.UNSUPP
        if self.read_only:
            return BlockStatus.IOERR
        if kind == BlockRequest.OUT:
            if not self._transfer_ok(sector, len(out)):
                return BlockStatus.IOERR
            start = sector * SECTOR_BYTES
            self.store(start, out)
            return BlockStatus.OK
        return self._unmap(out, _UNMAP if kind == BlockRequest.WRITE_ZEROES else 0)

    def _unmap(self, out: bytes, known_flags: int) -> BlockStatus:
        """All segments are judged before any is carried out (5.2.6.2)."""
        if len(out) > self.max_unmap_segments * _EXTENT.size:
            return BlockStatus.UNSUPP
        if not out or len(out) % _EXTENT.size:
            return BlockStatus.IOERR
        outside = False
        for sector, sectors, flags in _EXTENT.iter_unpack(out):
            if flags & ~known_flags:
                return BlockStatus.UNSUPP
            if sectors > self.max_unmap_sectors or not self._inside(sector, sectors):
                outside = True
        if outside:
            return BlockStatus.IOERR
        for sector, sectors, _flags in _EXTENT.iter_unpack(out):
            self.zero(sector * SECTOR_BYTES, sectors * SECTOR_BYTES)
        return BlockStatus.OK

    def _transfer_ok(self, sector: int, len_bytes: int) -> bool:
        whole = len_bytes % SECTOR_BYTES == 0 and len_bytes <= self.max_request_bytes
        return whole and self._inside(sector, len_bytes // SECTOR_BYTES)

    def _inside(self, sector: int, sectors: int) -> bool:
        inside = sector + sectors <= self.size_bytes // SECTOR_BYTES
        return inside and sector * SECTOR_BYTES % self.block_bytes == 0

    @staticmethod
    def _scatter(memory: DeviceMemory, chain: Chain, data: bytes) -> None:
        done = 0
        for address, length in chain.writable:
            here = min(length, len(data) - done)
            if not here:
                return
            memory.write(address, data[done : done + here])
            done += here
