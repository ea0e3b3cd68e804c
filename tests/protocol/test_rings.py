"""Split rings: sizes, notifications both ways, stopping and starting again (virtio 1.3, 2.7)."""

from __future__ import annotations

import select

import pytest

from tests.protocol.backends import Backend
from tests.protocol.helpers import check_io, must_be_ok, pattern, poll_until
from vhostd.protocol.features import VirtioFeature
from vhostd.virtqueue.block import DRIVER_FEATURES
from vhostd.virtqueue.constants import BlockRequest, BlockStatus, FrontendRequest
from vhostd.virtqueue.driver import SplitDriver

IN, OUT, FLUSH = BlockRequest.IN, BlockRequest.OUT, BlockRequest.FLUSH
WITHOUT_EVENT_IDX = DRIVER_FEATURES & ~VirtioFeature.EVENT_IDX
CALL_TIMEOUT_MS = 10_000

notifications = pytest.mark.parametrize(
    "features", [WITHOUT_EVENT_IDX, DRIVER_FEATURES], ids=["flags", "event-idx"]
)


def _await_call(queue: SplitDriver) -> bool:
    assert queue.call_fd is not None
    poll = select.poll()
    poll.register(queue.call_fd, select.POLLIN)
    return bool(poll.poll(CALL_TIMEOUT_MS))


def _await_used(queue: SplitDriver, index: int) -> None:
    poll_until(lambda: queue.used_index == index & 0xFFFF, f"used index {index}")


@pytest.mark.parametrize("size", [2, 4, 8, 64, 256, 1024])
@notifications
def test_queues_of_many_sizes_are_served(backend: Backend, size: int, features: int) -> None:
    with backend.device(queue_size=size, features=features) as device:
        for turn in range(3):
            for at in range(size):
                data = pattern((turn, at), 512)
                device.submit(OUT, at, data_out=data, indirect=True)
            for done in device.reap(minimum=size):
                must_be_ok(done)
        assert device.read(0, 512 * size) == b"".join(pattern((2, at), 512) for at in range(size))


@pytest.mark.parametrize("size", [1, 2048, 32768])
def test_queues_of_one_and_of_the_most_entries_are_served(ours: Backend, size: int) -> None:
    """virtio 1.3 allows 1 to 32768; others stop at 1024."""
    with ours.device(queue_size=size) as device:
        for at in range(min(size, 3000)):
            device.submit(OUT, at, data_out=pattern(at, 512), indirect=True)
        for done in device.reap(minimum=min(size, 3000)):
            must_be_ok(done)
        check_io(device, size)


@notifications
def test_indexes_wrap_around(backend: Backend, features: int) -> None:
    """After 65536 requests all indexes begin again; here they start just before."""
    with backend.device(queue_size=16, features=features) as device:
        (queue,) = device.queues
        device.stop()
        queue.start_at(65536 - 40)
        device.resume([65536 - 40])
        for turn in range(20):
            for at in range(5):
                device.submit(OUT, at * 8, data_out=pattern((turn, at), 4096))
            for done in device.reap(minimum=5):
                must_be_ok(done)
            expected = b"".join(pattern((turn, at), 4096) for at in range(5))
            assert device.read(0, 5 * 4096) == expected
        assert queue.used_index == 80


@notifications
def test_no_call_is_made_when_none_is_wanted(backend: Backend, features: int) -> None:
    with backend.device(features=features) as device:
        (queue,) = device.queues
        # The first call of a session may always come.
        must_be_ok(device.request(FLUSH))
        queue.disable_calls()
        queue.take_calls()
        before = queue.used_index
        for _ in range(10):
            device.submit(FLUSH, kick=True)
        _await_used(queue, before + 10)
        # A message is answered after what the device did before, in its own order.
        device.read_config()
        assert queue.take_calls() == 0
        assert len(device.reap(minimum=10)) == 10


def test_a_call_is_made_when_the_event_index_is_passed(backend: Backend) -> None:
    with backend.device() as device:
        (queue,) = device.queues
        must_be_ok(device.request(FLUSH))
        queue.enable_calls(after=7)
        queue.take_calls()
        start = queue.used_index
        for count in range(1, 8):
            device.submit(FLUSH, kick=True)
            _await_used(queue, start + count)
        device.read_config()
        assert queue.take_calls() == 0
        device.submit(FLUSH, kick=True)
        assert _await_call(queue)
        assert len(device.reap(minimum=8)) == 8


@notifications
def test_a_call_is_made_for_each_wait(backend: Backend, features: int) -> None:
    """The guest that sleeps after it has looked is always woken."""
    with backend.device(features=features) as device:
        (queue,) = device.queues
        for _ in range(300):
            queue.take_calls()
            queue.enable_calls()
            device.submit(FLUSH)
            assert _await_call(queue)
            assert len(device.reap()) == 1


@notifications
def test_the_device_asks_for_kicks_when_it_sleeps(backend: Backend, features: int) -> None:
    """Only kicks that the device wants are given; none may be missed."""
    with backend.device(features=features) as device:
        for at in range(300):
            device.submit(OUT, at % 8, data_out=pattern(at, 512))
            assert all(c.status == BlockStatus.OK for c in device.reap(timeout_s=10))


def test_a_batch_needs_one_kick(backend: Backend) -> None:
    with backend.device(queue_size=64) as device:
        (queue,) = device.queues
        for turn in range(20):
            before = queue.kicks
            for at in range(60):
                device.submit(OUT, at, data_out=pattern((turn, at), 512), kick=False)
            device.publish(kick=True)
            assert len(device.reap(minimum=60)) == 60
            assert queue.kicks == before + 1


def test_a_driver_without_calls_polls_the_ring(backend: Backend) -> None:
    """With EVENT_IDX the first call always comes, and libvhost-user ends the session then."""
    features = DRIVER_FEATURES if backend.is_ours else WITHOUT_EVENT_IDX
    with backend.device(call=False, features=features) as device:
        for at in range(20):
            check_io(device, at, offset_bytes=at * 4096)


def test_a_queue_without_a_kick_is_polled(ours: Backend) -> None:
    """SET_VRING_KICK with bit 8 set. Others accept it and then never look at the ring."""
    with ours.device(kick=False) as device:
        for at in range(20):
            check_io(device, at, offset_bytes=at * 4096)
    with ours.device(kick=False, call=False) as device:
        check_io(device, "neither")


def test_stop_returns_where_the_ring_goes_on(backend: Backend) -> None:
    with backend.device(queues=2, queue_size=16) as device:
        data = {}
        for turn in range(6):
            for at in range(5):
                data[at] = pattern((turn, at), 4096)
                device.submit(OUT, at * 8, data_out=data[at], queue=at % 2)
            device.reap(minimum=5)
            bases = device.stop()
            assert bases == [queue.available_index for queue in device.queues]
            assert bases == [queue.used_index for queue in device.queues]
            device.resume(bases)
        for at in range(5):
            assert device.read(at * 4096, 4096) == data[at]


def test_what_is_available_at_the_start_is_served(backend: Backend) -> None:
    """Chains that were shown while the ring was stopped, with their kick."""
    with backend.device() as device:
        check_io(device, "before")
        bases = device.stop()
        data = pattern("stopped", 4096)
        device.submit(OUT, 0, data_out=data, kick=True)
        device.resume(bases)
        must_be_ok(device.reap()[0])
        assert device.read(0, 4096) == data


def test_stop_finishes_what_was_taken(ours: Backend) -> None:
    """GET_VRING_BASE drains. libvhost-user answers at once, with requests still under way."""
    with ours.device(queue_size=128) as device:
        (queue,) = device.queues
        for turn in range(10):
            for at in range(100):
                device.submit(OUT, at * 8, data_out=pattern((turn, at), 4096), kick=False)
            device.publish(kick=True)
            (base,) = device.stop()
            assert queue.used_index == base
            assert (queue.available_index - base) & 0xFFFF <= 100
            device.resume([base])
            device.queues[0].kick()
            done = device.reap(minimum=100)
            assert len(done) == 100
            assert all(c.status == BlockStatus.OK for c in done)
        expected = b"".join(pattern((9, at), 4096) for at in range(100))
        assert device.read(0, len(expected)) == expected


def test_a_disabled_ring_is_not_served(ours: Backend) -> None:
    """ "Ring states". Others serve a started ring whether it is enabled or not."""
    with ours.device(queues=2) as device:
        frontend = device.frontend
        assert frontend is not None
        frontend.enable_vring(0, enabled=False)
        before = device.queues[0].used_index
        data = pattern("disabled", 4096)
        token = device.submit(OUT, 0, data_out=data, queue=0, kick=True)
        for _ in range(20):
            other = device.submit(FLUSH, queue=1, kick=True)
            assert [c.token for c in device.reap()] == [other]
        assert device.queues[0].used_index == before
        frontend.enable_vring(0, enabled=True)
        device.queues[0].kick()
        assert [c.token for c in device.reap()] == [token]
        assert device.read(0, 4096) == data


def test_call_descriptors_can_be_replaced(backend: Backend) -> None:
    """QEMU does so whenever the guest masks its interrupt."""
    with backend.device() as device:
        frontend, (queue,) = device.frontend, device.queues
        assert frontend is not None
        for turn in range(10):
            frontend.tell_vring_fd(FrontendRequest.SET_VRING_CALL, 0, queue.renew_call())
            check_io(device, turn)


def test_reconnecting_finds_the_data_and_the_ring(backend: Backend) -> None:
    with backend.device(queues=2) as device:
        for turn in range(4):
            data = pattern(turn, 64 << 10)
            device.write(turn << 16, data)
            device.flush()
            device.reconnect()
            for before in range(turn + 1):
                assert device.read(before << 16, 64 << 10) == pattern(before, 64 << 10)


def test_a_front_end_that_leaves_with_requests_in_flight_is_forgotten(backend: Backend) -> None:
    for turn in range(3):
        device = backend.device(queue_size=128)
        for at in range(64):
            device.submit(OUT, at * 8, data_out=pattern((turn, at), 4096))
        device.close()
    with backend.device() as device:
        check_io(device, "after leaving")


def test_the_queue_can_be_started_with_another_size(backend: Backend) -> None:
    for size in (16, 256, 2, 128):
        with backend.device(queue_size=size) as device:
            must_be_ok(device.request(IN, 0, data_in_bytes=512, indirect=True))
