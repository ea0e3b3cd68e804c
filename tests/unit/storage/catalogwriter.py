"""A second writer of the catalog, from `docs/format.md` alone, for the pools of `poolwriter`."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import UUID

TABLES = """
CREATE TABLE pool (id INTEGER PRIMARY KEY, uuid BLOB, name TEXT, segment_bytes INTEGER,
    next_segment INTEGER, created_ns INTEGER) STRICT;
CREATE TABLE devices (uuid BLOB PRIMARY KEY, state TEXT, added_ns INTEGER) STRICT;
CREATE TABLE volumes (id INTEGER PRIMARY KEY, uuid BLOB, name TEXT, size_bytes INTEGER,
    logical_block_bytes INTEGER, serial TEXT, epoch INTEGER, state TEXT, created_ns INTEGER,
    parent INTEGER, origin INTEGER, quota_bytes INTEGER, reservation_bytes INTEGER, on_full TEXT,
    state_noted INTEGER) STRICT;
CREATE TABLE snapshots (id INTEGER PRIMARY KEY, uuid BLOB, volume INTEGER, name TEXT, guid BLOB,
    parent INTEGER, position INTEGER, size_bytes INTEGER, state TEXT, root BLOB,
    mapped_blocks INTEGER, protected INTEGER, quiesced INTEGER, created_ns INTEGER) STRICT;
CREATE TABLE rollbacks (volume INTEGER, position INTEGER, to_position INTEGER) STRICT;
CREATE TABLE checkpoints (volume INTEGER PRIMARY KEY, root BLOB, segment INTEGER,
    end_block INTEGER, sequence INTEGER, record_checksum INTEGER, mapped_blocks INTEGER,
    epoch INTEGER, committed_ns INTEGER) STRICT;
CREATE TABLE segments (number INTEGER PRIMARY KEY, volume INTEGER, kind INTEGER, sealed INTEGER,
    used_blocks INTEGER, live INTEGER, dead BLOB, punched_blocks INTEGER, notes INTEGER,
    unmaps INTEGER) STRICT;
"""


class CatalogWriter:
    """An open catalog, in WAL mode."""

    def __init__(
        self, directory: Path, *, uuid: UUID, name: str, segment_bytes: int, device: UUID
    ) -> None:
        self.db = sqlite3.connect(directory / "catalog.sqlite", isolation_level=None)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.executescript(TABLES)
        self.db.execute("PRAGMA application_id = 0x56484344")
        self.db.execute("PRAGMA user_version = 2")
        self.insert("pool", 1, uuid.bytes, name, segment_bytes, 1 + (1 << 16), 5)
        self.insert("devices", device.bytes, "online", 5)

    def insert(self, table: str, *values: Any) -> None:
        marks = ", ".join("?" * len(values))
        self.db.execute(f"INSERT INTO {table} VALUES ({marks})", values)

    def identity(self, table: str, uuid: UUID | None) -> int | None:
        """The row that has the UUID."""
        if uuid is None:
            return None
        row = self.db.execute(f"SELECT id FROM {table} WHERE uuid = ?", (uuid.bytes,)).fetchone()
        assert row is not None
        found: int = row[0]
        return found

    def add_volume(self, uuid: UUID, name: str, size_bytes: int, origin: UUID | None) -> None:
        self.insert(
            "volumes",
            None,
            uuid.bytes,
            name,
            size_bytes,
            4096,
            uuid.hex[:20],
            0,
            "present",
            5,
            None,
            self.identity("snapshots", origin),
            None,
            None,
            "ioerr",
            1,
        )

    def next_epoch(self, uuid: UUID) -> int:
        self.db.execute("UPDATE volumes SET epoch = epoch + 1 WHERE uuid = ?", (uuid.bytes,))
        row = self.db.execute("SELECT epoch FROM volumes WHERE uuid = ?", (uuid.bytes,)).fetchone()
        epoch: int = row[0]
        return epoch

    def commit(
        self,
        volume: UUID,
        checkpoint: tuple[Any, ...],
        segments: Iterable[tuple[Any, ...]],
        removed: Iterable[int],
    ) -> None:
        """A checkpoint: what `checkpoints` has behind the volume, and rows of `segments` (number,
        then all behind the volume)."""
        identity = self.identity("volumes", volume)
        self.db.execute("BEGIN")
        self.db.execute("DELETE FROM checkpoints WHERE volume = ?", (identity,))
        self.insert("checkpoints", identity, *checkpoint)
        for number in removed:
            self.db.execute("DELETE FROM segments WHERE number = ?", (number,))
        for number, *rest in segments:
            self.db.execute("DELETE FROM segments WHERE number = ?", (number,))
            self.insert("segments", number, identity, *rest)
        self.db.execute("COMMIT")

    def close(self) -> None:
        self.db.close()
