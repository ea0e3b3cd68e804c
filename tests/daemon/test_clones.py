"""A golden image and the many clones of it that a host starts its guests from."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.daemon.conftest import Host
from vhostd.errors import BusyError
from vhostd.virtqueue.block import BlockDevice

MIB = 1 << 20
COUNT = 1000
IMAGE_BYTES = 32 * MIB
ATTACHED = 8
# Each says in a segment of its own that it is there, or it would go with the catalog: a header, a
# record with a note, a footer.
CLONE_BYTES = 32 << 10


def content(at: int) -> bytes:
    return bytes([1 + at // MIB]) * MIB


def device_bytes(device: Path) -> int:
    """As `du` tells."""
    return sum(path.stat().st_blocks * 512 for path in device.rglob("*") if path.is_file())


@pytest.mark.timeout(600)
def test_thousand_clones_of_one_image_share_its_space(host: Host) -> None:
    host.serve()
    device = host.pool()
    host.ctl("volume", "create", "fast/golden", "--size", "1G")
    with BlockDevice(host.json("attach", "fast/golden")["socket"]) as disk:
        for at in range(0, IMAGE_BYTES, MIB):
            disk.write(at, content(at))
    host.ctl("detach", "fast/golden")
    host.ctl("snapshot", "create", "fast/golden@v1")
    segments = device / "segments"
    image_bytes = device_bytes(segments)
    assert image_bytes >= IMAGE_BYTES

    slowest_s = 0.0
    with host.client() as client:
        began_s = time.monotonic()
        for number in range(COUNT):
            started_s = time.monotonic()
            client.call("volume.clone", snapshot="fast/golden@v1", volume=f"fast/web{number}")
            slowest_s = max(slowest_s, time.monotonic() - started_s)
        took_s = time.monotonic() - began_s
    more_bytes = device_bytes(segments) - image_bytes
    print(
        f"{COUNT} clones in {took_s:.1f} s ({1000 * took_s / COUNT:.1f} ms each, the slowest "
        f"{1000 * slowest_s:.0f} ms); {more_bytes / COUNT / 1024:.1f} KiB each on the device"
    )
    # Together less than one copy of this small image; a copy each would be a thousand.
    assert more_bytes <= COUNT * CLONE_BYTES

    chosen = [f"fast/web{number}" for number in range(0, COUNT, COUNT // ATTACHED)][:ATTACHED]
    disks = [BlockDevice(host.json("attach", name)["socket"]) for name in chosen]
    try:
        for index, disk in enumerate(disks):
            disk.write(index * MIB, b"\xee" * 4096)
        for index, disk in enumerate(disks):
            for at in range(0, IMAGE_BYTES, 5 * MIB):
                if at != index * MIB:
                    assert disk.read(at, MIB) == content(at)
            assert disk.read(index * MIB, 8192) == b"\xee" * 4096 + content(index * MIB)[:4096]
    finally:
        for disk in disks:
            disk.close()
    for name in chosen:
        host.ctl("detach", name)
    # What each wrote is its own.
    assert device_bytes(segments) - image_bytes < COUNT * CLONE_BYTES + ATTACHED * MIB

    children = host.json("volume", "children", "fast/golden@v1")
    assert sorted(child["name"] for child in children) == sorted(
        f"fast/web{number}" for number in range(COUNT)
    )
    assert len(host.json("snapshot", "info", "fast/golden@v1")["clones"]) == COUNT
    for words in (
        ("snapshot", "remove", "fast/golden@v1"),
        ("volume", "remove", "fast/golden", "--snapshots"),
    ):
        refusal = host.refused(BusyError.exit_code, *words)
        assert "fast/web0" in refusal
        assert "more" in refusal
        assert len(refusal) < 1000
