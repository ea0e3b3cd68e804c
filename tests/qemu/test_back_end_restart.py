"""What a running guest notices of its back-end going away and coming back: a pause."""

from __future__ import annotations

import pytest

from .conftest import BackendFactory, VmFactory
from .harness import Vm

MIB = 1 << 20
BACKENDS = pytest.mark.parametrize(
    "kind", ["vhostd", pytest.param("qsd", marks=[pytest.mark.qsd, pytest.mark.long])]
)
SUM_FIRST_32_MIB = "dd if=/dev/vda bs=1M count=32 iflag=direct 2>/dev/null | sha256sum"


def write_without_flush(vm: Vm) -> str:
    """Fills 32 MiB past the guest's page cache, flushes nothing; returns their sum."""
    vm.run("dd if=/dev/urandom of=/tmp/data bs=1M count=32 && sync")
    vm.run("dd if=/tmp/data of=/dev/vda bs=64k oflag=direct", limit_s=120)
    return vm.output("sha256sum </tmp/data")


@BACKENDS
@pytest.mark.timeout(300)
def test_a_guest_goes_on_when_its_back_end_was_restarted(
    kind: str, backend_factory: BackendFactory, vm_factory: VmFactory
) -> None:
    backend = backend_factory(kind, size_bytes=512 * MIB)
    vm = vm_factory([backend])
    vm.run("mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt && cp /bin/busybox /mnt/before && sync")
    for _ in range(2):
        backend.stop()
        # Asked for while nobody answers: completes when the back-end is there again.
        vm.run("(cp /bin/busybox /mnt/after && sync && touch /tmp/written) >/dev/null 2>&1 &")
        backend.start()
        vm.run("until [ -e /tmp/written ]; do sleep 0.1; done; rm /tmp/written", limit_s=60)
    vm.run("echo 3 >/proc/sys/vm/drop_caches; cmp /bin/busybox /mnt/before")
    vm.run("cmp /bin/busybox /mnt/after && umount /mnt && e2fsck -f -n /dev/vda")
    assert vm.run("dmesg | grep -E 'I/O error|EXT4-fs error'", check=False).output == ""


@BACKENDS
@pytest.mark.timeout(300)
def test_completed_writes_survive_the_death_of_the_back_end(
    kind: str, backend_factory: BackendFactory, vm_factory: VmFactory
) -> None:
    backend = backend_factory(kind, size_bytes=512 * MIB)
    vm = vm_factory([backend])
    expected = write_without_flush(vm)
    backend.kill()
    backend.start()
    assert vm.output(SUM_FIRST_32_MIB, limit_s=120).split() == expected.split()


@BACKENDS
@pytest.mark.timeout(300)
def test_a_back_end_may_start_after_the_guest_was_killed_in_full_flight(
    kind: str, backend_factory: BackendFactory, vm_factory: VmFactory
) -> None:
    backend = backend_factory(kind, size_bytes=512 * MIB)
    vm = vm_factory([backend])
    expected = write_without_flush(vm)
    vm.run("dd if=/dev/zero of=/dev/vda bs=64k seek=1024 count=4096 oflag=direct 2>/dev/null &")
    vm.kill()
    # The same back-end serves the next guest: nothing of the last one is left in its way.
    vm = vm_factory([backend])
    assert vm.output(SUM_FIRST_32_MIB, limit_s=120).split() == expected.split()
