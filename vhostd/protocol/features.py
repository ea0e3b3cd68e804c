"""Feature bits of virtio and vhost-user: the one table of numbers.

Sources, cited a row:
- virtio 1.3: OASIS virtio-v1.3, sections 5.2.3 (block device) and 6 (reserved feature bits).
- vhost-user.rst: QEMU `docs/interop/vhost-user.rst`, headings "Protocol features", "Ring states".

Published copies of vhost-user.rst differ in protocol feature bits above 19 (bit 20 was used for
GET_VRING_BASE_INFLIGHT and bit 23 later for GET_VRING_BASE_SKIP_DRAIN), so a bit is added here only
with the revision it was read from.

Pure data; any thread.
"""

from __future__ import annotations

from enum import IntFlag

__all__ = [
    "OFFERED_PROTOCOL_FEATURES",
    "DeviceStatus",
    "ProtocolFeature",
    "VirtioFeature",
    "names",
]


class VirtioFeature(IntFlag):
    """Bits of GET_FEATURES and SET_FEATURES."""

    # Block device, virtio 1.3, 5.2.3.
    BLK_SIZE_MAX = 1 << 1
    BLK_SEG_MAX = 1 << 2
    BLK_GEOMETRY = 1 << 4
    BLK_RO = 1 << 5
    BLK_BLK_SIZE = 1 << 6
    BLK_FLUSH = 1 << 9
    BLK_TOPOLOGY = 1 << 10
    BLK_CONFIG_WCE = 1 << 11
    BLK_MQ = 1 << 12
    BLK_DISCARD = 1 << 13
    BLK_WRITE_ZEROES = 1 << 14
    BLK_LIFETIME = 1 << 15
    BLK_SECURE_ERASE = 1 << 16
    BLK_ZONED = 1 << 17
    # Legacy interface, virtio 1.3, 6.3.
    NOTIFY_ON_EMPTY = 1 << 24
    ANY_LAYOUT = 1 << 27
    # vhost-user.rst, "Migration": VHOST_F_LOG_ALL.
    LOG_ALL = 1 << 26
    # Reserved feature bits, virtio 1.3, 6.
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    # vhost-user.rst, "Communication": VHOST_USER_F_PROTOCOL_FEATURES, virtio's unused bit 30.
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40


class ProtocolFeature(IntFlag):
    """Bits of GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES: vhost-user.rst, "Protocol features".

    Bits 0 to 19 are the same in every revision that has them.
    """

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


class DeviceStatus(IntFlag):
    """Bits of SET_STATUS and GET_STATUS: virtio 1.3, 2.1."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


OFFERED_PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
"""What a session can do today; a bit is offered only with its messages handled."""


def names(flags: type[IntFlag], bits: int) -> list[str]:
    """The names of the bits set, lowest first; a bit without a name is `bit N`."""
    known = {int(flag): str(flag.name) for flag in flags}
    found = []
    for bit in range(bits.bit_length()):
        if bits >> bit & 1:
            found.append(known.get(1 << bit, f"bit {bit}"))
    return found
