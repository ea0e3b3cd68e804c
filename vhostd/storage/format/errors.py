"""What a reader of the on-disk format says when bytes are not what the format promises."""

from __future__ import annotations

from vhostd.errors import DamagedError

__all__ = ["FormatError", "Place"]


class Place:
    """Where bytes came from: a file and the offset of the structure's first byte in it."""

    __slots__ = ("file", "offset_bytes")

    def __init__(self, file: str, offset_bytes: int = 0) -> None:
        self.file = file
        self.offset_bytes = offset_bytes

    def __repr__(self) -> str:
        return f"{self.file}+{self.offset_bytes}"


class FormatError(DamagedError):
    """A structure on disk is not well-formed, or not the one that belongs there.

    Attributes:
        structure: which one, as `docs/format.md` calls it.
        field: the field at fault, by its name there.
        file, offset_bytes: where the structure begins.
        reason: what is wrong with the field.
        newer: it is only of a version that this reader does not know.
    """

    def __init__(
        self, structure: str, field: str, place: Place, reason: str, *, newer: bool = False
    ) -> None:
        super().__init__(
            f"{structure} in {place.file} at offset {place.offset_bytes}: {field}: {reason}"
        )
        self.structure = structure
        self.field = field
        self.file = place.file
        self.offset_bytes = place.offset_bytes
        self.reason = reason
        self.newer = newer

    @property
    def brief(self) -> str:
        """Without the place, for a text that names it already."""
        return f"{self.structure}: {self.field}: {self.reason}"
