"""`rebuild_catalog`: a new catalog out of superblock and segments alone.

Order of events, so that a crash at any moment leaves either catalog, and never half of one:
1. The superblock is written anew if it is damaged (the old one is kept aside).
2. Maps are made in segments of their own, durably. Nothing refers to them yet.
3. The new catalog is made complete in a directory of its own, and synced.
4. The old one is renamed to `catalog.sqlite.damaged-TIME`, the new one to `catalog.sqlite`, and the
   device's directory is synced. A crash between the two renames leaves a device without a catalog,
   which is what this began with: run it again.
5. Map segments that nothing refers to any more are removed.

Log segments are never changed.
"""

from __future__ import annotations

import os
import shutil
import struct
import time
import uuid as uuid_module
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vhostd.errors import (
    DamagedError,
    ExistsError,
    NotFoundError,
    UnsupportedError,
    VhostdError,
)
from vhostd.storage.catalog import FILE_NAME, Catalog
from vhostd.storage.database import connect
from vhostd.storage.format import (
    BLOCK_BYTES,
    SUPERBLOCK_FILE,
    FormatError,
    Superblock,
    crc32c,
    read_catalog,
)
from vhostd.storage.names import check_name
from vhostd.storage.rebuild.commit import add_volume, put_maps, set_lines
from vhostd.storage.rebuild.plan import (
    Engine,
    Report,
    SnapshotPlan,
    VolumeOutcome,
    VolumePlan,
    in_order,
    rebuild_maps,
)
from vhostd.storage.rebuild.survey import FoundVolume, Progress, Survey, survey

if TYPE_CHECKING:
    from vhostd._native import RebuiltVolume

__all__ = [
    "aside",
    "grant",
    "rebuild_catalog",
    "remove_segments",
    "sync_directory",
    "write_superblock",
]

GRANT_SEGMENTS = 65536
# Openings that died before they made a segment have used epochs that no segment tells of.
SPARE_EPOCHS = 1024
DEFAULT_SIZE_BYTES = 1 << 30


def rebuild_catalog(
    directory: Path,
    engine: Engine | None,
    *,
    name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Makes the catalog of the device at `directory` anew. engine: None for a dry run.

    name: of the pool, if its superblock is lost. force: even if there is a catalog and it is whole.

    Raises:
        NotFoundError: there is no device of a pool.
        ExistsError: the catalog is whole.
        UnsupportedError: superblock or catalog are of a newer version.
        DamagedError: superblock and segments are all damaged.
        BusyError: a daemon has it open.
        DeviceError, NoSpaceError: it cannot be read or written.
    """
    if not (directory / "segments").is_dir():
        raise NotFoundError(
            f"{directory} is no device of a pool: it has no segments; name the directory that the "
            "pool was made with"
        )
    _refuse_whole(directory, force)
    found = survey(directory, progress)
    superblock = _superblock(directory, found, name)
    if found.segments and not found.volumes:
        raise DamagedError(
            f"{directory}: none of its {found.segments} segments is of pool {superblock.pool}, "
            "which the superblock names; put back the superblock that belongs here, or remove the "
            "file to have it made from the segments"
        )
    report = Report(
        path=str(directory),
        pool=superblock.pool_name,
        pool_uuid=str(superblock.pool),
        dry_run=engine is None,
        segments=found.segments,
        problems=[
            *found.problems,
            *(
                f"segment {number} says nothing of whose it is; it is left alone"
                for number in found.unknown
            ),
        ],
    )
    plans = in_order(_plan(volume, report) for volume in found.volumes.values())
    _find_origins(plans, found)
    _make_names_unique(plans, report)
    if found.superblock is None:
        report.actions.append(f"write a new superblock of pool {superblock.pool_name}")
    report.actions += [
        f"rebuild the maps of volume {plan.name}, {len(plan.snapshots)} snapshots, from "
        f"{len(plan.logs)} log segments"
        for plan in plans
    ]
    report.actions.append(f"put a new catalog in the place of {directory / FILE_NAME}")
    if engine is None:
        report.volumes = [_foreseen(plan) for plan in plans]
        return report
    if found.superblock is None:
        report.kept += aside(directory, [SUPERBLOCK_FILE])
        write_superblock(directory, superblock)
    device = engine.open_device(str(directory.absolute()))
    try:
        next_segment = grant(device, found.last_segment + 1)
        results, report.volumes = rebuild_maps(engine, device, plans, {})
        plans = [plan for plan in plans if plan.uuid in results]
        made = _write(directory, superblock, plans, results, next_segment)
        names = [FILE_NAME + suffix for suffix in ("-wal", "-shm", "")]
        report.kept += aside(directory, names)
        made.rename(directory / FILE_NAME)
        sync_directory(directory)
        made.parent.rmdir()
        remove_segments(device, (number for plan in plans for number in plan.maps))
    finally:
        device.close()
    return report


def _refuse_whole(directory: Path, force: bool) -> None:
    try:
        problems = read_catalog(directory, in_use=False).problems
    except FormatError as error:
        if error.newer:
            raise UnsupportedError(
                f"{error}; use the vhostd that made it, or a newer one"
            ) from None
        return
    except OSError:
        return
    if not problems and not force:
        raise ExistsError(
            f"{directory / FILE_NAME} is whole: a new one would only lose what segments do not "
            "tell (quotas, removals under way); give --force to have it replaced all the same"
        )


def _superblock(directory: Path, found: Survey, name: str | None) -> Superblock:
    if found.superblock is not None:
        return found.superblock
    if found.pool is None:
        raise DamagedError(
            f"{directory}: the superblock is lost, and no segment says which pool this is; nothing "
            "can be rebuilt, restore the directory from a copy"
        )
    name = name if name is not None else f"recovered-{found.pool.hex[:8]}"
    check_name(name, "pool")
    device = uuid_module.uuid4()
    return Superblock(found.pool, device, found.segment_bytes, time.time_ns(), name)


def write_superblock(directory: Path, superblock: Superblock) -> None:
    """Writes it durably (`docs/format.md`, "Superblock")."""
    name = superblock.pool_name.encode()
    block = bytearray(BLOCK_BYTES)
    struct.pack_into(
        "<4sHH16s16sQQIH",
        block,
        0,
        b"VHSB",
        2,
        0,
        superblock.pool.bytes,
        superblock.device.bytes,
        superblock.segment_bytes,
        superblock.created_ns,
        0,
        len(name),
    )
    block[64 : 64 + len(name)] = name
    struct.pack_into("<I", block, 56, crc32c(bytes(block)))
    made = directory / f"{SUPERBLOCK_FILE}.new"
    with made.open("wb") as file:
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
    made.rename(directory / SUPERBLOCK_FILE)
    sync_directory(directory)


def grant(device: Any, first: int) -> int:
    """Grants numbers from `first` on; the number behind them."""
    end = first + GRANT_SEGMENTS
    device.grant_segment_numbers(first, end)
    return end


def aside(directory: Path, names: Iterable[str]) -> list[str]:
    """Renames what is there of the files, and returns the new names."""
    suffix = time.strftime("damaged-%Y%m%dT%H%M%SZ", time.gmtime())
    kept = []
    for name in names:
        path = directory / name
        if not path.exists():
            continue
        target = directory / f"{name}.{suffix}"
        count = 1
        while target.exists():
            target = directory / f"{name}.{suffix}-{count}"
            count += 1
        path.rename(target)
        kept.append(str(target))
    return kept


def sync_directory(directory: Path) -> None:
    """Makes renames in it durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_segments(device: Any, numbers: Iterable[int]) -> None:
    """Removes segments that nothing refers to; what fails is removed by the next opening."""
    for number in numbers:
        try:
            device.remove_segment(number)
        except VhostdError:
            continue


def _plan(volume: FoundVolume, report: Report) -> VolumePlan:
    """What the notes of a volume say is there."""
    state, header = volume.state, volume.header
    snapshots = {
        s.position: SnapshotPlan(
            s.uuid, s.guid, s.name, s.position, s.size_bytes, s.created_ns, s.protected
        )
        for s in (state.snapshots if state is not None else ())
    }
    for position, note in volume.snapshots.items():
        snapshots.setdefault(
            position,
            SnapshotPlan(
                note.uuid, note.uuid, note.name, position, note.size_bytes, note.created_ns
            ),
        )
    for position in volume.lost_notes:
        # It may have been a snapshot's; if not, nobody reads it.
        if position > volume.state_position and position not in snapshots:
            uuid = uuid_module.uuid4()
            size = 0 if header is None else header.size_bytes
            snapshots[position] = SnapshotPlan(
                uuid, uuid, f"recovered-{position:x}", position, max(size, 4096), 0
            )
    logical = 4096 if header is None else header.logical_block_bytes
    size_bytes = DEFAULT_SIZE_BYTES if header is None else header.size_bytes
    serial, created_ns = volume.uuid.hex[:20], 0 if header is None else header.created_ns
    if state is not None:
        logical, serial = state.volume.logical_block_bytes, state.volume.serial
        size_bytes, created_ns = state.volume.size_bytes, state.volume.created_ns
        # A segment that was made later knows of a later size; a state note follows each change.
        if header is not None and header.number << 13 > volume.state_position:
            size_bytes = header.size_bytes
    elif header is None:
        report.problems.append(
            f"volume {volume.name}: neither its name nor its size can be read; it gets "
            f"{size_bytes} bytes, resize it as is right"
        )
    origin = state.origin if state is not None else None
    return VolumePlan(
        uuid=volume.uuid,
        name=volume.name,
        size_bytes=max(size_bytes, logical),
        logical_block_bytes=logical,
        serial=serial,
        created_ns=created_ns,
        epoch=volume.epoch + SPARE_EPOCHS,
        logs=sorted(volume.logs),
        maps=sorted(volume.maps),
        snapshots=[snapshots[position] for position in sorted(snapshots)],
        rollbacks=sorted((r.position, r.to) for r in (state.rollbacks if state else ())),
        unmaps=[(u.block, u.count, u.position) for u in volume.unmaps],
        origin=(origin.volume, origin.snapshot) if origin is not None else None,
        notes=list(volume.problems),
    )


def _find_origins(plans: list[VolumePlan], found: Survey) -> None:
    """Adds snapshots that only their clones know of any more: the note of them is damaged."""
    by_uuid = {plan.uuid: plan for plan in plans}
    for plan in plans:
        state = found.volumes[plan.uuid].state
        if state is None or state.origin is None:
            continue
        noted = state.origin
        origin = by_uuid.get(noted.volume)
        if origin is None or any(s.uuid == noted.snapshot for s in origin.snapshots):
            continue
        origin.snapshots = [s for s in origin.snapshots if s.position != noted.position]
        origin.snapshots.append(
            SnapshotPlan(
                noted.snapshot,
                noted.snapshot,
                f"recovered-{noted.position:x}",
                noted.position,
                plan.size_bytes,
                0,
            )
        )
        origin.snapshots.sort(key=lambda s: s.position)


def _make_names_unique(plans: list[VolumePlan], report: Report) -> None:
    """Of two volumes with one name, the one that was written to last keeps it; snapshots alike."""
    taken: set[str] = set()
    for plan in sorted(plans, key=lambda p: max(p.logs, default=0), reverse=True):
        plan.name = _unique(plan.name, plan.uuid, taken, "volume", report)
        names: set[str] = set()
        plan.snapshots = [
            SnapshotPlan(
                s.uuid,
                s.guid,
                _unique(s.name, s.uuid, names, f"snapshot of volume {plan.name},", report),
                s.position,
                s.size_bytes,
                s.created_ns,
                s.protected,
            )
            for s in reversed(plan.snapshots)
        ]
        plan.snapshots.reverse()


def _unique(name: str, uuid: UUID, taken: set[str], what: str, report: Report) -> str:
    wanted = name[:128] or f"unnamed-{uuid.hex[:8]}"
    if wanted in taken:
        other = f"{wanted[:110]}-{uuid.hex[:8]}"
        report.problems.append(f"{what} {wanted} is there twice; the older one is now {other}")
        wanted = other
    taken.add(wanted)
    return wanted


def _foreseen(plan: VolumePlan) -> VolumeOutcome:
    return VolumeOutcome(
        name=plan.name,
        uuid=str(plan.uuid),
        size_bytes=plan.size_bytes,
        snapshots=[snapshot.name for snapshot in plan.snapshots],
        log_segments=len(plan.logs),
        lost=list(plan.notes),
    )


def _write(
    directory: Path,
    superblock: Superblock,
    plans: list[VolumePlan],
    results: dict[UUID, RebuiltVolume],
    next_segment: int,
) -> Path:
    """Makes the new catalog, complete and durable; where it is."""
    place = directory / ".rebuild"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700)
    Catalog.create(
        place,
        uuid=superblock.pool,
        name=superblock.pool_name,
        segment_bytes=superblock.segment_bytes,
        device_uuid=superblock.device,
    ).close()
    path = place / FILE_NAME
    db = connect(path, "rw")
    try:
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE pool SET next_segment = ?", (next_segment,))
        for plan in plans:
            volume = add_volume(db, plan)
            put_maps(db, volume, plan, results[plan.uuid])
            set_lines(db, volume, plan)
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        db.close()
    # It was opened once as the daemon will, so that what it would refuse is seen now.
    Catalog.open(place).close()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path
