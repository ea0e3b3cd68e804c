"""An open volume: its epoch, its checkpoints, its end.

A volume:   closed ──open (epoch + 1 in the catalog, recovery)──▶ open ──close──▶ closed
                                                          checkpoint ↺

Invariants:
- The new epoch is in the catalog before the engine opens the volume.
- A checkpoint's removed segments lose their files only after the catalog has committed it; when
  the catalog refuses it, the engine is told, and nothing is lost but the work.
- Checkpoints of a volume are one at a time, and none begins after `close` has.

Any thread may call; calls block.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import structlog

from vhostd.errors import BusyError, UsageError
from vhostd.storage.catalog import Catalog, VolumeRow
from vhostd.storage.engine import EngineVolume, ExportDevice
from vhostd.storage.sizes import format_size

if TYPE_CHECKING:
    from vhostd._native import CheckpointResult

__all__ = ["LOGICAL_BLOCK_SIZES", "MAX_SIZE_BYTES", "SERIAL_MAX_BYTES", "OpenVolume", "check_size"]

LOGICAL_BLOCK_SIZES = (512, 4096)
MAX_SIZE_BYTES = 64 << 40
SERIAL_MAX_BYTES = 20
"""virtio 1.3, 5.2.6: the ID string of GET_ID."""


def check_size(name: str, size_bytes: int, logical_block_bytes: int) -> None:
    """Refuses what cannot be the size of a volume.

    Raises:
        UsageError: and why.
    """
    if logical_block_bytes not in LOGICAL_BLOCK_SIZES:
        raise UsageError(
            f"volume {name}: a logical block of {logical_block_bytes} bytes is not possible; "
            "choose 512 or 4096"
        )
    if size_bytes <= 0:
        raise UsageError(f"volume {name}: a size of {size_bytes} bytes is not possible; give more")
    if size_bytes % logical_block_bytes:
        up = -(-size_bytes // logical_block_bytes) * logical_block_bytes
        raise UsageError(
            f"volume {name}: {size_bytes} bytes are not a multiple of its logical block of "
            f"{logical_block_bytes}; {up} would be"
        )
    if size_bytes > MAX_SIZE_BYTES:
        raise UsageError(
            f"volume {name}: {format_size(size_bytes)} is more than a volume can have "
            f"({format_size(MAX_SIZE_BYTES)}); choose less"
        )


class OpenVolume:
    """A volume that is open in the engine. Made by `Pool.open_volume`, which owns it."""

    def __init__(
        self, *, pool_name: str, row: VolumeRow, epoch: int, catalog: Catalog, engine: EngineVolume
    ) -> None:
        self.uuid = row.uuid
        self.row = row
        self.epoch = epoch
        self._pool_name = pool_name
        self._catalog = catalog
        self._engine = engine
        self._lock = threading.Lock()
        self._closed = False
        self._log = structlog.get_logger().bind(volume=self.name)

    @property
    def name(self) -> str:
        """`pool/volume`."""
        return f"{self._pool_name}/{self.row.name}"

    @property
    def recovered(self) -> dict[str, Any]:
        """What recovery did when the volume was opened."""
        return self._engine.recovered

    def stats(self) -> dict[str, Any]:
        """The engine's counters."""
        return self._engine.stats()

    def export(
        self, *, export_id: int, queues: int, read_only: bool, write_cache: bool = True
    ) -> ExportDevice:
        """The device side of one session."""
        return self._engine.export(
            export_id=export_id, queues=queues, read_only=read_only, write_cache=write_cache
        )

    def checkpoint(self, *, if_needed: bool = False) -> bool:
        """Writes a checkpoint and commits it. False: nothing to do.

        Raises:
            InternalError: it broke an invariant of the catalog; the one before still holds.
            NoSpaceError, DeviceError: it could not be written; the one before still holds.
        """
        with self._lock:
            if self._closed:
                return False
            if if_needed and not self._engine.stats().get("log_bytes_since_checkpoint", 1):
                return False
            self._commit(self._engine.checkpoint())
            return True

    def resize(self, size_bytes: int) -> None:
        """Grows the volume while it is open; what is new reads as zeroes."""
        with self._lock:
            self._refuse_closed()
            # The catalog first: a guest must not write where a reopened volume would end.
            self._catalog.resize_volume(self.uuid, size_bytes)
            try:
                self._engine.resize(size_bytes)
            except BaseException:
                self._catalog.resize_volume(self.uuid, self.row.size_bytes)
                raise
            self.row = self._catalog.volume(self.row.name)

    def erase_from(self, offset_bytes: int) -> None:
        """Makes everything from `offset_bytes` to the end read as zeroes, durably."""
        step_bytes = 1 << 30
        with self._lock:
            self._refuse_closed()
            for start in range(offset_bytes, self.row.size_bytes, step_bytes):
                length = min(step_bytes, self.row.size_bytes - start)
                self._engine.write_zeroes(start, length)
            self._engine.flush()

    def renamed(self, row: VolumeRow) -> None:
        """Takes over the row after a rename; log lines and new exports carry the new name."""
        self.row = row
        self._log = structlog.get_logger().bind(volume=self.name)

    def close(self) -> None:
        """Flushes, checkpoints and closes. Exports must be closed before.

        Raises:
            InternalError, NoSpaceError, DeviceError: the volume is closed as after a crash: the
                next opening recovers from the log what was flushed, and what was staged.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            result = self._engine.close()
            if result is not None:
                self._commit(result)

    def _commit(self, result: CheckpointResult) -> None:
        try:
            self._catalog.commit_checkpoint(self.uuid, self.epoch, result)
        except BaseException:
            self._engine.checkpoint_failed(result["id"])
            raise
        self._engine.checkpoint_committed(result["id"])
        self._log.debug(
            "checkpoint committed",
            sequence=result["state"]["sequence"],
            mapped_blocks=result["mapped_blocks"],
            segments_changed=len(result["changed"]),
            segments_removed=len(result["removed"]),
        )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise BusyError(f"volume {self.name} is being closed; try again")
