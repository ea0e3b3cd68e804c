"""Snapshots into streams: from a disk that is the snapshot, and the list of what differs.

Several reads are in flight, and the stream is in order all the same; at most DEPTH pieces of 1 MiB
are held. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from vhostd.transfer.copy import DiskReader, Extent
from vhostd.transfer.stream import Counts, StreamHeader, StreamWriter

__all__ = ["Changed", "send"]


class Changed(NamedTuple):
    """A part of the volume that differs. mapped: there is data; else it reads as zeroes."""

    offset_bytes: int
    len_bytes: int
    mapped: bool


def send(
    source: DiskReader,
    changes: Iterable[Changed],
    writer: StreamWriter,
    header: StreamHeader,
    progress: Callable[[int, int], None],
) -> Counts:
    """Writes what differs, and the trailer.

    Args:
        changes: ascending; what lies before `header.start_bytes` is left out.
        progress: told how much of the volume is dealt with, and its size.

    Raises:
        DeviceError: the disk cannot be read; the stream has no end then, and no receiver takes it
            for whole.
    """
    for part, data in source.read_in_order(_clipped(changes, header)):
        if data is not None:
            writer.data(part.offset_bytes, data)
        elif header.from_guid is not None:
            # Without a snapshot to begin with the volume begins as zeroes.
            writer.zeroes(*part)
        progress(part.offset_bytes + part.len_bytes, header.size_bytes)
    counts = writer.finish()
    progress(header.size_bytes, header.size_bytes)
    return counts


def _clipped(changes: Iterable[Changed], header: StreamHeader) -> Iterator[tuple[Extent, bool]]:
    """Within the volume (whose last block may be a part of one), and from where it is to begin."""
    for offset_bytes, len_bytes, has_data in changes:
        start = max(offset_bytes, header.start_bytes)
        end = min(offset_bytes + len_bytes, header.size_bytes)
        if start < end:
            yield Extent(start, end - start), has_data
