"""The host's side of vm-images/agent.sh: commands in, exit codes and output out."""

from __future__ import annotations

import base64
import binascii
import socket
import time
from dataclasses import dataclass

from .process import HarnessError, time_limit_s

__all__ = ["Agent", "CommandFailedError", "CommandResult"]


@dataclass(frozen=True)
class CommandResult:
    """What a command in the guest did; `output` is its stdout and stderr."""

    command: str
    exit_code: int
    output: str


class CommandFailedError(HarnessError):
    """A command in the guest ended with another exit code than 0."""

    def __init__(self, result: CommandResult) -> None:
        super().__init__(
            f"in the guest, this ended with {result.exit_code}:\n{result.command}\n"
            f"--- output ---\n{result.output}"
        )
        self.result = result


class Agent:
    """One connection to the agent; outlives reboots of the guest."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pending = bytearray()
        self._last_id = 0
        self.boot_id: str | None = None

    def wait_ready(self, limit_s: float) -> str:
        """Waits for an agent of another boot than the last one seen; returns its boot id."""
        deadline = time.monotonic() + time_limit_s(limit_s)
        while True:
            words = self._line(deadline, "the guest's agent to start").split()
            # What firmware or a boot that was cut short left on the port may precede it.
            if b"READY" in words[:-1] and words[-1].decode() != self.boot_id:
                self.boot_id = words[-1].decode()
                return self.boot_id

    def run(self, command: str, *, limit_s: float = 60, check: bool = True) -> CommandResult:
        """Runs a shell command and waits for it.

        After `limit_s` the guest kills the command (exit code 124 or 143); if the guest does not
        answer some time after that, it hangs, and HarnessError is raised.
        """
        self._last_id += 1
        scaled_s = time_limit_s(limit_s)
        self._send(command, round(scaled_s) or 1)
        deadline = time.monotonic() + scaled_s + time_limit_s(15)
        while True:
            words = self._line(deadline, f"the end of: {command}").split()
            if words[:1] != [str(self._last_id).encode()]:
                continue
            try:
                output = base64.b64decode(words[2] if len(words) > 2 else b"", validate=True)
                result = CommandResult(command, int(words[1]), output.decode(errors="replace"))
            except (ValueError, IndexError, binascii.Error) as error:
                raise HarnessError(f"the guest's agent answered nonsense: {words!r}") from error
            if check and result.exit_code != 0:
                raise CommandFailedError(result)
            return result

    def start(self, command: str) -> None:
        """Sends a command that ends the agent (reboot, power off): no answer is awaited."""
        self._last_id += 1
        self._send(command, 600)

    def _send(self, command: str, limit_s: int) -> None:
        encoded = base64.b64encode(command.encode()).decode()
        self._connection.settimeout(time_limit_s(30))
        try:
            self._connection.sendall(f"{self._last_id} {limit_s} {encoded}\n".encode())
        except OSError as error:
            raise HarnessError("the guest is gone: QEMU closed the agent's port") from error

    def _line(self, deadline: float, what: str) -> bytes:
        while (end := self._pending.find(b"\n")) < 0:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise HarnessError(f"timed out waiting for {what}")
            self._connection.settimeout(remaining_s)
            try:
                received = self._connection.recv(65536)
            except TimeoutError:
                continue
            except ConnectionError:
                received = b""
            if not received:
                raise HarnessError(f"QEMU ended while waiting for {what}")
            self._pending += received
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        return line

    def close(self) -> None:
        self._connection.close()
