"""A device gets full under load, the daemon dies, the power goes; then there is room again."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.rig import PowerDisk, Rig, Settings
from tests.daemon.conftest import Host

MIB = 1 << 20


@pytest.fixture
def small_disk(host: Host, mountable: bool) -> Iterator[PowerDisk]:
    if not mountable:
        pytest.skip("file systems cannot be mounted here, so none can be made full")
    disk = PowerDisk(host.root, mountable=True, size_bytes=128 * MIB)
    yield disk
    host.close()
    disk.close()


def fill(path: Path) -> Path:
    filler = path / "filler"
    status = os.statvfs(path)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize)
    return filler


@pytest.mark.parametrize("write_through", [False, True])
def test_nothing_acknowledged_is_lost_on_a_full_device_and_it_heals(
    host: Host, small_disk: PowerDisk, request: pytest.FixtureRequest, write_through: bool
) -> None:
    seed = request.config.getoption("--seed")
    print(f"--seed {seed}")
    rig = Rig(host, small_disk, Settings(checkpoint_log="4M"), random.Random(seed))
    [disk] = rig.disks
    disk.model.write_through = write_through
    rig.work(disk, budget_bytes=6 * MIB)
    filler = fill(small_disk.path)
    rig.work(disk, budget_bytes=24 * MIB, may_fail=True)
    assert disk.counts.failed > 10, disk.counts
    rig.kill()
    rig.process.wait()
    copy = small_disk.snapshot()
    rig.restart()
    rig.check_power_loss(copy)
    rig.rebase()
    filler.unlink()
    rig.work(disk, budget_bytes=6 * MIB)
    rig.kill()
    rig.process.wait()
    rig.restart()
    rig.rebase()
    rig.stop()


def test_writes_go_on_when_there_is_room_again(
    host: Host, small_disk: PowerDisk, request: pytest.FixtureRequest
) -> None:
    seed = request.config.getoption("--seed")
    print(f"--seed {seed}")
    rig = Rig(host, small_disk, Settings(checkpoint_log="4M"), random.Random(seed))
    [disk] = rig.disks
    filler = fill(small_disk.path)
    rig.work(disk, budget_bytes=12 * MIB, may_fail=True)
    assert disk.counts.failed > 10, disk.counts
    filler.unlink()
    deadline = time.monotonic() + 20
    failed = -1
    # The daemon looks for room now and then; a write that finds none fails.
    while failed != disk.counts.failed:
        assert time.monotonic() < deadline, "writes still fail though there is room"
        failed = disk.counts.failed
        rig.work(disk, budget_bytes=1 * MIB, may_fail=True)
    rig.work(disk, budget_bytes=8 * MIB)
    rig.kill()
    rig.process.wait()
    rig.restart()
    rig.rebase()
    rig.stop()
