"""Fuzzes vhost-user messages: a session of random, mostly well-formed messages after a start that
is right up to a random point.

A case is one message. What must hold: every session either answers a message behind the random
ones, or ends; nothing hangs, and the next session is served. What each message does is the
business of the other tests. Belongs to one thread.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Self

from vhostd.errors import UnavailableError
from vhostd.virtqueue.block import DRIVER_FEATURES, BlockDevice
from vhostd.virtqueue.constants import FrontendRequest, MessageFlag
from vhostd.virtqueue.driver import SplitDriver
from vhostd.virtqueue.frontend import (
    DEFAULT_PROTOCOL_FEATURES,
    HEADER,
    NO_FD,
    Frontend,
    encode_region,
)
from vhostd.virtqueue.memory import GuestMemory

from .fuzz_rings import FuzzError

R = FrontendRequest
PER_SESSION = 400
SYNC_EVERY = 16
CHECK_EVERY_SESSIONS = 10
VALUES = [0, 1, 2, 3, 4, 8, 16, 64, 255, 256, 512, 1024, 4096, 1 << 16, 1 << 20, 1 << 31, 1 << 32]
VALUES += [1 << 40, 1 << 47, 1 << 63, 2**64 - 4096, 2**64 - 1, 2**32 - 1]
REGION_BYTES = 1 << 20


class MessageFuzzer:
    """Runs cases against the socket at `path`. A context manager: it owns some descriptors."""

    def __init__(self, path: Path, *, seed: int) -> None:
        self._path = path
        self._seed = seed
        self._rng = random.Random(seed)
        self._memory = GuestMemory()
        for at in range(4):
            self._memory.add_region((at + 1) << 32, REGION_BYTES)
        self._queue = SplitDriver(self._memory, size=16, features=DRIVER_FEATURES)
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.cases = 0
        self.sessions = 0
        self._markers = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._queue.close()
        self._memory.close()
        os.close(self._eventfd)
        os.close(self._null)

    def run(self, cases: int, *, report: Callable[[str], None] = lambda _: None) -> None:
        """At least so many cases. Raises FuzzError."""
        goal = self.cases + cases
        while self.cases < goal:
            self.sessions += 1
            try:
                with Frontend(self._path, timeout_s=30) as frontend:
                    self._session(frontend)
            except UnavailableError as error:
                # Its end is what a session may come to; silence is not.
                if "closed" not in str(error) and "failed" not in str(error):
                    raise FuzzError(f"{self._where()}: {error}") from error
            if self.sessions % CHECK_EVERY_SESSIONS == 0:
                self._check()
                report(f"{self.cases} messages in {self.sessions} sessions")
        self._check()

    def _check(self) -> None:
        """The disk still works."""
        try:
            with BlockDevice(self._path, timeout_s=30, memory_bytes=1 << 20) as device:
                device.write(0, self._rng.randbytes(512))
                device.flush()
                device.read(0, 4096)
        except Exception as error:
            raise FuzzError(f"{self._where()}: the disk does not work: {error}") from error

    def _session(self, frontend: Frontend) -> None:
        rng = self._rng
        self._markers = 0
        steps: list[Callable[[], None]] = [
            lambda: frontend.read_offer(),
            lambda: frontend.tell(R.SET_OWNER),
            lambda: frontend.set_features(frontend.offered & (DRIVER_FEATURES | 1 << 30)),
            lambda: frontend.set_memory(self._memory.regions[:2]),
            lambda: frontend.start_vring(0, self._queue),
        ]
        self._queue.reset()
        # Without REPLY_ACK the first refusal ends the session, so that is the exception.
        for step in steps[: rng.randint(rng.random() < 0.95, len(steps))]:
            step()
        violent = rng.random() < 0.5
        for number in range(rng.randint(1, PER_SESSION)):
            self.cases += 1
            self._random_message(frontend)
            if number % SYNC_EVERY == SYNC_EVERY - 1:
                self._sync(frontend)
        self._sync(frontend)
        if violent:
            self.cases += 1
            self._violent_message(frontend)

    def _sync(self, frontend: Frontend) -> None:
        """Everything sent so far has been handled, or the session has ended."""
        frontend.send_message(R.GET_FEATURES)
        self._markers += 1
        while self._markers:
            if frontend.receive().request == R.GET_FEATURES:
                self._markers -= 1

    def _random_message(self, frontend: Frontend) -> None:
        rng = self._rng
        request = rng.choice(list(R))
        payload, fds = self._payload(request)
        if rng.random() < 0.003 and payload:
            changed = bytearray(payload)
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            payload = bytes(changed)
        if rng.random() < 0.001:
            payload = payload[: rng.randrange(len(payload) + 1)]
        flags = MessageFlag.VERSION_1 | (MessageFlag.NEED_REPLY if rng.random() < 0.997 else 0)
        if request == R.GET_FEATURES:
            self._markers += 1
        frontend.send_message(request, payload, fds, flags=flags)

    def _violent_message(self, frontend: Frontend) -> None:
        """Not even the form is right; then the end of what is sent, and of the session."""
        rng = self._rng
        size = rng.choice([0, 8, 4096, 4097, 2**31, 2**32 - 1])
        flags = rng.choice([0, 1, 2, 5, 9, rng.randrange(1 << 32)])
        fds = [self._eventfd] * rng.choice([0, 1, 9, 200])
        message = HEADER.pack(rng.randrange(64), flags, size) + rng.randbytes(rng.randrange(64))
        frontend.send_bytes(message[: rng.randint(1, len(message))], fds)
        with contextlib.suppress(OSError):
            frontend.socket.shutdown(1)
        poll = select.poll()
        poll.register(frontend.socket, select.POLLIN)
        while poll.poll(30_000):
            try:
                if not frontend.socket.recv(65536):
                    return
            except OSError:
                return
        raise FuzzError(f"{self._where()}: a session did not end behind a broken message")

    def _payload(self, request: FrontendRequest) -> tuple[bytes, list[int]]:
        """What belongs to the request, with random values."""
        rng = self._rng
        index = rng.randrange(4) if rng.random() < 0.998 else rng.choice([4, 7, 255])
        if request == R.SET_VRING_ENABLE:
            num = rng.randrange(2) if rng.random() < 0.99 else self._value(32)
            return struct.pack("=II", index, num), []
        if request in (R.SET_VRING_NUM, R.SET_VRING_BASE, R.GET_VRING_BASE):
            return struct.pack("=II", index, self._value(32)), []
        if request == R.SET_VRING_ADDR:
            at, user = self._queue.addresses, self._memory.user_address
            good = [user(at.descriptor), user(at.used), user(at.available)]
            if rng.random() < 0.6:
                good[rng.randrange(3)] = self._value(64)
            return struct.pack("=IIQQQQ", index, rng.choice([0, 0, 0, 1]), *good, 0), []
        if request in (R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR):
            if rng.random() < 0.3:
                return struct.pack("=Q", index | NO_FD), []
            fd = self._eventfd if rng.random() < 0.998 else self._null
            return struct.pack("=Q", index), [fd]
        if request == R.SET_MEM_TABLE:
            regions = rng.sample(self._memory.regions, rng.randint(1, 4))
            rows = b"".join(self._region(encode_region(region)) for region in regions)
            return struct.pack("=II", len(regions), 0) + rows, [region.fd for region in regions]
        if request in (R.ADD_MEM_REG, R.REM_MEM_REG):
            region = rng.choice(self._memory.regions)
            fds = [region.fd] if request == R.ADD_MEM_REG else []
            return bytes(8) + self._region(encode_region(region)), fds
        if request in (R.GET_CONFIG, R.SET_CONFIG):
            size = rng.choice([1, 1, 4, 60, 256, 0])
            offset = rng.choice([0, 32, 32, 255, self._value(32)])
            data = bytes([rng.randrange(3)]) * size
            return struct.pack("=III", offset, size, rng.choice([0, 0, 1, 2])) + data, []
        if request == R.SET_FEATURES:
            return struct.pack("=Q", rng.getrandbits(64) & rng.getrandbits(64)), []
        if request == R.SET_PROTOCOL_FEATURES:
            # Mostly with what keeps a session going.
            keep = DEFAULT_PROTOCOL_FEATURES if rng.random() < 0.98 else 0
            return struct.pack("=Q", keep | 1 << rng.randrange(64)), []
        if request == R.SET_STATUS:
            return struct.pack("=Q", rng.randrange(256)), []
        if request in (R.SET_LOG_BASE, R.SET_LOG_FD, R.SET_BACKEND_REQ_FD):
            return struct.pack("=Q", self._value(64)), []
        return b"", []

    def _region(self, encoded: bytes) -> bytes:
        """Now and then one field is something else."""
        if self._rng.random() < 0.5:
            return encoded
        fields = list(struct.unpack("=QQQQ", encoded))
        fields[self._rng.randrange(4)] = self._value(64)
        return struct.pack("=QQQQ", *fields)

    def _value(self, bits: int) -> int:
        rng = self._rng
        return (rng.choice(VALUES) + rng.choice([0, 0, 0, 1, -1])) % (1 << bits)

    def _where(self) -> str:
        return f"seed {self._seed}, session {self.sessions}, message {self.cases}"
