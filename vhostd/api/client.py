"""A synchronous client of the JSON-RPC server, for the command line and for scripts.

    with Client(Path("/run/vhostd/vhostd.sock")) as client:
        client.call("volume.create", volume="fast/web1", size_bytes=20 << 30)

One thread at a time.
"""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from vhostd.api import wire
from vhostd.errors import UnavailableError, from_rpc

__all__ = ["Client"]

# Opening a volume recovers it, and closing one writes what is staged; both may take a while.
DEFAULT_TIMEOUT_S = 600.0


class Client:
    """A connection to a daemon, made at the first call."""

    def __init__(self, path: Path, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._buffer = bytearray()
        self._ids = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; the next call makes a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._buffer.clear()

    def call(self, method: str, **params: Any) -> Any:
        """Calls a method and returns its result.

        Raises:
            UnavailableError: no daemon answers.
            VhostdError: what the daemon reports.
        """
        request_id = next(self._ids)
        request = {"jsonrpc": "2.0", "method": method, "params": params, "id": request_id}
        try:
            reply = self._exchange(msgspec.json.encode(request) + b"\n")
        except (OSError, msgspec.DecodeError) as error:
            self.close()
            raise UnavailableError(
                f"the daemon on {self.path} did not answer {method}: {error}; see its log"
            ) from error
        if not isinstance(reply, dict) or reply.get("id") not in (request_id, None):
            self.close()
            raise UnavailableError(f"what answers on {self.path} is not vhostd; check the path")
        if (error_object := reply.get("error")) is not None:
            raise from_rpc(error_object["code"], error_object["message"])
        return reply["result"]

    def _exchange(self, request: bytes) -> Any:
        connection = self._connect()
        connection.sendall(request)
        while (end := self._buffer.find(b"\n")) < 0:
            received = connection.recv(1 << 18)
            if not received:
                raise ConnectionError("it closed the connection")
            self._buffer += received
            if len(self._buffer) > wire.MAX_REPLY_BYTES:
                raise ConnectionError("its reply is too long")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return msgspec.json.decode(line)

    def _connect(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self._timeout_s)
        try:
            connection.connect(os.fsencode(self.path))
        except OSError as error:
            connection.close()
            if isinstance(error, PermissionError):
                advice = "run this as a user who may open it"
            else:
                advice = (
                    "start `vhostd serve`, or name the socket of one that runs with --socket or "
                    "VHOSTD_SOCKET"
                )
            raise UnavailableError(
                f"no daemon answers on {self.path} ({error.strerror or error}); {advice}"
            ) from error
        self._socket = connection
        return connection
