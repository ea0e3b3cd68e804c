"""The daemon: pools, attachments and the engine's events under one roof.

    starting ──▶ running ──SIGTERM, SIGINT or `shutdown`──▶ stopping ──▶ ended

Start: lock the state directory, read the registry, open the pools, listen for front-ends, listen
for people. A pool or attachment that fails is reported and kept with its error; the others run.
Stop: no more requests of people, sessions end, volumes are checkpointed and closed, devices
unlocked.

All methods run on the event loop's thread; what blocks goes to helper threads. Changes to what
exists (pools, volumes, attachments) are one at a time. A guest's I/O never waits for any of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import structlog

from vhostd.attachments import Attachment, Attachments
from vhostd.config import Config
from vhostd.errors import (
    BusyError,
    DeviceError,
    ExistsError,
    NotFoundError,
    UnavailableError,
    UsageError,
    VhostdError,
)
from vhostd.events import EngineEvents
from vhostd.jobs import Jobs
from vhostd.lockfile import LockFile
from vhostd.protocol.session import EndKind
from vhostd.receives import Receives
from vhostd.registry import PoolRecord, Registry
from vhostd.snapshots import SnapshotCalls
from vhostd.space import SpaceKeeper
from vhostd.storage.engine import Engine, FormatDevice
from vhostd.storage.names import SnapshotName, VolumeName
from vhostd.storage.pool import Pool, create_pool
from vhostd.storage.rows import VolumeRow
from vhostd.storage.volume import OpenVolume

__all__ = ["Daemon"]

T = TypeVar("T")


class Daemon:
    """One daemon.

    Args:
        engine: started; the daemon shuts it down in `stop`.
        format_device: `vhostd._native.format_device`.
        keep: whether pools and attachments outlive the process (`vhostd serve`), or not
            (`vhostd disk`).
    """

    def __init__(
        self, config: Config, *, engine: Engine, format_device: FormatDevice, keep: bool = True
    ) -> None:
        self.config = config
        self.stopping = asyncio.Event()
        self._engine = engine
        self._format_device = format_device
        self._state_dir = Path(config.state_dir) if keep else None
        self._lock_file: LockFile | None = None
        self._pools: dict[str, Pool] = {}
        self._failed_pools: dict[str, str] = {}
        self.change = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._checkpointing: dict[UUID, bool] = {}
        self._log = structlog.get_logger()
        self.jobs = Jobs()
        self.space = SpaceKeeper(self.pools)
        self.snapshots = SnapshotCalls(self)
        self._events = EngineEvents(self)
        self._use_registry(Registry(None))

    def _use_registry(self, registry: Registry) -> None:
        """Everything that remembers something does so there."""
        self._registry = registry
        self.attachments = Attachments(
            registry=registry,
            runtime_dir=Path(self.config.runtime_dir),
            config=self.config.exports,
            find_pool=self.pool,
        )
        self.receives = Receives(
            registry=registry,
            attachments=self.attachments,
            change=self.change,
            jobs=self.jobs,
            find_pool=self.pool,
        )

    # Life

    async def start(self) -> None:
        """Opens what the registry names, and begins to serve it.

        Raises:
            BusyError: another daemon has the state directory.
            DamagedError, DeviceError, UnsupportedError: the registry cannot be read.
        """
        if self._state_dir is not None:
            self._use_registry(await asyncio.to_thread(self._open_state, self._state_dir))
        asyncio.get_running_loop().add_reader(self._engine.event_fd(), self._engine_events)
        for record in list(self._registry.pools.values()):
            try:
                await self._open_pool(Path(record.device), record.name)
            except VhostdError as error:
                self._failed_pools[record.name] = str(error)
                self._log.error("pool could not be opened", pool=record.name, error=str(error))
        await self.receives.settle(self._pools)
        await self.attachments.restore()
        for pool in self.pools():
            self.jobs.release_all(pool)
        self._spawn(self._checkpoint_forever())
        self._spawn(self.space.run())
        self.space.look()

    def _open_state(self, state_dir: Path) -> Registry:
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DeviceError(
                f"state directory {state_dir} cannot be made: {error.strerror}; make it, or set "
                "state_dir in the configuration"
            ) from error
        self._lock_file = LockFile(state_dir / "lock", f"state directory {state_dir}")
        return Registry.load(state_dir)

    async def stop(self) -> bool:
        """Ends everything in order; False if a volume could not be closed cleanly."""
        self.stopping.set()
        await self.jobs.stop()
        async with self.change:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            clean = await self.attachments.stop()
            for pool in self._pools.values():
                clean = not await asyncio.to_thread(pool.close) and clean
            self._pools.clear()
            asyncio.get_running_loop().remove_reader(self._engine.event_fd())
            await asyncio.to_thread(self._engine.shutdown)
            if self._lock_file is not None:
                self._lock_file.release()
        self._log.info("stopped", clean=clean)
        return clean

    # Pools

    def pools(self) -> list[Pool]:
        """Those that are open."""
        return list(self._pools.values())

    def refuse_other_pool(self, name: SnapshotName, volume: VolumeName) -> None:
        """A clone shares space, so it is in the pool of its origin.

        Raises:
            UsageError: it is not.
        """
        if name.pool != volume.pool:
            raise UsageError(
                f"volume {volume} cannot be a clone of {name}, which is in another pool; clone it "
                f"within {name.pool}, or export it and import it"
            )

    def pool(self, name: str) -> Pool:
        """The open pool of that name.

        Raises:
            NotFoundError: there is none.
            UnavailableError: it could not be opened when the daemon started, and why.
        """
        if (pool := self._pools.get(name)) is not None:
            return pool
        if (reason := self._failed_pools.get(name)) is not None:
            raise UnavailableError(f"pool {name} is not open: {reason}")
        raise NotFoundError(f"pool {name} does not exist; `vhostctl pool list` shows those that do")

    async def create_pool(self, name: str, device: Path, segment_bytes: int) -> dict[str, Any]:
        """Makes a pool, opens it, and keeps it in the registry."""
        async with self.change:
            self._refuse_taken(name)
            await asyncio.to_thread(
                create_pool,
                device,
                name,
                format_device=self._format_device,
                segment_bytes=segment_bytes,
            )
            return await self._adopt(device)

    async def open_pool(self, device: Path) -> dict[str, Any]:
        """Takes over a pool that exists, and keeps it in the registry."""
        async with self.change:
            return await self._adopt(device)

    async def _adopt(self, device: Path) -> dict[str, Any]:
        pool = await self._open_pool(device)
        self._registry.pools[pool.name] = PoolRecord(pool.name, str(device))
        await asyncio.to_thread(self._registry.save)
        self._log.info("pool opened", pool=pool.name, device=str(device))
        self.jobs.release_all(pool)
        return await asyncio.to_thread(pool.space.pool)

    async def _open_pool(self, device: Path, name: str | None = None) -> Pool:
        pool = await asyncio.to_thread(
            Pool.open,
            device,
            self._engine,
            staging_dir=Path(self.config.engine.staging_dir),
            direct=self.config.engine.direct,
            checkpoint_log_bytes=self.config.engine.checkpoint_log_bytes,
            reclaim_bytes_per_second=self.config.engine.reclaim_bytes_per_second,
        )
        try:
            if name is not None and pool.name != name:
                raise NotFoundError(
                    f"{device} holds pool {pool.name}, not {name}; put the right device there, or "
                    f"`vhostctl pool close {name}`"
                )
            if pool.name in self._pools:
                self._refuse_taken(pool.name)
        except VhostdError:
            await asyncio.to_thread(pool.close)
            raise
        self._failed_pools.pop(pool.name, None)
        self._pools[pool.name] = pool
        return pool

    async def close_pool(self, name: str) -> None:
        """Closes a pool and forgets where it is; its data stays."""
        async with self.change:
            if self._failed_pools.pop(name, None) is None:
                pool = self.pool(name)
                self._refuse_attached(name)
                self._refuse_working(name)
                del self._pools[name]
                await asyncio.to_thread(pool.close)
            await self._forget_pool(name)

    async def destroy_pool(self, name: str, *, force: bool) -> None:
        """Removes a pool and all its data."""
        async with self.change:
            pool = self.pool(name)
            self._refuse_attached(name)
            self._refuse_working(name)
            forgotten = False

            def forget() -> None:
                nonlocal forgotten
                forgotten = True

            try:
                await asyncio.to_thread(pool.destroy, force=force, before=forget)
            finally:
                if forgotten:
                    del self._pools[name]
                    await self._forget_pool(name)
            self._log.info("pool destroyed", pool=name)

    async def _forget_pool(self, name: str) -> None:
        for attachment in self.attachments.of(name):
            await self.attachments.detach(attachment)
        self._registry.pools.pop(name, None)
        await asyncio.to_thread(self._registry.save)

    async def list_pools(self) -> list[dict[str, Any]]:
        """All pools; those that could not be opened have `error`."""
        rows = [
            {"error": None, **await asyncio.to_thread(pool.space.pool)} for pool in self.pools()
        ]
        rows += [
            {"name": name, "device": self._registry.pools[name].device, "error": error}
            for name, error in self._failed_pools.items()
        ]
        return sorted(rows, key=lambda row: str(row["name"]))

    async def pool_info(self, name: str) -> dict[str, Any]:
        """One pool, with what its files take just now."""
        pool = self.pool(name)
        return {"error": None, **await asyncio.to_thread(pool.space.pool, exact=True)}

    async def configure_pool(self, name: str, **changes: Any) -> dict[str, Any]:
        """Changes `quota_bytes` and `warn_percent`; what is not given stays."""
        async with self.change:
            pool = self.pool(name)
            row = await asyncio.to_thread(pool.catalog.pool)
            values = {"quota_bytes": row.quota_bytes, "warn_percent": row.warn_percent, **changes}
            await asyncio.to_thread(lambda: pool.configure(**values))
        self.space.look()
        return await self.pool_info(name)

    def _refuse_taken(self, name: str) -> None:
        if name in self._pools or name in self._registry.pools:
            raise ExistsError(f"pool {name} exists already; choose another name")

    def _refuse_attached(self, name: str) -> None:
        attached = self.attachments.of(name)
        if attached:
            raise BusyError(
                f"pool {name} has attached volumes (one is {attached[0].name} on "
                f"{attached[0].record.socket}); detach them first"
            )

    def _refuse_working(self, name: str) -> None:
        working = [
            job
            for job in self.jobs.all()
            if job.volume.partition("/")[0] == name and job.state in ("waiting", "running")
        ]
        if working:
            raise BusyError(
                f"pool {name} is at work: {working[0].kind} of volume {working[0].volume}; wait "
                "until `vhostctl jobs` shows nothing of it"
            )

    # Volumes

    async def create_volume(self, name: VolumeName, **arguments: Any) -> dict[str, Any]:
        """See `Pool.create_volume`."""
        async with self.change:
            pool = self.pool(name.pool)
            row = await asyncio.to_thread(pool.create_volume, name.volume, **arguments)
            self._log.info("volume created", volume=str(name), size_bytes=row.size_bytes)
            return await self.volume_info(name)

    async def volume_info(self, name: VolumeName) -> dict[str, Any]:
        """One volume, with what its segments take just now."""
        pool = self.pool(name.pool)
        row = await asyncio.to_thread(pool.catalog.volume, name.volume)
        usage = await asyncio.to_thread(pool.catalog.usage, row.uuid)
        info = await asyncio.to_thread(_describe_volume, pool, row, usage)
        self._add_uses(info)
        return {**info, "space": await asyncio.to_thread(pool.space.volume, row.name)}

    async def volume_usage(self, name: VolumeName, *, exact: bool) -> dict[str, Any]:
        """What a volume takes; exact: also what each snapshot alone holds, which walks maps."""
        info = await self.volume_info(name)
        usage: dict[str, Any] = {
            "name": info["name"],
            "provisioned_bytes": info["size_bytes"],
            "referenced_bytes": info["mapped_bytes"],
            **info["space"],
            "foreign_bytes": None if info["origin"] else 0,
            "snapshots": None,
        }
        if exact:
            pool = self.pool(name.pool)
            usage |= await asyncio.to_thread(pool.space.exact, name.volume)
        return usage

    async def configure_volume(self, name: VolumeName, **changes: Any) -> dict[str, Any]:
        """Changes `quota_bytes`, `reservation_bytes` and `on_full`; what is not given stays."""
        async with self.change:
            pool = self.pool(name.pool)
            row = await asyncio.to_thread(pool.catalog.volume, name.volume)
            values = {
                "quota_bytes": row.quota_bytes,
                "reservation_bytes": row.reservation_bytes,
                "on_full": row.on_full,
                **changes,
            }
            await asyncio.to_thread(lambda: pool.configure_volume(name.volume, **values))
            self._log.info("volume configured", volume=str(name), **values)
        self.space.look()
        return await self.volume_info(name)

    async def list_volumes(self, pool_name: str | None = None) -> list[dict[str, Any]]:
        """The volumes of one pool, or of all."""
        pools = [self.pool(pool_name)] if pool_name else list(self._pools.values())
        rows = []
        for pool in pools:
            rows += await asyncio.to_thread(_describe_volumes, pool)
        for row in rows:
            self._add_uses(row)
        return sorted(rows, key=lambda row: str(row["name"]))

    def _add_uses(self, info: dict[str, Any]) -> None:
        """What the daemon does with a volume."""
        attached = self.attachments.of_head(info["pool"], info["volume"])
        info["attachments"] = [attachment.describe() for attachment in attached]
        info["receiving"] = self.receives.describe(VolumeName(info["pool"], info["volume"]))
        info["jobs"] = [job.describe() for job in self.jobs.of(UUID(info["uuid"]))]

    async def resize_volume(
        self, name: VolumeName, size_bytes: int, *, allow_shrink: bool
    ) -> dict[str, Any]:
        """See `Pool.resize_volume`."""
        pool = self.pool(name.pool)
        row = await asyncio.to_thread(pool.catalog.volume, name.volume)
        shrinks = allow_shrink and size_bytes < row.size_bytes
        paused = self.jobs.paused(row.uuid) if shrinks else contextlib.nullcontext()
        async with paused, self.change:
            self.receives.refuse(name)
            await asyncio.to_thread(
                pool.resize_volume, name.volume, size_bytes, allow_shrink=allow_shrink
            )
            self._log.info("volume resized", volume=str(name), size_bytes=size_bytes)
        return await self.volume_info(name)

    async def rename_volume(self, name: VolumeName, new_name: str) -> dict[str, Any]:
        """See `Pool.rename_volume`."""
        async with self.change:
            pool = self.pool(name.pool)
            self.receives.refuse(name)
            await asyncio.to_thread(pool.rename_volume, name.volume, new_name)
            await self.attachments.renamed(name.pool, name.volume, new_name)
            return await self.volume_info(VolumeName(name.pool, new_name))

    async def remove_volume(self, name: VolumeName, *, with_snapshots: bool = False) -> None:
        """See `Pool.remove_volume`."""
        pool = self.pool(name.pool)
        row = await asyncio.to_thread(pool.catalog.volume, name.volume)
        async with self.jobs.paused(row.uuid), self.change:
            attached = self.attachments.of(name.pool, name.volume)
            if attached:
                raise BusyError(
                    f"{attached[0].name} is attached on {attached[0].record.socket}; detach it "
                    f"first, then remove volume {name}"
                )
            await asyncio.to_thread(pool.remove_volume, name.volume, with_snapshots=with_snapshots)
            await self.receives.removed(name)
            self._log.info("volume removed", volume=str(name))

    async def attach(self, name: VolumeName | SnapshotName, **arguments: Any) -> dict[str, Any]:
        """See `Attachments.attach`."""
        async with self.change:
            if isinstance(name, VolumeName):
                self.receives.refuse(name)
            attachment = await self.attachments.attach(
                name.pool, name.volume, snapshot=_snapshot_of(name), **arguments
            )
            self.space.look()
            return attachment.describe()

    async def detach(
        self, name: VolumeName | SnapshotName, socket: str | None
    ) -> list[dict[str, Any]]:
        """Detaches a volume or a snapshot from one socket, or from all."""
        async with self.change:
            found = self.attachments.find(name.pool, name.volume, _snapshot_of(name), socket)
            for attachment in found:
                await self.attachments.detach(attachment)
            return [attachment.describe() for attachment in found]

    async def checkpoint(self, name: VolumeName | None) -> list[str]:
        """Checkpoints one open volume, or all; the names of those that had something to write."""
        volumes = self._open_volumes()
        if name is not None:
            volumes = [volume for volume in volumes if volume.name == str(name)]
            if not volumes:
                await asyncio.to_thread(self.pool(name.pool).catalog.volume, name.volume)
        return [v.name for v in volumes if await asyncio.to_thread(v.checkpoint, if_needed=True)]

    async def stats(self) -> dict[str, Any]:
        """Counters of the engine and of the open volumes."""
        volumes = {
            volume.name: {
                **await asyncio.to_thread(volume.stats),
                "recovered": volume.recovered,
                "epoch": volume.epoch,
            }
            for volume in self._open_volumes()
        }
        return {"engine": await asyncio.to_thread(self._engine.stats), "volumes": volumes}

    def _open_volumes(self) -> list[OpenVolume]:
        return [volume for pool in self._pools.values() for volume in pool.open_volumes()]

    # Events and checkpoints

    def _engine_events(self) -> None:
        for event in self._engine.take_events():
            self._events.handle(event)

    def checkpoint_soon(self, volume: OpenVolume) -> None:
        """Begins a checkpoint, or another after the one that is being made."""
        self._spawn(self._checkpoint(volume))

    def grant_soon(self, pool: Pool) -> None:
        """Begins to give the engine more segment numbers."""
        self._spawn(self._report(asyncio.to_thread(pool.grant_segments), pool.name))

    def end_session_soon(self, attachment: Attachment, reason: str, kind: EndKind) -> None:
        """Begins to end the session that an attachment has."""
        if attachment.server is not None:
            self._spawn(attachment.server.end_session(reason, kind))

    async def _checkpoint(self, volume: OpenVolume) -> None:
        # Wanted again while one is under way: that one does not cover what has come since.
        if volume.uuid in self._checkpointing:
            self._checkpointing[volume.uuid] = True
            return
        try:
            wanted = True
            while wanted:
                self._checkpointing[volume.uuid] = False
                await self._report(asyncio.to_thread(volume.checkpoint), volume.name)
                wanted = self._checkpointing[volume.uuid]
        finally:
            del self._checkpointing[volume.uuid]
            self.space.look()

    async def _checkpoint_forever(self) -> None:
        while True:
            await asyncio.sleep(self.config.checkpoint_interval_s)
            for volume in self._open_volumes():
                work = asyncio.to_thread(volume.checkpoint, if_needed=True)
                await self._report(work, volume.name)
            # What failed to be freed is tried again.
            for pool in self.pools():
                self.jobs.release_all(pool)

    async def _report(self, work: Awaitable[T], name: str) -> T | None:
        """What nobody waits for must not fail unseen."""
        try:
            return await work
        except VhostdError as error:
            self._log.error("background work failed", object=name, error=str(error))
        except Exception:
            self._log.exception("background work failed", object=name)
        return None

    def _spawn(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def sessions(self) -> list[tuple[Attachment, Any]]:
        """Attachments with an active session, and the session."""
        active = []
        for attachment in self.attachments.all():
            session = attachment.server.session() if attachment.server is not None else None
            if session is not None:
                active.append((attachment, session))
        return active


def _snapshot_of(name: VolumeName | SnapshotName) -> str | None:
    return name.snapshot if isinstance(name, SnapshotName) else None


def _describe_volumes(pool: Pool) -> list[dict[str, Any]]:
    usage = pool.catalog.usage()
    return [
        _describe_volume(pool, row, usage)
        for row in pool.catalog.volumes()
        if row.state == "present"
    ]


def _describe_volume(
    pool: Pool, row: VolumeRow, usage: dict[UUID, tuple[int, int]]
) -> dict[str, Any]:
    used_blocks, mapped_blocks = usage.get(row.uuid, (0, 0))
    volume = pool.find_open(row.uuid)
    stats: dict[str, Any] = {}
    if volume is not None:
        with contextlib.suppress(VhostdError):
            stats = volume.stats()
    snapshots = pool.catalog.snapshots.of(row.uuid)
    full_name = pool.catalog.snapshots.full_name
    return {
        "name": f"{pool.name}/{row.name}",
        "pool": pool.name,
        "volume": row.name,
        "uuid": str(row.uuid),
        "size_bytes": row.size_bytes,
        "logical_block_bytes": row.logical_block_bytes,
        "serial": row.serial,
        "created_ns": row.created_ns,
        "epoch": row.epoch,
        "open": volume is not None,
        "mapped_bytes": stats.get("mapped_blocks", mapped_blocks) * 4096,
        "used_bytes": used_blocks * 4096,
        "allocated_bytes": pool.space.allocated_bytes(row),
        "snapshots": sum(s.name is not None for s in snapshots),
        "snapshots_removing": sum(s.name is None for s in snapshots),
        "parent": full_name(row.parent) if row.parent is not None else None,
        "origin": full_name(row.origin) if row.origin is not None else None,
        "quota_bytes": row.quota_bytes,
        "reservation_bytes": row.reservation_bytes,
        "on_full": row.on_full,
        "limit_bytes": volume.limit_bytes if volume is not None else None,
        "status": "full" if volume is not None and volume.is_full else "ok",
        "waiting_requests": stats.get("waiting_for_space", 0),
    }
