"""What the catalog's rows are in Python. `docs/format.md`, "Catalog", says what the columns mean.

Values only; any thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from vhostd._native import CheckpointState

__all__ = ["Checkpoint", "PoolRow", "SegmentSums", "SnapshotRow", "VolumeRow", "no_checkpoint"]


@dataclass(frozen=True, slots=True)
class PoolRow:
    """The pool itself. next_segment: the first number that was never granted."""

    uuid: UUID
    name: str
    segment_bytes: int
    next_segment: int
    created_ns: int
    quota_bytes: int | None = None
    warn_percent: int = 80


@dataclass(frozen=True, slots=True)
class VolumeRow:
    """A volume as the catalog has it. state: `present`, or `removing` until its files are gone.

    parent: the snapshot of its own that its head descends from. origin: the snapshot of another
    volume whose blocks a clone shares. flattened_position: the head of a clone shares nothing any
    more since this place in the log; older snapshots of the clone may.
    """

    uuid: UUID
    name: str
    size_bytes: int
    logical_block_bytes: int
    serial: str
    epoch: int
    state: str
    created_ns: int
    parent: UUID | None = None
    origin: UUID | None = None
    flattened_position: int | None = None
    quota_bytes: int | None = None
    reservation_bytes: int | None = None
    on_full: str = "ioerr"
    state_noted: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A snapshot. root: None while no checkpoint has it. name: None while it is being removed."""

    uuid: UUID
    volume: UUID
    name: str | None
    guid: UUID
    parent: UUID | None
    position: int
    size_bytes: int
    state: str
    root: bytes | None
    mapped_blocks: int
    protected: bool
    quiesced: bool
    created_ns: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The last committed checkpoint of a volume; the zero one if there is none."""

    state: CheckpointState
    mapped_blocks: int
    committed_ns: int

    @property
    def position(self) -> int:
        """The end of the log that it covers, as an address."""
        return self.state["segment"] << 13 | self.state["end_block"]


def no_checkpoint() -> Checkpoint:
    """What a volume starts from: an empty map and no log."""
    return Checkpoint(
        {"root": b"", "segment": 0, "end_block": 0, "sequence": 0, "record_checksum": 0}, 0, 0
    )


@dataclass(frozen=True, slots=True)
class SegmentSums:
    """What the segments of a volume come to, as of its last checkpoint.

    live_blocks: data that the head or a snapshot reaches; dead_blocks: data that neither does,
    punched or not; map_live_bytes: live nodes.
    """

    log_segments: int = 0
    map_segments: int = 0
    used_blocks: int = 0
    punched_blocks: int = 0
    live_blocks: int = 0
    dead_blocks: int = 0
    map_live_bytes: int = 0
