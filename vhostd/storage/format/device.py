"""The superblock of a device, and where its files are."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from vhostd.storage.format.errors import FormatError, Place
from vhostd.storage.format.fields import (
    BLOCK_BYTES,
    MAX_SEGMENT_NUMBER,
    Bytes,
    check_magic,
    check_sum,
    decode_text,
)

__all__ = [
    "CATALOG_FILE",
    "LOCK_FILE",
    "SEGMENTS_DIRECTORY",
    "SUPERBLOCK_FILE",
    "Superblock",
    "check_segment_bytes",
    "parse_superblock",
    "segment_number_of",
    "segment_path",
]

SUPERBLOCK_FILE = "superblock"
CATALOG_FILE = "catalog.sqlite"
LOCK_FILE = "lock"
SEGMENTS_DIRECTORY = "segments"

_STRUCTURE = "superblock"
# Pools of version 1 had a catalog without snapshots and were never released.
_VERSION = 2
_SUPERBLOCK = struct.Struct("<4sHH16s16sQQIHH")
_CHECKSUM_OFFSET = 56
_DIRECTORY_NAME = re.compile(r"[0-9a-f]{11}")
_FILE_NAME = re.compile(r"([0-9a-f]{13})\.seg")


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a device says of itself."""

    pool: UUID
    device: UUID
    segment_bytes: int
    created_ns: int
    pool_name: str


def parse_superblock(data: Bytes, place: Place) -> Superblock:
    """Reads the superblock out of one block.

    Raises:
        FormatError: it is none, or a damaged one.
    """
    if len(data) < BLOCK_BYTES:
        raise FormatError(_STRUCTURE, "length", place, f"{len(data)} bytes of {BLOCK_BYTES}")
    data = data[:BLOCK_BYTES]
    (
        magic,
        version,
        flags,
        pool,
        device,
        segment_bytes,
        created_ns,
        checksum,
        name_length,
        _,
    ) = _SUPERBLOCK.unpack_from(data)
    check_magic(_STRUCTURE, place, magic, b"VHSB", version, _VERSION)
    check_sum(_STRUCTURE, place, data, _CHECKSUM_OFFSET, checksum)
    if flags != 0:
        raise FormatError(_STRUCTURE, "flags", place, f"{flags:#x} are not known")
    check_segment_bytes(_STRUCTURE, place, segment_bytes)
    name = decode_text(_STRUCTURE, place, "pool name", data, _SUPERBLOCK.size, name_length)
    return Superblock(UUID(bytes=pool), UUID(bytes=device), segment_bytes, created_ns, name)


def check_segment_bytes(structure: str, place: Place, segment_bytes: int) -> None:
    """A power of two, 1 MiB to 32 MiB."""
    if segment_bytes & (segment_bytes - 1) or not 1 << 20 <= segment_bytes <= 32 << 20:
        raise FormatError(
            structure,
            "segment_bytes",
            place,
            f"{segment_bytes} is not a power of two from 1 MiB to 32 MiB",
        )


def segment_path(number: int) -> Path:
    """The path of a segment's file in its device."""
    return Path(SEGMENTS_DIRECTORY) / f"{number >> 10:011x}" / f"{number:013x}.seg"


def segment_number_of(directory_name: str, file_name: str) -> int | None:
    """The number of the segment that is kept under that name; None: no segment's name."""
    match = _FILE_NAME.fullmatch(file_name)
    if match is None or not _DIRECTORY_NAME.fullmatch(directory_name):
        return None
    number = int(match[1], 16)
    if not 0 < number <= MAX_SEGMENT_NUMBER or number >> 10 != int(directory_name, 16):
        return None
    return number
