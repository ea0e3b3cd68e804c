"""A whole Debian on a volume: boots from it, works on it, and finds everything again."""

from __future__ import annotations

import pytest

from .conftest import BackendFactory, VmFactory
from .harness import DEBIAN, image_dir

BACKENDS = pytest.mark.parametrize(
    "kind", ["daemon", pytest.param("qsd", marks=[pytest.mark.qsd, pytest.mark.long])]
)


def check_tree(
    kind: str, folders: str, least_mib: int, backend_factory: BackendFactory, vm_factory: VmFactory
) -> None:
    """Packs and unpacks `folders` of the guest's own /usr and looks at it after a reboot."""
    backend = backend_factory(kind, image=image_dir(DEBIAN.image) / "disk.raw")
    vm = vm_factory([backend], guest=DEBIAN)
    assert vm.output("findmnt -n -o SOURCE /") == "/dev/vda1"
    vm.run(
        f"cd /usr && tar -cf /root/tree.tar {folders} && mkdir /root/tree"
        " && tar -C /root/tree -xf /root/tree.tar && sync",
        limit_s=600,
    )
    assert int(vm.output("du -sm /root/tree | cut -f1")) >= least_mib
    vm.run(
        "cd /root/tree && find . -type f -print0 | sort -z | xargs -0 sha256sum >/root/tree.sums",
        limit_s=600,
    )
    # The copy equals its source, which came with the image and was never written by this guest.
    vm.run("cd /usr && sha256sum --quiet -c /root/tree.sums", limit_s=600)
    expected = vm.output("sha256sum </root/tree.sums")
    boot = vm.agent.boot_id

    vm.reboot()
    assert vm.agent.boot_id != boot
    assert vm.output("sha256sum </root/tree.sums") == expected
    vm.run("cd /root/tree && sha256sum --quiet -c /root/tree.sums", limit_s=600)
    assert vm.output("dmesg --level=err,crit,alert,emerg | grep -E 'vda|EXT4' || true") == ""
    vm.power_off()

    backend.stop()
    backend.start()
    vm = vm_factory([backend])
    vm.run("e2fsck -f -n /dev/vda1", limit_s=300)


@BACKENDS
@pytest.mark.timeout(600)
def test_debian_boots_from_a_volume_and_keeps_a_tree_of_files(
    kind: str, backend_factory: BackendFactory, vm_factory: VmFactory
) -> None:
    check_tree(kind, "bin share/perl share/zoneinfo", 30, backend_factory, vm_factory)


@BACKENDS
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_debian_keeps_a_tree_of_200_mib(
    kind: str, backend_factory: BackendFactory, vm_factory: VmFactory
) -> None:
    check_tree(kind, ".", 200, backend_factory, vm_factory)
