"""What the space benchmark found, as JSON, Markdown and curves."""

import statistics
from pathlib import Path

import msgspec

from bench import paper
from bench.machine import Machine
from bench.space.account import amplification, latencies, usage
from bench.space.measure import Found, Rotation

__all__ = ["Report", "charts", "markdown", "write"]

USAGE_LIMIT = 1.3
MIB = 1 << 20


class Report(msgspec.Struct):
    machine: Machine
    mode: str
    cores: tuple[int, int]
    versions: dict[str, str | None]
    found: Found | None = None
    failures: list[str] = []


def _name(run: Rotation) -> str:
    return "full speed" if run.rate is None else f"{run.rate:,} requests a second"


def _run(run: Rotation) -> list[str]:
    during = [sample for sample in run.samples if 0 <= sample.at_s <= run.load_s]
    ratios = usage(during)
    lines = [f"## At {_name(run)}", ""]
    if not ratios:
        return [*lines, "No sample was taken.", ""]
    final = usage(run.samples)[-1]
    last = run.samples[-1]
    written = run.load.bytes / run.volume_bytes
    amplified = amplification(run.samples)
    accounted = [sample.live_bytes / sample.reached_bytes for sample in during]
    rows = [
        ["volume", f"{run.volume_bytes >> 20:,} MiB, written over {written:.1f} times"],
        ["snapshots taken, kept", f"{run.snapshots}, {run.keep}"],
        ["requests a second", f"{run.load.requests_per_s:,.0f}"],
        [
            "usage / live data: median, largest",
            f"{statistics.median(ratios):.2f}, {max(ratios):.2f}: "
            f"{paper.verdict(max(ratios), USAGE_LIMIT)}",
        ],
        ["the same when all had settled", f"{final:.2f}: {paper.verdict(final, USAGE_LIMIT)}"],
        [
            "vhostd's own account of live data / the expected: median",
            f"{statistics.median(accounted):.3f}",
        ],
        ["`allocated_bytes` / `du` at the end", f"{last.allocated_bytes / last.du_bytes:.3f}"],
        ["given back by punching", f"{last.punched_bytes / MIB:,.0f} MiB"],
    ]
    if amplified is not None:
        device = "-" if amplified[1] is None else f"{amplified[1]:.3f}"
        rows.append(["write amplification: vhostd's counters", f"{amplified[0]:.3f}"])
        rows.append(["write amplification: the device's (with all others')", device])
    if run.snapshot_s:
        rows.append(
            [
                "taking a snapshot under this load, ms: median / p99 / max",
                paper.milliseconds(run.snapshot_s),
            ]
        )
    lines += paper.table(["", ""], rows)
    lines += [
        "Latencies by intervals, while space was being given back and while not:",
        "",
    ]
    rows = []
    for name, part in zip(
        ("given back", "not"), latencies(run.load.series, run.samples), strict=True
    ):
        if part.p99_ns:
            rows.append(
                [
                    name,
                    str(len(part.p99_ns)),
                    f"{statistics.median(part.p99_ns) / 1e6:.2f}",
                    f"{max(part.p99_ns) / 1e6:.2f}",
                    f"{max(part.max_ns) / 1e6:.2f}",
                ]
            )
    columns = ["space", "intervals", "p99 ms: median", "p99 ms: worst", "longest ms"]
    return [*lines, *paper.table(columns, rows)]


def markdown(report: Report) -> list[str]:
    lines = paper.head(
        f"Space, {report.mode}", report.machine, report.cores, report.versions.get("vhostd")
    )
    lines += [
        "Usage: blocks of the segment files, as `du` counts them. Live data: versions of blocks "
        "that the head and the kept snapshots reach, expected from how much was written between "
        "them, without asking vhostd; a snapshot is not live from the moment its removal was asked "
        "for.",
        "",
    ]
    if report.found is not None:
        cost_s = report.found.hole_s
        lines += [
            "On this file system holes cannot be punched."
            if cost_s is None
            else f"Punching one block out of a file takes {cost_s * 1e6:,.0f} µs on this file "
            "system. (Mounted with `discard` that may be a TRIM each time, which bounds what can "
            "be given back.)",
            "",
        ]
    for run in report.found.runs if report.found else []:
        lines += _run(run)
    if report.found and report.found.left_out:
        lines += [f"There was no time for: {', '.join(report.found.left_out)}.", ""]
    failures = report.failures + (report.found.failures if report.found else [])
    if failures:
        lines += ["## Failures", "", *(f"- {failure}" for failure in failures), ""]
    return lines


def charts(report: Report) -> list[list[str]]:
    found = []
    for run in report.found.runs if report.found else []:
        name = _name(run)
        space = [
            paper.Line("pool (du)", [(s.at_s, s.du_bytes / MIB) for s in run.samples]),
            paper.Line("live data", [(s.at_s, s.reached_bytes / MIB) for s in run.samples]),
        ]
        found.append(paper.chart(f"Space: {name}", space, x="seconds", y="MiB"))
        ratios = [(s.at_s, s.du_bytes / s.reached_bytes) for s in run.samples if s.reached_bytes]
        line = [paper.Line("usage / live", ratios)]
        title = f"Ratio: {name}"
        found.append(paper.chart(title, line, x="seconds", y="", limit=USAGE_LIMIT))
        p99 = [paper.Line("p99", [(i.at_s, i.p99_ns / 1e6) for i in run.load.series])]
        found.append(paper.chart(f"Latency: {name}", p99, x="seconds", y="ms"))
    return found


def write(report: Report, directory: Path) -> list[Path]:
    """Writes all forms; returns their paths."""
    name = f"space-{report.mode}"
    return paper.write(directory, report.machine, name, report, markdown(report), charts(report))
