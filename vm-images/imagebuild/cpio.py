"""Writes a cpio archive in the "newc" format, as the kernel reads its initramfs.

Own code because device nodes, owners and time stamps are then ours to say: no root needed, and the
same input gives the same bytes.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["write_tree"]


def write_tree(root: Path, output: BinaryIO) -> None:
    """Archives everything below `root`, owned by root, in sorted order."""
    for inode, path in enumerate(sorted(root.rglob("*")), start=1):
        information = path.lstat()
        if stat.S_ISLNK(information.st_mode):
            contents = str(path.readlink()).encode()
        elif stat.S_ISREG(information.st_mode):
            contents = path.read_bytes()
        else:
            contents = b""
        name = str(path.relative_to(root))
        _entry(output, inode, name, information.st_mode, contents)
    _entry(output, 0, "TRAILER!!!", 0, b"")


def _entry(output: BinaryIO, inode: int, name: str, mode: int, contents: bytes) -> None:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(contents), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    output.write(header + encoded + bytes(-(len(header) + len(encoded)) % 4))
    output.write(contents + bytes(-len(contents) % 4))
