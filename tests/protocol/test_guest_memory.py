"""Guest memory: regions, gaps, buffers across them, memory that comes and goes."""

from __future__ import annotations

import random

import pytest

from tests.protocol.backends import Backend
from tests.protocol.helpers import check_io, must_be_ok, pattern
from vhostd.virtqueue.block import BlockDevice
from vhostd.virtqueue.constants import BlockRequest
from vhostd.virtqueue.errors import BackendError
from vhostd.virtqueue.memory import GuestMemory, Region

IN, OUT = BlockRequest.IN, BlockRequest.OUT
MIB = 1 << 20
LENGTH = 16384


def _through(device: BlockDevice, region: Region, tag: object) -> None:
    """A write from and a read into that region."""
    data = pattern(tag, LENGTH)

    def place(size_bytes: int) -> int:
        return device.memory.allocate(size_bytes, region=region)

    must_be_ok(device.request(OUT, 0, data_out=data, place=place))
    done = device.request(IN, 0, data_in_bytes=LENGTH, place=place)
    assert must_be_ok(done).data == data


@pytest.mark.parametrize(
    "addresses",
    [
        [0],
        [0x1000],
        [0xFFFF_F000],
        [1 << 40],
        [(1 << 52) - (4 << 20)],
        [0, 1 << 32],
        [0x1_0000_0000, 0x40_0000_0000, 0x7000_0000],
        [at * (8 << 20) for at in range(8)],
    ],
    ids=lambda addresses: "-".join(hex(address) for address in addresses[:3]),
)
def test_memory_may_lie_anywhere(backend: Backend, addresses: list[int]) -> None:
    memory = GuestMemory()
    regions = [memory.add_region(address, 4 * MIB) for address in addresses]
    with backend.device(memory=memory) as device:
        for region in regions:
            _through(device, region, region.guest_address)


def test_a_region_may_begin_inside_its_file(backend: Backend) -> None:
    memory = GuestMemory()
    for at, offset in enumerate((0, 4096, 2 * MIB, 3 * MIB + 8192)):
        memory.add_region(at << 32, 4 * MIB, mmap_offset=offset)
    with backend.device(memory=memory) as device:
        for region in memory.regions:
            _through(device, region, region.mmap_offset)


def test_user_addresses_have_nothing_to_do_with_guest_addresses(backend: Backend) -> None:
    memory = GuestMemory()
    memory.add_region(0, 4 * MIB, user_address=0x7F00_0000_0000)
    memory.add_region(0x7F00_0000_0000, 4 * MIB, user_address=4 * MIB)
    with backend.device(memory=memory) as device:
        for region in memory.regions:
            _through(device, region, region.user_address)


def _two_adjoining_regions() -> tuple[GuestMemory, int]:
    """Two files that are one range to the guest, and the address where they meet."""
    memory = GuestMemory()
    start = 1 << 32
    border = start + 4 * MIB
    memory.add_region(start, 4 * MIB)
    memory.add_region(border, 4 * MIB)
    return memory, border


def _descriptors(backend: Backend) -> tuple[bool, ...]:
    """libvhost-user counts a descriptor across regions as two, and so takes an indirect table with
    one for a loop: it is only asked for direct ones."""
    return (False, True) if backend.is_ours else (False,)


def test_buffers_may_go_across_adjoining_regions(backend: Backend) -> None:
    memory, border = _two_adjoining_regions()
    with backend.device(memory=memory) as device:
        for before in (1, 15, 511, 512, 4096, 5000, LENGTH - 1):

            def place(size_bytes: int, before: int = before) -> int:
                # The data goes across; header and status are small.
                return border - before if size_bytes >= LENGTH else memory.allocate(size_bytes)

            for indirect in _descriptors(backend):
                data = pattern((before, indirect), LENGTH)
                done = device.request(OUT, 0, data_out=data, place=place, indirect=indirect)
                must_be_ok(done)
                assert device.read(0, LENGTH) == data
                memory.write(border - before, bytes(LENGTH))
                done = device.request(IN, 0, data_in_bytes=LENGTH, place=place, indirect=indirect)
                assert must_be_ok(done).data == data


def test_header_and_status_may_go_across_adjoining_regions(backend: Backend) -> None:
    memory, border = _two_adjoining_regions()
    with backend.device(memory=memory) as device:
        data = pattern("header", 4096)
        for before in range(1, 16):

            def header_across(size_bytes: int, before: int = before) -> int:
                return border - before if size_bytes == 16 else memory.allocate(size_bytes)

            for indirect in _descriptors(backend):
                must_be_ok(
                    device.request(OUT, 0, data_out=data, place=header_across, indirect=indirect)
                )
        for before in (1, 512, 4096):
            # Data and status in one descriptor of 4097 bytes; with 4096, the status is alone there.

            def data_across(size_bytes: int, before: int = before) -> int:
                return border - before if size_bytes == 4097 else memory.allocate(size_bytes)

            for indirect in _descriptors(backend):
                done = device.request(
                    IN,
                    0,
                    data_in_bytes=4096,
                    writable_cuts=(),
                    place=data_across,
                    indirect=indirect,
                )
                assert must_be_ok(done).data == data


def test_memory_added_later_is_used(backend: Backend) -> None:
    with backend.device() as device:
        frontend = device.frontend
        assert frontend is not None
        for at in range(1, 20):
            region = device.memory.add_region(at << 34, 4 * MIB)
            frontend.add_region(region)
            _through(device, region, at)
        check_io(device, "old memory")


def test_memory_can_be_removed(backend: Backend) -> None:
    with backend.device() as device:
        frontend = device.frontend
        assert frontend is not None
        for turn in range(5):
            region = device.memory.add_region(1 << 34, 4 * MIB)
            frontend.add_region(region)
            _through(device, region, turn)
            frontend.remove_region(region)
            device.memory.remove_region(region)
            check_io(device, ("removed", turn))


def test_memory_comes_and_goes_under_io(backend: Backend) -> None:
    with backend.device(queue_size=64) as device:
        frontend = device.frontend
        assert frontend is not None
        for turn in range(10):
            for at in range(32):
                device.submit_write(at * 4096, pattern((turn, at), 4096))
            region = device.memory.add_region(1 << 36, 4 * MIB)
            frontend.add_region(region)
            _drain(device)
            for at in range(32):
                device.submit_read(at * 4096, 4096)
            frontend.remove_region(region)
            device.memory.remove_region(region)
            _drain(device)
        expected = b"".join(pattern((9, at), 4096) for at in range(32))
        assert device.read(0, len(expected)) == expected


def _drain(device: BlockDevice) -> None:
    for done in device.reap(minimum=device.in_flight):
        must_be_ok(done)


def test_the_memory_table_can_be_replaced_while_stopped(backend: Backend) -> None:
    with backend.device() as device:
        frontend = device.frontend
        assert frontend is not None
        for turn in range(4):
            bases = device.stop()
            device.memory.add_region((turn + 1) << 34, 4 * MIB)
            frontend.set_memory(device.memory)
            device.resume(bases)
            for region in device.memory.regions:
                _through(device, region, (turn, region.guest_address))


def test_there_are_slots_for_hot_plug(backend: Backend) -> None:
    with backend.frontend() as frontend:
        frontend.read_offer()
        assert frontend.max_mem_slots() >= 8


def test_all_slots_can_be_used_and_one_more_is_refused(ours: Backend) -> None:
    """Others have 8 to 509 and end the session at one too many."""
    with ours.device() as device:
        frontend = device.frontend
        assert frontend is not None
        slots = frontend.max_mem_slots()
        assert slots == 509
        regions = []
        for at in range(1, slots):
            regions.append(device.memory.add_region(at << 34, 65536))
            frontend.add_region(regions[-1])
        for region in random.Random(0).sample(regions, 20):
            _through(device, region, region.guest_address)
        extra = device.memory.add_region(slots << 34, 65536)
        with pytest.raises(BackendError, match="ADD_MEM_REG"):
            frontend.add_region(extra)
        check_io(device, "full")
        for region in regions:
            frontend.remove_region(region)
        frontend.add_region(extra)
        _through(device, extra, "extra")


def test_bad_regions_are_refused_and_change_nothing(ours: Backend) -> None:
    """Overlap, wrap, no size, beyond the file. libvhost-user maps what it can, or panics."""
    with ours.device() as device:
        frontend = device.frontend
        assert frontend is not None
        (good,) = device.memory.regions
        spare = GuestMemory()
        region = spare.add_region(1 << 36, MIB)
        for guest, size, user, offset in (
            (good.guest_address, MIB, 1 << 45, 0),
            (good.guest_address + good.size_bytes - 4096, MIB, 1 << 45, 0),
            (good.guest_address - MIB + 4096, MIB, 1 << 45, 0),
            (1 << 36, 0, 1 << 45, 0),
            (1 << 36, 2 * MIB, 1 << 45, 0),
            (1 << 36, MIB, 1 << 45, 4096),
            (1 << 36, MIB, 1 << 45, (1 << 64) - 4096),
            ((1 << 64) - 4096, MIB, 1 << 45, 0),
            (1 << 36, MIB, (1 << 64) - 4096, 0),
            (1 << 36, (1 << 64) - 1, 1 << 45, 0),
        ):
            bad = Region(guest, size, user, offset, region.fd, region.mapping, region.view)
            with pytest.raises(BackendError, match="ADD_MEM_REG"):
                frontend.add_region(bad)
        missing = Region(1 << 50, MIB, 1 << 50, 0, region.fd, region.mapping, region.view)
        with pytest.raises(BackendError, match="REM_MEM_REG"):
            frontend.remove_region(missing)
        check_io(device, "after bad regions")
        spare.close()
