"""What storage needs of the engine, so that policy can be tested without it.

`vhostd._native` fulfils these protocols; the tests have a small fake. Calls that reach a worker or
a disk block: the daemon makes them from helper threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from vhostd.protocol.device import Device as ExportDevice

if TYPE_CHECKING:
    from vhostd._native import (
        CheckpointResult,
        CheckpointState,
        ParentSnapshot,
        SegmentInfo,
        SegmentRow,
        SuperblockInfo,
    )

__all__ = ["Engine", "EngineDevice", "EngineVolume", "ExportDevice", "FormatDevice"]


class FormatDevice(Protocol):
    """`vhostd._native.format_device`."""

    def __call__(
        self,
        path: str,
        /,
        *,
        pool_uuid: bytes,
        device_uuid: bytes,
        pool_name: str,
        segment_bytes: int,
    ) -> None: ...


class EngineDevice(Protocol):
    """`vhostd._native.Device`."""

    @property
    def index(self) -> int: ...
    @property
    def superblock(self) -> SuperblockInfo: ...
    def grant_segment_numbers(self, first: int, end: int, /) -> None: ...
    def list_segments(self) -> list[int]: ...
    def identify_segment(self, number: int, /) -> SegmentInfo: ...
    def remove_segment(self, number: int, /) -> None: ...
    def space(self) -> tuple[int, int]: ...
    def close(self) -> None: ...


class EngineVolume(Protocol):
    """`vhostd._native.Volume`."""

    @property
    def recovered(self) -> dict[str, Any]: ...
    def write_zeroes(self, offset: int, length: int, /) -> None: ...
    def flush(self) -> None: ...
    def resize(self, size_bytes: int, /) -> None: ...
    def checkpoint(self) -> CheckpointResult: ...
    def checkpoint_committed(self, checkpoint_id: int, /) -> None: ...
    def checkpoint_failed(self, checkpoint_id: int, /) -> None: ...
    def snapshot(self, *, uuid: bytes, name: str, created_ns: int) -> int: ...
    def note_state(self, payload: bytes, /, *, write: bool = True) -> None: ...
    def set_parent(self, parent: ParentSnapshot | None, /) -> None: ...
    def hold_nodes(self) -> None: ...
    def release_nodes(self) -> None: ...
    def adopt(self, offset: int, length: int, /) -> int: ...
    def foreign_blocks(self) -> int: ...
    def set_limit(self, limit_bytes: int | None, /) -> None: ...
    def set_reclaim(self, *, bytes_per_second: int, enabled: bool = True) -> None: ...
    def set_pause_when_full(self, pause: bool, /) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self) -> CheckpointResult | None: ...
    def export(
        self, *, export_id: int, queues: int, read_only: bool, write_cache: bool = True
    ) -> ExportDevice: ...


class Engine(Protocol):
    """`vhostd._native.Engine`. `device` is what its own `open_device` returned."""

    def event_fd(self) -> int: ...
    def take_events(self) -> list[dict[str, Any]]: ...
    def open_device(self, path: str, /, *, direct: bool = True) -> EngineDevice: ...
    def open_volume(
        self,
        device: Any,
        /,
        *,
        volume_uuid: bytes,
        name: str,
        size_bytes: int,
        logical_block_bytes: int,
        serial: str,
        previous_epoch: int,
        epoch: int,
        read_only: bool,
        checkpoint: CheckpointState,
        mapped_blocks: int,
        segments: Sequence[SegmentRow],
        uncatalogued: Sequence[int],
        checkpoint_log_bytes: int = ...,
        parent: ParentSnapshot | None = ...,
        newest_snapshot: int = ...,
        state_note: bytes = ...,
        clone: bool = ...,
        limit_bytes: int | None = ...,
        pause_when_full: bool = ...,
    ) -> EngineVolume: ...
    def difference(
        self,
        device: Any,
        /,
        *,
        old: bytes,
        new: bytes,
        start: int = ...,
        end: int = ...,
        limit: int = ...,
    ) -> tuple[list[tuple[int, int, bool]], int | None]: ...
    def exclusive(
        self, device: Any, /, *, root: bytes, others: Sequence[bytes]
    ) -> tuple[int, int]: ...
    def release_exclusive(
        self, volume: Any, /, *, root: bytes, others: Sequence[bytes]
    ) -> tuple[int, int]: ...
    def stats(self) -> dict[str, Any]: ...
    def shutdown(self) -> None: ...
