"""Random sequences of messages against a whole session, over a real socket.

Each case is a session of its own with a few dozen messages: mostly well-formed ones that make sense
together, so that deep states are reached, with wrong ones among them. The recording device asserts
what a session promises to the engine (see `frontend.FakeDevice`), and a session that ends as an
internal error fails the test. Then nothing may have leaked.

`VHOSTD_FUZZ_CASES` sets how many cases run (a million takes hours, not days), `VHOSTD_FUZZ_SEED`
where they begin; a failure names the seed of its one case.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import secrets
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
import structlog

from tests.unit.protocol.conftest import open_fds
from tests.unit.protocol.frontend import (
    ALL_FEATURES,
    DEFAULT_PROTOCOL,
    MEMORY_BYTES,
    FakeDevice,
    address,
    inline,
    region,
    table,
)
from vhostd.protocol.framing import Connection, Limits
from vhostd.protocol.messages import (
    RULES,
    Config,
    HeaderFlag,
    Request,
    SingleRegion,
    VringFd,
    VringState,
    encode_message,
    encode_u64,
)
from vhostd.protocol.session import EndKind, Session, SessionEnd

CASES = int(os.environ.get("VHOSTD_FUZZ_CASES", "300"))
FIRST_SEED = int(os.environ.get("VHOSTD_FUZZ_SEED", "0")) or secrets.randbits(48)
QUEUES = 3
MAX_MESSAGES = 40
_SILENT = structlog.wrap_logger(
    None, wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL)
)
FEW_ENOUGH_FOR_THE_BUFFER_BYTES = 30_000


class Files:
    """Descriptors of every kind, made once: sending duplicates them."""

    def __init__(self) -> None:
        self.memory = os.memfd_create("guest-memory")
        os.ftruncate(self.memory, MEMORY_BYTES)
        self.event = os.eventfd(0, os.EFD_CLOEXEC)
        self.pipe, self.pipe_in = os.pipe()

    def close(self) -> None:
        for fd in (self.memory, self.event, self.pipe, self.pipe_in):
            os.close(fd)


def sensible(rng: random.Random, request: Request, files: Files) -> tuple[bytes, list[int]]:
    """A payload and descriptors that fit the request, with values that are often right."""
    index = rng.randrange(QUEUES) if rng.random() < 0.97 else rng.randrange(300)
    state: Callable[[int], bytes] = lambda num: VringState(index, num).encode()  # noqa: E731
    spoiled = rng.random() < 0.1
    match request:
        case Request.SET_FEATURES:
            return encode_u64(rng.choice([ALL_FEATURES, 1 << 32, 1 << 34, rng.getrandbits(64)])), []
        case Request.SET_PROTOCOL_FEATURES:
            return encode_u64(
                int(DEFAULT_PROTOCOL) if rng.random() < 0.9 else rng.getrandbits(20)
            ), []
        case Request.SET_STATUS:
            return encode_u64(rng.choice([0, 1, 3, 11, 15, 256])), []
        case Request.SET_MEM_TABLE:
            count = rng.randrange(4)
            slots = [rng.randrange(5) for _ in range(count)]
            return table(*(region(slot) for slot in slots)), [files.memory] * count
        case Request.ADD_MEM_REG | Request.REM_MEM_REG:
            one = region(rng.randrange(5), offset=4096 if spoiled else 0)
            has_fd = request is Request.ADD_MEM_REG or spoiled
            return SingleRegion(one).encode(), [files.memory] * has_fd
        case Request.SET_VRING_NUM:
            return state(3 if spoiled else 1 << rng.randrange(16)), []
        case Request.SET_VRING_BASE:
            return state(rng.randrange(0x10000 if not spoiled else 1 << 32)), []
        case Request.GET_VRING_BASE:
            return state(0), []
        case Request.SET_VRING_ENABLE:
            return state(rng.randrange(3 if spoiled else 2)), []
        case Request.SET_VRING_ADDR:
            rings = replace(address(rng.randrange(QUEUES)), index=index)
            if spoiled:
                rings = replace(rings, used=rng.getrandbits(64))
            return rings.encode(), []
        case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
            has_fd = rng.random() < 0.8
            fd = files.pipe if spoiled else files.event
            return VringFd(index & 0xFF, has_fd).encode(), [fd] * has_fd
        case Request.GET_CONFIG | Request.SET_CONFIG:
            if rng.random() < 0.5:
                return Config(32, 0, bytes([rng.randrange(3)])).encode(), []
            size = rng.randrange(70)
            return Config(rng.randrange(260), rng.randrange(3), bytes(size)).encode(), []
        case _:
            return b"", []


def message(rng: random.Random, files: Files) -> tuple[bytes, list[int]]:
    request: int = rng.choice(list(RULES)) if rng.random() < 0.98 else rng.randrange(60)
    payload, fds = (
        sensible(rng, Request(request), files) if request in RULES else (rng.randbytes(8), [])
    )
    if rng.random() < 0.01:
        payload = rng.randbytes(rng.randrange(64))
    if rng.random() < 0.01:
        fds = [rng.choice([files.memory, files.event, files.pipe])] * rng.randrange(1, 10)
    # Mostly with need_reply: a refusal is an answer then, and the sequence goes on.
    data = encode_message(
        request, payload, flags=HeaderFlag.NEED_REPLY if rng.random() < 0.95 else 0
    )
    if rng.random() < 0.003:
        data = rng.randbytes(len(data))
    return data, fds


async def session_of(seed: int, files: Files) -> tuple[SessionEnd, FakeDevice, list[str]]:
    rng = random.Random(seed)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    device = FakeDevice()
    session = Session(
        Connection(ours, Limits(0.5, 0.5)), device, name="fuzz", queues=QUEUES, call=inline
    )
    task = asyncio.create_task(session.run())
    with theirs:
        theirs.setblocking(False)
        opening = [
            (encode_message(Request.SET_PROTOCOL_FEATURES, encode_u64(DEFAULT_PROTOCOL)), []),
            (encode_message(Request.SET_FEATURES, encode_u64(ALL_FEATURES)), []),
            (encode_message(Request.SET_MEM_TABLE, table(region())), [files.memory]),
        ]
        if rng.random() < 0.6:
            opening += [
                (encode_message(Request.SET_VRING_NUM, VringState(0, 64).encode()), []),
                (encode_message(Request.SET_VRING_ADDR, address().encode()), []),
                (
                    encode_message(Request.SET_VRING_KICK, VringFd(0, True).encode()),
                    [files.event],
                ),
            ]
        count = rng.randrange(1, MAX_MESSAGES)
        sent_bytes = 0
        for data, fds in [*opening, *(message(rng, files) for _ in range(count))]:
            try:
                socket.send_fds(theirs, [data], fds)
            except (BrokenPipeError, ConnectionResetError):
                break
            sent_bytes += len(data)
            if sent_bytes > FEW_ENOUGH_FOR_THE_BUFFER_BYTES:
                break
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        # Replies wait in the socket unread; there are too few to fill it.
        theirs.shutdown(socket.SHUT_WR)
        end = await asyncio.wait_for(task, 20)
    return end, device, device.names()


@pytest.mark.timeout(0)
def test_random_sequences_end_with_a_reason_and_leave_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A million sessions' logs would fill memory: pytest keeps them until the test ends.
    monkeypatch.setattr(structlog, "get_logger", lambda: _SILENT)
    files = Files()
    seen: set[str] = set()
    kinds: set[EndKind] = set()

    async def run() -> None:
        # Garbage of earlier tests would close its descriptors in the middle.
        gc.collect()
        before = open_fds()
        for seed in range(FIRST_SEED, FIRST_SEED + CASES):
            repeat = f"repeat with VHOSTD_FUZZ_SEED={seed} VHOSTD_FUZZ_CASES=1"
            end, device, names = await session_of(seed, files)
            assert end.kind not in (EndKind.INTERNAL, EndKind.ENGINE), f"{end}; {repeat}"
            assert end.reason, repeat
            assert device.closed, repeat
            assert names.count("close") == 1, repeat
            assert len(open_fds()) == len(before), repeat
            seen.update(names)
            kinds.add(end.kind)

    try:
        asyncio.run(run())
    finally:
        files.close()
    if CASES >= 300:
        # Else the fuzzing would have become shallow without a sign.
        assert kinds >= {EndKind.PEER_CLOSED, EndKind.VIOLATION, EndKind.REFUSED}
        assert seen >= {
            "set_memory",
            "add_region",
            "remove_region",
            "start_queue",
            "set_queue_enabled",
            "set_queue_kick",
            "set_queue_call",
            "set_queue_error",
            "stop_queue",
            "set_write_cache",
        }
