"""vhostctl against a daemon that runs."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from tests.daemon.conftest import Host
from vhostd.errors import (
    BusyError,
    DamagedError,
    DeviceError,
    ExistsError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from vhostd.virtqueue.block import BlockDevice

MIB = 1 << 20


def test_from_nothing_to_a_disk_and_back(host: Host) -> None:
    host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    made = host.json("attach", "fast/web1")
    assert made["socket"] == str(host.run / "fast" / "web1.sock")
    with BlockDevice(made["socket"]) as disk:
        assert disk.capacity_bytes == 64 * MIB
        disk.write(MIB, b"\xa5" * 8192)
        disk.flush()
        assert disk.read(MIB - 512, 1024) == bytes(512) + b"\xa5" * 512
        [session] = host.json("sessions")
        assert (session["volume"], session["peer_pid"]) == ("fast/web1", os.getpid())
        assert "fast/web1" in host.ctl("sessions")
    arguments = host.ctl("qemu-args", "fast/web1")
    assert f"path={made['socket']}" in arguments
    assert "share=on" in arguments
    host.ctl("detach", "fast/web1")
    assert not Path(made["socket"]).exists()
    assert host.json("volume", "info", "fast/web1")["mapped_bytes"] == 8192
    host.ctl("volume", "remove", "fast/web1")
    host.ctl("pool", "destroy", "fast")
    assert host.json("pool", "list") == []
    assert list((host.root / "device-fast").iterdir()) == []


def test_pools_volumes_and_attachments_survive_a_clean_restart(host: Host) -> None:
    first = host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    socket = host.json("attach", "fast/web1")["socket"]
    with BlockDevice(socket) as disk:
        disk.write(0, b"kept" * 1024)
    assert first.stop() == 0
    assert not Path(socket).exists()
    assert not host.api.exists()
    host.serve()
    with BlockDevice(socket) as disk:
        assert disk.read(0, 4096) == b"kept" * 1024
    assert [a["socket"] for a in host.json("attachments")] == [socket]


def test_acknowledged_writes_survive_a_killed_daemon(host: Host) -> None:
    first = host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    socket = host.json("attach", "fast/web1")["socket"]
    with BlockDevice(socket) as disk:
        for number in range(32):
            disk.write(number * 65536, bytes([number + 1]) * 65536)
        first.kill()
    host.serve()
    with BlockDevice(socket) as disk:
        for number in range(32):
            assert disk.read(number * 65536, 65536) == bytes([number + 1]) * 65536


def test_second_daemon_on_the_same_state_names_the_first(host: Host) -> None:
    first = host.serve()
    done = host.run_program("vhostd", "serve", "--config", host.config)
    assert done.returncode == BusyError.exit_code
    assert f"PID {first.pid}" in done.stderr
    assert str(host.state) in done.stderr
    assert host.json("version")["daemon"]["pid"] == first.pid


def test_pool_that_another_daemon_has_open_is_refused(host: Host) -> None:
    first = host.serve()
    device = host.pool()
    done = host.run_program(
        "vhostd", "disk", device, "--socket", host.root / "d.sock", "--config", host.config
    )
    assert done.returncode == BusyError.exit_code
    assert f"PID {first.pid}" in done.stderr
    assert str(device) in done.stderr
    host.ctl("volume", "create", "fast/still-works", "--size", "1M")


def test_bad_requests_name_the_object_and_change_nothing(host: Host) -> None:
    host.serve()
    device = host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    before = host.json("volume", "list")
    usage, exists, missing = UsageError.exit_code, ExistsError.exit_code, NotFoundError.exit_code
    create = ("volume", "create")
    assert "fast/web1 exists already" in host.refused(exists, *create, "fast/web1", "--size", "1M")
    assert "not a multiple" in host.refused(usage, *create, "fast/odd", "--size", "1000")
    assert "more than one slash" in host.refused(usage, *create, "fast/a/b", "--size", "1M")
    assert "pool slow does not exist" in host.refused(missing, *create, "slow/a", "--size", "1M")
    assert "64T" in host.refused(usage, *create, "fast/huge", "--size", "65T")
    assert "holds a pool already" in host.refused(
        exists, "pool", "create", "other", "--device", device
    )
    assert "fast exists already" in host.refused(
        exists, "pool", "create", "fast", "--device", host.root / "new"
    )
    assert not (host.root / "new").exists()
    assert "a/b" in host.refused(usage, "pool", "create", "a/b", "--device", host.root / "new")
    assert "not attached" in host.refused(missing, "detach", "fast/web1")
    assert "not attached" in host.refused(missing, "qemu-args", "fast/web1")
    assert "1 volumes" in host.refused(BusyError.exit_code, "pool", "destroy", "fast")
    assert "shrinking" in host.refused(usage, "volume", "resize", "fast/web1", "1M")
    assert host.json("volume", "list") == before


def test_error_is_json_where_that_is_asked_for(host: Host) -> None:
    host.serve()
    for arguments in (
        ("--json", "volume", "info", "fast/x"),
        ("volume", "info", "fast/x", "--json"),
    ):
        error = json.loads(host.refused(NotFoundError.exit_code, *arguments))["error"]
        assert error["kind"] == "not-found"
        assert "pool fast does not exist" in error["message"]


def test_without_a_daemon_the_answer_says_what_to_start(host: Host) -> None:
    said = host.refused(UnavailableError.exit_code, "volume", "list")
    assert "vhostd serve" in said
    assert str(host.api) in said
    assert host.json("version")["daemon"] is None


def test_attachments_exclude_each_other_unless_all_only_read(host: Host) -> None:
    host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    busy = BusyError.exit_code
    writer = host.json("attach", "fast/web1")["socket"]
    other = host.root / "o.sock"
    assert writer in host.refused(busy, "attach", "fast/web1", "--socket", other)
    assert "attached" in host.refused(busy, "volume", "remove", "fast/web1")
    assert "attached" in host.refused(busy, "pool", "close", "fast")
    host.ctl("detach", "fast/web1")
    host.ctl("attach", "fast/web1", "--read-only")
    host.ctl("attach", "fast/web1", "--read-only", "--socket", other)
    assert "reading" in host.refused(busy, "attach", "fast/web1", "--socket", host.root / "p.sock")
    with BlockDevice(other) as disk:
        assert disk.read_only
        assert disk.read(0, 4096) == bytes(4096)
    host.ctl("detach", "fast/web1", "--socket", other)
    assert len(host.json("attachments")) == 1


def test_attached_volume_grows_and_keeps_its_name_on_the_socket_after_rename(host: Host) -> None:
    first = host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    socket = host.json("attach", "fast/web1")["socket"]
    host.ctl("volume", "resize", "fast/web1", "128M")
    with BlockDevice(socket) as disk:
        assert disk.capacity_bytes == 128 * MIB
        disk.write(127 * MIB, b"x" * 512)
    host.ctl("volume", "rename", "fast/web1", "www")
    assert first.stop() == 0
    host.serve()
    [attachment] = host.json("attachments")
    assert (attachment["volume"], attachment["socket"]) == ("fast/www", socket)
    with BlockDevice(socket) as disk:
        assert disk.read(127 * MIB, 512) == b"x" * 512
    host.ctl("detach", "fast/www")
    host.ctl("volume", "resize", "fast/www", "64M", "--force")
    host.ctl("volume", "resize", "fast/www", "128M")
    socket = host.json("attach", "fast/www")["socket"]
    with BlockDevice(socket) as disk:
        assert disk.read(127 * MIB, 512) == bytes(512)


def test_damaged_catalog_costs_only_its_pool(host: Host) -> None:
    first = host.serve()
    device, _ = host.pool("bad"), host.pool("good")
    host.ctl("volume", "create", "bad/a", "--size", "1M")
    host.ctl("volume", "create", "good/a", "--size", "1M")
    bad = host.json("attach", "bad/a")["socket"]
    good = host.json("attach", "good/a")["socket"]
    assert first.stop() == 0
    catalog = device / "catalog.sqlite"
    content = catalog.read_bytes()
    catalog.write_bytes(b"\xff" * len(content))
    host.serve()
    with BlockDevice(good) as disk:
        assert disk.read(0, 512) == bytes(512)
    said = host.refused(UnavailableError.exit_code, "volume", "list", "bad")
    assert "catalog.sqlite is damaged" in said
    pools = {pool["name"]: pool["error"] for pool in host.json("pool", "list")}
    assert pools["good"] is None
    assert "rebuild-catalog" in (pools["bad"] or "")
    states = {a["socket"]: a["state"] for a in host.json("attachments")}
    assert states == {bad: "failed", good: "listening"}
    catalog.write_bytes(content)
    host.ctl("pool", "open", device)
    host.ctl("detach", "bad/a")
    host.ctl("attach", "bad/a")


def test_damaged_superblock_is_named(host: Host) -> None:
    first = host.serve()
    device = host.pool()
    assert first.stop() == 0
    superblock = device / "superblock"
    content = bytearray(superblock.read_bytes())
    content[30] ^= 1
    superblock.write_bytes(content)
    host.serve()
    said = host.refused(DamagedError.exit_code, "pool", "open", device)
    assert str(superblock) in said


def test_read_only_directory_is_named(host: Host) -> None:
    if os.geteuid() == 0:
        # Root may write anywhere; a file system that is read-only for everybody is /proc.
        target, code = Path("/proc/vhostd-pool"), (DeviceError.exit_code, NotFoundError.exit_code)
    else:
        parent = host.root / "ro"
        parent.mkdir(mode=0o500)
        target, code = parent / "pool", (DeviceError.exit_code, DeviceError.exit_code)
    host.serve()
    done = host.run_program("vhostctl", "pool", "create", "fast", "--device", target)
    assert done.returncode in code
    assert str(target) in done.stderr


def test_sockets_have_the_modes_of_the_configuration(host: Host) -> None:
    with host.config.open("a") as file:
        file.write('[api]\nmode = "0660"\n[exports]\nmode = "0600"\n')
    host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/a", "--size", "1M")
    socket = host.json("attach", "fast/a")["socket"]
    assert stat.S_IMODE(host.api.stat().st_mode) == 0o660
    assert stat.S_IMODE(Path(socket).stat().st_mode) == 0o600


def test_closed_pool_can_be_opened_elsewhere_with_its_data(host: Host) -> None:
    host.serve()
    device = host.pool()
    host.ctl("volume", "create", "fast/a", "--size", "1M")
    socket = host.json("attach", "fast/a")["socket"]
    with BlockDevice(socket) as disk:
        disk.write(0, b"x" * 512)
        disk.flush()
    host.ctl("detach", "fast/a")
    host.ctl("pool", "close", "fast")
    moved = host.root / "moved"
    shutil.copytree(device, moved)
    assert host.json("pool", "open", moved)["device"] == str(moved)
    with BlockDevice(host.json("attach", "fast/a")["socket"]) as disk:
        assert disk.read(0, 512) == b"x" * 512


def test_shutdown_by_the_api_is_clean(host: Host) -> None:
    process = host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/a", "--size", "1M")
    socket = host.json("attach", "fast/a")["socket"]
    with BlockDevice(socket) as disk:
        disk.write(0, b"x" * 512)
        host.ctl("shutdown")
        assert process.wait() == 0
    host.serve()
    assert host.json("stats")["volumes"]["fast/a"]["recovered"]["clean"]


def test_checkpoint_shortens_the_next_recovery(host: Host) -> None:
    process = host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/a", "--size", "64M")
    socket = host.json("attach", "fast/a")["socket"]
    with BlockDevice(socket) as disk:
        for number in range(16):
            disk.write(number * MIB, bytes([number + 1]) * MIB)
        disk.flush()
        assert host.json("checkpoint", "fast/a") == ["fast/a"]
        assert host.json("checkpoint", "fast/a") == []
        process.kill()
    host.serve()
    assert host.json("stats")["volumes"]["fast/a"]["recovered"]["records"] == 0
    with BlockDevice(socket) as disk:
        assert disk.read(15 * MIB, 512) == bytes([16]) * 512


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_completes_pools_and_volumes(host: Host, shell: str) -> None:
    host.serve()
    host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "1M")
    assert "_VHOSTCTL_COMPLETE" in host.ctl("completion", shell)
    host.environment |= {
        "_VHOSTCTL_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": "vhostctl volume info fa",
        "COMP_CWORD": "fa" if shell == "fish" else "3",
    }
    assert "fast/web1" in host.run_program("vhostctl").stdout
