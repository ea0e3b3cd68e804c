"""What the API can do: names, parameters, and what they call. docs/json-rpc.md describes them.

Parameters are checked against a type before anything is done; an unknown one is an error. All of
it runs on the event loop's thread.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

import vhostd
from vhostd.api import transfers
from vhostd.api.server import MethodNotFoundError
from vhostd.attachments import Attachment
from vhostd.config import DEFAULT_QUEUES, MAX_QUEUES
from vhostd.daemon import Daemon
from vhostd.errors import UsageError
from vhostd.protocol.session import SessionInfo
from vhostd.storage.names import parse_snapshot, parse_volume, parse_volume_or_snapshot
from vhostd.storage.pool import DEFAULT_SEGMENT_BYTES
from vhostd.storage.snapshot_table import MAX_SNAPSHOTS

__all__ = ["Methods"]

Text = Annotated[str, Meta(max_length=4096)]
Bytes = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
PositiveBytes = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]


class _Params(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class NoParams(_Params):
    """Nothing."""


class PoolName(_Params):
    pool: Text


class OptionalPoolName(_Params):
    pool: Text | None = None


class PoolCreate(_Params):
    pool: Text
    device: Text
    segment_bytes: Bytes = DEFAULT_SEGMENT_BYTES


class PoolOpen(_Params):
    device: Text


class PoolDestroy(_Params):
    pool: Text
    force: bool = False


class PoolSet(_Params):
    pool: Text
    quota_bytes: PositiveBytes | UnsetType | None = UNSET
    warn_percent: Annotated[int, Meta(ge=1, le=100)] | UnsetType = UNSET


class OneVolume(_Params):
    volume: Text


class VolumeRemove(_Params):
    volume: Text
    snapshots: bool = False


class VolumeSet(_Params):
    volume: Text
    quota_bytes: PositiveBytes | UnsetType | None = UNSET
    reservation_bytes: PositiveBytes | UnsetType | None = UNSET
    on_full: Literal["ioerr", "pause"] | UnsetType = UNSET


class VolumeUsage(_Params):
    volume: Text
    exact: bool = False


class VolumeClone(_Params):
    snapshot: Text
    volume: Text
    serial: Text | None = None


class SnapshotCreate(_Params):
    snapshot: Text
    quiesced: bool = False
    guid: UUID | None = None


class SnapshotList(_Params):
    volume: Text | None = None
    pool: Text | None = None
    removing: bool = False


class SnapshotInfo(_Params):
    snapshot: Text
    exact: bool = False


class OneSnapshot(_Params):
    snapshot: Text


class SnapshotRename(_Params):
    snapshot: Text
    new_name: Text


class SnapshotProtect(_Params):
    snapshot: Text
    protected: bool = True


class SnapshotRemove(_Params):
    volume: Text
    snapshots: Annotated[list[Text], Meta(max_length=MAX_SNAPSHOTS)] | None = None


class OneJob(_Params):
    job: Annotated[int, Meta(ge=1)]


class VolumeCreate(_Params):
    volume: Text
    size_bytes: Bytes
    logical_block_bytes: Bytes = 512
    serial: Text | None = None


class VolumeResize(_Params):
    volume: Text
    size_bytes: Bytes
    force: bool = False


class VolumeRename(_Params):
    volume: Text
    new_name: Text


class Attach(_Params):
    volume: Text
    socket: Text | None = None
    queues: Annotated[int, Meta(ge=1, le=MAX_QUEUES)] = DEFAULT_QUEUES
    read_only: bool = False
    temporary: bool = False


class Detach(_Params):
    volume: Text
    socket: Text | None = None


class OptionalVolume(_Params):
    volume: Text | None = None


P = TypeVar("P", bound=_Params)
_Handler = Callable[[Any], Awaitable[Any]]


class Methods:
    """The methods of one daemon; an instance is what `ApiServer` calls."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._table: dict[str, tuple[type[Struct], _Handler]] = {}
        add = self._add
        add("version", NoParams, self._version)
        add("shutdown", NoParams, self._shutdown)
        add("stats", NoParams, lambda _: daemon.stats())
        add("checkpoint", OptionalVolume, self._checkpoint)
        add("pool.create", PoolCreate, self._pool_create)
        add("pool.open", PoolOpen, lambda p: daemon.open_pool(_absolute(p.device, "device")))
        add("pool.close", PoolName, lambda p: daemon.close_pool(p.pool))
        add("pool.list", NoParams, lambda _: daemon.list_pools())
        add("pool.info", PoolName, lambda p: daemon.pool_info(p.pool))
        add("pool.set", PoolSet, lambda p: daemon.configure_pool(p.pool, **_given(p, "pool")))
        add("pool.destroy", PoolDestroy, lambda p: daemon.destroy_pool(p.pool, force=p.force))
        add("volume.create", VolumeCreate, self._volume_create)
        add("volume.list", OptionalPoolName, lambda p: daemon.list_volumes(p.pool))
        add("volume.info", OneVolume, lambda p: daemon.volume_info(parse_volume(p.volume)))
        add("volume.resize", VolumeResize, self._volume_resize)
        add("volume.rename", VolumeRename, self._volume_rename)
        add("volume.remove", VolumeRemove, self._volume_remove)
        add("volume.set", VolumeSet, self._volume_set)
        add("volume.usage", VolumeUsage, self._volume_usage)
        add("volume.clone", VolumeClone, self._volume_clone)
        add("volume.children", OneVolume, self._volume_children)
        add("volume.flatten", OneVolume, self._volume_flatten)
        add("snapshot.create", SnapshotCreate, self._snapshot_create)
        add("snapshot.list", SnapshotList, self._snapshot_list)
        add("snapshot.info", SnapshotInfo, self._snapshot_info)
        add("snapshot.rename", SnapshotRename, self._snapshot_rename)
        add("snapshot.protect", SnapshotProtect, self._snapshot_protect)
        add("snapshot.remove", SnapshotRemove, self._snapshot_remove)
        add("snapshot.rollback", OneSnapshot, self._snapshot_rollback)
        add("job.list", NoParams, self._jobs)
        add("job.info", OneJob, self._job)
        add("job.stop", OneJob, self._job_stop)
        add("attach", Attach, self._attach)
        add("detach", Detach, lambda p: daemon.detach(parse_volume_or_snapshot(p.volume), p.socket))
        add("attachments", NoParams, self._attachments)
        add("sessions", NoParams, self._sessions)
        self._table.update(transfers.methods(daemon))

    def _add(self, name: str, params: type[P], handler: Callable[[P], Awaitable[Any]]) -> None:
        self._table[name] = (params, cast(_Handler, handler))

    def names(self) -> list[str]:
        """All method names, for the test that holds the documentation against them."""
        return sorted(self._table)

    async def __call__(self, name: str, params: dict[str, Any]) -> Any:
        """Does one call.

        Raises:
            MethodNotFoundError: there is no such method.
            VhostdError: what the method raises; UsageError for parameters it does not take.
        """
        if name not in self._table:
            raise MethodNotFoundError(name)
        kind, handler = self._table[name]
        try:
            converted = msgspec.convert(params, kind)
        except msgspec.ValidationError as error:
            raise UsageError(
                f"{name}: its parameters are wrong: {error}; docs/json-rpc.md lists them"
            ) from error
        return await handler(converted)

    async def _version(self, _: NoParams) -> dict[str, Any]:
        return {
            "version": vhostd.__version__,
            "pid": os.getpid(),
            "api_socket": str(self._daemon.config.api_socket),
        }

    async def _shutdown(self, _: NoParams) -> None:
        self._daemon.stopping.set()

    async def _checkpoint(self, params: OptionalVolume) -> list[str]:
        name = parse_volume(params.volume) if params.volume is not None else None
        return await self._daemon.checkpoint(name)

    async def _pool_create(self, params: PoolCreate) -> dict[str, Any]:
        device = _absolute(params.device, "device")
        return await self._daemon.create_pool(params.pool, device, params.segment_bytes)

    async def _volume_create(self, params: VolumeCreate) -> dict[str, Any]:
        return await self._daemon.create_volume(
            parse_volume(params.volume),
            size_bytes=params.size_bytes,
            logical_block_bytes=params.logical_block_bytes,
            serial=params.serial,
        )

    async def _volume_resize(self, params: VolumeResize) -> dict[str, Any]:
        return await self._daemon.resize_volume(
            parse_volume(params.volume), params.size_bytes, allow_shrink=params.force
        )

    async def _volume_rename(self, params: VolumeRename) -> dict[str, Any]:
        return await self._daemon.rename_volume(parse_volume(params.volume), params.new_name)

    async def _volume_remove(self, params: VolumeRemove) -> None:
        await self._daemon.remove_volume(
            parse_volume(params.volume), with_snapshots=params.snapshots
        )

    async def _volume_set(self, params: VolumeSet) -> dict[str, Any]:
        return await self._daemon.configure_volume(
            parse_volume(params.volume), **_given(params, "volume")
        )

    async def _volume_usage(self, params: VolumeUsage) -> dict[str, Any]:
        return await self._daemon.volume_usage(parse_volume(params.volume), exact=params.exact)

    async def _volume_clone(self, params: VolumeClone) -> dict[str, Any]:
        return await self._daemon.snapshots.clone(
            parse_snapshot(params.snapshot), parse_volume(params.volume), serial=params.serial
        )

    async def _volume_children(self, params: OneVolume) -> list[dict[str, str]]:
        return await self._daemon.snapshots.children(parse_volume_or_snapshot(params.volume))

    async def _volume_flatten(self, params: OneVolume) -> dict[str, Any]:
        return await self._daemon.snapshots.flatten(parse_volume(params.volume))

    async def _snapshot_create(self, params: SnapshotCreate) -> dict[str, Any]:
        return await self._daemon.snapshots.create(
            parse_volume_or_snapshot(params.snapshot), quiesced=params.quiesced, guid=params.guid
        )

    async def _snapshot_list(self, params: SnapshotList) -> list[dict[str, Any]]:
        volume = None if params.volume is None else parse_volume(params.volume)
        return await self._daemon.snapshots.list_all(volume, params.pool, removing=params.removing)

    async def _snapshot_info(self, params: SnapshotInfo) -> dict[str, Any]:
        name = parse_snapshot(params.snapshot)
        return await self._daemon.snapshots.info(name, exact=params.exact)

    async def _snapshot_rename(self, params: SnapshotRename) -> dict[str, Any]:
        name = parse_snapshot(params.snapshot)
        return await self._daemon.snapshots.rename(name, params.new_name)

    async def _snapshot_protect(self, params: SnapshotProtect) -> dict[str, Any]:
        name = parse_snapshot(params.snapshot)
        return await self._daemon.snapshots.protect(name, params.protected)

    async def _snapshot_remove(self, params: SnapshotRemove) -> list[str]:
        return await self._daemon.snapshots.remove(parse_volume(params.volume), params.snapshots)

    async def _snapshot_rollback(self, params: OneSnapshot) -> dict[str, Any]:
        return await self._daemon.snapshots.rollback(parse_snapshot(params.snapshot))

    async def _jobs(self, _: NoParams) -> list[dict[str, Any]]:
        return [job.describe() for job in self._daemon.jobs.all()]

    async def _job(self, params: OneJob) -> dict[str, Any]:
        return self._daemon.jobs.get(params.job).describe()

    async def _job_stop(self, params: OneJob) -> dict[str, Any]:
        return self._daemon.jobs.stop_job(params.job).describe()

    async def _attach(self, params: Attach) -> dict[str, Any]:
        return await self._daemon.attach(
            parse_volume_or_snapshot(params.volume),
            socket=params.socket,
            queues=params.queues,
            read_only=params.read_only,
            temporary=params.temporary,
        )

    async def _attachments(self, _: NoParams) -> list[dict[str, Any]]:
        return [attachment.describe() for attachment in self._daemon.attachments.all()]

    async def _sessions(self, _: NoParams) -> list[dict[str, Any]]:
        return [_describe_session(*pair) for pair in self._daemon.sessions()]


def _given(params: _Params, subject: str) -> dict[str, Any]:
    """The parameters that were given, but for the one that names what they are for."""
    values = msgspec.structs.asdict(params)
    return {k: v for k, v in values.items() if k != subject and v is not UNSET}


def _describe_session(attachment: Attachment, session: SessionInfo) -> dict[str, Any]:
    return {
        "volume": attachment.name,
        "socket": attachment.record.socket,
        "read_only": attachment.record.read_only,
        "peer_pid": session.peer.pid,
        "peer_uid": session.peer.uid,
        "connected_ns": session.connected_ns,
        "queues_started": session.queues_started,
        "memory_regions": session.memory_regions,
        "memory_bytes": session.memory_bytes,
        "virtio_features": session.virtio_features,
        "protocol_features": session.protocol_features,
        "messages": session.messages,
        "refusals": session.refusals,
    }


def _absolute(path: str, what: str) -> Path:
    if not Path(path).is_absolute() or "\0" in path:
        raise UsageError(
            f"{what} {path!r} is not an absolute path; the daemon has a working directory of its "
            "own, so begin it with a slash"
        )
    return Path(path)
