"""What the map benchmark found, as JSON, Markdown and a curve."""

import statistics
from pathlib import Path

import msgspec

from bench import paper
from bench.machine import Machine
from bench.maps.measure import BLOCK_BYTES, Found

__all__ = ["Report", "markdown", "write"]

MEMORY_LIMIT_BYTES = 16.0
DISK_LIMIT_PERCENT = 0.5
MIB = 1 << 20


class Report(msgspec.Struct):
    machine: Machine
    mode: str
    cores: tuple[int, int]
    versions: dict[str, str | None]
    found: Found | None = None
    failures: list[str] = []


def _fills(found: Found) -> list[str]:
    rows = []
    for fill in found.fills:
        data = fill.mapped_blocks * BLOCK_BYTES
        memory = fill.memory_bytes / fill.mapped_blocks
        nodes = fill.live_node_bytes * 100 / data
        rows.append(
            [
                fill.pattern,
                f"{fill.mapped_blocks:,}",
                f"{memory:.2f}",
                paper.verdict(memory, MEMORY_LIMIT_BYTES),
                f"{nodes:.3f}",
                paper.verdict(nodes, DISK_LIMIT_PERCENT),
                f"{fill.map_segment_bytes * 100 / data:.3f}",
                f"{fill.checkpoint_s:.2f}",
            ]
        )
    columns = ["pattern", "mapped blocks", "memory, B a block", "", "nodes, % of data", ""]
    columns += ["map segments (du), % of data", "last checkpoint, s"]
    return [
        "## What a map takes",
        "",
        "Of real volumes whose whole map is in memory, after a checkpoint.",
        "",
        *paper.table(columns, rows),
    ]


def _recoveries(found: Found) -> list[str]:
    rows = []
    sizes = sorted({round(r.log_bytes / MIB, -1) for r in found.recoveries})
    for size in sizes:
        of_size = [r for r in found.recoveries if round(r.log_bytes / MIB, -1) == size]
        rows.append(
            [
                f"{statistics.median(r.log_bytes for r in of_size) / MIB:,.0f}",
                f"{statistics.median(r.recover_s for r in of_size):.3f}",
                f"{statistics.median(r.ready_s for r in of_size):.2f}",
                f"{statistics.median(r.idle_s for r in of_size):.2f}",
                f"{statistics.median(r.first_read_ms for r in of_size):.1f}",
                f"{statistics.median(r.records for r in of_size):,.0f}",
                len(of_size),
            ]
        )
    columns = ["log since the checkpoint, MiB", "recovery, s", "ready after, s"]
    columns += ["ready with no log, s", "first read, ms", "records", "runs"]
    dropped = all(r.caches_dropped for r in found.recoveries)
    return [
        "## After kill -9",
        "",
        f"Random 4 KiB writes, no checkpoint between; page cache {'empty' if dropped else 'warm'}. "
        "Medians. `ready`: from the start of the process until a front-end can connect, Python "
        "included.",
        "",
        *paper.table(columns, rows),
    ]


def _first_reads(found: Found) -> list[str]:
    rows = []
    for how in ("stopped", "killed"):
        of_kind = [r for r in found.first_reads if r.how == how]
        if not of_kind:
            continue
        rows.append(
            [
                how,
                f"{of_kind[0].mapped_blocks:,}",
                f"{statistics.median(r.ready_s for r in of_kind):.2f}",
                f"{statistics.median(r.first_read_ms for r in of_kind):.2f}",
                f"{statistics.median(r.then.latency_ns.p50 for r in of_kind) / 1e6:.2f}",
                f"{statistics.median(r.then.latency_ns.p99 for r in of_kind) / 1e6:.2f}",
                f"{statistics.median(r.node_reads for r in of_kind):,.0f}",
                len(of_kind),
            ]
        )
    columns = ["daemon was", "mapped blocks", "ready after, s", "first read, ms"]
    columns += ["next reads, ms: p50", "p99", "nodes read", "runs"]
    return [
        "## The first read of a big map",
        "",
        "Nothing of the map is read ahead: the first reads bring the nodes they need.",
        "",
        *paper.table(columns, rows),
    ]


def markdown(report: Report) -> list[str]:
    lines = paper.head(
        f"Maps, {report.mode}", report.machine, report.cores, report.versions.get("vhostd")
    )
    found = report.found
    if found is not None:
        lines += _fills(found) if found.fills else []
        lines += _recoveries(found) if found.recoveries else []
        lines += _first_reads(found) if found.first_reads else []
    failures = report.failures + (found.failures if found else [])
    if failures:
        lines += ["## Failures", "", *(f"- {failure}" for failure in failures), ""]
    return lines


def charts(report: Report) -> list[list[str]]:
    recoveries = report.found.recoveries if report.found else []
    if not recoveries:
        return []
    by_size = sorted((r.log_bytes / MIB, r.recover_s, r.ready_s) for r in recoveries)
    lines = [
        paper.Line("recovery", [(size, recover_s) for size, recover_s, _ in by_size]),
        paper.Line("process ready", [(size, ready_s) for size, _, ready_s in by_size]),
    ]
    return [paper.chart("After kill -9", lines, x="MiB of log since the checkpoint", y="seconds")]


def write(report: Report, directory: Path) -> list[Path]:
    """Writes all forms; returns their paths."""
    name = f"maps-{report.mode}"
    return paper.write(directory, report.machine, name, report, markdown(report), charts(report))
