"""What QEMU has to be given to use attached volumes. Pure; any thread."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["qemu_arguments"]


def qemu_arguments(sockets: Sequence[str], *, memory: str = "4G", boot: bool = False) -> list[str]:
    """QEMU command line arguments for the disks behind `sockets`; `boot`: from the first.

    The guest's memory must be shared with the back-end, so it is a memfd that is `share=on`.
    `reconnect` lets QEMU find a disk again after a restart of the daemon. A comma in a path is
    doubled, as QEMU's option syntax wants it.
    """
    arguments = [
        "-object",
        f"memory-backend-memfd,id=vhostd-memory,size={memory},share=on",
        "-machine",
        "memory-backend=vhostd-memory",
        "-m",
        memory,
    ]
    for index, socket in enumerate(sockets):
        chardev, path = f"vhostd{index}", socket.replace(",", ",,")
        order = ",bootindex=1" if boot and index == 0 else ""
        arguments += [
            "-chardev",
            f"socket,id={chardev},path={path},reconnect=1",
            "-device",
            f"vhost-user-blk-pci,id=disk-{chardev},chardev={chardev}{order}",
        ]
    return arguments
