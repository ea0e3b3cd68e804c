"""Random reads and writes with none, few and many snapshots, of vhostd and of qcow2 both ways.

Every disk is filled once and then overwritten at random by the same number of blocks, with its
snapshots spread evenly over that; so they differ in snapshots and in nothing else. Then, round by
round, each load is run on all of them one after another, their order turning. The times that taking
each snapshot took while a disk was made are kept.
"""

import time
from collections.abc import Sequence

import msgspec

from bench import loadgen
from bench.backends import BackendError
from bench.disks import Disk, Live, QsdDisk, VhostdDisk, fill, overwrite
from bench.machine import drop_caches
from bench.matrix import CELLS, Cell
from bench.runner import Failure, Run, judge
from bench.session import Session
from bench.snapshots.scale import Scale

__all__ = ["LOADS", "Throughput", "measure", "ours"]

LOADS = [cell for cell in CELLS if cell.workload in ("randread", "randwrite")]


class Throughput(msgspec.Struct):
    disks: list[str] = []
    snapshots: dict[str, int] = {}
    """How many each disk has."""
    create_s: dict[str, list[float]] = {}
    runs: list[Run] = []
    failures: list[Failure] = []
    rounds: int = 0


def ours(count: int) -> str:
    """The name of vhostd's disk with so many snapshots."""
    return f"vhostd-{count}"


def _disks(session: Session, scale: Scale, peers: bool) -> list[tuple[Disk, int]]:
    where, size = session.scratch, scale.region_bytes
    disks: list[tuple[Disk, int]] = [
        (VhostdDisk(ours(count), where / f"bench-{ours(count)}", size, session.vhostd), count)
        for count in scale.counts
    ]
    if not peers:
        return disks
    wanted = [("none", 0)]
    wanted += [("internal", count) for count in scale.internal]
    wanted += [("external", count) for count in scale.external]
    for kind, count in wanted:
        name = f"qcow2-{kind}-{count}" if count else "qcow2-0"
        disks.append((QsdDisk(name, where / f"bench-{name}", size, kind=kind), count))
    return disks


def measure(session: Session, scale: Scale, *, peers: bool) -> Throughput:
    """What fails of one disk is kept, and stops no other."""
    outcome = Throughput()
    disks = _disks(session, scale, peers)
    ready: list[Disk] = []
    try:
        for disk, count in disks:
            try:
                _make(session, scale, disk, count, outcome)
            except (BackendError, loadgen.LoadgenError) as error:
                _failed(session, outcome, disk, "snapshots", 0, str(error))
                disk.remove()
            else:
                ready.append(disk)
        last_s = 0.0
        while outcome.rounds < scale.load_rounds and session.has_time(outcome.rounds, last_s):
            begin = time.monotonic()
            turn = outcome.rounds % max(1, len(ready))
            _round(session, scale, ready[turn:] + ready[:turn], outcome)
            outcome.rounds += 1
            last_s = time.monotonic() - begin
    finally:
        for disk, _ in disks:
            disk.remove()
    return outcome


def _failed(
    session: Session, outcome: Throughput, disk: Disk, load: str, number: int, reason: str
) -> None:
    outcome.failures.append(Failure(disk.name, load, number, reason))
    session.say(f"{disk.name} {load}: failed: {reason}")


def _make(session: Session, scale: Scale, disk: Disk, count: int, outcome: Throughput) -> None:
    begin = time.monotonic()
    disk.create()
    taken: list[float] = []
    with disk.serving(session.cores[0]) as live:
        fill(session, live)
        parts = max(1, count)
        for part in range(parts):
            if count:
                taken.append(live.snapshot(f"s{part}"))
            blocks = scale.overwritten_blocks * (part + 1) // parts
            blocks -= scale.overwritten_blocks * part // parts
            if blocks:
                overwrite(session, live, blocks, part)
    outcome.disks.append(disk.name)
    outcome.snapshots[disk.name] = count
    outcome.create_s[disk.name] = taken
    session.say(f"{disk.name}: made in {time.monotonic() - begin:.0f} s")


def _round(session: Session, scale: Scale, disks: Sequence[Disk], outcome: Throughput) -> None:
    for cell in LOADS:
        for disk in disks:
            # Again, if it was noisy: chosen by what others did, never by the figure itself.
            for _ in range(1 + scale.load_retries):
                run = _one(session, scale, disk, cell, outcome)
                if run is None or not run.noise:
                    break


def _one(session: Session, scale: Scale, disk: Disk, cell: Cell, outcome: Throughput) -> Run | None:
    dropped = drop_caches()
    try:
        with disk.serving(session.cores[0]) as live:
            result = _load(session, scale, live, cell, outcome.rounds)
    except (BackendError, loadgen.LoadgenError) as error:
        _failed(session, outcome, disk, cell.name, outcome.rounds, str(error))
        return None
    run = judge(result, disk.name, cell.name, outcome.rounds, dropped=dropped)
    outcome.runs.append(run)
    session.say(
        f"round {outcome.rounds + 1} {cell.name:8} {disk.name:18} "
        f"{result.requests_per_s:12,.0f}/s  {run.state}"
        + (f"  noisy: {'; '.join(run.noise)}" if run.noise else "")
    )
    return run


def _load(session: Session, scale: Scale, live: Live, cell: Cell, number: int) -> loadgen.Result:
    return session.load(
        live.socket,
        *cell.arguments(),
        *("--duration", str(scale.seconds)),
        *("--warm-up", str(scale.warm_up_s)),
        *("--seed", str(1000 + number)),
        *session.pinned(live.pid),
    )
