"""`vhostctl check`: is what is on the device what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from vhostd.cli.common import State, common, complete_volume, pass_state, show_size
from vhostd.cli.progress import progress_bar
from vhostd.errors import DamagedError, NotFoundError
from vhostd.storage.names import check_name, parse_volume

if TYPE_CHECKING:
    from vhostd.storage.check import CheckReport
    from vhostd.storage.rebuild import Report

__all__ = ["check"]


@click.command()
@click.argument("what", metavar="POOL[/VOLUME]|DIR", shell_complete=complete_volume)
@click.option("--volume", help="Only this one, if DIR is given.")
@click.option(
    "--data",
    is_flag=True,
    help="Also read all data, and compare it with its checksums.",
)
@click.option(
    "--repair",
    is_flag=True,
    help="Make maps and counts that are wrong again from the log. The pool has to be closed.",
)
@common
@pass_state
def check(state: State, what: str, volume: str | None, data: bool, repair: bool) -> None:
    """Read a pool, or one volume of it, and report what is damaged. Nothing is changed.

    Records, footers, maps and the catalog are compared with each other; the guests' data only with
    --data, which takes as long as reading all of it.

    What reads is a program of its own, written from docs/format.md. Guests may go on. Without a
    daemon, give the pool's directory.

    With --repair, maps and counts that are wrong are made again from the log, of snapshots and
    clones too; a catalog that is damaged, from all of the segments; a superblock, from the catalog.
    Data is never dropped: blocks that cannot be read are reported, and reading them gives I/O
    errors. The exit code is that of what is left.

    \b
    Examples:
      vhostctl check fast
      vhostctl check fast/web1
      vhostctl check /srv/vhostd/fast --data
      vhostctl check /srv/vhostd/fast --repair
    """
    # Here, and not above: other commands start without it.
    from vhostd.storage.check import check_device

    path, name = _locate(state, what, volume)
    done = None
    if repair:
        from vhostd.cli.rebuild import engine_for_repair
        from vhostd.storage.rebuild import repair as repair_device

        with engine_for_repair() as engine, progress_bar(state, f"repair {what}") as progress:
            report, done = repair_device(path, engine, volume=name, progress=progress)
    if data or not repair:
        with progress_bar(state, f"check {what}") as progress:
            report = check_device(path, volume=name, data=data, progress=progress)
    shown = msgspec.to_builtins(report)
    if done is not None:
        shown["repair"] = msgspec.to_builtins(done)
    state.show(shown, lambda: "\n".join([*(_actions(done) if done else ()), _text(what, report)]))
    if not report.ok:
        raise DamagedError(
            f"{what}: errors: {report.errors}; do what the report says for each of them"
        )


def _actions(done: Report) -> list[str]:
    from vhostd.cli.rebuild import outcome_lines

    return [*(f"repaired: {action}" for action in done.actions), *outcome_lines(done)]


def _text(what: str, report: CheckReport) -> str:
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


def _locate(state: State, what: str, volume: str | None) -> tuple[Path, str | None]:
    """The directory, and the volume that is meant; asks the daemon only for the name of a pool."""
    if what.startswith(("/", ".")) or (Path(what) / "superblock").exists():
        return Path(what), volume
    if "/" in what:
        name = parse_volume(what)
        pool, volume = name.pool, name.volume
    else:
        pool = check_name(what, "pool")
    # Not pool.info: a pool that could not be opened is listed too, and wants a check most.
    for row in state.call("pool.list"):
        if row["name"] == pool:
            return Path(row["device"]), volume
    raise NotFoundError(f"pool {pool} does not exist; `vhostctl pool list` shows those that do")
