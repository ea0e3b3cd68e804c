"""An open volume: its epoch, its checkpoints, its snapshots, its end.

A volume:   closed ──open (epoch + 1 in the catalog, recovery)──▶ open ──close──▶ closed
                                            checkpoint ↺   snapshot ↺

Invariants:
- The new epoch is in the catalog before the engine opens the volume.
- A checkpoint's removed segments lose their files only after the catalog has committed it; when
  the catalog refuses it, the engine is told, and nothing is lost but the work.
- Checkpoints of a volume are one at a time, and none begins after `close` has.
- A snapshot's note is durable in the log before the catalog has its row, and no checkpoint is
  committed between the two: a checkpoint never gives a root to a snapshot without a row.
- What the state note says is changed in the catalog first (which marks the note as out of date),
  then in the log: a crash in between is made good when the volume is opened again.

Any thread may call; calls block. Locks are taken in the order checkpoint, commit; a snapshot takes
the second only, so it waits for no checkpoint to be written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

from vhostd.errors import BusyError, UsageError, VhostdError
from vhostd.storage.catalog import Catalog
from vhostd.storage.engine import EngineVolume, ExportDevice
from vhostd.storage.rows import SnapshotRow, VolumeRow
from vhostd.storage.sizes import format_size
from vhostd.storage.statenote import state_note

if TYPE_CHECKING:
    from vhostd._native import CheckpointResult

__all__ = [
    "LOGICAL_BLOCK_SIZES",
    "MAX_SIZE_BYTES",
    "SERIAL_MAX_BYTES",
    "OpenSnapshot",
    "OpenVolume",
    "check_size",
]

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
        self._commit_lock = threading.RLock()
        self._closed = False
        self.limit_bytes: int | None = None
        self.at_limit = False
        """The engine told that writes find no space, for the volume's limit."""
        self.device_full = False
        """It told so of the device."""
        self._log = structlog.get_logger().bind(volume=self.name)

    @property
    def name(self) -> str:
        """`pool/volume`."""
        return f"{self._pool_name}/{self.row.name}"

    @property
    def is_full(self) -> bool:
        """Writes to new space fail, or wait."""
        return self.at_limit or self.device_full

    @property
    def recovered(self) -> dict[str, Any]:
        """What recovery did when the volume was opened."""
        return self._engine.recovered

    @property
    def engine(self) -> EngineVolume:
        """For the walks over maps that the engine does for an open volume."""
        return self._engine

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

    def checkpoint(self, *, if_needed: bool = False, released: Sequence[UUID] = ()) -> bool:
        """Writes a checkpoint and commits it. False: nothing to do.

        released: see `Catalog.commit_checkpoint`.

        Raises:
            InternalError: it broke an invariant of the catalog; the one before still holds.
            NoSpaceError, DeviceError: it could not be written; the one before still holds.
        """
        with self._lock:
            if self._closed:
                return False
            if if_needed and not self._engine.stats().get("log_bytes_since_checkpoint", 1):
                return False
            self._commit(self._engine.checkpoint(), released)
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
            self.note_state()

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
        self.note_state()

    # Snapshots

    def snapshot(
        self,
        *,
        uuid: UUID,
        name: str,
        created_ns: int,
        quiesced: bool = False,
        guid: UUID | None = None,
    ) -> SnapshotRow:
        """Takes a snapshot; requests that have completed are in it. It is pending until the next
        checkpoint. guid: of the snapshot elsewhere whose contents it has.

        Raises:
            BusyError: the engine has as many pending ones as it can hold; make a checkpoint.
            NoSpaceError, DeviceError: there is no snapshot.
        """
        with self._commit_lock:
            self._refuse_closed()
            position = self._engine.snapshot(uuid=uuid.bytes, name=name, created_ns=created_ns)
            made = self._catalog.snapshots.add(
                self.uuid,
                uuid=uuid,
                name=name,
                position=position,
                size_bytes=self.row.size_bytes,
                created_ns=created_ns,
                quiesced=quiesced,
                guid=guid,
            )
            if guid is not None:
                self.note_state()
            else:
                # Its own note is in the log; this is for when the engine has to repeat the state.
                self._note(write=False)
        return made

    def take_over_found(self) -> None:
        """After opening: rows for snapshots that only the log knew, and a state note if need be."""
        with self._commit_lock:
            for made in self._catalog.snapshots.add_found(
                self.uuid, self._engine.recovered["snapshots"]
            ):
                self._log.warning(
                    "a snapshot that was being made when the daemon ended is there", name=made.name
                )
                self._note(write=False)
            if not self._catalog.volume(self.row.name).state_noted:
                self.note_state()

    def change_noted(self, change: Callable[[], None]) -> None:
        """Does a change to the catalog that the state note tells, and then writes that."""
        with self._commit_lock:
            change()
            self.row = self._catalog.volume_by_uuid(self.uuid)
            self.note_state()

    def note_state(self) -> None:
        """Writes the state note.

        What fails is made good when the volume is opened again; until then a rebuild of the catalog
        from segments would know what was before.
        """
        with self._commit_lock:
            if self._closed:
                return
            try:
                self._note(write=True)
            except VhostdError as error:
                self._log.warning(
                    "the state note could not be written; it is at the next opening",
                    error=str(error),
                )
            else:
                self._catalog.state_noted(self.uuid)

    def _note(self, *, write: bool) -> None:
        self._engine.note_state(state_note(self._catalog, self.uuid), write=write)

    def leave(self, snapshot: UUID) -> None:
        """Before the space of a snapshot is freed: the head, if it descends from it, descends from
        its parent from now on. The catalog's last checkpoint has a root of the snapshot."""
        with self._commit_lock:
            if self._catalog.volume_by_uuid(self.uuid).parent != snapshot:
                return
            self._catalog.snapshots.begin_release(snapshot)
            # No snapshot can be taken before the engine knows, and none is pending: the parent of
            # one with a root has one too.
            self._engine.set_parent(self._catalog.snapshots.head_parent(self.uuid))

    @contextmanager
    def nodes_held(self) -> Iterator[None]:
        """Nodes of a checkpoint committed within stay readable to the end."""
        self._engine.hold_nodes()
        try:
            yield
        finally:
            self._engine.release_nodes()

    def set_limit(self, limit_bytes: int | None) -> None:
        """Bytes that its segments may take."""
        with self._commit_lock:
            if limit_bytes == self.limit_bytes or self._closed:
                return
            self._engine.set_limit(limit_bytes)
            self.limit_bytes = limit_bytes

    def set_on_full(self, row: VolumeRow) -> None:
        """Takes over the row after its settings have changed."""
        with self._commit_lock:
            self.row = row
            if not self._closed:
                self._engine.set_pause_when_full(row.on_full == "pause")

    def close(self) -> None:
        """Flushes, checkpoints and closes. Exports must be closed before.

        Raises:
            InternalError, NoSpaceError, DeviceError: the volume is closed as after a crash: the
                next opening recovers from the log what was flushed, and what was staged.
        """
        with self._lock:
            if self._closed:
                return
            with self._commit_lock:
                self._closed = True
            result = self._engine.close()
            if result is not None:
                self._commit(result)

    def _commit(self, result: CheckpointResult, released: Sequence[UUID] = ()) -> None:
        try:
            with self._commit_lock:
                self._catalog.commit_checkpoint(self.uuid, self.epoch, result, released=released)
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


class OpenSnapshot:
    """A snapshot that is open for reading. Made by `Pool.open_snapshot`, which owns it."""

    epoch = 0

    def __init__(self, *, name: str, row: SnapshotRow, engine: EngineVolume) -> None:
        self.name = name
        self.uuid = row.uuid
        self.row = row
        self._engine = engine

    @property
    def recovered(self) -> dict[str, Any]:
        """Nothing is recovered: no log is read."""
        return self._engine.recovered

    def stats(self) -> dict[str, Any]:
        """The engine's counters."""
        return self._engine.stats()

    def export(
        self, *, export_id: int, queues: int, read_only: bool, write_cache: bool = True
    ) -> ExportDevice:
        """The device side of one session.

        Raises:
            UsageError: it is to be written to.
        """
        if not read_only:
            raise UsageError(f"snapshot {self.name} cannot be written to; clone it")
        return self._engine.export(
            export_id=export_id, queues=queues, read_only=True, write_cache=write_cache
        )

    def close(self) -> None:
        """Closes it; there is nothing to write."""
        self._engine.close()
