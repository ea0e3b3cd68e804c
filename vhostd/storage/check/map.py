"""Checks the maps of one volume: the trees of the committed checkpoint and of all snapshots.

What the trees say of each log segment (`live.LiveBlocks`) is left for the pass over the log, and
which nodes of each map segment they reach is compared with its dead set. Clones of the volume's
snapshots are walked too, as far as they differ, since they read the same segments; what is wrong
with their own nodes is told when they are checked themselves. One `MapCheck` a volume and a look at
it; not shared between threads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vhostd.storage.check.files import SegmentFiles
from vhostd.storage.check.live import LiveBlocks
from vhostd.storage.check.log import MAX_BAD_DATA, BadData, Suspect
from vhostd.storage.check.place import REBUILD, REPORT, VolumeIdentity, check_header
from vhostd.storage.check.report import CheckSummary, Findings, VolumeReport
from vhostd.storage.check.tree import Forest, Root, Target
from vhostd.storage.format import (
    BLOCK_BYTES,
    KIND_LOG,
    KIND_MAP,
    CatalogSegment,
    CatalogVolume,
    FormatError,
    MapRun,
    NodeLocation,
    Place,
    crc32c,
    node_span_blocks,
    parse_dead_nodes,
)

__all__ = ["Family", "MapCheck"]


@dataclass(frozen=True, slots=True)
class Family:
    """ancestors: volumes that this one is a clone of, nearest first. clones: those of it, of any
    depth."""

    ancestors: tuple[CatalogVolume, ...] = ()
    clones: tuple[CatalogVolume, ...] = ()


@dataclass(slots=True)
class _Nodes:
    """Nodes that are reached in one map segment: (offset, length). held: by more than a snapshot
    that is being removed."""

    held: list[tuple[int, int]] = field(default_factory=list)
    others: list[tuple[int, int]] = field(default_factory=list)


class MapCheck:
    """One look at a volume's maps."""

    def __init__(
        self,
        identity: VolumeIdentity,
        volume: CatalogVolume,
        family: Family,
        files: SegmentFiles,
        findings: Findings,
        report: VolumeReport,
        summary: CheckSummary,
    ) -> None:
        self._identity = identity
        self._volume = volume
        self._family = family
        self._files = files
        self._findings = findings
        self._report = report
        self._summary = summary
        relatives = (volume, *family.ancestors, *family.clones)
        map_rows = {s.number: s for v in relatives for s in v.segments if s.kind == KIND_MAP}
        self._forest = Forest(files, map_rows)
        self._own_logs = {row.number for row in volume.segments if row.kind == KIND_LOG}
        self._own_maps = {row.number for row in volume.segments if row.kind == KIND_MAP}
        self._foreign_logs = {
            row.number for v in family.ancestors for row in v.segments if row.kind == KIND_LOG
        }
        self._nodes: dict[int, _Nodes] = {}
        # What the walk is at.
        self._root = Root(volume.name, b"")
        self._held = True
        self._beyond_blocks = 0
        self._beyond_size_blocks = 0
        self._unknown: dict[int, int] = {}
        # All trees that must be readable were; so were those of snapshots that are being removed,
        # of which a crash may have left nothing.
        self.whole = True
        self.removing_whole = True
        self.blocks: dict[int, LiveBlocks] = {}

    def walk(self) -> None:
        """Walks all trees of the volume."""
        point = self._volume.checkpoint
        head = Root(self._volume.name, point.root if point else b"")
        self._beyond_size_blocks = -(-self._volume.size_bytes // BLOCK_BYTES)
        self._report.mapped_blocks = self._walk(head, point.mapped_blocks if point else 0)
        if self._beyond_blocks:
            self._findings.add(
                "warning",
                "map-beyond-size",
                f"the map holds {self._beyond_blocks} blocks behind the volume's end at "
                f"{self._volume.size_bytes} bytes",
                "discard them before the volume is made larger: they would show again",
                volume_offset_bytes=self._volume.size_bytes,
            )
        self._beyond_size_blocks = 1 << 62
        # What is being removed comes last, so that what it alone reaches is known.
        ordered = sorted(self._volume.snapshots, key=lambda s: (s.state == "removing", -s.position))
        for snapshot in ordered:
            if snapshot.state != "pending":
                self._held = snapshot.state != "removing"
                self._report.snapshots += 1
                self._walk(
                    Root(_name(self._volume, snapshot.name), snapshot.root), snapshot.mapped_blocks
                )
        self._held = True
        self._find_unknown_segments()
        self._add_bad_nodes()
        self._walk_clones()

    def readers(self, targets: Sequence[Target]) -> list[list[str]]:
        """For each of the targets (ascending by block), who reads it."""
        return self._forest.readers(self._roots(removing=False), targets)

    def _roots(self, *, removing: bool) -> list[Root]:
        """Everything that reads the volume's segments."""
        found = []
        for volume in (self._volume, *self._family.clones):
            if volume.checkpoint is not None:
                found.append(Root(volume.name, volume.checkpoint.root))
            for snapshot in volume.snapshots:
                if removing or snapshot.state != "removing":
                    found.append(Root(_name(volume, snapshot.name), snapshot.root))
        return found

    def segment(self, number: int, row: CatalogSegment) -> None:
        """Checks a map segment's header, and its count of live bytes."""
        try:
            check_header(self._files.get(number), self._identity, KIND_MAP, self._findings, REBUILD)
        except FileNotFoundError:
            path = str(self._files.path(number))
            self._findings.add(
                "error",
                "segment-missing",
                f"map segment {number} is in the catalog and its file {path} does not exist",
                "put the file back if it was moved; else " + REBUILD,
                file=path,
                segment=number,
            )
        except OSError as error:
            self._findings.add(
                "error",
                "segment-unreadable",
                f"map segment {number} cannot be read: {error}",
                "see the kernel's log, and check the permissions of the file",
                segment=number,
            )
        finally:
            self._files.drop(number)
        if self.whole:
            self._compare_dead(number, row)

    def tell_differences(
        self,
        suspects: Mapping[int, Suspect],
        log_rows: Mapping[int, CatalogSegment],
        bad_data: list[BadData] | None,
    ) -> None:
        """Walks again, to tell which blocks of the suspected segments differ from their records.

        bad_data: gets blocks that no readable record has, and that do not match the map's checksum;
        None: data is not read.
        """
        if not suspects:
            return
        again = _Differences(suspects, self._findings, self._files, bad_data)
        rows = {
            row.number: row
            for volume in (self._volume, *self._family.ancestors, *self._family.clones)
            for row in volume.segments
            if row.kind == KIND_MAP
        }
        forest = Forest(self._files, rows)
        for root in self._roots(removing=True):
            try:
                forest.walk(root, again)
            except FormatError:
                continue  # told by `walk`
        for number in sorted(suspects.keys() - again.explained):
            self._findings.add(
                "error",
                "map-differs",
                f"the map and the records of segment {number} do not agree, and no single block "
                "tells why",
                REBUILD if number in log_rows else REPORT,
                segment=number,
            )

    # Trees

    def _walk(self, root: Root, expected_blocks: int) -> int:
        self._root = root
        try:
            mapped_blocks, whole = self._forest.walk(root, self)
        except FormatError as error:
            if not self._held:
                self.removing_whole = False
                return 0
            self.whole = False
            self._findings.add(
                "error",
                "map-root",
                f"the catalog names no node as the root of {root.reader}: {error.brief}",
                REBUILD,
                readers=[root.reader],
            )
            return 0
        if not self._held:
            self.removing_whole &= whole
            return mapped_blocks
        self.whole &= whole
        if whole and mapped_blocks != expected_blocks:
            self._findings.add(
                "error",
                "mapped-blocks-differ",
                f"the map of {root.reader} holds {mapped_blocks} blocks, and the catalog has "
                f"{expected_blocks}",
                REBUILD,
                readers=[root.reader],
            )
        return mapped_blocks

    def node(self, location: NodeLocation) -> None:
        """Of `Sink`."""
        self._summary.nodes += 1
        self._report.nodes += 1
        if location.segment in self._own_maps:
            nodes = self._nodes.setdefault(location.segment, _Nodes())
            reached = nodes.held if self._held else nodes.others
            reached.append((location.offset_bytes, location.len_bytes))

    def run(self, run: MapRun) -> None:
        """Of `Sink`."""
        beyond = run.block + run.count - self._beyond_size_blocks
        self._beyond_blocks += min(run.count, max(0, beyond))
        if run.segment not in self._own_logs:
            if run.segment not in self._foreign_logs and self._held:
                self._unknown[run.segment] = self._unknown.get(run.segment, 0) + run.count
            return
        segment_blocks = self._identity.segment_bytes // BLOCK_BYTES
        if run.offset_blocks + run.count > segment_blocks:
            self._findings.add(
                "error",
                "map-address",
                f"{self._root.reader} has {run.count} blocks from block {run.block} of the volume "
                f"at block {run.offset_blocks} of segment {run.segment}: no blocks of a segment",
                REBUILD,
                segment=run.segment,
                offset_bytes=run.offset_blocks * BLOCK_BYTES,
                volume_offset_bytes=run.block * BLOCK_BYTES,
                length_bytes=run.count * BLOCK_BYTES,
                readers=[self._root.reader],
            )
            return
        live = self.blocks.get(run.segment)
        if live is None:
            live = self.blocks[run.segment] = LiveBlocks()
        live.add(run.block, run.offset_blocks, run.count, run.checksums, held=self._held)

    def _add_bad_nodes(self) -> None:
        removing = _name(self._volume, None)
        for bad in self._forest.bad:
            location = bad.location
            bad.readers = [reader for reader in bad.readers if reader != removing]
            if not bad.readers:
                continue
            self._findings.add(
                "error",
                "map-node",
                f"a node of the map at offset {location.offset_bytes} of segment "
                f"{location.segment} is lost ({bad.reason}): reading the blocks below it gives I/O "
                f"errors in {_listed(bad.readers)}",
                REBUILD,
                file=str(self._files.path(location.segment)),
                segment=location.segment,
                offset_bytes=location.offset_bytes,
                volume_offset_bytes=bad.first_block * BLOCK_BYTES,
                length_bytes=node_span_blocks(bad.level) * BLOCK_BYTES,
                readers=bad.readers,
            )

    def _find_unknown_segments(self) -> None:
        for number, blocks in sorted(self._unknown.items()):
            self._findings.add(
                "error",
                "map-address",
                f"the map reaches {blocks} blocks in segment {number}, which is no log segment of "
                "the volume in the catalog",
                REBUILD,
                segment=number,
            )

    def _walk_clones(self) -> None:
        sink = _CloneSink(self.blocks, self._own_logs)
        for clone in self._family.clones:
            roots = [Root(_name(clone, s.name), s.root) for s in clone.snapshots]
            if clone.checkpoint is not None:
                roots.insert(0, Root(clone.name, clone.checkpoint.root))
            for root in roots:
                sink.lost_blocks = 0
                try:
                    self._forest.walk(root, sink)
                except FormatError:
                    continue  # told when the clone is checked
                if sink.lost_blocks and self.whole:
                    self._findings.add(
                        "error",
                        "clone-reaches-dead",
                        f"{root.reader}, a clone, reads {sink.lost_blocks} blocks that no snapshot "
                        f"of volume {self._volume.name} holds: their space may be given back",
                        REPORT,
                        readers=[root.reader],
                    )

    # Dead nodes

    def _compare_dead(self, number: int, row: CatalogSegment) -> None:
        path = str(self._files.path(number))
        try:
            dead = parse_dead_nodes(row.dead, Place("catalog", 0))
        except FormatError as error:
            self._findings.add(
                "error",
                "dead-set",
                f"the catalog's list of dead nodes of map segment {number}: {error.brief}",
                REBUILD,
                file=path,
                segment=number,
            )
            return
        nodes = self._nodes.get(number, _Nodes())
        starts = [start for start, _ in dead]

        def dead_bytes(offset: int, length: int) -> int:
            at = bisect_right(starts, offset) - 1
            total = 0
            for start, size in dead[max(at, 0) :]:
                if start >= offset + length:
                    break
                total += max(0, min(offset + length, start + size) - max(offset, start))
            return total

        for offset, length in nodes.held:
            if dead_bytes(offset, length):
                self._findings.add(
                    "error",
                    "dead-but-reached",
                    f"the node at offset {offset} of map segment {number} is dead in the catalog, "
                    "and a map has it: its space may be given back",
                    REBUILD,
                    file=path,
                    segment=number,
                    offset_bytes=offset,
                )
        live_bytes = sum(
            length - dead_bytes(offset, length) for offset, length in nodes.held + nodes.others
        )
        if live_bytes > row.live or (live_bytes < row.live and self.removing_whole):
            self._findings.add(
                "error" if live_bytes > row.live else "warning",
                "live-count-differs",
                f"{live_bytes} bytes of nodes in map segment {number} are in use, and the catalog "
                f"has {row.live}",
                REBUILD,
                file=path,
                segment=number,
            )


class _CloneSink:
    """Blocks of clones in segments of the volume."""

    def __init__(self, blocks: Mapping[int, LiveBlocks], own_logs: set[int]) -> None:
        self._blocks = blocks
        self._own_logs = own_logs
        self.lost_blocks = 0

    def node(self, location: NodeLocation) -> None:
        """Of `Sink`."""

    def run(self, run: MapRun) -> None:
        """Of `Sink`."""
        if run.segment not in self._own_logs:
            return
        live = self._blocks.get(run.segment)
        mask = ((1 << run.count) - 1) << run.offset_blocks
        if live is None or mask & ~live.held:
            self.lost_blocks += run.count if live is None else (mask & ~live.held).bit_count()
            return
        live.add(run.block, run.offset_blocks, run.count, run.checksums)


class _Differences:
    """Tells which blocks differ from their records."""

    def __init__(
        self,
        suspects: Mapping[int, Suspect],
        findings: Findings,
        files: SegmentFiles,
        bad_data: list[BadData] | None,
    ) -> None:
        self._suspects = suspects
        self._findings = findings
        self._files = files
        self._bad_data = bad_data
        self._read: set[tuple[int, int]] = set()
        self.explained: set[int] = set()

    def node(self, location: NodeLocation) -> None:
        """Of `Sink`."""

    def run(self, run: MapRun) -> None:
        """Of `Sink`."""
        suspect = self._suspects.get(run.segment)
        if suspect is None:
            return
        for index in range(run.count):
            at = run.offset_blocks + index
            if at >= len(suspect.blocks):
                break
            block = run.block + index
            checksum = int.from_bytes(run.checksums[4 * index : 4 * index + 4], "little")
            if suspect.blocks[at] == block and suspect.checksums[at] == checksum:
                continue
            self.explained.add(run.segment)
            if suspect.blocks[at] == Suspect.unknown:
                self._check_data(run.segment, at, block, checksum)
                text = "where no record covered by the checkpoint has data"
            elif suspect.blocks[at] != block:
                text = f"where a record has block {suspect.blocks[at]}"
            else:
                text = (
                    f"with checksum {checksum:#010x}, and the record has "
                    f"{suspect.checksums[at]:#010x}"
                )
            self._findings.add(
                "error",
                "map-differs",
                f"the map has block {block} of the volume at block {at} of segment "
                f"{run.segment}, {text}",
                REBUILD,
                segment=run.segment,
                offset_bytes=at * BLOCK_BYTES,
                volume_offset_bytes=block * BLOCK_BYTES,
                length_bytes=BLOCK_BYTES,
            )

    def _check_data(self, segment: int, at: int, block: int, checksum: int) -> None:
        if self._bad_data is None or (segment, at) in self._read:
            return
        self._read.add((segment, at))
        file = self._files.get(segment)
        try:
            matches = crc32c(file.read_blocks(at)) == checksum
        except OSError:
            matches = False
        if not matches and len(self._bad_data) < MAX_BAD_DATA:
            self._bad_data.append(BadData(file.path, segment, at, block, 1))


def _name(volume: CatalogVolume, snapshot: str | None) -> str:
    return f"{volume.name}@{snapshot if snapshot is not None else '(removing)'}"


def _listed(readers: Sequence[str]) -> str:
    shown = ", ".join(readers[:5])
    return shown if len(readers) <= 5 else f"{shown} and {len(readers) - 5} more"
