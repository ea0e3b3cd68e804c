"""DISCARD and WRITE_ZEROES: virtio 1.3, 5.2.6.2."""

from __future__ import annotations

import pytest

from tests.protocol.backends import Backend
from tests.protocol.conftest import Factory
from tests.protocol.helpers import must_be_ok, pattern
from vhostd.virtqueue.block import EXTENT, WRITE_ZEROES_UNMAP, BlockDevice, Extent
from vhostd.virtqueue.constants import BlockRequest, BlockStatus

DISCARD, WRITE_ZEROES = BlockRequest.DISCARD, BlockRequest.WRITE_ZEROES
KIB = 1024

both_kinds = pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES], ids=lambda kind: kind.name)


def _unmap(device: BlockDevice, kind: int, *extents: tuple[int, int, int]) -> int:
    return device.request(kind, data_out=b"".join(EXTENT.pack(*e) for e in extents)).status


@pytest.mark.parametrize("unmap", [False, True], ids=["keep", "unmap"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 4096),
        (4096, 8192),
        (512, 512),
        (3584, 1024),
        (512, 9 * KIB),
        (7 * KIB, 512),
        (0, 64 * KIB),
    ],
)
def test_zeroes_are_read_where_they_were_written(
    backend: Backend, offset: int, length: int, unmap: bool
) -> None:
    with backend.device() as device:
        content = bytearray(pattern((offset, length, unmap), 64 * KIB))
        device.write(0, content)
        device.write_zeroes(offset, length, unmap=unmap)
        content[offset : offset + length] = bytes(length)
        assert device.read(0, len(content)) == content
        device.flush()
        assert device.read(0, len(content)) == content


def test_zeroed_blocks_can_be_written_again(backend: Backend) -> None:
    with backend.device() as device:
        for turn in range(4):
            data = pattern(turn, 32 * KIB)
            device.write(0, data)
            device.write_zeroes(4096, 8192, unmap=turn % 2 == 0)
            device.write(4096, data[4096:8192])
            assert device.read(0, 16 * KIB) == data[:8192] + bytes(4096) + data[12288:16384]


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_discard_keeps_what_is_around_it(
    backend: Backend, backend_with: Factory, block_bytes: int
) -> None:
    with backend_with(block_bytes=block_bytes).device() as device:
        for first, blocks in ((1, 1), (1, 8), (3, 9), (8, 8)):
            data = pattern((first, blocks), 128 * KIB)
            device.write(0, data)
            offset, length = first * block_bytes, blocks * block_bytes
            device.discard(offset, length)
            assert device.read(0, offset) == data[:offset]
            end = offset + length
            assert device.read(end, len(data) - end) == data[end:]


def test_discarded_blocks_read_as_zeroes_or_as_before(backend: Backend) -> None:
    """Undefined by the specification, but never anything else, and the same each time."""
    with backend.device() as device:
        data = pattern("discard", 64 * KIB)
        device.write(0, data)
        device.discard(0, 64 * KIB)
        found = device.read(0, 64 * KIB)
        assert found in (data, bytes(64 * KIB))
        assert device.read(0, 64 * KIB) == found


def test_discarded_blocks_read_as_zeroes(ours: Backend) -> None:
    """Stronger than the specification: whole blocks of 4 KiB are unmapped, and those are zero.

    What sticks out at the ends of an extent may stay.
    """
    with ours.device() as device:
        data = pattern("discard", 64 * KIB)
        device.write(0, data)
        device.discard(512, 40 * KIB)
        found = device.read(0, 64 * KIB)
        assert found[4096 : 40 * KIB] == bytes(36 * KIB)
        assert found[:512] == data[:512]
        assert found[40 * KIB + 512 :] == data[40 * KIB + 512 :]
        for start, end in ((512, 4096), (40 * KIB, 40 * KIB + 512)):
            assert found[start:end] in (data[start:end], bytes(end - start))


def test_the_whole_disk_can_be_discarded_and_zeroed(backend: Backend) -> None:
    with backend.device() as device:
        last = device.capacity_bytes - 4096
        device.write(0, pattern("first", 4096))
        device.write(last, pattern("last", 4096))
        device.discard(0, device.capacity_bytes)
        device.write_zeroes(0, device.capacity_bytes)
        assert device.read(0, 4096) == bytes(4096)
        assert device.read(last, 4096) == bytes(4096)


@both_kinds
def test_an_extent_beyond_the_disk_fails(backend: Backend, kind: int) -> None:
    with backend.device() as device:
        end = device.config.capacity_sectors
        data = pattern("end", 4096)
        device.write(device.capacity_bytes - 4096, data)
        for sector, sectors in ((end, 8), (end - 4, 8), (1 << 55, 8), (2**64 - 4, 8), (1 << 63, 1)):
            assert _unmap(device, kind, (sector, sectors, 0)) == BlockStatus.IOERR
        assert device.read(device.capacity_bytes - 4096, 4096) == data


@both_kinds
def test_more_sectors_than_the_limit_fail(backend: Backend, kind: int) -> None:
    with backend.device() as device:
        config = device.config
        limit = config.max_discard_sectors if kind == DISCARD else config.max_write_zeroes_sectors
        data = pattern("limit", 4096)
        device.write(0, data)
        assert _unmap(device, kind, (0, limit + 1, 0)) == BlockStatus.IOERR
        assert _unmap(device, kind, (0, 0xFFFFFFFF, 0)) == BlockStatus.IOERR
        assert device.read(0, 4096) == data


@both_kinds
def test_reserved_flags_are_unsupported(backend: Backend, kind: int) -> None:
    with backend.device() as device:
        data = pattern("flags", 4096)
        device.write(0, data)
        for flags in (2, 4, 1 << 31, 0xFFFFFFFE):
            assert _unmap(device, kind, (0, 8, flags)) == BlockStatus.UNSUPP
        assert device.read(0, 4096) == data


def test_discard_has_no_unmap_flag(backend: Backend) -> None:
    with backend.device() as device:
        assert _unmap(device, DISCARD, (0, 8, WRITE_ZEROES_UNMAP)) == BlockStatus.UNSUPP


@both_kinds
def test_more_extents_than_the_limit_are_unsupported(backend: Backend, kind: int) -> None:
    with backend.device() as device:
        config = device.config
        limit = config.max_discard_segments
        if kind == WRITE_ZEROES:
            limit = config.max_write_zeroes_segments
        data = pattern("extents", 4096)
        device.write(0, data)
        extents = [(0, 8, 0)] * (limit + 1)
        assert _unmap(device, kind, *extents) == BlockStatus.UNSUPP
        assert device.read(0, 4096) == data


@both_kinds
@pytest.mark.parametrize("length", [0, 1, 8, 15])
def test_a_broken_extent_fails(backend: Backend, kind: int, length: int) -> None:
    with backend.device() as device:
        done = device.request(kind, data_out=bytes(length))
        assert done.status == BlockStatus.IOERR


def test_several_extents_are_carried_out(ours: Backend) -> None:
    """Others take one extent a request, and say so."""
    with ours.device() as device:
        content = bytearray(pattern("several", 256 * KIB))
        device.write(0, content)
        extents = [Extent(at * 8192 + 512, 1024 + at * 512) for at in range(16)]
        token = device.submit_write_zeroes(extents)
        must_be_ok(device.wait_for(token))
        for offset, length in extents:
            content[offset : offset + length] = bytes(length)
        assert device.read(0, len(content)) == content


@both_kinds
def test_one_wrong_extent_leaves_all_undone(ours: Backend, kind: int) -> None:
    with ours.device() as device:
        data = pattern("all or nothing", 64 * KIB)
        device.write(0, data)
        end = device.config.capacity_sectors
        assert _unmap(device, kind, (0, 8, 0), (16, 8, 0), (end, 8, 0)) == BlockStatus.IOERR
        assert _unmap(device, kind, (0, 8, 0), (16, 8, 4)) == BlockStatus.UNSUPP
        assert device.read(0, len(data)) == data


@both_kinds
def test_an_empty_extent_does_nothing(ours: Backend, kind: int) -> None:
    with ours.device() as device:
        data = pattern("empty", 4096)
        device.write(0, data)
        assert _unmap(device, kind, (0, 0, 0)) == BlockStatus.OK
        assert device.read(0, 4096) == data
