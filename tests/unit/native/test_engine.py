"""What `_native.pyi` promises, against a real directory."""

from __future__ import annotations

import os
import random
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from tests.unit.native.conftest import EMPTY, Store, native
from vhostd.errors import BusyError, ExistsError, NotFoundError, UnavailableError, UsageError

if TYPE_CHECKING:
    from vhostd._native import MemoryRegion

KIB = 1 << 10
MIB = 1 << 20


def test_crc32c_is_castagnoli() -> None:
    assert native.crc32c(b"123456789") == 0xE3069283


def test_a_directory_is_formatted_once(store: Store) -> None:
    with pytest.raises(ExistsError, match="not empty"):
        native.format_device(
            str(store.directory),
            pool_uuid=bytes(16),
            device_uuid=bytes(16),
            pool_name="other",
            segment_bytes=MIB,
        )


def test_a_device_is_opened_once_at_a_time(store: Store) -> None:
    with pytest.raises(BusyError):
        store.engine.open_device(str(store.directory))
    store.device.close()
    with pytest.raises(NotFoundError):
        store.device.list_segments()
    again = store.engine.open_device(str(store.directory))
    assert again.superblock["pool_uuid"] == store.pool_uuid
    again.close()


def test_random_writes_read_back_and_survive_closing(store: Store) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    rng = random.Random(seed)
    model = bytearray(4 * MIB)
    volume = store.open()
    for step in range(300):
        offset = 512 * rng.randrange(len(model) // 512)
        length = min(512 * rng.randrange(1, 64), len(model) - offset)
        kind = rng.randrange(8)
        if kind == 0:
            volume.write_zeroes(offset, length)
            model[offset : offset + length] = bytes(length)
        elif kind == 1:
            assert volume.read(offset, length) == model[offset : offset + length]
        else:
            data = rng.randbytes(length)
            volume.write(offset, data)
            model[offset : offset + length] = data
        if step % 100 == 50:
            store.commit(volume, volume.checkpoint())
    assert volume.read(0, len(model)) == model
    store.close(volume)
    volume = store.open()
    assert volume.recovered["clean"]
    assert volume.read(0, len(model)) == model
    store.close(volume)


def test_a_volume_dropped_without_closing_loses_nothing_acknowledged(store: Store) -> None:
    volume = store.open()
    volume.write(0, b"a" * 4096)
    volume.flush()
    volume.write(4096, b"b" * 512)
    store.engine.shutdown()
    del volume
    store.device.close()
    store.engine = native.Engine(staging_dir=str(store.staging), staging_bytes=8 << 20)
    store.device = store.engine.open_device(str(store.directory))
    store.device.grant_segment_numbers(10_000, 20_000)
    volume = store.open()
    assert not volume.recovered["clean"]
    assert volume.recovered["staged_bytes"] > 0
    assert volume.read(0, 4608) == b"a" * 4096 + b"b" * 512
    store.close(volume)


def test_one_volume_is_open_once(store: Store) -> None:
    volume = store.open()
    with pytest.raises(BusyError, match="'disk' is open already"):
        store.open()
    with pytest.raises(BusyError):
        store.device.close()
    store.close(volume)
    with pytest.raises(NotFoundError, match="'disk' is closed"):
        volume.stats()
    store.device.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"size_bytes": 513},
        {"size_bytes": 0},
        {"size_bytes": 1 << 50},
        {"logical_block_bytes": 1024},
        {"serial": "x" * 21},
        {"serial": "é"},
        {"epoch": 0},
        {"volume_uuid": b"short"},
        {
            "checkpoint": {
                "root": b"x",
                "segment": 0,
                "end_block": 0,
                "sequence": 0,
                "record_checksum": 0,
            }
        },
    ],
)
def test_volumes_that_cannot_be_are_refused_and_leave_no_trace(
    store: Store, changes: dict[str, object]
) -> None:
    with pytest.raises(UsageError):
        store.open(**changes)
    store.close(store.open())


@pytest.mark.parametrize("place", [(1, 512), (0, 511), (64 * MIB, 512), ((1 << 64) - 512, 512)])
def test_ranges_outside_or_in_parts_of_sectors_are_refused(
    store: Store, place: tuple[int, int]
) -> None:
    volume = store.open()
    with pytest.raises(UsageError, match="volume 'disk'"):
        volume.read(*place)
    with pytest.raises(UsageError):
        volume.discard(*place)
    store.close(volume)


def test_growth_is_seen_at_once(store: Store) -> None:
    volume = store.open()
    export = volume.export(export_id=1, queues=1, read_only=False)
    volume.resize(128 * MIB)
    assert int.from_bytes(export.config_space(0)[:8], "little") == 128 * MIB // 512
    volume.write(127 * MIB, b"z" * 512)
    assert volume.read(127 * MIB, 512) == b"z" * 512
    export.close()
    store.close(volume)


def test_log_without_checkpoint_asks_for_one(store: Store) -> None:
    volume = store.open(checkpoint_log_bytes=MIB)
    volume.write(0, bytes(range(256)) * (8 * KIB))
    kinds = [event["kind"] for event in store.engine.take_events()]
    assert "checkpoint-wanted" in kinds
    assert all(event["volume"] == store.volume_uuid for event in store.engine.take_events())
    store.close(volume)


def test_a_volume_is_not_closed_under_an_export(store: Store) -> None:
    volume = store.open()
    export = volume.export(export_id=7, queues=4, read_only=True)
    assert export.features() & (1 << 5), "VIRTIO_BLK_F_RO"
    with pytest.raises(BusyError, match="exported"):
        volume.close()
    export.close()
    export.close()
    with pytest.raises(NotFoundError, match="export 7"):
        export.stop_queue(0)
    store.close(volume)


def test_memory_regions_are_added_and_removed_by_their_addresses(store: Store) -> None:
    volume = store.open()
    export = volume.export(export_id=1, queues=1, read_only=False)
    memory = os.memfd_create("guest")
    os.ftruncate(memory, MIB)
    region: MemoryRegion = {
        "guest_address": 0,
        "size_bytes": MIB,
        "user_address": 1 << 40,
        "mmap_offset": 0,
        "fd": memory,
    }

    def changed(fields: dict[str, int]) -> MemoryRegion:
        return cast("MemoryRegion", region | fields)

    export.set_memory([region])
    with pytest.raises(UsageError, match="overlaps"):
        export.add_region(region)
    with pytest.raises(UsageError, match="ends at"):
        export.add_region(changed({"guest_address": MIB, "mmap_offset": 4096}))
    with pytest.raises(UsageError, match="duplicated"):
        export.add_region(changed({"guest_address": MIB, "fd": 1 << 20}))
    export.add_region(changed({"guest_address": MIB}))
    with pytest.raises(NotFoundError):
        export.remove_region(MIB, 0, MIB)
    export.remove_region(MIB, 1 << 40, MIB)
    os.close(memory)
    export.close()
    store.close(volume)


def test_a_snapshot_is_read_and_closed_while_its_volume_goes_on(store: Store) -> None:
    volume = store.open()
    volume.write(0, b"old " * 1024)
    taken = uuid.uuid4().bytes
    volume.snapshot(uuid=taken, name="s", created_ns=1)
    volume.write(0, b"new " * 1024)
    result = volume.checkpoint()
    store.commit(volume, result)
    [snapshot] = result["snapshots"]
    opened = store.engine.open_volume(
        store.device,
        volume_uuid=taken,
        name="disk@s",
        size_bytes=64 * MIB,
        logical_block_bytes=512,
        serial="s",
        previous_epoch=0,
        epoch=1,
        read_only=True,
        checkpoint={**EMPTY, "root": snapshot["root"]},
        mapped_blocks=snapshot["mapped_blocks"],
        segments=[],
        uncatalogued=[],
    )
    assert opened.read(0, 4096) == b"old " * 1024
    # There is nothing to write, and nothing to wait for.
    assert opened.close() is None
    assert volume.read(0, 4096) == b"new " * 1024
    store.close(volume)


def test_an_engine_that_was_shut_down_says_so(store: Store) -> None:
    volume = store.open()
    store.engine.shutdown()
    store.engine.shutdown()
    with pytest.raises(UnavailableError):
        store.engine.stats()
    with pytest.raises(UnavailableError):
        volume.read(0, 512)


def test_engines_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for wrong in ({"workers": 0}, {"staging_bytes": 12 << 20}, {"cpus": [1 << 20]}):
        with pytest.raises(UsageError):
            native.Engine(staging_dir=str(tmp_path), **wrong)
