"""What a guest notices of a volume without space: a pause, or I/O errors, and then its end."""

from __future__ import annotations

import time

import pytest

from .conftest import DaemonFactory, VmFactory
from .harness import DaemonBackend, Vm
from .harness.process import time_limit_s

MIB = 1 << 20
QUOTA_MIB = 64
DATA_MIB = 96
MAKE_DATA = f"dd if=/dev/urandom of=/tmp/data bs=1M count={DATA_MIB} 2>/dev/null"


def wait_until_full(daemon: DaemonBackend, least_waiting: int) -> dict[str, object]:
    """Polls, as a program would: who is waited for is a guest."""
    deadline = time.monotonic() + time_limit_s(60)
    while True:
        info: dict[str, object] = daemon.json("volume", "info", daemon.VOLUME)
        if info["status"] == "full" and int(str(info["waiting_requests"])) >= least_waiting:
            return info
        assert time.monotonic() < deadline, info
        time.sleep(0.2)


def disk_errors(vm: Vm) -> str:
    return vm.run("dmesg | grep -E 'I/O error|EXT4-fs (error|warning)'", check=False).output


@pytest.mark.timeout(300)
def test_guest_of_a_full_volume_waits_until_its_quota_is_raised(
    daemon_factory: DaemonFactory, vm_factory: VmFactory
) -> None:
    daemon = daemon_factory(512 * MIB)
    daemon.control("volume", "set", daemon.VOLUME, f"quota={QUOTA_MIB}M", "on-full=pause")
    vm = vm_factory([daemon])
    vm.run("mkfs.ext4 -q -F /dev/vda && mount -t ext4 /dev/vda /mnt")
    vm.run(MAKE_DATA, limit_s=120)
    vm.run("(cp /tmp/data /mnt/data; sync; echo $? >/tmp/ended) >/tmp/copying 2>&1 &")
    info = wait_until_full(daemon, 1)
    space = info["space"]
    assert isinstance(space, dict)
    # Data is held to it; maps and notes are written beyond.
    assert space["allocated_bytes"] <= (QUOTA_MIB + 1) * MIB
    assert "requests wait" in daemon.control("volume", "info", daemon.VOLUME)
    # What it wrote is there, and reading goes on.
    vm.run("dd if=/dev/vda of=/dev/null bs=1M count=8 iflag=direct 2>/dev/null")
    assert vm.run("test -e /tmp/ended", check=False).exit_code == 1
    assert disk_errors(vm) == ""

    raised = daemon.json("volume", "set", daemon.VOLUME, f"quota={4 * QUOTA_MIB}M")
    assert raised["quota_bytes"] == 4 * QUOTA_MIB * MIB
    vm.run("until [ -e /tmp/ended ]; do sleep 0.1; done", limit_s=60)
    assert vm.output("cat /tmp/ended /tmp/copying") == "0"
    assert daemon.json("volume", "info", daemon.VOLUME)["status"] == "ok"
    vm.run("echo 3 >/proc/sys/vm/drop_caches; cmp /tmp/data /mnt/data", limit_s=60)
    vm.run("umount /mnt && e2fsck -f -n /dev/vda")
    assert disk_errors(vm) == ""


@pytest.mark.timeout(300)
def test_guest_of_a_full_volume_gets_errors_and_goes_on_when_there_is_space(
    daemon_factory: DaemonFactory, vm_factory: VmFactory
) -> None:
    daemon = daemon_factory(512 * MIB)
    daemon.control("volume", "set", daemon.VOLUME, f"quota={QUOTA_MIB}M", "on-full=ioerr")
    vm = vm_factory([daemon])
    vm.run(MAKE_DATA, limit_s=120)
    write = "dd if=/tmp/data of=/dev/vda bs=1M oflag=direct"
    refused = vm.run(write, check=False, limit_s=60)
    assert refused.exit_code == 1
    assert "error" in refused.output.lower()
    assert "I/O error" in disk_errors(vm)
    wait_until_full(daemon, 0)
    # What was written before stays.
    half = QUOTA_MIB // 2
    vm.run(f"dd if=/tmp/data of=/tmp/half bs=1M count={half} 2>/dev/null")
    vm.run(f"dd if=/dev/vda bs=1M count={half} iflag=direct 2>/dev/null | cmp - /tmp/half")

    daemon.control("volume", "set", daemon.VOLUME, "quota=none")
    vm.run(write, limit_s=60)
    vm.run(
        f"sync; dd if=/dev/vda bs=1M count={DATA_MIB} iflag=direct 2>/dev/null | cmp - /tmp/data"
    )
    assert daemon.json("volume", "info", daemon.VOLUME)["status"] == "ok"
