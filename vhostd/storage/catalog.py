"""The catalog of a pool: which volumes there are, and the last checkpoint of each.

Invariants, checked at each commit:
- A change is one transaction and durable (WAL, synchronous=FULL) when the method returns.
- A volume's epoch only grows; a checkpoint is taken only from the epoch that is current.
- A checkpoint never goes back in the log, and names only segments whose numbers were granted.
- A segment keeps its volume and kind; once sealed it stays sealed; its number is granted once.

Touched per checkpoint and per management operation, never per I/O. Any thread may call; a lock
makes one transaction of each call. Only the process that holds the device's lock opens it for
writing.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid as uuid_module
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vhostd.errors import (
    DamagedError,
    DeviceError,
    ExistsError,
    InternalError,
    NoSpaceError,
    NotFoundError,
    UnsupportedError,
    VhostdError,
)
from vhostd.storage.schema import APPLICATION_ID, SCHEMA, SCHEMA_VERSION

if TYPE_CHECKING:
    from vhostd._native import CheckpointResult, CheckpointState, SegmentRow

__all__ = ["FILE_NAME", "Catalog", "Checkpoint", "PoolRow", "VolumeRow"]

FILE_NAME = "catalog.sqlite"
MAX_SEGMENT = (1 << 51) - 1
BUSY_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class PoolRow:
    """The pool itself. next_segment: the first number that was never granted."""

    uuid: UUID
    name: str
    segment_bytes: int
    next_segment: int
    created_ns: int


@dataclass(frozen=True, slots=True)
class VolumeRow:
    """A volume as the catalog has it. state: `present`, or `removing` until its files are gone."""

    uuid: UUID
    name: str
    size_bytes: int
    logical_block_bytes: int
    serial: str
    epoch: int
    state: str
    created_ns: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The last committed checkpoint of a volume; the zero one if there is none."""

    state: CheckpointState
    mapped_blocks: int
    committed_ns: int


def no_checkpoint() -> Checkpoint:
    """What a volume starts from: an empty map and no log."""
    return Checkpoint(
        {"root": b"", "segment": 0, "end_block": 0, "sequence": 0, "record_checksum": 0}, 0, 0
    )


class Catalog:
    """An open catalog. Make it with `create` or `open`, and close it."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._lock = threading.RLock()
        self.path = path

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
            connection = _connect(path, "rwc")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(
                "INSERT INTO pool VALUES (1, ?, ?, ?, 1, ?)",
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
            raise _translated(error, path) from error
        return cls(connection, path)

    @classmethod
    def open(cls, directory: Path, *, read_only: bool = False) -> Catalog:
        """Opens and checks the catalog.

        Raises:
            NotFoundError: there is none.
            DamagedError: it is not a catalog, or not a whole one.
            UnsupportedError: a newer vhostd made it.
        """
        path = directory / FILE_NAME
        if not path.exists():
            raise NotFoundError(
                f"{path} does not exist: {directory} has lost its catalog or is no pool; "
                "restore the file from a copy of the device"
            )
        connection = None
        try:
            connection = _connect(path, "ro" if read_only else "rw")
            _check(connection, path)
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            raise _translated(error, path) from error
        except VhostdError:
            if connection is not None:
                connection.close()
            raise
        return cls(connection, path)

    def close(self) -> None:
        """Closes; the write-ahead log is folded into the file by SQLite."""
        with self._lock:
            self._connection.close()

    # The pool

    def pool(self) -> PoolRow:
        """The pool's own row."""
        row = self._one("SELECT uuid, name, segment_bytes, next_segment, created_ns FROM pool")
        if row is None:
            raise self._damaged("it names no pool")
        return PoolRow(UUID(bytes=row[0]), *row[1:])

    def device_uuids(self) -> list[UUID]:
        """The devices of the pool."""
        return [UUID(bytes=row[0]) for row in self._all("SELECT uuid FROM devices")]

    def grant_segments(self, count: int) -> tuple[int, int]:
        """Takes `count` segment numbers that were never granted: the first, and the one behind.

        Raises:
            NoSpaceError: the 51 bits are used up.
        """
        with self._transaction() as db:
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
        return [_volume(row) for row in self._all(f"{_SELECT_VOLUME} ORDER BY name")]

    def volume(self, name: str) -> VolumeRow:
        """The volume of that name.

        Raises:
            NotFoundError: there is none, or it is being removed.
        """
        row = self._one(f"{_SELECT_VOLUME} WHERE name = ? AND state = 'present'", (name,))
        if row is None:
            raise NotFoundError(
                f"volume {name} does not exist in pool {self.pool().name}; "
                "`vhostctl volume list` shows those that do"
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
        with self._transaction() as db:
            self._refuse_taken(db, name)
            db.execute(
                "INSERT INTO volumes (uuid, name, size_bytes, logical_block_bytes, serial, epoch,"
                " state, created_ns) VALUES (?, ?, ?, ?, ?, 0, 'present', ?)",
                (uuid.bytes, name, size_bytes, logical_block_bytes, serial, time.time_ns()),
            )
        return self.volume(name)

    def rename_volume(self, uuid: UUID, name: str) -> None:
        """Gives a volume another name.

        Raises:
            ExistsError: the name is taken.
        """
        with self._transaction() as db:
            self._refuse_taken(db, name)
            self._update(db, "UPDATE volumes SET name = ? WHERE uuid = ?", (name, uuid.bytes))

    def resize_volume(self, uuid: UUID, size_bytes: int) -> None:
        """Changes a volume's size."""
        with self._transaction() as db:
            self._update(
                db, "UPDATE volumes SET size_bytes = ? WHERE uuid = ?", (size_bytes, uuid.bytes)
            )

    def begin_removal(self, uuid: UUID) -> None:
        """Marks a volume as being removed: nobody can open it any more, and its files may go."""
        with self._transaction() as db:
            self._update(db, "UPDATE volumes SET state = 'removing' WHERE uuid = ?", (uuid.bytes,))

    def finish_removal(self, uuid: UUID) -> None:
        """Forgets a volume whose files are gone."""
        with self._transaction() as db:
            self._update(
                db, "DELETE FROM volumes WHERE uuid = ? AND state = 'removing'", (uuid.bytes,)
            )

    def next_epoch(self, uuid: UUID) -> int:
        """Begins a new epoch of a volume and returns it; the previous one is one less."""
        with self._transaction() as db:
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
        row = self._one(
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
        rows = self._all(
            "SELECT number, kind, sealed, used_blocks, live FROM segments"
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
            }
            for number, kind, sealed, used_blocks, live in rows
        ]

    def segment_numbers(self) -> set[int]:
        """The numbers of all segments of the pool."""
        return {row[0] for row in self._all("SELECT number FROM segments")}

    def usage(self) -> dict[UUID, tuple[int, int]]:
        """For each volume: blocks written to its segments, and blocks its last checkpoint maps."""
        rows = self._all(
            "SELECT uuid, (SELECT coalesce(sum(used_blocks), 0) FROM segments WHERE volume = id),"
            " coalesce((SELECT mapped_blocks FROM checkpoints WHERE volume = id), 0) FROM volumes"
        )
        return {UUID(bytes=uuid): (used, mapped) for uuid, used, mapped in rows}

    def commit_checkpoint(self, uuid: UUID, epoch: int, result: CheckpointResult) -> None:
        """Makes a checkpoint the volume's state, in one transaction.

        Raises:
            InternalError: it breaks an invariant; nothing was changed.
            NoSpaceError, DeviceError: it cannot be written; nothing was changed.
        """
        state = result["state"]
        with self._transaction() as db:
            row = db.execute(
                "SELECT id, epoch, state FROM volumes WHERE uuid = ?", (uuid.bytes,)
            ).fetchone()
            if row is None:
                raise self._broken(f"volume {uuid} is not in the catalog")
            volume, current_epoch, volume_state = row
            self._require(volume_state == "present", f"volume {uuid} is being removed")
            self._require(
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
        self._require(
            new["sequence"] >= sequence,
            f"sequence {new['sequence']} is before the committed {sequence}",
        )
        self._require(
            (new["segment"], new["end_block"]) >= (segment, end_block),
            f"log position {new['segment']}:{new['end_block']} is before the committed "
            f"{segment}:{end_block}",
        )
        self._require(
            old is None or new["sequence"] != sequence or new["record_checksum"] == checksum,
            f"record {sequence} has two checksums",
        )
        self._require(
            result["mapped_blocks"] == 0 or new["root"] != b"", "blocks are mapped without a root"
        )

    def _change_segments(
        self, db: sqlite3.Connection, volume: int, result: CheckpointResult
    ) -> None:
        next_segment = db.execute("SELECT next_segment FROM pool").fetchone()[0]
        removed = set(result["removed"])
        for row in result["changed"]:
            number = row["number"]
            self._require(0 < number < next_segment, f"segment {number} was never granted")
            self._require(number not in removed, f"segment {number} is changed and removed")
            old = db.execute(
                "SELECT volume, kind, sealed FROM segments WHERE number = ?", (number,)
            ).fetchone()
            self._require(
                old is None or old[:2] == (volume, row["kind"]),
                f"segment {number} has another owner or kind",
            )
            self._require(
                old is None or row["sealed"] or not old[2], f"segment {number} was sealed already"
            )
            db.execute(
                "INSERT OR REPLACE INTO segments VALUES (?, ?, ?, ?, ?, ?)",
                (number, volume, row["kind"], row["sealed"], row["used_blocks"], row["live"]),
            )
        for number in removed:
            # A segment that came and went between two checkpoints never had a row.
            db.execute("DELETE FROM segments WHERE number = ? AND volume = ?", (number, volume))
            self._require(
                db.execute("SELECT 1 FROM segments WHERE number = ?", (number,)).fetchone() is None,
                f"segment {number} is another volume's",
            )

    # Helpers

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    # After some errors (a full disk) SQLite has rolled back by itself.
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise _translated(error, self.path) from error

    def _all(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._connection.execute(sql, parameters).fetchall()
            except sqlite3.Error as error:
                raise _translated(error, self.path) from error

    def _one(self, sql: str, parameters: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
        rows = self._all(sql, parameters)
        return rows[0] if rows else None

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

    def _require(self, holds: bool, broken: str) -> None:
        if not holds:
            raise self._broken(broken)

    def _broken(self, reason: str) -> InternalError:
        return InternalError(
            f"{self.path}: a commit was refused because {reason}; the catalog is unchanged, "
            "please report this with the log"
        )

    def _damaged(self, reason: str) -> DamagedError:
        return DamagedError(_damaged_message(self.path, reason))


_SELECT_VOLUME = (
    "SELECT uuid, name, size_bytes, logical_block_bytes, serial, epoch, state, created_ns"
    " FROM volumes"
)


def _volume(row: tuple[Any, ...]) -> VolumeRow:
    return VolumeRow(UUID(bytes=row[0]), *row[1:])


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")
    # What a hostile or damaged file could make SQLite do is limited to reading it.
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    return connection


def _check(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION_ID:
        raise DamagedError(_damaged_message(path, "it is not the catalog of a pool"))
    if version > SCHEMA_VERSION:
        raise UnsupportedError(
            f"{path} has schema version {version}, and this vhostd knows {SCHEMA_VERSION}; "
            "use the vhostd that made it or a newer one"
        )
    if version != SCHEMA_VERSION:
        raise DamagedError(_damaged_message(path, f"it has schema version {version}"))
    findings = [row[0] for row in connection.execute("PRAGMA quick_check(4)")]
    if findings != ["ok"]:
        raise DamagedError(_damaged_message(path, "; ".join(map(str, findings))))
    if connection.execute("PRAGMA foreign_key_check").fetchone() is not None:
        raise DamagedError(_damaged_message(path, "rows refer to rows that are missing"))
    if connection.execute("SELECT count(*) FROM pool").fetchone()[0] != 1:
        raise DamagedError(_damaged_message(path, "it names no pool"))
    if connection.execute(
        "SELECT 1 FROM segments WHERE number >= (SELECT next_segment FROM pool)"
    ).fetchone():
        raise DamagedError(_damaged_message(path, "it names segments that were never granted"))


def _damaged_message(path: Path, reason: str) -> str:
    return (
        f"catalog {path} is damaged: {reason}. Nothing was changed. The data in the segments is "
        "not touched by this: keep the whole directory as it is, and restore the catalog with its "
        "-wal file from a copy of the device"
    )


def _translated(error: sqlite3.Error, path: Path) -> VhostdError:
    """The error of vhostd that an error of SQLite is."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    error_name = getattr(error, "sqlite_errorname", "")
    # The file that SQLite shares between processes is extended apart from the write-ahead log.
    if code == sqlite3.SQLITE_FULL or error_name == "SQLITE_IOERR_SHMSIZE":
        return NoSpaceError(f"catalog {path} cannot be written: the device is full; free space")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT):
        return DamagedError(_damaged_message(path, str(error)))
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return DeviceError(
            f"catalog {path} cannot be written: {error}; make the directory and the file "
            "writable for the user that vhostd runs as"
        )
    if code == sqlite3.SQLITE_IOERR:
        return DeviceError(f"catalog {path}: the device failed ({error}); see the kernel's log")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return DeviceError(
            f"catalog {path} is locked by another program; end that program and try again"
        )
    if isinstance(error, sqlite3.OperationalError) and "no such" in str(error):
        return DamagedError(_damaged_message(path, str(error)))
    return InternalError(f"catalog {path}: {error}; please report this with the log")
