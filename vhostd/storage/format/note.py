"""Notes: what a volume's log says beside its blocks (`docs/format.md`, "Note").

Pure; accepts any bytes, and raises nothing but `FormatError`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from uuid import UUID

import msgspec

from vhostd.storage.format.errors import FormatError, Place
from vhostd.storage.format.fields import (
    MAX_VOLUME_BLOCKS,
    Bytes,
    check_magic,
    check_range,
    decode_text,
)

__all__ = [
    "Note",
    "NotedOrigin",
    "NotedRollback",
    "NotedSnapshot",
    "NotedVolume",
    "SnapshotNote",
    "StateNote",
    "StateParts",
    "Unmap",
    "UnmapsNote",
    "VolumeState",
    "parse_note",
    "parse_state",
]

TYPE_SNAPSHOT = 1
TYPE_STATE = 2
TYPE_UNMAPS = 3
STATE_VERSION = 1
MAX_STATE_PARTS = 64

_WHAT = "note"
_HEADER = struct.Struct("<4sHHIHH")
_SNAPSHOT = struct.Struct("<16sQQH")
_UNMAPS = struct.Struct("<II")
_UNMAP = struct.Struct("<QIIQ")


@dataclass(frozen=True, slots=True)
class SnapshotNote:
    """A snapshot was taken at the note's position."""

    uuid: UUID
    created_ns: int
    size_bytes: int
    name: str


class NotedVolume(msgspec.Struct, frozen=True):
    """The volume itself, in a state note."""

    name: str
    size_bytes: int
    logical_block_bytes: int
    serial: str
    created_ns: int


class NotedOrigin(msgspec.Struct, frozen=True):
    """The snapshot that a clone began with, in a state note."""

    volume: UUID
    snapshot: UUID
    position: int


class NotedSnapshot(msgspec.Struct, frozen=True):
    """A snapshot that is present, in a state note."""

    uuid: UUID
    guid: UUID
    name: str
    position: int
    size_bytes: int
    created_ns: int
    protected: bool


class NotedRollback(msgspec.Struct, frozen=True):
    """From `position` on, the log builds on the volume as it was at `to`."""

    position: int
    to: int


class VolumeState(msgspec.Struct, frozen=True):
    """All that is known of a volume."""

    version: int
    volume: NotedVolume
    origin: NotedOrigin | None
    snapshots: list[NotedSnapshot]
    rollbacks: list[NotedRollback]


@dataclass(frozen=True, slots=True)
class StateNote:
    """A state, or a part of one; see `StateParts`. more: parts that follow this one."""

    part: int
    more: int
    payload: bytes


class StateParts:
    """Puts states together from the state notes of a log, in the log's order."""

    def __init__(self) -> None:
        self._payload = b""
        self._position = 0
        # The part that has to come next, and those behind it.
        self._wanted: tuple[int, int] | None = None

    def add(self, position: int, note: StateNote) -> tuple[int, bytes] | None:
        """Takes the next note; a state that is complete with it: its position, its JSON."""
        if note.part == 0:
            self._payload, self._position = b"", position
        elif self._wanted != (note.part, note.more):
            # A writer died between two parts.
            self._payload, self._wanted = b"", None
            return None
        self._payload += note.payload
        if note.more:
            self._wanted = (note.part + 1, note.more - 1)
            return None
        self._wanted = None
        return self._position, self._payload


@dataclass(frozen=True, slots=True)
class Unmap:
    """`count` blocks from `block` read as zeroes from `position` on."""

    block: int
    count: int
    position: int


@dataclass(frozen=True, slots=True)
class UnmapsNote:
    """Unmap entries of segments that were removed."""

    unmaps: tuple[Unmap, ...]


Note = SnapshotNote | StateNote | UnmapsNote


def parse_note(data: Bytes, place: Place) -> Note:
    """Reads a note out of its blocks.

    Raises:
        FormatError: it is none, a damaged one, or of a newer version.
    """
    if len(data) < _HEADER.size:
        raise FormatError(_WHAT, "length", place, f"{len(data)} bytes")
    magic, version, kind, length_bytes, part, more = _HEADER.unpack_from(data)
    check_magic(_WHAT, place, magic, b"VHNT", version)
    check_range(_WHAT, place, "length of the payload", length_bytes, 1, len(data) - _HEADER.size)
    payload = bytes(data[_HEADER.size : _HEADER.size + length_bytes])
    if kind == TYPE_SNAPSHOT:
        return _parse_snapshot(payload, place)
    if kind == TYPE_STATE:
        if part + more >= MAX_STATE_PARTS:
            raise FormatError(_WHAT, "state, parts", place, f"part {part} with {more} behind it")
        return StateNote(part, more, payload)
    if kind == TYPE_UNMAPS:
        return _parse_unmaps(payload, place)
    raise FormatError(_WHAT, "type", place, f"{kind} is not known")


def parse_state(payload: bytes, place: Place) -> VolumeState:
    """Reads a state that is whole.

    Raises:
        FormatError: it is none, or of a newer version.
    """
    try:
        state = msgspec.json.decode(payload, type=VolumeState)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(_WHAT, "state", place, str(error)) from error
    if state.version != STATE_VERSION:
        reason = f"it is {state.version}, and this reader knows {STATE_VERSION}"
        newer = state.version > STATE_VERSION
        raise FormatError(_WHAT, "state, version", place, reason, newer=newer)
    numbers = [state.volume.size_bytes, *(s.position for s in state.snapshots)]
    numbers += [n for r in state.rollbacks for n in (r.position, r.to)]
    if not all(0 <= number < 1 << 64 for number in numbers):
        raise FormatError(_WHAT, "state", place, "a size or a position is no number of 64 bits")
    return state


def _parse_snapshot(payload: bytes, place: Place) -> SnapshotNote:
    if len(payload) < _SNAPSHOT.size:
        raise FormatError(_WHAT, "length of the payload", place, f"{len(payload)} bytes")
    uuid, created_ns, size_bytes, name_length = _SNAPSHOT.unpack_from(payload)
    if len(payload) < _SNAPSHOT.size + name_length:
        raise FormatError(_WHAT, "length of the name", place, f"{name_length} bytes do not fit")
    name = decode_text(_WHAT, place, "name", payload, _SNAPSHOT.size, name_length)
    return SnapshotNote(UUID(bytes=uuid), created_ns, size_bytes, name)


def _parse_unmaps(payload: bytes, place: Place) -> UnmapsNote:
    if len(payload) < _UNMAPS.size:
        raise FormatError(_WHAT, "length of the payload", place, f"{len(payload)} bytes")
    count, _ = _UNMAPS.unpack_from(payload)
    if len(payload) != _UNMAPS.size + count * _UNMAP.size:
        raise FormatError(_WHAT, "count", place, f"{count} unmaps in {len(payload)} bytes")
    unmaps = []
    for block, blocks, _, position in _UNMAP.iter_unpack(payload[_UNMAPS.size :]):
        if blocks == 0 or block + blocks > MAX_VOLUME_BLOCKS:
            reason = f"{blocks} blocks from block {block} are no part of a volume"
            raise FormatError(_WHAT, "unmaps", place, reason)
        unmaps.append(Unmap(block, blocks, position))
    return UnmapsNote(tuple(unmaps))
