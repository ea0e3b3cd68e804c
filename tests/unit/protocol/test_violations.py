"""A hostile front-end ends its own session, with a reason, and leaves nothing behind.

That nothing leaks is checked after each test by `conftest.no_descriptor_leaks`.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import struct
from collections.abc import Sequence

import pytest

from tests.unit.protocol.frontend import (
    FakeDevice,
    Served,
    address,
    event_fd,
    memory_file,
    region,
    run_async,
    served,
    table,
)
from vhostd.protocol.framing import Limits
from vhostd.protocol.messages import (
    RULES,
    MemoryTableDescription,
    Request,
    SingleRegion,
    VringFd,
    VringState,
    encode_message,
    encode_u64,
)
from vhostd.protocol.session import MAX_REFUSALS, EndKind, SessionEnd

QUICK = Limits(message_timeout_s=0.05, send_timeout_s=0.05)


async def end_of(s: Served, data: bytes, fds: Sequence[int] = ()) -> SessionEnd:
    s.front.send_bytes(data, fds)
    return await s.end()


@pytest.mark.parametrize("request_id", sorted(RULES), ids=lambda r: Request(r).name)
@pytest.mark.parametrize("size_bytes", [1, 3, 7, 9, 13, 41, 4096])
@run_async
async def test_a_payload_of_the_wrong_size_ends_the_session(
    request_id: Request, size_bytes: int
) -> None:
    async with served() as s:
        await s.front.negotiate()
        end = await end_of(s, encode_message(request_id, bytes([1]) * size_bytes))
    assert end.kind is EndKind.VIOLATION
    assert end.reason.startswith(Request(request_id).name)


@pytest.mark.parametrize("request_id", sorted(RULES), ids=lambda r: Request(r).name)
@run_async
async def test_a_missing_payload_ends_the_session_or_is_right(request_id: Request) -> None:
    async with served() as s:
        await s.front.negotiate()
        await s.front.send(request_id)
        s.front.socket.shutdown(socket.SHUT_WR)
        end = await s.end()
    without = {
        Request.GET_FEATURES,
        Request.SET_OWNER,
        Request.RESET_OWNER,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.RESET_DEVICE,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_STATUS,
    }
    assert end.kind is (EndKind.PEER_CLOSED if request_id in without else EndKind.VIOLATION)


@pytest.mark.parametrize("request_id", sorted(RULES), ids=lambda r: Request(r).name)
@run_async
async def test_descriptors_too_many_end_the_session(request_id: Request) -> None:
    payloads = {
        Request.SET_FEATURES: encode_u64(0),
        Request.SET_PROTOCOL_FEATURES: encode_u64(0),
        Request.SET_STATUS: encode_u64(1),
        Request.SET_MEM_TABLE: table(region()),
        Request.SET_VRING_ADDR: address().encode(),
        Request.ADD_MEM_REG: SingleRegion(region()).encode(),
        Request.REM_MEM_REG: SingleRegion(region()).encode(),
        Request.GET_CONFIG: struct.pack("=III", 0, 4, 0) + bytes(4),
        Request.SET_CONFIG: struct.pack("=III", 32, 1, 0) + b"\0",
    }
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        payloads[request] = VringFd(0, True).encode()
    for request in (
        Request.SET_VRING_NUM,
        Request.SET_VRING_BASE,
        Request.GET_VRING_BASE,
        Request.SET_VRING_ENABLE,
    ):
        payloads[request] = VringState(0, 1).encode()
    async with served() as s:
        await s.front.negotiate()
        with memory_file() as fd:
            end = await end_of(
                s, encode_message(request_id, payloads.get(request_id, b"")), [fd] * 2
            )
    assert end.kind is EndKind.VIOLATION
    assert "2 file descriptors came" in end.reason


@pytest.mark.parametrize("has_fd", [True, False])
@run_async
async def test_the_no_descriptor_flag_and_the_descriptor_must_agree(has_fd: bool) -> None:
    async with served() as s:
        await s.front.negotiate()
        with event_fd() as fd:
            payload = VringFd(0, has_fd).encode()
            end = await end_of(
                s, encode_message(Request.SET_VRING_CALL, payload), [] if has_fd else [fd]
            )
    assert end.kind is EndKind.VIOLATION


@pytest.mark.parametrize("fds", [0, 1, 3])
@run_async
async def test_a_memory_table_needs_a_descriptor_a_region(fds: int) -> None:
    async with served() as s:
        await s.front.negotiate()
        message = encode_message(Request.SET_MEM_TABLE, table(region(0), region(1)))
        with memory_file() as fd:
            end = await end_of(s, message, [fd] * fds)
    assert end.kind is EndKind.VIOLATION
    assert s.device.names() == ["close"]


@run_async
async def test_a_memory_table_of_more_than_8_regions_ends_the_session() -> None:
    async with served() as s:
        nine = MemoryTableDescription(tuple(region(slot) for slot in range(9)))
        end = await end_of(s, encode_message(Request.SET_MEM_TABLE, nine.encode()))
    assert "at most 8" in end.reason


@run_async
async def test_a_ninth_descriptor_ends_the_session() -> None:
    async with served() as s:
        with memory_file() as fd:
            end = await end_of(s, encode_message(Request.SET_OWNER), [fd] * 9)
    assert end.kind is EndKind.VIOLATION
    assert "more than 8" in end.reason


@run_async
async def test_descriptors_dribbled_over_a_message_are_bounded_and_closed() -> None:
    async with served() as s:
        message = encode_message(Request.SET_FEATURES, encode_u64(0))
        with memory_file() as fd:
            for byte in message[:12]:
                s.front.send_bytes(bytes([byte]), [fd])
            end = await s.end()
    assert end.kind is EndKind.VIOLATION
    assert "more than 8" in end.reason


@pytest.mark.parametrize("kind", ["pipe", "file", "socket"])
@pytest.mark.parametrize(
    "request_id", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]
)
@run_async
async def test_only_an_eventfd_can_be_signalled(request_id: Request, kind: str) -> None:
    reading, writing = os.pipe()
    one, other = socket.socketpair()
    with memory_file() as file, one, other:
        fd = {"pipe": writing, "file": file, "socket": one.fileno()}[kind]
        async with served() as s:
            await s.front.running()
            end = await end_of(s, encode_message(request_id, VringFd(0, True).encode()), [fd])
    os.close(reading)
    os.close(writing)
    assert end.kind is EndKind.VIOLATION
    assert "not an eventfd" in end.reason


@pytest.mark.parametrize("request_id", [Request.SET_MEM_TABLE, Request.ADD_MEM_REG])
@run_async
async def test_guest_memory_must_be_a_file(request_id: Request) -> None:
    payload = table(region())
    if request_id is Request.ADD_MEM_REG:
        payload = SingleRegion(region()).encode()
    async with served() as s:
        await s.front.negotiate()
        with event_fd() as fd:
            end = await end_of(s, encode_message(request_id, payload), [fd])
    assert end.kind is EndKind.VIOLATION
    assert "is not a file" in end.reason
    assert s.device.names() == ["close"]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (struct.pack("=III", 1, 0, 0), "version 0"),
        (struct.pack("=III", 1, 2, 0), "version 2"),
        (struct.pack("=III", 1, 0x5, 0), "flags 0x5"),
        (struct.pack("=III", 1, 0x11, 0), "flags 0x11"),
        (struct.pack("=III", 1, 0x1, 4097), "4097 bytes"),
        (struct.pack("=III", 1, 0x1, 0xFFFFFFFF), "4294967295 bytes"),
        (b"\xff" * 12, "request 4294967295"),
    ],
)
@run_async
async def test_a_header_that_no_request_has_ends_the_session(header: bytes, reason: str) -> None:
    async with served() as s:
        end = await end_of(s, header)
    assert end.kind is EndKind.VIOLATION
    assert reason in end.reason


@pytest.mark.parametrize("request_id", [0, 6, 21, 31, 35, 42, 44, 0xFFFF])
@run_async
async def test_a_request_not_offered_is_refused(request_id: int) -> None:
    async with served() as s:
        await s.front.negotiate()
        assert await s.front.result(request_id, bytes(16)) == 1
        end = await end_of(s, encode_message(request_id, bytes(16)))
    assert end.kind is EndKind.REFUSED
    assert "not offered" in end.reason


@pytest.mark.parametrize("request_id", [r for r in sorted(RULES) if RULES[r].needs is not None])
@run_async
async def test_a_request_whose_feature_was_not_negotiated_is_refused(request_id: Request) -> None:
    async with served() as s:
        await s.front.negotiate(protocol=0)
        end = await end_of(s, encode_message(request_id))
    assert end.kind is EndKind.REFUSED
    assert re.search(r"needs [A-Z_]+, which was not negotiated", end.reason)


@pytest.mark.parametrize(
    "request_id",
    [
        Request.SET_VRING_NUM,
        Request.SET_VRING_BASE,
        Request.GET_VRING_BASE,
        Request.SET_VRING_ENABLE,
    ],
)
@pytest.mark.parametrize("index", [4, 255, 0xFFFFFFFF])
@run_async
async def test_a_ring_that_does_not_exist_ends_the_session(request_id: Request, index: int) -> None:
    async with served(queues=4) as s:
        await s.front.negotiate()
        end = await end_of(s, encode_message(request_id, VringState(index, 1).encode()))
    assert end.kind is EndKind.VIOLATION
    assert f"vring {index} does not exist" in end.reason


@run_async
async def test_a_kick_before_memory_is_refused() -> None:
    async with served() as s:
        await s.front.negotiate()
        await s.front.do(Request.SET_VRING_NUM, VringState(0, 64).encode())
        await s.front.do(Request.SET_VRING_ADDR, address().encode())
        with event_fd() as fd:
            end = await end_of(
                s, encode_message(Request.SET_VRING_KICK, VringFd(0, True).encode()), [fd]
            )
    assert end.kind is EndKind.REFUSED
    assert "without guest memory" in end.reason


@pytest.mark.parametrize("size_bytes", [1, 11, 12, 19])
@run_async
async def test_a_message_that_is_dribbled_times_out(size_bytes: int) -> None:
    async with served(limits=QUICK) as s:
        message = encode_message(Request.SET_FEATURES, encode_u64(0))
        with memory_file() as fd:
            end = await end_of(s, message[:size_bytes], [fd])
    assert end.kind is EndKind.TIMEOUT
    assert "within 0.05 s" in end.reason


@run_async
async def test_a_message_may_come_byte_by_byte_in_time() -> None:
    async with served() as s:
        for byte in encode_message(Request.GET_QUEUE_NUM):
            s.front.send_bytes(bytes([byte]))
            await asyncio.sleep(0)
        assert (await s.front.reply())[0] == Request.GET_QUEUE_NUM


@run_async
async def test_messages_may_come_many_at_once_with_their_own_descriptors() -> None:
    async with served() as s:
        await s.front.negotiate()
        with memory_file() as memory, event_fd() as event:
            s.front.send_bytes(
                encode_message(Request.SET_OWNER)
                + encode_message(Request.SET_VRING_NUM, VringState(0, 64).encode())
            )
            s.front.send_bytes(encode_message(Request.SET_MEM_TABLE, table(region())), [memory])
            kick = encode_message(Request.SET_VRING_KICK, VringFd(0, True).encode())
            s.front.send_bytes(kick, [event])
            await s.front.do(Request.SET_VRING_ADDR, address().encode())
        assert s.device.started[0]["has_kick"]


@run_async
async def test_a_silent_peer_between_messages_is_left_alone() -> None:
    async with served(limits=QUICK) as s:
        await s.front.negotiate()
        done, _ = await asyncio.wait([s.task], timeout=4 * QUICK.message_timeout_s)
        assert not done
        assert await s.front.get(Request.GET_QUEUE_NUM) == 4


@pytest.mark.parametrize("size_bytes", [1, 12, 15])
@run_async
async def test_a_peer_that_leaves_within_a_message_is_lost(size_bytes: int) -> None:
    async with served() as s:
        message = encode_message(Request.SET_FEATURES, encode_u64(0))
        s.front.send_bytes(message[:size_bytes])
        s.front.socket.shutdown(socket.SHUT_WR)
        end = await s.end()
    assert end.kind is EndKind.PEER_LOST


@run_async
async def test_a_peer_that_does_not_read_its_replies_times_out() -> None:
    async with served(limits=QUICK) as s:
        loop = asyncio.get_running_loop()
        message = encode_message(Request.GET_FEATURES) * 64
        flood = asyncio.ensure_future(_flood(loop, s.front.socket, message))
        end = await s.end()
        await flood
    assert end.kind is EndKind.TIMEOUT
    assert "does not read" in end.reason


async def _flood(loop: asyncio.AbstractEventLoop, sock: socket.socket, message: bytes) -> None:
    try:
        while True:
            await loop.sock_sendall(sock, message)
    except (BrokenPipeError, ConnectionResetError):
        return


@run_async
async def test_a_peer_that_is_refused_for_ever_loses_its_session() -> None:
    async with served() as s:
        await s.front.negotiate()
        bad = VringState(0, 3).encode()
        for _ in range(MAX_REFUSALS):
            assert await s.front.result(Request.SET_VRING_NUM, bad) == 1
        await s.front.send(Request.SET_VRING_NUM, bad, need_reply=True)
        assert (await s.end()).kind is EndKind.REFUSED


@run_async
async def test_one_peers_violation_leaves_another_session_alone() -> None:
    other_device = FakeDevice()
    async with served(device=other_device) as good, served() as bad:
        await good.front.running()
        await end_of(bad, b"\xff" * 12)
        assert other_device.started.keys() == {0}
        assert await good.front.get(Request.GET_QUEUE_NUM) == 4
