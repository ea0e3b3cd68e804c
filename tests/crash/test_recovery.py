"""Starts that meet what an earlier daemon left, and ends that are cut short."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from tests.crash.rig import POOL
from tests.daemon.conftest import Host
from vhostd.virtqueue.block import BlockDevice

MIB = 1 << 20


def test_completed_writes_survive_a_start_that_died_after_it_took_its_epoch(host: Host) -> None:
    """What is staged is of the epoch before that, and must not be taken for somebody else's."""
    first = host.serve()
    device = host.pool(POOL)
    host.ctl("volume", "create", f"{POOL}/v", "--size", "64M")
    socket = host.json("attach", f"{POOL}/v")["socket"]
    with BlockDevice(socket) as disk:
        for number in range(16):
            disk.write(number * 65536, bytes([number + 1]) * 65536)
        first.kill()
    with closing(sqlite3.connect(device / "catalog.sqlite")) as catalog, catalog:
        catalog.execute("UPDATE volumes SET epoch = epoch + 2")
    host.serve()
    with BlockDevice(socket) as disk:
        for number in range(16):
            assert disk.read(number * 65536, 65536) == bytes([number + 1]) * 65536
    assert not list(host.staging.rglob("*.stale"))
