"""Pools and open volumes over an engine that does no I/O."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from tests.unit.storage.fake_engine import FakeDevice, FakeEngine, FakeVolume, format_device
from vhostd.errors import (
    BusyError,
    DamagedError,
    DeviceError,
    ExistsError,
    InternalError,
    NoSpaceError,
    NotFoundError,
    UsageError,
)
from vhostd.storage.catalog import FILE_NAME
from vhostd.storage.pool import GRANT_SEGMENTS, Pool, create_pool

GIB = 1 << 30


class World:
    """One directory device, and the engines that open it one after another."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "device"
        self.staging = tmp_path / "staging"
        create_pool(self.path, "fast", format_device=format_device)
        self.engine = FakeEngine()
        self.pool = self.open()

    def open(self) -> Pool:
        return Pool.open(self.path, self.engine, staging_dir=self.staging)

    def reopen(self) -> Pool:
        self.pool.close()
        self.pool = self.open()
        return self.pool

    def crash(self) -> None:
        """What is open is forgotten, and the lock goes with the process."""
        self.pool.catalog.close()
        self.engine.locked.clear()

    def engine_volume(self, uuid: UUID) -> FakeVolume:
        return self.engine.volumes[uuid]

    @property
    def device(self) -> FakeDevice:
        assert isinstance(self.pool.device, FakeDevice)
        return self.pool.device


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.engine.shutdown()


def test_create_refuses_a_directory_that_is_not_empty_and_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(ExistsError, match=r"photo\.jpg"):
        create_pool(tmp_path, "fast", format_device=format_device)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_create_refuses_a_pool(world: World) -> None:
    with pytest.raises(ExistsError, match="holds a pool already"):
        create_pool(world.path, "other", format_device=format_device)
    assert world.reopen().name == "fast"


def test_create_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def full(path: str, /, **arguments: object) -> None:
        raise NoSpaceError("full")

    with pytest.raises(NoSpaceError):
        create_pool(tmp_path / "device", "fast", format_device=full)
    assert list(tmp_path.iterdir()) == []


def test_create_below_a_missing_directory_names_it(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="missing does not exist"):
        create_pool(tmp_path / "missing" / "device", "fast", format_device=format_device)


def test_open_of_no_pool_is_not_found(world: World, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is no pool"):
        Pool.open(tmp_path, world.engine, staging_dir=tmp_path)


def test_second_open_is_refused_and_the_first_goes_on(world: World) -> None:
    with pytest.raises(BusyError, match="PID 1"):
        world.open()
    world.pool.create_volume("web", GIB)


def test_failed_open_releases_the_device(world: World) -> None:
    world.pool.close()
    catalog = world.path / FILE_NAME
    good = catalog.read_bytes()
    catalog.write_bytes(b"rubbish" * 999)
    with pytest.raises(DamagedError, match="damaged"):
        world.open()
    catalog.write_bytes(good)
    world.pool = world.open()


def test_catalog_of_another_pool_is_refused(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    create_pool(other, "slow", format_device=format_device)
    world.pool.close()
    shutil.copy(other / FILE_NAME, world.path / FILE_NAME)
    with pytest.raises(DamagedError, match="fast and slow"):
        world.open()


@pytest.mark.parametrize(
    ("size", "block", "reason"),
    [
        (GIB + 1, 512, "not a multiple.*1073742336 would be"),
        (GIB + 512, 4096, "not a multiple"),
        (0, 512, "give more"),
        (-512, 512, "give more"),
        ((64 << 40) + 512, 512, "64T"),
        (GIB, 1024, "512 or 4096"),
    ],
)
def test_impossible_size_is_refused(world: World, size: int, block: int, reason: str) -> None:
    with pytest.raises(UsageError, match=f"fast/web.*{reason}"):
        world.pool.create_volume("web", size, logical_block_bytes=block)
    assert world.pool.catalog.volumes() == []


@pytest.mark.parametrize("serial", ["x" * 21, "ä", "a\n"])
def test_impossible_serial_is_refused(world: World, serial: str) -> None:
    with pytest.raises(UsageError, match="serial"):
        world.pool.create_volume("web", GIB, serial=serial)


def test_each_opening_has_a_new_epoch(world: World) -> None:
    world.pool.create_volume("web", GIB)
    for epoch in (1, 2, 3):
        volume = world.pool.open_volume("web")
        assert world.engine_volume(volume.uuid).opened["epoch"] == epoch
        world.pool.release_volume(volume)


def test_volume_is_open_once_until_its_last_user_goes(world: World) -> None:
    world.pool.create_volume("web", GIB)
    first, second = world.pool.open_volume("web"), world.pool.open_volume("web")
    assert first is second
    world.pool.release_volume(first)
    assert ("close",) not in world.engine_volume(first.uuid).calls
    world.pool.release_volume(second)
    assert ("close",) in world.engine_volume(first.uuid).calls


def test_close_commits_a_checkpoint_that_the_next_opening_starts_from(world: World) -> None:
    world.pool.create_volume("web", GIB)
    volume = world.pool.open_volume("web")
    world.engine_volume(volume.uuid).write(5)
    world.pool.release_volume(volume)
    again = world.reopen().open_volume("web")
    opened = world.engine_volume(again.uuid).opened
    assert opened["checkpoint"]["sequence"] > 0
    assert [row["kind"] for row in opened["segments"]] == [1, 2]
    assert opened["mapped_blocks"] == 5
    assert opened["uncatalogued"] == []


def test_segments_newer_than_the_checkpoint_are_handed_to_recovery(world: World) -> None:
    world.pool.create_volume("web", GIB)
    world.pool.create_volume("other", GIB)
    volume, other = world.pool.open_volume("web"), world.pool.open_volume("other")
    engine = world.engine_volume(volume.uuid)
    engine.write()
    volume.checkpoint()
    engine.fresh = True
    engine.write()
    expected = engine.segment
    world.engine_volume(other.uuid).write()
    world.crash()
    world.pool = world.open()
    again = world.pool.open_volume("web")
    assert world.engine_volume(again.uuid).opened["uncatalogued"] == [expected]


def test_checkpoint_if_needed_does_nothing_for_an_idle_volume(world: World) -> None:
    world.pool.create_volume("web", GIB)
    volume = world.pool.open_volume("web")
    assert not volume.checkpoint(if_needed=True)
    world.engine_volume(volume.uuid).write()
    assert volume.checkpoint(if_needed=True)
    assert not volume.checkpoint(if_needed=True)


def test_refused_checkpoint_is_told_to_the_engine_and_the_next_one_works(world: World) -> None:
    world.pool.create_volume("web", GIB)
    volume = world.pool.open_volume("web")
    engine = world.engine_volume(volume.uuid)
    engine.write(3)
    volume.checkpoint()
    engine.write()
    engine.sequence = 2
    with pytest.raises(InternalError, match="sequence 2 is before"):
        volume.checkpoint()
    assert ("checkpoint_failed", 7) in engine.calls
    engine.sequence = 4
    assert volume.checkpoint()


def test_numbers_are_granted_far_ahead_and_never_twice(world: World) -> None:
    first = world.device.granted
    assert len(first) == GRANT_SEGMENTS
    world.pool.grant_segments()
    assert world.device.granted.start == first.stop
    second = world.device.granted
    world.reopen()
    assert world.device.granted.start == second.stop


def test_catalog_older_than_the_segments_is_refused(world: World) -> None:
    world.pool.create_volume("web", GIB)
    world.pool.close()
    old = (world.path / FILE_NAME).read_bytes()
    world.pool = world.open()
    world.pool.open_volume("web")
    world.device.make_segment(world.pool.catalog.volume("web").uuid.bytes, 1)
    world.pool.close()
    (world.path / FILE_NAME).write_bytes(old)
    segments = list((world.path / "segments").glob("*/*.seg"))
    with pytest.raises(DamagedError, match="older than the segments"):
        world.open()
    assert list((world.path / "segments").glob("*/*.seg")) == segments != []


def test_segment_of_a_newer_epoch_than_the_catalog_knows_is_refused(world: World) -> None:
    row = world.pool.create_volume("web", GIB)
    world.device.make_segment(row.uuid.bytes, 1)
    world.pool.close()
    with pytest.raises(DamagedError, match="epoch 1"):
        world.open()


def test_segments_without_owner_are_kept_and_counted(world: World) -> None:
    number = world.device.make_segment(b"u" * 16, 1)
    damaged = world.device.make_segment(b"v" * 16, 1)
    world.device.segment_path(damaged).write_bytes(b"\xff" * 4096)
    pool = world.reopen()
    assert pool.findings.unknown_volume == [number]
    assert pool.findings.unreadable == [damaged]
    assert pool.space.pool()["segments_without_owner"] == 2
    assert pool.device.list_segments() == [number, damaged]


@pytest.mark.parametrize("content", [b"", bytes(4096)])
def test_segment_that_was_never_begun_is_removed(world: World, content: bytes) -> None:
    number = world.device.make_segment(b"u" * 16, 1)
    world.device.segment_path(number).write_bytes(content)
    assert world.reopen().device.list_segments() == []


def test_missing_segment_with_data_refuses_the_volume_and_no_other(world: World) -> None:
    for name in ("web", "other"):
        world.pool.create_volume(name, GIB)
        volume = world.pool.open_volume(name)
        world.engine_volume(volume.uuid).write()
        world.pool.release_volume(volume)
    number = world.pool.catalog.segments(world.pool.catalog.volume("web").uuid)[0]["number"]
    world.device.remove_segment(number)
    with pytest.raises(DamagedError, match=f"fast/web.*{number}"):
        world.reopen().open_volume("web")
    world.pool.open_volume("other")


def test_remove_takes_the_files_and_the_staging(world: World) -> None:
    row = world.pool.create_volume("web", GIB)
    volume = world.pool.open_volume("web")
    world.engine_volume(volume.uuid).write()
    with pytest.raises(BusyError, match="fast/web is attached"):
        world.pool.remove_volume("web")
    world.pool.release_volume(volume)
    world.device.make_segment(row.uuid.bytes, 1)
    staged = world.staging / str(world.pool.uuid) / str(row.uuid)
    staged.parent.mkdir(parents=True)
    staged.write_bytes(b"x")
    world.pool.remove_volume("web")
    assert world.pool.device.list_segments() == []
    assert not staged.exists()
    with pytest.raises(NotFoundError):
        world.pool.open_volume("web")


def test_interrupted_removal_is_finished_at_the_next_open(world: World) -> None:
    row = world.pool.create_volume("web", GIB)
    volume = world.pool.open_volume("web")
    world.engine_volume(volume.uuid).write()
    world.pool.release_volume(volume)
    world.pool.catalog.begin_removal(row.uuid)
    world.crash()
    world.pool = world.open()
    assert world.pool.device.list_segments() == []
    assert world.pool.catalog.volumes() == []


def test_grow_of_an_attached_volume_reaches_the_engine_and_the_catalog(world: World) -> None:
    world.pool.create_volume("web", GIB)
    volume = world.pool.open_volume("web")
    assert world.pool.resize_volume("web", 2 * GIB).size_bytes == 2 * GIB
    assert world.engine_volume(volume.uuid).size_bytes == 2 * GIB
    assert volume.row.size_bytes == 2 * GIB


def test_grow_that_the_engine_refuses_is_taken_back(world: World) -> None:
    world.pool.create_volume("web", GIB)
    volume = world.pool.open_volume("web")
    world.engine_volume(volume.uuid).fail_next = DeviceError("refused")
    with pytest.raises(DeviceError):
        world.pool.resize_volume("web", 2 * GIB)
    assert world.pool.catalog.volume("web").size_bytes == GIB


def test_shrink_is_refused_unless_forced_and_detached(world: World) -> None:
    row = world.pool.create_volume("web", 3 * GIB)
    volume = world.pool.open_volume("web")
    with pytest.raises(UsageError, match="--force"):
        world.pool.resize_volume("web", GIB)
    with pytest.raises(BusyError, match="detach"):
        world.pool.resize_volume("web", GIB, allow_shrink=True)
    world.pool.release_volume(volume)
    assert world.pool.resize_volume("web", GIB, allow_shrink=True).size_bytes == GIB
    calls = world.engine_volume(row.uuid).calls
    assert calls[:3] == [
        ("write_zeroes", GIB, GIB),
        ("write_zeroes", 2 * GIB, GIB),
        ("flush",),
    ]


def test_rename_keeps_the_volume(world: World) -> None:
    row = world.pool.create_volume("web", GIB)
    volume = world.pool.open_volume("web")
    renamed = world.pool.rename_volume("web", "www")
    assert (renamed.uuid, renamed.serial) == (row.uuid, row.serial)
    assert volume.name == "fast/www"
    world.pool.release_volume(volume)
    assert world.reopen().open_volume("www").uuid == row.uuid


def test_destroy_refuses_volumes_unless_forced_and_removes_only_its_own(world: World) -> None:
    world.pool.create_volume("web", GIB)
    (world.path / "notes.txt").write_text("mine")
    volume = world.pool.open_volume("web")
    with pytest.raises(BusyError, match="attached"):
        world.pool.destroy(force=True)
    world.pool.release_volume(volume)
    with pytest.raises(BusyError, match="--force"):
        world.pool.destroy()
    world.pool.destroy(force=True)
    assert [p.name for p in world.path.iterdir()] == ["notes.txt"]


def test_close_of_a_pool_goes_on_when_one_volume_fails(world: World) -> None:
    for name in ("a", "b"):
        world.pool.create_volume(name, GIB)
    first, second = world.pool.open_volume("a"), world.pool.open_volume("b")
    for volume in (first, second):
        world.engine_volume(volume.uuid).write()
    world.engine_volume(first.uuid).fail_next = DeviceError("the device failed")
    errors = world.pool.close()
    assert [str(error) for error in errors] == ["the device failed"]
    world.pool = world.open()
    assert world.pool.catalog.checkpoint(second.uuid).mapped_blocks == 1
    assert world.pool.catalog.checkpoint(first.uuid).mapped_blocks == 0


def test_info_adds_up(world: World) -> None:
    world.pool.create_volume("a", GIB)
    world.pool.create_volume("b", 2 * GIB)
    info = world.pool.space.pool()
    assert (info["volumes"], info["provisioned_bytes"]) == (2, 3 * GIB)
    assert 0 < info["free_bytes"] <= info["total_bytes"]
