"""Segment files of a device, opened for reading only, and how much was read of them."""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from vhostd.storage.check.report import CheckSummary
from vhostd.storage.format import (
    BLOCK_BYTES,
    SEGMENTS_DIRECTORY,
    segment_number_of,
    segment_path,
)

__all__ = ["SegmentFile", "SegmentFiles"]

MAX_OPEN_FILES = 64


class SegmentFile:
    """One open segment. What lies behind the end of the file reads as zeroes, as a hole does."""

    def __init__(self, path: Path, number: int, summary: CheckSummary) -> None:
        self.path = str(path)
        self.number = number
        self._summary = summary
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self.size_bytes = os.fstat(self._fd).st_size

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Exactly `length_bytes` from `offset_bytes`; raises OSError."""
        parts = []
        left_bytes = length_bytes
        while left_bytes > 0:
            part = os.pread(self._fd, left_bytes, offset_bytes)
            if not part:
                parts.append(bytes(left_bytes))
                break
            parts.append(part)
            left_bytes -= len(part)
            offset_bytes += len(part)
            self._summary.bytes_read += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_blocks(self, offset_blocks: int, count: int = 1) -> bytes:
        """`count` blocks from block `offset_blocks`."""
        return self.read(offset_blocks * BLOCK_BYTES, count * BLOCK_BYTES)

    def close(self) -> None:
        """Closes, and leaves the page cache to those who need it: guests."""
        with suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(self._fd)


class SegmentFiles:
    """Opens segments of one device by number; keeps a bounded number of them open."""

    def __init__(self, directory: Path, summary: CheckSummary) -> None:
        self.directory = directory
        self._summary = summary
        self._open: OrderedDict[int, SegmentFile] = OrderedDict()

    def path(self, number: int) -> Path:
        """Where the segment is, if it is."""
        return self.directory / segment_path(number)

    def get(self, number: int) -> SegmentFile:
        """The segment, open; valid until the next call. Raises OSError."""
        file = self._open.get(number)
        if file is not None:
            self._open.move_to_end(number)
            return file
        while len(self._open) >= MAX_OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        file = SegmentFile(self.path(number), number, self._summary)
        self._open[number] = file
        return file

    def drop(self, number: int) -> None:
        """Closes the segment if it is open."""
        file = self._open.pop(number, None)
        if file is not None:
            file.close()

    def close(self) -> None:
        """Closes all."""
        for number in list(self._open):
            self.drop(number)

    def list(self) -> tuple[list[int], list[Path]]:
        """The numbers of all segments, ascending, and what else lies among them."""
        numbers: list[int] = []
        strangers: list[Path] = []
        root = self.directory / SEGMENTS_DIRECTORY
        for directory in sorted(os.scandir(root), key=lambda entry: entry.name):
            if not directory.is_dir(follow_symlinks=False):
                strangers.append(Path(directory.path))
                continue
            for entry in os.scandir(directory.path):
                number = segment_number_of(directory.name, entry.name)
                if number is None or not entry.is_file(follow_symlinks=False):
                    strangers.append(Path(entry.path))
                else:
                    numbers.append(number)
        numbers.sort()
        return numbers, strangers
