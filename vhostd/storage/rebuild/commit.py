"""Puts rebuilt volumes into a catalog: rows of volumes, snapshots, checkpoints, segments.

Each function is called inside one transaction of its caller, who has the device locked.
"""

from __future__ import annotations

import sqlite3
import time
from typing import TYPE_CHECKING
from uuid import UUID

from vhostd.storage.rebuild.plan import Lines, VolumePlan

if TYPE_CHECKING:
    from vhostd._native import RebuiltVolume

__all__ = ["add_volume", "put_maps", "set_lines"]


def add_volume(db: sqlite3.Connection, plan: VolumePlan) -> int:
    """A volume and its snapshots, without maps; the volume's row. Its origin is there already."""
    origin = None
    if plan.origin is not None:
        origin = db.execute(
            "SELECT id FROM snapshots WHERE uuid = ?", (plan.origin[1].bytes,)
        ).fetchone()[0]
    made = db.execute(
        "INSERT INTO volumes (uuid, name, size_bytes, logical_block_bytes, serial, epoch, state,"
        " created_ns, origin, state_noted) VALUES (?, ?, ?, ?, ?, ?, 'present', ?, ?, 0)",
        (
            plan.uuid.bytes,
            plan.name,
            plan.size_bytes,
            plan.logical_block_bytes,
            plan.serial,
            plan.epoch,
            plan.created_ns,
            origin,
        ),
    )
    volume = made.lastrowid
    assert volume is not None
    for snapshot in plan.snapshots:
        db.execute(
            "INSERT INTO snapshots (uuid, volume, name, guid, position, size_bytes, state, root,"
            " mapped_blocks, protected, created_ns)"
            " VALUES (?, ?, ?, ?, ?, ?, 'present', x'', 0, ?, ?)",
            (
                snapshot.uuid.bytes,
                volume,
                snapshot.name,
                snapshot.guid.bytes,
                snapshot.position,
                snapshot.size_bytes,
                snapshot.protected,
                snapshot.created_ns,
            ),
        )
    db.executemany(
        "INSERT INTO rollbacks VALUES (?, ?, ?)", [(volume, at, to) for at, to in plan.rollbacks]
    )
    return volume


def set_lines(db: sqlite3.Connection, volume: int, plan: VolumePlan) -> None:
    """Which snapshot descends from which."""
    lines = Lines.of(plan)
    for uuid, parent in lines.parents.items():
        db.execute(
            "UPDATE snapshots SET parent = (SELECT p.id FROM snapshots p WHERE p.uuid = ?)"
            " WHERE uuid = ?",
            (_bytes(parent), uuid.bytes),
        )
    db.execute(
        "UPDATE volumes SET parent = (SELECT id FROM snapshots WHERE uuid = ?) WHERE id = ?",
        (_bytes(lines.head), volume),
    )


def put_maps(db: sqlite3.Connection, volume: int, plan: VolumePlan, rebuilt: RebuiltVolume) -> None:
    """Replaces the checkpoint, the segments and the roots of the snapshots."""
    state = rebuilt["state"]
    db.execute("DELETE FROM checkpoints WHERE volume = ?", (volume,))
    db.execute(
        "INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            volume,
            state["root"],
            state["segment"],
            state["end_block"],
            state["sequence"],
            state["record_checksum"],
            rebuilt["mapped_blocks"],
            plan.epoch,
            time.time_ns(),
        ),
    )
    for snapshot in rebuilt["snapshots"]:
        db.execute(
            "UPDATE snapshots SET state = 'present', root = ?, mapped_blocks = ? WHERE uuid = ?",
            (snapshot["root"], snapshot["mapped_blocks"], snapshot["uuid"]),
        )
    db.execute("DELETE FROM segments WHERE volume = ?", (volume,))
    for row in rebuilt["segments"]:
        db.execute(
            "INSERT INTO segments (number, volume, kind, sealed, used_blocks, live, dead,"
            " punched_blocks, notes, unmaps) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                row["number"],
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


def _bytes(uuid: UUID | None) -> bytes | None:
    return uuid.bytes if uuid is not None else None
