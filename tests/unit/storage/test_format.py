"""The reader of the on-disk format: what it reads, and that no bytes make it do anything else."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import crcmod.predefined
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.storage.nodewriter import FORMS, inner_node, leaf_node, node
from tests.unit.storage.poolwriter import BLOCK, PoolWriter, note, segment_file, summed
from vhostd.storage.format import (
    ENTRY_NOTE,
    FormatError,
    MapRun,
    NodeLocation,
    Place,
    SnapshotNote,
    StateNote,
    StateParts,
    Trailer,
    Unmap,
    UnmapsNote,
    crc32c,
    parse_dead_blocks,
    parse_dead_nodes,
    parse_footer_body,
    parse_node,
    parse_note,
    parse_record,
    parse_root,
    parse_segment_header,
    parse_state,
    parse_superblock,
    parse_trailer,
    segment_number_of,
    segment_path,
)

PLACE = Place("file", 4096)
SEGMENT_BYTES = 1 << 20


def location_of(data: bytes) -> NodeLocation:
    return NodeLocation(5, 4096, len(data), struct.unpack_from("<I", data, 20)[0])


@given(st.binary(max_size=9000))
def test_crc32c_agrees_with_another_library(data: bytes) -> None:
    assert crc32c(data) == crcmod.predefined.mkCrcFun("crc-32c")(data)


def test_crc32c_has_the_values_of_rfc_3720() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


@pytest.mark.parametrize("number", [1, 1023, 1024, (1 << 51) - 1])
def test_a_path_follows_from_the_number_and_back(number: int) -> None:
    path = segment_path(number)
    assert segment_number_of(path.parent.name, path.name) == number
    assert segment_number_of(f"{(number >> 10) + 1:011x}", path.name) is None
    assert segment_number_of(path.parent.name, path.name.upper()) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(20))
def test_every_form_of_a_leaf_reads_back(form: str, seed: int) -> None:
    random = Random(seed)
    part: dict[int, tuple[int, int]] = {}
    block = 0
    while block < 1024:
        count = min(random.randint(1, 40), 1024 - block)
        address = random.randrange(1, 1 << random.choice((10, 26, 40))) << 13
        address |= random.randrange(1, 8192 - count)
        if random.random() < 0.6 or not part:
            for index in range(count):
                part[block + index] = (address + index, random.getrandbits(32))
        block += count
    data = leaf_node(1 << 20, part, form, random)
    found = parse_node(data, PLACE, location_of(data))
    assert (found.level, found.first_block, found.children) == (0, 1 << 20, ())
    blocks = {}
    for run in found.runs:
        for index in range(run.count):
            checksum = int.from_bytes(run.checksums[4 * index : 4 * index + 4], "little")
            address = run.segment << 13 | run.offset_blocks + index
            blocks[run.block + index - (1 << 20)] = (address, checksum)
    assert blocks == part


def test_blocks_that_follow_each_other_are_one_run_in_any_form() -> None:
    part = {block: ((3 << 13) + 10 + block, block) for block in range(100, 200)}
    for form in FORMS:
        data = leaf_node(0, part, form, Random(1))
        (run,) = parse_node(data, PLACE, location_of(data)).runs
        checksums = struct.pack("<100I", *range(100, 200))
        assert run == MapRun(100, 100, 3, 110, checksums)


def test_an_inner_node_reads_back() -> None:
    children = {3: NodeLocation(9, 64, 96, 1), 255: NodeLocation(7, 4096, 12328, 2)}
    packed = {
        index: struct.pack("<QIII", c.segment, c.offset_bytes, c.len_bytes, c.checksum)
        for index, c in children.items()
    }
    data = inner_node(2, 0, packed)
    found = parse_node(data, PLACE, location_of(data))
    assert found.children == tuple(children.items())
    assert found.level == 2
    assert parse_root(packed[3], PLACE) == children[3]


# Nodes whose checksum is right and whose fields are not

ONE = (1).to_bytes(4, "little") + bytes(4) + bytes(2)
BAD_NODES: list[tuple[str, bytes]] = [
    ("level", node(4, 0, 0, 1, bytes(52))),
    ("form", node(0, 0, 0, 1, bytes(52))),
    ("form", node(1, 1, 0, 1, ONE, rows=1, width=4, base=8193)),
    ("form", node(0, 4, 0, 1, ONE, rows=1, width=4, base=8193)),
    ("first block", node(0, 1, 1, 1, ONE, rows=1, width=4, base=8193)),
    ("first block", node(0, 1, 1 << 34, 1, ONE, rows=1, width=4, base=8193)),
    ("width", node(0, 1, 0, 1, ONE, rows=1, width=5, base=8193)),
    ("rows", node(0, 1, 0, 1, ONE, rows=2, width=4, base=8193)),
    ("entries", node(0, 1, 0, 0, ONE, rows=1, width=4, base=8193)),
    ("entries", node(0, 1, 0, 1025, ONE, rows=1, width=4, base=8193)),
    ("length", node(0, 1, 0, 3, ONE, rows=3, width=4, base=8193)),
    ("difference", node(0, 1, 0, 1, ONE, rows=1, width=4, base=8192)),
    ("difference", node(0, 1, 0, 1, ONE, rows=1, width=4, base=3)),
    (
        "difference",
        node(0, 1, 0, 1, bytes(4) + b"\xff" * 8 + bytes(2), rows=1, width=8, base=(1 << 64) - 1),
    ),
    (
        "difference",
        node(0, 1, 0, 1, bytes(8) + struct.pack("<H", 1024), rows=1, width=4, base=8193),
    ),
    (
        "blocks",
        node(0, 1, 0, 2, bytes(16) + struct.pack("<HH", 5, 5), rows=2, width=4, base=8193),
    ),
    (
        "ranks",
        node(0, 2, 0, 2, bytes(12) + struct.pack("<HH", 5, 1), rows=1, width=4, base=8193),
    ),
    (
        "ranks",
        node(0, 2, 0, 2, bytes(16) + struct.pack("<HHHH", 5, 9, 0, 2), rows=2, width=4, base=8193),
    ),
    (
        "blocks",
        node(
            0,
            2,
            0,
            3,
            bytes(20) + struct.pack("<HHHH", 5, 6, 0, 2),
            rows=2,
            width=4,
            base=8193,
        ),
    ),
    (
        "difference",
        node(0, 2, 0, 2, bytes(12) + struct.pack("<HH", 5, 0), rows=1, width=4, base=16383),
    ),
    ("checksums", node(0, 3, 0, 1, b"\1" * 4096 + b"\xff" * 4096, rows=1024, width=4, base=8193)),
    (
        "entries",
        node(
            0,
            3,
            0,
            2,
            bytes(4096) + bytes(4) + b"\xff" * 4092,
            rows=1024,
            width=4,
            base=8193,
        ),
    ),
    ("bitmap", node(1, 0, 0, 1, bytes(52))),
    ("location, segment number", node(1, 0, 0, 1, b"\1" + bytes(51))),
    (
        "location, length",
        node(1, 0, 0, 1, b"\1" + bytes(31) + struct.pack("<QIII", 1, 0, 48, 0)),
    ),
    ("location", node(1, 0, 0, 1, b"\1" + bytes(31) + struct.pack("<QIII", 1, 4, 56, 0))),
    (
        "location, offset",
        node(1, 0, 0, 1, b"\1" + bytes(31) + struct.pack("<QIII", 1, 32 << 20, 56, 0)),
    ),
]


@pytest.mark.parametrize(("field", "data"), BAD_NODES)
def test_a_node_with_a_field_out_of_range_is_refused_by_its_name(field: str, data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parse_node(data, PLACE, location_of(data))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"map node in file at offset 4096: {field}: ")


# Any bytes at all


def sealed(
    data: bytes, checksum_at: int, magic: bytes, length: int = BLOCK, version: bytes = b"\1\0"
) -> bytes:
    """Those bytes, with what it takes to get beyond the checksum."""
    block = bytearray(data[:length].ljust(length, b"\0"))
    block[:6] = magic + version
    summed(block, checksum_at)
    return bytes(block)


def as_node(data: bytes) -> object:
    whole = bytearray(data[: len(data) // 8 * 8].ljust(56, b"\0"))
    whole[:6] = b"VHMN\1\0"
    struct.pack_into("<I", whole, 16, len(whole))
    summed(whole, 20)
    return parse_node(bytes(whole), PLACE, location_of(bytes(whole)))


def as_body(data: bytes) -> object:
    trailer = Trailer(
        *(None,) * 2,  # type: ignore[arg-type]
        segment=1,
        epoch=1,
        first_sequence=1,
        last_sequence=2,
        first_previous_checksum=0,
        last_header_checksum=0,
        records=2,
        end_blocks=9,
        body_offset_bytes=0,
        body_bytes=len(data),
        body_checksum=crc32c(data),
    )
    return parse_footer_body(data, PLACE, trailer)


PARSERS: list[Callable[[bytes], object]] = [
    lambda data: parse_superblock(data, PLACE),
    lambda data: parse_segment_header(data, PLACE),
    lambda data: parse_record(data, PLACE),
    lambda data: parse_trailer(data, PLACE, SEGMENT_BYTES),
    lambda data: parse_root(data, PLACE),
    lambda data: parse_superblock(sealed(data, 56, b"VHSB", version=b"\2\0"), PLACE),
    lambda data: parse_segment_header(sealed(data, 64, b"VHSG"), PLACE),
    lambda data: parse_record(sealed(data, 80, b"VHRC"), PLACE),
    lambda data: parse_trailer(sealed(data, 100, b"VHFT"), PLACE, SEGMENT_BYTES),
    as_node,
    as_body,
]


@pytest.mark.parametrize("parse", PARSERS)
@given(data=st.binary(max_size=300) | st.binary(min_size=4096, max_size=4200))
def test_hostile_bytes_raise_nothing_but_format_errors(
    parse: Callable[[bytes], object], data: bytes
) -> None:
    with contextlib.suppress(FormatError):
        parse(data)


@given(
    fields=st.tuples(
        *(st.integers(0, 1 << 40) for _ in range(2)),
        *(st.integers(0, 3000) for _ in range(3)),
        st.integers(0, 5),
    ),
    tail=st.binary(max_size=200),
)
def test_hostile_leaves_raise_nothing_but_format_errors(
    fields: tuple[int, ...], tail: bytes
) -> None:
    base, first, entries, rows, width, form = fields
    data = node(0, form, first, entries, tail, rows=rows, width=width % 10, base=base)
    with contextlib.suppress(FormatError):
        parse_node(data, PLACE, location_of(data))


def test_flipped_bits_of_every_structure_are_refused(tmp_path: Path) -> None:
    pool = PoolWriter(tmp_path, Random(11))
    volume = pool.volume("root")
    volume.churn(5)
    volume.seal()
    pool.close()
    content = segment_file(tmp_path, volume.segments[0].number).read_bytes()
    offset = volume.segments[0].records[1].offset * BLOCK
    structures: list[tuple[bytes, Callable[[bytes], object]]] = [
        ((tmp_path / "superblock").read_bytes(), PARSERS[0]),
        (content[:BLOCK], PARSERS[1]),
        (content[offset : offset + BLOCK], PARSERS[2]),
        (content[-BLOCK:], PARSERS[3]),
    ]
    for block, parse in structures:
        parse(block)
        for at in (*range(128), *range(128, BLOCK, 37)):
            damaged = bytearray(block)
            damaged[at] ^= 1 << at % 8
            with pytest.raises(FormatError):
                parse(bytes(damaged))
        for length in (0, 1, 100, BLOCK - 1):
            with pytest.raises(FormatError, match="length"):
                parse(block[:length])


def test_a_newer_version_is_refused_and_said_to_be_newer() -> None:
    block = bytearray(BLOCK)
    block[:6] = b"VHSB\3\0"
    summed(block, 56)
    with pytest.raises(FormatError, match="version: it is 3, and this reader knows 2") as caught:
        parse_superblock(bytes(block), PLACE)
    assert caught.value.newer


# Notes and dead sets


def test_notes_of_every_type_read_back(tmp_path: Path) -> None:
    pool = PoolWriter(tmp_path, Random(5))
    volume = pool.volume("root")
    snapshot = volume.snapshot("märz")
    written = [
        volume.segments[0].records[0],
        volume.append([], [note(2, json.dumps(volume.state()).encode())]),
        volume.note_unmaps([(3, 9, 77777), (1 << 33, 1, 1)]),
    ]
    pool.close()
    content = segment_file(tmp_path, 1).read_bytes()
    found = []
    for record in written:
        summary = parse_record(content[record.offset * BLOCK :][:BLOCK], PLACE).summary
        assert [entry.kind for entry in summary.entries] == [ENTRY_NOTE]
        ((offset, count, checksums),) = summary.note_pieces()
        data = content[offset * BLOCK : (offset + count) * BLOCK]
        assert crc32c(data[:BLOCK]) == int.from_bytes(checksums[:4], "little")
        assert list(summary.data_pieces()) == []
        found.append(parse_note(data, PLACE))
    first, state, unmaps = found
    assert first == SnapshotNote(snapshot.uuid, 9, volume.size_bytes, "märz")
    assert isinstance(state, StateNote)
    assert StateParts().add(7, state) == (7, state.payload)
    whole = parse_state(state.payload, PLACE)
    assert (whole.volume.name, whole.origin) == ("root", None)
    assert [(s.uuid, s.position) for s in whole.snapshots] == [(snapshot.uuid, snapshot.position)]
    assert unmaps == UnmapsNote((Unmap(3, 9, 77777), Unmap(1 << 33, 1, 1)))


@given(st.sampled_from([0, 1, 2, 3, 4]), st.binary(max_size=200), st.binary(max_size=60))
def test_no_note_raises_anything_but_a_format_error(kind: int, payload: bytes, tail: bytes) -> None:
    for data in (note(kind, payload) + tail, payload, note(kind, payload)[: len(tail)]):
        with contextlib.suppress(FormatError):
            parse_note(data, PLACE)


@pytest.mark.parametrize(
    ("field", "data"),
    [
        ("magic", bytes(4096)),
        ("length", b"VHNT"),
        ("type", note(9, bytes(8))),
        ("length of the payload", note(1, b"")),
        ("length of the payload", note(1, bytes(20))),
        ("length of the name", note(1, bytes(32) + b"\x05\x00abc")),
        ("name", note(1, bytes(32) + b"\x01\x00\xff")),
        ("state, parts", note(2, b"{}", 3, 61)),
        ("count", note(3, bytes([2, 0, 0, 0]) + bytes(28))),
        ("unmaps", note(3, bytes([1, 0, 0, 0]) + bytes(28))),
    ],
)
def test_a_note_that_is_none_is_told_by_its_field(field: str, data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parse_note(data, PLACE)
    assert caught.value.field == field


def test_dead_sets_read_back_and_what_is_none_is_refused() -> None:
    assert parse_dead_blocks(b"", PLACE) == 0
    assert parse_dead_blocks(b"\x02\x80", PLACE) == 1 << 15 | 2
    for bad in (b"\x01", b"\x02\x00", b"\x02" * 1025):
        with pytest.raises(FormatError):
            parse_dead_blocks(bad, PLACE)
    ranges = struct.pack("<4I", 4096, 56, 5000, 8)
    assert parse_dead_nodes(ranges, PLACE) == ((4096, 56), (5000, 8))
    for numbers in ((5000, 8, 4096, 56), (4096, 8, 4104, 8), (4096, 0), (8, 8), (1 << 30, 8)):
        with pytest.raises(FormatError):
            parse_dead_nodes(struct.pack(f"<{len(numbers)}I", *numbers), PLACE)
    with pytest.raises(FormatError):
        parse_dead_nodes(ranges[:-1], PLACE)


@pytest.mark.parametrize("payload", [b"{}", b"[" * 3000, b"\xff\xfe", b"null"])
def test_a_state_that_is_none_is_refused(payload: bytes) -> None:
    with pytest.raises(FormatError):
        parse_state(payload, PLACE)


def test_a_state_counts_when_its_last_part_is_there() -> None:
    parts = StateParts()
    assert parts.add(1, StateNote(0, 2, b"a")) is None
    assert parts.add(2, StateNote(1, 1, b"b")) is None
    assert parts.add(3, StateNote(2, 0, b"c")) == (1, b"abc")
    assert parts.add(4, StateNote(1, 0, b"x")) is None
    assert parts.add(5, StateNote(0, 1, b"a")) is None
    # The writer died here, and began again.
    assert parts.add(6, StateNote(0, 1, b"d")) is None
    assert parts.add(7, StateNote(1, 0, b"e")) == (6, b"de")
    assert parts.add(8, StateNote(0, 1, b"f")) is None
    assert parts.add(9, StateNote(2, 0, b"g")) is None
    assert parts.add(10, StateNote(1, 0, b"h")) is None
