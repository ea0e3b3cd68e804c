"""A device without space: what is refused, what goes on, and that nothing is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.conftest import Host
from vhostd.errors import NoSpaceError
from vhostd.virtqueue.block import BlockDevice
from vhostd.virtqueue.errors import RequestError

MIB = 1 << 20


@pytest.fixture
def small(host: Host) -> Iterator[Path]:
    """A file system of 48 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    path = host.root / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(path)], check=True)
    yield path
    host.close()
    subprocess.run(["umount", str(path)], check=True)


def fill(path: Path, *, leave_bytes: int) -> Path:
    status = os.statvfs(path)
    filler = path / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave_bytes)
    return filler


def write_until_refused(disk: BlockDevice) -> int:
    """How many writes of 1 MiB were acknowledged."""
    for number in range(256):
        try:
            disk.write(number * MIB, bytes([number + 1]) * MIB)
        except RequestError:
            return number
    pytest.fail("a volume larger than its device was written wholly")


def create_until_refused(host: Host) -> tuple[int, str]:
    """How many volumes could be made, and why no more."""
    with host.client() as client:
        for number in range(10_000):
            try:
                client.call("volume.create", volume=f"fast/v{number}", size_bytes=MIB)
            except NoSpaceError as error:
                return number, str(error)
    pytest.fail("the catalog grew on a full device")


def test_pool_on_a_full_device_is_not_made_and_leaves_nothing(host: Host, small: Path) -> None:
    host.serve()
    fill(small, leave_bytes=0)
    said = host.refused(
        NoSpaceError.exit_code, "pool", "create", "fast", "--device", small / "pool"
    )
    assert str(small / "pool") in said
    assert [p.name for p in small.iterdir()] == ["filler"]


def test_guest_gets_errors_and_what_was_acknowledged_stays(host: Host, small: Path) -> None:
    process = host.serve()
    device = small / "pool"
    host.ctl("pool", "create", "fast", "--device", device, "--segment-size", "1M")
    host.ctl("volume", "create", "fast/a", "--size", "256M")
    socket = host.json("attach", "fast/a")["socket"]
    with BlockDevice(socket) as disk:
        acknowledged = write_until_refused(disk)
        assert 8 <= acknowledged <= 48
        for number in range(acknowledged):
            assert disk.read(number * MIB, 512) == bytes([number + 1]) * 512
    assert host.json("version")["daemon"]["pid"] == process.pid
    process.kill()
    host.serve()
    with BlockDevice(socket) as disk:
        for number in range(acknowledged):
            assert disk.read(number * MIB, MIB) == bytes([number + 1]) * MIB


def test_catalog_that_cannot_grow_says_so_and_stays_whole(host: Host, small: Path) -> None:
    host.serve()
    device = small / "pool"
    host.ctl("pool", "create", "fast", "--device", device)
    filler = fill(small, leave_bytes=0)
    made, refusal = create_until_refused(host)
    assert "catalog.sqlite" in refusal
    assert len(host.json("volume", "list")) == made
    filler.unlink()
    host.ctl("volume", "create", f"fast/v{made}", "--size", "1M")
    assert len(host.json("volume", "list")) == made + 1
