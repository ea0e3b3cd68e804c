"""The driver and the reference device over one memory, without a socket."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from vhostd.errors import BusyError, UsageError
from vhostd.protocol.features import VirtioFeature
from vhostd.virtqueue.driver import Buffer, SplitDriver, Used
from vhostd.virtqueue.errors import BackendError
from vhostd.virtqueue.layout import SplitLayout
from vhostd.virtqueue.memory import GuestMemory
from vhostd.virtqueue.reference import BrokenRingError, ReferenceRing

BOTH = int(VirtioFeature.EVENT_IDX | VirtioFeature.INDIRECT_DESC)
INDIRECT = int(VirtioFeature.INDIRECT_DESC)


class _DeviceView:
    """`DeviceMemory` over the driver's own."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.read = memory.read
        self.write = memory.write

    def pieces(self, address: int, len_bytes: int) -> int:
        found = self._memory.spans(address, len_bytes)
        if found is None:
            raise BrokenRingError(f"there is no guest memory at {address:#x}")
        return found


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(1 << 20) as found:
        yield found


def _pair(
    memory: GuestMemory, size: int = 8, features: int = BOTH
) -> tuple[SplitDriver, ReferenceRing]:
    driver = SplitDriver(memory, size=size, features=features)
    ring = ReferenceRing(
        _DeviceView(memory), size=size, features=features, addresses=driver.addresses
    )
    return driver, ring


@pytest.mark.parametrize("features", [BOTH, INDIRECT, 0], ids=["event-idx", "flags", "plain"])
def test_what_the_driver_adds_the_device_pops(
    memory: GuestMemory, seed: int, features: int
) -> None:
    rng = random.Random(seed)
    driver, ring = _pair(memory, 16, features)
    data = memory.allocate(65536)
    in_flight: dict[int, list[Buffer]] = {}
    taken: list[int] = []
    for _ in range(5000):
        what = rng.randrange(3)
        if what == 0:
            readable = [Buffer(data + rng.randrange(999), rng.randint(1, 99)) for _ in range(2)]
            writable = [Buffer(data + rng.randrange(999), rng.randint(1, 99), True)] * 2
            buffers = readable[: rng.randrange(3)] + writable[: rng.randrange(3)]
            if not buffers:
                continue
            indirect = bool(features & INDIRECT) and rng.random() < 0.5
            try:
                head = driver.add(buffers, indirect=indirect)
            except BusyError:
                continue
            assert head not in in_flight
            in_flight[head] = buffers
            driver.publish()
        elif what == 1:
            chain = ring.pop()
            if chain is not None:
                found = [Buffer(a, n) for a, n in chain.readable]
                found += [Buffer(a, n, True) for a, n in chain.writable]
                assert found == in_flight[chain.head], f"seed {seed}"
                taken.append(chain.head)
        elif taken:
            head = taken.pop(rng.randrange(len(taken)))
            ring.push(head, head * 3)
            assert driver.reap() == [Used(head, head * 3)]
            del in_flight[head]
    assert driver.in_flight == len(in_flight)


def test_event_indexes_suppress_what_nobody_waits_for(memory: GuestMemory) -> None:
    driver, ring = _pair(memory)
    data = memory.allocate(16)
    assert not ring.enable_kicks()
    driver.add([Buffer(data, 16)])
    assert driver.publish()
    # Not asked again: no kick for the second.
    driver.add([Buffer(data, 16)])
    assert not driver.publish()
    driver.enable_calls(after=1)
    for _ in range(2):
        chain = ring.pop()
        assert chain is not None
        ring.push(chain.head, 0)
    assert ring.wants_call()
    assert len(driver.reap()) == 2
    driver.disable_calls()
    driver.add([Buffer(data, 16)])
    driver.publish()
    chain = ring.pop()
    assert chain is not None
    ring.push(chain.head, 0)
    assert not ring.wants_call()


def test_a_device_that_lies_is_found_out(memory: GuestMemory) -> None:
    driver, ring = _pair(memory)
    data = memory.allocate(16)
    driver.add([Buffer(data, 16)])
    driver.publish()
    ring.push(5, 0)
    with pytest.raises(BackendError, match="chain 5"):
        driver.reap()


def test_a_device_that_uses_too_much_is_found_out(memory: GuestMemory) -> None:
    driver, ring = _pair(memory)
    for _ in range(9):
        ring.push(0, 0)
    with pytest.raises(BackendError, match="more than the 8 entries"):
        driver.reap()


def test_a_full_queue_refuses_and_stays_as_it_was(memory: GuestMemory) -> None:
    driver, _ring = _pair(memory, 4)
    data = memory.allocate(16)
    driver.add([Buffer(data, 16)] * 3)
    with pytest.raises(BusyError, match="reap"):
        driver.add([Buffer(data, 16)] * 2)
    assert driver.free_descriptors == 1
    with pytest.raises(UsageError, match="does not fit"):
        driver.add([Buffer(data, 16)] * 5)


@pytest.mark.parametrize("size", [1, 2, 256, 32768])
def test_the_parts_of_a_ring_are_aligned_and_apart(size: int) -> None:
    layout = SplitLayout(size)
    at = layout.at(4096)
    assert (at.descriptor % 16, at.available % 2, at.used % 4) == (0, 0, 0)
    assert at.descriptor + layout.descriptor_bytes <= at.available
    assert at.available + layout.available_bytes <= at.used
    assert at.used + layout.used_bytes == 4096 + layout.total_bytes


@pytest.mark.parametrize("size", [0, 3, 65536, -1])
def test_a_ring_has_a_power_of_two_of_entries(size: int) -> None:
    with pytest.raises(UsageError, match="power of 2"):
        SplitLayout(size)
