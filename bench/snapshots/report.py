"""What the snapshot benchmark found, as JSON and Markdown."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench import paper, stats
from bench.machine import Machine
from bench.runner import Run
from bench.snapshots.create import EMPTY, MAPPED, Creation
from bench.snapshots.first_write import FIRST, THIN, FirstWrites, Ratio, ratio
from bench.snapshots.throughput import LOADS, Throughput, ours

__all__ = ["Report", "markdown", "write"]

CREATE_LIMIT_MS = 5.0
MANY_LEAST = 0.95
FIRST_LEAST = 0.9
WAYS = ("engine", "storage", "json-rpc", "json-rpc under load", "vhostctl", "burst")


class Report(msgspec.Struct):
    machine: Machine
    mode: str
    cores: tuple[int, int]
    versions: dict[str, str | None]
    creation: Creation | None = None
    throughput: Throughput | None = None
    first_writes: FirstWrites | None = None
    failures: list[str] = []


def _creation(found: Creation) -> list[str]:
    def times(volume: str, way: str) -> list[float]:
        return [t.seconds for t in found.timings if (t.volume, t.way) == (volume, way)]

    lines = [
        "## Taking a snapshot",
        "",
        f"Two volumes of {found.volume_bytes >> 30} GiB: `{EMPTY}`, with "
        f"{found.mapped_blocks.get(EMPTY, 0):,} blocks mapped at first, and `{MAPPED}`, with "
        f"{found.mapped_blocks.get(MAPPED, 0):,} at random places; at the end "
        f"{found.mapped_blocks.get(EMPTY + ' after', 0):,} and "
        f"{found.mapped_blocks.get(MAPPED + ' after', 0):,}. {found.rounds} rounds, in turns. "
        "Milliseconds: median / 99th percentile / maximum.",
        "",
    ]
    rows = []
    for way in WAYS:
        empty, mapped = times(EMPTY, way), times(MAPPED, way)
        if empty and mapped:
            same = statistics.median(mapped) / statistics.median(empty)
            row = [way, paper.milliseconds(empty), paper.milliseconds(mapped), f"{same:.2f}"]
            rows.append([*row, min(len(empty), len(mapped))])
    lines += paper.table(["way", EMPTY, MAPPED, "ratio of medians", "times each"], rows)
    for way in ("engine", "json-rpc"):
        if mapped := times(MAPPED, way):
            median = statistics.median(mapped) * 1e3
            lines.append(f"- {way}, {MAPPED}, ms: {paper.verdict(median, CREATE_LIMIT_MS)}")
    lines += [
        "",
        "`burst`: 128 calls in a row without a checkpoint between; every 64th makes one. "
        "`vhostctl`: the whole program.",
        "",
        "What a guest notices: a load at a steady rate (4 KiB, 70 % reads, depth 32), latencies "
        "told from when a request was due.",
        "",
    ]
    rows = []
    for volume in (EMPTY, MAPPED):
        for taking in (False, True):
            stalls = [s for s in found.stalls if s.volume == volume and bool(s.snapshots) == taking]
            if not stalls:
                continue
            worst = [s.result.latency_ns.max / 1e9 for s in stalls]
            p99_9 = statistics.median(s.result.latency_ns.p99_9 for s in stalls) / 1e6
            rate = statistics.median(s.result.requests_per_s for s in stalls)
            rows.append(
                [
                    volume,
                    sum(s.snapshots for s in stalls) or "none",
                    f"{rate:,.0f}",
                    f"{p99_9:.2f}",
                    f"{statistics.median(worst) * 1e3:.2f}",
                    f"{max(worst) * 1e3:.2f}",
                    f"{sum(bool(s.noise) for s in stalls)} of {len(stalls)}",
                ]
            )
    columns = [
        "volume",
        "snapshots",
        "requests/s",
        "p99.9 ms",
        "longest ms: median",
        "longest of all",
        "noisy",
    ]
    return [*lines, *paper.table(columns, rows)]


def _quiet(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if not run.noise] or list(runs)


def paired(runs: Sequence[Run], subject: str, base: str) -> Ratio | None:
    """Ratios of the two within a round, of rounds in which the machine was in one state for both,
    and quiet, where there are such."""
    rounds = sorted({run.round for run in runs})
    for quiet_only in (True, False):
        ratios = []
        for number in rounds:
            mine, theirs = (
                [
                    run
                    for run in runs
                    if (run.backend, run.round) == (name, number)
                    and not (quiet_only and run.noise)
                    and run.result.requests_per_s > 0
                ]
                for name in (subject, base)
            )
            # A noisy run was done again: the last pair of one state is the one to take.
            alike = [(m, t) for m in mine for t in theirs if m.state == t.state in stats.STATES]
            if alike:
                one, other = alike[-1]
                ratios.append(one.result.requests_per_s / other.result.requests_per_s)
        if ratios:
            middle = statistics.median(ratios)
            return Ratio(middle, min(ratios), max(ratios), len(ratios), not quiet_only)
    return None


def _ratio(found: Ratio) -> str:
    text = f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"
    return f"{text} noisy" if found.noisy else text


def _throughput(found: Throughput) -> list[str]:
    lines = [
        "## With many snapshots",
        "",
        f"{found.rounds} rounds. Thousand requests a second: median (min-max) of quiet runs where "
        "there are some; the ratio is to the disk of the same kind without snapshots, of runs of "
        "one round in one state of the machine: median (min-max).",
        "",
    ]
    for cell in LOADS:
        of_cell = [run for run in found.runs if run.cell == cell.name]
        rows = []
        for disk in found.disks:
            runs = _quiet([run for run in of_cell if run.backend == disk])
            if not runs:
                continue
            base = ours(0) if disk.startswith("vhostd") else "qcow2-0"
            rate = stats.summarise(run.result.requests_per_s / 1e3 for run in runs)
            p99 = statistics.median(run.result.latency_ns.p99 for run in runs) / 1e3
            compared = paired(of_cell, disk, base) if disk != base else None
            text = "-" if disk == base else "no like state"
            if compared is not None:
                text = _ratio(compared)
            noisy = ", **noisy**" if any(run.noise for run in runs) else ""
            rate_text = f"{rate.median:.1f} ({rate.low:.1f}-{rate.high:.1f})"
            rows.append([disk, rate_text, f"{p99:,.0f}", text, f"{len(runs)}{noisy}"])
        lines += [f"### {cell.title}", ""]
        lines += paper.table(["disk", "thousand/s", "p99 µs", "to none", "runs"], rows)
        many = max((n for d, n in found.snapshots.items() if d.startswith("vhostd")), default=0)
        compared = paired(of_cell, ours(many), ours(0)) if many else None
        if compared is not None:
            reached = paper.verdict(
                compared.median, MANY_LEAST, at_least=True, noisy=compared.noisy
            )
            lines += [f"vhostd with {many:,}: {compared.median:.3f}, {reached}", ""]
    rows = [
        [disk, f"{found.snapshots[disk]:,}", paper.milliseconds(found.create_s[disk])]
        for disk in found.disks
        if found.create_s.get(disk)
    ]
    lines += [
        "Taking each of them, the disk served and idle, ms: median / 99th percentile / maximum. "
        "(vhostd: the JSON-RPC call, a checkpoint at every 64th or so in it; external: without "
        "making the file.)",
        "",
    ]
    return [*lines, *paper.table(["disk", "snapshots", "ms"], rows)]


def _first(found: FirstWrites) -> list[str]:
    rows = []
    for disk in found.disks:
        of_disk = [p for p in found.passes if p.run.backend == disk]
        if not of_disk:
            continue
        cells = []
        for kind in (THIN, FIRST):
            compared = ratio(found.passes, disk, kind)
            cells.append("-" if compared is None else f"{_ratio(compared)}, {compared.pairs}")
        rates = []
        for kind in (THIN, FIRST, "again"):
            values = [p.run.result.requests_per_s / 1e3 for p in of_disk if p.kind == kind]
            rates.append(f"{statistics.median(values):.1f}" if values else "-")
        rows.append([disk, *rates, *cells])
    lines = [
        "## The first write after a snapshot",
        "",
        "4 KiB at random, depth 32, the same blocks each time; thousand requests a second "
        "(medians), and ratios to the pass right behind: median (min-max), pairs.",
        "",
        *paper.table(
            ["disk", "thin", "first after", "again", "thin : again", "first : again"], rows
        ),
    ]
    compared = ratio(found.passes, "vhostd", FIRST)
    if compared is not None:
        reached = paper.verdict(compared.median, FIRST_LEAST, at_least=True, noisy=compared.noisy)
        lines += [f"vhostd, first : again: {compared.median:.3f}, {reached}", ""]
    return lines


def markdown(report: Report) -> list[str]:
    lines = paper.head(
        f"Snapshots, {report.mode}", report.machine, report.cores, report.versions.get("vhostd")
    )
    lines += [f"Beside it: {report.versions.get('qsd') or 'no peer was installed'}", ""]
    if report.creation is not None:
        lines += _creation(report.creation)
    if report.throughput is not None:
        lines += _throughput(report.throughput)
    if report.first_writes is not None:
        lines += _first(report.first_writes)
    failures = report.failures + (report.creation.failures if report.creation else [])
    for part in (report.throughput, report.first_writes):
        failures += [f"{f.backend} {f.cell}: {f.reason}" for f in (part.failures if part else [])]
    if failures:
        lines += ["## Failures", "", *(f"- {failure}" for failure in failures), ""]
    return lines


def write(report: Report, directory: Path) -> list[Path]:
    """Writes both forms; returns their paths."""
    name = f"snapshots-{report.mode}"
    return paper.write(directory, report.machine, name, report, markdown(report))
