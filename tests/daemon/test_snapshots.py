"""Snapshots, clones and space, over vhostctl and the real engine."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.conftest import PROGRAMS, Host
from vhostd.errors import BusyError, NoSpaceError, NotFoundError, UsageError
from vhostd.virtqueue.block import BlockDevice
from vhostd.virtqueue.errors import RequestError

MIB = 1 << 20


def page(value: int) -> bytes:
    return bytes([value]) * 4096


def read_through(host: Host, name: str, *blocks: int) -> list[bytes]:
    """First bytes of blocks, over an attachment made for it."""
    socket = host.json("attach", name)["socket"]
    try:
        with BlockDevice(socket) as disk:
            return [disk.read(block * 4096, 4096)[:1] for block in blocks]
    finally:
        host.ctl("detach", name)


def fill(disk: BlockDevice, end: int) -> int:
    """Writes until a write fails; where that was."""
    for at in range(0, end, MIB):
        try:
            disk.write(at, b"\xa5" * MIB)
            disk.flush()
        except RequestError:
            return at
    pytest.fail(f"{end} bytes could be written")


def wait_until_freed(host: Host) -> None:
    with host.client() as client:
        deadline = time.monotonic() + 60
        while any(j["state"] in ("waiting", "running") for j in client.call("job.list")):
            assert time.monotonic() < deadline, client.call("job.list")
        assert all(j["state"] == "done" for j in client.call("job.list")), client.call("job.list")


def disk_usage_bytes(device: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in (device / "segments").rglob("*.seg"))


def sound(host: Host) -> Any:
    report = host.json("check", "fast", "--data")
    assert report["errors"] == 0, report["findings"]
    return report


def test_snapshot_of_a_running_disk_keeps_what_it_saw(host: Host) -> None:
    host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    socket = host.json("attach", "fast/web1")["socket"]
    with BlockDevice(socket) as disk:
        for block in range(16):
            disk.write(block * 4096, page(1))
        made = host.json("snapshot", "create", "fast/web1@one")
        assert made["name"] == "fast/web1@one"
        disk.write(0, page(2))
        host.ctl("snapshot", "create", "fast/web1@two")
        disk.write(4096, page(3))
        assert read_through(host, "fast/web1@one", 0, 1, 2) == [b"\1", b"\1", b"\1"]
        assert read_through(host, "fast/web1@two", 0, 1, 2) == [b"\2", b"\1", b"\1"]
        assert disk.read(0, 8192) == page(2) + page(3)
    rows = host.json("snapshot", "list", "fast/web1")
    assert [row["name"] for row in rows] == ["fast/web1@one", "fast/web1@two"]
    assert "fast/web1@two" in host.ctl("snapshot", "list")
    sound(host)


def test_snapshots_survive_a_killed_daemon_pending_or_not(host: Host) -> None:
    first = host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    socket = host.json("attach", "fast/web1")["socket"]
    with BlockDevice(socket) as disk:
        disk.write(0, page(1))
        host.ctl("snapshot", "create", "fast/web1@one")
        host.ctl("checkpoint")
        disk.write(0, page(2))
        host.ctl("snapshot", "create", "fast/web1@two")
        disk.write(0, page(3))
        first.kill()
    host.serve()
    assert read_through(host, "fast/web1@one", 0) == [b"\1"]
    assert read_through(host, "fast/web1@two", 0) == [b"\2"]
    with BlockDevice(socket) as disk:
        assert disk.read(0, 4096) == page(3)
    sound(host)


def test_rollback_gives_back_what_was_and_keeps_newer_snapshots(host: Host) -> None:
    host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    socket = host.json("attach", "fast/web1")["socket"]
    with BlockDevice(socket) as disk:
        disk.write(0, page(1) * 4)
        host.ctl("snapshot", "create", "fast/web1@one")
        disk.write(0, page(2))
        host.ctl("snapshot", "create", "fast/web1@two")
        disk.write(4096, page(3))
    busy = BusyError.exit_code
    assert "detach" in host.refused(busy, "snapshot", "rollback", "fast/web1@one", "--yes")
    host.ctl("detach", "fast/web1")
    host.ctl("snapshot", "rollback", "fast/web1@one", "--yes")
    wait_until_freed(host)
    assert read_through(host, "fast/web1", 0, 1) == [b"\1", b"\1"]
    assert read_through(host, "fast/web1@two", 0, 1) == [b"\2", b"\1"]
    sound(host)
    host.ctl("snapshot", "rollback", "fast/web1@two", "--yes")
    assert read_through(host, "fast/web1", 0, 1) == [b"\2", b"\1"]
    sound(host)


def test_removed_snapshots_give_back_just_what_they_alone_held(host: Host) -> None:
    host.serve()
    device = host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    socket = host.json("attach", "fast/web1")["socket"]
    with BlockDevice(socket) as disk:
        for round_ in range(1, 5):
            for at in range(0, 8 * MIB, 65536):
                disk.write(at, bytes([round_]) * 65536)
            host.ctl("snapshot", "create", f"fast/web1@s{round_}")
    usage = host.json("volume", "usage", "fast/web1", "--exact")
    assert [s["unique_bytes"] for s in usage["snapshots"]] == [8 * MIB] * 3 + [0]
    assert usage["live_bytes"] >= 32 * MIB
    host.ctl("snapshot", "remove", "fast/web1@s2", "fast/web1@s3")
    wait_until_freed(host)
    after = host.json("volume", "info", "fast/web1")["space"]
    assert after["live_bytes"] == usage["live_bytes"] - 16 * MIB
    assert read_through(host, "fast/web1@s1", 0, 100) == [b"\1", b"\1"]
    host.ctl("snapshot", "remove", "fast/web1", "--all")
    wait_until_freed(host)
    assert host.json("snapshot", "list", "--all") == []
    with BlockDevice(socket) as disk:
        assert disk.read(0, 65536) == b"\4" * 65536
    sound(host)
    info = host.json("volume", "info", "fast/web1")["space"]
    parts = info["live_bytes"] + info["dead_bytes"] + info["metadata_bytes"]
    assert parts == info["allocated_bytes"]
    assert host.json("pool", "info", "fast")["allocated_bytes"] == disk_usage_bytes(device)


def test_clones_share_and_flatten_ends_it(host: Host) -> None:
    host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/golden", "--size", "64M")
    socket = host.json("attach", "fast/golden")["socket"]
    with BlockDevice(socket) as disk:
        for block in range(64):
            disk.write(block * 4096, page(7))
    host.ctl("snapshot", "create", "fast/golden@v1")
    for number in range(3):
        host.ctl("volume", "clone", "fast/golden@v1", f"fast/c{number}")
    busy = BusyError.exit_code
    said = host.refused(busy, "snapshot", "remove", "fast/golden@v1")
    assert all(f"fast/c{number}" in said for number in range(3))
    clone = host.json("attach", "fast/c0")["socket"]
    with BlockDevice(clone) as disk:
        disk.write(0, page(9))
        assert disk.read(0, 8192) == page(9) + page(7)
        host.ctl("volume", "flatten", "fast/c0")
        assert disk.read(4096, 4096) == page(7)
    assert host.json("volume", "info", "fast/c0")["origin"] is None
    assert len(host.json("volume", "children", "fast/golden")) == 2
    assert read_through(host, "fast/c1", 0, 5) == [b"\7", b"\7"]
    assert read_through(host, "fast/golden@v1", 0) == [b"\7"]
    assert "no clone" in host.refused(UsageError.exit_code, "volume", "flatten", "fast/c0")
    host.ctl("volume", "remove", "fast/c1")
    host.ctl("volume", "remove", "fast/c2")
    host.ctl("detach", "fast/golden")
    host.ctl("volume", "remove", "fast/golden", "--snapshots")
    with BlockDevice(clone) as disk:
        assert disk.read(0, 8192) == page(9) + page(7)
    sound(host)


def test_clone_of_a_clone_reads_through_all_of_them(host: Host) -> None:
    host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/c0", "--size", "16M")
    for depth in range(4):
        socket = host.json("attach", f"fast/c{depth}")["socket"]
        with BlockDevice(socket) as disk:
            disk.write(depth * 4096, page(depth + 1))
        host.ctl("detach", f"fast/c{depth}")
        host.ctl("snapshot", "create", f"fast/c{depth}@s")
        host.ctl("volume", "clone", f"fast/c{depth}@s", f"fast/c{depth + 1}")
    assert read_through(host, "fast/c4", 0, 1, 2, 3, 4) == [b"\1", b"\2", b"\3", b"\4", b"\0"]
    sound(host)


def test_difference_lists_what_changed(host: Host) -> None:
    host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    socket = host.json("attach", "fast/web1")["socket"]
    with BlockDevice(socket) as disk:
        disk.write(0, page(1) * 16)
        host.ctl("snapshot", "create", "fast/web1@a")
        disk.write(3 * 4096, page(2) * 2)
        disk.discard(8 * 4096, 4096)
        host.ctl("snapshot", "create", "fast/web1@b")
        disk.write(MIB, page(3))
        disk.flush()
        found = host.json("snapshot", "diff", "fast/web1@a", "@b")
        assert found["ranges"] == [
            {"offset_bytes": 3 * 4096, "length_bytes": 8192, "type": "data"},
            {"offset_bytes": 8 * 4096, "length_bytes": 4096, "type": "zero"},
        ]
        head = host.json("snapshot", "diff", "fast/web1@b")
        assert [(r["offset_bytes"], r["type"]) for r in head["ranges"]] == [(MIB, "data")]
    assert "8K of data" in host.ctl("snapshot", "diff", "fast/web1@a", "@b")


def test_what_is_refused_says_why_and_changes_nothing(host: Host) -> None:
    host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    host.ctl("snapshot", "create", "fast/web1@a")
    before = host.json("snapshot", "list")
    busy, missing, usage = BusyError.exit_code, NotFoundError.exit_code, UsageError.exit_code
    assert "fast/web1@no does not exist" in host.refused(missing, "attach", "fast/web1@no")
    assert "names a snapshot" in host.refused(usage, "volume", "info", "fast/web1@a")
    assert "does not name a snapshot" in host.refused(usage, "snapshot", "info", "fast/web1")
    assert "--snapshots" in host.refused(busy, "volume", "remove", "fast/web1")
    host.ctl("snapshot", "protect", "fast/web1@a")
    assert "protected" in host.refused(busy, "snapshot", "remove", "fast/web1", "--all")
    host.ctl("snapshot", "unprotect", "fast/web1@a")
    host.ctl("attach", "fast/web1@a")
    assert "attached" in host.refused(busy, "snapshot", "remove", "fast/web1@a")
    host.ctl("detach", "fast/web1@a")
    assert "another pool" in host.refused(usage, "volume", "clone", "fast/web1@a", "slow/x")
    assert host.json("snapshot", "list") == before


def test_snapshot_attachment_survives_a_restart_and_refuses_writes(host: Host) -> None:
    first = host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    socket = host.json("attach", "fast/web1")["socket"]
    with BlockDevice(socket) as disk:
        disk.write(0, page(5))
    host.ctl("snapshot", "create", "fast/web1@a")
    made = host.json("attach", "fast/web1@a")
    assert made["socket"] == str(host.run / "fast" / "web1@a.sock")
    assert made["read_only"]
    assert first.stop() == 0
    host.serve()
    with BlockDevice(made["socket"]) as disk:
        assert disk.read(0, 4096) == page(5)
        with pytest.raises(RequestError):
            disk.write(0, page(6))


def test_quota_stops_a_volume_and_reservations_are_kept(host: Host) -> None:
    host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "1G")
    said = host.json("volume", "set", "fast/web1", "quota=100M", "on-full=ioerr")
    assert (said["quota_bytes"], said["on_full"]) == (100 * MIB, "ioerr")
    socket = host.json("attach", "fast/web1")["socket"]
    with BlockDevice(socket) as disk:
        written = fill(disk, 512 * MIB)
        assert 16 * MIB < written <= 100 * MIB
        host.ctl("volume", "set", "fast/web1", "quota=none")
        disk.write(written + MIB, b"\xa5" * MIB)
        disk.flush()
    no_space = NoSpaceError.exit_code
    assert "reserv" in host.refused(no_space, "volume", "set", "fast/web1", "reservation=60T")
    host.ctl("pool", "set", "fast", "quota=10G", "warn=50%")
    info = host.json("pool", "info", "fast")
    assert (info["quota_bytes"], info["warn_percent"]) == (10 << 30, 50)


def test_verbs_have_help_with_an_example() -> None:
    for words in (
        ("snapshot", "create"),
        ("snapshot", "diff"),
        ("snapshot", "remove"),
        ("snapshot", "rollback"),
        ("volume", "clone"),
        ("volume", "flatten"),
        ("volume", "set"),
        ("jobs",),
    ):
        done = subprocess.run(
            [*PROGRAMS["vhostctl"], *words, "--help"], capture_output=True, text=True, check=True
        )
        assert "Example" in done.stdout
