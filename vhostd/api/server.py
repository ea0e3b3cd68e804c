"""The JSON-RPC server: see `wire` for the protocol, `methods` for what can be called.

Bounds: 64 clients at once (more are told so and closed), requests of 1 MiB, batches of 100, 30 s
for a message that was begun, for a reply to be taken, and 10 min of silence. A client that breaks
them loses its connection, and no other client notices. Requests of one client are done in turn.

All of it runs on the event loop's thread; methods may take long without holding up others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from vhostd.api import wire
from vhostd.errors import (
    BusyError,
    DeviceError,
    ExistsError,
    InternalError,
    UsageError,
    VhostdError,
)

__all__ = ["ApiServer", "Method", "MethodNotFoundError"]

MAX_CLIENTS = 64
MESSAGE_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 600.0

Method = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Does a call: name and parameters to a result that JSON can carry."""


class MethodNotFoundError(Exception):
    """Raised by a `Method` for a name it does not know."""


class ApiServer:
    """Serves calls on one unix socket.

    Args:
        mode, group: of the socket file: whoever can open it can do everything.
    """

    def __init__(
        self,
        path: Path,
        call: Method,
        *,
        mode: int = 0o600,
        group: str | None = None,
        message_timeout_s: float = MESSAGE_TIMEOUT_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        max_clients: int = MAX_CLIENTS,
    ) -> None:
        self.path = path
        self._call = call
        self._mode = mode
        self._group = group
        self._message_timeout_s = message_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._max_clients = max_clients
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger().bind(socket=str(path))

    async def start(self) -> None:
        """Makes the socket and begins to serve.

        Raises:
            BusyError: a process listens on it.
            ExistsError: the path is taken by something else.
            UsageError, DeviceError: it cannot be made.
        """
        listener = self._listen()
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listener, limit=wire.MAX_REQUEST_BYTES
        )

    async def stop(self) -> None:
        """Removes the socket, lets the calls under way finish their replies, and ends."""
        if self._server is None:
            return
        self._server.close()
        self.path.unlink(missing_ok=True)
        current = asyncio.current_task()
        clients = [task for task in self._clients if task is not current]
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        self._server = None

    # A client

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            return
        self._clients.add(task)
        try:
            if len(self._clients) > self._max_clients:
                error = BusyError(
                    f"the daemon serves {self._max_clients} clients already; try again later"
                )
                await self._send(writer, wire.error_reply(None, wire.error_object(error)))
                return
            await self._converse(reader, writer)
        except (ConnectionError, TimeoutError):
            pass
        except asyncio.CancelledError:
            # Raising it on would be logged by asyncio's streams as a defect.
            pass
        finally:
            self._clients.discard(task)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        buffer = bytearray()
        while True:
            searched = 0
            while (end := buffer.find(b"\n", searched)) < 0:
                searched = len(buffer)
                if searched > wire.MAX_REQUEST_BYTES:
                    await self._refuse(writer, f"it has more than {wire.MAX_REQUEST_BYTES} bytes")
                    return
                timeout_s = self._message_timeout_s if buffer else self._idle_timeout_s
                async with asyncio.timeout(timeout_s):
                    received = await reader.read(65536)
                if not received:
                    return
                buffer += received
            if end > wire.MAX_REQUEST_BYTES:
                await self._refuse(writer, f"it has more than {wire.MAX_REQUEST_BYTES} bytes")
                return
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            if line.strip():
                reply = await self._answer(line)
                if reply is not None:
                    await self._send(writer, reply)

    async def _refuse(self, writer: asyncio.StreamWriter, reason: str) -> None:
        error = {"code": wire.INVALID_REQUEST, "message": f"the request is refused: {reason}"}
        await self._send(writer, wire.error_reply(None, error))

    async def _send(self, writer: asyncio.StreamWriter, reply: Any) -> None:
        writer.write(msgspec.json.encode(reply) + b"\n")
        async with asyncio.timeout(self._message_timeout_s):
            await writer.drain()

    # A message

    async def _answer(self, line: bytes) -> Any:
        """The reply to a message, None if it wants none."""
        try:
            message = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = {"code": wire.PARSE_ERROR, "message": f"this is not JSON: {error}"}
            return wire.error_reply(None, reason)
        if not isinstance(message, list):
            return await self._answer_one(message)
        if not 1 <= len(message) <= wire.MAX_BATCH:
            reason = {
                "code": wire.INVALID_REQUEST,
                "message": f"a batch has 1 to {wire.MAX_BATCH} requests, and this {len(message)}",
            }
            return wire.error_reply(None, reason)
        replies = [await self._answer_one(request) for request in message]
        return [reply for reply in replies if reply is not None] or None

    async def _answer_one(self, message: object) -> dict[str, Any] | None:
        try:
            request = wire.parse_request(message)
        except wire.MalformedRequestError as error:
            reason = {"code": wire.INVALID_REQUEST, "message": f"not a request: {error}"}
            return wire.error_reply(None, reason)
        reply = await self._do(request)
        if request.id is msgspec.UNSET:
            return None
        return {"jsonrpc": "2.0", **reply, "id": request.id}

    async def _do(self, request: wire.Request) -> dict[str, Any]:
        try:
            return {"result": await self._call(request.method, request.params)}
        except MethodNotFoundError:
            code = wire.METHOD_NOT_FOUND
            message = f"there is no method {request.method[:64]!r}; docs/json-rpc.md lists them"
            return {"error": {"code": code, "message": message}}
        except VhostdError as error:
            return {"error": wire.error_object(error)}
        except Exception as error:
            self._log.exception("a call failed by a defect", method=request.method)
            defect = InternalError(
                f"{request.method} failed by a defect in vhostd ({type(error).__name__}: {error}); "
                "please report it with the daemon's log"
            )
            return {"error": wire.error_object(defect)}

    # The socket file

    def _listen(self) -> socket.socket:
        self._make_room()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(os.fsencode(self.path))
            # Nobody can connect before listen(), so there is no moment with a wrong mode.
            if self._group is not None:
                shutil.chown(self.path, group=self._group)
            self.path.chmod(self._mode)
            listener.listen(16)
        except (OSError, LookupError) as error:
            listener.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise DeviceError(
                f"the API socket {self.path} cannot be made: {reason}; choose another path or "
                "group in the configuration, or make its directory writable"
            ) from error
        return listener

    def _make_room(self) -> None:
        try:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise DeviceError(
                f"{self.path.parent} cannot be made for the API socket: {error.strerror}; make it, "
                "or set runtime_dir in the configuration"
            ) from error
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ExistsError(f"{self.path} exists and is not a socket; choose another path")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(os.fsencode(self.path))
            except (ConnectionRefusedError, FileNotFoundError):
                self.path.unlink(missing_ok=True)
                return
            except BlockingIOError:
                pass
            except OSError as error:
                raise UsageError(f"{self.path} cannot be used: {error.strerror}") from error
        raise BusyError(
            f"another process serves the API on {self.path}; stop it, or choose another path"
        )
