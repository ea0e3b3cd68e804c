"""`repair`: what a check finds wrong with maps and counts is made again from the log.

Only what the log can tell is changed: maps, dead sets and counts of a volume, of all its snapshots,
and of its clones, which share nodes with it. Guests' data is never dropped: blocks that cannot be
read stay mapped, and reading them gives I/O errors. The new rows take the place of the old ones in
one transaction, after the new maps are durable; the old map segments go after it.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

from vhostd.errors import BusyError
from vhostd.storage.catalog import FILE_NAME
from vhostd.storage.check import CheckReport, check_device
from vhostd.storage.database import connect
from vhostd.storage.format import (
    KIND_LOG,
    KIND_MAP,
    LOCK_FILE,
    SUPERBLOCK_FILE,
    CatalogContents,
    CatalogVolume,
    Superblock,
    read_catalog,
)
from vhostd.storage.rebuild.catalog import (
    aside,
    grant,
    rebuild_catalog,
    remove_segments,
    write_superblock,
)
from vhostd.storage.rebuild.commit import put_maps, set_lines
from vhostd.storage.rebuild.plan import (
    Engine,
    Report,
    SnapshotPlan,
    VolumePlan,
    in_order,
    rebuild_maps,
    without_families,
)
from vhostd.storage.rebuild.survey import Progress, Survey, survey

__all__ = ["repair"]

OF_MAPS = frozenset(
    {
        "address-twice",
        "clone-reaches-dead",
        "dead-but-reached",
        "dead-set",
        "live-count-differs",
        "map-address",
        "map-differs",
        "map-node",
        "map-root",
        "mapped-blocks-differ",
        "notes-not-counted",
        "punched-count-differs",
        "records-missing",
        "space-leaked",
        "unmaps-not-counted",
        "used-blocks-differ",
        "checkpoint-position",
        "checkpoint-record-differs",
        "checkpoint-record-missing",
    }
)
"""Findings that new maps are the answer to."""

WRONG_CATALOG = frozenset(
    {
        "catalog",
        "catalog-old",
        "note-without-snapshot",
        "snapshot-differs",
        "superblock-differs",
        "volume-differs",
    }
)
"""Findings that a new catalog is the answer to."""


def repair(
    directory: Path,
    engine: Engine,
    *,
    volume: str | None = None,
    progress: Progress | None = None,
) -> tuple[CheckReport, Report]:
    """Checks, repairs, and checks again; the last check's report, and what was done.

    volume: only this one (and its clones).

    Raises:
        BusyError: a daemon has the pool open.
        NotFoundError, DeviceError, NoSpaceError: it cannot be read or written.
    """
    _refuse_busy(directory)
    before = check_device(directory, volume=volume, progress=progress)
    codes = {finding.code for finding in before.findings if finding.severity == "error"}
    report = Report(path=str(directory), pool=before.pool or "", pool_uuid=before.pool_uuid or "")
    if codes & WRONG_CATALOG:
        # SQLite has no checksums; the log has, and what it says is as new as the catalog.
        report = rebuild_catalog(directory, engine, force=True, progress=progress)
    else:
        catalog = read_catalog(directory, in_use=False)
        if "superblock" in codes:
            _repair_superblock(directory, catalog, report)
        damaged = _damaged_volumes(before, catalog)
        if damaged:
            _repair_volumes(directory, engine, catalog, damaged, report, progress)
    if report.actions:
        before = check_device(directory, volume=volume, progress=progress)
    return before, report


def _refuse_busy(directory: Path) -> None:
    try:
        fd = os.open(directory / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(
            f"the pool at {directory} is open in a daemon; close it with `vhostctl pool close`, or "
            "stop the daemon, and repair it then"
        ) from None
    finally:
        os.close(fd)


def _repair_superblock(directory: Path, catalog: CatalogContents, report: Report) -> None:
    """The catalog knows all that is in it."""
    pool = catalog.pool
    report.kept += aside(directory, [SUPERBLOCK_FILE])
    device = min(catalog.devices)
    superblock = Superblock(pool.uuid, device, pool.segment_bytes, 0, pool.name)
    write_superblock(directory, superblock)
    report.actions.append("wrote the superblock again, from the catalog")


def _damaged_volumes(report: CheckReport, catalog: CatalogContents) -> set[UUID]:
    """Volumes that need new maps: those with such findings, and the clones of these."""
    names = {
        finding.volume
        for finding in report.findings
        if finding.code in OF_MAPS
        or (finding.code in _OF_SEGMENTS and _is_map(catalog, finding.segment))
    }
    damaged = {v.uuid for v in catalog.volumes if v.name in names and v.state == "present"}
    while True:
        clones = {
            v.uuid
            for v in catalog.volumes
            if v.origin is not None and v.origin[0] in damaged and v.state == "present"
        }
        if clones <= damaged:
            return damaged
        damaged |= clones


_OF_SEGMENTS = frozenset({"segment-missing", "segment-header", "segment-unreadable", "file-short"})


def _is_map(catalog: CatalogContents, number: int | None) -> bool:
    return any(
        row.number == number and row.kind == KIND_MAP
        for volume in catalog.volumes
        for row in volume.segments
    )


def _repair_volumes(
    directory: Path,
    engine: Engine,
    catalog: CatalogContents,
    damaged: Iterable[UUID],
    report: Report,
    progress: Progress | None,
) -> None:
    found = survey(directory, progress)
    by_uuid = {volume.uuid: volume for volume in catalog.volumes}
    plans = in_order(_plan(by_uuid[uuid], found) for uuid in damaged)
    roots = {
        snapshot.uuid: snapshot.root
        for volume in catalog.volumes
        if volume.uuid not in {plan.uuid for plan in plans}
        for snapshot in volume.snapshots
        if snapshot.state == "present"
    }
    device = engine.open_device(str(directory.absolute()))
    try:
        next_segment = grant(device, max(catalog.pool.next_segment, found.last_segment + 1))
        db = connect(directory / FILE_NAME, "rw")
        try:
            # Numbers are granted in the catalog before anything is made with them.
            db.execute("UPDATE pool SET next_segment = ?", (next_segment,))
            results, outcomes = rebuild_maps(engine, device, plans, roots)
            report.volumes += outcomes
            for plan, outcome in zip(plans, outcomes, strict=True):
                rebuilt = results.get(plan.uuid)
                if rebuilt is not None and rebuilt["lost_records"]:
                    # Whatever is wrong with the old maps, they may have what these would lack.
                    outcome.failed = (
                        f"its log is damaged too, in {rebuilt['lost_records']} places: new maps "
                        "would lack what the records there held; the old ones were kept. Export "
                        "what can be read of it"
                    )
                    del results[plan.uuid]
            plans = without_families(plans, {p.uuid for p in plans if p.uuid not in results})
            db.execute("BEGIN IMMEDIATE")
            for plan in plans:
                identity = db.execute(
                    "SELECT id FROM volumes WHERE uuid = ?", (plan.uuid.bytes,)
                ).fetchone()[0]
                _forget_removed(db, identity)
                put_maps(db, identity, plan, results[plan.uuid])
                set_lines(db, identity, plan)
                report.actions.append(
                    f"rebuilt the maps of volume {plan.name} and its {len(plan.snapshots)} "
                    f"snapshots from {len(plan.logs)} log segments"
                )
            db.execute("COMMIT")
        finally:
            db.close()
        remove_segments(device, (number for plan in plans for number in plan.maps))
    finally:
        device.close()


def _forget_removed(db: sqlite3.Connection, volume: int) -> None:
    """Snapshots that were being removed are gone: nothing of them alone is in the new maps."""
    # `set_lines` gives the parents of what stays.
    db.execute("UPDATE snapshots SET parent = NULL WHERE volume = ?", (volume,))
    db.execute("UPDATE volumes SET parent = NULL WHERE id = ?", (volume,))
    db.execute("DELETE FROM snapshots WHERE volume = ? AND state = 'removing'", (volume,))


def _plan(volume: CatalogVolume, found: Survey) -> VolumePlan:
    """What the catalog says is there; segments and unmaps are what the device has."""
    on_device = found.volumes.get(volume.uuid)
    rows = {row.number for row in volume.segments if row.kind == KIND_LOG}
    maps = {row.number for row in volume.segments if row.kind == KIND_MAP}
    point = volume.checkpoint.segment if volume.checkpoint is not None else 0
    # One that the catalog does not name and the checkpoint covers is left over from a removal.
    logs = [n for n in (on_device.logs if on_device else ()) if n in rows or n > point]
    return VolumePlan(
        uuid=volume.uuid,
        name=volume.name,
        size_bytes=volume.size_bytes,
        logical_block_bytes=volume.logical_block_bytes,
        serial="",
        created_ns=0,
        epoch=volume.epoch,
        logs=sorted(logs),
        maps=sorted(maps | set(on_device.maps if on_device else ())),
        snapshots=[
            SnapshotPlan(
                s.uuid, s.guid, s.name or "", s.position, s.size_bytes, s.created_ns, s.protected
            )
            for s in volume.snapshots
            if s.state != "removing"
        ],
        rollbacks=list(volume.rollbacks),
        unmaps=[(u.block, u.count, u.position) for u in (on_device.unmaps if on_device else ())],
        origin=volume.origin,
    )
