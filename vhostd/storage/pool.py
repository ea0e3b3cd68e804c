"""A pool: one device, its catalog, and the volumes that are open.

Invariants:
- A pool is open in one process: the engine locks the device before the catalog is touched.
- Superblock and catalog agree on the pool, and the catalog is not older than the device.
- Segment numbers are granted in the catalog before the engine has them.
- A segment whose owner is not known is reported and kept. Removing a volume is a commit first
  (`removing`), then files, then a commit that forgets it; opening a pool finishes what a crash
  interrupted.

Any thread may call; calls block, and those that change which volumes are open wait for each other.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog

from vhostd.errors import (
    BusyError,
    DamagedError,
    DeviceError,
    NotFoundError,
    UsageError,
    VhostdError,
)
from vhostd.storage.catalog import Catalog
from vhostd.storage.create import DEFAULT_SEGMENT_BYTES, create_pool, is_pool, remove_ours
from vhostd.storage.engine import Engine, EngineDevice
from vhostd.storage.names import check_name
from vhostd.storage.rows import PoolRow, SnapshotRow, VolumeRow, no_checkpoint
from vhostd.storage.sizes import format_size
from vhostd.storage.snapshots import Snapshots
from vhostd.storage.space import Space, segment_path
from vhostd.storage.statenote import state_note
from vhostd.storage.volume import SERIAL_MAX_BYTES, OpenSnapshot, OpenVolume, check_size

__all__ = ["DEFAULT_SEGMENT_BYTES", "GRANT_SEGMENTS", "Pool", "create_pool", "is_pool"]

GRANT_SEGMENTS = 65536
DEFAULT_CHECKPOINT_LOG_BYTES = 256 << 20
DEFAULT_RECLAIM_BYTES_PER_SECOND = 256 << 20
BLOCK_BYTES = 4096


@dataclass(slots=True)
class _Opened:
    volume: OpenVolume
    users: int = 0
    background: int = 0
    """Of the users, those that free space or copy: nobody has it attached for them."""


@dataclass(slots=True)
class Findings:
    """What is on the device and has no owner. Kept; `vhostctl check` tells more."""

    unknown_volume: list[int] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)


class Pool:
    """An open pool. Make it with `open`, and close it."""

    def __init__(
        self,
        *,
        path: Path,
        engine: Engine,
        device: EngineDevice,
        catalog: Catalog,
        staging_dir: Path,
        checkpoint_log_bytes: int,
        reclaim_bytes_per_second: int,
    ) -> None:
        self.path = path
        self.device = device
        self.catalog = catalog
        row = catalog.pool()
        self.uuid, self.name = row.uuid, row.name
        self.findings = Findings()
        self.engine = engine
        self._staging_dir = staging_dir / str(row.uuid)
        self._checkpoint_log_bytes = checkpoint_log_bytes
        self._reclaim_bytes_per_second = reclaim_bytes_per_second
        self.lock = threading.RLock()
        self._opened: dict[UUID, _Opened] = {}
        self._open_snapshots: dict[UUID, tuple[OpenSnapshot, int]] = {}
        self._pins: Counter[UUID] = Counter()
        self._log = structlog.get_logger().bind(pool=row.name)
        self.snapshots = Snapshots(self)
        self.space = Space(self)

    @classmethod
    def open(
        cls,
        path: Path,
        engine: Engine,
        *,
        staging_dir: Path,
        direct: bool = True,
        checkpoint_log_bytes: int = DEFAULT_CHECKPOINT_LOG_BYTES,
        reclaim_bytes_per_second: int = DEFAULT_RECLAIM_BYTES_PER_SECOND,
    ) -> Pool:
        """Locks the device, opens the catalog, and sorts out what a crash left.

        Raises:
            NotFoundError: there is no pool.
            BusyError: another process has it open.
            DamagedError: superblock or catalog is damaged, or they do not belong together.
            UnsupportedError: a newer vhostd made it.
            DeviceError: the operating system refused something.
        """
        if not is_pool(path):
            raise NotFoundError(
                f"{path} is no pool: it has no superblock; `vhostctl pool create` makes one"
            )
        device = engine.open_device(str(path.absolute()), direct=direct)
        catalog = None
        try:
            catalog = Catalog.open(path)
            pool = cls(
                path=path,
                engine=engine,
                device=device,
                catalog=catalog,
                staging_dir=staging_dir,
                checkpoint_log_bytes=checkpoint_log_bytes,
                reclaim_bytes_per_second=reclaim_bytes_per_second,
            )
            pool._check_agreement()
            pool._sort_out()
            pool.grant_segments()
        except BaseException:
            if catalog is not None:
                catalog.close()
            device.close()
            raise
        return pool

    def close(self) -> list[VhostdError]:
        """Closes all volumes and the device, whatever happens; returns what went wrong."""
        errors = []
        with self.lock:
            for snapshot, _ in self._open_snapshots.values():
                snapshot.close()
            self._open_snapshots.clear()
            for opened in list(self._opened.values()):
                try:
                    opened.volume.close()
                except VhostdError as error:
                    self._log.error(
                        "volume could not be closed cleanly; its next opening recovers it",
                        volume=opened.volume.name,
                        error=str(error),
                    )
                    errors.append(error)
            self._opened.clear()
            self.catalog.close()
            self.device.close()
        return errors

    def grant_segments(self) -> None:
        """Gives the engine segment numbers, the catalog first."""
        self.device.grant_segment_numbers(*self.catalog.grant_segments(GRANT_SEGMENTS))

    # Volumes

    def create_volume(
        self,
        name: str,
        size_bytes: int,
        *,
        logical_block_bytes: int = 512,
        serial: str | None = None,
    ) -> VolumeRow:
        """Makes a volume that reads as zeroes.

        Raises:
            UsageError: name, size, block size or serial is not possible.
            ExistsError: the name is taken.
        """
        check_name(name, "volume")
        check_size(f"{self.name}/{name}", size_bytes, logical_block_bytes)
        if serial is not None and not (
            serial.isascii() and serial.isprintable() and len(serial) <= SERIAL_MAX_BYTES
        ):
            raise UsageError(
                f"volume {self.name}/{name}: serial {serial!r} is not possible; "
                f"choose at most {SERIAL_MAX_BYTES} printable ASCII characters"
            )
        return self.catalog.add_volume(
            name=name,
            size_bytes=size_bytes,
            logical_block_bytes=logical_block_bytes,
            serial=serial,
        )

    def open_volume(self, name: str) -> OpenVolume:
        """Opens a volume, or takes it as one more user if it is open; end with `release_volume`.

        Raises:
            NotFoundError: there is no such volume.
            DamagedError: segments are missing, or recovery found damage.
            NoSpaceError, DeviceError: it could not be opened; nothing is lost, try again.
        """
        with self.lock:
            return self._use(self.catalog.volume(name), background=False)

    def _use(self, row: VolumeRow, *, background: bool) -> OpenVolume:
        opened = self._opened.get(row.uuid)
        if opened is None:
            volume = self._open_volume(row)
            opened = self._opened[row.uuid] = _Opened(volume)
            try:
                volume.take_over_found()
            except BaseException:
                del self._opened[row.uuid]
                volume.close()
                raise
        opened.users += 1
        opened.background += background
        return opened.volume

    @contextmanager
    def using(self, name: str) -> Iterator[OpenVolume]:
        """A volume that is open for as long; opened and closed if nobody else has it."""
        volume = self.open_volume(name)
        try:
            yield volume
        finally:
            self.release_volume(volume)

    @contextmanager
    def using_uuid(self, uuid: UUID, *, background: bool) -> Iterator[OpenVolume]:
        """As `using`; background: for work that nobody waits for."""
        with self.lock:
            row = self.catalog.volume_by_uuid(uuid)
            if row.state != "present":
                raise NotFoundError(f"volume {self.name}/{row.name} is being removed")
            volume = self._use(row, background=background)
        try:
            yield volume
        finally:
            self.release_volume(volume, background=background)

    # Snapshots that are open, or must not go

    def open_snapshot(self, volume: str, name: str) -> OpenSnapshot:
        """Opens a snapshot for reading; end with `release_volume`.

        Raises:
            NotFoundError: there is no such snapshot.
        """
        while True:
            row, root = self.snapshots.with_root(volume, name)
            with self.lock:
                # It may have gone, or have another name, since its root was asked for.
                if self.snapshots.find(volume, name).uuid != row.uuid:
                    continue
                snapshot, users = self._open_snapshots.get(row.uuid, (None, 0))
                if snapshot is None:
                    of = self.catalog.volume(volume)
                    snapshot = self._open_snapshot(of, row, root)
                self._open_snapshots[row.uuid] = (snapshot, users + 1)
                return snapshot

    def _open_snapshot(self, of: VolumeRow, row: SnapshotRow, root: bytes) -> OpenSnapshot:
        name = f"{of.name}@{row.name}"
        engine = self.engine.open_volume(
            self.device,
            volume_uuid=row.uuid.bytes,
            name=name,
            size_bytes=row.size_bytes,
            logical_block_bytes=of.logical_block_bytes,
            # A guest tells disks apart by it, and may have the volume and its snapshot at once.
            serial=row.uuid.hex[:SERIAL_MAX_BYTES],
            previous_epoch=0,
            epoch=1,
            read_only=True,
            checkpoint={**no_checkpoint().state, "root": root},
            mapped_blocks=row.mapped_blocks,
            segments=[],
            uncatalogued=[],
        )
        return OpenSnapshot(name=f"{self.name}/{name}", row=row, engine=engine)

    def open_snapshots(self) -> list[OpenSnapshot]:
        """The snapshots that are open now."""
        return [snapshot for snapshot, _ in list(self._open_snapshots.values())]

    def snapshot_in_use(self, uuid: UUID) -> bool:
        """Whether a snapshot is open, or something walks it."""
        return uuid in self._open_snapshots or self._pins[uuid] > 0

    @contextmanager
    def pinned(self, uuid: UUID) -> Iterator[None]:
        """A snapshot that cannot be removed for as long.

        Raises:
            NotFoundError: it is being removed already.
        """
        with self.lock:
            row = self.catalog.snapshots.get(uuid)
            if row is None or row.state == "removing":
                raise NotFoundError(
                    f"snapshot {self.catalog.snapshots.full_name(uuid)} is being removed; "
                    "`vhostctl snapshot list` shows those that exist"
                )
            self._pins[uuid] += 1
        try:
            yield
        finally:
            with self.lock:
                self._pins[uuid] -= 1
                self._pins += Counter()

    def _open_volume(self, row: VolumeRow) -> OpenVolume:
        on_device = set(self.device.list_segments())
        segments = self.catalog.segments(row.uuid)
        missing = [s["number"] for s in segments if s["live"] and s["number"] not in on_device]
        if missing:
            raise DamagedError(
                f"volume {self.name}/{row.name}: {len(missing)} segments with data are missing "
                f"from {self.path} (the first is {missing[0]}); restore them from a copy of the "
                "device, and open it again"
            )
        uncatalogued = [
            number
            for number in sorted(on_device - self.catalog.segment_numbers())
            if self.owns_segment(number, row)
        ]
        checkpoint = self.catalog.checkpoint(row.uuid)
        epoch = self.catalog.next_epoch(row.uuid)
        volume = self.engine.open_volume(
            self.device,
            volume_uuid=row.uuid.bytes,
            name=row.name,
            size_bytes=row.size_bytes,
            logical_block_bytes=row.logical_block_bytes,
            serial=row.serial,
            previous_epoch=row.epoch,
            epoch=epoch,
            # An attachment that only reads opens the volume like any other: recovery has to seal
            # the log and drain what is staged, and the guest's writes are refused by its export.
            read_only=False,
            checkpoint=checkpoint.state,
            mapped_blocks=checkpoint.mapped_blocks,
            segments=segments,
            uncatalogued=uncatalogued,
            checkpoint_log_bytes=self._checkpoint_log_bytes,
            **self._snapshot_arguments(row),
        )
        rate = self._reclaim_bytes_per_second
        volume.set_reclaim(bytes_per_second=rate, enabled=rate > 0)
        self._report_recovery(row, epoch, volume.recovered)
        return OpenVolume(
            pool_name=self.name, row=row, epoch=epoch, catalog=self.catalog, engine=volume
        )

    def _snapshot_arguments(self, row: VolumeRow) -> dict[str, Any]:
        rooted = [s.position for s in self.catalog.snapshots.of(row.uuid) if s.root is not None]
        return {
            "parent": self.catalog.snapshots.head_parent(row.uuid),
            "newest_snapshot": max(rooted, default=0),
            "state_note": state_note(self.catalog, row.uuid),
            "clone": row.origin is not None,
            "limit_bytes": row.quota_bytes,
            "pause_when_full": row.on_full == "pause",
        }

    def _report_recovery(self, row: VolumeRow, epoch: int, recovered: dict[str, Any]) -> None:
        counts = {
            key: value for key, value in recovered.items() if key not in ("warnings", "snapshots")
        }
        self._log.info("volume opened", volume=row.name, epoch=epoch, **counts)
        for warning in recovered.get("warnings", ()):
            self._log.warning("recovery found something", volume=row.name, reason=warning)

    def owns_segment(self, number: int, row: VolumeRow) -> bool:
        """Whether a segment on the device is of this volume."""
        try:
            return self.device.identify_segment(number)["volume_uuid"] == row.uuid.bytes
        except (DamagedError, NotFoundError):
            # One that another volume is making or removing at this moment.
            return False

    def release_volume(
        self, volume: OpenVolume | OpenSnapshot, *, background: bool = False
    ) -> None:
        """Ends one use; the last one closes the volume or snapshot.

        Raises:
            VhostdError: it is closed, as after a crash; the next opening recovers it.
        """
        with self.lock:
            if isinstance(volume, OpenSnapshot):
                snapshot, users = self._open_snapshots.get(volume.uuid, (None, 0))
                if snapshot is not volume:
                    return
                if users > 1:
                    self._open_snapshots[volume.uuid] = (snapshot, users - 1)
                    return
                del self._open_snapshots[volume.uuid]
                volume.close()
                return
            opened = self._opened.get(volume.uuid)
            if opened is None or opened.volume is not volume:
                return
            opened.users -= 1
            opened.background -= background
            if opened.users == 0:
                del self._opened[volume.uuid]
                self.space.forget(volume.uuid)
                volume.close()

    def open_volumes(self) -> list[OpenVolume]:
        """The volumes that are open now."""
        return [opened.volume for opened in list(self._opened.values())]

    def find_open(self, uuid: UUID) -> OpenVolume | None:
        """The open volume of that UUID."""
        opened = self._opened.get(uuid)
        return None if opened is None else opened.volume

    def resize_volume(self, name: str, size_bytes: int, *, allow_shrink: bool = False) -> VolumeRow:
        """Grows a volume, attached or not; shrinks a detached one if that is allowed.

        Raises:
            NotFoundError: there is no such volume.
            UsageError: the size is not possible, or shrinking was not allowed.
            BusyError: shrinking is wanted, and the volume is attached.
        """
        with self.lock:
            row = self.catalog.volume(name)
            full_name = f"{self.name}/{name}"
            check_size(full_name, size_bytes, row.logical_block_bytes)
            opened = self._opened.get(row.uuid)
            if size_bytes < row.size_bytes:
                if not allow_shrink:
                    raise UsageError(
                        f"volume {full_name} has {format_size(row.size_bytes)}; shrinking it to "
                        f"{format_size(size_bytes)} would discard what is beyond. Shrink the file "
                        "system in it first, then repeat this with --force"
                    )
                if opened is not None:
                    raise BusyError(
                        f"volume {full_name} is attached, and shrinks only when it is not; "
                        "detach it first"
                    )
                volume = self.open_volume(name)
                try:
                    # What is cut off must read as zeroes if the volume grows again.
                    volume.erase_from(size_bytes)
                finally:
                    self.release_volume(volume)
                self.catalog.resize_volume(row.uuid, size_bytes)
            elif opened is not None:
                opened.volume.resize(size_bytes)
            else:
                self.catalog.resize_volume(row.uuid, size_bytes)
            return self.catalog.volume(name)

    def rename_volume(self, name: str, new_name: str) -> VolumeRow:
        """Gives a volume another name; its UUID and serial stay.

        Raises:
            NotFoundError, ExistsError, UsageError.
        """
        with self.lock:
            row = self.catalog.volume(name)
            check_name(new_name, "volume")
            self.catalog.rename_volume(row.uuid, new_name)
            renamed = self.catalog.volume(new_name)
            opened = self._opened.get(row.uuid)
            if opened is not None:
                opened.volume.renamed(renamed)
            return renamed

    def remove_volume(self, name: str, *, with_snapshots: bool = False) -> None:
        """Removes a volume and its data for good.

        Raises:
            NotFoundError: there is no such volume.
            BusyError: it is attached, or one of its snapshots; clones need these; or it has some,
                and `with_snapshots` is not given.
        """
        with self.lock:
            row = self.catalog.volume(name)
            if row.uuid in self._opened:
                raise BusyError(
                    f"volume {self.name}/{name} is attached; detach it first, then remove it"
                )
            for snapshot in self.catalog.snapshots.of(row.uuid):
                if self.snapshot_in_use(snapshot.uuid):
                    raise BusyError(
                        f"snapshot {self.name}/{name}@{snapshot.name} is in use; detach it first, "
                        "then remove the volume"
                    )
            self.catalog.begin_removal(row.uuid, with_snapshots=with_snapshots)
            self._finish_removal(row)

    def configure_volume(
        self,
        name: str,
        *,
        quota_bytes: int | None,
        reservation_bytes: int | None,
        on_full: str,
    ) -> VolumeRow:
        """Sets what a volume may take, what is kept for it, and what a write does at the end.

        Raises:
            UsageError: the reservation is beyond the quota.
            NoSpaceError: what is reserved in all would be more than there is.
        """
        with self.lock:
            row = self.catalog.volume(name)
            self.space.check_reservation(row, quota_bytes, reservation_bytes)
            self.catalog.set_volume(
                row.uuid,
                replace(
                    row,
                    quota_bytes=quota_bytes,
                    reservation_bytes=reservation_bytes,
                    on_full=on_full,
                ),
            )
            row = self.catalog.volume(name)
            opened = self._opened.get(row.uuid)
            if opened is not None:
                opened.volume.set_on_full(row)
        self.space.apply_limits()
        return row

    def configure(self, *, quota_bytes: int | None, warn_percent: int) -> None:
        """Sets what all volumes together may take, and from which part of it on it is warned."""
        self.catalog.set_pool(quota_bytes=quota_bytes, warn_percent=warn_percent)
        self.space.apply_limits()

    # What a crash may have left

    def _check_agreement(self) -> None:
        superblock = self.device.superblock
        row: PoolRow = self.catalog.pool()
        device_uuid = UUID(bytes=superblock["device_uuid"])
        if superblock["pool_uuid"] != row.uuid.bytes or device_uuid not in (
            self.catalog.device_uuids()
        ):
            raise DamagedError(
                f"{self.path}: superblock and catalog are of different pools "
                f"({superblock['pool_name']} and {row.name}); one of them was copied here, put the "
                "right one back"
            )
        if superblock["segment_bytes"] != row.segment_bytes:
            raise DamagedError(
                f"{self.path}: superblock and catalog disagree on the size of segments "
                f"({superblock['segment_bytes']} and {row.segment_bytes}); restore both from the "
                "same copy of the device"
            )

    def _sort_out(self) -> None:
        on_device = self.device.list_segments()
        next_segment = self.catalog.pool().next_segment
        if on_device and on_device[-1] >= next_segment:
            raise self._catalog_is_old(
                f"segment {on_device[-1]} is on the device, and numbers only up to "
                f"{next_segment - 1} were granted"
            )
        volumes = {row.uuid.bytes: row for row in self.catalog.volumes()}
        catalogued = self.catalog.segment_numbers()
        for number in on_device:
            if number not in catalogued:
                self._look_at(number, volumes)
        for row in volumes.values():
            if row.state == "removing":
                self._log.info("finishing the removal of a volume", volume=row.name)
                self._finish_removal(row)
        if self.findings.unknown_volume or self.findings.unreadable:
            self._log.warning(
                "segments without an owner are kept; `vhostctl check` tells more",
                unknown_volume=self.findings.unknown_volume[:16],
                unreadable=self.findings.unreadable[:16],
            )

    def _look_at(self, number: int, volumes: dict[bytes, VolumeRow]) -> None:
        try:
            segment = self.device.identify_segment(number)
        except DamagedError:
            if self._is_blank(number):
                # Its header was never durable, so nothing else was ever written to it.
                self._log.info("removing a segment that was never begun", segment=number)
                self.device.remove_segment(number)
            else:
                self.findings.unreadable.append(number)
            return
        row = volumes.get(segment["volume_uuid"])
        if row is None:
            self.findings.unknown_volume.append(number)
        elif segment["epoch"] > row.epoch:
            raise self._catalog_is_old(
                f"segment {number} of volume {row.name} is of epoch {segment['epoch']}, and the "
                f"catalog knows epochs up to {row.epoch}"
            )

    def _is_blank(self, number: int) -> bool:
        with segment_path(self.path, number).open("rb") as file:
            return not any(file.read(BLOCK_BYTES))

    def _catalog_is_old(self, evidence: str) -> DamagedError:
        return DamagedError(
            f"{self.catalog.path} is older than the segments beside it: {evidence}. Opening the "
            "pool with it would lose data; put back the newest catalog (with its -wal file)"
        )

    def _finish_removal(self, row: VolumeRow) -> None:
        numbers = {segment["number"] for segment in self.catalog.segments(row.uuid)}
        on_device = set(self.device.list_segments())
        uncatalogued = on_device - self.catalog.segment_numbers()
        numbers |= {number for number in uncatalogued if self.owns_segment(number, row)}
        for number in sorted(numbers & on_device):
            self.device.remove_segment(number)
        (self._staging_dir / str(row.uuid)).unlink(missing_ok=True)
        self.catalog.finish_removal(row.uuid)
        self._log.info("volume removed", volume=row.name, segments=len(numbers))

    def destroy(self, *, force: bool = False, before: Callable[[], None] | None = None) -> None:
        """Closes the pool and removes everything of it from its directory, for good.

        before: called when nothing can refuse any more (the daemon forgets the pool there).

        Raises:
            BusyError: volumes are attached; or there are volumes and `force` is not given.
        """
        with self.lock:
            if self._opened or self._open_snapshots:
                names = ", ".join(
                    sorted(
                        [v.name for v in self.open_volumes()]
                        + [s.name for s in self.open_snapshots()]
                    )[:4]
                )
                raise BusyError(f"pool {self.name} has attached volumes ({names}); detach them")
            volumes = self.catalog.volumes()
            if volumes and not force:
                raise BusyError(
                    f"pool {self.name} has {len(volumes)} volumes (one is {volumes[0].name}); "
                    "remove them first, or destroy the pool with --force"
                )
            if before is not None:
                before()
            self.catalog.close()
            try:
                shutil.rmtree(self._staging_dir, ignore_errors=True)
                remove_ours(self.path)
            except OSError as error:
                raise DeviceError(
                    f"pool {self.name} could not be removed wholly from {self.path}: "
                    f"{error.strerror}; remove the directory by hand"
                ) from error
            finally:
                self.device.close()
