"""The configuration space: virtio 1.3, 5.2.4, by GET_CONFIG and SET_CONFIG."""

from __future__ import annotations

import pytest

from tests.protocol.backends import Backend
from tests.protocol.conftest import Factory
from tests.protocol.helpers import check_io
from vhostd.protocol.features import VirtioFeature
from vhostd.virtqueue.block import DRIVER_FEATURES
from vhostd.virtqueue.config import BlockConfig
from vhostd.virtqueue.errors import BackendError


def test_the_capacity_is_in_sectors_of_512_bytes(backend: Backend, backend_with: Factory) -> None:
    for block_bytes in (512, 4096):
        disk = backend_with(block_bytes=block_bytes)
        with disk.device() as device:
            assert device.config.capacity_sectors * 512 == disk.spec.size_bytes
            assert device.config.block_bytes == block_bytes


def test_limits_are_told(backend: Backend) -> None:
    with backend.device() as device:
        config = device.config
        assert 1 <= config.seg_max <= 1024
        assert config.num_queues == backend.spec.queues
        for sectors, segments in (
            (config.max_discard_sectors, config.max_discard_segments),
            (config.max_write_zeroes_sectors, config.max_write_zeroes_segments),
        ):
            assert sectors > 0
            assert segments > 0
        assert config.discard_alignment_sectors >= 1
        assert config.min_io_blocks >= 1


def test_a_part_of_it_can_be_read(backend: Backend) -> None:
    """Others read from the start only, whatever the offset; so the part is at the start."""
    with backend.device() as device:
        frontend = device.frontend
        assert frontend is not None
        whole = frontend.get_config()
        assert frontend.get_config(0, 8) == whole[:8]
        if backend.is_ours:
            assert frontend.get_config(20, 4) == whole[20:24]


def test_writeback_can_be_written_and_read(backend: Backend) -> None:
    with backend.device() as device:
        for enabled in (True, False, True):
            device.set_write_cache(enabled)
            assert device.config.writeback == enabled or not backend.is_ours
            check_io(device, f"writeback {enabled}")


def test_writeback_survives_a_new_session(ours: Backend) -> None:
    """A front-end does not say it again after a reconnect; others forget it."""
    with ours.device() as device:
        device.set_write_cache(False)
        device.reconnect()
        assert device.config.writeback == 0
        device.set_write_cache(True)
        device.reconnect()
        assert device.config.writeback == 1


def test_only_writeback_can_be_written(ours: Backend) -> None:
    """libvhost-user ends the session instead."""
    with ours.device() as device:
        frontend = device.frontend
        assert frontend is not None
        before = frontend.get_config()
        for offset, data in (
            (0, bytes(8)),
            (20, bytes(4)),
            (32, b"\2"),
            (32, b"\1\1"),
            (56, b"\0"),
        ):
            with pytest.raises(BackendError, match="SET_CONFIG"):
                frontend.set_config(offset, data)
        assert frontend.get_config() == before


def test_writeback_needs_its_feature(ours: Backend) -> None:
    features = DRIVER_FEATURES & ~VirtioFeature.BLK_CONFIG_WCE
    with ours.device(features=features) as device:
        frontend = device.frontend
        assert frontend is not None
        with pytest.raises(BackendError, match="SET_CONFIG"):
            frontend.set_config(BlockConfig.WRITEBACK_OFFSET, b"\0")


def test_an_access_outside_is_answered_as_an_error(ours: Backend) -> None:
    with ours.device() as device:
        frontend = device.frontend
        assert frontend is not None
        for offset, len_bytes in ((256, 1), (0, 257), (255, 2), (0xFFFFFFFF, 4)):
            with pytest.raises(BackendError, match="no config bytes"):
                frontend.get_config(offset, len_bytes)
        check_io(device, "after config errors")


def test_physical_blocks_are_those_of_the_store(ours: Backend, backend_with: Factory) -> None:
    """4 KiB is what the store maps and checks; a guest should align to it."""
    for block_bytes in (512, 4096):
        with backend_with(block_bytes=block_bytes).device() as device:
            physical = device.config.block_bytes << device.config.physical_block_exp
            assert physical == 4096
            assert device.config.discard_alignment_sectors * 512 == 4096
