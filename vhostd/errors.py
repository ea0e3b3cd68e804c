"""Every error vhostd reports, with its JSON-RPC code and its exit code, in one table.

    VhostdError
     ├── UsageError            the request itself is wrong (bad name, bad size, unknown key)
     ├── NotFoundError         no such pool, volume, session, file
     ├── ExistsError           the name is taken
     ├── BusyError             in use: attached, open elsewhere, locked
     ├── NoSpaceError          the device is full
     ├── DamagedError          what is on disk is not what was written
     ├── DeviceError           the operating system refused or failed I/O
     ├── UnsupportedError      understood, and not possible here
     ├── UnavailableError      the daemon or a peer cannot be reached or timed out
     └── InternalError         a defect in vhostd

A message says what happened, to which object, and what to do next.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BusyError",
    "DamagedError",
    "DeviceError",
    "ExistsError",
    "InternalError",
    "NoSpaceError",
    "NotFoundError",
    "UnavailableError",
    "UnsupportedError",
    "UsageError",
    "VhostdError",
    "from_rpc",
]


class VhostdError(Exception):
    """Base of all errors that vhostd means to report.

    Attributes:
        kind: the word for it in JSON output.
        rpc_code: the JSON-RPC 2.0 error code (in the server range, -32000 down).
        exit_code: what a command ends with.
    """

    kind: ClassVar[str] = "error"
    rpc_code: ClassVar[int] = -32000
    exit_code: ClassVar[int] = 1


class UsageError(VhostdError):
    """The request itself is wrong: a bad name, a bad size, an unknown key."""

    kind = "usage"
    rpc_code = -32602  # JSON-RPC 2.0: invalid params
    exit_code = 2


class NotFoundError(VhostdError):
    """No such pool, volume, session or file."""

    kind = "not-found"
    rpc_code = -32001
    exit_code = 3


class ExistsError(VhostdError):
    """The name is taken."""

    kind = "exists"
    rpc_code = -32002
    exit_code = 4


class BusyError(VhostdError):
    """In use: attached, open in another process, locked."""

    kind = "busy"
    rpc_code = -32003
    exit_code = 5


class NoSpaceError(VhostdError):
    """The device is full."""

    kind = "no-space"
    rpc_code = -32004
    exit_code = 6


class DamagedError(VhostdError):
    """What is on disk is not what was written."""

    kind = "damaged"
    rpc_code = -32005
    exit_code = 7


class DeviceError(VhostdError):
    """The operating system refused or failed an operation on a device."""

    kind = "device"
    rpc_code = -32006
    exit_code = 8


class UnsupportedError(VhostdError):
    """Understood, and not possible here."""

    kind = "unsupported"
    rpc_code = -32007
    exit_code = 9


class UnavailableError(VhostdError):
    """The daemon or a peer cannot be reached, or did not answer in time."""

    kind = "unavailable"
    rpc_code = -32008
    exit_code = 10


class InternalError(VhostdError):
    """A defect in vhostd; please report it with the log."""

    kind = "internal"
    rpc_code = -32603  # JSON-RPC 2.0: internal error
    exit_code = 70


_BASE: type[VhostdError] = VhostdError
_BY_RPC_CODE: dict[int, type[VhostdError]] = {
    error.rpc_code: error for error in (_BASE, *_BASE.__subclasses__())
}


def from_rpc(code: int, message: str) -> VhostdError:
    """The exception for a JSON-RPC error object; unknown codes become `VhostdError`."""
    return _BY_RPC_CODE.get(code, VhostdError)(message)
