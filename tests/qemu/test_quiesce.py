"""A real guest's agent freezes its file systems around a snapshot, and thaws them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from vhostd.errors import UnavailableError
from vhostd.exports.agent import agent_socket, while_frozen

from .conftest import BackendFactory, DaemonFactory, VmFactory
from .harness import Backend, Disk, Vm

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


def guest_with_agent(vm_factory: VmFactory, backend: Backend, path: Path) -> Vm:
    vm = vm_factory(
        [backend],
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
    vm = guest_with_agent(vm_factory, backend_factory("vhostd", size_bytes=GIB), path)
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
    vm = guest_with_agent(vm_factory, backend_factory("vhostd", size_bytes=GIB), path)
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


@pytest.mark.timeout(300)
def test_file_that_was_never_synced_is_whole_in_a_quiesced_snapshot(
    vm_factory: VmFactory, daemon_factory: DaemonFactory, workshop: Path
) -> None:
    path = workshop / "qga.sock"
    daemon = daemon_factory(GIB)
    vm = guest_with_agent(vm_factory, daemon, path)
    # So that nothing is written unless it is asked for.
    vm.run("sync; echo 0 >/proc/sys/vm/dirty_writeback_centisecs; cp /bin/busybox /mnt/fresh")
    volume = daemon.VOLUME
    assert not daemon.json("snapshot", "create", f"{volume}@crash")["quiesced"]
    made = daemon.json("snapshot", "create", f"{volume}@frozen", "--quiesce", str(path))
    assert made["quiesced"]
    assert daemon.json("snapshot", "create", f"{volume}@auto", "--quiesce", "auto")["quiesced"]
    # It goes on, and what comes now is in none of them.
    vm.run("cp /bin/busybox /mnt/later && sync", limit_s=60)

    daemon.control("volume", "clone", f"{volume}@frozen", "pool/copy")
    names = [f"{volume}@frozen", f"{volume}@auto", f"{volume}@crash", "pool/copy"]
    reader = vm_factory([Disk(daemon.attach(name)) for name in names])
    for disk in ("vda", "vdb"):
        # Clean as it is, without its journal being replayed: it cannot be written to.
        assert "needs_recovery" not in reader.output(f"dumpe2fs -h /dev/{disk} 2>/dev/null")
        reader.run(f"e2fsck -f -n /dev/{disk}")
        reader.run(f"mount -t ext4 -o ro /dev/{disk} /mnt && cmp /bin/busybox /mnt/fresh")
        assert "later" not in reader.output("ls /mnt").split()
        reader.run("umount /mnt")
    # As when the power goes: what was not synced is not there. So the test above can fail.
    assert "needs_recovery" in reader.output("dumpe2fs -h /dev/vdc 2>/dev/null")
    reader.run("mount -t ext4 -o ro,noload /dev/vdc /mnt")
    assert reader.run("cmp /bin/busybox /mnt/fresh", check=False).exit_code != 0
    reader.run("umount /mnt; mount -t ext4 /dev/vdd /mnt && cmp /bin/busybox /mnt/fresh")
    reader.run("touch /mnt/new && umount /mnt && e2fsck -f -n /dev/vdd")
    vm.run("umount /mnt && e2fsck -f -n /dev/vda")
