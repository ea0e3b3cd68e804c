"""Which blocks of a log segment the map reaches, and a digest of what it says of them.

A check has to compare each leaf entry (volume block → address + CRC) with the record that wrote
the block. The map is in the order of volume blocks, the log in the order of time: holding either
in memory would cost gigabytes for a volume of some TiB. So the map's walk leaves, for each
segment, a bitmap of the blocks that are reached (1 KiB) and one number, the sum over those blocks
of

    crc * 2^(32*offset)  +  volume_block * BASE^offset      (modulo a 64-bit prime)

and the pass over the segment, record by record, computes the same sum from the record's side over
the same blocks. Equal sums: both sides say the same of every block, but for a chance of about
2^-64. The sum is linear, so runs of blocks cost a few operations, whatever way either side cuts
them.

Snapshots and clones reach the same block through other leaves. Each further time that a run is
met is counted (4 bytes a block, only in segments where it happens), and summed apart, so that every
leaf is compared with the records.

Only for a segment where the sums differ, the map is walked again to tell which blocks it is.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from vhostd.storage.format import MAX_SEGMENT_BLOCKS

__all__ = ["LiveBlocks", "digest", "runs_of"]

_PRIME = (1 << 64) - 59
_BASE = 0x9E3779B97F4A7C15


def _powers() -> tuple[list[int], list[int], list[int]]:
    """2^(32*o), and the sums over i < o of BASE^i and of i*BASE^i."""
    shifts, sums, weighted_sums = [], [0], [0]
    power = 1
    for offset in range(MAX_SEGMENT_BLOCKS):
        shifts.append(pow(2, 32 * offset, _PRIME))
        sums.append((sums[-1] + power) % _PRIME)
        weighted_sums.append((weighted_sums[-1] + offset * power) % _PRIME)
        power = power * _BASE % _PRIME
    return shifts, sums, weighted_sums


_SHIFTS, _SUMS, _WEIGHTED_SUMS = _powers()


def digest(block: int, offset: int, count: int, checksums: bytes) -> int:
    """The sum over `count` blocks from volume block `block`, at `offset` of their segment."""
    end = offset + count
    crc_part = int.from_bytes(checksums, "little") % _PRIME * _SHIFTS[offset]
    # (block - offset) is the same for all blocks of the run.
    number_part = (block - offset) * (_SUMS[end] - _SUMS[offset]) + (
        _WEIGHTED_SUMS[end] - _WEIGHTED_SUMS[offset]
    )
    return (crc_part + number_part) % _PRIME


def runs_of(bits: int) -> Iterator[tuple[int, int]]:
    """Runs of ones: (offset, count), ascending."""
    offset = 0
    while bits:
        zeroes = (bits & -bits).bit_length() - 1
        bits >>= zeroes
        offset += zeroes
        ones = (~bits & (bits + 1)).bit_length() - 1
        yield offset, ones
        bits >>= ones
        offset += ones


class LiveBlocks:
    """One log segment as maps have it, or as records have it.

    bits: blocks that are reached. held: those of them that something else than a snapshot that is
    being removed reaches. again: how many more times each is reached.
    """

    __slots__ = ("again", "again_sum", "bits", "held", "sum")

    def __init__(self) -> None:
        self.bits = 0
        self.held = 0
        self.sum = 0
        self.again: array[int] | None = None
        self.again_sum = 0

    def add(
        self, block: int, offset: int, count: int, checksums: bytes, *, held: bool = True
    ) -> None:
        """Adds a run of at least one block."""
        mask = ((1 << count) - 1) << offset
        if held:
            self.held |= mask
        twice = (self.bits & mask) >> offset
        if twice:
            self._add_again(twice, block, offset, checksums)
        for start, length in runs_of(mask >> offset & ~twice):
            part = checksums[4 * start : 4 * (start + length)]
            self.sum = (self.sum + digest(block + start, offset + start, length, part)) % _PRIME
        self.bits |= mask

    def _add_again(self, twice: int, block: int, offset: int, checksums: bytes) -> None:
        if self.again is None:
            self.again = array("I", bytes(4 * MAX_SEGMENT_BLOCKS))
        for start, length in runs_of(twice):
            part = checksums[4 * start : 4 * (start + length)]
            value = digest(block + start, offset + start, length, part)
            self.again_sum = (self.again_sum + value) % _PRIME
            for index in range(offset + start, offset + start + length):
                self.again[index] += 1

    def add_where(
        self, wanted: LiveBlocks, block: int, offset: int, count: int, checksums: bytes
    ) -> None:
        """Adds those blocks of the run that `wanted` has, as often as it has them."""
        part = wanted.bits >> offset & ((1 << count) - 1)
        for start, length in runs_of(part):
            self.add(
                block + start,
                offset + start,
                length,
                checksums[4 * start : 4 * (start + length)],
            )
        if wanted.again is None:
            return
        for index, times in enumerate(wanted.again[offset : offset + count]):
            if times:
                checksum = checksums[4 * index : 4 * index + 4]
                value = times * digest(block + index, offset + index, 1, checksum)
                self.again_sum = (self.again_sum + value) % _PRIME

    def says_the_same(self, other: LiveBlocks) -> bool:
        """Both sides have the same blocks, and the same of each."""
        return (self.bits, self.sum, self.again_sum) == (other.bits, other.sum, other.again_sum)

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return self.bits.bit_count()
