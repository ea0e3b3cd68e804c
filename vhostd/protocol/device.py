"""What a session needs of the engine, so that it can be tested without one.

`vhostd._native.Export` fulfils `Device`; the tests have a recording fake. Methods that reach a
worker may block: a session calls them from a helper thread, never two at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vhostd._native import MemoryRegion

__all__ = ["Device"]


class Device(Protocol):
    """The device side of one session; method for method `vhostd._native.Export`.

    Descriptors are duplicated by the callee. What the device refuses (a ring outside memory, an
    unmappable region) raises a `VhostdError` and changes nothing.
    """

    def set_memory(self, regions: Sequence[MemoryRegion]) -> None: ...
    def add_region(self, region: MemoryRegion) -> None: ...
    def remove_region(self, guest_address: int, user_address: int, size_bytes: int) -> None: ...
    def start_queue(
        self,
        index: int,
        *,
        size: int,
        descriptor_address: int,
        available_address: int,
        used_address: int,
        base: int,
        kick_fd: int | None,
        call_fd: int | None,
        error_fd: int | None,
        features: int,
        enabled: bool,
    ) -> None: ...
    def set_queue_enabled(self, index: int, enabled: bool) -> None: ...
    def set_queue_call(self, index: int, call_fd: int | None) -> None: ...
    def set_queue_kick(self, index: int, kick_fd: int | None) -> None: ...
    def set_queue_error(self, index: int, error_fd: int | None) -> None: ...
    def stop_queue(self, index: int) -> int: ...
    def set_write_cache(self, enabled: bool) -> None: ...
    def config_space(self, features: int) -> bytes: ...
    def features(self) -> int: ...
    def close(self) -> None: ...
