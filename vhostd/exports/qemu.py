"""What QEMU has to be given to use an attached volume. Pure; any thread."""

from __future__ import annotations

__all__ = ["qemu_arguments"]


def qemu_arguments(
    socket: str, *, memory: str = "4G", index: int = 0, boot: bool = False
) -> list[str]:
    """QEMU command line arguments for the disk behind `socket`.

    The guest's memory must be shared with the back-end, so it is a memfd that is `share=on`.
    `reconnect` lets QEMU find the disk again after a restart of the daemon. A comma in a path is
    doubled, as QEMU's option syntax wants it.
    """
    path = socket.replace(",", ",,")
    chardev = f"vhostd{index}"
    device = f"vhost-user-blk-pci,id=disk-{chardev},chardev={chardev}"
    return [
        "-object",
        f"memory-backend-memfd,id=vhostd-memory,size={memory},share=on",
        "-machine",
        "memory-backend=vhostd-memory",
        "-m",
        memory,
        "-chardev",
        f"socket,id={chardev},path={path},reconnect=1",
        "-device",
        device + (",bootindex=1" if boot else ""),
    ]
