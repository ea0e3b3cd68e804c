"""What must hold of the dead set of a segment (`docs/format.md`, "Catalog") at each commit.

Pure; any thread.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhostd._native import SegmentRow

__all__ = ["check_dead_set", "dead_node_bytes"]

LOG, MAP = 1, 2
MAX_BITMAP_BYTES = 8192 // 8
BLOCK_BYTES = 4096


def check_dead_set(row: SegmentRow, old: bytes) -> str | None:
    """What is wrong with the dead set of a row, None if nothing. old: the one committed before."""
    dead, used_blocks = row["dead"], row["used_blocks"]
    if row["kind"] == LOG:
        now = int.from_bytes(dead, "little")
        if len(dead) > MAX_BITMAP_BYTES or now.bit_length() > max(used_blocks, 1):
            return f"dead blocks lie behind its {used_blocks} blocks"
        if int.from_bytes(old, "little") & ~now:
            return "dead blocks came alive"
        if now & 1:
            return "its header is among its dead blocks"
        if row["live"] + now.bit_count() > used_blocks:
            return f"{row['live']} live and {now.bit_count()} dead are more than it has"
        if row["punched_blocks"] > now.bit_count():
            return "more is punched than is dead"
        return None
    if len(dead) % 8:
        return "its list of dead nodes is cut off"
    end = 0
    for offset, length in struct.iter_unpack("<II", dead):
        # Neighbours are one range; the first node lies behind the header.
        if offset <= end or length == 0 or offset < BLOCK_BYTES:
            return "its dead nodes overlap or are out of order"
        end = offset + length
    if end > used_blocks * BLOCK_BYTES:
        return f"dead nodes lie behind its {used_blocks} blocks"
    return None


def dead_node_bytes(dead: bytes) -> int:
    """Bytes of dead nodes in a map segment."""
    return sum(length for _, length in struct.iter_unpack("<II", dead))
