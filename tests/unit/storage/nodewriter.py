"""Writes maps as `docs/format.md`, "Map node", has them, for the pools of `poolwriter`.

Any form a leaf may have is taken at random, whether it is the shortest or not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from itertools import groupby
from random import Random

import crcmod.predefined

FORMS = ("sparse", "runs", "dense")
_crc = crcmod.predefined.mkCrcFun("crc-32c")

Mapped = Mapping[int, tuple[int, int]]
"""Block of the volume: (address, checksum)."""


Known = dict[tuple[int, int, object], bytes]
"""Locations of nodes that are on disk, by what they hold: equal subtrees are written once."""


def write_nodes(
    mapping: Mapped, segment: int, offset_bytes: int, random: Random, known: Known
) -> tuple[bytes, bytes, set[bytes]]:
    """New nodes of a map; the root's location; the locations of all its nodes. Children first."""
    out = bytearray()
    reached = set()

    def put(key: tuple[int, int, object], make: Callable[[], bytes]) -> bytes:
        location = known.get(key)
        if location is None:
            node = make()
            at = offset_bytes + len(out)
            out.extend(node)
            checksum = struct.unpack_from("<I", node, 20)[0]
            location = known[key] = struct.pack("<QIII", segment, at, len(node), checksum)
        reached.add(location)
        return location

    locations = {}
    for leaf, blocks in groupby(sorted(mapping), key=lambda block: block // 1024):
        part = {block - leaf * 1024: mapping[block] for block in blocks}
        locations[leaf] = put(
            (0, leaf, tuple(part.items())),
            lambda: leaf_node(leaf * 1024, part, random.choice(FORMS), random),  # noqa: B023
        )
    for level in (1, 2, 3):
        parents = {}
        for parent, indexes in groupby(sorted(locations), key=lambda index: index // 256):
            children = {index % 256: locations[index] for index in indexes}
            parents[parent] = put(
                (level, parent, tuple(children.items())),
                lambda: inner_node(level, parent * 1024 * 256**level, children),  # noqa: B023
            )
        locations = parents
    return bytes(out), locations[0], reached


def node(
    level: int,
    form: int,
    first_block: int,
    entries: int,
    tables: bytes,
    *,
    rows: int = 0,
    width: int = 0,
    base: int = 0,
) -> bytes:
    """A node of those fields, with its length and checksum."""
    length = -(-(40 + len(tables)) // 8) * 8
    data = bytearray(length)
    struct.pack_into(
        "<4sHBBQIIHHB3xQ",
        data,
        0,
        b"VHMN",
        1,
        level,
        form,
        first_block,
        length,
        0,
        entries,
        rows,
        width,
        base,
    )
    data[40 : 40 + len(tables)] = tables
    struct.pack_into("<I", data, 20, _crc(bytes(data)))
    return bytes(data)


def inner_node(level: int, first_block: int, children: Mapping[int, bytes]) -> bytes:
    """children: locations by number."""
    bitmap = bytearray(32)
    for child in children:
        bitmap[child // 8] |= 1 << child % 8
    tables = bytes(bitmap) + b"".join(children[child] for child in sorted(children))
    return node(level, 0, first_block, len(children), tables)


def leaf_node(first_block: int, part: Mapped, form: str, random: Random) -> bytes:
    """part: by the block's number in the leaf."""
    lowest = min(address for address, _ in part.values())
    base = lowest - random.randrange(min(lowest, 1 << 20) + 1)
    farthest = max(address for address, _ in part.values()) - base
    width = random.choice([w for w in (4, 6, 8) if farthest < (1 << 8 * w) - 1])

    def difference(block: int) -> bytes:
        return (part[block][0] - base).to_bytes(width, "little")

    def checksum(block: int) -> bytes:
        return part[block][1].to_bytes(4, "little")

    blocks = sorted(part)
    if form == "sparse":
        tables = b"".join(map(checksum, blocks)) + b"".join(map(difference, blocks))
        tables += struct.pack(f"<{len(blocks)}H", *blocks)
        return node(
            0, 1, first_block, len(blocks), tables, rows=len(blocks), width=width, base=base
        )
    if form == "runs":
        starts = [
            block
            for block in blocks
            if block - 1 not in part
            or part[block - 1][0] + 1 != part[block][0]
            or random.random() < 0.1
        ]
        ranks = [blocks.index(start) for start in starts]
        tables = b"".join(map(checksum, blocks)) + b"".join(map(difference, starts))
        tables += struct.pack(f"<{len(starts)}H", *starts)
        tables += struct.pack(f"<{len(ranks)}H", *ranks)
        return node(
            0, 2, first_block, len(blocks), tables, rows=len(starts), width=width, base=base
        )
    tables = b"".join(checksum(b) if b in part else bytes(4) for b in range(1024))
    tables += b"".join(difference(b) if b in part else b"\xff" * width for b in range(1024))
    return node(0, 3, first_block, len(blocks), tables, rows=1024, width=width, base=base)
