"""The daemon over an engine that does no I/O: events, restarts, what it refuses."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.unit.storage.fake_engine import FakeDevice, FakeEngine, format_device
from vhostd import events
from vhostd.config import Config, EngineConfig
from vhostd.daemon import Daemon
from vhostd.errors import BusyError, DeviceError, NotFoundError, UnavailableError
from vhostd.storage.names import VolumeName
from vhostd.storage.pool import GRANT_SEGMENTS

MIB = 1 << 20
WEB = VolumeName("fast", "web")


class World:
    """A state directory, and the daemons that use it one after another."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = Config(
            state_dir=str(root / "s"),
            runtime_dir=str(root / "r"),
            checkpoint_interval_s=3600,
            engine=EngineConfig(staging_dir=str(root / "staging")),
        )
        self.device = root / "device"
        self.engine = FakeEngine()
        self.daemon: Daemon
        self.clean = False

    def run(self, body: Callable[[Daemon], Awaitable[None]]) -> None:
        """One life of a daemon."""

        async def main() -> None:
            self.engine = FakeEngine()
            self.daemon = Daemon(self.config, engine=self.engine, format_device=format_device)
            try:
                await self.daemon.start()
                async with asyncio.timeout(20):
                    await body(self.daemon)
            finally:
                self.clean = await self.daemon.stop()

        asyncio.run(main())

    async def made(self, daemon: Daemon) -> dict[str, Any]:
        """A pool with an attached volume."""
        await daemon.create_pool("fast", self.device, MIB)
        await daemon.create_volume(WEB, size_bytes=64 * MIB)
        return await daemon.attach(WEB)


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("d"))


async def until(condition: Callable[[], Any]) -> None:
    """Lets the loop run until it holds; the caller's timeout bounds it."""
    while not condition():  # noqa: ASYNC110 -- what is awaited here makes no event
        await asyncio.sleep(0)


def test_wanted_checkpoint_is_committed(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        pool = daemon.pool("fast")
        [volume] = pool.open_volumes()
        world.engine.volumes[volume.uuid].write(9)
        world.engine.tell(kind="checkpoint-wanted", volume=volume.uuid.bytes)
        await until(lambda: pool.catalog.checkpoint(volume.uuid).mapped_blocks == 9)

    world.run(body)


def test_checkpoint_wanted_during_one_is_made_after_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        [volume] = daemon.pool("fast").open_volumes()
        running, go_on = threading.Event(), threading.Event()
        calls: list[int] = []

        def slow(*, if_needed: bool = False) -> bool:
            calls.append(1)
            running.set()
            return go_on.wait(10)

        monkeypatch.setattr(volume, "checkpoint", slow)
        event = {"kind": "checkpoint-wanted", "volume": volume.uuid.bytes}
        world.engine.tell(**event)
        await asyncio.to_thread(running.wait, 10)
        world.engine.tell(**event)
        world.engine.tell(**event)
        await until(lambda: not world.engine.events)
        assert len(calls) == 1
        go_on.set()
        await until(lambda: len(calls) == 2 and not daemon._checkpointing)

    world.run(body)


def test_wanted_numbers_are_granted_by_the_catalog_first(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        pool = daemon.pool("fast")
        device = pool.device
        assert isinstance(device, FakeDevice)
        before = device.granted
        world.engine.tell(kind="segment-numbers-wanted", device=device.index)
        await until(lambda: device.granted != before)
        assert device.granted == range(before.stop, before.stop + GRANT_SEGMENTS)
        assert pool.catalog.pool().next_segment == device.granted.stop

    world.run(body)


def test_failed_checkpoint_is_logged_and_the_daemon_goes_on(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        [volume] = daemon.pool("fast").open_volumes()
        engine = world.engine.volumes[volume.uuid]
        engine.write()
        engine.fail_next = DeviceError("the disk is on fire")
        with capture_logs() as logs:
            world.engine.tell(kind="checkpoint-wanted", volume=volume.uuid.bytes)
            await until(lambda: engine.fail_next is None)
            await until(lambda: any(line.get("error") == "the disk is on fire" for line in logs))
        assert await daemon.checkpoint(None) == ["fast/web"]

    world.run(body)


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "corruption", "offset_bytes": 0, "len_bytes": 1, "segment": 1, "reason": "r"},
        {"kind": "device-failed", "device": 0, "reason": "r"},
        {"kind": "device-full", "device": 0},
        {"kind": "staging-full", "device": 0, "reason": "r"},
        {"kind": "volume-full", "device": 0, "limit_bytes": MIB},
        {"kind": "reclaim-failed", "device": 0, "reason": "r"},
        {"kind": "something-new"},
        {},
    ],
)
def test_event_that_needs_a_person_is_logged(world: World, event: dict[str, Any]) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        [volume] = daemon.pool("fast").open_volumes()
        with capture_logs() as logs:
            world.engine.tell(**{"volume": volume.uuid.bytes, **event})
            await until(lambda: logs)
        assert logs[0]["log_level"] in ("error", "warning")

    world.run(body)


def test_full_volume_is_told_of_once_with_what_to_do_and_shown_until_it_has_space(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LASTING_S", 0.0)

    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        await daemon.configure_volume(WEB, quota_bytes=8 * MIB, on_full="pause")
        [volume] = daemon.pool("fast").open_volumes()
        about = {"volume": volume.uuid.bytes, "device": 0}
        with capture_logs() as logs:
            # Between the two there was space, but not for long enough to be told of.
            world.engine.tell(kind="volume-full", limit_bytes=8 * MIB, **about)
            world.engine.tell(kind="volume-space-back", **about)
            world.engine.tell(kind="volume-full", limit_bytes=8 * MIB, **about)
            await until(lambda: not world.engine.events)
        [line] = logs
        assert "raise the quota (`vhostctl volume set`)" in line["event"]
        assert (line["volume"], line["on_full"]) == ("fast/web", "pause")
        assert (await daemon.volume_info(WEB))["status"] == "full"
        assert (await daemon.pool_info("fast"))["status"] == "ok"
        with capture_logs() as logs:
            world.engine.tell(kind="volume-space-back", **about)
            await until(lambda: logs)
        assert [line["event"] for line in logs] == ["the volume has space again"]
        assert (await daemon.volume_info(WEB))["status"] == "ok"
        with capture_logs() as logs:
            world.engine.tell(kind="volume-full", limit_bytes=2 * MIB, **about)
            await until(lambda: logs)
        assert "`vhostctl pool set`" in logs[0]["event"]

    world.run(body)


def test_full_device_is_told_of_once_for_all_its_volumes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LASTING_S", 0.0)

    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        await daemon.create_volume(VolumeName("fast", "db"), size_bytes=64 * MIB)
        await daemon.attach(VolumeName("fast", "db"))
        pool = daemon.pool("fast")
        uuids = [volume.uuid.bytes for volume in pool.open_volumes()]
        assert len(uuids) == 2

        def tell(kind: str, uuid: bytes) -> None:
            world.engine.tell(kind=kind, device=pool.device.index, volume=uuid)

        with capture_logs() as logs:
            for uuid in uuids:
                tell("device-full", uuid)
            await until(lambda: not world.engine.events)
            assert (await daemon.pool_info("fast"))["status"] == "full"
            assert (await daemon.volume_info(WEB))["status"] == "full"
            tell("device-space-back", uuids[0])
            await until(lambda: not world.engine.events)
            assert (await daemon.pool_info("fast"))["status"] == "full"
            tell("device-space-back", uuids[1])
            await until(lambda: len(logs) > 1)
            assert (await daemon.pool_info("fast"))["status"] == "ok"
        assert [line["log_level"] for line in logs] == ["error", "info"]

    world.run(body)


def test_event_of_what_is_gone_does_nothing(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        with capture_logs() as logs:
            world.engine.tell(kind="checkpoint-wanted", volume=b"x" * 16)
            world.engine.tell(kind="ring-broken", export=99, queue=0, reason="r")
            world.engine.tell(kind="segment-numbers-wanted", device=99)
            world.engine.tell(kind="volume-full", volume=b"x" * 16, device=0, limit_bytes=1)
            world.engine.tell(kind="volume-space-back", volume=b"x" * 16, device=0)
            await until(lambda: not world.engine.events)
        assert logs == []

    world.run(body)


def test_restart_restores_pools_and_attachments_on_their_sockets(world: World) -> None:
    sockets: list[str] = []

    async def first(daemon: Daemon) -> None:
        sockets.append((await world.made(daemon))["socket"])

    async def second(daemon: Daemon) -> None:
        assert [a.record.socket for a in daemon.attachments.all()] == sockets
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(sockets[0])

    world.run(first)
    assert not Path(sockets[0]).exists()
    world.run(second)


def test_stop_that_could_not_close_a_volume_says_so(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await world.made(daemon)
        [volume] = daemon.pool("fast").open_volumes()
        engine = world.engine.volumes[volume.uuid]
        engine.write()
        engine.fail_next = DeviceError("the disk is on fire")

    async def nothing(_: Daemon) -> None:
        pass

    world.run(body)
    assert not world.clean
    world.run(nothing)
    assert world.clean


def test_detached_volume_is_not_attached_again(world: World) -> None:
    async def first(daemon: Daemon) -> None:
        await world.made(daemon)
        await daemon.detach(WEB, None)
        assert daemon.pool("fast").open_volumes() == []

    async def second(daemon: Daemon) -> None:
        assert daemon.attachments.all() == []

    world.run(first)
    world.run(second)


def test_attach_that_fails_leaves_no_trace(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        await daemon.create_pool("fast", world.device, MIB)
        await daemon.create_volume(WEB, size_bytes=64 * MIB)
        with pytest.raises(NotFoundError, match="its directory does not exist"):
            await daemon.attach(WEB, socket=str(world.root / "no" / "x.sock"))
        with pytest.raises(NotFoundError, match="other does not exist"):
            await daemon.attach(VolumeName("fast", "other"))
        assert daemon.attachments.all() == []
        assert daemon.pool("fast").open_volumes() == []

    world.run(body)
    world.run(lambda daemon: _nothing_attached(daemon))


async def _nothing_attached(daemon: Daemon) -> None:
    assert daemon.attachments.all() == []


def test_pool_that_is_gone_is_reported_and_can_be_forgotten(world: World) -> None:
    async def second(daemon: Daemon) -> None:
        with pytest.raises(UnavailableError, match="is no pool"):
            daemon.pool("fast")
        [row] = await daemon.list_pools()
        assert row["device"] == str(world.device)
        [attachment] = daemon.attachments.all()
        assert "fast is not open" in (attachment.error or "")
        await daemon.close_pool("fast")
        assert daemon.attachments.all() == []

    async def third(daemon: Daemon) -> None:
        assert await daemon.list_pools() == []

    async def first(daemon: Daemon) -> None:
        await world.made(daemon)

    world.run(first)
    world.device.rename(world.root / "elsewhere")
    world.run(second)
    world.run(third)


def test_second_daemon_is_refused_and_the_first_keeps_its_lock(world: World) -> None:
    async def body(daemon: Daemon) -> None:
        other = Daemon(world.config, engine=FakeEngine(), format_device=format_device)
        for _ in range(2):
            with pytest.raises(BusyError, match="in use by the process with PID"):
                await other.start()

    world.run(body)


def test_destroy_is_forgotten_by_the_registry(world: World) -> None:
    async def first(daemon: Daemon) -> None:
        await world.made(daemon)
        with pytest.raises(BusyError, match="attached"):
            await daemon.destroy_pool("fast", force=True)
        await daemon.detach(WEB, None)
        with pytest.raises(BusyError, match="--force"):
            await daemon.destroy_pool("fast", force=False)
        await daemon.destroy_pool("fast", force=True)

    async def second(daemon: Daemon) -> None:
        assert await daemon.list_pools() == []

    world.run(first)
    assert list(world.device.iterdir()) == []
    world.run(second)


def test_closed_volume_is_committed_at_the_stop(world: World) -> None:
    async def first(daemon: Daemon) -> None:
        await world.made(daemon)
        [volume] = daemon.pool("fast").open_volumes()
        world.engine.volumes[volume.uuid].write(4)

    async def second(daemon: Daemon) -> None:
        [volume] = daemon.pool("fast").open_volumes()
        assert world.engine.volumes[volume.uuid].opened["mapped_blocks"] == 4

    world.run(first)
    world.run(second)
