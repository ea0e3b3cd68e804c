"""What the driver side reports beyond `vhostd.errors`: what the back-end did.

DeviceError
 └── BackendError       the back-end broke the protocol or the ring
      └── RequestError  it answered a request with a status other than OK
"""

from __future__ import annotations

from vhostd.errors import DeviceError
from vhostd.virtqueue.constants import BlockStatus

__all__ = ["BackendError", "RequestError"]


_HINTS: dict[int, str] = {
    BlockStatus.OK: "",
    BlockStatus.IOERR: "the daemon's log has the reason",
    BlockStatus.UNSUPP: "the device does not know this request",
    BlockStatus.UNWRITTEN: "the device completed it without a status",
}


class BackendError(DeviceError):
    """The back-end did what the specification forbids, or refused a message."""


class RequestError(BackendError):
    """A request ended with a status other than OK.

    Attributes:
        status: the byte the device wrote (`BlockStatus.UNWRITTEN` if it wrote none).
    """

    def __init__(self, what: str, status: int) -> None:
        name = BlockStatus(status).name if status in _HINTS else f"status {status}"
        hint = _HINTS.get(status, "")
        super().__init__(f"{what} failed with {name}" + (f"; {hint}" if hint else ""))
        self.status = status
