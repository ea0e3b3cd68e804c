"""What live data is, without asking vhostd, and what the samples of a run say. Pure functions.

Blocks are overwritten uniformly at random, so how many versions of blocks a head and its snapshots
reach follows from how much was written between them. For more than a few thousand blocks chance
hardly moves it: by about 1/sqrt(blocks).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from bench.loadgen import Interval

__all__ = ["Latencies", "Sample", "amplification", "latencies", "reached_blocks", "usage"]


class Sample(msgspec.Struct, frozen=True):
    """One look at a pool while it is written to. Counters are since the volume was opened."""

    at_s: float
    """From the beginning of the load; after it, it goes on."""
    written_bytes: int
    du_bytes: int
    reached_bytes: int
    """Of data that head and snapshots reach: `reached_blocks`."""
    live_bytes: int
    """The same as vhostd accounts for it."""
    allocated_bytes: int
    log_bytes: int
    node_bytes: int
    punched_bytes: int
    disk_bytes: int | None
    """Written to the block device, by whomever."""
    snapshots: int
    removing: int


def reached_blocks(blocks: int, marks: Sequence[int], written: int) -> float:
    """Versions of blocks that a head and its snapshots reach, expected.

    blocks: of the volume, all mapped. marks: blocks written when each snapshot that is still there
    was taken, ascending. written: until now.
    """
    reached = float(blocks)
    ends = [*marks, written]
    for taken, until in itertools.pairwise(ends):
        # The part of blocks that `until - taken` random writes hit at least once.
        reached += blocks * -math.expm1(-(until - taken) / blocks)
    return reached


def usage(samples: Sequence[Sample]) -> list[float]:
    """Of each sample: what the segments take by what of data is reached."""
    return [sample.du_bytes / sample.reached_bytes for sample in samples if sample.reached_bytes]


def amplification(samples: Sequence[Sample]) -> tuple[float, float | None] | None:
    """Bytes to disk by bytes from the guest: by vhostd's counters, and by the device's.

    None: nothing was written.
    """
    if len(samples) < 2 or samples[-1].written_bytes <= samples[0].written_bytes:
        return None
    first, last = samples[0], samples[-1]
    guest = last.written_bytes - first.written_bytes
    counted = last.log_bytes + last.node_bytes - first.log_bytes - first.node_bytes
    by_device = None
    if first.disk_bytes is not None and last.disk_bytes is not None:
        by_device = (last.disk_bytes - first.disk_bytes) / guest
    return counted / guest, by_device


@dataclass(frozen=True)
class Latencies:
    """Of intervals in which space was given back, or not: p99s and the longest, ns."""

    p99_ns: list[int]
    max_ns: list[int]
    requests: int


def latencies(series: Sequence[Interval], samples: Sequence[Sample]) -> tuple[Latencies, Latencies]:
    """(while space was given back, while not), by whether `punched_bytes` grew in the interval."""
    busy: list[Interval] = []
    idle: list[Interval] = []
    for interval in series:
        if not interval.requests:
            continue
        end_s = interval.at_s + interval.seconds
        grew = _punched(samples, end_s) > _punched(samples, interval.at_s)
        (busy if grew else idle).append(interval)
    return _latencies(busy), _latencies(idle)


def _latencies(part: Sequence[Interval]) -> Latencies:
    return Latencies(
        [interval.p99_ns for interval in part],
        [interval.max_ns for interval in part],
        sum(interval.requests for interval in part),
    )


def _punched(samples: Sequence[Sample], at_s: float) -> float:
    """`punched_bytes` at a moment, between samples on the line from one to the next."""
    before = [sample for sample in samples if sample.at_s <= at_s]
    after = [sample for sample in samples if sample.at_s > at_s]
    if not before:
        return float(samples[0].punched_bytes) if samples else 0.0
    if not after:
        return float(before[-1].punched_bytes)
    first, last = before[-1], after[0]
    part = (at_s - first.at_s) / (last.at_s - first.at_s)
    return first.punched_bytes + part * (last.punched_bytes - first.punched_bytes)
