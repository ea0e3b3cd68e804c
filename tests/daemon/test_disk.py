"""`vhostd disk`: one disk in a directory."""

from __future__ import annotations

from pathlib import Path

from tests.daemon.conftest import Host
from vhostd.errors import BusyError, ExistsError, NotFoundError, UsageError
from vhostd.virtqueue.block import BlockDevice

MIB = 1 << 20


def test_first_use_makes_the_disk_and_later_ones_open_it(host: Host) -> None:
    directory, socket = host.root / "d", host.root / "d.sock"
    first = host.disk(directory, socket, "--size", "64M", "--logical-block-size", "4096")
    assert first.ready == str(socket)
    with BlockDevice(socket) as disk:
        assert (disk.capacity_bytes, disk.block_bytes) == (64 * MIB, 4096)
        disk.write(0, b"kept" * 1024)
    assert first.stop() == 0
    assert not socket.exists()
    second = host.disk(directory, socket, "--size", "64M")
    with BlockDevice(socket) as disk:
        assert disk.read(0, 4096) == b"kept" * 1024
    assert second.stop() == 0
    third = host.disk(directory, socket, "--read-only")
    with BlockDevice(socket) as disk:
        assert disk.read_only
    assert third.stop() == 0


def test_queues_offered_are_those_asked_for(host: Host) -> None:
    socket = host.root / "d.sock"
    host.disk(host.root / "d", socket, "--size", "64M", "--queues", "3")
    with BlockDevice(socket, queues=3) as disk:
        assert disk.frontend is not None
        assert disk.frontend.max_queues == 3


def refused(host: Host, code: int, directory: Path, *options: str) -> str:
    done = host.run_program(
        "vhostd",
        "disk",
        directory,
        "--socket",
        host.root / "x.sock",
        "--config",
        host.config,
        *options,
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert not (host.root / "x.sock").exists()
    return done.stderr


def test_wrong_use_names_the_object_and_the_next_step(host: Host) -> None:
    directory, usage = host.root / "d", UsageError.exit_code
    assert "--size 20G" in refused(host, usage, directory)
    assert not directory.exists()
    first = host.disk(directory, host.root / "d.sock", "--size", "64M")
    said = refused(host, BusyError.exit_code, directory)
    assert f"PID {first.pid}" in said
    assert first.stop() == 0
    said = refused(host, usage, directory, "--size", "1G")
    assert "volume resize disk/disk" in said
    assert "64M" in said
    said = refused(host, usage, directory, "--logical-block-size", "4096")
    assert "512" in said
    said = refused(host, NotFoundError.exit_code, directory, "--volume", "other")
    assert "there are: disk" in said
    (host.root / "full").mkdir()
    (host.root / "full" / "photo.jpg").touch()
    assert "photo.jpg" in refused(host, ExistsError.exit_code, host.root / "full", "--size", "1M")
    deep = host.root / "no" / "such"
    assert "does not exist" in refused(host, NotFoundError.exit_code, deep, "--size", "1M")
    long = host.root / ("x" * 120)
    done = host.run_program("vhostd", "disk", directory, "--socket", long, "--config", host.config)
    assert done.returncode == usage
    assert "107" in done.stderr


def test_refused_size_changes_nothing(host: Host) -> None:
    directory = host.root / "d"
    assert "not a multiple" in refused(host, UsageError.exit_code, directory, "--size", "1000")
    process = host.disk(directory, host.root / "d.sock", "--size", "1M")
    assert process.stop() == 0


def test_disk_is_resized_through_its_api_socket(host: Host) -> None:
    socket = host.root / "d.sock"
    process = host.disk(
        host.root / "d", socket, "--size", "64M", "--api-socket", str(host.root / "a.sock")
    )
    host.ctl("--socket", host.root / "a.sock", "volume", "resize", "disk/disk", "128M")
    with BlockDevice(socket) as disk:
        assert disk.capacity_bytes == 128 * MIB
    assert process.stop() == 0
