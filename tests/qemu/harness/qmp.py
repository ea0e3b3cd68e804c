"""A small QMP client: commands in order, events kept. QEMU connects to our socket."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from .process import HarnessError, time_limit_s

__all__ = ["Qmp", "accept_one", "listen"]


def listen(path: Path) -> socket.socket:
    """A listening socket that is there before QEMU starts, so nothing it sends is lost."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def accept_one(listener: socket.socket, limit_s: float, what: str) -> socket.socket:
    """The one connection expected at `listener`, which is closed."""
    with listener:
        listener.settimeout(time_limit_s(limit_s))
        try:
            connection, _ = listener.accept()
        except TimeoutError as error:
            raise HarnessError(f"{what} did not connect in {limit_s:.0f} s") from error
    return connection


class Qmp:
    """One QMP connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rwb")
        self.events: list[dict[str, Any]] = []
        self._receive(10)  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Runs a command; returns its `return`. Underscores in argument names become hyphens."""
        message = {
            "execute": command,
            "arguments": {name.replace("_", "-"): value for name, value in arguments.items()},
        }
        self._stream.write(json.dumps(message).encode() + b"\n")
        self._stream.flush()
        while True:
            answer = self._receive(30)
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise HarnessError(f"QMP {command}: {answer['error'].get('desc')}")
            else:
                return answer["return"]

    def _receive(self, limit_s: float) -> dict[str, Any]:
        self._connection.settimeout(time_limit_s(limit_s))
        try:
            line = self._stream.readline()
        except TimeoutError as error:
            raise HarnessError(f"QMP: no answer in {limit_s:.0f} s") from error
        if not line:
            raise HarnessError("QMP: QEMU closed the connection")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._stream.close()
        self._connection.close()
