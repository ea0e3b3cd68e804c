"""Dead sets of segments, as the catalog keeps them (`docs/format.md`, "Catalog").

Pure; accepts any bytes, and raises nothing but `FormatError`.
"""

from __future__ import annotations

import struct

from vhostd.storage.format.errors import FormatError, Place
from vhostd.storage.format.fields import BLOCK_BYTES, MAX_SEGMENT_BLOCKS

__all__ = ["parse_dead_blocks", "parse_dead_nodes"]

_WHAT = "dead set"
_RANGE = struct.Struct("<II")


def parse_dead_blocks(data: bytes, place: Place) -> int:
    """The bitmap of a log segment's dead blocks of data, as a number: bit i is block i.

    Raises:
        FormatError: no segment has such.
    """
    if len(data) > MAX_SEGMENT_BLOCKS // 8:
        raise FormatError(_WHAT, "length", place, f"{len(data)} bytes, and a segment has fewer")
    if data and data[-1] == 0:
        raise FormatError(_WHAT, "length", place, "zeroes at its end are not left out")
    bits = int.from_bytes(data, "little")
    if bits & 1:
        raise FormatError(_WHAT, "bits", place, "block 0 is the segment's header, not data")
    return bits


def parse_dead_nodes(data: bytes, place: Place) -> tuple[tuple[int, int], ...]:
    """The ranges (offset, length; bytes) of a map segment's dead nodes.

    Raises:
        FormatError: no segment has such.
    """
    if len(data) % _RANGE.size:
        raise FormatError(_WHAT, "length", place, f"{len(data)} bytes are no ranges")
    ranges = tuple(_RANGE.iter_unpack(data))
    end = -1
    for offset, length in ranges:
        if offset <= end or length == 0 or offset < BLOCK_BYTES:
            reason = f"{length} bytes from {offset} do not follow on {end}"
            raise FormatError(_WHAT, "ranges", place, reason)
        end = offset + length
    if end > MAX_SEGMENT_BLOCKS * BLOCK_BYTES:
        raise FormatError(_WHAT, "ranges", place, f"{end} is in no segment")
    return ranges
