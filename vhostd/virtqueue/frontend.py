"""The front-end's side of a vhost-user socket: synchronous, with time-outs.

Wire code of its own, so that it checks `vhostd.protocol` and is checked by it. The methods keep
to vhost-user.rst; `send_message` and `send_bytes` send whatever they are told, for tests.

Invariants:
- One message at a time: with REPLY_ACK negotiated, each one is answered before the next is sent.
- A descriptor that arrives and is not asked for is closed.

A front-end belongs to one thread at a time.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from vhostd.errors import NotFoundError, UnavailableError, UsageError
from vhostd.protocol.features import ProtocolFeature, VirtioFeature
from vhostd.virtqueue.constants import FrontendRequest, MessageFlag, request_label
from vhostd.virtqueue.driver import SplitDriver
from vhostd.virtqueue.errors import BackendError
from vhostd.virtqueue.memory import GuestMemory, Region

__all__ = ["CONFIG_BYTES", "NO_FD", "Frontend", "Reply", "encode_region", "encode_table_message"]

HEADER = struct.Struct("=III")
"""request, flags, payload size."""
CONFIG_BYTES = 60
"""struct virtio_blk_config up to write_zeroes (virtio 1.3, 5.2.4)."""
NO_FD = 1 << 8
"""vhost-user.rst, SET_VRING_KICK: "invalid FD" flag."""

_MAX_REPLY_BYTES = 64 << 10
_MAX_REPLY_FDS = 8

DEFAULT_PROTOCOL_FEATURES = int(
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.STATUS
)
"""What the methods here can use. Others are negotiated only if they are asked for."""


class Reply(NamedTuple):
    """A message of the back-end."""

    request: int
    flags: int
    payload: bytes


def encode_region(region: Region) -> bytes:
    """ "Memory region description"."""
    return struct.pack(
        "=QQQQ", region.guest_address, region.size_bytes, region.user_address, region.mmap_offset
    )


def encode_table_message(regions: Sequence[Region]) -> bytes:
    """ "Memory regions description", the payload of SET_MEM_TABLE."""
    return struct.pack("=II", len(regions), 0) + b"".join(map(encode_region, regions))


class Frontend:
    """A connection to a back-end's socket.

    Attributes:
        offered, offered_protocol: what the back-end offers (after `negotiate`).
        features, protocol_features: what was agreed.
        max_queues: from GET_QUEUE_NUM; 1 without MQ.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout_s: float = 10.0) -> None:
        self.path = os.fspath(path)
        self.timeout_s = timeout_s
        self.offered = 0
        self.offered_protocol = 0
        self.features = 0
        self.protocol_features = 0
        self.max_queues = 1
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A blocking connect waits for room in the backlog; with Python's time-out it does not.
        whole_s = int(timeout_s)
        limit = struct.pack("@ll", whole_s, int((timeout_s - whole_s) * 1e6))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            self.socket.connect(self.path)
            self.socket.settimeout(timeout_s)
        except FileNotFoundError as error:
            self.socket.close()
            raise NotFoundError(
                f"there is no socket {self.path}; attach the volume, or start the daemon"
            ) from error
        except OSError as error:
            self.socket.close()
            # Python's own check of the path's length has no strerror.
            reason = error.strerror or str(error)
            raise UnavailableError(
                f"cannot connect to {self.path}: {reason}; is the daemon running?"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def fileno(self) -> int:
        return self.socket.fileno()

    # Messages

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends bytes as they are, with descriptors on the first of them."""
        try:
            sent = socket.send_fds(self.socket, [data], list(fds)) if fds else 0
            self.socket.sendall(data[sent:])
        except TimeoutError as error:
            raise UnavailableError(
                f"the back-end at {self.path} took no message for {self.timeout_s:g} s"
            ) from error
        except OSError as error:
            raise UnavailableError(
                f"the back-end at {self.path} closed the connection: {error.strerror}; its log "
                "has the reason"
            ) from error

    def send_message(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = MessageFlag.VERSION_1,
        size_bytes: int | None = None,
    ) -> None:
        """Sends one message; nothing is checked. `size_bytes` is what the header claims."""
        size = len(payload) if size_bytes is None else size_bytes
        self.send_bytes(HEADER.pack(request & 0xFFFFFFFF, flags, size) + payload, fds)

    def receive(self) -> Reply:
        """The next message of the back-end.

        Raises UnavailableError if it closes the connection or says nothing in time.
        """
        request, flags, size = HEADER.unpack(self._receive_exactly(HEADER.size))
        if size > _MAX_REPLY_BYTES:
            raise BackendError(
                f"the back-end at {self.path} announces a payload of {size} bytes for "
                f"{request_label(request)}"
            )
        return Reply(request, flags, self._receive_exactly(size))

    def _receive_exactly(self, len_bytes: int) -> bytes:
        data = b""
        while len(data) < len_bytes:
            try:
                piece, fds, _flags, _address = socket.recv_fds(
                    self.socket, len_bytes - len(data), _MAX_REPLY_FDS
                )
            except TimeoutError as error:
                raise UnavailableError(
                    f"the back-end at {self.path} did not answer for {self.timeout_s:g} s"
                ) from error
            except OSError as error:
                raise UnavailableError(
                    f"the connection to {self.path} failed: {error.strerror}"
                ) from error
            for fd in fds:
                os.close(fd)
            if not piece:
                raise UnavailableError(
                    f"the back-end at {self.path} closed the connection; its log has the reason"
                )
            data += piece
        return data

    def ask(self, request: FrontendRequest, payload: bytes = b"") -> bytes:
        """A request that has a reply of its own; returns the reply's payload."""
        self.send_message(request, payload)
        reply = self.receive()
        if reply.request != request or not reply.flags & MessageFlag.REPLY:
            raise BackendError(
                f"the back-end at {self.path} answered {request.name} with "
                f"{request_label(reply.request)}, flags {reply.flags:#x}"
            )
        return reply.payload

    def ask_u64(self, request: FrontendRequest, payload: bytes = b"") -> int:
        reply = self.ask(request, payload)
        if len(reply) != 8:
            raise BackendError(
                f"the back-end at {self.path} answered {request.name} with {len(reply)} bytes"
            )
        return int.from_bytes(reply, "little")

    def tell(self, request: FrontendRequest, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request without a reply. With REPLY_ACK its result is awaited.

        Raises BackendError if the back-end refuses it.
        """
        if not self.protocol_features & ProtocolFeature.REPLY_ACK:
            self.send_message(request, payload, fds)
            return
        result = self.tell_for_result(request, payload, fds)
        if result:
            raise BackendError(
                f"the back-end at {self.path} refused {request.name} (result {result}); its log "
                "has the reason"
            )

    def tell_for_result(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Sends a message with NEED_REPLY and returns the result: 0 means done."""
        flags = MessageFlag.VERSION_1 | MessageFlag.NEED_REPLY
        self.send_message(request, payload, fds, flags=flags)
        reply = self.receive()
        if reply.request != request or len(reply.payload) != 8:
            raise BackendError(
                f"the back-end at {self.path} answered {request_label(request)} with "
                f"{request_label(reply.request)} of {len(reply.payload)} bytes"
            )
        return int.from_bytes(reply.payload, "little")

    def tell_u64(self, request: FrontendRequest, value: int) -> None:
        self.tell(request, value.to_bytes(8, "little"))

    # Negotiation

    def negotiate(
        self, wanted: int, *, protocol_wanted: int = DEFAULT_PROTOCOL_FEATURES, owner: bool = True
    ) -> int:
        """Agrees on what is both offered and wanted; returns the virtio features."""
        self.read_offer(protocol_wanted)
        if owner:
            self.tell(FrontendRequest.SET_OWNER)
        self.set_features(self.offered & (wanted | VirtioFeature.PROTOCOL_FEATURES))
        return self.features

    def read_offer(self, protocol_wanted: int = DEFAULT_PROTOCOL_FEATURES) -> None:
        """GET_FEATURES, and protocol features with what follows from them."""
        self.offered = self.ask_u64(FrontendRequest.GET_FEATURES)
        if not self.offered & VirtioFeature.PROTOCOL_FEATURES:
            return
        self.offered_protocol = self.ask_u64(FrontendRequest.GET_PROTOCOL_FEATURES)
        agreed = self.offered_protocol & protocol_wanted
        self.tell_u64(FrontendRequest.SET_PROTOCOL_FEATURES, agreed)
        self.protocol_features = agreed
        if agreed & ProtocolFeature.MQ:
            self.max_queues = self.ask_u64(FrontendRequest.GET_QUEUE_NUM)

    def set_features(self, features: int) -> None:
        self.tell_u64(FrontendRequest.SET_FEATURES, features)
        self.features = features

    def has(self, feature: ProtocolFeature) -> bool:
        return bool(self.protocol_features & feature)

    # Config space

    def get_config(self, offset: int = 0, len_bytes: int = CONFIG_BYTES) -> bytes:
        """Bytes of the config space. Raises BackendError where the back-end has none."""
        payload = struct.pack("=III", offset, len_bytes, 0) + bytes(len_bytes)
        reply = self.ask(FrontendRequest.GET_CONFIG, payload)
        if len(reply) != len(payload):
            raise BackendError(
                f"the back-end at {self.path} has no config bytes {offset} to {offset + len_bytes}"
            )
        return reply[12:]

    def set_config(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        payload = struct.pack("=III", offset, len(data), flags) + data
        self.tell(FrontendRequest.SET_CONFIG, payload)

    # Memory

    def set_memory(self, memory: GuestMemory | Sequence[Region]) -> None:
        """SET_MEM_TABLE: at most 8 regions."""
        regions = memory.regions if isinstance(memory, GuestMemory) else memory
        if len(regions) > 8:
            raise UsageError("SET_MEM_TABLE takes 8 regions; add the others with ADD_MEM_REG")
        payload = encode_table_message(regions)
        self.tell(FrontendRequest.SET_MEM_TABLE, payload, [region.fd for region in regions])

    def add_region(self, region: Region) -> None:
        self.tell(FrontendRequest.ADD_MEM_REG, bytes(8) + encode_region(region), [region.fd])

    def remove_region(self, region: Region) -> None:
        self.tell(FrontendRequest.REM_MEM_REG, bytes(8) + encode_region(region))

    def max_mem_slots(self) -> int:
        return self.ask_u64(FrontendRequest.GET_MAX_MEM_SLOTS)

    # Rings

    def tell_vring(self, request: FrontendRequest, index: int, num: int) -> None:
        self.tell(request, struct.pack("=II", index, num))

    def tell_vring_fd(self, request: FrontendRequest, index: int, fd: int | None) -> None:
        value = index if fd is not None else index | NO_FD
        self.tell(request, struct.pack("=Q", value), [] if fd is None else [fd])

    def set_vring_addresses(self, index: int, queue: SplitDriver) -> None:
        user = queue.memory.user_address
        at = queue.addresses
        payload = struct.pack(
            "=IIQQQQ", index, 0, user(at.descriptor), user(at.used), user(at.available), 0
        )
        self.tell(FrontendRequest.SET_VRING_ADDR, payload)

    def start_vring(
        self, index: int, queue: SplitDriver, *, base: int = 0, enable: bool = True
    ) -> None:
        """Size, base, addresses, descriptors, enable: the order QEMU sends them in."""
        self.tell_vring(FrontendRequest.SET_VRING_NUM, index, queue.size)
        self.tell_vring(FrontendRequest.SET_VRING_BASE, index, base)
        self.set_vring_addresses(index, queue)
        self.tell_vring_fd(FrontendRequest.SET_VRING_ERR, index, queue.error_fd)
        self.tell_vring_fd(FrontendRequest.SET_VRING_CALL, index, queue.call_fd)
        self.tell_vring_fd(FrontendRequest.SET_VRING_KICK, index, queue.kick_fd)
        if enable and self.features & VirtioFeature.PROTOCOL_FEATURES:
            self.enable_vring(index, enabled=True)

    def enable_vring(self, index: int, *, enabled: bool) -> None:
        self.tell_vring(FrontendRequest.SET_VRING_ENABLE, index, int(enabled))

    def stop_vring(self, index: int) -> int:
        """GET_VRING_BASE: drains, stops, and returns the next available index."""
        payload = struct.pack("=II", index, 0)
        reply = self.ask(FrontendRequest.GET_VRING_BASE, payload)
        if len(reply) != 8:
            raise BackendError(f"the back-end at {self.path} has no vring {index}")
        _index, base = struct.unpack("=II", reply)
        return int(base)

    def stop_vrings(self, indexes: Iterable[int]) -> list[int]:
        return [self.stop_vring(index) for index in indexes]
