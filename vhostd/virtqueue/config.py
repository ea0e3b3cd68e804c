"""The configuration space of a virtio-blk device: virtio 1.3, 5.2.4.

Fields of features that were not negotiated mean nothing. Pure data; any thread.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from vhostd.errors import UsageError

__all__ = ["BlockConfig"]

_LAYOUT = struct.Struct("<QIIHBBIBBHIBBHIIIIIB")


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """struct virtio_blk_config up to `write_zeroes_may_unmap`.

    Sectors are of 512 bytes; `alignment_offset`, `min_io_blocks` and `opt_io_blocks` count
    logical blocks of `block_bytes`.
    """

    WRITEBACK_OFFSET: ClassVar[int] = 32

    capacity_sectors: int
    size_max_bytes: int
    seg_max: int
    cylinders: int
    heads: int
    sectors: int
    block_bytes: int
    physical_block_exp: int
    alignment_offset: int
    min_io_blocks: int
    opt_io_blocks: int
    writeback: int
    num_queues: int
    max_discard_sectors: int
    max_discard_segments: int
    discard_alignment_sectors: int
    max_write_zeroes_sectors: int
    max_write_zeroes_segments: int
    write_zeroes_may_unmap: int

    @classmethod
    def decode(cls, data: bytes) -> BlockConfig:
        """Raises UsageError if there are fewer bytes than the fields take."""
        if len(data) < _LAYOUT.size:
            raise UsageError(
                f"a config space of {len(data)} bytes is too short; virtio-blk has at least "
                f"{_LAYOUT.size}"
            )
        fields = list(_LAYOUT.unpack_from(data))
        # unused0, between writeback and num_queues.
        del fields[12]
        return cls(*fields)
