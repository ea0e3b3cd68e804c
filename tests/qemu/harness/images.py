"""The guests there are to boot, and where their images lie."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .process import HarnessError

__all__ = ["DEBIAN", "REPOSITORY", "TEST_GUEST", "Guest", "image_dir"]

REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Guest:
    """How a guest is booted and ended.

    direct_kernel: it boots from the image's kernel and initramfs; else from the first disk.
    """

    image: str
    direct_kernel: bool
    reboot_command: str
    power_off_command: str
    memory_mib: int
    boot_limit_s: float


TEST_GUEST = Guest(
    image="test-guest",
    direct_kernel=True,
    reboot_command="sync; reboot -f",
    power_off_command="sync; poweroff -f",
    memory_mib=512,
    boot_limit_s=90,
)
DEBIAN = Guest(
    image="debian-rootfs",
    direct_kernel=False,
    reboot_command="systemctl reboot",
    power_off_command="systemctl poweroff",
    memory_mib=1024,
    boot_limit_s=240,
)


@cache
def image_dir(image: str) -> Path:
    """The directory of a built image; builds it if need be, which can take minutes."""
    built = subprocess.run(
        [REPOSITORY / "vm-images" / "build", image],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode != 0:
        raise HarnessError(f"the image {image} could not be built:\n{built.stderr}")
    return Path(built.stdout.strip())
