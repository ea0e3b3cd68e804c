"""Results as JSON (everything), Markdown (for reading) and SVG (for a glance)."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import msgspec

from bench import stats
from bench.machine import Machine
from bench.matrix import Cell, Mode
from bench.runner import Failure, Run

__all__ = ["Report", "markdown", "svg", "write"]

SUBJECT = "vhostd"


class Report(msgspec.Struct, frozen=True):
    """Everything a run of the benchmarks told."""

    machine: Machine
    mode: Mode
    cores: tuple[int, int]
    versions: dict[str, str]
    missing: list[str]
    page_cache: dict[str, str]
    runs: list[Run]
    failures: list[Failure]

    def of(self, backend: str, cell: Cell) -> list[Run]:
        return [run for run in self.runs if run.backend == backend and run.cell == cell.name]


def _samples(runs: Sequence[Run]) -> list[stats.Sample]:
    return [stats.Sample(r.result.requests_per_s, r.state, bool(r.noise)) for r in runs]


def _rate(per_s: float) -> str:
    """Thousands of requests a second, three significant digits."""
    thousands = per_s / 1000
    digits = max(0, 2 - len(str(int(thousands)).lstrip("0")) + (thousands >= 1))
    return f"{thousands:,.{min(digits, 3)}f}"


def _microseconds(values_ns: Sequence[float]) -> str:
    return f"{stats.summarise(values_ns).median / 1000:,.1f}"


def _states(runs: Sequence[Run]) -> str:
    counts = {state: sum(run.state == state for run in runs) for state in (*stats.STATES, "mixed")}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def _trusted(runs: Sequence[Run]) -> tuple[list[Run], str]:
    """The quiet runs, or all when none was quiet; and what to say of it."""
    quiet = [run for run in runs if not run.noise]
    if not quiet:
        return list(runs), "; **all noisy**" if runs else ""
    left_out = len(runs) - len(quiet)
    return quiet, f"; {left_out} noisy left out" if left_out else ""


def _trips(runs: Sequence[Run]) -> str:
    pairs = [(run.result.round_trip_before, run.result.round_trip_after) for run in runs]
    trips = [trip.median_ns for pair in pairs for trip in pair if trip is not None]
    return f"{min(trips):.0f}-{max(trips):.0f}" if trips else "?"


def _cell_table(report: Report, cell: Cell, backends: Sequence[str]) -> list[str]:
    lines = [
        f"### {cell.title} (`{cell.name}`)",
        "",
        "| back-end | thousand/s: median (min-max) | MB/s | p50 µs | p99 µs | p99.9 µs "
        "| CPU µs/request | RSS MiB | round trip ns | runs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in backends:
        runs, remark = _trusted(report.of(name, cell))
        if not runs:
            continue
        results = [run.result for run in runs]
        rate = stats.summarise(r.requests_per_s for r in results)
        mb = stats.summarise(r.bytes_per_s for r in results).median / 1e6
        cpu = [r.cpu.backend_ns_per_request or 0.0 for r in results]
        rss = max((r.backend_resident_bytes or 0) / (1 << 20) for r in results)
        lines.append(
            f"| {name} | {_rate(rate.median)} ({_rate(rate.low)}-{_rate(rate.high)}) "
            f"| {mb:,.0f} "
            f"| {_microseconds([r.latency_ns.p50 for r in results])} "
            f"| {_microseconds([r.latency_ns.p99 for r in results])} "
            f"| {_microseconds([r.latency_ns.p99_9 for r in results])} "
            f"| {_microseconds(cpu)} | {rss:,.0f} | {_trips(runs)} | {_states(runs)}{remark} |"
        )
    return [*lines, ""]


def _ratio(found: stats.Comparison | None, runs: Sequence[Run]) -> str:
    if found is None:
        return "no like state" if runs else "-"
    text = f"{found.ratio:.2f} ({found.low:.2f}-{found.high:.2f}) {found.state}"
    return f"{text}, noisy" if found.noisy else text


def _ratio_table(report: Report, backends: Sequence[str]) -> list[str]:
    peers = [name for name in backends if name != SUBJECT]
    if SUBJECT not in backends or not peers:
        return [f"No ratios: {SUBJECT} was not among the back-ends that ran.", ""]
    lines = [
        f"| load | {' | '.join(peers)} |",
        "|---" * (len(peers) + 1) + "|",
    ]
    for cell in report.mode.cells:
        subject = _samples(report.of(SUBJECT, cell))
        columns = []
        for peer in peers:
            runs = report.of(peer, cell)
            columns.append(_ratio(stats.compare(subject, _samples(runs)), runs))
        lines.append(f"| {cell.name} | {' | '.join(columns)} |")
    return [*lines, ""]


def _present(report: Report) -> list[str]:
    ran = {run.backend for run in report.runs}
    return [name for name in report.versions if name in ran]


def _head(report: Report) -> list[str]:
    machine, mode = report.machine, report.mode
    virtual = "virtual machine" if machine.hypervisor else "bare metal"
    distance = _trips(report.runs)
    return [
        f"# Side by side, {mode.name}, {machine.started}",
        "",
        f"- Machine: {machine.cpu}, {machine.cores} cores ({virtual}), "
        f"{machine.memory_bytes / (1 << 30):.0f} GiB, Linux {machine.kernel}",
        f"- Disk: {machine.filesystem}",
        f"- Commit {machine.commit}; load average before: {machine.load_average:.2f}",
        f"- Back-end on core {report.cores[0]}, polling front-end on core {report.cores[1]}; one "
        "split ring of 256, indirect descriptors, EVENT_IDX where offered; each request in flight "
        "has one data buffer, used again and again (warm in the CPU's cache)",
        f"- A cache line's round trip between the cores: {distance} ns over all runs "
        f"(sibling: below {stats.SIBLING_MAX_NS:.0f} ns; near: below {stats.NEAR_MAX_NS:.0f} ns)",
        f"- {mode.repeats} rounds, {mode.seconds:g} s a run after {mode.warm_up_s:g} s of warm-up, "
        f"a disk of {mode.region_bytes >> 20} MiB, filled once before (thin loads: never written)",
        "",
        "| back-end | version | page cache |",
        "|---|---|---|",
        *(
            f"| {name} | {version} | {report.page_cache[name]} |"
            for name, version in report.versions.items()
        ),
        "",
    ]


def _warnings(report: Report) -> list[str]:
    lines = []
    if report.missing:
        lines.append(f"- Not installed, so not measured: {', '.join(report.missing)}.")
    if any(not run.caches_dropped for run in report.runs):
        lines.append("- The page cache could not be emptied between runs (that takes root).")
    noisy = [run for run in report.runs if run.noise]
    if noisy:
        lines.append(
            f"- {len(noisy)} of {len(report.runs)} runs were **noisy** (someone else used the "
            "cores, or the host took them; with page cache the kernel's writeback counts as "
            "someone else). They "
            "are left out where there were quiet ones, else marked: do not rely on those figures."
        )
    mixed = [run for run in report.runs if run.state == "mixed"]
    if mixed:
        lines.append(f"- In {len(mixed)} runs the cores' distance changed: they are in no ratio.")
    wrong = {run.backend for run in report.runs if run.result.wrong_used_len}
    if wrong:
        lines.append(
            f"- {', '.join(sorted(wrong))} told used lengths other than the bytes it wrote."
        )
    lines += [
        f"- {failure.backend} {failure.cell}, round {failure.round + 1}: **failed**: "
        f"{escape(failure.reason)}"
        for failure in report.failures
    ]
    return ["## Read with care", "", *lines, ""] if lines else []


def markdown(report: Report) -> str:
    backends = _present(report)
    lines = _head(report) + _warnings(report)
    lines += [
        f"## {SUBJECT} against each",
        "",
        f"Requests a second of {SUBJECT} divided by the peer's: of medians, over runs with the "
        "cores in the same state; in brackets the worst and the best pairing. Above 1: "
        f"{SUBJECT} does more.",
        "",
        *_ratio_table(report, backends),
        "## Figures",
        "",
    ]
    for cell in report.mode.cells:
        lines += _cell_table(report, cell, backends)
    return "\n".join(lines)


COLOURS = ("#1b6ca8", "#8a8a8a", "#b0b0b0", "#6f7f6f", "#a3b3a3", "#d9c8a0")
ROW_PX, LABEL_PX, BAR_PX, TITLE_PX, WIDTH_PX = 16, 130, 380, 24, 620


def svg(report: Report) -> str:
    """Bars of medians with whiskers from min to max; each load has a scale of its own."""
    backends = _present(report)
    colours: Mapping[str, str] = dict(zip(report.versions, COLOURS * 2, strict=False))
    parts: list[str] = []
    y = 8
    for cell in report.mode.cells:
        rows = []
        for name in backends:
            rates = [run.result.requests_per_s for run in _trusted(report.of(name, cell))[0]]
            if rates:
                rows.append((name, stats.summarise(rates)))
        if not rows:
            continue
        parts.append(f'<text x="4" y="{y + 14}" font-weight="bold">{escape(cell.title)}</text>')
        y += TITLE_PX
        scale = BAR_PX / max(summary.high for _, summary in rows)
        for name, summary in rows:
            width, low, high = (
                value * scale for value in (summary.median, summary.low, summary.high)
            )
            middle = y + ROW_PX / 2 - 1
            parts += [
                f'<text x="{LABEL_PX - 6}" y="{y + 11}" text-anchor="end">{escape(name)}</text>',
                f'<rect x="{LABEL_PX}" y="{y}" width="{width:.1f}" height="{ROW_PX - 3}" '
                f'fill="{colours[name]}"/>',
                f'<line x1="{LABEL_PX + low:.1f}" x2="{LABEL_PX + high:.1f}" y1="{middle}" '
                f'y2="{middle}" stroke="black"/>',
                f'<text x="{LABEL_PX + high + 5:.1f}" y="{y + 11}">'
                f"{_rate(summary.median)} k/s</text>",
            ]
            y += ROW_PX
        y += 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH_PX}" height="{y}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>", ""])


def write(report: Report, directory: Path) -> list[Path]:
    """Writes the three forms; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    stamp = report.machine.started.replace(":", "").replace("+0000", "Z")
    stem = f"{stamp}-{report.mode.name}"
    data = msgspec.json.format(msgspec.json.encode(report), indent=1)
    paths = []
    for suffix, text in (
        ("json", data.decode() + "\n"),
        ("md", markdown(report) + f"![medians]({stem}.svg)\n"),
        ("svg", svg(report)),
    ):
        path = directory / f"{stem}.{suffix}"
        path.write_text(text)
        paths.append(path)
    return paths
