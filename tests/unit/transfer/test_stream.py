"""Streams: what goes in comes out; what is not whole or not the same is refused."""

from __future__ import annotations

import dataclasses
import io
import itertools
import struct
from collections.abc import Sequence
from uuid import UUID

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostd.errors import DamagedError, UnsupportedError, UsageError
from vhostd.transfer.stream import (
    MAX_DATA_BYTES,
    Chunk,
    Kind,
    ResumePoint,
    StreamHeader,
    StreamReader,
    StreamWriter,
)

HEADER = StreamHeader(
    volume_uuid=UUID(int=1),
    volume="web1",
    size_bytes=64 << 20,
    logical_block_bytes=512,
    snapshot="monday",
    guid=UUID(int=7),
    created_ns=1_790_000_000_000_000_000,
)
INCREMENT = dataclasses.replace(HEADER, from_guid=UUID(int=6), quiesced=True, start_bytes=4096)
SECTORS = HEADER.size_bytes // 512


def made(header: StreamHeader, chunks: Sequence[Chunk]) -> bytes:
    sink = io.BytesIO()
    writer = StreamWriter(sink.write, header)
    for chunk in chunks:
        if chunk.kind is Kind.DATA:
            writer.data(chunk.offset_bytes, chunk.data)
        else:
            writer.zeroes(chunk.offset_bytes, chunk.len_bytes)
    writer.finish()
    return sink.getvalue()


def read(stream: bytes) -> tuple[StreamHeader, list[Chunk], BaseException | None]:
    """The header, what was yielded, and what was raised after that."""
    reader = StreamReader(io.BytesIO(stream).read)
    found: list[Chunk] = []
    try:
        found.extend(reader.chunks())
    except (DamagedError, UnsupportedError) as error:
        return reader.header, found, error
    return reader.header, found, None


@st.composite
def chunk_lists(draw: st.DrawFn, *, start: int = 0) -> list[Chunk]:
    cuts = draw(st.lists(st.integers(start, SECTORS), unique=True, max_size=12).map(sorted))
    chunks = []
    for first, end in zip(cuts[::2], cuts[1::2], strict=False):
        offset_bytes, len_bytes = first * 512, (end - first) * 512
        if draw(st.booleans()):
            # Data is short: what is tested does not depend on its length.
            data = draw(st.binary(min_size=1, max_size=8)) * 512
            data = data[: min(len_bytes, 1536)]
            data = data[: len(data) // 512 * 512]
            chunks.append(Chunk(Kind.DATA, offset_bytes, len(data), data))
        else:
            chunks.append(Chunk(Kind.ZEROES, offset_bytes, len_bytes))
    return chunks


@given(chunk_lists(), st.sampled_from([HEADER, dataclasses.replace(INCREMENT, start_bytes=0)]))
def test_stream_comes_out_as_it_went_in(chunks: list[Chunk], header: StreamHeader) -> None:
    assert read(made(header, chunks)) == (header, chunks, None)


@given(chunk_lists(start=8), st.data())
@settings(max_examples=300)
def test_flipped_bits_are_always_refused(chunks: list[Chunk], data: st.DataObject) -> None:
    """And what came before them was right."""
    stream = bytearray(made(INCREMENT, chunks))
    bit = data.draw(st.integers(0, len(stream) * 8 - 1))
    # Up to 32 bits in a row: CRC-32C finds each such burst for certain.
    burst = data.draw(st.integers(0, min(30, len(stream) * 8 - 1 - bit)))
    stream[bit // 8] ^= 1 << bit % 8
    if burst:
        stream[(bit + burst) // 8] ^= 1 << (bit + burst) % 8
    try:
        header, found, error = read(bytes(stream))
    except DamagedError:
        return
    assert header == INCREMENT
    assert isinstance(error, DamagedError)
    assert found == chunks[: len(found)]


def test_every_single_flipped_bit_is_refused() -> None:
    chunks = [Chunk(Kind.DATA, 4096, 512, b"x" * 512), Chunk(Kind.ZEROES, 8192, 1 << 20)]
    whole = made(INCREMENT, chunks)
    for bit in range(len(whole) * 8):
        stream = bytearray(whole)
        stream[bit // 8] ^= 1 << bit % 8
        try:
            _, found, error = read(bytes(stream))
        except DamagedError:
            continue
        assert isinstance(error, DamagedError), bit
        assert found == chunks[: len(found)]


@given(chunk_lists(), st.data())
def test_truncated_streams_are_always_refused(chunks: list[Chunk], data: st.DataObject) -> None:
    stream = made(HEADER, chunks)
    length = data.draw(st.integers(0, len(stream) - 1))
    try:
        _, found, error = read(stream[:length])
    except DamagedError as raised:
        error, found = raised, []
    assert isinstance(error, DamagedError)
    assert f"ends at byte {length}," in str(error)
    assert found == chunks[: len(found)]


@given(st.binary(max_size=400), st.binary(max_size=400))
def test_nonsense_is_refused_and_nothing_of_it_is_taken(before: bytes, after: bytes) -> None:
    stream = made(HEADER, [Chunk(Kind.ZEROES, 0, 512)])
    with pytest.raises(DamagedError):
        StreamReader(io.BytesIO(before).read)
    head = stream[: len(HEADER.encode())]
    assert read(head + after)[1:] != ([], None)
    assert read(head + after)[1] == []


def chunk_starts(stream: bytes) -> list[int]:
    """Where the chunks and the trailer begin, told without the reader."""
    starts, at = [], struct.unpack_from("<I", stream, 8)[0]
    while stream[at : at + 4] == b"VHSC":
        starts.append(at)
        kind, length = stream[at + 4], struct.unpack_from("<Q", stream, at + 24)[0]
        at += 40 + (length if kind == 1 else 0)
    assert stream[at : at + 4] == b"VHSE"
    return [*starts, at]


@given(chunk_lists(), st.randoms(use_true_random=False))
def test_chunks_lost_repeated_or_from_another_stream_are_refused(
    chunks: list[Chunk], random: object
) -> None:
    chunks = [*chunks, Chunk(Kind.ZEROES, HEADER.size_bytes - 512, 512)]
    chunks = [c for c in chunks[:-1] if c.end_bytes <= HEADER.size_bytes - 512] + chunks[-1:]
    stream = made(HEADER, chunks)
    starts = chunk_starts(stream)
    pieces = [stream[a:b] for a, b in itertools.pairwise(starts)]
    head, tail = stream[: starts[0]], stream[starts[-1] :]
    other = made(dataclasses.replace(HEADER, guid=UUID(int=8)), chunks)
    stranger = other[chunk_starts(other)[-2] : chunk_starts(other)[-1]]
    for wrong in (pieces[:-1], pieces[1:], [*pieces, pieces[-1]], [*pieces[:-1], stranger]):
        if wrong == pieces:
            continue
        _, found, error = read(head + b"".join(wrong) + tail)
        assert isinstance(error, DamagedError)
        assert found == chunks[: len(found)]


def test_what_follows_the_end_is_refused() -> None:
    stream = made(HEADER, [])
    assert read(stream)[2] is None
    _, _, error = read(stream + b"\0")
    assert f"damaged at byte {len(stream)}" in str(error)


def test_damaged_data_is_named_by_its_place() -> None:
    stream = bytearray(made(HEADER, [Chunk(Kind.DATA, 8192, 512, b"x" * 512)]))
    at = chunk_starts(bytes(stream))[0] + 40
    stream[at + 100] ^= 1
    _, found, error = read(bytes(stream))
    assert found == []
    assert f"damaged at byte {at}:" in str(error)
    assert "byte 8192 of the volume" in str(error)


def test_newer_streams_are_told_from_damaged_ones() -> None:
    newer = bytearray(HEADER.encode())
    struct.pack_into("<H", newer, 4, 2)
    struct.pack_into("<I", newer, len(newer) - 4, google_crc32c.value(bytes(newer[:-4])))
    with pytest.raises(UnsupportedError, match="version 2"):
        StreamReader(io.BytesIO(newer).read)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 512), (4096, 0), (4097, 512), (4096, 100), (HEADER.size_bytes, 512), (-512, 512)],
)
def test_writer_refuses_what_a_reader_would(offset: int, length: int) -> None:
    writer = StreamWriter(lambda _: None, INCREMENT)
    with pytest.raises(UsageError):
        writer.zeroes(offset, length)
    with pytest.raises(UsageError):
        writer.data(8192, bytes(MAX_DATA_BYTES + 512))


def test_pieces_of_any_length_may_arrive() -> None:
    """A pipe gives what it has."""
    chunks = [Chunk(Kind.DATA, 0, 1536, b"abc" * 512), Chunk(Kind.ZEROES, 4096, 4096)]
    source = io.BytesIO(made(HEADER, chunks))
    reader = StreamReader(lambda n: source.read(min(n, 7)))
    assert list(reader.chunks()) == chunks
    assert reader.counts.data_bytes == 1536
    assert reader.counts.zero_bytes == 4096


# Tokens


@given(st.integers(1, 1 << 127), st.none() | st.integers(1, 1 << 127), st.integers(0, 1 << 46))
def test_token_comes_out_as_it_went_in(guid: int, from_guid: int | None, applied: int) -> None:
    base = None if from_guid is None else UUID(int=from_guid)
    point = ResumePoint(UUID(int=guid), base, 1 << 46, applied)
    assert ResumePoint.parse(point.token()) == point


@given(st.data())
def test_token_that_was_not_copied_whole_is_refused(data: st.DataObject) -> None:
    token = ResumePoint(UUID(int=5), None, 1 << 30, 1 << 20).token()
    at = data.draw(st.integers(0, len(token) - 1))
    letter = data.draw(st.sampled_from("AQgw059-_z"))
    with pytest.raises(UsageError, match="resume token"):
        ResumePoint.parse(token[:at])
    changed = token[:at] + letter + token[at + 1 :]
    if changed != token:
        with pytest.raises(UsageError, match="resume token"):
            ResumePoint.parse(changed)
