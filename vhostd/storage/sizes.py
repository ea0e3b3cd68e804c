"""Sizes as people write them: `20G`, `512MB`, `4096`.

`K M G T` (also `KiB MiB GiB TiB`) are powers of 2, `KB MB GB TB` powers of 10, and a bare number is
bytes. Pure; any thread.
"""

from __future__ import annotations

import re
from fractions import Fraction

from vhostd.errors import UsageError

__all__ = ["format_size", "parse_size"]

_UNITS = {
    "": 1,
    "B": 1,
    **{unit: 1 << shift for unit, shift in (("K", 10), ("M", 20), ("G", 30), ("T", 40))},
    **{unit: 1 << shift for unit, shift in (("KIB", 10), ("MIB", 20), ("GIB", 30), ("TIB", 40))},
    **{unit: 10**power for unit, power in (("KB", 3), ("MB", 6), ("GB", 9), ("TB", 12))},
}
# The lengths are bounded so that no text makes a number that takes long to compute.
_SIZE = re.compile(r"\s*([0-9]{1,20})(?:\.([0-9]{1,9}))?\s*([A-Za-z]{0,3})\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size such as `20G`, `1.5T` or `4096`.

    Raises:
        UsageError: it is not a size, is not a whole number of bytes, or is beyond 64 bits.
    """
    match = _SIZE.fullmatch(text)
    unit = match and _UNITS.get(match[3].upper())
    if match is None or unit is None:
        raise UsageError(
            f"{text[:64]!r} is not a size: write a number of bytes, or one with K, M, G or T "
            "(powers of 2) or KB, MB, GB or TB (powers of 10), as in 20G"
        )
    size = Fraction(f"{match[1]}.{match[2] or 0}") * unit
    if size.denominator != 1:
        raise UsageError(f"{text!r} is not a whole number of bytes; choose a smaller unit")
    if size >= 1 << 63:
        raise UsageError(f"{text!r} is beyond what a size can be; a volume has at most 64T")
    return int(size)


def format_size(size_bytes: int) -> str:
    """A size for people, in powers of 2: exact where it is short, else with two decimals."""
    for unit, shift in (("T", 40), ("G", 30), ("M", 20), ("K", 10)):
        if abs(size_bytes) >= 1 << shift:
            if size_bytes % (1 << shift) == 0:
                return f"{size_bytes >> shift}{unit}"
            return f"{size_bytes / (1 << shift):.2f}{unit}"
    return f"{size_bytes}"
