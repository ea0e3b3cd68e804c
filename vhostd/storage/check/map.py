"""Checks the map of one volume: the tree of the committed checkpoint, node by node, in block order.

The walk leaves what the tree says of each log segment (`live.LiveBlocks`) for the pass over the
log, and counts the bytes of nodes in each map segment. It keeps one path of the tree in memory.
One `MapCheck` a volume and a look at it; not shared between threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from vhostd.storage.check.files import SegmentFiles
from vhostd.storage.check.live import LiveBlocks
from vhostd.storage.check.log import Suspect
from vhostd.storage.check.place import RESTORE, VolumeIdentity, check_header
from vhostd.storage.check.report import CheckSummary, Findings, VolumeReport
from vhostd.storage.format import (
    BLOCK_BYTES,
    KIND_LOG,
    KIND_MAP,
    ROOT_LEVEL,
    CatalogSegment,
    CatalogVolume,
    FormatError,
    MapRun,
    Node,
    NodeLocation,
    Place,
    node_span_blocks,
    parse_node,
    parse_root,
)

__all__ = ["MapCheck"]

REPORT = "report this with the log: the accounting of space is wrong"


@dataclass(frozen=True, slots=True)
class _Visit:
    """A node that is to be read, and what it has to be."""

    location: NodeLocation
    level: int
    first_block: int


class MapCheck:
    """One look at a volume's map."""

    def __init__(
        self,
        identity: VolumeIdentity,
        volume: CatalogVolume,
        rows: Mapping[int, CatalogSegment],
        files: SegmentFiles,
        findings: Findings,
        report: VolumeReport,
        summary: CheckSummary,
    ) -> None:
        self._identity = identity
        self._volume = volume
        self._rows = rows
        self._files = files
        self._findings = findings
        self._report = report
        self._summary = summary
        self._node_bytes: dict[int, int] = {}
        self._whole = True
        self.blocks: dict[int, LiveBlocks] = {}

    def walk(self) -> None:
        """Walks the whole tree."""
        point = self._volume.checkpoint
        if point is None:
            return
        mapped_blocks = 0
        beyond_blocks = 0
        size_blocks = -(-self._volume.size_bytes // BLOCK_BYTES)
        for run in self._runs(self._count_node):
            mapped_blocks += run.count
            beyond_blocks += min(run.count, max(0, run.block + run.count - size_blocks))
            self._add_run(run)
        self._report.mapped_blocks = mapped_blocks
        if self._whole and mapped_blocks != point.mapped_blocks:
            self._findings.add(
                "error",
                "mapped-blocks-differ",
                f"the map holds {mapped_blocks} blocks, and the catalog has {point.mapped_blocks}",
                REPORT,
            )
        if beyond_blocks:
            self._findings.add(
                "warning",
                "map-beyond-size",
                f"the map holds {beyond_blocks} blocks behind the volume's end at "
                f"{self._volume.size_bytes} bytes",
                "discard them before the volume is made larger: they would show again",
                volume_offset_bytes=self._volume.size_bytes,
            )
        self._find_unknown_segments()

    def segment(self, number: int, row: CatalogSegment) -> None:
        """Checks a map segment's header, and its count of live bytes."""
        try:
            check_header(self._files.get(number), self._identity, KIND_MAP, self._findings)
        except FileNotFoundError:
            path = str(self._files.path(number))
            self._findings.add(
                "error",
                "segment-missing",
                f"map segment {number} is in the catalog and its file {path} does not exist",
                "put the file back if it was moved; else " + RESTORE,
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
        live_bytes = self._node_bytes.get(number, 0)
        if self._whole and live_bytes != row.live:
            self._findings.add(
                "error" if live_bytes > row.live else "warning",
                "live-count-differs",
                f"{live_bytes} bytes of nodes in map segment {number} are in use, and the catalog "
                f"has {row.live}",
                REPORT,
                segment=number,
            )

    def tell_differences(
        self, suspects: Mapping[int, Suspect], log_rows: Mapping[int, CatalogSegment]
    ) -> None:
        """Walks again, to tell which blocks of the suspected segments differ from their records."""
        if not suspects:
            return
        explained: set[int] = set()
        for run in self._runs(None):
            suspect = suspects.get(run.segment)
            if suspect is None:
                continue
            for index in range(run.count):
                at = run.offset_blocks + index
                if at >= len(suspect.blocks):
                    break
                block = run.block + index
                checksum = int.from_bytes(run.checksums[4 * index : 4 * index + 4], "little")
                if suspect.blocks[at] == block and suspect.checksums[at] == checksum:
                    continue
                explained.add(run.segment)
                if suspect.blocks[at] == Suspect.unknown:
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
                    RESTORE,
                    segment=run.segment,
                    offset_bytes=at * BLOCK_BYTES,
                    volume_offset_bytes=block * BLOCK_BYTES,
                    length_bytes=BLOCK_BYTES,
                )
        for number in sorted(suspects.keys() - explained):
            self._findings.add(
                "error",
                "map-differs",
                f"the map and the records of segment {number} do not agree, and no single block "
                "tells why",
                RESTORE if number in log_rows else REPORT,
                segment=number,
            )

    # The tree

    def _runs(self, count_node: Callable[[NodeLocation], None] | None) -> Iterator[MapRun]:
        """The mapped runs in block order. With `count_node`, tells what is wrong on the way."""
        point = self._volume.checkpoint
        if point is None or not point.root:
            return
        try:
            root = parse_root(point.root, Place(f"catalog, volume {self._volume.name}"))
        except FormatError as error:
            self._whole = False
            if count_node:
                self._findings.add(
                    "error",
                    "map-root",
                    f"the catalog names no node as the root of the map: {error.brief}",
                    RESTORE,
                )
            return
        stack = [_Visit(root, ROOT_LEVEL, 0)]
        while stack:
            visit = stack.pop()
            try:
                place, content = self._read_node(visit.location)
                node = parse_node(content, place, visit.location)
                _check_place(node, visit, place)
            except (FormatError, OSError) as error:
                self._whole = False
                if count_node:
                    self._add_bad_node(visit, error)
                continue
            if count_node:
                count_node(visit.location)
            yield from node.runs
            span_blocks = node_span_blocks(node.level - 1) if node.level else 0
            for index, location in reversed(node.children):
                stack.append(
                    _Visit(location, node.level - 1, node.first_block + index * span_blocks)
                )

    def _read_node(self, location: NodeLocation) -> tuple[Place, bytes]:
        if location.segment not in self._rows:
            place = Place(str(self._files.path(location.segment)), location.offset_bytes)
            raise FormatError(
                "map node", "location", place, "the catalog has no such map segment of the volume"
            )
        file = self._files.get(location.segment)
        place = Place(file.path, location.offset_bytes)
        row = self._rows[location.segment]
        if location.offset_bytes + location.len_bytes > row.used_blocks * BLOCK_BYTES:
            raise FormatError(
                "map node",
                "location",
                place,
                f"it ends behind the {row.used_blocks} blocks that the catalog has in use",
            )
        return place, file.read(location.offset_bytes, location.len_bytes)

    def _count_node(self, location: NodeLocation) -> None:
        self._summary.nodes += 1
        self._report.nodes += 1
        used = self._node_bytes.get(location.segment, 0)
        self._node_bytes[location.segment] = used + location.len_bytes

    def _add_bad_node(self, visit: _Visit, error: FormatError | OSError) -> None:
        location = visit.location
        reason = error.brief if isinstance(error, FormatError) else str(error)
        self._findings.add(
            "error",
            "map-node",
            f"a node of the map at offset {location.offset_bytes} of segment {location.segment} is "
            f"lost ({reason}): reading the blocks below it gives I/O errors",
            RESTORE,
            file=str(self._files.path(location.segment)),
            segment=location.segment,
            offset_bytes=location.offset_bytes,
            volume_offset_bytes=visit.first_block * BLOCK_BYTES,
            length_bytes=node_span_blocks(visit.level) * BLOCK_BYTES,
        )

    # What it says of log segments

    def _add_run(self, run: MapRun) -> None:
        segment_blocks = self._identity.segment_bytes // BLOCK_BYTES
        if run.offset_blocks == 0 or run.offset_blocks + run.count > segment_blocks:
            self._add_bad_run(run, "map-address", "no blocks of a segment")
            return
        live = self.blocks.get(run.segment)
        if live is None:
            live = self.blocks[run.segment] = LiveBlocks()
        if not live.add(run.block, run.offset_blocks, run.count, run.checksums):
            self._add_bad_run(run, "address-twice", "and another block of the volume, too")

    def _add_bad_run(self, run: MapRun, code: str, text: str) -> None:
        self._findings.add(
            "error",
            code,
            f"the map has {run.count} blocks from block {run.block} of the volume at block "
            f"{run.offset_blocks} of segment {run.segment}: {text}",
            RESTORE,
            segment=run.segment,
            offset_bytes=run.offset_blocks * BLOCK_BYTES,
            volume_offset_bytes=run.block * BLOCK_BYTES,
            length_bytes=run.count * BLOCK_BYTES,
        )

    def _find_unknown_segments(self) -> None:
        known = {row.number for row in self._volume.segments if row.kind == KIND_LOG}
        for number in sorted(self.blocks.keys() - known):
            self._findings.add(
                "error",
                "map-address",
                f"the map reaches {self.blocks[number].count} blocks in segment {number}, which is "
                "no log segment of the volume in the catalog",
                RESTORE,
                segment=number,
            )


def _check_place(node: Node, visit: _Visit, place: Place) -> None:
    """The node is the one of its place in the tree."""
    if (node.level, node.first_block) != (visit.level, visit.first_block):
        reason = f"it is that of level {node.level} at block {node.first_block}"
        raise FormatError("map node", "place in the tree", place, reason)
