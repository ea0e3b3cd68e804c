"""Checks the log of one volume: headers, footers, records, their chain, data; and the map's view.

Segments are given in the order of their numbers and read once, one after another; what is kept
between them is the end of the chain, and of segments that disagree with the map a bounded number of
tables. One `LogCheck` a volume and a look at it; not shared between threads.

What must hold of a record depends on where it is:
- *covered* by the committed checkpoint, or listed by a footer: it was durable once. If it is not
  valid now, that is damage.
- behind the checkpoint in a segment without a footer: the log may just end there, as after a crash.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

from vhostd.storage.check.files import SegmentFile, SegmentFiles
from vhostd.storage.check.live import LiveBlocks, runs_of
from vhostd.storage.check.notes import NoteCheck
from vhostd.storage.check.place import (
    RESTORE,
    VolumeIdentity,
    check_chain,
    check_contents,
    check_header,
    check_record,
    check_summary,
    check_trailer,
)
from vhostd.storage.check.report import CheckSummary, Findings, Severity, VolumeReport
from vhostd.storage.check.space import LogCounts, compare_counts
from vhostd.storage.format import (
    BLOCK_BYTES,
    KIND_LOG,
    MAX_SEGMENT_BLOCKS,
    CatalogCheckpoint,
    CatalogSegment,
    FormatError,
    Place,
    Summary,
    Trailer,
    crc32c,
    is_zero,
    parse_footer_body,
    parse_record,
    parse_trailer,
)

__all__ = ["MAX_BAD_DATA", "BadData", "LogCheck", "Suspect"]

MAX_SUSPECTS = 64
MAX_BAD_DATA = 100_000
NO_CHECKPOINT = CatalogCheckpoint(b"", 0, 0, 0, 0, 0, 0)

REOPEN = "open the volume once: recovery ends the log there"


@dataclass(slots=True)
class Suspect:
    """A segment of which map and records do not say the same; what the records say.

    blocks, checksums: by block offset; `unknown` where no record has data.
    """

    unknown = (1 << 64) - 1
    blocks: array[int] = field(
        default_factory=lambda: array("Q", [Suspect.unknown]) * MAX_SEGMENT_BLOCKS
    )
    checksums: array[int] = field(default_factory=lambda: array("I", [0]) * MAX_SEGMENT_BLOCKS)


@dataclass(frozen=True, slots=True)
class BadData:
    """Blocks of live data that do not match their checksums. offset: in their segment, blocks."""

    file: str
    segment: int
    offset: int
    block: int
    count: int


@dataclass(slots=True)
class _Segment:
    """The segment that is being read.

    covered_blocks: the checkpoint covers the blocks before. live: what maps reach; seen: what of it
    records have. counts: what the catalog's row has to agree with. epoch: 0 while nothing readable
    has named it.
    """

    file: SegmentFile
    row: CatalogSegment | None
    covered_blocks: int
    live: LiveBlocks
    seen: LiveBlocks
    counts: LogCounts
    epoch: int = 0
    sealed: bool = False
    lost_records: bool = False
    end_blocks: int = 1
    summaries: list[Summary] = field(default_factory=list)

    @property
    def number(self) -> int:
        return self.file.number

    def covers(self, summary: Summary) -> bool:
        return summary.offset_blocks < self.covered_blocks

    def place(self, offset_blocks: int) -> Place:
        return Place(self.file.path, offset_blocks * BLOCK_BYTES)


class LogCheck:
    """One look at a volume's log."""

    def __init__(
        self,
        identity: VolumeIdentity,
        checkpoint: CatalogCheckpoint | None,
        live: Mapping[int, LiveBlocks],
        files: SegmentFiles,
        findings: Findings,
        report: VolumeReport,
        summary: CheckSummary,
        *,
        data: bool,
        in_use: bool,
        catalogued: bool = True,
        maps_whole: bool = True,
        removing_whole: bool = True,
    ) -> None:
        self.notes = NoteCheck(findings)
        self.bad_data: list[BadData] = []
        self._maps_whole = maps_whole
        self._removing_whole = removing_whole
        self._identity = identity
        self._checkpoint = checkpoint or NO_CHECKPOINT
        self._live = live
        self._files = files
        self._findings = findings
        self._report = report
        self._summary = summary
        self._data = data
        self._in_use = in_use
        self._catalogued = catalogued
        # The end of the chain so far: the last record's number and checksum, its segment's epoch.
        self._sequence = 0
        self._checksum = 0
        self._epoch = 0
        self._checkpoint_seen = self._checkpoint.sequence == 0
        self._ended = False
        self.suspects: dict[int, Suspect] = {}

    # The volume's log

    def segment(self, number: int, row: CatalogSegment | None) -> None:
        """Checks the next log segment; `row` is None if it is newer than the checkpoint."""
        self._summary.segments += 1
        self._summary.log_segments += 1
        self._report.log_segments += 1
        try:
            file = self._files.get(number)
        except FileNotFoundError:
            self._add_missing(number, row)
            return
        except OSError as error:
            self._add_unreadable(number, str(self._files.path(number)), error)
            return
        try:
            self._check_segment(file, row)
        except OSError as error:
            self._add_unreadable(number, file.path, error)
        finally:
            self._files.drop(number)

    def finish(self) -> None:
        """Says what is missing at the end."""
        point = self._checkpoint
        if not self._checkpoint_seen and self._sequence < point.sequence:
            self._findings.add(
                "error",
                "checkpoint-record-missing",
                f"the checkpoint covers the log up to record {point.sequence} in segment "
                f"{point.segment}, and the log has none after record {self._sequence}",
                RESTORE,
                segment=point.segment,
            )

    def _check_segment(self, file: SegmentFile, row: CatalogSegment | None) -> None:
        point = self._checkpoint
        if file.number < point.segment:
            covered_blocks = MAX_SEGMENT_BLOCKS
        else:
            covered_blocks = point.end_block if file.number == point.segment else 0
        segment = _Segment(
            file,
            row,
            covered_blocks,
            self._live.get(file.number) or LiveBlocks(),
            LiveBlocks(),
            LogCounts(row, file.path, self._findings),
        )
        header = check_header(file, self._identity, KIND_LOG, self._findings)
        if header is not None:
            segment.epoch = header.epoch
            if header.epoch < self._epoch:
                self._error(
                    segment,
                    0,
                    "epoch-back",
                    f"its epoch {header.epoch} is older than {self._epoch} of the segment before",
                )
        footer = self._read_footer(segment)
        if footer is not None:
            self._check_sealed(segment, *footer)
        else:
            self._scan(segment)
        self._compare_with_catalog(segment)
        self._compare_with_map(segment)
        self._epoch = max(self._epoch, segment.epoch)

    # A sealed segment

    def _read_footer(self, segment: _Segment) -> tuple[Trailer, list[Summary]] | None:
        identity = self._identity
        at = identity.segment_bytes // BLOCK_BYTES - 1
        block = segment.file.read_blocks(at)
        sealed = segment.row is not None and segment.row.sealed
        if is_zero(block):
            if sealed and not self._in_use:
                self._findings.add(
                    "warning",
                    "footer-missing",
                    f"segment {segment.number} is sealed in the catalog and has no footer; its "
                    "records were read instead",
                    "nothing now: opening the volume reads the records too, but cannot tell damage "
                    "at their end",
                    file=segment.file.path,
                    segment=segment.number,
                    offset_bytes=at * BLOCK_BYTES,
                )
            return None
        try:
            trailer = parse_trailer(block, segment.place(at), identity.segment_bytes)
            check_trailer(identity, segment.number, segment.epoch, trailer, segment.place(at))
            body = segment.file.read(
                trailer.body_offset_bytes,
                identity.segment_bytes - BLOCK_BYTES - trailer.body_offset_bytes,
            )
            place = Place(segment.file.path, trailer.body_offset_bytes)
            return trailer, parse_footer_body(body, place, trailer)
        except FormatError as error:
            # A crash can tear a footer, but not one of a segment that the catalog calls sealed.
            self._findings.add(
                "error" if sealed or segment.covered_blocks == MAX_SEGMENT_BLOCKS else "warning",
                "footer-damaged",
                f"segment {segment.number} has a damaged footer ({error.brief}); its records were "
                "read instead",
                "move the volume's data: the disk returned other bytes than were written",
                file=segment.file.path,
                segment=segment.number,
                offset_bytes=error.offset_bytes,
            )
            return None

    def _check_sealed(self, segment: _Segment, trailer: Trailer, summaries: list[Summary]) -> None:
        segment.sealed = True
        segment.epoch = trailer.epoch
        checksum = trailer.first_previous_checksum
        self._join(segment, trailer.first_sequence, checksum)
        for summary in summaries:
            place = segment.place(summary.offset_blocks)
            with_data = self._data
            content = segment.file.read_blocks(
                summary.offset_blocks, 1 + summary.data_blocks if with_data else 1
            )
            try:
                record = parse_record(content[:BLOCK_BYTES], place)
                check_record(
                    self._identity,
                    segment.number,
                    segment.epoch,
                    record,
                    summary.offset_blocks,
                    place,
                )
                check_chain(record, summary.sequence, checksum, place)
                check_summary(record, summary, place)
            except FormatError as error:
                self._error(
                    segment,
                    summary.offset_blocks,
                    "record-damaged",
                    f"{error.brief}; the footer stands in for it",
                )
            checksum = summary.header_checksum
            self._accept(segment, summary, content[BLOCK_BYTES:] if with_data else None)

    # A segment without a footer

    def _scan(self, segment: _Segment) -> None:
        """Reads record by record; behind one that is not valid, searches the next one that is."""
        at = 1
        expected: tuple[int, int] | None = None
        last = self._identity.segment_bytes // BLOCK_BYTES
        while at < last:
            place = segment.place(at)
            block = segment.file.read_blocks(at)
            content: bytes | None = None
            try:
                record = parse_record(block, place)
                check_record(self._identity, segment.number, segment.epoch, record, at, place)
                summary = record.summary
                if expected is not None:
                    check_chain(record, *expected, place)
                if not segment.covers(summary):
                    # Such a record is only valid with all of its data.
                    data = segment.file.read_blocks(at + 1, summary.data_blocks)
                    self._summary.data_blocks_read += summary.guest_blocks
                    check_contents(summary, data, place)
                elif self._data:
                    content = segment.file.read_blocks(at + 1, summary.data_blocks)
            except FormatError as error:
                found = self._find_record(segment, at + 1, last)
                self._add_invalid(segment, at, block, error, found)
                if found is None:
                    return
                at, expected = found, None
                continue
            segment.epoch = record.epoch
            if expected is None:
                self._join(segment, summary.sequence, record.previous_checksum)
            self._accept(segment, summary, content)
            expected = (summary.sequence + 1, summary.header_checksum)
            at = summary.end_blocks

    def _durable_sequence(self, segment: _Segment, first: int, last: int) -> int:
        """Up to which record the log was durable, as records of the segment from `first` on say."""
        durable = 0
        at = self._find_record(segment, first, last)
        while at is not None:
            record = parse_record(segment.file.read_blocks(at), segment.place(at))
            durable = max(durable, record.durable_sequence)
            at = self._find_record(segment, record.summary.end_blocks, last)
        return durable

    def _find_record(self, segment: _Segment, first: int, last: int) -> int | None:
        """The next block that is a record's header of this place."""
        at = first
        while at < last:
            blocks = segment.file.read_blocks(at, min(256, last - at))
            for index in range(0, len(blocks), BLOCK_BYTES):
                if blocks[index : index + 4] == b"VHRC":
                    offset_blocks = at + index // BLOCK_BYTES
                    place = segment.place(offset_blocks)
                    try:
                        record = parse_record(blocks[index : index + BLOCK_BYTES], place)
                        check_record(
                            self._identity,
                            segment.number,
                            segment.epoch,
                            record,
                            offset_blocks,
                            place,
                        )
                    except FormatError:
                        continue
                    if record.summary.sequence > self._sequence:
                        return offset_blocks
            at += 256
        return None

    def _add_invalid(
        self, segment: _Segment, at: int, block: bytes, error: FormatError, found: int | None
    ) -> None:
        """The log ends here, or is damaged here."""
        # In a segment that is covered whole, the end of its records is covered too: nothing there
        # looks like a record.
        if at < segment.covered_blocks and (
            segment.covered_blocks < MAX_SEGMENT_BLOCKS
            or found is not None
            or block[:4] == b"VHRC"
            or not self._is_end(segment, at)
        ):
            self._error(
                segment,
                at,
                "record-damaged",
                f"{error.brief}; the checkpoint covers it",
            )
            return
        if found is None and (is_zero(block) or at < segment.covered_blocks):
            return
        last = self._identity.segment_bytes // BLOCK_BYTES
        if found is not None and self._durable_sequence(segment, found, last) > self._sequence:
            segment.lost_records = True
            self._error(
                segment,
                at,
                "record-damaged",
                f"{error.brief}; a later record says that it was durable",
            )
            return
        self._ended = True
        if found is not None:
            self._findings.add(
                "warning",
                "log-ends-early",
                f"the log ends in segment {segment.number} at block {at} ({error.brief}), before "
                f"another record at block {found}: normal after a loss of power, if no flush "
                "completed after it; else it is damage",
                f"{REOPEN}; if the machine did not lose power, {RESTORE}",
                file=segment.file.path,
                segment=segment.number,
                offset_bytes=at * BLOCK_BYTES,
            )
        else:
            self._findings.add(
                "note" if self._in_use else "warning",
                "torn-record",
                f"the log ends in segment {segment.number} at block {at} with a record that is not "
                f"whole ({error.brief}): normal after a crash, if no flush completed after it",
                REOPEN,
                file=segment.file.path,
                segment=segment.number,
                offset_bytes=at * BLOCK_BYTES,
            )

    @staticmethod
    def _is_end(segment: _Segment, at: int) -> bool:
        """As much as the catalog says was written has been read."""
        return segment.row is None or at >= segment.row.used_blocks

    # Records

    def _join(self, segment: _Segment, sequence: int, previous_checksum: int) -> None:
        """The first record of a segment, or behind damage, against the chain before it."""
        point = self._checkpoint
        next_sequence = self._sequence + 1
        if sequence == next_sequence:
            self._compare_link(segment, sequence, previous_checksum, self._checksum)
        elif sequence < next_sequence:
            self._error(
                segment,
                segment.end_blocks,
                "sequence-back",
                f"it continues with record {sequence} after record {self._sequence}",
            )
        elif sequence - 1 <= point.sequence:
            # Segments without a live block are removed: what is missing is covered.
            if sequence - 1 == point.sequence:
                self._compare_link(segment, sequence, previous_checksum, point.record_checksum)
                self._checkpoint_seen = True
        elif self._catalogued:
            self._add_gap(segment, max(next_sequence, point.sequence + 1), sequence)

    def _compare_link(
        self, segment: _Segment, sequence: int, previous_checksum: int, expected: int
    ) -> None:
        if previous_checksum != expected:
            self._error(
                segment,
                segment.end_blocks,
                "chain-broken",
                f"record {sequence} follows on a record with checksum {previous_checksum:#010x}, "
                f"and record {sequence - 1} has {expected:#010x}",
            )

    def _add_gap(self, segment: _Segment, first: int, sequence: int) -> None:
        # Sealing, and a new epoch, come after everything before was durable.
        lost = segment.sealed or segment.lost_records or segment.epoch > self._epoch > 0
        severity: Severity = "error" if lost else "warning"
        self._ended = not lost
        text = f"records {first} to {sequence - 1} of the log are missing before segment "
        text += f"{segment.number}"
        if not lost:
            if self._in_use:
                severity = "note"
            text += ": normal after a loss of power, if no flush completed after them"
        self._findings.add(
            severity,
            "log-gap",
            text,
            f"{RESTORE}; opening the volume goes on behind the gap" if lost else REOPEN,
            file=segment.file.path,
            segment=segment.number,
            offset_bytes=segment.end_blocks * BLOCK_BYTES,
        )

    def _accept(self, segment: _Segment, summary: Summary, content: bytes | None) -> None:
        """A record that is where it should be: data, map, counts, and the chain goes on."""
        point = self._checkpoint
        covered = segment.covers(summary)
        self._summary.records += 1
        self._report.records += 1
        self._report.replayable_records += not covered and not self._ended
        if self._catalogued and covered != (summary.sequence <= point.sequence):
            self._error(
                segment,
                summary.offset_blocks,
                "checkpoint-position",
                f"record {summary.sequence} is on the wrong side of the checkpoint, which covers "
                f"the log up to record {point.sequence} and up to block {point.end_block} of "
                f"segment {point.segment}",
            )
        if summary.sequence == point.sequence:
            self._checkpoint_seen = True
            if summary.header_checksum != point.record_checksum or (
                segment.number == point.segment and summary.end_blocks != point.end_block
            ):
                self._error(
                    segment,
                    summary.offset_blocks,
                    "checkpoint-record-differs",
                    f"record {summary.sequence} is not the one the checkpoint ends with",
                )
        for block, offset, count, checksums in summary.data_pieces():
            self._summary.blocks += count
            if covered:
                segment.counts.add_data(offset, count)
                segment.seen.add_where(segment.live, block, offset, count, checksums)
        if covered:
            segment.counts.unmaps += sum(entry.is_unmap for entry in summary.entries)
        for offset, count, checksums in summary.note_pieces():
            note_blocks = segment.file.read_blocks(offset, count)
            note = self.notes.read(segment.file, offset, note_blocks, checksums, covered=covered)
            if covered:
                segment.counts.add_note(note, count)
        if content is not None:
            self._check_data(segment, summary, content, covered)
        if segment.row is not None:
            segment.summaries.append(summary)
        segment.end_blocks = summary.end_blocks
        self._epoch = max(self._epoch, segment.epoch)
        self._sequence = summary.sequence
        self._checksum = summary.header_checksum

    def _check_data(
        self, segment: _Segment, summary: Summary, content: bytes, covered: bool
    ) -> None:
        self._summary.data_blocks_read += summary.guest_blocks
        first_data = summary.offset_blocks + 1
        for block, offset, count, checksums in summary.data_pieces():
            at = (offset - first_data) * BLOCK_BYTES
            bad = 0
            for index in range(count):
                start = at + index * BLOCK_BYTES
                stored = int.from_bytes(checksums[4 * index : 4 * index + 4], "little")
                if crc32c(content[start : start + BLOCK_BYTES]) != stored:
                    bad |= 1 << index
            if not bad:
                continue
            if covered:
                # Punched blocks read as zeroes, and only dead ones may be.
                for index in range(count):
                    start = at + index * BLOCK_BYTES
                    if segment.counts.is_dead(offset + index) and is_zero(
                        content[start : start + BLOCK_BYTES]
                    ):
                        bad &= ~(1 << index)
            reached = (segment.live.bits >> offset) & bad if covered else bad
            for bits, is_live in ((reached, True), (bad & ~reached, False)):
                for start, length in runs_of(bits):
                    self._add_bad_data(segment, block + start, offset + start, length, is_live)

    def _add_bad_data(
        self, segment: _Segment, block: int, offset: int, count: int, is_live: bool
    ) -> None:
        if is_live and len(self.bad_data) < MAX_BAD_DATA:
            # Who reads it is told when all of the log was read.
            bad = BadData(segment.file.path, segment.number, offset, block, count)
            self.bad_data.append(bad)
            return
        what = "data" if is_live else "data that nothing reads any more"
        self._findings.add(
            "error" if is_live else "warning",
            "data-damaged" if is_live else "dead-data-damaged",
            f"{count} blocks of {what} at block {offset} of segment {segment.number} do not match "
            "their checksums",
            f"{RESTORE}: reading it gives I/O errors, never wrong bytes"
            if is_live
            else "look at the disk: it returned other bytes than were written",
            file=segment.file.path,
            segment=segment.number,
            offset_bytes=offset * BLOCK_BYTES,
            volume_offset_bytes=block * BLOCK_BYTES,
            length_bytes=count * BLOCK_BYTES,
        )

    # Against catalog and map

    def _compare_with_catalog(self, segment: _Segment) -> None:
        row = segment.row
        used_bytes = max(segment.end_blocks, row.used_blocks if row else 0) * BLOCK_BYTES
        if segment.file.size_bytes < used_bytes:
            self._error(
                segment,
                segment.file.size_bytes // BLOCK_BYTES,
                "file-short",
                f"the file has {segment.file.size_bytes} bytes, and {used_bytes} were written",
            )
        if row is None:
            return
        if segment.end_blocks < row.used_blocks:
            self._error(
                segment,
                segment.end_blocks,
                "records-missing",
                f"records end at block {segment.end_blocks}, and the catalog has "
                f"{row.used_blocks} blocks in use",
            )
        elif (
            segment.covered_blocks == MAX_SEGMENT_BLOCKS
            and row.sealed
            and segment.end_blocks > row.used_blocks
        ):
            self._findings.add(
                "warning",
                "used-blocks-differ",
                f"segment {segment.number} has records up to block {segment.end_blocks}, and the "
                f"catalog has {row.used_blocks} blocks in use",
                "report this with the log: the accounting of space is wrong",
                file=segment.file.path,
                segment=segment.number,
            )
        if self._maps_whole:
            compare_counts(segment.counts, segment.live, removing_whole=self._removing_whole)
        self._report.dead_blocks += segment.counts.dead.bit_count()
        self._report.punched_blocks += row.punched_blocks

    def _compare_with_map(self, segment: _Segment) -> None:
        if segment.seen.says_the_same(segment.live):
            return
        if len(self.suspects) >= MAX_SUSPECTS:
            self._error(
                segment,
                0,
                "map-differs",
                "the map reaches blocks of it that its records do not have so",
            )
            return
        suspect = self.suspects[segment.number] = Suspect()
        for summary in segment.summaries:
            if not segment.covers(summary):
                continue
            for block, offset, count, checksums in summary.data_pieces():
                for index in range(count):
                    suspect.blocks[offset + index] = block + index
                    suspect.checksums[offset + index] = int.from_bytes(
                        checksums[4 * index : 4 * index + 4], "little"
                    )

    # Findings

    def _error(self, segment: _Segment, offset_blocks: int, code: str, text: str) -> None:
        self._findings.add(
            "error",
            code,
            f"segment {segment.number}, block {offset_blocks}: {text}",
            RESTORE,
            file=segment.file.path,
            segment=segment.number,
            offset_bytes=offset_blocks * BLOCK_BYTES,
        )

    def _add_missing(self, number: int, row: CatalogSegment | None) -> None:
        if row is None:
            return  # seen in the directory and gone since: of a volume in use
        path = str(self._files.path(number))
        if number > self._checkpoint.segment and not row.sealed and row.live == 0:
            self._findings.add(
                "note",
                "segment-removed",
                f"log segment {number} is in the catalog and its file is not there: recovery "
                "removed it, or will find its records missing",
                "nothing: the next checkpoint tells the catalog",
                file=path,
                segment=number,
            )
            return
        self._findings.add(
            "error",
            "segment-missing",
            f"log segment {number} is in the catalog and its file {path} does not exist",
            "put the file back if it was moved; else " + RESTORE,
            file=path,
            segment=number,
        )

    def _add_unreadable(self, number: int, path: str, error: OSError) -> None:
        self._findings.add(
            "error",
            "segment-unreadable",
            f"log segment {number} cannot be read: {error}",
            "see the kernel's log, and check the permissions of the file",
            file=path,
            segment=number,
        )
