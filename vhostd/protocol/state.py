"""What a session has agreed with its front-end so far: features, memory, rings.

The steps that several requests share are here: starting, stopping and resetting rings. Requests
themselves are in `handlers`. Invariants are those of `session`. Event loop's thread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from vhostd.errors import VhostdError
from vhostd.protocol.device import Device
from vhostd.protocol.features import DeviceStatus, ProtocolFeature, VirtioFeature
from vhostd.protocol.memory import MemoryTable
from vhostd.protocol.messages import RefusedError, ViolationError, VringAddress

__all__ = ["CONFIG_WRITEBACK_OFFSET", "MAX_QUEUES", "MAX_QUEUE_SIZE", "Queue", "SessionState"]

MAX_QUEUES = 256
"""SET_VRING_KICK has 8 bits for a ring's index."""
MAX_QUEUE_SIZE = 32768
"""virtio 1.3, 2.7 (split virtqueues)."""
CONFIG_WRITEBACK_OFFSET = 32
"""Offset of `writeback` in struct virtio_blk_config: virtio 1.3, 5.2.4."""


@dataclass(slots=True)
class Queue:
    """A ring. The descriptors are owned; `kick_given` with no `kick_fd` means polling."""

    index: int
    size: int | None = None
    address: VringAddress | None = None
    base: int = 0
    kick_given: bool = False
    kick_fd: int | None = None
    call_fd: int | None = None
    error_fd: int | None = None
    enabled: bool = False
    started: bool = False

    def set_kick(self, fd: int | None, *, given: bool) -> None:
        _close(self.kick_fd)
        self.kick_fd, self.kick_given = fd, given

    def set_call(self, fd: int | None) -> None:
        _close(self.call_fd)
        self.call_fd = fd

    def set_error(self, fd: int | None) -> None:
        _close(self.error_fd)
        self.error_fd = fd


class SessionState:
    """Attributes:
    device: the engine's side.
    engine: runs a method of `device` in a helper thread.
    features: acknowledged with SET_FEATURES, bit 30 included; 0 before.
    features_refused: the last SET_FEATURES asked for what is not offered (see SET_STATUS).
    write_cache: as the engine has it.
    wanted_write_cache: as the guest last wrote `writeback`; survives a device reset, because
        front-ends cache it (QEMU does) and reset devices for a mere pause: turning the cache on
        behind the guest's back would make its writes less durable than it was told.
    """

    def __init__(
        self,
        device: Device,
        *,
        queues: int,
        engine: Callable[..., Awaitable[Any]],
        on_write_cache: Callable[[bool], Awaitable[None]] | None = None,
    ) -> None:
        if not 1 <= queues <= MAX_QUEUES:
            raise ValueError(f"queues must be 1 to {MAX_QUEUES}, not {queues}")
        self.device = device
        self.engine = engine
        self._on_write_cache = on_write_cache
        # A plain integer: the complement of a flag enumeration has only the bits with names.
        self.offered = int(device.features() | VirtioFeature.PROTOCOL_FEATURES)
        self.features = 0
        self.features_negotiated = False
        self.features_refused = False
        self.protocol_features = 0
        self.protocol_negotiated = False
        self.owned = False
        self.status = DeviceStatus(0)
        self.memory = MemoryTable()
        self.queues = [Queue(index) for index in range(queues)]
        config = device.config_space(device.features())
        self.write_cache = (
            len(config) > CONFIG_WRITEBACK_OFFSET and config[CONFIG_WRITEBACK_OFFSET] != 0
        )
        self.wanted_write_cache = self.write_cache

    def has(self, feature: ProtocolFeature) -> bool:
        return bool(self.protocol_features & feature)

    @property
    def any_started(self) -> bool:
        return any(queue.started for queue in self.queues)

    @property
    def virtio_features(self) -> int:
        """The features the engine knows of: without vhost-user's bit 30."""
        return self.features & ~VirtioFeature.PROTOCOL_FEATURES

    def queue(self, index: int) -> Queue:
        if index >= len(self.queues):
            raise ViolationError(
                f"vring {index} does not exist; this export has {len(self.queues)}, 0 to "
                f"{len(self.queues) - 1}"
            )
        return self.queues[index]

    def is_enabled(self, queue: Queue) -> bool:
        """ "Ring states": without VHOST_USER_F_PROTOCOL_FEATURES a ring starts enabled."""
        return queue.enabled or not self.features & VirtioFeature.PROTOCOL_FEATURES

    async def ask(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Calls the engine; what it refuses is refused to the front-end."""
        try:
            return await self.engine(function, *args, **kwargs)
        except VhostdError as error:
            raise RefusedError(str(error)) from error

    async def start_if_ready(self, queue: Queue) -> None:
        """Starts a ring that has size, addresses and its kick; RefusedError if it cannot start."""
        address = queue.address
        if queue.started or not queue.kick_given or queue.size is None or address is None:
            return
        if not self.memory.regions:
            raise RefusedError(
                f"vring {queue.index} cannot start without guest memory; send SET_MEM_TABLE or "
                "ADD_MEM_REG first"
            )
        await self.ask(
            self.device.start_queue,
            queue.index,
            size=queue.size,
            descriptor_address=address.descriptor,
            available_address=address.available,
            used_address=address.used,
            base=queue.base,
            kick_fd=queue.kick_fd,
            call_fd=queue.call_fd,
            error_fd=queue.error_fd,
            features=self.virtio_features,
            enabled=self.is_enabled(queue),
        )
        queue.started = True

    async def stop(self, queue: Queue) -> int:
        """Drains and stops a ring; returns the next available index. It needs a new kick to start.

        An engine that cannot stop a ring ends the session: memory must not be unmapped under it
        by the front-end's next request.
        """
        if queue.started:
            queue.base = await self.engine(self.device.stop_queue, queue.index)
            queue.started = False
        queue.set_kick(None, given=False)
        return queue.base

    async def set_write_cache(self, enabled: bool) -> None:
        if enabled != self.write_cache:
            await self.ask(self.device.set_write_cache, enabled)
            self.write_cache = enabled

    async def change_write_cache(self, wanted: bool) -> None:
        """What the guest wants from now on, beyond resets and reconnects."""
        await self.set_write_cache(wanted)
        if wanted != self.wanted_write_cache:
            if self._on_write_cache is not None:
                await self._on_write_cache(wanted)
            self.wanted_write_cache = wanted

    async def reset_device(self) -> None:
        """Device reset: rings stopped and disabled, virtio features and status forgotten.

        What belongs to the session stays, because front-ends do not send it again: protocol
        features with bit 30, memory, and the call and error descriptors.
        """
        for queue in self.queues:
            await self.stop(queue)
            queue.size = None
            queue.address = None
            queue.base = 0
            queue.enabled = False
        self.features &= VirtioFeature.PROTOCOL_FEATURES
        self.features_negotiated = False
        self.features_refused = False
        self.status = DeviceStatus(0)
        await self.set_write_cache(self.wanted_write_cache)

    def close_fds(self) -> None:
        for queue in self.queues:
            queue.set_kick(None, given=False)
            queue.set_call(None)
            queue.set_error(None)


def _close(fd: int | None) -> None:
    if fd is not None:
        with contextlib.suppress(OSError):
            os.close(fd)
