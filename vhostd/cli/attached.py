"""Volumes and snapshots as disks for a command, and files that appear when they are whole.

Data goes through a temporary attachment, the way a guest's would; the daemon ends the attachment by
itself if this process dies. One thread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vhostd.api.client import Client
from vhostd.errors import DeviceError, ExistsError, NotFoundError
from vhostd.transfer import copy as copying

__all__ = ["appearing", "attached", "open_disk"]


@contextmanager
def attached(client: Client, name: str, *, read_only: bool) -> Iterator[Any]:
    """A volume or a snapshot as a disk, over a socket that lasts as long."""
    made = client.call("attach", volume=name, read_only=read_only, temporary=True)
    try:
        with open_disk(Path(made["socket"])) as disk:
            yield disk
    finally:
        # The daemon does so itself when the session ends; this waits for it.
        with contextlib.suppress(NotFoundError):
            client.call("detach", volume=name, socket=made["socket"])


@contextmanager
def open_disk(socket: Path) -> Iterator[copying.Disk]:
    """The disk at a socket."""
    # Here, and not above: most commands do not need it.
    from vhostd.virtqueue.block import BlockDevice

    with BlockDevice(socket) as disk:
        yield disk


@contextmanager
def appearing(file: Path, *, force: bool) -> Iterator[Path]:
    """A path to write to; when the context ends well, what was written is durably at `file`.

    Raises:
        ExistsError: `file` exists, and it is not to be replaced.
        NotFoundError: its directory does not.
    """
    if file.exists() and not force:
        raise ExistsError(f"{file} exists; replace it with --force, or choose another name")
    if not file.parent.is_dir():
        raise NotFoundError(f"{file.parent} does not exist; make that directory first")
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield part
        _appear(part, file)
    finally:
        copying.remove_quietly(part)


def _appear(part: Path, file: Path) -> None:
    """Durably under its name, or not at all."""
    try:
        with part.open("rb") as whole:
            os.fsync(whole.fileno())
        part.replace(file)
        directory = os.open(file.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise DeviceError(f"{file} cannot be made: {error.strerror}") from error
