"""Where the space of a pool is, and how much of it each volume may take.

Figures (docs/operations.md, "Space"): *allocated* is what the segment files take, as `du` tells;
*live* is data that the head or a snapshot reaches, *dead* what neither does and has not been given
back yet; what remains of allocated is metadata: headers, notes, map nodes, and room written ahead.
So live + dead + metadata = allocated, always.

Limits: a volume may grow to its quota, and as long as what remains of the device (and of the pool's
quota) covers what is reserved for others and not yet used. They are computed now and then and held
by the engine, so that volumes which grow at once can pass the pool's quota by what they write
between two looks; to a volume's own quota every write is held, and only maps and notes pass it.

Any thread may call; calls block for as long as it takes to stat the segments of closed volumes,
once after each closing.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vhostd.errors import NoSpaceError, UsageError, VhostdError
from vhostd.storage.rows import SnapshotRow, VolumeRow
from vhostd.storage.sizes import format_size

if TYPE_CHECKING:
    from vhostd.storage.pool import Pool

__all__ = ["Space"]

BLOCK_BYTES = 4096
WARN_HYSTERESIS_PERCENT = 2


class Space:
    """Of one pool; `Pool.space`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._closed_bytes: dict[UUID, tuple[int, int]] = {}
        self._warned = False

    # Figures

    def pool(self, *, exact: bool = False) -> dict[str, Any]:
        """The pool for people and programs. exact: asks the file system for each segment."""
        pool = self._pool
        free_bytes, total_bytes = pool.device.space()
        row = pool.catalog.pool()
        volumes = [v for v in pool.catalog.volumes() if v.state == "present"]
        used_blocks = sum(used for used, _ in pool.catalog.usage().values())
        if exact:
            allocated_bytes = self._on_device(pool.device.list_segments())
        else:
            allocated_bytes = sum(self.allocated_bytes(volume) for volume in volumes)
        room_bytes = allocated_bytes + free_bytes
        if row.quota_bytes is not None:
            room_bytes = min(room_bytes, row.quota_bytes)
        provisioned_bytes = sum(v.size_bytes for v in volumes)
        return {
            "name": row.name,
            "uuid": str(row.uuid),
            "device": str(pool.path),
            "segment_bytes": row.segment_bytes,
            "created_ns": row.created_ns,
            "volumes": len(volumes),
            "volumes_open": len(pool.open_volumes()),
            "provisioned_bytes": provisioned_bytes,
            "overcommit_percent": round(100 * provisioned_bytes / room_bytes) if room_bytes else 0,
            "used_bytes": used_blocks * BLOCK_BYTES,
            "allocated_bytes": allocated_bytes,
            "reserved_bytes": sum(v.reservation_bytes or 0 for v in volumes),
            "quota_bytes": row.quota_bytes,
            "warn_percent": row.warn_percent,
            "used_percent": self._used_percent(row.quota_bytes, allocated_bytes),
            "status": self._status(),
            "free_bytes": free_bytes,
            "total_bytes": total_bytes,
            "segments_without_owner": len(pool.findings.unknown_volume)
            + len(pool.findings.unreadable),
        }

    def volume(self, name: str) -> dict[str, Any]:
        """What a volume takes, and what of."""
        pool = self._pool
        row = pool.catalog.volume(name)
        segments = [segment["number"] for segment in pool.catalog.segments(row.uuid)]
        sums = pool.catalog.sums(row.uuid)
        live_bytes = sums.live_blocks * BLOCK_BYTES
        dead_bytes = max(0, sums.dead_blocks * BLOCK_BYTES - self._punched_data(row.uuid))
        volume = pool.find_open(row.uuid)
        if volume is not None:
            with suppress(VhostdError):
                stats = volume.stats()
                if "live_blocks" in stats:
                    live_bytes = stats["live_blocks"] * BLOCK_BYTES
                if "dead_blocks" in stats:
                    dead_bytes = max(
                        0, (stats["dead_blocks"] - stats["punched_blocks"]) * BLOCK_BYTES
                    )
            newer = set(pool.device.list_segments()) - pool.catalog.segment_numbers()
            segments += [n for n in newer if pool.owns_segment(n, row)]
        allocated_bytes = self._on_device(segments)
        # Counts and files are not of one moment while guests write.
        live_bytes = min(live_bytes, allocated_bytes)
        dead_bytes = min(dead_bytes, allocated_bytes - live_bytes)
        return {
            "allocated_bytes": allocated_bytes,
            "live_bytes": live_bytes,
            "dead_bytes": dead_bytes,
            "metadata_bytes": allocated_bytes - live_bytes - dead_bytes,
            "punched_bytes": sums.punched_blocks * BLOCK_BYTES,
        }

    def _punched_data(self, uuid: UUID) -> int:
        rows = self._pool.catalog.segments(uuid)
        return sum(row["punched_blocks"] for row in rows if row["kind"] == 1) * BLOCK_BYTES

    def exact(self, name: str, snapshot: str | None = None) -> dict[str, Any]:
        """What each snapshot (or just one) alone holds, and what a clone has of its origin.

        Walks maps.
        """
        pool = self._pool
        with pool.using(name) as opened, opened.nodes_held():
            opened.checkpoint(if_needed=True)
            rows = [row for row in pool.catalog.snapshots.of(opened.uuid) if row.name is not None]
            if snapshot is not None:
                rows = [pool.snapshots.find(name, snapshot)]
            foreign = 0
            if snapshot is None and opened.row.origin is not None:
                foreign = opened.engine.foreign_blocks()
            return {
                "foreign_bytes": foreign * BLOCK_BYTES,
                "snapshots": [self._unique(name, row) for row in rows],
            }

    def _unique(self, volume: str, row: SnapshotRow) -> dict[str, Any]:
        with self._pool.pinned(row.uuid):
            blocks, node_bytes = self._pool.snapshots.unique(row)
        return {
            "name": f"{self._pool.name}/{volume}@{row.name}",
            "referenced_bytes": row.mapped_blocks * BLOCK_BYTES,
            "unique_bytes": blocks * BLOCK_BYTES,
            "unique_map_bytes": node_bytes,
        }

    def _on_device(self, numbers: Iterable[int]) -> int:
        total = 0
        for number in numbers:
            # One that was removed meanwhile takes nothing.
            with suppress(FileNotFoundError):
                total += segment_path(self._pool.path, number).stat().st_blocks * 512
        return total

    def allocated_bytes(self, row: VolumeRow) -> int:
        """What a volume's segments take on the device."""
        volume = self._pool.find_open(row.uuid)
        if volume is not None:
            with suppress(VhostdError, KeyError):
                allocated: int = volume.stats()["allocated_bytes"]
                return allocated
        # A closed volume does not change, and opening it makes a new epoch.
        known = self._closed_bytes.get(row.uuid)
        if known is None or known[0] != row.epoch or volume is not None:
            segments = [segment["number"] for segment in self._pool.catalog.segments(row.uuid)]
            known = (row.epoch, self._on_device(segments))
            self._closed_bytes[row.uuid] = known
        return known[1]

    def forget(self, uuid: UUID) -> None:
        """A volume was closed, or is gone: what was known of it is not true any more."""
        self._closed_bytes.pop(uuid, None)

    # Limits

    def apply_limits(self) -> None:
        """Tells the open volumes how far they may grow now."""
        limits = self.limits()
        for volume in self._pool.open_volumes():
            if volume.uuid in limits:
                volume.set_limit(limits[volume.uuid])

    def limits(self) -> dict[UUID, int | None]:
        """For each open volume, bytes that its segments may take; None: as much as there is."""
        pool = self._pool
        pool_quota_bytes = pool.catalog.pool().quota_bytes
        rows = [row for row in pool.catalog.volumes() if row.state == "present"]
        opened = [row for row in rows if pool.find_open(row.uuid) is not None]
        if pool_quota_bytes is None and not any(row.reservation_bytes for row in rows):
            return {row.uuid: row.quota_bytes for row in opened}
        allocated = {row.uuid: self.allocated_bytes(row) for row in rows}
        free_bytes, _ = pool.device.space()
        if pool_quota_bytes is not None:
            free_bytes = min(free_bytes, max(0, pool_quota_bytes - sum(allocated.values())))
        unmet = {
            row.uuid: max(0, (row.reservation_bytes or 0) - allocated[row.uuid]) for row in rows
        }
        limits: dict[UUID, int | None] = {}
        for row in opened:
            others_bytes = sum(unmet.values()) - unmet[row.uuid]
            limit = allocated[row.uuid] + max(0, free_bytes - others_bytes)
            limits[row.uuid] = limit if row.quota_bytes is None else min(limit, row.quota_bytes)
        return limits

    def check_reservation(
        self, row: VolumeRow, quota_bytes: int | None, reservation_bytes: int | None
    ) -> None:
        """Refuses a reservation that cannot be kept.

        Raises:
            UsageError: it is beyond the volume's quota.
            NoSpaceError: there is less than what would be reserved.
        """
        name = f"{self._pool.name}/{row.name}"
        if reservation_bytes is None:
            return
        if quota_bytes is not None and reservation_bytes > quota_bytes:
            raise UsageError(
                f"volume {name}: a reservation of {format_size(reservation_bytes)} is more than "
                f"its quota of {format_size(quota_bytes)}; make the quota larger, "
                "or the other smaller"
            )
        if reservation_bytes <= (row.reservation_bytes or 0):
            return
        pool = self._pool
        free_bytes, _ = pool.device.space()
        needed_bytes = 0
        allocated_bytes = 0
        for other in pool.catalog.volumes():
            taken_bytes = self.allocated_bytes(other)
            allocated_bytes += taken_bytes
            wanted = reservation_bytes if other.uuid == row.uuid else other.reservation_bytes or 0
            needed_bytes += max(0, wanted - taken_bytes)
        pool_quota_bytes = pool.catalog.pool().quota_bytes
        if pool_quota_bytes is not None:
            free_bytes = min(free_bytes, max(0, pool_quota_bytes - allocated_bytes))
        if needed_bytes > free_bytes:
            raise NoSpaceError(
                f"volume {name}: reserving {format_size(reservation_bytes)} would take "
                f"{format_size(needed_bytes)} of free space with what is reserved for others, and "
                f"pool {pool.name} has {format_size(free_bytes)}; reserve less, or free space"
            )

    # Warning

    def crossed(self) -> str | None:
        """`full` once when the pool passes its threshold, `room` once when it is below again."""
        row = self._pool.catalog.pool()
        used = self._used_percent(row.quota_bytes)
        if not self._warned and used >= row.warn_percent:
            self._warned = True
            return "full"
        if self._warned and used < row.warn_percent - WARN_HYSTERESIS_PERCENT:
            self._warned = False
            return "room"
        return None

    def _used_percent(self, quota_bytes: int | None, allocated_bytes: int | None = None) -> float:
        free_bytes, total_bytes = self._pool.device.space()
        used = 100 * (1 - free_bytes / total_bytes) if total_bytes else 0.0
        if quota_bytes is not None:
            if allocated_bytes is None:
                rows = self._pool.catalog.volumes()
                allocated_bytes = sum(self.allocated_bytes(row) for row in rows)
            used = max(used, 100 * allocated_bytes / quota_bytes)
        return round(used, 1)

    def _status(self) -> str:
        row = self._pool.catalog.pool()
        used = self._used_percent(row.quota_bytes)
        full = used >= 100 or any(volume.device_full for volume in self._pool.open_volumes())
        return "full" if full else "nearly-full" if used >= row.warn_percent else "ok"


def segment_path(device: Path, number: int) -> Path:
    """Where a segment's file is (docs/format.md, "A device that is a directory")."""
    return device / "segments" / f"{number >> 10:011x}" / f"{number:013x}.seg"
