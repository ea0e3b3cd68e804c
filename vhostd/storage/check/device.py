"""`check_device`: the whole of a pool's device, read only.

Order: superblock, catalog, then volume by volume the map and the log, then what belongs to nobody.
Memory is bounded by one volume: about 1.2 KiB for each of its log segments (32 MiB by default).

A pool that no daemon has open is kept that way by a shared lock. One in use changes under the
eyes of the check: a volume that looks damaged is looked at again with a fresh catalog, and only
what is seen in two looks after another is reported.

Blocking; one call is one thread's. Several calls may run at once, of the same device too.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from vhostd.errors import DeviceError, NotFoundError
from vhostd.storage.check.files import SegmentFiles
from vhostd.storage.check.log import BadData, LogCheck
from vhostd.storage.check.map import Family, MapCheck
from vhostd.storage.check.place import RESTORE, VolumeIdentity
from vhostd.storage.check.report import CheckReport, Findings, VolumeReport
from vhostd.storage.check.tree import Target
from vhostd.storage.format import (
    BLOCK_BYTES,
    CATALOG_FILE,
    KIND_LOG,
    KIND_MAP,
    LOCK_FILE,
    SEGMENTS_DIRECTORY,
    SUPERBLOCK_FILE,
    CatalogContents,
    CatalogVolume,
    FormatError,
    Place,
    SegmentHeader,
    Superblock,
    parse_segment_header,
    parse_superblock,
    read_catalog,
)

__all__ = ["check_device"]

MAX_LOOKS = 4
LOST_CATALOG = (
    "`vhostctl pool rebuild-catalog` makes a new one out of the segments; the old file is kept"
)

Progress = Callable[[int, int], None]


def check_device(
    path: str | os.PathLike[str],
    *,
    volume: str | None = None,
    data: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Checks the device of a pool at `path`; writes nothing.

    volume: only this one. data: read all data too, and compare it with its checksums. progress:
    is called with bytes of segments that are done, and in all (which may grow). Writes that are
    still in the staging ring of a daemon are not on the device, and are not looked at.

    Raises:
        NotFoundError: there is no pool at `path`, or no such volume in it.
        DeviceError: the operating system does not let it be read.
    """
    directory = Path(path)
    if not any((directory / name).exists() for name in (SUPERBLOCK_FILE, CATALOG_FILE)):
        raise NotFoundError(
            f"{directory} is no device of a pool: it has no {SUPERBLOCK_FILE} and no "
            f"{CATALOG_FILE}; name the directory that the pool was made with"
        )
    started_ns = time.monotonic_ns()
    try:
        with _shared_lock(directory) as idle:
            check = _DeviceCheck(directory, live=not idle, data=data, progress=progress)
            try:
                report = check.run(volume)
            finally:
                check.close()
    except PermissionError as error:
        raise DeviceError(
            f"device {directory} cannot be read: {error}; run the check as the user that vhostd "
            "runs as"
        ) from error
    report.summary.seconds = (time.monotonic_ns() - started_ns) / 1e9
    return report


@contextmanager
def _shared_lock(directory: Path) -> Iterator[bool]:
    """Keeps daemons away while it is held; False: one has the device."""
    try:
        fd = os.open(directory / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True  # never opened; making the file would be a change
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class _Stray:
    """A segment file that no row of the catalog names. error: its header is not readable."""

    kind: int = 0
    volume: UUID | None = None
    name: str = ""
    error: FormatError | None = None
    empty: bool = False


@dataclass(slots=True)
class _View:
    """The catalog, and what the directory holds beside it, at about one moment."""

    catalog: CatalogContents
    strays: dict[int, _Stray]
    strangers: list[Path]


class _DeviceCheck:
    def __init__(
        self, directory: Path, *, live: bool, data: bool, progress: Progress | None
    ) -> None:
        self._directory = directory
        self._live = live
        self._data = data
        self._progress = progress
        self._done_bytes = 0
        self._total_bytes = 0
        self._segment_bytes = 0
        self._report = CheckReport(path=str(directory), live=live, data=data)
        self._summary = self._report.summary
        self._findings = Findings()
        self._files = SegmentFiles(directory, self._summary)

    def close(self) -> None:
        self._files.close()

    def run(self, only: str | None) -> CheckReport:
        report = self._report
        superblock = self._read_superblock()
        catalog = self._read_catalog()
        if catalog is None:
            if superblock is not None:
                report.pool, report.pool_uuid = superblock.pool_name, str(superblock.pool)
            self._check_without_catalog(superblock, only)
        else:
            report.pool, report.pool_uuid = catalog.pool.name, str(catalog.pool.uuid)
            self._segment_bytes = catalog.pool.segment_bytes
            if superblock is not None:
                self._compare(superblock, catalog)
            self._check_catalogued(catalog, only)
        self._findings.into(report)
        return report

    # The device itself

    def _read_superblock(self) -> Superblock | None:
        path = self._directory / SUPERBLOCK_FILE
        action = "restore the file from a copy of the device; the segments are not touched by this"
        try:
            with path.open("rb") as file:
                block = file.read(BLOCK_BYTES)
            self._summary.bytes_read += len(block)
            return parse_superblock(block, Place(str(path)))
        except FileNotFoundError:
            text = f"{path} does not exist"
        except PermissionError:
            raise
        except (OSError, FormatError) as error:
            text = str(error)
            if isinstance(error, FormatError) and error.newer:
                action = "use the vhostd that made it, or a newer one"
        self._findings.add("error", "superblock", text, action, file=str(path), offset_bytes=0)
        return None

    def _read_catalog(self) -> CatalogContents | None:
        path = self._directory / CATALOG_FILE
        action = LOST_CATALOG
        try:
            catalog = read_catalog(self._directory, in_use=self._live)
        except FileNotFoundError:
            text = f"{path} does not exist; the segments were checked without it"
        except PermissionError:
            raise
        except (OSError, FormatError) as error:
            text = f"{error}; the segments were checked without it"
            if isinstance(error, FormatError) and error.newer:
                action = "use the vhostd that made it, or a newer one"
        else:
            for problem in catalog.problems:
                self._findings.add(
                    "error", "catalog", f"catalog {path}: {problem}", action, file=str(path)
                )
            return catalog
        self._findings.add("error", "catalog", text, action, file=str(path))
        return None

    def _compare(self, superblock: Superblock, catalog: CatalogContents) -> None:
        pool = catalog.pool
        pairs = (
            ("pool's UUID", superblock.pool, pool.uuid),
            ("pool's name", superblock.pool_name, pool.name),
            ("size of a segment", superblock.segment_bytes, pool.segment_bytes),
        )
        for what, found, wanted in pairs:
            if found != wanted:
                self._mismatch(f"the {what} is {found} in the superblock, {wanted} in the catalog")
        if superblock.device not in catalog.devices:
            self._mismatch(f"device {superblock.device} of the superblock is not in the catalog")

    def _mismatch(self, text: str) -> None:
        self._findings.add(
            "error",
            "superblock-differs",
            text,
            "superblock and catalog are of different devices: put back the one that belongs here",
            file=str(self._directory / SUPERBLOCK_FILE),
        )

    # With a catalog

    def _check_catalogued(self, catalog: CatalogContents, only: str | None) -> None:
        names = [volume.name for volume in catalog.volumes]
        if only is not None and only not in names:
            raise NotFoundError(
                f"volume {only} does not exist in pool {catalog.pool.name} at {self._directory}; "
                "`vhostctl volume list` shows those that do"
            )
        view = self._view(catalog)
        for volume in catalog.volumes:
            if only is None or volume.name == only:
                self._total_bytes += len(volume.segments) * self._segment_bytes
        for volume in catalog.volumes:
            if only is None or volume.name == only:
                self._check_volume(volume, view)
        if only is None:
            self._check_strays(view)

    def _view(self, catalog: CatalogContents) -> _View:
        """Reads the headers of what the catalog does not name."""
        try:
            numbers, strangers = self._files.list()
        except FileNotFoundError:
            numbers, strangers = [], []
            self._findings.add(
                "error",
                "segments-missing",
                f"{self._directory / SEGMENTS_DIRECTORY} does not exist",
                "restore the directory from a copy of the device",
            )
        known = {row.number for volume in catalog.volumes for row in volume.segments}
        strays = {}
        for number in numbers:
            if number not in known:
                stray = self._identify(number)
                if stray is not None:
                    strays[number] = stray
        return _View(catalog, strays, strangers)

    def _identify(self, number: int) -> _Stray | None:
        try:
            file = self._files.get(number)
        except FileNotFoundError:
            return None  # gone since the directory was read
        except OSError as error:
            place = Place(str(self._files.path(number)))
            return _Stray(error=FormatError("segment header", "file", place, str(error)))
        try:
            blocks = file.read_blocks(0, 2)
            header = parse_segment_header(blocks[:BLOCK_BYTES], Place(file.path))
        except OSError as error:
            place = Place(file.path)
            return _Stray(error=FormatError("segment header", "file", place, str(error)))
        except FormatError as error:
            # The header is durable before anything else is written.
            return _Stray(error=error, empty=not any(blocks[BLOCK_BYTES:]))
        finally:
            self._files.drop(number)
        return _Stray(header.kind, header.volume, header.name)

    def _check_volume(self, volume: CatalogVolume, view: _View) -> None:
        """Looks at a volume, and again at one in use that seems damaged."""
        findings, report = self._look(volume, view)
        for _ in range(MAX_LOOKS - 1):
            if not self._live or not findings.suspicious:
                break
            fresh = self._read_catalog()
            if fresh is None:
                return  # that is a finding of its own
            again = next((row for row in fresh.volumes if row.uuid == volume.uuid), None)
            if again is None:
                return  # removed meanwhile
            self._total_bytes += len(again.segments) * self._segment_bytes
            later, report = self._look(again, self._view(fresh))
            known = {finding.key for finding in findings.kept}
            is_same = all(finding.key in known for finding in later.kept)
            later.keep_only(known)
            findings = later
            if is_same:
                break
        self._report.volumes.append(report)
        findings.into(self._report)

    def _look(self, volume: CatalogVolume, view: _View) -> tuple[Findings, VolumeReport]:
        findings = Findings(volume.name)
        report = VolumeReport(name=volume.name, uuid=str(volume.uuid), size_bytes=volume.size_bytes)
        if volume.state != "present":
            findings.add(
                "note",
                "volume-removing",
                f"volume {volume.name} is being removed; it was not looked at",
                "open the pool: the removal goes on",
            )
            return findings, report
        identity = VolumeIdentity(
            view.catalog.pool.uuid, volume.uuid, volume.epoch, self._segment_bytes
        )
        live = self._check_map(volume, view.catalog, identity, findings, report)
        point = volume.checkpoint.segment if volume.checkpoint else 0
        log_rows = {row.number: row for row in volume.segments if row.kind == KIND_LOG}
        newer = {
            number
            for number, stray in view.strays.items()
            if stray.volume == volume.uuid and stray.kind == KIND_LOG and number > point
        }
        log = LogCheck(
            identity,
            volume.checkpoint,
            live.blocks,
            self._files,
            findings,
            report,
            self._summary,
            data=self._data,
            in_use=self._live,
            maps_whole=live.whole,
            removing_whole=live.removing_whole,
        )
        for number in sorted((*log_rows, *newer)):
            log.segment(number, log_rows.get(number))
            self._advance()
        log.finish()
        log.notes.compare(volume)
        live.tell_differences(log.suspects, log_rows, log.bad_data if self._data else None)
        _tell_bad_data(log.bad_data, live, volume, findings)
        return findings, report

    def _check_map(
        self,
        volume: CatalogVolume,
        catalog: CatalogContents,
        identity: VolumeIdentity,
        findings: Findings,
        report: VolumeReport,
    ) -> MapCheck:
        rows = {row.number: row for row in volume.segments if row.kind == KIND_MAP}
        family = _family(volume, catalog)
        check = MapCheck(identity, volume, family, self._files, findings, report, self._summary)
        check.walk()
        for number, row in rows.items():
            self._summary.segments += 1
            self._summary.map_segments += 1
            report.map_segments += 1
            check.segment(number, row)
            self._advance()
        return check

    def _check_strays(self, view: _View) -> None:
        volumes = {volume.uuid: volume for volume in view.catalog.volumes}
        for number, stray in view.strays.items():
            path = str(self._files.path(number))
            if number >= view.catalog.pool.next_segment:
                self._findings.add(
                    "note" if self._live else "error",
                    "catalog-old",
                    f"segment {number} has a number that the catalog never granted: it is older "
                    "than the device",
                    "put back the newest catalog with its -wal file; do not open the pool before",
                    file=path,
                    segment=number,
                )
            if stray.error is not None:
                self._findings.add(
                    "note" if stray.empty else "error",
                    "segment-header",
                    f"segment {number} is not in the catalog, and {stray.error.brief}",
                    "if a volume lacks the end of its log, it was this; else remove the file"
                    if not stray.empty
                    else "nothing: its making was interrupted and it holds nothing",
                    file=path,
                    segment=number,
                )
                continue
            volume = volumes.get(stray.volume) if stray.volume is not None else None
            if volume is None:
                self._findings.add(
                    "warning",
                    "orphan",
                    f"segment {number} belongs to volume {stray.name} ({stray.volume}), which the "
                    "catalog does not have",
                    "keep it until it is known where it came from, then remove the file",
                    file=path,
                    segment=number,
                )
            elif stray.kind == KIND_MAP or number <= _covered_segment(volume):
                self._findings.add(
                    "note",
                    "leftover",
                    f"segment {number} of volume {volume.name} is not in the catalog: a removal or "
                    "a checkpoint was interrupted",
                    "nothing: it holds nothing that is needed",
                    file=path,
                    segment=number,
                )
        for path_of_stranger in view.strangers[:100]:
            self._findings.add(
                "note",
                "stranger",
                f"{path_of_stranger} is no segment",
                "remove it if nobody needs it",
                file=str(path_of_stranger),
            )

    def _advance(self) -> None:
        self._done_bytes += self._segment_bytes
        self._total_bytes = max(self._total_bytes, self._done_bytes)
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)

    # Without a catalog

    def _check_without_catalog(self, superblock: Superblock | None, only: str | None) -> None:
        """Every segment says whose it is: all but maps can be checked."""
        try:
            numbers, _ = self._files.list()
        except FileNotFoundError:
            return
        by_uuid: dict[UUID, list[int]] = {}
        headers: dict[UUID, SegmentHeader] = {}
        for number in numbers:
            header = self._header_alone(number)
            if header is not None and header.kind == KIND_LOG:
                headers[header.volume] = header
                by_uuid.setdefault(header.volume, []).append(number)
        for uuid, log_numbers in by_uuid.items():
            newest = headers[uuid]
            if only is not None and newest.name != only:
                continue
            self._segment_bytes = newest.segment_bytes
            self._total_bytes += len(log_numbers) * newest.segment_bytes
            findings = Findings(newest.name)
            report = VolumeReport(name=newest.name, uuid=str(uuid), size_bytes=newest.size_bytes)
            log = LogCheck(
                VolumeIdentity(
                    superblock.pool if superblock else None,
                    uuid,
                    (1 << 64) - 1,
                    newest.segment_bytes,
                ),
                None,
                {},
                self._files,
                findings,
                report,
                self._summary,
                data=self._data,
                in_use=self._live,
                catalogued=False,
            )
            for number in log_numbers:
                log.segment(number, None)
                self._advance()
            log.notes.compare(None)
            _tell_bad_data(log.bad_data, None, None, findings)
            self._report.volumes.append(report)
            findings.into(self._report)

    def _header_alone(self, number: int) -> SegmentHeader | None:
        file = self._files.get(number)
        try:
            return parse_segment_header(file.read_blocks(0), Place(file.path))
        except FormatError as error:
            self._findings.add(
                "error",
                "segment-header",
                f"segment {number}: {error.brief}",
                "nothing tells whose it is; keep it",
                file=file.path,
                segment=number,
                offset_bytes=0,
            )
            return None
        finally:
            self._files.drop(number)


def _covered_segment(volume: CatalogVolume) -> int:
    return volume.checkpoint.segment if volume.checkpoint else 0


def _family(volume: CatalogVolume, catalog: CatalogContents) -> Family:
    by_uuid = {other.uuid: other for other in catalog.volumes if other.state == "present"}
    ancestors: list[CatalogVolume] = []
    at = volume
    while at.origin is not None and (parent := by_uuid.get(at.origin[0])) is not None:
        if parent in ancestors or parent is volume:
            break  # a damaged catalog
        ancestors.append(parent)
        at = parent
    clones: list[CatalogVolume] = []
    parents = {volume.uuid}
    while True:
        more = [
            other
            for other in by_uuid.values()
            if other.origin is not None and other.origin[0] in parents and other not in clones
        ]
        more = [other for other in more if other is not volume]
        if not more:
            return Family(tuple(ancestors), tuple(clones))
        clones += more
        parents = {other.uuid for other in more}


def _tell_bad_data(
    bad_data: list[BadData],
    maps: MapCheck | None,
    volume: CatalogVolume | None,
    findings: Findings,
) -> None:
    """Reports damaged blocks with who reads them, one finding for blocks in a row with the same
    readers. Blocks that no checkpoint covers are the head's."""
    blocks = sorted(
        (bad.block + index, bad.segment, bad.offset + index, bad.file)
        for bad in bad_data
        for index in range(bad.count)
    )
    readers = [list[str]()] * len(blocks)
    if maps is not None and volume is not None:
        targets = [Target(block, segment << 13 | at) for block, segment, at, _ in blocks]
        readers = [found or [volume.name] for found in maps.readers(targets)]
    at = 0
    while at < len(blocks):
        block, segment, offset, file = blocks[at]
        count = 1
        while (
            at + count < len(blocks)
            and blocks[at + count] == (block + count, segment, offset + count, file)
            and readers[at + count] == readers[at]
        ):
            count += 1
        who = ", ".join(readers[at][:5]) + (" and others" if len(readers[at]) > 5 else "")
        findings.add(
            "error",
            "data-damaged",
            f"{count} blocks of data at block {offset} of segment {segment} do not match their "
            "checksums" + (f"; read by {who}" if who else ""),
            f"{RESTORE}: reading it gives I/O errors, never wrong bytes",
            file=file,
            segment=segment,
            offset_bytes=offset * BLOCK_BYTES,
            volume_offset_bytes=block * BLOCK_BYTES,
            length_bytes=count * BLOCK_BYTES,
            readers=readers[at],
        )
        at += count
