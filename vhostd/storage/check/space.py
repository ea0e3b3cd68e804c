"""Live and dead: does the catalog's row of a log segment agree with what maps reach of it?

What must hold (`docs/format.md`, "Catalog"): a block of data is live or dead; what the head or a
snapshot reaches is live; what is dead no one reaches, but for snapshots whose removal is
unfinished.
Pure but for the findings.
"""

from __future__ import annotations

from vhostd.storage.check.live import LiveBlocks
from vhostd.storage.check.place import REBUILD
from vhostd.storage.check.report import Findings, Severity
from vhostd.storage.format import (
    CatalogSegment,
    FormatError,
    Note,
    Place,
    SnapshotNote,
    StateNote,
    UnmapsNote,
    parse_dead_blocks,
)

__all__ = ["LogCounts", "compare_counts"]


class LogCounts:
    """What the records of one segment hold, as far as the checkpoint covers them."""

    def __init__(self, row: CatalogSegment | None, path: str, findings: Findings) -> None:
        self.row = row
        self.path = path
        self.findings = findings
        self.data = 0
        self.notes = 0
        self.unmaps = 0
        self.dead = 0
        if row is None:
            return
        try:
            self.dead = parse_dead_blocks(row.dead, Place("catalog"))
        except FormatError as error:
            self.add(
                "error",
                "dead-set",
                f"the catalog's bitmap of dead blocks of segment {row.number}: {error.brief}",
            )

    def add_data(self, offset: int, count: int) -> None:
        """Blocks of data."""
        self.data |= ((1 << count) - 1) << offset

    def add_note(self, note: Note | None, count: int) -> None:
        """A note of `count` blocks; None: it is not readable."""
        if isinstance(note, SnapshotNote | StateNote):
            self.notes += count
        elif isinstance(note, UnmapsNote):
            self.unmaps += len(note.unmaps)

    def is_dead(self, offset: int) -> bool:
        """A block is dead in the catalog."""
        return bool(self.dead >> offset & 1)

    def add(self, severity: Severity, code: str, text: str) -> None:
        """A finding of the segment."""
        number = self.row.number if self.row is not None else None
        self.findings.add(severity, code, text, REBUILD, file=self.path, segment=number)


def compare_counts(counts: LogCounts, live: LiveBlocks, *, removing_whole: bool) -> None:
    """removing_whole: the maps of all snapshots that are being removed could be read."""
    row = counts.row
    if row is None:
        return
    number = row.number
    wrong = counts.dead & live.held
    if wrong:
        counts.add(
            "error",
            "dead-but-reached",
            f"{wrong.bit_count()} blocks of segment {number} are dead in the catalog, and a map "
            f"reaches them (the first is block {(wrong & -wrong).bit_length() - 1}): their space "
            "may be given back",
        )
    strange = counts.dead & ~counts.data
    if strange:
        counts.add(
            "warning",
            "dead-set",
            f"{strange.bit_count()} blocks of segment {number} are dead in the catalog, and no "
            "record that the checkpoint covers has data there",
        )
    held = counts.data & ~counts.dead
    reached = live.bits & counts.data & ~counts.dead
    if held.bit_count() != row.live:
        # Too few are worse: at 0 the segment is removed.
        counts.add(
            "error" if held.bit_count() > row.live else "warning",
            "live-count-differs",
            f"{held.bit_count()} blocks of data in segment {number} are not dead in the catalog, "
            f"which has {row.live} as live",
        )
    elif removing_whole and held != reached:
        counts.add(
            "warning",
            "space-leaked",
            f"{(held & ~reached).bit_count()} blocks of segment {number} are live in the catalog, "
            "and no map reaches them",
        )
    if row.punched_blocks > counts.dead.bit_count():
        counts.add(
            "error",
            "punched-count-differs",
            f"{row.punched_blocks} blocks of segment {number} are punched, and only "
            f"{counts.dead.bit_count()} are dead",
        )
    for what, found, kept in (
        ("notes", counts.notes, row.notes),
        ("unmaps", counts.unmaps, row.unmaps),
    ):
        # With 0 the segment may be removed without repeating them.
        if found and not kept:
            counts.add(
                "warning",
                f"{what}-not-counted",
                f"segment {number} holds {what} that a rebuild of maps may need, and the catalog "
                "has none",
            )
