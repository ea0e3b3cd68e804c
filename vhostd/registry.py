"""What a daemon remembers over a restart: its pools, and what it had attached.

One JSON file in the state directory, replaced atomically: a crash leaves the old or the new one.
Everything about volumes themselves is in the pools' catalogs. Event loop's thread only, but for
`save`, which blocks.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
from msgspec import Struct

from vhostd.errors import DamagedError, DeviceError, NoSpaceError, UnsupportedError

__all__ = ["AttachmentRecord", "PoolRecord", "ReceiveRecord", "Registry"]

VERSION = 1
FILE_NAME = "registry.json"


class PoolRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """A pool this daemon opens at its start."""

    name: str
    device: str


class AttachmentRecord(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A socket this daemon serves a volume, or (read-only) a snapshot of it, on.

    write_cache: what the guest last wrote to `writeback`; None if it never did.
    """

    pool: str
    volume: str
    socket: str
    queues: int
    read_only: bool
    write_cache: bool | None = None
    snapshot: str | None = None


class ReceiveRecord(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A volume that a stream is being received into (`vhostd.receives`).

    volume: `pool/volume`. snapshot, guid, quiesced: what it makes. from_guid: the snapshot that it
    begins with; None: the volume is new. applied_bytes: everything before this byte is durable.
    """

    volume: str
    snapshot: str
    guid: str
    from_guid: str | None
    size_bytes: int
    logical_block_bytes: int
    quiesced: bool
    applied_bytes: int = 0


class _Content(Struct, forbid_unknown_fields=True):
    version: int = VERSION
    pools: list[PoolRecord] = []
    attachments: list[AttachmentRecord] = []
    receives: list[ReceiveRecord] = []


class Registry:
    """The file and its content. Without a directory nothing is kept (`vhostd disk`)."""

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / FILE_NAME
        self.pools: dict[str, PoolRecord] = {}
        self.attachments: dict[str, AttachmentRecord] = {}
        self.receives: dict[str, ReceiveRecord] = {}

    @classmethod
    def load(cls, directory: Path) -> Registry:
        """Reads the file; an empty registry if there is none yet.

        Raises:
            DamagedError: it is not what vhostd writes.
            UnsupportedError: a newer vhostd wrote it.
            DeviceError: it cannot be read.
        """
        registry = cls(directory)
        path = directory / FILE_NAME
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return registry
        except OSError as error:
            raise DeviceError(
                f"{path} cannot be read: {error.strerror}; check its permissions"
            ) from error
        try:
            version = msgspec.json.decode(text, type=dict[str, object]).get("version")
            if isinstance(version, int) and version > VERSION:
                raise UnsupportedError(
                    f"{path} has version {version}, and this vhostd knows {VERSION}; use the "
                    "vhostd that wrote it or a newer one"
                )
            content = msgspec.json.decode(text, type=_Content)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DamagedError(
                f"{path} is damaged: {error}. No pool is harmed by this: move the file away, start "
                "again, and add the pools with `vhostctl pool open DIR`"
            ) from error
        registry.pools = {record.name: record for record in content.pools}
        registry.attachments = {record.socket: record for record in content.attachments}
        registry.receives = {record.volume: record for record in content.receives}
        return registry

    def save(self) -> None:
        """Makes the content durable.

        Raises:
            NoSpaceError, DeviceError: it cannot be written; the file is as it was.
        """
        if self._path is None:
            return
        content = _Content(
            VERSION,
            list(self.pools.values()),
            list(self.attachments.values()),
            list(self.receives.values()),
        )
        text = msgspec.json.format(msgspec.json.encode(content), indent=2)
        try:
            _replace(self._path, text + b"\n")
        except OSError as error:
            kind = NoSpaceError if error.errno == errno.ENOSPC else DeviceError
            raise kind(
                f"{self._path} cannot be written: {error.strerror}; make room or make its "
                "directory writable, and try again"
            ) from error


def _replace(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
