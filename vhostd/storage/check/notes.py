"""What the notes of a volume's log say, and whether the catalog says the same.

One `NoteCheck` a look at a volume: `read` in the order of the log, then `compare`. Keeps the newest
state and what was noted behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from vhostd.storage.check.files import SegmentFile
from vhostd.storage.check.report import Findings
from vhostd.storage.format import (
    BLOCK_BYTES,
    MAX_SEGMENT_BLOCKS,
    CatalogVolume,
    FormatError,
    Note,
    Place,
    SnapshotNote,
    StateNote,
    StateParts,
    VolumeState,
    crc32c,
    parse_note,
    parse_state,
)

__all__ = ["NoteCheck"]

NOTE_AGAIN = (
    "open the volume and take or rename a snapshot: that notes all of them again at the log's end"
)
WRONG_CATALOG = (
    "close the pool and run `vhostctl check --repair`: the log has a checksum, the catalog has none"
)


@dataclass(frozen=True, slots=True)
class _Noted:
    """A snapshot that the log knows. covered: by the checkpoint."""

    name: str
    position: int
    covered: bool


@dataclass(frozen=True, slots=True)
class _BadNote:
    file: str
    segment: int
    offset: int
    reason: str


class NoteCheck:
    """The notes of one volume."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._state: VolumeState | None = None
        self._state_position = 0
        self._parts = StateParts()
        self._noted: dict[UUID, _Noted] = {}
        self._bad: list[_BadNote] = []

    def read(
        self, file: SegmentFile, offset: int, data: bytes, checksums: bytes, *, covered: bool
    ) -> Note | None:
        """The note at block `offset` of a segment; None: it cannot be read."""
        position = file.number * MAX_SEGMENT_BLOCKS + offset
        place = Place(file.path, offset * BLOCK_BYTES)
        try:
            _check_sums(data, checksums, place)
            note = parse_note(data, place)
        except FormatError as error:
            self._bad.append(_BadNote(file.path, file.number, offset, error.brief))
            return None
        if isinstance(note, StateNote):
            whole = self._parts.add(position, note)
            if whole is not None:
                try:
                    self._take_state(whole[0], parse_state(whole[1], place), covered=covered)
                except FormatError as error:
                    self._bad.append(_BadNote(file.path, file.number, offset, error.brief))
                    return None
        elif isinstance(note, SnapshotNote):
            self._noted[note.uuid] = _Noted(note.name, position, covered)
        return note

    def _take_state(self, position: int, state: VolumeState, *, covered: bool) -> None:
        self._state, self._state_position = state, position
        # What was noted between its parts is not in it.
        later = {uuid: s for uuid, s in self._noted.items() if s.position > position}
        self._noted = {
            snapshot.uuid: _Noted(snapshot.name, snapshot.position, covered)
            for snapshot in state.snapshots
        }
        self._noted |= later

    def compare(self, volume: CatalogVolume | None) -> None:
        """After the whole log. volume: None if there is no catalog."""
        for bad in self._bad:
            newer = bad.segment * MAX_SEGMENT_BLOCKS + bad.offset > self._state_position
            self._findings.add(
                "error" if newer else "warning",
                "note-damaged",
                f"a note at block {bad.offset} of segment {bad.segment} is damaged ({bad.reason})"
                + ("" if newer else "; a newer one has what it said"),
                f"{NOTE_AGAIN}; without it, `pool rebuild-catalog` would not know what it said"
                if newer
                else "look at the disk: it returned other bytes than were written",
                file=bad.file,
                segment=bad.segment,
                offset_bytes=bad.offset * BLOCK_BYTES,
            )
        if volume is None:
            return
        self._compare_snapshots(volume)
        # The next opening repeats the state of a volume where this is not set.
        if volume.state_noted and not self._bad:
            self._compare_state(volume)

    def _compare_snapshots(self, volume: CatalogVolume) -> None:
        for snapshot in volume.snapshots:
            if snapshot.name is None or snapshot.state == "removing":
                continue
            noted = self._noted.get(snapshot.uuid)
            if noted is None:
                if volume.state_noted and not self._bad:
                    self._findings.add(
                        "warning",
                        "snapshot-not-noted",
                        f"snapshot {volume.name}@{snapshot.name} is in no note of the log: it "
                        "would be lost with the catalog",
                        NOTE_AGAIN,
                    )
            elif noted.position != snapshot.position or (
                volume.state_noted and noted.name != snapshot.name
            ):
                self._findings.add(
                    "error",
                    "snapshot-differs",
                    f"snapshot {volume.name}@{snapshot.name} is at position {snapshot.position} in "
                    f"the catalog; in the log it is {noted.name} at {noted.position}",
                    WRONG_CATALOG,
                )

    def _compare_state(self, volume: CatalogVolume) -> None:
        known = {snapshot.uuid for snapshot in volume.snapshots}
        for uuid, noted in self._noted.items():
            # Those behind the checkpoint are found when the volume is opened.
            if uuid not in known and noted.covered:
                self._findings.add(
                    "error",
                    "note-without-snapshot",
                    f"the log has snapshot {noted.name} ({uuid}) of volume {volume.name}, and the "
                    "catalog has not",
                    WRONG_CATALOG,
                )
        state = self._state
        if state is not None:
            self._compare_volume(volume, state)
        rollbacks = {(r.position, r.to) for r in state.rollbacks} if state else set()
        missing = set(volume.rollbacks) - rollbacks
        origin = (state.origin.volume, state.origin.snapshot) if state and state.origin else None
        if missing or (volume.origin is not None and origin != volume.origin):
            what = f"{len(missing)} rollbacks" if missing else "its origin"
            self._findings.add(
                "warning",
                "state-not-noted",
                f"the log's notes of volume {volume.name} lack {what}: without them its maps "
                "cannot be rebuilt",
                NOTE_AGAIN,
            )

    def _compare_volume(self, volume: CatalogVolume, state: VolumeState) -> None:
        noted = state.volume
        lacking = {(r.position, r.to) for r in state.rollbacks} - set(volume.rollbacks)
        pairs = (
            ("name", volume.name, noted.name),
            ("size", volume.size_bytes, noted.size_bytes),
            ("logical block", volume.logical_block_bytes, noted.logical_block_bytes),
            ("list of rollbacks", len(volume.rollbacks), len(volume.rollbacks) + len(lacking)),
        )
        for what, found, wanted in pairs:
            if found != wanted:
                self._findings.add(
                    "error",
                    "volume-differs",
                    f"the {what} of volume {volume.name} is {found} in the catalog, and {wanted} "
                    "in the log",
                    WRONG_CATALOG,
                )


def _check_sums(data: bytes, checksums: bytes, place: Place) -> None:
    for index in range(len(data) // BLOCK_BYTES):
        stored = int.from_bytes(checksums[4 * index : 4 * index + 4], "little")
        if crc32c(data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]) != stored:
            raise FormatError("note", "checksum", place, f"block {index} does not match its own")
