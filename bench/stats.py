"""Medians, spreads, states of the machine, and which runs may be compared with which.

Pure functions over what was measured. The rule they keep: figures of two back-ends are divided
only when the machine was in the same state in the runs both come from.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "STATES",
    "Comparison",
    "Sample",
    "Summary",
    "compare",
    "core_state",
    "noise",
    "summarise",
]

SIBLING_MAX_NS = 85.0
"""Round trips of a cache line below this are of two threads of one core."""
NEAR_MAX_NS = 300.0
"""And below this of two cores that are near each other."""
STATES = ("sibling", "near", "far")
OTHER_CPU_LIMIT = 0.2
"""Of one core: what anyone but the back-end and the front-end may use before a run is noisy."""
STEAL_LIMIT = 0.05


@dataclass(frozen=True)
class Sample:
    """One figure of one run, with the machine's state in it."""

    value: float
    state: str
    noisy: bool


@dataclass(frozen=True)
class Summary:
    """The median of runs, with the smallest and the largest."""

    median: float
    low: float
    high: float
    runs: int

    @property
    def spread(self) -> float:
        """(high - low) / median; 0 when the median is 0."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Comparison:
    """Subject's median divided by the peer's, over runs of one state.

    `low` and `high` bound the ratio: worst run against best, and the reverse.
    """

    ratio: float
    low: float
    high: float
    state: str
    subject_runs: int
    peer_runs: int
    noisy: bool


def core_state(before_ns: float, after_ns: float) -> str:
    """One of STATES, or `mixed` when it changed while the run went on."""
    before, after = (
        STATES[(trip_ns >= SIBLING_MAX_NS) + (trip_ns >= NEAR_MAX_NS)]
        for trip_ns in (before_ns, after_ns)
    )
    return before if before == after else "mixed"


def noise(*, busy_ns: int, own_ns: int, steal_ns: int, elapsed_s: float) -> list[str]:
    """Why a run is not to be trusted; empty: nothing disturbed it.

    The kernel's own threads (writeback, say) count as others: with page cache they work for the
    back-end, and the reader is told so.
    """
    if elapsed_s <= 0:
        return ["no time passed"]
    reasons = []
    others = (busy_ns - own_ns) / (elapsed_s * 1e9)
    if others > OTHER_CPU_LIMIT:
        reasons.append(f"others used {others:.0%} of a core")
    steal = steal_ns / (elapsed_s * 1e9)
    if steal > STEAL_LIMIT:
        reasons.append(f"the host took {steal:.0%} of a core")
    return reasons


def summarise(values: Iterable[float]) -> Summary:
    """Raises ValueError without values."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no runs to summarise")
    return Summary(statistics.median(ordered), ordered[0], ordered[-1], len(ordered))


def compare(subject: Sequence[Sample], peer: Sequence[Sample]) -> Comparison | None:
    """Compares runs of the state both have most of; quiet runs only, when both have such.

    None: the two never ran in the same state (or never at all). Runs of state `mixed` compare with
    nothing: they are of no one state.
    """
    best: Comparison | None = None
    for quiet_only in (True, False):
        for state in STATES:
            mine, theirs = (
                [s.value for s in samples if s.state == state and not (quiet_only and s.noisy)]
                for samples in (subject, peer)
            )
            if not mine or not theirs:
                continue
            ours, other = summarise(mine), summarise(theirs)
            if other.low <= 0:
                continue
            found = Comparison(
                ratio=ours.median / other.median,
                low=ours.low / other.high,
                high=ours.high / other.low,
                state=state,
                subject_runs=ours.runs,
                peer_runs=other.runs,
                noisy=not quiet_only,
            )
            if best is None or min(ours.runs, other.runs) > min(best.subject_runs, best.peer_runs):
                best = found
        if best is not None:
            break
    return best
