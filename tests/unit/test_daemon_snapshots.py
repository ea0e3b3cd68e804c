"""Snapshots, jobs and limits of the daemon, over an engine that does no I/O."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from tests.unit.storage.fake_engine import FakeDevice, FakeVolume
from tests.unit.test_daemon import MIB, WEB, World, until, world
from vhostd.daemon import Daemon
from vhostd.errors import BusyError, NoSpaceError, NotFoundError, UsageError
from vhostd.storage.names import SnapshotName, VolumeName

__all__ = ["world"]

ONE = SnapshotName("fast", "web", "one")
COPY = VolumeName("fast", "copy")


async def idle(daemon: Daemon) -> None:
    await until(lambda: all(j.state not in ("waiting", "running") for j in daemon.jobs.all()))


def test_removed_snapshot_is_freed_in_the_background(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        await daemon.snapshots.create(ONE)
        assert await daemon.snapshots.remove(WEB, ["one"]) == ["fast/web@one"]
        await idle(daemon)
        [job] = daemon.jobs.all()
        assert (job.kind, job.state) == ("release", "done")
        assert await daemon.snapshots.list_all(WEB, removing=True) == []

    world.run(body)


def test_what_was_being_freed_goes_on_after_a_restart(world: World) -> None:
    async def first(daemon: Daemon) -> None:
        await world.made(daemon)
        await daemon.snapshots.create(ONE)
        pool = daemon.pool("fast")
        pool.catalog.snapshots.begin_removal([pool.snapshots.find("web", "one").uuid])

    async def second(daemon: Daemon) -> None:
        await idle(daemon)
        assert await daemon.snapshots.list_all(WEB, removing=True) == []

    world.run(first)
    world.run(second)


def test_change_of_a_volume_waits_for_the_step_and_no_other_change_does(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        await daemon.detach(WEB, None)
        await daemon.snapshots.create(ONE)
        await daemon.snapshots.create(SnapshotName("fast", "web", "two"))
        running, go_on = threading.Event(), threading.Event()
        real = daemon.pool("fast").snapshots.release_next

        def slow(uuid: UUID) -> Any:
            running.set()
            assert go_on.wait(10)
            return real(uuid)

        monkeypatch.setattr(daemon.pool("fast").snapshots, "release_next", slow)
        await daemon.snapshots.remove(WEB, ["two"])
        await asyncio.to_thread(running.wait, 10)
        rollback = asyncio.ensure_future(daemon.snapshots.rollback(ONE))
        await daemon.create_volume(VolumeName("fast", "other"), size_bytes=MIB)
        assert not rollback.done()
        go_on.set()
        assert (await rollback)["parent"] == "fast/web@one"

    world.run(body)


def test_flatten_is_a_job_that_can_be_stopped_and_told_to_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        [volume] = daemon.pool("fast").open_volumes()
        world.engine.volumes[volume.uuid].write(8)
        await daemon.snapshots.create(ONE)
        await daemon.snapshots.clone(ONE, COPY)
        with pytest.raises(UsageError, match="no clone"):
            await daemon.snapshots.flatten(WEB)
        running, go_on = threading.Event(), threading.Event()
        real = FakeVolume.adopt

        def slow(self: FakeVolume, offset: int, length: int, /) -> int:
            running.set()
            assert go_on.wait(10)
            return real(self, offset, length)

        monkeypatch.setattr(FakeVolume, "adopt", slow)
        job = daemon.jobs.get((await daemon.snapshots.flatten(COPY))["id"])
        with pytest.raises(BusyError, match="flattened already"):
            await daemon.snapshots.flatten(COPY)
        await asyncio.to_thread(running.wait, 10)
        daemon.jobs.stop_job(job.id)
        with pytest.raises(BusyError, match="--stop"):
            await daemon.remove_volume(COPY)
        go_on.set()
        await idle(daemon)
        assert job.state == "stopped"
        job = daemon.jobs.get((await daemon.snapshots.flatten(COPY))["id"])
        await idle(daemon)
        assert (job.state, job.result, job.done_bytes) == ("done", [], 8 * 4096)
        assert (await daemon.volume_info(COPY))["origin"] is None
        with pytest.raises(NotFoundError, match="job 99"):
            daemon.jobs.get(99)

    world.run(body)


def test_snapshot_and_its_volume_are_attached_side_by_side(world: World) -> None:
    async def first(daemon: Daemon) -> None:
        await world.made(daemon)
        await daemon.snapshots.create(ONE)
        for number in range(2):
            made = await daemon.attach(ONE, socket=str(world.root / f"{number}.sock"))
            assert made["read_only"]
        with pytest.raises(BusyError, match="attached"):
            await daemon.snapshots.remove(WEB, None)
        await daemon.snapshots.rename(ONE, "uno")
        assert [a["volume"] for a in (await daemon.volume_info(WEB))["attachments"]] == ["fast/web"]

    async def second(daemon: Daemon) -> None:
        names = [a.name for a in daemon.attachments.all()]
        assert names == ["fast/web", "fast/web@uno", "fast/web@uno"]
        assert all(a.error is None for a in daemon.attachments.all())
        gone = await daemon.detach(SnapshotName("fast", "web", "uno"), None)
        assert len(gone) == 2
        await daemon.detach(WEB, None)

    world.run(first)
    world.run(second)


def test_limits_keep_what_is_reserved_for_others(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        pool = daemon.pool("fast")
        assert isinstance(pool.device, FakeDevice)
        pool.device.free_bytes = 100 * MIB
        [volume] = pool.open_volumes()
        engine = world.engine.volumes[volume.uuid]
        await daemon.create_volume(COPY, size_bytes=64 * MIB)
        await daemon.configure_volume(COPY, reservation_bytes=30 * MIB)
        assert engine.limit_bytes == engine.stats()["allocated_bytes"] + 70 * MIB
        await daemon.configure_volume(WEB, quota_bytes=50 * MIB, on_full="pause")
        assert (engine.limit_bytes, engine.pause) == (50 * MIB, True)
        with pytest.raises(NoSpaceError, match="reserv"):
            await daemon.configure_volume(COPY, reservation_bytes=200 * MIB)
        with pytest.raises(UsageError, match="quota"):
            await daemon.configure_volume(WEB, reservation_bytes=60 * MIB)
        await daemon.configure_volume(COPY, reservation_bytes=None)
        await daemon.configure_volume(WEB, quota_bytes=None)
        assert engine.limit_bytes is None

    world.run(body)


def test_pool_that_fills_up_is_warned_of_once_a_crossing(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        pool = daemon.pool("fast")
        assert isinstance(pool.device, FakeDevice)

        async def look(free_percent: int) -> list[str]:
            assert isinstance(pool.device, FakeDevice)
            pool.device.free_bytes = free_percent * (1 << 40) // 100
            with capture_logs() as logs:
                await asyncio.to_thread(daemon.space._look_at, pool)
            return [line["event"][:21] for line in logs]

        assert await look(50) == []
        assert await look(19) == ["the pool is nearly fu"]
        assert (await daemon.pool_info("fast"))["status"] == "nearly-full"
        assert await look(10) == []
        assert await look(21) == []
        assert await look(25) == ["the pool has room aga"]
        assert await look(5) == ["the pool is nearly fu"]

    world.run(body)


def test_pool_with_work_under_way_is_not_closed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        await daemon.detach(WEB, None)
        await daemon.snapshots.create(ONE)
        go_on = threading.Event()
        pool = daemon.pool("fast")
        monkeypatch.setattr(pool.snapshots, "release_next", lambda uuid: go_on.wait(10) and None)
        await daemon.snapshots.remove(WEB, ["one"])
        with pytest.raises(BusyError, match="release of volume fast/web"):
            await daemon.close_pool("fast")
        go_on.set()
        await idle(daemon)

    world.run(body)
