"""vhost-user messages: request ids, payload layouts, and what each request must look like.

Source: vhost-user.rst, headings "Message Specification", "Front-end message types" and
"Back-end message types". Numbers are in native byte order.

Invariants:
- A payload is decoded only if its length is exactly what its layout says; a decoded payload's
  counts, sizes and flags agree with each other. Addresses are *not* judged here (see `memory`).
- `RULES` is the one place that says which requests are handled, and with how many descriptors.
  A request that is missing there is refused.

Pure functions; any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from vhostd.errors import UsageError
from vhostd.protocol.features import ProtocolFeature

__all__ = [
    "HEADER_BYTES",
    "MAX_CONFIG_BYTES",
    "MAX_FDS",
    "MAX_PAYLOAD_BYTES",
    "MAX_TABLE_REGIONS",
    "RULES",
    "BackendRequest",
    "Config",
    "ConfigFlag",
    "Header",
    "HeaderFlag",
    "MemoryTableDescription",
    "Payload",
    "RefusedError",
    "RegionDescription",
    "Request",
    "RequestRule",
    "SingleRegion",
    "ViolationError",
    "VringAddress",
    "VringFd",
    "VringState",
    "decode_u64",
    "encode_message",
    "encode_u64",
    "request_name",
]

HEADER_BYTES = 12
MAX_PAYLOAD_BYTES = 4096
MAX_FDS = 8
"""Descriptors a message may carry: one a region of SET_MEM_TABLE."""
MAX_TABLE_REGIONS = 8
"""Regions of SET_MEM_TABLE ("Memory regions description": region0 to region7)."""
MAX_CONFIG_BYTES = 256
"""Largest config space that is accessed by GET_CONFIG and SET_CONFIG."""

VERSION = 0x1
_VERSION_MASK = 0x3


class ViolationError(UsageError):
    """A message that breaks the protocol's form; the session ends, whatever was asked."""


class RefusedError(UsageError):
    """A well-formed request that cannot be done.

    Answered as an error where the front-end asked for the result; else the session ends, unless
    the front-end learns of it in another way (`ends_session` false).
    """

    def __init__(self, reason: str, *, ends_session: bool = True) -> None:
        super().__init__(reason)
        self.ends_session = ends_session


class HeaderFlag(IntEnum):
    """Bits of the header's flags above the version: "Header"."""

    REPLY = 1 << 2
    NEED_REPLY = 1 << 3


class Request(IntEnum):
    """Requests of the front-end: "Front-end message types"."""

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
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(IntEnum):
    """Requests of the back-end on its own channel: "Back-end message types"."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8


class ConfigFlag(IntEnum):
    """The flags field of "Virtio device config space" (a value, not bits)."""

    WRITABLE = 0
    MIGRATION = 1


def request_name(request: int) -> str:
    """`SET_FEATURES`, or `request 99` for a number that has no name."""
    try:
        return Request(request).name
    except ValueError:
        return f"request {request}"


def _unpack(layout: struct.Struct, data: bytes, what: str) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise ViolationError(
            f"payload of {len(data)} bytes where {what} of {layout.size} bytes is due"
        )
    return layout.unpack(data)


_HEADER = struct.Struct("=III")
_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")
_ADDRESS = struct.Struct("=IIQQQQ")
_TABLE = struct.Struct("=II")
_REGION = struct.Struct("=QQQQ")
_SINGLE = struct.Struct("=QQQQQ")
_CONFIG = struct.Struct("=III")

_VRING_INDEX_MASK = 0xFF
_VRING_NO_FD = 1 << 8


@dataclass(frozen=True, slots=True)
class Header:
    """The 12 bytes before each payload. `size_bytes` is the payload's."""

    request: int
    flags: int
    size_bytes: int

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Raises ViolationError for what no front-end's request may be."""
        header = cls(*_unpack(_HEADER, data, "a header"))
        name = request_name(header.request)
        if header.flags & _VERSION_MASK != VERSION:
            raise ViolationError(
                f"{name} has version {header.flags & _VERSION_MASK}; here it is {VERSION}"
            )
        if header.flags & ~(_VERSION_MASK | HeaderFlag.NEED_REPLY):
            raise ViolationError(f"{name} has flags {header.flags:#x} that no request has")
        if header.size_bytes > MAX_PAYLOAD_BYTES:
            raise ViolationError(
                f"{name} announces {header.size_bytes} bytes of payload; at most "
                f"{MAX_PAYLOAD_BYTES} are taken"
            )
        return header

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & HeaderFlag.NEED_REPLY)

    def encode(self) -> bytes:
        return _HEADER.pack(self.request, self.flags, self.size_bytes)


def encode_message(request: int, payload: bytes = b"", *, flags: int = 0) -> bytes:
    """A message with `flags` besides the version: `HeaderFlag.REPLY` for a back-end's answer."""
    return Header(request, flags | VERSION, len(payload)).encode() + payload


def decode_u64(data: bytes) -> int:
    return _unpack(_U64, data, "a u64")[0]


def encode_u64(value: int) -> bytes:
    return _U64.pack(value)


@dataclass(frozen=True, slots=True)
class VringState:
    """ "A vring state description"."""

    index: int
    num: int

    @classmethod
    def decode(cls, data: bytes) -> VringState:
        return cls(*_unpack(_STATE, data, "a vring state"))

    def encode(self) -> bytes:
        return _STATE.pack(self.index, self.num)


@dataclass(frozen=True, slots=True)
class VringAddress:
    """ "A vring address description"; addresses are the front-end's (user) addresses."""

    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int

    @classmethod
    def decode(cls, data: bytes) -> VringAddress:
        return cls(*_unpack(_ADDRESS, data, "a vring address"))

    def encode(self) -> bytes:
        return _ADDRESS.pack(
            self.index, self.flags, self.descriptor, self.used, self.available, self.log
        )


@dataclass(frozen=True, slots=True)
class VringFd:
    """The u64 of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR."""

    index: int
    has_fd: bool

    @classmethod
    def decode(cls, data: bytes) -> VringFd:
        value = decode_u64(data)
        if value & ~(_VRING_INDEX_MASK | _VRING_NO_FD):
            raise ViolationError(
                f"vring index {value:#x} has bits set that have no meaning (only 0 to 8 have)"
            )
        return cls(value & _VRING_INDEX_MASK, not value & _VRING_NO_FD)

    def encode(self) -> bytes:
        return _U64.pack(self.index | (0 if self.has_fd else _VRING_NO_FD))


@dataclass(frozen=True, slots=True)
class RegionDescription:
    """A region of guest memory, as the front-end describes it."""

    guest_address: int
    size_bytes: int
    user_address: int
    mmap_offset: int

    def encode(self) -> bytes:
        return _REGION.pack(
            self.guest_address, self.size_bytes, self.user_address, self.mmap_offset
        )


@dataclass(frozen=True, slots=True)
class MemoryTableDescription:
    """ "Memory regions description" of SET_MEM_TABLE."""

    regions: tuple[RegionDescription, ...]

    @classmethod
    def decode(cls, data: bytes) -> MemoryTableDescription:
        if len(data) < _TABLE.size:
            raise ViolationError(
                f"payload of {len(data)} bytes where a memory table of at least {_TABLE.size} "
                "bytes is due"
            )
        count, _padding = _TABLE.unpack_from(data)
        if count > MAX_TABLE_REGIONS:
            raise ViolationError(
                f"memory table of {count} regions; it holds at most {MAX_TABLE_REGIONS}, more "
                "are added with ADD_MEM_REG"
            )
        due = _TABLE.size + count * _REGION.size
        if len(data) != due:
            raise ViolationError(
                f"payload of {len(data)} bytes where a memory table of {count} regions ({due} "
                "bytes) is due"
            )
        return cls(tuple(RegionDescription(*row) for row in _REGION.iter_unpack(data[8:])))

    def encode(self) -> bytes:
        return _TABLE.pack(len(self.regions), 0) + b"".join(r.encode() for r in self.regions)


@dataclass(frozen=True, slots=True)
class SingleRegion:
    """ "Single memory region description" of ADD_MEM_REG and REM_MEM_REG."""

    region: RegionDescription

    @classmethod
    def decode(cls, data: bytes) -> SingleRegion:
        _padding, *fields = _unpack(_SINGLE, data, "a memory region")
        return cls(RegionDescription(*fields))

    def encode(self) -> bytes:
        return bytes(8) + self.region.encode()


@dataclass(frozen=True, slots=True)
class Config:
    """ "Virtio device config space": an access to `len(data)` bytes at `offset`."""

    offset: int
    flags: int
    data: bytes

    @classmethod
    def decode(cls, data: bytes) -> Config:
        if len(data) < _CONFIG.size:
            raise ViolationError(
                f"payload of {len(data)} bytes where a config access of at least {_CONFIG.size} "
                "bytes is due"
            )
        offset, size_bytes, flags = _CONFIG.unpack_from(data)
        if len(data) != _CONFIG.size + size_bytes:
            raise ViolationError(
                f"config access of {size_bytes} bytes in a payload of {len(data)} bytes"
            )
        return cls(offset, flags, data[_CONFIG.size :])

    def encode(self) -> bytes:
        return _CONFIG.pack(self.offset, len(self.data), self.flags) + self.data


Payload: TypeAlias = (
    int
    | VringState
    | VringAddress
    | VringFd
    | MemoryTableDescription
    | SingleRegion
    | Config
    | None
)


def _decode_nothing(data: bytes) -> None:
    if data:
        raise ViolationError(f"payload of {len(data)} bytes where none is due")


@dataclass(frozen=True, slots=True)
class RequestRule:
    """What a request must look like.

    Attributes:
        decode: turns the payload into its type, or raises ViolationError.
        max_fds: descriptors it may carry; how many it must carry follows from the payload.
        replies: it has a reply of its own, and REPLY_ACK adds none.
        needs: the protocol feature that must have been negotiated.
    """

    decode: Callable[[bytes], Payload]
    max_fds: int = 0
    replies: bool = False
    needs: ProtocolFeature | None = None

    def check_fds(self, payload: Payload, count: int) -> None:
        """Raises ViolationError if `count` descriptors do not belong to this payload."""
        due = 0
        if isinstance(payload, VringFd):
            due = int(payload.has_fd)
        elif isinstance(payload, MemoryTableDescription):
            due = len(payload.regions)
        elif isinstance(payload, SingleRegion):
            due = self.max_fds
            # REM_MEM_REG should carry none; one is tolerated ("VHOST_USER_REM_MEM_REG").
            if self is RULES[Request.REM_MEM_REG] and count == 0:
                return
        if count != due:
            raise ViolationError(f"{count} file descriptors came where {due} are due")


_SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS

RULES: dict[Request, RequestRule] = {
    Request.GET_FEATURES: RequestRule(_decode_nothing, replies=True),
    Request.SET_FEATURES: RequestRule(decode_u64),
    Request.SET_OWNER: RequestRule(_decode_nothing),
    Request.RESET_OWNER: RequestRule(_decode_nothing),
    Request.SET_MEM_TABLE: RequestRule(MemoryTableDescription.decode, max_fds=MAX_TABLE_REGIONS),
    Request.SET_VRING_NUM: RequestRule(VringState.decode),
    Request.SET_VRING_ADDR: RequestRule(VringAddress.decode),
    Request.SET_VRING_BASE: RequestRule(VringState.decode),
    Request.GET_VRING_BASE: RequestRule(VringState.decode, replies=True),
    Request.SET_VRING_KICK: RequestRule(VringFd.decode, max_fds=1),
    Request.SET_VRING_CALL: RequestRule(VringFd.decode, max_fds=1),
    Request.SET_VRING_ERR: RequestRule(VringFd.decode, max_fds=1),
    Request.GET_PROTOCOL_FEATURES: RequestRule(_decode_nothing, replies=True),
    Request.SET_PROTOCOL_FEATURES: RequestRule(decode_u64),
    # Legal once MQ is offered; it need not be negotiated ("VHOST_USER_GET_QUEUE_NUM").
    Request.GET_QUEUE_NUM: RequestRule(_decode_nothing, replies=True),
    Request.SET_VRING_ENABLE: RequestRule(VringState.decode),
    Request.GET_CONFIG: RequestRule(Config.decode, replies=True, needs=ProtocolFeature.CONFIG),
    Request.SET_CONFIG: RequestRule(Config.decode, needs=ProtocolFeature.CONFIG),
    Request.RESET_DEVICE: RequestRule(_decode_nothing, needs=ProtocolFeature.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: RequestRule(_decode_nothing, replies=True, needs=_SLOTS),
    Request.ADD_MEM_REG: RequestRule(SingleRegion.decode, max_fds=1, needs=_SLOTS),
    Request.REM_MEM_REG: RequestRule(SingleRegion.decode, max_fds=1, needs=_SLOTS),
    Request.SET_STATUS: RequestRule(decode_u64, needs=ProtocolFeature.STATUS),
    Request.GET_STATUS: RequestRule(_decode_nothing, replies=True, needs=ProtocolFeature.STATUS),
}
"""Requests that are handled. Not yet: 6, 7 (log), 21 (back-end channel), 28 to 30 (postcopy),
31, 32 (inflight), 35 (in-band kick), 42, 43 (device state). Never, for a block device: 19, 20,
22, 23, 26, 27, 33, 41."""
