"""Pieces that reports are made of: heads, tables, line charts, files. Pure but for `write`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from bench import stats
from bench.machine import Machine

__all__ = ["Line", "chart", "head", "milliseconds", "table", "verdict", "write"]

COLOURS = ("#1b6ca8", "#c0392b", "#7f8c8d", "#27ae60", "#8e44ad", "#d68910")
WIDTH_PX, HEIGHT_PX, MARGIN_PX, LEGEND_PX = 720, 240, 48, 300


def head(title: str, machine: Machine, cores: tuple[int, int], version: str | None) -> list[str]:
    virtual = "virtual machine" if machine.hypervisor else "bare metal"
    return [
        f"# {title}, {machine.started}",
        "",
        f"- Machine: {machine.cpu}, {machine.cores} cores ({virtual}), "
        f"{machine.memory_bytes / (1 << 30):.0f} GiB, Linux {machine.kernel}",
        f"- Disk: {machine.filesystem}",
        f"- Commit {machine.commit}; {version or 'vhostd of unknown version'}; load average "
        f"before: {machine.load_average:.2f}"
        + (" (**not a quiet machine**)" if machine.load_average > 1 else ""),
        f"- Back-end on core {cores[0]}, front-end on core {cores[1]}",
        "",
    ]


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table and an empty line."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(str(value) for value in row)} |" for row in rows]
    return [*lines, ""]


def milliseconds(seconds: Iterable[float]) -> str:
    """Median, 99th percentile and maximum; `-` of nothing."""
    ordered = sorted(seconds)
    if not ordered:
        return "-"
    middle = stats.summarise(ordered).median
    p99 = ordered[min(len(ordered) - 1, -(-len(ordered) * 99 // 100) - 1)]
    return f"{middle * 1e3:.2f} / {p99 * 1e3:.2f} / {ordered[-1] * 1e3:.2f}"


def verdict(value: float, target: float, *, at_least: bool = False, noisy: bool = False) -> str:
    """Whether a figure reached what was asked of it. `noisy`: of runs that others disturbed."""
    reached = value >= target if at_least else value <= target
    sign = "≥" if at_least else "≤"
    return f"{'reached' if reached else '**missed**'} (asked: {sign} {target:g})" + (
        "; of **noisy** runs, not to be relied on" if noisy else ""
    )


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]


def chart(
    title: str, lines: Sequence[Line], *, x: str, y: str, limit: float | None = None
) -> list[str]:
    """One line chart from the origin, as an `svg` element; `limit` is drawn as a broken line."""
    points = [point for line in lines for point in line.points]
    x_max = max((at for at, _ in points), default=0.0) or 1.0
    y_max = max([value for _, value in points] + [limit or 0.0], default=0.0) * 1.05 or 1.0
    inner_x, inner_y = WIDTH_PX - 2 * MARGIN_PX, HEIGHT_PX - 2 * MARGIN_PX

    def place(at: float, value: float) -> str:
        return (
            f"{MARGIN_PX + at / x_max * inner_x:.1f},"
            f"{HEIGHT_PX - MARGIN_PX - value / y_max * inner_y:.1f}"
        )

    bottom, right = HEIGHT_PX - MARGIN_PX, WIDTH_PX - MARGIN_PX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH_PX}" height="{HEIGHT_PX}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN_PX}" y="16" font-weight="bold">{escape(title)}</text>',
        f'<polyline points="{MARGIN_PX},{MARGIN_PX} {MARGIN_PX},{bottom} {right},{bottom}" '
        'fill="none" stroke="black"/>',
        f'<text x="{right}" y="{bottom + 28}" text-anchor="end">{escape(x)}</text>',
        f'<text x="{MARGIN_PX - 4}" y="{MARGIN_PX - 6}">{escape(y)}</text>',
    ]
    for step in range(5):
        value, at = y_max * step / 4, x_max * step / 4
        left, top = place(0, value).split(",")
        parts.append(f'<text x="{float(left) - 4}" y="{top}" text-anchor="end">{value:.3g}</text>')
        left = place(at, 0).split(",")[0]
        parts.append(f'<text x="{left}" y="{bottom + 14}" text-anchor="middle">{at:.3g}</text>')
    if limit is not None:
        ends = f"{place(0, limit)} {place(x_max, limit)}"
        parts.append(f'<polyline points="{ends}" fill="none" stroke="black" stroke-dasharray="4"/>')
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        drawn = " ".join(place(at, value) for at, value in line.points)
        parts.append(
            f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        parts.append(
            f'<text x="{MARGIN_PX + LEGEND_PX + 110 * number}" y="16" fill="{colour}">'
            f"{escape(line.name)}</text>"
        )
    return [*parts, "</svg>", ""]


def write(
    directory: Path,
    machine: Machine,
    name: str,
    report: msgspec.Struct,
    text: Sequence[str],
    charts: Sequence[Sequence[str]] = (),
) -> list[Path]:
    """Writes JSON, Markdown and what there is of SVG; returns the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    stamp = machine.started.replace(":", "").replace("+0000", "Z")
    stem = f"{stamp}-{name}"
    files = {f"{stem}.json": msgspec.json.format(msgspec.json.encode(report), indent=1).decode()}
    pictures = [f"{stem}-{number}.svg" for number in range(1, len(charts) + 1)]
    files.update(zip(pictures, ("\n".join(lines) for lines in charts), strict=True))
    files[f"{stem}.md"] = "\n".join([*text, *(f"![]({picture})" for picture in pictures)]) + "\n"
    for file, content in files.items():
        (directory / file).write_text(content if content.endswith("\n") else content + "\n")
    return [directory / file for file in files]
