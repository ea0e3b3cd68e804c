"""Copies a disk from a reader to a writer: sparse, pipelined, with bounded memory.

Both ends are a raw file or a disk behind a vhost-user socket. What reads as zeroes is not written:
the target must read as zeroes before. At most DEPTH requests of at most 1 MiB are in flight at
either end. One thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from errno import EINVAL, ENOSPC, ENXIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vhostd.errors import DeviceError, NoSpaceError, VhostdError

__all__ = [
    "Disk",
    "DiskReader",
    "DiskWriter",
    "Extent",
    "FileReader",
    "FileWriter",
    "Reader",
    "Writer",
    "close_together",
    "copy",
    "file_extents",
]

DEPTH = 8
CHUNK_BYTES = 1 << 20
ZERO_GRAIN_BYTES = 64 << 10
"""Zeroes shorter than this within data are written: fewer, larger records."""

_ZEROES = bytes(CHUNK_BYTES)


class Extent(NamedTuple):
    """A part of a disk that may hold data."""

    offset_bytes: int
    len_bytes: int


class Disk(Protocol):
    """What is needed of `vhostd.virtqueue.block.BlockDevice`."""

    @property
    def in_flight(self) -> int: ...
    @property
    def capacity_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def max_request_bytes(self) -> int: ...
    @property
    def max_write_zeroes_bytes(self) -> int: ...
    def submit_read(self, offset_bytes: int, len_bytes: int, /) -> int: ...
    def submit_write(self, offset_bytes: int, data: bytes | bytearray | memoryview, /) -> int: ...
    def submit_write_zeroes(self, extents: Sequence[Any], /) -> int: ...
    def reap(self, *, minimum: int = 1) -> list[Any]: ...
    def flush(self) -> None: ...


class Reader(Protocol):
    """Where data comes from."""

    def read(self, extents: Iterable[Extent]) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of pieces of the extents, in any order."""
        ...


class Writer(Protocol):
    """Where data goes."""

    def write(self, offset_bytes: int, data: memoryview) -> None: ...
    def finish(self) -> None:
        """Returns when all is durable."""
        ...


def copy(
    reader: Reader,
    writer: Writer,
    extents: Iterable[Extent],
    progress: Callable[[int, int], None],
    *,
    total_bytes: int,
) -> int:
    """Copies the extents; returns how many bytes were written.

    progress: told how many bytes were dealt with, and how many there are (`total_bytes`).

    Raises:
        DeviceError, NoSpaceError: an end failed; what was written stays.
    """
    done_bytes = written_bytes = 0
    for offset_bytes, data in reader.read(extents):
        for start, end in data_runs(data):
            writer.write(offset_bytes + start, memoryview(data)[start:end])
            written_bytes += end - start
        done_bytes += len(data)
        progress(done_bytes, total_bytes)
    writer.finish()
    return written_bytes


def data_runs(data: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts that are not zero, in grains."""
    start = None
    for at in range(0, len(data), ZERO_GRAIN_BYTES):
        grain = data[at : at + ZERO_GRAIN_BYTES]
        if grain == _ZEROES[: len(grain)]:
            if start is not None:
                yield start, at
                start = None
        elif start is None:
            start = at
    if start is not None:
        yield start, len(data)


def close_together(extents: Iterable[Extent], gap_bytes: int) -> Iterator[Extent]:
    """Ascending extents, those with at most a gap between them as one: fewer, larger requests."""
    start = end = 0
    for offset_bytes, len_bytes in extents:
        if offset_bytes > end + gap_bytes:
            if start < end:
                yield Extent(start, end - start)
            start = offset_bytes
        elif start == end:
            start = offset_bytes
        end = offset_bytes + len_bytes
    if start < end:
        yield Extent(start, end - start)


def _chunks(extents: Iterable[Extent], chunk_bytes: int) -> Iterator[Extent]:
    for offset_bytes, len_bytes in extents:
        for at in range(0, len_bytes, chunk_bytes):
            yield Extent(offset_bytes + at, min(chunk_bytes, len_bytes - at))


# Files


def file_extents(fd: int, size_bytes: int) -> Iterator[Extent]:
    """The parts of a file that are not holes; all of it where the file system cannot tell."""
    at = 0
    while at < size_bytes:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == ENXIO:
                return
            if error.errno == EINVAL:
                yield Extent(at, size_bytes - at)
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size_bytes)
        if start < end:
            yield Extent(start, end - start)
        at = max(end, start + 1)


class FileReader:
    """Reads an image file; the last piece is padded with zeroes to whole blocks."""

    def __init__(self, fd: int, path: Path, *, block_bytes: int) -> None:
        self._fd = fd
        self._path = path
        self._block_bytes = block_bytes

    def read(self, extents: Iterable[Extent]) -> Iterator[tuple[int, bytes]]:
        for offset_bytes, len_bytes in _aligned(extents, self._block_bytes):
            try:
                data = os.pread(self._fd, len_bytes, offset_bytes)
            except OSError as error:
                raise DeviceError(
                    f"{self._path} cannot be read at {offset_bytes}: {error.strerror}"
                ) from error
            yield offset_bytes, data.ljust(len_bytes, b"\0")


def _aligned(extents: Iterable[Extent], block_bytes: int) -> Iterator[Extent]:
    """The extents, widened to whole blocks, without reading a block twice."""
    done = 0
    for offset_bytes, len_bytes in extents:
        start = max(done, offset_bytes // block_bytes * block_bytes)
        done = -(-(offset_bytes + len_bytes) // block_bytes) * block_bytes
        yield from _chunks([Extent(start, done - start)], CHUNK_BYTES)


class FileWriter:
    """Writes a sparse raw file of a given size."""

    def __init__(self, fd: int, path: Path, size_bytes: int) -> None:
        self._fd = fd
        self._path = path
        with self._translated():
            os.ftruncate(fd, size_bytes)

    def write(self, offset_bytes: int, data: memoryview) -> None:
        with self._translated():
            while data:
                count = os.pwrite(self._fd, data, offset_bytes)
                data, offset_bytes = data[count:], offset_bytes + count

    def finish(self) -> None:
        with self._translated():
            os.fsync(self._fd)

    def _translated(self) -> _FileErrors:
        return _FileErrors(self._path)


class _FileErrors:
    """Turns errors of the operating system into ours."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            full = error.errno == ENOSPC
            raise (NoSpaceError if full else DeviceError)(
                f"{self._path} cannot be written: {error.strerror}; "
                + ("free space and try again" if full else "choose another place")
            ) from error


# Disks


class DiskReader:
    """Reads a disk behind a vhost-user socket."""

    def __init__(self, disk: Disk, name: str) -> None:
        self._disk = disk
        self._name = name

    def read(self, extents: Iterable[Extent]) -> Iterator[tuple[int, bytes]]:
        disk = self._disk
        chunk_bytes = min(CHUNK_BYTES, disk.max_request_bytes)
        reading: dict[int, Extent] = {}
        for extent in _chunks(extents, chunk_bytes):
            while len(reading) >= DEPTH:
                yield from self._reap(reading)
            token = disk.submit_read(extent.offset_bytes, extent.len_bytes)
            reading[token] = extent
        while reading:
            yield from self._reap(reading)

    def read_in_order(
        self, parts: Iterable[tuple[Extent, bool]]
    ) -> Iterator[tuple[Extent, bytes | None]]:
        """Reads the parts that are marked, and passes on the others, all in their order.

        At most DEPTH pieces are read or wait for their turn.
        """
        disk = self._disk
        chunk_bytes = min(CHUNK_BYTES, disk.max_request_bytes)
        reading: dict[int, Extent] = {}
        ready: dict[int, bytes] = {}
        order: deque[tuple[Extent, bool]] = deque()
        pieces = (
            (piece, marked)
            for part, marked in parts
            for piece in (_chunks([part], chunk_bytes) if marked else [part])
        )
        more = True
        while order or more:
            while more and len(order) < DEPTH:
                found = next(pieces, None)
                if found is None:
                    more = False
                    break
                order.append(found)
                if found[1]:
                    reading[disk.submit_read(*found[0])] = found[0]
            if not order:
                return
            piece, marked = order[0]
            while marked and piece.offset_bytes not in ready:
                ready.update(self._reap(reading))
            order.popleft()
            yield piece, ready.pop(piece.offset_bytes) if marked else None

    def _reap(self, reading: dict[int, Extent]) -> Iterator[tuple[int, bytes]]:
        for done in self._disk.reap():
            extent = reading.pop(done.token)
            if done.status != 0:
                raise DeviceError(
                    f"{self._name}: reading {extent.len_bytes} bytes at {extent.offset_bytes} "
                    f"failed with status {done.status}; see the log of what serves it"
                )
            yield extent.offset_bytes, done.data


class DiskWriter:
    """Writes to a disk behind a vhost-user socket."""

    def __init__(self, disk: Disk, name: str) -> None:
        self._disk = disk
        self._name = name
        self._writing: dict[int, Extent] = {}
        self._failure: DeviceError | None = None

    def write(self, offset_bytes: int, data: memoryview) -> None:
        chunk_bytes = min(CHUNK_BYTES, self._disk.max_request_bytes)
        for at in range(0, len(data), chunk_bytes):
            while len(self._writing) >= DEPTH:
                self._reap()
            piece = data[at : at + chunk_bytes]
            start = offset_bytes + at
            token = self._disk.submit_write(start, piece)
            self._writing[token] = Extent(start, len(piece))

    def zeroes(self, offset_bytes: int, len_bytes: int) -> None:
        """Makes a part of any length read as zeroes, and gives its space back."""
        chunk_bytes = self._disk.max_write_zeroes_bytes
        for extent in _chunks([Extent(offset_bytes, len_bytes)], chunk_bytes):
            while len(self._writing) >= DEPTH:
                self._reap()
            self._writing[self._disk.submit_write_zeroes([extent])] = extent

    def finish(self) -> None:
        while self._writing:
            self._reap()
        if self._failure is not None:
            # A flush would succeed, and say nothing of the write that did not.
            raise self._failure
        self._disk.flush()

    def _reap(self) -> None:
        for done in self._disk.reap():
            extent = self._writing.pop(done.token)
            if done.status != 0:
                self._failure = DeviceError(
                    f"{self._name}: writing {extent.len_bytes} bytes at {extent.offset_bytes} "
                    f"failed with status {done.status}; see the daemon's log (is the device full?)"
                )
        if self._failure is not None:
            raise self._failure


def remove_quietly(path: Path) -> None:
    """For what is half made."""
    with suppress(OSError, VhostdError):
        path.unlink()
