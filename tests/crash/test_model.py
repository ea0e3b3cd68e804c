"""The model itself: it accepts what a crash may leave, and nothing else."""

from __future__ import annotations

import pytest

from tests.crash.model import BLOCK_BYTES, SECTOR_BYTES, Change, CrashModel, WrongDataError

BLOCKS = 8


class Disk:
    """A model with a disk whose content the test sets."""

    def __init__(self) -> None:
        self.model = CrashModel(7, bytes(BLOCKS * BLOCK_BYTES))
        self.content = bytearray(self.model.base)

    def begin(self, first: int, sectors: int, *, zero: bool = False) -> Change:
        return self.model.begin(first, sectors, zero=zero)

    def done(self, first: int, sectors: int, *, zero: bool = False) -> Change:
        change = self.begin(first, sectors, zero=zero)
        self.model.finish(change)
        return change

    def flush(self) -> None:
        self.model.finish_flush(self.model.begin_flush())

    def put(self, change: Change, first: int | None = None, sectors: int | None = None) -> None:
        """Makes (a part of) the change visible."""
        data = bytes((change.end - change.first) * SECTOR_BYTES)
        if not change.zero:
            data = self.model.payload(change)
        first = change.first if first is None else first
        end = change.end if sectors is None else first + sectors
        skip = (first - change.first) * SECTOR_BYTES
        at = first * SECTOR_BYTES
        length = (end - first) * SECTOR_BYTES
        self.content[at : at + length] = data[skip : skip + length]

    def is_right(self, *, power_lost: bool = False) -> bool:
        try:
            self.model.check(bytes(self.content), power_lost=power_lost)
        except WrongDataError:
            return False
        return True


@pytest.fixture
def disk() -> Disk:
    return Disk()


def test_completed_write_must_be_there_after_a_kill_and_flushed_one_after_power_loss(
    disk: Disk,
) -> None:
    change = disk.done(0, 8)
    assert not disk.is_right()
    assert disk.is_right(power_lost=True)
    disk.flush()
    assert not disk.is_right(power_lost=True)
    disk.put(change)
    assert disk.is_right()
    assert disk.is_right(power_lost=True)


def test_write_through_needs_no_flush(disk: Disk) -> None:
    disk.model.write_through = True
    change = disk.done(0, 8)
    assert not disk.is_right(power_lost=True)
    disk.put(change)
    assert disk.is_right(power_lost=True)


def test_write_in_flight_is_there_or_not_block_by_block(disk: Disk) -> None:
    change = disk.begin(0, 16)
    assert disk.is_right()
    disk.put(change, 8, 8)
    assert disk.is_right()


def test_torn_block_is_wrong_even_if_unflushed(disk: Disk) -> None:
    change = disk.begin(0, 8)
    disk.put(change, 0, 4)
    assert not disk.is_right()
    assert not disk.is_right(power_lost=True)


def test_torn_zeroes_are_wrong(disk: Disk) -> None:
    disk.put(disk.done(0, 8))
    disk.model.rebase(bytes(disk.content))
    change = disk.begin(0, 8, zero=True)
    disk.put(change, 0, 3)
    assert not disk.is_right()
    disk.put(change)
    assert disk.is_right()


def test_older_data_over_newer_is_wrong(disk: Disk) -> None:
    old = disk.done(0, 8)
    new = disk.done(0, 8)
    disk.put(old)
    assert not disk.is_right()
    assert disk.is_right(power_lost=True)
    disk.put(new)
    assert disk.is_right()


def test_concurrent_writes_of_a_block_may_come_in_either_order_but_not_in_both(disk: Disk) -> None:
    one, two = disk.begin(0, 6), disk.begin(2, 6)
    disk.model.finish(one)
    disk.model.finish(two)
    disk.put(one)
    disk.put(two)
    assert disk.is_right()
    disk.put(one)
    assert disk.is_right()
    # Sectors 2 to 5 are covered by both: one of the two is the last in all of them.
    disk.put(two, 4, 2)
    assert not disk.is_right()


def test_lost_update_of_neighbouring_sectors_is_wrong(disk: Disk) -> None:
    one, two = disk.begin(0, 4), disk.begin(4, 4)
    disk.model.finish(one)
    disk.model.finish(two)
    disk.put(two)
    assert not disk.is_right()
    disk.put(one)
    assert disk.is_right()


def test_what_is_seen_is_a_prefix(disk: Disk) -> None:
    disk.done(0, 8)
    later = disk.begin(16, 8)
    disk.put(later)
    assert not disk.is_right(power_lost=True)


def test_garbage_foreign_and_misplaced_data_is_wrong(disk: Disk) -> None:
    change = disk.done(0, 8)
    disk.put(change)
    good = bytes(disk.content)
    disk.content[100] ^= 1
    assert not disk.is_right()
    disk.content[:] = good
    disk.content[8 * SECTOR_BYTES : 16 * SECTOR_BYTES] = good[:BLOCK_BYTES]
    assert not disk.is_right()
    disk.content[:] = good
    stranger = CrashModel(8, disk.model.base)
    disk.content[:BLOCK_BYTES] = stranger.payload(stranger.begin(0, 8))
    assert not disk.is_right()


def test_reads_of_a_living_disk_are_judged_by_the_clock(disk: Disk) -> None:
    old, new = disk.done(0, 8), disk.begin(0, 8)
    read = disk.model.clock
    for change in (old, new):
        disk.model.check_read(0, disk.model.payload(change), read)
    with pytest.raises(WrongDataError):
        disk.model.check_read(0, bytes(BLOCK_BYTES), read)
    disk.model.finish(new)
    disk.model.check_read(0, disk.model.payload(old), read)
    with pytest.raises(WrongDataError):
        disk.model.check_read(0, disk.model.payload(old), disk.model.clock + 1)
