"""Attachments: which volume is served on which socket.

An attachment:   attached ──detach──▶ gone        failed (kept, with the reason) ──detach──▶ gone

Invariants:
- A volume has several attachments that only read, or one that writes; a snapshot has any number
  that read, whatever its volume has.
- A volume is open while it has an attachment, and closed when its last one goes.
- An attachment is in the registry before its socket exists, and until its socket is gone, so that
  a front-end that reconnects after a restart finds it again. A temporary one (import, export) is
  not in the registry: it ends with its session, or when none comes.

All of it runs on the event loop's thread; what blocks goes to helper threads. One change at a time.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import structlog

from vhostd.config import DEFAULT_QUEUES, MAX_QUEUES, ExportsConfig
from vhostd.errors import (
    BusyError,
    DeviceError,
    ExistsError,
    NotFoundError,
    UsageError,
    VhostdError,
)
from vhostd.protocol.device import Device
from vhostd.protocol.server import MAX_SOCKET_PATH_BYTES, ExportServer
from vhostd.protocol.session import EndKind, SessionEnd, SessionInfo
from vhostd.registry import AttachmentRecord, Registry
from vhostd.storage.names import SnapshotName
from vhostd.storage.pool import Pool
from vhostd.storage.volume import OpenSnapshot, OpenVolume

__all__ = ["Attachment", "Attachments"]

TEMPORARY_WAIT_S = 60.0


@dataclass(eq=False, slots=True)
class Attachment:
    """One socket. volume and server are None if it could not be restored; error says why."""

    record: AttachmentRecord
    temporary: bool = False
    pool: Pool | None = None
    volume: OpenVolume | OpenSnapshot | None = None
    server: ExportServer | None = None
    error: str | None = None
    export_ids: set[int] = field(default_factory=set)
    sessions: int = 0
    last_end: SessionEnd | None = None
    expiry: asyncio.TimerHandle | None = None
    ending: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        """`pool/volume` or `pool/volume@snapshot`."""
        return _name(self.record)

    def describe(self) -> dict[str, Any]:
        """The attachment for programs; docs/json-output.md."""
        session = self.server.session() if self.server is not None else None
        return {
            "volume": self.name,
            "socket": self.record.socket,
            "queues": self.record.queues,
            "read_only": self.record.read_only,
            "temporary": self.temporary,
            "state": "failed" if self.error else "connected" if session else "listening",
            "error": self.error,
            "sessions": self.sessions,
            "last_session_end": self.last_end.reason if self.last_end else None,
        }


class Attachments:
    """All attachments of a daemon.

    Args:
        find_pool: the open pool of a name; raises NotFoundError.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        runtime_dir: Path,
        config: ExportsConfig,
        find_pool: Callable[[str], Pool],
    ) -> None:
        self._registry = registry
        self._runtime_dir = runtime_dir
        self._config = config
        self._find_pool = find_pool
        self._by_socket: dict[str, Attachment] = {}
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()

    def all(self) -> list[Attachment]:
        """All, by volume and socket."""
        return sorted(self._by_socket.values(), key=lambda a: (a.name, a.record.socket))

    def of(self, pool: str, volume: str | None = None) -> list[Attachment]:
        """Those of a pool, or of one volume and its snapshots."""
        return [
            a for a in self.all() if a.record.pool == pool and volume in (None, a.record.volume)
        ]

    def of_head(self, pool: str, volume: str) -> list[Attachment]:
        """Those of one volume, without its snapshots."""
        return [a for a in self.of(pool, volume) if a.record.snapshot is None]

    def by_export(self, export_id: int) -> Attachment | None:
        """The one whose session has that export."""
        return next((a for a in self._by_socket.values() if export_id in a.export_ids), None)

    async def attach(
        self,
        pool: str,
        volume: str,
        *,
        snapshot: str | None = None,
        socket: str | None = None,
        queues: int = DEFAULT_QUEUES,
        read_only: bool = False,
        temporary: bool = False,
    ) -> Attachment:
        """Opens the volume (or a snapshot of it, read-only) if need be, and listens.

        Raises:
            UsageError: the socket's path or the number of queues is not possible.
            NotFoundError: there is no such volume or snapshot, or no directory for the socket.
            BusyError: the volume is attached in a way that excludes this.
            ExistsError: the path is taken.
            DamagedError, NoSpaceError, DeviceError: the volume cannot be opened.
        """
        if not 1 <= queues <= MAX_QUEUES:
            raise UsageError(
                f"volume {pool}/{volume}: {queues} queues are not possible; "
                f"choose 1 to {MAX_QUEUES}"
            )
        full = volume if snapshot is None else f"{volume}@{snapshot}"
        path = self._default_socket(pool, full, temporary) if socket is None else socket
        if not Path(path).is_absolute():
            raise UsageError(f"socket {path!r} is not an absolute path; begin it with a slash")
        if len(path.encode()) > MAX_SOCKET_PATH_BYTES:
            raise UsageError(
                f"socket path {path} has more than the {MAX_SOCKET_PATH_BYTES} bytes that are "
                "possible; choose a shorter one with --socket"
            )
        record = AttachmentRecord(
            pool=pool,
            volume=volume,
            snapshot=snapshot,
            socket=path,
            queues=queues,
            read_only=read_only or snapshot is not None,
        )
        # All that is certain is said before anything is changed.
        opened = self._find_pool(pool)
        await asyncio.to_thread(opened.catalog.volume, volume)
        if snapshot is not None:
            await asyncio.to_thread(opened.snapshots.find, volume, snapshot)
        self._refuse_conflict(record)
        attachment = Attachment(record, temporary=temporary)
        self._by_socket[path] = attachment
        try:
            if not temporary:
                self._registry.attachments[path] = record
                await asyncio.to_thread(self._registry.save)
            await self._start(attachment, make_directory=socket is None)
        except BaseException:
            await self._forget(attachment)
            raise
        if temporary:
            self._expire_later(attachment)
        self._log.info("attached", volume=attachment.name, socket=path, read_only=read_only)
        return attachment

    async def restore(self) -> None:
        """Serves again what the registry has; what fails is kept, with the reason."""
        await asyncio.gather(*map(self._restore_one, list(self._registry.attachments.values())))

    async def _restore_one(self, record: AttachmentRecord) -> None:
        attachment = Attachment(record)
        self._by_socket[record.socket] = attachment
        try:
            await self._start(attachment, make_directory=True)
        except VhostdError as error:
            attachment.error = str(error)
            self._log.error(
                "an attachment could not be restored; correct the cause, then detach and attach it",
                volume=attachment.name,
                socket=record.socket,
                error=str(error),
            )
        else:
            self._log.info("attachment restored", volume=attachment.name, socket=record.socket)

    async def detach(self, attachment: Attachment, reason: str = "the volume is detached") -> None:
        """Ends its session, removes its socket, and closes the volume if it was the last.

        Raises:
            VhostdError: it is detached, and the volume was closed as after a crash.
        """
        try:
            await self._stop(attachment, reason)
        finally:
            await self._forget(attachment)
        self._log.info("detached", volume=attachment.name, socket=attachment.record.socket)

    def find(
        self, pool: str, volume: str, snapshot: str | None, socket: str | None
    ) -> list[Attachment]:
        """What `detach POOL/VOLUME[@SNAPSHOT] [--socket]` means.

        Raises:
            NotFoundError: there is none.
        """
        found = [
            a
            for a in self.of(pool, volume)
            if a.record.snapshot == snapshot and socket in (None, a.record.socket)
        ]
        if not found:
            where = f" on {socket}" if socket else ""
            what = "volume" if snapshot is None else "snapshot"
            name = f"{pool}/{volume}" + ("" if snapshot is None else f"@{snapshot}")
            raise NotFoundError(
                f"{what} {name} is not attached{where}; `vhostctl attachments` shows what is"
            )
        return found

    async def renamed(self, pool: str, old: str, new: str) -> None:
        """Follows a volume that has another name."""
        for attachment in self.of(pool, old):
            await self._record(attachment, volume=new)

    async def snapshot_renamed(self, old: SnapshotName, new: str) -> None:
        """Follows a snapshot that has another name."""
        for attachment in self.of(old.pool, old.volume):
            if attachment.record.snapshot == old.snapshot:
                await self._record(attachment, snapshot=new)

    async def stop(self) -> bool:
        """Ends all sessions and closes all volumes; the registry keeps what was attached.

        False: a volume could not be closed cleanly.
        """
        for task in list(self._tasks):
            task.cancel()
        stopped = self.all()
        results = await asyncio.gather(
            *(self._stop(a, "the daemon is stopping") for a in stopped), return_exceptions=True
        )
        clean = True
        for attachment, result in zip(stopped, results, strict=True):
            if isinstance(result, BaseException):
                clean = False
                self._log.error(
                    "volume could not be closed cleanly; its next opening recovers it",
                    volume=attachment.name,
                    error=str(result),
                )
        self._by_socket.clear()
        return clean

    # One attachment

    async def _start(self, attachment: Attachment, *, make_directory: bool) -> None:
        record = attachment.record
        pool = self._find_pool(record.pool)
        if make_directory:
            await asyncio.to_thread(
                _make_socket_directory, Path(record.socket).parent, self._runtime_dir
            )
        volume: OpenVolume | OpenSnapshot
        if record.snapshot is not None:
            volume = await asyncio.to_thread(pool.open_snapshot, record.volume, record.snapshot)
        else:
            volume = await asyncio.to_thread(pool.open_volume, record.volume)
        attachment.pool, attachment.volume = pool, volume
        server = ExportServer(
            Path(record.socket),
            name=attachment.name,
            open_device=lambda: self._open_device(attachment, volume),
            queues=record.queues,
            mode=int(self._config.mode, 8),
            owner=self._config.owner,
            group=self._config.group,
            write_cache=record.write_cache,
            on_write_cache=lambda enabled: self._record(attachment, write_cache=enabled),
            on_session_start=lambda info: self._session_started(attachment, info),
            on_session_end=lambda info, end: self._session_ended(attachment, info, end),
        )
        try:
            await server.start()
        except BaseException:
            attachment.pool = attachment.volume = None
            await asyncio.to_thread(pool.release_volume, volume)
            raise
        attachment.server = server

    async def _stop(self, attachment: Attachment, reason: str) -> None:
        if attachment.expiry is not None:
            attachment.expiry.cancel()
        # A session's end and a person may detach it at once; the volume is released once, and
        # after the server has stopped.
        async with attachment.ending:
            server, attachment.server = attachment.server, None
            if server is not None:
                await server.stop(reason)
            volume, attachment.volume = attachment.volume, None
            if volume is not None and attachment.pool is not None:
                await asyncio.to_thread(attachment.pool.release_volume, volume)

    async def _forget(self, attachment: Attachment) -> None:
        socket = attachment.record.socket
        if self._by_socket.get(socket) is attachment:
            del self._by_socket[socket]
        if not attachment.temporary and self._registry.attachments.pop(socket, None) is not None:
            await asyncio.to_thread(self._registry.save)

    async def _record(self, attachment: Attachment, **changes: Any) -> None:
        attachment.record = msgspec.structs.replace(attachment.record, **changes)
        if not attachment.temporary:
            self._registry.attachments[attachment.record.socket] = attachment.record
            await asyncio.to_thread(self._registry.save)

    def _open_device(self, attachment: Attachment, volume: OpenVolume | OpenSnapshot) -> Device:
        """Runs in a helper thread."""
        export_id = next(self._ids)
        attachment.export_ids = {export_id}
        return volume.export(
            export_id=export_id,
            queues=attachment.record.queues,
            read_only=attachment.record.read_only,
            write_cache=attachment.record.write_cache is not False,
        )

    def _session_started(self, attachment: Attachment, _info: SessionInfo) -> None:
        attachment.sessions += 1
        if attachment.expiry is not None:
            attachment.expiry.cancel()

    def _session_ended(self, attachment: Attachment, _info: SessionInfo, end: SessionEnd) -> None:
        attachment.last_end = end
        if attachment.temporary and end.kind is not EndKind.STOPPED:
            self._detach_soon(attachment)

    def _expire_later(self, attachment: Attachment) -> None:
        attachment.expiry = asyncio.get_running_loop().call_later(
            TEMPORARY_WAIT_S, self._detach_soon, attachment
        )

    def _detach_soon(self, attachment: Attachment) -> None:
        self._spawn(self._detach_temporary(attachment))

    async def _detach_temporary(self, attachment: Attachment) -> None:
        if self._by_socket.get(attachment.record.socket) is not attachment:
            return
        try:
            await self.detach(attachment)
        except VhostdError as error:
            self._log.error(
                "a temporary attachment ended, and its volume could not be closed cleanly",
                volume=attachment.name,
                error=str(error),
            )

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What is possible

    def _default_socket(self, pool: str, volume: str, temporary: bool) -> str:
        name = f"{volume}.{next(self._ids)}.tmp" if temporary else f"{volume}.sock"
        return str(self._runtime_dir / pool / name)

    def _refuse_conflict(self, record: AttachmentRecord) -> None:
        taken = self._by_socket.get(record.socket)
        if taken is not None:
            raise ExistsError(
                f"socket {record.socket} serves volume {taken.name} already; choose another path "
                "with --socket, or detach that first"
            )
        if record.snapshot is not None:
            return
        others = self.of_head(record.pool, record.volume)
        writer = next((a for a in others if not a.record.read_only), None)
        if writer is not None:
            _refuse_busy(record, f"attached on {writer.record.socket} for writing")
        if others and not record.read_only:
            _refuse_busy(record, f"attached on {others[0].record.socket} for reading")


def _name(record: AttachmentRecord) -> str:
    name = f"{record.pool}/{record.volume}"
    return name if record.snapshot is None else f"{name}@{record.snapshot}"


def _refuse_busy(record: AttachmentRecord, state: str) -> NoReturn:
    raise BusyError(
        f"volume {record.pool}/{record.volume} is {state}; several attachments are possible only "
        "if all are --read-only: detach that first"
    )


def _make_socket_directory(directory: Path, runtime_dir: Path) -> None:
    if not directory.is_relative_to(runtime_dir):
        return
    try:
        # Front-ends of other users have to reach the sockets, which have modes of their own.
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise DeviceError(
            f"{directory} cannot be made for the socket: {error.strerror}; make it, or choose "
            "another path with --socket"
        ) from error
