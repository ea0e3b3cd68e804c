"""What a daemon does with snapshots and clones, when people or programs ask it to.

Taking a snapshot waits for no other change: a guest may be frozen for it. Everything else is one
change at a time, as in `daemon`; what takes long is left to `jobs`.

All methods run on the event loop's thread; what blocks goes to helper threads.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

from vhostd.errors import BusyError
from vhostd.storage.names import SnapshotName, VolumeName
from vhostd.storage.snapshots import time_name

if TYPE_CHECKING:
    from vhostd.daemon import Daemon

__all__ = ["SnapshotCalls"]


class SnapshotCalls:
    """`Daemon.snapshots`."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._log = structlog.get_logger()

    async def create(
        self,
        name: VolumeName | SnapshotName,
        *,
        quiesced: bool = False,
        guid: UUID | None = None,
    ) -> dict[str, Any]:
        """Takes a snapshot; without a name it is called by the time.

        quiesced: the caller has had the guest freeze its file systems, and lets it go on after.
        """
        if isinstance(name, VolumeName):
            name = SnapshotName(name.pool, name.volume, time_name(time.time_ns()))
        if self._daemon.stopping.is_set():
            raise BusyError(f"snapshot {name} is not taken: the daemon is stopping")
        pool = self._daemon.pool(name.pool)
        self._daemon.receives.refuse(name.of)
        await asyncio.to_thread(
            pool.snapshots.create, name.volume, name.snapshot, quiesced=quiesced, guid=guid
        )
        self._log.info("snapshot taken", snapshot=str(name), quiesced=quiesced)
        return await self.info(name)

    async def list_all(
        self,
        volume: VolumeName | None = None,
        pool: str | None = None,
        *,
        removing: bool = False,
    ) -> list[dict[str, Any]]:
        """The snapshots of a volume, of a pool, or all; with those that are being removed."""
        if volume is not None:
            opened = self._daemon.pool(volume.pool)
            return await asyncio.to_thread(
                opened.snapshots.describe, volume.volume, removing=removing
            )
        rows: list[dict[str, Any]] = []
        for opened in [self._daemon.pool(pool)] if pool else self._daemon.pools():
            volumes = await asyncio.to_thread(opened.catalog.volumes)
            for row in volumes:
                if row.state == "present":
                    rows += await asyncio.to_thread(
                        opened.snapshots.describe, row.name, removing=removing
                    )
        return rows

    async def info(self, name: SnapshotName, *, exact: bool = False) -> dict[str, Any]:
        """One snapshot; exact: also what it alone holds, which walks its map."""
        pool = self._daemon.pool(name.pool)
        info = await asyncio.to_thread(pool.snapshots.info, name.volume, name.snapshot)
        info["unique_bytes"] = None
        if exact:
            usage = await asyncio.to_thread(pool.space.exact, name.volume, name.snapshot)
            info["unique_bytes"] = usage["snapshots"][0]["unique_bytes"]
        return info

    async def rename(self, name: SnapshotName, new_name: str) -> dict[str, Any]:
        """Gives a snapshot another name."""
        async with self._daemon.change:
            pool = self._daemon.pool(name.pool)
            await asyncio.to_thread(pool.snapshots.rename, name.volume, name.snapshot, new_name)
            await self._daemon.attachments.snapshot_renamed(name, new_name)
        return await self.info(SnapshotName(name.pool, name.volume, new_name))

    async def protect(self, name: SnapshotName, protected: bool) -> dict[str, Any]:
        """Protects a snapshot from being removed, or no longer."""
        async with self._daemon.change:
            pool = self._daemon.pool(name.pool)
            await asyncio.to_thread(pool.snapshots.protect, name.volume, name.snapshot, protected)
        return await self.info(name)

    async def remove(self, volume: VolumeName, names: list[str] | None) -> list[str]:
        """Removes snapshots of a volume (None: all); their names. Space is freed afterwards."""
        async with self._daemon.change:
            pool = self._daemon.pool(volume.pool)
            for attachment in self._daemon.attachments.of(volume.pool, volume.volume):
                snapshot = attachment.record.snapshot
                if snapshot is not None and (names is None or snapshot in names):
                    raise BusyError(
                        f"snapshot {attachment.name} is attached on {attachment.record.socket}; "
                        "detach it first"
                    )
            removed = await asyncio.to_thread(pool.snapshots.remove, volume.volume, names)
            row = await asyncio.to_thread(pool.catalog.volume, volume.volume)
        if removed:
            self._log.info("snapshots removed", volume=str(volume), count=len(removed))
            self._daemon.jobs.release(pool, row.uuid, str(volume))
        return [f"{volume}@{name}" for name in removed]

    async def rollback(self, name: SnapshotName) -> dict[str, Any]:
        """Gives a volume that is not attached the content of one of its snapshots."""
        pool = self._daemon.pool(name.pool)
        row = await asyncio.to_thread(pool.catalog.volume, name.volume)
        async with self._daemon.jobs.paused(row.uuid), self._daemon.change:
            self._daemon.receives.refuse(name.of)
            attached = self._daemon.attachments.of_head(name.pool, name.volume)
            if attached:
                raise BusyError(
                    f"volume {name.of} is attached on {attached[0].record.socket}; detach it "
                    "first, then roll it back"
                )
            await asyncio.to_thread(pool.snapshots.rollback, name.volume, name.snapshot)
            self._log.info("volume rolled back", snapshot=str(name))
        self._daemon.jobs.release(pool, row.uuid, str(name.of))
        return await self._daemon.volume_info(name.of)

    # Clones

    async def clone(
        self, name: SnapshotName, volume: VolumeName, *, serial: str | None = None
    ) -> dict[str, Any]:
        """Makes a writable volume with the content of a snapshot of the same pool, at once."""
        pool = self._daemon.pool(name.pool)
        self._daemon.refuse_other_pool(name, volume)
        async with self._daemon.change:
            await asyncio.to_thread(
                pool.snapshots.clone, name.volume, name.snapshot, volume.volume, serial=serial
            )
            self._log.info("volume cloned", snapshot=str(name), volume=str(volume))
        return await self._daemon.volume_info(volume)

    async def children(self, name: VolumeName | SnapshotName) -> list[dict[str, str]]:
        """The clones of a snapshot, or of all snapshots of a volume."""
        pool = self._daemon.pool(name.pool)
        snapshot = name.snapshot if isinstance(name, SnapshotName) else None
        return await asyncio.to_thread(pool.snapshots.clones, name.volume, snapshot)

    async def flatten(self, name: VolumeName) -> dict[str, Any]:
        """Begins to make a clone independent of its origin; the job."""
        pool = self._daemon.pool(name.pool)
        async with self._daemon.change:
            self._daemon.receives.refuse(name)
            return self._daemon.jobs.flatten(pool, name.volume).describe()
