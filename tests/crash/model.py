"""What a disk may hold after a crash: an exact model of stamped changes.

Every sector that is written says which sector it is and which change wrote it, sixteen times over,
so any mixture is seen. The model knows of each change when it was begun and when it completed, on a
clock that ticks with every event. After a crash it judges what the disk holds:

- a change that *must* be there (completed; or, after loss of power, flushed) is there, unless a
  change that may come after it replaced it;
- any other is there or not, block by block, but never a part of a block (`BLOCK_BYTES`);
- if a change is there, everything completed before that one was begun is there, too (what is
  recovered is a prefix of the log);
- all that stands in a block is explained by one order of changes that agrees with the clock.

Changes that were in flight together may have happened in either order; they may share blocks.
Single-threaded.
"""

from __future__ import annotations

import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

__all__ = ["BLOCK_BYTES", "SECTOR_BYTES", "Change", "CrashModel", "Flush", "WrongDataError"]

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
BLOCK_SECTORS = BLOCK_BYTES // SECTOR_BYTES
ZEROES = bytes(SECTOR_BYTES)

_STAMP = struct.Struct("<4sIQQ")
_SUM = struct.Struct("<Q")
_STAMP_BYTES = _STAMP.size + _SUM.size
_MAGIC = b"VSTP"
_REPORTED = 3


class WrongDataError(AssertionError):
    """The disk holds what no order of the changes explains."""


@dataclass(slots=True, eq=False)
class Change:
    """Sectors `first` to `end - 1` were written, or made zeroes."""

    number: int
    first: int
    end: int
    zero: bool
    begun: int
    done: int | None = None

    def covers(self, sector: int) -> bool:
        return self.first <= sector < self.end

    def is_before(self, other: Change) -> bool:
        """Whether it completed before the other was begun."""
        return self.done is not None and self.done < other.begun

    def __repr__(self) -> str:
        kind = "zeroes" if self.zero else "write"
        return f"{kind} #{self.number} of {self.first}..{self.end} ({self.begun}-{self.done})"


@dataclass(slots=True, eq=False)
class Flush:
    begun: int


class CrashModel:
    """The model of one disk, whose content at the beginning is `base`.

    Args:
        tag: tells disks apart: a neighbour's data is seen as such.
    """

    def __init__(self, tag: int, base: bytes) -> None:
        if len(base) % BLOCK_BYTES:
            raise ValueError("a disk of the model is whole blocks")
        self.tag = tag
        self.base = base
        self.sectors = len(base) // SECTOR_BYTES
        self.clock = 0
        self.changes: dict[int, Change] = {}
        self.flushed_before = 0
        """Changes that completed before this are durable."""
        self.write_through = False
        """Whether every completed change is durable."""
        self._by_block: dict[int, list[Change]] = defaultdict(list)
        self._next_number = 1

    # What happens

    def _tick(self) -> int:
        self.clock += 1
        return self.clock

    def begin(self, first: int, sectors: int, *, zero: bool = False) -> Change:
        change = Change(self._next_number, first, first + sectors, zero, self._tick())
        self._next_number += 1
        self.changes[change.number] = change
        for block in range(first // BLOCK_SECTORS, (change.end - 1) // BLOCK_SECTORS + 1):
            self._by_block[block].append(change)
        return change

    def finish(self, change: Change) -> None:
        change.done = self._tick()

    def cancel(self, change: Change) -> None:
        """It was never submitted."""
        del self.changes[change.number]
        for block in range(change.first // BLOCK_SECTORS, (change.end - 1) // BLOCK_SECTORS + 1):
            self._by_block[block].remove(change)

    def begin_flush(self) -> Flush:
        return Flush(self._tick())

    def finish_flush(self, flush: Flush) -> None:
        self.flushed_before = max(self.flushed_before, flush.begun)

    def rebase(self, content: bytes) -> None:
        """The disk is known to hold `content`; what led to it is forgotten."""
        self.base = content
        self.changes.clear()
        self._by_block.clear()
        self.flushed_before = 0

    # Data

    def payload(self, change: Change) -> bytes:
        """What the change writes."""
        return b"".join(self._stamp(s, change.number) for s in range(change.first, change.end))

    def _stamp(self, sector: int, number: int) -> bytes:
        stamp = _STAMP.pack(_MAGIC, self.tag, sector, number)
        return (stamp + _SUM.pack(zlib.crc32(stamp))) * (SECTOR_BYTES // _STAMP_BYTES)

    def _number(self, sector: int, data: bytes) -> int | None:
        """The change that wrote this there; 0 for zeroes, None for what was never written there."""
        if data == ZEROES:
            return 0
        _, _, _, number = _STAMP.unpack_from(data)
        return number if number and data == self._stamp(sector, number) else None

    # Judgement

    def check_read(self, first: int, data: bytes, begun: int) -> None:
        """Judges a read of a disk that lives; `begun`: the clock when it was submitted."""
        for at in range(0, len(data), SECTOR_BYTES):
            sector, found = first + at // SECTOR_BYTES, data[at : at + SECTOR_BYTES]
            changes = [c for c in self._by_block[sector // BLOCK_SECTORS] if c.covers(sector)]
            older = [c for c in changes if c.done is not None and c.done < begun]
            could = [c for c in changes if self._wrote(c, sector, found)]
            if not any(not any(c.is_before(o) for o in older) for c in could) and not (
                not older and found == self._base_sector(sector)
            ):
                raise WrongDataError(
                    f"sector {sector} was read as {self._describe(sector, found)} at {begun}, "
                    f"with {changes} before"
                )

    def check(self, content: bytes, *, power_lost: bool = False) -> None:
        """Judges the content of the disk after a crash.

        Raises WrongDataError with the first few blocks that are wrong.
        """
        assert len(content) == len(self.base), "the size of the disk changed"
        horizon = self._horizon(content)
        wrong = []
        for block in range(len(content) // BLOCK_BYTES):
            at = block * BLOCK_BYTES
            found = content[at : at + BLOCK_BYTES]
            changes = self._by_block.get(block)
            if changes is None:
                if found != self.base[at : at + BLOCK_BYTES]:
                    wrong.append(f"{self._describe_block(block, found)}; nobody changed it")
                continue
            must = {c for c in changes if self._must_be_there(c, horizon, power_lost)}
            if not self._is_explained(block, found, changes, must):
                wrong.append(
                    f"{self._describe_block(block, found)}\n   must: "
                    f"{sorted(must, key=lambda c: c.number)}\n   all: {changes}"
                )
        if wrong:
            raise WrongDataError(
                f"{len(wrong)} blocks are wrong after "
                f"{'loss of power' if power_lost else 'a kill'} (flushed before "
                f"{self.flushed_before}, newest seen {horizon}):\n" + "\n".join(wrong[:_REPORTED])
            )

    def _must_be_there(self, change: Change, horizon: int, power_lost: bool) -> bool:
        if change.done is None:
            return False
        if not power_lost or self.write_through:
            return True
        return change.done < max(self.flushed_before, horizon)

    def _horizon(self, content: bytes) -> int:
        """When the newest change that is seen was begun."""
        newest = 0
        for sector, found in self._written_sectors(content):
            number = self._number(sector, found)
            change = self.changes.get(number) if number else None
            if change is not None and change.covers(sector):
                newest = max(newest, change.begun)
        return newest

    def _written_sectors(self, content: bytes) -> Iterator[tuple[int, bytes]]:
        for block in self._by_block:
            for sector in range(block * BLOCK_SECTORS, (block + 1) * BLOCK_SECTORS):
                yield sector, content[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]

    def _base_sector(self, sector: int) -> bytes:
        return self.base[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]

    def _wrote(self, change: Change, sector: int, found: bytes) -> bool:
        if not change.covers(sector):
            return False
        return found == (ZEROES if change.zero else self._stamp(sector, change.number))

    def _is_explained(
        self, block: int, found: bytes, changes: list[Change], must: set[Change]
    ) -> bool:
        """Whether an order of changes, all of `must` among them, leaves the block like this."""
        first = block * BLOCK_SECTORS
        # Sectors that the same changes could have left are of the same change: whichever came last.
        groups: dict[tuple[Change | None, ...], list[int]] = defaultdict(list)
        for sector in range(first, first + BLOCK_SECTORS):
            data = found[(sector - first) * SECTOR_BYTES :][:SECTOR_BYTES]
            could: list[Change | None] = [c for c in changes if self._wrote(c, sector, data)]
            if data == self._base_sector(sector):
                could.append(None)
            if not could:
                return False
            groups[tuple(could)].append(sector)
        return any(
            _is_ordered(
                {
                    s: last
                    for sectors, last in zip(groups.values(), choice, strict=True)
                    for s in sectors
                },
                must,
            )
            for choice in product(*groups)
        )

    def _describe(self, sector: int, data: bytes) -> str:
        number = self._number(sector, data)
        if number == 0:
            return "zeroes"
        if number is None:
            return f"garbage {data[:32].hex()}…"
        return f"#{number}"

    def _describe_block(self, block: int, found: bytes) -> str:
        first = block * BLOCK_SECTORS
        words = []
        for sector in range(first, first + BLOCK_SECTORS):
            data = found[(sector - first) * SECTOR_BYTES :][:SECTOR_BYTES]
            before = self._base_sector(sector)
            words.append(f"{self._describe(sector, data)} (was {self._describe(sector, before)})")
        return f"block {block} (sectors {first}…): {', '.join(words)}"


def _is_ordered(last: dict[int, Change | None], must: set[Change]) -> bool:
    """Whether the changes can be ordered so that each sector's `last` one is its last.

    None: no change that happened covers the sector.
    """
    happened = must | {change for change in last.values() if change is not None}
    before: dict[Change, set[Change]] = {
        change: {other for other in happened if other.is_before(change)} for change in happened
    }
    for sector, final in last.items():
        covering = {change for change in happened if change.covers(sector)}
        if final is None:
            if covering:
                return False
        else:
            before[final] |= covering - {final}
    while before:
        ready = [change for change, others in before.items() if not others]
        if not ready:
            return False
        for change in ready:
            del before[change]
        for others in before.values():
            others.difference_update(ready)
    return True
