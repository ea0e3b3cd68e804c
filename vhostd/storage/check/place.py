"""Does a structure belong where it was read from? Raises `FormatError`, as parsing does.

Pure but for `check_header`, which reads the block and makes a finding of the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from vhostd.storage.check.files import SegmentFile
from vhostd.storage.check.report import Findings
from vhostd.storage.format import (
    BLOCK_BYTES,
    FormatError,
    Place,
    Record,
    SegmentHeader,
    Summary,
    Trailer,
    crc32c,
    parse_segment_header,
)

__all__ = [
    "REBUILD",
    "REPORT",
    "RESTORE",
    "VolumeIdentity",
    "check_chain",
    "check_contents",
    "check_header",
    "check_record",
    "check_summary",
    "check_trailer",
]

RESTORE = "restore what is concerned from a backup"
REBUILD = (
    "close the pool and run `vhostctl check --repair`: the log has all that maps and counts are "
    "made of"
)
REPORT = "report this with the log: the accounting of space is wrong"


@dataclass(frozen=True, slots=True)
class VolumeIdentity:
    """What every structure of a volume has to name. epoch: the newest. pool: None if unknown."""

    pool: UUID | None
    volume: UUID
    epoch: int
    segment_bytes: int


def check_header(
    file: SegmentFile,
    identity: VolumeIdentity,
    kind: int,
    findings: Findings,
    action: str = RESTORE,
) -> SegmentHeader | None:
    """A segment's header, if it is what belongs there; else a finding."""
    place = Place(file.path)
    try:
        header = parse_segment_header(file.read_blocks(0), place)
        _compare(
            "segment header",
            place,
            ("pool", header.pool, identity.pool or header.pool),
            ("volume", header.volume, identity.volume),
            ("segment number", header.number, file.number),
            ("kind", header.kind, kind),
            ("segment_bytes", header.segment_bytes, identity.segment_bytes),
            ("epoch", header.epoch, min(max(header.epoch, 1), identity.epoch)),
        )
    except FormatError as error:
        findings.add(
            "error",
            "segment-header",
            f"segment {file.number}: {error.brief}",
            "use the vhostd that made it, or a newer one" if error.newer else action,
            file=file.path,
            segment=file.number,
            offset_bytes=0,
        )
        return None
    return header


def check_trailer(
    identity: VolumeIdentity, number: int, epoch: int, trailer: Trailer, place: Place
) -> None:
    """The footer is this segment's. epoch: 0 if the header is not readable."""
    _compare(
        "footer trailer",
        place,
        ("pool", trailer.pool, identity.pool or trailer.pool),
        ("volume", trailer.volume, identity.volume),
        ("segment number", trailer.segment, number),
        ("epoch", trailer.epoch, epoch or trailer.epoch),
    )


def check_record(
    identity: VolumeIdentity,
    number: int,
    epoch: int,
    record: Record,
    offset_blocks: int,
    place: Place,
) -> None:
    """The record was written where it was read from. epoch: 0 if the segment's is not known."""
    _compare(
        "record",
        place,
        ("pool", record.pool, identity.pool or record.pool),
        ("volume", record.volume, identity.volume),
        ("epoch", record.epoch, epoch or record.epoch),
        ("segment number", record.segment, number),
        ("offset", record.summary.offset_blocks, offset_blocks),
    )
    if record.summary.end_blocks > identity.segment_bytes // BLOCK_BYTES:
        raise FormatError("record", "data_blocks", place, "it crosses the segment's end")


def check_chain(record: Record, sequence: int, previous_checksum: int, place: Place) -> None:
    """The record is the one that follows."""
    _compare("record", place, ("sequence number", record.summary.sequence, sequence))
    if record.previous_checksum != previous_checksum:
        raise FormatError(
            "record",
            "checksum of the previous record",
            place,
            f"it is {record.previous_checksum:#010x}, not {previous_checksum:#010x}",
        )


def check_summary(record: Record, summary: Summary, place: Place) -> None:
    """The footer repeats the record."""
    if record.summary != summary:
        raise FormatError("record", "header", place, "the footer has another")


def check_contents(summary: Summary, content: bytes, place: Place) -> None:
    """All of the record's data is there."""
    for index in range(summary.data_blocks):
        stored = int.from_bytes(summary.checksums[4 * index : 4 * index + 4], "little")
        if crc32c(content[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]) != stored:
            raise FormatError(
                "record", "checksums", place, f"data block {index} does not match its checksum"
            )


def _compare(what: str, place: Place, *fields: tuple[str, object, object]) -> None:
    """Each (name, found, wanted)."""
    for name, found, wanted in fields:
        if found != wanted:
            raise FormatError(what, name, place, f"it is {found}, not {wanted}")
