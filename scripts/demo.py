#!/usr/bin/env python3
"""The demo: a guest writes to a vhostd volume, which gets a snapshot while the guest goes on. Then
the daemon is restarted beneath it, and another guest boots from a clone of the snapshot.

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
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.qemu.harness import (
    DEBIAN,
    TEST_GUEST,
    Backend,
    DaemonBackend,
    HarnessError,
    QsdBackend,
    Vm,
    image_dir,
    vhostd_program,
)
from tests.qemu.harness.vm import Disk

MESSAGE = "written by the guest, kept by the volume"
LATER = "written after the snapshot"
CLONE = "pool/clone"


def step(text: str) -> None:
    print(f"\n==> {text}", flush=True)


def show(vm: Vm, command: str) -> None:
    """Runs a command in the guest and shows it as a terminal would."""
    print(f"{vm.name}# {command}", flush=True)
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
    return DaemonBackend(directory, size_bytes=size_bytes, image=image)


def control(backend: DaemonBackend, *command: str) -> None:
    """Runs vhostctl and shows it as a terminal would."""
    print(f"host# vhostctl {shlex.join(command)}", flush=True)
    started_s = time.monotonic()
    output = backend.control(*command).rstrip()
    print(f"{output}  ({time.monotonic() - started_s:.2f} s)" if "\n" not in output else output)


def demonstrate(directory: Path, *, quick: bool, peer: bool) -> None:
    guest = TEST_GUEST if quick else DEBIAN
    step("Preparing the guest's image (cached after the first time)")
    print(f"    {image_dir(guest.image)}")
    backend = make_backend(directory, quick=quick, peer=peer)
    step(f"Starting the back-end and making its volume, in {directory}")
    backend.start()
    vm = Vm(directory / "vm", guest, [Disk.of(backend)], name="guest")
    file = "/mnt/hello" if quick else "/root/hello"
    try:
        boot(vm)
        show(vm, "uname -sr; lsblk -o NAME,SIZE,MOUNTPOINTS")
        if quick:
            show(vm, "mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        show(vm, f"echo '{MESSAGE}' > {file}; sync; ls -l {file}")
        if isinstance(backend, DaemonBackend):
            go_on_from_snapshot(directory, backend, vm, file)
        else:
            find_again(backend, vm, file)
        vm.power_off()
    except BaseException:
        vm.kill()
        backend.kill()
        raise
    backend.stop()
    tell(backend, vm)


def find_again(backend: Backend, vm: Vm, file: str) -> None:
    """The file is there after the guest and the back-end have ended and started."""
    step("Powering the guest off, and stopping and starting the back-end")
    vm.power_off()
    backend.stop()
    backend.start()
    boot(vm)
    if vm.guest is TEST_GUEST:
        show(vm, "mount /dev/vda /mnt")
    show(vm, f"grep -x '{MESSAGE}' {file}")


def go_on_from_snapshot(directory: Path, backend: DaemonBackend, vm: Vm, file: str) -> None:
    """A snapshot of the running guest's disk, and a guest on a clone of it beside the first."""
    step("A snapshot while the guest runs; the guest goes on")
    control(backend, "snapshot", "create", f"{backend.VOLUME}@before")
    big = file.replace("hello", "big")
    show(vm, f"dd if=/dev/urandom of={big} bs=1M count=64 2>/dev/null; ls -sh {big}")
    show(vm, f"echo '{LATER}' > {file}; sync; cat {file}")
    step("A clone of what was before: writable, made at once, and it takes no space")
    control(backend, "volume", "clone", f"{backend.VOLUME}@before", CLONE)
    socket_path = backend.attach(CLONE)
    control(backend, "volume", "list")
    step("Stopping and starting the daemon; the guest runs on, and reads its disk anew")
    backend.stop()
    backend.start()
    show(vm, f"echo 3 > /proc/sys/vm/drop_caches; cat {file}")
    other = Vm(directory / "clone", vm.guest, [Disk(socket_path)], name="clone")
    try:
        step("A second guest, on the clone, while the first one runs")
        boot(other)
        if vm.guest is TEST_GUEST:
            show(other, "mount /dev/vda /mnt")
        show(other, f"grep -x '{MESSAGE}' {file}; ls {big} || echo 'not there yet'")
        show(vm, f"grep -x '{LATER}' {file}; ls -sh {big}")
        control(backend, "volume", "list")
        control(backend, "snapshot", "list")
    finally:
        # As if its power went: a clean end takes long under emulation, and shows nothing.
        other.kill()


def tell(backend: Backend, vm: Vm) -> None:
    """What was shown, and how to go on by hand."""
    used_mib = backend.allocated_bytes() / (1 << 20)
    step("Done: what was written outlived the guest and the daemon.")
    if isinstance(backend, DaemonBackend):
        size_mib = 2 * backend.size_bytes / (1 << 20)
        print(f"    Its two disks, of {size_mib:,.0f} MiB together, take {used_mib:,.0f} MiB here.")
        serve = [vhostd_program(), "serve", "--config", backend.config]
        print("\nTo go on by hand, start the daemon again (it offers both disks at once):\n")
        print(f"    {words(serve)}")
        print("\nand see what it has:\n")
        print(f"    export VHOSTD_SOCKET={backend.control_socket}")
        print(f"    {vhostd_program('vhostctl')} volume list")
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
