"""A hostile front-end: what it may send, and when.

Each case costs that session at most: the daemon goes on, the neighbour's disk too, and nothing
leaks (`target` checks all three). Not asked of others.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.protocol.backends import Backend
from tests.protocol.helpers import check_io
from vhostd.errors import UnavailableError
from vhostd.virtqueue.constants import FrontendRequest, MessageFlag
from vhostd.virtqueue.driver import SplitDriver
from vhostd.virtqueue.frontend import NO_FD, Frontend, encode_region, encode_table_message
from vhostd.virtqueue.memory import GuestMemory

R = FrontendRequest
NEED_REPLY = MessageFlag.VERSION_1 | MessageFlag.NEED_REPLY
STATE = struct.Struct("=II")
MEBIBYTE = 1 << 20

FD_REQUESTS = [R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR]
HAVE_REPLY = {
    R.GET_FEATURES,
    R.GET_PROTOCOL_FEATURES,
    R.GET_QUEUE_NUM,
    R.GET_VRING_BASE,
    R.GET_CONFIG,
    R.GET_MAX_MEM_SLOTS,
    R.GET_STATUS,
}


@contextlib.contextmanager
def negotiated(target: Backend) -> Iterator[Frontend]:
    with target.frontend() as frontend:
        frontend.negotiate(0xFFFF_FFFF_FFFF)
        yield frontend


def _refused_or_ended(frontend: Frontend, send: Callable[[], None]) -> None:
    """The message is answered with an error, or the session ends. Silence is neither."""
    try:
        send()
        reply = frontend.receive()
    except UnavailableError as error:
        if "did not answer" in str(error):
            raise
        return
    if reply.request not in HAVE_REPLY:
        assert int.from_bytes(reply.payload, "little") != 0, reply


def _is_open(frontend: Frontend) -> bool:
    try:
        frontend.ask_u64(R.GET_FEATURES)
    except UnavailableError:
        return False
    return True


@pytest.mark.parametrize("size", [1, 9, 4096])
def test_a_payload_of_the_wrong_size_ends_the_session(target: Backend, size: int) -> None:
    for request in R:
        with negotiated(target) as frontend:
            _refused_or_ended(
                frontend,
                lambda frontend=frontend, request=request: frontend.send_message(  # type: ignore[misc]
                    request, b"\xa5" * size, flags=NEED_REPLY
                ),
            )


@pytest.mark.parametrize("request_id", [0, 7777, 19, 20, 22, 26, 33, 41, 44, 45, 255, 0xFFFFFFFF])
def test_an_unknown_request_is_refused(target: Backend, request_id: int) -> None:
    with negotiated(target) as frontend:
        _refused_or_ended(
            frontend, lambda: frontend.send_message(request_id, bytes(8), flags=NEED_REPLY)
        )


@pytest.mark.parametrize("size", [4097, 65536, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_endless_payload_is_not_waited_for(target: Backend, size: int) -> None:
    with negotiated(target) as frontend:
        frontend.send_message(R.SET_MEM_TABLE, bytes(64), size_bytes=size)
        with pytest.raises(UnavailableError):
            frontend.receive()


@pytest.mark.parametrize("flags", [0, 2, 3, 5, 0x10, 0x80000001, 0xFFFFFFFF])
def test_wrong_header_flags_end_the_session(target: Backend, flags: int) -> None:
    with negotiated(target) as frontend:
        frontend.send_message(R.GET_FEATURES, flags=flags)
        with pytest.raises(UnavailableError):
            frontend.receive()


@pytest.mark.parametrize("sent", [0, 1, 11, 12, 13, 19])
def test_a_message_that_stops_half_way_is_forgotten(target: Backend, sent: int) -> None:
    whole = struct.pack("=IIIQ", R.SET_FEATURES, MessageFlag.VERSION_1, 8, 0)
    fd = os.eventfd(0)
    try:
        for fds in ([], [fd], [fd] * 8):
            with negotiated(target) as frontend:
                if sent:
                    frontend.send_bytes(whole[:sent], fds)
    finally:
        os.close(fd)


def test_messages_may_arrive_in_pieces(target: Backend) -> None:
    """A stream has no messages: each byte may come by itself."""
    with negotiated(target) as frontend:
        for byte in struct.pack("=III", R.GET_FEATURES, MessageFlag.VERSION_1, 0):
            frontend.send_bytes(bytes([byte]))
        assert frontend.receive().request == R.GET_FEATURES


def test_several_messages_may_arrive_at_once(target: Backend) -> None:
    with negotiated(target) as frontend:
        frontend.send_bytes(struct.pack("=III", R.GET_FEATURES, MessageFlag.VERSION_1, 0) * 50)
        for _ in range(50):
            assert frontend.receive().request == R.GET_FEATURES


def test_a_front_end_that_does_not_read_is_not_waited_for(target: Backend) -> None:
    """Its replies fill the socket; the daemon must bound that, and go on."""
    with negotiated(target) as frontend:
        frontend.socket.settimeout(0.2)
        message = struct.pack("=III", R.GET_FEATURES, MessageFlag.VERSION_1, 0)
        with pytest.raises(UnavailableError):
            frontend.send_bytes(message * 1_000_000)


# Descriptors


def _wrong_kinds() -> dict[str, int]:
    """Descriptors that are not what any message wants."""
    pipe, other_end = os.pipe()
    os.close(other_end)
    one, two = socket.socketpair()
    two.close()
    return {
        "a pipe": pipe,
        "a socket": one.detach(),
        "a directory": os.open("/", os.O_RDONLY),
        "/dev/null": os.open("/dev/null", os.O_RDWR),
        "/dev/zero": os.open("/dev/zero", os.O_RDWR),
        "an epoll": _epoll(),
    }


def _epoll() -> int:
    import select

    with select.epoll() as poll:
        return os.dup(poll.fileno())


def test_descriptors_of_the_wrong_kind_are_refused(target: Backend) -> None:
    kinds = _wrong_kinds()
    memory = GuestMemory(MEBIBYTE)
    kinds["a memfd"] = memory.regions[0].fd
    eventfd = os.eventfd(0)
    region = encode_region(memory.regions[0])
    try:
        for fd in kinds.values():
            for request in FD_REQUESTS:
                with negotiated(target) as frontend:
                    assert frontend.tell_for_result(R.SET_OWNER) == 0
                    _refused_or_ended(
                        frontend,
                        lambda f=frontend, r=request, fd=fd: f.send_message(  # type: ignore[misc]
                            r, bytes(8), [fd], flags=NEED_REPLY
                        ),
                    )
        for fd in (*(fd for name, fd in kinds.items() if name != "a memfd"), eventfd):
            for request, payload in (
                (R.SET_MEM_TABLE, struct.pack("=II", 1, 0) + region),
                (R.ADD_MEM_REG, bytes(8) + region),
            ):
                with negotiated(target) as frontend:
                    _refused_or_ended(
                        frontend,
                        lambda f=frontend, r=request, p=payload, fd=fd: f.send_message(  # type: ignore[misc]
                            r, p, [fd], flags=NEED_REPLY
                        ),
                    )
    finally:
        for name, fd in kinds.items():
            if name != "a memfd":
                os.close(fd)
        os.close(eventfd)
        memory.close()


def test_missing_descriptors_are_refused(target: Backend) -> None:
    with GuestMemory(MEBIBYTE) as memory:
        region = memory.regions[0]
        cases: list[tuple[FrontendRequest, bytes]] = [(r, bytes(8)) for r in FD_REQUESTS]
        cases += [
            (R.SET_MEM_TABLE, encode_table_message([region])),
            (R.ADD_MEM_REG, bytes(8) + encode_region(region)),
        ]
        for request, payload in cases:
            with negotiated(target) as frontend:
                _refused_or_ended(
                    frontend,
                    lambda f=frontend, r=request, p=payload: f.send_message(  # type: ignore[misc]
                        r, p, flags=NEED_REPLY
                    ),
                )


@pytest.mark.parametrize("count", [1, 2, 9, 64, 253])
def test_descriptors_that_nobody_asked_for_do_not_stay(target: Backend, count: int) -> None:
    fd = os.eventfd(0)
    try:
        for request, payload in (
            (R.GET_FEATURES, b""),
            (R.SET_FEATURES, bytes(8)),
            (R.SET_VRING_NUM, STATE.pack(0, 16)),
            (R.SET_VRING_KICK, struct.pack("=Q", NO_FD)),
            (R.SET_VRING_CALL, struct.pack("=Q", 0)),
        ):
            if count == 1 and request == R.SET_VRING_CALL:
                continue
            for _ in range(3):
                with negotiated(target) as frontend:
                    _refused_or_ended(
                        frontend,
                        lambda f=frontend, r=request, p=payload: f.send_message(  # type: ignore[misc]
                            r, p, [fd] * count, flags=NEED_REPLY
                        ),
                    )
    finally:
        os.close(fd)


def test_descriptors_given_again_and_again_do_not_pile_up(target: Backend) -> None:
    with target.device() as device:
        frontend, (queue,) = device.frontend, device.queues
        assert frontend is not None
        before = len(target.open_files())
        for turn in range(200):
            frontend.tell_vring_fd(R.SET_VRING_CALL, 0, queue.call_fd)
            frontend.tell_vring_fd(R.SET_VRING_ERR, 0, queue.error_fd)
            if turn % 10 == 0:
                frontend.set_config(32, b"\1")
        assert len(target.open_files()) <= before + 3
        check_io(device, "again and again")


# Order and contents


def test_a_ring_that_does_not_exist_is_refused(target: Backend) -> None:
    queues = target.spec.queues
    for index in (queues, queues + 1, 255, 256, 1 << 16, 0xFFFFFFFF):
        state, address = STATE.pack(index, 1), struct.pack("=IIQQQQ", index, 0, 0, 0, 0, 0)
        for request, payload in (
            (R.SET_VRING_NUM, STATE.pack(index, 16)),
            (R.SET_VRING_BASE, state),
            (R.GET_VRING_BASE, state),
            (R.SET_VRING_ENABLE, state),
            (R.SET_VRING_ADDR, address),
            (R.SET_VRING_KICK, struct.pack("=Q", index | NO_FD)),
            (R.SET_VRING_CALL, struct.pack("=Q", index | NO_FD)),
        ):
            with negotiated(target) as frontend:
                if request == R.SET_VRING_CALL and index & 0xFF < queues:
                    continue
                if request == R.SET_VRING_KICK and index & 0xFF < queues:
                    continue
                _refused_or_ended(
                    frontend,
                    lambda f=frontend, r=request, p=payload: f.send_message(  # type: ignore[misc]
                        r, p, flags=NEED_REPLY
                    ),
                )


@pytest.mark.parametrize("size", [0, 3, 5, 100, 65536, 0xFFFFFFFF])
def test_a_queue_size_that_cannot_be_is_refused(target: Backend, size: int) -> None:
    with negotiated(target) as frontend:
        assert frontend.tell_for_result(R.SET_VRING_NUM, STATE.pack(0, size)) != 0
        assert _is_open(frontend)


def test_rings_are_not_started_without_memory(target: Backend) -> None:
    with GuestMemory(MEBIBYTE) as memory, negotiated(target) as frontend:
        queue = SplitDriver(memory, size=16, features=frontend.features)
        frontend.tell_vring(R.SET_VRING_NUM, 0, 16)
        user = memory.user_address
        at = queue.addresses
        address = struct.pack(
            "=IIQQQQ", 0, 0, user(at.descriptor), user(at.used), user(at.available), 0
        )
        results = [frontend.tell_for_result(R.SET_VRING_ADDR, address)]
        assert queue.kick_fd is not None
        results.append(frontend.tell_for_result(R.SET_VRING_KICK, bytes(8), [queue.kick_fd]))
        assert any(results)
        assert _is_open(frontend)
        queue.close()


def test_a_started_ring_cannot_be_changed(target: Backend) -> None:
    with target.device(queue_size=16) as device:
        frontend = device.frontend
        assert frontend is not None
        assert frontend.tell_for_result(R.SET_VRING_NUM, STATE.pack(0, 32)) != 0
        assert frontend.tell_for_result(R.SET_VRING_BASE, STATE.pack(0, 5)) != 0
        address = struct.pack("=IIQQQQ", 0, 0, 0, 0, 0, 0)
        assert frontend.tell_for_result(R.SET_VRING_ADDR, address) != 0
        features = (device.features & ~(1 << 28)).to_bytes(8, "little")
        assert frontend.tell_for_result(R.SET_FEATURES, features) != 0
        check_io(device, "unchanged")


def test_a_ring_may_be_stopped_that_never_was_started(target: Backend) -> None:
    with negotiated(target) as frontend:
        for index in range(target.spec.queues):
            assert frontend.stop_vring(index) == 0
        assert _is_open(frontend)


def test_too_many_refusals_end_the_session_or_none(target: Backend) -> None:
    """However many are made, each is answered or the session is over; the log is bounded too."""
    with negotiated(target) as frontend:
        bad = STATE.pack(0, 3)
        try:
            for _ in range(3000):
                assert frontend.tell_for_result(R.SET_VRING_NUM, bad) != 0
        except UnavailableError:
            assert not _is_open(frontend)


@pytest.mark.parametrize("count", [2, 8, 9, 64, 0xFFFFFFFF])
def test_a_memory_table_that_contradicts_itself_is_refused(target: Backend, count: int) -> None:
    with GuestMemory(MEBIBYTE) as memory:
        region = memory.regions[0]
        payload = struct.pack("=II", count, 0) + encode_region(region)
        with negotiated(target) as frontend:
            _refused_or_ended(
                frontend,
                lambda: frontend.send_message(
                    R.SET_MEM_TABLE, payload, [region.fd], flags=NEED_REPLY
                ),
            )


def test_overlapping_regions_are_refused(target: Backend) -> None:
    with GuestMemory(MEBIBYTE) as memory:
        region = memory.regions[0]
        payload = struct.pack("=II", 2, 0) + encode_region(region) * 2
        with negotiated(target) as frontend:
            fds = [region.fd] * 2
            assert frontend.tell_for_result(R.SET_MEM_TABLE, payload, fds) != 0


def test_a_second_front_end_does_not_disturb_the_first(target: Backend) -> None:
    with target.device() as device:
        for turn in range(5):
            with contextlib.suppress(UnavailableError), target.frontend() as second:
                second.ask_u64(R.GET_FEATURES)
            check_io(device, ("second", turn))


def test_endless_connects_do_not_hinder_the_neighbour(target: Backend) -> None:
    for turn in range(40):
        with contextlib.suppress(UnavailableError):
            connection = target.frontend()
            if turn % 2:
                connection.send_message(R.GET_FEATURES)
            connection.close()
