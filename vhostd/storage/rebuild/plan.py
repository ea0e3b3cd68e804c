"""What is to be rebuilt, in which order, and what came of it.

Pure but for the calls of the engine in `rebuild_maps`. One caller at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

import msgspec

from vhostd.errors import VhostdError

if TYPE_CHECKING:
    from vhostd._native import RebuiltVolume

__all__ = [
    "Engine",
    "Lines",
    "Report",
    "SnapshotPlan",
    "VolumeOutcome",
    "VolumePlan",
    "in_order",
    "rebuild_maps",
    "without_families",
]


class Engine(Protocol):
    """What is needed of `vhostd._native.Engine`."""

    def open_device(self, path: str, /, *, direct: bool = True) -> Any: ...
    def rebuild_volume(
        self,
        device: Any,
        /,
        *,
        volume_uuid: bytes,
        name: str,
        size_bytes: int,
        logical_block_bytes: int,
        epoch: int,
        segments: Sequence[int],
        snapshots: Sequence[tuple[bytes, int]],
        rollbacks: Sequence[tuple[int, int]],
        unmaps: Sequence[tuple[int, int, int]],
        origin: bytes = b"",
    ) -> RebuiltVolume: ...


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """A snapshot that is to have a map again."""

    uuid: UUID
    guid: UUID
    name: str
    position: int
    size_bytes: int
    created_ns: int
    protected: bool = False


@dataclass(slots=True)
class VolumePlan:
    """A volume that is to have maps again. origin: (volume, snapshot) of a clone."""

    uuid: UUID
    name: str
    size_bytes: int
    logical_block_bytes: int
    serial: str
    created_ns: int
    epoch: int
    logs: list[int]
    maps: list[int]
    snapshots: list[SnapshotPlan]
    rollbacks: list[tuple[int, int]]
    unmaps: list[tuple[int, int, int]]
    origin: tuple[UUID, UUID] | None = None
    notes: list[str] = field(default_factory=list)


class VolumeOutcome(msgspec.Struct, kw_only=True):
    """What came of one volume. failed: why it has no maps; its segments are as they were.

    lost: what of it could not be read, as sentences.
    """

    name: str
    uuid: str
    size_bytes: int = 0
    mapped_blocks: int = 0
    snapshots: list[str] = []
    log_segments: int = 0
    lost: list[str] = []
    failed: str | None = None


class Report(msgspec.Struct, kw_only=True):
    """What was found, and done. The shape is part of the interface.

    actions: in their order; in a dry run, what would be done. problems: what was not readable, or
    belongs to nobody. kept: where what was there before has been put.
    """

    path: str
    pool: str = ""
    pool_uuid: str = ""
    dry_run: bool = False
    segments: int = 0
    volumes: list[VolumeOutcome] = []
    actions: list[str] = []
    problems: list[str] = []
    kept: list[str] = []

    @property
    def ok(self) -> bool:
        """Everything that was found has been made again, and nothing of it was lost."""
        return not self.problems and not any(v.failed or v.lost for v in self.volumes)


@dataclass(slots=True)
class Lines:
    """Which snapshot each one descends from, and the head: of those that are present."""

    parents: dict[UUID, UUID | None]
    head: UUID | None

    @classmethod
    def of(cls, plan: VolumePlan) -> Lines:
        """Goes through snapshots and rollbacks in the order of the log."""
        at_position = {snapshot.position: snapshot.uuid for snapshot in plan.snapshots}
        # What the line had at the places that rollbacks go back to.
        marks: dict[int, UUID | None] = {}
        parents: dict[UUID, UUID | None] = {}
        targets = {to for _, to in plan.rollbacks}
        rollbacks = dict(plan.rollbacks)
        current: UUID | None = None
        for position in sorted({*at_position, *targets, *rollbacks}):
            uuid = at_position.get(position)
            if uuid is not None:
                parents[uuid] = current
                current = uuid
            if position in targets:
                marks[position] = current
            if position in rollbacks:
                current = marks.get(rollbacks[position])
        return cls(parents, current)


def in_order(plans: Iterable[VolumePlan]) -> list[VolumePlan]:
    """Origins before their clones; what has no origin among them first."""
    waiting = {plan.uuid: plan for plan in plans}
    ordered: list[VolumePlan] = []
    while waiting:
        ready = [
            plan
            for plan in waiting.values()
            if plan.origin is None or plan.origin[0] not in waiting
        ]
        # A circle is nobody's origin: they fail, one after the other, for lack of it.
        for plan in ready or list(waiting.values()):
            ordered.append(plan)
            del waiting[plan.uuid]
    return ordered


def rebuild_maps(
    engine: Engine,
    device: Any,
    plans: Sequence[VolumePlan],
    known_roots: Mapping[UUID, bytes],
) -> tuple[dict[UUID, RebuiltVolume], list[VolumeOutcome]]:
    """Has the maps of all plans made, in their order.

    known_roots: of snapshots, by UUID, of volumes that are not rebuilt. A volume that fails is told
    in its outcome, and has no entry in the first result.
    """
    roots = dict(known_roots)
    results: dict[UUID, RebuiltVolume] = {}
    outcomes = []
    for plan in plans:
        outcome = VolumeOutcome(
            name=plan.name,
            uuid=str(plan.uuid),
            size_bytes=plan.size_bytes,
            log_segments=len(plan.logs),
            lost=list(plan.notes),
        )
        outcomes.append(outcome)
        if plan.origin is not None and plan.origin[1] not in roots:
            outcome.failed = (
                f"it is a clone of snapshot {plan.origin[1]} of volume {plan.origin[0]}, which is "
                "not there; its segments are left alone"
            )
            continue
        try:
            rebuilt = engine.rebuild_volume(
                device,
                volume_uuid=plan.uuid.bytes,
                name=plan.name,
                size_bytes=plan.size_bytes,
                logical_block_bytes=plan.logical_block_bytes,
                epoch=max(plan.epoch, 1),
                segments=plan.logs,
                snapshots=[(s.uuid.bytes, s.position) for s in plan.snapshots],
                rollbacks=plan.rollbacks,
                unmaps=plan.unmaps,
                origin=roots[plan.origin[1]] if plan.origin is not None else b"",
            )
        except VhostdError as error:
            outcome.failed = str(error)
            continue
        results[plan.uuid] = rebuilt
        _drop_unreached(plan, rebuilt, outcome)
        for snapshot in rebuilt["snapshots"]:
            roots[UUID(bytes=snapshot["uuid"])] = snapshot["root"]
        outcome.mapped_blocks = rebuilt["mapped_blocks"]
        outcome.snapshots = [snapshot.name for snapshot in plan.snapshots]
        outcome.lost += rebuilt["lost"]
    return results, outcomes


def without_families(plans: Sequence[VolumePlan], failed: AbstractSet[UUID]) -> list[VolumePlan]:
    """The plans that have none of the failed ones as origin or clone, over any number of steps:
    these share map nodes, and none of them may get new maps without the others."""
    bad = set(failed)
    while True:
        more = {p.uuid for p in plans if p.origin is not None and p.origin[0] in bad}
        more |= {p.origin[0] for p in plans if p.origin is not None and p.uuid in bad}
        if more <= bad:
            return [plan for plan in plans if plan.uuid not in bad]
        bad |= more


def _drop_unreached(plan: VolumePlan, rebuilt: RebuiltVolume, outcome: VolumeOutcome) -> None:
    """A snapshot behind the log's end was never taken: its note was not durable."""
    state = rebuilt["state"]
    end = state["segment"] << 13 | state["end_block"]
    beyond = {s.uuid for s in plan.snapshots if s.position > end}
    if not beyond:
        return
    outcome.lost += [
        f"snapshot {s.name} was noted behind the log's end; it was never complete"
        for s in plan.snapshots
        if s.uuid in beyond
    ]
    plan.snapshots = [s for s in plan.snapshots if s.uuid not in beyond]
    rebuilt["snapshots"] = [s for s in rebuilt["snapshots"] if UUID(bytes=s["uuid"]) not in beyond]
