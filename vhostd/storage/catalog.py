"""The catalog of a pool: which volumes there are, and the last checkpoint of each.

Invariants, checked at each commit:
- A change is one transaction and durable (WAL, synchronous=FULL) when the method returns.
- A volume's epoch only grows; a checkpoint is taken only from the epoch that is current.
- A checkpoint never goes back in the log, and names only segments whose numbers were granted.
- A snapshot that the log behind the checkpoint does not hold any more has its root from it.
- What is dead stays dead, and is never counted as live.
- A segment keeps its volume and kind; once sealed it stays sealed; its number is granted once.

Touched per checkpoint and per management operation, never per I/O. Any thread may call; a lock
makes one transaction of each call. Only the process that holds the device's lock opens it for
writing.
"""

from __future__ import annotations

import sqlite3
import time
import uuid as uuid_module
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vhostd.errors import BusyError, ExistsError, NoSpaceError, NotFoundError, VhostdError
from vhostd.storage.database import Database, check_database, connect, translated
from vhostd.storage.deadset import check_dead_set
from vhostd.storage.rows import (
    Checkpoint,
    PoolRow,
    SegmentSums,
    VolumeRow,
    no_checkpoint,
)
from vhostd.storage.schema import APPLICATION_ID, SCHEMA, SCHEMA_VERSION
from vhostd.storage.snapshot_table import SnapshotTable, refuse_clones

if TYPE_CHECKING:
    from vhostd._native import CheckpointResult, SegmentRow

__all__ = ["FILE_NAME", "Catalog", "Checkpoint", "PoolRow", "VolumeRow"]

FILE_NAME = "catalog.sqlite"
MAX_SEGMENT = (1 << 50) - 1
"""Numbers have 51 bits; positions in the log, which are 13 bits longer, have to fit SQLite's signed
64 bits."""


class Catalog:
    """An open catalog. Make it with `create` or `open`, and close it."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db = Database(connection, path)
        self.path = path
        self.snapshots = SnapshotTable(self._db)

    # Opening

    @classmethod
    def create(
        cls, directory: Path, *, uuid: UUID, name: str, segment_bytes: int, device_uuid: UUID
    ) -> Catalog:
        """Makes the catalog of a new pool.

        Raises:
            ExistsError: there is one.
            DeviceError, NoSpaceError: it cannot be written.
        """
        path = directory / FILE_NAME
        if path.exists():
            raise ExistsError(f"{path} exists already; use the pool it belongs to or remove it")
        now_ns = time.time_ns()
        connection = None
        try:
            connection = connect(path, "rwc")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(
                "INSERT INTO pool (id, uuid, name, segment_bytes, next_segment, created_ns)"
                " VALUES (1, ?, ?, ?, 1, ?)",
                (uuid.bytes, name, segment_bytes, now_ns),
            )
            connection.execute(
                "INSERT INTO devices VALUES (?, 'online', ?)", (device_uuid.bytes, now_ns)
            )
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            raise translated(error, path) from error
        return cls(connection, path)

    @classmethod
    def open(cls, directory: Path, *, read_only: bool = False) -> Catalog:
        """Opens and checks the catalog.

        Raises:
            NotFoundError: there is none.
            DamagedError: it is not a catalog, or not a whole one.
            UnsupportedError: a newer vhostd made it, or one from before the first release.
        """
        path = directory / FILE_NAME
        if not path.exists():
            raise NotFoundError(
                f"{path} does not exist: {directory} has lost its catalog or is no pool; "
                "restore the file from a copy of the device"
            )
        connection = None
        try:
            connection = connect(path, "ro" if read_only else "rw")
            check_database(connection, path)
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            raise translated(error, path) from error
        except VhostdError:
            if connection is not None:
                connection.close()
            raise
        return cls(connection, path)

    def close(self) -> None:
        """Closes; the write-ahead log is folded into the file by SQLite."""
        self._db.close()

    # The pool

    def pool(self) -> PoolRow:
        """The pool's own row."""
        row = self._db.one(
            "SELECT uuid, name, segment_bytes, next_segment, created_ns, quota_bytes, warn_percent"
            " FROM pool"
        )
        if row is None:
            raise self._db.damaged("it names no pool")
        return PoolRow(UUID(bytes=row[0]), *row[1:])

    def device_uuids(self) -> list[UUID]:
        """The devices of the pool."""
        return [UUID(bytes=row[0]) for row in self._db.all("SELECT uuid FROM devices")]

    def grant_segments(self, count: int) -> tuple[int, int]:
        """Takes `count` segment numbers that were never granted: the first, and the one behind.

        Raises:
            NoSpaceError: the 51 bits are used up.
        """
        with self._db.transaction() as db:
            first: int = db.execute("SELECT next_segment FROM pool").fetchone()[0]
            if first + count - 1 > MAX_SEGMENT:
                raise NoSpaceError(
                    f"{self.path}: the segment numbers of the pool are used up; "
                    "make a new pool and copy the volumes"
                )
            db.execute("UPDATE pool SET next_segment = ?", (first + count,))
        return first, first + count

    # Volumes

    def volumes(self) -> list[VolumeRow]:
        """All volumes by name, those that are being removed included."""
        return [_volume(row) for row in self._db.all(f"{_SELECT_VOLUME} ORDER BY v.name")]

    def volume(self, name: str) -> VolumeRow:
        """The volume of that name.

        Raises:
            NotFoundError: there is none, or it is being removed.
        """
        row = self._db.one(f"{_SELECT_VOLUME} WHERE v.name = ? AND v.state = 'present'", (name,))
        if row is None:
            raise NotFoundError(
                f"volume {name} does not exist in pool {self.pool().name}; "
                "`vhostctl volume list` shows those that do"
            )
        return _volume(row)

    def volume_by_uuid(self, uuid: UUID) -> VolumeRow:
        """The volume of that UUID, in any state.

        Raises:
            NotFoundError: there is none.
        """
        row = self._db.one(f"{_SELECT_VOLUME} WHERE v.uuid = ?", (uuid.bytes,))
        if row is None:
            raise NotFoundError(
                f"volume {uuid} is gone; `vhostctl volume list` shows those that exist"
            )
        return _volume(row)

    def add_volume(
        self, *, name: str, size_bytes: int, logical_block_bytes: int, serial: str | None = None
    ) -> VolumeRow:
        """Makes a volume that maps nothing. serial: at most 20 bytes; by default of its UUID.

        Raises:
            ExistsError: the name is taken.
        """
        uuid = uuid_module.uuid4()
        # virtio 1.3, 5.2.6: the ID is 20 bytes; 80 bits of the UUID are enough to tell disks apart.
        serial = uuid.hex[:20] if serial is None else serial
        with self._db.transaction() as db:
            self._refuse_taken(db, name)
            db.execute(
                "INSERT INTO volumes (uuid, name, size_bytes, logical_block_bytes, serial, epoch,"
                " state, created_ns) VALUES (?, ?, ?, ?, ?, 0, 'present', ?)",
                (uuid.bytes, name, size_bytes, logical_block_bytes, serial, time.time_ns()),
            )
        return self.volume(name)

    def add_clone(self, *, name: str, snapshot: UUID, serial: str | None = None) -> VolumeRow:
        """Makes a volume whose first root is that of a snapshot which is not pending.

        Raises:
            ExistsError: the name is taken.
            NotFoundError: the snapshot is gone.
        """
        uuid = uuid_module.uuid4()
        serial = uuid.hex[:20] if serial is None else serial
        now_ns = time.time_ns()
        with self._db.transaction() as db:
            self._refuse_taken(db, name)
            row = db.execute(
                "SELECT s.id, s.root, s.mapped_blocks, s.size_bytes, v.logical_block_bytes"
                " FROM snapshots s JOIN volumes v ON v.id = s.volume"
                " WHERE s.uuid = ? AND s.state = 'present' AND v.state = 'present'",
                (snapshot.bytes,),
            ).fetchone()
            if row is None:
                raise NotFoundError(
                    f"the snapshot of which {name} was to be a clone is being removed; "
                    "`vhostctl snapshot list` shows those that exist"
                )
            origin, root, mapped_blocks, size_bytes, logical_block_bytes = row
            made = db.execute(
                "INSERT INTO volumes (uuid, name, size_bytes, logical_block_bytes, serial, epoch,"
                " state, created_ns, origin) VALUES (?, ?, ?, ?, ?, 0, 'present', ?, ?)",
                (uuid.bytes, name, size_bytes, logical_block_bytes, serial, now_ns, origin),
            )
            db.execute(
                "INSERT INTO checkpoints VALUES (?, ?, 0, 0, 0, 0, ?, 0, ?)",
                (made.lastrowid, root, mapped_blocks, now_ns),
            )
        return self.volume(name)

    def rename_volume(self, uuid: UUID, name: str) -> None:
        """Gives a volume another name.

        Raises:
            ExistsError: the name is taken.
        """
        with self._db.transaction() as db:
            self._refuse_taken(db, name)
            self._update(
                db,
                "UPDATE volumes SET name = ?, state_noted = 0 WHERE uuid = ?",
                (name, uuid.bytes),
            )

    def resize_volume(self, uuid: UUID, size_bytes: int) -> None:
        """Changes a volume's size."""
        with self._db.transaction() as db:
            self._update(
                db,
                "UPDATE volumes SET size_bytes = ?, state_noted = 0 WHERE uuid = ?",
                (size_bytes, uuid.bytes),
            )

    def set_volume(self, uuid: UUID, row: VolumeRow) -> None:
        """Gives a volume the `quota_bytes`, `reservation_bytes` and `on_full` of `row`."""
        with self._db.transaction() as db:
            self._update(
                db,
                "UPDATE volumes SET quota_bytes = ?, reservation_bytes = ?, on_full = ?"
                " WHERE uuid = ?",
                (row.quota_bytes, row.reservation_bytes, row.on_full, uuid.bytes),
            )

    def set_pool(self, *, quota_bytes: int | None, warn_percent: int) -> None:
        """Changes the pool's limit and when to warn."""
        with self._db.transaction() as db:
            db.execute(
                "UPDATE pool SET quota_bytes = ?, warn_percent = ?", (quota_bytes, warn_percent)
            )

    def state_noted(self, uuid: UUID) -> None:
        """The log has a state note of what stands here now. Callers hold off changes meanwhile."""
        with self._db.transaction() as db:
            self._update(db, "UPDATE volumes SET state_noted = 1 WHERE uuid = ?", (uuid.bytes,))

    def end_sharing(self, uuid: UUID) -> None:
        """A clone has nothing of its origin any more: it is a volume like any other."""
        with self._db.transaction() as db:
            self._update(
                db,
                "UPDATE volumes SET origin = NULL, flattened_position = NULL, state_noted = 0"
                " WHERE uuid = ?",
                (uuid.bytes,),
            )

    def flattened(self, uuid: UUID, position: int) -> None:
        """The head of a clone has nothing of its origin since `position` of its log."""
        with self._db.transaction() as db:
            self._update(
                db,
                "UPDATE volumes SET flattened_position = ? WHERE uuid = ?",
                (position, uuid.bytes),
            )

    def begin_removal(self, uuid: UUID, *, with_snapshots: bool = False) -> None:
        """Marks a volume as being removed: nobody can open it any more, and its files may go.

        Raises:
            BusyError: clones need its snapshots; or it has some, and they were not meant.
        """
        with self._db.transaction() as db:
            self._refuse_needed(db, uuid, with_snapshots)
            self._update(db, "UPDATE volumes SET state = 'removing' WHERE uuid = ?", (uuid.bytes,))

    def _refuse_needed(self, db: sqlite3.Connection, uuid: UUID, with_snapshots: bool) -> None:
        names = db.execute(
            "SELECT p.name || '/' || v.name, s.name, s.protected FROM pool p, volumes v,"
            " snapshots s WHERE v.uuid = ? AND s.volume = v.id AND s.name IS NOT NULL"
            " ORDER BY s.position",
            (uuid.bytes,),
        ).fetchall()
        refuse_clones(
            db,
            "s.volume = (SELECT id FROM volumes WHERE uuid = ?)",
            uuid.bytes,
            f"volume {names[0][0] if names else uuid}",
        )
        if names and not with_snapshots:
            raise BusyError(
                f"volume {names[0][0]} has {len(names)} snapshots (one is {names[0][1]}); remove "
                "them first, or remove it with --snapshots"
            )
        protected = [name for _, name, is_protected in names if is_protected]
        if protected:
            raise BusyError(
                f"volume {names[0][0]} has {len(protected)} protected snapshots (one is "
                f"{protected[0]}); take their protection away with `vhostctl snapshot unprotect`"
            )

    def finish_removal(self, uuid: UUID) -> None:
        """Forgets a volume whose files are gone."""
        with self._db.transaction() as db:
            self._update(
                db, "DELETE FROM volumes WHERE uuid = ? AND state = 'removing'", (uuid.bytes,)
            )

    def next_epoch(self, uuid: UUID) -> int:
        """Begins a new epoch of a volume and returns it; the previous one is one less."""
        with self._db.transaction() as db:
            self._update(
                db,
                "UPDATE volumes SET epoch = epoch + 1 WHERE uuid = ? AND state = 'present'",
                (uuid.bytes,),
            )
            row = db.execute("SELECT epoch FROM volumes WHERE uuid = ?", (uuid.bytes,)).fetchone()
        epoch: int = row[0]
        return epoch

    # Checkpoints and segments

    def checkpoint(self, uuid: UUID) -> Checkpoint:
        """The last committed checkpoint of a volume."""
        row = self._db.one(
            "SELECT root, segment, end_block, sequence, record_checksum, mapped_blocks,"
            " committed_ns FROM checkpoints WHERE volume = (SELECT id FROM volumes WHERE uuid = ?)",
            (uuid.bytes,),
        )
        if row is None:
            return no_checkpoint()
        keys = ("root", "segment", "end_block", "sequence", "record_checksum")
        state: Any = dict(zip(keys, row[:5], strict=True))
        return Checkpoint(state, row[5], row[6])

    def segments(self, uuid: UUID) -> list[SegmentRow]:
        """The segments of a volume, in the order of their numbers."""
        rows = self._db.all(
            "SELECT number, kind, sealed, used_blocks, live, dead, punched_blocks, notes, unmaps"
            " FROM segments"
            " WHERE volume = (SELECT id FROM volumes WHERE uuid = ?) ORDER BY number",
            (uuid.bytes,),
        )
        return [
            {
                "number": number,
                "kind": kind,
                "sealed": bool(sealed),
                "used_blocks": used_blocks,
                "live": live,
                "dead": dead,
                "punched_blocks": punched_blocks,
                "notes": notes,
                "unmaps": unmaps,
            }
            for number, kind, sealed, used_blocks, live, dead, punched_blocks, notes, unmaps in rows
        ]

    def segment_numbers(self) -> set[int]:
        """The numbers of all segments of the pool."""
        return {row[0] for row in self._db.all("SELECT number FROM segments")}

    def usage(self, uuid: UUID | None = None) -> dict[UUID, tuple[int, int]]:
        """For each volume, or just one: blocks written to its segments, and blocks its last
        checkpoint maps."""
        rows = self._db.all(
            "SELECT uuid, (SELECT coalesce(sum(used_blocks), 0) FROM segments WHERE volume = id),"
            " coalesce((SELECT mapped_blocks FROM checkpoints WHERE volume = id), 0) FROM volumes"
            " WHERE ?1 IS NULL OR uuid = ?1",
            (None if uuid is None else uuid.bytes,),
        )
        return {UUID(bytes=uuid): (used, mapped) for uuid, used, mapped in rows}

    def sums(self, uuid: UUID) -> SegmentSums:
        """What a volume's segments come to."""
        rows = self.segments(uuid)
        log = [row for row in rows if row["kind"] == 1]
        nodes = [row for row in rows if row["kind"] == 2]
        return SegmentSums(
            log_segments=len(log),
            map_segments=len(nodes),
            used_blocks=sum(row["used_blocks"] for row in rows),
            punched_blocks=sum(row["punched_blocks"] for row in rows),
            live_blocks=sum(row["live"] for row in log),
            dead_blocks=sum(int.from_bytes(row["dead"], "little").bit_count() for row in log),
            map_live_bytes=sum(row["live"] for row in nodes),
        )

    def commit_checkpoint(
        self,
        uuid: UUID,
        epoch: int,
        result: CheckpointResult,
        *,
        released: Sequence[UUID] = (),
    ) -> None:
        """Makes a checkpoint the volume's state, in one transaction.

        Snapshots that were pending get their roots. released: snapshots that are being removed and
        whose space this checkpoint has as dead; they are forgotten.

        Raises:
            InternalError: it breaks an invariant; nothing was changed.
            NoSpaceError, DeviceError: it cannot be written; nothing was changed.
        """
        state = result["state"]
        with self._db.transaction() as db:
            row = db.execute(
                "SELECT id, epoch, state FROM volumes WHERE uuid = ?", (uuid.bytes,)
            ).fetchone()
            if row is None:
                raise self._db.broken(f"volume {uuid} is not in the catalog")
            volume, current_epoch, volume_state = row
            self._db.require(volume_state == "present", f"volume {uuid} is being removed")
            self._db.require(
                epoch == current_epoch, f"epoch {epoch} is over; {current_epoch} is current"
            )
            self._check_position(db, volume, result)
            self._change_segments(db, volume, result)
            db.execute(
                "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    volume,
                    state["root"],
                    state["segment"],
                    state["end_block"],
                    state["sequence"],
                    state["record_checksum"],
                    result["mapped_blocks"],
                    epoch,
                    time.time_ns(),
                ),
            )
            covered = state["segment"] << 13 | state["end_block"]
            self.snapshots.give_roots(db, volume, result["snapshots"], covered)
            self.snapshots.forget(db, volume, released)

    def _check_position(
        self, db: sqlite3.Connection, volume: int, result: CheckpointResult
    ) -> None:
        new = result["state"]
        old = db.execute(
            "SELECT sequence, segment, end_block, record_checksum FROM checkpoints"
            " WHERE volume = ?",
            (volume,),
        ).fetchone()
        sequence, segment, end_block, checksum = old or (0, 0, 0, 0)
        self._db.require(
            new["sequence"] >= sequence,
            f"sequence {new['sequence']} is before the committed {sequence}",
        )
        self._db.require(
            (new["segment"], new["end_block"]) >= (segment, end_block),
            f"log position {new['segment']}:{new['end_block']} is before the committed "
            f"{segment}:{end_block}",
        )
        self._db.require(
            old is None or new["sequence"] != sequence or new["record_checksum"] == checksum,
            f"record {sequence} has two checksums",
        )
        self._db.require(
            result["mapped_blocks"] == 0 or new["root"] != b"", "blocks are mapped without a root"
        )

    def _change_segments(
        self, db: sqlite3.Connection, volume: int, result: CheckpointResult
    ) -> None:
        next_segment = db.execute("SELECT next_segment FROM pool").fetchone()[0]
        removed = set(result["removed"])
        for row in result["changed"]:
            number = row["number"]
            self._db.require(0 < number < next_segment, f"segment {number} was never granted")
            self._db.require(number not in removed, f"segment {number} is changed and removed")
            old = db.execute(
                "SELECT volume, kind, sealed, dead FROM segments WHERE number = ?", (number,)
            ).fetchone()
            self._db.require(
                old is None or old[:2] == (volume, row["kind"]),
                f"segment {number} has another owner or kind",
            )
            self._db.require(
                old is None or row["sealed"] or not old[2], f"segment {number} was sealed already"
            )
            broken = check_dead_set(row, old[3] if old else b"")
            self._db.require(broken is None, f"segment {number}: {broken}")
            db.execute(
                "INSERT OR REPLACE INTO segments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    number,
                    volume,
                    row["kind"],
                    row["sealed"],
                    row["used_blocks"],
                    row["live"],
                    row["dead"],
                    row["punched_blocks"],
                    row["notes"],
                    row["unmaps"],
                ),
            )
        for number in removed:
            # A segment that came and went between two checkpoints never had a row.
            db.execute("DELETE FROM segments WHERE number = ? AND volume = ?", (number, volume))
            self._db.require(
                db.execute("SELECT 1 FROM segments WHERE number = ?", (number,)).fetchone() is None,
                f"segment {number} is another volume's",
            )

    # Helpers

    def _update(self, db: sqlite3.Connection, sql: str, parameters: tuple[Any, ...]) -> None:
        if db.execute(sql, parameters).rowcount != 1:
            raise NotFoundError(
                f"{self.path}: the volume is gone or being removed; "
                "`vhostctl volume list` shows those that exist"
            )

    def _refuse_taken(self, db: sqlite3.Connection, name: str) -> None:
        row = db.execute("SELECT state FROM volumes WHERE name = ?", (name,)).fetchone()
        if row is not None:
            pool = db.execute("SELECT name FROM pool").fetchone()[0]
            state = "exists already" if row[0] == "present" else "is still being removed"
            raise ExistsError(f"volume {pool}/{name} {state}; choose another name")


_SELECT_VOLUME = (
    "SELECT v.uuid, v.name, v.size_bytes, v.logical_block_bytes, v.serial, v.epoch, v.state,"
    " v.created_ns, p.uuid, o.uuid, v.flattened_position, v.quota_bytes, v.reservation_bytes,"
    " v.on_full, v.state_noted FROM volumes v LEFT JOIN snapshots p ON p.id = v.parent"
    " LEFT JOIN snapshots o ON o.id = v.origin"
)


def _volume(row: tuple[Any, ...]) -> VolumeRow:
    uuid, parent, origin = (None if row[i] is None else UUID(bytes=row[i]) for i in (0, 8, 9))
    values: tuple[Any, ...] = (uuid, *row[1:8], parent, origin, *row[10:14], bool(row[14]))
    return VolumeRow(*values)
