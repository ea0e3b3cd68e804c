"""A real guest's agent freezes its file systems around a snapshot, and thaws them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from vhostd.errors import UnavailableError
from vhostd.exports.agent import agent_socket, while_frozen

from .conftest import BackendFactory, VmFactory
from .harness import Vm

GIB = 1 << 30
CHANNEL = "org.qemu.guest_agent.0"
# Without udev the port has no name in /dev but its number.
START_AGENT = f"""
port=$(grep -l {CHANNEL} /sys/class/virtio-ports/*/name | cut -d/ -f5)
test -n "$port"
mkdir -p /var/run /run
qemu-ga -d -m virtio-serial -p /dev/$port -f /run/qga.pid
"""
WRITER = """
(while :; do date +%s%N >/mnt/now; cp /mnt/now /mnt/then; sync; done) >/dev/null 2>&1 &
echo $! >/run/writer
"""


def guest_with_agent(vm_factory: VmFactory, backend_factory: BackendFactory, path: Path) -> Vm:
    vm = vm_factory(
        [backend_factory("vhostd", size_bytes=GIB)],
        arguments=[
            "-device", "virtio-serial",
            "-chardev", f"socket,path={path},server=on,wait=off,id=qga0",
            "-device", f"virtserialport,chardev=qga0,name={CHANNEL}",
        ],
    )  # fmt: skip
    vm.run("mkfs.ext4 -q -F /dev/vda && mount -t ext4 /dev/vda /mnt")
    vm.run(START_AGENT)
    return vm


@pytest.mark.timeout(300)
def test_guest_writes_nothing_while_frozen_and_goes_on_afterwards(
    vm_factory: VmFactory, backend_factory: BackendFactory, workshop: Path
) -> None:
    path = workshop / "qga.sock"
    vm = guest_with_agent(vm_factory, backend_factory, path)
    vm.run(WRITER)
    seen: list[int] = []

    def completed_writes() -> int:
        # Fields of /sys/block/…/stat: the fifth counts writes.
        return int(vm.output("cat /sys/block/vda/stat").split()[4])

    def take() -> str:
        first = completed_writes()
        # A full second in which the writer, were it not frozen, would write.
        vm.run("sleep 1")
        seen.extend([first, completed_writes()])
        return "snapshot"

    taken = while_frozen(path, take, lambda _: pytest.fail("it was frozen all the time"))
    assert taken == "snapshot"
    assert seen[0] == seen[1]
    deadline = time.monotonic() + 60
    while completed_writes() == seen[1]:
        assert time.monotonic() < deadline, "the guest is still frozen"
    vm.run("kill -9 $(cat /run/writer) && while ! umount /mnt; do sleep 0.1; done", limit_s=60)
    vm.run("e2fsck -f -n /dev/vda")


@pytest.mark.timeout(300)
def test_socket_of_a_running_guest_is_found_and_a_late_snapshot_is_undone(
    vm_factory: VmFactory, backend_factory: BackendFactory, workshop: Path
) -> None:
    path = workshop / "qga.sock"
    vm = guest_with_agent(vm_factory, backend_factory, path)
    assert agent_socket(vm.pid) == path
    undone: list[str] = []

    def take() -> str:
        # Ends only when the guest is thawed: a frozen file system holds up the writer.
        vm.run("touch /mnt/file && sync", limit_s=60)
        return "late"

    with pytest.raises(UnavailableError, match="there is no snapshot"):
        while_frozen(path, take, undone.append, max_frozen_s=2)
    assert undone == ["late"]
    assert "file" in vm.output("ls /mnt").split()
