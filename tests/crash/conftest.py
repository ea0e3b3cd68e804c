"""Hosts and disks for killing daemons on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.rig import PowerDisk, can_mount
from tests.daemon.conftest import Host


@pytest.fixture(scope="session")
def mountable(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether file systems can be mounted, so that a loss of power can be played truly."""
    return can_mount(tmp_path_factory.mktemp("probe"))


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    # Not tmp_path: it repeats the test's name, and a socket's path has 107 bytes.
    host = Host(tmp_path_factory.mktemp("c"))
    yield host
    host.close()


@pytest.fixture
def power_disk(host: Host, mountable: bool) -> Iterator[PowerDisk]:
    disk = PowerDisk(host.root, mountable=mountable)
    yield disk
    # A mount that a daemon has open cannot be unmounted.
    host.close()
    disk.close()
