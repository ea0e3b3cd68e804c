"""The state note of a volume: what its log says of it beside its blocks (`docs/format.md`, "Note").

With it, and the snapshot notes behind it, the catalog can be made again from segments alone. What
stands in it is what the catalog has committed; `volumes.state_noted` tells whether the log has it.

Reads the catalog; any thread.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import msgspec

from vhostd.errors import BusyError
from vhostd.storage.catalog import Catalog

__all__ = ["VERSION", "check_room", "state_note"]

VERSION = 1
SNAPSHOT_BYTES = 384
"""What one more snapshot can add to a note."""


def state_note(catalog: Catalog, uuid: UUID) -> bytes:
    """The payload of the note for what the catalog has of a volume now."""
    row = catalog.volume_by_uuid(uuid)
    origin: dict[str, Any] | None = None
    if row.origin is not None and (of := catalog.snapshots.get(row.origin)) is not None:
        origin = {"volume": str(of.volume), "snapshot": str(of.uuid), "position": of.position}
    return msgspec.json.encode(
        {
            "version": VERSION,
            "volume": {
                "name": row.name,
                "size_bytes": row.size_bytes,
                "logical_block_bytes": row.logical_block_bytes,
                "serial": row.serial,
                "created_ns": row.created_ns,
            },
            "origin": origin,
            "snapshots": [
                {
                    "uuid": str(snapshot.uuid),
                    "guid": str(snapshot.guid),
                    "name": snapshot.name,
                    "position": snapshot.position,
                    "size_bytes": snapshot.size_bytes,
                    "created_ns": snapshot.created_ns,
                    "protected": snapshot.protected,
                }
                for snapshot in catalog.snapshots.of(uuid)
                if snapshot.name is not None
            ],
            "rollbacks": [
                {"position": position, "to": to}
                for position, to in catalog.snapshots.rollbacks(uuid)
            ],
        }
    )


def check_room(name: str, note_bytes: int, segment_bytes: int) -> None:
    """Refuses one more snapshot if the state note could not be written any more.

    A note is within one segment, and half of one is left for everything else.

    Raises:
        BusyError: there are too many for segments of this size.
    """
    if note_bytes + SNAPSHOT_BYTES > segment_bytes // 2:
        raise BusyError(
            f"volume {name} has as many snapshots as segments of {segment_bytes} bytes can "
            "describe; remove some first"
        )
