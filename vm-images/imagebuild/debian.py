"""debian-rootfs: a whole Debian disk that boots from itself, by BIOS and GRUB.

Result: `disk.raw` (sparse; one MBR partition with ext4), `manifest.json`. Needs root, for
debootstrap, but neither loop devices nor mounts: the file system is made from a directory, and
GRUB's two pieces are put in their sectors here.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

from .cache import RECIPES, cache_dir
from .packages import BuildError, log, mirrors, run

__all__ = ["build"]

SUITE = "bookworm"
INCLUDE = (
    "systemd-sysv", "udev", "kmod", "initramfs-tools", "zstd", "linux-base", "ca-certificates",
    "python3-minimal", "perl", "xz-utils", "file",
)  # fmt: skip
DISK_BYTES = 3 << 30
SECTOR_BYTES = 512
PARTITION_START_BYTES = 1 << 20
LABEL = "vhostd-root"
# Speculation has no hardware to leak from under emulation, and the work-arounds cost a third.
KERNEL_ARGUMENTS = "console=tty0 console=ttyS0,115200 mitigations=off"
GRUB_MODULES = (
    "biosdisk", "part_msdos", "ext2", "normal", "configfile", "linux", "echo", "serial",
    "terminal", "boot", "gzio", "minicmd", "sleep",
)  # fmt: skip
GRUB_CONFIG = f"""\
serial --unit=0 --speed=115200
terminal_input serial console
terminal_output serial console
echo "Booting Debian from the volume"
linux /vmlinuz root=LABEL={LABEL} rw {KERNEL_ARGUMENTS}
initrd /initrd.img
boot
"""
AGENT_SERVICE = """\
[Unit]
Description=Runs commands from the host (tests)
After=local-fs.target

[Service]
ExecStart=/bin/sh /usr/local/lib/vhostd-agent.sh
Restart=always
RestartSec=1
RestartPreventExitStatus=2

[Install]
WantedBy=multi-user.target
"""
AUTOLOGIN = """\
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,38400,9600 %I vt220
"""


def build(result: Path) -> None:
    """Builds the image in an empty directory."""
    if os.geteuid() != 0:
        raise BuildError("debootstrap needs root: run 'sudo vm-images/build debian-rootfs'")
    root = result.parent / "root"
    _bootstrap(root)
    _configure(root)
    _install_kernel(root)
    run("chroot", root, "apt-get", "clean")
    shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)
    (root / "var/lib/apt/lists/partial").mkdir(parents=True)
    disk = result / "disk.raw"
    log("making the file system and the boot sectors")
    _make_disk(root, disk)
    packages = run("chroot", root, "dpkg-query", "-W", "-f", "${Package} ${Version}\\n")
    manifest = {"suite": SUITE, "packages": packages.splitlines()}
    (result / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _bootstrap(root: Path) -> None:
    packages = cache_dir() / "debs"
    packages.mkdir(parents=True, exist_ok=True)
    log(f"bootstrapping Debian {SUITE} (some minutes)")
    # Elsewhere than on this release of Debian, debootstrap knows a mirror by itself.
    mirror = [found] if (found := mirrors().get(SUITE)) else []
    run(
        "debootstrap", "--variant=minbase", f"--cache-dir={packages}",
        f"--include={','.join(INCLUDE)}", SUITE, root, *mirror,
    )  # fmt: skip


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _configure(root: Path) -> None:
    _write(root / "etc/hostname", "vhostd-guest\n")
    _write(root / "etc/hosts", "127.0.0.1 localhost vhostd-guest\n")
    _write(root / "etc/fstab", f"LABEL={LABEL} / ext4 errors=remount-ro 0 1\n")
    if security := mirrors().get(f"{SUITE}-security"):
        with (root / "etc/apt/sources.list").open("a") as sources:
            sources.write(f"deb {security} {SUITE}-security main\n")
    # The initrd needs to find one disk; everything else it would carry is only slow to unpack.
    _write(
        root / "etc/initramfs-tools/conf.d/vhostd.conf",
        "MODULES=list\nCOMPRESS=zstd\nFSTYPE=ext4\n",
    )
    _write(root / "etc/initramfs-tools/modules", "virtio_pci\nvirtio_blk\next4\n")
    shutil.copy(RECIPES / "agent.sh", root / "usr/local/lib/vhostd-agent.sh")
    units = root / "etc/systemd/system"
    _write(units / "vhostd-agent.service", AGENT_SERVICE)
    _write(units / "serial-getty@ttyS0.service.d/autologin.conf", AUTOLOGIN)
    run("chroot", root, "systemctl", "enable", "vhostd-agent.service")
    for unit in ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "fstrim.timer"):
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    # An empty password: this guest has no network, and its console belongs to who starts it.
    run("chroot", root, "passwd", "-d", "root")
    _write(root / "etc/machine-id", "uninitialized\n")


def _install_kernel(root: Path) -> None:
    log("installing its kernel")
    # Services must not start in the tree; and dpkg's syncs are for machines that lose power.
    _write(root / "usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")
    (root / "usr/sbin/policy-rc.d").chmod(0o755)
    run("chroot", root, "apt-get", "update", "-q")
    run(
        "chroot", root, "apt-get", "install", "-q", "-y", "--no-install-recommends",
        "-o", "Dpkg::Options::=--force-unsafe-io", "linux-image-cloud-amd64",
    )  # fmt: skip
    (root / "usr/sbin/policy-rc.d").unlink()
    for name in ("vmlinuz", "initrd.img"):
        if not (root / name).is_symlink():
            raise BuildError(f"the kernel's package made no link /{name} in the tree")


def _make_disk(root: Path, disk: Path) -> None:
    core = root.parent / "core.img"
    # "(,msdos1)" is a partition of the disk GRUB was itself loaded from, whatever its number.
    run(
        "grub-mkimage", "-O", "i386-pc", "-p", "(,msdos1)/boot/grub", "-o", core, *GRUB_MODULES
    )  # fmt: skip
    _write(root / "boot/grub/grub.cfg", GRUB_CONFIG)
    with disk.open("wb") as output:
        output.truncate(DISK_BYTES)
    size_kib = (DISK_BYTES - PARTITION_START_BYTES) // 1024
    run(
        "mke2fs", "-q", "-t", "ext4", "-L", LABEL, "-d", root,
        "-E", f"offset={PARTITION_START_BYTES},root_owner=0:0,lazy_itable_init=0",
        "-O", "^metadata_csum_seed,^orphan_file", "-F", disk, f"{size_kib}k",
    )  # fmt: skip
    with disk.open("r+b") as output:
        output.write(_boot_sector(Path("/usr/lib/grub/i386-pc/boot.img").read_bytes()))
        code = core.read_bytes()
        if SECTOR_BYTES + len(code) > PARTITION_START_BYTES:
            raise BuildError("GRUB's core image does not fit before the first partition")
        output.seek(SECTOR_BYTES)
        output.write(code)
    # The check of what mke2fs -d made costs a second, and a damaged image many hours.
    checked = subprocess.run(
        ["e2fsck", "-f", "-n", f"{disk}?offset={PARTITION_START_BYTES}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if checked.returncode != 0:
        raise BuildError(f"the new file system is not clean:\n{checked.stdout}")


def _boot_sector(code: bytes) -> bytes:
    """GRUB's boot sector with our partition table.

    boot.img as shipped loads the sector after itself from the disk the BIOS named, which is where
    the core image is put; so nothing in it needs patching.
    """
    sector = bytearray(code[:440])
    sector += struct.pack("<IH", 0x76686F73, 0)
    sector += struct.pack(
        "<B3sB3sII",
        0x80,  # active
        b"\xfe\xff\xff",  # cylinder/head/sector say "beyond": readers use the block numbers
        0x83,
        b"\xfe\xff\xff",
        PARTITION_START_BYTES // SECTOR_BYTES,
        (DISK_BYTES - PARTITION_START_BYTES) // SECTOR_BYTES,
    )
    sector += bytes(48)
    return bytes(sector) + b"\x55\xaa"
