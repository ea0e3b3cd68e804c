"""A back-end of vhostd's protocol code over the readable device side, as a process.

    python -m tests.protocol.reference_backend --socket PATH [--size BYTES] [--block 512|4096]
        [--queues N] [--read-only] [--neighbour PATH]

It keeps the disk in memory and does each request at once: a second opinion for the suite, and a
way to try a front-end without the engine. Not for guests that truncate their memory (SIGBUS).

Rings are serviced by one thread a session; the session's calls come from others, under its lock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import mmap
import os
import select
import signal
import struct
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from vhostd.errors import UsageError
from vhostd.protocol.features import VirtioFeature
from vhostd.protocol.server import ExportServer
from vhostd.virtqueue.layout import RingAddresses
from vhostd.virtqueue.reference import BrokenRingError, ReferenceRing
from vhostd.virtqueue.reference_block import ReferenceDisk

if TYPE_CHECKING:
    from vhostd._native import MemoryRegion

FEATURES = int(
    VirtioFeature.BLK_SIZE_MAX
    | VirtioFeature.BLK_SEG_MAX
    | VirtioFeature.BLK_BLK_SIZE
    | VirtioFeature.BLK_TOPOLOGY
    | VirtioFeature.BLK_FLUSH
    | VirtioFeature.BLK_CONFIG_WCE
    | VirtioFeature.BLK_MQ
    | VirtioFeature.BLK_DISCARD
    | VirtioFeature.BLK_WRITE_ZEROES
    | VirtioFeature.INDIRECT_DESC
    | VirtioFeature.EVENT_IDX
    | VirtioFeature.VERSION_1
)
SEG_MAX = 126
POLL_PAUSE_MS = 1


@dataclass(slots=True)
class _Region:
    guest_address: int
    size_bytes: int
    user_address: int
    mapping: mmap.mmap
    view: memoryview

    @classmethod
    def map(cls, region: MemoryRegion) -> _Region:
        offset, size = region["mmap_offset"], region["size_bytes"]
        page_offset = offset % mmap.ALLOCATIONGRANULARITY
        try:
            mapping = mmap.mmap(region["fd"], size + page_offset, offset=offset - page_offset)
        except (OSError, ValueError, OverflowError) as error:
            raise UsageError(f"a memory region cannot be mapped: {error}") from error
        view = memoryview(mapping)[page_offset:]
        return cls(region["guest_address"], size, region["user_address"], mapping, view)

    def close(self) -> None:
        self.view.release()
        self.mapping.close()


class _Memory:
    """Fulfils `DeviceMemory`."""

    def __init__(self) -> None:
        self.regions: list[_Region] = []

    def _find(self, address: int) -> _Region | None:
        for region in self.regions:
            if region.guest_address <= address < region.guest_address + region.size_bytes:
                return region
        return None

    def _split(self, address: int, len_bytes: int) -> list[memoryview]:
        found = []
        while len_bytes:
            region = self._find(address)
            if region is None:
                raise BrokenRingError(f"there is no guest memory at {address:#x}")
            start = address - region.guest_address
            here = min(len_bytes, region.size_bytes - start)
            found.append(region.view[start : start + here])
            address += here
            len_bytes -= here
        return found

    def pieces(self, address: int, len_bytes: int) -> int:
        return len(self._split(address, len_bytes))

    def read(self, address: int, len_bytes: int) -> bytes:
        return b"".join(self._split(address, len_bytes))

    def write(self, address: int, data: bytes) -> None:
        done = 0
        for piece in self._split(address, len(data)):
            piece[:] = data[done : done + len(piece)]
            done += len(piece)

    def guest_address(self, user_address: int) -> int:
        for region in self.regions:
            offset = user_address - region.user_address
            if 0 <= offset < region.size_bytes:
                return region.guest_address + offset
        raise UsageError(f"there is no memory at user address {user_address:#x}")


@dataclass(slots=True)
class _Queue:
    ring: ReferenceRing
    kick_fd: int | None
    call_fd: int | None
    error_fd: int | None
    enabled: bool
    broken: bool = False


class ReferenceDevice:
    """Fulfils `vhostd.protocol.device.Device` for one session."""

    def __init__(self, disk: ReferenceDisk, queues: int) -> None:
        self._disk = disk
        self._queue_count = queues
        self._memory = _Memory()
        self._queues: dict[int, _Queue] = {}
        self._write_cache = True
        self._lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="rings")
        self._thread.start()

    # Device

    def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        mapped = [_Region.map(region) for region in regions]
        with self._lock:
            old, self._memory.regions = self._memory.regions, mapped
        for region in old:
            region.close()

    def add_region(self, region: MemoryRegion) -> None:
        mapped = _Region.map(region)
        with self._lock:
            self._memory.regions.append(mapped)

    def remove_region(self, guest_address: int, user_address: int, size_bytes: int) -> None:
        with self._lock:
            for region in self._memory.regions:
                if region.guest_address == guest_address:
                    self._memory.regions.remove(region)
                    region.close()
                    return

    def start_queue(
        self,
        index: int,
        *,
        size: int,
        descriptor_address: int,
        available_address: int,
        used_address: int,
        base: int,
        kick_fd: int | None,
        call_fd: int | None,
        error_fd: int | None,
        features: int,
        enabled: bool,
    ) -> None:
        with self._lock:
            memory = self._memory
            at = RingAddresses(
                memory.guest_address(descriptor_address),
                memory.guest_address(available_address),
                memory.guest_address(used_address),
            )
            ring = ReferenceRing(memory, size=size, features=features, addresses=at, base=base)
            self._queues[index] = _Queue(
                ring, _duplicate(kick_fd), _duplicate(call_fd), _duplicate(error_fd), enabled
            )
        self._wake()

    def set_queue_enabled(self, index: int, enabled: bool) -> None:
        with self._lock:
            self._queues[index].enabled = enabled
        self._wake()

    def set_queue_call(self, index: int, call_fd: int | None) -> None:
        with self._lock:
            queue = self._queues[index]
            _close(queue.call_fd)
            queue.call_fd = _duplicate(call_fd)

    def set_queue_kick(self, index: int, kick_fd: int | None) -> None:
        with self._lock:
            queue = self._queues[index]
            _close(queue.kick_fd)
            queue.kick_fd = _duplicate(kick_fd)
        self._wake()

    def set_queue_error(self, index: int, error_fd: int | None) -> None:
        with self._lock:
            queue = self._queues[index]
            _close(queue.error_fd)
            queue.error_fd = _duplicate(error_fd)

    def stop_queue(self, index: int) -> int:
        with self._lock:
            queue = self._queues.pop(index)
            for fd in (queue.kick_fd, queue.call_fd, queue.error_fd):
                _close(fd)
            return queue.ring.next_available

    def set_write_cache(self, enabled: bool) -> None:
        self._write_cache = enabled

    def config_space(self, features: int) -> bytes:
        disk = self._disk
        blocks = 4096 // disk.block_bytes
        space = struct.pack("<QIIHBBI", disk.size_bytes // 512, 1 << 20, SEG_MAX, 0, 0, 0, 0)
        space = space[:20] + struct.pack("<I", disk.block_bytes)
        space += struct.pack("<BBHI", blocks.bit_length() - 1, 0, blocks, blocks)
        space += struct.pack("<BBH", self._write_cache, 0, self._queue_count)
        unmap = (disk.max_unmap_sectors, disk.max_unmap_segments)
        return space + struct.pack("<IIIIIB", *unmap, 8, *unmap, 1).ljust(60, b"\0")

    def features(self) -> int:
        return FEATURES | (VirtioFeature.BLK_RO if self._disk.read_only else 0)

    def close(self) -> None:
        self._closing = True
        self._wake()
        self._thread.join()
        for index in list(self._queues):
            self.stop_queue(index)
        for region in self._memory.regions:
            region.close()
        self._memory.regions = []
        os.close(self._wake_fd)

    # The rings

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _serve(self) -> None:
        while not self._closing:
            poll = select.poll()
            poll.register(self._wake_fd, select.POLLIN)
            pause_ms: int | None = None
            with self._lock:
                for queue in self._queues.values():
                    if not queue.enabled or queue.broken:
                        continue
                    self._serve_queue(queue)
                    if queue.kick_fd is None:
                        pause_ms = POLL_PAUSE_MS
                    else:
                        poll.register(queue.kick_fd, select.POLLIN)
            for fd, _event in poll.poll(pause_ms):
                # A queue that was stopped meanwhile has taken its descriptor along.
                with contextlib.suppress(OSError):
                    os.eventfd_read(fd)

    def _serve_queue(self, queue: _Queue) -> None:
        try:
            queue.ring.disable_kicks()
            while True:
                while (chain := queue.ring.pop()) is not None:
                    queue.ring.push(chain.head, self._disk.handle(self._memory, chain))
                    if queue.ring.wants_call() and queue.call_fd is not None:
                        os.eventfd_write(queue.call_fd, 1)
                if not queue.ring.enable_kicks():
                    return
        except BrokenRingError:
            queue.broken = True
            if queue.error_fd is not None:
                os.eventfd_write(queue.error_fd, 1)


def _duplicate(fd: int | None) -> int | None:
    return None if fd is None else os.dup(fd)


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


async def _run(options: argparse.Namespace) -> None:
    servers = []
    for path in (options.socket, options.neighbour):
        if path is None:
            continue
        disk = ReferenceDisk(options.size, options.block, options.read_only)
        server = ExportServer(
            path,
            name=f"reference/{path.name}",
            open_device=functools.partial(ReferenceDevice, disk, options.queues),
            queues=options.queues,
        )
        await server.start()
        servers.append(server)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    print(f"ready: {options.socket}", flush=True)
    await stopped.wait()
    for server in servers:
        await server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="A vhost-user-blk back-end in plain Python.")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--neighbour", type=Path, help="socket of a second disk")
    parser.add_argument("--size", type=int, default=64 << 20, help="bytes")
    parser.add_argument("--block", type=int, choices=(512, 4096), default=512)
    parser.add_argument("--queues", type=int, default=4)
    parser.add_argument("--read-only", action="store_true")
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
