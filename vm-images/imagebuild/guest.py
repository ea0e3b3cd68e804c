"""test-guest: a kernel and an initramfs with busybox, file system tools and the agent.

Result: `vmlinuz`, `initramfs`, `manifest.json` (the packages it was made of).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .cache import RECIPES
from .cpio import write_tree
from .packages import (
    Programs,
    download,
    extract,
    kernel_package,
    library_packages,
    log,
    modules_with_dependencies,
)

__all__ = ["build"]

MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4", "xfs")
TOOLS = ("e2fsprogs", "xfsprogs", "util-linux", "qemu-guest-agent")
PROGRAMS = (
    "mke2fs", "e2fsck", "dumpe2fs", "tune2fs",
    "mkfs.xfs", "xfs_repair",
    "fstrim", "blkdiscard", "lsblk", "blockdev", "taskset",
    "qemu-ga",
)  # fmt: skip


def build(result: Path) -> None:
    """Builds the image in an empty directory."""
    workshop = result.parent
    kernel = kernel_package()
    log(f"downloading {kernel}, busybox and file system tools")
    packages = download(
        [kernel, "busybox-static", *library_packages(TOOLS)],
        workshop / "packages",
    )
    unpacked = workshop / "unpacked"
    extract(packages, unpacked)

    root = workshop / "root"
    for name in (
        "bin",
        "sbin",
        "lib",
        "usr/bin",
        "usr/sbin",
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "mnt",
        "etc",
    ):
        (root / name).mkdir(parents=True)
    shutil.copy(unpacked / "bin" / "busybox", root / "bin" / "busybox")
    (root / "bin" / "sh").symlink_to("busybox")
    programs = Programs(unpacked, root)
    for program in PROGRAMS:
        programs.add(program)
    for link, program in (("mkfs.ext4", "mke2fs"), ("fsck.ext4", "e2fsck")):
        (root / "sbin" / link).symlink_to(program)
    shutil.copy(unpacked / "etc" / "mke2fs.conf", root / "etc" / "mke2fs.conf")
    # mke2fs and mount tell mounted devices by it.
    (root / "etc" / "mtab").symlink_to("/proc/self/mounts")

    (module_root,) = (unpacked / "lib" / "modules").iterdir()
    folder = root / "lib" / "modules"
    folder.mkdir()
    modules = modules_with_dependencies(module_root, MODULES)
    for name, contents in modules:
        (folder / name).write_bytes(contents)
    (root / "lib" / "modules.list").write_text(
        "".join(f"/lib/modules/{name}\n" for name, _ in modules)
    )

    for source, target in (("guest-init.sh", "init"), ("agent.sh", "agent.sh")):
        shutil.copy(RECIPES / source, root / target)
        (root / target).chmod(0o755)

    shutil.copy(unpacked / "boot" / f"vmlinuz-{module_root.name}", result / "vmlinuz")
    # Not compressed: under emulation, unpacking costs more time than loading.
    with (result / "initramfs").open("wb") as output:
        write_tree(root, output)
    manifest = {"kernel": module_root.name, "packages": [path.name for path in packages]}
    (result / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
