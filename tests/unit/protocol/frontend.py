"""A front-end over a real socketpair, and a device that records what a session asks of it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

from vhostd.errors import UsageError
from vhostd.protocol.features import ProtocolFeature, VirtioFeature
from vhostd.protocol.framing import Connection, Limits
from vhostd.protocol.messages import (
    HEADER_BYTES,
    Header,
    HeaderFlag,
    MemoryTableDescription,
    RegionDescription,
    Request,
    VringAddress,
    VringFd,
    VringState,
    decode_u64,
    encode_message,
    encode_u64,
)
from vhostd.protocol.session import EngineCall, Session, SessionEnd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vhostd._native import Export, MemoryRegion
    from vhostd.protocol.device import Device

    def _the_engine_fulfils_the_protocol(export: Export) -> Device:
        return export


BLK_FEATURES = int(
    VirtioFeature.VERSION_1
    | VirtioFeature.INDIRECT_DESC
    | VirtioFeature.EVENT_IDX
    | VirtioFeature.BLK_FLUSH
    | VirtioFeature.BLK_CONFIG_WCE
    | VirtioFeature.BLK_MQ
    | VirtioFeature.BLK_SEG_MAX
)
ALL_FEATURES = BLK_FEATURES | VirtioFeature.PROTOCOL_FEATURES
DEFAULT_PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.RESET_DEVICE
)
MEMORY_BYTES = 1 << 20
GUEST_ADDRESS = 0x1_0000_0000
USER_ADDRESS = 0x7F00_0000_0000
CONFIG_BYTES = 60


class FakeDevice:
    """Fulfils `Device`, checks what a session promises, and records every call.

    A broken promise is an AssertionError, which ends the session as an internal error.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.regions: list[MemoryRegion] = []
        self.started: dict[int, dict[str, Any]] = {}
        self.write_cache = True
        self.closed = False
        self.next_available = 7
        self.fail: dict[str, Exception] = {}
        self._busy = False

    def _called(self, name: str, *args: Any) -> None:
        assert not self.closed, f"{name} after close"
        self.calls.append((name, *args))
        if name in self.fail:
            raise self.fail[name]

    def names(self) -> list[str]:
        return [str(call[0]) for call in self.calls]

    def _check_rings(self, regions: Sequence[MemoryRegion]) -> None:
        for index, ring in self.started.items():
            if not _in_memory(ring["descriptor_address"], regions):
                raise UsageError(f"queue {index} would be outside memory")

    def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        self._called("set_memory", [dict(r) for r in regions])
        for region in regions:
            os.fstat(region["fd"])
        self._check_rings(regions)
        self.regions = list(regions)

    def add_region(self, region: MemoryRegion) -> None:
        self._called("add_region", dict(region))
        os.fstat(region["fd"])
        self.regions.append(region)

    def remove_region(self, guest_address: int, user_address: int, size_bytes: int) -> None:
        self._called("remove_region", guest_address, user_address, size_bytes)
        key = (guest_address, user_address, size_bytes)
        kept = [
            r
            for r in self.regions
            if (r["guest_address"], r["user_address"], r["size_bytes"]) != key
        ]
        assert len(kept) == len(self.regions) - 1, "removes what is not there"
        self._check_rings(kept)
        self.regions = kept

    def start_queue(
        self,
        index: int,
        *,
        size: int,
        descriptor_address: int,
        available_address: int,
        used_address: int,
        base: int,
        kick_fd: int | None,
        call_fd: int | None,
        error_fd: int | None,
        features: int,
        enabled: bool,
    ) -> None:
        ring = {
            "size": size,
            "descriptor_address": descriptor_address,
            "available_address": available_address,
            "used_address": used_address,
            "base": base,
            "has_kick": kick_fd is not None,
            "has_call": call_fd is not None,
            "has_error": error_fd is not None,
            "features": features,
            "enabled": enabled,
        }
        self._called("start_queue", index, ring)
        assert index not in self.started, "starts a queue twice"
        assert not features & ~BLK_FEATURES, "features that were not offered"
        assert 0 < size <= 32768
        assert size & (size - 1) == 0
        assert 0 <= base <= 0xFFFF
        for fd in (kick_fd, call_fd, error_fd):
            if fd is not None:
                os.fstat(fd)
        for address in (descriptor_address, available_address, used_address):
            if not _in_memory(address, self.regions):
                raise UsageError(f"ring address {address:#x} is outside guest memory")
        self.started[index] = ring

    def set_queue_enabled(self, index: int, enabled: bool) -> None:
        self._called("set_queue_enabled", index, enabled)
        self.started[index]["enabled"] = enabled

    def set_queue_call(self, index: int, call_fd: int | None) -> None:
        self._called("set_queue_call", index, call_fd is not None)
        self.started[index]["has_call"] = call_fd is not None

    def set_queue_kick(self, index: int, kick_fd: int | None) -> None:
        self._called("set_queue_kick", index, kick_fd is not None)
        self.started[index]["has_kick"] = kick_fd is not None

    def set_queue_error(self, index: int, error_fd: int | None) -> None:
        self._called("set_queue_error", index, error_fd is not None)
        self.started[index]["has_error"] = error_fd is not None

    def stop_queue(self, index: int) -> int:
        self._called("stop_queue", index)
        del self.started[index]
        return self.next_available

    def set_write_cache(self, enabled: bool) -> None:
        self._called("set_write_cache", enabled)
        self.write_cache = enabled

    def config_space(self, features: int) -> bytes:
        assert not features & ~BLK_FEATURES
        space = bytearray(range(CONFIG_BYTES))
        space[32] = self.write_cache
        return bytes(space)

    def features(self) -> int:
        return BLK_FEATURES

    def close(self) -> None:
        self._called("close")
        self.closed = True


def _in_memory(address: int, regions: Sequence[MemoryRegion]) -> bool:
    return any(r["user_address"] <= address < r["user_address"] + r["size_bytes"] for r in regions)


@contextmanager
def memory_file(size_bytes: int = MEMORY_BYTES) -> Iterator[int]:
    fd = os.memfd_create("guest-memory")
    try:
        os.ftruncate(fd, size_bytes)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def event_fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


class FrontEnd:
    """Sends messages and reads replies. Small enough to never fill a socket's buffer."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.setblocking(False)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self.socket, [data], list(fds))

    async def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
    ) -> None:
        flags = HeaderFlag.NEED_REPLY if need_reply else 0
        self.send_bytes(encode_message(request, payload, flags=flags), fds)

    async def reply(self) -> tuple[int, bytes]:
        """Request and payload of the next reply; EOFError if the session has ended."""
        loop = asyncio.get_running_loop()
        data = b""
        size_bytes = HEADER_BYTES
        header = None
        while len(data) < size_bytes:
            try:
                part = await asyncio.wait_for(
                    loop.sock_recv(self.socket, size_bytes - len(data)), 10
                )
            except ConnectionResetError:
                raise EOFError("the session has ended") from None
            if not part:
                raise EOFError("the session has ended")
            data += part
            if header is None and len(data) == HEADER_BYTES:
                # A reply's flags are those of a request with the reply bit instead.
                request = int.from_bytes(data[:4], "little")
                assert int.from_bytes(data[4:8], "little") == 0x1 | HeaderFlag.REPLY
                header = Header(request, 0, int.from_bytes(data[8:], "little"))
                size_bytes += header.size_bytes
        assert header is not None
        return header.request, data[HEADER_BYTES:]

    async def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """A request that has a reply of its own."""
        await self.send(request, payload, fds)
        answered, reply = await self.reply()
        assert answered == request
        return reply

    async def get(self, request: int) -> int:
        return decode_u64(await self.ask(request))

    async def result(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """A request with need_reply: 0 is success."""
        await self.send(request, payload, fds, need_reply=True)
        answered, reply = await self.reply()
        assert answered == request
        return decode_u64(reply)

    async def do(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        assert await self.result(request, payload, fds) == 0

    # Steps that many tests need

    async def negotiate(
        self, features: int = ALL_FEATURES, protocol: int = DEFAULT_PROTOCOL
    ) -> None:
        """As QEMU does. With REPLY_ACK, waits until it is all handled."""
        await self.get(Request.GET_FEATURES)
        await self.get(Request.GET_PROTOCOL_FEATURES)
        await self.send(Request.SET_PROTOCOL_FEATURES, encode_u64(protocol))
        await self.send(Request.SET_OWNER)
        await self.send(Request.SET_FEATURES, encode_u64(features))
        await self.get(Request.GET_FEATURES)

    async def share_memory(self) -> None:
        with memory_file() as fd:
            await self.send(Request.SET_MEM_TABLE, table(region()), [fd])
            await self.get(Request.GET_FEATURES)

    async def start_ring(self, index: int = 0, *, size: int = 128, base: int = 0) -> None:
        with event_fd() as fd:
            await self.send(Request.SET_VRING_CALL, VringFd(index, True).encode(), [fd])
            await self.send(Request.SET_VRING_NUM, VringState(index, size).encode())
            await self.send(Request.SET_VRING_BASE, VringState(index, base).encode())
            await self.send(Request.SET_VRING_ADDR, address(index).encode())
            await self.send(Request.SET_VRING_KICK, VringFd(index, True).encode(), [fd])
            await self.get(Request.GET_FEATURES)

    async def running(self, *, features: int = ALL_FEATURES) -> None:
        await self.negotiate(features)
        await self.share_memory()
        await self.start_ring()


def region(slot: int = 0, *, size_bytes: int = MEMORY_BYTES, offset: int = 0) -> RegionDescription:
    gap = slot * 4 * MEMORY_BYTES
    return RegionDescription(GUEST_ADDRESS + gap, size_bytes, USER_ADDRESS + gap, offset)


def table(*regions: RegionDescription) -> bytes:
    return MemoryTableDescription(regions).encode()


def address(index: int = 0) -> VringAddress:
    start = USER_ADDRESS + index * 0x10000
    return VringAddress(index, 0, start, start + 0x5000, start + 0x4000, 0)


class Served:
    """A session that runs, its device and its front-end."""

    def __init__(self, session: Session, device: FakeDevice, front: FrontEnd) -> None:
        self.session = session
        self.device = device
        self.front = front
        self.task = asyncio.create_task(session.run())

    async def end(self) -> SessionEnd:
        return await asyncio.wait_for(asyncio.shield(self.task), 20)


@asynccontextmanager
async def served(
    *,
    device: FakeDevice | None = None,
    queues: int = 4,
    limits: Limits | None = None,
    call: EngineCall = asyncio.to_thread,
    write_cache: bool | None = None,
    on_write_cache: Callable[[bool], Awaitable[None]] | None = None,
) -> AsyncIterator[Served]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    device = device or FakeDevice()
    front = FrontEnd(theirs)
    session = Session(
        Connection(ours, limits),
        device,
        name="pool/volume",
        queues=queues,
        write_cache=write_cache,
        on_write_cache=on_write_cache,
        call=call,
    )
    running = Served(session, device, front)
    try:
        yield running
    finally:
        theirs.close()
        done, _ = await asyncio.wait([running.task], timeout=20)
        assert done
        assert device.closed


async def inline(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """An `EngineCall` that stays on this thread: for runs of many cases."""
    return function(*args, **kwargs)


def run_async(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs an async test on a loop of its own."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run
