"""The first write to a block after a snapshot, against writing the same blocks again.

On a new, thin disk, served by one process throughout, the same blocks in the same random order are
written again and again: `thin` (never written before), `again`; then, cycle by cycle, a snapshot is
taken, and they are written for the first time after it (`first`) and once more (`again`). So each
`first` has an `again` right behind it, and their ratio hardly depends on what the machine does
meanwhile. The blocks are few of a large region: hardly two lie in the same 64 KiB, which is what
qcow2 copies.
"""

import statistics
import time

import msgspec

from bench import loadgen
from bench.backends import BackendError
from bench.disks import Disk, QsdDisk, VhostdDisk
from bench.machine import drop_caches
from bench.runner import Failure, Run, judge
from bench.session import Session
from bench.snapshots.scale import Scale

__all__ = ["AGAIN", "FIRST", "THIN", "FirstWrites", "Pass", "Ratio", "measure", "ratio"]

THIN, FIRST, AGAIN = "thin", "first", "again"
DEPTH = 32


class Pass(msgspec.Struct, frozen=True):
    """One pass over the blocks. `cycle` 0: before the first snapshot."""

    kind: str
    cycle: int
    run: Run


class FirstWrites(msgspec.Struct):
    disks: list[str] = []
    passes: list[Pass] = []
    failures: list[Failure] = []
    rounds: int = 0


class Ratio(msgspec.Struct, frozen=True):
    """Median, smallest and largest of the ratios of pairs of runs. `noisy`: no pair was quiet."""

    median: float
    low: float
    high: float
    pairs: int
    noisy: bool


def ratio(passes: list[Pass], disk: str, kind: str) -> Ratio | None:
    """Requests a second of `kind` divided by those of the `again` that followed.

    Quiet pairs only, when there are some. None: there is no pair.
    """
    found = {(p.kind, p.run.round, p.cycle): p.run for p in passes if p.run.backend == disk}
    pairs = [
        (run, again)
        for (what, number, cycle), run in found.items()
        if what == kind
        and (again := found.get((AGAIN, number, cycle))) is not None
        and again.result.requests_per_s > 0
    ]
    if not pairs:
        return None
    quiet = [pair for pair in pairs if not (pair[0].noise or pair[1].noise)]
    ratios = [
        run.result.requests_per_s / again.result.requests_per_s for run, again in quiet or pairs
    ]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios), not quiet)


def measure(session: Session, scale: Scale, *, peers: bool) -> FirstWrites:
    """What fails of one disk is kept, and stops no other."""
    outcome = FirstWrites()
    where, size = session.scratch, scale.first_region_bytes
    disks: list[Disk] = [VhostdDisk("vhostd", where / "bench-first", size, session.vhostd)]
    if peers:
        raw = QsdDisk("raw", where / "bench-first-raw", size, image="raw", kind="none")
        disks.append(raw)
        for kind in ("internal", "external"):
            name = f"qcow2-{kind}"
            disks.append(QsdDisk(name, where / f"bench-first-{name}", size, kind=kind))
    outcome.disks = [disk.name for disk in disks]
    last_s = 0.0
    while outcome.rounds < scale.first_rounds and session.has_time(outcome.rounds, last_s):
        begin = time.monotonic()
        turn = outcome.rounds % len(disks)
        for disk in disks[turn:] + disks[:turn]:
            drop_caches()
            try:
                _passes(session, scale, disk, outcome)
            except (BackendError, loadgen.LoadgenError) as error:
                outcome.failures.append(Failure(disk.name, "first", outcome.rounds, str(error)))
                session.say(f"{disk.name} first write: failed: {error}")
            finally:
                disk.remove()
        outcome.rounds += 1
        last_s = time.monotonic() - begin
    return outcome


def _passes(session: Session, scale: Scale, disk: Disk, outcome: FirstWrites) -> None:
    disk.create()
    # A raw image has no snapshots: it shows what a thin and a second write cost below them.
    cycles = 0 if isinstance(disk, QsdDisk) and disk.kind == "none" else scale.first_cycles
    with disk.serving(session.cores[0]) as live:

        def once(kind: str, cycle: int) -> None:
            load = ["--workload", "firstwrite", "--depth", str(DEPTH), "--seed", "11"]
            load += ["--requests", str(scale.first_blocks), *session.pinned(live.pid)]
            result = session.load(live.socket, *load)
            run = judge(result, disk.name, kind, outcome.rounds, dropped=False)
            outcome.passes.append(Pass(kind, cycle, run))
            session.say(
                f"round {outcome.rounds + 1} {disk.name:16} cycle {cycle} {kind:6} "
                f"{result.requests_per_s:12,.0f}/s"
            )

        once(THIN, 0)
        once(AGAIN, 0)
        for cycle in range(1, cycles + 1):
            live.snapshot(f"cycle{cycle}")
            once(FIRST, cycle)
            once(AGAIN, cycle)
