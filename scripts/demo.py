#!/usr/bin/env python3
"""The demo: a guest whose disk is a vhostd volume writes a file, powers off, and finds it again.

Uses the programs as a user would (`vhostd serve`, `vhostctl`), and the tests' harness for QEMU.
Leaves everything in one directory, which the next demo replaces.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.qemu.harness import (
    DEBIAN,
    TEST_GUEST,
    Backend,
    DaemonBackend,
    HarnessError,
    QsdBackend,
    VhostdBackend,
    Vm,
    image_dir,
    vhostd_program,
)
from tests.qemu.harness.vm import Disk

MESSAGE = "written by the guest, kept by the volume"


def step(text: str) -> None:
    print(f"\n==> {text}", flush=True)


def show(vm: Vm, command: str) -> None:
    """Runs a command in the guest and shows it as a terminal would."""
    print(f"guest# {command}", flush=True)
    output = vm.output(command, limit_s=120)
    if output:
        print(output, flush=True)


def boot(vm: Vm) -> None:
    step(f"Booting {vm.guest.image} under QEMU (emulated; the console goes to")
    print(f"    {vm.serial_log_path})", flush=True)
    vm.start()


def make_backend(directory: Path, *, quick: bool, peer: bool) -> Backend:
    image = None if quick else image_dir(DEBIAN.image) / "disk.raw"
    size_bytes = image.stat().st_size if image else 1 << 30
    if peer:
        return QsdBackend(directory, size_bytes=size_bytes, image=image)
    if image:
        return DaemonBackend(directory, image=image)
    return VhostdBackend(directory, size_bytes=size_bytes)


def demonstrate(directory: Path, *, quick: bool, peer: bool) -> None:
    guest = TEST_GUEST if quick else DEBIAN
    step("Preparing the guest's image (cached after the first time)")
    print(f"    {image_dir(guest.image)}")
    backend = make_backend(directory, quick=quick, peer=peer)
    step(f"Starting the back-end and making its volume, in {directory}")
    backend.start()
    vm = Vm(directory / "vm", guest, [Disk.of(backend)])
    try:
        boot(vm)
        show(vm, "uname -sr; lsblk -o NAME,SIZE,MOUNTPOINTS")
        if quick:
            show(vm, "mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        file = "/mnt/hello" if quick else "/root/hello"
        show(vm, f"echo '{MESSAGE}' > {file}; sync; ls -l {file}")
        step("Powering the guest off, and stopping and starting the back-end")
        vm.power_off()
        backend.stop()
        backend.start()
        boot(vm)
        if quick:
            show(vm, "mount /dev/vda /mnt")
        show(vm, f"cat {file}")
        show(vm, f"grep -qx '{MESSAGE}' {file} && echo 'the same as written'")
        vm.power_off()
    except BaseException:
        vm.kill()
        backend.kill()
        raise
    backend.stop()
    tell(backend, vm)


def tell(backend: Backend, vm: Vm) -> None:
    """What was shown, and how to go on by hand."""
    used_mib = backend.allocated_bytes() / (1 << 20)
    size_mib = backend.size_bytes / (1 << 20)
    step("Done: the file outlived the guest and the daemon.")
    print(f"    The volume of {size_mib:,.0f} MiB takes {used_mib:,.0f} MiB on this disk.")
    if isinstance(backend, DaemonBackend):
        serve = [vhostd_program(), "serve", "--config", backend.config]
        print("\nTo go on by hand, start the daemon again (it offers the volume at once):\n")
        print(f"    {words(serve)}")
        print("\nand see what it has:\n")
        print(f"    export VHOSTD_SOCKET={backend.control_socket}")
        print(f"    {vhostd_program('vhostctl')} volume list")
    elif isinstance(backend, VhostdBackend):
        serve = [vhostd_program(), "disk", backend.store, "--socket", backend.socket_path]
        print(f"\nTo go on by hand, serve the disk again:\n\n    {words(serve)}")
    print("\nThen boot a guest from it (Ctrl-A X ends QEMU; -accel kvm where there is KVM):\n")
    print("    " + " \\\n      ".join(vm.by_hand()))
    print(f"\nNext: README.md. To remove all of this: rm -r {backend.socket_path.parent}")


def words(command: list[Path | str | None]) -> str:
    return shlex.join(str(word) for word in command)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a small guest and an empty disk instead of Debian"
    )
    parser.add_argument(
        "--peer", action="store_true", help="qemu-storage-daemon in the place of vhostd"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        # Not under the checkout: socket paths end at 107 bytes.
        default=Path(tempfile.gettempdir()) / f"vhostd-demo-{os.getuid()}",
        help="where everything is kept; emptied first if it is of an earlier demo",
    )
    arguments = parser.parse_args()
    directory: Path = arguments.directory.resolve()
    mark = directory / ".vhostd-demo"
    if directory.exists() and any(directory.iterdir()):
        if not mark.exists():
            print(f"demo: {directory} is in use by something else; choose another --directory")
            return 2
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        demonstrate(directory, quick=arguments.quick, peer=arguments.peer)
    except HarnessError as error:
        print(f"\ndemo: {error}\n\ndemo: everything is left in {directory}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
