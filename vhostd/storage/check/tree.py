"""Walks the trees of a volume's roots: head, snapshots, clones. Nodes they share are read once.

Recursion is as deep as a tree is high (four levels). Memory: about 100 bytes for each node read.
One `Forest` a look at a volume; not shared between threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vhostd.storage.check.files import SegmentFiles
from vhostd.storage.format import (
    BLOCK_BYTES,
    MAX_SEGMENT_BLOCKS,
    ROOT_LEVEL,
    CatalogSegment,
    FormatError,
    MapRun,
    Node,
    NodeLocation,
    Place,
    node_span_blocks,
    parse_node,
    parse_root,
)

__all__ = ["BadNode", "Forest", "Root", "Sink", "Target"]


@dataclass(frozen=True, slots=True)
class Root:
    """A tree. reader: `VOLUME` or `VOLUME@SNAPSHOT`. location: as in the catalog; empty: none."""

    reader: str
    location: bytes


@dataclass(slots=True)
class BadNode:
    """A node that cannot be read. readers: whose trees have it."""

    location: NodeLocation
    level: int
    first_block: int
    reason: str
    readers: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Target:
    """A block of the volume at an address; ordered by block where they are many."""

    block: int
    address: int


class Sink(Protocol):
    """What is told of nodes that were not met before."""

    def node(self, location: NodeLocation) -> None: ...

    def run(self, run: MapRun) -> None: ...


class Forest:
    """Trees of one volume and its clones."""

    def __init__(self, files: SegmentFiles, rows: Mapping[int, CatalogSegment]) -> None:
        self._files = files
        self._rows = rows
        # By key: blocks mapped below; of those with bad nodes below, which.
        self._mapped: dict[int, int] = {}
        self._bad_below: dict[int, tuple[BadNode, ...]] = {}
        self.bad: list[BadNode] = []

    def walk(self, root: Root, sink: Sink) -> tuple[int, bool]:
        """Walks what of a tree was not walked yet; blocks it maps, and whether all of it was read.

        Raises:
            FormatError: the catalog names no node as its root.
        """
        if not root.location:
            return 0, True
        location = parse_root(root.location, Place(f"catalog, {root.reader}"))
        mapped, bad = self._visit(location, ROOT_LEVEL, 0, sink)
        for node in bad:
            node.readers.append(root.reader)
        return mapped, not bad

    def readers(self, roots: Iterable[Root], targets: Sequence[Target]) -> list[list[str]]:
        """For each target (ascending by block): whose trees map the block to the address."""
        found: list[list[str]] = [[] for _ in targets]
        known: dict[int, tuple[int, ...]] = {}
        for root in roots:
            if not root.location:
                continue
            try:
                location = parse_root(root.location, Place(f"catalog, {root.reader}"))
            except FormatError:
                continue  # told by `walk`
            wanted = range(len(targets))
            for index in self._search(location, ROOT_LEVEL, 0, targets, wanted, known):
                found[index].append(root.reader)
        return found

    def _visit(
        self, location: NodeLocation, level: int, first_block: int, sink: Sink
    ) -> tuple[int, tuple[BadNode, ...]]:
        key = _key(location)
        known = self._mapped.get(key)
        if known is not None:
            return known, self._bad_below.get(key, ())
        try:
            node = self._read(location, level, first_block)
        except (FormatError, OSError) as error:
            reason = error.brief if isinstance(error, FormatError) else str(error)
            bad_node = BadNode(location, level, first_block, reason)
            self.bad.append(bad_node)
            self._mapped[key], self._bad_below[key] = 0, (bad_node,)
            return 0, (bad_node,)
        sink.node(location)
        mapped, bad = 0, list[BadNode]()
        for run in node.runs:
            mapped += run.count
            sink.run(run)
        for child, first in _children(node):
            count, bad_below = self._visit(child, level - 1, first, sink)
            mapped += count
            bad.extend(bad_below)
        self._mapped[key] = mapped
        if bad:
            self._bad_below[key] = tuple(bad)
        return mapped, tuple(bad)

    def _search(
        self,
        location: NodeLocation,
        level: int,
        first_block: int,
        targets: Sequence[Target],
        wanted: Iterable[int],
        known: dict[int, tuple[int, ...]],
    ) -> tuple[int, ...]:
        key = _key(location)
        if key in known:
            return known[key]
        found: list[int] = []
        try:
            node = self._read(location, level, first_block)
        except (FormatError, OSError):
            node = Node(level, first_block)
        wanted = list(wanted)
        for run in node.runs:
            address = run.segment * MAX_SEGMENT_BLOCKS + run.offset_blocks - run.block
            found.extend(
                index
                for index in wanted
                if 0 <= targets[index].block - run.block < run.count
                and targets[index].address == address + targets[index].block
            )
        span_blocks = node_span_blocks(level - 1) if level else 0
        for child, first in _children(node):
            inside = [i for i in wanted if 0 <= targets[i].block - first < span_blocks]
            if inside:
                found.extend(self._search(child, level - 1, first, targets, inside, known))
        known[key] = tuple(found)
        return known[key]

    def _read(self, location: NodeLocation, level: int, first_block: int) -> Node:
        row = self._rows.get(location.segment)
        if row is None:
            place = Place(str(self._files.path(location.segment)), location.offset_bytes)
            raise FormatError(
                "map node", "location", place, "the catalog has no such map segment of the volume"
            )
        file = self._files.get(location.segment)
        place = Place(file.path, location.offset_bytes)
        if location.offset_bytes + location.len_bytes > row.used_blocks * BLOCK_BYTES:
            raise FormatError(
                "map node",
                "location",
                place,
                f"it ends behind the {row.used_blocks} blocks that the catalog has in use",
            )
        content = file.read(location.offset_bytes, location.len_bytes)
        node = parse_node(content, place, location)
        if (node.level, node.first_block) != (level, first_block):
            reason = f"it is that of level {node.level} at block {node.first_block}"
            raise FormatError("map node", "place in the tree", place, reason)
        return node


def _children(node: Node) -> Iterable[tuple[NodeLocation, int]]:
    """With the first block of each."""
    span_blocks = node_span_blocks(node.level - 1) if node.level else 0
    return ((child, node.first_block + index * span_blocks) for index, child in node.children)


def _key(location: NodeLocation) -> int:
    """Two nodes with the same key are the same: place and checksum."""
    return (location.segment << 25 | location.offset_bytes) << 32 | location.checksum
