"""Arguments for QEMU."""

from __future__ import annotations

from vhostd.exports.qemu import qemu_arguments


def test_several_disks_share_one_memory() -> None:
    arguments = qemu_arguments(["/a.sock", "/b.sock"], memory="2G", boot=True)
    assert arguments.count("-object") == 1
    assert "memory-backend-memfd,id=vhostd-memory,size=2G,share=on" in arguments
    devices = [arguments[i + 1] for i, word in enumerate(arguments) if word == "-device"]
    assert devices == [
        "vhost-user-blk-pci,id=disk-vhostd0,chardev=vhostd0,bootindex=1",
        "vhost-user-blk-pci,id=disk-vhostd1,chardev=vhostd1",
    ]


def test_comma_in_a_path_is_doubled() -> None:
    assert "socket,id=vhostd0,path=/a,,b.sock,reconnect=1" in qemu_arguments(["/a,b.sock"])
