"""Snapshots as streams of bytes: the format of docs/streams.md, read and written.

`StreamWriter` makes a stream, `StreamReader` takes one apart. Neither knows of disks or daemons.

Invariants:
- Every byte of a stream is under a checksum; what a reader yields has been verified, and was
  preceded by nothing but what the sender sent: chunk headers are chained.
- A reader that has raised yields nothing more. It holds one chunk (1 MiB) at most.
- Chunks ascend and do not overlap, lie in the volume, and are whole logical blocks.

One thread each.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NoReturn
from uuid import UUID

import google_crc32c

from vhostd.errors import DamagedError, UnsupportedError, UsageError, VhostdError
from vhostd.storage.names import check_name

__all__ = [
    "MAX_DATA_BYTES",
    "Chunk",
    "Counts",
    "Kind",
    "ResumePoint",
    "StreamHeader",
    "StreamReader",
    "StreamWriter",
]

VERSION = 1
MAX_DATA_BYTES = 1 << 20
MAX_HEADER_BYTES = 4096
MAX_VOLUME_BYTES = 1 << 46

NO_GUID = UUID(int=0)

_HEADER_MAGIC = b"VHDS"
_CHUNK_MAGIC = b"VHSC"
_TRAILER_MAGIC = b"VHSE"
_TOKEN_PREFIX = "vhostd-1-"  # noqa: S105 (names a place in a stream, and is no secret)

_NOT_ONE = (
    "that is not a resume token, or not all of it; get it from `vhostctl import --resume-point "
    "POOL/VOLUME` where the stream is received"
)

_PREFIX = struct.Struct("<4sHHI")
"""magic, version, flags, header_bytes: the same in every version."""
_HEADER = struct.Struct("<4sHHII16sQ16s16sQQHHI")
_CHUNK = struct.Struct("<4sHHQQQI")
_TRAILER = struct.Struct("<4sIQQQQ32sI")
_CRC = struct.Struct("<I")
_TOKEN = struct.Struct("<16s16sQQ")

_FLAG_INCREMENT = 1
_FLAG_QUIESCED = 2
_KNOWN_FLAGS = _FLAG_INCREMENT | _FLAG_QUIESCED


class Kind(IntEnum):
    """What a chunk says of its part of the volume."""

    DATA = 1
    ZEROES = 2


@dataclass(frozen=True, kw_only=True)
class StreamHeader:
    """What a stream is of.

    Attributes:
        volume_uuid, volume: where it comes from; the receiver may call the volume otherwise.
        size_bytes: of the volume when the snapshot was taken.
        snapshot, guid, created_ns, quiesced: the snapshot that it makes.
        from_guid: the snapshot that it begins with; None: a volume of zeroes.
        start_bytes: what lies before it in the volume is not in this stream: an earlier, broken
            one brought it.
    """

    volume_uuid: UUID
    volume: str
    size_bytes: int
    logical_block_bytes: int
    snapshot: str
    guid: UUID
    created_ns: int
    from_guid: UUID | None = None
    quiesced: bool = False
    start_bytes: int = 0

    def encode(self) -> bytes:
        """The bytes at the beginning of the stream, its checksum included."""
        volume, snapshot = self.volume.encode(), self.snapshot.encode()
        flags = _FLAG_INCREMENT * (self.from_guid is not None) | _FLAG_QUIESCED * self.quiesced
        fixed = _HEADER.pack(
            _HEADER_MAGIC,
            VERSION,
            flags,
            _HEADER.size + len(volume) + len(snapshot) + _CRC.size,
            self.logical_block_bytes,
            self.volume_uuid.bytes,
            self.size_bytes,
            self.guid.bytes,
            (self.from_guid or NO_GUID).bytes,
            self.created_ns,
            self.start_bytes,
            len(volume),
            len(snapshot),
            0,
        )
        covered = fixed + volume + snapshot
        return covered + _CRC.pack(google_crc32c.value(covered))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of the volume, verified. data: empty for zeroes."""

    kind: Kind
    offset_bytes: int
    len_bytes: int
    data: bytes = b""

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.len_bytes


@dataclass(slots=True)
class Counts:
    """What a stream has carried."""

    data_chunks: int = 0
    zero_chunks: int = 0
    data_bytes: int = 0
    zero_bytes: int = 0

    def add(self, kind: Kind, len_bytes: int) -> None:
        if kind is Kind.DATA:
            self.data_chunks += 1
            self.data_bytes += len_bytes
        else:
            self.zero_chunks += 1
            self.zero_bytes += len_bytes


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a receiver stands in a stream that broke; what `--resume` takes.

    applied_bytes: everything before it in the volume is there, and durable.
    """

    guid: UUID
    from_guid: UUID | None
    size_bytes: int
    applied_bytes: int

    def token(self) -> str:
        """One word to hand from the receiver to the sender."""
        body = _TOKEN.pack(
            self.guid.bytes,
            (self.from_guid or NO_GUID).bytes,
            self.size_bytes,
            self.applied_bytes,
        )
        whole = body + _CRC.pack(google_crc32c.value(body))
        return _TOKEN_PREFIX + base64.urlsafe_b64encode(whole).decode().rstrip("=")

    @classmethod
    def parse(cls, token: str) -> ResumePoint:
        """Takes a token apart.

        Raises:
            UsageError: it is not one, or was not copied whole.
        """
        try:
            text = token.removeprefix(_TOKEN_PREFIX)
            whole = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            guid, from_guid, size_bytes, applied_bytes = _TOKEN.unpack(whole[: -_CRC.size])
        except (ValueError, struct.error) as error:
            raise UsageError(_NOT_ONE) from error
        base = UUID(bytes=from_guid)
        point = cls(UUID(bytes=guid), None if base == NO_GUID else base, size_bytes, applied_bytes)
        # One point has one token; the comparison is of the checksum too.
        if point.token() != token:
            raise UsageError(_NOT_ONE)
        return point


# Writing


class StreamWriter:
    """Makes a stream: the header at once, then `data` and `zeroes`, then `finish`.

    Args:
        write: takes all the bytes it is given, or raises.
    """

    def __init__(self, write: Callable[[bytes], object], header: StreamHeader) -> None:
        self._write = write
        self._header = header
        self._digest = hashlib.sha256()
        self._end_bytes = header.start_bytes
        self.counts = Counts()
        encoded = header.encode()
        self._running = google_crc32c.value(encoded[: -_CRC.size])
        self._put(encoded)

    def _put(self, data: bytes) -> None:
        self._digest.update(data)
        self._write(data)

    def data(self, offset_bytes: int, data: bytes) -> None:
        """Up to 1 MiB of data."""
        if not 0 < len(data) <= MAX_DATA_BYTES:
            raise UsageError(f"a chunk of {len(data)} bytes is not possible")
        self._chunk(Kind.DATA, offset_bytes, len(data), google_crc32c.value(data))
        self._put(data)

    def zeroes(self, offset_bytes: int, len_bytes: int) -> None:
        """A part that reads as zeroes from now on, of any length."""
        self._chunk(Kind.ZEROES, offset_bytes, len_bytes, 0)

    def _chunk(self, kind: Kind, offset_bytes: int, len_bytes: int, data_crc: int) -> None:
        wrong = _misplaced(self._header, self._end_bytes, offset_bytes, len_bytes)
        if wrong:
            raise UsageError(f"{len_bytes} bytes at {offset_bytes}: {wrong}")
        self._end_bytes = offset_bytes + len_bytes
        self.counts.add(kind, len_bytes)
        index = self.counts.data_chunks + self.counts.zero_chunks
        covered = _CHUNK.pack(_CHUNK_MAGIC, kind, 0, index, offset_bytes, len_bytes, data_crc)
        self._running = google_crc32c.extend(self._running, covered)
        self._put(covered + _CRC.pack(self._running))

    def finish(self) -> Counts:
        """Writes the trailer; without it no receiver takes the stream for whole."""
        counts = self.counts
        covered = _TRAILER.pack(
            _TRAILER_MAGIC,
            0,
            counts.data_chunks,
            counts.zero_chunks,
            counts.data_bytes,
            counts.zero_bytes,
            self._digest.digest(),
            0,
        )
        self._running = google_crc32c.extend(self._running, covered)
        self._put(covered + _CRC.pack(self._running))
        return counts


def _misplaced(header: StreamHeader, end_bytes: int, offset_bytes: int, len_bytes: int) -> str:
    """Why a chunk cannot be where it says; empty if it can."""
    if (offset_bytes | len_bytes) % header.logical_block_bytes:
        return f"not whole blocks of {header.logical_block_bytes} bytes"
    if len_bytes <= 0:
        return "nothing in it"
    if offset_bytes < end_bytes:
        return f"overlaps or precedes what ended at {end_bytes}"
    if offset_bytes + len_bytes > header.size_bytes:
        return f"beyond the end of the volume at {header.size_bytes}"
    return ""


# Reading


@dataclass(slots=True)
class _Source:
    """Reads exactly, and knows where it is."""

    read: Callable[[int], bytes]
    at_bytes: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def take(self, len_bytes: int, what: str, *, count: bool = True) -> bytes:
        pieces: list[bytes] = []
        left_bytes = len_bytes
        while left_bytes:
            piece = self.read(left_bytes)
            if not piece:
                have = self.at_bytes + len_bytes - left_bytes
                raise DamagedError(
                    f"the stream ends at byte {have}, within {what}; it was cut short, so send it "
                    "again, or continue it with `export --resume`"
                )
            pieces.append(piece)
            left_bytes -= len(piece)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self.at_bytes += len_bytes
        if count:
            self.digest.update(data)
        return data


class StreamReader:
    """Takes a stream apart: `header` after construction, then `chunks` to their end.

    Args:
        read: gives at most so many bytes, and none at the end.

    Raises:
        DamagedError: that is no stream, or not what was sent; the message names the byte.
        UnsupportedError: a newer vhostd made it.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._source = _Source(read)
        self.counts = Counts()
        self.header = self._read_header()
        self._end_bytes = self.header.start_bytes

    def _read_header(self) -> StreamHeader:
        source = self._source
        prefix = source.take(_PREFIX.size, "its header")
        magic, version, flags, header_bytes = _PREFIX.unpack(prefix)
        if magic != _HEADER_MAGIC:
            _damaged(0, "no stream of vhostd begins here; check that FILE is what `export` made")
        if not _PREFIX.size + _CRC.size <= header_bytes <= MAX_HEADER_BYTES:
            _damaged(8, f"a header of {header_bytes} bytes is not possible")
        rest = source.take(header_bytes - _PREFIX.size, "its header")
        whole = prefix + rest
        covered, crc = whole[: -_CRC.size], whole[-_CRC.size :]
        self._running = google_crc32c.value(covered)
        if crc != _CRC.pack(self._running):
            _damaged(0, "the checksum of the header does not match")
        if version != VERSION or flags & ~_KNOWN_FLAGS:
            raise UnsupportedError(
                f"the stream has version {version} and flags {flags:#x}, and this vhostd knows "
                f"version {VERSION} and flags {_KNOWN_FLAGS:#x}; receive it with a newer vhostd"
            )
        if len(covered) < _HEADER.size:
            _damaged(8, "the header is too short")
        return _decode_header(covered, flags)

    @property
    def at_bytes(self) -> int:
        """Bytes of the stream that were read and verified."""
        return self._source.at_bytes

    def chunks(self) -> Iterator[Chunk]:
        """All chunks in their order; ends after the trailer was verified, and nothing follows it.

        Raises:
            DamagedError: see above. What was yielded before is right nevertheless.
        """
        while True:
            start = self._source.at_bytes
            magic = self._source.take(4, "a chunk or the trailer", count=False)
            if magic == _TRAILER_MAGIC:
                self._read_trailer(start, magic)
                return
            self._source.digest.update(magic)
            if magic != _CHUNK_MAGIC:
                _damaged(start, "neither a chunk nor the trailer begins here")
            yield self._read_chunk(start, magic)

    def _read_chunk(self, start: int, magic: bytes) -> Chunk:
        source = self._source
        rest = source.take(_CHUNK.size - len(magic) + _CRC.size, "the header of a chunk")
        covered = magic + rest[: -_CRC.size]
        running = google_crc32c.extend(self._running, covered)
        if rest[-_CRC.size :] != _CRC.pack(running):
            _damaged(start, "the checksum of a chunk's header does not match")
        self._running = running
        _, kind, zero, index, offset_bytes, len_bytes, data_crc = _CHUNK.unpack(covered)
        expected = self.counts.data_chunks + self.counts.zero_chunks + 1
        wrong = _misplaced(self.header, self._end_bytes, offset_bytes, len_bytes)
        if kind not in (Kind.DATA, Kind.ZEROES) or zero:
            wrong = f"a chunk of kind {kind} is not known"
        elif kind == Kind.DATA and len_bytes > MAX_DATA_BYTES:
            wrong = f"a chunk has at most {MAX_DATA_BYTES} bytes, and this one {len_bytes}"
        elif kind == Kind.ZEROES and data_crc:
            wrong = "zeroes have no data"
        elif index != expected:
            wrong = f"chunk {index} stands where chunk {expected} should"
        if wrong:
            _damaged(start, wrong)
        data = b""
        if kind == Kind.DATA:
            at = source.at_bytes
            data = source.take(len_bytes, f"the data for byte {offset_bytes} of the volume")
            if google_crc32c.value(data) != data_crc:
                _damaged(
                    at,
                    f"the checksum of {len_bytes} bytes for byte {offset_bytes} of the volume "
                    "does not match",
                )
        self._end_bytes = offset_bytes + len_bytes
        self.counts.add(Kind(kind), len_bytes)
        return Chunk(Kind(kind), offset_bytes, len_bytes, data)

    def _read_trailer(self, start: int, magic: bytes) -> None:
        source = self._source
        rest = source.take(_TRAILER.size - len(magic) + _CRC.size, "the trailer", count=False)
        covered = magic + rest[: -_CRC.size]
        if rest[-_CRC.size :] != _CRC.pack(google_crc32c.extend(self._running, covered)):
            _damaged(start, "the checksum of the trailer does not match")
        _, zero, *counted, said, reserved = _TRAILER.unpack(covered)
        counts = self.counts
        have = [counts.data_chunks, counts.zero_chunks, counts.data_bytes, counts.zero_bytes]
        if counted != have:
            _damaged(start, f"the trailer counts {counted}, and the stream had {have}")
        if zero or reserved:
            _damaged(start, "the trailer has bits that are not known")
        if said != source.digest.digest():
            _damaged(start, "the digest of the whole stream does not match")
        if source.read(1):
            _damaged(source.at_bytes, "something follows the end of the stream")


def _decode_header(covered: bytes, flags: int) -> StreamHeader:
    (
        *_,
        block_bytes,
        volume_uuid,
        size_bytes,
        guid,
        from_guid,
        created_ns,
        start_bytes,
        volume_chars,
        snapshot_chars,
        zero,
    ) = _HEADER.unpack_from(covered)
    names = covered[_HEADER.size :]
    if len(names) != volume_chars + snapshot_chars or zero:
        _damaged(0, "the lengths in the header do not agree")
    if block_bytes not in (512, 4096):
        _damaged(12, f"a logical block of {block_bytes} bytes is not possible")
    if not 0 < size_bytes <= MAX_VOLUME_BYTES or size_bytes % block_bytes:
        _damaged(32, f"a volume of {size_bytes} bytes is not possible")
    if start_bytes > size_bytes or start_bytes % block_bytes:
        _damaged(80, f"a stream from byte {start_bytes} of {size_bytes} is not possible")
    if (from_guid != NO_GUID.bytes) != bool(flags & _FLAG_INCREMENT) or guid == NO_GUID.bytes:
        _damaged(6, "the flags and the snapshots of the header do not agree")
    try:
        volume = check_name(names[:volume_chars].decode("ascii"), "volume")
        snapshot = check_name(names[volume_chars:].decode("ascii"), "snapshot")
    except (UnicodeDecodeError, VhostdError) as error:
        _damaged(_HEADER.size, f"the names in the header are not possible: {error}")
    return StreamHeader(
        volume_uuid=UUID(bytes=volume_uuid),
        volume=volume,
        size_bytes=size_bytes,
        logical_block_bytes=block_bytes,
        snapshot=snapshot,
        guid=UUID(bytes=guid),
        created_ns=created_ns,
        from_guid=UUID(bytes=from_guid) if flags & _FLAG_INCREMENT else None,
        quiesced=bool(flags & _FLAG_QUIESCED),
        start_bytes=start_bytes,
    )


def _damaged(at_bytes: int, what: str) -> NoReturn:
    raise DamagedError(f"the stream is damaged at byte {at_bytes}: {what}")
