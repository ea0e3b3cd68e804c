"""Numbers of the wire and of the ring, as the driver side needs them.

Written from the specifications and not shared with `vhostd.protocol`, so that each side checks the
other; only the table of feature bits is common. Sources: virtio 1.3, 2.7 and 5.2;
vhost-user.rst, "Message Specification" and "Front-end message types".

Pure data; any thread.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

__all__ = [
    "ID_BYTES",
    "MAX_QUEUE_SIZE",
    "SECTOR_BYTES",
    "AvailFlag",
    "BlockRequest",
    "BlockStatus",
    "DescriptorFlag",
    "FrontendRequest",
    "MessageFlag",
    "UsedFlag",
]

SECTOR_BYTES = 512
"""The unit of virtio-blk's sector numbers, whatever the block size (virtio 1.3, 5.2.4)."""
ID_BYTES = 20
"""What GET_ID returns (virtio 1.3, 5.2.6)."""
MAX_QUEUE_SIZE = 32768
"""virtio 1.3, 2.7."""


class DescriptorFlag(IntFlag):
    """virtio 1.3, 2.7.5."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


class AvailFlag(IntFlag):
    """virtio 1.3, 2.7.6."""

    NO_INTERRUPT = 1


class UsedFlag(IntFlag):
    """virtio 1.3, 2.7.8."""

    NO_NOTIFY = 1


class BlockRequest(IntEnum):
    """Types of requests: virtio 1.3, 5.2.6."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


class BlockStatus(IntEnum):
    """virtio 1.3, 5.2.6; UNWRITTEN is what the driver puts there before it asks."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    UNWRITTEN = 0xFF


class MessageFlag(IntFlag):
    """The header's flags: the version in the lowest two bits, and what each message says."""

    VERSION_1 = 0x1
    REPLY = 0x4
    NEED_REPLY = 0x8


class FrontendRequest(IntEnum):
    """Requests a front-end may send."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


def request_label(request: int) -> str:
    """`SET_FEATURES`, or `request 99` for a number without a name."""
    try:
        return FrontendRequest(request).name
    except ValueError:
        return f"request {request}"
