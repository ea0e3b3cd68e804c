"""Volumes that a stream is being received into (docs/streams.md), and what they wait for.

    begin ──▶ (a temporary attachment, `note` now and then) ──▶ commit: a snapshot
      ▲                    │ it breaks
      └──── waiting ◀──────┘ ──▶ abandon: the volume as it was before

Invariants:
- From `begin` to `commit` or `abandon` the volume has a record in the registry, made durable before
  the volume is changed, and nobody else attaches, changes or takes snapshots of it.
- `applied_bytes` of a record never says more than is durable: it is told after a flush.
- The snapshot is made before the record goes. After a crash in between, the snapshot's guid says
  that the record is settled.

All methods run on the event loop's thread; those that change something are changes of the daemon's,
one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID

import msgspec
import structlog

from vhostd.errors import BusyError, ExistsError, NotFoundError, UsageError, VhostdError
from vhostd.registry import ReceiveRecord, Registry
from vhostd.storage.names import VolumeName, check_name

if TYPE_CHECKING:
    from vhostd.attachments import Attachment, Attachments
    from vhostd.jobs import Jobs
    from vhostd.storage.pool import Pool
    from vhostd.storage.rows import SnapshotRow

__all__ = ["Receives", "StreamIdentity"]


@dataclass(frozen=True, kw_only=True)
class StreamIdentity:
    """What a stream says of itself."""

    snapshot: str
    guid: UUID
    from_guid: UUID | None
    size_bytes: int
    logical_block_bytes: int
    quiesced: bool
    start_bytes: int


class Receives:
    """Those of a daemon.

    Args:
        change: held while a daemon changes what exists.
        jobs: which free the space of what a rollback leaves, and pause for it.
        find_pool: the open pool of a name; raises NotFoundError.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        attachments: Attachments,
        change: asyncio.Lock,
        jobs: Jobs,
        find_pool: Callable[[str], Pool],
    ) -> None:
        self._registry = registry
        self._attachments = attachments
        self._change = change
        self._jobs = jobs
        self._find_pool = find_pool
        self._log = structlog.get_logger()

    # What others ask

    def describe(self, name: VolumeName) -> dict[str, Any] | None:
        """What a volume waits for; None: nothing."""
        record = self._registry.receives.get(str(name))
        if record is None:
            return None
        return {
            "volume": record.volume,
            "snapshot": record.snapshot,
            "guid": record.guid,
            "from_guid": record.from_guid,
            "size_bytes": record.size_bytes,
            "applied_bytes": record.applied_bytes,
        }

    def refuse(self, name: VolumeName) -> None:
        """Raises BusyError if a stream has the volume."""
        record = self._registry.receives.get(str(name))
        if record is not None:
            raise BusyError(
                f"volume {name} has a stream of snapshot {record.snapshot} up to byte "
                f"{record.applied_bytes} of {record.size_bytes}: continue it (`vhostctl import "
                f"--resume-point {name}`), or give it up with `vhostctl import --abandon {name}`"
            )

    async def removed(self, name: VolumeName) -> None:
        """Follows a volume that is gone."""
        if str(name) in self._registry.receives:
            await self._forget(str(name))

    async def settle(self, pools: dict[str, Pool]) -> None:
        """After a start: forgets what was completed, and what has no volume any more."""
        for name, record in list(self._registry.receives.items()):
            pool_name, _, volume = name.partition("/")
            pool = pools.get(pool_name)
            if pool is not None and await asyncio.to_thread(_settled, pool, volume, record):
                await self._forget(name)

    # The way of a stream

    async def begin(
        self, name: VolumeName, stream: StreamIdentity, *, force: bool
    ) -> dict[str, Any]:
        """Makes the volume ready, or goes on where a stream broke; it is attached for the caller.

        Raises:
            UsageError: the stream does not begin where the volume is.
            ExistsError: the volume (of a whole stream) or the snapshot is there already.
            BusyError: the volume is in use, or has changed since the snapshot.
        """
        check_name(stream.snapshot, "snapshot")
        async with self._changing(name) as pool:
            begun = await self._begin(pool, name, stream, force=force)
        if force:
            await self._free(name)
        return begun

    @asynccontextmanager
    async def _changing(self, name: VolumeName) -> AsyncIterator[Pool]:
        """One change at a time, and no work in the background has the volume open."""
        pool = self._find_pool(name.pool)
        uuid = await asyncio.to_thread(_uuid, pool, name.volume)
        async with AsyncExitStack() as stack:
            if uuid is not None:
                await stack.enter_async_context(self._jobs.paused(uuid))
            await stack.enter_async_context(self._change)
            yield pool

    async def _free(self, name: VolumeName) -> None:
        """What a rollback has left is freed in the background."""
        pool = self._find_pool(name.pool)
        uuid = await asyncio.to_thread(_uuid, pool, name.volume)
        if uuid is not None:
            self._jobs.release(pool, uuid, str(name))

    async def _begin(
        self, pool: Pool, name: VolumeName, stream: StreamIdentity, *, force: bool
    ) -> dict[str, Any]:
        attached = self._attachments.of_head(name.pool, name.volume)
        if attached:
            raise BusyError(
                f"volume {name} is attached on {attached[0].record.socket}; detach it first, or "
                "wait for the end of the stream that it receives"
            )
        record = self._registry.receives.get(str(name))
        resumed = record is not None
        if record is not None:
            _check_continues(name, record, stream)
        else:
            record = await self._first(pool, name, stream, force=force)
        if stream.from_guid is not None:
            await asyncio.to_thread(_resize, pool, name.volume, stream.size_bytes)
        elif await asyncio.to_thread(_uuid, pool, name.volume) is None:
            try:
                await asyncio.to_thread(
                    pool.create_volume,
                    name.volume,
                    size_bytes=stream.size_bytes,
                    logical_block_bytes=stream.logical_block_bytes,
                )
            except VhostdError:
                await self._forget(str(name))
                raise
        attachment = await self._attachments.attach(name.pool, name.volume, temporary=True)
        self._log.info(
            "a stream is received",
            volume=str(name),
            snapshot=stream.snapshot,
            resumed=resumed,
            from_bytes=stream.start_bytes,
        )
        return {
            "volume": str(name),
            "socket": attachment.record.socket,
            "resumed": resumed,
            "applied_bytes": record.applied_bytes,
        }

    async def _first(
        self, pool: Pool, name: VolumeName, stream: StreamIdentity, *, force: bool
    ) -> ReceiveRecord:
        """Checks that a stream fits, and makes its record."""
        if stream.start_bytes:
            raise UsageError(
                f"the stream continues one from byte {stream.start_bytes} of the volume, and "
                f"{name} waits for none; send it from its beginning"
            )
        if stream.from_guid is None:
            if await asyncio.to_thread(_uuid, pool, name.volume) is not None:
                raise ExistsError(
                    f"volume {name} exists, and the stream makes a whole volume; choose another "
                    "name, or send an increment (`export --from-snapshot`)"
                )
            check_name(name.volume, "volume")
        else:
            await asyncio.to_thread(_check_increment, pool, name, stream, force)
        record = ReceiveRecord(
            volume=str(name),
            snapshot=stream.snapshot,
            guid=str(stream.guid),
            from_guid=str(stream.from_guid) if stream.from_guid is not None else None,
            size_bytes=stream.size_bytes,
            logical_block_bytes=stream.logical_block_bytes,
            quiesced=stream.quiesced,
        )
        # Before the volume is changed: from here on a crash leaves one that waits.
        await self._save(record)
        return record

    async def note(self, name: VolumeName, guid: UUID, applied_bytes: int) -> None:
        """Everything before this byte is durable."""
        async with self._change:
            await self._note(name, guid, applied_bytes)

    async def _note(self, name: VolumeName, guid: UUID, applied_bytes: int) -> None:
        record = self._record(name, guid)
        if applied_bytes > record.size_bytes:
            raise UsageError(
                f"volume {name}: byte {applied_bytes} is beyond its end at {record.size_bytes}"
            )
        # A stream that was sent again from its beginning does not take back what is there.
        applied_bytes = max(applied_bytes, record.applied_bytes)
        await self._save(msgspec.structs.replace(record, applied_bytes=applied_bytes))

    async def commit(self, name: VolumeName, guid: UUID) -> dict[str, Any]:
        """All of the stream is there: makes the snapshot, and returns it."""
        async with self._change:
            record = self._record(name, guid)
            pool = self._find_pool(name.pool)
            await self._detach(self._attachments.of_head(name.pool, name.volume))
            await asyncio.to_thread(
                pool.snapshots.create,
                name.volume,
                record.snapshot,
                quiesced=record.quiesced,
                guid=guid,
            )
            await self._forget(str(name))
            self._log.info("a stream was received", volume=str(name), snapshot=record.snapshot)
            return await asyncio.to_thread(pool.snapshots.info, name.volume, record.snapshot)

    async def abandon(self, name: VolumeName) -> dict[str, Any]:
        """Gives a stream up: a new volume goes, another one is as in the snapshot before."""
        async with self._changing(name) as pool:
            done = await self._abandon(pool, name)
        await self._free(name)
        return done

    async def _abandon(self, pool: Pool, name: VolumeName) -> dict[str, Any]:
        record = self._record(name, None)
        await self._detach(self._attachments.of_head(name.pool, name.volume))
        if record.from_guid is None:
            if await asyncio.to_thread(_uuid, pool, name.volume) is not None:
                await asyncio.to_thread(pool.remove_volume, name.volume)
        else:
            base = await asyncio.to_thread(_by_guid, pool, name.volume, UUID(record.from_guid))
            if base is None or base.name is None:
                raise NotFoundError(
                    f"volume {name} has the snapshot no more that its stream begins with, so it "
                    "cannot be rolled back; receive the stream again, or remove the volume"
                )
            await asyncio.to_thread(pool.snapshots.rollback, name.volume, base.name)
        await self._forget(str(name))
        self._log.info("a stream was given up", volume=str(name), snapshot=record.snapshot)
        return {"volume": str(name), "removed": record.from_guid is None}

    # Records

    def _record(self, name: VolumeName, guid: UUID | None) -> ReceiveRecord:
        record = self._registry.receives.get(str(name))
        if record is None or (guid is not None and UUID(record.guid) != guid):
            raise NotFoundError(
                f"volume {name} waits for no {'stream' if guid is None else 'such stream'}; send "
                "one from its beginning"
            )
        return record

    async def _save(self, record: ReceiveRecord) -> None:
        self._registry.receives[record.volume] = record
        await asyncio.to_thread(self._registry.save)

    async def _forget(self, name: str) -> None:
        del self._registry.receives[name]
        await asyncio.to_thread(self._registry.save)

    async def _detach(self, attached: list[Attachment]) -> None:
        for attachment in attached:
            await self._attachments.detach(attachment, "the stream has ended")


def _check_continues(name: VolumeName, record: ReceiveRecord, stream: StreamIdentity) -> None:
    from_guid = str(stream.from_guid) if stream.from_guid is not None else None
    same = (record.guid, record.from_guid, record.size_bytes, record.logical_block_bytes) == (
        str(stream.guid),
        from_guid,
        stream.size_bytes,
        stream.logical_block_bytes,
    )
    if not same:
        raise BusyError(
            f"volume {name} waits for the rest of another stream, of snapshot {record.snapshot}; "
            f"send that, or give it up with `vhostctl import --abandon {name}`"
        )
    if stream.start_bytes > record.applied_bytes:
        raise UsageError(
            f"the stream goes on from byte {stream.start_bytes}, and volume {name} has it only up "
            f"to byte {record.applied_bytes}; `vhostctl import --resume-point {name}` says from "
            "where to send it"
        )


# In helper threads


def _uuid(pool: Pool, volume: str) -> UUID | None:
    """None: there is no such volume."""
    try:
        return pool.catalog.volume(volume).uuid
    except NotFoundError:
        return None


def _by_guid(pool: Pool, volume: str, guid: UUID) -> SnapshotRow | None:
    rows = pool.catalog.snapshots.of(pool.catalog.volume(volume).uuid)
    return next((r for r in rows if r.guid == guid and r.state != "removing"), None)


def _settled(pool: Pool, volume: str, record: ReceiveRecord) -> bool:
    if _uuid(pool, volume) is None:
        # Nothing came of it yet, or the volume was removed in another way.
        return True
    return _by_guid(pool, volume, UUID(record.guid)) is not None


def _check_increment(pool: Pool, name: VolumeName, stream: StreamIdentity, force: bool) -> None:
    row = pool.catalog.volume(name.volume)
    if row.logical_block_bytes != stream.logical_block_bytes:
        raise UsageError(
            f"volume {name} has logical blocks of {row.logical_block_bytes} bytes, and the stream "
            f"{stream.logical_block_bytes}; it is of another volume"
        )
    snapshots = [s for s in pool.catalog.snapshots.of(row.uuid) if s.state != "removing"]
    there = next((s for s in snapshots if s.guid == stream.guid), None)
    if there is not None:
        raise ExistsError(
            f"{name}@{there.name} is the snapshot of this stream; there is nothing to do"
        )
    if any(s.name == stream.snapshot for s in snapshots):
        raise ExistsError(
            f"snapshot {name}@{stream.snapshot} exists, and has other content; rename it first"
        )
    base = next((s for s in snapshots if s.guid == stream.from_guid), None)
    if base is None:
        raise NotFoundError(
            f"volume {name} has not the snapshot that the increment begins with; send the whole "
            "snapshot to a new volume, or an increment since one that `vhostctl snapshot list "
            f"{name}` shows"
        )
    newest = snapshots[-1]
    if newest.uuid != base.uuid and not force:
        raise BusyError(
            f"the increment begins with {name}@{base.name}, and {name}@{newest.name} is newer; "
            "remove that, or roll the volume back with --force"
        )
    changed = row.parent != base.uuid or row.size_bytes != base.size_bytes
    if not changed:
        changed = bool(pool.snapshots.difference(name.volume, str(base.name), None, limit=1).ranges)
    if not changed:
        return
    if not force:
        _refuse_changed(name, base)
    pool.snapshots.rollback(name.volume, str(base.name))


def _refuse_changed(name: VolumeName, base: SnapshotRow) -> NoReturn:
    raise BusyError(
        f"volume {name} has changed since {name}@{base.name}, which the increment begins with; "
        "with --force it is rolled back, and what was written since is lost"
    )


def _resize(pool: Pool, volume: str, size_bytes: int) -> None:
    if pool.catalog.volume(volume).size_bytes != size_bytes:
        pool.resize_volume(volume, size_bytes, allow_shrink=True)
