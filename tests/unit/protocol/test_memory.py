"""The memory table keeps its invariants whatever it is offered."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.protocol.frontend import event_fd, memory_file
from vhostd.protocol.memory import MAX_MEM_SLOTS, MemoryTable, check_file
from vhostd.protocol.messages import RefusedError, RegionDescription, ViolationError

TOP = (1 << 64) - 1


def region(guest: int, size: int, user: int | None = None, offset: int = 0) -> RegionDescription:
    return RegionDescription(guest, size, guest if user is None else user, offset)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (region(0, 0), "has no size"),
        (region(TOP, 2, 0), "guest addresses"),
        (region(0, 2, TOP), "user addresses"),
        (region(0, 2, 0, TOP), "file offsets"),
    ],
)
def test_a_region_that_is_empty_or_wraps_is_refused(bad: RegionDescription, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        MemoryTable.of([bad])


def test_a_region_may_end_at_the_very_top() -> None:
    assert MemoryTable.of([region(TOP, 1)]).size_bytes == 1


@pytest.mark.parametrize(
    "other",
    [
        region(0x1000, 0x1000, 0x9000),
        region(0x1FFF, 1, 0x9000),
        region(0, 0x1001, 0x9000),
        region(0, TOP, 0),
    ],
)
def test_regions_that_overlap_are_refused(other: RegionDescription) -> None:
    with pytest.raises(RefusedError, match="overlaps the region at 0x1000"):
        MemoryTable.of([region(0x1000, 0x1000), other])


def test_memory_that_a_guest_sees_twice_may_have_one_user_address() -> None:
    table = MemoryTable.of([region(0x1000, 0x1000), region(0x9000, 0x1000, 0x1000)])
    assert table.without(region(0x9000, 0x1000, 0x1000)).regions == (region(0x1000, 0x1000),)


def test_regions_that_touch_do_not_overlap() -> None:
    MemoryTable.of([region(0x1000, 0x1000), region(0x2000, 0x1000), region(0, 0x1000)])


def test_a_region_is_removed_by_its_addresses_and_size_only() -> None:
    table = MemoryTable.of([region(0, 16, 64, 4096), region(16, 16, 32)])
    assert table.without(region(0, 16, 64, 0)).regions == (region(16, 16, 32),)
    for absent in (region(0, 16, 65), region(0, 15, 64), region(1, 16, 64)):
        with pytest.raises(RefusedError, match="there is no memory region"):
            table.without(absent)


def test_slots_are_bounded() -> None:
    table = MemoryTable.of(region(i * 16, 16) for i in range(MAX_MEM_SLOTS))
    with pytest.raises(RefusedError, match="509"):
        table.with_region(region(1 << 40, 16))


def test_a_region_must_lie_within_its_file() -> None:
    with memory_file(8192) as fd:
        check_file(region(0, 8192), fd)
        check_file(region(0, 4096, 0, 4096), fd)
        with pytest.raises(RefusedError, match="which has 0x2000 bytes"):
            check_file(region(0, 8193), fd)
        with pytest.raises(RefusedError, match="which has 0x2000 bytes"):
            check_file(region(0, 1, 0, 8192), fd)


def test_memory_that_is_no_file_is_a_violation() -> None:
    with event_fd() as fd, pytest.raises(ViolationError, match="memfd"):
        check_file(region(0, 1), fd)


SMALL = st.integers(0, 40)


@settings(max_examples=300, deadline=None, database=None, print_blob=True)
@given(st.lists(st.builds(RegionDescription, SMALL, SMALL, SMALL, SMALL), max_size=12))
def test_a_table_never_holds_regions_that_overlap(offered: list[RegionDescription]) -> None:
    table = MemoryTable()
    for one in offered:
        taken = {
            byte
            for r in table.regions
            for byte in range(r.guest_address, r.guest_address + r.size_bytes)
        }
        wanted = range(one.guest_address, one.guest_address + one.size_bytes)
        free = one.size_bytes > 0 and taken.isdisjoint(wanted)
        try:
            table = table.with_region(one)
        except RefusedError:
            assert not free
        else:
            assert free
