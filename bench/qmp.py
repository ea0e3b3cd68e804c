"""As much of QMP as the benchmarks need of `qemu-storage-daemon`. One thread."""

import socket
import time
from pathlib import Path
from typing import Any

import msgspec

from bench.backends import BackendError

__all__ = ["Monitor"]


class Monitor:
    """A connection to a monitor socket; close it before the daemon ends."""

    def __init__(self, path: Path, *, timeout_s: float = 60.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
            self._lines = self._socket.makefile("rb")
            self._lines.readline()  # the greeting
            self.call("qmp_capabilities")
        except OSError as error:
            self._socket.close()
            raise BackendError(f"qemu-storage-daemon: no monitor on {path}: {error}") from error

    def call(self, command: str, arguments: dict[str, Any] | None = None) -> float:
        """Runs a command; returns the seconds it took.

        Raises BackendError with what it said.
        """
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        begin = time.monotonic()
        try:
            self._socket.sendall(msgspec.json.encode(message) + b"\n")
            while line := self._lines.readline():
                answer = msgspec.json.decode(line)
                if "return" in answer:
                    return time.monotonic() - begin
                if "error" in answer:
                    raise BackendError(
                        f"qemu-storage-daemon: {command}: {answer['error'].get('desc')}"
                    )
        except OSError as error:
            raise BackendError(f"qemu-storage-daemon: {command}: {error}") from error
        raise BackendError(f"qemu-storage-daemon: {command}: it hung up")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
