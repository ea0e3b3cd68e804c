"""Bytes of log segments: the header that all segments have, records, the footer.

Written from `docs/format.md` and nothing else, so that a defect of the writer is found, not
repeated. Parsing has no effects, accepts any bytes, and raises nothing but `FormatError`; what
belongs *where* (this pool, this segment, the chain of records) is the caller's to compare.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

from vhostd.storage.format.device import check_segment_bytes
from vhostd.storage.format.errors import FormatError, Place
from vhostd.storage.format.fields import (
    BLOCK_BYTES,
    MAX_SEGMENT_BLOCKS,
    MAX_SEGMENT_NUMBER,
    MAX_VOLUME_BLOCKS,
    Bytes,
    check_magic,
    check_range,
    check_sum,
    crc32c,
    decode_text,
)

__all__ = [
    "ENTRY_DATA",
    "ENTRY_NOTE",
    "ENTRY_UNMAP",
    "KIND_LOG",
    "KIND_MAP",
    "MAX_DATA_BLOCKS",
    "MAX_ENTRIES",
    "Entry",
    "Record",
    "SegmentHeader",
    "Summary",
    "Trailer",
    "parse_footer_body",
    "parse_record",
    "parse_segment_header",
    "parse_trailer",
]

KIND_LOG = 1
KIND_MAP = 2
ENTRY_DATA = 1
ENTRY_UNMAP = 2
ENTRY_NOTE = 3
MAX_DATA_BLOCKS = 960
MAX_ENTRIES = 248

_HEADER = struct.Struct("<4sHBB16s16sQQQIIQQH")
_RECORD = struct.Struct("<4sHH16s16sQQQIIIIIIQQ")
_ENTRY = struct.Struct("<QIB3x")
_TRAILER = struct.Struct("<4sHH16s16sQQQQIIIIIIII")
_SUMMARY = struct.Struct("<QIIII")
_ENTRIES_OFFSET = 128
_HEADER_CHECKSUM_OFFSET = 64
_RECORD_CHECKSUM_OFFSET = 80
_TRAILER_CHECKSUM_OFFSET = 100


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Block 0 of a segment."""

    kind: int
    pool: UUID
    volume: UUID
    number: int
    epoch: int
    segment_bytes: int
    logical_block_bytes: int
    size_bytes: int
    created_ns: int
    name: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One guest write (data) or discard (unmap) of `count` blocks from `block` of the volume, or a
    note of `count` blocks."""

    block: int
    count: int
    kind: int

    @property
    def is_data(self) -> bool:
        return self.kind == ENTRY_DATA

    @property
    def is_unmap(self) -> bool:
        return self.kind == ENTRY_UNMAP

    @property
    def data_blocks(self) -> int:
        """Blocks that follow the record's header for it."""
        return 0 if self.kind == ENTRY_UNMAP else self.count


@dataclass(frozen=True, slots=True)
class Summary:
    """What a record holds, whether its header or a footer told it.

    offset_blocks: of the record's header in the segment. checksums: little-endian u32, first data
    block first. header_checksum: of the record's header.
    """

    sequence: int
    offset_blocks: int
    data_blocks: int
    entries: tuple[Entry, ...]
    header_checksum: int
    checksums: bytes

    @property
    def end_blocks(self) -> int:
        """The block behind the record."""
        return self.offset_blocks + 1 + self.data_blocks

    @property
    def guest_blocks(self) -> int:
        """Blocks of data, without those of notes."""
        return sum(entry.count for entry in self.entries if entry.is_data)

    def pieces(self) -> Iterator[tuple[Entry, int, bytes]]:
        """Entries with the offset of their position (`docs/format.md`, "Record") in the segment,
        blocks, and the checksums of their data."""
        data_index = 0
        for entry in self.entries:
            end = data_index + entry.data_blocks
            yield (
                entry,
                self.offset_blocks + 1 + data_index,
                self.checksums[4 * data_index : 4 * end],
            )
            data_index = end

    def data_pieces(self) -> Iterator[tuple[int, int, int, bytes]]:
        """The data: (first block of the volume, block offset in the segment, count, checksums)."""
        for entry, offset, checksums in self.pieces():
            if entry.kind == ENTRY_DATA:
                yield entry.block, offset, entry.count, checksums

    def note_pieces(self) -> Iterator[tuple[int, int, bytes]]:
        """The notes: (block offset in the segment, count, checksums)."""
        for entry, offset, checksums in self.pieces():
            if entry.kind == ENTRY_NOTE:
                yield offset, entry.count, checksums


@dataclass(frozen=True, slots=True)
class Record:
    """A record's header block."""

    pool: UUID
    volume: UUID
    epoch: int
    segment: int
    previous_checksum: int
    opened_ns: int
    durable_sequence: int
    summary: Summary


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last block of a sealed segment."""

    pool: UUID
    volume: UUID
    segment: int
    epoch: int
    first_sequence: int
    last_sequence: int
    first_previous_checksum: int
    last_header_checksum: int
    records: int
    end_blocks: int
    body_offset_bytes: int
    body_bytes: int
    body_checksum: int


def parse_segment_header(data: Bytes, place: Place) -> SegmentHeader:
    """Reads a segment's block 0.

    Raises:
        FormatError: it is none, or a damaged one.
    """
    what = "segment header"
    data = _one_block(what, data, place)
    (
        magic,
        version,
        kind,
        _,
        pool,
        volume,
        number,
        epoch,
        segment_bytes,
        checksum,
        logical_block_bytes,
        size_bytes,
        created_ns,
        name_length,
    ) = _HEADER.unpack_from(data)
    check_magic(what, place, magic, b"VHSG", version)
    check_sum(what, place, data, _HEADER_CHECKSUM_OFFSET, checksum)
    if kind not in (KIND_LOG, KIND_MAP):
        raise FormatError(what, "kind", place, f"{kind} is not known")
    check_range(what, place, "segment number", number, 1, MAX_SEGMENT_NUMBER)
    check_segment_bytes(what, place, segment_bytes)
    if logical_block_bytes not in (512, 4096):
        raise FormatError(
            what, "logical block size", place, f"it is {logical_block_bytes}, not 512 or 4096"
        )
    check_range(what, place, "size", size_bytes, 0, MAX_VOLUME_BLOCKS * BLOCK_BYTES)
    name = decode_text(what, place, "name", data, _HEADER.size, name_length)
    return SegmentHeader(
        kind,
        UUID(bytes=pool),
        UUID(bytes=volume),
        number,
        epoch,
        segment_bytes,
        logical_block_bytes,
        size_bytes,
        created_ns,
        name,
    )


def parse_record(data: Bytes, place: Place) -> Record:
    """Reads a record's header block; the data is not looked at.

    Raises:
        FormatError: it is none, or a damaged one.
    """
    what = "record"
    data = _one_block(what, data, place)
    (
        magic,
        version,
        flags,
        pool,
        volume,
        epoch,
        sequence,
        segment,
        offset_blocks,
        data_blocks,
        entry_count,
        previous_checksum,
        checksum,
        _,
        opened_ns,
        durable_sequence,
    ) = _RECORD.unpack_from(data)
    check_magic(what, place, magic, b"VHRC", version)
    check_sum(what, place, data, _RECORD_CHECKSUM_OFFSET, checksum)
    if flags != 0:
        raise FormatError(what, "flags", place, f"{flags:#x} are not known")
    check_range(what, place, "sequence number", sequence, 1, (1 << 64) - 1)
    check_range(what, place, "segment number", segment, 1, MAX_SEGMENT_NUMBER)
    _check_counts(what, place, offset_blocks, data_blocks, entry_count)
    if _ENTRIES_OFFSET + _ENTRY.size * entry_count + 4 * data_blocks > BLOCK_BYTES:
        raise FormatError(
            what,
            "entries",
            place,
            f"{entry_count} entries and {data_blocks} checksums do not fit in a block",
        )
    entries = _parse_entries(what, place, data, _ENTRIES_OFFSET, entry_count, data_blocks)
    checksums = array("I")
    checksums.frombytes(bytes(data[BLOCK_BYTES - 4 * data_blocks :]) if data_blocks else b"")
    # The last block's comes first.
    checksums.reverse()
    return Record(
        UUID(bytes=pool),
        UUID(bytes=volume),
        epoch,
        segment,
        previous_checksum,
        opened_ns,
        durable_sequence,
        Summary(sequence, offset_blocks, data_blocks, entries, checksum, checksums.tobytes()),
    )


def parse_trailer(data: Bytes, place: Place, segment_bytes: int) -> Trailer:
    """Reads the last block of a sealed segment of `segment_bytes`.

    Raises:
        FormatError: it is none, or a damaged one.
    """
    what = "footer trailer"
    data = _one_block(what, data, place)
    (
        magic,
        version,
        _,
        pool,
        volume,
        segment,
        epoch,
        first_sequence,
        last_sequence,
        first_previous_checksum,
        last_header_checksum,
        records,
        end_blocks,
        body_offset_bytes,
        body_bytes,
        body_checksum,
        checksum,
    ) = _TRAILER.unpack_from(data)
    check_magic(what, place, magic, b"VHFT", version)
    check_sum(what, place, data, _TRAILER_CHECKSUM_OFFSET, checksum)
    check_range(what, place, "segment number", segment, 1, MAX_SEGMENT_NUMBER)
    check_range(what, place, "first sequence number", first_sequence, 1, (1 << 64) - 1)
    check_range(what, place, "records", records, 1, MAX_SEGMENT_BLOCKS)
    # Between them some may be missing, which recovery found damaged.
    if last_sequence - first_sequence + 1 < records:
        raise FormatError(
            what,
            "records",
            place,
            f"{records} records are not sequence {first_sequence} to {last_sequence}",
        )
    padded_bytes = -(-body_bytes // BLOCK_BYTES) * BLOCK_BYTES
    if body_offset_bytes + padded_bytes != segment_bytes - BLOCK_BYTES:
        raise FormatError(
            what,
            "offset of the body",
            place,
            f"{body_bytes} bytes at {body_offset_bytes} do not end at the trailer",
        )
    if end_blocks * BLOCK_BYTES > body_offset_bytes:
        raise FormatError(
            what,
            "end of the last record",
            place,
            f"block {end_blocks} is behind the body's begin at {body_offset_bytes}",
        )
    return Trailer(
        UUID(bytes=pool),
        UUID(bytes=volume),
        segment,
        epoch,
        first_sequence,
        last_sequence,
        first_previous_checksum,
        last_header_checksum,
        records,
        end_blocks,
        body_offset_bytes,
        body_bytes,
        body_checksum,
    )


def parse_footer_body(data: Bytes, place: Place, trailer: Trailer) -> list[Summary]:
    """Reads the summaries that `trailer` announces out of the body, padding included.

    Raises:
        FormatError: they are damaged, or not what the trailer announces.
    """
    what = "footer body"
    body = bytes(data[: trailer.body_bytes])
    if len(body) != trailer.body_bytes:
        raise FormatError(what, "length", place, f"{len(body)} bytes of {trailer.body_bytes}")
    computed = crc32c(body)
    if computed != trailer.body_checksum:
        raise FormatError(
            what,
            "checksum",
            place,
            f"the trailer has {trailer.body_checksum:#010x}, and the bytes have {computed:#010x}",
        )
    summaries: list[Summary] = []
    at = 0
    end_blocks = 1
    lowest = trailer.first_sequence
    for number in range(trailer.records):
        here = Place(place.file, place.offset_bytes + at)
        summary, at = _parse_summary(what, here, body, at)
        sequence = summary.sequence
        if not lowest <= sequence <= (trailer.last_sequence if number else lowest):
            raise FormatError(what, "sequence number", here, f"it is {sequence}, not {lowest}")
        if summary.offset_blocks < end_blocks:
            raise FormatError(
                what,
                "offset of the record",
                here,
                f"block {summary.offset_blocks} does not follow on the record that ends at "
                f"{end_blocks}",
            )
        end_blocks = summary.end_blocks
        lowest = sequence + 1
        summaries.append(summary)
    if at != len(body):
        raise FormatError(what, "length", place, f"{len(body) - at} bytes are left over")
    if end_blocks != trailer.end_blocks:
        raise FormatError(
            what,
            "end of the last record",
            place,
            f"it is block {end_blocks}, and the trailer has {trailer.end_blocks}",
        )
    if summaries[-1].header_checksum != trailer.last_header_checksum:
        raise FormatError(
            what, "checksum of the last record's header", place, "the trailer has another"
        )
    return summaries


def _parse_summary(what: str, place: Place, body: bytes, at: int) -> tuple[Summary, int]:
    if at + _SUMMARY.size > len(body):
        raise FormatError(what, "length", place, "it ends before the last record")
    sequence, offset_blocks, data_blocks, entry_count, checksum = _SUMMARY.unpack_from(body, at)
    _check_counts(what, place, offset_blocks, data_blocks, entry_count)
    entries_at = at + _SUMMARY.size
    checksums_at = entries_at + _ENTRY.size * entry_count
    end = checksums_at + 4 * data_blocks
    if end > len(body):
        raise FormatError(what, "length", place, "it ends before the last record")
    entries = _parse_entries(what, place, body, entries_at, entry_count, data_blocks)
    summary = Summary(
        sequence, offset_blocks, data_blocks, entries, checksum, body[checksums_at:end]
    )
    return summary, end


def _check_counts(
    what: str, place: Place, offset_blocks: int, data_blocks: int, entry_count: int
) -> None:
    check_range(what, place, "offset of the record", offset_blocks, 1, MAX_SEGMENT_BLOCKS - 1)
    check_range(what, place, "data_blocks", data_blocks, 0, MAX_DATA_BLOCKS)
    check_range(what, place, "entries", entry_count, 1, MAX_ENTRIES)


def _parse_entries(
    what: str, place: Place, data: Bytes, offset: int, count: int, data_blocks: int
) -> tuple[Entry, ...]:
    entries = []
    described_blocks = 0
    for index in range(count):
        block, blocks, kind = _ENTRY.unpack_from(data, offset + _ENTRY.size * index)
        field = f"entry {index}"
        if kind not in (ENTRY_DATA, ENTRY_UNMAP, ENTRY_NOTE):
            raise FormatError(what, field, place, f"kind {kind} is not known")
        if kind == ENTRY_NOTE and block != 0:
            raise FormatError(what, field, place, f"a note of block {block} of the volume")
        if blocks == 0 or block + blocks > MAX_VOLUME_BLOCKS:
            raise FormatError(
                what, field, place, f"{blocks} blocks from block {block} are no part of a volume"
            )
        entry = Entry(block, blocks, kind)
        described_blocks += entry.data_blocks
        entries.append(entry)
    if described_blocks != data_blocks:
        raise FormatError(
            what,
            "data_blocks",
            place,
            f"the entries describe {described_blocks} blocks, and the record has {data_blocks}",
        )
    return tuple(entries)


def _one_block(what: str, data: Bytes, place: Place) -> Bytes:
    if len(data) < BLOCK_BYTES:
        raise FormatError(what, "length", place, f"{len(data)} bytes of {BLOCK_BYTES}")
    return data[:BLOCK_BYTES]
