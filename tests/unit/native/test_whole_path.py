"""From a driver through the socket, the rings, the volume and back: everything but QEMU."""

from __future__ import annotations

import asyncio
import os
import random
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from tests.unit.native.conftest import Store
from vhostd.protocol.server import ExportServer
from vhostd.virtqueue.block import BlockDevice

if TYPE_CHECKING:
    from vhostd._native import Export, Volume

MIB = 1 << 20


@contextmanager
def served(path: Path, volume: Volume, *, queues: int = 4) -> Iterator[Path]:
    """The volume on a socket, by an event loop of its own."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    number = iter(range(1, 1000))

    def open_device() -> Export:
        return volume.export(export_id=next(number), queues=queues, read_only=False)

    server = ExportServer(path, name="test/disk", open_device=open_device, queues=queues)
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        try:
            yield path
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def volume(store: Store) -> Iterator[Volume]:
    volume = store.open()
    yield volume
    store.close(volume)


def test_a_guest_reads_what_it_wrote_through_every_queue(tmp_path: Path, volume: Volume) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    rng = random.Random(seed)
    model = bytearray(volume.read(0, 8 * MIB))
    with served(tmp_path / "s", volume) as path, BlockDevice(path, queues=4) as disk:
        assert disk.capacity_bytes == 64 * MIB
        assert disk.get_id() == "serial-1"
        for _ in range(200):
            offset = 512 * rng.randrange(len(model) // 512)
            length = min(512 * rng.randrange(1, 256), len(model) - offset)
            step = rng.randrange(10)
            if step == 0:
                disk.write_zeroes(offset, length)
                model[offset : offset + length] = bytes(length)
            elif step == 1:
                disk.flush()
            elif step < 5:
                assert disk.read(offset, length) == model[offset : offset + length]
            else:
                data = rng.randbytes(length)
                disk.write(offset, data)
                model[offset : offset + length] = data
        assert disk.read(0, len(model)) == model
    assert volume.read(0, len(model)) == model


def test_a_guest_that_comes_back_finds_its_data(tmp_path: Path, volume: Volume) -> None:
    with served(tmp_path / "s", volume) as path:
        with BlockDevice(path) as disk:
            disk.write(MIB, b"once" * 1024)
        with BlockDevice(path, queues=2, queue_size=256) as disk:
            assert disk.read(MIB, 4096) == b"once" * 1024


@pytest.mark.parametrize(("kick", "call"), [(False, True), (True, False), (False, False)])
def test_either_side_may_poll(tmp_path: Path, volume: Volume, kick: bool, call: bool) -> None:
    with (
        served(tmp_path / "s", volume) as path,
        BlockDevice(path, kick=kick, call=call) as disk,
    ):
        disk.write(0, b"p" * 4096)
        assert disk.read(0, 4096) == b"p" * 4096


def test_a_broken_ring_costs_only_its_session(tmp_path: Path, volume: Volume, store: Store) -> None:
    def broken() -> bool:
        return any(event["kind"] == "ring-broken" for event in store.engine.take_events())

    with served(tmp_path / "s", volume) as path:
        with BlockDevice(path) as disk:
            disk.write(0, b"k" * 512)
            queue = disk.queues[0]
            queue.store_available_index((queue.available_index + 4000) & 0xFFFF)
            queue.kick()
            wait_readable(store.engine.event_fd(), broken)
        with BlockDevice(path) as disk:
            assert disk.read(0, 512) == b"k" * 512


def wait_readable(fd: int, done: Callable[[], bool]) -> None:
    while not done():
        assert select.select([fd], [], [], 20)[0], "no event within 20 s"
