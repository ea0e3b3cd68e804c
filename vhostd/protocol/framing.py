"""Messages over a unix stream socket, with the file descriptors that come along.

Invariants:
- Every received descriptor has one owner at any time (`ReceivedFds`), is close-on-exec, and is
  closed on every path that does not take it.
- Bytes are read only for the message that is due, never beyond it, so that descriptors cannot be
  taken for another message's; nothing is read while a message is handled. So memory for a peer is
  bounded: one message in, one reply out.
- A message that was begun must be complete within `message_timeout_s`, and a reply taken by the
  peer within `send_timeout_s`; between messages a peer may be silent for ever.

All of it runs on the event loop's thread. asyncio's streams cannot carry descriptors, hence the
socket is driven by `add_reader` and `recvmsg`.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import select
import socket
import struct
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from vhostd.errors import UnavailableError
from vhostd.protocol.messages import (
    HEADER_BYTES,
    MAX_FDS,
    Header,
    ViolationError,
    request_name,
)

__all__ = [
    "Connection",
    "ConnectionLostError",
    "Limits",
    "Message",
    "PeerCredentials",
    "PeerTimeoutError",
    "ReceivedFds",
]

_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
_CREDENTIALS = struct.Struct("=iII")
_T = TypeVar("_T")


class ConnectionLostError(UnavailableError):
    """The peer is gone: it closed the socket within a message, or the socket failed."""


class PeerTimeoutError(UnavailableError):
    """The peer did not finish a message, or did not take a reply, in time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a peer may take. Seconds."""

    message_timeout_s: float = 5.0
    send_timeout_s: float = 5.0


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """Who connected, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


class ReceivedFds:
    """Owns descriptors that came with a message until they are taken or closed."""

    __slots__ = ("_fds",)

    def __init__(self) -> None:
        self._fds: list[int] = []

    def __len__(self) -> int:
        return len(self._fds)

    def __iter__(self) -> Iterator[int]:
        """The descriptors still owned, in the order they were sent."""
        return iter(tuple(self._fds))

    def __enter__(self) -> ReceivedFds:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, fds: list[int]) -> None:
        self._fds.extend(fds)

    def take(self) -> int:
        """Hands the first descriptor to the caller, who closes it from now on."""
        return self._fds.pop(0)

    def close(self) -> None:
        while self._fds:
            # Whatever close(2) says, the number is free: trying again could close another's.
            with contextlib.suppress(OSError):
                os.close(self._fds.pop())


@dataclass(frozen=True, slots=True)
class Message:
    """A request as it came. Whoever receives it closes `fds`."""

    header: Header
    payload: bytes
    fds: ReceivedFds


class Connection:
    """One accepted vhost-user socket. Owns it; used by one session, on the event loop's thread."""

    def __init__(self, sock: socket.socket, limits: Limits | None = None) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._limits = limits or Limits()
        self._aborted: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def credentials(self) -> PeerCredentials:
        data = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return PeerCredentials(*_CREDENTIALS.unpack(data))

    def peer_is_gone(self) -> bool:
        """True once the peer has closed its end, even with unread messages before that."""
        if self._socket.fileno() < 0:
            return True
        poller = select.poll()
        poller.register(self._socket, select.POLLRDHUP)
        return bool(poller.poll(0))

    def abort(self, error: Exception) -> None:
        """Makes the `receive` or `send` that waits now, and every later one, raise `error`."""
        if self._aborted is None:
            self._aborted = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    def close(self) -> None:
        self._socket.close()

    async def receive(self) -> Message | None:
        """The next message; None if the peer closed the socket between two messages.

        Raises:
            ViolationError: a header that no request has, too many or lost descriptors.
            PeerTimeoutError: a message that was begun did not come to its end.
            ConnectionLostError: the peer left in the middle of a message.
        """
        fds = ReceivedFds()
        try:
            first = await self._receive_some(HEADER_BYTES, fds)
            if not first:
                return None
            return await self._within(
                self._receive_rest(first, fds),
                self._limits.message_timeout_s,
                "a message that was begun did not come to its end",
            )
        except BaseException:
            fds.close()
            raise

    async def send(self, data: bytes) -> None:
        """Sends a reply.

        Raises:
            PeerTimeoutError: the peer does not read.
            ConnectionLostError: the peer is gone.
        """
        await self._within(
            self._send_all(memoryview(data)),
            self._limits.send_timeout_s,
            "the peer does not read its replies",
        )

    async def _within(self, work: Coroutine[Any, Any, _T], timeout_s: float, what: str) -> _T:
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError:
            raise PeerTimeoutError(f"{what} within {timeout_s:g} s") from None

    async def _receive_rest(self, first: bytes, fds: ReceivedFds) -> Message:
        header = Header.decode(first + await self._receive_exactly(HEADER_BYTES - len(first), fds))
        payload = await self._receive_exactly(header.size_bytes, fds, request_name(header.request))
        return Message(header, payload, fds)

    async def _receive_exactly(
        self, size_bytes: int, fds: ReceivedFds, name: str = "a header"
    ) -> bytes:
        parts = bytearray()
        while len(parts) < size_bytes:
            part = await self._receive_some(size_bytes - len(parts), fds)
            if not part:
                raise ConnectionLostError(
                    f"the peer closed the socket within {name}: {len(parts)} of {size_bytes} "
                    "bytes came"
                )
            parts += part
        return bytes(parts)

    async def _receive_some(self, at_most_bytes: int, fds: ReceivedFds) -> bytes:
        """Waits for 1 to `at_most_bytes` bytes, or b"" at the end; descriptors go to `fds`."""
        while True:
            if self._aborted is not None:
                raise self._aborted
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    at_most_bytes, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await self._ready(for_writing=False)
                continue
            except InterruptedError:
                continue
            except OSError as error:
                if isinstance(error, ConnectionResetError):
                    return b""
                raise ConnectionLostError(f"the socket failed: {error.strerror}") from error
            fds.add(_descriptors(ancillary))
            if flags & socket.MSG_CTRUNC:
                raise ViolationError(
                    f"file descriptors of a message were lost: it has more than {MAX_FDS}, or "
                    "this process has no more to give (see RLIMIT_NOFILE)"
                )
            if len(fds) > MAX_FDS:
                raise ViolationError(f"a message has more than {MAX_FDS} file descriptors")
            return data

    async def _send_all(self, data: memoryview) -> None:
        while data:
            if self._aborted is not None:
                raise self._aborted
            try:
                sent = self._socket.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await self._ready(for_writing=True)
            except InterruptedError:
                continue
            except OSError as error:
                raise ConnectionLostError(
                    f"the peer did not take a reply: {error.strerror}"
                ) from error
            else:
                data = data[sent:]

    async def _ready(self, *, for_writing: bool) -> None:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiter = waiter
        fd = self._socket.fileno()
        add, remove = (
            (loop.add_writer, loop.remove_writer)
            if for_writing
            else (loop.add_reader, loop.remove_reader)
        )
        add(fd, _wake, waiter)
        try:
            await waiter
        finally:
            remove(fd)
            self._waiter = None


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in control messages. A number cut short by truncation is no descriptor."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)
