"""Listens on an export's socket and runs one session at a time.

Invariants:
- At most one session an export, so at most one engine export and one front-end's memory.
- A newcomer while a session is active is accepted and closed at once, with a line in the log: the
  front-end that has the disk keeps it, and the newcomer learns of it instead of hanging. It
  replaces the session only when that session's peer is already gone (it closed its end while a
  message of its was being handled, and now reconnects, as QEMU does): then the old session is
  ended first, and the newcomer waits for that.
- Connections are taken at a bounded rate, whoever makes them; more wait in the kernel's backlog.
- The socket can be connected to only when it has its final owner and mode.
- A socket file is removed only if nobody listens on it, or if it is ours.

All of it runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from vhostd.errors import BusyError, DeviceError, ExistsError, NotFoundError, UsageError
from vhostd.protocol.device import Device
from vhostd.protocol.framing import Connection, Limits
from vhostd.protocol.session import EndKind, EngineCall, Session, SessionEnd, SessionInfo

__all__ = ["MAX_SOCKET_PATH_BYTES", "ExportServer"]

MAX_SOCKET_PATH_BYTES = 107
"""sun_path less its terminating zero: unix(7)."""
BACKLOG = 4
CONNECTS_BURST = 16
CONNECTS_PER_SECOND = 10.0
OUT_OF_FDS_PAUSE_S = 1.0


class ExportServer:
    """Serves one export on one socket.

    Args:
        path: of the socket.
        name: of the export, for logs and messages: `pool/volume`.
        open_device: makes the engine's side of a session (`Volume.export(...)`); runs in a helper
            thread; the session closes what it returns.
        queues: rings offered.
        mode, owner, group: of the socket file. Names or numbers; None leaves ours.
        write_cache: what the guest last wrote to `writeback`, if that is known from before; None
            leaves the device's own setting. A front-end does not say it again after a reconnect.
        on_write_cache: awaited when the guest has changed it, before the guest is told so; store
            it durably, and give it as `write_cache` next time.
        on_session_start, on_session_end: called on the event loop; they must not block.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        open_device: Callable[[], Device],
        queues: int,
        mode: int = 0o660,
        owner: str | int | None = None,
        group: str | int | None = None,
        write_cache: bool | None = None,
        on_write_cache: Callable[[bool], Awaitable[None]] | None = None,
        on_session_start: Callable[[SessionInfo], None] | None = None,
        on_session_end: Callable[[SessionInfo, SessionEnd], None] | None = None,
        limits: Limits | None = None,
        call: EngineCall = asyncio.to_thread,
    ) -> None:
        self.path = path
        self.name = name
        self._open_device = open_device
        self._queues = queues
        self._mode = mode
        self._owner = owner
        self._group = group
        self._write_cache = write_cache
        self._on_write_cache = on_write_cache
        self._on_session_start = on_session_start
        self._on_session_end = on_session_end
        self._limits = limits or Limits()
        self._call = call
        self._log = structlog.get_logger().bind(export=name, socket=str(path))
        self._listener: socket.socket | None = None
        self._identity: tuple[int, int] | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._session: Session | None = None
        self._session_task: asyncio.Task[None] | None = None
        self._pace = _Pace(CONNECTS_BURST, CONNECTS_PER_SECOND)

    async def start(self) -> None:
        """Makes the socket and begins to accept.

        Raises:
            UsageError: the path is too long, or the owner or group does not exist.
            ExistsError: the path is taken by something that is not a socket.
            BusyError: another process listens on it.
            NotFoundError, DeviceError: the socket cannot be made there.
        """
        self._listener = self._listen()
        status = self.path.stat()
        self._identity = (status.st_dev, status.st_ino)
        self._accepting = asyncio.create_task(self._accept_all(self._listener))
        self._log.info("listening")

    async def stop(self, reason: str = "the daemon is stopping") -> None:
        """Stops accepting, removes the socket, ends the session and waits for its end."""
        if self._accepting is not None:
            self._accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._accepting
            self._accepting = None
        if self._listener is not None:
            self._remove_socket()
            self._listener.close()
            self._listener = None
        await self.end_session(reason)

    def session(self) -> SessionInfo | None:
        """The active session as it stands; None if there is none."""
        return None if self._session is None else self._session.info()

    @property
    def write_cache(self) -> bool | None:
        """What the guest last wrote to `writeback`; None if it never did."""
        return self._write_cache

    async def end_session(self, reason: str, kind: EndKind = EndKind.STOPPED) -> None:
        """Ends the active session, if any, and waits for its end; the front-end may reconnect."""
        if self._session is not None and self._session_task is not None:
            self._session.end(kind, reason)
            await asyncio.wait([self._session_task])

    # Accepting

    async def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._pace.wait()
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._log.error(
                        "cannot accept a connection; raise the limit of open files",
                        reason=error.strerror,
                    )
                    await asyncio.sleep(OUT_OF_FDS_PAUSE_S)
                continue
            try:
                await self._admit(sock)
            except Exception:
                # One failed connection must not end the export for all later ones.
                self._log.exception("connection could not be served")

    async def _admit(self, sock: socket.socket) -> None:
        connection = Connection(sock, self._limits)
        try:
            if self._session is not None:
                if not self._session.peer_is_gone:
                    self._log.warning(
                        "connection refused: a front-end is connected already",
                        peer_pid=connection.credentials().pid,
                    )
                    return
                await self.end_session(
                    "the front-end had closed the connection and came back", EndKind.PEER_LOST
                )
            session = await self._open_session(connection)
            # From here on the session's task closes the connection and the device.
            self._session = session
            self._session_task = asyncio.create_task(self._run(session))
        finally:
            if self._session is None or not self._session.serves(connection):
                connection.close()

    async def _open_session(self, connection: Connection) -> Session:
        opening = asyncio.ensure_future(self._call(self._open_device))
        try:
            device: Device = await asyncio.shield(opening)
        except asyncio.CancelledError:
            # A device that is being made is not lost because the server stops meanwhile.
            with contextlib.suppress(Exception):
                await self._call((await opening).close)
            raise
        try:
            return Session(
                connection,
                device,
                name=self.name,
                queues=self._queues,
                write_cache=self._write_cache,
                on_write_cache=self._write_cache_changed,
                call=self._call,
            )
        except BaseException:
            await self._call(device.close)
            raise

    async def _run(self, session: Session) -> None:
        if self._on_session_start is not None:
            self._guard(self._on_session_start, session.info())
        end = SessionEnd(EndKind.STOPPED, "the daemon is stopping")
        try:
            end = await session.run()
        finally:
            self._session = None
            self._session_task = None
            if self._on_session_end is not None:
                self._guard(self._on_session_end, session.info(), end)

    async def _write_cache_changed(self, enabled: bool) -> None:
        self._write_cache = enabled
        if self._on_write_cache is not None:
            await self._on_write_cache(enabled)

    def _guard(self, callback: Callable[..., None], *args: object) -> None:
        try:
            callback(*args)
        except Exception:
            self._log.exception("a session callback failed")

    # The socket file

    def _listen(self) -> socket.socket:
        name = os.fsencode(self.path)
        if len(name) > MAX_SOCKET_PATH_BYTES:
            raise UsageError(
                f"socket path {self.path} has {len(name)} bytes; at most {MAX_SOCKET_PATH_BYTES} "
                "are possible, choose a shorter one"
            )
        self._remove_stale_socket()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        bound = False
        try:
            listener.bind(name)
            bound = True
            # Nobody can connect before listen(), so there is no moment with a wrong mode.
            self.path.chmod(self._mode)
            if self._owner is not None or self._group is not None:
                # shutil's stub wants one of both to be given; either may be None at run time.
                shutil.chown(self.path, self._owner, self._group)  # type: ignore[arg-type]
            listener.listen(BACKLOG)
        except BaseException as error:
            listener.close()
            if bound:
                self.path.unlink(missing_ok=True)
            if isinstance(error, LookupError):
                raise UsageError(f"socket {self.path}: {error}; name an existing one") from error
            if isinstance(error, FileNotFoundError):
                raise NotFoundError(
                    f"socket {self.path}: its directory does not exist; make it first"
                ) from error
            if isinstance(error, OSError):
                raise DeviceError(
                    f"socket {self.path} cannot be made: {error.strerror}; see the permissions of "
                    "its directory"
                ) from error
            raise
        return listener

    def _remove_stale_socket(self) -> None:
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ExistsError(
                f"{self.path} exists and is not a socket; remove it or choose another path"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(os.fsencode(self.path))
            except ConnectionRefusedError:
                self._log.info("removing a socket that nobody listens on")
                self.path.unlink(missing_ok=True)
                return
            except BlockingIOError:
                pass  # its backlog is full: somebody listens
            except FileNotFoundError:
                return
            except OSError as error:
                raise DeviceError(
                    f"socket {self.path} exists and cannot be probed: {error.strerror}; remove it "
                    "if nobody uses it"
                ) from error
        raise BusyError(
            f"socket {self.path} is in use by another process; stop that or choose another path"
        )

    def _remove_socket(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            status = self.path.lstat()
            if (status.st_dev, status.st_ino) == self._identity:
                self.path.unlink()


class _Pace:
    """Lets `burst` through at once, and then `per_second`: a token bucket."""

    def __init__(self, burst: int, per_second: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._tokens = float(burst)
        self._filled_s: float | None = None

    async def wait(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._filled_s is not None:
            gained = (now - self._filled_s) * self._per_second
            self._tokens = min(self._burst, self._tokens + gained)
        self._filled_s = now
        self._tokens -= 1
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens / self._per_second)
