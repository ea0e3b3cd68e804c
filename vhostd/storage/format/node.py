"""Bytes of map nodes: locations, inner nodes, and the three forms of leaves.

Written from `docs/format.md`, "Map node", and nothing else. Parsing has no effects, accepts any
bytes, and raises nothing but `FormatError`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

from vhostd.storage.format.errors import FormatError, Place
from vhostd.storage.format.fields import (
    MAX_SEGMENT_BLOCKS,
    MAX_SEGMENT_NUMBER,
    MAX_VOLUME_BLOCKS,
    Bytes,
    check_magic,
    check_range,
    check_sum,
)

__all__ = [
    "LEAF_BLOCKS",
    "ROOT_LEVEL",
    "MapRun",
    "Node",
    "NodeLocation",
    "node_span_blocks",
    "parse_node",
    "parse_root",
]

LEAF_BLOCKS = 1024
FAN_OUT = 256
ROOT_LEVEL = 3
MIN_NODE_BYTES = 56
MAX_NODE_BYTES = 12328

_WHAT = "map node"
_LOCATION = struct.Struct("<QIII")
_HEADER = struct.Struct("<4sHBBQIIHHB3xQ")
_CHECKSUM_OFFSET = 20
_BITMAP_BYTES = FAN_OUT // 8
_INNER, _SPARSE, _RUNS, _DENSE = range(4)
_FORMS = ("inner node", "sparse leaf", "runs leaf", "dense leaf")


@dataclass(frozen=True, slots=True)
class NodeLocation:
    """Where a node is, and the checksum it has."""

    segment: int
    offset_bytes: int
    len_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class MapRun:
    """`count` blocks of the volume from `block` at consecutive addresses of one segment.

    offset_blocks: of the first, in the segment. checksums: little-endian u32, in the order of
    blocks.
    """

    block: int
    count: int
    segment: int
    offset_blocks: int
    checksums: bytes


@dataclass(frozen=True, slots=True)
class Node:
    """A node: children (index, location) of an inner one, runs of a leaf; both ascending."""

    level: int
    first_block: int
    children: tuple[tuple[int, NodeLocation], ...] = ()
    runs: tuple[MapRun, ...] = ()


@dataclass(frozen=True, slots=True)
class _Header:
    level: int
    form: int
    first_block: int
    entries: int
    rows: int
    width: int
    base: int


def node_span_blocks(level: int) -> int:
    """How many blocks of the volume a node of that level covers."""
    return LEAF_BLOCKS << 8 * level


def parse_root(data: bytes, place: Place) -> NodeLocation:
    """Reads the location of a root as the catalog keeps it.

    Raises:
        FormatError: no node can be there.
    """
    if len(data) != _LOCATION.size:
        raise FormatError("map root", "length", place, f"{len(data)} bytes of {_LOCATION.size}")
    return _parse_location("map root", data, 0, place)


def parse_node(data: Bytes, place: Place, location: NodeLocation) -> Node:
    """Reads the node at `location`.

    Whether level and first block are those of its place in the tree is the caller's to compare.

    Raises:
        FormatError: it is none, a damaged one, or another one than the location names.
    """
    if len(data) != location.len_bytes or len(data) < MIN_NODE_BYTES:
        raise FormatError(_WHAT, "length", place, f"{len(data)} bytes of {location.len_bytes}")
    data = bytes(data)
    header = _parse_header(data, place, location)
    if header.form == _INNER:
        children = _parse_children(data, place, header)
        return Node(header.level, header.first_block, children=children)
    return Node(header.level, header.first_block, runs=_parse_leaf(data, place, header))


def _parse_header(data: bytes, place: Place, location: NodeLocation) -> _Header:
    (
        magic,
        version,
        level,
        form,
        first_block,
        len_bytes,
        checksum,
        entries,
        rows,
        width,
        base,
    ) = _HEADER.unpack_from(data)
    check_magic(_WHAT, place, magic, b"VHMN", version)
    check_sum(_WHAT, place, data, _CHECKSUM_OFFSET, checksum)
    if len_bytes != location.len_bytes:
        reason = f"it is {len_bytes}, and its location has {location.len_bytes}"
        raise FormatError(_WHAT, "length", place, reason)
    if checksum != location.checksum:
        reason = f"it is {checksum:#010x}, and its location has {location.checksum:#010x}"
        raise FormatError(_WHAT, "checksum", place, reason)
    check_range(_WHAT, place, "level", level, 0, ROOT_LEVEL)
    check_range(_WHAT, place, "form", form, _INNER, _DENSE)
    if (form == _INNER) != (level > 0):
        raise FormatError(_WHAT, "form", place, f"{_FORMS[form]} at level {level}")
    check_range(_WHAT, place, "first block", first_block, 0, MAX_VOLUME_BLOCKS - 1)
    if first_block % node_span_blocks(level):
        reason = f"no node of level {level} begins at block {first_block}"
        raise FormatError(_WHAT, "first block", place, reason)
    return _Header(level, form, first_block, entries, rows, width, base)


def _parse_children(
    data: bytes, place: Place, header: _Header
) -> tuple[tuple[int, NodeLocation], ...]:
    check_range(_WHAT, place, "entries", header.entries, 1, FAN_OUT)
    tables_at = _HEADER.size + _BITMAP_BYTES
    _check_length(data, place, tables_at + _LOCATION.size * header.entries)
    bitmap = int.from_bytes(data[_HEADER.size : tables_at], "little")
    if bitmap.bit_count() != header.entries:
        reason = f"it has {bitmap.bit_count()} children, and the header {header.entries}"
        raise FormatError(_WHAT, "bitmap", place, reason)
    children: list[tuple[int, NodeLocation]] = []
    for child in range(FAN_OUT):
        if bitmap >> child & 1:
            at = tables_at + _LOCATION.size * len(children)
            children.append((child, _parse_location(_WHAT, data, at, place)))
    return tuple(children)


def _parse_location(what: str, data: bytes, at: int, place: Place) -> NodeLocation:
    segment, offset_bytes, len_bytes, checksum = _LOCATION.unpack_from(data, at)
    check_range(what, place, "location, segment number", segment, 1, MAX_SEGMENT_NUMBER)
    check_range(what, place, "location, length", len_bytes, MIN_NODE_BYTES, MAX_NODE_BYTES)
    if len_bytes % 8 or offset_bytes % 8:
        raise FormatError(what, "location", place, "offset or length is no multiple of 8")
    if offset_bytes + len_bytes > MAX_SEGMENT_BLOCKS * 4096:
        raise FormatError(what, "location, offset", place, f"{offset_bytes} is in no segment")
    return NodeLocation(segment, offset_bytes, len_bytes, checksum)


def _parse_leaf(data: bytes, place: Place, header: _Header) -> tuple[MapRun, ...]:
    check_range(_WHAT, place, "entries", header.entries, 1, LEAF_BLOCKS)
    if header.width not in (4, 6, 8):
        raise FormatError(_WHAT, "width", place, f"it is {header.width}, not 4, 6 or 8")
    entries, rows, width = header.entries, header.rows, header.width
    if header.form == _RUNS:
        check_range(_WHAT, place, "rows", rows, 1, entries)
        count, row_bytes = entries, width + 4
    else:
        expected = entries if header.form == _SPARSE else LEAF_BLOCKS
        if rows != expected:
            raise FormatError(_WHAT, "rows", place, f"{rows} in a {_FORMS[header.form]}")
        count, row_bytes = expected, width + (2 if header.form == _SPARSE else 0)
    _check_length(data, place, _HEADER.size + 4 * count + row_bytes * rows)
    checksums = data[_HEADER.size : _HEADER.size + 4 * count]
    at = _HEADER.size + 4 * count
    differences = _numbers(data, at, rows, width)
    at += width * rows
    if header.form == _DENSE:
        return _join(header, place, _dense_rows(place, header, differences, checksums))
    blocks = _numbers(data, at, rows, 2)
    for before, block in pairwise(blocks):
        if block <= before:
            raise FormatError(_WHAT, "blocks", place, f"block {block} stands after {before}")
    if header.form == _SPARSE:
        singles = [
            (block, 1, difference, checksums[4 * row : 4 * row + 4])
            for row, (block, difference) in enumerate(zip(blocks, differences, strict=True))
        ]
        return _join(header, place, singles)
    ranks = (*_numbers(data, at + 2 * rows, rows, 2), entries)
    if ranks[0] != 0:
        raise FormatError(_WHAT, "ranks", place, f"the first is {ranks[0]}")
    runs = []
    end = 0
    for block, difference, (rank, next_rank) in zip(
        blocks, differences, pairwise(ranks), strict=True
    ):
        if next_rank <= rank:
            raise FormatError(_WHAT, "ranks", place, f"{next_rank} stands after {rank}")
        if block < end:
            raise FormatError(_WHAT, "blocks", place, f"the run at block {block} overlaps")
        end = block + next_rank - rank
        runs.append((block, next_rank - rank, difference, checksums[4 * rank : 4 * next_rank]))
    return _join(header, place, runs)


def _dense_rows(
    place: Place, header: _Header, differences: tuple[int, ...], checksums: bytes
) -> list[tuple[int, int, int, bytes]]:
    unmapped = (1 << 8 * header.width) - 1
    rows = []
    for block, difference in enumerate(differences):
        checksum = checksums[4 * block : 4 * block + 4]
        if difference != unmapped:
            rows.append((block, 1, difference, checksum))
        elif checksum != bytes(4):
            raise FormatError(_WHAT, "checksums", place, f"block {block} is not mapped and has one")
    if len(rows) != header.entries:
        reason = f"{len(rows)} blocks are mapped, and the header has {header.entries}"
        raise FormatError(_WHAT, "entries", place, reason)
    return rows


def _join(
    header: _Header, place: Place, rows: list[tuple[int, int, int, bytes]]
) -> tuple[MapRun, ...]:
    """Rows (block of the leaf, count, difference, checksums) as runs, as long as they can be."""
    unmapped = (1 << 8 * header.width) - 1
    runs: list[MapRun] = []
    # What is gathered: block, count, address, pieces of checksums.
    first, total, start, pieces = 0, 0, 0, list[bytes]()
    for block, count, difference, checksums in rows:
        address = header.base + difference
        segment, offset_blocks = divmod(address, MAX_SEGMENT_BLOCKS)
        if (
            block + count > LEAF_BLOCKS
            or difference == unmapped
            or not 0 < segment < MAX_SEGMENT_NUMBER
            or offset_blocks == 0
            or offset_blocks + count > MAX_SEGMENT_BLOCKS
        ):
            reason = f"{count} blocks from block {block} are mapped to {segment}:{offset_blocks}"
            raise FormatError(_WHAT, "difference", place, reason)
        # An address behind a segment's last block has offset 0, and was refused.
        if total and block == first + total and address == start + total:
            total += count
            pieces.append(checksums)
            continue
        if total:
            runs.append(_run(header, first, total, start, pieces))
        first, total, start, pieces = block, count, address, [checksums]
    runs.append(_run(header, first, total, start, pieces))
    return tuple(runs)


def _run(header: _Header, block: int, count: int, address: int, pieces: list[bytes]) -> MapRun:
    segment, offset_blocks = divmod(address, MAX_SEGMENT_BLOCKS)
    return MapRun(header.first_block + block, count, segment, offset_blocks, b"".join(pieces))


def _numbers(data: bytes, at: int, count: int, width: int) -> tuple[int, ...]:
    codes = {2: "H", 4: "I", 8: "Q"}
    code = codes.get(width)
    if code is not None:
        return struct.unpack_from(f"<{count}{code}", data, at)
    return tuple(
        int.from_bytes(data[at + width * row : at + width * (row + 1)], "little")
        for row in range(count)
    )


def _check_length(data: bytes, place: Place, used_bytes: int) -> None:
    if -(-used_bytes // 8) * 8 != len(data):
        reason = f"{len(data)} bytes, and its tables need {used_bytes}"
        raise FormatError(_WHAT, "length", place, reason)
