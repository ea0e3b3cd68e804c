"""One vhost-user session: the state machine between a front-end's messages and the engine.

A session:    open ──message──▶ handling ──▶ open ──end──▶ closing ──▶ closed (with a reason)

A ring:       stopped ──kick, size, addresses, memory──▶ started ──GET_VRING_BASE──▶ stopped
              and, independently, disabled ◀──SET_VRING_ENABLE──▶ enabled

Invariants:
- One message is handled at a time and to its end; the engine is called from one helper thread at
  a time. Ending a session waits for the call under way.
- State changes only after the engine has agreed, so a refused request has no effect.
- A started ring has size, addresses, base and features that do not change until it is stopped.
- Whatever ends a session, the engine's export is closed (rings stopped, memory unmapped) and every
  descriptor is closed before `run` returns, and there is a reason.

What a ring starts on: vhost-user.rst, "Ring states", says "upon receiving a kick". The ring is
handed to the engine when the kick descriptor (or the flag for polling) has arrived, which amounts
to the same: the engine looks at the ring once, finds nothing or something, and waits for the kick.

All of it runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import structlog

from vhostd.errors import VhostdError
from vhostd.protocol import handlers
from vhostd.protocol.device import Device
from vhostd.protocol.features import ProtocolFeature, VirtioFeature, names
from vhostd.protocol.framing import (
    Connection,
    ConnectionLostError,
    Message,
    PeerCredentials,
    PeerTimeoutError,
)
from vhostd.protocol.messages import (
    RULES,
    HeaderFlag,
    RefusedError,
    Request,
    RequestRule,
    ViolationError,
    encode_message,
    encode_u64,
    request_name,
)
from vhostd.protocol.state import SessionState

__all__ = ["EndKind", "EngineCall", "Session", "SessionEnd", "SessionInfo"]

EngineCall: TypeAlias = Callable[..., Awaitable[Any]]
"""Runs a blocking function elsewhere, as `asyncio.to_thread` does."""

MAX_REFUSALS = 1000
"""Requests that are refused before a session ends: a front-end that goes on asking is broken."""


class EndKind(Enum):
    """Why a session ended, in a word."""

    PEER_CLOSED = "peer-closed"
    PEER_LOST = "peer-lost"
    TIMEOUT = "timeout"
    VIOLATION = "violation"
    REFUSED = "refused"
    ENGINE = "engine"
    STOPPED = "stopped"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """Why a session ended: a word for programs, and a sentence for people."""

    kind: EndKind
    reason: str


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as it stands, for people and for `sessions` in the API."""

    name: str
    peer: PeerCredentials
    connected_ns: int
    virtio_features: list[str]
    protocol_features: list[str]
    queues: int
    queues_started: list[int]
    queues_enabled: list[int]
    memory_regions: int
    memory_bytes: int
    messages: int
    refusals: int


class _EndRequestedError(Exception):
    """Carries what `Session.end` was told through the connection to `run`."""

    def __init__(self, end: SessionEnd) -> None:
        super().__init__(end.reason)
        self.end = end


class Session:
    """Serves one connection. Takes over `connection` and `device`, and closes both in `run`.

    Args:
        name: of the export, for logs.
        queues: rings offered.
        write_cache: what the guest last wrote to `writeback`, if known; None: the device's own.
        on_write_cache: awaited when the guest has changed it, before the guest is told so.
        call: runs a blocking function in a helper thread.
    """

    def __init__(
        self,
        connection: Connection,
        device: Device,
        *,
        name: str,
        queues: int,
        write_cache: bool | None = None,
        on_write_cache: Callable[[bool], Awaitable[None]] | None = None,
        call: EngineCall = asyncio.to_thread,
    ) -> None:
        self._connection = connection
        self._call = call
        self._under_way: asyncio.Future[Any] | None = None
        self._name = name
        self._connected_ns = time.time_ns()
        self._device_closed = False
        self._messages = 0
        self._refusals = 0
        self._peer = connection.credentials()
        self._log = structlog.get_logger().bind(export=name, peer_pid=self._peer.pid)
        self._write_cache = write_cache
        self._state = SessionState(
            device, queues=queues, engine=self._engine, on_write_cache=on_write_cache
        )

    def info(self) -> SessionInfo:
        state = self._state
        return SessionInfo(
            name=self._name,
            peer=self._peer,
            connected_ns=self._connected_ns,
            virtio_features=names(VirtioFeature, state.features),
            protocol_features=names(ProtocolFeature, state.protocol_features),
            queues=len(state.queues),
            queues_started=[q.index for q in state.queues if q.started],
            queues_enabled=[q.index for q in state.queues if state.is_enabled(q)],
            memory_regions=len(state.memory.regions),
            memory_bytes=state.memory.size_bytes,
            messages=self._messages,
            refusals=self._refusals,
        )

    def serves(self, connection: Connection) -> bool:
        return self._connection is connection

    @property
    def peer_is_gone(self) -> bool:
        return self._connection.peer_is_gone()

    def end(self, kind: EndKind, reason: str) -> None:
        """Asks the session to end; `run` returns when the message at hand is done with."""
        self._connection.abort(_EndRequestedError(SessionEnd(kind, reason)))

    async def run(self) -> SessionEnd:
        """Serves messages until the session ends; releases everything before it returns.

        Raises nothing but CancelledError, and that, too, only when everything is released.
        """
        self._log.info("session started", peer_uid=self._peer.uid)
        cancelled = False
        try:
            end = await self._serve()
        except asyncio.CancelledError:
            cancelled = True
            end = SessionEnd(EndKind.STOPPED, "the daemon is stopping")
        release = asyncio.ensure_future(self._release(end))
        while not release.done():
            try:
                await asyncio.shield(release)
            except asyncio.CancelledError:
                # The rings are stopped before the front-end sees that we let go, whoever hurries.
                cancelled = True
        end = end if release.cancelled() else release.result()
        if not self._device_closed:
            # The loop is being torn down and cancelled even the release: no one is left to wait.
            self._close_device()
        self._state.close_fds()
        self._connection.close()
        self._log.info(
            "session ended",
            kind=end.kind.value,
            reason=end.reason,
            messages=self._messages,
            refusals=self._refusals,
        )
        if cancelled:
            raise asyncio.CancelledError
        return end

    async def _serve(self) -> SessionEnd:
        try:
            if self._write_cache is not None:
                await self._state.change_write_cache(self._write_cache)
            while (message := await self._connection.receive()) is not None:
                with message.fds:
                    await self._handle(message)
                # A peer that floods the socket gets its turn, not the whole loop.
                await asyncio.sleep(0)
        except _EndRequestedError as asked:
            return asked.end
        except ViolationError as error:
            return SessionEnd(EndKind.VIOLATION, str(error))
        except RefusedError as error:
            return SessionEnd(EndKind.REFUSED, str(error))
        except PeerTimeoutError as error:
            return SessionEnd(EndKind.TIMEOUT, str(error))
        except ConnectionLostError as error:
            return SessionEnd(EndKind.PEER_LOST, str(error))
        except VhostdError as error:
            return SessionEnd(EndKind.ENGINE, str(error))
        except Exception as error:
            # A defect of ours costs this session, not the daemon and every other disk.
            self._log.exception("session failed by a defect in vhostd")
            return SessionEnd(EndKind.INTERNAL, f"{type(error).__name__}: {error}")
        return SessionEnd(EndKind.PEER_CLOSED, "the front-end closed the connection")

    async def _handle(self, message: Message) -> None:
        header = message.header
        self._messages += 1
        name = request_name(header.request)
        self._log.debug("request", request=name, fds=len(message.fds))
        rule = RULES.get(header.request)  # type: ignore[call-overload]
        wants_result = (
            header.need_reply
            and self._state.has(ProtocolFeature.REPLY_ACK)
            and not (rule is not None and rule.replies)
        )
        reply: bytes | None
        try:
            reply = await self._answer(message, rule)
        except ViolationError as error:
            raise ViolationError(f"{name}: {error}") from error
        except RefusedError as error:
            self._refusals += 1
            ends_session = error.ends_session and not wants_result
            if ends_session or self._refusals > MAX_REFUSALS:
                raise RefusedError(f"{name}: {error}") from error
            self._log.warning("request refused", request=name, reason=str(error))
            reply = encode_u64(1) if wants_result else None
        else:
            if reply is None and wants_result:
                reply = encode_u64(0)
        if reply is not None:
            await self._connection.send(
                encode_message(header.request, reply, flags=HeaderFlag.REPLY)
            )

    async def _answer(self, message: Message, rule: RequestRule | None) -> bytes | None:
        """The payload of the request's own reply, or None if it has none."""
        if rule is None:
            raise RefusedError("it is not offered by this back-end")
        if rule.needs is not None and not self._state.has(rule.needs):
            raise RefusedError(f"it needs {rule.needs.name}, which was not negotiated")
        payload = rule.decode(message.payload)
        rule.check_fds(payload, len(message.fds))
        handler = handlers.HANDLERS[Request(message.header.request)]
        return await handler(self._state, payload, message.fds)

    async def _engine(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Calls the engine elsewhere. Remembered, so that a cancelled session waits for it."""
        self._under_way = asyncio.ensure_future(self._call(function, *args, **kwargs))
        return await asyncio.shield(self._under_way)

    async def _release(self, end: SessionEnd) -> SessionEnd:
        """Closes the engine's export, after the call to it that may be under way."""
        if self._under_way is not None and not self._under_way.done():
            with contextlib.suppress(Exception):
                await self._under_way
        try:
            await self._call(self._close_device)
        except Exception as error:
            self._log.exception("engine export did not close cleanly")
            if end.kind in (EndKind.PEER_CLOSED, EndKind.STOPPED):
                return SessionEnd(EndKind.ENGINE, f"closing the export failed: {error}")
        return end

    def _close_device(self) -> None:
        self._device_closed = True
        self._state.device.close()
