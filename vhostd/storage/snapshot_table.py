"""The catalog's snapshots: which there are, what descends from what, and their way to their end.

    pending ──a checkpoint has the root──▶ present ──remove──▶ removing ──released──▶ (no row)
       └──────────────────remove──────────────────────────────────▲

Invariants:
- Snapshots of a volume form a tree by `parent`, and positions grow from a parent to its children;
  the head hangs on `volumes.parent`.
- A snapshot that a clone is based on, or that is protected, does not begin to be removed.
- A row goes only with the checkpoint that has its space as dead; its children then hang on its
  parent. A snapshot that several lines descend from is not released before one is left.
- The state note in the log is out of date (`state_noted` is 0) from the commit that changes what
  it says until one is written.

Part of `Catalog`, and called as that is: any thread, one transaction a call.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vhostd.errors import BusyError, ExistsError, NotFoundError, UsageError
from vhostd.storage.database import Database
from vhostd.storage.rows import SnapshotRow

if TYPE_CHECKING:
    from vhostd._native import FoundSnapshot, ParentSnapshot, SnapshotRoot

__all__ = ["MAX_ROLLBACKS", "MAX_SNAPSHOTS", "SnapshotTable", "refuse_clones"]

MAX_SNAPSHOTS = 4096
"""Of a volume, those that are being removed included."""
MAX_ROLLBACKS = 4096
_SHOWN_NAMES = 8

_SELECT = (
    "SELECT s.uuid, v.uuid, s.name, s.guid, p.uuid, s.position, s.size_bytes, s.state, s.root,"
    " s.mapped_blocks, s.protected, s.quiesced, s.created_ns FROM snapshots s"
    " JOIN volumes v ON v.id = s.volume LEFT JOIN snapshots p ON p.id = s.parent"
)


class SnapshotTable:
    """The tables `snapshots` and `rollbacks`, and the columns of `volumes` that go with them."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # What there is

    def of(self, volume: UUID) -> list[SnapshotRow]:
        """All of a volume in the order of the log, those that are being removed included."""
        rows = self._db.all(
            f"{_SELECT} WHERE v.uuid = ? ORDER BY s.position, s.id", (volume.bytes,)
        )
        return [_snapshot(row) for row in rows]

    def removing(self) -> list[tuple[str, UUID]]:
        """For each volume with snapshots that are being removed: its name and UUID."""
        rows = self._db.all(
            "SELECT DISTINCT v.name, v.uuid FROM snapshots s JOIN volumes v ON v.id = s.volume"
            " WHERE s.state = 'removing' AND v.state = 'present' ORDER BY v.name"
        )
        return [(name, UUID(bytes=uuid)) for name, uuid in rows]

    def find(self, volume: UUID, name: str) -> SnapshotRow:
        """The snapshot of that name.

        Raises:
            NotFoundError: there is none.
        """
        row = self._db.one(f"{_SELECT} WHERE v.uuid = ? AND s.name = ?", (volume.bytes, name))
        if row is None:
            full = self._volume_name(volume)
            raise NotFoundError(
                f"snapshot {full}@{name} does not exist; `vhostctl snapshot list {full}` shows "
                "those that do"
            )
        return _snapshot(row)

    def get(self, uuid: UUID) -> SnapshotRow | None:
        """The snapshot of that UUID, in any state."""
        row = self._db.one(f"{_SELECT} WHERE s.uuid = ?", (uuid.bytes,))
        return None if row is None else _snapshot(row)

    def full_name(self, uuid: UUID) -> str:
        """`pool/volume@name`, with the UUID in the place of the name of one being removed."""
        row = self._db.one(
            "SELECT p.name || '/' || v.name, s.name FROM pool p, snapshots s"
            " JOIN volumes v ON v.id = s.volume WHERE s.uuid = ?",
            (uuid.bytes,),
        )
        return str(uuid) if row is None else f"{row[0]}@{row[1] or uuid}"

    def clones(self, snapshot: UUID) -> list[str]:
        """Names of the volumes that are clones of a snapshot."""
        rows = self._db.all(
            "SELECT v.name FROM volumes v JOIN snapshots s ON s.id = v.origin WHERE s.uuid = ?"
            " AND v.state = 'present' ORDER BY v.name",
            (snapshot.bytes,),
        )
        return [row[0] for row in rows]

    def rollbacks(self, volume: UUID) -> list[tuple[int, int]]:
        """(position, to) of the rollbacks of a volume that its log still needs, oldest first."""
        return self._db.all(
            "SELECT position, to_position FROM rollbacks"
            " WHERE volume = (SELECT id FROM volumes WHERE uuid = ?) ORDER BY position",
            (volume.bytes,),
        )

    def head_parent(self, volume: UUID) -> ParentSnapshot | None:
        """What the engine compares ages with: the head's nearest ancestor that has a root."""
        rows = {row.uuid: row for row in self.of(volume)}
        parent = self._db.one(
            "SELECT s.uuid FROM volumes v JOIN snapshots s ON s.id = v.parent WHERE v.uuid = ?",
            (volume.bytes,),
        )
        at = rows.get(UUID(bytes=parent[0])) if parent else None
        while at is not None and at.root is None:
            at = rows.get(at.parent) if at.parent else None
        return None if at is None else {"position": at.position, "root": at.root or b""}

    # Making

    def check_new(self, volume: UUID, name: str) -> None:
        """Refuses a name that is taken, and one snapshot too many.

        Raises:
            ExistsError, BusyError.
        """
        count, taken = self._db.all(
            "SELECT count(*), coalesce(sum(name = ?), 0) FROM snapshots"
            " WHERE volume = (SELECT id FROM volumes WHERE uuid = ?)",
            (name, volume.bytes),
        )[0]
        if taken:
            raise ExistsError(
                f"snapshot {self._volume_name(volume)}@{name} exists already; choose another name"
            )
        if count >= MAX_SNAPSHOTS:
            raise BusyError(
                f"volume {self._volume_name(volume)} has {count} snapshots, and more than "
                f"{MAX_SNAPSHOTS} are not possible; remove some, and wait until `vhostctl snapshot "
                "list --all` does not show them any more"
            )

    def add(
        self,
        volume: UUID,
        *,
        uuid: UUID,
        name: str,
        position: int,
        size_bytes: int,
        created_ns: int,
        quiesced: bool = False,
        guid: UUID | None = None,
    ) -> SnapshotRow:
        """A snapshot whose note is durable in the log. The head descends from it now.

        Raises:
            InternalError: its position is not behind that of the snapshot before it.
        """
        with self._db.transaction() as db:
            volume_id = _id_of(db, volume)
            self._insert(
                db, volume_id, uuid, name, position, size_bytes, created_ns, quiesced, guid
            )
            if guid is not None:
                # Its note in the log does not tell this.
                db.execute("UPDATE volumes SET state_noted = 0 WHERE id = ?", (volume_id,))
        made = self.get(uuid)
        if made is None:
            raise self._db.broken("a snapshot that was added is not there")
        return made

    def add_found(self, volume: UUID, found: Iterable[FoundSnapshot]) -> list[SnapshotRow]:
        """Snapshots of which recovery found the note: a row for each that has none yet.

        A crash came between the note and the row. Their names may be taken meanwhile.
        """
        added = []
        for note in found:
            uuid = UUID(bytes=note["uuid"])
            with self._db.transaction() as db:
                row = db.execute(
                    "SELECT position FROM snapshots WHERE uuid = ?", (uuid.bytes,)
                ).fetchone()
                if row is not None:
                    self._db.require(
                        row[0] == note["position"], f"snapshot {uuid} is at two places of the log"
                    )
                    continue
                volume_id = _id_of(db, volume)
                name = _free_name(db, volume_id, note["name"], uuid)
                self._insert(
                    db, volume_id, uuid, name, note["position"], note["size_bytes"],
                    note["created_ns"], False, None,
                )  # fmt: skip
            made = self.get(uuid)
            if made is not None:
                added.append(made)
        return added

    def _insert(
        self,
        db: sqlite3.Connection,
        volume_id: int,
        uuid: UUID,
        name: str | None,
        position: int,
        size_bytes: int,
        created_ns: int,
        quiesced: bool,
        guid: UUID | None,
        root: tuple[bytes, int] | None = None,
    ) -> None:
        # One that was lost sight of has its place in the head's line before those that came later.
        child, parent = None, db.execute(
            "SELECT parent FROM volumes WHERE id = ?", (volume_id,)
        ).fetchone()[0]  # fmt: skip
        while parent is not None:
            its_position, its_parent = db.execute(
                "SELECT position, parent FROM snapshots WHERE id = ?", (parent,)
            ).fetchone()
            if its_position < position:
                break
            self._db.require(its_position > position, f"two snapshots are at position {position}")
            child, parent = parent, its_parent
        made = db.execute(
            "INSERT INTO snapshots (uuid, volume, name, guid, parent, position, size_bytes, state,"
            " root, mapped_blocks, quiesced, created_ns)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                uuid.bytes,
                volume_id,
                name,
                (guid or uuid).bytes,
                parent,
                position,
                size_bytes,
                "pending" if name is not None else "removing",
                None if root is None else root[0],
                0 if root is None else root[1],
                quiesced,
                created_ns,
            ),
        ).lastrowid
        if child is None:
            db.execute("UPDATE volumes SET parent = ? WHERE id = ?", (made, volume_id))
        else:
            db.execute("UPDATE snapshots SET parent = ? WHERE id = ?", (made, child))

    # Changing

    def rename(self, snapshot: UUID, name: str) -> None:
        """Gives it another name.

        Raises:
            ExistsError: that is taken.
            NotFoundError: the snapshot is being removed.
        """
        with self._db.transaction() as db:
            taken = db.execute(
                "SELECT uuid FROM snapshots WHERE name = ? AND volume ="
                " (SELECT volume FROM snapshots WHERE uuid = ?)",
                (name, snapshot.bytes),
            ).fetchone()
            if taken is not None:
                full = self.full_name(UUID(bytes=taken[0]))
                raise ExistsError(f"snapshot {full} exists already; choose another name")
            self._change(db, snapshot, "name = ?", name)

    def protect(self, snapshot: UUID, protected: bool) -> None:
        """Protects it from being removed, or no longer."""
        with self._db.transaction() as db:
            self._change(db, snapshot, "protected = ?", int(protected))

    def _change(self, db: sqlite3.Connection, snapshot: UUID, what: str, value: Any) -> None:
        done = db.execute(
            f"UPDATE snapshots SET {what} WHERE uuid = ? AND state != 'removing'",  # noqa: S608
            (value, snapshot.bytes),
        ).rowcount
        if done != 1:
            raise NotFoundError(
                f"snapshot {self.full_name(snapshot)} is being removed; `vhostctl snapshot list` "
                "shows those that exist"
            )
        db.execute(
            "UPDATE volumes SET state_noted = 0 WHERE id ="
            " (SELECT volume FROM snapshots WHERE uuid = ?)",
            (snapshot.bytes,),
        )

    # Removing

    def begin_removal(self, snapshots: Sequence[UUID]) -> None:
        """Marks snapshots as being removed, all or none: they have no name any more.

        Raises:
            BusyError: one is protected, or clones need it.
        """
        with self._db.transaction() as db:
            for uuid in snapshots:
                row = db.execute(
                    "SELECT protected, state FROM snapshots WHERE uuid = ?", (uuid.bytes,)
                ).fetchone()
                if row is None or row[1] == "removing":
                    continue
                name = f"snapshot {self.full_name(uuid)}"
                if row[0]:
                    raise BusyError(
                        f"{name} is protected; `vhostctl snapshot unprotect` it first, then remove "
                        "it"
                    )
                refuse_clones(db, "s.uuid = ?", uuid.bytes, name)
                self._change(db, uuid, "state = 'removing', name = ?", None)

    def next_to_release(self, volume: UUID) -> SnapshotRow | None:
        """One that is being removed and that at most one line descends from; the newest first."""
        row = self._db.one(
            f"{_SELECT} WHERE v.uuid = ? AND s.state = 'removing'"  # noqa: S608
            " AND (SELECT count(*) FROM snapshots c WHERE c.parent = s.id)"
            " + coalesce(v.parent = s.id, 0) <= 1 ORDER BY s.position DESC LIMIT 1",
            (volume.bytes,),
        )
        return None if row is None else _snapshot(row)

    def begin_release(self, snapshot: UUID) -> None:
        """From now on the head descends from the snapshot's parent, if it did from it.

        Only with one line descending from it: what the head replaces of it dies at once then.
        """
        with self._db.transaction() as db:
            db.execute(
                "UPDATE volumes SET parent = (SELECT parent FROM snapshots WHERE uuid = ?1)"
                " WHERE parent = (SELECT id FROM snapshots WHERE uuid = ?1 AND state = 'removing')"
                " AND NOT EXISTS (SELECT 1 FROM snapshots c JOIN snapshots s ON c.parent = s.id"
                " WHERE s.uuid = ?1)",
                (snapshot.bytes,),
            )

    def give_roots(
        self,
        db: sqlite3.Connection,
        volume_id: int,
        roots: Iterable[SnapshotRoot],
        covered: int,
    ) -> None:
        """Within a checkpoint's transaction: what was pending has a root. covered: end of the log
        that the checkpoint covers, as an address."""
        for root in roots:
            uuid = UUID(bytes=root["uuid"])
            row = db.execute(
                "SELECT volume, position, root FROM snapshots WHERE uuid = ?", (uuid.bytes,)
            ).fetchone()
            if row is None:
                # Its creation failed behind the note; nobody was told of it. It is cleaned up.
                size_bytes = db.execute(
                    "SELECT size_bytes FROM volumes WHERE id = ?", (volume_id,)
                ).fetchone()[0]
                self._insert(
                    db, volume_id, uuid, None, root["position"], size_bytes, time.time_ns(), False,
                    None, (root["root"], root["mapped_blocks"]),
                )  # fmt: skip
                continue
            self._db.require(
                row == (volume_id, root["position"], None),
                f"snapshot {uuid} has another owner, place or root",
            )
            db.execute(
                "UPDATE snapshots SET root = ?, mapped_blocks = ?, state = CASE state"
                " WHEN 'pending' THEN 'present' ELSE state END WHERE uuid = ?",
                (root["root"], root["mapped_blocks"], uuid.bytes),
            )
        left = db.execute(
            "SELECT count(*) FROM snapshots WHERE volume = ? AND root IS NULL AND position < ?",
            (volume_id, covered),
        ).fetchone()[0]
        self._db.require(
            left == 0, f"{left} snapshots would be behind the checkpoint without a root"
        )

    def forget(self, db: sqlite3.Connection, volume_id: int, snapshots: Iterable[UUID]) -> None:
        """Within a checkpoint's transaction: rows whose space is dead go."""
        for uuid in snapshots:
            row = db.execute(
                "SELECT id, parent, state FROM snapshots WHERE uuid = ? AND volume = ?",
                (uuid.bytes, volume_id),
            ).fetchone()
            self._db.require(
                row is not None and row[2] == "removing", f"snapshot {uuid} is not being removed"
            )
            identity, parent, _ = row
            lines = db.execute(
                "SELECT (SELECT count(*) FROM snapshots WHERE parent = ?1)"
                " + (SELECT count(*) FROM volumes WHERE parent = ?1)",
                (identity,),
            ).fetchone()[0]
            self._db.require(lines <= 1, f"{lines} lines descend from snapshot {uuid}")
            db.execute("UPDATE snapshots SET parent = ? WHERE parent = ?", (parent, identity))
            db.execute("UPDATE volumes SET parent = ? WHERE parent = ?", (parent, identity))
            db.execute("DELETE FROM snapshots WHERE id = ?", (identity,))

    # Rolling back

    def rollback(self, snapshot: UUID, *, leftover: UUID) -> bool:
        """Gives the head the root, size and parent of a snapshot; its volume is closed.

        What the head alone had goes as a nameless snapshot, `leftover`, that is being removed;
        False if there is nothing of that.

        Raises:
            InternalError: the last checkpoint does not cover the snapshot.
            BusyError: the volume was rolled back too often.
        """
        with self._db.transaction() as db:
            target = db.execute(
                "SELECT s.id, s.volume, s.position, s.root, s.mapped_blocks, s.size_bytes"
                " FROM snapshots s WHERE s.uuid = ? AND s.state = 'present'",
                (snapshot.bytes,),
            ).fetchone()
            self._db.require(target is not None, f"snapshot {snapshot} has no root")
            identity, volume_id, position, root, mapped_blocks, size_bytes = target
            head = db.execute(
                "SELECT c.root, c.mapped_blocks, c.segment << 13 | c.end_block, v.size_bytes,"
                " v.parent FROM checkpoints c JOIN volumes v ON v.id = c.volume WHERE c.volume = ?",
                (volume_id,),
            ).fetchone()
            self._db.require(head is not None and head[2] > position, "the log ends before it")
            old_root, old_mapped, end, old_size, old_parent = head
            parent_root = db.execute(
                "SELECT root FROM snapshots WHERE id = ?", (old_parent,)
            ).fetchone()
            leaves = parent_root is None or parent_root[0] != old_root
            if leaves:
                db.execute(
                    "INSERT INTO snapshots (uuid, volume, guid, parent, position, size_bytes,"
                    " state, root, mapped_blocks, created_ns)"
                    " VALUES (?, ?, ?, ?, ?, ?, 'removing', ?, ?, ?)",
                    (
                        leftover.bytes, volume_id, leftover.bytes, old_parent, end, old_size,
                        old_root, old_mapped, time.time_ns(),
                    ),
                )  # fmt: skip
            db.execute(
                "UPDATE checkpoints SET root = ?, mapped_blocks = ? WHERE volume = ?",
                (root, mapped_blocks, volume_id),
            )
            db.execute(
                "UPDATE volumes SET size_bytes = ?, parent = ?, state_noted = 0,"
                " flattened_position = CASE WHEN flattened_position <= ?"
                " THEN flattened_position END"
                " WHERE id = ?",
                (size_bytes, identity, position, volume_id),
            )
            self._add_rollback(db, volume_id, end, position)
        return leaves

    def _add_rollback(self, db: sqlite3.Connection, volume_id: int, at: int, to: int) -> None:
        # An older one within what is now abandoned is needed only for snapshots, and targets of
        # rollbacks, that lie between the two.
        db.execute(
            "DELETE FROM rollbacks WHERE volume = ?1 AND position > ?3"
            " AND NOT EXISTS (SELECT 1 FROM snapshots s WHERE s.volume = ?1"
            "  AND s.state != 'removing' AND s.position > rollbacks.position)"
            " AND NOT EXISTS (SELECT 1 FROM rollbacks r WHERE r.volume = ?1"
            "  AND r.to_position > rollbacks.position)",
            (volume_id, at, to),
        )
        db.execute("INSERT OR REPLACE INTO rollbacks VALUES (?, ?, ?)", (volume_id, at, to))
        count = db.execute(
            "SELECT count(*) FROM rollbacks WHERE volume = ?", (volume_id,)
        ).fetchone()[0]
        if count > MAX_ROLLBACKS:
            raise BusyError(
                f"the volume was rolled back {MAX_ROLLBACKS} times, and its log cannot tell more "
                "apart; make a clone of the snapshot instead, or export the volume and import it"
            )

    def _volume_name(self, volume: UUID) -> str:
        row = self._db.one(
            "SELECT p.name || '/' || v.name FROM pool p, volumes v WHERE v.uuid = ?",
            (volume.bytes,),
        )
        return str(volume) if row is None else str(row[0])


def refuse_clones(db: sqlite3.Connection, which: str, parameter: bytes, what: str) -> None:
    """Raises BusyError with their names if there are clones of the snapshots `s` that `which`
    selects."""
    names = [
        row[0]
        for row in db.execute(
            "SELECT p.name || '/' || c.name FROM pool p, volumes c"  # noqa: S608
            f" JOIN snapshots s ON s.id = c.origin WHERE {which} ORDER BY c.name",
            (parameter,),
        )
    ]
    if names:
        shown = ", ".join(names[:_SHOWN_NAMES])
        more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
        raise BusyError(
            f"{what} has clones: {shown}{more}; remove them, or make them independent with "
            "`vhostctl volume flatten`"
        )


def _id_of(db: sqlite3.Connection, volume: UUID) -> int:
    row = db.execute(
        "SELECT id FROM volumes WHERE uuid = ? AND state = 'present'", (volume.bytes,)
    ).fetchone()
    if row is None:
        raise NotFoundError(
            f"volume {volume} is gone or being removed; `vhostctl volume list` shows those that "
            "exist"
        )
    identity: int = row[0]
    return identity


def _free_name(db: sqlite3.Connection, volume_id: int, name: str, uuid: UUID) -> str:
    """`name`, or one made of it if that is taken."""
    for candidate in (name, f"{name[:100]}-{uuid.hex[:8]}"):
        taken = db.execute(
            "SELECT 1 FROM snapshots WHERE volume = ? AND name = ?", (volume_id, candidate)
        ).fetchone()
        if taken is None:
            return candidate
    raise UsageError(f"snapshot {uuid}: its name {name} is taken; rename the other one")


def _snapshot(row: tuple[Any, ...]) -> SnapshotRow:
    uuid, volume, name, guid, parent, *rest = row
    position, size_bytes, state, root, mapped_blocks, protected, quiesced, created_ns = rest
    return SnapshotRow(
        UUID(bytes=uuid),
        UUID(bytes=volume),
        name,
        UUID(bytes=guid),
        None if parent is None else UUID(bytes=parent),
        position,
        size_bytes,
        state,
        root,
        mapped_blocks,
        bool(protected),
        bool(quiesced),
        created_ns,
    )
