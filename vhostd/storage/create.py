"""Making the device of a pool in a directory, and removing it.

Any thread; calls block.
"""

from __future__ import annotations

import shutil
import uuid as uuid_module
from pathlib import Path
from uuid import UUID

from vhostd.errors import DeviceError, ExistsError, NotFoundError, UsageError
from vhostd.storage import catalog as catalog_module
from vhostd.storage.catalog import Catalog
from vhostd.storage.engine import FormatDevice
from vhostd.storage.names import check_name
from vhostd.storage.sizes import format_size

__all__ = ["DEFAULT_SEGMENT_BYTES", "create_pool", "is_pool", "remove_ours"]

DEFAULT_SEGMENT_BYTES = 32 << 20
MIN_SEGMENT_BYTES = 1 << 20

SUPERBLOCK = "superblock"
_OURS = (
    SUPERBLOCK,
    "segments",
    "lock",
    *(catalog_module.FILE_NAME + s for s in ("", "-wal", "-shm")),
)


def is_pool(directory: Path) -> bool:
    """Whether a pool's device is (or was begun) there."""
    return (directory / SUPERBLOCK).exists() or (directory / catalog_module.FILE_NAME).exists()


def create_pool(
    directory: Path,
    name: str,
    *,
    format_device: FormatDevice,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
) -> UUID:
    """Makes `directory` (created if missing) the device of a new pool, and returns its UUID.

    Raises:
        UsageError: the name or the segment size is not possible.
        ExistsError: the directory is a pool already, or is not empty.
        NotFoundError, DeviceError, NoSpaceError: it cannot be made there; nothing is left behind.
    """
    check_name(name, "pool")
    if not MIN_SEGMENT_BYTES <= segment_bytes <= DEFAULT_SEGMENT_BYTES or (
        segment_bytes & (segment_bytes - 1)
    ):
        raise UsageError(
            f"pool {name}: segments of {format_size(segment_bytes)} are not possible; choose a "
            "power of 2 from 1M to 32M"
        )
    made = _make_directory(directory)
    pool_uuid, device_uuid = uuid_module.uuid4(), uuid_module.uuid4()
    try:
        format_device(
            str(directory),
            pool_uuid=pool_uuid.bytes,
            device_uuid=device_uuid.bytes,
            pool_name=name,
            segment_bytes=segment_bytes,
        )
        try:
            Catalog.create(
                directory,
                uuid=pool_uuid,
                name=name,
                segment_bytes=segment_bytes,
                device_uuid=device_uuid,
            ).close()
        except BaseException:
            # The directory was empty before format_device, so all of this is ours.
            remove_ours(directory)
            raise
    except BaseException:
        if made:
            directory.rmdir()
        raise
    return pool_uuid


def _make_directory(directory: Path) -> bool:
    """True if it had to be made."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{directory} cannot be made: {directory.parent} does not exist; make that first"
        ) from error
    except OSError as error:
        raise DeviceError(
            f"{directory} cannot be made: {error.strerror}; choose another place or change its "
            "permissions"
        ) from error
    else:
        return True
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory; a pool's device is a directory")
    if is_pool(directory):
        raise ExistsError(f"{directory} holds a pool already; open that one, or destroy it first")
    try:
        found = next((p.name for p in directory.iterdir() if p.name != "lost+found"), None)
    except OSError as error:
        raise DeviceError(f"{directory} cannot be listed: {error.strerror}") from error
    if found is not None:
        raise ExistsError(
            f"{directory} is not empty (it holds {found!r}); a pool is made only in an empty "
            "directory, choose another one"
        )
    return False


def remove_ours(directory: Path) -> None:
    """Removes what is a pool's from its directory, and nothing else."""
    # The superblock first: without it the rest is not taken for a pool after a crash.
    for name in _OURS:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
