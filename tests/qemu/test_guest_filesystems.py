"""What a guest may expect of its disk, seen from a file system on it."""

from __future__ import annotations

import pytest

from .conftest import BackendFactory, VmFactory
from .harness import Vm

GIB = 1 << 30
# qemu-storage-daemon shows that a test asks for nothing peculiar to vhostd: now and then.
PEER = pytest.param("qsd", marks=[pytest.mark.qsd, pytest.mark.long])
BACKENDS = pytest.mark.parametrize("kind", ["vhostd", PEER])
FILESYSTEMS = {
    "ext4": ("mkfs.ext4 -q -F /dev/vda", "e2fsck -f -n /dev/vda"),
    "xfs": ("mkfs.xfs -q -f /dev/vda", "xfs_repair -n /dev/vda"),
}
# Files of many sizes, made of what the guest has: its programs, and parts of them in turn.
MAKE_TREE = r"""
set -e
mkdir -p /mnt/tree
cp -a /bin /sbin /lib /mnt/tree/
i=0
while [ $i -lt 150 ]; do
    mkdir -p /mnt/tree/parts/$((i % 12))
    dd if=/bin/busybox of=/mnt/tree/parts/$((i % 12))/$i bs=$((1 + i * 37)) count=$((1 + i % 9)) \
        skip=$i 2>/dev/null
    i=$((i + 1))
done
ln -s tree/bin /mnt/link
"""
SUM_TREE = "cd /mnt && find . -type f | sort | xargs sha256sum | sha256sum"


def mount(vm: Vm, filesystem: str) -> None:
    vm.run(f"mount -t {filesystem} /dev/vda /mnt")


@BACKENDS
@pytest.mark.parametrize("filesystem", list(FILESYSTEMS))
@pytest.mark.timeout(400)
def test_a_tree_of_files_is_the_same_after_reboot_and_power_off(
    kind: str, filesystem: str, backend_factory: BackendFactory, vm_factory: VmFactory
) -> None:
    make, check = FILESYSTEMS[filesystem]
    backend = backend_factory(kind, size_bytes=GIB)
    vm = vm_factory([backend])
    vm.run(make)
    mount(vm, filesystem)
    vm.run(MAKE_TREE, limit_s=120)
    expected = vm.output(SUM_TREE, limit_s=120)
    vm.run("umount /mnt")
    vm.run(check)

    vm.reboot()
    mount(vm, filesystem)
    assert vm.output(SUM_TREE, limit_s=120) == expected
    vm.run("umount /mnt")
    vm.power_off()

    backend.stop()
    backend.start()
    vm = vm_factory([backend])
    vm.run(check)
    mount(vm, filesystem)
    assert vm.output(SUM_TREE, limit_s=120) == expected
    vm.run("umount /mnt")
    vm.power_off()


@BACKENDS
@pytest.mark.timeout(300)
def test_synced_files_survive_a_guest_that_loses_power(
    kind: str, backend_factory: BackendFactory, vm_factory: VmFactory
) -> None:
    backend = backend_factory(kind, size_bytes=GIB)
    vm = vm_factory([backend])
    vm.run("mkfs.ext4 -q -F /dev/vda")
    mount(vm, "ext4")
    vm.run("mkdir /mnt/kept && cp /bin/busybox /mnt/kept/ && sync && cp /bin/busybox /mnt/lost")
    expected = vm.output("sha256sum </bin/busybox")
    vm.kill()

    vm = vm_factory([backend])
    mount(vm, "ext4")
    assert vm.output("sha256sum </mnt/kept/busybox") == expected
    vm.run("umount /mnt")
    vm.run("e2fsck -f -n /dev/vda")


@BACKENDS
@pytest.mark.timeout(300)
def test_fstrim_gives_space_back_to_the_host(
    kind: str, backend_factory: BackendFactory, vm_factory: VmFactory
) -> None:
    backend = backend_factory(kind, size_bytes=GIB)
    vm = vm_factory([backend])
    # lazy_itable_init would go on writing in the background.
    vm.run("mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 /dev/vda")
    mount(vm, "ext4")
    vm.run("dd if=/dev/urandom of=/mnt/big bs=1M count=200 && sync", limit_s=120)
    full_bytes = backend.allocated_bytes()
    assert full_bytes >= 200 << 20
    vm.run("rm /mnt/big && sync && fstrim -v /mnt && umount /mnt && sync")
    vm.run("e2fsck -f -n /dev/vda")
    vm.power_off()
    backend.stop()
    # At least the segments with nothing left go at the end. Holes are punched in the others too, at
    # a rate of their own: how many by now depends on the machine.
    assert backend.allocated_bytes() < full_bytes - (64 << 20)

    backend.start()
    vm = vm_factory([backend])
    vm.run("blkdiscard /dev/vda && sync")
    vm.power_off()
    backend.stop()
    assert backend.allocated_bytes() < 40 << 20


@BACKENDS
@pytest.mark.timeout(300)
def test_every_queue_carries_requests_and_none_mixes_them_up(
    kind: str, backend_factory: BackendFactory, vm_factory: VmFactory
) -> None:
    queues = 4
    backend = backend_factory(kind, size_bytes=GIB, queues=queues)
    vm = vm_factory([backend], cpus=queues)
    assert vm.output("ls /sys/block/vda/mq | wc -l") == str(queues)
    # Each CPU has its own queue, and writes its own part of the disk, all at once.
    vm.run(
        r"""
        for cpu in 0 1 2 3; do
            ( taskset -c $cpu sh -c "
                dd if=/dev/urandom of=/tmp/\$0 bs=64k count=256 2>/dev/null
                dd if=/tmp/\$0 of=/dev/vda bs=64k seek=\$((\$0 * 1024)) oflag=direct 2>/dev/null
            " $cpu ) &
        done
        wait; sync""",
        limit_s=120,
    )
    for cpu in range(queues):
        vm.run(
            f"""
            dd if=/dev/vda bs=64k skip={cpu * 1024} count=256 iflag=direct 2>/dev/null >/tmp/back
            cmp /tmp/{cpu} /tmp/back""",
            limit_s=60,
        )
    interrupts = vm.output("grep 'virtio.*-req' /proc/interrupts")
    busy = [line for line in interrupts.splitlines() if sum(map(int, line.split()[1:5])) > 0]
    assert len(busy) == queues, interrupts


@pytest.mark.parametrize("kind", ["vhostd", pytest.param("qsd", marks=pytest.mark.qsd)])
@pytest.mark.timeout(200)
def test_the_device_tells_the_guest_what_it_can_do(
    kind: str, backend_factory: BackendFactory, vm_factory: VmFactory
) -> None:
    vm = vm_factory([backend_factory(kind, size_bytes=GIB)])
    queue = "/sys/block/vda/queue"
    assert vm.output("cat /sys/block/vda/size") == str(GIB // 512)
    if kind == "vhostd":  # QEMU's export has a write cache too, but leaves `wce` in its config at 0
        assert vm.output(f"cat {queue}/write_cache") == "write back"
    assert int(vm.output(f"cat {queue}/discard_max_bytes")) > 0
    assert int(vm.output(f"cat {queue}/write_zeroes_max_bytes")) > 0
    # By path, as busybox has a blkdiscard of its own that cannot write zeroes.
    vm.run("/sbin/blkdiscard /dev/vda && /sbin/blkdiscard -z -l 1M /dev/vda")
    assert vm.output("dd if=/dev/vda bs=1M count=1 2>/dev/null | tr -d '\\0' | wc -c") == "0"
