"""A second writer of the on-disk format, from `docs/format.md` alone: makes pools for the reader.

It knows neither the engine nor the reader under test, and takes its checksums from another library
(crcmod). Small and slow; for tests only. Everything random comes from the `random.Random` given.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from uuid import UUID

import crcmod.predefined

from tests.unit.storage.catalogwriter import CatalogWriter
from tests.unit.storage.nodewriter import Known, write_nodes

BLOCK = 4096
DATA, UNMAP, NOTE = 1, 2, 3
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
    """One record as it was written. entries: (block, count, kind)."""

    sequence: int
    segment: int
    offset: int
    entries: list[tuple[int, int, int]]
    checksums: list[int]
    header_checksum: int
    previous: int

    @property
    def end(self) -> int:
        return self.offset + 1 + len(self.checksums)

    @property
    def offsets(self) -> list[int]:
        """The positions of the entries, as offsets in the segment."""
        found, at = [], self.offset + 1
        for _, count, kind in self.entries:
            found.append(at)
            at += 0 if kind == UNMAP else count
        return found


@dataclass
class LogSegment:
    number: int
    epoch: int
    records: list[Written] = field(default_factory=list)
    sealed: bool = False

    @property
    def end(self) -> int:
        return self.records[-1].end if self.records else 1

    def note_kind(self, record: Written, offset: int, pool: PoolWriter) -> int:
        """The type of the note at `offset`; 0: it is none."""
        with segment_file(pool.directory, self.number).open("rb") as file:
            file.seek(offset * BLOCK)
            header = file.read(8)
        is_note = any(
            kind == NOTE and at == offset
            for (_, _, kind), at in zip(record.entries, record.offsets, strict=True)
        )
        found: int = struct.unpack("<4sHH", header)[2] if is_note else 0
        return found


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
        self.catalog = CatalogWriter(
            directory,
            uuid=self.uuid,
            name="fast",
            segment_bytes=segment_bytes,
            device=self.device,
        )

    def volume(self, name: str, size_bytes: int = 64 << 20) -> VolumeWriter:
        uuid = UUID(bytes=self.random.randbytes(16))
        self.catalog.add_volume(uuid, name, size_bytes, None)
        return VolumeWriter(self, name, uuid, size_bytes)

    def clone(self, snapshot: Snapshot, name: str) -> VolumeWriter:
        """A volume that begins with a snapshot that has a root."""
        uuid = UUID(bytes=self.random.randbytes(16))
        self.catalog.add_volume(uuid, name, snapshot.size_bytes, snapshot.uuid)
        clone = VolumeWriter(self, name, uuid, snapshot.size_bytes)
        clone.origin = snapshot
        clone.mapping = dict(snapshot.mapping)
        clone.known = dict(snapshot.volume.known)
        mapped_blocks = len(snapshot.mapping)
        point = (snapshot.root, 0, 0, 0, 0, mapped_blocks, clone.epoch, 5)
        self.catalog.commit(uuid, point, [], [])
        clone.note_state()
        return clone

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


@dataclass
class Snapshot:
    """A snapshot. name: None once it is being removed. root: None until a checkpoint wrote it."""

    volume: VolumeWriter
    uuid: UUID
    name: str | None
    position: int
    size_bytes: int
    mapping: dict[int, tuple[int, int]]
    parent: Snapshot | None
    state: str = "pending"
    root: bytes | None = None
    reached: set[bytes] = field(default_factory=set)


@dataclass
class MapRow:
    """A map segment. nodes: offset and length of all that were written."""

    used_blocks: int
    nodes: list[tuple[int, int]]
    live: int = 0


class VolumeWriter:
    """A volume: its log, its maps as plain dicts, its snapshots, its checkpoints."""

    def __init__(self, pool: PoolWriter, name: str, uuid: UUID, size_bytes: int) -> None:
        self.pool = pool
        self.name = name
        self.uuid = uuid
        self.size_bytes = size_bytes
        self.epoch = pool.catalog.next_epoch(uuid)
        self.segments: list[LogSegment] = []
        self.map_rows: dict[int, MapRow] = {}
        self.mapping: dict[int, tuple[int, int]] = {}
        self.root = b""
        self.reached: set[bytes] = set()
        self.known: Known = {}
        self.snapshots: list[Snapshot] = []
        self.parent: Snapshot | None = None
        self.origin: Snapshot | None = None
        self.rollbacks: list[tuple[int, int]] = []
        self.sequence = 0
        self.checksum = 0

    def reopen(self) -> None:
        """A new epoch: what is open is sealed, and never written again."""
        self.seal()
        self.epoch = self.pool.catalog.next_epoch(self.uuid)

    # The log

    def append(
        self,
        entries: Sequence[tuple[int, int, bool]],
        notes: Sequence[bytes] = (),
        *,
        durable: int = 0,
    ) -> Written:
        """One record with random data (block, count, is_data), and notes behind it. durable: what
        it says of the log."""
        kinds = [(first, count, DATA if is_data else UNMAP) for first, count, is_data in entries]
        padded = [note + bytes(-len(note) % BLOCK) for note in notes]
        kinds += [(0, len(note) // BLOCK, NOTE) for note in padded]
        data = [
            self.pool.random.randbytes(BLOCK)
            for _, count, kind in kinds
            if kind == DATA
            for _ in range(count)
        ]
        data += [n[at : at + BLOCK] for n in padded for at in range(0, len(n), BLOCK)]
        # The footer's place: its body is no longer than this, and the trailer.
        reserve = 2 + (sum(len(s.records) for s in self.segments[-1:]) * 64 + 8192) // BLOCK
        blocks = self.pool.segment_bytes // BLOCK
        last = self.segments[-1] if self.segments else None
        if last is None or last.sealed or last.end + 1 + len(data) + reserve > blocks:
            self.seal()
            last = LogSegment(self.pool.make_segment(self, 1), self.epoch)
            self.segments.append(last)
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
            len(data),
            len(kinds),
            self.checksum,
        )
        struct.pack_into("<QQ", block, 88, 7, durable)
        for index, (first, count, kind) in enumerate(kinds):
            struct.pack_into("<QIB", block, 128 + 16 * index, first, count, kind)
        for index, checksum in enumerate(checksums):
            struct.pack_into("<I", block, BLOCK - 4 * (index + 1), checksum)
        header_checksum = summed(block, 80)
        record = Written(
            self.sequence + 1,
            last.number,
            last.end,
            kinds,
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
        for (first, count, kind), offset in zip(record.entries, record.offsets, strict=True):
            for index in range(count):
                if kind == DATA:
                    address = record.segment << 13 | offset + index
                    checksum = record.checksums[offset - record.offset - 1 + index]
                    self.mapping[first + index] = (address, checksum)
                elif kind == UNMAP:
                    self.mapping.pop(first + index, None)

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
            for entry in record.entries:
                body += struct.pack("<QIB3x", *entry)
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

    # Notes, snapshots, rollbacks

    def snapshot(self, name: str) -> Snapshot:
        """Takes a snapshot; `checkpoint` gives it its root."""
        uuid = UUID(bytes=self.pool.random.randbytes(16))
        encoded = name.encode()
        payload = struct.pack("<16sQQH", uuid.bytes, 9, self.size_bytes, len(encoded)) + encoded
        mapping = dict(self.mapping)
        record = self.append([], [note(1, payload)])
        position = record.segment << 13 | record.offset + 1
        snapshot = Snapshot(self, uuid, name, position, self.size_bytes, mapping, self.parent)
        self.snapshots.append(snapshot)
        self.parent = snapshot
        self._write_rows()
        return snapshot

    def state(self) -> dict[str, object]:
        origin = self.origin
        return {
            "version": 1,
            "volume": {
                "name": self.name,
                "size_bytes": self.size_bytes,
                "logical_block_bytes": 4096,
                "serial": self.uuid.hex[:20],
                "created_ns": 5,
            },
            "origin": origin
            and {
                "volume": str(origin.volume.uuid),
                "snapshot": str(origin.uuid),
                "position": origin.position,
            },
            "snapshots": [
                {
                    "uuid": str(s.uuid),
                    "guid": str(s.uuid),
                    "name": s.name,
                    "position": s.position,
                    "size_bytes": s.size_bytes,
                    "created_ns": 9,
                    "protected": False,
                }
                for s in self.snapshots
                if s.name is not None
            ],
            "rollbacks": [{"position": at, "to": to} for at, to in self.rollbacks],
        }

    def note_state(self) -> Written:
        """In one part, or in two."""
        payload = json.dumps(self.state()).encode()
        if self.pool.random.random() < 0.5:
            return self.append([], [note(2, payload)])
        cut = self.pool.random.randrange(1, len(payload))
        self.append([(16000, 1, False)], [note(2, payload[:cut], 0, 1)])
        return self.append([], [note(2, payload[cut:], 1, 0)])

    def note_unmaps(self, unmaps: Sequence[tuple[int, int, int]]) -> Written:
        """Each (block, count, position)."""
        payload = struct.pack("<II", len(unmaps), 0)
        payload += b"".join(struct.pack("<QIIQ", b, c, 0, at) for b, c, at in unmaps)
        return self.append([], [note(3, payload)])

    def remove(self, snapshot: Snapshot, *, begin_only: bool = False) -> None:
        """Begins a removal, and finishes it with the next checkpoint."""
        snapshot.state, snapshot.name = "removing", None
        if self.parent is snapshot:
            self.parent = snapshot.parent
        if not begin_only:
            for other in self.snapshots:
                if other.parent is snapshot:
                    other.parent = snapshot.parent
            self.snapshots.remove(snapshot)
        self._write_rows()
        self.note_state()

    def rollback(self, snapshot: Snapshot) -> Snapshot:
        """The head becomes the snapshot; what it was goes as a snapshot that is being removed."""
        self.checkpoint()
        old = Snapshot(
            self,
            UUID(bytes=self.pool.random.randbytes(16)),
            None,
            self.segments[-1].number << 13 | self.segments[-1].end,
            self.size_bytes,
            dict(self.mapping),
            self.parent,
            "removing",
            self.root,
            self.reached,
        )
        self.snapshots.append(old)
        self.mapping, self.parent = dict(snapshot.mapping), snapshot
        self.reopen()
        # The new line begins in a new segment.
        last = self.segments[-1]
        self.rollbacks.append((last.number << 13 | last.end, snapshot.position))
        self._write_rows()
        self.note_state()
        self.checkpoint()
        return old

    def _write_rows(self) -> None:
        """Snapshots, rollbacks and the head's parent, as they are."""
        catalog = self.pool.catalog
        volume = catalog.identity("volumes", self.uuid)
        catalog.db.execute("BEGIN")
        kept = {row[0] for row in catalog.db.execute("SELECT origin FROM volumes")}
        known = {
            UUID(bytes=row[1]): row[0]
            for row in catalog.db.execute(
                "SELECT id, uuid FROM snapshots WHERE volume = ?", (volume,)
            )
        }
        assert not kept & {known[u] for u in known.keys() - {s.uuid for s in self.snapshots}}
        catalog.db.execute("DELETE FROM snapshots WHERE volume = ?", (volume,))
        catalog.db.execute("DELETE FROM rollbacks WHERE volume = ?", (volume,))
        for s in self.snapshots:
            catalog.insert(
                "snapshots",
                known.get(s.uuid),
                s.uuid.bytes,
                volume,
                s.name,
                s.uuid.bytes,
                s.parent and catalog.identity("snapshots", s.parent.uuid),
                s.position,
                s.size_bytes,
                s.state,
                s.root,
                len(s.mapping) if s.root is not None else 0,
                0,
                0,
                9,
            )
        for at, to in self.rollbacks:
            catalog.insert("rollbacks", volume, at, to)
        parent = self.parent and catalog.identity("snapshots", self.parent.uuid)
        catalog.db.execute("UPDATE volumes SET parent = ? WHERE id = ?", (parent, volume))
        catalog.db.execute("COMMIT")

    # Checkpoints

    def live_blocks(self) -> set[int]:
        """Addresses that the head or a snapshot has."""
        trees = [self.mapping, *(s.mapping for s in self.snapshots)]
        return {address for tree in trees for address, _ in tree.values()}

    def data_blocks(self, segment: LogSegment) -> set[int]:
        return {
            segment.number << 13 | offset + index
            for record in segment.records
            for (_, count, kind), offset in zip(record.entries, record.offsets, strict=True)
            if kind == DATA
            for index in range(count)
        }

    def log_row(self, segment: LogSegment, live: set[int]) -> tuple[object, ...]:
        data = self.data_blocks(segment)
        dead = 0
        for address in data - live:
            dead |= 1 << (address & 8191)
        kinds = [
            (kind, count, segment.note_kind(record, offset, self.pool))
            for record in segment.records
            for (_, count, kind), offset in zip(record.entries, record.offsets, strict=True)
        ]
        notes = sum(count for kind, count, what in kinds if kind == NOTE and what in (1, 2))
        unmaps = sum(kind == UNMAP or what == 3 for kind, _, what in kinds)
        return (
            segment.number,
            1,
            int(segment.sealed),
            segment.end,
            len(data & live),
            dead.to_bytes((dead.bit_length() + 7) // 8, "little"),
            0,
            notes,
            unmaps,
        )

    def checkpoint(self) -> None:
        """Writes what is new of all maps, commits, and removes what is dead."""
        number = 0
        nodes = b""
        for s in self.snapshots:
            if s.state == "pending":
                number, nodes = self._write_tree(number, nodes, s.mapping)
                s.root, s.reached, s.state = self.root, self.reached, "present"
        number, nodes = self._write_tree(number, nodes, self.mapping)
        if number:
            assert BLOCK + len(nodes) <= self.pool.segment_bytes
            self.pool.write(number, BLOCK, nodes + bytes(-len(nodes) % BLOCK))
            self.map_rows[number].used_blocks = 1 + -(-len(nodes) // BLOCK)
        reached = self.reached.union(*(s.reached for s in self.snapshots))
        rows: list[tuple[object, ...]] = []
        removed = []
        for segment, row in list(self.map_rows.items()):
            live, dead = _split_nodes(segment, row.nodes, reached)
            row.live = live
            if live == 0:
                removed.append(segment)
                del self.map_rows[segment]
                continue
            rows.append((segment, 2, 1, row.used_blocks, live, dead, 0, 0, 0))
        on_disk = reached
        self.known = {key: loc for key, loc in self.known.items() if loc in on_disk}
        held = self.live_blocks()
        last = self.segments[-1]
        kept = []
        for log in self.segments:
            log_row = self.log_row(log, held)
            if log_row[4] == 0 and log is not last and log.sealed and not any(log_row[7:]):
                removed.append(log.number)
            else:
                rows.append(log_row)
                kept.append(log)
        self.segments = kept
        point = (
            self.root,
            last.number,
            last.end,
            self.sequence,
            self.checksum,
            len(self.mapping),
            self.epoch,
            5,
        )
        self._write_rows()
        self.pool.catalog.commit(self.uuid, point, rows, removed)
        for segment in removed:
            segment_file(self.pool.directory, segment).unlink(missing_ok=True)

    def _write_tree(
        self, number: int, nodes: bytes, mapping: dict[int, tuple[int, int]]
    ) -> tuple[int, bytes]:
        """Adds to `nodes` of map segment `number` (0: none yet), and sets `root` and `reached`."""
        if not mapping:
            self.root, self.reached = b"", set()
            return number, nodes
        target = number or self.pool.next_segment
        at = BLOCK + len(nodes)
        new, self.root, self.reached = write_nodes(
            mapping, target, at, self.pool.random, self.known
        )
        if new and not number:
            assert self.pool.make_segment(self, 2) == target
            self.map_rows[target] = MapRow(0, [])
            number = target
        if new:
            row = self.map_rows[number]
            while at < BLOCK + len(nodes) + len(new):
                start = at - BLOCK - len(nodes)
                length = struct.unpack_from("<I", new, start + 16)[0]
                row.nodes.append((at, length))
                at += length
        return number, nodes + new

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


def note(kind: int, payload: bytes, part: int = 0, more: int = 0) -> bytes:
    return struct.pack("<4sHHIHH", b"VHNT", 1, kind, len(payload), part, more) + payload


def _split_nodes(
    segment: int, nodes: list[tuple[int, int]], reached: set[bytes]
) -> tuple[int, bytes]:
    """Live bytes, and the ranges of what is dead."""
    offsets = {
        struct.unpack_from("<I", location, 8)[0]
        for location in reached
        if struct.unpack_from("<Q", location)[0] == segment
    }
    live = 0
    ranges: list[list[int]] = []
    for at, length in nodes:
        if at in offsets:
            live += length
        elif ranges and sum(ranges[-1]) == at:
            ranges[-1][1] += length
        else:
            ranges.append([at, length])
    return live, b"".join(struct.pack("<II", *found) for found in ranges)
