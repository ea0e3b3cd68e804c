"""The catalog as it is at one moment, read without a trace and held in memory.

Reading never changes the device: an idle catalog is opened as immutable, since opening an SQLite
database in WAL mode otherwise leaves `-shm` and `-wal` files behind; one with a write-ahead log
that nobody is using (a crash) is copied and the copy opened; only a catalog that a daemon has
open is read in place, beside it, in one read transaction.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from vhostd.storage.format.device import CATALOG_FILE
from vhostd.storage.format.errors import FormatError, Place

__all__ = [
    "APPLICATION_ID",
    "SCHEMA_VERSION",
    "CatalogCheckpoint",
    "CatalogContents",
    "CatalogPool",
    "CatalogSegment",
    "CatalogSnapshot",
    "CatalogVolume",
    "read_catalog",
]

APPLICATION_ID = 0x56484344
SCHEMA_VERSION = 2
_BUSY_TIMEOUT_S = 5.0
_STRUCTURE = "catalog"


@dataclass(frozen=True, slots=True)
class CatalogPool:
    """The one row of `pool`."""

    uuid: UUID
    name: str
    segment_bytes: int
    next_segment: int


@dataclass(frozen=True, slots=True)
class CatalogCheckpoint:
    """A row of `checkpoints`."""

    root: bytes
    segment: int
    end_block: int
    sequence: int
    record_checksum: int
    mapped_blocks: int
    epoch: int


@dataclass(frozen=True, slots=True)
class CatalogSegment:
    """A row of `segments`, without its volume."""

    number: int
    kind: int
    sealed: bool
    used_blocks: int
    live: int
    dead: bytes = b""
    punched_blocks: int = 0
    notes: int = 0
    unmaps: int = 0


@dataclass(frozen=True, slots=True)
class CatalogSnapshot:
    """A row of `snapshots`, without its volume. name: None in one that is being removed."""

    uuid: UUID
    guid: UUID
    name: str | None
    parent: UUID | None
    position: int
    size_bytes: int
    state: str
    root: bytes
    mapped_blocks: int
    protected: bool
    created_ns: int


@dataclass(frozen=True, slots=True)
class CatalogVolume:
    """A row of `volumes` with what refers to it; segments in the order of their numbers, snapshots
    and rollbacks (position, to) in the order of their positions.

    parent: the head's. origin: (volume, snapshot) that a clone began with.
    """

    uuid: UUID
    name: str
    size_bytes: int
    epoch: int
    state: str
    checkpoint: CatalogCheckpoint | None
    segments: tuple[CatalogSegment, ...]
    logical_block_bytes: int = 4096
    parent: UUID | None = None
    origin: tuple[UUID, UUID] | None = None
    state_noted: bool = True
    snapshots: tuple[CatalogSnapshot, ...] = ()
    rollbacks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class CatalogContents:
    """The catalog at one moment. problems: what SQLite says is wrong with the file."""

    pool: CatalogPool
    devices: frozenset[UUID]
    volumes: tuple[CatalogVolume, ...]
    problems: tuple[str, ...] = ()


def read_catalog(directory: Path, *, in_use: bool) -> CatalogContents:
    """Reads the catalog of the device at `directory`. in_use: a daemon may be writing to it.

    Raises:
        FormatError: it is damaged, or of a newer version.
        OSError: the operating system refused to let it be read.
    """
    path = directory / CATALOG_FILE
    with path.open("rb"):
        pass  # what keeps us from reading is the system's to say, in its words
    log = path.with_name(f"{path.name}-wal")
    try:
        if in_use:
            return _read(path, "mode=ro")
        if not log.exists() or log.stat().st_size == 0:
            return _read(path, "mode=ro&immutable=1")
        with tempfile.TemporaryDirectory(prefix="vhostd-check-") as scratch:
            copy = Path(scratch) / path.name
            shutil.copyfile(path, copy)
            shutil.copyfile(log, copy.with_name(log.name))
            return _read(copy, "mode=rw")
    except (sqlite3.Error, LookupError, TypeError, ValueError, OverflowError) as error:
        # A damaged file can hand out any type in any column.
        raise FormatError(_STRUCTURE, "database", Place(str(path)), str(error)) from error


def _read(path: Path, mode: str) -> CatalogContents:
    uri = f"{path.absolute().as_uri()}?{mode}"
    with closing(
        sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    ) as db:
        db.text_factory = _text
        # A damaged or hostile file can make SQLite do no more than read it.
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA cell_size_check = ON")
        db.execute("BEGIN")
        _check_version(db, path)
        problems = tuple(
            str(row[0]) for row in db.execute("PRAGMA integrity_check(8)") if row[0] != "ok"
        )
        try:
            return CatalogContents(_pool(db, path), _devices(db), _volumes(db), problems)
        except (sqlite3.Error, LookupError, TypeError, ValueError, OverflowError) as error:
            reasons = "; ".join((str(error), *problems))
            raise FormatError(_STRUCTURE, "database", Place(str(path)), reasons) from error


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    place = Place(str(path))
    if application != APPLICATION_ID:
        reason = f"it is {application:#x}: not the catalog of a pool"
        raise FormatError(_STRUCTURE, "application_id", place, reason)
    if version != SCHEMA_VERSION:
        reason = f"it is {version}, and this reader knows {SCHEMA_VERSION}"
        raise FormatError(_STRUCTURE, "user_version", place, reason, newer=version > SCHEMA_VERSION)


def _pool(db: sqlite3.Connection, path: Path) -> CatalogPool:
    rows = db.execute("SELECT uuid, name, segment_bytes, next_segment FROM pool").fetchall()
    if len(rows) != 1:
        raise FormatError(_STRUCTURE, "pool", Place(str(path)), f"{len(rows)} rows, not one")
    uuid, name, segment_bytes, next_segment = rows[0]
    return CatalogPool(_uuid(uuid), str(name), _number(segment_bytes), _number(next_segment))


def _devices(db: sqlite3.Connection) -> frozenset[UUID]:
    return frozenset(_uuid(row[0]) for row in db.execute("SELECT uuid FROM devices"))


def _volumes(db: sqlite3.Connection) -> tuple[CatalogVolume, ...]:
    owners, snapshots = _snapshots(db)
    rollbacks: dict[int, list[tuple[int, int]]] = {}
    for volume, position, to in db.execute(
        "SELECT volume, position, to_position FROM rollbacks ORDER BY position"
    ):
        rollbacks.setdefault(_number(volume), []).append((_number(position), _number(to)))
    rows = db.execute(
        "SELECT id, uuid, name, size_bytes, epoch, state, logical_block_bytes, parent, origin,"
        " state_noted FROM volumes ORDER BY name"
    ).fetchall()
    uuids = {row[0]: _uuid(row[1]) for row in rows}
    volumes = []
    for identity, uuid, name, size_bytes, epoch, state, logical, parent, origin, noted in rows:
        volumes.append(
            CatalogVolume(
                _uuid(uuid),
                str(name),
                _number(size_bytes),
                _number(epoch),
                str(state),
                _checkpoint(db, identity),
                _segments(db, identity),
                _number(logical),
                owners[parent][1] if parent is not None else None,
                (uuids[owners[origin][0]], owners[origin][1]) if origin is not None else None,
                bool(noted),
                tuple(snapshots.get(identity, ())),
                tuple(rollbacks.get(identity, ())),
            )
        )
    return tuple(volumes)


def _snapshots(
    db: sqlite3.Connection,
) -> tuple[dict[int, tuple[int, UUID]], dict[int, list[CatalogSnapshot]]]:
    """Of all volumes: by row (volume's row, UUID); and by the volume's row, oldest first."""
    rows = db.execute(
        "SELECT id, uuid, volume, name, guid, parent, position, size_bytes, state, root,"
        " mapped_blocks, protected, created_ns FROM snapshots ORDER BY position"
    ).fetchall()
    owners = {row[0]: (_number(row[2]), _uuid(row[1])) for row in rows}
    found: dict[int, list[CatalogSnapshot]] = {}
    for (
        _,
        uuid,
        volume,
        name,
        guid,
        parent,
        position,
        size_bytes,
        state,
        root,
        mapped_blocks,
        protected,
        created_ns,
    ) in rows:
        snapshot = CatalogSnapshot(
            _uuid(uuid),
            _uuid(guid),
            None if name is None else str(name),
            owners[parent][1] if parent is not None else None,
            _number(position),
            _number(size_bytes),
            str(state),
            b"" if root is None else _blob(root),
            _number(mapped_blocks),
            bool(protected),
            _number(created_ns),
        )
        found.setdefault(volume, []).append(snapshot)
    return owners, found


def _checkpoint(db: sqlite3.Connection, volume: int) -> CatalogCheckpoint | None:
    row = db.execute(
        "SELECT root, segment, end_block, sequence, record_checksum, mapped_blocks, epoch"
        " FROM checkpoints WHERE volume = ?",
        (volume,),
    ).fetchone()
    if row is None:
        return None
    root, *numbers = row
    return CatalogCheckpoint(_blob(root), *map(_number, numbers))


def _segments(db: sqlite3.Connection, volume: int) -> tuple[CatalogSegment, ...]:
    rows = db.execute(
        "SELECT number, kind, sealed, used_blocks, live, dead, punched_blocks, notes, unmaps"
        " FROM segments WHERE volume = ? ORDER BY number",
        (volume,),
    )
    return tuple(
        CatalogSegment(
            _number(number),
            _number(kind),
            bool(sealed),
            _number(used_blocks),
            _number(live),
            _blob(dead),
            *map(_number, counts),
        )
        for number, kind, sealed, used_blocks, live, dead, *counts in rows
    )


def _uuid(value: Any) -> UUID:
    if not isinstance(value, bytes) or len(value) != 16:
        raise TypeError(f"{value!r} is not a UUID of 16 bytes")
    return UUID(bytes=value)


def _blob(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"{value!r} is not a BLOB")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is not a number from 0 up")
    return value


def _text(data: bytes) -> str:
    """Text for people: bytes that are no UTF-8 are shown, not refused."""
    return data.decode("utf-8", "replace")
