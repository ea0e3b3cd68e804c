"""`vhostctl check`: finds what is damaged, and where it is asked to look."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.daemon.conftest import Host
from vhostd.errors import DamagedError, NotFoundError
from vhostd.virtqueue.block import BlockDevice


@pytest.fixture
def filled(host: Host) -> tuple[Host, Path]:
    """A pool with a volume that holds data, detached."""
    host.serve()
    device = host.pool()
    host.ctl("volume", "create", "fast/web1", "--size", "64M")
    with BlockDevice(host.json("attach", "fast/web1")["socket"]) as disk:
        disk.write(0, b"\xa5\x5a" * (1 << 19))
        disk.flush()
    host.ctl("detach", "fast/web1")
    return host, device


def test_sound_pool_has_no_errors_by_name_by_volume_and_by_directory(
    filled: tuple[Host, Path],
) -> None:
    host, device = filled
    for what in ("fast", "fast/web1", device):
        report = host.json("check", what, "--data")
        assert (report["errors"], report["pool"]) == (0, "fast")
        assert report["summary"]["data_blocks_read"] == 256
        assert [volume["name"] for volume in report["volumes"]] == ["web1"]
    assert "0 errors" in host.ctl("check", "fast")
    assert host.json("check", device)["summary"]["data_blocks_read"] == 0


def test_flipped_bit_is_found_and_named(filled: tuple[Host, Path]) -> None:
    host, device = filled
    pattern = b"\xa5\x5a" * 2048
    for path in device.glob("segments/*/*.seg"):
        content = bytearray(path.read_bytes())
        at = content.find(pattern)
        if at >= 0:
            content[at + 100] ^= 1
            path.write_bytes(content)
            break
    else:
        pytest.fail("the data is in no segment")
    done = host.run_program("vhostctl", "--json", "check", "fast", "--data")
    assert done.returncode == DamagedError.exit_code
    assert json.loads(done.stdout)["errors"] >= 1
    assert json.loads(done.stderr)["error"]["kind"] == "damaged"
    assert "error: volume web1" in host.run_program("vhostctl", "check", "fast", "--data").stdout


def test_what_does_not_exist_is_not_found(filled: tuple[Host, Path]) -> None:
    host, device = filled
    missing = NotFoundError.exit_code
    assert "pool slow does not exist" in host.refused(missing, "check", "slow")
    assert "other" in host.refused(missing, "check", "fast/other")
    assert "other" in host.refused(missing, "check", device, "--volume", "other")
    assert "is no device" in host.refused(missing, "check", host.root)
