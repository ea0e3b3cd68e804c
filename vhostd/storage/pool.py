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
import uuid as uuid_module
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog

from vhostd.errors import (
    BusyError,
    DamagedError,
    DeviceError,
    ExistsError,
    NotFoundError,
    UsageError,
    VhostdError,
)
from vhostd.storage import catalog as catalog_module
from vhostd.storage.catalog import Catalog, PoolRow, VolumeRow
from vhostd.storage.engine import Engine, EngineDevice, FormatDevice
from vhostd.storage.names import check_name
from vhostd.storage.sizes import format_size
from vhostd.storage.volume import SERIAL_MAX_BYTES, OpenVolume, check_size

__all__ = ["DEFAULT_SEGMENT_BYTES", "GRANT_SEGMENTS", "Pool", "create_pool", "is_pool"]

DEFAULT_SEGMENT_BYTES = 32 << 20
MIN_SEGMENT_BYTES = 1 << 20
GRANT_SEGMENTS = 65536
DEFAULT_CHECKPOINT_LOG_BYTES = 256 << 20
BLOCK_BYTES = 4096

SUPERBLOCK = "superblock"
_OURS = (
    SUPERBLOCK,
    "segments",
    "lock",
    *(catalog_module.FILE_NAME + s for s in ("", "-wal", "-shm")),
)


def is_pool(directory: Path) -> bool:
    """Whether a pool's device is (or was begun) there."""
    return (directory / SUPERBLOCK).exists() or (directory / catalog_module.FILE_NAME).exists()


def create_pool(
    directory: Path,
    name: str,
    *,
    format_device: FormatDevice,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
) -> UUID:
    """Makes `directory` (created if missing) the device of a new pool, and returns its UUID.

    Raises:
        UsageError: the name or the segment size is not possible.
        ExistsError: the directory is a pool already, or is not empty.
        NotFoundError, DeviceError, NoSpaceError: it cannot be made there; nothing is left behind.
    """
    check_name(name, "pool")
    if not MIN_SEGMENT_BYTES <= segment_bytes <= DEFAULT_SEGMENT_BYTES or (
        segment_bytes & (segment_bytes - 1)
    ):
        raise UsageError(
            f"pool {name}: segments of {format_size(segment_bytes)} are not possible; choose a "
            "power of 2 from 1M to 32M"
        )
    made = _make_directory(directory)
    pool_uuid, device_uuid = uuid_module.uuid4(), uuid_module.uuid4()
    try:
        format_device(
            str(directory),
            pool_uuid=pool_uuid.bytes,
            device_uuid=device_uuid.bytes,
            pool_name=name,
            segment_bytes=segment_bytes,
        )
        try:
            Catalog.create(
                directory,
                uuid=pool_uuid,
                name=name,
                segment_bytes=segment_bytes,
                device_uuid=device_uuid,
            ).close()
        except BaseException:
            # The directory was empty before format_device, so all of this is ours.
            _remove_ours(directory)
            raise
    except BaseException:
        if made:
            directory.rmdir()
        raise
    return pool_uuid


def _make_directory(directory: Path) -> bool:
    """True if it had to be made."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{directory} cannot be made: {directory.parent} does not exist; make that first"
        ) from error
    except OSError as error:
        raise DeviceError(
            f"{directory} cannot be made: {error.strerror}; choose another place or change its "
            "permissions"
        ) from error
    else:
        return True
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory; a pool's device is a directory")
    if is_pool(directory):
        raise ExistsError(f"{directory} holds a pool already; open that one, or destroy it first")
    try:
        found = next((p.name for p in directory.iterdir() if p.name != "lost+found"), None)
    except OSError as error:
        raise DeviceError(f"{directory} cannot be listed: {error.strerror}") from error
    if found is not None:
        raise ExistsError(
            f"{directory} is not empty (it holds {found!r}); a pool is made only in an empty "
            "directory, choose another one"
        )
    return False


def _remove_ours(directory: Path) -> None:
    # The superblock first: without it the rest is not taken for a pool after a crash.
    for name in _OURS:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@dataclass(slots=True)
class _Opened:
    volume: OpenVolume
    users: int = 0


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
    ) -> None:
        self.path = path
        self.device = device
        self.catalog = catalog
        row = catalog.pool()
        self.uuid, self.name = row.uuid, row.name
        self.findings = Findings()
        self._engine = engine
        self._staging_dir = staging_dir / str(row.uuid)
        self._checkpoint_log_bytes = checkpoint_log_bytes
        self._lock = threading.RLock()
        self._opened: dict[UUID, _Opened] = {}
        self._log = structlog.get_logger().bind(pool=row.name)

    @classmethod
    def open(
        cls,
        path: Path,
        engine: Engine,
        *,
        staging_dir: Path,
        direct: bool = True,
        checkpoint_log_bytes: int = DEFAULT_CHECKPOINT_LOG_BYTES,
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
        with self._lock:
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
        with self._lock:
            row = self.catalog.volume(name)
            opened = self._opened.get(row.uuid)
            if opened is None:
                opened = _Opened(self._open_volume(row))
                self._opened[row.uuid] = opened
            opened.users += 1
            return opened.volume

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
            if self._belongs_to(number, row)
        ]
        checkpoint = self.catalog.checkpoint(row.uuid)
        epoch = self.catalog.next_epoch(row.uuid)
        volume = self._engine.open_volume(
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
        )
        self._report_recovery(row, epoch, volume.recovered)
        return OpenVolume(
            pool_name=self.name, row=row, epoch=epoch, catalog=self.catalog, engine=volume
        )

    def _report_recovery(self, row: VolumeRow, epoch: int, recovered: dict[str, Any]) -> None:
        counts = {key: value for key, value in recovered.items() if key != "warnings"}
        self._log.info("volume opened", volume=row.name, epoch=epoch, **counts)
        for warning in recovered.get("warnings", ()):
            self._log.warning("recovery found something", volume=row.name, reason=warning)

    def _belongs_to(self, number: int, row: VolumeRow) -> bool:
        try:
            return self.device.identify_segment(number)["volume_uuid"] == row.uuid.bytes
        except (DamagedError, NotFoundError):
            # One that another volume is making or removing at this moment.
            return False

    def release_volume(self, volume: OpenVolume) -> None:
        """Ends one use; the last one closes the volume.

        Raises:
            VhostdError: it is closed, as after a crash; the next opening recovers it.
        """
        with self._lock:
            opened = self._opened.get(volume.uuid)
            if opened is None or opened.volume is not volume:
                return
            opened.users -= 1
            if opened.users == 0:
                del self._opened[volume.uuid]
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
        with self._lock:
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
        with self._lock:
            row = self.catalog.volume(name)
            check_name(new_name, "volume")
            self.catalog.rename_volume(row.uuid, new_name)
            renamed = self.catalog.volume(new_name)
            opened = self._opened.get(row.uuid)
            if opened is not None:
                opened.volume.renamed(renamed)
            return renamed

    def remove_volume(self, name: str) -> None:
        """Removes a volume and its data for good.

        Raises:
            NotFoundError: there is no such volume.
            BusyError: it is attached.
        """
        with self._lock:
            row = self.catalog.volume(name)
            if row.uuid in self._opened:
                raise BusyError(
                    f"volume {self.name}/{name} is attached; detach it first, then remove it"
                )
            self.catalog.begin_removal(row.uuid)
            self._finish_removal(row)

    def info(self) -> dict[str, Any]:
        """The pool for people and programs: space and volumes."""
        free_bytes, total_bytes = self.device.space()
        row = self.catalog.pool()
        volumes = [v for v in self.catalog.volumes() if v.state == "present"]
        used_blocks = sum(used for used, _ in self.catalog.usage().values())
        return {
            "name": row.name,
            "uuid": str(row.uuid),
            "device": str(self.path),
            "segment_bytes": row.segment_bytes,
            "created_ns": row.created_ns,
            "volumes": len(volumes),
            "volumes_open": len(self._opened),
            "provisioned_bytes": sum(v.size_bytes for v in volumes),
            "used_bytes": used_blocks * BLOCK_BYTES,
            "free_bytes": free_bytes,
            "total_bytes": total_bytes,
            "segments_without_owner": len(self.findings.unknown_volume)
            + len(self.findings.unreadable),
        }

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
        path = self.path / "segments" / f"{number >> 10:011x}" / f"{number:013x}.seg"
        with path.open("rb") as file:
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
        numbers |= {number for number in uncatalogued if self._belongs_to(number, row)}
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
        with self._lock:
            if self._opened:
                names = ", ".join(sorted(v.name for v in self.open_volumes())[:4])
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
                _remove_ours(self.path)
            except OSError as error:
                raise DeviceError(
                    f"pool {self.name} could not be removed wholly from {self.path}: "
                    f"{error.strerror}; remove the directory by hand"
                ) from error
            finally:
                self.device.close()
