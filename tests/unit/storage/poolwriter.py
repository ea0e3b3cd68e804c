"""A second writer of the on-disk format, from `docs/format.md` alone: makes pools for the reader.

It knows neither the engine nor the reader under test, and takes its checksums from another library
(crcmod). Small and slow; for tests only. Everything random comes from the `random.Random` given.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING
from uuid import UUID

import crcmod.predefined

from tests.unit.storage.nodewriter import write_nodes
from vhostd.storage.catalog import Catalog

if TYPE_CHECKING:
    from vhostd._native import SegmentRow

BLOCK = 4096
_crc = crcmod.predefined.mkCrcFun("crc-32c")


def crc32c(data: bytes) -> int:
    value: int = _crc(data)
    return value


def summed(block: bytearray, offset: int) -> int:
    """Puts the checksum of the structure into it."""
    block[offset : offset + 4] = bytes(4)
    value = crc32c(bytes(block))
    struct.pack_into("<I", block, offset, value)
    return value


def segment_file(directory: Path, number: int) -> Path:
    return directory / "segments" / f"{number >> 10:011x}" / f"{number:013x}.seg"


@dataclass
class Written:
    """One record as it was written. entries: (block, count, is_data)."""

    sequence: int
    segment: int
    offset: int
    entries: list[tuple[int, int, bool]]
    checksums: list[int]
    header_checksum: int
    previous: int

    @property
    def end(self) -> int:
        return self.offset + 1 + len(self.checksums)


@dataclass
class LogSegment:
    number: int
    epoch: int
    records: list[Written] = field(default_factory=list)
    sealed: bool = False

    @property
    def end(self) -> int:
        return self.records[-1].end if self.records else 1


class PoolWriter:
    """A pool in a directory."""

    def __init__(self, directory: Path, random: Random, *, segment_bytes: int = 1 << 20) -> None:
        self.directory = directory
        self.random = random
        self.segment_bytes = segment_bytes
        self.uuid = UUID(bytes=random.randbytes(16))
        self.device = UUID(bytes=random.randbytes(16))
        self.next_segment = 1
        (directory / "segments").mkdir()
        (directory / "lock").write_bytes(b"1\n")
        block = bytearray(BLOCK)
        struct.pack_into(
            "<4sHH16s16sQQ",
            block,
            0,
            b"VHSB",
            2,
            0,
            self.uuid.bytes,
            self.device.bytes,
            segment_bytes,
            1_700_000_000_000_000_000,
        )
        struct.pack_into("<H", block, 60, 4)
        block[64:68] = b"fast"
        summed(block, 56)
        (directory / "superblock").write_bytes(block)
        self.catalog = Catalog.create(
            directory,
            uuid=self.uuid,
            name="fast",
            segment_bytes=segment_bytes,
            device_uuid=self.device,
        )
        self.catalog.grant_segments(1 << 16)

    def volume(self, name: str, size_bytes: int = 64 << 20) -> VolumeWriter:
        row = self.catalog.add_volume(name=name, size_bytes=size_bytes, logical_block_bytes=4096)
        return VolumeWriter(self, name, row.uuid, size_bytes)

    def make_segment(self, volume: VolumeWriter, kind: int) -> int:
        number = self.next_segment
        self.next_segment += 1
        block = bytearray(BLOCK)
        struct.pack_into(
            "<4sHBB16s16sQQQ",
            block,
            0,
            b"VHSG",
            1,
            kind,
            0,
            self.uuid.bytes,
            volume.uuid.bytes,
            number,
            volume.epoch,
            self.segment_bytes,
        )
        name = volume.name.encode()
        struct.pack_into("<IQQH", block, 68, 4096, volume.size_bytes, 5, len(name))
        block[90 : 90 + len(name)] = name
        summed(block, 64)
        path = segment_file(self.directory, number)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(block)
        return number

    def write(self, number: int, offset_bytes: int, data: bytes) -> None:
        with segment_file(self.directory, number).open("r+b") as file:
            file.seek(offset_bytes)
            file.write(data)

    def close(self) -> None:
        self.catalog.close()


class VolumeWriter:
    """A volume: its log, its map as a plain dict, its checkpoints."""

    def __init__(self, pool: PoolWriter, name: str, uuid: UUID, size_bytes: int) -> None:
        self.pool = pool
        self.name = name
        self.uuid = uuid
        self.size_bytes = size_bytes
        self.epoch = pool.catalog.next_epoch(uuid)
        self.segments: list[LogSegment] = []
        self.map_rows: dict[int, SegmentRow] = {}
        self.mapping: dict[int, tuple[int, int]] = {}
        self.sequence = 0
        self.checksum = 0

    def reopen(self) -> None:
        """A new epoch: what is open is sealed, and never written again."""
        self.seal()
        self.epoch = self.pool.catalog.next_epoch(self.uuid)

    def append(self, entries: list[tuple[int, int, bool]]) -> Written:
        """One record with random data."""
        data_blocks = sum(count for _, count, is_data in entries if is_data)
        # The footer's place: its body is no longer than this, and the trailer.
        reserve = 2 + (sum(len(s.records) for s in self.segments[-1:]) * 64 + 8192) // BLOCK
        blocks = self.pool.segment_bytes // BLOCK
        last = self.segments[-1] if self.segments else None
        if last is None or last.sealed or last.end + 1 + data_blocks + reserve > blocks:
            self.seal()
            last = LogSegment(self.pool.make_segment(self, 1), self.epoch)
            self.segments.append(last)
        data = [self.pool.random.randbytes(BLOCK) for _ in range(data_blocks)]
        checksums = [crc32c(block) for block in data]
        block = bytearray(BLOCK)
        struct.pack_into(
            "<4sHH16s16sQQQIIII",
            block,
            0,
            b"VHRC",
            1,
            0,
            self.pool.uuid.bytes,
            self.uuid.bytes,
            self.epoch,
            self.sequence + 1,
            last.number,
            last.end,
            data_blocks,
            len(entries),
            self.checksum,
        )
        struct.pack_into("<Q", block, 88, 7)
        for index, (first, count, is_data) in enumerate(entries):
            struct.pack_into("<QIB", block, 128 + 16 * index, first, count, 1 if is_data else 2)
        for index, checksum in enumerate(checksums):
            struct.pack_into("<I", block, BLOCK - 4 * (index + 1), checksum)
        header_checksum = summed(block, 80)
        record = Written(
            self.sequence + 1,
            last.number,
            last.end,
            entries,
            checksums,
            header_checksum,
            self.checksum,
        )
        self.pool.write(last.number, last.end * BLOCK, bytes(block) + b"".join(data))
        last.records.append(record)
        self.sequence += 1
        self.checksum = header_checksum
        self._apply(record)
        return record

    def _apply(self, record: Written) -> None:
        index = 0
        for first, count, is_data in record.entries:
            for block in range(first, first + count):
                if is_data:
                    address = record.segment << 13 | record.offset + 1 + index
                    self.mapping[block] = (address, record.checksums[index])
                    index += 1
                else:
                    self.mapping.pop(block, None)

    def seal(self) -> None:
        """Gives the last segment its footer."""
        if not self.segments or self.segments[-1].sealed or not self.segments[-1].records:
            return
        segment = self.segments[-1]
        body = b""
        for record in segment.records:
            body += struct.pack(
                "<QIIII",
                record.sequence,
                record.offset,
                len(record.checksums),
                len(record.entries),
                record.header_checksum,
            )
            for first, count, is_data in record.entries:
                body += struct.pack("<QIB3x", first, count, 1 if is_data else 2)
            body += struct.pack(f"<{len(record.checksums)}I", *record.checksums)
        padded = body + bytes(-len(body) % BLOCK)
        at = self.pool.segment_bytes - BLOCK - len(padded)
        assert segment.end * BLOCK <= at
        block = bytearray(BLOCK)
        struct.pack_into(
            "<4sHH16s16sQQQQIIIIIII",
            block,
            0,
            b"VHFT",
            1,
            0,
            self.pool.uuid.bytes,
            self.uuid.bytes,
            segment.number,
            segment.epoch,
            segment.records[0].sequence,
            segment.records[-1].sequence,
            segment.records[0].previous,
            segment.records[-1].header_checksum,
            len(segment.records),
            segment.end,
            at,
            len(body),
            crc32c(body),
        )
        summed(block, 100)
        self.pool.write(segment.number, at, padded + bytes(block))
        segment.sealed = True

    def live(self, number: int) -> int:
        return sum(address >> 13 == number for address, _ in self.mapping.values())

    def checkpoint(self) -> None:
        """Writes the whole map anew, commits, and removes what is dead."""
        old_map = list(self.map_rows)
        self.map_rows = {}
        root = b""
        if self.mapping:
            number = self.pool.make_segment(self, 2)
            nodes, root, live = write_nodes(self.mapping, number, BLOCK, self.pool.random)
            assert BLOCK + len(nodes) <= self.pool.segment_bytes
            self.pool.write(number, BLOCK, nodes + bytes(-len(nodes) % BLOCK))
            self.map_rows[number] = {
                "number": number,
                "kind": 2,
                "sealed": True,
                "used_blocks": 1 + -(-len(nodes) // BLOCK),
                "live": live,
                "dead": b"",
                "punched_blocks": 0,
                "notes": 0,
                "unmaps": 0,
            }
        last = self.segments[-1]
        dead = [s for s in self.segments[:-1] if s.sealed and not self.live(s.number)]
        self.segments = [s for s in self.segments if s not in dead]
        rows: list[SegmentRow] = [
            {
                "number": s.number,
                "kind": 1,
                "sealed": s.sealed,
                "used_blocks": s.end,
                "live": self.live(s.number),
                "dead": b"",
                "punched_blocks": 0,
                "notes": 0,
                "unmaps": 0,
            }
            for s in self.segments
        ]
        removed = [s.number for s in dead] + old_map
        self.pool.catalog.commit_checkpoint(
            self.uuid,
            self.epoch,
            {
                "id": 1,
                "state": {
                    "root": root,
                    "segment": last.number,
                    "end_block": last.end,
                    "sequence": self.sequence,
                    "record_checksum": self.checksum,
                },
                "mapped_blocks": len(self.mapping),
                "snapshots": [],
                "changed": [*rows, *self.map_rows.values()],
                "removed": removed,
            },
        )
        for number in removed:
            segment_file(self.pool.directory, number).unlink()

    def churn(self, records: int, *, span_blocks: int = 4096, leave: int = 0) -> None:
        """Random writes and discards; `leave` blocks at the volume's begin are not touched."""
        random = self.pool.random
        for _ in range(records):
            entries = []
            for _ in range(random.randint(1, 5)):
                count = random.choice((1, 1, 1, 2, 3, 8))
                first = random.randrange(leave, span_blocks - count)
                entries.append((first, count, random.random() < 0.85))
            self.append(entries)
