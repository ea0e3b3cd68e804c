"""A running guest: QEMU, its logs, its agent.

QEMU is the client of three sockets that exist before it starts (agent, QMP, and each disk's
back-end), so nothing it says at start is missed. Emulation only (TCG), as on machines without KVM;
VHOSTD_TEST_ACCEL=kvm overrides it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .agent import Agent, CommandResult
from .backend import Backend
from .images import Guest, image_dir
from .process import HarnessError, Service, tail
from .qmp import Qmp, accept_one, listen

__all__ = ["Disk", "Vm", "disk_arguments"]


@dataclass(frozen=True)
class Disk:
    """A vhost-user-blk disk of a guest, in the order /dev/vda, /dev/vdb, ...

    extra: more properties of the QEMU device, as in "config-wce=off,queue-size=256".
    """

    socket_path: Path
    queues: int = 1
    reconnect: bool = True
    extra: str = ""

    @classmethod
    def of(cls, backend: Backend, *, reconnect: bool = True, extra: str = "") -> Disk:
        return cls(backend.socket_path, backend.queues, reconnect, extra)


@cache
def qemu_program() -> tuple[str, tuple[int, int]]:
    """QEMU's system emulator and its version."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise HarnessError("qemu-system-x86_64 is not installed: run scripts/install-deps")
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", told)
    if found is None:
        raise HarnessError(f"{program} does not tell its version: {told!r}")
    return program, (int(found[1]), int(found[2]))


def disk_arguments(disks: Sequence[Disk], *, bootable: bool) -> list[str]:
    """QEMU's arguments for disks; the first is what the firmware boots from if `bootable`."""
    _, version = qemu_program()
    words: list[str] = []
    for index, disk in enumerate(disks):
        # `reconnect` (seconds) gave way to `reconnect-ms` in QEMU 9.2.
        retry = ",reconnect-ms=100" if version >= (9, 2) else ",reconnect=1"
        words += [
            "-chardev",
            f"socket,id=disk{index},path={disk.socket_path}{retry if disk.reconnect else ''}",
            "-device",
            f"vhost-user-blk-pci,id=blk{index},chardev=disk{index},num-queues={disk.queues}"
            + (f",bootindex={index}" if bootable else "")
            + (f",{disk.extra}" if disk.extra else ""),
        ]
    return words


class Vm:
    """One guest. `start` comes first; `kill` may be called at any time, and repeatedly."""

    def __init__(
        self,
        directory: Path,
        guest: Guest,
        disks: Sequence[Disk] = (),
        *,
        cpus: int = 2,
        arguments: Sequence[str] = (),
        name: str = "vm",
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.guest = guest
        self.disks = list(disks)
        self.cpus = cpus
        self.arguments = list(arguments)
        self.name = name
        self.serial_log_path = directory / "serial.log"
        self.qemu_log_path = directory / "qemu.log"
        self._qemu: Service | None = None
        self._agent: Agent | None = None
        self._qmp: Qmp | None = None

    @property
    def agent(self) -> Agent:
        if self._agent is None:
            raise HarnessError(f"{self.name} does not run")
        return self._agent

    @property
    def qmp(self) -> Qmp:
        if self._qmp is None:
            raise HarnessError(f"{self.name} does not run")
        return self._qmp

    @property
    def pid(self) -> int:
        """QEMU's process."""
        if self._qemu is None:
            raise HarnessError(f"{self.name} does not run")
        return self._qemu.pid

    def start(self) -> None:
        """Starts QEMU and returns when the guest's agent runs."""
        program, _ = qemu_program()
        agent_path, qmp_path = self.directory / "agent.sock", self.directory / "qmp.sock"
        with listen(agent_path) as agent_listener, listen(qmp_path) as qmp_listener:
            self._qemu = Service(
                "QEMU",
                [program, *self._machine_arguments(agent_path, qmp_path)],
                self.qemu_log_path,
            )
            try:
                self._agent = Agent(accept_one(agent_listener, 30, "QEMU"))
                self._qmp = Qmp(accept_one(qmp_listener, 30, "QEMU"))
                self._agent.wait_ready(self.guest.boot_limit_s)
            except HarnessError as error:
                self.kill()
                raise HarnessError(f"{self.name} did not boot: {error}\n{self.logs()}") from error

    def _machine_arguments(self, agent_path: Path, qmp_path: Path) -> list[str]:
        memory = f"{self.guest.memory_mib}M"
        accel = os.environ.get("VHOSTD_TEST_ACCEL", "tcg")
        words = [
            "-nodefaults", "-no-user-config", "-display", "none",
            "-accel", "tcg,thread=multi" if accel == "tcg" else accel,
            "-machine", "q35,memory-backend=memory", "-smp", str(self.cpus), "-m", memory,
            "-object", f"memory-backend-memfd,id=memory,size={memory},share=on",
            "-serial", f"file:{self.serial_log_path}",
            "-chardev", f"socket,id=agent,path={agent_path}", "-serial", "chardev:agent",
            "-chardev", f"socket,id=qmp,path={qmp_path}", "-mon", "chardev=qmp,mode=control",
        ]  # fmt: skip
        if self.guest.direct_kernel:
            image = image_dir(self.guest.image)
            words += [
                "-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initramfs"),
                "-append", "console=ttyS0 quiet mitigations=off panic=-1",
            ]  # fmt: skip
        words += disk_arguments(self.disks, bootable=not self.guest.direct_kernel)
        return words + self.arguments

    def run(self, command: str, *, limit_s: float = 60, check: bool = True) -> CommandResult:
        """Runs a shell command in the guest; see `Agent.run`."""
        return self.agent.run(command, limit_s=limit_s, check=check)

    def output(self, command: str, *, limit_s: float = 60) -> str:
        """What a command in the guest prints, without the white space around it."""
        return self.run(command, limit_s=limit_s).output.strip()

    def reboot(self) -> None:
        """Reboots from within; returns when the agent of the new boot runs. QEMU stays."""
        self.agent.start(self.guest.reboot_command)
        try:
            self.agent.wait_ready(self.guest.boot_limit_s)
        except HarnessError as error:
            raise HarnessError(f"{self.name} did not reboot: {error}\n{self.logs()}") from error

    def power_off(self, limit_s: float = 120) -> None:
        """Powers off from within; returns when QEMU has ended."""
        if self._qemu is None:
            raise HarnessError(f"{self.name} does not run")
        self.agent.start(self.guest.power_off_command)
        code = self._qemu.wait(limit_s)
        self._close()
        if code != 0:
            raise HarnessError(f"QEMU ended with {code}:\n{tail(self.qemu_log_path)}")

    def kill(self) -> None:
        """Ends QEMU at once: what loss of power looks like to the guest."""
        if self._qemu is not None:
            self._qemu.kill()
        self._close()

    def _close(self) -> None:
        for connection in (self._agent, self._qmp):
            if connection is not None:
                connection.close()
        self._agent = self._qmp = self._qemu = None

    def by_hand(self) -> list[str]:
        """The command line that runs this guest on a terminal, in pieces to print one a line."""
        program, _ = qemu_program()
        memory = f"{self.guest.memory_mib}M"
        pieces = [
            f"{program} -nodefaults -nographic -accel tcg -smp {self.cpus} -m {memory}",
            f"-object memory-backend-memfd,id=memory,size={memory},share=on",
            "-machine q35,memory-backend=memory -serial mon:stdio",
        ]
        if self.guest.direct_kernel:
            image = image_dir(self.guest.image)
            pieces.append(f"-kernel {image / 'vmlinuz'} -initrd {image / 'initramfs'}")
            pieces.append("-append console=ttyS0")
        disks = disk_arguments(self.disks, bootable=not self.guest.direct_kernel)
        return pieces + [shlex.join(disks[at : at + 2]) for at in range(0, len(disks), 2)]

    def logs(self) -> str:
        """The ends of the guest's console and of what QEMU printed."""
        return (
            f"--- {self.name}: serial console ---\n{tail(self.serial_log_path)}\n"
            f"--- {self.name}: QEMU ---\n{tail(self.qemu_log_path)}"
        )
