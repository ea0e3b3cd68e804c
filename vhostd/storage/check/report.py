"""What a check reports: findings, what was read, and the verdict. JSON by `msgspec`.

The shape is part of the interface: fields are added, never renamed or removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Literal

import msgspec

__all__ = ["CheckReport", "CheckSummary", "Finding", "Findings", "Severity", "VolumeReport"]

Severity = Literal["error", "warning", "note"]

FindingKey = tuple[str, int | None, int | None, int | None]

MAX_READERS = 100
MAX_FINDINGS = 1000
"""Findings kept in a report; the rest are counted. A device that is gone gives one a block."""


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that is not as it should be.

    error: what is on disk is not what was written, or data cannot be read. warning: redundancy or
    space is lost, or it cannot be told from a crash. note: of interest, nothing to do.

    code: a stable word for scripts. volume: its name. segment: its number. offset_bytes: in the
    file. volume_offset_bytes, length_bytes: what part of the volume is concerned, when that is
    known. readers: heads (`VOLUME`) and snapshots (`VOLUME@SNAPSHOT`) that read it there, clones
    included; at most 100.
    """

    severity: Severity
    code: str
    text: str
    action: str
    volume: str | None = None
    file: str | None = None
    segment: int | None = None
    offset_bytes: int | None = None
    volume_offset_bytes: int | None = None
    length_bytes: int | None = None
    readers: list[str] = []

    @property
    def key(self) -> FindingKey:
        """What stays the same from look to look; numbers in the text may move on."""
        return self.code, self.segment, self.offset_bytes, self.volume_offset_bytes


class CheckSummary(msgspec.Struct, kw_only=True):
    """What was read."""

    segments: int = 0
    log_segments: int = 0
    map_segments: int = 0
    records: int = 0
    blocks: int = 0
    """Data blocks whose place and checksum in map and records were compared."""
    data_blocks_read: int = 0
    """Data blocks that were read and whose contents were compared with their checksum."""
    nodes: int = 0
    bytes_read: int = 0
    seconds: float = 0.0


class VolumeReport(msgspec.Struct, kw_only=True):
    """What was found of one volume."""

    name: str
    uuid: str
    size_bytes: int
    mapped_blocks: int = 0
    log_segments: int = 0
    map_segments: int = 0
    records: int = 0
    nodes: int = 0
    replayable_records: int = 0
    """Records behind the last checkpoint, that the next opening applies."""
    snapshots: int = 0
    """Snapshots whose maps were read, those that are being removed included."""
    dead_blocks: int = 0
    """Data blocks that nothing reads, punched or not, by the dead sets of the catalog."""
    punched_blocks: int = 0


class CheckReport(msgspec.Struct, kw_only=True):
    """The result of a check.

    live: a daemon has the pool open; what is reported was seen in two looks, one after another.
    data: contents were read too. errors, warnings, notes: all, also those that `findings` has no
    room for.
    """

    path: str
    pool: str | None = None
    pool_uuid: str | None = None
    live: bool = False
    data: bool = False
    volumes: list[VolumeReport] = []
    findings: list[Finding] = []
    errors: int = 0
    warnings: int = 0
    notes: int = 0
    summary: CheckSummary = msgspec.field(default_factory=CheckSummary)

    @property
    def ok(self) -> bool:
        """No errors; warnings and notes are no errors."""
        return self.errors == 0


class Findings:
    """Collects findings up to a bound and counts them all."""

    def __init__(self, volume: str | None = None) -> None:
        self.kept: list[Finding] = []
        self.counts: dict[Severity, int] = {"error": 0, "warning": 0, "note": 0}
        self._volume = volume

    def add(
        self,
        severity: Severity,
        code: str,
        text: str,
        action: str,
        *,
        file: str | None = None,
        segment: int | None = None,
        offset_bytes: int | None = None,
        volume_offset_bytes: int | None = None,
        length_bytes: int | None = None,
        readers: Sequence[str] = (),
    ) -> None:
        """Notes one finding."""
        self.counts[severity] += 1
        if len(self.kept) < MAX_FINDINGS:
            self.kept.append(
                Finding(
                    severity=severity,
                    code=code,
                    text=text,
                    action=action,
                    volume=self._volume,
                    file=file,
                    segment=segment,
                    offset_bytes=offset_bytes,
                    volume_offset_bytes=volume_offset_bytes,
                    length_bytes=length_bytes,
                    readers=list(readers[:MAX_READERS]),
                )
            )

    @property
    def suspicious(self) -> bool:
        """There is more than notes."""
        return self.counts["error"] + self.counts["warning"] > 0

    def keep_only(self, known: AbstractSet[FindingKey]) -> None:
        """Forgets what is more than a note and not known, and what was only counted."""
        self.kept = [f for f in self.kept if f.severity == "note" or f.key in known]
        self.counts = {"error": 0, "warning": 0, "note": 0}
        for finding in self.kept:
            self.counts[finding.severity] += 1

    def into(self, report: CheckReport) -> None:
        """Adds these to a report, as far as it has room."""
        room = max(0, MAX_FINDINGS - len(report.findings))
        report.findings.extend(self.kept[:room])
        report.errors += self.counts["error"]
        report.warnings += self.counts["warning"]
        report.notes += self.counts["note"]
