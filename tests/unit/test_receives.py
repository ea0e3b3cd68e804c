"""A volume that a stream is received into: who may touch it, and what a restart finds."""

from __future__ import annotations

import dataclasses
from typing import Any
from uuid import UUID

import pytest

from tests.unit.storage.fake_engine import FakeVolume
from tests.unit.test_daemon import MIB, World
from vhostd.api.methods import Methods
from vhostd.daemon import Daemon
from vhostd.errors import (
    BusyError,
    DeviceError,
    ExistsError,
    NotFoundError,
    UsageError,
)
from vhostd.receives import StreamIdentity
from vhostd.storage.names import VolumeName

NEW = VolumeName("fast", "copy")
GUID, BASE = UUID(int=7), UUID(int=6)
FULL = StreamIdentity(
    snapshot="mon",
    guid=GUID,
    from_guid=None,
    size_bytes=64 * MIB,
    logical_block_bytes=512,
    quiesced=True,
    start_bytes=0,
)
THEN = UUID(int=8)


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("d"))


def written(world: World, name: VolumeName = NEW) -> FakeVolume:
    """The engine's side of an open volume."""
    uuid = world.daemon.pool(name.pool).catalog.volume(name.volume).uuid
    return world.engine.volumes[uuid]


def only_snapshot(daemon: Daemon) -> dict[str, Any]:
    [snapshot] = daemon.pool("fast").snapshots.describe("copy")
    return snapshot


async def with_pool(world: World, daemon: Daemon) -> None:
    await daemon.create_pool("fast", world.device, MIB)


async def received(world: World, daemon: Daemon) -> StreamIdentity:
    """A volume with a snapshot that came as a stream; the increment that would follow."""
    await with_pool(world, daemon)
    await daemon.receives.begin(NEW, FULL, force=False)
    written(world).write(3)
    await daemon.receives.commit(NEW, GUID)
    return dataclasses.replace(FULL, snapshot="tue", guid=THEN, from_guid=GUID)


def test_whole_stream_makes_a_volume_with_the_senders_snapshot(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await received(world, daemon)
        snapshot = only_snapshot(daemon)
        assert (snapshot["snapshot"], snapshot["guid"]) == ("mon", str(GUID))
        assert snapshot["quiesced"]
        assert snapshot["uuid"] != str(GUID)
        info = await daemon.volume_info(NEW)
        assert (info["size_bytes"], info["receiving"], info["attachments"]) == (64 * MIB, None, [])
        # And it is a volume like any other.
        await daemon.attach(NEW)

    world.run(body)


def test_volume_that_waits_for_its_stream_is_nobody_elses(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await with_pool(world, daemon)
        begun = await daemon.receives.begin(NEW, FULL, force=False)
        await daemon.receives.note(NEW, GUID, 5 * MIB)
        await daemon.detach(NEW, begun["socket"])
        refused = r"up to byte 5242880.*--abandon fast/copy"
        with pytest.raises(BusyError, match=refused):
            await daemon.attach(NEW)
        with pytest.raises(BusyError, match=refused):
            await daemon.resize_volume(NEW, 128 * MIB, allow_shrink=False)
        with pytest.raises(BusyError, match=refused):
            await daemon.rename_volume(NEW, "other")
        info = await daemon.volume_info(NEW)
        assert info["receiving"]["applied_bytes"] == 5 * MIB

    world.run(body)


def test_resume_point_survives_a_restart_and_is_continued(world: World) -> None:
    async def first(daemon: Daemon) -> None:
        await with_pool(world, daemon)
        await daemon.receives.begin(NEW, FULL, force=False)
        written(world).write(2)
        await daemon.receives.note(NEW, GUID, 5 * MIB)

    async def second(daemon: Daemon) -> None:
        assert daemon.receives.describe(NEW) is not None
        too_far = dataclasses.replace(FULL, start_bytes=6 * MIB)
        with pytest.raises(UsageError, match="only up to byte 5242880"):
            await daemon.receives.begin(NEW, too_far, force=False)
        other = dataclasses.replace(FULL, guid=THEN)
        with pytest.raises(BusyError, match="another stream"):
            await daemon.receives.begin(NEW, other, force=False)
        rest = dataclasses.replace(FULL, start_bytes=5 * MIB)
        begun = await daemon.receives.begin(NEW, rest, force=False)
        assert (begun["resumed"], begun["applied_bytes"]) == (True, 5 * MIB)
        # One receiver at a time.
        with pytest.raises(BusyError, match="attached"):
            await daemon.receives.begin(NEW, rest, force=False)
        written(world).write(1)
        await daemon.receives.commit(NEW, GUID)
        assert only_snapshot(daemon)["guid"] == str(GUID)

    world.run(first)
    world.run(second)


def test_same_stream_from_its_beginning_keeps_the_resume_point(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await with_pool(world, daemon)
        begun = await daemon.receives.begin(NEW, FULL, force=False)
        await daemon.receives.note(NEW, GUID, 5 * MIB)
        await daemon.detach(NEW, begun["socket"])
        await daemon.receives.begin(NEW, FULL, force=False)
        await daemon.receives.note(NEW, GUID, 1 * MIB)
        info = daemon.receives.describe(NEW)
        assert info is not None
        assert info["applied_bytes"] == 5 * MIB
        with pytest.raises(UsageError, match="beyond its end"):
            await daemon.receives.note(NEW, GUID, 65 * MIB)

    world.run(body)


def test_whole_stream_needs_a_name_that_is_free(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await with_pool(world, daemon)
        await daemon.create_volume(NEW, size_bytes=MIB)
        with pytest.raises(ExistsError, match="makes a whole volume"):
            await daemon.receives.begin(NEW, FULL, force=False)
        rest = dataclasses.replace(FULL, start_bytes=MIB)
        with pytest.raises(UsageError, match="waits for none"):
            await daemon.receives.begin(VolumeName("fast", "b"), rest, force=False)
        impossible = dataclasses.replace(FULL, size_bytes=7)
        with pytest.raises(UsageError):
            await daemon.receives.begin(VolumeName("fast", "c"), impossible, force=False)
        assert daemon.receives.describe(VolumeName("fast", "c")) is None

    world.run(body)


def test_increment_follows_the_snapshot_it_begins_with(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        increment = await received(world, daemon)
        larger = dataclasses.replace(increment, size_bytes=96 * MIB)
        await daemon.receives.begin(NEW, larger, force=False)
        written(world).write(1)
        await daemon.receives.commit(NEW, THEN)
        names = [s["snapshot"] for s in daemon.pool("fast").snapshots.describe("copy")]
        assert names == ["mon", "tue"]
        assert (await daemon.volume_info(NEW))["size_bytes"] == 96 * MIB
        with pytest.raises(ExistsError, match="nothing to do"):
            await daemon.receives.begin(NEW, larger, force=False)

    world.run(body)


def test_increment_is_refused_where_it_does_not_fit(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        increment = await received(world, daemon)
        for changes, error, match in (
            ({"from_guid": BASE}, NotFoundError, "has not the snapshot"),
            ({"snapshot": "mon"}, ExistsError, "has other content"),
            ({"logical_block_bytes": 4096}, UsageError, "of another volume"),
        ):
            with pytest.raises(error, match=match):
                await daemon.receives.begin(
                    NEW,
                    dataclasses.replace(increment, **changes),
                    force=False,
                )
        attached = await daemon.attach(NEW)
        with pytest.raises(BusyError, match="is attached"):
            await daemon.receives.begin(NEW, increment, force=True)
        await daemon.detach(NEW, attached["socket"])
        assert daemon.receives.describe(NEW) is None

    world.run(body)


@pytest.mark.parametrize("how", ["written", "resized", "snapshot"])
def test_volume_that_has_changed_takes_an_increment_only_by_force(world: World, how: str) -> None:
    async def body(daemon: Daemon) -> None:
        increment = await received(world, daemon)
        pool = daemon.pool("fast")
        if how == "written":
            with pool.using("copy"):
                written(world).write(1)
        elif how == "resized":
            await daemon.resize_volume(NEW, 80 * MIB, allow_shrink=False)
        else:
            pool.snapshots.create("copy", "mine")
        with pytest.raises(BusyError, match="--force"):
            await daemon.receives.begin(NEW, increment, force=False)
        assert daemon.receives.describe(NEW) is None
        await daemon.receives.begin(NEW, increment, force=True)
        assert len(written(world).tree) == 3
        await daemon.receives.commit(NEW, THEN)
        assert pool.snapshots.find("copy", "tue").size_bytes == 64 * MIB

    world.run(body)


def test_stream_that_is_given_up_leaves_what_was_before(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        increment = await received(world, daemon)
        await daemon.receives.begin(NEW, increment, force=False)
        written(world).write(4)
        assert await daemon.receives.abandon(NEW) == {"volume": "fast/copy", "removed": False}
        with daemon.pool("fast").using("copy"):
            assert len(written(world).tree) == 3
        other = VolumeName("fast", "other")
        await daemon.receives.begin(other, FULL, force=False)
        assert (await daemon.receives.abandon(other))["removed"]
        assert [v["name"] for v in await daemon.list_volumes()] == ["fast/copy"]
        with pytest.raises(NotFoundError, match="waits for no stream"):
            await daemon.receives.abandon(other)

    world.run(body)


def test_crash_after_the_snapshot_settles_the_record(world: World) -> None:
    async def first(daemon: Daemon) -> None:
        await received(world, daemon)
        # The record is as it was before the commit.
        increment = dataclasses.replace(FULL, snapshot="mon2", guid=THEN, from_guid=GUID)
        await daemon.receives.begin(NEW, increment, force=False)
        [attachment] = daemon.attachments.of("fast", "copy")
        await daemon.detach(NEW, attachment.record.socket)
        daemon.pool("fast").snapshots.create("copy", "mon2", guid=THEN)

    async def second(daemon: Daemon) -> None:
        assert daemon.receives.describe(NEW) is None
        await daemon.attach(NEW)

    world.run(first)
    world.run(second)


def test_removed_volume_waits_for_nothing(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await with_pool(world, daemon)
        begun = await daemon.receives.begin(NEW, FULL, force=False)
        await daemon.detach(NEW, begun["socket"])
        await daemon.remove_volume(NEW)
        assert daemon.receives.describe(NEW) is None

    world.run(body)


def test_snapshot_that_cannot_be_made_leaves_the_stream_to_be_completed(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await with_pool(world, daemon)
        await daemon.receives.begin(NEW, FULL, force=False)
        await daemon.receives.note(NEW, GUID, FULL.size_bytes)
        written(world).fail_snapshot = DeviceError("no luck")
        [attachment] = daemon.attachments.of("fast", "copy")
        with daemon.pool("fast").using("copy"), pytest.raises(DeviceError):
            await daemon.receives.commit(NEW, GUID)
        assert attachment not in daemon.attachments.all()
        assert daemon.receives.describe(NEW) is not None

    world.run(body)


def test_methods_take_a_stream_from_begin_to_its_snapshot(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await with_pool(world, daemon)
        call = Methods(daemon)
        header = {"guid": str(GUID), "size_bytes": 64 * MIB, "logical_block_bytes": 512}
        one = {"volume": "fast/copy"}
        await call("receive.begin", {**one, **header, "snapshot": "mon"})
        written(world).put(0)
        written(world).put(5)
        assert (await call("receive.info", one))["applied_bytes"] == 0
        await call("receive.note", {**one, "guid": str(GUID), "applied_bytes": 4096})
        assert (await call("receive.info", one))["applied_bytes"] == 4096
        made = await call("receive.commit", {**one, "guid": str(GUID)})
        assert made["name"] == "fast/copy@mon"
        with pytest.raises(NotFoundError):
            await call("receive.info", one)
        page = await call("snapshot.diff", {**one, "snapshot": "mon", "limit": 1})
        assert page == {
            "ranges": [(0, 4096, "data")],
            "next": 5 * 4096,
            "from_size_bytes": 0,
            "size_bytes": 64 * MIB,
        }
        rest = await call("snapshot.diff", {**one, "start": page["next"]})
        assert (rest["ranges"], rest["next"]) == ([(5 * 4096, 4096, "data")], None)
        same = await call("snapshot.diff", {**one, "from": "mon"})
        assert same["ranges"] == []

    world.run(body)
