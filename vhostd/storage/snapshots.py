"""What is done with the snapshots of a pool: take, roll back, clone, compare, and free their space.

Removing is two things. `remove` is a commit: the snapshot has no name any more and is never read
again. `release_next` frees what it alone held, and may be repeated from its beginning after a crash
at any point (ARCHITECTURE.md, "Snapshots, clones, and what is dead"):

    removing ─▶ the head leaves it: what the head replaces of it dies at once from here on
             ─▶ checkpoint: a root of the head after that, and roots for all that was pending
             ─▶ walk: dead is what it reaches and its parent, its children and that root do not
             ─▶ checkpoint that has that as dead, and in the same transaction the row is gone

Ordering: the head leaves the snapshot under the volume's commit lock, so no snapshot is taken
between the catalog's and the engine's word. One that is taken later hangs on the parent, and is
among those the walk compares with.

Any thread may call; calls block, and those that walk maps may take long, without the pool's lock.
"""

from __future__ import annotations

import time
import uuid as uuid_module
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

from vhostd.errors import BusyError, InternalError, UsageError
from vhostd.storage.names import check_name
from vhostd.storage.rows import SnapshotRow, VolumeRow
from vhostd.storage.statenote import check_room, state_note
from vhostd.storage.volume import SERIAL_MAX_BYTES, OpenVolume

if TYPE_CHECKING:
    from vhostd.storage.pool import Pool

__all__ = ["Difference", "Snapshots", "time_name"]

BLOCK_BYTES = 4096
ADOPT_STEP_BYTES = 8 << 20
DIFFERENCE_RANGES = 16384
PENDING_RETRIES = 8

Progress = Callable[[int, int], None]
"""Bytes done, and bytes in all. May raise to stop."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A page of a difference: (offset, length, whether it is mapped), in bytes.

    next: where the next page begins, None at the end.
    """

    ranges: list[tuple[int, int, bool]]
    next: int | None
    old_size_bytes: int
    new_size_bytes: int


def time_name(now_ns: int) -> str:
    """The name of a snapshot for which none was given: `2026-11-21T14-05-09Z`."""
    return time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime(now_ns / 1e9))


class Snapshots:
    """Those of one pool; `Pool.snapshots`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._table = pool.catalog.snapshots
        self._log = structlog.get_logger().bind(pool=pool.name)

    # What there is

    def find(self, volume: str, name: str) -> SnapshotRow:
        """The snapshot of that name; raises NotFoundError."""
        return self._table.find(self._pool.catalog.volume(volume).uuid, name)

    def describe(self, volume: str, *, removing: bool = False) -> list[dict[str, Any]]:
        """The snapshots of a volume for programs, oldest first; docs/json-output.md."""
        row = self._pool.catalog.volume(volume)
        rows = self._table.of(row.uuid)
        names = {snapshot.uuid: snapshot.name for snapshot in rows}
        return [
            self._describe(row, snapshot, names)
            for snapshot in rows
            if removing or snapshot.state != "removing"
        ]

    def info(self, volume: str, name: str) -> dict[str, Any]:
        """One snapshot for programs."""
        row, snapshot = self._pool.catalog.volume(volume), self.find(volume, name)
        names = {s.uuid: s.name for s in self._table.of(row.uuid)}
        return self._describe(row, snapshot, names)

    def _describe(
        self, volume: VolumeRow, row: SnapshotRow, names: dict[UUID, str | None]
    ) -> dict[str, Any]:
        full = f"{self._pool.name}/{volume.name}"
        return {
            "name": f"{full}@{row.name}" if row.name is not None else None,
            "volume": full,
            "snapshot": row.name,
            "uuid": str(row.uuid),
            "guid": str(row.guid),
            "state": row.state,
            "parent": names.get(row.parent) if row.parent is not None else None,
            "head_descends": volume.parent == row.uuid,
            "size_bytes": row.size_bytes,
            "referenced_bytes": row.mapped_blocks * BLOCK_BYTES if row.root is not None else None,
            "protected": row.protected,
            "quiesced": row.quiesced,
            "clones": [f"{self._pool.name}/{name}" for name in self._table.clones(row.uuid)],
            "attached": self._pool.snapshot_in_use(row.uuid),
            "created_ns": row.created_ns,
        }

    def clones(self, volume: str, name: str | None = None) -> list[dict[str, str]]:
        """The clones of one snapshot, or of all of a volume."""
        if name is not None:
            rows = [self.find(volume, name)]
        else:
            rows = self._table.of(self._pool.catalog.volume(volume).uuid)
        full = f"{self._pool.name}/{volume}"
        return [
            {"name": f"{self._pool.name}/{clone}", "origin": f"{full}@{row.name or row.uuid}"}
            for row in rows
            for clone in self._table.clones(row.uuid)
        ]

    # Taking

    def create(
        self, volume: str, name: str, *, quiesced: bool = False, guid: UUID | None = None
    ) -> SnapshotRow:
        """Takes a snapshot, of an open volume without a pause of more than a request.

        quiesced: its file systems were frozen for it. guid: of the snapshot elsewhere whose
        contents it has; by default one of its own.

        Raises:
            UsageError: that is no name for it.
            ExistsError: the name is taken.
            BusyError: the volume has as many as it can have.
            NoSpaceError, DeviceError: there is no snapshot.
        """
        check_name(name, "snapshot")
        row = self._pool.catalog.volume(volume)
        full = f"{self._pool.name}/{volume}"
        self._table.check_new(row.uuid, name)
        note_bytes = len(state_note(self._pool.catalog, row.uuid))
        check_room(full, note_bytes, self._pool.catalog.pool().segment_bytes)
        with self._pool.using(volume) as opened:
            # Opening may have found one of that name in the log.
            self._table.check_new(row.uuid, name)
            uuid, created_ns = uuid_module.uuid4(), time.time_ns()
            for _ in range(PENDING_RETRIES):
                try:
                    return opened.snapshot(
                        uuid=uuid, name=name, created_ns=created_ns, quiesced=quiesced, guid=guid
                    )
                except BusyError:
                    opened.checkpoint()
        raise BusyError(
            f"volume {full}: snapshots are taken faster than checkpoints are written; try again"
        )

    def with_root(self, volume: str, name: str) -> tuple[SnapshotRow, bytes]:
        """A snapshot and its root, by a checkpoint if it has none yet."""
        row = self.find(volume, name)
        if row.root is None:
            with self._pool.using(volume) as opened:
                opened.checkpoint()
            row = self.find(volume, name)
        if row.root is None:
            raise InternalError(
                f"snapshot {self._pool.name}/{volume}@{name} has no root after a checkpoint; "
                "please report this with the log"
            )
        return row, row.root

    # Changing

    def _noted(self, volume: UUID, change: Callable[[], None]) -> None:
        opened = self._pool.find_open(volume)
        if opened is None:
            # The state note is written when it is opened.
            change()
        else:
            opened.change_noted(change)

    def rename(self, volume: str, name: str, new_name: str) -> SnapshotRow:
        """Gives a snapshot another name."""
        check_name(new_name, "snapshot")
        row = self.find(volume, name)
        self._noted(row.volume, lambda: self._table.rename(row.uuid, new_name))
        return self.find(volume, new_name)

    def protect(self, volume: str, name: str, protected: bool) -> SnapshotRow:
        """Protects a snapshot from being removed, or no longer."""
        row = self.find(volume, name)
        self._noted(row.volume, lambda: self._table.protect(row.uuid, protected))
        return self.find(volume, name)

    def remove(self, volume: str, names: list[str] | None) -> list[str]:
        """Begins to remove snapshots (None: all), all or none of them; `release_next` ends it.

        Raises:
            NotFoundError: one does not exist.
            BusyError: one is protected, has clones, or is in use.
        """
        uuid = self._pool.catalog.volume(volume).uuid
        if names is None:
            rows = [row for row in self._table.of(uuid) if row.state != "removing"]
        else:
            rows = [self._table.find(uuid, name) for name in names]
        with self._pool.lock:
            for row in rows:
                if self._pool.snapshot_in_use(row.uuid):
                    raise BusyError(
                        f"snapshot {self._pool.name}/{volume}@{row.name} is in use: it is "
                        "attached, exported or compared; detach it or wait, then remove it"
                    )
            self._noted(uuid, lambda: self._table.begin_removal([row.uuid for row in rows]))
        return [str(row.name) for row in rows]

    # Freeing space

    def release_next(self, volume: UUID) -> SnapshotRow | None:
        """Frees the space of one snapshot that is being removed. None: none can be now."""
        row = self._table.next_to_release(volume)
        if row is None:
            return None
        with self._pool.using_uuid(volume, background=True) as opened:
            if row.root is None:
                opened.checkpoint()
                row = self._table.get(row.uuid) or row
            opened.leave(row.uuid)
            with opened.nodes_held():
                opened.checkpoint()
                blocks = node_bytes = 0
                if row.root:
                    blocks, node_bytes = self._pool.engine.release_exclusive(
                        opened.engine, root=row.root, others=self._neighbours(row)
                    )
            opened.checkpoint(released=[row.uuid])
        self._log.info(
            "the space of a snapshot is free",
            volume=opened.name,
            uuid=str(row.uuid),
            freed_bytes=blocks * BLOCK_BYTES,
            freed_node_bytes=node_bytes,
        )
        return row

    def _neighbours(self, row: SnapshotRow) -> list[bytes]:
        """Roots that hold what a snapshot shares: its parent's, the head's, and those of what
        descends from it, or was taken when the head had left it already."""
        rows = self._table.of(row.volume)
        roots = [self._pool.catalog.checkpoint(row.volume).state["root"]]
        for other in rows:
            descends = other.parent == row.uuid
            sibling = other.parent == row.parent and other.position > row.position
            if other.uuid == row.parent or descends or sibling:
                roots.append(other.root or b"")
        return [root for root in dict.fromkeys(roots) if root]

    def unique(self, row: SnapshotRow) -> tuple[int, int]:
        """Blocks and node bytes that only this snapshot reaches.

        Its volume is open, and has its nodes held.
        """
        if not row.root:
            return 0, 0
        return self._pool.engine.exclusive(
            self._pool.device, root=row.root, others=self._neighbours(row)
        )

    def release_waits(self, volume: UUID) -> bool:
        """Whether snapshots that are being removed keep their space, as several lines descend."""
        rows = self._table.of(volume)
        return self._table.next_to_release(volume) is None and any(
            row.state == "removing" for row in rows
        )

    # Rolling back

    def rollback(self, volume: str, name: str) -> SnapshotRow:
        """Gives a volume the content and size of one of its snapshots; all snapshots stay.

        Raises:
            BusyError: the volume is attached.
        """
        pool = self._pool
        with pool.lock:
            row = pool.catalog.volume(volume)
            if pool.find_open(row.uuid) is not None:
                raise BusyError(
                    f"volume {pool.name}/{volume} is attached, or space of its snapshots is being "
                    "freed; detach it, then roll it back"
                )
            self.find(volume, name)
            # What a crash left in log and staging goes into a checkpoint, and each snapshot has a
            # root: closing makes one that covers the log to its end.
            with pool.using(volume):
                pass
            target = self.find(volume, name)
            pool.catalog.snapshots.rollback(target.uuid, leftover=uuid_module.uuid4())
            # The new head's state note is the first that is in its log.
            with pool.using(volume):
                pass
            return target

    # Clones

    def clone(
        self, volume: str, name: str, new_volume: str, *, serial: str | None = None
    ) -> VolumeRow:
        """Makes a writable volume with the content of a snapshot, at once; both share their space.

        Raises:
            ExistsError: the name is taken.
        """
        check_name(new_volume, "volume")
        if serial is not None and not (
            serial.isascii() and serial.isprintable() and len(serial) <= SERIAL_MAX_BYTES
        ):
            raise UsageError(
                f"volume {self._pool.name}/{new_volume}: serial {serial!r} is not possible; choose "
                f"at most {SERIAL_MAX_BYTES} printable ASCII characters"
            )
        row, _ = self.with_root(volume, name)
        with self._pool.lock:
            clone = self._pool.catalog.add_clone(name=new_volume, snapshot=row.uuid, serial=serial)
        # Opened once, so that its state note is in a segment of its own: without that the clone
        # would go with the catalog.
        with self._pool.using(new_volume):
            pass
        return clone

    def check_clone(self, volume: str) -> VolumeRow:
        """The volume, if it is a clone.

        Raises:
            UsageError: it is not.
        """
        row = self._pool.catalog.volume(volume)
        if row.origin is None:
            raise UsageError(
                f"volume {self._pool.name}/{volume} is no clone; there is nothing to flatten"
            )
        return row

    def flatten(self, volume: UUID, progress: Progress) -> list[str]:
        """Copies what a clone shares with its origin; the names of snapshots that still share it.

        None left: the clone is a volume like any other. May be repeated, and goes on where it was;
        the guest may go on writing.
        """
        catalog = self._pool.catalog
        with self._pool.using_uuid(volume, background=True) as opened:
            if catalog.volume_by_uuid(volume).flattened_position is None:
                self._adopt_all(opened, progress)
                opened.checkpoint()
                left = opened.engine.foreign_blocks()
                if left:
                    raise InternalError(
                        f"volume {opened.name} still has {left} blocks of its origin; please "
                        "report this with the log"
                    )
                catalog.flattened(volume, catalog.checkpoint(volume).position)
            flattened = catalog.volume_by_uuid(volume).flattened_position or 0
            sharing = [s for s in self._table.of(volume) if s.position < flattened]
            if not sharing:
                opened.change_noted(lambda: catalog.end_sharing(volume))
            return [self._table.full_name(s.uuid) for s in sharing]

    def _adopt_all(self, opened: OpenVolume, progress: Progress) -> None:
        engine, pool = self._pool.engine, self._pool
        total = pool.catalog.checkpoint(opened.uuid).mapped_blocks * BLOCK_BYTES
        done, at = 0, 0
        start: int | None = 0
        while start is not None:
            # A page at a time: nodes are held only while it is read.
            with opened.nodes_held():
                opened.checkpoint()
                root = pool.catalog.checkpoint(opened.uuid).state["root"]
                ranges, following = engine.difference(
                    pool.device, old=b"", new=root, start=start, limit=DIFFERENCE_RANGES
                )
            for offset, length, mapped in ranges:
                for at in range(offset, offset + length if mapped else offset, ADOPT_STEP_BYTES):
                    step = min(ADOPT_STEP_BYTES, offset + length - at)
                    opened.engine.adopt(at, step)
                    done += step
                    progress(done, max(total, done))
            start = following

    # Differences

    def difference(
        self,
        volume: str,
        old: str | None,
        new: str | None,
        *,
        start: int = 0,
        limit: int = DIFFERENCE_RANGES,
    ) -> Difference:
        """A page of what changed from snapshot `old` (None: from a volume of zeroes, so all that is
        mapped) to snapshot `new` (None: the head).

        For the head of a volume in use each page is of another moment.
        """
        pool = self._pool
        with ExitStack() as stack:
            old_root, old_size_bytes = b"", 0
            if old is not None:
                old_row, old_root = self.with_root(volume, old)
                old_size_bytes = old_row.size_bytes
                stack.enter_context(pool.pinned(old_row.uuid))
            if new is not None:
                new_row, new_root = self.with_root(volume, new)
                new_size_bytes = new_row.size_bytes
                stack.enter_context(pool.pinned(new_row.uuid))
            else:
                opened = stack.enter_context(pool.using(volume))
                stack.enter_context(opened.nodes_held())
                opened.checkpoint(if_needed=True)
                new_root = pool.catalog.checkpoint(opened.uuid).state["root"]
                new_size_bytes = opened.row.size_bytes
            ranges, following = pool.engine.difference(
                pool.device, old=old_root, new=new_root, start=start, limit=limit
            )
            return Difference(ranges, following, old_size_bytes, new_size_bytes)
