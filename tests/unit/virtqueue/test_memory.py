"""Guest memory and its allocator."""

from __future__ import annotations

import random

import pytest

from vhostd.errors import BusyError, UsageError
from vhostd.virtqueue.memory import DEFAULT_GUEST_ADDRESS, GuestMemory

PAGE = 4096


def test_buffers_never_overlap_and_all_memory_comes_back(seed: int) -> None:
    rng = random.Random(seed)
    with GuestMemory(64 * PAGE) as memory:
        live: dict[int, int] = {}
        for _ in range(3000):
            if live and rng.random() < 0.5:
                address = rng.choice(list(live))
                del live[address]
                memory.release(address)
                continue
            size, align = rng.randint(1, 3 * PAGE), rng.choice([1, 2, 16, 512, PAGE])
            try:
                address = memory.allocate(size, align=align)
            except BusyError:
                continue
            assert address % align == 0
            assert all(
                address + size <= other or other + length <= address
                for other, length in live.items()
            ), f"seed {seed}"
            live[address] = size
        assert memory.allocated_bytes == sum(live.values())
        for address in live:
            memory.release(address)
        assert memory.allocate(64 * PAGE) == DEFAULT_GUEST_ADDRESS


def test_a_full_memory_says_so() -> None:
    with GuestMemory(PAGE) as memory:
        memory.allocate(PAGE)
        with pytest.raises(BusyError, match="reap"):
            memory.allocate(1)


def test_reads_and_writes_go_across_adjoining_regions() -> None:
    with GuestMemory(PAGE, guest_address=PAGE) as memory:
        memory.add_region(2 * PAGE, PAGE)
        memory.write(2 * PAGE - 3, b"abcdef")
        assert memory.read(2 * PAGE - 3, 6) == b"abcdef"
        assert memory.spans(2 * PAGE - 3, 6) == 2
        assert memory.spans(3 * PAGE - 3, 6) is None
        with pytest.raises(UsageError, match="no guest memory"):
            memory.read(3 * PAGE - 3, 6)


def test_regions_do_not_overlap() -> None:
    with GuestMemory(2 * PAGE, guest_address=PAGE) as memory:
        for address in (0, 2 * PAGE):
            with pytest.raises(UsageError, match="overlaps"):
                memory.add_region(address, 2 * PAGE)
        with pytest.raises(UsageError, match="whole pages"):
            memory.add_region(1 << 30, PAGE + 1)


def test_user_addresses_follow_their_region() -> None:
    with GuestMemory() as memory:
        memory.add_region(PAGE, PAGE, user_address=1 << 40)
        assert memory.user_address(PAGE + 5) == (1 << 40) + 5
