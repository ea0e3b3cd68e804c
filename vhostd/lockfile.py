"""A lock that names its holder: one daemon a state directory.

The lock is the kernel's (flock), so it ends with the process, whatever ends it; the PID in the file
is only for the message.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from vhostd.errors import BusyError, DeviceError

__all__ = ["LockFile"]


class LockFile:
    """Holds `path` from construction to `release`.

    Raises:
        BusyError: another process holds it, and which.
        DeviceError: it cannot be made.
    """

    def __init__(self, path: Path, what: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DeviceError(
                f"{path} cannot be made: {error.strerror}; make its directory writable for the "
                "user that vhostd runs as"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = os.pread(self._fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise BusyError(
                f"{what} is in use by the process with PID {pid}; stop that, or use it"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Lets the next one in; the file stays, as removing it would race with a newcomer."""
        os.close(self._fd)
