"""Requests and their statuses: virtio 1.3, 5.2.6. What is asked here is answered alike by all."""

from __future__ import annotations

import pytest

from tests.protocol.backends import Backend
from tests.protocol.conftest import Factory
from tests.protocol.helpers import check_io, must_be_ok, pattern
from vhostd.errors import UsageError
from vhostd.virtqueue.block import BlockDevice
from vhostd.virtqueue.constants import BlockRequest, BlockStatus
from vhostd.virtqueue.errors import RequestError

IN, OUT = BlockRequest.IN, BlockRequest.OUT


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_what_was_written_is_read(
    backend: Backend, backend_with: Factory, block_bytes: int
) -> None:
    with backend_with(block_bytes=block_bytes).device() as device:
        for blocks in (1, 2, 3, 7, 8, 9, 31, 256):
            length = blocks * block_bytes
            data = pattern(blocks, length)
            device.write(block_bytes, data)
            assert device.read(block_bytes, length) == data


def test_neighbours_of_a_small_write_are_untouched(backend: Backend) -> None:
    with backend.device() as device:
        before = pattern("before", 16384)
        for sector in (1, 6, 7, 8, 9, 15, 16):
            device.write(0, before)
            small = pattern(sector, 1024)
            device.write(sector * 512, small)
            want = bytearray(before)
            want[sector * 512 : sector * 512 + 1024] = small
            assert device.read(0, len(before)) == want


def test_the_last_sector_can_be_used(backend: Backend) -> None:
    with backend.device() as device:
        last = device.capacity_bytes - device.block_bytes
        data = pattern("last", device.block_bytes)
        device.write(last, data)
        assert device.read(last, device.block_bytes) == data


def test_a_large_transfer_is_served(backend: Backend) -> None:
    with backend.device() as device:
        data = pattern("large", 9 << 20)
        device.write(3 << 20, data)
        device.flush()
        assert device.read(3 << 20, len(data)) == data


def test_flush_succeeds(backend: Backend) -> None:
    with backend.device() as device:
        must_be_ok(device.request(BlockRequest.FLUSH))
        device.write(0, pattern("flush", 4096))
        must_be_ok(device.request(BlockRequest.FLUSH))


def test_the_used_length_counts_what_was_written(backend: Backend) -> None:
    """virtio 1.3, 2.7.8.2: data and status of a read, the status alone of a write."""
    with backend.device() as device:
        for sectors in (1, 8, 64):
            length = sectors * 512
            assert device.request(IN, data_in_bytes=length).used_bytes == length + 1
            assert device.request(OUT, data_out=bytes(length)).used_bytes == 1
        assert device.request(BlockRequest.FLUSH).used_bytes == 1


def test_get_id_returns_up_to_twenty_bytes(backend: Backend) -> None:
    with backend.device() as device:
        whole = must_be_ok(device.request(BlockRequest.GET_ID, data_in_bytes=20)).data
        assert len(whole) == 20
        assert whole.rstrip(b"\0")
        assert whole.rstrip(b"\0").isascii()
        again = must_be_ok(device.request(BlockRequest.GET_ID, data_in_bytes=20)).data
        assert again == whole


def test_get_id_into_another_size_writes_no_more_than_fits(ours: Backend) -> None:
    """Others write the terminating zero too, and so cut a byte more."""
    with ours.device() as device:
        whole = must_be_ok(device.request(BlockRequest.GET_ID, data_in_bytes=20)).data
        short = must_be_ok(device.request(BlockRequest.GET_ID, data_in_bytes=5)).data
        assert short == whole[:5]
        longer = must_be_ok(device.request(BlockRequest.GET_ID, data_in_bytes=64)).data
        assert longer[:20] == whole


@pytest.mark.parametrize("kind", [2, 3, 9, 10, 14, 15, 99, 0x7FFFFFFE])
def test_an_unknown_type_is_unsupported(backend: Backend, kind: int) -> None:
    with backend.device() as device:
        assert device.request(kind).status == BlockStatus.UNSUPP
        assert device.request(kind, data_in_bytes=512).status == BlockStatus.UNSUPP
        assert device.request(kind, data_out=bytes(512)).status == BlockStatus.UNSUPP
        check_io(device, "after UNSUPP")


def _out_of_range(capacity: int) -> list[tuple[int, int]]:
    """(sector, sectors) that are not on a disk of that many sectors."""
    return [
        (capacity, 1),
        (capacity - 1, 2),
        (capacity - 7, 8),
        (capacity + 1, 8),
        (1 << 40, 8),
        (1 << 54, 8),
        # Times 512 these are 0 in 64 bits.
        (1 << 55, 8),
        (3 << 56, 8),
        (1 << 63, 8),
        (2**64 - 1, 1),
        (2**64 - 1, 8),
        (2**64 - 8, 8),
        (2**64 - 8, 16),
    ]


def test_requests_out_of_range_fail_and_harm_nothing(backend: Backend) -> None:
    with backend.device() as device:
        first, last = pattern("first", 4096), pattern("last", 4096)
        device.write(0, first)
        device.write(device.capacity_bytes - 4096, last)
        for sector, sectors in _out_of_range(device.config.capacity_sectors):
            read = device.request(IN, sector, data_in_bytes=sectors * 512)
            assert read.status == BlockStatus.IOERR, (sector, sectors)
            write = device.request(OUT, sector, data_out=b"x" * 512 * sectors)
            assert write.status == BlockStatus.IOERR, (sector, sectors)
        assert device.read(0, 4096) == first
        assert device.read(device.capacity_bytes - 4096, 4096) == last


@pytest.mark.parametrize("length", [1, 15, 511, 513, 1023, 4095, 4097])
def test_a_length_of_broken_sectors_fails(backend: Backend, length: int) -> None:
    with backend.device() as device:
        data = pattern("whole", 8192)
        device.write(0, data)
        assert device.request(IN, 0, data_in_bytes=length).status == BlockStatus.IOERR
        assert device.request(OUT, 0, data_out=bytes(length)).status == BlockStatus.IOERR
        assert device.read(0, 8192) == data


def test_an_offset_inside_a_block_fails(backend: Backend, backend_with: Factory) -> None:
    with backend_with(block_bytes=4096).device() as device:
        data = pattern("blocks", 16384)
        device.write(0, data)
        for sector in (1, 4, 7, 9, 15):
            assert device.request(IN, sector, data_in_bytes=4096).status == BlockStatus.IOERR
            assert device.request(OUT, sector, data_out=bytes(4096)).status == BlockStatus.IOERR
        assert device.read(0, len(data)) == data


def test_a_read_only_disk_refuses_to_change(backend: Backend, backend_with: Factory) -> None:
    with backend_with(read_only=True).device() as device:
        assert device.read_only
        before = device.read(0, 8192)
        extent = bytes.fromhex("0000000000000000 08000000 00000000")
        for kind, data in (
            (OUT, b"x" * 4096),
            (BlockRequest.DISCARD, extent),
            (BlockRequest.WRITE_ZEROES, extent),
        ):
            assert device.request(kind, data_out=data).status == BlockStatus.IOERR
        assert device.read(0, 8192) == before
        must_be_ok(device.request(BlockRequest.GET_ID, data_in_bytes=20))


@pytest.mark.parametrize("queues", [1, 2, 4])
def test_all_queues_serve_the_same_disk(backend: Backend, queues: int) -> None:
    with backend.device(queues=queues, queue_size=16) as device:
        for turn in range(8):
            tokens = [
                device.submit_write(at * 4096, pattern((turn, at), 4096), queue=at)
                for at in range(queues)
            ]
            done = device.reap(minimum=queues)
            assert sorted(c.token for c in done) == tokens
            assert all(c.status == BlockStatus.OK for c in done)
            for at in range(queues):
                other = (at + 1) % queues
                token = device.submit_read(at * 4096, 4096, queue=other)
                assert device.wait_for(token).data == pattern((turn, at), 4096)


def test_a_full_queue_is_served(backend: Backend) -> None:
    """As many requests at once as the queue has entries, each with its own data."""
    with backend.device(queue_size=64) as device:
        for kick in (None, False):
            tokens = {}
            for at in range(64):
                data = pattern((kick, at), 4096)
                tokens[device.submit(OUT, at * 8, data_out=data, kick=kick)] = data
            if kick is False:
                device.publish(kick=True)
            assert all(c.status == BlockStatus.OK for c in device.reap(minimum=64))
            reads = {
                device.submit(IN, at * 8, data_in_bytes=4096, kick=kick): at for at in range(64)
            }
            if kick is False:
                device.publish(kick=True)
            for done in device.reap(minimum=64):
                assert done.data == pattern((kick, reads[done.token]), 4096)


def test_the_client_library_reports_failures(backend: Backend, backend_with: Factory) -> None:
    with backend.device() as device:
        with pytest.raises(RequestError, match="IOERR") as caught:
            device.read(device.capacity_bytes, 512)
        assert caught.value.status == BlockStatus.IOERR
        with pytest.raises(RequestError):
            device.write(device.capacity_bytes - 512, bytes(4 << 20))
        with pytest.raises(UsageError, match="whole sectors"):
            device.read(0, 100)
        assert not device.in_flight
        _is_reusable(device)


def _is_reusable(device: BlockDevice) -> None:
    before = device.memory.allocated_bytes
    check_io(device, "reusable")
    assert device.memory.allocated_bytes == before
