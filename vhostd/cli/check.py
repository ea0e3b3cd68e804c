"""`vhostctl check`: is what is on the device what was written?"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click
import msgspec

from vhostd.cli.common import State, common, complete_volume, pass_state, show_size
from vhostd.errors import DamagedError
from vhostd.storage.names import check_name, parse_volume

__all__ = ["check"]


@click.command()
@click.argument("what", metavar="POOL[/VOLUME]|DIR", shell_complete=complete_volume)
@click.option("--data/--no-data", default=True, help="Read all data and check its checksums.")
@common
@pass_state
def check(state: State, what: str, data: bool) -> None:
    """Read a pool, or one volume of it, and report what is damaged. Nothing is changed.

    It reads the device by a program of its own, written from docs/format.md. Without a daemon, give
    the pool's directory.

    \b
    Examples:
      vhostctl check fast
      vhostctl check fast/web1
      vhostctl check /srv/vhostd/fast
    """
    path, volume = _locate(state, what)
    checker: Any = importlib.import_module("vhostd.storage.check")
    report = checker.check_device(path, volume=volume, data=data, progress=None)
    state.show(msgspec.to_builtins(report), lambda: _text(what, report))
    if not report.ok:
        raise DamagedError(
            f"{what}: {report.errors} errors were found; do what the report says for each"
        )


def _text(what: str, report: Any) -> str:
    lines = []
    for finding in report.findings:
        where = "".join(
            f"{name} {value}: "
            for name, value in (("volume", finding.volume), ("segment", finding.segment))
            if value is not None
        )
        lines.append(f"{finding.severity}: {where}{finding.text}; {finding.action}")
    counted = report.errors + report.warnings + report.notes
    if counted > len(report.findings):
        lines.append(f"… and {counted - len(report.findings)} more")
    summary = report.summary
    lines.append(
        f"{what}: {summary.segments} segments, {summary.records} records, {summary.nodes} nodes, "
        f"{summary.data_blocks_read} data blocks read ({show_size(summary.bytes_read)}, "
        f"{summary.seconds:.1f} s): {report.errors} errors, {report.warnings} warnings"
    )
    return "\n".join(lines)


def _locate(state: State, what: str) -> tuple[Path, str | None]:
    # Here, and not above: other commands start without it.
    from vhostd.storage.pool import is_pool

    if what.startswith(("/", ".")) or is_pool(Path(what)):
        return Path(what), None
    if "/" in what:
        name = parse_volume(what)
        pool, volume = name.pool, name.volume
        state.call("volume.info", volume=what)
    else:
        pool, volume = check_name(what, "pool"), None
    return Path(state.call("pool.info", pool=pool)["device"]), volume
