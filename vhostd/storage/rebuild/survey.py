"""What the segments of a device say by themselves: whose they are, and the notes of each volume.

Reads headers, footers and notes with the independent reader, never the guests' data. A segment
whose header is damaged is known by its footer, or by its records; one that nothing names is told
and left alone. Memory: the notes of all volumes and 100 bytes a segment. Changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from vhostd.errors import UnsupportedError
from vhostd.storage.check.files import SegmentFile, SegmentFiles
from vhostd.storage.check.report import CheckSummary
from vhostd.storage.format import (
    BLOCK_BYTES,
    KIND_LOG,
    KIND_MAP,
    MAX_SEGMENT_BLOCKS,
    SUPERBLOCK_FILE,
    FormatError,
    Place,
    SegmentHeader,
    SnapshotNote,
    StateNote,
    StateParts,
    Summary,
    Superblock,
    Unmap,
    VolumeState,
    crc32c,
    parse_footer_body,
    parse_note,
    parse_record,
    parse_segment_header,
    parse_state,
    parse_superblock,
    parse_trailer,
)

__all__ = ["FoundVolume", "Survey", "survey"]

MAX_SEGMENT_BYTES = MAX_SEGMENT_BLOCKS * BLOCK_BYTES

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class FoundVolume:
    """A volume as its segments tell of it.

    header: of the newest segment that has a readable one. state: the newest that is noted;
    snapshots: noted behind it, by position. lost_notes: positions of notes of one block that cannot
    be read. epoch: the newest.
    """

    uuid: UUID
    epoch: int = 0
    header: SegmentHeader | None = None
    logs: list[int] = field(default_factory=list)
    maps: list[int] = field(default_factory=list)
    state: VolumeState | None = None
    state_position: int = 0
    snapshots: dict[int, SnapshotNote] = field(default_factory=dict)
    unmaps: list[Unmap] = field(default_factory=list)
    lost_notes: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    parts: StateParts = field(default_factory=StateParts)

    @property
    def name(self) -> str:
        """The newest that is known; without any, a piece of the UUID."""
        if self.state is not None:
            return self.state.volume.name
        return self.header.name if self.header is not None else f"unnamed-{self.uuid.hex[:8]}"


@dataclass(slots=True)
class Survey:
    """What a device holds. superblock: None if it is lost; pool and segment_bytes are known then
    from segments, if there are any. problems: what was not readable."""

    superblock: Superblock | None = None
    pool: UUID | None = None
    segment_bytes: int = 0
    last_segment: int = 0
    segments: int = 0
    volumes: dict[UUID, FoundVolume] = field(default_factory=dict)
    unknown: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def survey(directory: Path, progress: Progress | None = None) -> Survey:
    """Reads the device at `directory`.

    Raises:
        UnsupportedError: it is of a newer version.
        OSError: the operating system does not let it be read.
    """
    found = Survey()
    path = directory / SUPERBLOCK_FILE
    try:
        found.superblock = parse_superblock(path.read_bytes()[:BLOCK_BYTES], Place(str(path)))
    except FileNotFoundError:
        found.problems.append(f"{path} does not exist")
    except FormatError as error:
        if error.newer:
            raise UnsupportedError(
                f"{error}; use the vhostd that made it, or a newer one"
            ) from None
        found.problems.append(str(error))
    files = SegmentFiles(directory, CheckSummary())
    try:
        numbers, _ = files.list()
        found.segments, found.last_segment = len(numbers), max(numbers, default=0)
        _identify_pool(found, files, numbers)
        for done, number in enumerate(numbers):
            _Segment(found, files.get(number)).read()
            files.drop(number)
            if progress is not None:
                progress((done + 1) * found.segment_bytes, len(numbers) * found.segment_bytes)
    except FileNotFoundError as error:
        found.problems.append(f"{error.filename} does not exist")
    finally:
        files.close()
    return found


def _identify_pool(found: Survey, files: SegmentFiles, numbers: list[int]) -> None:
    """Pool and segment size: of the superblock, else of most segments."""
    if found.superblock is not None:
        found.pool, found.segment_bytes = found.superblock.pool, found.superblock.segment_bytes
        return
    votes: Counter[tuple[UUID, int]] = Counter()
    for number in numbers:
        file = files.get(number)
        try:
            header = parse_segment_header(file.read_blocks(0), Place(file.path))
            votes[header.pool, header.segment_bytes] += 1
        except (FormatError, OSError):
            continue
        finally:
            files.drop(number)
    if votes:
        (found.pool, found.segment_bytes), _ = votes.most_common(1)[0]


class _Segment:
    """Reads one segment into the survey."""

    def __init__(self, found: Survey, file: SegmentFile) -> None:
        self._found = found
        self._file = file

    def read(self) -> None:
        """Adds what the segment says."""
        found, number = self._found, self._file.number
        header = self._header()
        footer = self._footer() if header is None or header.kind == KIND_LOG else None
        if header is not None:
            uuid, epoch, kind = header.volume, header.epoch, header.kind
        elif footer is not None:
            uuid, epoch, kind = footer[0], footer[1], KIND_LOG
        else:
            first = next(self._records(None), None)
            if first is None:
                found.unknown.append(number)
                return
            uuid, epoch, kind = first[0], first[1], KIND_LOG
        volume = found.volumes.setdefault(uuid, FoundVolume(uuid))
        volume.epoch = max(volume.epoch, epoch)
        if header is None:
            volume.problems.append(f"segment {number} has a damaged header; it was known otherwise")
        elif volume.header is None or header.number > volume.header.number:
            volume.header = header
        if kind == KIND_MAP:
            volume.maps.append(number)
            return
        volume.logs.append(number)
        if footer is not None:
            summaries: Iterator[Summary] = iter(footer[2])
        else:
            summaries = (summary for _, _, summary in self._records(uuid))
        for summary in summaries:
            for offset, count, checksums in summary.note_pieces():
                self._read_note(volume, offset, count, checksums)

    def _header(self) -> SegmentHeader | None:
        try:
            header = parse_segment_header(self._file.read_blocks(0), Place(self._file.path))
        except (FormatError, OSError):
            return None
        return header if self._is_ours(header.pool, header.number) else None

    def _is_ours(self, pool: UUID, number: int) -> bool:
        return number == self._file.number and pool == (self._found.pool or pool)

    def _footer(self) -> tuple[UUID, int, list[Summary]] | None:
        """Volume, epoch, and what the records hold."""
        segment_bytes = self._found.segment_bytes
        at = segment_bytes - BLOCK_BYTES
        if at <= 0:
            return None
        try:
            place = Place(self._file.path, at)
            trailer = parse_trailer(self._file.read(at, BLOCK_BYTES), place, segment_bytes)
            if not self._is_ours(trailer.pool, trailer.segment):
                return None
            body = self._file.read(trailer.body_offset_bytes, at - trailer.body_offset_bytes)
            place = Place(self._file.path, trailer.body_offset_bytes)
            return trailer.volume, trailer.epoch, parse_footer_body(body, place, trailer)
        except (FormatError, OSError):
            return None

    def _records(self, volume: UUID | None) -> Iterator[tuple[UUID, int, Summary]]:
        """Volume, epoch and contents of every record whose header can be read."""
        last_blocks = (self._found.segment_bytes or MAX_SEGMENT_BYTES) // BLOCK_BYTES
        end_blocks = min(last_blocks, -(-self._file.size_bytes // BLOCK_BYTES))
        at, sequence = 1, 0
        while at < end_blocks:
            try:
                block = self._file.read_blocks(at)
                record = parse_record(block, Place(self._file.path, at * BLOCK_BYTES))
            except (FormatError, OSError):
                at += 1
                continue
            summary = record.summary
            # Data of a guest may look like a record.
            if (
                not self._is_ours(record.pool, record.segment)
                or summary.offset_blocks != at
                or record.volume != (volume or record.volume)
                or summary.sequence <= sequence
            ):
                at += 1
                continue
            yield record.volume, record.epoch, summary
            at, sequence = summary.end_blocks, summary.sequence

    def _read_note(self, volume: FoundVolume, offset: int, count: int, checksums: bytes) -> None:
        position = self._file.number * MAX_SEGMENT_BLOCKS + offset
        place = Place(self._file.path, offset * BLOCK_BYTES)
        try:
            data = self._file.read_blocks(offset, count)
            _check_sums(data, checksums, place)
            note = parse_note(data, place)
            if isinstance(note, SnapshotNote):
                volume.snapshots[position] = note
            elif isinstance(note, StateNote):
                whole = volume.parts.add(position, note)
                if whole is not None:
                    volume.state = parse_state(whole[1], place)
                    volume.state_position = whole[0]
                    # What was noted between its parts is not in it.
                    volume.snapshots = {
                        at: s for at, s in volume.snapshots.items() if at > whole[0]
                    }
            else:
                volume.unmaps.extend(note.unmaps)
        except (FormatError, OSError) as error:
            volume.problems.append(str(error))
            if count == 1:
                volume.lost_notes.append(position)


def _check_sums(data: bytes, checksums: bytes, place: Place) -> None:
    for index in range(len(data) // BLOCK_BYTES):
        stored = int.from_bytes(checksums[4 * index : 4 * index + 4], "little")
        if crc32c(data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]) != stored:
            raise FormatError("note", "checksum", place, f"block {index} does not match its own")
