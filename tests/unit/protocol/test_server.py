"""The socket of an export: who may connect, how often, and what stays behind."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.protocol.frontend import FakeDevice, FrontEnd, run_async
from vhostd.errors import BusyError, ExistsError, NotFoundError, UnavailableError, UsageError
from vhostd.protocol.messages import Config, Request, VringState
from vhostd.protocol.server import CONNECTS_BURST, ExportServer
from vhostd.protocol.session import EndKind, SessionEnd, SessionInfo


class Watcher:
    """Records what a server reports, and can be waited for."""

    def __init__(self) -> None:
        self.started: list[SessionInfo] = []
        self.ended: list[SessionEnd] = []
        self.devices: list[FakeDevice] = []
        self._changed = asyncio.Event()

    def open_device(self) -> FakeDevice:
        self.devices.append(FakeDevice())
        return self.devices[-1]

    def on_start(self, info: SessionInfo) -> None:
        self.started.append(info)
        self._changed.set()

    def on_end(self, _info: SessionInfo, end: SessionEnd) -> None:
        self.ended.append(end)
        self._changed.set()

    async def ends(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.ended) < count:
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def serving(path: Path, **kwargs: Any) -> AsyncIterator[tuple[ExportServer, Watcher]]:
    watcher = Watcher()
    kwargs.setdefault("open_device", watcher.open_device)
    server = ExportServer(
        path,
        name="pool/volume",
        queues=4,
        on_session_start=watcher.on_start,
        on_session_end=watcher.on_end,
        **kwargs,
    )
    await server.start()
    try:
        yield server, watcher
    finally:
        await server.stop()
        assert all(device.closed for device in watcher.devices)


async def connect(path: Path) -> FrontEnd:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, str(path))
    return FrontEnd(sock)


@run_async
async def test_a_front_end_is_served_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    async with serving(path) as (server, watcher):
        assert server.session() is None
        front = await connect(path)
        await front.negotiate()
        info = server.session()
        assert info is not None
        assert (info.peer.pid, info.peer.uid) == (os.getpid(), os.getuid())
        assert info.name == "pool/volume"
        front.socket.close()
        await watcher.ends(1)
        assert server.session() is None
    assert [end.kind for end in watcher.ended] == [EndKind.PEER_CLOSED]
    assert len(watcher.started) == 1


@run_async
async def test_stop_removes_the_socket_and_ends_the_session(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    async with serving(path) as (server, watcher):
        front = await connect(path)
        await front.running()
        await server.stop("the export is being removed")
        assert not path.exists()
        assert watcher.ended == [SessionEnd(EndKind.STOPPED, "the export is being removed")]
        with pytest.raises(EOFError):
            await front.reply()
        front.socket.close()


@run_async
async def test_stop_leaves_another_processes_socket_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    async with serving(path) as (server, _):
        path.unlink()
        path.write_text("someone else's")
        await server.stop()
        assert path.read_text() == "someone else's"


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
@run_async
async def test_the_socket_has_the_mode_and_group_asked_for(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "disk.sock"
    old = os.umask(0o077)
    try:
        async with serving(path, mode=mode, group=os.getgid(), owner=os.getuid()):
            assert stat.S_IMODE(path.stat().st_mode) == mode
            assert path.stat().st_gid == os.getgid()
    finally:
        os.umask(old)


@run_async
async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(path):
        front = await connect(path)
        assert await front.get(Request.GET_QUEUE_NUM) == 4
        front.socket.close()


@run_async
async def test_a_socket_that_is_listened_on_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(1)
        with pytest.raises(BusyError, match="in use by another process"):
            async with serving(path):
                pass
    assert path.exists()


@run_async
async def test_a_path_that_cannot_be_a_socket_is_refused(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("data")
    with pytest.raises(ExistsError, match="not a socket"):
        async with serving(taken):
            pass
    assert taken.read_text() == "data"
    with pytest.raises(UsageError, match="at most 107"):
        async with serving(tmp_path / ("x" * 120)):
            pass
    with pytest.raises(NotFoundError, match="directory does not exist"):
        async with serving(tmp_path / "absent" / "disk.sock"):
            pass
    with pytest.raises(UsageError, match="no-such-group"):
        async with serving(tmp_path / "disk.sock", group="no-such-group"):
            pass
    assert not (tmp_path / "disk.sock").exists()


@run_async
async def test_a_second_front_end_is_turned_away_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    async with serving(path) as (_, watcher):
        first = await connect(path)
        await first.running()
        second = await connect(path)
        with pytest.raises(EOFError):
            await second.reply()
        second.socket.close()
        assert await first.get(Request.GET_QUEUE_NUM) == 4
        first.socket.close()
        await watcher.ends(1)
    assert len(watcher.devices) == 1


@run_async
async def test_a_front_end_that_reconnects_replaces_its_dead_session(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    release = asyncio.Event()
    blocked = asyncio.Event()

    async def call(function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(function, "__name__", "") == "stop_queue":
            blocked.set()
            await release.wait()
        return function(*args, **kwargs)

    async with serving(path, call=call) as (_, watcher):
        first = await connect(path)
        await first.running()
        await first.send(Request.GET_VRING_BASE, VringState(0, 0).encode())
        await blocked.wait()
        first.socket.close()
        second = await connect(path)
        answer = asyncio.create_task(second.get(Request.GET_QUEUE_NUM))
        await asyncio.sleep(0)
        assert len(watcher.devices) == 1, "never two engine exports at once"
        release.set()
        assert await answer == 4
        assert watcher.ended[0].kind is EndKind.PEER_LOST
        assert watcher.devices[0].closed
        second.socket.close()


@run_async
async def test_endless_connects_are_paced_and_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    count = CONNECTS_BURST + 5
    async with serving(path) as (_, watcher):
        begin_s = time.monotonic()
        for number in range(count):
            front = await connect(path)
            front.socket.close()
            await watcher.ends(number + 1)
        took_s = time.monotonic() - begin_s
    # The server waits for its turn before it accepts: 5 beyond the burst, 10 a second.
    assert took_s >= 0.4
    assert len(watcher.ended) == count


@run_async
async def test_a_device_that_cannot_be_opened_costs_the_connection_only(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    outcomes: list[FakeDevice | Exception] = [UnavailableError("volume is failed"), FakeDevice()]

    def open_device() -> FakeDevice:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async with serving(path, open_device=open_device):
        front = await connect(path)
        with pytest.raises(EOFError):
            await front.reply()
        front.socket.close()
        front = await connect(path)
        assert await front.get(Request.GET_QUEUE_NUM) == 4
        front.socket.close()


@run_async
async def test_writeback_off_is_kept_for_the_front_end_that_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"
    async with serving(path) as (server, watcher):
        front = await connect(path)
        await front.negotiate()
        await front.do(Request.SET_CONFIG, Config(32, 0, b"\0").encode())
        assert server.write_cache is False
        await server.end_session("a test asks for it")
        front.socket.close()
        front = await connect(path)
        await front.negotiate()
        assert watcher.devices[-1].write_cache is False
        front.socket.close()
        await watcher.ends(2)


@run_async
async def test_a_callback_that_fails_does_not_end_the_export(tmp_path: Path) -> None:
    path = tmp_path / "disk.sock"

    def broken(_info: SessionInfo) -> None:
        raise RuntimeError("a defect of the daemon")

    device = FakeDevice()
    server = ExportServer(
        path,
        name="pool/volume",
        open_device=lambda: device,
        queues=4,
        on_session_start=broken,
    )
    await server.start()
    front = await connect(path)
    assert await front.get(Request.GET_QUEUE_NUM) == 4
    front.socket.close()
    await server.stop()
    assert device.closed
