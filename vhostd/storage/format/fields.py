"""What all structures have in common: magic, version, a checksum over themselves, text."""

from __future__ import annotations

import google_crc32c

from vhostd.storage.format.errors import FormatError, Place

__all__ = [
    "BLOCK_BYTES",
    "MAX_SEGMENT_BLOCKS",
    "MAX_SEGMENT_NUMBER",
    "MAX_VOLUME_BLOCKS",
    "Bytes",
    "check_magic",
    "check_range",
    "check_sum",
    "crc32c",
    "decode_text",
    "is_zero",
]

BLOCK_BYTES = 4096
MAX_SEGMENT_BLOCKS = 8192
MAX_SEGMENT_NUMBER = (1 << 51) - 1
MAX_VOLUME_BLOCKS = 1 << 34
VERSION = 1

Bytes = bytes | memoryview

_ZERO_BLOCK = bytes(BLOCK_BYTES)


def crc32c(data: Bytes) -> int:
    """CRC-32C of `data` (RFC 3720, appendix B.4)."""
    value: int = google_crc32c.value(bytes(data))
    return value


def is_zero(block: Bytes) -> bool:
    """Nothing was ever written there: a hole, or the end of a file that is shorter."""
    return block == _ZERO_BLOCK[: len(block)]


def check_magic(
    structure: str, place: Place, magic: bytes, expected: bytes, version: int, known: int = VERSION
) -> None:
    """Magic first: the version of something else means nothing."""
    if magic != expected:
        raise FormatError(structure, "magic", place, f"it is {magic!r}, not {expected!r}")
    if version != known:
        raise FormatError(
            structure,
            "version",
            place,
            f"it is {version}, and this reader knows {known}",
            newer=version > known,
        )


def check_sum(structure: str, place: Place, data: Bytes, offset: int, stored: int) -> None:
    """The checksum at `offset` is over all of `data`, with itself as zero."""
    computed = crc32c(b"".join((data[:offset], bytes(4), data[offset + 4 :])))
    if computed != stored:
        raise FormatError(
            structure,
            "checksum",
            place,
            f"it is {stored:#010x}, and the bytes have {computed:#010x}",
        )


def check_range(structure: str, place: Place, field: str, value: int, low: int, high: int) -> None:
    """`value` lies in `low` to `high`, both included."""
    if not low <= value <= high:
        raise FormatError(structure, field, place, f"it is {value}, outside {low} to {high}")


def decode_text(
    structure: str, place: Place, field: str, data: Bytes, offset: int, length: int
) -> str:
    """UTF-8 text of 1 to 255 bytes."""
    check_range(structure, place, f"{field} length", length, 1, 255)
    try:
        return str(bytes(data[offset : offset + length]), "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(structure, field, place, f"it is not UTF-8 ({error.reason})") from error
