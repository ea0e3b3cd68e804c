"""Streams from disk to disk: what was sent is there, whatever broke on the way is continued."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.transfer.disk import MemoryDisk
from vhostd.errors import DamagedError, DeviceError
from vhostd.transfer.copy import DEPTH, DiskReader, DiskWriter
from vhostd.transfer.receiving import receive
from vhostd.transfer.sending import Changed, send
from vhostd.transfer.stream import Kind, StreamHeader, StreamReader, StreamWriter
from vhostd.virtqueue.errors import BackendError

BLOCK = 4096
BLOCKS = 1024
# The last block is a part of one.
SIZE = BLOCKS * BLOCK - 1024
FULL = StreamHeader(
    volume_uuid=UUID(int=1),
    volume="web1",
    size_bytes=SIZE,
    logical_block_bytes=512,
    snapshot="monday",
    guid=UUID(int=7),
    created_ns=1,
)
INCREMENT = dataclasses.replace(FULL, from_guid=UUID(int=6))


def silent(_done: int, _total: int) -> None:
    pass


@st.composite
def changes(draw: st.DrawFn) -> list[Changed]:
    """Ranges as the daemon tells them: whole blocks, also where the volume ends within one."""
    cuts = draw(st.lists(st.integers(0, BLOCKS), unique=True, max_size=16).map(sorted))
    return [
        Changed(a * BLOCK, (b - a) * BLOCK, draw(st.booleans()))
        for a, b in zip(cuts[::2], cuts[1::2], strict=False)
    ]


def disk_with(ranges: list[Changed], seed: int, *, before: bytes | None = None) -> MemoryDisk:
    """The sender's snapshot: data where it is mapped, zeroes where it is not."""
    disk = MemoryDisk(SIZE, seed=seed)
    if before is not None:
        disk.content[:] = before
    for offset, length, mapped in ranges:
        end = min(offset + length, SIZE)
        pattern = bytes([seed % 255 + 1, offset // BLOCK % 255 + 1])
        data = (pattern * length)[: end - offset]
        disk.content[offset:end] = data if mapped else bytes(end - offset)
    return disk


def sent(disk: MemoryDisk, ranges: list[Changed], header: StreamHeader) -> bytes:
    sink = io.BytesIO()
    send(DiskReader(disk, "source"), ranges, StreamWriter(sink.write, header), header, silent)
    return sink.getvalue()


def received(
    stream: bytes,
    disk: MemoryDisk,
    *,
    notes: list[int] | None = None,
    note_bytes: int = 1 << 62,
) -> None:
    """notes: gets the resume points."""
    reader = StreamReader(io.BytesIO(stream).read)
    note = (lambda _: None) if notes is None else notes.append
    receive(reader, DiskWriter(disk, "target"), note, silent, note_bytes=note_bytes)


@given(changes(), st.integers(1, 1 << 30))
@settings(deadline=None)
def test_full_stream_makes_the_same_volume(ranges: list[Changed], seed: int) -> None:
    source, target = disk_with(ranges, seed), MemoryDisk(SIZE, seed=seed + 1)
    stream = sent(source, ranges, FULL)
    received(stream, target)
    assert target.durable == source.content
    mapped = [r for r in ranges if r.mapped]
    # Only what is mapped is read and sent.
    assert source.read_bytes == sum(
        min(r.offset_bytes + r.len_bytes, SIZE) - r.offset_bytes for r in mapped
    )
    assert len(stream) < source.read_bytes + 2000 + 200 * len(mapped) + source.read_bytes // 1000
    assert source.most_in_flight <= DEPTH
    assert target.most_in_flight <= DEPTH


@given(changes(), changes(), st.integers(1, 1 << 30))
@settings(deadline=None)
def test_increment_brings_what_changed_and_discards(
    first: list[Changed], then: list[Changed], seed: int
) -> None:
    old = disk_with(first, seed)
    new = disk_with(then, seed + 1, before=bytes(old.content))
    target = MemoryDisk(SIZE, seed=seed)
    received(sent(old, first, FULL), target)
    stream = sent(new, then, INCREMENT)
    received(stream, target)
    assert target.durable == new.content
    kinds = [chunk.kind for chunk in StreamReader(io.BytesIO(stream).read).chunks()]
    assert (Kind.ZEROES in kinds) == any(not r.mapped for r in then)


@given(changes(), st.integers(1, 1 << 30), st.data())
@settings(deadline=None, max_examples=60)
def test_broken_stream_is_continued_from_its_resume_point(
    ranges: list[Changed], seed: int, data: st.DataObject
) -> None:
    """Broken by a cut or a flipped bit, at any place, and more than once."""
    before = MemoryDisk(SIZE, seed=seed)
    before.content[:] = b"\xaa" * SIZE
    before.flush()
    source = disk_with(ranges, seed, before=bytes(before.content))
    target, applied = before, 0
    for _ in range(data.draw(st.integers(1, 3))):
        header = dataclasses.replace(INCREMENT, start_bytes=applied)
        stream = bytearray(sent(source, ranges, header))
        at = data.draw(st.integers(0, len(stream) - 1))
        if data.draw(st.booleans()):
            del stream[at:]
        else:
            stream[at] ^= 1 << data.draw(st.integers(0, 7))
        notes: list[int] = []
        with pytest.raises(DamagedError):
            received(bytes(stream), target, notes=notes, note_bytes=1 << 16)
        assert notes == sorted(notes)
        applied = notes[-1] if notes else applied
        # What is noted is durable, and nothing after the damage was applied.
        assert target.durable[:applied] == source.content[:applied]
        for offset in range(0, SIZE, 512):
            assert target.content[offset : offset + 512] in (
                source.content[offset : offset + 512],
                b"\xaa" * 512,
            )
    received(sent(source, ranges, dataclasses.replace(INCREMENT, start_bytes=applied)), target)
    assert target.durable == source.content


def many_zeroes() -> Iterator[Changed]:
    for block in range(0, BLOCKS - 1, 2):
        yield Changed(block * BLOCK, BLOCK, mapped=False)


def test_ranges_are_taken_as_they_are_needed() -> None:
    """Millions of discarded ranges are never held at once."""
    taken = 0

    def counted() -> Iterator[Changed]:
        nonlocal taken
        for change in many_zeroes():
            taken += 1
            yield change

    ahead: list[int] = []
    sink = io.BytesIO()
    writer = StreamWriter(sink.write, INCREMENT)

    def progress(_done: int, _total: int) -> None:
        ahead.append(taken - writer.counts.zero_chunks)

    send(DiskReader(MemoryDisk(SIZE), "s"), counted(), writer, INCREMENT, progress)
    assert writer.counts.zero_chunks == BLOCKS // 2
    assert max(ahead) <= DEPTH


def test_sender_that_cannot_read_leaves_a_stream_without_end() -> None:
    ranges = [Changed(0, 1 << 20, mapped=True)]
    source = disk_with(ranges, 5)
    source.fail_at = 700_000
    sink = io.BytesIO()
    with pytest.raises(DeviceError, match="source: reading"):
        send(DiskReader(source, "source"), ranges, StreamWriter(sink.write, FULL), FULL, silent)
    with pytest.raises(DamagedError, match="cut short"):
        received(sink.getvalue(), MemoryDisk(SIZE))


@pytest.mark.parametrize("how", ["fails", "dies"])
def test_receiver_whose_disk_breaks_notes_nothing_that_is_not_there(how: str) -> None:
    ranges = [Changed(0, 2 << 20, mapped=True)]
    stream = sent(disk_with(ranges, 5), ranges, FULL)
    target = MemoryDisk(SIZE)
    notes: list[int] = []

    def note(applied: int) -> None:
        notes.append(applied)
        if how == "dies":
            target.dead = True
        else:
            target.fail_at = (1 << 20) + 5

    reader = StreamReader(io.BytesIO(stream).read)
    with pytest.raises((DeviceError, BackendError)):
        receive(reader, DiskWriter(target, "target"), note, silent, note_bytes=1)
    assert notes[0] > 0
    assert notes[-1] <= 1 << 20
    assert target.durable[: notes[-1]] == disk_with(ranges, 5).content[: notes[-1]]


def test_progress_of_a_stream_that_trickles_is_noted_by_time() -> None:
    ranges = [Changed(i * 8 * BLOCK, BLOCK, mapped=True) for i in range(8)]
    source = disk_with(ranges, 5)
    ticks = iter(range(0, 10_000, 4))
    notes: list[int] = []
    reader = StreamReader(io.BytesIO(sent(source, ranges, FULL)).read)
    target = DiskWriter(MemoryDisk(SIZE), "t")
    receive(reader, target, notes.append, silent, clock=lambda: float(next(ticks)))
    assert len(notes) > 2
