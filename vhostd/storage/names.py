"""Names of pools, volumes and snapshots, written `pool/volume@snapshot` everywhere.

A name is 1 to 128 characters, the first a letter or digit, the others letters, digits, `.`, `_` or
`-`: it is safe as a file name, in a shell, in a URL and in a serial number. Pure; any thread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vhostd.errors import UsageError

__all__ = [
    "NAME_MAX_CHARS",
    "SnapshotName",
    "VolumeName",
    "check_name",
    "parse_snapshot",
    "parse_volume",
    "parse_volume_or_snapshot",
]

NAME_MAX_CHARS = 128

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class VolumeName:
    """`pool/volume`."""

    pool: str
    volume: str

    def __str__(self) -> str:
        return f"{self.pool}/{self.volume}"


@dataclass(frozen=True, slots=True)
class SnapshotName:
    """`pool/volume@snapshot`."""

    pool: str
    volume: str
    snapshot: str

    def __str__(self) -> str:
        return f"{self.pool}/{self.volume}@{self.snapshot}"

    @property
    def of(self) -> VolumeName:
        """The volume it is of."""
        return VolumeName(self.pool, self.volume)


def check_name(name: str, what: str) -> str:
    """Returns `name` if it can name a `what` ("pool", "volume", "snapshot").

    Raises:
        UsageError: it cannot, and why.
    """
    if _NAME.fullmatch(name):
        return name
    shown = repr(name if len(name) <= NAME_MAX_CHARS else name[:NAME_MAX_CHARS] + "…")
    if not name:
        reason = "it is empty"
    elif "/" in name:
        reason = "a slash separates pool and volume and cannot be part of a name"
    elif "@" in name:
        reason = "an @ separates volume and snapshot and cannot be part of a name"
    elif len(name) > NAME_MAX_CHARS:
        reason = f"it has {len(name)} characters, and {NAME_MAX_CHARS} are possible"
    else:
        reason = "letters, digits, '.', '_' and '-' are possible, the first a letter or digit"
    raise UsageError(f"{shown} cannot be the name of a {what}: {reason}; choose another name")


def parse_volume(text: str) -> VolumeName:
    """Takes `pool/volume` apart.

    Raises:
        UsageError: that is not what it is.
    """
    pool, slash, volume = text.partition("/")
    if not slash:
        raise UsageError(
            f"{text!r} does not name a volume: write it as POOL/VOLUME, as in fast/{text or 'web1'}"
        )
    if "@" in volume:
        raise UsageError(
            f"{text!r} names a snapshot, and a volume is wanted here; write it as POOL/VOLUME"
        )
    if "/" in volume:
        raise UsageError(
            f"{text!r} has more than one slash: write it as POOL/VOLUME; a name has no slash"
        )
    return VolumeName(check_name(pool, "pool"), check_name(volume, "volume"))


def parse_snapshot(text: str) -> SnapshotName:
    """Takes `pool/volume@snapshot` apart.

    Raises:
        UsageError: that is not what it is.
    """
    volume, at, snapshot = text.partition("@")
    if not at:
        raise UsageError(
            f"{text!r} does not name a snapshot: write it as POOL/VOLUME@SNAPSHOT, as in "
            f"{volume or 'fast/web1'}@before-upgrade"
        )
    name = parse_volume(volume)
    return SnapshotName(name.pool, name.volume, check_name(snapshot, "snapshot"))


def parse_volume_or_snapshot(text: str) -> VolumeName | SnapshotName:
    """Takes `pool/volume` or `pool/volume@snapshot` apart.

    Raises:
        UsageError: it is neither.
    """
    return parse_snapshot(text) if "@" in text else parse_volume(text)
