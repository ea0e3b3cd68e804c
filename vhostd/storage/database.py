"""The SQLite file under the catalog: connection, transactions, and what errors of SQLite mean.

A transaction is durable when its block ends (WAL, synchronous=FULL), and leaves nothing when it
raises. Any thread may call; a lock makes one transaction of each call.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vhostd.errors import (
    DamagedError,
    DeviceError,
    InternalError,
    NoSpaceError,
    UnsupportedError,
    VhostdError,
)
from vhostd.storage.schema import APPLICATION_ID, SCHEMA_VERSION

__all__ = ["Database", "check_database", "connect", "translated"]

BUSY_TIMEOUT_S = 5.0


class Database:
    """An open connection."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self.path = path
        self.lock = threading.RLock()

    def close(self) -> None:
        """Closes; the write-ahead log is folded into the file by SQLite."""
        with self.lock:
            self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One durable change."""
        with self.lock:
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self.connection
                    self.connection.execute("COMMIT")
                except BaseException:
                    # After some errors (a full disk) SQLite has rolled back by itself.
                    if self.connection.in_transaction:
                        self.connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise translated(error, self.path) from error

    def all(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self.lock:
            try:
                return self.connection.execute(sql, parameters).fetchall()
            except sqlite3.Error as error:
                raise translated(error, self.path) from error

    def one(self, sql: str, parameters: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
        """The first row of a query."""
        rows = self.all(sql, parameters)
        return rows[0] if rows else None

    def require(self, holds: bool, broken: str) -> None:
        """An invariant of a commit.

        Raises:
            InternalError: it does not hold.
        """
        if not holds:
            raise self.broken(broken)

    def broken(self, reason: str) -> InternalError:
        """What a commit that breaks an invariant is answered with."""
        return InternalError(
            f"{self.path}: a commit was refused because {reason}; the catalog is unchanged, "
            "please report this with the log"
        )

    def damaged(self, reason: str) -> DamagedError:
        """What a catalog that contradicts itself is answered with."""
        return DamagedError(_damaged_message(self.path, reason))


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Opens a file that exists (`rw`, `ro`), or makes it (`rwc`)."""
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


def check_database(connection: sqlite3.Connection, path: Path) -> None:
    """Refuses what is not a whole catalog of this version.

    Raises:
        UnsupportedError: it is of another version.
        DamagedError: it is no catalog, or damaged.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION_ID:
        raise DamagedError(_damaged_message(path, "it is not the catalog of a pool"))
    if version > SCHEMA_VERSION:
        raise UnsupportedError(
            f"{path} has schema version {version}, and this vhostd knows {SCHEMA_VERSION}; "
            "use the vhostd that made it or a newer one"
        )
    if version == 1:
        raise UnsupportedError(
            f"{path} has schema version 1, of a vhostd that was never released, and this one knows "
            f"{SCHEMA_VERSION}; export its volumes with the vhostd that made it, and import them"
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
        "not touched by this: `vhostctl pool rebuild-catalog` makes a new catalog out of them"
    )


def translated(error: sqlite3.Error, path: Path) -> VhostdError:
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
